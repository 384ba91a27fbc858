"""EK-FAC equals kronfluence's, where kronfluence's environment has been made (benchmarks/rivals/environments.py).

Their conventions that differ from ours, undone here: scores are not divided by N; a query's loss is summed, not a mean
over its tokens; and their Fisher samples labels unless told to take the rows' own. One is chosen instead of undone: the
covariance of a layer's inputs counts the tokens that the task's mask keeps. Ours keeps those that have a supervised
token after them. With the usual mask, all but padding, a row's last token counts too, and scores differ by more than
rounding: by 3 % of the largest on 48 rows of the base model, by all of it on these tiny ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.rivals.environments import DEFAULT_CACHE, ENVIRONMENTS
from benchmarks.rivals.score import ask
from benchmarks.rivals.scores._base import write_case
from fastsft.attribution.methods._checkpoints import present
from fastsft.attribution.methods.ekfac import EkFac
from tests.attribution._support import make_rows, tiny_model, with_lora

MADE = DEFAULT_CACHE / "kronfluence" / "fastsft-rival.json"


@pytest.mark.skipif(
    not MADE.exists() or json.loads(MADE.read_text())["rival"] != ENVIRONMENTS["kronfluence"].rival,
    reason="kronfluence has no environment here: `python -m benchmarks.rivals.run kronfluence` makes it",
)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_ekfac_equals_kronfluence(lora: bool, tmp_path: Path) -> None:
    model = tiny_model(lora=False)
    model.save_pretrained(tmp_path / "base")
    if lora:
        model = with_lora(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at zero half of the gradients would be
                torch.nn.init.normal_(parameter, std=0.1)
    samples, queries = make_rows(11, source="one", seed=1), make_rows(3, source="two", seed=2)
    case = write_case(tmp_path / "case", model, [present(model)], samples, queries, base=tmp_path / "base", pad_id=0)
    row = ask("kronfluence", "ekfac_counted", case, tmp_path)
    assert "error" not in row, row["error"]
    theirs = torch.from_numpy(numpy.load(tmp_path / "kronfluence-ekfac_counted.npy"))
    ours = EkFac(fisher="empirical", damping=0.1).fit(model, [], samples).score(queries).matrix()
    tokens = torch.tensor([query.num_supervised for query in queries])
    # float64 on both sides, in another order of sums: measured 1e-13
    torch.testing.assert_close(ours, theirs / tokens / len(samples), rtol=1e-9, atol=1e-12)
