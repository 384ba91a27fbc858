"""fastsft/store: stores of several processes or runs as one."""

import pytest
import torch

from fastsft.store import Store, StoreError, StoreWriter, merge, rank_folder
from tests.store._support import Samples, encoded, same_rows, settings, write


@pytest.mark.parametrize("format", ["bf16", "int8", "1bit"])
@pytest.mark.parametrize("numbers", [(6,), (6, 9), (1, 0, 3, 8)])
def test_merge_equals_concatenation(tmp_path, format, numbers):
    parts = [Samples(number, seed=seed, prefix=f"part{seed}") for seed, number in enumerate(numbers)]
    paths = [write(tmp_path / str(seed), part, format=format, blocks=3) for seed, part in enumerate(parts)]
    store = merge(paths, tmp_path / "merged")
    sketches = torch.cat([part.sketches for part in parts])
    whole = Samples(len(sketches))
    whole.sketches = sketches
    same_rows(store.rows(), encoded(whole, format, 3))
    assert store.ids() == [id for part in parts for id in part.ids]
    assert store.groups().tolist() == [group for part in parts for group in part.groups]
    assert store.meta["step"].to_pylist() == [step for part in parts for step in part.steps]
    assert store.complete
    assert store.about["merged"] == [str(path) for path in paths]


def test_a_merged_store_has_the_bytes_of_one_written_at_once(tmp_path):
    samples = Samples(21)
    for name, start, stop in (("a", 0, 10), ("b", 10, 21)):
        with StoreWriter.create(tmp_path / name, **settings()) as writer:
            samples.append(writer, start, stop)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    write(tmp_path / "once", samples)
    for file in (tmp_path / "once").glob("*.fsk"):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_sources_are_united(tmp_path):
    for name, sources in (("a", ["maths", "code"]), ("b", ["chat", "maths"])):
        with StoreWriter.create(tmp_path / name, **settings(sources=sources)) as writer:
            writer.append(torch.ones(2, 192), ids=[f"{name}0", f"{name}1"], sources=sources)
    store = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert store.sources == ["maths", "code", "chat"]
    assert store.groups().tolist() == [0, 1, 2, 0]


def test_what_all_agree_on_is_kept(tmp_path):
    for name in "ab":
        about = {"unit": "nats per token", "run": name}
        write(tmp_path / name, Samples(3, prefix=name), about=about)
    store = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert store.about == {"unit": "nats per token", "merged": [str(tmp_path / "a"), str(tmp_path / "b")]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": settings()["spec"] | {"seed": 1}}, r"spec\.seed = 0 against 1"),
        ({"format": "1bit"}, "format = 'int8' against '1bit'"),
        ({"size": 256}, "size = 192 against 256"),
        ({"blocks": 3}, "blocks = 1 against 3"),
        ({"model": {"name": "tiny", "digest": "4567"}}, r"model\.digest = '0123' against '4567'"),
    ],
)
def test_stores_that_differ_are_refused(tmp_path, change, field):
    write(tmp_path / "a", Samples(3))
    other = Samples(3, size=change.get("size", 192), prefix="other")
    with StoreWriter.create(tmp_path / "b", **(settings() | change)) as writer:
        other.append(writer)
    with pytest.raises(StoreError, match=field) as error:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert str(tmp_path / "a") in str(error.value)
    assert str(tmp_path / "b") in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("step", [None, 5])
def test_a_sample_that_stands_twice_is_refused(tmp_path, step):
    for name, ids in (("a", ["x", "y"]), ("b", ["z", "y"])):
        with StoreWriter.create(tmp_path / name, **settings()) as writer:
            steps = None if step is None else [step, step]
            writer.append(torch.ones(2, 192), ids=ids, sources=["maths"] * 2, steps=steps)
    with pytest.raises(StoreError, match=r"the sample 'y' (without a step|at step 5) stands in") as error:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert f"{tmp_path / 'a'} and in {tmp_path / 'b'}" in str(error.value)


def test_a_sample_at_two_steps_is_two_rows(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        with StoreWriter.create(tmp_path / name, **settings()) as writer:
            writer.append(torch.ones(1, 192), ids=["x"], sources=["maths"], steps=[step])
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged").ids() == ["x", "x"]


def test_the_same_store_twice_is_refused(tmp_path):
    write(tmp_path / "a", Samples(3))
    with pytest.raises(StoreError, match="stands in"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "merged")


def test_an_unfinished_store_is_refused(tmp_path):
    writer = StoreWriter.create(tmp_path / "a", **settings())
    Samples(6).append(writer)
    writer.abandon()
    with pytest.raises(StoreError, match=r"a is not finished: its writer was not closed"):
        merge([tmp_path / "a"], tmp_path / "merged")


def test_no_stores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one store"):
        merge([], tmp_path / "merged")


def test_registered_files_come_along_and_must_agree(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        with StoreWriter.create(tmp_path / name, **settings()) as writer:
            Samples(3, prefix=name).append(writer)
            (writer.path / "factors.bin").write_bytes(content)
            writer.register("factors.bin")
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab").file("factors.bin").read_bytes() == b"one"
    with pytest.raises(StoreError, match=r"a and .*c differ in the file 'factors\.bin'"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")


def test_a_file_that_one_store_has_comes_along(tmp_path):
    write(tmp_path / "a", Samples(3, prefix="a"))
    with StoreWriter.create(tmp_path / "b", **settings()) as writer:
        (writer.path / "factors.bin").write_bytes(b"one")
        writer.register("factors.bin")
    store = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert store.files == ["factors.bin"]
    assert store.file("factors.bin").read_bytes() == b"one"


# one writer a process


def ranks(path, number=2, **changes):
    parts = [Samples(5 + rank, seed=rank, prefix=f"rank{rank}") for rank in range(number)]
    for rank, part in enumerate(parts):
        write(rank_folder(path, rank), part, **(changes if rank else {}))
    return parts


def test_ranks_open_as_one_store(tmp_path):
    parts = ranks(tmp_path, 3)
    store = Store.open(tmp_path)
    assert len(store) == 18
    assert store.ids() == [id for part in parts for id in part.ids]
    assert store.groups().tolist() == [group for part in parts for group in part.groups]
    assert [first for first, _, _ in store.shards()] == [0, 4, 5, 9, 11, 15]
    merged = merge([tmp_path], tmp_path / "merged")
    same_rows(merged.rows(), store.rows())
    same_rows(store.rows(4, 7), merged.rows(4, 7))


def test_ranks_that_differ_are_refused(tmp_path):
    ranks(tmp_path, spec={"seed": 8})
    with pytest.raises(StoreError, match=r"rank000 and .*rank001 differ in spec"):
        Store.open(tmp_path, verify=False)


def test_a_sample_in_two_ranks_is_refused(tmp_path):
    for rank in range(2):
        write(rank_folder(tmp_path, rank), Samples(5))
    with pytest.raises(StoreError, match=r"'sample-0000\d' at step \d stands in .*rank000 and in .*rank001"):
        Store.open(tmp_path)


def test_a_missing_rank_is_refused(tmp_path):
    ranks(tmp_path, 3)
    rank_folder(tmp_path, 1).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"has rank002 but no rank001"):
        Store.open(tmp_path)


def test_a_store_beside_ranks_is_refused(tmp_path):
    ranks(tmp_path)
    write(tmp_path, Samples(3))
    with pytest.raises(StoreError, match="holds both a store and rank000"):
        Store.open(tmp_path)
