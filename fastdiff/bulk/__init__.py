"""N samples by index, by any number of processes on any number of machines: always the same ones, and none lost.

    torchrun --nproc-per-node 8 -m fastdiff.bulk sample run.toml --out samples
    python -m fastdiff.bulk merge samples --npz samples.npz

Sample i is made from the seed mix64(base) + i and from condition i, always at the same place of the same micro-batch.
Processes share a folder, in which each chunk of consecutive samples is a file, written beside its place and renamed;
they do not talk to each other. A run that was stopped goes on where it was when the same command is run again. See
docs/bulk.md.
"""

from .conditions import cycle, random_classes, value
from .export import merge
from .folder import Status, status
from .job import Job
from .settings import Loaded, load
from .verify import Checked, verify
from .worker import sample

__all__ = [
    "Checked",
    "Job",
    "Loaded",
    "Status",
    "cycle",
    "load",
    "merge",
    "random_classes",
    "sample",
    "status",
    "value",
    "verify",
]
