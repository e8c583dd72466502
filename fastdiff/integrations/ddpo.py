"""ddpo-pytorch's DDIM step with its log-probability (DDPO: Black et al. 2023, arXiv:2305.13301).

    from fastdiff.integrations.ddpo import ddim_step_with_logprob

takes the place of ddpo_pytorch.diffusers_patch.ddim_with_logprob. diffusers itself is not imported: any object with
the attributes of its DDIMScheduler will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops
from ..noise import DTYPES, Generators, check_generators, randn
from ..schedules import NoiseSchedule, integer, real
from ..tables import Table, ddim_table

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_MAX_TABLES = 16  # of a scheduler: an eta that is annealed must not fill the memory


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators | None = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step of a diffusers scheduler and the log-probability of what it led to, in one pass.

    Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16, by the operations of ddpo-pytorch and diffusers, with float32
    coefficients from the scheduler's alphas_cumprod:

        prev_sample = mean + std * noise
        log_prob = (-(prev_sample.detach() - mean) ** 2 / (2 * std**2) - log(std) - log(sqrt(2 * pi))).mean()

    As in ddpo-pytorch a step leads from t to t - num_train_timesteps // num_inference_steps, and below 0 to timestep 0,
    not to final_alpha_cumprod: the last step of a chain thereby keeps a density, and with set_alpha_to_one=True it
    is not that of diffusers. Half samples are computed in float32 and rounded once. Unlike there, the density is always
    that of the rounded sample, so that the ratio to that of a recorded one is exactly 1 until the model changes.

    Args:
        self: a DDIMScheduler after set_timesteps. Its table is made once for each eta and set of options and kept as
            long as the scheduler, until its alphas_cumprod changes. It is made at every call for an object that cannot
            be weakly referenced or hashed, and for alphas_cumprod made in inference mode, whose changes leave no trace.
        model_output: [B, ...] like sample, which may be float32 beside a half model_output.
        timestep: an int, or an integer tensor [B], [1] or [], any timesteps of the training schedule. A tensor on a
            device is not read by the host.
        sample: x_t: float32, float16, bfloat16 or float64.
        eta: in (0, 1]; without noise there is no density.
        use_clipped_model_output: re-derive eps from the clipped x0.
        generator: of the noise, or one for each sample; None for torch's default one. The noise is drawn as
            diffusers draws it, in the dtype of model_output.
        prev_sample: a recorded x_{t-1}, like sample: only its log-probability is computed.

    Returns:
        (prev_sample, log_prob): like sample, the recorded one itself where it was given; and the mean over all but the
        batch dimension, [B], float32, or float64 for a float64 sample. NaN where timestep is not one of the training
        schedule, or is 0, which no noise leads from. Differentiable in model_output and sample; log_prob takes
        prev_sample as a constant.

    Raises:
        TypeError, ValueError: a bad argument, by name; ValueError too for a scheduler with thresholding, before
            set_timesteps or with more inference steps than training timesteps, for both generator and prev_sample,
            and for an int timestep of 0.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample: expected at most one of them, got both")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if sample.dtype not in DTYPES:
        raise TypeError(f"sample: expected float32, float64, float16 or bfloat16, got {sample.dtype}")
    if sample.dim() == 0:
        raise ValueError("sample: expected a batch dimension, got a 0-dimensional tensor")
    halves = (torch.float16, torch.bfloat16) if sample.dtype is torch.float32 else ()
    _check_like("model_output", model_output, sample, (sample.dtype, *halves))
    if prev_sample is not None:
        _check_like("prev_sample", prev_sample, sample, (sample.dtype,))
    eta = real("eta", eta)
    if not 0 < eta <= 1:
        raise ValueError(f"eta: expected a value in (0, 1], as a step without noise has no density, got {eta}")
    if not isinstance(use_clipped_model_output, bool):
        raise TypeError(f"use_clipped_model_output: expected a bool, got {type(use_clipped_model_output).__name__}")
    table = _table_of(self, eta, use_clipped_model_output, sample.device)
    row: int | None = None
    t: Tensor | None = None
    if isinstance(timestep, Tensor):
        if timestep.dtype.is_floating_point or timestep.dtype.is_complex or timestep.dtype is torch.bool:
            raise TypeError(f"timestep: expected an int or an integer tensor, got a tensor of {timestep.dtype}")
        if timestep.numel() != 1 and timestep.shape != sample.shape[:1]:
            expected = f"[{sample.shape[0]}] or one element"
            raise ValueError(f"timestep: expected shape {expected}, got {list(timestep.shape)}")
        t = timestep.to(sample.device)
    else:
        row = len(table) - 1 - integer("timestep", timestep, 0, len(table) - 1)
        if not table.noisy[row]:
            raise ValueError(f"timestep: expected one that noise leads from, which a density needs, got {timestep}")
    if prev_sample is not None:
        given = ops.log_prob(table, prev_sample, model_output, t, sample, row=row, reduction="mean")
        return prev_sample, given
    noise = _noise_like(model_output, generator)
    return ops.step(table, model_output, t, sample, row=row, noise=noise, log_prob=True, reduction="mean")


def _check_like(name: str, tensor: Tensor, sample: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected {expected} beside a sample of {sample.dtype}, got {tensor.dtype}")
    if tensor.shape != sample.shape:
        raise ValueError(f"{name}: expected the sample's shape {list(sample.shape)}, got {list(tensor.shape)}")
    if tensor.device != sample.device:
        raise ValueError(f"{name}: expected a tensor on {sample.device} (the sample's device), got {tensor.device}")


def _noise_like(model_output: Tensor, generator: Generators | None) -> Tensor:
    if generator is None:
        return torch.randn(model_output.shape, dtype=model_output.dtype, device=model_output.device)
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    check_generators(generator, model_output.shape[0], model_output.device)
    return randn(tuple(model_output.shape), generator, model_output.dtype, model_output.device)


class _Kept(NamedTuple):
    """The tables of a scheduler, good for these alphas_cumprod until they are changed in place."""

    alphas_cumprod: Tensor
    version: int
    tables: dict[tuple[Any, ...], Table]


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def _kept_tables(scheduler: Any, alphas_cumprod: Tensor) -> dict[tuple[Any, ...], Table]:
    """The tables that are good for the scheduler as it is, to look one up and to put one in."""
    if alphas_cumprod.is_inference():
        return {}
    version = alphas_cumprod._version
    try:
        kept = _kept.get(scheduler)
        if kept is None or kept.alphas_cumprod is not alphas_cumprod or kept.version != version:
            kept = _kept[scheduler] = _Kept(alphas_cumprod, version, {})
    except TypeError:  # no weak reference, or no hash
        return {}
    return kept.tables


def _table_of(scheduler: Any, eta: float, use_clipped: bool, device: torch.device) -> Table:
    """A row for each training timestep, from the last to 0."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "num_inference_steps", "config"):
        if not hasattr(scheduler, name):
            raise TypeError(f"self: expected a DDIMScheduler of diffusers, got {type(scheduler).__name__}")
    config, alphas_cumprod, steps = scheduler.config, scheduler.alphas_cumprod, scheduler.num_inference_steps
    if not isinstance(alphas_cumprod, Tensor):
        raise TypeError(f"self.alphas_cumprod: expected a tensor, got {type(alphas_cumprod).__name__}")
    if steps is None:
        raise ValueError("self: expected a scheduler whose set_timesteps has been called, got num_inference_steps None")
    steps = integer("self.num_inference_steps", steps, 1, config.num_train_timesteps)
    if config.thresholding:
        raise ValueError("self: expected a scheduler without thresholding, got thresholding=True in its config")
    if config.prediction_type not in _PREDICTIONS:
        raise ValueError(
            f"self: expected prediction_type {', '.join(map(repr, _PREDICTIONS))}, got {config.prediction_type!r}"
        )
    clip = config.clip_sample_range if config.clip_sample else None
    tables = _kept_tables(scheduler, alphas_cumprod)
    key = config.num_train_timesteps, steps, config.prediction_type, clip, eta, use_clipped, device
    table = tables.get(key)
    if table is None:
        if len(tables) >= _MAX_TABLES:
            del tables[next(iter(tables))]
        stride = config.num_train_timesteps // steps
        table = tables[key] = ddim_table(
            NoiseSchedule.from_alphas_cumprod(alphas_cumprod.cpu().numpy()),
            [(t, max(t - stride, 0)) for t in reversed(range(config.num_train_timesteps))],
            eta=eta,
            prediction=_PREDICTIONS[config.prediction_type],
            clip=clip,
            eps="rederived" if use_clipped else "raw",
            host="diffusers",
            # there the roots are taken on the device, and tensors, not scalars, are divided by
            device=device,
        )
    return table
