"""The native library: where it is, why it is not, and the one warning about that.

The library is built with the package (setup.py), never here. Loading it registers the kernels of the
operations that `fastdiff.ops` declares, and touches no CUDA device.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

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


@functools.cache
def warn_once() -> None:
    """Say, at the first call only, that steps run through PyTorch because the library is missing."""
    reason = load()
    if reason:
        warnings.warn(
            f"fastdiff runs through plain PyTorch, without its native library: {reason}",
            RuntimeWarning,
            stacklevel=4,  # the caller of the public operation
        )
