"""A page as a list of blocks, written as HTML with everything inside it, or as Markdown.

Text inside blocks is Markdown with `code`, **bold** and [links](root/path), where root/ is the repository's root.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import charts

# blue, orange, ... : Okabe and Ito's palette, told apart with any colour vision
STYLE = """
:root { --paper: #fcfcfa; --ink: #1c1c1a; --soft: #63635d; --line: #dcdcd4; --raised: #f3f3ee; --fastdiff: #0a7d62;
  --host: #c4501b; --compiled: #b0578d; --plain: #b07200; --other: #4a76b8; --copy: #77776f; --network: #91918a;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161718; --ink: #e8e8e4; --soft: #a3a39c; --line: #35363a; --raised: #202124; --fastdiff: #35c49c;
    --host: #ef8354; --compiled: #d98bbd; --plain: #eab54d; --other: #7fa8e6; --copy: #8f8f89; --network: #6d6e74; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; }
p, ul { margin: .5rem 0 1rem; max-width: 46rem; }
ul { padding-left: 1.2rem; }
.lead { font-size: 1.2rem; line-height: 1.5; }
a { color: inherit; text-decoration-color: var(--fastdiff); text-underline-offset: .15em; }
nav { font-size: .9rem; line-height: 2; color: var(--soft); margin: 1.5rem 0 0; }
nav a { white-space: nowrap; margin-right: .9rem; }
code { font-size: .9em; }
pre { background: var(--raised); padding: .75rem 1rem; overflow-x: auto; border-radius: .35rem; max-width: 46rem; }
figure { margin: 1rem 0; min-width: 0; }
figure h3 { margin: 0 0 .5rem; }
figcaption { font-size: .85rem; line-height: 1.45; color: var(--soft); margin-top: .35rem; }
.grid { display: grid; gap: 1.5rem 2.25rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.grid figure { margin: 0; max-width: 28rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.soft { fill: var(--soft); font-size: 11px; }
svg text.strong { font-weight: 700; }
polyline { fill: none; stroke-width: 1; stroke: currentColor; }
.rule, .axis { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 1 3; }
.spread { stroke: var(--ink); stroke-width: 1.5; }
.line { stroke-width: 2; }
.dashed { stroke-dasharray: 5 4; }
.line.shade1 { stroke-dasharray: 9 3; }
.line.shade2 { stroke-dasharray: 3 2; }
svg circle.shade1, svg circle.shade2 { fill: var(--paper); stroke-width: 1.6; }
.legend { font-size: .85rem; color: var(--soft); margin: 0 0 .4rem; }
.legend span { white-space: nowrap; margin-right: .9rem; }
.legend svg { display: inline-block; width: 1.9em; height: .8em; margin-right: .35em; vertical-align: -.05em; }
.scroll { overflow-x: auto; margin: .75rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
th.l, td.l { text-align: left; }
td.w { white-space: normal; max-width: 26rem; overflow-wrap: break-word; }
th:first-child, td:first-child { padding-left: 0; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .3rem .4rem; }
  .rows, .rows tbody, .rows tr, .rows td { display: block; }
  .rows tr:first-child { display: none; }
  .rows tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .rows td, .rows td.l { padding: .05rem 0 .05rem 7.5rem; text-align: left; white-space: normal; max-width: none;
    border: 0; position: relative; overflow-wrap: anywhere; }
  .rows td::before { content: attr(data-head); position: absolute; left: 0; width: 7rem; color: var(--soft); }
  .rows td:first-child { padding-left: 0; font-weight: 600; }
  .rows td:first-child::before, .rows td:empty { display: none; }
}
summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin: .25rem 0; }
"""
# what draws a colour: the providers that a chart may show, and what else has an area or a line
COLOURS = ("fastdiff", "host", "compiled", "plain", "other", "copy", "network")
STYLE += "".join(
    f"rect.{c}, circle.{c} {{ fill: var(--{c}); }} polyline.{c}, circle.{c} {{ stroke: var(--{c}); }}\n"
    for c in COLOURS
)


@dataclass(frozen=True)
class Heading:
    """anchor: what links to it name, where it is not its text."""

    text: str
    level: int = 2
    anchor: str = ""

    @property
    def place(self) -> str:
        return self.anchor or re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Text:
    """A paragraph; lead: the first one, which is set larger."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    """align: a letter per column, "l" left, "r" right, "w" left and wrapped; the last one also serves the rest.

    folded: what a reader of the HTML page opens it by; None leaves it open, and on a phone it shows row below row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = "lr"
    folded: str | None = None


@dataclass(frozen=True)
class Figure:
    """A chart of charts.py. Markdown has none: the figures' tables stand there alone.

    legend: (class, shade, dashed, name) of each series.
    """

    svg: str
    title: str = ""
    caption: str = ""
    legend: Sequence[tuple[str, int, bool, str]] = ()


@dataclass(frozen=True)
class Grid:
    """Charts side by side where there is room."""

    figures: Sequence[Figure]


Block = Heading | Text | Items | Code | Table | Figure | Grid


def inline(text: str, root: str) -> str:
    """Markdown inside a line, as HTML."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text).replace('href="root/', f'href="{root}')


def html(title: str, blocks: Sequence[Block], root: str) -> str:
    """The whole page. root: the way from its folder to the repository's."""
    parts = [_html(block, root) for block in blocks]
    chapters = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    contents = "".join(f'<a href="#{chapter.place}">{escape(chapter.text)}</a> ' for chapter in chapters)
    # after what is seen first
    first = next(i for i, block in enumerate(blocks) if isinstance(block, Heading))
    parts.insert(first, f"<nav>{contents}</nav>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html(block: Block, root: str) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{block.place}">{inline(text, root)}</h{level}>'
        case Text(text, lead):
            return f"<p{' class=lead' if lead else ''}>{inline(text, root)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{inline(item, root)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Grid(figures):
            return '<div class="grid">' + "".join(_html(figure, root) for figure in figures) + "</div>"
        case Figure(svg, title, caption, legend):
            names = "".join(
                f"<span>{charts.key(kind, shade, dashed)}{escape(name)}</span> " for kind, shade, dashed, name in legend
            )
            return (
                "<figure>"
                + (f"<h3>{inline(title, root)}</h3>" if title else "")
                + (f'<p class="legend">{names}</p>' if legend else "")
                + svg
                + (f"<figcaption>{inline(caption, root)}</figcaption>" if caption else "")
                + "</figure>"
            )
        case Table(head, rows, align, folded):
            kinds = [*align, *align[-1] * len(head)][: len(head)]
            titles = [escape(re.sub(r"[`*]", "", name)) for name in head]
            body = _row("th", head, kinds, root)
            body += "".join(_row("td", row, kinds, root, [] if folded else titles) for row in rows)
            whole = f'<div class="scroll"><table{"" if folded else " class=rows"}>{body}</table></div>'
            return f"<details><summary>{inline(folded, root)}</summary>{whole}</details>" if folded else whole
    raise TypeError(f"block: expected a block, got {type(block).__name__}")


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str], root: str, titles: Sequence[str] = ()) -> str:
    """titles: of the columns, which a cell shows by itself where the page is narrow."""
    named = {"l": "l", "w": "l w", "r": "r"}
    told = [f' data-head="{title}"' for title in titles] or [""] * len(cells)
    row = zip(kinds, told, cells, strict=True)
    return (
        "<tr>" + "".join(f'<{tag} class="{named[k]}"{t}>{inline(cell, root)}</{tag}>' for k, t, cell in row) + "</tr>"
    )


def markdown(title: str, blocks: Sequence[Block], root: str) -> str:
    """The same as Markdown, wrapped at 120 characters but for its tables."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text):
                parts.append(wrap(text))
            case Items(items):
                parts.append("\n".join(wrap(item, "- ") for item in items))
            case Code(text):
                parts.append(f"```sh\n{text}\n```")
            case Table(head, rows, align):
                kinds = [*align, *align[-1] * len(head)][: len(head)]
                rule = ["---:" if kind == "r" else "---" for kind in kinds]
                cells = [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in rows]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *cells)))
    return "\n\n".join(parts).replace("](root/", f"]({root}") + "\n"


def wrap(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        text, 120, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
