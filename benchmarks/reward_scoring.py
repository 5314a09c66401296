"""Best-of-K scoring: responses a second, ours against padded batches through plain transformers, on one CPU thread.

    python benchmarks/reward_scoring.py [--rounds 3] [--prompts 24] [--k 16]

The small Llama of reward_training.py scores `k` responses to each of the real prompts (generated ones where they are
absent). The responses are those of other pairs, so that lengths are real. Both sides must give the same scores to 1e-4.
The peer pads batches of 16 rows, in the order of the prompts or (`sorted`) by length, each dialogue a row with its
prompt. Rounds go in turn; figures are medians of processor seconds. The last line is one JSON object: `ratio` against
the batches in order, `ratio_best` against the sorted ones.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf import cli  # noqa: F401,I001  (first: it switches off telemetry before trl is imported)

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from benchmarks.hh_pairs import hh_pairs
from benchmarks.reward_training import PAD_ID, save_model
from reward.collate import pad_right
from reward.model import load_reward_model
from reward.scorer import score_ids
from reward.tree import shared_tokens

ROWS = 16  # of a padded batch


def dialogues_of(prompts: int, k: int) -> tuple[list[np.ndarray], str]:
    """`k` dialogues for each prompt, side by side, and where they are from."""
    pairs, data = hh_pairs(prompts * max(1, k // 2))
    shared = [shared_tokens((pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    responses = [ids[n:] for pair, n in zip(pairs, shared, strict=True) for ids in (pair.chosen_ids, pair.rejected_ids)]
    starts = [pair.chosen_ids[:n] for pair, n in zip(pairs, shared, strict=True)][:prompts]
    return [np.concatenate([start, responses[i * k + j]]) for i, start in enumerate(starts) for j in range(k)], data


@torch.inference_mode()
def plain_scores(model: LlamaForSequenceClassification, dialogues: list[np.ndarray], by_length: bool) -> Tensor:
    """Scores [N] from padded batches of ROWS."""
    order = sorted(range(len(dialogues)), key=lambda i: -len(dialogues[i]) if by_length else i)
    result_N = torch.empty(len(dialogues))
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        input_ids_NT, mask_NT = pad_right([dialogues[i] for i in rows], PAD_ID)
        result_N[rows] = model(input_ids=input_ids_NT, attention_mask=mask_NT, use_cache=False).logits[:, 0]
    return result_N


def main(rounds: int, prompts: int, k: int) -> None:
    """Check, measure in turn, print the table and the JSON line."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        ours, plain = load_reward_model(folder), LlamaForSequenceClassification.from_pretrained(folder).eval()
    dialogues, data = dialogues_of(prompts, k)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: score_ids(ours, dialogues, token_budget=1024, k=k),
        "padded": lambda: plain_scores(plain, dialogues, by_length=False),
        "padded, sorted": lambda: plain_scores(plain, dialogues, by_length=True),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        scores = {}
        for side, score in sides.items():
            started = process_time()
            scores[side] = score()
            seconds[side].append(process_time() - started)
        for side in sides:
            torch.testing.assert_close(scores[side], scores["padded"], atol=1e-4, rtol=1e-4)
    rates = {side: len(dialogues) / median(found) for side, found in seconds.items()}
    print(f"| best of {k}, {prompts} prompts | responses/s |\n|---|---|")
    for side, rate in rates.items():
        print(f"| {side} | {rate:.1f} |")
    print(json.dumps({
        "ratio": rates["ours"] / rates["padded"], "ratio_best": rates["ours"] / rates["padded, sorted"],
        "responses_per_second": rates, "k": k, "prompts": prompts, "rounds": rounds, "data": data,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--k", type=int, default=16)
    main(**vars(parser.parse_args()))
