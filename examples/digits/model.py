"""A small class-conditional U-Net for scikit-learn's 8x8 digits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import NoiseSchedule

WEIGHTS = Path(__file__).with_name("weights.safetensors")
CLASSES = 10
NULL_LABEL = CLASSES  # "no class told": trained on a tenth of the samples, for classifier-free guidance
IMAGE_SHAPE = (1, 8, 8)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the condition scales and shifts the features in between."""

    def __init__(self, channels_in: int, channels_out: int, condition: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(8, channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * channels_out)
        self.norm_out = nn.GroupNorm(8, channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the 16 positions of the coarse grid."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, height * width).unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(c // self.heads), dim=-1)
        return x + self.out((v @ weights.transpose(-1, -2)).reshape(b, c, height, width))


class UNet(nn.Module):
    """Predicts v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x0 (Salimans and Ho 2022, appendix D).

    The noise level enters as the angle arccos(sqrt(alpha_bar)), not as a timestep, so that one set of weights serves
    every noise schedule.
    """

    def __init__(self, width: int = 24, condition: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        wide = 2 * width
        self.register_buffer("frequencies", torch.arange(16) + 1.0, persistent=False)
        self.embed_angle = nn.Sequential(nn.Linear(32, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.embed_class = nn.Embedding(CLASSES + 1, condition)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = ResidualBlock(width, width, condition, dropout)
        self.to_coarse = nn.Conv2d(width, wide, 2, stride=2)
        self.middle = ResidualBlock(wide, wide, condition, dropout)
        self.attention = Attention(wide)
        self.middle_2 = ResidualBlock(wide, wide, condition, dropout)
        self.to_fine = nn.ConvTranspose2d(wide, width, 2, stride=2)
        self.up = ResidualBlock(2 * width, width, condition, dropout)
        self.norm = nn.GroupNorm(8, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, angle: Tensor, y: Tensor) -> Tensor:
        """x [B, 1, 8, 8], angle [B] in [0, pi/2], y int64 [B] in 0..10 (10: no class) -> v [B, 1, 8, 8]."""
        phase = angle[:, None] * self.frequencies
        condition = F.silu(self.embed_angle(torch.cat((phase.sin(), phase.cos()), 1)) + self.embed_class(y))
        fine = self.down(self.first(x), condition)
        h = self.middle(self.to_coarse(fine), condition)
        h = self.middle_2(self.attention(h), condition)
        h = self.up(torch.cat((self.to_fine(h), fine), 1), condition)
        return self.last(F.silu(self.norm(h)))


class Denoiser(nn.Module):
    """The U-Net under one noise schedule, as the papers' eps model: (x_t, t, y) -> predicted eps.

    The step from v to eps multiplies the network's error by sqrt(alpha_bar), so that predicted x0 stays accurate
    where nearly everything is noise, also under the cosine schedule (alpha_bar = 2e-9 at its end).
    """

    def __init__(self, net: UNet, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.net = net
        signal, noise = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
        for name, table in (("signal", signal), ("noise", noise), ("angle", np.arctan2(noise, signal))):
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, 1, 8, 8], t int64 [B] (training timesteps), y int64 [B] -> eps [B, 1, 8, 8]."""
        v = self.net(x, self.angle[t], y)
        return self.signal[t].view(-1, 1, 1, 1) * v + self.noise[t].view(-1, 1, 1, 1) * x


def save(net: UNet, path: Path) -> None:
    """Write the weights to a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)


def load(path: Path = WEIGHTS) -> UNet:
    """The trained U-Net, in evaluation mode, its parameters without gradients."""
    weights = load_file(path)
    net = UNet(width=weights["first.weight"].shape[0], condition=weights["embed_class.weight"].shape[1])
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)
