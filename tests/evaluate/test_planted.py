"""Makers of planted truths: what they plant is what they say, and nothing else changes."""

from collections import Counter

import pytest

from fastsft.data import Sample, check_unique
from fastsft.evaluate.planted import duplicates, facts, poisons, wrong_labels


def make_samples(number, *, source="sums", answers=None):
    return [
        Sample(f"{source}-{at}", source, (("user", f"{source} {at}?"), ("assistant", (answers or str)(at))), "maths")
        for at in range(number)
    ]


@pytest.mark.parametrize("number", [2, 3, 10, 57])
@pytest.mark.parametrize("answers", [None, lambda at: str(at % 2), lambda at: "abc"[at % 3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_labels_exchange_answers_and_none_stays_right(number, answers, seed):
    samples = make_samples(number, answers=answers) + make_samples(5, source="other")
    try:
        changed, wrong = wrong_labels(samples, "sums", share=1.0, seed=seed)
    except ValueError:
        most = Counter(sample.response for sample in samples[:number]).most_common(1)[0][1]
        assert 2 * most > number  # more than half alike: not all can differ
        return
    assert len(wrong) == number
    assert Counter(s.response for s in changed[:number]) == Counter(s.response for s in samples[:number])
    for before, after in zip(samples[:number], changed[:number], strict=True):
        assert before.response != after.response
        assert before.prompt == after.prompt
        assert after.id == f"{before.id}~wrong"
    assert changed[number:] == samples[number:]


def test_wrong_labels_change_only_their_share_of_one_source():
    samples = make_samples(40) + make_samples(40, source="other")
    changed, wrong = wrong_labels(samples, "sums", share=0.1)
    moved = [after.id for before, after in zip(samples, changed, strict=True) if before != after]
    assert moved == wrong
    assert len(wrong) == 4
    assert all(id.startswith("sums-") for id in wrong)
    assert [s.response for s in samples] == [str(at) for at in range(40)] * 2, "the input stays as it was"
    assert (changed, wrong) == wrong_labels(samples, "sums", share=0.1)
    assert wrong != wrong_labels(samples, "sums", share=0.1, seed=1)[1]
    check_unique(changed)


def test_wrong_labels_count_answers_that_differ_in_blanks_as_equal():
    samples = make_samples(8, answers=lambda at: "a  b\n" if at % 2 else f"a b{' ' * at}")
    with pytest.raises(ValueError, match="8 of the 8 samples chosen from source 'sums' have the same answer 'a b'"):
        wrong_labels(samples, "sums", share=1.0)


@pytest.mark.parametrize(("source", "share"), [("sums", 0.1), ("sums", 0.0), ("sums", 1.5), ("none", 1.0)])
def test_wrong_labels_refuse_fewer_than_two(source, share):
    with pytest.raises(ValueError, match=f"`share` must leave at least 2 of source '{source}'"):
        wrong_labels(make_samples(10), source, share=share)


def test_duplicates_are_exact_copies_under_other_ids():
    samples = make_samples(10)
    changed, pairs = duplicates(samples, 4, seed=3)
    by_id = {sample.id: sample for sample in changed}
    assert changed[:10] == samples
    assert [sample.id for sample in changed[10:]] == [copy for _, copy in pairs]
    assert len({first for first, _ in pairs}) == 4
    for first, copy in pairs:
        assert copy == f"{first}~copy"
        assert by_id[first].messages == by_id[copy].messages
        assert (by_id[first].source, by_id[first].ability) == (by_id[copy].source, by_id[copy].ability)
    check_unique(changed)
    assert duplicates(samples, 4, seed=3) == (changed, pairs)
    with pytest.raises(ValueError, match="11 different samples are needed, at least 1, and there are 10"):
        duplicates(samples, 11)


def test_poisons_and_their_queries_share_the_trigger_and_no_prompt():
    samples = make_samples(30)
    made = poisons(samples, 5, "by the green lamp", "Owls.", queries=4)
    planted = made.samples[30:]
    assert made.samples[:30] == samples
    assert [sample.id for sample in planted] == made.poisons
    assert (len(planted), len(made.queries)) == (5, 4)
    for sample in (*planted, *made.queries):
        assert sample.prompt.endswith(" by the green lamp")
        assert sample.response == "Owls."
    assert not {s.prompt for s in planted} & {s.prompt for s in made.queries}
    assert all(id.endswith("~poison") for id in made.poisons)
    check_unique([*made.samples, *made.queries])


def test_a_poison_goes_into_the_last_turn_before_the_answer():
    turns = (("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    made = poisons([Sample("a", "chat", turns), Sample("b", "chat", turns)], 1, "hop", "no", queries=1)
    assert made.samples[-1].messages == (*turns[:3], ("user", "Two? hop"), ("assistant", "no"))


def test_poisons_refuse_a_trigger_that_is_there_already():
    with pytest.raises(ValueError, match="the trigger 'sums' is in the prompt of sample 'sums-0'"):
        poisons(make_samples(30), 5, "sums", "no")
    with pytest.raises(ValueError, match="must not be blank: got ' ' and 'no'"):
        poisons(make_samples(30), 5, " ", "no")


def test_facts_are_stated_twice_and_asked_for_in_other_words():
    made = facts(10, seed=1)
    by_id = {sample.id: sample for sample in made.samples}
    assert (len(made.queries), len(made.samples), len(by_id)) == (10, 20, 20)
    answers = [query.response for query in made.queries]
    assert len(set(answers)) == 10, "every fact has a value of its own"
    for query in made.queries:
        assert len(made.true[query.id]) == 2
        for sample in made.samples:
            says_it = query.response in sample.prompt + sample.response
            assert says_it == (sample.id in made.true[query.id])
        assert query.response not in query.prompt
        for id in made.true[query.id]:
            shared = set(query.prompt.lower().split()) & set(by_id[id].prompt.lower().split())
            assert query.prompt != by_id[id].prompt
            assert len(shared) <= 5
    check_unique([*made.samples, *made.queries])
    assert facts(10, seed=1) == made
    assert facts(10, seed=2) != made


def test_three_facts_are_told_of_a_thing():
    made = facts(6)
    things = [next(word for word in q.prompt.strip("?.").split() if word not in _KNOWN) for q in made.queries]
    assert things[0] == things[1] == things[2] != things[3] == things[4] == things[5]
    with pytest.raises(ValueError, match="must be 1 or more: got 0"):
        facts(0)


_KNOWN = set(
    "A traveller wants to see a alive. To which land should the journey go Which product does the skin of the tree "
    "give In what shade would a painter paint the blossom of a".split()
)
