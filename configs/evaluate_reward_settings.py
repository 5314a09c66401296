"""Settings of `rlhf/evaluate_reward.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from configs.row_files import source_name


@dataclass(frozen=True)
class ModelToEvaluate:
    """One reward model of an evaluation: its name in the tables, its path, and how it reads a dialogue."""

    name: str
    path: str
    input_format: str


@dataclass
class EvaluateRewardSettings:
    """Which reward models, on which preference pairs."""

    output_dir: str = field(metadata={"help": "run folder"})
    eval_files: list[str] = field(metadata={"help": "test files of preference records, or Hub names"})
    helpfulness_model_path: str = field(default="", metadata={"help": "helpfulness reward model: folder or Hub name"})
    safety_model_path: str = field(default="", metadata={"help": "safety reward model: folder or Hub name"})
    other_model_paths: list[str] = field(
        default_factory=list,
        metadata={"help": "any other sequence-classification reward models to compare with, such as a DeBERTa"},
    )
    other_model_names: list[str] | None = field(
        default=None, metadata={"help": "their names in the tables; none: the names of their folders"}
    )
    input_format: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "auto, chat (this toolkit's chat format), template (the tokenizer's own, as it stands) or "
            "text_pair (prompt, response): one for all models, or one each in the order helpfulness, safety, others"
        },
    )
    test_set_names: list[str] | None = field(
        default=None,
        metadata={"help": "one a file; files of one name are taken together. None: file names without their endings"},
    )
    split: str = field(default="test", metadata={"help": "split of Hub data sets"})
    max_pairs: int = field(default=0, metadata={"help": "use the first so many pairs of each file; 0: all"})
    max_length: int = field(
        default=4096,
        metadata={"help": "tokens per dialogue, or fewer where a model takes fewer; oldest turns are dropped"},
    )
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    safety_threshold: float = field(
        default=0.15, metadata={"help": "R_s below which a response counts as unsafe, as in PPO; 0.5 is reported too"}
    )
    num_samples: int = field(default=20, metadata={"help": "pairs or responses of each kind in samples.jsonl"})
    pairs_per_shard: int = field(default=512, metadata={"help": "pairs between two writes: what a kill can lose"})
    score_token_budget: int = field(
        default=0, metadata={"help": "tokens of one scoring batch, padding included; 0: 8192 on a GPU, 768 on a CPU"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 for decoders on a GPU (head in float32), else float32"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2; decoders"})
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU"})

    def __post_init__(self) -> None:
        if not self.eval_files:
            raise UserError("eval_files: name at least one file of preference pairs")
        if not (self.helpfulness_model_path or self.safety_model_path or self.other_model_paths):
            raise UserError("helpfulness_model_path, safety_model_path or other_model_paths: name a reward model")
        for name in ("max_length", "pairs_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_pairs", "num_samples", "score_token_budget"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
        if not 0.0 < self.safety_threshold < 1.0:
            raise UserError(f"safety_threshold is a probability in (0, 1), not {self.safety_threshold}")
        self._check_count("test_set_names", self.test_set_names, self.eval_files, "eval_files")
        self._check_count("other_model_names", self.other_model_names, self.other_model_paths, "other_model_paths")
        names = [model.name for model in self.models()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"other_model_names: two models are called {', '.join(repeated)}; give each a name of its own"
            )
        if len(set(self.eval_files)) < len(self.eval_files):
            raise UserError("eval_files: a file is named twice")

    def models(self) -> list[ModelToEvaluate]:
        """The models in the order of the tables: helpfulness, safety, others."""
        names = self.other_model_names or [_folder_name(path) for path in self.other_model_paths]
        named = [("helpfulness", self.helpfulness_model_path), ("safety", self.safety_model_path)]
        named = [(name, path) for name, path in named if path]
        named += list(zip(names, self.other_model_paths, strict=True))
        formats = self.input_format * len(named) if len(self.input_format) == 1 else self.input_format
        if len(formats) != len(named):
            raise UserError(f"input_format: {len(formats)} for {len(named)} models; give one, or one each")
        return [ModelToEvaluate(name, path, form) for (name, path), form in zip(named, formats, strict=True)]

    def test_sets(self) -> list[tuple[str, str]]:
        """(file, name of its test set), in the order of `eval_files`."""
        names = self.test_set_names or [source_name(file) for file in self.eval_files]
        return list(zip(self.eval_files, names, strict=True))

    @staticmethod
    def _check_count(name: str, values: list[str] | None, items: list[str], of: str) -> None:
        if values is not None and len(values) != len(items):
            raise UserError(f"{name}: {len(values)} names for {len(items)} {of}; give one each")


def _folder_name(path: str) -> str:
    """The last part of a path, or the one before it for train_reward.py's `<run folder>/model`."""
    folder = Path(path)
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name
