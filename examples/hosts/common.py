"""What the examples share: a network, and a comparison of a codebase's usual code with the same by fastdiff."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable
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


def bar(indices: range) -> Iterable[int]:
    """With a bar, as in ldm's loop, where tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return indices
    found: Iterable[int] = importlib.import_module("tqdm").tqdm(indices)
    return found


def compare(network: nn.Module, usual: Callable[[], Tensor], ours: Callable[[], Tensor], seconds: float = 0.5) -> None:
    """Runs both in turn, from one seed, for so long and 3 times at least; the images must be equal.

    Prints how long a run took, all of it and without the network, at the median. The first run of each is not timed.
    """
    calls: list[float] = []
    network.register_forward_pre_hook(lambda *_: calls.append(-time.perf_counter()))
    network.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    images: list[Any] = [None, None]
    whole: tuple[list[float], list[float]] = ([], [])
    steps: tuple[list[float], list[float]] = ([], [])
    end = math.inf
    while len(whole[0]) < 4 or time.perf_counter() < end:
        if len(whole[0]) == 1:
            end = time.perf_counter() + seconds
        for k, run in enumerate((usual, ours)):
            torch.manual_seed(1)
            calls.clear()
            start = time.perf_counter()
            images[k] = run()
            took = time.perf_counter() - start
            whole[k].append(took)
            steps[k].append(took - sum(calls))
    assert images[0].isfinite().all() and torch.equal(*images)
    print(f"{list(images[0].shape)}: the same images, bit for bit")
    for name, times in (("the whole run", whole), ("without the network", steps)):
        before, after = (1000 * statistics.median(runs[1:]) for runs in times)
        print(f"{name}: {before:.1f} ms as usual, {after:.1f} ms with fastdiff ({before / after:.2f} x)")
