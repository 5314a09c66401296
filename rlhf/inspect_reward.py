"""Reward models under a magnifying glass: load any of them, score pairs, pick the telling ones, follow one response.

What notebooks/reward_scores.ipynb computes; rlhf/notebook_views.py shows it. r is a raw score, R = sigmoid(r).
"""

from rlhf import cli  # noqa: F401  (first: it switches off telemetry before other libraries are imported)

# isort: split
import glob
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from configs.chat import ChatFormatError, Message, load_chat_format
from configs.errors import UserError
from configs.records import read_preferences
from reward.any_model import AnyRewardModel, Inputs, plain_scores
from reward.data import encode_replies
from reward.scorer import score_ids, score_positions
from rlhf.token_texts import token_texts

STEP = 128  # pairs between two moves of the progress bar
LONGEST = 4096  # tokens of a dialogue where neither the run nor the model says


@dataclass(frozen=True)
class RewardScorer:
    """A reward model, loaded, and the tokens of a dialogue that it reads: as many as its run trained with, if known."""

    model: AnyRewardModel
    max_length: int


@dataclass(frozen=True)
class PairScores:
    """The same pairs under one or more models; lists of P pairs, scores by the model's name."""

    rows: list[dict[str, Any]]
    chosen: dict[str, list[float]]
    rejected: dict[str, list[float]]
    left_out: int  # pairs too long for one of the models

    def differences(self, model: str) -> list[float]:
        """Margins r_c - r_r [P]; below 0 the model prefers the rejected response."""
        return [c - r for c, r in zip(self.chosen[model], self.rejected[model], strict=True)]

    def responses(self, model: str) -> list[float]:
        """Scores of all responses [2 P], the chosen ones first."""
        return self.chosen[model] + self.rejected[model]

    @property
    def ratings(self) -> list[str | None]:
        return [row.get("rating") for row in self.rows]


@dataclass(frozen=True)
class TokenPath:
    """A score along a response of T tokens (its end token not counted); lists of T + 1, the first before any token.

    Of a model that is not in our chat format: of words, the first one the start, without `passing`.
    """

    tokens: list[str]  # the first is "", or the word at which the path starts
    ended: list[float]  # score if the response ended here; the last is the score of the response
    passing: list[float]  # what the head says at this token, which no training ever looked at

    @property
    def changes(self) -> list[float]:
        """What each token after the first entry adds to `ended`."""
        return [after - before for before, after in zip(self.ended, self.ended[1:], strict=False)]


def load_scorer(path: str | Path) -> RewardScorer:
    """A run folder of train_reward.py, a model folder or a Hub name; any sequence-classification model with one score.

    UserError says what is missing and what to run.
    """
    folder = Path(path)
    settings: dict[str, Any] = {}
    if (folder / "settings.yaml").exists():  # a run
        if not (folder / "model" / "config.json").exists():
            raise UserError(f"{folder} has no model/ yet: start its training again with the same command to finish it")
        settings = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8")) or {}
        path = folder / "model"
    elif not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):  # no Hub name looks like this
        raise UserError(
            f"there is no reward model at {folder}. Run `make demo` (about ten minutes) to get the demo's two models "
            "in runs/demo, or name a run or model folder of yours in the first cell."
        )
    disable_progress_bar()  # "Loading weights" would stay in the notebook
    model = AnyRewardModel(str(path))
    model.load(None, "sdpa", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known = [length for length in (settings.get("max_length"), model.context) if length]
    return RewardScorer(model, min(known, default=LONGEST))


def read_pairs(pattern: str, max_pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference records of a file, of all files that match a pattern with *, or of a Hub data set's test split.

    Where there are more than `max_pairs`, a seeded draw of so many, in their order.
    """
    paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    if not paths:
        raise UserError(f"no file matches {pattern}; name a file of preference pairs in the first cell")
    rows = [row for path in paths for row in read_preferences(path, split="test").rows]
    keep = sorted(random.Random(seed).sample(range(len(rows)), min(max_pairs, len(rows))))
    return [rows[i] for i in keep]


def score_all(scorers: Mapping[str, RewardScorer], rows: Sequence[Mapping[str, Any]]) -> PairScores:
    """The pairs that every model can read, scored by each. UserError where none is left."""
    fitting: list[dict[str, Any]] = []
    dialogues: dict[str, list[Inputs]] = {name: [] for name in scorers}
    for row in rows:
        if encoded := _encode_pair(scorers, row):
            fitting.append(dict(row))
            for name, pair in encoded.items():
                dialogues[name] += pair
    if not fitting:
        shortest = min(scorer.max_length for scorer in scorers.values())
        raise UserError(f"none of the {len(rows)} pairs fits into the {shortest} tokens that the models read")
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    with tqdm(total=len(fitting) * len(scorers), desc="pairs", leave=False) as bar:
        for name, scorer in scorers.items():
            for start in range(0, 2 * len(fitting), 2 * STEP):
                scores[name] += scorer.model.scores(dialogues[name][start : start + 2 * STEP])
                bar.update(len(dialogues[name][start : start + 2 * STEP]) // 2)
    chosen = {name: both[::2] for name, both in scores.items()}
    rejected = {name: both[1::2] for name, both in scores.items()}
    return PairScores(fitting, chosen, rejected, len(rows) - len(fitting))


def _encode_pair(
    scorers: Mapping[str, RewardScorer], row: Mapping[str, Any]
) -> dict[str, tuple[Inputs, Inputs]] | None:
    """(chosen, rejected) as each model reads them; None where one cannot: too long, or a special token in the text."""
    encoded = {}
    for name, scorer in scorers.items():
        try:
            encoded[name], prompt = encode_replies(row, scorer.model.encode, scorer.max_length)
        except ChatFormatError:
            return None
        if prompt is None:
            return None
    return encoded


def most_wrong(pairs: PairScores, model: str, count: int) -> list[int]:
    """Indices of the pairs in which `model` prefers the rejected response, by the widest margin first."""
    differences = pairs.differences(model)
    wrong = [i for i, difference in enumerate(differences) if difference < 0]
    return sorted(wrong, key=lambda i: differences[i])[:count]


def disagreements(pairs: PairScores, first: str, second: str) -> list[int]:
    """Indices of the pairs in which the two models prefer different responses, both surest first.

    A pair's place is the smaller of the two margins, each in standard deviations of its model: raw scores of two
    models have no common unit.
    """
    margins = []
    for model in (first, second):
        differences = torch.tensor(pairs.differences(model))
        margins.append((differences / differences.square().mean().sqrt().clamp_min(1e-9)).tolist())
    apart = [i for i, (a, b) in enumerate(zip(*margins, strict=True)) if a * b < 0]
    return sorted(apart, key=lambda i: -min(abs(margins[0][i]), abs(margins[1][i])))


def clearest(pairs: PairScores, model: str) -> int:
    """Index of the pair that `model` tells apart best."""
    differences = pairs.differences(model)
    return max(range(len(differences)), key=differences.__getitem__)


def follow(scorer: RewardScorer, prompt: str | Sequence[Message], response: str) -> TokenPath:
    """The score along a response, token by token; `prompt` is a text or messages that end with the user's."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    model = scorer.model
    whole = model.encode([*messages, _reply(response)])
    if len(whole) > scorer.max_length:
        raise UserError(f"the dialogue has {len(whole)} tokens, and the model reads {scorer.max_length}; shorten it")
    if not (model.is_decoder and model.input_format == "chat"):
        return _follow_words(model, messages, response)
    ids = whole.input_ids
    prompt_ids = load_chat_format(model.tokenizer).encode_prompt(messages)
    first = len(prompt_ids) - 1
    return TokenPath(
        tokens=["", *token_texts(model.tokenizer, prompt_ids, ids[:-1])],
        ended=score_positions(model.model, ids[:-1], first, end_id=ids[-1]).tolist(),
        passing=score_positions(model.model, ids[:-1], first).tolist(),
    )


def _follow_words(model: AnyRewardModel, messages: list[Message], response: str) -> TokenPath:
    """Every beginning of the response as a dialogue of its own: whatever the model does with text, this follows."""
    words = re.findall(r"\s*\S+", response)
    beginnings = [model.encode([*messages, _reply("".join(words[:end]))]) for end in range(1, len(words) + 1)]
    if model.is_decoder:
        scores = score_ids(model.model, [each.input_ids for each in beginnings])
    else:
        scores = plain_scores(model.model, beginnings, model.tokenizer.pad_token_id)
    return TokenPath(tokens=words, ended=scores.tolist(), passing=[])


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def share_below(score: float, others: Sequence[float]) -> float:
    """Share of `others` that `score` beats; a tie counts as one half."""
    return sum(0.5 if other == score else float(other < score) for other in others) / len(others)
