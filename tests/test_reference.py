"""The reference step against the formula written out in NumPy, one rounded operation after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import reference, tables
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMN, COLUMNS, Structure

SHAPE = (3, 4, 5)
FIXED = ("none", "fixed")
LEARNED = ("learned_log", "learned_range", "learned_plain")


@st.composite
def structures(draw, variances=FIXED):
    x0 = draw(st.sampled_from(("linear", "output", "none")))
    eps = draw(st.sampled_from(("none", "output", "linear") + (("rederived",) if x0 != "none" else ())))
    a0 = x0 != "none" and draw(st.booleans())
    return Structure(
        x0=x0,
        x0_divide=x0 == "linear" and draw(st.booleans()),
        clip=x0 != "none" and draw(st.booleans()),
        eps=eps,
        eps_divide=eps == "rederived" and draw(st.booleans()),
        a0=a0,
        ax=draw(st.booleans()) or not (a0 or eps != "none"),
        ae=eps != "none",
        variance=draw(st.sampled_from(variances)),
    )


def random_rows(seed, count=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count or 1, len(COLUMNS), generator=generator, dtype=torch.float64)
    for name in ("pd", "gd"):
        rows[:, COLUMN[name]] = rows[:, COLUMN[name]].abs() + 0.3
    rows[:, COLUMN["lo"]], rows[:, COLUMN["hi"]] = -0.7, 0.6
    rows[:, COLUMN["t"] :] = 0
    rows = rows.to(dtype)
    return rows if count else rows[0]


def tensors(seed, structure, dtype=torch.float32, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, z = draw(shape), draw(shape)
    m = draw((shape[0], 2 * shape[1], *shape[2:]) if structure.learned else shape)
    if structure.variance == "learned_plain":
        m = torch.cat([m[:, : shape[1]], m[:, shape[1] :].abs()], 1)
    return x, m, z if structure.variance != "none" else None


def written_out(row, structure, x, m, z, to):
    """The formula, each operation in `to` and on its own; row, x, m, z are NumPy arrays of that type."""
    c = {name: to(value) for name, value in zip(COLUMNS, row.tolist(), strict=True)}
    std = None
    if structure.learned:
        m, v = np.split(m, 2, axis=1)
        if structure.variance == "learned_plain":
            std = np.sqrt(v)
        else:
            if structure.variance == "learned_range":
                f = (v + to(1)) * to(0.5)
                v = f * c["max_log"] + (to(1) - f) * c["min_log"]
            std = np.exp(to(0.5) * v)
    x0 = m
    if structure.x0 == "linear":
        x0 = c["px"] * x + c["pm"] * m
        x0 = x0 / c["pd"] if structure.x0_divide else x0
    x0 = np.clip(x0, c["lo"], c["hi"]) if structure.clip else x0
    e = {
        "output": lambda: m,
        "none": lambda: m,
        "linear": lambda: c["ex"] * x + c["em"] * m,
        "rederived": lambda: (c["gx"] * x - c["g0"] * x0) / (c["gd"] if structure.eps_divide else to(1)),
    }[structure.eps]()
    terms = [(structure.a0, c["a0"], x0), (structure.ax, c["ax"], x), (structure.ae, c["ae"], e)]
    terms.append((z is not None, c["s"] if std is None else c["s"] * std, z))
    total = None
    for present, factor, value in terms:
        if present:
            total = factor * value if total is None else total + factor * value
    return total, None if structure.x0 == "none" else x0


@given(structure=structures(), seed=st.integers(0, 99), dtype=st.sampled_from((torch.float32, torch.float64)))
def test_every_structure_is_the_formula_bit_for_bit(structure, seed, dtype):
    to = np.float32 if dtype == torch.float32 else np.float64
    row, (x, m, z) = random_rows(seed, dtype=dtype), tensors(seed, structure, dtype)
    sample, x0 = reference.step(row, structure, x, m, z=z)
    expected = written_out(row, structure, x.numpy(), m.numpy(), None if z is None else z.numpy(), to)
    assert sample.dtype == dtype and np.array_equal(sample.numpy(), expected[0])
    assert (x0 is None) == (structure.x0 == "none")
    assert x0 is None or np.array_equal(x0.numpy(), expected[1])


@given(structure=structures(LEARNED), seed=st.integers(0, 20))
def test_learned_variances(structure, seed):
    for dtype, to, tolerance in ((torch.float32, np.float32, 3e-6), (torch.float64, np.float64, 1e-14)):
        row, (x, m, z) = random_rows(seed, dtype=dtype), tensors(seed, structure, dtype)
        expected, _ = written_out(row, structure, x.numpy(), m.numpy(), z.numpy(), to)
        for torch_math in (False, True):
            sample, _ = reference.step(row, structure, x, m, z=z, torch_math=torch_math)
            np.testing.assert_allclose(sample.numpy(), expected, rtol=tolerance, atol=10 * tolerance)


@given(structure=structures(FIXED + LEARNED), seed=st.integers(0, 20))
def test_a_row_per_sample_is_a_step_per_sample(structure, seed):
    rows, (x, m, z) = random_rows(seed, SHAPE[0]), tensors(seed, structure)
    together = reference.step(rows, structure, x, m, z=z)
    for b in range(SHAPE[0]):
        one = slice(b, b + 1)
        alone = reference.step(rows[b], structure, x[one], m[one], z=None if z is None else z[one])
        for all_, single in zip(together, alone, strict=True):
            assert all_ is None or torch.equal(all_[one], single)


@given(
    structure=structures(FIXED + LEARNED),
    seed=st.integers(0, 20),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
)
def test_half_states_round_once(structure, seed, dtype):
    row, (x, m, z) = random_rows(seed), tensors(seed, structure, dtype)
    sample, x0 = reference.step(row, structure, x, m, z=z)
    wide = reference.step(row, structure, x.float(), m.float(), z=None if z is None else z.float())
    assert sample.dtype == dtype and torch.equal(sample, wide[0].to(dtype))
    assert x0 is None or torch.equal(x0, wide[1].to(dtype))


@given(structure=structures(), seed=st.integers(0, 20), dtype=st.sampled_from((torch.float16, torch.bfloat16)))
def test_half_states_round_as_eager_code(structure, seed, dtype):
    """rounding="host" is what torch does on a CPU with half tensors and float32 scalar tensors."""
    row, (x, m, z) = random_rows(seed), tensors(seed, structure, dtype)
    c = {name: row[index] for name, index in COLUMN.items()}  # 0-dim float32
    x0 = c["px"] * x + c["pm"] * m if structure.x0 == "linear" else m
    x0 = x0 / c["pd"] if structure.x0_divide else x0
    x0 = x0.clamp(c["lo"].item(), c["hi"].item()) if structure.clip else x0
    e = m
    if structure.eps == "linear":
        e = c["ex"] * x + c["em"] * m
    elif structure.eps == "rederived":
        e = c["gx"] * x - c["g0"] * x0
        e = e / c["gd"] if structure.eps_divide else e
    terms = [c["a0"] * x0] * structure.a0 + [c["ax"] * x] * structure.ax + [c["ae"] * e] * structure.ae
    expected = sum(terms[1:], terms[0])
    if z is not None:
        expected = expected + c["s"] * z
    sample, predicted = reference.step(row, structure, x, m, z=z, rounding="host")
    assert sample.dtype == dtype and torch.equal(sample, expected)
    assert predicted is None or torch.equal(predicted, x0)


@pytest.mark.parametrize("m_dtype", [torch.float16, torch.bfloat16])
def test_float32_state_with_a_half_model_output(m_dtype):
    structure = Structure(clip=True, eps="output", ae=True)
    row, (x, m, _) = random_rows(1), tensors(1, structure)
    m = m.to(m_dtype)
    for rounding in ("once", "host"):
        sample, x0 = reference.step(row, structure, x, m, rounding=rounding)
        wide = reference.step(row, structure, x, m.float())
        assert sample.dtype == x0.dtype == torch.float32
        assert torch.equal(sample, wide[0]) and torch.equal(x0, wide[1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", [7.5, torch.tensor(0.5), torch.tensor([0.0, 1.0, 3.0])], ids=str)
def test_guidance(learned, scale):
    structure = Structure(ax=True, variance="learned_log" if learned else "fixed")
    row, (x, cond, z) = random_rows(2), tensors(2, structure)
    uncond = tensors(3, structure)[1]
    sample, x0 = reference.step(row, structure, x, cond, uncond_output=uncond, guidance_scale=scale, z=z)
    w = scale.reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    c = SHAPE[1]
    m = uncond[:, :c] + w * (cond[:, :c] - uncond[:, :c])
    m = torch.cat([m, cond[:, c:]], 1)  # the variance is the conditional one
    expected = reference.step(row, structure, x, m, z=z)
    assert torch.equal(sample, expected[0]) and torch.equal(x0, expected[1])
    short = reference.step(row, structure, x, cond, uncond_output=uncond[:, :c], guidance_scale=scale, z=z)
    assert torch.equal(short[0], sample)


def test_nan_and_inf():
    inf, nan = math.inf, math.nan
    x = torch.tensor([[nan, inf, -inf, 1.0]])
    m = torch.zeros(1, 4)
    row = random_rows(0)
    row[COLUMN["px"]], row[COLUMN["pm"]], row[COLUMN["a0"]], row[COLUMN["ax"]] = 1, 1, 1, 0
    clipped = reference.step(row, Structure(clip=True), x, m)[0]
    hi, lo = row[COLUMN["hi"]], row[COLUMN["lo"]]
    torch.testing.assert_close(clipped, torch.tensor([[nan, hi, lo, hi]]), equal_nan=True)
    # a coefficient that happens to be 0 is multiplied, a term that is absent is not
    multiplied = reference.step(row, Structure(clip=True, ax=True), x, m)[0]
    assert torch.isnan(multiplied).tolist() == [[True, True, True, False]]
    output = reference.step(row, Structure(x0="output"), x, x)
    torch.testing.assert_close(output[1], x, equal_nan=True)


def test_the_inputs_are_left_alone_and_x0_is_a_tensor_of_its_own():
    for structure in (Structure(x0="output"), Structure(x0="output", clip=True)):
        x, m, _ = tensors(4, structure)
        before = x.clone(), m.clone()
        sample, x0 = reference.step(random_rows(4), structure, x, m)
        sample.fill_(9), x0.fill_(9)
        assert torch.equal(x, before[0]) and torch.equal(m, before[1])


@pytest.mark.parametrize("variance", [*FIXED, *LEARNED])
@pytest.mark.parametrize("guided", [False, True])
def test_gradients(variance, guided):
    structure = Structure(
        clip=True, x0_divide=True, eps="rederived", eps_divide=True, ax=True, ae=True, variance=variance
    )
    shape = (2, 2, 3)
    rows = random_rows(5, 2, torch.float64)
    x, m, z = tensors(5, structure, torch.float64, shape)
    uncond = tensors(6, structure, torch.float64, shape)[1]
    scale = torch.tensor([1.5, 0.5], dtype=torch.float64)
    inputs = [rows, x, m] + ([uncond, scale] if guided else []) + ([z] if z is not None else [])

    def step(rows, x, m, *rest):
        rest = list(rest)
        guidance = {"uncond_output": rest.pop(0), "guidance_scale": rest.pop(0)} if guided else {}
        return reference.step(rows, structure, x, m, z=rest.pop() if rest else None, **guidance)

    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(step, inputs, check_forward_ad=True)
    if not guided:
        assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize("variance", LEARNED)
def test_function_transforms(variance):
    structure = Structure(ax=True, variance=variance)
    row, (x, m, z) = random_rows(7), tensors(7, structure)

    def loss(x, m, z):
        return reference.step(row, structure, x[None], m[None], z=z[None])[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, m, z)
    x.requires_grad_(), m.requires_grad_()
    whole = torch.autograd.grad(reference.step(row, structure, x, m, z=z)[0].square().sum(), (x, m))
    for ours, theirs in zip(per_sample, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_clip_stops_gradients_outside_its_range_only():
    structure, row = Structure(clip=True), random_rows(8)
    row[COLUMN["px"]], row[COLUMN["pm"]], row[COLUMN["a0"]] = 1, 0, 2
    row[COLUMN["lo"]], row[COLUMN["hi"]] = -0.5, 0.5
    x = torch.tensor([[-1.0, -0.5, 0.25, 0.5, 0.75]], requires_grad=True)
    reference.step(row, structure, x, torch.zeros(1, 5))[0].sum().backward()
    assert x.grad.tolist() == [[0, 2, 2, 2, 0]]


def test_square_roots_are_correctly_rounded():
    structure = Structure(x0="output", variance="learned_plain")
    for dtype, count in ((torch.float32, 200_000), (torch.float64, 200_000)):
        v = torch.rand(1, count, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
        v[0, :6] = torch.tensor([0.0, math.inf, 1e-30, 4.0, 1e30, torch.finfo(dtype).max])
        row = torch.zeros(18, dtype=dtype)
        row[COLUMN["s"]] = 1
        zero, one = torch.zeros_like(v), torch.ones_like(v)
        sample, _ = reference.step(row, structure, zero, torch.cat([zero, v], 1), z=one)
        assert np.array_equal(sample.numpy(), np.sqrt(v.numpy()))
    assert torch.isnan(reference.step(row, structure, zero, torch.cat([zero, -one], 1), z=one)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["once", "host"])
def test_add_noise(dtype, rounding):
    schedule = NoiseSchedule.cosine(1000)
    t = torch.tensor([0, 400, 999])
    rows = tables.add_noise_table(schedule).to("cpu", dtype)[t]
    x0, z, _ = tensors(10, Structure(), dtype)
    signal, noise = (rows[:, COLUMN[name]].to(dtype).reshape(-1, 1, 1) for name in ("ax", "s"))
    x_t, nothing = reference.add_noise(rows, x0, z, rounding=rounding)
    _, target = reference.add_noise(rows, x0, z, target="noise", rounding=rounding)
    again, v = reference.add_noise(rows, x0, z, target="v", rounding=rounding)
    assert nothing is None and torch.equal(target, z) and torch.equal(again, x_t)
    if dtype != torch.bfloat16 or rounding == "host":
        assert torch.equal(x_t, signal * x0 + noise * z)
        assert torch.equal(v, signal * z - noise * x0)
    else:
        wide = reference.add_noise(rows, x0.float(), z.float(), target="v")
        assert torch.equal(x_t, wide[0].to(dtype)) and torch.equal(v, wide[1].to(dtype))


def test_the_v_target_is_what_v_prediction_reads():
    schedule = NoiseSchedule.linear(1000)
    x0, z, _ = tensors(11, Structure(), torch.float64)
    forward, table = tables.add_noise_table(schedule), tables.ddim_table(schedule, prediction="v")
    for t in (0, 500, 999):
        x_t, v = reference.add_noise(forward.rows[t], x0, z, target="v")
        predicted = reference.step(table.rows[table.row_of(t)], table.structure, x_t, v)[1]
        torch.testing.assert_close(predicted, x0, rtol=1e-10, atol=1e-12)


def test_add_noise_gradients():
    rows = tables.add_noise_table(NoiseSchedule.cosine(10)).rows[torch.tensor([3, 9])]
    x0, z, _ = tensors(12, Structure(), torch.float64, (2, 2, 2))
    inputs = [tensor.requires_grad_() for tensor in (rows, x0, z)]
    assert torch.autograd.gradcheck(lambda *a: reference.add_noise(*a, target="v"), inputs, check_forward_ad=True)


X = torch.zeros(SHAPE)
ROW = random_rows(0)
BAD_INPUT = {
    "rounding": ("rounding: expected 'once' or 'host', got 'twice'", Structure(), {"rounding": "twice"}),
    "row width": (r"rows: expected shape \[18\], or one per sample", Structure(), {"rows": ROW[:17]}),
    "row count": ("rows: expected one per sample of x", Structure(), {"rows": ROW.expand(2, 18)}),
    "no batch": ("rows: expected one per sample of x", Structure(), {"x": torch.tensor(1.0)}),
    "no channels": ("x: expected .*learned", Structure(variance="learned_log"), {"x": torch.zeros(3)}),
    "output": (r"model_output: expected shape \[3, 4, 5\]", Structure(), {"model_output": torch.zeros(3, 8, 5)}),
    "learned": (r"model_output: expected shape \[3, 8, 5\]", Structure(variance="learned_log"), {"z": X}),
    "no scale": ("uncond_output and guidance_scale", Structure(), {"uncond_output": X}),
    "no uncond": ("uncond_output and guidance_scale", Structure(), {"guidance_scale": 2.0}),
    "uncond": ("uncond_output: expected", Structure(), {"uncond_output": X[:1], "guidance_scale": 2.0}),
    "scale": ("guidance_scale: .*got", Structure(), {"uncond_output": X, "guidance_scale": torch.ones(2)}),
    "no z": ("z: expected noise", Structure(variance="fixed"), {}),
    "z": ("z: expected no noise", Structure(), {"z": X}),
    "z shape": (r"z: expected shape \[3, 4, 5\]", Structure(variance="fixed"), {"z": X[0]}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    message, structure, options = BAD_INPUT[case]
    given_ = {"rows": ROW, "structure": structure, "x": X, "model_output": X} | options
    with pytest.raises(ValueError, match=message):
        reference.step(**given_)


def test_bad_target():
    with pytest.raises(ValueError, match="target: expected None, 'noise' or 'v', got 'x0'"):
        reference.add_noise(ROW, X, X, target="x0")


def gradients(asked, wrt):
    """Of pairs of an output and its gradient."""
    used = [(output, grad) for output, grad in asked if output.requires_grad]
    if not used:
        return [torch.zeros_like(u) for u in wrt]
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, wrt, grads, allow_unused=True, materialize_grads=True)


def summed(gradient: torch.Tensor) -> torch.Tensor:
    """Of coefficients: without the noise words, which have none."""
    return gradient[:, : COLUMN["t"]]


@pytest.mark.parametrize("guided", [False, True])
@given(
    structure=structures(FIXED + LEARNED),
    seed=st.integers(0, 2**31),
    outputs=st.sampled_from(("x_prev", "x0", "both")),
)
def test_the_sums_are_the_gradients_of_the_coefficients(structure, seed, outputs, guided):
    outputs = "x_prev" if structure.x0 == "none" else outputs
    rows = random_rows(seed, SHAPE[0], torch.float64).requires_grad_()
    x, m, z = tensors(seed, structure, torch.float64)
    z = None if structure.variance == "none" else z
    scale = torch.linspace(0.5, 2, SHAPE[0], dtype=torch.float64).requires_grad_() if guided else None
    uncond = m.flip(0) if guided else None
    given = {"uncond_output": uncond, "guidance_scale": scale, "z": z}
    results = reference.step(rows, structure, x, m, **given)
    grads = [torch.randn_like(x) if outputs in ("both", name) else None for name in ("x_prev", "x0")]
    asked = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wrt = [rows] if scale is None else [rows, scale]
    expected = gradients(asked, wrt)
    with torch.no_grad():
        found = reference.step_backward(rows, structure, *grads, x, m, with_sums=True, **given).sums
    torch.testing.assert_close(summed(found), summed(expected[0]), rtol=1e-11, atol=1e-11)
    assert not found[:, COLUMN["t"] : -1].any()
    torch.testing.assert_close(found[:, -1], expected[1] if guided else torch.zeros_like(found[:, -1]))


@pytest.mark.parametrize("target", ["noise", "v"])
def test_the_sums_of_add_noise(target):
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    rows = random_rows(3, SHAPE[0], torch.float64).requires_grad_()
    x, _, z = tensors(3, structure, torch.float64)
    grads = torch.randn_like(x), torch.randn_like(x)
    outputs = reference.add_noise(rows, x, z, target=target)
    expected = gradients(list(zip(outputs, grads, strict=True)), [rows])[0]
    found = reference.step_backward(rows, structure, *grads, x, z=z, second=target, with_sums=True).sums
    torch.testing.assert_close(summed(found), summed(expected))


@pytest.mark.parametrize("each", [True, False])
@given(
    structure=structures(("fixed",)),
    seed=st.integers(0, 2**31),
    min_std=st.sampled_from((0.0, 0.4)),
    with_grad=st.booleans(),
    guided=st.booleans(),
)
def test_the_gradients_of_the_distance(structure, seed, min_std, with_grad, guided, each):
    rows = random_rows(seed, SHAPE[0], torch.float64)
    rows[:, COLUMN["s"]] = rows[:, COLUMN["s"]].abs() + 0.1
    rows.requires_grad_()
    x, m, z = (u.requires_grad_() for u in tensors(seed, structure, torch.float64))
    scale = torch.linspace(0.5, 2, SHAPE[0], dtype=torch.float64).requires_grad_() if guided else None
    uncond = m.detach().flip(0).requires_grad_() if guided else None
    given = {"uncond_output": uncond, "guidance_scale": scale}
    x_prev = reference.step(rows, structure, x, m, z=z, **given)[0]
    distance = reference.distance(rows, structure, x_prev.detach(), x, m, min_std=min_std, **given)
    if not each:
        distance = reference.tree_sum(distance.flatten(1))
    grad, grad_distance = torch.randn_like(x), torch.randn_like(distance)
    if not with_grad:
        grad = None
    asked = [(distance, grad_distance)] + ([(x_prev, grad)] if with_grad else [])
    wrt = [u for u in (rows, x, m, uncond, scale, z) if u is not None]
    expected = gradients(asked, wrt)
    with torch.no_grad():
        found = reference.step_backward(
            rows,
            structure,
            grad,
            None,
            x,
            m,
            z=z,
            x_prev=x_prev,
            grad_distance=grad_distance,
            min_std=min_std,
            with_sums=True,
            **given,
        )
    torch.testing.assert_close(summed(found.sums), summed(expected[0]), rtol=1e-9, atol=1e-9)
    ours = [found.x, found.model_output, found.uncond_output, found.sums[:, -1] if guided else None, found.z]
    for mine, theirs in zip([u for u in ours if u is not None], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_distance_without_deviation_is_nan():
    structure = Structure(variance="fixed")
    rows = random_rows(0)
    rows[COLUMN["s"]] = 0
    x, m, _ = tensors(0, structure)
    assert torch.isnan(reference.distance(rows, structure, x, x, m)).all()
    assert torch.isfinite(reference.distance(rows, structure, x, x, m, min_std=0.1)).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 511, 512, 513, 5000])
def test_a_tree_sum_can_be_cut(n):
    values = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    total = reference.tree_sum(values)
    torch.testing.assert_close(total, values.sum(-1))
    padded = torch.nn.functional.pad(values, (0, -n % 512))
    assert torch.equal(reference.tree_sum(reference.tree_sum(padded.unflatten(-1, (-1, 512)))), total)
    written_out = [float(v) for v in values[0]] or [0.0]
    while len(written_out) > 1:
        written_out += [0.0] * (len(written_out) % 2)
        written_out = [float(np.float32(a) + np.float32(b)) for a, b in zip(*[iter(written_out)] * 2, strict=True)]
    assert total[0] == written_out[0]
