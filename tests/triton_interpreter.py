"""The Triton kernels run by Triton's interpreter, on a CPU, against the reference.

`test_triton.py` runs this file in a process of its own: what `triton.jit` makes of a function is settled when it is
imported, so a process either interprets the kernels or compiles them.
"""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastdiff import noise, reference, tables, triton_kernels
from fastdiff.tables import COLUMN, COLUMNS, Structure

# One structure for each form that the samplers use (kStaticRuns of csrc/step_cpu.cpp).
FORMS = {
    "ddpm": Structure(ax=True),
    "ddim": Structure(eps="output", ae=True),
    "ddpm_divide": Structure(x0_divide=True, ax=True),
    "ddim_divide": Structure(x0_divide=True, eps="output", ae=True),
    "ddim_rederived": Structure(eps="rederived", ae=True),
    "ddim_rederived_divide": Structure(eps="rederived", eps_divide=True, ae=True),
    "ddim_clipped_output": Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True),
    "ddim_v": Structure(eps="linear", ae=True),
    "ddim_x0_linear_divide": Structure(x0="output", eps="linear", eps_divide=True, ae=True),
    "ddpm_x0": Structure(x0="output", ax=True),
    "ddim_x0": Structure(x0="output", eps="rederived", ae=True),
    "ddim_x0_divide": Structure(x0="output", eps="rederived", eps_divide=True, ae=True),
    "sprites": Structure(a0=False, ax=True, eps="output", ae=True),
    "x_prev": Structure(a0=False, eps="output", ae=True),
    "forward": Structure(x0="none", a0=False, ax=True),
}
FORMS |= {f"{name}_clip": dataclasses.replace(s, clip=True) for name, s in FORMS.items() if s.x0 != "none"}
LEARNED = ("learned_log", "learned_range", "learned_plain")
SECOND = {"x0": 0, "noise": 1, "v": 2}
ROWS, ROW = 5, 3
# timesteps 0 to 9, of which 1, 4 and 8 are not in the chain
T_TO_ROW = torch.tensor([0, -1, 1, 4, -1, 3, 2, 2, -1, 0])


def exact_fma(builder, x, y, z):
    """a * b + c rounded once. The interpreter rounds the product too."""
    a, b, c = (np.atleast_1d(v.data) for v in (x, y, z))
    assert a.dtype == np.float32
    fused = noise.fma(noise.NUMPY, a, b, c).reshape(np.broadcast(x.data, y.data, z.data).shape)
    return interpreter.TensorHandle(fused, z.dtype.scalar)


CAST = interpreter.InterpreterBuilder.cast_impl


def rounding_cast(builder, source, to):
    """float32 to bfloat16 by rounding to nearest even, as a GPU does. The interpreter cuts the low bits off."""
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return CAST(builder, source, to)
    rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16).numpy()
    return interpreter.TensorHandle(rounded, tl.bfloat16)


CALL = interpreter.InterpretedFunction.__call__
CALLED = set()


def quick_call(function, *args, **kwargs):
    """A call inside a kernel, without patching the whole language again: the interpreter does, and takes longer."""
    if function.fn in CALLED:
        return function.rewrite()(*args, **kwargs)
    CALLED.add(function.fn)
    return CALL(function, *args, **kwargs)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", quick_call)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", exact_fma)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)


@pytest.fixture
def small_tiles(monkeypatch):
    """A tree of six levels and not ten: each takes the interpreter as long."""
    monkeypatch.setattr(triton_kernels, "_TILE", 64)


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def same(a, b):
    """Whether two tensors have the same bits; a NaN is a NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = torch.isnan(b)
    return torch.equal(torch.isnan(a), nan) and torch.equal(
        a.masked_fill(nan, 0).contiguous().view(bits), b.masked_fill(nan, 0).contiguous().view(bits)
    )


class Case:
    """The operands of a step, drawn at random, the kernel's results and the reference's."""

    def __init__(
        self,
        structure,
        shape=(3, 4, 9),
        *,
        dtype=torch.float32,
        output_dtype=None,
        noise_dtype=None,
        seeds=False,
        guidance=None,
        t=None,
        rounding="once",
        second=None,
        scalars=False,
        seed=0,
    ):
        self.scalars = scalars
        generator = torch.Generator().manual_seed(seed)

        def draw(shape, dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.structure, self.shape, self.dtype, self.rounding, self.second = structure, shape, dtype, rounding, second
        self.wide = noise.compute_dtype(dtype)
        rows = draw((ROWS, len(COLUMNS)), torch.float64)
        positive = [COLUMN["pd"], COLUMN["gd"], COLUMN["s"]]
        rows[:, positive] = rows[:, positive].abs() + 0.3
        rows[:, COLUMN["lo"]], rows[:, COLUMN["hi"]] = -0.7, 0.6
        rows[:, COLUMN["t"]] = torch.tensor([0.0, 2, 6, 5, 3])
        rows[:, COLUMN["repeat"]] = torch.tensor([0.0, 0, 1, 2, 0])
        self.table = rows.to(self.wide)
        batch = shape[0]
        output_dtype = output_dtype or dtype
        output_shape = (batch, 2 * shape[1], *shape[2:]) if structure.learned else shape
        self.x, self.model_output = draw(shape, dtype), draw(output_shape, output_dtype)
        if structure.variance == "learned_plain":
            self.model_output[:, shape[1] :] = self.model_output[:, shape[1] :].abs()
        self.uncond = self.scale = None
        if guidance is not None:
            self.uncond = draw(output_shape if guidance.endswith("wide") else shape, output_dtype)
            self.scale = draw(batch if guidance.startswith("each") else 1, self.wide)
        self.noise = self.seeds = None
        if structure.variance != "none":
            if seeds:
                self.seeds = noise.seeds(seed + 11, batch)
            else:
                self.noise = draw(shape, noise_dtype or dtype)
        self.t = None if t is None else torch.tensor(t)
        self.grad, self.grad_second = draw(shape, dtype), draw(shape, dtype)
        self.x_prev, self.min_std = draw(shape, dtype), 0.0
        self.grad_squares, self.grad_samples = draw(shape, self.wide), draw(batch, self.wide)
        self.grad_distance = None  # one of these two, where it has one
        self.with_sums = False

    @property
    def flags(self):
        flags = self.structure.flags | (tables.HOST_ROUNDING if self.rounding == "host" else 0)
        flags |= tables.SCALARS if self.scalars else 0
        return flags | (SECOND[self.second] << tables.SECOND_SHIFT if self.second else 0)

    @property
    def valid(self):
        """Which samples have a row: [B, 1, ...]."""
        rows = self.chosen_rows()
        return (rows >= 0).reshape(-1, *(1,) * (len(self.shape) - 1))

    def chosen_rows(self):
        if self.t is None:
            return torch.full((self.shape[0],), ROW)
        inside = (self.t >= 0) & (self.t < len(T_TO_ROW))
        return torch.where(inside, T_TO_ROW[torch.where(inside, self.t, 0)], -1).expand(self.shape[0])

    def coefficients(self):
        return self.table[self.chosen_rows().clamp(min=0)]

    def z(self):
        if self.seeds is None:
            return self.noise
        words = self.coefficients()[:, COLUMN["t"] :].to(torch.int64)
        return noise.normal_reference(self.shape, self.seeds, words, noise.DOMAINS[self.structure.domain])

    def expected(self):
        rows = self.coefficients()
        if self.second in ("noise", "v"):
            result = reference.add_noise(rows, self.x, self.z(), target=self.second, rounding=self.rounding)
        else:
            result = reference.step(
                rows,
                self.structure,
                self.x,
                self.model_output,
                uncond_output=self.uncond,
                guidance_scale=None if self.scale is None else self.scale.expand(self.shape[0]),
                z=self.z(),
                rounding=self.rounding,
                scalars=self.scalars,
            )
        return [None if r is None else torch.where(self.valid, r, float("nan")) for r in result]

    def run(self, out=None, second=None):
        if out is None:
            out = torch.full_like(self.x, 7.0)
        if second is None and self.second is not None:
            second = torch.full_like(self.x, 7.0)
        triton_kernels.step(
            out,
            second,
            self.x,
            self.model_output,
            self.uncond,
            self.scale,
            self.noise,
            self.seeds,
            self.table,
            self.t,
            T_TO_ROW,
            ROW,
            self.flags,
        )
        return out, second

    def expected_distance(self, x_prev):
        """The squares and their sums over samples."""
        squares = reference.distance(
            self.coefficients(),
            self.structure,
            x_prev,
            self.x,
            self.model_output,
            uncond_output=self.uncond,
            guidance_scale=None if self.scale is None else self.scale.expand(self.shape[0]),
            rounding=self.rounding,
            scalars=self.scalars,
            min_std=self.min_std,
        )
        squares = torch.where(self.valid, squares, float("nan"))
        return squares, reference.tree_sum(squares.reshape(self.shape[0], -1))

    def run_distance(self, out, squares, distance):
        """With out, of the step; without, of the given x'."""
        triton_kernels.step_distance(
            out,
            squares,
            distance,
            self.x_prev if out is None else None,
            self.x,
            self.model_output,
            self.uncond,
            self.scale,
            None if out is None else self.noise,
            None if out is None else self.seeds,
            self.table,
            self.t,
            T_TO_ROW,
            ROW,
            self.flags,
            self.min_std,
        )

    def check_distance(self):
        """Of the step, and of a given x'; the one that the step gave has the same distance."""
        out, squares, distance = torch.full_like(self.x, 7.0), *self.distances()
        self.run_distance(out, squares, distance)
        expected, _ = self.expected()
        assert same(out, expected)
        for wanted, found in zip(self.expected_distance(expected), (squares, distance), strict=True):
            assert same(found, wanted)
        for x_prev in (self.x_prev, out):
            self.x_prev = x_prev
            _, given = found = self.distances()
            self.run_distance(None, *found)
            assert all(map(same, found, self.expected_distance(x_prev)))
        assert same(given, distance)

    def distances(self):
        return torch.full(self.shape, 7.0, dtype=self.wide), torch.full(self.shape[:1], 7.0, dtype=self.wide)

    def check(self):
        out, second = self.run()
        expected, expected_second = self.expected()
        assert same(out, expected)
        if self.second is not None:
            assert same(second, expected_second)


@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_noise(form, seeds):
    structure = dataclasses.replace(FORMS[form], variance="fixed")
    Case(structure, seeds=seeds, second="x0" if structure.x0 != "none" else "v").check()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_without_noise(form):
    Case(FORMS[form], shape=(2, 5), second="x0" if FORMS[form].x0 != "none" else None).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
def test_learned_variance(variance, seeds, dtype):
    structure = Structure(ax=True, clip=True, variance=variance)
    case = Case(structure, dtype=dtype, seeds=seeds)
    case.model_output[0, case.shape[1] :, :5] = torch.tensor([-300.0, 200, -180, 0, float("nan")])[:5].to(dtype)
    case.check()


@pytest.mark.parametrize("guidance", ["shared", "each"])
@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_guidance(guidance, rounding, dtype):
    structure = Structure(eps="output", ae=True, clip=True, variance="fixed")
    Case(structure, dtype=dtype, guidance=guidance, rounding=rounding, second="x0").check()


@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_scalar_coefficients(variance, dtype, rounding):
    structure = Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True, clip=True, variance=variance)
    Case(structure, dtype=dtype, rounding=rounding, second="x0", scalars=True).check()
    check_backward(backward_case(structure, rounding=rounding, dtype=dtype, second="x0", scalars=True))


@pytest.mark.parametrize("guidance", ["shared", "each_wide", "shared_wide"])
def test_guidance_with_a_learned_variance(guidance):
    Case(Structure(ax=True, variance="learned_range"), guidance=guidance, seeds=True).check()


@pytest.mark.parametrize("target", ["noise", "v", None])
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
def test_add_noise(target, seeds):
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    case = Case(structure, seeds=seeds, second=target, t=[2, 9, 4])
    case.model_output = None
    out, second = case.run()
    expected, expected_second = reference.add_noise(case.coefficients(), case.x, case.z(), target=target)
    assert same(out, torch.where(case.valid, expected, float("nan")))
    assert not bool(case.valid.all())
    if target is not None:
        assert same(second, torch.where(case.valid, expected_second, float("nan")))


@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("t", [[5, 2, 9], [1, 5, 8], [-1, 10, 2**40], [3], [4], [-(2**62)]], ids=str)
def test_row_per_sample(t, seeds):
    structure = Structure(eps="output", ae=True, variance="fixed")
    Case(structure, t=t, seeds=seeds, second="x0").check()


def test_a_timestep_outside_the_chain_is_nan_where_x0_is_the_model_output():
    Case(Structure(x0="output", ax=True), t=[4, 5, 100], second="x0").check()


def test_a_row_of_the_map_outside_the_table_is_not_read():
    case = Case(Structure(ax=True), t=[0, 1, 2])
    out = torch.empty_like(case.x)
    t_to_row = torch.tensor([ROWS, 2**33, 1])
    triton_kernels.step(out, None, case.x, case.model_output, *(None,) * 4, case.table, case.t, t_to_row, 0, case.flags)
    assert out[:2].isnan().all()
    assert not out[2].isnan().any()


@pytest.mark.parametrize("tile", [16, 64, 1024])
@pytest.mark.parametrize("sample", [1, 3, 16, 63, 64, 65, 200])
def test_sizes_and_tiles(sample, tile, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_TILE", tile)
    structure = Structure(eps="output", ae=True, clip=True, variance="fixed")
    Case(structure, shape=(2, sample), seeds=True).check()
    Case(structure, shape=(2, sample)).check()


def test_more_samples_than_a_grid_has_rows(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_GRID_LIMIT", 3)
    monkeypatch.setattr(triton_kernels, "_ROWS_OF_GRID", tl.constexpr(3))
    structure = Structure(ax=True, variance="fixed")
    Case(structure, shape=(7, 5), seeds=True).check()
    case = backward_case(structure, shape=(7, 5), t=[5, 2, 9, 0, 1, 2, 3])
    check_backward(case)
    out, seeds = torch.empty(7, 5), noise.seeds(3, 7)
    triton_kernels.normals(out, seeds, 4, 1, 1)
    assert torch.equal(out, noise.normal((7, 5), seeds, t=4, repeat=1, domain="step"))


def test_nothing_is_written_outside():
    """Canaries around every output of odd size, in the last tile and behind the last sample."""
    case = Case(Structure(ax=True, variance="fixed"), shape=(3, 37), seeds=True, second="x0")
    blocks = [torch.full((3 * 37 + 64,), 7.0) for _ in range(2)]
    views = [block[32 : 32 + 3 * 37].view(3, 37) for block in blocks]
    case.run(*views)
    for view, block, expected in zip(views, blocks, case.expected(), strict=True):
        assert same(view, expected)
        assert bool((block[:32] == 7).all() and (block[32 + 3 * 37 :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
def test_offset_by_one_element(dtype, seeds):
    case = Case(Structure(ax=True, variance="fixed"), shape=(2, 64), dtype=dtype, seeds=seeds)
    expected, _ = case.expected()
    for name in ("x", "model_output"):
        value = getattr(case, name)
        setattr(case, name, torch.cat([torch.zeros(1, dtype=dtype), value.flatten()])[1:].view(value.shape))
    out = torch.empty(2 * 64 + 1, dtype=dtype)[1:].view(2, 64)
    assert out.data_ptr() % 16 != 0
    case.run(out)
    assert same(out, expected)


def layouts(tensor):
    """The same values in other layouts."""
    yield tensor.contiguous(memory_format=torch.channels_last)
    yield tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    holder = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    holder[..., ::2] = tensor
    yield holder[..., ::2]


@pytest.mark.parametrize("layout", range(3), ids=["channels_last", "reversed", "strided"])
@pytest.mark.parametrize("all_operands", [True, False])
@pytest.mark.parametrize("kind", ["none", "noise", "seeds", "learned_range", "t", "guidance"])
def test_layouts(layout, all_operands, kind):
    variance = kind if kind in LEARNED else "none" if kind in ("none", "t", "guidance") else "fixed"
    case = Case(
        Structure(ax=True, variance=variance),
        shape=(2, 3, 4, 5),
        seeds=kind in ("seeds", "learned_range"),
        t=[5, 2] if kind == "t" else None,
        guidance="each" if kind == "guidance" else None,
        second="x0",
    )
    expected = case.expected()
    case.x = list(layouts(case.x))[layout]
    if all_operands:
        for name in ("model_output", "noise", "uncond"):
            if getattr(case, name) is not None:
                setattr(case, name, list(layouts(getattr(case, name)))[layout])
    results = [list(layouts(torch.full(case.shape, 7.0)))[layout] for _ in range(2)]
    case.run(*results)
    for result, want in zip(results, expected, strict=True):
        assert same(result.contiguous(), want)
    if layout == 2:  # what lies between the elements of a strided result stays
        assert not results[0]._base[..., 1::2].any()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "learned_range"])
def test_in_place(strided, kind):
    case = Case(Structure(ax=True, clip=True, variance=kind), shape=(2, 3, 4, 50), seeds=True)
    expected, _ = case.expected()
    if strided:
        case.x = case.x.contiguous(memory_format=torch.channels_last)
    out, _ = case.run(case.x)
    assert out is case.x and same(out.contiguous(), expected)


@pytest.mark.parametrize("form", ["ddim_clip", "ddpm_divide", "ddim_clipped_output_clip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["once", "host"])
def test_other_dtypes(form, dtype, rounding):
    structure = dataclasses.replace(FORMS[form], variance="fixed")
    Case(structure, dtype=dtype, rounding=rounding, second="x0", noise_dtype=torch.float32).check()
    Case(structure, dtype=dtype, rounding=rounding, seeds=True).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variance", LEARNED)
def test_host_rounding_of_a_learned_variance(variance, dtype):
    Case(Structure(ax=True, variance=variance), dtype=dtype, rounding="host", seeds=True).check()


@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_model_output_beside_a_float32_state(output_dtype):
    structure = Structure(eps="output", ae=True, variance="fixed")
    Case(structure, output_dtype=output_dtype, noise_dtype=output_dtype, second="x0", guidance="each").check()
    Case(structure, output_dtype=output_dtype, seeds=True).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 1000), (1, 4100)], ids=str)
@pytest.mark.parametrize("word", [0, 999, 2**32 - 1])
def test_normals(dtype, shape, word):
    seeds = torch.tensor([-(2**63), 2**63 - 1, -1])[: shape[0]]
    out = torch.empty(shape, dtype=dtype)
    triton_kernels.normals(out, seeds, word, word // 3, 2)
    assert same(out, noise.normal(shape, seeds, t=word, repeat=word // 3, domain="forward", dtype=dtype))


def test_normals_of_special_words():
    """The ends of the ranges of both words of a Box-Muller pair."""
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1, 0x55555555], np.uint32)
    first, second = (w.ravel() for w in np.meshgrid(words, words))
    out = torch.empty(2, first.size)
    pairs_kernel[(1,)](torch.from_numpy(first.view(np.int32)), torch.from_numpy(second.view(np.int32)), out, first.size)
    expected = noise.box_muller(noise.NUMPY, first.astype(np.int64), second.astype(np.int64))
    for row, values in zip(out, expected, strict=True):
        assert same(row, torch.from_numpy(values))


@triton.jit
def pairs_kernel(first, second, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    w0 = tl.load(first + lanes).to(tl.uint32, bitcast=True)
    w1 = tl.load(second + lanes).to(tl.uint32, bitcast=True)
    z0, z1 = triton_kernels._box_muller(w0, w1)
    tl.store(out + lanes, z0)
    tl.store(out + N + lanes, z1)


@triton.jit
def place_kernel(b, tile, out, quotient: tl.int64, DIVISOR: tl.constexpr, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    sample, start, inside = triton_kernels._place(tl.load(b), tl.load(tile), lanes, quotient, DIVISOR, TILE)
    tl.store(out, sample)
    tl.store(out + 1, start)
    tl.store(out + 2, tl.sum(inside.to(tl.int64)))


@pytest.mark.parametrize(
    "b, tile, sample",
    [(3, 2**22, 2**33 + 24), (70000, 11, 2**15), (2**31 - 1, 0, 5), (1, 2**24 - 1, 2**34), (0, 2**21, 2**31 + 64)],
)
def test_elements_past_two_to_the_31(b, tile, sample):
    divisor = min(sample & -sample, 8)
    out = torch.zeros(3, dtype=torch.int64)
    place_kernel[(1,)](torch.tensor([b]).int(), torch.tensor([tile]).int(), out, sample // divisor, divisor, 1024)
    assert out.tolist() == [sample, b * sample + tile * 1024, max(0, min(1024, sample - tile * 1024))]


@triton.jit
def tile_kernel(tile, seed, out, HALF: tl.constexpr, TILE: tl.constexpr):
    z = triton_kernels._normals(
        tl.load(seed), tl.load(tile), tl.load(tile).to(tl.uint32), tl.load(tile).to(tl.uint32), 1, HALF, TILE
    )
    tl.store(out + tl.arange(0, TILE), z)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("tile", [0, 5, 2**23 + 1, 2**24 - 1])
def test_counters_to_the_end_of_a_sample(tile, half):
    out, seed = torch.empty(1024), torch.tensor([-12345])
    tile_kernel[(1,)](torch.tensor([tile]).int(), seed, out, half, 1024)
    index = torch.arange(256) + tile * 256
    assert same(out, noise.normals_of(noise.TORCH, seed, index, tile, 1, tile).flatten())


@triton.jit
def exp_kernel(v, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out + lanes, triton_kernels._exp_fixed(tl.load(v + lanes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp(dtype):
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 88.7, 89.5, -87.4, -103.5, -104.5, 709.7, -745.0]
    v = torch.cat([torch.tensor(special), torch.linspace(-800, 800, 2**18 - len(special))]).to(dtype)
    out = torch.empty_like(v)
    exp_kernel[(1,)](v, out, v.numel())
    assert same(out, noise.exp_fixed(v))


def test_nothing_to_do():
    case = Case(Structure(ax=True, variance="fixed"), shape=(0, 4), seeds=True)
    case.run()
    triton_kernels.normals(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 0, 0, 0)
    triton_kernels.normals(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), 0, 0, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out": torch.empty(3, 4, 8)}, r"out: expected shape \[3, 4, 9\], got \[3, 4, 8\]"),
        ({"x": torch.empty(3, 4, 9, device="meta")}, "out: expected a tensor on meta, got cpu"),
        ({"model_output": torch.empty(3, 8, 9)}, r"model_output: expected shape \[3, 4, 9\], got \[3, 8, 9\]"),
        ({"model_output": None}, "model_output: expected a tensor"),
        ({"noise": None}, "noise and seeds: expected one of them, got neither"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "noise and seeds: expected one of them, got both"),
        ({"noise": None, "seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds: expected shape \[3\], got \[2\]"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"t: expected shape \[3\] or \[1\], got \[2\]"),
        ({"t": torch.zeros(1, dtype=torch.int64), "t_to_row": None}, "t_to_row: expected a tensor"),
        ({"row": ROWS}, "row: expected 0 to 4, got 5"),
        ({"row": -1}, "row: expected 0 to 4, got -1"),
        ({"uncond_output": torch.empty(3, 4, 9)}, "uncond_output and guidance_scale: expected both or neither"),
        (
            {"uncond_output": torch.empty(3, 4, 9), "guidance_scale": torch.zeros(2)},
            r"guidance_scale: expected shape \[3\] or \[1\], got \[2\]",
        ),
    ],
)
def test_what_would_reach_other_memory_is_refused(change, message):
    case = Case(Structure(ax=True, variance="fixed"))
    out = torch.full(case.shape, 7.0)
    arguments = {
        "out": out,
        "second": None,
        "x": case.x,
        "model_output": case.model_output,
        "uncond_output": None,
        "guidance_scale": None,
        "noise": case.noise,
        "seeds": None,
        "table": case.table,
        "t": None,
        "t_to_row": T_TO_ROW,
        "row": ROW,
        "flags": case.flags,
    }
    with pytest.raises(ValueError, match=message):
        triton_kernels.step(**arguments | change)
    assert bool((out == 7).all())


def test_normals_refuses_what_is_not_contiguous():
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        triton_kernels.normals(torch.empty(4, 6).t(), torch.zeros(6, dtype=torch.int64), 0, 0, 0)
    with pytest.raises(ValueError, match=r"seeds: expected shape \[4\], got \[6\]"):
        triton_kernels.normals(torch.empty(4, 6), torch.zeros(6, dtype=torch.int64), 0, 0, 0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("form", FORMS)
def test_distance_of_every_form(form, seeds):
    Case(dataclasses.replace(FORMS[form], variance="fixed"), shape=(2, 3, 7), seeds=seeds).check_distance()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scalars", [False, True], ids=["columns", "scalars"])
@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_distance_in_other_dtypes(dtype, rounding, scalars):
    structure = Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True, clip=True, variance="fixed")
    case = Case(structure, dtype=dtype, rounding=rounding, scalars=scalars, guidance="each", noise_dtype=torch.float32)
    case.check_distance()


@pytest.mark.usefixtures("small_tiles")
def test_distance_beside_a_half_model_output():
    structure = Structure(eps="output", ae=True, variance="fixed")
    Case(structure, output_dtype=torch.bfloat16, guidance="shared", seeds=True).check_distance()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("t", [[5, 2, 9], [1, 5, 8], [-1, 10, 2**40], [3], [4]], ids=str)
def test_distance_with_a_row_per_sample(t, seeds):
    Case(Structure(ax=True, variance="fixed"), t=t, seeds=seeds).check_distance()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("s", [0.5, 0.1, 0.0, -1.0, float("nan")])
def test_distance_with_a_least_deviation(s, dtype):
    """min_std stands in for what is smaller, and is rounded to the type that is computed in."""
    for min_std in (0.0, 0.1, 0.3):
        case = Case(Structure(ax=True, variance="fixed"), dtype=dtype)
        case.table[ROW, COLUMN["s"]] = s
        case.min_std = min_std
        case.check_distance()
        squares, _ = case.distances()
        case.run_distance(None, squares, None)
        assert bool(squares.isnan().all()) == (s != s or (min_std == 0.0 and s <= 0.0))


@pytest.mark.parametrize("tile", [16, 64, 1024])
@pytest.mark.parametrize("sample", [1, 3, 16, 63, 64, 65, 200])
def test_distance_sizes_and_tiles(sample, tile, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_TILE", tile)
    Case(Structure(ax=True, clip=True, variance="fixed"), shape=(3, sample), seeds=True).check_distance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sample", [1023, 1024, 1025, 4096, 5000])
def test_sums_of_more_than_one_tile(sample, dtype):
    case = backward_case(Structure(ax=True, clip=True, variance="fixed"), shape=(2, sample), dtype=dtype, seeds=True)
    case.check_distance()
    check_sums(case)


def test_sums_of_more_samples_than_a_grid_has_rows(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_GRID_LIMIT", 3)
    monkeypatch.setattr(triton_kernels, "_ROWS_OF_GRID", tl.constexpr(3))
    monkeypatch.setattr(triton_kernels, "_TILE", 16)
    case = backward_case(Structure(ax=True, variance="fixed"), shape=(7, 37), t=[5, 2, 9, 0, 1, 2, 3])
    case.check_distance()
    case.grad_distance = case.grad_samples
    check_sums(case)


@pytest.mark.parametrize("wanted", ["squares", "distance"])
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
def test_distance_alone(wanted, seeds):
    case = Case(Structure(ax=True, variance="fixed"), shape=(2, 37), seeds=seeds)
    out = torch.empty_like(case.x)
    squares, distance = case.distances()
    case.run_distance(out, squares if wanted == "squares" else None, distance if wanted == "distance" else None)
    expected, _ = case.expected()
    both = case.expected_distance(expected)
    assert same(out, expected)
    assert same(squares, both[0]) if wanted == "squares" else same(distance, both[1])
    assert bool((distance if wanted == "squares" else squares).eq(7).all())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", range(3), ids=["channels_last", "reversed", "strided"])
@pytest.mark.parametrize("all_operands", [True, False])
@pytest.mark.parametrize("source", ["noise", "seeds", "given"])
def test_distance_layouts(layout, all_operands, source):
    case = Case(Structure(ax=True, variance="fixed"), shape=(2, 3, 4, 5), seeds=source == "seeds", guidance="each")
    x_prev = case.x_prev if source == "given" else case.expected()[0]
    expected = case.expected_distance(x_prev)
    for name in ("x", "x_prev", "model_output", "uncond", "noise") if all_operands else ("x",):
        if getattr(case, name) is not None:
            setattr(case, name, list(layouts(getattr(case, name)))[layout])
    out, squares = (list(layouts(torch.full(case.shape, 7.0)))[layout] for _ in range(2))
    spread = torch.full((2, 2), 7.0)
    for distance in (spread[:, 0], None):
        case.run_distance(None if source == "given" else out, squares, distance)
        assert same(squares.contiguous(), expected[0])
    assert same(spread[:, 0], expected[1]) and bool((spread[:, 1] == 7).all())
    if source != "given":
        assert same(out.contiguous(), x_prev)
    if layout == 2:
        assert not squares._base[..., 1::2].any()


@pytest.mark.parametrize("strided", [False, True])
def test_distance_in_place(strided):
    case = Case(Structure(ax=True, clip=True, variance="fixed"), shape=(2, 3, 4, 50), seeds=True)
    expected, _ = case.expected()
    expected_squares, expected_distance = case.expected_distance(expected)
    if strided:
        case.x = case.x.contiguous(memory_format=torch.channels_last)
    squares, distance = case.distances()
    case.run_distance(case.x, squares, distance)
    assert same(case.x.contiguous(), expected)
    assert same(squares, expected_squares) and same(distance, expected_distance)


def test_distance_writes_nothing_outside():
    case = Case(Structure(ax=True, variance="fixed"), shape=(3, 37), seeds=True)
    blocks = [torch.full((3 * 37 + 64,), 7.0) for _ in range(2)]
    out, squares = (block[32 : 32 + 3 * 37].view(3, 37) for block in blocks)
    distances = torch.full((5,), 7.0)
    case.run_distance(out, squares, distances[1:4])
    expected, _ = case.expected()
    assert same(out, expected) and all(map(same, (squares, distances[1:4]), case.expected_distance(expected)))
    for block in blocks:
        assert bool((block[:32] == 7).all() and (block[32 + 3 * 37 :] == 7).all())
    assert distances[0] == distances[4] == 7


def test_a_sample_has_the_distance_that_it_has_alone():
    case = Case(Structure(ax=True, variance="fixed"), shape=(4, 1500))
    _, together = case.distances()
    case.run_distance(None, None, together)
    for b in range(4):
        alone = Case(Structure(ax=True, variance="fixed"), shape=(1, 1500))
        for name in ("x", "model_output", "x_prev"):
            setattr(alone, name, getattr(case, name)[b : b + 1])
        alone.table = case.table
        distance = torch.empty(1)
        alone.run_distance(None, None, distance)
        assert same(distance, together[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_sums_of_nothing(shape):
    case = backward_case(Structure(ax=True, variance="fixed"), shape=shape, seeds=True)
    squares, distance = case.distances()
    case.run_distance(torch.empty_like(case.x), squares, distance)
    assert same(distance, torch.zeros(shape[0]))
    case.with_sums = True
    assert same(run_backward(case, ["x"])["sums"], torch.zeros(shape[0], 19))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flags": Structure(ax=True).flags}, "flags: expected a structure with a fixed variance, got variance 0"),
        ({"flags": Structure(ax=True, variance="learned_log").flags}, "expected a structure with a fixed variance"),
        ({"out": None}, "out and x_prev: expected one of them, got neither"),
        ({"x_prev": torch.zeros(3, 4, 9)}, "out and x_prev: expected one of them, got both"),
        ({"squares": None, "distance": None}, "squares and distance: expected at least one tensor, got neither"),
        ({"out": None, "x_prev": torch.zeros(3, 4, 9)}, "noise and seeds: expected neither beside x_prev"),
        ({"noise": None}, "noise and seeds: expected one of them, got neither"),
        ({"out": None, "x_prev": torch.zeros(3, 4, 8), "noise": None}, r"x_prev: expected shape \[3, 4, 9\], got"),
        ({"model_output": None}, "model_output: expected a tensor"),
        ({"guidance_scale": torch.zeros(1)}, "uncond_output and guidance_scale: expected both or neither"),
        ({"squares": torch.empty(3, 4, 8)}, r"squares: expected shape \[3, 4, 9\], got \[3, 4, 8\]"),
        ({"distance": torch.empty(4)}, r"distance: expected shape \[3\], got \[4\]"),
        ({"distance": torch.empty(3, device="meta")}, "distance: expected a tensor on cpu, got meta"),
    ],
)
def test_distance_refuses(change, message):
    case = Case(Structure(ax=True, variance="fixed"))
    outputs = {"out": torch.full(case.shape, 7.0), "squares": torch.full(case.shape, 7.0), "distance": torch.ones(3)}
    arguments = outputs | {
        "x_prev": None,
        "x": case.x,
        "model_output": case.model_output,
        "uncond_output": None,
        "guidance_scale": None,
        "noise": case.noise,
        "seeds": None,
        "table": case.table,
        "t": None,
        "t_to_row": None,
        "row": ROW,
        "flags": case.flags,
        "min_std": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        triton_kernels.step_distance(**arguments | change)
    assert bool((outputs["out"] == 7).all() and (outputs["squares"] == 7).all() and (outputs["distance"] == 1).all())


def backward_case(structure, *, grad=True, grad_second=True, clip_grad="exact", **kwargs):
    case = Case(structure, **kwargs)
    case.grad = case.grad if grad else None
    case.grad_second = case.grad_second if grad_second and case.second is not None else None
    case.clip_grad = clip_grad
    return case


def expected_gradients(case):
    """The reference's closed form: {operand: gradient}."""
    found = reference.step_backward(
        case.coefficients(),
        case.structure,
        case.grad,
        case.grad_second,
        case.x,
        case.model_output,
        uncond_output=case.uncond,
        guidance_scale=None if case.scale is None else case.scale.expand(case.shape[0]),
        z=case.z(),
        rounding=case.rounding,
        scalars=case.scalars,
        second=case.second or "x0",
        clip_grad=case.clip_grad,
        x_prev=None if case.grad_distance is None else case.x_prev,
        grad_distance=case.grad_distance,
        min_std=case.min_std,
        with_sums=case.with_sums,
    )
    gradients = {"x": found.x, "model_output": found.model_output, "uncond": found.uncond_output, "noise": found.z}
    gradients = {name: torch.where(case.valid, d, 0) for name, d in gradients.items() if d is not None}
    if case.uncond is not None and case.uncond.shape != case.shape:  # its variance half is not looked at
        gradients["uncond"] = torch.cat([gradients["uncond"], torch.zeros_like(gradients["uncond"])], 1)
    if found.sums is not None:
        gradients["sums"] = torch.where(case.valid.reshape(-1, 1), found.sums, 0)
    return gradients


def run_backward(case, wanted, holders=None):
    """The kernel's gradients: {operand: gradient}. Operands that it must not need are not given."""
    operands = {"x": case.x, "model_output": case.model_output, "uncond": case.uncond, "noise": case.noise}
    results = {}
    for name in wanted:
        like = case.x if operands[name] is None else operands[name]  # with seeds, the gradient of no tensor
        results[name] = holders[name] if holders else torch.full_like(like, 7.0)
    structure = case.structure
    has_mean = case.grad is not None or case.grad_distance is not None
    again = case.with_sums or case.grad_distance is not None
    masked = set(wanted) != {"noise"} and reference.masks_clip(
        structure, has_mean, case.grad_second is not None, case.second or "x0", case.clip_grad
    )
    varied = structure.learned and case.grad is not None and bool({"model_output", "noise"} & set(wanted))
    draws = (varied and "model_output" in wanted) or (
        case.with_sums and (case.grad is not None or (case.grad_second is not None and case.second == "v"))
    )
    if case.with_sums:
        results["sums"] = torch.full((case.shape[0], len(COLUMNS) + 1), 7.0, dtype=case.wide)
    triton_kernels.step_backward(
        results.get("x"),
        results.get("model_output"),
        results.get("uncond"),
        results.get("noise"),
        case.grad,
        case.grad_second,
        case.x if again or (masked and structure.x0 == "linear") else None,
        case.model_output if again or masked or varied else None,
        case.uncond if again or masked else None,
        case.scale,
        case.noise if draws else None,
        case.seeds if draws else None,
        case.table,
        case.t,
        T_TO_ROW,
        ROW,
        case.flags | (tables.STRAIGHT_THROUGH if case.clip_grad == "straight_through" else 0),
        results.get("sums"),
        None if case.grad_distance is None else case.x_prev,
        case.grad_distance,
        case.min_std,
    )
    return results


def check_backward(case, wanted=None):
    expected = expected_gradients(case)
    if wanted is None:
        wanted = ["x", "model_output"] + ["uncond"] * (case.uncond is not None)
        wanted += ["noise"] * (case.structure.variance != "none")
    results = run_backward(case, wanted)
    for name, result in results.items():
        want = expected[name].to(result.dtype)
        nan = want.isnan()
        assert torch.equal(result.isnan(), nan), name
        assert torch.equal(result.masked_fill(nan, 0), want.masked_fill(nan, 0)), name  # a zero may have either sign


def check_sums(case, wanted=None):
    """The gradients of the row too."""
    case.with_sums = True
    check_backward(case, wanted)
    case.with_sums = False


@pytest.mark.parametrize("given", ["both", "grad", "second"])
@pytest.mark.parametrize("form", FORMS)
def test_backward_of_every_form(form, given):
    structure = dataclasses.replace(FORMS[form], variance="fixed")
    second = "x0" if structure.x0 != "none" else "v"
    check_backward(backward_case(structure, grad=given != "second", grad_second=given != "grad", second=second))


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_backward_of_a_learned_variance(variance, seeds, dtype):
    structure = Structure(ax=True, clip=True, variance=variance)
    check_backward(backward_case(structure, seeds=seeds, dtype=dtype, guidance="each_wide", second="x0"))


@pytest.mark.parametrize("wanted", [["x"], ["model_output"], ["uncond"], ["noise"], ["x", "noise"]], ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_backward_of_some_operands(wanted, variance):
    structure = Structure(eps="rederived", ae=True, clip=True, variance=variance)
    check_backward(backward_case(structure, guidance="each", second="x0"), wanted)


@pytest.mark.parametrize("variance", LEARNED)
def test_backward_of_x0_alone_leaves_the_variance(variance):
    case = backward_case(Structure(ax=True, variance=variance), grad=False, second="x0")
    case.model_output[:, case.shape[1] :] = float("inf")
    results = run_backward(case, ["x", "model_output"])
    assert bool((results["model_output"][:, case.shape[1] :] == 0).all())


@pytest.mark.parametrize("target", ["noise", "v"])
@pytest.mark.parametrize("t", [[2, 9, 4], [5]], ids=str)
def test_backward_of_add_noise(target, t):
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    check_backward(backward_case(structure, second=target, t=t), ["x", "noise"])


@pytest.mark.parametrize("t", [[5, 2, 9], [1, 5, 8], [4]], ids=str)
def test_backward_with_a_row_per_sample(t):
    structure = Structure(eps="rederived", ae=True, clip=True, variance="learned_range")
    case = backward_case(structure, t=t, seeds=True, second="x0", guidance="each_wide")
    if case.scale is not None:
        case.scale[0] = float("inf")
    check_backward(case)


@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variance", ["fixed", *LEARNED])
def test_backward_in_other_dtypes(rounding, dtype, variance):
    structure = Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True, clip=True, variance=variance)
    check_backward(backward_case(structure, rounding=rounding, dtype=dtype, guidance="shared", second="x0"))


def test_backward_beside_a_half_model_output():
    structure = Structure(eps="output", ae=True, clip=True, variance="learned_range")
    check_backward(backward_case(structure, output_dtype=torch.float16, seeds=True, second="x0"))


def test_backward_at_the_clip():
    """A gradient passes at a bound and for NaN, and where it is infinite it is still cut outside."""
    structure = Structure(x0="output", clip=True)
    case = backward_case(structure, shape=(1, 7))
    rows = case.coefficients()
    lo, hi = float(rows[0, COLUMN["lo"]]), float(rows[0, COLUMN["hi"]])
    case.model_output[0] = torch.tensor([lo, hi, float("nan"), lo - 0.1, hi + 0.1, float("inf"), 0.0])
    case.grad[0, 3] = float("inf")
    passes = torch.tensor([True, True, True, False, False, False, True])
    (result,) = run_backward(case, ["model_output"]).values()
    assert torch.equal(result[0] != 0, passes)
    check_backward(case)
    case.grad[0, 3] = 1.0
    check_sums(case)  # what passes at a bound is no part of its gradient
    case.clip_grad = "straight_through"
    check_backward(case, ["model_output"])
    assert bool((run_backward(case, ["model_output"])["model_output"] != 0).all())


@pytest.mark.parametrize("layout", range(3), ids=["channels_last", "reversed", "strided"])
@pytest.mark.parametrize("kind", ["fixed", "learned_range"])
def test_backward_layouts(layout, kind):
    structure = Structure(eps="output", ae=True, clip=True, variance=kind)
    case = backward_case(structure, shape=(2, 3, 4, 5), second="x0")
    expected = expected_gradients(case)
    for name in ("x", "model_output", "grad", "grad_second", "noise"):
        setattr(case, name, list(layouts(getattr(case, name)))[layout])
    holders = {
        name: list(layouts(torch.full_like(getattr(case, name).contiguous(), 7.0)))[layout]
        for name in ("x", "model_output", "noise")
    }
    for name, result in run_backward(case, list(holders), holders).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("tile", [16, 1024])
@pytest.mark.parametrize("sample", [1, 7, 64, 65])
def test_backward_sizes_and_tiles(sample, tile, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_TILE", tile)
    structure = Structure(ax=True, clip=True, variance="learned_log")
    check_backward(backward_case(structure, shape=(2, 1, sample), seeds=True, second="x0"))


@pytest.mark.parametrize("second", [None, "x0"])
@pytest.mark.parametrize("variance", ["none", "fixed", *LEARNED])
@pytest.mark.parametrize("form", ["ddpm_clip", "ddim_clipped_output_clip", "ddim_v", "ddim_x0_clip", "sprites"])
def test_backward_against_autograd(form, variance, second):
    structure = dataclasses.replace(FORMS[form], variance=variance)
    case = backward_case(structure, dtype=torch.float64, guidance="each", second=second)
    names = [name for name in ("x", "model_output", "uncond", "noise") if getattr(case, name) is not None]
    for name in names:
        getattr(case, name).requires_grad_()
    outputs = [output for output in case.expected()[: 2 if second else 1] if output is not None]
    given = [case.grad, case.grad_second][: len(outputs)]
    gradients = torch.autograd.grad(outputs, [getattr(case, name) for name in names], given, allow_unused=True)
    for name in names:
        getattr(case, name).requires_grad_(False)
    results = run_backward(case, names)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(results[name], torch.zeros_like(results[name]) if gradient is None else gradient)


def test_backward_refuses_what_it_needs_and_does_not_have():
    case = backward_case(Structure(ax=True, clip=True, variance="learned_range"), guidance="shared", second="x0")
    grads = [torch.empty_like(v) for v in (case.x, case.model_output, case.uncond, case.noise)]
    operands = {"x": case.x, "model_output": case.model_output, "uncond_output": case.uncond, "noise": case.noise}

    def call(grad=case.grad, **changed):
        given = operands | changed
        triton_kernels.step_backward(
            *grads,
            grad,
            None,
            given["x"],
            given["model_output"],
            given["uncond_output"],
            case.scale,
            given["noise"],
            None,
            case.table,
            None,
            None,
            ROW,
            case.flags,
        )

    for name in ("x", "model_output", "uncond_output"):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor"):
            call(**{name: None})
    with pytest.raises(ValueError, match="noise and seeds: expected one of them, got neither"):
        call(noise=None)
    with pytest.raises(ValueError, match="grad and grad_second: expected at least one"):
        call(grad=None)
    with pytest.raises(ValueError, match="grad_uncond_output: expected the shape of uncond_output"):
        call(uncond_output=case.model_output)
    call()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("given", ["all", "grad", "second", "distance"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_every_form(form, given):
    structure = dataclasses.replace(FORMS[form], variance="fixed")
    second = "x0" if structure.x0 != "none" else "v"
    case = backward_case(
        structure,
        shape=(2, 3, 7),
        grad=given in ("all", "grad"),
        grad_second=given in ("all", "second"),
        second=second,
        guidance="each",
    )
    if structure.x0 == "none":
        case.uncond = case.scale = None  # there is nothing to guide
    if given in ("all", "distance"):
        case.grad_distance = case.grad_samples
        check_backward(case)
    check_sums(case)


@pytest.mark.usefixtures("small_tiles")
def test_sums_without_a_variance():
    for structure in FORMS.values():
        check_sums(backward_case(structure, shape=(2, 5)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_sums_of_a_learned_variance(variance, seeds, dtype):
    structure = Structure(ax=True, clip=True, variance=variance)
    case = backward_case(structure, shape=(2, 3, 7), seeds=seeds, dtype=dtype, guidance="each_wide", second="x0")
    check_sums(case)
    check_sums(case, [])
    case.grad = None
    check_sums(case)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["sums", "samples", "squares"])
@pytest.mark.parametrize("scalars", [False, True], ids=["columns", "scalars"])
@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sums_in_other_dtypes(dtype, rounding, scalars, kind):
    structure = Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True, clip=True, variance="fixed")
    options = {"rounding": rounding, "dtype": dtype, "scalars": scalars, "guidance": "shared", "second": "x0"}
    case = backward_case(structure, **options)
    if kind != "sums":
        case.grad_distance = case.grad_samples if kind == "samples" else case.grad_squares
        check_backward(case)
    check_sums(case)
    check_sums(backward_case(dataclasses.replace(structure, variance="learned_range"), **options))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("straight", [False, True], ids=["exact", "straight_through"])
@pytest.mark.parametrize("wanted", [["x"], ["model_output"], ["uncond"], ["noise"], [], None], ids=str)
def test_sums_beside_some_gradients(wanted, straight):
    structure = Structure(eps="rederived", ae=True, clip=True, variance="fixed")
    case = backward_case(structure, guidance="each", clip_grad="straight_through" if straight else "exact")
    check_sums(case, wanted)
    case.grad_distance = case.grad_samples
    check_sums(case, wanted)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("target", ["noise", "v"])
@pytest.mark.parametrize("t", [[2, 9, 4], [5]], ids=str)
def test_sums_of_add_noise(target, t):
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    case = backward_case(structure, second=target, t=t)
    case.model_output = None
    check_sums(case, ["x", "noise"])
    case.grad_distance = case.grad_samples
    check_sums(case, ["x", "noise"])
    case.grad = None
    check_sums(case, ["x", "noise"])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seeds", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("t", [[5, 2, 9], [1, 5, 8], [4]], ids=str)
def test_sums_with_a_row_per_sample(t, seeds):
    structure = Structure(eps="linear", eps_divide=True, ae=True, clip=True, variance="fixed")
    case = backward_case(structure, t=t, seeds=seeds, second="x0", guidance="each")
    case.x[1] = float("nan")
    for grad_distance in (None, case.grad_samples, case.grad_squares):
        case.grad_distance = grad_distance
        check_sums(case)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("s", [0.5, 0.1, 0.0, -1.0])
def test_gradient_of_a_distance_with_a_least_deviation(s):
    for min_std in (0.0, 0.1, 0.3):
        case = backward_case(Structure(ax=True, variance="fixed"))
        case.table[ROW, COLUMN["s"]] = s
        case.min_std = min_std
        case.grad_distance = case.grad_samples
        check_backward(case)
        check_sums(case)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", range(3), ids=["channels_last", "reversed", "strided"])
@pytest.mark.parametrize("kind", ["sums", "samples", "squares"])
def test_sums_layouts(layout, kind):
    structure = Structure(eps="output", ae=True, clip=True, variance="fixed")
    case = backward_case(structure, shape=(2, 3, 4, 5), second="x0")
    case.with_sums = kind == "sums"
    if kind != "sums":
        case.grad_distance = case.grad_samples if kind == "samples" else case.grad_squares
    expected = expected_gradients(case)
    for name in ("x", "model_output", "grad", "grad_second", "noise", "x_prev"):
        setattr(case, name, list(layouts(getattr(case, name)))[layout])
    if kind == "squares":
        case.grad_distance = list(layouts(case.grad_distance))[layout]
    elif kind == "samples":
        case.grad_distance = case.grad_distance.repeat_interleave(2)[::2]
    holders = {
        name: list(layouts(torch.full_like(getattr(case, name).contiguous(), 7.0)))[layout]
        for name in ("x", "model_output", "noise")
    }
    for name, result in run_backward(case, list(holders), holders).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("sample", [1, 7, 64, 65, 200])
def test_sums_sizes_and_tiles(sample, tile, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_TILE", tile)
    structure = Structure(ax=True, clip=True, variance="learned_range")
    check_sums(backward_case(structure, shape=(2, 1, sample), seeds=True, second="x0"))


@pytest.mark.usefixtures("small_tiles")
def test_sums_against_autograd():
    """Of a learned table and a scale: the gradients that plain autograd gives, in float64."""
    for variance in ("fixed", *LEARNED):
        for form in ("ddpm_clip", "ddim_clipped_output_clip", "ddim_v", "ddim_x0_linear_divide", "sprites"):
            structure = dataclasses.replace(FORMS[form], variance=variance)
            case = backward_case(structure, dtype=torch.float64, guidance="each", second="x0", t=[5, 2, 9])
            rows = case.coefficients().requires_grad_()
            scale = case.scale.clone().requires_grad_()
            outputs = reference.step(
                rows, structure, case.x, case.model_output, uncond_output=case.uncond, guidance_scale=scale, z=case.z()
            )
            expected = torch.autograd.grad(outputs, [rows, scale], [case.grad, case.grad_second])
            case.with_sums = True
            sums = run_backward(case, [])["sums"]
            torch.testing.assert_close(sums[:, :-1], expected[0])
            torch.testing.assert_close(sums[:, -1], expected[1])


@pytest.mark.usefixtures("small_tiles")
def test_gradient_of_a_distance_against_autograd():
    structure = dataclasses.replace(FORMS["ddim_rederived_clip"], variance="fixed")
    options = {"dtype": torch.float64, "guidance": "each", "t": [5, 2, 9], "grad": False, "grad_second": False}
    case = backward_case(structure, **options)
    rows = case.coefficients().requires_grad_()
    leaves = [rows, case.scale.clone().requires_grad_(), case.x.clone().requires_grad_()]
    leaves += [case.model_output.clone().requires_grad_(), case.uncond.clone().requires_grad_()]
    squares = reference.distance(
        rows, case.structure, case.x_prev, *leaves[2:4], uncond_output=leaves[4], guidance_scale=leaves[1]
    )
    expected = torch.autograd.grad(squares, leaves, case.grad_squares)
    case.grad_distance, case.with_sums = case.grad_squares, True
    found = run_backward(case, ["x", "model_output", "uncond"])
    torch.testing.assert_close(found["sums"][:, :-1], expected[0])
    torch.testing.assert_close(found["sums"][:, -1], expected[1])
    for name, want in zip(("x", "model_output", "uncond"), expected[2:], strict=True):
        torch.testing.assert_close(found[name], want)
