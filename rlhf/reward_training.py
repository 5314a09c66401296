"""The reward models' training loop: the Hugging Face Trainer with the ranking loss in place of its own.

Losses are sums over pairs, divided by the pairs of the whole optimizer step. The Trainer counts those before the first
backward of a step, over all micro-batches and processes (`num_items_in_batch`, the number of `labels`), so that 1 x 8
pairs, 4 x 2 accumulated and 2 processes x 4 give the same step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from configs.model_settings import RunSettings
from configs.reward_settings import RewardSettings
from reward.collate import collate_pair_trees, collate_pairs
from reward.data import EncodedPair
from reward.loss import ranking_loss_sum, safety_loss_sum
from reward.model import takes_trees, tree_scores
from reward.scorer import score_ids

CHECKPOINTS = "checkpoints"  # in the run folder


class LengthGroupedSampler(Sampler[int]):
    """Pairs of similar length side by side, shuffled anew each epoch.

    Unlike the Trainer's sampler it draws from a generator of its own, seeded by seed and epoch, so that a run resumed
    in the
    middle of an epoch sees the order of the undisturbed run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class RewardTrainer(Trainer):
    """Trains on `EncodedPair`s; `evaluate_pairs` scores the test pairs whenever an evaluation is due."""

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        settings: RewardSettings,
        train_pairs: Sequence[EncodedPair],
        pad_id: int,
        evaluate_pairs: Callable[[], dict[str, float]] | None,
        log: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.as_trees = takes_trees(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_pair_trees if self.as_trees else collate_pairs, pad_id=pad_id),
            train_dataset=train_pairs,
            eval_dataset=train_pairs if args.eval_strategy != "no" else None,
        )
        self.settings = settings
        self.evaluate_pairs = evaluate_pairs
        # compute_loss divides by num_items_in_batch itself: the Trainer must count the pairs and not divide again.
        self.model_accepts_loss_kwargs = True
        self._sums: Tensor | None = None
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(_Progress(log))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Eq. 2 plus the weighted safety loss, per pair of the optimizer step."""
        if self.as_trees:
            chosen_B, rejected_B = tree_scores(model, inputs).unbind(1)
        else:
            scores_N1 = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            chosen_B, rejected_B = scores_N1[:, 0].chunk(2)
        ranking = ranking_loss_sum(chosen_B, rejected_B, inputs["margin"])
        loss, safety = ranking, torch.zeros_like(ranking)
        if self.settings.safety_weight:
            safety = safety_loss_sum(chosen_B, rejected_B, inputs["chosen_safe"], inputs["rejected_safe"])
            loss = loss + self.settings.safety_weight * safety
        with torch.no_grad():  # sums on the device; read once per log, not once per step
            right = (chosen_B > rejected_B).sum() + 0.5 * (chosen_B == rejected_B).sum()
            count = torch.full_like(ranking, len(chosen_B))
            sums = torch.stack(
                [count, right, ranking, safety, (chosen_B - rejected_B).sum(), (chosen_B + rejected_B).sum() / 2]
            )
            self._sums = sums if self._sums is None else self._sums + sums
        pairs = len(chosen_B) if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over the processes; each holds its sum over the pairs of all, so undo that average.
        return loss / pairs * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs since the last log; stop on a loss that is not a number."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate or drop bf16"
                )
            if self._sums is not None:
                sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
                names = ("accuracy", "ranking_loss", "safety_loss", "score_gap", "score_mean")
                logs.update({name: value / sums[0] for name, value in zip(names, sums[1:], strict=True)})
                self._sums = None
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores of the test pairs as metrics, logged with an `eval_` prefix."""
        metrics = {f"eval_{name}": value for name, value in (self.evaluate_pairs or dict)().items()}
        self.log(metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Warm-up over 3 % of the steps, at least 5 (settings), then cosine down to a share of the peak."""
        share = math.ceil(self.settings.warmup_ratio * num_training_steps)
        self.args.warmup_steps = max(share, self.settings.min_warmup_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [pair.length for pair in self.train_dataset]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, step, self.args.seed)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer would walk over all parameters every step."""
        return 0


class _Progress(TrainerCallback):
    """A progress bar, and every log passed on under grouped names: train/..., eval/..., optim/..."""

    def __init__(self, log: Callable[[int, dict[str, float]], None]) -> None:
        self.log = log
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="reward model", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        named: dict[str, float] = {}
        for name, value in (logs or {}).items():
            if name in ("epoch", "total_flos") or not isinstance(value, int | float):
                continue
            group = (
                "optim" if name in ("learning_rate", "grad_norm") else "eval" if name.startswith("eval_") else "train"
            )
            named[f"{group}/{name.removeprefix('eval_').removeprefix('train_')}"] = float(value)
        self.log(state.global_step, named)
        if self.bar is not None and "train/loss" in named and "train/accuracy" in named:
            self.bar.set_postfix(loss=f"{named['train/loss']:.3f}", accuracy=f"{named['train/accuracy']:.3f}")


def training_arguments(run: RunSettings, settings: RewardSettings) -> TrainingArguments:
    """The Trainer's arguments from ours. Logs go to the run folder, so the Trainer reports to nothing itself."""
    arguments = TrainingArguments(
        output_dir=f"{run.output_dir}/{CHECKPOINTS}",
        seed=run.seed,
        use_cpu=run.use_cpu,
        logging_steps=run.logging_steps,
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must show
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_rate},
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        train_sampling_strategy=settings.train_sampling_strategy,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing or None,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not run.use_cpu,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one GPU; several: accelerate launch --num_processes
    return arguments


def score_pairs(
    model: Any, pairs: Sequence[EncodedPair], token_budget: int, rank: int = 0, processes: int = 1
) -> tuple[list[float], list[float]]:
    """Raw scores (chosen, rejected) of all `pairs`, on every process; each scores every `processes`-th pair."""
    mine = range(rank, len(pairs), processes)
    ids = [ids for i in mine for ids in (pairs[i].chosen_ids, pairs[i].rejected_ids)]
    scores = score_ids(model, ids, token_budget, k=2).tolist()
    found = list(zip(mine, scores[::2], scores[1::2], strict=True))
    if processes > 1:
        found = sorted(gather_object(found))
    return [chosen for _, chosen, _ in found], [rejected for _, _, rejected in found]
