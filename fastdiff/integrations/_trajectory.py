"""The states of a chain, kept on the CPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class OnCPU:
    """A list of tensors on the CPU, to which copies from CUDA are made while the device goes on.

    Two copies at a time are under way to pinned memory, which is scarce; what has arrived gets memory of its own.
    """

    def __init__(self) -> None:
        self.arrived: list[Tensor] = []
        self.under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def add(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            self.arrived.append(tensor.cpu())
            return
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self.under_way.append((pinned, event))
        if len(self.under_way) > 2:
            self._land()

    def _land(self) -> None:
        pinned, event = self.under_way.popleft()
        event.synchronize()
        self.arrived.append(pinned.clone())

    def finish(self) -> list[Tensor]:
        while self.under_way:
            self._land()
        return self.arrived
