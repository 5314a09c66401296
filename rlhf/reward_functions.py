"""Rewards of the user's own: functions from prompts and responses, as text and as token ids, to scores.

They are named in the settings (`reward_functions: [package.module:function]`) and called with keywords in the style of
TRL's GRPO reward functions, so that those run here as they are. A function that takes `**kwargs` may name only what it
uses:

    def brevity(completions, **kwargs):
        return [-len(completion[0]["content"]) / 100 for completion in completions]

Modules are found as in `python -m`: from the folder in which the command is started, after everything installed. Names
are taken from settings only, never from data.
"""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from configs.chat import ChatFormat, Message
from configs.errors import UserError
from rlhf.samples import Prompt

TRIAL = ("Yes.", "No.")  # responses to a prompt of the user's; two, so that one score for a whole batch is noticed


class RewardFunction(Protocol):
    """What a function is called with, and gives. Lists have one entry a response; a prompt is repeated for each of its
    responses, and one call has the responses of one scoring batch of one process, so a score may depend on its own
    entry only.

    prompts: the messages of the dialogue, {"role", "content"}, up to the last user turn.
    completions: the response as a list of one assistant message (as TRL passes conversational completions).
    prompt_ids, completion_ids: the very ids sampled from and sampled; the stop id, if any, is the last one.
    is_safety: the tag of the prompt record.

    Returns one finite number a response, or None where the function does not apply: it then adds nothing.
    """

    def __call__(
        self,
        *,
        prompts: list[list[Message]],
        completions: list[list[Message]],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        is_safety: list[bool],
    ) -> Sequence[float | None]: ...


def load_function(field: str, module_name: str, attribute: str) -> RewardFunction:
    """The callable `attribute` of a module, imported from the current folder too. UserError, naming `field`, where that
    cannot be done."""
    place = f"{field}: {module_name}:{attribute}"
    if os.getcwd() not in sys.path:  # launched by path, Python looks in the script's folder; last, to shadow nothing
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{place}: there is no module {error.name}. Modules are found from the current folder, {os.getcwd()}; "
                "start the command where the package lies, or install it"
            ) from error
        raise UserError(f"{place} cannot be imported: {_described(error)}") from error
    except Exception as error:
        raise UserError(f"{place} cannot be imported: {_described(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            where = f"module {module_name}" if isinstance(found, ModuleType) else f"{found!r}"
            raise UserError(f"{place}: {where} has no {part}; check the name after the colon")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{place} is a {type(found).__name__}, which cannot be called; name a function")
    return found


def call_function(
    function: RewardFunction,
    place: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
    texts: list[str],
) -> list[float]:
    """One score a response, nan for None; `prompts` has an entry for each response. Without any nothing is called.
    UserError, naming `place`, where the function fails or gives anything else than one finite number or None each."""
    if not texts:
        return []
    try:
        scores: Any = function(
            prompts=[[dict(message) for message in prompt.messages] for prompt in prompts],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            prompt_ids=[list(prompt.ids) for prompt in prompts],
            completion_ids=[list(ids) for ids in responses],
            is_safety=[prompt.is_safety for prompt in prompts],
        )
    except Exception as error:
        raise UserError(f"{place} failed: {_described(error)}") from error
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} gave a {type(scores).__name__}; return a list of one number a response") from error
    if len(values) != len(texts):
        raise UserError(f"{place} gave {len(values)} scores for {len(texts)} responses; return one each")
    for i, (score, value) in enumerate(zip(scores, values, strict=True)):
        if score is not None and not math.isfinite(value):
            raise UserError(
                f"{place} gave {value} for response {i}; return finite numbers, or None where it does not apply"
            )
    return values


def try_out(functions: Mapping[str, tuple[RewardFunction, str]], prompt: Prompt, chat_format: ChatFormat) -> None:
    """Call each function, given with its place in the settings, on one prompt with two responses. UserError as in
    `call_function`: found before any training rather than in the middle of it."""
    dialogues = [
        chat_format.encode_dialogue([*prompt.messages, {"role": "assistant", "content": text}]) for text in TRIAL
    ]
    responses = [dialogue.input_ids[len(prompt.ids) :] for dialogue in dialogues]
    for function, place in functions.values():
        call_function(function, place, [prompt] * len(TRIAL), responses, list(TRIAL))


def _described(error: BaseException) -> str:
    """Type and message, and the line that it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
