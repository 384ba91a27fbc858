"""Say whether an answer is right: the final answer of a sum, what code does, a format that was asked for, each word.

A check is chosen from a sample, or by name: "exact", "final", "function", "completion", "printed", or one of FORMATS
with what it needs after a colon ("words:20"). A format check sees the format only, not whether what stands in it is
true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from fastsft.data import Sample
from fastsft.evaluate._programs import Programs

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGNED = rf"(?:(?<![\w)])-)?\$?(?:{_NUMBER})(?:\s?/\s?\d+)?"  # the minus of "5-3" is no sign
# answers that are a number without being marked as one: by itself, or after "=" in a sum of nothing but numbers
_UNMARKED = re.compile(rf"(?:[\d\s$.,()+*/-]+=)*\s*{_SIGNED}%?\s*\.?")
# beyond this an answer is a runaway, and no number
_LONGEST = 200


@dataclass(frozen=True)
class Check:
    """A named test of an answer."""

    name: str
    passes: Callable[[str], bool]


class Checker:
    """Chooses the checks of samples. `notes` holds what must be said of how code was run."""

    def __init__(self, seed: int = 0) -> None:
        self._programs = Programs(seed)

    @property
    def notes(self) -> list[str]:
        return sorted(self._programs.notes)

    def choose(self, sample: Sample) -> Check:
        """Choose what judges the sample best: running code, then a final answer, then a format that its prompt asks
        for, and else every word. A check that the reference itself fails is passed over."""
        names = ["function", "printed", "completion", *(["final"] if _has_final(sample.response) else [])]
        for name in (*names, *formats_of(sample.prompt)):
            check = self._made(name, sample)
            if check is not None and check.passes(sample.response):
                return check
        return Check("exact", lambda answer: _words(answer) == _words(sample.response))

    def named(self, name: str, sample: Sample) -> Check:
        """Take the check of that name; a ValueError where it can't judge the sample."""
        if name == "exact":
            return Check("exact", lambda answer: _words(answer) == _words(sample.response))
        check = self._made(name, sample)
        if check is None:
            raise ValueError(
                f"the check {name!r} can't judge sample {sample.id!r} of source {sample.source!r}, whose reference is "
                f"{sample.response[:60]!r}. Leave the choice to 'auto', or name another check."
            )
        return check

    def _made(self, name: str, sample: Sample) -> Check | None:
        kind, _, wanted = name.partition(":")
        passes: Callable[[str], bool] | None
        if kind in FORMATS:
            _check_format(kind, wanted)
            follows = FORMATS[kind]
            passes = lambda answer: follows(answer.strip(), wanted)  # noqa: E731
        elif name == "final":
            reference = final_answer(sample.response)
            passes = None if reference is None else lambda answer: final_answer(answer) == reference
        elif name in ("function", "printed", "completion"):
            passes = getattr(self._programs, name)(sample)
        else:
            known = ", ".join(("auto", "exact", "final", "function", "printed", "completion", *FORMATS))
            raise ValueError(
                f"there is no check {name!r}: name one of {known} (the formats with ':' and what they need)."
            )
        return None if passes is None else Check(name, passes)


def final_answer(text: str) -> Fraction | str | None:
    """Read the final answer: after the last "####", in the last box, or the last number. None where there is none.

    Numbers are compared by value: 1,000 = 1000.0, $3.50 = 7/2, 50% = 50. Anything else is a word, in small letters.
    """
    if "####" in text:
        return _value(text.rpartition("####")[2].strip().partition("\n")[0])
    if (boxed := _boxed(text)) is not None:
        return _value(boxed)
    numbers = re.findall(_SIGNED, _plain(text))
    return _value(numbers[-1]) if numbers else None


def _has_final(text: str) -> bool:
    return "####" in text or _boxed(text) is not None or _UNMARKED.fullmatch(_plain(text).strip()) is not None


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at]
    return None


def _plain(text: str) -> str:
    """Take off what a number is dressed in: signs of LaTeX, a typographic minus."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%").replace("\\!", "").replace("\\,", "")
    text = re.sub(r"\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}", r"\1/\2", text)
    return re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)


def _value(text: str) -> Fraction | str:
    text = _plain(text).strip().rstrip(".").strip("$ ")
    numbers = re.findall(_SIGNED, text)
    # "18 apples" is 18; "3, 4" and "x = 2y + 1" are no one number
    if len(numbers) == 1 and not re.search(r"[=+*^]", text) and len(text) <= _LONGEST:
        top, _, bottom = re.sub(r"[$,\s]", "", numbers[0]).partition("/")
        if not bottom or int(bottom):
            return Fraction(top) / int(bottom or 1)
    return _words(text).strip("()").casefold()


def _words(text: str) -> str:
    return " ".join(text.split())


def _json(answer: str, _: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", answer, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return True


def _items(answer: str) -> int:
    """Count a list's items: its marked lines, else its lines, else what commas part."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    marked = [line for line in lines if re.match(r"(?:[-*•]|\(?\d+[.):])\s", line)]
    if marked or len(lines) > 1:
        return len(marked or lines)
    return len([item for item in re.split(r",|\band\b", answer) if item.strip()])


def _sentences(answer: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", answer) if part.strip()])


# a format -> whether an answer follows it, given what was asked for
FORMATS: Mapping[str, Callable[[str, str], bool]] = {
    "json": _json,
    "list": lambda answer, number: _items(answer) == int(number),
    "one_word": lambda answer, _: len(answer.split()) == 1,
    "words": lambda answer, most: 0 < len(answer.split()) <= int(most),
    "sentences": lambda answer, most: 0 < _sentences(answer) <= int(most),
    "upper": lambda answer, _: answer.isupper(),
    "lower": lambda answer, _: answer.islower(),
    "starts": lambda answer, text: answer.casefold().startswith(text.casefold()),
    "ends": lambda answer, text: answer.casefold().rstrip(".!").endswith(text.casefold().rstrip(".!")),
}
_NEED_NUMBER, _NEED_TEXT = ("list", "words", "sentences"), ("starts", "ends")


def _check_format(kind: str, wanted: str) -> None:
    if kind in _NEED_NUMBER and not wanted.isdecimal():
        raise ValueError(f"the check {kind!r} needs a whole number after a colon, as {kind}:3: got {wanted!r}.")
    if kind in _NEED_TEXT and not wanted:
        raise ValueError(f"the check {kind!r} needs a text after a colon, as {kind}:yes: got none.")


_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT = rf"(\d{{1,3}}|{'|'.join(_COUNTS)})"
_QUOTED = r"(?:the (?:word|phrase|letter|words)s? )?[\"'“‘](.+?)[\"'”’]"
# how prompts ask for a format -> its name, with what is needed from the wording's group
_WORDINGS = tuple(
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (r"\b(?:in|as|with) (?:just |only )?(?:a single|a|one) word\b", "one_word"),
        (r"\b(?:in|as)(?: an?)?(?: valid)? json\b", "json"),
        (rf"\b(?:list|name|give(?: me)?|suggest|provide) {_COUNT}\b", "list"),
        (rf"\b(?:at most|no more than|up to|a maximum of) {_COUNT} words\b", "words"),
        (rf"\b(?:in|at most|no more than|up to) {_COUNT} sentences?\b", "sentences"),
        (r"\bin (?:all )?(?:capital letters|capitals|upper ?case)\b", "upper"),
        (r"\bin (?:all )?(?:small letters|lower ?case)\b", "lower"),
        (rf"\b(?:start|begin)(?:s|ning)?(?: your \w+| the \w+)? with {_QUOTED}", "starts"),
        (rf"\bend(?:s|ing)?(?: your \w+| the \w+)? with {_QUOTED}", "ends"),
    )
)


def formats_of(prompt: str) -> list[str]:
    """Read from a prompt's wording which formats it asks for."""
    found = []
    for pattern, name in _WORDINGS:
        match = pattern.search(prompt)
        if match and match.groups():
            wanted = match[1].lower()
            number = str(_COUNTS.index(wanted) + 1) if wanted in _COUNTS else match[1]
            found.append(f"{name}:{number}")
        elif match:
            found.append(name)
    return found
