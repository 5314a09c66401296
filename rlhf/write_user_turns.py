"""User turns for Ghost Attention dialogues, written by a model itself.

    accelerate launch rlhf/write_user_turns.py --config configs/llama2_7b_user_turns.yaml

Then `rlhf/build_gatt.py --prompt_files <output_dir>/prompts.jsonl`, for whoever has no prompts, or none like what the
policy will be asked. Every wording of a question is answered `samples_per_question` times for each topic, and each line
of an answer is read as a turn (`gatt.user_turns`); lines that give none are set aside with the reason, and turns with
the same letters and digits are one.

Writes prompts.jsonl (prompt records with their topic), answers.jsonl and rejected.jsonl. A list is some hundreds of
answers, so a killed run starts again.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
from collections import Counter
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from configs.chat import ChatFormatError, load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.records import write_jsonl
from configs.user_turns_settings import UserTurnsSettings
from gatt.user_turns import QUESTIONS, TOPICS, different, questions, read_turns
from rlhf.asking import ask
from rlhf.cli import entry, parse
from rlhf.engines import load_engine
from rlhf.run import RunFolder
from rlhf.shards import weights_stamp
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Writes the prompts; returns the summary. UserError where the model writes too few usable turns."""
    settings, model, run = parse(UserTurnsSettings, ModelSettings, RunSettings, args=args)
    resolved: Row = asdict(settings) | asdict(model) | asdict(run)
    resolved |= {"weights": weights_stamp(model.model_name_or_path)}
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    state = PartialState(cpu=run.use_cpu)
    if state.num_processes > 1:
        raise UserError("a list is some hundreds of answers: start it with --num_processes 1")
    folder = RunFolder(run.output_dir, resolved, stage="write_user_turns")
    tokenizer = load_tokenizer(model.model_name_or_path)
    chat = load_chat_format(tokenizer, model.chat_format)
    engine = load_engine(settings, model, tokenizer, chat, state.device, settings, settings.token_budget)

    answers: list[Row] = []
    rejected: list[Row] = []
    found: dict[str, str] = {}  # turn -> topic, in the order of the answers
    lines = 0
    k = settings.samples_per_question
    for number, topic in enumerate(tqdm(dict.fromkeys(settings.topics or TOPICS), desc="user turns", unit="topic")):
        asked = [question for _, question in questions([topic], settings.turns_per_answer)]
        first = number * len(QUESTIONS) * k  # so that each topic draws by seeds of its own
        rows = ask(asked, k, engine, chat, settings, run.seed, first, settings.max_failed_share)
        for row in rows:
            for line in read_turns(row["answer"], row["finished"], settings.min_turn_words, settings.max_turn_words):
                lines += 1
                reason = line.reason or refused(chat, line.value)
                if reason:
                    rejected.append({"topic": topic, "line": line.line, "reason": reason})
                else:
                    found.setdefault(line.value, topic)
        answers += [{"topic": topic} | row for row in rows]
    turns = different(found)
    write_jsonl(folder.path / "answers.jsonl", answers)
    write_jsonl(folder.path / "rejected.jsonl", rejected)
    reasons = Counter(row["reason"] for row in rejected)
    if len(turns) < settings.min_turns:
        shown = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common(3)) or "no lines at all"
        raise UserError(
            f"the model wrote {len(turns)} different usable turns in {len(answers)} answers, fewer than min_turns: "
            f"{settings.min_turns}. Lines set aside: {shown}; all are in {folder.path / 'rejected.jsonl'}. Take a "
            "model that follows instructions, raise samples_per_question, or name more topics"
        )
    if settings.max_turns:
        chosen = set(random.Random(f"user turns {run.seed}").sample(turns, min(settings.max_turns, len(turns))))
        turns = [turn for turn in turns if turn in chosen]
    prompts = [
        {"prompt": [{"role": "user", "content": turn}], "is_safety": False, "source": "model", "topic": found[turn]}
        for turn in turns
    ]
    write_jsonl(folder.path / "prompts.jsonl", prompts)
    summary: Row = {
        "answers": len(answers), "lines": lines, "doubles": lines - len(rejected) - len(different(found)),
        "prompts": len(prompts), "by_topic": dict(Counter(row["topic"] for row in prompts)),
        "rejected": dict(reasons.most_common()),
    }  # fmt: skip
    folder.samples(0, prompts[:8])
    folder.log(0, {"prompts": len(prompts), "rejected": len(rejected)})
    return folder.finish(summary)


def refused(chat: Any, turn: str) -> str:
    """Why the chat format does not take a turn; "" where it does: its special tokens differ from model to model."""
    try:
        chat.encode_prompt([{"role": "user", "content": turn}])
    except ChatFormatError:
        return "holds a special token of the chat format"
    return ""


if __name__ == "__main__":
    entry(main)
