"""The CUDA kernels as operators on CPU tensors.

csrc/step_cuda.cu, launch geometry and all, is compiled as plain C++ with host_launch.h in place of the CUDA runtime,
under the library name fastdiff_host: one thread after another does what the threads of a GPU do, and those of a block
that wait for one another take turns.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastdiff  # noqa: F401  (defines the operators)

TESTS = Path(__file__).parent
# Fortified, longjmp would refuse to change to the stack of another thread of a block.
FLAGS = (
    "-U_FORTIFY_SOURCE -std=c++17 -O2 -fPIC -shared -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000ULL"
)


@functools.cache
def load() -> str | None:
    """Build and register the operators torch.ops.fastdiff_host.*, once; why that is not possible, or None."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        return "no C++ compiler"
    torch_folder = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp(prefix="fastdiff_host_")) / "libfastdiff_host.so"
    command = [
        *shlex.split(compiler),
        *FLAGS.split(),
        f'-DFASTDIFF_LAUNCH="{TESTS / "host_launch.h"}"',
        *("-isystem", str(torch_folder / "include"), "-x", "c++", str(TESTS.parent / "csrc" / "step_cuda.cu")),
        *("-o", str(library), f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    definitions = torch.library.Library("fastdiff_host", "DEF")
    for name in (
        *("step", "step_row", "step_torch", "step_backward", "step_distance", "normals", "dynamic_threshold"),
        "cuda_supports",
    ):
        schema = str(getattr(torch.ops.fastdiff, name).default._schema)
        definitions.define(schema.removeprefix("fastdiff::"))
    definitions.define("play(int multiprocessors, int first_block, int last_block) -> int")
    torch.ops.load_library(str(library))
    _kept.append(definitions)
    return None


_kept: list[torch.library.Library] = []


def operators() -> Any:
    """The namespace of the loaded operators."""
    return torch.ops.fastdiff_host


def play(multiprocessors: int = 132, first_block: int = 0, last_block: int = 2**62) -> int:
    """Play a GPU with these multiprocessors, and run these blocks of a launch. Returns the blocks of the last one."""
    return torch.ops.fastdiff_host.play(multiprocessors, first_block, last_block)
