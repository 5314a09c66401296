"""Instructions that a Ghost Attention dialogue must keep: kinds, values, automatic checkers (paper §3.3, App. A.3.5).

The paper combines hobbies ("You enjoy ..."), languages and public figures ("Act as ..."), and shortens half of the
final instructions ("Figure: Napoleon."). A kind here is a full wording, a short wording and a checker that reads a
response; the values are words. A fixed fifth of the starter values is held out (`UNSEEN`): no stage may use those in
an instruction, so that obedience to values never taught can be measured.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import UserError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `text` is its full wording, `short_text` the shortened one (paper: half of the cases)."""

    kind: str
    value: str
    text: str
    short_text: str


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Attributes:
        name: what settings call it.
        full: wording with `{value}`.
        short: shortened wording with `{value}`.
        checker: (value, response) -> True where the response obeys.
        strip: (value, response) -> the response without the part that only obeys, so that the answer can be judged
            alone.
        values: the starter list.
    """

    name: str
    full: str
    short: str
    checker: Callable[[str, str], bool]
    strip: Callable[[str, str], str]
    values: tuple[str, ...]

    def make(self, value: str) -> Instruction:
        """The instruction for one value; raises UserError where the value is empty."""
        if not value.strip():
            raise UserError(f"instruction kind '{self.name}' got an empty value; give a word or a name")
        return Instruction(self.name, value, self.full.format(value=value), self.short.format(value=value))

    def obeys(self, instruction: Instruction, response: str) -> bool:
        """True where `response` obeys `instruction`."""
        return self.checker(instruction.value, response)


def sentences(text: str) -> list[str]:
    """Splits at white space that follows `.`, `!` or `?`; empty text gives an empty list."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def words(text: str) -> list[str]:
    """Lower-cased words of `text`, punctuation left out."""
    return [word.lower() for word in _WORD.findall(text)]


def _mentions(value: str, response: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", response, flags=re.IGNORECASE) is not None


def _without_mentions(value: str, response: str) -> str:
    return " ".join(part for part in sentences(response) if not _mentions(value, part))


def _ends_with(value: str, response: str) -> bool:
    return words(response)[-1:] == [value.lower()]


def _without_end(value: str, response: str) -> str:
    return re.sub(rf"[\s,]*{re.escape(value)}\W*$", "", response, flags=re.IGNORECASE)


def _begins_with(value: str, response: str) -> bool:
    return words(response)[:1] == [value.lower()]


def _without_beginning(value: str, response: str) -> str:
    return re.sub(rf"^\W*{re.escape(value)}\W*", "", response, flags=re.IGNORECASE)


FIGURES = (
    "Napoleon", "Mozart", "Einstein", "Cleopatra", "Galileo", "Darwin", "Newton", "Shakespeare", "Beethoven",
    "Picasso", "Columbus", "Caesar", "Plato", "Socrates", "Aristotle", "Homer", "Dante", "Chopin", "Bach", "Vivaldi",
    "Rembrandt", "Monet", "Curie", "Edison", "Tesla", "Gandhi", "Lincoln", "Washington", "Churchill", "Joan",
    "Hannibal", "Nero", "Augustus", "Cicero", "Virgil", "Ovid", "Euclid", "Pythagoras", "Archimedes", "Kepler",
    "Copernicus", "Pascal", "Euler", "Gauss", "Faraday", "Maxwell", "Pasteur", "Mendel", "Linnaeus", "Humboldt",
    "Goethe", "Schiller", "Kafka", "Tolstoy", "Chekhov", "Pushkin", "Dickens", "Austen", "Bronte", "Byron", "Keats",
    "Shelley", "Wilde", "Yeats", "Joyce", "Twain", "Poe", "Whitman", "Melville", "Verne", "Hugo", "Voltaire",
    "Rousseau", "Descartes", "Kant", "Hegel", "Hume", "Locke", "Bacon", "Handel", "Haydn", "Schubert", "Brahms",
    "Verdi", "Wagner", "Liszt", "Rossini", "Magellan", "Drake", "Vasco", "Amundsen", "Marco", "Saladin", "Confucius",
    "Buddha",
)  # fmt: skip
HOBBIES = (
    "chess", "sailing", "knitting", "fishing", "painting", "dancing", "hiking", "skating", "cycling", "rowing",
    "archery", "fencing", "pottery", "weaving", "juggling", "baking", "camping", "climbing", "surfing", "skiing",
    "boxing", "judo", "karate", "tennis", "golf", "cricket", "rugby", "hockey", "polo", "darts", "billiards",
    "dominoes", "bridge", "poker", "bowling", "karaoke", "opera", "ballet", "theatre", "drumming", "whistling",
    "yodelling", "calligraphy", "origami", "photography", "astronomy", "birdwatching", "gardening", "beekeeping",
    "brewing", "carpentry", "sculpture", "embroidery", "quilting", "crochet", "sewing", "jogging", "yoga",
    "meditation", "gymnastics", "diving", "snorkelling", "kayaking", "canoeing", "horseback", "polishing",
    "collecting", "stargazing", "geocaching", "sudoku", "crosswords", "puzzles", "scrabble", "magic", "ventriloquism",
    "mime", "storytelling", "poetry", "journaling", "blogging", "coding", "robotics", "sketching", "engraving",
    "printing", "bookbinding", "glassblowing", "candlemaking", "soapmaking", "woodcarving", "leatherwork", "metalwork",
)  # fmt: skip
WORDS = (
    "river", "mountain", "window", "candle", "thunder", "ribbon", "pepper", "velvet", "marble", "lantern", "harbour",
    "meadow", "feather", "castle", "garden", "bottle", "ladder", "mirror", "pillow", "button", "basket", "copper",
    "silver", "timber", "canyon", "desert", "forest", "island", "jungle", "valley", "glacier", "volcano", "comet",
    "planet", "rocket", "satellite", "galaxy", "shadow", "whisper", "echo", "melody", "rhythm", "chorus", "trumpet",
    "violin", "piano", "guitar", "blossom", "clover", "daisy", "orchid", "tulip", "willow", "maple", "cedar", "acorn",
    "pebble", "crystal", "diamond", "emerald", "ruby", "sapphire", "amber", "ivory", "anchor", "compass", "voyage",
    "captain", "sailor", "pirate", "treasure", "wizard", "dragon", "knight", "shield", "armour", "throne", "crown",
    "jewel", "kingdom", "village", "market", "station", "railway", "engine", "wagon", "carriage", "saddle", "bicycle",
    "balloon", "parachute", "kite", "arrow", "target", "winter", "summer", "autumn", "sunrise", "sunset", "twilight",
    "midnight", "morning", "evening", "weather", "blizzard", "drizzle", "rainbow", "cinnamon", "vanilla", "ginger",
    "mustard", "saffron", "nutmeg", "honey", "butter", "cookie", "muffin", "pancake", "waffle", "noodle", "dumpling",
    "biscuit", "curtain", "carpet", "blanket", "cushion", "drawer", "cupboard", "kettle", "saucer", "teapot", "napkin",
    "apron", "thimble", "zipper", "pocket", "lighthouse", "windmill", "waterfall", "fountain", "statue", "tower",
    "tunnel", "canal", "avenue", "alley", "corner", "cottage", "cabin", "chimney", "attic", "cellar", "balcony",
    "terrace", "hallway", "doorway", "staircase", "calendar", "almanac", "diary", "letter", "parcel", "envelope",
    "stamp", "ticket", "passport", "ballad", "sonnet", "riddle", "proverb", "legend", "fable", "chapter", "novel",
    "lecture", "lesson", "museum", "library", "gallery", "circus", "carnival", "parade", "festival", "banquet",
    "picnic", "journey",
)  # fmt: skip

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("figure", "Always act as {value}.", "Figure: {value}.", _mentions, _without_mentions, FIGURES),
        Kind("hobby", "You enjoy {value}.", "Hobby: {value}.", _mentions, _without_mentions, HOBBIES),
        Kind("last_word", "Always end with the word {value}.", "Last word: {value}.", _ends_with, _without_end, WORDS),
        Kind("first_word", "Always begin with the word {value}.", "First word: {value}.",
             _begins_with, _without_beginning, WORDS),
    )
}  # fmt: skip

# Every fifth value of a list is never part of an instruction in any stage.
UNSEEN_EVERY = 5


def kind_named(name: str) -> Kind:
    """The kind called `name`; raises UserError that lists the known ones."""
    if name not in KINDS:
        raise UserError(f"unknown instruction kind '{name}'; known kinds: {', '.join(KINDS)}")
    return KINDS[name]


def values_of(kind: str, split: str) -> tuple[str, ...]:
    """The starter values of a kind in `split`: "train", or "unseen" for the held-out fifth."""
    if split not in ("train", "unseen"):
        raise UserError(f"unknown instruction split '{split}'; use train or unseen")
    values = kind_named(kind).values
    return tuple(
        value for i, value in enumerate(values) if (i % UNSEEN_EVERY == UNSEEN_EVERY - 1) == (split == "unseen")
    )


def obeys(instruction: Instruction, response: str) -> bool:
    """True where `response` obeys `instruction`, by the checker of its kind."""
    return kind_named(instruction.kind).checker(instruction.value, response)


def strip_obedience(instruction: Instruction, response: str) -> str:
    """`response` without the part that only obeys the instruction."""
    return kind_named(instruction.kind).strip(instruction.value, response)


def sample_instructions(
    rng: random.Random, n: int, split: str = "train", kinds: tuple[str, ...] = tuple(KINDS)
) -> list[Instruction]:
    """Draws `n` instructions, kinds in equal shares and values uniformly.

    Raises UserError for an empty list of kinds or an unknown kind.
    """
    if not kinds:
        raise UserError("the list of instruction kinds is empty; name at least one of: " + ", ".join(KINDS))
    pools = [(kind_named(name), values_of(name, split)) for name in kinds]
    rng.shuffle(pools)  # else a single draw would always be of the first kind
    drawn = [pools[i % len(pools)] for i in range(n)]
    rng.shuffle(drawn)
    return [kind.make(rng.choice(values)) for kind, values in drawn]


def parse_instruction(text: str) -> tuple[Instruction, str] | None:
    """Recognises an instruction in front of `text`, in either wording.

    Returns the instruction and the text behind it, or None where `text` does not begin with one.
    """
    for kind in KINDS.values():
        for wording in (kind.full, kind.short):
            before, after = wording.split("{value}")
            match = re.match(rf"{re.escape(before)}([\w'-]+){re.escape(after)}(?:\s+|$)", text)
            if match:
                return kind.make(match.group(1)), text[match.end() :]
    return None
