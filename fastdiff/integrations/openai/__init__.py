"""OpenAI's improved-diffusion and guided-diffusion, and the forks that keep their GaussianDiffusion.

    fastdiff.enable(diffusion)                                              # an object of theirs
    from fastdiff.integrations.openai import SpacedDiffusion, space_timesteps      # or in place of theirs

The names of this module are guided-diffusion's; those of `fastdiff.integrations.openai.improved`, whose functions take
their arguments in another order, are improved-diffusion's. Neither codebase is imported.

A step is the model call and one fused operation. It computes in float32, or in float64 where x is, and gives that:
the coefficients of the codebases make float32 of half tensors. With noise="philox" the noise of a respaced chain is
that of the timesteps before the respacing; `q_sample`, which training draws from, keeps torch's noise.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from ._steps import PREDICTIONS, STEPS, VARIANCES, Steps, mixin_for, name_of
from .guided import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    space_timesteps,
)

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
    "space_timesteps",
]


def targets(obj: Any) -> dict[str, Any]:
    """What of an object is enabled: itself."""
    return {"": obj}


def mixin(target: Any) -> type[Steps]:
    """The mixin of an object by the signatures of its methods.

    TypeError for a class, betas that are not an array, or methods that are not there; ValueError for types of another
    codebase.
    """
    if inspect.isclass(target):
        raise TypeError(f"obj: expected a diffusion, an instance, got the class {target.__name__}")
    if isinstance(target, Steps):
        return type(target)
    original = type(target)
    missing = [name for name in (*STEPS, "q_sample", "p_mean_variance") if not callable(getattr(target, name, None))]
    if missing:
        raise TypeError(f"obj: expected a GaussianDiffusion of OpenAI's, got {original.__name__} without {missing[0]}")
    if not isinstance(target.betas, np.ndarray) or target.betas.ndim != 1:
        raise TypeError(f"obj.betas: expected a 1-D array of NumPy, got {type(target.betas).__name__}")
    for name, known in (("model_mean_type", PREDICTIONS), ("model_var_type", VARIANCES)):
        value = name_of(getattr(target, name))
        if value not in known:
            raise ValueError(f"obj.{name}: expected one of {', '.join(known)}, got {value!r}")
    return mixin_for(original)
