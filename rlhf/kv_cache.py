"""A key/value cache for batched decoding: allocated once, written in place, rows moved as samples finish.

transformers' DynamicCache concatenates the whole cache at every step and keeps finished rows to the end. Here a layer
holds one buffer [rows, heads, columns, head width]; a forward writes its columns into the buffer and attends to a view.
The rows of the slice `active` take part in the next forward. Letters: R rows, C columns.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from configs.errors import UserError


class RowLayer(DynamicLayer):
    """One layer's keys and values; `filled` columns are written in all rows (holes are the mask's matter)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.active = slice(0, rows)
        self.filled = 0
        self.key_buffer: Tensor
        self.value_buffer: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked column has weight 0, but 0 times the nan that uninitialised memory may hold is nan.
        self.key_buffer, self.value_buffer = (
            states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        if end > self.columns or key_states.shape[0] != self.active.stop - self.active.start:
            raise ValueError(f"{key_states.shape[0]} rows to column {end}, cache of {self.active} x {self.columns}")
        keys, values = self.key_buffer[self.active, :, :end], self.value_buffer[self.active, :, :end]
        keys[:, :, self.filled :] = key_states
        values[:, :, self.filled :] = value_states
        self.filled = end
        return keys, values

    def get_seq_length(self) -> int:
        return self.filled


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

    @property
    def filled(self) -> int:
        """Columns written so far."""
        return self.layers[0].filled

    def activate(self, rows: slice, filled: int) -> None:
        """The next forward takes these rows and writes from column `filled`; other rows stay in the buffer."""
        for layer in self.layers:
            layer.active, layer.filled = rows, filled

    def take_rows(self, index_R: Tensor, columns: int) -> None:
        """Make row r a copy of row index_R[r], in buffers of `columns` columns (repeats allowed)."""

        def rebuild(buffer: Tensor, filled: int) -> Tensor:
            new = buffer.new_zeros(len(index_R), buffer.shape[1], columns, buffer.shape[3])
            new[:, :, :filled] = buffer[:, :, :filled].index_select(0, index_R)
            return new

        for layer in self.layers:
            layer.key_buffer = rebuild(layer.key_buffer, layer.filled)
            layer.value_buffer = rebuild(layer.value_buffer, layer.filled)
            layer.rows, layer.columns = len(index_R), columns
            layer.active = slice(0, len(index_R))

    def move_rows(self, source: Tensor, target: Tensor, swap: bool = False) -> None:
        """Copy rows `source` over rows `target`; with `swap`, the targets' contents go to the sources."""
        for layer in self.layers:
            for buffer in (layer.key_buffer, layer.value_buffer):
                move_rows(buffer[:, :, : layer.filled], source, target, swap)

    def take_columns(self, index_RC: Tensor, columns: int) -> None:
        """Row r keeps columns index_RC[r], in that order, in buffers of `columns` columns.

        Keys carry their rotary position already, so a token may stand in any column.
        """

        def rebuild(buffer: Tensor) -> Tensor:
            index = index_RC[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            new = buffer.new_zeros(*buffer.shape[:2], columns, buffer.shape[3])
            new[:, :, : index_RC.shape[1]] = buffer.gather(2, index)
            return new

        for layer in self.layers:
            layer.key_buffer, layer.value_buffer = rebuild(layer.key_buffer), rebuild(layer.value_buffer)
            layer.filled, layer.columns = index_RC.shape[1], columns


def move_rows(tensor: Tensor, source: Tensor, target: Tensor, swap: bool) -> None:
    """In place: rows `source` of `tensor` copied over rows `target` (disjoint sets); with `swap`, exchanged."""
    kept = tensor[target] if swap else None
    tensor[target] = tensor[source]
    if kept is not None:
        tensor[source] = kept


def blocked(dtype: torch.dtype) -> float:
    """The additive mask value of a column that must not be seen: finite, so that a row of them gives no nan."""
    return torch.finfo(dtype).min
