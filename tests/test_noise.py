"""The noise contract: its bits, the same in every spelling, its invariances, its statistics, its accuracy.

Statistics are made on fixed seeds, so they either hold or do not: nothing here is random from run to run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fastdiff import native, noise, ops  # ops declares the native operators

assert ops

GOLDEN = Path(__file__).with_name("golden")
KAT = json.loads((GOLDEN / "philox_kat.json").read_text())
STREAM = json.loads((GOLDEN / "noise_v1.json").read_text())

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")

ISAS = {"base": 0, "v3": 1, "v4": 2}
STEP, FORWARD = noise.DOMAINS["step"], noise.DOMAINS["forward"]

# seed, t, repeat, domain
STREAMS = [
    (0, 0, 0, 0),
    (1, 0, 0, STEP),
    (-1, 999, 0, STEP),
    (2**63 - 1, 500, 1, STEP),
    (-(2**63), 1, 7, FORWARD),
    (2**32, 2**24 - 1, 0, 0),
    (-123456789, 2**32 - 1, 2**32 - 1, FORWARD),
]
SIZES = [1, 2, 3, 4, 5, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097, 10007]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def same_bits(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> bool:
    """Equal in every bit: -0.0 is not 0.0, a NaN is itself."""
    a, b = (v.view(torch.int32).numpy() if isinstance(v, torch.Tensor) else v.view(np.int32) for v in (a, b))
    return a.shape == b.shape and bool((a == b).all())


def elements_of(xp: noise.Namespace, seed: int, first: int, count: int, t: int, domain: int, repeat: int) -> np.ndarray:
    """Elements [first, first + count) of a sample by an array spelling."""
    start, stop = first // 4, -(-(first + count) // 4)
    index: np.ndarray | torch.Tensor = np.arange(start, stop, dtype=np.int64)
    seed_array: np.ndarray | torch.Tensor = np.int64(seed)
    if xp is noise.TORCH:
        index, seed_array = torch.from_numpy(index), int64(seed)
    z = noise.normals_of(xp, seed_array, index, t, domain, repeat).reshape(-1)
    return np.asarray(z)[first - 4 * start :][:count]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set build of the native kernels in turn."""
    if not native.available():
        pytest.skip(f"no native library: {native.why_not()}")
    active = torch.ops.fastdiff.cpu_isa(-1)
    try:
        torch.ops.fastdiff.cpu_isa(ISAS[request.param])
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.fastdiff.cpu_isa(active)


Probe = Callable[[str, np.ndarray], bytes]


@pytest.fixture(scope="module", params=ISAS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """A program that runs the C++ of the contract on records (noise_probe.cpp), for each instruction set."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    if request.param != "base" and platform.machine() != "x86_64":
        pytest.skip("an instruction set of x86-64")
    march = {"base": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}[request.param]
    flags = f"-std=c++17 -O2 -ffp-contract=off -fno-math-errno -fno-trapping-math {march}"
    source = Path(__file__).with_name("noise_probe.cpp")
    program = tmp_path_factory.mktemp("probe") / "noise_probe"
    command = [*shlex.split(compiler), *flags.split(), "-I", str(source.parents[1] / "csrc"), str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if built.returncode != 0:
        if request.param != "base":
            pytest.skip(f"the compiler refused {march}")
        pytest.fail(built.stderr)

    def run(mode: str, records: np.ndarray) -> bytes:
        done = subprocess.run([str(program), mode], input=records.tobytes(), stdout=subprocess.PIPE)
        if done.returncode == -signal.SIGILL and request.param != "base":
            pytest.skip(f"this machine lacks x86-64-{request.param}")
        assert done.returncode == 0
        return done.stdout

    return run


# --- Philox: known answers


def known_answers() -> list[tuple[int, list[int], list[int], list[int]]]:
    """(rounds, counter, key, words) of every vector; a stream of eight words gives two."""
    answers = [
        (v["rounds"], *(words_of(v[part]) for part in ("counter", "key", "words")))
        for v in KAT["published"] + KAT["more"]
    ]
    for v in KAT["streams"]:
        words = words_of(v["words"])
        assert v["offset"] % 4 == 0
        for block in range(2):
            q = v["offset"] // 4 + block
            counter = [q & 0xFFFFFFFF, q >> 32, v["subsequence"] & 0xFFFFFFFF, v["subsequence"] >> 32]
            answers.append((10, counter, [v["seed"] & 0xFFFFFFFF, v["seed"] >> 32], words[4 * block : 4 * block + 4]))
    return answers


ANSWERS = known_answers()


def test_the_known_answers_are_all_there() -> None:
    assert [v["rounds"] for v in KAT["published"]] == [7] * 3 + [10] * 3
    assert len(KAT["more"]) == 11 and len(KAT["streams"]) == 10


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("spelling", ["int", "numpy", "torch"])
def test_philox_gives_the_known_answers(spelling: str, rounds: int) -> None:
    chosen = [a for a in ANSWERS if a[0] == rounds]
    if spelling == "int":
        for _, counter, key, words in chosen:
            assert list(noise.philox4x32_10(tuple(counter), tuple(key), rounds)) == words
        return
    make = (lambda v: np.array(v, dtype=np.int64)) if spelling == "numpy" else (lambda v: int64(*v))
    counter = tuple(make([a[1][i] for a in chosen]) for i in range(4))
    key = tuple(make([a[2][i] for a in chosen]) for i in range(2))
    got = noise.philox4x32_10(counter, key, rounds)
    assert [list(map(int, words)) for words in zip(*got, strict=True)] == [a[3] for a in chosen]


@pytest.mark.parametrize("mode", ["p", "P"])  # words in 32-bit and in 64-bit lanes
def test_philox_of_the_header_gives_the_known_answers(probe: Probe, mode: str) -> None:
    records = np.array([[*a[1], a[2][0] | a[2][1] << 32] for a in ANSWERS], dtype=np.uint64)
    got = np.frombuffer(probe(mode, records), np.uint32).reshape(-1, 4).tolist()
    for (rounds, _, _, words), ours in zip(ANSWERS, got, strict=True):
        assert (ours == words) == (rounds == 10)


def test_seven_rounds_are_not_what_ships() -> None:
    for rounds, counter, key, words in ANSWERS:
        assert (list(noise.philox4x32_10(tuple(counter), tuple(key))) == words) == (rounds == 10)


# --- The arithmetic under the normals


def fma_triples() -> np.ndarray:
    """float32 [n, 3]: ordinary values, any bits, ties of every kind, subnormal and huge results, specials."""
    rng = np.random.default_rng(20240607)
    n = 200_000

    def integers(low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, n)

    def scaled(mantissa: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
        return np.ldexp(mantissa.astype(np.float64), exponent).astype(np.float32)

    any_bits = rng.integers(0, 2**32, (4 * n, 3), dtype=np.uint64).astype(np.uint32).view(np.float32)
    ordinary = rng.standard_normal((4 * n, 3)).astype(np.float32)
    odd12, odd13 = 2 * integers(2**10, 2**11) + 1, 2 * integers(2**11, 2**12) + 1
    sign = np.where(integers(0, 2) == 1, 1, -1)
    parts = [any_bits, ordinary]
    # a*b has 25 bits with the last one set, half a unit of float32: c, far below, breaks the tie or leaves it
    for c in (sign * 0.0, sign * 2.0 ** integers(-140, -30)):
        parts.append(np.stack([scaled(odd12, 0), scaled(sign * odd13, 0), np.float32(c)], 1))
    # c is whole, a*b close to half a unit of c on either side, nearer than float64 can tell
    near = integers(-60, 60)
    half = np.stack([scaled(2**23 + near, -24), scaled(2**23 - near, -23), scaled(sign * integers(2**23, 2**24), 0)], 1)
    parts += [half, half * np.float32([2, 1, 1]), half * np.float32([1, 2.0**-20, 1])]
    # cancellation: c = -(a*b rounded)
    a, b = ordinary[:n, 0], ordinary[:n, 1]
    parts.append(np.stack([a, b, -(a * b)], 1))
    # results around the smallest normal and below, ties included
    for shift in (-149, -140, -127):
        parts.append(
            np.stack([scaled(odd12, -30), scaled(odd13, shift + 6), scaled(sign * integers(0, 2**12), -149)], 1)
        )
    # results around the largest
    parts.append(np.stack([scaled(odd12, 60), scaled(odd13, 43), scaled(sign * integers(1, 2**24), 104)], 1))
    edge = np.float32([0.0, -0.0, 1, -1, 1.5, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028235e38, -3.4028235e38])
    edge = np.concatenate([edge, np.float32([2.0**-75, 2.0**64, np.inf, -np.inf, np.nan])])
    parts.append(np.array(list(itertools.product(edge, repeat=3)), dtype=np.float32))
    return np.concatenate([p.astype(np.float32) for p in parts])


def equal_or_nan(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow and inf - inf are meant
def test_fma_is_that_of_the_c_library(probe: Probe) -> None:
    with np.errstate(all="ignore"):
        triples = fma_triples()
        got = np.frombuffer(probe("f", triples), np.float32).reshape(-1, 2)
        ours, libm = got[:, 0].copy(), got[:, 1].copy()
        assert len(triples) > 2_000_000
        assert (libm.view(np.uint32) << 1 < 2**24).sum() > 100_000  # subnormal results
        assert equal_or_nan(ours, libm)
        assert equal_or_nan(noise.fma(noise.NUMPY, *triples.T.copy()), libm)
        columns = [torch.from_numpy(column.copy()) for column in triples.T]
        assert equal_or_nan(noise.fma(noise.TORCH, *columns).numpy(), libm)
        # the triples do tell a right fma from the one in float64 that rounds twice
        twice = (triples[:, 0].astype(np.float64) * triples[:, 1] + triples[:, 2]).astype(np.float32)
        assert not equal_or_nan(twice, libm)


@pytest.mark.parametrize("mode, dtype", [("h", torch.float16), ("b", torch.bfloat16)])
def test_half_types_are_read_exactly(probe: Probe, mode: str, dtype: torch.dtype) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    got = np.frombuffer(probe(mode, halves), np.float32)
    assert equal_or_nan(got, torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy())


@pytest.mark.parametrize("mode, dtype", [("H", torch.float16), ("B", torch.bfloat16)])
def test_half_types_are_rounded_to_nearest_even(probe: Probe, mode: str, dtype: torch.dtype) -> None:
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = finite[finite.isfinite()].sort().values
    ties = torch.cat([(finite[1:] + finite[:-1]) / 2, finite, torch.tensor([65520.0, -65520.0])]).float()
    beside = [
        ties,
        torch.nextafter(ties, ties.new_tensor(torch.inf)),
        torch.nextafter(ties, ties.new_tensor(-torch.inf)),
    ]
    any_bits = np.random.default_rng(7).integers(0, 2**32, 10**6, dtype=np.uint64).astype(np.uint32).view(np.float32)
    floats = torch.cat([*beside, torch.from_numpy(any_bits), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    got = torch.from_numpy(np.frombuffer(probe(mode, floats.numpy()), np.int16).copy()).view(dtype)
    assert equal_or_nan(got.float().numpy(), floats.to(dtype).float().numpy())


# --- The same bits from every spelling


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_normals_have_the_same_bits_everywhere(isa: str, stream: tuple[int, int, int, int]) -> None:
    seed, t, repeat, domain = stream
    expected = elements_of(noise.NUMPY, seed, 0, max(SIZES), t, domain, repeat)
    for size in SIZES:
        out = torch.full((size + 32,), 7.0)
        # an odd place in memory, and nothing is written beside it
        torch.ops.fastdiff.normals(out[3 : 3 + size].view(1, size), int64(seed), t, repeat, domain)
        assert same_bits(out[3 : 3 + size], expected[:size]), size
        assert (out[:3] == 7).all() and (out[3 + size :] == 7).all()


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_torch_and_numpy_spell_the_same_bits(stream: tuple[int, int, int, int]) -> None:
    seed, t, repeat, domain = stream
    expected = elements_of(noise.NUMPY, seed, 0, max(SIZES), t, domain, repeat)
    for size in SIZES:
        got = noise.normal_reference((1, size), int64(seed), torch.tensor([[t, repeat]]), domain)
        assert got.shape == (1, size) and same_bits(got[0], expected[:size]), size


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_normals_far_into_a_sample(probe: Probe, stream: tuple[int, int, int, int]) -> None:
    seed, t, repeat, domain = stream
    firsts = [1, 511, 2**31 - 2, 2**32 - 5, 2**33 + 3, 2**34 - 4099]
    runs = [[first, 4099, seed % 2**64, t, domain, repeat] for first in firsts]
    got = np.frombuffer(probe("n", np.array(runs, dtype=np.uint64)), np.float32).reshape(len(firsts), -1)
    for first, z in zip(firsts, got, strict=True):
        for xp in (noise.NUMPY, noise.TORCH):
            assert same_bits(elements_of(xp, seed, first, 4099, t, domain, repeat), z), first


def test_reference_takes_noise_words_per_sample() -> None:
    words = torch.tensor([[3, 0], [3, 1], [2**24 - 1, 5]])
    z = noise.normal_reference((3, 70_001), int64(5, 5, -9), words, STEP)  # more than a chunk of counters
    for b, seed in enumerate((5, 5, -9)):
        t, repeat = words[b].tolist()
        assert same_bits(z[b], elements_of(noise.NUMPY, seed, 0, 70_001, t, STEP, repeat))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    shape, seeds = (3, 50_001), int64(1, 2, 3)
    expected = noise.normal_reference(shape, seeds, torch.tensor([[9, 0]]).expand(3, 2), 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(noise.normal(shape, seeds, t=9), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_only_rounds_or_widens(isa: str, dtype: torch.dtype) -> None:
    shape, seeds = (2, 5, 1031), int64(3, -4)
    z = noise.normal(shape, seeds, t=8, domain="step")
    got = noise.normal(shape, seeds, t=8, domain="step", dtype=dtype)
    assert got.dtype == dtype and got.shape == shape and got.is_contiguous()
    assert torch.equal(got, z.to(dtype))


# --- Stream version 1, frozen


def golden_by(spelling: str, v: dict, first: int, count: int) -> np.ndarray:
    seed, t, domain, repeat = v["seed"], v["t"], v["domain"], v["repeat"]
    if spelling in ("numpy", "torch"):
        xp = noise.NUMPY if spelling == "numpy" else noise.TORCH
        return elements_of(xp, seed, first, count, t, domain, repeat)
    out = torch.empty(1, first + count)
    torch.ops.fastdiff.normals(out, int64(seed), t, repeat, domain)
    return out[0, first:].numpy()


def check_golden(spelling: str, values: list[dict]) -> None:
    for v in values:
        expected = np.array([float.fromhex(z) for z in v["z"].split()], dtype=np.float32)
        assert same_bits(golden_by(spelling, v, v["first"], len(expected)), expected), v
    v = STREAM["sha256"]
    z = golden_by(spelling, v, 0, v["elements"])
    assert hashlib.sha256(z.astype("<f4").tobytes()).hexdigest() == v["digest"]


@pytest.mark.parametrize("spelling", ["numpy", "torch"])
def test_stream_version_1_is_frozen(spelling: str) -> None:
    assert noise.STREAM_VERSION == STREAM["version"] == 1
    check_golden(spelling, STREAM["values"])


def test_stream_version_1_is_frozen_in_native_code(isa: str) -> None:
    check_golden(isa, [v for v in STREAM["values"] if v["first"] < 2**20])


# --- Invariances


@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
    inner=st.lists(st.integers(1, 40), max_size=3),
    t=st.integers(0, 2**32 - 1),
    repeat=st.integers(0, 2**32 - 1),
    domain=st.sampled_from(sorted(noise.DOMAINS)),
    data=st.data(),
)
def test_a_sample_depends_on_its_seed_alone(
    seeds: list[int], inner: list[int], t: int, repeat: int, domain: noise.Domain, data: st.DataObject
) -> None:
    def draw(seeds: list[int], *sizes: int) -> torch.Tensor:
        return noise.normal((len(seeds), *sizes), int64(*seeds), t=t, repeat=repeat, domain=domain)

    whole = draw(seeds, *inner)
    split = data.draw(st.integers(0, len(seeds)))
    order = data.draw(st.permutations(range(len(seeds))))
    assert same_bits(torch.cat([draw(seeds[:split], *inner), draw(seeds[split:], *inner)]), whole)
    assert same_bits(draw([seeds[b] for b in order], *inner), whole[list(order)])
    assert same_bits(draw(seeds, whole[0].numel()).reshape(whole.shape), whole)
    words = torch.tensor([[t, repeat]]).expand(len(seeds), 2)
    assert same_bits(noise.normal_reference(tuple(whole.shape), int64(*seeds), words, noise.DOMAINS[domain]), whole)


def test_equal_seeds_give_equal_noise() -> None:
    z = noise.normal((4, 3, 17), int64(11, 11, 12, 11))
    assert same_bits(z[0], z[1]) and same_bits(z[0], z[3]) and not torch.equal(z[0], z[2])


def test_a_sample_begins_as_a_larger_one_does() -> None:
    assert same_bits(noise.normal((1, 1000), int64(5))[:, :333], noise.normal((1, 333), int64(5)))


def test_seeds_may_be_strided() -> None:
    seeds = torch.arange(-5, 5)
    assert same_bits(noise.normal((5, 12), seeds[::2]), noise.normal((5, 12), seeds[::2].clone()))


def test_every_word_of_the_counter_matters() -> None:
    changes = [{}, {"t": 1}, {"repeat": 1}, {"domain": "step"}, {"domain": "forward"}, {"t": 1, "repeat": 1}]
    drawn = [noise.normal((1, 64), int64(0), **change) for change in changes]
    drawn += [noise.normal((1, 64), int64(seed)) for seed in (1, -1, 2**32, -(2**63))]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.isin(a, b).any()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (3,), (2, 3, 0, 4)], ids=str)
def test_empty_and_scalar_samples(shape: tuple[int, ...]) -> None:
    seeds = torch.arange(shape[0])
    z = noise.normal(shape, seeds)
    words = torch.zeros(shape[0], 2, dtype=torch.int64)
    assert z.shape == shape and same_bits(z, noise.normal_reference(shape, seeds, words, 0))


# --- Seeds


def unmix64(z: int) -> int:
    """The inverse of `noise.mix64`, step by step."""
    mask = 2**64 - 1

    def unshift(value: int, shift: int) -> int:
        result = value
        for _ in range(64 // shift + 1):
            result = value ^ (result >> shift)
        return result

    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return (unshift(z, 30) - 0x9E3779B97F4A7C15) & mask


def test_mix64_is_splitmix64() -> None:
    """The first outputs of the generator from the states 0 and 1234567, as commonly published."""
    gamma = 0x9E3779B97F4A7C15
    outputs = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
    }
    for state, expected in outputs.items():
        assert [noise.mix64((state + k * gamma) % 2**64) for k in range(len(expected))] == expected
    assert noise.mix64(-1) == noise.mix64(2**64 - 1)


@settings(max_examples=500)
@given(st.integers(0, 2**64 - 1))
def test_mix64_is_a_bijection(value: int) -> None:
    assert unmix64(noise.mix64(value)) == value


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 1, np.int64(7)], ids=str)
def test_an_int_seeds_consecutive_samples(seed: int) -> None:
    seeds = noise.seeds(seed, 5)
    assert seeds.dtype == torch.int64 and seeds.shape == (5,)
    assert [int(s) % 2**64 for s in seeds] == [(noise.mix64(seed) + b) % 2**64 for b in range(5)]


def test_seeds_wrap_around() -> None:
    last = unmix64(2**64 - 2)
    assert noise.seeds(last, 4).tolist() == [-2, -1, 0, 1]
    assert noise.seeds(unmix64(2**63 - 1), 2).tolist() == [2**63 - 1, -(2**63)]


def test_ints_share_no_sample() -> None:
    seeds = torch.cat([noise.seeds(s, 50_000) for s in range(100)])
    assert seeds.numel() == 5_000_000 and (np.diff(np.sort(seeds.numpy())) != 0).all()


def test_a_seed_tensor_is_used_as_it_is() -> None:
    seeds = int64(3, 3, -1)
    assert noise.seeds(seeds, 3) is seeds


def test_torch_manual_seed_governs() -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first, second = noise.seeds(None, 3), noise.normal((2, 5))
        assert not torch.equal(first, noise.seeds(None, 3))
        torch.manual_seed(1)
        assert torch.equal(first, noise.seeds(None, 3)) and torch.equal(second, noise.normal((2, 5)))
        torch.manual_seed(2)
        assert not torch.equal(first, noise.seeds(None, 3))
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_the_default_device_moves_nothing(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        drawn = noise.seeds(None, 3)
        z = noise.normal((2, 5), 7, dtype=dtype)
        torch.manual_seed(1)
        with torch.device("meta"):
            assert torch.equal(noise.seeds(None, 3), drawn)
            for device in ("cpu", None):
                assert torch.equal(noise.normal((2, 5), 7, dtype=dtype, device=device).float(), z.float())
    finally:
        torch.set_rng_state(state)


def test_a_seed_that_is_given_leaves_torch_alone() -> None:
    state = torch.get_rng_state()
    noise.normal((2, 5), 3)
    noise.normal((2, 5), int64(1, 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: noise.mix64(1.0), TypeError, "value: expected an int, got float"),
        (lambda: noise.mix64(True), TypeError, "value: expected an int, got bool"),
        (lambda: noise.mix64(2**64), ValueError, "value: expected an int in"),
        (lambda: noise.mix64(-(2**63) - 1), ValueError, "value: expected an int in"),
        (lambda: noise.seeds(1.5, 2), TypeError, "seeds: expected an int, None or an int64 tensor"),
        (lambda: noise.seeds(True, 2), TypeError, "seeds: expected an int, None or an int64 tensor"),
        (lambda: noise.seeds(2**64, 2), ValueError, "seeds: expected an int in"),
        (
            lambda: noise.seeds(torch.zeros(2), 2),
            TypeError,
            "seeds: expected an int64 tensor, got torch.float32",
        ),
        (lambda: noise.seeds(int64(1, 2), 3), ValueError, r"seeds: expected shape \[3\].*got \[2\]"),
        (lambda: noise.seeds(torch.tensor(1), 1), ValueError, r"seeds: expected shape \[1\].*got \[\]"),
        (lambda: noise.normal((), 1), ValueError, "shape: expected"),
        (lambda: noise.normal((2, -1), 1), ValueError, "shape: expected"),
        (lambda: noise.normal(5), TypeError, "shape: expected a sequence of ints .*got int"),
        (lambda: noise.normal(None), TypeError, "shape: expected a sequence of ints .*got NoneType"),
        (lambda: noise.normal((2, 1.5), 1), ValueError, "shape: expected"),
        (lambda: noise.normal((1, 2**34 + 1), 1), ValueError, "shape: expected at most"),
        (lambda: noise.normal((1, 2), 1, t=1.0), TypeError, "t: expected an int, got float"),
        (lambda: noise.normal((1, 2), 1, t=-1), ValueError, "t: expected an int in"),
        (lambda: noise.normal((1, 2), 1, repeat=2**32), ValueError, "repeat: expected an int in"),
        (lambda: noise.normal((1, 2), 1, domain=1), ValueError, "domain: expected one of"),
        (lambda: noise.normal((1, 2), 1, dtype=torch.int64), TypeError, "dtype: expected a floating dtype"),
        (lambda: noise.normal((1, 2), 1, dtype="float32"), TypeError, "dtype: expected a torch.dtype, got str"),
        (lambda: noise.normal((3, 2), int64(1, 2)), ValueError, r"seeds: expected shape \[3\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- Statistics

SEEDS = [0, 1, 42, -1, 2**32, 2**63 - 1, -(2**63), 20061203, 7191089600892374487, -81985529216486895]
PER_SEED = 10**6


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """float64 [10, 10^6]: ten million values, one row per seed."""
    z = noise.normal((len(SEEDS), PER_SEED), int64(*SEEDS), t=321, domain="step")
    return z.double().numpy()


def hermite(z: np.ndarray, orders: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """[len(orders), ...]: Hermite polynomials of z, of mean 0, variance 1 and no correlation if z is normal.

    Order 1 is z itself, order 2 the square; 3 and 4 take skewness and kurtosis.
    """
    polynomials = {
        1: lambda: z,
        2: lambda: (z * z - 1) / 2**0.5,
        3: lambda: (z * z - 3) * z / 6**0.5,
        4: lambda: ((z * z - 6) * z * z + 3) / 24**0.5,
    }
    return np.stack([polynomials[order]() for order in orders])


def scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """z-scores of the four correlations between a, a^2 and b, b^2."""
    return hermite(a) @ hermite(b).T / a.size**0.5


def assert_like_normal(values: np.ndarray) -> None:
    """The values are independent and standard normal if the noise is right.

    Held against: the largest, by what chance exceeds once in 2000 tests, and the sum of squares.
    """
    assert np.abs(values).max() < special.ndtri(1 - 0.00025 / values.size)
    assert 1e-4 < stats.chi2.sf(np.square(values).sum(), values.size) < 1 - 1e-4


def kolmogorov_smirnov_p(uniform: np.ndarray) -> float:
    """p-value of the two-sided Kolmogorov-Smirnov statistic of sorted values that should be uniform."""
    n = uniform.size
    distance = max((np.arange(1, n + 1) / n - uniform).max(), (uniform - np.arange(n) / n).max())
    return float(stats.kstwo.sf(distance, n))


def anderson_darling_p(uniform: np.ndarray) -> float:
    """p-value of the Anderson-Darling statistic of sorted values that should be uniform."""
    n = uniform.size
    weights = 2 * np.arange(n) + 1
    a2 = -n - (weights * (np.log(uniform) + np.log1p(-uniform[::-1]))).mean()
    return 1 - anderson_darling_cdf(a2)


def anderson_darling_cdf(a2: float) -> float:
    """The distribution of the statistic for many values, when nothing is estimated from them.

    As fitted by Marsaglia & Marsaglia, Evaluating the Anderson-Darling Distribution, J. Stat. Software 9(2), 2004.
    """
    if a2 < 2:
        series = np.polyval([-0.00168691, 0.011672, -0.0347962, 0.0649821, -0.247105, -2.00012], a2)
        return float(np.exp(-1.2337141 / a2) / np.sqrt(a2) * -series)
    return float(np.exp(-np.exp(np.polyval([-0.0003146, 0.008056, -0.082433, 0.43424, -2.30695, 1.0776], a2))))


@pytest.mark.parametrize("a2, p", [(1.0, 0.6427), (1.6212, 0.85), (1.9330, 0.90), (2.4924, 0.95), (3.8781, 0.99)])
def test_anderson_darling_distribution(a2: float, p: float) -> None:
    """Percentage points of the distribution, as tabulated."""
    assert abs(anderson_darling_cdf(a2) - p) < 5e-4


def test_distribution(drawn: np.ndarray) -> None:
    rows = np.sort(special.ndtr(drawn))
    values = []
    for uniform in (*rows, np.sort(rows.reshape(-1), kind="stable")):  # stable: merges the sorted runs
        values += [kolmogorov_smirnov_p(uniform), anderson_darling_p(uniform)]
    assert min(values) > 1e-4 and max(values) < 1 - 1e-4


def test_moments(drawn: np.ndarray) -> None:
    orders = (1, 2, 3, 4)
    assert_like_normal(np.stack([hermite(z, orders).mean(1) * z.size**0.5 for z in drawn]))
    assert_like_normal(hermite(drawn.reshape(-1), orders).mean(1) * drawn.size**0.5)


@pytest.mark.parametrize("sigma", [3, 4, 5])
def test_tails(drawn: np.ndarray, sigma: int) -> None:
    for count in ((drawn > sigma).sum(), (drawn < -sigma).sum()):
        expected = drawn.size * special.ndtr(-sigma)
        assert stats.poisson.cdf(count, expected) > 1e-4 and stats.poisson.sf(count - 1, expected) > 1e-4


def test_lanes_and_neighbours_are_independent(drawn: np.ndarray) -> None:
    blocks = drawn.reshape(-1, 8)  # two counters
    features = hermite(blocks).transpose(2, 0, 1).reshape(16, -1)
    table = features @ features.T / blocks.shape[0] ** 0.5
    pairs = [(a, b) for a, b in itertools.product(range(16), repeat=2) if a // 2 < b // 2]
    assert_like_normal(np.array([table[pair] for pair in pairs]))


def test_distant_elements_are_independent(drawn: np.ndarray) -> None:
    lags = [*range(1, 33), 63, 64, 65, 128, 256, 511, 512, 513, 1024, 2048, 4096, 65536, 500_000]
    z = drawn[0]
    assert_like_normal(np.array([scores(z[lag:], z[:-lag]) for lag in lags]))


def test_radius_and_angle_are_uniform_and_independent(drawn: np.ndarray) -> None:
    """What correlation does not see, on a grid: the two words behind a pair, and pairs of one counter."""
    pairs = drawn.reshape(-1, 2)
    radius = np.exp(-0.5 * np.square(pairs).sum(1))  # uniform
    angle = np.arctan2(pairs[:, 1], pairs[:, 0]) / (2 * np.pi) + 0.5
    bins = 64
    grids = {
        "radius, angle": (radius, angle),
        "radius, radius": (radius[::2], radius[1::2]),
        "angle, angle": (angle[::2], angle[1::2]),
        "last of a counter, first of the next": (
            special.ndtr(pairs[1:-1:2, 1]),
            special.ndtr(pairs[2::2, 0]),
        ),
    }
    for name, (u, v) in grids.items():
        cells = np.minimum((u * bins).astype(np.int64), bins - 1) * bins + np.minimum(v * bins, bins - 1).astype(
            np.int64
        )
        p = stats.chisquare(np.bincount(cells, minlength=bins * bins)).pvalue
        assert 1e-4 < p < 1 - 1e-4, name


def independent(rows: list[torch.Tensor]) -> None:
    values = [scores(a, b) for a, b in itertools.combinations([row.double().numpy() for row in rows], 2)]
    assert_like_normal(np.array(values))


LENGTH = 2**17


def test_seeds_are_independent(drawn: np.ndarray) -> None:
    assert_like_normal(np.array([scores(a, b) for a, b in itertools.combinations(drawn, 2)]))
    independent(list(noise.normal((16, LENGTH), torch.arange(16))))
    independent(list(noise.normal((16, LENGTH), 7)))
    one_bit = int64(0, *(1 << bit for bit in range(0, 63, 7)), -(2**63))
    independent(list(noise.normal((len(one_bit), LENGTH), one_bit)))
    independent([noise.normal((1, LENGTH), seed)[0] for seed in range(10)])


def test_timesteps_domains_and_repeats_are_independent() -> None:
    def draw(**words: object) -> torch.Tensor:
        return noise.normal((1, LENGTH), int64(5), **words)[0]

    independent([draw(t=t, domain="step") for t in [*range(12), 64, 128, 256, 512, 999]])
    independent([draw(t=t, domain=domain) for domain in noise.DOMAINS for t in (0, 1, 2)])
    independent([draw(t=t, repeat=repeat, domain="step") for repeat in range(3) for t in (0, 1, 2)])
    # a counter whose words are exchanged
    independent([draw(t=1, domain="initial"), draw(domain="step"), draw(repeat=1, domain="initial")])


def test_one_element_over_many_seeds_and_timesteps() -> None:
    """The pixel in the corner of every image of a data set, and of every step."""
    over_seeds = noise.normal((250_000, 4), 3).double().numpy().reshape(-1)
    t = np.arange(250_000, dtype=np.int64)
    over_t = noise.normals_of(noise.NUMPY, np.int64(3), t * 0, t, STEP, 0).astype(np.float64).reshape(-1)
    for z in (over_seeds, over_t):
        assert_like_normal(hermite(z, (1, 2, 3, 4)).mean(1) * z.size**0.5)
        assert_like_normal(np.array([scores(z[lag:], z[:-lag]) for lag in range(1, 33)]))
        uniform = np.sort(special.ndtr(z))
        assert 1e-4 < kolmogorov_smirnov_p(uniform) < 1 - 1e-4
        assert 1e-4 < anderson_darling_p(uniform) < 1 - 1e-4


# --- Accuracy


def pairs_of_words() -> tuple[np.ndarray, np.ndarray]:
    """int64 words: random ones, and for each word of the pair those near its edges."""
    rng = np.random.default_rng(11)
    near = np.arange(-300, 301)
    edges = np.concatenate(
        [near + edge for edge in (0, *(2**k for k in range(10, 33)), 3 * 2**30, 3 * 2**29, 5 * 2**29)]
    )
    edges = np.concatenate(
        [
            edges,
            np.round(2**32 * np.array([2 / 3, 1 / 3, 1 / 6, 4 / 3 / 8])).astype(np.int64) + near[:, None],
        ],
        None,
    )
    edges = edges % 2**32
    other = rng.integers(0, 2**32, edges.size)
    w0 = np.concatenate([rng.integers(0, 2**32, 1_500_000), edges, other])
    w1 = np.concatenate([rng.integers(0, 2**32, 1_500_000), other, edges])
    return w0, w1


def test_error_of_a_normal() -> None:
    w0, w1 = pairs_of_words()
    z0, z1 = noise.box_muller(noise.NUMPY, w0, w1)
    # u is float32 by contract; 2^-33 is lost in it where it is below half a unit
    u = (w0.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    # the angle of the low 31 bits, in [-pi/2, pi/2), turned by pi if the top bit is set
    low = (w1 << 1) % 2**32
    turns = (low - (low >= 2**31) * 2**32) * 2.0**-33 + (w1 >= 2**31) * 0.5
    for z, exact in ((z0, radius * np.cos(2 * np.pi * turns)), (z1, radius * np.sin(2 * np.pi * turns))):
        assert z.dtype == np.float32
        assert (np.abs(z - exact) / np.maximum(1, radius)).max() < 4e-7


def test_u_is_that_of_the_contract() -> None:
    """u = float(w)*2^-32 + 2^-33, rounded once: within 2^-25 of the word's exact number, and never 0."""
    words = np.concatenate([np.arange(70_000), 2**32 - 1 - np.arange(70_000)])
    z0, _ = noise.box_muller(noise.NUMPY, words, words * 0)  # the angle 0
    u = np.exp(-0.5 * np.square(z0.astype(np.float64)))
    assert np.abs(u - (words + 0.5) * 2.0**-32).max() < 2.0**-24
    assert (np.abs(u / ((words + 0.5) * 2.0**-32) - 1).max()) < 1e-5


def test_extremes() -> None:
    quarter = np.arange(0, 2**32, 2**28)
    z0, z1 = noise.box_muller(noise.NUMPY, quarter * 0, quarter)
    assert np.isfinite(z0).all() and np.isfinite(z1).all()
    largest = max(np.abs(z0).max(), np.abs(z1).max())
    assert abs(largest - np.sqrt(66 * np.log(2))) < 4e-7 * 6.77 and 6.76 < largest < 6.77
    for word in (0xFFFFFFFF, 0xFFFFFF80):  # u rounds to 1
        z0, z1 = noise.box_muller(noise.NUMPY, quarter * 0 + word, quarter)
        assert (z0 == 0).all() and (z1 == 0).all()
    w0, w1 = pairs_of_words()
    for z in noise.box_muller(noise.NUMPY, w0, w1):
        assert np.isfinite(z).all() and np.abs(z).max() <= largest


# --- exp_fixed


def exp_inputs(dtype: type) -> np.ndarray:
    rng = np.random.default_rng(5)
    low, high = (-110, 95) if dtype is np.float32 else (-760, 720)
    n = 2_000_000 if dtype is np.float32 else 400_000
    tiny = np.concatenate([2.0 ** -np.arange(1, 60), [0.0]])
    ties = (np.arange(low, high) + 0.5) * np.log(2)  # where the polynomial's argument is largest
    dense = [np.linspace(low, high, n), rng.uniform(-1, 1, n), rng.uniform(-88, -87, n // 10)]
    return np.concatenate([*dense, tiny, -tiny, ties]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_is_within_one_ulp(dtype: type) -> None:
    wide = np.float64 if dtype is np.float32 else np.longdouble
    if np.finfo(wide).nmant < np.finfo(dtype).nmant + 10:
        pytest.skip("no wider type to compare with")
    x = exp_inputs(dtype)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(wide))
        rounded = exact.astype(dtype)
    got = noise.exp_fixed(torch.from_numpy(x)).numpy()
    assert got.dtype == dtype
    finite = np.isfinite(rounded)
    ulp = np.spacing(rounded[finite])
    assert (np.abs(got[finite].astype(wide) - exact[finite]) <= ulp).all()
    # overflow, and the last values before it, where one ulp is Inf
    edge = np.log(wide(np.finfo(dtype).max))
    assert np.isinf(got[x.astype(wide) > edge * (1 + 1e-6)]).all()
    assert np.isfinite(got[x.astype(wide) < edge * (1 - 1e-6)]).all()
    assert (rounded[finite] < np.finfo(dtype).tiny).sum() > 1000  # subnormal results are among them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_of_special_values(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e30, -1e30, 1000, -1000], dtype=dtype)
    got = noise.exp_fixed(x)
    assert got[0].isnan()
    assert got[1:].tolist() == [torch.inf, 0, 1, 1, torch.inf, 0, torch.inf, 0]
    assert noise.exp_fixed(x[:0]).shape == (0,)


@pytest.mark.parametrize("mode, dtype", [("e", np.float32), ("E", np.float64)])
def test_exp_has_the_same_bits_everywhere(probe: Probe, mode: str, dtype: type) -> None:
    rng = np.random.default_rng(6)
    bits = np.int32 if dtype is np.float32 else np.int64
    any_bits = rng.integers(np.iinfo(bits).min, np.iinfo(bits).max, 200_000, dtype=bits).view(dtype)
    x = np.concatenate([exp_inputs(dtype)[::5], any_bits, np.array([np.nan, np.inf, -np.inf], dtype=dtype)])
    got = np.frombuffer(probe(mode, x), dtype)
    ours = noise.exp_fixed(torch.from_numpy(x)).numpy()
    assert ((got.view(bits) == ours.view(bits)) | (np.isnan(got) & np.isnan(ours))).all()
