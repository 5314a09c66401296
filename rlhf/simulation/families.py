"""Families of helpful requests with checkable answers.

A family turns `slots` (a tuple of words) into questions and into the sentences of a good answer, and reads a question
back into slots. An answer has a *core* (one or more sentences, all of them needed, in order) and a *detail* (one
further true sentence that a person likes to get). `Family.core` and `Family.detail` list every accepted wording; the
first one is what demonstrations use.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlhf.simulation import vocabulary as v

Slots = tuple[str, ...]
HELD_OUT_SHARE = 6  # one slot tuple in six is kept for evaluation


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Family:
    """One family of requests.

    Attributes:
        name: what reports call it.
        draw: (generator) -> slots.
        questions: slots -> the wordings of the request.
        patterns: regular expressions with one group a slot, one for each wording, in the order of `questions`.
        core: slots -> accepted answers, each a list of sentences.
        detail: slots -> accepted further sentences.
        wrong: (slots, generator) -> a false core in the wording of a true one.
        followup: wording of a follow-up with `{x}` for slot 0, or None.
        held_out: True where no training stage ever asks it (the base corpus explains it).
    """

    name: str
    draw: Callable[[random.Random], Slots]
    questions: Callable[[Slots], list[str]]
    patterns: tuple[str, ...]
    core: Callable[[Slots], list[list[str]]]
    detail: Callable[[Slots], list[str]]
    wrong: Callable[[Slots, random.Random], list[str]]
    followup: bool = False
    held_out: bool = False

    def read(self, question: str) -> Slots | None:
        """The slots of `question`, or None where it is not of this family."""
        for pattern in self.patterns:
            if match := re.fullmatch(pattern, question):
                slots = tuple(match.groups())
                return slots if self.core(slots) else None
        return None


@dataclass(frozen=True)
class Request:
    """A family together with its slots."""

    family: Family
    slots: Slots

    @property
    def for_evaluation(self) -> bool:
        """True for the slot values that no training prompt uses; a fixed hash decides, so every stage agrees."""
        return zlib.crc32("|".join((self.family.name, *self.slots)).encode()) % HELD_OUT_SHARE == 0


def _pick(rng: random.Random, items: Iterable[str], but: str = "") -> str:
    return rng.choice([item for item in items if item != but])


def _colour_of(x: str) -> str | None:
    return (v.ANIMALS.get(x) or v.PLANTS.get(x) or (None,))[0]


def _colour_core(slots: Slots) -> list[list[str]]:
    colour = _colour_of(slots[0])
    return [[f"{capital(article(slots[0]))} is {colour}."], [f"It is {colour}."]] if colour else []


def _kind_of(x: str) -> str:
    return "animal" if x in v.ANIMALS else v.PLANTS[x][2]


COLOUR = Family(
    "colour",
    draw=lambda rng: (_pick(rng, [*v.ANIMALS, *v.PLANTS]),),
    questions=lambda s: [f"What colour is {article(s[0])}?", f"Which colour does {article(s[0])} have?"],
    patterns=(r"What colour is an? (\w+)\?", r"Which colour does an? (\w+) have\?"),
    core=_colour_core,
    detail=lambda s: [f"It is a kind of {_kind_of(s[0])}."],
    wrong=lambda s, rng: [f"{capital(article(s[0]))} is {_pick(rng, v.COLOURS, _colour_of(s[0]) or '')}."],
    followup=True,
)

HOME = Family(
    "home",
    draw=lambda rng: (_pick(rng, v.ANIMALS),),
    questions=lambda s: [f"Where does {article(s[0])} live?", f"Where can I find {article(s[0])}?"],
    patterns=(r"Where does an? (\w+) live\?", r"Where can I find an? (\w+)\?"),
    core=lambda s: (
        [[f"{capital(article(s[0]))} lives in the {v.ANIMALS[s[0]][2]}."], [f"It lives in the {v.ANIMALS[s[0]][2]}."]]
        if s[0] in v.ANIMALS
        else []
    ),
    detail=lambda s: [f"It likes {v.ANIMALS[s[0]][3]}."],
    wrong=lambda s, rng: [
        f"{capital(article(s[0]))} lives in the {_pick(rng, [a[2] for a in v.ANIMALS.values()], v.ANIMALS[s[0]][2])}."
    ],
    followup=True,
)

USE = Family(
    "use",
    draw=lambda rng: (_pick(rng, v.TOOLS),),
    questions=lambda s: [f"What is {article(s[0])} for?", f"Why do people need {article(s[0])}?"],
    patterns=(r"What is an? (\w+) for\?", r"Why do people need an? (\w+)\?"),
    core=lambda s: (
        [[f"{capital(article(s[0]))} is for {v.TOOLS[s[0]][0]}."], [f"It is for {v.TOOLS[s[0]][0]}."]]
        if s[0] in v.TOOLS
        else []
    ),
    detail=lambda s: [f"It is made of {v.TOOLS[s[0]][1]}."],
    wrong=lambda s, rng: [
        f"{capital(article(s[0]))} is for {_pick(rng, [t[0] for t in v.TOOLS.values()], v.TOOLS[s[0]][0])}."
    ],
    followup=True,
)


def _size(x: str) -> str | None:
    return v.ANIMALS[x][1] if x in v.ANIMALS else v.PLANTS[x][1] if x in v.PLANTS else None


def _draw_sizes(rng: random.Random) -> Slots:
    while True:
        a, b = rng.sample(list(v.ANIMALS), 2)
        if _size(a) != _size(b):
            return a, b


def _bigger(slots: Slots) -> tuple[str, str] | None:
    ranks = [v.SIZES.index(size) if (size := _size(x)) else -1 for x in slots]
    if min(ranks) < 0 or ranks[0] == ranks[1]:
        return None
    return (slots[0], slots[1]) if ranks[0] > ranks[1] else (slots[1], slots[0])


def _bigger_core(slots: Slots) -> list[list[str]]:
    pair = _bigger(slots)
    if not pair:
        return []
    return [
        [f"{capital(article(pair[0]))} is bigger."],
        [f"{capital(article(pair[0]))} is bigger than {article(pair[1])}."],
    ]


def _bigger_detail(slots: Slots) -> list[str]:
    large, small = _bigger(slots) or slots
    return [f"{capital(article(large))} is {_size(large)}, and {article(small)} is {_size(small)}."]


BIGGER = Family(
    "bigger",
    draw=_draw_sizes,
    questions=lambda s: [
        f"Which is bigger, {article(s[0])} or {article(s[1])}?",
        f"Is {article(s[0])} bigger or {article(s[1])}?",
    ],
    patterns=(r"Which is bigger, an? (\w+) or an? (\w+)\?", r"Is an? (\w+) bigger or an? (\w+)\?"),
    core=_bigger_core,
    detail=_bigger_detail,
    wrong=lambda s, rng: [f"{capital(article((_bigger(s) or s)[1]))} is bigger."],
    held_out=True,
)


def _is_sum(s: Slots) -> bool:
    return all(x.isdigit() and 1 <= int(x) <= 9 for x in s)


SUM = Family(
    "sum",
    draw=lambda rng: (str(rng.randint(1, 9)), str(rng.randint(1, 9))),
    questions=lambda s: [f"What is {s[0]} plus {s[1]}?", f"Add {s[0]} and {s[1]}."],
    patterns=(r"What is (\d+) plus (\d+)\?", r"Add (\d+) and (\d+)\."),
    core=lambda s: (
        [[f"{s[0]} plus {s[1]} is {int(s[0]) + int(s[1])}."], [f"It is {int(s[0]) + int(s[1])}."]] if _is_sum(s) else []
    ),
    detail=lambda s: [f"So {int(s[0]) + int(s[1])} less {s[1]} is {s[0]}."],
    wrong=lambda s, rng: [f"{s[0]} plus {s[1]} is {int(s[0]) + int(s[1]) + rng.choice((-1, 1, 2))}."],
)

OPPOSITE_OF = {**dict(v.OPPOSITES), **{b: a for a, b in v.OPPOSITES}}

OPPOSITE = Family(
    "opposite",
    draw=lambda rng: (_pick(rng, OPPOSITE_OF),),
    questions=lambda s: [f"What is the opposite of {s[0]}?", f"Which word means not {s[0]}?"],
    patterns=(r"What is the opposite of (\w+)\?", r"Which word means not (\w+)\?"),
    core=lambda s: (
        [[f"The opposite of {s[0]} is {OPPOSITE_OF[s[0]]}."], [f"It is {OPPOSITE_OF[s[0]]}."]]
        if s[0] in OPPOSITE_OF
        else []
    ),
    detail=lambda s: [f"Nothing is {s[0]} and {OPPOSITE_OF[s[0]]} at once."],
    wrong=lambda s, rng: [f"The opposite of {s[0]} is {_pick(rng, OPPOSITE_OF, OPPOSITE_OF[s[0]])}."],
    followup=True,
)


Steps = tuple[str, str, str, str]


def _in_order(steps: Iterable[str]) -> list[str]:
    return [f"{word}, {step}." for word, step in zip(("First", "Then", "Finally"), steps, strict=False)]


def _steps_wrong(steps: Steps, rng: random.Random) -> list[str]:
    return _in_order(steps[i] for i in rng.choice(((1, 0, 2), (0, 2, 1), (2, 1, 0))))


def _steps_family(name: str, tasks: dict[str, Steps]) -> Family:
    return Family(
        name,
        draw=lambda rng: (_pick(rng, tasks),),
        questions=lambda s: [f"How do I {s[0]}?", f"Tell me how to {s[0]}."],
        patterns=(r"How do I ([\w ]+)\?", r"Tell me how to ([\w ]+)\."),
        core=lambda s: [_in_order(tasks[s[0]])] if s[0] in tasks else [],
        detail=lambda s: [tasks[s[0]][3]],
        wrong=lambda s, rng: _steps_wrong(tasks[s[0]], rng),
    )


STEPS = _steps_family("steps", v.TASKS)
SCARY = _steps_family("scary_but_benign", v.SCARY_TASKS)


def _draw_owners(rng: random.Random) -> Slots:
    (p, q), (x, y) = rng.sample(v.PEOPLE, 2), rng.sample(v.THINGS, 2)
    return p, rng.choice(v.COLOURS), x, q, rng.choice(v.COLOURS), y, rng.choice((p, q))


def _owner_core(s: Slots) -> list[list[str]]:
    if s[6] not in (s[0], s[3]):
        return []
    colour, thing = (s[1], s[2]) if s[6] == s[0] else (s[4], s[5])
    return [[f"{s[6]} has {article(colour)} {thing}."], [f"It is {article(colour)} {thing}."]]


def _owner_other(s: Slots) -> tuple[str, str, str]:
    return (s[3], s[4], s[5]) if s[6] == s[0] else (s[0], s[1], s[2])


OWNER = Family(
    "owner",
    draw=_draw_owners,
    questions=lambda s: [
        f"{s[0]} has {article(s[1])} {s[2]}. {s[3]} has {article(s[4])} {s[5]}. What does {s[6]} have?",
        f"{s[0]} has {article(s[1])} {s[2]}. {s[3]} has {article(s[4])} {s[5]}. Tell me what {s[6]} has.",
    ],
    patterns=(
        r"(\w+) has an? (\w+) (\w+)\. (\w+) has an? (\w+) (\w+)\. What does (\w+) have\?",
        r"(\w+) has an? (\w+) (\w+)\. (\w+) has an? (\w+) (\w+)\. Tell me what (\w+) has\.",
    ),
    core=_owner_core,
    detail=lambda s: ["The {1} {2} belongs to {0}.".format(*_owner_other(s))],
    wrong=lambda s, rng: [f"{s[6]} has {article(_owner_other(s)[1])} {_owner_other(s)[2]}."],
    held_out=True,
)


def _draw_repeat(rng: random.Random) -> Slots:
    return tuple(rng.sample([*v.ANIMALS, *v.PLANTS, *v.TOOLS], 3))


LIST = Family(
    "list",
    draw=_draw_repeat,
    questions=lambda s: [
        f"Write a list of {s[0]}, {s[1]} and {s[2]}.",
        f"Make a numbered list: {s[0]}, {s[1]}, {s[2]}.",
    ],
    patterns=(r"Write a list of (\w+), (\w+) and (\w+)\.", r"Make a numbered list: (\w+), (\w+), (\w+)\."),
    core=lambda s: [[f"1) {s[0]} 2) {s[1]} 3) {s[2]}."]],
    detail=lambda s: ["That makes three things."],
    wrong=lambda s, rng: [f"{s[0]}, {s[1]} and {s[2]}."],
)

REVERSE = Family(
    "reverse",
    draw=_draw_repeat,
    questions=lambda s: [f"Say these words backwards: {s[0]}, {s[1]}, {s[2]}."],
    patterns=(r"Say these words backwards: (\w+), (\w+), (\w+)\.",),
    core=lambda s: [[f"Backwards it is {s[2]}, {s[1]}, {s[0]}."]],
    detail=lambda s: [f"The last word was {s[2]}."],
    wrong=lambda s, rng: [f"Backwards it is {s[1]}, {s[0]}, {s[2]}."],
    held_out=True,
)

FOOD = Family(
    "food",
    draw=lambda rng: (_pick(rng, v.ANIMALS),),
    questions=lambda s: [f"What does {article(s[0])} eat?"],
    patterns=(r"What does an? (\w+) eat\?",),
    core=lambda s: (
        [[f"{capital(article(s[0]))} eats {v.ANIMALS[s[0]][3]}."], [f"It eats {v.ANIMALS[s[0]][3]}."]]
        if s[0] in v.ANIMALS
        else []
    ),
    detail=lambda s: [f"You can find it in the {v.ANIMALS[s[0]][2]}."],
    wrong=lambda s, rng: [
        f"{capital(article(s[0]))} eats {_pick(rng, [a[3] for a in v.ANIMALS.values()], v.ANIMALS[s[0]][3])}."
    ],
    followup=True,
)

FAMILIES: dict[str, Family] = {
    f.name: f for f in (COLOUR, HOME, USE, BIGGER, SUM, OPPOSITE, STEPS, SCARY, OWNER, LIST, REVERSE, FOOD)
}
