"""What is recorded with every benchmark: the machine, the versions, the conditions."""

from __future__ import annotations

import importlib
import os
import platform
import re
import time
from collections.abc import Iterator
from typing import Any

import machine  # before torch
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import native

_LOAD = os.getloadavg()
_PASSED: set[str] = set()
_FAILED: list[str] = []
_SKIPPED: dict[str, str] = {}
_RUN: dict[str, Any] = {"exitstatus": None, "deselected": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the steps of bench_step.py run")


def synchronized() -> float:
    """The time when the device has done what it was given; read once at each end of a round."""
    torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        marker = item.get_closest_marker("benchmark")
        options = dict(marker.kwargs) if marker else {}
        if "timer" not in options:  # the closest marker counts alone
            item.add_marker(pytest.mark.benchmark(**options, timer=synchronized), append=False)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _FAILED.append(report.nodeid)
    elif report.skipped:  # a whole file
        _SKIPPED[report.nodeid] = reason(report)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rsplit("::", 1)[-1]
    if report.failed:
        _FAILED.append(name)
    elif report.skipped:
        _SKIPPED[name] = reason(report)
    elif report.when == "call":
        _PASSED.add(name)


def reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Why something was skipped."""
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return told.removeprefix("Skipped: ")


def pytest_deselected(items: list[pytest.Item]) -> None:
    _RUN["deselected"] += len(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(exitstatus: int) -> Iterator[None]:
    # before pytest-benchmark's, which writes the file; not 0 after an interruption
    _RUN["exitstatus"] = int(exitstatus)
    return (yield)


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def compiler() -> str | None:
    """What the native library was compiled with, from the notes that compilers leave in what they make.

    Where the build's folder is there, in its objects: the library itself has those of what was linked to it, too.
    """
    if not native.available():
        return None
    objects = sorted((native.LIBRARY.parents[1] / "build" / "native").glob("*.o"))
    made = b"\0".join(path.read_bytes() for path in objects or [native.LIBRARY])
    notes = re.findall(rb"(?:GCC: \([^)\0]*\) |clang version )[\d.]+", made)
    return " / ".join(sorted({note.decode() for note in notes})) or None


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for key in ("node", "release", "python_build"):  # the names of one machine and its builds say nothing
        machine_info.pop(key, None)
    machine_info["cpu"] = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    machine_info["cpu"]["caches"] = machine.caches()
    machine_info |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "diffusers": version("diffusers"),
        "triton": version("triton"),
        "jax": version("jax"),
        "fastdiff": fastdiff.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
        timer = benchmark.get("options", {}).get("timer")
        benchmark["extra_info"]["timer"] = "processor" if timer == "process_time" else "wall"
        # single rounds: the quartiles are enough
        benchmark["stats"].pop("data", None)
        # objects of the test, which would be printed with their addresses or not at all
        benchmark.pop("params", None)
    add_share_of_copy(output_json["benchmarks"])
    output_json["outcome"] = {"passed": len(_PASSED), "failed": _FAILED, "skipped": _SKIPPED, **_RUN}


def add_share_of_copy(benchmarks: list[dict[str, Any]]) -> None:
    """What part of the bandwidth of its case's copy each benchmark reaches, into its extra_info."""
    infos = [(benchmark["extra_info"], benchmark["stats"]["median"]) for benchmark in benchmarks]
    copies = {info["case"]: median for info, median in infos if info.get("provider") == "copy"}
    for info, median in infos:
        if info.get("case") in copies:
            info["share_of_copy"] = round(copies[info["case"]] / median, 4)
