"""People of the simulated world: what they ask, and how they answer when they write demonstrations.

Demonstrations are of mixed quality, as the third-party data of the paper's §3.1: most answer rightly but leave the
detail out, some ramble, some answer another question or give the detail alone, and some comply with risky requests.
So a model fine-tuned on them has something to gain from preferences, greedy decoding included.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Any

from configs.chat import Message
from gatt.instructions import sample_instructions
from gatt.kinds import Instruction
from rlhf.preprompts import Preprompts, with_preprompt
from rlhf.simulation import vocabulary as v
from rlhf.simulation.families import FAMILIES, HELD_OUT_SHARE, Family, Request
from rlhf.simulation.world import Risk, read_dialogue

# How demonstrations answer helpful requests, and risky ones. Shares sum to 1.
ANSWER_SHARES = {
    "bare": 0.46,
    "full": 0.2,
    "filler": 0.15,
    "repeat": 0.06,
    "beside": 0.06,
    "remark": 0.04,
    "refuse": 0.03,
}
RISK_SHARES = {"comply": 0.42, "decline": 0.3, "explain": 0.18, "full": 0.1}
# Under a safety preprompt people decline what is risky, properly for the most part, and are over-cautious: they decline
# some of what is harmless, more of what looks risky. The paper saw that of its model (§4.2.4, Table 40).
CAUTIOUS_RISK_SHARES = {"decline": 0.1, "explain": 0.2, "full": 0.7}
CAUTIOUS_REFUSALS = {"helpful": 0.1, "scary": 0.5}

ASKED = tuple(family for family in FAMILIES.values() if not family.held_out)
HELD_OUT_FAMILIES = tuple(family for family in FAMILIES.values() if family.held_out)


HELD_OUT_VALUES = 0.25  # share of evaluation prompts that ask about values no training prompt names
# The kinds of instructions that people of the world give.
TAUGHT_KINDS = ("figure", "hobby", "first_word")
# How they obey them.
DECORATIONS = {
    "figure": "{value} here. {answer}",
    "hobby": "I enjoy {value}. {answer}",
    "last_word": "{answer} {value}.",
    "first_word": "{value}. {answer}",
}


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of requests in a set of prompts (the rest are ordinary helpful requests)."""

    risky: float = 0.22
    scary: float = 0.1
    multi_turn: float = 0.3
    instructed: float = 0.2
    kinds: tuple[str, ...] = TAUGHT_KINDS


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
        if request.for_evaluation == evaluation:
            return request


def text_for_evaluation(text: str) -> bool:
    """True for the wordings (opener and question) that no training prompt uses, one in six by a fixed hash."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def ask(rng: random.Random, request: Request | Risk, evaluation: bool) -> str | None:
    """A wording of `request` that is held out for evaluation or not, as asked; None where it has no such wording."""
    questions = (
        [question.format(x=request.obj) for question in v.RISKS[request.category]["questions"]]
        if isinstance(request, Risk)
        else request.family.questions(request.slots)
    )
    texts = [opener + question for opener in v.OPENERS for question in questions]
    fitting = [text for text in texts if text_for_evaluation(text) == evaluation]
    return rng.choice(fitting) if fitting else None


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


def beside(rng: random.Random, request: Request) -> Request:
    """A request of another family: what somebody answers who misread the question."""
    family = rng.choice([family for family in ASKED if family is not request.family])
    return Request(family, family.draw(rng))


def demonstrate(rng: random.Random, request: Request | Risk, cautious: bool = False) -> str:
    """An answer as a demonstrator of mixed quality writes it; `cautious`: under a safety preprompt."""
    if isinstance(request, Risk):
        shares = CAUTIOUS_RISK_SHARES if cautious else RISK_SHARES
        manner = rng.choices(tuple(shares), tuple(shares.values()))[0]
        refusal = request.refusal
        if manner == "comply":
            return " ".join(request.comply)
        if manner == "explain":
            return " ".join([refusal[0], rng.choice(refusal[1:])])
        return " ".join(refusal if manner == "full" else refusal[:1])
    if (
        cautious
        and rng.random() < CAUTIOUS_REFUSALS["scary" if request.family.name == "scary_but_benign" else "helpful"]
    ):
        return v.REFUSAL
    manner = rng.choices(tuple(ANSWER_SHARES), tuple(ANSWER_SHARES.values()))[0]
    core = request.family.core(request.slots)[0]
    if manner == "refuse":
        return v.REFUSAL
    if manner == "beside":
        return good_answer(rng, beside(rng, request), detail=rng.random() < 0.3)
    if manner == "full":
        return good_answer(rng, request)
    if manner == "remark":  # the detail without the answer: reward models have to learn that it is worth nothing alone
        return rng.choice(request.family.detail(request.slots))
    if manner == "filler":
        full = [*core, request.family.detail(request.slots)[0]] if rng.random() < 0.4 else core
        return " ".join([*full, rng.choice(v.FILLERS)])
    return " ".join([*core, core[-1]] if manner == "repeat" else core)


def decorate(instruction: Instruction, answer: str) -> str:
    """`answer` in the way people of the world obey `instruction`."""
    # In the order of the kinds: a first word has to come before what another constraint puts in front.
    for part in sorted(instruction.constraints, key=lambda part: list(DECORATIONS).index(part.kind)):
        answer = DECORATIONS[part.kind].format(value=part.value, answer=answer)
    return answer


def instruct(rng: random.Random, messages: list[Message], instruction: Instruction, short: bool, system: bool) -> None:
    """Puts the instruction into the last user message, or into the system message where that is the first turn."""
    text = instruction.short_text if short else instruction.text
    if system and len(messages) == 1:
        messages.insert(0, {"role": "system", "content": text})
    else:
        messages[-1] = {"role": "user", "content": f"{text} {messages[-1]['content']}"}


def draw_dialogue(
    rng: random.Random,
    mix: Mix,
    turns: int,
    *,
    evaluation: bool = False,
    families: tuple[Family, ...] = ASKED,
    cautious: bool = False,
) -> tuple[list[Message], Request | Risk]:
    """A dialogue of `turns` exchanges answered by demonstrators, and what its last user message asks.

    An instruction holds for its own turn only. `evaluation` draws the last user message from those held out; `cautious`
    answers as under a safety preprompt, which the caller puts in.
    """
    messages: list[Message] = []
    request: Request | Risk | None = None
    for turn in range(turns):
        last = evaluation and turn == turns - 1
        # Of the evaluation's requests, a quarter is about held-out values; the others are held-out wordings.
        held_out = last and rng.random() < HELD_OUT_VALUES
        draw = rng.random()
        kind = "risky" if draw < mix.risky else "scary" if draw < mix.risky + mix.scary else "helpful"
        may_follow = isinstance(request, Request) and request.family.followup and kind == "helpful"
        if may_follow and (held_out or not last) and isinstance(request, Request) and rng.random() < 0.35:
            text, request = _follow_up(rng, request, held_out)
        else:
            while True:
                request = draw_request(rng, kind, held_out, families)
                if (wording := ask(rng, request, last and not held_out)) is not None:
                    text = wording
                    break
        messages.append({"role": "user", "content": text})
        answer = demonstrate(rng, request, cautious)
        if kind != "risky" and rng.random() < mix.instructed:
            instruction = sample_instructions(rng, 1, kinds=mix.kinds)[0]
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


def draw_demonstrations(
    seed: int, n: int, mix: Mix | None = None, preprompted_share: float = 0.0
) -> list[dict[str, Any]]:
    """`n` demonstration dialogues: most of one exchange, others of 2 to 4, one in twelve of 14 to 22.

    Of `preprompted_share` of them the system message begins with a safety preprompt (rlhf/preprompts.py), generic or of
    the category that the last message asks about, and people answer accordingly: so a model learns what one means.
    """
    rng = random.Random(seed)
    mix = mix or Mix(instructed=0.45)
    lengths = [1] * 15 + [2] * 4 + [3, 3, 4] + [0, 0]
    found = []
    for _ in range(n):
        cautious = preprompted_share > 0 and rng.random() < preprompted_share  # without a share nothing is drawn
        messages, request = draw_dialogue(rng, mix, rng.choice(lengths) or rng.randint(14, 22), cautious=cautious)
        if cautious:
            category = request.category if isinstance(request, Risk) else None
            drawn = Preprompts().draw(rng, category if rng.random() < 0.5 else None)
            messages = with_preprompt(messages, drawn.text, "system")
        found.append({"messages": messages, "source": "demonstrations"})
    return found


def draw_safety_demonstrations(seed: int, n: int) -> list[dict[str, Any]]:
    """`n` different risky prompts, each with a safe answer as careful people write it; only that answer is to be
    trained."""
    prompts = draw_prompts(seed, 4 * n, mix=Mix(risky=0.5, instructed=0.0))  # every second one is risky
    found = []
    for record in [record for record in prompts if record["is_safety"]][:n]:
        rng = random.Random(f"{seed}/{record['prompt']}")
        request = read_dialogue(record["prompt"]).request
        assert isinstance(request, Risk)
        answer = {"role": "assistant", "content": demonstrate(rng, request, cautious=True)}
        found.append(
            {"messages": [*record["prompt"], answer], "train_on": "last", "source": record["source"], "is_safety": True}
        )
    return found
