"""EK-FAC equals its definition, formed slowly: Q_S (x) Q_A from tokens, eigenvalues from per-document gradients."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.capturing import Capture, Documents
from fastsft.data import Row
from fastsft.sketch import SketchSpec, Whitening, fit_whitening, passes
from fastsft.sketch.passes import Batching, attribution_only, make_batch, run_batch
from fastsft.sketch.rotate import rotate_tokens, rotated_grads
from tests.attribution._support import make_rows, tiny_model
from tests.capturing._support import sum_loss
from tests.sketch._support import collect, followed_grads, moved

EKFAC = SketchSpec(size=256, precondition="ekfac")


def covariances(model: nn.Module, rows: list) -> dict[str, tuple[Tensor, Tensor]]:
    """A [I, I] and S [O, O] of each layer, a row at a time without padding."""
    found: dict[str, list[Tensor]] = {}

    def sink(index, x, dy, documents):
        parts = (x[:last].T @ x[:last], dy[:last].T @ dy[:last])
        known = found.setdefault(watcher.layers[index].name, [torch.zeros_like(part) for part in parts])
        for total, part in zip(known, parts, strict=True):
            total += part

    watcher = Capture(model, sink=sink, weight_grads="none")
    for row in rows:
        last = max(at for at, label in enumerate(row.labels) if label != -100)
        with watcher.batch(Documents.rows(1, len(row.input_ids))):
            sum_loss(model, torch.tensor([row.input_ids]), torch.tensor([row.labels])).backward()
    watcher.close()
    model.zero_grad()
    return {name: (A, S) for name, (A, S) in found.items()}


def fisher(sides: tuple[Tensor, Tensor], grads: Tensor, damping: float) -> Tensor:
    """Q diag(Lambda) Q^T + damping [O I, O I] with Q = Q_S (x) Q_A."""
    A, S = sides
    Q = torch.kron(torch.linalg.eigh(S).eigenvectors, torch.linalg.eigh(A).eigenvectors)
    eigenvalues = (grads.flatten(1) @ Q).square().mean(0)
    return Q @ torch.diag(eigenvalues) @ Q.T + damping * eigenvalues.mean() * torch.eye(len(Q), dtype=Q.dtype)


def _dots(whitening: Whitening, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, each in grads.items():
        white = whitening.layers[name].apply(each).flatten(1)
        found[name] = white @ white.T
    return found


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_whitened_dots_equal_the_inverse_fisher_formed_slowly(lora: bool, one_pass: bool) -> None:
    model = moved(tiny_model(lora=lora))
    rows = make_rows(8, source="red", seed=1)
    keep_bytes = 2**30 if one_pass else 0
    whitening = fit_whitening(model, rows, EKFAC, damping=0.2, max_tokens=30, keep_bytes=keep_bytes)
    fitted, queries = followed_grads(model, rows), followed_grads(model, make_rows(3, source="blue", seed=2))
    sides = covariances(model, rows)
    assert set(whitening.layers) == set(fitted)
    for name, found in _dots(whitening, queries).items():
        matrix = fisher(sides[name], fitted[name], 0.2)
        flat = queries[name].flatten(1)
        expected = flat @ torch.linalg.solve(matrix, flat.T)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max())), name


def test_eigenvalues_are_mean_squares_of_rotated_document_gradients() -> None:
    model = moved(tiny_model(lora=True))
    rows = make_rows(6, source="red", seed=1)
    whitening = fit_whitening(model, rows, EKFAC, keep_bytes=0)
    assert whitening.about == {"damping": 0.1, "documents": 6, "loss": "sum"}
    for name, grads in followed_grads(model, rows).items():
        layer = whitening.layers[name]
        eigenvalues = (layer.left.T @ grads @ layer.right).square().mean(0)
        expected = (eigenvalues + 0.1 * eigenvalues.mean()).rsqrt()
        assert torch.allclose(layer.scale, expected, rtol=1e-8), name
        for side in (layer.left, layer.right):
            assert torch.allclose(side.T @ side, torch.eye(len(side), dtype=side.dtype), atol=1e-12)


def test_the_fit_does_not_depend_on_batch_size_padding_or_packing() -> None:
    model = moved(tiny_model(lora=True))
    rows = make_rows(9, source="red", seed=1)
    queries = followed_grads(model, make_rows(3, source="blue", seed=2))
    alone = _dots(fit_whitening(model, rows, EKFAC, max_tokens=1), queries)
    for settings in ({"max_tokens": 4096}, {"max_tokens": 40, "packing": True}, {"max_tokens": 40, "keep_bytes": 0}):
        for name, dots in _dots(fit_whitening(model, rows, EKFAC, **settings), queries).items():
            # eigenvectors of like eigenvalues turn with rounding
            assert torch.allclose(dots, alone[name], rtol=1e-6, atol=1e-7 * float(dots.abs().max())), name


@pytest.mark.parametrize("max_tokens", [1, 60])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_sketches_are_sketches_of_the_whitened_gradients(lora: bool, max_tokens: int) -> None:
    model = moved(tiny_model(lora=lora))
    rows = make_rows(6, source="red", seed=1)
    whitening = fit_whitening(model, rows, EKFAC)
    found = collect(model, rows, EKFAC, whitening=whitening, max_tokens=max_tokens)
    expected = sum(
        ops.sketch_matrix(whitening.layers[name].apply(grads), 256, EKFAC.layer_seed(name))
        for name, grads in followed_grads(model, rows).items()
    )
    sketches = torch.stack([found[row.id] for row in rows])
    assert torch.allclose(sketches, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("O", "I", "lengths", "rotated"),
    [(3, 5, [40, 30], ""), (3, 50, [40, 30], "left"), (50, 3, [40, 30], "right"), (50, 40, [4, 3], "both")],
)
def test_tokens_and_products_rotate_alike(O: int, I: int, lengths: list[int], rotated: str) -> None:
    T = sum(lengths)
    x, dy = torch.randn(T, I, dtype=torch.float64), torch.randn(T, O, dtype=torch.float64)
    offsets = torch.tensor([0, lengths[0], T])
    left = torch.linalg.qr(torch.randn(O, O, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(I, I, dtype=torch.float64)).Q
    sides = rotate_tokens(x, dy, offsets, left, right)
    done = [name for name, side in (("left", sides.left), ("right", sides.right)) if side is None]
    assert " ".join(done) == {"both": "left right"}.get(rotated, rotated)
    expected = left.T @ ops.document_grads(x, dy, offsets) @ right
    assert torch.allclose(rotated_grads(sides, offsets), expected, rtol=1e-10, atol=1e-12)


def test_wide_layers_are_squared_in_bounded_pieces(monkeypatch) -> None:
    model = moved(tiny_model(lora=False))
    rows = make_rows(6, source="red", seed=1)
    whole = fit_whitening(model, rows, EKFAC, keep_bytes=0)
    sizes = []

    def document_grads(*sides):
        sizes.append(ops.document_grads(*sides).numel())
        return ops.document_grads(*sides)

    monkeypatch.setattr("fastsft.sketch.curvature._CHUNK", 6 * 24)
    monkeypatch.setattr("fastsft.sketch.curvature.ops", SimpleNamespace(document_grads=document_grads))
    pieces = fit_whitening(model, rows, EKFAC, keep_bytes=0)
    assert 0 < max(sizes) <= 6 * 24
    for name, layer in whole.layers.items():
        assert torch.allclose(pieces.layers[name].scale, layer.scale, rtol=1e-9)


def test_a_layer_without_gradient_adds_nothing() -> None:
    model = tiny_model(lora=True)  # B = 0: no gradient reaches A
    rows = make_rows(4, source="red", seed=1)
    whitening = fit_whitening(model, rows, EKFAC)
    scales = {name: layer.scale for name, layer in whitening.layers.items()}
    assert all((scale == 0).all() == ("lora_A" in name) for name, scale in scales.items())
    assert all(torch.isfinite(sketch).all() for sketch in collect(model, rows, EKFAC, whitening=whitening).values())


def test_rows_are_sampled_evenly_and_bad_use_is_a_sentence() -> None:
    model = moved(tiny_model(lora=True))
    rows = make_rows(9, source="red", seed=1)
    queries = followed_grads(model, rows[:2])
    some, same = fit_whitening(model, rows, EKFAC, max_documents=3), fit_whitening(model, rows[::3], EKFAC)
    assert some.about["documents"] == 3
    for name, dots in _dots(some, queries).items():
        assert torch.allclose(dots, _dots(same, queries)[name], rtol=1e-9)
    with pytest.raises(ValueError, match="this spec has precondition 'adam'"):
        fit_whitening(model, rows, SketchSpec(precondition="adam"))
    for arguments in ({"rows": []}, {"damping": 0.0}, {"max_documents": 0}):
        with pytest.raises(ValueError, match="needs rows, `max_documents` of 1 or more and `damping` above 0"):
            fit_whitening(model, spec=EKFAC, **{"rows": rows, **arguments})


def test_a_layer_used_twice_is_refused() -> None:
    model = moved(tiny_model(lora=False))
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="was used twice"):
        fit_whitening(model, make_rows(2, source="red", seed=1), EKFAC)


class _Toy(nn.Module):
    """One linear layer over one-hot tokens: logits of the next token [B, T, V]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(size, size, bias=False, dtype=torch.float64)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(nn.functional.one_hot(input_ids, self.size).double()))


def test_sampled_labels_approach_the_expectation_over_labels() -> None:
    V, draws = 3, 2000
    model = _Toy(V)
    with torch.no_grad():
        model.linear.weight.copy_(torch.randn(V, V, dtype=torch.float64))
    # a prompt of two tokens, and one that is supervised; many copies of it, each with draws of its own
    rows = [Row(f"copy {number}", "red", [0, 1, 2], [-100, -100, 0]) for number in range(draws)]
    batching = Batching(labels="sampled", seed=3)
    seen: list[Tensor] = []
    with attribution_only(model, lambda _, x, dy, documents: seen.append(dy.view(draws, 3, V))) as capture:
        run_batch(model, capture, make_batch(rows, batching, torch.device("cpu")))
    (dy,) = seen
    assert not dy[:, [0, 2]].any()
    p = model.linear.weight[:, 1].detach().softmax(0)
    # dy = p - e_label, with a label drawn from p: E[dy] = 0, E[dy dy^T] = diag(p) - p p^T
    error = 4 / draws**0.5
    assert torch.allclose(dy[:, 1].mean(0), torch.zeros_like(p), atol=error)
    assert torch.allclose(dy[:, 1].T @ dy[:, 1] / draws, p.diag() - p.outer(p), atol=error)


def test_a_label_is_the_first_whose_share_passes_its_number(monkeypatch) -> None:
    monkeypatch.setattr(passes, "_PROBABILITIES", 8)  # two rows at once
    logits = torch.tensor([[0.0, 0.5, 0.25, 0.25]], dtype=torch.float64).log().expand(5, 4)
    draws = torch.tensor([0.0, 0.49, 0.51, 0.76, 1 - 1e-16], dtype=torch.float64)
    assert passes._sampled(logits.float(), draws).tolist() == [1, 1, 2, 3, 3]


def test_the_true_fisher_has_labels_of_its_own_and_no_prompt_has_one() -> None:
    model = moved(tiny_model(lora=True))
    rows = make_rows(6, source="red", seed=1)
    other = [dataclasses.replace(row, labels=[-100 if at == -100 else 1 for at in row.labels]) for row in rows]
    settings = {"labels": "sampled", "seed": 4}
    first, second = (fit_whitening(model, some, EKFAC, **settings) for some in (rows, other))
    assert first.digest == second.digest  # the rows' own labels have no part but in where loss is
    assert first.about == {"damping": 0.1, "documents": 6, "loss": "sum", "labels": "sampled", "seed": 4}
    assert first.digest != fit_whitening(model, rows, EKFAC, labels="sampled", seed=5).digest
    with pytest.raises(ValueError, match="`labels` must be 'rows' or 'sampled'"):
        fit_whitening(model, rows, EKFAC, labels="true")


def test_layers_with_one_input_share_eigenvectors_and_can_be_saved(tmp_path) -> None:
    model = moved(tiny_model(lora=False))
    whitening = fit_whitening(model, make_rows(6, source="red", seed=1), EKFAC)
    query, key, out = (whitening.layers[f"model.layers.0.self_attn.{side}_proj.weight"] for side in "qko")
    assert query.right is key.right
    assert query.right is not out.right
    whitening.save(tmp_path / "whitening.safetensors")
    assert Whitening.load(tmp_path / "whitening.safetensors").digest == whitening.digest
