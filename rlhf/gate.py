"""Compares two policies by the held-out judge, and stops a pipeline where the later one is not good enough.

    accelerate launch rlhf/gate.py --config configs/llama2_7b_gate.yaml

Reads what `rlhf/evaluate_policy.py` wrote for both policies on the same held-out prompts, and scores every response
sampled at temperature 1 with two reward models that neither policy was trained against (rlhf/judge.py). Over all
prompts, helpfulness prompts and safety prompts: the mean improvement, the win rate, and the win rate that answers of
equal length would have, each with a 95 % interval. Beside them, for information, what either of the two models says of
all responses by itself (`by_judge`).

`require: improvement` passes where, over all prompts, the intervals of the improvement and of the length-controlled win
rate lie above 0 and `min_win_rate`, and no kind of prompt got worse. `no_regression` passes where nothing got worse.
Worse is an interval that lies below. Each of the six says so by chance once in forty times, so a policy that did not
change fails up to one time in seven: read the figures before you believe a verdict.

The figures are in `verdict.json` in any case, and in `summary.json` where the stage is complete: the gate passed, or
`on_failure` is `warn`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
from collections import Counter
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.gate_settings import GateSettings
from configs.model_settings import ModelSettings
from configs.row_files import BadRow, read_rows
from reward.scorer import score_ids
from rlhf.cli import entry, parse
from rlhf.estimates import paired_bootstrap
from rlhf.judge import HELPFULNESS, SAFETY, compare, judge, load_judges
from rlhf.models import data_fingerprints, resolve_dtype
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.tokenizer import load_tokenizer

NEEDED = ("prompt", "is_safety", "responses", "response_ids")
KINDS = {"all": "all prompts", "helpfulness": "helpfulness prompts", "safety": "safety prompts"}
Row = dict[str, Any]


def read_responses(path: str, field: str) -> dict[tuple[str, int], Row]:
    """The rows of a responses.jsonl by prompt: (the prompt and its tag as text, how often they came before) -> row.

    UserError, naming `field`, where the file is missing or empty, or a row lacks what `rlhf/evaluate_policy.py` writes.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{field}: {path} does not exist; name a responses.jsonl that rlhf/evaluate_policy.py has written"
        )
    rows: dict[tuple[str, int], Row] = {}
    seen: Counter[str] = Counter()
    for line, row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{field}: {path}:{line}: {row}")
        missing = [name for name in NEEDED if name not in row or row[name] == []]
        if missing:
            raise UserError(
                f"{field}: {path}:{line} has no {', '.join(missing)}; run rlhf/evaluate_policy.py of this version again"
            )
        text = json.dumps([row["prompt"], bool(row["is_safety"])], sort_keys=True)
        rows[text, seen[text]] = row
        seen[text] += 1
    if not rows:
        raise UserError(f"{field}: {path} has no rows")
    return rows


def paired(settings: GateSettings) -> tuple[list[Row], list[Row]]:
    """The rows of both files, prompt by prompt in the order of `before_file`. UserError where prompts differ."""
    before = read_responses(settings.before_file, "before_file")
    after = read_responses(settings.after_file, "after_file")
    if before.keys() != after.keys():
        raise UserError(
            f"before_file {settings.before_file} and after_file {settings.after_file} answer different prompts: "
            f"{len(before.keys() - after.keys())} are in the first only, {len(after.keys() - before.keys())} in the "
            "second only, tags included; evaluate both policies on the same prompt_files"
        )
    return list(before.values()), [after[key] for key in before]


def judged(rows: list[Row], models: dict[str, Any], chat: ChatFormat, settings: GateSettings, field: str) -> None:
    """Adds each row's scores, one a response: the combined ones as "judged", each model's as "judge_<its name>"."""
    responses = [ids for row in rows for ids in row["response_ids"]]
    texts = [text for row in rows for text in row["responses"]]
    if any(chat.decode_response(ids) != text for ids, text in zip(responses, texts, strict=True)):
        raise UserError(f"{field}: the judge reads the ids of its responses as other text: it has another tokenizer")
    prompts = [ids for row in rows for ids in [chat.encode_prompt(row["prompt"])] * len(row["responses"])]
    is_safety = [bool(row["is_safety"]) for row in rows for _ in row["responses"]]

    def score(name: str, id_lists: Any) -> torch.Tensor:
        return score_ids(models[name], id_lists, settings.score_token_budget, progress=name)

    if settings.end_cut_responses:
        responses = [chat.ended(ids) for ids in responses]
    judgement = judge(score, prompts, responses, is_safety, settings.safety_threshold)
    columns = {"judged": judgement.combined_B, HELPFULNESS: judgement.helpfulness_B, SAFETY: judgement.safety_B}
    for name, scores_B in columns.items():
        scores = iter(scores_B.tolist())
        for row in rows:
            row[name] = [next(scores) for _ in row["responses"]]


def figures(before: list[Row], after: list[Row], seed: int) -> dict[str, dict[str, Any]]:
    """`rlhf.judge.compare` over all prompts and over each kind of prompt that there is."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        places = [i for i, row in enumerate(before) if kind == "all" or bool(row["is_safety"]) == (kind == "safety")]
        if places:
            scores = [[rows[i]["judged"] for i in places] for rows in (before, after)]
            tokens = [[list(map(len, rows[i]["response_ids"])) for i in places] for rows in (before, after)]
            found[kind] = compare(scores[0], scores[1], tokens[0], tokens[1], seed)
    return found


def by_judge(before: list[Row], after: list[Row], seed: int) -> dict[str, dict[str, Any]]:
    """Mean raw score before and after, and the improvement with its interval, of each judge alone over all prompts."""
    found = {}
    for name in (HELPFULNESS, SAFETY):
        before_P, after_P = ([fmean(row[name]) for row in rows] for rows in (before, after))
        improvement, interval = paired_bootstrap(before_P, after_P, seed=seed)
        found[name] = {"before": fmean(before_P), "after": fmean(after_P), "improvement": improvement,
                       "ci95": {"improvement": list(interval)}}  # fmt: skip
    return found


def faults(compared: dict[str, dict[str, Any]], require: str, min_win_rate: float) -> list[str]:
    """Why a gate does not open, one sentence a reason; none: it opens."""
    found = []
    names = {"improvement": ("improvement", 0.0), "win_rate_lc": ("length-controlled win rate", min_win_rate)}
    for kind, result in compared.items():
        for name, (words, even) in names.items():
            low, high = result["ci95"][name]
            shown = f"{KINDS[kind]}: {words} {result[name]:.3f} ({low:.3f} to {high:.3f})"
            if high < even:
                found.append(f"{shown} is below {even:g}")
            elif require == "improvement" and kind == "all" and low <= even:
                found.append(f"{shown} is not surely above {even:g}")
    return found


def table(compared: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]]) -> Table:
    """The comparison as it is in the summary, one row a kind of prompt, then one a judge."""
    shown = Table(title="Later policy against earlier, by the held-out judge (95 % interval)", title_justify="left")
    for name in ("", "prompts", "before", "after", "improvement", "win rate", "at equal length", "extra tokens"):
        shown.add_column(name, justify="right" if name else "left")
    for kind, result in compared.items():
        cells = [
            f"{result[name]:.3f} ({result['ci95'][name][0]:.3f} to {result['ci95'][name][1]:.3f})"
            for name in ("improvement", "win_rate", "win_rate_lc")
        ]
        means = [f"{result[name]:.3f}" for name in ("before", "after")]
        shown.add_row(KINDS[kind], str(result["prompts"]), *means, *cells, f"{result['extra_tokens']:+.1f}")
    for name, result in alone.items():
        low, high = result["ci95"]["improvement"]
        means = [f"{result[side]:.3f}" for side in ("before", "after")]
        shown.add_row(f"{name} alone", "", *means, f"{result['improvement']:.3f} ({low:.3f} to {high:.3f})")
    return shown


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Compares, reports, and returns the summary. UserError where the gate stays shut under `on_failure: stop`."""
    (settings,) = parse(GateSettings, args=args)
    data = data_fingerprints([settings.before_file, settings.after_file])
    resolved = {**asdict(settings), "data": data}
    if completed := RunFolder.completed(settings.output_dir, resolved):
        return completed
    before, after = paired(settings)
    device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
    tokenizer = load_tokenizer(settings.judge_helpfulness_model_path)
    dtype = resolve_dtype(
        ModelSettings(model_name_or_path=settings.judge_helpfulness_model_path, dtype=settings.dtype), trainable=False
    )
    paths = settings.judge_helpfulness_model_path, settings.judge_safety_model_path
    models = load_judges(*paths, tokenizer, dtype, device)
    chat = load_chat_format(tokenizer, settings.chat_format)
    run = RunFolder(settings.output_dir, resolved, "gate")
    judged(before, models, chat, settings, "before_file")
    judged(after, models, chat, settings, "after_file")
    compared = figures(before, after, settings.seed)
    reasons = faults(compared, settings.require, settings.min_win_rate)
    alone = by_judge(before, after, settings.seed)
    verdict = {"passed": not reasons, "reasons": reasons, "require": settings.require, **compared, "by_judge": alone}
    write_atomic(Path(settings.output_dir) / "verdict.json", json.dumps(verdict, indent=2) + "\n")
    run.log(0, numbers(compared))
    console = Console()
    console.print(table(compared, alone))
    console.print(
        "[green]passed[/green]" if not reasons else "[red]failed[/red]: " + "; ".join(reasons), highlight=False
    )
    if reasons and settings.on_failure == "stop":
        # No summary.json: the stage counts as not done, so a pipeline started again comes back to this gate.
        raise UserError(
            f"the gate stays shut for {settings.after_file}: {'; '.join(reasons)}. The figures are in "
            f"{Path(settings.output_dir) / 'verdict.json'}. Change the stage that made this policy and start again, or "
            "set on_failure to warn or require to no_regression"
        )
    return run.finish(verdict)


if __name__ == "__main__":
    entry(main)
