"""What the step costs as work grows: elements, samples, steps, threads. growth.py draws the lines and tells the bends.

    python -m pytest benchmarks/bench_growth.py

A case of bench_step.py at every size, by its providers and with its checks; chains of bench_chain.py, of a network that
computes nothing. The calls share their tensors as long as the cache holds them, and take turns over several above.

Axes: "elements", of samples of 2^16 at the most; "batch", of samples of (4, 16, 16), each with its own seed, and with
its own timestep too ("ddpm_each_t"); "steps", of a chain of (1, 16, 2); "threads", at 1.5 million elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import bench_chain
import bench_step
import pytest
import torch
from machine import PROCESSORS, threads
from peers import Data

resource = pytest.importorskip("resource", reason="this system does not count page faults")

SAMPLE = 2**16
# The largest first: no memory is left over from smaller ones. A result of 3 * 2^21 elements is one more that comes from
# memory, and that the C library still keeps for the next call.
SIZES = [2**24, 3 * 2**21, *(2**power for power in range(22, 7, -2))]
BATCHES = [4**power for power in range(6)]
STEPS = [1, 4, 16, 64, 256, 1000]
ACTIONS = (1, 16, 2)
LARGE = (8, 3, 256, 256)
PROVIDERS = bench_step.PROVIDERS | {"plain": bench_step.PROVIDERS["plain_folded"]}  # its best
TENSORS = {("ddpm", "plain"): 4}  # x, the model output, the result and x0; else the first three
THREADS = sorted({2**power for power in range(PROCESSORS.bit_length())} | {PROCESSORS})


@dataclass(frozen=True)
class Growth:
    """A point. case: what is computed there, a step or a chain. sampler: the case's, or "ddpm_each_t"."""

    axis: str
    value: int
    sampler: str
    case: bench_step.Case | bench_chain.Case

    @property
    def threads(self) -> int:
        return self.case.threads if isinstance(self.case, bench_step.Case) else 1

    @property
    def name(self) -> str:
        threads = f"-{self.threads}_threads" if self.axis != "threads" and self.threads > 1 else ""
        return f"growth-{self.axis}-{self.sampler}-{self.value}{threads}"


def step(axis: str, value: int, sampler: str, shape: tuple[int, ...], threads: int = 1) -> Growth:
    return Growth(axis, value, sampler, bench_step.Case(sampler.removesuffix("_each_t"), shape, threads=threads))


def elements(sampler: str, threads: int = 1) -> list[Growth]:
    shapes = {size: (max(size // SAMPLE, 1), min(size, SAMPLE)) for size in SIZES}
    return [step("elements", size, sampler, shape, threads) for size, shape in shapes.items()]


def each_t(case: bench_step.Case, data: Data, backend: str = "auto") -> Callable[[], torch.Tensor]:
    """The step with a timestep for each sample, which only the kernel looks up."""
    t = data.seeds % len(bench_step.DDPM)
    out = torch.empty_like(data.x)
    return functools.partial(
        bench_step.DDPM.step, data.model_output, t, data.x, seeds=data.seeds, out=out, backend=backend
    )


BENCHMARKS: list[tuple[list[Growth], tuple[str, ...]]] = [
    (elements("ddpm"), ("fastdiff", "plain")),
    (elements("ddim"), ("fastdiff", "fastdiff_new", "plain", "copy")),
    *((elements(sampler, PROCESSORS), ("fastdiff",)) for sampler in ("ddpm", "ddim") if PROCESSORS > 1),
    *(
        ([step("batch", batch, sampler, (batch, 4, 16, 16)) for batch in BATCHES], ("fastdiff",))
        for sampler in ("ddpm", "ddpm_each_t", "ddim")
    ),
    (
        [Growth("steps", steps, "ddpm", bench_chain.Case("fixed", ACTIONS, "ddpm", steps)) for steps in STEPS],
        ("fastdiff", "fastdiff_step", "plain"),
    ),
    ([step("threads", threads, "ddpm", LARGE, threads) for threads in THREADS], ("fastdiff", "plain")),
    ([step("threads", threads, "ddim", LARGE, threads) for threads in THREADS], ("fastdiff", "plain", "copy")),
]


@functools.cache
def fixed_network(shape: tuple[int, ...], device: str) -> tuple[bench_chain.Network, int]:
    """One that gives the same tensor always, and the bytes of that."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(bench_chain.SEED)).to(device)
    return lambda x, t: m, m.nbytes


@contextmanager
def prepared(growth: Growth, provider: str) -> Iterator[tuple[Callable[[], object], int]]:
    """The call to time, checked, under its conditions, and the bytes of the tensors that it goes through."""
    case = growth.case
    if isinstance(case, bench_chain.Case):
        network, nbytes = fixed_network(case.shape, case.device)
        with torch.no_grad(), threads(1):
            bench_chain.check(case, network, provider)
            yield bench_chain.PROVIDERS[provider](case, network), 3 * nbytes
        return
    with bench_step.conditions(case):
        sets = bench_step.make_data(case)
        if growth.sampler == "ddpm_each_t":
            steps = [each_t(case, data) for data in sets]
            result = steps[0]()
            for b in case.samples:
                wanted = each_t(case, bench_step.part(sets[0], b), backend="reference")()
                assert torch.equal(result[b : b + 1], wanted), f"{growth.name}: sample {b} is not the reference's"
            moved = each_t(case, sets[0].map(lambda tensor: tensor.roll(1, 0)))()
            assert torch.equal(result, moved.roll(-1, 0)), f"{growth.name}: a sample changes with its place"
        else:
            steps = [PROVIDERS[provider](case, data) for data in sets]
            if provider != "copy":
                bench_step.check(case, provider, steps[0], sets[0])
        tensors = TENSORS.get((growth.sampler, provider), 3)
        yield bench_step.in_turn(steps), len(sets) * tensors * sets[0].x.nbytes


def page_faults(call: Callable[[], object], calls: int = 4) -> float:
    """How many pages of memory the system hands out during a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


@pytest.mark.benchmark(min_time=0.0005, max_time=0.12, min_rounds=7, disable_gc=True)
@pytest.mark.parametrize(
    ("growth", "provider"),
    [
        pytest.param(growth, provider, id=f"{growth.name}-{provider}")
        for line, providers in BENCHMARKS
        for growth in line
        for provider in providers
    ],
)
def test_growth(benchmark: Any, pytestconfig: pytest.Config, growth: Growth, provider: str) -> None:
    growth = replace(growth, case=replace(growth.case, device=pytestconfig.getoption("--device", "cpu")))
    benchmark.group = f"growth {growth.axis} {growth.sampler}"
    with prepared(growth, provider) as (call, touched):
        benchmark(call)
        faults = page_faults(call)
    elements = math.prod(growth.case.shape)
    benchmark.extra_info |= {
        "part": "growth",
        "case": growth.name,
        "provider": provider,
        "threads": growth.threads,
        "device": growth.case.device,
        "axis": growth.axis,
        "value": growth.value,
        "sampler": growth.sampler,
        "shape": list(growth.case.shape),
        "elements": elements,
        "dtype": "float32",
        "bytes_touched": touched,
        "faults": faults,
    }
    if isinstance(growth.case, bench_step.Case):
        benchmark.extra_info["bytes"] = growth.case.bytes
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            benchmark.extra_info["ns_per_element"] = round(seconds * 1e9 / elements, 4)
            benchmark.extra_info["gb_per_s"] = round(growth.case.bytes / seconds / 1e9, 3)
