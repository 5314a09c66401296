"""K responses to each of many real prompts: ours against transformers' `generate`, useful tokens a second, one thread.

    python benchmarks/best_of_k.py [--model runs/smollm2] [--rounds 3] [--prompts 64] [--k 16]

Without `--model`, a Llama of 1.3 M parameters is first taught HH-RLHF dialogues for some minutes (`--train_steps`), so
that it ends its responses where people did; `--model` names any chat model. Prompts are the real ones, or drawn ids of
their lengths where they are absent. The peer is `generate(num_return_sequences=k)` over prompts sorted by length, in
batches of the size that is fastest for it on a part of the prompts (`--peer_prompts` fixes it); it gives no log-probs,
ours gives two for each token. A useful token is one of a response, its end included. Both must give the same greedy
responses, and sampled ones of the same mean length within four standard errors. Rounds go in turn; figures are medians
of processor seconds; peak memory is each side's own, in a process of its own, above what it held before sampling.

The prediction counts tokens: a prompt's are computed once instead of k times, and a row that has ended leaves its
place, instead of being fed until the longest of its batch ends. The last line is one JSON object: `ratio` of the rates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from time import process_time

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.hh_pairs import KIT, SETS, VOCABULARY, hh_pairs
from benchmarks.memory import forget_peak, peak_since_mib, resident_mib
from configs.chat import load_chat_format
from configs.records import read_preferences
from configs.sampling_settings import SamplingSettings
from reward.tree import shared_tokens
from rlhf.sampler import sample
from rlhf.tokenizer import load_tokenizer

EOS, PAD = 2, 3  # of the small Llama
BATCH = 16  # dialogues of a step that teaches it
PEER_BATCHES = (1, 2, 4, 8, 16)  # prompts in a batch of generate, tried where none is given


@dataclass(frozen=True)
class Task:
    """What both sides sample."""

    model: LlamaForCausalLM
    prompts: list[list[int]]
    k: int
    stop_ids: list[int]
    pad_id: int
    max_new_tokens: int
    token_budget: int
    data: str


def taught_llama(folder: Path, steps: int) -> None:
    """A small Llama after `steps` optimizer steps on HH-RLHF dialogues, the end token after each, saved to `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=EOS, pad_token_id=PAD, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pairs, _ = hh_pairs(2400, seed=1, max_length=512)
    for step in range(steps):
        batch = []
        for i in range(step * BATCH, (step + 1) * BATCH):
            pair = pairs[i % len(pairs)]
            prompt = shared_tokens((pair.chosen_ids, pair.rejected_ids))
            batch.append((torch.tensor([*pair.chosen_ids[:-1].tolist(), EOS]), prompt))
        ids = torch.nn.utils.rnn.pad_sequence([each for each, _ in batch], batch_first=True, padding_value=PAD)
        labels = ids.masked_fill(ids == PAD, -100)
        for row, (_, prompt) in enumerate(batch):
            labels[row, :prompt] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def small_prompts(count: int) -> tuple[list[list[int]], str]:
    """Prompts of HH-RLHF pairs in the small Llama's ids."""
    pairs, data = hh_pairs(count, seed=0, max_length=512)
    return [p.chosen_ids[: shared_tokens((p.chosen_ids, p.rejected_ids))].tolist() for p in pairs], data


def real_prompts(count: int, model: str, longest: int) -> tuple[list[list[int]], list[int]]:
    """HH-RLHF prompts in the ids of the tokenizer of `model`, and its stop ids."""
    tokenizer = load_tokenizer(model)
    chat = load_chat_format(tokenizer)
    rows = [row for name in SETS for row in read_preferences(KIT / f"hh-{name}-train.jsonl.gz", chat_format=chat).rows]
    order = np.random.default_rng(0).permutation(len(rows))
    prompts = (chat.encode_prompt(rows[i]["prompt"]) for i in order)
    chosen = [ids for ids in prompts if len(ids) <= longest][:count]
    return chosen, list(chat.stop_ids)


def ours(task: Task, temperature: float = 1.0, k: int | None = None, seed: int = 0) -> list[list[int]]:
    """Response ids, prompt-major."""
    settings = SamplingSettings(temperature=temperature, max_new_tokens=task.max_new_tokens)
    batch = sample(
        task.model, task.prompts, k or task.k, settings, stop_ids=task.stop_ids, pad_id=task.pad_id, seed=seed,
        token_budget=task.token_budget,
    )  # fmt: skip
    return batch.response_ids


def peer(task: Task, batch: int, temperature: float = 1.0, k: int | None = None, seed: int = 0) -> list[list[int]]:
    """Response ids of `generate`, prompt-major; padding after the first stop id is cut off."""
    torch.manual_seed(seed)
    k = k or task.k
    order = sorted(range(len(task.prompts)), key=lambda i: -len(task.prompts[i]))
    responses: list[list[int]] = [[] for _ in range(len(task.prompts) * k)]
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(task.prompts[i]) for i in rows)
        ids = torch.tensor([[task.pad_id] * (width - len(task.prompts[i])) + task.prompts[i] for i in rows])
        mask = torch.tensor([[0] * (width - len(task.prompts[i])) + [1] * len(task.prompts[i]) for i in rows])
        with torch.inference_mode():
            found: Tensor = task.model.generate(
                ids, attention_mask=mask, max_new_tokens=task.max_new_tokens, num_return_sequences=k,
                eos_token_id=task.stop_ids, pad_token_id=task.pad_id, **({"do_sample": False} | drawing),
            )  # fmt: skip
        for row, drawn in enumerate(found[:, width:].tolist()):
            ends = [at for at, token in enumerate(drawn) if token in task.stop_ids]
            responses[rows[row // k] * k + row % k] = drawn[: ends[0] + 1] if ends else drawn
    return responses


def fed_tokens(task: Task, responses: list[list[int]], batch: int) -> dict[str, int]:
    """Prompt and response tokens that each side computes for the same responses."""
    order = sorted(range(len(task.prompts)), key=lambda i: -len(task.prompts[i]))
    prompt = decode = 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        prompt += max(len(task.prompts[i]) for i in rows) * len(rows) * task.k
        longest = max(len(ids) for i in rows for ids in responses[i * task.k : (i + 1) * task.k])
        decode += (longest - 1) * len(rows) * task.k
    return {
        "peer_prompt": prompt,
        "peer_response": decode,
        "ours_prompt": sum(map(len, task.prompts)),
        "ours_response": sum(len(ids) - 1 for ids in responses),
    }


def check_same(task: Task, responses: dict[str, list[list[int]]]) -> None:
    """AssertionError where greedy responses differ, or the mean lengths of sampled ones by four standard errors."""
    few = Task(**{**vars(task), "prompts": task.prompts[:8], "max_new_tokens": 32})
    same = [one == two for one, two in zip(ours(few, 0.0, 1), peer(few, 8, 0.0, 1), strict=True)]
    assert all(same), f"greedy responses differ on {same.count(False)} of {len(same)} prompts"
    lengths = {side: [len(ids) for ids in found] for side, found in responses.items()}
    if all(len(each) > 1 for each in lengths.values()):
        # Responses to one prompt resemble each other: the standard error is that of the prompts' means.
        means = {s: [fmean(each[i : i + task.k]) for i in range(0, len(each), task.k)] for s, each in lengths.items()}
        differences = [a - b for a, b in zip(means["ours"], means["peer"], strict=True)]
        error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
        assert abs(fmean(differences)) <= 4 * error + 1e-9, f"mean lengths differ by {fmean(differences):.1f} tokens"


def memory_mib(arguments: argparse.Namespace, side: str, model: str, batch: int) -> float:
    """Peak memory of one side above what it held before sampling, measured in a process of its own."""
    words = [sys.executable, __file__, "--only", side, "--model", model, "--peer_prompts", str(batch)]
    for name in ("prompts", "k", "max_new_tokens", "token_budget", "longest_prompt"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--small"] if arguments.small or arguments.model is None else []
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def load_task(arguments: argparse.Namespace, model: str) -> Task:
    """The model of that folder and the prompts."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if arguments.model is None or arguments.small:
        prompts, data = small_prompts(arguments.prompts)
        stop_ids, pad_id = [EOS], PAD
    else:
        prompts, stop_ids = real_prompts(arguments.prompts, model, arguments.longest_prompt)
        data, pad_id = "hh-rlhf", 0  # nobody sees the padding; one that load_tokenizer adds is not in the embeddings
    return Task(network, prompts, arguments.k, stop_ids, pad_id, arguments.max_new_tokens, arguments.token_budget, data)


def fastest_batch(task: Task) -> int:
    """Prompts a batch with which `generate` is fastest on every fourth prompt."""
    part = Task(**{**vars(task), "prompts": sorted(task.prompts, key=len)[::4]})
    rates = {}
    for batch in PEER_BATCHES:
        if batch <= len(part.prompts):
            started = process_time()
            rates[batch] = sum(map(len, peer(part, batch))) / (process_time() - started)
    print("useful tokens/s of generate by prompts in a batch:", {n: round(rate) for n, rate in rates.items()})
    return max(rates, key=lambda n: rates[n])


def main(arguments: argparse.Namespace) -> None:
    """Check, measure in turn, print the tables and the JSON line."""
    torch.set_num_threads(1)
    if arguments.only:
        task = load_task(arguments, arguments.model)
        forget_peak()  # reading the prompts takes more than sampling
        before = resident_mib()
        ours(task) if arguments.only == "ours" else peer(task, arguments.peer_prompts)
        print(peak_since_mib() - before)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or f"{scratch}/model"
        if arguments.model is None:
            taught_llama(Path(folder), arguments.train_steps)
        task = load_task(arguments, folder)
        batch = arguments.peer_prompts or fastest_batch(task)
        sides: dict[str, Callable[[int], list[list[int]]]] = {
            "ours": lambda seed: ours(task, seed=seed),
            "peer": lambda seed: peer(task, batch, seed=seed),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        responses: dict[str, list[list[int]]] = {}
        for seed in range(arguments.rounds):
            for side, run in sides.items():
                started = process_time()
                responses[side] = run(seed)
                rates[side].append(sum(map(len, responses[side])) / (process_time() - started))
            print(f"round {seed + 1}, useful tokens/s:", {side: round(found[-1]) for side, found in rates.items()})
        check_same(task, responses)
        memory = {side: memory_mib(arguments, side, folder, batch) for side in sides}
    fed = fed_tokens(task, responses["ours"], batch)
    lengths = sorted(map(len, responses["ours"]))
    rate = {side: median(found) for side, found in rates.items()}
    print("| side | useful tokens/s | tokens computed: prompt | response | peak memory, MiB |\n|---|---|---|---|---|")
    for side in sides:
        print(
            f"| {side} | {rate[side]:.0f} | {fed[f'{side}_prompt']} | {fed[f'{side}_response']} | {memory[side]:.0f} |"
        )
    print(json.dumps({
        "ratio": rate["ours"] / rate["peer"], "tokens_per_second": rate, "rounds": rates,
        "prediction": (fed["peer_prompt"] + fed["peer_response"]) / (fed["ours_prompt"] + fed["ours_response"]),
        "fed": fed, "memory_mib": memory, "memory_ratio": memory["ours"] / memory["peer"],
        "response_tokens": {"mean": fmean(lengths), "median": median(lengths), "max": lengths[-1]},
        "cut": sum(n == task.max_new_tokens for n in lengths) / len(lengths),
        "prompt_tokens": fmean(map(len, task.prompts)), "peer_prompts": batch, "k": task.k,
        "prompts": len(task.prompts), "data": task.data,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--longest_prompt", type=int, default=512)
    parser.add_argument("--token_budget", type=int, default=32_768)
    parser.add_argument("--train_steps", type=int, default=450)
    parser.add_argument("--peer_prompts", type=int, default=0)
    parser.add_argument("--only", choices=["ours", "peer"], default=None, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    main(parser.parse_args())
