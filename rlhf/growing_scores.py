"""Reward scores of dialogues that grow, as `gatt.synth` judges them turn by turn: what was read is not read again.

Scoring turn n of a dialogue anew reads turns 1 to n - 1 anew, n / 2 times the tokens over a whole dialogue, and the
drafts of a turn have all but their reply in common. Here a row of a cache holds the keys and values of the ids that it
was last given; of the next ids only what comes behind their common beginning is fed.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from reward.model import takes_trees
from reward.scorer import score_ids
from reward.tree import IdList, shared_tokens
from rlhf.decoding import evaluating, feed
from rlhf.kv_cache import RowCache


class GrowingScores:
    """Raw scores by `model` (from reward.model) of dialogues that are asked for again with more turns."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[int] = []  # the dialogue in each row of the cache
        self.held: list[list[int]] = []  # by row of the cache: the ids whose keys and values it holds
        self.cache: RowCache | None = None

    def __call__(self, rows: Sequence[int], candidates: Sequence[Sequence[IdList]]) -> list[list[float]]:
        """A score for each of candidates[i], id lists of dialogue rows[i]: raw, read at the last id, as `score_ids`.

        Dialogues that are not asked for leave the cache; asked for later, they are read anew. Models that the cache
        does not serve (attention in windows, attention that takes no mask) read everything each time.
        """
        if not takes_trees(self.model):
            flat = iter(score_ids(self.model, [ids for each in candidates for ids in each]).tolist())
            return [[next(flat) for _ in each] for each in candidates]
        self._keep(list(rows))
        wanted = [list(each) for each in candidates]
        scores: list[list[float]] = [[] for _ in wanted]
        order = [list(rows).index(row) for row in self.rows]
        for k in range(max(map(len, wanted))):
            # A row without a k-th candidate reads its last id again.
            ids = [list(wanted[i][k]) if k < len(wanted[i]) else self.held[at] for at, i in enumerate(order)]
            for i, score in zip(order, self._read(ids), strict=True):
                if k < len(wanted[i]):
                    scores[i].append(score)
        return scores

    def _keep(self, rows: list[int]) -> None:
        """The cache holds `rows`, those that it held before first."""
        if rows == self.rows:
            return
        known = [row for row in rows if row in self.rows]
        places = [self.rows.index(row) for row in known]
        if self.cache is None:
            self.cache = RowCache(self.model.config, len(rows), 0)
        elif places != list(range(len(self.rows))) or len(rows) != len(self.rows):
            index = torch.tensor(places, dtype=torch.long, device=self.model.device)
            self.cache.resize(index, len(rows), self.cache.columns)
        self.rows = known + [row for row in rows if row not in known]
        self.held = [self.held[place] for place in places] + [[] for _ in range(len(rows) - len(known))]

    def _read(self, ids: list[list[int]]) -> list[float]:
        """The cache's rows hold `ids` afterwards; their scores."""
        assert self.cache is not None
        # The last id is always read: its hidden state is what is scored. `shared_tokens` leaves it out.
        begins = [shared_tokens([held, new]) if held else 0 for held, new in zip(self.held, ids, strict=True)]
        columns = max(map(len, ids))
        if columns > self.cache.columns:
            every = torch.arange(len(ids), device=self.model.device)
            self.cache.resize(every, len(ids), max(columns, self.cache.columns * 3 // 2))
        chunks = [new[begin:] for new, begin in zip(ids, begins, strict=True)]
        with evaluating(self.model):
            scores_R1 = feed(_OneScore(self.model), self.cache, chunks, begins, pad_id=0)
        self.held = ids
        return scores_R1[:, 0].tolist()


class _OneScore:
    """A reward model where `feed` expects a language model: one score where that has a vocabulary of logits."""

    def __init__(self, model: Any) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone, self.head = getattr(model, model.base_model_prefix), model.score
        self.device, self.dtype = self.backbone.device, self.backbone.dtype

    def __call__(self, logits_to_keep: int, **inputs: Any) -> Any:
        hidden_RWD = self.backbone(**inputs).last_hidden_state[:, -logits_to_keep:]
        with torch.autocast(hidden_RWD.device.type, enabled=False):
            return SimpleNamespace(logits=self.head(hidden_RWD.float()))
