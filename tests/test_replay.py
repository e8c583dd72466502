"""Recorded steps of five codebases, replayed through the public operations.

The recordings and their checker are not part of this repository: FASTDIFF_REPLAY_DIR says where they are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff

FOLDER = os.environ.get("FASTDIFF_REPLAY_DIR")
TESTS = Path(__file__).parent
# What needs the logic of a host beside its step.
SKIPPED = {"cond_fn": 11, "thresholding": 4}
# Cases equal bit for bit, of 321; the fused step has its own exp for a learned variance, which 39 of them have.
EXACT = {"step": 290, "fused_step": 250}

pytestmark = pytest.mark.skipif(
    not FOLDER or not Path(FOLDER, "check_replay.py").is_file(),
    reason="FASTDIFF_REPLAY_DIR names no folder with the recordings and check_replay.py",
)


def bits_can_be_equal() -> bool:
    """Whether torch's sqrt and exp here are those of the machine that recorded."""
    spec = importlib.util.spec_from_file_location("check_replay", Path(FOLDER or "", "check_replay.py"))
    assert spec is not None and spec.loader is not None
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    recorded = Path(FOLDER or "", "replay", "fingerprint.txt").read_text().strip()
    return bool(checker.fingerprint() == recorded)


LAYOUTS = ["contiguous", "noncontig", "channels_last", "offset1", "transposed"]


@pytest.mark.parametrize(
    ("adapter", "layout"), [*(("step", layout) for layout in LAYOUTS), ("fused_step", "contiguous")]
)
def test_recorded_steps(adapter: str, layout: str) -> None:
    command = [sys.executable, str(Path(FOLDER or "", "check_replay.py"))]
    command += ["--adapter", f"replay_adapter:{adapter}", "--allow-skip", "--exact", "--layout", layout]
    if layout == "contiguous" and bits_can_be_equal():
        command += ["--exact-min", str(EXACT[adapter])]
    path = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=TESTS, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    total = re.search(r"TOTAL: (\d+) passed, 0 failed, (\d+) skipped, 0 error", run.stdout)
    assert total is not None, run.stdout
    assert int(total[2]) <= sum(SKIPPED.values()), run.stdout
