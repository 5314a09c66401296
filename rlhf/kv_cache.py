"""A key/value cache for batched decoding: allocated once, each row packed from its first column, rows copied and moved.

transformers' DynamicCache concatenates the whole cache at every step and keeps finished rows to the end. Here a layer
holds one buffer [rows, heads, columns + 1, head width]. A forward writes each token where `RowCache.place` says and
attends to the first `width` columns: which of them a row may see is the mask's matter. The last column is written by
tokens that are none (padding, rows that have ended) and read by nobody. Letters: R rows, W tokens fed, C columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from configs.errors import UserError

MOVED_PARTS = 4


class RowLayer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.first_row = self.width = 0
        self.row_R1: Tensor
        self.column_RW: Tensor
        self.key_buffer: Tensor
        self.value_buffer: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked column has weight 0, but 0 times the nan that uninitialised memory may hold is nan.
        self.key_buffer, self.value_buffer = (
            states.new_zeros(self.rows, states.shape[1], self.columns + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.first_row
        rows = slice(first, first + len(key_states))
        for buffer, states in ((self.key_buffer, key_states), (self.value_buffer, value_states)):
            buffer[rows][self.row_R1, :, self.column_RW] = states.transpose(1, 2)
        return self.key_buffer[rows, :, : self.width], self.value_buffer[rows, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width


class RowCache(Cache):
    """The cache of a whole model, every layer of plain attention (UserError for windowed or recurrent layers)."""

    def __init__(self, config: PreTrainedConfig, rows: int, columns: int) -> None:
        for layer in DynamicCache(config=config).layers:
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else columns
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or window < columns:
                raise UserError(
                    f"model type {config.model_type}: {type(layer).__name__} layers are not supported by the sampler; "
                    f"use a model with full attention, or keep prompt and response within the attention window"
                )
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[RowLayer(rows, columns) for _ in range(count)])
        self.rows, self.columns = rows, columns

    def place(self, first_row: int, column_RW: Tensor, width: int) -> None:
        """The next forward is of rows first_row, first_row + 1, ...: token (r, w) goes to column column_RW[r, w] (the
        number of columns for none), and attention is over the first `width` columns."""
        row_R1 = torch.arange(len(column_RW), device=column_RW.device)[:, None]
        for layer in self.layers:
            layer.first_row, layer.row_R1, layer.column_RW, layer.width = first_row, row_R1, column_RW, width

    def copy_rows(self, other: "RowCache", source_R: Tensor, target_R: Tensor, width: int) -> None:
        """Copy the first `width` columns of the rows source_R of another cache over the rows target_R of this one."""
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(theirs.key_buffer, theirs.value_buffer)
            layer.key_buffer[target_R, :, :width] = theirs.key_buffer[source_R, :, :width]
            layer.value_buffer[target_R, :, :width] = theirs.value_buffer[source_R, :, :width]

    def permute_rows(self, source_R: Tensor, target_R: Tensor, width_R: Sequence[int]) -> None:
        """Row target_R[i] gets the first width_R[i] columns (or more) of what row source_R[i] held; each of the two is
        a permutation of the other."""
        # In parts, as a few long rows would have all of them copied at their width.
        size = -(-len(width_R) // MOVED_PARTS)
        parts = [(slice(n, n + size), max(width_R[n : n + size])) for n in range(0, len(width_R), size)]
        for layer in self.layers:
            if not layer.is_initialized:  # nothing has been fed yet
                continue
            for buffer in (layer.key_buffer, layer.value_buffer):
                moved = [buffer[source_R[part], :, :width] for part, width in parts]
                for (part, width), rows in zip(parts, moved, strict=True):
                    buffer[target_R[part], :, :width] = rows

    def resize(self, index_R: Tensor, rows: int, columns: int) -> None:
        """Buffers of `rows` x `columns` whose first rows are copies of the rows index_R (repeats allowed)."""

        def rebuild(buffer: Tensor) -> Tensor:
            new = buffer.new_zeros(rows, buffer.shape[1], columns + 1, buffer.shape[3])
            kept = min(columns, buffer.shape[2] - 1)
            new[: len(index_R), :, :kept] = buffer[index_R, :, :kept]
            return new

        for layer in self.layers:
            if layer.is_initialized:
                layer.key_buffer, layer.value_buffer = rebuild(layer.key_buffer), rebuild(layer.value_buffer)
            layer.rows, layer.columns = rows, columns
        self.rows, self.columns = rows, columns


def blocked(dtype: torch.dtype) -> float:
    """The additive mask value of a column that must not be seen: finite, so that a row of them gives no nan."""
    return torch.finfo(dtype).min


def visible(position_RW: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [R, 1, W, width]: the token at position p of a packed row sees the columns 0 .. p."""
    hidden = torch.arange(width, device=position_RW.device) > position_RW[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, blocked(dtype))
