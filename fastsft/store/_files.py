"""Files that a kill at any moment leaves whole, checksums, and the lock that keeps a second writer out."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import xxhash

Buffer = bytes | memoryview
TEMPORARY = ".tmp"


class StoreError(ValueError):
    """A store that can't be read, or must not be written or compared, with the file and the way out."""


def checksum(*parts: Buffer) -> str:
    """Return the xxh3_64 of the parts one after another, 16 hexadecimal digits."""
    hash = xxhash.xxh3_64()
    for part in parts:
        hash.update(part)
    return hash.hexdigest()


def file_checksum(path: Path) -> str:
    hash = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hash.update(chunk)
    return hash.hexdigest()


def write_whole(path: Path, parts: Iterable[Buffer]) -> None:
    """Write a file under a temporary name, and rename it when its bytes are on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # The new name is an entry of the folder, which has to reach the disk as well.
        os.fsync(folder)
    finally:
        os.close(folder)


class Lock:
    """The right to write into a folder: `writer.lock`, which the kernel frees when its holder dies.

    A lock of the kernel and not the mere presence of a file: process numbers are given again, so a file left by a
    dead writer could not be told from a living one's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "writer.lock"
        self._descriptor = self._take()
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _take(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise StoreError(
                    f"{self.path} is held by {holder}, which is writing this store. "
                    f"Wait for it, or give each writer a folder of its own (rank000, rank001, ...)."
                ) from None
            if self._is_still_there(descriptor):
                return descriptor
            # The holder before us removed the file between our opening and our locking it.
            os.close(descriptor)

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
