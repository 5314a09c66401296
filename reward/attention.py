"""Attention for the response tree: causal over the prompt, under the tree's mask after it.

A mask [B, 1, S, T] with fewer queries S than keys T speaks of the last S tokens; the T - S before them see what comes
before them. These are left to the causal kernel, which skips half of the products and needs no mask: on long prompts
most of the attention's time and, on a GPU, the difference between a flash kernel and a slower one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "sdpa_trees"  # as an attn_implementation of transformers; plain sdpa for every other mask


def tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, which also takes the short masks described above. query [B, H, T, D]."""
    tokens = query.shape[2]
    if attention_mask is None or attention_mask.shape[2] == tokens:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    first = tokens - attention_mask.shape[2]
    parts = [
        sdpa_attention_forward(module, query[:, :, :first], key[:, :, :first], value[:, :, :first], None, **options),
        sdpa_attention_forward(module, query[:, :, first:], key, value, attention_mask, **options),
    ]
    return torch.cat([output for output, _ in parts], dim=1), None


def use_tree_attention(model: Any) -> None:
    """Let a model with sdpa attention take short masks. Without the mask function, its other masks would be dropped."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(TREE_ATTENTION, tree_attention)
        AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
        model.set_attn_implementation(TREE_ATTENTION)


def whole_mask(short: Tensor, tokens: int) -> Tensor:
    """The mask [B, 1, T, T] that a short one [B, 1, S, T] stands for, for attention that needs it written out."""
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=short.device).tril()
    first = causal_TT[: tokens - short.shape[2]].expand(len(short), 1, -1, -1)
    return torch.cat([first, short], dim=2)
