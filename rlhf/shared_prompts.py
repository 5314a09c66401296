"""Decoding K samples of one prompt with the prompt's keys and values stored and read once.

The rows' own cache holds their responses only. Attention is done in two parts, over the prompt (the samples of a prompt
as the queries of one batch entry) and over the response so far, and joined by their log-sum-exps: with Z the sum of the
exponentials of a part and o its output, softmax over both gives (Z_p o_p + Z_r o_r) / (Z_p + Z_r), which is
o_r + sigmoid(log Z_p - log Z_r) (o_p - o_r). It pays where reading the cache is much of a step, as with small models
on a CPU (docs/results/sampling.md), and takes less memory.

Letters: R rows, P prompts, K rows of a prompt at most, L prompt columns, H query heads, J key heads, G query heads of a
key head, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reward.attention import TREE_ATTENTION
from rlhf.hardware import FLOAT_ATTENTION
from rlhf.kv_cache import RowCache, visible

SHARED_ATTENTION = "sdpa_shared_prompts"
# On a CPU attention is done in so many parts, each as wide as it needs: the rows in the order of their age, the prompts
# by how many rows they have left.
PARTS = 4


class PromptStore:
    """Prompts of the running rows, one row of a cache each; a slot is free again once its last response has ended."""

    def __init__(self, model: Any, prompts: int, longest: int) -> None:
        self.model = model
        self.cache = RowCache(model.config, prompts, longest)
        self.length: np.ndarray = np.zeros(prompts, np.int64)  # by slot, as the following
        self.users: np.ndarray = np.zeros(prompts, np.int64)  # responses that still need it, running or waiting
        self.cache_row: np.ndarray = np.arange(prompts)
        self.groups: Groups | None = None

    def add(self, stage: RowCache, row: int, length: int, users: int) -> int:
        """Keep the first `length` columns of that row of `stage` for so many responses; returns the slot."""
        free = np.flatnonzero(self.users == 0)
        if not len(free):  # many prompts with one slow response each
            old = len(self.users)
            new = old + old // 2 + 1
            self.cache.resize(torch.arange(old, device=self.model.device), new, self.cache.columns)
            self.length, self.users = (np.concatenate([x, np.zeros(new - old, int)]) for x in (self.length, self.users))
            self.cache_row = np.concatenate([self.cache_row, np.arange(old, new)])
            free = np.array([old])
        slot = int(free[0])
        index = torch.tensor([row, self.cache_row[slot]], device=self.model.device)
        self.cache.copy_rows(stage, index[:1], index[1:], length)
        self.length[slot], self.users[slot], self.groups = length, users, None
        return slot

    def release(self, slot_R: np.ndarray) -> None:
        """So many responses to these prompts have ended."""
        np.subtract.at(self.users, slot_R, 1)

    def shared_by(self, slot_R: np.ndarray, width_R: np.ndarray) -> "SharedPrompts":
        """For one step of rows whose prompts are in these slots and whose responses take so many columns."""
        if self.groups is None or not np.array_equal(self.groups.slot_R, slot_R):
            self.groups = self._group(slot_R)
        chunks = [(part, int(width_R[part].max())) for part in self._parts(len(slot_R))]
        return SharedPrompts(self.cache, self.groups, chunks)

    def _parts(self, count: int) -> list[slice]:
        parts = PARTS if self.model.device.type == "cpu" else 1
        bounds = [count * i // parts for i in range(parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]

    def _group(self, slot_R: np.ndarray) -> "Groups":
        """Sort the prompts of these rows to the front of the cache, by their number of rows, so that a part of them can
        be read where it is; it is done anew once rows have been moved, not at every step."""
        device = self.model.device
        slots, counts = np.unique(slot_R, return_counts=True)
        slots = slots[np.lexsort((self.length[slots], counts))[::-1]]
        everything = np.concatenate([slots, np.setdiff1d(np.arange(len(self.users)), slots)])
        source, target = self.cache_row[everything], np.arange(len(everything))
        if not np.array_equal(source, target):
            source_R, target_R = torch.from_numpy(source).to(device), torch.from_numpy(target).to(device)
            self.cache.permute_rows(source_R, target_R, self.length[everything].tolist())
            self.cache_row[everything] = target
        where_R: np.ndarray = np.empty(len(slot_R), np.int64)
        parts, places = [], 0
        for part in self._parts(len(slots)):
            mine = [np.flatnonzero(slot_R == slot) for slot in slots[part]]
            rows_PK: np.ndarray = np.zeros((len(mine), max(map(len, mine))), np.int64)
            for p, rows in enumerate(mine):
                rows_PK[p, : len(rows)] = rows
                where_R[rows] = places + p * rows_PK.shape[1] + np.arange(len(rows))
            places += rows_PK.size
            length_P1 = torch.from_numpy(self.length[slots[part]])[:, None].to(device)
            width = int(length_P1.max())
            mask = visible(length_P1 - 1, width, self.model.dtype)
            parts.append(Part(part, width, mask, torch.from_numpy(rows_PK).to(device)))
        return Groups(slot_R.copy(), parts, torch.from_numpy(where_R).to(device))


@dataclass(frozen=True)
class Part:
    """Prompts in neighbouring rows of the cache."""

    prompts: slice
    width: int  # columns of the longest
    mask: Tensor  # additive, [P, 1, 1, width]
    rows_PK: Tensor  # the rows of each; places without a row repeat row 0, whose result there nobody reads


@dataclass(frozen=True)
class Groups:
    """Rows by prompt."""

    slot_R: np.ndarray
    parts: list[Part]
    where_R: Tensor  # the place of each row among those of all parts, one after the other


@dataclass
class SharedPrompts:
    """What one step's attention needs to know. `calls` counts the layers that asked."""

    cache: RowCache
    groups: Groups
    chunks: list[tuple[slice, int]]  # rows and the columns of their responses
    calls: int = 0


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, J, Q, D] of query [B, J, Q, D] over key, value [B, J, L, D] with additive mask [B, 1, 1, L], and the
    log-sum-exp [B, J, Q] of its scores, float32.

    Written out: the fused kernels keep the log-sum-exp to themselves, and with a few queries an entry they are no
    faster. Batched products take the sliced keys where they are; matmul on four dimensions would copy them.
    """
    shape = (*query.shape[:3], key.shape[2])
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(shape)
    logits = scores.float() * scale + mask
    shares = logits.log_softmax(dim=3)
    lse = (logits[..., :1] - shares[..., :1]).squeeze(3)  # from the first column, which every query sees
    output = torch.bmm(shares.exp_().to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return output.view(query.shape), lse


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; with `shared_prompts`, one query a row [R, H, 1, D] also sees its prompt."""
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    shared_prompts.calls += 1
    layer = shared_prompts.cache.layers[module.layer_idx]
    (rows, heads, _, head), key_heads = query.shape, key.shape[1]
    scale = options.get("scaling") or head**-0.5
    grouped_RJGD = query.view(rows, key_heads, heads // key_heads, head)
    outputs, lses = [], []
    for part in shared_prompts.groups.parts:
        keys, values = (x[part.prompts, :, : part.width] for x in (layer.key_buffer, layer.value_buffer))
        by_prompt = grouped_RJGD[part.rows_PK].transpose(1, 2)  # [P, J, K, G, D]
        output, lse = _attend(by_prompt.flatten(2, 3), keys, values, part.mask, scale)
        outputs.append(output.view(by_prompt.shape).transpose(1, 2).flatten(0, 1))
        lses.append(lse.view(by_prompt.shape[:-1]).transpose(1, 2).flatten(0, 1))
    prompt_RJGD = torch.cat(outputs)[shared_prompts.groups.where_R]
    prompt_RJG = torch.cat(lses)[shared_prompts.groups.where_R]
    own = [
        _attend(
            grouped_RJGD[part], key[part, :, :width], value[part, :, :width], attention_mask[part, ..., :width], scale
        )
        for part, width in shared_prompts.chunks
    ]
    own_RJGD, own_RJG = (torch.cat(pieces) for pieces in zip(*own, strict=True))
    share = torch.sigmoid(prompt_RJG - own_RJG)[..., None].to(own_RJGD.dtype)
    return torch.lerp(own_RJGD, prompt_RJGD, share).view(rows, 1, heads, head), None


def can_share(model: Any) -> bool:
    """True for models with sdpa attention (or our kinds of it) through transformers' interface, and plain keys."""
    if hasattr(model.config.get_text_config(decoder=True), "kv_lora_rank"):  # latent attention
        return False
    return getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation in (
        "sdpa",
        TREE_ATTENTION,
        FLOAT_ATTENTION,
    )


@contextmanager
def sharing_prompts(model: Any) -> Iterator[None]:
    """The model attends by `shared_attention` inside."""
    AttentionInterface.register(SHARED_ATTENTION, shared_attention)
    AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)  # without a mask function, masks would be dropped
    before = model.config._attn_implementation
    model.set_attn_implementation(SHARED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
