"""The figures of a check, and what they say."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .results import Comparison


@dataclass
class Side:
    """One side, in seconds: whole runs; the medians over further runs of the time in steps, in networks and in all; and
    that over single steps, which other programs on the machine disturb least."""

    runs: list[float] = field(default_factory=list)
    steps: float | None = None
    network: float | None = None
    timed: float | None = None
    step: float | None = None

    @property
    def run(self) -> float:
        return statistics.median(self.runs)

    def take(self, spent: list[dict[str, float]], each: list[float]) -> None:
        """What runs spent in "step", in "network", and elsewhere (""); and in each step."""
        self.step = statistics.median(each)
        self.steps = statistics.median(each["step"] for each in spent)
        self.timed = statistics.median(sum(each.values()) for each in spent)
        if any(each["network"] for each in spent):
            self.network = statistics.median(each["network"] for each in spent)


@dataclass
class Report:
    """What the check found; printed, a page of text.

    host, name: what it was.  steps: of the chain, 0 where none was seen.  state: shape, dtype and device of x.
    comparison: of the results; with noise "philox" of a run with torch's noise.  starts: the first step that differs,
    from 1; 0 for the first state.  varies: why equality cannot be judged, as runs of one side differ.
    fused, kept: steps of one run, None for what is not enabled.  replaced: parts that a run puts others in place of.
    """

    host: str
    name: str
    noise: str
    seed: int
    environment: str = ""
    steps: int = 0
    state: tuple[list[int], str, str] | None = None
    without: Side = field(default_factory=Side)
    enabled: Side = field(default_factory=Side)
    comparison: Comparison = field(default_factory=lambda: Comparison(True, 0.0))
    starts: int | None = None
    varies: str | None = None
    fused: int | None = None
    kept: dict[str, int] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0 where the results are equal, else 1."""
        return 0 if self.comparison.equal and self.varies is None else 1

    @property
    def gain(self) -> float:
        """The part of the whole run that fastdiff saves; negative where it costs."""
        return 1 - self.enabled.run / self.without.run

    @property
    def spread(self) -> float | None:
        """How far whole runs of one side lie from their median, at most, in parts of it."""
        sides = self.without, self.enabled
        if min(len(side.runs) for side in sides) < 2:
            return None
        return max(abs(run / side.run - 1) for side in sides for run in side.runs)

    @property
    def told(self) -> bool:
        """Whether the gain is more than chance, as far as so few runs can tell."""
        return abs(self.gain) > max(2 * (self.spread or 0.0), 0.01)

    @property
    def saved(self) -> float | None:
        """The part of the run that the steps need less: their share, of which the median step saves its part."""
        a, b = self.without, self.enabled
        if self.share is None or b.step is None or not a.step:
            return None
        return self.share * (1 - b.step / a.step)

    @property
    def share(self) -> float | None:
        return None if self.without.steps is None or not self.without.timed else self.without.steps / self.without.timed

    @property
    def network_share(self) -> float | None:
        side = self.without
        return None if side.network is None or not side.timed else side.network / side.timed

    def figures(self) -> dict[str, Any]:
        """Everything, as for JSON."""
        values = dataclasses.asdict(self)
        if self.state is not None:
            values["state"] = dict(zip(("shape", "dtype", "device"), self.state, strict=True))
        if self.comparison.difference != self.comparison.difference:
            values["comparison"]["difference"] = None  # JSON has no NaN
        values["equal"], values["status"], values["advice"] = self.comparison.equal, self.status, advice(self)
        for name in ("gain", "spread", "saved", "share", "network_share"):
            values[name] = getattr(self, name)
        return values

    def __str__(self) -> str:
        lines = [f"{self.host}: {self.name}", *self._table(), "", f"  results   {self._results()}"]
        if self.varies is not None:
            lines.append(f"  varying   {self.varies}")
        if self.fused is not None:
            total = self.fused + sum(self.kept.values())
            lines.append(f"  fused     {self.fused} of {total} steps" if total else "  fused     fastdiff saw no step")
            lines += [f"  kept      {count}: {reason}" for reason, count in self.kept.items()]
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join([*lines, "", advice(self)])

    def _table(self) -> Iterator[str]:
        if self.state is not None:
            shape, dtype, device = self.state
            yield f"  {self.steps} steps of {shape}, {dtype}, {device}"
        yield f"  {self.environment}"
        a, b = self.without, self.enabled
        yield f"  {'':<12}{'without':>12}{'fastdiff':>12}"
        yield f"  {'whole run':<12}{seconds(a.run):>12}{seconds(b.run):>12}   {self._change()}"
        if a.step is None or b.step is None or a.steps is None or b.steps is None:
            return
        yield f"  {'one step':<12}{seconds(a.step):>12}{seconds(b.step):>12}   {_times(a.step, b.step)}"
        yield f"  {'all steps':<12}{seconds(a.steps):>12}{seconds(b.steps):>12}"
        if a.network is not None and b.network is not None:
            yield f"  {'network':<12}{seconds(a.network):>12}{seconds(b.network):>12}"
        if a.timed and b.timed:
            yield f"  {'steps/run':<12}{_percent(a.steps / a.timed):>12}{_percent(b.steps / b.timed):>12}"

    def _change(self) -> str:
        spread = "" if self.spread is None else f"; runs of one side vary by {_percent(self.spread)}"
        return f"{_less(self.gain, 'more')}{'' if self.told else ', which may be chance'}{spread}"

    def _results(self) -> str:
        found = self.comparison
        source = " with torch's noise; noise='philox' gives others, by design" if self.noise == "philox" else ""
        if found.equal:
            equal = "equal bit for bit" if found.bits else "equal in every value; zeros or NaN have other bits"
            if self.starts is not None:
                equal += f", though the states differ from step {self.starts} on"
            return equal + source
        where = f" at {found.where}" if found.where else ""
        size = found.note or f"largest difference {found.difference:.3g}"
        if self.starts is None:
            starts = ", after the last state that was seen" if self.steps else ""
        else:
            starts = f", from step {self.starts} on" if self.starts else ", from the first state on"
        return f"DIFFERENT{source}: {size}{where}{starts}"


def advice(report: Report) -> str:
    """The last sentence: whether to adopt fastdiff for this run, by what it changes and what it gains."""
    if report.varies is not None:
        return "Whether fastdiff gives the same results cannot be said, as runs of one side differ."
    if not report.comparison.equal:
        return _why_not_equal(report.comparison)
    if report.fused == 0:
        if report.kept:
            return "Nothing to gain here: every step was left to the original code."
        return f"What fastdiff gains cannot be said: {_unseen(report)}."
    gain, saved, spread = report.gain, report.saved, report.spread
    if report.told:
        if saved is not None and (gain * saved <= 0 or abs(gain) > 2 * abs(saved) + 0.05):
            why = _why_not_steps(report, saved)
            return f"Whole runs took {_less(gain, 'longer')} with fastdiff, {why}."
        if gain < 0:
            return f"Not worth it here: the run takes {_percent(-gain)} longer with fastdiff."
        size = "A small gain" if gain < 0.05 else "Worth it here"
        return f"{size}: the run takes {_percent(gain)} less time ({1 / (1 - gain):.2f} times as fast)."
    if saved is None:
        return "No gain can be told: whole runs differ by no more than runs of one side among themselves."
    if report.network_share is not None:
        what = f"The network takes {_percent(report.network_share)} of the run"
    else:
        what = f"The steps take {_percent(report.share)} of the run"
    if saved <= 0:
        return f"{what}: fastdiff gains nothing."
    if saved < 0.01:
        return f"{what}: fastdiff gains {_percent(saved)}, which you will not notice."
    varies = "whole runs show no more than 1 %" if spread is None else f"runs of one side vary by {_percent(spread)}"
    return f"{what}: by its steps fastdiff should gain {_percent(saved)}, but {varies}."


def _why_not_equal(found: Comparison) -> str:
    where = f" at {found.where}" if found.where else ""
    if found.mended and not found.lost:
        return (
            f"Without fastdiff the result has NaN or Inf{where}, in {found.mended} values that are finite with it: see "
            "'Where we differ' in docs/integrations.md before you adopt it."
        )
    if found.lost:
        return (
            f"Do not adopt fastdiff here: with it the result has NaN or Inf{where}, in {found.lost} values that are "
            "finite without it."
        )
    return "Do not adopt fastdiff here before it is known why the results differ."


def _unseen(report: Report) -> str:
    if report.replaced:
        names = " and ".join(report.replaced)
        return (
            f"the run replaces {names} of the object, so that fastdiff was in none of the steps. Return two functions, "
            "(theirs, ours), where ours calls fastdiff.enable after that, or change the import of the class that is "
            "made there"
        )
    return (
        "it saw none of the object's steps. They are compiled, or replaced by attributes of the object, or those of "
        "another object that the run makes"
    )


def _why_not_steps(report: Report, saved: float) -> str:
    """What the whole runs gain beyond the median step, or lose: mostly the network's, or single steps', or chance."""
    a, b = report.without, report.enabled
    left = report.gain - saved

    def explains(part: float) -> bool:
        return 0.5 <= part / left <= 1.5

    if a.timed and a.network and b.network is not None and explains((a.network - b.network) / a.timed):
        return f"as the network took {_less(1 - b.network / a.network, 'longer')}: its time is not fastdiff's"
    if a.timed and a.steps and b.steps is not None and explains((a.steps - b.steps) / a.timed - saved):
        return (
            f"as all steps together took {_less(1 - b.steps / a.steps, 'longer')}, unlike the median one: the first "
            "steps of every new object take longer, such as of a copy that each run makes"
        )
    return f"which the time in the steps ({_less(saved, 'longer')}) does not explain: check again on a quiet machine"


def seconds(value: float) -> str:
    unit, number = "s", value
    for smaller in ("ms", "us"):
        if number < 1:
            unit, number = smaller, number * 1e3
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _less(gain: float, more: str) -> str:
    return f"{_percent(abs(gain))} {'less' if gain >= 0 else more}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %"


def _times(before: float, after: float) -> str:
    ratio = before / after if after else float("inf")
    return f"{ratio:.3g} times faster" if ratio >= 1 else f"{1 / ratio:.3g} times slower"
