"""Sampling in bulk on a GPU: the same bits by any number of processes that share it, whatever the order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import bulk

FACTORY = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolve = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.classes = torch.nn.Embedding(10, 32)
        self.back = torch.nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x, t, y):
        h = self.convolve(x) + self.classes(y)[:, :, None, None] + t[:, None, None, None] * 1e-3
        return self.back(torch.nn.functional.silu(h))


def network():
    return Network().eval().requires_grad_(False)
"""

SETTINGS = (
    "samples=100",
    "shape=[3, 16, 16]",
    "batch=16",
    "network=convolution:network",
    "schedule.type=cosine",
    "schedule.num_timesteps=100",
    "sampler.type=ddpm",
    "sampler.steps=5",
    "conditions.y={cycle=10}",
)


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bulk.Loaded:
    (tmp_path / "convolution.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return bulk.load(*SETTINGS)


def test_the_same_samples_by_any_number_of_processes(loaded: bulk.Loaded, device: torch.device, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "3"):
        words = ["-m", "fastdiff.bulk", "sample", *SETTINGS, "--out", count, "--device", str(device)]
        subprocess.run([*run, count, *words], check=True, env={**os.environ, "PYTHONPATH": path})
    sums = (tmp_path / "1" / "SHA256SUMS").read_bytes()
    assert (tmp_path / "3" / "SHA256SUMS").read_bytes() == sums

    network, _ = loaded.make(device)
    for chunk in reversed(range(loaded.job.chunks)):
        bulk.sample(loaded.job, network, "here", chunks=[chunk], device=device)
    assert (tmp_path / "here" / "SHA256SUMS").read_bytes() == sums
    checked = bulk.verify(loaded.job, network, "here", [0, 37, 99], device=device)
    assert [one.equal for one in checked] == [True] * 3
