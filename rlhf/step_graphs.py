"""Decode steps of fixed shapes, recorded once as CUDA graphs and replayed.

A step of a few hundred rows is some thousand small kernels; launching them from Python takes longer than running them.
A recorded step needs the same shapes and the same memory each time: the rows are rounded up to a size of a ladder, the
columns attended to up to a multiple of COLUMNS, and the inputs are copied to tensors that stay.

Letters: R rows, V vocabulary.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COLUMNS = 128
Step = Callable[[], Tensor]
# (ids_R1, position_R1, column_R1, width) -> logits_RV: one forward of the rows 0 .. R - 1.
Forward = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def record(step: Step) -> Step:
    """Run `step` until its kernels are chosen, then record it; the result replays it and returns the same tensor."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def ladder(rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`: at most half again as many."""
    size = 1 << max(0, rows - 1).bit_length()
    return size * 3 // 4 if size >= 4 and rows <= size * 3 // 4 else size


class StepGraphs:
    """The recorded steps over one cache. Once recording fails, steps run as they are, with one warning."""

    def __init__(self, forward: Forward, rows: int, columns: int, device: torch.device) -> None:
        self.forward, self.rows, self.columns = forward, rows, columns
        self.steps: dict[tuple[int, int], Step] = {}
        self.ids, self.position, self.column = torch.zeros(3, rows, 1, dtype=torch.int64, device=device)
        self.failed = False

    def __call__(self, ids_R1: Tensor, position_R1: Tensor, column_R1: Tensor, width: int) -> Tensor:
        """Logits_RV, as `forward` gives them; valid until the next call."""
        if self.failed:
            return self.forward(ids_R1, position_R1, column_R1, width)
        count = len(ids_R1)
        rows = min(ladder(count), self.rows)
        width = min(-(-width // COLUMNS) * COLUMNS, self.columns)
        self.ids[:count], self.position[:count], self.column[:count] = ids_R1, position_R1, column_R1
        self.position[count:rows], self.column[count:rows] = 0, self.columns  # rows of nobody write where nobody reads
        if (rows, width) not in self.steps:
            inputs = (self.ids[:rows], self.position[:rows], self.column[:rows], width)
            try:
                self.steps[rows, width] = record(lambda: self.forward(*inputs))
            except RuntimeError as error:
                logger.warning("decode steps cannot be recorded as CUDA graphs and run as they are: %s", error)
                self.failed = True
                return self.forward(ids_R1, position_R1, column_R1, width)
        return self.steps[rows, width]()[:count]
