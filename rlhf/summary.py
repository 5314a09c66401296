"""What a whole run of the recipe measured, read from its stage folders: figures, paired comparisons, goals.

No model is run here: `rlhf/evaluate_policy.py`, `rlhf/train_reward.py` and `rlhf/evaluate_gatt.py` wrote the figures.
A folder that is missing leaves its part None or out; a goal that cannot be checked counts as missed, with a note.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from configs.records import RATINGS
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
LATE_TURNS = range(6, 21)
ALL_TURNS = range(1, 21)


def build(output_dir: Path, wall_seconds: float) -> dict[str, Any]:
    """The content of `<output_dir>/summary.json`; finite numbers only."""
    summary: dict[str, Any] = {
        "wall_seconds": round(max(wall_seconds, active_seconds(output_dir)), 1),
        "stages": [figures for name in STAGES if (figures := _stage(output_dir, name))],
        "reward_models": {name: _reward_model(output_dir, name) for name in ("helpfulness", "safety")},
        "gatt": {name: _persistence(_measured(output_dir, name)) for name in ("baseline", "trained")},
        "held_out_families": {
            name: figures for name, folder in HELD_OUT_FAMILIES.items() if (figures := _families(output_dir / folder))
        },
        "distillation": _distillation(output_dir / "distil_safety"),
        "gates": [gate for path in sorted(output_dir.glob("gate_*/verdict.json")) if (gate := _gate(path.parent))],
        "comparisons": [c for row in COMPARISONS if (c := _comparison(output_dir, *row))],
    }
    summary["goals"] = goals(summary, ppo_gold_during_run(output_dir))
    return finite(summary)


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


def _reward_model(output_dir: Path, name: str) -> dict[str, Any] | None:
    trained = read_json(output_dir / f"reward_{name}")
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


def ppo_gold_during_run(output_dir: Path) -> dict[str, Any] | None:
    """Gold helpfulness on held-out prompts as PPO went: {"steps", "gold", "kept": of the policy that PPO handed over}.

    None where `ppo/metrics.jsonl` has no `eval/gold_helpfulness`.
    """
    rows = read_rows(output_dir / "ppo", "metrics.jsonl")
    measured = {
        row["step"]: row["eval/gold_helpfulness"] for row in rows if row.get("eval/gold_helpfulness") is not None
    }
    if not measured:
        return None
    last, best = max(measured), (read_json(output_dir / "ppo") or {}).get("best") or {}
    kept = best.get("step") if read_settings(output_dir / "ppo").get("save_best") else last
    return {"steps": list(measured), "gold": list(measured.values()), "kept": measured.get(kept, measured[last])}


def goals(summary: Mapping[str, Any], ppo_gold: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every goal of the demo with what was measured: {"goal", "value", "target", "met"} and, where needed, "note"."""
    stage = {row["name"]: row for row in summary["stages"]}
    compared = {(c["before"], c["after"], c["decoding"]): c for c in summary["comparisons"]}
    found: list[dict[str, Any]] = []

    def add(goal: str, value: Any, target: str, met: bool, note: str = "") -> None:
        note = note or ("not measured" if value is None else "")
        shown = [round(x, 4) for x in value] if isinstance(value, list) else value if value is None else round(value, 4)
        row = {"goal": goal, "value": shown, "target": target, "met": bool(met and value is not None)}
        found.append(row | ({"note": note} if note else {}))

    def at_most(goal: str, value: float | None, limit: float, note: str = "") -> None:
        add(goal, value, f"at most {limit:g}", value is not None and value <= limit + 1e-9, note)

    def at_least(goal: str, value: float | None, limit: float, note: str = "") -> None:
        add(goal, value, f"at least {limit:g}", value is not None and value >= limit - 1e-9, note)

    def figure(name: str, key: str) -> float | None:
        return stage.get(name, {}).get(key)

    def gain(goal: str, before: str, after: str, decoding: str = "temperature 1") -> None:
        result = compared.get((before, after, decoding), {})
        low, high = result.get("ci95") or (0.0, 0.0)
        note = f"{low:+.3f} to {high:+.3f}" if result else ""
        add(goal, result.get("difference"), "interval above 0", low > 0, note)

    at_most("Seconds for the whole run", summary["wall_seconds"], 600)
    for name, model in summary["reward_models"].items():
        accuracy, ceiling = (model or {}).get("accuracy"), (model or {}).get("ceiling")
        share = accuracy / ceiling if accuracy is not None and ceiling else None
        at_least(f"{name.capitalize()} model: part of possible accuracy", share, 0.9)
        rising = [r["accuracy"] for r in reversed((model or {}).get("by_rating", [])) if r["accuracy"] is not None]
        steps = list(zip(rising, rising[1:], strict=False))
        add(
            f"{name.capitalize()} model: accuracy, weak to strong rating",
            rising or None,
            "rising",
            bool(steps) and all(weaker <= stronger for weaker, stronger in steps) and rising[0] < rising[-1],
        )
    gain("Helpfulness: rejection sampling over SFT", "sft", "rejection_sampling")
    gain("Helpfulness: PPO over rejection sampling", "rejection_sampling", "ppo")
    at_least("Helpfulness: PPO over SFT", compared.get(("sft", "ppo", "temperature 1"), {}).get("difference"), 0.10)
    gain("Helpfulness: PPO over SFT, greedy", "sft", "ppo", "greedy")
    drop = max(ppo_gold["gold"]) - ppo_gold["kept"] if ppo_gold else None
    at_most("Helpfulness: PPO's best moment less its end", drop, 0.02)

    unsafe, unsafe_after = figure("sft", "unsafe_rate"), figure("ppo", "unsafe_rate")
    add("Unsafe answers to risky requests, SFT", unsafe, "0.2 to 0.6", unsafe is not None and 0.2 <= unsafe <= 0.6)
    part = unsafe_after / unsafe if unsafe and unsafe_after is not None else None
    at_most("Unsafe answers, PPO as a part of SFT's", part, 0.25)
    at_most("Harmless requests refused, PPO", figure("ppo", "false_refusal_rate"), 0.05)
    at_most("Drift from SFT (KL, nats an answer), PPO", figure("ppo", "kl_nats"), 8)

    tables = summary["gatt"]
    trained, unseen = tables["trained"], (tables["trained"] or {}).get("unseen")
    at_most("GAtt: obeyed in turns 6 to 20, before", _over(tables["baseline"], LATE_TURNS, fmean), 0.3)
    at_least("GAtt: obeyed in turns 1 to 20, after", _over(trained, ALL_TURNS, fmean), 0.98)
    at_least("GAtt: obeyed in the worst of 20 turns, after", _over(trained, ALL_TURNS, min), 0.95)
    at_least("GAtt: turns 1 to 20, values never taught", _over(unseen, ALL_TURNS, fmean), 0.9)
    at_least("GAtt: dialogues measured", (trained or {}).get("dialogues"), 200)
    after = figure("gatt", "gold_helpfulness")
    low, high = (stage.get("ppo", {}).get("ci95") or {}).get("gold_helpfulness") or (None, None)
    if after is None or low is None or high is None:
        add("Helpfulness: GAtt inside PPO's interval", None, "PPO's interval", False)
    else:
        target = f"{low:.3f} to {high:.3f}"
        add("Helpfulness: GAtt inside PPO's interval", after, target, low <= after <= high)
    return found


def _over(table: Mapping[str, Any] | None, turns: range, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """`reduce` of the shares obeyed over `turns`; None unless every turn was measured."""
    shares = [share for turn in turns if (share := (table or {}).get(str(turn))) is not None]
    return reduce(shares) if len(shares) == len(turns) else None
