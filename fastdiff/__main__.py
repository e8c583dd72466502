"""`python -m fastdiff`: versions, and which backends are live here and why the others are not.

`python -m fastdiff check module:factory` compares a run of your own with and without fastdiff (`fastdiff.check`).
`python -m fastdiff.bulk` is a command of its own, which samples by the thousand (`fastdiff.bulk`).
"""

import argparse
import platform
import sys
from importlib import metadata

import torch

from . import __version__, check, native


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native_cuda() -> str | None:
    """Why the native CUDA kernels cannot run; None when they can."""
    if not native.available():
        return native.why_not()
    if not native.built_with_cuda():
        return "the library has no CUDA kernels (they are built where nvcc is)."
    return native.cuda_why_not(torch.device("cuda", 0)) if torch.cuda.is_available() else _no_cuda()


def _triton() -> str | None:
    """Why the Triton kernels cannot run; None when they can."""
    return native.triton_why_not(torch.device("cuda", 0)) or (None if torch.cuda.is_available() else _no_cuda())


def _no_cuda() -> str:
    return f"torch {torch.__version__} finds no CUDA device."


def _isa(backend: str, reason: str | None) -> str:
    if backend != "native cpu" or reason is not None:
        return ""
    names = ("baseline instructions", "AVX2", "AVX-512") if platform.machine() == "x86_64" else ("",)
    name = names[torch.ops.fastdiff.cpu_isa(-1)]
    return f" ({name})" if name else ""


def report() -> None:
    print(f"fastdiff {__version__}")
    print(f"  python    {platform.python_version()} on {platform.platform()}")
    print(f"  torch     {torch.__version__}")
    for package in ("numpy", "triton"):
        print(f"  {package:<9} {_version(package)}")
    print("backends")
    reasons = {
        "native cpu": native.why_not(),
        "native cuda": _native_cuda(),
        "triton": _triton(),
        "reference": None,
    }
    for backend, reason in reasons.items():
        print(f"  {backend:<12} {'live' if reason is None else f'no: {reason}'}{_isa(backend, reason)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m fastdiff",
        description="Without a command: versions, and which backends are live here.",
        epilog="`python -m fastdiff.bulk --help`: samples by the thousand, by any number of processes.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    check.add_arguments(commands.add_parser("check", help="compare a run of your own with and without fastdiff"))
    arguments = parser.parse_args()
    if arguments.command == "check":
        return check.main(arguments)
    report()
    return 0


if __name__ == "__main__":
    if status := main():
        sys.exit(status)
