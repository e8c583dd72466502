"""The goals, and where fastdiff loses, with the reasons that a run has figures for."""

from __future__ import annotations

from dataclasses import dataclass

import growth
import summary
from pages import Block, Heading, Table, Text
from providers import clock, info, is_ours, is_rival, joined, label, quartiles, times
from summary import Record, Run, as_time, duration, ns_per_element, seconds


def goals(run: Run) -> list[Block]:
    found = summary.verdicts(run.results) if run.device == "cpu" else []
    known = [verdict.met for verdict in found if verdict.met is not None]
    disturbed = [verdict for verdict in found if verdict.disturbed]
    absent = len(found) - len(known) - len(disturbed)
    if absent == len(found):
        return []
    return [
        Heading("Goals"),
        Text(
            f"Set before they were measured, against the physical limit where there is one: {sum(known)} of "
            f"{len(known)} met"
            + (f", {len(disturbed)} disturbed" if disturbed else "")
            + (f", {absent} not measured" if absent else "")
            + "."
        ),
        Table(summary.GOALS_HEAD, summary.goal_rows(found), "w"),
    ]


ALIKE = 0.1  # how far two medians of one call may lie apart, as a part of them


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
        theirs = [record for name, record in providers if is_rival(name)]
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
    in_kernel = goal.figure == "ns" and normals and "-avx2" not in goal.case
    if in_kernel and ns_per_element(normals) < ns_per_element(one):
        return (
            f"The normals alone take {ns_per_element(normals):.2f} ns per element here, of {ns_per_element(one):.2f}."
        )
    if goal.figure == "share":
        return calls_in_share(run, verdict)
    if goal.figure == "overhead":
        known = info(one)
        return (
            f"Of {duration(known['bare_seconds'] * summary.overhead(one))} above the bare chains the probe takes "
            f"{duration(known['probe_seconds'])} and the files take {duration(known['files_seconds'])}."
        )
    if goal.figure == "sampling":
        alone, beside = (duration(info(one)[name]) for name in ("one_chunk_seconds", "chunk_seconds"))
        return f"A chunk takes a process {alone} alone and {beside} beside another process."
    twin = run.results.get((goal.case, "fastdiff"))
    if goal.provider == "fastdiff_int_seed" and twin and seconds(twin) < seconds(one):
        return f"The seeds are made from the int at every call; with a tensor of them the step takes {as_time(twin)}."
    small = "ddim_inplace" if "ddim" in goal.case else "ddpm_new" if goal.provider == "fastdiff_new" else "ddpm_seeds"
    pieces, whole = overhead_pieces(run, f"small-{small}"), run.results.get((f"small-{small}", "whole"))
    if goal.figure == "µs" and goal.case.endswith("1x3x32x32") and pieces and whole:
        if abs(seconds(whole) / seconds(one) - 1) > ALIKE:
            return (
                f"The same call took {as_time(whole)} when its parts were measured, {as_time(one)} here: one of the "
                "two was disturbed, and the parts do not explain it."
            )
        largest = sorted(pieces.items(), key=lambda piece: -piece[1])[:3]
        return f"Its largest parts: {joined([f'{name} {duration(value)}' for name, value in largest])}."
    return ""


def calls_in_share(run: Run, verdict: summary.Verdict) -> str:
    """What a share of a copy is without both calls: ours before its kernel begins, and the copy's own."""
    one, other = seconds(verdict.one), seconds(verdict.other)
    ours, theirs = call_seconds(run), copy_call_seconds(run)
    if ours is None or theirs is None or min(one - ours, other - theirs) <= 0:
        return ""
    share = (other - theirs) / (one - ours)
    if share < other / one + 0.01:
        return ""  # the calls explain nothing
    told = (
        f"Of {duration(one)} about {duration(ours)} are our call, before the kernel begins, and of the copy's "
        f"{duration(other)} about {duration(theirs)} are its own: without either the share is {share:.2%}"
    )
    return f"{told}, and the goal would be met." if share >= verdict.goal.bound else f"{told}, which misses it too."


def lost(run: Run) -> list[Block]:
    compared = comparisons(run)
    found = [pair for pair in compared if pair.ratio > 1]
    held = summary.verdicts(run.results) if run.device == "cpu" else []
    missed = [verdict for verdict in held if verdict.met is False]
    blocks: list[Block] = [
        Heading("Where we lose, and why"),
        Text(
            f"Every case of this run in which fastdiff's median is above another provider's: {len(found)} of "
            f"{len(compared)} comparisons. The worst come first. A case is named by its sampler, or by what was "
            "measured (growth over an axis, a chain of a network), then by its shape, value or steps, and by what "
            "departs from float32 on one thread."
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
                f"{label(provider)}: {as_time(pairs[0].ours)}{clock(pairs[0].ours)}",
                "; ".join(f"{rival(pair.theirs)}: {as_time(pair.theirs)}" for pair in pairs),
                why_slower(run, pairs[0]),
            ]
            for (case, provider), pairs in slower.items()
        ]
        blocks.append(Table(["case", "times slower", "ours", "theirs", "why"], rows, "wrwww"))
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
        blocks += [Text("Goals that are missed:"), Table(["goal", "target", "measured", "by", "why"], rows, "wwrrw")]
    if text := less_exact(run):
        blocks.append(Text(text))
    return blocks


def less_exact(run: Run) -> str:
    """Where plain PyTorch's float32 DDPM has the smaller error; empty where it has not."""
    found = [
        (case, *(info(run.results[case, provider]).get("error") for provider in ("fastdiff", "plain")))
        for case in dict.fromkeys(case for case, _ in run.results)
        if case.startswith("ddpm-") and {"fastdiff", "plain"} <= run.providers(case).keys()
        and {info(run.results[case, provider]).get("dtype") for provider in ("fastdiff", "plain")} == {"float32"}
        and info(run.results[case, "fastdiff"]).get("output_dtype", "float32") == "float32"
    ]  # fmt: skip
    known = [(case, ours / theirs) for case, ours, theirs in found if ours and theirs]
    worse = [ratio for _, ratio in known if ratio > 1]
    if not worse:
        return ""
    low, high = times(min(worse)), times(max(worse))
    return (
        f"Exactness: in {len(worse)} of {len(known)} float32 DDPM cases fastdiff's largest error is above plain "
        f"PyTorch's, {low if low == high else f'{low} to {high}'} times it, each with its own noise "
        "([accuracy](#accuracy)). Plain PyTorch at its best adds with `alpha=`, which rounds a product and its sum "
        "once; fastdiff rounds each, as the formula of the codebases does, whose bits it keeps."
    )


def overhead_pieces(run: Run, case: str) -> dict[str, float]:
    return {p: seconds(record) for p, record in run.providers(case).items() if p != "whole"}


def call_seconds(run: Run) -> float | None:
    """What a DDIM call takes besides its kernel."""
    found = run.providers("small-ddim_inplace")
    return seconds(found["whole"]) - seconds(found["kernel"]) if {"whole", "kernel"} <= found.keys() else None


def copy_call_seconds(run: Run) -> float | None:
    """What a copy takes besides its bytes: the smallest that was timed, of a few hundred of them."""
    copies = [record for (_, provider), record in run.results.items() if provider == "copy"]
    small = [seconds(record) for record in copies if info(record).get("bytes", 2**12) < 2**12]
    return min(small, default=None)
