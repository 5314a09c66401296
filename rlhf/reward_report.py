"""What a reward-model evaluation leaves to look at: plots/*.png, report.md, tables on the console, telling samples.

Made from the evaluation (`reward.evaluation.evaluation`) and the lines of scores.jsonl. Only the samples hold text.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.records import RATINGS
from reward.detection import labelled_responses
from reward.evaluation import scores_of
from rlhf import reward_figures as figures
from rlhf.plots import to_png
from rlhf.reward_tables import tables
from rlhf.run import write_atomic

Row = Mapping[str, Any]
WIDTH = 140  # columns where there is no terminal to ask
SOURCES_SHOWN = 24  # rows of the table by source on the console
LEFT_OUT = {"too_long": "more set aside: a model cannot read them", "shortened": "without their oldest turns"}
PER_MODEL = {
    "scores": "Raw scores of chosen and rejected responses (dashed: mean)",
    "scores_by_safety": "Raw scores of safe and unsafe responses (dashed: mean)",
    "margins": figures.TITLES["margins"],
    "calibration": figures.TITLES["reliability"],
    "unsafe": figures.TITLES["thresholds"],
    "length": figures.TITLES["lengths"],
}


def write(folder: Path, summary: Row, rows: Sequence[Row], threshold: float, console: Console) -> None:
    """Write plots and report.md into the run folder and print the tables."""
    plots = write_plots(folder / "plots", summary, rows, threshold)
    made = tables(summary)
    page = ["# Evaluation of reward models", "", *models_text(summary), ""]
    page += ["Shares are followed by their 95 % Wilson interval.", ""]
    page += [table.markdown() for table in made]
    page += ["## Plots", "", *(f"![{title}](plots/{name})\n" for name, title in plots.items())]
    write_atomic(folder / "report.md", "\n".join(page))
    width = console.width
    if not console.is_terminal:
        console.width = max(width, WIDTH)
    for line in models_text(summary):
        console.print(Text(line.replace("`", "")))
    for table in made:
        console.print()
        if table.labels[-1] == "Source" and len(table.rows) > SOURCES_SHOWN:
            console.print(Text(f"{table.title}: {len(table.rows)} rows, in report.md"))
            continue
        console.print(table.rich())
        console.print(Text(f" {table.note}", style="dim"))
    console.width = width
    words = f"\nWritten to {folder}: report.md, plots/, scores.jsonl, samples.jsonl, summary.json"
    console.print(Text(words), soft_wrap=True)


def models_text(summary: Row) -> list[str]:
    """One line a model and one a test set: what was evaluated."""
    lines = []
    for name, model in summary["models"].items():
        lines.append(f"- {name}: `{model['path']}`, input format {model['input_format']}")
    for key, about in summary["test_sets"].items():
        left_out = [f"{about[what]} {words}" for what, words in LEFT_OUT.items() if about.get(what)]
        lines.append(f"- test set {key}: {about['pairs']:,} pairs" + (f" ({', '.join(left_out)})" if left_out else ""))
    return lines


def write_plots(folder: Path, summary: Row, rows: Sequence[Row], threshold: float) -> dict[str, str]:
    """Write one PNG a subject, a panel a model and test set; returns {file name: title}."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {key: [row for row in rows if row["test_set"] == key] for key in summary["test_sets"]}
    models, about = summary["models"], summary["test_sets"]
    accuracies = {
        key: figures.draw_accuracies(
            {
                **{name: model["test_sets"][key] for name, model in models.items()},
                figures.LONGER_WINS: about[key]["longer_wins"],
            },
            about[key]["ceiling"],
        )
        for key in sets
    }
    by_rating = {
        key: figures.draw_accuracy_by_rating(
            {name: _rating_cells(model["test_sets"][key]) for name, model in models.items()},
            about[key]["ceiling_by_rating"] or {},
        )
        for key in sets
    }
    made: dict[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
        "accuracy": ("Accuracy by test set, with 95 % intervals", {"": accuracies}),
        "accuracy_by_rating": ("Accuracy by rating, with 95 % intervals", {"": by_rating}),
    }
    panels: dict[str, dict[str, dict[str, Any]]] = {kind: {name: {} for name in models} for kind in PER_MODEL}
    for name, model in models.items():
        for key, of_set in sets.items():
            report = model["test_sets"][key]
            chosen, rejected = scores_of(of_set, name)
            margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
            tokens = [row[f"tokens_{side}"] for side in ("chosen", "rejected") for row in of_set]
            scores, unsafe = labelled_responses(of_set, chosen, rejected)
            split = {word: [s for s, u in zip(scores, unsafe, strict=True) if u == wanted]
                     for word, wanted in (("safe", False), ("unsafe", True))}  # fmt: skip
            drawn = {
                "scores": figures.draw_histograms({"chosen": chosen, "rejected": rejected}),
                "scores_by_safety": figures.draw_histograms(split),
                "margins": figures.draw_margins(margins, [row["rating"] for row in of_set]),
                "calibration": figures.draw_reliability(report["calibration"], report["calibration_error"]),
                "unsafe": report["unsafe"] and figures.draw_thresholds(report["unsafe"]["curve"], threshold),
                "length": figures.draw_lengths(tokens, [*chosen, *rejected]),
            }
            for kind, draw in drawn.items():
                panels[kind][name][key] = draw
    made |= {kind: (title, panels[kind]) for kind, title in PER_MODEL.items()}
    if summary["agreement"]:
        both = {
            key: figures.draw_agreement(*(sum(scores_of(of_set, name), []) for name in ("safety", "helpfulness")))
            for key, of_set in sets.items()
        }
        made["agreement"] = (figures.TITLES["agreement"], {"": both})
    written = {}
    for kind, (title, cells) in made.items():
        if figure := figures.grid(title, cells):
            to_png(figure, folder / f"{kind}.png")
            written[f"{kind}.png"] = title
    return written


def _rating_cells(report: Row) -> dict[str, dict[str, Any]]:
    return {
        rating: {"accuracy": report["by_rating"][rating], "ci95": report["by_rating_ci95"][rating]}
        for rating in RATINGS
        if rating in report["by_rating"]
    }


def samples(rows: Sequence[Row], records: Sequence[Row], count: int) -> list[dict[str, Any]]:
    """The `count` pairs that each model gets most wrong, and the responses on which the two models differ most.

    `records` are the preference records of `rows`, one each. The second kind is as in the paper's Table 35, R_s and R_h
    being sigmoids of the raw scores: first those that only the helpfulness model likes, then the opposite.
    """
    found: list[dict[str, Any]] = []
    for name in rows[0]["r_chosen"]:
        margins = [chosen - rejected for chosen, rejected in zip(*scores_of(rows, name), strict=True)]
        worst = sorted((i for i, margin in enumerate(margins) if margin < 0), key=lambda i: margins[i])
        found += [{"kind": "most_wrong", "model": name, **_shown(rows[i], records[i])} for i in worst[:count]]
    if {"helpfulness", "safety"} <= rows[0]["r_chosen"].keys():
        responses = _responses(rows, records)
        for sign in (1, -1):
            apart = [each for each in responses if sign * (each["R_h"] - each["R_s"]) > 0]
            apart.sort(key=lambda each: sign * (each["R_s"] - each["R_h"]))
            found += apart[:count]
    return found


def _shown(row: Row, record: Row) -> dict[str, Any]:
    kept = ("test_set", "file", "index", "source", "rating", "safety", "r_chosen", "r_rejected")
    return {
        **{name: row[name] for name in kept},
        "prompt": record["prompt"],
        "chosen": record["chosen"][-1]["content"],
        "rejected": record["rejected"][-1]["content"],
    }


def _responses(rows: Sequence[Row], records: Sequence[Row]) -> list[dict[str, Any]]:
    """Every response once, with both scores."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row, record in zip(rows, records, strict=True):
        for side in ("chosen", "rejected"):
            text = record[side][-1]["content"]
            raw = {letter: row[f"r_{side}"][name] for letter, name in (("s", "safety"), ("h", "helpfulness"))}
            found[str(record["prompt"]), text] = {
                "kind": "disagreement",
                **{name: row[name] for name in ("test_set", "file", "index", "source", "safety")},
                "prompt": record["prompt"],
                "response": text,
                "was": side,
                **{f"R_{letter}": 1 / (1 + math.exp(-max(r, -700.0))) for letter, r in raw.items()},
                **{f"r_{letter}": r for letter, r in raw.items()},
            }
    return list(found.values())
