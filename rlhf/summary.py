"""What a whole run of the recipe measured, read from its stage folders: figures, comparisons, verdicts, alarms.

No model is run here: `rlhf/evaluate_policy.py`, `rlhf/train_reward.py`, `rlhf/gate.py`, `rlhf/ppo.py` and
`rlhf/evaluate_gatt.py` wrote the figures. A folder that is missing leaves its part None or out.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from configs.records import RATINGS
from reward.evaluation import at_chance
from rlhf.alarms import spells
from rlhf.estimates import paired_bootstrap


class Folders(NamedTuple):
    """Where a stage's figures are: its evaluation, and the folders whose seconds it took to make."""

    evaluation: str
    training: tuple[str, ...]


STAGES = {
    "base": Folders("evaluate_base", ()),
    "sft": Folders("evaluate_sft", ("sft",)),
    "rejection_sampling": Folders("evaluate_rejection_sampling", ("rejection_sampling", "rejection_sft")),
    "ppo": Folders("evaluate_ppo", ("ppo",)),
    "gatt": Folders("evaluate_gatt", ("build_gatt", "gatt_sft")),
}
OBJECTIVES = ("helpfulness", "safety")  # of reward models, and of the judges that no stage is trained against
# The same policies on requests of families that no training stage asks.
HELD_OUT_FAMILIES = {"sft": "families_sft", "ppo": "families_ppo"}
FIGURES = (
    "gold_helpfulness",
    "gold_helpfulness_greedy",
    "gold_safety",
    "unsafe_rate",
    "false_refusal_rate",
    "kl_nats",
    "response_tokens",
    "reward_helpfulness",
    "reward_safety",
)
COMPARISONS = (  # stage before, stage after, greedy
    ("sft", "rejection_sampling", False),
    ("rejection_sampling", "ppo", False),
    ("sft", "ppo", False),
    ("ppo", "gatt", False),
    ("sft", "ppo", True),
)


def build(output_dir: Path, wall_seconds: float) -> dict[str, Any]:
    """The content of `<output_dir>/summary.json`; finite numbers only."""
    return finite({
        "wall_seconds": round(max(wall_seconds, active_seconds(output_dir)), 1),
        "stages": [figures for name in STAGES if (figures := _stage(output_dir, name))],
        "reward_models": {name: _reward_model(output_dir / f"reward_{name}") for name in OBJECTIVES},
        "judges": {name: _reward_model(output_dir / f"judge_{name}") for name in OBJECTIVES},
        "gatt": {name: _persistence(_measured(output_dir, name)) for name in ("baseline", "trained")},
        "held_out_families": {
            name: figures for name, folder in HELD_OUT_FAMILIES.items() if (figures := _families(output_dir / folder))
        },
        "distillation": _distillation(output_dir / "distil_safety"),
        "gates": sorted((gate for path in output_dir.glob("gate_*") if (gate := _gate(path))), key=_place),
        "alarms": [
            {"stage": path.parent.name, **spell}
            for path in sorted(output_dir.glob("*/alarms.jsonl"))
            for spell in spells(read_rows(path.parent, path.name))
        ],
        "comparisons": [c for row in COMPARISONS if (c := _comparison(output_dir, *row))],
    })  # fmt: skip


def active_seconds(output_dir: Path) -> float:
    """Seconds in which at least one stage ran, over all starts of the pipeline.

    So a second start that finds stages complete does not look fast. A stage ends when its `seconds.json` is written.
    """
    spans = []
    for path in output_dir.glob("*/seconds.json"):
        end = path.stat().st_mtime
        spans.append((end - (_seconds(path.parent) or 0.0), end))
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def read_json(folder: Path, name: str = "summary.json") -> dict[str, Any] | None:
    """An object from a stage folder, NaN and infinity as None; None where the file is absent or no JSON object."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return finite(value) if isinstance(value, dict) else None


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved settings of a stage, {} where there are none."""
    try:
        value = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return finite(value) if isinstance(value, dict) else {}


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, [] where it is absent; a last line cut short by a killed run is left out."""
    rows = []
    try:
        lines = (folder / name).read_text(encoding="utf-8").split("\n")  # text may hold other line separators
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(finite(row))
    return rows


def finite(value: Any) -> Any:
    """`value` with NaN and infinite numbers replaced by None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _seconds(folder: Path) -> float | None:
    return (read_json(folder, "seconds.json") or {}).get("seconds")


def _stage(output_dir: Path, name: str) -> dict[str, Any] | None:
    evaluated = read_json(output_dir / STAGES[name].evaluation)
    if evaluated is None:
        return None
    seconds = [s for folder in STAGES[name].training if (s := _seconds(output_dir / folder)) is not None]
    intervals = evaluated.get("ci95") or {}
    return {
        "name": name,
        **{figure: evaluated.get(figure) for figure in FIGURES},
        "seconds": round(sum(seconds), 1) if seconds else None,
        "prompts": evaluated.get("prompts"),
        "ci95": {figure: intervals.get(figure) for figure in FIGURES},
    }


def _gate(folder: Path) -> dict[str, Any] | None:
    """What the held-out judge said of a stage (rlhf/gate.py), over all prompts; None for a file of another kind."""
    verdict = read_json(folder, "verdict.json") or {}
    if not isinstance(overall := verdict.get("all"), dict):
        return None
    intervals = overall.get("ci95") or {}
    return {
        "name": folder.name.removeprefix("gate_"),
        **{key: verdict.get(key) for key in ("passed", "require", "reasons")},
        **{key: overall.get(key) for key in ("improvement", "win_rate_lc")},
        "ci95": {key: intervals.get(key) for key in ("improvement", "win_rate_lc")},
    }


def _place(gate: Mapping[str, Any]) -> tuple[int, str]:
    """Gates in the order of the recipe, those of other names last."""
    names = list(STAGES)
    return names.index(gate["name"]) if gate["name"] in names else len(names), gate["name"]


def _distillation(folder: Path) -> dict[str, Any] | None:
    """What safety context distillation kept, and the mean R_s of those prompts' answers before and after its gate."""
    if (distilled := read_json(folder)) is None:
        return None
    safety = distilled.get("safety") or {}
    means = {name: (safety.get(name) or {}).get("mean") for name in ("original", "after")}
    return {"prompts": distilled.get("prompts"), "kept": distilled.get("kept"), **means}


def _families(folder: Path) -> dict[str, Any] | None:
    """Gold helpfulness of a policy on the held-out families: {figure, ..., "prompts", "ci95"}."""
    if (evaluated := read_json(folder)) is None:
        return None
    names, intervals = ("gold_helpfulness", "gold_helpfulness_greedy"), evaluated.get("ci95") or {}
    return {
        **{name: evaluated.get(name) for name in names},
        "prompts": evaluated.get("prompts"),
        "ci95": {name: intervals.get(name) for name in names},
    }


def _reward_model(folder: Path) -> dict[str, Any] | None:
    """How often a model of `rlhf/train_reward.py` was right on held-out pairs; a warning where that may be luck."""
    trained = read_json(folder)
    if trained is None:
        return None
    columns = {
        "accuracy": trained.get("by_rating") or {},
        "n": trained.get("by_rating_pairs") or {},
        "ceiling": trained.get("ceiling_by_rating") or {},
        "ci95": trained.get("by_rating_ci95") or {},
    }
    ratings = [rating for rating in RATINGS if rating in columns["accuracy"]]
    return {
        **{key: trained.get(key) for key in ("accuracy", "ceiling", "ci95", "test_pairs", "calibration_error")},
        "by_source": trained.get("by_source") or {},
        "warning": at_chance(trained) if trained.get("by_source") else "",
        "by_rating": [{"rating": r} | {name: column.get(r) for name, column in columns.items()} for r in ratings],
    }


def _measured(output_dir: Path, name: str) -> dict[str, Any] | None:
    """A policy's table by `rlhf/evaluate_gatt.py`, from a folder of its own or as the baseline of the other."""
    for folder, key in ((f"gatt_{name}", "trained"), ("gatt_trained", name)):
        if table := (read_json(output_dir / folder) or {}).get(key):
            return table
    return None


def _persistence(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{"1": share, ..., "ci95": {turn: [low, high]}, "dialogues", "unseen": {the same}}."""
    if measured is None:
        return None
    kept = {key: value for key, value in measured.items() if key.isdigit()}
    kept |= {key: measured[key] for key in ("ci95", "dialogues") if key in measured}
    return kept | ({"unseen": _persistence(measured["unseen"])} if measured.get("unseen") else {})


def _comparison(output_dir: Path, before: str, after: str, greedy: bool) -> dict[str, Any] | None:
    """Gold helpfulness `after` minus `before` over the same prompts (mean over a prompt's samples), paired bootstrap.

    None where a stage was not evaluated with gold scores, or on other prompts than its partner.
    """
    key = "gold_helpfulness_greedy" if greedy else "gold_helpfulness"
    stages = [read_rows(output_dir / STAGES[name].evaluation, "responses.jsonl") for name in (before, after)]
    scored = [[(row["prompt"], row[key]) for row in rows if row.get(key)] for rows in stages]
    if not scored[0] or [prompt for prompt, _ in scored[0]] != [prompt for prompt, _ in scored[1]]:
        return None
    means = [[fmean(gold) for _, gold in rows] for rows in scored]
    difference, interval = paired_bootstrap(means[0], means[1])
    return {
        "before": before,
        "after": after,
        "decoding": "greedy" if greedy else "temperature 1",
        "difference": round(difference, 4),
        "ci95": [round(x, 4) for x in interval],
        "prompts": len(means[0]),
    }
