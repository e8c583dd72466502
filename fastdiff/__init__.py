"""fastdiff: the part of diffusion sampling that is not the network, as one fused operation.

    schedule = fastdiff.NoiseSchedule.cosine(1000)
    sampler = fastdiff.DDIMSampler(schedule, steps=50)
    images = sampler.sample(model, (16, 3, 64, 64), seeds=7)

`python -m fastdiff` says which backends are live here.
"""

from .backprop import Inversion
from .integrations import disable, enable, summary
from .noise import normal, seeds
from .ops import add_noise, dynamic_threshold, log_prob, step, step_with_x0
from .samplers import DDIMSampler, DDPMSampler, TableSampler, slerp, to_uint8
from .schedules import NoiseSchedule
from .tables import (
    Structure,
    Table,
    add_noise_table,
    ddim_inversion_table,
    ddim_table,
    ddpm_table,
    forward_table,
    sprite_table,
)

__version__ = "0.1.0"

__all__ = [
    "DDIMSampler",
    "DDPMSampler",
    "Inversion",
    "NoiseSchedule",
    "Structure",
    "Table",
    "TableSampler",
    "add_noise",
    "add_noise_table",
    "ddim_inversion_table",
    "ddim_table",
    "ddpm_table",
    "disable",
    "dynamic_threshold",
    "enable",
    "forward_table",
    "log_prob",
    "normal",
    "seeds",
    "slerp",
    "sprite_table",
    "step",
    "step_with_x0",
    "summary",
    "to_uint8",
]
