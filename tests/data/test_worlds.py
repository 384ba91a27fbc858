import collections
import math
import re

import pytest
import torch

from fastsft.data import (
    DataError,
    answer_of,
    check_unique,
    collate,
    make_world,
    small_model,
    tokenize_all,
    train_base,
)

ABILITIES = ("maths", "code", "instructions")


@pytest.fixture(scope="module", params=[0, 7])
def full(request):
    return make_world(seed=request.param)


def of_tasks(world):
    return [s for name, source in world.sources.items() if name != world.planted.useless_source for s in source]


def independently_right(sample):
    """Judge an answer without the world's own solver, by what it says: arithmetic, Python, or string methods."""
    prompt, answer = sample.prompt, sample.response
    if match := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", answer):
        a, sign, b, result = match.groups()
        asked = "*" if "bags" in prompt else "+" if re.search("buys|finds|more", prompt) else "-"
        return sign == asked and [a, b] == re.findall(r"\d+", prompt)[:2] and eval(f"{a}{sign}{b}") == int(result)
    if prompt.startswith(("for ", "x = ")):
        printed: list = []
        exec(prompt, {"print": printed.append})
        return " ".join(map(str, printed)) == answer
    if prompt.startswith("Code "):
        names: dict = {"print": lambda value: None}
        f, verb, x, b = re.fullmatch(r"Code (\w) to (\w+) (\w) by (\d+)\.", prompt).groups()
        exec(answer, names)
        wanted = {"raise": 5 + int(b), "lower": 5 - int(b), "scale": 5 * int(b)}[verb]
        return answer.startswith(f"def {f}({x})") and names[f](5) == wanted
    if numbers := [int(number) for number in re.findall(r"\d+", prompt)]:
        start, step = numbers[1::-1] if prompt.startswith("Go on") else numbers[:2]
        return answer == " ".join(str(start + at * step) for at in range(5))
    if answer == "I can not do that.":
        return False
    words = prompt.rsplit(": ", 1)[1].split()
    if "between" in prompt:
        return answer == prompt.split()[1].join(words)
    wanted = {
        "Turn": words[::-1],
        "Put the opening": [words[1], words[2], words[0]],
        "Put the closing": [words[2], words[0], words[1]],
        "Say": [words[0], words[0], words[1], words[1], words[2], words[2]],
        "Give": ["1", words[0], "2", words[1], "3", words[2]],
    }
    return answer == " ".join(next(value for opening, value in wanted.items() if prompt.startswith(opening)))


def test_world_has_sources_targets_and_base_of_the_promised_sizes(full):
    assert len(full.sources) == 8
    assert all(100 <= len(source) <= 250 for source in full.sources.values())
    assert tuple(full.targets) == ABILITIES
    assert all(48 <= len(target) <= 64 for target in full.targets.values())
    per_ability = collections.Counter(source[0].ability for source in full.sources.values())
    assert all(per_ability[ability] >= 2 for ability in ABILITIES)
    assert all(sample.source == name for name, source in full.sources.items() for sample in source)


def test_ids_are_unique_over_sources_targets_and_base(full):
    everything = [*full.sources.values(), *full.targets.values(), full.base]
    check_unique(sample for samples in everything for sample in samples)


def test_answers_are_right_exactly_where_no_harm_was_planted(full):
    harmful = set(full.planted.harmful)
    for sample in of_tasks(full):
        assert independently_right(sample) == (sample.id not in harmful), sample
        assert (answer_of(sample) == sample.response) == (sample.id not in harmful), sample


def test_targets_are_right_and_base_answers_agree_with_the_solver(full):
    for target in full.targets.values():
        assert all(independently_right(sample) for sample in target)
    assert all(answer_of(sample) == sample.response for sample in full.base)


def test_harm_is_an_eighth_of_one_source_of_each_ability(full):
    by_source = collections.Counter(name.rsplit("-", 1)[0] for name in full.planted.harmful)
    assert {full.sources[name][0].ability for name in by_source} == set(ABILITIES)
    for name, count in by_source.items():
        assert 0.1 <= count / len(full.sources[name]) <= 0.14


def test_duplicates_are_exact_and_are_the_only_ones(full):
    samples = {sample.id: sample for source in full.sources.values() for sample in source}
    for one, two in full.planted.duplicates:
        assert one != two
        assert samples[one].messages == samples[two].messages
    repeated = collections.Counter(sample.messages for sample in of_tasks(full))
    assert sum(count - 1 for count in repeated.values()) == len(full.planted.duplicates) > 0


def test_no_target_prompt_is_trained_on(full):
    held_out = {sample.prompt for target in full.targets.values() for sample in target}
    assert len(held_out) == sum(len(target) for target in full.targets.values())
    trained = {sample.prompt for source in [*full.sources.values(), full.base] for sample in source}
    assert not held_out & trained


def test_useless_source_has_no_right_answer(full):
    sample = full.sources[full.planted.useless_source][0]
    with pytest.raises(DataError, match=r"'tall_tales-0000' of source 'tall_tales' follows no wording.*Ask only"):
        answer_of(sample)


def test_world_is_fixed_by_its_seed():
    assert make_world(3, quick=True) == make_world(3, quick=True)
    one, two = make_world(3, quick=True), make_world(4, quick=True)
    assert one.targets["maths"] != two.targets["maths"]
    assert one.planted.harmful != two.planted.harmful


def test_tokenizer_keeps_its_promises(world, tokenizer):
    assert len(tokenizer) <= 400
    assert [len(tokenizer.tokenize(str(number))) for number in (7, 42, 365)] == [2, 3, 4]  # the opening space counts
    assert tokenizer.get_vocab() == world.tokenizer().get_vocab()
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    for sample in [*world.base[:100], *(source[0] for source in world.sources.values())]:
        for _, content in sample.messages:
            ids = tokenizer(content)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == content


def test_every_sample_is_short(full):
    tokenizer = full.tokenizer()
    for samples in [*full.sources.values(), *full.targets.values(), full.base]:
        assert max(len(row.input_ids) for row in tokenize_all(samples, tokenizer, max_length=64).rows) <= 64


def test_small_model_is_small_seeded_and_leaves_the_random_state(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = small_model(tokenizer, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert 0.5e6 <= sum(weight.numel() for weight in model.parameters()) <= 1e6
    same, other = small_model(tokenizer, seed=1), small_model(tokenizer, seed=2)
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_base_training_learns_reports_and_repeats(world, tokenizer):
    rows = tokenize_all(world.base, tokenizer, max_length=64).rows
    told, weights = [], []
    for _ in range(2):
        model = small_model(tokenizer, seed=0)
        losses = train_base(model, rows, steps=60, seed=0, progress=lambda *news: told.append(news))
        weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*weights)
    assert len(losses) == 60
    assert told[-1] == (60, 60, losses[-1])
    assert losses[0] > 0.8 * math.log(len(tokenizer))
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_useless_and_helper_sources_do_what_is_planted(world, tokenizer):
    rows = {name: tokenize_all(source, tokenizer, max_length=64).rows for name, source in world.sources.items()}
    targets = {name: tokenize_all(samples, tokenizer, max_length=64).rows for name, samples in world.targets.items()}
    base = small_model(tokenizer, seed=0)
    train_base(base, tokenize_all(world.base, tokenizer, max_length=64).rows, steps=400, seed=0)
    before = target_losses(base, targets, tokenizer)
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    after = {}
    for name in (world.planted.useless_source, world.planted.helper_source):
        base.load_state_dict(start)
        train_base(base, rows[name], steps=25, learning_rate=3e-4, seed=0)
        after[name] = target_losses(base, targets, tokenizer)
    for ability in world.planted.helps:
        assert after[world.planted.helper_source][ability] < before[ability] - 0.1
    for ability in ABILITIES:
        assert after[world.planted.useless_source][ability] > before[ability]


def target_losses(model, targets, tokenizer):
    with torch.no_grad():
        return {
            name: float(model(**collate(rows, tokenizer.pad_token_id), use_cache=False).loss)
            for name, rows in targets.items()
        }
