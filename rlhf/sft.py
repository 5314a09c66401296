"""Supervised fine-tuning on dialogues (paper 3.1; recipe sheet 1): the loss is on replies only, rows are packed.

    accelerate launch rlhf/sft.py --config configs/llama2_7b_sft.yaml --output_dir runs/sft

Reads dialogue files, writes `output_dir/model`. The loop is `trl.SFTTrainer`; ours are the ids and labels it gets:

1. Labels come from the chat format's own mask, built with the ids by the same append. Every reply of a dialogue is
   trained, its EOS included (recipe sheet 10.26); rows marked `train_on: last` (Ghost Attention, 3.3) train the last.
2. A dialogue longer than `max_length` loses its oldest exchanges, never its system message or its last question; one
   whose last exchange alone is too long is left out. Both are counted and reported.
3. Packed dialogues get a block-diagonal mask and positions from 0, so that none sees another: a packed row is worth
   exactly its dialogues one by one. (trl's padding-free collator would join the batch to one row of all its tokens;
   without FlashAttention that costs batch times the attention memory.)
4. The loss is the sum over trained tokens divided by their number in the whole step, over micro-batches and processes:
   1 x 8 is 4 x 2.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts rlhf/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: I001  (first: it switches off telemetry before trl is imported)

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.records import read_dialogues, split_by_prompt
from configs.sampling_settings import SamplingSettings
from configs.sft_settings import SFTSettings
from rlhf.models import data_fingerprint, load_policy, model_card, save_policy
from rlhf.tokenizer import load_tokenizer
from rlhf.hardware import attend_in_float32
from rlhf.models import unwrap
from rlhf.roles import rescaled_logits
from rlhf.run import RunFolder
from rlhf.sampler import sample
from rlhf.sft_rows import IGNORED, collator_for, encode_rows, mix, to_dataset


class RunFolderCallback(TrainerCallback):
    """Hands every log record of the trainer to the run folder."""

    def __init__(self, run: RunFolder):
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ANN001, D102
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        numbers.pop("num_tokens", None)  # trl sums the attention mask, which is two-dimensional for it
        numbers.pop("eval_num_tokens", None)
        if state.is_world_process_zero and numbers:
            self.run.log(state.global_step, numbers)


class CpuSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` with the plain loss of `transformers.Trainer`, the head computed for trained tokens only.

    trl's own saves memory by computing the head in chunks, twice, with the entropy beside it. On a CPU memory is not
    short, and with a small model that took 55 % of a step's time; the head of prompt tokens took a sixth of the rest.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Evaluation wants logits; over processes the call must go through the wrapper that sums gradients.
        if return_outputs or self.accelerator.num_processes > 1 or rescaled_logits(model):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        causal = unwrap(model)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        trained_BT = inputs["labels"][:, 1:] != IGNORED
        with self.accelerator.autocast():
            decoder = getattr(causal, causal.base_model_prefix)
            hidden_BTD = decoder(**rest, use_cache=False).last_hidden_state
            logits_NV = causal.get_output_embeddings()(hidden_BTD[:, :-1][trained_BT])
        targets_N = inputs["labels"][:, 1:][trained_BT]
        loss_sum = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        return loss_sum / (len(targets_N) if num_items_in_batch is None else num_items_in_batch)


def build_trainer(
    model: Any, tokenizer: Any, train: Dataset, held_out: Dataset | None, sft: SFTSettings, run: RunSettings
) -> SFTTrainer:
    """`trl.SFTTrainer` over rows that are encoded and packed already; it prepares nothing and adds nothing."""
    config = SFTConfig(
        output_dir=run.output_dir,
        seed=run.seed,
        use_cpu=run.use_cpu or not torch.cuda.is_available(),
        report_to="none",  # the run folder feeds the trackers
        logging_steps=run.logging_steps,
        per_device_train_batch_size=sft.per_device_train_batch_size,
        per_device_eval_batch_size=sft.per_device_eval_batch_size,
        gradient_accumulation_steps=sft.gradient_accumulation_steps,
        num_train_epochs=sft.num_train_epochs,
        max_steps=sft.max_steps,
        learning_rate=sft.learning_rate,
        lr_scheduler_type=sft.lr_scheduler_type,
        warmup_steps=sft.warmup_steps,
        weight_decay=sft.weight_decay,
        adam_beta1=sft.adam_beta1,
        adam_beta2=sft.adam_beta2,
        adam_epsilon=sft.adam_epsilon,
        max_grad_norm=sft.max_grad_norm,
        gradient_checkpointing=sft.gradient_checkpointing,
        bf16=sft.bf16,
        eval_strategy="steps" if sft.eval_steps > 0 and held_out is not None else "no",
        eval_steps=sft.eval_steps or None,
        save_strategy="steps" if sft.save_steps > 0 else "no",
        save_steps=sft.save_steps or 500,
        save_total_limit=sft.save_total_limit,
        max_length=sft.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        train_sampling_strategy=sft.train_sampling_strategy,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer_type = CpuSFTTrainer if config.use_cpu else SFTTrainer
    collator = collator_for(model, tokenizer.pad_token_id)
    if config.use_cpu and sft.bf16:
        attend_in_float32(unwrap(model))
    return trainer_type(
        model=model,
        args=config,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


@torch.no_grad()
def held_out_loss(trainer: SFTTrainer) -> tuple[float, int]:
    """Mean negative log-likelihood in nats over the trained tokens of the held-out set, and their number.

    The trainer's own `eval_loss` is a mean of batch means, in which a token's weight depends on its batch.
    """
    trainer.model.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.get_eval_dataloader():
        outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)
        totals += torch.stack([-outputs.log_probs.sum(), outputs.label_mask.sum()]).double().cpu()
    loss_sum, tokens = trainer.accelerator.reduce(totals.to(trainer.accelerator.device, torch.float32)).tolist()
    return loss_sum / max(tokens, 1.0), int(tokens)


def read_all(files: Sequence[str], sft: SFTSettings, run: RunSettings, chat_format: ChatFormat) -> list[list[dict]]:
    """The rows of each file; bad ones go to the reject file, and too large a share of them raises."""
    reject_file = sft.reject_file or str(Path(run.output_dir) / "rejected.jsonl")
    options = {"reject_file": reject_file, "max_reject_share": sft.max_reject_share, "chat_format": chat_format}
    return [read_dialogues(path, **options).rows for path in files]


def write_samples(model: Any, chat_format: ChatFormat, pad_id: int, rows: list[dict], sft: SFTSettings, run: Any,
                  step: int, seed: int) -> None:  # fmt: skip
    """Decoded replies of the trained model to held-out prompts, beside the reply of the data."""
    prompts = [row["messages"][:-1] for row in rows[: sft.num_samples]]
    if not prompts:
        return
    batch = sample(
        model.eval(),
        [chat_format.encode_prompt(prompt) for prompt in prompts],
        1,
        SamplingSettings(max_new_tokens=sft.sample_max_new_tokens),
        stop_ids=chat_format.stop_ids,
        pad_id=pad_id,
        seed=seed,
    )
    run.samples(step, [
        {"prompt": prompt, "response": chat_format.decode_response(ids), "data": row["messages"][-1]["content"]}
        for prompt, ids, row in zip(prompts, batch.response_ids, rows, strict=False)
    ])  # fmt: skip


def last_checkpoint(run: RunSettings) -> str | None:
    """The folder of the newest checkpoint of an unfinished run, where the run may be resumed."""
    return get_last_checkpoint(run.output_dir) if run.resume and Path(run.output_dir).is_dir() else None


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Train and save; returns the summary that is also `output_dir/summary.json`."""
    sft, model_settings, run_settings = cli.parse(SFTSettings, ModelSettings, RunSettings, args=args)
    settings = {**asdict(sft), **asdict(model_settings), **asdict(run_settings)}
    if done := RunFolder.completed(run_settings.output_dir, settings):
        return done
    if not sft.train_files:
        raise UserError("train_files: name at least one dialogue file")
    set_seed(run_settings.seed)
    tokenizer = load_tokenizer(model_settings.model_name_or_path)
    chat_format = load_chat_format(tokenizer, model_settings.chat_format)

    files = read_all(sft.train_files, sft, run_settings, chat_format)
    if sft.eval_files:
        held_out = [row for rows in read_all(sft.eval_files, sft, run_settings, chat_format) for row in rows]
    else:
        pairs = [split_by_prompt(rows, sft.eval_fraction, run_settings.seed) for rows in files]
        files, held_out = [train for train, _ in pairs], [row for _, out in pairs for row in out]
    train_rows = mix(files, sft.mix_weights, run_settings.seed)
    limits = (chat_format, sft.max_length, sft.max_reply_tokens)
    (examples, counts), (held_out_examples, held_out_counts) = (encode_rows(r, *limits) for r in (train_rows, held_out))
    if not examples:
        limit = f"max_length={sft.max_length}"
        if counts["long_reply"]:
            limit += f" and max_reply_tokens={sft.max_reply_tokens}"
        raise UserError(f"train_files: none of {len(train_rows)} dialogues fits {limit} tokens")

    checkpoint = last_checkpoint(run_settings)
    run = RunFolder(run_settings.output_dir, settings, "sft", int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0)
    model = load_policy(model_settings)
    trainer = build_trainer(
        model,
        tokenizer,
        to_dataset(examples, sft.max_length, sft.packing),
        to_dataset(held_out_examples, sft.max_length, sft.packing) if held_out_examples else None,
        sft,
        run_settings,
    )
    trainer.add_callback(RunFolderCallback(run))
    output = trainer.train(resume_from_checkpoint=checkpoint)

    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "train_loss": output.training_loss,
        "train_dialogues": len(examples),
        "train_rows": len(trainer.train_dataset),
        "train_tokens": sum(label != IGNORED for example in examples for label in example["labels"]),
        "shortened": counts["shortened"],
        "too_long": counts["too_long"] + held_out_counts["too_long"],
        "long_reply": counts["long_reply"] + held_out_counts["long_reply"],
        "held_out_dialogues": len(held_out_examples),
        "seconds": output.metrics["train_runtime"],
    }
    if held_out_examples:
        loss, tokens = held_out_loss(trainer)
        summary |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "eval_tokens": tokens}
    run.log(trainer.state.global_step, {k: v for k, v in summary.items() if isinstance(v, int | float)})
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:
        write_samples(unwrapped, chat_format, tokenizer.pad_token_id, held_out, sft, run, summary["steps"],
                      run_settings.seed)  # fmt: skip
        data = {path: data_fingerprint(path) for path in sft.train_files + sft.eval_files}
        save_policy(unwrapped, tokenizer, Path(run_settings.output_dir) / "model",
                    model_card("sft", settings, data, summary))  # fmt: skip
    trainer.accelerator.wait_for_everyone()
    return run.finish(summary)


if __name__ == "__main__":
    cli.entry(main)
