"""What the examples share: a network, and a comparison of a codebase's usual code with the same by fastdiff."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A small convolutional network with random weights, [B, 3, H, W] and a time to [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.time, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(1, 16), nn.Conv2d(16, 3, 1)
        self.seconds = 0.0  # spent in forward

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, c: Any = None) -> Tensor:
        start = time.perf_counter()
        told = self.time(t.reshape(-1, 1).float() / 1000)[:, :, None, None]
        found: Tensor = self.leave(nn.functional.silu(self.enter(x) + told))
        self.seconds += time.perf_counter() - start
        return found


def compare(network: Network, usual: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int = 5) -> None:
    """Runs both from one seed; the images must be equal. Prints how long they took, at best."""
    images, best, steps = [torch.empty(0)] * 2, [float("inf")] * 2, [float("inf")] * 2
    for _ in range(repeats):
        for k, run in enumerate((usual, ours)):
            torch.manual_seed(1)
            network.seconds, start = 0.0, time.perf_counter()
            images[k] = run()
            seconds = time.perf_counter() - start
            best[k], steps[k] = min(best[k], seconds), min(steps[k], seconds - network.seconds)
    assert torch.isfinite(images[0]).all() and torch.equal(*images)
    print(f"{list(images[0].shape)}: the same images, bit for bit")
    for name, (before, after) in (("the whole run", best), ("without the network", steps)):
        print(f"{name}: {1000 * before:.1f} ms as usual, {1000 * after:.1f} ms with fastdiff ({before / after:.2f} x)")
