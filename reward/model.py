"""The reward model: a language model whose next-token head gives way to one scalar (Llama 2 paper §3.2.2).

On disk it is a plain `AutoModelForSequenceClassification` folder with `num_labels=1`. In memory the class is a
subclass that differs from the plain one in three points, none of which shows in the folder:

1. The score is read at the last position of the attention mask. The plain class looks for the rightmost token that is
   not padding, and reads one token early where a dialogue ends in a token that also serves as padding.
2. The head stays float32 when the rest is bfloat16, whose 8 bits would round away differences between good responses.
3. It can score several positions of a row, under a mask of its own: the response tree (reward/tree.py).
"""

import contextlib
import inspect
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from configs.chat import sentencepiece_file
from configs.errors import UserError
from reward.adapters import read_adapter
from reward.attention import TREE_ATTENTION, use_tree_attention, whole_mask
from reward.last_layer import hidden_at
from reward.quantized import four_bit_options, is_quantized, keep_layout, plain_model


class ScoreAtEnd:
    """Mixed into a Hugging Face sequence-classification class; see the module's docstring for what it changes."""

    _keep_in_fp32_modules_strict = {"score"}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        ends: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """input_ids, attention_mask [B, T], padded on the right -> `.logits` [B, 1], float32 raw scores r.

        With position_ids [B, T] and ends [B, S], attention_mask is [B, 1, Q, T] bool (True: the key is seen; Q <= T:
        see reward/attention.py), and `.logits` [B, S] are the scores at the positions `ends`.
        """
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        if ends is None:
            ends_B1 = attention_mask.sum(dim=1, keepdim=True) - 1
            is_end_BT = torch.arange(attention_mask.shape[1], device=ends_B1.device) == ends_B1
            hidden_BSD = hidden_at(backbone, input_ids, is_end_BT, attention_mask=attention_mask)[:, None]
        else:
            inputs = tree_layout(self, attention_mask, position_ids)
            hidden_BTD = backbone(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
            hidden_BSD = hidden_BTD[torch.arange(len(ends), device=ends.device)[:, None], ends]
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            scores_BS = self.score(hidden_BSD.float())[..., 0]  # type: ignore[attr-defined]
        return SequenceClassifierOutputWithPast(logits=scores_BS)


def tree_layout(model: Any, visible: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """Inputs of the backbone of `model` (PEFT or not) for rows from reward/tree.py: what a token sees and its place."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = visible
    attention = model.config._attn_implementation
    if TREE_ATTENTION not in attention and mask.shape[2] < mask.shape[3]:
        mask = whole_mask(mask, mask.shape[3])
    if attention == "eager":
        # Eager attention adds its mask: a bool one would hide nothing, without an error.
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return {"attention_mask": mask, "position_ids": position_ids}


def tree_scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Raw scores [B, K] of a batch from `reward.tree.collate_trees`; only where `takes_trees(model)`."""
    layout = {"attention_mask": batch["visible"], "position_ids": batch["position_ids"], "ends": batch["ends"]}
    return model(input_ids=batch["input_ids"], **layout).logits


class BorrowedBackbone(ScoreAtEnd, nn.Module):
    """A reward model that reads the hidden states of a language model's backbone: scores for the memory of a head.

    It scores as that backbone computes: whoever calls it puts the right LoRA adapter to work before.
    """

    def __init__(self, causal: PreTrainedModel, head_1D: Tensor) -> None:
        super().__init__()
        self.config, self.base_model_prefix = causal.config, causal.base_model_prefix
        setattr(self, self.base_model_prefix, getattr(causal, self.base_model_prefix))
        self.score = nn.Linear(head_1D.shape[1], 1, bias=False, device=causal.device, dtype=torch.float32)
        with torch.no_grad():
            self.score.weight.copy_(head_1D)

    @property
    def dtype(self) -> torch.dtype:
        """That of the backbone, which an additive mask has to have."""
        return getattr(self, self.base_model_prefix).dtype


def takes_trees(model: Any) -> bool:
    """Whether `model` can read several responses to a prompt as one row (reward/tree.py).

    It takes attention that follows any mask (sdpa or eager, not flash), the same in every layer, and positions that can
    be given.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(model, model.base_model_prefix)
    config = model.config
    uniform = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        config._attn_implementation.startswith(("sdpa", "eager"))
        and uniform
        and not windowed
        and "position_ids" in inspect.signature(backbone.forward).parameters
    )


def load_reward_model(
    path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A trained reward model, in evaluation mode. UserError where the folder holds no scalar head."""
    return _load(path, reward_config(path), dtype, attn_implementation, new_head=False).eval()


def reward_config(path: str | Path) -> Any:
    """The config of a trained reward model. UserError where it does not name one score."""
    config = _config(path)
    if not _has_scalar_head(config):
        raise UserError(
            f"{path} is not a reward model: its config names {config.architectures} with {config.num_labels} labels, "
            "not one score. Pass the `model` folder that train_reward.py wrote, or another sequence-classification "
            "model with num_labels 1."
        )
    return config


def create_reward_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    four_bit_device: torch.device | None = None,
) -> PreTrainedModel:
    """A reward model to train, from a language model (new head) or from an earlier reward model (its head kept).

    The new head is drawn from N(0, 1/sqrt(d + 1)), d = hidden size, which makes first scores of order one. Dropout is
    off throughout. With `four_bit_device` the linear layers but the head are quantised and lie there.
    UserError where the tokenizer does not fit the model or has no padding token of its own.
    """
    check_padding_token(tokenizer, path)
    config = _config(path)
    new_head = not _has_scalar_head(config)
    config.num_labels = 1
    for name in [name for name in vars(config) if name.endswith(("dropout", "pdrop"))]:
        setattr(config, name, 0.0)
    quantization = {} if four_bit_device is None else four_bit_options(dtype, four_bit_device)
    model = _load(path, config, dtype, attn_implementation, new_head, **quantization)
    keep_layout(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # A padding token added to a model that had none. Padding is masked, so what its row holds does not matter.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    if new_head:
        weight = model.score.weight
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
        with torch.no_grad():
            weight.copy_(drawn)
    return model


def check_padding_token(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """UserError unless the tokenizer's padding token exists and ends no dialogue."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == eos:
        fault = (
            "has no padding token"
            if pad is None
            else f"uses its end-of-text token ({tokenizer.eos_token!r}) as padding"
        )
        raise UserError(
            f"the tokenizer of {path} {fault}. A score is read at the last real token, so padding needs its own: "
            "tokenizer.add_special_tokens({'pad_token': '<pad>'}), then save the tokenizer into the model folder."
        )


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: list[str] | None,
    adapter_path: str | None = None,
) -> nn.Module:
    """LoRA around the backbone, the scalar head trained in full, in float32. `target_modules` None: all linear ones.

    With `adapter_path` it starts as a copy of that adapter of the same base, in its shape; its scalar head is taken
    over where it has one.
    """
    from peft import LoraConfig, TaskType, get_peft_model, set_peft_model_state_dict

    weights, head_1D = None, None
    if adapter_path is None:
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=target_modules or "all-linear")
    else:
        config, weights, head_1D = read_adapter(adapter_path, model.name_or_path, "adapter_path")
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = ["score"]  # without it the random head would stay frozen, without an error
    config.lora_dropout, config.inference_mode = dropout, False
    new_head_1D = model.score.weight.detach().clone()
    tuned = get_peft_model(model, config)
    if weights is not None:
        head = {"base_model.model.score.weight": new_head_1D if head_1D is None else head_1D}
        set_peft_model_state_dict(tuned, weights | head)
    return tuned


def save_reward_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, card: str) -> None:
    """Write the plain folder: config, safetensors, tokenizer, README.md. LoRA is merged and kept in adapter/ too.

    4-bit weights are written as what they stand for, in the dtype they were quantised from. Merging changes `model`:
    use it for nothing else afterwards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        model = plain_model(model) if is_quantized(model) else model.merge_and_unload()
    model.config.reward_input_format = "chat"  # read by reward/any_model.py; other programs pass it over
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (sentencepiece := sentencepiece_file(tokenizer)) is not None:  # save_pretrained leaves it behind
        shutil.copy(sentencepiece, folder / sentencepiece.name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _config(path: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path: no Hugging Face model at {path} ({str(error).splitlines()[0]}). "
            "Give a folder with a config.json, or a Hub name."
        ) from error


def _has_scalar_head(config: Any) -> bool:
    return config.num_labels == 1 and any("SequenceClassification" in name for name in config.architectures or [])


def _load(
    path: str | Path,
    config: Any,
    dtype: torch.dtype,
    attn_implementation: str,
    new_head: bool,
    **quantization: Any,
) -> PreTrainedModel:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{path}: transformers has no sequence-classification class for model type {config.model_type!r}"
        )
    plain = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    # The subclass keeps the plain name, because save_pretrained writes it into config.json.
    ours: Any = type(plain.__name__, (ScoreAtEnd, plain), {"__module__": plain.__module__})
    try:
        with _no_load_report():
            model, report = ours.from_pretrained(
                path,
                output_loading_info=True,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,  # a .bin file is a pickle: loading one can run code
                **quantization,
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no weights can be loaded: {str(error).splitlines()[0]}") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{path}: {plain.__name__} has no linear head called `score`; decoder-only models have one")
    missing = [name for name in report["missing_keys"] if not (new_head and name.startswith("score."))]
    if missing:
        raise UserError(f"{path}: the weights lack {', '.join(sorted(missing)[:3])}; scores would be random")
    model.score.float()
    use_tree_attention(model)
    return model


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Hide the table of missing and unexpected weights: one head out and another in is the intent."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
