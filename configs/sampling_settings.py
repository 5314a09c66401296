"""How responses are drawn from a model: shared by every stage that samples."""

from dataclasses import dataclass, field

from configs.errors import UserError


@dataclass
class SamplingSettings:
    """Settings of one draw. The order of the filters is temperature, then top-k, then top-p."""

    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token (greedy)."})
    top_p: float = field(default=1.0, metadata={"help": "Keep the smallest set of tokens with at least this mass."})
    top_k: int = field(default=0, metadata={"help": "Keep this many most likely tokens; 0 keeps all."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response in tokens, its end token included."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # also refuses nan
            raise UserError(f"temperature: {self.temperature} is out of range; give 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: {self.top_p} is out of range; give a number in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; give 0 to keep all tokens")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is out of range; give at least 1")
