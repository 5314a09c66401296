"""A real model on real pairs: our reward training and `trl.RewardTrainer` at equal budget, accuracy and time.

    python benchmarks/reward_real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir runs/real

Both start from one reward model (a fresh head on the chat model), see the same tokens of the helpful and harmless
pairs once, in batches of the same size, with the same optimizer and schedule, on one thread. Timed is the training
loop, in processor seconds. Each is tested on its held-out set by one scorer, beside the baseline that the longer
response wins. A finished part is not run again. The last line is one JSON object: `ratio` is trl's time over ours.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf import cli  # noqa: I001  (first: it switches off telemetry before trl is imported)

import torch

from benchmarks.hh_pairs import KIT, SETS
from benchmarks.memory import peak_mib
from benchmarks.trl_peer import trl_trainer
from configs.chat import load_chat_format
from configs.records import read_preferences
from configs.reward_settings import RewardSettings
from reward import metrics
from reward.data import EncodedPair, encode_pairs
from reward.model import create_reward_model, load_reward_model, save_reward_model
from rlhf.tokenizer import load_tokenizer
from rlhf import train_reward
from rlhf.reward_training import RewardTrainer, score_pairs

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("trl", "ours")


def pairs_of(name: str, split: str, model: str, max_length: int) -> list[EncodedPair]:
    """The pairs of `hh-<name>-<split>.jsonl.gz`, in our encoding."""
    tokenizer = load_tokenizer(model)
    chat_format = load_chat_format(tokenizer)
    rows = read_preferences(KIT / f"hh-{name}-{split}.jsonl.gz", chat_format=chat_format).rows
    return encode_pairs(rows, chat_format, max_length, None)[0]


def flags(settings: argparse.Namespace, name: str) -> list[str]:
    """What both sides are told, as flags of rlhf/train_reward.py."""
    options = {
        "train_files": KIT / f"hh-{name}-train.jsonl.gz",
        "eval_files": KIT / f"hh-{name}-test.jsonl.gz",
        "max_length": settings.max_length,
        "max_reject_share": 0.2,  # pairs whose last turn alone is longer are left out on both sides
        "margin": "none",
        "deduplicate": False,  # the peer gets every pair
        "leaked_prompts": "keep",
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": 1,
        "bf16": True,
        "max_steps": settings.max_steps,
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def train_trl(settings: argparse.Namespace, name: str, folder: Path) -> None:
    """The peer's run, in this process; the model goes to `folder/model`, the times to `folder/times.json`."""
    torch.set_num_threads(1)
    start = str(Path(settings.output_dir) / "start")
    (options,) = cli.parse(RewardSettings, args=flags(settings, name))
    tokenizer = load_tokenizer(start)
    model: Any = load_reward_model(start).train()
    pairs = pairs_of(name, "train", start, settings.max_length)
    trainer = trl_trainer(model, tokenizer, pairs, options, str(folder / "checkpoints"))
    times = Times()
    trainer.train()
    times.write(folder)
    save_reward_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder / "model", "trl's run\n")


class Times:
    """Wall and processor seconds since it was made, and the most resident memory of the process so far."""

    def __init__(self) -> None:
        self.wall, self.cpu = monotonic(), sum(os.times()[:2])

    def write(self, folder: Path) -> None:
        """Put the figures into `folder/times.json`."""
        figures = {
            "seconds": monotonic() - self.wall,
            "cpu_seconds": sum(os.times()[:2]) - self.cpu,
            "peak_mib": peak_mib(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "times.json").write_text(json.dumps(figures), encoding="utf-8")


def train_ours(settings: argparse.Namespace, name: str, folder: Path) -> None:
    """Our script's main, in this process; timed is the same part as the peer's, the training loop."""
    train = RewardTrainer.train

    def timed(self: RewardTrainer, *args: Any, **options: Any) -> Any:
        times = Times()
        result = train(self, *args, **options)
        times.write(folder)
        return result

    RewardTrainer.train = timed  # type: ignore[method-assign]
    start = str(Path(settings.output_dir) / "start")
    train_reward.main(
        ["--model_name_or_path", start, "--use_cpu", "true", "--output_dir", str(folder), *flags(settings, name)]
    )


def accuracy(folder: Path, name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the model in `folder` on the held-out set; our script has measured its own, in the same way."""
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {"accuracy": summary["accuracy"], "ci95": summary["ci95"], "count": summary["test_pairs"]}
    pairs = pairs_of(name, "test", str(folder / "model"), settings.max_length)
    scores = score_pairs(load_reward_model(folder / "model"), pairs, token_budget=2048)
    return metrics.share([metrics.outcome(chosen, rejected) for chosen, rejected in zip(*scores, strict=True)])


def longer_wins(name: str, model: str, max_length: int) -> dict[str, Any]:
    """Accuracy of the rule that the longer response, in tokens, is the chosen one."""
    pairs = pairs_of(name, "test", model, max_length)
    return metrics.share([metrics.outcome(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs])


def main(settings: argparse.Namespace) -> None:
    """Train what is missing, test, print."""
    torch.set_num_threads(1)
    output = Path(settings.output_dir)
    wanted = {
        name: getattr(settings, name) for name in ("model", "max_length", "batch_size", "learning_rate", "max_steps")
    }
    if settings.child:
        side, name = settings.child.split("-")
        (train_ours if side == "ours" else train_trl)(settings, name, output / settings.child)
        return
    if not (output / "start" / "config.json").exists():
        tokenizer = load_tokenizer(settings.model)
        save_reward_model(create_reward_model(settings.model, tokenizer), tokenizer, output / "start", "a fresh head\n")
    asked = output / "asked.json"
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8")) != wanted:
        sys.exit(f"{output} holds runs of other settings; name another --output_dir")
    asked.write_text(json.dumps(wanted), encoding="utf-8")
    results: dict[str, Any] = {}
    for name in settings.sets:
        for side in settings.sides:
            folder = output / f"{side}-{name}"
            if not (folder / "model" / "README.md").exists():  # written last
                print(f"== {side}, {name}", flush=True)
                # A process of its own, so that its memory is its own.
                subprocess.run([sys.executable, *sys.argv, "--child", f"{side}-{name}"], check=True)
            if not (folder / "accuracy.json").exists():
                found = accuracy(folder, name, settings)
                (folder / "accuracy.json").write_text(json.dumps(found), encoding="utf-8")
            results[f"{side}-{name}"] = json.loads((folder / "times.json").read_text(encoding="utf-8")) | {
                "accuracy": json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
            }
    baseline = {name: longer_wins(name, str(output / "start"), settings.max_length) for name in settings.sets}
    report(results, baseline)


def cell(share: dict[str, Any]) -> str:
    """An accuracy with its interval, in per cent."""
    low, high = share["ci95"]
    return f"{100 * share['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def report(results: dict[str, Any], baseline: dict[str, Any]) -> None:
    """The table, and the JSON line."""
    print("| trained and tested on | by | accuracy, % | processor seconds | peak MiB |\n|---|---|---|---|---|")
    for key, found in results.items():
        side, name = key.split("-")
        print(f"| {name} | {side} | {cell(found['accuracy'])} | {found['cpu_seconds']:.0f} | {found['peak_mib']:.0f} |")
    for name, share in baseline.items():
        print(f"| {name} | longer wins | {cell(share)} | | |")
    done = [name for name in SETS if all(f"{side}-{name}" in results for side in SIDES)]
    total = {side: sum(results[f"{side}-{name}"]["cpu_seconds"] for name in done) for side in SIDES}
    ratio = total["trl"] / total["ours"] if done else None
    print(json.dumps({"ratio": ratio, "cpu_seconds": total, "sets": done, "longer_wins": baseline, "runs": results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", default="runs/real")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--max_length", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    main(parser.parse_args())
