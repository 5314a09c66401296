"""The engine under the sampler: feed prompts into a cache, then draw and feed tokens until every row has ended.

One forward a step serves all rows. Prompts are left-padded, so all rows write the same cache column, and a prepared
additive 4-D mask blocks the padding; finished rows leave the batch.

Letters: R rows of the running batch, C cache columns, V vocabulary, N samples, T steps, W width of the tokens fed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.sampling_settings import SamplingSettings
from rlhf.draw import draw
from rlhf.kv_cache import RowCache, blocked, move_rows

SHRINK_SHARE = 0.1  # compact once this share of the running rows has finished: moving rows is cheap, idle rows are not

# Tokens of one prompt forward. A core's cache holds the activations of about 1,000 tokens of a small model; a GPU wants
# more work at once, bounded so that long prompts do not need more memory than decoding.
CPU_FEED_TOKENS, FEED_TOKENS = 1024, 16_384


@dataclass(frozen=True)
class Run:
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


def feed(model: Any, cache: RowCache, mask: Tensor, chunks: list[list[int]], begin_R: Tensor, pad_id: int) -> Tensor:
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


def decode(
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
    temperature_N: Tensor | None = None,
) -> Run:
    """Draw, feed, repeat until every row has a stop id or max_new_tokens.

    `logits` are those after each row's prompt, `positions` each row's next position, sample_of_row[r] the sample that
    row r holds. Finished rows are moved behind the running ones (mask and sample_of_row follow, in place); keep_rows
    keeps their cache for later turns instead of overwriting it. The last token drawn is not fed. temperature_N gives
    each sample a temperature of its own.
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
        temperature = None if temperature_N is None else temperature_N[owner]
        token, logprob, model_logprob = draw(logits, settings, uniform_NT[owner, step], temperature)
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
    return Run(tokens.tolist(), logprobs.tolist(), model_logprobs.tolist(), lengths.tolist(), stopped.tolist())
