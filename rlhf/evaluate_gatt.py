"""How long an instruction of the first turn holds: Table 30 with intervals, for values taught and never taught.

    accelerate launch rlhf/evaluate_gatt.py --model_name_or_path runs/gatt/model \\
        --baseline_model_name_or_path runs/ppo/model --prompt_files held_out.jsonl --output_dir runs/gatt-persistence

Each dialogue gives an instruction in its first turn only and then goes on with plain user turns; the policy reads back
its own replies. A turn counts as obeyed only if the reply obeys by the kind's checker and, with `answer_check: gold`,
also answers: the gold helpfulness of the reply, what only obeys left out, is at least `answer_threshold` of that of the
reply which the same policy gives at the same turn of the same user turns without the instruction (a dialogue of its
own replies, sampled with the same seeds). A dialogue that fills the context stops there; its later turns are reported
as missing.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.gatt_settings import PersistenceSettings
from configs.model_settings import ModelSettings, RunSettings
from configs.records import read_prompts
from configs.sampling_settings import SamplingSettings
from gatt.instructions import obeys, strip_obedience
from gatt.kinds import Instruction
from gatt.persistence import Observation, summarise
from gatt.synth import Draft
from gatt.transform import Message, training_dialogue
from rlhf import cli
from rlhf.gatt_plans import draw_instructions, draw_slot, draw_user_turns, draw_wording, usable_prompts
from rlhf.run import RunFolder

RANGES = ((1, 20), (2, 20), (6, 20))  # turns averaged over
Gold = Callable[[list[Message], str], float]  # (dialogue that ends with the user's message, reply) -> [0, 1]
Played = list[list[str]]  # replies by dialogue, by turn; a dialogue that filled the context has fewer


def play(
    model: Any,
    chat_format: ChatFormat,
    pad_id: int,
    openings: Sequence[Callable[[list[Message]], list[Message]]],
    user_turns: Sequence[Sequence[str]],
    settings: PersistenceSettings,
    seed: int,
) -> Played:
    """Plays every dialogue to its end or to the context limit; `openings[d]` puts dialogue d's instruction into turn
    1.
    """
    from rlhf.dialogues import DialogueEngine

    sampling = SamplingSettings(
        temperature=settings.eval_temperature, top_p=settings.eval_top_p, max_new_tokens=settings.eval_max_new_tokens
    )
    engine = DialogueEngine(model, chat_format, pad_id, sampling, settings.max_length, seed)
    plain: list[list[Message]] = [[] for _ in user_turns]
    rows = list(range(len(user_turns)))
    for turn in range(max(map(len, user_turns))):
        rows = [d for d in rows if turn < len(user_turns[d])]
        for d in rows:
            plain[d].append({"role": "user", "content": user_turns[d][turn]})
        drafts: list[Draft] = engine(rows, [openings[d](plain[d]) for d in rows]) if rows else []
        for d, draft in zip(list(rows), drafts, strict=True):
            if draft.problem == "too_long":
                plain[d].pop()
                rows.remove(d)
            else:  # a reply that was cut at its limit is a reply: the checks judge it as it stands
                plain[d].append({"role": "assistant", "content": draft.text})
    return [[m["content"] for m in messages[1::2]] for messages in plain]


def observe(
    replies: Played,
    user_turns: Sequence[Sequence[str]],
    instructions: Sequence[Instruction],
    gold: Gold | None = None,
    targets: Sequence[Sequence[float]] = (),
) -> list[Observation]:
    """Judges every reply: the kind's checker, and with `gold` whether what is left of it reaches its target.

    `targets[d][t]`: the least gold score for dialogue d at turn t + 1; a turn without one is missing.
    """
    observations = []
    for d, (texts, instruction) in enumerate(zip(replies, instructions, strict=True)):
        for t, text in enumerate(texts if gold is None else texts[: len(targets[d])]):
            # The margin: 0.7 x 1.0 and a gold score of 0.7 must not differ by rounding.
            answers = gold is None or (
                gold(asked(user_turns[d][t]), strip_obedience(instruction, text)) >= targets[d][t] - 1e-9
            )
            observations.append(Observation(d, t + 1, instruction.kind, obeys(instruction, text), answers))
    return observations


def asked(user_text: str) -> list[Message]:
    """What an answer is judged by: its own user turn, without instruction and history (turns stand on their own)."""
    return [{"role": "user", "content": user_text}]


def run_persistence(
    model: Any,
    tokenizer: Any,
    chat_format: ChatFormat,
    user_turns: Sequence[Sequence[str]],
    instructions: Sequence[Instruction],
    settings: PersistenceSettings,
    unseen_instructions: Sequence[Instruction] | None = None,
    gold: Gold | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The persistence table of one policy.

    Args:
        user_turns: one list of user texts a dialogue; each text must stand on its own, as `draw_user_turns` gives them.
        instructions: one a dialogue, of values that were taught.
        unseen_instructions: the same of values never taught, for the same user turns.
        gold: helpfulness of a reply; needed where `settings.answer_check` is "gold".

    Returns:
        `gatt.persistence.summarise` of the taught values, {"1": share, ..., "20": share, "ci95": {...}, ...}, with the
        same of the others under "unseen", the mean gold helpfulness of the plain dialogues under
        "gold_without_instruction", and three dialogues of each under "samples".
    """
    if not user_turns:
        raise UserError("num_dialogues is 0; persistence needs at least one dialogue")
    for name, given in (("instructions", instructions), ("unseen instructions", unseen_instructions)):
        if given is not None and len(given) != len(user_turns):
            raise UserError(f"{len(given)} {name} for {len(user_turns)} dialogues; give one a dialogue")
    if empty := [d for d, turns in enumerate(user_turns) if not turns]:
        raise UserError(f"dialogue {empty[0]} has zero user turns; give at least one")
    if settings.answer_check == "gold" and gold is None:
        raise UserError("answer_check is gold, but there is no gold score for this data; use answer_check: none")
    judged = gold if settings.answer_check == "gold" else None
    turns = max(map(len, user_turns))

    def played(openings: Sequence[Callable[[list[Message]], list[Message]]]) -> Played:
        return play(model, chat_format, tokenizer.pad_token_id, openings, user_turns, settings, seed)

    plain_gold: list[list[float]] = []
    if judged:
        reference = played([lambda messages: messages] * len(user_turns))
        plain_gold = [[judged(asked(u), r) for u, r in zip(*pair)] for pair in zip(user_turns, reference, strict=True)]
    targets = [[settings.answer_threshold * score for score in scores] for scores in plain_gold]

    def measure(given: Sequence[Instruction], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rng = random.Random(f"gatt persistence {name} {seed}")
        worded = [(draw_wording(settings, i, rng), draw_slot(settings, rng)) for i in given]
        openings = [_opening(wording, slot) for wording, slot in worded]
        replies = played(openings)
        observations = observe(replies, user_turns, given, judged, targets)
        table = summarise(observations, turns, len(user_turns), RANGES)
        samples = []
        for d in range(min(3, len(replies))):
            plain = [m for user, reply in zip(user_turns[d], replies[d])
                     for m in ({"role": "user", "content": user}, {"role": "assistant", "content": reply})]  # fmt: skip
            counted = [o.counts for o in observations if o.dialogue == d]
            samples.append({"values": name, "messages": openings[d](plain) if plain else [], "counted": counted})
        return table, samples

    summary, samples = measure(instructions, "seen")
    if unseen_instructions is not None:
        summary["unseen"], more = measure(unseen_instructions, "unseen")
        samples += more
    if scores := [score for dialogue in plain_gold for score in dialogue]:
        summary["gold_without_instruction"] = sum(scores) / len(scores)
    return summary | {"samples": samples}


def _opening(wording: str, slot: str) -> Callable[[list[Message]], list[Message]]:
    return lambda messages: training_dialogue(messages, wording, slot)


def simulated_gold() -> Gold:
    """Gold helpfulness of the simulated world."""
    from rlhf.simulation.world import gold_helpfulness

    return gold_helpfulness


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure the policy, and the baseline where one is named; returns the summary."""
    settings, model_settings, run_settings = cli.parse(PersistenceSettings, ModelSettings, RunSettings, args=args)
    resolved = {**asdict(settings), **asdict(model_settings), **asdict(run_settings)}
    if done := RunFolder.completed(run_settings.output_dir, resolved):
        return done
    if not settings.prompt_files:
        raise UserError("prompt_files: name at least one file of held-out prompt records")
    import torch

    from rlhf.models import load_policy
    from rlhf.tokenizer import load_tokenizer

    started = time.monotonic()
    run = RunFolder(run_settings.output_dir, resolved, "evaluate_gatt")
    device = "cuda" if torch.cuda.is_available() and not run_settings.use_cpu else "cpu"
    policies = {"trained": model_settings.model_name_or_path}
    if settings.baseline_model_name_or_path:
        policies = {"baseline": settings.baseline_model_name_or_path, **policies}
    gold = simulated_gold() if settings.answer_check == "gold" else None

    rejected = Path(run_settings.output_dir, "rejected.jsonl")
    summary: dict[str, Any] = {"num_dialogues": settings.num_dialogues, "num_turns": settings.num_turns}
    for name, path in policies.items():
        tokenizer = load_tokenizer(path)
        chat_format = load_chat_format(tokenizer, model_settings.chat_format)
        read = [
            read_prompts(
                file, max_reject_share=settings.max_reject_share, chat_format=chat_format, reject_file=rejected
            ).rows
            for file in settings.prompt_files
        ]
        prompts, prompt_counts = usable_prompts([row for rows in read for row in rows])
        # Drawn anew from the seed for each policy: both are measured on the same dialogues.
        rng = random.Random(f"gatt persistence {run_settings.seed}")
        user_turns = draw_user_turns(prompts, [settings.num_turns] * settings.num_dialogues, rng)
        given = draw_instructions(settings, settings.num_dialogues, "train", rng)
        unseen = draw_instructions(settings, settings.num_dialogues, "unseen", rng) if settings.measure_unseen else None
        model = load_policy(replace(model_settings, model_name_or_path=path), trainable=False).to(device)
        table = run_persistence(
            model, tokenizer, chat_format, user_turns, given, settings, unseen, gold, run_settings.seed
        )  # fmt: skip
        run.samples(0, [{"policy": name, **sample} for sample in table.pop("samples")])
        for turn in range(1, settings.num_turns + 1):
            shares = {f"{name}/seen": table[str(turn)], f"{name}/unseen": table.get("unseen", {}).get(str(turn))}
            run.log(turn, {key: share for key, share in shares.items() if share is not None})
        summary |= {name: table, **prompt_counts}
        del model
    summary["seconds"] = round(time.monotonic() - started, 1)
    return run.finish(summary)


if __name__ == "__main__":
    cli.entry(main)
