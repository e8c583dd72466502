"""Policy gradients: make the network draw what a reward likes that has no gradient at all.

    python examples/training/ddpo.py

DDPO (Black et al. 2023, arXiv:2305.13301), its importance-sampled form: a chain is a sequence of actions, each step
drawn from a Gaussian. Record chains with the log-probabilities of their steps; weigh each step by the advantage of the
digit that it led to; go over the recorded steps twice, the ratio of new to old probabilities clipped as in PPO. The
reward is 1 where a support vector classifier reads the wanted digit, else 0.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from common import command_line, curve, data, digit, digits, model, parse, save
from torch import Tensor, nn

import fastdiff

SEED = 7
CLIP = 0.2  # how far a ratio may go from 1 and still be rewarded


class Transition(NamedTuple):
    t: int
    x: Tensor
    x_prev: Tensor
    log_prob: Tensor


@torch.no_grad()
def record(
    denoiser: nn.Module, sampler: fastdiff.DDIMSampler, batch: int, seed: int
) -> tuple[Tensor, list[Transition]]:
    """Digits [B, 1, 8, 8] of no class that the network is told, and the steps that led to them."""
    seeds = fastdiff.seeds(seed, batch)
    x, chain = fastdiff.normal((batch, *model.IMAGE_SHAPE), seeds), []
    *noisy, final = sampler.timesteps  # the final step adds no noise: nothing is chosen there
    for t in noisy:
        x_prev, log_prob = sampler.step(predict(denoiser, x, t), t, x, seeds=seeds, log_prob=True)
        chain.append(Transition(t, x, x_prev, log_prob))
        x = x_prev
    return sampler.step(predict(denoiser, x, final), final, x, seeds=seeds), chain


def improve(
    denoiser: nn.Module,
    sampler: fastdiff.DDIMSampler,
    optimizer: torch.optim.Optimizer,
    chain: list[Transition],
    advantage: Tensor,
) -> Tensor:
    """One update of the network by recorded steps; returns their ratios [steps, B], as they were before it."""
    optimizer.zero_grad()
    ratios = []
    for t, x, x_prev, log_prob in chain:
        ratio = (sampler.log_prob(x_prev, predict(denoiser, x, t), t, x) - log_prob).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        (-gain / len(chain)).backward()  # step by step: no more than one pass of the network is kept
        ratios.append(ratio.detach())
    nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    optimizer.step()
    return torch.stack(ratios)


def predict(denoiser: nn.Module, x: Tensor, t: int) -> Tensor:
    return denoiser(x, torch.full((len(x),), t), torch.full((len(x),), model.NULL_LABEL))


def main() -> None:
    parser = command_line(
        __doc__, "ddpo",
        steps=(10, "steps of a chain, 2 to 1000"),
        rounds=(16, "rounds of recording, each with two updates of the network"),
        batch=(64, "chains of each round"),
    )  # fmt: skip
    parser.add_argument("--digit", type=digit, default=3, help="the digit that is rewarded (3)")
    options = parse(parser)
    if not 2 <= options.steps <= 1000:
        parser.error(f"argument --steps: expected 2 to 1000, got {options.steps}")
    begin = time.perf_counter()

    schedule = fastdiff.NoiseSchedule.cosine(1000)
    denoiser = model.Denoiser(model.load().requires_grad_(True), schedule)
    sampler = fastdiff.DDIMSampler(schedule, options.steps, eta=1.0)
    reader = data.Reader(*data.load()[:2])
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-4)

    before, _ = record(denoiser, sampler, 100, SEED)
    rewards = []
    for number in range(1, options.rounds + 1):
        x, chain = record(denoiser, sampler, options.batch, SEED + number)
        reward = reader.reads(x, options.digit)
        rewards.append(reward.mean().item())
        advantage = (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-6)
        fresh = improve(denoiser, sampler, optimizer, chain, advantage)
        assert torch.equal(fresh, torch.ones_like(fresh)), "log_prob differs from what the step said"
        again = improve(denoiser, sampler, optimizer, chain, advantage)
        print(
            f"round {number:3d}   reward {rewards[-1]:.2f}   ratios: first update exactly 1, "
            f"second {again.min():.2f} to {again.max():.2f}",
            flush=True,
        )
    after, _ = record(denoiser, sampler, 100, SEED)

    shares = [reader.reads(x, options.digit).mean().item() for x in (before, after)]
    print(
        f"{time.perf_counter() - begin:.0f} s. Of 100 digits from the same seeds, "
        f"{shares[0]:.0%} were read as {options.digit}, and now {shares[1]:.0%} are"
    )
    save(
        options.picture,
        ("Before: the network is told no class", digits(before[:20])),
        (f"After {options.rounds} rounds, from the same seeds", digits(after[:20])),
        (f"Share of the recorded digits that are read as {options.digit}", curve(rewards, "{:.0%}")),
    )


if __name__ == "__main__":
    main()
