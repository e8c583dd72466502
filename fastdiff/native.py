"""The native library: where it is, why it is not, and the one warning about that; and which kernels serve a device.

The library is built with the package (setup.py), never here. Loading it registers the kernels of the
operations that `fastdiff.ops` declares, and touches no CUDA device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torch

LIBRARY = Path(__file__).with_name("libfastdiff.so")
_HOW = (
    "With a C++ compiler and torch >= 2.10 installed, install fastdiff again from its source folder: "
    "pip install --force-reinstall --no-deps ."
)


@functools.cache
def load() -> str | None:
    """Load the library, once; never raises.

    Returns:
        None when its kernels are registered, else the reason why they are not, with what to do about it.
    """
    version = torch.__version__.split(".")
    if (int(version[0]), int(version[1])) < (2, 10):
        return f"it needs torch >= 2.10, this is torch {torch.__version__}."
    if not LIBRARY.exists():
        return f"it was not built when fastdiff was installed. {_HOW}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"it could not be loaded ({error}). {_HOW}"
    return None


def available() -> bool:
    """Whether the native kernels can be used in this process."""
    return load() is None


def why_not() -> str | None:
    """Why the native kernels cannot be used, for an error or a report; None when they can."""
    return load()


def built_with_cuda() -> bool:
    """Whether the library that is loaded has CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastdiff::step", "CUDA")


@functools.cache
def cuda_why_not(device: torch.device) -> str | None:
    """Why the native kernels cannot be used on a CUDA device, with what to do about it; None when they can.

    device: with an index. The library's code is asked for, nothing is run.
    """
    if load() is not None:
        return load()
    if not built_with_cuda():
        return (
            "the library was built without CUDA. With nvcc on the PATH (or CUDA_HOME set), install fastdiff again from "
            "its source folder: FASTDIFF_CUDA=1 pip install --force-reinstall --no-deps ."
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device."
    if not torch.ops.fastdiff.cuda_supports.default(device.index):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"the library holds no code for {torch.cuda.get_device_name(device)}, of compute capability "
            f"{major}.{minor}. Install fastdiff again from its source folder: "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor} pip install --force-reinstall --no-deps ."
        )
    return None


@functools.cache
def triton_why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be used on a device, with what to do about it; None when they can."""
    if device.type != "cuda":
        return f"they are for CUDA devices, not for {device.type}."
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton."
    version = importlib.import_module("triton").__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (3, 6):
        return f"they need triton >= 3.6, this is triton {version}: pip install --upgrade triton."
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return "Triton needs a C compiler: put gcc or clang on the PATH, or set CC."
    return None


def best(device: torch.device) -> Literal["native", "triton"] | None:
    """The kernels to use on a device: the library's where it can, else Triton's, else none (plain PyTorch).

    device: with an index unless it is the CPU.
    """
    return _best(device)


# torch.compiler.assume_constant_result would import the compiler to set just this: the answer is a constant
best._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _best(device: torch.device) -> Literal["native", "triton"] | None:
    if device.type == "cpu":
        return "native" if available() else None
    if device.type != "cuda":
        return None
    if cuda_why_not(device) is None:
        return "native"
    return "triton" if triton_why_not(device) is None else None


def stream_of(device: torch.device) -> int:
    """The current stream of a CUDA device, else 0: what is made on one stream need not be ready on another."""
    if device.type != "cuda":
        return 0
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def capturing(device: torch.device) -> bool:
    """Whether work for a device is being captured in a CUDA graph. A compiler that traces is told no."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


@functools.cache
def warn_once(device: torch.device) -> None:
    """Say, at the first call on a device only, that steps run through PyTorch there because there are no kernels."""
    reason = cuda_why_not(device) if device.type == "cuda" else load()
    if reason and device.type == "cuda":
        reason = f"{reason} The Triton kernels: {triton_why_not(device)}"
    if reason:
        where = "" if device.type == "cpu" else f" on {device}"
        warnings.warn(
            f"fastdiff runs through plain PyTorch{where}, without its native library: {reason}",
            RuntimeWarning,
            stacklevel=4,  # the caller of the public operation
        )
