"""TRAK equals its closed form with the projection written out as a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods._checkpoints import load, restored
from fastsft.attribution.methods._gradients import followed
from fastsft.attribution.methods.trak import Trak, token_margins
from fastsft.data import Row, collate
from fastsft.sketch import SketchSpec
from fastsft.sketch.passes import Batching, make_batch
from tests.attribution._support import make_rows, tiny_model
from tests.attribution.methods._cases import (
    SHARES,
    check_device,
    check_helps,
    check_laws,
    model_with_checkpoints,
    samples,
    targets,
)

SPEC = SketchSpec(size=48, seed=3)


def margins(model: nn.Module, row: Row) -> Tensor:
    """log(p / (1 - p)) of each response token, as the paper writes it."""
    logits = model(input_ids=collate([row], 0)["input_ids"], use_cache=False).logits[0, :-1]
    labels = torch.tensor(row.labels[1:])
    p = logits.softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0]
    return (p / (1 - p)).log()


def features(model: nn.Module, rows: list[Row]) -> Tensor:
    layers = followed(model)
    parameters = dict(model.named_parameters())
    found = []
    for row in rows:
        grads = torch.autograd.grad(margins(model, row).sum(), [parameters[layer.name] for layer in layers])
        parts = []
        for layer, grad in zip(layers, grads, strict=True):
            index, sign = ops.sjlt_table(layer.shape, SPEC.size, SPEC.layer_seed(layer.name))
            P = torch.zeros(grad.numel(), SPEC.size, dtype=torch.float64)
            P[torch.arange(len(index)), index] = sign.double()
            parts.append(grad.flatten() @ P)
        found.append(torch.stack(parts).sum(0))
    return torch.stack(found)


def slow_scores(model: nn.Module, checkpoints: list, damping: float) -> Tensor:
    weights = [share / sum(SHARES) for share in SHARES]
    fits, doubts = torch.zeros(()), torch.zeros(())
    with restored(model):
        for share, checkpoint in zip(weights, checkpoints, strict=True):
            load(model, checkpoint)
            phi = features(model, samples())
            aims = [features(model, rows).sum(0) / sum(r.num_supervised for r in rows) for rows in targets().values()]
            products = phi.T @ phi
            products += damping * torch.linalg.eigvalsh(products).mean() * torch.eye(len(products))
            fits = fits + share * phi @ torch.linalg.solve(products, torch.stack(aims).T)
            with torch.no_grad():
                doubt = torch.stack([1 - margins(model, row).sigmoid().mean() for row in samples()])
            doubts = doubts + share * doubt
    return fits * doubts[:, None]


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_the_closed_form_of_an_ensemble(lora: bool, damping: float) -> None:
    model, checkpoints = model_with_checkpoints(lora=lora)
    found = Trak(sketch=SPEC, damping=damping).fit(model, checkpoints, samples()).score(targets()).matrix()
    truth = slow_scores(model, checkpoints, damping)
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9 * float(truth.abs().max()))


def test_margins_are_exact_where_the_label_is_certain() -> None:
    model = tiny_model(lora=False)
    ids = samples()[0].input_ids
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        row = Row("certain", "", ids, [-100, *logits.argmax(-1).tolist()])
        found, documents = token_margins(model, make_batch([row], Batching(), torch.device("cpu")))
        naive = margins(model, row)
    for margin, scores, label in zip(found, logits, row.labels[1:], strict=True):
        others = torch.cat([scores[:label], scores[label + 1 :]])
        assert torch.isclose(margin, scores[label] - others.logsumexp(0), rtol=1e-12)
    assert documents.tolist() == [0] * len(found)
    assert found.isfinite().all()
    assert not naive.isfinite().all()  # the formula as it is written loses them


def test_without_damping_it_is_the_least_squares_fit() -> None:
    """Scores of the samples for themselves are then a projection onto as many directions as the sketch has."""
    model, _ = model_with_checkpoints(lora=True)
    rows = make_rows(30, source="red", seed=4)
    method = Trak(sketch=SketchSpec(size=16, seed=3), damping=0).fit(model, [], rows)
    tokens = torch.tensor([row.num_supervised for row in rows])
    hat = method.score(rows).matrix() * tokens / method.doubt[:, None]
    assert torch.allclose(hat @ hat, hat, atol=1e-8)
    assert hat.trace().item() == pytest.approx(16)


def test_laws() -> None:
    check_laws(lambda batching: Trak(sketch=SPEC, damping=0.1, batching=batching))


def test_a_sample_like_the_query_helps() -> None:
    check_helps(lambda: Trak(sketch=SketchSpec(size=1024)))


def test_the_sketch_of_other_layers_counts_too() -> None:
    model = tiny_model(lora=False)
    plain = Trak(sketch=SPEC).fit(model, [], samples()).score(targets()).matrix()
    more = SketchSpec(size=48, seed=3, extra=("norm",))
    assert not torch.allclose(plain, Trak(sketch=more).fit(model, [], samples()).score(targets()).matrix())


def test_the_suites_device(device: torch.device) -> None:
    check_device(lambda: Trak(sketch=SPEC), device)


def test_refusals() -> None:
    model, _ = model_with_checkpoints(lora=True)
    with pytest.raises(ValueError, match="must not be negative"):
        Trak(damping=-0.1)
    with pytest.raises(ValueError, match="no precondition"):
        Trak(sketch=SketchSpec(precondition="adam"))
    with pytest.raises(ValueError, match="9 samples and size 48"):
        Trak(sketch=SPEC, damping=0).fit(model, [], samples())
    with pytest.raises(ValueError, match="fewer than 16"):
        Trak(sketch=SketchSpec(size=16), damping=0).fit(model, [], samples()[:1] * 20)
    with pytest.raises(ValueError, match="`samples` is empty"):
        Trak().fit(model, [], [])
    with pytest.raises(ValueError, match="per='sample'"):
        Trak().fit(model, [], samples()).score(targets(), per="token")
