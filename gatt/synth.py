"""Synthesises Ghost Attention dialogues: user turns are given, replies are sampled under the instruction (paper §3.3).

All open dialogues get one draft a step, so that an engine can batch over them and keep their prefixes; a dialogue whose
draft does not obey draws again while the others go on, up to `max_candidates` drafts a turn. Where none obeys, it ends
before that turn: what it has is kept, the reason is recorded. The instruction stands on every user turn while sampling;
the dialogues come out plain, and `training_record` puts it back into the first turn only. A plan may have another
instruction take the first one's place at a later turn.

What a reply is sampled under is the dialogue so far, or its own turn alone: user turns that do not build on each other,
as those drawn from single prompts, need nothing before them to be answered, and a policy that has seen few long
dialogues answers a turn better as a first one. The training row is the same dialogue either way: to answer its n-th
turn as if the instruction had just been given is what Ghost Attention teaches.

Nothing here samples, logs or reads files: `reply` and `judge` are passed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from configs.errors import UserError
from gatt.kinds import Instruction
from gatt.transform import SPECIAL_TAGS, Message, training_record, with_instruction_everywhere

CUT_REASONS = ("disobeyed", "unfinished", "too_long", "failed")
NOTHING_SAMPLED = ("too_long", "failed")
CONTEXTS = ("dialogue", "turn")


@dataclass(frozen=True)
class Draft:
    """What an engine returns for one context: the text of a finished reply, or why there is none.

    `problem` is "" for a reply that ended by itself, "unfinished" for one cut at the token limit, "too_long" where the
    context has no room for a reply, "failed" where the engine gave none.
    """

    text: str
    problem: str = ""


class Reply(Protocol):
    """Samples one reply for each context.

    `rows[i]` is the index of the dialogue that `contexts[i]` continues, so that an engine can keep that dialogue's
    prefix; asked twice for the same turn of a row, it draws another reply. Contexts hold the instruction on every user
    turn; they are whole dialogues or single turns, see `synthesise`.
    """

    def __call__(self, rows: list[int], contexts: list[list[Message]]) -> list[Draft]: ...


class Judge(Protocol):
    """Scores the candidate replies of many dialogues at once; the highest of each is kept.

    `rows[i]` is the index of the dialogue that `contexts[i]` continues, as for `Reply`: a judge can keep what it has
    read of it. `candidates[i]` are one or more replies, `instructions[i]` is the instruction that holds. One score for
    each candidate.
    """

    def __call__(
        self,
        rows: list[int],
        contexts: list[list[Message]],
        candidates: list[list[str]],
        instructions: list[Instruction | None],
    ) -> Sequence[Sequence[float]]: ...


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
    context: str = "dialogue",
) -> list[Dialogue]:
    """Makes one dialogue a plan, in the plans' order.

    Args:
        obeys: the checker. Only replies that pass are kept.
        max_candidates: drafts a turn at most. Without a judge the first that obeys is kept and no more are drawn.
        judge: scores the candidates that obey; then all `max_candidates` are drawn and the best is kept (ties: the
        earliest).
        context: what `reply` and `judge` are given: "dialogue", all turns so far, or "turn", the user turn alone, in
            each turn with the instruction in the plan's slot.

    Raises:
        UserError: `max_candidates` below 1, another `context`, or a plan whose instruction or slot is invalid.
    """
    if context not in CONTEXTS:
        raise UserError(f"unknown context '{context}'; use one of: {', '.join(CONTEXTS)}")
    if max_candidates < 1:
        raise UserError(f"max_candidates is {max_candidates}; at least one reply a turn must be drawn")
    makers = [_Maker(Dialogue(plan), whole=context == "dialogue") for plan in plans]
    while rows := [i for i, maker in enumerate(makers) if maker.open]:
        drafts = reply(rows, [makers[i].context() for i in rows])
        for i, draft in zip(rows, drafts, strict=True):
            makers[i].take(draft, obeys)
        drawn = [i for i in rows if makers[i].drawn(max_candidates, judge is not None)]
        choices = [i for i in drawn if makers[i].passed]
        for i in drawn:
            if not makers[i].passed:
                makers[i].cut()
        for i, place in zip(choices, _best([makers[i] for i in choices], choices, judge), strict=True):
            makers[i].keep(place)
    return [maker.dialogue for maker in makers]


class _Maker:
    """One dialogue in the making: the drafts of its current turn."""

    def __init__(self, dialogue: Dialogue, whole: bool):
        self.dialogue, self.whole = dialogue, whole
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
        plain = [*self.dialogue.messages, self.user_turn()] if self.whole else [self.user_turn()]
        if plan.instruction is None:
            return plain
        if not self.whole:
            in_force = plan.in_force(self.dialogue.turns + 1)
            assert in_force is not None
            return with_instruction_everywhere(plain, in_force.text, plan.slot)
        new = (plan.change.turn, plan.change.instruction.text) if plan.change else None
        return with_instruction_everywhere(plain, plan.instruction.text, plan.slot, new)

    def obeyed(self, text: str, obeys: Callable[[Instruction, str], bool]) -> bool:
        """Whether a reply obeys the instruction that holds, and no longer the one whose place that took."""
        plan, turn = self.dialogue.plan, self.dialogue.turns + 1
        now = plan.in_force(turn)
        if now is None or plan.instruction is None:
            return True
        return obeys(now, text) and (now is plan.instruction or not obeys(plan.instruction, text))

    def take(self, draft: Draft, obeys: Callable[[Instruction, str], bool]) -> None:
        """One more draft of the current turn."""
        self.drafts.append(draft)
        if draft.problem in NOTHING_SAMPLED:
            return
        # A tag of the chat format inside a reply would make a row that no reader accepts.
        fine = not draft.problem and bool(draft.text.strip()) and not any(tag in draft.text for tag in SPECIAL_TAGS)
        fine = fine and self.obeyed(draft.text, obeys)
        if len(self.sampled()) == 1:
            self.dialogue.first_draft_obeyed.append(fine)
        self.dialogue.drafts += 1
        if fine:
            self.passed.append(draft.text)

    def sampled(self) -> list[Draft]:
        return [draft for draft in self.drafts if draft.problem not in NOTHING_SAMPLED]

    def drawn(self, max_candidates: int, judged: bool) -> bool:
        """Whether the turn needs no other draft: with a judge all are drawn, without one until one obeys."""
        if self.drafts[-1].problem == "too_long":  # another would find no more room
            return True
        return len(self.drafts) >= max_candidates or (bool(self.passed) and not judged)

    def cut(self) -> None:
        """No draft of the current turn can be kept: the dialogue ends before it."""
        # Where room ran out, or the engine failed, after other drafts, what was wrong with them says more.
        sampled = self.sampled()
        self.dialogue.cut = (sampled[-1].problem or "disobeyed") if sampled else self.drafts[-1].problem

    def keep(self, place: int) -> None:
        """The candidate `passed[place]` becomes the reply of the current turn."""
        self.dialogue.messages += [self.user_turn(), {"role": "assistant", "content": self.passed[place]}]
        self.drafts, self.passed = [], []


def _best(makers: list[_Maker], rows: list[int], judge: Judge | None) -> list[int]:
    """For each maker the place of the candidate to keep: the best one, the earliest among equals."""
    if judge is None or not makers:
        return [0] * len(makers)
    candidates = [maker.passed for maker in makers]
    scores = judge(
        rows,
        [maker.context() for maker in makers],
        candidates,
        [maker.dialogue.plan.in_force(maker.dialogue.turns + 1) for maker in makers],
    )
    if [len(each) for each in scores] != [len(each) for each in candidates]:
        raise ValueError(f"the judge gave {[len(s) for s in scores]} scores for {[len(c) for c in candidates]} replies")
    return [max(range(len(each)), key=each.__getitem__) for each in scores]


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
