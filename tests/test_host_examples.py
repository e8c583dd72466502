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

FOLDER = Path(__file__).parents[1] / "examples" / "hosts"
SCRIPTS = sorted(FOLDER.glob("with_*.py"))
NEEDED = {"with_diffusers": "diffusers", "with_lucidrains": "denoising_diffusion_pytorch"}
RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_same_images(script: Path) -> None:
    needed, command = NEEDED.get(script.stem), [sys.executable, str(script)]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    folders = [Path(fastdiff.__file__).parents[1]]
    if script.stem == "with_lucidrains":  # whose import may need stand-ins
        command[1:1] = ["-c", f"import lucidrains_host; {RUN}"]
        folders += [FOLDER, Path(__file__).parent]
    if script.stem == "with_compvis":  # nothing requires its bars
        command[1:1] = ["-c", f"import sys; sys.modules['tqdm'] = None; {RUN}"]
        folders += [FOLDER]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\[\d+, 3, \d+, \d+\]: the same images, bit for bit$", run.stdout, re.MULTILINE), run.stdout
    assert len(re.findall(r"[\d.]+ ms as usual, [\d.]+ ms with fastdiff \([\d.]+ x\)", run.stdout)) == 2, run.stdout
    assert "kept" not in run.stdout + run.stderr, run.stdout + run.stderr
    assert len(script.read_text().splitlines()) < 60
