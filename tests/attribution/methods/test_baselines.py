"""The baselines: each by its own formula, and none that moves with the order of what it is given."""

import math
import random
from collections import Counter

import pytest
import torch

from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._checkpoints import trainable
from fastsft.attribution.methods.bm25 import Bm25
from fastsft.attribution.methods.embedding import Embedding
from fastsft.attribution.methods.length import Length
from fastsft.attribution.methods.loss import Loss
from fastsft.attribution.methods.random import Random
from fastsft.data import Row, collate
from fastsft.sketch.passes import Batching
from tests.attribution._support import make_rows, tiny_model
from tests.attribution.methods._support import summed_loss


def say(row):
    """A row's ids as words, with a capital, a sign and a lone letter."""
    return " ".join(f"W{token}" for token in row.input_ids) + " + x"


def make(name):
    return {
        "bm25": lambda: Bm25(say),
        "embedding": Embedding,
        "length": Length,
        "loss": Loss,
        "random": lambda: Random(seed=3),
    }[name]()


NAMES = ["bm25", "embedding", "length", "loss", "random"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(lora=True)


@pytest.fixture(scope="module")
def rows():
    return make_rows(7, source="maths", seed=1) + make_rows(4, source="code", seed=2)


@pytest.fixture(scope="module")
def queries():
    return {"one": make_rows(1, source="a", seed=5), "two": make_rows(3, source="b", seed=6)}


def bm25_by_hand(query, texts, k1=1.5, b=0.75):
    """BM25 as in the docstring, written out."""
    documents = [Counter(text.lower().split()) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query.lower().split():
            n = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = document[word]
            score += idf * tf / (tf + k1 * (1 - b + b * document.total() / mean))
        scores.append(score)
    return scores


def test_bm25_is_its_formula(model, rows, queries):
    found = Bm25(say).fit(model, [], rows).score(queries).matrix()
    for column, asked in enumerate(queries.values()):
        by_hand = bm25_by_hand(" ".join(map(say, asked)), list(map(say, rows)))
        assert max(by_hand) > 2 * min(by_hand) > 0
        torch.testing.assert_close(found[:, column], torch.tensor(by_hand), rtol=1e-5, atol=1e-6)


def test_bm25_tells_signs_and_single_letters_apart(model):
    texts = {"plus": "a + b", "minus": "a - b", "letter": "a d", "other": "c d"}
    rows = [Row(name, "s", [1, 2], [-100, 2]) for name in texts]
    plus = Row("plus", "", [1, 2], [-100, 2])
    scores = Bm25(lambda row: texts[row.id]).fit(model, [], rows).score([plus]).matrix()[:, 0]
    assert scores[0] > scores[1] > scores[2] > scores[3] == 0


def test_bm25_without_a_shared_word_scores_zero(model, rows):
    method = Bm25(lambda row: "" if row.id == "one-0" else say(row)).fit(model, [], rows)
    empty = make_rows(1, source="one", seed=0)
    assert torch.equal(method.score(empty).matrix(), torch.zeros(len(rows), 1))
    assert torch.equal(Bm25(lambda row: "").fit(model, [], rows).score(empty).matrix(), torch.zeros(len(rows), 1))
    with pytest.raises(ValueError, match=r"`b` must be from 0 to 1: got 1.5 and 2"):
        Bm25(say, b=2)


def embedded(model, row):
    states = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[-1]
    return states[0].mean(0)


@torch.no_grad()
def test_embedding_is_the_cosine_of_mean_hidden_states(model, rows, queries):
    found = Embedding(batching=Batching(max_tokens=20)).fit(model, [], rows).score(queries).matrix()
    for column, asked in enumerate(queries.values()):
        mean = torch.stack([embedded(model, row) for row in asked]).mean(0)
        cosines = [torch.cosine_similarity(mean, embedded(model, row), dim=0) for row in rows]
        torch.testing.assert_close(found[:, column], torch.stack(cosines), rtol=1e-9, atol=1e-9)


def test_loss_is_the_mean_token_loss_of_the_last_checkpoint(model, rows, queries):
    before = trainable(model)
    later = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in before.items()}
    checkpoints = [Checkpoint("a", before), Checkpoint("b", later)]
    model.train()
    found = Loss(batching=Batching(max_tokens=20)).fit(model, checkpoints, rows).score(queries).matrix()
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(model).items())
    other = tiny_model(lora=True).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(later.get(name, parameter))
        losses = torch.stack([summed_loss(other, row) / row.num_supervised for row in rows])
    for column in range(2):
        torch.testing.assert_close(found[:, column], losses, rtol=1e-9, atol=1e-9)
    # the same number as transformers' own loss, which it takes in float32
    assert other(**collate([rows[0]], 0)).loss.item() == pytest.approx(losses[0].item(), rel=1e-6)


def test_length_counts_response_tokens(model, rows, queries):
    found = Length().fit(model, [], rows).score(queries).matrix()
    assert found.tolist() == [[float(row.num_supervised)] * 2 for row in rows]


def test_random_is_even_and_seeded():
    rows = [Row(f"{number}", "s", [1, 2], [-100, 2]) for number in range(2000)]
    found = Random().fit(None, [], rows).score(rows[:2]).matrix()
    assert found.abs().max() <= 1
    assert abs(float(found.mean())) < 0.03  # 3 standard errors of a mean of 4000
    assert float(found.var()) == pytest.approx(1 / 3, abs=0.02)
    assert abs(float(torch.corrcoef(found.T)[0, 1])) < 0.07  # 3 / sqrt(2000)
    assert not torch.equal(found, Random(seed=1).fit(None, [], rows).score(rows[:2]).matrix())


@pytest.mark.parametrize("name", NAMES)
def test_order_and_batches_change_no_score(model, rows, queries, name):
    scores = make(name).fit(model, [], rows).score(queries)
    assert scores.ids == [row.id for row in rows]
    assert scores.method == name
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    back = dict(reversed(queries.items()))
    again = make(name).fit(model, [], [rows[at] for at in order]).score(back).matrix()
    torch.testing.assert_close(again.flip(1), scores.matrix()[order], rtol=1e-6, atol=1e-9)
    top = scores.summary(3).top
    assert torch.equal(top.largest[:, 0], scores.matrix().max(0).values.double())


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_score_alike_and_tokens_are_refused(model, rows, queries, name):
    method = make(name).fit(model, [], [*rows, rows[2]])
    matrix = method.score(queries).matrix()
    torch.testing.assert_close(matrix[-1], matrix[2], rtol=1e-9, atol=1e-12)
    assert make(name).fit(model, [], []).score(queries).matrix().shape == (0, 2)
    with pytest.raises(ValueError, match=f"{name} scores whole samples only"):
        method.score(queries, per="token")
