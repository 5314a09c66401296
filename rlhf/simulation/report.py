"""The demo's report: that of any run (rlhf/report.py), and whether the simulated world's goals were met.

The goals are the demo's own, set for its sizes; a goal that cannot be checked counts as missed, with a note.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from rlhf import report
from rlhf.summary import read_json, read_rows, read_settings

LATE_TURNS = range(6, 21)
ALL_TURNS = range(1, 21)


def write(output_dir: Path, wall_seconds: float, console: Console) -> dict[str, Any]:
    """`rlhf.report.write` with the demo's goals."""
    return report.write(
        output_dir, wall_seconds, console, lambda summary: goals(summary, ppo_gold_during_run(output_dir))
    )


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
