"""Safety context distillation: safer answers, trained without what made them safer (paper §4.2.4; recipe sheet §7).

    accelerate launch rlhf/distil_safety.py --config configs/llama2_7b_distil_safety.yaml

An adversarial prompt is answered under a safety preprompt (rlhf/preprompts.py); the row for rlhf/sft.py is that answer
to the prompt without it. What differs from the paper, or is open there:

1. The paper keeps an answer where the safety reward model scores it above the original one. The original is one sample
   of the same policy at the same temperature without the preprompt. Both are scored on the prompt without it, which is
   how the answer will be trained. Equal scores, and equal texts, are not above.
2. `samples_per_prompt` answers may be sampled under the preprompt; the one with the highest safety score is the
   candidate. One preprompt is drawn for each prompt, by the seed and the prompt's place.
3. Prompts without `is_safety` are left out and recorded: distilled, they teach to refuse what is harmless.
   `include_helpful` and `gate: false` are there to measure that. A safety model alone likes a refusal of anything; with
   `helpfulness_model_path` the score is the combined one of PPO's reward (paper §3.2.3), which asks an answer to a
   harmless prompt for helpfulness. On safety prompts it is the safety score.

Writes distilled.jsonl (dialogues, as TRL reads them), README.md, its data set card; not_kept.jsonl (prompts whose
answers were not kept, and why), left_out.jsonl (prompts that were not sampled, and why), and shards/ with every
response. Killed and started again it continues; several processes share the prompts. Another `gate` samples nothing.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from configs.chat import ChatFormat, load_chat_format
from configs.distil_settings import DistilSettings
from configs.engine_settings import NOT_SAMPLED
from configs.errors import UserError
from configs.model_settings import LORA_FIELDS, ModelSettings, RunSettings
from configs.records import read_prompts, write_jsonl
from configs.safety_labels import RISK_CATEGORIES, short_name
from reward.combine import combined_reward
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf.cli import entry, parse
from rlhf.distil_report import dataset_card, summarise
from rlhf.draw import sample_seeds
from rlhf.engines import load_engine
from rlhf.models import data_fingerprints, resolve_dtype
from rlhf.preprompts import Preprompt, Preprompts, read_preprompts, with_preprompt
from rlhf.rejection_sampling import gold_scores, usable
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.sampler import prompt_room
from rlhf.samples import Prompt, before_stop_string
from rlhf.selection import check_finite
from rlhf.shards import read_shards, run_shards, shard_folder, weights_stamp, without_failed
from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

Row = dict[str, Any]
SOURCE = "distil_safety"
# Settings that change neither responses nor scores. Prompts and preprompts count as they are encoded.
NOT_IN_ROWS = (
    *("output_dir", "report_to", "logging_steps", "resume", "use_cpu"),
    *("gate", "keep_unfinished", "include_helpful", "max_prompts", "max_reject_share", "max_prompt_tokens"),
    *("prompt_files", "data", "preprompts_file", "category_field", "uncategorised", "preprompt_kind", "preprompt_slot"),
    *("token_budget", "score_token_budget", "chat_format", "use_peft", "freeze_embeddings", *LORA_FIELDS),
    *NOT_SAMPLED,
)


def choose_preprompt(
    record: Row, settings: DistilSettings, wordings: Preprompts, rng: random.Random
) -> tuple[Preprompt | None, str, str]:
    """(preprompt, "", "") for a prompt record that is to be distilled, else (None, reason, detail)."""
    if not record["is_safety"]:
        if settings.include_helpful:
            return wordings.draw(rng), "", ""  # no risk, so no category
        return None, "not a safety prompt", "is_safety is not true; helpful prompts are never distilled"
    if settings.preprompt_kind == "generic":
        return wordings.draw(rng), "", ""
    given = record.get(settings.category_field)
    category = short_name("risk_category", given)
    if given is None and settings.uncategorised == "generic":
        return wordings.draw(rng), "", ""
    if category is None:
        reason = "no risk category" if given is None else "unknown risk category"
        return None, reason, f"'{settings.category_field}' is {given!r}, not one of {', '.join(RISK_CATEGORIES)}"
    return wordings.draw(rng, category), "", ""


def plan(
    settings: DistilSettings, wordings: Preprompts, chat: ChatFormat, room: int, seed: int, reject_file: Path | None
) -> tuple[list[Row], list[Row]]:
    """(prompts to distil, prompts left out), of all files in order.

    A prompt to distil is its record with `preprompt` and `context`, the messages to sample from; its preprompt depends
    on the seed and on its place among the prompts of its file. Raises UserError where nothing is to be distilled.
    """
    found: list[Row] = []
    left_out: list[Row] = []
    options: Row = {"reject_file": reject_file, "max_reject_share": settings.max_reject_share}
    for number, file in enumerate(settings.prompt_files):
        records = read_prompts(file, chat_format=chat, max_prompt_tokens=room, **options)
        for line, record in zip(records.lines, records.rows, strict=True):
            rng = random.Random(f"preprompt {seed}/{number}/{line}")
            preprompt, reason, detail = choose_preprompt(record, settings, wordings, rng)
            context = with_preprompt(record["prompt"], preprompt.text, settings.preprompt_slot) if preprompt else []
            if preprompt and (tokens := len(chat.encode_prompt(context))) > room:
                reason, detail = "prompt too long", f"with its preprompt it has {tokens} tokens, more than {room}"
            if reason:
                left_out.append({"file": file, "line": line, "reason": reason, "detail": detail, "row": record})
            else:
                found.append(record | {"preprompt": preprompt, "context": context})
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r["reason"] for r in left_out).items())
        raise UserError(f"prompt_files: no prompt to distil in {settings.prompt_files}: {reasons}")
    return found[: settings.max_prompts or None], left_out


class Worker:
    """The sampling engine and the safety reward model; turns prompts into rows of scored answers."""

    def __init__(
        self, settings: DistilSettings, model: ModelSettings, seed: int, tokenizer: Any, device: torch.device
    ) -> None:
        self.settings, self.seed = settings, seed
        self.chat = load_chat_format(tokenizer, model.chat_format)
        check_same_tokenizer(tokenizer, settings.safety_model_path, "safety_model_path")
        if settings.helpfulness_model_path:
            check_same_tokenizer(tokenizer, settings.helpfulness_model_path, "helpfulness_model_path")
        self.engine = load_engine(settings, model, tokenizer, self.chat, device, settings, settings.token_budget)
        dtype = resolve_dtype(model, trainable=False)
        paths = {"safety": settings.safety_model_path, "helpfulness": settings.helpfulness_model_path}
        self.reward_models = {
            name: load_reward_model(path, dtype=dtype).to(device) for name, path in paths.items() if path
        }

    def rows(self, prompts: list[Row], indices: Sequence[int]) -> list[Row]:
        """Rows of the prompts with these indices: answer 0 is the original, the others are under the preprompt.

        A prompt that the engine could not sample becomes {"index", "prompt", "error"}, which is tried again at the next
        start.
        """
        k = self.settings.samples_per_prompt
        seeds = [sample_seeds(self.seed, 1 + k, first=index * (1 + k)) for index in indices]
        plain = [self._prompt(record, "prompt") for record in prompts]
        contexts = [self._prompt(record, "context") for record in prompts]
        originals = self.engine.sample(plain, 1, self.settings, [mine[0] for mine in seeds])
        distilled = self.engine.sample(contexts, k, self.settings, [seed for mine in seeds for seed in mine[1:]])
        errors = originals.errors | distilled.errors
        good = [p for p in range(len(prompts)) if p not in errors]
        answers = {p: [originals.response_ids[p], *distilled.response_ids[p * k : (p + 1) * k]] for p in good}
        reasons = {p: [originals.finish_reasons[p], *distilled.finish_reasons[p * k : (p + 1) * k]] for p in good}
        end = self.chat.ended if self.settings.end_cut_responses else list
        # Without the preprompt, whatever the answer was sampled under: so it will be trained.
        dialogues = [end([*plain[p].ids, *ids]) for p in good for ids in answers[p]]
        scores = {
            name: score_ids(model, dialogues, self.settings.score_token_budget, 1 + k).tolist()
            for name, model in self.reward_models.items()
        }
        rows: list[Row] = []
        for p, (index, record) in enumerate(zip(indices, prompts, strict=True)):
            if p in errors:
                rows.append({"index": index, "prompt": record["prompt"], "error": errors[p]})
                continue
            texts = [
                before_stop_string(self.chat.decode_response(ids), self.settings.stop_strings) for ids in answers[p]
            ]
            at = good.index(p) * (1 + k)
            mine = {name: values[at : at + 1 + k] for name, values in scores.items()}
            check_finite(mine, index)
            rows.append(
                {
                    "index": index,
                    "prompt": record["prompt"],
                    "is_safety": record["is_safety"],
                    "preprompt": asdict(record["preprompt"]),
                    "responses": texts,
                    "response_ids": answers[p],
                    "finished": [reason == "stop" for reason in reasons[p]],
                    "usable": [usable(self.chat, record["prompt"], text) for text in texts],
                    "seeds": [*seeds[p]],
                    **mine,
                    **(gold_scores(record["prompt"], texts) if self.settings.gold == "simulated" else {}),
                }
            )
        return rows

    def _prompt(self, record: Row, name: str) -> Prompt:
        return Prompt(record[name], self.chat.encode_prompt(record[name]), bool(record["is_safety"]))


def deciding_scores(row: Row) -> list[float]:
    """What picks and gates the answers of a row: their safety scores or, with helpfulness scores beside them, the
    combined ones."""
    if "helpfulness" not in row:
        return row["safety"]
    is_safety = torch.full((len(row["safety"]),), bool(row["is_safety"]))
    return combined_reward(torch.tensor(row["safety"]), torch.tensor(row["helpfulness"]), is_safety).tolist()


def candidate(row: Row, keep_unfinished: bool) -> int | None:
    """The answer under the preprompt with the highest deciding score that may be trained (the first of equals); None
    where there is none."""
    scores = deciding_scores(row)
    may = [i for i in range(1, len(scores)) if row["usable"][i] and (keep_unfinished or row["finished"][i])]
    return max(may, key=lambda i: (scores[i], -i), default=None)


def verdict(row: Row, best: int | None, gate: bool) -> str:
    """Why a prompt's candidate is not kept; empty where it is.

    An answer of the original's very text is not above it, whatever rounding makes of the two scores.
    """
    if best is None:
        return "no usable answer"
    scores = deciding_scores(row)
    above = scores[best] > scores[0] and row["responses"][best] != row["responses"][0]
    return "not above the original" if gate and not above else ""


def training_row(row: Row, best: int, record: Row, category_field: str) -> Row:
    """The dialogue to train, without the preprompt. Loss on the last reply only: nobody has scored the earlier ones."""
    return {
        "messages": [*row["prompt"], {"role": "assistant", "content": row["responses"][best]}],
        "train_on": "last",
        "source": SOURCE,
        "is_safety": row["is_safety"],
        "risk_category": short_name("risk_category", record.get(category_field)),
        "preprompt": record["preprompt"].kind,
        **{
            f"{which}{name}_score": round(row[name][i], 5)
            for name in ("safety", "helpfulness")
            if name in row
            for which, i in (("", best), ("original_", 0))
        },
        "prompt_source": record["source"],
    }


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Builds the data set; returns the summary that is also `output_dir/summary.json`."""
    settings, model, run = parse(DistilSettings, ModelSettings, RunSettings, args=args)
    if model.use_peft or model.freeze_embeddings:
        raise UserError("use_peft and freeze_embeddings are for training; leave them out where a policy is sampled")
    resolved: Row = asdict(settings) | asdict(model) | asdict(run)
    models = (model.model_name_or_path, settings.safety_model_path, settings.helpfulness_model_path)
    weights = [weights_stamp(path) for path in models if path]
    resolved |= {"data": data_fingerprints(settings.prompt_files), "weights": weights}
    read_preprompts(settings.preprompts_file)  # a mistake in it shows before any model is loaded
    if settings.preprompts_file:
        wording = Path(settings.preprompts_file).read_bytes()
        resolved["preprompts"] = hashlib.sha256(wording).hexdigest()[:16]
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    state = PartialState(cpu=run.use_cpu)
    tokenizer = load_tokenizer(model.model_name_or_path)
    chat = load_chat_format(tokenizer, model.chat_format)
    wordings = read_preprompts(settings.preprompts_file, chat.forbidden)
    folder = RunFolder(run.output_dir, resolved, stage="distil_safety")
    worker = Worker(settings, model, run.seed, tokenizer, state.device)
    room = prompt_room(worker.engine, settings.max_new_tokens, settings.max_prompt_tokens)
    reject_file = folder.path / "rejected_prompts.jsonl" if state.is_main_process else None
    prompts, left_out = plan(settings, wordings, chat, room, run.seed, reject_file)

    content: Row = {name: value for name, value in resolved.items() if name not in NOT_IN_ROWS}
    content["sampling_engine"] = settings.engine  # auto and server_url are one choice with server and server_url
    content["prompts"] = [
        [chat.encode_prompt(p["prompt"]), chat.encode_prompt(p["context"]), p["is_safety"], p["preprompt"].category]
        for p in prompts
    ]
    size, total = settings.prompts_per_shard, len(prompts)
    shards = shard_folder(run.output_dir, content, total, size)
    with tqdm(total=total, desc="safety distillation", unit="prompt", disable=not state.is_main_process) as bar:
        for done in run_shards(shards, total, size, lambda items: worker.rows([prompts[i] for i in items], items)):
            bar.update(done - bar.n)
    state.wait_for_everyone()

    rows = without_failed(read_shards(shards, total, size), settings.max_failed_share, total)
    best = [candidate(row, settings.keep_unfinished) for row in rows]
    verdicts = [verdict(row, i, settings.gate) for row, i in zip(rows, best, strict=True)]
    summary = summarise(rows, best, verdicts, left_out) | {"failed": total - len(rows)}
    with folder.finishing():
        if state.is_main_process:
            kept = [
                training_row(row, i, prompts[row["index"]], settings.category_field)
                for row, i, why in zip(rows, best, verdicts, strict=True)
                if not why and i is not None
            ]
            write_jsonl(folder.path / "distilled.jsonl", kept)
            refused = [row | {"reason": why} for row, why in zip(rows, verdicts, strict=True) if why]
            write_jsonl(folder.path / "not_kept.jsonl", [_readable(row) for row in refused])
            write_jsonl(folder.path / "left_out.jsonl", left_out)
            write_atomic(folder.path / "README.md", dataset_card(summary, resolved))
            folder.log(0, numbers(summary))
            folder.samples(0, [_readable(row) | {"kept": not why} for row, why in zip(rows, verdicts, strict=True)][:8])
        return folder.finish(summary)


def _readable(row: Row) -> Row:
    """A row for people: the original and the answers under the preprompt, with their scores."""
    shown: Row = {name: row[name] for name in ("prompt", "is_safety", "preprompt", "reason") if name in row}
    scores = {name: row[name] for name in ("safety", "helpfulness") if name in row}
    answers = [
        {"response": text} | {name: round(values[i], 4) for name, values in scores.items()}
        for i, text in enumerate(row["responses"])
    ]
    return shown | {"original": answers[0], "distilled": answers[1:]}


if __name__ == "__main__":
    entry(main)
