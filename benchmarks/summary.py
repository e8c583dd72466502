"""The goals of the step and what a run measured of them, as Markdown.

    python benchmarks/summary.py build/benchmarks.json

Everything is computed from the files that `bench_*.py` wrote: medians, and ratios of medians of one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[tuple[str, str], dict[str, Any]]  # by case and provider


@dataclass(frozen=True)
class Goal:
    """One line: what is measured, and the bound that its figure is held to.

    against: the case and provider that stand beside it; None for a goal on a time.
    """

    text: str
    case: str
    provider: str
    figure: str  # a key of FIGURES
    bound: float
    against: tuple[str, str] | None = None


@dataclass(frozen=True)
class Figure:
    of: Callable[[dict[str, Any], dict[str, Any] | None], float]
    form: str
    at_most: bool
    unit: Callable[[dict[str, Any]], str]  # how a single median is shown


def seconds(result: dict[str, Any]) -> float:
    return result["stats"]["median"]


def ns_per_element(result: dict[str, Any]) -> float:
    return seconds(result) * 1e9 / result["extra_info"]["elements"]


def as_time(result: dict[str, Any]) -> str:
    us = seconds(result) * 1e6
    return f"{us:.2f} us" if us < 100 else f"{us:,.0f} us"


def as_rate(result: dict[str, Any]) -> str:
    return f"{result['extra_info']['bytes'] / seconds(result) / 1e9:.1f} GB/s"


def as_peak(result: dict[str, Any]) -> str:
    return f"{result['extra_info']['peak_bytes'] / 2**20:.1f} MiB"


def of_bound(result: dict[str, Any]) -> float:
    return result["extra_info"]["peak_bytes"] / result["extra_info"]["bound_bytes"]


FIGURES = {
    "ns": Figure(lambda one, _: ns_per_element(one), "{:.2f} ns per element", True, as_time),
    "us": Figure(lambda one, _: seconds(one) * 1e6, "{:.1f} us", True, as_time),
    # both move the same bytes
    "share": Figure(lambda one, other: seconds(other) / seconds(one), "{:.0%} of copy", False, as_rate),
    "faster": Figure(lambda one, other: seconds(other) / seconds(one), "{:.2f} times faster", False, as_time),
    "memory": Figure(lambda one, _: of_bound(one), "{:.2f} of states and one step", True, as_peak),
    "cost": Figure(lambda one, other: seconds(one) / seconds(other), "{:.2f} times the time", True, as_time),
}

GOALS = [
    Goal("DDPM, noise in the kernel, AVX-512", "ddpm-4x3x128x128-avx512", "fastdiff_out", "ns", 1.0),
    Goal("the same, 2 threads, 1.5 million elements", "ddpm-8x3x256x256-2_threads", "fastdiff_out", "ns", 0.65),
    Goal("the same, AVX2, 1 thread", "ddpm-4x3x128x128-avx2", "fastdiff_out", "ns", 2.5),
    *(
        Goal(f"DDIM, {where}", case, "fastdiff_out", "share", 0.85, (case, "copy"))
        for where, case in (
            ("in cache, (4, 4, 64, 64)", "ddim-4x4x64x64"),
            ("in cache, (16, 3, 64, 64)", "ddim-16x3x64x64"),
            ("in cache, (8, 3, 256, 256)", "ddim-8x3x256x256"),
            ("in memory, 2^26 elements", "ddim-64x1048576"),
        )
    ),
    Goal("(1, 3, 32, 32), DDPM with seeds, new result", "ddpm-1x3x32x32", "fastdiff_new", "us", 9),
    Goal("(1, 3, 32, 32), DDPM with seeds, `out=`", "ddpm-1x3x32x32", "fastdiff_out", "us", 9),
    Goal("(1, 3, 32, 32), DDPM with an int as seeds", "ddpm-1x3x32x32", "fastdiff_int_seed", "us", 9),
    Goal("(1, 3, 32, 32), DDIM in place", "ddim-1x3x32x32", "fastdiff_inplace", "us", 5),
    *(
        Goal(f"DDPM against plain PyTorch, {shape}", case, "fastdiff_out", "faster", bound, (case, "plain"))
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
        "fastdiff_out",
        "cost",
        1.5,
        ("ddpm-16x3x64x64", "fastdiff_out"),
    ),
    Goal("gradients of 50 steps with checkpoints, peak memory", "chain-50", "checkpoint", "memory", 1.1),
    Goal("diffusers' DDIM enabled, (1, 16, 2)", "diffusers-ddim-action", "fastdiff", "us", 15),
    Goal("diffusers' DDPM enabled, (1, 16, 2)", "diffusers-ddpm-action", "fastdiff", "us", 25),
    Goal("set_timesteps again, with the same arguments", "diffusers-set_timesteps", "fastdiff", "us", 10),
    *(
        Goal(f"diffusers' {text} enabled, against diffusers", case, provider, "faster", bound, (case, "host"))
        for text, case, provider, bound in (
            ("DDPM, (1, 4, 64, 64), torch's noise,", "diffusers-ddpm-latent", "fastdiff", 3.0),
            ("DDIM, eta 1, (1, 4, 64, 64), torch's noise,", "diffusers-ddim_eta-latent", "fastdiff", 3.0),
            ("DDPM, (8, 3, 256, 256), philox,", "diffusers-ddpm-image", "philox", 8.0),
        )
    ),
]


def goal_row(goal: Goal, results: Results) -> list[str]:
    figure = FIGURES[goal.figure]
    target = f"{'at most' if figure.at_most else 'at least'} {figure.form.format(goal.bound)}"
    one = results.get((goal.case, goal.provider))
    other = results.get(goal.against) if goal.against else None
    if one is None or (goal.against and other is None):
        return [goal.text, target, "not measured", "", "", ""]
    value = figure.of(one, other)
    met = value <= goal.bound if figure.at_most else value >= goal.bound
    beside = f"{goal.against[1]}: {figure.unit(other)}" if goal.against and other else ""
    return [goal.text, target, figure.unit(one), beside, figure.form.format(value), "yes" if met else "**no**"]


def case_rows(results: Results) -> list[list[str]]:
    """One row for each case: every way to call fastdiff, and the best of them against the other providers."""
    rows = []
    for case in dict.fromkeys(case for case, _ in results):
        found = {provider: result for (name, provider), result in results.items() if name == case}
        row = [case]
        for provider in ("fastdiff_out", "fastdiff_new", "fastdiff_inplace", "plain", "plain_folded", "copy"):
            row.append(as_time(found[provider]) if provider in found else "")
        ours = found.get("fastdiff_out")
        row.append(f"{ns_per_element(ours):.2f}" if ours else "")
        for provider, form in (("plain", "{:.2f}"), ("plain_folded", "{:.2f}"), ("copy", "{:.0%}")):
            both = ours and provider in found
            row.append(form.format(seconds(found[provider]) / seconds(ours)) if both else "")
        if any(row[1:]):  # a step, that is
            rows.append(row)
    return rows


def training_rows(results: Results) -> list[list[str]]:
    """One row for each case of bench_train.py: fastdiff, and what autograd makes of plain PyTorch."""
    rows = []
    for (case, provider), plain in results.items():
        ours = results.get((case, "fastdiff"))
        if provider != "plain_autograd" or ours is None:
            continue
        row = [case, as_time(ours), as_time(plain), f"{seconds(plain) / seconds(ours):.2f}"]
        for info in (ours["extra_info"], plain["extra_info"]):
            row.append(f"{info['saved_tensors']}, {info['saved_bytes']:,} bytes" if "saved_tensors" in info else "")
        rows.append(row)
    return rows


def host_rows(results: Results) -> list[list[str]]:
    """One row for each case of bench_integrations.py: a codebase by itself, and with fastdiff."""
    rows = []
    for (case, provider), theirs in results.items():
        if provider != "host":
            continue
        row = [case, as_time(theirs)]
        for ours in (results.get((case, "fastdiff")), results.get((case, "philox"))):
            row += [as_time(ours), f"{seconds(theirs) / seconds(ours):.2f}"] if ours else ["", ""]
        outside = [results[case, one]["extra_info"].get("outside_network") for one in ("host", "fastdiff")]
        row += (
            ["", ""] if None in outside else [f"{outside[0] / seconds(theirs):.1%}", f"{outside[0] / outside[1]:.2f}"]
        )
        rows.append(row)
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(report: dict[str, Any]) -> str:
    results = {(b["extra_info"]["case"], b["extra_info"]["provider"]): b for b in report["benchmarks"]}
    machine, commit = report["machine_info"], report["commit_info"]
    cpu = machine["cpu"]
    cpus = f"{cpu['count']} x {cpu['brand_raw']} ({machine['cpu_capability']})"
    caches = ", ".join(f"{name} {size}" for name, size in cpu["caches"].items())
    compiler = machine["compiler"] or "no native library"
    commit = f"{commit['id'][:10]}{' with changes' if commit['dirty'] else ''}"
    conditions = ", ".join(f"{key}={value}" for key, value in machine["openmp"].items()) or "no OpenMP settings"
    lines = [
        f"{cpus}; caches {caches}; torch {machine['torch']}, Python {machine['python_version']}, {compiler}; "
        f"fastdiff {machine['fastdiff']} at {commit}; {conditions}; load {machine['load_average']} at the start; "
        f"{report['datetime'][:10]}.",
        "Medians (memory: peaks); float32 and 1 thread unless said.",
        "",
        table(
            ["goal", "target", "median", "beside it", "measured", "met"],
            [goal_row(goal, results) for goal in GOALS],
        ),
        "",
        "`plain` is the step in PyTorch operations, in place, its coefficients Python floats; `plain, folded` has",
        "factors moved about until no operation can be saved. `copy` moves as many bytes as the step must.",
        "The three last columns compare fastdiff with `out=`.",
        "",
        table(
            ["case", "`out=`", "new result", "in place", "plain", "plain, folded", "copy", "ns per element"]
            + ["faster than plain", "than folded", "of copy"],
            case_rows(results),
        ),
    ]
    if rows := training_rows(results):
        lines += [
            "",
            "A step and its gradients; and its log-density: `log_prob` with the step, `policy` of a recorded one with",
            "its gradient. Saved: the tensors that autograd keeps, and the bytes of those not there before the step.",
            "",
            table(["case", "fastdiff", "plain autograd", "faster", "saved, fastdiff", "saved, plain"], rows),
        ]
    if rows := host_rows(results):
        lines += [
            "",
            "Other codebases with fastdiff, drawing torch's noise, or philox. A run is a script of examples/hosts with",
            "its small network; outside: its time but for the network, and how many times less that is with fastdiff.",
            "",
            table(["case", "by itself", "fastdiff", "faster", "philox", "faster", "outside", "less"], rows),
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what pytest wrote with --benchmark-json")
    files = parser.parse_args(arguments).json
    for file in files:
        if len(files) > 1:
            print(f"## {file.name}\n")
        print(summary(json.loads(file.read_text())), end="\n\n" if file != files[-1] else "\n")


if __name__ == "__main__":
    main()
