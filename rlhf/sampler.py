"""Sampling inside the process: each prompt computed once for its K samples, the batch shrunk as samples finish.

Works with any Hugging Face causal LM of full attention layers (sdpa or eager), LoRA adapters active or not: `sample`
for single responses, `DialogueSession` for dialogues of many turns. Both decode with rlhf/decoding.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.decoding import Run, decode, evaluating, feed
from rlhf.draw import sample_seeds, uniforms
from rlhf.kv_cache import RowCache, blocked
from rlhf.samples import SampleBatch


def sample(
    model: Any,
    prompts_ids: list[list[int]],
    k: int,
    settings: SamplingSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int | Sequence[int] = 0,
    token_budget: int = 32_768,
    max_rows: int = 512,
    progress: bool = False,
    temperatures: Sequence[float] | None = None,
) -> SampleBatch:
    """Draw k responses to each prompt; `temperatures` gives each of the k its own, above 0, in place of the settings'.

    A sample depends on its own seed (an int here is spread by `sample_seeds`; a sequence gives one seed a sample), not
    on the batch it was computed in. `token_budget` bounds the cache: rows times (prompt + max_new_tokens) columns.
    Raises UserError before any sampling where prompt + max_new_tokens exceeds the model's positions.
    """
    if k < 1:
        raise UserError(f"k: {k} responses a prompt; give at least 1")
    check_lengths(model, [len(ids) for ids in prompts_ids], settings.max_new_tokens)
    count = len(prompts_ids) * k
    seeds = sample_seeds(seed, count) if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples")
    if temperatures is not None and (len(temperatures) != k or min(temperatures) <= 0):
        raise ValueError(f"temperatures {list(temperatures)}: give {k} numbers above 0")
    own = torch.tensor(temperatures, device=model.device) if temperatures is not None else None
    ids: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    model_logprobs: list[list[float]] = [[] for _ in range(count)]
    finish = ["length"] * count
    with evaluating(model), tqdm(total=count, desc="sampling", unit="sample", disable=not progress) as bar:
        for group in _groups([len(p) for p in prompts_ids], k, settings.max_new_tokens, token_budget, max_rows):
            run = _sample_group(
                model, prompts_ids, group, k, settings, stop_ids, pad_id, [seeds[i] for i in group],
                None if own is None else own[[i % k for i in group]],
            )  # fmt: skip
            for row, i in enumerate(group):
                n = run.lengths[row]
                ids[i], finish[i] = run.tokens[row][:n], "stop" if run.stopped[row] else "length"
                logprobs[i], model_logprobs[i] = run.logprobs[row][:n], run.model_logprobs[row][:n]
            bar.update(len(group))
    return SampleBatch(ids, logprobs, model_logprobs, finish, seeds, k)


class DialogueSession:
    """A batch of dialogues that keeps its cache between turns, so every token is computed once.

    Rows differ in length from turn to turn; the shorter ones leave holes that the mask blocks, while position ids count
    real tokens only. Holes are squeezed out when they fill half of the cache. `max_length` bounds a dialogue in tokens.
    """

    def __init__(self, model: Any, pad_id: int, stop_ids: Sequence[int], max_length: int) -> None:
        self.model, self.pad_id, self.stop_ids, self.max_length = model, pad_id, list(stop_ids), max_length
        self.turn = 0
        self._cache: RowCache | None = None
        self._pending: list[list[int]] = []  # by dialogue: tokens that belong to the history but are not cached yet

    def reply(self, new_ids: list[list[int]], settings: SamplingSettings, seed: int = 0) -> list[list[int]]:
        """Append new_ids[d] (not empty) to dialogue d, draw its response and keep it in the history.

        In the history a response cut by length is closed with the first stop id; the returned ids are as drawn, the
        stop id included where there is one. Raises UserError where a dialogue would pass `max_length`. The first call
        fixes the number of dialogues; draws differ between turns under one seed.
        """
        with evaluating(self.model):
            if self.turn == 0:
                self._start(len(new_ids))
            if len(new_ids) != len(self._pending) or not all(new_ids):
                raise ValueError(f"give at least one token for each of the {len(self._pending)} dialogues")
            chunks = [pending + list(new) for pending, new in zip(self._pending, new_ids, strict=True)]
            return self._reply(chunks, settings, seed)

    def _start(self, count: int) -> None:
        device, dtype = self.model.device, self.model.dtype
        self._pending = [[] for _ in range(count)]
        self._row = torch.arange(count, device=device)  # dialogue in each row: compaction swaps rows
        self._length = torch.zeros(count, dtype=torch.int64, device=device)  # cached tokens, by dialogue
        self._mask = torch.zeros(count, 1, 1, 0, dtype=dtype, device=device)  # by row
        self._cache = None

    def _reply(self, chunks: list[list[int]], settings: SamplingSettings, seed: int) -> list[list[int]]:
        row, length = self._row, self._length
        limit = min(self.max_length, position_limit(self.model) or self.max_length)
        for d, chunk in enumerate(chunks):
            # One more than the response: a response cut at its limit is closed with a stop id in the history.
            total = int(length[d]) + len(chunk) + settings.max_new_tokens + 1
            if total > limit:
                raise UserError(
                    f"dialogue {d}, turn {self.turn + 1}: {total} tokens with max_new_tokens "
                    f"{settings.max_new_tokens}, the limit is {limit}; lower max_new_tokens or use fewer turns"
                )
        width = max(map(len, chunks))
        cache = self._reserve(width + settings.max_new_tokens)
        start = cache.filled
        order = row.tolist()
        logits = feed(self.model, cache, self._mask, [chunks[d] for d in order], length[row], self.pad_id)
        sizes = torch.tensor([len(c) for c in chunks], device=length.device)
        positions = (length + sizes)[row]
        uniform = uniforms(sample_seeds(seed, len(chunks), first=self.turn * len(chunks)), settings.max_new_tokens)
        run = decode(
            self.model,
            cache,
            self._mask,
            positions,
            row,
            logits,
            uniform.to(length.device),
            settings,
            self.stop_ids,
            True,
        )
        cache.activate(slice(0, len(chunks)), cache.filled)
        # The last drawn token of a row was not fed; it opens the next turn's chunk. Later columns of the row are holes.
        kept = torch.tensor(run.lengths, device=length.device) - 1
        column = torch.arange(start + width, cache.filled, device=length.device)
        hole = column[None, :] >= start + width + kept[row][:, None]
        self._mask[:, 0, 0, start + width : cache.filled].masked_fill_(hole, blocked(self._mask.dtype))
        self._length = length + sizes + kept
        replies = [tokens[:n] for tokens, n in zip(run.tokens, run.lengths, strict=True)]
        self._pending = [
            [ids[-1]] if stopped else [ids[-1], self.stop_ids[0]]
            for ids, stopped in zip(replies, run.stopped, strict=True)
        ]
        self.turn += 1
        return replies

    def _reserve(self, extra: int) -> RowCache:
        """Room for `extra` more columns: squeeze holes out when they are half of the cache, else grow by half."""
        rows, cache = len(self._pending), self._cache or RowCache(self.model.config, len(self._pending), extra)
        filled, widest = cache.filled, int(self._length.max())
        columns, mask = self._mask.shape[-1], self._mask[..., :filled]
        if filled > 2 * widest:
            # A stable sort of visible (False first) puts each row's tokens, in order, at the right.
            index = (mask[:, 0, 0] == 0).to(torch.int8).argsort(dim=1, stable=True)[:, filled - widest :]
            mask, columns = mask.gather(3, index[:, None, None]), widest + extra
            cache.take_columns(index, columns)
        elif filled + extra > columns:
            columns = filled + max(extra, filled // 2)
            if filled:
                cache.take_rows(torch.arange(rows, device=mask.device), columns)
        self._mask = torch.cat([mask, mask.new_zeros(rows, 1, 1, columns - mask.shape[-1])], dim=-1)
        self._cache = cache
        return cache


def position_limit(model: Any) -> int | None:
    """Positions that the model was made for, None where its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def prompt_room(model: Any, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt in tokens that leaves room for a response, at most max_prompt_tokens; UserError for none."""
    limit = position_limit(model)
    if limit is not None and max_new_tokens >= limit:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's {limit} positions")
    return max_prompt_tokens if limit is None else min(max_prompt_tokens, limit - max_new_tokens)


def check_lengths(model: Any, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
    """UserError, naming the longest offender, where a prompt is empty or leaves no room for max_new_tokens."""
    limit = position_limit(model)
    for index, length in enumerate(prompt_lengths):
        if length == 0:
            raise UserError(f"prompt {index} is empty; it needs at least one token")
        if limit is not None and length + max_new_tokens > limit:
            raise UserError(
                f"prompt {index}: {length} tokens + max_new_tokens {max_new_tokens} exceed the model's {limit} "
                "positions; shorten the prompt or lower max_new_tokens"
            )


def _groups(lengths: list[int], k: int, new: int, token_budget: int, max_rows: int) -> Iterator[list[int]]:
    """Sample indices in batches: prompts of like length together, a prompt's samples together where they fit."""
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])  # longest first: memory trouble shows at once
    samples = [p * k + j for p in order for j in range(k)]
    start = 0
    while start < len(samples):
        rows = max(1, min(max_rows, token_budget // (lengths[samples[start] // k] + new)))
        rows = rows // k * k or rows
        yield samples[start : start + rows]
        start += rows


def _sample_group(
    model: Any,
    prompts_ids: list[list[int]],
    group: list[int],
    k: int,
    settings: SamplingSettings,
    stop_ids: Sequence[int],
    pad_id: int,
    seeds: list[int],
    temperature_N: Tensor | None,
) -> Run:
    """One batch from prefill to the last finished sample; results in the order of `group`."""
    device = model.device
    wanted = [tuple(prompts_ids[i // k]) for i in group]
    slot = {ids: r for r, ids in enumerate(dict.fromkeys(wanted))}  # equal prompts are computed once, too
    chunks = [list(ids) for ids in slot]
    width = max(map(len, chunks))
    columns = width + settings.max_new_tokens
    shared = len(chunks) < len(group)
    cache = RowCache(model.config, len(chunks), width if shared else columns)
    mask = torch.zeros(len(chunks), 1, 1, columns, dtype=model.dtype, device=device)
    begin = torch.zeros(len(chunks), dtype=torch.int64, device=device)
    logits = feed(model, cache, mask, chunks, begin, pad_id)
    positions = torch.tensor([len(c) for c in chunks], device=device)
    if shared:
        index = torch.tensor([slot[ids] for ids in wanted], device=device)
        cache.take_rows(index, columns)
        mask, positions, logits = mask[index], positions[index], logits[index]
    row = torch.arange(len(group), device=device)
    uniform = uniforms(seeds, settings.max_new_tokens).to(device)
    return decode(model, cache, mask, positions, row, logits, uniform, settings, stop_ids, False, temperature_N)
