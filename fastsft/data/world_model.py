"""The small tokenizer and model of the generated world, and the loop that pretrains it."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from fastsft.data.batches import collate
from fastsft.data.samples import DataError
from fastsft.data.tokens import Row

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 400
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MARKS = ("<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def small_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Train a byte-pair tokenizer of at most 400 entries: every digit a token of its own, chat marks single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<|unknown|>"))
    split = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # A space before every turn makes a word the same token at the start of a turn as inside it.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(_MARKS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unknown|>", eos_token="<|end|>"
    )
    fast.chat_template = _TEMPLATE
    return fast


def small_model(tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> "LlamaForCausalLM":
    """Build an untrained Llama of 0.7 M parameters for the tokenizer: 3 layers, 4 heads, hidden size 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(
    model: "LlamaForCausalLM",
    rows: Sequence[Row],
    *,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Pretrain the model on rows with AdamW -> the loss of every step, nats a supervised token.

    Batches hold rows of like length. The rate warms up over a twentieth of the steps and falls to a tenth along a
    cosine. `progress` is called with (step, steps, loss) after each step. The same arguments give the same weights.
    """
    pad_id = model.config.pad_token_id
    if pad_id is None:
        raise DataError("`model.config.pad_token_id` must be set, got None; `small_model` takes it from its tokenizer.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.05, div_factor=10, final_div_factor=1
    )
    model.train()
    losses: list[float] = []
    for step, indices in enumerate(_batches(rows, batch_size, steps, seed), start=1):
        batch = collate([rows[at] for at in indices], pad_id)
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step, steps, losses[-1])
    model.eval()
    return losses


def _batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> Iterable[list[int]]:
    generator = random.Random(seed)
    given = 0
    while given < steps:
        order = list(range(len(rows)))
        generator.shuffle(order)
        # Sorting inside pools of 16 batches keeps padding low and the order random.
        pool = 16 * batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda at: len(rows[at].input_ids))
            batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        generator.shuffle(batches)
        yield from batches[: steps - given]
        given += len(batches)
