"""Networks for the tests of bulk sampling, and the factories that make them in other processes."""

from __future__ import annotations

import time
from pathlib import Path

import torch


class Mixing:
    """A network whose outputs depend on the size of the batch and on what stands where in it.

    As those of real networks do in their last bits: samples made with another micro-batch, or another filling of it,
    are others. It counts its calls, and can be slow or fail in one of them.
    """

    def __init__(self, weight=0.3, *, seconds=0.0, fails_at=None, spoils=None, labels=4):
        generator = torch.Generator().manual_seed(0)
        self.weight, self.seconds, self.fails_at, self.spoils = weight, seconds, fails_at, spoils
        self.of_label = torch.randn(labels, generator=generator)
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


def slow():
    """Some 0.1 s for a micro-batch of two steps: time to be killed in."""
    return Mixing(seconds=0.05)


def quick():
    return Mixing()


def broken():
    """NaN for the samples of a class."""
    network = Mixing()

    def nan_for_class_three(x, t, y):
        m = network(x, t, y)
        m[(y == 3) & (t < 50)] = torch.nan
        return m

    return nan_for_class_three


def mortal(mark):
    """Kills its own process with signal 9 in its eighth call, unless the file `mark` says that it did so before."""
    import os
    import signal

    def die(network, x, t, m):
        if network.calls == 8:
            try:
                Path(mark).touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    return Mixing(seconds=0.05, spoils=die)
