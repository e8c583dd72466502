"""What is recorded with every benchmark: the machine, the versions, the conditions."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import native

_LOAD = os.getloadavg()


def compiler() -> str | None:
    """What the native library was compiled with, from the note that compilers leave in it."""
    if not native.available():
        return None
    notes = re.findall(rb"(?:GCC: \([^)\0]*\) |clang version )[\d.]+", native.LIBRARY.read_bytes())
    return " / ".join(sorted({note.decode() for note in notes})) or None


def caches() -> dict[str, str]:
    """The caches that one processor sees, as Linux tells them: {"L1 Data": "32K", ...}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind}"] = size
    return found


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for key in ("node", "release", "python_build"):  # the names of one machine and its builds say nothing
        machine_info.pop(key, None)
    machine_info["cpu"] = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    machine_info["cpu"]["caches"] = caches()
    machine_info |= {
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
        "native": native.why_not() or "available",
        "compiler": compiler(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "openmp": {key: value for key, value in sorted(os.environ.items()) if key.startswith(("OMP_", "GOMP_"))},
        "load_average": round(_LOAD[0], 2),
    }


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info["project"] = "fastdiff"


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        # single rounds: the quartiles are enough
        benchmark["stats"].pop("data", None)
        # objects of the test, which would be printed with their addresses or not at all
        benchmark.pop("params", None)
