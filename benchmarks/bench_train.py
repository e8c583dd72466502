"""How long a step and its gradients take, and a step with its log-density: fastdiff, and PyTorch as it is written.

    make bench
    python -m pytest benchmarks/bench_train.py -k "ddpm and gradients"

Every provider gets the same tensors, the same row in the middle of the chain and the same threads. What it computes is
checked before it is timed: fastdiff in every bit against the reference, plain PyTorch within rounding, given one noise.
When timed, plain PyTorch draws its noise by torch.randn_like, and fastdiff from a seed for each sample. `saved_tensors`
counts what autograd keeps for the backward; `saved_bytes` leaves out those that were there before the step. fastdiff
keeps no more tensors than the step is given, which is asserted. "forward" is the step alone, with gradients enabled and
none asked for; bench_step.py has it with gradients off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from machine import PROCESSORS, threads
from torch import Tensor

from fastdiff import noise
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMNS

SCHEDULE = NoiseSchedule.linear(1000)
SAMPLERS = {
    "ddpm": DDPMSampler(SCHEDULE),
    "ddpm_unclipped": DDPMSampler(SCHEDULE, clip=None),
    "ddpm_guided": DDPMSampler(SCHEDULE),
    "ddpm_x0": DDPMSampler(SCHEDULE),
    "ddim": DDIMSampler(SCHEDULE, steps=50),
}
SEED, SCALE = 7, 3.0
SMALL, MIDDLE, LARGE = (1, 3, 32, 32), (16, 3, 64, 64), (8, 3, 256, 256)

Work = Callable[[], tuple[Tensor, ...]]


class Case(NamedTuple):
    """kind: a key of SAMPLERS. task: "gradients" (with the step), "forward", "log_prob" (with the step) or "policy"
    (the log-density of a recorded step, and its gradient)."""

    kind: str
    shape: tuple[int, ...]
    task: str
    threads: int = 1

    @property
    def name(self) -> str:
        parts = [self.kind, "x".join(map(str, self.shape)), self.task]
        return "-".join(parts + [f"{self.threads}_threads"] * (self.threads > 1))

    @property
    def sampler(self) -> DDPMSampler | DDIMSampler:
        return SAMPLERS[self.kind]

    @property
    def row(self) -> int:
        return len(self.sampler) // 2


@dataclass(frozen=True)
class Data:
    """What every provider of a case starts from; nobody writes to it."""

    x: Tensor
    model_output: Tensor
    uncond_output: Tensor | None
    seeds: Tensor
    z: Tensor  # the noise of the seeds
    x_prev: Tensor  # a step by it
    g: Tensor  # gradients of what comes out
    h: Tensor

    @property
    def given(self) -> list[Tensor]:
        """What a step is given, but for what is made on the way from Python numbers and seeds."""
        return [u for u in (self.x, self.model_output, self.uncond_output) if u is not None]

    @property
    def inputs(self) -> list[Tensor]:
        """Those of them that gradients are taken of."""
        return [u for u in self.given if u.requires_grad]


@functools.lru_cache(maxsize=1)  # the providers of a case follow each other
def make_data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(SEED)
    x, m, u, g, h = (torch.randn(case.shape, generator=generator) for _ in range(5))
    seeds = torch.randint(2**62, (case.shape[0],), generator=generator)
    z = noise.normal(case.shape, seeds, t=case.sampler.timesteps[case.row], domain="step")
    given = {"uncond_output": u, "guidance_scale": SCALE} if case.kind == "ddpm_guided" else {}
    source = {"seeds": seeds} if case.kind != "ddim" else {}
    x_prev = case.sampler.step(m, None, x, row=case.row, **source, **given)
    for tensor in (x, m, u) if case.task == "gradients" else (m,) if case.task == "policy" else ():
        tensor.requires_grad_()
    return Data(x, m, u if given else None, seeds, z, x_prev, g, h)


# fastdiff


def fastdiff(case: Case, data: Data, backend: str | None = None) -> Work:
    sampler, x, m = case.sampler, data.x, data.model_output
    given: dict[str, object] = {"row": case.row, "backend": backend}
    if data.uncond_output is not None:
        given |= {"uncond_output": data.uncond_output, "guidance_scale": SCALE}
    if case.kind != "ddim" and case.task != "policy":
        given |= {"seeds": data.seeds}
    inputs = data.inputs

    def forward() -> tuple[Tensor, ...]:
        return (sampler.step(m, None, x, **given),)

    def log_prob() -> tuple[Tensor, ...]:
        return sampler.step(m, None, x, **given, log_prob=True)

    def policy() -> tuple[Tensor, ...]:
        found = sampler.log_prob(data.x_prev, m, None, x, **given)
        return (found.detach(), *torch.autograd.grad(found.sum(), inputs))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sampler.step(m, None, x, **given), inputs, data.g)

    def gradients_of_both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sampler.step_with_x0(m, None, x, **given), inputs, (data.g, data.h))

    if case.kind == "ddpm_x0":
        return gradients_of_both
    return {"forward": forward, "log_prob": log_prob, "policy": policy, "gradients": gradients}[case.task]


def checked_fastdiff(case: Case, data: Data) -> Work:
    work = fastdiff(case, data)
    for result, wanted in zip(work(), fastdiff(case, data, "reference")(), strict=True):
        assert torch.equal(result, wanted), f"{case.name}: differs from the reference"
    return work


# Plain PyTorch


def plain(case: Case, data: Data, z: Tensor | None = None) -> Work:
    """The step as papers and codebases write it; coefficients are Python floats. z: its noise, else torch's."""
    c = dict(zip(COLUMNS, case.sampler.table.rows[case.row].tolist(), strict=True))
    x, m, u, inputs = data.x, data.model_output, data.uncond_output, data.inputs
    clipped = case.kind != "ddpm_unclipped"

    def mean() -> tuple[Tensor, Tensor]:
        eps = m if u is None else u + SCALE * (m - u)
        x0 = c["px"] * x + c["pm"] * eps
        if clipped:
            x0 = x0.clamp(-1, 1)
        rest = c["ae"] * eps if case.kind == "ddim" else c["ax"] * x
        return c["a0"] * x0 + rest, x0

    def step() -> tuple[Tensor, Tensor, Tensor]:
        mu, x0 = mean()
        if case.kind == "ddim":
            return mu, x0, mu
        return mu + c["s"] * (torch.randn_like(x) if z is None else z), x0, mu

    def density(x_prev: Tensor, mu: Tensor) -> Tensor:
        return torch.distributions.Normal(mu, c["s"], validate_args=False).log_prob(x_prev).sum((1, 2, 3))

    def forward() -> tuple[Tensor, ...]:
        return step()[:1]

    def log_prob() -> tuple[Tensor, ...]:
        x_prev, _, mu = step()
        return x_prev, density(x_prev, mu)

    def policy() -> tuple[Tensor, ...]:
        found = density(data.x_prev, mean()[0])
        return (found.detach(), *torch.autograd.grad(found.sum(), inputs))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(step()[0], inputs, data.g)

    def gradients_of_both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(step()[:2], inputs, (data.g, data.h))

    if case.kind == "ddpm_x0":
        return gradients_of_both
    return {"forward": forward, "log_prob": log_prob, "policy": policy, "gradients": gradients}[case.task]


def checked_plain(case: Case, data: Data) -> Work:
    for result, wanted in zip(plain(case, data, data.z)(), fastdiff(case, data, "reference")(), strict=True):
        # some roundings; where rounding decides whether x0 is clipped, gradients differ, in a few elements of a million
        close = torch.isclose(result, wanted, rtol=1e-5, atol=1e-5)
        assert (~close).sum() <= 1e-5 * close.numel(), f"{case.name}: plain PyTorch computes something else"
    return plain(case, data)


PROVIDERS = {"fastdiff": checked_fastdiff, "plain_autograd": checked_plain}
BENCHMARKS = [
    *(
        Case(kind, shape, "gradients", threads)
        for kind, shape, threads in (
            ("ddpm", LARGE, 1),
            ("ddpm", LARGE, PROCESSORS),
            ("ddpm_unclipped", LARGE, 1),
            ("ddpm_guided", LARGE, 1),
            ("ddpm_x0", LARGE, 1),
            ("ddim", LARGE, 1),
            ("ddpm", SMALL, 1),
            ("ddim", SMALL, 1),
        )
    ),
    *(Case("ddpm", shape, task) for shape in (SMALL, MIDDLE) for task in ("forward", "log_prob", "policy")),
]


def saved(work: Work, data: Data) -> tuple[int, int]:
    """How many tensors autograd keeps for the backward, and the bytes of those that were not there before."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*data.given, data.x_prev)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return len(kept), sum(size for place, size in storages.items() if place not in known)


@pytest.mark.benchmark(min_time=0.001, max_time=1.0, min_rounds=9, disable_gc=True)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", dict.fromkeys(BENCHMARKS), ids=lambda case: case.name)
def test_train(benchmark, case: Case, provider: str) -> None:
    benchmark.group = case.name
    with threads(case.threads):
        data = make_data(case)
        work = PROVIDERS[provider](case, data)
        benchmark(work)
    benchmark.extra_info |= {"part": "train", "case": case.name, "provider": provider, "threads": case.threads}
    benchmark.extra_info |= {"sampler": case.kind, "shape": list(case.shape), "elements": math.prod(case.shape)}
    benchmark.extra_info |= {
        "device": "cpu",
        "dtype": "float32",
        "output_dtype": "float32",
        "layout": "contiguous_format",
    }
    if data.inputs:
        count, size = saved(work, data)
        # a recorded step and the scale of guidance are inputs, too
        given = len(data.given) + (case.task == "policy") + (case.kind == "ddpm_guided")
        assert provider != "fastdiff" or count <= given
        benchmark.extra_info |= {"inputs": given, "saved_tensors": count, "saved_bytes": size}
