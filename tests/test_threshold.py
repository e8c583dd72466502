"""Dynamic thresholding, element by element against the code with torch.quantile, on every kernel.

The kernels of CUDA run on the CPU (host_kernels.py), as does the reference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import host_kernels
import pytest
import torch
from test_ops import layouts, needs_native
from torch import Tensor

import fastdiff
from fastdiff import native, ops, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RATIOS = (0.0, 0.5, 0.995, 1.0)
MAXIMA = (1.0, 1.5, 0.5, math.inf)
Threshold = Callable[..., Tensor]


@pytest.fixture(scope="module", params=["reference", "cpu", "cuda"])
def threshold(request: pytest.FixtureRequest) -> Iterator[Threshold]:
    """The public function on each kernel, and in plain PyTorch."""
    backend = "reference" if request.param == "reference" else "native"
    if backend == "native" and not native.available():
        pytest.skip(f"no native library: {native.why_not()}")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda":
            reason = host_kernels.load()
            if reason is not None:
                pytest.skip(reason)
            patch.setattr(ops, "_dynamic_threshold_op", host_kernels.operators().dynamic_threshold.default)
        yield lambda x0, *arguments, **options: fastdiff.dynamic_threshold(x0, *arguments, backend=backend, **options)
    if request.param == "cuda":
        host_kernels.play()


def by_quantile(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """What codebases do."""
    wide = x0 if x0.dtype is torch.float64 else x0.float()
    samples = wide.reshape(x0.shape[0], -1)
    s = torch.quantile(samples.abs(), ratio, dim=1).clamp(min=1, max=max_value).unsqueeze(1)
    return (torch.clamp(samples, -s, s) / s).reshape(x0.shape).to(x0.dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """In every bit, that of a zero's sign too; NaN where NaN is."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    nans = expected.isnan()
    assert torch.equal(found.isnan(), nans)
    found, expected = found.masked_fill(nans, 1.0), expected.masked_fill(nans, 1.0)
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinds(size: int) -> Tensor:
    """Samples of every kind, [15, size], float64."""
    z, w = draw((size,)), draw((size,), 1)
    some = torch.arange(size) % 7 == 3
    few = torch.arange(size) == size // 2
    return torch.stack(
        [
            *(z * scale for scale in (0.3, 1.0, 4.0, 300.0)),
            (4 * z).round() / 4,  # ties, zeros of both signs
            torch.full((size,), 1.25, dtype=torch.float64),
            torch.full((size,), -0.75, dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64).copysign(z),
            z * 2.0**-18,  # subnormal in float16
            1 + w.abs() * 2.0**-7,  # near one another
            torch.where(some, math.inf, 3 * z),
            torch.where(few, -math.inf, 3 * z),
            torch.where(few, math.nan, z),
            torch.where(some, math.nan, torch.where(few, math.inf, z)),
            torch.full((size,), math.inf, dtype=torch.float64),
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 17, 200, 4096])
def test_the_values_of_torch_quantile(threshold, dtype, size):
    x0 = kinds(size).to(dtype)
    before = x0.clone()
    for ratio in RATIOS:
        for max_value in MAXIMA:
            assert_same(threshold(x0, ratio, max_value), by_quantile(x0, ratio, max_value))
    assert_same(x0, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_between_elements(threshold, dtype):
    """Of any ratio, most of which are no float32: elements that are far apart show which two a rank lies between."""
    x0 = (2.0 ** torch.linspace(-3, 9, 4001, dtype=torch.float64)).flip(0).to(dtype).reshape(1, -1)
    for ratio in torch.linspace(0.3, 1, 37, dtype=torch.float64).tolist():
        assert_same(threshold(x0, ratio, math.inf), by_quantile(x0, ratio, math.inf))


@pytest.mark.parametrize("batch, size", [(1, 40003), (3, 33001), (40, 2003)])
def test_however_the_work_is_shared(threshold, batch, size):
    """By threads, by samples and by blocks of a GPU: 70 multiprocessors share a sample, 1 takes it alone."""
    x0 = draw((batch, size)).float() * torch.linspace(0.5, 3, batch).reshape(-1, 1)
    x0[-1, 7] = -400
    before = torch.get_num_threads()
    try:
        for ratio, max_value in ((0.9, 4.0), (0.995, 1.0), (1.0, math.inf)):
            expected = by_quantile(x0, ratio, max_value)
            for threads, multiprocessors in ((1, 1), (2, 70)):
                torch.set_num_threads(threads)
                if host_kernels.load() is None:
                    host_kernels.play(multiprocessors)
                assert_same(threshold(x0, ratio, max_value), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_a_gpu_share_samples_of_every_kind(dtype):
    if not native.available() or host_kernels.load() is not None:
        pytest.skip("the kernels of CUDA cannot be built for the CPU here")
    x0 = kinds(9001).to(dtype)
    host_kernels.play(132)
    for ratio, max_value in ((0.5, 1.5), (0.995, math.inf), (0.9, 2.0), (0.3, 0.5)):
        found = torch.full_like(x0, math.nan)
        host_kernels.operators().dynamic_threshold.default(found, x0, ratio, max_value)
        assert host_kernels.play() > x0.shape[0]  # blocks
        assert_same(found, by_quantile(x0, ratio, max_value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (3, 4, 5, 7)])
def test_any_layout(threshold, dtype, shape):
    x0 = (2 * draw(shape)).to(dtype)
    expected = by_quantile(x0, 0.9, 3.0)
    for name, mine in layouts(x0).items():
        found = threshold(mine, 0.9, 3.0)
        assert_same(found, expected)
        assert found.stride() == torch.empty_like(mine).stride(), name
        for out in layouts(torch.full_like(x0, math.nan)).values():
            assert threshold(mine, 0.9, 3.0, out=out) is out
            assert_same(out, expected)
        in_place = mine.clone(memory_format=torch.preserve_format)
        assert threshold(in_place, 0.9, 3.0, out=in_place) is in_place
        assert_same(in_place, expected)


def test_writes_nothing_beside_out(threshold):
    for offset in range(1, 6):
        for size in (1, 5, 48, 1027):
            x0 = 3 * draw((1, size)).float()
            memory = torch.full((size + 16,), 7.0)
            threshold(x0, 0.8, 2.0, out=memory[offset : offset + size].view(1, size))
            assert_same(memory[offset : offset + size].view(1, size), by_quantile(x0, 0.8, 2.0))
            assert (memory[:offset] == 7).all() and (memory[offset + size :] == 7).all()


def test_shapes(threshold):
    for shape in ((5,), (1,), (2, 16, 2), (2, 2, 3, 2, 3), (1, *(1,) * 30, 3, 2)):
        x0 = 2 * draw(shape).float()
        assert_same(threshold(x0, 0.7, 2.0), by_quantile(x0, 0.7, 2.0))
    shared = (2 * draw((1, 1, 5, 6))).float().expand(3, 4, 5, 6)
    assert_same(threshold(shared, 0.7, 2.0), by_quantile(shared, 0.7, 2.0))
    for shape in ((0,), (0, 3), (2, 0), (0, 0, 4)):
        for dtype in DTYPES:
            x0 = torch.empty(shape, dtype=dtype)
            assert_same(threshold(x0), x0)
            assert_same(threshold(x0, out=torch.empty_like(x0)), x0)


def test_more_dimensions_than_the_kernels_take():
    x0 = 2 * draw((2, *(1,) * 33, 5)).float()
    assert_same(fastdiff.dynamic_threshold(x0, 0.7, 2.0), by_quantile(x0, 0.7, 2.0))


def test_the_bound_that_torch_clamp_gives(threshold):
    x0 = 3 * draw((2, 50)).float()
    for bound in (0.5, 1.0, 1e-3):
        assert_same(threshold(x0, 0.9, bound), torch.clamp(x0, -bound, bound) / torch.tensor(bound))


def test_half_types_are_rounded_once(threshold):
    for dtype in (torch.float16, torch.bfloat16):
        x0 = (2 * draw((2, 999))).to(dtype)
        assert_same(threshold(x0, 0.9, 3.0), threshold(x0.float(), 0.9, 3.0).to(dtype))


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets(isa):
    active = torch.ops.fastdiff.cpu_isa(-1)
    try:
        try:
            torch.ops.fastdiff.cpu_isa(isa)
        except RuntimeError:
            pytest.skip("not built, or not supported by this machine")
        for dtype in DTYPES:
            x0 = kinds(1001).to(dtype)
            for max_value in MAXIMA:
                found = fastdiff.dynamic_threshold(x0, 0.9, max_value, backend="native")
                assert_same(found, by_quantile(x0, 0.9, max_value))
    finally:
        torch.ops.fastdiff.cpu_isa(active)


def bound_of(values: Tensor, times: int, ratio: float, max_value: float) -> Tensor:
    """Of a sample that has each of these values so many times; the rank is a float64."""
    rank = ratio * (values.numel() * times - 1)
    ordered = values.abs().sort().values
    below, above = (ordered[index // times] for index in (math.floor(rank), math.ceil(rank)))
    return torch.lerp(below, above, rank - math.floor(rank)).clamp(1, max_value)


def test_more_elements_than_torch_quantile_takes():
    """The last rank of a value, and one that lies between it and the next: a float32 would be of another element."""
    times, values = 4100, (4 * draw((4099,))).float()
    x0 = values.expand(1, times, -1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x0.flatten(), 0.5)
    for rank in (3000 * times - 1, 3000 * times - 0.625):
        ratio = rank / (x0.numel() - 1)
        s = bound_of(values, times, ratio, 100.0)
        found = fastdiff.dynamic_threshold(x0, ratio, 100.0)
        assert torch.equal(found, (torch.clamp(values, -s, s) / s).expand(1, times, -1))
    assert s != bound_of(values, times, 3000 * times / (x0.numel() - 1), 100.0)


@pytest.mark.slow
def test_the_reference_beyond_and_at_the_limit_of_torch_quantile():
    x0 = (4 * draw((1, 2**24 + 3))).float()
    found = reference.dynamic_threshold(x0, 0.700000012345, 30.0)
    s = bound_of(x0[0], 1, 0.700000012345, 30.0)
    assert_same(found, torch.clamp(x0, -s, s) / s)
    assert_same(fastdiff.dynamic_threshold(x0, 0.700000012345, 30.0), found)
    x0 = x0[:, : 2**24]
    expected = by_quantile(x0, 0.995, 30.0)
    assert_same(reference.dynamic_threshold(x0, 0.995, 30.0), expected)
    assert_same(fastdiff.dynamic_threshold(x0, 0.995, 30.0), expected)


# Gradients and transforms


def leaf(seed: int = 0) -> Tensor:
    return (2 * draw((2, 3, 5), seed)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_value", [1.0, 1.5, 10.0])
def test_gradients_are_those_of_torch_quantile(dtype, max_value):
    ours, theirs = (leaf().detach().to(dtype).requires_grad_() for _ in range(2))
    found, expected = fastdiff.dynamic_threshold(ours, 0.8, max_value), by_quantile(theirs, 0.8, max_value)
    assert_same(found.detach(), expected.detach())
    weights = draw(found.shape, 3).to(dtype)
    assert_same(
        *(torch.autograd.grad(out, at, weights)[0] for out, at in ((found, ours), (expected, theirs)))
    )  # of which some goes through the bound


def test_derivatives():
    def function(x0: Tensor) -> Tensor:
        return fastdiff.dynamic_threshold(x0, 0.8, 10.0)

    assert torch.autograd.gradcheck(function, (leaf(),), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (leaf(),))


def test_transforms():
    x0, ratio = leaf().detach(), 0.8

    def ours(x0: Tensor) -> Tensor:
        return fastdiff.dynamic_threshold(x0, ratio, 10.0)

    def theirs(x0: Tensor) -> Tensor:
        return by_quantile(x0, ratio, 10.0)

    stacked, direction = torch.stack([x0, x0.flip(0), 3 * x0]), draw(x0.shape, 5)
    assert_same(torch.vmap(ours)(stacked), torch.stack([theirs(x) for x in stacked]))
    for f in (ours, theirs):
        gradient = torch.func.grad(lambda x, f=f: (f(x) ** 3).sum())(x0)
        tangent = torch.func.jvp(f, (x0,), (direction,))[1]
        if f is ours:
            expected = gradient, tangent
    assert_same(expected[0], gradient)
    torch.testing.assert_close(expected[1], tangent)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def function(x0: Tensor) -> Tensor:
        return fastdiff.dynamic_threshold(2 * x0, 0.9, 3.0) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3, 4), (3, 3, 4)):
        x0 = draw(shape).float()
        assert_same(compiled(x0), function(x0))
    gradients = []
    for run in (function, compiled):
        x0 = draw((2, 3, 4)).float().requires_grad_()
        gradients.append(torch.autograd.grad((run(x0) ** 2).sum(), x0)[0])
    assert_same(*gradients)


def test_compiled_in_place():
    def function(x0: Tensor) -> Tensor:
        doubled = 2 * x0
        return fastdiff.dynamic_threshold(doubled, 0.9, 3.0, out=doubled)

    x0 = draw((2, 3, 4)).float()
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(x0), by_quantile(2 * x0, 0.9, 3.0))


def test_inference_mode(threshold):
    with torch.inference_mode():
        x0 = 2 * draw((2, 30)).float()
        assert_same(threshold(x0, 0.9, 3.0), by_quantile(x0, 0.9, 3.0))


# out, and what is refused


def test_out_is_seen_by_autograd(threshold):
    y = draw((2, 3)).float().requires_grad_() * 1.0
    loss = (y * y).sum()
    with torch.no_grad():
        threshold(y, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


X0 = torch.zeros(2, 6)
BAD = {
    "x0 type": (TypeError, "x0: expected a tensor, got list", {"x0": [1.0]}),
    "x0 dtype": (TypeError, "x0: expected float32, .* got torch.int64", {"x0": torch.zeros(2, 3, dtype=torch.int64)}),
    "x0 sparse": (TypeError, "x0: expected a strided tensor", {"x0": torch.zeros(2, 3).to_sparse()}),
    "x0 without batch": (ValueError, "x0: expected a batch dimension", {"x0": torch.tensor(1.0)}),
    "ratio type": (TypeError, "ratio: expected a number, got str|ratio: expected a number, got 'a'", {"ratio": "a"}),
    "ratio bool": (TypeError, "ratio: expected a number, got True", {"ratio": True}),
    "ratio above": (ValueError, "ratio: expected a number from 0 to 1, got 1.5", {"ratio": 1.5}),
    "ratio below": (ValueError, "ratio: expected a number from 0 to 1, got -0.1", {"ratio": -0.1}),
    "ratio NaN": (ValueError, "ratio: expected a finite number, got nan", {"ratio": math.nan}),
    "max_value type": (TypeError, "max_value: expected a number, got NoneType", {"max_value": None}),
    "max_value zero": (ValueError, "max_value: expected a number above 0", {"max_value": 0.0}),
    "max_value negative": (ValueError, "max_value: expected a number above 0", {"max_value": -1}),
    "max_value NaN": (ValueError, "max_value: expected a finite number, got nan", {"max_value": math.nan}),
    "max_value too large": (
        ValueError,
        "max_value: .* that torch.float32 can hold, got 1e\\+300",
        {"max_value": 1e300},
    ),
    "max_value -inf": (ValueError, "max_value: expected a finite number", {"max_value": -math.inf}),
    "backend": (ValueError, "backend: expected one of", {"backend": "cuda"}),
    "triton": (RuntimeError, "backend 'triton': ", {"backend": "triton"}),
    "out type": (TypeError, "out: expected a tensor, got int", {"out": 3}),
    "out dtype": (TypeError, r"out: expected torch.float32 \(x0's dtype\), got torch.float64", {"out": X0.double()}),
    "out shape": (ValueError, r"out: expected x0's shape \[2, 6\], got \[2, 5\]", {"out": torch.zeros(2, 5)}),
    "out overlaps itself": (ValueError, "out: expected distinct elements", {"out": torch.zeros(1, 6).expand(2, 6)}),
    "out requires grad": (ValueError, "out: expected a tensor that does not", {"out": X0.clone().requires_grad_()}),
    "gradient": (ValueError, "out: expected None where a grad", {"x0": X0.clone().requires_grad_(), "out": X0.clone()}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, given = BAD[name]
    with pytest.raises(error, match=message):
        fastdiff.dynamic_threshold(**{"x0": X0} | given)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_out_may_not_lie_in_part_over_x0(backend):
    memory = torch.arange(20.0)
    before = memory.clone()
    with pytest.raises(ValueError, match="out: expected memory of its own or exactly that of x0, got a part of x0's"):
        fastdiff.dynamic_threshold(memory[:12].view(2, 6), out=memory[1:13].view(2, 6), backend=backend)
    assert torch.equal(memory, before)


@needs_native
@pytest.mark.parametrize("space", ["fastdiff", "fastdiff_host"])
def test_what_the_operator_refuses(space):
    if space == "fastdiff_host" and host_kernels.load() is not None:
        pytest.skip(str(host_kernels.load()))
    operator = getattr(torch.ops, space).dynamic_threshold.default
    memory = torch.zeros(20)
    part = memory[:12].view(2, 6), memory[1:13].view(2, 6)
    for message, arguments in (
        ("x0: expected float32", (X0.int(), X0.int(), 0.9, 1.0)),
        ("out: expected x0's dtype", (X0.double(), X0, 0.9, 1.0)),
        ("out: expected size 6 in dimension 1, got 5", (torch.zeros(2, 5), X0, 0.9, 1.0)),
        ("out: expected 2 dimensions", (torch.zeros(2), X0, 0.9, 1.0)),
        ("out: expected distinct", (torch.zeros(1, 6).expand(2, 6), X0, 0.9, 1.0)),
        ("out: expected memory of its own", (*part, 0.9, 1.0)),
        ("ratio: expected a number from 0 to 1", (X0.clone(), X0, 1.1, 1.0)),
        ("ratio: expected a number from 0 to 1", (X0.clone(), X0, math.nan, 1.0)),
        ("max_value: expected a number above 0", (X0.clone(), X0, 0.9, 0.0)),
        ("max_value: expected a number above 0", (X0.clone(), X0, 0.9, math.nan)),
        ("x0: expected a batch", (torch.tensor(1.0), torch.tensor(1.0), 0.9, 1.0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_without_a_kernel_the_reference_serves(monkeypatch):
    monkeypatch.setattr(native, "_best", lambda device: None)
    monkeypatch.setattr(
        native, "warn_once", lambda device: warnings.warn("plain PyTorch", RuntimeWarning, stacklevel=2)
    )

    def refuse(*arguments: object) -> None:
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(ops, "_dynamic_threshold_op", refuse)
    x0 = 2 * draw((2, 30)).float()
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        assert_same(fastdiff.dynamic_threshold(x0, 0.9, 3.0), by_quantile(x0, 0.9, 3.0))
    monkeypatch.setattr(native, "_best", lambda device: "triton")
    assert_same(fastdiff.dynamic_threshold(x0, 0.9, 3.0), by_quantile(x0, 0.9, 3.0))
