"""torch's own stream: steps make the noise that torch.randn would have given, and move the generator as it would."""

from __future__ import annotations

import pytest
import torch
from test_ops import SCHEDULE, assert_equal

from fastdiff import ops, torch_stream
from fastdiff.samplers import DDPMSampler
from fastdiff.tables import add_noise_table, ddpm_table

pytestmark = pytest.mark.cuda

DDPM = ddpm_table(SCHEDULE, 10, clip=1.0)
LEARNED = ddpm_table(SCHEDULE, 10, clip=1.0, variance="learned_range")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wave(device) -> int:
    """How many threads torch.randn runs at most: a draw gives four numbers to each."""
    if device.type != "cuda":
        return 4096
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * properties.max_threads_per_multi_processor


def sizes(device) -> list[int]:
    full = wave(device)
    return [1, 3, 255, 256, 257, 1000, full - 1, full, full + 1, 4 * full - 3, 4 * full, 4 * full + 1, 9 * full + 123]


def check(table, m, t, x, **options):
    """A step that draws from a generator against one that is given what torch.randn draws from its twin."""
    ours, theirs = (torch.Generator(x.device).manual_seed(0x1234_5678_9ABC) for _ in range(2))
    # not where a stream begins
    for generator in (ours, theirs):
        torch.randn(7, generator=generator, device=x.device)
    for _ in range(2):
        z = torch.randn(x.shape, generator=theirs, dtype=x.dtype, device=x.device)
        expected = ops.step(table, m, t, x, noise=z, **options)
        assert_equal(ops.step(table, m, t, x, generator=ours, **options), expected)
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_the_kernel_draws_as_this_torch_does(gpu, record):
    """Where it does not, steps fall back to torch.randn: right, but slower."""
    found = {str(dtype): torch_stream.verified(gpu, dtype) for dtype in DTYPES}
    record("torch's stream in the kernel", **found)
    assert all(found.values()), found


def test_a_generator_without_an_index_draws_in_the_kernel_too(gpu):
    x = torch.randn(2, 3, 8, 8, device=gpu)
    ours, theirs = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    assert torch_stream.available(ours, x)
    z = torch.randn(x.shape, generator=theirs, device=gpu)
    sampler = DDPMSampler(SCHEDULE, 10)
    assert_equal(sampler.step(x, None, x, row=2, generator=ours), sampler.step(x, None, x, row=2, noise=z))
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_noise_alone(device, dtype):
    """add_noise to zeros gives the noise itself, times a coefficient."""
    table = add_noise_table(SCHEDULE)
    for elements in sizes(device):
        x0 = torch.zeros(1, elements, dtype=dtype, device=device)
        ours, theirs = (torch.Generator(device).manual_seed(42) for _ in range(2))
        _, noise = ops.add_noise(x0, 500, table, generator=ours, target="noise")
        assert torch.equal(noise, torch.randn(1, elements, generator=theirs, dtype=dtype, device=device)), elements
        assert torch.equal(ours.get_state(), theirs.get_state()), elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(device, dtype):
    for elements in sizes(device):
        x, m = (torch.randn(1, elements, device=device).to(dtype) for _ in range(2))
        check(DDPM, m, DDPM.timesteps[3], x)
    full = wave(device)
    for shape in [(3, 4, 8, 12), (5, 4 * (full // 16) + 4), (2, 3, 5), (64, 4), (1, 5, 7)]:
        x, m = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        check(DDPM, m, DDPM.timesteps[3], x)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_every_backend_draws_the_same(gpu, backend):
    x, m = (torch.randn(3, 4, 32, 32, device=gpu) for _ in range(2))
    found = []
    for kind in (backend, "reference"):
        generator = torch.Generator(gpu).manual_seed(3)
        found.append(ops.step(DDPM, m, DDPM.timesteps[2], x, generator=generator, backend=kind))
    assert_equal(*found)


def test_learned_variance_guidance_x0_and_timesteps_per_sample(device):
    for dtype in (torch.float32, torch.bfloat16):
        x, m = torch.randn(3, 4, 8, 12, device=device).to(dtype), torch.randn(3, 8, 8, 12, device=device).to(dtype)
        check(LEARNED, m, LEARNED.timesteps[3], x)
        check(DDPM, m[:, :4].contiguous(), torch.tensor([DDPM.timesteps[k] for k in (1, 5, 3)], device=device), x)
        uncond = torch.randn(3, 4, 8, 12, device=device).to(dtype)
        check(DDPM, m[:, :4].contiguous(), DDPM.timesteps[3], x, uncond_output=uncond, guidance_scale=2.0)
    x, m = (torch.randn(3, 4, 8, 12, device=device) for _ in range(2))
    check(DDPM, m.bfloat16(), DDPM.timesteps[3], x)
    ours, theirs = (torch.Generator(device).manual_seed(1) for _ in range(2))
    found = ops.step_with_x0(DDPM, m, DDPM.timesteps[3], x, generator=ours)
    z = torch.randn(x.shape, generator=theirs, device=device)
    for mine, plain in zip(found, ops.step_with_x0(DDPM, m, DDPM.timesteps[3], x, noise=z), strict=True):
        assert_equal(mine, plain)


def test_what_the_kernel_cannot_draw_falls_back(device):
    """float64, other layouts, samples of no multiple of four: torch draws, and the values are the same."""
    x, m = (torch.randn(3, 4, 8, 12, device=device) for _ in range(2))
    check(DDPM, m.double(), DDPM.timesteps[3], x.double())
    last = [u.contiguous(memory_format=torch.channels_last) for u in (m, x)]
    check(DDPM, last[0], DDPM.timesteps[3], last[1])
    x, m = (torch.randn(3, 5, 7, device=device) for _ in range(2))
    check(DDPM, m, DDPM.timesteps[3], x)
    x, m = (torch.randn(3, 4, 8, device=device, requires_grad=True) for _ in range(2))
    check(DDPM, m, DDPM.timesteps[3], x)
    check(DDPM, m, DDPM.timesteps[3], x, out=None)


@pytest.mark.slow
def test_beyond_two_to_the_31_bytes(gpu):
    """torch splits such a tensor, and draws for each part."""
    x = torch.zeros(1, 2**29 + 64, device=gpu)
    assert not torch_stream.available(torch.Generator(gpu), x)
    ours, theirs = (torch.Generator(gpu).manual_seed(42) for _ in range(2))
    found = ops.add_noise(x, 500, add_noise_table(SCHEDULE), generator=ours, out=x)
    scale = ops.add_noise(torch.zeros(1, 1), 500, add_noise_table(SCHEDULE), noise=torch.ones(1, 1)).item()
    expected = torch.randn(x.shape, generator=theirs, device=gpu).mul_(scale)
    assert torch.equal(found, expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_nothing_is_drawn_where_nothing_is_added(device):
    x, m = (torch.randn(2, 8, device=device) for _ in range(2))
    generator = torch.Generator(device).manual_seed(3)
    before = generator.get_state()
    ops.step(DDPM, m, None, x, row=len(DDPM) - 1, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_generator_on_the_cpu_is_drawn_from_there(device):
    """As pipelines do for images that do not depend on the GPU."""
    x, m = (torch.randn(2, 4, 8, device=device) for _ in range(2))
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    found = ops.step(DDPM, m, None, x, row=2, generator=ours)
    z = torch.randn(x.shape, generator=theirs).to(device)
    assert_equal(found, ops.step(DDPM, m, None, x, row=2, noise=z))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_generator_per_sample(device):
    x, m = (torch.randn(3, 4, 8, device=device) for _ in range(2))
    ours, theirs = ([torch.Generator(device).manual_seed(3 + b) for b in range(3)] for _ in range(2))
    found = ops.step(DDPM, m, None, x, row=2, generator=ours)
    z = torch.cat([torch.randn(1, 4, 8, generator=one, device=device) for one in theirs])
    assert_equal(found, ops.step(DDPM, m, None, x, row=2, noise=z))
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))


def test_a_chain_is_that_of_a_loop_with_randn(device):
    sampler, shape = DDPMSampler(SCHEDULE, 10), (2, 3, 16, 16)

    def model(x, t):
        return torch.tanh(x)

    ours, theirs = (torch.Generator(device).manual_seed(3) for _ in range(2))
    found = sampler.sample(model, shape, generator=ours, device=device)
    x = torch.randn(shape, generator=theirs, device=device)
    for row in range(len(sampler)):
        noise = torch.zeros_like(x)
        if row < len(sampler) - 1:
            noise = torch.randn(shape, generator=theirs, device=device)
        x = ops.step(sampler.table, model(x, None), None, x, row=row, noise=noise)
    assert_equal(found, x)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_two_hundred_and_fifty_repeats(device):
    x, m = (torch.randn(2, 3, 64, 64, device=device) for _ in range(2))
    generator = torch.Generator(device)
    first = ops.step(DDPM, m, None, x, row=2, generator=generator.manual_seed(5))
    for _ in range(250):
        assert torch.equal(ops.step(DDPM, m, None, x, row=2, generator=generator.manual_seed(5)), first)
