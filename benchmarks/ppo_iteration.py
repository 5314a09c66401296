"""One PPO iteration, ours against `PPOTrainer` of trl 1.12: episodes a second and peak memory, one thread of a CPU.

    python benchmarks/ppo_iteration.py [--rounds 3] [--epochs 4] [--modes natural-lora ...]

trl 1.12 is the last release with PPO. `--environment` gets it alone (about 2 MB, over `pip install --target`); it runs
on the torch and transformers of this environment, in processes of its own. Both sides load the same policy, value
model and two reward models (Llamas 256 wide with 4 layers, drawn at random), take the same prompts in one gradient step
an epoch, and score responses with both reward models; trl gets the two as one module. Lengths:

    fixed              64 prompt and 64 response tokens, no response ends before
    natural            prompts of HH-RLHF (drawn ids of their lengths where they are absent), responses as EOS ends them
    natural responses  64 prompt tokens, responses as EOS ends them

each with full fine-tuning and with LoRA; mean length with natural ends: 22 of at most 64 tokens. A mode is first
checked on the responses of a trl iteration: log-probs, reference log-probs, values, scores, and with fixed lengths also
advantages, the value loss and the gradient step. (With other lengths trl puts the reward one index after EOS, so its
advantages are other numbers; trl does not clip gradients, so neither does ours in the check.) Then sides run strictly
in turn, each round in fresh processes. Figures are medians of processor seconds over all iterations but the first of a
process: other work on the machine hardly touches them. Memory is the peak of a process above what it held with all
libraries loaded.

`--bf16` is given to both sides: trl accepts it and computes in float32 all the same. `--value_model trunk` takes our
values from a head on the policy's own hidden states, a model less than trl's: what a user saves by it, not the same
computation. The check is always in float32 and with the value model that trl has.
The last line is one JSON object: by mode `ratio` of the episodes/s, `memory_ratio`, both sides' figures and the split
of their time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf import cli  # noqa: F401,I001  (first: it switches off telemetry before other libraries are imported)

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.memory import forget_peak, peak_since_mib, resident_mib
from benchmarks.ppo_task import EOS, LENGTHS, LORA, PAD, Task, draw_prompts, save_models
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from reward.collate import budget_for
from reward.combine import combined_reward
from rlhf.advantages import gae, masked_whiten, per_token_kl, place_rewards
from rlhf.draw import sample_seeds
from rlhf.load_roles import load_roles
from rlhf.tokenizer import load_tokenizer
from rlhf.sequences import Sequences
from rlhf.rollout import Rollout, advantages_and_returns, collect
from rlhf.samples import Prompt
from rlhf.update import make_optimizer, update

TRL = "1.12.0"
PEER = Path(__file__).with_name("trl_ppo_peer.py")
MODES = [f"{lengths.replace(' ', '-')}-{kind}" for lengths in LENGTHS for kind in ("full", "lora")]
PHASES = ("sample", "score", "update")


class Ours:
    """Our side, as rlhf/ppo.py puts it together."""

    def __init__(self, task: Task, **options: Any) -> None:
        self.task, self.accelerator = task, Accelerator(cpu=True)
        batch = len(task.prompts)
        self.ppo = PPOSettings(
            helpfulness_model_path=task.model("helpfulness"), safety_model_path=task.model("safety"),
            max_new_tokens=task.max_new_tokens, batch_size=batch, mini_batch_size=batch, ppo_epochs=task.epochs,
            bf16=task.bf16, value_model=task.value_model,
            token_budget=budget_for(task.token_budget, self.accelerator.device, task.bf16),
            learning_rate=task.learning_rate,
            value_learning_rate=task.learning_rate, weight_decay=task.weight_decay, kl_coef=task.kl_coef, **options,
        )  # fmt: skip
        lora = {"use_peft": True, "lora_r": LORA["r"], "lora_alpha": LORA["alpha"]} if task.lora else {}
        tokenizer = load_tokenizer(task.model("policy"))
        self.chat_format: Any = SimpleNamespace(stop_ids=[EOS])  # prompts are ids: all that sampling asks of a format
        model = ModelSettings(model_name_or_path=task.model("policy"), **lora)  # type: ignore[arg-type]
        self.roles = load_roles(self.ppo, model, tokenizer, self.accelerator.device, task.seed)
        self.optimizer = make_optimizer(self.roles, self.ppo)
        self.prompts = [Prompt([], ids) for ids in task.prompts]

    def iterate(self, step: int) -> dict[str, float]:
        """One iteration; seconds of its phases, wall and processor, and response tokens."""
        started, cpu = perf_counter(), process_time()
        seeds = sample_seeds(1_000_003 * self.task.seed + step, len(self.prompts))
        rollout = collect(self.roles, self.prompts, self.ppo, self.chat_format, PAD, seeds, self.accelerator.device)
        advantages_BR, returns_BR = advantages_and_returns(rollout, self.ppo, self.accelerator)
        collected = perf_counter()
        self.update(rollout, advantages_BR, returns_BR, step)
        done = perf_counter()
        sample = rollout.seconds["sample"]
        return {
            "sample": sample, "score": collected - started - sample, "update": done - collected,
            "wall": done - started, "cpu": process_time() - cpu, "tokens": float(sum(map(len, rollout.responses))),
            **{f"score/{name}": each for name, each in rollout.seconds.items() if name != "sample"},
        }  # fmt: skip

    def update(self, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, seed: int = 0) -> dict[str, float]:
        """The gradient steps; their figures."""
        figures, _ = update(
            self.roles, self.optimizer, rollout, advantages_BR, returns_BR, self.ppo, self.accelerator, seed
        )
        return figures

    @torch.no_grad()
    def known(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> tuple[Sequences, dict[str, Tensor]]:
        """What ours computes of given responses before the update, under the names of the peer's record."""
        sequences = Sequences.build(prompts, responses, self.accelerator.device)
        rows = sequences.micro_batches(range(len(prompts)), self.ppo.token_budget)
        whole = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        r_h, r_s = (self.roles.scores(name, whole, self.ppo.token_budget) for name in ("helpfulness", "safety"))
        return sequences, {
            "logprobs": sequences.scatter([(m, self.roles.policy_logprobs(sequences, m)[0]) for m in rows]),
            "reference": sequences.scatter([(m, self.roles.reference_logprobs(sequences, m)) for m in rows]),
            "values": sequences.scatter([(m, self.roles.values(sequences, m)) for m in rows]),
            "scores": combined_reward(r_s, r_h, torch.zeros(len(r_s), dtype=torch.bool), self.ppo.safety_threshold),
            "r_helpfulness": r_h,
            "r_safety": r_s,
        }


def check_equal(task: Task, environment: Path) -> dict[str, float]:
    """The largest differences between both sides on the responses of a trl iteration; AssertionError where they differ.

    LoRA starts as the identity and its matrices are drawn by each side, so its gradient step is not compared.
    """
    with tempfile.TemporaryDirectory() as scratch:
        record = str(Path(scratch, "record.safetensors"))
        task = replace(task, iterations=0, epochs=1, bf16=False, learning_rate=1e-4, weight_decay=0.0, record=record,
                       value_model="helpfulness")  # fmt: skip
        run_child("peer", task, environment)
        theirs = load_file(record)
    ours = Ours(task, max_grad_norm=1e9)
    context = int(theirs["width"])
    prompts = [[int(i) for i in row if i != PAD] for row in theirs["query_responses"][:, :context]]
    responses = [[int(i) for i in row if i != PAD] for row in theirs["query_responses"][:, context:]]
    assert sorted(prompts) == sorted(task.prompts), "trl sampled from other prompts"
    sequences, found = ours.known(prompts, responses)
    mask_BR = sequences.response_mask_BR
    theirs["values"] = theirs["values"][:, context - 1 : -1].squeeze(-1)
    differences = {
        name: float((found[name] - theirs[name])[mask_BR if name != "scores" else slice(None)].abs().max())
        for name in ("logprobs", "reference", "values", "scores")
    }
    if task.lengths == "fixed":
        kl_BR = per_token_kl(found["logprobs"], found["reference"], mask_BR)
        rewards_BR = place_rewards(found["scores"], kl_BR, mask_BR, ours.ppo.kl_coef)  # trl whitens no scores
        advantages_BR, returns_BR = gae(rewards_BR, found["values"], mask_BR, ours.ppo.gamma, ours.ppo.gae_lambda)
        white_BR = masked_whiten(advantages_BR, mask_BR)
        tokens = int(mask_BR.sum())
        theirs["white_advantages"] *= (tokens / (tokens - 1)) ** 0.5  # trl divides by the sample deviation
        differences["advantages"] = float((advantages_BR - theirs["advantages"]).abs().max())
        differences["white_advantages"] = float((white_BR - theirs["white_advantages"]).abs().max())
        figures = ours.update(_rollout(prompts, responses, sequences, found), white_BR, returns_BR)
        differences["value_loss"] = abs(figures["loss/value"] / float(theirs["value_loss"]) - 1)
        if not task.lora:
            start = Ours(task).roles.policy.trained
            end = ours.roles.policy.trained
            moved = [
                torch.cat([(each[name] - start[name]).detach().flatten().double() for name in sorted(start)])
                for each in (end, {name: theirs[f"policy.{name}"] for name in start})
            ]
            differences["step_angle"] = 1 - torch.nn.functional.cosine_similarity(*moved, dim=0).item()
    worst = {name: value for name, value in differences.items() if value > 1e-4}
    assert not worst, f"{mode_of(task)}: the sides differ: {worst}"
    return differences


def _rollout(
    prompts: list[list[int]], responses: list[list[int]], sequences: Sequences, found: dict[str, Tensor]
) -> Rollout:
    """Recorded responses in the form that the update takes."""
    no = torch.zeros(len(prompts), dtype=torch.bool)
    return Rollout(
        prompts=[Prompt([], ids) for ids in prompts], responses=responses, sequences=sequences, stopped_B=no,
        logprobs_BR=found["logprobs"], reference_logprobs_BR=found["reference"], values_BR=found["values"],
        raw={}, scores_B=found["scores"], safety_decides_B=None, seconds={},
    )  # fmt: skip


def mode_of(task: Task) -> str:
    return f"{task.lengths.replace(' ', '-')}-{'lora' if task.lora else 'full'}"


def install_trl(environment: Path) -> None:
    """Put trl 1.12 alone into the folder `environment`, unless it is there."""
    if any(each.version == TRL for each in distributions(name="trl", path=[str(environment)])):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", environment]
    subprocess.run([*command, f"trl=={TRL}"], check=True)


def run_child(side: str, task: Task, environment: Path, micro_batch: int = 0) -> dict[str, Any]:
    """The task in a fresh process of that side; what its last line says."""
    with tempfile.TemporaryDirectory() as scratch:
        path = str(task.save(Path(scratch, "task.json")))
        words = [__file__, "--only", path] if side == "ours" else [str(PEER), path, "--micro_batch", str(micro_batch)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if side == "peer":
            environ["PYTHONPATH"] = str(environment.resolve())
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environ)
    if done.returncode:
        sys.exit(f"{side}, {mode_of(task)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_ours(path: str) -> None:
    """The child of our side: one JSON line."""
    torch.set_num_threads(1)
    task = Task.load(path)
    forget_peak()
    before = resident_mib()
    ours = Ours(task)
    runs = [ours.iterate(step) for step in range(task.iterations + 1)][1:]
    print("\n" + json.dumps({"peak_mib": peak_since_mib() - before, "runs": runs}))


def summary(found: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Medians over the iterations of all rounds of one side in one mode."""
    runs = [run for each in found for run in each["runs"]]
    timed = [name for name in runs[0] if name not in ("tokens", "width", "wall", "cpu")]
    # Phases are clocked in wall seconds; an iteration's processor seconds are theirs in the same proportions.
    seconds = {name: median(run[name] * run["cpu"] / run["wall"] for run in runs) for name in timed}
    return {
        "episodes_per_second": batch / median(run["cpu"] for run in runs),
        "episodes_per_wall_second": batch / median(run["wall"] for run in runs),
        "peak_mib": median(each["peak_mib"] for each in found),
        "response_tokens": sum(run["tokens"] for run in runs) / len(runs) / batch,
        "seconds": seconds,
        "rounds": [batch / median(run["cpu"] for run in each["runs"]) for each in found],
    }


def main(arguments: argparse.Namespace) -> None:
    """Check, measure in turn, print the table and the JSON line."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    environment = Path(arguments.environment)
    install_trl(environment)
    checks: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {mode: {"ours": [], "peer": []} for mode in arguments.modes}
    data = set()
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        for round_ in range(arguments.rounds):
            for mode in arguments.modes:
                lengths, kind = mode.rsplit("-", 1)
                lengths = lengths.replace("-", " ")
                prompts, source = draw_prompts(arguments.batch, arguments.tokens, lengths, 4 * arguments.tokens, round_)
                data.add(source)
                task = Task(
                    folder, prompts, lengths, kind == "lora", arguments.epochs, arguments.iterations, arguments.tokens,
                    seed=round_, bf16=arguments.bf16, token_budget=arguments.token_budget,
                    value_model=arguments.value_model,
                )  # fmt: skip
                if round_ == 0:
                    checks[mode] = check_equal(task, environment)
                    print(f"{mode}: same to", {name: f"{value:.0e}" for name, value in checks[mode].items()})
                for side in found[mode]:
                    found[mode][side].append(run_child(side, task, environment, arguments.peer_micro_batch))
                latest = {side: summary(each[-1:], len(prompts)) for side, each in found[mode].items()}
                rates = {side: round(each["episodes_per_second"], 2) for side, each in latest.items()}
                print(f"round {round_ + 1}, {mode}, episodes/s:", rates, flush=True)
    results = {
        mode: {side: summary(each, arguments.batch) for side, each in sides.items()} for mode, sides in found.items()
    }
    print("\n| mode | side | episodes/s | sample s | score s | update s | tokens a response | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for mode, sides in results.items():
        for side, each in sides.items():
            split = " | ".join(f"{each['seconds'][phase]:.2f}" for phase in PHASES)
            print(f"| {mode} | {side} | {each['episodes_per_second']:.2f} | {split} | {each['response_tokens']:.1f} | "
                  f"{each['peak_mib']:.0f} |")  # fmt: skip
    print(json.dumps({
        "modes": {
            mode: {
                "ratio": sides["ours"]["episodes_per_second"] / sides["peer"]["episodes_per_second"],
                "memory_ratio": sides["ours"]["peak_mib"] / sides["peer"]["peak_mib"],
                **sides, "differences": checks[mode],
            }
            for mode, sides in results.items()
        },
        **{name: getattr(arguments, name) for name in ("epochs", "batch", "tokens", "rounds", "iterations", "bf16",
                                                       "token_budget", "peer_micro_batch", "value_model")},
        "trl": TRL, "prompts": sorted(data),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", default="runs/trl-1.12", help="folder for trl 1.12, set up where it lacks it")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2, help="timed iterations of a process")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and the most of a response")
    parser.add_argument("--peer_micro_batch", type=int, default=0, help="rows of trl's training forward; 0: all")
    parser.add_argument("--bf16", action="store_true", help="on both sides; trl ignores it")
    parser.add_argument("--token_budget", type=int, default=0, help="of our micro-batches; 0: the default")
    parser.add_argument("--value_model", choices=("helpfulness", "policy", "trunk"), default="helpfulness")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run_ours(arguments.only)
    else:
        main(arguments)
