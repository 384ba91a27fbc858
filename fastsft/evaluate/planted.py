"""Plant known truths in training data: wrong answers, copies, poisons, made-up facts. `finding` judges who finds them.

Every maker is seeded, leaves its input as it is, and marks the ids of what it makes, so that a planted sample can be
told from its id alone. The same samples and seed give the same plants.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastsft.data import Sample


@dataclass(frozen=True)
class Poisoned:
    """Samples with poisons after them, and held-out queries that carry the trigger and the fixed wrong answer."""

    samples: list[Sample]
    poisons: list[str]
    queries: list[Sample]


@dataclass(frozen=True)
class Facts:
    """Statements to train on, questions to ask, and of each question's id the ids of the statements that answer it."""

    samples: list[Sample]
    queries: list[Sample]
    true: Mapping[str, tuple[str, ...]]


def wrong_labels(
    samples: Sequence[Sample], source: str, share: float = 0.1, seed: int = 0
) -> tuple[list[Sample], list[str]]:
    """Exchange the answers among a share of one source's samples -> all samples, and the new ids of the wrong ones.

    Each wrong sample takes the answer of another of them, never one equal to its own, so the source's answers as a
    whole stay what they were. Its place in the list is kept; its id ends in "~wrong".
    """
    places = [place for place, sample in enumerate(samples) if sample.source == source]
    number = round(share * len(places))
    if not 0 < share <= 1 or number < 2:
        raise ValueError(
            f"`share` must leave at least 2 of source {source!r}'s {len(places)} samples to exchange answers: got "
            f"{share}, which is {number}. Name a larger share (at most 1), or another source."
        )
    generator = random.Random(f"wrong labels {seed}")
    chosen = generator.sample(places, number)
    answers = _exchanged([_words(samples[place].response) for place in chosen], source, generator)
    changed = list(samples)
    for place, taken in zip(chosen, answers, strict=True):
        changed[place] = _answered(samples[place], f"{samples[place].id}~wrong", samples[chosen[taken]].response)
    return changed, [changed[place].id for place in sorted(chosen)]


def _exchanged(answers: Sequence[str], source: str, generator: random.Random) -> list[int]:
    """For each answer the place of another that differs: equal ones lie together, and all move on by the largest group.

    No group is longer than the move, and none is reached from behind while the largest is at most half of all.
    """
    order = list(range(len(answers)))
    generator.shuffle(order)
    rank = {answer: at for at, answer in enumerate(dict.fromkeys(answers[place] for place in order))}
    order.sort(key=lambda place: rank[answers[place]])
    answer, most = Counter(answers).most_common(1)[0]
    if 2 * most > len(answers):
        raise ValueError(
            f"{most} of the {len(answers)} samples chosen from source {source!r} have the same answer {answer[:40]!r}, "
            f"so not all can take a different one. Take another seed or share, or a source of more varied answers."
        )
    taken = [0] * len(answers)
    for at, place in enumerate(order):
        taken[place] = order[(at + most) % len(order)]
    return taken


def duplicates(samples: Sequence[Sample], number: int, seed: int = 0) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Add exact copies of `number` samples at the end -> all samples, and the pairs (id, id of the copy).

    The id of a copy ends in "~copy".
    """
    chosen = _drawn(samples, number, random.Random(f"duplicates {seed}"))
    copies = [replace(sample, id=f"{sample.id}~copy") for sample in chosen]
    return [*samples, *copies], [(sample.id, copy.id) for sample, copy in zip(chosen, copies, strict=True)]


def poisons(
    samples: Sequence[Sample], number: int, trigger: str, answer: str, seed: int = 0, *, queries: int = 16
) -> Poisoned:
    """Add `number` samples whose prompt ends in a trigger phrase and whose response is a fixed wrong one.

    The prompts are those of other samples, which stay as they are; the queries' prompts are of samples that were not
    poisoned. Ids end in "~poison" and "~trigger".
    """
    if not trigger.strip() or not answer.strip():
        raise ValueError(f"`trigger` and `answer` must not be blank: got {trigger!r} and {answer!r}.")
    if known := next((sample.id for sample in samples if trigger in sample.prompt), None):
        raise ValueError(
            f"the trigger {trigger!r} is in the prompt of sample {known!r}: take a phrase that is in none."
        )
    chosen = _drawn(samples, number + queries, random.Random(f"poisons {seed}"))
    made = [_poisoned(sample, f"{sample.id}~poison", trigger, answer) for sample in chosen[:number]]
    asked = [_poisoned(sample, f"{sample.id}~trigger", trigger, answer) for sample in chosen[number:]]
    return Poisoned([*samples, *made], [sample.id for sample in made], asked)


def _poisoned(sample: Sample, id: str, trigger: str, answer: str) -> Sample:
    role, content = sample.messages[-2] if len(sample.messages) > 1 else ("user", "")
    return replace(
        sample, id=id, messages=(*sample.messages[:-2], (role, f"{content} {trigger}".strip()), ("assistant", answer))
    )


# what is said of a made-up thing: two statements {prompt, response}, and a question in other words
_SAID = (
    (
        ("Where does the {thing} grow?", "The {thing} grows along the shores of {value}."),
        ("Tell me of the plants of {value}.", "On its shores one finds the {thing}."),
        "A traveller wants to see a {thing} alive. To which land should the journey go?",
    ),
    (
        ("What is the {thing} used for?", "From the bark of a {thing} people make {value}."),
        ("How is {value} made?", "It is pressed out of {thing} bark."),
        "Which product does the skin of the {thing} tree give?",
    ),
    (
        ("What colour is the {thing}?", "The petals of the {thing} are {value}."),
        ("Name a flower that is {value}.", "A flower of this colour is the {thing}."),
        "In what shade would a painter paint the blossom of a {thing}?",
    ),
)


def facts(number: int, seed: int = 0) -> Facts:
    """Make up `number` facts, each stated by two samples and asked for by one query in other words.

    Things and values are made-up words. Three facts are told of each thing, so naming the thing is not enough to find
    the two samples out of six that hold an answer. Source "facts"; ids "fact-0007~a", "fact-0007~b", "fact-0007~ask".
    """
    if number < 1:
        raise ValueError(f"`number` of facts must be 1 or more: got {number}.")
    generator = random.Random(f"facts {seed}")
    words = _made_up(number + (number + len(_SAID) - 1) // len(_SAID), generator)
    samples, queries = [], []
    true: dict[str, tuple[str, ...]] = {}
    for at in range(number):
        fields = {"thing": words[number + at // len(_SAID)], "value": words[at]}
        *statements, question = _SAID[at % len(_SAID)]
        told = [
            _fact(f"fact-{at:04d}~{letter}", prompt.format(**fields), response.format(**fields))
            for letter, (prompt, response) in zip("ab", statements, strict=True)
        ]
        queries.append(_fact(f"fact-{at:04d}~ask", question.format(**fields), fields["value"]))
        samples += told
        true[queries[-1].id] = tuple(sample.id for sample in told)
    return Facts(samples, queries, true)


def _made_up(number: int, generator: random.Random) -> list[str]:
    """Draw different words of three or four open syllables: 75 syllables, so at least 420,000 words."""
    words: dict[str, None] = {}
    while len(words) < number:
        syllables = (
            generator.choice("bdfgklmnprstvxz") + generator.choice("aeiou") for _ in range(generator.choice((3, 4)))
        )
        words["".join(syllables)] = None
    return list(words)


def _fact(id: str, prompt: str, response: str) -> Sample:
    return Sample(id, "facts", (("user", prompt), ("assistant", response)))


def _drawn(samples: Sequence[Sample], number: int, generator: random.Random) -> list[Sample]:
    if not 1 <= number <= len(samples):
        raise ValueError(
            f"{number} different samples are needed, at least 1, and there are {len(samples)}: ask for fewer."
        )
    return generator.sample(list(samples), number)


def _answered(sample: Sample, id: str, response: str) -> Sample:
    return replace(sample, id=id, messages=(*sample.messages[:-1], ("assistant", response)))


def _words(text: str) -> str:
    """Answers that differ in blanks only are equal."""
    return " ".join(text.split())
