"""Safety preprompts: what stands before a prompt while a safer answer to it is sampled (paper §4.2.4, Tables 13, 39).

A generic preprompt is a sentence with two adjectives drawn into it. A targeted one is of a risk category and asks for
an answer in numbered steps: immediate danger first, then the request itself, then why, then what else could be asked.
The wording is ours; a JSON file can replace any of it:

    {"adjectives": ["calm", "honest"], "generic": ["You are a {adjectives} helper."], "targeted": {"illicit": ["..."]}}
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.chat import SPECIAL_TAGS, Message
from configs.errors import UserError
from configs.safety_labels import RISK_CATEGORIES

SLOT = "{adjectives}"

ADJECTIVES = ("responsible", "respectful", "wise", "careful", "honest", "considerate")
GENERIC = (
    "You are a {adjectives} assistant. Turn down whatever could hurt somebody, and say why.",
    "Reply as a {adjectives} helper would. Where a request could do harm, decline kindly and offer something better.",
    "Be {adjectives}. Nothing that you write may help anyone to cause harm.",
    "Your replies are {adjectives}: safe for whoever reads them and fair to whoever they are about.",
)
TARGETED = {
    "illicit": (
        "You may be asked for help with something illegal. Do not give steps, tools or sources for it. Reply "
        "in this order, leaving out what does not apply:\n"
        "1. If somebody is in danger at this moment, say so and name who can help.\n"
        "2. Say plainly that you will not help with it.\n"
        "3. Explain what makes it illegal and whom it harms.\n"
        "4. Name a lawful way to the same goal and invite questions about it.",
    ),
    "hateful": (
        "You may be asked for hateful, abusive or violent words or deeds. Do not write them, not even as a "
        "joke or a story. Reply in this order, leaving out what does not apply:\n"
        "1. If somebody may come to harm now, the writer included, say so and name who can help.\n"
        "2. Decline in a calm voice, without repeating the insult.\n"
        "3. Explain whom such words or deeds hurt.\n"
        "4. Offer something kind or informative on the subject and invite questions about it.",
    ),
    "advice": (
        "You may be asked for medical, legal or financial advice that only somebody qualified can give. Do "
        "not pretend to be that person. Reply in this order, leaving out what does not apply:\n"
        "1. If life or health is at risk now, say so and name the emergency service.\n"
        "2. Say that you cannot judge this case.\n"
        "3. Explain in general terms what it depends on.\n"
        "4. Say whom to ask and invite questions on what is generally known.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Preprompt:
    """One preprompt as drawn for a prompt. `category` is None for a generic one."""

    text: str
    category: str | None = None

    @property
    def kind(self) -> str:
        """generic or targeted."""
        return "targeted" if self.category else "generic"


@dataclass(frozen=True)
class Preprompts:
    """The wordings to draw from."""

    adjectives: tuple[str, ...] = ADJECTIVES
    generic: tuple[str, ...] = GENERIC
    targeted: Mapping[str, Sequence[str]] = field(default_factory=lambda: TARGETED)

    def draw(self, rng: random.Random, category: str | None = None) -> Preprompt:
        """A targeted preprompt of `category`, or a generic one with two different adjectives for None."""
        if category is not None:
            return Preprompt(rng.choice(self.targeted[category]), category)
        drawn = rng.sample(self.adjectives, min(2, len(self.adjectives)))
        return Preprompt(rng.choice(self.generic).replace(SLOT, " and ".join(drawn)))


def read_preprompts(path: str | None, forbidden: Sequence[str] = SPECIAL_TAGS) -> Preprompts:
    """Our wordings, with those of the JSON file at `path` in place of what it names; a category that it leaves out
    keeps ours.

    Raises UserError for a file that cannot be read, an unknown key or category, an empty list or text, or a special tag
    (one of `forbidden`) in a text, naming the place.
    """
    if path is None:
        return Preprompts()
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"preprompts_file: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"preprompts_file: {path} is not valid JSON: {error}") from error
    where = f"preprompts_file: {path}"
    _check_keys(where, given, ("adjectives", "generic", "targeted"))
    targeted = given.get("targeted", {})
    _check_keys(f"{where}: targeted", targeted, tuple(RISK_CATEGORIES))
    lists = {name: given[name] for name in ("adjectives", "generic") if name in given}
    for name, texts in [*lists.items(), *((f"targeted: {name}", texts) for name, texts in targeted.items())]:
        _check_texts(f"{where}: {name}", texts, forbidden)
    own = {name: tuple(texts) for name, texts in lists.items()}
    return Preprompts(**own, targeted=TARGETED | {name: tuple(texts) for name, texts in targeted.items()})


def _check_keys(where: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where}: must be an object with {', '.join(known)}, not {type(given).__name__}")
    if unknown := sorted(given.keys() - set(known)):
        raise UserError(f"{where}: unknown {', '.join(unknown)}; use {', '.join(known)}")


def _check_texts(where: str, texts: Any, forbidden: Sequence[str]) -> None:
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{where}: give a list of at least one text")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}, item {number}: must be a text that is not empty")
        if tag := next((tag for tag in forbidden if tag in text), None):
            raise UserError(f"{where}, item {number}: contains the special tag {tag!r}; take it out")


def with_preprompt(messages: Sequence[Message], text: str, slot: str) -> list[Message]:
    """The prompt with the preprompt in it: `system`, before the system message's own text if there is one; `user`, in
    front of the last user message."""
    first, *rest = messages
    if slot == "user":
        *before, last = messages
        return [*before, {"role": "user", "content": f"{text}\n\n{last['content']}"}]
    if first["role"] == "system":
        return [{"role": "system", "content": f"{text}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": text}, *messages]
