"""The step in plain PyTorch: the definition that every backend is held to, and the fallback for any device.

Multiplies, additions and divisions are separate operations in the order written, so the result is the same in
every bit as that of the compiled kernels (and of the eager code it replaces).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import compute_dtype, exp_fixed
from .tables import COLUMN, Structure

_FORWARD = Structure(x0="none", a0=False, ax=True, variance="fixed")
_MOST_FLOAT32_RANKS = 2**24  # float32 holds every rank up to here, and torch.quantile takes no more elements


def step(
    rows: Tensor,
    structure: Structure,
    x: Tensor,
    model_output: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    z: Tensor | None = None,
    rounding: str = "once",
    scalars: bool = False,
    clip_grad: str = "exact",
    torch_math: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step of a sampler: x_t -> (x_{t-1}, predicted x0).

    rows: [18] for all samples, or [B, 18], one row per sample; float32, or float64 for a float64 state.
    x: state [B, ...].  model_output: as x, or [B, 2C, ...] where the structure learns the variance.
    uncond_output, guidance_scale: m = uncond + scale*(model_output - uncond), scale a number or [B] (Ho &
    Salimans 2022 with scale = 1 + w); a learned variance comes from model_output.
    z: noise as x, needed exactly when the structure has a variance.
    rounding: for half types, "once" computes in float32 and rounds at the end; "host" rounds every
    intermediate, and z and the multipliers before, to x's dtype and divides by float32 divisors, as eager
    code in half does.
    scalars: the coefficients are those that PyTorch takes from scalars for a CUDA tensor (`tables.Table.scalars`):
    reciprocals for divisors, and multipliers as they are.
    clip_grad: what the clip lets through in the backward: "exact", nothing where it cut (and everything at its bounds
    and for NaN); "straight_through", everything.
    torch_math: take torch's own exp and sqrt for a learned variance. The step is then that of eager code on
    this machine; by default they are those of the kernels, which are the same on every machine.

    Returns x' and x0 in x's dtype; x0 is None where the structure has none.  Differentiable in every tensor.
    ValueError for shapes that do not fit, or arguments that the structure does not take.
    """
    _check(rows, structure, x, model_output, uncond_output, guidance_scale, z, rounding)
    row = _Row(rows, x, rounding, scalars)
    r, factor = row.round, row.factor

    m, variance = _model(row, structure, x, model_output, uncond_output, guidance_scale)
    terms = _mean(row, structure, row.wide(x), m, clip_grad)
    total, x0 = terms.mean, terms.x0
    if structure.variance != "none" and z is not None:
        s = factor("s")
        if variance is not None:
            s = r(s * _std(structure, variance, row, torch_math))
        total = row.add(total, r(s * row.wide(z)))
    if x0 is not None:
        # a copy where it would be the model's own tensor
        x0 = x0.to(x.dtype, copy=structure.x0 == "output" and not structure.clip)
    return total.to(x.dtype), x0


def add_noise(
    rows: Tensor, x0: Tensor, z: Tensor, *, target: str | None = None, rounding: str = "once"
) -> tuple[Tensor, Tensor | None]:
    """The forward process: x_t = ax*x0 + s*z, and the target a model is trained on with it.

    rows: [18] or [B, 18] of an `add_noise_table`, dtype as for `step`.  x0, z: [B, ...], one shape.
    target: None, "noise" (z itself) or "v" (ax*z - s*x0; Salimans and Ho 2022, arXiv:2202.00512).
    rounding: as for `step`.

    Returns x_t and the target (None without one) in x0's dtype.  Differentiable in every tensor.
    ValueError for shapes that do not fit, or an unknown target.
    """
    if target not in (None, "noise", "v"):
        raise ValueError(f"target: expected None, 'noise' or 'v', got {target!r}")
    _check(rows, _FORWARD, x0, x0, None, None, z, rounding)
    row = _Row(rows, x0, rounding, False)
    r, factor = row.round, row.factor
    # widened once, so that the gradients of both results are added before they are narrowed
    state, noise = row.wide(x0), row.wide(z)
    x_t = row.add(r(factor("ax") * state), r(factor("s") * noise)).to(x0.dtype)
    if target is None:
        return x_t, None
    if target == "noise":
        return x_t, z.to(x0.dtype, copy=True)  # never the caller's own tensor
    return x_t, r(r(factor("ax") * noise) - r(factor("s") * state)).to(x0.dtype)


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """The predicted x0 within a bound of its own for each sample, scaled to [-1, 1] (Saharia et al. 2022, section 2.3).

    x0: [B, ...], of at least one element.  ratio: of the elements, in [0, 1].  max_value: above 0.

    Returns clamp(x0, -s, s) / s in x0's dtype, where s is the quantile of |x0| over a sample, of linear interpolation,
    limited to [1, max_value] (to max_value where that is below 1).  It is computed in float32, or float64 for float64,
    and the quantile is that of torch.quantile to the bit; of more than 2^24 elements, which torch.quantile refuses,
    the rank is float64.  Differentiable in x0, through the quantile too.
    """
    samples = x0.to(compute_dtype(x0.dtype)).reshape(x0.shape[0], math.prod(x0.shape[1:]))
    last = samples.shape[1] - 1
    ordered = samples.abs().sort(-1).values
    rank = torch.full((), ratio, dtype=samples.dtype if last < _MOST_FLOAT32_RANKS else torch.float64, device=x0.device)
    # NaN sorts last, and is what a sample gives that has one
    rank = torch.where(ordered[:, -1:].isnan(), float(last), rank * last)
    below = rank.to(torch.int64)
    weight = (rank - below).to(samples.dtype)
    s = torch.lerp(ordered.gather(1, below), ordered.gather(1, rank.ceil().to(torch.int64)), weight)
    s = s.clamp(1.0, max_value)
    return (torch.clamp(samples, -s, s) / s).reshape(x0.shape).to(x0.dtype)


def learned_std(
    rows: Tensor,
    structure: Structure,
    x: Tensor,
    model_output: Tensor,
    *,
    rounding: str = "once",
    torch_math: bool = False,
) -> Tensor:
    """The standard deviation that the model has learned, [B, C, ...] in the type computed in; 1 stands for s.

    Arguments as for `step`; the structure has a learned variance (ValueError), model_output 2C channels.
    Differentiable.
    """
    if not structure.learned:
        raise ValueError(f"structure: expected a learned variance, got {structure.variance!r}")
    row = _Row(rows, x, rounding, False)
    return _std(structure, row.wide(model_output[:, x.shape[1] :]), row, torch_math)


def distance(
    rows: Tensor,
    structure: Structure,
    x_prev: Tensor,
    x: Tensor,
    model_output: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    rounding: str = "once",
    scalars: bool = False,
    clip_grad: str = "exact",
    min_std: float = 0.0,
) -> Tensor:
    """How far x' is from the mean of its step, in standard deviations, squared: what a log-density knows of x'.

    The other arguments are those of `step`.
    x_prev: x' as a step returned it, like x.
    min_std: what the standard deviation is at least taken to be (as DPPO's min_logprob_denoising_std; Ren et al. 2024).

    Returns ((x' - mean) / std)^2 of each element, float32, or float64 for a float64 state; NaN where std is 0. Its sum
    over a sample is that of `tree_sum`.  Differentiable in every tensor.
    ValueError for shapes that do not fit, or a structure without a variance or with a learned one.
    """
    if structure.variance != "fixed":
        raise ValueError(f"structure: expected variance='fixed', got {structure.variance!r}")
    scaled, _ = _standardized(
        rows, structure, x_prev, x, model_output, uncond_output, guidance_scale, rounding, scalars, clip_grad, min_std
    )
    return scaled * scaled


def log_density(
    rows: Tensor,
    structure: Structure,
    x_prev: Tensor,
    x: Tensor,
    model_output: Tensor,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    rounding: str = "once",
    scalars: bool = False,
    clip_grad: str = "exact",
    min_std: float = 0.0,
) -> Tensor:
    """The log-density of x' under its step, of each element, for a fixed or a learned variance.

    Arguments and errors as for `distance`; the result is like its.
    """
    scaled, std = _standardized(
        rows, structure, x_prev, x, model_output, uncond_output, guidance_scale, rounding, scalars, clip_grad, min_std
    )
    return -0.5 * (scaled * scaled) - (torch.log(std) + 0.5 * math.log(2 * math.pi))


def _standardized(
    rows: Tensor,
    structure: Structure,
    x_prev: Tensor,
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
    rounding: str,
    scalars: bool,
    clip_grad: str,
    min_std: float,
) -> tuple[Tensor, Tensor]:
    """(x' - mean) / std, and std."""
    _check(rows, structure, x, model_output, uncond_output, guidance_scale, x_prev, rounding)
    row = _Row(rows, x, rounding, scalars)
    m, variance = _model(row, structure, x, model_output, uncond_output, guidance_scale)
    mean = _mean(row, structure, row.wide(x), m, clip_grad).mean
    std = row.factor("s")
    if variance is not None:
        std = row.round(std * _std(structure, variance, row, False))
    std = _divisor(std, min_std)
    return (row.wide(x_prev) - mean) / std, std


def tree_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, by a balanced binary tree: neighbours are added until one is left.

    Aligned blocks of a power of two can be summed apart and combined by the same rule, which makes the bits independent
    of how the work is cut.  values: [..., n], which zeros fill up to a power of two; an empty sum is 0.
    """
    n = values.shape[-1]
    values = torch.nn.functional.pad(values, (0, (1 << max(n - 1, 0).bit_length()) - n))
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def sum_of_samples(values: Tensor) -> Tensor:
    """The `tree_sum` of each sample of [B, ...], [B]; B may be 0."""
    return tree_sum(values.reshape(values.shape[0], math.prod(values.shape[1:])))


class Gradients(NamedTuple):
    """What `step_backward` gives, in the type computed in; None where the step has no such tensor."""

    x: Tensor
    model_output: Tensor
    uncond_output: Tensor | None
    z: Tensor | None
    sums: Tensor | None = None


def step_backward(
    rows: Tensor,
    structure: Structure,
    grad: Tensor | None,
    grad_second: Tensor | None,
    x: Tensor | None = None,
    model_output: Tensor | None = None,
    *,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    z: Tensor | None = None,
    rounding: str = "once",
    scalars: bool = False,
    second: str = "x0",
    clip_grad: str = "exact",
    x_prev: Tensor | None = None,
    grad_distance: Tensor | None = None,
    min_std: float = 0.0,
    with_sums: bool = False,
) -> Gradients:
    """The gradients of a step from those of its outputs, in closed form: the definition of the backward kernels.

    rows, structure, guidance_scale, rounding, scalars: as of the step. No gradient is rounded in between; "host" only
    says what the coefficients, x0 and the standard deviation were in the step.
    grad: the gradient of x', [B, ...] in x's dtype.  grad_second: that of the second output, like it.
    x_prev, grad_distance, min_std: x' as it was returned, and the gradient of its `distance` from the mean, [B, ...]
    for that of each element or [B] for the sum of a sample; x' itself counts as a constant there.
    Of the three gradients any may be None: its terms are left out.
    second: what the second output was: "x0", or the target of `add_noise`, "noise" or "v".
    clip_grad: what the clip lets through: "exact", nothing where it cut and everything at its bounds and for NaN, as
    `step` differentiated; "straight_through", everything.
    x, model_output, uncond_output: those of the step, needed where x0 was clipped and a gradient reaches it
    (`masks_clip`), with grad_distance and with_sums; uncond_output with guidance.  model_output and z: needed with
    `grad` and a learned variance, z with_sums too.
    with_sums: also give the gradients of the coefficients, summed over the elements of each sample.

    Returns the gradients in float32 (float64 for a float64 state), to be rounded to the dtype of their tensor: x's and
    z's like grad (z's is None without a variance); that of model_output with 2C channels for a learned variance; that
    of uncond_output without its variance half, whose gradient is 0, and None without guidance. Where nothing depends
    on a tensor its gradient is zeros.  sums: [B, columns of a row + 1], the last being that of guidance_scale, each the
    `tree_sum` of a sample.  The same bits as the kernels but for the sign of zeros.  Differentiable in every tensor.
    ValueError for shapes that do not fit, tensors that are missing, or an unknown option.
    """
    like = _check_backward(
        rows,
        structure,
        grad,
        grad_second,
        x,
        model_output,
        uncond_output,
        guidance_scale,
        z,
        rounding,
        second,
        clip_grad,
        x_prev,
        grad_distance,
        with_sums,
    )
    row = _Row(rows, like, rounding, scalars)
    factor, divide = row.factor, row.divide
    g = None if grad is None else grad.to(row.dtype)
    h = None if grad_second is None else grad_second.to(row.dtype)
    has_grad = grad is not None or grad_distance is not None
    masked = masks_clip(structure, has_grad, grad_second is not None, second, clip_grad)
    state: Tensor | None = None
    m: Tensor | None = None
    mean, x0, raw_x0, numerator, e, raw_e = (None,) * 6
    noise = None if z is None else row.wide(z)
    if masked or with_sums or grad_distance is not None:
        assert x is not None  # _check_backward
        state = row.wide(x)
        m = state  # a structure without x0 and eps never looks at it
        if model_output is not None:
            m, _ = _model(row, structure, x, model_output, uncond_output, guidance_scale)
        mean, x0, raw_x0, numerator, e, raw_e = _mean(row, structure, state, m, clip_grad)
    of: dict[str, Tensor] = {}  # gradients of the coefficients, element by element

    def record(name: str, left: Tensor | None, right: Tensor | None, sign: int = 1) -> None:
        if with_sums:
            assert left is not None and right is not None
            value = left * right if sign > 0 else -(left * right)
            of[name] = of[name] + value if name in of else value

    d0: Tensor | None = None  # of x0; then of x, m, the variance half and z
    dx: Tensor | None = None
    dm: Tensor | None = None
    dv: Tensor | None = None
    dz: Tensor | None = None

    gm = g  # of the mean
    if grad_distance is not None:
        assert mean is not None and x_prev is not None
        std = _divisor(factor("s"), min_std)
        scaled = (row.wide(x_prev) - mean) / std
        weight = -2.0 * row.per_sample(grad_distance.to(row.dtype))
        gm = _sum(g, (weight * scaled) / std)
    if gm is not None:
        if structure.a0:
            d0 = factor("a0") * gm
            record("a0", gm, x0)
        if structure.ax:
            dx = factor("ax") * gm
            record("ax", gm, state)
    if g is not None:
        if structure.learned:
            assert model_output is not None and noise is not None  # _check_backward
            v = row.wide(model_output[:, like.shape[1] :])
            std = _std(structure, v, row, False)
            dz = row.round(factor("s") * std) * g
            dstd = factor("s") * (g * noise)
            dv = _learned_backward(structure, row, std, dstd)
            record("s", g, std * noise)
            if structure.variance == "learned_range":
                fraction = row.round(row.round(v + 1) * 0.5)
                dlog = (dstd * std) * 0.5
                record("max_log", dlog, fraction)
                record("min_log", dlog, 1 - fraction)
        elif structure.variance == "fixed":
            dz = factor("s") * g
            record("s", g, noise)
    if h is not None:
        if second == "x0":
            d0 = _sum(d0, h)
        elif second == "noise":
            dz = _sum(dz, h)
        else:
            dz = _sum(dz, factor("ax") * h)
            dx = _sum(dx, -(factor("s") * h))
            record("ax", h, noise)
            record("s", h, state, -1)
    if grad_distance is not None:
        above = ~(factor("s") < min_std)
        if with_sums:
            last = torch.where(above, (weight * (scaled * scaled)) / std, 0.0)
            of["s"] = of["s"] + last if "s" in of else last

    if gm is not None and structure.ae:
        de = factor("ae") * gm
        record("ae", gm, e)
        if structure.eps_divide:
            whole = de
            de = divide(whole, "gd")
            if scalars:
                record("gd", whole, raw_e)
            else:
                record("gd", de, e, -1)
        if structure.eps == "rederived":
            dx = _sum(dx, factor("gx") * de)
            d0 = _sum(d0, -(factor("g0") * de))
            record("gx", de, state)
            record("g0", de, x0, -1)
        elif structure.eps == "linear":
            dx = _sum(dx, factor("ex") * de)
            dm = _sum(dm, factor("em") * de)
            record("ex", de, state)
            record("em", de, m)
        else:
            dm = _sum(dm, de)

    if d0 is not None:
        if masked:
            assert raw_x0 is not None  # a Structure that clips predicts x0
            below, above = raw_x0 < row.bound("lo"), raw_x0 > row.bound("hi")
            if with_sums:
                of["lo"], of["hi"] = torch.where(below, d0, 0.0), torch.where(above, d0, 0.0)
            d0 = torch.where(below | above, 0.0, d0)
        if structure.x0_divide:
            undivided = d0
            d0 = divide(undivided, "pd")
            if scalars:
                record("pd", undivided, numerator)
            else:
                record("pd", d0, raw_x0, -1)
        if structure.x0 == "linear":
            dx = _sum(dx, factor("px") * d0)
            dm = _sum(dm, factor("pm") * d0)
            record("px", d0, state)
            record("pm", d0, m)
        else:
            dm = _sum(dm, d0)

    def given(total: Tensor | None) -> Tensor:
        return torch.zeros_like(like, dtype=row.dtype) if total is None else total

    dm = given(dm)
    duncond: Tensor | None = None
    if guidance_scale is not None:
        dcond = row.scale(guidance_scale) * dm
        if with_sums:
            assert model_output is not None and uncond_output is not None
            channels = like.shape[1:2]
            cond, uncond = (u[:, : channels[0]] if channels else u for u in (model_output, uncond_output))
            apart = row.round(row.wide(cond) - row.wide(uncond))
            record("scale", dm, apart)
        dm, duncond = dcond, dm - dcond
    if structure.learned:
        dm = torch.cat([dm, given(dv)], 1)
    sums: Tensor | None = None
    if with_sums:
        nothing = like.new_zeros(like.shape[0], dtype=row.dtype)
        totals = {name: sum_of_samples(value.expand(like.shape)) for name, value in of.items()}
        sums = torch.stack([totals.get(name, nothing) for name in (*COLUMN, "scale")], dim=1)
    return Gradients(given(dx), dm, duncond, None if structure.variance == "none" else given(dz), sums)


def masks_clip(structure: Structure, has_grad: bool, has_second: bool, second: str, clip_grad: str) -> bool:
    """Whether a backward needs x0, to know where the clip cut: where a gradient reaches it from either output."""
    through_step = has_grad and (structure.a0 or structure.eps == "rederived")
    return structure.clip and clip_grad == "exact" and (through_step or (has_second and second == "x0"))


class _Row:
    """The coefficients of a step over x, and the precision that its arithmetic keeps."""

    def __init__(self, rows: Tensor, x: Tensor, rounding: str, scalars: bool) -> None:
        self.rows = rows
        self.scalars = scalars
        self.dtype = compute_dtype(x.dtype)
        self.narrow = x.dtype if rounding == "host" and x.dtype != self.dtype else None
        self.ones = (1,) * (x.dim() - 1)

    def round(self, value: Tensor) -> Tensor:
        """An intermediate as the next operation sees it."""
        return value if self.narrow is None else value.to(self.narrow).to(self.dtype)

    def wide(self, value: Tensor) -> Tensor:
        return self.round(value.to(self.dtype))

    def per_sample(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *self.ones) if value.dim() == 1 else value

    def column(self, name: str) -> Tensor:
        return self.per_sample(self.rows[..., COLUMN[name]].to(self.dtype))

    def factor(self, name: str) -> Tensor:
        return self.column(name) if self.scalars else self.bound(name)

    def bound(self, name: str) -> Tensor:
        return self.round(self.column(name))

    def divide(self, value: Tensor, name: str) -> Tensor:
        return value * self.column(name) if self.scalars else value / self.column(name)

    def add(self, total: Tensor | None, term: Tensor) -> Tensor:
        return term if total is None else self.round(total + term)

    def scale(self, value: float | Tensor) -> Tensor:
        # a number that multiplies a half tensor is not rounded to half, unlike a coefficient, which is a tensor
        return self.per_sample(torch.as_tensor(value, device=self.rows.device).to(self.dtype))


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _model(
    row: _Row,
    structure: Structure,
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """m, after guidance, and the variance half."""
    cond, variance = model_output, None
    if structure.learned:
        cond, variance = model_output[:, : x.shape[1]], row.wide(model_output[:, x.shape[1] :])
    m = row.wide(cond)
    if uncond_output is not None and guidance_scale is not None:
        base = row.wide(uncond_output[:, : x.shape[1]] if structure.learned else uncond_output)
        m = row.round(base + row.round(row.scale(guidance_scale) * row.round(m - base)))
    return m, variance


class _Mean(NamedTuple):
    """x' without its noise, and what it is made of; None where the structure has no such thing."""

    mean: Tensor
    x0: Tensor | None
    raw_x0: Tensor | None  # before the clip
    numerator: Tensor | None  # of raw_x0
    e: Tensor | None
    raw_e: Tensor | None  # before the division


def _mean(row: _Row, structure: Structure, state: Tensor, m: Tensor, clip_grad: str) -> _Mean:
    r, factor, divide = row.round, row.factor, row.divide
    x0: Tensor | None = None
    numerator: Tensor | None = None
    if structure.x0 == "output":
        x0 = m
    elif structure.x0 == "linear":
        x0 = numerator = r(r(factor("px") * state) + r(factor("pm") * m))
        if structure.x0_divide:
            x0 = r(divide(numerator, "pd"))
    raw_x0 = x0
    if structure.clip and raw_x0 is not None:
        # torch.clamp in comparisons: NaN passes, and the gradient at a bound is 1 in every version of torch
        lo, hi = row.bound("lo"), row.bound("hi")
        x0 = torch.where(raw_x0 < lo, lo, torch.where(raw_x0 > hi, hi, raw_x0))
        if clip_grad == "straight_through":
            # plus nothing, which has the gradient of what was cut
            x0 = x0.detach() + torch.where(torch.isfinite(raw_x0), raw_x0 - raw_x0.detach(), 0.0)

    total: Tensor | None = None
    if structure.a0 and x0 is not None:
        total = r(factor("a0") * x0)
    if structure.ax:
        total = row.add(total, r(factor("ax") * state))
    e: Tensor | None = None
    raw_e: Tensor | None = None
    if structure.ae:
        e = raw_e = m
        if structure.eps == "rederived" and x0 is not None:
            e = raw_e = r(r(factor("gx") * state) - r(factor("g0") * x0))
        elif structure.eps == "linear":
            e = raw_e = r(r(factor("ex") * state) + r(factor("em") * m))
        if structure.eps_divide:
            e = r(divide(raw_e, "gd"))
        total = row.add(total, r(factor("ae") * e))
    assert total is not None  # a Structure has at least one term
    return _Mean(total, x0, raw_x0, numerator, e, raw_e)


def _divisor(std: Tensor, min_std: float) -> Tensor:
    """The standard deviation of a density; NaN for 0, which has none."""
    std = torch.where(std < min_std, min_std, std)
    return torch.where(std == 0, float("nan"), std)


def _learned_backward(structure: Structure, row: _Row, std: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the variance half from that of the standard deviation."""
    if structure.variance == "learned_plain":
        return (grad * 0.5) / std
    dv = (grad * std) * 0.5
    if structure.variance == "learned_range":
        dv = dv * (0.5 * (row.factor("max_log") - row.factor("min_log")))
    return dv


def _std(structure: Structure, v: Tensor, row: _Row, torch_math: bool) -> Tensor:
    """Standard deviation per element from the variance half v of the model output."""
    r, factor = row.round, row.factor
    # compiled code takes no function that has a forward mode
    torch_math = torch_math or (torch.compiler.is_compiling() and torch.is_grad_enabled())
    if structure.variance == "learned_plain":
        return r(torch.sqrt(v) if torch_math else _Sqrt.apply(v))
    log = v
    if structure.variance == "learned_range":
        fraction = r(r(v + 1) * 0.5)
        log = r(r(fraction * factor("max_log")) + r(r(1 - fraction) * factor("min_log")))
    log = r(0.5 * log)
    return r(torch.exp(log) if torch_math else _Exp.apply(log))


class _Elementwise(torch.autograd.Function):
    """A function of one tensor, element by element, with torch's derivative rules around our own bits."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None], v: Tensor) -> tuple[Tensor, int | None]:
        return cls.apply(v), in_dims[0]


class _Exp(_Elementwise):
    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return exp_fixed(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]

    jvp = backward


class _Sqrt(_Elementwise):
    @staticmethod
    def forward(v: Tensor) -> Tensor:
        """Correctly rounded, which torch.sqrt on a CPU is not."""
        if v.dtype == torch.float32:
            return torch.sqrt(v.double()).float()
        y = torch.sqrt(v)
        # one Newton step with the residual v - y*y taken exactly (Dekker 1971)
        split = y * (2.0**27 + 1)
        high = split - (split - y)
        low = y - high
        square = y * y
        residual = (v - square) - (((high * high - square) + 2 * high * low) + low * low)
        better = y + residual / (2 * y)
        return torch.where(torch.isfinite(better), better, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5 / ctx.saved_tensors[0]

    jvp = backward


def _check(
    rows: Tensor,
    structure: Structure,
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
    z: Tensor | None,
    rounding: str,
) -> None:
    _check_rows(rows, x, rounding)
    _check_outputs(structure, x, model_output, uncond_output, guidance_scale)
    if (uncond_output is None) != (guidance_scale is None):
        raise ValueError("uncond_output and guidance_scale: expected both or neither")
    if (z is None) != (structure.variance == "none"):
        needed = "no noise" if structure.variance == "none" else "noise of x's shape"
        raise ValueError(f"z: expected {needed} for variance={structure.variance!r}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z: expected shape {list(x.shape)}, got {list(z.shape)}")


def _check_rows(rows: Tensor, x: Tensor, rounding: str) -> None:
    if rounding not in ("once", "host"):
        raise ValueError(f"rounding: expected 'once' or 'host', got {rounding!r}")
    if rows.dim() not in (1, 2) or rows.shape[-1] != len(COLUMN):
        raise ValueError(f"rows: expected shape [{len(COLUMN)}], or one per sample, got {list(rows.shape)}")
    if x.dim() < 1 or (rows.dim() == 2 and rows.shape[0] != x.shape[0]):
        raise ValueError(f"rows: expected one per sample of x {list(x.shape)}, got {list(rows.shape)}")


def _check_outputs(
    structure: Structure,
    x: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
) -> None:
    expected = list(x.shape)
    if structure.learned:
        if x.dim() < 2:
            raise ValueError(f"x: expected [batch, channels, ...] (learned variance), got {list(x.shape)}")
        expected[1] *= 2
    if model_output is not None and list(model_output.shape) != expected:
        raise ValueError(f"model_output: expected shape {expected}, got {list(model_output.shape)}")
    if uncond_output is not None and list(uncond_output.shape) not in (expected, list(x.shape)):
        raise ValueError(f"uncond_output: expected shape {expected}, got {list(uncond_output.shape)}")
    if isinstance(guidance_scale, Tensor) and list(guidance_scale.shape) not in ([], [x.shape[0]]):
        got = list(guidance_scale.shape)
        raise ValueError(f"guidance_scale: expected a number or shape [{x.shape[0]}], got {got}")


def _check_backward(
    rows: Tensor,
    structure: Structure,
    grad: Tensor | None,
    grad_second: Tensor | None,
    x: Tensor | None,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: float | Tensor | None,
    z: Tensor | None,
    rounding: str,
    second: str,
    clip_grad: str,
    x_prev: Tensor | None,
    grad_distance: Tensor | None,
    with_sums: bool,
) -> Tensor:
    """Returns a tensor like x."""
    if second not in ("x0", "noise", "v"):
        raise ValueError(f"second: expected 'x0', 'noise' or 'v', got {second!r}")
    if clip_grad not in ("exact", "straight_through"):
        raise ValueError(f"clip_grad: expected 'exact' or 'straight_through', got {clip_grad!r}")
    if (x_prev is None) != (grad_distance is None):
        raise ValueError("x_prev and grad_distance: expected both or neither")
    like = next((u for u in (grad, grad_second, x_prev) if u is not None), None)
    if like is None:
        raise ValueError("grad, grad_second and grad_distance: expected at least one of them")
    _check_rows(rows, like, rounding)
    if grad_distance is not None:
        if structure.variance != "fixed":
            raise ValueError(f"grad_distance: expected None with variance={structure.variance!r}, got a tensor")
        if grad_distance.shape not in (like.shape, like.shape[:1]):
            raise ValueError(
                f"grad_distance: expected shape {list(like.shape)} or its first dimension, got "
                f"{list(grad_distance.shape)}"
            )
    if grad_second is not None:
        possible = structure.x0 != "none" if second == "x0" else structure.variance == "fixed"
        if not possible:
            raise ValueError(f"grad_second: expected None, the step has no {second} to give, got a tensor")
    _check_outputs(structure, like, model_output, uncond_output, guidance_scale)
    has_grad = grad is not None or grad_distance is not None
    masked = masks_clip(structure, has_grad, grad_second is not None, second, clip_grad)
    recomputed = masked or with_sums or grad_distance is not None
    looks = structure.a0 or structure.ae or structure.learned or structure.x0 != "none"
    used = grad is not None or (grad_second is not None and second == "v")
    noisy = used and (structure.learned or (with_sums and structure.variance == "fixed"))
    if recomputed and guidance_scale is not None and uncond_output is None:
        raise ValueError("uncond_output: expected it with guidance_scale, where the step is computed again")
    if uncond_output is not None and guidance_scale is None:
        raise ValueError("guidance_scale: expected it with uncond_output")
    for name, tensor, needed in (
        ("grad_second", grad_second, False),
        ("x", x, recomputed),
        ("x_prev", x_prev, False),
        ("model_output", model_output, (recomputed and looks) or (structure.learned and grad is not None)),
        ("z", z, noisy),
    ):
        if needed and tensor is None:
            raise ValueError(f"{name}: expected a tensor (the gradients depend on it), got None")
        if name != "model_output" and tensor is not None and tensor.shape != like.shape:
            raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(tensor.shape)}")
    return like
