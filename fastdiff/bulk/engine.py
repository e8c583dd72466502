"""Which process of a run this is, and the device it should use: read from what torchrun, accelerate or srun set."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch


def rank_of(environ: Mapping[str, str] | None = None) -> tuple[int, int, int]:
    """(rank, world size, local rank) of this process.

    RANK, WORLD_SIZE and LOCAL_RANK where they are set (torchrun, accelerate), else SLURM_PROCID, SLURM_STEP_NUM_TASKS
    and SLURM_LOCALID (srun), else (0, 1, 0). Without a local rank it is the rank. SLURM_PROCID alone is 0 of 1: a batch
    script has it without being a step of several tasks.

    Args:
        environ: the environment; default: that of this process.

    Raises:
        ValueError: a variable without the one that belongs to it, or with a value that it cannot have.
    """
    environ = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(name in environ for name in names):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        if names[1] not in environ:
            return 0, 1, 0
    for name, other in ((names[0], names[1]), (names[1], names[0])):
        if name not in environ:
            beside = other if other in environ else names[2]
            raise ValueError(f"{name}: expected it to be set, as {beside} is, got nothing")
    world_size = _integer(names[1], environ[names[1]], 1, None)
    rank = _integer(names[0], environ[names[0]], 0, world_size)
    local_rank = _integer(names[2], environ[names[2]], 0, None) if names[2] in environ else rank
    return rank, world_size, local_rank


def device_of(local_rank: int, name: str | None = None) -> torch.device:
    """The device of a process.

    Args:
        local_rank: its number on its machine. Processes beyond the number of GPUs share them in turn.
        name: "cpu", "cuda:1", ...; "cuda" is the GPU of the local rank. Default: "cuda" where there is one, else "cpu".

    Raises:
        ValueError: not the name of a device, or there is no CUDA here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected the name of a device, such as 'cpu' or 'cuda:0', got {name!r}") from None
    if device.type != "cuda":
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError):  # the latter of builds of torch without the device
            raise ValueError(f"device: expected one that is here and holds numbers, got {name!r}") from None
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is here, got {name!r}, and torch finds no CUDA")
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if device.index is None else device


def _integer(name: str, text: str, low: int, end: int | None) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low or (end is not None and number >= end):
        bounds = f"of at least {low}" if end is None else f"in [{low}, {end})"
        raise ValueError(f"{name}: expected an int {bounds}, got {text!r}")
    return number
