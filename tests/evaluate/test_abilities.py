"""Abilities: the loss against a plain loop, greedy answers against one token at a time, and shares with intervals."""

import math

import pytest
import torch
from scipy.stats import binomtest
from transformers import GenerationConfig

import fastsft
from fastsft.data import Sample, make_world, small_model, tokenize, tokenize_all, train_base
from fastsft.evaluate._generate import generate
from fastsft.evaluate.abilities import evaluate_abilities, of_run, wilson
from tests.attribution._support import with_lora
from tests.train._run_file import write_run_file


@pytest.fixture(scope="module")
def world():
    return make_world(seed=0, quick=True)


@pytest.fixture(scope="module")
def tokenizer(world):
    return world.tokenizer()


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer, seed=1)


def slow_loss(model, row):
    """The summed loss of one row's response, and its tokens."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].double()
    places = [at for at, label in enumerate(row.labels) if label != -100]
    return sum(-float(logits[at - 1].log_softmax(0)[row.labels[at]]) for at in places), len(places)


def slow_answer(model, tokenizer, prompt, most):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most:
        best = int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True), True
        tokens.append(best)
    return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True), False


@torch.no_grad()
def test_loss_is_in_nats_per_response_token_as_of_the_targets(world, tokenizer, model):
    samples = world.targets["maths"][:7]
    found = evaluate_abilities(model, tokenizer, {"maths": samples}, max_new_tokens=1, batch_tokens=100)["maths"]
    sums = [slow_loss(model, tokenize(each, tokenizer, max_length=512)) for each in samples]
    assert found.loss == pytest.approx(sum(a for a, _ in sums) / sum(n for _, n in sums), rel=1e-5)
    rest = [a - n * found.loss for a, n in sums]
    error = math.sqrt(sum(x * x for x in rest) * 7 / 6) / sum(n for _, n in sums)
    assert found.loss_error == pytest.approx(error, rel=1e-4)
    assert found.number == 7


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("batch_tokens", [60, 4096])
@torch.no_grad()
def test_answers_equal_taking_the_best_token_one_at_a_time(world, tokenizer, model, lora, batch_tokens):
    rows = tokenize_all(world.targets["code"][:6], tokenizer, max_length=512).rows
    # prompts of different lengths, one of them a single token; a model that is sure of itself, so that ties are rare
    prompts = [row.input_ids[: 2 + 3 * at] for at, row in enumerate(rows)] + [[4]]
    model = with_lora(model) if lora else model
    owner = model.get_base_model() if lora else model
    owner.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, min_new_tokens=9)
    model.train()
    found = generate(model, tokenizer, prompts, max_new_tokens=12, batch_tokens=batch_tokens)
    assert model.training
    assert owner.generation_config.repetition_penalty == 9.0
    model.eval()
    assert found == [slow_answer(model, tokenizer, prompt, 12) for prompt in prompts]
    assert len(set(found)) > 1


def test_a_model_that_has_learnt_its_answers_gets_them_right(world, tokenizer, model):
    targets = {ability: samples[:3] for ability, samples in world.targets.items()}
    before = evaluate_abilities(model, tokenizer, targets, max_new_tokens=24)
    rows = tokenize_all([each for samples in targets.values() for each in samples], tokenizer, max_length=512).rows
    train_base(model, rows, steps=60, batch_size=9)
    after = evaluate_abilities(model, tokenizer, targets, max_new_tokens=24)
    assert list(after) == ["maths", "code", "instructions"]
    for ability, samples in targets.items():
        assert (before[ability].value.mean, after[ability].value.mean) == (0, 1)
        assert before[ability].failed == [each.id for each in samples]
        assert after[ability].failed == []
        assert after[ability].unfinished == 0
        assert after[ability].loss < 0.1 < 2 < before[ability].loss
        assert sum(after[ability].checks.values()) == 3
        assert list(after[ability].answers) == [each.id for each in samples]
    assert after["code"].checks == {"function": 1, "printed": 2}
    assert "100.0 % right" in str(after["code"])
    assert model.training is False


def test_checks_can_be_named_by_ability_and_by_sample(world, tokenizer, model):
    samples = world.targets["maths"][:3]
    for checks, wanted in (
        ("exact", {"exact": 3}),
        ({"maths": "words:5"}, {"words:5": 3}),
        ({"maths": "exact", samples[0].id: "final"}, {"final": 1, "exact": 2}),
        ({samples[0].id: "one_word"}, {"one_word": 1, "exact": 1, "final": 1}),
    ):
        found = evaluate_abilities(model, tokenizer, {"maths": samples}, max_new_tokens=2, checks=checks)
        assert found["maths"].checks == wanted
    with pytest.raises(ValueError, match="there is no check 'final_answer'"):
        evaluate_abilities(model, tokenizer, {"maths": samples}, checks="final_answer")
    with pytest.raises(ValueError, match="`checks` names 'math', which is neither a target nor a sample's id"):
        evaluate_abilities(model, tokenizer, {"maths": samples}, checks={"math": "final"})


def test_samples_that_are_too_long_are_left_out_and_noted(tokenizer, model):
    samples = [
        Sample("short", "s", (("user", "Sum?"), ("assistant", "4"))),
        Sample("long", "s", (("user", "Sum? " * 50), ("assistant", "4"))),
    ]
    found = evaluate_abilities(model, tokenizer, {"sums": samples}, max_length=40, max_new_tokens=1)["sums"]
    assert (found.number, list(found.answers)) == (1, ["short"])
    assert found.notes == ["1 samples over 40 tokens were left out."]
    assert found.unfinished == (1 if found.answers["short"] else 0)
    assert math.isnan(found.loss_error)
    with pytest.raises(ValueError, match="target 'sums' has no samples"):
        evaluate_abilities(model, tokenizer, {"sums": []})
    with pytest.raises(ValueError, match="`max_new_tokens` must be 1 or more: got 0"):
        evaluate_abilities(model, tokenizer, {"sums": samples}, max_new_tokens=0)


def test_a_finished_run_is_judged_on_the_rows_it_was_trained_beside(tmp_path):
    run = fastsft.run(fastsft.load_config(write_run_file(tmp_path, sections={"train": {"steps": 4}})), root=tmp_path)
    found = of_run(tmp_path / "out", max_new_tokens=3)
    last = list(run.record.events("refresh"))[-1]
    assert set(found) == {"maths", "code"}
    for ability, result in found.items():
        assert result.number == 4
        # the books say where the loss stood at the end of the run
        assert result.loss == pytest.approx(last["losses"][ability], rel=1e-5)
        assert result.loss_error == pytest.approx(last["errors"][ability], rel=1e-4)


@pytest.mark.parametrize(("passed", "number"), [(0, 7), (3, 7), (7, 7), (50, 60)])
def test_wilson_equals_scipy(passed, number):
    found = wilson(passed, number)
    wanted = binomtest(passed, number).proportion_ci(method="wilson")
    assert found == pytest.approx((passed / number, wanted.low, wanted.high), abs=1e-12)


def test_wilson_refuses_nothing():
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson(0, 0)
