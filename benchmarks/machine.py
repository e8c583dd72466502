"""The machine that benchmarks run on: its processors, its caches, and how many threads take the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Those that this process may use. Asked before torch is imported: its OpenMP binds the thread that does it to one.
ALLOWED = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
PROCESSORS = len(ALLOWED)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

if "torch" not in sys.modules:  # its OpenMP reads them once: every thread stays on a processor of its own
    os.environ.setdefault("OMP_PROC_BIND", "close")
    os.environ.setdefault("OMP_PLACES", "cores")

import torch  # noqa: E402


def caches(folder: Path = CACHES) -> dict[str, str]:
    """The caches that one processor sees, as Linux tells them: {"L1 Data": "32K", ...}. Empty where nobody tells."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:  # some virtual machines name a cache without its size
            continue
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind}"] = size
    return found


@contextmanager
def all_processors() -> Iterator[None]:
    """For this thread and the processes that it starts: all that this process may use, in place of the bound one."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if before is None:
        yield
        return
    os.sched_setaffinity(0, ALLOWED)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many of them for torch's work and fastdiff's; a benchmark that needs more than there are is skipped."""
    if number > PROCESSORS:
        pytest.skip(f"needs {number} processors")
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
