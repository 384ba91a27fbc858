"""fastsft/store: whatever happens to its files, a reader says which file is bad, or reads what was written."""

import json
import os
import shutil

import pytest

from fastsft.store import Store, StoreError, StoreWriter, shard
from fastsft.store._files import checksum
from fastsft.store.shard import Shard
from tests.store._support import Samples, encoded, same_rows, settings, write

HEADER = 4096


@pytest.fixture(params=["1bit", "int8", "bf16"])
def path(request, tmp_path):
    return write(tmp_path / "store", Samples(7), format=request.param)


def refused(path, file, sentence, **how):
    """Opening says `sentence` of `file`, in one line."""
    with pytest.raises(StoreError, match=sentence) as error:
        Store.open(path, **how)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def sections(file):
    return Shard(file).header["sections"]


@pytest.mark.parametrize("verify", [True, False])
def test_cut_within_the_header(tmp_path, verify):
    path = write(tmp_path / "store", Samples(7))
    file = path / "shard-00000.fsk"
    size = file.stat().st_size
    for length in range(HEADER, -1, -1):
        os.truncate(file, length)
        refused(path, file, f"is cut off: it has {length} bytes, and was written with {size}", verify=verify)


def test_cut_within_the_header_without_a_manifest_to_tell(tmp_path):
    """What resume reads of a shard that is not listed yet."""
    file = write(tmp_path / "store", Samples(7)) / "shard-00001.fsk"
    for length in range(HEADER, -1, -1):
        os.truncate(file, length)
        with pytest.raises(StoreError, match=r"shard-00001\.fsk is cut off"):
            Shard(file)


def test_a_shard_of_another_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "VERSION", 2)
    path = write(tmp_path / "store", Samples(3))
    monkeypatch.undo()
    refused(path, path / "shard-00000.fsk", "states version 2 of the layout, this fastsft reads version 1")


@pytest.mark.parametrize("verify", [True, False])
def test_cut_within_a_section(path, verify):
    file = path / "shard-00000.fsk"
    content = file.read_bytes()
    for place in sections(file).values():
        begin, end = place["offset"], place["offset"] + place["bytes"]
        for length in {begin, begin + 1, (begin + end) // 2, end - 1, end} - {len(content)}:
            file.write_bytes(content[:length])
            refused(path, file, "is cut off", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_extra_bytes(path, verify):
    file = path / "shard-00001.fsk"
    with file.open("ab") as end:
        end.write(b"\0")
    refused(path, file, "has extra bytes", verify=verify)


@pytest.mark.parametrize("bit", [0, 7])
def test_every_byte_of_the_header_flipped(tmp_path, bit):
    path = write(tmp_path / "store", Samples(7))
    file = path / "shard-00000.fsk"
    with file.open("r+b", buffering=0) as open_file:
        for place in range(HEADER):
            flip(open_file, place, 1 << bit)
            refused(path, file, "is damaged|is not a shard|states version|is not the shard", verify=False)
            flip(open_file, place, 1 << bit)
    Store.open(path)


def flip(open_file, place, bits):
    open_file.seek(place)
    byte = open_file.read(1)[0]
    open_file.seek(place)
    open_file.write(bytes([byte ^ bits]))


def test_flipped_bytes_of_sections(path):
    """Every byte of the small sections and of the zeros between them; each 37th where there are many."""
    file = path / "shard-00000.fsk"
    places = sections(file)
    starts = [place["offset"] for place in places.values()]
    with file.open("r+b", buffering=0) as open_file:
        for name, start, stop in zip(places, starts, [*starts[1:], file.stat().st_size]):
            for place in {*range(start, stop, 37), start, start + places[name]["bytes"] - 1, stop - 1}:
                flip(open_file, place, 0x10)
                refused(path, file, f"is damaged: the section '{name}'")
                flip(open_file, place, 0x10)
    Store.open(path)


def test_without_verifying_the_ids_are_checked_when_asked_for(path):
    file = path / "shard-00000.fsk"
    with file.open("r+b", buffering=0) as open_file:
        flip(open_file, sections(file)["meta"]["offset"] + 9, 1)
    for ask in (Store.ids, Store.groups, lambda store: list(store.shards())):
        with pytest.raises(StoreError, match=r"shard-00000\.fsk is damaged: the section 'meta'"):
            ask(Store.open(path, verify=False))


def test_a_missing_shard(path):
    file = path / "shard-00000.fsk"
    file.unlink()
    refused(path, file, "is missing: the manifest lists it", verify=False)


def one_letter_samples(path, letters, seed):
    """Stores of equal settings whose shards all have one length."""
    with StoreWriter.create(path, **settings()) as writer:
        writer.append(Samples(len(letters), seed=seed).sketches, ids=list(letters), sources=["maths"] * len(letters))
    assert len({file.stat().st_size for file in path.glob("*.fsk")}) == 1
    return path


@pytest.mark.parametrize("verify", [True, False])
def test_shards_swapped(tmp_path, verify):
    path = one_letter_samples(tmp_path / "store", "abcdefgh", 0)
    first, second = path / "shard-00000.fsk", path / "shard-00001.fsk"
    first.rename(path / "kept")
    second.rename(first)
    (path / "kept").rename(second)
    refused(path, first, "is not the shard that .* lists", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_of_a_store_with_equal_settings(tmp_path, verify):
    path = one_letter_samples(tmp_path / "store", "abcd", 0)
    other = one_letter_samples(tmp_path / "other", "ijkl", 1)
    shutil.copyfile(other / "shard-00000.fsk", path / "shard-00000.fsk")
    refused(path, path / "shard-00000.fsk", "is not the shard that .* lists", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_of_another_store(path, verify):
    file = path / "shard-00000.fsk"
    format = Store.open(path).format
    other = write(path.parent / "other", Samples(7), format=format, model={"name": "other", "digest": "99"})
    shutil.copyfile(other / file.name, file)
    refused(path, file, "belongs to another store", verify=verify)


def test_a_folder_that_is_no_store(tmp_path):
    refused(tmp_path / "none", tmp_path / "none", "is not a store: it has no manifest")
    refused(tmp_path, tmp_path, "is not a store: it has no manifest")
    (tmp_path / "file").write_text("text")
    refused(tmp_path / "file", tmp_path / "file", "is not a store: it has no manifest")


def test_manifest_cut_anywhere(tmp_path):
    path = write(tmp_path / "store", Samples(7))
    file = path / "manifest.json"
    content = file.read_bytes()
    for length in range(len(content) - 1):
        file.write_bytes(content[:length])
        refused(path, file, "is not JSON")


def test_every_byte_of_the_manifest_flipped(tmp_path):
    """Refused, or it was white space."""
    path = write(tmp_path / "store", Samples(3))
    file = path / "manifest.json"
    content = file.read_bytes()
    for place in range(len(content)):
        for bits in (0x01, 0x20, 0x80):
            bad = bytearray(content)
            bad[place] ^= bits
            file.write_bytes(bad)
            if bytes(bad).split() != content.split():
                refused(path, file, "is not JSON|is not the manifest|has schema|does not have the checksum")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ([], "is not the manifest of a sketch store"),
        (3, "is not the manifest of a sketch store"),
        ({"name": "package"}, "is not the manifest of a sketch store"),
        ({"kind": "fastsft sketch store", "schema": 2}, "has schema 2, this fastsft reads schema 1"),
        ({"kind": "fastsft sketch store"}, "has schema None"),
        ({"kind": "fastsft sketch store", "schema": 1}, "does not have the checksum it states"),
    ],
)
def test_another_manifest(tmp_path, body, sentence):
    (tmp_path / "manifest.json").write_text(json.dumps(body))
    refused(tmp_path, tmp_path / "manifest.json", sentence)


def test_an_edited_manifest(path):
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    body["spec"]["seed"] = 1
    file.write_text(json.dumps(body))
    refused(path, file, "was damaged or edited")


def test_a_source_that_the_manifest_does_not_list(path):
    """Such a pair can't be written, but by another hand."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    del body["checksum"]
    body["sources"] = ["maths"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps(body | {"checksum": checksum(text.encode())}))
    with pytest.raises(
        StoreError, match=r"shard-0000\d\.fsk has rows of the source '\w+', which manifest.json does not"
    ):
        Store.open(path).groups()


def test_registered_files_are_checked(tmp_path):
    path, file = tmp_path / "store", tmp_path / "store/factors.bin"
    with StoreWriter.create(path, **settings()) as writer:
        file.write_bytes(b"factors")
        writer.register(file.name)
    Store.open(path)
    file.write_bytes(b"fActors")
    refused(path, file, "is damaged: its digest")
    file.write_bytes(b"factor")
    refused(path, file, "is cut off", verify=False)
    file.unlink()
    refused(path, file, "is missing", verify=False)


def test_resume_refuses_a_damaged_store(path):
    file = path / "shard-00000.fsk"
    with file.open("r+b", buffering=0) as open_file:
        flip(open_file, HEADER, 1)
    with pytest.raises(StoreError, match=r"shard-00000\.fsk is damaged"):
        StoreWriter.resume(path, **settings(Store.open(path, verify=False).format))
    assert not (path / "writer.lock").exists()


def test_an_undamaged_store_is_read_whole(path):
    store = Store.open(path)
    same_rows(store.rows(), encoded(Samples(7), store.format))
