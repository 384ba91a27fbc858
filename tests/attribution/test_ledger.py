"""The books: exact parts of every step, entries equal to a slow reference, residuals that shrink with the interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsft.attribution import Attribution, Books, Targets
from fastsft.record import Record
from tests.attribution._support import (
    intervals,
    keep_books,
    loss_of,
    make_rows,
    make_targets,
    tiny_model,
    total,
    trainable,
)

SOURCES = ["red", "blue", "green"]


def _batches(steps: int, seed: int = 0) -> list[list[Any]]:
    pool = [row for source in SOURCES for row in make_rows(2 * steps, source=source, seed=seed + len(source))]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[pool[i] for i in order[6 * step : 6 * step + 6]] for step in range(steps)]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "adamw without decay": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0, betas=(0.8, 0.95)),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "adam with coupled decay": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd dampened": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, dampening=0.3),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_displacement_equals_sum_of_its_parts(tmp_path: Path, name: str, lora: bool) -> None:
    model = tiny_model(lora=lora)
    optimizer = OPTIMIZERS[name](trainable(model))
    books = keep_books(
        tmp_path, model, optimizer, _batches(4), sources=SOURCES, clip=0.5, settings=Attribution(refresh_every=2)
    )
    # float64: rounding of 4 steps of sums over a few hundred terms
    assert max(event["displacement_error"] for event in intervals(books)) < 1e-12
    steps = list(books.record.events("step"))
    assert max(event["identity_error"] for event in steps) < 1e-12
    assert min(event["scale"] for event in steps) < 0.9, "clipping never acted: the test shows nothing"


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_entries_equal_a_slow_reference(tmp_path: Path, lora: bool) -> None:
    """Every source's gradient by its own backward pass, its own first moment, dotted with targets by autograd."""
    batches, targets = _batches(5), make_targets()
    model = tiny_model(lora=lora)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.1)
    books = keep_books(
        tmp_path, model, optimizer, batches, sources=SOURCES, targets=targets, settings=Attribution(refresh_every=1)
    )
    expected = _slow_entries(tiny_model(lora=lora), batches, targets, _followed(books))
    for ability in targets.abilities:
        found = total(books, ability, "by_source")
        for source in SOURCES:
            assert found[source] == pytest.approx(expected[ability, source], rel=1e-9, abs=1e-13)
        parts = sum(found.values()) + sum(
            total(books, ability, part) for part in ("decay", "unfollowed", "carried", "residual")
        )
        assert parts == pytest.approx(total(books, ability, "measured"), abs=1e-14)
    assert any(abs(value) > 1e-4 for value in expected.values()), "nothing moved: the test shows nothing"


def _followed(books: Any) -> set[str]:
    return {layer.name for layer in books.capture.layers}


def _slow_entries(
    model: Any, batches: list[list[Any]], targets: Targets, followed: set[str]
) -> dict[tuple[str, str], float]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(named.values()), lr=3e-3, weight_decay=0.1)
    moments = {(source, name): torch.zeros_like(p) for source in SOURCES for name, p in named.items()}
    entries = {(ability, source): 0.0 for ability in targets.abilities for source in SOURCES}

    def target_gradients() -> dict[str, dict[str, Any]]:
        return {
            ability: dict(
                zip(
                    named,
                    torch.autograd.grad(loss_of(model, targets.rows[ability]), list(named.values()), allow_unused=True),
                    strict=True,
                )
            )
            for ability in targets.abilities
        }

    for step, rows in enumerate(batches, start=1):
        start = target_gradients()
        tokens = sum(row.num_supervised for row in rows)
        for source in SOURCES:
            mine = [row for row in rows if row.source == source]
            weight = sum(row.num_supervised for row in mine) / tokens
            grads = (
                torch.autograd.grad(loss_of(model, mine) * weight, list(named.values()), allow_unused=True)
                if mine
                else []
            )
            for name in named:
                moments[source, name].mul_(0.9)
            for name, grad in zip(named, grads, strict=False):
                if grad is not None:
                    moments[source, name].add_(0.1 * grad)
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        end = target_gradients()
        for name, p in named.items():
            if name not in followed:
                continue
            v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**step)
            for source in SOURCES:
                moved = -3e-3 / (1 - 0.9**step) * moments[source, name] / (v.sqrt() + 1e-8)
                for ability in targets.abilities:
                    entries[ability, source] += float((moved * (start[ability][name] + end[ability][name]) / 2).sum())
    return entries


def test_residual_falls_with_the_interval_and_is_small_at_every_step(tmp_path: Path) -> None:
    shares = {}
    for every in (1, 8):
        model = tiny_model(lora=True)
        optimizer = torch.optim.AdamW(trainable(model), lr=2e-3)
        books = keep_books(
            tmp_path / str(every),
            model,
            optimizer,
            _batches(40),
            sources=SOURCES,
            settings=Attribution(refresh_every=every, samples=False),
        )
        shares[every] = max(
            abs(total(books, ability, "residual")) / sum(map(abs, total(books, ability, "by_source").values()))
            for ability in ("one", "two")
        )
    assert shares[1] < 1e-3
    assert shares[1] < shares[8] < 0.05


def test_momentum_from_before_is_carried_and_the_books_still_add_up(tmp_path: Path) -> None:
    model = tiny_model(lora=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    for rows in _batches(3, seed=1):
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    books = keep_books(tmp_path, model, optimizer, _batches(4), sources=SOURCES, step=3)
    assert max(event["displacement_error"] for event in intervals(books)) < 1e-12
    assert any(abs(total(books, ability, "carried")) > 1e-6 for ability in ("one", "two"))


def test_refresh_adapts_to_the_residual(tmp_path: Path) -> None:
    model = tiny_model(lora=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    tight = Attribution(refresh_every=8, residual_bound=1e-6, samples=False)
    books = keep_books(tmp_path, model, optimizer, _batches(30), sources=SOURCES, settings=tight)
    assert books.refresh_every == 1
    loose = Attribution(refresh_every=2, residual_bound=10.0, samples=False)
    model = tiny_model(lora=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-3)
    books = keep_books(tmp_path / "loose", model, optimizer, _batches(30), sources=SOURCES, settings=loose)
    assert books.refresh_every == 8


def test_error_of_the_change_is_that_of_paired_rows() -> None:
    from fastsft.attribution.targets import ratio_error

    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(3, 12, (400,), generator=generator).double()
    draws = []
    for _ in range(300):
        sums = counts * 0.3 + torch.randn(400, generator=generator, dtype=torch.float64)
        draws.append(float(sums.sum() / counts.sum()))
    sums = counts * 0.3 + torch.randn(400, generator=generator, dtype=torch.float64)
    spread = float(torch.tensor(draws).std())
    # 300 draws know their spread to 4 %, 400 rows to 4 %
    assert ratio_error(sums, counts) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda p: torch.optim.RMSprop(p), "AdamW, Adam or SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=False"),
    ],
)
def test_an_optimizer_that_is_not_linear_is_refused(tmp_path: Path, optimizer: Any, words: str) -> None:
    model = tiny_model(lora=True)
    with pytest.raises(ValueError, match=words):
        keep_books(tmp_path, model, optimizer(trainable(model)), _batches(1), sources=SOURCES)


def test_a_target_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="target 'maths' has no rows"):
        Targets({"maths": []}, pad_id=0)


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_a_layer_that_some_steps_do_not_reach_keeps_its_momentum(tmp_path: Path, name: str) -> None:
    """torch skips a parameter without a gradient: its moments do not shrink either."""
    model = tiny_model(lora=True)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    optimizer = OPTIMIZERS[name](trainable(model))
    batches = _batches(5)
    books = Books(
        model,
        optimizer,
        make_targets(),
        sources=SOURCES,
        record=Record.create(tmp_path),
        settings=Attribution(refresh_every=2),
        total_steps=5,
    )
    for step, rows in enumerate(batches):
        layer._disable_adapters = step in (0, 3)  # the adapters of this layer take no part
        size = max(len(row.input_ids) for row in rows)
        with books.batch(rows=(6, size), samples=[r.id for r in rows], sources=[r.source for r in rows]):
            loss_of(model, rows).backward()
        layer._disable_adapters = False
        optimizer.step()
        optimizer.zero_grad()
        books.after_step()
    books.finish()
    assert max(event["displacement_error"] for event in intervals(books)) < 1e-12


def test_a_skipped_step_leaves_no_trace(tmp_path: Path) -> None:
    """fp16's scaler skips a step that overflowed: its gradients must not be booked with the next one."""
    batches = _batches(4)
    found = []
    for number, skipped in enumerate((None, 2)):
        model = tiny_model(lora=True)
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        books = Books(
            model,
            optimizer,
            make_targets(),
            sources=SOURCES,
            record=Record.create(tmp_path / str(number)),
            settings=Attribution(refresh_every=2),
            total_steps=4,
        )
        for step, rows in enumerate(batches):
            for shown in [batches[0], rows] if step == skipped else [rows]:
                books.drop_step()
                optimizer.zero_grad()
                width = max(len(row.input_ids) for row in shown)
                names = {"samples": [r.id for r in shown], "sources": [r.source for r in shown]}
                with books.batch(rows=(len(shown), width), **names):
                    loss_of(model, shown).backward()
            optimizer.step()
            books.after_step()
        books.finish()
        found.append(([event["abilities"] for event in intervals(books)], books.record.influence().to_pydict()))
    assert found[0] == found[1]
