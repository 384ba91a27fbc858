"""The generated world of `fastsft demo`: a mix with known faults, targets, and text to pretrain a small base on.

What is planted is known, so what attribution finds can be checked: samples with wrong answers, exact duplicates,
a source that helps nothing, and a source that helps two abilities.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastsft.data.samples import Sample
from fastsft.data.world_model import small_model, small_tokenizer, train_base
from fastsft.data.world_tasks import answer_of, draw_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Planted", "World", "answer_of", "make_world", "small_model", "train_base"]


@dataclass(frozen=True, slots=True)
class Planted:
    """Hold what is wrong or odd in a world, by sample id and source name."""

    harmful: list[str]
    duplicates: list[tuple[str, str]]
    useless_source: str
    helper_source: str
    helps: tuple[str, str]


@dataclass(frozen=True, slots=True)
class World:
    """Hold one generated world: the mix, a held-out set per ability, the base's text, and the planted truth."""

    sources: dict[str, list[Sample]]
    targets: dict[str, list[Sample]]
    base: list[Sample]
    planted: Planted

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Train the world's tokenizer on its own text: the same world gives the same tokenizer."""
        samples = [*self.base, *(sample for source in self.sources.values() for sample in source)]
        return small_tokenizer(content for sample in samples for _, content in sample.messages)


@dataclass(frozen=True, slots=True)
class _Recipe:
    ability: str
    kinds: tuple[str, ...]
    size: int
    harmful: float = 0.0
    duplicates: int = 0


HELPER = "counting"
USELESS = "tall_tales"
_RECIPES = {
    "shop_stories": _Recipe("maths", ("trade",), 240, harmful=0.12),
    "piggy_banks": _Recipe("maths", ("saving", "groups"), 160, duplicates=8),
    "one_liners": _Recipe("code", ("function",), 200, harmful=0.12),
    "print_outs": _Recipe("code", ("loop", "value"), 200),
    "word_orders": _Recipe("instructions", ("order",), 240, harmful=0.12),
    "list_styles": _Recipe("instructions", ("style",), 160, duplicates=8),
    HELPER: _Recipe("maths", ("count",), 160),
}
_USELESS_SIZE = 160
# The share of base rows in the wordings of the mix. Without it a base of 1100 steps started at 2.7-4.1 nats a token on
# the targets, and the first part of a run taught little but the wordings.
_FORETASTE = 0.02
_BASE_KINDS = ("trade", "groups", "saving", "count", "loop", "function", "value", "order", "order", "style", "style")


def make_world(seed: int = 0, *, quick: bool = False) -> World:
    """Generate a world: 8 sources, 3 targets, base text; `quick` halves the sources and thins the base text.

    No prompt of a target is in a source or in the base. The same seed gives the same world.
    """
    generator = random.Random(f"fastsft world {seed}")
    share = 0.5 if quick else 1.0
    targets, taken = _draw_targets(generator)
    sources: dict[str, list[Sample]] = {}
    harmful: list[str] = []
    duplicates: list[tuple[str, str]] = []
    for name, recipe in _RECIPES.items():
        samples, spoilt = _draw_source(name, recipe, int(share * recipe.size), generator, taken)
        twins = _add_twins(samples, int(share * recipe.duplicates), generator)
        sources[name] = samples
        harmful += spoilt
        duplicates += twins
    sources[USELESS] = [_tale(number, generator) for number in range(int(share * _USELESS_SIZE))]
    base = _draw_base(1800 if quick else 4500, generator, taken)
    return World(sources, targets, base, Planted(harmful, duplicates, USELESS, HELPER, ("maths", "code")))


def _draw_targets(generator: random.Random, size: int = 60) -> tuple[dict[str, list[Sample]], set[str]]:
    targets: dict[str, list[Sample]] = {}
    taken: set[str] = set()
    for ability in ("maths", "code", "instructions"):
        kinds = [
            kind
            for name, recipe in _RECIPES.items()
            if recipe.ability == ability and name != HELPER
            for kind in recipe.kinds
        ]
        targets[ability] = []
        for number in range(size):
            prompt, right, _ = _fresh(kinds[number % len(kinds)], generator, taken)
            taken.add(prompt)
            targets[ability].append(_sample(f"target_{ability}", number, ability, prompt, right))
    return targets, taken


def _draw_source(
    name: str, recipe: _Recipe, size: int, generator: random.Random, taken: set[str]
) -> tuple[list[Sample], list[str]]:
    spoilt = set(generator.sample(range(size), round(recipe.harmful * size)))
    seen = set(taken)
    samples = []
    for number in range(size):
        prompt, right, wrong = _fresh(recipe.kinds[number % len(recipe.kinds)], generator, seen)
        seen.add(prompt)
        samples.append(_sample(name, number, recipe.ability, prompt, wrong if number in spoilt else right))
    return samples, [samples[number].id for number in sorted(spoilt)]


def _add_twins(samples: list[Sample], count: int, generator: random.Random) -> list[tuple[str, str]]:
    pairs = []
    for sample in generator.sample(samples, count):
        twin = _sample(sample.source, len(samples), sample.ability, sample.prompt, sample.response)
        samples.append(twin)
        pairs.append((sample.id, twin.id))
    return pairs


def _draw_base(size: int, generator: random.Random, taken: set[str]) -> list[Sample]:
    samples = []
    for number in range(size):
        easy = generator.random() >= _FORETASTE
        prompt, right, _ = _fresh(_BASE_KINDS[number % len(_BASE_KINDS)], generator, taken, easy=easy)
        samples.append(_sample("base", number, None, prompt, right))
    return samples


def _fresh(kind: str, generator: random.Random, taken: set[str], *, easy: bool = False) -> tuple[str, str, str]:
    for _ in range(10_000):
        prompt, right, wrong = draw_task(kind, generator, easy=easy)
        if prompt not in taken and right != wrong:
            return prompt, right, wrong
    raise AssertionError(f"kind {kind!r} has too few prompts for the sizes asked of it")


def _tale(number: int, generator: random.Random) -> Sample:
    """Write a tale in made-up words: fluent in no ability."""

    def word() -> str:
        return "".join(generator.choice("bdfglmnprtvz") + generator.choice("aeiou") for _ in range(2))

    beast = word()
    tale = " ".join(word() for _ in range(4))
    return _sample(USELESS, number, "instructions", f"A tale of the {beast}.", f"The {beast} {tale}.")


def _sample(source: str, number: int, ability: str | None, prompt: str, response: str) -> Sample:
    return Sample(f"{source}-{number:04d}", source, (("user", prompt), ("assistant", response)), ability)
