"""The report of what was measured: one HTML page with its charts inside, and the same as Markdown.

    make report
    python benchmarks/report.py build/benchmarks.json

Every figure is computed from the files, which `make bench` writes (and `make gpu`: gpu-benchmarks.json). Of several
files of one machine, environment and commit the later ones win; others stand apart. Without arguments:
build/benchmarks.json where it is there, else what is committed in benchmarks/results. A file that is damaged, of an
unknown format, or of a run that failed or was cut off is refused, before anything is written.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import summary
from chapters import blocks_of
from pages import html, markdown, wrap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HTML = ROOT / "benchmarks" / "report" / "index.html"
MARKDOWN = ROOT / "docs" / "performance.md"
TITLE = "fastdiff: what a step of diffusion sampling costs"


def build(files: Sequence[Path], html_file: Path = HTML, markdown_file: Path = MARKDOWN) -> tuple[str, str]:
    """The page as HTML and as Markdown, its links for where they go.

    Raises summary.Refused for a file that no figure may be taken from.
    """
    found, gpus = [], []
    for file in files:
        report = summary.load(file)
        if isinstance(report, dict) and "cases" in report:
            gpus.append(checked_gpu(report, file))
        else:
            found.append(summary.checked(report, file))
    if not found:
        raise summary.Refused("nothing but GPU results: expected a file of `make bench` too")
    names = [shlex.quote(shown(file)) for file in files]
    blocks = blocks_of(summary.merge(found), gpus, names)
    command = " ".join(["python benchmarks/report.py", *names])
    made = wrap(f"<!-- Made by `{command}`: do not edit. -->")
    roots = [f"{os.path.relpath(ROOT, file.resolve().parent)}/" for file in (html_file, markdown_file)]
    return html(TITLE, blocks, roots[0]), f"{made}\n{markdown(TITLE, blocks, roots[1])}"


GPU_KEYS = {
    "environment": {"python"},
    "goals": {"goal", "found", "met"},
    "chains": {"network", "how", "ms"},
    "cases": {"kind", "dtype", "elements", "provider", "device_us", "share_of_copy", "gb_per_s"},
}


def checked_gpu(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """What benchmarks/gpu.py wrote. Raises summary.Refused where that was no GPU, or something failed."""
    missing = {"environment", "conditions", "goals", "chains", "left_out", "failures", "commit"} - report.keys()
    if missing:
        raise summary.Refused(f"{file}: is of an unknown format: has no {', '.join(sorted(missing))}")
    for part, keys in GPU_KEYS.items():
        rows = [report[part]] if part == "environment" else report[part]
        if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
            raise summary.Refused(f"{file}: is of an unknown format: {part} without {', '.join(sorted(keys))}")
    if report["failures"]:
        raise summary.Refused(f"{file}: is of a run that failed: {'; '.join(report['failures'])}")
    if report.get("rehearsal"):
        raise summary.Refused(f"{file}: is a rehearsal on a CPU, not a measurement of a GPU")
    return report


def shown(file: Path) -> str:
    """A path as one types it in the repository's root."""
    path = file.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else file)


def default_files() -> list[Path]:
    new, gpu = ROOT / "build" / "benchmarks.json", RESULTS / "gpu-benchmarks.json"
    return [new if new.exists() else RESULTS / "cpu-epyc.json", *([gpu] if gpu.exists() else [])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the report of what was measured, as HTML and as Markdown.")
    parser.add_argument("json", type=Path, nargs="*", help="what `make bench` or `make gpu` wrote")
    parser.add_argument("--html", type=Path, default=HTML)
    parser.add_argument("--markdown", type=Path, default=MARKDOWN)
    options = parser.parse_args(arguments)
    try:
        pages = build(options.json or default_files(), options.html, options.markdown)
    except summary.Refused as error:
        sys.exit(f"no report: {error}")
    for path, page in zip((options.html, options.markdown), pages, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        print(shown(path))


if __name__ == "__main__":
    main()
