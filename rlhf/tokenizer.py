"""Tokenizers: loading, and whether two models read ids alike."""

import logging
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from configs.errors import UserError

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `path`, with a pad token that no other role uses (added as `<pad>` where there is none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: no tokenizer can be loaded from {path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_name_or_path: the tokenizer of {path!r} has no EOS token, so no reply could ever end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        added = tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        if tokenizer.pad_token_id == tokenizer.eos_token_id:  # "<pad>" itself is this tokenizer's eos
            raise UserError(f"model_name_or_path: the tokenizer of {path!r} uses {PAD_TOKEN!r} as its EOS token")
        logger.warning("%s has no pad token of its own: %r is used (%d token added)", path, PAD_TOKEN, added)
    return tokenizer


def check_same_tokenizer(tokenizer: Any, path: str, field: str) -> None:
    """UserError, naming `field`, where the model at `path` reads ids as other tokens than `tokenizer` does.

    Ids go from one model to the next as they are. A padding token of either side may be missing or have another id on
    the other, as it is never read. A folder without a tokenizer, such as an adapter's, is taken to have the same.
    """
    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return
    ours, theirs = (set(each.get_vocab().items()) for each in (tokenizer, other))
    alone = {token for token, _ in ours - theirs} - {tokenizer.pad_token}
    alone |= {token for token, _ in theirs - ours} - {other.pad_token}
    if alone:
        raise UserError(
            f"{field}: {path} has another tokenizer than the policy, so it would read the policy's ids as other text "
            f"({len(alone)} tokens differ, such as {min(alone)!r})"
        )
