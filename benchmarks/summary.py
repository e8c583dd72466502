"""What runs measured: their files, read and merged, and the goals that their figures are held to.

    python benchmarks/summary.py build/benchmarks.json

prints the goals as Markdown. A figure is a median of one run, or a ratio of two of them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # one benchmark, as pytest-benchmark writes it
Results = dict[tuple[str, str], Record]  # by case and provider


# what the records of a part have, beside the fields of all of them
FIELDS: dict[str, tuple[str, ...]] = {
    "step": ("elements", "bytes"),
    "noise": ("elements",),
    "overhead": (),
    "growth": ("axis", "value", "sampler", "bytes_touched", "faults"),
    "chain": ("network", "mode", "sampler", "steps", "shape", "network_seconds", "sampler_share"),
    "train": (),
    "memory": ("peak_bytes", "bound_bytes"),
    "integration": (),
    "forecast": ("batch", "steps", "network_seconds", "crps"),
    "bulk": ("batch", "steps", "samples", "bare_seconds", "overheads", "processor_overheads", "probe_seconds")
    + ("files_seconds", "disk_seconds"),
    "processes": ("batch", "steps", "samples", "processes", "sampling_seconds", "chunk_seconds", "one_seconds")
    + ("one_sampling_seconds", "one_chunk_seconds", "speedups"),
}


TEXTS = {"axis", "sampler", "network", "mode"}
# what may be 0, or below it: a share that is smaller than what two medians tell apart
ANY_NUMBER = {"faults", "sampler_share", "network_seconds"}
# one number of each round, and what all of them are above
OF_ROUNDS = {"overheads": -1.0, "processor_overheads": -1.0, "speedups": 0.0}
# what is part of another time of the same rounds: the record's median, or a field
PARTS = {
    "bulk": {"probe_seconds": "median", "files_seconds": "median", "disk_seconds": "median"},
    "processes": {"sampling_seconds": "median", "one_sampling_seconds": "one_seconds"},
}
MACHINE = ("cpu", "cpu_capability", "compiler", "openmp", "torch", "python_version", "fastdiff", "load_average")
LIBRARIES = ("numpy", "diffusers", "triton", "jax")


class Refused(ValueError):
    """A file that no figure may be taken from; the message names it and says why."""


@dataclass(frozen=True)
class File:
    """Where and when records were made: what a file of pytest-benchmark tells of its run."""

    name: str
    machine: dict[str, Any]
    commit: str
    date: str
    skipped: dict[str, str]  # name of a benchmark: the reason
    deselected: int  # benchmarks that the command left out


@dataclass(frozen=True)
class Run:
    """What one device measured, under one environment and at one commit, in one file or more.

    Of records that two files have, the later file's are kept.
    """

    files: list[File]
    device: str  # "cpu" or "cuda"
    results: Results

    @property
    def machine(self) -> dict[str, Any]:
        return self.files[0].machine

    @property
    def name(self) -> str:
        return cpu(self.machine) if self.device == "cpu" else self.machine.get("gpu") or "a GPU"

    def part(self, name: str) -> list[Record]:
        """The records of a kind: "step", "noise", "overhead", "growth", "chain", "train", ..."""
        return [record for record in self.results.values() if record["extra_info"]["part"] == name]

    def providers(self, case: str) -> dict[str, Record]:
        return {provider: record for (name, provider), record in self.results.items() if name == case}


def load(path: Path) -> Any:
    """The JSON in a file. Raises Refused where it is not there, or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path}: is damaged: {error}") from error


def read(path: Path) -> tuple[File, Results]:
    """The records of a file that pytest-benchmark wrote for `make bench`.

    Raises Refused where there is no such file, or it is damaged, of another format, or of a run that failed.
    """
    return checked(load(path), path)


def checked(report: Any, path: Path) -> tuple[File, Results]:
    """`read` of what was loaded already."""
    if not isinstance(report, dict) or not {"benchmarks", "machine_info", "commit_info", "datetime"} <= report.keys():
        raise Refused(f"{path}: is of an unknown format: expected what `pytest --benchmark-json` writes")
    outcome, machine, commit = report.get("outcome"), report["machine_info"], report["commit_info"]
    if not isinstance(outcome, dict) or not {"failed", "passed", "exitstatus"} <= outcome.keys():
        raise Refused(f"{path}: does not tell how its run went: expected an `outcome`, as `make bench` adds it")
    if outcome["failed"]:
        raise Refused(f"{path}: is of a run that failed: {', '.join(outcome['failed'])}")
    if outcome["exitstatus"] != 0:
        raise Refused(f"{path}: is of a run that was cut off: pytest ended with {outcome['exitstatus']}")
    if what := spoiled(machine):
        raise Refused(f"{path}: is of an unknown format: its machine_info has no {what}")
    if not isinstance(commit, dict) or not isinstance(report["datetime"], str):
        raise Refused(f"{path}: is of an unknown format: has no commit or no date")
    if not isinstance(report["benchmarks"], list) or not report["benchmarks"]:
        raise Refused(f"{path}: has no benchmarks")
    results: Results = {}
    for record in report["benchmarks"]:
        if what := missing(record):
            name = record.get("name") if isinstance(record, dict) else record
            raise Refused(f"{path}: is of an unknown format: {name} has no {what}")
        key = record["extra_info"]["case"], record["extra_info"]["provider"]
        if key in results:
            raise Refused(f"{path}: has two records of {' by '.join(key)}")
        results[key] = record
    if not is_number(outcome["passed"]) or outcome["passed"] < len(results):
        raise Refused(f"{path}: has {len(results)} benchmarks, of which {outcome['passed']} passed")
    name = f"{str(commit.get('id'))[:10]}{' with changes' if commit.get('dirty') else ''}"
    skipped, deselected = outcome.get("skipped", {}), outcome.get("deselected", 0)
    return File(path.name, machine, name, report["datetime"][:10], skipped, deselected), results


def spoiled(machine: Any) -> str:
    """What the description of a machine lacks; empty where it is whole."""
    if not isinstance(machine, dict):
        return "content"
    lacking = [name for name in MACHINE if name not in machine]
    processor = machine.get("cpu")
    caches = processor.get("caches") if isinstance(processor, dict) else None
    if not isinstance(caches, dict) or not {"count", "brand_raw"} <= processor.keys():
        lacking.append("cpu with its count, brand and caches")
    elif not all(re.fullmatch(r"\d+[KMG]", str(size)) for size in caches.values()):
        lacking.append("readable sizes of caches")
    if not isinstance(machine.get("openmp"), dict):
        lacking.append("openmp settings")
    return ", ".join(lacking)


def missing(record: Any) -> str:
    """What a record lacks of what its part must have, or has without being a number; empty where it is whole."""
    if not isinstance(record, dict):
        return "content"
    info, stats = record.get("extra_info"), record.get("stats")
    info, stats = (value if isinstance(value, dict) else {} for value in (info, stats))
    fields = FIELDS.get(info["part"], ()) if isinstance(info.get("part"), str) else ()
    lacking = [] if info.get("part") in FIELDS else ["known part"]
    lacking += [name for name in ("case", "provider") if not isinstance(info.get(name), str)]
    lacking += [name for name in ("threads", *fields) if name not in info]
    lacking += [name for name in ("median", "q1", "q3") if not (is_number(stats.get(name)) and stats[name] > 0)]
    lacking += [
        f"finite {name}" for name, value in info.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    for name in ("threads", "elements", "bytes", *fields):
        value = info.get(name, 1)
        if name in OF_ROUNDS:
            right = isinstance(value, list) and len(value) > 1
            right = right and all(is_number(each) and each > OF_ROUNDS[name] for each in value)
        elif name in TEXTS or name == "shape":
            right = isinstance(value, str if name in TEXTS else list)
        else:
            right = is_number(value) and (value > 0 or name in ANY_NUMBER)
        lacking += [] if right else [f"usable {name}"]
    if not lacking:
        times = info | stats
        parts = PARTS.get(info["part"], {}).items()
        lacking += [f"{name} within its {whole}" for name, whole in parts if times[name] > times[whole]]
    return ", ".join(lacking)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def device(record: Record) -> str:
    return "cpu" if record["extra_info"].get("device", "cpu") == "cpu" else "cuda"


def environment(file: File) -> list[str]:
    """What two files have to share for their medians to stand in one table."""
    machine = file.machine
    versions = [f"{name} {machine[name]}" for name in ("torch", *LIBRARIES) if machine.get(name)]
    python = machine.get("python") or machine["python_version"]
    return [
        cpu(machine),
        f"caches {', '.join(f'{name} {size}' for name, size in machine['cpu']['caches'].items()) or 'unknown'}",
        *versions,
        f"Python {python}",
        machine["compiler"] or "no native library",
        ", ".join(f"{key}={value}" for key, value in machine["openmp"].items()) or "no OpenMP settings",
        f"fastdiff {machine['fastdiff']} at {file.commit}",
    ]


def merge(found: Iterable[tuple[File, Results]]) -> list[Run]:
    """One run for each device, environment and commit, in the order of their first files."""
    runs: dict[tuple[str, ...], Run] = {}
    for file, results in found:
        for kind in dict.fromkeys(map(device, results.values())):
            run = runs.setdefault((kind, *environment(file)), Run([], kind, {}))
            run.files.append(file)
            run.results.update({key: record for key, record in results.items() if device(record) == kind})
    return list(runs.values())


def difference(first: Run, other: Run) -> str:
    """What sets another run apart from the first: its device, else what its environment has and the first's has not."""
    if other.name != first.name:
        return other.name
    one, two = environment(first.files[0]), environment(other.files[0])
    return "; ".join(part for part in two if part not in one) or "with less installed"


def cpu(machine: dict[str, Any]) -> str:
    processor = machine["cpu"]
    return f"{processor['count']} x {processor['brand_raw'] or 'unknown processor'} ({machine['cpu_capability']})"


def conditions(file: File) -> str:
    """The machine, the versions and the conditions of a file, as text."""
    gpu = [file.machine["gpu"]] if file.machine.get("gpu") else []
    told = [*gpu, *environment(file), f"load {file.machine['load_average']} at the start", file.date]
    return "; ".join(told)


@dataclass(frozen=True)
class Goal:
    """One line: what is measured, and the bound that its figure is held to.

    against: the case and the providers of which the fastest stands beside it; None for a goal on a time.
    """

    text: str
    case: str
    provider: str
    figure: str  # a key of FIGURES
    bound: float
    against: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Figure:
    of: Callable[[Record, Any], float]
    form: str  # what stands behind the number
    places: str  # of the number
    at_most: bool
    unit: Callable[[Record], str]  # how a single median is shown

    def text(self, value: float) -> str:
        return f"{value:{self.places}} {self.form}"

    def target(self, bound: float) -> str:
        number = f"{bound:.0%}" if self.places.endswith("%") else f"{bound:g}"
        return f"{'at most' if self.at_most else 'at least'} {number} {self.form}"


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was measured of it."""

    goal: Goal
    one: Record | None
    other: Record | None
    value: float | None  # None: not measured

    @property
    def disturbed(self) -> bool:
        return self.one is not None and self.one["extra_info"]["part"] == "processes" and too_fast(self.one)

    @property
    def met(self) -> bool | None:
        """None: not measured, or disturbed."""
        if self.value is None or self.disturbed:
            return None
        return self.value <= self.goal.bound if FIGURES[self.goal.figure].at_most else self.value >= self.goal.bound

    @property
    def missed_by(self) -> float:
        """What the measured figure is beyond the bound, as a part of the bound; 0 where it is met."""
        return 0.0 if self.met is not False or self.value is None else abs(self.value / self.goal.bound - 1)


def seconds(record: Record) -> float:
    return record["stats"]["median"]


def fastest(results: Results, case: str, *providers: str) -> Record | None:
    """Of those providers that the case has."""
    return min((results[case, each] for each in providers if (case, each) in results), key=seconds, default=None)


def ns_per_element(record: Record) -> float:
    return seconds(record) * 1e9 / record["extra_info"]["elements"]


def duration(value: float) -> str:
    """Seconds in the unit that suits them, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value * 1e9)} ns"


def digits(value: float) -> str:
    """Three digits, and more before the point: 0.957, 7.00, 23.5, 190, 7,936."""
    if value == 0:
        return "0"
    places = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{places}f}"


def as_time(record: Record) -> str:
    return duration(seconds(record))


def as_rate(record: Record) -> str:
    return f"{record['extra_info']['bytes'] / seconds(record) / 1e9:.1f} GB/s"


def as_peak(record: Record) -> str:
    return f"{record['extra_info']['peak_bytes'] / 2**20:.1f} MiB"


def of_bound(record: Record) -> float:
    return record["extra_info"]["peak_bytes"] / record["extra_info"]["bound_bytes"]


def overhead(record: Record) -> float:
    """What sampling in bulk takes more than the bare chains, as a part of theirs; of the rounds the median."""
    return statistics.median(record["extra_info"]["overheads"])


def speedup(record: Record) -> float:
    """How many times faster than one process the others sample; of the rounds the median."""
    return statistics.median(record["extra_info"]["speedups"])


def too_fast(record: Record) -> bool:
    """Whether the processes were faster than so many can be: other work slowed the one that they stand beside.

    By more than a hundredth, by which the times of a quiet machine differ too.
    """
    return speedup(record) > 1.01 * record["extra_info"]["processes"]


def span(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile; of less than four values the least and the largest."""
    low, *_, high = sorted(values) if len(values) < 4 else statistics.quantiles(values, n=4, method="inclusive")
    return low, high


FIGURES = {
    "ns": Figure(lambda one, _: ns_per_element(one), "ns per element", ".2f", True, as_time),
    "µs": Figure(lambda one, _: seconds(one) * 1e6, "µs", ".2f", True, as_time),
    # both move the same bytes
    "share": Figure(lambda one, other: seconds(other) / seconds(one), "of copy", ".1%", False, as_rate),
    "faster": Figure(lambda one, other: seconds(other) / seconds(one), "times faster", ".2f", False, as_time),
    "memory": Figure(lambda one, _: of_bound(one), "of states and one step", ".2f", True, as_peak),
    "cost": Figure(lambda one, other: seconds(one) / seconds(other), "times the time", ".2f", True, as_time),
    "overhead": Figure(
        lambda one, _: overhead(one),
        "over the bare chains",
        ".1%",
        True,
        lambda one: (
            f"{as_time(one)}; bare {duration(one['extra_info']['bare_seconds'])}; "
            "quartiles of the rounds {:.1%} to {:.1%}".format(*span(one["extra_info"]["overheads"]))
        ),
    ),
    "sampling": Figure(
        lambda one, _: speedup(one),
        "times faster",
        ".2f",
        False,
        lambda one: (
            f"{duration(one['extra_info']['sampling_seconds'])}; one process "
            f"{duration(one['extra_info']['one_sampling_seconds'])}; "
            "rounds {:.2f} to {:.2f}".format(*span(one["extra_info"]["speedups"]))
        ),
    ),
}

GOALS = [
    Goal("DDPM, noise in the kernel, AVX-512, 1 thread", "ddpm-4x3x128x128-avx512", "fastdiff", "ns", 0.85),
    Goal(
        "DDPM, noise in the kernel, 2 threads, 1.5 million elements",
        "ddpm-8x3x256x256-2_threads",
        "fastdiff",
        "ns",
        0.5,
    ),
    Goal("DDPM, noise in the kernel, AVX2, 1 thread", "ddpm-4x3x128x128-avx2", "fastdiff", "ns", 1.5),
    *(
        Goal(f"DDIM, {where}", case, "fastdiff", "share", 0.92, (case, "copy"))
        for where, case in (
            ("in cache, (4, 4, 64, 64)", "ddim-4x4x64x64"),
            ("in cache, (16, 3, 64, 64)", "ddim-16x3x64x64"),
            ("in cache, (8, 3, 256, 256)", "ddim-8x3x256x256"),
            ("in memory, 2^26 elements", "ddim-64x1048576"),
        )
    ),
    Goal("(1, 3, 32, 32), DDPM with seeds, `out=`", "ddpm-1x3x32x32", "fastdiff", "µs", 7),
    Goal("(1, 3, 32, 32), DDPM with seeds, new result", "ddpm-1x3x32x32", "fastdiff_new", "µs", 7),
    Goal("(1, 3, 32, 32), DDPM with an int as seeds", "ddpm-1x3x32x32", "fastdiff_int_seed", "µs", 7),
    Goal("(1, 3, 32, 32), DDIM in place", "ddim-1x3x32x32", "fastdiff_inplace", "µs", 4.5),
    *(
        Goal(f"DDPM against plain PyTorch, {shape}", case, "fastdiff", "faster", bound, (case, "plain", "plain_folded"))
        for shape, case, bound in (
            ("(8, 3, 256, 256)", "ddpm-8x3x256x256", 4.0),
            ("(16, 3, 64, 64)", "ddpm-16x3x64x64", 3.8),
            ("(1, 3, 32, 32)", "ddpm-1x3x32x32", 3.0),
        )
    ),
    Goal(
        "DDPM with its gradients against autograd, (8, 3, 256, 256)",
        "ddpm-8x3x256x256-gradients",
        "fastdiff",
        "faster",
        5.0,
        ("ddpm-8x3x256x256-gradients", "plain_autograd"),
    ),
    Goal(
        "DDPM with seeds, channels_last against contiguous",
        "ddpm-16x3x64x64-channels_last",
        "fastdiff",
        "cost",
        1.5,
        ("ddpm-16x3x64x64", "fastdiff"),
    ),
    Goal("gradients of 50 steps with checkpoints, peak memory", "chain-50", "checkpoint", "memory", 1.1),
    Goal("diffusers' DDIM enabled, (1, 16, 2)", "diffusers-ddim-action", "fastdiff", "µs", 15),
    Goal("diffusers' DDPM enabled, (1, 16, 2)", "diffusers-ddpm-action", "fastdiff", "µs", 25),
    Goal("set_timesteps again, with the same arguments", "diffusers-set_timesteps", "fastdiff", "µs", 10),
    *(
        Goal(f"diffusers' {text} enabled, against diffusers", case, provider, "faster", bound, (case, "host"))
        for text, case, provider, bound in (
            ("DDPM, (1, 4, 64, 64), torch's noise,", "diffusers-ddpm-latent", "fastdiff", 3.0),
            ("DDIM, eta 1, (1, 4, 64, 64), torch's noise,", "diffusers-ddim_eta-latent", "fastdiff", 3.0),
            ("DDPM, (8, 3, 256, 256), philox,", "diffusers-ddpm-image", "philox", 8.0),
        )
    ),
    Goal(
        "a forecast, end to end, batch 1, against diffusers' scheduler, processor time",
        "forecast-1",
        "fastdiff",
        "faster",
        2.0,
        ("forecast-1", "diffusers"),
    ),
    Goal("sampling in bulk against the bare chains, digits, micro-batch 64", "bulk-64", "fastdiff", "overhead", 0.03),
    Goal(
        "sampling in bulk, two processes against one, one thread each",
        "bulk-processes",
        "2_processes",
        "sampling",
        1.7,
    ),
]


def verdicts(results: Results) -> list[Verdict]:
    """Every goal with its figure."""
    found = []
    for goal in GOALS:
        one = results.get((goal.case, goal.provider))
        other = fastest(results, *goal.against) if goal.against else None
        measured = one is not None and (goal.against is None or other is not None)
        value = FIGURES[goal.figure].of(one, other) if measured else None
        found.append(Verdict(goal, one, other, value))
    return found


GOALS_HEAD = ["goal", "target", "measured", "met", "medians"]


def goal_rows(found: Iterable[Verdict]) -> list[list[str]]:
    rows = []
    for verdict in found:
        goal, figure = verdict.goal, FIGURES[verdict.goal.figure]
        target = figure.target(goal.bound)
        if verdict.value is None:
            rows.append([goal.text, target, "not measured", "", ""])
            continue
        medians = figure.unit(verdict.one) if goal.figure != "µs" else ""
        if goal.against:
            medians += f"; {verdict.other['extra_info']['provider'].replace('_', ' ')} {figure.unit(verdict.other)}"
        met = "disturbed" if verdict.disturbed else "yes" if verdict.met else "**no**"
        rows.append([goal.text, target, figure.text(verdict.value), met, medians])
    return rows


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The goals and what runs measured of them, as Markdown.")
    parser.add_argument("json", type=Path, nargs="+", help="what pytest wrote with --benchmark-json")
    try:
        runs = merge(map(read, parser.parse_args(arguments).json))
    except Refused as error:
        sys.exit(str(error))
    for run in runs:
        if run.device != "cpu":
            continue  # the goals are a CPU's
        print(*(f"{conditions(file)}." for file in run.files), "", sep="\n")
        print(table(GOALS_HEAD, goal_rows(verdicts(run.results))))


if __name__ == "__main__":
    main()
