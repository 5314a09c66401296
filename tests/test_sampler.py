"""The sampler against model.generate, a teacher-forced pass, the exact distribution, and itself in other batches."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import decoding, shared_prompts, step_graphs
from rlhf import rows as rows_module
from rlhf.draw import draw, sample_seeds, splitmix64, truncate, uniforms
from rlhf.kv_cache import RowCache
from rlhf.sampler import sample
from tests.tiny_models import PAD, STOP, VOCAB, ragged_model, ragged_prompts, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return ragged_model()


def forced_logits(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits before each response token from one plain forward over prompt + response, no cache, no padding."""
    with torch.no_grad():
        return model.eval()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()


def run(model, prompts, k=1, seed=0, **settings):
    other = {
        name: settings.pop(name)
        for name in ("token_budget", "max_rows", "temperatures", "share_prompts")
        if name in settings
    }
    return sample(model, prompts, k, SamplingSettings(**settings), stop_ids=[STOP], pad_id=PAD, seed=seed, **other)


# ---- random numbers and the draw


def test_splitmix64_matches_the_published_first_outputs():
    """The reference C code started at 1234567 (its published test vector)."""
    outputs = [int(splitmix64(torch.tensor(1234567), torch.tensor(i))) % 2**64 for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_fill_the_unit_interval_and_do_not_repeat_between_neighbouring_seeds():
    both = uniforms(torch.tensor(sample_seeds(0, 500))[:, None], torch.arange(200)).double()
    assert abs(torch.corrcoef(both.view(-1, 2).T)[0, 1]) < 0.013  # four standard errors of 100,000 pairs
    assert torch.histc(both[..., 1], bins=10, min=0.0, max=1.0).sub(10_000).abs().max() < 400
    table = both[..., 0]
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
    # Of the likeliest token's 0.5, the others have 0.6, 0.3 and 0.1.
    assert truncate(logits, 0, 1.0, 0.25).isfinite().tolist() == [[True, True, False, True]]
    assert truncate(logits, 0, 1.0, 0.31).isfinite().tolist() == [[False, True, False, True]]


@given(
    st.integers(1, 12), st.sampled_from([0.3, 0.7, 0.95, 1.0]), st.sampled_from([0.0, 0.05, 0.3]), st.integers(0, 10**6)
)
def test_truncate_keeps_what_the_warpers_of_transformers_keep(top_k, top_p, min_p, seed):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) * 2
    expected = logits
    for warper in [TopKLogitsWarper(top_k)] + [TopPLogitsWarper(top_p)] * (top_p < 1) + [MinPLogitsWarper(min_p)]:
        expected = warper(None, expected)
    torch.testing.assert_close(truncate(logits, top_k, top_p, min_p), expected)


def test_draw_is_the_inverse_cdf_with_hand_worked_log_probs():
    """Weights 0, 1/4, 0, 3/4: u below 1/4 is token 1, the rest token 3; tokens of weight 0 are never drawn."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, math.log(3.0)]]).expand(4, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 1.0 - 2.0**-24])[:, None].expand(4, 2)
    token, log_prob, model_log_prob = draw(logits, SamplingSettings(), uniform)
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(log_prob, torch.tensor([0.25, 0.25, 0.75, 0.75]).log())
    torch.testing.assert_close(model_log_prob, log_prob)
    # At temperature 1/2 the weights square: 1 to 9.
    token, log_prob, model_log_prob = draw(
        logits, SamplingSettings(temperature=0.5), torch.tensor([0.0, 0.0, 0.2, 0.2])[:, None].expand(4, 2)
    )
    assert token.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(log_prob, torch.tensor([0.1, 0.1, 0.9, 0.9]).log())
    torch.testing.assert_close(model_log_prob, torch.tensor([0.25, 0.25, 0.75, 0.75]).log())


def test_draw_takes_a_block_and_then_a_token_of_it():
    """Weights 1 2 3 | 4 5 6 | 7 8 by hand: blocks of 3 have 6, 15, 15 of 36; the second number picks inside."""
    logits = torch.arange(1.0, 9.0).log()[None].expand(6, 8)
    # Inside the blocks the borders are 1/6, 3/6; 4/15, 9/15; 7/15.
    uniform = torch.tensor([[0.16, 0.16], [0.16, 0.17], [0.17, 0.59], [0.58, 0.61], [0.59, 0.46], [0.999, 0.47]])
    token, log_prob, _ = draw(logits, SamplingSettings(), uniform)
    assert token.tolist() == [0, 1, 4, 5, 6, 7]
    torch.testing.assert_close(log_prob, torch.tensor([1.0, 2.0, 5.0, 6.0, 7.0, 8.0]).div(36).log())


def test_rounding_seldom_flips_a_draw():
    """20,000 draws from 2,048 tokens with noise of 2e-5 in the logits: one CDF over all tokens flips 22 of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2048, generator=generator) * 2
    noisy = logits + 2e-5 * torch.randn(logits.shape, generator=generator)
    uniform = uniforms(torch.tensor(sample_seeds(0, 20_000)), torch.tensor(3))
    same = draw(logits, SamplingSettings(), uniform)[0] == draw(noisy, SamplingSettings(), uniform)[0]
    assert int((~same).sum()) <= 4


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


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 10, "top_p": 0.9}, {"min_p": 0.2}]
)
def test_log_probs_equal_a_teacher_forced_pass(model, settings):
    prompts = ragged_prompts(6)
    batch = run(model, prompts, k=3, max_new_tokens=16, **settings)
    full = SamplingSettings(**settings)
    assert len(batch) == 18
    for i, response in enumerate(batch.response_ids):
        logits = forced_logits(model, prompts[i // 3], response)
        chosen = torch.tensor(response)[:, None]
        plain = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
        cut = truncate(logits / full.temperature, full.top_k, full.top_p, full.min_p)
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


@pytest.fixture
def forwards(monkeypatch):
    """(rows, tokens a row, columns attended to) of every forward."""
    seen = []
    forward = decoding.forward

    def recorded(model, cache, first, ids, position, column, width, shared=None):
        seen.append((*ids.shape, width))
        return forward(model, cache, first, ids, position, column, width, shared)

    for module in (decoding, rows_module):
        monkeypatch.setattr(module, "forward", recorded)
    return seen


def test_a_prompt_is_computed_once_for_its_samples_and_finished_rows_leave(model, forwards):
    batch = run(model, [*ragged_prompts(3), ragged_prompts(3)[1]], k=20, max_new_tokens=40)
    assert forwards[0][0] == 3, "equal prompts are computed once, too"
    assert all(tokens == 1 for _, tokens, _ in forwards[1:])
    steps = [sum(len(ids) > step + 1 for ids in batch.response_ids) for step in range(len(forwards) - 1)]
    for (rows, *_), needed in zip(forwards[1:], steps, strict=True):
        assert needed <= rows <= needed / (1 - rows_module.IDLE_SHARE) + 1


def test_rows_stay_full_while_samples_wait(model, forwards):
    """32 rows for 400 samples: as long as some wait, hardly a row idles; without refilling, half of them would."""
    prompts = ragged_prompts(40)
    batch = run(model, prompts, k=10, max_new_tokens=40, max_rows=32)
    lengths = [len(ids) for ids in batch.response_ids]
    assert max(lengths) == 40
    assert sum(lengths) / len(lengths) < 20
    decode = [rows for rows, tokens, _ in forwards if tokens == 1 and rows > 1]
    needed = sum(lengths) - len(lengths)  # the first token comes from the prompt, the last is not fed
    assert needed <= sum(decode) <= 1.1 * needed + 32 * 40 / 2  # half of the rows idle while the last 32 end


def test_shorter_prompts_get_more_rows_within_the_budget(model, forwards):
    prompts = [[5] * 90] * 1 + [[6 + i] * 2 for i in range(30)]
    run(model, prompts, k=4, max_new_tokens=10, token_budget=400, share_prompts=False)
    assert max(rows for rows, tokens, _ in forwards if tokens == 1) == 33  # 400 // (2 + 10)
    assert all(rows * width <= 400 for rows, tokens, width in forwards if tokens == 1)
    forwards.clear()
    run(model, prompts, k=4, max_new_tokens=10, token_budget=400)
    # Twice the prompts of full groups: 400 // (10 + 2 * 90 / 4) rows at first, 400 // (10 + 2 * 2 / 4) at the end.
    decoded = [rows for rows, tokens, _ in forwards if tokens == 1]
    assert (decoded[0], max(decoded)) == (7, 36)


def test_prompts_that_are_shared_give_the_samples_of_prompts_that_are_copied(model, forwards):
    """Refilled often, with prompts of many lengths; only the response's own columns are read in a step."""
    prompts, settings = ragged_prompts(30), {"k": 5, "max_new_tokens": 30, "max_rows": 24}
    shared = run(model, prompts, **settings)
    assert max(width for _, tokens, width in forwards if tokens == 1) == 29
    forwards.clear()
    copied = run(model, prompts, **settings, share_prompts=False)
    assert max(width for _, tokens, width in forwards if tokens == 1) > 33
    assert shared.response_ids == copied.response_ids
    for one, other in zip(shared.model_logprobs, copied.model_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_the_two_parts_of_shared_attention_join_to_plain_attention():
    """Float64 softmax over prompt and response together; rows of three prompts, one slot unused, grouped heads."""
    generator = torch.Generator().manual_seed(0)
    slot, length, width = np.array([3, 0, 3, 1, 0, 3]), np.array([4, 7, 5, 2]), np.array([5, 1, 2, 3, 3, 1])
    store = shared_prompts.PromptStore(ragged_model(), 4, 7)
    layer = store.cache.layers[0]
    prompt_key, prompt_value = torch.randn(2, 4, 2, 8, 8, generator=generator)
    layer.key_buffer, layer.value_buffer, layer.is_initialized = prompt_key.clone(), prompt_value.clone(), True
    store.length = length
    query = torch.randn(6, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 6, 2, 5, 8, generator=generator)
    mask = shared_prompts.visible(torch.from_numpy(width - 1)[:, None], 5, torch.float32)
    module = torch.nn.Module()
    module.layer_idx = 0
    shared = store.shared_by(slot, width)
    output, _ = shared_prompts.shared_attention(module, query, key, value, mask, shared_prompts=shared, scaling=0.4)
    for r in range(6):
        for head in range(4):
            group, n = head // 2, length[slot[r]]
            keys = torch.cat([prompt_key[slot[r], group, :n], key[r, group, : width[r]]]).double()
            values = torch.cat([prompt_value[slot[r], group, :n], value[r, group, : width[r]]]).double()
            expected = (keys @ query[r, head, 0].double() * 0.4).softmax(0) @ values
            torch.testing.assert_close(output[r, 0, head].double(), expected, atol=1e-6, rtol=1e-5)
    assert shared.calls == 1


@pytest.mark.parametrize("share", [True, False])
def test_the_cache_has_no_more_rows_than_there_are_samples(model, monkeypatch, share):
    """Rows are filled with zeros when they are made: those that nobody uses cost memory and time all the same."""
    rows = []
    plain = RowCache.__init__
    monkeypatch.setattr(RowCache, "__init__", lambda self, *args: rows.append(args[1]) or plain(self, *args))
    run(model, [[5, 6, 7], [8, 9]], k=3, max_new_tokens=4, share_prompts=share, token_budget=10_000)
    assert rows == [5] * share + [6, 2]  # 1 + 2 * 2 prompts that are kept, responses, prompts fed at once


@pytest.mark.parametrize(("rows", "steps"), [(8, 16), (4, 2), (32, 1)])
def test_prompts_that_take_the_slots_of_others_are_read_anew(model, rows, steps):
    """Nothing ends but by length, so that all rows end at once and the next prompts get the same slots."""
    prompts = [[5 + i % 30] * (1 + i * 7 % 23) for i in range(40)]
    settings = SamplingSettings(max_new_tokens=steps)
    batches = [
        sample(model, prompts, 4, settings, stop_ids=[], pad_id=PAD, max_rows=rows, share_prompts=share)
        for share in (True, False)
    ]
    assert batches[0].response_ids == batches[1].response_ids
    for one, other in zip(batches[0].model_logprobs, batches[1].model_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_models_that_the_sampler_cannot_serve_are_refused(model, monkeypatch):
    for name, value in (("_attn_implementation", "flash_attention_2"), ("alibi", True)):
        with monkeypatch.context() as patch:
            patch.setattr(model.config, name, value, raising=False)
            with pytest.raises(UserError, match="sdpa or eager|ALiBi"):
                run(model, [[5]])
    with pytest.raises(UserError, match="stop_token_ids: 40 is not among the 40 token ids"):
        run(model, [[5]], stop_token_ids=[40])


def test_latent_attention_gets_copied_prompts():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip
    network = DeepseekV3ForCausalLM(config)
    batch = run(network, ragged_prompts(3), k=2, max_new_tokens=6)
    for i, response in enumerate(batch.response_ids):
        logits = forced_logits(network, ragged_prompts(3)[i // 2], response).log_softmax(-1)
        expected = logits.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(batch.model_logprobs[i]).double(), expected, atol=1e-4, rtol=0)


def test_models_whose_attention_is_their_own_get_copied_prompts(model, forwards):
    model.set_attn_implementation("eager")
    eager = run(model, ragged_prompts(4), k=3, max_new_tokens=8)
    model.set_attn_implementation("sdpa")
    assert max(width for _, tokens, width in forwards if tokens == 1) > 9
    assert eager.response_ids == run(model, ragged_prompts(4), k=3, max_new_tokens=8).response_ids


def test_many_prompts_with_one_slow_response_each_find_room(model):
    """The store of prompts starts with room for twice the prompts of full groups, and grows."""
    prompts = [[5 + i, 6] for i in range(30)]
    store = shared_prompts.PromptStore(model, 2, 4)
    stage = shared_prompts.RowCache(model.config, 30, 2)
    decoding.feed(model, stage, prompts, [0] * 30, PAD)
    slots = [store.add(stage, row, 2, 1) for row in range(30)]
    assert slots == list(range(30))
    for row in (0, 17, 29):
        torch.testing.assert_close(store.cache.layers[1].key_buffer[row, :, :2], stage.layers[1].key_buffer[row, :, :2])
    store.release(np.array([4, 9]))
    assert store.add(stage, 3, 2, 1) == 4
    assert store.add(stage, 3, 2, 2) == 9
    store.release(np.array([9]))
    assert store.users[9] == 1
    # Sorted by the rows they have left, each slot still finds its prompt, and another prompt in a slot is noticed.
    slot = np.array([29, 17, 29, 0])
    store.shared_by(slot, np.ones(4, int))
    assert store.cache_row[29] == 0
    assert sorted(store.cache_row[[0, 17]]) == [1, 2]
    for row in (0, 17, 29):
        held = store.cache.layers[1].key_buffer[store.cache_row[row], :, :2]
        torch.testing.assert_close(held, stage.layers[1].key_buffer[row, :, :2])
    before = store.groups
    assert store.shared_by(slot, np.ones(4, int)).groups is before
    store.release(np.array([0]))
    assert store.add(stage, 5, 1, 1) == 0
    assert [part.width for part in store.shared_by(slot, np.ones(4, int)).groups.parts] == [2, 2, 1]


@pytest.mark.parametrize("works", [True, False])
def test_steps_of_fixed_shapes_give_the_same_samples(model, forwards, monkeypatch, works, caplog):
    """Without a GPU: a step is kept instead of being recorded, or recording it fails."""
    settings = {"k": 3, "max_new_tokens": 30, "max_rows": 20, "share_prompts": False}
    plain = run(model, ragged_prompts(30), **settings)
    forwards.clear()

    def record(step):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    monkeypatch.setattr(step_graphs, "record", record)
    monkeypatch.setattr(step_graphs, "COLUMNS", 16)
    monkeypatch.setattr(rows_module, "RECORDED", ("cpu",))
    fixed = run(model, ragged_prompts(30), **settings)
    assert fixed.response_ids == plain.response_ids
    for one, other in zip(fixed.logprobs, plain.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    shapes = {(rows, width) for rows, tokens, width in forwards if tokens == 1 and width > 11}
    assert ({rows for rows, _ in shapes} <= {1, 2, 3, 4, 6, 8, 12, 16, 20}) == works
    assert ({width for _, width in shapes} <= {16, 32, 41}) == works
    assert [record.message.startswith("decode steps cannot be recorded") for record in caplog.records] == (
        [] if works else [True]
    )


def test_no_step_is_recorded_where_weights_stay_in_parts(model, monkeypatch):
    """Each of its forwards waits for other processes, which a recording would leave out."""
    recorded = []
    monkeypatch.setattr(step_graphs, "record", lambda step: recorded.append(step) or step)
    monkeypatch.setattr(rows_module, "RECORDED", ("cpu",))
    settings = {"k": 3, "max_new_tokens": 8, "max_rows": 20, "share_prompts": False}
    run(model, ragged_prompts(4), **settings)
    assert recorded
    recorded.clear()
    monkeypatch.setattr(model.model, "_stays_in_parts", True, raising=False)
    run(model, ragged_prompts(4), **settings)
    assert not recorded


def test_the_ladder_holds_every_number_with_little_waste():
    assert [step_graphs.ladder(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 33, 200, 256, 300)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 48, 256, 256, 384,
    ]  # fmt: skip


def text_model(tokenizer) -> LlamaForCausalLM:
    """Says tokens of plain letters, greedily: the logits of all others are 0."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config(len(tokenizer), initializer_range=0.5))
    plain = torch.tensor([tokenizer.decode([i]).strip().isalpha() for i in range(len(tokenizer))])
    with torch.no_grad():
        model.lm_head.weight[~plain] = 0.0
    return model


def test_responses_end_at_stop_strings_as_those_of_generate_do(model):
    """Greedy, against generate(stop_strings=...), on a byte-level tokenizer whose stop string spans several tokens."""
    tokenizer = tiny_tokenizer()
    network = text_model(tokenizer)
    prompts = [tokenizer.encode(text) for text in ("What is it?", "Lemon", "A longer question, then", "x")]
    settings = {"temperature": 0.0, "max_new_tokens": 24}
    free = sample(network, prompts, 1, SamplingSettings(**settings), stop_ids=[], pad_id=3)
    texts = [tokenizer.decode(ids) for ids in free.response_ids]
    stop = [texts[0][4:7], texts[1][9:11]]
    batch = sample(
        network, prompts, 1, SamplingSettings(**settings, stop_strings=stop), stop_ids=[], pad_id=3, tokenizer=tokenizer
    )
    for prompt, response, reason in zip(prompts, batch.response_ids, batch.finish_reasons, strict=True):
        ids = torch.tensor([prompt])
        expected = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None,
            pad_token_id=3, stop_strings=stop, tokenizer=tokenizer,
        )  # fmt: skip
        assert response == expected[0, len(prompt) :].tolist()
        assert reason == ("stop" if len(response) < 24 else "length")
    assert batch.finish_reasons[0] == batch.finish_reasons[1] == "stop"
    with pytest.raises(ValueError, match="give `tokenizer`"):
        run(model, [[5]], stop_strings=["a"])
    few_words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"the": 0, "cat": 1}, "the")))
    with pytest.raises(UserError, match="stop_strings"):
        sample(network, [[5]], 1, SamplingSettings(stop_strings=["#"]), stop_ids=[], pad_id=3, tokenizer=few_words)


def test_a_stop_string_is_not_looked_for_in_the_prompt():
    tokenizer = tiny_tokenizer()
    network = text_model(tokenizer)
    prompt = tokenizer.encode("ab")
    first = sample(network, [prompt], 1, SamplingSettings(temperature=0.0, max_new_tokens=2), stop_ids=[], pad_id=3)
    text = tokenizer.decode(first.response_ids[0][:1])
    settings = SamplingSettings(temperature=0.0, max_new_tokens=2, stop_strings=["b" + text])
    again = sample(network, [prompt], 1, settings, stop_ids=[], pad_id=3, tokenizer=tokenizer)
    assert again.response_ids == first.response_ids
    assert again.finish_reasons == ["length"]


def test_responses_end_at_further_stop_ids(model):
    prompts = ragged_prompts(8)
    free = run(model, prompts, k=4, max_new_tokens=20, seed=5)
    extra = max({i for ids in free.response_ids for i in ids} - {STOP})
    batch = run(model, prompts, k=4, max_new_tokens=20, seed=5, stop_token_ids=[extra])
    for before, after, reason in zip(free.response_ids, batch.response_ids, batch.finish_reasons, strict=True):
        cut = before[: before.index(extra) + 1] if extra in before else before
        assert after == cut
        assert reason == ("stop" if cut[-1] in (extra, STOP) else "length")


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
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": 1e-40},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"stop_strings": [""]},
        {"stop_token_ids": [-1]},
    ],  # fmt: skip
)
def test_settings_out_of_range_name_the_field(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingSettings(**settings)
