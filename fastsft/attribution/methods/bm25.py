"""BM25: shared words alone, without a model. What finds samples no better than this has not looked at the gradient."""

# N samples, Q queries

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastsft.attribution.methods._base import Queries
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block
from fastsft.data import Row

# words in lower case, and every other sign by itself: `+` and `==` tell code and sums apart
_WORDS = r"(?u)\w+|[^\w\s]"


class Bm25(SampleMethod):
    """score(i, q) = sum over the query's words w of idf(w) tf / (tf + k1 (1 - b + b L / mean L)), as often as it says w

    with tf the count of w in sample i, L its number of words, idf(w) = log(1 + (N - n + 1/2) / (n + 1/2)) and n the
    number of samples that hold w (Robertson & Walker 1994 as Lucene computes it; by the library bm25s). decode: a row's
    text, prompt and response. The texts of a query's rows are joined.
    """

    name = "bm25"
    unit = "BM25 of the texts: no unit that means anything in nats, and never below 0"

    def __init__(self, decode: Callable[[Row], str], *, k1: float = 1.5, b: float = 0.75) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"`k1` must not be negative, and `b` must be from 0 to 1: got {k1} and {b}.")
        self.decode, self.k1, self.b = decode, k1, b

    def learn(self) -> None:
        """Index the samples' words."""
        import bm25s

        words = self._words([self.decode(row) for row in self.samples])
        self._index = None
        if any(words):
            self._index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
            self._index.index(words, show_progress=False)

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield a block a query."""
        places = list(range(len(self.samples)))
        for number, rows in enumerate(queries.rows):
            [words] = self._words(["\n".join(self.decode(row) for row in rows)])
            values = torch.zeros(len(places))
            if words and self._index is not None:
                values = torch.from_numpy(self._index.get_scores(words)).float()
            yield Block(places, number, values[:, None])

    def _words(self, texts: list[str]) -> list[list[str]]:
        import bm25s

        return bm25s.tokenize(texts, token_pattern=_WORDS, stopwords=[], return_ids=False, show_progress=False)
