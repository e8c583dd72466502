"""The folder of a run: a manifest, a file and a record for each chunk, and the signs of who is making one.

Any number of processes on any number of machines use it at a time, without locks: what stands under its own name is
whole, because files are written beside their place and renamed, and two that make the same chunk write the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .job import FORMAT

LEASE = 120.0  # seconds without a sign of life after which another machine's chunk is made anew

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PIECE = 2**22  # bytes read at a time
_BESIDE = re.compile(r"(\d{8,}\.(?:npy|json)|manifest\.json|SHA256SUMS)\.([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]+\.tmp")
_RECORD = re.compile(r"(\d{8,})\.json")


def _host() -> str:
    """A name for all processes that know each other by number: of this boot of this machine, and in one container."""
    spaces = []
    for path in "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid":
        with contextlib.suppress(OSError):
            spaces.append(os.readlink(path) if "/ns/" in path else Path(path).read_text())
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    return f"{name[:40]}-{hashlib.sha256(''.join(spaces).encode()).hexdigest()[:8]}"


_HOST = _host()


@dataclass(frozen=True)
class Status:
    """How far a run is: samples and chunks in all, and those done."""

    samples: int
    samples_done: int
    chunks: int
    chunks_done: int

    @property
    def complete(self) -> bool:
        return self.chunks_done == self.chunks

    def __str__(self) -> str:
        share = 100 * self.samples_done // self.samples
        return (
            f"{self.samples_done:,} of {self.samples:,} samples ({share} %), "
            f"{self.chunks_done:,} of {self.chunks:,} chunks"
        )


def status(out: str | os.PathLike[str]) -> Status:
    """How far the run in folder `out` is.  ValueError where there is none."""
    return Folder(out).status()


class Folder:
    """The folder of a run.

    Args:
        path: the folder. Nothing is made or read until it is needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"out: expected a path, got {type(path).__name__}")
        self.path = Path(path)
        self._manifest: dict[str, Any] | None = None

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def chunks_folder(self) -> Path:
        return self.path / "chunks"

    @property
    def sums_file(self) -> Path:
        return self.path / "SHA256SUMS"

    # The manifest

    def manifest(self) -> dict[str, Any]:
        """What decides the samples, as the first worker wrote it.

        Raises:
            ValueError: there is none, it is damaged, or of another version.
        """
        if not self.has_manifest():
            raise ValueError(f"out: expected the folder of a run, with a manifest.json, got {self.path}")
        assert self._manifest is not None
        return self._manifest

    def has_manifest(self) -> bool:
        """Whether a run was begun here.  ValueError as `manifest`."""
        self._manifest = self._manifest or self._read_manifest()
        return self._manifest is not None

    def begin(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make the folder and its manifest, unless another process was faster; the manifest that stands there.

        A hash of it, "run", is added, which is in every record too: chunks of another run are not taken for this one's.

        Raises:
            ValueError: as `manifest`; a file is in the way.  OSError: the folder cannot be written to.
        """
        with explained(f"the manifest could not be written to {self.path}"):
            try:
                self.chunks_folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ValueError(f"out: expected a folder, got {self.path}: {error.filename} is in the way") from None
            if not self.has_manifest():
                whole = {**manifest, "run": _run_of(manifest)}
                _write(self.manifest_file, json.dumps(whole, indent=1) + "\n", replace=False)
        return self.manifest()

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            found = _parsed(self.manifest_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ValueError(f"out: {self.manifest_file} cannot be read: {error.strerror}") from None
        if found.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"out: expected a folder of format {FORMAT}, got {found['format']!r} in {self.manifest_file}; "
                "another version of fastdiff made it"
            )
        if not _is_whole(found):
            raise ValueError(
                f"out: {self.manifest_file} is damaged; expected what a run wrote there. Without the file, the command "
                "that makes the samples writes it anew, and keeps those that are its own (of an inexact run maybe none)"
            )
        return found

    # Chunks

    def count(self) -> int:
        """The number of chunks."""
        return -(-int(self.manifest()["samples"]) // self.chunk_size)

    @property
    def chunk_size(self) -> int:
        """Samples in a file, but for the last."""
        return int(self.manifest()["chunk"])

    def span(self, chunk: int) -> tuple[int, int]:
        """(first index, index after the last) of a chunk."""
        first = chunk * self.chunk_size
        return first, min(first + self.chunk_size, int(self.manifest()["samples"]))

    def file(self, chunk: int) -> Path:
        """Where the samples of a chunk are: .npy, [n, ...]."""
        return self.chunks_folder / f"{chunk:08}.npy"

    def record_file(self, chunk: int) -> Path:
        return self.chunks_folder / f"{chunk:08}.json"

    def record(self, chunk: int) -> dict[str, Any] | None:
        """The record of a chunk that is done, else None.

        Not done is one without a record, with a damaged one or another run's, or without a file of the size it says.
        """
        path = self.record_file(chunk)
        with explained(f"{path} could not be read"):
            try:
                text, size = path.read_bytes(), self.file(chunk).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None
        found = _parsed(text)
        own = found.get("run") == self.manifest()["run"] and found.get("samples") == list(self.span(chunk))
        return found if own and found.get("check") == _check_of(found) and found.get("bytes") == size else None

    def missing(self) -> list[int]:
        """The chunks that are not done."""
        return [chunk for chunk in range(self.count()) if self.record(chunk) is None]

    def intact(self, chunk: int) -> bool:
        """Whether a chunk is done and has the bytes that its record says."""
        record = self.record(chunk)
        if record is None:
            return False
        digest = hashlib.sha256()
        with explained(f"{self.file(chunk)} could not be read"):
            try:
                with open(self.file(chunk), "rb") as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
            except FileNotFoundError:
                return False
        return bool(digest.hexdigest() == record["sha256"])

    def check(self, chunk: int) -> bool:
        """Whether a chunk is intact; if so its record is marked as checked now, else it is discarded."""
        before = self._version(chunk)
        if self.record(chunk) is None:
            return False
        if self.intact(chunk):
            with contextlib.suppress(OSError):  # another user's: it is checked again then
                os.utime(self.record_file(chunk))
            return True
        if self._version(chunk) != before:  # another worker found it too, and has made it anew
            return self.check(chunk)
        self.discard(chunk)
        return False

    def checked(self, chunk: int, since: float, until: float) -> bool:
        """Whether a chunk was made or checked between two times by `now`."""
        try:
            return since <= self.record_file(chunk).stat().st_mtime <= until
        except FileNotFoundError:
            return False

    def _version(self, chunk: int) -> tuple[int, ...]:
        """Numbers that change when the file of a chunk is replaced."""
        try:
            found = self.file(chunk).stat()
        except FileNotFoundError:
            return ()
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def discard(self, chunk: int) -> None:
        """Make a damaged chunk one that is not done."""
        for path in (self.record_file(chunk), self.file(chunk)):
            path.unlink(missing_ok=True)

    def status(self) -> Status:
        samples, count, missing = int(self.manifest()["samples"]), self.count(), self.missing()
        undone = sum(end - first for first, end in map(self.span, missing))
        return Status(samples, samples - undone, count, count - len(missing))

    # Making a chunk

    @contextlib.contextmanager
    def writing(self, chunk: int, samples: int) -> Iterator[Writer]:
        """A `Writer` for a chunk of so many samples; what it wrote is removed unless it was committed.

        Raises:
            OSError: in words, from what the writer does; what else is raised inside passes as it is.
        """
        writer = Writer(self, chunk, samples)
        try:
            yield writer
        finally:
            writer.close()

    def claims(self, lease: float = LEASE) -> set[int]:
        """The chunks that living processes are making; the files of processes that died on this machine are removed.

        A process lives while its file grows, `lease` seconds at most from one micro-batch to the next, and on this
        machine only while it has its number. The file of one that gave no sign of life for longer stays, as it may
        only be slow: its chunk is made by two then, and the bytes are the same.
        """
        now, living = self.now(), set()
        for path, name, host, process in self._under_way():
            try:
                age = now - path.stat().st_mtime
            except FileNotFoundError:
                continue
            if host == _HOST and not _is_running(process):
                path.unlink(missing_ok=True)
            elif abs(age) < lease and name.endswith(".npy"):  # a sign from the future is none: the clock was set back
                living.add(int(name.removesuffix(".npy")))
        return living

    def _under_way(self) -> Iterator[tuple[Path, str, str, int]]:
        """(path, name to be, host, process) of each file that is being made."""
        for folder in (self.path, self.chunks_folder):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if (match := _BESIDE.fullmatch(entry.name)) is not None:
                        yield Path(entry.path), match[1], match[2], int(match[3])

    def now(self) -> float:
        """The time by the clock of the file system, which all machines share."""
        clock = self.path / f".{_HOST}.clock"
        for _ in range(3):
            with contextlib.suppress(OSError):  # a worker that is done removed it; or it is another user's
                clock.touch()
                return clock.stat().st_mtime
        return time.time()

    @property
    def told(self) -> Path:
        """A file of this machine, touched when one of its workers tells of the progress."""
        return self.path / f".{_HOST}.told"

    def tell(self) -> None:
        with contextlib.suppress(OSError):  # where that cannot be noted, each worker tells for itself
            self.told.touch()

    def written(self) -> int:
        """About how many samples there are, with those of chunks being made."""
        result = self.manifest()["result"]
        each = math.prod(result["shape"]) * np.dtype(result["dtype"]).itemsize
        with os.scandir(self.chunks_folder) as entries:
            done = {int(match[1]) for entry in entries if (match := _RECORD.fullmatch(entry.name))}
        written, sizes = 0, self._sizes()
        for chunk in done | sizes.keys():
            first, end = self.span(chunk)
            whole = max(0, end - first)  # another run may have left chunks beyond this one's
            written += whole if chunk in done else min(whole, sizes[chunk] // each)
        return written

    def _sizes(self) -> dict[int, int]:
        """The bytes there are of the chunks that are being made; of two files of one the larger."""
        sizes: dict[int, int] = {}
        for path, name, _, _ in self._under_way():
            if name.endswith(".npy"):
                chunk = int(name.removesuffix(".npy"))
                with contextlib.suppress(FileNotFoundError):
                    sizes[chunk] = max(sizes.get(chunk, 0), path.stat().st_size)
        return sizes

    def write_sums(self) -> bool:
        """SHA256SUMS, as `sha256sum -c` reads it, if all chunks are done; whether they are."""
        lines = []
        for chunk in range(self.count()):
            record = self.record(chunk)
            if record is None:
                return False
            lines.append(f"{record['sha256']}  {self.file(chunk).relative_to(self.path).as_posix()}\n")
        text = "".join(lines)
        with explained(f"SHA256SUMS could not be written to {self.path}"):
            if not self.sums_file.exists() or self.sums_file.read_bytes() != text.encode():
                _write(self.sums_file, text)
        return True

    def tidy(self) -> None:
        """Once all chunks are done: remove what workers that died or are late left beside them."""
        self.claims()
        for path, name, *_ in self._under_way():
            if name[0].isdigit():  # of a chunk; another worker may be writing SHA256SUMS
                path.unlink(missing_ok=True)
        for kind in ("clock", "told"):
            for path in self.path.glob(f".*.{kind}"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def check_room(self, each: int) -> None:
        """OSError unless the file system has room for what is not done, of so many bytes each sample."""
        self.claims()  # what the dead left is removed
        sizes = self._sizes()
        spans = {chunk: self.span(chunk) for chunk in self.missing()}
        needed = sum(max(0, (end - first) * each - sizes.get(chunk, 0)) for chunk, (first, end) in spans.items())
        usage = shutil.disk_usage(self.path)
        free = usage.free
        if free < needed and usage.total:  # some file systems do not tell
            raise OSError(
                errno.ENOSPC,
                f"no room on the disk: {needed / 1e6:,.1f} MB are still to be written to {self.path}, "
                f"{free / 1e6:,.1f} MB are free",
            )


class Writer:
    """Writes the samples of a chunk, a micro-batch at a time; every write is a sign of life to other workers."""

    def __init__(self, folder: Folder, chunk: int, samples: int) -> None:
        self.folder, self.chunk, self.samples, self.path = folder, chunk, samples, _beside(folder.file(chunk))
        first, end = folder.span(chunk)
        self.problem = f"samples {first} to {end - 1} (chunk {chunk}) could not be written to {folder.path}"
        self.digest = hashlib.sha256()
        self.written = self.bytes = 0
        with explained(self.problem):
            self.file: IO[bytes] | None = open(self.path, "xb", buffering=0)

    def write(self, array: np.ndarray) -> None:
        """Append samples, [n, ...] and C-contiguous."""
        with explained(self.problem):
            if not self.written:
                self._put(npy_header((self.samples, *array.shape[1:]), array.dtype))
            self._put(array.data.cast("B"))
        self.written += len(array)

    def _put(self, data: bytes | memoryview) -> None:
        assert self.file is not None
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) or 0 :]
        self.digest.update(data)
        self.bytes += len(data)

    def commit(self, record: dict[str, Any]) -> None:
        """Put the file in its place, and its record beside it, unless another worker took this one for dead."""
        assert self.file is not None and self.written == self.samples
        first, end = self.folder.span(self.chunk)
        whole = {"sha256": self.digest.hexdigest(), "bytes": self.bytes, "samples": [first, end], **record}
        whole["run"] = self.folder.manifest()["run"]
        whole["check"] = _check_of(whole)
        with explained(self.problem):
            file, self.file = self.file, None
            with file:
                os.fsync(file.fileno())
                own = os.fstat(file.fileno())
            with contextlib.suppress(FileNotFoundError):  # then the other makes the chunk, or has made it
                os.replace(self.path, self.folder.file(self.chunk))
                _write(self.folder.record_file(self.chunk), json.dumps(whole) + "\n")
                there = self.folder.file(self.chunk).stat()
                if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                    return
        # two workers at once: where their bits differ, the record may be of one and the file of the other
        self.folder.check(self.chunk)

    def close(self) -> None:
        try:
            if self.file is not None:
                self.file.close()
        finally:
            self.file = None
            self.path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Where a process writes a file before it takes its place."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What stands in an .npy file before the array, in C order."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    )
    return header.getvalue()


def _write(path: Path, text: str, *, replace: bool = True) -> None:
    """A small file, whole or not at all; with replace=False one that is there already stays."""
    beside = _beside(path)
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(beside, path)
        else:
            try:
                os.link(beside, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not path.exists():
                    os.replace(beside, path)
        _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Make renames last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def explained(problem: str, ending: str = "; what was finished stays") -> Iterator[None]:
    """What the system says of a file, in words."""
    try:
        yield
    except OSError as error:
        told = "no room on the disk" if error.errno in _NO_ROOM else error.strerror
        raise OSError(error.errno, f"{told}: {problem}{ending}") from error


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"  # dead, but its parent, which many a container's first process is, has not asked for it


def _run_of(manifest: dict[str, Any]) -> str:
    """A hash of all in a manifest that decides samples."""
    told = {key: value for key, value in manifest.items() if key not in ("environment", "run")}
    told["network"] = manifest["network"]["probe"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _is_whole(manifest: dict[str, Any]) -> bool:
    try:
        return bool(manifest["run"] == _run_of(manifest) and isinstance(manifest["environment"], dict))
    except (KeyError, TypeError):
        return False


def _check_of(record: dict[str, Any]) -> str:
    """A hash of a record but for the hash itself."""
    told = {key: value for key, value in record.items() if key != "check"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _parsed(text: bytes) -> dict[str, Any]:
    """An object in JSON; empty for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
