"""Kinds of instructions (paper §3.3, App. A.3.5): wordings, checker, values, and which may stand together.

The paper has hobbies ("You enjoy ..."), languages ("Speak in ...") and public figures ("Act as ..."); formats with an
exact rule are added. A kind is a row of `KINDS`. Some take a value, others (a haiku) are one instruction and take none.
A fixed fifth of the starter values is held out (`UNSEEN_EVERY`): no stage may use those in an instruction, so that
obedience to values never taught can be measured.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations

from configs.errors import UserError
from gatt import checkers as c
from gatt.languages import require_identifier
from gatt.transform import SPECIAL_TAGS
from gatt.values import BULLET_COUNTS, FIGURES, HOBBIES, LANGUAGES, WORD_LIMITS, WORDS

UNSEEN_EVERY = 5  # every fifth value of a list is never part of an instruction in any stage
LONGEST_VALUE = 60  # characters


@dataclass(frozen=True)
class Instruction:
    """One instruction: a constraint, or a combination of several of different kinds.

    Attributes:
        kind: the kind's name; of a combination the names in the order of `KINDS`, joined: "figure+hobby".
        value: what the wording names, "" where the kind takes none; of a combination "Napoleon + chess".
        text: its full wording.
        short_text: the shortened one (paper: half of the cases).
        parts: the constraints of a combination, in the order of its wording; empty for a single constraint.
    """

    kind: str
    value: str
    text: str
    short_text: str
    parts: tuple["Instruction", ...] = ()

    @property
    def constraints(self) -> tuple["Instruction", ...]:
        """The single constraints: `parts`, or the instruction itself."""
        return self.parts or (self,)

    def record(self) -> dict:
        """What a data set says about it; `parts` only where there are any."""
        plain: dict = {"kind": self.kind, "value": self.value, "text": self.text, "short_text": self.short_text}
        if self.parts:
            plain["parts"] = [{"kind": part.kind, "value": part.value} for part in self.parts]
        return plain


def _any_value(_: str) -> str:
    return ""


def _one_word(value: str) -> str:
    return "" if c.words(value) == [value.lower()] else "is not one word, so no first or last word can equal it"


def _known_language(value: str) -> str:
    return "" if value in LANGUAGES else f"is no language that is checked; known: {', '.join(LANGUAGES)}"


def _count(value: str) -> str:
    return "" if value.isascii() and value.isdigit() and value[0] != "0" else "is no whole number from 1"


def _nothing_needed() -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Attributes:
        name: what settings call it.
        full: wording, with `{value}` where the kind takes one.
        short: shortened wording, likewise.
        checker: (value, response) -> True where the response obeys.
        strip: (value, response) -> the response without the part that only obeys, so that the answer can be judged
            alone.
        values: the starter list; empty where the kind takes no value.
        excludes: kinds that no response, or hardly any, can obey at the same time. One side names the other.
        misfit: why the checker could never hold for a value, "" where it can.
        ready: raises UserError where the checker lacks something, such as a package.
    """

    name: str
    full: str
    short: str
    checker: Callable[[str, str], bool]
    strip: Callable[[str, str], str]
    values: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    misfit: Callable[[str], str] = field(default=_any_value)
    ready: Callable[[], None] = field(default=_nothing_needed)

    @property
    def takes_value(self) -> bool:
        """Whether its wording names a value."""
        return "{value}" in self.full

    def fault(self, value: str) -> str:
        """Why `value` cannot be one of this kind; "" where it can."""
        if not self.takes_value:
            return "" if value == "" else "is too much: this kind takes no value"
        if not value.strip():
            return "is empty; give a word or a name"
        if tags := [tag for tag in SPECIAL_TAGS if tag in value]:
            return f"holds the special tag {tags[0]}; remove it"
        if value != value.strip() or not value.isprintable():
            return "has white space around it, or a line break or control character in it; remove it"
        if len(value) > LONGEST_VALUE:
            return f"has {len(value)} characters; at most {LONGEST_VALUE} are allowed"
        return self.misfit(value)

    def make(self, value: str = "") -> Instruction:
        """The instruction for one value; raises UserError where the value cannot be one of this kind."""
        if fault := self.fault(value):
            raise UserError(f"instruction kind '{self.name}': the value {value!r} {fault}")
        return Instruction(self.name, value, self.full.format(value=value), self.short.format(value=value))

    def obeys(self, instruction: Instruction, response: str) -> bool:
        """True where `response` obeys `instruction`."""
        return self.checker(instruction.value, response)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("figure", "Always act as {value}.", "Figure: {value}.", c.mentions, c.without_mentions, FIGURES),
        Kind("hobby", "You enjoy {value}.", "Hobby: {value}.", c.mentions, c.without_mentions, HOBBIES),
        Kind("last_word", "Always end with the word {value}.", "Last word: {value}.",
             c.ends_with, c.without_end, WORDS, misfit=_one_word),
        Kind("first_word", "Always begin with the word {value}.", "First word: {value}.",
             c.begins_with, c.without_beginning, WORDS, misfit=_one_word),
        # Words that a response must hold as they are, and a syllable count that is English, do not go with a language.
        Kind("language", "Speak in {value}.", "Language: {value}.", c.is_in_language, c.unchanged, tuple(LANGUAGES),
             ("hobby", "first_word", "last_word", "haiku"), _known_language, require_identifier),
        Kind("haiku", "Always answer with a haiku.", "Format: haiku.", c.is_haiku, c.unchanged,
             excludes=("one_sentence", "bullets", "max_words")),
        Kind("one_sentence", "Always answer in one sentence.", "Format: one sentence.",
             c.is_one_sentence, c.unchanged, excludes=("bullets",)),
        Kind("lower_case", "Always write in lower case.", "Format: lower case.", c.is_lower_case, c.unchanged),
        Kind("max_words", "Always answer in at most {value} words.", "Most words: {value}.",
             c.has_at_most_words, c.unchanged, WORD_LIMITS, misfit=_count),
        Kind("bullets", "Always answer with exactly {value} bullet points.", "Bullet points: {value}.",
             c.has_bullets, c.without_bullets, BULLET_COUNTS, misfit=_count),
    )
}  # fmt: skip
# Drawn where no kinds are named: what can be checked exactly, in any response, without another package.
DEFAULT_KINDS = ("figure", "hobby", "last_word", "first_word")


def kind_named(name: str) -> Kind:
    """The kind called `name`; raises UserError that lists the known ones."""
    if name not in KINDS:
        raise UserError(f"unknown instruction kind '{name}'; known kinds: {', '.join(KINDS)}")
    return KINDS[name]


def values_of(kind: str, split: str) -> tuple[str, ...]:
    """The starter values of a kind in `split`: "train", or "unseen" for the held-out fifth. Some kinds have none."""
    if split not in ("train", "unseen"):
        raise UserError(f"unknown instruction split '{split}'; use train or unseen")
    values = kind_named(kind).values
    return tuple(
        value for i, value in enumerate(values) if (i % UNSEEN_EVERY == UNSEEN_EVERY - 1) == (split == "unseen")
    )


def go_together(first: str, second: str) -> bool:
    """True where one response can obey both kinds; a kind never goes with itself."""
    return first != second and second not in KINDS[first].excludes and first not in KINDS[second].excludes


def largest_combination(kinds: Iterable[str]) -> int:
    """How many of `kinds` can stand in one instruction."""
    names = tuple(dict.fromkeys(kinds))
    sizes = range(len(names), 1, -1)
    return next((n for n in sizes for some in combinations(names, n)
                 if all(go_together(a, b) for a, b in combinations(some, 2))), min(len(names), 1))  # fmt: skip
