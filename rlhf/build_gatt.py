"""Builds a Ghost Attention data set by sampling from the latest policy (paper §3.3, App. A.3.5; recipe sheet §6).

    accelerate launch rlhf/build_gatt.py --config configs/llama2_7b_gatt.yaml --output_dir runs/gatt-data
    accelerate launch --num_processes 8 rlhf/build_gatt.py --config ...        # chunks are shared out over processes

Then `rlhf/sft.py --train_files runs/gatt-data/gatt.jsonl`. What differs from the paper, or is open there:

1. User turns are drawn from single-turn prompts, or are those of `dialogue_files`. Every reply is sampled anew under
   the instruction, so one row with the loss on every reply stands for n last-turn samples (`gatt.transform`).
   `train_on: last` gives the paper's rows. `sampling_context: turn` samples each turn by itself.
2. While sampling the instruction has its full wording; half of the rows are trained with the shortened one.
3. Replies that fail the kind's checker are drawn again; a dialogue in which that fails ends before that turn.
4. Single turns of the same policy, obeying an instruction or plain, and a few long dialogues without any instruction
   are mixed in, so that turn 1 and plain helpfulness stay.
5. `change_share` of the dialogues get a second instruction in mid-dialogue (the paper did not teach that).

Every chunk is a shard that is written in one piece: a build that was killed goes on behind its last shard, with the
rows that an undisturbed build gives.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from configs.chat import ChatFormat, load_chat_format
from configs.engine_settings import NOT_SAMPLED, EngineSettings
from configs.errors import UserError
from configs.gatt_settings import GattSettings
from configs.model_settings import ModelSettings, RunSettings
from configs.records import read_dialogues, read_prompts, write_jsonl
from configs.sampling_settings import SamplingSettings
from gatt.instructions import obeys
from gatt.synth import Dialogue, Judge, Plan, Reply, counts, synthesise
from gatt.transform import change_turn_after_shortening, shorten
from rlhf import cli
from rlhf.gatt_plans import (
    GATT,
    REPLAY,
    check_encodable,
    first_turns,
    make_plans,
    usable_dialogues,
    usable_prompts,
)
from rlhf.gatt_report import dataset_card, summarise
from rlhf.run import RunFolder, write_atomic
from rlhf.shards import read_shards, run_shards, shard_folder


def make_record(
    dialogue: Dialogue, wording: str, source: str, train_on: str, chat_format: ChatFormat, max_length: int
) -> tuple[dict[str, Any] | None, int, str]:
    """The training row of a dialogue: (row or None, exchanges left out for length, why there is no row).

    A row keeps its first turn, which holds the instruction, whatever its length.
    """
    if not dialogue.messages:
        return None, 0, dialogue.cut
    row = dialogue.record(wording)
    if source == GATT:
        row["train_on"] = train_on
    change = dialogue.change
    try:
        fitting = shorten(
            row["messages"], row["train_on"], lambda m: len(chat_format.encode_dialogue(m).input_ids), max_length,
            change.turn if change else None,
        )  # fmt: skip
    except UserError as error:  # a reply whose text poses as a special token, or one exchange longer than the limit
        return None, 0, str(error)
    left_out = (len(row["messages"]) - len(fitting)) // 2
    instruction = dialogue.plan.instruction
    given = None if instruction is None else {**instruction.record(), "wording": wording, "slot": dialogue.plan.slot}
    made = {**row, "messages": fitting, "instruction": given, "source": source}
    if change:
        turn = change_turn_after_shortening(change.turn, dialogue.turns, dialogue.turns - left_out, row["train_on"])
        if turn is not None:
            made["change"] = {"turn": turn, **change.instruction.record(), "wording": change.wording}
    return made, left_out, ""


# (indices of dialogues, id lists of each) -> a raw score for each id list: `rlhf.growing_scores.GrowingScores`
Scores = Callable[[list[int], list[list[list[int]]]], list[list[float]]]
# (how to sample, seed) -> what samples the dialogues of one chunk
MakeReply = Callable[[SamplingSettings, int], Reply]


def reward_judge(
    chat_format: ChatFormat, is_safety: dict[str, bool], score_helpfulness: Scores, score_safety: Scores | None
) -> Judge:
    """Scores candidates by the combined reward (paper §3.2.3), or by helpfulness where there is no safety model.

    `is_safety` maps the text of a prompt to its tag. The models read the context as it was sampled, instruction
    included.
    """
    import torch

    from reward.combine import combined_reward

    def judge(
        rows: list[int], contexts: list[Any], candidates: list[list[str]], instructions: list[Any]
    ) -> list[list[float]]:
        ids = [
            [
                chat_format.encode_dialogue([*context, {"role": "assistant", "content": text}]).input_ids
                for text in texts
            ]
            for context, texts in zip(contexts, candidates, strict=True)
        ]
        r_helpfulness = score_helpfulness(rows, ids)
        if score_safety is None:
            return r_helpfulness
        combined = []
        for context, instruction, r_s, r_h in zip(
            contexts, instructions, score_safety(rows, ids), r_helpfulness, strict=True
        ):
            text = context[-1]["content"]
            tagged = is_safety.get(text if instruction is None else text.removeprefix(f"{instruction.text} "), False)
            reward = combined_reward(torch.tensor(r_s), torch.tensor(r_h), torch.full((len(r_s),), tagged))
            combined.append(reward.tolist())
        return combined

    return judge


class Builder:
    """Makes chunks; models are loaded when the first chunk that is not on disk needs them."""

    def __init__(
        self,
        gatt: GattSettings,
        engine_settings: EngineSettings,
        model_settings: ModelSettings,
        sampling: SamplingSettings,
        tokenizer: Any,
        chat_format: ChatFormat,
        prompts: Sequence[dict[str, Any]],
        seed: int,
        device: Any,
    ):
        self.gatt, self.engine_settings, self.model_settings = gatt, engine_settings, model_settings
        self.sampling, self.seed = sampling, seed
        self.tokenizer, self.chat_format, self.device = tokenizer, chat_format, device
        self.is_safety = {row["prompt"][0]["content"].strip(): bool(row.get("is_safety")) for row in prompts}
        self._loaded: tuple[MakeReply, Judge | None] | None = None

    def chunk(self, number: int, plans: Sequence[tuple[Plan, str, str]]) -> list[dict[str, Any]]:
        """One shard: a row for each plan, with its record (or why there is none) and what sampling it took."""
        make_reply, judge = self._load()
        dialogues: dict[int, Dialogue] = {}
        for places, sampling in self._temperatures(plans):
            seed = random.Random(f"gatt chunk {self.seed}/{number}/{places[0]}").getrandbits(62)
            made = synthesise(
                [plans[i][0] for i in places], make_reply(sampling, seed), obeys, self.gatt.max_candidates, judge,
                self.gatt.sampling_context,
            )  # fmt: skip
            dialogues |= dict(zip(places, made, strict=True))
        rows = []
        for i, (_, wording, source) in enumerate(plans):
            dialogue = dialogues[i]
            record, left_out, refused = make_record(
                dialogue, wording, source, self.gatt.train_on, self.chat_format, self.gatt.max_length
            )
            rows.append({
                "record": record, "source": source, "refused": refused, "exchanges_left_out": left_out,
                "counts": counts([dialogue]), "first_draft_obeyed": dialogue.first_draft_obeyed,
            })  # fmt: skip
        return rows

    def _temperatures(self, plans: Sequence[tuple[Plan, str, str]]) -> list[tuple[list[int], SamplingSettings]]:
        """Places of the plans that are sampled together, and how: one temperature, unless plain ones have their own."""
        if self.gatt.plain_temperature is None:
            return [(list(range(len(plans))), self.sampling)]
        plain = [i for i, (plan, _, _) in enumerate(plans) if plan.instruction is None]
        others = sorted(set(range(len(plans))) - set(plain))
        groups = [(others, self.sampling), (plain, replace(self.sampling, temperature=self.gatt.plain_temperature))]
        return [(places, sampling) for places, sampling in groups if places]

    def _load(self) -> tuple[MakeReply, Judge | None]:
        if self._loaded is None:
            self._loaded = self._sampler(), self._judge()
        return self._loaded

    def _sampler(self) -> MakeReply:
        """Whole dialogues are sampled with a cache that stays where this process samples; else context by context."""
        from rlhf import dialogues as engines

        chat_format, gatt = self.chat_format, self.gatt
        if gatt.sampling_context == "dialogue" and self.engine_settings.engine in ("auto", "in_process"):
            from rlhf.models import load_policy

            model = load_policy(self.model_settings, trainable=False).to(self.device)
            pad_id = self.tokenizer.pad_token_id
            return lambda sampling, seed: engines.DialogueEngine(
                model, chat_format, pad_id, sampling, gatt.max_length, seed
            )
        from rlhf.engines import load_engine

        engine = load_engine(
            self.engine_settings, self.model_settings, self.tokenizer, chat_format, self.device, self.sampling
        )
        share = self.engine_settings.max_failed_share
        return lambda sampling, seed: engines.ContextEngine(engine, chat_format, sampling, gatt.max_length, seed, share)

    def _judge(self) -> Judge | None:
        if self.gatt.helpfulness_reward_model is None:
            return None
        from reward.model import load_reward_model
        from rlhf.growing_scores import GrowingScores

        def scorer(path: str) -> GrowingScores:
            return GrowingScores(load_reward_model(path).to(self.device))

        safety = self.gatt.safety_reward_model
        return reward_judge(
            self.chat_format,
            self.is_safety,
            scorer(self.gatt.helpfulness_reward_model),
            scorer(safety) if safety else None,
        )


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Build the data set; returns the summary that is also `output_dir/summary.json`."""
    gatt, engine, model_settings, sampling, run_settings = cli.parse(
        GattSettings, EngineSettings, ModelSettings, SamplingSettings, RunSettings, args=args
    )
    engine.check_engine()
    from rlhf.models import data_fingerprints

    settings = asdict(gatt) | asdict(engine) | asdict(model_settings) | asdict(sampling) | asdict(run_settings)
    values = [file for file in (gatt.values_file, gatt.unseen_values_file) if file]
    settings["data"] = data_fingerprints(gatt.prompt_files, gatt.dialogue_files, gatt.replay_files, values)
    if done := RunFolder.completed(run_settings.output_dir, settings):
        return done
    if not gatt.prompt_files and not gatt.dialogue_files:
        raise UserError("prompt_files: name at least one file of prompt records, or dialogue_files")
    from accelerate import PartialState
    from tqdm import tqdm

    from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

    started = time.monotonic()
    state = PartialState(cpu=run_settings.use_cpu)
    output_dir = Path(run_settings.output_dir)
    tokenizer = load_tokenizer(model_settings.model_name_or_path)
    chat_format = load_chat_format(tokenizer, model_settings.chat_format)
    for name in ("helpfulness_reward_model", "safety_reward_model"):
        if path := getattr(gatt, name):
            check_same_tokenizer(tokenizer, path, name)
    run = RunFolder(output_dir, settings, "build_gatt")

    def rows_of(read: Callable[..., Any], paths: Sequence[str], rejects: str) -> list[dict[str, Any]]:
        options = {
            "reject_file": output_dir / rejects if state.is_main_process else None,
            "max_reject_share": gatt.max_reject_share,
            "chat_format": chat_format,
        }
        return [row for path in paths for row in read(path, **options).rows]

    prompts, prompt_counts = usable_prompts(rows_of(read_prompts, gatt.prompt_files, "rejected.jsonl"))
    dialogues = None
    if gatt.dialogue_files:
        asked = rows_of(read_dialogues, gatt.dialogue_files, "rejected_dialogues.jsonl")
        dialogues, counted = usable_dialogues(asked, gatt.min_turns)
        prompts, prompt_counts = prompts or first_turns(dialogues), prompt_counts | counted
        run.log(0, counted)
    plans = make_plans(gatt, prompts, run_settings.seed, dialogues)
    changes = [plan.change.instruction for plan, _, _ in plans if plan.change]
    check_encodable([*(plan.instruction for plan, _, _ in plans), *changes], chat_format)

    not_in_rows = ("output_dir", "report_to", "logging_steps", "resume", *NOT_SAMPLED)
    content = {k: v for k, v in settings.items() if k not in not_in_rows}
    content["sampling_engine"] = engine.engine  # auto and server_url are one choice with server and server_url
    size, total = gatt.chunk_size, len(plans)
    shards = shard_folder(output_dir, content, total, size)
    if not run_settings.resume and state.is_main_process:
        for path in shards.glob("*.gz"):
            path.unlink()
    state.wait_for_everyone()
    builder = Builder(
        gatt, engine, model_settings, sampling, tokenizer, chat_format, prompts, run_settings.seed, state.device
    )
    resumed = sum(1 for _ in shards.glob("*.gz"))
    with tqdm(total=total, desc="Ghost Attention", unit="dialogue", disable=not state.is_main_process) as bar:
        for built in run_shards(
            shards, total, size, lambda items: builder.chunk(items[0] // size, [plans[i] for i in items])
        ):
            bar.update(built - bar.n)
    state.wait_for_everyone()

    rows = read_shards(shards, total, size)
    records = [row["record"] for row in rows if row["record"]]
    if not any(record["source"] == GATT for record in records):
        raise UserError(
            f"no dialogue obeyed its instruction at turn 1 ({len(rows)} planned): the policy cannot follow "
            "instructions of these kinds; name others in kinds, raise max_candidates, or teach them in SFT first"
        )
    rng = random.Random(f"gatt order {run_settings.seed}")
    replay = draw_replay(gatt, len(records), chat_format, rng)
    records += replay
    rng.shuffle(records)
    summary = summarise(rows, len(replay)) | prompt_counts
    summary |= {"train_file": str(output_dir / "gatt.jsonl"), "chunks": -(-total // size), "chunks_resumed": resumed}
    with run.finishing():
        if state.is_main_process:
            write_jsonl(output_dir / "gatt.jsonl", records)
            write_atomic(output_dir / "README.md", dataset_card(summary, settings))
            by_turn = summary["first_draft_obedience"].items()
            run.log(len(rows), {f"obeyed/turn_{turn}": share for turn, share in by_turn})
            run.samples(len(rows), [record for record in records if record["source"] == GATT][:3])
        summary["seconds"] = round(time.monotonic() - started, 1)
        summary = run.finish(summary)
    state.wait_for_everyone()
    return summary


def draw_replay(gatt: GattSettings, built: int, chat_format: ChatFormat, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of `replay_files` such that they are `replay_files_share` of all rows; all of them where there are fewer."""
    if not gatt.replay_files:
        return []
    rows = [
        row
        for path in gatt.replay_files
        for row in read_dialogues(path, chat_format=chat_format, max_reject_share=gatt.max_reject_share).rows
    ]
    wanted = round(built * gatt.replay_files_share / (1 - gatt.replay_files_share))
    drawn = rng.sample(rows, min(wanted, len(rows)))
    return [
        {"messages": r["messages"], "train_on": r.get("train_on", "all"), "instruction": None, "source": REPLAY}
        for r in drawn
    ]


if __name__ == "__main__":
    cli.entry(main)
