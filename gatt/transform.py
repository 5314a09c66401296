"""The Ghost Attention transform: where the instruction stands, and which tokens carry loss (paper §3.3, App. A.3.5).

Two views of one dialogue [u1, a1, ..., un, an] under an instruction `inst`:

    sampling context    u1+inst, a1, u2+inst, a2, ..., un+inst    every reply is sampled with the instruction in sight
    training dialogue   u1+inst, a1, u2,      a2, ..., un, an     the instruction stays in the first turn only

The paper trains on `an` alone, because the earlier replies of its dialogues were not sampled under `inst`. Where every
reply was, the n prefixes of the dialogue are n such samples, and they share their prefixes:

    sum_k loss(a_k | u1+inst, a1, ..., uk)  =  loss of one row that counts every reply,

so one row does the work of n. Rows say which case they are: `train_on` is "all" then and "last" otherwise.

Beyond the paper, whose dialogues have one instruction: at user turn c another one, `new`, may take its place.

    sampling context    u1+inst, a1, ..., uc+new, ac, u(c+1)+new, a(c+1), ...
    training dialogue   u1+inst, a1, ..., uc+new, ac, u(c+1),     a(c+1), ...

Each reply is sampled under the instruction that holds at its own turn, so the same equation says which may carry loss.

Pure functions of lists; a message is {"role", "content"}, a mask holds True where the token counts.
"""

from collections.abc import Callable, Sequence

from configs.errors import UserError

Message = dict[str, str]
NewInstruction = tuple[int, str]  # (user turn c, from 2, at which it takes the first one's place; its wording)
SLOTS = ("system", "user")
TRAIN_ON = ("all", "last")
SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def check_instruction(instruction: str) -> None:
    """Raises UserError where the instruction is empty or holds a tag of the chat format."""
    if not instruction.strip():
        raise UserError("the instruction is empty; give a sentence such as 'Always act as Napoleon.'")
    for tag in SPECIAL_TAGS:
        if tag in instruction:
            raise UserError(f"the instruction {instruction!r} holds the special tag {tag}; remove it")


def _turns(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Splits into the leading system message (zero or one) and the rest, which must begin with the user."""
    system = [dict(m) for m in messages[:1] if m["role"] == "system"]
    rest = [dict(m) for m in messages[len(system) :]]
    if not rest:
        raise UserError("the dialogue has no user turn; Ghost Attention needs at least one")
    for index, message in enumerate(rest):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise UserError(
                f"message {index + len(system)} of the dialogue has role '{message['role']}', expected '{expected}'"
            )
    return system, rest


def _place(
    messages: Sequence[Message], instruction: str, slot: str, every_turn: bool, new: NewInstruction | None
) -> list[Message]:
    check_instruction(instruction)
    if slot not in SLOTS:
        raise UserError(f"unknown instruction slot '{slot}'; use one of: {', '.join(SLOTS)}")
    change_turn, new_wording = new or (0, "")
    if new is not None:
        check_instruction(new_wording)
        if change_turn < 2:
            raise UserError(f"the instruction cannot change at turn {change_turn}; it can from turn 2 on")
    system, rest = _turns(messages)
    if slot == "system":
        # A system message of the dialogue's own stays in front; the instruction follows it.
        text = " ".join([*(m["content"] for m in system), instruction])
        system = [{"role": "system", "content": text}]
    for turn, message in enumerate(rest[::2], 1):
        in_force = new_wording if new is not None and turn >= change_turn else instruction
        if turn == change_turn or (slot == "user" if turn == 1 else every_turn):
            message["content"] = f"{in_force} {message['content']}"
    return system + rest


def with_instruction_everywhere(
    messages: Sequence[Message], instruction: str, slot: str, new: NewInstruction | None = None
) -> list[Message]:
    """The sampling context: `instruction` concatenated to every user message (steps 2 and 3 of §3.3).

    Args:
        messages: (system?), user, assistant, ..., in order; may end with either role. Not changed.
        instruction: the wording to add.
        slot: where turn 1 carries it: "system" (the system message) or "user" (in front of the user's text). Later
            turns have no system slot and always carry it in front of the user's text.
        new: another instruction that every user message from its turn on carries instead; a dialogue that has not
            come to that turn is as without it.

    Raises:
        UserError: an empty instruction, one with a special tag, an unknown slot, no user turn, a wrong role order, or
            a change before turn 2.
    """
    return _place(messages, instruction, slot, every_turn=True, new=new)


def training_dialogue(
    messages: Sequence[Message], instruction: str, slot: str, new: NewInstruction | None = None
) -> list[Message]:
    """The training sample: `instruction` in the first user turn (or the system slot) only (step 4 of §3.3).

    `new` likewise stands in front of the user's text at its own turn only.

    Arguments and errors as `with_instruction_everywhere`; `messages` is the plain dialogue without the instruction.
    """
    return _place(messages, instruction, slot, every_turn=False, new=new)


def last_reply_mask(response_mask_T: Sequence[bool]) -> list[bool]:
    """Keeps the loss on the last reply; every earlier token, assistant turns included, gets none (step 5 of §3.3).

    Args:
        response_mask_T: True on the tokens of every assistant reply, the end-of-sequence token included.

    Returns:
        a mask of the same length, True on the last run of True.

    Raises:
        ValueError: no token belongs to a reply.
    """
    if not any(response_mask_T):
        raise ValueError("no token of the dialogue belongs to a reply")
    end = len(response_mask_T)
    while not response_mask_T[end - 1]:
        end -= 1
    begin = end
    while begin > 0 and response_mask_T[begin - 1]:
        begin -= 1
    return [begin <= t < end for t in range(len(response_mask_T))]


def loss_mask(response_mask_T: Sequence[bool], train_on: str) -> list[bool]:
    """The tokens that carry loss in a row marked `train_on`: every reply ("all") or the last one ("last")."""
    if train_on not in TRAIN_ON:
        raise UserError(f"unknown train_on '{train_on}'; use one of: {', '.join(TRAIN_ON)}")
    return list(response_mask_T) if train_on == "all" else last_reply_mask(response_mask_T)


def last_turn_samples(messages: Sequence[Message]) -> list[list[Message]]:
    """The n samples that one row with `train_on` "all" stands for: the dialogue cut behind each of its n replies."""
    return [
        [dict(m) for m in messages[: i + 1]] for i, message in enumerate(messages) if message["role"] == "assistant"
    ]


def training_record(
    messages: Sequence[Message],
    instruction: str,
    slot: str,
    sampled_under_instruction: Sequence[bool],
    new: NewInstruction | None = None,
) -> dict:
    """One conversational row, {"messages", "train_on"}.

    Args:
        messages: the plain dialogue; it ends with a reply.
        sampled_under_instruction: for each reply, whether it was sampled with the instruction in sight of its own turn
            (from the turn of `new` on: with that one).
        new: another instruction from a later turn on, see `with_instruction_everywhere`.

    Returns:
        `train_on` is "all" where every reply was sampled so (the shared-prefix row of the module's docstring), else
        "last".

    Raises:
        UserError: additionally, where the last reply was not sampled under the instruction: it would teach forgetting.
    """
    replies = sum(m["role"] == "assistant" for m in messages)
    if replies == 0 or messages[-1]["role"] != "assistant":
        raise UserError("a training dialogue must end with an assistant reply")
    if len(sampled_under_instruction) != replies:
        raise UserError(f"{len(sampled_under_instruction)} marks for {replies} replies; give one a reply")
    if not sampled_under_instruction[-1]:
        raise UserError("the last reply was not sampled under the instruction; training on it would teach to forget it")
    train_on = "all" if all(sampled_under_instruction) else "last"
    return {"messages": training_dialogue(messages, instruction, slot, new), "train_on": train_on}


def shorten(
    messages: Sequence[Message],
    train_on: str,
    count_tokens: Callable[[list[Message]], int],
    max_tokens: int,
    change_turn: int | None = None,
) -> list[Message]:
    """Shortens a training dialogue to `max_tokens` by whole exchanges; the first turn, with the instruction, stays.

    A row "all" loses exchanges at its end (each reply left keeps the exact prefix it was sampled after). A row "last"
    loses its oldest exchanges behind the first one, since the last reply is what it trains; the exchange of
    `change_turn`, which holds the instruction of that reply, stays as well.

    Args:
        messages: a training dialogue that ends with a reply.
        count_tokens: tokens of a dialogue in the chat format.
        change_turn: the user turn, from 2, at which another instruction stands; None for a dialogue with one.

    Raises:
        UserError: not even the smallest such dialogue fits.
    """
    if train_on not in TRAIN_ON:
        raise UserError(f"unknown train_on '{train_on}'; use one of: {', '.join(TRAIN_ON)}")
    system, rest = _turns(messages)
    kept = list(range(1, len(rest) // 2 + 1))  # turns
    may_go = kept[:0:-1] if train_on == "all" else [turn for turn in kept[1:-1] if turn != change_turn]
    while True:
        dialogue = system + [message for turn in kept for message in rest[2 * turn - 2 : 2 * turn]]
        size = count_tokens(dialogue)
        if size <= max_tokens:
            return dialogue
        if not may_go:
            raise UserError(
                f"the shortest training dialogue that keeps the instruction has {size} tokens, more than the "
                f"{max_tokens} allowed; raise max_length or use shorter prompts"
            )
        kept.remove(may_go.pop(0))


def change_turn_after_shortening(change_turn: int, before: int, after: int, train_on: str) -> int | None:
    """Where the new instruction stands once `shorten` left `after` of `before` turns; None where its turn is gone."""
    if train_on == "all":
        return change_turn if change_turn <= after else None
    return change_turn - min(before - after, change_turn - 2)  # the oldest turns between the first and it went first
