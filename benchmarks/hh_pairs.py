"""Preference pairs for the benchmarks: Anthropic's helpful and harmless ones, or drawn ids of the same lengths."""

import math
import os
from pathlib import Path

import numpy as np

from configs.chat import load_chat_format
from configs.records import read_preferences
from reward.data import EncodedPair, encode_pairs
from rlhf.tokenizer import load_tokenizer

KIT = Path(os.environ.get("RLHF_KIT", Path(__file__).resolve().parents[2] / "shared" / "data"))
SETS = ("helpful", "harmless")
VOCABULARY = 2048  # of the benchmarks' model: ids are taken modulo, as their values do not change the cost


def hh_pairs(count: int, seed: int = 0, max_length: int = 2048) -> tuple[list[EncodedPair], str]:
    """(`count` pairs, helpful and harmless in turn; "hh-rlhf", or "generated" where the kit is absent)."""
    rng = np.random.default_rng(seed)
    if not (KIT / f"hh-{SETS[0]}-train.jsonl.gz").exists():
        return [_generated(rng) for _ in range(count)], "generated"
    tokenizer = load_tokenizer(str(KIT / "llama2-tokenizer"))
    chat_format = load_chat_format(tokenizer, "llama2")
    pairs = []
    for name in SETS:
        rows = read_preferences(KIT / f"hh-{name}-train.jsonl.gz", chat_format=chat_format).rows
        chosen = rng.permutation(len(rows))[: -(-count // len(SETS))]
        pairs.append(encode_pairs([rows[i] for i in chosen], chat_format, max_length, None)[0])
    mixed = [_small(pair) for both in zip(*pairs, strict=False) for pair in both]
    return mixed[:count], "hh-rlhf"


def _small(pair: EncodedPair) -> EncodedPair:
    """The pair with ids below VOCABULARY; the special ids 0 to 2 and the padding id 3 stay out of the text."""
    ids = [4 + each % (VOCABULARY - 4) for each in (pair.chosen_ids, pair.rejected_ids)]
    return EncodedPair(ids[0], ids[1], 0.0, math.nan, math.nan, pair.row)


def _generated(rng: np.random.Generator) -> EncodedPair:
    """A pair of random ids, its lengths log-normal as those of the real pairs: prompt about 130, responses about 55."""

    def ids(median: float, spread: float) -> np.ndarray:
        return rng.integers(4, VOCABULARY, max(4, round(rng.lognormal(math.log(median), spread))), dtype=np.int32)

    prompt = ids(100, 0.75)
    return of_ids(prompt, ids(40, 0.8), ids(40, 0.8))


def of_ids(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> EncodedPair:
    """A pair without labels from the ids of its parts."""
    return EncodedPair(
        np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected]), 0.0, math.nan, math.nan, {}
    )
