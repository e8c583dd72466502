"""DDPM and DDIM steps in plain PyTorch, as their papers write them: what the fused step is measured against.

Coefficients are Python numbers made before the loop, and every operation that can works in place: nothing is done to
make this slow. Only `add_(..., alpha=)` and `addcmul` are left out, because they round differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastdiff import NoiseSchedule


class DDPM:
    """Ho et al. 2020, equations 7, 11 and 15, with the smaller of their two variances.

    Predicted x0 is clipped to [-1, 1]. The betas are those of the chain (Nichol and Dhariwal 2021, section 4), so that
    `timesteps` may leave some out.
    """

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        alpha_bar = schedule.alphas_cumprod[list(timesteps)]
        previous = np.append(alpha_bar[1:], 1.0)
        alpha = alpha_bar / previous
        self.rows = np.stack(
            (
                1 / np.sqrt(alpha_bar),
                np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar),
                (1 - alpha) * np.sqrt(previous) / (1 - alpha_bar),
                (1 - previous) * np.sqrt(alpha) / (1 - alpha_bar),
                np.sqrt((1 - alpha) * (1 - previous) / (1 - alpha_bar)),
            ),
            axis=1,
        ).tolist()

    def step(self, eps: Tensor, k: int, x: Tensor, noise: Tensor) -> Tensor:
        """The k-th step of the chain: x, eps and noise [B, ...] -> the next x."""
        from_x, from_eps, mean_x0, mean_x, sigma = self.rows[k]
        x0 = (x * from_x).sub_(eps * from_eps).clamp_(-1, 1)
        return x0.mul_(mean_x0).add_(x * mean_x).add_(noise * sigma)


class DDIM:
    """Song et al. 2021, equation 12 at eta = 0: no noise. Predicted x0 is clipped to [-1, 1]."""

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> None:
        alpha_bar = schedule.alphas_cumprod[list(timesteps)]
        previous = np.append(alpha_bar[1:], 1.0)
        self.rows = np.stack(
            (
                1 / np.sqrt(alpha_bar),
                np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar),
                np.sqrt(previous),
                np.sqrt(1 - previous),
            ),
            axis=1,
        ).tolist()

    def step(self, eps: Tensor, k: int, x: Tensor, noise: None = None) -> Tensor:
        """The k-th step of the chain: x and eps [B, ...] -> the next x."""
        from_x, from_eps, to_x0, to_eps = self.rows[k]
        x0 = (x * from_x).sub_(eps * from_eps).clamp_(-1, 1)
        return x0.mul_(to_x0).add_(eps * to_eps)
