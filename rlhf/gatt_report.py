"""What a build of Ghost Attention dialogues gave: its summary and the data set card [pure]."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gatt.synth import Dialogue, obedience_by_turn
from rlhf.gatt_plans import GATT, INSTRUCTED, PLAIN, REPLAY


def summarise(rows: Sequence[dict[str, Any]], replayed: int) -> dict[str, Any]:
    """Counts over all shards: rows by source, what was cut and why, obedience by turn before any selection."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["counts"])
    kept = [row["record"] for row in rows if row["record"]]
    marks = [row["first_draft_obeyed"] for row in rows if row["source"] == GATT]
    sampled = [Dialogue(plan=None, first_draft_obeyed=m) for m in marks]  # type: ignore[arg-type]
    return {
        "rows": len(kept) + replayed,
        "rows_by_source": dict(Counter(r["source"] for r in kept)) | ({REPLAY: replayed} if replayed else {}),
        "rows_by_kind": dict(Counter(r["instruction"]["kind"] for r in kept if r["instruction"])),
        "rows_with_change": sum("change" in r for r in kept),
        "rows_by_turns": dict(sorted(Counter(sum(m["role"] == "user" for m in r["messages"]) for r in kept).items())),
        **total,
        "rows_refused": dict(Counter(row["refused"] for row in rows if row["refused"])),
        "exchanges_left_out": sum(row["exchanges_left_out"] for row in rows),
        "first_draft_obedience": obedience_by_turn(sampled),
    }


def dataset_card(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    """README.md of the data set: what the rows are, how they were made, how to train on them."""
    obedience = summary["first_draft_obedience"]
    table = "\n".join(f"| {turn} | {share:.3f} |" for turn, share in obedience.items())
    shown = "\n".join(f"- `{name}`: {value}" for name, value in sorted(settings.items()))
    listed = "\n".join(f"- {name}: {value}" for name, value in summary.items() if name != "first_draft_obedience")
    return f"""---
tags: [ghost-attention, sft, conversational, synthetic]
task_categories: [text-generation]
---
# Ghost Attention dialogues

Dialogues in which an instruction of the first turn holds to the end (Llama 2 paper, section 3.3). Replies were sampled
from `{settings["model_name_or_path"]}` with the instruction on every user turn; a row keeps it in its first turn only.

One JSON object a line in `gatt.jsonl`:

- `messages`: conversational, as TRL's SFTTrainer reads it (with `assistant_only_loss=True`);
- `train_on`: `all` (loss on every reply) or `last` (on the last reply only; for TRL, split it off as `completion`);
- `instruction`: kind, value, both wordings, the wording and slot used, and the `parts` of a combination; null in plain
  rows;
- `change`, in rows whose instruction changes: the user turn (from 1) that names the new one, and the new one;
- `source`: `{GATT}`; `{INSTRUCTED}`, single turns of that policy; `{PLAIN}`, its single turns and dialogues without an
  instruction; `{REPLAY}`, mixed in.

A trainer that shortens dialogues must not drop their first turn: it holds the instruction. No sampled row exceeds
{settings["max_length"]} tokens in the chat format it was made with.

## Measured

Share of first drafts that obeyed while sampling, by turn, before any selection:

| turn | obeyed |
|---|---|
{table}

{listed}

## Settings

{shown}
"""
