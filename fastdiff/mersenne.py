"""torch.randn on a CPU, in a fraction of its time: the same numbers, from the same generator, which moves as far.

torch draws from its Mersenne Twister one number after the other. csrc/torch_normal.cpp takes eight at a time from a
copy of the generator's state, and the state is then put back. The bits are an implementation detail of torch, so that
they are compared at the first use, and where they differ, or where there is no such kernel, torch draws itself.

Between the copy and its return the generator is not held: a thread that draws from the same generator by torch's own
functions just then may be given some of the same numbers.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import native

_LEAST = 1024  # elements from which it is faster

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("torch_normal(Tensor(a!) out, Tensor(b!) state) -> ()")
torch.library.register_fake("fastdiff::torch_normal", lambda out, state: None)
_op = torch.ops.fastdiff.torch_normal.default
_torch_randn, _torch_randn_like = torch.randn, torch.randn_like
# two threads must not take the same numbers
_locks: WeakKeyDictionary[torch.Generator, threading.Lock] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # nobody is left to release one that was held


def randn(shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """torch.randn(shape, generator=generator, dtype=dtype) on the CPU.

    generator: of the CPU; None for torch's default one.
    """
    if (
        dtype is torch.float32
        and math.prod(shape) >= _LEAST
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    ):
        out = torch.empty(shape, dtype=dtype, device="cpu")
        if type(out) is Tensor and _same_bits():  # and not a tracer's, without values
            generator = torch.default_generator if generator is None else generator
            with _locks.setdefault(generator, threading.Lock()):
                state = generator.get_state()
                _op(out, state)
                generator.set_state(state)
            return out
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


# For code that calls torch's functions by name: whoever has put one of their own in their place is given its numbers.


def default_randn(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """torch.randn(shape, device=device), from torch's default generator."""
    if torch.randn is _torch_randn and device.type == "cpu":
        return randn(shape, None, torch.get_default_dtype())
    return torch.randn(shape, device=device)


def randn_like(x: Tensor) -> Tensor:
    """torch.randn_like(x), from torch's default generator."""
    if torch.randn_like is _torch_randn_like and x.is_cpu and type(x) is Tensor and x.is_contiguous():
        return randn(x.shape, None, x.dtype)
    return torch.randn_like(x)


@functools.cache
def _same_bits() -> bool:
    """Whether the kernel gives the numbers of torch here, and leaves the generator as torch does."""
    if not native.available() or not torch._C._dispatch_has_kernel_for_dispatch_key("fastdiff::torch_normal", "CPU"):
        return False
    theirs, ours = torch.Generator().manual_seed(2026), torch.Generator().manual_seed(2026)
    with torch.inference_mode(False):
        for elements in (16, 1000, 2**16, 625):
            found, state = torch.empty(elements, dtype=torch.float32, device="cpu"), ours.get_state()
            try:
                _op(found, state)
            except RuntimeError:  # of a CPU that lacks the instructions
                return False
            ours.set_state(state)
            same = torch.equal(found, torch.randn(elements, generator=theirs, dtype=torch.float32, device="cpu"))
            if not (same and torch.equal(ours.get_state(), theirs.get_state())):
                return False
    return True
