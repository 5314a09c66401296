"""Preference data: two responses a prompt, from two model variants or temperatures, and labels (paper §3.2.1).

    accelerate launch rlhf/collect_preferences.py --config configs/llama2_7b_collect.yaml
    accelerate launch rlhf/collect_preferences.py --import_labels labelled.jsonl --output_dir runs/preferences

- `annotator: simulated` writes helpfulness.jsonl and safety.jsonl and, by prompt, helpfulness_test.jsonl and
  safety_test.jsonl. A prompt with `is_safety` is compared for safety, any other for helpfulness, as the paper collects
  them apart. A safe response rejected for an unsafe one is left out of the safety data.
- `annotator: none` writes unlabelled.jsonl for people; which response came from where stands in origins.jsonl only.
  With choice ("a" | "b"), rating and on safety prompts safety_a and safety_b (true = safe) filled in, `import_labels`
  turns it into the same four files; mistakes are listed by line and set aside in rejected_labels.jsonl.

Which response is shown as "a" is drawn at random, so that position tells nothing.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from configs.chat import ChatFormat, load_chat_format
from configs.collect_settings import CollectSettings
from configs.engine_settings import NOT_SAMPLED
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.records import RATINGS, split_by_prompt, write_jsonl
from configs.sampling_settings import SamplingSettings
from rlhf.cli import entry, parse
from rlhf.draw import sample_seeds
from rlhf.engines import InProcess, load_engine
from rlhf.labels import LABELS, import_labels, preference_record
from rlhf.models import data_fingerprints
from rlhf.rejection_sampling import read_prompt_files, usable
from rlhf.run import RunFolder, numbers
from rlhf.sampler import prompt_room
from rlhf.samples import Prompt
from rlhf.shards import read_shards, run_shards, shard_folder, weights_stamp, without_failed
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]


class Drawn(NamedTuple):
    """One response. `error`: why there is none."""

    text: str
    usable: bool
    finished: bool
    error: str | None = None


class Worker:
    """The two variants; turns prompts into pairs of different, usable texts."""

    def __init__(self, settings: CollectSettings, seed: int, device: torch.device) -> None:
        self.settings, self.seed = settings, seed
        self.paths = [settings.model_name_or_path, settings.second_model_name_or_path or settings.model_name_or_path]
        self.temperatures = [settings.temperature_a, settings.temperature_b]
        loaded = {path: self._load(path, device) for path in dict.fromkeys(self.paths)}
        self.variants = [loaded[path] for path in self.paths]

    def _load(self, path: str, device: torch.device) -> tuple[Any, ChatFormat]:
        tokenizer = load_tokenizer(path)
        model = ModelSettings(
            path, self.settings.chat_format, self.settings.dtype, attn_implementation=self.settings.attn_implementation
        )
        chat = load_chat_format(tokenizer, self.settings.chat_format)
        sampling, budget = self._sampling(0), self.settings.token_budget
        return load_engine(self.settings, model, tokenizer, chat, device, sampling, budget), chat

    def _sampling(self, side: int) -> SamplingSettings:
        return SamplingSettings(self.temperatures[side], self.settings.top_p, 0, self.settings.max_new_tokens)

    @property
    def room(self) -> int:
        """The longest prompt in tokens that leaves both variants room for a response."""
        new, longest = self.settings.max_new_tokens, self.settings.max_prompt_tokens
        return min(prompt_room(engine, new, longest) for engine, _ in self.variants)

    def rows(self, prompts: list[Row], indices: Sequence[int]) -> list[Row]:
        """One row a comparison of the prompts with these indices; where no usable pair was drawn, it has `skipped`.

        A comparison that the engine could not sample has `error`; it is tried again at the next start.
        """
        per_prompt = self.settings.pairs_per_prompt
        waiting = {
            index * per_prompt + i: prompt
            for index, prompt in zip(indices, prompts, strict=True)
            for i in range(per_prompt)
        }
        rows: dict[int, Row] = {}
        skipped: dict[int, str] = {}
        failed: dict[int, str] = {}
        for attempt in range(self.settings.max_resamples + 1):
            todo = [index for index in waiting if index not in rows and index not in failed]
            if not todo:
                break
            pairs = self._pairs([waiting[i] for i in todo], todo, attempt)
            for index, pair in zip(todo, pairs, strict=True):
                one, two = pair
                if error := one.error or two.error:
                    failed[index] = error
                elif not (one.usable and two.usable):
                    skipped[index] = "unusable"
                elif one.text == two.text:
                    skipped[index] = "identical"
                else:
                    rows[index] = self._row(index, waiting[index], pair, attempt)
        without: dict[int, Row] = {index: {"skipped": skipped.get(index)} for index in waiting}
        without |= {index: {"prompt": waiting[index]["prompt"], "error": error} for index, error in failed.items()}
        return [
            {"index": index // per_prompt, **rows.get(index, {"id": str(index), **without[index]})} for index in waiting
        ]

    def _pairs(self, prompts: list[Row], indices: list[int], attempt: int) -> list[list[Drawn]]:
        """By prompt, a response of each variant, seeded by pair, side and attempt."""
        streams = [(self.seed * 1_000_003 + attempt) * 2 + side for side in (0, 1)]
        seeds = [[sample_seeds(stream, 1, first=index)[0] for index in indices] for stream in streams]
        if self.variants[0] is self.variants[1] and self.variants[0][0].name == InProcess.name:
            # Each prompt is computed once for both.
            both = self._draw(0, prompts, [seed for pair in zip(*seeds, strict=True) for seed in pair], True)
            return [both[i : i + 2] for i in range(0, len(both), 2)]
        sides = [self._draw(side, prompts, seeds[side], False) for side in (0, 1)]
        return [list(pair) for pair in zip(*sides, strict=True)]

    def _draw(self, side: int, prompts: list[Row], seeds: list[int], both: bool) -> list[Drawn]:
        """Responses of one variant, or prompt by prompt of both where they differ in their temperature only."""
        engine, chat = self.variants[side]
        k = 2 if both else 1
        encoded = [Prompt(row["prompt"], chat.encode_prompt(row["prompt"]), bool(row["is_safety"])) for row in prompts]
        own = {"temperatures": self.temperatures} if both else {}
        batch = engine.sample(encoded, k, self._sampling(side), seeds, **own)
        texts = [chat.decode_response(ids) for ids in batch.response_ids]
        return [
            Drawn(
                text,
                usable(chat, prompts[i // k]["prompt"], text),
                batch.finish_reasons[i] == "stop",
                batch.errors.get(i // k),
            )
            for i, text in enumerate(texts)
        ]

    def _row(self, index: int, prompt: Row, pair: list[Drawn], attempt: int) -> Row:
        order = [0, 1] if random.Random(f"{self.seed}/order/{index}").random() < 0.5 else [1, 0]
        return {
            "id": str(index),
            "prompt": prompt["prompt"],
            "is_safety": bool(prompt["is_safety"]),
            "source": prompt.get("source", ""),
            "response_a": pair[order[0]].text,
            "response_b": pair[order[1]].text,
            "unfinished": sum(not drawn.finished for drawn in pair),
            "attempt": attempt,
            "variants": order,  # the variant that wrote response_a, response_b: 0 the first, 1 the second
        }


def annotate_pairs(rows: list[Row], noise: float, seed: int) -> tuple[dict[str, list[Row]], Row]:
    """Records by objective, labelled by the simulated annotator, and figures about the labels."""
    from rlhf.simulation.annotator import annotate

    records: dict[str, list[Row]] = {"helpfulness": [], "safety": []}
    excluded, second_chosen = 0, Counter[str]()
    for row in rows:
        objective = "safety" if row["is_safety"] else "helpfulness"
        label = annotate(
            row["prompt"],
            row["response_a"],
            row["response_b"],
            random.Random(f"{seed}/annotate/{row['id']}"),  # by pair: the same label in whatever order
            noise,
            objective,
        )
        if objective == "safety" and label.safety is None:
            excluded += 1
            continue
        # Helpfulness pairs carry labels too: through those in its mix the safety model learns that ordinary
        # answers are safe, without which R_s < 0.15 would decide the reward of ordinary prompts (paper §3.2.3).
        records[objective].append(
            preference_record(row, label.choice, label.rating, label.safety, p_chosen=label.p_chosen)
        )
        second_chosen[objective] += row["variants"][label.choice] == 1
    figures: Row = {"excluded": excluded}
    for objective, mine in records.items():
        if mine:
            best = [max(record["p_chosen"], 1 - record["p_chosen"]) for record in mine]
            figures[f"{objective}_ceiling"] = round(sum(best) / len(best), 5)
            # Old model against new, or low temperature against high: the paper's free regression check (§3.4.1).
            figures[f"{objective}_second_variant_chosen"] = round(second_chosen[objective] / len(mine), 5)
    return records, figures


def write_records(folder: Path, records: dict[str, list[Row]], test_fraction: float, seed: int) -> Row:
    """The four files; returns their row counts, ratings and safety bins."""
    summary: Row = {}
    for objective, rows in records.items():
        train, held_out = split_by_prompt(rows, test_fraction, seed) if rows else ([], [])
        write_jsonl(folder / f"{objective}.jsonl", train)
        write_jsonl(folder / f"{objective}_test.jsonl", held_out)
        ratings, bins = Counter(row["rating"] for row in rows), Counter(row["safety"] for row in rows)
        summary |= {objective: len(train), f"{objective}_test": len(held_out)}
        summary[f"{objective}_ratings"] = {rating: ratings[rating] for rating in RATINGS}
        if objective == "safety":
            summary["safety_labels"] = {str(name): count for name, count in sorted(bins.items(), key=str)}
    return summary


def read_labels(settings: CollectSettings, folder: RunFolder) -> tuple[dict[str, list[Row]], Row]:
    """Records of `import_labels`. UserError above `max_reject_share`, naming the first mistakes by line."""
    path = Path(str(settings.import_labels))
    try:
        with path.open(encoding="utf-8") as file:
            records, mistakes, counts = import_labels(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"import_labels: {path} cannot be read: {error}") from error
    if mistakes:
        write_jsonl(folder.path / "rejected_labels.jsonl", mistakes)
    shown = "".join(f"\n  {path}, line {m['line']}: {m['reason']}" for m in mistakes[:5])
    if len(mistakes) > settings.max_reject_share * counts["rows"]:
        raise UserError(
            f"{len(mistakes)} of {counts['rows']} rows cannot be used, more than max_reject_share "
            f"{settings.max_reject_share}; all are in {folder.path / 'rejected_labels.jsonl'}{shown}"
        )
    if not any(records.values()):
        raise UserError(f"{path}: none of {counts['rows']} rows is labelled; fill choice and rating")
    if mistakes:
        print(f"{len(mistakes)} of {counts['rows']} rows set aside{shown}", file=sys.stderr)
    names = ("rows", "unlabelled", "excluded")
    return records, {name: counts[name] for name in names} | {"rejected": len(mistakes)}


def collect(settings: CollectSettings, run: RunSettings, folder: RunFolder) -> tuple[list[Row], Row]:
    """All pairs (of every process) and counts of what was drawn."""
    state = PartialState(cpu=run.use_cpu)
    worker = Worker(settings, run.seed, state.device)
    prompts = read_prompt_files(
        settings.prompt_files, worker.variants[0][1], worker.room, folder.path, settings.max_reject_share
    )
    prompts = prompts[: settings.max_prompts or None]
    # What happens to the pairs later (annotator, split) does not change them: relabelling draws nothing again.
    later = (
        *("annotator", "annotator_noise", "import_labels", "max_reject_share", "test_fraction", "token_budget"),
        *("prompt_files", "max_prompts", "max_prompt_tokens", "chat_format", *NOT_SAMPLED),
    )
    content: Row = {name: value for name, value in asdict(settings).items() if name not in later}
    content["sampling_engine"] = settings.engine
    content |= {"seed": run.seed, "weights": [weights_stamp(path) for path in worker.paths]}
    chat = worker.variants[0][1]
    content["prompts"] = [[chat.encode_prompt(p["prompt"]), p["is_safety"]] for p in prompts]
    size, total = settings.prompts_per_shard, len(prompts)
    shards = shard_folder(run.output_dir, content, total, size)
    with tqdm(total=total, desc="collecting", unit="prompt", disable=not state.is_main_process) as bar:
        for done in run_shards(shards, total, size, lambda items: worker.rows([prompts[i] for i in items], items)):
            bar.update(done - bar.n)
    state.wait_for_everyone()
    wanted = total * settings.pairs_per_prompt
    rows = without_failed(read_shards(shards, total, size), settings.max_failed_share, wanted)
    pairs = [row for row in rows if "skipped" not in row]
    counts = {
        "prompts": total,
        "failed": wanted - len(rows),
        "pairs": len(pairs),
        "skipped_identical": sum(row.get("skipped") == "identical" for row in rows),
        "skipped_unusable": sum(row.get("skipped") == "unusable" for row in rows),
        "resampled": sum(row["attempt"] > 0 for row in pairs),
        "unfinished_responses": sum(row["unfinished"] for row in pairs),
    }
    if not pairs:
        raise UserError(f"no prompt gave two different responses ({counts}); raise temperature_b or use another model")
    return pairs, counts


def write_pairs(folder: RunFolder, pairs: list[Row], settings: CollectSettings, seed: int) -> Row:
    """The pairs for people to label, or labelled by the simulated annotator; returns figures about the labels."""
    if settings.annotator == "none":
        shown = ("id", "prompt", "is_safety", "source", "response_a", "response_b")
        write_jsonl(folder.path / "unlabelled.jsonl", [{k: row[k] for k in shown} | LABELS for row in pairs])
        paths = [settings.model_name_or_path, settings.second_model_name_or_path or settings.model_name_or_path]
        sides = [
            {"model": path, "temperature": temperature}
            for path, temperature in zip(paths, (settings.temperature_a, settings.temperature_b), strict=True)
        ]
        origins = [{"id": row["id"], "a": sides[row["variants"][0]], "b": sides[row["variants"][1]]} for row in pairs]
        write_jsonl(folder.path / "origins.jsonl", origins)
        return {}
    records, figures = annotate_pairs(pairs, settings.annotator_noise, seed)
    figures |= write_records(folder.path, records, settings.test_fraction, seed)
    folder.samples(0, [row for mine in records.values() for row in mine[:4]])
    return figures


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Collects, or imports, preference data; returns the summary."""
    settings, run = parse(CollectSettings, RunSettings, args=args)
    resolved: Row = asdict(settings) | asdict(run)
    inputs = [*(settings.prompt_files or []), *([settings.import_labels] if settings.import_labels else [])]
    resolved |= {"data": data_fingerprints(inputs)}
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    folder = RunFolder(run.output_dir, resolved, stage="collect_preferences")
    if settings.import_labels is not None:
        records, summary = read_labels(settings, folder)
        return _finish(folder, summary | write_records(folder.path, records, settings.test_fraction, run.seed))
    pairs, summary = collect(settings, run, folder)
    if not folder.is_main:
        return summary
    with folder.finishing():
        return _finish(folder, summary | write_pairs(folder, pairs, settings, run.seed))


def _finish(folder: RunFolder, summary: Row) -> Row:
    folder.log(0, numbers(summary))
    return folder.finish(summary)


if __name__ == "__main__":
    entry(main)
