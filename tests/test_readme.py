"""The code of README.md that trains through a chain does what the page says of it."""

import re
from pathlib import Path

import torch

import fastdiff


def test_train_through_it():
    page = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"## Train through it\n\n```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    schedule, network = fastdiff.NoiseSchedule.cosine(1000), torch.nn.Conv2d(3, 3, 3, padding=1)
    x, advantage = torch.randn(2, 3, 8, 8), torch.tensor([1.0, -0.5])

    def model(x, t):
        return network(x) * (1 + torch.as_tensor(t).reshape(-1, 1, 1, 1) / 1000)

    names = {
        "fastdiff": fastdiff,
        "torch": torch,
        "schedule": schedule,
        "model": model,
        "reward": lambda images: images.square().mean((1, 2, 3)),
        "t": 979,
        "x": x,
        "seeds": fastdiff.seeds(1, 2),
        "advantage": advantage,
    }
    exec(compile(code, "README.md", "exec"), names)
    found = [parameter.grad for parameter in network.parameters()]
    assert torch.equal(names["ratio"], torch.ones(2))

    network.zero_grad()
    images = names["sampler"].sample(model, (16, 3, 64, 64), seeds=7, grad="full", grad_steps=4)
    assert torch.equal(images, names["images"])
    (-names["reward"](images).mean()).backward()
    sampled = [parameter.grad.clone() for parameter in network.parameters()]
    # the ratio is 1, so its gradient is that of the log-density
    density = names["sampler"].log_prob(names["x_prev"], model(x, 979), 979, x)
    (-(density * advantage).mean()).backward()
    for gradient, of_sample, parameter in zip(found, sampled, network.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
        assert 0 < of_sample.norm() < torch.inf and 0 < (gradient - of_sample).norm() < torch.inf
