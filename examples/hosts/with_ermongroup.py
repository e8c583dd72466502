"""ermongroup/ddim: the sampling of runners/diffusion.py with one import changed.

- from functions.denoising import generalized_steps
+ from fastdiff.integrations.ermongroup import generalized_steps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Network, compare
from torch import Tensor

from fastdiff.integrations.ermongroup import generalized_steps

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()


def compute_alpha(b: Tensor, t: Tensor) -> Tensor:
    return torch.cat([b.new_ones(1), 1 - b]).cumprod(0)[t.long() + 1].reshape(-1, 1, 1, 1)


@torch.no_grad()
def usual_steps(
    x: Tensor, seq: Sequence[int], model: Network, b: Tensor, eta: float
) -> tuple[list[Tensor], list[Tensor]]:
    """What functions/denoising.py computes, on any device."""
    xs, x0_preds = [x], []
    for i, j in zip(seq[::-1], [*seq[-2::-1], -1], strict=True):
        t = torch.full((len(x),), float(i))
        at, at_next = compute_alpha(b, t), compute_alpha(b, torch.full_like(t, j))
        e = model(xs[-1], t)
        x0_preds.append((xs[-1] - e * (1 - at).sqrt()) / at.sqrt())
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        c2 = ((1 - at_next) - c1**2).sqrt()
        xs.append(at_next.sqrt() * x0_preds[-1] + c1 * torch.randn_like(x) + c2 * e)
    return xs, x0_preds


def main() -> None:
    model, seq = Network(), list(range(0, 1000, 20))

    def sample(steps: Callable[..., Any]) -> Tensor:
        x = torch.randn(4, 3, 32, 32)
        xs, _ = steps(x, seq, model, BETAS, eta=1.0)
        images: Tensor = xs[-1]
        return images

    compare(model, lambda: sample(usual_steps), lambda: sample(generalized_steps))


if __name__ == "__main__":
    main()
