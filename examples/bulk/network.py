"""The network of examples/digits, for `network = "network:digits"` in digits.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from fastdiff import NoiseSchedule

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))

import model  # noqa: E402


def digits() -> nn.Module:
    """Predicts eps: (x [B, 1, 8, 8], t int64 [B], y int64 [B]) -> [B, 1, 8, 8]."""
    return model.Denoiser(model.load(), NoiseSchedule.cosine(1000)).eval()
