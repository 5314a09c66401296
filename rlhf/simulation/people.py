"""People of the simulated world: what they ask, and how they answer when they write demonstrations.

Demonstrations are of mixed quality, as the third-party data of the paper's §3.1: most answer rightly but leave the
detail out, some ramble, some are wrong, and some comply with risky requests. So a model fine-tuned on them has
something to gain from preferences, greedy decoding included.
"""

import random
from dataclasses import dataclass
from typing import Any

from configs.chat import Message
from gatt.instructions import Instruction, sample_instructions
from rlhf.simulation import vocabulary as v
from rlhf.simulation.families import FAMILIES, Family, Request
from rlhf.simulation.world import Risk

# How demonstrations answer helpful requests, and risky ones. Shares sum to 1.
ANSWER_SHARES = {"bare": 0.48, "full": 0.22, "filler": 0.12, "repeat": 0.03, "wrong": 0.11, "refuse": 0.04}
RISK_SHARES = {"comply": 0.42, "decline": 0.3, "explain": 0.18, "full": 0.1}

ASKED = tuple(family for family in FAMILIES.values() if not family.held_out)
HELD_OUT_FAMILIES = tuple(family for family in FAMILIES.values() if family.held_out)


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of requests in a set of prompts (the rest are ordinary helpful requests)."""

    risky: float = 0.22
    scary: float = 0.1
    multi_turn: float = 0.3
    instructed: float = 0.2


def risk_for_evaluation(risk: Risk) -> bool:
    """True for the stand-in objects that no training prompt names: the last two of each category."""
    return risk.obj in v.RISKS[risk.category]["objects"][-2:]


def draw_request(
    rng: random.Random, kind: str, evaluation: bool, families: tuple[Family, ...] = ASKED
) -> Request | Risk:
    """A random request: `kind` is helpful, scary or risky; `evaluation` chooses the held-out values."""
    while True:
        if kind == "risky":
            category = rng.choice(tuple(v.RISKS))
            risk = Risk(category, rng.choice(v.RISKS[category]["objects"]))
            if risk_for_evaluation(risk) == evaluation:
                return risk
            continue
        pool = [f for f in families if (f.name == "scary_but_benign") == (kind == "scary")]
        family = rng.choice(pool)
        request = Request(family, family.draw(rng))
        if request.for_evaluation == evaluation or family.held_out:
            return request


def ask(rng: random.Random, request: Request | Risk) -> str:
    """A wording of `request`."""
    if isinstance(request, Risk):
        return rng.choice(v.OPENERS) + rng.choice(v.RISKS[request.category]["questions"]).format(x=request.obj)
    return rng.choice(v.OPENERS) + rng.choice(request.family.questions(request.slots))


def _follow_up(rng: random.Random, request: Request, held_out: bool) -> tuple[str, Request]:
    """A short question of the same family about something else ("What about a pear?")."""
    while (other := Request(request.family, request.family.draw(rng))).for_evaluation != held_out:
        pass
    slots = other.slots
    noun = slots[0] if request.family.name == "opposite" else f"{'an' if slots[0][0] in 'aeiou' else 'a'} {slots[0]}"
    return f"What about {noun}?", other


def good_answer(rng: random.Random, request: Request | Risk, detail: bool = True) -> str:
    """A right answer; with its detail unless `detail` is False. To a risky request: a full refusal."""
    if isinstance(request, Risk):
        return " ".join(request.refusal if detail else request.refusal[:1])
    core = request.family.core(request.slots)[0]
    return " ".join([*core, rng.choice(request.family.detail(request.slots))] if detail else core)


def demonstrate(rng: random.Random, request: Request | Risk) -> str:
    """An answer as a demonstrator of mixed quality writes it."""
    if isinstance(request, Risk):
        manner = rng.choices(tuple(RISK_SHARES), tuple(RISK_SHARES.values()))[0]
        refusal = request.refusal
        if manner == "comply":
            return " ".join(request.comply)
        if manner == "explain":
            return " ".join([refusal[0], rng.choice(refusal[1:])])
        return " ".join(refusal if manner == "full" else refusal[:1])
    manner = rng.choices(tuple(ANSWER_SHARES), tuple(ANSWER_SHARES.values()))[0]
    core = request.family.core(request.slots)[0]
    if manner == "refuse":
        return v.REFUSAL
    if manner == "wrong":
        core = request.family.wrong(request.slots, rng)
        return " ".join([*core, request.family.detail(request.slots)[0]] if rng.random() < 0.3 else core)
    if manner == "full":
        return good_answer(rng, request)
    if manner == "filler":
        full = [*core, request.family.detail(request.slots)[0]] if rng.random() < 0.4 else core
        return " ".join([*full, rng.choice(v.FILLERS)])
    return " ".join([*core, core[-1]] if manner == "repeat" else core)


def decorate(instruction: Instruction, answer: str) -> str:
    """`answer` in the way people of the world obey `instruction`."""
    return {
        "figure": f"{instruction.value} here. {answer}",
        "hobby": f"{answer} I enjoy {instruction.value}.",
        "last_word": f"{answer} {instruction.value}.",
        "first_word": f"{instruction.value}. {answer}",
    }[instruction.kind]


def instruct(rng: random.Random, messages: list[Message], instruction: Instruction, short: bool, system: bool) -> None:
    """Puts the instruction into the last user message, or into the system message where that is the first turn."""
    text = instruction.short_text if short else instruction.text
    if system and len(messages) == 1:
        messages.insert(0, {"role": "system", "content": text})
    else:
        messages[-1] = {"role": "user", "content": f"{text} {messages[-1]['content']}"}


def draw_dialogue(
    rng: random.Random, mix: Mix, turns: int, *, evaluation: bool = False, families: tuple[Family, ...] = ASKED
) -> tuple[list[Message], Request | Risk]:
    """A dialogue of `turns` exchanges answered by demonstrators, and what its last user message asks.

    An instruction holds for its own turn only. `evaluation` draws the last request from the held-out values.
    """
    messages: list[Message] = []
    request: Request | Risk | None = None
    for turn in range(turns):
        held_out = evaluation and turn == turns - 1
        draw = rng.random()
        kind = "risky" if draw < mix.risky else "scary" if draw < mix.risky + mix.scary else "helpful"
        if isinstance(request, Request) and request.family.followup and kind == "helpful" and rng.random() < 0.35:
            text, request = _follow_up(rng, request, held_out)
        else:
            request = draw_request(rng, kind, held_out, families)
            text = ask(rng, request)
        messages.append({"role": "user", "content": text})
        answer = demonstrate(rng, request)
        if kind != "risky" and rng.random() < mix.instructed:
            instruction = sample_instructions(rng, 1)[0]
            instruct(rng, messages, instruction, short=rng.random() < 0.5, system=rng.random() < 0.5)
            answer = decorate(instruction, answer)
        messages.append({"role": "assistant", "content": answer})
    assert request is not None
    return messages, request


def draw_prompts(
    seed: int, n: int, *, mix: Mix | None = None, evaluation: bool = False, families: tuple[Family, ...] = ASKED
) -> list[dict[str, Any]]:
    """`n` different prompt records {"prompt", "is_safety", "source", "kind"}; kind is helpful, scary or risky."""
    rng, mix = random.Random(seed), mix or Mix()
    found: dict[str, dict[str, Any]] = {}
    while len(found) < n:
        turns = rng.choice((2, 2, 3, 4)) if rng.random() < mix.multi_turn else 1
        messages, request = draw_dialogue(rng, mix, turns, evaluation=evaluation, families=families)
        source = request.category if isinstance(request, Risk) else request.family.name
        kind = "risky" if isinstance(request, Risk) else "scary" if source == "scary_but_benign" else "helpful"
        record = {"prompt": messages[:-1], "is_safety": kind == "risky", "source": source, "kind": kind}
        found.setdefault(str(record["prompt"]), record)
    return list(found.values())


def draw_demonstrations(seed: int, n: int, mix: Mix | None = None) -> list[dict[str, Any]]:
    """`n` demonstration dialogues: two thirds of one exchange, most others of 2 to 4, one in 24 of 10 to 20."""
    rng = random.Random(seed)
    mix = mix or Mix(instructed=0.45)
    lengths = [1] * 16 + [2] * 4 + [3, 3, 4] + [0]
    dialogues = (draw_dialogue(rng, mix, rng.choice(lengths) or rng.randint(10, 20))[0] for _ in range(n))
    return [{"messages": messages, "source": "demonstrations"} for messages in dialogues]
