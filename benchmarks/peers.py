"""The step as others compute it: diffusers, improved-diffusion, plain PyTorch at its best, torch.compile, JAX.

Each provider is a function of a `Task` that returns a call, its arguments bound, or a `Made`. None of them knows
fastdiff's kernels; they share its tables of coefficients, or make their own where the codebase does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMNS, Table

Step = Callable[[], object]

SEED = 7
SCALE = 3.0  # of guidance


@dataclass(frozen=True)
class Data:
    """What every provider of a case starts from; nobody writes to it."""

    x: Tensor
    model_output: Tensor
    seeds: Tensor
    uncond_output: Tensor | None = None
    noise: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Data:
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        return Data(**{name: None if tensor is None else change(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Task:
    """One step to compute. sampler: as in bench_step.py. table: its rows, of which `row` is the one to take."""

    sampler: str
    schedule: NoiseSchedule
    table: Table
    row: int
    data: Data

    @property
    def t(self) -> int:
        return self.table.timesteps[self.row]

    @property
    def coefficients(self) -> list[dict[str, float]]:
        return [dict(zip(COLUMNS, row, strict=True)) for row in self.table.rows.tolist()]


class Made(NamedTuple):
    """A provider's call.

    noiseless: where the noise is made inside and by nobody else: the same code with the noise coefficient zero.
    counts: in place of `counting.operations`, which does not see into compiled code.
    again: the same with other noise, by a number, where every call of `step` has the same.
    """

    step: Step
    noiseless: Step | None = None
    counts: dict[str, int] | None = None
    again: Callable[[int], object] | None = None


def results_of(step: Step) -> tuple[Tensor, ...]:
    result = step()
    return tuple(
        each if isinstance(each, Tensor) else torch.from_numpy(np.array(each))
        for each in (result if isinstance(result, tuple) else (result,))
    )


def in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of a dense tensor: what torch fills with normals at full speed."""
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))


# The codebases


def host(task: Task) -> Step:
    """diffusers' own scheduler, called as its pipelines and training scripts do."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    data, last = task.data, len(task.schedule.betas) - 1
    options: dict[str, Any] = {
        "num_train_timesteps": last + 1,
        "beta_start": float(task.schedule.betas[0]),
        "beta_end": float(task.schedule.betas[last]),
    }
    if task.sampler in ("ddim", "x0"):
        scheduler = diffusers.DDIMScheduler(**options, timestep_spacing="trailing")
    else:
        variance = "learned_range" if task.sampler == "learned_range" else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**options, variance_type=variance)
    if task.sampler == "add_noise":
        t = torch.full(data.seeds.shape, task.t, device=data.x.device)

        def add_noise() -> tuple[Tensor, Tensor]:
            z = torch.randn_like(data.x)
            return scheduler.add_noise(data.x, z, t), z

        return add_noise
    scheduler.set_timesteps(len(task.table), device=data.x.device)
    t = scheduler.timesteps[task.row]
    generator = torch.Generator(data.x.device).manual_seed(SEED) if task.sampler == "ddpm_generator" else None
    drawn = {} if generator is None else {"generator": generator}
    if task.sampler == "guidance":
        assert data.uncond_output is not None
        cond, uncond = data.model_output, data.uncond_output
        return lambda: scheduler.step(uncond + SCALE * (cond - uncond), t, data.x, return_dict=False)[0]
    step = functools.partial(scheduler.step, data.model_output, t, data.x, return_dict=False, **drawn)
    return step if task.sampler == "x0" else lambda: step()[0]


def improved_diffusion(task: Task) -> Step:
    """p_sample as in openai/improved-diffusion, behind the network: a float64 table is moved to the device, indexed,
    cast and expanded for every coefficient of every call (Nichol & Dhariwal 2021)."""
    x, output = task.data.x, task.data.model_output
    betas = np.asarray(task.schedule.betas, dtype=np.float64)
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    variances = betas * (1 - before) / (1 - alpha_bar)
    log_variances = np.log(np.append(variances[1], variances[1:]))
    x0_of_x, x0_of_eps = np.sqrt(1 / alpha_bar), np.sqrt(1 / alpha_bar - 1)
    mean_of_x0 = betas * np.sqrt(before) / (1 - alpha_bar)
    mean_of_x = (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar)
    t = torch.full(task.data.seeds.shape, task.t, device=x.device)
    each = (-1,) + (1,) * (x.dim() - 1)

    def gathered(table: np.ndarray) -> Tensor:
        return torch.from_numpy(table).to(t.device)[t].float().view(each).expand(x.shape)

    def p_sample() -> Tensor:
        if task.sampler == "learned_range":
            eps, v = output.split(x.shape[1], dim=1)
            share = (v + 1) / 2
            log_variance = share * gathered(np.log(betas)) + (1 - share) * gathered(log_variances)
            torch.exp(log_variance)  # the variance, which p_mean_variance gives too
        else:
            eps = output
            gathered(variances)
            log_variance = gathered(log_variances)
        x0 = (gathered(x0_of_x) * x - gathered(x0_of_eps) * eps).clamp(-1, 1)
        mean = gathered(mean_of_x0) * x0 + gathered(mean_of_x) * x
        gathered(variances), gathered(log_variances)  # the posterior's, which come with its mean
        z = torch.randn_like(x)
        not_last = (t != 0).float().view(each)
        return mean + not_last * torch.exp(0.5 * log_variance) * z

    return p_sample


# Plain PyTorch: the formula, its coefficients in a table, every operation in place


def factor(value: float) -> Tensor:
    """A coefficient that torch.mul is given: a tensor, as it would make one of a Python float at every call.

    It stays on the CPU, and reaches a GPU's kernel as a float does, without a copy of its own or a wait. As `alpha` of
    torch.add a float is one.
    """
    return torch.tensor(value)


def widen(m: Tensor, x: Tensor) -> tuple[Tensor, Callable[[], object] | None]:
    """A model output in x's dtype, and what a step calls first to fill it: one cast, where torch would cast in each
    operation that takes both. None where there is nothing to cast."""
    if m.dtype == x.dtype:
        return m, None
    wide = torch.empty_like(m, dtype=x.dtype)
    return wide, functools.partial(wide.copy_, m)


def plain(task: Task, *, folded: bool = False) -> Step:
    """The formula as it is written, at its best. folded: with factors moved about until no operation can be saved."""
    return PLAIN[task.sampler, folded](task)


def plain_ddpm(task: Task) -> Step:
    data = task.data
    x, m, uncond = data.x, data.model_output, data.uncond_output
    out, x0 = (torch.empty_like(x) for _ in range(2))
    z = torch.empty_like(x) if data.noise is None else data.noise
    table = [(factor(c["px"]), c["pm"], c["lo"], c["hi"], factor(c["a0"]), c["ax"], c["s"]) for c in task.coefficients]
    if task.sampler == "ddpm_generator":
        draw = functools.partial(in_memory_order(z).normal_, generator=torch.Generator(x.device).manual_seed(SEED))
    else:
        draw = in_memory_order(z).normal_ if data.noise is None else lambda: z
    guided = None if uncond is None else torch.empty_like(uncond)
    m, cast = widen(m, x) if uncond is None else (m, None)  # guided, it is cast by the operation behind

    def step() -> Tensor:
        px, pm, lo, hi, a0, ax, s = table[task.row]
        if cast is not None:
            cast()
        eps = m if guided is None else torch.lerp(uncond, m, SCALE, out=guided)
        torch.mul(x, px, out=x0).add_(eps, alpha=pm).clamp_(lo, hi)
        draw()
        return torch.mul(x0, a0, out=out).add_(x, alpha=ax).add_(z, alpha=s)

    return step


def folded_ddpm(task: Task) -> Step:
    x = task.data.x
    m, cast = widen(task.data.model_output, x)
    out, scaled = (torch.empty_like(x) for _ in range(2))
    draw = in_memory_order(out).normal_
    table = [
        (c["pm"] / c["px"], c["lo"] / c["px"], c["hi"] / c["px"], c["a0"] * c["px"], c["ax"], c["s"])
        for c in task.coefficients
    ]

    def step() -> Tensor:
        pm, lo, hi, a0, ax, s = table[task.row]
        if cast is not None:
            cast()
        torch.add(x, m, alpha=pm, out=scaled).clamp_(lo, hi)
        draw(0.0, s)
        return out.add_(scaled, alpha=a0).add_(x, alpha=ax)

    return step


def plain_learned_range(task: Task) -> Step:
    x = task.data.x
    m, v = task.data.model_output.chunk(2, dim=1)
    out, x0, z, std = (torch.empty_like(x) for _ in range(4))
    # exp(0.5*log variance), the log from min_log at v = -1 to max_log at v = 1
    table = [
        (factor(c["px"]), c["pm"], c["lo"], c["hi"], factor(c["a0"]), c["ax"], c["s"])
        + ((c["max_log"] - c["min_log"]) / 4, factor((c["max_log"] + c["min_log"]) / 4))
        for c in task.coefficients
    ]

    def step() -> Tensor:
        px, pm, lo, hi, a0, ax, s, slope, middle = table[task.row]
        torch.mul(x, px, out=x0).add_(m, alpha=pm).clamp_(lo, hi)
        torch.add(middle, v, alpha=slope, out=std).exp_()
        return torch.mul(x0, a0, out=out).add_(x, alpha=ax).addcmul_(z.normal_(), std, value=s)

    return step


def plain_ddim(task: Task) -> Step:
    x = task.data.x
    m, cast = widen(task.data.model_output, x)
    out = torch.empty_like(x)
    x0 = torch.empty_like(x) if task.sampler == "x0" else out
    table = [(factor(c["px"]), c["pm"], c["lo"], c["hi"], factor(c["a0"]), c["ae"]) for c in task.coefficients]

    def step() -> Tensor | tuple[Tensor, Tensor]:
        px, pm, lo, hi, a0, ae = table[task.row]
        if cast is not None:
            cast()
        torch.mul(x, px, out=x0).add_(m, alpha=pm).clamp_(lo, hi)
        torch.mul(x0, a0, out=out).add_(m, alpha=ae)
        return out if x0 is out else (out, x0)

    return step


def folded_ddim(task: Task) -> Step:
    x = task.data.x
    m, cast = widen(task.data.model_output, x)
    out = torch.empty_like(x)
    table = [
        (c["pm"] / c["px"], c["lo"] / c["px"], c["hi"] / c["px"], factor(c["a0"] * c["px"]), c["ae"])
        for c in task.coefficients
    ]

    def step() -> Tensor:
        pm, lo, hi, a0, ae = table[task.row]
        if cast is not None:
            cast()
        return torch.add(x, m, alpha=pm, out=out).clamp_(lo, hi).mul_(a0).add_(m, alpha=ae)

    return step


def plain_add_noise(task: Task) -> Step:
    x0 = task.data.x
    t = torch.full(task.data.seeds.shape, task.row, device=x0.device)
    out, z = torch.empty_like(x0), torch.empty_like(x0)
    each = (-1,) + (1,) * (x0.dim() - 1)
    signal, spread = (
        torch.tensor([c[name] for c in task.coefficients], dtype=x0.dtype, device=x0.device) for name in ("ax", "s")
    )

    def step() -> tuple[Tensor, Tensor]:
        torch.mul(x0, signal[t].view(each), out=out)
        return out.addcmul_(z.normal_(), spread[t].view(each)), z

    return step


PLAIN: dict[tuple[str, bool], Callable[[Task], Step]] = {
    ("ddpm", False): plain_ddpm,
    ("ddpm", True): folded_ddpm,
    ("ddpm_generator", False): plain_ddpm,
    ("ddpm_noise", False): plain_ddpm,
    ("guidance", False): plain_ddpm,
    ("learned_range", False): plain_learned_range,
    ("ddim", False): plain_ddim,
    ("ddim", True): folded_ddim,
    ("x0", False): plain_ddim,
    ("add_noise", False): plain_add_noise,
}


# Compiled


def coefficients_of(task: Task) -> list[list[float]]:
    """[the step's own, the same without noise]: tensors of them are arguments, so that no step is compiled again."""
    names = ("px", "pm", "lo", "hi", "a0", "ax", "ae", "s")
    row = [task.coefficients[task.row][name] for name in names]
    return [row, [*row[:-1], 0.0]]


@functools.lru_cache(maxsize=1)  # calls that take turns over tensors share it
def compiled_formula(random: bool, noise_outside: bool, *_: object) -> Callable[..., None]:
    """The step, compiled for what the other arguments name: a shape, dtypes and a device."""
    from torch._inductor import metrics

    def formula(x: Tensor, m: Tensor, z: Tensor, coefficients: Tensor, out: Tensor) -> None:
        px, pm, lo, hi, a0, ax, ae, s = coefficients.unbind()
        x0 = (px * x + pm * m).clamp(lo, hi)
        if not random:
            out.copy_(a0 * x0 + ae * m)
            return
        noise = z if noise_outside else torch.randn_like(x)
        out.copy_(a0 * x0 + ax * x + s * noise)

    torch.compiler.reset()
    metrics.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False)


def compiled(task: Task, *, noise_outside: bool = False) -> Made:
    """torch.compile of the plain step, written out as formulas, for this shape; its result goes to one buffer.

    noise_outside: the noise is drawn by torch before the call, for on a CPU what is compiled draws it number by number.
    """
    from torch._inductor import metrics  # which takes a second to import

    x, m = task.data.x, task.data.model_output
    random = task.table.structure.variance != "none"
    own, noiseless = (torch.tensor(row, device=x.device) for row in coefficients_of(task))
    out, z = torch.empty_like(x), torch.empty_like(x)
    kernel = compiled_formula(random, noise_outside, x.shape, x.dtype, m.dtype, x.device)
    draws = random and noise_outside

    def step(coefficients: Tensor = own) -> Tensor:
        if draws:
            z.normal_()
        kernel(x, m, z, coefficients, out)
        return out

    step(noiseless)
    counts = {
        "launches": metrics.generated_kernel_count + draws,
        "reads": 0,
        "moved_bytes": x.nbytes + m.nbytes + out.nbytes + 2 * z.nbytes * draws,
    }
    assert metrics.generated_kernel_count == 1, "one kernel: more would move more bytes"
    hidden = random and not noise_outside
    return Made(step, functools.partial(step, noiseless) if hidden else None, counts)


def jax(task: Task) -> Made:
    """jax.jit of the same step, its noise by jax.random (Threefry), a key for each step made inside."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    # one thread, as the other providers of these cases; read when the first array is made
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    jnp = jax.numpy
    x, m = (jnp.asarray(tensor.cpu().numpy()) for tensor in (task.data.x, task.data.model_output))
    own, noiseless = (jnp.asarray(row, x.dtype) for row in coefficients_of(task))
    key, random = jax.random.key(SEED), task.table.structure.variance != "none"

    @jax.jit
    def compute(x: Any, m: Any, t: int, coefficients: Any) -> Any:
        px, pm, lo, hi, a0, ax, ae, s = coefficients
        x0 = jnp.clip(px * x + pm * m, lo, hi)
        if not random:
            return a0 * x0 + ae * m
        return a0 * x0 + ax * x + s * jax.random.normal(jax.random.fold_in(key, t), x.shape, x.dtype)

    def step(coefficients: Any = own, t: int = task.t) -> Any:
        # a call returns before the result is there
        return compute(x, m, t, coefficients).block_until_ready()

    if not random:
        return Made(step)
    return Made(step, functools.partial(step, noiseless), again=lambda t: step(t=t))
