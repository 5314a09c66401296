"""Chat format: dialogues to token ids and the mask of trained tokens, the same for every stage.

Two formats give the same two guarantees, or raise `ChatFormatError`:

1. The ids of a prompt are an exact prefix of the ids of the dialogue that continues it.
2. `response_mask` is True on exactly the tokens of assistant replies, the end-of-turn token included. Ids and mask grow
   by the same append, so they cannot drift; no text is searched for a reply.

`Llama2Format` is Meta's reference format (`llama/generation.py`): every finished exchange is encoded by itself as

    BOS + encode("[INST] {user} [/INST] {assistant} ") + EOS

with the system message folded into the first user turn. `TemplateFormat` serves models that bring a chat template of
their own (SmolLM2, Llama 3, Qwen 2.5). Special tags inside a message are refused, so text cannot pose as a turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# The cache of encoded texts: longer ones come back less often, and bounds keep it under some 40 MB.
REMEMBERED_TEXTS, REMEMBERED_LENGTH = 4096, 1000
# Llama 3.2 writes today's date into the prompt unless it is given one; this is the constant that Llama 3.1 uses.
FIXED_DATE = "26 Jul 2024"
# For any tokenizer of Llama 2's vocabulary: the first id tells Meta's per-string encoding (518, "▁[") from a bare "["
# (29961), the last two show a converter that merges runs of spaces differently from SentencePiece.
_LLAMA2_PROBE = ("[INST] a  c", [518, 25580, 29962, 263, 29871, 274])

LLAMA2_TEMPLATE = r"""
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if has_system else '' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('Roles must be (system?), user, assistant, user, ...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' -}}
{%- else -%}
{%- generation -%}{{- ' ' + message['content'].strip() + ' ' + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
""".strip()


class ChatFormatError(UserError):
    """A dialogue or a chat template that cannot be encoded. `reason` is the short kind, for counting rejects."""

    def __init__(self, message: str, reason: str = "chat format") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Encoded:
    """One dialogue as ids. Both lists have the same length T; `response_mask[t]` is True where token t is part of an
    assistant reply (its end-of-turn token included), False on everything the model is only shown."""

    input_ids: list[int]
    response_mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.response_mask):
            raise ValueError(f"{len(self.input_ids)} ids but {len(self.response_mask)} mask entries")


def check_messages(messages: Any, last_role: str | None = None, forbidden: Sequence[str] = SPECIAL_TAGS) -> None:
    """Raise ChatFormatError, naming the message, unless `messages` is (system?), user, assistant, user, ...

    Args:
        messages: the dialogue; any type is accepted and checked.
        last_role: the role that the last message must have; None accepts user and assistant.
        forbidden: strings that no message may contain (in any role: Meta's check of 2023-08-07 does the same).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatFormatError(f"a dialogue must be a list of messages, not {type(messages).__name__}", "wrong type")
    if not messages:
        raise ChatFormatError("a dialogue must have at least one message", "missing or empty field")
    expected = "user"
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ChatFormatError(f"message {index} must be an object, not {type(message).__name__}", "wrong type")
        for field in ("role", "content"):
            if field not in message or message[field] is None:
                raise ChatFormatError(f"message {index} has no '{field}'", "missing or empty field")
            if not isinstance(message[field], str):
                kind = type(message[field]).__name__
                raise ChatFormatError(f"message {index}: '{field}' must be a string, not {kind}", "wrong type")
        role, content = message["role"], message["content"]
        if not (role == "system" and index == 0):
            if role != expected:
                raise ChatFormatError(
                    f"message {index} has role '{role}' where '{expected}' is due "
                    "(the order is: system (optional), user, assistant, user, ...)",
                    "wrong role order",
                )
            expected = "assistant" if role == "user" else "user"
        if not content.strip():
            raise ChatFormatError(f"message {index} ({role}) is empty", "missing or empty field")
        for tag in forbidden:
            if tag in content:
                raise ChatFormatError(f"message {index} ({role}) contains the special tag {tag!r}", "special tag")
    last = messages[-1]["role"]
    if last == "system" or (last_role is not None and last != last_role):
        raise ChatFormatError(
            f"message {len(messages) - 1} is the last and has role '{last}' where '{last_role or 'user'}' is needed",
            "wrong role order",
        )


class ChatFormat:
    """What the formats share. Build one with `load_chat_format`; its only state is a cache of encoded text, because the
    same prompt is encoded again for every response to it.

    Attributes:
        name: "llama2" or "template".
        tokenizer: the transformers tokenizer it was built with.
        stop_ids: ids that end a reply while sampling.
        forbidden: strings refused inside messages.
    """

    name = ""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stop_ids: list[int] = []
        self.special_ids = special_tokens(tokenizer)
        self.forbidden: tuple[str, ...] = tuple(self.special_ids)
        self._remembered = lru_cache(REMEMBERED_TEXTS)(self._encode_anew)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a dialogue whose last message is the user's, up to where the reply begins."""
        check_messages(messages, "user", self.forbidden)
        return self._build(messages).input_ids

    def encode_dialogue(self, messages: Sequence[Message]) -> Encoded:
        """Ids and mask of a dialogue whose last message is the assistant's; the last id ends its turn."""
        check_messages(messages, "assistant", self.forbidden)
        return self._build(messages)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a sampled reply: what comes before the first stop id, without special tokens, stripped."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text: str = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def ended(self, ids: Sequence[int]) -> list[int]:
        """The ids of a reply or of a whole dialogue, with the end of the turn added where a limit cut it off."""
        return list(ids) if ids and ids[-1] in self.stop_ids else [*ids, self.stop_ids[-1]]

    def render(self, messages: Sequence[Message]) -> str:
        """The dialogue as text, special tokens written out. For people and tests; training never re-encodes it."""
        raise NotImplementedError

    def _build(self, messages: Sequence[Message]) -> Encoded:
        raise NotImplementedError

    def _encode_text(self, text: str) -> list[int]:
        return list(self._remembered(text) if len(text) <= REMEMBERED_LENGTH else self._encode_anew(text))

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _continue(self, head: str, head_ids: list[int], tail: str) -> list[int]:
        """Ids of `tail` after `head`, such that `head_ids` stay as they are.

        They are what the whole text gives where its ids begin with `head_ids`. Where a token would span the border, the
        tail is encoded by itself, if the joined ids still decode to the whole text (a leading blank is tried without
        too, because SentencePiece adds one of its own).
        """
        whole = self._encode_text(head + tail)
        if whole[: len(head_ids)] == head_ids:
            return whole[len(head_ids) :]
        text = self._decode_text(whole)
        for candidate in (tail, tail.removeprefix(" ")):
            tail_ids = self._encode_text(candidate)
            if self._decode_text(head_ids + tail_ids) == text:
                return tail_ids
        raise ChatFormatError(
            f"this tokenizer cannot encode {tail[:40]!r} after {head[-40:]!r} without changing the prompt's ids"
        )


class Llama2Format(ChatFormat):
    """Meta's format. Text is encoded by SentencePiece where the tokenizer's folder has a `tokenizer.model`: conversions
    of that file by transformers differ from it on runs of spaces and, by their settings, on the first token."""

    name = "llama2"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ChatFormatError("chat_format 'llama2' needs a tokenizer with a BOS and an EOS token")
        self.stop_ids = [tokenizer.eos_token_id]
        self.forbidden = SPECIAL_TAGS + self.forbidden
        self._sentencepiece = _load_sentencepiece(tokenizer)
        # An unknown character may be encoded as unk; any other special id could only come from text posing as one.
        self._control_ids = set(self.special_ids.values()) - {tokenizer.unk_token_id}
        _check_llama2_encoder(self)

    def render(self, messages: Sequence[Message]) -> str:
        check_messages(messages, None, self.forbidden)
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        return "".join(bos + prompt + (reply + eos if reply else "") for prompt, reply in _llama2_exchanges(messages))

    def _build(self, messages: Sequence[Message]) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []

        def append(new_ids: list[int], is_response: bool) -> None:
            ids.extend(new_ids)
            mask.extend([is_response] * len(new_ids))

        for prompt, reply in _llama2_exchanges(messages):
            prompt_ids = self._encode_text(prompt)
            append([self.tokenizer.bos_token_id, *prompt_ids], False)
            if reply:
                append([*self._continue(prompt, prompt_ids, reply), self.tokenizer.eos_token_id], True)
        return Encoded(ids, mask)

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        if self._sentencepiece is not None:
            return tuple(self._sentencepiece.encode(text))
        ids = super()._encode_anew(text)
        if not self._control_ids.isdisjoint(ids):
            raise ChatFormatError(f"text was encoded as a special token: {text[:60]!r}", "special tag")
        return ids

    def _decode_text(self, ids: list[int]) -> str:
        return self._sentencepiece.decode(ids) if self._sentencepiece is not None else super()._decode_text(ids)


class TemplateFormat(ChatFormat):
    """A model's own chat template, rendered turn by turn: each rendering must continue the one before it."""

    name = "template"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        template = str(tokenizer.chat_template or "")
        if not template:
            raise ChatFormatError("chat_format 'template' needs a tokenizer with a chat_template; use 'llama2'")
        if "strftime_now" in template and "date_string" not in template:
            raise ChatFormatError(
                "the chat template writes today's date into every prompt, so ids would differ from day to day; "
                "remove strftime_now from it or use chat_format 'llama2'"
            )
        # The end-of-turn token is not written down anywhere but in the template: read it off a rendered dialogue.
        self._special_re = re.compile(
            "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True))) or r"(?!)"
        )
        probe = [{"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two")) * 2]
        self.stop_ids = list({tokenizer.eos_token_id: None, self._build(probe).input_ids[-1]: None})
        self.stop_ids = [token for token in self.stop_ids if token is not None]

    def render(self, messages: Sequence[Message]) -> str:
        check_messages(messages, None, self.forbidden)
        return self._render(messages)

    def _render(self, messages: Sequence[Message]) -> str:
        import jinja2

        is_prompt = messages[-1]["role"] == "user"
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_prompt, date_string=FIXED_DATE
            )
        except jinja2.TemplateError as error:
            raise ChatFormatError(f"the chat template refused the dialogue: {error}") from error

    def _build(self, messages: Sequence[Message]) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # what `ids` stand for

        for index, message in enumerate(messages):
            if message["role"] == "system":
                continue
            rendered = self._render(messages[: index + 1])
            if not rendered.startswith(text):
                raise ChatFormatError(
                    f"message {index} ({message['role']}): the chat template renders the turns before it differently "
                    "once this one is added (some strip earlier reasoning), so a prompt would not be a prefix of its "
                    "dialogue; use a template without that rule or chat_format 'llama2'"
                )
            new_text = rendered[len(text) :]
            is_response = message["role"] == "assistant"
            if is_response:
                new_text = self._reply(index, message["content"], new_text)
            new_ids = self._continue(text, ids, new_text)
            if is_response and self.special_ids.get(self._decode_text(new_ids[-1:])) != new_ids[-1]:
                raise ChatFormatError(f"message {index} (assistant): its last token does not end the turn")
            ids.extend(new_ids)
            mask.extend([is_response] * len(new_ids))
            text += new_text
        return Encoded(ids, mask)

    def _reply(self, index: int, content: str, new_text: str) -> str:
        """The part of the rendered assistant turn that the model has to write: the reply and its end-of-turn token.

        What a template adds after that (ChatML: a line break) is left to the next turn, so the dialogue ends where
        sampling ends.
        """
        end = self._special_re.search(new_text)
        if end is None:
            raise ChatFormatError(f"message {index} (assistant): the chat template ends its turn with no special token")
        if new_text[: end.start()].strip() != content.strip():
            raise ChatFormatError(
                f"message {index} (assistant): the chat template drops or adds text to the reply, or gives no "
                "generation prompt, so the mask of trained tokens would not be exact; use another template or "
                "chat_format 'llama2'"
            )
        return new_text[: end.end()]


def load_chat_format(tokenizer: Any, name: str = "auto") -> ChatFormat:
    """The format of a tokenizer. "auto" takes the tokenizer's own chat template, or Llama 2's format where it has none
    or where its template is Llama 2's (then our encoding of it is the exact one)."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if name == "auto":
        name = "template" if template and not ("<<SYS>>" in template and B_INST in template) else "llama2"
    if name == "llama2":
        return Llama2Format(tokenizer)
    if name == "template":
        return TemplateFormat(tokenizer)
    raise UserError(f"chat_format is {name!r}; choose auto, llama2 or template")


def training_chat_template(source: Any) -> str:
    """The Jinja template to save with an artifact, for a ChatFormat or a tokenizer (then of its "auto" format).

    Llama 2's renders the text of `ChatFormat.render` and marks replies, EOS included, with {% generation %}, so other
    programs can train and serve the model in the same format.
    """
    chat_format = source if isinstance(source, ChatFormat) else load_chat_format(source)
    return LLAMA2_TEMPLATE if chat_format.name == "llama2" else chat_format.tokenizer.chat_template


def sentencepiece_file(tokenizer: Any) -> Path | None:
    """The `tokenizer.model` that a tokenizer was loaded from, if it has one. `save_pretrained` does not copy it, and
    without it the exact Llama 2 ids are lost, so whoever saves the tokenizer copies this file beside it."""
    folder = getattr(tokenizer, "name_or_path", "") or ""
    for candidate in (getattr(tokenizer, "vocab_file", None), Path(folder) / "tokenizer.model" if folder else None):
        if candidate and Path(candidate).name.endswith(".model") and Path(candidate).is_file():
            return Path(candidate)
    return None


def _llama2_exchanges(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(prompt text, reply text or "") of each exchange, BOS and EOS left out. The blank before EOS is Meta's."""
    turns = list(messages)
    if turns[0]["role"] == "system":
        merged = B_SYS + turns[0]["content"] + E_SYS + turns[1]["content"]
        turns = [{"role": "user", "content": merged}, *turns[2:]]
    replies = [f" {turn['content'].strip()} " for turn in turns[1::2]] + [""] * (len(turns) % 2)
    return [(f"{B_INST} {user['content'].strip()} {E_INST}", reply) for user, reply in zip(turns[::2], replies)]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every special token, the unnamed ones (Llama 3's <|eot_id|>) included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {str(token): index for index, token in added.items() if token.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    return {text: index for text, index in tokens.items() if text.strip()}


def _load_sentencepiece(tokenizer: Any) -> Any | None:
    path = sentencepiece_file(tokenizer)
    if path is None:
        return None
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    sample = range(3, len(processor), max(1, len(processor) // 64))
    if any(processor.id_to_piece(i) != tokenizer.convert_ids_to_tokens(i) for i in sample):
        raise ChatFormatError(f"{path} is not the vocabulary of the tokenizer beside it")
    return processor


def _check_llama2_encoder(chat_format: Llama2Format) -> None:
    text, expected = _LLAMA2_PROBE
    tokenizer = chat_format.tokenizer
    ids = chat_format._encode_text(text)
    if tokenizer.convert_ids_to_tokens(expected[0]) == "▁[" and ids != expected:
        raise ChatFormatError(
            f"this tokenizer has Llama 2's vocabulary but encodes {text!r} as {ids} where SentencePiece gives "
            f"{expected}; put Meta's tokenizer.model into the tokenizer's folder"
        )
    if chat_format._decode_text(ids).strip() != text:
        raise ChatFormatError(f"this tokenizer does not keep text: {text!r} became {chat_format._decode_text(ids)!r}")
