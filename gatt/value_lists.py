"""Lists of values as a model writes them: asking, reading, telling doubles, splitting (paper App. A.3.5).

The paper had the chat model itself write its lists of hobbies and public figures, so that it knows what they name. What
a model answers is a list with numbers, bullets, introductions and explanations; here it becomes values that the kind
can check. Every line that does not become one has a reason.

Pure functions; `rlhf/write_instruction_values.py` samples the answers.
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import UserError
from gatt.checkers import mentions, without_accents
from gatt.instructions import parse_instruction
from gatt.kinds import KINDS, Kind, kind_named
from gatt.transform import SPECIAL_TAGS
from gatt.values import LANGUAGES

_NOUNS = (
    "Name {n} common things that one can see or touch, one word each, one a line.",
    "Write a list of {n} everyday nouns. Give only the words, one on each line.",
    "List {n} simple English nouns that everybody knows. One a line, no explanations.",
)
# What is asked for a list of each kind; several wordings give more different values than one.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "hobby": (
        "Name {n} hobbies, one a line.",
        "List {n} things that people do for fun in their free time. One a line, one or two words each.",
        "Write a list of {n} hobbies. Give only their names, one on each line.",
    ),
    "figure": (
        "Name {n} famous people from history, one a line.",
        "List {n} well-known public figures: artists, scientists, leaders. Only their names, one a line.",
        "Write a list of {n} writers, musicians and actors whom everybody knows. Give only their names, one a line.",
    ),
    "language": ("Name {n} languages of the world, one a line.",),
    "first_word": _NOUNS,
    "last_word": _NOUNS,
}
_MARKER = re.compile(r"^\s*(?:[-*•–—#>]+|\(?\d{1,3}[.):]|\d{1,3}\s*-)\s*")
_EXPLANATION = re.compile(r":\s|\s[-–—=]+\s|\s*[(;,]|\s+[Bb]ecause\b")
_WELL_FORMED = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'’-])*")
_SENTENCE = re.compile(
    r"(?:i|you|we|he|she|they|it|here|sure|of|yes|no|this|these|there|my|your|as)(?!\S)", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:a|an|the)\s+", re.IGNORECASE)
_PLURALS = tuple(
    (re.compile(plural), singular)
    for plural, singular in ((r"(..)ies?$", r"\1y"), (r"([sxz]|ch|sh)es?$", r"\1"), (r"([^sui])s$", r"\1"))
)
_LOWER_CASED = ("hobby", "first_word", "last_word")


@dataclass(frozen=True)
class Line:
    """One line of an answer: the value it gives, or "" and why it gives none."""

    line: str
    value: str
    reason: str = ""


def listed_kinds() -> tuple[str, ...]:
    """The kinds that a model can write a list for."""
    return tuple(kind for kind in KINDS if kind in QUESTIONS)


def split_lines(answer: str) -> list[str]:
    """The lines of an answer that hold anything; an answer of a single line is split at its commas (two or more)."""
    found = [line.strip() for line in answer.splitlines() if line.strip()]
    if len(found) == 1 and found[0].count(",") >= 2:
        before, colon, after = found[0].partition(": ")
        parts = re.split(r",\s*(?:and\s+)?|\s+and\s+", after if colon else before)
        return [part.rstrip(".") for part in parts if part.strip()]
    return found


def without_marker(line: str) -> str:
    """The line without its numbers and bullets."""
    while (bare := _MARKER.sub("", line)) != line:
        line = bare
    return line


def tidy(kind: Kind, line: str) -> str:
    """The value in a line: without number or bullet, emphasis, explanation, article and closing punctuation; white
    space, Unicode form and case as the kind has them."""
    text = without_marker(unicodedata.normalize("NFKC", line).replace("’", "'"))
    text = re.sub(r"[*_`\"“”]+", "", text).strip()
    text = _EXPLANATION.split(text, maxsplit=1)[0]
    text = re.sub(r"\s+", " ", text).strip(" .:!?'")
    if kind.name in _LOWER_CASED:
        return _ARTICLE.sub("", text).lower()
    if kind.name == "language":
        name = re.sub(r"\s+language$", "", text, flags=re.IGNORECASE)
        return next((known for known in LANGUAGES if known.lower() == name.lower()), name)
    return text.title() if text.islower() else text


def fault(kind: Kind, value: str, max_words: int) -> str:
    """Why `value` is not used; "" where it is."""
    if not value:
        return "nothing is left of the line"
    if _SENTENCE.match(value):
        return "is a sentence"
    if reason := kind.fault(value):
        return reason
    if len(value.split()) > max_words:
        return f"has more than {max_words} words"
    if not _WELL_FORMED.fullmatch(value):
        return "holds other characters than letters"
    instruction = kind.make(value)
    if parse_instruction(instruction.text) != (instruction, ""):
        return "cannot be recognised in its wording"
    return ""


def read_answer(kind: Kind, answer: str, finished: bool, max_words: int) -> list[Line]:
    """Every line of an answer; where it was cut at the token limit its last line is not used."""
    return read_lines(
        split_lines(answer), finished, lambda line: tidy(kind, line), lambda value: fault(kind, value, max_words)
    )


def read_lines(
    lines: Sequence[str], finished: bool, tidied: Callable[[str], str], fault_of: Callable[[str], str]
) -> list[Line]:
    """Each line as the value that `tidied` makes of it, or with the reason why it gives none: what `fault_of` says of
    the value, or what holds for any list."""
    read = []
    for number, line in enumerate(lines, 1):
        value = tidied(line)
        if not finished and number == len(lines):
            reason = "was cut off"
        elif any(tag in line for tag in SPECIAL_TAGS):
            reason = "holds a special tag"
        elif line.rstrip("* ").endswith(":") and not _MARKER.match(line):
            reason = "is an introduction"
        else:
            reason = fault_of(value)
        read.append(Line(line, "" if reason else value, reason))
    return read


def same(kind: Kind, value: str) -> str:
    """What two spellings of one value share.

    Case, accents, hyphens, apostrophes, full stops, white space and a leading article do not matter. But for names the
    plural does not either: -ie and -ies are -y, -e and -es go behind s, x, z, ch and sh ("horse" and "horses" are one),
    and -s elsewhere, but not behind s, u or i ("chess", "census", "tennis").
    """
    key = re.sub(r"[\s.'-]+", "", without_accents(_ARTICLE.sub("", value)).lower())
    if kind.name in ("figure", "language"):
        return key
    for plural, singular in _PLURALS:
        if plural.search(key):
            return plural.sub(singular, key)
    return key


def count_values(kind: Kind, answers: Iterable[Sequence[Line]]) -> dict[str, int]:
    """{value: answers that name it}, the most named first, then by name; one spelling stands for all of a value.

    It is the spelling of most answers, the first of equals. A value that one answer repeats counts once.
    """
    spellings: dict[str, Counter[str]] = {}
    named: Counter[str] = Counter()
    for lines in answers:
        keys = {same(kind, line.value): line.value for line in reversed(lines) if line.value}  # its first spelling
        for key, value in keys.items():
            spellings.setdefault(key, Counter())[value] += 1
            named[key] += 1
    counted = {spellings[key].most_common(1)[0][0]: count for key, count in named.items()}
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def told_apart(unseen: Sequence[str], taught: Sequence[str]) -> list[str]:
    """The values of `unseen` that no taught value holds or is held by: "Einstein" is taught by "Albert Einstein"."""
    return [v for v in unseen if not any(mentions(v, t) or mentions(t, v) for t in taught)]


def split_values(
    values: Sequence[str], unseen_share: float, rng: random.Random, placed: Mapping[str, bool] | None = None
) -> tuple[list[str], list[str]]:
    """(to teach, to be measured only), drawn by `rng`, each in the order of `values`.

    `placed` tells of values of other kinds whether they are unseen: they are so here too, as a noun that is taught as
    a first word has been seen when it is to be the last one. Neither list is empty where none is placed.
    Raises UserError for fewer than two values.
    """
    if len(values) < 2:
        raise UserError(f"{len(values)} values cannot be split into some that are taught and some that are not")
    placed = placed or {}
    count = min(max(round(unseen_share * len(values)), 1), len(values) - 1)
    unseen = {v for v in values if placed.get(v)}
    free = [v for v in values if v not in placed]
    unseen |= set(rng.sample(free, min(max(count - len(unseen), 0), len(free))))
    return [v for v in values if v not in unseen], [v for v in values if v in unseen]


def check_listed(kinds: Sequence[str]) -> None:
    """Raises UserError for no kind, an unknown one, and one that a model cannot write a list for."""
    if not kinds:
        raise UserError("kinds: the list is empty; name at least one of: " + ", ".join(listed_kinds()))
    for name in kinds:
        if kind_named(name).name not in QUESTIONS:
            raise UserError(
                f"kinds: there is no list to write for '{name}'; kinds with one: {', '.join(listed_kinds())}"
            )
