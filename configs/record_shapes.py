"""The accepted shapes of a row, each brought to the normal form of `configs.records`. Pure: a row in, a row out.

Raises BadRow with a reason for counting and a detail that names the field but never quotes the text of a message:
preference data hold offensive text, and details end up in logs.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from configs.chat import Message
from configs.row_files import BadRow

Row = dict[str, Any]

# Strongest first (paper 3.2.1). Without a rating a pair is trained with no margin.
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
# Paper 3.2.1: pairs whose chosen response is the unsafe one are not kept, so there is no label for them.
SAFETY_LABELS = ("chosen_safe", "both_safe", "both_unsafe")
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def preference_row(raw: Row) -> Row:
    """TRL rows (explicit or implicit prompt), prompt/chosen/rejected strings, or HH-RLHF transcripts."""
    chosen, rejected = required(raw, "chosen"), required(raw, "rejected")
    prompt = raw.get("prompt")
    sides = [_prompt_and_response(prompt, side, name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    (prompt_messages, good), (rejected_prompt, bad) = sides
    if prompt_messages != rejected_prompt:
        raise BadRow("prompts differ", "chosen and rejected do not continue the same prompt")
    if good["content"].strip() == bad["content"].strip():
        raise BadRow("chosen equals rejected", "both responses have the same text")
    labels = {
        "rating": _choice(raw, "rating", RATINGS, "unknown rating"),
        "margin": _margin(raw),
        "safety": _choice(raw, "safety", SAFETY_LABELS, "unknown safety label"),
    }
    return _without(raw, "messages") | {"prompt": prompt_messages, "chosen": [good], "rejected": [bad], **labels}


def _prompt_and_response(prompt: Any, response: Any, name: str) -> tuple[list[Message], Message]:
    """(prompt messages, assistant message) of one side of a pair, in any of the accepted shapes."""
    if isinstance(response, str) and prompt is None:
        dialogue = _transcript(response, name)
    elif isinstance(response, str):
        dialogue = [*_prompt_messages(prompt), {"role": "assistant", "content": response}]
    elif isinstance(response, list):
        messages = _messages(response, name)
        begins = messages[0]["role"] == "assistant"
        if begins and prompt is None:
            raise BadRow("missing or empty field", f"'{name}' begins with the assistant, but there is no 'prompt'")
        dialogue = [*_prompt_messages(prompt), *messages] if begins else messages
        if begins and len(messages) != 1:
            raise BadRow("wrong role order", f"'{name}' must be one assistant message, not {len(messages)} messages")
        if not begins and prompt is not None and not _agrees(_prompt_messages(prompt), messages):
            raise BadRow("prompts differ", f"'{name}' repeats a prompt that is not the one in 'prompt'")
    else:
        raise BadRow("wrong type", f"'{name}' must be text or a list of messages, not {type(response).__name__}")
    if not dialogue or dialogue[-1]["role"] != "assistant":
        raise BadRow("wrong role order", f"'{name}' must end with the assistant")
    return dialogue[:-1], dialogue[-1]


def _agrees(prompt: list[Message], messages: list[Message]) -> bool:
    # UltraFeedback repeats the dialogue in chosen and rejected, and has its first user turn alone as prompt.
    return messages[: len(prompt)] == prompt or (
        len(prompt) == 1 and prompt[0] in [message for message in messages[:2] if message["role"] == "user"]
    )


def dialogue_row(raw: Row) -> Row:
    """`messages`, prompt/completion, instruction/input/output (Dolly's own names: context, response), or the chosen
    response of a preference row to its prompt."""
    if raw.get("messages") is not None:
        row = raw | {"messages": _messages(raw["messages"], "messages")}
    elif raw.get("chosen") is not None and raw.get("completion") is None:
        pair = preference_row(raw)
        row = _without(pair, "prompt", "chosen", "rejected", "rating", "margin", "safety") | {
            "messages": [*pair["prompt"], *pair["chosen"]]
        }
    elif raw.get("prompt") is not None:
        completion = required(raw, "completion")
        if isinstance(completion, str):
            reply = [{"role": "assistant", "content": completion}]
        else:
            reply = _messages(completion, "completion")
        row = _without(raw, "prompt", "completion") | {"messages": [*_prompt_messages(raw["prompt"]), *reply]}
    elif "instruction" in raw:
        answer = "output" if "output" in raw else "response"
        reply = [{"role": "assistant", "content": text(raw, answer)}]
        row = _without(raw, "instruction", "input", "context", answer) | {"messages": [_instruction(raw), *reply]}
    else:
        raise BadRow("missing or empty field", "a dialogue needs 'messages', 'prompt'/'completion' or 'instruction'")
    if raw.get("train_on") is not None:
        _choice(raw, "train_on", ("all", "last"), "wrong type")
    else:
        row.pop("train_on", None)
    return row


def prompt_row(raw: Row) -> Row:
    """`prompt`, `messages` that end with the user, instruction/input, or the prompt of a preference row."""
    if raw.get("prompt") is not None:
        prompt = _prompt_messages(raw["prompt"])
    elif raw.get("messages") is not None:
        prompt = _messages(raw["messages"], "messages")
    elif "instruction" in raw:
        prompt = [_instruction(raw)]
    elif raw.get("chosen") is not None:
        prompt = preference_row(raw)["prompt"]
    else:
        raise BadRow("missing or empty field", "there is no 'prompt'")
    is_safety = raw.get("is_safety", False)
    if not isinstance(is_safety, bool):
        raise BadRow("wrong type", f"'is_safety' must be true or false, not {is_safety!r}")
    return _without(raw, "messages", "chosen", "rejected") | {"prompt": prompt, "is_safety": is_safety}


def _instruction(raw: Row) -> Message:
    extra = raw.get("input") if raw.get("input") is not None else raw.get("context")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("wrong type", f"the instruction's input must be text, not {type(extra).__name__}")
    asked = text(raw, "instruction")
    return {"role": "user", "content": f"{asked}\n\n{extra}" if extra and extra.strip() else asked}


def _prompt_messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("missing or empty field", "'prompt' is empty")
        if not prompt.startswith("\n\nHuman:"):
            return [{"role": "user", "content": prompt}]
        turns = _transcript(prompt, "prompt")
        # Transcript prompts end with an open "Assistant:".
        return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns
    return _messages(prompt, "prompt")


def _transcript(transcript: str, name: str) -> list[Message]:
    """Turns of an HH-RLHF transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *parts = TRANSCRIPT_TURN.split(transcript)
    if not transcript.strip():
        raise BadRow("missing or empty field", f"'{name}' is empty")
    if before.strip() or not parts:
        raise BadRow("missing or empty field", f"there is no 'prompt', and '{name}' is not a transcript with turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _messages(value: Any, name: str) -> list[Message]:
    """The messages with role and content only. Order and text are checked on the whole dialogue later."""
    if not isinstance(value, list):
        raise BadRow("wrong type", f"'{name}' must be a list of messages, not {type(value).__name__}")
    if not value:
        raise BadRow("missing or empty field", f"'{name}' is empty")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow("wrong type", f"'{name}', message {index} must be an object, not {type(message).__name__}")
        for key in ("role", "content"):
            if message.get(key) is None:
                raise BadRow("missing or empty field", f"'{name}', message {index} has no '{key}'")
            if not isinstance(message[key], str):
                kind = type(message[key]).__name__
                raise BadRow("wrong type", f"'{name}', message {index}: '{key}' must be text, not {kind}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def required(raw: Row, name: str) -> Any:
    """The value of a field that must be there and not null."""
    if raw.get(name) is None:
        raise BadRow("missing or empty field", f"there is no '{name}'")
    return raw[name]


def text(raw: Row, name: str) -> str:
    """The non-blank text of a field."""
    value = required(raw, name)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"'{name}' must be text, not {type(value).__name__}")
    if not value.strip():
        raise BadRow("missing or empty field", f"'{name}' is empty")
    return value


def _choice(raw: Row, name: str, choices: Sequence[str], reason: str) -> str | None:
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRow("wrong type", f"'{name}' must be text, not {type(value).__name__}")
    if value not in choices:
        raise BadRow(reason, f"'{name}' is {value!r}, not one of {', '.join(choices)}")
    return value


def _margin(raw: Row) -> float | None:
    value = raw.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"'margin' must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise BadRow("wrong type", f"'margin' must be finite, not {value}")
    return float(value)


def _without(raw: Row, *names: str) -> Row:
    return {key: value for key, value in raw.items() if key not in names}
