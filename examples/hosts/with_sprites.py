"""The course "How Diffusion Models Work": its notebook with one step changed.

+ denoise_add_noise = partial(sprites.denoise_add_noise, b_t=b_t, a_t=a_t, ab_t=ab_t)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Network, compare
from torch import Tensor

from fastdiff.integrations import sprites

timesteps, beta1, beta2, height = 100, 1e-4, 0.02, 16
b_t = (beta2 - beta1) * torch.linspace(0, 1, timesteps + 1) + beta1
a_t = 1 - b_t
ab_t = torch.cumsum(a_t.log(), dim=0).exp()
ab_t[0] = 1
nn_model = Network()


def usual_step(x: Tensor, t: int, eps: Tensor, z: Tensor | int) -> Tensor:
    """What the notebook's denoise_add_noise computes."""
    mean = (x - eps * ((1 - a_t[t]) / (1 - ab_t[t]).sqrt())) / a_t[t].sqrt()
    return mean + b_t.sqrt()[t] * z


@torch.no_grad()
def sample(denoise_add_noise: Callable[..., Tensor]) -> Tensor:
    """The notebook's loop."""
    samples = torch.randn(16, 3, height, height)
    for i in range(timesteps, 0, -1):
        z = torch.randn_like(samples) if i > 1 else 0
        eps = nn_model(samples, torch.tensor([i / timesteps])[:, None, None, None])
        samples = denoise_add_noise(samples, i, eps, z)
    return samples


def main() -> None:
    fused = partial(sprites.denoise_add_noise, b_t=b_t, a_t=a_t, ab_t=ab_t)
    compare(nn_model, lambda: sample(usual_step), lambda: sample(fused))


if __name__ == "__main__":
    main()
