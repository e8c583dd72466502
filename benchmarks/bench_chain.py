"""How long a whole chain takes, network and steps, and how much of it is the sampler's.

    python -m pytest benchmarks/bench_chain.py [--device cuda]

One thread on a CPU. A chain begins with nothing: the state x_T is part of it. Every provider calls the same network as
often, with the same time tensor. Before it is timed, its chain is compared on torch's noise with fastdiff's (that with
plain PyTorch's), and fastdiff's on its own noise with the reference, in every bit. Rounds take turns: the network
alone, as often as the chain calls it, then the chain. The sampler's share is what the network's median leaves of the
chain's: all that stands around the network, the loop in Python too.

Networks: "policy", a small MLP for the actions of a diffusion policy; "digits", the trained U-Net of examples/digits;
"unet2d", a small UNet2DModel of diffusers. Modes: "eager"; "compiled", torch.compile of the network, the step outside;
"compiled_step", torch.compile of network and step together, one graph for all timesteps; "captured", the chain as a
CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bench_step import MOMENTS, check_normal
from machine import threads
from torch import Tensor, nn

from fastdiff import noise as contract
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMNS

SEED = 7
SECONDS = 0.6  # of timed chains in a benchmark, but for ROUNDS
ROUNDS = (5, 25)
TOLERANCE = 5e-4  # of chains that end in [-1, 1]: their steps magnify the roundings of the first ones
DIGITS = Path(__file__).parents[1] / "examples" / "digits"
# The float32 tables of diffusers, so that its chains are the same. Policies have 100 timesteps (Chi et al. 2023).
LINEAR = NoiseSchedule.from_host("diffusers", "linear")
SCHEDULES = {
    "policy": NoiseSchedule.from_host("diffusers", "squaredcos_cap_v2", 100),
    "digits": LINEAR,
    "unet2d": LINEAR,
    "fixed": LINEAR,
}

Network = Callable[[Tensor, Tensor], Tensor]
Chain = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """network: a key of SCHEDULES; "fixed" computes nothing. sampler: "ddpm" or "ddim"."""

    network: str
    shape: tuple[int, ...]
    sampler: str
    steps: int
    mode: str = "eager"
    device: str = "cpu"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"chain-{self.network}-{shape}-{self.sampler}{self.steps}-{self.mode}"

    def make_sampler(self, backend: Any = "auto") -> DDPMSampler | DDIMSampler:
        make = {"ddpm": DDPMSampler, "ddim": DDIMSampler}[self.sampler]
        return make(SCHEDULES[self.network], self.steps, backend=backend)

    def make_time(self) -> Tensor:
        return torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)


# Networks


class Policy(nn.Module):
    """eps of a chunk of actions [B, 16, 2], by a hidden layer that knows the time."""

    def __init__(self, timesteps: int, shape: tuple[int, int] = (16, 2), width: int = 128) -> None:
        super().__init__()
        self.time = nn.Embedding(timesteps, width)
        self.enter, self.leave = nn.Linear(math.prod(shape), width), nn.Linear(width, math.prod(shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(nn.functional.silu(self.enter(x.flatten(1)) + self.time(t))).view_as(x)


class Digits(nn.Module):
    """The U-Net of examples/digits, told to draw threes."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        with mock.patch.object(sys, "path", [str(DIGITS), *sys.path]):
            model = importlib.import_module("model")
        self.denoiser = model.Denoiser(model.load(), SCHEDULES["digits"])
        self.register_buffer("y", torch.full((batch,), 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(x, t, self.y)


class UNet2D(nn.Module):
    """diffusers' U-Net with random weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
        self.unet = diffusers.UNet2DModel(
            sample_size=size,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # random weights know nothing of noise: a smaller output keeps a chain from magnifying roundings
        return 0.1 * self.unet(x, t, return_dict=False)[0]


@functools.cache
def make_network(name: str, shape: tuple[int, ...], device: str) -> nn.Module:
    torch.manual_seed(SEED)
    if name == "policy":
        network: nn.Module = Policy(SCHEDULES[name].num_timesteps)
    elif name == "digits":
        network = Digits(shape[0])
    else:
        network = UNet2D(shape[-1])
    return network.eval().requires_grad_(False).to(device)


@functools.cache
def compiled_network(name: str, shape: tuple[int, ...], device: str) -> Network:
    """torch.compile of it for this shape."""
    compiled = torch.compile(make_network(name, shape, device), fullgraph=True, dynamic=False)
    compiled(torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device))
    return compiled


# Providers: what runs the chain. Without a generator the noise is that of fastdiff's seeds, or torch's default


def fastdiff(case: Case, network: Network, generator: torch.Generator | None = None, backend: str = "auto") -> Chain:
    """sampler.sample."""
    source: dict[str, Any] = {"seeds": SEED} if generator is None else {"generator": generator}
    return functools.partial(case.make_sampler(backend).sample, network, case.shape, device=case.device, **source)


def fastdiff_step(case: Case, network: Network, generator: torch.Generator | None = None) -> Chain:
    """A loop of one's own over sampler.step, in place."""
    sampler, told = case.make_sampler(), case.make_time()

    def chain() -> Tensor:
        source: dict[str, Any] = {"generator": generator}
        if generator is None:
            source = {"seeds": contract.seeds(SEED, case.shape[0], case.device)}
            x = contract.normal(case.shape, source["seeds"], domain="initial", device=case.device)
        else:
            x = torch.randn(case.shape, generator=generator, device=case.device)
        for row, t in enumerate(sampler.timesteps):
            sampler.step(network(x, told.fill_(t)), None, x, row=row, out=x, **source)
        return x

    return chain


def plain(case: Case, network: Network, generator: torch.Generator | None = None) -> Chain:
    """The best loop of plain PyTorch: coefficients are Python floats, folded into one another, and all is in place."""
    sampler, told = case.make_sampler(), case.make_time()
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in sampler.table.rows.tolist()]
    steps = [
        (t, c["pm"] / c["px"], c["lo"] / c["px"], c["hi"] / c["px"], c["a0"] * c["px"], c["ax"], c["ae"], c["s"])
        for t, c in zip(sampler.timesteps, rows, strict=True)
    ]
    start = functools.partial(torch.randn, case.shape, generator=generator, device=case.device)

    def ddpm() -> Tensor:
        x = start()
        x0, other = torch.empty_like(x), torch.empty_like(x)
        for t, pm, lo, hi, a0, ax, _, s in steps:
            torch.add(x, network(x, told.fill_(t)), alpha=pm, out=x0).clamp_(lo, hi)
            if s:
                other.normal_(0.0, s, generator=generator).add_(x0, alpha=a0).add_(x, alpha=ax)
            else:
                torch.mul(x, ax, out=other).add_(x0, alpha=a0)
            x, other = other, x
        return x

    def ddim() -> Tensor:
        x = start()
        for t, pm, lo, hi, a0, _, ae, _ in steps:
            m = network(x, told.fill_(t))
            x.add_(m, alpha=pm).clamp_(lo, hi).mul_(a0).add_(m, alpha=ae)
        return x

    return ddpm if case.sampler == "ddpm" else ddim


def diffusers(case: Case, network: Network, generator: torch.Generator | None = None) -> Chain:
    """The usual loop over its scheduler."""
    library = pytest.importorskip("diffusers", reason="diffusers is not installed")
    make = {"ddpm": library.DDPMScheduler, "ddim": library.DDIMScheduler}[case.sampler]
    betas = SCHEDULES[case.network].betas
    scheduler, told = make(len(betas), trained_betas=betas, timestep_spacing="trailing"), case.make_time()

    def chain() -> Tensor:
        scheduler.set_timesteps(case.steps, device=case.device)
        x = torch.randn(case.shape, generator=generator, device=case.device)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, told.fill_(t)), t, x, generator=generator).prev_sample
        return x

    return chain


PROVIDERS: dict[str, Callable[..., Chain]] = {
    "fastdiff": fastdiff,
    "fastdiff_step": fastdiff_step,
    "plain": plain,
    "diffusers": diffusers,
}


@functools.lru_cache(maxsize=4)  # the providers of a case follow each other
def on_torchs_noise(case: Case, network: Network, provider: str) -> Tensor:
    return PROVIDERS[provider](case, network, generator=torch.Generator(case.device).manual_seed(SEED))()


@functools.lru_cache(maxsize=1)
def by_reference(case: Case, network: Network) -> Tensor:
    return fastdiff(case, network, backend="reference")()


def check(case: Case, network: Network, provider: str) -> None:
    """AssertionError unless chains of one noise agree, and fastdiff's chain of its seeds is the reference's."""
    ours = provider.startswith("fastdiff")
    found, other = (on_torchs_noise(case, network, one) for one in (provider, "plain" if ours else "fastdiff"))
    torch.testing.assert_close(found, other, rtol=0, atol=TOLERANCE)
    if ours:
        assert torch.equal(PROVIDERS[provider](case, network)(), by_reference(case, network))


# Network and step as one graph


def fastdiff_compiled(case: Case, network: Network) -> Chain:
    sampler, told = case.make_sampler(), case.make_time()
    seeds = contract.seeds(SEED, case.shape[0], case.device)

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def step(x: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        return sampler.step(network(x, t), t, x, seeds=seeds)

    def chain() -> Tensor:
        x = contract.normal(case.shape, seeds, domain="initial", device=case.device)
        for t in sampler.timesteps:
            x = step(x, told.fill_(t), seeds)
        return x

    torch.testing.assert_close(chain(), fastdiff(case, network)(), rtol=0, atol=TOLERANCE)
    return chain


def plain_compiled(case: Case, network: Network) -> Chain:
    """The formula with torch's noise drawn inside; the coefficients are an argument, so that no step compiles again."""
    sampler, told = case.make_sampler(), case.make_time()
    columns = [COLUMNS.index(name) for name in ("px", "pm", "lo", "hi", "a0", "ax", "ae", "s")]
    table = sampler.table.rows[:, columns].to(case.device, torch.float32)
    noiseless = table * torch.tensor([1.0] * 7 + [0.0], device=case.device)

    @functools.partial(torch.compile, fullgraph=True, dynamic=False)
    def step(x: Tensor, t: Tensor, coefficients: Tensor) -> Tensor:
        m = network(x, t)
        px, pm, lo, hi, a0, ax, ae, s = coefficients.unbind()
        x0 = (px * x + pm * m).clamp(lo, hi)
        return a0 * x0 + ax * x + ae * m + s * torch.randn_like(x)

    def chain(rows: list[Tensor] = list(table)) -> Tensor:  # noqa: B006  # nobody writes to it
        x = torch.randn(case.shape, device=case.device)
        for t, row in zip(sampler.timesteps, rows, strict=True):
            x = step(x, told.fill_(t), row)
        return x

    check_noise_inside(case, network, step, table, noiseless)
    return chain


def check_noise_inside(
    case: Case, network: Network, step: Callable[..., Tensor], table: Tensor, noiseless: Tensor
) -> None:
    """AssertionError unless a step is fastdiff's but for its noise, and that has the moments of a normal's."""
    sampler, told = case.make_sampler(), case.make_time()
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(SEED)).to(case.device)
    torch.manual_seed(SEED)
    drawn = []
    often = math.ceil(MOMENTS / (x.numel() * max(case.steps - 1, 1)))
    for row, t in enumerate(sampler.timesteps):
        mean = step(x, told.fill_(t), noiseless[row])
        wanted = sampler.step(network(x, told), None, x, row=row, noise=torch.zeros_like(x))
        torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-4)
        if float(table[row, -1]):
            drawn += [(step(x, told, table[row]) - mean) / table[row, -1] for _ in range(often)]
    check_normal(torch.stack(drawn))


# CUDA graphs


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as one CUDA graph. The result stands where the graph leaves it."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def fastdiff_captured(case: Case, network: Network) -> Chain:
    chain = case.make_sampler().capture(network, case.shape, device=case.device).replay
    wanted = fastdiff(case, network)()
    torch.testing.assert_close(chain(seeds=SEED), wanted, rtol=0, atol=TOLERANCE)
    return functools.partial(chain, seeds=SEED)


def plain_captured(case: Case, network: Network) -> Chain:
    eager = plain(case, network)
    chain = captured(eager)
    torch.manual_seed(SEED)
    wanted = eager()
    torch.manual_seed(SEED)
    torch.testing.assert_close(chain(), wanted, rtol=0, atol=TOLERANCE)
    return chain


# The benchmarks

ONE_GRAPH = {"fastdiff": fastdiff_compiled, "plain": plain_compiled}
CAPTURED = {"fastdiff": fastdiff_captured, "plain": plain_captured}
ALL = ("fastdiff", "plain", "diffusers")
OWN_LOOP = ("fastdiff", "fastdiff_step", "plain", "diffusers")
POLICY, DIGIT = Case("policy", (1, 16, 2), "ddpm", 100), Case("digits", (1, 1, 8, 8), "ddpm", 100)
DIGITS_16, UNET2D = Case("digits", (16, 1, 8, 8), "ddim", 50), Case("unet2d", (1, 3, 32, 32), "ddim", 20)
BENCHMARKS: list[tuple[Case, tuple[str, ...]]] = [
    (POLICY, OWN_LOOP),
    *((case, ALL) for case in (DIGIT, DIGITS_16, UNET2D)),
    (replace(POLICY, mode="compiled"), OWN_LOOP),
    *((replace(case, mode="compiled"), ALL) for case in (DIGIT, UNET2D)),
    (replace(POLICY, mode="compiled_step"), ("fastdiff", "plain")),
    *((replace(case, mode="captured"), ("fastdiff", "plain")) for case in (POLICY, DIGIT, DIGITS_16, UNET2D)),
]


def prepare(case: Case, provider: str) -> tuple[Chain, Callable[[], object]]:
    """The chain, checked; the network alone, called as often."""
    network: Network = make_network(case.network, case.shape, case.device)
    called = network
    if case.mode.startswith("compiled"):
        called = compiled_network(case.network, case.shape, case.device)
    x, t = torch.zeros(case.shape, device=case.device), case.make_time()

    def alone() -> None:
        for _ in range(case.steps):
            called(x, t)

    if case.mode == "captured":
        return CAPTURED[provider](case, network), captured(alone)
    if case.mode == "compiled_step":
        return ONE_GRAPH[provider](case, network), alone
    check(case, called, provider)
    return PROVIDERS[provider](case, called), alone


@pytest.mark.benchmark(disable_gc=True)
@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case, names in BENCHMARKS for name in names],
)
def test_chain(benchmark: Any, pytestconfig: pytest.Config, case: Case, provider: str) -> None:
    case = replace(case, device=pytestconfig.getoption("--device", "cpu"))
    if case.device == "cpu":
        if case.mode == "captured":
            pytest.skip("CUDA graphs need a GPU: --device cuda")
        if (case.network, case.mode) == ("unet2d", "compiled"):
            pytest.skip("on a CPU this network takes more than 40 seconds to compile")
    benchmark.group = case.name
    with torch.no_grad(), threads(1):
        time_chain(benchmark, case, provider)


def time_chain(benchmark: Any, case: Case, provider: str) -> None:
    chain, alone = prepare(case, provider)

    def elapsed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if case.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    network_seconds: list[float] = []
    low, high = ROUNDS
    rounds = min(max(int(SECONDS / elapsed(chain)), low), high)
    # the warm-up round has its setup too
    benchmark.pedantic(
        chain, setup=lambda: network_seconds.append(elapsed(alone)), rounds=rounds, warmup_rounds=1, iterations=1
    )
    benchmark.extra_info |= {
        "part": "chain",
        "case": case.name,
        "provider": provider,
        "threads": 1,
        "device": case.device,
        "network": case.network,
        "mode": case.mode,
        "sampler": case.sampler,
        "steps": case.steps,
        "shape": list(case.shape),
        "elements": math.prod(case.shape),
        "dtype": "float32",
    }
    if benchmark.stats is not None:
        seconds, network_median = benchmark.stats.stats.median, statistics.median(network_seconds[1:])
        benchmark.extra_info |= {
            "network_seconds": network_median,
            "sampler_share": round(1 - network_median / seconds, 4),
            "sampler_us_per_step": round((seconds - network_median) / case.steps * 1e6, 3),
        }
