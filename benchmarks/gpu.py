"""The step on a GPU: device time beside a copy of as many bytes, host time, launches, and whole chains. One JSON file.

    python benchmarks/gpu.py --json results.json [--quick] [--seconds 200] [--commit ID] [--device cpu]

Conditions, which the file repeats. Times are medians of several rounds. Device time is taken by CUDA events around many
calls: up to 2^24 elements in one CUDA graph, as the host would be slower than the device; in a loop where that is not
so, and for what is not captured (diffusers, gradients, torch's stream), which for small tensors tells the time of the
host. Up to 2^20 elements the calls share their tensors, which then come from L2, as they do behind a network; above,
they take turns over as many as fill several times the L2 cache, so that every call reads from memory. Shares are of the
time that out.copy_(x) takes, in the same run and the same way, for the bytes that a step must move at the least. Every
result is compared with the reference, or with the same formula, before it is timed. On a CPU it is a rehearsal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_step
import peers
import torch
from torch import Tensor

import fastdiff
from fastdiff import native, ops, torch_stream
from fastdiff.samplers import DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMNS, Table

Call = Callable[[], object]

TABLES = bench_step.TABLES
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
}
KINDS = {  # the table, and how often state and model output are moved per element at the least
    "ddpm": ("ddpm", 2, 1),
    "ddim": ("ddim", 2, 1),
    "ddpm_torch_stream": ("ddpm", 2, 1),
    "ddpm_noise_tensor": ("ddpm", 3, 1),
    "guidance": ("ddim", 2, 2),
    "x0_too": ("ddim", 3, 1),
    "learned_range": ("learned_range", 2, 2),
    "add_noise": ("add_noise", 3, 0),
    "backward": ("ddpm", 3, 2),
}
SAMPLE = 2**16  # elements of a sample at the most: larger tensors are batches
L2 = 2**28  # bytes that the tensors of calls that take turns have together: several times an L2 cache
SHARED = 2**20  # elements up to which the calls share their tensors
GRAPH = 2**24  # elements up to which calls are captured
DIFFUSERS = ("diffusers", "diffusers_enabled")  # its scheduler, and with fastdiff


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    dtype: str
    elements: int

    @property
    def bytes(self) -> int:
        _, states, outputs = KINDS[self.kind]
        state, output = DTYPES[self.dtype]
        return self.elements * (states * state.itemsize + outputs * output.itemsize)

    @property
    def table(self) -> Table:
        return TABLES[KINDS[self.kind][0]]

    @property
    def row(self) -> int:
        return len(self.table) // 2

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype}, 2^{round(math.log2(self.elements))}"


class Data:
    """The tensors of one call."""

    def __init__(self, case: Case, device: torch.device) -> None:
        state, output = DTYPES[case.dtype]
        sample = min(case.elements, SAMPLE)
        shape = (case.elements // sample, 4, sample // 4)
        wide = (shape[0], 8, shape[2]) if case.kind == "learned_range" else shape
        self.x = torch.randn(shape, device=device, dtype=state)
        self.model_output = torch.randn(wide, device=device, dtype=output)
        self.out = torch.full_like(self.x, math.nan)
        self.seeds = torch.arange(shape[0], device=device) * 7 + 1
        self.noise = torch.randn_like(self.x) if case.kind == "ddpm_noise_tensor" else None
        self.uncond = torch.randn_like(self.model_output) if case.kind == "guidance" else None
        self.scale = torch.full((1,), 1.5, device=device)
        self.t = torch.full((shape[0],), case.table.timesteps[case.row], device=device)
        self.generator = torch.Generator(device).manual_seed(1)


# Providers: what a case is computed by


def fused(case: Case, data: Data, backend: str, out: Tensor | None = None) -> Call:
    """The public operation; into data.out, or `out` (x: in place)."""
    out = data.out if out is None else out
    common: dict[str, Any] = {"row": case.row, "backend": backend}
    m, x, table = data.model_output, data.x, case.table
    if case.kind == "backward":
        leaves = x.clone().requires_grad_(), m.clone().requires_grad_()
        result = ops.step(table, leaves[1], None, leaves[0], seeds=data.seeds, **common)
        return functools.partial(torch.autograd.grad, result, leaves, torch.ones_like(x), retain_graph=True)
    if case.kind == "add_noise":
        return functools.partial(
            ops.add_noise, x, data.t, table, seeds=data.seeds, target="v", out=out, backend=backend
        )
    options = {
        "ddpm_torch_stream": {"generator": data.generator},
        "ddpm_noise_tensor": {"noise": data.noise},
        "guidance": {"uncond_output": data.uncond, "guidance_scale": data.scale},
    }.get(case.kind, {"seeds": data.seeds} if table.structure.variance != "none" else {})
    function = ops.step_with_x0 if case.kind == "x0_too" else ops.step
    return functools.partial(function, table, m, None, x, out=out, **options, **common)


def coefficients(case: Case) -> dict[str, float]:
    return dict(zip(COLUMNS, case.table.rows[case.row].tolist(), strict=True))


def plain(case: Case, data: Data) -> Call | None:
    """Plain PyTorch at its best, in place and without a wait; None where nobody would write it otherwise."""
    c = coefficients(case)
    x, m, out = data.x, data.model_output, data.out
    if case.dtype == "mixed":
        return None
    if case.kind in ("ddpm", "ddim", "learned_range"):
        twin = bench_step.Case(case.kind, tuple(x.shape), x.dtype)
        folded = (case.kind, True) in peers.PLAIN
        return bench_step.checked_plain(twin, bench_step.Data(x, m, data.seeds), folded=folded)
    scaled = torch.empty_like(x)
    if case.kind == "ddpm_noise_tensor":
        assert data.noise is not None
        z = data.noise

        def ddpm() -> Tensor:
            torch.mul(x, c["px"], out=scaled).add_(m, alpha=c["pm"]).clamp_(c["lo"], c["hi"])
            return torch.mul(scaled, c["a0"], out=out).add_(x, alpha=c["ax"]).add_(z, alpha=c["s"])

        return ddpm
    if case.kind == "guidance":
        assert data.uncond is not None
        uncond, guided = data.uncond, torch.empty_like(x)

        def guidance() -> Tensor:
            torch.lerp(uncond, m, 1.5, out=guided)
            torch.mul(x, c["px"], out=out).add_(guided, alpha=c["pm"]).clamp_(c["lo"], c["hi"])
            return out.mul_(c["a0"]).add_(guided, alpha=c["ae"])

        return guidance
    if case.kind == "x0_too":

        def with_x0() -> tuple[Tensor, Tensor]:
            torch.mul(x, c["px"], out=scaled).add_(m, alpha=c["pm"]).clamp_(c["lo"], c["hi"])
            return torch.mul(scaled, c["a0"], out=out).add_(m, alpha=c["ae"]), scaled

        return with_x0
    return None


def formula(case: Case, *, draws: bool) -> Callable[..., Tensor]:
    """A step as one writes it, for torch.compile."""
    c = coefficients(case)

    def ddpm(x: Tensor, m: Tensor, z: Tensor) -> Tensor:
        x0 = (c["px"] * x + c["pm"] * m).clamp(c["lo"], c["hi"])
        noise = torch.randn_like(x) if draws else z
        return c["a0"] * x0 + c["ax"] * x + c["s"] * noise

    def ddim(x: Tensor, m: Tensor, z: Tensor) -> Tensor:
        x0 = (c["px"] * x + c["pm"] * m).clamp(c["lo"], c["hi"])
        return c["a0"] * x0 + c["ae"] * m

    return ddim if case.kind == "ddim" else ddpm


def compiled(case: Case, data: Data, *, draws: bool, cache: dict[str, Any]) -> Call:
    """torch.compile of the formula, for this size; the noise made inside, or drawn by torch before each call."""
    key = f"{case} {draws}"
    if key not in cache:
        cache.clear()
        torch.compiler.reset()
        cache[key] = torch.compile(formula(case, draws=draws), dynamic=False, fullgraph=True)
    step = cache[key]
    x, m = data.x, data.model_output
    z = torch.empty_like(x)
    if case.kind == "ddim" or draws:
        return lambda: step(x, m, z)
    return lambda: step(x, m, z.normal_())


def diffusers_step(case: Case, data: Data, *, enabled: bool = False) -> Call | None:
    """The step of diffusers' scheduler, which gives x0 too; or of that scheduler with fastdiff enabled."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return None
    if case.kind == "ddpm":
        scheduler = DDPMScheduler(1000)
    elif case.kind == "ddim":
        scheduler = DDIMScheduler(1000)
        scheduler.set_timesteps(50)
    else:
        return None
    if enabled:
        fastdiff.enable(scheduler)
    t = case.table.timesteps[case.row]
    generator = data.generator if data.x.is_cuda else None
    options = {"generator": generator} if case.kind == "ddpm" else {}
    return lambda: scheduler.step(data.model_output, t, data.x, return_dict=False, **options)[0]


# Checks


def check_fused(case: Case, call: Call, data: Data, backend: str) -> None:
    """The last sample in every bit; all of a backward within rounding, by autograd through the reference."""
    generator = torch.Generator(data.x.device)
    generator.set_state(data.generator.get_state())
    found = call()
    results = found if isinstance(found, tuple) else (found,)
    assert all(bool(result.isfinite().all()) for result in results), f"{case}: not finite"
    last = dataclasses.replace(case, elements=min(case.elements, SAMPLE))
    own = Data.__new__(Data)
    for name, value in vars(data).items():
        batch = isinstance(value, Tensor) and value.shape[:1] == data.seeds.shape
        setattr(own, name, value[-1:].clone() if batch else value)
    if case.kind == "ddpm_torch_stream":
        z = torch.randn(data.x.shape, generator=generator, dtype=data.x.dtype, device=data.x.device)[-1:]
        wanted: Any = ops.step(case.table, own.model_output, None, own.x, row=case.row, noise=z, backend="reference")
    else:
        wanted = fused(last, own, "reference", torch.empty_like(own.x))()
    expected = wanted if isinstance(wanted, tuple) else (wanted,)
    for ours, theirs in zip(results, expected, strict=True):
        if case.kind == "backward":
            tolerance = 20 * torch.finfo(theirs.dtype).eps
            torch.testing.assert_close(ours[-1:], theirs, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours[-1:], theirs), f"{case}, {backend}: the last sample differs from the reference"


def check_close(case: Case, call: Call, data: Data, seeded: bool) -> None:
    """Another provider's formula: with noise by its spread, without by its values."""
    found = call()
    result = found[0] if isinstance(found, tuple) else found
    assert isinstance(result, Tensor) and bool(result.isfinite().all()), f"{case}: not finite"
    if seeded:
        ours = ops.step(case.table, data.model_output, None, data.x, row=case.row, seeds=data.seeds, backend="auto")
        difference = (result.float() - ours.float()).std() / (math.sqrt(2) * max(coefficients(case)["s"], 1e-6))
        assert 0.5 < float(difference) < 2, f"{case}: the noise has {float(difference):.2f} of its spread"
    else:
        wanted = fused(dataclasses.replace(case), data, "auto", torch.empty_like(data.x))()
        expected = wanted[0] if isinstance(wanted, tuple) else wanted
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(result.float(), expected.float(), rtol=0.05, atol=0.05)


# Timing


class Clock:
    """How long calls take on a device, and on the host."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.rounds = 3 if quick else 5
        self.window = 0.01 if quick else 0.03  # seconds of a round

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def round(self, calls: Sequence[Call], times: int) -> float:
        """Seconds of `times` passes over the calls."""
        self.wait()
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(times):
                for call in calls:
                    call()
            return time.perf_counter() - begin
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            for call in calls:
                call()
        stop.record()
        self.wait()
        return start.elapsed_time(stop) / 1e3

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of one call: the median of some rounds of about `window`."""
        for call in calls:
            call()
        once = max(self.round(calls, 1), 1e-7)
        times = max(1, min(2000, round(self.window / once)))
        return statistics.median(self.round(calls, times) for _ in range(self.rounds)) / times / len(calls)

    def captured(self, calls: Sequence[Call], least: int = 64) -> float:
        """Of one call among many in a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [*calls, *calls]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph, times = torch.cuda.CUDAGraph(), math.ceil(least / len(calls))
        with torch.cuda.graph(graph):
            for _ in range(times):
                for call in calls:
                    call()
        return self.seconds([graph.replay]) / times / len(calls)

    def host(self, call: Call, count: int = 200) -> float:
        """Of one call on the host, the device keeping up behind it."""
        for _ in range(20):
            call()
        found = []
        for _ in range(2 * self.rounds + 1):
            self.wait()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            found.append((time.perf_counter() - begin) / count)
        self.wait()
        return statistics.median(found)


def launches(call: Call) -> int | None:
    """Kernels, copies and fills of a call, as the profiler counts them; None where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        kind = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == kind for event in profiler.events()) or None
    except RuntimeError:
        return None


class Benchmark:
    """Measures case by case until the time is up, and keeps what was found."""

    def __init__(self, device: torch.device, quick: bool, seconds: float) -> None:
        self.device, self.quick = device, quick
        self.clock = Clock(device, quick)
        self.deadline = time.monotonic() + seconds
        self.cases: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self.copies: dict[int, float] = {}
        self.compile_cache: dict[str, Any] = {}

    def copy(self, case: Case) -> float:
        """Seconds of out.copy_(x) that moves as many bytes, read and written, in the same way."""
        size = case.bytes
        if size not in self.copies:
            shape = (size // 2,)
            pairs = [
                [torch.ones(shape, dtype=torch.uint8, device=self.device) for _ in range(2)] for _ in self.sets(case)
            ]
            calls = [functools.partial(out.copy_, x) for x, out in pairs]
            small = self.clock.cuda and case.elements <= GRAPH
            self.copies[size] = self.clock.captured(calls) if small else self.clock.seconds(calls)
        return self.copies[size]

    def sets(self, case: Case) -> range:
        """One for each of the calls that take turns."""
        return range(max(1, min(64, math.ceil(L2 / case.bytes))) if self.clock.cuda and case.elements > SHARED else 1)

    def providers(self, case: Case, names: Sequence[str]) -> Iterator[tuple[str, Callable[[Data], Call | None]]]:
        for name in names:
            if name in ("native", "triton", "reference"):
                yield name, functools.partial(self.checked_fused, case, name)
            elif name == "plain":
                yield name, functools.partial(self.checked_other, case, plain, False)
            elif name.startswith("compile"):
                draws = name == "compile_noise_inside"
                make = functools.partial(compiled, draws=draws, cache=self.compile_cache)
                yield name, functools.partial(self.checked_other, case, make, case.kind == "ddpm")
            else:
                make = functools.partial(diffusers_step, enabled=name == "diffusers_enabled")
                yield name, functools.partial(self.checked_other, case, make, None)

    def checked_fused(self, case: Case, backend: str, data: Data) -> Call:
        call = fused(case, data, backend)
        check_fused(case, call, data, backend)
        return call

    def checked_other(
        self, case: Case, make: Callable[[Case, Data], Call | None], seeded: bool | None, data: Data
    ) -> Call | None:
        call = make(case, data)
        checked = make is plain and case.kind in ("ddpm", "learned_range")  # by bench_step, with the same noise
        if call is not None and seeded is not None and not checked:  # diffusers has a schedule of its own
            check_close(case, call, data, seeded)
        return call

    def measure(self, case: Case, names: Sequence[str]) -> None:
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{case}: {', '.join(names)}")
            return
        sets = [Data(case, self.device) for _ in self.sets(case)]
        copied = self.copy(case)
        for name, make in self.providers(case, names):
            if time.monotonic() > self.deadline:
                self.left_out.append(f"{case}: {name}")
                continue
            try:
                first = make(sets[0])
                if first is None:
                    continue
                self.cases.append(self.timed(case, name, first, sets, make, copied))
            except Exception as error:  # a case that fails is told, and the others go on
                self.failures.append(f"{case}, {name}: {type(error).__name__}: {str(error)[:500]}")

    def timed(
        self,
        case: Case,
        name: str,
        first: Call,
        sets: list[Data],
        make: Callable[[Data], Call | None],
        copied: float,
    ) -> dict[str, Any]:
        # the sets beyond the first are as the first, which was checked
        calls = [first]
        for data in sets[1:]:
            call = fused(case, data, name) if name in ops.BACKENDS else make(data)
            assert call is not None
            calls.append(call)
        captures = self.clock.cuda and case.elements <= GRAPH and name not in DIFFUSERS
        captures = captures and case.kind not in ("backward", "ddpm_torch_stream")
        seconds = self.clock.captured(calls) if captures else self.clock.seconds(calls)
        found: dict[str, Any] = {
            "kind": case.kind,
            "dtype": case.dtype,
            "elements": case.elements,
            "provider": name,
            "device_us": round(seconds * 1e6, 3),
            "by": "graph" if captures else "loop",
            "copy_us": round(copied * 1e6, 3),
            "share_of_copy": round(copied / seconds, 4),
            "gb_per_s": round(case.bytes / seconds / 1e9, 1),
        }
        if case.elements <= 2**16 and name in ("native", "triton", "plain", *DIFFUSERS):
            call = first
            if name in ops.BACKENDS and case.kind not in ("backward", "x0_too"):
                # the call that people make: in place, and by "auto" where that is the native kernel
                place = sets[0].x if name == "native" else sets[0].out
                call = fused(case, sets[0], "auto" if name == "native" else name, place)
            found["host_us"] = round(self.clock.host(call) * 1e6, 3)
            if self.clock.cuda:
                found["launches"] = launches(call)
                before = torch.cuda.memory_stats()["allocation.all.allocated"]
                call()
                found["allocations"] = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        return found


def sizes(quick: bool, device: torch.device) -> list[int]:
    if device.type != "cuda":
        return [2**12, 2**14]
    return [2**26, 2**16, 2**28] if quick else [2**26, 2**16, 2**28, 2**12, 2**20, 2**24, 2**14, 2**18, 2**22]


def run_cases(benchmark: Benchmark) -> None:
    """The most important first: what is left out for want of time is the rest."""
    every = sizes(benchmark.quick, benchmark.device)
    large, small = every[0], every[1]
    kernels = ["native", "triton"] if benchmark.clock.cuda else ["native"]
    for dtype in DTYPES:
        for kind in KINDS:
            # what Triton takes to compile is time that nothing is measured in
            few = kind in ("ddpm", "ddim") or dtype in ("float32", "bfloat16")
            benchmark.measure(Case(kind, dtype, large), [*(kernels if few else ["native"]), "plain"])
    for dtype in ("float32", "bfloat16"):
        for kind in KINDS:
            benchmark.measure(Case(kind, dtype, small), [*kernels, "plain", *DIFFUSERS])
    inside, outside = "compile_noise_inside", "compile_noise_outside"
    if benchmark.clock.cuda:
        for elements in (large, small):
            for dtype in ("float32", "bfloat16"):
                benchmark.measure(Case("ddpm", dtype, elements), [inside, outside])
                benchmark.measure(Case("ddim", dtype, elements), [outside])
    for elements in every:
        for dtype in DTYPES if not benchmark.quick else ("float32", "bfloat16"):
            for kind in ("ddpm", "ddim"):
                done = elements == large or (elements == small and dtype in ("float32", "bfloat16"))
                names = [*DIFFUSERS] if elements == large else [] if done else [*kernels, "plain", *DIFFUSERS]
                if names:
                    benchmark.measure(Case(kind, dtype, elements), names)
    if benchmark.clock.cuda and not benchmark.quick:
        for dtype in ("float16", "mixed"):
            benchmark.measure(Case("ddpm", dtype, large), [inside, outside])
            benchmark.measure(Case("ddim", dtype, large), [outside])
        for elements in (2**20, 2**24, 2**12):
            for dtype in ("float32", "bfloat16"):
                benchmark.measure(Case("ddpm", dtype, elements), [inside, outside])


# Chains


class Policy(torch.nn.Module):
    """A multilayer perceptron over a chunk of actions and an embedding of t: a few microseconds."""

    def __init__(self, horizon: int = 16, actions: int = 2, width: int = 256) -> None:
        super().__init__()
        self.time = torch.nn.Embedding(100, 64)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(horizon * actions + 64, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, horizon * actions),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), self.time(t)], 1)).view(x.shape)


class Block(torch.nn.Module):
    """Two convolutions with the condition as scale and shift between them, as in Diffusion Policy (Chi et al. 2023)."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(
            torch.nn.Conv1d(inputs, outputs, 5, padding=2), torch.nn.GroupNorm(8, outputs), torch.nn.Mish()
        )
        self.second = torch.nn.Sequential(
            torch.nn.Conv1d(outputs, outputs, 5, padding=2), torch.nn.GroupNorm(8, outputs), torch.nn.Mish()
        )
        self.film = torch.nn.Sequential(torch.nn.Mish(), torch.nn.Linear(condition, 2 * outputs))
        self.skip = torch.nn.Conv1d(inputs, outputs, 1) if inputs != outputs else torch.nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None].chunk(2, dim=1)
        return self.second(self.first(x) * scale + shift) + self.skip(x)


class UNet1d(torch.nn.Module):
    """A small 1-D U-Net over actions [B, 2, 16], conditioned on t and an observation, in the manner of that paper."""

    def __init__(self, actions: int = 2, widths: tuple[int, ...] = (64, 128, 256), condition: int = 128) -> None:
        super().__init__()
        self.time = torch.nn.Sequential(
            torch.nn.Embedding(100, condition), torch.nn.Linear(condition, condition), torch.nn.Mish()
        )
        self.observation = torch.nn.Parameter(torch.randn(1, condition))
        ends = list(zip((actions, *widths[:-1]), widths, strict=True))
        self.down = torch.nn.ModuleList(Block(a, b, condition) for a, b in ends)
        self.shrink = torch.nn.ModuleList(torch.nn.Conv1d(b, b, 3, 2, 1) for _, b in ends[:-1])
        self.middle = Block(widths[-1], widths[-1], condition)
        self.grow = torch.nn.ModuleList(torch.nn.ConvTranspose1d(b, a, 4, 2, 1) for a, b in ends[:0:-1])
        self.up = torch.nn.ModuleList(Block(2 * a, a, condition) for a, _ in ends[:0:-1])
        self.last = torch.nn.Conv1d(widths[0], actions, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.time(t) + self.observation
        kept = []
        for number, block in enumerate(self.down):
            x = block(x, condition)
            if number < len(self.shrink):
                kept.append(x)
                x = self.shrink[number](x)
        x = self.middle(x, condition)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), kept.pop()], 1), condition)
        return self.last(x)


def run_chains(benchmark: Benchmark) -> list[dict[str, Any]]:
    """100 DDPM steps of one chunk of actions: eager, captured, with diffusers' scheduler; and without a network."""
    clock, device = benchmark.clock, benchmark.device
    schedule, shape = NoiseSchedule.cosine(100), (1, 2, 16)
    sampler = DDPMSampler(schedule, clip=1.0)
    results = []
    torch.manual_seed(1)

    def measured(network: str, how: str, call: Call, times: int) -> None:
        for _ in range(2):
            call()
        found = []
        for _ in range(times):
            clock.wait()
            begin = time.perf_counter()
            call()
            clock.wait()
            found.append(time.perf_counter() - begin)
        results.append({"network": network, "how": how, "ms": round(statistics.median(found) * 1e3, 4)})

    few, many = (3, 20) if benchmark.quick or not clock.cuda else (9, 50)
    with torch.no_grad():
        x_T = torch.randn(shape, device=device)
        fixed = torch.randn(shape, device=device)
        networks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "none": lambda x, t: fixed,
            "mlp": Policy().to(device),
            "unet1d": UNet1d().to(device),
        }
        for name, model in networks.items():
            try:
                eager = functools.partial(sampler.sample, model, x_T=x_T, seeds=1)
                measured(name, "fastdiff, eager", eager, few)
                for how, enabled in (("diffusers, eager", False), ("diffusers with fastdiff, eager", True)):
                    loop = diffusers_loop(model, x_T, enabled)
                    if loop is not None:
                        measured(name, how, loop, few)
                if clock.cuda:
                    for unroll, how in ((True, "fastdiff, one graph"), (False, "fastdiff, a graph per step")):
                        chain = sampler.capture(model, shape, device=device, unroll=unroll)
                        out = torch.empty(shape, device=device)
                        replayed = chain.replay(x_T=x_T, seeds=1)
                        torch.testing.assert_close(replayed, eager(), rtol=1e-3, atol=1e-3)
                        measured(name, how, functools.partial(chain.replay, x_T=x_T, seeds=1, out=out), many)
                        if name == "none":
                            results[-1]["launches_per_step"] = per_step(sampler, shape, device, fixed)
            except Exception as error:
                benchmark.failures.append(f"chain, {name}: {type(error).__name__}: {str(error)[:500]}")
    return results


def per_step(sampler: DDPMSampler, shape: tuple[int, ...], device: torch.device, fixed: Tensor) -> float | None:
    """Nodes of a captured chain that a step more adds."""
    counts = []
    for steps in (10, 20):
        chain = DDPMSampler(sampler.schedule, steps).capture(lambda x, t: fixed, shape, device=device, unroll=True)
        chain.replay(seeds=1)
        counts.append(launches(functools.partial(chain.replay, seeds=1)))
    few, many = counts
    return None if few is None or many is None else (many - few) / 10


def diffusers_loop(model: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, enabled: bool) -> Call | None:
    """What Diffusion Policy runs: its scheduler's options, the network and the step in a Python loop."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return None
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="epsilon")
    scheduler.set_timesteps(100)
    if enabled:
        fastdiff.enable(scheduler)

    def loop() -> Tensor:
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(x.shape[0]).to(x.device)), t, x).prev_sample
        return x

    return loop


# Telling


def goals(cases: list[dict[str, Any]], chains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals on speed, each with the worst figure of the run that it speaks of."""

    def worst(kinds: Sequence[str], dtypes: Sequence[str], least: int, most: int, figure: str) -> float | None:
        found = [
            case[figure]
            for case in cases
            if case["provider"] == "native"
            and case["kind"] in kinds
            and case["dtype"] in dtypes
            and least <= case["elements"] <= most
            and figure in case
        ]
        if not found:
            return None
        return float(min(found) if figure == "share_of_copy" else max(found))

    halves, huge = ("bfloat16", "float16"), 2**40
    told = []
    for text, kinds, dtypes, limit in (
        ("DDIM, guidance, noise tensor and x0: share of copy",
         ("ddim", "guidance", "ddpm_noise_tensor", "x0_too"), tuple(DTYPES), 0.92),
        ("DDPM, noise in the kernel, float32: share of copy", ("ddpm",), ("float32",), 0.90),
        ("DDPM, noise in the kernel, 16 bit: share of copy", ("ddpm",), halves, 0.60),
        ("torch's stream, float32: share of copy", ("ddpm_torch_stream",), ("float32",), 0.88),
        ("torch's stream, 16 bit: share of copy", ("ddpm_torch_stream",), halves, 0.60),
    ):  # fmt: skip
        found = worst(kinds, dtypes, 2**26, huge, "share_of_copy")
        told.append({"goal": f"{text} >= {limit}", "found": found, "met": None if found is None else found >= limit})
    for text, figure, limit in (("host, in place, us", "host_us", 5.0), ("device, us", "device_us", 2.5)):
        found = worst(("ddpm", "ddim"), ("float32", "bfloat16"), 1, 2**16, figure)
        goal = f"at most 2^16 elements: {text} <= {limit}"
        told.append({"goal": goal, "found": found, "met": None if found is None else found <= limit})
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for case in cases:
        key = (case["kind"], case["dtype"], case["elements"])
        best.setdefault(key, {})[case["provider"]] = case["device_us"]
    for dtype in DTYPES:
        ratios = [
            min(value for name, value in found.items() if name.startswith("compile")) / found["native"]
            for (_, kind, _), found in best.items()
            if kind == dtype and "native" in found and any(name.startswith("compile") for name in found)
        ]
        if ratios:
            goal = f"torch.compile's best time over ours, {dtype}, least of the sizes > 1"
            told.append({"goal": goal, "found": round(min(ratios), 3), "met": min(ratios) > 1})
    ms = {(chain["network"], chain["how"]): chain["ms"] for chain in chains}
    graph = "fastdiff, one graph"
    if ("none", graph) in ms:
        share = ms["none", graph]
        told.append({"goal": "100 steps captured: ms of the sampler <= 0.5", "found": share, "met": share <= 0.5})
    if ("unet1d", graph) in ms and ("unet1d", "diffusers, eager") in ms:
        ratio = round(ms["unet1d", "diffusers, eager"] / ms["unet1d", graph], 2)
        told.append({"goal": "U-Net chain: diffusers' eager loop over ours >= 3", "found": ratio, "met": ratio >= 3})
    return told


def smi(*fields: str) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    return dict(zip(fields, map(str.strip, lines[0].split(",")), strict=False)) if run.returncode == 0 and lines else {}


def environment(device: torch.device) -> dict[str, Any]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "fastdiff": fastdiff.__version__,
        "native": native.why_not() or "available",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "native": native.cuda_why_not(device) or "available",
            "torch_stream_in_kernel": {
                str(dtype): torch_stream.verified(device, dtype) for dtype in torch_stream.DTYPES
            },
        }
        found |= smi("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    return found


def markdown(results: dict[str, Any]) -> str:
    lines = ["| goal | found | met |", "|---|---:|---|"]
    for goal in results["goals"]:
        met = {True: "yes", False: "no", None: "not measured"}[goal["met"]]
        lines.append(f"| {goal['goal']} | {'' if goal['found'] is None else goal['found']} | {met} |")
    lines += [
        "",
        "| case | provider | device us | by | of copy | GB/s | host us | launches |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for case in results["cases"]:
        name = Case(case["kind"], case["dtype"], case["elements"])
        lines.append(
            f"| {name} | {case['provider']} | {case['device_us']} | {case['by']} | {case['share_of_copy']:.1%} "
            f"| {case['gb_per_s']} | {case.get('host_us', '')} | {case.get('launches', '')} |"
        )
    lines += ["", "| chain of 100 steps | how | ms |", "|---|---|--:|"]
    lines += [f"| {chain['network']} | {chain['how']} | {chain['ms']} |" for chain in results["chains"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few sizes and short rounds")
    parser.add_argument("--seconds", type=float, default=200.0, help="after which no case is begun")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    begin = time.monotonic()
    benchmark = Benchmark(device, options.quick, options.seconds - (20 if device.type == "cuda" else 0))
    before = environment(device)
    chains: list[dict[str, Any]] = []
    try:
        with torch.no_grad():
            chains = run_chains(benchmark)
        with torch.inference_mode(False), torch.enable_grad():
            run_cases(benchmark)
    except KeyboardInterrupt:  # what was measured so far is kept
        benchmark.failures.append("interrupted")
    results = {
        "commit": options.commit,
        "environment": before,
        "after": smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw") if device.type == "cuda" else {},
        "conditions": " ".join((__doc__ or "").split("Conditions, ")[1].split()),
        "rehearsal": device.type != "cuda",
        "goals": goals([] if device.type != "cuda" else benchmark.cases, chains),
        "chains": chains,
        "cases": benchmark.cases,
        "failures": benchmark.failures,
        "left_out": benchmark.left_out,
        "seconds": round(time.monotonic() - begin, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))
    for failure in benchmark.failures:
        print(f"FAILED {failure}")
    print(f"{len(benchmark.cases)} measured, {len(benchmark.left_out)} left out, {results['seconds']} s")
    if benchmark.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
