"""The sampling loops of ermongroup/ddim (DDIM: Song et al. 2021, arXiv:2010.02502) with fused steps.

    from fastdiff.integrations.ermongroup import ddpm_steps, generalized_steps

takes the place of `from functions.denoising import ...` in runners/diffusion.py. The same seed gives the same images,
bit for bit on a CPU: coefficients are made as there (`fastdiff.hosts`), and torch.randn_like is called at every step.

What differs: the state stays on its own device, which need not be CUDA; x may have any number of dimensions above 0
(there a state of other than 4 is broadcast with the coefficients wrongly); and where float32 takes the radicand of the
direction below 0, which gives NaN there, it is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import mersenne, ops
from .. import noise as contract
from ..ops import Backend
from ..schedules import NoiseSchedule, integer, is_many, real
from ..tables import COLUMN, Structure, Table, ddim_table, ddpm_table, x0_table
from ._host import Noise, Options
from ._trajectory import OnCPU


def generalized_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[..., Any],
    b: Tensor,
    *,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    keep: bool = True,
    backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """DDIM over a sub-sequence of timesteps: Song et al. 2021, eq. 12 and 16; nothing is clipped.

    Equivalent to, for each t of reversed(seq) and the t_next below it (-1, where alpha_bar is 1, after the last):

        e = model(x, t)
        x0 = (x - e * (1 - at).sqrt()) / at.sqrt()
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        x = at_next.sqrt() * x0 + c1 * randn_like(x) + ((1 - at_next) - c1**2).sqrt() * e

    Args:
        x: x_T, [B, ...], a floating dtype. As there a half state becomes float32 in the first step.
        seq: timesteps in ascending order, which may repeat (skip type "quad" does).
        model: called as model(x, t), t float32 [B] on x's device; gives eps, like x.
        b: the betas of the training schedule, float32 [T], on any device.
        noise: "torch", the draws of the replaced code: one like x_T at every step, for eta 0 too. "philox": noise made
            inside the step, independent of batch and device (`fastdiff.noise`).
        seeds: with "philox", an int or int64 tensor [B]; None draws one for the chain from torch's default CPU
            generator.
        keep: False keeps the last states alone: both lists have one entry, and nothing is moved on the way.
        backend: as for `fastdiff.step`.
        **kwargs: eta in [0, 1], 0 by default. Others are ignored, as there.

    Returns:
        (xs, x0_preds): lists of the states, from x itself on, and of the predicted x0, all but x on the CPU, in the
        order of the steps. From CUDA they are copied while the steps go on.

    Raises:
        TypeError, ValueError: a bad argument, by name, before the model is called; what the model returned, before it
            is used.
    """
    eta = real("eta", kwargs.get("eta", 0.0))
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
    return _run(x, seq, model, b, eta, Options(noise, seeds, backend=backend), keep)


def ddpm_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[..., Any],
    b: Tensor,
    *,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    keep: bool = True,
    backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """DDPM ("ddpm_noisy") over a sub-sequence of timesteps: Ho et al. 2020, eq. 7, with the larger variance.

    Equivalent to, for each t of reversed(seq), and am1 = alpha_bar of the t below it:

        e = model(x, t)
        beta = 1 - at / am1
        x0 = ((1 / at).sqrt() * x - (1 / at - 1).sqrt() * e).clamp(-1, 1)
        mean = (am1.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - am1) * x) / (1 - at)
        x = mean + (t != 0) * exp(0.5 * log(beta)) * randn_like(x)

    Arguments, result and errors as for `generalized_steps`; there is no eta. The noise is drawn like the state of each
    step, whose dtype may have become wider than that of x_T.
    """
    return _run(x, seq, model, b, None, Options(noise, seeds, backend=backend), keep)


class _Chain(NamedTuple):
    """The tables of a chain: of whole steps, and of the second half of a step whose noise stands before its eps."""

    whole: Table
    second: Table | None


@functools.lru_cache(maxsize=16)
def _chain_of(betas: bytes, moves: tuple[tuple[int, int], ...], eta: float | None, device: torch.device) -> _Chain:
    schedule = NoiseSchedule.from_betas(np.frombuffer(betas, np.float32).astype(np.float64))
    if eta is None:
        return _Chain(
            ddpm_table(schedule, moves, variance="fixed_large", clip=1.0, host="ermongroup", device=device), None
        )
    whole = ddim_table(schedule, moves, eta=eta, host="ermongroup", device=device)
    if not eta:
        return _Chain(whole, None)
    # the codebase adds the noise before the eps: with z as the state and eps as the noise the order is its own
    rows = whole.rows
    rows[:, COLUMN["ax"]], rows[:, COLUMN["s"]] = whole.rows[:, COLUMN["s"]], whole.rows[:, COLUMN["ae"]]
    form = Structure(x0="output", ax=True, variance="fixed")
    return _Chain(whole, Table(rows, form, whole.timesteps, name="ddim_second", host="ermongroup"))


def _run(
    x: Tensor, seq: Sequence[int], model: Callable[..., Any], b: Tensor, eta: float | None, options: Options, keep: bool
) -> tuple[list[Tensor], list[Tensor]]:
    _check(x, model, b, keep)
    if isinstance(seq, str) or not is_many(seq):
        raise TypeError(f"seq: expected a sequence of ints, got {type(seq).__name__}")
    times = [integer("seq", t, 0, b.shape[0] - 1) for t in seq]
    for before, after in zip(times, times[1:], strict=False):
        if after < before:
            raise ValueError(f"seq: expected timesteps in ascending order, got {after} after {before}")
    if not times:
        return [x], []
    moves = tuple(zip(reversed(times), [*reversed(times[:-1]), -1], strict=True))
    chain = _chain_of(b.detach().cpu().numpy().tobytes(), moves, eta, x.device)
    keys = contract.seeds(options.seeds, x.shape[0], x.device) if options.noise == "philox" else None
    states, predictions = OnCPU(), OnCPU()
    with torch.no_grad():
        state, x0 = x, None
        for row, (t, _) in enumerate(moves):
            e = model(state, torch.full((x.shape[0],), float(t), device=x.device))
            if not isinstance(e, Tensor):
                raise TypeError(f"model: expected it to return a tensor, got {type(e).__name__}")
            # the coefficients are float32 tensors with dimensions there, which widen halves
            width = torch.promote_types(torch.promote_types(state.dtype, e.dtype), torch.float32)
            if e.dtype not in (torch.float16, torch.bfloat16) or width is torch.float64:
                e = e.to(width)
            like = state if eta is None else x
            last = row == len(moves) - 1
            state, x0 = _step(chain, row, e, state.to(width), keys, like, options.backend, keep or last)
            if keep and x0 is not None:
                states.add(state)
                predictions.add(x0)
    if not keep and x0 is not None:
        return [state.cpu()], [x0.cpu()]
    return [x, *states.finish()], predictions.finish()


def _step(
    chain: _Chain, row: int, e: Tensor, x: Tensor, keys: Tensor | None, like: Tensor, backend: Backend, with_x0: bool
) -> tuple[Tensor, Tensor | None]:
    """One step, and its x0 where it is asked for; the noise is that of the keys, or drawn by torch."""
    table = chain.whole
    noise: dict[str, Any] = {}
    if keys is not None:
        if table.structure.variance != "none":
            noise["seeds"] = keys
    else:
        z = mersenne.randn_like(like)  # drawn where it is not used too
        if chain.second is not None:
            x0 = ops.step(x0_table(table), e, None, x, row=row, backend=backend)
            # the layout of the state is that of x0, not that of the noise
            z = z.to(x.dtype) if z.stride() == x0.stride() else torch.empty_like(x0).copy_(z)
            return ops.step(chain.second, x0, None, z, row=row, noise=e.to(x.dtype), backend=backend), x0
        if table.structure.variance != "none":
            noise["noise"] = z.to(x.dtype)
    if with_x0:
        return ops.step_with_x0(table, e, None, x, row=row, backend=backend, **noise)
    return ops.step(table, e, None, x, row=row, backend=backend, **noise), None


def _check(x: Tensor, model: Callable[..., Any], b: Tensor, keep: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in contract.DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x: expected a batch dimension, got a 0-dimensional tensor")
    if not callable(model):
        raise TypeError(f"model: expected a function of (x, t), got {type(model).__name__}")
    if not isinstance(b, Tensor):
        raise TypeError(f"b: expected a tensor, got {type(b).__name__}")
    if b.dtype is not torch.float32:
        raise TypeError(f"b: expected float32, got {b.dtype}")
    if b.dim() != 1:
        raise ValueError(f"b: expected shape [timesteps], got {list(b.shape)}")
    if not isinstance(keep, bool):
        raise TypeError(f"keep: expected a bool, got {type(keep).__name__}")
