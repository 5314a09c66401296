"""Questions put to the policy itself, for lists that it writes: every answer with its question."""

from collections.abc import Sequence
from typing import Any

from configs.chat import ChatFormat
from configs.sampling_settings import SamplingSettings
from rlhf.draw import sample_seeds
from rlhf.samples import Engine, Prompt, before_stop_string
from rlhf.shards import without_failed


def ask(
    questions: Sequence[str],
    k: int,
    engine: Engine,
    chat: ChatFormat,
    sampling: SamplingSettings,
    seed: int,
    first: int,
    max_failed_share: float,
) -> list[dict[str, Any]]:
    """k answers to each question, as {"question", "answer", "finished"}.

    `first`: the number of the first answer, of which its seed is made, so that several calls under one seed draw
    differently. Raises UserError where a server failed on more than `max_failed_share` of the questions.
    """
    messages = [[{"role": "user", "content": question}] for question in questions]
    prompts = [Prompt(message, chat.encode_prompt(message), False) for message in messages]
    batch = engine.sample(prompts, k, sampling, sample_seeds(seed, len(prompts) * k, first=first))
    rows: list[dict[str, Any]] = []
    for p, question in enumerate(questions):
        if p in batch.errors:
            rows.append({"error": batch.errors[p]})
            continue
        for i in range(p * k, (p + 1) * k):
            text = before_stop_string(chat.decode_response(batch.response_ids[i]), sampling.stop_strings)
            rows.append({"question": question, "answer": text, "finished": batch.finish_reasons[i] == "stop"})
    return without_failed(rows, max_failed_share, len(questions))
