"""Sampling inside the process: each prompt computed once for its K samples, finished samples replaced from the queue.

Works with any Hugging Face causal LM of full attention layers (sdpa or eager), LoRA adapters active or not: `sample`
for single responses; rlhf/sessions.py for dialogues of many turns. Both decode with rlhf/decoding.py.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import decoding
from rlhf.decoding import Stops, evaluating, feed
from rlhf.draw import sample_seeds
from rlhf.kv_cache import RowCache
from rlhf.rows import IDLE_SHARE, Drawn, Rows
from rlhf.samples import SampleBatch
from rlhf.shared_prompts import PromptStore, can_share, sharing_prompts

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
    share_prompts: bool | None = None,
) -> SampleBatch:
    """Draw k responses to each prompt; `temperatures` gives each of the k its own, above 0, in place of the settings'.

    A sample depends on its own seed (an int here is spread by `sample_seeds`; a sequence gives one seed a sample), not
    on the batch it was computed in. `token_budget` bounds the cache, in columns over all rows. With `share_prompts` the
    k samples of a prompt read one copy of its keys and values (rlhf/shared_prompts.py) where the model allows it; by
    default on a CPU, where it was measured to be faster. On a GPU steps are recorded instead (rlhf/step_graphs.py).
    `tokenizer` is needed for the settings' stop strings, which are looked for in the response alone.
    Raises UserError before any sampling where prompt + max_new_tokens exceeds the model's positions.
    """
    if k < 1:
        raise UserError(f"k: {k} responses a prompt; give at least 1")
    check_attention(model)
    check_lengths(model, [len(ids) for ids in prompts_ids], settings.max_new_tokens)
    count = len(prompts_ids) * k
    seeds = sample_seeds(seed, count) if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} samples")
    if temperatures is not None and (len(temperatures) != k or min(temperatures) <= 0):
        raise ValueError(f"temperatures {list(temperatures)}: give {k} numbers above 0")
    own = None if temperatures is None else torch.tensor(temperatures, device=model.device)
    stops = Stops(settings, stop_ids, tokenizer, model)
    share = k > 1 and can_share(model) and (model.device.type == "cpu" if share_prompts is None else share_prompts)
    finished: dict[int, Drawn] = {}
    attention = sharing_prompts(model) if share else nullcontext()
    bar = tqdm(total=count, desc="sampling", unit="sample", disable=not progress)
    with evaluating(model), attention, bar:
        queue = _Queue(model, prompts_ids, k, pad_id)
        run = _Run(model, queue, settings, stops, seeds, own, k, share, token_budget, max_rows)
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

    def __init__(self, model: Any, prompts_ids: Sequence[Sequence[int]], k: int, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        waiting: dict[tuple[int, ...], list[int]] = {}
        for p, ids in enumerate(prompts_ids):
            waiting.setdefault(tuple(ids), []).extend(range(p * k, (p + 1) * k))
        # In reverse, so that the next one is popped from the end.
        self.waiting = sorted(waiting.items(), key=lambda entry: len(entry[0]))
        self.count = len(prompts_ids) * k
        self.stage: RowCache  # the prompts computed last, one row each
        self.staged: list[_Staged] = []  # those of them with samples that wait

    def __len__(self) -> int:
        return self.count

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a sample that waits; 0 for none."""
        if self.staged:
            return self.staged[0].length
        return len(self.waiting[-1][0]) if self.waiting else 0

    def take(self, wanted: int) -> "list[tuple[_Staged, list[int]]]":
        """Up to `wanted` samples, by prompt; those of the prompts in `stage` or, once none waits, of the next ones."""
        if not self.staged:
            self._compute(wanted)
        taken = []
        while self.staged and wanted:
            prompt = self.staged[0]
            mine = prompt.samples[:wanted]
            del prompt.samples[:wanted]
            if not prompt.samples:
                self.staged.pop(0)
            taken.append((prompt, mine))
            wanted -= len(mine)
            self.count -= len(mine)
        return taken

    def _compute(self, wanted: int) -> None:
        """Compute the next prompts: as many as `wanted` samples need, and as fit one forward."""
        budget = decoding.CPU_FEED_TOKENS if self.model.device.type == "cpu" else decoding.FEED_TOKENS
        most = max(1, budget // len(self.waiting[-1][0]))
        prompts: list[tuple[int, ...]] = []
        samples: list[list[int]] = []
        while self.waiting and len(prompts) < most and sum(len(mine) for mine in samples) < wanted:
            ids, mine = self.waiting.pop()
            prompts.append(ids)
            samples.append(mine)
        self.stage = RowCache(self.model.config, len(prompts), max(map(len, prompts)))
        logits = feed(self.model, self.stage, prompts, [0] * len(prompts), self.pad_id)
        self.staged = [
            _Staged(row, len(ids), logits[row], mine)
            for row, (ids, mine) in enumerate(zip(prompts, samples, strict=True))
        ]


@dataclass
class _Staged:
    """A prompt that has been computed."""

    row: int  # of the stage
    length: int
    logits_V: Tensor  # after its last token
    samples: list[int]  # those that wait
    slot: int | None = None  # in the store of prompts


class _Run:
    """Rows kept full from the queue. `advance` is one step."""

    def __init__(
        self,
        model: Any,
        queue: _Queue,
        settings: SamplingSettings,
        stops: Stops,
        seeds: list[int],
        temperature_K: Tensor | None,
        k: int,
        share: bool,
        token_budget: int,
        max_rows: int,
    ) -> None:
        self.queue, self.settings, self.k = queue, settings, k
        self.seeds, self.temperature_K = seeds, temperature_K
        self.token_budget, self.max_rows = token_budget, min(max_rows, len(queue))
        prompts = PromptStore(model, self._prompts(queue), queue.longest) if share else None
        columns = settings.max_new_tokens + (0 if share else queue.longest)
        cache = RowCache(model.config, self._affordable(queue.longest, share), columns)
        self.rows = Rows(model, cache, settings, stops, temperature_K is not None, prompts)

    def _affordable(self, longest: int, share: bool) -> int:
        """Rows within the budget, at most as many as there are samples to do."""
        # Some prompts have only a few responses left: count twice the prompts that full groups of k would need.
        prompt_columns = 2 * longest / self.k if share else longest
        rows = int(self.token_budget / (self.settings.max_new_tokens + prompt_columns))
        return max(1, min(self.max_rows, rows))

    def _prompts(self, queue: _Queue) -> int:
        return 1 + 2 * -(-self._affordable(queue.longest, True) // self.k)

    def advance(self) -> list[tuple[int, Drawn]]:
        """Close up idle rows and fill them from the queue, once they are enough; then a step. Returns what ended."""
        rows, ended = self.rows, []
        rows.close_up()
        if len(self.queue) and rows.cache.rows - rows.running.sum() >= max(1, IDLE_SHARE * rows.cache.rows):
            self._grow()
            while len(self.queue) and rows.count < rows.cache.rows:
                ended += self._admit()
            rows.close_up()  # some responses end with their first token
        return ended + (rows.step() if rows.running.any() else [])

    def _admit(self) -> list[tuple[int, Drawn]]:
        """Begin waiting samples in the rows that are free; returns those that their first token ended."""
        rows, queue = self.rows, self.queue
        taken = queue.take(rows.cache.rows - rows.count)
        prompts = [prompt for prompt, mine in taken for _ in mine]
        samples = [i for _, mine in taken for i in mine]
        target: np.ndarray = rows.count + np.arange(len(samples))
        slots = None
        if rows.prompts is None:
            source_R = torch.tensor([prompt.row for prompt in prompts], device=rows.seed.device)
            target_R = torch.from_numpy(target).to(rows.seed.device)
            rows.cache.copy_rows(queue.stage, source_R, target_R, max(prompt.length for prompt in prompts))
        else:
            for prompt, mine in taken:
                if prompt.slot is None:
                    users = len(mine) + len(prompt.samples)
                    prompt.slot = rows.prompts.add(queue.stage, prompt.row, prompt.length, users)
            slots = [prompt.slot or 0 for prompt in prompts]
        return rows.start(
            target,
            samples,
            [prompt.length for prompt in prompts],
            [self.seeds[i] for i in samples],
            torch.stack([prompt.logits_V for prompt in prompts]),
            None if self.temperature_K is None else self.temperature_K[[i % self.k for i in samples]],
            slots,
        )

    def _grow(self) -> None:
        """As the prompts get shorter, the same cache holds more rows."""
        rows, cache = self.rows, self.rows.cache
        going = rows.running[: rows.count]
        prompt = (rows.length - rows.drawn + 1)[: rows.count][going].max(initial=0)
        longest = max(int(prompt), self.queue.longest)
        affordable = self._affordable(longest, rows.prompts is not None)
        affordable = min(affordable, int(going.sum()) + len(self.queue))
        if affordable >= GROW_SHARE * cache.rows:
            columns = self.settings.max_new_tokens + (0 if rows.prompts else longest)
            cache.resize(torch.arange(rows.count, device=rows.seed.device), affordable, columns)
            rows.resize(affordable)


def check_attention(model: Any) -> None:
    """UserError for models whose attention cannot take a mask for each row, or counts positions by columns."""
    kind = model.config._attn_implementation
    if "flash" in kind or "flex" in kind:
        raise UserError(f"attn_implementation: the sampler needs sdpa or eager, not {kind}")
    if getattr(model.config.get_text_config(decoder=True), "alibi", False) or model.config.model_type == "bloom":
        raise UserError(f"model type {model.config.model_type}: ALiBi positions are not supported by the sampler")


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
