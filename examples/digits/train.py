"""Train the digits U-Net from scratch on one CPU core, in about seven minutes.

    python examples/digits/train.py

Everything is seeded and runs on one thread: on the same processor and the same torch the weights come out bit for
bit the same; elsewhere they differ in their last digits and sample equally well.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import arguments
import data
import model
import torch

import fastdiff


def train(steps: int, batch: int, seed: int = 0, learning_rate: float = 2e-3) -> model.UNet:
    """Return the moving average of the weights over `steps` steps of AdamW; log the loss every 500 steps.

    The schedules take turns, so that the network meets the noise levels of both. The loss is the squared error of v,
    which is that of eps divided by alpha_bar (Salimans and Ho 2022, section 4).
    """
    torch.manual_seed(seed)
    x_train, y_train, _, _ = data.load()
    schedules = (fastdiff.NoiseSchedule.linear(1000), fastdiff.NoiseSchedule.cosine(1000))
    net = model.UNet()
    denoisers = [model.Denoiser(net, schedule) for schedule in schedules]
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(x_train):,} digits, {steps} steps of {batch}")

    start, total = time.perf_counter(), 0.0
    for step in range(steps):
        chosen = torch.randint(len(x_train), (batch,))
        y = torch.where(torch.rand(batch) < 0.1, model.NULL_LABEL, y_train[chosen])
        t = torch.randint(1000, (batch,))
        x_t, v = fastdiff.add_noise(x_train[chosen], t, schedules[step % 2], seeds=step, target="v")
        loss = (net(x_t, denoisers[step % 2].angle[t], y) - v).square().mean()

        optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1.0, (step + 1) / 200) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

        total += loss.item()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1:6d}  loss {total / 500:.4f}  {time.perf_counter() - start:5.0f} s", flush=True)
            total = 0.0
    return average.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=arguments.positive, default=8000)
    parser.add_argument("--batch", type=arguments.positive, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=model.WEIGHTS)
    options = parser.parse_args()
    arguments.require_writable(parser, "--out", options.out)
    torch.set_num_threads(1)
    model.save(train(options.steps, options.batch, options.seed), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
