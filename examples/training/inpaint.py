"""Inpainting by posterior sampling: draw the hidden half of a digit with a network that was not trained to.

    python examples/training/inpaint.py

DPS (Chung et al. 2023, arXiv:2209.14687): a chain of DDPM without any class, in which the gradient of the residual
|| (predicted x0 - digit) on the visible half ||, taken through the step and the network, moves each state after its
step. The digits are real, and the network has never seen them.
"""

from __future__ import annotations

import time

import torch
from common import command_line, data, digits, model, parse, save
from torch import Tensor, nn

import fastdiff

SEED = 7


def restore(
    denoiser: nn.Module, sampler: fastdiff.DDPMSampler, real: Tensor, visible: Tensor, strength: float, seed: int
) -> Tensor:
    """Samples that agree with the real digits [B, 1, 8, 8] where `visible` is 1. Strength 0: with nothing."""
    seeds, y = fastdiff.seeds(seed, len(real)), torch.full((len(real),), model.NULL_LABEL)
    x = fastdiff.normal(tuple(real.shape), seeds)
    for t in sampler.timesteps:
        x.requires_grad_()
        eps = denoiser(x, torch.full((len(real),), t), y)
        x_prev, x0 = sampler.step_with_x0(eps, t, x, seeds=seeds)
        residual = ((x0 - real) * visible).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(residual.sum(), x)
        x = x_prev.detach() - strength * gradient
    return x


def main() -> None:
    parser = command_line(
        __doc__, "inpaint",
        steps=(100, "DDPM steps of the chain, of 1 to 1000"),
        count=(60, "how many of the 297 digits are restored"),
    )  # fmt: skip
    options = parse(parser)
    for name, most in (("steps", 1000), ("count", 297)):
        if getattr(options, name) > most:
            parser.error(f"argument --{name}: expected at most {most}, got {getattr(options, name)}")
    begin = time.perf_counter()

    schedule = fastdiff.NoiseSchedule.cosine(1000)
    denoiser = model.Denoiser(model.load(), schedule)
    sampler = fastdiff.DDPMSampler(schedule, f"{options.steps}")
    x_train, y_train, x_real, y_real = data.load()
    real, y = x_real[: options.count], y_real[: options.count]
    reader = data.Reader(x_train, y_train)
    visible = torch.zeros(model.IMAGE_SHAPE)
    visible[..., : model.IMAGE_SHAPE[-1] // 2] = 1

    restored = restore(denoiser, sampler, real, visible, 1.0, SEED)
    guesses = {
        "restored": restored,
        "sampled without a look": restore(denoiser, sampler, real, visible, 0.0, SEED),
        "mean of the training digits": x_train.mean(0).expand_as(real),
        "real": real,
    }
    print(
        f"{time.perf_counter() - begin:.0f} s. Hidden half          RMS error   read as what it was, with the real half"
    )
    for name, guess in guesses.items():
        error = data.rms((guess - real)[(visible == 0).expand_as(real)])
        share = reader.share_read_as(torch.where(visible == 1, real, guess), y)
        print(f"  {name:<28} {error:6.3f}   {share:6.1%}")
    masked = torch.where(visible == 1, real, torch.zeros_like(real))
    save(
        options.picture,
        ("Visible: the left half", digits(masked[:20])),
        ("Restored", digits(restored[:20])),
        ("Real", digits(real[:20])),
    )


if __name__ == "__main__":
    main()
