"""examples/bulk/same_samples.py says only what happened, and removes only what it made."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import DDIMSampler, NoiseSchedule, bulk

SCRIPT = Path(__file__).parents[1] / "examples" / "bulk" / "same_samples.py"
SAMPLES = 12


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("same_samples", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(out, chunks=None):
    sampler = DDIMSampler(NoiseSchedule.linear(100), steps=2)
    job = bulk.Job(sampler, (2,), SAMPLES, batch=4, chunk=4)
    bulk.sample(job, lambda x, t: torch.zeros_like(x), out, chunks=chunks, progress=False)


def python(monkeypatch, example, *scripts):
    """In place of torchrun: scripts that run one after the other."""
    left = iter(scripts)
    monkeypatch.setattr(example, "command", lambda engine, out, samples: [sys.executable, "-c", next(left)])
    return left


SLEEP = "import time; time.sleep(60)"


def test_a_killed_run_is_continued(example, monkeypatch, tmp_path, capsys):
    make(tmp_path, chunks=[0])
    left = python(monkeypatch, example, SLEEP, "pass")
    example.run_and_kill(tmp_path, SAMPLES)
    assert capsys.readouterr().out.startswith("killed at 4 of 12 samples") and not list(left)


@pytest.mark.parametrize("script", ["pass", SLEEP])
def test_a_run_that_ended_was_not_killed(example, monkeypatch, tmp_path, capsys, script):
    make(tmp_path)
    python(monkeypatch, example, script)
    with pytest.raises(SystemExit, match="ended before it was killed; give more --samples"):
        example.run_and_kill(tmp_path, SAMPLES)
    assert "killed at" not in capsys.readouterr().out


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_failed_was_not_killed(example, monkeypatch, tmp_path, capsys, begun):
    if begun:
        make(tmp_path, chunks=[2])
    python(monkeypatch, example, "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="a run failed"):
        example.run_and_kill(tmp_path, 9 * SAMPLES)
    assert "killed at" not in capsys.readouterr().out


def filled(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    return folder


MADE = ["one_process/manifest.json", "two_processes_killed_then_three/chunks/00000000.npy", "digits.npz", "png/0/0.png"]


@pytest.mark.parametrize("names", [["notes.txt"], [*MADE, "notes.txt"], ["png/holiday.png"], ["digits.npz"]])
def test_a_folder_of_others_is_refused_and_stays(example, monkeypatch, tmp_path, capsys, names):
    filled(tmp_path, names)
    monkeypatch.setattr(sys, "argv", ["same_samples.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        example.main()
    assert (
        end.value.code == 2 and "--out: expected a folder with nothing but what this makes" in capsys.readouterr().err
    )
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_only_what_an_earlier_call_made_is_removed(example, tmp_path):
    example.remove_old(filled(tmp_path / "out", MADE))
    assert not list((tmp_path / "out").iterdir())
    example.remove_old(tmp_path / "out")
    example.remove_old(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        example.remove_old(filled(tmp_path, ["file"]) / "file")
