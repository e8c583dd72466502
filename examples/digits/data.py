"""scikit-learn's 1,797 handwritten digits (real 8x8 grey scans, inside the package), and how to measure digits."""

from __future__ import annotations

import numpy as np
import torch
from model import IMAGE_SHAPE
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train_x [1500, 1, 8, 8], train_y [1500], held_out_x [297, 1, 8, 8], held_out_y [297]).

    Images are float32 in [-1, 1] (the scans hold 0..16), labels int64. Neither the U-Net nor the reader sees the
    held-out digits while it is trained.
    """
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=297, random_state=0, stratify=labels)
    images = [torch.from_numpy(part / 8 - 1).float().view(-1, *IMAGE_SHAPE) for part in parts[:2]]
    classes = [torch.from_numpy(part).long() for part in parts[2:]]
    return images[0], classes[0], images[1], classes[1]


class Reader:
    """A support vector classifier fitted to the real training digits (well under a second)."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.classifier = SVC(C=10.0, gamma=0.001).fit(self.pixels(x), y.numpy())

    @staticmethod
    def pixels(x: Tensor) -> np.ndarray:
        """Images [B, 1, 8, 8] in [-1, 1] -> rows of 64 numbers in 0..16, as scikit-learn has them."""
        return ((x.clamp(-1, 1) + 1) * 8).flatten(1).double().numpy()

    def share_read_as(self, x: Tensor, y: Tensor) -> float:
        """Share of the images x [B, 1, 8, 8] that are read as the classes y [B]."""
        return self.reads(x, y).double().mean().item()

    def reads(self, x: Tensor, y: Tensor | int) -> Tensor:
        """For each of the images x [B, 1, 8, 8]: 1 where it is read as the class y ([B], or one for all), else 0."""
        return torch.from_numpy(self.classifier.predict(self.pixels(x)) == np.asarray(y)).float()


def spread(x: Tensor, y: Tensor) -> float:
    """Mean distance between two images x [B, 1, 8, 8] of the same class y [B], over the pairs of each class."""
    return float(np.mean([torch.pdist(x[y == c].flatten(1)).mean().item() for c in y.unique()]))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between the normal distributions fitted to the pixels of two sets of images.

    The formula of the Frechet inception distance (Heusel et al. 2017), on the 64 pixels themselves.
    """
    first, second = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_a, cov_b = np.cov(first.T), np.cov(second.T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0))
    return float(np.square(first.mean(0) - second.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * roots.sum())


def rms(difference: Tensor) -> float:
    """Root of the mean square."""
    return difference.double().square().mean().sqrt().item()
