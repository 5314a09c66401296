"""Reward training: pairs a second and memory, ours against `trl.RewardTrainer`, on one thread of a CPU in float32.

    python benchmarks/reward_training.py [--rounds 3] [--pairs 320]

A Llama 256 wide with 4 layers, batches of 16 of Anthropic's helpful and harmless pairs (generated ones where they are
absent). First both must give the same loss and gradients for the same pairs. Then every way of training runs in a
process of its own, strictly in turn, `rounds` times; figures are medians. Times are processor seconds of one thread,
which other work on the machine hardly touches. The second table is the cost of a pair by the length of its prompt. The
last line is one JSON object:

    ratio          our pairs/s over those of trl's random batches, gradient checkpointing off on both sides
    ratio_default  over trl's defaults (checkpointing on; bfloat16, its default too, is off on both sides)
    ratio_best     both with train_sampling_strategy group_by_length, trl's fastest setting
    memory_ratio   our peak over trl's with random batches, each above what is resident with libraries and pairs loaded
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf import cli  # noqa: F401,I001  (first: it switches off telemetry before trl is imported)

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.hh_pairs import VOCABULARY, hh_pairs, of_ids
from benchmarks.memory import peak_mib, resident_mib
from benchmarks.trl_peer import trl_trainer
from configs.model_settings import RunSettings
from configs.reward_settings import RewardSettings
from reward.data import EncodedPair
from reward.model import load_reward_model
from rlhf.reward_training import RewardTrainer, training_arguments

BATCH, WARM_UP = 16, 32
PAD_ID = 3
SIDES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, grouped": {"train_sampling_strategy": "group_by_length"},
    "trl": {},
    "trl, default": {"gradient_checkpointing": True},
    "trl, grouped": {"train_sampling_strategy": "group_by_length"},
}
PROMPTS = (128, 512, 1024, 2048, 4096)  # tokens, of the second table
RESPONSE = 64


def save_model(folder: str) -> None:
    """The small Llama with a scalar head, and a tokenizer that names its special tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_labels=1, pad_token_id=PAD_ID, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    words = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


def trainer_of(side: str, pairs: list[EncodedPair], folder: str, scratch: str, **options: Any) -> Any:
    """A trainer of that side over `pairs`, one pass in batches of BATCH, both with the same optimizer and schedule."""
    settings = RewardSettings(
        train_files=["none"], margin="none", per_device_train_batch_size=BATCH, learning_rate=1e-4,
        **({} if side.startswith("trl") else SIDES[side] | options),
    )  # fmt: skip
    if side.startswith("trl"):
        model = LlamaForSequenceClassification.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return trl_trainer(model, tokenizer, pairs, settings, scratch, bf16=False, **SIDES[side] | options)
    run = RunSettings(output_dir=scratch, use_cpu=True)
    arguments = training_arguments(run, settings)
    return RewardTrainer(load_reward_model(folder), arguments, settings, pairs, PAD_ID, None, lambda *_: None)


def measure(side: str, pairs: list[EncodedPair], folder: str, scratch: str) -> dict[str, float]:
    """Processor seconds of one pass over `pairs` after a short one to warm up, and the peak above what is resident now,
    with libraries and pairs loaded, MiB.
    """
    before = resident_mib()
    trainer_of(side, pairs[:WARM_UP], folder, scratch).train()
    trainer = trainer_of(side, pairs[WARM_UP:], folder, scratch)
    started = process_time()
    trainer.train()
    return {"seconds": process_time() - started, "peak_mib": peak_mib() - before, "pairs": len(pairs) - WARM_UP}


def by_length(side: str, folder: str, scratch: str) -> dict[int, float]:
    """Processor seconds a pair by prompt tokens: the faster of two passes over two pairs, after one to warm up."""
    rng = np.random.default_rng(0)
    found = {}
    for tokens in PROMPTS:
        parts = [[rng.integers(4, VOCABULARY, n) for n in (tokens, RESPONSE, RESPONSE)] for _ in range(2)]
        times = []
        for _ in range(3):
            trainer = trainer_of(side, [of_ids(*each) for each in parts], folder, scratch)
            started = process_time()
            trainer.train()
            times.append((process_time() - started) / 2)
        found[tokens] = min(times[1:])
    return found


def check_equal(pairs: list[EncodedPair], folder: str, scratch: str) -> dict[str, float]:
    """Loss and gradients of both sides on the first BATCH pairs; AssertionError where they differ."""
    losses, gradients = [], []
    for side in ("ours", "trl"):
        trainer = trainer_of(side, pairs[:BATCH], folder, scratch)
        model = trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        if side == "ours":
            loss = trainer.training_step(model, batch)
        else:
            loss = trainer.compute_loss(model, batch)
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().double() for _, p in sorted(model.named_parameters())]))
    relative = abs(losses[0] - losses[1]) / losses[1]
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert relative <= 1e-5, f"the losses differ: {losses}"
    assert cosine >= 0.9999, f"the gradients differ: cosine {cosine}"
    return {"loss_difference": relative, "gradient_cosine": cosine}


def child(task: str, folder: str, count: int) -> dict[str, Any]:
    """One task in a fresh process: `side`, `lengths side` or `check`."""
    command = [sys.executable, __file__, "--child", task, "--folder", folder, "--pairs", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child(task: str, folder: str, count: int) -> None:
    """What a child prints: one JSON line."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if task.startswith("lengths "):
            result: Any = by_length(task.removeprefix("lengths "), folder, scratch)
        else:
            pairs, data = hh_pairs(count + WARM_UP)
            do = check_equal if task == "check" else lambda *rest: measure(task, *rest)
            result = {**do(pairs, folder, scratch), "data": data}
    print("\n" + json.dumps(result))


def main(rounds: int, count: int, lengths: bool) -> None:
    """Check, measure in turn, print the tables and the JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        check = child("check", folder, count)
        print(f"same loss (relative difference {check['loss_difference']:.1e}) and gradients "
              f"(cosine {check['gradient_cosine']:.7f}) on {BATCH} pairs")  # fmt: skip
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for i in range(rounds):
            for side in SIDES:
                runs[side].append(child(side, folder, count))
                found = runs[side][-1]
                print(f"round {i + 1}: {side}: {found['pairs'] / found['seconds']:.2f} pairs/s", flush=True)
        rates = {side: median(run["pairs"] / run["seconds"] for run in found) for side, found in runs.items()}
        peaks = {side: median(run["peak_mib"] for run in found) for side, found in runs.items()}
        print("\n| reward training | pairs/s | peak MiB above libraries and pairs |\n|---|---|---|")
        for side in SIDES:
            print(f"| {side} | {rates[side]:.2f} | {peaks[side]:.0f} |")
        table = {}
        if lengths:
            table = {side: child(f"lengths {side}", folder, count) for side in ("ours", "trl")}
            print(f"\n| prompt tokens (responses {RESPONSE} each) | ours, ms a pair | us a token | trl, ms a pair |")
            print("|---|---|---|---|")
            for tokens in map(str, PROMPTS):
                ours, trl = table["ours"][tokens], table["trl"][tokens]
                each = 1e6 * ours / (int(tokens) + 2 * RESPONSE)
                print(f"| {tokens} | {1000 * ours:.0f} | {each:.0f} | {1000 * trl:.0f} |")
    print(json.dumps({
        "ratio": rates["ours"] / rates["trl"],
        "ratio_default": rates["ours"] / rates["trl, default"],
        "ratio_best": rates["ours, grouped"] / rates["trl, grouped"],
        "memory_ratio": peaks["ours"] / peaks["trl"],
        "pairs_per_second": rates, "peak_mib": peaks, "data": check["data"], "pairs": count, "rounds": rounds,
        "seconds_by_prompt_tokens": table,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--no_lengths", action="store_true", help="leave out the second table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.folder, arguments.pairs)
    else:
        main(arguments.rounds, arguments.pairs, not arguments.no_lengths)
