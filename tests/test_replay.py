"""Recorded steps of five codebases, replayed through the integrations and through the public operations.

The recordings and their checker are not part of this repository: FASTDIFF_REPLAY_DIR says where they are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastdiff

FOLDER = os.environ.get("FASTDIFF_REPLAY_DIR")
TESTS = Path(__file__).parent
# What the operations alone lack: the logic of a host beside its step.
SKIPPED = {"step": {}, "fused_step": {"cond_fn": 11, "thresholding": 4}}
# Cases equal bit for bit, of 321; the fused step has its own exp for a learned variance, which 39 of them have.
EXACT = {"step": 310, "fused_step": 250}

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
def test_recorded_steps(adapter: str, layout: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(FOLDER or "", "check_replay.py"))]
    report = tmp_path / "report.json"
    command += ["--adapter", f"replay_adapter:{adapter}", "--allow-skip", "--exact", "--layout", layout]
    command += ["--json", str(report)]
    if layout == "contiguous" and bits_can_be_equal():
        command += ["--exact-min", str(EXACT[adapter])]
    path = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=TESTS, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    cases = json.loads(report.read_text())["cases"]
    assert {state for state, _ in cases.values()} <= {"passed", "skipped"}
    skipped = Counter(reasons[0] for state, reasons in cases.values() if state == "skipped")
    assert skipped == {f"skip: {name}": count for name, count in SKIPPED[adapter].items()}
