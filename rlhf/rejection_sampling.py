"""Rejection sampling: K responses a prompt, the best by the combined reward kept for fine-tuning (paper §3.2.3).

    accelerate launch rlhf/rejection_sampling.py --config configs/llama2_7b_rejection_sampling.yaml

What differs from the paper, or fills what it leaves open:
1. K is never given there: `samples_per_prompt`, default 16.
2. Scored is PPO's raw score (rlhf/scoring.py), by default that of the reward model which the piecewise rule picks, on
   the sampled ids themselves, never on re-encoded text.
3. A response that was cut at max_new_tokens, is empty, or could not stand in a dialogue is scored but not kept.
4. Rows are marked `train_on: last`: the reply that was picked is trained, not the earlier ones of its prompt, which
   nobody has scored and which may be of the kind that the stage is to unlearn.
5. For every kept prompt the median of the K, the worst and a random one are written beside the best, as controls of
   equal size. Ties go to the earlier response; what duplicates count is in rlhf/selection.py.

Writes best.jsonl, median.jsonl, random.jsonl and worst.jsonl (dialogues for rlhf/sft.py), scores.npz (all that is known
of each of the prompts x K responses but its text), and shards/ with every response. Killed and started again it
continues; several processes share the prompts.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from configs.chat import ChatFormat, ChatFormatError, load_chat_format
from configs.engine_settings import NOT_SAMPLED
from configs.errors import UserError
from configs.model_settings import LORA_FIELDS, ModelSettings, RunSettings
from configs.records import read_prompts, write_jsonl
from configs.rejection_settings import RejectionSettings
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf.cli import entry, parse
from rlhf.draw import sample_seeds
from rlhf.engines import load_engine
from rlhf.models import data_fingerprints, resolve_dtype
from rlhf.run import RunFolder
from rlhf.sampler import prompt_room
from rlhf.samples import Prompt, before_stop_string
from rlhf.score_files import FUNCTION, SCORES, write_scores
from rlhf.scoring import Scoring, applicable_mean
from rlhf.selection import Picks, best_of_n_curve, best_of_n_kl, check_finite, duplicate_of, pick
from rlhf.shards import read_shards, run_shards, shard_folder, weights_stamp, without_failed
from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

Row = dict[str, Any]
# Settings that change neither responses nor scores: another min_score, or a lower token_budget after memory ran out,
# samples nothing again. The prompts count as they are encoded, not by their files.
NOT_IN_ROWS = (
    *("output_dir", "report_to", "logging_steps", "resume", "use_cpu"),
    *("min_score", "keep_unfinished", "max_prompts", "max_reject_share", "max_prompt_tokens", "prompt_files", "data"),
    *("token_budget", "score_token_budget", "chat_format", "use_peft", "freeze_embeddings", *LORA_FIELDS),
    *NOT_SAMPLED,
)


def read_prompt_files(
    files: list[str], chat_format: ChatFormat, max_tokens: int, folder: Path, max_reject_share: float
) -> list[Row]:
    """The usable prompts of several files, in order; bad rows go to rejected_prompts.jsonl in `folder`."""
    options: Row = {"reject_file": folder / "rejected_prompts.jsonl", "max_reject_share": max_reject_share}
    options |= {"chat_format": chat_format, "max_prompt_tokens": max_tokens}
    rows = [row for file in files for row in read_prompts(file, **options).rows]
    if not rows:
        raise UserError(f"prompt_files: no usable prompt in {files}")
    return rows


def usable(chat_format: ChatFormat, prompt: list[dict[str, str]], text: str) -> bool:
    """True where prompt + text is a dialogue that the chat format accepts (not empty, no special tag in it)."""
    try:
        chat_format.encode_dialogue([*prompt, {"role": "assistant", "content": text}])
    except ChatFormatError:
        return False
    return True


def gold_scores(prompt: list[dict[str, str]], texts: list[str]) -> dict[str, list[float]]:
    """The simulated world's gold scores of K responses."""
    from rlhf.simulation.world import gold_helpfulness, gold_safety

    return {
        "gold_helpfulness": [gold_helpfulness(prompt, text) for text in texts],
        "gold_safety": [gold_safety(prompt, text) for text in texts],
    }


class Worker:
    """The sampling engine and what scores; turns prompts into rows of K scored responses."""

    def __init__(
        self, settings: RejectionSettings, model: ModelSettings, seed: int, tokenizer: Any, device: torch.device
    ) -> None:
        self.settings, self.seed, self.scoring = settings, seed, Scoring(settings)
        self.chat = load_chat_format(tokenizer, model.chat_format)
        self.engine = load_engine(settings, model, tokenizer, self.chat, device, settings, settings.token_budget)
        dtype = resolve_dtype(model, trainable=False)
        paths = settings.reward_model_paths
        for name, path in paths.items():
            check_same_tokenizer(tokenizer, path, f"{name}_model_path")
        self.reward_models = {name: load_reward_model(path, dtype=dtype).to(device) for name, path in paths.items()}

    def try_out(self, row: Row) -> None:
        """Call the reward functions once, on this prompt, before anything is sampled."""
        messages = row["prompt"]
        self.scoring.try_out(Prompt(messages, self.chat.encode_prompt(messages), bool(row["is_safety"])), self.chat)

    def rows(self, prompts: list[Row], indices: Sequence[int]) -> list[Row]:
        """Rows of the prompts with these indices: sampled, scored, not yet selected. Seeds follow the index.

        A prompt that the engine could not sample becomes {"index", "prompt", "error"}, which is tried again at the next
        start.
        """
        started = time.perf_counter()
        k = self.settings.samples_per_prompt
        encoded = [
            Prompt(row["prompt"], self.chat.encode_prompt(row["prompt"]), bool(row["is_safety"])) for row in prompts
        ]
        seeds = [seed for index in indices for seed in sample_seeds(self.seed, k, first=index * k)]
        batch = self.engine.sample(encoded, k, self.settings, seeds)
        sampled = [i for i in range(len(batch)) if i // k not in batch.errors]
        texts = [
            before_stop_string(self.chat.decode_response(ids), self.settings.stop_strings) for ids in batch.response_ids
        ]
        end = self.chat.ended if self.settings.end_cut_responses else list
        budget = self.settings.score_token_budget
        scored = self.scoring.scores(
            lambda name, lists: score_ids(self.reward_models[name], [end(ids) for ids in lists], budget, k),
            [encoded[i // k] for i in sampled],
            [batch.response_ids[i] for i in sampled],
            [texts[i] for i in sampled],
        )
        place = {i: at for at, i in enumerate(sampled)}
        seconds = round((time.perf_counter() - started) / len(prompts), 4)  # the batch's, shared out
        rows: list[Row] = []
        for p, (index, prompt) in enumerate(zip(indices, prompts, strict=True)):
            if p in batch.errors:
                rows.append({"index": index, "prompt": prompt["prompt"], "error": batch.errors[p]})
                continue
            mine = slice(p * k, (p + 1) * k)
            at = slice(place[p * k], place[p * k] + k)  # among those that were sampled, and so scored
            finished = [reason == "stop" for reason in batch.finish_reasons[mine]]
            scores = {name: scored.raw[name][at].tolist() for name in self.scoring.models}
            scores["combined"] = scored.combined_B[at].tolist()
            check_finite(scores, index)
            for name in self.scoring.functions:
                own = scored.raw[name][at].tolist()
                scores[FUNCTION + name] = [None if math.isnan(score) else score for score in own]
            rows.append(
                {
                    "index": index,
                    "prompt": prompt["prompt"],
                    "is_safety": bool(prompt["is_safety"]),
                    "responses": texts[mine],
                    "response_ids": batch.response_ids[mine],
                    "finished": finished,
                    "usable": [usable(self.chat, prompt["prompt"], text) for text in texts[mine]],
                    "seeds": batch.seeds[mine],
                    "temperature": self.settings.temperature,
                    "seconds": seconds,
                    **scores,
                    **(gold_scores(prompt["prompt"], texts[mine]) if self.settings.gold == "simulated" else {}),
                }
            )
        return rows


def eligible(row: Row, keep_unfinished: bool) -> list[bool]:
    """Which of a row's K responses may be kept."""
    return [ok and (keep_unfinished or finished) for ok, finished in zip(row["usable"], row["finished"], strict=True)]


def select(
    rows: list[Row], settings: RejectionSettings, seed: int
) -> tuple[dict[str, list[int | None]], dict[str, int]]:
    """For best, median, random and worst: the index of the picked response of each row, None where the row is left out.

    Also counts: prompts, kept, no_eligible, below_min_score, no_choice (kept, but all that could be kept was one text,
    so selection chose nothing), and of all responses the duplicates (of an earlier response to the same prompt),
    unfinished and unusable ones.
    """
    picks: dict[str, list[int | None]] = {name: [] for name in ("best", "median", "random", "worst")}
    names = ("prompts", "kept", "no_eligible", "below_min_score", "no_choice", "responses", "duplicates", "unfinished")
    counts = dict.fromkeys((*names, "unusable"), 0)
    for row in rows:
        counts["prompts"] += 1
        counts["responses"] += len(row["responses"])
        counts["duplicates"] += sum(i >= 0 for i in duplicate_of(row["responses"]))
        counts["unfinished"] += row["finished"].count(False)
        counts["unusable"] += row["usable"].count(False)
        picked: Picks | None = pick(row["combined"], eligible(row, settings.keep_unfinished))
        low = (
            picked is not None and settings.min_score is not None and row["combined"][picked.best] < settings.min_score
        )
        counts["no_eligible"] += picked is None
        counts["below_min_score"] += low
        if picked is None or low:
            for column in picks.values():
                column.append(None)
            continue
        counts["kept"] += 1
        counts["no_choice"] += len({row["responses"][i] for i in picked.eligible}) == 1
        chance = random.Random(f"{seed}/{row['index']}")  # by prompt: the same pick however the work was divided
        chosen = {"best": picked.best, "median": picked.median, "worst": picked.worst}
        for name, column in picks.items():
            column.append(chosen[name] if name in chosen else chance.choice(picked.eligible))
    return picks, counts


def summarise(rows: list[Row], picks: dict[str, list[int | None]], settings: RejectionSettings) -> Row:
    """Mean scores of each kind of pick over the kept prompts, and the best-of-n curves over all prompts.

    Gold scores: helpfulness over the prompts that are not risky, safety over the risky ones. Scores of reward functions
    are means over the responses that they apply to, without a curve.
    """
    names = [name for name in (*SCORES, "gold_helpfulness", "gold_safety") if name in rows[0]]
    functions = [name for name in rows[0] if name.startswith(FUNCTION)]
    risky = np.array([row["is_safety"] for row in rows])
    counted = {name: np.ones(len(rows), bool) for name in names} | {"gold_helpfulness": ~risky, "gold_safety": risky}
    summary: Row = {
        kind: {
            name: _mean(
                [row[name][i] for row, i, on in zip(rows, column, counted[name], strict=True) if on and i is not None]
            )
            for name in names
        }
        | {
            name: applicable_mean([row[name][i] for row, i in zip(rows, column, strict=True) if i is not None])
            for name in functions
        }
        for kind, column in picks.items()
    }
    combined = np.array([row["combined"] for row in rows])
    may_keep = np.array([eligible(row, settings.keep_unfinished) for row in rows])
    curve: Row = {"n": list(range(1, combined.shape[1] + 1))}
    for name in names:
        on = counted[name]
        if on.any():
            values = np.array([row[name] for row in rows])
            curve[name] = best_of_n_curve(combined[on], values[on], may_keep[on]).round(5).tolist()
    curve["kl_nats_bound"] = [round(best_of_n_kl(n), 5) for n in curve["n"]]
    return {**summary, "best_of_n": curve}


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 5) if values else None


def write_outputs(folder: Path, rows: list[Row], picks: dict[str, list[int | None]], prompts: list[Row]) -> None:
    """The dialogues of each kind of pick, with what rlhf/pool_samples.py asks, and scores.npz."""
    for kind, column in picks.items():
        write_jsonl(
            folder / f"{kind}.jsonl",
            [
                {
                    "messages": [*row["prompt"], {"role": "assistant", "content": row["responses"][i]}],
                    "train_on": "last",
                    "source": f"rejection_sampling/{kind}",
                    "score": round(row["combined"][i], 5),
                    "is_safety": row["is_safety"],
                    "prompt_source": prompts[row["index"]]["source"],
                }
                for row, i in zip(rows, column, strict=True)
                if i is not None
            ],
        )
    write_scores(folder, rows, picks)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs one round of rejection sampling; returns its summary."""
    settings, model, run = parse(RejectionSettings, ModelSettings, RunSettings, args=args)
    if model.use_peft or model.freeze_embeddings:
        raise UserError("use_peft and freeze_embeddings are for training; leave them out where a policy is sampled")
    models = (model.model_name_or_path, *settings.reward_model_paths.values())
    resolved: Row = asdict(settings) | asdict(model) | asdict(run)
    resolved |= {"data": data_fingerprints(settings.prompt_files), "weights": [weights_stamp(path) for path in models]}
    resolved["scoring_files"] = Scoring(settings).fingerprints()
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    state = PartialState(cpu=run.use_cpu)
    folder = RunFolder(run.output_dir, resolved, stage="rejection_sampling")
    tokenizer = load_tokenizer(model.model_name_or_path)
    worker = Worker(settings, model, run.seed, tokenizer, state.device)
    room = prompt_room(worker.engine, settings.max_new_tokens, settings.max_prompt_tokens)
    prompts = read_prompt_files(settings.prompt_files, worker.chat, room, folder.path, settings.max_reject_share)
    prompts = prompts[: settings.max_prompts or None]
    if state.is_main_process:
        worker.scoring.warn_untagged(bool(row["is_safety"]) for row in prompts)
    worker.try_out(prompts[0])
    content: Row = {name: value for name, value in resolved.items() if name not in NOT_IN_ROWS}
    content["sampling_engine"] = settings.engine  # auto and server_url are one choice with server and server_url
    content["prompts"] = [[worker.chat.encode_prompt(p["prompt"]), p["is_safety"]] for p in prompts]
    size, total = settings.prompts_per_shard, len(prompts)
    shards = shard_folder(run.output_dir, content, total, size)
    with tqdm(total=total, desc="rejection sampling", unit="prompt", disable=not state.is_main_process) as bar:
        for done in run_shards(shards, total, size, lambda items: worker.rows([prompts[i] for i in items], items)):
            bar.update(done - bar.n)
    state.wait_for_everyone()
    rows = without_failed(read_shards(shards, total, size), settings.max_failed_share, total)
    picks, counts = select(rows, settings, run.seed)
    counts |= {"failed": total - len(rows), "samples_per_prompt": settings.samples_per_prompt}
    summary = {**counts, **summarise(rows, picks, settings)}
    with folder.finishing():
        if state.is_main_process:
            write_outputs(folder.path, rows, picks, prompts)
            for n, score in zip(summary["best_of_n"]["n"], summary["best_of_n"]["combined"], strict=True):
                folder.log(n, {"best_of_n/combined": score})
            folder.samples(0, [_shown(row, picks, p) for p, row in enumerate(rows[:8])])
        return folder.finish(summary)


def _shown(row: Row, picks: dict[str, list[int | None]], p: int) -> Row:
    """One prompt with its picked responses and their scores, for samples.jsonl."""
    shown: Row = {"prompt": row["prompt"], "is_safety": row["is_safety"]}
    for kind, column in picks.items():
        i = column[p]
        if i is not None:
            scores = {name: row[name][i] for name in row if name in SCORES or name.startswith(FUNCTION)}
            shown[kind] = {"response": row["responses"][i]}
            shown[kind] |= {name: score if score is None else round(score, 4) for name, score in scores.items()}
    return shown


if __name__ == "__main__":
    entry(main)
