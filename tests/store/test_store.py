"""fastsft/store: what is written is what is read, however it was cut into appends, shards and runs."""

import fcntl
import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsft import ops
from fastsft.store import Store, StoreError, StoreWriter, is_store
from fastsft.store._files import Lock
from fastsft.store.manifest import load_manifest
from fastsft.store.shard import ALIGN, Shard, _pack
from tests.store._support import SOURCES, Samples, encoded, same_rows, settings, write


@pytest.mark.parametrize("format", ops.FORMATS)
@pytest.mark.parametrize("blocks", [1, 3, ["attention", "gate", "down"]])
@pytest.mark.parametrize("number", [1, 4, 11])
def test_what_is_read_is_what_was_written(tmp_path, format, blocks, number):
    samples = Samples(number)
    store = Store.open(write(tmp_path / "store", samples, format=format, blocks=blocks))
    num_blocks = blocks if isinstance(blocks, int) else len(blocks)
    same_rows(store.rows(), encoded(samples, format, num_blocks))
    assert len(store) == number
    assert store.complete
    assert (store.size, store.format, store.blocks) == (192, format, num_blocks)
    assert store.manifest.block_names == ([] if isinstance(blocks, int) else blocks)
    assert store.spec == settings()["spec"]
    assert store.model == {"name": "tiny", "digest": "0123"}
    assert store.sources == SOURCES
    assert store.ids() == samples.ids
    assert store.groups().tolist() == samples.groups
    assert store.meta["step"].to_pylist() == samples.steps
    assert store.meta["tokens"].to_pylist() == samples.tokens


@pytest.mark.parametrize("format", ops.FORMATS)
def test_every_range_of_rows(tmp_path, format):
    samples = Samples(10)
    store = Store.open(write(tmp_path / "store", samples, format=format))
    whole = encoded(samples, format)
    for start in range(10):
        for stop in range(start + 1, 11):
            expected = None if whole.scales is None else whole.scales[start:stop]
            same_rows(store.rows(start, stop), ops.Rows(format, whole.data[start:stop], expected))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (4, 2), (0, 11)])
def test_a_range_outside_is_refused(tmp_path, start, stop):
    store = Store.open(write(tmp_path / "store", Samples(10)))
    with pytest.raises(ValueError, match=r"range within the 10 rows: got"):
        store.rows(start, stop)


def test_shards_come_in_order_with_their_groups(tmp_path):
    samples = Samples(10)
    store = Store.open(write(tmp_path / "store", samples))
    shards = list(store.shards())
    assert [first for first, _, _ in shards] == [0, 4, 8]
    assert [len(rows.data) for _, rows, _ in shards] == [4, 4, 2]
    assert torch.cat([groups for _, _, groups in shards]).tolist() == samples.groups
    assert all(groups.dtype == torch.int64 for _, _, groups in shards)
    same_rows(shards[1][1], store.rows(4, 8))


def test_a_store_without_rows(tmp_path):
    store = Store.open(write(tmp_path / "store", Samples(0)))
    assert (len(store), store.ids(), store.groups().tolist(), list(store.shards())) == (0, [], [], [])


def test_steps_and_tokens_may_be_unknown(tmp_path):
    samples = Samples(6)
    with StoreWriter.create(tmp_path / "store", **settings()) as writer:
        writer.append(samples.sketches, ids=samples.ids, sources=samples.sources)
    store = Store.open(tmp_path / "store")
    assert store.meta["step"].to_pylist() == [None] * 6
    assert store.meta["tokens"].to_pylist() == [None] * 6


def test_ids_are_any_text(tmp_path):
    samples = Samples(3)
    samples.ids = ["", "naïve/ünï 数学\n\t'", "x" * 100_000]
    assert Store.open(write(tmp_path / "store", samples)).ids() == samples.ids


@pytest.mark.parametrize("piece", [1, 2, 5, 23])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_bytes_on_disk_do_not_depend_on_how_rows_were_appended(tmp_path, format, piece):
    samples = Samples(23)
    with StoreWriter.create(tmp_path / "pieces", **settings(format)) as writer:
        for start in range(0, 23, piece):
            samples.append(writer, start, start + piece)
    threes = write(tmp_path / "threes", samples, format=format)
    assert shard_bytes(tmp_path / "pieces") == shard_bytes(threes)


def shard_bytes(path):
    return {file.name: file.read_bytes() for file in path.glob("*.fsk")}


def test_readers_see_finished_shards_only(tmp_path):
    samples = Samples(10)
    writer = StoreWriter.create(tmp_path / "store", **settings())
    samples.append(writer)
    store = Store.open(tmp_path / "store")
    assert len(writer) == 10
    assert store.ids() == samples.ids[:8]
    assert not store.complete
    writer.close()
    assert Store.open(tmp_path / "store").ids() == samples.ids


def test_rows_are_mapped_and_not_loaded(tmp_path):
    size, number = 64 * 1024, 512
    samples = Samples(4, size)
    with StoreWriter.create(tmp_path / "store", **settings("bf16", size, shard_rows=256)) as writer:
        for start in range(0, number, 4):
            writer.append(samples.sketches, ids=[str(start + row) for row in range(4)], sources=["maths"] * 4)
    gc.collect()
    before = resident()
    store = Store.open(tmp_path / "store", verify=False)
    shards = [rows for _, rows, _ in store.shards()]
    rows = store.rows(300, 310)
    assert torch.equal(rows.data, samples.sketches[[0, 1, 2, 3] * 2 + [0, 1]].bfloat16())
    assert shards[1].data.data_ptr() + 44 * 2 * size == rows.data.data_ptr()
    # 64 MiB of rows are mapped
    assert resident() - before < 8 * 2**20


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_shard_of_more_than_4_gigabytes(tmp_path):
    """A file of holes, with one number at its end: offsets within it pass 2**32."""
    N, K, file = 40_000, 65_536, tmp_path / "shard-00000.fsk"
    end = ALIGN + 2 * N * K
    header = {"rows": N, "format": "bf16", "sections": {"data": {"offset": ALIGN, "bytes": 2 * N * K}}}
    header["sections"]["meta"] = {"offset": end, "bytes": 0}
    with file.open("wb") as holes:
        holes.write(_pack(header)[0])
        holes.seek(end - 2)
        holes.write(torch.tensor([3.0], dtype=torch.bfloat16).view(torch.uint8).numpy().data)
    rows = Shard(file).rows(N - 2)
    assert rows.data.shape == (2, K)
    assert rows.data[1, -3:].tolist() == [0, 0, 3]


def test_more_rows_than_32_bits_can_count():
    class Huge:
        num_rows = 2**31 + 5

        def rows(self, start, stop):
            return ops.Rows("bf16", torch.arange(start, min(stop, self.num_rows))[:, None], None)

    store = Store(Path(), {}, [Huge(), Huge()])
    assert len(store) == 2**32 + 10
    assert store.rows(2**31 + 3, 2**31 + 7).data.flatten().tolist() == [2**31 + 3, 2**31 + 4, 0, 1]
    assert store.rows(2**32 + 8, 2**32 + 10).data.flatten().tolist() == [2**31 + 3, 2**31 + 4]


def test_mapping_takes_no_open_files(tmp_path):
    store = Store.open(write(tmp_path / "store", Samples(40)))
    before = len(os.listdir("/proc/self/fd"))
    kept = [rows for _, rows, _ in store.shards()]
    assert len(kept) == 10
    assert len(os.listdir("/proc/self/fd")) == before


def test_writing_into_rows_does_not_reach_the_file(tmp_path):
    samples = Samples(4)
    store = Store.open(write(tmp_path / "store", samples))
    store.rows().data.zero_()
    same_rows(Store.open(tmp_path / "store").rows(), encoded(samples))


def test_reading_warns_of_nothing(tmp_path, recwarn):
    store = Store.open(write(tmp_path / "store", Samples(9)))
    for _, rows, groups in store.shards():
        ops.decode_rows(rows)
        groups + 1
    assert not recwarn.list


# resume


def test_resume_goes_on_after_the_last_whole_shard(tmp_path):
    samples = Samples(23)
    writer = StoreWriter.create(tmp_path / "store", **settings())
    samples.append(writer, 0, 14)
    writer.abandon()
    writer = StoreWriter.resume(tmp_path / "store", **settings())
    assert len(writer) == 12
    assert writer.ids == set(samples.ids[:12])
    samples.append(writer, len(writer))
    writer.close()
    assert shard_bytes(tmp_path / "store") == shard_bytes(write(tmp_path / "unbroken", samples))


def test_append_after_a_closed_store_was_resumed(tmp_path):
    samples = Samples(20)
    with StoreWriter.create(tmp_path / "store", **settings()) as writer:
        samples.append(writer, 0, 9)
    with StoreWriter.resume(tmp_path / "store", **settings()) as writer:
        assert len(writer) == 9
        assert not Store.open(tmp_path / "store").complete
        samples.append(writer, 9)
    store = Store.open(tmp_path / "store")
    assert store.complete
    assert store.ids() == samples.ids
    same_rows(store.rows(), encoded(samples))


WRITER = """
import itertools, sys
from fastsft.store import StoreWriter
from fastsft.store._files import Lock
from fastsft.store.manifest import load_manifest
from tests.store._support import Samples, settings
samples = Samples(1000)
writer = getattr(StoreWriter, sys.argv[2])(sys.argv[1], **settings())
for row in range(len(writer), 1000):
    samples.append(writer, row, row + 1)
    print(row, flush=True)
"""


def test_a_killed_writer_loses_only_its_open_shard(tmp_path):
    path, samples = tmp_path / "store", Samples(1000)
    verb = "create"
    # twice: the second time it had been resumed
    for rows in (30, 50):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), verb],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for line in process.stdout:
            if int(line) >= rows:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        number = len(Store.open(path))
        assert number % 4 == 0
        assert number >= rows // 4 * 4
        verb = "resume"
    with StoreWriter.resume(path, **settings()) as writer:
        assert len(writer) >= number
        samples.append(writer, len(writer))
    assert shard_bytes(path) == shard_bytes(write(tmp_path / "unbroken", samples))
    assert Store.open(path).ids() == samples.ids


def interrupted(path, samples, unlisted=1):
    """A store whose last shards are on disk but not in its manifest, as after a kill between the two writes."""
    write(path, samples)
    manifest = load_manifest(path)
    replace(manifest, shards=manifest.shards[:-unlisted], complete=False).save(path)
    return path


@pytest.mark.parametrize("unlisted", [1, 2, 3])
def test_a_shard_finished_but_not_listed_is_taken_in(tmp_path, unlisted):
    samples = Samples(12)
    path = interrupted(tmp_path / "store", samples, unlisted)
    assert len(Store.open(path)) == 12 - 4 * unlisted
    with StoreWriter.resume(path, **settings()) as writer:
        assert writer.ids == set(samples.ids)
    assert Store.open(path).ids() == samples.ids


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "another place"])
def test_an_unlisted_shard_that_does_not_belong_is_written_again(tmp_path, damage):
    samples = Samples(12)
    path = interrupted(tmp_path / "store", samples)
    file = path / "shard-00002.fsk"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-1]
    elif damage == "flipped":
        content[5000] ^= 1
    elif damage == "foreign":
        content = (write(tmp_path / "other", Samples(12, seed=1)) / file.name).read_bytes()
    else:
        content = (path / "shard-00001.fsk").read_bytes()
    file.write_bytes(content)
    with StoreWriter.resume(path, **settings()) as writer:
        assert len(writer) == 8
        samples.append(writer, 8)
    assert shard_bytes(path) == shard_bytes(write(tmp_path / "unbroken", samples))


def test_temporary_files_are_ignored_and_removed_by_resume(tmp_path):
    path = write(tmp_path / "store", Samples(6))
    (path / "shard-00002.fsk.tmp").write_bytes(b"half a sha")
    (path / "manifest.json.tmp").write_bytes(b"{")
    assert len(Store.open(path)) == 6
    StoreWriter.resume(path, **settings()).close()
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "shard-00000.fsk", "shard-00001.fsk"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": settings()["spec"] | {"seed": 1}}, r"spec\.seed = 0 against 1"),
        ({"spec": settings()["spec"] | {"whitening": "ab"}}, r"spec\.whitening = None against 'ab'"),
        ({"format": "1bit"}, "format = 'int8' against '1bit'"),
        ({"size": 256}, r"(size = 192 against 256)"),
        ({"blocks": 3}, "blocks = 1 against 3"),
        ({"blocks": ["all"]}, "block_names"),
        ({"sources": ["maths"]}, "sources"),
        ({"model": {"name": "tiny", "digest": "4567"}}, r"model\.digest = '0123' against '4567'"),
        ({"shard_rows": 5}, "shard_rows = 4 against 5"),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path, change, field):
    path = write(tmp_path / "store", Samples(6))
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=field) as error:
        StoreWriter.resume(path, **(settings() | change))
    assert str(path / "manifest.json") in str(error.value)
    assert (path / "manifest.json").read_bytes() == before
    assert not (path / "writer.lock").exists()


def test_resume_where_nothing_was_begun_is_refused(tmp_path):
    assert not is_store(tmp_path)
    with pytest.raises(StoreError, match=r"is not a store: it has no manifest.json"):
        StoreWriter.resume(tmp_path, **settings())


def test_create_over_a_store_is_refused(tmp_path):
    path = write(tmp_path / "store", Samples(6))
    assert is_store(path)
    with pytest.raises(StoreError, match=r"exists already\. Resume"):
        StoreWriter.create(path, **settings())
    assert len(Store.open(path)) == 6
    (path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"shard-00000\.fsk exists already"):
        StoreWriter.create(path, **settings())


# one writer a folder


def test_a_second_writer_is_refused(tmp_path):
    writer = StoreWriter.create(tmp_path / "store", **settings())
    for verb in (StoreWriter.create, StoreWriter.resume):
        with pytest.raises(StoreError, match=rf"writer\.lock is held by process {os.getpid()} on "):
            verb(tmp_path / "store", **settings())
    writer.close()
    StoreWriter.resume(tmp_path / "store", **settings()).close()


def test_the_lock_file_of_a_dead_writer_stops_nobody(tmp_path):
    path = write(tmp_path / "store", Samples(6))
    (path / "writer.lock").write_text(f"process {os.getpid()} on here")
    StoreWriter.resume(path, **settings()).close()
    assert not (path / "writer.lock").exists()


def test_a_lock_file_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    """The holder before us closes its store between our opening of the file and our locking it."""
    lock_file, flock = tmp_path / "writer.lock", fcntl.flock

    def close_first(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        lock_file.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", close_first)
    lock = Lock(tmp_path)
    with pytest.raises(StoreError, match=f"held by process {os.getpid()}"):
        Lock(tmp_path)
    lock.release()
    assert not lock_file.exists()


def test_an_exception_inside_with_leaves_the_open_shard_out(tmp_path):
    samples = Samples(6)

    def fail():
        with StoreWriter.create(tmp_path / "store", **settings()) as writer:
            samples.append(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    store = Store.open(tmp_path / "store")
    assert store.ids() == samples.ids[:4]
    assert not store.complete


# bad rows


def test_a_bad_append_takes_nothing(tmp_path):
    samples = Samples(8)
    with StoreWriter.create(tmp_path / "store", **settings()) as writer:
        samples.append(writer, 0, 3)
        samples.sketches[5, 7] = float("nan")
        with pytest.raises(StoreError, match="sketch of sample 'sample-00005' has NaN or infinity"):
            samples.append(writer, 3)
        samples.sketches[5, 7] = 0
        samples.append(writer, 3)
    assert Store.open(tmp_path / "store").ids() == samples.ids


@pytest.mark.parametrize("steps", [None, [3, 3]])
def test_a_sample_twice_is_refused(tmp_path, steps):
    writer = StoreWriter.create(tmp_path / "store", **settings())
    two = {"sources": ["maths"] * 2, "steps": steps}
    with pytest.raises(StoreError, match=r"holds the sample 'a' (without a step|at step 3) already"):
        writer.append(torch.ones(2, 192), ids=["a", "a"], **two)
    writer.append(torch.ones(2, 192), ids=["a", "b"], **two)
    with pytest.raises(StoreError, match=r"holds the sample 'b'"):
        writer.append(torch.ones(2, 192), ids=["c", "b"], **two)
    writer.append(torch.ones(2, 192), ids=["a", "b"], sources=["maths"] * 2, steps=[4, 4])
    writer.close()
    writer = StoreWriter.resume(tmp_path / "store", **settings())
    with pytest.raises(StoreError, match=r"holds the sample 'b'"):
        writer.append(torch.ones(2, 192), ids=["c", "b"], **two)
    writer.abandon()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sources": ["maths", "poems"]}, r"manifest\.json does not know the source 'poems'"),
        ({"sources": ["maths"]}, "`sources` must be a list of one a sketch"),
        ({"sources": "maths"}, "`sources` must be a list of one a sketch"),
        ({"ids": ["a"]}, "`ids` must be a list of one a sketch"),
        ({"ids": ["a", 7]}, "`ids` must be strings: got 7"),
        ({"steps": [1.5, 2]}, r"`steps` must be whole numbers: got 1\.5"),
        ({"tokens": ["3", 2]}, "`tokens` must be whole numbers: got '3'"),
        ({"steps": [1]}, "`steps` must be a list of one a sketch"),
        ({"tokens": [1, 2, 3]}, "`tokens` must be a list of one a sketch"),
        ({"sketches": torch.ones(2, 128)}, r"K=192 numbers: got \(2, 128\)"),
        ({"sketches": torch.ones(192)}, r"K=192 numbers: got \(192,\)"),
        ({"sketches": torch.ones(2, 192, dtype=torch.int32)}, r"got \(2, 192\) of torch.int32"),
    ],
)
def test_what_append_refuses(tmp_path, change, sentence):
    good = {"sketches": torch.ones(2, 192), "ids": ["a", "b"], "sources": ["maths", "code"]}
    with StoreWriter.create(tmp_path / "store", **settings()) as writer:
        with pytest.raises((ValueError, TypeError), match=sentence):
            writer.append(**(good | change))
        assert len(writer) == 0
        writer.append(**good)
    assert len(Store.open(tmp_path / "store")) == 2


@pytest.mark.parametrize("format", ops.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_callers_tensor_may_be_used_again(tmp_path, device, format, dtype):
    """It may also carry a gradient, be no contiguous piece of memory, and lie on a GPU."""
    samples = Samples(6)
    wide = torch.empty(192, 6, dtype=dtype, device=device).T
    with StoreWriter.create(tmp_path / "store", **settings(format)) as writer:
        for start in (0, 3):
            wide[:3] = samples.sketches[start : start + 3].bfloat16()
            sketches = wide[:3].requires_grad_() if start else wide[:3]
            steps = torch.arange(start, start + 3)
            ids = samples.ids[start : start + 3]
            writer.append(sketches, ids=ids, sources=["maths"] * 3, steps=steps, tokens=steps.numpy())
            wide = wide.detach().zero_()
    samples.sketches = samples.sketches.bfloat16().float()
    store = Store.open(tmp_path / "store")
    same_rows(store.rows(), encoded(samples, format))
    assert store.meta["step"].to_pylist() == list(range(6))


def test_append_to_a_closed_writer_is_refused(tmp_path):
    writer = StoreWriter.create(tmp_path / "store", **settings())
    writer.close()
    with pytest.raises(StoreError, match="this writer is closed"):
        writer.append(torch.ones(1, 192), ids=["a"], sources=["maths"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "int4"}, "`format` must be one of"),
        ({"size": 100}, "multiple of 64"),
        ({"sources": []}, "at least one source"),
        ({"sources": ["maths", "maths"]}, "`sources` must be a list of different names"),
        ({"sources": "maths"}, "`sources` must be a list of different names"),
        ({"blocks": ["a", "a", "b"]}, "`blocks` must be a list of different names"),
        ({"shard_rows": 0}, "`shard_rows` must be at least 1"),
        ({"spec": {"size": torch.ones(1)}}, "`spec` must be made of what JSON can hold"),
        ({"about": {"loss": float("nan")}}, "`about` must be made of what JSON can hold"),
    ],
)
def test_what_create_refuses(tmp_path, change, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        StoreWriter.create(tmp_path / "store", **(settings() | change))
    assert not (tmp_path / "store").exists()


# comparing, other files


def test_require_names_the_folder_and_the_field(tmp_path):
    store = Store.open(write(tmp_path / "store", Samples(3)))
    spec = settings()["spec"]
    assert store.require(spec=spec, model_digest="0123") is store
    with pytest.raises(StoreError, match=r"store can't be compared .* spec\.seed = 0 against 9") as error:
        store.require(spec=spec | {"seed": 9})
    assert str(tmp_path / "store") in str(error.value)
    with pytest.raises(StoreError, match=r"model\.digest = '0123' against 'abc'"):
        store.require(model_digest="abc")


def test_registered_files_are_found_and_stay_the_same(tmp_path):
    with StoreWriter.create(tmp_path / "store", **settings()) as writer:
        (tmp_path / "store/whitening.safetensors").write_bytes(b"factors")
        writer.register("whitening.safetensors")
    with StoreWriter.resume(tmp_path / "store", **settings()) as writer:
        writer.register("whitening.safetensors")
        (tmp_path / "store/whitening.safetensors").write_bytes(b"others!")
        with pytest.raises(StoreError, match=r"whitening\.safetensors has changed"):
            writer.register("whitening.safetensors")
        (tmp_path / "store/whitening.safetensors").write_bytes(b"factors")
        with pytest.raises(ValueError, match="in the folder of the store itself"):
            writer.register("../whitening.safetensors")
    store = Store.open(tmp_path / "store")
    assert store.file("whitening.safetensors").read_bytes() == b"factors"
    with pytest.raises(StoreError, match=r"has no file 'else'"):
        store.file("else")


def test_a_row_of_one_bit_costs_a_fifteenth_of_bf16(tmp_path):
    """All files are counted, with ids of 20 random hexadecimal digits, steps and tokens."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(16, (8192, 20), generator=generator).tolist()
    ids = ["".join(f"{digit:x}" for digit in row) for row in digits]
    counts = torch.randint(10, 500, (8192,), generator=generator).tolist()
    steps, sources = sorted(counts), [SOURCES[count % 3] for count in counts]
    total = {}
    for format in ("bf16", "1bit"):
        path = tmp_path / format
        with StoreWriter.create(path, **settings(format, 4096, shard_rows=8192)) as writer:
            for start in range(0, 8192, 1024):
                here = slice(start, start + 1024)
                writer.append(
                    torch.randn(1024, 4096),
                    ids=ids[here],
                    sources=sources[here],
                    steps=steps[here],
                    tokens=counts[here],
                )
        total[format] = sum(file.stat().st_size for file in path.iterdir())
    assert total["bf16"] / total["1bit"] >= 15
