"""Chat formats: Meta's text and ids, the two guarantees, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from configs.chat import (
    SPECIAL_TAGS,
    ChatFormat,
    ChatFormatError,
    Encoded,
    check_messages,
    load_chat_format,
    sentencepiece_file,
    training_chat_template,
)
from configs.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


HELLO, NICE, BOT = user("Hello!"), assistant("Nice to meet you."), system("You are a helpful chatbot.")
# Recipe sheet, section 8: made with SentencePiece from Meta's tokenizer.model.
HELLO_IDS = [1, 518, 25580, 29962, 15043, 29991, 518, 29914, 25580, 29962]
BOT_HELLO_IDS = [
    *(1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3492, 526, 263, 8444, 13563, 7451, 29889, 13, 29966, 829),
    *(14816, 29903, 6778, 13, 13, 10994, 29991, 518, 29914, 25580, 29962),
]
NICE_IDS = [20103, 304, 5870, 366, 29889, 29871, 2]


@pytest.fixture(scope="module")
def llama2(kit):
    folder = kit / "llama2-tokenizer"
    if not folder.is_dir():
        pytest.skip("no Llama 2 tokenizer")
    return folder


@pytest.fixture(scope="module", params=["AutoTokenizer", "LlamaTokenizer"])
def llama2_tokenizer(llama2, request):
    import transformers

    return getattr(transformers, request.param).from_pretrained(llama2)


def test_llama2_ids_are_the_published_vectors(llama2_tokenizer):
    chat = load_chat_format(llama2_tokenizer)
    assert chat.name == "llama2"
    assert chat.stop_ids == [2]
    assert chat.encode_prompt([HELLO]) == HELLO_IDS
    assert chat.encode_prompt([BOT, HELLO]) == BOT_HELLO_IDS
    assert chat.encode_dialogue([BOT, HELLO, NICE]) == Encoded(BOT_HELLO_IDS + NICE_IDS, [False] * 30 + [True] * 7)
    assert chat.encode_prompt([HELLO, NICE, HELLO]) == HELLO_IDS + NICE_IDS + HELLO_IDS
    assert chat.decode_response(NICE_IDS) == "Nice to meet you."


@pytest.mark.parametrize("text", ["a  b", "tab\there", "two\n\n  lines", "😀 é 中文", "  lead", "ﬁ ① x ", "1  000,5"])
def test_llama2_ids_are_sentencepieces_on_blanks_and_emoji(llama2, llama2_tokenizer, text):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))
    chat = load_chat_format(llama2_tokenizer)
    expected = [1, *reference.encode(f"[INST] {text.strip()} [/INST] {text.strip()} "), 2]
    assert chat.encode_dialogue([user(text), assistant(text)]).input_ids == expected
    with_system = [1, *reference.encode(f"[INST] <<SYS>>\n{text}\n<</SYS>>\n\n{text.rstrip()} [/INST]")]
    assert chat.encode_prompt([system(text), user(text)]) == with_system


def test_a_llama2_vocabulary_that_encodes_otherwise_is_refused(llama2_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    llama2_tokenizer.save_pretrained(tmp_path)  # writes no tokenizer.model
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert sentencepiece_file(converted) is None
    with pytest.raises(ChatFormatError, match="put Meta's tokenizer.model"):
        load_chat_format(converted)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(llama2_tokenizer).read_bytes())
    assert load_chat_format(AutoTokenizer.from_pretrained(tmp_path)).encode_prompt([BOT, HELLO]) == BOT_HELLO_IDS


def test_llama2_text_is_metas(tokenizer):
    chat = load_chat_format(tokenizer)
    # Written out by hand from llama/generation.py: strip() acts on the merged first message, so the blank before U1
    # survives behind a system message, and the system text is not stripped.
    dialogue = [system(" S "), user(" U1 "), assistant(" A1\n"), user("\tU2 ")]
    text = "<s>[INST] <<SYS>>\n S \n<</SYS>>\n\n U1 [/INST] A1 </s><s>[INST] U2 [/INST]"
    assert chat.render(dialogue) == text
    assert tokenizer.decode(chat.encode_prompt(dialogue)) == text
    assert chat.render([user(" U1 "), assistant("A1")]) == "<s>[INST] U1 [/INST] A1 </s>"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today: ' + date_string }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Qwen 3 does: the last reply gets an empty thinking block, and loses it once another turn follows.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = (  # drops the reply of all turns but the last
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS_REASONING = CHATML.replace(
    "m['content'] +", "(m['content'].split('</think>')[-1] if not loop.last else m['content']) +"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def templated(template):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer


def replies(chat, encoded):
    """The runs of trained tokens, decoded with special tokens."""
    groups = re.findall("1+", "".join("01"[flag] for flag in encoded.response_mask))
    ids = [token for token, flag in zip(encoded.input_ids, encoded.response_mask) if flag]
    ends = [sum(map(len, groups[: i + 1])) for i in range(len(groups))]
    return [chat.tokenizer.decode(ids[end - len(group) : end]) for group, end in zip(groups, ends)]


@pytest.mark.parametrize(
    ("template", "end", "prompt"),
    [
        (
            CHATML,
            "<|im_end|>",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA3,
            "<|eot_id|>",
            "<|begin_of_text|>Today: 26 Jul 2024<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_own_templates_give_prompt_mask_and_stop_ids(template, end, prompt):
    tokenizer = templated(template)
    chat = load_chat_format(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert chat.name == "template"
    assert chat.stop_ids == [2, end_id]
    assert chat.ended([7, 8]) == [7, 8, end_id]  # as training ends a turn
    assert [chat.ended([7, stop]) for stop in (2, end_id)] == [[7, 2], [7, end_id]]
    dialogue = [system("S"), user("U1"), assistant("A one"), user("U2"), assistant("A two")]
    first = chat.encode_prompt(dialogue[:2])
    assert tokenizer.decode(first) == prompt
    encoded = chat.encode_dialogue(dialogue)
    assert encoded.input_ids[: len(first)] == first
    assert encoded.input_ids[: len(chat.encode_prompt(dialogue[:4]))] == chat.encode_prompt(dialogue[:4])
    assert replies(chat, encoded) == ["A one" + end, "A two" + end]
    assert encoded.input_ids[-1] == end_id  # the dialogue ends where sampling ends
    # The ids are those of the model's own tokenisation of the whole text, but for what follows the last end token.
    whole = tokenizer.apply_chat_template(dialogue, date_string="26 Jul 2024", return_dict=False)
    assert whole[: len(encoded.input_ids)] == encoded.input_ids
    assert chat.decode_response([*tokenizer.encode("A two "), end_id, 50]) == "A two"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (THINKING, "drops or adds text"),
        (REWRITES, "renders the turns before it differently"),
        (NO_END, "no special token"),
        (CHATML.split("{% if")[0], "no generation prompt"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "today's date"),
        ("{{ raise_exception('no roles here') }}", "refused the dialogue: no roles here"),
    ],
)
def test_templates_that_break_a_guarantee_are_refused_at_once(template, error):
    with pytest.raises(ChatFormatError, match=error):
        load_chat_format(templated(template))


def test_a_template_that_strips_reasoning_is_refused_where_it_would_matter():
    chat = load_chat_format(templated(STRIPS_REASONING))
    plain = [user("U"), assistant("A"), user("V"), assistant("B")]
    assert replies(chat, chat.encode_dialogue(plain)) == ["A<|im_end|>", "B<|im_end|>"]
    with pytest.raises(ChatFormatError, match=r"message 2 \(user\): the chat template renders the turns before"):
        chat.encode_prompt([user("U"), assistant("why</think>A"), user("V")])


def test_auto_takes_the_template_unless_it_is_llama2s(tokenizer):
    assert load_chat_format(templated(CHATML)).name == "template"
    assert load_chat_format(templated(CHATML), "llama2").name == "llama2"
    tokenizer.chat_template = training_chat_template(tokenizer)
    assert load_chat_format(tokenizer).name == "llama2"
    with pytest.raises(UserError, match="choose auto, llama2 or template"):
        load_chat_format(tokenizer, "chatml")
    with pytest.raises(ChatFormatError, match="needs a tokenizer with a chat_template"):
        load_chat_format(tiny_tokenizer(), "template")


def test_the_saved_template_renders_our_text_and_marks_replies(tokenizer):
    chat = load_chat_format(tokenizer)
    tokenizer.chat_template = training_chat_template(chat)
    dialogue = [system(" S "), user("  one"), assistant(" two "), user("three\n"), assistant("four")]
    for end in (2, 3, 4, 5):
        assert tokenizer.apply_chat_template(dialogue[:end], tokenize=False) == chat.render(dialogue[:end])
    theirs = tokenizer.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    ours = chat.encode_dialogue(dialogue)
    assert theirs["input_ids"] == ours.input_ids
    assert theirs["assistant_masks"] == ours.response_mask
    template = templated(CHATML)
    assert training_chat_template(template) == CHATML


@pytest.mark.parametrize("role", [0, 1, 2])
@pytest.mark.parametrize("tag", [*SPECIAL_TAGS, "<s>", "</s>", "<pad>", "<unk>"])
def test_special_tags_are_refused_in_every_role(tokenizer, tag, role):
    dialogue = [system("S"), user("U"), assistant("A")]
    dialogue[role] = {**dialogue[role], "content": f"x {tag} y"}
    name = dialogue[role]["role"]
    with pytest.raises(ChatFormatError, match=rf"message {role} \({name}\) contains the special tag") as caught:
        load_chat_format(tokenizer).encode_dialogue(dialogue)
    assert caught.value.reason == "special tag"


@pytest.mark.parametrize("tag", ["<|im_start|>", "<|im_end|>", "</s>"])
def test_a_templates_control_tokens_are_refused(tag):
    with pytest.raises(ChatFormatError, match=r"message 0 \(user\) contains the special tag"):
        load_chat_format(templated(CHATML)).encode_prompt([user(f"x{tag}assistant")])


@pytest.mark.parametrize(
    ("messages", "last", "error"),
    [
        ([], None, "at least one message"),
        ("text", None, "must be a list"),
        (["text"], None, "message 0 must be an object"),
        ([{"content": "x"}], None, "message 0 has no 'role'"),
        ([{"role": "user", "content": None}], None, "message 0 has no 'content'"),
        ([{"role": "user", "content": 3}], None, "message 0: 'content' must be a string, not int"),
        ([user(" \n")], None, r"message 0 \(user\) is empty"),
        ([assistant("A")], None, "message 0 has role 'assistant' where 'user' is due"),
        ([system("S"), assistant("A")], None, "message 1 has role 'assistant'"),
        ([user("U"), user("V")], None, "message 1 has role 'user' where 'assistant'"),
        ([user("U"), system("S")], None, "message 1 has role 'system'"),
        ([user("U"), {"role": "tool", "content": "x"}], None, "message 1 has role 'tool'"),
        ([system("S")], None, "message 0 is the last and has role 'system'"),
        ([user("U")], "assistant", "message 0 is the last and has role 'user'"),
        ([user("U"), assistant("A")], "user", "message 1 is the last and has role 'assistant'"),
    ],
)
def test_bad_dialogues_name_the_message(messages, last, error):
    with pytest.raises(ChatFormatError, match=error):
        check_messages(messages, last)


class Pieces(ChatFormat):
    """Longest piece first, and a blank before every text, as SentencePiece adds one. Ids are places in `pieces`."""

    def __init__(self, *pieces):
        super().__init__(tiny_tokenizer())
        self.pieces = pieces

    def _encode_text(self, text):
        text, ids = " " + text, []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def _decode_text(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_a_reply_never_changes_the_ids_of_its_prompt():
    # Whole text " x] ab" gives " x", "]", " a", "b": the prompt's ids stay, so the reply's are the rest.
    assert Pieces(" ", "a", "b", "]", " x", " a")._continue("x]", [4, 3], " ab") == [5, 2]
    # With a piece "] " over the border the reply is encoded by itself; its own blank is the one that is added (id 5).
    assert Pieces(" ", "a", "b", "]", " x", " a", "] ")._continue("x]", [4, 3], " ab") == [5, 2]
    # No blank to take away: "a" would become " a", which is another text.
    with pytest.raises(ChatFormatError, match="cannot encode 'ab' after 'x]' without changing the prompt's ids"):
        Pieces(" ", "a", "b", "]", " x", " a", "]a")._continue("x]", [4, 3], "ab")
    # Encoded alone, "a" would be " a": the ids must come from the whole text.
    assert Pieces(" ", "a", "b", "]", " x", " a")._continue("x]", [4, 3], "a") == [1]


TEXT = st.text(alphabet=st.sampled_from("ab \n\t.[]/<|>é😀 SYINTs"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any(tag in text for tag in (*SPECIAL_TAGS, "<s>", "</s>", *SPECIALS))
)


@st.composite
def dialogues(draw):
    turns = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    return ([system(draw(TEXT))] if draw(st.booleans()) else []) + messages


CHATS = {
    "llama2": load_chat_format(tiny_tokenizer()),
    "chatml": load_chat_format(templated(CHATML)),
    "llama3": load_chat_format(templated(LLAMA3)),
}


@pytest.mark.parametrize("name", CHATS)
@given(messages=dialogues())
def test_prompts_are_prefixes_and_masked_tokens_are_the_replies(name, messages):
    chat = CHATS[name]
    encoded = chat.encode_dialogue(messages)
    said = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    # One run of trained tokens a reply: without its end token it decodes to the reply, and to nothing else.
    found = [text[: text.rindex("<")].strip() for text in replies(chat, encoded)]
    assert found == said
    assert encoded.input_ids[-1] in chat.stop_ids
    for end, message in enumerate(messages):
        if message["role"] == "user":
            prompt = chat.encode_prompt(messages[: end + 1])
            assert encoded.input_ids[: len(prompt)] == prompt
            assert not encoded.response_mask[len(prompt) - 1]
            assert encoded.response_mask[len(prompt)]


@pytest.mark.parametrize("kind", ["AutoTokenizer", "LlamaTokenizer"])
@given(messages=dialogues())
def test_llama2_ids_equal_a_plain_reference(kind, messages, kit):
    import sentencepiece
    import transformers

    folder = kit / "llama2-tokenizer"
    if kind not in _CACHE:
        _CACHE[kind] = load_chat_format(getattr(transformers, kind).from_pretrained(folder))
        _CACHE["reference"] = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    reference = _CACHE["reference"]
    turns = list(messages)
    if turns[0]["role"] == "system":
        turns[1] = user("<<SYS>>\n" + turns[0]["content"] + "\n<</SYS>>\n\n" + turns[1]["content"])
        turns = turns[1:]
    expected = []
    for asked, said in zip(turns[::2], turns[1::2]):
        text = f"[INST] {asked['content'].strip()} [/INST] {said['content'].strip()} "
        expected += [1, *reference.encode(text), 2]
    assert _CACHE[kind].encode_dialogue(messages).input_ids == expected


_CACHE: dict = {}


def test_ids_that_are_handed_out_are_the_callers_own():
    chat = load_chat_format(tiny_tokenizer(), "llama2")
    messages = [{"role": "user", "content": "one"}]
    first = chat.encode_prompt(messages)
    first.append(0)
    chat._encode_text("one").append(0)
    assert chat.encode_prompt(messages) == first[:-1]
    assert chat._encode_text("one")[-1:] != [0]
