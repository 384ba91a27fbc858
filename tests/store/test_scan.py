"""fastsft/store/scan.py against scores of all rows in float64."""

import pytest
import torch

from fastsft import ops
from fastsft.store import Store, StoreError, StoreWriter, rank_folder, search
from tests.store._support import SOURCES, Samples, settings, write


def decoded_scores(store, queries):
    """Scores with the rows as stored; the queries as they were."""
    return queries.double() @ ops.decode_rows(store.rows()).double().T


@pytest.mark.parametrize("format", ops.FORMATS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_search_finds_the_extremes(tmp_path, device, format, blocks):
    samples = Samples(30)
    store = Store.open(write(tmp_path / "store", samples, format=format, blocks=blocks))
    # a whole number a step of the query's rounding, so that it is exact in each format: max |q| = 127, or bf16
    queries = torch.randint(-126, 127, (5, 192)).float()
    queries[:, ::64] = 127
    scores = decoded_scores(store, queries)
    found = search(store, queries.to(device), 4)
    for query in range(5):
        best = scores[query].argsort(descending=True)[:4].tolist()
        worst = scores[query].argsort()[:4].tolist()
        for hits, rows in ((found.largest(query), best), (found.smallest(query), worst)):
            assert [hit.row for hit in hits] == rows
            assert [hit.id for hit in hits] == [samples.ids[row] for row in rows]
            assert [hit.source for hit in hits] == [samples.sources[row] for row in rows]
            assert [hit.step for hit in hits] == [samples.steps[row] for row in rows]
            assert [hit.tokens for hit in hits] == [samples.tokens[row] for row in rows]
            # float32 sums of 192 products
            expected = scores[query, rows].float()
            torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("format", ops.FORMATS)
def test_shards_do_not_show_in_the_result(tmp_path, device, format):
    samples, queries = Samples(30), torch.randn(3, 192, device=device)
    results = []
    for shard_rows in (1, 7, 30):
        path = write(tmp_path / str(shard_rows), samples, format=format, shard_rows=shard_rows)
        results.append(search(Store.open(path), queries, 5).top)
    for result in results[1:]:
        for ours, theirs in zip(result[:4], results[0][:4]):
            # each row's score is one row's arithmetic, whatever rows stand beside it
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
        # float64; on CUDA the scores of a tile are added up in float32
        near = {} if device.type == "cpu" else {"rtol": 1e-5, "atol": 1e-3}
        torch.testing.assert_close(result.sums, results[0].sums, **near)


def test_sums_and_means_by_source(tmp_path, device):
    samples = Samples(30)
    sources = [*SOURCES, "never drawn"]
    store = Store.open(write(tmp_path / "store", samples, sources=sources))
    queries = torch.randint(-126, 127, (4, 192)).float()
    queries[:, 0] = 127
    scores, groups = decoded_scores(store, queries), torch.tensor(samples.groups)
    found = search(store, queries.to(device), 2)
    for number in range(3):
        mine = scores[:, groups == number]
        torch.testing.assert_close(found.sums[:, number].cpu(), mine.sum(1), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(found.means[:, number].cpu(), mine.mean(1), rtol=1e-6, atol=1e-3)
    assert found.sums[:, 3].tolist() == [0] * 4
    assert found.means[:, 3].isnan().all()
    assert found.counts.tolist() == [*torch.bincount(groups).tolist(), 0]


def test_without_sources(tmp_path, device):
    store = Store.open(write(tmp_path / "store", Samples(9)))
    found = search(store, torch.randn(2, 192, device=device), 2, by_source=False)
    assert found.sums is None
    assert found.means is None
    assert len(found.largest(0)) == 2


def test_more_asked_for_than_there_is(tmp_path, device):
    store = Store.open(write(tmp_path / "store", Samples(3)))
    found = search(store, torch.randn(2, 192, device=device), 10)
    assert sorted(hit.row for hit in found.largest(1)) == [0, 1, 2]
    assert [hit.row for hit in found.largest(1)] == [hit.row for hit in found.smallest(1)][::-1]


def test_search_over_ranks(tmp_path, device):
    parts = [Samples(9, seed=rank, prefix=f"rank{rank}") for rank in range(2)]
    for rank, part in enumerate(parts):
        write(rank_folder(tmp_path, rank), part, format="bf16")
    store = Store.open(tmp_path)
    query = parts[1].sketches[4:5]
    (hit,) = search(store, query.to(device), 1).largest(0)
    assert (hit.row, hit.id) == (13, "rank1-00004")


def test_queries_of_another_size_are_refused(tmp_path):
    store = Store.open(write(tmp_path / "store", Samples(3)))
    with pytest.raises(
        StoreError, match=r"`queries` \[Q, K\] must have the K of .*store: got \(2, 128\), expected K=192"
    ):
        search(store, torch.randn(2, 128), 1)


def test_a_store_without_rows_is_refused(tmp_path):
    with StoreWriter.create(tmp_path / "store", **settings()):
        pass
    with pytest.raises(StoreError, match="has no rows to search"):
        search(Store.open(tmp_path / "store"), torch.randn(2, 192), 1)
