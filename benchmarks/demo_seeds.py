"""The demo's outcome over several seeds as one Markdown table, from the summaries that `make demo SEED=n` leaves.

    python benchmarks/demo_seeds.py runs/demo runs/demo-1 runs/demo-2 [--plot docs/results/demo.png]

`--plot` draws the PPO curves of the first run. The last line is one JSON object: how many of the demo's goals each run
met.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts benchmarks/ first

from rlhf.plots import ppo_curves  # noqa: E402

STAGES = ("base", "sft", "rejection_sampling", "ppo", "gatt")
FIGURES = {
    "gold_helpfulness": "helpfulness",
    "gold_helpfulness_greedy": "helpfulness, greedy",
    "gold_safety": "safety",
    "unsafe_rate": "unsafe",
    "false_refusal_rate": "false refusals",
    "kl_nats": "KL to SFT, nats",
    "response_tokens": "tokens",
}


def main(folders: list[str]) -> None:
    """Prints the stage table, the goals and the JSON line for the runs in `folders`."""
    runs = {folder: json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders}
    print("| run | stage | " + " | ".join(FIGURES.values()) + " |")
    print("|---|---|" + "---|" * len(FIGURES))
    for folder, summary in runs.items():
        rows = {row["name"]: row for row in summary["stages"]}
        for stage in STAGES:
            if stage in rows:
                cells = ["-" if rows[stage].get(key) is None else f"{rows[stage][key]:.3f}" for key in FIGURES]
                print(f"| {Path(folder).name} | {stage} | " + " | ".join(cells) + " |")
    print("\n| goal | " + " | ".join(Path(folder).name for folder in runs) + " |")
    print("|---|" + "---|" * len(runs))
    first = next(iter(runs.values()))
    for i, goal in enumerate(first["goals"]):
        cells = []
        for summary in runs.values():
            found = summary["goals"][i]
            cells.append(f"{'met' if found['met'] else 'MISSED'} ({found['value']})")
        print(f"| {goal['goal']}: {goal['target']} | " + " | ".join(cells) + " |")
    met = {Path(folder).name: sum(g["met"] for g in summary["goals"]) for folder, summary in runs.items()}
    seconds = {Path(folder).name: summary["wall_seconds"] for folder, summary in runs.items()}
    print(json.dumps({"goals": len(first["goals"]), "met": met, "wall_seconds": seconds}))


def plot(folder: Path, path: Path) -> None:
    """The reward, KL and true helpfulness over PPO of the run in `folder`, as a PNG on white."""
    rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if (figure := ppo_curves(rows)) is not None:
        figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The demo's outcome over several seeds as one table.")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    main(arguments.folders)
    if arguments.plot:
        plot(Path(arguments.folders[0]), arguments.plot)
