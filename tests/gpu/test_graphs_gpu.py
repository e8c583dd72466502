"""Captured chains on a GPU: replays are the eager chain, bit for bit, and a capture that fails leaves CUDA usable."""

from __future__ import annotations

import pytest
import torch

from fastdiff import noise
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCHEDULE = NoiseSchedule.linear(1000)
SHAPE = (3, 4, 16, 17)
SAMPLERS = {
    "ddpm": DDPMSampler(SCHEDULE, 20),
    "ddpm learned_range": DDPMSampler(SCHEDULE, 10, variance="learned_range"),
    "ddim": DDIMSampler(SCHEDULE, 20),
    "ddim eta 0.5": DDIMSampler(SCHEDULE, 20, eta=0.5),
    "repeated timesteps": DDPMSampler(SCHEDULE, [800, 500, 500, 500, 7]),
    "scaled_1000": DDPMSampler(SCHEDULE, 10, time="scaled_1000"),
}


class Network(torch.nn.Module):
    """Elementwise, so that it computes the same wherever it runs."""

    def __init__(self, channels=1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.9, device="cuda"))
        self.channels = channels

    def forward(self, x, t, y=None):
        h = torch.tanh(x.float() * self.scale + torch.sin(t.float() / 10).reshape(-1, 1, 1, 1))
        if y is not None:
            h = h * y
        return torch.cat([h] * self.channels, dim=1).to(x.dtype)


def network(sampler):
    return Network(2 if sampler.table.structure.learned else 1)


@pytest.fixture(params=SAMPLERS, ids=lambda name: name.replace(" ", "-"))
def sampler(request):
    return SAMPLERS[request.param]


@pytest.fixture(params=[True, False], ids=["one graph", "a graph per step"])
def unroll(request):
    return request.param


def test_a_replay_is_a_sample(sampler, unroll):
    model = network(sampler)
    chain = sampler.capture(model, SHAPE, unroll=unroll)
    for seeds in (1, 2, torch.tensor([5, -6, 7]), torch.tensor([5, -6, 7], device="cuda")):
        assert torch.equal(chain.replay(seeds=seeds), sampler.sample(model, SHAPE, seeds=seeds))
    x_T = noise.normal(SHAPE, 9, device="cuda")
    assert torch.equal(chain.replay(x_T=x_T, seeds=4), sampler.sample(model, x_T=x_T, seeds=4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, unroll):
    sampler = DDPMSampler(SCHEDULE, 10)
    model = Network()
    chain = sampler.capture(model, SHAPE, dtype=dtype, unroll=unroll)
    assert torch.equal(chain.replay(seeds=1), sampler.sample(model, SHAPE, seeds=1, dtype=dtype))


def test_a_long_chain():
    sampler, model = DDPMSampler(SCHEDULE), Network()
    chain = sampler.capture(model, SHAPE)
    assert not chain.unrolled
    for seeds in (1, 2):
        assert torch.equal(chain.replay(seeds=seeds), sampler.sample(model, SHAPE, seeds=seeds))


def test_repeats(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 20), Network()
    chain = sampler.capture(model, SHAPE, unroll=unroll)
    first, other = chain.replay(seeds=1), chain.replay(seeds=2)
    for _ in range(125):
        assert torch.equal(chain.replay(seeds=1), first)
        assert torch.equal(chain.replay(seeds=2), other)


def test_update(unroll):
    first, second = DDIMSampler(SCHEDULE, 20, eta=0.2), DDIMSampler(SCHEDULE, list(range(900, 0, -45)), eta=0.9)
    model = Network()
    chain = first.capture(model, SHAPE, unroll=unroll)
    for sampler in (second, first):
        chain.update(sampler)
        assert torch.equal(chain.replay(seeds=1), sampler.sample(model, SHAPE, seeds=1))


@pytest.mark.parametrize("count", ["one", "per sample"])
def test_a_generator_is_consumed_as_by_sample(sampler, unroll, count):
    def generators():
        made = [torch.Generator("cuda").manual_seed(3 + b) for b in range(SHAPE[0])]
        return made if count == "per sample" else made[0]

    def states(source):
        return [member.get_state() for member in (source if isinstance(source, list) else [source])]

    model, ours, theirs = network(sampler), generators(), generators()
    chain = sampler.capture(model, SHAPE, generator=ours, unroll=unroll)
    for _ in range(3):
        assert torch.equal(chain.replay(), sampler.sample(model, SHAPE, generator=theirs))
        assert all(map(torch.equal, states(ours), states(theirs)))
    other, same = generators(), generators()
    assert torch.equal(chain.replay(generator=other), sampler.sample(model, SHAPE, generator=same))
    assert all(map(torch.equal, states(other), states(same)))


def test_generators_elsewhere_are_refused():
    sampler, model = DDPMSampler(SCHEDULE, 5), Network()
    with pytest.raises(ValueError, match=r"generator: expected one on cuda:0 .* got cpu"):
        sampler.capture(model, SHAPE, generator=torch.Generator())


def test_guidance_and_arguments(unroll):
    sampler, model = DDIMSampler(SCHEDULE, 10, eta=0.3), Network()
    kwargs = {"y": torch.full((3, 1, 1, 1), 2.0, device="cuda")}
    uncond = {"y": torch.full((3, 1, 1, 1), 0.5, device="cuda")}
    chain = sampler.capture(model, SHAPE, model_kwargs=kwargs, guidance_scale=3.0, uncond_kwargs=uncond, unroll=unroll)
    for scale, cond in ((3.0, 2.0), (1.5, -1.0)):
        kwargs = {"y": torch.full((3, 1, 1, 1), cond, device="cuda")}
        found = chain.replay(seeds=1, model_kwargs=kwargs, guidance_scale=scale)
        expected = sampler.sample(
            model, SHAPE, seeds=1, model_kwargs=kwargs, guidance_scale=scale, uncond_kwargs=uncond
        )
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="model_kwargs: expected tensors on cuda:0, got one on cpu"):
        sampler.capture(model, SHAPE, model_kwargs={"y": torch.ones(())})


def test_a_network_with_noise_of_its_own(unroll):
    """Dropout and the like draw from torch's default CUDA generator, which the replays advance."""
    sampler = DDPMSampler(SCHEDULE, 10)

    def model(x, t):
        return torch.tanh(x) + 0.1 * torch.rand_like(x)

    chain = sampler.capture(model, SHAPE, device="cuda", unroll=unroll)
    torch.cuda.manual_seed(5)
    found = [chain.replay(seeds=1) for _ in range(2)]
    torch.cuda.manual_seed(5)
    for one in found:
        assert torch.equal(one, sampler.sample(model, SHAPE, seeds=1, device="cuda"))
    assert not torch.equal(*found)


def test_autocast(unroll):
    """The casts of the weights that autocast keeps end with it, and the graph does not read them."""
    linear = torch.nn.Linear(32, 32, device="cuda")
    sampler = DDIMSampler(SCHEDULE, 10)

    def model(x, t):
        return linear(x).float()

    with torch.autocast("cuda", torch.bfloat16):
        expected = sampler.sample(model, (4, 32), seeds=1, device="cuda")
        chain = sampler.capture(model, (4, 32), device="cuda", unroll=unroll)
    junk = [torch.full((32, 32), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(50)]
    assert torch.equal(chain.replay(seeds=1), expected)
    del junk


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_networks(mode, unroll):
    sampler = DDPMSampler(SCHEDULE, 10)
    model = torch.compile(Network(), mode=mode)
    expected = sampler.sample(model, SHAPE, seeds=1, device="cuda")
    chain = sampler.capture(model, SHAPE, device="cuda", unroll=unroll)
    assert torch.equal(chain.replay(seeds=1), expected)
    # neither disturbs the other
    assert torch.equal(sampler.sample(model, SHAPE, seeds=1, device="cuda"), expected)
    assert torch.equal(chain.replay(seeds=1), expected)


def reads(x, t):
    return x * x.mean().item()


def branches(x, t):
    return x if x.mean() > 0 else -x


def copies_from_the_host(x, t):
    return x + torch.tensor([1.0]).cuda()


def waits_for_the_device(x, t):
    torch.cuda.synchronize()
    return torch.tanh(x)


def waits_for_the_stream(x, t):
    torch.cuda.current_stream().synchronize()
    return torch.tanh(x)


@pytest.mark.parametrize("bad", [reads, branches, copies_from_the_host, waits_for_the_device, waits_for_the_stream])
def test_a_model_that_waits_is_named_and_leaves_cuda_usable(bad, unroll):
    sampler, model = DDPMSampler(SCHEDULE, 5), Network()
    stream = torch.cuda.current_stream()
    sync_mode = torch.cuda.get_sync_debug_mode()
    with pytest.raises(RuntimeError, match="model: the chain cannot be captured in a CUDA graph: ") as caught:
        sampler.capture(bad, SHAPE, device="cuda", unroll=unroll)
    assert "use sample" in str(caught.value)
    del caught
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == sync_mode
    assert not torch.cuda.is_current_stream_capturing()
    # the default generator, the allocator and the next capture
    assert torch.randn(1000, device="cuda").std().item() > 0
    torch.cuda.empty_cache()
    chain = sampler.capture(model, SHAPE, unroll=unroll)
    assert torch.equal(chain.replay(seeds=1), sampler.sample(model, SHAPE, seeds=1))
    assert sampler.sample(bad, SHAPE, seeds=1, device="cuda").isfinite().all()


@pytest.mark.parametrize("source", ["seeds", "generator"])
def test_the_host_does_not_wait(source, unroll):
    sampler, model = DDPMSampler(SCHEDULE, 10), Network()
    generator = torch.Generator("cuda").manual_seed(1) if source == "generator" else None
    y = torch.ones(3, 1, 1, 1, device="cuda")
    chain = sampler.capture(model, SHAPE, generator=generator, model_kwargs={"y": y}, unroll=unroll)
    x_T = noise.normal(SHAPE, 1, device="cuda")
    seeds = {} if generator else {"seeds": 3}
    chain.replay(**seeds)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [chain.replay(), chain.replay(x_T=x_T), chain.replay(**seeds, model_kwargs={"y": y * 2})]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(one.isfinite().all() for one in found)


def test_a_replay_allocates_its_result_alone(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 10), Network()
    chain = sampler.capture(model, SHAPE, unroll=unroll)
    out = torch.empty(SHAPE, device="cuda")
    chain.replay(seeds=1, out=out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert chain.replay(seeds=1, out=out) is out
    assert torch.cuda.max_memory_allocated() == before
    kept = chain.replay(seeds=1)
    assert torch.cuda.memory_allocated() - before <= kept.numel() * kept.element_size() + 512


def test_on_a_side_stream(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 10), Network()
    chain = sampler.capture(model, SHAPE, unroll=unroll)
    x_T, late = noise.normal(SHAPE, 5, device="cuda"), torch.zeros(SHAPE, device="cuda")
    expected = sampler.sample(model, x_T=x_T, seeds=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x_T)
        found = chain.replay(x_T=late, seeds=1)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def kernels_of(chain):
    """The kernels of a replay, as the profiler counts them; it skips where it is not allowed to."""
    chain.replay(seeds=1)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        chain.replay(seeds=1)
        torch.cuda.synchronize()
    count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    if not count:
        pytest.skip("the profiler sees no kernels on this machine")
    return count


def test_the_sampler_is_one_kernel_per_step():
    output = noise.normal(SHAPE, 77, device="cuda")
    counts = [
        kernels_of(DDPMSampler(SCHEDULE, steps).capture(lambda x, t: output, SHAPE, device="cuda", unroll=True))
        for steps in (10, 20)
    ]
    assert counts[1] - counts[0] == 10
