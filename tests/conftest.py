"""Settings that all tests share, and the kernels that the tests of the operations run on."""

from collections.abc import Iterator

import host_kernels
import pytest
import torch
from hypothesis import settings

from fastdiff import native, ops

# Tests run in as many processes as there are cores; tests of threads set their number themselves.
torch.set_num_threads(1)

# First calls compile or load things, so a deadline per example says nothing. The examples are the same in
# every run: a failure is found again.
settings.register_profile("fastdiff", deadline=None, derandomize=True)
settings.load_profile("fastdiff")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the tests of a module on the kernels of the CPU, and on those of CUDA, which then run on the CPU too."""
    if request.param == "cpu" or not native.available():
        yield "cpu"
        return
    reason = host_kernels.load()
    if reason is not None:
        pytest.skip(reason)
    operators = host_kernels.operators()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_step_row_op", operators.step_row.default)
        patch.setattr(ops, "_step_op", operators.step.default)
        kernels = ops._Kernels(*(getattr(operators, name).default for name in ops._Kernels._fields))
        patch.setitem(ops._KERNELS, "native", kernels)
        yield "cuda"
