"""Dynamic thresholding on the GPU: the bits of the CPU and of torch.quantile, without waiting, in a captured graph."""

from __future__ import annotations

import pytest
import torch
from test_ops import layouts
from test_threshold import DTYPES, MAXIMA, assert_same, by_quantile, draw, kinds

import fastdiff

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 17, 4096, 8193, 200003])
def test_the_bits_of_the_cpu(device, dtype, size):
    x0 = kinds(size).to(dtype)
    for ratio in (0.0, 0.5, 0.995, 1.0):
        for max_value in MAXIMA:
            found = fastdiff.dynamic_threshold(x0.to(device), ratio, max_value)
            assert found.device.type == device.type
            assert_same(found.cpu(), by_quantile(x0, ratio, max_value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_torch_on_the_device(device, dtype, record):
    x0 = (2 * draw((4, 3, 128, 128))).to(device, dtype)
    found, expected = fastdiff.dynamic_threshold(x0, 0.9, 5.0), by_quantile(x0, 0.9, 5.0)
    record(f"dynamic_threshold {dtype}", equal=torch.equal(found, expected))
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 96, 96), (3, 4, 5, 7)])
def test_any_layout(device, dtype, shape):
    x0 = (2 * draw(shape)).to(device, dtype)
    expected = by_quantile(x0.cpu(), 0.9, 3.0)
    for mine in layouts(x0).values():
        assert_same(fastdiff.dynamic_threshold(mine, 0.9, 3.0).cpu(), expected)
        for out in layouts(torch.zeros_like(x0)).values():
            assert_same(fastdiff.dynamic_threshold(mine, 0.9, 3.0, out=out).cpu(), expected)
        assert_same(fastdiff.dynamic_threshold(mine, 0.9, 3.0, out=mine).cpu(), expected)


def test_batches(device):
    """More samples than a grid has rows, and few that share the GPU."""
    for shape in ((70000, 5), (1, 2**22 + 1), (300, 9001), (0, 3), (3, 0)):
        x0 = (2 * draw(shape)).float()
        found = fastdiff.dynamic_threshold(x0.to(device), 0.9, 3.0)
        assert_same(found.cpu(), fastdiff.dynamic_threshold(x0, 0.9, 3.0))


def test_repeats(device):
    for shape in ((2, 3, 256, 256), (64, 1024)):
        x0 = (2 * draw(shape)).float().to(device)
        first = fastdiff.dynamic_threshold(x0, 0.9, 3.0)
        for _ in range(100):
            assert torch.equal(fastdiff.dynamic_threshold(x0, 0.9, 3.0), first)


def test_nothing_waits_for_the_device(gpu, strict_sync):
    for shape in ((2, 3, 256, 256), (2, 16, 2)):
        for max_value in (1.0, 3.0):
            x0 = torch.randn(shape, device=gpu)
            with strict_sync:
                fastdiff.dynamic_threshold(x0, 0.9, max_value)
                fastdiff.dynamic_threshold(x0, 0.9, max_value, backend="reference")


@pytest.mark.parametrize("shape", [(2, 3, 256, 256), (4, 16, 2)])
def test_in_a_captured_graph(gpu, shape):
    x0 = torch.zeros(shape, device=gpu)
    found = torch.empty_like(x0)
    fastdiff.dynamic_threshold(x0, 0.9, 3.0, out=found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastdiff.dynamic_threshold(x0, 0.9, 3.0, out=found)
    for seed in range(3):
        x0.copy_((2 + seed) * draw(shape, seed))
        graph.replay()
        assert_same(found.cpu(), by_quantile(x0.cpu(), 0.9, 3.0))
