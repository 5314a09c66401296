"""Instructions that a Ghost Attention dialogue must keep: drawn, checked, taken off and recognised again.

An instruction is one constraint or, as in the paper (App. A.3.5), a random combination of constraints of different
kinds, their wordings one behind the other: "Always act as Napoleon. You enjoy chess." A response obeys a combination
where it obeys every part. Kinds and their values: `gatt.kinds`.
"""

import random
import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from configs.errors import UserError
from gatt.kinds import DEFAULT_KINDS, KINDS, Instruction, Kind, go_together, kind_named, largest_combination, values_of

# The words of a value. A full stop ends it, but not behind an initial or a title: "John F. Kennedy", "Dr. Seuss".
_VALUE = r"((?:\b(?:[A-Z]|Dr|Mr|Mrs|Ms|St|Jr|Sr)\.\s?|[^.!?\n])+?)"


def combine(parts: Sequence[Instruction]) -> Instruction:
    """One instruction of several constraints, worded in the order given.

    Raises UserError for no part at all, and for kinds that contradict each other.
    """
    if not parts:
        raise UserError("an instruction needs at least one constraint")
    for a, b in combinations(parts, 2):
        if not go_together(a.kind, b.kind):
            raise UserError(f"'{a.text}' and '{b.text}' contradict each other; no response can be asked to obey both")
    if len(parts) == 1:
        return parts[0]
    by_name = sorted(parts, key=lambda part: list(KINDS).index(part.kind))
    return Instruction(
        "+".join(part.kind for part in by_name),
        " + ".join(part.value for part in by_name if part.value),
        " ".join(part.text for part in parts),
        " ".join(part.short_text for part in parts),
        tuple(parts),
    )


def obeyed_parts(instruction: Instruction, response: str) -> dict[str, bool]:
    """{kind: whether `response` obeys it} for every constraint of the instruction."""
    return {part.kind: kind_named(part.kind).obeys(part, response) for part in instruction.constraints}


def obeys(instruction: Instruction, response: str) -> bool:
    """True where `response` obeys every constraint of `instruction`, by the checkers of their kinds."""
    return all(obeyed_parts(instruction, response).values())


def strip_obedience(instruction: Instruction, response: str) -> str:
    """`response` without the parts that only obey the instruction."""
    # The last kinds of the table first: a word at an end must go before the sentences that mention something do.
    for part in sorted(instruction.constraints, key=lambda part: list(KINDS).index(part.kind), reverse=True):
        response = kind_named(part.kind).strip(part.value, response)
    return response


def check_kinds(kinds: Sequence[str], max_constraints: int = 1) -> None:
    """Raises UserError where instructions of these kinds cannot be drawn or checked.

    No kind, an unknown one, one whose checker lacks a package, or fewer kinds that can stand together than
    `max_constraints` asks for.
    """
    if not kinds:
        raise UserError("kinds: the list is empty; name at least one of: " + ", ".join(KINDS))
    for name in kinds:
        kind_named(name).ready()
    if max_constraints > 1 and max_constraints > (most := largest_combination(kinds)):
        raise UserError(
            f"max_constraints: {max_constraints}, but of the kinds {', '.join(kinds)} at most {most} can stand in one "
            "instruction (the others repeat or contradict each other); lower it or name other kinds"
        )


def draw_combinations(
    rng: random.Random, first: Sequence[str], pools: Mapping[str, Sequence[str]], max_constraints: int = 1
) -> list[Instruction]:
    """One instruction for each kind in `first`, of one constraint or of 1 to `max_constraints` (uniformly).

    Args:
        first: the kind that each instruction has for certain.
        pools: the kinds to combine with, and their values; kinds that take none need no value.

    A combination that nothing more goes with stays smaller.
    """

    def make(kind: Kind) -> Instruction:
        return kind.make(rng.choice(pools[kind.name]) if kind.takes_value else "")

    drawn = []
    for name in first:
        parts = [make(kind_named(name))]
        wanted = rng.randint(1, max_constraints) if max_constraints > 1 else 1  # alone, nothing else is drawn from rng
        while len(parts) < wanted:
            free = [other for other in pools if all(go_together(other, part.kind) for part in parts)]
            if not free:
                break
            parts.append(make(kind_named(rng.choice(free))))
        drawn.append(combine(parts))
    return drawn


def sample_instructions(
    rng: random.Random,
    n: int,
    split: str = "train",
    kinds: Sequence[str] = DEFAULT_KINDS,
    max_constraints: int = 1,
) -> list[Instruction]:
    """Draws `n` instructions from the starter lists, kinds in equal shares and values uniformly.

    In split "unseen" kinds that take no value are left out: nothing of them can be held out.
    Raises UserError as `check_kinds` does, and where no kind is left.
    """
    check_kinds(kinds, max_constraints)
    names = drawable(kinds, split)
    rng.shuffle(names)  # else a single draw would always be of the first kind
    pools = {name: values_of(name, split) for name in names}
    first = [names[i % len(names)] for i in range(n)]
    rng.shuffle(first)
    return draw_combinations(rng, first, pools, max_constraints)


def drawable(kinds: Sequence[str], split: str) -> list[str]:
    """The kinds that `split` can be drawn from; raises UserError where there is none."""
    names = [name for name in kinds if split == "train" or kind_named(name).takes_value]
    if not names:
        raise UserError(
            f"kinds: {', '.join(kinds)} take no value, so none can be held out as unseen; set measure_unseen: false or "
            "name a kind that takes one"
        )
    return names


def _patterns() -> list[tuple[Kind, re.Pattern[str]]]:
    patterns = []
    for kind in KINDS.values():
        for wording in (kind.full, kind.short):
            before, *after = (re.escape(part) for part in wording.split("{value}"))
            patterns.append((kind, re.compile(before + (_VALUE + after[0] if after else "") + r"(?:\s+|$)")))
    return patterns


_PATTERNS = _patterns()


def _parse_constraint(text: str) -> tuple[Instruction, str] | None:
    for kind, pattern in _PATTERNS:
        if match := pattern.match(text):
            value = match.group(1) if kind.takes_value else ""
            if not kind.fault(value):
                return kind.make(value), text[match.end() :]
    return None


def parse_instruction(text: str) -> tuple[Instruction, str] | None:
    """Recognises an instruction in front of `text`, in either wording; constraints that follow are part of it.

    Returns the instruction and the text behind it, or None where `text` does not begin with one. What would contradict
    the constraints before it is left in the text.
    """
    parts: list[Instruction] = []
    while found := _parse_constraint(text):
        if not all(go_together(found[0].kind, part.kind) for part in parts):
            break
        parts.append(found[0])
        text = found[1]
    return (combine(parts), text) if parts else None
