"""How long one step takes: fastdiff, plain PyTorch, and a copy of the same bytes, which is the limit.

    make bench
    python -m pytest benchmarks/bench_step.py -k "ddim and copy"

Every provider gets the same tensors, the same row in the middle of the chain and the same threads. What it computes is
checked before it is timed: fastdiff in every bit against the reference, plain PyTorch within rounding. `summary.py`
sets the medians against the goals.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastdiff import native, noise, ops
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMNS, add_noise_table

ISAS = ("base", "avx2", "avx512")  # the builds of the CPU kernel, by their numbers
SCHEDULE = NoiseSchedule.linear(1000)
SAMPLERS = {
    "ddpm": DDPMSampler(SCHEDULE),
    "learned_range": DDPMSampler(SCHEDULE, variance="learned_range"),
    "ddim": DDIMSampler(SCHEDULE, steps=50),
}
TABLES = {kind: sampler.table for kind, sampler in SAMPLERS.items()} | {"add_noise": add_noise_table(SCHEDULE)}
SEED = 7
CHECKED = 2**18  # elements whose noise the reference draws, at some microseconds each

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is computed, on what, and under which conditions.

    kind: a key of TABLES. output_dtype: of the model output, where it is not that of the state.
    isa: the build of the kernel; None is the one that fastdiff chooses.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format
    isa: str | None = None
    threads: int = 1

    @property
    def name(self) -> str:
        parts = [self.kind, "x".join(map(str, self.shape))]
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.output_dtype is not None:
            parts.append(f"{str(self.output_dtype).removeprefix('torch.')}_output")
        if self.layout != torch.contiguous_format:
            parts.append(str(self.layout).removeprefix("torch."))
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
        """Read and written at the least: x, the model output and the result; for add_noise x0, x_t and the target."""
        channels = 2 if self.kind == "learned_range" else 1
        return self.elements * (2 * self.dtype.itemsize + channels * (self.output_dtype or self.dtype).itemsize)

    @property
    def row(self) -> int:
        return len(TABLES[self.kind]) // 2

    @property
    def t(self) -> int:
        return TABLES[self.kind].timesteps[self.row]


@dataclass(frozen=True)
class Data:
    """What every provider of a case starts from; nobody writes to it."""

    x: Tensor
    model_output: Tensor
    seeds: Tensor

    def part(self, b: int) -> Data:
        return Data(*(tensor[b : b + 1] for tensor in (self.x, self.model_output, self.seeds)))


@functools.lru_cache(maxsize=1)  # the providers of a case follow each other
def make_data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(SEED)
    shape = list(case.shape)
    x = torch.randn(shape, generator=generator).to(case.dtype)
    if case.kind == "learned_range":
        shape[1] *= 2
    output = torch.randn(shape, generator=generator).to(case.output_dtype or case.dtype)
    if case.layout != torch.contiguous_format:
        x, output = x.contiguous(memory_format=case.layout), output.contiguous(memory_format=case.layout)
    return Data(x, output, torch.randint(2**62, (case.shape[0],), generator=generator))


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
    """The public call, with its arguments bound. In place where out is data.x."""
    random = TABLES[case.kind].structure.variance != "none"
    source = {"noise": z} if z is not None else {"seeds": data.seeds if seeds is None else seeds}
    options = (source if random else {}) | {"out": out}
    if case.kind == "add_noise":
        # training draws a timestep for each sample
        t = torch.full(data.seeds.shape, case.t)
        options["backend"] = backend or "auto"
        return functools.partial(ops.add_noise, data.x, t, TABLES["add_noise"], target="noise", **options)
    return functools.partial(SAMPLERS[case.kind].step, data.model_output, case.t, data.x, backend=backend, **options)


def result_of(step: Step) -> tuple[Tensor, ...]:
    result = step()
    return result if isinstance(result, tuple) else (result,)


@functools.lru_cache(maxsize=8)
def expected(case: Case) -> dict[int, tuple[Tensor, ...]]:
    """The reference's result for some samples of the case: they do not depend on each other."""
    data, last = make_data(case), case.shape[0] - 1
    samples = range(last + 1) if case.elements <= CHECKED else {0, last}
    if 2 * math.prod(case.shape[1:]) > CHECKED:
        samples = {last}
    return {b: result_of(fused(case, data.part(b), backend="reference")) for b in samples}


def check_bits(case: Case, step: Step) -> None:
    results = result_of(step)
    # neither threads nor the instruction set may change a bit
    for b, wanted in expected(replace(case, isa=None, threads=1)).items():
        for result, reference in zip(results, wanted, strict=True):
            assert torch.equal(result[b : b + 1], reference), f"{case.name}: sample {b} differs from the reference"


def fastdiff_out(case: Case, data: Data) -> Step:
    step = fused(case, data, out=torch.empty_like(data.x))
    check_bits(case, step)
    return step


def fastdiff_new(case: Case, data: Data) -> Step:
    step = fused(case, data)
    check_bits(case, step)
    return step


def fastdiff_inplace(case: Case, data: Data) -> Step:
    own = replace(data, x=data.x.clone())
    step = fused(case, own, out=own.x)
    check_bits(case, step)
    return step


def fastdiff_int_seed(case: Case, data: Data) -> Step:
    """An int in place of the tensor of seeds, which is then made at every call."""
    same = replace(data, seeds=noise.seeds(SEED, case.shape[0]))
    step = fused(case, data, out=torch.empty_like(data.x), seeds=SEED)
    assert torch.equal(result_of(step)[0], result_of(fused(case, same, backend="reference"))[0])
    return step


# Plain PyTorch


def plain(case: Case, data: Data) -> Step:
    """The formula as it is written, at its best: coefficients are Python floats, every operation is in place."""
    return checked_plain(case, data, folded=False)


def plain_folded(case: Case, data: Data) -> Step:
    """The same with factors moved about until no operation can be saved: x0/px is clipped, noise comes out scaled."""
    return checked_plain(case, data, folded=True)


def checked_plain(case: Case, data: Data, *, folded: bool) -> Step:
    make = PLAIN[case.kind, folded]
    coefficients = [dict(zip(COLUMNS, row, strict=True)) for row in TABLES[case.kind].rows.tolist()]
    step = make(data, coefficients, case.row)

    # the generator's normals are the same whether or not they are scaled on the way
    torch.manual_seed(SEED)
    results = result_of(step)
    torch.manual_seed(SEED)
    z = None
    if TABLES[case.kind].structure.variance != "none":
        z = torch.empty_like(data.x)
        in_memory_order(z).normal_()
    wanted = result_of(fused(case, data, z=z, backend="reference"))
    # some roundings of values below 10
    tolerance = 20 * torch.finfo(case.dtype).eps
    for result, reference in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)
    return step


def in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of a dense tensor: what torch fills with normals at full speed."""
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))


def plain_ddpm(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x, m = data.x, data.model_output
    out, x0, z = (torch.empty_like(x) for _ in range(3))
    draw = in_memory_order(z).normal_
    table = [tuple(c[name] for name in ("px", "pm", "lo", "hi", "a0", "ax", "s")) for c in coefficients]

    def step() -> Tensor:
        px, pm, lo, hi, a0, ax, s = table[row]
        torch.mul(x, px, out=x0).add_(m, alpha=pm).clamp_(lo, hi)
        draw()
        return torch.mul(x0, a0, out=out).add_(x, alpha=ax).add_(z, alpha=s)

    return step


def folded_ddpm(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x, m = data.x, data.model_output
    out, scaled = (torch.empty_like(x) for _ in range(2))
    draw = in_memory_order(out).normal_
    table = [
        (c["pm"] / c["px"], c["lo"] / c["px"], c["hi"] / c["px"], c["a0"] * c["px"], c["ax"], c["s"])
        for c in coefficients
    ]

    def step() -> Tensor:
        pm, lo, hi, a0, ax, s = table[row]
        torch.add(x, m, alpha=pm, out=scaled).clamp_(lo, hi)
        draw(0.0, s)
        return out.add_(scaled, alpha=a0).add_(x, alpha=ax)

    return step


def plain_learned_range(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x = data.x
    m, v = data.model_output.chunk(2, dim=1)
    out, x0, z, std = (torch.empty_like(x) for _ in range(4))
    # exp(0.5*log variance), the log from min_log at v = -1 to max_log at v = 1
    table = [
        tuple(c[name] for name in ("px", "pm", "lo", "hi", "a0", "ax", "s"))
        + ((c["max_log"] - c["min_log"]) / 4, (c["max_log"] + c["min_log"]) / 4)
        for c in coefficients
    ]

    def step() -> Tensor:
        px, pm, lo, hi, a0, ax, s, slope, middle = table[row]
        torch.mul(x, px, out=x0).add_(m, alpha=pm).clamp_(lo, hi)
        torch.mul(v, slope, out=std).add_(middle).exp_()
        return torch.mul(x0, a0, out=out).add_(x, alpha=ax).add_(z.normal_().mul_(std), alpha=s)

    return step


def plain_ddim(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x, m = data.x, data.model_output
    out = torch.empty_like(x)
    table = [tuple(c[name] for name in ("px", "pm", "lo", "hi", "a0", "ae")) for c in coefficients]

    def step() -> Tensor:
        px, pm, lo, hi, a0, ae = table[row]
        return torch.mul(x, px, out=out).add_(m, alpha=pm).clamp_(lo, hi).mul_(a0).add_(m, alpha=ae)

    return step


def folded_ddim(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x, m = data.x, data.model_output
    out = torch.empty_like(x)
    table = [
        (c["pm"] / c["px"], c["lo"] / c["px"], c["hi"] / c["px"], c["a0"] * c["px"], c["ae"]) for c in coefficients
    ]

    def step() -> Tensor:
        pm, lo, hi, a0, ae = table[row]
        return torch.add(x, m, alpha=pm, out=out).clamp_(lo, hi).mul_(a0).add_(m, alpha=ae)

    return step


def plain_add_noise(data: Data, coefficients: list[dict[str, float]], row: int) -> Step:
    x0 = data.x
    t = torch.full(data.seeds.shape, row)
    out, z = torch.empty_like(x0), torch.empty_like(x0)
    each = (-1,) + (1,) * (x0.dim() - 1)
    signal, spread = (torch.tensor([c[name] for c in coefficients], dtype=x0.dtype) for name in ("ax", "s"))

    def step() -> tuple[Tensor, Tensor]:
        torch.mul(x0, signal[t].view(each), out=out)
        return out.addcmul_(z.normal_(), spread[t].view(each)), z

    return step


PLAIN = {
    ("ddpm", False): plain_ddpm,
    ("ddpm", True): folded_ddpm,
    ("learned_range", False): plain_learned_range,
    ("ddim", False): plain_ddim,
    ("ddim", True): folded_ddim,
    ("add_noise", False): plain_add_noise,
}


# The limit


def copy(case: Case, data: Data) -> Step:
    """torch's copy of as many bytes, read and written, as the step has to move."""
    source = torch.ones(case.bytes // 8)
    target = torch.zeros_like(source)
    step = functools.partial(target.copy_, source)
    step()
    assert torch.equal(target, source)
    return step


PROVIDERS = {
    "fastdiff_out": fastdiff_out,
    "fastdiff_new": fastdiff_new,
    "fastdiff_inplace": fastdiff_inplace,
    "fastdiff_int_seed": fastdiff_int_seed,
    "plain": plain,
    "plain_folded": plain_folded,
    "copy": copy,
}

ALL = ("fastdiff_out", "fastdiff_new", "fastdiff_inplace", "plain", "plain_folded", "copy")
SOME = ("fastdiff_out", "plain", "copy")
SMALL, MIDDLE, LARGE = (1, 3, 32, 32), (16, 3, 64, 64), (8, 3, 256, 256)
MEMORY = (64, 2**20)  # 768 MiB that are read and written: far beyond any cache
BENCHMARKS: list[tuple[Case, tuple[str, ...]]] = [
    *((Case("ddpm", (4, 3, 128, 128), isa=isa), ("fastdiff_out",)) for isa in ISAS[::-1]),
    (Case("ddpm", SMALL), (*ALL, "fastdiff_int_seed")),
    (Case("ddpm", MIDDLE), ALL),
    (Case("ddpm", MIDDLE, layout=torch.channels_last), (*SOME, "plain_folded")),
    (Case("ddpm", LARGE), ALL),
    (Case("ddpm", LARGE, threads=2), SOME),
    (Case("ddim", SMALL), ALL),
    (Case("ddim", (4, 4, 64, 64)), ("fastdiff_out", "fastdiff_inplace", "copy")),
    (Case("ddim", MIDDLE), ALL),
    (Case("ddim", LARGE), SOME),
    (Case("ddim", MEMORY), ("fastdiff_out", "fastdiff_inplace", "copy", "plain")),
    (Case("ddim", MEMORY, threads=2), ("fastdiff_out", "copy")),
    (Case("ddpm", MIDDLE, dtype=torch.bfloat16), SOME),
    (Case("ddpm", MIDDLE, dtype=torch.float16), SOME),
    (Case("ddpm", MIDDLE, output_dtype=torch.bfloat16), SOME),
    (Case("learned_range", MIDDLE), SOME),
    (Case("add_noise", MIDDLE), SOME),
]


@contextmanager
def conditions(case: Case) -> Iterator[str]:
    """Set the threads and the instruction set of a case; gives the name of the latter."""
    threads = torch.get_num_threads()
    if case.threads > (os.cpu_count() or 1):
        pytest.skip(f"needs {case.threads} processors")
    if not native.available():
        if case.isa is not None:
            pytest.skip(f"no native library: {native.why_not()}")
        isa = None
    else:
        isa = torch.ops.fastdiff.cpu_isa(-1)
        if case.isa is not None:
            try:
                torch.ops.fastdiff.cpu_isa(ISAS.index(case.isa))
            except RuntimeError:
                pytest.skip(f"{case.isa}: not built, or not on this machine")
    torch.set_num_threads(case.threads)
    try:
        with torch.no_grad():
            yield "reference" if isa is None else ISAS[torch.ops.fastdiff.cpu_isa(-1)]
    finally:
        torch.set_num_threads(threads)
        if isa is not None:
            torch.ops.fastdiff.cpu_isa(isa)


@pytest.mark.benchmark(min_time=0.001, max_time=1.0, min_rounds=9, disable_gc=True)
@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case, names in BENCHMARKS for name in names],
)
def test_step(benchmark, case: Case, provider: str) -> None:
    benchmark.group = case.name
    with conditions(case) as isa:
        step = PROVIDERS[provider](case, make_data(case))
        benchmark(step)
    benchmark.extra_info |= {"case": case.name, "provider": provider, "threads": case.threads}
    benchmark.extra_info |= {"elements": case.elements, "bytes": case.bytes}
    if provider.startswith("fastdiff"):
        benchmark.extra_info["isa"] = isa
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["ns_per_element"] = round(seconds * 1e9 / case.elements, 4)
        benchmark.extra_info["gb_per_s"] = round(case.bytes / seconds / 1e9, 3)
