"""The real denoising-diffusion-pytorch, for the tests.

It imports torchvision and pytorch-fid, which its samplers do not use. Where they are not installed, stand-ins take
their place during the import, and no longer. ImportError where the package itself is not there.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_UNUSED = {
    "torchvision": ("transforms", "utils"),
    "pytorch_fid": (),
    "pytorch_fid.fid_score": ("calculate_frechet_distance",),
    "pytorch_fid.inception": ("InceptionV3",),
}


class StandIn(ModuleType):
    """A module that is not installed."""


stand_ins: dict[str, StandIn] = {}
for _name, _attributes in _UNUSED.items():
    try:
        importlib.import_module(_name)
    except ImportError:
        _module = sys.modules[_name] = stand_ins[_name] = StandIn(_name)
        for _attribute in _attributes:
            setattr(_module, _attribute, StandIn(f"{_name}.{_attribute}"))
try:
    from denoising_diffusion_pytorch import (
        ContinuousTimeGaussianDiffusion,
        ElucidatedDiffusion,
        GaussianDiffusion,
        GaussianDiffusion1D,
        LearnedGaussianDiffusion,
        Unet,
        Unet1D,
        VParamContinuousTimeGaussianDiffusion,
        WeightedObjectiveGaussianDiffusion,
        XMWrapper,
        classifier_free_guidance,
        guided_diffusion,
        repaint,
    )
finally:
    for _name in stand_ins:
        del sys.modules[_name]

__all__ = [
    "ContinuousTimeGaussianDiffusion",
    "ElucidatedDiffusion",
    "GaussianDiffusion",
    "GaussianDiffusion1D",
    "LearnedGaussianDiffusion",
    "Unet",
    "Unet1D",
    "VParamContinuousTimeGaussianDiffusion",
    "WeightedObjectiveGaussianDiffusion",
    "XMWrapper",
    "classifier_free_guidance",
    "guided_diffusion",
    "repaint",
]
