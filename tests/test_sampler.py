"""The sampler against model.generate, a teacher-forced pass, the exact distribution, and itself in other batches."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import decoding
from rlhf.draw import draw, sample_seeds, splitmix64, truncate, uniforms
from rlhf.sampler import DialogueSession, sample

VOCAB, STOP, PAD = 40, 2, 3


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # wide enough that the next token depends on the history
        bos_token_id=1,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 3  # so that greedy responses, too, end at different lengths
    return model


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def forced_logits(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits before each response token from one plain forward over prompt + response, no cache, no padding."""
    with torch.no_grad():
        return model.eval()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()


def run(model, prompts, k=1, seed=0, **settings):
    other = {name: settings.pop(name) for name in ("token_budget", "max_rows", "temperatures") if name in settings}
    return sample(model, prompts, k, SamplingSettings(**settings), stop_ids=[STOP], pad_id=PAD, seed=seed, **other)


# ---- random numbers and the draw


def test_splitmix64_matches_the_published_first_outputs():
    """The reference C code started at 1234567 (its published test vector)."""
    outputs = [int(splitmix64(torch.tensor(1234567), torch.tensor(i))) % 2**64 for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_fill_the_unit_interval_and_do_not_repeat_between_neighbouring_seeds():
    table = uniforms(sample_seeds(0, 500), 200).double()
    assert table.min() >= 0.0
    assert table.max() < 1.0
    counts = torch.histc(table, bins=10, min=0.0, max=1.0)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert len(set(sample_seeds(0, 500)) | set(sample_seeds(1, 500))) == 1000
    assert sample_seeds(5, 10)[4:] == sample_seeds(5, 6, first=4)


def test_truncate_keeps_the_hand_worked_tokens():
    """Shares 0.5, 0.3, 0.15, 0.05: top-p 0.8 is reached by the second, top-p 0.81 needs the third."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert truncate(logits, 0, 0.79).isfinite().tolist() == [[False, True, False, True]]
    assert truncate(logits, 0, 0.81).isfinite().tolist() == [[True, True, False, True]]
    assert truncate(logits, 1, 1.0).isfinite().tolist() == [[False, True, False, False]]
    assert truncate(logits, 0, 1e-6).isfinite().tolist() == [[False, True, False, False]]


def test_draw_is_the_inverse_cdf_with_hand_worked_log_probs():
    """Weights 0, 1/4, 0, 3/4: u below 1/4 is token 1, the rest token 3; tokens of weight 0 are never drawn."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, math.log(3.0)]]).expand(4, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 1.0 - 2.0**-24])
    token, log_prob, model_log_prob = draw(logits, SamplingSettings(), uniform)
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(log_prob, torch.tensor([0.25, 0.25, 0.75, 0.75]).log())
    torch.testing.assert_close(model_log_prob, log_prob)
    # At temperature 1/2 the weights square: 1 to 9.
    token, log_prob, model_log_prob = draw(
        logits, SamplingSettings(temperature=0.5), torch.tensor([0.0, 0.0, 0.2, 0.2])
    )
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(log_prob, torch.tensor([0.1, 0.1, 0.9, 0.9]).log())
    torch.testing.assert_close(model_log_prob, torch.tensor([0.25, 0.25, 0.75, 0.75]).log())


# ---- sample()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_generate_token_for_token(model, attention):
    prompts = ragged_prompts(12)
    model.set_attn_implementation(attention)
    batch = run(model, prompts, temperature=0.0, max_new_tokens=6)
    for prompt, response, reason in zip(prompts, batch.response_ids, batch.finish_reasons, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert response == expected[0, len(prompt) :].tolist()
        assert reason == ("stop" if response[-1] == STOP else "length")
    model.set_attn_implementation("sdpa")
    assert {"stop", "length"} == set(batch.finish_reasons), "the prompts must exercise both endings"


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 10, "top_p": 0.9}])
def test_log_probs_equal_a_teacher_forced_pass(model, settings):
    prompts = ragged_prompts(6)
    batch = run(model, prompts, k=3, max_new_tokens=16, **settings)
    full = SamplingSettings(**settings)
    assert len(batch) == 18
    for i, response in enumerate(batch.response_ids):
        logits = forced_logits(model, prompts[i // 3], response)
        chosen = torch.tensor(response)[:, None]
        plain = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
        cut = truncate(logits / full.temperature, full.top_k, full.top_p)
        drawn = cut.log_softmax(-1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(torch.tensor(batch.model_logprobs[i]).double(), plain, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(batch.logprobs[i]).double(), drawn, atol=1e-4, rtol=0)


def test_each_of_the_k_samples_has_its_own_temperature(model):
    prompts = ragged_prompts(6)
    both = run(model, prompts, k=2, max_new_tokens=16, top_p=0.9, temperatures=[0.7, 1.4])
    for side, temperature in enumerate((0.7, 1.4)):
        settings = SamplingSettings(temperature, 0.9, 0, 16)
        alone = sample(model, prompts, 1, settings, stop_ids=[STOP], pad_id=PAD, seed=both.seeds[side::2])
        assert alone.response_ids == both.response_ids[side::2]
        for one, other in zip(alone.logprobs, both.logprobs[side::2], strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert both.response_ids[::2] != both.response_ids[1::2]
    for wrong in ([0.7], [0.7, 0.0]):
        with pytest.raises(ValueError, match="give 2 numbers above 0"):
            run(model, prompts, k=2, temperatures=wrong)


def test_samples_follow_the_model_distribution(model):
    """4,000 samples of two tokens: the first token and the second after the commonest first, against exact shares."""
    prompt = [5, 9, 11]
    batch = run(model, [prompt], k=4000, max_new_tokens=2, temperature=1.0)
    first = torch.tensor([ids[0] for ids in batch.response_ids])
    share = forced_logits(model, prompt, [0])[0].softmax(-1)
    assert chi_square_p(first, share) > 1e-3
    top = int(torch.bincount(first).argmax())
    second = torch.tensor([ids[1] for ids in batch.response_ids if ids[0] == top and top != STOP])
    assert len(second) > 300
    assert chi_square_p(second, forced_logits(model, prompt, [top, 0])[1].softmax(-1)) > 1e-3


def chi_square_p(tokens: torch.Tensor, share: torch.Tensor) -> float:
    """Upper tail probability of Pearson's statistic, tokens expected fewer than five times pooled."""
    observed, expected = torch.bincount(tokens, minlength=VOCAB).double(), share * len(tokens)
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(1 - torch.special.gammainc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2))


def test_a_sample_depends_on_its_own_seed_only(model, monkeypatch):
    prompts = ragged_prompts(10)
    whole = run(model, prompts, k=4, max_new_tokens=16, seed=7)
    one_by_one = run(model, prompts, k=4, max_new_tokens=16, seed=7, max_rows=3)
    monkeypatch.setattr(decoding, "CPU_FEED_TOKENS", 20)  # the prompts are fed in several forwards
    tight = run(model, prompts, k=4, max_new_tokens=16, seed=7, token_budget=150)
    assert whole.response_ids == one_by_one.response_ids == tight.response_ids
    # The seeds it reports reproduce a part of it alone.
    part = sample(model, prompts[3:4], 2, SamplingSettings(max_new_tokens=16), stop_ids=[STOP], pad_id=PAD,
                  seed=whole.seeds[13:15])  # fmt: skip
    assert part.response_ids == whole.response_ids[13:15]
    assert run(model, prompts, k=4, max_new_tokens=16, seed=8).response_ids != whole.response_ids
    assert len({tuple(ids) for ids in whole.response_ids}) > 30


def test_a_prompt_is_computed_once_for_its_samples_and_finished_rows_leave(model, monkeypatch):
    widths = []
    forward = decoding._forward

    def recorded(model, cache, ids, *rest):
        widths.append(ids.shape)
        return forward(model, cache, ids, *rest)

    monkeypatch.setattr(decoding, "_forward", recorded)
    batch = run(model, ragged_prompts(3), k=20, max_new_tokens=40)
    assert widths[0][0] == 3
    assert all(shape[1] == 1 for shape in widths[1:])
    steps = [sum(len(ids) > step + 1 for ids in batch.response_ids) for step in range(len(widths) - 1)]
    for (rows, _), needed in zip(widths[1:], steps, strict=True):
        assert needed <= rows <= needed / (1 - decoding.SHRINK_SHARE) + 1


def test_modes_come_back_and_lora_is_active(model):
    from peft import LoraConfig, get_peft_model

    plain = run(model, ragged_prompts(4), temperature=0.0, max_new_tokens=8).response_ids
    model.train()
    model.model.layers[0].eval()
    run(model, ragged_prompts(1), max_new_tokens=2)
    layers = model.model.layers
    assert (model.training, layers[0].training, layers[1].training) == (True, False, True)

    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted = run(lora, ragged_prompts(4), temperature=0.0, max_new_tokens=8).response_ids
    assert adapted != plain
    with lora.disable_adapter():
        assert run(lora, ragged_prompts(4), temperature=0.0, max_new_tokens=8).response_ids == plain


def test_too_long_or_empty_prompts_are_refused_before_sampling(model):
    with pytest.raises(UserError, match="prompt 1: 250 tokens .* 10 exceed the model's 256 positions"):
        run(model, [[5], [5] * 250], max_new_tokens=10)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        run(model, [[]])
    assert len(run(model, [[5] * 254], max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_name_the_field(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingSettings(**settings)


# ---- DialogueSession


@pytest.mark.parametrize("feed_tokens", [1024, 40])
def test_session_equals_prefilling_the_whole_dialogue(model, monkeypatch, feed_tokens):
    """Ragged turns, greedy: each reply equals generate on the full history; cut replies are closed by the stop id."""
    monkeypatch.setattr(decoding, "CPU_FEED_TOKENS", feed_tokens)
    settings = SamplingSettings(temperature=0.0, max_new_tokens=7)
    session = DialogueSession(model, PAD, [STOP], max_length=256)
    histories: list[list[int]] = [[] for _ in range(9)]
    reasons = set()
    for turn in range(8):
        new = [[1, *ids] for ids in ragged_prompts(9, seed=turn)]
        replies = session.reply(new, settings)
        for history, ids, reply in zip(histories, new, replies, strict=True):
            history.extend(ids)
            prompt = torch.tensor([history])
            expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=7)
            assert reply == expected[0, len(history) :].tolist()
            history.extend(reply if reply[-1] == STOP else [*reply, STOP])
            reasons.add(reply[-1] == STOP)
    assert reasons == {True, False}
    assert session._mask.shape[-1] < 2 * max(map(len, histories)) + 40, "holes must be squeezed out"


def test_session_squeezes_out_holes(model):
    """Each turn another dialogue has the long message, so most of every row is holes; the replies stay exact."""
    settings = SamplingSettings(temperature=0.0, max_new_tokens=3)
    session = DialogueSession(model, PAD, [STOP], max_length=256)
    histories: list[list[int]] = [[] for _ in range(6)]
    for turn in range(12):
        new = [[5 + (turn + d) % 30] * (25 if turn % 6 == d else 1) for d in range(6)]
        replies = session.reply(new, settings)
        for history, ids, reply in zip(histories, new, replies, strict=True):
            history.extend(ids)
            prompt = torch.tensor([history])
            expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3)
            assert reply == expected[0, len(history) :].tolist()
            history.extend(reply if reply[-1] == STOP else [*reply, STOP])
    columns, widest = session._mask.shape[-1], max(map(len, histories))
    assert columns <= 3.5 * widest, "without squeezing, 12 turns of 25 + 3 columns would be more"
    assert session._cache is not None
    assert session._cache.filled < 12 * 28 - 60


def test_session_draws_anew_each_turn(model):
    """Logits that ignore the history: only the random numbers can make two turns differ."""
    flat = copy.deepcopy(model)
    torch.nn.init.zeros_(flat.lm_head.weight)
    session = DialogueSession(flat, PAD, [STOP], max_length=256)
    settings = SamplingSettings(max_new_tokens=12)
    first, second = session.reply([[5], [5]], settings, seed=3), session.reply([[5], [5]], settings, seed=3)
    assert len({tuple(ids) for ids in first + second}) == 4
    again = DialogueSession(flat, PAD, [STOP], max_length=256)
    assert again.reply([[5], [5]], settings, seed=3) == first


def test_session_refuses_a_dialogue_past_its_limit(model):
    settings = SamplingSettings(max_new_tokens=8)
    session = DialogueSession(model, PAD, [STOP], max_length=40)
    session.reply([[5], [5]], settings)
    session.reply([[5], [5]], settings)
    with pytest.raises(UserError, match="dialogue 0, turn 3: .* the limit is 40"):
        session.reply([[5] * 30, [5]], settings)
