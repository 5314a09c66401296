"""How responses are drawn from a model: shared by every stage that samples."""

from dataclasses import dataclass, field

from configs.errors import UserError


@dataclass
class SamplingSettings:
    """Settings of one draw. The order of the filters is temperature, top-k, top-p, min-p.

    A response ends at the chat format's stop ids, at one of `stop_token_ids`, where its text holds one of
    `stop_strings`, or by its length.
    """

    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token (greedy)."})
    top_p: float = field(default=1.0, metadata={"help": "Keep the smallest set of tokens with at least this mass."})
    top_k: int = field(default=0, metadata={"help": "Keep this many most likely tokens; 0 keeps all."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response in tokens, its end token included."})
    min_p: float = field(
        default=0.0, metadata={"help": "Keep tokens with at least this share of the likeliest token's probability."}
    )
    stop_strings: list[str] = field(
        default_factory=list, metadata={"help": "Texts that end a response; they stay part of its tokens."}
    )
    stop_token_ids: list[int] = field(
        default_factory=list, metadata={"help": "Token ids that end a response, beside the chat format's own."}
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # also refuses nan
            raise UserError(f"temperature: {self.temperature} is out of range; give 0 (greedy) to 100")
        if 0.0 < self.temperature < 0.001:  # its logits would leave float32
            raise UserError(f"temperature: {self.temperature} is too small; give 0 (greedy) or at least 0.001")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: {self.top_p} is out of range; give a number in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is negative; give 0 to keep all tokens")
        if not 0.0 <= self.min_p < 1.0:
            raise UserError(f"min_p: {self.min_p} is out of range; give a number in [0, 1), 0 keeps all tokens")
        if "" in self.stop_strings:
            raise UserError("stop_strings: an empty string would end every response; leave it out")
        if min(self.stop_token_ids, default=0) < 0:
            raise UserError(f"stop_token_ids: {min(self.stop_token_ids)} is not a token id")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is out of range; give at least 1")
