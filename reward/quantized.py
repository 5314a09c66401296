"""4-bit weights under a LoRA adapter (QLoRA, arXiv 2305.14314), by bitsandbytes: NF4 with double quantisation.

A frozen weight takes 4.13 bits instead of 16. Of what peft's `prepare_model_for_kbit_training` does, this keeps what
matters here: `add_lora` freezes the base, and train_reward.py lets the embeddings' output require gradients under
gradient checkpointing. Norms and embeddings stay in the model's dtype, as under LoRA without quantisation: the norms
compute in float32 anyway. The scalar head is never quantised.
"""

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from configs.errors import UserError


def four_bit_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise while loading onto `device`; products are computed in `dtype`.

    UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score", "lm_head"],  # read for 4 bits too, whatever its name says
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for CPUs with AVX-512 bf16 at the first score that is computed.

    Products with the repacked weights have no gradient, so training that goes on after an evaluation would update by
    wrong gradients, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: Any) -> bool:
    """Whether the base of `model` holds 4-bit weights."""
    return getattr(model, "is_loaded_in_4bit", False)


@torch.no_grad()
def plain_model(model: PeftModel) -> PreTrainedModel:
    """The trained model without quantisation, adapters merged, on the CPU: what it scored with, as a plain model.

    W + (alpha / r) B A with W as the 4-bit weights stand for it, not as it was before: the adapter was trained around
    the rounding of these, and the saved model then gives the scores that were measured. Nothing is quantised again.
    `model` is taken apart: use it for nothing else afterwards.
    """
    base = model.get_base_model()
    weights: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and is_four_bit(module.get_base_layer()):
            weight = _dequantized(module.get_base_layer())
            delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
            weights[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype).cpu()
    base = model.unload()  # the adapters out, the trained head in
    for name, module in base.named_modules():
        if is_four_bit(module) and f"{name}.weight" not in weights:
            weights[f"{name}.weight"] = _dequantized(module).cpu()
    return unquantized(base, {name: weight.cpu() for name, weight in (base.state_dict() | weights).items()})


def unquantized(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A plain model of the class and configuration of a quantised one, with these weights; what else there is stays."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    # strict: a missing weight raises
    plain.load_state_dict({name: weights[name] for name in plain.state_dict() if name in weights}, assign=True)
    return plain


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of bitsandbytes, which need not be installed."""
    return type(module).__name__ == "Linear4bit"


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] that a linear layer computes with."""
    return _dequantized(layer) if is_four_bit(layer) else layer.weight


def _dequantized(layer: nn.Module) -> Tensor:
    """The weight [out, in] that a 4-bit layer computes with, in the dtype that it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state)
