"""transformers' continuous batching (`generate_batch`, paged attention) as a sampling engine; worth trying on CUDA.

What it cannot do: stop strings (refused), and a seed a sample: one seed drives a whole call, so a sample depends on the
batch it was computed in. A prompt's cache is shared by its samples in whole pages.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.decoding import evaluating
from rlhf.draw import sample_seeds
from rlhf.models import unwrap
from rlhf.sampler import check_lengths
from rlhf.samples import Prompt, SampleBatch
from rlhf.sequences import teacher_forced_logprobs

# The cache on a CPU, where this engine is for tests: tokens of a page, tokens of a forward, requests at once.
CPU_PAGE, CPU_BATCH_TOKENS, CPU_REQUESTS = 16, 64, 16


class ContinuousBatching:
    """The engine. With `model_logprobs` False the log-probs under the model itself are left empty where they would cost
    another forward over all samples (a temperature other than 1, or a cut)."""

    name = "continuous_batching"
    follows_seeds = False

    def __init__(self, policy: Any, stop_ids: Sequence[int], pad_id: int, model_logprobs: bool = True) -> None:
        self.policy, self.stop_ids, self.pad_id = policy, list(stop_ids), pad_id
        self.model_logprobs = model_logprobs

    @property
    def config(self) -> Any:
        """The configuration of the sampled model."""
        return self.policy.config

    def sample(
        self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings, seed: int | Sequence[int] = 0
    ) -> SampleBatch:
        """As `Engine.sample`; of the seeds only the first has an effect. A request that failed is in `errors`."""
        if settings.stop_strings:
            raise UserError("stop_strings: continuous batching ends at token ids only; use sampling_engine in_process")
        check_lengths(self.policy, [len(prompt.ids) for prompt in prompts], settings.max_new_tokens)
        count = len(prompts) * k
        seeds = sample_seeds(seed, count) if isinstance(seed, int) else [int(s) for s in seed]
        if not prompts:
            return SampleBatch([], [], [], [], seeds, k)
        stop_ids = [*self.stop_ids, *settings.stop_token_ids]
        generation = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=k,
            eos_token_id=stop_ids,
            pad_token_id=self.pad_id,
            **drawing(settings),
        )
        outputs = self._generate([prompt.ids for prompt in prompts], generation, seeds[0])
        ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        errors: dict[int, str] = {}
        for p in range(len(prompts)):
            mine = [outputs[name] for name in request_names(p, k) if name in outputs]
            if faults := [output.error for output in mine if output.error is not None]:
                errors[p] = f"continuous batching: {faults[0]}"
            elif len(mine) < k:
                errors[p] = "continuous batching: the request was lost"
            ids += [[] for _ in range(k)] if p in errors else [output.generated_tokens for output in mine]
            logprobs += [[] for _ in range(k)] if p in errors else [output.logprobs for output in mine]
        if len(errors) == len(prompts):  # then it is not the prompts' fault
            raise UserError(f"{errors[0]}; use sampling_engine in_process")
        reasons = [
            "error" if i // k in errors else "stop" if response[-1] in stop_ids else "length"
            for i, response in enumerate(ids)
        ]
        greedy = settings.temperature == 0.0
        drawn = [[0.0] * len(response) for response in ids] if greedy else logprobs
        own = logprobs if greedy or plain(settings) else self._model_logprobs(prompts, k, ids)
        return SampleBatch(ids, drawn, own, reasons, seeds, k, errors=errors)

    def _generate(self, prompts_ids: list[list[int]], generation: GenerationConfig, seed: int) -> dict[str, Any]:
        """Outputs by the names of `request_names`; the random state of the process is left as it was."""
        model = unwrap(self.policy)
        on_gpu = model.device.type == "cuda"
        config = ContinuousBatchingConfig(return_logprobs=True, seed=seed)
        if not on_gpu:  # left to itself it takes nearly all memory, as it may on a GPU
            config.page_size, config.max_batch_tokens = CPU_PAGE, CPU_BATCH_TOKENS
            longest = max(map(len, prompts_ids)) + generation.max_new_tokens
            config.num_blocks = CPU_REQUESTS * (longest // CPU_PAGE + 2)
        with torch.random.fork_rng([model.device] if on_gpu else []), evaluating(self.policy):
            return model.generate_batch(
                prompts_ids, generation_config=generation, continuous_batching_config=config, warmup=on_gpu
            )

    def _model_logprobs(self, prompts: Sequence[Prompt], k: int, ids: list[list[int]]) -> list[list[float]]:
        known: list[list[float]] = [[] for _ in ids]
        there = [i for i, response in enumerate(ids) if response] if self.model_logprobs else []
        if there:
            table = teacher_forced_logprobs(self.policy, [prompts[i // k].ids for i in there], [ids[i] for i in there])
            for i, row in zip(there, table.tolist(), strict=True):
                known[i] = row[: len(ids[i])]
        return known


def request_names(position: int, k: int) -> list[str]:
    """The names that `generate_batch` gives the k requests of one prompt."""
    return [f"req_{position}__child#{j}" for j in range(k - 1)] + [f"req_{position}"]


def plain(settings: SamplingSettings) -> bool:
    """True where responses are drawn from the model itself: temperature 1, nothing cut."""
    cut = settings.top_p < 1.0 or settings.top_k > 0 or settings.min_p > 0.0
    return settings.temperature == 1.0 and not cut


def drawing(settings: SamplingSettings) -> dict[str, Any]:
    """The fields of a GenerationConfig that say how a token is drawn. All are given: a model's own defaults, such as
    a top_k of 50, must not slip in."""
    if settings.temperature == 0.0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p or None,
    }
