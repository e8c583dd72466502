"""diffusers: a pipeline and one line more.

+ fastdiff.enable(pipe)
"""

from __future__ import annotations

import torch
from common import compare
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

import fastdiff


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    usual, ours = (DDPMPipeline(unet, DDPMScheduler()) for _ in range(2))
    fastdiff.enable(ours)

    def images(pipe: DDPMPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        found = pipe(batch_size=4, num_inference_steps=10, output_type="np").images
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    compare(unet, lambda: images(usual), lambda: images(ours))
    print(fastdiff.summary(ours))


if __name__ == "__main__":
    main()
