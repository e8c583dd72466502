"""What became slower between two result files: fastdiff's steps as shares of a copy's speed in the same run.

    python benchmarks/compare.py benchmarks/results/cpu-epyc.json build/benchmarks.json [--threshold 0.15]

Shares, because they leave out how fast a machine's memory is. Compared is each median of fastdiff, by whatever backend,
in a case whose copy of as many bytes was timed too, on the same device in both files: steps, and their growth over
elements and threads. Noise, parts of a call, chains, training, other codebases, the forecast and sampling in bulk have
no copy.

Names every share that fell by more than the threshold, as a part of the old one, and what only one of the files has.
Exits with 1 where something fell, with 2 where a file is refused or the two have nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import summary
from providers import is_ours
from summary import Results, seconds

Key = tuple[str, str, str]  # device, case and provider


@dataclass(frozen=True)
class Change:
    key: Key
    old: float
    new: float

    @property
    def fall(self) -> float:
        """As a part of the old share: 0.2 from 50 % to 40 %."""
        return 1 - self.new / self.old


def shares(results: Results) -> dict[Key, float]:
    """The share of a copy's speed that each of fastdiff's medians has, where its case was copied too."""
    return {
        (summary.device(record), case, provider): seconds(results[case, "copy"]) / seconds(record)
        for (case, provider), record in results.items()
        if is_ours(provider) and (case, "copy") in results
    }


def changes(old: Results, new: Results) -> list[Change]:
    """Of what both have, the deepest fall first."""
    before, after = shares(old), shares(new)
    found = [Change(key, before[key], after[key]) for key in before.keys() & after.keys()]
    return sorted(found, key=lambda change: (-change.fall, change.key))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What became slower between two result files.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.15, help="the fall that is named (default 0.15: 15 %%)")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold < 1:
        parser.error(f"--threshold: expected a part of 1, got {options.threshold}")
    try:
        (old_file, old), (new_file, new) = summary.read(options.old), summary.read(options.new)
    except summary.Refused as error:
        parser.error(str(error))
    found = changes(old, new)
    if not found:
        parser.error(f"nothing to compare: {options.old} and {options.new} have no share of a copy in common")
    if summary.cpu(old_file.machine) != summary.cpu(new_file.machine):
        print(f"Two machines: {summary.cpu(old_file.machine)}; {summary.cpu(new_file.machine)}")
    fallen = [change for change in found if change.fall > options.threshold]
    for change in fallen:
        _, case, provider = change.key
        print(f"fell by {change.fall:.0%}: {case}, {provider}: {change.old:.1%} of a copy, now {change.new:.1%}")
    print(f"{len(fallen)} of {len(found)} shares of a copy fell by more than {options.threshold:.0%}.")
    for where, one, other in (("old", shares(old), shares(new)), ("new", shares(new), shares(old))):
        for _, case, provider in sorted(one.keys() - other.keys()):
            print(f"only in the {where} file: {case}, {provider}")
    if fallen:
        sys.exit(1)


if __name__ == "__main__":
    main()
