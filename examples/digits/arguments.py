"""What the command lines of this example have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """The number that an option gives, an integer of at least 1: a `type` for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return number


def require_writable(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    """Make the folder of `path`; exit with a usage error where no file can be written at `path`. No file is changed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        parser.error(f"argument {option}: cannot write {path}: {error.strerror}")
