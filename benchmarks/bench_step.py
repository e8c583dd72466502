"""How long one step takes: fastdiff, those who compute the same, and a copy of as many bytes, the yardstick.

    make bench
    python -m pytest benchmarks/bench_step.py -k "ddim and copy"
    python -m pytest benchmarks/bench_step.py --device cuda

Every provider gets the same tensors, the same row in the middle of the chain and the same threads. What it computes is
checked before it is timed: fastdiff in every bit, the others within rounding, given one noise; noise that a provider
makes for itself, inside compiled code, by its mean and variance. The reference says what is right; of large tensors it
computes a sample or two, and all of them are compared with what fastdiff makes of the same samples in another order.
Larger tensors than the last-level cache holds are there more than once, and the calls take turns, so that none finds
its data in the cache.

The numbers beside the times are those of one call (counting.py). `error` is the largest difference from the formula in
float64 with the same noise, of the samples that the reference computed; `error_without_noise` that of a provider whose
noise nobody else knows, with the noise coefficient zero. Gradients are in bench_train.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import counting
import growth
import peers
import pytest
import torch
from machine import PROCESSORS, caches, threads
from peers import SCALE, SEED, Data, Made, Step, Task, in_memory_order, results_of
from torch import Tensor

from fastdiff import native, noise, ops
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMN, add_noise_table

ISAS = ("base", "avx2", "avx512")  # the builds of the CPU kernel, by their numbers
SCHEDULE = NoiseSchedule.linear(1000)
DDPM, DDIM = DDPMSampler(SCHEDULE), DDIMSampler(SCHEDULE, steps=50)
SAMPLERS = {
    "ddpm": DDPM,
    "ddpm_generator": DDPM,
    "ddpm_noise": DDPM,
    "guidance": DDPM,
    "learned_range": DDPMSampler(SCHEDULE, variance="learned_range"),
    "ddim": DDIM,
    "x0": DDIM,
}
TABLES = {name: sampler.table for name, sampler in SAMPLERS.items()} | {"add_noise": add_noise_table(SCHEDULE)}
MOVED = {  # how often a state and a model output are read and written per element at the least; else twice and once
    "ddpm_noise": (3, 1),
    "guidance": (2, 2),
    "learned_range": (2, 2),
    "x0": (3, 1),
    "add_noise": (3, 0),
}
CHECKED = 2**18  # elements whose noise the reference draws, at some microseconds each
MOMENTS = 2**16  # normals whose mean and variance tell a spread that is 3 % off


@dataclass(frozen=True)
class Case:
    """What is computed, on what, and under which conditions.

    sampler: a key of TABLES. output_dtype: of the model output, where it is not that of the state.
    isa: the build of the CPU's kernel; None is the one that fastdiff chooses.
    """

    sampler: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format
    isa: str | None = None
    threads: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        parts = [self.sampler, "x".join(map(str, self.shape))]
        if self.dtype != torch.float32:
            parts.append(word(self.dtype))
        if self.output_dtype is not None:
            parts.append(f"{word(self.output_dtype)}_output")
        if self.layout != torch.contiguous_format:
            parts.append(word(self.layout))
        if self.isa is not None:
            parts.append(self.isa)
        if self.threads > 1:
            parts.append(f"{self.threads}_threads")
        return "-".join(parts)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Read and written at the least."""
        states, outputs = MOVED.get(self.sampler, (2, 1))
        return self.elements * (states * self.dtype.itemsize + outputs * (self.output_dtype or self.dtype).itemsize)

    @property
    def row(self) -> int:
        return len(TABLES[self.sampler]) // 2

    @property
    def t(self) -> int:
        return TABLES[self.sampler].timesteps[self.row]

    @property
    def random(self) -> bool:
        return TABLES[self.sampler].structure.variance != "none"

    @property
    def samples(self) -> list[int]:
        """Those that are compared with the reference: they do not depend on each other."""
        last = self.shape[0] - 1
        if self.elements <= CHECKED:
            return list(range(last + 1))
        return [last] if 2 * math.prod(self.shape[1:]) > CHECKED else [0, last]

    @property
    def in_cache(self) -> int:
        """So many samples are compared at once: the differences of more would go through memory."""
        return max(CHECKED // math.prod(self.shape[1:]), 1)


def word(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.")


@functools.cache
def last_level_cache(device: str) -> int:
    """Its bytes; on Linux as the first processor sees it, 32 MiB where nobody says."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(growth.cache_sizes({"cpu": {"caches": caches()}}).values(), default=2**25)


def turns(case: Case) -> int:
    """How many sets of tensors the calls take turns over: beyond the cache as many as fill it four times."""
    cache = last_level_cache(case.device)
    return 1 if case.bytes <= cache else math.ceil(4 * cache / case.bytes)


def make_data(case: Case) -> list[Data]:
    """The sets of tensors of a case; all begin with the same numbers."""
    return _make_data(replace(case, isa=None, threads=1))


@functools.lru_cache(maxsize=1)  # the providers of a case follow each other
def _make_data(case: Case) -> list[Data]:
    generator = torch.Generator().manual_seed(SEED)

    def drawn(dtype: torch.dtype, channels: int = 1) -> Tensor:
        batch, *rest = case.shape
        shape = [batch, channels * rest[0], *rest[1:]]
        tensor = torch.randn(shape, generator=generator).to(case.device, dtype)
        return tensor if case.layout == torch.contiguous_format else tensor.contiguous(memory_format=case.layout)

    output = case.output_dtype or case.dtype
    first = Data(
        drawn(case.dtype),
        drawn(output, 2 if case.sampler == "learned_range" else 1),
        torch.randint(2**62, case.shape[:1], generator=generator).to(case.device),
        drawn(output) if case.sampler == "guidance" else None,
        drawn(case.dtype) if case.sampler == "ddpm_noise" else None,
    )
    return [first, *(first.map(torch.clone) for _ in range(turns(case) - 1))]


# fastdiff


def fused(
    case: Case,
    data: Data,
    *,
    out: Tensor | None = None,
    seeds: int | None = None,
    z: Tensor | None = None,
    backend: str | None = None,
) -> Step:
    """The public call, with its arguments bound. In place where out is data.x. z: its noise, whatever the case's is."""
    options: dict[str, Any] = {"out": out} if out is not None else {}
    if z is not None or case.sampler == "ddpm_noise":
        options["noise"] = data.noise if z is None else z
    elif case.sampler == "ddpm_generator":
        options["generator"] = torch.Generator(case.device).manual_seed(SEED)
    elif case.random:
        options["seeds"] = data.seeds if seeds is None else seeds
    if case.sampler == "add_noise":
        # training draws a timestep for each sample
        t = torch.full(data.seeds.shape, case.t, device=data.x.device)
        options |= {"target": "noise", "backend": backend or "auto"}
        return functools.partial(ops.add_noise, data.x, t, TABLES["add_noise"], **options)
    if data.uncond_output is not None:
        options |= {"uncond_output": data.uncond_output, "guidance_scale": SCALE}
    sampler = SAMPLERS[case.sampler]
    step = sampler.step_with_x0 if case.sampler == "x0" else sampler.step
    return functools.partial(step, data.model_output, case.t, data.x, backend=backend, **options)


def fastdiff(case: Case, data: Data, backend: str | None = None) -> Step:
    return fused(case, data, out=torch.empty_like(data.x), backend=backend)


def fastdiff_new(case: Case, data: Data) -> Step:
    return fused(case, data)


def fastdiff_inplace(case: Case, data: Data) -> Step:
    # its input changes from call to call, and stays what it began with for who compares
    x = data.x.clone()
    return fused(case, replace(data, x=x), out=x)


def fastdiff_int_seed(case: Case, data: Data) -> Step:
    """An int in place of the tensor of seeds, which is then made at every call."""
    return fused(case, data, out=torch.empty_like(data.x), seeds=SEED)


def triton(case: Case, data: Data) -> Step:
    if case.device == "cpu":
        pytest.skip("Triton's kernels need a GPU")
    return fastdiff(case, data, "triton")


def copy(case: Case, data: Data) -> Step:
    """torch's copy of as many bytes, read and written, as the step has to move."""
    source = torch.ones(case.bytes // 8, device=case.device)
    target = torch.zeros_like(source)
    step = functools.partial(target.copy_, source)
    step()
    assert torch.equal(target, source)
    return step


def peer(make: Callable[[Task], Step | Made]) -> Callable[[Case, Data], Step | Made]:
    return lambda case, data: make(Task(case.sampler, SCHEDULE, TABLES[case.sampler], case.row, data))


OURS: dict[str, Callable[[Case, Data], Step | Made]] = {
    "fastdiff": fastdiff,
    "fastdiff_new": fastdiff_new,
    "fastdiff_inplace": fastdiff_inplace,
    "fastdiff_int_seed": fastdiff_int_seed,
    "triton": triton,
}
PROVIDERS = OURS | {
    "host": peer(peers.host),
    "improved_diffusion": peer(peers.improved_diffusion),
    "plain": peer(peers.plain),
    "plain_folded": peer(functools.partial(peers.plain, folded=True)),
    "compiled": peer(peers.compiled),
    "compiled_noise_outside": peer(functools.partial(peers.compiled, noise_outside=True)),
    "jax": peer(peers.jax),
    "copy": copy,
}


# Checks


def torch_noise(case: Case, data: Data) -> Tensor:
    """What torch draws after torch.manual_seed(SEED), or from a generator of that seed."""
    z = torch.empty_like(data.x)
    in_memory_order(z).normal_(generator=torch.Generator(case.device).manual_seed(SEED))
    return z


@functools.lru_cache(maxsize=8)
def by_reference(case: Case) -> dict[int, tuple[Tensor, ...]]:
    """fastdiff's results for the samples that are compared, with the noise of their seeds."""
    data = make_data(case)[0]
    return {b: results_of(fused(case, part(data, b), backend="reference")) for b in case.samples}


def part(data: Data, b: int) -> Data:
    return data.map(lambda tensor: tensor[b : b + 1])


def check(case: Case, provider: str, step: Step, data: Data) -> dict[str, Any]:
    """AssertionError unless the first call of a step gives what it should: in every bit, where it is fastdiff's.

    Returns the largest error, and whether the bits are the reference's.
    """
    ours, own_seeds = provider in OURS, provider != "fastdiff_int_seed"
    if not own_seeds:
        data = replace(data, seeds=noise.seeds(SEED, case.shape[0], case.device))
    torch.manual_seed(SEED)
    results = results_of(step)
    error, z = 0.0, data.noise
    contract = ours and case.random and case.sampler not in ("ddpm_generator", "ddpm_noise")
    if case.random and z is None and not contract:
        z = torch_noise(case, data)
    for b in case.samples:
        one, z_b = part(data, b), None if z is None else z[b : b + 1]
        if not contract:
            wanted = results_of(fused(case, one, z=z_b, backend="reference"))
        else:
            # neither threads nor the instruction set may change a bit
            same = replace(case, isa=None, threads=1)
            wanted = by_reference(same)[b] if own_seeds else results_of(fused(case, one, backend="reference"))
            domain = "forward" if case.sampler == "add_noise" else "step"
            z_b = noise.normal(one.x.shape, one.seeds, t=case.t, domain=domain)
        exact = results_of(fused(case, one.map(widened), z=None if z_b is None else z_b.double(), backend="reference"))
        for result, reference, truth in zip(results, wanted, exact, strict=True):
            if ours:
                assert torch.equal(result[b : b + 1], reference), f"{case.name}: sample {b} is not the reference's"
            else:
                compare(case, result[b : b + 1], reference)
            error = max(error, float((result[b : b + 1].double() - truth.to(result.device)).abs().max()))
    if len(case.samples) < case.shape[0]:
        for result, same in zip(results, in_another_order(case, data, None if contract else z), strict=True):
            for b in range(0, case.shape[0], case.in_cache):
                pieces = [tensor[b : b + case.in_cache] for tensor in (result, same)]
                if ours:
                    assert torch.equal(*pieces), f"{case.name}: sample {b} or one behind it changes with its place"
                else:
                    compare(case, *pieces)
    return {"error": error} | ({"equal": True} if ours else {})


def in_another_order(case: Case, data: Data, z: Tensor | None) -> tuple[Tensor, ...]:
    """fastdiff's results, of a batch in which every sample stood one place further on, the last one at the first."""
    rolled = data.map(lambda tensor: tensor.roll(1, 0))
    results = results_of(fused(case, rolled, z=None if z is None else z.roll(1, 0)))
    return tuple(result.roll(-1, 0) for result in results)


def widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def compare(case: Case, result: Tensor, reference: Tensor) -> None:
    # some roundings of values below 10
    tolerance = 20 * max(torch.finfo(dtype).eps for dtype in (case.dtype, case.output_dtype or case.dtype))
    torch.testing.assert_close(result, reference.to(result.device, result.dtype), rtol=tolerance, atol=tolerance)


def check_hidden(case: Case, made: Made, data: Data) -> dict[str, Any]:
    """The same for noise that only the provider knows: without it within rounding, and its first two moments."""
    assert made.noiseless is not None
    torch.manual_seed(SEED)
    (mean,) = results_of(made.noiseless)
    error, mean = 0.0, mean.clone()
    if len(case.samples) < case.shape[0]:
        (same,) = in_another_order(case, data, torch.zeros_like(data.x))
        for b in range(0, case.shape[0], case.in_cache):
            compare(case, mean[b : b + case.in_cache], same[b : b + case.in_cache])
    mean = mean.double()
    for b in case.samples:
        one = part(data, b)
        z = torch.zeros_like(one.x)
        (wanted,) = results_of(fused(case, one, z=z, backend="reference"))
        (exact,) = results_of(fused(case, one.map(widened), z=z.double(), backend="reference"))
        compare(case, mean[b : b + 1].to(wanted.dtype), wanted)
        error = max(error, float((mean[b : b + 1] - exact.to(mean.device)).abs().max()))
    s = float(TABLES[case.sampler].rows[case.row][COLUMN["s"]])
    draws = range(math.ceil(MOMENTS / case.elements))
    drawn = [results_of(made.step if made.again is None else functools.partial(made.again, i))[0] - mean for i in draws]
    # mean and sum were rounded, which spreads them by a third of that at the most, in 16 bits to be seen
    check_normal(torch.stack(drawn) / s, (torch.finfo(case.dtype).eps / s) ** 2)
    return {"error_without_noise": error}


def check_normal(z: Tensor, rounding: float = 0.0) -> None:
    """AssertionError unless mean and variance are those of so many standard normals, within five of their spreads.

    rounding: what else the variance may be off by.
    """
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n), f"mean {float(z.mean())} of {n} normals"
    off = abs(float(z.var()) - 1) - rounding
    assert off < 5 * math.sqrt(2 / n), f"variance {float(z.var())} of {n} normals"


def checked_plain(case: Case, data: Data, *, folded: bool) -> Step:
    """The plain step over tensors of one's own, checked."""
    provider = "plain_folded" if folded else "plain"
    step = PROVIDERS[provider](case, data)
    assert not isinstance(step, Made)
    check(replace(case, device=str(data.x.device)), provider, step, data)
    return step


# The benchmarks: not the whole product, but what answers a question

PLAIN = ("plain", "plain_folded")  # which of them is faster depends on the size
ALL = ("fastdiff", "fastdiff_new", "fastdiff_inplace", "host", "improved_diffusion", *PLAIN, "copy")
COMPILED = ("compiled", "compiled_noise_outside")
SOME = ("fastdiff", "host", *PLAIN, "copy")
SOME_UNFOLDED = ("fastdiff", "host", "plain", "copy")
FEW = ("fastdiff", *PLAIN, "copy")
ACTIONS, SMALL, LATENTS = (1, 16, 2), (1, 3, 32, 32), (4, 4, 64, 64)
MIDDLE, LARGE = (16, 3, 64, 64), (8, 3, 256, 256)
MEMORY = (64, 2**20)  # 768 MiB that are read and written: far beyond any CPU's cache
HUGE = ((2**10, 2**16), (2**12, 2**16))  # for a GPU
EVERY = sorted({2, max(2, PROCESSORS)})  # threads
HALVES = (torch.bfloat16, torch.float16)
BENCHMARKS: list[tuple[Case, tuple[str, ...]]] = [
    # the builds of the CPU's kernel
    *((Case("ddpm", (4, 3, 128, 128), isa=isa), ("fastdiff",)) for isa in ISAS[::-1]),
    # every way to compute a step, from the smallest to what no cache holds
    (
        Case("ddpm", ACTIONS),
        ("fastdiff", "fastdiff_inplace", "host", "improved_diffusion", *PLAIN, *COMPILED, "jax", "copy"),
    ),
    (Case("ddpm", SMALL), (*ALL, "fastdiff_int_seed", *COMPILED, "jax", "triton")),
    (Case("ddpm", MIDDLE), (*ALL, *COMPILED, "jax", "triton")),
    (Case("ddpm", LARGE), (*ALL, *COMPILED, "jax", "triton")),
    (Case("ddpm", MEMORY), ("fastdiff", "copy")),
    (Case("ddim", ACTIONS), ("fastdiff", "fastdiff_inplace", "host", *PLAIN, "jax", "copy")),
    (Case("ddim", SMALL), (*SOME, "fastdiff_new", "fastdiff_inplace", "jax")),
    (Case("ddim", LATENTS), (*SOME, "fastdiff_inplace")),
    (Case("ddim", MIDDLE), (*SOME, "fastdiff_new", "fastdiff_inplace", "compiled", "jax")),
    (Case("ddim", LARGE), (*SOME, "jax")),
    (Case("ddim", MEMORY), ("fastdiff", "fastdiff_inplace", *PLAIN, "copy")),
    # all threads
    *((Case("ddpm", LARGE, threads=threads), SOME) for threads in EVERY),
    *((Case("ddim", LARGE, threads=threads), FEW) for threads in EVERY),
    *((Case("ddim", MEMORY, threads=threads), ("fastdiff", "copy")) for threads in EVERY),
    # where the noise comes from
    (Case("ddpm_generator", MIDDLE), SOME_UNFOLDED),
    (Case("ddpm_noise", MIDDLE), ("fastdiff", "plain", "copy")),
    # more tensors
    (Case("learned_range", MIDDLE), (*SOME_UNFOLDED, "improved_diffusion")),
    *((Case(sampler, MIDDLE), SOME_UNFOLDED) for sampler in ("guidance", "x0", "add_noise")),
    # dtypes and layouts
    *((Case(sampler, MIDDLE, dtype), SOME) for dtype in HALVES for sampler in ("ddpm", "ddim")),
    *((Case(sampler, MIDDLE, output_dtype=torch.bfloat16), SOME) for sampler in ("ddpm", "ddim")),
    (Case("ddpm", MIDDLE, layout=torch.channels_last), FEW),
    # what only a GPU has the memory bandwidth for
    *(
        (Case(sampler, shape, dtype, device="cuda"), ("fastdiff", "triton", *PLAIN, "compiled", "copy"))
        for sampler in ("ddpm", "ddim")
        for shape in HUGE
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


@contextmanager
def conditions(case: Case) -> Iterator[str | None]:
    """Set the threads and the instruction set of a case; gives the name of the latter, None on a GPU."""
    on_cpu = case.device == "cpu"
    if not on_cpu and (case.isa is not None or case.threads > 1):
        pytest.skip("instruction sets and threads are a CPU's")
    if not on_cpu and torch.cuda.mem_get_info(case.device)[0] < 8 * case.bytes:
        pytest.skip(f"needs {8 * case.bytes >> 30} GiB of the GPU's memory")
    if not native.available():
        if case.isa is not None:
            pytest.skip(f"no native library: {native.why_not()}")
        before = None
    else:
        before = torch.ops.fastdiff.cpu_isa(-1)
        if case.isa is not None:
            try:
                torch.ops.fastdiff.cpu_isa(ISAS.index(case.isa))
            except RuntimeError:
                pytest.skip(f"{case.isa}: not built, or not on this machine")
    try:
        with torch.no_grad(), threads(case.threads):
            yield None if not on_cpu else "reference" if before is None else ISAS[torch.ops.fastdiff.cpu_isa(-1)]
    finally:
        if before is not None:
            torch.ops.fastdiff.cpu_isa(before)


def in_turn(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    forever = itertools.cycle(steps)
    return lambda: next(forever)()


@pytest.mark.benchmark(min_time=0.001, max_time=0.5, min_rounds=9, disable_gc=True)
@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case, names in BENCHMARKS for name in names],
)
def test_step(benchmark: Any, pytestconfig: pytest.Config, case: Case, provider: str) -> None:
    device = pytestconfig.getoption("--device")
    if case.device != "cpu" and device == "cpu":
        pytest.skip("a size for a GPU")
    case = replace(case, device=device)
    benchmark.group = case.name
    with conditions(case) as isa:
        sets = make_data(case)
        mades = [one if isinstance(one, Made) else Made(one) for one in (PROVIDERS[provider](case, d) for d in sets)]
        made = mades[0]
        found: dict[str, Any] = {}
        if provider != "copy":
            found = (
                check(case, provider, made.step, sets[0])
                if made.noiseless is None
                else check_hidden(case, made, sets[0])
            )
        if provider != "jax":  # whose operations torch does not see
            found |= counting.operations(made.step, case.elements) if made.counts is None else made.counts
            found |= counting.allocations(made.step, device)
        benchmark(in_turn([each.step for each in mades]))
    benchmark.extra_info |= {"part": "step", "case": case.name, "provider": provider, "threads": case.threads}
    benchmark.extra_info |= {
        "sampler": case.sampler,
        "shape": list(case.shape),
        "dtype": word(case.dtype),
        "output_dtype": word(case.output_dtype or case.dtype),
        "layout": word(case.layout),
        "device": device,
        "elements": case.elements,
        "bytes": case.bytes,
        "turns": len(sets),
    }
    benchmark.extra_info |= found
    if provider in OURS and isa is not None:
        benchmark.extra_info["isa"] = isa
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["ns_per_element"] = round(seconds * 1e9 / case.elements, 4)
        benchmark.extra_info["gb_per_s"] = round(case.bytes / seconds / 1e9, 3)
