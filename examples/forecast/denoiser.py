"""The network of the forecast: a few layers that tell the noise in a forecast from the months that came before."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from series import CONDITION, HORIZON
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff

WEIGHTS = Path(__file__).with_name("weights.safetensors")
STEPS = 100
SCHEDULE = fastdiff.NoiseSchedule.cosine(STEPS)
CLIP = 5.0  # standard deviations; of the training years' anomalies the largest is 3.6
SAMPLER = fastdiff.DDPMSampler(SCHEDULE, clip=CLIP)


class Denoiser(nn.Module):
    """A residual MLP that predicts eps."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(HORIZON + CONDITION, width)
        self.time = nn.Embedding(STEPS, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.leave = nn.Linear(width, HORIZON)
        # neighbours among the timesteps begin alike: there are too few data for each to find that out
        angle = (torch.arange(STEPS)[:, None] + 0.5) / STEPS * (math.pi / 2) * torch.arange(1, 17)
        smooth = torch.cat((angle.sin(), angle.cos()), 1)
        with torch.no_grad():
            self.time.weight.copy_(0.3 * smooth @ torch.randn(smooth.shape[1], width))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x [B, HORIZON], t int64 [B], condition [B, CONDITION] -> eps [B, HORIZON]."""
        h = F.silu(self.enter(torch.cat((x, condition), 1)) + self.time(t))
        for block in self.blocks:
            h = h + F.silu(block(h))
        eps: Tensor = self.leave(h)
        return eps


def forecast(network: nn.Module, condition: Tensor, members: int, seed: int) -> Tensor:
    """An ensemble for each of the conditions [N, CONDITION]: [members, N, HORIZON], standardised."""
    told = condition.repeat(members, 1)
    x = SAMPLER.sample(network, (len(told), HORIZON), seeds=seed, model_kwargs={"condition": told})
    return x.view(members, -1, HORIZON)


def save(network: Denoiser, path: Path) -> None:
    """Write the weights to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)


def load(path: Path = WEIGHTS) -> Denoiser:
    """The trained network, in evaluation mode, its parameters without gradients."""
    network = Denoiser()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)
