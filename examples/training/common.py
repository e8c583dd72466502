"""What the three examples share: the digits of examples/digits, the command line, and the picture at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "digits"))

import arguments  # noqa: E402
import data  # noqa: E402
import model  # noqa: E402
import page  # noqa: E402

__all__ = ["command_line", "curve", "data", "digit", "digits", "model", "parse", "save"]

COLUMNS, SCALE = 10, 6  # digits in a row, pixels for one of theirs
WIDTH, HEIGHT, MARGIN, LINE = 507, 140, 12, 22  # of a row of digits, of a curve, around all, of a line of text
INK, LINES, MARK = "#1c1c1a", "#dcdcd4", "#1f6f5c"


def digit(text: str) -> int:
    """A digit that an option gives: a `type` for argparse."""
    if len(text) != 1 or text not in "0123456789":
        raise argparse.ArgumentTypeError(f"expected a digit, 0 to 9, got {text!r}")
    return int(text)


def command_line(description: str | None, name: str, **counts: tuple[int, str]) -> argparse.ArgumentParser:
    """Options for counts, each a default and a help, for torch's threads, and for the picture build/`name`.png."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts["threads"] = 1, "threads of torch; the network is small"
    for option, (default, text) in counts.items():
        parser.add_argument(f"--{option}", type=arguments.positive, default=default, help=f"{text} ({default})")
    parser.add_argument("--picture", type=Path, default=ROOT / "build" / f"{name}.png", help="where the picture goes")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line, which are checked before any work; torch is told of the threads."""
    options = parser.parse_args()
    arguments.require_writable(parser, "--picture", options.picture)
    torch.set_num_threads(options.threads)
    return options


def digits(images: Tensor) -> Image.Image:
    """Images [N, 1, 8, 8] in rows of ten."""
    return page.tiles(images, COLUMNS, SCALE)


def curve(values: Sequence[float], form: str) -> Image.Image:
    """Values over their numbers, 1 to N, the axes labelled at their ends; form: of a value, as "{:.1f}"."""
    picture = Image.new("LA", (WIDTH, HEIGHT)).convert("RGBA")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    low, high = min(values), max(values)
    left, right, top, bottom = 60, WIDTH - 10, 10, HEIGHT - LINE - 2
    for value, y in ((high, top), (low, bottom)):
        draw.line((left, y, right, y), LINES)
        draw.text((left - 8, y), form.format(value), INK, font, anchor="rm")
    for number, x in ((1, left), (len(values), right)):
        draw.text((x, bottom + 4), f"{number}", INK, font, anchor="ma")
    across, up = max(len(values) - 1, 1), (high - low) or 1.0
    line = [
        (left + (right - left) * k / across, bottom - (bottom - top) * (value - low) / up)
        for k, value in enumerate(values)
    ]
    draw.line(line, MARK, 2, joint="curve")
    return picture


def save(path: Path, *parts: tuple[str, Image.Image]) -> None:
    """Write captions and pictures, each under the one before, to a PNG file."""
    height = sum(LINE + picture.height + MARGIN for _, picture in parts) + MARGIN
    canvas = Image.new("RGB", (WIDTH + 2 * MARGIN, height), "white")
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(14), MARGIN
    for caption, picture in parts:
        draw.text((MARGIN, y), caption, INK, font)
        picture = picture.convert("RGBA")
        canvas.paste(picture, (MARGIN, y + LINE), picture)
        y += LINE + picture.height + MARGIN
    canvas.save(path, "PNG", optimize=True)
    print(f"picture: {path}")
