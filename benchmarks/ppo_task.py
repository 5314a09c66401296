"""What one PPO iteration is measured on: four small models that both sides load, prompts, and the shape of the work.

Responses end as the policy's weights say: one hidden channel of it is a constant that no layer writes to, so its output
layer can hold a bias for single tokens. The padding token is never drawn. The end token is never drawn either (fixed
lengths), or with probability END at every position, whatever stands before it (natural lengths: geometric, as those of
a model that ends its replies where people did).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.hh_pairs import VOCABULARY, hh_pairs
from reward.tree import shared_tokens

EOS, PAD = 2, 3
END = 1 / 24  # probability of the end token: 22 tokens on average where 64 are the most
NEVER = -60.0  # a logit that is not drawn in the age of the universe
CONSTANT = 0.2  # of the channel that no layer writes to
SCORE_WEIGHT = 0.3  # deviation of the reward heads' weights: scores of either sign, so that both models decide
LENGTHS = ("fixed", "natural", "natural responses")
LORA = {"r": 16, "alpha": 32}


@dataclass(frozen=True)
class Task:
    """One iteration of one side, and how often to run it."""

    folder: str  # of the models
    prompts: list[list[int]]
    lengths: str  # one of LENGTHS
    lora: bool
    epochs: int
    iterations: int  # after one to warm up
    max_new_tokens: int
    seed: int
    learning_rate: float = 1e-6
    kl_coef: float = 0.01
    weight_decay: float = 0.1
    bf16: bool = False  # trl takes the same option and leaves it without effect
    token_budget: int = 0  # of our micro-batches; 0: the default
    value_model: str = "helpfulness"  # of ours; trl has no other
    record: str = ""  # file for what the first iteration computed

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str) -> "Task":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def model(self, name: str) -> str:
        """Folder of `policy`, `helpfulness` (also the value model's start) or `safety`."""
        policy = "policy-fixed" if self.lengths == "fixed" else "policy-natural"
        return str(Path(self.folder, policy if name == "policy" else name))


def save_models(folder: Path, hidden_size: int = 256, intermediate_size: int = 688, layers: int = 4) -> None:
    """The policies of both kinds of lengths and two reward models, drawn at random, each with the tokenizer."""
    words = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 1,
        "eos_token_id": EOS, "pad_token_id": PAD, "max_position_embeddings": 2048,
    }  # fmt: skip
    for name, end in (("policy-fixed", 0.0), ("policy-natural", END)):
        torch.manual_seed(0)
        policy = LlamaForCausalLM(LlamaConfig(**sizes))
        set_ends(policy, end)
        policy.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(("helpfulness", "safety")):
        torch.manual_seed(seed + 1)
        reward_model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1))
        torch.nn.init.normal_(reward_model.score.weight, std=SCORE_WEIGHT)
        reward_model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@torch.no_grad()
def set_ends(policy: LlamaForCausalLM, end: float) -> None:
    """Give the end token the probability `end` at every position, and the padding token none."""
    policy.get_input_embeddings().weight[:, 0] = CONSTANT
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    policy.lm_head.weight[[EOS, PAD]] = 0.0
    hidden_TD = policy.model(torch.randint(4, VOCABULARY, (8, 64))).last_hidden_state[:, 16:].flatten(0, 1)
    others_T = (hidden_TD @ policy.lm_head.weight[4:].T).logsumexp(1)
    channel = float(hidden_TD[:, 0].mean())
    wanted = math.log(end / (1 - end)) + float(others_T.mean()) if end else NEVER
    policy.lm_head.weight[EOS, 0] = wanted / channel
    policy.lm_head.weight[PAD, 0] = NEVER / channel


def draw_prompts(count: int, tokens: int, lengths: str, longest: int, seed: int) -> tuple[list[list[int]], str]:
    """(prompts, what they are): for `natural` those of HH-RLHF of at most `longest` tokens, else `tokens` drawn ids."""
    if lengths == "natural":
        pairs, data = hh_pairs(4 * count, seed)
        prompts = [p.chosen_ids[: shared_tokens((p.chosen_ids, p.rejected_ids))].tolist() for p in pairs]
        return [ids for ids in prompts if len(ids) <= longest][:count], data
    rng = np.random.default_rng(seed)
    return rng.integers(4, VOCABULARY, (count, tokens)).tolist(), "drawn"
