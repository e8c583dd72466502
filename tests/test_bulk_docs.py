"""What docs/bulk.md shows works as it stands there; the recipes with the engines themselves."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import bulk

PAGE = (Path(__file__).parents[1] / "docs" / "bulk.md").read_text()
ROOT = str(Path(fastdiff.__file__).parents[1])

NETWORK = """
import torch


def network():
    def eps(x, t, y):
        return torch.tanh(x * 0.3 + y.view(-1, 1, 1, 1) * 0.01 + t.view(-1, 1, 1, 1) * 1e-4)

    return eps
"""


def block(start: str, language: str = "python") -> str:
    """The one block of code on the page that begins so."""
    (found,) = re.findall(rf"```{language}\n({re.escape(start)}.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's TOML file and its module; fewer samples, and smaller."""
    toml = block("samples = 50_000", "toml")
    for shown, small in (("50_000", "70"), ("[3, 32, 32] ", "[3, 4, 4]"), ("steps = 50", "steps = 3")):
        assert toml.count(shown) == 1
        toml = toml.replace(shown, small)
    (tmp_path / "run.toml").write_text(toml)
    (tmp_path / "my_module.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alone(folder: Path) -> bytes:
    """The hashes of the same run by one process."""
    subprocess.run(
        [sys.executable, "-m", "fastdiff.bulk", "sample", "run.toml", "--out", "alone"], check=True, env=environment()
    )
    return (folder / "alone" / "SHA256SUMS").read_bytes()


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_accelerate(folder: Path) -> None:
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    (folder / "sample_accelerate.py").write_text(block("# sample_accelerate.py"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    run = subprocess.run([*launch, "sample_accelerate.py"], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "samples" / "SHA256SUMS").read_bytes() == alone(folder)


def test_ray(folder: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    code = block("# sample_ray.py")
    for shown, here in (("num_gpus=1", "num_cpus=1"), ('make("cuda")', 'make("cpu")'), ('["GPU"]', '["CPU"]')):
        assert code.count(shown) == 1
        code = code.replace(shown, here)
    (folder / "sample_ray.py").write_text(code)
    run = subprocess.run([sys.executable, "sample_ray.py"], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "samples" / "SHA256SUMS").read_bytes() == alone(folder)


def test_from_python(folder: Path) -> None:
    code = block("from fastdiff import DDIMSampler")
    for shown, small in (("(3, 32, 32)", "(3, 4, 4)"), ("50_000", "70"), ("49_999", "69"), ("steps=50", "steps=3")):
        assert code.count(shown) == 1
        code = code.replace(shown, small)
    names: dict[str, object] = {"network": lambda x, t, y: torch.tanh(x + y.view(-1, 1, 1, 1) * 0.01)}
    exec(compile(code, "bulk.md", "exec"), names)
    job = names["job"]
    assert isinstance(job, bulk.Job) and bulk.status("samples").complete
    with np.load("samples.npz") as found:
        assert found["arr_0"].shape == (70, 4, 4, 3)
