"""The page that the demo writes: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff import to_uint8

if TYPE_CHECKING:
    from demo import Results

STYLE = """
:root { --paper: #fcfcfa; --ink: #1c1c1a; --soft: #6a6a64; --line: #dcdcd4; --mark: #1f6f5c; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161718; --ink: #e8e8e4; --soft: #9c9c96; --line: #35363a; --mark: #6fc7ae; }
  img { filter: invert(1); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 48rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0 1rem; }
code { font-size: .9em; }
img { display: block; width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption, .small { font-size: .85rem; line-height: 1.45; color: var(--soft); }
figcaption { margin-top: .35rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.grid { display: grid; gap: 1.25rem 1rem; margin: 1rem 0; }
.grid figure { margin: 0; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.four { grid-template-columns: repeat(2, 1fr); }
@media (min-width: 40rem) { .four { grid-template-columns: repeat(4, 1fr); } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
th { font-weight: 600; line-height: 1.25; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
@media (max-width: 30rem) { th, td { padding: .35rem; } th:first-child, td:first-child { padding-left: 0; } }
.yes { color: var(--mark); font-weight: 600; }
"""


def tiles(images: Tensor, columns: int, scale: int = 6) -> Image.Image:
    """The images [N, 1, H, W] in rows of `columns`: ink dark on paper, transparent between them (mode "LA")."""
    ink = to_uint8(images).reshape(-1, *images.shape[-2:]).numpy()
    count, height, width = ink.shape
    rows, gap = -(-count // columns), scale // 2
    down, across = height * scale + gap, width * scale + gap
    canvas = np.zeros((rows * down - gap, columns * across - gap, 2), np.uint8)
    for i, picture in enumerate(ink):
        top, left = i // columns * down, i % columns * across
        place = canvas[top : top + height * scale, left : left + width * scale]
        place[..., 0] = 255 - picture.repeat(scale, 0).repeat(scale, 1)
        place[..., 1] = 255
    return Image.fromarray(canvas, "LA")


def sheet(images: Tensor, columns: int, alt: str, scale: int = 6) -> str:
    """An <img> of `tiles`."""
    picture, file = tiles(images, columns, scale), io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def grid(figures: Iterable[str], kind: str) -> str:
    """Figures side by side: kind "two" (one column on a phone) or "four" (two on a phone)."""
    return f'<div class="grid {kind}">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def document(title: str, parts: Iterable[str]) -> str:
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
    )
    return head + f"<h1>{html.escape(title)}</h1>" + "\n".join(parts) + "</body></html>\n"


def build(results: Results) -> str:
    """The page: HTML with everything inside, to be read from the top."""
    intro = f"""
<p>A small network learned to draw from 1,500 of scikit-learn's scanned digits, 8 by 8 pixels each. It draws by taking
noise away in many steps. Here each chain of steps is run twice: with the step written in plain PyTorch, and with
fastdiff, where the step is one operation.</p>
<p class="small">{html.escape(results.environment)}. Everything on this page was made in {results.seconds:.0f}
seconds.</p>"""
    parts = (_comparisons, _trajectory, _grid, _inversion, _between, _eta, _collapse, _skipping)
    return document("fastdiff draws digits", [intro, *(text for part in parts for text in part(results))])


def _comparisons(results: Results) -> list[str]:
    count = len(results.comparisons[0].images)
    rows = [
        (
            c.name,
            f"{c.steps}",
            '<span class="yes">yes</span>' if c.equal else "no",
            f"{c.share:.0%}",
            f"{c.plain_all:.2f}",
            f"{c.fused_all:.2f}",
            f"{c.plain_step * 1e6:.0f}" + (f" + {c.plain_noise * 1e6:.0f}" if c.plain_noise else ""),
            f"{c.fused_step * 1e6:.0f}",
            f"{c.ratio:.2f}",
        )
        for c in results.comparisons
    ]
    head = (
        "Sampler", "Steps", "Same bits", "Read as asked", "All, plain (s)", "All, fused (s)",
        "Step, plain (&micro;s)", "Step, fused (&micro;s)", "Ratio of steps",
    )  # fmt: skip
    alone = [
        (
            row["name"],
            " &times; ".join(map(str, row["shape"])),
            f"{row['plain'] * 1e6:,.0f}",
            f"{row['fused'] * 1e6:,.0f}",
            f"{row['plain'] / row['fused']:.2f}",
        )
        for row in results.alone
    ]
    return [
        "<h2>The same digits, bit for bit</h2>",
        table(head, rows),
        f"""
<p class="small">{count} digits per chain, every class {count // 10} times. "Same bits": the plain step was given the
noise that the fused step makes, and <code>torch.equal</code> compares the digits. "Read as asked": the share that a
classifier trained on the real digits reads as the class asked for; of real digits that are new to it, it reads
{results.held_out:.1%} right. "All" includes the network, which takes nearly all of the time here. "Step": the median in
the chain, where every step finds the processor's caches full of the network; what <code>torch.randn</code> takes
follows the plus sign, and counts in the ratio. The fused step makes its noise itself.</p>""",
        grid(
            (
                figure(sheet(c.images, 10, f"{c.name}, {c.steps} steps"), f"<b>{c.name}</b>, {c.steps} steps")
                for c in results.comparisons
            ),
            "two",
        ),
        """
<p>Digits of 64 pixels leave a step little to do. Repeated by itself, and on larger images, it takes (plain: with
<code>torch.randn</code> where it adds noise):</p>""",
        table(("Step", "Batch", "Plain (&micro;s)", "Fused (&micro;s)", "Ratio"), alone),
    ]


def _trajectory(results: Results) -> list[str]:
    chain = results.trajectory
    rows = [part for pair in zip(chain["x"], chain["x0"], strict=True) for part in pair]
    return [
        "<h2>From noise to digits</h2>",
        figure(
            sheet(torch.cat(rows), len(chain["t"]), "States of a chain, and the clean images predicted from them", 8),
            f"Three digits along DDPM's 1000 steps, after the steps at t = {', '.join(map(str, chain['t']))}. Upper "
            "row of each pair: the state x. Lower row: the clean image that was predicted on the way to it.",
        ),
    ]


def _grid(results: Results) -> list[str]:
    parts = ["<h2>Fewer steps, more or less noise</h2>"]
    for eta in sorted({eta for eta, _ in results.grid}):
        cells = []
        for steps in sorted({steps for _, steps in results.grid}):
            cell = results.grid[eta, steps]
            caption = f"<b>&eta; = {eta:g}, {steps} steps</b><br>{cell['share']:.0%} read as asked"
            if eta == 0 and cell["apart"]:
                caption += f", {cell['apart']:.3f} from 1000 steps"
            cells.append(figure(sheet(cell["images"], 5, f"eta {eta:g}, {steps} steps"), caption))
        parts.append(grid(cells, "four"))
    return [
        *parts,
        """
<p class="small">DDIM, every picture from the same starting noise. At &eta; = 0 nothing is drawn on the way, so fewer
steps give nearly the same digits (the number is the RMS difference; pixels go from -1 to 1). Above 0 each number of
steps draws its own noise, and with it other digits.</p>""",
    ]


def _inversion(results: Results) -> list[str]:
    real, rows = results.inversion["real"], results.inversion["rows"]
    most, noise, _, _ = rows[-1]
    return [
        "<h2>Real digits to noise and back</h2>",
        """
<p>DDIM run backwards turns an image into the noise it would come from; run forwards, it should return. The more steps,
the closer.</p>""",
        figure(sheet(real, 10, "Real digits"), "<b>Real digits</b>, never seen by the network"),
        figure(
            sheet(noise, 10, "The noise of these digits"),
            f"<b>Their noise</b>, found in {most} steps. Its standard deviation is {noise.std():.2f} rather than 1: "
            "where the paper is blank in every digit, none is needed",
        ),
        *(
            figure(
                sheet(torch.cat((back, (back - real).abs() * 4 - 1)), 10, f"There and back in {steps} steps"),
                f"<b>There and back in {steps} steps</b>: RMS error {error:.4f}. Below: the error, four times as dark",
            )
            for steps, _, back, error in rows
            if steps in (10, 50, 500)
        ),
        table(
            ["Steps", *(f"{steps}" for steps, *_ in rows)],
            [["RMS error", *(f"{error:.4f}" for *_, error in rows)]],
        ),
    ]


def _between(results: Results) -> list[str]:
    return [
        "<h2>Between two real digits</h2>",
        figure(
            sheet(results.inversion["between"], 11, "Digits between two real digits"),
            "At both ends a real digit, inverted and decoded in 100 steps; between them, what their noise gives on the "
            "arc from one to the other (slerp). The network is not told any class.",
        ),
    ]


def _eta(results: Results) -> list[str]:
    equal = "equal in every bit" if results.determinism["equal"] else "not equal"
    return [
        "<h2>DDIM at &eta; = 1 is DDPM</h2>",
        """
<p>On the same noise the two give the same images if DDIM takes its eps from the clipped prediction, as OpenAI's code
does. With the network's own eps, the default of other codebases, clipping drives them apart.</p>""",
        table(
            ("100 steps", "RMS difference", "Largest"),
            [(case, f"{typical:.1e}", f"{largest:.1e}") for case, typical, largest in results.eta_one],
        ),
        "<h2>At &eta; = 0 the start decides everything</h2>",
        f"""
<p>Two runs from one x<sub>T</sub> with different seeds: {equal} at &eta; = 0,
{results.determinism["apart"]:.2f} apart (RMS) at &eta; = 0.8.</p>""",
    ]


def _collapse(results: Results) -> list[str]:
    spread, images = results.collapse["spread"], results.collapse["images"]
    return [
        "<h2>Without its noise, DDPM collapses</h2>",
        grid(
            (
                figure(sheet(images[True], 10, "Sampled with noise"), "<b>With noise</b>"),
                figure(sheet(images[False], 10, "Sampled without noise"), "<b>Without</b>: one digit per class"),
            ),
            "two",
        ),
        f"""
<p>Mean distance between two digits of a class: {results.collapse["real"]:.2f} for real ones, {spread[True]:.2f} with
noise, {spread[False]:.2f} without.</p>""",
    ]


def _skipping(results: Results) -> list[str]:
    of = {(row["schedule"], row["skip"]): row for row in results.skipping}
    distance = {case: f"{row['distance']:.2f}" for case, row in of.items()}
    more = of["cosine", 0.2]["signal"] / of["linear", 0.2]["signal"]
    rows = [
        (
            row["schedule"],
            f"{row['skip']:.0%}",
            f"{row['signal']:.3f}",
            f"{row['share']:.1%}",
            f"{row['distance']:.2f}",
            f"{row['spread']:.2f}",
        )
        for row in results.skipping
    ]
    return [
        "<h2>Skipping the first part of the chain</h2>",
        f"""
<p>The linear schedule begins with little but noise: with the first fifth of the chain left out, the distance from the
real digits goes from {distance["linear", 0.0]} to {distance["linear", 0.2]}. Under the cosine schedule {more:.0f} times
as much of the image is there at that point, and what is left out is missed sooner: from {distance["cosine", 0.0]} to
{distance["cosine", 0.2]} without one fifth, {distance["cosine", 0.4]} without two, {distance["cosine", 0.6]} without
three.</p>""",
        table(("Schedule", "Skipped", "Signal there", "Read as asked", "Fr&eacute;chet distance", "Spread"), rows),
        """
<p class="small">200 digits each, DDPM, 50 steps when nothing is skipped. Signal: the weight of the clean image
(&radic;alpha_bar) where the shortened chain begins, though it begins with noise alone. Distance: of the pixels' mean
and covariance from those of the real digits. Spread: mean distance between two digits of a class.</p>""",
        grid(
            (
                figure(
                    sheet(row["images"], 10, f"{row['schedule']}, {row['skip']:.0%} skipped"),
                    f"<b>{row['schedule']}</b>, first {row['skip']:.0%} skipped",
                )
                for row in results.skipping
                if row["skip"] in (0.2, 0.6)
            ),
            "two",
        ),
    ]
