"""The sums over samples: the gradients of a row and of the guidance scale, and the distance of x' from its mean. The
operators, on both kinds of kernel, against the definition in plain PyTorch, in every bit but the sign of zeros."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import host_kernels
import pytest
import torch
from test_ops import (
    DTYPES,
    SCHEDULE,
    SHAPE,
    arguments,
    assert_equal,
    layouts,
    needs_native,
    random_table,
    structures,
    with_variance,
)
from torch import Tensor

import fastdiff.noise as contract
from fastdiff import reference
from fastdiff.tables import (
    COLUMN,
    HOST_ROUNDING,
    SCALARS,
    Structure,
    Table,
    _with_reciprocals,
    add_noise_table,
)

LEARNED = ("learned_log", "learned_range", "learned_plain")
HALF = (torch.float16, torch.bfloat16)
STRAIGHT_THROUGH = 1 << 17
SECOND = {"x0": 0, "noise": 1 << 13, "v": 2 << 13}
SUMS = len(COLUMN) + 1
FORM = Structure(clip=True, ax=True, variance="fixed")
# around the blocks that are summed at a time, and the numbers of them at which the tree is not full
SIZES = (1, 2, 3, 511, 512, 513, 1024, 1025, 1537, 4096, 4097, 262145)

pytestmark = needs_native


@pytest.fixture(scope="module")
def operators(kernels: str) -> Any:
    return host_kernels.operators() if kernels == "cuda" else torch.ops.fastdiff


class Case(NamedTuple):
    """What a step was given, and the gradients of what it gave."""

    table: Table
    x: Tensor
    model_output: Tensor | None
    grad: Tensor | None = None
    grad_second: Tensor | None = None
    x_prev: Tensor | None = None
    grad_distance: Tensor | None = None
    uncond_output: Tensor | None = None
    guidance_scale: Tensor | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    t: Tensor | None = None
    row: int = 2
    rounding: str = "once"
    second: str = "x0"
    clip_grad: str = "exact"
    scalars: bool = False
    min_std: float = 0.0

    @property
    def rows(self) -> Tensor:
        rows = self.table.to("cpu", self.x.dtype)
        return _with_reciprocals(rows) if self.scalars else rows

    @property
    def flags(self) -> int:
        flags = self.table.structure.flags | SECOND[self.second] | SCALARS * self.scalars
        return flags | HOST_ROUNDING * (self.rounding == "host")

    @property
    def compute(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def scale(self) -> Tensor | None:
        return None if self.guidance_scale is None else self.guidance_scale.to(self.compute).reshape(-1)

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The row of each sample, or that of all, and which samples have one."""
        if self.t is None:
            return self.rows[self.row], torch.ones(self.x.shape[0], dtype=torch.bool)
        index = torch.tensor(
            [self.table.rows_of_t.get(int(t), -1) for t in self.t.expand(self.x.shape[0])], dtype=torch.int64
        )
        return self.rows[index.clamp(min=0)], index >= 0

    def z(self) -> Tensor | None:
        if self.seeds is None:
            return self.noise
        chosen, _ = self.chosen()
        words = chosen[..., COLUMN["t"] :].to(torch.int64).expand(self.x.shape[0], 2)
        domain = contract.DOMAINS[self.table.structure.domain]
        return contract.normal_reference(tuple(self.x.shape), self.seeds, words, domain)

    def where(self, value: Tensor, other: float) -> Tensor:
        _, valid = self.chosen()
        return torch.where(valid.reshape(-1, *(1,) * (value.dim() - 1)), value, other)

    def sample(self, b: int) -> Case:
        return Case(*(u[b : b + 1] if isinstance(u, Tensor) and u.dim() > 0 and len(u) > 1 else u for u in self))


def randn(shape, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def special_values() -> list[Tensor]:
    """Each combination of three, a sample of one element."""
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e38, 1e-40])
    return [u.reshape(-1, 1) for u in torch.cartesian_prod(special, special, special).T.contiguous()]


def unchanged(case: Case, run) -> Any:
    inputs = [u for u in case if isinstance(u, Tensor)]
    before = [u.clone() for u in inputs]
    result = run()
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(copy)), "an input was changed"
    return result


# The gradients


def expected(case: Case, with_sums: bool) -> list[Tensor | None]:
    """By the reference: the gradients of x, model_output and uncond_output in the dtypes of these, the sums."""
    chosen, _ = case.chosen()
    found = reference.step_backward(
        chosen,
        case.table.structure,
        case.grad,
        case.grad_second,
        case.x,
        case.model_output,
        uncond_output=case.uncond_output,
        guidance_scale=case.guidance_scale,
        z=case.z(),
        rounding=case.rounding,
        scalars=case.scalars,
        second=case.second,
        clip_grad=case.clip_grad,
        x_prev=case.x_prev,
        grad_distance=case.grad_distance,
        min_std=case.min_std,
        with_sums=with_sums,
    )
    m_dtype = case.x.dtype if case.model_output is None else case.model_output.dtype
    dtypes = (case.x.dtype, m_dtype, m_dtype, case.x.dtype, case.compute)
    return [None if u is None else case.where(u, 0.0).to(v) for u, v in zip(found, dtypes, strict=True)]


def by_kernel(case: Case, operators: Any, with_sums: bool = True, gradients: bool = True) -> list[Tensor | None]:
    """By the operator, into memory that holds something else."""

    def like(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return torch.full_like(tensor, math.nan, dtype=dtype) if gradients and tensor is not None else None

    m_like = case.x if case.model_output is None else case.model_output
    outputs = [
        like(case.x),
        like(m_like),
        like(case.x, m_like.dtype) if case.uncond_output is not None else None,
        like(case.x) if case.table.structure.variance != "none" else None,
    ]
    sums = torch.full((case.x.shape[0], SUMS), math.nan, dtype=case.compute) if with_sums else None
    operators.step_backward(
        *outputs,
        case.grad,
        case.grad_second,
        case.x,
        case.model_output,
        case.uncond_output,
        case.scale,
        case.noise,
        case.seeds,
        case.rows,
        case.t,
        None if case.t is None else case.table.row_map("cpu"),
        case.row,
        case.flags | STRAIGHT_THROUGH * (case.clip_grad == "straight_through"),
        sums,
        case.x_prev,
        case.grad_distance,
        case.min_std,
    )
    return [*outputs, sums]


def check(case: Case, operators: Any, with_sums: bool = True) -> list[Tensor | None]:
    """The gradients by the kernel, asserted to be those of the reference."""
    ours = unchanged(case, lambda: by_kernel(case, operators, with_sums))
    for mine, theirs in zip(ours, expected(case, with_sums), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_equal(mine, theirs)
    if with_sums:  # and without a gradient that goes elsewhere
        assert_equal(by_kernel(case, operators, gradients=False)[4], ours[4])
    return ours


def case_of(structure: Structure, dtype=torch.float32, seed: int = 0, *, shape=SHAPE, m_dtype=None, **options) -> Case:
    """A step of which everything that it can give has a gradient."""
    given = arguments(structure, shape, dtype, m_dtype, seed)
    fields: dict[str, Any] = {"grad": randn(shape, dtype, seed + 1)}
    if structure.variance != "none" and "noise" not in options:
        fields["seeds"] = contract.seeds(seed, shape[0])
    if structure.x0 != "none":
        fields["grad_second"] = randn(shape, dtype, seed + 2)
    if structure.variance == "fixed":
        fields["x_prev"] = randn(shape, dtype, seed + 3)
        fields["grad_distance"] = randn(shape[:1], torch.float64 if dtype == torch.float64 else torch.float32, seed + 4)
    return Case(random_table(structure, seed=seed), given["x"], given["model_output"], **(fields | options))


def without_distance(case: Case) -> Case:
    return case._replace(x_prev=None, grad_distance=None)


def sums_of(found: list[Tensor | None]) -> dict[str, Tensor]:
    assert found[4] is not None
    return dict(zip((*COLUMN, "scale"), found[4].T, strict=True))


def structures_for(dtype: torch.dtype) -> list[Structure]:
    """All of them, of which the half types, whose arithmetic is that of float32, take every third."""
    return structures()[DTYPES.index(dtype) % 3 :: 3] if dtype in HALF else structures()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_structure_equals_the_reference(dtype, operators):
    for index, structure in enumerate(structures_for(dtype)):
        for variance, rounding in (("none", "once"), ("fixed", "once"), ("fixed", "host"))[: 2 + (dtype in HALF)]:
            case = case_of(with_variance(structure, variance), dtype, index, rounding=rounding)
            found = sums_of(check(case, operators))
            check(case._replace(clip_grad=("exact", "straight_through")[index % 2], scalars=True), operators)
            # a sum is there where the structure has its column, and nowhere else
            has_eps = structure.ae
            for name, there in {
                "a0": structure.a0,
                "ax": structure.ax,
                "ae": has_eps,
                "s": variance == "fixed",
                "gd": has_eps and structure.eps_divide,
                "gx": has_eps and structure.eps == "rederived",
                "em": has_eps and structure.eps == "linear",
                "lo": structure.clip,
                "px": structure.x0 == "linear",
                "pd": structure.x0_divide,
                "t": False,
                "repeat": False,
                "min_log": False,
                "scale": False,
            }.items():
                assert found[name].ne(0).any() == there, (structure, name)
            if variance == "fixed":
                check(without_distance(case), operators)
                check(case._replace(grad=None, grad_second=None, seeds=None), operators)
                check(case._replace(grad=None, seeds=None), operators, with_sums=False)
            if case.grad_second is not None:
                check(without_distance(case)._replace(grad=None, seeds=None), operators)


@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", LEARNED)
def test_learned_variances(variance, dtype, rounding, operators):
    form = Structure(clip=True, ax=True, variance=variance)
    for name in layouts(torch.zeros(SHAPE)):
        for source in ({"seeds": contract.seeds(5, 3)}, {"noise": randn(SHAPE, dtype, 6)}):
            case = case_of(form, dtype, rounding=rounding, **source)
            case = case._replace(model_output=layouts(case.model_output)[name], grad=layouts(case.grad)[name])
            found = sums_of(check(case, operators))
            assert found["s"].ne(0).all()
            assert found["max_log"].ne(0).all() == found["min_log"].ne(0).all() == (variance == "learned_range")
    check(case._replace(grad=None, noise=None), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["none", "fixed", "learned_range"])
def test_layouts(variance, dtype, operators):
    case = case_of(Structure(clip=True, ax=True, variance=variance), dtype, shape=(3, 4, 17, 13))
    plain = check(case, operators)
    for name, other in itertools.product(layouts(case.x), layouts(case.x)):
        changed = {
            "x": layouts(case.x)[name],
            "model_output": layouts(case.model_output)[other],
            "grad": layouts(case.grad)[other],
            "grad_second": layouts(case.grad_second)[name],
        }
        if case.x_prev is not None:
            changed["x_prev"] = layouts(case.x_prev)[name]
        for mine, theirs in zip(check(case._replace(**changed), operators), plain, strict=True):
            assert mine is None or torch.equal(mine, theirs)
    ones = torch.ones((), dtype=dtype).expand(case.x.shape)
    for mine, theirs in zip(
        check(case._replace(grad=ones), operators), check(case._replace(grad=ones.clone()), operators), strict=True
    ):
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_each_square(dtype, with_sums, operators):
    """In place of that of their sum, in any layout; and the sum's is that of each."""
    case = case_of(FORM, dtype, shape=(3, 4, 17, 13))
    each = case.grad_distance.reshape(3, 1, 1, 1).expand(case.x.shape)
    for source in (case, case._replace(grad=None, grad_second=None, seeds=None)):
        together = check(source, operators, with_sums)
        for mine, theirs in zip(
            check(source._replace(grad_distance=each), operators, with_sums), together, strict=True
        ):
            assert mine is None or torch.equal(mine, theirs)
        for layout, grads in layouts(randn(case.x.shape, case.compute, 9)).items():
            x, m, x_prev = (layouts(u)[layout] for u in (case.x, case.model_output, case.x_prev))
            moved = source._replace(x=x, model_output=m, x_prev=x_prev, grad_distance=grads)
            check(moved, operators, with_sums)


@pytest.mark.parametrize("m_dtype", HALF, ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_log"])
def test_float32_state_with_half_model_output(m_dtype, variance, operators):
    for rounding in ("once", "host"):
        check(case_of(Structure(clip=True, ax=True, variance=variance), m_dtype=m_dtype, rounding=rounding), operators)


@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guidance(dtype, variance, operators):
    for clip, rounding in itertools.product((True, False), ("once", "host")):
        form = Structure(clip=clip, eps="output", ae=True, variance=variance)
        for scale in (torch.tensor(1.5), torch.tensor([0.0, 1.0, 7.5])):
            uncond = arguments(form, dtype=dtype, seed=9)["model_output"]
            case = case_of(form, dtype, uncond_output=uncond, guidance_scale=scale, rounding=rounding)
            found = sums_of(check(case, operators))
            assert found["scale"].ne(0).all()
            check(case._replace(uncond_output=uncond[:, : SHAPE[1]]), operators)
            if variance == "fixed":
                check(case._replace(grad=None, grad_second=None, seeds=None), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_one_timestep_per_sample(variance, dtype, operators):
    case = case_of(Structure(clip=True, ax=True, variance=variance), dtype)
    together = check(case._replace(t=torch.tensor([30, 0, 20])), operators)
    for b, row in enumerate((3, 0, 2)):
        for mine, theirs in zip(check(case.sample(b)._replace(row=row), operators), together, strict=True):
            assert mine is None or torch.equal(mine, theirs[b : b + 1])
    for bad in (-1, 5, 31, 2**62):
        for mine in check(case._replace(t=torch.tensor([10, bad, 20])), operators):
            assert mine is None or (mine[1].eq(0).all() and mine[0].ne(0).any() and torch.isfinite(mine).all())
    check(case._replace(t=torch.tensor([20])), operators)
    check(case._replace(t=torch.tensor(7)), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("second", ["noise", "v"])
def test_targets(second, dtype, operators):
    table = add_noise_table(SCHEDULE)
    for rounding, t, source in itertools.product(
        ("once", "host"), (None, torch.tensor([0, 999, 400])), ("seeds", "noise")
    ):
        noise = {"seeds": contract.seeds(1, 3)} if source == "seeds" else {"noise": randn(SHAPE, dtype, 5)}
        grads = {"grad": randn(SHAPE, dtype, 1), "grad_second": randn(SHAPE, dtype, 2)}
        x = randn(SHAPE, dtype)
        case = Case(table, x, None, **grads, **noise, second=second, rounding=rounding, t=t, row=400)
        assert sums_of(check(case, operators))["s"].ne(0).all()
        check(case._replace(grad=None), operators)
        check(case._replace(grad_second=None), operators)


@pytest.mark.parametrize("size, variance", [*((size, "fixed") for size in SIZES), (1537, "learned_range")])
def test_sizes(size, variance, operators):
    batch = 2 if size > 1e5 else 3
    case = case_of(Structure(clip=True, ax=True, variance=variance), shape=(batch, size, 1))
    together = check(case, operators)
    for b in range(batch):
        for mine, theirs in zip(by_kernel(case.sample(b), operators), together, strict=True):
            assert mine is None or torch.equal(mine, theirs[b : b + 1])


@pytest.mark.parametrize("shape", [(1, 1), (5, 2, 1, 3), (2, 3, 2, 3, 2, 2), (700, 3), (2, 8, 9, 10, 11)])
def test_shapes(shape, operators):
    check(case_of(FORM, shape=shape), operators)
    if len(shape) > 2:
        case = case_of(FORM, shape=shape)
        turned = [u.transpose(1, -1).contiguous().transpose(1, -1) for u in (case.x, case.model_output)]
        check(case._replace(x=turned[0], model_output=turned[1]), operators)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape, operators):
    for variance in ("none", "fixed", "learned_range"):
        case = case_of(Structure(clip=True, ax=True, variance=variance), shape=shape)
        assert torch.equal(by_kernel(case, operators)[4], torch.zeros(shape[0], SUMS))


def test_nan_and_inf(operators):
    # sums of one element each: the others would all be NaN
    x, m, g = special_values()
    for index, structure in enumerate(structures()[::7]):
        table = random_table(with_variance(structure, "fixed"), seed=index)
        case = Case(table, x, m, g, noise=m)
        found = check(case, operators)[4]
        assert found.isnan().any() and found.isfinite().any()
        check(case._replace(x_prev=g, grad_distance=torch.ones(len(g))), operators)


# The distance


def distance_of(case: Case, operators: Any, **options) -> tuple[Tensor, Tensor, Tensor]:
    """By the operator: x', the squares and the distance, into memory that holds something else."""
    out, squares = options.get("out"), options.get("squares")
    if case.x_prev is None and out is None:
        out = torch.full_like(case.x, 77)
    if squares is None:
        squares = torch.full_like(case.x, 77, dtype=case.compute)
    found = []
    for which in (("squares",), ("distance",), ("squares", "distance")):
        result = torch.full_like(case.x, 77) if out is not None and which[-1:] != which else out
        distance = torch.full((case.x.shape[0],), 77, dtype=case.compute)
        if "squares" in which:
            squares.fill_(77)
        operators.step_distance(
            result,
            squares if "squares" in which else None,
            distance if "distance" in which else None,
            case.x_prev,
            case.x,
            case.model_output,
            case.uncond_output,
            case.scale,
            case.noise,
            case.seeds,
            case.rows,
            case.t,
            None if case.t is None else case.table.row_map("cpu"),
            case.row,
            case.flags,
            case.min_std,
        )
        found.append((result, squares.clone(), distance))
    if out is not None:
        assert_equal(found[0][0], found[2][0])
        assert_equal(found[1][0], found[2][0])
    assert_equal(found[0][1], found[2][1])
    assert_equal(found[1][2], found[2][2])
    return case.x_prev if out is None else out, found[2][1], found[2][2]


def check_distance(case: Case, operators: Any, **options) -> tuple[Tensor, Tensor, Tensor]:
    """x', the squares and the distance by the kernel, asserted to be those of the reference."""
    x_prev, squares, distance = unchanged(case, lambda: distance_of(case, operators, **options))
    chosen, _ = case.chosen()
    common = {"guidance_scale": case.guidance_scale, "rounding": case.rounding, "scalars": case.scalars}
    common["uncond_output"] = case.uncond_output
    m = case.x if case.model_output is None else case.model_output
    if case.x_prev is None:
        expected, _ = reference.step(chosen, case.table.structure, case.x, m, z=case.z(), **common)
        assert_equal(x_prev, case.where(expected, math.nan))
    q = reference.distance(chosen, case.table.structure, x_prev, case.x, m, min_std=case.min_std, **common)
    q = case.where(q, math.nan)
    assert_equal(squares, q)
    assert_equal(distance, reference.tree_sum(q.reshape(q.shape[0], q[:1].numel())))
    return x_prev, squares, distance


def step_case(
    structure: Structure, dtype=torch.float32, seed: int = 0, *, shape=SHAPE, m_dtype=None, **options
) -> Case:
    given = arguments(structure, shape, dtype, m_dtype, seed)
    if "noise" not in options and "x_prev" not in options:
        options = {"seeds": contract.seeds(seed, shape[0])} | options
    return Case(random_table(structure, seed=seed), given["x"], given["model_output"], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_distance_of_every_structure(dtype, operators):
    for index, structure in enumerate(structures_for(dtype)):
        for rounding, scalars in itertools.product(("once", "host") if dtype in HALF else ("once",), (False, True)):
            form = with_variance(structure, "fixed")
            case = step_case(form, dtype, index, rounding=rounding, scalars=scalars)
            x_prev, _, distance = check_distance(case, operators)
            assert distance.isfinite().all() and distance.gt(0).all()
            # the step and the recorded x' have the same bits
            again = check_distance(case._replace(seeds=None, x_prev=x_prev), operators)
            assert torch.equal(again[2], distance)
            check_distance(case._replace(seeds=None, noise=randn(SHAPE, dtype, 3)), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_distance_in_every_layout(dtype, operators):
    shape = (3, 4, 17, 13)
    for source in ({"x_prev": randn(shape, dtype, 7)}, {"noise": randn(shape, dtype, 7)}, {}):
        case = step_case(FORM, dtype, shape=shape, **source)
        plain = check_distance(case, operators)
        for name, other in itertools.product(layouts(case.x), layouts(case.x)):
            moved = case._replace(x=layouts(case.x)[name], model_output=layouts(case.model_output)[other])
            if "x_prev" in source:
                moved = moved._replace(x_prev=layouts(case.x_prev)[other])
            squares = layouts(torch.zeros(shape, dtype=case.compute))[name]
            out = None if "x_prev" in source else layouts(torch.zeros(shape, dtype=dtype))[other]
            for mine, theirs in zip(check_distance(moved, operators, squares=squares, out=out), plain, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("m_dtype", HALF, ids=str)
def test_the_distance_of_mixed_dtypes(m_dtype, operators):
    for rounding, noise_dtype in itertools.product(("once", "host"), (torch.float32, m_dtype)):
        check_distance(step_case(FORM, m_dtype=m_dtype, rounding=rounding), operators)
        noise = randn(SHAPE, noise_dtype, 3)
        check_distance(step_case(FORM, m_dtype=m_dtype, rounding=rounding, noise=noise), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_distance_with_guidance(dtype, operators):
    for scale, rounding in itertools.product((torch.tensor(1.5), torch.tensor([0.0, 1.0, 7.5])), ("once", "host")):
        uncond = randn(SHAPE, dtype, 9)
        case = step_case(FORM, dtype, uncond_output=uncond, guidance_scale=scale, rounding=rounding)
        assert not torch.equal(
            check_distance(case, operators)[0],
            check_distance(case._replace(uncond_output=None, guidance_scale=None), operators)[0],
        )
        check_distance(case._replace(seeds=None, x_prev=randn(SHAPE, dtype, 3)), operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_distance_with_one_timestep_per_sample(dtype, operators):
    for case in (step_case(FORM, dtype), step_case(FORM, dtype, x_prev=randn(SHAPE, dtype, 3))):
        together = check_distance(case._replace(t=torch.tensor([30, 0, 20])), operators)
        for b, row in enumerate((3, 0, 2)):
            for mine, theirs in zip(check_distance(case.sample(b)._replace(row=row), operators), together, strict=True):
                assert torch.equal(mine, theirs[b : b + 1])
        for bad in (-1, 5, 31, 2**62):
            found = check_distance(case._replace(t=torch.tensor([10, bad, 20])), operators)
            assert found[2].isnan().tolist() == [False, True, False] and found[1][1].isnan().all()
            assert case.x_prev is not None or found[0][1].isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_distance(size, operators):
    batch = 2 if size > 1e5 else 3
    case = step_case(FORM, shape=(batch, size))
    together = check_distance(case, operators)
    for b in range(batch):
        for mine, theirs in zip(distance_of(case.sample(b), operators), together, strict=True):
            assert torch.equal(mine, theirs[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1), (700, 3), (2, 8, 9, 10, 11)])
def test_shapes_of_the_distance(shape, operators):
    check_distance(step_case(FORM, shape=shape), operators)
    check_distance(step_case(FORM, shape=shape, x_prev=randn(shape)), operators)
    check_distance(step_case(FORM, shape=shape, t=torch.full(shape[:1], 5)), operators)


def test_more_samples_than_a_grid_has_rows(operators):
    """A block then takes one after another, and none of its warps may overtake those that still add up."""
    shape = (65600, 129)
    case = step_case(FORM, shape=shape, x_prev=randn(shape, seed=3))
    found = torch.zeros(shape[0])
    inputs = (case.x_prev, case.x, case.model_output, None, None, None, None)
    operators.step_distance(None, None, found, *inputs, case.rows, None, None, case.row, case.flags, 0.0)
    squares = reference.distance(case.rows[case.row], FORM, case.x_prev, case.x, case.model_output)
    assert torch.equal(found, reference.tree_sum(squares))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_standard_deviation_and_the_smallest(dtype, operators):
    """Where s is 0 there is no density: NaN, unless the standard deviation is told to be larger."""
    for rounding in ("once", "host") if dtype in HALF else ("once",):
        case = step_case(FORM, dtype, rounding=rounding, x_prev=randn(SHAPE, dtype, 3))
        backward = case_of(FORM, dtype, rounding=rounding)
        for s in (0.0, 0.1, 1e-30):
            rows = case.table.rows.clone()
            rows[:, COLUMN["s"]] = s
            table = Table(rows, FORM, case.table.timesteps)
            for min_std in (0.0, 0.05, 0.1, 0.3):
                found = check_distance(case._replace(table=table, min_std=min_std), operators)
                loaded = torch.tensor(s).to(dtype if rounding == "host" else torch.float32)
                assert found[2].isnan().all() == (loaded == 0 and min_std == 0)
                check_distance(case._replace(table=table, min_std=min_std, x_prev=None, noise=case.x), operators)
                check(backward._replace(table=table, min_std=min_std), operators)
                alone = backward._replace(table=table, min_std=min_std, grad=None, grad_second=None, seeds=None)
                gradients = sums_of(check(alone, operators))
                floored = bool(loaded < torch.tensor(min_std).to(case.compute))
                assert gradients["s"].eq(0).all() == floored


def test_the_distance_of_nan_and_inf(operators):
    x, m, x_prev = special_values()
    for index, structure in enumerate(structures()[::3]):
        case = Case(random_table(with_variance(structure, "fixed"), seed=index), x, m)
        assert check_distance(case._replace(x_prev=x_prev), operators)[2].isnan().any()
        check_distance(case._replace(noise=x_prev), operators)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, layout, operators):
    for name in ("x", "model_output", "noise"):
        case = step_case(FORM, dtype, shape=(3, 4, 17, 13), noise=randn((3, 4, 17, 13), dtype, 3))
        x_prev, squares, distance = check_distance(case, operators)
        case = case._replace(**{name: layouts(getattr(case, name))[layout]})
        ours, total = torch.zeros_like(squares), torch.zeros_like(distance)
        inputs = (case.x, case.model_output, None, None, case.noise, None)
        operators.step_distance(
            getattr(case, name), ours, total, None, *inputs, case.rows, None, None, case.row, case.flags, 0.0
        )
        for mine, theirs in ((getattr(case, name), x_prev), (ours, squares), (total, distance)):
            assert_equal(mine, theirs)


# Machines


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets_give_the_same_bits(isa):
    active = torch.ops.fastdiff.cpu_isa(-1)
    try:
        try:
            torch.ops.fastdiff.cpu_isa(isa)
        except RuntimeError:
            pytest.skip("not built, or not supported by this machine")
        for index, structure in enumerate(structures()[isa::3]):
            variance = ("fixed", *LEARNED)[index % 4]
            for dtype in DTYPES:
                form, rounding = with_variance(structure, variance), ("once", "host")[index % 2]
                check(case_of(form, dtype, index, shape=(2, 3, 15, 13), rounding=rounding), torch.ops.fastdiff)
                form = with_variance(structure, "fixed")
                case = step_case(form, dtype, index, shape=(2, 3, 15, 13), rounding=rounding)
                check_distance(case, torch.ops.fastdiff)
    finally:
        torch.ops.fastdiff.cpu_isa(active)


def test_threads_do_not_change_the_sums():
    threads = torch.get_num_threads()
    shape = (3, 3, 130, 129)
    backward, step = case_of(FORM, shape=shape), step_case(FORM, shape=shape)
    turned = step._replace(x=step.x.contiguous(memory_format=torch.channels_last))
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([by_kernel(backward, torch.ops.fastdiff)[4], *distance_of(step, torch.ops.fastdiff)])
            found[-1] += distance_of(turned, torch.ops.fastdiff)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[0][3], found[0][6])


# What the operators refuse


def refused(operators: Any, name: str, good: dict[str, Any], bad: dict[str, dict[str, Any]]) -> None:
    """Each change of good arguments is an error of these words, before anything is written."""
    operator = getattr(operators, name)
    operator(*good.values())
    for message, changed in bad.items():
        given = good | changed
        before = [u.clone() if isinstance(u, Tensor) else u for u in given.values()]
        with pytest.raises(RuntimeError, match=message):
            operator(*given.values())
        for tensor, copy in zip(given.values(), before, strict=True):
            assert tensor is copy or not isinstance(tensor, Tensor) or torch.equal(tensor, copy), message


def test_the_backward_guards_its_memory(operators):
    shape, batch = (2, 3, 600), 2
    case = case_of(FORM, shape=shape)
    names = ("grad_x", "grad_model_output", "grad_uncond_output", "grad_noise", "grad", "grad_second", "x")
    names += ("model_output", "uncond_output", "guidance_scale", "noise", "seeds", "table", "t", "t_to_row")
    good = dict.fromkeys(names) | {
        "grad_x": torch.zeros(shape),
        "grad_model_output": torch.zeros(shape),
        "grad": case.grad,
        "x": case.x,
        "model_output": case.model_output,
        "seeds": case.seeds,
        "table": case.rows,
        "row": 2,
        "flags": case.flags,
        "sums": torch.zeros(batch, SUMS),
        "x_prev": case.x_prev,
        "grad_distance": case.grad_distance,
        "min_std": 0.0,
    }
    memory = torch.zeros(shape)
    within = memory.view(-1)[: batch * SUMS].view(batch, SUMS)
    numbers = torch.zeros(64, dtype=torch.int64)
    overlapping = numbers.view(torch.float32)[: batch * SUMS].view(batch, SUMS)
    learned = case.flags & ~(7 << 9) | 2 << 9
    refused(
        operators,
        "step_backward",
        good,
        {
            "grad: expected it, or grad_second or grad_distance": dict.fromkeys(("grad", "x_prev", "grad_distance")),
            "x_prev and grad_distance: expected both": {"x_prev": None},
            "grad_distance: expected both": {"grad_distance": None},
            "x_prev: expected size 3": {"x_prev": torch.zeros(2, 4, 600)},
            "x_prev: expected x's dtype": {"x_prev": case.x.double()},
            "grad_distance: expected shape .2.": {"grad_distance": torch.zeros(3)},
            "grad_distance: expected size 600": {"grad_distance": torch.zeros(2, 3, 601)},
            "grad_distance: expected the table's dtype": {"grad_distance": case.grad_distance.double()},
            "grad_distance: expected none, but of a mean": {"flags": learned},
            "min_std: expected a number": {"min_std": -1.0},
            "min_std: expected a number.*": {"min_std": math.nan},
            "x: expected a tensor": {"x": None},
            "x: expected size 600": {"x": torch.zeros(2, 3, 601)},
            "model_output: expected a tensor": {"model_output": None},
            "uncond_output and guidance_scale": {"uncond_output": case.x},
            "guidance_scale: expected both": {"guidance_scale": torch.ones(1)},
            "either noise or seeds": {"seeds": None},
            "sums: expected a contiguous": {"sums": torch.zeros(batch, SUMS - 1)},
            "sums: expected a contiguous.*": {"sums": torch.zeros(batch + 1, SUMS)},
            "sums: expected .* of the table's dtype": {"sums": torch.zeros(batch, SUMS).double()},
            "sums: expected a contiguous tensor": {"sums": torch.zeros(batch, 2 * SUMS)[:, ::2]},
            "sums: expected memory of its own": {"sums": within, "x": memory},
            "sums: expected memory": {"sums": within, "grad_x": memory},
            "sums: expected memory of": {"sums": overlapping, "seeds": numbers[8:10]},
            "sums: expected memory of its": {"sums": within, "grad_distance": memory.view(-1)[:batch]},
            "grad_distance: expected memory apart": {"grad_x": memory, "grad_distance": memory.view(-1)[5:7]},
            "grad_x: expected memory of its own": {"grad_x": case.x_prev},
        },
    )


def test_the_distance_guards_its_memory(operators):
    shape, batch = (2, 3, 600), 2
    case = step_case(FORM, shape=shape)
    memory, numbers = torch.zeros(shape), torch.zeros(2000, dtype=torch.int64)
    good = {
        "out": torch.zeros(shape),
        "squares": torch.zeros(shape),
        "distance": torch.zeros(batch),
        "x_prev": None,
        "x": case.x,
        "model_output": case.model_output,
        "uncond_output": None,
        "guidance_scale": None,
        "noise": None,
        "seeds": case.seeds,
        "table": case.rows,
        "t": None,
        "t_to_row": None,
        "row": 2,
        "flags": case.flags,
        "min_std": 0.0,
    }
    refused(
        operators,
        "step_distance",
        good,
        {
            "expected either out or x_prev": {"out": None},
            "either out or x_prev": {"x_prev": memory},
            "x_prev: expected neither noise nor seeds": {"out": None, "x_prev": memory},
            "x_prev: expected neither": {"out": None, "x_prev": memory, "seeds": None, "noise": memory},
            "x_prev: expected x's dtype": {"out": None, "x_prev": memory.double(), "seeds": None},
            "x_prev: expected size 3": {"out": None, "x_prev": torch.zeros(2, 4, 600), "seeds": None},
            "either noise or seeds": {"seeds": None},
            "expected either noise or": {"noise": memory},
            "squares: expected it, or distance": {"squares": None, "distance": None},
            "squares: expected the table's dtype": {"squares": memory.double()},
            "squares: expected size 600": {"squares": torch.zeros(2, 3, 601)},
            "squares: expected distinct elements": {"squares": torch.zeros(2, 3, 1).expand(shape)},
            "squares: expected memory of its own": {"squares": memory, "x": memory},
            "expected memory of its own": {"squares": memory, "out": memory},
            "distance: expected a contiguous": {"distance": torch.zeros(batch, 1)},
            "distance: expected a contiguous.*": {"distance": torch.zeros(3)},
            "distance: expected a contiguous tensor": {"distance": torch.zeros(batch).double()},
            "distance: expected .* contiguous|contiguous": {"distance": torch.zeros(2 * batch)[::2]},
            "distance: expected memory of its own": {"distance": memory.view(-1)[7:9], "x": memory},
            "distance: expected memory of": {"distance": numbers.view(torch.float32)[4:6], "seeds": numbers[2:4]},
            "seeds: expected memory apart": {
                "seeds": numbers[9:11],
                "squares": numbers.view(torch.float32)[:3600].view(shape),
            },
            "flags: expected a mean, and a variance": {"flags": case.flags & ~(7 << 9), "seeds": None},
            "flags: expected a mean": {"flags": case.flags & ~(7 << 6)},
            "variance without learning": {"flags": case.flags & ~(7 << 9) | 2 << 9},
            "min_std: expected": {"min_std": -0.5},
            "model_output: expected a tensor": {"model_output": None},
            "row: expected": {"row": 99},
        },
    )
