"""Tokens as the text that each of them adds."""

import unicodedata
from collections.abc import Sequence
from typing import Any

# Turn the direction of the text around them, so that a terminal or page would show another order than there is.
DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def token_texts(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token of a response adds, blanks included; `ids` begin with `prompt_ids`.

    A tokenizer may split a character: its text then belongs to the token that completes it, the others get "".
    """

    def decode(end: int) -> str:
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")

    texts = [decode(end) for end in range(len(prompt_ids), len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]


def visible(text: str) -> str:
    """`text` with control characters and direction marks written out, so that no terminal obeys them; line breaks and
    tabs stay."""

    def shown(character: str) -> str:
        if character in "\n\t":
            return character
        hidden = unicodedata.category(character) == "Cc" or character in DIRECTION_MARKS
        return f"\\u{ord(character):04x}" if hidden else character

    return "".join(map(shown, text))
