"""The fused operations: `step`, `step_with_x0`, `add_noise`, `dynamic_threshold`.

Schemas and fakes stand here, kernels in csrc/ and triton_kernels.py, the definition in plain PyTorch in reference.py. A
public call makes three hops: validate (TypeError and ValueError, before anything is written), dispatch, launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import native, reference, torch_stream
from . import noise as contract
from .noise import Generators
from .schedules import NoiseSchedule, real
from .tables import (
    COLUMN,
    HOST_ROUNDING,
    SCALARS,
    SECOND_SHIFT,
    STRAIGHT_THROUGH,
    Structure,
    Table,
    add_noise_table,
)

Backend = Literal["auto", "native", "triton", "reference"]
Rounding = Literal["once", "host"]
ClipGrad = Literal["exact", "straight_through"]
Reduction = Literal["sum", "mean", "none"]

BACKENDS = ("auto", "native", "triton", "reference")
CLIP_GRADS = ("exact", "straight_through")
REDUCTIONS = ("sum", "mean", "none")
_MAX_DIMS = 33  # of the kernels
_HALF = (torch.float16, torch.bfloat16)
_SECOND = {None: 0, "noise": 1 << SECOND_SHIFT, "v": 2 << SECOND_SHIFT}  # what a second output holds: x0, or a target

_library = torch.library.Library("fastdiff", "DEF")
_SCHEMAS = {
    "step": "(Tensor(a!) out, Tensor(b!)? second, Tensor x, Tensor? model_output, Tensor? uncond_output, "
    "Tensor? guidance_scale, Tensor? noise, Tensor? seeds, Tensor table, Tensor? t, Tensor? t_to_row, SymInt row, "
    "int flags) -> ()",
    "step_backward": "(Tensor(a!)? grad_x, Tensor(b!)? grad_model_output, Tensor(c!)? grad_uncond_output, "
    "Tensor(d!)? grad_noise, Tensor? grad, Tensor? grad_second, Tensor? x, Tensor? model_output, "
    "Tensor? uncond_output, Tensor? guidance_scale, Tensor? noise, Tensor? seeds, Tensor table, Tensor? t, "
    "Tensor? t_to_row, SymInt row, int flags, Tensor(e!)? sums=None, Tensor? x_prev=None, "
    "Tensor? grad_distance=None, float min_std=0.0) -> ()",
    "step_distance": "(Tensor(a!)? out, Tensor(b!)? squares, Tensor(c!)? distance, Tensor? x_prev, Tensor x, "
    "Tensor? model_output, Tensor? uncond_output, Tensor? guidance_scale, Tensor? noise, Tensor? seeds, "
    "Tensor table, Tensor? t, Tensor? t_to_row, SymInt row, int flags, float min_std) -> ()",
    "normals": "(Tensor(a!) out, Tensor seeds, int t, int repeat, int domain) -> ()",
}
_library.define(
    "step_row(Tensor(a!) out, Tensor x, Tensor model_output, Tensor noise, Tensor table, Tensor place) -> ()"
)
_library.define(
    "step_torch(Tensor(a!) out, Tensor(b!)? second, Tensor x, Tensor? model_output, Tensor? uncond_output, "
    "Tensor? guidance_scale, Tensor table, Tensor? t, Tensor? t_to_row, SymInt row, int flags, Tensor? state, "
    "int seed, int offset, int threads) -> ()"
)
_library.define("dynamic_threshold(Tensor(a!) out, Tensor x0, float ratio, float max_value) -> ()")
_library.define("cpu_isa(int select) -> int")
_library.define("cuda_supports(int device) -> bool")


def _triton(name: str) -> Callable[..., None]:
    """An operator that is imported when it is first called: it brings Triton with it."""

    def call(*args: Any) -> None:
        getattr(importlib.import_module("fastdiff.triton_kernels"), name)(*args)

    return call


for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema}")
    # an operator of its own, so that torch.compile does not look into it
    _library.define(f"triton_{_name}{_schema}")
    _library.impl(f"triton_{_name}", _triton(_name), "CUDA")
for _name in (*_SCHEMAS, *(f"triton_{_name}" for _name in _SCHEMAS), "step_row", "step_torch", "dynamic_threshold"):
    # outputs are the caller's tensors: there is nothing to infer
    torch.library.register_fake(f"fastdiff::{_name}", lambda *args: None)
_UNAVAILABLE = native.load()
# looked up once: for a small step each attribute on the way counts
_is_tracing = torch.compiler.is_dynamo_compiling
_is_under_functorch = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_increment_version = torch._C._increment_version
_step_op = torch.ops.fastdiff.step.default
# what an overload calls, where it has it: that spares a call in Python
_step_row_op: Callable[..., None] = getattr(torch.ops.fastdiff.step_row.default, "_op", torch.ops.fastdiff.step_row)
_step_torch_op = torch.ops.fastdiff.step_torch.default
_dynamic_threshold_op = torch.ops.fastdiff.dynamic_threshold.default


class _Kernels(NamedTuple):
    """The operators of these names."""

    step: Callable[..., None]
    step_backward: Callable[..., None]
    step_distance: Callable[..., None]


_KERNELS = {
    backend: _Kernels(*(getattr(torch.ops.fastdiff, prefix + name).default for name in _Kernels._fields))
    for backend, prefix in (("native", ""), ("triton", "triton_"))
}


@overload
def step(
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    *,
    log_prob: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def step(
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    *,
    log_prob: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


def step(  # type: ignore[misc]  # the overloads, which tell log_prob's two results apart, abbreviate the rest
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    *,
    row: int | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    seeds: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generators | None = None,
    out: Tensor | None = None,
    rounding: Rounding = "once",
    backend: Backend = "auto",
    clip_grad: ClipGrad = "exact",
    log_prob: bool = False,
    reduction: Reduction = "sum",
    min_logprob_std: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a sampler, x_t -> x_{t-1}, as one operation.

    Equivalent to, with the coefficients of the table's row for t and the terms of its structure (`fastdiff.reference`
    is the whole of it):

        m = uncond_output + guidance_scale * (model_output - uncond_output)     # with guidance
        x0 = ((px * x + pm * m) / pd).clamp(lo, hi)
        e = m                                             # or (gx * x - g0 * x0) / gd, or (ex * x + em * m) / gd
        return a0 * x0 + ax * x + ae * e + s * noise

    DDPM: Ho et al. 2020, eq. 7, 11 and 15; DDIM: Song et al. 2021, eq. 12; learned variance: Nichol & Dhariwal 2021,
    eq. 15; guidance: Ho & Salimans 2022, with scale = 1 + w.

    Args:
        table: the rows of the chain (`fastdiff.tables`).
        model_output: what the network gave for x, [B, ...] like x; [B, 2C, ...] where the table learns the variance.
            x's dtype, or a half type beside a float32 x. None only for tables that do not look at it.
        t: the training timestep: an int, or an integer tensor [B], [1] or [] on x's device, which the host never
            reads; a sample whose t is not in the chain becomes NaN. None with `row`.
        x: the state, [B, ...], float32, float64, float16 or bfloat16, any strides.
        row: the row of the table, 0 being the first step of the chain, in place of t or with that row's t; needed
            where the chain visits a timestep more than once.
        uncond_output, guidance_scale: the output without the condition, like model_output (its variance half is not
            looked at and may be missing), and the scale, a number or a tensor [B] or [].
        seeds: noise of the contract (`fastdiff.noise`): an int, or an int64 tensor [B] on x's device.
        noise: the noise itself, like x.
        generator: torch's own stream: what torch.randn of x's shape and dtype gives on the generator's device, or a
            draw [1, ...] from each of B generators; they are advanced by it. On CUDA the native kernel makes the same
            values itself (`fastdiff.torch_stream`). Nothing is drawn where the host knows the row, and it adds no
            noise. Exactly one of seeds, noise and generator for a table that adds noise, none otherwise.
        out: where the result goes: x itself (in place) or a tensor like x that overlaps nothing else. Its version
            counter is bumped.
        rounding: for half states. "once" computes in float32 and rounds the result; "host" rounds every intermediate
            to x's dtype, as eager code in half does.
        backend: "native" (the compiled library, for the CPU and CUDA), "triton" (CUDA without nvcc), "reference"
            (plain PyTorch), or "auto": the first of these that has kernels for x's device; the reference in forward
            mode (torch.func.jvp, torch.autograd.forward_ad) and under torch.func inside torch.compile, for which
            there are none.
        clip_grad: what the clip of x0 lets through in the backward. "exact": nothing where it cut, all at its bounds
            themselves, as torch.clamp; "straight_through": everything, so that a sample which left the range can be
            led back (see CoPaint: Zhang et al. 2023).
        log_prob: also return the log-density of the transition, from the same pass; see `log_prob`.
        reduction, min_logprob_std: of the log-density, as for `log_prob`.

    Returns:
        x_{t-1}: x's shape, dtype and layout, or `out`; with log_prob a pair of it and the log-density.
        Differentiable in x, model_output, uncond_output, guidance_scale, noise and the rows of a table in training, by
        a kernel too, under torch.func and torch.compile as well. It keeps no tensor of the step but those that its
        gradient depends on: x and the model outputs where x0 is clipped, or the scale, the table or a density is
        differentiated (of which x_{t-1} too); the model output where it has a variance half; t where it is a tensor.
        Noise is made again from its seeds.

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything is written.
        RuntimeError: backend="native" or "triton" where it has no kernel, or in forward mode; a kernel that could not
            be launched.
    """
    if log_prob is not False:
        if log_prob is not True:
            raise TypeError(f"log_prob: expected a bool (its form is `reduction`), got {log_prob!r}")
        return _step(
            table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, generator, out, rounding,
            backend, clip_grad=clip_grad, density=_density(reduction, min_logprob_std),
        )  # fmt: skip
    if backend == "auto" and generator is None and clip_grad in CLIP_GRADS:
        found = _shortcut(
            table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, out, rounding, False
        )
        if found is not None:
            return found[0]
    return _step(
        table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, generator, out, rounding, backend,
        clip_grad=clip_grad,
    )[0]  # fmt: skip


def step_with_x0(
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    *,
    row: int | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    seeds: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generators | None = None,
    out: Tensor | None = None,
    rounding: Rounding = "once",
    backend: Backend = "auto",
    clip_grad: ClipGrad = "exact",
) -> tuple[Tensor, Tensor]:
    """`step` that also returns the predicted x0 (clipped where the table clips), in the same pass.

    Args:
        As `step`.

    Returns:
        (x_{t-1}, x0), both like x.

    Raises:
        As `step`; ValueError for a table without x0 (the forward process).
    """
    if backend == "auto" and generator is None and clip_grad in CLIP_GRADS:
        found = _shortcut(
            table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, out, rounding, True
        )
        if found is not None:
            return found
    return _step(
        table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, generator, out, rounding, backend,
        with_x0=True, clip_grad=clip_grad,
    )  # fmt: skip


def log_prob(
    table: Table,
    x_prev: Tensor,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    *,
    row: int | None = None,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    reduction: Reduction = "sum",
    min_logprob_std: float | None = None,
    rounding: Rounding = "once",
    backend: Backend = "auto",
    clip_grad: ClipGrad = "exact",
) -> Tensor:
    """The log-density of a recorded transition x_t -> x_{t-1}, under what the model says of it now.

    Equivalent to, with the mean and the standard deviation of the step:

        std = max(std, min_logprob_std)
        return (-0.5 * ((x_prev.detach() - mean) / std) ** 2 - log(std) - 0.5 * log(2 * pi)).sum()  # of each sample

    For policy gradients (DDPO: Black et al. 2023, arXiv:2305.13301; DPPO: Ren et al. 2024, arXiv:2409.00588) a sampler
    is a policy and a step an action. The same numbers give the same bits here and in `step(..., log_prob=True)`, alone
    and in a batch: the mean is computed as the step computes it, and the elements are added by a fixed tree
    (`fastdiff.reference.tree_sum`), so that the importance ratio of an unchanged model is exactly 1. (A learned
    variance differs by rounding between eager code and compiled code that has gradients, not within either.)

    Args:
        table, model_output, t, x, row, uncond_output, guidance_scale: as for `step`; a table that adds noise.
        x_prev: x_{t-1} as the step returned it, like x. It is a constant: where it depends on the model (as in a
            chain that is differentiated), the gradient of the mean would cancel, so it is not followed.
        reduction: over the elements of a sample: "sum", "mean" (as ddpo-pytorch) or "none" (as dppo).
        min_logprob_std: what the standard deviation of the density is at least, None for 0 (dppo's
            min_logprob_denoising_std).
        rounding, backend, clip_grad: as for `step`.

    Returns:
        [B], or x's shape for reduction "none"; float32, or float64 for a float64 state. Differentiable in
        model_output, x, uncond_output, guidance_scale and the rows of a table in training. NaN for a sample whose t
        is not in the chain, or where the standard deviation is 0 and the host does not know; its gradient is NaN as
        well, which no mask afterwards removes: leave such steps out (of most chains the last), or give the sampler a
        min_std.

    Raises:
        As `step`; ValueError for a table that adds no noise, or a row (or int t) that adds none, unless
        min_logprob_std is above 0.
    """
    if x_prev is None:
        raise TypeError("x_prev: expected a tensor, got None")
    found: Tensor = _step(
        table, model_output, t, x, row, uncond_output, guidance_scale, None, None, None, None, rounding, backend,
        clip_grad=clip_grad, x_prev=x_prev, density=_density(reduction, min_logprob_std),
    )[1]  # fmt: skip
    return found


def add_noise(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule | Table,
    *,
    seeds: int | Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generators | None = None,
    target: Literal["noise", "v"] | None = None,
    out: Tensor | None = None,
    rounding: Rounding = "once",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward process in one pass: x_t ~ q(x_t | x_0), and what a network is trained on with it.

    Equivalent to (Ho et al. 2020, eq. 4; v: Salimans & Ho 2022, section 4):

        x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * noise
        v = alpha_bar[t].sqrt() * noise - (1 - alpha_bar[t]).sqrt() * x0

    Args:
        x0: clean samples, [B, ...], a floating dtype, any strides.
        t: training timestep: an int, or an integer tensor [B] (training draws one per sample), as for `step`.
        schedule: a NoiseSchedule, or an `add_noise_table` (of another host's precision rule).
        seeds: noise of the contract, domain "forward": an int or an int64 tensor [B]; None draws from torch's default
            CPU generator, unless `noise` or `generator` is given.
        noise: the noise itself, like x0.
        generator: torch's own stream, as for `step`.
        target: also return "noise" (the noise that was added) or "v".
        out, rounding, backend: as for `step`.

    Returns:
        x_t like x0, or (x_t, target).

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything is written.
    """
    if isinstance(schedule, NoiseSchedule):
        table = _forward_table(schedule)
    elif isinstance(schedule, Table) and schedule.name == "add_noise":
        table = schedule
    else:
        raise TypeError(f"schedule: expected a NoiseSchedule or an add_noise_table, got {type(schedule).__name__}")
    if not isinstance(target, str | None) or target not in _SECOND:
        raise ValueError(f"target: expected None, 'noise' or 'v', got {target!r}")
    x_t, second = _step(
        table, None, t, x0, None, None, None, seeds, noise, generator, out, rounding, backend,
        target=target, draws=True,
    )  # fmt: skip
    return x_t if second is None else (x_t, second)


def dynamic_threshold(
    x0: Tensor,
    ratio: float = 0.995,
    max_value: float = 1.0,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Dynamic thresholding of a predicted x0: clipped at a quantile of its own, then scaled to [-1, 1].

    Equivalent to (Saharia et al. 2022, arXiv:2205.11487, section 2.3; `_threshold_sample` of diffusers):

        samples = x0.float().flatten(1)                                   # float64 stays
        s = torch.quantile(samples.abs(), ratio, dim=1, keepdim=True).clamp(1, max_value)
        return (torch.clamp(samples, -s, s) / s).reshape(x0.shape).to(x0.dtype)

    with the same bits, but nothing is sorted, and a sample may have more than the 2^24 elements that torch.quantile
    takes (the rank of the quantile is float64 then).

    Args:
        x0: [B, ...], float32, float64, float16 or bfloat16, any strides.
        ratio: where the quantile lies, in [0, 1].
        max_value: what the bound is at most; where it is below 1, as torch.clamp has it, the bound is max_value.
        out: where the result goes: x0 itself (in place) or a tensor like x0 that overlaps nothing else. Its version
            counter is bumped.
        backend: as for `step`; there is no Triton kernel, so that where only Triton is there "auto" is the reference.
            A gradient, forward mode and torch.func take the reference, whatever the backend.

    Returns:
        x0's shape, dtype and layout, or `out`. A sample with a NaN is all NaN, and so is one whose quantile lies on or
        beside an Inf, as with torch.quantile; a tensor without elements stays one. Differentiable in x0, through the
        bound too.

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything is written.
        RuntimeError: a backend that has no kernel for x0.
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0: expected a tensor, got {type(x0).__name__}")
    if x0.layout is not torch.strided:
        raise TypeError(f"x0: expected a strided tensor, got {x0.layout}")
    if x0.dtype not in contract.DTYPES:
        raise TypeError(f"x0: expected float32, float64, float16 or bfloat16, got {x0.dtype}")
    if not x0.shape:
        raise ValueError("x0: expected a batch dimension, got a 0-dimensional tensor")
    ratio = real("ratio", ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a number from 0 to 1, got {ratio}")
    # an infinite one bounds nothing
    max_value = math.inf if type(max_value) is float and max_value == math.inf else real("max_value", max_value)
    dtype = contract.compute_dtype(x0.dtype)
    if not (torch.finfo(dtype).tiny <= max_value <= torch.finfo(dtype).max or max_value == math.inf):
        raise ValueError(f"max_value: expected a number above 0 that {dtype} can hold, got {max_value}")
    needs_grad, transformed = _needs_grad(x0), torch._C._are_functorch_transforms_active()
    by_kernel = _thresholds_by_kernel(backend, x0) and not needs_grad and not transformed
    if out is not None:
        _check_out(out, x0, None, None, None, (None, None), needs_grad, transformed, name="x0")
    if not by_kernel:
        found = reference.dynamic_threshold(x0, ratio, max_value) if x0.numel() else torch.empty_like(x0)
        return _like_layout(found, x0) if out is None else out.copy_(found)
    result = torch.empty_like(x0) if out is None else out
    _dynamic_threshold_op(result, x0, ratio, max_value)
    if out is not None:
        increment_version(out)
    return result


def _thresholds_by_kernel(backend: str, x0: Tensor) -> bool:
    if backend == "native":
        _check_kernels(backend, x0.device, False)
        return True
    if backend == "triton":
        raise RuntimeError("backend 'triton': it has no dynamic thresholding; use 'auto', 'native' or 'reference'")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return False
    best = native.best(x0.device)
    if best is None and not torch.compiler.is_compiling():
        native.warn_once(x0.device)
    return best == "native" and x0.dim() <= _MAX_DIMS


def _shortcut(
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    row: int | None,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
    seeds: int | Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
    rounding: str,
    with_x0: bool,
) -> tuple[Tensor, Any] | None:
    """(x', x0 if asked for) of a common call, straight from the kernel; None where `_step` is to see to it.

    The checks of _step take many times as long as a small step itself (benchmarks/bench_overhead.py). The kernel's own
    stand in for them: where it objects nothing has been written, and _step finds the words.
    """
    if (
        type(x) is not Tensor
        or type(model_output) is not Tensor
        or type(table) is not Table
        or _is_tracing()
        or forward_ad._current_level >= 0
        or _is_under_functorch()
        or _UNAVAILABLE is not None
    ):
        return None
    shortcut = table.shortcuts.get(x.dtype if x.is_cpu else (x.device, x.dtype, native.stream_of(x.device)))
    if shortcut is None:
        return None
    rows, adds_noise, of_t, of_row = shortcut
    each_t: Tensor | None = None
    t_to_row: Tensor | None = None
    place: Tensor | None = None
    if row is None and type(t) is Tensor:
        if t.dtype is not torch.int64 or t.dim() != 1:
            return None
        each_t, t_to_row, row = t, table.row_map(x.device), 0  # the rows are looked up by the kernel
    else:
        if row is None:
            found = of_t.get(t) if type(t) is int else None
        else:
            found = of_row.get(row) if t is None and type(row) is int else None
        if found is None:
            return None
        row, place = found
    if adds_noise:
        if type(seeds) is int and x.dim() > 0:
            try:
                seeds = _int_seeds(seeds, x.shape[0], x.device)
            except ValueError:
                return None
        source = noise if seeds is None else seeds
        if type(source) is not Tensor or not (noise is None if source.dtype is torch.int64 else seeds is None):
            return None
    elif seeds is None and noise is None:
        source = rows  # which nobody looks at
    else:
        return None
    if _is_grad_enabled() and (
        x.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad)
    ):
        return None
    if out is None:
        result = torch.empty_like(x)
    elif out is x or (type(out) is Tensor and not out.requires_grad):
        result = out
    else:
        return None
    x0: Tensor | None = None
    try:
        if (
            place is not None
            and rounding == "once"
            and uncond_output is None
            and guidance_scale is None
            and not with_x0
        ):
            _step_row_op(result, x, model_output, source, rows, place)
        else:
            flags = table.structure.flags
            if rounding == "host" and x.is_cpu:
                flags |= HOST_ROUNDING
            elif rounding != "once":
                return None
            if with_x0:
                if table.structure.x0 == "none":
                    return None
                x0 = torch.empty_like(x)
            scale: Tensor | None = None
            if uncond_output is not None or guidance_scale is not None:
                scale = _known_scale(guidance_scale, x, rows.dtype)
                if type(uncond_output) is not Tensor or scale is None:
                    return None
                if _is_grad_enabled() and (uncond_output.requires_grad or scale.requires_grad):
                    return None
            _step_op(
                result, x0, x, model_output, uncond_output, scale, noise, seeds, rows, each_t, t_to_row, row, flags
            )  # fmt: skip
    except (RuntimeError, ValueError):
        return None
    if out is not None:
        _increment_version((out,))
    return result, x0


def _known_scale(scale: float | Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A guidance scale as a kernel takes it, in the dtype of the rows; None where it is to be checked or made."""
    if type(scale) is Tensor:
        return scale if scale.dtype is dtype and scale.dim() < 2 else None
    if type(scale) is not float or scale == 0 or not x.is_cpu:  # 0.0 and -0.0 would be one key
        return None
    found = _scales.get((scale, dtype))
    if found is None:
        with torch.inference_mode(False):
            found = check_scale(scale, 1, x.device, x.dtype)
        _keep(_scales, (scale, dtype), found)
    return found


_scales: dict[tuple[float, torch.dtype], Tensor] = {}  # of floats, on the CPU
_seeds: dict[tuple[Any, ...], Tensor] = {}  # of ints, by batch, and beside the CPU by device and stream


def _int_seeds(seed: int, batch: int, device: torch.device) -> Tensor:
    # kept: a chain hands the same int to every step, and the tensor takes as long as a small step
    on_cpu = device.type == "cpu"
    key = (seed, batch) if on_cpu else (seed, batch, device, native.stream_of(device))
    # a graph makes its own: those kept here may go before it does, and its own have their values in it alone
    capturing = not on_cpu and native.capturing(device)
    found = None if capturing else _seeds.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = contract.seeds(seed, batch, device)
        if batch <= 4096 and not capturing:
            _keep(_seeds, key, found)
    return found


def _keep(cache: dict[Any, Tensor], key: Any, made: Tensor) -> None:
    if type(made) is Tensor:  # a tracer makes no values
        while len(cache) >= 64:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread makes room too
                cache.pop(next(iter(cache)), None)
        cache[key] = made


@functools.lru_cache(maxsize=16)
def _forward_table(schedule: NoiseSchedule) -> Table:
    return add_noise_table(schedule)


def _step(
    table: Table,
    model_output: Tensor | None,
    t: int | Tensor | None,
    x: Tensor,
    row: int | None,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
    seeds: int | Tensor | None,
    noise: Tensor | None,
    generator: Generators | None,
    out: Tensor | None,
    rounding: str,
    backend: str,
    *,
    with_x0: bool = False,
    target: str | None = None,
    draws: bool = False,
    clip_grad: str = "exact",
    x_prev: Tensor | None = None,
    density: _Density | None = None,
) -> tuple[Any, Any]:
    """(x', and x0, the target or the log-density), those of them that are asked for."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a Table, got {type(table).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x: expected a strided tensor, got {x.layout}")
    if not len(table):
        raise ValueError("table: expected at least one row, got none")
    structure = table.structure
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in contract.DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {dtype}")
    if not shape:
        raise ValueError("x: expected a batch dimension, got a 0-dimensional tensor")
    if model_output is None:
        if structure.a0 or structure.ae or with_x0:
            raise TypeError("model_output: expected a tensor, got None")
    else:
        _check_output("model_output", model_output, x, shape, dtype, device, structure.learned)

    t_rows: Tensor | None = None
    if row is not None:
        if isinstance(t, Tensor):
            raise TypeError("t: expected None or an int beside row, got a tensor")
        if type(row) is not int and (not isinstance(row, SupportsIndex) or isinstance(row, bool | Tensor)):
            raise TypeError(f"row: expected an int, got {type(row).__name__}")
        row = row if type(row) is int else row.__index__()
        if not 0 <= row < len(table):
            raise ValueError(f"row: expected 0 to {len(table) - 1}, got {row}")
        if t is not None and t != table.timesteps[row]:
            raise ValueError(f"t: expected None or the timestep of row {row}, {table.timesteps[row]}, got {t}")
    elif isinstance(t, Tensor):
        t_rows = _check_t(t, shape[0], device)
    elif type(t) is int or (isinstance(t, SupportsIndex) and not isinstance(t, bool)):  # a protocol takes 5 us to ask
        row = table.row_of(t if type(t) is int else t.__index__())
    else:
        raise TypeError(f"t: expected an int or an integer tensor, got {type(t).__name__}")

    keys: Tensor | None = None
    given = [
        name for name, value in (("noise", noise), ("seeds", seeds), ("generator", generator)) if value is not None
    ]
    if structure.variance == "none":
        if given:
            raise ValueError(f"{given[0]}: expected none, the table {table.name!r} adds no noise")
    elif len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one of them, got {'both' if len(given) == 2 else 'all'}")
    elif noise is not None:
        _check_noise(noise, shape, dtype, device)
    elif generator is not None:
        contract.check_generators(generator, shape[0], device)
    elif seeds is not None:
        if isinstance(seeds, Tensor) and seeds.device != device:
            raise ValueError(f"seeds: expected a tensor on {device} (x's device), got {seeds.device}")
        if type(seeds) is int and type(x) is Tensor and not torch.compiler.is_compiling():
            keys = _int_seeds(seeds, shape[0], device)
        else:
            keys = contract.seeds(seeds, shape[0], device)
    elif not draws and x_prev is None:
        raise ValueError(f"seeds: expected seeds, noise or a generator, the table {table.name!r} adds noise")

    scale: Tensor | None = None
    if uncond_output is not None or guidance_scale is not None:
        if uncond_output is None or guidance_scale is None or model_output is None:
            raise ValueError("uncond_output and guidance_scale: expected both, with model_output, or neither")
        learned = structure.learned and isinstance(uncond_output, Tensor) and uncond_output.shape != shape
        _check_output("uncond_output", uncond_output, x, shape, dtype, device, learned)
        if uncond_output.dtype != model_output.dtype:
            raise TypeError(f"uncond_output: expected {model_output.dtype}, got {uncond_output.dtype}")
        scale = check_scale(guidance_scale, shape[0], device, dtype)
    if with_x0 and structure.x0 == "none":
        raise ValueError(f"table: expected one that predicts x0, got {table.name!r}")
    if rounding not in ("once", "host"):
        raise ValueError(f"rounding: expected 'once' or 'host', got {rounding!r}")
    if clip_grad not in CLIP_GRADS:
        raise ValueError(f"clip_grad: expected one of {CLIP_GRADS}, got {clip_grad!r}")
    if x_prev is not None:
        _check_x_prev(x_prev, shape, dtype, device)
    if density is not None:
        _check_density(density, table, row, dtype)

    needs_grad = _needs_grad(x, model_output, noise, uncond_output, scale, table.trained)
    transformed = torch._C._are_functorch_transforms_active()
    # the autograd.Function has no forward mode, and compiled code looks past it under torch.func
    by_reference = forward_ad._current_level >= 0 or (transformed and torch.compiler.is_compiling())
    chosen: str | None
    if backend == "auto":
        chosen = native.best(device)
        if chosen is None and not torch.compiler.is_compiling():
            native.warn_once(device)
        if by_reference or x.dim() > _MAX_DIMS:
            chosen = None
    elif backend in _KERNELS:
        _check_kernels(backend, device, by_reference)
        chosen = backend
    elif backend == "reference":
        chosen = None
    else:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")

    if out is not None:
        _check_out(out, x, model_output, uncond_output, noise, (keys, t_rows), needs_grad, transformed)
    host_rounding = rounding == "host"
    rows = table.to(device, dtype, host_rounding=host_rounding)
    scalars = table.scalars == "cpu" and device.type == "cuda"
    # drawn last, so that a refused call leaves the generator as it was
    draw: torch_stream.Draw | None = None
    if generator is not None:
        if row is not None and table.trained is None and not table.noisy[row]:
            noise = torch.zeros_like(x)
        elif (
            chosen == "native"
            and not needs_grad
            and not transformed
            and density is None
            and table.noise_clip is None
            and not torch.compiler.is_compiling()
            and isinstance(generator, torch.Generator)
            and _in_logical_order(x, model_output, uncond_output, out)
            and torch_stream.available(generator, x)
        ):
            draw = torch_stream.take(generator, x)
        else:
            noise = contract.randn(tuple(shape), generator, dtype, device)
    elif draws and seeds is None and noise is None:
        keys = contract.seeds(None, shape[0], device)
    if table.noise_clip is not None and x_prev is None:
        if noise is None:
            assert table.of_noise is not None
            noise, keys = _normals_of(table.of_noise, row, t_rows, x, keys, backend), None
        noise = noise.clamp(-table.noise_clip, table.noise_clip)
    t_to_row = None if t_rows is None else table.row_map(device)
    flags = structure.flags
    if scalars:
        flags |= SCALARS
    if host_rounding:
        flags |= HOST_ROUNDING
    if clip_grad == "straight_through":
        flags |= STRAIGHT_THROUGH
    with_second = with_x0 or target is not None
    if with_second:
        flags |= _SECOND[target]
    if (
        model_output is not None
        and generator is None
        and density is None
        and backend == "auto"
        and chosen == "native"
        and not (needs_grad or transformed or torch.compiler.is_compiling())
    ):
        # the next such call finds its way without these checks
        if device.type == "cpu":
            table.add_shortcut(dtype, rows)
        elif not scalars and not host_rounding:
            table.add_shortcut((device, dtype, native.stream_of(device)), rows)

    if scale is not None:
        # a copy where it could be written to before it is read
        shared = out is not None and out.data_ptr() < _end(scale) and scale.data_ptr() < _end(out)
        scale = scale.to(rows.dtype, copy=shared)
    o = _Operands(x, model_output, uncond_output, noise, scale, rows, keys, t_rows, t_to_row, x_prev)
    outputs: tuple[str, ...] = ("x_prev",) if x_prev is None else ()
    if with_second:
        outputs += ("second",)
    # of a learned variance the density is left to the reference
    fused = density is not None and not structure.learned
    late: Tensor | None = None
    if fused:
        outputs += ("distance",)
    elif density is not None:
        late, out = out, None  # which may be x, that the density is still to see
    call = _Call(
        chosen or "reference",
        structure,
        row or 0,
        flags,
        outputs,
        target,
        density is not None and density.reduction == "none",
        0.0 if density is None else density.min_std,
    )
    if not outputs:
        found: tuple[Tensor, ...] = ()
    elif chosen is None:
        found = _reference_step(call, o)
        if out is not None:
            found = (out.copy_(found[0]), *found[1:])
    elif draw is not None:
        found = _launch_drawing(call, o, draw, out)
    elif transformed or (needs_grad and torch.compiler.is_compiling()):
        found = _Step.apply(*o, call)
    elif needs_grad:
        found = _apply_step(*o, call)
    else:
        found = _launch(call, o, out)
    if out is not None and chosen is not None:
        increment_version(out)
    x_prime = found[0] if x_prev is None else x_prev
    if density is None:
        return x_prime, found[1] if with_second else None
    if fused:
        return x_prime, _density_of(call, o, table, found[-1], density)
    log_density = _learned_density(call, o._replace(x_prev=x_prime.detach()), density)
    return (x_prime if late is None else late.copy_(x_prime)), log_density


class _Density(NamedTuple):
    """What is asked for of the log-density of a step."""

    reduction: str
    min_std: float


class _Form(NamedTuple):
    """What the gradient of an operand is to be like."""

    dtype: torch.dtype
    wide: bool  # 2C channels
    strides: tuple[int, ...] | None  # None: contiguous


class _Call(NamedTuple):
    """A step, or its backward, but for the tensors."""

    backend: str
    structure: Structure
    row: int
    flags: int
    outputs: tuple[str, ...]  # "x_prev", "second" and "distance", those that are asked for, in this order
    target: str | None  # what the second output is; None: x0
    each: bool  # the distance of each element
    min_std: float
    wanted: tuple[_Form | None, ...] = ()  # gradients of x, model_output, uncond_output and noise
    sums: bool = False  # and of the coefficients

    @property
    def clip_grad(self) -> str:
        return "straight_through" if self.flags & STRAIGHT_THROUGH else "exact"

    @property
    def rounding(self) -> str:
        return "host" if self.flags & HOST_ROUNDING else "once"


class _Operands(NamedTuple):
    """The tensors of a step."""

    x: Tensor
    model_output: Tensor | None
    uncond_output: Tensor | None
    noise: Tensor | None
    scale: Tensor | None  # [1] or [B], in the dtype of rows
    rows: Tensor  # of the table, as the kernels read them
    seeds: Tensor | None
    t: Tensor | None
    t_to_row: Tensor | None
    x_prev: Tensor | None  # given, where only its distance from the mean is asked for


def _launch(call: _Call, o: _Operands, out: Tensor | None = None) -> tuple[Tensor, ...]:
    """The outputs of a step by a kernel; x' goes to `out`, or to a new tensor."""
    kernels = _KERNELS[call.backend]
    result = second = distance = None
    if "x_prev" in call.outputs:
        result = torch.empty_like(o.x) if out is None else out
    operands = o.x, o.model_output, o.uncond_output, o.scale, o.noise, o.seeds, o.rows, o.t, o.t_to_row
    if "distance" in call.outputs:
        dtype = o.rows.dtype
        distance = torch.empty_like(o.x, dtype=dtype) if call.each else o.x.new_empty(o.x.shape[:1], dtype=dtype)
        forms = (distance, None) if call.each else (None, distance)
        kernels.step_distance(result, *forms, o.x_prev, *operands, call.row, call.flags, call.min_std)
    else:
        second = torch.empty_like(o.x) if "second" in call.outputs else None
        kernels.step(result, second, *operands, call.row, call.flags)
    return tuple(output for output in (result, second, distance) if output is not None)


def _launch_backward(
    call: _Call, grad: Tensor | None, grad_second: Tensor | None, grad_distance: Tensor | None, o: _Operands
) -> tuple[Tensor, ...]:
    """The gradients that a call wants, by a kernel: those of the operands, and the sums of the coefficients."""
    like = _like_x(grad, grad_second, o.x_prev)

    def empty(form: _Form | None) -> Tensor | None:
        if form is None:
            return None
        shape = (like.shape[0], 2 * like.shape[1], *like.shape[2:]) if form.wide else like.shape
        if form.strides is None:
            return like.new_empty(shape, dtype=form.dtype)
        return torch.empty_strided(shape, form.strides, dtype=form.dtype, device=like.device)

    gradients = [empty(form) for form in call.wanted]
    uncond = gradients[2]
    if uncond is not None and uncond.shape != like.shape:
        uncond[:, like.shape[1] :].zero_()  # its variance half is not looked at
    sums = like.new_empty((like.shape[0], len(COLUMN) + 1), dtype=o.rows.dtype) if call.sums else None
    if grad_distance is not None and not call.each:
        grad_distance = grad_distance.contiguous()
    _KERNELS[call.backend].step_backward(
        *gradients,
        grad,
        grad_second,
        o.x,
        o.model_output,
        o.uncond_output,
        o.scale,
        o.noise,
        o.seeds,
        o.rows,
        o.t,
        o.t_to_row,
        call.row,
        call.flags,
        sums,
        None if grad_distance is None else o.x_prev,
        grad_distance,
        call.min_std,
    )
    return tuple(gradient for gradient in (*gradients, sums) if gradient is not None)


def _closed_form(
    call: _Call, grad: Tensor | None, grad_second: Tensor | None, grad_distance: Tensor | None, o: _Operands
) -> tuple[Tensor, ...]:
    """What `_launch_backward` gives, by operations that autograd and any transform of torch can follow."""
    like = _like_x(grad, grad_second, o.x_prev)
    structure = call.structure
    chosen, valid = _rows_of(o.rows, call.row, o.t, o.t_to_row, like)
    x_prev = None if grad_distance is None or o.x_prev is None else o.x_prev.detach()  # a constant of its density
    if valid is not None:
        # the NaN of a sample out of the chain would reach second derivatives that all samples share
        inside = valid

        def masked(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return torch.where(inside if tensor.dim() == inside.dim() else inside.reshape(-1), tensor, 0.0)

        grad, grad_second, grad_distance, x_prev = map(masked, (grad, grad_second, grad_distance, x_prev))
    found = reference.step_backward(
        chosen,
        structure,
        grad,
        grad_second,
        o.x,
        o.model_output,
        z=_noise_of(chosen, structure, like, o),
        second=call.target or "x0",
        x_prev=x_prev,
        grad_distance=grad_distance,
        min_std=call.min_std,
        with_sums=call.sums,
        **_options_of(call, o, like),
    )
    gradients: list[Tensor] = []
    for gradient, form in zip(found[:4], call.wanted, strict=True):
        if gradient is None or form is None:
            continue
        if valid is not None:
            gradient = torch.where(valid, gradient, 0.0)
        if form.wide and gradient.shape == like.shape:  # the variance half of uncond_output is not looked at
            gradient = torch.cat([gradient, torch.zeros_like(gradient)], 1)
        gradients.append(gradient.to(form.dtype))
    if found.sums is not None:
        gradients.append(found.sums if valid is None else torch.where(valid.reshape(-1, 1), found.sums, 0.0))
    return tuple(gradients)


def _batched(*tensors: Tensor | None) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) holds a tensor, by a vmap that is not torch.func's."""
    return any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def _like_x(*tensors: Tensor | None) -> Tensor:
    """The first tensor that there is: a gradient or x', all of which are like x."""
    return next(tensor for tensor in tensors if tensor is not None)


class _Step(torch.autograd.Function):
    """A step by a kernel, with the backward by its kernel. Its inputs are those of `_Operands`, and the call."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, call = inputs
        return _launch(call, _Operands(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, call = inputs
        o, needs = _Operands(*tensors), _Operands(*ctx.needs_input_grad[:-1])
        outputs = dict(zip(call.outputs, output, strict=True))
        eager = not torch.compiler.is_compiling()
        if eager:
            ctx.set_materialize_grads(False)
        if call.target == "noise" and not needs.noise:
            ctx.mark_non_differentiable(outputs["second"])
        structure = call.structure
        sums = needs.scale or needs.rows
        masked = reference.masks_clip(structure, True, "second" in outputs, call.target or "x0", call.clip_grad)
        again = sums or masked or "distance" in outputs
        noisy = "x_prev" in outputs and (structure.learned or (sums and structure.variance != "none"))
        kept = (
            o.x if again else None,
            o.model_output if again or structure.learned else None,
            o.uncond_output if again else None,
            o.noise if noisy else None,
            o.scale,
            o.rows if needs.rows or not eager else None,
            o.seeds if noisy else None,
            o.t,
            None if eager else o.t_to_row,
            outputs.get("x_prev", o.x_prev) if "distance" in outputs else None,
        )
        # an inference tensor cannot be kept, and has no graph that a copy would leave
        ctx.save_for_backward(*(u.clone() if eager and u is not None and u.is_inference() else u for u in kept))
        # what a table keeps never changes, and is not for the hooks of saved tensors
        ctx.constants = (None if needs.rows else o.rows, o.t_to_row) if eager else (None, None)
        ctx.call = call
        # what the gradients are like, without their memory
        forms: list[_Form | None] = []
        for u, need in zip(o[:4], needs[:4], strict=True):
            if u is None or not need:
                forms.append(None)
                continue
            strides: tuple[int, ...] | None = None
            if eager and not torch._C._are_functorch_transforms_active() and not u.is_contiguous():
                strides = torch.empty_like(u, device="meta").stride()
            forms.append(_Form(u.dtype, u.shape != o.x.shape, strides))
        ctx.forms = tuple(forms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        nothing = (None,) * (len(_Operands._fields) + 1)
        if all(grad is None for grad in grads):
            return nothing
        o = _Operands(*ctx.saved_tensors)
        rows, t_to_row = ctx.constants
        if rows is not None:
            o = o._replace(rows=rows)
        if t_to_row is not None:
            o = o._replace(t_to_row=t_to_row)
        needs = _Operands(*ctx.needs_input_grad[:-1])
        wanted = tuple(form if need else None for form, need in zip(ctx.forms, needs[:4], strict=True))
        call = call._replace(wanted=wanted, sums=bool(needs.scale or needs.rows))
        given = dict(zip(call.outputs, grads, strict=True))
        three = given.get("x_prev"), given.get("second"), given.get("distance")
        if torch.compiler.is_compiling():
            found = _launch_backward(call, *three, o)
        elif forward_ad._current_level >= 0 or _batched(*three):
            found = _closed_form(call, *three, o)
        elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            found = _StepBackward.apply(*three, *o, call)
        else:
            found = _launch_backward(call, *three, o)

        rest = iter(found)
        gradients: list[Tensor | None] = [None if form is None else next(rest) for form in wanted]
        gradients += [None] * (len(nothing) - len(gradients))
        if call.sums:
            sums = next(rest)
            if needs.scale:
                assert o.scale is not None
                shared = o.scale.shape[0] == 1
                gradients[4] = reference.tree_sum(sums[:, -1]).reshape(1) if shared else sums[:, -1]
            if needs.rows:
                gradients[5] = _of_table(sums[:, :-1], call.row, o)
        return tuple(gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _over_slices(_Step, info.batch_size, in_dims, inputs, 0)


# Function.apply without the look at the signature of forward, which takes longer than a small step
_apply_step = super(torch.autograd.Function, _Step).apply


class _StepBackward(torch.autograd.Function):
    """The gradients of a step by a kernel, where they are differentiated in turn: then by the closed form in PyTorch.

    Its inputs are the gradients of x', of the second output and of the distance, those of `_Operands`, and the call.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        grad, grad_second, grad_distance, *tensors, call = inputs
        return _launch_backward(call, grad, grad_second, grad_distance, _Operands(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [k for k, need in enumerate(ctx.needs_input_grad) if need]

        def closed_form(*varied: Tensor) -> tuple[Tensor, ...]:
            full = list(tensors)
            for k, tensor in zip(wanted, varied, strict=True):
                full[k] = tensor
            grad, grad_second, grad_distance, *operands = full
            return _closed_form(ctx.call, grad, grad_second, grad_distance, _Operands(*operands))

        pull = torch.func.vjp(closed_form, *(tensors[k] for k in wanted))[1]
        found: list[Tensor | None] = [None] * (len(tensors) + 1)
        for k, gradient in zip(wanted, pull(grads), strict=True):
            found[k] = gradient
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _over_slices(_StepBackward, info.batch_size, in_dims, inputs, 3)


def _over_slices(
    function: type[torch.autograd.Function], size: int, in_dims: Sequence[Any], inputs: Sequence[Any], extra: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of torch.vmap: one call of the function with all slices as one batch.

    Its inputs are `extra` gradients, the operands and the call.
    """
    *tensors, call = inputs
    o = _Operands(*tensors[extra:])
    like_x = zip((*tensors[:2], o.x_prev), (*in_dims[:2], in_dims[-2]), strict=True)
    first, dim = next((u, d) for u, d in like_x if u is not None)
    batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]
    grads = [_joined(u, d, size) for u, d in zip(tensors[:extra], in_dims[:extra], strict=True)]
    folded = _fold(size, in_dims[extra:-1], o, call.row, batch)
    wanted = tuple(form if form is None else form._replace(strides=None) for form in call.wanted)
    found = function.apply(*grads, *folded, call._replace(wanted=wanted))
    return tuple(u.unflatten(0, (size, batch)) for u in found), (0,) * len(found)


def _joined(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The samples of all slices of a vmap over `dim` as one batch."""
    if tensor is None:
        return None
    every = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return every.flatten(0, 1)


def _fold(size: int, in_dims: Sequence[int | None], o: _Operands, row: int, batch: int) -> _Operands:
    """The operands of all slices of a vmap as those of one step; batch: the samples of a slice."""
    dims = dict(zip(_Operands._fields, in_dims, strict=True))

    def shared(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """[1] or [B]: one for all samples stays so where it is one for all slices too."""
        if tensor is None or (dim is None and tensor.shape[0] == 1):
            return tensor
        every = tensor.expand(size, -1) if dim is None else tensor.movedim(dim, 0)
        return every.expand(size, batch).flatten()

    rows, t, t_to_row = o.rows, shared(o.t, dims["t"]), o.t_to_row
    over_tables = dims["rows"]
    if over_tables is not None:
        # the tables of all slices as one, the samples of each slice pointing into their own
        tables = rows.movedim(over_tables, 0)
        steps = tables.shape[1]
        rows = tables.flatten(0, 1)
        if t is None:
            at = rows.new_full((), row, dtype=torch.int64)
        else:
            assert t_to_row is not None
            at = _index_of(t, t_to_row)
        first = torch.arange(size, device=rows.device).repeat_interleave(batch) * steps
        t = torch.where(at >= 0, at + first, -1)
        t_to_row = torch.arange(size * steps, device=rows.device)
    each: dict[str, Any] = {
        name: _joined(getattr(o, name), dims[name], size)
        for name in ("x", "model_output", "uncond_output", "noise", "seeds", "x_prev")
    }
    return o._replace(scale=shared(o.scale, dims["scale"]), rows=rows, t=t, t_to_row=t_to_row, **each)


def _of_table(sums: Tensor, row: int, o: _Operands) -> Tensor:
    """The gradient of the rows of a table from those of each sample's row, added in the order of the samples."""
    if o.t is None:
        index = torch.full((sums.shape[0],), row, device=sums.device)
    else:
        assert o.t_to_row is not None
        index = _index_of(o.t, o.t_to_row).clamp(min=0).expand(sums.shape[0])
    # in float64, where PyTorch adds one sample after the other
    total = torch.zeros_like(o.rows, dtype=torch.float64).index_put((index,), sums.double(), accumulate=True)
    return total.to(o.rows.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    # dual tensors do not require grad: without this test their tangent would be lost in silence
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() of a generator takes twice as long, in every step
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether torch.func, or forward mode, is at work: what is done must be done in its sight."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _check_output(
    name: str, output: Tensor, x: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device, learned: bool
) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(output).__name__}")
    if output.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {output.layout}")
    if output.dtype is not dtype and not (dtype is torch.float32 and output.dtype in _HALF):
        also = " or a half type" if dtype is torch.float32 else ""
        raise TypeError(f"{name}: expected {dtype}{also} (x's dtype), got {output.dtype}")
    if learned:
        if len(shape) < 2:
            raise ValueError(f"x: expected [batch, channels, ...] (learned variance), got {list(shape)}")
        expected = (shape[0], 2 * shape[1], *shape[2:])
        if output.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)} (learned variance), got {list(output.shape)}")
    elif output.shape != shape:
        hint = ""
        if len(shape) > 1 and output.shape == (shape[0], 2 * shape[1], *shape[2:]):
            hint = "; 2C channels go with a table of learned variance"
        raise ValueError(f"{name}: expected x's shape {list(shape)}, got {list(output.shape)}{hint}")
    if output.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} (x's device), got {output.device}")


def _check_t(t: Tensor, batch: int, device: torch.device) -> Tensor:
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype is torch.bool:
        raise TypeError(f"t: expected an int or an integer tensor, got a tensor of {t.dtype}")
    if t.numel() != 1 and t.shape != (batch,):
        raise ValueError(f"t: expected shape [{batch}] or one element, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"t: expected a tensor on {device} (x's device), got {t.device}")
    return t.to(torch.int64).reshape(-1)


def _check_noise(noise: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise: expected a tensor, got {type(noise).__name__}")
    if noise.layout is not torch.strided:
        raise TypeError(f"noise: expected a strided tensor, got {noise.layout}")
    if noise.dtype is not dtype and (noise.dtype not in contract.DTYPES or noise.dtype is torch.float64):
        raise TypeError(f"noise: expected {dtype} (x's dtype), float32 or a half type, got {noise.dtype}")
    if noise.shape != shape:
        raise ValueError(f"noise: expected x's shape {list(shape)}, got {list(noise.shape)}")
    if noise.device != device:
        raise ValueError(f"noise: expected a tensor on {device} (x's device), got {noise.device}")


def check_scale(scale: float | Tensor, batch: int, device: torch.device, state: torch.dtype) -> Tensor:
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise TypeError(f"guidance_scale: expected a number or a tensor, got {type(scale).__name__}")
        try:
            scale = float(scale)
        except OverflowError:
            raise ValueError("guidance_scale: expected a number that a float can hold") from None
        dtype = contract.compute_dtype(state)
        if torch.finfo(dtype).max < abs(scale) < math.inf:
            raise ValueError(f"guidance_scale: expected a number that {dtype} can hold, got {scale}")
        return torch.full((1,), scale, dtype=dtype, device=device)
    if not scale.dtype.is_floating_point:
        raise TypeError(f"guidance_scale: expected a floating dtype, got {scale.dtype}")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != 1 and scale.shape[0] != batch):
        raise ValueError(f"guidance_scale: expected a number or shape [{batch}], got {list(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"guidance_scale: expected a tensor on {device} (x's device), got {scale.device}")
    return scale.reshape(-1)


def _check_x_prev(x_prev: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(x_prev, Tensor):
        raise TypeError(f"x_prev: expected a tensor, got {type(x_prev).__name__}")
    if x_prev.layout is not torch.strided:
        raise TypeError(f"x_prev: expected a strided tensor, got {x_prev.layout}")
    if x_prev.dtype is not dtype:
        raise TypeError(f"x_prev: expected {dtype} (x's dtype), got {x_prev.dtype}")
    if x_prev.shape != shape:
        raise ValueError(f"x_prev: expected x's shape {list(shape)}, got {list(x_prev.shape)}")
    if x_prev.device != device:
        raise ValueError(f"x_prev: expected a tensor on {device} (x's device), got {x_prev.device}")


def _density(reduction: str, min_std: float | None) -> _Density:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    least = 0.0 if min_std is None else real("min_logprob_std", min_std)
    if not 0 <= least < math.inf:
        raise ValueError(f"min_logprob_std: expected None or a finite number of at least 0, got {min_std}")
    return _Density(reduction, least)


def _check_density(density: _Density, table: Table, row: int | None, state: torch.dtype) -> None:
    if table.structure.variance == "none":
        raise ValueError(f"table: expected one that adds noise, {table.name!r} has no density")
    if density.min_std > torch.finfo(contract.compute_dtype(state)).max:
        raise ValueError(f"min_logprob_std: expected a number that float32 can hold, got {density.min_std}")
    if row is not None and not table.noisy[row] and not density.min_std:
        raise ValueError(
            f"min_logprob_std: expected a standard deviation above 0 at timestep {table.timesteps[row]}, where the "
            "step adds no noise and has no density (or leave this step out)"
        )


def _check_kernels(backend: str, device: torch.device, by_reference: bool) -> None:
    if backend == "triton":
        reason = native.triton_why_not(device)
    elif device.type == "cuda" and _UNAVAILABLE is None:
        reason = native.cuda_why_not(device)
    else:
        reason = None if _UNAVAILABLE is None else f"the library is not there: {_UNAVAILABLE}"
    if reason is None and device.type not in ("cpu", "cuda"):
        reason = f"there is no kernel for {device.type} tensors; use 'auto' or 'reference'"
    if reason is not None:
        raise RuntimeError(f"backend {backend!r}: {reason}")
    if by_reference:
        raise RuntimeError(
            f"backend {backend!r}: it has no forward mode, and no torch.func inside torch.compile; use 'auto' or "
            "'reference'"
        )


def _in_logical_order(*tensors: Tensor | None) -> bool:
    """Whether the kernel that makes torch's normals itself can take these: contiguous, no group of four in two samples.

    The first is x.
    """
    x = tensors[0]
    assert x is not None
    whole = x.shape[0] == 1 or (x.shape[0] > 0 and x.numel() // x.shape[0] % 4 == 0)
    return whole and all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def _check_out(
    out: Tensor,
    x: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    noise: Tensor | None,
    indices: tuple[Tensor | None, Tensor | None],
    needs_grad: bool,
    transformed: bool,
    name: str = "x",
) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    if needs_grad:
        raise ValueError("out: expected None where a gradient is needed; autograd needs the tensors of the step")
    if transformed:
        raise ValueError("out: expected None under torch.func, whose transforms follow new tensors only")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor that does not require grad: what it was computed from is overwritten")
    if out.dtype is not x.dtype:
        raise TypeError(f"out: expected {x.dtype} ({name}'s dtype), got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out: expected {name}'s shape {list(x.shape)}, got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out: expected a tensor on {x.device} ({name}'s device), got {out.device}")
    if torch.compiler.is_compiling():
        return  # memory is for the kernel to check
    if out.numel() and _overlaps_itself(out):
        raise ValueError(f"out: expected distinct elements, got strides {out.stride()} for {list(out.shape)}")
    inputs = {name: [x], "model_output": _halves(model_output, x), "uncond_output": _halves(uncond_output, x)}
    if noise is not None:
        inputs["noise"] = [noise]
    for key, parts in inputs.items():
        if any(_overlap_in_part(out, part) for part in parts):
            raise ValueError(f"out: expected memory of its own or exactly that of {key}, got a part of {key}'s")
    for key, index in zip(("seeds", "t"), indices, strict=True):
        if index is not None and out.numel() > 0 and out.data_ptr() < _end(index) and index.data_ptr() < _end(out):
            raise ValueError(f"out: expected memory apart from that of {key}, got a part of it")


def _halves(output: Tensor | None, x: Tensor) -> list[Tensor]:
    """A model output by what its elements belong to: an element of x, or the variance of one."""
    if output is None or output.shape == x.shape:
        return [] if output is None else [output]
    return [output[:, : x.shape[1]], output[:, x.shape[1] :]]


def _overlap_in_part(out: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape share memory otherwise than element by element.

    Exact for equal strides; tensors of different strides that reach into each other count as overlapping.
    """
    if out.numel() == 0 or out.data_ptr() >= _end(other) or other.data_ptr() >= _end(out):
        return False
    strides = [tuple(s for s, n in zip(u.stride(), u.shape, strict=True) if n > 1) for u in (out, other)]
    if other.dtype is not out.dtype or strides[0] != strides[1]:
        return True
    distance, rest = divmod(other.data_ptr() - out.data_ptr(), out.element_size())
    return rest != 0 or (distance != 0 and _reaches(distance, _dimensions(out)))


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have a step, in ascending order."""
    return sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def _reaches(distance: int, dimensions: list[tuple[int, int]]) -> bool:
    """Whether two elements of a tensor that does not overlap itself are this far apart."""
    if not dimensions:
        return distance == 0
    *inner, (stride, n) = dimensions
    steps = distance // stride
    return any(-n < k < n and _reaches(distance - k * stride, inner) for k in (steps, steps + 1))


def _end(tensor: Tensor) -> int:
    """The address behind the last element."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a dimension steps less than those inside it reach."""
    inside = 1
    for stride, n in _dimensions(tensor):
        if stride < inside:
            return True
        inside += stride * (n - 1)
    return False


def _reference_step(call: _Call, o: _Operands) -> tuple[Tensor, ...]:
    """What `_launch` gives, by operations that autograd and any transform of torch can follow."""
    chosen, valid = _rows_of(o.rows, call.row, o.t, o.t_to_row, o.x)
    structure, x, x_prev = call.structure, o.x, o.x_prev
    model_output = x if o.model_output is None else o.model_output
    options = _options_of(call, o, x)
    found: list[Tensor] = []
    if x_prev is None:
        z = _noise_of(chosen, structure, x, o)
        second: Tensor | None
        if call.target is not None:
            assert z is not None  # add_noise has seeds or noise
            x_prev, second = reference.add_noise(chosen, x, z, target=call.target, rounding=call.rounding)
        else:
            x_prev, second = reference.step(chosen, structure, x, model_output, z=z, **options)
        found.append(x_prev)
        if "second" in call.outputs:
            assert second is not None
            found.append(second)
    if "distance" in call.outputs:
        x_prev = x_prev.detach()
        found.append(reference.distance(chosen, structure, x_prev, x, model_output, min_std=call.min_std, **options))
    if valid is not None:
        found = [torch.where(valid, u, float("nan")) for u in found]
    found = [_like_layout(u, x) for u in found]
    if "distance" in call.outputs and not call.each:
        found[-1] = reference.sum_of_samples(found[-1])
    return tuple(found)


def _options_of(call: _Call, o: _Operands, like: Tensor) -> dict[str, Any]:
    """What every function of the reference is told of a call."""
    return {
        "uncond_output": o.uncond_output,
        "guidance_scale": None if o.scale is None else o.scale.expand(like.shape[0]),
        "rounding": call.rounding,
        "scalars": call.flags & SCALARS != 0,
        "clip_grad": call.clip_grad,
    }


def _launch_drawing(call: _Call, o: _Operands, draw: torch_stream.Draw, out: Tensor | None) -> tuple[Tensor, ...]:
    """A step whose kernel draws torch's own stream."""
    result = torch.empty_like(o.x) if out is None else out
    second = torch.empty_like(o.x) if "second" in call.outputs else None
    _step_torch_op(
        result, second, o.x, o.model_output, o.uncond_output, o.scale, o.rows, o.t, o.t_to_row, call.row, call.flags,
        *draw,
    )  # fmt: skip
    return (result,) if second is None else (result, second)


def _density_of(call: _Call, o: _Operands, table: Table, distance: Tensor, density: _Density) -> Tensor:
    """The log-density of a Gaussian from the squared distance to its mean, in standard deviations."""
    constant = table.log_normalizer(o.x.device, o.x.dtype, call.rounding == "host", density.min_std)
    if o.t is None:
        constant = constant.select(0, call.row)  # which compiled code takes of a constant, unlike [row]
    else:
        assert o.t_to_row is not None
        constant = constant[_index_of(o.t, o.t_to_row).clamp(min=0)]
    if call.each:
        constant = constant.to(distance.dtype)
        return distance * -0.5 - (constant.reshape(-1, *(1,) * (o.x.dim() - 1)) if constant.dim() else constant)
    n = math.prod(o.x.shape[1:])
    # not torch.sub(alpha=n), which may round once or twice
    total = distance.to(constant.dtype) * -0.5 - constant * n
    return (total / n if density.reduction == "mean" else total).to(distance.dtype)


def _learned_density(call: _Call, o: _Operands, density: _Density) -> Tensor:
    """The log-density of a Gaussian whose variance the network gives, element by element."""
    chosen, valid = _rows_of(o.rows, call.row, o.t, o.t_to_row, o.x)
    assert o.x_prev is not None and o.model_output is not None
    options = _options_of(call, o, o.x)
    each = reference.log_density(
        chosen, call.structure, o.x_prev, o.x, o.model_output, min_std=density.min_std, **options
    )
    if valid is not None:
        each = torch.where(valid, each, float("nan"))
    if density.reduction == "none":
        return each
    total = reference.sum_of_samples(each)
    return total / each[0].numel() if density.reduction == "mean" and each.shape[0] else total


def _normals_of(
    table: Table, row: int | None, t: Tensor | None, x: Tensor, seeds: Tensor | None, backend: str
) -> Tensor:
    """The normals that a step of a table would add, by its `Table.of_noise`, as a tensor."""
    nothing = torch.zeros_like(x, dtype=contract.compute_dtype(x.dtype), memory_format=torch.contiguous_format)
    result, _ = _step(
        table, nothing, t, nothing, row, None, None, seeds, None, None, None, "once", backend
    )  # fmt: skip
    return result


def _rows_of(
    rows: Tensor, row: int, t: Tensor | None, t_to_row: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The row of each sample, or one for all; and where a sample's t is in the chain, None if it is for certain."""
    if t is None:
        return rows[row], None
    assert t_to_row is not None
    index = _index_of(t, t_to_row).expand(like.shape[0])
    return rows[index.clamp(min=0)], (index >= 0).reshape(-1, *(1,) * (like.dim() - 1))


def _index_of(t: Tensor, t_to_row: Tensor) -> Tensor:
    """The row of each timestep, -1 for one that is not in the chain."""
    # not t_to_row.shape: it may be a constant of compiled code, whose shape the tracer does not look into
    inside = (t >= 0) & (t < t_to_row.numel())
    return torch.where(inside, t_to_row[torch.where(inside, t, 0)], -1)


def _noise_of(rows: Tensor, structure: Structure, x: Tensor, o: _Operands) -> Tensor | None:
    """The noise that was given, or that of the seeds."""
    if o.seeds is None:
        return o.noise
    words = rows.detach()[..., COLUMN["t"] :].to(torch.int64).expand(x.shape[0], 2)
    return contract.normal_reference(tuple(x.shape), o.seeds, words, contract.DOMAINS[structure.domain])


def _like_layout(tensor: Tensor, x: Tensor) -> Tensor:
    # noise in logical order would otherwise decide the layout of the sum
    like = torch.empty_like(x, device="meta")
    if tensor.stride() == like.stride() or torch._C._are_functorch_transforms_active():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)
