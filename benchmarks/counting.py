"""What one call of a step costs besides time: operations, reads, bytes moved, allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# they hand out memory or an alias of it, and compute nothing
_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
# what they write, they do not read before
_OVERWRITE = {"normal_", "copy_", "fill_", "zero_", "uniform_", "random_"}


class OperationCount(TorchDispatchMode):
    """Counts the operations that torch runs inside of it; one of fastdiff's counts like any other.

    elements: of the tensors that matter. An operation is full-size where it writes a tensor of at least half and at
    most four times as many: on a GPU a launch. Any other, on coefficients, is small; views are not counted.

    launches, small_operations: how many of them there were.
    reads: times that the host read a number from a tensor (`.item()` and the like): waits on a GPU, where the tensor is
    there and not on the CPU.
    moved_bytes: what the full-size operations read and wrote of such tensors; of an expanded one only what is in
    memory.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.launches = self.small_operations = self.reads = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.reads += 1
        elif not func.is_view and name not in _NO_WORK:
            self._count(func, name, args, kwargs, result)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        reads, writes = [], []
        # arguments that are left out have their defaults, which are no tensors
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            tensors = _tensors(value)
            written = argument.alias_info is not None and argument.alias_info.is_write
            writes += tensors if written else []
            overwritten = argument.is_out or name in _OVERWRITE or func.namespace == "fastdiff"
            # of a table one row is read, of the model of a new tensor nothing
            idle = written and overwritten or name.endswith("_like") or argument.name == "table"
            reads += [] if idle else tensors
        given = {id(tensor) for tensor in writes}
        writes += [tensor for tensor in _tensors(result) if id(tensor) not in given]
        if any(self.is_full_size(tensor) for tensor in writes):
            self.launches += 1
            self.moved_bytes += sum(_bytes(tensor) for tensor in reads + writes if self.is_full_size(tensor))
        else:
            self.small_operations += 1

    def is_full_size(self, tensor: Tensor) -> bool:
        return self.elements <= 2 * tensor.numel() <= 8 * self.elements


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, tuple | list) else []


def _bytes(tensor: Tensor) -> int:
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def operations(call: Callable[[], object], elements: int) -> dict[str, int]:
    """The counts of `OperationCount` over one call."""
    with OperationCount(elements) as count:
        call()
    names = ("launches", "small_operations", "reads", "moved_bytes")
    return {name: getattr(count, name) for name in names}


def allocations(call: Callable[[], object], device: str) -> dict[str, int]:
    """How often torch's allocator hands out memory during one call, and how many bytes."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_stats(device)
        call()
        after = torch.cuda.memory_stats(device)
        keys = {"allocations": "allocation.all.allocated", "allocated_bytes": "requested_bytes.all.allocated"}
        return {name: after[key] - before[key] for name, key in keys.items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # those that are given back count below zero
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    handed_out = [size for size in sizes if size > 0]
    return {"allocations": len(handed_out), "allocated_bytes": sum(handed_out)}
