"""Sampling inside the process: each prompt computed once for its K samples, finished samples replaced from the queue.

Works with any Hugging Face causal LM of full attention layers (sdpa or eager), LoRA adapters active or not: `sample`
for single responses; rlhf/sessions.py for dialogues of many turns. Both decode with rlhf/decoding.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import decoding
from rlhf.decoding import Drawn, Rows, Stops, evaluating, feed
from rlhf.draw import sample_seeds
from rlhf.kv_cache import RowCache
from rlhf.samples import SampleBatch

REFILL_SHARE = 1 / 32  # admit new samples once this share of the rows is idle: each time costs some small kernels
GROW_SHARE = 1.25  # give shorter prompts more rows once there is room for so many times as many


def sample(
    model: Any,
    prompts_ids: Sequence[Sequence[int]],
    k: int,
    settings: SamplingSettings,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int | Sequence[int] = 0,
    tokenizer: Any = None,
    token_budget: int = 32_768,
    max_rows: int = 512,
    progress: bool = False,
    temperatures: Sequence[float] | None = None,
) -> SampleBatch:
    """Draw k responses to each prompt; `temperatures` gives each of the k its own, above 0, in place of the settings'.

    A sample depends on its own seed (an int here is spread by `sample_seeds`; a sequence gives one seed a sample), not
    on the batch it was computed in. `token_budget` bounds the cache: rows times (prompt + max_new_tokens) columns.
    `tokenizer` is needed for the settings' stop strings, which are looked for in the response alone.
    Raises UserError before any sampling where prompt + max_new_tokens exceeds the model's positions.
    """
    if k < 1:
        raise UserError(f"k: {k} responses a prompt; give at least 1")
    check_lengths(model, [len(ids) for ids in prompts_ids], settings.max_new_tokens)
    count = len(prompts_ids) * k
    seeds = sample_seeds(seed, count) if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples")
    if temperatures is not None and (len(temperatures) != k or min(temperatures) <= 0):
        raise ValueError(f"temperatures {list(temperatures)}: give {k} numbers above 0")
    stops = Stops(settings, stop_ids, tokenizer, model.device)
    finished: dict[int, Drawn] = {}
    with evaluating(model), tqdm(total=count, desc="sampling", unit="sample", disable=not progress) as bar:
        queue = _Queue(model, prompts_ids, k, seeds, temperatures, pad_id)
        run = _Run(model, queue, settings, stops, token_budget, max_rows)
        while len(finished) < count:
            finished.update(run.advance())
            bar.update(len(finished) - bar.n)
    ordered = [finished[i] for i in range(count)]
    return SampleBatch(
        [drawn.ids for drawn in ordered],
        [drawn.logprobs for drawn in ordered],
        [drawn.model_logprobs for drawn in ordered],
        ["stop" if drawn.stopped else "length" for drawn in ordered],
        seeds,
        k,
    )


class _Queue:
    """The samples that wait, longest prompts first (memory trouble shows at once), those of equal prompts together."""

    def __init__(
        self,
        model: Any,
        prompts_ids: Sequence[Sequence[int]],
        k: int,
        seeds: list[int],
        temperatures: Sequence[float] | None,
        pad_id: int,
    ) -> None:
        self.model, self.seeds, self.pad_id, self.k = model, seeds, pad_id, k
        self.temperatures = None if temperatures is None else torch.tensor(temperatures, device=model.device)
        waiting: dict[tuple[int, ...], list[int]] = {}
        for p, ids in enumerate(prompts_ids):
            waiting.setdefault(tuple(ids), []).extend(range(p * k, (p + 1) * k))
        self.waiting = sorted(waiting.items(), key=lambda entry: -len(entry[0]))
        self.waiting.reverse()  # so that the next one is popped from the end
        self.count = len(seeds)
        # Prompts computed but not yet given to all of their samples: their cache, one row each, and logits.
        self.stage: RowCache | None = None
        self.staged: list[tuple[int, int, list[int]]] = []  # (row of the stage, prompt length, samples that wait)
        self.logits: Tensor

    def __len__(self) -> int:
        return self.count

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a sample that waits; 0 for none."""
        if self.staged:
            return self.staged[0][1]
        return len(self.waiting[-1][0]) if self.waiting else 0

    def admit(self, rows: np.ndarray, run: Rows) -> list[tuple[int, Drawn]]:
        """Begin a waiting sample in each of `rows`, while there are any; returns those that their first token ended."""
        ended = []
        while len(rows) and self.count:
            if not self.staged:
                self._compute(len(rows))
            sources: list[int] = []
            lengths: list[int] = []
            samples: list[int] = []
            while self.staged and len(samples) < len(rows):
                source, length, left = self.staged.pop(0)
                taken, left = left[: len(rows) - len(samples)], left[len(rows) - len(samples) :]
                if left:
                    self.staged.insert(0, (source, length, left))
                samples += taken
                sources += [source] * len(taken)
                lengths += [length] * len(taken)
            mine, rows = rows[: len(samples)], rows[len(samples) :]
            assert self.stage is not None
            source_R, target_R = (torch.as_tensor(x, device=self.model.device) for x in (np.array(sources), mine))
            run.cache.copy_rows(self.stage, source_R, target_R, max(lengths))
            temperatures = None if self.temperatures is None else self.temperatures[[i % self.k for i in samples]]
            seeds = [self.seeds[i] for i in samples]
            ended += run.start(mine, samples, lengths, seeds, self.logits[source_R], temperatures)
            self.count -= len(samples)
        if not self.count:
            self.stage = None
        return ended

    def _compute(self, wanted: int) -> None:
        """Compute the next prompts: as many as `wanted` samples need, and as fit one forward."""
        budget = decoding.CPU_FEED_TOKENS if self.model.device.type == "cpu" else decoding.FEED_TOKENS
        most = max(1, budget // len(self.waiting[-1][0]))
        prompts: list[tuple[int, ...]] = []
        samples: list[list[int]] = []
        while self.waiting and len(prompts) < most and sum(map(len, samples)) < wanted:
            ids, mine = self.waiting.pop()
            prompts.append(ids)
            samples.append(mine)
        lengths = [len(ids) for ids in prompts]
        self.stage = RowCache(self.model.config, len(prompts), max(lengths))
        self.logits = feed(self.model, self.stage, prompts, [0] * len(prompts), self.pad_id)
        self.staged = list(zip(range(len(prompts)), lengths, samples, strict=True))


class _Run:
    """Rows kept full from the queue. `advance` is one step."""

    def __init__(
        self, model: Any, queue: _Queue, settings: SamplingSettings, stops: Stops, token_budget: int, max_rows: int
    ) -> None:
        self.queue, self.settings = queue, settings
        self.token_budget, self.max_rows = token_budget, max_rows
        columns = queue.longest + settings.max_new_tokens
        cache = RowCache(model.config, self._affordable(columns), columns)
        self.rows = Rows(model, cache, settings, stops, temperatures=queue.temperatures is not None)

    def _affordable(self, columns: int) -> int:
        return max(1, min(self.max_rows, self.token_budget // max(columns, 1)))

    def advance(self) -> list[tuple[int, Drawn]]:
        """Refill idle rows from the queue, or leave them out once it is empty; then a step. Returns what has ended."""
        rows, ended = self.rows, []
        if len(self.queue):
            idle = rows.idle
            if len(idle) >= max(1, REFILL_SHARE * rows.cache.rows) or len(idle) == rows.cache.rows:
                self._grow()
                ended += self.queue.admit(rows.idle, rows)
        if not len(self.queue):
            rows.close_up()
        return ended + (rows.step() if rows.running.any() else [])

    def _grow(self) -> None:
        """As the prompts get shorter, the same cache holds more rows."""
        rows, cache = self.rows, self.rows.cache
        going = rows.running[: rows.count]
        longest = max((rows.length - rows.drawn)[: rows.count][going].max(initial=0) + 1, self.queue.longest)
        columns = int(longest) + self.settings.max_new_tokens
        affordable = min(self._affordable(columns), int(going.sum()) + len(self.queue))
        if affordable >= GROW_SHARE * cache.rows:
            cache.resize(torch.arange(rows.count, device=rows.seed.device), affordable, columns)
            rows.resize(affordable)


def position_limit(model: Any) -> int | None:
    """Positions that the model was made for, None where its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def prompt_room(model: Any, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt in tokens that leaves room for a response, at most max_prompt_tokens; UserError for none."""
    limit = position_limit(model)
    if limit is not None and max_new_tokens >= limit:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's {limit} positions")
    return max_prompt_tokens if limit is None else min(max_prompt_tokens, limit - max_new_tokens)


def check_lengths(model: Any, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
    """UserError, naming the longest offender, where a prompt is empty or leaves no room for max_new_tokens."""
    limit = position_limit(model)
    for index, length in enumerate(prompt_lengths):
        if length == 0:
            raise UserError(f"prompt {index} is empty; it needs at least one token")
        if limit is not None and length + max_new_tokens > limit:
            raise UserError(
                f"prompt {index}: {length} tokens + max_new_tokens {max_new_tokens} exceed the model's {limit} "
                "positions; shorten the prompt or lower max_new_tokens"
            )
