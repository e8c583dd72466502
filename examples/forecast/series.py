"""The monthly sea surface temperature that El Nino is seen in, inside statsmodels, and its windows and baselines.

Off Peru and Ecuador (0 to 10 degrees south, 80 to 90 west), January 1950 to December 2010, 732 means of a month in
degrees Celsius. Two forecasts that know no network are hard to beat there, each where the other is weak: the values
that a calendar month usually has (climatology), and the present anomaly going on (persistence).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from statsmodels.datasets import elnino
from torch import Tensor

FIRST_YEAR = 1950
TRAINING, TEST = range(1950, 1996), range(1996, 2011)
CONTEXT, HORIZON = 6, 12  # months that are known, and months that are forecast
CONDITION = CONTEXT + 4


class Windows(NamedTuple):
    """start: int64 [N], the first month to forecast, counted from January of the first year.
    context, target: float32 [N, CONTEXT] and [N, HORIZON], in standard deviations of their calendar month."""

    start: Tensor
    context: Tensor
    target: Tensor

    @property
    def condition(self) -> Tensor:
        """What the network is told, float32 [N, CONDITION]: the months before, and where in the year they end."""
        angle = self.start % 12 * (2 * math.pi / 12)
        season = torch.stack((angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()), 1)
        return torch.cat((self.context, season), 1)


class Series:
    """The temperatures, and their anomalies from what the training years say of each calendar month.

    Args:
        held_out: years that nothing is learned from beside those of TEST: neither means nor windows.

    Attributes:
        years: the training years.
        celsius: float64 [732].
        mean, std: float64 [12], of the training years, by calendar month.
        anomalies: float32 [732], (celsius - mean) / std.
    """

    def __init__(self, held_out: range = range(0)) -> None:
        table = torch.from_numpy(elnino.load_pandas().data.to_numpy(float)[:, 1:].copy())
        self.held_out = held_out
        self.years = [year for year in TRAINING if year not in held_out]
        known = table[[year - FIRST_YEAR for year in self.years]]
        self.mean, self.std = known.mean(0), known.std(0, correction=0)
        self.celsius = table.flatten()
        self.anomalies = ((table - self.mean) / self.std).flatten().float()

    def windows(self, years: range) -> Windows:
        """Every window that forecasts months of `years` alone; what it knows may be of the years before."""
        first, end = (12 * (year - FIRST_YEAR) for year in (years.start, years.stop))
        return self._cut([s for s in range(max(first, CONTEXT), end - HORIZON + 1)])

    def training_windows(self) -> Windows:
        """Every window of the training years that touches no year held out."""
        last = 12 * (TRAINING.stop - FIRST_YEAR)
        first, end = (12 * (year - FIRST_YEAR) for year in (self.held_out.start, self.held_out.stop))
        starts = range(CONTEXT, last - HORIZON + 1)
        return self._cut([s for s in starts if s + HORIZON <= first or s - CONTEXT >= end])

    def _cut(self, starts: list[int]) -> Windows:
        start = torch.tensor(starts)
        whole = self.anomalies.unfold(0, CONTEXT + HORIZON, 1)[start - CONTEXT]
        return Windows(start, whole[:, :CONTEXT], whole[:, CONTEXT:])

    def months(self, start: Tensor) -> Tensor:
        """The calendar months (0..11) of forecasts that start at `start` [N]: int64 [N, HORIZON]."""
        return (start[:, None] + torch.arange(HORIZON)) % 12

    def to_celsius(self, forecast: Tensor, start: Tensor) -> Tensor:
        """Forecasts [..., N, HORIZON] in standard deviations -> degrees Celsius, float64."""
        month = self.months(start)
        return forecast.double() * self.std[month] + self.mean[month]

    def truth(self, start: Tensor) -> Tensor:
        """What came: degrees Celsius, float64 [N, HORIZON]."""
        return self.celsius[start[:, None] + torch.arange(HORIZON)]

    # Forecasts without a network: float64 [members, N, HORIZON], degrees Celsius

    def climatology(self, start: Tensor) -> Tensor:
        """The training years' values of that calendar month, one member for each year."""
        known = self.celsius.view(-1, 12)[[year - FIRST_YEAR for year in self.years]]
        return known[:, self.months(start)]

    def persistence(self, start: Tensor) -> Tensor:
        """The last month's anomaly goes on: a single member."""
        before = start - 1
        anomaly = self.celsius[before] - self.mean[before % 12]
        return (self.mean[self.months(start)] + anomaly[:, None])[None]

    def damped_persistence(self, start: Tensor) -> Tensor:
        """The last anomaly as it usually fades: a regression for each month of departure and each lead.

        Its members are the regression plus each of the residuals that it has in the training windows.
        """
        known = self.training_windows()
        past, future = known.context[:, -1].double(), known.target.double()
        members = []
        for s in start.tolist():
            same = known.start % 12 == s % 12
            x, y = past[same][:, None], future[same]
            slope = (x * y).sum(0) / x.square().sum(0)
            members.append(slope * self.anomalies[s - 1].double() + y - slope * x)
        most = min(map(len, members))  # a month may have one training window more than another
        return self.to_celsius(torch.stack([m[-most:] for m in members], 1), start)
