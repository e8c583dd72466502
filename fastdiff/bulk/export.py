"""Export of a finished run: `merge` to one .npz, one .npy, or a folder of PNG files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import secrets
import shutil
import string
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..noise import mix64
from ..samplers import to_uint8
from .folder import Folder, _sync_folder, explained, npy_header

_PREFIX = 10  # bytes of an .npy file before its header, the last two of which are the header's length
_PIECE = 2**22  # bytes of samples in memory at a time, at least one sample
_LONGEST = 255  # bytes in a file name
_CHANNELS = (1, 3, 4)  # of which Pillow makes L, RGB and RGBA
_SPEC = re.compile(r"(0?[1-9][0-9]?)?[bdoxX]?")  # of an int: a width up to 99, with zeros or without, and a base
_APART = re.compile(r"(?:^|[^0-9A-Fa-f ?*-])[0-9A-Fa-f -]*\*[0-9A-Fa-f -]*[^0-9A-Fa-f ?*-]")  # see `_names`


def merge(
    out: str | os.PathLike[str],
    *,
    npz: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
    npy: str | os.PathLike[str] | None = None,
    names: str | None = None,
    labels: str | None = None,
) -> Path:
    """Write the samples of a finished run, in the order of their indices, as other tools read them.

    Every chunk is compared with the hash in its record while it is read. Memory does not grow with the number of
    samples. What is written stands under another name beside its place until it is whole, then it is renamed, with the
    permissions of what stood there; after an error it is removed, and what stood in its place stays. A process that is
    killed leaves its `.tmp` there.

    Args:
        out: the folder of the run.
        npz: a file, as the evaluator of OpenAI's guided-diffusion reads it and as its scripts write it: `arr_0`, uint8
            [N, H, W, C], not compressed. Samples must be [C, H, W]. Floating ones are taken to be in [-1, 1] and go
            through `fastdiff.to_uint8`, which truncates as those scripts do. The evaluator's network wants C = 3.
        png: a folder that is not there or empty, of one PNG file per sample, as clean-fid and torch-fidelity read
            them. Samples must be [C, H, W] with C = 1 (mode L), 3 (RGB) or 4 (RGBA); bytes as above. Needs Pillow.
            After a loss of power make them again: unlike a single file, they are not forced to the disk one by one.
        npy: a file with all samples as they are stored, [N, ...].
        names: of the PNG files, a format string with the fields `index`, `seed` (of the sample, as an unsigned int)
            and the names of integer conditions, for example "{y}/{index:06}.png". After the colon a width and one of
            b, d, o, x, X may stand. Either `index` or `seed` must be there, and between it and other fields a character
            that is no digit, letter up to f, minus or blank. clean-fid looks into folders in the folder, torch-fidelity
            when it is given `samples_find_deep=True`; both sort by name. Default: "{index:06}.png", with more digits
            where there are more than a million samples.
        labels: an integer condition, which becomes `arr_1` of the .npz, int64 [N], as those scripts write classes.

    Returns:
        The file or folder that was written.

    Raises:
        TypeError, ValueError: a bad argument, by name; chunks are missing or damaged; samples of another shape.
        ImportError: Pillow is not installed.
        OSError: a chunk cannot be read; there is no room on the disk, or the file system has another objection.
    """
    targets = {"npz": npz, "png": png, "npy": npy}
    given = [(form, target) for form, target in targets.items() if target is not None]
    if len(given) != 1:
        raise ValueError(
            f"npz, png, npy: expected one of them, got {' and '.join(form for form, _ in given) or 'none'}"
        )
    form, target = given[0]
    place = _place(form, target, Folder(out))
    for name, value, where in (("names", names, "png"), ("labels", labels, "npz")):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
        if value is not None and form != where:
            raise ValueError(f"{name}: expected None without {where}, got {value!r}")
    samples = _Samples(out)
    if form == "npy":
        with _beside(form, place) as path:
            _write_npy(path, samples)
    elif form == "npz":
        samples.check_images(form)
        if labels is not None:
            samples.check_label("labels", labels)
        with _beside(form, place) as path:
            _write_npz(path, samples, labels)
    else:
        samples.check_images(form, _CHANNELS)
        encode = _png_encoder()
        each = _names(names, samples)
        with _beside(form, place) as path:
            _write_png(path, samples, each, encode)
    return Path(target)


class _Samples:
    """The samples of a finished run, read in order and in pieces of a bounded number of bytes."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.folder = Folder(out)
        manifest = self.folder.manifest()
        self.count = int(manifest["samples"])
        self.shape = tuple(int(size) for size in manifest["result"]["shape"])
        self.dtype = np.dtype(manifest["result"]["dtype"])
        self.first_seed = mix64(manifest["seed"])
        missing = self.folder.missing()
        if missing:
            raise ValueError(
                f"out: expected a finished run, got {len(missing)} of {self.folder.count()} chunks missing or "
                f"damaged in {self.folder.path}; the same command that samples, run again, makes them"
            )

    def check_images(self, form: str, channels: tuple[int, ...] = ()) -> None:
        if len(self.shape) != 3 or 0 in self.shape:
            raise ValueError(f"{form}: expected samples of shape [channels, height, width], got {list(self.shape)}")
        if channels and self.shape[0] not in channels:
            raise ValueError(f"{form}: expected 1, 3 or 4 channels, got {self.shape[0]}")
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise ValueError(f"{form}: expected samples of a floating dtype or uint8, got {self.dtype}")

    def conditions(self) -> list[str]:
        """The names of the integer conditions."""
        return list(self._record(0)["labels"])

    def check_label(self, argument: str, label: str) -> None:
        found = self.conditions()
        if label not in found:
            raise ValueError(
                f"{argument}: expected an integer condition of the run ({', '.join(map(repr, found)) or 'none'}), "
                f"got {label!r}"
            )

    def labels(self, label: str) -> Iterator[list[int]]:
        """The values of an integer condition, chunk by chunk."""
        for chunk in range(self.folder.count()):
            yield self._labels(chunk, label)

    def each(self, labels: Iterable[str]) -> Iterator[dict[str, int]]:
        """The fields of a name, sample by sample: these labels, `index` and `seed`."""
        index = 0
        for chunk in range(self.folder.count()):
            columns = {label: self._labels(chunk, label) for label in labels}
            for row in range(self._length(chunk)):
                fields = {label: values[row] for label, values in columns.items()}
                yield {**fields, "index": index, "seed": (self.first_seed + index) % 2**64}
                index += 1

    def pieces(self) -> Iterator[np.ndarray]:
        """All samples, [n, ...] at a time, in memory that the next piece uses again. Damage shows at a chunk's end."""
        size = self.dtype.itemsize * math.prod(self.shape)
        rows = max(1, _PIECE // max(1, size))
        memory = bytearray(size * min(rows, self.folder.chunk_size))
        for chunk in range(self.folder.count()):
            record, path, length = self._record(chunk), self.folder.file(chunk), self._length(chunk)
            expected, digest = npy_header((length, *self.shape), self.dtype), hashlib.sha256()
            with explained(f"{path} could not be read", ending=""), open(path, "rb") as file:
                header = file.read(_PREFIX)
                header += file.read(int.from_bytes(header[-2:], "little"))
                if _said(header) != _said(expected):
                    raise self._wrong(chunk, f"{length} samples of {list(self.shape)}, {self.dtype}, in C order")
                digest.update(header)
                for start in range(0, length, rows):
                    count = min(rows, length - start)
                    view = memoryview(memory)[: count * size]
                    file.readinto(view)  # of a short file the rest is older bytes, which the hash finds
                    digest.update(view)
                    yield np.ndarray((count, *self.shape), self.dtype, view)
            if digest.hexdigest() != record["sha256"]:
                raise self._damaged(chunk)

    def images(self) -> Iterator[np.ndarray]:
        """All samples as bytes, uint8 [n, H, W, C]."""
        for piece in self.pieces():
            if piece.dtype == np.uint8:
                yield np.ascontiguousarray(piece.transpose(0, 2, 3, 1))
            else:
                yield to_uint8(torch.from_numpy(piece), layout="NHWC").numpy()

    def _length(self, chunk: int) -> int:
        first, end = self.folder.span(chunk)
        return end - first

    def _record(self, chunk: int) -> Mapping[str, Any]:
        record = self.folder.record(chunk)
        if record is None:
            raise self._damaged(chunk)
        return record

    def _labels(self, chunk: int, label: str) -> list[int]:
        values: list[int] = self._record(chunk)["labels"].get(label, [])
        if len(values) != self._length(chunk):
            raise self._wrong(chunk, f"{label!r} of every sample in its record")
        return values

    def _damaged(self, chunk: int, expected: str = "the bytes that its record says", remedy: str = "") -> ValueError:
        return ValueError(
            f"out: chunk {chunk} ({self.folder.file(chunk)}) is damaged: expected {expected}; {remedy}the same command "
            "that samples, run again, makes it anew"
        )

    def _wrong(self, chunk: int, expected: str) -> ValueError:
        """Where the record may say the same: then a worker takes the chunk for whole."""
        return self._damaged(chunk, expected, f"remove {self.folder.record_file(chunk)}, and ")


def _said(header: bytes) -> tuple[bytes, bytes]:
    """What the header of an .npy file says, whatever the version of NumPy that filled it up with blanks."""
    return header[: _PREFIX - 2], header[_PREFIX:].rstrip()


def _names(given: str | None, samples: _Samples) -> Iterator[str]:
    """The names of the PNG files, in order.

    Raises:
        TypeError, ValueError: the pattern, with the argument's name.
    """
    # Zeros in front, so that names sort as indices do.
    pattern = f"{{index:0{max(6, len(str(samples.count - 1)))}}}.png" if given is None else given

    def refused(expected: str) -> ValueError:
        return ValueError(f"names: expected {expected}, got {pattern!r}")

    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise refused(f"a format string ({error})") from None
    for _, field, spec, conversion in parts:
        if field is not None and (conversion is not None or not _SPEC.fullmatch(spec or "")):
            raise refused("after a field a colon, a width up to 99 and one of b, d, o, x, X")
    fields = {field for _, field, _, _ in parts if field is not None}
    labels = fields - {"index", "seed"}
    for label in labels:
        samples.check_label("names", label)
    if given is not None and (shadowed := fields.difference(labels).intersection(samples.conditions())):
        raise refused(f"no {min(shadowed)!r}, which is a condition of the run as well")

    def name(values: Mapping[str, int]) -> str:
        return "".join(
            literal if field is None else literal + format(values[field], spec or "")
            for literal, field, spec, _ in parts
        )

    longest = name({**dict.fromkeys(labels, -(2**63)), "index": samples.count - 1, "seed": 2**64 - 1})
    if not longest.endswith(".png"):
        raise refused("names that end in .png")
    if not longest.isprintable() or any(character in longest for character in '\\:*?"<>|'):
        raise refused('names without control characters and \\ : * ? " < > |')
    for part in longest.split("/"):
        if not part or part.startswith(".") or part.endswith((".", " ")):
            raise refused("relative names, of which no part is empty, begins with a dot or ends in one or a blank")
        if len(os.fsencode(part)) > _LONGEST:
            raise refused(f"parts of up to {_LONGEST} bytes")
    # Names have the characters that no int is written with at the same places in a row. Where between two of these
    # there is one field only, it can be read off the name; if it is index or seed, then no two samples share a name.
    marks = {None: "", "index": "*", "seed": "*"}
    if not _APART.search("".join(literal + marks.get(field, "?") for literal, field, _, _ in parts)):
        raise refused("{index} or {seed}, and between it and other fields a character such as _ or /")
    return map(name, samples.each(labels))


def _place(form: str, target: str | os.PathLike[str], folder: Folder) -> Path:
    """Where the target really is, after every check that can be made without the samples."""
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"{form}: expected a path, got {type(target).__name__}")
    place = Path(os.path.realpath(Path(target)))
    if place.is_symlink():
        raise ValueError(f"{form}: expected a path that leads to a place, got a link to itself, {str(target)!r}")
    run = folder.path.resolve()
    own = (folder.manifest_file, folder.sums_file, folder.chunks_folder)
    if place == run or any(place.is_relative_to(path.resolve()) for path in own):
        raise ValueError(f"{form}: expected another place than the run's own files, got {str(target)!r}")
    if os.path.ismount(place):  # which cannot be replaced
        raise ValueError(f"{form}: expected no mount point, got {str(target)!r}; name a place in it")
    if not place.parent.is_dir():
        raise ValueError(f"{form}: expected a place in a folder that is there, got {str(target)!r}")
    if form == "png":
        if place.exists() and not (place.is_dir() and next(place.iterdir(), None) is None):
            raise ValueError(f"png: expected a folder that is not there or empty, got {str(target)!r}")
        if place.exists() and place.samefile(os.curdir):
            raise ValueError(f"png: expected another folder than the working folder, got {str(target)!r}")
    elif place.exists() and not place.is_file():
        raise ValueError(f"{form}: expected a file, got {str(target)!r}")
    return place


@contextlib.contextmanager
def _beside(form: str, place: Path) -> Iterator[Path]:
    """A path beside `place` to write to, which takes that place at the end and is removed after an error."""
    path = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield path
        if place.exists():
            shutil.copymode(place, path)
        os.replace(path, place)
        _sync_folder(place.parent)
    except BaseException as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.__cause__ is None:  # else it says already what could not be read
            with explained(f"the {form} could not be written to {place}", ending=""):
                raise
        raise


def _write_npy(path: Path, samples: _Samples) -> None:
    with open(path, "xb") as file:
        file.write(npy_header((samples.count, *samples.shape), samples.dtype))
        for piece in samples.pieces():
            file.write(piece.data)
        _flush(file)


def _write_npz(path: Path, samples: _Samples, label: str | None) -> None:
    channels, height, width = samples.shape
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                array.write(npy_header((samples.count, height, width, channels), np.dtype(np.uint8)))
                for images in samples.images():
                    array.write(images.data)
            if label is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as array:
                    array.write(npy_header((samples.count,), np.dtype(np.int64)))
                    for values in samples.labels(label):
                        array.write(np.array(values, np.int64).data)
        _flush(file)


def _write_png(path: Path, samples: _Samples, names: Iterator[str], encode: Callable[[np.ndarray], bytes]) -> None:
    path.mkdir()
    for images in samples.images():
        for image in images:
            file = path / next(names)
            if file.parent != path:
                file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "xb") as opened:
                opened.write(encode(image))


def _png_encoder() -> Callable[[np.ndarray], bytes]:
    """Pillow's, of uint8 [H, W, C]."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError("png: expected Pillow to be installed (pip install pillow)", name="PIL") from error

    def encode(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        return file.getvalue()

    return encode


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
