"""User turns as a model writes them: asking for them, reading its answers, telling doubles.

For dialogues whose user is a model. The paper says of Ghost Attention's dialogues only that they are between two
persons, one of them a user. Pure functions; `rlhf/write_user_turns.py` samples the answers.
"""

import re
from collections.abc import Iterable, Sequence

from gatt.instructions import parse_instruction
from gatt.value_lists import Line, read_lines, without_marker

TOPICS = (
    "cooking", "travel", "health and sport", "science", "history", "books and films", "music", "work", "school",
    "money", "computers", "animals", "plants and gardens", "the home", "family and friends", "language", "the weather",
    "games", "cars and trains", "the news",
)  # fmt: skip
# What is asked for each topic; several wordings give more different turns than one.
QUESTIONS = (
    "Write {n} different questions about {topic} that somebody might ask an assistant. One a line.",
    "List {n} short requests about {topic} that a user could send to a chatbot, each in one sentence, one a line.",
    "Imagine {n} people who want help with something about {topic}. Write only what each of them says, one a line.",
)
_QUOTES = "\"'“”‘’«»*_` "
_PLACEHOLDER = re.compile(r"\[[^\]]*\]|<[^>]*>|\{[^}]*\}|_{2,}|\.{3}|…")


def read_turns(answer: str, finished: bool, min_words: int, max_words: int) -> list[Line]:
    """Every line of an answer as a user turn, or with the reason why it is none; where the answer was cut at the token
    limit its last line is not used."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return read_lines(
        lines,
        finished,
        lambda line: without_marker(line).strip(_QUOTES),
        lambda turn: fault(turn, min_words, max_words),
    )


def fault(turn: str, min_words: int, max_words: int) -> str:
    """Why `turn` is not used; "" where it is."""
    words = len(turn.split())
    if words < min_words:
        return f"has fewer than {min_words} words"
    if words > max_words:
        return f"has more than {max_words} words"
    if _PLACEHOLDER.search(turn):
        return "has something to fill in"
    if parse_instruction(turn):
        return "carries an instruction of its own"
    return ""


def same(turn: str) -> str:
    """What two writings of one turn share: its letters and digits."""
    return re.sub(r"[\W_]+", "", turn.lower()) or turn


def different(turns: Iterable[str]) -> list[str]:
    """The turns without doubles, the first writing of each."""
    found: dict[str, str] = {}
    for turn in turns:
        found.setdefault(same(turn), turn)
    return list(found.values())


def questions(topics: Sequence[str], n: int) -> list[tuple[str, str]]:
    """(topic, question) for every topic in every wording."""
    return [(topic, wording.format(n=n, topic=topic)) for topic in topics for wording in QUESTIONS]
