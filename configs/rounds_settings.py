"""Settings of rounds of rejection sampling: `rlhf/rounds.py` and the two stages of its own that pool earlier rounds."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from configs.errors import UserError

BLOCKS = (
    *("collect_preferences", "reward_helpfulness", "reward_safety", "rejection_sampling", "pool_samples", "sft"),
    *("evaluate_policy", "student_sft"),
)
RETRAINING = ("collect_preferences", "reward_helpfulness", "reward_safety")  # blocks from retrain_from_round on
# Fields of PoolSettings that only scoring anew uses.
ONLY_RESCORED = ("helpfulness_model_path", "safety_model_path", "safety_threshold", "chat_format", "dtype",
                 "score_token_budget")  # fmt: skip
Block = dict[str, Any]


def _block(words: str) -> Any:
    return field(default_factory=dict, metadata={"help": words})


@dataclass(kw_only=True)
class RoundsSettings:
    """What is sampled, trained and evaluated in every round. A block holds fields of the script it is named after."""

    output_dir: str = field(metadata={"help": "folder that gets one folder a round: v1, v2, ..."})
    rounds: int = field(default=3, metadata={"help": "rounds in all; raised later, the run continues"})
    seed: int = field(default=0, metadata={"help": "seed of the run, as ${seed}; each round samples with its own"})
    parallel_stages: int = field(
        default=1, metadata={"help": "stages that may run at once (forked processes, CPU only)"}
    )
    base_model_path: str = field(metadata={"help": "model that every round is fine-tuned from"})
    policy_path: str = field(metadata={"help": "model that round 1 samples from, usually the SFT model"})
    pool: Literal["all", "last"] = field(
        default="all", metadata={"help": "fine-tune on the best of all rounds so far, or of the last one only"}
    )
    helpfulness_model_path: str = field(
        default="", metadata={"help": "helpfulness reward model until one is trained in a round"}
    )
    safety_model_path: str = field(default="", metadata={"help": "safety reward model until one is trained in a round"})
    retrain_from_round: int = field(
        default=0,
        metadata={"help": "from this round on, collect preferences and train both reward models anew first; 0: never"},
    )
    preference_dirs: list[str] = field(
        default_factory=list, metadata={"help": "folders of rlhf/collect_preferences.py that were made before round 1"}
    )
    student_model_path: str = field(
        default="", metadata={"help": "smaller model that is fine-tuned on the same pool in each round; empty: none"}
    )
    student_layers: int = field(
        default=0,
        metadata={"help": "of the student only its first so many layers (where there is no small one); 0: all"},
    )
    rejection_sampling: Block = _block("fields of rlhf/rejection_sampling.py")
    pool_samples: Block = _block("fields of rlhf/pool_samples.py")
    sft: Block = _block("fields of rlhf/sft.py; train_files by default the pool alone: [${pool}]")
    evaluate_policy: Block = _block("fields of rlhf/evaluate_policy.py")
    student_sft: Block = _block("fields of rlhf/sft.py that differ for the student")
    collect_preferences: Block = _block("fields of rlhf/collect_preferences.py")
    reward_helpfulness: Block = _block("fields of rlhf/train_reward.py; ${pairs} is the folder of all preferences")
    reward_safety: Block = _block("the same for the safety model")
    by_round: dict[Any, Any] = field(
        default_factory=dict, metadata={"help": "{round: {block: fields}} that differ in one round"}
    )

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("parallel_stages", 1), ("retrain_from_round", 0), ("student_layers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.retrain_from_round != 1 and not (self.helpfulness_model_path and self.safety_model_path):
            raise UserError(
                "helpfulness_model_path and safety_model_path are needed for round 1; name both, or set "
                "retrain_from_round: 1 to train them in it"
            )
        if self.student_layers and not self.student_model_path:
            raise UserError("student_layers is set, but student_model_path names no model")
        if self.student_sft and not self.student_model_path:
            raise UserError("student_sft is set, but student_model_path names no model")
        if not self.retrain_from_round:
            unused = [name for name in (*RETRAINING, "preference_dirs") if getattr(self, name)]
            if unused:
                raise UserError(f"{', '.join(unused)}: without effect as long as retrain_from_round is 0")
        seen: dict[int, Any] = {}
        for key, blocks in self.by_round.items():
            if not str(key).isdigit() or int(key) < 1:
                raise UserError(f"by_round: {key!r} is no round; its keys are 1, 2, ...")
            if int(key) in seen:
                raise UserError(f"by_round: {seen[int(key)]!r} and {key!r} are the same round; put them together")
            seen[int(key)] = key
            if not isinstance(blocks, dict) or not all(isinstance(block, dict) for block in blocks.values()):
                raise UserError(f"by_round: {key} must hold blocks of fields, such as rejection_sampling: {{...}}")
            if unknown := blocks.keys() - set(BLOCKS):
                raise UserError(f"by_round: {key} has unknown blocks {sorted(unknown)}; use {', '.join(BLOCKS)}")
            trained = self.retrain_from_round and int(key) >= self.retrain_from_round
            if not trained and (unused := [name for name in RETRAINING if name in blocks]):
                raise UserError(
                    f"by_round: {key}: {', '.join(unused)}: without effect, as retrain_from_round is "
                    f"{self.retrain_from_round}"
                )
            if "student_sft" in blocks and not self.student_model_path:
                raise UserError(f"by_round: {key}: student_sft is set, but student_model_path names no model")

    def block(self, name: str, number: int) -> Block:
        """The fields of a block in round `number` (from 1)."""
        own: dict[str, Block] = next((blocks for key, blocks in self.by_round.items() if int(key) == number), {})
        return getattr(self, name) | own.get(name, {})


@dataclass(kw_only=True)
class PoolSettings:
    """Which of the rounds' selected samples are fine-tuned on."""

    sample_files: list[str] = field(
        metadata={"help": "best.jsonl of rlhf/rejection_sampling.py, one a round, the oldest first"}
    )
    pool: Literal["all", "last"] = field(default="all", metadata={"help": "the samples of all rounds, or of the last"})
    per_prompt: int = field(default=1, metadata={"help": "the best so many responses to one prompt; 0: all"})
    rank_by: Literal["score", "rescored", "newest"] = field(
        default="score",
        metadata={
            "help": "which response is the best: by the scores in the files (of one pair of reward models), by scores "
            "made anew with helpfulness_model_path and safety_model_path, or that of the latest round"
        },
    )
    round_shares: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "share drawn of each round's samples, the newest round first; the last counts for all older"},
    )
    helpfulness_model_path: str = field(default="", metadata={"help": "for rescored: the newest helpfulness model"})
    safety_model_path: str = field(default="", metadata={"help": "for rescored: the newest safety model"})
    safety_threshold: float = field(default=0.15, metadata={"help": "R_s below which safety decides the reward"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "for rescored; auto: the tokenizer's own template, or Llama 2's format"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "for rescored: type of the reward models' weights"}
    )
    score_token_budget: int = field(
        default=0, metadata={"help": "tokens of one scoring batch, padding included; 0: 8192 on a GPU, 768 on a CPU"}
    )
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})

    def __post_init__(self) -> None:
        if not self.sample_files:
            raise UserError("sample_files: name the best.jsonl of at least one round")
        if twice := [file for i, file in enumerate(self.sample_files) if file in self.sample_files[:i]]:
            raise UserError(f"sample_files: {twice[0]} is there twice")
        if self.per_prompt < 0:
            raise UserError(f"per_prompt must not be negative, not {self.per_prompt}; 0 keeps all")
        if not self.round_shares or not all(0.0 <= share <= 1.0 for share in self.round_shares):
            raise UserError(f"round_shares must be shares from 0 to 1, newest round first, not {self.round_shares}")
        if self.round_shares[0] == 0.0:
            raise UserError("round_shares: the first is the newest round's; it must be above 0")
        if not 0.0 < self.safety_threshold < 1.0:
            raise UserError(f"safety_threshold is a probability in (0, 1), not {self.safety_threshold}")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
        named = bool(self.helpfulness_model_path) + bool(self.safety_model_path)
        if self.rank_by == "rescored" and named < 2:
            raise UserError("rank_by: rescored needs helpfulness_model_path and safety_model_path")
        if self.rank_by != "rescored":
            given = {one.name: one.default for one in fields(self) if one.name in ONLY_RESCORED}
            if idle := [name for name, default in given.items() if getattr(self, name) != default]:
                raise UserError(
                    f"{', '.join(idle)}: no effect with rank_by: {self.rank_by}; leave out, or use rescored"
                )
        if self.score_token_budget < 0:
            raise UserError(f"score_token_budget must not be negative, not {self.score_token_budget}")
        if self.pool == "last" and len(self.round_shares) > 1:
            raise UserError(
                f"round_shares: with pool: last only the newest round counts, so {self.round_shares[1:]} would have no "
                "effect; give one share"
            )


@dataclass(kw_only=True)
class PairsSettings:
    """Preferences of several collections as one folder."""

    preference_dirs: list[str] = field(metadata={"help": "folders of rlhf/collect_preferences.py, the oldest first"})

    def __post_init__(self) -> None:
        if not self.preference_dirs:
            raise UserError("preference_dirs: name at least one folder of rlhf/collect_preferences.py")
