"""The engine under the sampler: rows of a cache that draw a token and feed it, until each has ended.

One forward a step serves all rows. A row's tokens stand in its cache packed from the first column, so rows of any
length run side by side, and a row that has ended can be given to another sample at any step.

Letters: R rows of a forward, C cache columns, V vocabulary, T steps, W width of the tokens fed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StopStringCriteria

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.draw import draw, uniforms
from rlhf.kv_cache import RowCache, visible
from rlhf.step_graphs import StepGraphs

SHRINK_SHARE = 0.1  # move rows once this share of them is idle: moving a row costs about as much as a few idle steps

# Tokens of one prompt forward. A core's cache holds the activations of about 1,000 tokens of a small model; a GPU wants
# more work at once, bounded so that long prompts do not need more memory than decoding.
CPU_FEED_TOKENS, FEED_TOKENS = 1024, 16_384

RECORDED = ("cuda",)  # devices whose steps are recorded (rlhf/step_graphs.py)

NO_TOKEN = 1 << 40  # stands before a response's first token where its text is searched: in no vocabulary


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout, gradient checkpointing inert) without gradients; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # no_grad, not inference_mode: a model whose rotary buffers follow the length would keep inference tensors.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Stops:
    """What ends a response beside its length: token ids, and texts found by transformers' own criterion."""

    def __init__(self, settings: SamplingSettings, stop_ids: Sequence[int], tokenizer: Any, device: Any) -> None:
        """Raises ValueError for stop strings without a tokenizer, UserError for one that no tokens can spell."""
        self.ids = torch.tensor([*stop_ids, *settings.stop_token_ids], device=device)
        self.criterion = None
        if settings.stop_strings:
            if tokenizer is None:
                raise ValueError("stop strings are found in text: give `tokenizer`")
            try:
                self.criterion = StopStringCriteria(tokenizer, settings.stop_strings)
            except ValueError as error:
                raise UserError(f"stop_strings {settings.stop_strings}: {error}") from error

    @property
    def window(self) -> int:
        """How many last tokens `reached` wants to see."""
        return self.criterion.maximum_token_len if self.criterion else 1

    def reached(self, last_RW: Tensor) -> Tensor:
        """bool[R], from the last tokens of each response, NO_TOKEN before its first."""
        stopped = torch.isin(last_RW[:, -1], self.ids)
        return stopped if self.criterion is None else stopped | self.criterion(last_RW, None).to(stopped.device)


def feed(
    model: Any, cache: RowCache, chunks: Sequence[Sequence[int]], begin_R: Sequence[int], pad_id: int, first: int = 0
) -> Tensor:
    """Feed chunks[r] to row first + r of the cache, which holds begin_R[r] tokens; logits_RV after its last token.

    The chunks are padded on the left, so that the logits wanted are all in the last column.
    """
    budget = CPU_FEED_TOKENS if model.device.type == "cpu" else FEED_TOKENS
    rows = max(1, budget // max(map(len, chunks)))
    logits = []
    for start in range(0, len(chunks), rows):
        part = [list(chunk) for chunk in chunks[start : start + rows]]
        width = max(map(len, part))
        pads = torch.tensor([[width - len(chunk)] for chunk in part])
        ids = torch.tensor([[pad_id] * (width - len(chunk)) + chunk for chunk in part])
        column = torch.tensor([[n] for n in begin_R[start : start + rows]]) + torch.arange(width) - pads
        is_pad = torch.arange(width) < pads
        # Padding sees column 0 only, which any row has: finite garbage that nobody reads.
        position = column.masked_fill(is_pad, 0).to(model.device)
        column = column.masked_fill(is_pad, cache.columns).to(model.device)
        logits.append(_forward(model, cache, first + start, ids.to(model.device), position, column))
    return torch.cat(logits)


def _forward(
    model: Any, cache: RowCache, first: int, ids_RW: Tensor, position_RW: Tensor, column_RW: Tensor, width: int = 0
) -> Tensor:
    """Logits_RV of the last column only: the vocabulary layer is a quarter of a small model."""
    width = width or int(position_RW.max()) + 1
    cache.place(first, column_RW, width)
    output = model(
        input_ids=ids_RW,
        attention_mask=visible(position_RW, width, model.dtype),
        position_ids=position_RW,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@dataclass(frozen=True)
class Drawn:
    """One finished response."""

    ids: list[int]
    logprobs: list[float]
    model_logprobs: list[float]
    stopped: bool  # by a stop id or string, not by its length


class Rows:
    """Rows of a cache with a response each. Rows 0 .. count - 1 take part in a step, the idle ones among them in vain.

    What decides shapes is kept on the host, so that a step waits for the device once: to learn which rows have ended.
    """

    def __init__(
        self, model: Any, cache: RowCache, settings: SamplingSettings, stops: Stops, temperatures: bool = False
    ) -> None:
        self.model, self.cache, self.settings, self.stops = model, cache, settings, stops
        self.count = 0
        self.graphs: StepGraphs | None
        self.owner: np.ndarray = np.zeros(0, np.int64)  # whose response each row holds
        self.length: np.ndarray = np.zeros(0, np.int64)  # tokens of each row in the cache
        self.drawn: np.ndarray = np.zeros(0, np.int64)  # tokens of its response so far
        self.running: np.ndarray = np.zeros(0, bool)
        device = model.device
        self.seed = torch.zeros(0, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(0, device=device) if temperatures else None
        self.tokens = torch.zeros(0, settings.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(0, settings.max_new_tokens, device=device)
        self.model_logprobs = self.logprobs.clone()
        self.resize(cache.rows)

    def _forward(self, ids_R1: Tensor, position_R1: Tensor, column_R1: Tensor, width: int) -> Tensor:
        if self.graphs is not None:
            return self.graphs(ids_R1, position_R1, column_R1, width)
        return _forward(self.model, self.cache, 0, ids_R1, position_R1, column_R1, width)

    def resize(self, rows: int) -> None:
        """Room for so many rows (not fewer than `count`); what the first `count` hold stays. Call it when the cache has
        new buffers, too: recorded steps know the old ones."""
        self.graphs = None
        if self.model.device.type in RECORDED:
            forward = partial(_forward, self.model, self.cache, 0)
            self.graphs = StepGraphs(forward, rows, self.cache.columns, self.model.device)
        for name in ("owner", "length", "drawn", "running"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old[: self.count], np.zeros(rows - self.count, old.dtype)]))
        for name in ("seed", "temperature", "tokens", "logprobs", "model_logprobs"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_zeros(rows, *old.shape[1:])
                new[: self.count] = old[: self.count]
                setattr(self, name, new)

    def start(
        self,
        rows: np.ndarray,
        owners: Sequence[int],
        lengths: Sequence[int],
        seeds: Sequence[int],
        logits: Tensor,
        temperatures: Tensor | None = None,
    ) -> list[tuple[int, Drawn]]:
        """Begin a response in each of `rows`, whose prompts are in the cache and gave `logits`; returns the responses
        that their first token ended, with their owners."""
        self.count = max(self.count, int(rows.max()) + 1)
        self.owner[rows], self.length[rows], self.drawn[rows], self.running[rows] = owners, lengths, 0, True
        index = torch.from_numpy(rows).to(self.seed.device)
        self.seed[index] = torch.tensor(seeds, dtype=torch.int64, device=self.seed.device)
        if self.temperature is not None and temperatures is not None:
            self.temperature[index] = temperatures
        return self._draw(rows, index, logits)

    def step(self) -> list[tuple[int, Drawn]]:
        """Feed the last token of every row, draw the next; returns the responses that have ended, with their owners."""
        rows = np.arange(self.count)
        running = self.running[: self.count]
        # An idle row writes to the column that nobody reads: what it holds may be wanted still (see DialogueSession).
        position = np.where(running, self.length[: self.count], 0)
        column = np.where(running, position, self.cache.columns)
        last = np.maximum(self.drawn[: self.count] - 1, 0)
        host = torch.from_numpy(np.stack([rows, position, column, last]))
        index, position_R, column_R, last_R = host.to(self.seed.device, non_blocking=True)
        ids = self.tokens[index, last_R]
        width = int(position.max()) + 1
        logits = self._forward(ids[:, None], position_R[:, None], column_R[:, None], width)
        self.length[: self.count] += running
        return self._draw(rows, index, logits)

    def _draw(self, rows: np.ndarray, index: Tensor, logits: Tensor) -> list[tuple[int, Drawn]]:
        steps = self.settings.max_new_tokens
        at = torch.from_numpy(np.minimum(self.drawn[rows], steps - 1)).to(index.device)
        temperature = None if self.temperature is None else self.temperature[index]
        uniform = uniforms(self.seed[index], at)
        self.tokens[index, at], self.logprobs[index, at], self.model_logprobs[index, at] = draw(
            logits, self.settings, uniform, temperature
        )
        back = torch.arange(1 - self.stops.window, 1, device=index.device)
        place = at[:, None] + back
        recent = self.tokens[index[:, None], place.clamp(min=0)].masked_fill(place < 0, NO_TOKEN)
        stopped = self.stops.reached(recent).cpu().numpy()
        self.drawn[rows] = np.minimum(self.drawn[rows] + 1, steps)
        ended = self.running[rows] & (stopped | (self.drawn[rows] == steps))
        self.running[rows[ended]] = False
        return self._take(rows[ended], stopped[ended])

    def _take(self, rows: np.ndarray, stopped: np.ndarray) -> list[tuple[int, Drawn]]:
        if not len(rows):
            return []
        index = torch.from_numpy(rows).to(self.seed.device)
        columns = [table[index].tolist() for table in (self.tokens, self.logprobs, self.model_logprobs)]
        taken = []
        for row, ids, logprobs, model_logprobs, stop in zip(rows.tolist(), *columns, stopped.tolist(), strict=True):
            n = int(self.drawn[row])
            if not np.isfinite(model_logprobs[:n]).all():
                raise FloatingPointError("the model gave logits that are not finite; check its weights and dtype")
            taken.append((int(self.owner[row]), Drawn(ids[:n], logprobs[:n], model_logprobs[:n], stop)))
        return taken

    @property
    def idle(self) -> np.ndarray:
        """The rows that hold no running response, in order: those that ended, then those never used."""
        return np.flatnonzero(~self.running)

    def close_up(self) -> None:
        """Once enough rows are idle, exchange them for running rows behind them and leave them out of the steps."""
        running = int(self.running.sum())
        if running == 0 or self.count - running < SHRINK_SHARE * self.count:
            return
        target = np.flatnonzero(~self.running[:running])
        source: np.ndarray = running + np.flatnonzero(self.running[running : self.count])
        if len(source):
            width = int(self.length[: self.count].max())
            here, there = (torch.from_numpy(rows).to(self.seed.device) for rows in (target, source))
            self.cache.swap_rows(here, there, width)
            for name in ("seed", "temperature", "tokens", "logprobs", "model_logprobs"):
                if (table := getattr(self, name)) is not None:
                    table[torch.cat([here, there])] = table[torch.cat([there, here])]
            for name in ("owner", "length", "drawn", "running"):
                table = getattr(self, name)
                table[np.concatenate([target, source])] = table[np.concatenate([source, target])]
        self.count = running
