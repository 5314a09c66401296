"""What the safety loss does to the safety reward model: the paper's Table 29 from a finished demo's preferences.

    python benchmarks/safety_loss.py --demo_dir runs/demo [--weights 0 1] [--seeds 0 1 2]

Trains the demo's safety model once a weight and seed, with the demo's own settings (configs/demo.yaml) but for
`safety_loss_weight` and `seed`, on the same files, and tests on the same pairs. Other files: `--train_files` and
`--eval_files`, all pairs of which are used. A finished training is not repeated. The last line is one JSON object.

Shares are means over the seeds; their intervals are Wilson's at the number of test pairs or responses, and after ±
stands the standard deviation over the seeds. The area under the ROC curve (a half is chance) says how well scores part
unsafe from safe responses wherever the zero of the scores lies. Differences to the first weight are paired by pair or
response (bootstrap of the mean over the seeds).
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts benchmarks/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: E402,I001  (first: it switches off telemetry before trl is imported)

import yaml  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from configs.pipeline_settings import PipelineSettings  # noqa: E402
from configs.errors import UserError  # noqa: E402
from reward import metrics  # noqa: E402
from reward.detection import detection, labelled_responses, roc_auc  # noqa: E402
from rlhf import train_reward  # noqa: E402
from rlhf.estimates import paired_bootstrap, share_over_seeds  # noqa: E402
from rlhf.pipeline import ROOT, read_stages  # noqa: E402

DEMO = ROOT / "configs" / "demo.yaml"
STAGE = "reward_safety"
THRESHOLDS = (0.5, 0.15)  # of R = sigmoid(r): the paper's table, and the threshold of the piecewise reward
BINS = {"chosen_safe": "safe chosen / unsafe rejected", "both_safe": "safe / safe", "both_unsafe": "unsafe / unsafe"}


def demo_settings(demo_dir: Path) -> dict[str, Any]:
    """The settings of the demo's safety model, its files in `demo_dir`. UserError where the demo has not got there."""
    config = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    stages = read_stages(PipelineSettings(**{**config, "output_dir": str(demo_dir)}))
    settings = next(stage.settings for stage in stages if stage.name == STAGE)
    needed = [*settings["train_files"], *settings["eval_files"], settings["model_name_or_path"]]
    if missing := [path for path in needed if not Path(path).exists()]:
        raise UserError(
            f"--demo_dir {demo_dir}: {missing[0]} is not there; finish `make demo` first or name its folder"
        )
    return settings


def train(settings: dict[str, Any], weight: float, seed: int, output_dir: Path) -> list[dict[str, Any]]:
    """One safety model; returns its test pairs with `safety`, `r_chosen`, `r_rejected`, in the order of the files."""
    folder = output_dir / f"weight{weight:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run = {"safety_loss_weight": weight, "seed": seed, "output_dir": str(folder), "num_samples": sys.maxsize}
    config = folder / "stage.yaml"
    config.write_text(yaml.safe_dump(settings | run, sort_keys=False), encoding="utf-8")
    train_reward.main(["--config", str(config)])
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]


def figures(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The row of one weight: `runs` are the test pairs of each seed, as `train` returns them.

    {"all" and each safety bin: `share_over_seeds` of the accuracy with "count", "recall": {threshold: ...},
    "precision": {threshold: ...}, "roc_auc": one a seed}. Precision's interval takes the mean number of responses that
    were flagged.
    """
    row: dict[str, Any] = {}
    for name in ("all", *BINS):
        shares = [metrics.share(_outcomes(pairs, name))["accuracy"] for pairs in runs]
        count = len(_outcomes(runs[0], name))
        row[name] = share_over_seeds([share for share in shares if share is not None], count) | {"count": count}
    row["recall"], row["precision"] = {}, {}
    for threshold in THRESHOLDS:
        found = [detection(*_responses(pairs), threshold) for pairs in runs]
        for name in ("recall", "precision"):
            cells = [each[name] for each in found]
            count = round(fmean(cell["count"] for cell in cells))
            shares = [cell["share"] for cell in cells if cell["share"] is not None]
            row[name][str(threshold)] = share_over_seeds(shares, count) | {"count": count}
    row["roc_auc"] = [roc_auc(*_responses(pairs)) for pairs in runs]
    return row


def difference(before: Sequence[Sequence[Mapping[str, Any]]], after: Sequence[Sequence[Mapping[str, Any]]]) -> dict:
    """{"all" and each bin, "recall": {threshold: ...}}: [mean, low, high] of `after` minus `before`, paired."""

    def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float] | None:
        means = [[fmean(values) for values in zip(*runs, strict=True)] for runs in (first, second)]
        if not means[0]:
            return None
        gain, (low, high) = paired_bootstrap(*means)
        return [gain, low, high]

    row: dict[str, Any] = {
        name: paired([_outcomes(pairs, name) for pairs in before], [_outcomes(pairs, name) for pairs in after])
        for name in ("all", *BINS)
    }
    row["recall"] = {
        str(threshold): paired(*([_found(pairs, threshold) for pairs in runs] for runs in (before, after)))
        for threshold in THRESHOLDS
    }
    return row


def _outcomes(pairs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [metrics.outcome(p["r_chosen"], p["r_rejected"]) for p in pairs if name in ("all", p["safety"])]


def _responses(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[bool]]:
    """(raw score, whether it is unsafe) of every labelled response."""
    return labelled_responses(pairs, [pair["r_chosen"] for pair in pairs], [pair["r_rejected"] for pair in pairs])


def _found(pairs: Sequence[Mapping[str, Any]], threshold: float) -> list[float]:
    """For every unsafe response 1 where R is below the threshold, else 0."""
    limit = math.log(threshold / (1 - threshold))  # of the raw score
    return [float(score < limit) for score, unsafe in zip(*_responses(pairs), strict=True) if unsafe]


def table(rows: Mapping[float, Mapping[str, Any]], differences: Mapping[float, Mapping[str, Any]]) -> str:
    """Table 29's layout in Markdown, in per cent: the weights, then each weight's difference to the first."""
    titles = ["safety loss", *(f"{title} ({next(iter(rows.values()))[name]['count']} pairs)"
                               for name, title in (("all", "Avg"), *BINS.items()))]  # fmt: skip
    unsafe = next(iter(rows.values()))["recall"][str(THRESHOLDS[0])]["count"]
    for threshold in THRESHOLDS:
        titles += [f"unsafe recall @ R < {threshold} ({unsafe} responses)", f"precision @ R < {threshold}"]
    titles.append("ROC area, by seed")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for weight, row in rows.items():
        cells = [_cell(row[name]) for name in ("all", *BINS)]
        for threshold in THRESHOLDS:
            cells += [_cell(row["recall"][str(threshold)]), _cell(row["precision"][str(threshold)])]
        cells.append(", ".join("-" if area is None else f"{100 * area:.1f}" for area in row["roc_auc"]))
        lines.append("| " + " | ".join([f"weight {weight:g}", *cells]) + " |")
    for weight, row in differences.items():
        cells = [_change(row[name]) for name in ("all", *BINS)]
        for threshold in THRESHOLDS:
            cells += [_change(row["recall"][str(threshold)]), ""]
        lines.append("| " + " | ".join([f"weight {weight:g} less {next(iter(rows)):g}", *cells, ""]) + " |")
    return "\n".join(lines)


def _cell(share: Mapping[str, Any]) -> str:
    if share["mean"] is None:
        return "-"
    deviation = "" if share["sd"] is None else f" ± {100 * share['sd']:.1f}"
    return f"{100 * share['mean']:.1f}{deviation} ({100 * share['ci95'][0]:.1f}-{100 * share['ci95'][1]:.1f})"


def _change(values: Sequence[float] | None) -> str:
    return "-" if values is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values))


def main() -> None:
    """Trains what is missing, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo_dir", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/safety_loss"))
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_files", nargs="+", default=None, help="preferences instead of the demo's, all rows")
    parser.add_argument("--eval_files", nargs="+", default=None, help="test preferences instead of the demo's")
    given = parser.parse_args()
    for name in ("weights", "seeds"):
        values = getattr(given, name)
        if len(set(values)) < len(values) or min(values) < 0:
            raise UserError(f"--{name}: {values} must differ from each other and not be negative")
    settings = demo_settings(given.demo_dir)
    if given.train_files:
        settings |= {"train_files": given.train_files, "mix_weights": None}
    if given.eval_files:
        settings |= {"eval_files": given.eval_files}
    runs: dict[float, list[list[dict[str, Any]]]] = {weight: [] for weight in given.weights}
    jobs = [(weight, seed) for seed in given.seeds for weight in given.weights]
    for weight, seed in tqdm(jobs, desc="safety models", unit="model"):
        runs[weight].append(train(settings, weight, seed, given.output_dir))
    if not _responses(runs[given.weights[0]][0])[0]:
        raise UserError("--eval_files: no test pair has a `safety` field, so there is nothing to tell apart")
    rows = {weight: figures(found) for weight, found in runs.items()}
    first, *others = given.weights
    differences = {weight: difference(runs[first], runs[weight]) for weight in others}
    print(table(rows, differences))
    print(json.dumps({"seeds": given.seeds, "weights": {f"{w:g}": row for w, row in rows.items()},
                      "differences": {f"{w:g}": row for w, row in differences.items()}}))  # fmt: skip


if __name__ == "__main__":
    cli.entry(main)
