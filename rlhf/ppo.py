"""PPO against the piecewise safety/helpfulness reward with a KL penalty (paper 3.2.3, Eqs. 3-4; recipe sheet 5, 10).

    accelerate launch rlhf/ppo.py --config configs/llama2_7b_ppo.yaml --output_dir runs/ppo
    accelerate launch --num_processes 8 rlhf/ppo.py --config configs/llama2_7b_ppo.yaml --output_dir runs/ppo

An iteration: sample a response to each prompt; R_c = R_s on prompts tagged safety or where R_s < 0.15, else R_h; undo
its sigmoid, whiten over the iteration; subtract beta * KL to a frozen pi_0; GAE; one clipped step a mini-batch.

Where the paper is silent (recipe sheet 10 has the sources):
1. pi_0 is the policy at the start of this run (`reference_model: start`) or the SFT model (`sft`).
2. The value model is a network of its own, started from the helpfulness reward model. Its head reads raw scores, the
   rewards are whitened, so its output is put on their scale with the first iteration's mean and deviation.
3. Advantages are whitened over the iteration; rewards are not whitened a second time.
4. Held-out prompts are sampled every `eval_steps` with the same seeds each time. A policy's figure of merit is
   (R_c - mean_0) / std_0 - beta * KL with the starting policy's mean_0 and std_0 and the beta of the settings, adaptive
   or not: Eq. 4 in units that stay put. With a held-out judge (rlhf/judge.py) R_c is the judge's, on which nothing is
   trained.
docs/ppo.md has the objective formula by formula.
"""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts rlhf/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: I001  (first: it switches off telemetry before other libraries are imported)

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from tqdm import tqdm

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.ppo_settings import PPOSettings
from reward.collate import budget_for
from reward.combine import from_own_zeros
from rlhf.alarms import Limits, check, spells
from rlhf.checkpoint import (
    check_same_run,
    latest_step,
    load_checkpoint,
    load_weights,
    replace_folder,
    save_checkpoint,
    whole_tensors,
)
from rlhf.draw import sample_seeds
from rlhf.hardware import peak_memory_mib
from rlhf.judge import held_out_figures, judge
from rlhf.kl_control import next_kl_coef
from rlhf.models import data_fingerprint, decoder_of, model_card, save_policy, unwrap
from rlhf.tokenizer import load_tokenizer
from rlhf.ppo_figures import decoded, gold_figures, rollout_figures, sampler_gap, time_figures, value_figures
from rlhf.prompts import prompts_of, read_encoded
from rlhf.load_roles import load_roles
from rlhf.rollout import Rollout, advantages_and_returns, collect
from rlhf.run import RunFolder
from rlhf.sampler import prompt_room
from rlhf.samples import Prompt
from rlhf.scoring import Scoring
from rlhf.sharding import is_sharded, merged
from rlhf.summary import read_rows
from rlhf.update import NotFinite, make_optimizer, update

logger = logging.getLogger(__name__)
BEST = "policy.safetensors"  # in best-<step>
EVALUATION = 2**31  # added to the seed of held-out sampling: never the seed of an iteration


class Run:
    """What an iteration needs and what it changes. `state` is all that outlives an iteration besides weights."""

    def __init__(self, ppo: PPOSettings, model_settings: ModelSettings, run: RunSettings, folder: RunFolder):
        self.settings, self.folder = run, folder
        self.accelerator = Accelerator(cpu=run.use_cpu or not torch.cuda.is_available())
        self.ppo = ppo = replace(ppo, token_budget=budget_for(ppo.token_budget, self.accelerator.device, ppo.bf16))
        if ppo.batch_size % (self.accelerator.num_processes * ppo.responses_per_prompt):
            raise UserError(
                f"batch_size {ppo.batch_size} is not a multiple of {self.accelerator.num_processes} processes times "
                f"responses_per_prompt {ppo.responses_per_prompt}"
            )
        set_seed(run.seed)
        self.tokenizer = load_tokenizer(model_settings.model_name_or_path)
        self.chat_format = load_chat_format(self.tokenizer, model_settings.chat_format)
        self.scoring = Scoring(ppo)
        self.roles = load_roles(ppo, model_settings, self.tokenizer, self.accelerator.device, run.seed)
        room = prompt_room(unwrap(self.roles.policy.model), ppo.max_new_tokens, ppo.max_prompt_tokens)
        rejected = str(Path(run.output_dir, "rejected.jsonl")) if self.accelerator.is_main_process else None
        self.prompts, held_out = (
            read_encoded(files, self.chat_format, room, rejected, ppo.max_reject_share)
            for files in (ppo.prompt_files, [ppo.eval_prompt_file] if ppo.eval_prompt_file else [])
        )
        self.held_out = held_out[: ppo.eval_prompts]
        if not self.prompts:
            raise UserError("prompt_files: no prompts to sample from")
        if self.accelerator.is_main_process:
            self.scoring.warn_untagged(prompt.is_safety for prompt in self.prompts)
        self.scoring.try_out(self.prompts[0], self.chat_format)
        if any(p.dtype == torch.bfloat16 for p in self.roles.policy.model.parameters()):
            # Sampling with a cache rounds such weights otherwise than training does: ratios would not start at 1.
            self.ppo = ppo = replace(ppo, recompute_logprobs=True)
        ppo.check_importance()
        self.optimizer = make_optimizer(self.roles, ppo)
        self.state: dict[str, Any] = {
            "step": 0, "skipped": 0, "best": None, "unit": None, "value_unit": None, "zeros": None,
            "kl_coef": ppo.kl_coef, "figures": {}, "alarms": {}, "evaluations_since_best": 0, "judge_start": None,
        }  # fmt: skip
        self.folder_path = Path(run.output_dir)
        self.checkpointed_best: int | None = None  # the step of the best policy that the newest checkpoint names

    def sample(self, prompts: Sequence[Prompt], seed: int, k: int = 1, with_values: bool = True) -> Rollout:
        """This process's share of the responses; seeds belong to prompts, so processes do not change them."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = -(-len(prompts) // processes)
        filled = [*prompts, *[prompts[0]] * (size * processes - len(prompts))]  # `gathered` drops the surplus
        own = filled[rank * size : (rank + 1) * size]
        seeds = sample_seeds(seed, len(own) * k, first=rank * size * k)
        return collect(self.roles, own, self.ppo, self.chat_format, self.tokenizer.pad_token_id, seeds,
                       self.accelerator.device, k, with_values, self.scoring)  # fmt: skip

    def gathered(self, count: int, *columns: torch.Tensor) -> torch.Tensor:
        """[count, len(columns)] float32: [B] tensors of all processes' responses, in the order of their prompts."""
        stacked = torch.stack([c.float().to(self.accelerator.device) for c in columns], 1)
        return self.accelerator.gather(stacked)[:count]

    def iterate(self, step: int) -> dict[str, float]:
        """One iteration of PPO; its figures."""
        begin = time.perf_counter()
        seed = self.settings.seed * 1_000_003 + step
        k = self.ppo.responses_per_prompt
        rollout = self.sample(prompts_of(step, self.prompts, self.ppo.batch_size // k, self.settings.seed), seed, k)
        rollout = self.put_values_on_scale(rollout)
        kl_coef = self.state["kl_coef"]
        advantages_BR, returns_BR = advantages_and_returns(self.centered(rollout), self.ppo, self.accelerator, kl_coef)
        collected = time.perf_counter()
        figures, self.state["skipped"] = update(
            self.roles, self.optimizer, rollout, advantages_BR, returns_BR, self.ppo, self.accelerator, seed,
            self.state["skipped"],
        )  # fmt: skip
        done = time.perf_counter()
        if (step + 1) % self.settings.logging_steps == 0:
            self.folder.samples(step + 1, decoded(rollout, self.ppo.num_samples, self.chat_format, "training"))
        means = rollout_figures(rollout, self.ppo.batch_size, self.gathered)
        if self.ppo.kl_controller == "adaptive":
            self.state["kl_coef"] = next_kl_coef(
                kl_coef, means["policy/kl"], float(self.ppo.kl_target or 0), self.ppo.batch_size, self.ppo.kl_horizon
            )
        return {
            **means,
            "policy/kl_coef": kl_coef,
            **sampler_gap(rollout, self.ppo.importance_cap, self.accelerator),
            **figures,
            **value_figures(rollout, returns_BR, rollout.kept_mask_BR(self.ppo), self.accelerator),
            **time_figures(rollout, begin, collected, done, self.accelerator.num_processes),
            "memory/peak_mib": peak_memory_mib(self.accelerator.device),
        }

    def centered(self, rollout: Rollout) -> Rollout:
        """With `center_scores`, its combined scores from the zero of the reward model that decided each: the model's
        mean over the first iteration's responses, which then stays. Which one decides is up to the scores as they are.
        `prompt` needs it where both decide within one prompt; the prompt's own mean is taken off with the whitening.
        """
        if self.ppo.center_scores == "none" or self.ppo.reward_combination != "piecewise":
            return rollout
        if rollout.safety_decides_B is None:  # functions alone
            return rollout
        if self.state["zeros"] is None:
            columns = self.gathered(self.ppo.batch_size, rollout.raw["helpfulness"], rollout.raw["safety"])
            self.state["zeros"] = [moments_of(column, "score")[0] for column in columns.unbind(1)]
        return replace(
            rollout, scores_B=from_own_zeros(rollout.scores_B, rollout.safety_decides_B, *self.state["zeros"])
        )

    def put_values_on_scale(self, rollout: Rollout) -> Rollout:
        """On the first iteration, the affine map of the module docstring, point 2; it then stays."""
        if self.state["value_unit"] is not None or not self.ppo.value_path:
            return rollout
        centered_B = self.centered(rollout).scores_B
        scores, kept = self.gathered(self.ppo.batch_size, centered_B, rollout.kept_B(self.ppo)).unbind(1)
        scores = scores[(kept > 0) & scores.isfinite()]  # nan would stay, in checkpoints too
        if not len(scores):
            return rollout  # nothing is trained in this iteration either
        shift, scale = moments_of(scores, "score")
        if self.ppo.center_scores == "model":  # its head still reads the helpfulness model's scores as they are
            shift += self.state["zeros"][0]
        self.state["value_unit"] = [shift, scale]
        self.roles.value_shift, self.roles.value_scale = shift, scale
        values_BR = (rollout.values_BR - shift) / scale
        return replace(rollout, values_BR=torch.where(rollout.sequences.response_mask_BR, values_BR, 0.0))

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures of the policy as it is; with `save_best`, keeps it where it is the best so far."""
        begin = time.perf_counter()
        rollout = self.sample(self.held_out, self.settings.seed + EVALUATION, with_values=False)
        count = len(self.held_out)
        figures = rollout_figures(rollout, count, self.gathered)
        figures = {f"eval/{name.split('/')[1]}": value for name, value in figures.items()}
        if self.ppo.gold == "simulated":
            figures |= gold_figures(rollout, count, self.chat_format, self.gathered)
        self.folder.samples(step, decoded(rollout, self.ppo.num_samples, self.chat_format, "held_out"))
        scores, combined = self.gathered(count, rollout.scores_B), figures["eval/combined"]
        penalty = self.ppo.kl_coef * figures["eval/kl"]
        if self.ppo.judge_helpfulness_model_path:  # nothing is trained against it: it needs no discount for distance
            judged, scores = self.judged(rollout)
            figures, combined, penalty = figures | judged, judged["eval/judge_combined"], 0.0
        if self.state["unit"] is None:
            self.state["unit"] = moments_of(scores, "held-out score")
        mean, deviation = self.state["unit"]
        objective = (combined - mean) / deviation - penalty
        best = self.state["best"]
        self.state["evaluations_since_best"] += 1
        cap = float("inf") if self.ppo.max_kl_nats is None else self.ppo.max_kl_nats
        better = best is None or best["eval/kl"] > cap or objective > best["objective"]
        if better and (best is None or figures["eval/kl"] <= cap):
            self.state["best"] = {"step": step, "objective": objective, **figures}
            self.state["evaluations_since_best"] = 0
            if self.ppo.save_best:
                self.save_best(step)
                if not self.ppo.save_steps:
                    self.drop_best(keep=step)
        return {**figures, "eval/objective": objective, "time/evaluation": time.perf_counter() - begin}

    def watch(self, step: int, figures: dict[str, float]) -> None:
        """Raise and clear the alarms of this step: on the console, in alarms.jsonl."""
        bf16 = self.ppo.bf16 or any(p.dtype == torch.bfloat16 for p in self.roles.policy.model.parameters())
        limits = Limits(len(self.held_out), bf16, self.ppo.max_kl_nats, self.ppo.center_scores == "prompt")
        self.state["alarms"], alarms = check(self.state["alarms"], step, figures, limits)
        self.folder.alarms(step, [alarm.row() for alarm in alarms])
        if self.accelerator.is_main_process:
            with tqdm.external_write_mode(file=sys.stderr):  # else the bar and the warning share a line
                for alarm in alarms:
                    logger.warning("ppo, iteration %d, %s: %s", alarm.step, alarm.name, alarm.text)

    def judged(self, rollout: Rollout) -> tuple[dict[str, float], torch.Tensor]:
        """The held-out judge's figures of a rollout, and its combined score of each response as PPO would take it:
        minus the missing-EOS penalty. The first call's scores are those that later ones are compared with.
        """
        prompts, lengths_B = rollout.prompts, rollout.sequences.response_mask_BR.sum(1)
        end = self.chat_format.ended if self.ppo.end_cut_responses else list
        judgement = judge(
            lambda name, ids: self.roles.scores(name, ids, self.ppo.token_budget),
            [prompt.ids for prompt in prompts], [end(response) for response in rollout.responses],
            [prompt.is_safety for prompt in prompts],
            self.ppo.safety_threshold,
        )  # fmt: skip
        combined_B = judgement.combined_B - self.ppo.missing_eos_penalty * (~rollout.stopped_B).float()
        columns = self.gathered(
            len(self.held_out), judgement.helpfulness_B, judgement.safety_B, combined_B, lengths_B
        ).cpu()
        if self.state["judge_start"] is None:
            self.state["judge_start"] = columns[:, 2:].tolist()
        return held_out_figures(columns, self.state["judge_start"]), columns[:, 2]

    def save_model(self, name: str, results: dict[str, Any]) -> None:
        """Write the policy to `output_dir/name`, whole or not at all."""
        policy, main = self.roles.policy, self.accelerator.is_main_process
        with policy.acting():
            weights = adapter = None
            if is_sharded(decoder_of(policy.model).parameters()):
                weights = merged(policy.model, keep=main)
                adapter = whole_tensors(policy.trained, keep=main) if policy.adapters else None
            if main:
                files = [*self.ppo.prompt_files, *([self.ppo.eval_prompt_file] if self.ppo.eval_prompt_file else [])]
                card = model_card("ppo", self.folder.settings, {f: data_fingerprint(f) for f in files}, results)
                partial = self.folder_path / f".{name}.partial"
                save_policy(policy.model, self.tokenizer, partial, card, weights, adapter)
                replace_folder(partial, self.folder_path / name)
        self.accelerator.wait_for_everyone()

    def save_best(self, step: int) -> None:
        """Write the policy's trained weights to `best-<step>`, whole or not at all."""
        weights = whole_tensors(self.roles.policy.trained, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            partial = self.folder_path / f".best-{step}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_file(weights, partial / BEST)
            replace_folder(partial, self.folder_path / f"best-{step}")
        self.accelerator.wait_for_everyone()

    def drop_best(self, keep: int | None) -> None:
        """Drop every `best-<step>` but one: those of before it, and those that a killed run left behind."""
        if self.accelerator.is_main_process:
            for path in self.folder_path.glob("best-*"):
                if path.name != f"best-{keep}":
                    shutil.rmtree(path)

    def hand_over(self) -> None:
        """Write `output_dir/model`: the best policy or the last. `best-<step>` stays until the summary is written, so
        that a run killed in between finds it again.
        """
        if self.ppo.save_best:
            load_weights(self.roles.policy.trained, self.folder_path / f"best-{self.state['best']['step']}" / BEST)
        self.save_model("model", self.state["best"] if self.ppo.save_best else self.state["figures"])

    def over_cap(self) -> bool:
        """True once the last iteration's KL has passed `max_kl_nats`."""
        return self.ppo.max_kl_nats is not None and self.state["figures"].get("policy/kl", 0.0) > self.ppo.max_kl_nats

    def stopped_by(self) -> str | None:
        """What ends the run before its last iteration, None while nothing does."""
        if self.over_cap():
            return "max_kl_nats"
        return "judge" if 0 < self.ppo.judge_patience <= self.state["evaluations_since_best"] else None

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; the number of finished iterations."""
        state = load_checkpoint(self.folder_path, self.roles.trained, self.optimizer) if self.settings.resume else None
        if state is not None:
            self.state |= state
            self.checkpointed_best = state["best"]["step"] if state["best"] else None
            self.roles.value_shift, self.roles.value_scale = state["value_unit"] or (0.0, 1.0)
        return self.state["step"]

    def checkpoint(self, step: int) -> None:
        """Save everything that shapes the iterations to come, and the figures of a summary still to be written."""
        write = self.accelerator.is_main_process
        save_checkpoint(self.folder_path, step, self.roles.trained, self.optimizer, self.state, write)
        if self.state["best"]:
            self.checkpointed_best = self.state["best"]["step"]
            self.drop_best(keep=self.checkpointed_best)  # only now: until here the last checkpoint named the other
        self.accelerator.wait_for_everyone()


def moments_of(scores: torch.Tensor, what: str) -> list[float]:
    """Mean and deviation of those that are numbers. UserError where none is."""
    finite = scores[scores.isfinite()]
    if not len(finite):
        raise UserError(f"no {what} is a number: check the reward models (a training that diverged, or a dtype)")
    return [float(finite.mean()), float(finite.std(unbiased=False).clamp(min=1e-3))]


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run PPO; returns the summary that is also `output_dir/summary.json`. The policy is `output_dir/model`."""
    ppo, model_settings, run_settings = cli.parse(PPOSettings, ModelSettings, RunSettings, args=args)
    settings = {**asdict(ppo), **asdict(model_settings), **asdict(run_settings)}
    settings["scoring_files"] = Scoring(ppo).fingerprints()
    if done := RunFolder.completed(run_settings.output_dir, settings):
        return done
    begin = time.perf_counter()
    resume_step = latest_step(run_settings.output_dir) if run_settings.resume else 0
    if resume_step:
        check_same_run(run_settings.output_dir, settings)
    folder = RunFolder(run_settings.output_dir, settings, "ppo", resume_step)
    run = Run(ppo, model_settings, run_settings, folder)
    first = run.resume()
    if first == 0 and run.held_out:
        figures = run.evaluate(0)
        folder.log(0, figures)
        run.watch(0, figures)

    last = first if run.stopped_by() else ppo.total_iterations  # killed after its last checkpoint, before its summary
    bar = tqdm(range(first + 1, last + 1), desc="ppo", initial=first, total=last,
               disable=not run.accelerator.is_main_process)  # fmt: skip
    for step in bar:
        try:
            figures = run.iterate(step - 1)
        except NotFinite:
            # What was trained before them is good: the next start goes on from there, behind this iteration.
            run.state |= {"step": step, "skipped": 0}
            run.checkpoint(step)
            raise
        run.state |= {"step": step, "figures": figures}
        at_end = step == ppo.total_iterations or run.over_cap()
        if run.held_out and ((ppo.eval_steps and step % ppo.eval_steps == 0) or at_end):
            figures |= run.evaluate(step)
        at_end = at_end or run.stopped_by() is not None
        if step % run_settings.logging_steps == 0 or at_end or "eval/objective" in figures:
            folder.log(step, figures)
        bar.set_postfix(reward=f"{figures['reward/combined']:.3g}", kl=f"{figures['policy/kl']:.3g}", refresh=False)
        run.watch(step, figures)
        if ppo.save_steps and step % ppo.save_steps == 0:
            run.checkpoint(step)
        if at_end:
            break

    run.hand_over()
    state = run.state
    stopped_by = run.stopped_by() or "total_iterations"
    seconds = time.perf_counter() - begin
    summary = folder.finish({"iterations": state["step"], "stopped_by": stopped_by, "best": state["best"],
                             **state["figures"], "alarms": spells(read_rows(run.folder_path, "alarms.jsonl")),
                             "seconds": seconds})  # fmt: skip
    run.drop_best(keep=run.checkpointed_best)  # of a run that goes on from there it may stay the best
    return summary


if __name__ == "__main__":
    cli.entry(main)
