"""Plays the dialogues of a persistence measurement and judges their replies."""

from collections.abc import Callable, Sequence
from typing import Any

from configs.chat import ChatFormat
from configs.gatt_settings import PersistenceSettings
from configs.sampling_settings import SamplingSettings
from gatt.instructions import obeyed_parts, strip_obedience
from gatt.kinds import Instruction
from gatt.persistence import Observation
from gatt.synth import Draft
from gatt.transform import Message, NewInstruction, training_dialogue

Gold = Callable[[list[Message], str], float]  # (dialogue that ends with the user's message, reply) -> [0, 1]
Opening = Callable[[list[Message]], list[Message]]  # puts a dialogue's instruction into it
Played = list[list[str]]  # replies by dialogue, by turn; a dialogue that filled the context has fewer


def opening(wording: str, slot: str, new: NewInstruction | None = None) -> Opening:
    """The instruction in the first turn; `new`: another one in a later turn."""
    return lambda messages: training_dialogue(messages, wording, slot, new)


def no_instruction(messages: list[Message]) -> list[Message]:
    """A dialogue without an instruction."""
    return messages


def play(
    model: Any,
    chat_format: ChatFormat,
    pad_id: int,
    openings: Sequence[Opening],
    user_turns: Sequence[Sequence[str]],
    settings: PersistenceSettings,
    seed: int,
) -> Played:
    """Plays every dialogue to its end or to the context limit; `openings[d]` puts dialogue d's instruction into it."""
    from rlhf.dialogues import DialogueEngine

    sampling = SamplingSettings(
        temperature=settings.eval_temperature, top_p=settings.eval_top_p, max_new_tokens=settings.eval_max_new_tokens
    )
    engine = DialogueEngine(model, chat_format, pad_id, sampling, settings.max_length, seed)
    plain: list[list[Message]] = [[] for _ in user_turns]
    rows = list(range(len(user_turns)))
    turn = 0
    while rows := [d for d in rows if turn < len(user_turns[d])]:
        for d in rows:
            plain[d].append({"role": "user", "content": user_turns[d][turn]})
        drafts: list[Draft] = engine(rows, [openings[d](plain[d]) for d in rows])
        for d, draft in zip(list(rows), drafts, strict=True):
            if draft.problem == "too_long":
                plain[d].pop()
                rows.remove(d)
            else:  # a reply that was cut at its limit is a reply: the checks judge it as it stands
                plain[d].append({"role": "assistant", "content": draft.text})
        turn += 1
    return [[m["content"] for m in messages[1::2]] for messages in plain]


def as_messages(user_turns: Sequence[str], replies: Sequence[str]) -> list[Message]:
    """The exchanges of a played dialogue, without an instruction."""
    return [
        message
        for user, reply in zip(user_turns, replies, strict=False)
        for message in ({"role": "user", "content": user}, {"role": "assistant", "content": reply})
    ]


def observe(
    replies: Played,
    user_turns: Sequence[Sequence[str]],
    instructions: Sequence[Instruction],
    gold: Gold | None = None,
    targets: Sequence[Sequence[float]] = (),
) -> list[Observation]:
    """Judges every reply: the kind's checker, and with `gold` whether what is left of it reaches its target.

    `targets[d][t]`: the least gold score for dialogue d at turn t + 1; a turn without one is missing.
    """
    observations = []
    for d, (texts, instruction) in enumerate(zip(replies, instructions, strict=True)):
        for t, text in enumerate(texts if gold is None else texts[: len(targets[d])]):
            # The margin: 0.7 x 1.0 and a gold score of 0.7 must not differ by rounding.
            answers = gold is None or (
                gold(asked(user_turns[d][t]), strip_obedience(instruction, text)) >= targets[d][t] - 1e-9
            )
            parts = obeyed_parts(instruction, text)
            observations.append(Observation(
                d, t + 1, instruction.kind, all(parts.values()), answers, parts if instruction.parts else None
            ))  # fmt: skip
    return observations


def asked(user_text: str) -> list[Message]:
    """What an answer is judged by: its own user turn, without instruction and history (turns stand on their own)."""
    return [{"role": "user", "content": user_text}]
