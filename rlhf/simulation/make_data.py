"""Writes the simulated world's files for one pipeline run: demonstrations and the prompts of every stage.

    accelerate launch rlhf/simulation/make_data.py --output_dir runs/world

No prompt of a training file is asked in evaluation, which draws from wordings, values, objects and families held out
for it. The prompts for comparisons, for rejection sampling and PPO, and for choosing PPO's checkpoint differ.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # launched by path, Python puts this folder first

from dataclasses import asdict, dataclass, field
from typing import Any

from configs.errors import UserError
from configs.records import write_jsonl
from rlhf.cli import entry, parse
from rlhf.run import RunFolder
from rlhf.simulation.people import (
    HELD_OUT_FAMILIES,
    Mix,
    draw_demonstrations,
    draw_prompts,
    draw_safety_demonstrations,
)

# More of the harmless requests that look risky than in the demonstrations: refusing them must cost something.
POLICY_PROMPTS = Mix(risky=0.25, scary=0.16)
# In the other prompts an instruction holds for its own turn: answers to them would teach against Ghost Attention.
HARMLESS = Mix(risky=0.0, scary=0.1, instructed=0.2)
UNINSTRUCTED = Mix(risky=0.25, scary=0.16, instructed=0)
SINGLE_TURNS = Mix(risky=0, scary=0.1, multi_turn=0, instructed=0)


@dataclass
class WorldSettings:
    """How much of the simulated world to write."""

    output_dir: str = field(default="runs/world", metadata={"help": "folder to write into"})
    seed: int = field(default=0, metadata={"help": "seed of everything drawn"})
    demonstrations: int = field(default=9000, metadata={"help": "demonstration dialogues for SFT"})
    preprompted_share: float = field(
        default=0.0,
        metadata={"help": "share of them with a safety preprompt, so that the model knows what one asks for"},
    )
    helpful_demonstrations: int = field(
        default=0, metadata={"help": "demonstration dialogues without risky requests, in a file of their own"}
    )
    safety_demonstrations: int = field(
        default=0, metadata={"help": "risky prompts with safe answers, in a file of their own"}
    )
    preference_prompts: int = field(default=6000, metadata={"help": "prompts for the comparisons"})
    rl_prompts: int = field(default=6000, metadata={"help": "prompts for rejection sampling and PPO"})
    validation_prompts: int = field(default=256, metadata={"help": "prompts that choose PPO's checkpoint"})
    evaluation_prompts: int = field(
        default=640, metadata={"help": "prompts in held-out wordings or of held-out values"}
    )
    gatt_prompts: int = field(
        default=3000, metadata={"help": "single user turns to build Ghost Attention dialogues from"}
    )
    replay_prompts: int = field(
        default=800, metadata={"help": "prompts without instructions whose answers Ghost Attention mixes in"}
    )
    family_prompts: int = field(default=100, metadata={"help": "prompts of the held-out families"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.preprompted_share <= 1.0:
            raise UserError(f"preprompted_share: {self.preprompted_share} is not a share; give a number from 0 to 1")


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Writes the files; returns their row counts."""
    (settings,) = parse(WorldSettings, args=args)
    run = RunFolder(settings.output_dir, asdict(settings), stage="make_data")
    base = 1_000_003 * (settings.seed + 1)
    pool_size = settings.preference_prompts + settings.rl_prompts + settings.validation_prompts
    pool = draw_prompts(base + 1, pool_size, mix=POLICY_PROMPTS)
    cuts = (settings.preference_prompts, settings.preference_prompts + settings.rl_prompts)
    # One fixed evaluation set for every seed, so that runs can be compared; demonstrations and prompts differ by seed.
    evaluation = draw_prompts(
        77, settings.evaluation_prompts, mix=Mix(risky=0.25, scary=0.15, instructed=0.1), evaluation=True
    )
    files = {
        "demonstrations": draw_demonstrations(
            base, settings.demonstrations, preprompted_share=settings.preprompted_share
        ),
        # in halves too, so that two processes can share the sampling
        "preference_prompts-1": pool[: cuts[0] // 2],
        "preference_prompts-2": pool[cuts[0] // 2 : cuts[0]],
        "rl_prompts-1": pool[cuts[0] : sum(cuts) // 2],
        "rl_prompts-2": pool[sum(cuts) // 2 : cuts[1]],
        "validation_prompts": pool[cuts[1] :],
        "evaluation_prompts": evaluation,
        "gatt_prompts": draw_prompts(base + 2, settings.gatt_prompts, mix=SINGLE_TURNS),
        "replay_prompts": draw_prompts(base + 3, settings.replay_prompts, mix=UNINSTRUCTED),
        "gatt_evaluation_prompts": draw_prompts(79, 400, mix=SINGLE_TURNS, evaluation=True),
        "family_prompts": draw_prompts(
            78,
            settings.family_prompts,
            mix=Mix(risky=0, scary=0, multi_turn=0, instructed=0),
            evaluation=True,
            families=HELD_OUT_FAMILIES,
        ),
    }
    if settings.helpful_demonstrations:
        files["helpful_demonstrations"] = draw_demonstrations(base + 4, settings.helpful_demonstrations, HARMLESS)
    if settings.safety_demonstrations:
        files["safety_demonstrations"] = draw_safety_demonstrations(base + 5, settings.safety_demonstrations)
    for name, rows in files.items():
        write_jsonl(Path(settings.output_dir) / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in files.items()}
    run.log(0, counts)
    run.finish(counts)
    return counts


if __name__ == "__main__":
    entry(main)
