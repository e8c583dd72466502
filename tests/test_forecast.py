"""The forecasting example: nothing of the test years leaks, the scores are right, the forecasts are worth something."""

import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
elnino = pytest.importorskip("statsmodels.datasets.elnino")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "forecast"
sys.path.insert(0, str(EXAMPLE))

import denoiser  # noqa: E402
import forecast  # noqa: E402
import scores  # noqa: E402
import series  # noqa: E402

# examples/digits has a train.py too
spec = importlib.util.spec_from_file_location("forecast_train", EXAMPLE / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

LAST = 12 * (series.TRAINING.stop - series.FIRST_YEAR)  # the first month of the test years


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_series_and_windows():
    found = series.Series()
    assert found.celsius.shape == (732,) and found.celsius[0] == 23.11 and found.celsius[-1] == 22.07
    assert found.anomalies[:LAST].view(-1, 12).mean(0).abs().max() < 1e-5
    known, new = found.training_windows(), found.windows(series.TEST)
    assert (known.start + series.HORIZON).max() == LAST == new.start.min()
    assert (new.start + series.HORIZON).max() == 732 and len(new.start) == 169
    assert known.condition.shape == (535, series.CONDITION) and new.target.dtype == torch.float32
    assert torch.equal(new.context[0], found.anomalies[LAST - series.CONTEXT : LAST])
    back = found.to_celsius(new.target, new.start)
    assert torch.allclose(back, found.truth(new.start), atol=1e-5)
    assert torch.equal(found.truth(new.start)[1], found.celsius[LAST + 1 : LAST + 13])


@pytest.mark.parametrize("held_out", [range(0), range(1970, 1978)])
def test_nothing_is_learned_from_years_that_are_forecast(monkeypatch, held_out):
    def learned():
        found = series.Series(held_out)
        start = torch.tensor([LAST - 30])
        return found.mean, found.std, *found.training_windows(), found.climatology(start)

    before, table = learned(), elnino.load_pandas()
    changed = table.data["YEAR"].isin([*held_out, *series.TEST])
    assert changed.sum() == len(held_out) + len(series.TEST)
    table.data.loc[changed, table.data.columns[1:]] += 5.0
    monkeypatch.setattr(series.elnino, "load_pandas", lambda: table)
    for old, new in zip(before, learned(), strict=True):
        assert torch.equal(old, new)
    assert series.Series(held_out).celsius[-1] > 27


def test_forecasts_without_a_network():
    found = series.Series()
    start = torch.tensor([LAST, LAST + 7])
    usual, same, damped = found.climatology(start), found.persistence(start), found.damped_persistence(start)
    assert usual.shape == (46, 2, 12) and same.shape == (1, 2, 12) and damped.shape[1:] == (2, 12)
    assert usual[0, 0, 0] == 23.11 and usual[-1, 1, 0] == found.celsius[LAST - 12 + 7]
    # the anomaly of December 1995 on top of the mean of April
    assert same[0, 0, 3] == pytest.approx(found.mean[3] + found.celsius[LAST - 1] - found.mean[11])
    # January to March, by numpy's least squares through 0
    anomalies = found.anomalies[:LAST].double().numpy()
    x, y = anomalies[11:-12:12], anomalies[14:-9:12]
    slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    expected = (slope * anomalies[-1] + y - slope * x) * found.std[2].item() + found.mean[2].item()
    np.testing.assert_allclose(damped[:, 0, 2], expected, atol=1e-6)


def test_crps_is_the_integral_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([-0.3, 0.1, 5.0], dtype=torch.float64)
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    for k in range(3):
        below = (members[:, k, None] <= x).double().mean(0)
        squared = torch.trapezoid((below - (truth[k] <= x).double()).square(), x)
        # the definition takes the members for the distribution, the fair estimate for a sample of it
        fair = squared - torch.trapezoid(below * (1 - below), x) / (len(members) - 1)
        assert scores.crps(members, truth)[k].item() == pytest.approx(fair.item(), abs=2e-4)


def test_crps_of_a_normal_is_known_whatever_the_size_of_the_ensemble():
    y = 0.7
    density, below = math.exp(-y * y / 2) / math.sqrt(2 * math.pi), (1 + math.erf(y / math.sqrt(2))) / 2
    known = y * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi)  # Gneiting and Raftery 2007, section 4.2
    generator = torch.Generator().manual_seed(0)
    for count in (2, 64):
        members = torch.randn(count, 200_000 // count, generator=generator)
        found = scores.crps(members, torch.full(members.shape[1:], y)).mean().item()
        assert found == pytest.approx(known, abs=0.005)
    point = torch.tensor([[1.0, -2.0]])
    assert scores.crps(point, torch.tensor([3.0, 0.5])).tolist() == [2.0, 2.5]
    with pytest.raises(ValueError, match=r"members: expected shape \['M', 3\], M at least 1, got \[4, 2\]"):
        scores.crps(torch.zeros(4, 2), torch.zeros(3))


def test_coverage_and_interval():
    members = torch.arange(101.0)[:, None].expand(-1, 5)
    assert scores.coverage(members, torch.tensor([4.0, 5.0, 50.0, 95.0, 96.0]), 0.9) == pytest.approx(0.6)
    values, groups = torch.tensor([1.0, 1.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1])
    assert scores.interval(values, groups) == (1.0, 4.0)  # of two groups, a quarter of the draws has but one


def test_weights_are_small_and_what_training_makes_is_repeatable(threads):
    assert denoiser.WEIGHTS.stat().st_size < 100_000
    assert not any(parameter.requires_grad for parameter in denoiser.load().parameters())
    torch.set_num_threads(1)
    first, second = (train.train(series.Series(), 4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["leave.weight"], denoiser.load().leave.weight)


def test_chain_is_that_of_the_reference():
    windows = series.Series().windows(series.TEST)
    network, (x, condition) = denoiser.load(), forecast.chain(3, windows)
    sampler = dataclasses.replace(denoiser.SAMPLER, backend="reference")
    ours = forecast.with_fastdiff(network, x, condition, seeds=5)
    assert torch.equal(ours, sampler.sample(network, x_T=x, seeds=5, model_kwargs={"condition": condition}))
    assert ours.abs().max() <= denoiser.CLIP and (ours - ours[0]).abs().max() > 0.1


def test_chain_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    network, (x, condition) = denoiser.load(), forecast.chain(2, series.Series().windows(series.TEST))
    with torch.inference_mode():
        assert forecast.same_bits(network, x, condition)


def test_forecasts_are_worth_something(monkeypatch, capsys, tmp_path, threads):
    page = tmp_path / "forecast.html"
    monkeypatch.setattr(forecast, "scheduler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["forecast", "--members=16", "--rounds=1", f"--page={page}"])
    forecast.main()
    out = capsys.readouterr().out
    crps = {name.strip(): float(value) for name, value in re.findall(r"^([a-z ]+?) +(\d\.\d{3}) ", out, re.MULTILINE)}
    # measured with 64 members: 0.56, 0.58, 0.67, 0.99
    assert crps["network"] < 0.6 < crps["climatology"] < crps["persistence"] and "damped persistence" in crps
    assert out.count("diffusers not installed") == 2 and str(page) in out
    text = page.read_text()
    assert text.count("<svg viewBox") == 5 and "nan" not in text
    assert "http" not in text and "<script" not in text and "<img" not in text


def test_other_bits_than_those_of_diffusers_are_an_error(monkeypatch, tmp_path, threads):
    page = tmp_path / "forecast.html"
    times = forecast.Times(batch=1, fastdiff=1.0, network=0.5, diffusers=2.0, equal=False)
    monkeypatch.setattr(forecast, "measure", lambda *arguments: times)
    monkeypatch.setattr(sys, "argv", ["forecast", "--members=2", f"--page={page}"])
    with pytest.raises(SystemExit, match="did not end with the same bits"):
        forecast.main()
    assert "do not end with the same bits" in page.read_text()


@pytest.mark.parametrize("option", ["--members=0", "--rounds=many"])
def test_bad_options_exit_with_one_line(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["forecast", option])
    with pytest.raises(SystemExit, match="2"):
        forecast.main()
    assert "expected an integer of at least 1, got" in capsys.readouterr().err.splitlines()[-1]


def test_output_is_checked_before_the_work(monkeypatch, capsys, tmp_path):
    for script, option in ((forecast, "--page"), (train, "--out")):
        monkeypatch.setattr(sys, "argv", ["script", option, str(tmp_path)])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert f"argument {option}: cannot write {tmp_path}" in capsys.readouterr().err
