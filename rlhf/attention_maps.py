"""How strongly replies attend to the instruction of the first turn, over a dialogue (paper §3.3, Fig. 10).

The figure shows the maximum attention over the network with neighbouring tokens binned; so does `max_attention` with
`binned`. `to_span` reads the curve behind it: attention to the instruction by turn.

Letters: T tokens of a dialogue, Q queries and K keys of a part of it, S bins, H heads. A map is [query, key], each row
over the tokens up to the query.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from configs.chat import ChatFormat, ChatFormatError
from configs.errors import UserError
from configs.gatt_settings import PersistenceSettings
from configs.model_settings import ModelSettings
from configs.records import read_prompts
from gatt.transform import Message, training_dialogue
from rlhf.estimates import mean_with_interval
from rlhf.gatt_plans import draw_instructions, draw_slot, draw_user_turns, draw_wording, usable_prompts
from rlhf.models import decoder_of, load_policy
from rlhf.persistence_dialogues import as_messages, opening, play
from rlhf.token_texts import token_texts

Span = tuple[int, int]  # first token, and the one behind the last


@dataclass(frozen=True)
class Reading:
    """A dialogue as ids, and where in it what stands.

    `instruction` and `question` are the tokens of the instruction and of the first user text, `replies` those of every
    reply with its end token.
    """

    ids: list[int]
    instruction: Span
    question: Span
    replies: list[Span]


def load_eager(path: str, device: str = "cpu") -> Any:
    """The policy at `path` with attention that can be read: sdpa and FlashAttention never hold the weights."""
    disable_progress_bar()
    settings = ModelSettings(model_name_or_path=path, attn_implementation="eager", dtype="float32")
    return load_policy(settings, trainable=False).to(device)


@torch.inference_mode()
def max_attention(model: Any, ids: Sequence[int]) -> Tensor:
    """float32 [T, T] on the CPU: the largest attention weight over all layers and heads, for each query and key.

    Layer by layer: each layer's [1, H, T, T] is reduced as soon as it is there and let go, so that no two are held.

    Raises:
        UserError: the model gives no attention weights; load it with `load_eager`.
    """
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    largest: list[Tensor] = []
    seen = 0

    def reduce(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal seen
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.dim() != 4:
            return None
        seen += 1
        largest[:] = [torch.maximum(largest[0], weights[0].amax(0)) if largest else weights[0].amax(0)]
        return (output[0], None, *output[2:])

    handles = [layer.register_forward_hook(reduce) for layer in layers]
    try:
        decoder_of(model)(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if seen != expected:
        raise UserError(
            f"attention weights came from {seen} of {expected} layers; load the model with attn_implementation: eager"
        )
    return largest[0].float().cpu()


def binned(map_QK: Tensor, queries: int, keys: int) -> Tensor:
    """[ceil(Q / queries), ceil(K / keys)]: the largest entry of each block of so many neighbouring queries and keys."""
    if min(queries, keys) < 1:
        raise UserError(f"bins of {queries} queries and {keys} keys; give at least one token a bin")
    rows, columns = math.ceil(map_QK.shape[0] / queries), math.ceil(map_QK.shape[1] / keys)
    padded = map_QK.new_zeros(rows * queries, columns * keys)
    padded[: map_QK.shape[0], : map_QK.shape[1]] = map_QK
    return padded.view(rows, queries, columns, keys).amax((1, 3))


def to_span(map_TT: Tensor, span: Span, replies: Sequence[Span]) -> list[float]:
    """For each reply: the largest weight on a token of `span`, on average over the reply's tokens.

    The token at position t was predicted at t - 1, so the queries of a reply begin one token before it.
    """
    return [map_TT[start - 1 : end - 1, span[0] : span[1]].amax(1).mean().item() for start, end in replies]


def locate(messages: Sequence[Message], wording: str, slot: str, chat_format: ChatFormat) -> Reading:
    """`messages`, a plain dialogue that ends with a reply, with the instruction in its first turn, as ids and places.

    Raises:
        UserError: the dialogue has no reply, or its ids do not decode to a text that holds the wording.
    """
    dialogue = training_dialogue(messages, wording, slot)
    encoded = chat_format.encode_dialogue(dialogue)
    # A tokenizer may give the first token no text of its own; lengths are all that is needed.
    texts = token_texts(chat_format.tokenizer, [], encoded.input_ids)
    question = next(m["content"] for m in messages if m["role"] == "user")
    instruction = find(texts, wording, 0)
    return Reading(encoded.input_ids, instruction, find(texts, question, instruction[1]), runs(encoded.response_mask))


def sample_readings(
    model: Any, chat_format: ChatFormat, prompt_file: str, settings: PersistenceSettings, seed: int = 0
) -> list[Reading]:
    """Dialogues that the model has with itself under an instruction in the first turn, to be read by any model.

    Drawn as `rlhf/evaluate_gatt.py` draws them. A dialogue with a reply that the chat format refuses is left out.

    Raises:
        UserError: no dialogue is left.
    """
    prompts, _ = usable_prompts(read_prompts(prompt_file, chat_format=chat_format).rows)
    rng = random.Random(f"attention {seed}")
    user_turns = draw_user_turns(prompts, [settings.num_turns] * settings.num_dialogues, rng)
    given = draw_instructions(settings, settings.num_dialogues, "train", rng)
    worded = [(draw_wording(settings, instruction, rng), draw_slot(settings, rng)) for instruction in given]
    pad_id = chat_format.tokenizer.pad_token_id
    replies = play(model, chat_format, pad_id, [opening(*each) for each in worded], user_turns, settings, seed)
    readings = []
    for turns, texts, (wording, slot) in zip(user_turns, replies, worded, strict=True):
        if texts and all(text.strip() for text in texts):
            try:
                readings.append(locate(as_messages(turns, texts), wording, slot, chat_format))
            except ChatFormatError:
                continue
    if not readings:
        raise UserError(f"{prompt_file}: the model made no dialogue that can be read; check num_turns and max_length")
    return readings


def compare(models: Mapping[str, Any], readings: Sequence[Reading]) -> dict[str, dict[str, list[list[float]]]]:
    """{"the instruction" or "the first question": {model: by dialogue, by turn `to_span`}}, every model on the same."""
    found: dict[str, dict[str, list[list[float]]]] = {"the instruction": {}, "the first question": {}}
    for name, model in models.items():
        largest = (max_attention(model, reading.ids) for reading in readings)  # one at a time
        spans = [
            (to_span(map_TT, reading.instruction, reading.replies), to_span(map_TT, reading.question, reading.replies))
            for map_TT, reading in zip(largest, readings, strict=True)
        ]
        for target, curves in zip(found, zip(*spans, strict=True), strict=True):
            found[target][name] = list(curves)
    return found


def find(texts: Sequence[str], wanted: str, first: int) -> Span:
    """The tokens that hold any character of the first `wanted` from token `first` on."""
    begin = "".join(texts).find(wanted, len("".join(texts[:first])))
    if begin < 0:
        raise UserError(f"the tokens of the dialogue do not spell {wanted!r}")
    ends = [0]
    for text in texts:
        ends.append(ends[-1] + len(text))
    inside = [t for t in range(len(texts)) if ends[t] < begin + len(wanted) and ends[t + 1] > begin]
    return inside[0], inside[-1] + 1


def runs(mask_T: Sequence[bool]) -> list[Span]:
    """The runs of True."""
    edges = [t for t in range(len(mask_T) + 1) if (t > 0 and mask_T[t - 1]) != (t < len(mask_T) and mask_T[t])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def by_turn(curves: Sequence[Sequence[float]]) -> dict[int, tuple[float, float]]:
    """{turn: (mean over dialogues, half-width of its 95 % interval)}; dialogues may differ in length."""
    longest = max(map(len, curves), default=0)
    return {t + 1: mean_with_interval([curve[t] for curve in curves if t < len(curve)]) for t in range(longest)}
