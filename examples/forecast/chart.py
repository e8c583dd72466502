"""The page that forecast.py writes: one HTML file, its pictures drawn in it as SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import denoiser
import page as pages  # that of examples/digits, which forecast.py has put on the path
import torch
from scores import coverage
from series import CONTEXT, FIRST_YEAR, HORIZON, TEST, TRAINING
from torch import Tensor

if TYPE_CHECKING:
    from forecast import Evaluation, Times

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
INK, SOFT, LINE, MARK = (f"var(--{name})" for name in ("ink", "soft", "line", "mark"))
# Of every forecast: colour, width and dashes of its line.
STYLES = {
    "what came": (INK, 2.0, ""),
    "network": (MARK, 2.0, ""),
    "damped persistence": (SOFT, 1.2, ""),
    "climatology": (SOFT, 1.5, "2 3"),
    "persistence": (SOFT, 1.5, "7 4"),
}
LEAD = 3  # months ahead, in the picture of all years


class Axes:
    """A drawing of SVG elements by data coordinates."""

    def __init__(self, width: int, height: int, across: tuple[float, float], up: tuple[float, float]) -> None:
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 34, width - 8, 8, height - 22
        self.across, self.up = across, up
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.across
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.up
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(a)},{self.y(b)}" for a, b in zip(xs, ys, strict=True))

    def text(self, x: float, y: float, label: str, anchor: str) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{SOFT}">{html.escape(label)}</text>')

    def grid(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]]) -> None:
        """A line across and a label for each of ys; a label for each of xs."""
        for value, label in ys:
            y = self.y(value)
            self.parts.append(f'<path d="M{self.left} {y}H{self.right}" stroke="{LINE}"/>')
            self.text(self.left - 6, y + 4, label, "end")
        for value, label in xs:
            self.text(self.x(value), self.height - 5, label, "middle")

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        colour, width, dashes = STYLES[style]
        self.parts.append(
            f'<polyline points="{self.points(xs, ys)}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-linejoin="round" stroke-dasharray="{dashes or "none"}"/>'
        )

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], opacity: float) -> None:
        outline = f"{self.points(xs, low)} {self.points(xs[::-1], high[::-1])}"
        self.parts.append(f'<polygon points="{outline}" fill="{MARK}" fill-opacity="{opacity}"/>')

    def fan(self, xs: Sequence[float], members: Tensor) -> None:
        """The central 90 % and 50 % of the members [M, len(xs)], and their median."""
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=members.dtype)
        lowest, low, middle, high, highest = members.quantile(levels, 0).tolist()
        self.band(xs, lowest, highest, 0.22)
        self.band(xs, low, high, 0.3)
        self.line(xs, middle, "network")

    def svg(self, label: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="100%" font-size="12" role="img" '
            f'aria-label="{html.escape(label)}" style="display:block">{"".join(self.parts)}</svg>'
        )


def legend(names: Sequence[str], more: str = "") -> str:
    """What the lines are."""
    parts = []
    for name in names:
        colour, width, dashes = STYLES[name]
        stroke = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes or "none"}"'
        sample = f'<svg width="26" height="8" aria-hidden="true"><path d="M0 4H26" {stroke}/></svg>'
        parts.append(f'<span style="white-space:nowrap">{sample} {html.escape(name)}</span>')
    return f'<p class="small">{" &ensp; ".join(parts)}{more}</p>'


def ticks(low: float, high: float, step: int) -> list[tuple[float, str]]:
    first = int(-(-low // step)) * step
    return [(value, f"{value}".replace("-", "\N{MINUS SIGN}")) for value in range(first, int(high) + 1, step)]


def date(month: int) -> str:
    """The name of a month counted from January of the first year."""
    return f"{MONTHS[month % 12]} {FIRST_YEAR + month // 12}"


def years(found: Evaluation) -> str:
    """All test years: what was forecast some months ahead, and what came, as anomalies."""
    ahead = LEAD - 1
    month = found.windows.start + ahead
    mean = found.series.mean[month % 12]
    when = [FIRST_YEAR + (m + 0.5) / 12 for m in month.tolist()]
    members, truth = found.members["network"][:, :, ahead] - mean, found.truth[:, ahead] - mean
    low, high = min(members.min().item(), truth.min().item()), max(members.max().item(), truth.max().item())
    axes = Axes(720, 260, (TEST[0], TEST[-1] + 1), (low, high))
    axes.grid([(year + 0.5, f"{year}") for year in TEST[::2]], ticks(low, high, 2))
    axes.fan(when, members)
    axes.line(when, truth.tolist(), "what came")
    return axes.svg(f"Anomalies forecast {LEAD} months ahead, and those that came")


def fan(found: Evaluation, number: int, up: tuple[float, float]) -> str:
    """One forecast: the months before, the fan, what came, and the forecasts without a network."""
    start = int(found.windows.start[number])
    past = found.series.celsius[start - CONTEXT : start].tolist()
    months = list(range(1, HORIZON + 1))
    usual = found.members["climatology"][:, number]
    level = torch.tensor([0.05, 0.95], dtype=usual.dtype)
    lines = {
        "what came": found.truth[number].tolist(),
        "persistence": found.members["persistence"][0, number].tolist(),
    }
    axes = Axes(360, 230, (1 - CONTEXT, HORIZON), up)
    axes.grid([(k, date(start + k - 1)) for k in (-2, 4, 10)], ticks(*up, 4))
    axes.fan(months, found.members["network"][:, number])
    for edge in usual.quantile(level, 0).tolist():
        axes.line(months, edge, "climatology")
    axes.line(months, lines["persistence"], "persistence")
    axes.line(list(range(1 - CONTEXT, HORIZON + 1)), past + lines["what came"], "what came")
    return axes.svg(f"Temperatures forecast from {date(start)}, and those that came")


def by_lead(found: Evaluation) -> str:
    """The CRPS of each forecast by the months ahead."""
    means = {name: score.mean(0).tolist() for name, score in found.scores.items()}
    high = max(max(of) for of in means.values())
    axes = Axes(360, 230, (1, HORIZON), (0, high))
    axes.grid([(k, f"{k}") for k in (1, 3, 6, 9, 12)], [(v / 2, f"{v / 2:g}") for v in range(int(2 * high) + 1)])
    for name in reversed(means):
        axes.line(list(range(1, HORIZON + 1)), means[name], name)
    return axes.svg("CRPS by months ahead")


def page(found: Evaluation, times: Sequence[Times]) -> str:
    """The page: HTML with everything inside, to be read from the top."""
    count = len(found.truth)
    gains = (found.scores["climatology"] - found.scores["network"]).mean(1)
    order = gains.argsort(descending=True).tolist()
    chosen = {"gains most on climatology": order[0], "is in the middle": order[count // 2], "loses most": order[-1]}
    shown = torch.cat([found.members[name][:, list(chosen.values())].flatten() for name in found.members])
    up = min(shown.min(), found.series.celsius.min()).item(), max(shown.max(), found.series.celsius.max()).item()
    fans = [
        pages.figure(
            fan(found, number, up),
            f"From <b>{date(int(found.windows.start[number]))}</b>, the forecast that {what}: CRPS "
            f"{found.scores['network'][number].mean():.2f}, climatology "
            f"{found.scores['climatology'][number].mean():.2f}",
        )
        for what, number in chosen.items()
    ]
    leads = pages.figure(by_lead(found), "<b>CRPS by months ahead</b>, degrees Celsius. Less is better")
    return pages.document(
        "A year ahead, off Peru",
        [
            f"""
<p>Every few years the sea off Peru is several degrees too warm: El Ni&ntilde;o. From the last {CONTEXT} months a small
network draws the next {HORIZON}, {len(found.members["network"])} times, each a chain of {denoiser.STEPS} DDPM steps. It
learned from {TRAINING[0]} to {TRAINING[-1]}; the forecasts are of {TEST[0]} to {TEST[-1]}.</p>
<p>{_summary(found, times[0])}</p>""",
            f"<h2>{LEAD} months ahead</h2>",
            f'<div class="scroll"><div style="min-width:36rem">{years(found)}</div></div>',
            legend(
                ("what came", "network"),
                " &ensp; Degrees Celsius above what a calendar month had in the training years. The line is the "
                "median, the bands hold 50 % and 90 % of the members. On a narrow screen the picture scrolls sideways.",
            ),
            "<h2>Fans</h2>",
            pages.grid([*fans, leads], "two"),
            legend(
                ("what came", "network", "climatology", "persistence", "damped persistence"),
                " &ensp; Degrees Celsius; in the fans climatology is the interval of 90 %.",
            ),
            "<h2>Is it any good?</h2>",
            *_scores(found),
            "<h2>How long it takes</h2>",
            *_times(times),
        ],
    )


def percent(share: float) -> str:
    return f"{share * 100:.0f} %".replace("-", "\N{MINUS SIGN}")


def _summary(found: Evaluation, one: Times) -> str:
    gains = {name: percent(found.gain(name)[0]) for name in found.scores if name != "network"}
    usual = "" if one.diffusers is None else f", {one.diffusers * 1000:.0f} with diffusers' scheduler"
    return (
        f"Its error (CRPS) is {gains['climatology']} lower than climatology's, {gains['persistence']} lower than "
        f"persistence's, and {gains['damped persistence']} lower than that of persistence which fades. One chain takes "
        f"{one.fastdiff * 1000:.0f} ms{usual}."
    )


def _scores(found: Evaluation) -> list[str]:
    rows = [
        (name, *(f"{value:.2f}" for value in (score.mean(), *score.mean(0)[[0, 5, 11]])))
        for name, score in found.scores.items()
    ]
    others = [name for name in found.scores if name != "network"]
    compared = [
        (name, percent(gain), f"{percent(low)[:-2]} to {percent(high)}", percent(found.worse(name)))
        for name, (gain, low, high) in ((name, found.gain(name)) for name in others)
    ]
    inside = [coverage(found.members["network"], found.truth, share) for share in (0.5, 0.9)]
    return [
        pages.table(("CRPS in month", "All", "1", "6", "12"), rows),
        f"""
<p class="small">The continuous ranked probability score over {len(found.truth)} forecasts, in degrees Celsius: 0 is
perfect, and of a forecast that is a single number it is the absolute error. Climatology: what the training years had in
that month. Persistence: the last month's anomaly stays. Damped persistence: it fades as it usually does from that
month, by regression, with the regression's residuals as members.</p>""",
        pages.table(("Against", "CRPS lower", "90 % interval", "Worse in"), compared),
        f"""
<p class="small">How much lower the network's CRPS is, and the share of the forecasts in which it is higher. The
interval is a bootstrap over years, since neighbouring forecasts share their months. Of the months that came
{percent(inside[0])} are in the network's interval of 50 %, and {percent(inside[1])} in that of 90 %.</p>""",
    ]


def _times(times: Sequence[Times]) -> list[str]:
    rows = []
    for of in times:
        usual = ("", "")
        if of.diffusers is not None:
            usual = f"{of.diffusers * 1000:.1f}", f"{of.diffusers / of.fastdiff:.1f}"
        rows.append((f"{of.batch}", f"{of.network * 1000:.1f}", f"{of.fastdiff * 1000:.1f}", *usual))
    agree = {
        None: "",
        True: ' Given the same noise and coefficients, both end with <span class="yes">the same bits</span>.',
        False: " Given the same noise and coefficients, they do not end with the same bits here.",
    }[None if times[0].equal is None else all(of.equal for of in times)]
    return [
        pages.table(("Batch", "Network", "fastdiff", "diffusers", "Ratio"), rows),
        f"""
<p class="small">Milliseconds of a whole chain of {denoiser.STEPS} steps on this machine, medians: of the network's
calls alone, with fastdiff, and by the usual loop around diffusers' DDPMScheduler, with the same network; and how many
times faster fastdiff is.{agree}</p>""",
    ]
