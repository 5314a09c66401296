"""Settings of `rlhf/fit_ensemble.py`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError
from configs.evaluate_reward_settings import EvaluateRewardSettings

FITTED, HELD_OUT = "fitted", "held_out"


@dataclass
class EnsembleSettings:
    """Two reward models, and the labelled pairs that their weights are fitted to and tested on."""

    output_dir: str = field(metadata={"help": "run folder"})
    helpfulness_model_path: str = field(metadata={"help": "helpfulness reward model: folder or Hub name"})
    safety_model_path: str = field(metadata={"help": "safety reward model: folder or Hub name"})
    fit_files: list[str] = field(
        metadata={"help": "preference records to fit on; not those that the models were trained on"}
    )
    eval_files: list[str] = field(metadata={"help": "preference records to test on, of other prompts"})
    l2: float = field(
        default=1e-3, metadata={"help": "penalty on the weights, in units of each model's r.m.s. score difference"}
    )
    max_pairs: int = field(default=0, metadata={"help": "use the first so many pairs of each file; 0: all"})
    max_length: int = field(default=4096, metadata={"help": "tokens per dialogue; oldest turns are dropped"})
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    split: str = field(default="train", metadata={"help": "split of Hub data sets"})
    pairs_per_shard: int = field(default=512, metadata={"help": "pairs between two writes: what a kill can lose"})
    score_token_budget: int = field(
        default=0, metadata={"help": "tokens of one scoring batch, padding included; 0: 8192 on a GPU, 768 on a CPU"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "auto: bfloat16 on a GPU"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2"})
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU"})

    def __post_init__(self) -> None:
        if not self.fit_files:
            raise UserError("fit_files: name at least one file of preference pairs")
        if both := sorted(set(self.fit_files) & set(self.eval_files)):
            raise UserError(f"eval_files: {', '.join(both)} is fitted on; the accuracy there would say nothing")
        for name in ("helpfulness_model_path", "safety_model_path"):
            if not getattr(self, name):
                raise UserError(f"{name}: name the folder of that reward model")
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise UserError(f"l2: {self.l2} is no penalty; give 0 or more")
        if not self.eval_files:
            raise UserError("eval_files: name at least one file of preference pairs")
        self.evaluation()

    def evaluation(self) -> EvaluateRewardSettings:
        """The evaluation of both models on all pairs, those to fit on as one test set and those held out as another."""
        shared = ("output_dir", "helpfulness_model_path", "safety_model_path", "max_pairs", "max_length", "split",
                  "max_reject_share", "pairs_per_shard", "score_token_budget", "dtype", "attn_implementation",
                  "use_cpu")  # fmt: skip
        return EvaluateRewardSettings(
            eval_files=[*self.fit_files, *self.eval_files],
            test_set_names=[FITTED] * len(self.fit_files) + [HELD_OUT] * len(self.eval_files),
            **{name: getattr(self, name) for name in shared},
        )
