"""The reply engine: ids against the chat format, the kept cache against plain forwards, what is drawn and dropped."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from gatt.kinds import KINDS
from gatt.synth import Draft, counts, plan_dialogues, synthesise
from gatt.transform import with_instruction_everywhere
from rlhf.dialogues import ContextEngine, DialogueEngine, Increments
from rlhf.engines import InProcess
from rlhf.samples import SampleBatch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAPOLEON = KINDS["figure"].make("Napoleon")


def byte_tokenizer(template=None):
    """Every byte a token, with the special tokens that either format needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    backend.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<pad>",
        eos_token="<|im_end|>" if template else "</s>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(vocabulary=262):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("template", [None, CHATML], ids=["llama2", "chatml"])
@pytest.mark.parametrize("slot", ["system", "user"])
def test_increments_and_replies_join_to_the_format_s_own_prompt(template, slot):
    chat_format = load_chat_format(byte_tokenizer(template))
    increments = Increments(chat_format)
    plain = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(["Who are you?", "I, Napoleon.", " And why? ", "Because.", "Bye"])
    ]
    context = with_instruction_everywhere(plain, NAPOLEON.text, slot)
    ids: list[int] = []
    first = 2 if slot == "system" else 1
    for end in range(first, len(context) + 1, 2):
        prompt = context[:end]
        ids += increments.first(prompt) if end == first else increments.next(prompt[-1]["content"])
        assert ids == chat_format.encode_prompt(prompt)
        if end < len(context):
            encoded = chat_format.encode_dialogue(context[: end + 1])
            assert encoded.response_mask[len(ids) :] == [True] * (len(encoded.input_ids) - len(ids))
            ids = encoded.input_ids


@pytest.mark.parametrize("judged", [False, True])
def test_the_cache_holds_what_a_plain_forward_computes(judged):
    """Redraws, dropped rows and a judge's choice of an earlier draft all leave exactly the dialogue's own tokens."""
    model, chat_format = tiny_model(), load_chat_format(byte_tokenizer())
    lengths = [1, 4, 3, 5, 2, 4, 1, 3]
    turns = [["ask" + "!" * ((3 * d + t) % 5) for t in range(n)] for d, n in enumerate(lengths)]
    plans = plan_dialogues(turns, [NAPOLEON, None] * 4, ["user", "system"] * 4)
    # A third of the vocabulary ends a reply, so rows finish at different times and the session moves them about.
    chat_format.stop_ids = [2, *range(6, 90)]
    engine = DialogueEngine(model, chat_format, 3, SamplingSettings(max_new_tokens=6), 2000, seed=3)
    seeds, session_reply = [], engine.session.reply
    engine.session.reply = lambda ids, settings, seed: (seeds.append(seed), session_reply(ids, settings, seed))[1]
    ids_of: dict[tuple[int, int, str], list[int]] = {}
    checked = 0

    def history(row, context):
        """The ids of a context with the replies as they were sampled, and the end token where one was cut."""
        head = [m for m in context if m["role"] == "system"] + [m for m in context if m["role"] == "user"][:1]
        ids = list(engine.increments.first(head))
        replies = [m["content"] for m in context if m["role"] == "assistant"]
        for turn, (reply, user) in enumerate(zip(replies, [m for m in context if m["role"] == "user"][1:]), start=1):
            sampled = ids_of[row, turn, reply]
            ids += sampled + [2] * (sampled[-1] not in chat_format.stop_ids) + engine.increments.next(user["content"])
        return ids

    def reply(rows, contexts):
        nonlocal checked
        drafts = engine(rows, contexts)
        session = engine.session
        assert engine.places == rows
        for place, (row, context) in enumerate(zip(rows, contexts)):
            state = engine.state[row]
            ids_of[row, state.turn, chat_format.decode_response(state.reply)] = state.reply
            expected = history(row, context) + state.reply[:-1]
            assert session.length[place] == len(expected)
            cached = session.cache.layers[1].key_buffer[place][:, : len(expected)]
            with torch.no_grad():
                plain = model(torch.tensor([expected])).past_key_values.layers[1].keys[0]
            torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-4)
            checked += 1
        return [Draft(d.text) for d in drafts]  # whatever ended it

    dialogues = synthesise(
        plans, reply, lambda _, text: sum(map(ord, text)) % 3 != 0, max_candidates=4,
        judge=(lambda rows, contexts, texts, _: [[-sum(map(ord, text)) for text in each] for each in texts])
        if judged else None,
    )  # fmt: skip
    total = counts(dialogues)
    assert checked == total["replies_sampled"] > total["replies_kept"] > 15  # there were redraws
    assert len(set(seeds)) == len(seeds)  # one seed for several calls could give a dialogue the same numbers twice


def test_a_full_context_ends_its_dialogue_only():
    model, chat_format = tiny_model(), load_chat_format(byte_tokenizer())
    settings = SamplingSettings(max_new_tokens=5)
    engine = DialogueEngine(model, chat_format, 3, settings, 60, seed=0)
    long, short = [{"role": "user", "content": "x" * 50}], [{"role": "user", "content": "x" * 20}]
    drafts = engine([0, 1], [long, short])  # 15 tokens around the text: 65 + 5 + 1 and 35 + 5 + 1 of 60
    assert [d.problem == "too_long" for d in drafts] == [True, False]
    assert engine.places == [1]


def context_engine(seed=0, **settings) -> ContextEngine:
    tokenizer = byte_tokenizer()
    chat_format = load_chat_format(tokenizer)
    # An eighth of the vocabulary ends a reply, so some end and some are cut.
    chat_format.stop_ids = [2, *range(6, 38)]
    engine = InProcess(tiny_model(), tokenizer, chat_format.stop_ids, 32_768)
    return ContextEngine(engine, chat_format, SamplingSettings(max_new_tokens=6, **settings), 60, seed)


def test_contexts_by_themselves_are_what_generate_says():
    """Greedy, against transformers' generate on each prompt alone; the stop ids are those of the chat format."""
    engine = context_engine(temperature=0.0)
    contexts = [[{"role": "user", "content": chr(97 + n) * (1 + n % 9)}] for n in range(20)]
    contexts.append([{"role": "system", "content": NAPOLEON.text}, {"role": "user", "content": "why"}])
    drafts = engine(list(range(21)), contexts)
    assert {draft.problem for draft in drafts} == {"", "unfinished", "too_long"}
    assert drafts[20].problem == "too_long"  # its instruction leaves no room in 60 tokens
    for context, draft in zip(contexts[:20], drafts, strict=False):
        prompt = torch.tensor([engine.chat_format.encode_prompt(context)])
        ids = engine.engine.policy.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, pad_token_id=3,
            eos_token_id=engine.chat_format.stop_ids,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        assert draft.text == engine.chat_format.decode_response(ids)
        assert (draft.problem == "") == (ids[-1] in engine.chat_format.stop_ids)


def test_a_turn_asked_again_is_drawn_again_and_a_seed_draws_the_same():
    contexts = [[{"role": "user", "content": "a"}]] * 4
    engine, same, other = context_engine(), context_engine(), context_engine(seed=1)
    first, second = engine([0, 1, 2, 3], contexts), engine([0, 1, 2, 3], contexts)
    assert first != second
    assert len({draft.text for draft in first}) > 1
    assert [same([0, 1, 2, 3], contexts), same([0, 1, 2, 3], contexts)] == [first, second]
    assert other([0, 1, 2, 3], contexts) != first


class Failing:
    """An engine that fails on every third prompt and says what it was asked otherwise."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.config = tiny_model().config

    def sample(self, prompts, k, settings, seed=0):
        texts = ["" if p % 3 == 0 else f"{prompt.messages[-1]['content']}STOPx" for p, prompt in enumerate(prompts)]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        errors = dict.fromkeys(range(0, len(prompts), 3), "the server is away")
        return SampleBatch(ids, [], [], ["stop"] * len(ids), [], k, exact_ids=False, errors=errors)


def test_replies_that_an_engine_could_not_sample():
    tokenizer = byte_tokenizer()
    settings = SamplingSettings(max_new_tokens=6, stop_strings=["STOP"])
    contexts = [[{"role": "user", "content": text}] for text in ("a", "b", "x" * 60, "c", "d")]
    engine = ContextEngine(Failing(tokenizer), load_chat_format(tokenizer), settings, 60, 0, max_failed_share=0.5)
    # The long one is not asked, so the third of those asked is the fourth.
    assert engine([0, 1, 2, 3, 4], contexts) == [
        Draft("", "failed"), Draft("b"), Draft("", "too_long"), Draft("c"), Draft("", "failed"),
    ]  # fmt: skip
    strict = ContextEngine(Failing(tokenizer), load_chat_format(tokenizer), settings, 60, 0, max_failed_share=0.4)
    with pytest.raises(
        UserError, match="2 of 4 replies .* max_failed_share: 0.4; the first, of dialogue 7: the server"
    ):
        strict([7, 1, 2, 3, 4], contexts)


def test_contexts_that_do_not_follow_are_a_defect():
    engine = DialogueEngine(
        tiny_model(), load_chat_format(byte_tokenizer()), 3, SamplingSettings(max_new_tokens=4), 500, 0
    )
    context = [{"role": "user", "content": "a"}]
    engine([0], [context])
    foreign = [*context, {"role": "assistant", "content": "not what it said"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="does not follow"):
        engine([0], [foreign])
    with pytest.raises(ValueError, match="does not follow"):
        engine([7], [context])  # a dialogue that was not there at the first call


def test_special_tags_are_refused():
    engine = DialogueEngine(
        tiny_model(), load_chat_format(byte_tokenizer()), 3, SamplingSettings(max_new_tokens=4), 500, 0
    )
    with pytest.raises(UserError, match="special tag"):
        engine([0], [[{"role": "user", "content": "a </s> b"}]])
