"""The planner's peak against a measured one: whole PPO runs of a small Llama on one CPU thread.

    python benchmarks/plan_check.py [--budgets 512 2048] [--layers 6] [--hidden 256]

Each case (all weights or LoRA, with and without gradient checkpointing, micro-batches of each budget) is a process of
its own: it runs rlhf/ppo.py on a tiny model first, so that every library is loaded and warm, then on the small Llama.
What is measured is the most that was resident during the iteration, sampling to update, above what was resident
before the models were loaded. Loading is left out: on a CPU the mapped files count as resident then, which is not so
on a GPU. The C library is told to give freed memory back at once, so that the figure counts tensors, as a GPU's
allocator does. The last line is one JSON object: `ratio` is the median of predicted over measured, `lowest` and
`highest` its range.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf import cli  # noqa: F401,I001  (first: it switches off telemetry before other libraries are imported)

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.memory import forget_peak, peak_since_mib, resident_mib
from configs.chat import load_chat_format
from configs.model_settings import ModelSettings
from configs.plan_settings import PlanSettings
from configs.ppo_settings import PPOSettings
from rlhf import ppo
from rlhf.plan import plan_of, predict, roles_of
from rlhf.plan_shapes import find_shape

TOKENIZER = Path(__file__).resolve().parents[1] / "rlhf/simulation/base_model"
WORDS, RESPONSE = 24, 64  # words of a prompt; tokens of a response
# Blocks from 64 KiB on are mapped by themselves and unmapped when freed, whatever was freed before.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def save_models(folder: Path, layers: int, hidden: int) -> dict[str, str]:
    """A random Llama and two reward models of its shape with the simulated world's tokenizer; fields of a PPO run."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, num_labels=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    paths = {}
    for name, kind in (("model_name_or_path", LlamaForCausalLM),
                       ("helpfulness_model_path", LlamaForSequenceClassification),
                       ("safety_model_path", LlamaForSequenceClassification)):  # fmt: skip
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def save_prompts(path: Path, count: int) -> int:
    """Prompts of equally many words, each another one; returns the tokens of the longest."""
    numbers = torch.randint(0, 10, (count, WORDS), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt": [{"role": "user", "content": " ".join(map(str, row))}]} for row in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chat_format = load_chat_format(AutoTokenizer.from_pretrained(TOKENIZER), "auto")
    return max(len(chat_format.encode_prompt(row["prompt"])) for row in rows)


def fields_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Settings of the case: two gradient steps of a mini-batch as large as the largest budget."""
    tokens = save_prompts(folder / "prompts.jsonl", 64)
    mini_batch = max(1, max(options.budgets) // (tokens + RESPONSE))
    return {
        "prompt_files": [str(folder / "prompts.jsonl")], "max_prompt_tokens": tokens, "max_new_tokens": RESPONSE,
        "total_iterations": 1, "batch_size": 2 * mini_batch, "mini_batch_size": mini_batch,
        "token_budget": options.budget, "gradient_checkpointing": options.checkpointing, "num_samples": 1,
    }  # fmt: skip


def run_ppo(fields: dict[str, Any], lora: bool, output_dir: Path) -> float:
    """One run; the most that was resident during its iteration, MiB."""
    words: list[str] = []
    peaks = []
    iterate = ppo.Run.iterate

    def watched(run: ppo.Run, step: int) -> dict[str, float]:
        forget_peak()
        figures = iterate(run, step)
        peaks.append(peak_since_mib())
        return figures

    for name, value in fields.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    with mock.patch.object(ppo.Run, "iterate", watched):
        ppo.main([*words, "--use_peft", str(lora), "--use_cpu", "true", "--output_dir", str(output_dir)])
    return peaks[0]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One case in this process: what was predicted and measured, MiB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fields = fields_of(options, folder)
        warm = save_models(folder / "warm", 1, 16)
        run_ppo(fields | warm | {"batch_size": 2, "mini_batch_size": 1}, options.lora, folder / "out-warm")
        paths = save_models(folder / "models", options.layers, options.hidden)
        before = resident_mib()
        measured = run_ppo(fields | paths, options.lora, folder / "out") - before
        settings = PPOSettings(**fields, **{k: v for k, v in paths.items() if k != "model_name_or_path"})
        model = ModelSettings(model_name_or_path=paths["model_name_or_path"], use_peft=options.lora)
        machine = PlanSettings()
        plan = plan_of(settings, model, machine, find_shape("auto", model.model_name_or_path), on_cpu=True)
        # A micro-batch of whole rows may hold fewer tokens than its budget.
        row = plan.prompt_tokens + plan.response_tokens
        plan = replace(plan, token_budget=min(plan.token_budget // row, settings.mini_batch_size) * row)
        found = predict(plan, roles_of(settings, model, machine, plan))
    phase = max(found["phases"], key=found["phases"].__getitem__)
    return {"predicted": found["peak"] / 2**20, "resident": found["resident"] / 2**20, "phase": phase,
            "measured": measured, "tokens": plan.token_budget}  # fmt: skip


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 2048], help="tokens of a micro-batch")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--budget", type=int, help="measure one case in this process")
    parser.add_argument("--lora", action="store_true", help="of that case")
    parser.add_argument("--checkpointing", action="store_true", help="of that case")
    options = parser.parse_args(args)
    if options.budget:
        print(json.dumps(measure(options)))
        return

    cases = []
    sizes = ["--layers", str(options.layers), "--hidden", str(options.hidden), "--budgets", *map(str, options.budgets)]
    for lora, checkpointing, budget in tqdm(list(product((False, True), (False, True), options.budgets))):
        flags = [*["--lora"] * lora, *["--checkpointing"] * checkpointing, "--budget", str(budget), *sizes]
        command = [sys.executable, str(Path(__file__).resolve()), *flags]
        done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        case = {"lora": lora, "checkpointing": checkpointing, "budget": budget}
        cases.append(case | json.loads(done.stdout.splitlines()[-1]))
        found = cases[-1]
        tqdm.write(
            f"lora {lora!s:5} checkpointing {checkpointing!s:5} budget {budget:5}: predicted "
            f"{found['predicted']:7.1f} MiB ({found['resident']:.1f} by roles), measured {found['measured']:7.1f}"
        )
    ratios = [case["predicted"] / case["measured"] for case in cases]
    print(json.dumps({"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios), "cases": cases}))


if __name__ == "__main__":
    main()
