"""torch.randn on a CPU by a kernel of our own: the bits, and what it leaves of the generator."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from fastdiff import mersenne, native


def generators() -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)


def test_the_numbers_and_the_state_are_those_of_torch() -> None:
    theirs, ours = generators()
    for k in range(60):
        shape = (1 + k % 3, 700 + 37 * k)
        for dtype in (torch.float32, torch.bfloat16, torch.float64) if k < 5 else (torch.float32,):
            expected = torch.randn(shape, generator=theirs, dtype=dtype)
            found = mersenne.randn(shape, ours, dtype)
            assert found.dtype == dtype and torch.equal(found, expected)
            assert torch.equal(torch.signbit(found), torch.signbit(expected))
        # what else is drawn in between
        assert torch.equal(torch.rand(k + 1, generator=theirs), torch.rand(k + 1, generator=ours))
        assert torch.equal(torch.randn(3, generator=theirs), mersenne.randn((3,), ours, torch.float32))
        assert torch.equal(theirs.get_state(), ours.get_state())
    assert torch.equal(torch.randn(10**6, generator=theirs), mersenne.randn((10**6,), ours, torch.float32))


def test_without_a_generator_torchs_own_moves() -> None:
    results = []
    for draw in (lambda: torch.randn(5000), lambda: mersenne.randn((5000,), None, torch.float32)):
        torch.manual_seed(3)
        results.append((draw(), torch.rand(1)))
    assert all(map(torch.equal, *results))
    assert mersenne.randn((0, 4), None, torch.float32).shape == (0, 4)


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
def test_the_kernel_refuses_what_it_cannot_take() -> None:
    state = torch.Generator().get_state()
    for out, given, message in (
        (torch.empty(8), state, "at least 16"),
        (torch.empty(64)[::2], state, "contiguous"),
        (torch.empty(64, dtype=torch.float64), state, "float32"),
        (torch.empty(64), state[:-1].clone(), "state"),
        (torch.empty(64), torch.full_like(state, 255), "not one of a torch.Generator"),
    ):
        with pytest.raises(RuntimeError, match=message):
            mersenne._op(out, given)


def test_other_bits_leave_the_draw_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = generators()
    monkeypatch.setattr(mersenne, "_op", lambda out, state: bool(out.zero_().sum() == 0))
    mersenne._same_bits.cache_clear()
    try:
        assert torch.equal(torch.randn(5000, generator=theirs), mersenne.randn((5000,), ours, torch.float32))
    finally:
        mersenne._same_bits.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_randn_like_is_that_of_torch(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, results = torch.zeros(2, 3, 16, 17, dtype=dtype).to(memory_format=layout), []
    for draw in (torch.randn_like, mersenne.randn_like):
        torch.manual_seed(5)
        results.append((draw(x), torch.rand(1)))
    assert all(map(torch.equal, *results)) and results[0][0].stride() == results[1][0].stride()


def test_a_randn_like_of_the_callers_own_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    assert mersenne.randn_like(torch.zeros(2000)).eq(1).all()


def test_threads_that_share_a_generator_take_different_numbers() -> None:
    generator, found = torch.Generator().manual_seed(1), []

    def draw() -> None:
        for _ in range(50):
            found.append(mersenne.randn((2048,), generator, torch.float32)[:4].tolist())

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.Generator().manual_seed(1)
    assert sorted(found) == sorted(torch.randn(2048, generator=expected)[:4].tolist() for _ in range(200))


def test_under_another_default_dtype_and_under_vmap() -> None:
    code = (
        "import torch; torch.set_default_dtype(torch.float64)\n"
        "from fastdiff import mersenne\n"
        "theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)\n"
        "expected = torch.randn(2000, generator=theirs, dtype=torch.float32)\n"
        "assert torch.equal(mersenne.randn((2000,), ours, torch.float32), expected)\n"
        "assert mersenne._same_bits() == mersenne.native.available()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    drawn = torch.vmap(lambda x: x + mersenne.randn((2048,), None, torch.float32), randomness="different")(
        torch.ones(3)
    )
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_draws_while_its_parent_did() -> None:
    code = (
        "import os, threading, time, torch\n"
        "from fastdiff import mersenne\n"
        "torch.set_num_threads(1)\n"
        "g = torch.Generator()\n"
        "def draw():\n"
        "    while True: mersenne.randn((300_000,), g, torch.float32)\n"
        "threading.Thread(target=draw, daemon=True).start()\n"
        "time.sleep(0.1)\n"
        "for _ in range(5):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        mersenne.randn((3000,), g, torch.float32); os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "os._exit(0)\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False).returncode == 0


def test_the_first_draw_may_be_a_tracers() -> None:
    code = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from fastdiff import mersenne\n"
        "with FakeTensorMode(): assert mersenne.randn((2000,), None, torch.float32).shape == (2000,)\n"
        "assert mersenne._same_bits() == mersenne.native.available()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
