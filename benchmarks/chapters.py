"""The chapters of the report: each makes blocks of a page from one machine's records, or none where it has none."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import charts
import summary
from growing import as_work_grows, bandwidth
from losses import goals, lost, overhead_pieces
from pages import Block, Code, Figure, Grid, Heading, Items, Table, Text
from providers import (
    LABELS,
    MEANINGS,
    PASSED,
    bar,
    clock,
    colour,
    count,
    info,
    is_ours,
    joined,
    label,
    quartiles,
    spread,
    times,
)
from summary import Record, Run, as_time, digits, duration, fastest, ns_per_element, seconds

# What is seen first

SIZES = (  # of the headline: of each line the case that most can be said of
    {"ddpm-1x16x2": "an action chunk"},
    {"ddpm-4x4x64x64": "four latents", "ddpm-1x3x32x32": "a small picture"},
    {"ddpm-8x3x256x256": "eight pictures"},
)
FEW = (("host",), ("compiled", "compiled_noise_outside"), ("plain", "plain_folded"), ("fastdiff",), ("copy",))


def shape_of(case: str) -> str:
    """(8, 3, 256, 256) of "ddpm-8x3x256x256"."""
    return f"({', '.join(case.split('-')[1].split('x'))})"


def faster_or_slower(ratios: Sequence[float]) -> str:
    """What ratios of times say, each theirs over ours: "2.4 to 4.2 times faster"."""
    if min(ratios) < 1 <= max(ratios):
        return f"from {1 / min(ratios):.1f} times slower to {max(ratios):.1f} times faster"
    slower = max(ratios) < 1
    found = [f"{value:.1f}" for value in sorted(1 / ratio if slower else ratio for ratio in ratios)]
    span = found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
    return f"{span} times {'slower' if slower else 'faster'}"


def brief(run: Run) -> str:
    """Where and when, in one line."""
    dates = " and ".join(dict.fromkeys(file.date for file in run.files))
    machine = run.machine
    threads = "one thread; " if run.device == "cpu" else ""
    return (
        f"{run.name}, {threads}torch {machine['torch']}; fastdiff {machine['fastdiff']} at commit "
        f"{run.files[0].commit}; {dates}."
    )


def headline(run: Run) -> list[Block]:
    shown = []
    for cases in SIZES:
        measured = [case for case in cases if (case, "fastdiff") in run.results]
        if measured:
            case = max(measured, key=lambda case: len(run.providers(case)))
            shown.append((cases[case], case))
    if not shown:
        return []
    compiled = any(fastest(run.results, case, *FEW[1]) for _, case in shown)
    best = "the fastest of plain PyTorch and torch.compile" if compiled else "plain PyTorch at its best"
    ratios: dict[str, list[float]] = {"diffusers' own scheduler": [], best: []}
    for _, case in shown:
        for name, providers in zip(ratios, (FEW[0], (*FEW[1], *FEW[2])), strict=True):
            if theirs := fastest(run.results, case, *providers):
                ratios[name].append(seconds(theirs) / seconds(run.results[case, "fastdiff"]))
    claims = [f"**{faster_or_slower(found)}** than {name}" for name, found in ratios.items() if found]
    blocks: list[Block] = []
    if claims:
        lead = "fastdiff makes a diffusion sampler's step, all of it but the network, one operation."
        where = "CPU" if run.device == "cpu" else "GPU"
        blocks.append(Text(f"{lead} On this {where} a DDPM step is {joined(claims)}.", lead=True))
    steps = run.part("step")
    checked = [record for record in steps if "equal" in info(record)]
    equal = sum(info(record)["equal"] for record in checked)
    bits = f" fastdiff has every bit of its definition in plain PyTorch in {equal} of {len(checked)} timed cases."
    figures = []
    for what, case in shown:
        records = [record for record in (fastest(run.results, case, *names) for names in FEW) if record]
        figures.append(Figure(charts.bars(f"A DDPM step, {what}", [bar(r) for r in records]), f"{what.capitalize()}, "
                              f"{shape_of(case)}"))  # fmt: skip
    blocks += [
        Grid(figures),
        Text(brief(run)),
        Text(
            "Time of one DDPM step, noise and all, float32: medians; the thin line at the end of a bar "
            "goes from quartile to quartile. Each chart has its own scale, from zero. Of two ways to write the plain "
            "or the compiled step the faster one is shown." + (bits if checked else "")
        ),
        Text(
            "The network is not in these figures, and no sampler makes it faster"
            + (
                ": how much of a whole chain the step is stands under [whole chains](#whole-chains), what"
                if run.part("chain")
                else ". What"
            )
            + " fastdiff loses under [where we lose](#where-we-lose-and-why)."
        ),
    ]
    return blocks


# The step


def who_is_compared(run: Run) -> list[Block]:
    there = {info(record)["provider"] for record in run.part("step")}
    meant = [f"**{label(name)}**: {meaning}." for name, meaning in MEANINGS.items() if name in there]
    passed = [Text(PASSED)] if "copy" in there else []
    return [Heading("Who is compared"), Items(meant), *passed] if meant else []


def against_noise(run: Run) -> list[Block]:
    records = [record for record in run.part("noise") if info(record).get("threads", 1) == 1]
    if not records:
        return []
    largest = max(info(record)["elements"] for record in records)
    shown = sorted((r for r in records if info(r)["elements"] == largest), key=seconds)
    rows = [bar(r, 1e-9 * largest, f"{ns_per_element(r):.2f} ns") for r in shown]
    figures = [Figure(charts.bars("Normals", rows), f"Normals alone, {largest:,} at a time")]
    case = next((c for c, p in run.results if p == "fastdiff" and c.startswith("ddpm-") and c.count("-") == 1
                 and info(run.results[c, p]).get("elements") == largest), None)  # fmt: skip
    copied = run.results.get((case, "copy"))
    text = []
    if copied:
        text.append(f"A copy of as many bytes takes {ns_per_element(copied):.2f} ns per element.")
    if case:
        steps = sorted((r for p, r in run.providers(case).items() if not p.startswith("fastdiff_")), key=seconds)
        rows = [bar(r, 1e-9 * largest, f"{ns_per_element(r):.2f} ns") for r in steps]
        figures.append(Figure(charts.bars("Steps", rows), f"The whole DDPM step of {shape_of(case)}"))
        text += noise_in_steps(run, case, {info(r)["provider"]: r for r in shown})
    table = [
        [f"`{info(r)['case']}`", label(info(r)["provider"]), as_time(r), spread(r), f"{ns_per_element(r):.2f}"]
        for r in run.part("noise")
    ]
    return [
        Heading("Time per element, and what its noise costs"),
        *([Text(" ".join(text))] if text else []),
        Grid(figures),
        Table(["case", "generator", "median", "quartiles", "ns per normal"], table, "llr", "All figures of generators"),
    ]


def noise_in_steps(run: Run, case: str, normals: dict[str, Record]) -> list[str]:
    """What the generators' own times say about the steps of a case, as far as the medians agree with each other."""
    told, ours = [], ns_per_element(run.results[case, "fastdiff"])
    if "fastdiff" in normals:
        alone = ns_per_element(normals["fastdiff"])
        if alone < ours:
            told.append(f"Of fastdiff's {ours:.2f} ns per element {alone:.2f} are what the normals alone take.")
        else:
            told.append(
                f"fastdiff's normals alone took {alone:.2f} ns, the whole step {ours:.2f}: the two were not measured "
                "under the same conditions."
            )
    drawing = [r for p, r in run.providers(case).items() if p in DRAW_FROM_TORCH]
    if "torch" in normals and drawing:
        alone, fastest_one = ns_per_element(normals["torch"]), min(drawing, key=seconds)
        if alone <= ns_per_element(fastest_one):
            told.append(
                f"torch's generator alone takes {alone:.2f} ns, and no step that draws from it was faster than that."
            )
        else:
            told.append(
                f"torch's generator alone took {alone:.2f} ns, yet a step that draws from it "
                f"({label(info(fastest_one)['provider'])}) {ns_per_element(fastest_one):.2f}: this run was disturbed."
            )
    return told


DRAW_FROM_TORCH = ("host", "improved_diffusion", "plain", "plain_folded", "compiled_noise_outside")
COUNTS = ("launches", "small_operations", "reads", "allocations")


def counts(run: Run) -> list[Block]:
    """Of each sampler the case that most providers were counted in."""
    best: dict[str, list[Record]] = {}
    for case in dict.fromkeys(case for case, _ in run.results):
        records = [r for r in run.providers(case).values() if info(r)["part"] == "step" and "launches" in info(r)]
        sampler = case.split("-")[0]
        if len(records) > len(best.get(sampler, [])):
            best[sampler] = records
    rows = []
    for records in best.values():
        for record in records:
            one = info(record)
            if one["provider"] == "copy" or one["provider"].startswith("fastdiff_"):
                continue
            least = one["bytes"] / one["elements"]
            moved = one.get("moved_bytes")
            rows.append(
                [
                    f"`{one['case']}`",
                    label(one["provider"]),
                    *("" if one.get(name) is None else f"{one[name]:g}" for name in COUNTS),
                    "" if moved is None else digits(moved / one["elements"]),
                    digits(least),
                    "" if moved is None else times(moved / one["bytes"]),
                ]
            )
    if not rows:
        return []
    return [
        Heading("What a step does"),
        Text(
            "Counted during one call; no clock has a part in it. A launch is an operation over "
            "whole tensors: a pass over memory on a CPU, a kernel on a GPU. Small operations work on single numbers. "
            "A read takes a number from a tensor, for which a GPU has to be waited for. Bytes are per element: what "
            "all launches read and write, and the least that the step must."
        ),
        Table(
            ["case", "provider", "launches", "small operations", "reads", "allocations", "bytes moved", "the least"]
            + ["times the least"],
            rows,
            "llr",
        ),
    ]


def accuracy(run: Run) -> list[Block]:
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in run.part("step"):
        one = info(record)
        if one.get("error") is not None:
            kind = one.get("dtype", "float32")
            if one.get("output_dtype", kind) != kind:
                kind += f", {one['output_dtype']} output"
            place = found.setdefault((one.get("sampler") or one["case"].split("-")[0], kind), {})
            place.setdefault(one["provider"], []).append(record)
    if not found:
        return []
    # however fastdiff is called, its bits are the same
    providers = [p for p in LABELS if any(p in place for place in found.values()) and not p.startswith("fastdiff_")]

    def worst(records: Sequence[Record]) -> float:
        return max(info(record)["error"] for record in records)

    rows, figures = [], []
    for (sampler, kind), every in found.items():
        place, cases = in_same_cases(every)
        bits = [info(record)["equal"] for records in every.values() for record in records if "equal" in info(record)]
        cells = [f"{worst(place[p]):.1e}" if p in place else "" for p in providers]
        rows.append([sampler.replace("_", " "), kind, f"{sum(bits)} of {len(bits)}" if bits else "", *cells])
        if sampler == "ddpm" and len(place) > 1:
            shown = [p for p in providers if p in place]
            bars = [
                charts.Bar(label(p), f"{worst(place[p]):.1e}", [(worst(place[p]), colour(p))], None, is_ours(p))
                for p in shown
            ]
            if max(one.end for one in bars):
                names = ", ".join(f"`{case}`" for case in sorted(cases))
                figures.append(Figure(charts.bars(f"Errors, {kind}", bars), f"DDPM, {kind}", names))
    return [
        Heading("Accuracy"),
        Text(
            "The largest difference from the formula in float64, on the same inputs and the provider's own noise, "
            "over the cases that all providers of a line have. Bits equal counts the timed cases in which fastdiff "
            "has every bit of its definition in plain PyTorch, on whatever instruction set and threads. Of more than "
            "262,144 elements the first and the last samples, or the last alone, are compared with the definition and "
            "give the error; the others are compared with fastdiff's own results of the batch in another order."
        ),
        Grid(figures),
        Table(["sampler", "dtype", "bits equal", *map(label, providers)], rows, "wwr"),
    ]


def in_same_cases(place: dict[str, list[Record]]) -> tuple[dict[str, list[Record]], set[str]]:
    """The records of the cases that all providers share, and these; without the providers that leave none to share."""
    place = dict(place)
    while True:
        shared = set.intersection(*({info(record)["case"] for record in records} for records in place.values()))
        if shared:
            kept = {p: [r for r in records if info(r)["case"] in shared] for p, records in place.items()}
            return kept, shared
        del place[min(place, key=lambda p: (p == "fastdiff", len(place[p])))]


def all_steps(run: Run) -> list[Block]:
    rows = []
    for record in run.part("step"):
        one = info(record)
        copied = run.results.get((one["case"], "copy"))
        rows.append(
            [
                f"`{one['case']}`",
                label(one["provider"]),
                as_time(record),
                spread(record),
                str(record["stats"].get("rounds", "")),
                f"{ns_per_element(record):.3f}" if one.get("elements") else "",
                f"{one['bytes'] / seconds(record) / 1e9:.1f}" if one.get("bytes") else "",
                f"{seconds(copied) / seconds(record):.1%}" if copied else "",
            ]
        )
    if not rows:
        return []
    head = ["case", "provider", "median", "quartiles", "rounds", "ns per element", "GB/s", "of copy"]
    return [
        Heading("Every step that was timed"),
        Text(
            "Cases are named by sampler and shape; float32, one thread and the best instruction set unless named. GB/s "
            "counts the bytes that the step must move at the least."
        ),
        Table(head, rows, "llr", f"{len(rows)} medians"),
    ]


# Chains, small calls, growth


def chains(run: Run) -> list[Block]:
    records = run.part("chain")
    if not records:
        return []
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(info(record)["case"], []).append(record)
    figures, rows = [], []
    for case, found in cases.items():
        one = info(found[0])
        bars = []
        for record in sorted(found, key=seconds, reverse=True):
            provider, network = info(record)["provider"], min(info(record)["network_seconds"], seconds(record))
            share = info(record)["sampler_share"]
            parts = [(network, "network"), (seconds(record) - network, colour(provider))]
            text = f"{as_time(record)}, sampler {f'{share:.0%}' if share > 0 else 'not measurable'}"
            bars.append(charts.Bar(label(provider), text, parts, None, is_ours(provider)))
        batch = f", {one['shape'][0]} at a time" if one["shape"][0] > 1 else ""
        title = f"{NETWORKS.get(one['network'], one['network'])}{batch}, {one['mode'].replace('_', ' ')}"
        what = f"{one['sampler'].upper()}, {one['steps']} steps"
        figures.append(Figure(charts.bars(title, bars), title, what))
        theirs = run.results.get((case, "diffusers"))
        for record in found:
            ratio = times(seconds(theirs) / seconds(record)) if theirs and record is not theirs else ""
            outside = seconds(record) - info(record)["network_seconds"]
            rows.append(
                [
                    f"`{case}`",
                    label(info(record)["provider"]),
                    as_time(record),
                    spread(record),
                    duration(info(record)["network_seconds"]),
                    duration(outside / one["steps"]) if outside > 0 else "not measurable",
                    f"{info(record)['sampler_share']:.1%}" if outside > 0 else "not measurable",
                    ratio,
                ]
            )
    head = ["case", "sampler", "whole chain", "quartiles", "network", "sampler, per step", "sampler's share"]
    return [
        Heading("Whole chains"),
        Text(
            "Network and sampler from noise to result. Grey is the network, which is called equally often by all; the "
            "colour is what the sampler adds. The smaller the network, the more a faster sampler gives: next to a "
            "large one it gives little. Not measurable is a sampler of which nothing is left when the network's own "
            "time, measured apart, is taken off."
        ),
        *([Text(text)] if (text := sample_and_loop(run)) else []),
        Grid(figures),
        Table([*head, "times faster than diffusers"], rows, "llr", "All figures of chains"),
    ]


def sample_and_loop(run: Run) -> str:
    """`sampler.sample` against a loop over `sampler.step`, where the quartiles tell them apart."""
    told = []
    for case in dict.fromkeys(info(record)["case"] for record in run.part("chain")):
        whole, loop = (run.results.get((case, provider)) for provider in ("fastdiff", "fastdiff_step"))
        if whole and loop and quartiles(loop)[1] < quartiles(whole)[0]:
            told.append(f"{times(seconds(whole) / seconds(loop))} times the time in `{case}`")
    return f"`sampler.sample` takes longer than a loop over `sampler.step`: {joined(told)}." if told else ""


NETWORKS = {
    "policy": "A policy's MLP",
    "digits": "A U-Net for digits",
    "unet2d": "A small UNet2D of diffusers",
}


PIECES = {
    "sampler": "`sampler.step` itself, a function of Python",
    "validation": "the checks of the operation, in Python",
    "empty_like": "the new tensor, where the call makes one",
    "dispatch": "torch's dispatcher on its way to C++, and the checks there",
    "kernel": "the loop over the elements",
    "increment_version": "the note that a tensor was written to, where the call was given one",
}


def overhead(run: Run) -> list[Block]:
    cases = list(dict.fromkeys(info(record)["case"] for record in run.part("overhead")))
    figures, rows = [], []
    for case in cases:
        pieces, whole = overhead_pieces(run, case), run.results.get((case, "whole"))
        bars = [charts.Bar(name.replace("_", " "), duration(value), [(value, "fastdiff")])
                for name, value in sorted(pieces.items(), key=lambda piece: -piece[1])]  # fmt: skip
        if whole:
            total = charts.Bar("the whole call", as_time(whole), [(seconds(whole), "network")], quartiles(whole), True)
            bars.insert(0, total)
        figures.append(Figure(charts.bars(case, bars), f"`{case.removeprefix('small-')}`"))
        for name, value in pieces.items():
            share = f"{value / seconds(whole):.0%}" if whole else ""
            rows.append([f"`{case}`", name.replace("_", " "), duration(value), share])
        if whole:
            rest = seconds(whole) - sum(pieces.values())
            rows.append([f"`{case}`", "not in any piece", f"{rest * 1e6:.2f} µs", f"{rest / seconds(whole):.0%}"])
            rows.append([f"`{case}`", "**the whole call**", as_time(whole), "100%"])
    if not rows:
        return []
    there = {info(record)["provider"] for record in run.part("overhead")}
    return [
        Heading("A small call, part by part"),
        Text(
            "Where a tensor is small, the call is the time. The pieces are measured one by one; what their sum misses "
            "of the whole call, or has too much of it, is a line of its own."
        ),
        Items([f"{name.replace('_', ' ')}: {meaning}." for name, meaning in PIECES.items() if name in there]),
        Grid(figures),
        Table(["call", "piece", "median", "of the whole"], rows, "llr", "All figures of small calls"),
    ]


# Training, other codebases, a second job


def training(run: Run) -> list[Block]:
    """A step with its gradients against what autograd makes of plain PyTorch; the memory of chains."""
    rows = []
    for (case, provider), plain in run.results.items():
        ours = run.results.get((case, "fastdiff"))
        if provider != "plain_autograd" or ours is None:
            continue
        row = [f"`{case}`", as_time(ours), as_time(plain), times(seconds(plain) / seconds(ours))]
        for one in (info(ours), info(plain)):
            known = {"saved_tensors", "saved_bytes"} <= one.keys()
            row.append(f"{one['saved_tensors']}, {one['saved_bytes']:,} bytes" if known else "")
        rows.append(row)
    blocks: list[Block] = []
    if rows:
        blocks += [
            Heading("Training"),
            Text(
                "A step and its gradients, and its log-density: `log_prob` with the step, `policy` of a recorded one "
                "with its gradient. Saved are the tensors that autograd keeps, and the bytes of those that were not "
                "there before the step."
            ),
            Table(["case", "fastdiff", "plain autograd", "times faster", "saved, fastdiff", "saved, plain"], rows),
        ]
    memory = [
        [
            info(record)["provider"].replace("_", " "),
            summary.as_peak(record),
            f"{summary.of_bound(record):.2f}",
            as_time(record),
            f"{info(record)['error']:.1e}" if "error" in info(record) else "",
        ]
        for record in run.part("memory")
    ]
    if memory:
        blocks += [
            Heading("Memory of training through a chain", 3),
            Text("Peaks of 50 DDIM steps through a small network; the bound is all states and one step."),
            Table(["gradients", "peak", "times the bound", "time", "error of x_T"], memory),
        ]
    return blocks


def integrations(run: Run) -> list[Block]:
    rows = []
    for record in run.part("integration"):
        case, provider = info(record)["case"], info(record)["provider"]
        if provider != "host":
            continue
        row = [f"`{case}`{clock(record)}", as_time(record)]
        for ours in (run.results.get((case, "fastdiff")), run.results.get((case, "philox"))):
            row += [as_time(ours), times(seconds(record) / seconds(ours))] if ours else ["", ""]
        ours = run.results.get((case, "fastdiff"))
        outside = [info(one).get("outside_network") for one in (record, ours)] if ours else [None]
        if None in outside:
            row += ["", ""]
        else:
            row += [f"{outside[0] / seconds(record):.1%}", times(outside[0] / outside[1])]
        rows.append(row)
    if not rows:
        return []
    return [
        Heading("Under other codebases"),
        Text(
            "A codebase by itself and with one line of fastdiff, drawing torch's noise or making it from seeds "
            "(philox). A run is a script of [examples/hosts](root/examples/hosts) with its small random network; "
            "outside is its time but for the network, and how many times less that is with fastdiff."
        ),
        Table(["case", "by itself", "fastdiff", "times faster", "philox", "times faster", "outside", "less"], rows),
    ]


def forecast(run: Run) -> list[Block]:
    records = sorted(run.part("forecast"), key=lambda record: info(record)["batch"])
    if not records:
        return []
    rows = []
    for record in records:
        one = info(record)
        theirs = run.results.get((one["case"], "diffusers"))
        faster = theirs and record is not theirs
        rows.append(
            [
                f"{one['batch']}",
                label(one["provider"]),
                as_time(record),
                spread(record),
                duration(one["network_seconds"]),
                f"{1 - one['network_seconds'] / seconds(record):.0%}",
                times(seconds(theirs) / seconds(record)) if faster else "",
            ]
        )
    one = info(records[0])
    scores = {name.removeprefix("crps_"): value for name, value in one.items() if name.startswith("crps")}
    theirs = run.results.get((one["case"], "diffusers"))
    share = ""
    if theirs:
        alone = 1 - info(theirs)["network_seconds"] / seconds(theirs)
        share = f" At batch {one['batch']} diffusers' scheduler takes {alone:.0%} of its chain."
    timed = " All times are the processor's, which other work on the machine changes less." if clock(records[0]) else ""
    return [
        Heading("A second job: forecasting"),
        Text(
            "[examples/forecast](root/examples/forecast) draws forecasts of a real series with a small network and "
            f"{one['steps']} DDPM steps.{share}{timed}"
        ),
        Table(["batch", "sampler", "a chain", "quartiles", "network", "sampler's share", "times faster"], rows, "llr"),
        Text("Its score (CRPS, lower is better) beside those of forecasts that need no network:"),
        Table(
            ["this network" if name == "crps" else name.replace("_", " ") for name in scores],
            [[f"{value:.3f}" for value in scores.values()]],
            "r",
        ),
    ]


def bulk(run: Run) -> list[Block]:
    overheads, processes = run.part("bulk"), run.part("processes")
    if not overheads and not processes:
        return []
    return [
        Heading("Sampling in bulk"),
        Text(
            "[fastdiff.bulk](root/docs/bulk.md) makes samples by index, in files that any number of processes share. "
            "Here it makes digits, class by index, each process with one thread; all ways to make them gave the same "
            "bits."
        ),
        *(block for record in overheads for block in above_bare_chains(record)),
        *(block for record in processes for block in beside_one_process(record)),
    ]


def above_bare_chains(record: Record) -> list[Block]:
    one, overhead = info(record), summary.overhead(record)
    (bound,) = (goal.bound for goal in summary.GOALS if goal.figure == "overhead")
    low, high = summary.span(one["overheads"])
    disturbed = (
        f" These quartiles are wider apart than the goal's {bound:.0%}: other work on the machine disturbed the rounds."
        if high - low > bound
        else ""
    )
    above = one["bare_seconds"] * overhead
    pieces = {
        "the probe: the network is called twice at the first step": one["probe_seconds"],
        "the files and their records": one["files_seconds"],
        "not in these": above - one["probe_seconds"] - one["files_seconds"],
        "**all**": above,
    }
    return [
        Text(
            f"{one['samples']:,} digits of {one['steps']} DDIM steps, micro-batch {one['batch']}: the bare chains, "
            f"nothing written, take {duration(one['bare_seconds'])}, in bulk {as_time(record)} ({spread(record)}). "
            f"Round by round that is **{overhead:.1%}** more at the median (quartiles {low:.1%} to {high:.1%}), of the "
            f"processor's time {statistics.median(one['processor_overheads']):.1%}.{disturbed} Of the files' time "
            f"{duration(one['disk_seconds'])} are waits until they are on the disk. The run is short for a probe, "
            "which is made once per process, and each micro-batch is a file of its own, which is the most that there "
            "can be."
        ),
        Table(
            ["above the bare chains", "time", "of theirs"],
            [[name, signed(value), f"{value / one['bare_seconds']:.2%}"] for name, value in pieces.items()],
            "lr",
        ),
    ]


def beside_one_process(record: Record) -> list[Block]:
    one, whole = info(record), seconds(record)
    many, (least, most) = one["processes"], summary.span(one["speedups"])
    disturbed = (
        f" {many} processes were more than {many} times as fast as one, which other work must have slowed: the rounds "
        "are disturbed."
        if summary.too_fast(record)
        else ""
    )
    rows = [
        ["1", duration(one["one_sampling_seconds"]), "", duration(one["one_chunk_seconds"])]
        + [duration(one["one_seconds"]), "", duration(one["one_seconds"] - one["one_sampling_seconds"])],
        [f"{many}", duration(one["sampling_seconds"]), times(summary.speedup(record)), duration(one["chunk_seconds"])]
        + [duration(whole), times(one["one_seconds"] / whole), duration(whole - one["sampling_seconds"])],
    ]
    return [
        Text(
            f"{one['samples']:,} digits by torchrun, with 1 process and with {many} in every round. Sampling goes from "
            "the first process that is ready to the last file; a chunk is what a process takes for one file. More "
            "processes do not shorten the start (Python, torch, the network) and the end. All are medians; round by "
            f"round {many} processes sampled {times(least)} to {times(most)} times faster.{disturbed}"
        ),
        Table(
            ["processes", "sampling", "times faster", "a chunk", "the whole command", "times faster", "start and end"],
            rows,
            "r",
        ),
    ]


def signed(value: float) -> str:
    return f"-{duration(-value)}" if value < 0 else duration(value)


# Where, and how to check


def gpu(reports: Sequence[dict[str, Any]]) -> list[Block]:
    if not reports:
        return [
            Heading("On a GPU"),
            Text(
                "**GPU: not yet measured.** The CUDA and Triton kernels are tested bit for bit on a CPU; their times "
                "are unknown until `make gpu` has run on a machine with an NVIDIA GPU."
            ),
        ]
    blocks: list[Block] = [Heading("On a GPU")]
    for report in reports:
        where = report["environment"]
        told = ", ".join(f"{name} {where[name]}" for name in ("torch", "cuda", "triton", "fastdiff") if where.get(name))
        goals = [
            [goal["goal"], "" if goal["found"] is None else f"{goal['found']:g}", MET[goal["met"]]]
            for goal in report["goals"]
        ]
        cases = [
            [case["kind"], case["dtype"], count(case["elements"]), case["provider"], digits(case["device_us"])]
            + [f"{case['share_of_copy']:.1%}", f"{case['gb_per_s']}", str(case.get("host_us", ""))]
            + [str(case.get("launches", ""))]
            for case in report["cases"]
        ]
        blocks += [
            Text(f"{where.get('gpu', 'unknown GPU')}; {told}, Python {where['python']}; at {report['commit'][:10]}."),
            Text(f"Conditions: {report['conditions']}"),
            Table(["goal", "found", "met"], goals, "wrl"),
            Table(
                ["chain of 100 steps", "how", "ms"],
                [[chain["network"], chain["how"], f"{chain['ms']:g}"] for chain in report["chains"]],
                "llr",
            ),
            Table(
                ["step", "dtype", "elements", "provider", "device µs", "of copy", "GB/s", "host µs", "launches"],
                cases,
                "lllr",
                f"{len(cases)} cases",
            ),
        ]
        if report["left_out"]:
            blocks.append(Text(f"Left out for want of time: {'; '.join(report['left_out'])}."))
    return blocks


MET = {True: "yes", False: "**no**", None: "not measured"}


def method(run: Run) -> list[Block]:
    skipped = {name: reason for file in run.files for name, reason in file.skipped.items()}
    known = [record["stats"]["rounds"] for record in run.results.values() if "rounds" in record["stats"]]
    rounds = f" of {min(known):,} to {max(known):,} rounds" if known else ""
    left_out = [f"`{file.name}` without {file.deselected} benchmarks" for file in run.files if file.deselected]
    absent = [part for part in summary.FIELDS if not run.part(part)] if run.device == "cpu" else []
    selection = f"A selection was run: {joined(left_out)}. " if left_out else ""
    selection += f"Not measured here: {joined(absent)}." if absent else ""
    blocks: list[Block] = [
        Heading("The machine and its conditions"),
        Items([f"`{file.name}`: {summary.conditions(file)}." for file in run.files]),
        Text(
            f"Medians{rounds}, with their quartiles. A step is checked before it is timed: fastdiff in every bit "
            "of the samples that are compared with its definition, others within rounding given the same noise; noise "
            "that compiled code draws inside, and the other generators', by mean and variance alone. So are chains "
            "(other samplers than fastdiff within a tolerance), gradients, codebases with fastdiff (in every bit where "
            "the noise is torch's), the forecast and sampling in bulk. All get the same tensors, the same row in the "
            "middle of the chain and the same threads, which `make bench` pins. Where a size claims memory, calls take "
            "turns over tensors that no cache holds together."
        ),
        *([Text(selection)] if selection else []),
    ]
    if skipped:
        reasons: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            reasons.setdefault(reason, []).append(name)
        rows = []
        for reason, names in reasons.items():
            some = [f"`{name}`" for name in names[:4]]
            some += [f"and {len(names) - 4} more"] if len(names) > 4 else []
            rows.append([reason, f"{len(names)}", ", ".join(some)])
        blocks.append(Table(["reason", "benchmarks", "which"], rows, "wrw", f"{len(skipped)} skipped, and why"))
    return blocks


def check(files: Sequence[str]) -> list[Block]:
    """How to measure again. files: what the page was made from, as one types it."""
    new = "build/benchmarks.json"
    compared = [f".venv/bin/python benchmarks/compare.py {file} {new}" for file in files if file != new]
    return [
        Heading("Check it yourself"),
        Text(
            "On Linux, with Python 3.10 or newer, make and a C++ compiler, this installs what it needs, measures, and "
            "writes this page anew:"
        ),
        Code("make bench && make report"),
        Text(f"One figure alone{', and what fell by more than 15 % of a copy since then' if compared else ''}:"),
        Code("\n".join(['.venv/bin/python -m pytest benchmarks/bench_step.py -k "ddpm-1x3x32x32"', *compared])),
        Text(
            "The benchmarks are [benchmarks/bench_*.py](root/benchmarks); what they wrote is in "
            "[benchmarks/results](root/benchmarks/results). The report refuses a run with a failed check."
        ),
    ]


CHAPTERS = (
    headline,
    who_is_compared,
    goals,
    lost,
    bandwidth,
    against_noise,
    chains,
    counts,
    accuracy,
    overhead,
    as_work_grows,
    training,
    integrations,
    forecast,
    bulk,
    all_steps,
    method,
)


def blocks_of(runs: Sequence[Run], gpus: Sequence[dict[str, Any]], files: Sequence[str]) -> list[Block]:
    """All of the page: the first run, the others a level deeper, the GPU, how to check it.

    files: what it is made from, as one types it.
    """
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        found = [block for chapter in CHAPTERS for block in chapter(run)]
        if number:
            blocks.append(Heading(f"Another run: {summary.difference(runs[0], run)}", anchor=f"run-{number + 1}"))
            found = [deeper(block, f"run-{number + 1}-") for block in found]
        blocks += found
    on_gpu = any(run.device != "cpu" for run in runs)
    return [*blocks, *([] if on_gpu and not gpus else gpu(gpus)), *check(files)]


def deeper(block: Block, prefix: str) -> Block:
    """A block of a further run: its headings have places of their own, its text no links to those of the first."""
    if isinstance(block, Heading):
        return Heading(block.text, block.level + 1, prefix + block.place)
    if isinstance(block, Text):
        return Text(re.sub(r"\[([^\]]+)\]\(#[^)]+\)", r"\1", block.text), block.lead)
    return block
