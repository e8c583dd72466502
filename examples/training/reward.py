"""Reward fine-tuning: make the network draw what a differentiable reward likes.

    python examples/training/reward.py

DRaFT-K (Clark et al. 2023, arXiv:2309.17400): sample, backpropagate the reward through the last K steps of the chain
into the network, repeat. The network starts as one that draws all ten digits when it is told none. The reward is the
log-probability that a small classifier gives to one of them; another classifier, which the training never sees, tells
in the end what is drawn.
"""

from __future__ import annotations

import time

import torch
from common import command_line, curve, data, digit, digits, model, parse, save
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff

SEED = 7


def finetune(
    denoiser: nn.Module,
    reward: nn.Module,
    sampler: fastdiff.DDIMSampler,
    updates: int,
    batch: int,
    last: int,
    grad: str,
) -> list[float]:
    """Train the denoiser by the gradient of the mean reward; returns the rewards, one for each update."""
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-4)
    rewards = []
    for update in range(updates):
        x = sample(denoiser, sampler, batch, seed=SEED + 1 + update, grad=grad, grad_steps=last)
        mean = reward(x).mean()
        optimizer.zero_grad()
        (-mean).backward()
        optimizer.step()
        rewards.append(mean.item())
        print(f"update {update + 1:3d}   reward {rewards[-1]:8.3f}", flush=True)
    return rewards


def sample(denoiser: nn.Module, sampler: fastdiff.DDIMSampler, batch: int, seed: int, **options: object) -> Tensor:
    """Digits of no class that the network is told: [B, 1, 8, 8]."""
    y = torch.full((batch,), model.NULL_LABEL)
    return sampler.sample(denoiser, (batch, *model.IMAGE_SHAPE), seeds=seed, model_kwargs={"y": y}, **options)


class LogProbability(nn.Module):
    """The reward: the log-probability of one class, from a small network trained on the real digits (a second)."""

    def __init__(self, wanted: int, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.wanted = wanted
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        for _ in range(300):
            chosen = torch.randint(len(x), (128,))
            noised = x[chosen] + 0.3 * torch.randn(128, *model.IMAGE_SHAPE)
            loss = F.cross_entropy(self.classifier(noised), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] -> rewards [B]."""
        return self.classifier(x).log_softmax(1)[:, self.wanted]


def main() -> None:
    parser = command_line(
        __doc__, "reward",
        steps=(10, "DDIM steps of a chain"),
        last=(4, "K: how many of them, the last ones, are differentiated"),
        updates=(30, "updates of the network"),
        batch=(32, "digits of each update"),
    )  # fmt: skip
    parser.add_argument("--digit", type=digit, default=3, help="the digit that is rewarded (3)")
    parser.add_argument(
        "--grad", choices=("full", "checkpoint"), default="full",
        help="keep what autograd keeps of the last steps, or their states alone, and run the network twice (full)",
    )  # fmt: skip
    options = parse(parser)
    torch.manual_seed(SEED)
    begin = time.perf_counter()

    schedule = fastdiff.NoiseSchedule.cosine(1000)
    denoiser = model.Denoiser(model.load().requires_grad_(True), schedule)
    sampler = fastdiff.DDIMSampler(schedule, options.steps)
    x_train, y_train, _, _ = data.load()
    reward = LogProbability(options.digit, x_train, y_train)
    judge = data.Reader(x_train, y_train)

    wanted = torch.full((100,), options.digit)
    before = sample(denoiser, sampler, 100, SEED)
    rewards = finetune(denoiser, reward, sampler, options.updates, options.batch, options.last, options.grad)
    after = sample(denoiser, sampler, 100, SEED)
    print(f"100 digits from the same seeds, before and after {time.perf_counter() - begin:.0f} s:")
    for name, of in (
        ("mean reward", lambda x: f"{reward(x).mean().item():.3f}"),
        (f"read as {options.digit}", lambda x: f"{judge.share_read_as(x, wanted):.0%}"),
        ("mean distance of two digits", lambda x: f"{data.spread(x, wanted):.2f}"),
    ):
        print(f"  {name:<28} {of(before):>8} -> {of(after)}")
    save(
        options.picture,
        ("Before: the network is told no class", digits(before[:20])),
        (f"After {options.updates} updates, from the same seeds", digits(after[:20])),
        (f"Mean reward over the updates: log-probability of {options.digit}", curve(rewards, "{:.1f}")),
    )


if __name__ == "__main__":
    main()
