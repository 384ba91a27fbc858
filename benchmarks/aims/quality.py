"""What sketches and quantised stores lose: cosines against exact ones, rankings against unquantised ones."""

from __future__ import annotations

import copy
import functools
import math

import torch
from torch import Tensor, nn

from benchmarks.aims import Measured, aim, spread
from benchmarks.system.index_case import LORA_RANK
from benchmarks.system.index_data import Material, material
from fastsft import ops
from fastsft.data import Row, collate
from fastsft.sketch import SketchSpec, Whitening, fit_whitening, sketch_samples

COSINE_ROWS, SEEDS = 48, (0, 1, 2)
STORED, QUERIES, TOP, STEPS = 320, 32, 20, 12


@functools.cache
def given() -> Material:
    return material(STORED + QUERIES)


def sketches(model: nn.Module, rows: list[Row], spec: SketchSpec, **settings: object) -> Tensor:
    """Sketch rows -> [N, K] in the rows' own order."""
    found = {}
    for batch in sketch_samples(model, rows, spec, max_tokens=2048, pad_id=given().pad_id, **settings):  # type: ignore[arg-type]
        found.update(zip(batch.ids, batch.sketches, strict=True))
    return torch.stack([found[row.id] for row in rows])


@functools.cache
def exact_cosines() -> Tensor:
    """Cosines of the rows' whole gradients (all linear layers), row by row through autograd: [N, N], float64."""
    from fastsft.capturing import find_layers

    material = given()
    weights = [layer.weight for layer in find_layers(material.model)]
    grads = []
    for row in material.rows[:COSINE_ROWS]:
        loss = material.model(**collate([row], material.pad_id), use_cache=False).loss
        grads.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)]))
    unit = nn.functional.normalize(torch.stack(grads).double())
    return unit @ unit.T


def cosine_error(size: int) -> Measured:
    """RMSE over pairs of rows, in units of 1/sqrt(K); repeats are seeds."""
    material, exact = given(), exact_cosines()
    pairs = torch.triu_indices(COSINE_ROWS, COSINE_ROWS, 1)
    errors = []
    for seed in SEEDS:
        found = sketches(material.model, material.rows[:COSINE_ROWS], SketchSpec(size=size, seed=seed)).double()
        unit = nn.functional.normalize(found)
        gap = (unit @ unit.T - exact)[pairs[0], pairs[1]]
        errors.append(float(gap.square().mean().sqrt()) * math.sqrt(size))
    return spread(errors, {"model": material.name, "shape": f"{COSINE_ROWS} rows, all pairs, {len(SEEDS)} seeds"})


for size in (4096, 1024):
    aim(
        f"sjlt_cosine_{size}",
        what=f"RMSE of sketched cosines, K={size}, times sqrt(K)",
        against="exact cosines of per-sample gradients",
        at_most=1.1,
    )(functools.partial(cosine_error, size))


@functools.cache
def fine_tuned() -> tuple[nn.Module, Whitening]:
    """A LoRA r=8 model after a few training steps, and EK-FAC fitted on stored rows."""
    from peft import LoraConfig, get_peft_model

    material, own = given(), copy.deepcopy(given().model)  # adapters change a model in place
    torch.manual_seed(0)
    config = LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(own, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for start in range(0, 8 * STEPS, 8):
        model(**collate(material.rows[start : start + 8], material.pad_id), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    spec, stored = SketchSpec(precondition="ekfac"), material.rows[:STORED]
    whitening = fit_whitening(model, stored, spec, max_documents=128, max_tokens=2048, pad_id=material.pad_id)
    return model, whitening


@functools.cache
def whitened_sketches(seed: int, size: int) -> Tensor:
    """EK-FAC-whitened sketches [STORED + QUERIES, size]."""
    model, whitening = fine_tuned()
    spec = SketchSpec(precondition="ekfac", seed=seed, size=size)
    return sketches(model, given().rows, spec, whitening=whitening)


def ndcg(true: Tensor, order: Tensor) -> Tensor:
    """NDCG@k of rankings order [Q, k], gain the true score where positive, 1 / log2(rank + 1) discounts -> [Q]."""
    discount = 1 / torch.log2(torch.arange(2, order.shape[1] + 2, dtype=true.dtype))
    gains = true.clamp(min=0)
    best = gains.topk(order.shape[1]).values
    return (gains.gather(1, order) * discount).sum(1) / (best * discount).sum(1)


def lost(format: str, size: int) -> Measured:
    """1 - NDCG@20 of a quantised store's ranking by the scores of unquantised whitened sketches; mean over queries.

    `another_seed` is what unquantised sketches of another seed lose by the same scores: how much of these rankings is
    chance of the hash at this K.
    """
    both, other = whitened_sketches(0, size), whitened_sketches(1, size)
    stored, queries = both[:STORED], both[STORED:]
    true = queries.double() @ stored.double().T
    losses = 1 - ndcg(true, ops.store_topk(queries, ops.encode_rows(stored, format), TOP).largest_rows)
    chance = 1 - ndcg(true, (other[STORED:] @ other[:STORED].T).topk(TOP).indices)
    p20, p80 = torch.quantile(losses, torch.tensor([0.2, 0.8], dtype=losses.dtype)).tolist()
    facts = {
        "model": given().name + f", LoRA r=8 after {STEPS} steps",
        "shape": f"{STORED} rows, {QUERIES} queries, K={size}",
        "another_seed": round(float(chance.mean()), 4),
    }
    return Measured(round(float(losses.mean()), 4), round(p20, 4), round(p80, 4), len(losses), facts)


for format, size, limit in (("1bit", 4096, 0.03), ("int8", 4096, 0.005), ("1bit", 16384, None)):
    aim(
        f"ndcg_{format}" + ("" if limit else f"_k{size}"),
        what=f"NDCG@20 lost by a {format} store of whitened sketches" + ("" if limit else f", K={size}"),
        against="unquantised whitened sketches",
        at_most=limit,
    )(functools.partial(lost, format, size))
