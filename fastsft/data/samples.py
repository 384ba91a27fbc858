"""One training example with a stable id, and the sentence said when a row cannot be one.

Reading files is left to `sources`, tokenising to `tokens`.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Names that other formats use for our fields, tried before spelling: "completion" is far from "response" in letters.
_ALIASES = {
    "prompt": ("instruction", "question", "input", "query"),
    "response": ("completion", "output", "answer", "answers", "target"),
    "messages": ("conversations", "conversation", "chat", "dialog"),
    "content": ("value", "text"),
    "role": ("from", "speaker"),
}


class DataError(ValueError):
    """A file, row or sample that cannot be used, said in one sentence with the way out."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one conversation whose last turn is the response to learn.

    `messages` are (role, content) pairs; the last role is "assistant" and its content is not blank.
    """

    id: str
    source: str
    messages: tuple[tuple[str, str], ...]
    ability: str | None = None

    def __post_init__(self) -> None:
        _check_messages(self.messages, f"sample {self.id!r} of source {self.source!r}")

    @property
    def prompt(self) -> str:
        """Give the text before the response: a lone user turn as it is, several turns as "role: content" lines."""
        before = self.messages[:-1]
        if len(before) == 1 and before[0][0] == "user":
            return before[0][1]
        return "\n".join(f"{role}: {content}" for role, content in before)

    @property
    def response(self) -> str:
        """Give the content of the last assistant turn."""
        return self.messages[-1][1]

    @classmethod
    def from_row(
        cls, row: dict[str, Any], *, source: str | None = None, ability: str | None = None, where: str
    ) -> "Sample":
        """Turn a row, {prompt, response} or {messages: [{role, content}]}, into a sample.

        `source` and `ability` win over the row's own fields where they are given; null fields count as absent.
        Without an id the sample gets `content_id`. `where` opens every error ("train.jsonl, row 7").
        """
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be an object with fields, got {_kind(row)} ({_short(row)}).")
        fields = {key: value for key, value in row.items() if value is not None}
        messages = _messages_of(fields, where)
        _check_messages(messages, where)
        named_source = source if source is not None else _text_field(fields, "source", where)
        if named_source is None:
            raise DataError(
                f'{where}: no source is given and the row has no field "source"; pass `source=` or add the field.'
            )
        return cls(
            id=_id_of(fields, messages, where),
            source=named_source,
            messages=messages,
            ability=ability if ability is not None else _text_field(fields, "ability", where),
        )


def content_id(messages: Sequence[tuple[str, str]]) -> str:
    """Hash the messages to 16 hex digits: the same on every machine and in every source (blake2b of their JSON)."""
    text = json.dumps([list(message) for message in messages], ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def nearest(name: str, known: Sequence[str]) -> str:
    """Name the known word nearest to `name` as the tail of a sentence, or list what there is."""
    alias = next((word for word in _ALIASES.get(name, ()) if word in known), None)
    close = alias or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)
    if close is not None:
        return f'the nearest is "{close}"'
    shown = ", ".join(f'"{word}"' for word in list(known)[:12])
    return f"there is {shown}" if shown else "there is nothing"


def _messages_of(fields: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    if "messages" not in fields:
        return (
            ("user", _required_text(fields, "prompt", where)),
            ("assistant", _required_text(fields, "response", where)),
        )
    if "response" in fields:
        raise DataError(
            f'{where}: a row holds either "messages" or "prompt" and "response", this one has both; remove one of them.'
        )
    turns = fields["messages"]
    if not isinstance(turns, list | tuple):
        raise DataError(
            f'{where}: "messages" must be a list of {{role, content}} objects, got {_kind(turns)} ({_short(turns)}).'
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{place}: a message must be an object with role and content, got {_kind(turn)}.")
        messages.append((_required_text(turn, "role", place), _required_text(turn, "content", place)))
    return tuple(messages)


def _check_messages(messages: tuple[tuple[str, str], ...], where: str) -> None:
    if not messages or messages[-1][0] != "assistant":
        came = f'a message of role "{messages[-1][0]}"' if messages else "no message at all"
        raise DataError(
            f'{where}: the last message must be of role "assistant", for it is what is learnt; got {came}. '
            f"Drop the turns after the last answer, or the row."
        )
    if not messages[-1][1].strip():
        raise DataError(f"{where}: the response is empty, so there is nothing to learn; fill it in or drop the row.")


def _id_of(fields: dict[str, Any], messages: tuple[tuple[str, str], ...], where: str) -> str:
    given = fields.get("id")
    if given is None:
        return content_id(messages)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise DataError(
            f'{where}: "id" must be a text or a whole number, got {_kind(given)} ({_short(given)}); '
            f"leave the field out to get a hash of the content."
        )
    return str(given)


def _required_text(fields: dict[str, Any], name: str, where: str) -> str:
    if fields.get(name) is None:
        wanted = (
            'A row needs "prompt" and "response", or "messages".'
            if name in ("prompt", "response")
            else 'A message needs "role" and "content".'
        )
        raise DataError(f'{where}: no field "{name}"; {nearest(name, list(fields))}. {wanted} Rename or add it.')
    text = _text_field(fields, name, where)
    assert text is not None
    return text


def _text_field(fields: dict[str, Any], name: str, where: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f'{where}: "{name}" must be text, got {_kind(value)} ({_short(value)}); '
            f'write it as a string, or use "messages" for a conversation.'
        )
    return value


def _kind(value: object) -> str:
    return {"dict": "an object", "list": "a list", "str": "text"}.get(type(value).__name__, type(value).__name__)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
