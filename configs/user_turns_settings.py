"""Settings of `rlhf/write_user_turns.py`."""

from dataclasses import dataclass, field

from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings


@dataclass(kw_only=True)
class UserTurnsSettings(EngineSettings, SamplingSettings):
    """User turns for Ghost Attention dialogues that a model itself writes."""

    topics: list[str] | None = field(
        default=None, metadata={"help": "what the turns are to be about; default: twenty everyday topics"}
    )
    max_new_tokens: int = field(default=384, metadata={"help": "tokens of an answer; the line cut there is not used"})
    turns_per_answer: int = field(default=10, metadata={"help": "how many the questions ask for"})
    samples_per_question: int = field(default=8, metadata={"help": "answers to each wording for each topic"})
    min_turn_words: int = field(default=3, metadata={"help": "leave turns of fewer words out"})
    max_turn_words: int = field(default=40, metadata={"help": "leave turns of more words out"})
    max_turns: int = field(default=0, metadata={"help": "keep so many of all turns, drawn by the seed; 0: all"})
    min_turns: int = field(default=100, metadata={"help": "fewer usable turns: stop with an error"})
    token_budget: int = field(default=32_768, metadata={"help": "cache columns of one sampling batch, over all rows"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        if self.engine == "continuous_batching" and self.stop_strings:
            raise UserError("stop_strings: continuous batching ends at token ids only; use sampling_engine in_process")
        if self.topics is not None and not (self.topics and all(topic.strip() for topic in self.topics)):
            raise UserError("topics: the list or one of its entries is empty; leave it out for the default ones")
        least = {"turns_per_answer": 1, "samples_per_question": 1, "min_turn_words": 1, "max_turns": 0, "min_turns": 1}
        for name, smallest in (least | {"token_budget": 1}).items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        if self.max_turn_words < self.min_turn_words:
            raise UserError(f"max_turn_words: {self.max_turn_words} is less than min_turn_words: {self.min_turn_words}")
        if 0 < self.max_turns < self.min_turns:
            raise UserError(f"max_turns: {self.max_turns} is less than min_turns: {self.min_turns}")
        if self.temperature == 0.0 and self.samples_per_question > 1:
            raise UserError("temperature: greedy sampling gives equal answers; use a temperature above 0")
