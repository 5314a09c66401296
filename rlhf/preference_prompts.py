"""Prompts for sampling, PPO and evaluation out of preference data such as HH-RLHF, which tag none of them.

    accelerate launch rlhf/preference_prompts.py --model_name_or_path <model> --output_dir runs/prompts \\
        --helpfulness_files Anthropic/hh-rlhf:helpful-base --helpfulness_test_files Anthropic/hh-rlhf:helpful-base \\
        --safety_files Anthropic/hh-rlhf:harmless-base --safety_test_files Anthropic/hh-rlhf:harmless-base

Preference rows can stand in `prompt_files` as they are, but then all prompts count as helpfulness prompts, dialogues
that share their beginning come several times, and nothing keeps what is trained on out of what is tested. Here

1. a prompt of `safety_files` is tagged `is_safety`: coarse, since not every prompt of a red team calls for harm;
2. of all dialogues with the same first user turn one is kept;
3. a test prompt whose first user turn is also in a training file, of either kind, is left out;
4. both kinds come in turn, drawn by the seed, so that the first n prompts of a file are of both alike.

Writes prompts.jsonl, validation_prompts.jsonl (which choose a checkpoint) and evaluation_prompts.jsonl (which choose
nothing).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.preference_prompts_settings import PreferencePromptsSettings
from configs.records import first_user_turn, read_prompts, write_jsonl
from rlhf.cli import entry, parse
from rlhf.models import data_fingerprints
from rlhf.run import RunFolder
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]


def draw(rows: Sequence[Row], seen: Collection[str], seed: str) -> list[Row]:
    """One row, drawn by the seed, of all that share a first user turn, in a drawn order; none of those in `seen`."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    by_turn = {first_user_turn(row): row for row in shuffled}
    return [row for turn, row in by_turn.items() if turn not in seen]


def in_turn(helpfulness: Sequence[Row], safety: Sequence[Row]) -> list[Row]:
    """Both kinds in turn, as many of each as the smaller has; all of the first where there is no second."""
    if not safety:
        return list(helpfulness)
    return [row for pair in zip(helpfulness, safety, strict=False) for row in pair]


def read(settings: PreferencePromptsSettings, chat: ChatFormat, split: str, counts: dict[str, int]) -> list[list[Row]]:
    """[helpfulness rows, safety rows] of one split, tagged, bad rows aside; how many there are goes to `counts`."""
    ending = "_test_files" if split == "test" else "_files"
    options: Row = {"max_reject_share": settings.max_reject_share, "chat_format": chat, "split": split}
    options["reject_file"] = Path(settings.output_dir) / f"rejected-{split}.jsonl"
    kinds: list[list[Row]] = []
    for kind in ("helpfulness", "safety"):
        rows = [row for path in getattr(settings, kind + ending) for row in read_prompts(path, **options).rows]
        kinds.append([{"prompt": r["prompt"], "is_safety": kind == "safety", "source": r["source"]} for r in rows])
        counts[f"{split}_{kind}"] = len(rows)
    return kinds


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Writes the files; returns the summary. UserError where too few held-out prompts are left."""
    (settings,) = parse(PreferencePromptsSettings, args=args)
    files = [*settings.helpfulness_files, *settings.safety_files]
    test_files = [*settings.helpfulness_test_files, *settings.safety_test_files]
    resolved = {**asdict(settings), "data": data_fingerprints(files, test_files)}
    if completed := RunFolder.completed(settings.output_dir, resolved):
        return completed
    run = RunFolder(settings.output_dir, resolved, "preference_prompts")
    chat = load_chat_format(load_tokenizer(settings.model_name_or_path), settings.chat_format)
    counts: dict[str, int] = {}
    train, test = (read(settings, chat, split, counts) for split in ("train", "test"))

    def fitting(rows: list[Row], split: str) -> list[Row]:
        short = [row for row in rows if len(chat.encode_prompt(row["prompt"])) <= settings.max_prompt_tokens]
        counts[f"{split}_too_long"] = counts.get(f"{split}_too_long", 0) + len(rows) - len(short)
        return short

    trained_on = {first_user_turn(row) for rows in train for row in rows}  # reward models take the long ones too
    prompts = in_turn(*(draw(fitting(rows, "train"), (), f"{settings.seed}/train") for rows in train))
    held_out = in_turn(*(draw(fitting(rows, "test"), trained_on, f"{settings.seed}/test") for rows in test))
    wanted = settings.num_validation + settings.num_evaluation
    if not prompts or len(held_out) < wanted:
        raise UserError(
            f"num_validation + num_evaluation: {wanted} held-out prompts wanted, {len(held_out)} are left, and "
            f"{len(prompts)} to train on; lower them, raise max_prompt_tokens or name more files ({counts})"
        )
    written = {
        "prompts": prompts[: settings.num_prompts or None],
        "validation_prompts": held_out[: settings.num_validation],
        "evaluation_prompts": held_out[settings.num_validation : wanted],
    }
    for name, rows in written.items():
        write_jsonl(Path(settings.output_dir) / f"{name}.jsonl", rows)
    counts |= {name: len(rows) for name, rows in written.items()}
    run.log(0, counts)
    return run.finish(counts)


if __name__ == "__main__":
    entry(main)
