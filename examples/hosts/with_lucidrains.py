"""lucidrains' denoising-diffusion-pytorch: a diffusion and one line more.

+ fastdiff.enable(diffusion)
"""

from __future__ import annotations

import torch
from common import compare
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

import fastdiff


def main() -> None:
    torch.manual_seed(0)
    model = Unet(dim=8, dim_mults=(1, 2), flash_attn=False)
    usual, ours = (
        GaussianDiffusion(model, image_size=16, sampling_timesteps=10, ddim_sampling_eta=1.0) for _ in range(2)
    )
    fastdiff.enable(ours)
    compare(model, lambda: usual.sample(batch_size=4), lambda: ours.sample(batch_size=4))
    print(fastdiff.summary(ours))


if __name__ == "__main__":
    main()
