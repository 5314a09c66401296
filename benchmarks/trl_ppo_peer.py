"""The peer of the PPO benchmark: `PPOTrainer` of trl 1.12, the last release that has one.

    PYTHONPATH=<folder with trl 1.12> python benchmarks/trl_ppo_peer.py <task.json> [--micro_batch 32]

Run by benchmarks/ppo_iteration.py, which gets that release into a folder of its own. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.memory import forget_peak, peak_since_mib, resident_mib
from benchmarks.ppo_task import EOS, LORA, PAD, Task
from reward.combine import combined_reward


class BothRewardModels(nn.Module):
    """Two reward models as the one that trl asks for: `score` gives the reward that ours takes of the two."""

    base_model_prefix = "both"

    def __init__(self, helpfulness: Any, safety: Any) -> None:
        super().__init__()
        self.helpfulness, self.safety = helpfulness, safety

    def both(self, **inputs: Any) -> Any:
        """The hidden states of the two, side by side."""
        inputs |= {"output_hidden_states": False}  # only the last ones are read
        last = [model.model(**inputs).last_hidden_state for model in (self.helpfulness, self.safety)]
        return SimpleNamespace(hidden_states=[torch.cat(last, -1)])

    def score(self, hidden_BTD: Tensor) -> Tensor:
        helpful_BTD, safe_BTD = hidden_BTD.chunk(2, -1)
        r_h, r_s = self.helpfulness.score(helpful_BTD), self.safety.score(safe_BTD)
        return combined_reward(r_s, r_h, torch.zeros_like(r_s, dtype=torch.bool))


class Clock:
    """Seconds of the phases of each iteration, and what the first of them computed; set by `watch`."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.recorded: dict[str, Tensor] = {}
        self.now: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        self.started, self.cpu = perf_counter(), process_time()
        self.now = {"sample": 0.0}

    def end(self) -> None:
        wall = perf_counter() - self.started
        score = self.now.pop("collected") - self.started - self.now["sample"]
        update = wall - score - self.now["sample"]
        self.iterations.append(
            self.now | {"score": score, "update": update, "wall": wall, "cpu": process_time() - self.cpu}
        )
        self.begin()

    def keep(self, **tensors: Tensor) -> None:
        """Record what comes first under each name."""
        for name, tensor in tensors.items():
            self.recorded.setdefault(name, tensor.detach().clone().contiguous())


def watch(clock: Clock, record: bool) -> None:
    """Wrap the functions that part an iteration; with `record`, also keep what they gave."""
    originals = {name: getattr(ppo_trainer, name) for name in ("batch_generation", "masked_whiten")}

    def batch_generation(*arguments: Any, **options: Any) -> Any:
        started = perf_counter()
        found = originals["batch_generation"](*arguments, **options)
        clock.now["sample"] += perf_counter() - started
        clock.now["width"] = found[0].shape[1] - arguments[1].shape[1]
        clock.now["tokens"] = float((found[0][:, arguments[1].shape[1] :] != PAD).sum())
        if record:
            clock.keep(query_responses=found[0], width=torch.tensor(arguments[1].shape[1]))
        return found

    def masked_whiten(values: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        white = originals["masked_whiten"](values, mask, *rest)
        if record:
            clock.keep(advantages=values, white_advantages=white)
        clock.now["collected"] = perf_counter()  # the last thing before the update
        return white

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = batch_generation, masked_whiten
    if record:
        ppo_trainer.selective_log_softmax = _kept(clock, ppo_trainer.selective_log_softmax, ["logprobs", "reference"])
        ppo_trainer.get_reward = _kept(clock, ppo_trainer.get_reward, ["values", "scores"])


def _kept(clock: Clock, function: Callable, names: list[str]) -> Callable:
    """`function`, the results of its first calls recorded under `names`; of `get_reward`, values or final scores."""
    calls = iter(names)

    def wrapped(*arguments: Any) -> Any:
        found = function(*arguments)
        if name := next(calls, None):
            clock.keep(**{name: found if isinstance(found, Tensor) else found[1 if name == "scores" else 0]})
        return found

    return wrapped


class EachStep(TrainerCallback):
    """Ends an iteration of the clock where trl ends a step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.clock.keep(value_loss=torch.tensor(logs["loss/value_avg"]))


def trainer_of(task: Task, clock: Clock, micro_batch: int, scratch: str) -> PPOTrainer:
    """trl's trainer with the hyper-parameters of ours; what it accepts and ignores is left out."""
    tokenizer = AutoTokenizer.from_pretrained(task.model("policy"), padding_side="left")
    policy = LlamaForCausalLM.from_pretrained(task.model("policy"))
    policy.generation_config.pad_token_id = PAD
    reference = None if task.lora else LlamaForCausalLM.from_pretrained(task.model("policy"))
    value, helpfulness, safety = (
        LlamaForSequenceClassification.from_pretrained(task.model(name))
        for name in ("helpfulness", "helpfulness", "safety")
    )
    rewards = BothRewardModels(helpfulness, safety).eval().requires_grad_(False)
    batch = len(task.prompts)
    arguments = PPOConfig(
        output_dir=scratch, use_cpu=True, bf16=task.bf16, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, seed=task.seed, num_sample_generations=0, logging_steps=1,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=batch // micro_batch, num_mini_batches=1,
        local_rollout_forward_batch_size=batch, total_episodes=batch * (task.iterations + 1),
        num_ppo_epochs=task.epochs, response_length=task.max_new_tokens, temperature=1.0, kl_coef=task.kl_coef,
        stop_token_id=None if task.lengths == "fixed" else EOS, learning_rate=task.learning_rate,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5,
        weight_decay=task.weight_decay, vf_coef=0.1, gamma=1.0, lam=0.95,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear")
    return PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=rewards,
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": task.prompts}), callbacks=[EachStep(clock)],
        peft_config=lora if task.lora else None,
    )  # fmt: skip


def main(path: str, micro_batch: int) -> None:
    """Run the iterations of the task and print their figures."""
    torch.set_num_threads(1)
    task = Task.load(path)
    forget_peak()
    before = resident_mib()
    clock = Clock()
    watch(clock, bool(task.record))
    trainer = trainer_of(task, clock, micro_batch or len(task.prompts), str(Path(path).parent / "trl"))
    trainer.train()
    if task.record:
        policy = {f"policy.{name}": p.detach().clone() for name, p in trainer.policy_model.named_parameters()}
        save_file(clock.recorded | policy, task.record)
    print(
        "\n"
        + json.dumps({"version": trl.__version__, "peak_mib": peak_since_mib() - before, "runs": clock.iterations[1:]})
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--micro_batch", type=int, default=0, help="rows of a training forward; 0: the whole batch")
    arguments = parser.parse_args()
    main(arguments.task, arguments.micro_batch)
