"""Dialogues of many turns, sampled side by side with a cache that stays: every token is computed once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.decoding import Stops, evaluating, feed
from rlhf.draw import sample_seeds
from rlhf.kv_cache import RowCache
from rlhf.rows import Drawn, Rows
from rlhf.sampler import check_attention, position_limit


class DialogueSession:
    """A batch of dialogues whose last replies can be taken back, and from which dialogues can be dropped.

    Dialogue d stands in row d of the cache, packed from the first column. `max_length` bounds a dialogue in tokens.
    """

    def __init__(self, model: Any, pad_id: int, stop_ids: Sequence[int], max_length: int) -> None:
        self.model, self.pad_id, self.stop_ids, self.max_length = model, pad_id, list(stop_ids), max_length
        self.turn = 0
        self.length: list[int] = []  # by dialogue: tokens in the cache
        self.pending: list[list[int]] = []  # by dialogue: tokens that belong to the history but are not cached yet
        self.cache: RowCache

    def reply(self, new_ids: list[list[int]], settings: SamplingSettings, seed: int = 0) -> list[list[int]]:
        """Append new_ids[d] (not empty) to dialogue d, draw its response and keep it in the history.

        In the history a response cut by length is closed with the first stop id; the returned ids are as drawn, the
        stop id included where there is one. Raises UserError where a dialogue would pass `max_length`. The first call
        fixes the number of dialogues; draws differ between turns under one seed.
        """
        if settings.stop_strings:
            raise UserError("stop_strings: in a dialogue of many turns a reply ends at an end token; leave them out")
        if self.turn == 0:
            check_attention(self.model)
            self.length, self.pending = [0] * len(new_ids), [[] for _ in new_ids]
        if len(new_ids) != len(self.pending) or not all(new_ids):
            raise ValueError(f"give at least one token for each of the {len(self.pending)} dialogues")
        chunks = [pending + list(new) for pending, new in zip(self.pending, new_ids, strict=True)]
        limit = min(self.max_length, position_limit(self.model) or self.max_length)
        ends = [length + len(chunk) for length, chunk in zip(self.length, chunks, strict=True)]
        for d, end in enumerate(ends):
            # One more than the response: a response cut at its limit is closed with a stop id in the history.
            total = end + settings.max_new_tokens + 1
            if total > limit:
                raise UserError(
                    f"dialogue {d}, turn {self.turn + 1}: {total} tokens with max_new_tokens "
                    f"{settings.max_new_tokens}, the limit is {limit}; lower max_new_tokens or use fewer turns"
                )
        with evaluating(self.model):
            drawn = self._reply(chunks, ends, settings, seed)
        # The last drawn token of a row was not fed; it opens the next turn's chunk.
        self.length = [end + len(one.ids) - 1 for end, one in zip(ends, drawn, strict=True)]
        self.pending = [[one.ids[-1]] if one.stopped else [one.ids[-1], self.stop_ids[0]] for one in drawn]
        self.turn += 1
        return [one.ids for one in drawn]

    def _reply(self, chunks: list[list[int]], ends: list[int], settings: SamplingSettings, seed: int) -> list[Drawn]:
        count = len(chunks)
        self._reserve(max(ends) + settings.max_new_tokens)
        logits = feed(self.model, self.cache, chunks, self.length, self.pad_id)
        rows = Rows(self.model, self.cache, settings, Stops(settings, self.stop_ids, None, self.model))
        seeds = sample_seeds(seed, count, first=self.turn * count)
        drawn = dict(rows.start(np.arange(count), range(count), ends, seeds, logits))
        while rows.running.any():
            rows.close_up()
            drawn.update(rows.step())
        # close_up has moved rows; back to row d for dialogue d.
        back, every = (torch.from_numpy(x).to(self.model.device) for x in (rows.owner.argsort(), np.arange(count)))
        self.cache.permute_rows(back, every, rows.length[rows.owner.argsort()].tolist())
        return [drawn[d] for d in range(count)]

    def _reserve(self, columns: int) -> None:
        """Room for so many columns; the cache grows by half, so that few turns copy it."""
        if self.turn == 0:
            self.cache = RowCache(self.model.config, len(self.length), columns)
        elif columns > self.cache.columns:
            every = torch.arange(len(self.length), device=self.model.device)
            self.cache.resize(every, len(self.length), max(columns, self.cache.columns * 3 // 2))

    def rewind(self, dialogues: Sequence[int], replies: Sequence[Sequence[int]]) -> None:
        """Takes back the last reply of `dialogues`, and the last token of the prompt before it: feed that token again.

        `replies` are the last replies of all dialogues of the session, as `reply` returned them, less those dropped
        since.
        """
        for d in dialogues:
            # n - 1 tokens of a reply of n were fed, and the token of the prompt before them.
            self.length[d] -= len(replies[d])
            self.pending[d] = []

    def keep(self, dialogues: Sequence[int]) -> None:
        """Only `dialogues` go on; dialogue i is then what was dialogue dialogues[i]."""
        index = torch.tensor(list(dialogues), device=self.model.device)
        self.cache.resize(index, len(dialogues), self.cache.columns)
        self.length = [self.length[d] for d in dialogues]
        self.pending = [self.pending[d] for d in dialogues]
