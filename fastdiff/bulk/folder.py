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
_MANIFEST = {"format": int, "samples": int, "seed": int, "shape": list, "dtype": str, "store": str, "batch": int}
_MANIFEST |= {"chunk": int, "conditions": dict, "network": dict, "result": dict, "environment": dict}
_BESIDE = re.compile(r"(\d{8,}\.(?:npy|json))\.([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]+\.tmp")  # as `_beside` names it
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
        if self._manifest is None:
            found = self._read_manifest()
            if found is None:
                raise ValueError(f"out: expected the folder of a run, with a manifest.json, got {self.path}")
            self._manifest = found
        return self._manifest

    def begin(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make the folder and its manifest, unless another process was faster; the manifest that stands there.

        Raises:
            ValueError: as `manifest`; a file is in the way.  OSError: the folder cannot be written to.
        """
        with _explained(f"the manifest could not be written to {self.path}"):
            try:
                self.chunks_folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"out: expected a folder, got {self.path}, where a file is in the way") from None
            if not self.manifest_file.exists():
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
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"out: expected a folder of format {FORMAT}, got {found['format']!r} in {self.manifest_file}; "
                "another version of fastdiff made it"
            )
        if not isinstance(found, dict) or not _is_manifest(found):
            raise ValueError(f"out: {self.manifest_file} is damaged; expected what a run wrote there")
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
        manifest = self.manifest()
        first = chunk * manifest["chunk"]
        span = [first, min(first + manifest["chunk"], manifest["samples"])]
        try:
            found = json.loads(self.record_file(chunk).read_bytes())
            whole = found["samples"] == span and isinstance(found["labels"], dict) and isinstance(found["sha256"], str)
            if whole and self.file(chunk).stat().st_size == found["bytes"]:
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
            elif age < lease and name.endswith(".npy"):
                living.add(int(name.removesuffix(".npy")))
        return living

    def _under_way(self) -> Iterator[tuple[Path, str, str, int]]:
        """(path, name to be, host, process) of each file that is being made."""
        with os.scandir(self.chunks_folder) as entries:
            for entry in entries:
                if (match := _BESIDE.fullmatch(entry.name)) is not None:
                    yield Path(entry.path), match[1], match[2], int(match[3])

    def now(self) -> float:
        """The time by the clock of the file system, which all machines share."""
        clock = self.path / f".{_HOST}.clock"
        while True:
            with _explained(f"{clock} could not be written"):
                clock.touch()
            with contextlib.suppress(FileNotFoundError):  # a worker that is done removed it
                return clock.stat().st_mtime

    @property
    def told(self) -> Path:
        """A file of this machine, touched when one of its workers tells of the progress."""
        return self.path / f".{_HOST}.told"

    def tell(self) -> None:
        with contextlib.suppress(OSError):  # where that cannot be noted, each worker tells for itself
            self.told.touch()

    def written(self) -> int:
        """About how many samples there are, with those of chunks being made."""
        manifest = self.manifest()
        each = max(1, int(np.prod(manifest["result"]["shape"], dtype=np.int64)))
        each *= np.dtype(manifest["result"]["dtype"]).itemsize
        size, samples = int(manifest["chunk"]), int(manifest["samples"])
        with os.scandir(self.chunks_folder) as entries:
            done = {int(match[1]) for entry in entries if (match := _RECORD.fullmatch(entry.name))}
        under_way: dict[int, int] = {}
        for path, name, _, _ in self._under_way():
            with contextlib.suppress(FileNotFoundError):
                chunk = int(name.partition(".")[0])
                under_way[chunk] = max(under_way.get(chunk, 0), path.stat().st_size // each)
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
        if not self.sums_file.exists() or self.sums_file.read_bytes() != text.encode():
            with _explained(f"SHA256SUMS could not be written to {self.path}"):
                _write(self.sums_file, text)

    def tidy(self) -> None:
        """Once all chunks are done: remove what workers that died or are late left beside them."""
        for path, *_ in self._under_way():
            path.unlink(missing_ok=True)
        for kind in ("clock", "told"):
            for path in self.path.glob(f".*.{kind}"):
                path.unlink(missing_ok=True)

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

    def __init__(self, folder: Folder, chunk: int, samples: int) -> None:
        self.folder, self.chunk, self.samples, self.path = folder, chunk, samples, _beside(folder.file(chunk))
        first = chunk * folder.manifest()["chunk"]
        self.problem = f"samples {first} to {first + samples - 1} (chunk {chunk}) could not be written to {folder.path}"
        self.digest = hashlib.sha256()
        self.written = self.bytes = 0
        with _explained(self.problem):
            self.file: IO[bytes] | None = open(self.path, "xb", buffering=0)

    def write(self, array: np.ndarray) -> None:
        """Append samples, [n, ...] and C-contiguous."""
        with _explained(self.problem):
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
        whole = {"sha256": self.digest.hexdigest(), "bytes": self.bytes, **record}
        with _explained(self.problem):
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
            with contextlib.suppress(FileNotFoundError):  # then the other makes the chunk, or has made it
                os.replace(self.path, self.folder.file(self.chunk))
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
    """What the system says of writing a file, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(error.errno, f"no room on the disk: {problem}; what was finished stays") from error
        raise OSError(error.errno, f"{error.strerror}: {problem}; what was finished stays") from error


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


def _is_manifest(found: dict[str, Any]) -> bool:
    """Whether there is in it what this module and its callers read."""
    return (
        all(isinstance(found.get(key), kind) for key, kind in _MANIFEST.items())
        and min(found["samples"], found["batch"], found["chunk"]) >= 1
        and {"name", "probe"} <= found["network"].keys()
        and {"shape", "dtype"} <= found["result"].keys()
    )
