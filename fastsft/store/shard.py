"""One file of rows: a header of 4096 bytes, then sections that begin at multiples of 4096. Little endian.

    0    8   magic "fsftrows"
    8    4   version of this layout, unsigned
    12   8   xxh3_64 of the header's other bytes, unsigned
    20       JSON, filled with spaces up to byte 4096: store (digest of what all shards have in common), number,
             previous (digest of the shard before), rows, size, blocks, format, sections {name: offset, bytes, checksum}

Sections: `data` and `scales` as `fastsft.ops.encode_rows` makes them (bf16 has no scales), `meta` a parquet table
(id, source, step, tokens). A section's checksum takes in the zeros up to the next, so no byte of a file goes unchecked.
"""

# N rows, K numbers of a row, M blocks

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastsft.ops import Rows
from fastsft.store._files import StoreError, checksum, write_whole
from fastsft.store.manifest import Manifest, ShardEntry

MAGIC = b"fsftrows"
VERSION = 1
ALIGN = 4096
SUFFIX = ".fsk"
_FIXED = struct.Struct("<8sIQ")

META = pa.schema({"id": pa.string(), "source": pa.string(), "step": pa.int64(), "tokens": pa.int64()})


def shard_name(number: int) -> str:
    return f"shard-{number:05d}{SUFFIX}"


def write_shard(folder: Path, manifest: Manifest, rows: Rows, meta: pa.Table) -> ShardEntry:
    """Write the shard that comes after those of `manifest`, whole, and return its entry."""
    number, scales = len(manifest.shards), rows.scales
    contents = {"data": _bytes_of(rows.data)} | ({} if scales is None else {"scales": _bytes_of(scales)})
    contents["meta"] = memoryview(_parquet(meta))
    sections: dict[str, Any] = {}
    parts: list[bytes | memoryview] = []
    offset = ALIGN
    for name, content in contents.items():
        # The last section ends the file.
        zeros = bytes(0 if name == "meta" else -content.nbytes % ALIGN)
        sections[name] = {"offset": offset, "bytes": content.nbytes, "checksum": checksum(content, zeros)}
        parts += [content, zeros]
        offset += content.nbytes + len(zeros)
    header = {
        "store": manifest.identity,
        "number": number,
        "previous": manifest.shards[-1].digest if manifest.shards else "",
        "rows": meta.num_rows,
        "size": manifest.size,
        "blocks": manifest.blocks,
        "format": manifest.format,
        "sections": sections,
    }
    head, digest = _pack(header)
    path = folder / shard_name(number)
    write_whole(path, [head, *parts])
    return ShardEntry(file=path.name, rows=meta.num_rows, bytes=offset, digest=digest)


class Shard:
    """A finished shard, mapped when its rows are first asked for. Opening checks the header and the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.digest = _read_header(path)
        last = self.header["sections"]["meta"]
        self.bytes = last["offset"] + last["bytes"]
        check_size(path, self.bytes)

    @property
    def num_rows(self) -> int:
        return self.header["rows"]

    @cached_property
    def _map(self) -> Tensor:
        # A private map: pages come in when touched, nobody's write reaches the file, and no descriptor stays open.
        return torch.from_file(str(self.path), shared=False, size=self.bytes, dtype=torch.uint8)

    def _section(self, name: str) -> Tensor:
        place = self.header["sections"][name]
        return self._map[place["offset"] : place["offset"] + place["bytes"]]

    @property
    def entry(self) -> ShardEntry:
        return ShardEntry(file=self.path.name, rows=self.num_rows, bytes=self.bytes, digest=self.digest)

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows start..stop as tensors over the file; changing them changes only this process's copy."""
        format, N = self.header["format"], self.num_rows
        types = {"bf16": torch.bfloat16, "int8": torch.int8, "1bit": torch.uint8}
        data = self._section("data").view(types[format]).view(N, -1)
        scales = None if format == "bf16" else self._section("scales").view(torch.float32).view(N, -1)
        return cut_rows(Rows(format, data, scales), start, stop)

    @cached_property
    def meta(self) -> pa.Table:
        """Return id, source, step and tokens of every row; their checksum is compared."""
        self._verify_section("meta")
        return pq.read_table(pa.BufferReader(pa.py_buffer(self._section("meta").numpy())))

    def verify(self) -> None:
        """Read the file once and compare the checksum of every section."""
        for name in self.header["sections"]:
            self._verify_section(name)

    def _verify_section(self, name: str) -> None:
        places = self.header["sections"]
        start = places[name]["offset"]
        stop = min([place["offset"] for place in places.values() if place["offset"] > start], default=self.bytes)
        if checksum(self._map[start:stop].numpy().data) != places[name]["checksum"]:
            raise StoreError(
                f"{self.path} is damaged: the section {name!r} does not have the checksum that the header states. "
                f"{_WAY_OUT}"
            )


def meta_table(columns: Mapping[str, Sequence[Any] | None]) -> pa.Table:
    """Make the table of META; a column that is None is null in every row."""
    length = len(columns["id"] or ())
    filled = {name: [None] * length if values is None else list(values) for name, values in columns.items()}
    return pa.table(filled, schema=META)


def cut_rows(rows: Rows, start: int, stop: int | None) -> Rows:
    return Rows(rows.format, rows.data[start:stop], None if rows.scales is None else rows.scales[start:stop])


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Put rows after one another; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scales for part in parts if part.scales is not None]
    return Rows(parts[0].format, torch.cat([part.data for part in parts]), torch.cat(scales) if scales else None)


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is shorter or longer than it was when written."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: the manifest lists it. {_WAY_OUT}") from None
    if size != expected:
        what = "is cut off" if size < expected else "has extra bytes"
        raise StoreError(f"{path} {what}: it has {size} bytes, and was written with {expected}. {_WAY_OUT}")


_WAY_OUT = "Copy the file again from where it was written, or write the store again."


def _read_header(path: Path) -> tuple[dict[str, Any], str]:
    with path.open("rb") as file:
        head = file.read(ALIGN)
    if head[:8] != MAGIC[: len(head)]:
        raise StoreError(f"{path} is not a shard of a sketch store: it does not begin with {MAGIC!r}. {_WAY_OUT}")
    if len(head) < ALIGN:
        raise StoreError(f"{path} is cut off: it ends within its header, after {len(head)} bytes. {_WAY_OUT}")
    _, version, said = _FIXED.unpack_from(head)
    if version != VERSION:
        raise StoreError(
            f"{path} states version {version} of the layout, this fastsft reads version {VERSION}: "
            f"it is damaged, or another fastsft wrote it. {_WAY_OUT}"
        )
    if _header_checksum(head) != f"{said:016x}":
        raise StoreError(f"{path} is damaged: its header does not have the checksum that it states. {_WAY_OUT}")
    return json.loads(head[_FIXED.size :]), f"{said:016x}"


def _pack(header: dict[str, Any]) -> tuple[bytes, str]:
    text = json.dumps(header).encode().ljust(ALIGN - _FIXED.size)
    assert len(text) == ALIGN - _FIXED.size
    digest = _header_checksum(_FIXED.pack(MAGIC, VERSION, 0) + text)
    return _FIXED.pack(MAGIC, VERSION, int(digest, 16)) + text, digest


def _header_checksum(head: bytes) -> str:
    return checksum(head[:12], head[_FIXED.size :])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _parquet(meta: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(meta, sink, compression="zstd", use_dictionary=["source"], write_statistics=False)
    return sink.getvalue()
