"""Rows: samples as token ids, with the loss on the response only.

A tokenizer with a chat template is asked for the whole conversation and for the prompt part; without one the text is
prompt, newline, response, end-of-text. Only the last assistant turn is supervised: earlier ones are context.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastsft.data.samples import DataError, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Row:
    """Hold one tokenised sample; `labels` are -100 where a token is not supervised, and always at the first token."""

    id: str
    source: str
    input_ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """Count the tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Hold the rows of many samples, and the ids of those that were dropped or cut for their length."""

    rows: list[Row]
    dropped: list[str]
    truncated: list[str]


def tokenize(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    supervise: Literal["response", "all"] = "response",
) -> Row:
    """Tokenise one sample; its end-of-turn token is supervised with the response.

    What a template writes after the last end-of-turn token (a newline, often) carries no loss.
    `supervise="all"` puts loss on every token but the first, which nothing predicts.
    """
    row = _row(sample, tokenizer, supervise)
    if len(row.input_ids) > max_length:
        raise DataError(_too_long(row, max_length))
    return row


def tokenize_all(
    samples: Iterable[Sample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    over_long: Literal["error", "drop", "truncate"] = "error",
    supervise: Literal["response", "all"] = "response",
) -> Tokenized:
    """Tokenise samples in order; say what became of those over `max_length` tokens.

    "truncate" keeps the first `max_length` tokens; a sample left with no supervised token is dropped instead.
    """
    if over_long not in ("error", "drop", "truncate"):
        raise DataError(f'`over_long` must be "error", "drop" or "truncate", got {over_long!r}.')
    result = Tokenized([], [], [])
    num_samples = 0
    for sample in samples:
        num_samples += 1
        row = _row(sample, tokenizer, supervise)
        if len(row.input_ids) <= max_length:
            result.rows.append(row)
            continue
        if over_long == "error":
            raise DataError(_too_long(row, max_length))
        cut = Row(row.id, row.source, row.input_ids[:max_length], row.labels[:max_length])
        if over_long == "truncate" and cut.num_supervised:
            result.rows.append(cut)
            result.truncated.append(row.id)
        else:
            result.dropped.append(row.id)
    if not result.rows:
        raise DataError(
            f"none of {num_samples} samples is left at `max_length` {max_length} with over_long={over_long!r}; "
            f"raise `max_length`, or shorten the prompts."
        )
    return result


def _row(sample: Sample, tokenizer: "PreTrainedTokenizerBase", supervise: str) -> Row:
    if supervise not in ("response", "all"):
        raise DataError(f'`supervise` must be "response" or "all", got {supervise!r}.')
    ids, start, stop = _chat(sample, tokenizer) if tokenizer.chat_template else _plain(sample, tokenizer)
    if supervise == "all":
        start, stop = 0, len(ids)
    start = max(start, 1)
    labels = [IGNORED] * start + ids[start:stop] + [IGNORED] * (len(ids) - stop)
    row = Row(sample.id, sample.source, ids, labels[: len(ids)])
    if not row.num_supervised:
        raise DataError(
            f"sample {sample.id!r} of source {sample.source!r}: the tokenizer leaves no supervised token of its "
            f"response ({sample.response[:40]!r}); drop the sample, or use another tokenizer."
        )
    return row


def _chat(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int, int]:
    turns = [{"role": role, "content": content} for role, content in sample.messages]
    whole = _ids(tokenizer.apply_chat_template(turns, return_dict=False))
    prompt: list[int] = []
    if len(turns) > 1:
        prompt = _ids(tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False))
    if whole[: len(prompt)] != prompt:
        parted = next((at for at, (one, two) in enumerate(zip(prompt, whole, strict=False)) if one != two), len(whole))
        raise DataError(
            f"sample {sample.id!r} of source {sample.source!r}: the chat template's prompt part must be a prefix of "
            f"the whole conversation, or the response cannot be told from it; they part at token {parted} of "
            f"{len(prompt)} ({tokenizer.decode(prompt[parted : parted + 8])!r} against "
            f"{tokenizer.decode(whole[parted : parted + 8])!r}). Give the tokenizer a template whose generation prompt "
            f"equals the opening of an assistant turn."
        )
    return whole, len(prompt), _end_of_turn(whole, len(prompt), tokenizer.eos_token_id)


def _plain(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int, int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has neither a chat template nor an eos token, so the end of a response cannot be marked; "
            "set `tokenizer.eos_token` or `tokenizer.chat_template`."
        )
    text = f"{sample.prompt}\n" if sample.prompt else ""
    prompt = _ids(tokenizer(text)["input_ids"])
    if prompt and prompt[-1] == end:
        # Some tokenizers close every text with eos; the response still follows here.
        prompt = prompt[:-1]
    response = _ids(tokenizer(sample.response, add_special_tokens=False)["input_ids"])
    return [*prompt, *response, end], len(prompt), len(prompt) + len(response) + 1


def _end_of_turn(ids: list[int], start: int, eos_id: int | None) -> int:
    for at in range(len(ids) - 1, start - 1, -1):
        if ids[at] == eos_id:
            return at + 1
    return len(ids)


def _ids(ids: object) -> list[int]:
    assert isinstance(ids, list), f"token ids expected, got {type(ids)}"
    return ids


def _too_long(row: Row, max_length: int) -> str:
    return (
        f"sample {row.id!r} of source {row.source!r} has {len(row.input_ids)} tokens, `max_length` is {max_length}; "
        f'raise `max_length`, or choose over_long="drop" or over_long="truncate", which list what they touched.'
    )
