"""Rows that decode side by side: each draws a token and feeds it, until its response has ended.

One forward a step serves all rows. A row's tokens stand in its cache packed from the first column, so rows of any
length run together, and a row that has ended can be given to another sample at any step.

Letters: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.sampling_settings import SamplingSettings
from rlhf.decoding import NO_TOKEN, Stops, forward
from rlhf.draw import draw, uniforms
from rlhf.kv_cache import RowCache
from rlhf.sharding import stays_in_parts
from rlhf.shared_prompts import PromptStore
from rlhf.step_graphs import StepGraphs

IDLE_SHARE = 1 / 8  # close up once this share of the rows is idle: moving rows costs about as much as a few idle steps
RECORDED = ("cuda",)  # devices whose steps are recorded (rlhf/step_graphs.py)

ON_HOST = ("owner", "length", "offset", "slot", "drawn", "running")
ON_DEVICE = ("seed", "temperature", "tokens", "logprobs", "model_logprobs")


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
    With `prompts`, the rows' prompts are there, in the slots that `start` names, and the rows hold responses alone.
    """

    def __init__(
        self,
        model: Any,
        cache: RowCache,
        settings: SamplingSettings,
        stops: Stops,
        temperatures: bool = False,
        prompts: PromptStore | None = None,
    ) -> None:
        self.model, self.cache, self.settings, self.stops, self.prompts = model, cache, settings, stops, prompts
        self.count = 0
        self.graphs: StepGraphs | None
        self.owner: np.ndarray = np.zeros(0, np.int64)  # whose response each row holds
        self.length: np.ndarray = np.zeros(0, np.int64)  # tokens of each dialogue that have been fed
        self.offset: np.ndarray = np.zeros(0, np.int64)  # those of them that stand in `prompts`, not in the row
        self.slot: np.ndarray = np.zeros(0, np.int64)  # where in `prompts`
        self.drawn: np.ndarray = np.zeros(0, np.int64)  # tokens of its response so far
        self.running: np.ndarray = np.zeros(0, bool)
        device = model.device
        self.seed = torch.zeros(0, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(0, device=device) if temperatures else None
        self.tokens = torch.zeros(0, settings.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(0, settings.max_new_tokens, device=device)
        self.model_logprobs = self.logprobs.clone()
        self.resize(cache.rows)

    def resize(self, rows: int) -> None:
        """Room for so many rows (not fewer than `count`); what the first `count` hold stays. Call it when the cache has
        new buffers, too: recorded steps know the old ones."""
        self.graphs = None
        recorded = self.model.device.type in RECORDED and not stays_in_parts(self.model)  # no traffic in a recording
        if recorded and self.prompts is None:
            step = partial(forward, self.model, self.cache, 0)
            self.graphs = StepGraphs(step, rows, self.cache.columns, self.model.device)
        for name in ON_HOST:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old[: self.count], np.zeros(rows - self.count, old.dtype)]))
        for name in ON_DEVICE:
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
        slots: Sequence[int] | None = None,
    ) -> list[tuple[int, Drawn]]:
        """Begin a response in each of `rows`, whose prompts of `lengths` tokens are in the cache (or in the slots of
        `prompts`) and gave `logits`; returns the responses that their first token ended, with their owners."""
        self.count = max(self.count, int(rows.max()) + 1)
        self.owner[rows], self.length[rows], self.drawn[rows], self.running[rows] = owners, lengths, 0, True
        self.offset[rows], self.slot[rows] = (lengths, slots) if slots is not None else (0, 0)
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
        own = np.where(running, position - self.offset[: self.count], 0)
        column = np.where(running, own, self.cache.columns)
        last = np.maximum(self.drawn[: self.count] - 1, 0)
        host = torch.from_numpy(np.stack([rows, position, column, last]))
        index, position_R, column_R, last_R = host.to(self.seed.device, non_blocking=True)
        inputs = (self.tokens[index, last_R][:, None], position_R[:, None], column_R[:, None], int(own.max()) + 1)
        if self.graphs is not None:
            logits = self.graphs(*inputs)
        else:
            shared = None if self.prompts is None else self.prompts.shared_by(self.slot[: self.count], own + 1)
            logits = forward(self.model, self.cache, 0, *inputs, shared)
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
        if self.prompts is not None:
            self.prompts.release(self.slot[rows[ended]])
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

    def close_up(self) -> None:
        """Once enough rows are idle, move them behind the running ones, which keep their order, and leave them out."""
        idle = self.count - int(self.running.sum())
        if not idle or idle < IDLE_SHARE * self.count:
            return
        if idle == self.count:
            self.count = 0
            return
        first = int(self.running[: self.count].argmin())  # of the idle rows; those before it stay
        order: np.ndarray = first + np.argsort(~self.running[first : self.count], kind="stable")
        target, source = (torch.from_numpy(x).to(self.seed.device) for x in (np.arange(first, self.count), order))
        self.cache.permute_rows(source, target, (self.length - self.offset)[order].tolist())
        for name in ON_DEVICE:
            if (table := getattr(self, name)) is not None:
                table[target] = table[source]
        for name in ON_HOST:
            table = getattr(self, name)
            table[first : self.count] = table[order]
        self.count -= idle
