"""The step in plain PyTorch: the definition that every backend is held to, and the fallback for any device.

Multiplies, additions and divisions are separate operations in the order written, so the result is the same in
every bit as that of the compiled kernels (and of the eager code it replaces).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .noise import compute_dtype, exp_fixed
from .tables import COLUMN, Structure

_FORWARD = Structure(x0="none", a0=False, ax=True, variance="fixed")


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
    torch_math: take torch's own exp and sqrt for a learned variance. The step is then that of eager code on
    this machine; by default they are those of the kernels, which are the same on every machine.

    Returns x' and x0 in x's dtype; x0 is None where the structure has none.  Differentiable in every tensor.
    ValueError for shapes that do not fit, or arguments that the structure does not take.
    """
    _check(rows, structure, x, model_output, uncond_output, guidance_scale, z, rounding)
    row = _Row(rows, x, rounding)
    r, factor, divisor = row.round, row.factor, row.divisor

    cond, variance = model_output, None
    if structure.learned:
        cond, variance = model_output[:, : x.shape[1]], row.wide(model_output[:, x.shape[1] :])
    m = row.wide(cond)
    if uncond_output is not None:
        base = row.wide(uncond_output[:, : x.shape[1]] if structure.learned else uncond_output)
        # a number that multiplies a half tensor is not rounded to half, unlike a coefficient, which is a tensor
        scale = torch.as_tensor(guidance_scale, device=x.device).to(m.dtype)
        m = r(base + r(row.per_sample(scale) * r(m - base)))
    state = row.wide(x)

    x0: Tensor | None = None
    if structure.x0 == "output":
        x0 = m
    elif structure.x0 == "linear":
        x0 = r(r(factor("px") * state) + r(factor("pm") * m))
        if structure.x0_divide:
            x0 = r(x0 / divisor("pd"))
    if structure.clip and x0 is not None:
        # torch.clamp in comparisons: NaN passes, and the gradient at a bound is 1 in every version of torch
        lo, hi = factor("lo"), factor("hi")
        x0 = torch.where(x0 < lo, lo, torch.where(x0 > hi, hi, x0))

    total: Tensor | None = None
    if structure.a0 and x0 is not None:
        total = r(factor("a0") * x0)
    if structure.ax:
        total = row.add(total, r(factor("ax") * state))
    if structure.ae:
        e = m
        if structure.eps == "rederived" and x0 is not None:
            e = r(r(factor("gx") * state) - r(factor("g0") * x0))
        elif structure.eps == "linear":
            e = r(r(factor("ex") * state) + r(factor("em") * m))
        if structure.eps_divide:
            e = r(e / divisor("gd"))
        total = row.add(total, r(factor("ae") * e))
    if structure.variance != "none" and z is not None:
        s = factor("s")
        if variance is not None:
            s = r(s * _std(structure, variance, row, torch_math))
        total = row.add(total, r(s * row.wide(z)))
    assert total is not None  # a Structure has at least one term
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
    x_t, _ = step(rows, _FORWARD, x0, x0, z=z, rounding=rounding)
    if target is None:
        return x_t, None
    if target == "noise":
        return x_t, z.to(x0.dtype, copy=True)  # never the caller's own tensor
    row = _Row(rows, x0, rounding)
    r, factor = row.round, row.factor
    v = r(r(factor("ax") * row.wide(z)) - r(factor("s") * row.wide(x0)))
    return x_t, v.to(x0.dtype)


class _Row:
    """The coefficients of a step over x, and the precision that its arithmetic keeps."""

    def __init__(self, rows: Tensor, x: Tensor, rounding: str) -> None:
        self.rows = rows
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

    def divisor(self, name: str) -> Tensor:
        return self.per_sample(self.rows[..., COLUMN[name]].to(self.dtype))

    def factor(self, name: str) -> Tensor:
        return self.round(self.divisor(name))

    def add(self, total: Tensor | None, term: Tensor) -> Tensor:
        return term if total is None else self.round(total + term)


def _std(structure: Structure, v: Tensor, row: _Row, torch_math: bool) -> Tensor:
    """Standard deviation per element from the variance half v of the model output."""
    r, factor = row.round, row.factor
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
    if rounding not in ("once", "host"):
        raise ValueError(f"rounding: expected 'once' or 'host', got {rounding!r}")
    if rows.dim() not in (1, 2) or rows.shape[-1] != len(COLUMN):
        raise ValueError(f"rows: expected shape [{len(COLUMN)}], or one per sample, got {list(rows.shape)}")
    if x.dim() < 1 or (rows.dim() == 2 and rows.shape[0] != x.shape[0]):
        raise ValueError(f"rows: expected one per sample of x {list(x.shape)}, got {list(rows.shape)}")
    expected = list(x.shape)
    if structure.learned:
        if x.dim() < 2:
            raise ValueError(f"x: expected [batch, channels, ...] (learned variance), got {list(x.shape)}")
        expected[1] *= 2
    if list(model_output.shape) != expected:
        raise ValueError(f"model_output: expected shape {expected}, got {list(model_output.shape)}")
    if (uncond_output is None) != (guidance_scale is None):
        raise ValueError("uncond_output and guidance_scale: expected both or neither")
    if uncond_output is not None and list(uncond_output.shape) not in (expected, list(x.shape)):
        raise ValueError(f"uncond_output: expected shape {expected}, got {list(uncond_output.shape)}")
    if isinstance(guidance_scale, Tensor) and list(guidance_scale.shape) not in ([], [x.shape[0]]):
        got = list(guidance_scale.shape)
        raise ValueError(f"guidance_scale: expected a number or shape [{x.shape[0]}], got {got}")
    if (z is None) != (structure.variance == "none"):
        needed = "no noise" if structure.variance == "none" else "noise of x's shape"
        raise ValueError(f"z: expected {needed} for variance={structure.variance!r}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z: expected shape {list(x.shape)}, got {list(z.shape)}")
