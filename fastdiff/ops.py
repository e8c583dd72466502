"""The fused operations: `step`, `step_with_x0`, `add_noise`.

Schemas and fakes stand here, kernels in csrc/ and triton_kernels.py, the definition in plain PyTorch in reference.py. A
public call makes three hops: validate (TypeError and ValueError, before anything is written), dispatch, launch.
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import native, reference, torch_stream
from . import noise as contract
from .noise import Generators
from .schedules import NoiseSchedule
from .tables import COLUMN, HOST_ROUNDING, SCALARS, SECOND_SHIFT, Structure, Table, add_noise_table

Backend = Literal["auto", "native", "triton", "reference"]
Rounding = Literal["once", "host"]

BACKENDS = ("auto", "native", "triton", "reference")
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
    "step_row(Tensor(a!) out, Tensor x, Tensor model_output, Tensor? noise, Tensor table, SymInt row, int flags) -> ()"
)
_library.define(
    "step_torch(Tensor(a!) out, Tensor(b!)? second, Tensor x, Tensor? model_output, Tensor? uncond_output, "
    "Tensor? guidance_scale, Tensor table, Tensor? t, Tensor? t_to_row, SymInt row, int flags, Tensor? state, "
    "int seed, int offset, int threads) -> ()"
)
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
for _name in (*_SCHEMAS, *(f"triton_{_name}" for _name in _SCHEMAS), "step_row", "step_torch"):
    # outputs are the caller's tensors: there is nothing to infer
    torch.library.register_fake(f"fastdiff::{_name}", lambda *args: None)
_UNAVAILABLE = native.load()
# looked up once: each attribute on the way costs 0.1 us
_step_row_op = torch.ops.fastdiff.step_row.default
_step_torch_op = torch.ops.fastdiff.step_torch.default


class _Kernels(NamedTuple):
    """A step and its backward, with the arguments of the operators of these names."""

    step: Callable[..., None]
    step_backward: Callable[..., None]


_KERNELS = {
    "native": _Kernels(torch.ops.fastdiff.step.default, torch.ops.fastdiff.step_backward.default),
    "triton": _Kernels(torch.ops.fastdiff.triton_step.default, torch.ops.fastdiff.triton_step_backward.default),
}


def step(
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
) -> Tensor:
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
            (plain PyTorch), or "auto": the first of these that has kernels for x's device and, where a gradient is
            needed, a gradient of that kind.

    Returns:
        x_{t-1}: x's shape, dtype and layout, or `out`. Differentiable in x, model_output, uncond_output and noise by a
        kernel too, which keeps no tensor of the step but those that its gradient depends on: x and the model outputs
        where x0 is clipped, the model output where it has a variance half. The reference serves the other gradients
        (of a schedule in training, of guidance_scale, forward mode, torch.func, torch.compile).

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything is written.
        RuntimeError: backend="native" or "triton" where it has no kernel, or not the gradient that is needed; a
            kernel that could not be launched.
    """
    # The common call goes straight to the kernel: at 3,072 elements a DDIM step itself takes half a microsecond, and
    # the checks of _step three. The kernel's own checks stand in for them: where it objects nothing has been written,
    # and _step finds the words.
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a Table, got {type(table).__name__}")
    if type(seeds) is int and type(x) is Tensor and x.dim() > 0 and not torch.compiler.is_compiling():
        seeds = _int_seeds(seeds, x.shape[0], x.device)
    known = row if row is not None else table.rows_of_t.get(t) if type(t) is int else None
    source = noise if seeds is None else seeds
    if (
        type(known) is int
        and (t is None or row is None)
        and backend == "auto"
        and generator is None
        and rounding == "once"
        and uncond_output is None
        and guidance_scale is None
        and type(x) is Tensor
        and type(model_output) is Tensor
        and (rows := table.on_cpu.get(x.dtype) if x.is_cpu else _rows_on_cuda(table, x)) is not None
        and (out is None or out is x or (type(out) is Tensor and not out.requires_grad))
        and (source is None if (structure := table.structure).variance == "none" else _is_source(source, seeds, noise))
        and not (torch.is_grad_enabled() and _needs_grad(x, model_output, noise))
        and forward_ad._current_level < 0
        and _UNAVAILABLE is None
    ):
        result = torch.empty_like(x) if out is None else out
        try:
            _step_row_op(result, x, model_output, source, rows, known, structure.flags)
        except RuntimeError:
            pass
        else:
            if out is not None:
                increment_version(out)
            return result
    return _step(
        table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, generator, out, rounding, backend,
        with_x0=False,
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
) -> tuple[Tensor, Tensor]:
    """`step` that also returns the predicted x0 (clipped where the table clips), in the same pass.

    Args:
        As `step`.

    Returns:
        (x_{t-1}, x0), both like x.

    Raises:
        As `step`; ValueError for a table without x0 (the forward process).
    """
    result, x0 = _step(
        table, model_output, t, x, row, uncond_output, guidance_scale, seeds, noise, generator, out, rounding, backend,
        with_x0=True,
    )  # fmt: skip
    assert x0 is not None
    return result, x0


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
        table, None, t, x0, None, None, None, seeds, noise, generator, out, rounding, backend, with_x0=False,
        target=target, draws=True,
    )  # fmt: skip
    return x_t if second is None else (x_t, second)


_seeds: dict[tuple[int, int, torch.device, int], Tensor] = {}  # of ints, by batch, device and stream


def _int_seeds(seed: int, batch: int, device: torch.device) -> Tensor:
    # kept: a chain hands the same int to every step, and the tensor takes as long as a small step
    key = seed, batch, device, native.stream_of(device)
    # a graph makes its own: those kept here may go before it does, and its own have their values in it alone
    capturing = native.capturing(device)
    found = None if capturing else _seeds.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = contract.seeds(seed, batch, device)
        if type(found) is Tensor and batch <= 4096 and not capturing:  # a tracer makes no values
            if len(_seeds) >= 64:
                del _seeds[next(iter(_seeds))]
            _seeds[key] = found
    return found


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
    with_x0: bool,
    target: str | None = None,
    draws: bool = False,
) -> tuple[Tensor, Tensor | None]:
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
        if not isinstance(row, SupportsIndex) or isinstance(row, bool | Tensor):
            raise TypeError(f"row: expected an int, got {type(row).__name__}")
        row = row.__index__()
        if not 0 <= row < len(table):
            raise ValueError(f"row: expected 0 to {len(table) - 1}, got {row}")
        if t is not None and t != table.timesteps[row]:
            raise ValueError(f"t: expected None or the timestep of row {row}, {table.timesteps[row]}, got {t}")
    elif isinstance(t, Tensor):
        t_rows = _check_t(t, shape[0], device)
    elif isinstance(t, SupportsIndex) and not isinstance(t, bool):
        row = table.row_of(t.__index__())
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
        keys = contract.seeds(seeds, shape[0], device)
    elif not draws:
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

    needs_grad = _needs_grad(x, model_output, noise, uncond_output, scale, table.trained)
    # a gradient that the kernels have
    plain = needs_grad and not (_beyond_autograd() or _needs_grad(scale, table.trained))
    chosen: str | None
    if backend == "auto":
        chosen = native.best(device)
        if chosen is None and not torch.compiler.is_compiling():
            native.warn_once(device)
        if (needs_grad and not plain) or x.dim() > _MAX_DIMS or _transformed(x, model_output, uncond_output, noise):
            chosen = None
    elif backend in _KERNELS:
        _check_kernels(backend, device, needs_grad and not plain)
        chosen = backend
    elif backend == "reference":
        chosen = None
    else:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")

    if out is not None:
        _check_out(out, x, model_output, uncond_output, noise, (keys, t_rows), needs_grad)
    rows = table.to(device, dtype, host_rounding=rounding == "host")
    scalars = table.scalars == "cpu" and device.type == "cuda"
    # drawn last, so that a refused call leaves the generator as it was
    draw: torch_stream.Draw | None = None
    if generator is not None:
        if row is not None and not table.noisy[row]:
            noise = torch.zeros_like(x)
        elif (
            chosen == "native"
            and not needs_grad
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
    if chosen is None:
        return _reference_step(
            table,
            rows,
            row,
            t_rows,
            model_output,
            x,
            uncond_output,
            scale,
            keys,
            noise,
            out,
            rounding,
            scalars,
            with_x0,
            target,
        )

    flags = structure.flags
    if scalars:
        flags |= SCALARS
    if rounding == "host":
        flags |= HOST_ROUNDING
    with_second = with_x0 or target is not None
    few = row is not None and scale is None and not with_second and model_output is not None and not needs_grad
    if few and chosen == "native" and draw is None:
        if device.type == "cuda" and not scalars and rounding == "once" and not torch.compiler.is_compiling():
            # the next such call finds its way without these checks
            table.on_cuda[device, dtype, native.stream_of(device)] = rows
        result = torch.empty_like(x) if out is None else out
        _step_row_op(result, x, model_output, keys if noise is None else noise, rows, row, flags)
        if out is not None:
            increment_version(out)
        return result, None
    if scale is not None:
        # a copy where it could be written to before it is read, by the step or before its backward
        shared = needs_grad or (out is not None and out.data_ptr() < _end(scale) and scale.data_ptr() < _end(out))
        scale = scale.to(rows.dtype, copy=shared)
    if with_second:
        flags |= _SECOND[target]
    kernels = _KERNELS[chosen]
    t_to_row = None if t_rows is None else table.row_map(device)

    def launch() -> tuple[Tensor, Tensor | None]:
        result = torch.empty_like(x) if out is None else out
        second = torch.empty_like(x) if with_second else None
        operands = result, second, x, model_output, uncond_output, scale
        if draw is None:
            kernels.step(*operands, noise, keys, rows, t_rows, t_to_row, row or 0, flags)
        else:
            _step_torch_op(*operands, rows, t_rows, t_to_row, row or 0, flags, *draw)
        return result, second

    if needs_grad:
        call = _Call(kernels, table, rows, row, scale, target, with_second, rounding, flags)
        return _Step.apply(call, launch, x, model_output, uncond_output, noise, keys, t_rows)
    result, second = launch()
    if out is not None:
        increment_version(out)
    return result, second


class _Call(NamedTuple):
    """A step but for its tensors."""

    kernels: _Kernels
    table: Table
    rows: Tensor  # of the table, as the kernels read them
    row: int | None
    scale: Tensor | None  # [1] or [B] in the dtype of rows, memory of its own
    target: str | None  # what the second output is; None: x0
    with_second: bool
    rounding: str
    flags: int


class _Step(torch.autograd.Function):
    """A step by a kernel, with the backward by its kernel; the reference's closed form where that is differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        launch: Callable[[], tuple[Tensor, Tensor | None]],
        x: Tensor,
        model_output: Tensor | None,
        uncond_output: Tensor | None,
        noise: Tensor | None,
        seeds: Tensor | None,
        t: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        structure = call.table.structure
        result, second = launch()
        if call.target == "noise" and not ctx.needs_input_grad[5]:
            ctx.mark_non_differentiable(second)
        ctx.set_materialize_grads(False)
        masked = reference.masks_clip(structure, True, call.with_second, call.target or "x0", "exact")
        learned = structure.learned
        kept = (
            x if masked else None,
            model_output if masked or learned else None,
            uncond_output if masked else None,
            noise if learned else None,
            seeds if learned else None,
            t,
        )
        # an inference tensor cannot be kept, and has no graph that a copy would leave
        ctx.save_for_backward(*(u.clone() if u is not None and u.is_inference() else u for u in kept))
        ctx.call = call
        # the form of the gradients that may be asked for, without memory
        ctx.like = [
            torch.empty_like(tensor, device="meta") if tensor is not None and needed else None
            for tensor, needed in zip((x, model_output, uncond_output, noise), ctx.needs_input_grad[2:6], strict=True)
        ]
        return result, second

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_second: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        nothing = (None,) * 8
        if grad is None and grad_second is None:
            return nothing
        given = grad if grad is not None else grad_second
        assert given is not None
        wanted = [like if needed else None for like, needed in zip(ctx.like, ctx.needs_input_grad[2:6], strict=True)]
        device = given.device
        if torch.is_grad_enabled() or _beyond_autograd() or _batched(grad, grad_second):
            gradients = _reference_backward(call, wanted, grad, grad_second, *ctx.saved_tensors)
        else:
            gradients = [
                None if u is None else torch.empty_strided(u.shape, u.stride(), dtype=u.dtype, device=device)
                for u in wanted
            ]
            uncond = gradients[2]
            if uncond is not None and uncond.shape != given.shape:
                uncond[:, given.shape[1] :].zero_()  # its variance half is not looked at
            x, model_output, uncond_output, noise, seeds, t = ctx.saved_tensors
            t_to_row = None if t is None else call.table.row_map(device)
            call.kernels.step_backward(
                *gradients,
                grad,
                grad_second,
                x,
                model_output,
                uncond_output,
                call.scale,
                noise,
                seeds,
                call.rows,
                t,
                t_to_row,
                call.row or 0,
                call.flags,
            )
        return None, None, *gradients, None, None


def _reference_backward(
    call: _Call,
    wanted: list[Tensor | None],
    grad: Tensor | None,
    grad_second: Tensor | None,
    x: Tensor | None,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    t: Tensor | None,
) -> list[Tensor | None]:
    """The gradients that are wanted, by operations that autograd (and any transform of torch) can follow."""
    like = grad if grad is not None else grad_second
    assert like is not None
    structure = call.table.structure
    chosen, valid = _rows_of(call.table, call.rows, call.row, t, like)
    z = noise if seeds is None else _noise_of(chosen, structure, like, seeds)
    found = reference.step_backward(
        chosen,
        structure,
        grad,
        grad_second,
        x,
        model_output,
        uncond_output=uncond_output,
        guidance_scale=None if call.scale is None else call.scale.expand(like.shape[0]),
        z=z,
        rounding=call.rounding,
        scalars=call.flags & SCALARS != 0,
        second=call.target or "x0",
    )
    gradients: list[Tensor | None] = []
    for gradient, want in zip(found[:4], wanted, strict=True):
        if gradient is None or want is None:
            gradients.append(None)
            continue
        if valid is not None:
            gradient = torch.where(valid, gradient, 0.0)
        if gradient.shape != want.shape:  # the variance half of uncond_output is not looked at
            gradient = torch.cat([gradient, torch.zeros_like(gradient)], 1)
        gradients.append(gradient.to(want.dtype))
    return gradients


def _rows_on_cuda(table: Table, x: Tensor) -> Tensor | None:
    device = x.device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return table.on_cuda.get((device, x.dtype, native.stream_of(device)))


def _is_source(source: int | Tensor | None, seeds: object, noise: object) -> TypeGuard[Tensor]:
    """Whether the noise is just what the kernel takes: a tensor, or int64 seeds."""
    if type(source) is not Tensor:
        return False
    return noise is None if source.dtype is torch.int64 else seeds is None


def _needs_grad(*tensors: Tensor | None) -> bool:
    # dual tensors do not require grad: without this test their tangent would be lost in silence
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _beyond_autograd() -> bool:
    """Whether more than reverse-mode autograd of eager code is under way: forward mode, torch.func, torch.compile."""
    return (
        torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.vmap (or another transform) holds a tensor: the kernels have no rule for it yet."""
    if torch.compiler.is_compiling():
        return False
    return any(tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _batched(*tensors: Tensor | None) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) holds a tensor, by a vmap that is not torch.func's."""
    return any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


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
    if scale.shape not in ((), (1,), (batch,)):
        raise ValueError(f"guidance_scale: expected a number or shape [{batch}], got {list(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"guidance_scale: expected a tensor on {device} (x's device), got {scale.device}")
    return scale.reshape(-1)


def _check_kernels(backend: str, device: torch.device, other_grad: bool) -> None:
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
    if other_grad:
        raise RuntimeError(
            f"backend {backend!r}: it has no gradient of a table or guidance_scale, in forward mode, under torch.func "
            "or torch.compile; use 'auto' or 'reference', or torch.no_grad()"
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
) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    if needs_grad:
        raise ValueError("out: expected None where a gradient is needed; autograd needs the tensors of the step")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor that does not require grad: what it was computed from is overwritten")
    if out.dtype is not x.dtype:
        raise TypeError(f"out: expected {x.dtype} (x's dtype), got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out: expected x's shape {list(x.shape)}, got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"out: expected a tensor on {x.device} (x's device), got {out.device}")
    if _overlaps_itself(out):
        raise ValueError(f"out: expected distinct elements, got strides {out.stride()} for {list(out.shape)}")
    inputs = {"x": [x], "model_output": _halves(model_output, x), "uncond_output": _halves(uncond_output, x)}
    if noise is not None:
        inputs["noise"] = [noise]
    for name, parts in inputs.items():
        if any(_overlap_in_part(out, part) for part in parts):
            raise ValueError(f"out: expected memory of its own or exactly that of {name}, got a part of {name}'s")
    for name, index in zip(("seeds", "t"), indices, strict=True):
        if index is not None and out.numel() > 0 and out.data_ptr() < _end(index) and index.data_ptr() < _end(out):
            raise ValueError(f"out: expected memory apart from that of {name}, got a part of it")


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


def _reference_step(
    table: Table,
    rows: Tensor,
    row: int | None,
    t: Tensor | None,
    model_output: Tensor | None,
    x: Tensor,
    uncond_output: Tensor | None,
    scale: Tensor | None,
    seeds: Tensor | None,
    z: Tensor | None,
    out: Tensor | None,
    rounding: str,
    scalars: bool,
    with_x0: bool,
    target: str | None,
) -> tuple[Tensor, Tensor | None]:
    chosen, valid = _rows_of(table, rows, row, t, x)
    structure = table.structure
    if seeds is not None:
        z = _noise_of(chosen, structure, x, seeds)
    if target is not None:
        assert z is not None  # add_noise has seeds or noise
        result, second = reference.add_noise(chosen, x, z, target=target, rounding=rounding)
    else:
        result, second = reference.step(
            chosen,
            structure,
            x,
            x if model_output is None else model_output,
            uncond_output=uncond_output,
            guidance_scale=None if scale is None else scale.expand(x.shape[0]),
            z=z,
            rounding=rounding,
            scalars=scalars,
        )
    if not with_x0 and target is None:
        second = None
    if valid is not None:
        result = torch.where(valid, result, float("nan"))
        second = second if second is None else torch.where(valid, second, float("nan"))
    result = _like_layout(result, x)
    second = second if second is None else _like_layout(second, x)
    return (result if out is None else out.copy_(result)), second


def _rows_of(table: Table, rows: Tensor, row: int | None, t: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The row of each sample, or one for all; and where a sample's t is in the chain, None if it is for certain."""
    if t is None:
        return rows[row], None
    row_map = table.row_map(x.device)
    inside = (t >= 0) & (t < row_map.shape[0])
    index = torch.where(inside, row_map[torch.where(inside, t, 0)], -1).expand(x.shape[0])
    return rows[index.clamp(min=0)], (index >= 0).reshape(-1, *(1,) * (x.dim() - 1))


def _noise_of(rows: Tensor, structure: Structure, x: Tensor, seeds: Tensor) -> Tensor:
    words = rows.detach()[..., COLUMN["t"] :].to(torch.int64).expand(x.shape[0], 2)
    return contract.normal_reference(tuple(x.shape), seeds, words, contract.DOMAINS[structure.domain])


def _like_layout(tensor: Tensor, x: Tensor) -> Tensor:
    # noise in logical order would otherwise decide the layout of the sum
    like = torch.empty_like(x, device="meta")
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)
