"""Policies: loading, LoRA, and saving as plain Hugging Face folders. Tokenizers: rlhf/tokenizer.py.

Decisions that are easy to get wrong and therefore live in one place:

- **pad is never eos.** Llama 2 ships no pad token; with pad = eos a reward model reads its score one token early and a
  loss that ignores padding never trains the model to stop. A distinct `<pad>` is added and the embeddings are resized.
- **dtype.** `auto` is float32 on a CPU and for full fine-tuning (a learning rate of 1e-6 vanishes in bfloat16 weights;
  mixed precision then comes from autocast) and bfloat16 on a GPU for frozen models and under LoRA, whose adapter stays
  float32.
- **Weights are read from safetensors only**: a `.bin` file is a pickle, and loading one can run code.
- **A saved policy is a plain folder**: merged weights as safetensors, tokenizer with chat template, generation config,
  model card. Under LoRA the adapter alone is kept beside them in `adapter/`. Saving never alters the live model, so
  training continues bit for bit after a save.
"""

import hashlib
import logging
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from configs.chat import load_chat_format, sentencepiece_file, training_chat_template
from configs.errors import UserError
from configs.model_settings import ModelSettings
from reward.adapters import Adapters, read_adapter
from reward.quantized import (
    dense_weight,
    four_bit_options,
    is_four_bit,
    is_quantized,
    keep_layout,
    unquantized,
)
from rlhf.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def resolve_dtype(settings: ModelSettings, trainable: bool) -> torch.dtype:
    """The dtype in which weights are held; see the module docstring for `auto`."""
    if settings.dtype != "auto":
        choices = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if settings.dtype not in choices:
            raise UserError(f"dtype: {settings.dtype!r} is not one of auto, {', '.join(choices)}")
        return choices[settings.dtype]
    trained_fully = trainable and not settings.use_peft
    return torch.bfloat16 if torch.cuda.is_available() and not trained_fully else torch.float32


def load_policy(settings: ModelSettings, trainable: bool = True) -> PreTrainedModel | PeftModel:
    """The causal language model of `settings`, with the LoRA adapter that is trained where `use_peft` asks for one.

    That adapter starts as a copy of `adapter_path`, or as the identity; without `use_peft`, `adapter_path` is merged
    into the weights. A model that is not `trainable` comes frozen and in eval mode.
    """
    if settings.load_in_4bit and trainable and not settings.use_peft:
        raise UserError("load_in_4bit: 4-bit weights cannot be trained themselves; add use_peft: true")
    model = load_base(settings, trainable)
    if settings.adapter_path is not None:
        config, weights, _ = read_adapter(settings.adapter_path, settings.model_name_or_path, "adapter_path")
        config.lora_dropout = settings.lora_dropout
        adapters = Adapters(model)
        adapters.add("default", config, weights, trained=trainable)
        if trainable and settings.use_peft:
            return adapters.model
        if settings.load_in_4bit:
            return adapters.model.requires_grad_(False).eval()
        model = adapters.model.merge_and_unload()
    if not trainable:
        return model.requires_grad_(False).eval()
    model.requires_grad_(True)
    if settings.use_peft:
        return add_lora(model, settings)
    if settings.freeze_embeddings:
        freeze_embeddings(model)
    return model


def load_base(settings: ModelSettings, trainable: bool = True, device: torch.device | None = None) -> PreTrainedModel:
    """The weights at `model_name_or_path` alone, in 4 bits (then on `device`) where `load_in_4bit` asks for it.

    Embeddings grow by the tokens that `load_tokenizer` adds; the new rows start as the mean of the old ones. Llama has
    no dropout; where a model has, it is switched off (recipe sheet 10.31), so that log-probs of one state are always
    the same numbers.
    """
    path = settings.model_name_or_path
    tokenizer = load_tokenizer(path)
    dtype = resolve_dtype(settings, trainable)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantization = four_bit_options(dtype, device) if settings.load_in_4bit else {}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantization,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model_name_or_path: no causal language model can be loaded from {path!r}: {error}") from error
    if loaded["missing_keys"]:  # they would be random: a reward model, for instance, has no output layer
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise UserError(f"model_name_or_path: {path!r} is no causal language model: it lacks the weights {missing}")
    keep_layout(model)
    _grow_embeddings(model, len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper (its layers carry the adapter), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: Any) -> Any:
    """What gives the hidden states of `model`: all of it but its head."""
    plain = unwrap(model)
    return getattr(plain, plain.base_model_prefix)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Leaves token embeddings and output head as they are.

    Softmax pushes the row of every word that is not the target down a little, and Adam divides that little by its own
    size: words that the data never show sink as fast as the others learn. What a base model knows about them, copying
    them included, is lost unless their rows stay.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)


def lora_config(settings: ModelSettings, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """A fresh adapter on all linear layers but the head, or on `lora_target_modules`."""
    return LoraConfig(
        task_type=task_type,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
    )


def add_lora(model: PreTrainedModel, settings: ModelSettings) -> PeftModel:
    """`model` with the adapter of `lora_config`, which starts as the identity (B = 0)."""
    try:
        return get_peft_model(model, lora_config(settings))
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from error


def first_layers(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """The fields of `config` that change where only its first `layers` are kept. UserError where it has fewer."""
    if layers > config.num_hidden_layers:  # the others would be made up at random
        raise UserError(f"{layers} layers are asked for, but the model has {config.num_hidden_layers}")
    kinds = getattr(config, "layer_types", None)
    return {"num_hidden_layers": layers} | ({} if kinds is None else {"layer_types": kinds[:layers]})


def save_first_layers(path: str, layers: int, folder: str | Path) -> Path:
    """Write the first `layers` layers of the model at `path`, its embeddings, head and tokenizer to `folder`.

    A folder that is there is kept: it is written beside its place and moved there whole. What the upper layers had
    learnt is lost, and the head was made for them: such a model wants training. UserError where the model cannot be
    loaded or has fewer layers, and where the folder holds something else.
    """
    folder = Path(folder)
    settings = {"model_name_or_path": path, "layers": layers}
    card = model_card("first_layers", settings, {}, {})
    if folder.exists():
        kept = folder / "README.md"
        if not kept.exists() or kept.read_text(encoding="utf-8") != card:
            raise UserError(
                f"{folder} holds something other than the first {layers} layers of {path}; remove it, or name another "
                "output_dir"
            )
        return folder
    started = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(started, ignore_errors=True)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the upper layers' weights are left out on purpose
    try:
        fields = first_layers(AutoConfig.from_pretrained(path), layers)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True, **fields)
    except (OSError, ValueError) as error:
        raise UserError(f"no causal language model can be loaded from {path!r}: {error}") from error
    finally:
        transformers_logging.set_verbosity(before)
    save_policy(model, load_tokenizer(path), started, card)
    started.rename(folder)
    return folder


def _grow_embeddings(model: PreTrainedModel, vocabulary: int) -> None:
    """Grow input and output embeddings to `vocabulary` rows; never shrink (checkpoints pad their tables)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary <= rows:
        return
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:  # mean of the old rows: an average token, neither likely nor an outlier
                module.weight[rows:] = module.weight[:rows].float().mean(0).to(module.weight.dtype)
    logger.warning("embeddings grown from %d to %d rows for added tokens", rows, vocabulary)


def merged_state_dict(model: PreTrainedModel | PeftModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model to save, and its weights with the active adapters added: W + (alpha / r) B A. `model` is not touched.

    4-bit weights are what they stand for, in the dtype they were quantised from; the model to save is then a plain one.
    """
    base: PreTrainedModel = unwrap(model)
    state = merged_weights(base)
    return (unquantized(base, state) if is_quantized(base) else base), state


def merged_weights(base: PreTrainedModel, only: Container[nn.Module] | None = None) -> dict[str, torch.Tensor]:
    """The second of `merged_state_dict`, or what of it stands in the modules `only`: the others may be in parts."""
    modules = [(name, x) for name, x in base.named_modules(remove_duplicate=False) if only is None or x in only]
    # Not state_dict(): it would give the parts of sharded weights, also where they are gathered.
    state = {
        f"{prefix}.{name}".removeprefix(".").replace(".base_layer.", "."): tensor.detach()
        for prefix, module in modules
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if "lora_" not in f"{prefix}.{name}" and name not in module._non_persistent_buffers_set
    }
    with torch.no_grad():
        for name, module in modules:
            if isinstance(module, LoraLayer):
                weight = dense_weight(module.get_base_layer())
                # one base may carry adapters of other roles on layers that the acting one leaves alone
                acting = [adapter for adapter in module.active_adapters if adapter in module.scaling]
                delta = sum(module.get_delta_weight(adapter).float() for adapter in acting)
                state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype).cpu()
            elif is_four_bit(module) and not name.endswith(".base_layer"):
                state[f"{name}.weight"] = dense_weight(module).cpu()
    return state


def save_policy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str,
    weights: dict[str, torch.Tensor] | None = None,
    adapter: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `folder` as a model that `AutoModelForCausalLM` loads, `card` as its README.md; returns the folder.

    Of a sharded model the `weights` are given (rlhf/sharding.py, `merged`), under LoRA those of the `adapter` too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base, state = merged_state_dict(model) if weights is None else (unwrap(model), weights)
    chat_format = load_chat_format(tokenizer)
    base.generation_config = GenerationConfig(  # Llama 2's chat defaults (recipe sheet, section 8)
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(chat_format.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    base.save_pretrained(folder, state_dict=state)
    tokenizer.chat_template = training_chat_template(chat_format)
    tokenizer.save_pretrained(folder)
    if sentencepiece := sentencepiece_file(tokenizer):  # Llama 2's exact ids need it, and save_pretrained leaves it out
        shutil.copyfile(sentencepiece, folder / "tokenizer.model")
    if isinstance(model, PeftModel):
        lora = adapter or {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
        # of several on one base: the policy's
        model.save_pretrained(folder / "adapter", selected_adapters=["default"], state_dict=lora)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def model_card(
    stage: str, settings: Mapping[str, Any], data: Mapping[str, str], results: Mapping[str, float | int | str]
) -> str:
    """A model card: what made the model (`settings`), from what (`data`: path -> fingerprint), how it measured."""
    base = settings.get("model_name_or_path", "unknown")
    lines = ["---", "library_name: transformers", f"base_model: {base}", f"tags: [rlhf, {stage}]", "---", ""]
    lines += [f"# {stage}", "", f"Made from `{base}` by the `{stage}` stage of a Llama 2-Chat recipe.", ""]
    lines += ["## Measured", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" if isinstance(value, float) else f"| {name} | {value} |"
              for name, value in results.items()]  # fmt: skip
    lines += ["", "## Data", "", "| file | fingerprint |", "|---|---|"]
    lines += [f"| `{name}` | `{fingerprint}` |" for name, fingerprint in data.items()]
    lines += ["", "## Settings", "", "```yaml", yaml.safe_dump(dict(settings), sort_keys=True).rstrip(), "```", ""]
    return "\n".join(lines)


def data_fingerprints(*lists: Sequence[str] | None) -> dict[str, str]:
    """`data_fingerprint` of every file of the lists, by its path."""
    return {path: data_fingerprint(path) for paths in lists for path in paths or ()}


def data_fingerprint(path: str) -> str:
    """SHA-256 of a local file, so that a model card says exactly which data made the model; a Hub name as it is."""
    if not Path(path).is_file():
        return f"hub:{path}"
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
