"""`python -m fastdiff.bulk`: sample | merge | verify | status.

    torchrun --nproc-per-node 8 -m fastdiff.bulk sample run.toml seed=1 --out samples
    python -m fastdiff.bulk merge samples --npz samples.npz
    python -m fastdiff.bulk verify run.toml seed=1 --out samples --random 100
    python -m fastdiff.bulk status samples

Exit status: 0; 1 for a run that failed, samples that differ or are not all there; 2 for usage and settings; 130 after
an interruption. What factories, networks and decoders raise is shown with its traceback.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from .. import factories
from . import engine
from .export import merge
from .folder import status
from .settings import load
from .verify import verify
from .worker import sample

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


def _sample(arguments: argparse.Namespace) -> int:
    rank, world_size, local_rank = _process(arguments)
    run, inexact = _run(arguments, local_rank)
    sample(**run, rank=rank, world_size=world_size, inexact=arguments.inexact or inexact, progress=not arguments.quiet)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    run, _ = _run(arguments, 0)
    indices = arguments.index
    if indices is None:
        count = run["job"].samples
        # not from the module's generator, which a factory may have seeded
        indices = sorted(random.SystemRandom().sample(range(count), min(arguments.random, count)))
    checked = verify(**run, indices=indices)
    for one in checked:
        if not one.equal:
            print(f"sample {one.index}: other bits, largest difference {one.difference:.3g}")
    equal = sum(one.equal for one in checked)
    print(f"{equal} of {len(checked)} samples equal bit for bit")
    return 0 if equal == len(checked) else 1


def _merge(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in ("npz", "png", "npy", "names", "labels")}
    merge(arguments.folder, **{name: value for name, value in given.items() if value is not None})
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found = status(arguments.folder)
    print(found)
    return 0 if found.complete else 1


def _process(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """(rank, world size, local rank): of the command, else of the environment."""
    given = arguments.rank, arguments.world_size
    if given == (None, None):
        return engine.rank_of()
    if None in given:
        name = "--rank" if arguments.rank is None else "--world-size"
        raise ValueError(f"{name}: expected --rank and --world-size, both or neither, got nothing")
    return arguments.rank, arguments.world_size, arguments.rank


def _run(arguments: argparse.Namespace, local_rank: int) -> tuple[dict[str, Any], bool]:
    """(what `sample` and `verify` take of the settings, whether they are to go on with other bits)."""
    loaded = load(*arguments.settings)
    out = loaded.out if arguments.out is None else Path(arguments.out)
    if out is None or arguments.out == "":
        raise ValueError("out: expected a folder, by --out or in the settings, got nothing")
    device = engine.device_of(local_rank, loaded.device if arguments.device is None else arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for factories that say "cuda"
    network, decode = loaded.make(device)
    run = {"job": loaded.job, "network": network, "out": out, "decode": decode, "device": device}
    return run, loaded.inexact


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m fastdiff.bulk",
        description="N samples by index: any number of processes, always the same samples, and none lost.",
        epilog="exit status: 0; 1, the run failed, or samples differ or are not all there; 2, usage and settings",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(function=function)
        return made

    with_settings = [
        command("sample", _sample, "make the samples; run again, it goes on where it was stopped"),
        command("verify", _verify, "make chosen samples again, and compare them with those in the folder"),
    ]
    for made in with_settings:
        made.add_argument(
            "settings",
            nargs="+",
            metavar="SETTINGS",
            help="TOML files and key=value, such as sampler.steps=100; later ones win",
        )
        made.add_argument("--out", metavar="DIR", help="the folder of the run (default: out of the settings)")
        made.add_argument("--device", help="default: the settings', else the GPU of the local rank, else cpu")
    made = with_settings[0]
    made.add_argument("--rank", type=int, help="of this process (default: as torchrun, accelerate or srun set it)")
    made.add_argument("--world-size", type=int, help="how many processes there are (default: as --rank)")
    made.add_argument("--inexact", action="store_true", help="go on where the network gives other bits than before")
    made.add_argument("--quiet", action="store_true", help="no progress line")
    which = with_settings[1].add_mutually_exclusive_group(required=True)
    which.add_argument("--index", type=int, nargs="+", metavar="I", help="the indices of these samples")
    which.add_argument("--random", type=_positive, metavar="K", help="so many, drawn anew each time")

    made = command("merge", _merge, "write all samples of a run that is done into one file, or as images")
    made.add_argument("folder", metavar="DIR", help="the folder of the run")
    target = made.add_mutually_exclusive_group(required=True)
    target.add_argument("--npz", metavar="FILE", help="arr_0, uint8 [N, H, W, C]")
    target.add_argument("--png", metavar="DIR", help="a folder of PNG files")
    target.add_argument("--npy", metavar="FILE", help="the samples as they are stored, [N, ...]")
    made.add_argument(
        "--names", metavar="PATTERN", help="of the PNG files, such as {y}/{index:06}.png (default: {index:06}.png)"
    )
    made.add_argument("--labels", metavar="NAME", help="this condition as arr_1 of the .npz")

    made = command("status", _status, "tell how many samples are done")
    made.add_argument("folder", metavar="DIR", help="the folder of the run")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _parsed(words: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and ("settings" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings behind an option
        arguments.settings += rest
    return arguments


def _tell(line: str) -> None:
    print(f"fastdiff.bulk: {line}", file=sys.stderr, flush=True)


def _is_own(error: Exception) -> bool:
    """Whether fastdiff raised it itself, so that its message says everything."""
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError)):
        return False
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)


def main(words: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = _parsed(words)
    try:
        with factories.without_arguments():
            code: int = arguments.function(arguments)
        return code
    except KeyboardInterrupt:
        _tell("interrupted; what was finished stays, and the same command goes on from there")
        return 130
    except factories.FactoryError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        _tell(str(error))
        return 2
    except Exception as error:
        if _is_own(error):
            _tell(str(error))
            return 2 if isinstance(error, (ValueError, TypeError)) else 1
        traceback.print_exception(error)
        _tell(f"the run failed: {type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
