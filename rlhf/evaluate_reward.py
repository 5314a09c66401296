"""Evaluate reward models on labelled pairs: Tables 7, 8 and 29 of the Llama 2 paper and what else tells good from bad.

    accelerate launch rlhf/evaluate_reward.py --helpfulness_model_path runs/h/model --safety_model_path runs/s/model \\
        --other_model_paths <any sequence-classification reward model> --eval_files a.jsonl b.jsonl --output_dir runs/e

1. One model or several; ours, or any Hugging Face sequence-classification model with one label, encoder or decoder
   (reward/any_model.py says how each reads a dialogue).
2. All models are compared on the same pairs: one that does not fit some model, with its oldest turns dropped, is set
   aside in too-long.jsonl.
3. Response lengths, for the length bias, are tokens of the first model's tokenizer.
4. Files of one name are one test set, as the paper joins its weekly batches.

Prints the tables and writes them to report.md, plots to plots/, every score to scores.jsonl (no text), the pairs that a
model gets most wrong and the responses on which the two models differ most to samples.jsonl. A killed run continues;
several processes share the pairs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from tqdm import tqdm

from configs.chat import ChatFormatError
from configs.errors import UserError
from configs.evaluate_reward_settings import EvaluateRewardSettings
from configs.records import read_preferences, write_jsonl
from reward.any_model import AnyRewardModel, Inputs
from reward.data import encode_replies
from reward.evaluation import evaluation
from rlhf import reward_report
from rlhf.cli import entry, parse
from rlhf.models import data_fingerprint
from rlhf.run import RunFolder, numbers
from rlhf.shards import read_shards, run_shards, shard_folder, weights_stamp

Row = dict[str, Any]
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Forbidden:
    """What a reader asks of a chat format: here the special tokens of all models together."""

    forbidden: tuple[str, ...]


def read_pairs(settings: EvaluateRewardSettings, models: Mapping[str, AnyRewardModel], reject: bool) -> list[Row]:
    """The usable preference records of all files with `file`, `index` (among the file's usable rows) and `test_set`.

    Bad rows go to rejected.jsonl, if this process is the one to write it.
    """
    special = tuple({token: None for model in models.values() for token in model.forbidden})
    records: list[Row] = []
    for file, test_set in settings.test_sets():
        rows = read_preferences(
            file,
            reject_file=Path(settings.output_dir) / "rejected.jsonl" if reject else None,
            max_reject_share=settings.max_reject_share,
            chat_format=Forbidden(special),
            split=settings.split,
        ).rows
        rows = rows[: settings.max_pairs or None]
        records += [{**row, "file": file, "index": i, "test_set": test_set} for i, row in enumerate(rows)]
    return records


def encode(
    records: Sequence[Row], models: Mapping[str, AnyRewardModel], max_length: int
) -> tuple[list[Row], dict[str, list[tuple[Inputs, Inputs]]], list[Row]]:
    """(records that fit every model, their encoded pairs by model, refused records with `model` and `reason`).

    A kept record has `shortened`: whether some model reads it without its oldest turns.
    """
    kept: list[Row] = []
    encoded: dict[str, list[tuple[Inputs, Inputs]]] = {name: [] for name in models}
    refused: list[Row] = []
    for record in tqdm(records, desc="tokens", unit="pair", disable=not PartialState().is_main_process):
        pairs = {}
        shortened = False
        for name, model in models.items():
            limit = min(max_length, model.context or max_length)
            try:
                pairs[name], prompt = encode_replies(record, model.encode, limit)
            except ChatFormatError as error:
                refused.append({**record, "model": name, "reason": str(error)})
                break
            if prompt is None:
                tokens = max(map(len, pairs[name]))
                reason = f"last turn alone has {tokens} tokens, the model's limit or max_length is {limit}"
                refused.append({**record, "model": name, "reason": reason})
                break
            shortened |= len(prompt) < len(record["prompt"])
        else:
            kept.append({**record, "shortened": shortened})
            for name, pair in pairs.items():
                encoded[name].append(pair)
    return kept, encoded, refused


def check_refused(settings: EvaluateRewardSettings, total: int, refused: Sequence[Row], write: bool) -> None:
    """Set refused pairs aside; UserError where they are too many, because the rest would be an easier test."""
    if write:
        path = Path(settings.output_dir) / "too-long.jsonl"
        if refused or path.exists():
            write_jsonl(path, refused)
    if len(refused) > settings.max_reject_share * total or len(refused) == total:
        first = refused[0]
        raise UserError(
            f"{len(refused)} of {total} pairs cannot be read by every model, over max_reject_share "
            f"{settings.max_reject_share}; the first: model {first['model']}, {first['file']} pair {first['index']}: "
            f"{first['reason']}. Raise max_length or max_reject_share, or leave the model out"
        )


def score(
    name: str,
    model: AnyRewardModel,
    pairs: Sequence[tuple[Inputs, Inputs]],
    settings: EvaluateRewardSettings,
    state: PartialState,
) -> list[tuple[float, float]]:
    """(r_chosen, r_rejected) of all pairs by one model. Shards that are on disk are not scored again."""

    def work(items: Sequence[int]) -> list[Row]:
        if model.model is None:
            model.load(DTYPES[settings.dtype], settings.attn_implementation, state.device)
        dialogues = [dialogue for i in items for dialogue in pairs[i]]
        raw = model.scores(dialogues, settings.score_token_budget)
        if not all(map(math.isfinite, raw)):
            raise UserError(f"model {name} ({model.path}) gives scores that are no numbers; try --dtype float32")
        return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(raw[::2], raw[1::2], strict=True)]

    ids = hashlib.sha256()
    for pair in pairs:
        for each in pair:
            ids.update(json.dumps([each.input_ids, each.segments]).encode())
    content = {
        "path": model.path,
        "weights": weights_stamp(model.path),
        "inputs": ids.hexdigest(),
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "device": state.device.type,
        "pairs_per_shard": settings.pairs_per_shard,
    }
    size, total = settings.pairs_per_shard, len(pairs)
    folder = shard_folder(settings.output_dir, content, total, size)
    with tqdm(total=total, desc=f"scores of {name}", unit="pair", disable=not state.is_main_process) as bar:
        for done in run_shards(folder, total, size, work):
            bar.update(done - bar.n)
    model.unload()
    state.wait_for_everyone()
    return [(row["chosen"], row["rejected"]) for row in read_shards(folder, total, size)]


def score_rows(
    records: Sequence[Row], scores: Mapping[str, Sequence[tuple[float, float]]], tokenizer: Any
) -> list[Row]:
    """The lines of scores.jsonl: labels, lengths of both responses in tokens, raw scores by model; no text."""
    kept = ("test_set", "file", "index", "source", "rating", "safety")
    rows = []
    for i, record in enumerate(records):
        row = {name: record.get(name) for name in kept} | {"p_chosen": record.get("p_chosen")}
        for side in ("chosen", "rejected"):
            row[f"tokens_{side}"] = len(tokenizer.encode(record[side][-1]["content"], add_special_tokens=False))
        for k, side in enumerate(("chosen", "rejected")):
            row[f"r_{side}"] = {name: pairs[i][k] for name, pairs in scores.items()}
        rows.append(row)
    return rows


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs one evaluation; returns its summary."""
    (settings,) = parse(EvaluateRewardSettings, args=args)
    wanted = settings.models()
    # A model trained anew under the same path, or other data in the same file, is another evaluation.
    inputs = {
        "weights": {model.name: weights_stamp(model.path) for model in wanted},
        "data": {file: data_fingerprint(file) for file in settings.eval_files},
    }
    resolved = {**asdict(settings), "inputs": inputs}
    if completed := RunFolder.completed(settings.output_dir, resolved):
        return completed
    state = PartialState(cpu=settings.use_cpu)
    models = {each.name: AnyRewardModel(each.path, each.input_format) for each in wanted}
    records = read_pairs(settings, models, reject=state.is_main_process)
    kept, encoded, refused = encode(records, models, settings.max_length)
    check_refused(settings, len(records), refused, write=state.is_main_process)
    run = RunFolder(settings.output_dir, resolved, stage="evaluate_reward")

    scores = {name: score(name, model, encoded[name], settings, state) for name, model in models.items()}
    rows = score_rows(kept, scores, next(iter(models.values())).tokenizer)
    thresholds = list(dict.fromkeys((settings.safety_threshold, 0.5)))
    pair = [name if name in models else None for name in ("helpfulness", "safety")]
    summary = evaluation(rows, thresholds, *pair)
    for name, model in models.items():
        summary["models"][name] |= {"path": model.path, "input_format": model.input_format}
    for key, about in summary["test_sets"].items():
        about["files"] = [file for file, test_set in settings.test_sets() if test_set == key]
        about["too_long"] = sum(row["test_set"] == key for row in refused)
        about["shortened"] = sum(row["shortened"] for row in kept if row["test_set"] == key)
    with run.finishing():
        if state.is_main_process:
            write_jsonl(run.path / "scores.jsonl", rows)
            run.samples(0, reward_report.samples(rows, kept, settings.num_samples))
            run.log(0, numbers(summary))
            reward_report.write(run.path, summary, rows, settings.safety_threshold, Console())
        result = run.finish(summary)
    state.wait_for_everyone()
    return result


if __name__ == "__main__":
    entry(main)
