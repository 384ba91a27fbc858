"""A model, a tokenizer, rows and trainers small enough to train in a blink, and the reading of what a run wrote."""

import random
from collections import defaultdict

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import fastsft
from fastsft.data import Row, RowDataset
from fastsft.train.loop import Padding

VOCABULARY = 64
SOURCES = ("apples", "bricks", "clouds")


def make_model(seed=0, dropout=0.0):
    """A random Llama of two layers, hidden 32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def make_lora(model=None, *, rank=4, dropout=0.0, seed=0):
    """LoRA on every linear layer, both of its sides away from zero."""
    from peft import LoraConfig, get_peft_model

    model = model or make_model()
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def make_rows(count, *, seed=0, prefix="row", shortest=6, longest=16):
    """Random rows over three sources, the first half of each a prompt."""
    generator = random.Random(f"{seed} {prefix}")
    rows = []
    for number in range(count):
        length = generator.randint(shortest, longest)
        ids = [generator.randrange(2, VOCABULARY) for _ in range(length)]
        prompt = length // 2
        labels = [-100] * prompt + ids[prompt:]
        rows.append(Row(f"{prefix}-{number}", SOURCES[number % len(SOURCES)], ids, labels))
    return rows


def make_targets(seed=7):
    return {name: make_rows(4, seed=seed, prefix=name) for name in ("maths", "code")}


def make_tokenizer():
    """One token a word: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def words(row):
    """A row as prompt and response of words."""
    split = next(place for place, label in enumerate(row.labels) if label != -100)
    return tuple(" ".join(f"w{token}" for token in part) for part in (row.input_ids[:split], row.input_ids[split:]))


def arguments(out, **settings):
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": 3,
        **settings,
    }
    return TrainingArguments(output_dir=str(out), **given)


def make_trainer(out, model, dataset=None, *, width=None, eval_dataset=None, collator=None, **settings):
    dataset = dataset if dataset is not None else RowDataset(make_rows(24))
    return Trainer(
        model=model,
        args=arguments(out, **settings),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator or Padding(0, width),
    )


def attach(trainer, out, *, targets=None, samples=None, **settings):
    settings = {"refresh_every": 2, **settings}
    return fastsft.attach(
        trainer, targets or make_targets(), out=out, settings=fastsft.Attribution(**settings), samples=samples
    )


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def influence_of(record):
    """{(step, sample, ability): phi}; a sample drawn twice in a step adds up."""
    table = record.influence().to_pydict()
    phi = defaultdict(float)
    for step, sample, ability, value in zip(
        table["step"], table["sample_id"], table["ability"], table["phi"], strict=True
    ):
        phi[step, sample, ability] += value
    return dict(phi)


def ledger_of(record):
    """Every number of every interval's entries: {(from, to, ability, name, ...): nats}."""
    numbers = {}
    for event in record.events("interval"):
        for ability, entry in event["abilities"].items():
            place = (event["from"], event["to"], ability)
            for name, value in entry.items():
                if isinstance(value, dict):
                    numbers.update({(*place, name, source): each for source, each in value.items()})
                else:
                    numbers[(*place, name)] = value
    return numbers


def assert_close(found, expected, *, share):
    """The same keys, and values that differ by less than `share` of the largest."""
    assert found.keys() == expected.keys()
    one, other = np.array(list(found.values())), np.array([expected[key] for key in found])
    assert np.isfinite(other).all()
    assert len(other)
    largest = np.abs(other).max()
    assert largest > 0
    worst = np.abs(one - other).max() / largest
    assert worst < share, f"off by {worst:.1e} of the largest"


def assert_adds_up(record):
    """Every interval's entry adds up to what was measured."""
    intervals = list(record.events("interval"))
    assert intervals
    for event in intervals:
        for entry in event["abilities"].values():
            parts = sum(entry["by_source"].values()) + sum(
                entry[name] for name in ("decay", "unfollowed", "carried", "residual")
            )
            assert abs(parts - entry["measured"]) < 1e-9
            assert abs(entry["gross"] - sum(map(abs, entry["by_source"].values()))) < 1e-9
