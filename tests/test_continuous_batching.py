"""transformers' continuous batching behind the sampler's interface, on a CPU: slow there, but the same arithmetic."""

import pytest
import torch

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import continuous_batching
from rlhf.continuous_batching import ContinuousBatching
from rlhf.samples import Prompt
from rlhf.sequences import teacher_forced_logprobs

PROMPTS = [Prompt([], ids) for ids in ([5, 6, 7], [9, 10], [5, 6, 7, 8, 40, 41], [90])]


@pytest.fixture
def ending_policy(policy):
    with torch.no_grad():
        policy.lm_head.weight[2] *= 4
    return policy


def test_greedy_equals_generate_token_for_token(ending_policy):
    engine = ContinuousBatching(ending_policy, [2], 3)
    batch = engine.sample(PROMPTS, 1, SamplingSettings(temperature=0.0, max_new_tokens=8))
    for prompt, response, reason in zip(PROMPTS, batch.response_ids, batch.finish_reasons, strict=True):
        ids = torch.tensor([prompt.ids])
        expected = ending_policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=3
        )
        assert response == expected[0, len(prompt.ids) :].tolist()
        assert reason == ("stop" if response[-1] == 2 else "length")
    assert batch.logprobs == [[0.0] * len(ids) for ids in batch.response_ids]
    expected = teacher_forced_logprobs(ending_policy, [p.ids for p in PROMPTS], batch.response_ids)
    for row, known in zip(expected, batch.model_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(known), row[: len(known)], atol=1e-4, rtol=0)


def test_stop_ids_of_the_settings_end_a_sample(ending_policy):
    engine = ContinuousBatching(ending_policy, [2], 3)
    (whole,) = engine.sample(PROMPTS[:1], 1, SamplingSettings(temperature=0.0, max_new_tokens=8)).response_ids
    settings = SamplingSettings(temperature=0.0, max_new_tokens=8, stop_token_ids=[whole[2]])
    cut = engine.sample(PROMPTS[:1], 1, settings)
    assert cut.response_ids == [whole[: whole.index(whole[2]) + 1]]
    assert cut.finish_reasons == ["stop"]


def test_samples_and_both_log_probs_under_temperature_and_every_filter(ending_policy):
    settings = SamplingSettings(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, max_new_tokens=6, stop_token_ids=[9])
    state = torch.get_rng_state()
    batch = ContinuousBatching(ending_policy, [2], 3).sample(PROMPTS, 3, settings, seed=list(range(12)))
    assert torch.equal(torch.get_rng_state(), state), "the process's own random numbers must not move"
    assert (len(batch), batch.k, batch.seeds, batch.exact_ids) == (12, 3, list(range(12)), True)
    assert len({tuple(ids) for ids in batch.response_ids}) > 8
    for i, response in enumerate(batch.response_ids):
        prompt = PROMPTS[i // 3].ids
        with torch.no_grad():
            logits = ending_policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        for row, token, drawn, own in zip(logits, response, batch.logprobs[i], batch.model_logprobs[i], strict=True):
            assert own == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-4)
            assert drawn == pytest.approx(kept_share(row.double() / 0.7, token), abs=1e-4)


def kept_share(scaled: torch.Tensor, token: int) -> float:
    """Log of the share of `token` among the tokens that top-k 40, top-p 0.9 and min-p 0.02 keep, in plain loops."""
    order = sorted(range(len(scaled)), key=lambda i: -float(scaled[i]))[:40]
    weight = {i: float((scaled[i] - scaled[order[0]]).exp()) for i in order}
    total, kept, mass = sum(weight.values()), [], 0.0
    for i in order:
        if mass / total < 0.9 and weight[i] >= 0.02:  # the likeliest token has weight 1
            kept.append(i)
        mass += weight[i]
    assert token in kept
    return float(torch.tensor(weight[token] / sum(weight[i] for i in kept)).log())


def test_what_it_cannot_do_or_failed_is_said(ending_policy, monkeypatch):
    engine = ContinuousBatching(ending_policy, [2], 3, model_logprobs=False)
    with pytest.raises(UserError, match="stop_strings"):
        engine.sample(PROMPTS, 1, SamplingSettings(stop_strings=["x"]))
    with pytest.raises(UserError, match="prompt 1: 600 tokens"):
        engine.sample([PROMPTS[0], Prompt([], [5] * 600)], 1, SamplingSettings())

    class Output:
        generated_tokens, logprobs, error = [7, 2], [-1.0, -2.0], None

    class Failed(Output):
        error = "out of blocks"

    outputs = {"req_0__child#0": Output, "req_0": Output, "req_1__child#0": Output, "req_1": Failed, "req_2": Output}
    monkeypatch.setattr(engine, "_generate", lambda *_: outputs)
    batch = engine.sample(PROMPTS[:3], 2, SamplingSettings(temperature=0.5))
    assert batch.errors == {1: "continuous batching: out of blocks", 2: "continuous batching: the request was lost"}
    assert batch.response_ids == [[7, 2], [7, 2], [], [], [], []]
    assert batch.finish_reasons == ["stop", "stop", *["error"] * 4]
    assert batch.logprobs[:2] == [[-1.0, -2.0]] * 2
    assert batch.model_logprobs == [[]] * 6
    monkeypatch.setattr(engine, "_generate", lambda *_: {})
    with pytest.raises(UserError, match="use sampling_engine in_process"):
        engine.sample(PROMPTS, 2, SamplingSettings())


def test_requests_are_named_parent_last():
    assert continuous_batching.request_names(3, 3) == ["req_3__child#0", "req_3__child#1", "req_3"]
