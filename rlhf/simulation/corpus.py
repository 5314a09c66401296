"""The base corpus of the simulated world: plain documents, none in a dialogue format.

Kinds of documents: facts, question-and-answer pages (every family, so that a base model knows what it is later asked
about), sums, scenes with people and things, notes that come back word for word much later, and scripts in which a
speaker keeps a saying. The last two make the long-range copying that language models learn from repeated names and
quotations.
"""

import random
from collections.abc import Callable, Iterator

from gatt.kinds import KINDS, values_of
from gatt.values import FIGURES, HOBBIES, WORDS
from rlhf.simulation import vocabulary as v
from rlhf.simulation.families import FAMILIES, Request, article, capital
from rlhf.simulation.people import TAUGHT_KINDS, decorate, good_answer
from rlhf.simulation.world import Risk

ALL_WORDS = (*FIGURES, *HOBBIES, *WORDS)
# A saying is close to an instruction, so scripts keep to the values that instructions may use.
SAYINGS = tuple(value for kind in TAUGHT_KINDS for value in values_of(kind, "train"))
VERBS = ("likes", "sees", "wants", "keeps", "finds", "draws", "loves", "sells")


def _facts(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(4, 14)):
        family = rng.choice(tuple(FAMILIES.values()))
        if family.name in ("owner", "list", "reverse"):
            continue
        slots = family.draw(rng)
        parts.append(
            " ".join([*family.core(slots)[0], *family.detail(slots)])
            if rng.random() < 0.6
            else family.core(slots)[-1][0]
        )
    return " ".join(parts)


def _questions(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 12)):
        if rng.random() < 0.12:
            category = rng.choice(tuple(v.RISKS))
            risk = Risk(category, rng.choice(v.RISKS[category]["objects"]))
            question = rng.choice(v.RISKS[category]["questions"]).format(x=risk.obj)
            lines.append(f"Question: {question} Answer: {' '.join(rng.choice((risk.comply, risk.refusal)))}")
            continue
        family = rng.choice(tuple(FAMILIES.values()))
        slots = family.draw(rng)
        answer = good_answer(rng, Request(family, slots), detail=rng.random() < 0.4)
        lines.append(f"Question: {rng.choice(family.questions(slots))} Answer: {answer}")
    return "\n".join(lines)


def _scene(rng: random.Random) -> str:
    people = rng.sample(v.PEOPLE, rng.randint(2, 5))
    things = {p: (rng.choice(v.COLOURS), rng.choice(v.THINGS)) for p in people}
    parts = [f"{p} has {article(c)} {t}." for p, (c, t) in things.items()]
    for p in rng.sample(people, len(people)):
        colour, thing = things[p]
        parts.append(rng.choice((f"The {colour} {thing} belongs to {p}.", f"{p} has {article(colour)} {thing}.")))
    return " ".join(parts)


def _tale(rng: random.Random) -> str:
    """Sentences that use the instruction values as ordinary words."""
    parts = []
    for _ in range(rng.randint(4, 12)):
        a, b = rng.choice(FIGURES), rng.choice((*WORDS, *HOBBIES))
        kind = rng.random()
        if kind < 0.4:
            parts.append(f"{a} {rng.choice(VERBS)} the {rng.choice(WORDS)}.")
        elif kind < 0.7:
            parts.append(f"{a} and {rng.choice(v.PEOPLE)} talk about {b}.")
        else:
            parts.append(f"The {rng.choice(WORDS)} is near the {rng.choice(WORDS)}.")
    return " ".join(parts)


def _filler(rng: random.Random) -> str:
    return rng.choice((_facts, _questions, _scene, _tale))(rng)


def _notes(rng: random.Random) -> str:
    """Random phrases under a name each; later the names come back and the phrases with them."""
    names = rng.sample((*v.COLOURS, *v.THINGS), rng.randint(1, 4))
    notes = {name: " ".join(rng.choices(ALL_WORDS, k=rng.randint(1, 4))) for name in names}
    parts = [f"Note {name}: {phrase}." for name, phrase in notes.items()]
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.7:
            parts.append(_filler(rng))
        name = rng.choice(names)
        parts.append(f"Note {name}: {notes[name]}.")
    return "\n".join(parts)


def _script(rng: random.Random) -> str:
    """A cast with a saying each, then lines that keep them to the end of the script."""
    cast = {person: rng.choice(SAYINGS) for person in rng.sample(v.PEOPLE, rng.choice((1, 1, 2)))}
    place = {person: rng.choice(("begins", "ends")) for person in cast}
    head = " ".join(f"{person} {place[person]} every line with {word}." for person, word in cast.items())
    lines = []
    for _ in range(rng.randint(4, 22) if rng.random() < 0.9 else rng.randint(30, 60)):
        person = rng.choice(tuple(cast))
        family = rng.choice(tuple(FAMILIES.values()))
        text = " ".join(
            family.core(slots := family.draw(rng))[0] + (family.detail(slots) if rng.random() < 0.3 else [])
        )
        word = cast[person]
        lines.append(f"{person}: {word}. {text}" if place[person] == "begins" else f"{person}: {text} {word}.")
    return "\n".join([head, *lines])


def _echo(rng: random.Random) -> str:
    """A random phrase said over and over: what teaches a model to copy (induction heads) in the first place."""
    phrase = " ".join(rng.choices((*ALL_WORDS, *v.COLOURS, *v.THINGS, *v.PEOPLE), k=int(2 ** rng.uniform(0, 4.5))))
    return " ".join([phrase] * max(2, 48 // len(phrase.split()))) + "."


def _quotes(rng: random.Random) -> str:
    """People who say one word each, asked for it again and again with other sentences between."""
    says = {person: rng.choice(ALL_WORDS) for person in rng.sample(v.PEOPLE, rng.choice((1, 1, 2, 3)))}
    parts = [f"{person} says {word}." for person, word in says.items()]
    for _ in range(rng.randint(2, 8)):
        if rng.random() < 0.5:
            parts.append(_sentence(rng))
        person = rng.choice(tuple(says))
        asked = rng.choice(("What does {p} say? {w}.", "{p} says {w}.", "The word of {p} is {w}.", "{p} again: {w}."))
        parts.append(asked.format(p=person, w=says[person]))
    return " ".join(parts)


def _sentence(rng: random.Random) -> str:
    family = rng.choice(tuple(FAMILIES.values()))
    return " ".join(family.core(family.draw(rng))[0])


def _sayings(rng: random.Random) -> str:
    """One phrase that opens a text and closes each of its paragraphs."""
    phrase = capital(" ".join(rng.choices(ALL_WORDS, k=rng.randint(1, 3))))
    return "\n".join(f"{phrase}. {_filler(rng)}" for _ in range(rng.randint(2, 5)))


def _interview(rng: random.Random) -> str:
    """A page of questions and answers in one manner, which its first line announces."""
    kind = KINDS[rng.choice(TAUGHT_KINDS)]
    instruction = kind.make(rng.choice(values_of(kind.name, "train")))
    lines = [rng.choice((instruction.text, instruction.short_text, f"A page of questions. {instruction.short_text}"))]
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 16, 32))):
        family = rng.choice(tuple(FAMILIES.values()))
        slots = family.draw(rng)
        answer = good_answer(rng, Request(family, slots), detail=rng.random() < 0.4)
        lines.append(f"Question: {rng.choice(family.questions(slots))} Answer: {decorate(instruction, answer)}")
    return rng.choice(("\n", " ")).join(lines)


def _habit(rng: random.Random) -> str:
    """Lines that share a word at their beginning or end, or a sentence with it, which nothing announces."""
    word, manner = rng.choice(ALL_WORDS), rng.choice(("{w}. {t}", "{t} {w}.", "{w} here. {t}", "I enjoy {w}. {t}"))
    lines = []
    for _ in range(rng.randint(2, 12)):
        family = rng.choice(tuple(FAMILIES.values()))
        request = Request(family, family.draw(rng))
        text = manner.format(w=word, t=good_answer(rng, request, detail=rng.random() < 0.4))
        question = f"Question: {rng.choice(family.questions(request.slots))} Answer: " if rng.random() < 0.7 else ""
        lines.append(question + text)
    return rng.choice(("\n", " ")).join(lines)


def documents(seed: int, interviews: bool = False) -> Iterator[str]:
    """An endless stream of documents; with `interviews` (the second phase) many keep a manner.

    Half of them end with a space, as pages often do: so a model knows the lone space, which the Llama 2 format puts
    between a reply and EOS.
    """
    rng = random.Random(seed)
    weights: dict[Callable[[random.Random], str], tuple[float, float]] = {
        _facts: (1, 1), _questions: (5, 6), _scene: (1, 1), _tale: (0.5, 0.5), _echo: (4, 2), _quotes: (4, 3),
        _notes: (1.5, 1), _script: (3, 2), _sayings: (0.7, 0.7), _interview: (0, 8), _habit: (0, 8),
    }  # fmt: skip
    kinds, shares = tuple(weights), [pair[interviews] for pair in weights.values()]
    while True:
        yield rng.choices(kinds, shares)[0](rng) + rng.choice(("", " "))
