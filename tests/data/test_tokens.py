import copy

import pytest

from fastsft.data import IGNORED, DataError, Sample, read_source, tokenize, tokenize_all

MESSAGES = (("user", "What is 2 + 2?"), ("assistant", "2 + 2 = 4"))
SAMPLE = Sample("one", "drills", MESSAGES)
LONG = Sample("long", "drills", (("user", "cat " * 30), ("assistant", "dog dog")))


def supervised(row, tokenizer):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


@pytest.fixture
def plain(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = None
    return copied


def test_loss_is_on_the_response_and_its_end_of_turn(tokenizer):
    row = tokenize(SAMPLE, tokenizer, max_length=64)
    assert (row.id, row.source) == ("one", "drills")
    assert tokenizer.decode(row.input_ids) == "<|user|> What is 2 + 2?<|end|><|assistant|> 2 + 2 = 4<|end|>"
    assert supervised(row, tokenizer).strip() == "2 + 2 = 4<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_only_the_last_answer_of_a_conversation_is_supervised(tokenizer):
    turns = (("system", "Be short."), *MESSAGES, ("user", "And 1?"), ("assistant", "5"))
    row = tokenize(Sample("m", "s", turns), tokenizer, max_length=99)
    assert supervised(row, tokenizer).strip() == "5<|end|>"


def test_supervise_all_leaves_out_only_the_first_token(tokenizer):
    row = tokenize(SAMPLE, tokenizer, max_length=64, supervise="all")
    assert row.labels == [IGNORED, *row.input_ids[1:]]


def test_what_a_template_writes_after_the_end_of_turn_carries_no_loss(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>' }}", "'<|end|>\\n' }}")
    row = tokenize(SAMPLE, tokenizer, max_length=64)
    assert tokenizer.decode(row.input_ids).endswith("<|end|>\n") or row.input_ids[-1] != tokenizer.eos_token_id
    assert supervised(row, tokenizer).strip() == "2 + 2 = 4<|end|>"


def test_without_a_template_text_is_prompt_newline_response_eos(plain):
    row = tokenize(SAMPLE, plain, max_length=64)
    prompt, response = plain("What is 2 + 2?\n")["input_ids"], plain("2 + 2 = 4")["input_ids"]
    assert row.input_ids == [*prompt, *response, plain.eos_token_id]
    assert row.labels == [IGNORED] * len(prompt) + [*response, plain.eos_token_id]


def test_tokenizer_with_neither_template_nor_eos_is_refused(plain):
    plain.eos_token = None
    with pytest.raises(DataError, match=r"neither a chat template nor an eos token.*set `tokenizer.eos_token`"):
        tokenize(SAMPLE, plain, max_length=64)


def test_template_whose_prompt_is_no_prefix_is_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|assistant|>' }}", "'<|assistant|> think' }}").replace(
        "%}<|assistant|>{%", "%}<|assistant|>Well:{%"
    )
    with pytest.raises(DataError, match=r"sample 'one' of source 'drills'.*prefix.*they part at token .*Well"):
        tokenize(SAMPLE, tokenizer, max_length=64)


def test_over_long_sample_is_refused_with_its_length_and_the_ways_out(tokenizer):
    length = len(tokenize(LONG, tokenizer, max_length=999).input_ids)
    for call in (tokenize, lambda sample, *args, **kwargs: tokenize_all([sample], *args, **kwargs)):
        with pytest.raises(DataError) as error:
            call(LONG, tokenizer, max_length=20)
        for part in ["'long'", "'drills'", f"{length} tokens", "`max_length` is 20", '"drop"', '"truncate"']:
            assert part in str(error.value)


def test_sample_of_exactly_max_length_fits(tokenizer):
    length = len(tokenize(LONG, tokenizer, max_length=999).input_ids)
    assert len(tokenize(LONG, tokenizer, max_length=length).input_ids) == length
    with pytest.raises(DataError):
        tokenize(LONG, tokenizer, max_length=length - 1)


def test_dropped_and_truncated_samples_are_listed(tokenizer):
    length = len(tokenize(LONG, tokenizer, max_length=999).input_ids)
    dropped = tokenize_all([LONG, SAMPLE], tokenizer, max_length=length - 1, over_long="drop")
    assert ([row.id for row in dropped.rows], dropped.dropped, dropped.truncated) == (["one"], ["long"], [])
    cut = tokenize_all([LONG, SAMPLE], tokenizer, max_length=length - 1, over_long="truncate")
    assert ([row.id for row in cut.rows], cut.dropped, cut.truncated) == (["long", "one"], [], ["long"])
    assert len(cut.rows[0].input_ids) == len(cut.rows[0].labels) == length - 1
    assert cut.rows[0].num_supervised > 0


def test_cut_that_leaves_nothing_to_learn_drops_the_sample(tokenizer):
    cut = tokenize_all([LONG, SAMPLE], tokenizer, max_length=20, over_long="truncate")
    assert ([row.id for row in cut.rows], cut.dropped, cut.truncated) == (["one"], ["long"], [])


def test_nothing_left_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"none of 1 samples is left at `max_length` 20.*raise `max_length`"):
        tokenize_all([LONG], tokenizer, max_length=20, over_long="drop")


def test_unknown_choices_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"`over_long` must be .* got 'cut'"):
        tokenize_all([SAMPLE], tokenizer, max_length=20, over_long="cut")
    with pytest.raises(DataError, match=r"`supervise` must be .* got 'prompt'"):
        tokenize(SAMPLE, tokenizer, max_length=64, supervise="prompt")


def test_real_tokenizer_splits_prompt_and_response_exactly(real_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "base-model")
    samples = read_source("gsm8k", "maths/gsm8k/validation.jsonl.gz", limit=20, root=real_data)
    rows = tokenize_all(samples, tokenizer, max_length=512, over_long="drop").rows
    assert len(rows) >= 18
    texts = {sample.id: sample.response for sample in samples}
    for row in rows:
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert supervised(row, tokenizer) == texts[row.id] + "<|end|>"
