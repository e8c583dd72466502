"""The examples of other codebases: each runs by itself, and its images are the same with fastdiff."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "hosts").glob("with_*.py"))
NEEDED = {"with_diffusers": "diffusers", "with_lucidrains": "denoising_diffusion_pytorch"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_same_images(script: Path) -> None:
    needed = NEEDED.get(script.stem)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    path = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\[\d+, 3, \d+, \d+\]: the same images, bit for bit$", run.stdout, re.MULTILINE), run.stdout
    assert len(re.findall(r"[\d.]+ ms as usual, [\d.]+ ms with fastdiff \([\d.]+ x\)", run.stdout)) == 2, run.stdout
    assert len(script.read_text().splitlines()) < 60
