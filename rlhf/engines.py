"""The sampling engines and the choice between them: in this process, continuous batching, or a server.

engine = load_engine(settings, model, tokenizer, chat, device, sampling)
batch = engine.sample(prompts, k, sampling, seed)
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from configs.chat import ChatFormat
from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.sampling_settings import SamplingSettings
from rlhf.continuous_batching import ContinuousBatching
from rlhf.hardware import FLOAT_ATTENTION
from rlhf.models import load_policy, unwrap
from rlhf.sampler import sample
from rlhf.samples import Engine, Prompt, SampleBatch

logger = logging.getLogger(__name__)

TRIAL_PROMPTS = 16  # prompts of the timing; with K samples each, enough rows that start-up does not decide


class InProcess:
    """rlhf/sampler.py behind the interface."""

    name = "in_process"
    follows_seeds = True

    def __init__(self, policy: Any, tokenizer: Any, stop_ids: Sequence[int], token_budget: int) -> None:
        self.policy, self.tokenizer, self.stop_ids, self.token_budget = policy, tokenizer, stop_ids, token_budget

    @property
    def config(self) -> Any:
        """The configuration of the sampled model."""
        return self.policy.config

    def sample(
        self,
        prompts: Sequence[Prompt],
        k: int,
        settings: SamplingSettings,
        seed: int | Sequence[int] = 0,
        temperatures: Sequence[float] | None = None,
    ) -> SampleBatch:
        """As `Engine.sample`; `temperatures` as in rlhf/sampler.py."""
        return sample(
            self.policy,
            [prompt.ids for prompt in prompts],
            k,
            settings,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_token_id,
            seed=seed,
            tokenizer=self.tokenizer,
            token_budget=self.token_budget,
            temperatures=temperatures,
        )


class Fastest:
    """The engine that gives most tokens a second on the first prompts it is asked for; timed once, then kept.

    Each engine first answers one prompt untimed, which pays for what is compiled or set up once. A candidate that
    cannot sample here is left out with a warning; the first must be able to.
    """

    def __init__(self, candidates: Sequence[Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.candidates, self.clock = list(candidates), clock
        self.chosen: Any = None

    @property
    def name(self) -> str:
        """The engine's name, "auto" until one is chosen."""
        return self.chosen.name if self.chosen else "auto"

    @property
    def follows_seeds(self) -> bool:
        """That of the chosen engine; False until one is chosen."""
        return bool(self.chosen and self.chosen.follows_seeds)

    @property
    def config(self) -> Any:
        """The configuration of the sampled model, the same for all candidates."""
        return self.candidates[0].config

    def sample(
        self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings, seed: int | Sequence[int] = 0
    ) -> SampleBatch:
        """As `Engine.sample`; the first call times the candidates."""
        if self.chosen is None and prompts:
            self.chosen = self._time(prompts[:TRIAL_PROMPTS], k, settings)
        return (self.chosen or self.candidates[0]).sample(prompts, k, settings, seed)

    def _time(self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings) -> Any:
        rates = [self._rate(self.candidates[0], prompts, k, settings)]
        for engine in self.candidates[1:]:
            try:
                rates.append(self._rate(engine, prompts, k, settings))
            except (UserError, RuntimeError, ValueError, ImportError) as error:
                logger.warning("sampling_engine auto: %s cannot sample here: %s", engine.name, error)
                rates.append(0.0)
        best = max(range(len(rates)), key=rates.__getitem__)
        figures = ", ".join(f"{e.name} {rate:.0f}" for e, rate in zip(self.candidates, rates, strict=True))
        logger.warning("sampling_engine auto: tokens/s: %s; taking %s", figures, self.candidates[best].name)
        return self.candidates[best]

    def _rate(self, engine: Any, prompts: Sequence[Prompt], k: int, settings: SamplingSettings) -> float:
        """Tokens a second; 0 where a prompt failed."""
        engine.sample(prompts[:1], k, settings, 0)
        start = self.clock()
        batch = engine.sample(prompts, k, settings, 0)
        seconds = self.clock() - start
        return 0.0 if batch.errors else sum(map(len, batch.response_ids)) / max(seconds, 1e-9)


def sample_live(
    name: str,
    policy: Any,
    prompts: Sequence[Prompt],
    k: int,
    settings: SamplingSettings,
    chat: ChatFormat,
    pad_id: int,
    seeds: Sequence[int],
    token_budget: int,
) -> SampleBatch:
    """k responses a prompt from a policy in training, its adapter included, by the engine `name`.

    Both engines read the policy's own weights, so they are always current: continuous batching builds its cache anew at
    every call and copies none. Log-probs are those drawn from.
    """
    if name == "continuous_batching":
        if unwrap(policy).config._attn_implementation == FLOAT_ATTENTION:
            raise UserError("sampling_engine: continuous_batching does not know the attention of bf16 on a CPU")
        engine = ContinuousBatching(policy, chat.stop_ids, pad_id, model_logprobs=False)
        config = unwrap(policy).config
        attention = config._attn_implementation
        config._attn_implementation = "sdpa"  # it does not know the attention of trees, and needs none
        try:
            return engine.sample(prompts, k, settings, seeds)
        finally:
            config._attn_implementation = attention
    ids = [prompt.ids for prompt in prompts]
    return sample(policy, ids, k, settings, stop_ids=chat.stop_ids, pad_id=pad_id, seed=seeds, max_rows=1024,
                  token_budget=token_budget)  # fmt: skip


def load_engine(
    settings: EngineSettings,
    model: ModelSettings,
    tokenizer: Any,
    chat: ChatFormat,
    device: torch.device,
    sampling: SamplingSettings,
    token_budget: int = 32_768,
) -> Engine:
    """The engine that `settings` name, or the best here: the policy is loaded unless a server samples.

    `sampling` is what a server is tried with. Continuous batching leaves the model's own log-probs out where they cost
    a forward: no stage that chooses its engine keeps them. Raises UserError where a server cannot serve.
    """
    path = model.model_name_or_path
    if settings.engine == "server":
        if model.attn_implementation != "sdpa":
            raise UserError(f"attn_implementation: {model.attn_implementation!r} has no effect where a server samples")
        try:
            from rlhf.server_engine import Server
        except ImportError as error:
            raise UserError(f"sampling_engine server needs the openai package: pip install openai ({error})") from error
        return Server(settings, path, chat, AutoConfig.from_pretrained(path), sampling)
    policy = load_policy(model, trainable=False).to(device)
    in_process = InProcess(policy, tokenizer, chat.stop_ids, token_budget)
    if settings.engine == "in_process" or (settings.engine == "auto" and device.type != "cuda"):
        return in_process
    batching = ContinuousBatching(policy, chat.stop_ids, tokenizer.pad_token_id, model_logprobs=False)
    if settings.engine == "continuous_batching":
        if device.type != "cuda":
            logger.warning("sampling_engine continuous_batching is made for CUDA and slow on a %s", device.type)
        return batching
    return Fastest([in_process, batching])
