"""How long an instruction of the first turn holds: Table 30 with intervals, for values taught and never taught.

    accelerate launch rlhf/evaluate_gatt.py --model_name_or_path runs/gatt/model \\
        --baseline_model_name_or_path runs/ppo/model --prompt_files held_out.jsonl --output_dir runs/gatt-persistence

Each dialogue gives an instruction in its first turn only and then goes on with plain user turns; the policy reads back
its own replies. A turn counts as obeyed only if the reply obeys by the kind's checker and, with `answer_check: gold`,
also answers: the gold helpfulness of the reply, what only obeys left out, is at least `answer_threshold` of that of the
reply which the same policy gives at the same turn of the same user turns without the instruction (a dialogue of its
own replies, sampled with the same seeds). A dialogue that fills the context stops there; its later turns are reported
as missing. `num_turns: 0` plays every dialogue until then.

`change_turn: 10` plays the dialogues once more, with another instruction of the same kind in front of the user's text
at turn 10: how many replies obey it from there on, and how many still obey the first.

Helpfulness: the replies of the dialogues without an instruction, policy against baseline, by gold scores or by
`helpfulness_reward_model`; by gold scores also what is left of the replies under an instruction against those.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.gatt_settings import PersistenceSettings
from configs.model_settings import ModelSettings, RunSettings
from configs.records import read_prompts
from gatt.instructions import strip_obedience
from gatt.kinds import Instruction
from gatt.persistence import Observation, change_table, summarise
from rlhf import cli
from rlhf.gatt_plans import (
    check_encodable,
    draw_instructions,
    draw_others,
    draw_slot,
    draw_turns_without_end,
    draw_user_turns,
    draw_wording,
    usable_prompts,
)
from rlhf.persistence_dialogues import Gold, Opening, Played, as_messages, asked, no_instruction, observe, opening, play
from rlhf.persistence_helpfulness import Scorer, Scores, reward_scorer, score_played, shift
from rlhf.persistence_tables import table_30, tables
from rlhf.run import RunFolder, saved_settings, write_atomic

logger = logging.getLogger(__name__)

RANGES = ((1, 20), (2, 20), (6, 20))  # turns averaged over
PLAIN_SCORES = "plain_scores.json"  # of the trained policy's dialogues without an instruction
NOT_OF_THE_DIALOGUES = ("model_name_or_path", "baseline_model_name_or_path", "baseline_dir", "adapter_path")


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
    reward: Scorer | None = None,
) -> dict[str, Any]:
    """The persistence table of one policy.

    Args:
        user_turns: one list of user texts a dialogue; each text must stand on its own, as `draw_user_turns` gives them.
        instructions: one a dialogue, of values that were taught.
        unseen_instructions: the same of values never taught, for the same user turns.
        gold: helpfulness of a reply; needed where `settings.answer_check` is "gold".
        reward: scores of plain replies by a reward model.

    Returns:
        `gatt.persistence.summarise` of the taught values, {"1": share, ..., "20": share, "ci95": {...}, ...}, where
        `settings.change_turn` asks for it with `change_table` under "change"; the same of the others under "unseen".
        Of the dialogues without an instruction: the mean gold helpfulness under "gold_without_instruction", and every
        score under "plain_scores", {"gold" or "reward": by dialogue, by turn}. Under "helpfulness_under_instruction"
        how far gold scores of replies to "seen" and "unseen" instructions differ from those. Three dialogues of each
        under "samples".
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
    changes: dict[str, tuple[list[Instruction], random.Random]] = {}
    for name, split, given in (("seen", "train", instructions), ("unseen", "unseen", unseen_instructions)):
        if settings.change_turn and given is not None:  # before any work: a kind may have no other value
            rng = random.Random(f"gatt change {name} {seed}")
            changes[name] = draw_others(settings, given, split, rng), rng
            check_encodable(changes[name][0], chat_format)

    def played(openings: Sequence[Opening]) -> Played:
        return play(model, chat_format, tokenizer.pad_token_id, openings, user_turns, settings, seed)

    def golden(pairs: Sequence[tuple[str, str]]) -> list[float]:
        assert judged is not None
        return [judged(asked(user), reply) for user, reply in pairs]

    plain_scores: dict[str, Scores] = {}
    if judged or reward:
        reference = played([no_instruction] * len(user_turns))
        scorers = {"gold": golden if judged else None, "reward": reward}
        plain_scores = {name: score_played(scorer, user_turns, reference) for name, scorer in scorers.items() if scorer}
    plain_gold = plain_scores.get("gold", [])
    targets = [[settings.answer_threshold * score for score in scores] for scores in plain_gold]
    under_instruction: dict[str, Any] = {}

    def measure(given: Sequence[Instruction], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rng = random.Random(f"gatt persistence {name} {seed}")
        worded = [(draw_wording(settings, i, rng), draw_slot(settings, rng)) for i in given]
        openings = [opening(wording, slot) for wording, slot in worded]
        replies = played(openings)
        observations = observe(replies, user_turns, given, judged, targets)
        table = summarise(observations, *size(replies))
        if judged:
            answers = [[strip_obedience(i, text) for text in texts] for i, texts in zip(given, replies, strict=True)]
            under_instruction[name] = shift(plain_gold, score_played(golden, user_turns, answers))
        samples = _samples(name, openings, user_turns, replies, observations)
        if settings.change_turn:
            table["change"], more = measure_change(given, name, worded)
            samples += more
        return table, samples

    def measure_change(
        given: Sequence[Instruction], name: str, worded: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        (others, rng), change_turn = changes[name], settings.change_turn
        openings = [
            opening(wording, slot, (change_turn, draw_wording(settings, other, rng)))
            for (wording, slot), other in zip(worded, others, strict=True)
        ]
        replies = played(openings)
        new, old = (observe(replies, user_turns, each, judged, targets) for each in (others, given))
        turns, dialogues, _ = size(replies)
        if not any(o.turn >= change_turn for o in new):
            logger.warning("change_turn: no dialogue came to turn %d within max_length; not measured", change_turn)
            return None, []
        counted = [o for o in old if o.turn < change_turn] + [o for o in new if o.turn >= change_turn]
        samples = _samples(f"{name}, changed", openings, user_turns, replies, counted)
        return change_table(new, old, change_turn, turns, dialogues), samples

    def size(replies: Played) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """Turns that the table has, dialogues, and the ranges of turns to average over."""
        if settings.num_turns:
            return max(map(len, user_turns)), len(user_turns), RANGES
        turns = max(1, *map(len, replies))
        return turns, len(user_turns), tuple(dict.fromkeys((*RANGES, (1, turns))))

    summary, samples = measure(instructions, "seen")
    if unseen_instructions is not None:
        summary["unseen"], more = measure(unseen_instructions, "unseen")
        samples += more
    if scores := [score for dialogue in plain_gold for score in dialogue]:
        summary["gold_without_instruction"] = sum(scores) / len(scores)
    if under_instruction:
        summary["helpfulness_under_instruction"] = under_instruction
    return summary | {"samples": samples, "plain_scores": plain_scores}


def _samples(
    name: str,
    openings: Sequence[Opening],
    user_turns: Sequence[Sequence[str]],
    replies: Played,
    observations: Sequence[Observation],
) -> list[dict[str, Any]]:
    samples = []
    for d in range(min(3, len(replies))):
        plain = as_messages(user_turns[d], replies[d])
        counted = [o.counts for o in sorted(observations, key=lambda o: o.turn) if o.dialogue == d]
        samples.append({"values": name, "messages": openings[d](plain) if plain else [], "counted": counted})
    return samples


def simulated_gold() -> Gold:
    """Gold helpfulness of the simulated world."""
    from rlhf.simulation.world import gold_helpfulness

    return gold_helpfulness


def measured_before(folder: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Scores]]:
    """(table, plain scores) of the policy of a finished run on the same dialogues; UserError where they are others."""
    summary, theirs = RunFolder.completed(folder), saved_settings(folder)
    if summary is None or "trained" not in summary:
        raise UserError(f"baseline_dir: {folder} holds no finished run of evaluate_gatt.py")
    fields = [*PersistenceSettings.__dataclass_fields__, "chat_format", "seed", "data"]
    differ = [n for n in fields if n not in NOT_OF_THE_DIALOGUES and theirs.get(n) != settings.get(n)]
    if differ:
        raise UserError(f"baseline_dir: {folder} was measured with another {', '.join(differ)}; use the same settings")
    try:
        scores = json.loads(Path(folder, PLAIN_SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"baseline_dir: {folder}/{PLAIN_SCORES} cannot be read: {error}") from error
    return summary["trained"], scores


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure the policy, and the baseline where one is named; returns the summary."""
    settings, model_settings, run_settings = cli.parse(PersistenceSettings, ModelSettings, RunSettings, args=args)
    from rlhf.models import data_fingerprints

    resolved = {**asdict(settings), **asdict(model_settings), **asdict(run_settings)}
    values = [file for file in (settings.values_file, settings.unseen_values_file) if file]
    resolved["data"] = data_fingerprints(settings.prompt_files, values)
    if done := RunFolder.completed(run_settings.output_dir, resolved):
        return done
    if not settings.prompt_files:
        raise UserError("prompt_files: name at least one file of held-out prompt records")
    import torch
    from rich.console import Console

    from rlhf.models import load_policy
    from rlhf.tokenizer import load_tokenizer

    started = time.monotonic()
    policies = {"trained": model_settings.model_name_or_path}
    if settings.baseline_model_name_or_path:
        policies = {"baseline": settings.baseline_model_name_or_path, **policies}
    summary: dict[str, Any] = {"num_dialogues": settings.num_dialogues, "num_turns": settings.num_turns}
    plain: dict[str, dict[str, Scores]] = {}
    if settings.baseline_dir:
        summary["baseline"], plain["baseline"] = measured_before(settings.baseline_dir, resolved)
    device = "cuda" if torch.cuda.is_available() and not run_settings.use_cpu else "cpu"
    score_ids = load_reward(settings.helpfulness_reward_model, list(policies.values()), device)
    run = RunFolder(run_settings.output_dir, resolved, "evaluate_gatt")
    gold = simulated_gold() if settings.answer_check == "gold" else None

    rejected = Path(run_settings.output_dir, "rejected.jsonl")
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
        if settings.num_turns:
            user_turns = draw_user_turns(prompts, [settings.num_turns] * settings.num_dialogues, rng)
        else:
            user_turns = draw_turns_without_end(prompts, settings.num_dialogues, settings.max_length, rng)
        given = draw_instructions(settings, settings.num_dialogues, "train", rng)
        unseen = draw_instructions(settings, settings.num_dialogues, "unseen", rng) if settings.measure_unseen else None
        check_encodable([*given, *(unseen or [])], chat_format)
        model = load_policy(replace(model_settings, model_name_or_path=path), trainable=False).to(device)
        table = run_persistence(
            model, tokenizer, chat_format, user_turns, given, settings, unseen, gold, run_settings.seed,
            reward_scorer(score_ids, chat_format) if score_ids else None,
        )  # fmt: skip
        plain[name] = table.pop("plain_scores")
        run.samples(0, [{"policy": name, **sample} for sample in table.pop("samples")])
        for turn in range(1, 1 + max(int(t) for t in table if t.isdigit())):
            shares = {f"{name}/seen": table[str(turn)], f"{name}/unseen": table.get("unseen", {}).get(str(turn))}
            run.log(turn, {key: share for key, share in shares.items() if share is not None})
        summary |= {name: table, **prompt_counts}
        del model
    if "baseline" in plain:
        summary["helpfulness_change"] = {
            name: shift(plain["baseline"][name], scores) for name, scores in plain["trained"].items()
        }
    write_atomic(Path(run_settings.output_dir, PLAIN_SCORES), json.dumps(plain["trained"]))
    summary["table_30"] = table_30(summary)
    console = Console()
    for each in tables(summary):
        console.print(each.rich(), each.note, "")
    summary["seconds"] = round(time.monotonic() - started, 1)
    return run.finish(summary)


def load_reward(path: str | None, policies: Sequence[str], device: str) -> Callable[[list[list[int]]], Any] | None:
    """Scores by the reward model at `path`, which must read ids as the policies do; None for no path."""
    if path is None:
        return None
    from reward.model import load_reward_model
    from reward.scorer import score_ids
    from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

    model = load_reward_model(path).to(device)
    for policy in policies:
        check_same_tokenizer(load_tokenizer(policy), path, "helpfulness_reward_model")
    return lambda ids: score_ids(model, ids).tolist()


if __name__ == "__main__":
    cli.entry(main)
