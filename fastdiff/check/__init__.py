"""`python -m fastdiff check module:factory`: a run of your own with and without fastdiff, and whether it is worth it.

    def factory():  # in my_module.py
        pipe = DDIMPipeline.from_pretrained(...)
        return pipe, lambda pipe: pipe(generator=torch.Generator().manual_seed(0), output_type="pt")

The factory returns one of

- an object that `fastdiff.enable` takes and that is run without arguments: a diffusers pipeline without a prompt, or
  a GaussianDiffusion of lucidrains;
- (object, run): run(object) samples once and returns tensors, arrays or images, alone or in lists, dicts and
  dataclasses. The object is what `fastdiff.enable` takes, such as the scheduler of a policy that run calls; or a
  sampler of fastdiff itself, which is compared with its reference backend;
- (theirs, ours): two functions without arguments, for code that is changed by an import.

The network may stand behind the two, a torch.nn.Module, where it cannot be found: that of a lone scheduler's run, or of
two functions. In those, and in the run of lucidrains' objects, all that is not the network counts as the steps.

Every run starts from the same seed of torch, NumPy and random. Whole runs are timed with nothing in between, the two
sides in turn; the time in steps and network is taken in further runs of their own. For those, wrappers lie on the
methods of the object's class and on its networks, so that steps of copies are seen too; they are taken off again, and
the object is left enabled or not as it came. The module and its factory see no arguments in sys.argv.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__, factories, native
from ..integrations import _host
from .report import Report, seconds
from .results import compare, first_difference, kept
from .subjects import CheckError, Subject, subject_of
from .watch import Record, Timer, finished, now

__all__ = ["CheckError", "Report", "RunError", "check"]

_WARNING = "fastdiff: the original step is kept"
_ROUND, _REPEATS = 0.1, 100  # shorter runs than these seconds are repeated in each round, at most so many times


class RunError(Exception):
    """A run raised; the cause is what it raised."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(f"the run {'with' if enabled else 'without'} fastdiff raised")
        self.enabled = enabled


def check(
    made: Any,
    *,
    noise: _host.Noise | None = None,
    seed: int = 0,
    runs: int = 3,
    tell: Callable[[str], object] = lambda line: None,
) -> Report:
    """Run what a factory made with and without fastdiff, and compare.

    Args:
        made: what a factory returns (see this file's first lines).
        noise: as for `fastdiff.enable`; None for "torch", or for what an object has that is enabled already.
        seed: of torch, NumPy and random, before every run.
        runs: how many whole runs of each side are timed, and how many more with the time in steps; of runs below 0.1 s
            as many rounds of several. There are four runs more before: one of each side to warm up, and one of each
            whose states are recorded.
        tell: called with lines about what goes on.

    Returns:
        The Report. The object is again as it came, also after an exception.

    Raises:
        CheckError: what was made, or what its run returned, is nothing to check.  RunError: a run raised.
    """
    subject = subject_of(made, noise=noise, seed=seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _WARNING, RuntimeWarning)
            return _check(subject, seed, runs, tell)
    finally:
        subject.restore()


def _check(subject: Subject, seed: int, runs: int, tell: Callable[[str], object]) -> Report:
    enabling = subject.enabling
    noise = "torch" if enabling is None else enabling.options.noise
    report = Report(subject.host, subject.name, noise, seed, notes=subject.notes)
    took, _ = _run(subject, False, seed)
    tell(f"the first run took {seconds(took)}; {4 * runs + 3} more follow")

    if enabling is not None:
        enabling.use_torch_noise()
    records, results = {}, {}
    for enabled in (False, True):
        records[enabled], results[enabled] = _recorded(subject, enabled, seed)
    report.steps, report.state = records[False].count, records[False].state
    _tell_backend(report, subject.backend)
    report.comparison = compare(results[False], results[True])
    if records[True].count:
        report.starts = first_difference(records[False].digests, records[True].digests)
    if report.starts is not None and not subject.loops:
        report.starts += 1
    if enabling is not None:
        enabling.use(enabling.options)
    took, result = _run(subject, True, seed)
    varied = {}
    if noise == "torch" and not (again := compare(results[True], kept(result))).equal:
        varied[True] = again.difference
    results[True] = kept(result)
    if enabling is not None:
        # in a run without wrappers, which an integration could take for methods of the object's own
        report.fused, report.kept = enabling.counted()
        report.replaced = enabling.replaced()
        report.notes += [f"{name} of the object is replaced in the run" for name in report.replaced]

    sides = {False: report.without, True: report.enabled}
    order = [enabled for number in range(runs) for enabled in ((False, True) if number % 2 == 0 else (True, False))]
    repeats = max(1, min(_REPEATS, round(_ROUND / max(took, 1e-9))))
    for enabled in order:
        times = []
        for _ in range(repeats):
            took, result = _run(subject, enabled, seed)
            times.append(took)
            again = compare(results[enabled], kept(result))
            if not again.equal:
                varied[enabled] = again.difference
        sides[enabled].runs.append(statistics.median(times))
    report.varies = _varies(varied)
    if report.steps and records[True].count:
        timers: dict[bool, list[Timer]] = {False: [], True: []}
        for enabled in order:
            timers[enabled] += (_timed(subject, enabled, seed) for _ in range(repeats))
        for enabled, side in sides.items():
            each = [step for timer in timers[enabled] for step in timer.steps]
            side.take([timer.spent for timer in timers[enabled]], each)
    elif not subject.notes:
        where = "with fastdiff " if report.steps else ""
        report.notes.append(f"{where}no step was seen, so its time is not known")
    return report


def _tell_backend(report: Report, asked: str) -> None:
    """The line about the environment, and a note where the device of the states has no kernels."""
    device = torch.device("cpu" if report.state is None else report.state[2])
    backend = (native.best(device) or "reference") if asked == "auto" else asked
    count = torch.get_num_threads()
    name = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    report.environment = (
        f"fastdiff {__version__} with its {backend} backend, torch {torch.__version__}, "
        f"{count} thread{'' if count == 1 else 's'}{name}"
    )
    if backend == "reference" and asked == "auto":
        reason = native.cuda_why_not(device) if device.type == "cuda" else native.why_not()
        why = f"without the native library: {reason}" if reason else f"as there are no kernels for {device.type}"
        report.notes.append(f"fastdiff runs through plain PyTorch here, {why}")


def _varies(varied: dict[bool, float]) -> str | None:
    if False in varied:
        return (
            f"two runs without fastdiff differ by {varied[False]:.3g}: the network is not deterministic, or a "
            "torch.Generator that was made before the run goes on in it"
        )
    if True in varied:
        return f"two runs with fastdiff differ by {varied[True]:.3g}, those without do not"
    return None


def _begin(subject: Subject, enabled: bool, seed: int) -> Any:
    obj = subject.side(enabled)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return obj


def _run(subject: Subject, enabled: bool, seed: int) -> tuple[float, Any]:
    """(seconds, result) of a run with nothing in between."""
    obj = _begin(subject, enabled, seed)
    with _raising(enabled):
        start = now()
        result = finished(subject.run(obj))
        return now() - start, result


def _recorded(subject: Subject, enabled: bool, seed: int) -> tuple[Record, dict[str, Tensor]]:
    record = Record(subject, _begin(subject, enabled, seed))
    with _raising(enabled):
        result = record.run()
    return record, kept(result)


def _timed(subject: Subject, enabled: bool, seed: int) -> Timer:
    timer = Timer(subject, _begin(subject, enabled, seed))
    with _raising(enabled):
        timer.run()
    return timer


@contextlib.contextmanager
def _raising(enabled: bool) -> Iterator[None]:
    try:
        yield
    except SystemExit as end:
        side = "with" if enabled else "without"
        raise CheckError(f"the run {side} fastdiff called {factories.exit_of(end)}") from None
    except Exception as error:
        raise RunError(enabled) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command, for `main`."""
    parser.description = "Runs your own pipeline, diffusion object or sampler with and without fastdiff."
    parser.epilog = (
        "exit status: 0, equal results (with --noise philox: equal with torch's noise); 1, other results; 2, usage"
    )
    parser.add_argument(
        "factory",
        metavar="module:factory",
        help="a function without arguments that returns the object, or (object, run) where run(object) samples once "
        "and returns its images or tensors",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="before every run (default: 0)")
    parser.add_argument("--runs", type=_positive, default=3, help="timed runs of each side (default: 3)")
    parser.add_argument("--noise", choices=_host.NOISES, help="as for fastdiff.enable (default: torch)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    """What torch.manual_seed takes."""
    try:
        seed = int(text)
    except ValueError:
        seed = 2**64
    if not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer from -2**63 to 2**64 - 1, got {text!r}")
    return seed


def main(arguments: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    try:
        with factories.without_arguments(arguments.factory.partition(":")[0]):
            report = check(
                _made(arguments.factory), noise=arguments.noise, seed=arguments.seed, runs=arguments.runs, tell=_tell
            )
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except CheckError as error:
        _tell(str(error))
        return 2
    except RunError as error:
        traceback.print_exception(error.__cause__)
        _tell(str(error))
        return 1 if error.enabled else 2
    print(report)
    if arguments.json is not None:
        try:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(report.figures(), file, indent=1, allow_nan=False)
                file.write("\n")
        except OSError as error:
            _tell(f"argument --json: cannot write {arguments.json}: {error.strerror}")
            return 2
    return report.status


def _tell(line: str) -> None:
    print(f"fastdiff check: {line}", file=sys.stderr, flush=True)


def _made(name: str) -> Any:
    """What the factory returns.  CheckError where there is none; what its module or itself raised is printed."""
    try:
        return factories.call(name, factories.find(name, "a function without arguments"))
    except factories.FactoryError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        raise CheckError(str(error)) from None
