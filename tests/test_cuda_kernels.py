"""The CUDA kernels, run on the CPU (host_kernels.py): geometry, alignment, tails, far indices, torch's stream.

That every structure, dtype and layout has the bits of the reference is shown by test_ops.py, which runs on both.
"""

from __future__ import annotations

import math

import host_kernels
import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff.noise as contract
from fastdiff import native, ops, torch_stream
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMN, Structure, Table, ddim_table, ddpm_table

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}"),
    pytest.mark.skipif(host_kernels.load() is not None, reason=str(host_kernels.load())),
]
SCHEDULE = NoiseSchedule.linear(1000)
DDPM = ddpm_table(SCHEDULE, 10, clip=1.0)
DDIM = ddim_table(SCHEDULE, 10, clip=1.0)
LEARNED = ddpm_table(SCHEDULE, 10, clip=1.0, variance="learned_range")
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
INT64_MAX = 2**63 - 1


@pytest.fixture(autouse=True)
def machine():
    yield
    host_kernels.play()


def run(library: str, table: Table, m: Tensor, x: Tensor, seeds: Tensor | None, out: Tensor, row: int = 3) -> Tensor:
    operator = getattr(torch.ops, library).step_row.default
    noise = x if seeds is None else seeds
    operator(out, x, m, noise, table.to("cpu", x.dtype), torch.tensor([row, table.structure.flags]))
    return out


def both(table: Table, m: Tensor, x: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    poisoned = [torch.full_like(x, math.nan) for _ in range(2)]
    return (
        run("fastdiff", table, m, x, seeds, poisoned[0]),
        run("fastdiff_host", table, m, x, seeds, poisoned[1]),
    )


def draw(shape, dtype, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("state, model", PAIRS, ids=str)
def test_every_size_and_tail(state, model):
    for batch in (1, 2, 5):
        for size in [*range(1, 41), 127, 128, 129, 1023, 1025, 4099]:
            x, seeds = draw((batch, size), state), torch.arange(batch) - 1
            for table in (DDPM, DDIM, LEARNED):
                wide = 2 if table is LEARNED else 1
                given = seeds if table.structure.variance != "none" else None
                shape = (batch, size, 1) if wide == 2 else (batch, size)
                m = draw((batch, size * wide, *shape[2:]), model, 1)
                cpu, host = both(table, m, x.reshape(shape), given)
                assert torch.equal(cpu, host), (batch, size, table.name)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
@pytest.mark.parametrize("batch, size", [(1, 3 * 64 * 64), (300, 31), (2000, 5), (70000, 3), (17, 4097)])
def test_the_launch_geometry_does_not_show(multiprocessors, batch, size):
    x, m, seeds = draw((batch, size), torch.float32), draw((batch, size), torch.float32, 1), torch.arange(batch) * 7
    host_kernels.play(multiprocessors)
    cpu, host = both(DDPM, m, x, seeds)
    assert torch.equal(cpu, host)


def test_the_geometry_covers_its_blocks_once():
    x = draw((16, 3, 16, 16), torch.float32)
    whole = run("fastdiff_host", DDIM, x, x, None, torch.empty_like(x))
    blocks = host_kernels.play()
    assert blocks > 1
    counts = torch.zeros_like(x)
    for block in range(blocks):
        host_kernels.play(first_block=block, last_block=block + 1)
        part = run("fastdiff_host", DDIM, x, x, None, torch.full_like(x, math.nan))
        counts += ~part.isnan()
        assert torch.equal(part[~part.isnan()], whole[~part.isnan()])
    assert torch.equal(counts, torch.ones_like(x))


@pytest.mark.parametrize("state, model", PAIRS, ids=str)
def test_any_alignment(state, model):
    seeds = torch.tensor([5, -6])
    for offset_x in range(9):
        for offset_m in (0, 1, 4, 8):
            shape = (2, 48)
            x = draw((2 * 48 + 16,), state)[offset_x:][:96].view(shape)
            m = draw((2 * 48 + 16,), model, 1)[offset_m:][:96].view(shape)
            out = torch.full((2 * 48 + 16,), math.nan, dtype=state)
            run("fastdiff_host", DDPM, m, x, seeds, out[offset_x:][:96].view(shape))
            expected = run("fastdiff", DDPM, m, x, seeds, torch.empty_like(x))
            assert torch.equal(out[offset_x:][:96].view(shape), expected)
            # and not a byte beside it
            assert out[:offset_x].isnan().all() and out[offset_x + 96 :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_normals(dtype):
    for shape in [(1, 7), (3, 5, 5), (2, 4096), (1000, 3), (2, 0), (0, 5)]:
        seeds = torch.arange(shape[0]) * 3 - 2
        out = torch.full(shape, math.nan, dtype=dtype)
        torch.ops.fastdiff_host.normals.default(out, seeds, 17, 2, 1)
        assert torch.equal(out, contract.normal(shape, seeds, t=17, repeat=2, domain="step", dtype=dtype))


def test_nothing_is_launched_for_an_empty_tensor():
    host_kernels.play()
    x = torch.empty(3, 0, 4)
    run("fastdiff_host", DDPM, x, x, torch.arange(3), torch.empty_like(x))
    x = torch.empty(0, 4)
    run("fastdiff_host", DDIM, x, x, None, x)


def far(index: Tensor, seed: int, row: int) -> Tensor:
    """The noise of DDPM's row at far logical indices."""
    t = torch.tensor(DDPM.timesteps[row])
    z = contract.normals_of(contract.TORCH, torch.tensor(seed), index // 4, t, 1, torch.tensor(0))
    return z.gather(-1, (index % 4)[..., None])[..., 0]


def last_blocks(run_it) -> None:
    """Run only the last few blocks of a launch, after one with none to see how many there are."""
    host_kernels.play(first_block=INT64_MAX)
    run_it()
    blocks = host_kernels.play(first_block=INT64_MAX)
    host_kernels.play(first_block=blocks - 16)
    run_it()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "channels_last", "spread"])
def test_elements_past_two_to_the_31(layout):
    # memory that is never touched is never there: a few blocks touch a few pages of these gigabytes
    elements = 2**31 + 64
    shape = {"flat": (1, elements), "channels_last": (1, 2, elements // 2), "spread": (1, 4, elements // 4)}[layout]

    def make() -> Tensor:
        storage = torch.empty(elements, dtype=torch.bfloat16)
        if layout == "channels_last":
            return storage.view(1, elements // 2, 2).transpose(1, 2)
        return storage.view(shape)

    try:
        x, m, out = make(), make(), make()
    except RuntimeError:
        pytest.skip("this machine does not lend so much memory")
    if layout == "spread":
        m = m.view(1, elements // 4, 4).transpose(1, 2)
    memory = torch.empty(0, dtype=torch.bfloat16).set_(out.untyped_storage())
    tail = memory[-4096:]
    tail.fill_(math.nan)
    for tensor, seed in ((x, 1), (m, 2)):
        flat = torch.empty(0, dtype=torch.bfloat16).set_(tensor.untyped_storage())
        flat[-4096:] = draw((4096,), torch.bfloat16, seed)
    last_blocks(lambda: run("fastdiff_host", DDPM, m, x, torch.tensor([11]), out))

    written = (~tail.isnan()).nonzero()[:, 0]
    assert len(written) >= 64 and int(written[-1]) == 4095
    place = elements - 4096 + written
    logical = place if layout != "channels_last" else (place % 2) * (elements // 2) + place // 2
    z = far(logical, 11, 3)
    coefficients = DDPM.to("cpu", torch.bfloat16)[3]
    values = [tensor.reshape(-1)[logical] if layout == "flat" else at(tensor, logical) for tensor in (x, m)]
    expected, _ = ops.reference.step(coefficients, DDPM.structure, values[0][None], values[1][None], z=z[None])
    assert torch.equal(tail[written], expected[0])


def at(tensor: Tensor, logical: Tensor) -> Tensor:
    """The elements of a sample [1, rows, columns] at logical indices."""
    columns = tensor.shape[2]
    return tensor[0, logical // columns, logical % columns]


def test_samples_that_lie_two_to_the_31_elements_apart():
    stride = 2**31 + 8
    for shape, strides in [((2, 64), (stride, 1)), ((2, 3, 4), (stride, 4, 1)), ((2, 3, 4), (stride, 1, 3))]:
        try:
            tensors = [torch.empty(stride + 64, dtype=torch.float16).as_strided(shape, strides) for _ in range(3)]
        except RuntimeError:
            pytest.skip("this machine does not lend so much memory")
        x, m, out = tensors
        x.copy_(draw(shape, torch.float16))
        m.copy_(draw(shape, torch.float16, 1))
        seeds = torch.tensor([3, 4])
        run("fastdiff_host", DDPM, m, x, seeds, out)
        dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (m, x)]
        assert torch.equal(out, run("fastdiff", DDPM, *dense, seeds, torch.empty_like(dense[1])))


# torch's own stream


def torch_normals(index: np.ndarray, seed: int, offset: int, threads: int) -> np.ndarray:
    """These elements of what torch.randn gives on a GPU, from the description in fastdiff/torch_stream.py."""
    thread, number = index % threads, index // threads
    counter = (offset // 4 + number // 4).astype(np.int64)
    words = contract.philox4x32_10(
        (counter & 0xFFFFFFFF, counter >> 32, thread, np.zeros_like(thread)), (seed & 0xFFFFFFFF, seed >> 32)
    )
    lane = number % 4
    first, second = np.where(lane < 2, words[0], words[2]), np.where(lane < 2, words[1], words[3])
    # u is rounded to float32, which near 1 is all there is of the radius
    u = (first.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
    angle = (second + 0.5) * 2.0**-32 * 2 * np.pi
    return radius * np.where(lane % 2 == 0, np.sin(angle), np.cos(angle))


# Printed in a report about torch.randn on two GPUs (pytorch/pytorch#143086): torch.manual_seed(1), 49*12*112*144
# elements, the first and the last three; an H100 (132 multiprocessors) and an A100 (108), 2048 threads each.
REPORTED = {132: [-0.6970, -0.7780, 0.3267], 108: [0.1549, -0.6797, -0.1656]}
REPORTED_ELEMENTS = 49 * 12 * 112 * 144


@pytest.mark.parametrize("multiprocessors", REPORTED)
def test_the_mapping_gives_what_gpus_have_printed(multiprocessors):
    threads = torch_stream.threads_for(REPORTED_ELEMENTS, multiprocessors, 2048)
    first = np.arange(3)
    assert np.abs(torch_normals(first, 1, 0, threads) - [-0.2963, 2.6764, -0.1408]).max() < 6e-5
    last = REPORTED_ELEMENTS - 3 + first
    assert np.abs(torch_normals(last, 1, 0, threads) - REPORTED[multiprocessors]).max() < 6e-5


def draws(x: Tensor, seed: int, offset: int, threads: int, state: Tensor | None = None, table=None, m=None) -> Tensor:
    if table is None:
        structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
        values = torch.zeros(1, 18, dtype=torch.float64)
        values[0, COLUMN["ax"]] = values[0, COLUMN["s"]] = 1
        table = Table(values, structure, [0])
    out = torch.full_like(x, math.nan)
    torch.ops.fastdiff_host.step_torch.default(
        out, None, x, x if m is None else m, None, None, table.to("cpu", x.dtype), None, None, 0, table.structure.flags,
        state, seed, offset, threads,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 255), (1, 257), (2, 1024), (3, 4, 900), (1, 8197), (4, 16388)], ids=str)
def test_the_kernel_draws_as_torch_does(multiprocessors, shape):
    elements, seed = math.prod(shape), 0x1234_5678_9ABC
    threads = torch_stream.threads_for(elements, multiprocessors, 2048)
    for offset in (0, 8, 2**34 + 4):
        expected = torch_normals(np.arange(elements), seed, offset, threads).reshape(shape)
        z = draws(torch.zeros(shape), seed, offset, threads)
        assert np.abs(z.numpy() - expected).max() < 4e-6
        # from the buffer of a graph, to which the offset is added
        state = torch.tensor([seed, offset - offset // 2 // 4 * 4])
        again = draws(torch.zeros(shape), 99, offset // 2 // 4 * 4, threads, state)
        assert torch.equal(z, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_the_draw_as_torch_does(dtype):
    threads = torch_stream.threads_for(3000, 1, 2048)
    z = draws(torch.zeros(1, 3000), 7, 4, threads)
    assert torch.equal(draws(torch.zeros(1, 3000, dtype=dtype), 7, 4, threads), z.to(dtype))


def test_the_drawn_noise_goes_through_every_kind_of_step():
    for table, wide in ((DDPM, 1), (LEARNED, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            x, m = draw((3, 4, 6, 10), dtype), draw((3, 4 * wide, 6, 10), dtype, 1)
            threads = torch_stream.threads_for(x.numel(), 1, 2048)
            z = draws(torch.zeros(1, x.numel()), 3, 12, threads).view(x.shape).to(dtype)
            result = draws(x, 3, 12, threads, table=table, m=m)
            assert torch.equal(result, ops.step(table, m, None, x, row=0, noise=z, backend="reference"))


def test_the_generator_moves_as_torch_does():
    # counted by hand from the launch policy of torch: four for every 4*threads elements begun
    assert torch_stream.threads_for(1, 132, 2048) == 256
    assert torch_stream.threads_for(257, 132, 2048) == 512
    assert torch_stream.threads_for(10**9, 132, 2048) == 132 * 2048
    assert torch_stream.advance_for(1, 256) == 4
    assert torch_stream.advance_for(4 * 270336, 270336) == 4
    assert torch_stream.advance_for(4 * 270336 + 1, 270336) == 8


@pytest.mark.parametrize(
    "shape, threads, offset, dtype",
    [((2, 6), 256, 0, torch.float32), ((1, 4), 100, 0, torch.float32), ((1, 4), 256, 2, torch.float32),
     ((1, 4), 256, 0, torch.float64)],
)  # fmt: skip
def test_a_draw_that_the_kernel_cannot_make_is_refused(shape, threads, offset, dtype):
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    table = Table(torch.ones(1, 18, dtype=torch.float64), structure, [1])
    x = torch.zeros(shape, dtype=dtype)
    per_sample = torch.ones(shape[0], dtype=torch.int64)  # samples with rows of their own are not joined
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.fastdiff_host.step_torch.default(
            x, None, x, x, None, None, table.to("cpu", dtype), per_sample, table.row_map("cpu"), 0, structure.flags,
            None, 1, offset, threads,
        )  # fmt: skip


# The backward


def backward(library: str, table: Table, given: dict, outputs: list[Tensor | None], flags: int = 0) -> list:
    operator = getattr(torch.ops, library).step_backward.default
    written = [None if o is None else torch.full_like(o, math.nan) for o in outputs]
    rows = table.to("cpu", given["grad"].dtype)
    operator(*written, **given, table=rows, row=3, flags=table.structure.flags | flags)
    return written


@pytest.mark.parametrize("state, model", PAIRS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "offset", "channels_last", "transposed"])
def test_the_backward_equals_that_of_the_cpu(state, model, layout):
    def lay(tensor: Tensor) -> Tensor:
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return tensor.transpose(1, 3).contiguous().transpose(1, 3)
        if layout == "offset":
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        return tensor

    for shape in [(2, 4, 5, 7), (3, 2, 8, 8)]:
        for table, wide in ((DDPM, 1), (DDIM, 1), (LEARNED, 2)):
            x, grad, second = (lay(draw(shape, state, seed)) for seed in range(3))
            m, uncond = (lay(draw((shape[0], shape[1] * wide, *shape[2:]), model, seed)) for seed in (3, 4))
            seeds = torch.arange(shape[0]) if table.structure.variance != "none" else None
            given = {"grad": grad, "grad_second": second, "x": x, "model_output": m, "uncond_output": uncond,
                     "guidance_scale": torch.tensor([1.5], dtype=table.to("cpu", state).dtype), "noise": None,
                     "seeds": seeds, "t": None, "t_to_row": None}  # fmt: skip
            noise = torch.empty_like(x) if seeds is not None else None
            outputs = [torch.empty_like(x), torch.empty_like(m), torch.empty_like(uncond[:, : shape[1]]), noise]
            for flags in (0, 1 << 12, 1 << 17):
                cpu = backward("fastdiff", table, given, outputs, flags)
                host = backward("fastdiff_host", table, given, outputs, flags)
                for a, b in zip(cpu, host, strict=True):
                    assert a is b is None or (torch.equal(a, b) and not a.isnan().any())
