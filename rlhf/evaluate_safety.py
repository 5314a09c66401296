"""Evaluates how safe a policy is, and how often it refuses what it should answer (Llama 2 §4.2.3, §4.3, §4.4).

    accelerate launch rlhf/evaluate_safety.py --config configs/llama2_7b_evaluate_safety.yaml

Of a policy, which is sampled here, or of finished responses (`responses_files`):

1. violations on risky prompts (`is_safety`, or a `risk_category` or `attack_vector`), by risk category, attack vector
   and number of turns. `violation_by` says what judges: the safety reward model at a threshold, people's ratings (the
   majority of three, with their agreement), or the simulated world;
2. refusals: false ones on XSTest's safe prompts, by type, and on prompts that ask nothing risky; right ones on XSTest's
   unsafe prompts. The detector of rlhf/refusals.py tells full refusals, partial ones, and limits of ability;
3. both beside those of an earlier policy (`before_dir`), paired by prompt.

Without responses too: 4. the red team's violations per person-hour, release by release, from a log; 5. the refusal
detector measured against labelled answers. docs/safety_evaluation.md explains every figure.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.evaluate_safety_settings import EvaluateSafetySettings
from configs.model_settings import ModelSettings
from configs.row_files import BadRow, read_rows, write_jsonl
from configs.safety_labels import read_xstest
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf import safety_figures as figures
from rlhf import safety_rows
from rlhf.agreement import SCALE, VIOLATION_UP_TO, gwet, quadratic_weights
from rlhf.cli import entry, parse
from rlhf.models import data_fingerprints, load_policy, resolve_dtype
from rlhf.red_team import read_log, red_team
from rlhf.refusals import REFUSED, measure, refusal_kind
from rlhf.run import RunFolder, numbers, saved_settings, write_atomic
from rlhf.safety_tables import tables
from rlhf.sampler import prompt_room, sample
from rlhf.simulation.world import is_refusal
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]
Judge = Callable[[list[Row]], None]  # adds `violation` to the rows of risky prompts
SCORED_AT_ONCE = 256  # dialogues between two moves of the progress bar
WIDTH = 140  # columns where there is no terminal to ask
JUDGED_BY = ("violation_by", "safety_model_path", "safety_threshold")


def check_risky(settings: EvaluateSafetySettings, rows: list[Row]) -> None:
    """UserError where there is a judge and no risky prompt to judge."""
    if settings.violation_by != "none" and not any(row["part"] == "risky" for row in rows):
        raise UserError(
            f"violation_by: {settings.violation_by}, but no prompt is risky: none has is_safety, risk_category or "
            "attack_vector; tag them, or set violation_by to none"
        )


def respond(settings: EvaluateSafetySettings, device: str) -> list[Row]:
    """Samples the policy on the prompts of all files; rows not judged yet."""
    tokenizer = load_tokenizer(settings.model_name_or_path)
    chat = load_chat_format(tokenizer, settings.chat_format)
    xstest = [record for file in settings.xstest_files for record in read_xstest(file)]
    model_settings = ModelSettings(model_name_or_path=settings.model_name_or_path, dtype=settings.dtype)
    policy = load_policy(model_settings, trainable=False).to(device)
    records = safety_rows.read_labelled_prompts(
        settings.prompt_files,
        Path(settings.output_dir) / "rejected_prompts.jsonl",
        chat_format=chat,
        max_prompt_tokens=prompt_room(policy, settings.max_new_tokens, settings.max_prompt_tokens),
        max_reject_share=settings.max_reject_share,
    )
    rows = [safety_rows.unanswered(record, settings.violation_by == "simulated") for record in [*records, *xstest]]
    check_risky(settings, rows)
    k = settings.samples_per_prompt
    batch = sample(
        policy,
        [chat.encode_prompt(row["prompt"]) for row in rows],
        k,
        settings.sampling,
        stop_ids=chat.stop_ids,
        pad_id=int(tokenizer.pad_token_id),
        seed=settings.seed,
        progress=True,
    )
    texts = [chat.decode_response(ids) for ids in batch.response_ids]
    rows = [safety_rows.answered(row, texts[i * k : (i + 1) * k]) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        row["finished"] = [reason == "stop" for reason in batch.finish_reasons[i * k : (i + 1) * k]]
    return rows


def load_judge(settings: EvaluateSafetySettings, device: str) -> Judge:
    """What `violation_by` names, loaded."""
    if settings.violation_by == "simulated":
        return safety_rows.judge_by_world
    if settings.violation_by == "ratings":
        return safety_rows.judge_by_ratings
    if settings.violation_by == "none":
        return lambda rows: None
    path = settings.safety_model_path
    chat = load_chat_format(load_tokenizer(path), settings.chat_format)
    model_settings = ModelSettings(model_name_or_path=path, dtype=settings.dtype)
    model = load_reward_model(path, resolve_dtype(model_settings, trainable=False)).to(device)

    def score(dialogues: list[list[int]]) -> list[float]:
        starts = tqdm(range(0, len(dialogues), SCORED_AT_ONCE), desc="safety scores", unit="batch")
        return [r for i in starts for r in score_ids(model, dialogues[i : i + SCORED_AT_ONCE]).tolist()]

    below = math.log(settings.safety_threshold / (1 - settings.safety_threshold))  # of the raw score r, R = sigmoid(r)
    return lambda rows: safety_rows.judge_by_scores(rows, chat, score, below)


def raters(rows: list[Row]) -> dict[str, Any]:
    """{"agreement": on violation or not, and on the rating; "mean_rating"} of the people who rated responses to risky
    prompts."""
    given = [ratings for row in rows if row["part"] == "risky" for ratings in row.get("ratings") or []]
    flags = [[None if rating is None else int(rating <= VIOLATION_UP_TO) for rating in ratings] for ratings in given]
    known = [rating for ratings in given for rating in ratings if rating is not None]
    agreement = {
        "violation, AC1": gwet(flags, (0, 1)),
        "rating, AC2": gwet(given, SCALE, quadratic_weights(SCALE)),
    }
    return {"agreement": agreement, "mean_rating": fmean(known)}


def read_before(settings: EvaluateSafetySettings) -> list[Row]:
    """The rows of the earlier run. UserError where it is not complete or its violations were judged otherwise."""
    folder = Path(settings.before_dir)
    if not RunFolder.completed(folder) or not (folder / "responses.jsonl").is_file():
        raise UserError(f"before_dir: {folder} holds no finished run of rlhf/evaluate_safety.py with responses")
    saved = saved_settings(folder)
    for name in JUDGED_BY:
        if saved.get(name) != getattr(settings, name):
            raise UserError(
                f"before_dir: {folder} was made with {name} {saved.get(name)!r}, not {getattr(settings, name)!r}: its "
                "violations are not comparable"
            )
    rows = [row for _, row in read_rows(folder / "responses.jsonl")]
    if any(isinstance(row, BadRow) or not {"part", "refusal", "violation"} <= row.keys() for row in rows):
        raise UserError(f"before_dir: {folder / 'responses.jsonl'} is damaged, or not of rlhf/evaluate_safety.py")
    return [row for row in rows if not isinstance(row, BadRow)]


def detector(labelled: Sequence[tuple[str, int, str, bool]], rows: list[Row], simulated: bool) -> dict[str, Any]:
    """The refusal detector against labelled answers, with the lines it gets wrong, and in the simulated world against
    the world's own rule."""
    found: dict[str, Any] = {}
    if labelled:
        kinds = [refusal_kind(text) for _, _, text, _ in labelled]
        labels = [label for *_, label in labelled]
        wrong = [i for i, kind in enumerate(kinds) if (kind in REFUSED) != labels[i]]
        places = {i: f"{labelled[i][0]}:{labelled[i][1]}" for i in wrong}
        found["labels"] = {
            **measure(kinds, labels),
            "missed": [places[i] for i in wrong if labels[i]],
            "false_alarms": [places[i] for i in wrong if not labels[i]],
        }
    if simulated:
        kinds = [kind for row in rows for kind in row["refusal"]]
        found["simulated world"] = measure(kinds, [is_refusal(text) for row in rows for text in row["responses"]])
    return found


def report(folder: Path, summary: dict[str, Any], console: Console) -> None:
    """Prints the tables and writes them to report.md."""
    made = tables(summary)
    page = ["# Safety evaluation", "", "Shares in per cent are followed by their 95 % interval.", ""]
    write_atomic(folder / "report.md", "\n".join([*page, *(table.markdown() for table in made)]))
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in made:
        console.print()
        console.print(table.rich())
        console.print(Text(f" {table.note}", style="dim"))


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs one evaluation; returns its summary."""
    (settings,) = parse(EvaluateSafetySettings, args=args)
    files = [*settings.prompt_files, *settings.xstest_files, *settings.responses_files, *settings.refusal_labels_files]
    before_file = [str(Path(settings.before_dir) / "responses.jsonl")] if settings.before_dir else []
    log = [settings.red_team_log] if settings.red_team_log else []
    resolved = {**asdict(settings), "data": data_fingerprints(files, before_file, log)}
    if completed := RunFolder.completed(settings.output_dir, resolved):
        return completed
    # What can be wrong with the files is said before a model is loaded.
    simulated = settings.violation_by == "simulated"
    summary: dict[str, Any] = {"violation_by": settings.violation_by}
    if settings.red_team_log:
        summary["red_team"] = red_team(read_log(settings.red_team_log), settings.releases)
    labelled = safety_rows.read_refusal_labels(settings.refusal_labels_files)
    before = read_before(settings) if settings.before_dir else []
    rows: list[Row] = []
    if settings.responses_files:
        records = safety_rows.read_responses(settings.responses_files)
        rows = [safety_rows.answered(safety_rows.unanswered(r, simulated), r["responses"]) for r in records]
        check_risky(settings, rows)
    device = "cuda" if torch.cuda.is_available() and not settings.use_cpu else "cpu"
    judge = load_judge(settings, device)
    run = RunFolder(settings.output_dir, resolved, stage="evaluate_safety")
    if settings.model_name_or_path:
        rows = respond(settings, device)
        write_jsonl(run.path / "responses.jsonl", rows)  # sampling takes longest; what comes after may still fail
    judge(rows)
    if found := detector(labelled, rows, simulated):
        summary["detector"] = found
    if rows:
        summary |= {"prompts": len(rows), "responses": sum(len(row["responses"]) for row in rows)}
        if settings.model_name_or_path:
            summary["finished"] = sum(map(sum, (row["finished"] for row in rows))) / summary["responses"]
        summary["refusals"] = figures.refusals(rows)
        if settings.violation_by != "none":
            summary["violations"] = figures.violations(rows, settings.min_crossed_prompts)
            summary["min_crossed_prompts"] = settings.min_crossed_prompts
        if settings.violation_by == "ratings":
            summary["raters"] = raters(rows)
    if before:
        summary["comparison"] = {"before_dir": settings.before_dir, **figures.compared(before, rows)}
    if rows:
        write_jsonl(run.path / "responses.jsonl", rows)
        run.samples(0, rows[:8])
    run.log(0, numbers(summary))
    report(run.path, summary, Console())
    return run.finish(summary)


if __name__ == "__main__":
    entry(main)
