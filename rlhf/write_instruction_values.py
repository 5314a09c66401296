"""Lists of hobbies, public figures and other values of instructions, written by the policy itself (App. A.3.5).

    accelerate launch rlhf/write_instruction_values.py --config configs/llama2_7b_instruction_values.yaml

Then `rlhf/build_gatt.py --values_file <output_dir>/values.json`, and `rlhf/evaluate_gatt.py` with the same and
`--unseen_values_file <output_dir>/unseen_values.json`. The paper gives neither questions nor numbers; here

1. every wording of a question is answered `samples_per_question` times, and each line of an answer is read as a value;
2. values that differ in case, accents, hyphens, articles or plural are one (`gatt.value_lists.same`);
3. lines that give no value that the kind could check are set aside, with the reason;
4. a seeded share of the values is never to be taught.

Writes values.json and unseen_values.json, both {kind: [values]}, the most named first; counts.json with how many
answers name each; answers.jsonl and rejected.jsonl. A list is some dozens of answers, so a killed run starts again.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
import random
from collections import Counter
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.instruction_values_settings import InstructionValuesSettings
from configs.model_settings import ModelSettings, RunSettings
from configs.records import write_jsonl
from gatt.kinds import Kind, kind_named
from gatt.value_lists import QUESTIONS, Line, check_listed, count_values, read_answer, split_values, told_apart
from rlhf.asking import ask
from rlhf.cli import entry, parse
from rlhf.engines import load_engine
from rlhf.run import RunFolder, write_atomic
from rlhf.samples import Engine
from rlhf.shards import weights_stamp
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]


def ask_for(kind: Kind, engine: Engine, chat: ChatFormat, settings: InstructionValuesSettings, seed: int) -> list[Row]:
    """The answers to every wording of the question, as {"kind", "question", "answer", "finished"}."""
    k = settings.samples_per_question
    questions = [question.format(n=settings.values_per_answer) for question in QUESTIONS[kind.name]]
    # Seeds of its own for each kind, whatever other kinds are asked for.
    first = list(QUESTIONS).index(kind.name) * max(map(len, QUESTIONS.values())) * k
    rows = ask(questions, k, engine, chat, settings, seed, first, settings.max_failed_share)
    return [{"kind": kind.name} | row for row in rows]


def choose(
    kind: Kind, answers: list[list[Line]], settings: InstructionValuesSettings
) -> tuple[dict[str, int], list[Row]]:
    """(kept values and how many answers name each, rejects with reason and number), the most frequent first."""
    counted = count_values(kind, answers)
    often = [value for value, count in counted.items() if count >= settings.min_count]
    kept = often[: settings.max_values or None]
    aside = Counter((line.line, line.reason) for lines in answers for line in lines if line.reason)
    for value, count in counted.items():
        if count < settings.min_count:
            aside[value, f"is named by fewer than {settings.min_count} answers"] = count
        elif value not in kept:
            aside[value, f"is not among the {settings.max_values} most named"] = count
    rejected = [
        {"kind": kind.name, "line": line, "reason": reason, "count": n} for (line, reason), n in aside.most_common()
    ]
    return {value: counted[value] for value in kept}, rejected


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Writes the lists; returns the summary. UserError where the model names too few values of a kind."""
    settings, model, run = parse(InstructionValuesSettings, ModelSettings, RunSettings, args=args)
    check_listed(settings.kinds)
    resolved: Row = (
        asdict(settings) | asdict(model) | asdict(run) | {"weights": weights_stamp(model.model_name_or_path)}
    )
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    state = PartialState(cpu=run.use_cpu)
    if state.num_processes > 1:
        raise UserError("a list is some dozens of answers: start it with --num_processes 1")
    folder = RunFolder(run.output_dir, resolved, stage="write_instruction_values")
    tokenizer = load_tokenizer(model.model_name_or_path)
    chat = load_chat_format(tokenizer, model.chat_format)
    engine = load_engine(settings, model, tokenizer, chat, state.device, settings, settings.token_budget)

    answers: list[Row] = []
    rejected: list[Row] = []
    counts: dict[str, dict[str, int]] = {}
    summary: Row = {}
    for name in tqdm(dict.fromkeys(settings.kinds), desc="lists", unit="kind"):
        kind = kind_named(name)
        rows = ask_for(kind, engine, chat, settings, run.seed)
        read = [read_answer(kind, row["answer"], row["finished"], settings.max_value_words) for row in rows]
        counts[name], aside = choose(kind, read, settings)
        answers += rows
        rejected += aside
        lines = sum(map(len, read))
        doubles = sum(bool(line.value) for one in read for line in one) - len(count_values(kind, read))
        reasons = Counter(row["reason"] for row in aside for _ in range(row["count"]))
        summary[name] = {"answers": len(rows), "lines": lines, "values": len(counts[name]), "doubles": doubles,
                         "rejected": dict(reasons.most_common())}  # fmt: skip
    write_jsonl(folder.path / "answers.jsonl", answers)
    write_jsonl(folder.path / "rejected.jsonl", rejected)
    check_enough(summary, settings.min_values, folder.path)

    splits: dict[str, tuple[list[str], list[str]]] = {}
    placed: dict[str, bool] = {}
    for name, values in counts.items():
        rng = random.Random(f"instruction values {name} {run.seed}")
        taught, unseen = split_values(list(values), settings.unseen_share, rng, placed)
        splits[name] = taught, told_apart(unseen, taught)
        if not all(splits[name]):
            raise UserError(
                f"kinds: no value of '{name}' is left to teach, or none that is not part of a taught one of this kind "
                "or another; ask for more answers"
            )
        placed |= dict.fromkeys(taught, False) | dict.fromkeys(unseen, True)
    written = {
        "values.json": {name: taught for name, (taught, _) in splits.items()},
        "unseen_values.json": {name: unseen for name, (_, unseen) in splits.items()},
        "counts.json": counts,
    }
    for file, content in written.items():
        write_atomic(folder.path / file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for name, (taught, unseen) in splits.items():
        summary[name] |= {"taught": len(taught), "unseen": len(unseen)}
    folder.samples(0, answers[:2])
    folder.log(0, {f"values/{name}": len(values) for name, values in counts.items()})
    return folder.finish(summary)


def check_enough(summary: Row, min_values: int, folder: Path) -> None:
    """Raises UserError where a kind has fewer than `min_values` values, with what became of its lines."""
    for name, found in summary.items():
        if found["values"] < min_values:
            shown = (
                ", ".join(f"{reason} ({n})" for reason, n in list(found["rejected"].items())[:3]) or "no lines at all"
            )
            raise UserError(
                f"kind '{name}': the model named {found['values']} usable values in {found['answers']} answers, fewer "
                f"than min_values: {min_values}. Lines set aside: {shown}; all are in {folder / 'rejected.jsonl'}. "
                "Take a model that follows instructions, raise samples_per_question, or use the starter lists"
            )


if __name__ == "__main__":
    entry(main)
