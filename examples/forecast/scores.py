"""How good an ensemble is: the continuous ranked probability score, and how often the truth is inside its intervals."""

from __future__ import annotations

import torch
from torch import Tensor


def crps(members: Tensor, truth: Tensor) -> Tensor:
    """The continuous ranked probability score of an ensemble: 0 at best, in the unit of what is forecast.

    E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007, eq. 21), the second mean over pairs of different members (the
    "fair" estimate of Ferro 2014): what M members say of the distribution they are drawn from, whatever M is. Of a
    single member it is the absolute error.

    Args:
        members: [M, ...].
        truth: [...].

    Returns:
        float64, like truth.
    """
    if members.shape[1:] != truth.shape or not len(members):
        raise ValueError(f"members: expected shape {['M', *truth.shape]}, M at least 1, got {list(members.shape)}")
    ordered = members.double().sort(0).values
    count = len(ordered)
    error = (ordered - truth).abs().mean(0)
    if count == 1:
        return error
    # of the ordered members, the k-th is the larger one in k pairs and the smaller one in the others
    weight = 2 * torch.arange(count, dtype=torch.float64) - (count - 1)
    apart = torch.tensordot(weight, ordered, 1) * 2 / (count * (count - 1))
    return error - apart / 2


def coverage(members: Tensor, truth: Tensor, share: float) -> float:
    """How often the truth [...] is inside the central interval that holds this share of the members [M, ...]."""
    tail = (1 - share) / 2
    low, high = members.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), 0)
    return ((low <= truth) & (truth <= high)).double().mean().item()


def interval(difference: Tensor, groups: Tensor, draws: int = 2000) -> tuple[float, float]:
    """A 90 % interval of the mean of `difference` [N], by a bootstrap over whole groups [N] (of dependent values)."""
    names = groups.unique()
    sums = torch.stack([difference[groups == name].sum() for name in names])
    counts = torch.stack([(groups == name).sum() for name in names])
    chosen = torch.randint(len(names), (draws, len(names)), generator=torch.Generator().manual_seed(0))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = means.quantile(torch.tensor([0.05, 0.95], dtype=means.dtype)).tolist()
    return low, high
