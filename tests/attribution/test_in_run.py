"""Influence of samples: equal to books in which every sample is its own source, and to leaving one out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsft.attribution import Attribution, Books
from fastsft.record import Record
from tests.attribution._support import (
    intervals,
    keep_books,
    loss_of,
    make_rows,
    make_targets,
    phi_by_sample,
    tiny_model,
    total,
    trainable,
    with_lora,
)

SOURCES = ["red", "blue"]


def _batches(steps: int, size: int = 6, seed: int = 0) -> list[list[Any]]:
    pool = [row for source in SOURCES for row in make_rows(steps * size // 2, source=source, seed=seed + len(source))]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[pool[i] for i in order[size * step : size * step + size]] for step in range(steps)]


def _adamw(model: Any, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.05)


def _run(
    out: Path,
    batches: list[list[Any]],
    settings: Attribution,
    *,
    lora: bool = True,
    optimizer: Any = _adamw,
    by_sample: bool = False,
) -> Any:
    model = tiny_model(lora=lora)
    sources = [row.id for rows in batches for row in rows] if by_sample else SOURCES
    source_of = (lambda row: row.id) if by_sample else (lambda row: row.source)
    return keep_books(out, model, optimizer(model), batches, sources=sources, source_of=source_of, settings=settings)


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_phi_equals_books_with_every_sample_as_a_source(tmp_path: Path, refresh_every: int, lora: bool) -> None:
    """8 steps: no sample is settled early, so both are the same sum."""
    batches = _batches(8)
    exact = _run(tmp_path / "a", batches, Attribution(refresh_every=refresh_every, factor="exact"), lora=lora)
    books = _run(
        tmp_path / "b", batches, Attribution(refresh_every=refresh_every, samples=False), lora=lora, by_sample=True
    )
    phi = phi_by_sample(exact)
    for ability in ("one", "two"):
        expected = total(books, ability, "by_source")
        scale = max(map(abs, expected.values()))
        for sample, entry in expected.items():
            # the table holds float32
            assert phi[sample, ability] == pytest.approx(entry, rel=1e-6, abs=1e-6 * scale)


def test_samples_sum_to_their_source_in_every_interval(tmp_path: Path) -> None:
    books = _run(tmp_path, _batches(8), Attribution(refresh_every=3, factor="exact"))
    for event in intervals(books):
        for entry in event["abilities"].values():
            for source in SOURCES:
                assert entry["samples"][source] == pytest.approx(entry["by_source"][source], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_phi_of_sgd_equals_books_with_every_sample_as_a_source(tmp_path: Path, optimizer: str) -> None:
    options = {"sgd": {}, "momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}}[optimizer]

    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(trainable(model), lr=0.05, **options)

    batches = _batches(6)
    exact = _run(tmp_path / "a", batches, Attribution(refresh_every=3, factor="exact"), optimizer=sgd)
    books = _run(tmp_path / "b", batches, Attribution(refresh_every=3, samples=False), optimizer=sgd, by_sample=True)
    phi = phi_by_sample(exact)
    for ability in ("one", "two"):
        expected = total(books, ability, "by_source")
        scale = max(map(abs, expected.values()))
        if optimizer == "sgd":  # no echo: a sample is settled in its own interval, exactly
            assert all(phi[s, ability] == pytest.approx(e, rel=1e-6, abs=1e-6 * scale) for s, e in expected.items())
        else:
            found = np.array([phi[sample, ability] for sample in expected])
            assert np.abs(found - np.array(list(expected.values()))).max() < 1e-6 * scale


def test_the_default_is_close_to_exact_through_its_sketch(tmp_path: Path) -> None:
    """After the warm steps gradients are not kept: what the end of the interval adds comes through the sketch."""
    batches = _batches(30)
    default = phi_by_sample(_run(tmp_path / "a", batches, Attribution(refresh_every=5, warm_steps=3)))
    exact = phi_by_sample(_run(tmp_path / "b", batches, Attribution(refresh_every=5, factor="exact")))
    start = phi_by_sample(_run(tmp_path / "c", batches, Attribution(refresh_every=5, warm_steps=3, sketch_size=0)))
    keys = sorted(exact)
    truth = np.array([exact[key] for key in keys])

    def error(found: dict[tuple[str, str], float]) -> float:
        return float(np.linalg.norm(np.array([found[key] for key in keys]) - truth) / np.linalg.norm(truth))

    print(f"relative error of phi: default {error(default):.4f}, without the sketch {error(start):.4f}")
    assert error(default) < 0.05
    assert error(default) < error(start) / 2


def _leave_one_out(model: Any, optimizer: Any, rows: list[Any], targets: Any) -> dict[tuple[str, str], float]:
    """What sample i's presence in the step did: L(step) - L(step with its share of the gradient taken out)."""
    tokens = sum(row.num_supervised for row in rows)

    def stepped(without: Any | None) -> dict[str, float]:
        other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        again = torch.optim.AdamW(trainable(other), lr=1.0)
        again.load_state_dict(state)
        loss = loss_of(other, rows)
        if without is not None:
            loss = loss - loss_of(other, [without]) * (without.num_supervised / tokens)
        loss.backward()
        again.step()
        with torch.no_grad():
            return {ability: float(loss_of(other, targets.rows[ability])) for ability in targets.abilities}

    full = stepped(None)
    return {(row.id, ability): full[ability] - value for row in rows for ability, value in stepped(row).items()}


@pytest.mark.parametrize("warm", [3, 60], ids=["early", "late"])
@pytest.mark.parametrize("factor", ["previous", "jacobian"])
def test_phi_follows_exact_leave_one_out_steps(tmp_path: Path, warm: int, factor: str) -> None:
    targets = make_targets(rows=12)
    model = tiny_model(lora=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-3)
    batches = _batches(warm + 4, size=16)
    for rows in batches[:warm]:
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    correlations = []
    for number, rows in enumerate(batches[warm:]):
        truth = _leave_one_out(model, optimizer, rows, targets)
        books = keep_books(
            tmp_path / str(number),
            model,
            optimizer,
            [rows],
            sources=SOURCES,
            targets=targets,
            settings=Attribution(refresh_every=1, factor=factor),
            step=warm + number,
        )
        phi = phi_by_sample(books)
        for ability in targets.abilities:
            keys = [key for key in truth if key[1] == ability]
            correlations.append(float(np.corrcoef([truth[key] for key in keys], [phi[key] for key in keys])[0, 1]))
    print(f"{factor}, after {warm} steps: Pearson {np.mean(correlations):.3f} (least {min(correlations):.3f})")
    assert np.mean(correlations) >= (0.95 if factor == "previous" else 0.97)


@pytest.mark.parametrize("factor", ["previous", "exact"])
def test_tokens_sum_to_their_document(tmp_path: Path, factor: str) -> None:
    """Tokens are booked with the target gradient at the start of the interval; so is a document without its sketch."""
    settings = Attribution(refresh_every=1, tokens=True, sketch_size=0, warm_steps=1, factor=factor)
    model = tiny_model(lora=True)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
    books = keep_books(tmp_path, model, optimizer, _batches(3), sources=SOURCES, settings=settings)
    rows = books.record.influence().to_pylist()
    lengths = {row.id: len(row.input_ids) for batch in _batches(3) for row in batch}
    # at this learning rate both ends of an interval have the same gradient to about 1e-4
    largest = max(abs(row["phi"]) for row in rows)
    for row in rows:
        assert len(row["tokens"]) == lengths[row["sample_id"]]
        assert sum(row["tokens"]) == pytest.approx(row["phi"], rel=1e-3, abs=1e-3 * largest)


def test_factors_of_full_rank_equal_the_exact_books(tmp_path: Path) -> None:
    """With SGD and a basis that spans everything, following by factors loses nothing."""

    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(trainable(model), lr=0.02)

    batches = _batches(6)
    shared = {"refresh_every": 2, "narrow": 0, "warm_steps": 1}
    factored = _run(tmp_path / "a", batches, Attribution(exact=None, rank=24, **shared), lora=False, optimizer=sgd)
    exact = _run(tmp_path / "b", batches, Attribution(exact=".", **shared), lora=False, optimizer=sgd)
    for ability in ("one", "two"):
        mine, truth = total(factored, ability, "by_source"), total(exact, ability, "by_source")
        for source in SOURCES:
            assert mine[source] == pytest.approx(truth[source], rel=1e-6)
        assert total(factored, ability, "unfollowed") == pytest.approx(total(exact, ability, "unfollowed"), rel=1e-5)


def test_permuting_a_batch_permutes_phi(tmp_path: Path) -> None:
    batches = _batches(4)
    turned = [rows[::-1] for rows in batches]
    mine = phi_by_sample(_run(tmp_path / "a", batches, Attribution()))
    other = phi_by_sample(_run(tmp_path / "b", turned, Attribution()))
    largest = max(map(abs, mine.values()))
    assert all(mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6 * largest) for key in mine)


def test_a_planted_harmful_sample_comes_out_worst(tmp_path: Path) -> None:
    """Rows of the target's own source, which the model half knows; a quarter of them have wrong answers."""
    rows = make_rows(64, source="one", seed=3)
    harmful = set(range(0, 64, 4))
    spoiled = [
        type(row)(row.id, row.source, row.input_ids[: len(row.input_ids) // 2] + wrong, [-100] * len(wrong) + wrong)
        if place in harmful
        else row
        for place, row in enumerate(rows)
        for wrong in [[(token * 7 + 3) % 20 + 1 for token in row.input_ids[len(row.input_ids) // 2 :]]]
    ]
    model = tiny_model(lora=False)
    pretrain = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        loss_of(model, make_rows(32, source="one", seed=50 + step)).backward()
        pretrain.step()
        pretrain.zero_grad()
    model = with_lora(model)
    batches = [[spoiled[(16 * step + i) % 64] for i in range(16)] for step in range(24)]
    books = keep_books(tmp_path, model, _adamw(model, 5e-3), batches, sources=["one"], settings=Attribution())
    phi = phi_by_sample(books)
    bad = np.array([phi[f"one-{place}", "one"] for place in sorted(harmful)])
    good = np.array([phi[f"one-{place}", "one"] for place in range(64) if place not in harmful])
    auc = float((bad[:, None] > good[None, :]).mean())
    chance = np.random.default_rng(0).normal(size=64)
    print(f"AUC of harmful samples {auc:.3f}, of random scores {(chance[:16, None] > chance[None, 16:]).mean():.3f}")
    assert auc > 0.75


def test_what_does_not_fit_is_sketched_even_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Past `keep_bytes` later micro-batches of a warm step go through the sketch; phi stays close to exact."""
    rows = [row for batch in _batches(12, size=8) for row in batch]

    def run(out: Path, **options: Any) -> dict[tuple[str, str], float]:
        model = tiny_model(lora=True)
        optimizer = _adamw(model)
        books = Books(
            model,
            optimizer,
            make_targets(),
            sources=SOURCES,
            record=Record.create(out),
            settings=Attribution(refresh_every=4, **options),
            total_steps=12,
        )
        for step in range(12):
            for half in (rows[8 * step : 8 * step + 4], rows[8 * step + 4 : 8 * step + 8]):
                size = max(len(row.input_ids) for row in half)
                names = {"samples": [row.id for row in half], "sources": [row.source for row in half]}
                with books.batch(rows=(4, size), **names):
                    (loss_of(model, half) / 2).backward()
                kept.append(books.samples.kept_bytes)
            optimizer.step()
            optimizer.zero_grad()
            books.after_step()
        books.finish()
        notes.extend(event["text"] for event in books.record.events("note"))
        return phi_by_sample(books)

    notes: list[str] = []
    kept: list[int] = []
    exact = run(tmp_path / "a", factor="exact")
    limit = kept[8]  # the first micro-batch of the fifth step fits, the second does not
    kept.clear()
    squeezed = run(tmp_path / "b", keep_bytes=limit)
    assert max(kept) == limit
    assert len(notes) == 1
    assert "passed keep_bytes" in notes[0]
    keys = sorted(exact)
    found, truth = (np.array([phi[key] for key in keys]) for phi in (squeezed, exact))
    print(f"relative error of phi past the limit: {np.linalg.norm(found - truth) / np.linalg.norm(truth):.3f}")
    assert np.corrcoef(found, truth)[0, 1] > 0.9
