"""Networks for the tests of bulk sampling, and the factories that make them in other processes."""

from __future__ import annotations

import time
from pathlib import Path

import torch


class Mixing:
    """A network whose outputs depend on the size of the batch and on what stands where in it.

    As those of real networks do in their last bits: samples made with another micro-batch, or another filling of it,
    are others. It counts its calls, can be slow, fail in one of them, and hand itself, x, t and m to `spoils`.
    """

    def __init__(self, weight=0.3, *, seconds=0.0, fails_at=None, spoils=None):
        self.weight, self.seconds, self.fails_at, self.spoils = weight, seconds, fails_at, spoils
        self.of_label = torch.tensor([1.5, -0.3, -2.2, 0.6])
        self.calls = 0

    def __call__(self, x, t, y=None, scale=None):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("the network went away")
        if self.seconds:
            time.sleep(self.seconds)
        row = (-1, *[1] * (x.dim() - 1))
        places = torch.linspace(0, 1, len(x), dtype=x.dtype).reshape(row)
        m = self.weight * x + 0.1 * x.mean(0) + 0.05 * places + 0.001 * t.to(x.dtype).reshape(row)
        if y is not None:
            m = m + self.of_label[y].to(x.dtype).reshape(row)
        if scale is not None:
            m = m * scale.to(x.dtype).reshape(-1, *scale.shape[1:], *[1] * (x.dim() - scale.dim()))
        if self.spoils is not None:
            self.spoils(self, x, t, m)
        return m


def quick():
    return Mixing()


def gated(gate, calls):
    """The same, but after so many calls it waits until there is a file `gate`."""

    def wait(network, x, t, m):
        begin = time.monotonic()
        while network.calls > calls and not Path(gate).exists():
            if time.monotonic() - begin > 60:
                raise TimeoutError(f"{gate} was not made")
            time.sleep(0.01)

    return Mixing(spoils=wait)


def broken():
    """NaN for the samples of class 3."""

    def spoil(x, t, y):
        m = network(x, t, y)
        if t[0] < 50:
            m[y == 3] = torch.nan
        return m

    network = Mixing()
    return spoil
