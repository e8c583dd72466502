"""The CPU kernels under the address and undefined behaviour sanitizers, instruction set by instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastdiff  # noqa: F401  (defines the operators)
from fastdiff import native

TESTS = Path(__file__).parent
COMPILER = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("c++") or ""]
FLAGS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER[0], reason="no C++ compiler")
@pytest.mark.parametrize("isa", FLAGS)
def test_kernels_stay_within_their_memory(isa: str, tmp_path: Path) -> None:
    if isa != "base" and platform.machine() != "x86_64":
        pytest.skip("x86-64 only")
    if not native.available() or torch.ops.fastdiff.cpu_isa(-1) < list(FLAGS).index(isa):
        pytest.skip("not supported by this machine")
    program = tmp_path / "sanitize"
    sources = [TESTS / "sanitize_kernels.cpp", TESTS.parent / "csrc" / "step_cpu.cpp"]
    options = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", *SANITIZE, f"-DFASTDIFF_ISA={isa}"]
    build = subprocess.run(
        [*COMPILER, *options, *FLAGS[isa], *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    if build.returncode != 0 and "asan" in build.stderr:
        pytest.skip("the compiler has no sanitizer runtime")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "clean\n", run.stderr[:4000]
