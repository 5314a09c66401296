"""Sampling inside the process: each prompt computed once for its K samples, the batch shrunk as samples finish.

Works with any Hugging Face causal LM of full attention layers (sdpa or eager), LoRA adapters active or not. One
forward a step serves all rows: prompts are left-padded, so all rows write the same cache column, and a prepared
additive 4-D mask blocks the padding.

Letters: R rows of the running batch, C cache columns, V vocabulary, N samples, T steps, W width of the tokens fed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.draw import draw, sample_seeds, uniforms
from rlhf.kv_cache import RowCache, blocked, move_rows

SHRINK_SHARE = 0.1  # compact once this share of the running rows has finished: moving rows is cheap, idle rows are not

# Tokens of one prompt forward. A core's cache holds the activations of about 1,000 tokens of a small model; a GPU wants
# more work at once, bounded so that long prompts do not need more memory than decoding.
CPU_FEED_TOKENS, FEED_TOKENS = 1024, 16_384


@dataclass(frozen=True)
class SampleBatch:
    """N = len(prompts) * k samples, prompt-major: sample j of prompt p is entry p * k + j of every list."""

    response_ids: list[list[int]]  # the stop id included where the sample ended by one
    logprobs: list[list[float]]  # nats a token, under the tempered and truncated distribution drawn from
    model_logprobs: list[list[float]]  # nats a token, under the model itself (temperature 1, nothing cut)
    finish_reasons: list[str]  # "stop" | "length"
    seeds: list[int]  # `sample(..., seed=[...])` with these gives the same samples again, in any batch
    k: int

    def __len__(self) -> int:
        return len(self.response_ids)


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
) -> SampleBatch:
    """Draw k responses to each prompt.

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
    ids: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    model_logprobs: list[list[float]] = [[] for _ in range(count)]
    finish = ["length"] * count
    with evaluating(model), tqdm(total=count, desc="sampling", unit="sample", disable=not progress) as bar:
        for group in _groups([len(p) for p in prompts_ids], k, settings.max_new_tokens, token_budget, max_rows):
            run = _sample_group(model, prompts_ids, group, k, settings, stop_ids, pad_id, [seeds[i] for i in group])
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
        logits = _feed(self.model, cache, self._mask, [chunks[d] for d in order], length[row], self.pad_id)
        sizes = torch.tensor([len(c) for c in chunks], device=length.device)
        positions = (length + sizes)[row]
        uniform = uniforms(sample_seeds(seed, len(chunks), first=self.turn * len(chunks)), settings.max_new_tokens)
        run = _decode(
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


@dataclass(frozen=True)
class _Run:
    """What a decode gave, by sample (not by row): lists of N entries, token lists of T, valid up to `lengths`."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    model_logprobs: list[list[float]]
    lengths: list[int]
    stopped: list[bool]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout, gradient checkpointing inert) without gradients; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # no_grad, not inference_mode: a model whose rotary buffers follow the length would keep inference tensors.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def position_limit(model: Any) -> int | None:
    """Positions that the model was made for, None where its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def prompt_room(model: Any, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt in tokens that leaves room for a response, at most max_prompt_tokens; UserError without room."""
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
) -> _Run:
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
    logits = _feed(model, cache, mask, chunks, begin, pad_id)
    positions = torch.tensor([len(c) for c in chunks], device=device)
    if shared:
        index = torch.tensor([slot[ids] for ids in wanted], device=device)
        cache.take_rows(index, columns)
        mask, positions, logits = mask[index], positions[index], logits[index]
    row = torch.arange(len(group), device=device)
    uniform = uniforms(seeds, settings.max_new_tokens).to(device)
    return _decode(model, cache, mask, positions, row, logits, uniform, settings, stop_ids, False)


def _feed(model: Any, cache: RowCache, mask: Tensor, chunks: list[list[int]], begin_R: Tensor, pad_id: int) -> Tensor:
    """Feed chunks[r] (left-padded to W) to row r, whose next position is begin_R[r]; logits_RV after its last token.

    mask [R, 1, 1, C] is updated in place: the padding columns are blocked for good.
    """
    width, start = max(map(len, chunks)), cache.filled
    pads = torch.tensor([width - len(c) for c in chunks], device=mask.device)[:, None]
    ids = torch.tensor([[pad_id] * (width - len(c)) + list(c) for c in chunks], device=mask.device)
    column = torch.arange(width, device=mask.device)
    mask[:, 0, 0, start : start + width].masked_fill_(column < pads, blocked(mask.dtype))
    position = begin_R[:, None] + (column - pads).clamp_(min=0)
    future = torch.zeros(width, start + width, dtype=mask.dtype, device=mask.device)
    future[:, start:].masked_fill_(column[None, :] > column[:, None], blocked(mask.dtype))
    rows = max(1, (CPU_FEED_TOKENS if mask.device.type == "cpu" else FEED_TOKENS) // width)
    logits = []
    for part in (slice(r, min(r + rows, len(chunks))) for r in range(0, len(chunks), rows)):
        cache.activate(part, start)
        # [R, 1, W, C]: what is visible at all, minus the future. A pad query sees only blocked columns: finite garbage.
        visible = torch.minimum(mask[part, :, :, : start + width], future)
        logits.append(_forward(model, cache, ids[part], visible, position[part]))
    cache.activate(slice(0, len(chunks)), cache.filled)
    return torch.cat(logits)


def _forward(model: Any, cache: RowCache, ids_RW: Tensor, mask: Tensor, position_RW: Tensor) -> Tensor:
    """Logits_RV of the last column only: the vocabulary layer is a quarter of a small model."""
    output = model(
        input_ids=ids_RW,
        attention_mask=mask,
        position_ids=position_RW,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _decode(
    model: Any,
    cache: RowCache,
    mask: Tensor,
    positions: Tensor,
    sample_of_row: Tensor,
    logits: Tensor,
    uniform_NT: Tensor,
    settings: SamplingSettings,
    stop_ids: Sequence[int],
    keep_rows: bool,
) -> _Run:
    """Draw, feed, repeat until every row has a stop id or max_new_tokens.

    `logits` are those after each row's prompt, `positions` each row's next position, sample_of_row[r] the sample that
    row r holds. Finished rows are moved behind the running ones (mask and sample_of_row follow, in place); keep_rows
    keeps their cache for later turns instead of overwriting it. The last token drawn is not fed.
    """
    steps, count, device = settings.max_new_tokens, len(uniform_NT), uniform_NT.device
    tokens = torch.zeros(count, steps, dtype=torch.int64, device=device)
    logprobs, model_logprobs = torch.zeros_like(uniform_NT), torch.zeros_like(uniform_NT)
    lengths = torch.full((count,), steps, dtype=torch.int64, device=device)
    stopped = torch.zeros(count, dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    rows, live, positions = count, torch.ones(count, dtype=torch.bool, device=device), positions.clone()
    for step in range(steps):
        owner = sample_of_row[:rows]
        token, logprob, model_logprob = draw(logits, settings, uniform_NT[owner, step])
        tokens[owner, step], logprobs[owner, step], model_logprobs[owner, step] = token, logprob, model_logprob
        ended = live & torch.isin(token, stops)
        lengths[owner[ended]], stopped[owner[ended]] = step + 1, True
        live = live & ~ended
        running = int(live.sum())
        if running == 0 or step + 1 == steps:
            break
        if rows - running >= SHRINK_SHARE * rows:
            # Fill the finished rows among the first `running` with the running rows behind them.
            target = (~live[:running]).nonzero().squeeze(1)
            source = live[running:].nonzero().squeeze(1) + running
            cache.move_rows(source, target, swap=keep_rows)
            for tensor in (mask, sample_of_row):
                move_rows(tensor, source, target, swap=True)
            for tensor in (token, positions):
                move_rows(tensor, source, target, swap=False)
            rows = running
            cache.activate(slice(0, rows), cache.filled)
            token, positions, live = token[:rows], positions[:rows], live.new_ones(rows)
        visible = mask[:rows, :, :, : cache.filled + 1]
        logits = _forward(model, cache, token[:, None], visible, positions[:, None])
        positions = positions + 1
    if not bool(torch.isfinite(model_logprobs).all()):
        raise FloatingPointError("the model gave logits that are not finite; check its weights and dtype")
    return _Run(tokens.tolist(), logprobs.tolist(), model_logprobs.tolist(), lengths.tolist(), stopped.tolist())
