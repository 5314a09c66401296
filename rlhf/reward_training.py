"""The reward models' training loop: the Hugging Face Trainer with the ranking loss in place of its own.

One batch of the data loader is one optimizer step (rlhf/reward_batches.py), computed as micro-batches of a token
budget. Losses are sums over pairs, divided by the pairs of the whole step over all processes, so that neither the
micro-batches nor the number of processes changes a step.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from configs.errors import UserError
from configs.model_settings import RunSettings
from configs.records import write_jsonl
from configs.reward_settings import RewardSettings
from reward.collate import budget_for
from reward.data import EncodedPair
from reward.loss import centring_loss_sum, ranking_loss_sum, safety_loss_sum
from reward.model import takes_trees, tree_scores
from reward.scorer import score_ids
from rlhf.reward_batches import Step, StepCollator, StepSampler
from rlhf.trainer_checkpoints import keep_newest, step_of, write_checksums

CHECKPOINTS = "checkpoints"  # in the run folder
NOT_FINITE = "not-finite-{process}.jsonl"  # in the run folder: the pairs whose loss was not a number
SHOWN_PAIRS = 3


class RewardTrainer(Trainer):
    """Trains on `EncodedPair`s; `evaluate_pairs` scores the test pairs whenever an evaluation is due.

    Raises UserError, before the weights are touched, at a step whose loss is not a number; its pairs are named.
    """

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
        budget = budget_for(settings.token_budget, args.device)
        super().__init__(
            model=model,
            args=args,
            data_collator=StepCollator(pad_id, budget, self.as_trees, args.process_index, args.world_size),
            train_dataset=list(enumerate(train_pairs)),
            eval_dataset=train_pairs if args.eval_strategy != "no" else None,
        )
        self.settings = settings
        self.evaluate_pairs = evaluate_pairs
        self._sums: Tensor | None = None
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(_Progress(log))

    def get_train_dataloader(self) -> DataLoader:
        """Whole steps, not sharded by accelerate: it would fill up the last step of several processes with repeats."""
        lengths = [pair.length for _, pair in self.train_dataset]
        pairs = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        sampler = StepSampler(
            lengths, pairs * self.args.world_size, self.settings.train_sampling_strategy, self.args.seed
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over the micro-batches of a step; the loss per pair, gradients added up."""
        model.train()
        step = self._prepare_inputs(inputs)
        total = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(step["micro_batches"], start=1):
            last = i == len(step["micro_batches"])
            # Over several processes, gradients are exchanged once a step.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    # DDP averages gradients over the processes; each holds the sum of its share, so undo that average.
                    scale = batch["weight"] * self.args.world_size / step["pairs"]
                    loss = self._loss_sum(model, batch) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
        if not torch.isfinite(total):
            self._refuse(model, step)
        return total

    def _scores(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Raw scores of the chosen and of the rejected responses, each [B]."""
        if self.as_trees:
            chosen_B, rejected_B = tree_scores(model, batch).unbind(1)
        else:
            scores_N1 = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            chosen_B, rejected_B = scores_N1[:, 0].chunk(2)
        return chosen_B, rejected_B

    def _loss_sum(self, model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        """Eq. 2 plus the weighted safety and centring losses, summed over the pairs of a micro-batch."""
        chosen_B, rejected_B = self._scores(model, batch)
        loss, ranking, safety = self._losses(chosen_B, rejected_B, batch)
        with torch.no_grad():  # sums on the device, read once per log
            right = (chosen_B > rejected_B).sum() + 0.5 * (chosen_B == rejected_B).sum()
            count = torch.full_like(ranking, len(chosen_B))
            gap, mean = (chosen_B - rejected_B).sum(), (chosen_B + rejected_B).sum() / 2
            sums = torch.stack([count, right, ranking, safety, gap, mean]) * batch["weight"]
            self._sums = sums if self._sums is None else self._sums + sums
        return loss

    def _losses(self, chosen_B: Tensor, rejected_B: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(whole loss, ranking loss, safety loss), each summed over the pairs."""
        ranking = ranking_loss_sum(chosen_B, rejected_B, batch["margin"])
        loss, safety = ranking, torch.zeros_like(ranking)
        if self.settings.safety_weight:
            safety = safety_loss_sum(chosen_B, rejected_B, batch["chosen_safe"], batch["rejected_safe"])
            loss = loss + self.settings.safety_weight * safety
        if self.settings.center_rewards_coefficient:
            loss = loss + self.settings.center_rewards_coefficient * centring_loss_sum(chosen_B, rejected_B)
        return loss, ranking, safety

    @torch.no_grad()
    def _refuse(self, model: torch.nn.Module, step: Step) -> None:
        """Raise UserError, as the loss of `step` is not a number: because of the weights, or of pairs, which are named.

        The pairs go to NOT_FINITE too, each with its loss, its scores and its record.
        """
        number = self.state.global_step + 1
        if broken := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
            raise UserError(
                f"the loss of step {number} is not a number, because the weights are not ({len(broken)} tensors, "
                f"{broken[0]} first): the steps before were too large. Lower learning_rate or set bf16: false"
            )
        found = []
        inner = self.accelerator.unwrap_model(model)
        for batch in step["micro_batches"]:
            with self.compute_loss_context_manager():
                chosen_B, rejected_B = self._scores(inner, batch)
            for b, index in enumerate(batch["rows"].tolist()):
                one = {name: batch[name][b : b + 1] for name in ("margin", "chosen_safe", "rejected_safe")}
                loss, _, _ = self._losses(chosen_B[b : b + 1], rejected_B[b : b + 1], one)
                if not torch.isfinite(loss):
                    row = self.train_dataset[index][1].row
                    scores = {"r_chosen": str(chosen_B[b].item()), "r_rejected": str(rejected_B[b].item())}
                    found.append({"pair": index, "loss": str(loss.item()), **scores, "row": dict(row)})
        path = Path(self.args.output_dir).parent / NOT_FINITE.format(process=self.args.process_index)
        write_jsonl(path, found)
        shown = ", ".join(f"{each['pair']} ({each['row'].get('source')})" for each in found[:SHOWN_PAIRS])
        more = f" and {len(found) - SHOWN_PAIRS} more" if len(found) > SHOWN_PAIRS else ""
        cause = f"training pairs {shown}{more}" if found else "the sum over its pairs, each of which is finite"
        raise UserError(
            f"the loss of step {number} is not a number, because of {cause} (counted from 0 in the order of mixing; "
            f"all are in {path}). The weights are as the step before left them. Look at these pairs, lower "
            "learning_rate or set bf16: false"
        )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's, between backward and step. UserError for no number: the step would ruin the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            step = self.state.global_step + 1
            raise UserError(
                f"the gradient norm of step {step} is {float(norm)}, though its loss is a number. The weights are as "
                "the step before left them. Lower learning_rate or set bf16: false"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs since the last log."""
        if "loss" in logs and self._sums is not None:
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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's; then checksums, without which a checkpoint counts as unfinished; then older ones may go."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            write_checksums(folder / f"checkpoint-{self.state.global_step}")
            keep_newest(folder, self.settings.save_total_limit)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))

    def resume(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` where there is one. Of one after the last step only the weights are loaded: the
        Trainer, which looks at the number of steps after each, would take one more.
        """
        if checkpoint is None or step_of(checkpoint) < self.total_steps:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Warm-up over 3 % of the steps, at least 5 (settings), then cosine down to a share of the peak."""
        share = math.ceil(self.settings.warmup_ratio * num_training_steps)
        self.args.warmup_steps = max(share, self.settings.min_warmup_steps)
        return super().create_scheduler(num_training_steps, optimizer)

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
        # A batch of the data loader is a whole step; what follows is only what the Trainer counts examples by.
        per_device_train_batch_size=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing or None,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=None,  # RewardTrainer counts them itself
        remove_unused_columns=False,
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
