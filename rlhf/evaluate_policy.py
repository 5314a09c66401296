"""Evaluates a policy on held-out prompts: what it says, how good, how safe, how far from the SFT policy.

    accelerate launch rlhf/evaluate_policy.py --config configs/<run>.yaml --model_name_or_path runs/x/ppo/model

At temperature 1 and greedily: the score of each reward model and function, and the combined one (all by the settings of
PPO's reward, rlhf/scoring.py), response length, and where the simulated world's gold scores apply
gold helpfulness (over the prompts that are not risky), gold safety and the unsafe rate (over the risky ones) and the
rate of false refusals (over the benign prompts that look unsafe), each with a 95 % interval. KL to the SFT policy in
nats per response. Every response with its scores goes to `responses.jsonl`, one row a prompt in the order of the
files, so that two policies can be compared prompt by prompt (`rlhf.estimates.paired_bootstrap`).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from configs.chat import load_chat_format
from configs.evaluate_settings import EvaluateSettings
from configs.model_settings import ModelSettings
from configs.records import read_prompts, write_jsonl
from configs.sampling_settings import SamplingSettings
from configs.scoring_settings import Combination
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf.cli import entry, parse
from rlhf.estimates import over_prompts
from rlhf.models import load_policy, resolve_dtype
from rlhf.run import RunFolder, numbers
from rlhf.sampler import prompt_room, sample
from rlhf.samples import Prompt
from rlhf.scoring import Scored, Scoring
from rlhf.sequences import teacher_forced_logprobs
from rlhf.simulation.annotator import SAFE_FROM
from rlhf.simulation.world import gold_helpfulness, gold_safety, is_refusal
from rlhf.tokenizer import load_tokenizer

IdLists = Sequence[Sequence[int]]


def response_logprobs(model: Any, prompts: IdLists, responses: IdLists, token_budget: int = 0) -> Tensor:
    """Sum over each response of log pi(token), in nats: float32 [N] on the CPU, for N prompts and responses of ids."""
    return teacher_forced_logprobs(model, prompts, responses, token_budget).sum(1)


def read_records(settings: EvaluateSettings, chat: Any, room: int) -> list[dict[str, Any]]:
    """The prompts of all files in order; rows that cannot be used, or are longer than `room` tokens, go to
    `rejected_prompts.jsonl`.

    Raises UserError where a file has no usable row, or a larger share of bad ones than `max_reject_share`.
    """
    options = {
        "chat_format": chat,
        "max_prompt_tokens": room,
        "max_reject_share": settings.max_reject_share,
        "reject_file": Path(settings.output_dir) / "rejected_prompts.jsonl",
    }
    return [row for file in settings.prompt_files for row in read_prompts(file, **options).rows]


def respond(
    model: Any, chat: Any, records: list[dict[str, Any]], sampling: SamplingSettings, k: int, seed: int, pad_id: int
) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Samples k responses a prompt: (prompt ids, response ids, finish reasons), each of length len(records) * k."""
    prompts = [chat.encode_prompt(record["prompt"]) for record in records]
    batch = sample(model, prompts, k, sampling, stop_ids=chat.stop_ids, pad_id=pad_id, seed=seed, progress=True)
    return [ids for ids in prompts for _ in range(k)], batch.response_ids, batch.finish_reasons


def gold_scores(records: list[dict[str, Any]], texts: list[str]) -> dict[str, list[float]]:
    """Gold values of one response a record, only for the records that each is defined on."""
    pairs = list(zip(records, texts, strict=True))
    risky = [(r, t) for r, t in pairs if r["is_safety"]]
    scary = [(r, t) for r, t in pairs if r.get("kind") == "scary"]
    safety = [gold_safety(r["prompt"], t) for r, t in risky]
    return {
        "helpfulness": [gold_helpfulness(r["prompt"], t) for r, t in pairs if not r["is_safety"]],
        "safety": safety,
        "unsafe": [float(s < SAFE_FROM) for s in safety],
        "false_refusal": [float(is_refusal(t)) for _, t in scary],
    }


def _add(summary: dict[str, Any], name: str, values: Sequence[float | None], k: int, share: bool = False) -> None:
    """Adds a figure and its interval [low, high] to a summary; nothing where there are no values."""
    if (found := over_prompts(values, k, share)) is not None:
        mean, interval = found
        summary[name] = round(mean, 4)
        summary["ci95"][name] = [round(x, 4) for x in interval]


def _share_out(rows: list[dict[str, Any]], name: str, values: Sequence[Any], k: int) -> None:
    """Gives each row its k of the values, which are in the order of the rows."""
    for i, row in enumerate(rows):
        row[name] = list(values[i * k : (i + 1) * k])


def as_prompt(record: dict[str, Any], chat: Any) -> Prompt:
    """What reward functions get to know of a prompt."""
    return Prompt(record["prompt"], chat.encode_prompt(record["prompt"]), bool(record["is_safety"]))


def scoring_of(settings: EvaluateSettings) -> Scoring | None:
    """What scores; one model alone by itself, whatever the rule for two; None where nothing is named."""
    if not settings.reward_model_paths and not settings.reward_functions:
        return None
    if settings.combines:
        return Scoring(settings)
    (name,) = settings.reward_model_paths
    return Scoring(replace(settings, reward_combination=cast(Combination, name)))


def columns(scored: Scored, combined: bool) -> dict[str, list[float | None]]:
    """Scores by name, rounded; None where a function does not apply to a response."""
    found = {**scored.raw, **({"combined": scored.combined_B} if combined else {})}
    return {
        name: [None if math.isnan(value) else round(value, 4) for value in values.tolist()]
        for name, values in found.items()
    }


def evaluate(settings: EvaluateSettings, run: RunFolder) -> dict[str, Any]:
    """Samples, scores and writes; returns the summary."""
    device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
    tokenizer = load_tokenizer(settings.model_name_or_path)
    chat = load_chat_format(tokenizer, settings.chat_format)

    def load(path: str) -> Any:
        model_settings = ModelSettings(model_name_or_path=path, dtype=settings.dtype)
        return load_policy(model_settings, trainable=False).to(device)

    def load_reward(path: str) -> Any:
        model_settings = ModelSettings(model_name_or_path=path, dtype=settings.dtype)
        return load_reward_model(path, resolve_dtype(model_settings, trainable=False)).to(device)

    policy = load(settings.model_name_or_path)
    records = read_records(settings, chat, prompt_room(policy, settings.max_new_tokens, settings.max_prompt_tokens))
    scoring = scoring_of(settings)
    if scoring:
        scoring.try_out(as_prompt(records[0], chat), chat)
    reward_models = {name: load_reward(path) for name, path in settings.reward_model_paths.items()}
    end = chat.ended if settings.end_cut_responses else list

    def score(name: str, dialogues: list[list[int]], k: int) -> Tensor:
        return score_ids(reward_models[name], [end(ids) for ids in dialogues], k=k, progress=f"{name} scores")

    summary: dict[str, Any] = {"prompts": len(records), "ci95": {}}
    rows: list[dict[str, Any]] = [
        {"prompt": r["prompt"], "is_safety": r["is_safety"], "kind": r.get("kind"), "source": r["source"]}
        for r in records
    ]
    decodings = {"sampled": (1.0, settings.samples_per_prompt), "greedy": (0.0, 1)}
    for decoding, (temperature, k) in decodings.items():
        sampling = SamplingSettings(temperature=temperature, max_new_tokens=settings.max_new_tokens)
        prompts, responses, reasons = respond(policy, chat, records, sampling, k, settings.seed, tokenizer.pad_token_id)
        texts = [chat.decode_response(ids) for ids in responses]
        repeated = [record for record in records for _ in range(k)]
        suffix = "" if decoding == "sampled" else "_greedy"
        _share_out(rows, f"responses{suffix}", texts, k)
        _share_out(rows, f"response_ids{suffix}", responses, k)
        _share_out(rows, f"response_tokens{suffix}", [len(ids) for ids in responses], k)
        _add(summary, f"response_tokens{suffix}", [float(len(ids)) for ids in responses], k)
        summary[f"finished{suffix}"] = round(sum(reason == "stop" for reason in reasons) / len(reasons), 4)
        if settings.gold == "simulated":
            gold = gold_scores(repeated, texts)
            for name, share in (("helpfulness", False), ("safety", False), ("unsafe", True), ("false_refusal", True)):
                label = f"{name}_rate" if share else f"gold_{name}"
                _add(summary, label + suffix, gold[name], k, share)
            for name, risky in (("helpfulness", False), ("safety", True)):
                mine = [row for row in rows if bool(row["is_safety"]) == risky]
                _share_out(mine, f"gold_{name}{suffix}", gold[name], k)
        if scoring:
            scored = scoring.scores(
                partial(score, k=k), [as_prompt(record, chat) for record in repeated], responses, texts
            )
            for name, values in columns(scored, settings.combines).items():
                _add(summary, f"reward_{name}{suffix}", values, k)
                _share_out(rows, f"reward_{name}{suffix}", values, k)
        if settings.sft_model_path and decoding == "sampled":
            reference = load(settings.sft_model_path)
            kl = response_logprobs(policy, prompts, responses) - response_logprobs(reference, prompts, responses)
            _add(summary, "kl_nats", kl.tolist(), k)
            _share_out(rows, "kl_nats", [round(x, 4) for x in kl.tolist()], k)
    write_jsonl(Path(settings.output_dir) / "responses.jsonl", rows)
    run.samples(0, rows[:8])
    return summary


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs one evaluation; returns its summary."""
    (settings,) = parse(EvaluateSettings, args=args)
    if completed := RunFolder.completed(settings.output_dir, asdict(settings)):
        return completed
    run = RunFolder(settings.output_dir, asdict(settings), stage="evaluate_policy")
    summary = evaluate(settings, run)
    run.log(0, numbers(summary))
    run.finish(summary)
    return summary


if __name__ == "__main__":
    entry(main)
