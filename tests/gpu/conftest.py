"""What the GPU tests share: the device, the kernels to test on it, and a record of what was compared.

FASTDIFF_GPU_TESTS_ON_CPU=1 runs those tests on CPU tensors that mean something there: a rehearsal of the tests
themselves. FASTDIFF_GPU_RECORD names a file that `record` adds lines of JSON to.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from fastdiff import native, ops

REASON = "needs a CUDA device"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("FASTDIFF_GPU_TESTS_ON_CPU") == "1":
        return torch.device("cpu")
    pytest.skip(REASON)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The GPU, for tests that mean nothing elsewhere."""
    if device.type != "cuda":
        pytest.skip(REASON)
    return device


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Kernels that can run on the device; tests of others are skipped, and test_auto_takes_the_library tells."""
    name: str = request.param
    if name == "triton":
        reason = native.triton_why_not(device)
    else:
        reason = native.cuda_why_not(device) if device.type == "cuda" else native.why_not()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    assert name in ops.BACKENDS
    return name


@pytest.fixture
def strict_sync(gpu: torch.device) -> Any:
    """Within it, waiting for the device is an error."""

    class Strict:
        def __enter__(self) -> None:
            self.before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode(self.before)

    return Strict()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Any:
    """record(case, **values): one line of JSON, so that a report can tell which cases were equal."""

    def write(case: str, **values: Any) -> None:
        path = os.environ.get("FASTDIFF_GPU_RECORD")
        if path:
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name, "case": case} | values) + "\n")

    return write
