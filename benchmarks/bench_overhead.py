"""What a small step is made of: the public call at (1, 3, 32, 32), and each part of it by itself.

    python -m pytest benchmarks/bench_overhead.py

One thread, no gradient. The parts, in the order in which a call passes them:

    sampler            `sampler.step` itself: with `ops.step` replaced by a function of its signature that does nothing
    validation         `ops.step` with its checks: with the operator replaced by a function that does nothing
    empty_like         the new tensor, where the call makes one
    dispatch           the operator on no elements: its arguments made C++'s, torch's dispatcher, checks in C++
    kernel             the operator on 16 samples, a sixteenth of that time: the loop over the elements
    increment_version  the note that a tensor was written, where the call was given one

Their medians add up to that of `whole` within 0.2 us. Counted twice: the loop that times a part, the functions put in
place of the next one, and a sixteenth of the dispatch in the kernel. Missed: the checks of memory that an operator
without elements spares itself, and what caches forget between the parts.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from machine import threads
from torch import Tensor

from fastdiff import native, ops
from fastdiff.samplers import DDIMSampler, DDPMSampler, Sampler
from fastdiff.schedules import NoiseSchedule

SHAPE = (1, 3, 32, 32)
EMPTY = (0, 3, 32, 32)
SAMPLES = 16  # of which the kernel's inputs stay in the L2 cache
SCHEDULE = NoiseSchedule.linear(1000)
SAMPLERS: dict[str, Sampler] = {"ddim": DDIMSampler(SCHEDULE, steps=50), "ddpm": DDPMSampler(SCHEDULE)}
CASES = {"ddim_inplace": "ddim", "ddpm_seeds": "ddpm", "ddpm_new": "ddpm"}
PARTS = ("whole", "sampler", "validation", "dispatch", "increment_version")
PARTS_OF_NEW = ("whole", "sampler", "validation", "empty_like", "dispatch")
TIMING = {"min_time": 0.0002, "max_time": 0.15, "min_rounds": 50, "disable_gc": True}

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")


class Inputs:
    """The tensors of a case, and the calls that take them."""

    def __init__(self, case: str, shape: tuple[int, ...] = SHAPE) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sampler = SAMPLERS[CASES[case]]
        self.table = self.sampler.table
        self.row = len(self.table) // 2
        self.t = self.table.timesteps[self.row]
        self.x, self.model_output = (torch.randn(shape, generator=generator) for _ in range(2))
        self.source: dict[str, Tensor] = {}
        if CASES[case] == "ddpm":
            self.source = {"seeds": torch.randint(2**62, shape[:1], generator=generator)}
        out = {"ddim_inplace": self.x, "ddpm_seeds": torch.empty_like(self.x), "ddpm_new": None}[case]
        self.result = torch.empty_like(self.x) if out is None else out
        self.options: dict[str, Any] = self.source | {"out": out}

    def expected(self) -> Tensor:
        step = functools.partial(ops.step, self.table, self.model_output, self.t, self.x.clone(), **self.source)
        return step(backend="reference")

    def public(self) -> Callable[[], Tensor]:
        return functools.partial(self.sampler.step, self.model_output, self.t, self.x, **self.options)

    def operator(self) -> functools.partial[None]:
        """What `ops.step` ends in, as it calls it."""
        rows = self.table.to("cpu", self.x.dtype)
        place = torch.tensor([self.row, self.table.structure.flags])
        noise = self.source.get("seeds", rows)
        return functools.partial(ops._step_row_op, self.result, self.x, self.model_output, noise, rows, place)


def no_step(
    table: Any,
    model_output: Any,
    t: Any,
    x: Any,
    *,
    row: Any = None,
    uncond_output: Any = None,
    guidance_scale: Any = None,
    seeds: Any = None,
    noise: Any = None,
    generator: Any = None,
    out: Any = None,
    rounding: Any = "once",
    backend: Any = "auto",
    clip_grad: Any = "exact",
    log_prob: Any = False,
    reduction: Any = "sum",
    min_logprob_std: Any = None,
) -> Any:
    return out


def no_operator(out: Any, x: Any, model_output: Any, noise: Any, table: Any, place: Any) -> None:
    pass


def whole(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    expected = inputs.expected()
    step = inputs.public()
    assert torch.equal(step(), expected)
    return step


def sampler(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    same = [(name, u.kind, u.default) for name, u in inspect.signature(ops.step).parameters.items()]
    assert [(name, u.kind, u.default) for name, u in inspect.signature(no_step).parameters.items()] == same
    before = inputs.x.clone()
    patch.setattr(ops, "step", no_step)
    step = inputs.public()
    assert step() is inputs.options["out"] and torch.equal(inputs.x, before)
    return step


def validation(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    step = functools.partial(
        ops.step, inputs.table, inputs.model_output, inputs.t, inputs.x, **inputs.source, out=inputs.result
    )
    step()  # the first call makes what the later ones find
    given: list[tuple[Any, ...]] = []
    patch.setattr(ops, "_step_row_op", lambda *arguments: given.append(arguments))
    assert step() is inputs.result
    # the operator would have been called once, with what it is called with in `dispatch` and `kernel`
    for mine, theirs in zip(given.pop(), inputs.operator().args, strict=True):
        assert torch.equal(mine, theirs)
    assert not given
    patch.setattr(ops, "_step_row_op", no_operator)
    patch.setattr(ops, "_increment_version", len)
    return step


def empty_like(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    make = functools.partial(torch.empty_like, inputs.x)
    assert make().shape == inputs.x.shape and make().dtype is inputs.x.dtype
    return make


def kernel(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    expected = inputs.expected()
    call = inputs.operator()
    call()
    assert torch.equal(inputs.result, expected)
    return call


def dispatch(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    call = inputs.operator()
    call()
    # without elements there is no result, but there are checks
    out, x, _, *others = call.args
    with pytest.raises(RuntimeError, match="model_output: expected size 32"):
        call.func(out, x, x[..., :31], *others)
    return call


def increment_version(inputs: Inputs, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    version = inputs.result._version
    note = functools.partial(ops._increment_version, (inputs.result,))
    note()
    assert inputs.result._version == version + 1
    return note


MAKE = {
    "whole": whole,
    "sampler": sampler,
    "validation": validation,
    "empty_like": empty_like,
    "dispatch": dispatch,
    "increment_version": increment_version,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1), torch.no_grad():
        yield


def note(benchmark: Any, case: str, provider: str) -> None:
    benchmark.group = f"small-{case}"
    benchmark.extra_info |= {"part": "overhead", "case": f"small-{case}", "provider": provider, "threads": 1}
    benchmark.extra_info |= {"device": "cpu", "shape": list(SHAPE), "elements": torch.Size(SHAPE).numel()}
    benchmark.extra_info |= {"dtype": "float32", "sampler": CASES[case]}


@pytest.mark.benchmark(**TIMING)
@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, provider, id=f"{case}-{provider}")
        for case in CASES
        for provider in (PARTS_OF_NEW if case == "ddpm_new" else PARTS)
    ],
)
def test_part(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: str, provider: str) -> None:
    inputs = Inputs(case, EMPTY if provider == "dispatch" else SHAPE)
    benchmark(MAKE[provider](inputs, monkeypatch))
    note(benchmark, case, provider)


def time_of_a_sample() -> float:
    """A clock that counts a sixteenth of the seconds."""
    return time.perf_counter() / SAMPLES


@pytest.mark.benchmark(
    **TIMING
    | {"timer": time_of_a_sample, "min_time": TIMING["min_time"] / SAMPLES, "max_time": TIMING["max_time"] / SAMPLES}
)
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    benchmark(kernel(Inputs(case, (SAMPLES, *SHAPE[1:])), monkeypatch))
    note(benchmark, case, "kernel")
