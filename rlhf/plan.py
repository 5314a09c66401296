"""Will it fit, and how long will it take? Memory by role and phase, and time, of a PPO run: arithmetic, no weights.

    accelerate launch rlhf/plan.py --config configs/llama2_7b_ppo.yaml --gpus 8 --gpu a100_80gb
    accelerate launch rlhf/plan.py --config configs/llama2_7b_ppo.yaml --shape llama2-13b --gpu_memory_gib 40

Takes PPO's own config and flags. Of the model it reads config.json alone, of Llama 2 not even that. The arithmetic is
in rlhf/plan_memory.py and rlhf/plan_time.py; docs/planning.md compares it with measured peaks. Nothing is written.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts rlhf/ first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: I001  (first: it switches off telemetry before other libraries are imported)

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.plan_settings import PlanSettings
from configs.ppo_settings import PPOSettings
from rlhf.decoding import CPU_FEED_TOKENS, FEED_TOKENS
from reward.collate import budget_for
from rlhf.plan_memory import (
    Plan,
    Role,
    loading_bytes,
    phase_bytes,
    policy_roles,
    resident_bytes,
    scorer_role,
    value_role,
)
from rlhf.plan_shapes import PROJECTIONS, Shape, find_shape
from rlhf.plan_time import Device, Work, iteration_seconds

GIB = 2**30
SAMPLER_ROWS = 1024  # of sample_live in rlhf/engines.py
# Beside tensors a process holds the CUDA context and libraries, about 1 GiB; an allocator loses some of the rest.
CONTEXT_GIB, USABLE = 1.0, 0.95
# Predicted by measured peak under LoRA with gradient checkpointing, the one kind far too low (docs/planning.md).
SHORT = 0.82


def plan_of(ppo: PPOSettings, model: ModelSettings, settings: PlanSettings, shape: Shape, on_cpu: bool = False) -> Plan:
    """The settings as the arithmetic takes them. UserError for what it does not know."""
    modules = tuple(model.lora_target_modules or PROJECTIONS)
    if unknown := [name for name in modules if name not in PROJECTIONS]:
        raise UserError(f"lora_target_modules: {', '.join(unknown)}: only {', '.join(PROJECTIONS)} can be planned")
    if model.load_in_4bit and settings.sharding != "none":
        raise UserError(f"sharding: 4-bit weights stay whole on every process; leave {settings.sharding} out")
    if model.load_in_4bit and not model.use_peft:
        raise UserError("load_in_4bit: 4-bit weights are trained under LoRA only; add use_peft: true")
    if settings.sharding == "none" and not ppo.gather_weights:
        raise UserError("gather_weights: false has no effect without sharding; add --sharding fsdp2 or zero3")
    gpus = settings.gpus
    if ppo.batch_size % gpus:
        raise UserError(f"batch_size {ppo.batch_size} is not a multiple of {gpus} processes")
    rank = model.lora_r
    if model.use_peft and model.adapter_path:
        otherwise = unknown_rank(model, settings)
        rank = adapter_rank(model.adapter_path, otherwise) or otherwise
    auto = 4 if on_cpu else 2
    frozen = {"auto": auto, "float32": 4, "bfloat16": 2}[model.dtype]
    return Plan(
        shape=shape, lora=model.use_peft, rank=rank, modules=modules, four_bit=model.load_in_4bit, frozen_width=frozen,
        trained_width=2 if model.dtype == "bfloat16" else 4, autocast=ppo.bf16,
        checkpointing=ppo.gradient_checkpointing,
        token_budget=budget_for(ppo.token_budget, torch.device("cpu" if on_cpu else "cuda"), ppo.bf16),
        shards=1 if settings.sharding == "none" else gpus, gather=ppo.gather_weights,
        responses=ppo.batch_size // gpus, per_prompt=ppo.responses_per_prompt,
        prompt_tokens=ppo.max_prompt_tokens, response_tokens=ppo.max_new_tokens, sampler_rows=SAMPLER_ROWS,
        sampler_columns=ppo.sampling_token_budget, feed_tokens=CPU_FEED_TOKENS if on_cpu else FEED_TOKENS,
    )  # fmt: skip


def unknown_rank(model: ModelSettings, settings: PlanSettings) -> int:
    """The rank of adapters that nobody has trained yet; under adapter_path no setting says it."""
    return settings.adapter_rank or (64 if model.adapter_path else model.lora_r)


def adapter_rank(path: str, otherwise: int) -> int | None:
    """The rank of the adapter folder `path`, `otherwise` where it is not there yet; None: a model of its own."""
    config = Path(path, "adapter_config.json")
    if config.is_file():
        return int(json.loads(config.read_text(encoding="utf-8"))["r"])
    return otherwise if Path(path).name == "adapter" else None


def roles_of(ppo: PPOSettings, model: ModelSettings, settings: PlanSettings, plan: Plan) -> list[Role]:
    """Every model that a process holds, as rlhf/load_roles.py makes them: under LoRA, adapter folders on one base."""
    start = ppo.sft_model_path if ppo.reference_model == "sft" else model.adapter_path
    unknown = unknown_rank(model, settings)
    reference = "off" if not start else "model" if adapter_rank(start, unknown) is None else "adapter"
    paths = {f"{name} reward": path for name, path in ppo.reward_model_paths.items()}
    if ppo.judge_helpfulness_model_path:
        paths |= {
            "helpfulness judge": ppo.judge_helpfulness_model_path,
            "safety judge": ppo.judge_safety_model_path,
        }
    ranks = {name: adapter_rank(path, unknown) if plan.lora else None for name, path in paths.items()}
    rank: int | None = plan.rank
    value = "adapter"
    if ppo.value_model == "trunk":
        value = "trunk"
    elif ppo.value_model != "policy":
        rank = adapter_rank(ppo.value_path, unknown)
        if rank is None:
            value = "borrowed" if ppo.value_model == "helpfulness" else "model"
    for number in range(settings.judges):
        ranks[f"judge {number + 1}"] = next(iter(ranks.values()), None)
    return [
        *policy_roles(plan, reference),
        value_role(plan, value, rank or model.lora_r),
        *(scorer_role(plan, name, of is not None, of or plan.rank) for name, of in ranks.items()),
    ]


def predict(plan: Plan, roles: list[Role]) -> dict[str, Any]:
    """Bytes of one process: `resident` after sharding, `phases` above it, their `peak`; in CPU memory, `loading`."""
    policy = sum(role.weights for role in roles if role.name in ("base", "policy"))
    phases = phase_bytes(plan, policy)
    resident = resident_bytes(plan, roles)
    return {"resident": resident, "phases": phases, "peak": resident + max(phases.values()),
            "loading": loading_bytes(plan, roles)}  # fmt: skip


def verdict(plan: Plan, peak: float, gpu_gib: float) -> dict[str, bool]:
    """Whether a peak in bytes fits a GPU, and whether it would not if the plan fell as short as it once has."""

    def fits(size: float) -> bool:
        return size / GIB + CONTEXT_GIB <= USABLE * gpu_gib

    return {"fits": fits(peak), "narrowly": fits(peak) and plan.lora and plan.checkpointing and not fits(peak / SHORT)}


def time_of(ppo: PPOSettings, settings: PlanSettings, plan: Plan) -> dict[str, Any]:
    """Seconds an iteration by phase, tokens a second over all processes, hours of the whole run."""
    gpu = settings.accelerator
    device = Device(gpu.tflops * 1e12, gpu.bandwidth_gb_s * 1e9, gpu.link_gb_s * 1e9, settings.utilisation,
                    settings.bandwidth_utilisation)  # fmt: skip
    prompt = settings.mean_prompt_tokens or ppo.max_prompt_tokens / 2
    response = settings.mean_response_tokens or ppo.max_new_tokens
    work = Work(
        scorers=len(ppo.reward_model_paths), logprob_passes=1 + ppo.recomputes, epochs=ppo.ppo_epochs,
        mean_response=response, mean_prompt=prompt, one_trunk=ppo.value_model == "trunk",
    )  # fmt: skip
    seconds = iteration_seconds(plan, work, device)
    total = sum(seconds.values())
    return {
        "seconds": seconds,
        "iteration": total,
        "tokens_per_second": ppo.batch_size * (prompt + response) / total,
        "hours": ppo.total_iterations * total / 3600,
    }


def show(
    console: Console, plan: Plan, roles: list[Role], found: dict[str, Any], gpu_gib: float, processes: int
) -> None:
    """The tables; `processes` are those of one machine."""
    shards = "" if plan.shards == 1 else f", divided over {plan.shards} processes"
    table = Table(box=box.SIMPLE_HEAD, title=f"Memory by role, GiB of one process{shards}", title_justify="left")
    for name in ("role", "weights", "gradients", "optimizer", "total"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for role in roles:
        where = " (on the base)" if role.shared else ""
        sizes = (role.weights, role.gradients, role.optimizer, role.total)
        table.add_row(role.name + where, *(f"{size / plan.shards / GIB:.2f}" for size in sizes))
    table.add_row("all roles", "", "", "", f"{found['resident'] / GIB:.2f}")
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="By phase, GiB and seconds", title_justify="left")
    for name in ("phase", "above the roles", "peak", "seconds"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, size in found["phases"].items():
        peak = (found["resident"] + size) / GIB
        table.add_row(name, f"{size / GIB:.2f}", f"{peak:.2f}", f"{found['time']['seconds'][name]:.1f}")
    console.print(table)
    word = "fits" if found["fits"] else "does NOT fit"
    if found["narrowly"]:
        word = f"fits NARROWLY: LoRA with gradient checkpointing was once measured at {1 / SHORT:.2f} times its plan"
    console.print(
        f"Peak {found['peak'] / GIB:.1f} GiB of {gpu_gib:.1f}, with {CONTEXT_GIB:.0f} GiB for the context and "
        f"{1 - USABLE:.0%} spare: {word}."
    )
    loading = found["loading"] / GIB
    console.print(f"Loading: {loading:.0f} GiB of CPU memory, {loading * processes:,.0f} for a machine's {processes}.")
    time = found["time"]
    console.print(
        f"An iteration {time['iteration']:.0f} s, {time['tokens_per_second']:,.0f} tokens/s, the run "
        f"{time['hours']:.1f} h: predictions, real ones are longer."
    )


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Prints the plan; returns it as the JSON has it, in bytes and seconds."""
    ppo, model, _, settings = cli.parse(PPOSettings, ModelSettings, RunSettings, PlanSettings, args=args)
    shape = find_shape(settings.shape, model.model_name_or_path)
    plan = plan_of(ppo, model, settings, shape)
    roles = roles_of(ppo, model, settings, plan)
    found = predict(plan, roles)
    gpu_gib = settings.accelerator.memory_gib
    found |= verdict(plan, found["peak"], gpu_gib)
    found["roles"] = {role.name: asdict(role) for role in roles}
    found["time"] = time_of(ppo, settings, plan)
    if settings.as_json:
        print(json.dumps(found, indent=2))
    else:
        show(Console(), plan, roles, found, gpu_gib, min(settings.gpus, settings.gpus_per_node))
    return found


if __name__ == "__main__":
    cli.entry(main)
