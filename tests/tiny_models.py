"""Throwaway models and data for tests: a byte-level tokenizer and Llamas of a few thousand weights, made in process."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["red", "blue", "cat", "dog", "runs", "sleeps", "over", "under", "the", "a", "small", "large", "house", "tree"]


def tiny_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <unk> 0, <s> 1, </s> 2 and, with `pad`, <pad> 3."""
    special = ["<unk>", "<s>", "</s>"] + (["<pad>"] if pad else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "[INST] the cat [/INST] "] * 4, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_config(vocabulary: int, **extra) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}  # fmt: skip
    return LlamaConfig(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **(sizes | extra))


def save_tiny_policy(folder: Path, seed: int = 0, pad: bool = True, **extra) -> str:
    tokenizer = tiny_tokenizer(pad)
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(len(tokenizer), **extra)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_reward_model(folder: Path, seed: int) -> str:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(rng: random.Random, low: int = 2, high: int = 8) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def dialogue_rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"messages": [{"role": "user", "content": f"{i} {words(rng)}"}, {"role": "assistant", "content": words(rng)}]}
        for i in range(count)
    ]


def prompt_rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": [{"role": "user", "content": f"{i} {words(rng)}"}], "is_safety": i % 4 == 0} for i in range(count)
    ]


VOCAB, STOP, PAD = 40, 2, 3  # of `ragged_model`


def ragged_model() -> LlamaForCausalLM:
    """A Llama without a tokenizer whose responses depend on the history and end at different lengths, also greedy."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        tiny_config(
            VOCAB, hidden_size=32, intermediate_size=48, max_position_embeddings=256, initializer_range=0.3,
            pad_token_id=PAD,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 3
    return model


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]
