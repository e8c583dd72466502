"""The sampler of CONTRIBUTING.md is what the page says: fifteen lines, and right."""

import re
from pathlib import Path

import torch

from fastdiff import ops
from fastdiff.schedules import NoiseSchedule


def test_the_example_sampler():
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)

    schedule = NoiseSchedule.cosine(100)
    table = names["renoise_table"](schedule, [80, 40, 3])
    generator = torch.Generator().manual_seed(0)
    x, output, z = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for t, previous in ((80, 40), (40, 3), (3, -1)):
        ab, abp = schedule.alpha_bar(t).item(), schedule.alpha_bar(previous).item()
        x0 = ((x - (1 - ab) ** 0.5 * output) / ab**0.5).clamp(-1, 1)
        expected = abp**0.5 * x0 + (1 - abp) ** 0.5 * z
        torch.testing.assert_close(ops.step(table, output, t, x, noise=z), expected, rtol=1e-12, atol=1e-12)
