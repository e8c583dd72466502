"""The examples that train through a chain, in small: they run, and what they claim holds."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "training"))

import ddpo  # noqa: E402
import inpaint  # noqa: E402
import reward  # noqa: E402

SCRIPTS = {"reward": reward, "inpaint": inpaint, "ddpo": ddpo}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example; returns what it printed. Its picture must be there, and not be blank."""
    threads = torch.get_num_threads()

    def call(name, *options):
        picture = tmp_path / f"{name}.png"
        monkeypatch.setattr(sys, "argv", [name, *options, f"--picture={picture}"])
        SCRIPTS[name].main()
        with Image.open(picture) as image:
            assert image.format == "PNG" and len(image.getcolors(10**6)) > 20
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def test_reward_rises(run):
    out = run("reward", "--updates=8", "--batch=16", "--steps=6", "--last=3")
    before, after = map(float, re.search(r"mean reward +(\S+) -> (\S+)", out).groups())
    assert after > before + 2


def test_modes_of_gradients_train_alike(run):
    first, second = (
        run("reward", "--updates=2", "--batch=4", "--steps=3", f"--grad={g}") for g in ("full", "checkpoint")
    )
    assert re.findall("update.*", first) == re.findall("update.*", second) != []


def test_inpainting_beats_the_mean_digit(run):
    out = run("inpaint", "--steps=50", "--count=24")
    errors = {name.strip(): float(error) for name, error in re.findall(r"^  (\D+?) +(\d\.\d+) ", out, re.MULTILINE)}
    assert errors["real"] == 0 < errors["restored"] < errors["mean of the training digits"]
    assert errors["restored"] < 0.8 * errors["sampled without a look"]


def test_policy_gradient_raises_the_reward(run):
    out = run("ddpo", "--rounds=5", "--batch=48", "--steps=6")
    assert out.count("first update exactly 1,") == 5
    before, after = map(int, re.search(r"(\d+)% were read as 3, and now (\d+)% are", out).groups())
    assert after > before


def test_ratio_of_a_changed_network_is_not_1(run):
    out = run("ddpo", "--rounds=1", "--batch=8", "--steps=3")
    low, high = map(float, re.search(r"second (\S+) to (\S+)", out).groups())
    assert low < 1 < high


@pytest.mark.parametrize(
    "name, option, message",
    [
        ("reward", "--last=0", "argument --last: expected an integer of at least 1, got '0'"),
        ("reward", "--digit=12", "argument --digit: expected a digit, 0 to 9, got '12'"),
        ("reward", "--grad=half", "argument --grad: invalid choice: 'half'"),
        ("inpaint", "--steps=1001", "argument --steps: expected at most 1000, got 1001"),
        ("inpaint", "--count=298", "argument --count: expected at most 297, got 298"),
        ("ddpo", "--steps=1", "argument --steps: expected 2 to 1000, got 1"),
        ("ddpo", "--batch=many", "argument --batch: expected an integer of at least 1, got 'many'"),
    ],
)
def test_bad_options_exit_with_one_line(run, capsys, name, option, message):
    with pytest.raises(SystemExit, match="2"):
        run(name, option)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_picture_that_cannot_be_written(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(sys, "argv", [name, f"--picture={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS[name].main()
    assert f"argument --picture: cannot write {tmp_path}" in capsys.readouterr().err
