"""Methods by name: what each needs is said before it is made."""

import inspect

import pytest
import torch

from fastsft.attribution.methods import Scores
from fastsft.attribution.methods.registry import METHODS, entry, make
from fastsft.sketch.passes import Batching
from tests.attribution._support import make_rows, tiny_model

# what a test can give without a run
PLAIN = [name for name, found in METHODS.items() if not set(found.needs) & {"run_dir", "schedule"}]


def moments_of(model):
    generator = torch.Generator().manual_seed(0)

    def drawn(weight):
        return torch.rand(weight.shape, generator=generator, dtype=weight.dtype)

    return {
        name: {"exp_avg": drawn(weight), "exp_avg_sq": drawn(weight) + 0.1, "step": 3}
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_its_class(name):
    found = entry(name)
    assert found.load().name == name
    assert found.about
    # what is needed can be given: to the class, or to `fit`
    for need in found.needs:
        assert need == "moments" or need in found.settings
    assert found.settings == list(inspect.signature(found.load()).parameters)


@pytest.mark.parametrize("name", PLAIN)
def test_a_method_made_by_name_scores(name):
    model, rows = tiny_model(lora=True), make_rows(5, source="a", seed=0)
    moments = [moments_of(model)]
    given = {"batching": Batching(max_tokens=64), "decode": lambda row: " ".join(map(str, row.input_ids))}
    method = make(name, **given, moments=moments, run_dir=None)
    scores = method.fit(model, [], rows, moments if "moments" in METHODS[name].needs else None).score(rows[:2])
    assert isinstance(scores, Scores)
    assert scores.matrix().shape == (5, 2)
    assert scores.matrix().isfinite().all()
    if METHODS[name].tokens:
        tokens = method.score(rows[:2], per="token").tokens()
        assert [len(tokens[row.id]) for row in rows] == [len(row.input_ids) for row in rows]
    else:
        with pytest.raises(ValueError, match="whole samples only"):
            method.score(rows[:2], per="token")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bm25", "bm25 compares texts: give `decode`"),
        ("less", "less reads the optimizer's moments at every checkpoint: give them as `moments`"),
        ("adam_dot", "adam_dot reads the optimizer's moments"),
        ("unrolled", "unrolled goes back through every step of a run: give `schedule`"),
        ("in_run", "in_run reads what a run booked: give `run_dir`"),
    ],
)
def test_what_is_missing_is_said(name, words):
    with pytest.raises(ValueError, match=words):
        make(name)


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="there is no method 'ekfak': did you mean 'ekfac'"):
        make("ekfak")
    with pytest.raises(ValueError, match="there is no method 'xyz': there are grad_dot, "):
        make("xyz")
    with pytest.raises(ValueError, match=r"length has no setting `damping`: it has none\. Leave it out"):
        make("length", damping=0.1)
    with pytest.raises(ValueError, match="random has no setting `damping`: it has seed"):
        make("random", damping=0.1, decode=str)
    assert make("ekfac", damping=0.25).damping == 0.25
