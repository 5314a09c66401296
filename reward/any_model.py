"""Any Hugging Face sequence-classification reward model: how it reads a dialogue, and its scores.

Decoders with a linear `score` head are loaded as our own (reward/model.py): head in float32, a prompt computed once for
both responses, read at the last token; those of others at the last one that is not their padding token. All others,
encoders such as DeBERTa among them, run as the plain `AutoModelForSequenceClassification`, padded on the right under an
attention mask. Safetensors only, no remote code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from configs.chat import FIXED_DATE, ChatFormatError, Message, check_messages, load_chat_format, special_tokens
from configs.errors import UserError
from reward.collate import batches_by_budget, budget_for, pad_right
from reward.model import check_padding_token, load_reward_model, reward_config
from reward.scorer import score_ids

INPUT_FORMATS = ("auto", "chat", "template", "text_pair")
# Learnt positions of these start after the padding token's id, so two of 514 are never used.
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer")


@dataclass(frozen=True)
class Inputs:
    """One dialogue as a model reads it; `segments` (0 prompt, 1 response) only for tokenizers that make them."""

    input_ids: list[int]
    segments: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class AnyRewardModel:
    """A reward model by its path. Tokenizer and input format are ready at once, weights after `load`.

    Attributes:
        input_format: chat, template or text_pair; see `_input_format`.
        context: the most tokens that the model takes; None where its config does not say.
        forbidden: special tokens, which no message may contain.
    """

    def __init__(self, path: str, input_format: str = "auto") -> None:
        self.path = path
        self.config = reward_config(path)
        if type(self.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"{path}: transformers has no sequence-classification class for model type {self.config.model_type!r}"
            )
        self.is_decoder = _has_score_head(self.config)
        self.tokenizer = _load_tokenizer(path)
        self.input_format = _input_format(input_format, self)
        encoders: dict[str, Callable[[Any], tuple[Callable, Sequence[str]]]] = {
            "chat": _chat_encoder,
            "template": _template_encoder,
            "text_pair": _text_pair_encoder,
        }
        self.encode, self.forbidden = encoders[self.input_format](self.tokenizer)
        if self.is_decoder and not hasattr(self.config, "reward_input_format"):
            self.encode = _without_padding(self.encode, self.config.pad_token_id)
        self.context = _context(self.config, self.tokenizer, self.is_decoder)
        if not self.is_decoder:
            check_padding_token(self.tokenizer, path)
        self.model: Any = None

    def load(self, dtype: torch.dtype | None, attn_implementation: str, device: torch.device) -> None:
        """Read the weights. `dtype` None: bfloat16 on a GPU for decoders, else float32; a plain class has its head in
        the same type as the rest, and bfloat16 would round good responses to one score."""
        if dtype is None:
            dtype = torch.bfloat16 if self.is_decoder and device.type == "cuda" else torch.float32
        if self.is_decoder:
            self.model = load_reward_model(self.path, dtype, attn_implementation).to(device)
        else:
            self.model = _load_plain(self.path, self.config, dtype).to(device).eval()

    def unload(self) -> None:
        """Let the weights go, so that the next model has the memory."""
        self.model = None

    def scores(self, dialogues: Sequence[Inputs], token_budget: int = 0) -> list[float]:
        """Raw scores of dialogues that come as chosen, rejected, chosen, rejected, ..., in their order."""
        if self.is_decoder:
            return score_ids(self.model, [each.input_ids for each in dialogues], token_budget, k=2).tolist()
        return plain_scores(self.model, dialogues, self.tokenizer.pad_token_id, token_budget).tolist()


@torch.inference_mode()
def plain_scores(model: Any, dialogues: Sequence[Inputs], pad_id: int, token_budget: int = 0) -> Tensor:
    """Scores of N dialogues by a plain sequence-classification model, float32 [N] on the CPU."""
    device = next(model.parameters()).device
    result_N = torch.empty(len(dialogues), dtype=torch.float32)
    for batch in batches_by_budget([len(each) for each in dialogues], budget_for(token_budget, device)):
        input_ids_BT, mask_BT = pad_right([dialogues[i].input_ids for i in batch], pad_id)
        inputs = {"input_ids": input_ids_BT, "attention_mask": mask_BT}
        if dialogues[batch[0]].segments is not None:
            inputs["token_type_ids"] = pad_right([dialogues[i].segments or [] for i in batch], 0)[0]
        logits_B1 = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        result_N[batch] = logits_B1[:, 0].float().cpu()
    return result_N


def _input_format(wanted: str, model: AnyRewardModel) -> str:
    """What `auto` stands for; any other choice is taken as it is.

    chat       our chat format (configs/chat.py): the dialogue ends in its end-of-turn token. Models of train_reward.py,
               and decoders whose template is Llama 2's or that have none.
    template   the tokenizer's own chat template as it stands, as in `apply_chat_template(messages)` of model cards.
    text_pair  the prompt as the first text, the response as the second: encoders without a template.
    """
    if wanted not in INPUT_FORMATS:
        raise UserError(f"input_format: must be one of {', '.join(INPUT_FORMATS)}, not {wanted!r}")
    template = str(getattr(model.tokenizer, "chat_template", None) or "")
    if wanted == "template" and not template:
        raise UserError(f"input_format: template, but the tokenizer of {model.path} has no chat template")
    if wanted != "auto":
        return wanted
    if stored := getattr(model.config, "reward_input_format", None):
        return _input_format(stored, model) if stored != "auto" else "chat"
    if template:
        return "chat" if "<<SYS>>" in template and "[INST]" in template else "template"
    return "chat" if model.is_decoder else "text_pair"


def _without_padding(encode: Callable[[Sequence[Message]], Inputs], pad_id: int | None) -> Callable:
    """`encode` without padding tokens at the end: where a decoder's plain class, which was trained so, reads the score.

    It takes the last token that is not padding. With a model that pads with its end token, that is the one before it.
    """

    def shortened(messages: Sequence[Message]) -> Inputs:
        ids = encode(messages).input_ids
        end = len(ids)
        while end > 1 and ids[end - 1] == pad_id:
            end -= 1
        return Inputs(ids[:end])

    return shortened


Encoder = tuple[Callable[[Sequence[Message]], Inputs], Sequence[str]]


def _chat_encoder(tokenizer: Any) -> Encoder:
    chat_format = load_chat_format(tokenizer)
    return lambda messages: Inputs(chat_format.encode_dialogue(messages).input_ids), chat_format.forbidden


def _template_encoder(tokenizer: Any) -> Encoder:
    forbidden = tuple(special_tokens(tokenizer))

    def encode(messages: Sequence[Message]) -> Inputs:
        check_messages(messages, "assistant", forbidden)
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=FIXED_DATE)
        except jinja2.TemplateError as error:
            raise ChatFormatError(f"the chat template refused the dialogue: {error}") from error
        return Inputs(tokenizer.encode(text, add_special_tokens=False))

    return encode, forbidden


def _text_pair_encoder(tokenizer: Any) -> Encoder:
    forbidden = tuple(special_tokens(tokenizer))

    def encode(messages: Sequence[Message]) -> Inputs:
        check_messages(messages, "assistant", forbidden)
        encoded = tokenizer(prompt_text(messages[:-1]), messages[-1]["content"])
        return Inputs(encoded["input_ids"], encoded.get("token_type_ids"))

    return encode, forbidden


def prompt_text(prompt: Sequence[Message]) -> str:
    """A prompt as one text: a single user turn as it is, several turns with their speakers' names, as in HH-RLHF."""
    system = [message["content"] for message in prompt if message["role"] == "system"]
    turns = [message for message in prompt if message["role"] != "system"]
    names = {"user": "Human", "assistant": "Assistant"}
    said = [turns[0]["content"]] if len(turns) == 1 else [f"{names[t['role']]}: {t['content']}" for t in turns]
    return "\n\n".join([*system, *said])


def _has_score_head(config: Any) -> bool:
    """Whether the class has a linear `score`, as decoder-only models do. Built without memory for its weights."""
    with torch.device("meta"):
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    return isinstance(getattr(model, "score", None), nn.Linear)


def _load_tokenizer(path: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be loaded from {path}: {str(error).splitlines()[0]}") from error


def _context(config: Any, tokenizer: Any, is_decoder: bool) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    if config.model_type in SHIFTED_POSITIONS:
        positions -= config.pad_token_id + 1
    # Decoders are often saved with the length of some training batch as model_max_length.
    return positions if is_decoder else min(positions, tokenizer.model_max_length)


def _load_plain(path: str, config: Any, dtype: torch.dtype) -> Any:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no weights can be loaded: {str(error).splitlines()[0]}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{path}: the weights lack {', '.join(missing[:3])}; scores would be random")
    return model
