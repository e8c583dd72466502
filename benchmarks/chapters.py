"""The chapters of the report: each makes blocks of a page from one machine's records, or none where it has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import charts
import growth
import summary
from pages import Block, Code, Figure, Grid, Heading, Items, Table, Text
from summary import Record, Run, as_time, digits, duration, ns_per_element, seconds

# provider: its name, and its colour
LABELS = {
    "fastdiff": ("fastdiff", "fastdiff"),
    "fastdiff_new": ("fastdiff, new result", "fastdiff"),
    "fastdiff_inplace": ("fastdiff, in place", "fastdiff"),
    "fastdiff_int_seed": ("fastdiff, an int as seeds", "fastdiff"),
    "fastdiff_step": ("fastdiff, a loop of steps", "fastdiff"),
    "triton": ("fastdiff, Triton", "fastdiff"),
    "philox": ("fastdiff, noise from seeds", "fastdiff"),
    "host": ("diffusers' scheduler", "host"),
    "diffusers": ("diffusers' scheduler", "host"),
    "improved_diffusion": ("improved-diffusion", "host"),
    "plain": ("plain PyTorch", "plain"),
    "plain_folded": ("plain PyTorch, folded", "plain"),
    "plain_autograd": ("plain autograd", "plain"),
    "compiled": ("torch.compile", "compiled"),
    "compiled_noise_outside": ("torch.compile, noise outside", "compiled"),
    "jax": ("JAX, jit", "other"),
    "torch": ("torch's normal_", "plain"),
    "copy": ("a copy: the limit", "copy"),
}
MEANINGS = {
    "fastdiff": "`sampler.step` with `out=`; also with a new result, in place, or with an int in place of the seeds",
    "host": "the step of diffusers' own scheduler, as pipelines call it",
    "improved_diffusion": "the step as that codebase writes it, its tables copied to the device at every call",
    "plain": "the step in PyTorch operations at its best: coefficients at hand, every operation in place",
    "plain_folded": "the same with factors moved about until no operation can be saved",
    "compiled": "`torch.compile` of the plain step, noise drawn inside",
    "compiled_noise_outside": "the same, with noise drawn by torch before it",
    "jax": "the step under JAX's `jit`",
    "copy": "torch's copy of as many bytes as the step must read and write: no step can be faster, once they are many",
}

RIVALS = ("host", "diffusers", "improved_diffusion", "plain", "plain_folded", "plain_autograd", "compiled") + (
    "compiled_noise_outside",
    "jax",
    "torch",
)


def label(provider: str) -> str:
    if provider in LABELS:
        return LABELS[provider][0]
    if provider.startswith("numpy_"):
        generator = provider.removeprefix("numpy_")
        return f"NumPy, {generator.capitalize() if generator == 'philox' else generator.upper()}"
    return provider.replace("_", " ")


def colour(provider: str) -> str:
    return LABELS[provider][1] if provider in LABELS else "other"


def info(record: Record) -> dict[str, Any]:
    return record["extra_info"]


def is_ours(provider: str) -> bool:
    return provider.startswith("fastdiff") or provider in ("triton", "philox")


def quartiles(record: Record) -> tuple[float, float]:
    return record["stats"]["q1"], record["stats"]["q3"]


def times(ratio: float) -> str:
    """A ratio as text: 2.41, 19.6."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count(number: int) -> str:
    """Elements: 256, 4k, 16M, in powers of 1024."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number / size:g}{unit}" if number % size == 0 else f"{number / size:.1f}{unit}"
    return str(number)


def bar(record: Record, unit: float = 1.0, text: str | None = None) -> charts.Bar:
    provider = info(record)["provider"]
    return charts.Bar(
        label(provider),
        text or as_time(record),
        [(seconds(record) / unit, colour(provider))],
        (record["stats"]["q1"] / unit, record["stats"]["q3"] / unit),
        is_ours(provider),
    )


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


def fastest(run: Run, case: str, providers: Iterable[str]) -> Record | None:
    found = [run.results[case, provider] for provider in providers if (case, provider) in run.results]
    return min(found, key=seconds) if found else None


def headline(run: Run) -> list[Block]:
    shown = []
    for cases in SIZES:
        measured = [case for case in cases if (case, "fastdiff") in run.results]
        if measured:
            case = max(measured, key=lambda case: len(run.providers(case)))
            shown.append((cases[case], case))
    if not shown:
        return []
    ratios: dict[str, list[float]] = {"diffusers' own scheduler": [], "plain PyTorch at its best": []}
    for _, case in shown:
        for name, providers in zip(ratios, (FEW[0], FEW[2]), strict=True):
            if theirs := fastest(run, case, providers):
                ratios[name].append(seconds(theirs) / seconds(run.results[case, "fastdiff"]))
    claims = [
        f"**{min(found):.1f} to {max(found):.1f} times faster** than {name}" for name, found in ratios.items() if found
    ]
    blocks: list[Block] = []
    if claims:
        lead = "fastdiff makes a diffusion sampler's step, all of it but the network, one operation."
        blocks.append(Text(f"{lead} On this CPU a DDPM step is {joined(claims)}.", lead=True))
    steps = run.part("step")
    checked = [record for record in steps if "equal" in info(record)]
    equal = sum(info(record)["equal"] for record in checked)
    bits = f" fastdiff has every bit of its definition in plain PyTorch in {equal} of {len(checked)} timed cases."
    figures = []
    for what, case in shown:
        records = [record for record in (fastest(run, case, names) for names in FEW) if record]
        figures.append(Figure(charts.bars(f"A DDPM step, {what}", [bar(r) for r in records]), f"{what.capitalize()}, "
                              f"{shape_of(case)}"))  # fmt: skip
    blocks += [
        Grid(figures),
        Text(
            "Time of one DDPM step, noise and all, float32, one thread: medians; the thin line at the end of a bar "
            "goes from quartile to quartile. Each chart has its own scale, from zero. Of two ways to write the plain "
            "or the compiled step the faster one is shown." + (bits if checked else "")
        ),
        Text(
            "The network is not in these figures, and no sampler makes it faster: how much of a whole chain the step "
            "is stands under [whole chains](#whole-chains), what fastdiff loses under "
            "[where we lose](#where-we-lose-and-why)."
        ),
    ]
    return blocks


# Goals and losses


def goals(run: Run) -> list[Block]:
    found = summary.verdicts(run.results)
    known = [verdict.met for verdict in found if verdict.met is not None]
    if not known:
        return []
    return [
        Heading("Goals"),
        Text(
            f"Set before they were measured, against the physical limit where there is one: {sum(known)} of "
            f"{len(known)} met" + (f", {len(found) - len(known)} not measured" if len(known) < len(found) else "") + "."
        ),
        Table(summary.GOALS_HEAD, summary.goal_rows(found), "wllll"),
    ]


@dataclass(frozen=True)
class Pair:
    """fastdiff and another provider, in one case."""

    ours: Record
    theirs: Record

    @property
    def ratio(self) -> float:
        """Above 1 where fastdiff is the slower one."""
        return seconds(self.ours) / seconds(self.theirs)

    @property
    def case(self) -> str:
        return info(self.ours)["case"]


def comparisons(run: Run) -> list[Pair]:
    """Every pair in the run, the worst for fastdiff first."""
    found = []
    for case in dict.fromkeys(case for case, _ in run.results):
        providers = run.providers(case).items()
        ours = [record for name, record in providers if is_ours(name)]
        theirs = [record for name, record in providers if name in RIVALS or name.startswith("numpy_")]
        found += [Pair(one, other) for one in ours for other in theirs]
    return sorted(found, key=lambda pair: -pair.ratio)


def rival(record: Record) -> str:
    """A provider's name; of an integration the host is whatever codebase it is."""
    host = info(record)["part"] == "integration"
    return "the codebase itself" if host else label(info(record)["provider"])


def network_of(record: Record) -> float | None:
    """Seconds of the network's in a record that has them."""
    one = info(record)
    if "outside_network" in one:
        return seconds(record) - one["outside_network"]
    return one.get("network_seconds")


def start_of_chain(run: Run, record: Record) -> float | None:
    """What a chain costs without steps, by the line that a record of growth over steps lies on."""
    one = info(record)
    fits = growth.fits({"machine_info": run.machine, "benchmarks": run.part("growth")})
    fit = fits.get(growth.Series("steps", one["sampler"], one["provider"], one["threads"]))
    return fit.overhead if fit else None


def noise_alone(run: Run, provider: str, step: Record) -> Record | None:
    """What as many normals take by themselves, on as many threads."""
    threads = info(step)["threads"]
    case = f"normal-{info(step).get('elements')}" + (f"-{threads}_threads" if threads > 1 else "")
    return run.results.get((case, provider))


def why_slower(run: Run, loss: Pair) -> str:
    ours, case = info(loss.ours), loss.case
    part, provider, elements = ours["part"], ours["provider"], ours.get("elements", 0)
    if quartiles(loss.ours)[0] <= seconds(loss.theirs) and seconds(loss.ours) <= quartiles(loss.theirs)[1]:
        return "Each median lies within the other's quartiles: this run does not tell them apart."
    if part == "train" and elements <= 2**14:
        return (
            "Python takes the time at this size: one autograd function of ours costs more than the few nodes that "
            "autograd makes of a short formula."
        )
    if case == "diffusers-set_timesteps":
        return "fastdiff looks up its rows for these timesteps, besides what diffusers does."
    networks = [network_of(record) for record in (loss.ours, loss.theirs)]
    if None not in networks and networks[0] - networks[1] > (seconds(loss.ours) - seconds(loss.theirs)) / 2:
        return (
            f"Most of the difference is the network's, which alone took {duration(networks[0])} beside ours and "
            f"{duration(networks[1])} beside theirs."
        )
    if part == "growth" and ours["axis"] == "steps":
        starts = [start_of_chain(run, record) for record in (loss.ours, loss.theirs)]
        if None not in starts and starts[0] - starts[1] > (seconds(loss.ours) - seconds(loss.theirs)) / 2:
            return (
                f"Most of the difference is what a chain takes before its steps: {duration(starts[0])} here, "
                f"{duration(starts[1])} there, by the lines fitted below."
            )
    loop = run.results.get((case, "fastdiff_step"))
    if provider == "fastdiff" and loop and seconds(loop) < seconds(loss.theirs):
        return (
            "`sampler.sample` does more for each step than a loop over `sampler.step`, which takes "
            f"{as_time(loop)} for this chain."
        )
    normals = noise_alone(run, "torch", loss.ours)
    if case.startswith("ddpm_generator") and normals:
        return f"Both draw from torch's generator, which alone takes {as_time(normals)} for as many normals."
    twin = run.results.get((case, "fastdiff"))
    if provider == "fastdiff_new" and twin and seconds(twin) < seconds(loss.theirs):
        return f"The new result is new memory; with `out=` the step takes {as_time(twin)}."
    if "-base" in case:
        return "Without AVX2 a fused multiply-add goes through float64."
    return "No reason is known yet."


def why_missed(run: Run, verdict: summary.Verdict) -> str:
    """What a missed goal's time is made of, as far as this run tells."""
    goal, one = verdict.goal, verdict.one
    normals = noise_alone(run, "fastdiff", one)
    if goal.figure == "ns" and normals and "-avx2" not in goal.case:
        return (
            f"The normals alone take {ns_per_element(normals):.2f} ns per element here, of {ns_per_element(one):.2f}."
        )
    if goal.figure == "share":
        call = call_seconds(run)
        if call and seconds(verdict.other) / (seconds(one) - call) >= goal.bound:
            return (
                f"Of {as_time(one)} about {duration(call)} are the call, before the kernel begins (below, part by "
                "part); without it the goal would be met."
            )
        return ""
    pieces = overhead_pieces(run, "small-ddim_inplace" if "ddim" in goal.case else "small-ddpm_seeds")
    if goal.figure == "µs" and goal.case.endswith("1x3x32x32") and pieces:
        largest = sorted(pieces.items(), key=lambda piece: -piece[1])[:3]
        return f"Its largest parts: {joined([f'{name} {duration(value)}' for name, value in largest])}."
    return ""


def lost(run: Run) -> list[Block]:
    compared = comparisons(run)
    found = [pair for pair in compared if pair.ratio > 1]
    missed = [verdict for verdict in summary.verdicts(run.results) if verdict.met is False]
    blocks: list[Block] = [
        Heading("Where we lose, and why"),
        Text(
            f"Every case of this run in which fastdiff's median is above another provider's: {len(found)} of "
            f"{len(compared)} comparisons. The worst come first."
            if found
            else f"In none of {len(compared)} comparisons of this run is fastdiff's median above another provider's."
        ),
    ]
    slower: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        slower.setdefault((pair.case, info(pair.ours)["provider"]), []).append(pair)
    if slower:
        rows = [
            [
                f"`{case}`",
                times(pairs[0].ratio),
                f"{label(provider)}: {as_time(pairs[0].ours)}",
                "; ".join(f"{rival(pair.theirs)}: {as_time(pair.theirs)}" for pair in pairs),
                why_slower(run, pairs[0]),
            ]
            for (case, provider), pairs in slower.items()
        ]
        blocks.append(Table(["case", "times slower", "ours", "theirs", "why"], rows, "lrlww"))
    if missed:
        rows = []
        for verdict in sorted(missed, key=lambda verdict: -verdict.missed_by):
            figure = summary.FIGURES[verdict.goal.figure]
            rows.append(
                [
                    verdict.goal.text,
                    figure.target(verdict.goal.bound),
                    figure.text(verdict.value),
                    f"{verdict.missed_by:.1%}",
                    why_missed(run, verdict) or "No reason is known yet.",
                ]
            )
        blocks += [Text("Goals that are missed:"), Table(["goal", "target", "measured", "by", "why"], rows, "wlrrw")]
    return blocks


# The step


def providers(run: Run) -> list[Block]:
    there = {info(record)["provider"] for record in run.part("step")}
    meant = [f"**{label(name)}**: {meaning}." for name, meaning in MEANINGS.items() if name in there]
    return [Heading("Who is compared"), Items(meant)] if meant else []


def grown(run: Run, axis: str) -> dict[growth.Series, list[Record]]:
    """The growth records of an axis by the line that they are on, in order."""
    found: dict[growth.Series, list[Record]] = {}
    for record in sorted(run.part("growth"), key=lambda record: info(record)["value"]):
        one = info(record)
        if one["axis"] == axis:
            threads = 0 if axis == "threads" else one["threads"]
            found.setdefault(growth.Series(axis, one["sampler"], one["provider"], threads), []).append(record)
    return found


def line_name(line: growth.Series, *, sampler: bool = True) -> str:
    parts = [label(line.provider)]
    if sampler and line.provider != "copy":
        parts.append(line.sampler.replace("ddpm", "DDPM").replace("ddim", "DDIM").replace("_", " "))
    if line.threads > 1:
        parts.append(f"{line.threads} threads")
    return ", ".join(parts)


def rate(record: Record) -> float:
    return info(record)["bytes"] / seconds(record) / 1e9


def side_by_side(found: dict[Any, list[Record]]) -> dict[int, list[Record | None]]:
    """The records of several lists by their value, None where a list has none."""
    by_value = [{info(record)["value"]: record for record in records} for records in found.values()]
    return {value: [one.get(value) for one in by_value] for value in sorted({v for one in by_value for v in one})}


def cache_marks(run: Run, per_element: float) -> list[tuple[float, str]]:
    """Elements whose tensors fill each cache, and its name."""
    return [(size / per_element, name) for name, size in growth.cache_sizes(run.machine).items()]


def size_ticks(values: Iterable[int]) -> list[tuple[float, str]]:
    """Every second of the values: all of them have no room."""
    return [(value, count(value)) for value in sorted(set(values))[::2]]


def bandwidth(run: Run) -> list[Block]:
    """GB/s over sizes, with the copy as the ceiling."""
    found = {
        line: [r for r in records if info(r).get("bytes")]
        for line, records in grown(run, "elements").items()
        if line.threads == 1
    }
    found = {line: records for line, records in found.items() if records}
    figures = []
    for sampler in dict.fromkeys(line.sampler for line in found if line.provider != "copy"):
        # all samplers of this axis move as many bytes, so one copy is the limit of each
        here = {line: records for line, records in found.items() if line.sampler == sampler or line.provider == "copy"}
        series = drawn(
            {
                line: ([(info(r)["value"], rate(r)) for r in records], [], line_name(line, sampler=False))
                for line, records in here.items()
            }
        )
        one = info(next(iter(here.values()))[0])
        figures.append(
            chart(
                sampler.upper(),
                series,
                x_title="elements",
                y_title="GB/s",
                marks=cache_marks(run, one["bytes"] / one["value"]),
            )
        )
    if not figures:
        return []
    rows = [
        [f"{value:,}", *("" if one is None else f"{rate(one):.1f}" for one in row)]
        for value, row in side_by_side(found).items()
    ]
    return [
        Heading("Speed against the memory's limit"),
        Text(
            "Bytes that a step must read and write at the least, per second, one thread. The dashed line is a copy of "
            "as many bytes: the limit at that size. Dotted lines: where the tensors of a step fill a cache. To the "
            "left the call takes most of the time, to the right the memory."
        ),
        Grid(figures),
        Table(["elements", *map(line_name, found)], rows, "rr", "All rates, in GB/s"),
    ]


Points = list[tuple[float, float]]


def drawn(lines: dict[growth.Series, tuple[Points, list[Points], str]]) -> list[charts.Series]:
    """Points, curves and a name as series; those of one colour in different shades."""
    found: list[charts.Series] = []
    for line, (points, curves, name) in lines.items():
        kind = colour(line.provider)
        shade = min(sum(one.kind == kind for one in found), 2)
        found.append(charts.Series(name, kind, points, curves, shade, line.provider == "copy"))
    return found


def chart(title: str, series: Sequence[charts.Series], *, log_y: bool = False, **options: Any) -> Figure:
    svg = charts.lines(
        title,
        series,
        x_ticks=size_ticks({int(x) for one in series for x, _ in one.points}),
        y_text=power if log_y else "{:g}".format,
        log_y=log_y,
        **options,
    )
    return Figure(svg, title, legend=[(one.kind, one.shade, one.name) for one in series])


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
    text = "On a CPU the noise decides."
    if copied:
        text += f" Bytes alone would take {ns_per_element(copied):.2f} ns per element, as a copy of as many shows."
    if case:
        steps = sorted((r for p, r in run.providers(case).items() if not p.startswith("fastdiff_")), key=seconds)
        rows = [bar(r, 1e-9 * largest, f"{ns_per_element(r):.2f} ns") for r in steps]
        figures.append(Figure(charts.bars("Steps", rows), f"The whole DDPM step of {shape_of(case)}"))
        normals = next((r for r in shown if info(r)["provider"] == "fastdiff"), None)
        if normals:
            ours = run.results[case, "fastdiff"]
            text += (
                f" Of fastdiff's {ns_per_element(ours):.2f} ns per element {ns_per_element(normals):.2f} are what the "
                "normals alone take."
            )
        if torch := next((r for r in shown if info(r)["provider"] == "torch"), None):
            text += (
                f" torch's generator alone takes {ns_per_element(torch):.2f} ns, so no step that draws from it can be "
                "faster than that."
            )
    table = [
        [f"`{info(r)['case']}`", label(info(r)["provider"]), as_time(r), spread(r), f"{ns_per_element(r):.2f}"]
        for r in run.part("noise")
    ]
    return [
        Heading("Time per element, and what its noise costs"),
        Text(text),
        Grid(figures),
        Table(["case", "generator", "median", "quartiles", "ns per normal"], table, "llr", "All figures of generators"),
    ]


def spread(record: Record) -> str:
    return " to ".join(map(duration, quartiles(record)))


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
    for (sampler, kind), place in found.items():
        bits = [info(record)["equal"] for records in place.values() for record in records if "equal" in info(record)]
        cells = [f"{worst(place[p]):.1e}" if p in place else "" for p in providers]
        rows.append([sampler, kind, f"{sum(bits)} of {len(bits)}" if bits else "", *cells])
        if sampler == "ddpm" and len(place) > 1:
            shown = [p for p in providers if p in place]
            bars = [
                charts.Bar(label(p), f"{worst(place[p]):.1e}", [(worst(place[p]), colour(p))], None, is_ours(p))
                for p in shown
            ]
            if max(one.end for one in bars):
                figures.append(Figure(charts.bars(f"Errors, {kind}", bars), f"DDPM, {kind}"))
    return [
        Heading("Accuracy"),
        Text(
            "The largest difference from the formula in float64, on the same inputs and the same noise. Bits equal "
            "counts the timed cases in which fastdiff has every bit of its definition in plain PyTorch, on "
            "whatever instruction set and threads."
        ),
        Grid(figures),
        Table(["sampler", "dtype", "bits equal", *map(label, providers)], rows, "llr"),
    ]


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
            text = f"{as_time(record)}, sampler {max(share, 0):.0%}"
            bars.append(charts.Bar(label(provider), text, parts, None, is_ours(provider)))
        batch = f", {one['shape'][0]} at a time" if one["shape"][0] > 1 else ""
        title = f"{NETWORKS.get(one['network'], one['network'])}, {one['mode'].replace('_', ' ')}"
        what = f"{one['sampler'].upper()}, {one['steps']} steps{batch}"
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
                    duration(outside / one["steps"]) if outside > 0 else "below 0: not measurable",
                    f"{info(record)['sampler_share']:.1%}",
                    ratio,
                ]
            )
    head = ["case", "sampler", "whole chain", "quartiles", "network", "sampler, per step", "sampler's share"]
    return [
        Heading("Whole chains"),
        Text(
            "Network and sampler from noise to result. Grey is the network, which is called equally often by all; the "
            "colour is what the sampler adds. The smaller the network, the more a faster sampler gives: next to a "
            "large one it gives little, and this is where it should be looked up."
        ),
        Grid(figures),
        Table([*head, "times faster than diffusers"], rows, "llr", "All figures of chains"),
    ]


NETWORKS = {
    "policy": "A policy's MLP",
    "digits": "A U-Net for digits",
    "unet2d": "A small UNet2D of diffusers",
}


def overhead_pieces(run: Run, case: str) -> dict[str, float]:
    return {p: seconds(record) for p, record in run.providers(case).items() if p != "whole"}


def call_seconds(run: Run) -> float | None:
    """What a DDIM call takes besides its kernel."""
    found = run.providers("small-ddim_inplace")
    return seconds(found["whole"]) - seconds(found["kernel"]) if {"whole", "kernel"} <= found.keys() else None


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
    return [
        Heading("A small call, part by part"),
        Text(
            "Where a tensor is small, the call is the time. The pieces are measured one by one; what their sum misses "
            "of the whole call is a line of its own."
        ),
        Grid(figures),
        Table(["call", "piece", "median", "of the whole"], rows, "llr", "All figures of small calls"),
    ]


AXES = {
    "elements": "Elements",
    "batch": "Samples of (4, 16, 16), each with its seed",
    "steps": "Steps of a chain without a network",
}


def as_work_grows(run: Run) -> list[Block]:
    """The step's cost along each axis: points, the straight lines through them, and what lies where they bend."""
    fits = growth.fits({"machine_info": run.machine, "benchmarks": run.part("growth")})
    figures, tables, told = [], [], []
    for axis, title in AXES.items():
        found = grown(run, axis)
        for sampler in dict.fromkeys(line.sampler for line in found) if axis == "elements" else (None,):
            here = {line: records for line, records in found.items() if sampler in (None, line.sampler)}
            if not here:
                continue
            lines = {
                line: (
                    [(info(r)["value"], seconds(r) * 1e6) for r in records],
                    curves(fits[line]) if line in fits else [],
                    line_name(line, sampler=sampler is None),
                )
                for line, records in here.items()
            }
            marks = []
            if axis == "elements":
                one = info(next(iter(here.values()))[0])
                marks = cache_marks(run, one["bytes_touched"] / one["value"])
            name = f"{title}, {sampler.upper()}" if sampler else title
            figures.append(chart(name, drawn(lines), log_y=True, x_title=axis, y_title="µs", marks=marks))
        rows = [
            [f"{value:,}", *("" if one is None else as_time(one) for one in row)]
            for value, row in side_by_side(found).items()
        ]
        if rows:
            tables.append(Table([axis, *map(line_name, found)], rows, "rr", f"All times over {axis}"))
        told += [[axis, line_name(line), *in_words(fits[line], axis)] for line in found if line in fits]
    if not figures:
        return []
    causes = list(dict.fromkeys(cause for fit in fits.values() for bend in fit.bends for cause in bend.causes))
    return [
        Heading("The cost as work grows"),
        Text(
            "Dots are medians. Lines are straight and fitted to them: a call's overhead and a constant cost for every "
            "unit of work, a curve on logarithmic axes. A line ends where it would have to bend; the table tells what "
            "lies there. Dotted lines: where the tensors of a call fill a cache."
        ),
        Grid(figures),
        Table(["axis", "line", "a call", "per unit", "off by at most", "where it bends, and why"], told, "llrwrw"),
        *([Items([f"{cause}: {growth.REASONS[cause]}." for cause in causes])] if causes else []),
        *speed_ups(run),
        *tables,
    ]


def curves(fit: growth.Fit) -> list[Points]:
    """The pieces of a fit, as seconds in µs at values close enough to each other for logarithmic axes."""
    found = []
    for piece in fit.pieces:
        values = [piece.first * (piece.last / piece.first) ** (i / 24) for i in range(25)]
        found.append([(value, (fit.overhead + piece.slope * value) * 1e6) for value in values])
    return found


def in_words(fit: growth.Fit, axis: str) -> list[str]:
    """A fit as cells of a table: the overhead, the slopes, the deviation, the bends with their causes."""
    unit, name, factor = growth.UNITS[axis]
    slopes = ", then ".join(digits(piece.slope * factor) for piece in fit.pieces)
    bends = []
    for bend in fit.bends:
        low, high = (f"{value:,}" for value in bend.between)
        bends.append(f"between {low} and {high}: {' and '.join(bend.causes) or 'no cause is known'}")
    where = "; ".join(bends) or "nowhere"
    if fit.deviation > growth.TOLERANCE:
        where += "; but not all points lie near lines"
    cost = f"{slopes} {name.replace('us', 'µs')} per {unit}"
    return [duration(fit.overhead), cost, f"{fit.deviation:.0%}", where]


def speed_ups(run: Run) -> list[Block]:
    """Times by threads, and how many times less than with one."""
    rows = []
    for line, records in grown(run, "threads").items():
        faster = growth.speed_ups([growth.Point(info(r)["value"], seconds(r)) for r in records])
        for record in records:
            threads = info(record)["value"]
            rows.append([line_name(line), f"{threads}", as_time(record), spread(record), times(faster[threads])])
    if not rows:
        return []
    head = ["line", "threads", "median", "quartiles", "times faster than one"]
    return [Text("Threads, at 1.5 million elements:"), Table(head, rows, "lr")]


def power(value: float) -> str:
    """A power of ten, short."""
    return f"{value:g}" if value < 1e4 else f"1e{round(math.log10(value))}"


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
            row.append(f"{one['saved_tensors']}, {one['saved_bytes']:,} bytes" if "saved_tensors" in one else "")
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
        row = [f"`{case}`", as_time(record)]
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
    records = run.part("forecast")
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
    return [
        Heading("A second job: forecasting"),
        Text(
            f"[examples/forecast](root/examples/forecast) draws forecasts of a real series with a small network and "
            f"{one['steps']} DDPM steps. Here the step matters: the network is about as short as it."
        ),
        Table(["batch", "sampler", "a chain", "quartiles", "network", "sampler's share", "times faster"], rows, "llr"),
        Text("Its score (CRPS, lower is better) beside those of forecasts that need no network:"),
        Table(
            ["this network" if name == "crps" else name.replace("_", " ") for name in scores],
            [[f"{value:.3f}" for value in scores.values()]],
            "r",
        ),
    ]


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
    blocks: list[Block] = [
        Heading("The machine and its conditions"),
        Items([f"`{file.name}`: {summary.conditions(file)}." for file in run.files]),
        Text(
            "Medians of many rounds, with their quartiles. Every benchmark checks what it computes before it is timed: "
            "fastdiff in every bit against its definition, others within rounding given the same noise. All get the "
            "same tensors, the same row in the middle of the chain and the same threads; `make bench` pins them to cores. "
            "Where a size claims memory, calls take turns over tensors that no cache holds together."
        ),
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


def check() -> list[Block]:
    return [
        Heading("Check it yourself"),
        Text(
            "On Linux, with Python 3.10 or newer, make and a C++ compiler, this installs what it needs, measures, and "
            "writes this page anew:"
        ),
        Code("make bench && make report"),
        Text("One figure alone, and what fell by more than 15 % against a copy since these files were made:"),
        Code(
            'python -m pytest benchmarks/bench_step.py -k "ddpm-1x3x32x32"\n'
            "python benchmarks/compare.py benchmarks/results/cpu-epyc.json build/benchmarks.json"
        ),
        Text(
            "The benchmarks are [benchmarks/bench_*.py](root/benchmarks); what they wrote is in "
            "[benchmarks/results](root/benchmarks/results). A run with a failed check is refused by the report."
        ),
    ]


CHAPTERS = (
    headline,
    providers,
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
    all_steps,
    method,
)


def blocks_of(runs: Sequence[Run], gpus: Sequence[dict[str, Any]]) -> list[Block]:
    """All of the page: the first machine, the others a level deeper, the GPU, how to check it."""
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        found = [block for chapter in CHAPTERS for block in chapter(run)]
        if number:
            blocks.append(Heading(f"Another machine: {summary.cpu(run.machine)}"))
            found = [Heading(b.text, b.level + 1) if isinstance(b, Heading) else b for b in found]
        blocks += found
    return [*blocks, *gpu(gpus), *check()]
