"""The sizes of a Llama-like decoder, read from its config.json, and the parameter counts that follow from them. [pure]

Built-in shapes: recipe sheet 9 (the released configurations; GQA with 8 key/value heads at 70B, paper Table 1).
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from configs.errors import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of RMSNorm, rotary attention with `kv_heads` key/value heads, and SwiGLU; no biases."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head_width: int
    tied: bool = False  # the output head is the embedding

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer, by name."""
        attention, kv = self.attention_width, self.kv_width
        sizes = [(self.hidden, attention), (self.hidden, kv), (self.hidden, kv), (attention, self.hidden),
                 (self.hidden, self.feed_forward), (self.hidden, self.feed_forward),
                 (self.feed_forward, self.hidden)]  # fmt: skip
        return dict(zip(PROJECTIONS, sizes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """The matrices of all layers: what 4-bit loading quantises and what multiplies every token."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def head_parameters(self) -> int:
        """The output head of a language model, embedding or not."""
        return self.vocabulary * self.hidden

    def parameters(self, scalar_head: bool = False) -> int:
        """All weights of the language model or, with `scalar_head`, of a reward or value model of its own."""
        norms = (2 * self.layers + 1) * self.hidden
        head = self.hidden if scalar_head else 0 if self.tied else self.head_parameters
        return self.linear_parameters + norms + self.vocabulary * self.hidden + head

    def lora_parameters(self, rank: int, modules: tuple[str, ...] = PROJECTIONS) -> int:
        """An adapter of that rank: A [rank, inputs] and B [outputs, rank] beside each named matrix."""
        return self.layers * rank * sum(sum(self.matrices[name]) for name in modules)

    def kv_bytes(self, width: int) -> int:
        """Bytes of one cached token's keys and values, at `width` bytes a number."""
        return 2 * self.layers * self.kv_width * width


def llama2(hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int) -> Shape:
    return Shape(hidden, layers, heads, kv_heads, feed_forward, vocabulary=32_000, head_width=hidden // heads)


SHAPES = {
    "llama2-7b": llama2(4096, 32, 32, 32, 11_008),
    "llama2-13b": llama2(5120, 40, 40, 40, 13_824),
    "llama2-70b": llama2(8192, 80, 64, 8, 28_672),
}


def shape_of_config(config: Any, name: str) -> Shape:
    """The shape that a transformers config describes. UserError for what is no plain decoder of gated layers."""
    text = config.get_text_config(decoder=True)
    missing = [field for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                   "vocab_size") if getattr(text, field, None) is None]  # fmt: skip
    if missing:
        raise UserError(f"model_name_or_path: the config of {name} has no {', '.join(missing)}; name a --shape instead")
    if getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
        raise UserError(f"model_name_or_path: {name} has experts; only plain decoders can be planned")
    return Shape(
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        text.intermediate_size,
        text.vocab_size,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        bool(getattr(config, "tie_word_embeddings", False)),
    )


def find_shape(chosen: str, name: str) -> Shape:
    """The built-in shape `chosen`; for `auto` the one that `name` (a Hub name of Llama 2) says, else its config's."""
    if chosen != "auto":
        return SHAPES[chosen]
    for size in SHAPES:
        if name.lower().startswith(f"meta-llama/{size.replace('llama2', 'llama-2')}"):
            return SHAPES[size]
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: no config.json at {name!r} ({str(error).splitlines()[0]}); give --shape, one of "
            f"{', '.join(SHAPES)}, to plan without it"
        ) from error
    return shape_of_config(config, name)
