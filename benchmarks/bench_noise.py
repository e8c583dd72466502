"""How long a normal takes: fastdiff's noise of the contract, torch's and NumPy's generators.

    make bench
    python -m pytest benchmarks/bench_noise.py

float32. fastdiff is the public call, which makes the tensor; the others fill one that is there. fastdiff's normals are
compared in every bit with the array spelling of the contract; the others' by their mean and variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bench_step import EVERY, LARGE, MIDDLE, SEED, check_normal
from machine import threads
from torch import Tensor

from fastdiff import noise

COMPARED = 2  # samples of fastdiff's, which the array spelling makes at some microseconds a number


class Case(NamedTuple):
    shape: tuple[int, ...]
    threads: int = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"normal-{self.elements}" + f"-{self.threads}_threads" * (self.threads > 1)


def fastdiff(case: Case) -> Callable[[], Tensor]:
    seeds = noise.seeds(SEED, case.shape[0])
    draw = functools.partial(noise.normal, case.shape, seeds)
    some = seeds[-COMPARED:] if case.elements <= 2**18 else seeds[-1:]
    words = torch.zeros(len(some), 2, dtype=torch.int64)
    wanted = noise.normal_reference((len(some), *case.shape[1:]), some, words, noise.DOMAINS["initial"])
    assert torch.equal(draw()[-len(some) :], wanted)
    return draw


def of_torch(case: Case) -> Callable[[], Tensor]:
    torch.manual_seed(SEED)
    return torch.empty(case.shape).normal_


def of_numpy(name: str, case: Case) -> Callable[[], np.ndarray]:
    generator = np.random.Generator(getattr(np.random, name)(SEED))
    return functools.partial(generator.standard_normal, dtype=np.float32, out=np.empty(case.shape, np.float32))


PROVIDERS: dict[str, Callable[[Case], Callable[[], Any]]] = {
    "fastdiff": fastdiff,
    "torch": of_torch,
    **{
        f"numpy_{name}": functools.partial(of_numpy, generator)
        for name, generator in (("philox", "Philox"), ("sfc64", "SFC64"), ("pcg64", "PCG64"), ("mt19937", "MT19937"))
    },
}
# NumPy's generators are for one thread
BENCHMARKS = [
    *((Case(shape), provider) for shape in (MIDDLE, LARGE) for provider in PROVIDERS),
    *((Case(LARGE, number), provider) for number in EVERY for provider in ("fastdiff", "torch")),
]


@pytest.mark.benchmark(min_time=0.001, max_time=0.5, min_rounds=9, disable_gc=True)
@pytest.mark.parametrize(
    ("case", "provider"), [pytest.param(case, name, id=f"{case.name}-{name}") for case, name in BENCHMARKS]
)
def test_noise(benchmark: Any, case: Case, provider: str) -> None:
    benchmark.group = case.name
    with threads(case.threads):
        draw = PROVIDERS[provider](case)
        check_normal(torch.as_tensor(draw()).double())
        benchmark(draw)
    benchmark.extra_info |= {"part": "noise", "case": case.name, "provider": provider, "threads": case.threads}
    benchmark.extra_info |= {"device": "cpu", "elements": case.elements, "shape": list(case.shape), "dtype": "float32"}
    if benchmark.stats is not None:
        benchmark.extra_info["ns_per_element"] = round(benchmark.stats.stats.median * 1e9 / case.elements, 4)
