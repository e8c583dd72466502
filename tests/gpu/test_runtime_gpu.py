"""What surrounds a kernel on a GPU: streams, devices, synchronisation, memory, failures, far indices, processes."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import SCHEDULE, assert_equal

import fastdiff
import fastdiff.noise as contract
from fastdiff import native, ops, reference
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.tables import add_noise_table, ddim_table, ddpm_table

pytestmark = pytest.mark.cuda

DDPM = ddpm_table(SCHEDULE, 10, clip=1.0)
DDIM = ddim_table(SCHEDULE, 10, clip=1.0)
LEARNED = ddpm_table(SCHEDULE, 10, clip=1.0, variance="learned_range")
SHAPE = (2, 3, 64, 64)


def pair(device, dtype=torch.float32, shape=SHAPE):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


# Repeats


@pytest.mark.parametrize("table", [DDPM, LEARNED], ids=["ddpm", "learned_range"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_hundred_and_fifty_repeats(device, backend, table, deterministic):
    x, m = pair(device)
    m = torch.cat([m, m.sin()], 1) if table is LEARNED else m
    x, m = x.requires_grad_(), m.requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = None
        for _ in range(250):
            result = ops.step(table, m, None, x, row=3, seeds=5, backend=backend)
            found = [result.detach(), *torch.autograd.grad(result, (x, m), x.detach())]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# Streams and devices


def test_what_one_stream_copied_another_does_not_read_too_early(gpu, backend):
    """Rows, their map and the seeds of an int are made at a first use, and kept: for the stream of that use."""
    x, m = pair(gpu)
    t = torch.full((SHAPE[0],), DDPM.timesteps[3], device=gpu)
    expected = ops.step(DDPM, m, t, x, seeds=123456, backend=backend)
    torch.cuda.synchronize()
    fresh, side = ddpm_table(SCHEDULE, 10, clip=1.0), torch.cuda.Stream()
    ops._seeds.clear()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late = ops.step(fresh, m, t, x, seeds=123456, backend=backend)
    early = ops.step(fresh, m, t, x, seeds=123456, backend=backend)
    torch.cuda.synchronize()
    assert_equal(early, expected)
    assert_equal(late, expected)


def test_a_side_stream_behind_a_long_kernel(gpu, backend):
    """What a stream has not produced yet must not be read: a launch on another stream would not wait for it."""
    x, m = pair(gpu)
    expected = ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend)
    source = torch.Generator(gpu).manual_seed(3)
    z = torch.randn(SHAPE, generator=torch.Generator(gpu).manual_seed(3), device=gpu)
    drawn = ops.step(DDPM, m, None, x, row=3, noise=z, backend=backend)
    late = [torch.full_like(u, math.nan) for u in (x, m)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for tensor, value in zip(late, (x, m), strict=True):
            tensor.copy_(value)
        found = ops.step(DDPM, late[1], None, late[0], row=3, seeds=5, backend=backend)
        other = ops.step(DDPM, late[1], None, late[0], row=3, generator=source, backend=backend)
        late[0].requires_grad_()
        (gradient,) = torch.autograd.grad(
            ops.step(DDPM, late[1], None, late[0], row=3, seeds=5, backend=backend), late[0], x
        )
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    assert torch.equal(other, drawn)
    again = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(ops.step(DDPM, m, None, again, row=3, seeds=5, backend=backend), again, x)
    assert torch.equal(gradient, plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(gpu, backend):
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    x, m = pair(gpu)
    expected = ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend).cpu()
    x, m = x.to(other).requires_grad_(), m.to(other)
    found = ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend)
    (gradient,) = torch.autograd.grad(found, x, torch.ones_like(x))
    assert found.device == gradient.device == other
    assert_equal(found.detach().cpu(), expected)
    generators = [torch.Generator(other).manual_seed(3) for _ in range(2)]
    z = torch.randn(SHAPE, generator=generators[1], device=other)
    drawn = ops.step(DDPM, m, None, x.detach(), row=3, generator=generators[0], backend=backend)
    assert torch.equal(drawn, ops.step(DDPM, m, None, x.detach(), row=3, noise=z, backend=backend))
    with pytest.raises(ValueError, match=f"model_output: expected a tensor on {other}"):
        ops.step(DDPM, m.to(gpu), None, x.detach(), row=3, seeds=5, backend=backend)


def test_tensors_elsewhere_are_refused_by_name(gpu, backend):
    x, m = pair(gpu)
    far = {"model_output": m.cpu(), "noise": x.cpu(), "t": torch.tensor([DDPM.timesteps[3]] * 2),
           "seeds": torch.arange(2), "uncond_output": m.cpu(), "guidance_scale": torch.ones(2),
           "out": torch.empty_like(x, device="cpu")}  # fmt: skip
    for name, tensor in far.items():
        out = torch.full_like(x, 7.0)
        options = {"model_output": m, "t": DDPM.timesteps[3], "out": out, name: tensor}
        if name not in ("noise", "seeds"):
            options["seeds"] = 5
        if name in ("uncond_output", "guidance_scale"):
            options = {"uncond_output": m, "guidance_scale": 2.0} | options
        output, t = options.pop("model_output"), options.pop("t")
        with pytest.raises(ValueError, match=rf"{name}: expected a tensor on {gpu} \(x's device\), got cpu"):
            ops.step(DDPM, output, t, x, backend=backend, **options)
        assert bool((out == 7).all()), "something was written"
    with pytest.raises(ValueError, match="generator: expected one on cpu or"):
        # a generator of a GPU for a state on the CPU
        ops.step(DDPM, m.cpu(), None, x.cpu(), row=3, generator=torch.Generator(gpu))


def test_operators_called_directly_guard_memory(gpu):
    """What Python has not checked, C++ refuses, and nothing is launched."""
    x, m = pair(gpu)
    rows, place = DDPM.to(gpu, torch.float32), torch.tensor([3, DDPM.structure.flags])
    for wrong in (m.cpu(), m[:1], m.double()):
        out = torch.full_like(x, 7.0)
        with pytest.raises(RuntimeError):
            torch.ops.fastdiff.step_row.default(out, x, wrong, torch.arange(2, device=gpu), rows, place)
        assert bool((out == 7).all())
    assert torch.ones(3, device=gpu).sum().item() == 3


def test_an_error_of_the_device_surfaces():
    """A fault of another kernel must not pass for a result of ours: in a process of its own, as it ends CUDA there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    code = """
import torch, fastdiff
from fastdiff import ops
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import ddim_table
table, x = ddim_table(NoiseSchedule.linear(1000), 10), torch.zeros(4, 8, device="cuda")
ops.step(table, x, None, x, row=1)
torch.zeros(4, device="cuda")[torch.tensor([1000000], device="cuda")]  # a device-side assertion
try:
    for _ in range(3):
        torch.cuda.synchronize()
        ops.step(table, x, None, x, row=1)
    print("NOTHING")
except Exception as error:
    print("RAISED", type(error).__name__)
try:
    ops.step(table, x, None, x, row=1)
    print("LAUNCHED")
except RuntimeError as error:
    print("REFUSED", "fastdiff" in str(error) or "CUDA" in str(error))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), timeout=60
    )
    assert "RAISED" in run.stdout and "REFUSED True" in run.stdout, run.stdout + run.stderr[-2000:]


# Synchronisation and memory


@pytest.mark.parametrize("source", ["seeds", "int", "noise", "generator"])
def test_the_host_does_not_wait(gpu, backend, strict_sync, source):
    x, m = pair(gpu)
    t = torch.tensor([DDPM.timesteps[3], DDPM.timesteps[5]], device=gpu)
    options = {"seeds": torch.arange(2, device=gpu), "int": 5, "noise": x.clone(),
               "generator": torch.Generator(gpu).manual_seed(1)}  # fmt: skip
    given = {"seeds" if source == "int" else source: options[source]}
    scale, wide = torch.tensor([1.5, 2.5], device=gpu), torch.cat([m, m], 1)
    gradient = x.clone().requires_grad_()

    def steps():
        found = [ops.step(DDPM, m, t, x, backend=backend, **given)]
        found += ops.step_with_x0(DDPM, m, t, x, uncond_output=x, guidance_scale=scale, backend=backend, **given)
        found += [ops.step(LEARNED, wide, t, x, backend=backend, **given)]
        found += ops.add_noise(x, t, add_noise_table(SCHEDULE), target="v", backend=backend, **given)
        found += torch.autograd.grad(ops.step(DDPM, m, t, gradient, backend=backend, **given), gradient, x)
        return found

    steps()  # tables and kernels are brought to the device at first
    with strict_sync:
        found = steps()
    assert all(bool(u.isfinite().all()) for u in found)


def test_a_chain_does_not_wait(gpu, strict_sync):
    sampler, x = DDPMSampler(SCHEDULE, 10), pair(gpu)[0]

    def model(x, t):
        return torch.tanh(x + t.reshape(-1, 1, 1, 1))

    sampler.sample(model, x_T=x, seeds=3)
    with strict_sync:
        found = sampler.sample(model, x_T=x, seeds=3)
    assert bool(found.isfinite().all())


def allocations() -> tuple[int, int]:
    stats = torch.cuda.memory_stats()
    return stats["allocation.all.allocated"], stats["allocated_bytes.all.current"]


def test_nothing_is_allocated_beyond_the_result(gpu, backend):
    x, m = pair(gpu)
    seeds, out = torch.arange(2, device=gpu), torch.empty_like(x)
    t = torch.tensor([DDPM.timesteps[3]] * 2, device=gpu)
    wide, x0_bytes = torch.cat([m, m], 1), x.numel() * x.element_size()
    generator = torch.Generator(gpu).manual_seed(1)

    def none():
        ops.step(DDPM, m, None, x, row=3, seeds=seeds, out=out, backend=backend)
        ops.step(DDPM, m, None, out, row=3, seeds=seeds, out=out, backend=backend)
        ops.step(DDPM, m, None, x, row=3, noise=x, out=out, backend=backend)
        ops.step(DDPM, m, t, x, seeds=seeds, out=out, backend=backend)
        ops.step(DDIM, m, None, x, row=3, out=out, backend=backend)
        ops.step(LEARNED, wide, None, x, row=3, seeds=seeds, out=out, backend=backend)
        if backend == "native":
            ops.step(DDPM, m, None, x, row=3, generator=generator, out=out, backend=backend)

    def one():
        return ops.step(DDPM, m, None, x, row=3, seeds=seeds, backend=backend)

    for _ in range(2):
        none(), one()
    count, held = allocations()
    none()
    assert allocations() == (count, held)
    kept = one()
    assert allocations() == (count + 1, held + x0_bytes)
    del kept


def test_training_keeps_what_the_gradient_needs(gpu, backend):
    """Without a clip nothing of a step's inputs is kept, but the tensors that the caller keeps."""
    table, x = ddpm_table(SCHEDULE, 10), pair(gpu)[0]
    size = x.numel() * x.element_size()
    m = torch.randn_like(x).requires_grad_()
    ops.step(table, m * 1, None, x, row=3, seeds=1, backend=backend).sum().backward()
    m.grad = None
    gc.collect()
    before = torch.cuda.memory_allocated()
    result = ops.step(table, m * 1, None, x, row=3, seeds=1, backend=backend)
    assert torch.cuda.memory_allocated() - before <= size + 4096
    result.sum().backward()


def test_running_out_of_memory_leaves_things_usable(gpu, backend):
    x, m = pair(gpu)
    generator = torch.Generator(gpu).manual_seed(3)
    state = generator.get_state()
    expected = ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend)
    gc.collect()
    torch.cuda.empty_cache()  # or the tensor could lie in a larger piece of memory, with room beside it
    big = torch.empty(2**28, device=gpu).view(1, -1)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ops.step(DDIM, big, None, big, row=3, backend=backend)
        with pytest.raises(torch.OutOfMemoryError):
            ops.step(DDPM, big, None, big, row=3, seeds=5, backend=backend)
        assert torch.equal(ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del big
        torch.cuda.empty_cache()
    assert torch.equal(ops.step(DDPM, m, None, x, row=3, seeds=5, backend=backend), expected)
    assert torch.equal(generator.get_state(), state)


# Far indices


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "batch", "channels_last"])
def test_more_than_two_to_the_31_elements(gpu, backend, layout):
    """The first and the last elements of a bfloat16 tensor of 2^31 + 64, against a small replay there."""
    elements, few = 2**31 + 64, 4096
    if torch.cuda.mem_get_info(gpu)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    shape = {"flat": (1, elements), "batch": (2, elements // 2), "channels_last": (1, 2, elements // 2)}[layout]

    def make(seed):
        memory = torch.empty(elements, dtype=torch.bfloat16, device=gpu)
        ends = torch.randn(2 * few, generator=torch.Generator().manual_seed(seed)).to(gpu, torch.bfloat16)
        memory[:few], memory[-few:] = ends[:few], ends[few:]
        memory[few:-few] = 0
        if layout == "channels_last":
            return memory, memory.view(1, elements // 2, 2).transpose(1, 2)
        return memory, memory.view(shape)

    (x_memory, x), (m_memory, m) = make(1), make(2)
    seeds = torch.tensor([11, 12][: shape[0]])
    ops.step(DDPM, m, None, x, row=3, seeds=seeds.to(gpu), out=m, backend=backend)
    # m is the result now: its values were drawn from a seed, and can be made again
    m_ends = torch.randn(2 * few, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    rows = DDPM.to("cpu", torch.bfloat16)[3]
    sample = elements // shape[0]
    for places, given in ((torch.arange(few), m_ends[:few]), (torch.arange(elements - few, elements), m_ends[few:])):
        within = places % sample
        if layout == "channels_last":
            within = (places % 2) * (elements // 2) + places // 2
        key = seeds[places[0] // sample]
        z = contract.normals_of(
            contract.TORCH, key, within // 4, torch.tensor(DDPM.timesteps[3]), 1, torch.tensor(0)
        ).gather(-1, (within % 4)[:, None])[:, 0]
        state = x_memory[places.to(gpu)].cpu()
        expected, _ = reference.step(rows, DDPM.structure, state[None], given[None], z=z[None])
        assert torch.equal(m_memory[places.to(gpu)].cpu(), expected[0])
    assert bool(m_memory[few:-few].isfinite().all())


# Processes


def child_environment() -> dict[str, str]:
    folder = str(Path(fastdiff.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}


def test_importing_leaves_cuda_alone(device):
    code = "import torch, fastdiff; assert not torch.cuda.is_initialized(); import fastdiff.triton_kernels"
    code += "; assert not torch.cuda.is_initialized()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_a_forked_worker_steps_on_the_cpu(device):
    """As a DataLoader's workers do, once their parent has used the GPU."""
    x, m = pair(device)
    expected = ops.step(DDPM, m, None, x, row=3, seeds=5).cpu()
    x, m = x.cpu(), m.cpu()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            status = int(not torch.equal(ops.step(DDPM, m, None, x, row=3, seeds=5), expected))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_another_process_finds_the_same(device):
    code = f"""
import hashlib, torch
from fastdiff.samplers import DDIMSampler
from fastdiff.schedules import NoiseSchedule
x = DDIMSampler(NoiseSchedule.linear(1000), 10, eta=0.5).sample(lambda x, t: x * 0.5, (2, 3, 8, 8), seeds=3,
                                                                device="{device.type}")
print(hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest())
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), timeout=60
        )
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != ""


# Compilation and the rest of the face


def test_compiled_whole(gpu):
    sampler, x = DDIMSampler(SCHEDULE, 10), pair(gpu)[0]
    table = sampler.table

    @torch.compile(fullgraph=True)
    def compiled(m, x, t):
        return ops.step(table, m, t, x)

    for row in (1, 5):
        t = torch.tensor([table.timesteps[row]], device=gpu)
        found = compiled(x.sin(), x, t)
        assert torch.equal(found, ops.step(table, x.sin(), t, x))


def test_a_library_without_code_for_the_device_is_told_apart(gpu):
    """The reasons that a user would read."""
    assert native.cuda_why_not(gpu) is None, native.cuda_why_not(gpu)
    assert native.triton_why_not(gpu) is None, native.triton_why_not(gpu)
    assert "not for cpu" in str(native.triton_why_not(torch.device("cpu")))
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="backend 'triton': they are for CUDA devices"):
        ops.step(DDIM, x, None, x, row=1, backend="triton")
