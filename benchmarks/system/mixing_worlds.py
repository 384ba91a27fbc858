"""Small worlds in which what a mix should do is known, because it was planted.

A skill is a handful of tables: the answer to each symbol of a prompt, told by the table's mark at its start. An ability
asks for skills in given shares; a source teaches skills in given shares. So a source that helps two abilities, one
that contradicts another or one that teaches noise is a line in `WORLDS`, and what every source is good for can be read
there. Symbols are drawn by Zipf's law, so that losses fall slowly, as those of text do.
"""

# N rows of a source

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fastsft.data import IGNORED, DataError, Row, train_base
from fastsft.tasks import Mix
from fastsft.train.config import TrainConfig
from fastsft.train.sampler import Draws, MixStream

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# symbols of every prompt, and of its answer
LENGTH = 6
SYMBOLS = 64
# tokens: marks of the base model's own tables, which no world asks for, then those of a world's, then symbols
PAD, ASK, FIRST_BASE_MARK, FIRST_MARK, FIRST_SYMBOL = 0, 1, 2, 10, 64
VOCABULARY = FIRST_SYMBOL + SYMBOLS
# rows that a policy and the choice of an oracle look at, and rows that reports are of; each ability
VALIDATION, TEST = 40, 96
_LATER = ", later"


@dataclass(frozen=True, kw_only=True)
class Skill:
    """So many tables of `keys` entries each -> answers.

    noise: how often an answer is any symbol instead, for nobody to predict. zipf: how fast keys grow rare. prompts_of:
    the skill that this one looks like, and contradicts.
    """

    tables: int
    keys: int
    noise: float = 0.0
    zipf: float = 1.0
    prompts_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Teaches:
    """A source: so many rows, of skills in these shares, and the ability that it was gathered for.

    turns_after: the rows that are drawn later, in the order in which a run with the world's seed draws them, teach
    `into` instead.
    """

    rows: int
    skills: Mapping[str, float]
    ability: str | None = None
    turns_after: int | None = None
    into: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A world: its skills, what its abilities ask and its sources teach, and what a good mix does there."""

    skills: Mapping[str, Skill]
    abilities: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, Teaches]
    good: str


class Setting(NamedTuple):
    """How every world is trained: all linear layers of one base model, for so many supervised tokens.

    The rate is low for so small a model: at 3e-3 two runs whose mixes differ by a hundredth were 5 % apart, at 1e-3
    below 1 % (standard deviation over 4 seeds), and a mix that is better by that much would not be seen.
    """

    train: TrainConfig
    tokens: int = 15000
    refresh_every: int = 8
    base_steps: int = 300


SETTING = Setting(TrainConfig(method="full", learning_rate=1.2e-3, batch_size=16, warmup_steps=5, max_length=32))


@dataclass(frozen=True)
class Data:
    """What a benchmark trains on and measures; no row is in two of its parts."""

    sources: Mapping[str, list[Row]]
    ability_of: Mapping[str, str | None]
    validation: Mapping[str, list[Row]]
    test: Mapping[str, list[Row]]


def _own(rows: int, name: str, ability: str) -> Teaches:
    return Teaches(rows=rows, skills={name: 1.0}, ability=ability)


_EASY = Skill(tables=1, keys=16)
_MEDIUM = Skill(tables=2, keys=32)
_HARD = Skill(tables=4, keys=64)
# nothing to learn but which symbols there are
_NOISE = Skill(tables=1, keys=64, noise=1.0)

WORLDS: dict[str, Plan] = {
    "difficulty": Plan(
        skills={
            "proofs": _HARD,
            "loops": _MEDIUM,
            "smalltalk": Skill(tables=1, keys=10),
            "colours": Skill(tables=1, keys=6),
        },
        abilities={
            "maths": {"proofs": 1.0},
            "code": {"loops": 1.0},
            "general": {"smalltalk": 1.0},
            "taste": {"colours": 1.0},
        },
        sources={
            "maths": _own(2500, "proofs", "maths"),
            "code": _own(2500, "loops", "code"),
            "general": _own(4000, "smalltalk", "general"),
            "taste": _own(3000, "colours", "taste"),
        },
        good="gives most to maths, which is learned slowly, and little to what is learned at once",
    ),
    "transfer": Plan(
        skills={"logic": _HARD, "sums": _MEDIUM, "syntax": _MEDIUM, "smalltalk": _EASY},
        abilities={
            "maths": {"logic": 0.6, "sums": 0.4},
            "code": {"logic": 0.6, "syntax": 0.4},
            "general": {"smalltalk": 1.0},
        },
        sources={
            "textbook": _own(2500, "logic", "maths"),
            "sums": _own(1500, "sums", "maths"),
            "syntax": _own(1500, "syntax", "code"),
            "chat": _own(3000, "smalltalk", "general"),
            "forum": _own(3000, "smalltalk", "general"),
        },
        good="gives most to the textbook, which two abilities need, and little to two sources that teach the same",
    ),
    "contradiction": Plan(
        skills={
            "sums": _MEDIUM,
            "wrong sums": dataclasses.replace(_MEDIUM, prompts_of="sums"),
            "syntax": _MEDIUM,
            "smalltalk": _EASY,
        },
        abilities={"maths": {"sums": 1.0}, "code": {"syntax": 1.0}, "general": {"smalltalk": 1.0}},
        sources={
            "maths": _own(2500, "sums", "maths"),
            "code": _own(2500, "syntax", "code"),
            "general": _own(2500, "smalltalk", "general"),
            "clash": _own(2500, "wrong sums", "maths"),
        },
        good="drops clash, which answers the prompts of maths wrongly",
    ),
    "tiny": Plan(
        skills={
            "proofs": Skill(tables=2, keys=32, noise=0.4),
            "syntax": _HARD,
            "smalltalk": _EASY,
        },
        abilities={"maths": {"proofs": 1.0}, "code": {"syntax": 1.0}, "general": {"smalltalk": 1.0}},
        sources={
            "maths": _own(24, "proofs", "maths"),
            "web": Teaches(rows=3000, skills={"proofs": 0.25, "smalltalk": 0.75}),
            "code": _own(3000, "syntax", "code"),
            "general": _own(3000, "smalltalk", "general"),
        },
        good="leaves maths before its errors are learned by heart, takes the web for it, and has no need of general",
    ),
    "noise": Plan(
        skills={
            "proofs": _HARD,
            "syntax": _MEDIUM,
            "smalltalk": Skill(tables=1, keys=16, noise=0.6),
            "babble": _NOISE,
            "static": _NOISE,
        },
        abilities={"maths": {"proofs": 1.0}, "code": {"syntax": 1.0}, "general": {"smalltalk": 1.0}},
        sources={
            "maths": _own(2500, "proofs", "maths"),
            "code": _own(2500, "syntax", "code"),
            "general": _own(2500, "smalltalk", "general"),
            "babble": Teaches(rows=2500, skills={"babble": 1.0}),
            "static": Teaches(rows=2500, skills={"static": 1.0}),
        },
        good="drops babble and static, whose loss stays high because nothing is in them, and soon leaves general",
    ),
    "shift": Plan(
        skills={
            "proofs": _HARD,
            "wrong proofs": dataclasses.replace(_HARD, prompts_of="proofs"),
            "syntax": _MEDIUM,
            "smalltalk": _EASY,
            "gossip": _NOISE,
        },
        abilities={"maths": {"proofs": 1.0}, "code": {"syntax": 1.0}, "general": {"smalltalk": 1.0}},
        sources={
            "feed": Teaches(rows=2500, skills={"proofs": 1.0}, turns_after=300, into={"wrong proofs": 1.0}),
            "archive": Teaches(rows=2500, skills={"proofs": 0.6, "gossip": 0.4}),
            "code": _own(2500, "syntax", "code"),
            "general": _own(2500, "smalltalk", "general"),
        },
        good="leaves the feed when 300 rows of it are read, for the rest is wrong, and goes on with the archive",
    ),
    "no gain": Plan(
        skills=dict.fromkeys(("sums", "syntax", "smalltalk", "maps"), _MEDIUM),
        abilities={
            "maths": {"sums": 1.0},
            "code": {"syntax": 1.0},
            "general": {"smalltalk": 1.0},
            "world": {"maps": 1.0},
        },
        sources={
            "maths": _own(2500, "sums", "maths"),
            "code": _own(2500, "syntax", "code"),
            "general": _own(2500, "smalltalk", "general"),
            "world": _own(2500, "maps", "world"),
        },
        good="stays uniform: the abilities are alike",
    ),
}


def make_data(name: str, seed: int) -> Data:
    """Draw a world's tables and rows; the seed is in all of them."""
    plan = plan_of(name)
    tables = {skill: _tables(of.tables, name, seed, skill) for skill, of in plan.skills.items()}
    marks = _marks(plan.skills)
    taken: set[bytes] = set()

    def draw(part: str, rows: int, shares: Mapping[str, float]) -> list[Row]:
        rng = _rng(name, seed, part)
        order = rng.choice(list(shares), size=rows, p=list(shares.values())).tolist()
        drawn = {
            skill: iter(_lines(plan.skills[skill], marks[skill], tables[skill], order.count(skill), rng, taken))
            for skill in shares
        }
        return [_row(part, at, *next(drawn[skill])) for at, skill in enumerate(order)]

    held = {
        part: {ability: draw(f"{part} of {ability}", rows, shares) for ability, shares in plan.abilities.items()}
        for part, rows in (("validation", VALIDATION), ("test", TEST))
    }
    sources = {}
    for source, of in plan.sources.items():
        if of.turns_after is None:
            sources[source] = draw(source, of.rows, of.skills)
            continue
        later = draw(f"{source}{_LATER}", of.rows - of.turns_after, of.into)
        sources[source] = drawn_in_order(draw(source, of.turns_after, of.skills) + later, source, seed)
    return Data(sources, {source: of.ability for source, of in plan.sources.items()}, held["validation"], held["test"])


def sizes_of(name: str) -> dict[str, int]:
    """Supervised tokens of each source."""
    return {source: LENGTH * of.rows for source, of in plan_of(name).sources.items()}


def drawn_in_order(rows: list[Row], source: str, seed: int) -> list[Row]:
    """Lay a source's rows so that a run whose `Draws` have this seed draws them first to last in its first epoch."""
    N = len(rows)
    stream = MixStream(
        {source: range(N)}, [1] * N, Mix({source: 1.0}), batch=1, steps=N, draws=Draws(unit="rows", seed=seed)
    )
    laid = list(rows)
    for row, place in zip(rows, stream, strict=True):
        laid[place] = row
    return laid


def plan_of(name: str) -> Plan:
    if name not in WORLDS:
        raise DataError(f"`world` must be one of {', '.join(WORLDS)}: got {name!r}.")
    return WORLDS[name]


def _marks(skills: Mapping[str, Skill]) -> dict[str, list[int]]:
    """Give every table a token of its own, but the tables that contradict others theirs."""
    found: dict[str, list[int]] = {}
    free = FIRST_MARK
    for name, of in skills.items():
        if of.prompts_of is not None:
            found[name] = found[of.prompts_of]
            continue
        found[name] = list(range(free, free + of.tables))
        free += of.tables
    return found


def _rng(*key: object) -> np.random.Generator:
    """Draw from a stream of its own for every key, so that a world keeps its rows when another part of it changes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _tables(number: int, *key: object) -> np.ndarray:
    """[table, symbol] -> answer."""
    return _rng(*key, "tables").integers(0, SYMBOLS, (number, SYMBOLS))


def _lines(
    skill: Skill, marks: Sequence[int], tables: np.ndarray, number: int, rng: np.random.Generator, taken: set[bytes]
) -> list[tuple[list[int], list[int]]]:
    """Draw prompts that no other row has, and their answers."""
    law = 1 / np.arange(1, skill.keys + 1) ** skill.zipf
    found: list[tuple[list[int], list[int]]] = []
    for _ in range(100):
        left = number - len(found)
        table = rng.integers(skill.tables, size=left)
        symbols = rng.choice(skill.keys, size=(left, LENGTH), p=law / law.sum())
        wrong = rng.random((left, LENGTH)) < skill.noise
        answers = np.where(wrong, rng.integers(0, SYMBOLS, (left, LENGTH)), tables[table[:, None], symbols])
        prompts = np.concatenate([np.array(marks)[table][:, None], FIRST_SYMBOL + symbols], axis=1)
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.tobytes() not in taken:
                taken.add(prompt.tobytes())
                found.append((prompt.tolist(), (FIRST_SYMBOL + answer).tolist()))
        if len(found) == number:
            return found
    raise DataError(f"a skill of {skill.keys} keys has too few prompts for {number} rows: give it more keys.")


def _row(part: str, at: int, prompt: list[int], answer: list[int]) -> Row:
    head = [*prompt, ASK]
    return Row(f"{part}/{at}", part.removesuffix(_LATER), head + answer, [IGNORED] * len(head) + answer)


@functools.lru_cache(maxsize=2)
def base_model(steps: int) -> LlamaForCausalLM:
    """A small Llama that has learned eight other tables: it knows where to look, and no answer.

    128 tokens, hidden size 64, 1 layer; the same in every process. Its linear layers alone are trained on, so the
    books cover all that moves. 300 steps take some 3 s.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    marks = range(FIRST_BASE_MARK, FIRST_MARK)
    skill = Skill(tables=len(marks), keys=SYMBOLS, zipf=0.5)
    tables, rng = _tables(len(marks), "base"), _rng("base")
    lines = _lines(skill, marks, tables, 3600, rng, set())
    rows = [_row("base", at, prompt, answer) for at, (prompt, answer) in enumerate(lines)]
    train_base(model, rows, steps=steps, batch_size=32, learning_rate=3e-3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 2 and "embed" not in name)
    return model
