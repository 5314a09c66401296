"""The Ghost Attention transform: placement, masks, the shared-prefix equivalence, truncation."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.errors import UserError
from gatt import transform as t

INSTRUCTION = "Always act as Napoleon."
DIALOGUE = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
]


def contents(messages):
    return [(m["role"][0], m["content"]) for m in messages]


def test_sampling_context_carries_the_instruction_on_every_user_message():
    before = copy.deepcopy(DIALOGUE)
    assert contents(t.with_instruction_everywhere(DIALOGUE, INSTRUCTION, "user")) == [
        ("u", "Always act as Napoleon. Hi."),
        ("a", "Hello."),
        ("u", "Always act as Napoleon. Who?"),
        ("a", "Me."),
        ("u", "Always act as Napoleon. Why?"),
    ]
    assert before == DIALOGUE  # the argument is left alone


def test_sampling_context_with_the_system_slot_moves_turn_one_only():
    assert contents(t.with_instruction_everywhere(DIALOGUE, INSTRUCTION, "system")) == [
        ("s", "Always act as Napoleon."),
        ("u", "Hi."),
        ("a", "Hello."),
        ("u", "Always act as Napoleon. Who?"),
        ("a", "Me."),
        ("u", "Always act as Napoleon. Why?"),
    ]


def test_training_dialogue_keeps_the_instruction_in_the_first_turn_only():
    user = contents(t.training_dialogue(DIALOGUE[:4], INSTRUCTION, "user"))
    assert user == [("u", "Always act as Napoleon. Hi."), ("a", "Hello."), ("u", "Who?"), ("a", "Me.")]
    system = contents(t.training_dialogue(DIALOGUE[:2], INSTRUCTION, "system"))
    assert system == [("s", "Always act as Napoleon."), ("u", "Hi."), ("a", "Hello.")]


def test_a_system_message_of_the_dialogue_stays():
    with_system = [{"role": "system", "content": "Be brief."}, *DIALOGUE[:1]]
    assert contents(t.training_dialogue(with_system, INSTRUCTION, "system")) == [
        ("s", "Be brief. Always act as Napoleon."),
        ("u", "Hi."),
    ]
    assert contents(t.training_dialogue(with_system, INSTRUCTION, "user")) == [
        ("s", "Be brief."),
        ("u", "Always act as Napoleon. Hi."),
    ]


def test_last_reply_mask_zeroes_earlier_replies():
    # prompt(2) reply(2) prompt(1) reply(3) and one token behind the reply, as some chat templates have
    mask = [False, False, True, True, False, True, True, True, False]
    assert t.last_reply_mask(mask) == [False] * 5 + [True] * 3 + [False]
    assert t.loss_mask(mask, "last") == [False] * 5 + [True] * 3 + [False]
    assert t.loss_mask(mask, "all") == mask
    assert t.last_reply_mask([True, True]) == [True, True]


def test_record_says_which_replies_may_carry_loss():
    full = DIALOGUE[:4]
    assert t.training_record(full, INSTRUCTION, "user", [True, True])["train_on"] == "all"
    row = t.training_record(full, INSTRUCTION, "user", [False, True])
    assert row["train_on"] == "last"
    assert row["messages"] == t.training_dialogue(full, INSTRUCTION, "user")


# --- the equivalence: one row with the loss on every reply = the n last-turn samples ---------------------------------


def encode(messages):
    """Letters to ids in a Llama-2-like layout: (1 [3] text [4]) and (text 2), ids and mask by the same append."""
    ids, mask = [], []
    for message in messages:
        text = [5 + ord(c) % 90 for c in message["content"]]
        reply = message["role"] == "assistant"
        segment = [*text, 2] if reply else [1, 3, *text, 4]
        ids += segment
        mask += [reply] * len(segment)
    return ids, mask


def loss_sum(model, messages, train_on):
    ids, response_mask = encode(messages)
    mask = torch.tensor(t.loss_mask(response_mask, train_on))
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    # the token at position p is predicted at p - 1
    token_loss = -log_probs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return (token_loss * mask[1:]).sum().item(), int(mask[1:].sum())


@pytest.mark.parametrize("slot", t.SLOTS)
def test_one_row_on_all_replies_equals_the_sum_of_last_turn_losses(slot):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    dialogue = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "word " * (i % 3 + 1) + "abcdefgh"[i]}
        for i in range(8)
    ]
    row = [m for m in t.training_record(dialogue, INSTRUCTION, slot, [True] * 4)["messages"] if m["role"] != "system"]
    samples = t.last_turn_samples(row)
    assert [len(sample) for sample in samples] == [2, 4, 6, 8]

    one_row, tokens = loss_sum(model, row, "all")
    parts = [loss_sum(model, sample, "last") for sample in samples]
    assert tokens == sum(n for _, n in parts)
    assert one_row == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)
    # and it is not the paper's last-turn loss of the whole dialogue, which trains a quarter of those replies
    assert one_row > 1.5 * parts[-1][0]


# --- truncation ------------------------------------------------------------------------------------------------------


def characters(messages):
    return sum(len(m["content"]) for m in messages)


def test_shortening_never_drops_the_instruction():
    row = t.training_dialogue(
        DIALOGUE[:4] + DIALOGUE[4:] + [{"role": "assistant", "content": "So."}], INSTRUCTION, "user"
    )
    # lengths: first exchange 27 + 6, second 4 + 3, third 4 + 3: 47 in all
    assert characters(row) == 47
    assert t.shorten(row, "all", characters, 47) == row
    assert t.shorten(row, "all", characters, 46) == row[:4]  # cut at the end: the prefixes of the rest stay exact
    assert t.shorten(row, "last", characters, 46) == row[:2] + row[4:]  # the last reply is the one that is trained
    assert t.shorten(row, "all", characters, 33) == row[:2]
    for train_on, limit in (("all", 32), ("last", 39)):
        with pytest.raises(UserError, match="keeps the instruction"):
            t.shorten(row, train_on, characters, limit)


def test_shortening_keeps_the_system_slot():
    row = t.training_dialogue(DIALOGUE[:4], INSTRUCTION, "system")
    short = t.shorten(row, "all", characters, characters(row) - 1)
    assert contents(short) == [("s", INSTRUCTION), ("u", "Hi."), ("a", "Hello.")]


# --- another instruction in mid-dialogue -----------------------------------------------------------------------------

NEW = (2, "Act as Mozart.")


@pytest.mark.parametrize(("slot", "head"), [("user", []), ("system", [("s", INSTRUCTION)])])
def test_a_new_instruction_takes_the_place_of_the_first(slot, head):
    first = f"{INSTRUCTION} Hi." if slot == "user" else "Hi."
    sampling = t.with_instruction_everywhere(DIALOGUE, INSTRUCTION, slot, NEW)
    assert contents(sampling) == [
        *head, ("u", first), ("a", "Hello."), ("u", "Act as Mozart. Who?"), ("a", "Me."), ("u", "Act as Mozart. Why?")
    ]  # fmt: skip
    training = t.training_dialogue(DIALOGUE, INSTRUCTION, slot, NEW)
    assert contents(training) == [
        *head, ("u", first), ("a", "Hello."), ("u", "Act as Mozart. Who?"), ("a", "Me."), ("u", "Why?")
    ]  # fmt: skip
    # A dialogue that has not come to that turn is as without it: sampling feeds turn after turn.
    early = t.with_instruction_everywhere(DIALOGUE[:1], INSTRUCTION, slot, NEW)
    assert early == t.with_instruction_everywhere(DIALOGUE[:1], INSTRUCTION, slot) == sampling[: len(early)]


def test_a_changed_row_is_the_same_as_its_last_turn_samples():
    row = t.training_record(DIALOGUE[:4], INSTRUCTION, "user", [True, True], NEW)
    assert row["train_on"] == "all"
    samples = t.last_turn_samples(row["messages"])
    assert contents(samples[0]) == [("u", "Always act as Napoleon. Hi."), ("a", "Hello.")]  # nothing of the new one yet
    assert samples[1] == row["messages"] == t.training_dialogue(DIALOGUE[:4], INSTRUCTION, "user", NEW)
    # In the letters' layout: 1 [3] text [4] is a prompt, text 2 a reply. Instructions carry no loss.
    ids, mask = encode(row["messages"])
    trained = "".join(chr(i - 5 + 90 * (i - 5 < 32)) for i, on in zip(ids, t.loss_mask(mask, "all")) if on and i >= 5)
    assert trained == "Hello.Me."
    last = t.loss_mask(mask, "last")
    assert sum(last) == len("Me.") + 1
    assert last[-4:] == [True] * 4


def test_shortening_keeps_the_turn_of_the_new_instruction():
    plain = [{"role": "user" if i % 2 == 0 else "assistant", "content": "abcdefghij"[i]} for i in range(10)]
    row = t.training_dialogue(plain, "X.", "user", (3, "Y."))
    assert [m["content"] for m in row] == ["X. a", "b", "c", "d", "Y. e", "f", "g", "h", "i", "j"]  # 16 characters

    def cut(train_on, limit, change_turn=3):
        left = t.shorten(row, train_on, characters, limit, change_turn)
        turn = t.change_turn_after_shortening(3, 5, len(left) // 2, train_on)
        if change_turn:  # the figure names the turn that holds the words
            assert [i for i, m in enumerate(left[::2], 1) if m["content"].startswith("Y.")] == ([turn] if turn else [])
        return "".join(m["content"][-1] for m in left), turn

    assert cut("all", 14) == ("abcdefgh", 3)
    assert cut("all", 12) == ("abcdef", 3)
    assert cut("all", 9) == ("abcd", None)
    assert cut("last", 14) == ("abefghij", 2)
    assert cut("last", 12) == ("abefij", 2)  # the oldest of the others goes, not that turn
    with pytest.raises(UserError, match="has 12 tokens"):
        cut("last", 11)
    assert cut("last", 11, None)[0] == "abghij"


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_special_tags_in_an_instruction_are_refused(tag):
    with pytest.raises(UserError, match="special tag"):
        t.with_instruction_everywhere(DIALOGUE, f"Act {tag} now.", "user")


@pytest.mark.parametrize(
    ("messages", "instruction", "slot", "words"),
    [
        (DIALOGUE, "  ", "user", "instruction is empty"),
        (DIALOGUE, INSTRUCTION, "middle", "unknown instruction slot 'middle'"),
        ([], INSTRUCTION, "user", "no user turn"),
        ([{"role": "system", "content": "x"}], INSTRUCTION, "user", "no user turn"),
        (DIALOGUE[1:], INSTRUCTION, "user", "message 0 of the dialogue has role 'assistant'"),
        (DIALOGUE[:1] + DIALOGUE[2:3], INSTRUCTION, "user", "message 1 of the dialogue has role 'user'"),
    ],
)
def test_bad_dialogues_and_settings_are_refused(messages, instruction, slot, words):
    with pytest.raises(UserError, match=words):
        t.training_dialogue(messages, instruction, slot)


@pytest.mark.parametrize(
    ("new", "words"),
    [((1, "Act."), "cannot change at turn 1"), ((2, " "), "instruction is empty"), ((2, "[INST]"), "special tag")],
)
def test_bad_changes_are_refused(new, words):
    with pytest.raises(UserError, match=words):
        t.training_dialogue(DIALOGUE, INSTRUCTION, "user", new)


def test_rows_that_would_teach_forgetting_are_refused():
    with pytest.raises(UserError, match="teach to forget"):
        t.training_record(DIALOGUE[:4], INSTRUCTION, "user", [True, False])
    with pytest.raises(UserError, match="1 marks for 2 replies"):
        t.training_record(DIALOGUE[:4], INSTRUCTION, "user", [True])
    with pytest.raises(UserError, match="must end with an assistant reply"):
        t.training_record(DIALOGUE, INSTRUCTION, "user", [True, True])
    with pytest.raises(UserError, match="unknown train_on 'some'"):
        t.loss_mask([True], "some")
    with pytest.raises(ValueError, match="no token"):
        t.last_reply_mask([False])
