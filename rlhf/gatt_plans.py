"""What Ghost Attention dialogues are made of: user turns, instructions, their slot and wording.

User turns are drawn from single-turn prompts, or are those of dialogues that somebody had.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.chat import ChatFormat, ChatFormatError
from configs.errors import UserError
from configs.gatt_settings import GattSettings, InstructionSettings
from gatt.checkers import mentions
from gatt.instructions import check_kinds, draw_combinations, drawable, parse_instruction, sample_instructions
from gatt.kinds import DEFAULT_KINDS, Instruction, kind_named, values_of
from gatt.synth import Change, Plan, plan_dialogues

# Sources of the rows of a data set
GATT, INSTRUCTED, PLAIN, REPLAY = "gatt", "gatt_single_turn", "gatt_plain", "gatt_replay"

POOL = 1000  # instructions drawn at once, to choose other ones from

_FILE_SETTING = {"train": "values_file", "unseen": "unseen_values_file"}


def usable_prompts(prompts: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The single-turn prompts whose text can be a user turn anywhere, each text once, and counts of what was left out.

    Prompts of several turns (a later turn may refer to an earlier one), with a system message, or that already carry an
    instruction are left out.
    """
    usable: dict[str, dict[str, Any]] = {}
    counts = {"prompts_used": 0, "prompts_doubled": 0, "prompts_multi_turn": 0, "prompts_with_instruction": 0}
    for row in prompts:
        text = row["prompt"][-1]["content"].strip()
        if len(row["prompt"]) != 1:
            counts["prompts_multi_turn"] += 1
        elif parse_instruction(text):
            counts["prompts_with_instruction"] += 1
        elif text in usable:
            counts["prompts_doubled"] += 1
        else:
            usable[text] = row
    counts["prompts_used"] = len(usable)
    return list(usable.values()), counts


def usable_dialogues(rows: Sequence[dict[str, Any]], min_turns: int) -> tuple[list[list[str]], dict[str, int]]:
    """The user turns of the dialogue records that can be asked again, each dialogue once, and counts of what was left
    out.

    Left out are dialogues of fewer than `min_turns` user turns, with a system message (it could contradict the
    instruction) or with a turn that already carries an instruction.
    """
    found: dict[tuple[str, ...], None] = {}
    names = ("used", "doubled", "too_short", "with_system", "with_instruction")
    counts = {f"dialogues_{name}": 0 for name in names}
    for row in rows:
        turns = tuple(m["content"].strip() for m in row["messages"] if m["role"] == "user")
        if row["messages"][0]["role"] == "system":
            counts["dialogues_with_system"] += 1
        elif len(turns) < min_turns:
            counts["dialogues_too_short"] += 1
        elif any(parse_instruction(turn) for turn in turns):
            counts["dialogues_with_instruction"] += 1
        elif turns in found:
            counts["dialogues_doubled"] += 1
        else:
            found[turns] = None
    counts["dialogues_used"] = len(found)
    return [list(turns) for turns in found], counts


def draw_dialogues(dialogues: Sequence[list[str]], n: int, max_turns: int, rng: random.Random) -> list[list[str]]:
    """The first `max_turns` user turns of `n` different dialogues from `usable_dialogues`. UserError where there are
    fewer."""
    if len(dialogues) < n:
        raise UserError(
            f"dialogue_files: {len(dialogues)} usable dialogues (see the counts in the log) are fewer than "
            f"num_dialogues: {n}; lower it or min_turns, or add dialogues"
        )
    return [turns[:max_turns] for turns in rng.sample(list(dialogues), n)]


def first_turns(dialogues: Sequence[list[str]]) -> list[dict[str, Any]]:
    """Single-turn prompt records of the dialogues' first turns, each text once."""
    texts = dict.fromkeys(turns[0] for turns in dialogues)
    return [{"prompt": [{"role": "user", "content": text}], "is_safety": False} for text in texts]


def draw_user_turns(prompts: Sequence[dict[str, Any]], lengths: Sequence[int], rng: random.Random) -> list[list[str]]:
    """One list of user texts a dialogue, of the given lengths; no text stands twice in a dialogue.

    `prompts` are from `usable_prompts`. Raises UserError for a dialogue of zero turns, or fewer prompts than turns.
    """
    if not lengths or min(lengths) < 1:
        raise UserError("a dialogue of zero turns was asked for; give at least one turn")
    texts = [row["prompt"][0]["content"].strip() for row in prompts]
    if len(texts) < max(lengths):
        raise UserError(
            f"prompt_files: {len(texts)} different single-turn prompts without an instruction are too few for "
            f"dialogues of {max(lengths)} turns; add prompts or ask for fewer turns"
        )
    return [rng.sample(texts, n) for n in lengths]


def draw_turns_without_end(
    prompts: Sequence[dict[str, Any]], dialogues: int, max_length: int, rng: random.Random
) -> list[list[str]]:
    """For each dialogue more user texts than `max_length` tokens can hold.

    Every prompt comes once before one comes again. A turn takes four tokens at least: two of the chat format, one of
    the user, one of the reply.
    """
    wanted = max_length // 4 + 1
    passes = [draw_user_turns(prompts, [len(prompts)] * dialogues, rng) for _ in range(-(-wanted // len(prompts)))]
    return [[text for turns in each for text in turns][:wanted] for each in zip(*passes, strict=True)]


def _read_values(path: str, setting: str) -> dict[str, list[str]]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{setting}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or not values:
        raise UserError(f'{setting}: {path} must hold an object {{"kind": ["value", ...]}}')
    for name, entries in values.items():
        kind = kind_named(name)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{setting}: {path}: the values of kind '{name}' must be a list of strings")
        if not entries and kind.takes_value:
            raise UserError(
                f"{setting}: {path}: kind '{name}' has an empty list; give at least one value or leave it out"
            )
        for entry in entries:
            if fault := kind.fault(entry):
                raise UserError(f"{setting}: {path}: kind '{name}': the value {entry!r} {fault}")
    return values


def draw_instructions(settings: InstructionSettings, n: int, split: str, rng: random.Random) -> list[Instruction]:
    """`n` instructions of `split` ("train" or "unseen"), kinds in equal shares, from the values files where given.

    With `max_constraints` above 1 an instruction of the unseen values has at most as many constraints as its kinds
    allow, which may be fewer: kinds without a value cannot be held out.

    Raises:
        UserError: kinds that cannot be drawn (`gatt.instructions.check_kinds`), empty lists, a value that cannot be one
            of its kind (special tags among them), or a value that is both taught and "unseen".
    """
    files = {"train": settings.values_file, "unseen": settings.unseen_values_file}
    read = {name: _read_values(path, _FILE_SETTING[name]) for name, path in files.items() if path}
    kinds = settings.kinds if settings.kinds is not None else list(read.get(split, DEFAULT_KINDS))
    check_kinds(kinds, settings.max_constraints if split == "train" else 1)
    if "unseen" in read:
        lists = read.get("train") or {kind: list(values_of(kind, "train")) for kind in read["unseen"]}
        taught = {(kind, value.lower()) for kind, values in lists.items() for value in values}
        both = sorted(v for kind, values in read["unseen"].items() for v in values if (kind, v.lower()) in taught)
        if both:
            source = "values_file" if "train" in read else "the starter lists"
            raise UserError(f"unseen_values_file: {', '.join(both[:5])} also in {source}; a taught value is not unseen")
    if split == "unseen" and "train" in read and "unseen" not in read:
        raise UserError(
            "unseen_values_file: needed beside values_file, because the starter lists may hold taught values"
        )
    if split not in read:
        return sample_instructions(rng, n, split, kinds, settings.max_constraints)
    names, values = drawable(kinds, split), read[split]
    if missing := [name for name in names if kind_named(name).takes_value and name not in values]:
        raise UserError(f"{_FILE_SETTING[split]}: {files[split]} has no values of kind: {', '.join(missing)}")
    first = [names[i % len(names)] for i in range(n)]
    rng.shuffle(first)
    return draw_combinations(rng, first, {name: values.get(name, []) for name in names}, settings.max_constraints)


def check_encodable(instructions: Sequence[Instruction | None], chat_format: ChatFormat) -> None:
    """Raises UserError for an instruction that the model's chat format refuses, e.g. for a special token in it."""
    for instruction in dict.fromkeys(filter(None, instructions)):
        try:
            chat_format.encode_prompt([{"role": "user", "content": instruction.text}])
        except ChatFormatError as error:
            raise UserError(f"values_file: the instruction {instruction.text!r} cannot be given: {error}") from error


def draw_slot(settings: InstructionSettings, rng: random.Random) -> str:
    """Where turn 1 carries the instruction: "system" or "user"."""
    return "system" if rng.random() < settings.system_slot_share else "user"


def draw_wording(settings: InstructionSettings, instruction: Instruction, rng: random.Random) -> str:
    """The full or the shortened wording (paper: half of the cases)."""
    return instruction.short_text if rng.random() < settings.short_share else instruction.text


def make_plans(
    settings: GattSettings, prompts: Sequence[dict[str, Any]], seed: int, dialogues: Sequence[list[str]] | None = None
) -> list[tuple[Plan, str, str]]:
    """Every dialogue of the build as (plan, the wording to train with, source): a function of its arguments alone.

    The user turns are drawn from `prompts`; with `dialogues` (from `usable_dialogues`) those of several turns are
    theirs.

    Multi-turn dialogues first, those without an instruction last among them, then the single turns, so that a chunk's
    dialogues are of like length. With s = `replay_single_turn_share`, num_dialogues * s / (1 - s) single turns make
    the share s of all.
    """
    rng = random.Random(f"gatt plans {seed}")
    share, n = settings.replay_single_turn_share, settings.num_dialogues
    singles = round(n * share / (1 - share))
    plain, plain_dialogues = round(singles * settings.replay_plain_part), round(n * settings.plain_dialogue_share)
    sources = [GATT] * (n - plain_dialogues) + [PLAIN] * plain_dialogues
    sources += [INSTRUCTED] * (singles - plain) + [PLAIN] * plain
    lengths = [rng.randint(settings.min_turns, settings.max_turns) for _ in range(n)] + [1] * singles
    if dialogues is None:
        turns = draw_user_turns(prompts, lengths, rng)
    else:
        turns = draw_dialogues(dialogues, n, settings.max_turns, rng)
        turns += draw_user_turns(prompts, [1] * singles, rng) if singles else []
    given = iter(draw_instructions(settings, n - plain_dialogues + singles - plain, "train", rng))
    instructions = [None if source == PLAIN else next(given) for source in sources]
    plans = plan_dialogues(turns, instructions, [draw_slot(settings, rng) for _ in lengths])
    wordings = ["" if i is None else draw_wording(settings, i, rng) for i in instructions]
    # With draws of their own, so that plans without changes are the same whatever the share is.
    plans[: n - plain_dialogues] = change_some(settings, plans[: n - plain_dialogues], seed)
    return list(zip(plans, wordings, sources, strict=True))


def change_some(settings: GattSettings, plans: Sequence[Plan], seed: int) -> list[Plan]:
    """`plans` with a change of instruction in `change_share` of them, at a turn drawn from the second to the last.

    Plans of one turn stay as they are, and so do instructions without a value, such as a haiku; they do not count. Nor
    does an instruction change that no other one could take the place of. UserError where none of them could change.
    """
    rng = random.Random(f"gatt changes {seed}")
    old = long_ones(plans)
    able = [i for i, instruction in old.items() if any(part.value for part in instruction.constraints)]
    chosen = sorted(rng.sample(able, round(settings.change_share * len(able))))
    changed = list(plans)
    pool = draw_instructions(settings, max(POOL, len(chosen)), "train", rng) if chosen else []
    for i in chosen:
        turn, new = rng.randint(2, len(plans[i].user_turns)), other_of(old[i], pool, rng)
        if new is None:
            continue
        changed[i] = replace(plans[i], change=Change(turn, new, draw_wording(settings, new, rng)))
    if settings.change_share and long_ones(plans) and not any(plan.change for plan in changed):
        raise UserError(
            f"change_share: {settings.change_share}, but no instruction drawn can change: their kinds take no value, "
            "or the list has no other; add values or kinds"
        )
    return changed


def long_ones(plans: Sequence[Plan]) -> dict[int, Instruction]:
    """The instructions of the plans that have one and more than one turn, by place."""
    return {i: plan.instruction for i, plan in enumerate(plans) if len(plan.user_turns) > 1 and plan.instruction}


def draw_others(
    settings: InstructionSettings, old: Sequence[Instruction], split: str, rng: random.Random
) -> list[Instruction]:
    """For each instruction another one of its kind, as `other_of` draws it.

    Raises UserError where there is none.
    """
    pool = draw_instructions(settings, max(POOL, len(old)), split, rng) if old else []
    others = []
    for instruction in old:
        other = other_of(instruction, pool, rng)
        if other is None:
            raise UserError(
                f"change_turn: no other instruction can take the place of {instruction.text!r}: its kind takes no "
                f"value, or the {split} list has none that differs enough; add values or leave kind "
                f"'{instruction.kind}' out"
            )
        others.append(other)
    return others


def other_of(old: Instruction, pool: Sequence[Instruction], rng: random.Random) -> Instruction | None:
    """One of the pool, of the same kind, that can be obeyed while the old one is not; None where there is none."""
    choices = [each for each in pool if each.kind == old.kind and not implies(each, old)]
    return rng.choice(choices) if choices else None


def implies(new: Instruction, old: Instruction) -> bool:
    """True where whoever obeys `new` obeys `old` too, both of the same kind(s): the same value, fewer words than
    allowed before, or a name that holds the other's."""
    values = {part.kind: part.value for part in new.constraints}

    def kept(part: Instruction) -> bool:
        value = values[part.kind]
        if part.kind == "max_words":
            return int(value) <= int(part.value)
        return value == part.value or (part.kind in ("figure", "hobby") and mentions(part.value, value))

    return all(kept(part) for part in old.constraints)
