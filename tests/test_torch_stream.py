"""Where torch's CUDA normals are drawn from, without a GPU: played generators, and the kernel run on the CPU."""

from __future__ import annotations

from typing import Any

import host_kernels
import pytest
import torch

from fastdiff import native, noise, ops, torch_stream
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMN, Structure

SCHEDULE = NoiseSchedule.linear(1000)


class PlayedGenerator(torch.Generator):
    """Has the state of a CUDA generator."""

    def __new__(cls, *args: Any, **kwargs: Any) -> PlayedGenerator:
        return super().__new__(cls)

    def __init__(self, seed: int = 5, offset: int = 8) -> None:
        self.seed_word, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed_word

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> PlayedGenerator:  # type: ignore[override]
        self.offset = offset
        return self


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch):
    monkeypatch.setattr(torch_stream, "_geometry", lambda device: (1, 2048))


def test_a_draw_begins_where_the_generator_stands_and_moves_it():
    generator = PlayedGenerator(seed=2**63 + 3, offset=8)
    x = torch.empty(1, 4 * 2048 + 1)
    assert torch_stream.take(generator, x) == (None, 3 - 2**63, 8, 2048)
    assert generator.offset == 16  # four for each of two rounds
    assert torch_stream.take(generator, torch.empty(3, 100)) == (None, 3 - 2**63, 16, 512)
    assert generator.offset == 20


def test_recorded_draws_count_from_a_buffer_that_is_filled_at_each_replay():
    generator, other = PlayedGenerator(offset=100), PlayedGenerator()
    recorder = torch_stream.Recorder(generator, torch.device("cpu"))
    x = torch.empty(1, 300)
    with recorder.recording():
        draws = [torch_stream.take(generator, x) for _ in range(3)]
        assert torch_stream.take(other, x).state is None
    assert generator.offset == 100  # nothing is drawn while recording
    assert [draw.offset for draw in draws] == [0, 4, 8] and all(draw.state is recorder.state for draw in draws)
    recorder.load()
    assert recorder.state.tolist() == [5, 100] and generator.offset == 112
    recorder.load()
    assert recorder.state.tolist() == [5, 112] and generator.offset == 124
    generator.seed_word = 2**64 - 1
    recorder.load()
    assert recorder.state.tolist() == [-1, 124]
    assert torch_stream.take(generator, x) == (None, -1, 136, 512)  # the recording is over


def test_recordings_of_two_generators_do_not_meet():
    first, second = PlayedGenerator(), PlayedGenerator()
    a, b = (torch_stream.Recorder(generator, torch.device("cpu")) for generator in (first, second))
    x = torch.empty(1, 4)
    with a.recording():
        with b.recording():
            assert torch_stream.take(first, x).state is a.state
            assert torch_stream.take(second, x).state is b.state
        assert torch_stream.take(first, x).state is a.state
        assert torch_stream.take(second, x).state is None
    assert (a.total, b.total) == (8, 4)


def test_a_generator_without_an_index_serves_every_device_of_its_kind():
    class Placed(torch.Generator):
        device: Any = None

    generator = Placed()
    for own, device, expected in [
        ("cuda", "cuda:0", True),
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cuda:0", False),
        ("cpu", "cpu", True),
    ]:
        generator.device = torch.device(own)
        assert noise.on(generator, torch.device(device)) is expected


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_with_a_generator_makes_the_noise_in_its_kernel(monkeypatch, dtype):
    reason = host_kernels.load()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch_stream, "available", lambda generator, x: True)
    monkeypatch.setattr(ops, "_step_torch_op", host_kernels.operators().step_torch.default)
    for sampler, wide in (
        (DDPMSampler(SCHEDULE, 5), 1),
        (DDPMSampler(SCHEDULE, 5, variance="learned_range"), 2),
        (DDIMSampler(SCHEDULE, 5, eta=0.7), 1),
    ):
        for shape in [(1, 1, 3), (2, 4, 5, 6), (1, 3, 900)]:
            x, m = torch.randn(shape).to(dtype), torch.randn(shape[0], wide * shape[1], *shape[2:]).to(dtype)
            generator, again = PlayedGenerator(), PlayedGenerator()
            z = torch.empty_like(x)
            draw = torch_stream.take(again, x)
            only_noise = Structure(x0="output", variance="fixed")
            rows = torch.zeros(1, 18)
            rows[0, COLUMN["s"]] = 1
            zeros = torch.zeros_like(x)
            ops._step_torch_op(z, None, zeros, zeros, None, None, rows, None, None, 0, only_noise.flags, *draw)
            given = {"row": 1, "backend": "native"}
            expected = sampler.step(m, None, x, noise=z, **given)
            assert torch.equal(sampler.step(m, None, x, generator=generator, **given), expected)
            assert generator.offset == again.offset
            # in place every element is written by the thread that read it
            state = x.clone()
            assert torch.equal(sampler.step(m, None, state, generator=PlayedGenerator(), out=state, **given), expected)
            both = sampler.step_with_x0(m, None, x, generator=PlayedGenerator(), **given)
            assert torch.equal(both[0], expected)
    # a refused call, and one that adds no noise, leave the generator where it was
    with pytest.raises(ValueError, match="out: expected x's shape"):
        sampler.step(m, None, x, generator=generator, out=torch.empty(1, dtype=dtype), row=1)
    before = generator.offset
    assert torch.equal(
        sampler.step(m, None, x, generator=generator, row=4), sampler.step(m, None, x, noise=torch.zeros_like(x), row=4)
    )
    assert generator.offset == before


def test_what_the_kernel_cannot_draw_torch_draws():
    sampler = DDPMSampler(SCHEDULE, 5)
    for x in (torch.randn(2, 3, 5), torch.randn(2, 4, 6).transpose(1, 2), torch.randn(2, 4, 4, dtype=torch.float64)):
        generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
        z = torch.randn(x.shape, generator=again, dtype=x.dtype)
        expected = sampler.step(x, None, x, noise=z, row=1)
        assert torch.equal(sampler.step(x, None, x, generator=generator, row=1), expected)
        assert torch.equal(generator.get_state(), again.get_state())


def test_a_capture_makes_the_seeds_of_an_int_itself(monkeypatch):
    """Those that are kept may be dropped while the graph still reads them; its own have no values outside."""
    device, made = torch.device("meta"), noise.seeds  # not the CPU, where there are no graphs
    monkeypatch.setattr(noise, "seeds", lambda seed, batch, device: made(seed, batch))
    kept = ops._int_seeds(77, 3, device)
    assert ops._int_seeds(77, 3, device) is kept
    with monkeypatch.context() as patch:
        patch.setattr(native, "capturing", lambda device: True)
        own = ops._int_seeds(77, 3, device)
    assert own is not kept and torch.equal(own, kept)
    assert ops._int_seeds(77, 3, device) is kept
