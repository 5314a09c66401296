"""Train a reward model on preference pairs (Llama 2 paper §3.2.2); run once for helpfulness, once for safety.

    accelerate launch rlhf/train_reward.py --config configs/reward_hh_harmless.yaml \\
        --model_name_or_path <chat model> --output_dir runs/reward
    accelerate launch --num_processes 8 rlhf/train_reward.py --config ...          (one process a GPU)

1. The scalar head replaces the next-token head of a chat checkpoint; the score is read at the last token.
2. Loss: -log sigmoid(r_c - r_r - m), m by the pair's rating (Eq. 2, Table 27). Rows without a rating get m = 0
   and are counted.
3. The safety model adds a binary cross-entropy on the safety labels; the paper gives no formula.
4. Prompts beyond max_length lose their oldest turns, never the response.

Writes a run folder: settings, metrics.jsonl, test pairs with scores, summary.json, and the model in `model/`.
Expect an accuracy of 0.5 at the start and, on HH-RLHF, 0.6 to 0.7 after one epoch.
"""

import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts rlhf/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: E402,I001  (first: it switches off telemetry before trl is imported)

import yaml  # noqa: E402
from accelerate import PartialState  # noqa: E402

from configs.chat import load_chat_format, training_chat_template  # noqa: E402
from configs.errors import UserError  # noqa: E402
from configs.model_settings import ModelSettings, RunSettings  # noqa: E402
from configs.records import write_jsonl  # noqa: E402
from configs.reward_settings import RewardSettings  # noqa: E402
from reward import metrics  # noqa: E402
from reward.data import EncodedPair, encode_pairs  # noqa: E402
from reward.evaluation import at_chance, pair_summary  # noqa: E402
from reward.loss import margin_table  # noqa: E402
from reward.model import add_lora, create_reward_model, save_reward_model  # noqa: E402
from rlhf.hardware import attend_in_float32  # noqa: E402
from rlhf.models import data_fingerprints, freeze_embeddings, model_card, resolve_dtype, unwrap  # noqa: E402
from rlhf.tokenizer import load_tokenizer
from rlhf.reward_inputs import read_inputs  # noqa: E402
from rlhf.reward_training import CHECKPOINTS, RewardTrainer, score_pairs, training_arguments  # noqa: E402
from rlhf.run import NOT_COMPARED, RunFolder  # noqa: E402
from rlhf.trainer_checkpoints import drop_newer, newest_whole, step_of  # noqa: E402

logger = logging.getLogger(__name__)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Train, test, save; returns the summary that is also in `output_dir/summary.json`."""
    settings, model_settings, run_settings = cli.parse(RewardSettings, ModelSettings, RunSettings, args=args)
    # Other data in the same file make another run.
    data = data_fingerprints(settings.train_files, settings.eval_files)
    resolved = {**asdict(settings), **asdict(model_settings), **asdict(run_settings), "data": data}
    if done := RunFolder.completed(run_settings.output_dir, resolved):
        return done
    if model_settings.load_in_4bit and not model_settings.use_peft:
        raise UserError("load_in_4bit: 4-bit weights cannot be trained themselves; add use_peft: true")
    if model_settings.adapter_path is not None and not model_settings.use_peft:
        raise UserError("adapter_path: training all weights starts from a merged model, the `model` folder around it")
    margins = rating_margins(settings)
    started = monotonic()
    arguments = training_arguments(run_settings, settings)  # joins the processes of a distributed run
    is_main = arguments.process_index == 0
    output_dir = Path(run_settings.output_dir)

    # Data
    tokenizer = load_tokenizer(model_settings.model_name_or_path)
    chat_format = load_chat_format(tokenizer, model_settings.chat_format)
    main_folder = output_dir if is_main else None
    inputs = read_inputs(settings, chat_format, run_settings.seed, main_folder)
    train_pairs, refused, counts = encode_pairs(inputs.train_rows, chat_format, settings.max_length, margins)
    test_pairs, test_refused, test_counts = encode_pairs(inputs.test_rows, chat_format, settings.max_length, margins)
    _check_refused(len(inputs.train_rows), refused, settings, main_folder, "train")
    _check_refused(len(inputs.test_rows), test_refused, settings, main_folder, "test")
    if settings.safety_weight and all(pair.row.get("safety") is None for pair in train_pairs):
        raise UserError(
            f"safety_loss_weight: {settings.safety_weight}, but no training row has a `safety` field "
            "(chosen_safe, both_safe or both_unsafe); add it or set safety_loss_weight to 0"
        )

    # Model
    model: Any = create_reward_model(
        model_settings.model_name_or_path,
        tokenizer,
        resolve_dtype(model_settings, trainable=True),
        model_settings.attn_implementation,
        run_settings.seed,
        arguments.device if model_settings.load_in_4bit else None,
    )
    if model_settings.use_peft:
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()  # frozen embeddings would cut the recomputed graph off
        model = add_lora(
            model,
            model_settings.lora_r,
            model_settings.lora_alpha,
            model_settings.lora_dropout,
            model_settings.lora_target_modules,
            model_settings.adapter_path,
        )
    elif model_settings.freeze_embeddings:
        freeze_embeddings(model)

    # Training
    def evaluate_pairs() -> dict[str, float]:
        scores = score_pairs(
            trainer.accelerator.unwrap_model(trainer.model),
            test_pairs,
            settings.score_token_budget,
            arguments.process_index,
            arguments.world_size,
        )
        if not all(map(math.isfinite, (score for side in scores for score in side))):
            raise UserError("the model's scores are not numbers any more: lower learning_rate or set bf16: false")
        outcomes = [metrics.outcome(chosen, rejected) for chosen, rejected in zip(*scores, strict=True)]
        latest.update(scores=scores, outcomes=outcomes)
        return {"accuracy": sum(outcomes) / len(outcomes)} if outcomes else {}

    latest: dict[str, Any] = {}
    resolved["processes"] = arguments.world_size
    checkpoint = last_checkpoint(output_dir, resolved) if run_settings.resume else None
    resumed_at = 0 if checkpoint is None else step_of(checkpoint)
    PartialState().wait_for_everyone()  # all have read the folder before one writes to it
    run = RunFolder(run_settings.output_dir, resolved, "train_reward", resumed_at)
    if is_main:  # those of other settings would pass for newer ones
        drop_newer(output_dir / CHECKPOINTS, resumed_at)
    if arguments.use_cpu and settings.bf16:
        attend_in_float32(unwrap(model))
    trainer = RewardTrainer(model, arguments, settings, train_pairs, tokenizer.pad_token_id, evaluate_pairs, run.log)
    trainer.resume(checkpoint)
    trained = monotonic()
    trainer.evaluate()

    # Results
    chosen, rejected = latest["scores"]
    summary: dict[str, Any] = {
        "objective": settings.objective,
        "margin": settings.margin if settings.margin_table is None else list(settings.margin_table),
        **pair_summary([pair.row for pair in test_pairs], chosen, rejected),
        "steps": trainer.state.global_step,
        "train_pairs": counts["pairs"],
        "train_by_source": dict(sorted(Counter(str(pair.row.get("source")) for pair in train_pairs).items())),
        "mix": inputs.report,
        "mismatched": inputs.mismatched,
        "unrated": counts["unrated"],
        "shortened": counts["shortened"],
        "too_long": counts["refused"],
        "test_unrated": test_counts["unrated"],
        "test_prompts_in_training": _overlap(train_pairs, test_pairs),
        "resumed_at_step": resumed_at,
        "train_seconds": trained - started,  # since the last start
    }
    if is_main:
        if warning := at_chance(summary):
            logger.warning("%s: %s", output_dir, warning)
        run.samples(trainer.state.global_step, _samples(test_pairs, chosen, rejected, settings.num_samples))
        quoted = {name: value for name, value in summary.items() if isinstance(value, int | float | str)}
        card = model_card(f"reward_{settings.objective}", resolved, data, quoted)
        tokenizer.chat_template = training_chat_template(chat_format)
        save_reward_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, output_dir / "model", card)
    summary["seconds"] = monotonic() - started
    result = run.finish(summary)
    trainer.accelerator.wait_for_everyone()
    return result


def last_checkpoint(output_dir: Path, resolved: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of a run with these settings and data; None where there is none to continue from.

    A checkpoint whose files are not as they were written is refused with a warning, and the one before it is taken.
    UserError where another number of processes wrote it: the steps that it counts are not the same pairs.
    """
    try:
        settings = yaml.safe_load((output_dir / "settings.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if any(settings.get(name) != value for name, value in resolved.items() if name not in NOT_COMPARED):
        return None
    checkpoint = newest_whole(output_dir / CHECKPOINTS)
    processes = settings.get("processes")
    if checkpoint is not None and processes != resolved.get("processes"):
        raise UserError(
            f"{checkpoint} was written by {processes} processes, and this run has {resolved.get('processes')}: start "
            "it with as many, or pass --resume false to begin again"
        )
    return checkpoint


def rating_margins(settings: RewardSettings) -> dict[str, float] | None:
    """Rating -> margin, or None for Eq. 1."""
    if settings.margin == "none" and settings.margin_table is None:
        return None
    try:
        return margin_table(settings.margin, settings.margin_table)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_refused(
    total: int, refused: Sequence[dict[str, Any]], settings: RewardSettings, folder: Path | None, name: str
) -> None:
    """Write the pairs that do not fit into max_length; stop when they are too many or when nothing is left."""
    if refused and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"too-long-{name}.jsonl", refused)
    if len(refused) > settings.max_reject_share * total:
        raise UserError(
            f"max_length: {len(refused)} of {total} {name} pairs do not fit {settings.max_length} tokens even with the "
            f"last turn alone, over max_reject_share {settings.max_reject_share}; raise max_length or max_reject_share"
        )
    if len(refused) == total:
        fix = "eval_files or eval_fraction" if name == "test" else "train_files"
        raise UserError(f"{fix}: no {name} pair is left")


def _overlap(train_pairs: Sequence[EncodedPair], test_pairs: Sequence[EncodedPair]) -> int:
    """Test pairs whose prompt is also a training prompt: their accuracy says less about new prompts."""
    seen = {str(pair.row["prompt"]) for pair in train_pairs}
    return sum(str(pair.row["prompt"]) in seen for pair in test_pairs)


def _samples(
    pairs: Sequence[EncodedPair], chosen: Sequence[float], rejected: Sequence[float], count: int
) -> list[dict[str, Any]]:
    """The first `count` test pairs in words, with both raw scores."""
    return [
        {
            "prompt": pair.row["prompt"],
            "chosen": pair.row["chosen"][-1]["content"],
            "rejected": pair.row["rejected"][-1]["content"],
            "r_chosen": r_chosen,
            "r_rejected": r_rejected,
            "margin": pair.margin,
            "rating": pair.row.get("rating"),
            "safety": pair.row.get("safety"),
            "source": pair.row.get("source"),
        }
        for pair, r_chosen, r_rejected in zip(pairs[:count], chosen, rejected, strict=False)
    ]


if __name__ == "__main__":
    cli.entry(main)
