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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..noise import mix64
from ..samplers import to_uint8
from .folder import Folder, explained, npy_header

_PREFIX = 10  # bytes of an .npy file before its header, the last two of which are the header's length
_PIECE = 2**22  # bytes of samples in memory at a time, at least one sample
_NAMES = 2**20  # names compared at a time
_LONGEST = 255  # bytes in a file name
_CHANNELS = (1, 3, 4)  # of which Pillow makes L, RGB and RGBA
_SPEC = re.compile(r"(0?[1-9][0-9]?)?[bdoxX]?")  # of an int: a width up to 99, with zeros or without, and a base


def merge(
    out: str | os.PathLike[str],
    *,
    npz: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
    npy: str | os.PathLike[str] | None = None,
    names: str = "{index:06}.png",
    labels: str | None = None,
) -> Path:
    """Write the samples of a finished run, in the order of their indices, as other tools read them.

    Every chunk is compared with the hash in its record while it is read. Memory does not grow with the number of
    samples. What is written stands under another name beside its place until it is whole, then it is renamed; after
    an error it is removed, and what stood in its place stays. A process that is killed leaves its `.tmp` there.

    Args:
        out: the folder of the run.
        npz: a file, as the evaluator of OpenAI's guided-diffusion reads it and as its scripts write it: `arr_0`, uint8
            [N, H, W, C], not compressed. Samples must be [C, H, W]. Floating ones are taken to be in [-1, 1] and go
            through `fastdiff.to_uint8`, which truncates as those scripts do. The evaluator's network wants C = 3.
        png: a folder that is not there or empty, of one PNG file per sample, as clean-fid and torch-fidelity read
            them. Samples must be [C, H, W] with C = 1 (mode L), 3 (RGB) or 4 (RGBA); bytes as above. Needs Pillow.
        npy: a file with all samples as they are stored, [N, ...].
        names: of the PNG files, a format string with the fields `index`, `seed` (of the sample, as an unsigned int)
            and the names of integer conditions, for example "{y}/{index:06}.png". After the colon a width and one of
            b, d, o, x, X may stand. clean-fid looks into folders in the folder, torch-fidelity when it is given
            `samples_find_deep=True`; both sort by name.
        labels: an integer condition, which becomes `arr_1` of the .npz, int64 [N], as those scripts write classes.

    Returns:
        The file or folder that was written.

    Raises:
        TypeError, ValueError: a bad argument, by name; chunks are missing or damaged; samples of another shape.
        ImportError: Pillow is not installed.
        OSError: there is no room on the disk, or the file system has another objection.
    """
    targets = {"npz": npz, "png": png, "npy": npy}
    given = [(form, target) for form, target in targets.items() if target is not None]
    if len(given) != 1:
        raise ValueError(
            f"npz, png, npy: expected one of them, got {' and '.join(form for form, _ in given) or 'none'}"
        )
    form, target = given[0]
    place = _place(form, target, Folder(out))
    if labels is not None and not isinstance(labels, str):
        raise TypeError(f"labels: expected the name of a condition, got {type(labels).__name__}")
    if labels is not None and form != "npz":
        raise ValueError(f"labels: expected None without npz, got {labels!r}")
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
        pattern = _Names(names, samples)
        with _beside(form, place) as path:
            _write_png(path, samples, pattern, encode)
    return Path(target)


class _Samples:
    """The samples of a finished run, read in order and in pieces of a bounded number of bytes."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.folder = Folder(out)
        manifest = self.folder.manifest()
        self.count, self.chunk = int(manifest["samples"]), int(manifest["chunk"])
        self.shape = tuple(int(size) for size in manifest["result"]["shape"])
        self.dtype = np.dtype(manifest["result"]["dtype"])
        self.first_seed = mix64(manifest["seed"])
        missing = self.folder.missing()
        if missing:
            raise ValueError(
                f"out: expected a finished run, got {len(missing)} of {self.folder.count()} chunks missing in "
                f"{self.folder.path}; the same command that samples, run again, makes them"
            )

    def check_images(self, form: str, channels: tuple[int, ...] = ()) -> None:
        if len(self.shape) != 3 or 0 in self.shape:
            raise ValueError(f"{form}: expected samples of shape [channels, height, width], got {list(self.shape)}")
        if channels and self.shape[0] not in channels:
            raise ValueError(f"{form}: expected 1, 3 or 4 channels, got {self.shape[0]}")
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise ValueError(f"{form}: expected samples of a floating dtype or uint8, got {self.dtype}")

    def check_label(self, argument: str, label: str) -> None:
        """ValueError unless every record has so many ints under this name as it has samples."""
        for chunk in range(self.folder.count()):
            found = self._record(chunk).get("labels", {})
            if label not in found:
                raise ValueError(
                    f"{argument}: expected an integer condition of the run ({', '.join(map(repr, found)) or 'none'}), "
                    f"got {label!r}"
                )
            if len(found[label]) != self._length(chunk):
                raise self._damaged(chunk)

    def labels(self, label: str) -> Iterator[list[int]]:
        """The values of an integer condition, chunk by chunk."""
        for chunk in range(self.folder.count()):
            yield self._record(chunk)["labels"][label]

    def each(self, labels: tuple[str, ...]) -> Iterator[dict[str, int]]:
        """The fields of a name, sample by sample: these labels, `index` and `seed`."""
        index = 0
        for chunk in range(self.folder.count()):
            columns = self._record(chunk)["labels"] if labels else {}
            for row in range(self._length(chunk)):
                fields = {label: columns[label][row] for label in labels}
                yield {**fields, "index": index, "seed": (self.first_seed + index) % 2**64}
                index += 1

    def pieces(self) -> Iterator[np.ndarray]:
        """All samples, [n, ...] at a time, in memory that the next piece uses again. Damage shows at a chunk's end."""
        size = self.dtype.itemsize * math.prod(self.shape)
        rows = max(1, _PIECE // max(1, size))
        memory = bytearray(size * min(rows, self.chunk))
        for chunk in range(self.folder.count()):
            record, length, digest = self._record(chunk), self._length(chunk), hashlib.sha256()
            with open(self.folder.file(chunk), "rb") as file:
                header = file.read(_PREFIX)
                header += file.read(int.from_bytes(header[-2:], "little"))
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
        return min(self.chunk, self.count - chunk * self.chunk)

    def _record(self, chunk: int) -> Mapping[str, Any]:
        record = self.folder.record(chunk)
        if record is None:
            raise self._damaged(chunk)
        return record

    def _damaged(self, chunk: int) -> ValueError:
        return ValueError(
            f"out: chunk {chunk} ({self.folder.file(chunk)}) is damaged: expected the bytes that its record says; "
            "the same command that samples, run again, makes it anew"
        )


class _Names:
    """The names of the PNG files, checked for every sample before any is used.

    Raises:
        TypeError, ValueError: the pattern or a name made of it, with the argument's name.
    """

    def __init__(self, pattern: str, samples: _Samples) -> None:
        if not isinstance(pattern, str):
            raise TypeError(f"names: expected a str, got {type(pattern).__name__}")
        self.pattern, self.samples = pattern, samples
        try:
            parts = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise ValueError(f"names: expected a format string, got {pattern!r} ({error})") from None
        for _, field, spec, conversion in parts:
            if field is not None and (conversion is not None or not _SPEC.fullmatch(spec or "")):
                raise ValueError(
                    f"names: expected after a field a colon, a width up to 99 and one of b, d, o, x, X, got {pattern!r}"
                )
        self.parts = [(literal, field, spec or "") for literal, field, spec, _ in parts]
        self.labels = tuple(sorted({field for _, field, _ in self.parts if field is not None} - {"index", "seed"}))
        for label in self.labels:
            samples.check_label("names", label)
        self._check_each()

    def __iter__(self) -> Iterator[str]:
        """The name of every sample, in order."""
        for values in self.samples.each(self.labels):
            yield "".join(
                literal if field is None else literal + format(values[field], spec)
                for literal, field, spec in self.parts
            )

    def _check_each(self) -> None:
        # Names are compared by hash and in parts, so that memory stays bounded; those of equal hash once more, in full.
        for part in range(passes := -(-self.samples.count // _NAMES)):
            hashes = np.fromiter(self._hashes(part, passes), np.int64)
            values, counts = np.unique(hashes, return_counts=True)
            suspects = set(values[counts > 1].tolist())
            first: dict[str, int] = {}
            for index, name in enumerate(self if suspects else ()):
                if hash(name) in suspects and first.setdefault(name, index) != index:
                    raise ValueError(
                        f"names: expected another name for every sample, got {name!r} for {first[name]} and {index}; "
                        "{index} or {seed} in it tells them apart"
                    )

    def _hashes(self, part: int, passes: int) -> Iterator[int]:
        for name in self:
            if part == 0:
                _check_name(name)
            if (number := hash(name)) % passes == part:
                yield number


def _check_name(name: str) -> None:
    """ValueError unless a name stays in its folder, on every file system, and is found by what reads PNG files."""
    if not name.endswith(".png"):
        raise ValueError(f"names: expected names that end in .png, got {name!r}")
    if not name.isprintable() or any(character in name for character in '\\:*?"<>|'):
        raise ValueError(f'names: expected names without control characters and \\ : * ? " < > |, got {name!r}')
    for component in name.split("/"):
        if component.startswith(".") or not component:
            raise ValueError(
                f"names: expected relative names, of which no part is empty or begins with a dot, got {name!r}"
            )
        if len(os.fsencode(component)) > _LONGEST:
            raise ValueError(f"names: expected parts of up to {_LONGEST} bytes, got {name!r}")


def _place(form: str, target: str | os.PathLike[str], folder: Folder) -> Path:
    """Where the target really is, after every check that can be made without the samples."""
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"{form}: expected a path, got {type(target).__name__}")
    place = Path(target).resolve()
    run = folder.path.resolve()
    own = (folder.manifest_file, folder.sums_file, folder.chunks_folder)
    if place == run or any(place.is_relative_to(path.resolve()) for path in own):
        raise ValueError(f"{form}: expected another place than the run's own files, got {str(target)!r}")
    if not place.parent.is_dir():
        raise ValueError(f"{form}: expected a place in a folder that is there, got {str(target)!r}")
    if form == "png":
        if place.exists() and not (place.is_dir() and next(place.iterdir(), None) is None):
            raise ValueError(f"png: expected a folder that is not there or empty, got {str(target)!r}")
    elif place.exists() and not place.is_file():
        raise ValueError(f"{form}: expected a file, got {str(target)!r}")
    return place


@contextlib.contextmanager
def _beside(form: str, place: Path) -> Iterator[Path]:
    """A path beside `place` to write to, which takes that place at the end and is removed after an error."""
    path = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    with explained(f"the {form} could not be written to {place}"):
        try:
            yield path
            os.replace(path, place)
        except BaseException:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
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


def _write_png(path: Path, samples: _Samples, names: _Names, encode: Callable[[np.ndarray], bytes]) -> None:
    path.mkdir()
    each = iter(names)
    for images in samples.images():
        for image in images:
            file = path / next(each)
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
