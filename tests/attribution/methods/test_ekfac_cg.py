"""EK-FAC refined by conjugate gradient against a dense Gauss-Newton matrix, built column by column."""

import pytest
import torch
from torch.func import functional_call

from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._curvature_products import ggn_products, hessian_products, twice_differentiable
from fastsft.attribution.methods._gradients import followed
from fastsft.attribution.methods.ekfac_cg import EkFacCg, conjugate_gradient
from fastsft.data import collate
from fastsft.sketch import SketchSpec, fit_whitening
from fastsft.sketch.passes import Batching, make_batch
from tests.attribution._support import make_rows, tiny_model
from tests.attribution.methods._support import gradients, query_gradient, summed_loss
from tests.attribution.methods.test_replay import in_float64

SAMPLES = [*make_rows(4, source="one", seed=1), *make_rows(3, source="three", seed=2)]
TARGETS = make_rows(3, source="two", seed=3)


def full_model():
    """A tiny model that computes in float64 throughout: transformers' norms would go through float32."""
    return in_float64(tiny_model(lora=False))


def lora_model():
    """The same with adapters after some training: LoRA's B is no longer 0."""
    model = in_float64(tiny_model(lora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def jacobian(model, row):
    """Derivative of a row's supervised logits by the followed weights, by forward differentiation [n, V, P]."""
    names = [layer.name for layer in followed(model)]
    parameters = dict(model.named_parameters())
    batch = collate([row], 0)
    supervised = batch["labels"][0, 1:] != -100

    def logits(*weights):
        values = dict(zip(names, weights, strict=True))
        found = functional_call(model, values, (), {"input_ids": batch["input_ids"], "use_cache": False})
        return found.logits[0, :-1][supervised]

    weights = tuple(parameters[name].detach() for name in names)
    columns = torch.func.jacrev(logits, argnums=tuple(range(len(names))))(*weights)
    return torch.cat([column.flatten(2) for column in columns], dim=2).detach(), logits(*weights).detach()


def dense_ggn(model, rows):
    """(1/N) sum over rows and tokens of J^T (diag(p) - p p^T) J [P, P]."""
    total = 0.0
    for row in rows:
        J, logits = jacobian(model, row)
        p = logits.softmax(-1)
        B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total = total + torch.einsum("nvp,nvw,nwq->pq", J, B, J)
    return total / len(rows)


def dampings(model, rows, share=0.1):
    """Every coordinate's damping [P]: the mean of its layer's EK-FAC eigenvalues, from their definition."""
    found = []
    whitening = fit_whitening(model, rows, SketchSpec(precondition="ekfac"), damping=share)
    G = gradients(model, rows)
    start = 0
    for layer in followed(model):
        size = layer.weight.numel()
        # rotations keep the sum of squares: the eigenvalues' mean is that of the squared gradients
        mean = G[:, start : start + size].square().mean()
        assert whitening.layers[layer.name].scale.shape == layer.weight.shape
        found.append(torch.full((size,), float(share * mean), dtype=torch.float64))
        start += size
    return torch.cat(found)


@pytest.mark.parametrize("lora", [True, False])
def test_scores_equal_the_dense_solve(lora):
    model = lora_model() if lora else full_model()
    H = dense_ggn(model, SAMPLES) + torch.diag(dampings(model, SAMPLES, share=5.0))
    V = torch.linalg.solve(H, torch.stack([query_gradient(model, [row]) for row in TARGETS]).T)
    wanted = gradients(model, SAMPLES) @ V / len(SAMPLES)
    method = EkFacCg(iterations=140, damping=5.0).fit(model, [], SAMPLES)
    torch.testing.assert_close(method.score(TARGETS).matrix(), wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))
    (residuals,) = method.residuals.values()
    assert residuals.shape == (141, len(TARGETS))
    assert residuals[-1].max() < 1e-6


def test_more_iterations_never_raise_the_error():
    model = lora_model()
    H = dense_ggn(model, SAMPLES) + torch.diag(dampings(model, SAMPLES))
    right = torch.stack([query_gradient(model, [row]) for row in TARGETS])
    wanted = torch.linalg.solve(H, right.T).T
    eigenvalues = fit_whitening(model, SAMPLES, SketchSpec(precondition="ekfac"))
    sizes = [layer.weight.shape for layer in followed(model)]
    names = [layer.name for layer in followed(model)]

    def precondition(r):
        parts = r.split([shape.numel() for shape in sizes], dim=1)
        return torch.cat(
            [eigenvalues.layers[n].precondition(p.view(-1, *s)).flatten(1) for n, p, s in zip(names, parts, sizes)], 1
        )

    errors = []
    for iterations in range(12):
        v, _ = conjugate_gradient(lambda v: v @ H, precondition, right, iterations)
        errors.append((((v - wanted) @ H) * (v - wanted)).sum(1))
    errors = torch.stack(errors)
    assert (errors[1:] <= errors[:-1] * (1 + 1e-12)).all()
    assert (errors[-1] < 0.1 * errors[0]).all()


def test_no_iterations_are_plain_ekfac():
    model = lora_model()
    whitening = fit_whitening(model, SAMPLES, SketchSpec(precondition="ekfac"))
    right = query_gradient(model, [TARGETS[0]])
    parts, start = [], 0
    for layer in followed(model):
        size = layer.weight.numel()
        part = right[start : start + size].view(1, *layer.shape)
        parts.append(whitening.layers[layer.name].precondition(part).flatten())
        start += size
    wanted = gradients(model, SAMPLES) @ torch.cat(parts) / len(SAMPLES)
    found = EkFacCg(iterations=0).fit(model, [], SAMPLES).score(TARGETS[:1]).matrix()[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-10)


def test_batching_changes_nothing():
    model = lora_model()
    scores = [
        EkFacCg(iterations=4, batching=batching, direction_bytes=size).fit(model, [], SAMPLES).score(TARGETS).matrix()
        for batching, size in (
            (Batching(max_tokens=1), 2**31),
            (Batching(max_tokens=4096), 1),
            (Batching(max_tokens=40, pad_id=5), 2**31),
            (Batching(max_tokens=64, packing=True), 2**31),
        )
    ]
    for found in scores[1:]:
        torch.testing.assert_close(found, scores[0], rtol=1e-8, atol=1e-12)


def test_tokens_sum_to_their_sample_and_checkpoints_are_weighed():
    model = lora_model()
    first = Checkpoint("first", {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, 3.0)
    second = Checkpoint("second", {name: 1.1 * weight for name, weight in first.weights.items()}, 1.0)
    method = EkFacCg(iterations=3).fit(model, [first, second], SAMPLES)
    scores = method.score(TARGETS, per="token")
    both = scores.matrix()
    torch.testing.assert_close(torch.stack([scores.tokens()[row.id].sum(0) for row in SAMPLES]), both)
    alone = [
        EkFacCg(iterations=3).fit(model, [checkpoint], SAMPLES).score(TARGETS).matrix()
        for checkpoint in (first, second)
    ]
    torch.testing.assert_close(both, 0.75 * alone[0] + 0.25 * alone[1])
    assert list(method.residuals) == ["first", "second"]


def test_a_subset_is_evenly_spaced():
    model = lora_model()
    few = EkFacCg(iterations=2, max_documents=3).fit(model, [], SAMPLES)
    chosen = [SAMPLES[0], SAMPLES[2], SAMPLES[4]]
    alone = EkFacCg(iterations=2).fit(model, [], chosen)
    found, wanted = few.score(TARGETS).matrix(), alone.score(TARGETS).matrix()
    # the influence of one among 7, not among 3
    torch.testing.assert_close(found[[0, 2, 4]] * len(SAMPLES), wanted * len(chosen))


def test_weights_without_gradient_score_nothing():
    model = tiny_model(lora=True)  # B = 0: nothing flows to A
    method = EkFacCg(iterations=3).fit(model, [], SAMPLES)
    assert method.score(TARGETS).matrix().isfinite().all()


def test_the_model_is_given_back_as_it_was():
    model = lora_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    EkFacCg(iterations=1).fit(model, [], SAMPLES).score(TARGETS).matrix()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("lora", [True, False])
def test_products_batched_over_vectors_are_those_one_by_one(lora, monkeypatch):
    from fastsft.attribution.methods import _curvature_products

    model = lora_model() if lora else full_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [torch.randn(3, *parameter.shape, dtype=torch.float64) for parameter in parameters]
    batch = make_batch(SAMPLES[:3], Batching(), torch.device("cpu"))
    found = []
    for at_once in (1, 2):
        monkeypatch.setattr(_curvature_products, "vectors_at_once", lambda *_, n=at_once: n)
        with twice_differentiable(model):
            ggn = ggn_products(model, parameters, batch, vectors, 1)
            hessian, dots, _ = hessian_products(model, parameters, batch, vectors, 1)
        found.append([*ggn, *hessian, dots])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_token_dots_are_inner_products_with_each_tokens_gradient():
    model = lora_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [torch.randn(2, *parameter.shape, dtype=torch.float64) for parameter in parameters]
    with twice_differentiable(model):
        batch = make_batch(SAMPLES[:3], Batching(), torch.device("cpu"))
        _, dots, found = hessian_products(model, parameters, batch, vectors, 2**30)
    for at, row in enumerate(SAMPLES[:3]):
        grads = torch.autograd.grad(summed_loss(model, row), parameters)
        wanted = sum((vector * grad).flatten(1).sum(1) for vector, grad in zip(vectors, grads, strict=True))
        torch.testing.assert_close(dots[:, found.documents == at].sum(1), wanted)
        assert [row.labels[place] for place in found.places[found.documents == at]] == [
            label for label in row.labels if label != -100
        ]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="iterations"):
        EkFacCg(iterations=-1)
    with pytest.raises(ValueError, match="damping"):
        EkFacCg(damping=0.0)
    with pytest.raises(ValueError, match="max_documents"):
        EkFacCg(max_documents=0)
