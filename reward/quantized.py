"""4-bit weights under a LoRA adapter (QLoRA, arXiv 2305.14314), by bitsandbytes: NF4 with double quantisation.

A frozen weight takes 4.13 bits instead of 16. Of what peft's `prepare_model_for_kbit_training` does, this keeps what
matters here: `add_lora` freezes the base, and train_reward.py lets the embeddings' output require gradients under
gradient checkpointing. Norms and embeddings stay in the model's dtype, as under LoRA without quantisation: the norms
compute in float32 anyway. The scalar head is never quantised.
"""

import copy
import importlib.util
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
        llm_int8_skip_modules=["score"],  # read for 4 bits too, whatever its name says
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
    from bitsandbytes.nn import Linear4bit

    base = model.get_base_model()
    weights: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Linear4bit):
            weight = _dequantized(module.get_base_layer())
            delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
            weights[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype).cpu()
    base = model.unload()  # the adapters out, the trained head in
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit) and f"{name}.weight" not in weights:
            weights[f"{name}.weight"] = _dequantized(module).cpu()
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config)
    kept = {name: weight.cpu() for name, weight in base.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(kept | weights, assign=True)  # strict: a missing or left over weight raises
    return plain


def _dequantized(layer: nn.Module) -> Tensor:
    """The weight [out, in] that a 4-bit layer computes with, in the dtype that it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state)
