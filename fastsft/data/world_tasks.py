"""The tasks of the generated world: wordings, right answers, and answers that are wrong by a rule.

Every prompt is a wording with fields, so it can be read back: `answer_of` finds the wording that a prompt follows and
solves it from its fields alone, not from what was noted when it was written.
"""

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastsft.data.samples import DataError, Sample

Fields = dict[str, Any]
Wording = tuple[str, str]  # the text with {fields}, and what the hidden operation is ("" where there is none)

NAMES = ("Ann", "Ben", "Eva", "Tom", "Zoe", "Max")
THINGS = ("coins", "books", "pens", "eggs", "cards", "shells")
WORDS = (
    *("cat", "dog", "sun", "tree", "fish", "red", "blue", "hat", "cup", "map", "bird", "box"),
    *("car", "milk", "rain", "king", "leaf", "moon", "nest", "road", "salt", "ship", "star", "wolf"),
)
MARKS = ("-", "+", "/", ";", ":")


@dataclass(frozen=True, slots=True)
class Kind:
    """Describe one kind of task: wordings (`easy` ones are in the base text too), fields, answer, wrong answer."""

    wordings: tuple[Wording, ...]
    easy: tuple[Wording, ...]
    draw: Callable[[random.Random, bool], Fields]
    solve: Callable[[str, Fields], str]
    spoil: Callable[[str, Fields], str]


def draw_task(kind: str, generator: random.Random, *, easy: bool = False) -> tuple[str, str, str]:
    """Draw one task of a kind -> prompt, right answer, wrong answer."""
    task = KINDS[kind]
    text, operation = generator.choice(task.easy if easy else task.wordings)
    fields = task.draw(generator, easy)
    return text.format(**fields), task.solve(operation, fields), task.spoil(operation, fields)


def answer_of(sample: Sample) -> str:
    """Solve a sample of the world from its prompt: the answer it ought to have."""
    for pattern, operation, kind in _patterns():
        match = pattern.fullmatch(sample.prompt)
        if match:
            fields = {name: int(text) if text.isdigit() else text for name, text in match.groupdict().items()}
            return kind.solve(operation, fields)
    raise DataError(
        f"sample {sample.id!r} of source {sample.source!r} follows no wording of the world, so it has no right answer: "
        f"{sample.prompt!r}. Ask only for samples of the sources that hold tasks."
    )


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str, Kind]]:
    found = []
    for kind in KINDS.values():
        for text, operation in dict.fromkeys((*kind.wordings, *kind.easy)):
            found.append((_pattern(text), operation, kind))
    return found


def _pattern(text: str) -> re.Pattern[str]:
    """Turn a wording into a pattern: the first mention of a field is a group, later ones must repeat it."""
    seen: set[str] = set()

    def group(field: re.Match[str]) -> str:
        name = field[1]
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>.+?)"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(text)))


def _arithmetic(operation: str, fields: Fields) -> str:
    a, b = fields["a"], fields["b"]
    result = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return f"{a} {operation} {b} = {result}"


def _backwards(operation: str, fields: Fields) -> str:
    return f"{fields['b']} - {fields['a']} = 0"


def _added(operation: str, fields: Fields) -> str:
    return _arithmetic("+", fields)


def _story_numbers(generator: random.Random, easy: bool) -> Fields:
    b = generator.randint(1, 9)
    a = generator.randint(b + 1, 40 if easy else 60)
    return {"who": generator.choice(NAMES), "what": generator.choice(THINGS), "a": a, "b": b}


def _group_numbers(generator: random.Random, easy: bool) -> Fields:
    return _story_numbers(generator, easy) | {"a": generator.randint(2, 6), "b": generator.randint(2, 9)}


def _steps(fields: Fields) -> range:
    return range(fields["a"], fields["a"] + 5 * fields["d"], fields["d"])


def _step_numbers(generator: random.Random, easy: bool) -> Fields:
    d = generator.randint(1, 2) if easy else generator.randint(3, 5)
    a = generator.randint(1, 45 if easy else 60)
    return {"a": a, "d": d, "end": a + 5 * d, "who": generator.choice(NAMES), "what": generator.choice(THINGS)}


def _listing(operation: str, fields: Fields) -> str:
    return " ".join(map(str, _steps(fields)))


def _late_listing(operation: str, fields: Fields) -> str:
    return _listing(operation, fields | {"a": fields["a"] + fields["d"]})


def _function_parts(generator: random.Random, easy: bool) -> Fields:
    return {"f": generator.choice("fghkpq"), "x": generator.choice("abnxyz"), "b": generator.randint(1, 30)}


def _function(operation: str, fields: Fields) -> str:
    f, x, b = fields["f"], fields["x"], fields["b"]
    return f"def {f}({x}): return {x} {operation} {b}"


def _useless_function(operation: str, fields: Fields) -> str:
    return f"def {fields['f']}({fields['x']}): print({fields['x']})"


def _printed(operation: str, fields: Fields) -> str:
    return str(fields["a"] + fields["b"] if operation == "+" else fields["a"] - fields["b"])


def _wrongly_printed(operation: str, fields: Fields) -> str:
    return _printed("-" if operation == "+" else "+", fields)


def _words(generator: random.Random, easy: bool) -> Fields:
    words = generator.sample(WORDS, 3)
    return {"words": " ".join(words), "mark": generator.choice(MARKS)}


def _ordered(operation: str, fields: Fields) -> str:
    words = fields["words"].split()
    moved = {"back": words[::-1], "left": words[1:] + words[:1], "right": words[-1:] + words[:-1]}
    return " ".join(moved[operation])


def _refused(operation: str, fields: Fields) -> str:
    return "I can not do that."


def _styled(operation: str, fields: Fields) -> str:
    words = fields["words"].split()
    styles = {
        "number": " ".join(f"{at} {word}" for at, word in enumerate(words, start=1)),
        "mark": fields.get("mark", "").join(words),
        "twice": " ".join(word for word in words for _ in range(2)),
    }
    return styles[operation]


def _plain_words(operation: str, fields: Fields) -> str:
    return str(fields["words"])


_GAINS_AT_HOME: tuple[Wording, ...] = (
    ("{who} has {a} {what} and gets {b} more. How many now?", "+"),
    ("{who} has {a} {what} and loses {b}. How many now?", "-"),
)
_GAINS: tuple[Wording, ...] = (
    ("{who} owns {a} {what}, then buys {b}. What is the total?", "+"),
    ("{who} owns {a} {what}, then finds {b}. What is the total?", "+"),
    ("{who} owns {a} {what}, then sells {b}. What is the total?", "-"),
    ("{who} owns {a} {what}, then breaks {b}. What is the total?", "-"),
)
_FUNCTIONS_AT_HOME: tuple[Wording, ...] = (
    ("Write {f}({x}): {x} plus {b}.", "+"),
    ("Write {f}({x}): {x} minus {b}.", "-"),
)
_FUNCTIONS: tuple[Wording, ...] = (
    ("Code {f} to raise {x} by {b}.", "+"),
    ("Code {f} to lower {x} by {b}.", "-"),
    ("Code {f} to scale {x} by {b}.", "*"),
)

KINDS: dict[str, Kind] = {
    "trade": Kind(_GAINS, _GAINS_AT_HOME, _story_numbers, _arithmetic, _backwards),
    "groups": Kind(
        (("{who} fills {a} bags with {b} {what} each. What is the total?", "*"),),
        (("What is {a} * {b}?", "*"),),
        _group_numbers,
        _arithmetic,
        _added,
    ),
    "saving": Kind(
        (("{who} has {a} {what} and adds {d} every day. List 5 days.", ""),),
        (("{who} has {a} {what} and adds {d} every day. List 5 days.", ""),),
        _step_numbers,
        _listing,
        _late_listing,
    ),
    "count": Kind(
        (("Count from {a} in steps of {d}.", ""), ("Go on by {d} from {a}.", "")),
        (("Count from {a} in steps of {d}.", ""),),
        _step_numbers,
        _listing,
        _late_listing,
    ),
    "loop": Kind(
        (("for i in range({a}, {end}, {d}): print(i)", ""),),
        (("for i in range({a}, {end}, {d}): print(i)", ""),),
        _step_numbers,
        _listing,
        _late_listing,
    ),
    "function": Kind(_FUNCTIONS, _FUNCTIONS_AT_HOME, _function_parts, _function, _useless_function),
    "value": Kind(
        (("x = {a}; x += {b}; print(x)", "+"), ("x = {a}; x -= {b}; print(x)", "-")),
        (("print({a} + {b})", "+"), ("print({a} - {b})", "-")),
        _story_numbers,
        _printed,
        _wrongly_printed,
    ),
    "order": Kind(
        (
            ("Turn the words around: {words}", "back"),
            ("Put the opening word at the end: {words}", "left"),
            ("Put the closing word at the front: {words}", "right"),
        ),
        (("Backwards: {words}", "back"), ("Rotate left: {words}", "left"), ("Rotate right: {words}", "right")),
        _words,
        _ordered,
        _refused,
    ),
    "style": Kind(
        (
            ("Give each word a number: {words}", "number"),
            ("Put {mark} between: {words}", "mark"),
            ("Say each word twice: {words}", "twice"),
        ),
        (
            ("Number: {words}", "number"),
            ("Join by {mark}: {words}", "mark"),
            ("Double: {words}", "twice"),
        ),
        _words,
        _styled,
        _plain_words,
    ),
}
