"""Settings of `rlhf/write_instruction_values.py`."""

from dataclasses import dataclass, field

from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings


@dataclass(kw_only=True)
class InstructionValuesSettings(EngineSettings, SamplingSettings):
    """Lists of hobbies, figures and other values that the policy itself writes."""

    kinds: list[str] = field(
        default_factory=lambda: ["figure", "hobby"],
        metadata={"help": "instruction kinds to write lists for: figure, hobby, last_word, first_word, language"},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer; the line cut there is not used"})
    values_per_answer: int = field(default=20, metadata={"help": "how many the questions ask for"})
    samples_per_question: int = field(default=16, metadata={"help": "answers to each wording of the question"})
    min_count: int = field(default=1, metadata={"help": "leave values out that fewer answers name"})
    max_value_words: int = field(default=3, metadata={"help": "leave values of more words out"})
    max_values: int = field(default=0, metadata={"help": "keep so many values of a kind, the most named; 0: all"})
    min_values: int = field(default=10, metadata={"help": "fewer usable values of a kind: stop with an error"})
    unseen_share: float = field(default=0.2, metadata={"help": "share of values that is only measured, never taught"})
    token_budget: int = field(default=32_768, metadata={"help": "cache columns of one sampling batch, over all rows"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        if self.engine == "continuous_batching" and self.stop_strings:
            raise UserError("stop_strings: continuous batching ends at token ids only; use sampling_engine in_process")
        least = {"values_per_answer": 1, "samples_per_question": 1, "min_count": 1, "max_value_words": 1}
        least |= {"max_values": 0, "min_values": 2, "token_budget": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        if 0 < self.max_values < self.min_values:
            raise UserError(f"max_values: {self.max_values} is less than min_values: {self.min_values}")
        if not 0.0 < self.unseen_share < 1.0:
            raise UserError(f"unseen_share must be in (0, 1), not {self.unseen_share}")
        if self.temperature == 0.0 and self.samples_per_question > 1:
            raise UserError("temperature: greedy sampling gives equal answers; use a temperature above 0")
