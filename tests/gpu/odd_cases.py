"""The odd cases once each, to be run under compute-sanitizer: `compute-sanitizer --tool memcheck python3 odd_cases.py`.

Every kernel of the library, with what tests memory: sizes with tails, addresses off by one element, empty tensors,
strides, channels_last, rows and timesteps outside the chain, gradients, sums over samples, torch's stream. Results are
compared with the CPU's. Without a GPU it runs on the CPU, which checks the script.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fastdiff import noise, ops  # noqa: E402
from fastdiff.schedules import NoiseSchedule  # noqa: E402
from fastdiff.tables import COLUMN, add_noise_table, ddim_table, ddpm_table  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULE = NoiseSchedule.linear(1000)
DDPM = ddpm_table(SCHEDULE, 10, clip=1.0)
DDIM = ddim_table(SCHEDULE, 10, clip=1.0)
REDERIVED = ddim_table(SCHEDULE, 10, clip=1.0, eps="rederived", eta=0.5)
LEARNED = ddpm_table(SCHEDULE, 10, clip=1.0, variance="learned_range")
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
checked = 0


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lay(tensor: Tensor, how: str) -> Tensor:
    """The same values on the device, in memory of its own that lies otherwise."""
    tensor = tensor.to(DEVICE)
    if how == "offset":
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
        view = memory[1:].view(tensor.shape)
        return view.copy_(tensor)
    if how == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    return tensor


def compare(found: Tensor, expected: Tensor) -> None:
    global checked
    assert torch.equal(torch.nan_to_num(found.cpu()), torch.nan_to_num(expected)), (found.shape, found.dtype)
    checked += 1


def steps(table, shape, state, model, how) -> None:
    wide = (shape[0], 2 * shape[1], *shape[2:]) if table.structure.learned else shape
    x, m, uncond = draw(shape, state, 1), draw(wide, model, 2), draw(wide, model, 3)
    options = {"seeds": 5} if table.structure.variance != "none" else {}
    t = torch.tensor([table.timesteps[3], 10**6, -1]).repeat(shape[0])[: shape[0]]
    here = [lay(tensor, how) for tensor in (x, m, uncond)]
    compare(ops.step(table, here[1], t.to(DEVICE), here[0], **options), ops.step(table, m, t, x, **options))
    guided = {"guidance_scale": 1.5} | options
    for ours, theirs in zip(
        ops.step_with_x0(table, here[1], None, here[0], row=3, uncond_output=here[2], **guided),
        ops.step_with_x0(table, m, None, x, row=3, uncond_output=uncond, **guided),
        strict=True,
    ):
        compare(ours, theirs)
    # gradients of both outputs
    found = []
    for state_, output in ((here[0], here[1]), (x, m)):
        leaves = state_.detach().requires_grad_(), output.detach().requires_grad_()
        outputs = ops.step_with_x0(table, leaves[1], None, leaves[0], row=3, **options)
        ones = [torch.ones_like(u) for u in outputs]
        found.append(torch.autograd.grad(outputs, leaves, ones))
    for ours, theirs in zip(*found, strict=True):
        compare(ours, theirs)
    own = here[0].detach()
    expected = ops.step(table, m, None, x, row=3, **options)
    compare(ops.step(table, here[1].detach(), None, own, row=3, out=own, **options), expected)


def sums(table, shape, state, model, how) -> None:
    """The distance of a step, and all that its backward writes; with half of the samples outside the chain."""
    learned, batch = table.structure.learned, shape[0]
    wide = (batch, 2 * shape[1], *shape[2:]) if learned else shape
    operands = [(shape, state)] * 3 + [(wide, model), (shape, model)]
    t = torch.tensor([table.timesteps[3], -1, table.timesteps[7], 10**6]).repeat(batch)[:batch]
    found: list[list[Tensor]] = [[], []]
    for results, device in zip(found, (DEVICE, "cpu"), strict=True):
        tensors = [draw(size, dtype, seed) for seed, (size, dtype) in enumerate(operands)]
        x, x_prev, grad, m, uncond = (lay(u, how) if results is found[0] else u for u in tensors)
        rows, seeds = table.to(device, state), torch.arange(batch, device=device)
        reached = torch.ones(batch, dtype=rows.dtype, device=device)
        inputs = (x, m, uncond, 2 * reached, None)
        on_rows = (rows, t.to(device), table.row_map(device), 0, table.structure.flags)
        if not learned:
            out, squares = torch.empty_like(x), torch.empty_like(x, dtype=rows.dtype)
            distances = [torch.empty_like(reached) for _ in range(2)]
            torch.ops.fastdiff.step_distance(out, squares, distances[0], None, *inputs, seeds, *on_rows, 0.0)
            torch.ops.fastdiff.step_distance(None, None, distances[1], x_prev, *inputs, None, *on_rows, 0.1)
            results += [out, squares, *distances]
        results += [torch.empty_like(u) for u in (x, m, uncond, x)]
        results.append(torch.empty(batch, len(COLUMN) + 1, dtype=rows.dtype, device=device))
        density = (None, None, 0.0) if learned else (x_prev, reached, 0.1)
        torch.ops.fastdiff.step_backward(*results[-5:-1], grad, grad, *inputs, seeds, *on_rows, results[-1], *density)
    for ours, theirs in zip(*found, strict=True):
        compare(ours, theirs)


def main() -> None:
    for state, model in PAIRS:
        for table in (DDPM, DDIM, REDERIVED, LEARNED):
            steps(table, (1, 1, 1, 1), state, model, "contiguous")
            steps(table, (3, 3, 5, 7), state, model, "contiguous")
            steps(table, (2, 4, 4, 8), state, model, "offset")
        steps(DDPM, (2, 4, 3, 5), state, model, "channels_last")
        steps(LEARNED, (2, 3, 3, 5), state, model, "transposed")
    for shape in [(1, 4097), (300, 33), (5, 1023)]:
        steps(DDPM, shape, torch.float32, torch.float32, "contiguous")
        steps(DDIM, shape, torch.bfloat16, torch.bfloat16, "offset")
    for state, model in PAIRS:
        sums(DDPM, (3, 3, 5, 7), state, model, "offset")
        sums(LEARNED, (2, 4, 11, 13), state, model, "contiguous")  # two blocks of a sample
    sums(REDERIVED, (2, 4, 13, 15), torch.float32, torch.bfloat16, "channels_last")
    sums(DDPM, (2, 3, 20, 19), torch.float32, torch.float32, "transposed")
    for shape in [(1, 1), (5, 511), (3, 512), (2, 1025), (1, 262145), (300, 33)]:
        sums(DDPM, shape, torch.float32, torch.float32, "contiguous")
    for shape in [(0, 3, 4), (2, 0, 4)]:
        empty = torch.empty(shape, device=DEVICE)
        assert ops.step(DDPM, empty, None, empty, row=1, seeds=1).shape == shape
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in [(1, 7), (3, 5, 5, 3), (2, 3, 64, 61), (300, 33), (0, 3)]:
            x0 = 2 * draw(shape, dtype, 1)
            for how in ("contiguous", "offset", *(("channels_last", "transposed") if len(shape) == 4 else ())):
                for max_value in (1.0, 3.0):
                    expected = ops.dynamic_threshold(x0, 0.9, max_value)
                    compare(ops.dynamic_threshold(lay(x0, how), 0.9, max_value), expected)
        for shape in [(1, 7), (3, 5, 5), (2, 4096), (0, 3)]:
            seeds = torch.arange(shape[0])
            found = noise.normal(shape, seeds.to(DEVICE), t=3, domain="step", dtype=dtype)
            compare(found, noise.normal(shape, seeds, t=3, domain="step", dtype=dtype))
        x0, t = draw((3, 5, 7), dtype, 1), torch.tensor([1, 500, 999])
        for target in ("noise", "v"):
            ours = ops.add_noise(x0.to(DEVICE), t.to(DEVICE), add_noise_table(SCHEDULE), seeds=4, target=target)
            for mine, plain in zip(ours, ops.add_noise(x0, t, add_noise_table(SCHEDULE), seeds=4, target=target),
                                   strict=True):  # fmt: skip
                compare(mine, plain)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in [(1, 1), (1, 1023), (3, 4, 12), (2, 3, 5)]:
            x, m = draw(shape, dtype, 1).to(DEVICE), draw(shape, dtype, 2).to(DEVICE)
            ours, theirs = (torch.Generator(DEVICE).manual_seed(3) for _ in range(2))
            z = torch.randn(shape, generator=theirs, dtype=dtype, device=DEVICE)
            found = ops.step(DDPM, m, None, x, row=3, generator=ours)
            compare(found, ops.step(DDPM, m, None, x, row=3, noise=z).cpu())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{checked} results on {DEVICE} as they should be")


if __name__ == "__main__":
    main()
