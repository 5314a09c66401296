"""Settings of `rlhf/evaluate_safety.py`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from configs.scoring_settings import LLAMA2_THRESHOLD

JUDGES = ("none", "safety_model", "simulated", "ratings")


@dataclass
class EvaluateSafetySettings:
    """What to evaluate: a policy or finished responses, a red-team log, the refusal detector; any of these together."""

    output_dir: str = field(metadata={"help": "run folder"})
    model_name_or_path: str = field(default="", metadata={"help": "policy to sample from; empty: responses_files"})
    prompt_files: list[str] = field(
        default_factory=list,
        metadata={"help": "prompt records for the policy; is_safety, risk_category and attack_vector are used"},
    )
    xstest_files: list[str] = field(
        default_factory=list, metadata={"help": "prompts in the format of XSTest (prompt, type, label) for the policy"}
    )
    responses_files: list[str] = field(
        default_factory=list,
        metadata={"help": "finished responses instead of a policy: rows with prompt and responses, as ours are"},
    )
    violation_by: Literal["none", "safety_model", "simulated", "ratings"] = field(
        default="none",
        metadata={
            "help": "what says that a response to a risky prompt is unsafe: safety_model (R below safety_threshold), "
            "simulated (the simulated world's true score), ratings (people's, 1 to 5, in responses_files); none"
        },
    )
    safety_model_path: str = field(default="", metadata={"help": "safety reward model, for violation_by: safety_model"})
    safety_threshold: float = field(
        default=LLAMA2_THRESHOLD, metadata={"help": "R below which a response counts as a violation"}
    )
    min_crossed_prompts: int = field(
        default=20, metadata={"help": "prompts that two groupings must share for a figure of their own"}
    )
    red_team_log: str = field(
        default="", metadata={"help": "attempts of people to break the model: docs say the fields"}
    )
    releases: list[str] = field(
        default_factory=list, metadata={"help": "order of the log's releases; none: as they first appear"}
    )
    refusal_labels_files: list[str] = field(
        default_factory=list,
        metadata={"help": 'rows {"response", "refusal": true or false} to measure the detector on'},
    )
    before_dir: str = field(
        default="", metadata={"help": "finished run folder of this script, of an earlier policy, to compare with"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the samples; 0 is greedy"})
    top_p: float = field(default=1.0, metadata={"help": "smallest set of tokens with this mass is sampled from"})
    samples_per_prompt: int = field(default=1, metadata={"help": "responses to each prompt"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are refused by the reader"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response"})
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto takes the type the weights were saved in"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the samples"})
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU"})

    def __post_init__(self) -> None:
        if self.violation_by not in JUDGES:
            raise UserError(f"violation_by: {self.violation_by!r} is none of {', '.join(JUDGES)}")
        self._check_inputs()
        self._check_judge()
        if not 0.0 < self.safety_threshold < 1.0:
            raise UserError(f"safety_threshold is a probability in (0, 1), not {self.safety_threshold}")
        for name in ("samples_per_prompt", "max_prompt_tokens", "min_crossed_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share is {self.max_reject_share}; it must be in [0, 1)")
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise UserError(
                f"samples_per_prompt: {self.samples_per_prompt} greedy responses would be one and the same; "
                "set it to 1, or temperature above 0"
            )
        _ = self.sampling  # checks the rest

    @property
    def sampling(self) -> SamplingSettings:
        """How the policy is sampled."""
        return SamplingSettings(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)

    @property
    def has_responses(self) -> bool:
        """Whether there is a policy or responses to evaluate, not only a log or labels."""
        return bool(self.model_name_or_path or self.responses_files)

    def _check_inputs(self) -> None:
        """UserError where nothing is to be evaluated, or an input would be ignored."""
        prompts = [*self.prompt_files, *self.xstest_files]
        if self.model_name_or_path and self.responses_files:
            raise UserError("model_name_or_path and responses_files: give a policy or finished responses, not both")
        if self.model_name_or_path and not prompts:
            raise UserError("prompt_files or xstest_files: name at least one for the policy to answer")
        if prompts and not self.model_name_or_path:
            raise UserError("model_name_or_path: prompt_files and xstest_files need a policy that answers them")
        if not (self.has_responses or self.red_team_log or self.refusal_labels_files):
            raise UserError(
                "nothing to evaluate: give model_name_or_path with prompt_files or xstest_files, or responses_files, "
                "red_team_log or refusal_labels_files"
            )
        of_sampling = ("temperature", "top_p", "samples_per_prompt", "max_new_tokens", "max_prompt_tokens")
        defaults = {each.name: each.default for each in fields(self)}
        idle = [name for name in of_sampling if getattr(self, name) != defaults[name]]
        if idle and not self.model_name_or_path:
            raise UserError(f"{', '.join(idle)}: no effect without model_name_or_path, as nothing is sampled")
        if self.releases and not self.red_team_log:
            raise UserError("releases: there is no red_team_log whose releases they order")
        if self.before_dir and Path(self.before_dir).resolve() == Path(self.output_dir).resolve():
            raise UserError("before_dir: it is output_dir, which this run would write over; name another output_dir")
        if self.before_dir and not self.has_responses:
            raise UserError("before_dir: there are no responses to compare; give a policy or responses_files")

    def _check_judge(self) -> None:
        """UserError where what judges is not named, or is named and would be ignored."""
        if (self.violation_by == "safety_model") != bool(self.safety_model_path):
            raise UserError("safety_model_path and violation_by: safety_model go together")
        if self.violation_by != "safety_model" and self.safety_threshold != LLAMA2_THRESHOLD:
            raise UserError(
                f"safety_threshold: {self.safety_threshold} has no effect without violation_by: safety_model"
            )
        if self.violation_by == "ratings" and not self.responses_files:
            raise UserError("violation_by: ratings stand in responses_files; name such a file")
        if self.violation_by != "none" and not self.has_responses:
            raise UserError("violation_by: there are no responses to judge; give a policy or responses_files")
