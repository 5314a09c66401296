"""Forwards over rows of a cache, and what ends a response: the parts that rlhf/rows.py decodes with.

Letters: R rows of a forward, W tokens fed to each, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from reward.scorer import evaluation_mode
from rlhf.kv_cache import RowCache, visible
from rlhf.shared_prompts import SharedPrompts

# Tokens of one prompt forward. A core's cache holds the activations of about 1,000 tokens of a small model; a GPU wants
# more work at once, bounded so that long prompts do not need more memory than decoding.
CPU_FEED_TOKENS, FEED_TOKENS = 1024, 16_384

NO_TOKEN = 1 << 40  # stands before a response's first token where its text is searched: in no vocabulary


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout, gradient checkpointing inert) without gradients; each module's mode comes back."""
    # no_grad, not inference_mode: a model whose rotary buffers follow the length would keep inference tensors.
    with evaluation_mode(model), torch.no_grad():
        yield


class Stops:
    """What ends a response beside its length: token ids, and texts found by transformers' own criterion."""

    def __init__(self, settings: SamplingSettings, stop_ids: Sequence[int], tokenizer: Any, model: Any) -> None:
        """Raises ValueError for stop strings without a tokenizer, UserError for one that no tokens can spell and for
        stop ids that are none."""
        vocabulary, device = model.config.get_text_config(decoder=True).vocab_size, model.device
        if max(settings.stop_token_ids, default=0) >= vocabulary:
            raise UserError(f"stop_token_ids: {max(settings.stop_token_ids)} is not among the {vocabulary} token ids")
        self.ids = torch.tensor([*stop_ids, *settings.stop_token_ids], device=device)
        self.criterion = None
        if settings.stop_strings:
            if tokenizer is None:
                raise ValueError("stop strings are found in text: give `tokenizer`")
            try:
                self.criterion = StopStringCriteria(tokenizer, settings.stop_strings)
            except ValueError as error:
                raise UserError(f"stop_strings {settings.stop_strings}: {error}") from error

    @property
    def window(self) -> int:
        """How many last tokens `reached` wants to see."""
        return self.criterion.maximum_token_len if self.criterion else 1

    def reached(self, last_RW: Tensor) -> Tensor:
        """bool[R], from the last tokens of each response, NO_TOKEN before its first."""
        stopped = torch.isin(last_RW[:, -1], self.ids)
        return stopped if self.criterion is None else stopped | self.criterion(last_RW, None).to(stopped.device)


def feed(model: Any, cache: RowCache, chunks: Sequence[Sequence[int]], begin_R: Sequence[int], pad_id: int) -> Tensor:
    """Feed chunks[r] to row r of the cache, which holds begin_R[r] tokens; logits_RV after its last token.

    The chunks are padded on the left, so that the logits wanted are all in the last column.
    """
    budget = CPU_FEED_TOKENS if model.device.type == "cpu" else FEED_TOKENS
    rows = max(1, budget // max(map(len, chunks)))
    logits = []
    for start in range(0, len(chunks), rows):
        part = [list(chunk) for chunk in chunks[start : start + rows]]
        width = max(map(len, part))
        pads = torch.tensor([[width - len(chunk)] for chunk in part])
        ids = torch.tensor([[pad_id] * (width - len(chunk)) + chunk for chunk in part])
        column = torch.tensor([[n] for n in begin_R[start : start + rows]]) + torch.arange(width) - pads
        is_pad = torch.arange(width) < pads
        seen = int(column.max()) + 1
        position, column = column.masked_fill(is_pad, 0), column.masked_fill(is_pad, cache.columns)
        where = (ids.to(model.device), position.to(model.device), column.to(model.device))
        logits.append(forward(model, cache, start, *where, seen))
    return torch.cat(logits)


def forward(
    model: Any,
    cache: RowCache,
    first: int,
    ids_RW: Tensor,
    position_RW: Tensor,
    column_RW: Tensor,
    width: int,
    shared: SharedPrompts | None = None,
) -> Tensor:
    """Logits_RV of the last column only: the vocabulary layer is a quarter of a small model.

    Tokens at `position_RW` of their text go to the columns column_RW of the rows from `first` on, of which the first
    `width` are looked at; a token sees the columns up to its own, and with `shared` its row's prompt as well.
    """
    cache.place(first, column_RW, width)
    # Padding, written to the column that nobody reads, sees column 0 only, which any row has: finite garbage.
    seen_RW = column_RW.masked_fill(column_RW == cache.columns, 0)
    output = model(
        input_ids=ids_RW,
        attention_mask=visible(seen_RW, width, model.dtype),
        position_ids=position_RW,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **({} if shared is None else {"shared_prompts": shared}),
    )
    if shared is not None and shared.calls != len(cache.layers):
        raise RuntimeError(f"{type(model).__name__} does not hand its options to attention: give share_prompts=False")
    return output.logits[:, -1]
