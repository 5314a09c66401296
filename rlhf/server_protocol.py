"""[pure] What is asked of an OpenAI-compatible server, and what its answers mean (rlhf/server_engine.py sends).

Dialects, from the one that says most down:

- `completions`: token ids as the prompt; vLLM's names for what OpenAI lacks (top_k, min_p, stop_token_ids, ...), which
  SGLang shares. Token ids and log-probs come back where the server gives them.
- `chat`: the messages, rendered by the server's chat template; the same names.
- `transformers`: the messages and a whole generation config, the way `transformers serve` takes such settings.
- `openai`: the messages and OpenAI's own fields; settings that it has no field for are refused.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.continuous_batching import drawing
from rlhf.samples import Prompt

DIALECTS = {
    "auto": ("completions", "chat", "transformers", "openai"),
    "completions": ("completions",),
    "chat": ("chat", "transformers", "openai"),
}
SEED_RANGE = 1 << 31  # what every server takes; numpy, which transformers seeds too, allows no more than 32 bits


class Garbage(Exception):
    """An answer that is no set of samples; the message says what is wrong with it."""


@dataclass(frozen=True)
class Choice:
    """One response of a server. `ids` None: it gave text only; `logprobs` None: it gave none."""

    text: str
    reason: str  # "stop" | "length"
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    stopped_by: str | int | None = None  # the stop string or id that ended it, where the server names it


def check_dialect(dialect: str, settings: SamplingSettings) -> None:
    """UserError for a setting that the server has no field for."""
    if dialect == "openai":
        for name in ("top_k", "min_p", "stop_token_ids", "stop_strings"):
            if getattr(settings, name):
                raise UserError(f"{name}: the server knows OpenAI's own fields only, not this one; leave it out")


def request(
    dialect: str,
    model: str,
    prompt: Prompt,
    n: int,
    settings: SamplingSettings,
    stop_ids: list[int],
    pad_id: int,
    seed: int | None,
) -> tuple[str, dict[str, Any]]:
    """Path and JSON body of a request for n responses.

    Every setting of the draw is sent, neutral ones too: servers take what is left out from the model's
    generation_config.json, which would change the distribution without a word.
    """
    body: dict[str, Any] = {"model": model}
    if n > 1:
        body["n"] = n
    if seed is not None:
        body["seed"] = seed % SEED_RANGE
    if dialect == "transformers":
        config = drawing(settings) | {"max_new_tokens": settings.max_new_tokens, "eos_token_id": stop_ids}
        config |= {"pad_token_id": pad_id, "stop_strings": settings.stop_strings or None}
        return "/chat/completions", body | {"messages": prompt.messages, "generation_config": json.dumps(config)}
    body |= {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}
    if settings.stop_strings:
        body["stop"] = settings.stop_strings
    if dialect in ("completions", "chat"):
        body |= {"top_k": settings.top_k or -1, "min_p": settings.min_p, "repetition_penalty": 1.0}
        body |= {"stop_token_ids": stop_ids, "return_token_ids": True, "return_tokens_as_token_ids": True}
    if dialect == "completions":
        return "/completions", body | {"prompt": prompt.ids, "logprobs": 1}
    if dialect == "chat":
        body["logprobs"] = True
    return "/chat/completions", body | {"messages": prompt.messages}


def read_choices(answer: Any, vocabulary: int, max_new_tokens: int) -> list[Choice]:
    """The responses in an answer of either path. Raises Garbage for anything that is not n samples."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise Garbage("the answer has no choices")
    read = [_read_choice(choice) for choice in choices]
    for choice in read:
        if choice.ids is not None:
            if not choice.ids or len(choice.ids) > max_new_tokens:
                raise Garbage(f"{len(choice.ids)} token ids where 1 to {max_new_tokens} were asked for")
            if min(choice.ids) < 0 or max(choice.ids) >= vocabulary:
                raise Garbage(f"token ids outside of the policy's {vocabulary} tokens: another model is served")
            if choice.logprobs is not None and len(choice.logprobs) != len(choice.ids):
                raise Garbage(f"{len(choice.logprobs)} log-probs for {len(choice.ids)} tokens")
        elif not choice.text and choice.reason == "length":
            raise Garbage("an empty text that was cut by its length")
    return read


def _read_choice(choice: Any) -> Choice:
    if not isinstance(choice, dict):
        raise Garbage("a choice is not an object")
    message = choice.get("message")
    if isinstance(message, dict):
        if any(message.get(name) for name in ("tool_calls", "reasoning_content", "reasoning")):
            raise Garbage("the server took tool calls or reasoning out of the text; start it without such parsers")
        text = message.get("content")
    else:
        text = choice.get("text")
    reason = choice.get("finish_reason")
    if not isinstance(text, str):
        raise Garbage("a choice has no text")
    if reason not in ("stop", "length"):
        raise Garbage(f"finish_reason {str(reason)[:40]!r} is neither stop nor length")
    names, logprobs = _logprobs(choice.get("logprobs"))
    ids = choice.get("token_ids")
    if ids is None and names and all(re.fullmatch(r"token_id:\d+", name) for name in names):
        ids = [int(name.removeprefix("token_id:")) for name in names]
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise Garbage("token_ids are not integers")
    stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
    return Choice(text, reason, ids, logprobs, stopped_by if isinstance(stopped_by, str | int) else None)


def _logprobs(given: Any) -> tuple[list[str], list[float] | None]:
    """Token names and log-probs of completions ({tokens, token_logprobs}) or of chat ({content: [...]})."""
    if not isinstance(given, dict):
        return [], None
    if isinstance(given.get("content"), list):
        rows = [row if isinstance(row, dict) else {} for row in given["content"]]
        names: Any = [row.get("token") for row in rows]
        values: Any = [row.get("logprob") for row in rows]
    else:
        names, values = given.get("tokens"), given.get("token_logprobs")
    if not isinstance(values, list) or not isinstance(names, list):
        return [], None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise Garbage("a log-prob is not a finite number")
    return [str(name) for name in names], [float(value) for value in values]


def encode_choice(choice: Choice, tokenizer: Any, stop_ids: list[int], stop_strings: list[str]) -> list[int]:
    """Ids of a response: the server's own, or its text encoded, with what ended it.

    A stop id that the server does not name is taken to be the last of `stop_ids`, which ends a turn in the format.
    """
    if choice.ids is not None:
        end = choice.stopped_by
        if isinstance(end, int) and end in stop_ids and choice.ids[-1] != end:  # trimmed, but named
            return [*choice.ids, end]
        return choice.ids
    text, by_string = choice.text, any(choice.text.endswith(end) for end in stop_strings)
    if choice.reason == "stop" and choice.stopped_by in stop_strings and not by_string:
        text, by_string = text + str(choice.stopped_by), True
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if choice.reason == "stop" and not by_string:
        ids.append(choice.stopped_by if choice.stopped_by in stop_ids else stop_ids[-1])
    return ids
