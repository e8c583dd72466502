"""The digits example: its weights, its plain steps, what its page claims, and the page itself."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import DDIMSampler, DDPMSampler

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "digits"))

import arguments  # noqa: E402
import data  # noqa: E402
import demo  # noqa: E402
import model  # noqa: E402
import page  # noqa: E402
import train  # noqa: E402


@pytest.fixture(autouse=True)
def _without_gradients(request):
    with torch.set_grad_enabled("trains" in request.node.name):
        yield


@pytest.fixture(scope="module")
def digits():
    return demo.Digits()


def test_weights_are_small_and_load():
    assert sum(file.stat().st_size for file in model.WEIGHTS.parent.glob("*.safetensors")) < 2_000_000
    net = model.load()
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_data_is_split_without_overlap():
    x_train, y_train, x_real, y_real = data.load()
    assert x_train.shape == (1500, 1, 8, 8) and x_real.shape == (297, 1, 8, 8)
    assert x_train.dtype == torch.float32 and y_train.dtype == torch.int64 and len(y_real) == 297
    assert x_train.min() == -1 and x_train.max() == 1
    assert torch.cdist(x_real.flatten(1), x_train.flatten(1)).min() > 0


def test_classifier_reads_digits_it_has_not_seen(digits):
    assert digits.reader.share_read_as(digits.x_real, digits.y_real) > 0.97


@pytest.mark.parametrize("schedule", [demo.LINEAR, demo.COSINE], ids=lambda s: s.name)
def test_denoiser_predicts_eps(digits, schedule):
    x0, y = digits.x_real[:200], digits.y_real[:200]
    for t in (100, 300, 500, 700):
        x, eps = fastdiff.add_noise(x0, t, schedule, seeds=1, target="noise")
        predicted = digits.denoiser[schedule](x, torch.full((200,), t), y)
        assert predicted.shape == x0.shape and predicted.dtype == torch.float32
        # measured: 0.42 to 0.57 of the better of two predictions that know nothing, 0 and x itself
        assert data.rms(predicted - eps) < 0.7 * min(data.rms(eps), data.rms(x - eps))


@pytest.mark.parametrize(
    "sampler",
    [DDPMSampler(demo.LINEAR, "50"), DDPMSampler(demo.COSINE, "50"), DDIMSampler(demo.LINEAR, 10)],
    ids=["ddpm-linear", "ddpm-cosine", "ddim"],
)
def test_digits_are_read_as_asked_and_plain_steps_agree(digits, sampler):
    result = demo._compare(digits, "", sampler, demo.classes(4))
    assert result.equal
    assert result.share >= 0.95


def test_claims(digits):
    (_, rederived, _), (_, wide, _), (_, raw, _), (_, unclipped, _) = demo.eta_one(digits)
    assert wide < 1e-12 and rederived < 1e-5 and unclipped < 1e-5 < 1e-3 < raw
    assert next(digits.denoiser[demo.LINEAR].parameters()).dtype == torch.float32

    determinism = demo.determinism(digits)
    assert determinism["equal"] and determinism["apart"] > 0.1

    collapse = demo.collapse(digits)
    assert collapse["spread"][False] < 0.1 * collapse["spread"][True]


def test_reconstruction_error_falls_with_steps(digits):
    x, told = digits.x_real[:10], {"y": torch.full((10,), model.NULL_LABEL)}
    errors = []
    for steps in (10, 30, 90):
        sampler = DDIMSampler(demo.LINEAR, steps, clip=None)
        x_T = sampler.invert(digits.denoiser[demo.LINEAR], x, model_kwargs=told)
        errors.append(data.rms(digits.sample(sampler, told["y"], x_T=x_T) - x))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 3


def test_frechet_distance():
    x = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert data.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert data.frechet_distance(x, x + 3) == pytest.approx(4 * 9)
    # of normal distributions with covariances I and 4 I: (2 - 1)^2 in each of 4 dimensions
    assert data.frechet_distance(x, 2 * x) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many"])
@pytest.mark.parametrize(
    "script, option", [(demo, "--per-class"), (demo, "--threads"), (train, "--steps"), (train, "--batch")]
)
def test_counts_on_the_command_line_are_positive(script, option, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", f"{option}={text}"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert f"argument {option}: expected an integer of at least 1, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("script, option", [(demo, "--page"), (train, "--out")])
def test_output_is_checked_before_the_work(script, option, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "output"):
        monkeypatch.setattr(sys, "argv", ["script", option, str(path)])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert f"argument {option}: cannot write {path}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_checking_an_output_leaves_no_file(tmp_path):
    kept, new = tmp_path / "kept", tmp_path / "made" / "folder" / "new"
    kept.write_text("kept")
    for path in (kept, new):
        arguments.require_writable(argparse.ArgumentParser(), "--out", path)
    assert kept.read_text() == "kept"
    assert new.parent.is_dir() and not new.exists()


def test_trains_reproducibly(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (train.train(4, 8).state_dict() for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_page_is_self_contained():
    x = torch.rand(20, 1, 8, 8) * 2 - 1
    comparison = demo.Comparison("DDPM", 1000, x, True, 0.97, 8.0, 7.0, 1e-5, 2e-5, 1e-5)
    results = demo.Results(
        environment="an <environment>",
        held_out=0.99,
        comparisons=[comparison],
        alone=[{"name": "DDIM", "shape": (1, 3, 64, 64), "plain": 2e-5, "fused": 1e-5}],
        trajectory={"t": [999, 0], "x": x[:6].view(3, 2, 1, 8, 8), "x0": x[:6].view(3, 2, 1, 8, 8)},
        grid={(eta, steps): {"images": x[:10], "share": 1.0, "apart": 0.1} for eta in (0.0, 0.4) for steps in (10, 50)},
        eta_one=[("re-derived", 1e-7, 1e-6)],
        determinism={"equal": True, "apart": 0.5},
        inversion={"real": x[:10], "rows": [(10, x[:10], x[10:], 0.1)], "between": x[:11]},
        collapse={"images": {True: x, False: x}, "spread": {True: 4.0, False: 0.1}, "real": 4.2},
        skipping=[
            {"schedule": s, "skip": k, "signal": 0.1, "share": 0.9, "distance": 0.5, "spread": 4.0, "images": x}
            for s in ("linear", "cosine")
            for k in (0.0, 0.2, 0.4, 0.6)
        ],
        seconds=60.0,
    )
    text = page.build(results)
    assert "an &lt;environment&gt;" in text
    assert text.count("<img ") == text.count("data:image/png;base64,") >= 10
    assert "http" not in text and "<script" not in text
    demo.print_comparisons(results.comparisons)
