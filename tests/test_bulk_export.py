"""`merge`: what other tools read, whole or not at all, in memory that does not grow."""

import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.bulk import Job, export, sample
from fastdiff.bulk.export import merge
from fastdiff.bulk.folder import Folder, _check_of
from fastdiff.noise import mix64, seeds
from fastdiff.samplers import DDIMSampler
from fastdiff.schedules import NoiseSchedule

SAMPLER = DDIMSampler(NoiseSchedule.cosine(1000), steps=3)
SEED = 7
FORMS = ("npz", "png", "npy")


def write_run(out: Path, samples: np.ndarray, chunk: int, labels: dict[str, list[int]] | None = None) -> Path:
    """The folder of a finished run that made these samples."""
    result = {"shape": [*samples.shape[1:]], "dtype": str(samples.dtype)}
    job = Job(SAMPLER, result["shape"], len(samples), seed=SEED, batch=chunk, chunk=chunk)
    folder = Folder(out)
    folder.begin({**job.identity, "network": {"name": "", "probe": ""}, "result": result, "environment": {}})
    for number in range(job.chunks):
        first, end = job.span(number)
        with folder.writing(number, end - first) as writer:
            writer.write(samples[first:end])
            writer.commit({"labels": {name: values[first:end] for name, values in (labels or {}).items()}})
    folder.write_sums()
    return out


def random_samples(count: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Beyond [-1, 1] too, so that bytes saturate."""
    values = np.random.default_rng(count).uniform(-1.2, 1.2, (count, *shape))
    return (values * 100 + 128).astype(np.uint8) if dtype == "uint8" else values.astype(dtype)


def expected_bytes(samples: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    data = torch.from_numpy(samples)
    return (data if data.dtype == torch.uint8 else fastdiff.to_uint8(data)).permute(0, 2, 3, 1).numpy()


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def streamed(file: Path, name: str) -> np.ndarray:
    """An array of an .npz read front to back, without a seek, as the evaluator of guided-diffusion does."""
    with zipfile.ZipFile(file) as archive, archive.open(name) as array:
        assert np.lib.format.read_magic(array) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
        assert not fortran
        data = array.read(int(np.prod(shape)) * dtype.itemsize)
        assert array.read() == b""
    return np.frombuffer(data, dtype).reshape(shape)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize("piece", [1, 1000, 2**22])
def test_npz_holds_the_bytes_of_every_sample(tmp_path, monkeypatch, channels, dtype, piece):
    monkeypatch.setattr(export, "_PIECE", piece)
    samples = random_samples(11, channels, 5, 6, dtype=dtype)
    file = merge(write_run(tmp_path / "run", samples, 4), npz=tmp_path / "all.npz")
    assert file == tmp_path / "all.npz"
    with np.load(file) as archive:
        assert archive.files == ["arr_0"]
        loaded = archive["arr_0"]
    assert loaded.dtype == np.uint8 and loaded.shape == (11, 5, 6, channels)
    np.testing.assert_array_equal(loaded, expected_bytes(samples))
    np.testing.assert_array_equal(streamed(file, "arr_0.npy"), loaded)
    assert tree(tmp_path / "run") == tree(write_run(tmp_path / "fresh", samples, 4))


def test_npz_holds_labels_as_int64(tmp_path):
    labels = {"y": [3, -1, 2**40, 0, 9], "z": [1] * 5}
    run = write_run(tmp_path / "run", random_samples(5, 3, 4, 4), 2, labels)
    file = merge(run, npz=tmp_path / "all.npz", labels="y")
    with np.load(file) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_1"].dtype == np.int64
        assert archive["arr_1"].tolist() == labels["y"]
    np.testing.assert_array_equal(streamed(file, "arr_1.npy"), labels["y"])


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_npz_is_the_file_that_numpy_writes_of_whole_arrays(tmp_path, dtype):
    samples, labels = random_samples(11, 3, 8, 8, dtype=dtype), list(range(11))
    run = write_run(tmp_path / "run", samples, 4, {"y": labels})
    np.savez(tmp_path / "whole.npz", expected_bytes(samples), np.array(labels))
    file = merge(run, npz=tmp_path / "all.npz", labels="y")
    assert file.read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(("store", "dtype"), [("uint8", torch.float32), ("state", torch.bfloat16)])
def test_a_run_that_was_sampled_is_merged(tmp_path, store, dtype):
    y = torch.arange(10) % 3
    job = Job(SAMPLER, (3, 4, 4), 10, seed=SEED, batch=2, chunk=4, dtype=dtype, store=store, conditions={"y": y})

    def network(x, t, y):
        return x * (0.1 + y[:, None, None, None]).to(x.dtype)

    run = sample(job, network, tmp_path / "run", progress=False)
    x = SAMPLER.sample(network, (10, 3, 4, 4), seeds=SEED, dtype=dtype, model_kwargs={"y": y})
    with np.load(merge(run, npz=tmp_path / "all.npz", labels="y")) as archive:
        np.testing.assert_array_equal(archive["arr_0"], fastdiff.to_uint8(x, layout="NHWC").numpy())
        assert archive["arr_1"].tolist() == y.tolist()
    stored = fastdiff.to_uint8(x) if store == "uint8" else x.float()
    np.testing.assert_array_equal(np.load(merge(run, npy=tmp_path / "all.npy")), stored.numpy())
    folder = merge(run, png=tmp_path / "png", names="{y}/{index}.png")
    assert len(list(folder.rglob("*.png"))) == 10
    assert tree(run) == tree(sample(job, network, tmp_path / "again", progress=False))


def test_npz_is_stored_with_64_bit_sizes(tmp_path):
    run = write_run(tmp_path / "run", random_samples(5, 3, 4, 4), 2, {"y": [0] * 5})
    file = merge(run, npz=tmp_path / "all.npz", labels="y")
    data = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            fields = struct.unpack("<4sHHHHHIIIHH", data[entry.header_offset :][:30])
            extra = data[entry.header_offset + 30 + fields[9] :][: fields[10]]
            assert fields[7:9] == (0xFFFFFFFF, 0xFFFFFFFF)
            assert struct.unpack("<HHQQ", extra) == (1, 16, entry.file_size, entry.compress_size)
    assert merge(run, npz=tmp_path / "again.npz", labels="y").read_bytes() == data


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 2), (2, 3, 4, 5)])
def test_npy_holds_the_samples_as_they_are(tmp_path, dtype, shape):
    samples = random_samples(7, *shape, dtype=dtype)
    file = merge(write_run(tmp_path / "run", samples, 3), npy=str(tmp_path / "all.npy"))
    loaded = np.load(file)
    assert loaded.dtype == samples.dtype and loaded.shape == samples.shape
    assert loaded.tobytes() == samples.tobytes()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_png_holds_a_file_per_sample(tmp_path, channels, mode, dtype):
    samples = random_samples(5, channels, 6, 7, dtype=dtype)
    folder = merge(write_run(tmp_path / "run", samples, 2), png=tmp_path / "png")
    assert tree(folder) == [f"{index:06}.png" for index in range(5)]
    for index, pixels in enumerate(expected_bytes(samples)):
        with Image.open(folder / f"{index:06}.png") as image:
            assert (image.format, image.mode) == ("PNG", mode)
            np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_png_names_are_made_of_index_seed_and_labels(tmp_path):
    run = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2, {"y": [3, 0, 3, 1, -2]})
    (tmp_path / "png").mkdir()
    folder = merge(run, png=tmp_path / "png", names="{y}/{{{index:06x}}}-{seed}.png")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    each = [seed % 2**64 for seed in seeds(SEED, 5).tolist()]
    assert found == sorted(
        f"{y}/{{{i:06x}}}-{seed}.png" for i, (y, seed) in enumerate(zip([3, 0, 3, 1, -2], each, strict=True))
    )


def test_seeds_in_names_wrap_as_seeds_do(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "mix64", lambda seed: mix64(seed) * 0 + 2**64 - 2)
    folder = merge(write_run(tmp_path / "run", random_samples(4, 1, 2, 2), 2), png=tmp_path / "png", names="{seed}.png")
    assert tree(folder) == sorted(f"{seed}.png" for seed in (2**64 - 2, 2**64 - 1, 0, 1))


@pytest.mark.parametrize(
    "names",
    [
        "",
        ".png",
        "{index}",
        "{index}.PNG",
        "{index}.npy",
        "{index}.png/",
        "/{index}.png",
        "//host/{index}.png",
        "../{index}.png",
        "a/../../{index}.png",
        "./{index}.png",
        "a//{index}.png",
        ".hidden/{index}.png",
        "C:{index}.png",
        "C:\\{index}.png",
        "..\\{index}.png",
        "a\0{index}.png",
        "a\n{index}.png",
        "\ud800{index}.png",
        "{index:06}" + "a" * 250 + ".png",
        "{index}{seed:b}" + "a" * 187 + ".png",
        "a./{index}.png",
        "a /{index}.png",
        "{}.png",
        "{0}.png",
        "{index.real}.png",
        "{index.__class__}.png",
        "{index[0]}.png",
        "{index!r}.png",
        "{index:{seed}}.png",
        "{index:/>9}.png",
        "{index:e}.png",
        "{index:,}.png",
        "{index:100000000}.png",
        "{other}{index}.png",
        "{w}{index}.png",
        "{index.png",
        "index}.png",
    ],
)
def test_bad_names_are_refused_before_anything_is_written(tmp_path, names):
    run = write_run(tmp_path / "run", random_samples(3, 1, 2, 2), 2, {"y": [1, 2, 3]})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="^names: expected .*, got "):
        merge(run, png=tmp_path / "png", names=names)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "names",
    ["x.png", "{y}.png", "{index}{y}.png", "{y}{index}.png", "{y}a{index}.png", "{index}-{y}.png", "{y} {index}.png"],
)
def test_names_that_two_samples_may_share_are_refused(tmp_path, names):
    run = write_run(tmp_path / "run", random_samples(3, 1, 2, 2), 2, {"y": [1, 2, 3]})
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"^names: expected \{index\} or \{seed\}, and between it .* such as _ or /, got "
    ):
        merge(run, png=tmp_path / "png", names=names)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "names",
    ["{index}.png", "a{index}b.png", "{y}_{index}.png", "{y}{y}/{seed:x}.png", "{index}{y}/s{seed}s{index}.png"],
)
def test_names_that_tell_samples_apart_are_taken(tmp_path, names):
    labels = [int(value) for value in np.random.default_rng(0).integers(-20, 20, 40)]
    folder = merge(
        write_run(tmp_path / "run", random_samples(40, 1, 2, 2), 16, {"y": labels}), png=tmp_path / "png", names=names
    )
    assert len(list(folder.rglob("*.png"))) == 40


def test_names_sort_as_indices_do_beyond_a_million(tmp_path):
    run = write_run(tmp_path / "run", np.zeros((1_000_001, 1, 1, 1), np.uint8), 1_000_001)
    assert next(export._names(None, export._Samples(run))) == "0000000.png"


def test_a_condition_called_as_a_field_is_not_taken_for_it(tmp_path):
    run = write_run(tmp_path / "run", random_samples(2, 1, 2, 2), 2, {"seed": [5, 6], "index": [7, 8]})
    for name in "seed", "index":
        with pytest.raises(
            ValueError, match=f"^names: expected no '{name}', which is a condition of the run as well, got "
        ):
            merge(run, png=tmp_path / "png", names=f"{{{name}}}.png")
    assert tree(merge(run, png=tmp_path / "png")) == ["000000.png", "000001.png"]


def test_a_label_that_is_not_there_is_told_with_those_that_are(tmp_path):
    run = write_run(tmp_path / "run", random_samples(3, 1, 2, 2), 2, {"y": [1, 2, 3], "z": [1, 1, 1]})
    for arguments in ({"npz": tmp_path / "a.npz", "labels": "w"}, {"png": tmp_path / "a", "names": "{w}{index}.png"}):
        with pytest.raises(ValueError, match=r"expected an integer condition of the run \('y', 'z'\), got 'w'"):
            merge(run, **arguments)
    bare = write_run(tmp_path / "bare", random_samples(3, 1, 2, 2), 2)
    with pytest.raises(ValueError, match=r"^labels: .* \(none\), got 'y'"):
        merge(bare, npz=tmp_path / "a.npz", labels="y")
    assert not (tmp_path / "a.npz").exists() and not (tmp_path / "a").exists()


def test_bad_arguments_are_refused_by_name(tmp_path):
    run = write_run(tmp_path / "run", random_samples(3, 1, 2, 2), 2, {"y": [1, 2, 3]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    before = tree(tmp_path)
    for error, message, out, arguments in (
        (ValueError, "^npz, png, npy: expected one of them, got none", run, {}),
        (ValueError, "expected one of them, got npz and npy", run, {"npz": tmp_path / "a", "npy": tmp_path / "b"}),
        (TypeError, "^npy: expected a path, got int", run, {"npy": 3}),
        (TypeError, "^names: expected a str, got int", run, {"png": tmp_path / "a", "names": 3}),
        (TypeError, "^labels: expected a str, got int", run, {"npz": tmp_path / "a", "labels": 3}),
        (ValueError, "^labels: expected None without npz", run, {"npy": tmp_path / "a", "labels": "y"}),
        (TypeError, "^names: expected a str, got int", run, {"npz": tmp_path / "a", "names": 3}),
        (ValueError, "^names: expected None without png", run, {"npz": tmp_path / "a", "names": "{index}.png"}),
        (ValueError, "^out: expected", tmp_path / "full", {"npy": tmp_path / "a"}),
        (ValueError, "^out: expected", tmp_path / "nowhere", {"npy": tmp_path / "a"}),
        (ValueError, "^png: expected a folder", run, {"png": tmp_path / "full"}),
        (ValueError, "^png: expected a folder", run, {"png": tmp_path / "full" / "file"}),
        (ValueError, "^npz: expected a file", run, {"npz": tmp_path / "full"}),
        (ValueError, "^npy: expected a place in a folder", run, {"npy": tmp_path / "nowhere" / "a.npy"}),
        *(
            (ValueError, f"^{form}: expected another place", run, {form: run / place})
            for form in FORMS
            for place in ("", "chunks", "chunks/00000000.npy", "x/../chunks/deep/a", "manifest.json", "SHA256SUMS")
        ),
    ):
        with pytest.raises(error, match=message):
            merge(out, **arguments)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("shape", [(), (6,), (6, 6), (2, 6, 6), (1, 2, 6, 6)])
def test_images_have_three_dimensions_and_channels_that_a_png_has(tmp_path, shape):
    run = write_run(tmp_path / "run", random_samples(3, *shape), 2)
    with pytest.raises(ValueError, match="^png: expected "):
        merge(run, png=tmp_path / "png")
    if len(shape) != 3:
        with pytest.raises(ValueError, match="^npz: expected samples of shape "):
            merge(run, npz=tmp_path / "all.npz")
    assert tree(tmp_path) == sorted(["run", *(f"run/{path}" for path in tree(run))])


@pytest.mark.parametrize("form", FORMS)
def test_missing_chunks_are_counted(tmp_path, form):
    run = write_run(tmp_path / "run", random_samples(9, 1, 2, 2), 2)
    (run / "chunks" / "00000001.json").unlink()
    (run / "chunks" / "00000003.npy").write_bytes(b"half")
    with pytest.raises(
        ValueError, match="^out: expected .* got 2 of 5 chunks missing or damaged in .* run again, makes them"
    ):
        merge(run, **{form: tmp_path / "all"})
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [3, 100, 150, -1])
def test_a_damaged_chunk_is_found_and_nothing_is_left(tmp_path, monkeypatch, form, place):
    monkeypatch.setattr(export, "_PIECE", 64)
    run = write_run(tmp_path / "run", random_samples(12, 1, 4, 4), 4)
    file = run / "chunks" / "00000001.npy"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="^out: chunk 1 .*00000001.npy.* is damaged.* run again, makes it anew"):
        merge(run, **{form: tmp_path / "all"})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [3, 5])
def test_a_chunk_of_other_samples_is_found(tmp_path, form, count):
    run = write_run(tmp_path / "run", random_samples(12, 1, 4, 4), 4)
    other = write_run(tmp_path / "other", random_samples(count, 1, 4, 4), count)
    for name in "00000000.npy", "00000000.json":
        (other / "chunks" / name).replace(run / "chunks" / name)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="^out: expected a finished run, got 1 of 3 chunks missing or damaged in "):
        merge(run, **{form: tmp_path / "all"})
    assert tree(tmp_path) == before


def rewrite(folder: Folder, chunk: int, data: bytes, **changes: object) -> None:
    """A chunk of other bytes, with a record that says so."""
    record = folder.record(chunk)
    folder.file(chunk).write_bytes(data)
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    record["check"] = _check_of(record)
    folder.record_file(chunk).write_text(json.dumps(record))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda array: np.asfortranarray(array),
        lambda array: array.view(np.int32),
        lambda array: array.astype(">f4"),
        lambda array: array.reshape(4, 1, 2, 8),
        lambda array: array[:3],
    ],
    ids=["order", "dtype", "endianness", "shape", "length"],
)
def test_a_chunk_that_its_header_tells_otherwise_is_found(tmp_path, form, change):
    run = write_run(tmp_path / "run", random_samples(12, 1, 4, 4), 4)
    data = io.BytesIO()
    np.save(data, change(np.load(run / "chunks" / "00000001.npy")))
    rewrite(Folder(run), 1, data.getvalue())
    before = tree(tmp_path)
    match = (
        "^out: chunk 1 .* is damaged: expected 4 samples of .1, 4, 4., float32, in C order; remove .*00000001.json, and"
    )
    with pytest.raises(ValueError, match=match):
        merge(run, **{form: tmp_path / "all"})
    assert tree(tmp_path) == before
    (run / "chunks" / "00000001.json").unlink()
    assert Folder(run).missing() == [1]


def test_a_header_that_another_version_of_numpy_filled_up_is_taken(tmp_path):
    samples = random_samples(12, 1, 4, 4)
    run = write_run(tmp_path / "run", samples, 4)
    data = (run / "chunks" / "00000001.npy").read_bytes()
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].rstrip() + b" " * 80 + b"\n"
    rewrite(Folder(run), 1, data[:8] + len(header).to_bytes(2, "little") + header + data[10 + length :])
    np.testing.assert_array_equal(np.load(merge(run, npy=tmp_path / "all.npy")), samples)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["open", "read"])
def test_a_chunk_that_cannot_be_read_is_told(tmp_path, monkeypatch, form, when):
    run = write_run(tmp_path / "run", random_samples(12, 1, 4, 4), 4)
    before = tree(tmp_path)

    class Unreadable(io.FileIO):
        def readinto(self, view):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path, mode):
        if Path(path) != run / "chunks" / "00000001.npy":
            return open(path, mode)
        if when == "open":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return Unreadable(path)

    monkeypatch.setattr(export, "open", opened, raising=False)
    with pytest.raises(OSError, match=r"00000001.npy could not be read$") as caught:
        merge(run, **{form: tmp_path / "all"})
    assert caught.value.errno == (errno.EACCES if when == "open" else errno.EIO)
    assert os.strerror(caught.value.errno) in str(caught.value)
    assert tree(tmp_path) == before


def test_a_record_without_all_labels_is_found(tmp_path):
    run = write_run(tmp_path / "run", random_samples(5, 1, 4, 4), 2, {"y": [1, 2, 3]})
    before = tree(tmp_path)
    for arguments in ({"npz": tmp_path / "a", "labels": "y"}, {"png": tmp_path / "a", "names": "{y}/{index}.png"}):
        with pytest.raises(ValueError, match="^out: chunk 1 .* is damaged: expected 'y' of every sample"):
            merge(run, **arguments)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_that_is_cut_while_it_is_read_is_found(tmp_path, monkeypatch, form):
    run = write_run(tmp_path / "run", random_samples(12, 1, 4, 4), 4)
    before = tree(tmp_path)
    missing = export.Folder.missing

    def then_cut(folder):
        found = missing(folder)
        record = json.loads((run / "chunks" / "00000001.json").read_text())
        monkeypatch.setattr(export._Samples, "_record", lambda self, chunk: record)
        os.truncate(run / "chunks" / "00000000.npy", 200)
        return found

    monkeypatch.setattr(export.Folder, "missing", then_cut)
    with pytest.raises(ValueError, match="^out: chunk 0 .* is damaged"):
        merge(run, **{form: tmp_path / "all"})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_a_file_is_replaced_at_the_end_only(tmp_path, form):
    good = write_run(tmp_path / "good", random_samples(5, 1, 2, 2), 2)
    bad = write_run(tmp_path / "bad", random_samples(5, 1, 2, 2), 2)
    target = merge(good, **{form: tmp_path / "all"})
    data = target.read_bytes()
    chunk = bad / "chunks" / "00000002.npy"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        merge(bad, **{form: target})
    assert target.read_bytes() == data
    other = write_run(tmp_path / "other", random_samples(6, 1, 2, 2), 2)
    assert merge(other, **{form: target}).read_bytes() != data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "bad", "good", "other"]


@pytest.mark.parametrize("form", FORMS)
def test_a_link_keeps_pointing_where_it_did(tmp_path, form):
    run = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2)
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "all")
    assert merge(run, **{form: link}) == link
    assert link.is_symlink() and tree(tmp_path / "far")[0] == "all"


def test_a_link_to_itself_is_refused(tmp_path):
    run = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    for form in FORMS:
        with pytest.raises(ValueError, match=f"^{form}: expected a path that leads to a place"):
            merge(run, **{form: tmp_path / "loop"})
        with pytest.raises(ValueError, match=f"^{form}: expected a place in a folder"):
            merge(run, **{form: tmp_path / "loop" / "all"})
    assert tree(tmp_path) == before


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2)
    (tmp_path / "volume").mkdir()
    before = tree(tmp_path)
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume" or ismount(path))
    for target in tmp_path / "volume", "/":
        with pytest.raises(ValueError, match="^png: expected no mount point, got .*; name a place in it"):
            merge(run, png=target)
    assert tree(tmp_path) == before
    assert tree(merge(run, png=tmp_path / "volume" / "png"))


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2)
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    before = tree(tmp_path)
    for target in ".", "..", tmp_path / "here" / "deep":
        with pytest.raises(ValueError, match="^png: expected "):
            merge(run, png=target)
    assert tree(tmp_path) == before and Path.cwd().samefile(tmp_path / "here" / "deep")
    merge(run, png="png")
    assert len(tree(tmp_path / "here" / "deep" / "png")) == 5


@pytest.mark.parametrize("form", FORMS)
def test_what_is_replaced_keeps_its_permissions(tmp_path, form):
    run, place = write_run(tmp_path / "run", random_samples(5, 1, 2, 2), 2), tmp_path / "all"
    merge(run, **{form: place})
    fresh = place.stat().st_mode
    if form == "png":
        for file in place.iterdir():
            file.unlink()
    mode = 0o2750 if form == "png" else 0o640
    place.chmod(mode)
    merge(run, **{form: place})
    assert place.stat().st_mode & 0o7777 == mode != fresh & 0o7777


class FullFile(io.FileIO):
    """A file on a disk that has room for `limit` bytes of it."""

    limit = 0

    def write(self, data):
        if self.tell() + len(data) > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [0, 50, 300])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch, form, limit):
    run = write_run(tmp_path / "run", random_samples(4, 1, 16, 16), 2)
    before = tree(tmp_path)
    monkeypatch.setattr(FullFile, "limit", limit)
    monkeypatch.setattr(
        export, "open", lambda path, mode: FullFile(path, mode) if "x" in mode else open(path, mode), raising=False
    )
    with pytest.raises(OSError, match=f"no room on the disk: the {form} could not be written to .*all$") as caught:
        merge(run, **{form: tmp_path / "all"})
    assert caught.value.errno == errno.ENOSPC
    assert tree(tmp_path) == before


def test_a_file_that_may_not_grow_is_told_and_nothing_is_left(tmp_path):
    pytest.importorskip("resource")
    write_run(tmp_path / "run", random_samples(8, 3, 64, 64), 2)
    (tmp_path / "all.npy").write_text("kept")
    before = tree(tmp_path)
    script = """
import resource, sys
from fastdiff.bulk.export import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for form in ("npz", "png", "npy"):
    try:
        merge(sys.argv[1] + "/run", **{form: f"{sys.argv[1]}/all.{form}"})
    except OSError as error:
        print(form, error.errno, "no room on the disk" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{form} {errno.EFBIG} True" for form in FORMS]
    assert done.stderr == ""
    assert tree(tmp_path) == before and (tmp_path / "all.npy").read_text() == "kept"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    small, large = random_samples(128, 3, 64, 64), random_samples(1024, 3, 64, 64)
    write_run(tmp_path / "small", small, 128, {"y": [0] * 128})
    write_run(tmp_path / "large", large, 1024, {"y": [0] * 1024})
    write_run(tmp_path / "many", large, 64, {"y": [0] * 1024})
    script = """
import re, sys
from fastdiff.bulk import export
export._PIECE = 2**18
def peak():  # not ru_maxrss, in which the process that started this one counts
    return re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
for run in ("small", "large", "many"):
    for form in ("npz", "png", "npy"):
        export.merge(f"{sys.argv[1]}/{run}", **{form: f"{sys.argv[1]}/{run}.{form}"})
    print(peak())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second, third = (int(line) / 1024 for line in done.stdout.split())
    assert large.nbytes / 2**20 - small.nbytes / 2**20 == 42
    assert second - first < 8 and third - first < 8, (first, second, third)
    np.testing.assert_array_equal(np.load(tmp_path / "large.npy"), large)


def test_without_pillow_it_is_said_what_to_install(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", random_samples(3, 1, 2, 2), 2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="^png: expected Pillow .*pip install pillow"):
        merge(run, png=tmp_path / "png")
    assert not (tmp_path / "png").exists()
    merge(run, npz=tmp_path / "all.npz")
