"""What every sampling engine takes and gives: prompts encoded once, samples with everything known of them.

The engines: in this process (rlhf/sampler.py), and those that rlhf/engines.py chooses from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.errors import UserError
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
    # Nats a token; a sample whose log-probs its engine does not know has an empty list here.
    logprobs: list[list[float]]  # under the tempered and truncated distribution drawn from
    model_logprobs: list[list[float]]  # under the model itself (temperature 1, nothing cut)
    finish_reasons: list[str]  # "stop" | "length", "error" for the samples of a prompt in `errors`
    seeds: list[int]  # `sample(..., seed=[...])` with these gives the same samples again, in any batch
    k: int
    exact_ids: bool = True  # False: the engine gave text, which was encoded again; PPO refuses such samples
    # Prompts (by position in the batch) without k samples, and why; the lists of their samples are empty.
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.response_ids)


def before_stop_string(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first stop string, all of it where there is none: what is trained does not say the string."""
    return text[: min((text.index(stop) for stop in stop_strings if stop in text), default=len(text))]


class Engine(Protocol):
    """Draws k responses to each prompt; `seed` is spread over the samples, or gives each of the N its own.

    An engine that cannot follow per-sample seeds says so in `follows_seeds`; its `seeds` are what was asked for.
    """

    @property
    def name(self) -> str: ...

    @property
    def follows_seeds(self) -> bool: ...

    @property
    def config(self) -> Any:
        """The configuration of the sampled model, for its positions."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings, seed: int | Sequence[int] = 0
    ) -> SampleBatch:
        """As the class says. Raises UserError where the prompts or settings cannot be sampled by this engine."""
        ...


def require_exact_ids(batch: SampleBatch) -> SampleBatch:
    """The batch itself, for stages that train on the very tokens drawn; UserError where it cannot serve them."""
    if not batch.exact_ids:
        raise UserError(
            "the sampling server gave text without token ids: encoded again it need not be what was drawn; use "
            "sampling_engine in_process, or a server that returns token ids (vLLM)"
        )
    if batch.errors:
        position, reason = next(iter(batch.errors.items()))
        raise UserError(f"{len(batch.errors)} prompts have no samples; the first, prompt {position}: {reason}")
    for ids, known in zip(batch.response_ids, batch.logprobs, strict=True):
        if len(ids) != len(known):
            raise UserError("the sampling server gave no log-probs; use sampling_engine in_process")
    return batch
