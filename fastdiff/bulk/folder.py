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
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .job import FORMAT

LEASE = 120.0  # seconds without a sign of life after which another machine's chunk is made anew

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PIECE = 2**22  # bytes read at a time
_KEYS = ("format", "samples", "seed", "shape", "dtype", "store", "batch", "chunk", "conditions", "network", "result")
_BESIDE = re.compile(r"(\d{8,}\.(?:npy|json))\.([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]+\.tmp")  # as `_beside` names it


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
        if self._manifest is None:
            found = self._read_manifest()
            if found is None:
                raise ValueError(f"out: expected the folder of a run, with a manifest.json, got {self.path}")
            self._manifest = found
        return self._manifest

    def begin(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make the folder and its manifest, unless another process was faster; the manifest that stands there.

        Raises:
            ValueError: as `manifest`.  OSError: the folder cannot be written to.
        """
        if not self.manifest_file.exists():
            with _explained(f"the manifest could not be written to {self.path}"):
                self.chunks_folder.mkdir(parents=True, exist_ok=True)
                _write(self.manifest_file, json.dumps(manifest, indent=1) + "\n", replace=False)
        return self.manifest()

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            text = self.manifest_file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            text = ""
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict) or any(key not in found for key in _KEYS):
            raise ValueError(f"out: {self.manifest_file} is damaged; expected what a run wrote there")
        if found["format"] != FORMAT:
            raise ValueError(
                f"out: expected a folder of format {FORMAT}, got {found['format']!r} in {self.manifest_file}; "
                "another version of fastdiff made it"
            )
        return found

    # Chunks

    def count(self) -> int:
        """The number of chunks."""
        manifest = self.manifest()
        return -(-int(manifest["samples"]) // int(manifest["chunk"]))

    def file(self, chunk: int) -> Path:
        """Where the samples of a chunk are: .npy, [n, ...]."""
        return self.chunks_folder / f"{chunk:08}.npy"

    def record_file(self, chunk: int) -> Path:
        return self.chunks_folder / f"{chunk:08}.json"

    def record(self, chunk: int) -> dict[str, Any] | None:
        """The record of a chunk that is done, else None: no record, a damaged one, or no file of the size it says."""
        try:
            found = json.loads(self.record_file(chunk).read_bytes())
            if self.file(chunk).stat().st_size == found["bytes"] and len(found["sha256"]) == 64:
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def missing(self) -> list[int]:
        """The chunks that are not done."""
        return [chunk for chunk in range(self.count()) if self.record(chunk) is None]

    def intact(self, chunk: int) -> bool:
        """Whether a chunk is done and has the bytes that its record says."""
        record = self.record(chunk)
        if record is None:
            return False
        digest = hashlib.sha256()
        try:
            with open(self.file(chunk), "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError:
            return False
        return digest.hexdigest() == record["sha256"]

    def discard(self, chunk: int) -> None:
        """Make a damaged chunk one that is not done."""
        for path in (self.record_file(chunk), self.file(chunk)):
            path.unlink(missing_ok=True)

    def status(self) -> Status:
        manifest, count = self.manifest(), self.count()
        missing = self.missing()
        undone = sum(min(manifest["chunk"], manifest["samples"] - chunk * manifest["chunk"]) for chunk in missing)
        return Status(manifest["samples"], manifest["samples"] - undone, count, count - len(missing))

    # Making a chunk

    @contextlib.contextmanager
    def writing(self, chunk: int, samples: int) -> Iterator[Writer]:
        """A `Writer` for a chunk of so many samples; what it wrote is removed unless it was committed.

        Raises:
            OSError: with words for no room on the disk.
        """
        path = _beside(self.file(chunk))
        first = chunk * self.manifest()["chunk"]
        problem = f"samples {first} to {first + samples - 1} (chunk {chunk}) could not be written to {self.path}"
        with _explained(problem):
            writer = Writer(self, chunk, samples, path)
            try:
                yield writer
            finally:
                writer.close()

    def claims(self, lease: float = LEASE) -> set[int]:
        """The chunks that living processes are making; the files of dead ones are removed.

        A process lives while its file grows, `lease` seconds at most from one micro-batch to the next, and on this
        machine only while it has its number.
        """
        now, living = self.now(), set()
        with os.scandir(self.chunks_folder) as entries:
            for entry in entries:
                if (match := _BESIDE.fullmatch(entry.name)) is None:
                    continue
                name, host, process = match[1], match[2], int(match[3])
                try:
                    alive = now - entry.stat().st_mtime < lease and (host != _HOST or _is_running(process))
                except FileNotFoundError:
                    continue
                if not alive:
                    Path(entry.path).unlink(missing_ok=True)
                elif name.endswith(".npy"):
                    living.add(int(name.removesuffix(".npy")))
        return living

    def now(self) -> float:
        """The time by the clock of the file system, which all machines share."""
        self.mark.touch()
        return self.mark.stat().st_mtime

    @property
    def mark(self) -> Path:
        """A file of this machine, touched for the time and where it tells of its progress."""
        return self.path / f".{_HOST}.mark"

    def written(self) -> int:
        """About how many samples there are, with those of chunks being made."""
        manifest = self.manifest()
        each = max(1, int(np.prod(manifest["result"]["shape"], dtype=np.int64)))
        each *= np.dtype(manifest["result"]["dtype"]).itemsize
        size, samples, done = int(manifest["chunk"]), int(manifest["samples"]), set()
        under_way: dict[int, int] = {}
        with os.scandir(self.chunks_folder) as entries:
            for entry in entries:
                chunk = entry.name.partition(".")[0]
                if entry.name == f"{chunk}.json":
                    done.add(int(chunk))
                elif entry.name.endswith(".tmp"):
                    with contextlib.suppress(FileNotFoundError):
                        under_way[int(chunk)] = max(under_way.get(int(chunk), 0), entry.stat().st_size // each)
        whole = sum(min(size, samples - chunk * size) for chunk in done)
        return whole + sum(min(size, part) for chunk, part in under_way.items() if chunk not in done)

    def write_sums(self) -> None:
        """Once all chunks are done: SHA256SUMS, as `sha256sum -c` reads it."""
        lines = []
        for chunk in range(self.count()):
            record = self.record(chunk)
            if record is None:
                return
            lines.append(f"{record['sha256']}  {self.file(chunk).relative_to(self.path).as_posix()}\n")
        text = "".join(lines)
        if not self.sums_file.exists() or self.sums_file.read_text() != text:
            with _explained(f"SHA256SUMS could not be written to {self.path}"):
                _write(self.sums_file, text)

    def check_room(self, needed: int) -> None:
        """OSError unless the file system has so many bytes left."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"no room on the disk: {needed / 1e6:,.1f} MB are still to be written to {self.path}, "
                f"{free / 1e6:,.1f} MB are free",
            )


class Writer:
    """Writes the samples of a chunk, a micro-batch at a time; every write is a sign of life to other workers."""

    def __init__(self, folder: Folder, chunk: int, samples: int, path: Path) -> None:
        self.folder, self.chunk, self.samples, self.path = folder, chunk, samples, path
        self.digest = hashlib.sha256()
        self.written = self.bytes = 0
        self.file: IO[bytes] | None = open(path, "xb", buffering=0)

    def write(self, array: np.ndarray) -> None:
        """Append samples, [n, ...] and C-contiguous."""
        if not self.written:
            self._put(_npy_header((self.samples, *array.shape[1:]), array.dtype))
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
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        try:
            os.replace(self.path, self.folder.file(self.chunk))
        except FileNotFoundError:
            return  # it is making the chunk now
        whole = {"sha256": self.digest.hexdigest(), "bytes": self.bytes, **record}
        _write(self.folder.record_file(self.chunk), json.dumps(whole) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        self.path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Where a process writes a file before it takes its place."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
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
def _explained(problem: str) -> Iterator[None]:
    """OSErrors of a full disk in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(error.errno, f"no room on the disk: {problem}; what was finished stays") from error


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
