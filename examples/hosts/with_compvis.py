"""CompVis' latent-diffusion and stable-diffusion: scripts/txt2img.py with one import changed.

- from ldm.models.diffusion.ddim import DDIMSampler
+ from fastdiff.integrations.compvis import DDIMSampler
"""

from __future__ import annotations

import numpy as np
import torch
from common import Network, bar, compare
from torch import Tensor

from fastdiff.integrations.compvis import DDIMSampler


class Model:
    """What the sampler reads of a LatentDiffusion."""

    device, num_timesteps, parameterization = torch.device("cpu"), 1000, "eps"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).float()
    alphas_cumprod_prev = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    network = Network()

    def apply_model(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.network(x, t) * c[:, None, None, None]


@torch.no_grad()
def usual_sample(model: Model, steps: int, shape: tuple[int, ...], c: Tensor, scale: float, uc: Tensor) -> Tensor:
    """What the sampler of ldm computes at eta 0, which draws noise all the same."""
    x, times = torch.randn(shape), np.arange(0, 1000, 1000 // steps) + 1
    kept = model.alphas_cumprod.numpy()
    alphas, ends, roots = kept[times], kept[[0, *times[:-1]]], np.sqrt(1 - kept[times])
    for index in bar(range(len(times) - 1, -1, -1)):
        both = model.apply_model(torch.cat([x, x]), torch.full((2 * len(x),), int(times[index])), torch.cat([uc, c]))
        uncond, cond = both.chunk(2)
        e = uncond + scale * (cond - uncond)
        a, end, root = (torch.full((len(x), 1, 1, 1), float(u[index])) for u in (alphas, ends, roots))
        x0 = (x - root * e) / a.sqrt()
        noise = torch.zeros_like(a) * torch.randn(shape) * 1.0
        x = end.sqrt() * x0 + (1.0 - end - 0.0).sqrt() * e + noise
    return x


def main() -> None:
    model, shape, c, uc = Model(), (2, 3, 64, 64), torch.full((2,), 1.1), torch.ones(2)

    def sample() -> Tensor:
        guidance = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": uc}
        return DDIMSampler(model).sample(50, 2, shape[1:], c, **guidance)[0]

    compare(model.network, lambda: usual_sample(model, 50, shape, c, 7.5, uc), sample)


if __name__ == "__main__":
    main()
