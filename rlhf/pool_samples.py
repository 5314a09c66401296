"""The selected samples of several rounds as one file for fine-tuning: all rounds, or the last only (paper §3.2.3).

    accelerate launch rlhf/pool_samples.py --output_dir runs/x/pool \
      --sample_files runs/x/v1/rejection_sampling/best.jsonl runs/x/v2/rejection_sampling/best.jsonl

The paper's V3 was fine-tuned on samples of V2 only and got worse at some things (rhyming poems); from then on the best
samples of all rounds were used. How they are put together it leaves open. Here, in this order:

1. The same response to the same prompt counts once, for the newest round that has it.
2. Of each round a share is drawn (`round_shares`; default: all).
3. Of the responses to one prompt the best `per_prompt` stay. Scores of different reward models cannot be compared: with
   `rank_by: score` all files must have been scored by one pair of them; where they were re-trained, `rescored` scores
   every candidate anew with the newest pair, and `newest` lets a later round win.

Drawing comes before ranking, so that a response that is not drawn does not push another one out. Re-scoring encodes the
text again; scores in the files are of the sampled ids, which differ where a model wrote a text in an unusual way.

Writes pooled.jsonl (dialogues for rlhf/sft.py with `round` and `score`); the summary says what went in from where.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.records import read_dialogues, write_jsonl
from configs.rounds_settings import PoolSettings
from reward.combine import combined_reward
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf.cli import entry, parse
from rlhf.models import data_fingerprints, resolve_dtype
from rlhf.run import RunFolder, numbers
from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

Row = dict[str, Any]
SCORED_AT_ONCE = 512  # rows between two steps of the progress bar


def pool(
    rounds: Sequence[Sequence[Row]], per_prompt: int, shares: Sequence[float], newest_first: bool, seed: int
) -> tuple[list[list[Row]], list[Counter[str]]]:
    """The kept rows of each round, in their order, and what became of all.

    Args:
        rounds: rows {"messages", optional "score"} by round, the oldest round first.
        per_prompt: rows of one prompt (all messages but the last) that stay; 0: all.
        shares: of each round's rows, the newest round first; the last one counts for all older rounds.
        newest_first: a later round beats an earlier one, and scores decide within a round only; else scores decide, and
            the later round among equal ones.

    The counters have `read` = `duplicates` + `not_drawn` + `outranked` + `kept`.
    """
    counts = [Counter(read=len(rows), duplicates=0, not_drawn=0, outranked=0, kept=0) for rows in rounds]
    seen: set[tuple[tuple[str, str], ...]] = set()
    prompts: dict[tuple[tuple[str, str], ...], list[tuple[int, int]]] = {}  # -> places (round, row) of its rows
    for number in reversed(range(len(rounds))):
        fresh = []
        for i, row in enumerate(rounds[number]):
            key = _key(row["messages"])
            if key in seen:
                counts[number]["duplicates"] += 1
                continue
            seen.add(key)
            fresh.append(i)
        share = shares[min(len(rounds) - 1 - number, len(shares) - 1)]
        drawn = sorted(random.Random(f"{seed}/{number}").sample(fresh, round(share * len(fresh))))
        counts[number]["not_drawn"] = len(fresh) - len(drawn)
        for i in drawn:
            prompts.setdefault(_key(rounds[number][i]["messages"][:-1]), []).append((number, i))
    kept: list[list[int]] = [[] for _ in rounds]

    def rank(place: tuple[int, int]) -> tuple[float, float, int]:
        number, i = place
        score = rounds[number][i].get("score", 0.0)
        return (-number, -score, i) if newest_first else (-score, -number, i)

    for places in prompts.values():
        for k, (number, i) in enumerate(sorted(places, key=rank)):
            stays = per_prompt == 0 or k < per_prompt
            counts[number]["kept" if stays else "outranked"] += 1
            if stays:
                kept[number].append(i)
    return [[rows[i] for i in sorted(places)] for rows, places in zip(rounds, kept, strict=True)], counts


def _key(messages: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def read_rounds(settings: PoolSettings, folder: Path) -> list[list[Row]]:
    """The rows of every file that counts; with `pool: last` the earlier ones stay unread and are empty.

    UserError for a file without rows, as a round leaves whose min_score nothing reached, or one that lacks what
    `rank_by` needs.
    """
    needed = {"score": "score", "rescored": "is_safety"}.get(settings.rank_by)
    rounds: list[list[Row]] = []
    for i, file in enumerate(settings.sample_files):
        if settings.pool == "last" and i + 1 < len(settings.sample_files):
            rounds.append([])
            continue
        if Path(file).is_file() and Path(file).stat().st_size == 0:
            raise UserError(
                f"{file} is empty: its round kept no response. Lower or leave out its min_score; the summary.json "
                "beside it counts why prompts were left out"
            )
        rows = read_dialogues(
            file, reject_file=folder / "rejected.jsonl", max_reject_share=settings.max_reject_share
        ).rows
        if needed and any(needed not in row for row in rows):
            raise UserError(
                f"{file}: rows have no `{needed}`, which rank_by: {settings.rank_by} needs; sample it again with "
                "rlhf/rejection_sampling.py, or use rank_by: newest"
            )
        rounds.append(rows)
    return rounds


def check_one_scale(files: Sequence[str]) -> None:
    """UserError where the run folders of the files say that different reward models scored them."""
    models = {}
    for file in files:
        try:
            saved = yaml.safe_load((Path(file).parent / "settings.yaml").read_text(encoding="utf-8"))
        except OSError:
            continue  # a file of another origin: nothing says who scored it
        models[file] = tuple(saved.get(f"{name}_model_path") for name in ("helpfulness", "safety"))
    if len(set(models.values())) > 1:
        shown = "".join(f"\n  {file}: {', '.join(map(str, pair))}" for file, pair in models.items())
        raise UserError(
            f"rank_by: score compares scores of different reward models; use rescored or newest. Scored by:{shown}"
        )


def rescore(rounds: list[list[Row]], settings: PoolSettings, device: torch.device) -> None:
    """Replace every row's `score` by the combined reward (raw) of the settings' reward models."""
    paths = {"helpfulness": settings.helpfulness_model_path, "safety": settings.safety_model_path}
    tokenizer = load_tokenizer(paths["helpfulness"])
    check_same_tokenizer(tokenizer, paths["safety"], "safety_model_path")
    chat = load_chat_format(tokenizer, settings.chat_format)
    models = {
        name: load_reward_model(path, resolve_dtype(ModelSettings(path, dtype=settings.dtype), trainable=False))
        for name, path in paths.items()
    }
    rows = [row for mine in rounds for row in mine]
    with tqdm(total=len(rows), desc="scoring anew", unit="response") as bar:
        for first in range(0, len(rows), SCORED_AT_ONCE):
            chunk = rows[first : first + SCORED_AT_ONCE]
            ids = [chat.encode_dialogue(row["messages"]).input_ids for row in chunk]
            raw = {name: score_ids(m.to(device), ids, settings.score_token_budget) for name, m in models.items()}
            is_safety = torch.tensor([bool(row["is_safety"]) for row in chunk])
            scores = combined_reward(raw["safety"], raw["helpfulness"], is_safety, settings.safety_threshold)
            for row, score in zip(chunk, scores.tolist(), strict=True):
                row["score"] = round(score, 5)
            bar.update(len(chunk))


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Pools the files; returns the summary."""
    settings, run = parse(PoolSettings, RunSettings, args=args)
    resolved = asdict(settings) | asdict(run) | {"data": data_fingerprints(settings.sample_files)}
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    if settings.rank_by == "score" and settings.pool == "all":
        check_one_scale(settings.sample_files)
    folder = RunFolder(run.output_dir, resolved, stage="pool_samples")
    rounds = read_rounds(settings, folder.path)
    if settings.rank_by == "rescored":
        rescore(rounds, settings, PartialState(cpu=run.use_cpu).device)
    kept, counts = pool(rounds, settings.per_prompt, settings.round_shares, settings.rank_by == "newest", run.seed)
    rows = [row | {"round": number} for number, mine in enumerate(kept, 1) for row in mine]
    if not rows:
        raise UserError(f"sample_files: nothing is left of {sum(map(len, rounds))} samples; raise round_shares")
    if folder.is_main:
        write_jsonl(folder.path / "pooled.jsonl", rows)
        folder.samples(0, rows[:8])
    summary: Row = {
        "rows": len(rows),
        "prompts": len({_key(row["messages"][:-1]) for row in rows}),
        "rounds": [
            {"round": number, "file": file, **count, "mean_score": _mean(mine)}
            for number, (file, count, mine) in enumerate(zip(settings.sample_files, counts, kept, strict=True), 1)
        ],
        "by_prompt_source": dict(sorted(Counter(str(row.get("prompt_source")) for row in rows).items())),
    }
    folder.log(0, numbers(summary))
    return folder.finish(summary)


def _mean(rows: Sequence[Row]) -> float | None:
    scores = [row["score"] for row in rows if "score" in row]
    return round(sum(scores) / len(scores), 5) if scores else None


if __name__ == "__main__":
    entry(main)
