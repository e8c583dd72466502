"""OpenAI's improved-diffusion and guided-diffusion, DiT and other forks: a script with one import changed.

- from guided_diffusion.respace import SpacedDiffusion, space_timesteps
+ from fastdiff.integrations.openai import SpacedDiffusion, space_timesteps

or one line more, fastdiff.enable(diffusion), where create_model_and_diffusion has made it.
"""

from __future__ import annotations

import numpy as np
import torch
from common import Network, compare
from torch import Tensor

from fastdiff.integrations.openai import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
    space_timesteps,
)

BETAS, SHAPE = get_named_beta_schedule("linear", 1000), (4, 3, 32, 32)


@torch.no_grad()
def usual_sample(model: Network, timesteps: list[int]) -> Tensor:
    """What p_sample_loop computes on CPU tensors: float64 tables, taken as float32 at each step."""
    kept = np.cumprod(1 - BETAS)[timesteps]
    ends = np.append(1.0, kept[:-1])
    betas = 1 - kept / ends
    kept = np.cumprod(1 - betas)
    ends = np.append(1.0, kept[:-1])
    variance = betas * (1 - ends) / (1 - kept)
    tables = [np.sqrt(1 / kept), np.sqrt(1 / kept - 1), betas * np.sqrt(ends) / (1 - kept)]
    tables += [(1 - ends) * np.sqrt(1 - betas) / (1 - kept), np.log(np.append(variance[1], betas[1:]))]
    x = torch.randn(SHAPE)
    for i in range(len(timesteps) - 1, -1, -1):
        t = torch.tensor([i] * len(x))
        a, b, c1, c2, log = (torch.from_numpy(u)[t].float().reshape(-1, 1, 1, 1).expand(x.shape) for u in tables)
        eps = model(x, torch.tensor(timesteps)[t])
        x0 = (a * x - b * eps).clamp(-1, 1)
        x = c1 * x0 + c2 * x + (t != 0).float().reshape(-1, 1, 1, 1) * torch.exp(0.5 * log) * torch.randn_like(x)
    return x


def main() -> None:
    model, kept = Network(), space_timesteps(1000, "50")
    kinds = ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, LossType.MSE
    names = "model_mean_type", "model_var_type", "loss_type"
    diffusion = SpacedDiffusion(use_timesteps=kept, betas=BETAS, **dict(zip(names, kinds, strict=True)))
    compare(model, lambda: usual_sample(model, sorted(kept)), lambda: diffusion.p_sample_loop(model, SHAPE))


if __name__ == "__main__":
    main()
