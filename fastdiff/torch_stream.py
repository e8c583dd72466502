"""torch's own CUDA normals, drawn inside a step instead of by torch.randn: the same values, the same generator state.

torch.randn on CUDA lets `threads` threads draw four normals at a time from Philox4x32-10 (cuRAND's), each from a
subsequence of its own: thread i makes elements i + threads*(4*j + k), k = 0 to 3, in its j-th draw. How many threads
there are depends on the number of elements and on the GPU; the generator is moved by four for every j. The kernel
(csrc/step_cuda.h, `torch_normals`) does the same where it needs the noise.

This is an implementation detail of torch, though one that has not changed for years; so it is compared with torch.randn
at the first use on each device, and where the two differ, the noise is drawn by torch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .noise import on
from .tables import COLUMN, Structure

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes whose normals are made four at a time; those of float64 are drawn by torch."""

_BLOCK = 256  # threads of a block of torch's kernel
# x' = z in two ways: through the kernel that a step of DDPM takes, and through the one for everything
_CHECKED = (Structure(ax=True, variance="fixed"), Structure(x0="output", variance="fixed"))


class Draw(NamedTuple):
    """Where the draw of a step begins: the last arguments of the operator step_torch.

    state: int64 [2] in device memory, seed and offset, for a step in a captured graph; else None.
    seed, offset: of the generator; where there is a state, offset is counted from its.
    threads: those of torch's kernel for this number of elements.
    """

    state: Tensor | None
    seed: int
    offset: int
    threads: int


def threads_for(elements: int, multiprocessors: int, threads_each: int) -> int:
    """The threads that torch.randn runs for a number of elements, on a GPU with these multiprocessors."""
    return min(-(-elements // _BLOCK), multiprocessors * (threads_each // _BLOCK)) * _BLOCK


def advance_for(elements: int, threads: int) -> int:
    """How far torch.randn moves the offset of its generator."""
    return ((elements - 1) // (4 * threads) + 1) * 4


class Recorder:
    """The draws of steps that are being captured in a graph, from a generator whose state is filled in at each replay.

    state: int64 [2] on the device, seed and offset, read by the captured steps.
    total: how far one replay moves the generator.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.state = torch.zeros(2, dtype=torch.int64, device=device)
        self.total = 0

    def load(self) -> None:
        """Before a replay: hand the generator's state to the graph, and move the generator as the replay will."""
        seed, offset = self.generator.initial_seed(), self.generator.get_offset()
        # two small kernels, as torch has for its own graphs: no memory of the host that a later replay could overwrite
        self.state[0].fill_(_signed(seed))
        self.state[1].fill_(_signed(offset))
        self.generator.set_offset(offset + self.total)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, steps with this generator take their draws from `state`."""
        self.total = 0
        _recorders[id(self.generator)] = self
        try:
            yield
        finally:
            del _recorders[id(self.generator)]


_recorders: dict[int, Recorder] = {}  # those that are recording, by generator


def available(generator: torch.Generator, x: Tensor) -> bool:
    """Whether the normals that torch.randn(x.shape, generator=generator, ...) would give can be made in a kernel."""
    if not x.is_cuda or not on(generator, x.device) or x.dtype not in DTYPES or x.numel() == 0:
        return False
    # beyond 32-bit offsets torch splits the tensor, and draws for each part
    if (x.numel() - 1) * x.element_size() + 1 > 2**31 - 1:
        return False
    if native.capturing(x.device) and id(generator) not in _recorders:
        return False
    return verified(x.device, x.dtype)


def take(generator: torch.Generator, x: Tensor) -> Draw:
    """The draw that torch.randn would make for x, and the generator moved past it. Only where `available`."""
    elements = x.numel()
    threads = _threads(elements, x.device)
    moved = advance_for(elements, threads)
    recorder = _recorders.get(id(generator))
    if recorder is not None:
        draw = Draw(recorder.state, 0, recorder.total, threads)
        recorder.total += moved
        return draw
    offset = generator.get_offset()
    generator.set_offset(offset + moved)
    return Draw(None, _signed(generator.initial_seed()), _signed(offset), threads)


_verified: dict[tuple[torch.device, torch.dtype], bool] = {}


def verified(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel's normals are those of torch.randn on this device, found out once by comparing them.

    The first time it waits for the device; during a capture, where it cannot, the answer is then no.
    """
    known = _verified.get((device, dtype))
    if known is None:
        if native.capturing(device):
            return False
        with sync_debug_mode(0), torch.cuda.device(device):
            most = _threads(2**40, device)
            sizes = (1, 1000, most, most + 3, 5 * most + 260)
            known = all(_same(elements, device, dtype) for elements in sizes)
        _verified[device, dtype] = known
    return known


@contextmanager
def sync_debug_mode(mode: int) -> Iterator[None]:
    """Within it torch says nothing (0) or raises (2) where the host is about to wait for the GPU."""

    def switch(to: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the mode is a prototype
            torch.cuda.set_sync_debug_mode(to)

    before = torch.cuda.get_sync_debug_mode()
    switch(mode)
    try:
        yield
    finally:
        switch(before)


def _same(elements: int, device: torch.device, dtype: torch.dtype) -> bool:
    for structure in _CHECKED:
        theirs, ours = (torch.Generator(device).manual_seed(0x9E3779B97F4A7C15) for _ in range(2))
        for generator in (theirs, ours):
            generator.set_offset(4)
        expected = torch.randn(1, elements, generator=theirs, dtype=dtype, device=device)
        rows = torch.zeros(1, len(COLUMN))
        rows[0, COLUMN["s"]] = 1.0
        x = torch.zeros_like(expected)
        operands = torch.empty_like(x), None, x, x, None, None
        step = torch.ops.fastdiff.step_torch.default
        step(*operands, rows.to(device), None, None, 0, structure.flags, *take(ours, x))
        if not torch.equal(operands[0], expected) or ours.get_offset() != theirs.get_offset():
            return False
    return True


def _threads(elements: int, device: torch.device) -> int:
    multiprocessors, threads_each = _geometry(device)
    return threads_for(elements, multiprocessors, threads_each)


@functools.cache
def _geometry(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word
