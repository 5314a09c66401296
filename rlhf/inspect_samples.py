"""What is in the sample stores of a run folder, finished or not: a table for each store, or JSON.

    accelerate launch rlhf/inspect_samples.py --output_dir runs/llama2-7b/rejection-sampling
    accelerate launch rlhf/inspect_samples.py --output_dir runs/llama2-7b/rejection-sampling --as_json true

Reads only: it may run beside the processes that sample, and as a user who cannot write there. Every shard is read to
its end, so it finds the damaged ones. These, the missing ones and the failed prompts are what the stage will do when
its own command is started again.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from configs.inspect_samples_settings import InspectSamplesSettings
from rlhf.cli import entry, parse
from rlhf.store_summary import find_stores, store_summary

SHOWN_REASONS = 5  # of failures; the JSON has them all


def lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table of one store says, (name, figure)."""
    shards = ", ".join(f"{number:,} {state}" for state, number in summary["shards"].items() if number)
    found = [("shards", shards or "none"), ("items", f"{summary['items_done']:,} of {summary['items']:,}")]
    found += [("damaged", path) for path in summary["damaged_shards"]]
    reasons = list(summary["failed"].items())
    found += [("failed", f"{number:,} x {reason}") for reason, number in reasons[:SHOWN_REASONS]]
    if hidden := reasons[SHOWN_REASONS:]:
        found.append(("failed", f"{sum(number for _, number in hidden):,} for {len(hidden)} other reasons"))
    if summary["samples"]:
        ends = ", ".join(f"{number:,} {reason}" for reason, number in summary["finish_reasons"].items())
        found.append(("samples", f"{summary['samples']:,} ({ends})"))
    if summary["tokens"]:
        found.append(("tokens", f"{summary['tokens']:,}, {summary['tokens'] / summary['samples']:.1f} a sample"))
    found += [(f"mean {name}", f"{mean:.4f}") for name, mean in summary["mean_scores"].items()]
    found.append(("size", f"{summary['bytes'] / 2**20:.2f} MiB"))
    found += [(name, json.dumps(value, ensure_ascii=False)) for name, value in summary["settings"].items()]
    return found


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Prints what is in the stores; returns {"stores": [...]}, as the JSON has it."""
    (settings,) = parse(InspectSamplesSettings, args=args)
    folders = find_stores(settings.output_dir)
    found = [store_summary(folder) for folder in tqdm(folders, desc="stores", disable=len(folders) == 1)]
    if settings.as_json:
        print(json.dumps({"stores": found}, indent=2, ensure_ascii=False))
        return {"stores": found}
    console = Console()
    for summary in found:
        table = Table(box=box.SIMPLE_HEAD, title=f"store {summary['store']}", title_justify="left", show_header=False)
        for name, figure in lines(summary):
            table.add_row(name, escape(figure))
        console.print(table)
    return {"stores": found}


if __name__ == "__main__":
    entry(main)
