"""No memory beyond the result: what a step and a chain allocate."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastdiff import native, noise, ops
from fastdiff.samplers import DDIMSampler, DDPMSampler, Sampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import Table, add_noise_table

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")

SCHEDULE = NoiseSchedule.linear(1000)
SAMPLERS: dict[str, Sampler] = {
    "ddpm": DDPMSampler(SCHEDULE, steps=8),
    "learned_range": DDPMSampler(SCHEDULE, steps=8, variance="learned_range"),
    "ddim": DDIMSampler(SCHEDULE, steps=8),
}
SHAPE = (4, 3, 64, 64)
SMALL = 4096  # bytes: seeds, timesteps and a guidance scale are made on the way


def allocations(function: Callable[[], Any]) -> list[int]:
    """What torch's allocators hand out (bytes) and take back (negative) during a call, in order."""
    function()  # first calls fill caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def large(function: Callable[[], Any]) -> list[int]:
    handed_out = [size for size in allocations(function) if size > 0]
    assert sum(size for size in handed_out if size <= SMALL) <= SMALL
    return [size for size in handed_out if size > SMALL]


def peak(function: Callable[[], Any]) -> int:
    held = highest = 0
    for size in allocations(function):
        held += size
        highest = max(highest, held)
    return highest


def arguments(kind: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, int, Tensor]:
    """(model_output, t, x) of a step."""
    sampler, batch, channels = SAMPLERS[kind], SHAPE[0], SHAPE[1] * (2 if kind == "learned_range" else 1)
    x, output = torch.randn(SHAPE, dtype=dtype), torch.randn(batch, channels, *SHAPE[2:], dtype=dtype)
    return output.contiguous(memory_format=layout), sampler.timesteps[3], x.contiguous(memory_format=layout)


def test_the_measurement_sees_what_torch_allocates():
    x = torch.randn(SHAPE)
    assert large(lambda: x.mul(2).add(1)) == [x.nbytes, x.nbytes]
    assert peak(lambda: x.mul(2).add(1).sum()) in range(2 * x.nbytes, 2 * x.nbytes + SMALL)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_step_allocates_its_result_and_nothing_else(kind, dtype, layout):
    sampler, (output, t, x) = SAMPLERS[kind], arguments(kind, dtype, layout)
    out, seeds = torch.empty_like(x), noise.seeds(7, SHAPE[0])
    assert large(lambda: sampler.step(output, t, x, seeds=seeds)) == [x.nbytes]
    assert allocations(lambda: sampler.step(output, t, x, seeds=seeds, out=out)) == []
    assert allocations(lambda: sampler.step(output, t, x, seeds=seeds, out=x)) == []


@pytest.mark.parametrize("kind", SAMPLERS)
def test_other_forms_of_a_step_allocate_their_results_and_nothing_else(kind):
    sampler, (output, t, x) = SAMPLERS[kind], arguments(kind, torch.float32, torch.contiguous_format)
    out, uncond, z = torch.empty_like(x), torch.randn_like(output), torch.randn_like(x)
    each = torch.full((SHAPE[0],), t)
    source: dict[str, Any] = {} if kind == "ddim" else {"noise": z}

    assert large(lambda: sampler.step_with_x0(output, t, x, seeds=7)) == [x.nbytes, x.nbytes]
    assert large(lambda: sampler.step(output, t, x, seeds=7, out=out)) == []
    assert large(lambda: sampler.step(output, each, x, seeds=7, out=out)) == []
    assert large(lambda: sampler.step(output, t, x, **source, out=out)) == []
    guidance = {"uncond_output": uncond, "guidance_scale": 3.0}
    assert large(lambda: sampler.step(output, t, x, seeds=7, **guidance, out=out)) == []


@pytest.mark.parametrize("schedule", [SCHEDULE, add_noise_table(SCHEDULE)], ids=["schedule", "table"])
def test_add_noise_allocates_its_results_and_nothing_else(schedule: NoiseSchedule | Table):
    x0, t = torch.randn(SHAPE), torch.randint(1000, SHAPE[:1])
    out = torch.empty_like(x0)
    assert large(lambda: ops.add_noise(x0, t, schedule, seeds=7)) == [x0.nbytes]
    assert large(lambda: ops.add_noise(x0, t, schedule, seeds=7, out=out)) == []
    assert large(lambda: ops.add_noise(x0, t, schedule, seeds=7, target="v")) == [x0.nbytes, x0.nbytes]


@pytest.mark.parametrize("given", [False, True], ids=["from_seeds", "from_x_T"])
@pytest.mark.parametrize("allocates", [False, True], ids=["model_writes_into_its_own", "model_allocates"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_chain_holds_a_state_and_a_model_output(kind, allocates, given):
    sampler, (buffer, _, x_T) = SAMPLERS[kind], arguments(kind, torch.float32, torch.contiguous_format)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return buffer.clone() if allocates else buffer

    start = {"x_T": x_T} if given else {"shape": SHAPE}
    # the state becomes the result; an x_T is the caller's, and never written to
    limit = x_T.nbytes + allocates * buffer.nbytes
    assert limit <= peak(lambda: sampler.sample(model, seeds=7, **start)) <= limit + SMALL


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the process as Linux counts it")
def test_a_chain_holds_no_memory_that_torch_does_not_see():
    """The whole process, so that a buffer of the kernels themselves would show."""
    code = """
    import re, torch
    from pathlib import Path
    from fastdiff.samplers import DDPMSampler
    from fastdiff.schedules import NoiseSchedule

    def peak():
        status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
        return int(re.search(r"VmHWM:\\s+([0-9]+) kB", status)[1]) * 1024

    def chain(shape):
        output = torch.ones(shape)
        sampler.sample(lambda x, t: output, shape, seeds=7)
        return 2 * output.nbytes

    torch.set_num_threads(2)
    sampler = DDPMSampler(NoiseSchedule.linear(1000), steps=3)
    chain((2, 3, 256, 256))
    before = peak()
    print(chain((2, 3, 2048, 2048)), peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    state_and_output, grown = map(int, run.stdout.split())
    assert 0.9 * state_and_output <= grown <= 1.05 * state_and_output + 2**22
