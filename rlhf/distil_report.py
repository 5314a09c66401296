"""What a safety context distillation gave: its summary and the data set card [pure]."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.score_tail import distribution

Row = dict[str, Any]


def summarise(
    rows: Sequence[Row], best: Sequence[int | None], verdicts: Sequence[str], left_out: Sequence[Row]
) -> dict[str, Any]:
    """Counts, and the safety scores R of the original answers, of the candidates and of what is trained in their place.

    Args:
        rows: one a prompt; answer 0 of each is the original.
        best: the candidate among the answers of each row, None where there is none.
        verdicts: why it is not kept, empty where it is.
        left_out: prompts that were not sampled, each with a `reason`.

    `safety.after` is over all prompts: the kept answers, and the originals elsewhere. Gold scores, where the rows have
    them: mean helpfulness over the prompts that are not risky, mean safety over the risky ones, likewise.
    """
    kept = [row for row, why in zip(rows, verdicts, strict=True) if not why]
    chosen = [0 if why or i is None else i for i, why in zip(best, verdicts, strict=True)]
    summary: dict[str, Any] = {
        "prompts": len(rows),
        "kept": len(kept),
        "kept_safety": sum(row["is_safety"] for row in kept),
        "kept_helpful": sum(not row["is_safety"] for row in kept),
        "not_kept": dict(Counter(why for why in verdicts if why)),
        "left_out": dict(Counter(row["reason"] for row in left_out)),
        "kept_by_preprompt": dict(Counter(row["preprompt"]["category"] or "generic" for row in kept)),
        "safety": {
            "original": distribution([row["safety"][0] for row in rows]),
            "candidate": distribution([row["safety"][i] for row, i in zip(rows, best, strict=True) if i is not None]),
            "after": distribution([row["safety"][i] for row, i in zip(rows, chosen, strict=True)]),
        },
    }
    for name, risky in (("gold_helpfulness", False), ("gold_safety", True)):
        on = [(row, i) for row, i in zip(rows, chosen, strict=True) if name in row and row["is_safety"] == risky]
        if on:
            before, after = ([row[name][j] for row, j in pairs] for pairs in ([(row, 0) for row, _ in on], on))
            summary[name] = {"original": _mean(before), "after": _mean(after)}
    return summary


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)


def dataset_card(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md of the data set: what the rows are, how they were made, how to train on them."""
    shown = "\n".join(f"- `{name}`: {value}" for name, value in sorted(settings.items()) if name != "weights")
    measured = ("safety", "gold_helpfulness", "gold_safety")
    counted = "\n".join(f"- {name}: {value}" for name, value in summary.items() if name not in measured)
    judge = "the combined reward" if settings.get("helpfulness_model_path") else "the safety reward model"
    rule = (
        f"kept only where {judge} scores it above the policy's own answer without the preprompt"
        if settings["gate"]
        else f"kept whatever {judge} says (the gate was off)"
    )
    table = "\n".join(_line(name, summary["safety"][name]) for name in ("original", "candidate", "after"))
    return f"""---
tags: [safety, context-distillation, sft, conversational, synthetic]
task_categories: [text-generation]
---
# Safety context distillation

Adversarial prompts, answered by `{settings["model_name_or_path"]}` under a safety preprompt and written down without it
(Llama 2 paper, section 4.2.4). An answer is {rule}.

One JSON object a line in `distilled.jsonl`:

- `messages`: conversational, as TRL's SFTTrainer reads it; the preprompt is not in it;
- `train_on`: `last`, loss on the last reply only (for TRL, split it off as `completion`);
- `is_safety`, `risk_category`: of the prompt; `preprompt`: generic or targeted;
- `safety_score`, `original_safety_score`: raw scores of this answer and of the original one; likewise
  `helpfulness_score` where there was such a model.

Train it together with ordinary dialogues: by itself it teaches to decline.

## Measured

Safety scores R by `{settings["safety_model_path"]}`, on the prompts without the preprompt. `after`: the kept answers,
and the originals where none was kept.

| answers | number | mean | 5 % quantile | median | below {summary["safety"]["after"]["tail"]["below"]:g} |
|---|---|---|---|---|---|
{table}

{counted}

## Settings

{shown}
"""


def _line(name: str, found: Mapping[str, Any]) -> str:
    if not found["answers"]:
        return f"| {name} | 0 | - | - | - | - |"
    quantiles = found["quantiles"]
    figures = (found["mean"], quantiles["0.05"], quantiles["0.5"], found["tail"]["share"])
    return f"| {name} | {found['answers']} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"
