"""The gradients of the fused operations: the kernel against the closed form in plain PyTorch, in every bit; the closed
form against autograd through the step; and what autograd may ask of a function."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

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
from fastdiff import native, ops, reference
from fastdiff.tables import COLUMN, Structure, Table, add_noise_table, ddim_table, ddpm_table

pytestmark = pytest.mark.usefixtures("kernels")
LEARNED = ("learned_log", "learned_range", "learned_plain")
HALF = (torch.float16, torch.bfloat16)
HOST_ROUNDING, STRAIGHT_THROUGH = 1 << 12, 1 << 17
SECOND = {"x0": 0, "noise": 1 << 13, "v": 2 << 13}


class Case(NamedTuple):
    """The arguments of a backward, as of the step and of autograd."""

    table: Table
    x: Tensor
    model_output: Tensor
    grad: Tensor | None
    grad_second: Tensor | None = None
    uncond_output: Tensor | None = None
    guidance_scale: Tensor | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    noise_dtype: torch.dtype | None = None  # of the gradient of the noise; None: not wanted
    t: Tensor | None = None
    row: int = 2
    rounding: str = "once"
    second: str = "x0"
    clip_grad: str = "exact"


def expected(case: Case) -> list[Tensor | None]:
    """By the reference: the gradients of x, model_output, uncond_output and noise in the dtypes of these."""
    table, x = case.table, case.x
    rows, valid = table.to("cpu", x.dtype), None
    chosen = rows[case.row]
    if case.t is not None:
        index = torch.tensor([table.rows_of_t.get(int(t), -1) for t in case.t.expand(x.shape[0])])
        chosen, valid = rows[index.clamp(min=0)], (index >= 0).reshape(-1, *(1,) * (x.dim() - 1))
    z = case.noise
    if case.seeds is not None:
        words = chosen[..., COLUMN["t"] :].to(torch.int64).expand(x.shape[0], 2)
        domain = contract.DOMAINS[table.structure.domain]
        z = contract.normal_reference(tuple(x.shape), case.seeds, words, domain)
    found = reference.step_backward(
        chosen,
        table.structure,
        case.grad,
        case.grad_second,
        x,
        case.model_output,
        uncond_output=case.uncond_output,
        guidance_scale=case.guidance_scale,
        z=z,
        rounding=case.rounding,
        second=case.second,
        clip_grad=case.clip_grad,
    )
    wide = [u if u is None or valid is None else torch.where(valid, u, 0.0) for u in found[:4]]
    dtypes = (x.dtype, case.model_output.dtype, case.model_output.dtype, case.noise_dtype)
    return [None if u is None or dtype is None else u.to(dtype) for u, dtype in zip(wide, dtypes, strict=True)]


def by_kernel(case: Case) -> list[Tensor | None]:
    """By the operator, into memory that holds something else, with no input that it does not need."""
    table, structure = case.table, case.table.structure
    like = case.grad if case.grad is not None else case.grad_second
    masked = reference.masks_clip(
        structure, case.grad is not None, case.grad_second is not None, case.second, case.clip_grad
    )
    noisy = structure.learned and case.grad is not None
    outputs = [torch.full_like(case.x, math.nan), torch.full_like(case.model_output, math.nan), None, None]
    if case.uncond_output is not None:
        outputs[2] = torch.full_like(case.x, math.nan, dtype=case.model_output.dtype)
    if case.noise_dtype is not None:
        outputs[3] = torch.full_like(case.x, math.nan, dtype=case.noise_dtype)
    scale = case.guidance_scale
    flags = structure.flags | SECOND[case.second]
    flags |= HOST_ROUNDING * (case.rounding == "host") | STRAIGHT_THROUGH * (case.clip_grad == "straight_through")
    torch.ops.fastdiff.step_backward(
        *outputs,
        case.grad,
        case.grad_second,
        case.x if masked else None,
        case.model_output if masked or noisy else None,
        case.uncond_output if masked else None,
        None if scale is None else scale.to(table.to("cpu", like.dtype).dtype).reshape(-1),
        case.noise if noisy else None,
        case.seeds if noisy else None,
        table.to("cpu", like.dtype),
        case.t,
        None if case.t is None else table.row_map("cpu"),
        case.row,
        flags,
    )
    return outputs


def check(case: Case) -> list[Tensor | None]:
    """The gradients by the kernel, asserted to be those of the reference in every bit but the sign of zeros."""
    inputs = [u for u in case if isinstance(u, Tensor)]
    before = [u.clone() for u in inputs]
    ours = by_kernel(case)
    for mine, theirs in zip(ours, expected(case), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_equal(mine, theirs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(copy)), "an input was changed"
    return ours


def randn(shape, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case_of(structure: Structure, dtype=torch.float32, seed: int = 0, *, shape=SHAPE, m_dtype=None, **options) -> Case:
    """A backward of everything that this step may have: both gradients and the seeds of its noise."""
    given = arguments(structure, shape, dtype, m_dtype, seed)
    if structure.variance != "none":
        options = {"noise_dtype": dtype} | options
        if structure.learned and options.get("noise") is None:
            options = {"seeds": contract.seeds(seed, shape[0])} | options
    has_x0 = structure.x0 != "none"
    second = {"grad_second": randn(shape, dtype, seed + 2)} if has_x0 else {}
    fields = {"grad": randn(shape, dtype, seed + 1)} | second | options
    return Case(random_table(structure, seed=seed), given["x"], given["model_output"], **fields)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_structure_equals_the_reference(dtype):
    for index, structure in enumerate(structures()):
        for variance, rounding in itertools.product(
            ("none", "fixed"), ("once", "host") if dtype in HALF else ("once",)
        ):
            case = case_of(with_variance(structure, variance), dtype, index, rounding=rounding)
            both = check(case)
            only = check(case._replace(grad_second=None))
            check(case._replace(clip_grad="straight_through"))
            if case.grad_second is not None:
                second = check(case._replace(grad=None))
                if structure.a0 or structure.eps == "rederived":
                    assert not torch.equal(both[1], only[1])
                assert not torch.equal(both[1], second[1]) or not (structure.a0 or structure.ae)


@needs_native
@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", LEARNED)
def test_learned_variance_equals_the_reference(variance, dtype, rounding):
    form = Structure(clip=True, ax=True, variance=variance)
    for name, noise_dtype in itertools.product(layouts(torch.zeros(SHAPE)), (dtype, torch.float32)):
        for source in ({"seeds": contract.seeds(5, 3)}, {"noise": randn(SHAPE, noise_dtype, 6)}):
            case = case_of(form, dtype, rounding=rounding, noise_dtype=noise_dtype, **source)
            case = case._replace(model_output=layouts(case.model_output)[name], grad=layouts(case.grad)[name])
            found = check(case)
            assert found[1][:, SHAPE[1] :].abs().sum() > 0 and found[3].abs().sum() > 0
    check(case._replace(grad=None))  # the variance half then has no gradient
    check(case_of(Structure(ax=True, variance=variance), dtype, rounding=rounding))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["none", "fixed", "learned_range"])
def test_layouts(variance, dtype):
    case = case_of(Structure(clip=True, ax=True, variance=variance), dtype)
    plain = check(case)
    for name, other in itertools.product(layouts(case.x), layouts(case.x)):
        moved = case._replace(
            x=layouts(case.x)[name],
            model_output=layouts(case.model_output)[other],
            grad=layouts(case.grad)[other],
            grad_second=layouts(case.grad_second)[name],
        )
        for mine, theirs in zip(check(moved), plain, strict=True):
            assert mine is None or torch.equal(mine, theirs)
    expanded = case._replace(grad=torch.ones((), dtype=dtype).expand(SHAPE))
    for mine, theirs in zip(check(expanded), check(case._replace(grad=torch.ones_like(case.x))), strict=True):
        assert mine is None or torch.equal(mine, theirs)


@needs_native
@pytest.mark.parametrize("m_dtype", HALF, ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_log"])
def test_float32_state_with_half_model_output(m_dtype, variance):
    form = Structure(clip=True, ax=True, variance=variance)
    for rounding in ("once", "host"):
        found = check(case_of(form, m_dtype=m_dtype, rounding=rounding, noise_dtype=m_dtype))
        assert [u.dtype for u in found if u is not None] == [torch.float32, m_dtype, m_dtype]


@needs_native
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guidance(dtype, variance):
    for clip, rounding in itertools.product((True, False), ("once", "host")):
        form = Structure(clip=clip, eps="output", ae=True, variance=variance)
        for scale in (torch.tensor(1.5), torch.tensor([0.0, 1.0, 7.5])):
            uncond = arguments(form, dtype=dtype, seed=9)["model_output"]
            case = case_of(form, dtype, uncond_output=uncond, guidance_scale=scale, rounding=rounding)
            found = check(case)
            check(case._replace(uncond_output=uncond[:, : SHAPE[1]]))
            if scale.dim():
                assert found[2][1].abs().sum() < 1e-3 * found[2][2].abs().sum()  # w = 1: only the conditional one
                assert found[1][0, : SHAPE[1]].abs().sum() == 0


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_one_timestep_per_sample(variance, dtype):
    case = case_of(Structure(clip=True, ax=True, variance=variance), dtype)
    together = check(case._replace(t=torch.tensor([30, 0, 20])))
    for b, row in enumerate((3, 0, 2)):
        one = [u[b : b + 1] if isinstance(u, Tensor) else u for u in case]
        for mine, theirs in zip(check(Case(*one)._replace(row=row)), together, strict=True):
            assert mine is None or torch.equal(mine, theirs[b : b + 1])
    for bad in (-1, 5, 31, 2**62):
        for mine in check(case._replace(t=torch.tensor([10, bad, 20]))):
            if mine is not None:
                assert mine[1].eq(0).all() and mine[0].ne(0).any() and torch.isfinite(mine).all()
    check(case._replace(t=torch.tensor([20])))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("second", ["noise", "v"])
def test_add_noise_targets(second, dtype):
    table = add_noise_table(SCHEDULE)
    x = randn(SHAPE, dtype)
    for rounding, t in itertools.product(("once", "host"), (None, torch.tensor([0, 999, 400]))):
        case = Case(
            table,
            x,
            x,
            randn(SHAPE, dtype, 1),
            randn(SHAPE, dtype, 2),
            noise_dtype=dtype,
            second=second,
            rounding=rounding,
            t=t,
            row=400,
        )
        check(case)
        check(case._replace(grad=None))
        check(case._replace(grad_second=None))


@needs_native
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 63), (2, 64), (2, 65), (3, 513), (2, 4099), (5, 2, 1, 3), (2, 3, 2, 3, 2, 2), (700, 3)]
)
def test_shapes(shape, variance):
    check(case_of(Structure(clip=True, ax=True, variance=variance), shape=shape))


@needs_native
@pytest.mark.parametrize("channels", [3, 4, 33])
@pytest.mark.parametrize("side", [1, 7, 33])
def test_channels_last(channels, side):
    case = case_of(Structure(clip=True, ax=True, variance="learned_log"), shape=(2, channels, side, side + 1))
    turned = [
        u.contiguous(memory_format=torch.channels_last) if u is not None and u.dim() == 4 else u for u in case[1:5]
    ]
    for mine, theirs in zip(check(Case(case.table, *turned, *case[5:])), check(case), strict=True):
        assert mine is None or torch.equal(mine, theirs)


@needs_native
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape):
    for variance in ("none", "fixed", "learned_range"):
        check(case_of(Structure(clip=True, ax=True, variance=variance), shape=shape))


@needs_native
def test_nan_and_inf():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-40])
    x, m, g = (u.reshape(1, 2, 256) for u in torch.cartesian_prod(special, special, special).T)
    for index, structure in enumerate(structures()):
        table = random_table(structure, seed=index)
        case = Case(table, x, m, g)
        check(case)
        check(case._replace(clip_grad="straight_through"))
    # where the clip cut there is no gradient, whatever it was; NaN was not cut
    table = random_table(Structure(x0="output", clip=True))
    cut = check(Case(table, x, m, g))[1][(m < -0.75) | (m > 0.5)]
    assert len(cut) > 0 and cut.eq(0).all()
    passed = check(Case(table, x, m, torch.ones_like(g)))[1]
    assert passed[torch.isnan(m)].ne(0).all()


def test_the_clip_passes_gradients_at_its_bounds():
    table = random_table(Structure(x0="output", clip=True))
    m = torch.tensor([[-1.0, -0.75, 0.25, 0.5, 0.75]], requires_grad=True)
    backends = ("auto", "reference", *(("native",) if native.available() else ()))
    a0 = float(table.rows[2, COLUMN["a0"]])
    for backend in backends:
        result, x0 = ops.step_with_x0(table, m, 20, torch.zeros(1, 5), backend=backend)
        for output, factor in ((result, a0), (x0, 1.0)):
            (found,) = torch.autograd.grad(output.sum(), m, retain_graph=True)
            assert torch.equal(found, factor * torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("guided", [False, True])
def test_the_closed_form_is_what_autograd_computes(guided):
    """reference.step_backward against autograd through reference.step, every structure, float64."""
    for index, structure in enumerate(structures()):
        for variance in ("none", "fixed", LEARNED[index % 3]):
            form = with_variance(structure, variance)
            case = case_of(
                form, torch.float64, index, noise=None if variance == "none" else randn(SHAPE, torch.float64)
            )
            uncond = arguments(form, dtype=torch.float64, seed=7)["model_output"] if guided else None
            scale = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64) if guided else None
            row = case.table.rows[2]
            leaves = [u for u in (case.x, case.model_output, uncond, case.noise) if u is not None]
            leaves = [u.clone().requires_grad_() for u in leaves]
            names = [n for n, u in zip("xmuz", (1, 1, uncond, case.noise), strict=True) if u is not None]
            given = dict(zip(names, leaves, strict=True))
            outputs = reference.step(
                row, form, given["x"], given["m"], uncond_output=given.get("u"), guidance_scale=scale, z=given.get("z")
            )
            for grad, second in ((True, True), (True, False), (False, True)):
                if second and outputs[1] is None:
                    continue
                pairs = [(o, g) for o, g, use in zip(outputs, case[3:5], (grad, second), strict=True) if use]
                given_outputs, grads = zip(*pairs, strict=True)
                found = torch.autograd.grad(given_outputs, leaves, grads, allow_unused=True, retain_graph=True)
                closed = reference.step_backward(
                    row,
                    form,
                    case.grad if grad else None,
                    case.grad_second if second else None,
                    case.x,
                    case.model_output,
                    uncond_output=uncond,
                    guidance_scale=scale,
                    z=case.noise,
                )
                for name, theirs in zip(names, found, strict=True):
                    mine = closed["xmuz".index(name)]
                    theirs = torch.zeros_like(given[name]) if theirs is None else theirs
                    if name == "u" and form.learned:
                        assert theirs[:, SHAPE[1] :].eq(0).all()
                        theirs = theirs[:, : SHAPE[1]]
                    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["none", "fixed", *LEARNED])
def test_autograd_by_the_kernel(variance, dtype):
    """Through the public calls: the closed form, and within rounding what autograd makes of the reference."""
    form = Structure(clip=True, eps="output", ae=True, ax=True, variance=variance)
    for noise_given, t in itertools.product((False, True), (20, torch.tensor([10, 5, 30]))):
        if variance == "none" and noise_given:
            continue
        case = case_of(form, dtype, noise=randn(SHAPE, dtype, 3) if noise_given else None)
        uncond = arguments(form, dtype=dtype, seed=7)["model_output"]
        scale = torch.tensor([0.5, 1.5, 4.0])
        found = {}
        for backend in ("auto", "reference"):
            leaves = [u.clone().requires_grad_() for u in (case.x, case.model_output, uncond)]
            options: dict = {"uncond_output": leaves[2], "guidance_scale": scale, "backend": backend}
            if noise_given:
                leaves.append(case.noise.clone().requires_grad_())
                options["noise"] = leaves[-1]
            elif variance != "none":
                options["seeds"] = contract.seeds(0, SHAPE[0])
            outputs = ops.step_with_x0(case.table, leaves[1], t, leaves[0], **options)
            found[backend] = torch.autograd.grad(outputs, leaves, case[3:5])
            with torch.no_grad():
                for with_graph, without in zip(
                    outputs, ops.step_with_x0(case.table, leaves[1], t, leaves[0], **options), strict=True
                ):
                    assert_equal(with_graph, without)
        # step_backward takes the same scale, noise and timesteps
        closed = expected(
            case._replace(
                uncond_output=uncond,
                guidance_scale=scale,
                t=t if isinstance(t, Tensor) else None,
                noise_dtype=dtype if noise_given else None,
                seeds=None if noise_given else case.seeds,
            )
        )
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 2e-2
        for k, (mine, theirs) in enumerate(zip(*found.values(), strict=True)):
            assert mine.dtype == dtype and mine.stride() == torch.empty_like(theirs).stride()
            if isinstance(t, Tensor):  # autograd multiplies the NaN of the sample outside the chain
                assert mine[1].eq(0).all()
                mine, theirs = mine[::2], theirs[::2]
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
            if native.available():
                wanted = closed[k][::2] if isinstance(t, Tensor) else closed[k]
                assert_equal(mine[:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("variance", ["none", "fixed", *LEARNED])
@pytest.mark.parametrize("guided", [False, True])
def test_first_and_second_derivatives(variance, guided):
    form = Structure(clip=True, x0_divide=True, eps="rederived", eps_divide=True, ax=True, ae=True, variance=variance)
    shape = (2, 2, 3)
    case = case_of(form, torch.float64, 5, shape=shape)
    inputs = [case.x, case.model_output]
    inputs += [arguments(form, shape, torch.float64, seed=6)["model_output"]] if guided else []
    for noise_given in (False, True)[: 1 if variance == "none" else 2]:
        leaves = inputs + ([randn(shape, torch.float64, 8)] if noise_given else [])
        leaves = [u.clone().requires_grad_() for u in leaves]

        def step(x, m, *rest, noise_given=noise_given):
            rest = list(rest)
            options = {"uncond_output": rest.pop(0), "guidance_scale": 1.7} if guided else {}
            if noise_given:
                options["noise"] = rest.pop(0)
            elif variance != "none":
                options["seeds"] = 3
            return ops.step_with_x0(case.table, m, 20, x, **options)

        assert torch.autograd.gradcheck(step, leaves)
        assert torch.autograd.gradgradcheck(step, leaves)


def test_derivatives_of_add_noise():
    t = torch.tensor([3, 9])
    x, z = (randn((2, 2, 2), torch.float64, k).requires_grad_() for k in (0, 1))
    for target in ("noise", "v"):
        for function in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert function(lambda x, z, target=target: ops.add_noise(x, t, SCHEDULE, noise=z, target=target), (x, z))
    _, target = ops.add_noise(x, t, SCHEDULE, noise=z.detach(), target="noise")
    assert not target.requires_grad
    x_t, v = ops.add_noise(x, t, SCHEDULE, seeds=1, target="v")
    assert x_t.requires_grad and v.requires_grad


def test_expanded_gradients():
    """That of .sum() has strides 0."""
    table = ddpm_table(SCHEDULE, clip=1.0)
    case = case_of(table.structure)
    found = []
    for loss in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        leaves = [u.clone().requires_grad_() for u in (case.x, case.model_output)]
        found.append(torch.autograd.grad(loss(ops.step(table, leaves[1], 500, leaves[0], seeds=1)), leaves))
    for a, b in zip(*found, strict=True):
        assert_equal(a, b)


@needs_native
def test_gradients_have_the_layout_of_their_tensors():
    table = random_table(Structure(clip=True, ax=True))
    x, m = (leaf.detach() for leaf in leaves_of(table.structure))
    for name, other in itertools.product(layouts(x), layouts(m)):
        leaves = [layouts(x)[name].requires_grad_(), layouts(m)[other].requires_grad_()]
        result = ops.step(table, leaves[1], 20, leaves[0])
        for leaf, gradient in zip(leaves, torch.autograd.grad(result, leaves, torch.ones_like(result)), strict=True):
            assert gradient.stride() == torch.empty_like(leaf).stride()


@needs_native
def test_what_is_kept_for_the_backward():
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    def kept(structure: Structure, t: int | Tensor = 20, **options) -> int:
        given = arguments(structure)
        leaves = [u.requires_grad_() for u in given.values()]
        if structure.variance != "none":
            options = {"seeds": contract.seeds(1, SHAPE[0])} | options
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = ops.step(random_table(structure), leaves[1], t, leaves[0], **options)
        count = len(packed)
        result.sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
        return count

    uncond = {"uncond_output": torch.randn(SHAPE), "guidance_scale": 2.0}
    assert kept(Structure(ax=True)) == 0
    assert kept(Structure(ax=True, variance="fixed")) == 0
    assert kept(Structure(ax=True, variance="fixed"), noise=torch.randn(SHAPE, requires_grad=True), seeds=None) == 0
    assert kept(Structure(ax=True), **uncond) == 1  # the scale
    assert kept(Structure(ax=True), torch.tensor([10, 0, 20])) == 1  # t
    assert kept(Structure(ax=True, ae=True, a0=False, eps="output", clip=True)) == 0  # x0 is for show
    assert kept(Structure(ax=True, clip=True)) == 2
    assert kept(Structure(ax=True, clip=True), **uncond) == 4
    assert kept(Structure(ax=True, variance="learned_range")) == 2  # the model output and the seeds


def leaves_of(structure: Structure, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    given = arguments(structure, dtype=dtype)
    return given["x"].requires_grad_(), given["model_output"].requires_grad_()


def test_a_graph_that_is_kept_can_be_walked_twice():
    table = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    x, m = leaves_of(table.structure)
    loss = ops.step(table, m, 20, x, seeds=1).square().sum()
    first = torch.autograd.grad(loss, (x, m), retain_graph=True)
    second = torch.autograd.grad(loss, (x, m))
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, m))


@pytest.mark.parametrize("which", ["x", "model_output", "noise", "seeds", "t"])
def test_a_changed_input_is_noticed(which):
    table = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    x, m = (leaf * 1.0 for leaf in leaves_of(table.structure))
    changed = {"x": x, "model_output": m, "noise": torch.randn(SHAPE), "seeds": contract.seeds(1, 3)}
    changed["t"] = torch.tensor([0, 10, 20])
    source = {"noise": changed["noise"]} if which == "noise" else {"seeds": changed["seeds"]}
    loss = ops.step(table, m, changed["t"], x, **source).sum()
    with torch.no_grad():
        changed[which].add_(1)
    if native.available() or which in ("x", "model_output", "noise"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inputs_made_in_inference_mode():
    table = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    with torch.inference_mode():
        x, seeds, t = torch.randn(SHAPE), contract.seeds(1, 3), torch.tensor([0, 10, 20])
    found = []
    for copy in (False, True):
        m = leaves_of(table.structure)[1]
        given = [u.clone() if copy else u for u in (x, seeds, t)]
        found.append(torch.autograd.grad(ops.step(table, m, given[2], given[0], seeds=given[1]).sum(), m)[0])
    assert_equal(*found)


def test_gradients_of_one_output_alone():
    table = random_table(Structure(clip=True, ax=True))
    x, m = leaves_of(table.structure)
    result, x0 = ops.step_with_x0(table, m, 20, x)
    apart = [torch.autograd.grad(u.sum(), (x, m), retain_graph=True) for u in (result, x0)]
    together = torch.autograd.grad(result.sum() + x0.sum(), (x, m))
    for a, b, c in zip(*apart, together, strict=True):
        torch.testing.assert_close(a + b, c)
    for only, other in ((x, m.detach()), (m, x.detach())):
        args = (other, only) if only is x else (only, other)
        (found,) = torch.autograd.grad(ops.step(table, args[0], 20, args[1]).sum(), only)
        assert_equal(found, apart[0][0 if only is x else 1])


def test_an_output_without_gradient_adds_nothing():
    """Not even 0 times a coefficient: here x0 is for show, and infinite."""
    form = Structure(a0=False, ax=True, ae=True, eps="output", clip=True)
    rows = random_table(form).rows
    rows[:, COLUMN["px"]] = math.inf
    table = Table(rows, form, [0, 10, 20, 30])
    x, m = leaves_of(form)
    for backend in ("auto", "reference"):
        result, _ = ops.step_with_x0(table, m, 20, x, backend=backend)
        for gradient, name in zip(torch.autograd.grad(result.sum(), (x, m)), ("ax", "ae"), strict=True):
            assert torch.equal(gradient, torch.full(SHAPE, float(rows[2, COLUMN[name]])))


def test_create_graph():
    """A gradient penalty: the gradient of a gradient reaches the network."""
    table = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    for t in (20, torch.tensor([20, 5, 0])):
        found = []
        for backend in ("auto", "reference"):
            x, m = leaves_of(table.structure, torch.float64)
            result = ops.step(table, m, t, x, seeds=1, backend=backend)
            keep = torch.tensor([True, isinstance(t, int), True]).reshape(3, 1, 1, 1)
            loss = torch.where(keep, result, 0.0).square().sum()
            first = torch.autograd.grad(loss, (x, m), create_graph=True)
            found.append(torch.autograd.grad(sum(u.nan_to_num().square().sum() for u in first), (x, m)))
        for mine, theirs in zip(*found, strict=True):
            rows = slice(None) if isinstance(t, int) else slice(None, None, 2)
            torch.testing.assert_close(mine[rows], theirs[rows], rtol=1e-10, atol=1e-10)


def test_gradients_in_batches_and_in_forward_mode_over_the_backward():
    table = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    x, m = leaves_of(table.structure, torch.float64)
    result = ops.step(table, m, 20, x, seeds=1)
    grads = randn((4, *SHAPE), torch.float64, 3)
    batched = torch.autograd.grad(result, (x, m), grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for mine, one in zip(batched, torch.autograd.grad(result, (x, m), grad, retain_graph=True), strict=True):
            torch.testing.assert_close(mine[k], one)
    direction = randn(SHAPE, torch.float64, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(grads[0], direction)
        (found,) = torch.autograd.grad(result, x, dual)
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(ops.step(table, m, 20, x, seeds=1), x, direction)[0])


def test_transforms_and_trained_coefficients():
    table = random_table(Structure(clip=True, ax=True))
    x, m = leaves_of(table.structure)
    uncond, scale = torch.randn(SHAPE), torch.tensor(2.0, requires_grad=True)
    guided = {"uncond_output": uncond, "guidance_scale": scale}
    ops.step(table, m, 20, x, **guided).sum().backward()
    assert scale.grad is not None and scale.grad != 0 and x.grad is not None

    def loss(x):
        return ops.step(table, m.detach(), 20, x).square().sum()

    by_func = torch.func.grad(loss)(x.detach())
    (by_autograd,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(by_func, by_autograd)
    rows = table.rows.requires_grad_()
    trained = Table(rows, table.structure, table.timesteps)
    ops.step(trained, m, 20, x).sum().backward()
    assert rows.grad is not None and rows.grad[2].abs().sum() > 0


def test_training_through_a_compiled_step():
    table = random_table(Structure(clip=True, ax=True))
    x, m = leaves_of(table.structure)
    t = torch.tensor([10, 0, 30])

    def loss(x, m):
        return ops.step(table, m, t, x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(compiled(x, m), (x, m)), torch.autograd.grad(loss(x, m), (x, m)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_chain_trains():
    """Ten steps through a small network: the gradient of its weight by the kernel and by autograd."""
    table = ddim_table(SCHEDULE, 10, clip=1.0, eta=0.5)
    noise = contract.seeds(3, 4)
    found = []
    for backend in ("auto", "reference"):
        weight = torch.full((6, 6), 0.1, dtype=torch.float64, requires_grad=True)
        x = randn((4, 6), torch.float64)
        for t in table.timesteps:
            x = ops.step(table, torch.tanh(x @ weight), t, x, seeds=noise, backend=backend)
        x.square().sum().backward()
        found.append(weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets_give_the_same_bits(isa):
    active = torch.ops.fastdiff.cpu_isa(-1)
    try:
        try:
            torch.ops.fastdiff.cpu_isa(isa)
        except RuntimeError:
            pytest.skip("not built, or not supported by this machine")
        for index, structure in enumerate(structures()):
            variance = ("fixed", *LEARNED)[index % 4]
            for dtype in DTYPES:
                rounding = ("once", "host")[index % 2]
                check(case_of(with_variance(structure, variance), dtype, index, shape=(2, 3, 5, 11), rounding=rounding))
    finally:
        torch.ops.fastdiff.cpu_isa(active)


@needs_native
def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    case = case_of(Structure(clip=True, ax=True, variance="learned_range"), shape=(7, 3, 65, 129))
    turned = {
        k: getattr(case, k).contiguous(memory_format=torch.channels_last)
        for k in ("x", "model_output", "grad", "grad_second")
    }
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(by_kernel(case) + by_kernel(case._replace(**turned)))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.equal(a, b)


@needs_native
def test_the_operator_guards_its_memory():
    form = Structure(clip=True, ax=True, variance="learned_range")
    case = case_of(form, shape=(2, 3, 5))
    rows, flags = case.table.to("cpu", torch.float32), form.flags
    names = ("grad_x", "grad_model_output", "grad_uncond_output", "grad_noise", "grad", "grad_second", "x")
    names += ("model_output", "uncond_output", "guidance_scale", "noise", "seeds", "table", "t", "t_to_row")
    good = dict.fromkeys(names) | {
        "grad_x": torch.empty(2, 3, 5),
        "grad_model_output": torch.empty(2, 6, 5),
        "grad": case.grad,
        "x": case.x,
        "model_output": case.model_output,
        "seeds": case.seeds,
        "table": rows,
    }

    def call(flags=flags, row=0, **changed):
        torch.ops.fastdiff.step_backward(*(good | changed).values(), row, flags)

    call()
    wide = torch.zeros(2, 9, 5)
    for message, changed in {
        "grad: expected it": {"grad": None},
        "row: expected": {"row": 99},
        "flags: unknown": {"flags": flags | 7 << 9},
        "table: expected": {"table": rows.double()},
        "grad_x: expected size 3": {"grad_x": torch.empty(2, 4, 5)},
        "grad_x: expected x's dtype": {"grad_x": torch.empty(2, 3, 5).double()},
        "grad_x: expected distinct": {"grad_x": torch.empty(1, 3, 5).expand(2, 3, 5)},
        "grad_x: expected memory of its own": {"grad_x": case.grad},
        "grad_model_output: expected size 6": {"grad_model_output": torch.empty(2, 3, 5)},
        "grad_model_output: expected x's dtype": {"grad_model_output": torch.empty(2, 6, 5).double()},
        "expected memory of its own": {"grad_x": wide[:, :3], "grad_model_output": wide[:, 2:8]},
        "grad_uncond_output: expected guidance_scale": {"grad_uncond_output": torch.empty(2, 3, 5)},
        "grad_noise: expected none": {
            "grad_noise": torch.empty(2, 3, 5),
            "flags": flags & ~(7 << 9),
            "grad_model_output": None,
        },
        "grad_noise: expected x's dtype": {"grad_noise": torch.empty(2, 3, 5).double()},
        "grad_second: expected x's dtype": {"grad_second": case.grad.double()},
        "grad_second: expected a variance": {"grad_second": case.grad, "flags": flags | 1 << 13},
        "x: expected a tensor": {"x": None},
        "x: expected size 5": {"x": torch.zeros(2, 3, 6)},
        "model_output: expected a tensor": {"model_output": None},
        "model_output: expected size 6": {"model_output": case.x},
        "guidance_scale: expected": {"guidance_scale": torch.ones(5)},
        "uncond_output and guidance_scale": {"uncond_output": case.x},
        "either noise or seeds": {"seeds": None},
        "noise: expected": {"noise": case.x.double(), "seeds": None},
        "seeds: expected shape": {"seeds": torch.zeros(3, dtype=torch.int64)},
        "t_to_row: expected": {"t": torch.zeros(2, dtype=torch.int64)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
    call(grad_x=wide[:, 6:], grad_model_output=wide[:, :6])
    assert torch.isfinite(wide).all() and wide.ne(0).any(1).all()
    memory = torch.zeros(30, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="apart from that of out|apart"):
        call(grad_x=memory[:15].view(torch.float32).view(2, 3, 5), seeds=memory[3:5])


@needs_native
def test_opcheck():
    form = Structure(clip=True, ax=True, variance="learned_range")
    case = case_of(form, shape=(2, 3, 4))
    torch.library.opcheck(
        torch.ops.fastdiff.step_backward.default,
        (
            torch.empty(2, 3, 4),
            torch.empty(2, 6, 4),
            torch.empty(2, 3, 4),
            torch.empty(2, 3, 4),
            case.grad,
            case.grad_second,
            case.x,
            case.model_output,
            case.x,
            torch.ones(1),
            None,
            case.seeds,
            case.table.to("cpu", torch.float32),
            torch.tensor([10]),
            case.table.row_map("cpu"),
            0,
            form.flags,
        ),
    )


X = torch.zeros(SHAPE)
LEARNED_FORM = Structure(clip=True, variance="learned_log")
BAD = {
    "nothing": ("grad, grad_second and grad_distance: expected at least one", Structure(), {"grad": None}),
    "second": ("second: expected 'x0', 'noise' or 'v', got 'eps'", Structure(), {"second": "eps"}),
    "clip_grad": ("clip_grad: expected 'exact' or", Structure(), {"clip_grad": "soft"}),
    "rounding": ("rounding: expected 'once' or 'host'", Structure(), {"rounding": "twice"}),
    "rows": ("rows: expected one per sample", Structure(), {"rows": torch.zeros(2, 18)}),
    "grad_second shape": ("grad_second: expected shape", Structure(), {"grad_second": X[:1]}),
    "no x0": ("grad_second: expected None", Structure(x0="none", a0=False, ax=True), {"grad_second": X}),
    "no noise": ("grad_second: expected None", Structure(), {"grad_second": X, "second": "noise"}),
    "no x": ("x: expected a tensor", Structure(clip=True), {"x": None}),
    "x shape": (r"x: expected shape \[3, 4, 5, 7\]", Structure(clip=True), {"x": X[:, :1]}),
    "no output": ("model_output: expected a tensor", Structure(clip=True), {"model_output": None}),
    "output shape": ("model_output: expected shape", LEARNED_FORM, {"z": X}),
    "no z": ("z: expected a tensor", Structure(variance="learned_log"), {"model_output": torch.zeros(3, 8, 5, 7)}),
    "no scale": ("guidance_scale: expected it", Structure(), {"uncond_output": X}),
    "no uncond": ("uncond_output: expected it", Structure(clip=True), {"guidance_scale": 2.0}),
    "scale": ("guidance_scale: expected a number or shape", Structure(), {"guidance_scale": torch.ones(2)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_the_reference(name):
    message, structure, changed = BAD[name]
    options = {"rows": torch.zeros(18), "structure": structure, "grad": X, "grad_second": None}
    options |= {"x": X, "model_output": X} | changed
    with pytest.raises(ValueError, match=message):
        reference.step_backward(**options)
