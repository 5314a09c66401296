"""What every sampling engine takes and gives: prompts encoded once, samples with everything known of them.

The engines: in this process (rlhf/sampler.py), and those that rlhf/engines.py chooses from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from configs.sampling_settings import SamplingSettings


@dataclass(frozen=True)
class Prompt:
    """A prompt record, encoded once."""

    messages: list[dict[str, str]]
    ids: list[int]
    is_safety: bool = False


@dataclass(frozen=True)
class SampleBatch:
    """N = len(prompts) * k samples, prompt-major: sample j of prompt p is entry p * k + j of every list."""

    response_ids: list[list[int]]  # the stop id, or the tokens of the stop string, included where one ended the sample
    logprobs: list[list[float]]  # nats a token, under the tempered and truncated distribution drawn from
    model_logprobs: list[list[float]]  # nats a token, under the model itself (temperature 1, nothing cut)
    finish_reasons: list[str]  # "stop" | "length"
    seeds: list[int]  # `sample(..., seed=[...])` with these gives the same samples again, in any batch
    k: int
    exact_ids: bool = True  # False: the engine gave text, which was encoded again; PPO refuses such samples

    def __len__(self) -> int:
        return len(self.response_ids)


class Engine(Protocol):
    """Draws k responses to each prompt; `seed` is spread over the samples, or gives each of the N its own.

    An engine that cannot follow per-sample seeds says so in `follows_seeds`; its `seeds` are what was asked for.
    """

    name: str
    follows_seeds: bool

    def sample(
        self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings, seed: int | Sequence[int] = 0
    ) -> SampleBatch:
        """As the class says. Raises UserError where the prompts or settings cannot be sampled by this engine."""
        ...
