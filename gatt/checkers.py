"""Rules that read a response: does it obey a value, and what is left of it without the part that only obeys.

Every checker is (value, response) -> bool and every strip (value, response) -> str, so that a kind is a row of a table
(`gatt.kinds`); kinds that take no value are given "". Nothing here draws or keeps anything.
"""

import re
import unicodedata

from gatt.languages import language_of
from gatt.syllables import syllables
from gatt.values import LANGUAGES

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_BULLET = re.compile(r"^\s*[-*•]\s+")
# A full stop behind these, or behind a single capital letter, ends no sentence.
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Dr|Mr|Mrs|Ms|St|Jr|Sr|Prof|vs|e\.g|i\.e)\.$")
_ANY_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])\s*")
HAIKU = (5, 7, 5)


def sentences(text: str) -> list[str]:
    """Splits at white space that follows `.`, `!` or `?`; empty text gives an empty list."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def words(text: str) -> list[str]:
    """Lower-cased words of `text`, punctuation left out."""
    return [word.lower() for word in _WORD.findall(text)]


def lines(text: str) -> list[str]:
    """The lines of `text` that hold anything, white space around them left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def without_accents(text: str) -> str:
    """`text` with plain letters for accented ones: "Napoléon" -> "Napoleon"."""
    if text.isascii():  # most responses, and the simulated world asks for every one of them
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def mentions(value: str, response: str) -> bool:
    """`value` stands in the response as a word or words of its own; case and accents do not matter."""
    value, response = without_accents(value), without_accents(response)
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", response, flags=re.IGNORECASE) is not None


def without_mentions(value: str, response: str) -> str:
    """The sentences that do not mention `value`."""
    return " ".join(part for part in sentences(response) if not mentions(value, part))


def ends_with(value: str, response: str) -> bool:
    """The last word is `value`."""
    return words(response)[-1:] == [value.lower()]


def without_end(value: str, response: str) -> str:
    """The response without `value` at its end."""
    return re.sub(rf"[\s,]*{re.escape(value)}\W*$", "", response, flags=re.IGNORECASE)


def begins_with(value: str, response: str) -> bool:
    """The first word is `value`."""
    return words(response)[:1] == [value.lower()]


def without_beginning(value: str, response: str) -> str:
    """The response without `value` at its beginning."""
    return re.sub(rf"^\W*{re.escape(value)}\W*", "", response, flags=re.IGNORECASE)


def is_in_language(value: str, response: str) -> bool:
    """The response is in the language called `value`, one of `LANGUAGES`."""
    return language_of(response) == LANGUAGES[value]


def is_haiku(_: str, response: str) -> bool:
    """Three lines of 5, 7 and 5 syllables, as `gatt.syllables` counts them (it says how often that is wrong)."""
    return tuple(syllables(line) for line in lines(response)) == HAIKU


def is_one_sentence(_: str, response: str) -> bool:
    """One line with a word in it and no sentence end before its end; a missing last full stop does not matter."""
    found = lines(response)
    if len(found) != 1 or not words(found[0]):
        return False
    ends = [m.start() for m in _ANY_SENTENCE_END.finditer(found[0]) if m.end() < len(found[0])]
    return all(_ABBREVIATION.search(found[0][:end]) for end in ends)


def is_lower_case(_: str, response: str) -> bool:
    """Letters, and no upper-case one among them."""
    return any(c.isalpha() for c in response) and not any(c.isupper() for c in response)


def has_at_most_words(value: str, response: str) -> bool:
    """At least one word and at most `value` of them."""
    return 1 <= len(words(response)) <= int(value)


def has_bullets(value: str, response: str) -> bool:
    """Exactly `value` lines that begin with -, * or • and hold a word; other lines may stand around them."""
    points = [line for line in lines(response) if _BULLET.match(line) and words(line)]
    return len(points) == int(value)


def without_bullets(_: str, response: str) -> str:
    """The text of the lines, in one."""
    return " ".join(_BULLET.sub("", line) for line in lines(response))


def unchanged(_: str, response: str) -> str:
    """The response: nothing in it is there only to obey."""
    return response
