"""`make gpu` as far as it goes without a GPU: that it says so, and that it reads what its parts print."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("gpu_command", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_builds_nothing(tmp_path):
    out = tmp_path / "results"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stdout.splitlines() == [
        "gpu: there is no CUDA device here (make gpu DRY=1 goes through all parts on a CPU)"
    ]
    assert not out.exists()


FINISHED = "584 results on cuda as they should be\n"
CLEAN = FINISHED + "========= ERROR SUMMARY: 0 errors\n"
OURS = (
    "========= Invalid __global__ read of size 16 bytes\n"
    "=========     at void fastdiff::cuda::step_flat<fastdiff::Float32>(fastdiff::cuda::FlatStep)+0x100\n"
)
UNINITIALIZED = OURS.replace("Invalid __global__ read", "Uninitialized __global__ memory read")
OTHERS = UNINITIALIZED.replace("fastdiff::cuda::step_flat<fastdiff::Float32>(fastdiff::cuda::FlatStep)", "at::copy()")
ONE = FINISHED + "========= ERROR SUMMARY: 1 error\n"


@pytest.mark.parametrize(
    "tool, output, status",
    [
        ("memcheck", CLEAN, "passed"),
        ("memcheck", OURS + ONE, "failed"),
        ("memcheck", OTHERS + ONE, "failed"),
        ("initcheck", UNINITIALIZED + ONE, "failed"),
        ("initcheck", OTHERS + ONE, "passed"),
        ("memcheck", "========= Error: Device not supported. Please refer to the documentation\n", "refused"),
        (
            "memcheck",
            "Traceback (most recent call last):\nAssertionError\n========= ERROR SUMMARY: 0 errors\n",
            "failed",
        ),
        ("memcheck", "", "failed"),
        ("racecheck", FINISHED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        ("racecheck", FINISHED + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "failed"),
    ],
)
def test_what_the_sanitizer_prints(command, tool, output, status):
    assert command.judge_sanitizer(tool, output)[0] == status


def test_what_pytest_reports(command, tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no device')\n"
    )
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    subprocess.run([sys.executable, "-m", "pytest", *options, "."], cwd=tmp_path, capture_output=True)
    found = command.tests_of(report)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert "assert 1 == 2" in found["failed"][0]["traceback"]
    assert found["skipped"] == {"no device": 1}
    assert command.tests_of(tmp_path / "nothing.xml") == {"counts": None}


def test_a_part_that_hangs_is_stopped_and_told(command, tmp_path):
    parts = command.Parts(tmp_path, dict(os.environ))
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    parts.run("sleep", sleep, 5.5, tmp_path / "log")
    parts.run("fail", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], 30, tmp_path / "log")
    assert parts.found["sleep"]["status"] == "timed out"
    assert parts.found["fail"]["status"] == "failed"
    assert "words" in (tmp_path / "log").read_text()


def test_long_logs_are_shortened(command, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"begin" + b"x" * command.LOG_BYTES + b"end")
    command.shorten(log)
    data = log.read_bytes()
    assert len(data) <= command.LOG_BYTES + 40 and data.startswith(b"begin") and data.endswith(b"end")
