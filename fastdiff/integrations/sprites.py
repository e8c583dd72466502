"""The samplers of the course "How Diffusion Models Work" (DeepLearning.AI, sprites) with fused steps.

    from fastdiff.integrations.sprites import sample_ddim, sample_ddpm

The course's functions read globals; here each of them is a keyword argument of the same name:

    timesteps, b_t, a_t, ab_t  ->  b_t=b_t, a_t=a_t, ab_t=ab_t    the noise schedule, float32 [timesteps + 1]
    nn_model                   ->  nn_model=nn_model
    height, device             ->  height=height, device=device

    samples, intermediate = sample_ddpm(32, nn_model=nn_model, b_t=b_t, a_t=a_t, ab_t=ab_t, height=height)

or, to keep the course's own loops,

    denoise_add_noise = functools.partial(sprites.denoise_add_noise, b_t=b_t, a_t=a_t, ab_t=ab_t)

The same seed gives the same sprites, bit for bit on a CPU: the mean straight from eps, nothing clipped (Ho et al. 2020,
arXiv:2006.11239, eq. 11; DDIM: Song et al. 2021, arXiv:2010.02502, eq. 12 at eta 0), in the course's order.

What differs: nothing is printed, and the fast sampler ends at the clean image whatever its number of steps. There a
last step of less than timesteps // n reads the schedule at a negative index, from its noisy end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import mersenne, ops
from .. import noise as contract
from ..hosts import Columns, sprite_ddim, sprite_ddpm
from ..ops import Backend, Rounding
from ..schedules import integer
from ..tables import Table, fill_columns, table_of
from ._host import Noise, Options
from ._trajectory import OnCPU

_HALF = (torch.float16, torch.bfloat16)
_MAX_TABLES = 32


def denoise_add_noise(
    x: Tensor,
    t: int,
    pred_noise: Tensor,
    z: Tensor | float | None = None,
    *,
    b_t: Tensor,
    a_t: Tensor,
    ab_t: Tensor,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """One DDPM step: x at timestep t to t - 1.

    Equivalent to:

        mean = (x - pred_noise * ((1 - a_t[t]) / (1 - ab_t[t]).sqrt())) / a_t[t].sqrt()
        return mean + b_t.sqrt()[t] * z

    Args:
        x: [B, ...], a floating dtype; pred_noise: the model's eps, like x.
        t: 1 to timesteps.
        z: the noise, like x, or a number for every element of it (0: none); None draws it.
        b_t, a_t, ab_t: the schedule.
        noise, seeds: how it is drawn: "torch", torch.randn_like(x), or "philox", inside the step (`fastdiff.noise`),
            with seeds an int or int64 tensor [B], or None for one from torch's default CPU generator.
        backend: as for `fastdiff.step`.

    Returns:
        A tensor like x. Half types are rounded after every operation, as there. Differentiable in x, pred_noise and z.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if noise != "torch" or seeds is not None:
        Options(noise, seeds)  # checks them
    _check_state(x, pred_noise)
    halves = x.dtype in _HALF
    kind = ("mean" if type(z) is int and z == 0 else "noisy") + (", scaled" if halves else "")
    table = _kept_table((b_t, a_t, ab_t), kind)
    row = len(table) - integer("t", t, 1, len(table))
    source: dict[str, Any] = {}
    if z is None:
        if noise == "philox":
            source["seeds"] = contract.seeds(seeds, x.shape[0], x.device)
        else:
            source["noise"] = mersenne.randn_like(x)
    elif isinstance(z, Tensor):
        _check_like("z", z, x)
        source["noise"] = z
    elif not isinstance(z, Real):
        raise TypeError(f"z: expected a tensor, a number or None, got {type(z).__name__}")
    elif kind.startswith("noisy"):
        source["noise"] = torch.full_like(x, z)
    if halves:
        # a factor behind a half tensor is not rounded to half, unlike those before one
        pred_noise = pred_noise * ((1 - a_t[t]) / (1 - ab_t[t]).sqrt())
        source["rounding"] = "host"
    return ops.step(table, pred_noise, None, x, row=row, backend=backend, **source)


def denoise_ddim(
    x: Tensor, t: int, t_prev: int, pred_noise: Tensor, *, ab_t: Tensor, backend: Backend = "auto"
) -> Tensor:
    """One step of the fast sampler: x at timestep t to t_prev, without noise.

    Equivalent to:

        ab, ab_prev = ab_t[t], ab_t[max(t_prev, 0)]
        x0_pred = ab_prev.sqrt() / ab.sqrt() * (x - (1 - ab).sqrt() * pred_noise)
        return x0_pred + (1 - ab_prev).sqrt() * pred_noise

    Args:
        x: [B, ...], a floating dtype; pred_noise: the model's eps, like x.
        t: 0 to timesteps; t_prev: at most timesteps. Below 0 it is the clean image, 0.
        ab_t: of the schedule.
        backend: as for `fastdiff.step`.

    Returns, raises:
        As `denoise_add_noise`.
    """
    _check_state(x, pred_noise)
    last = _check(ab_t=ab_t) - 1
    t = integer("t", t, 0, last)
    table = _kept_table((ab_t,), t - integer("t_prev", t_prev, -last, last))
    rounding: Rounding = "host" if x.dtype in _HALF else "once"
    return ops.step(table, pred_noise, None, x, row=last - t, rounding=rounding, backend=backend)


@torch.no_grad()
def sample_ddpm(
    n_sample: int,
    save_rate: int = 20,
    *,
    nn_model: Callable[..., Tensor],
    b_t: Tensor,
    a_t: Tensor,
    ab_t: Tensor,
    height: int,
    channels: int = 3,
    device: torch.device | str | None = None,
    context: Any = None,
    extra_noise: bool = True,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, np.ndarray]:
    """Samples by all the timesteps, and states on the way.

    Args:
        n_sample: how many.
        save_rate: states are kept at the timesteps that it divides, after the first step, and at the last 7.
        nn_model: called as nn_model(x, t), t float32 [1, 1, 1, 1], timestep / timesteps; gives eps like x.
        b_t, a_t, ab_t: the schedule, [timesteps + 1].
        height: of the square sprites of `channels` channels.
        device: of the state; default: that of the schedule.
        context: handed to the model as c=context, as by the course's sample_ddpm_context, unless None.
        extra_noise: False is the course's sampler that adds no noise in its steps, whose samples collapse.
        noise, seeds, backend: as for `denoise_add_noise`; "philox" makes the initial noise too.

    Returns:
        (samples, intermediate): float32 [n_sample, channels, height, height], and an array of states [n, *its shape].

    Raises:
        TypeError, ValueError: a bad argument, by name, before the model is called; what the model returned.
    """
    timesteps = _check(b_t=b_t, a_t=a_t, ab_t=ab_t) - 1
    save_rate = integer("save_rate", save_rate, 1)

    def step(x: Tensor, i: int, eps: Tensor) -> Tensor:
        z = None if i > 1 and extra_noise else 0
        return denoise_add_noise(
            x, i, eps, z, b_t=b_t, a_t=a_t, ab_t=ab_t, noise=noise, seeds=chain_seeds, backend=backend
        )

    chain, samples, chain_seeds = _begin(timesteps, 1, n_sample, channels, height, device or b_t.device, noise, seeds)
    return _run(chain, samples, nn_model, context, step, lambda i: i % save_rate == 0 or i == timesteps or i < 8)


@torch.no_grad()
def sample_ddim(
    n_sample: int,
    n: int = 20,
    *,
    nn_model: Callable[..., Tensor],
    ab_t: Tensor,
    height: int,
    channels: int = 3,
    device: torch.device | str | None = None,
    context: Any = None,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, np.ndarray]:
    """Samples by the fast sampler, and the states after all of its steps.

    n: the number of steps, of timesteps // n timesteps each; where n does not divide timesteps there are more than n,
        as there, the last a shorter one.
    noise, seeds: of the initial noise; the steps add none.  The other arguments, result and errors: as `sample_ddpm`.
    """
    timesteps = _check(ab_t=ab_t) - 1
    stride = timesteps // integer("n", n, 1, timesteps)

    def step(x: Tensor, i: int, eps: Tensor) -> Tensor:
        return denoise_ddim(x, i, i - stride, eps, ab_t=ab_t, backend=backend)

    chain, samples, _ = _begin(timesteps, stride, n_sample, channels, height, device or ab_t.device, noise, seeds)
    return _run(chain, samples, nn_model, context, step, lambda i: True)


def _begin(
    timesteps: int,
    stride: int,
    n_sample: int,
    channels: int,
    height: int,
    device: torch.device | str,
    noise: Noise,
    seeds: int | Tensor | None,
) -> tuple[list[tuple[int, Tensor]], Tensor, Tensor | None]:
    """The timesteps of a chain with what the model is told of each, its first state, and its seeds."""
    options = Options(noise, seeds)
    shape = (integer("n_sample", n_sample, 0), integer("channels", channels, 1), *(integer("height", height, 1),) * 2)
    visited = range(timesteps, 0, -stride)
    told = torch.tensor([i / timesteps for i in visited], dtype=torch.float32).to(device)
    chain = list(zip(visited, told.reshape(-1, 1, 1, 1, 1), strict=True))
    if options.noise == "torch":
        return chain, torch.randn(shape).to(device), None  # drawn on the CPU, as there
    keys = contract.seeds(options.seeds, n_sample, device)
    return chain, contract.normal(shape, keys), keys


def _run(
    chain: list[tuple[int, Tensor]],
    samples: Tensor,
    nn_model: Callable[..., Tensor],
    context: Any,
    step: Callable[[Tensor, int, Tensor], Tensor],
    keeps: Callable[[int], bool],
) -> tuple[Tensor, np.ndarray]:
    kept = OnCPU()
    condition = {} if context is None else {"c": context}
    for i, t in chain:
        samples = step(samples, i, nn_model(samples, t, **condition))
        if keeps(i):
            kept.add(samples)
    return samples, np.stack([state.numpy() for state in kept.finish()])


def _check_state(x: Tensor, pred_noise: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in contract.DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    _check_like("pred_noise", pred_noise, x)


def _check_like(name: str, value: Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.shape != x.shape:
        raise ValueError(f"{name}: expected shape {list(x.shape)}, that of x, got {list(value.shape)}")


def _check(**schedule: Tensor) -> int:
    """The length of the tensors of a schedule.  TypeError or ValueError for what is none."""
    first, *_ = schedule.values()
    for name, tensor in schedule.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] < 2 or tensor.shape != first.shape:
            raise ValueError(f"{name}: expected shape [timesteps + 1], as the others, got {list(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device}, as the others, got {tensor.device}")
    return first.shape[0]


class _Kept(NamedTuple):
    """A table, good for these tensors until they are changed in place, or given other data."""

    tensors: list[weakref.ref[Tensor]]
    versions: list[tuple[int, int]]
    table: Table


_tables: dict[tuple[Any, ...], _Kept] = {}


def _kept_table(schedule: tuple[Tensor, ...], kind: str | int) -> Table:
    """The table of a schedule: "noisy", "mean" (no noise), or of the fast sampler with steps of so many timesteps.

    "noisy, scaled" and "mean, scaled" are for an eps that has been multiplied by its factor already. The rows go from
    the last timestep down. What is made in inference mode has no version, and is taken anew.
    """
    key = (kind, *map(id, schedule))
    kept = _tables.get(key)
    if kept is not None:
        for tensor, ref, version in zip(schedule, kept.tensors, kept.versions, strict=True):
            if ref() is not tensor or (tensor._version, tensor.data_ptr()) != version:
                break
        else:
            return kept.table
    _check(**dict(zip(("ab_t", "a_t", "b_t"), reversed(schedule), strict=False)))
    if any(tensor.is_inference() for tensor in schedule):
        return _make(schedule, kind)
    table = _make(schedule, kind)
    _tables.pop(key, None)
    if len(_tables) >= _MAX_TABLES:
        del _tables[next(iter(_tables))]
    _tables[key] = _Kept([weakref.ref(u) for u in schedule], [(u._version, u.data_ptr()) for u in schedule], table)
    return table


def _make(schedule: tuple[Tensor, ...], kind: str | int) -> Table:
    with torch.inference_mode(False), torch.no_grad():
        numbers = [tensor.detach().clone() for tensor in schedule]
        if isinstance(kind, int):
            (ab,) = numbers
            last = ab.shape[0] - 1
            t = torch.arange(last, -1, -1, device=ab.device)
            columns = fill_columns(sprite_ddim, ab[t], ab[(t - kind).clamp(0, last)])
        else:
            last = numbers[0].shape[0] - 1
            t = torch.arange(last, 0, -1, device=numbers[0].device)
            columns = fill_columns(sprite_ddpm, *(u[t] for u in numbers))
            if kind.startswith("mean"):
                columns |= Columns({}, {"variance": "none"})
            if kind.endswith("scaled"):
                columns |= Columns({"em": -1.0})
        device = numbers[0].device.type
        # the coefficients are 0-dimensional tensors there
        scalars = device if device in ("cpu", "cuda") else None
        return table_of("sprites", columns, t.tolist(), clip=None, host="sprites", scalars=scalars)
