"""What the examples share: a network, and a comparison of a codebase's usual code with the same by fastdiff."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A small convolutional network with random weights: an image [B, 3, H, W] and a time to eps, like the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.time, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(1, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time(t.reshape(-1, 1).float() / 1000)[:, :, None, None]
        found: Tensor = self.leave(nn.functional.silu(self.enter(x) + told))
        return found


def compare(network: nn.Module, usual: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int = 3) -> None:
    """Runs both from one seed; the images must be equal. Prints how long they took, at best."""
    calls: list[float] = []
    network.register_forward_pre_hook(lambda *_: calls.append(-time.perf_counter()))
    network.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    images: list[Any] = [None, None]
    best, steps = [float("inf")] * 2, [float("inf")] * 2
    for _ in range(repeats):
        for k, run in enumerate((usual, ours)):
            torch.manual_seed(1)
            calls.clear()
            start = time.perf_counter()
            images[k] = run()
            seconds = time.perf_counter() - start
            best[k], steps[k] = min(best[k], seconds), min(steps[k], seconds - sum(calls))
    assert images[0].isfinite().all() and torch.equal(*images)
    print(f"{list(images[0].shape)}: the same images, bit for bit")
    for name, (before, after) in (("the whole run", best), ("without the network", steps)):
        print(f"{name}: {1000 * before:.1f} ms as usual, {1000 * after:.1f} ms with fastdiff ({before / after:.2f} x)")
