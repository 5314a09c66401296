"""The embedded base model: a small Llama (RMSNorm, SwiGLU, RoPE, grouped-query attention) and tokenizer, from scratch.

    python -m rlhf.simulation.base --output_dir rlhf/simulation/base_model --tokens 6000000 9000000

makes the folder that the repository carries, on one thread. Documents come from `rlhf.simulation.corpus`; nothing in
them is in a chat format, so the base model does not know how to talk.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.hardware import attend_in_float32
from rlhf.simulation.corpus import ALL_WORDS, documents
from rlhf.simulation.families import FAMILIES
from rlhf.simulation.people import ask, draw_request, good_answer

LONGEST, BATCH_TOKENS = 1536, 2048
TOKENS, PEAKS = (6_000_000, 9_000_000), (3e-3, 2e-3)
BASE_MODEL = Path(__file__).parent / "base_model"
# Named, so that which families people ask about can change without another tokenizer and so another base model.
TOKENIZED = tuple(
    FAMILIES[name]
    for name in ("colour", "home", "use", "bigger", "sum", "opposite", "steps", "scary_but_benign", "list")
)
# The tags of the Llama 2 format stay whole pieces of ordinary text; the rest is split as GPT-2 does.
_PIECES = (
    r" ?\[/?INST\]| ?<<SYS>>\n|\n<</SYS>>\n\n"
    r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\[\]<>]+| ?[\[\]<>]|\s+(?!\S)|\s+"
)


def train_tokenizer(vocab_size: int = 2560, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE over documents and dialogues; unk 0, BOS 1, EOS 2, as Llama 2, and a pad token of its own, 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _tokenizer_text(seed: int) -> Iterator[str]:
    yield from islice(documents(seed), 4000)
    yield from islice(documents(seed, interviews=True), 2000)
    yield from (f" {word}" for word in ALL_WORDS for _ in range(200))  # one token each, so that copying one is one step
    rng = random.Random(seed)
    for i in range(3000):  # the tags of the chat format, beside every kind of request and refusal
        request = draw_request(rng, ("helpful", "scary", "risky")[i % 3], evaluation=False, families=TOKENIZED)
        text = ask(rng, request, evaluation=False) or ""
        if i % 5 == 0:
            text = f"<<SYS>>\nAlways be kind.\n<</SYS>>\n\n{text}"
        yield f"[INST] {text} [/INST] {good_answer(rng, request)} "


def new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """About a million parameters: 128 wide, 4 layers, 4 heads that share 2 key-value heads, context 2,048."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.06,  # about 0.7 / sqrt(width): 0.02 is made for wide models and starts slowly here
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, interviews: bool) -> Iterator[torch.Tensor]:
    """Batches of about `tokens` tokens: one document a row between BOS and EOS, rows of like length, padded right.

    A row holds one document, because copying is learnt far sooner without other documents to copy from. LongTensor
    [rows, length].
    """
    stream, rng = documents(seed, interviews), random.Random(seed)
    while True:
        encoded = tokenizer(list(islice(stream, 512)), add_special_tokens=False)["input_ids"]
        rows = sorted(([1, *ids[: LONGEST - 2], 2] for ids in encoded), key=len)
        made = []
        while rows:
            count = max(1, tokens // len(rows[-1]))
            group, rows = rows[-count:], rows[:-count]
            made.append(torch.tensor([row + [3] * (len(group[-1]) - len(row)) for row in group]))
        rng.shuffle(made)
        yield from made


def train(output_dir: Path, tokens: tuple[int, int], seed: int = 0, first_phase: Path | None = None) -> None:
    """Trains tokenizer and model and writes the folder: `tokens` of plain documents, then of documents with interviews.

    Each phase is AdamW 0.9/0.95 with a cosine to 10 % of its peak, as Llama 2 (§2.2). `first_phase` names the folder of
    an earlier run whose first phase is taken over instead of trained again.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed=seed)
    tokenizer.save_pretrained(output_dir)
    model = new_model(len(tokenizer), seed)
    log = output_dir / "training.jsonl"
    if first_phase is None:
        first_phase = output_dir / "first_phase"
        log.unlink(missing_ok=True)
        _phase(model, batches(tokenizer, BATCH_TOKENS, seed + 1, False), tokens[0], PEAKS[0], "plain", log)
        model.save_pretrained(first_phase)
    else:
        model = LlamaForCausalLM.from_pretrained(first_phase, use_safetensors=True)
    _phase(model, batches(tokenizer, BATCH_TOKENS, seed + 2, True), tokens[1], PEAKS[1], "interviews", log)
    model.save_pretrained(output_dir)


def _phase(
    model: LlamaForCausalLM,
    stream: Iterator[torch.Tensor],
    tokens: int,
    peak: float,
    name: str,
    log: Path,
) -> None:
    """One phase of training, a row of the log every 20 steps."""
    attend_in_float32(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    steps, started = tokens // BATCH_TOKENS, time.time()
    for step in (bar := tqdm(range(steps), desc=f"base model, {name}", unit="step")):
        scale = min(1.0, (step + 1) / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16):  # about 1.7 times float32 where the CPU has the instructions
            logits = model(batch[:, :-1], use_cache=False).logits  # padding on the right: causal, so no mask
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), ignore_index=3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            row = {"phase": name, "step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the simulated world's base model from scratch.")
    parser.add_argument("--output_dir", type=Path, default=BASE_MODEL)
    parser.add_argument("--tokens", type=int, nargs=2, default=TOKENS, help="tokens of the two phases")
    parser.add_argument("--first_phase", type=Path, default=None, help="take the first phase from this model folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output_dir, tuple(arguments.tokens), arguments.seed, arguments.first_phase)
