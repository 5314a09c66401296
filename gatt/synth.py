"""Synthesises Ghost Attention dialogues: user turns are given, replies are sampled under the instruction (paper §3.3).

All open dialogues get one draft a step, so that an engine can batch over them and keep their prefixes; a dialogue whose
draft does not obey draws again while the others go on, up to `max_candidates` drafts a turn. Where none obeys, it ends
before that turn: what it has is kept, the reason is recorded. The instruction stands on every user turn while sampling;
the dialogues come out plain, and `training_record` puts it back into the first turn only. A plan may have another
instruction take the first one's place at a later turn.

Nothing here samples, logs or reads files: `reply` and `judge` are passed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from configs.errors import UserError
from gatt.kinds import Instruction
from gatt.transform import SPECIAL_TAGS, Message, training_record, with_instruction_everywhere

CUT_REASONS = ("disobeyed", "unfinished", "too_long")


@dataclass(frozen=True)
class Draft:
    """What an engine returns for one context: the text of a finished reply, or why there is none.

    `problem` is "" for a reply that ended by itself, "unfinished" for one cut at the token limit, "too_long" where the
    context has no room for a reply.
    """

    text: str
    problem: str = ""


class Reply(Protocol):
    """Samples one reply for each context.

    `rows[i]` is the index of the dialogue that `contexts[i]` continues, so that an engine can keep that dialogue's
    prefix; asked twice for the same turn of a row, it draws another reply. Contexts hold the instruction on every user
    turn.
    """

    def __call__(self, rows: list[int], contexts: list[list[Message]]) -> list[Draft]: ...


# (context, candidate replies, instruction) -> a score for each candidate; the highest is kept
Judge = Callable[[list[Message], list[str], Instruction | None], Sequence[float]]


@dataclass(frozen=True)
class Change:
    """Another instruction, in the place of the first from user turn `turn` (from 2) on. `wording`: as it is learnt."""

    turn: int
    instruction: Instruction
    wording: str


@dataclass(frozen=True)
class Plan:
    """One dialogue to make: user turns, instruction (None: a plain dialogue), the slot that carries it at turn 1."""

    user_turns: tuple[str, ...]
    instruction: Instruction | None
    slot: str
    change: Change | None = None

    def in_force(self, turn: int) -> Instruction | None:
        """The instruction that holds at `turn` (from 1)."""
        return self.change.instruction if self.change and turn >= self.change.turn else self.instruction


@dataclass
class Dialogue:
    """One dialogue made. `messages` is plain (no instruction) and ends with a reply, or is empty where turn 1 failed.

    Attributes:
        cut: "" where every turn was made, else one of `CUT_REASONS`.
        first_draft_obeyed: for each turn sampled, whether the first draft obeyed: obedience before any selection.
        drafts: replies sampled in all.
    """

    plan: Plan
    messages: list[Message] = field(default_factory=list)
    cut: str = ""
    first_draft_obeyed: list[bool] = field(default_factory=list)
    drafts: int = 0

    @property
    def turns(self) -> int:
        """Finished exchanges."""
        return len(self.messages) // 2

    @property
    def change(self) -> Change | None:
        """The plan's change of instruction, where the dialogue came as far."""
        change = self.plan.change
        return change if change and change.turn <= self.turns else None

    def record(self, wording: str) -> dict:
        """The training row, {"messages", "train_on"}; `wording`: the instruction as the model will learn it."""
        if self.plan.instruction is None:
            return {"messages": [dict(m) for m in self.messages], "train_on": "all"}
        new = (self.change.turn, self.change.wording) if self.change else None
        return training_record(self.messages, wording, self.plan.slot, [True] * self.turns, new)


def plan_dialogues(
    user_turns: Sequence[Sequence[str]], instructions: Sequence[Instruction | None], slots: Sequence[str]
) -> list[Plan]:
    """Joins the three lists and checks them.

    Raises:
        UserError: an empty list, lists of different lengths, a dialogue without turns, or an empty user turn.
    """
    if not user_turns:
        raise UserError("no user turns were given; Ghost Attention needs at least one dialogue")
    if not len(user_turns) == len(instructions) == len(slots):
        raise UserError(
            f"{len(user_turns)} dialogues, {len(instructions)} instructions and {len(slots)} slots; "
            "give one of each a dialogue"
        )
    for index, turns in enumerate(user_turns):
        if not turns:
            raise UserError(f"dialogue {index} has zero user turns; give at least one")
        if any(not turn.strip() for turn in turns):
            raise UserError(f"dialogue {index} has an empty user turn; remove it")
    return [Plan(tuple(turns), i, slot) for turns, i, slot in zip(user_turns, instructions, slots, strict=True)]


def synthesise(
    plans: Sequence[Plan],
    reply: Reply,
    obeys: Callable[[Instruction, str], bool],
    max_candidates: int = 1,
    judge: Judge | None = None,
) -> list[Dialogue]:
    """Makes one dialogue a plan, in the plans' order.

    Args:
        obeys: the checker. Only replies that pass are kept.
        max_candidates: drafts a turn at most. Without a judge the first that obeys is kept and no more are drawn.
        judge: scores the candidates that obey; then all `max_candidates` are drawn and the best is kept (ties: the
        earliest).

    Raises:
        UserError: `max_candidates` below 1, or a plan whose instruction or slot is invalid.
    """
    if max_candidates < 1:
        raise UserError(f"max_candidates is {max_candidates}; at least one reply a turn must be drawn")
    makers = [_Maker(Dialogue(plan)) for plan in plans]
    while rows := [i for i, maker in enumerate(makers) if maker.open]:
        drafts = reply(rows, [makers[i].context() for i in rows])
        for i, draft in zip(rows, drafts, strict=True):
            makers[i].take(draft, obeys, max_candidates, judge)
    return [maker.dialogue for maker in makers]


class _Maker:
    """One dialogue in the making: the drafts of its current turn."""

    def __init__(self, dialogue: Dialogue):
        self.dialogue = dialogue
        self.drafts: list[Draft] = []
        self.passed: list[str] = []

    @property
    def open(self) -> bool:
        return not self.dialogue.cut and self.dialogue.turns < len(self.dialogue.plan.user_turns)

    def user_turn(self) -> Message:
        return {"role": "user", "content": self.dialogue.plan.user_turns[self.dialogue.turns]}

    def context(self) -> list[Message]:
        """The sampling context of the current turn."""
        plan = self.dialogue.plan
        plain = [*self.dialogue.messages, self.user_turn()]
        if plan.instruction is None:
            return plain
        new = (plan.change.turn, plan.change.instruction.text) if plan.change else None
        return with_instruction_everywhere(plain, plan.instruction.text, plan.slot, new)

    def obeyed(self, text: str, obeys: Callable[[Instruction, str], bool]) -> bool:
        """Whether a reply obeys the instruction that holds, and no longer the one whose place that took."""
        plan, turn = self.dialogue.plan, self.dialogue.turns + 1
        now = plan.in_force(turn)
        if now is None or plan.instruction is None:
            return True
        return obeys(now, text) and (now is plan.instruction or not obeys(plan.instruction, text))

    def take(
        self, draft: Draft, obeys: Callable[[Instruction, str], bool], max_candidates: int, judge: Judge | None
    ) -> None:
        """One more draft of the current turn: draw again, keep one and go on, or end the dialogue here."""
        dialogue = self.dialogue
        if draft.problem == "too_long":  # nothing was sampled, and another draft would find no more room
            if not self.drafts:
                dialogue.cut = "too_long"
                return
        else:
            # A tag of the chat format inside a reply would make a row that no reader accepts.
            fine = not draft.problem and bool(draft.text.strip()) and not any(tag in draft.text for tag in SPECIAL_TAGS)
            fine = fine and self.obeyed(draft.text, obeys)
            if not self.drafts:
                dialogue.first_draft_obeyed.append(fine)
            dialogue.drafts += 1
            self.drafts.append(draft)
            if fine:
                self.passed.append(draft.text)
            if len(self.drafts) < max_candidates and (judge is not None or not fine):
                return
        if not self.passed:
            dialogue.cut = self.drafts[-1].problem or "disobeyed"
            return
        best = _best(self.context(), self.passed, dialogue.plan.in_force(dialogue.turns + 1), judge)
        dialogue.messages += [self.user_turn(), {"role": "assistant", "content": best}]
        self.drafts, self.passed = [], []


def _best(context: list[Message], candidates: list[str], instruction: Instruction | None, judge: Judge | None) -> str:
    if judge is None or len(candidates) == 1:
        return candidates[0]
    scores = list(judge(context, candidates, instruction))
    if len(scores) != len(candidates):
        raise ValueError(f"the judge gave {len(scores)} scores for {len(candidates)} candidates")
    return candidates[max(range(len(candidates)), key=lambda k: scores[k])]


def counts(dialogues: Sequence[Dialogue]) -> dict[str, int]:
    """How many dialogues were planned, finished, cut short (and why) or lost at turn 1; replies drawn and kept."""
    result = {
        "planned": len(dialogues),
        "finished": sum(not d.cut for d in dialogues),
        "empty": sum(not d.messages for d in dialogues),
        "replies_kept": sum(d.turns for d in dialogues),
        "replies_sampled": sum(d.drafts for d in dialogues),
        "turns_not_made": sum(len(d.plan.user_turns) - d.turns for d in dialogues),
    }
    return result | {f"cut_{reason}": sum(d.cut == reason for d in dialogues) for reason in CUT_REASONS}


def obedience_by_turn(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """{turn from "1": share of first drafts that obeyed}: the sampling model's own obedience, before any selection."""
    longest = max((len(d.first_draft_obeyed) for d in dialogues), default=0)
    shares = {}
    for turn in range(longest):
        marks = [d.first_draft_obeyed[turn] for d in dialogues if turn < len(d.first_draft_obeyed)]
        shares[str(turn + 1)] = sum(marks) / len(marks)
    return shares
