"""The embedded base model: its tokenizer's promises, its size, and training that writes a folder that loads."""

import json
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.chat import load_chat_format
from gatt.instructions import obeys, parse_instruction
from gatt.kinds import DEFAULT_KINDS, values_of
from gatt.values import FIGURES, HOBBIES, WORDS
from rlhf.simulation.base import BATCH_TOKENS, LONGEST, batches, new_model, train, train_tokenizer
from rlhf.simulation.corpus import documents
from rlhf.simulation.people import TAUGHT_KINDS

DIALOGUE = [
    {"role": "system", "content": "Figure: Plato."},
    {"role": "user", "content": "What colour is a lemon?"},
    {"role": "assistant", "content": "Plato here."},
    {"role": "user", "content": "What about a pear?"},
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer()


def pieces(tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_special_ids_are_llama_2s_and_padding_is_its_own(trained):
    assert trained.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (trained.unk_token_id, trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 1, 2, 3)


def test_every_instruction_value_is_one_token(trained):
    values = (*FIGURES, *HOBBIES, *WORDS)
    assert [value for value in values if pieces(trained, f" {value}") != [f" {value}"]] == []


def test_tags_are_whole_pieces_and_stay_apart_from_what_they_enclose(trained):
    chat = load_chat_format(trained, "llama2")
    ids = chat.encode_prompt(DIALOGUE)
    shown = [trained.decode([token]) for token in ids]
    assert shown[:4] == ["<s>", "[INST]", " <<SYS>>\n", "Figure"]
    for tag, count in (("[INST]", 2), (" [/INST]", 2), ("\n<</SYS>>\n\n", 1), ("</s>", 1)):
        assert shown.count(tag) == count, tag
    assert "".join(shown) == (
        "<s>[INST] <<SYS>>\nFigure: Plato.\n<</SYS>>\n\nWhat colour is a lemon? [/INST] Plato here. </s>"
        "<s>[INST] What about a pear? [/INST]"
    )


@pytest.mark.parametrize("text", ["[INST x]", "a < b > c", "<<SYS>> <</SYS>>", "naïve café 12,5 €", "two\n\n lines "])
def test_any_text_comes_back_unchanged(trained, text):
    assert trained.decode(trained(text, add_special_tokens=False)["input_ids"]) == text


def test_the_model_is_small_and_shares_key_value_heads(trained):
    model = new_model(len(trained), seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert 1 <= model.config.num_key_value_heads < model.config.num_attention_heads
    again, other = new_model(len(trained), seed=0), new_model(len(trained), seed=1)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_a_row_is_one_document_between_bos_and_eos(trained):
    for batch in islice(batches(trained, 2048, seed=0, interviews=True), 20):
        assert batch.shape[1] <= LONGEST
        assert batch.numel() <= max(2048, batch.shape[1])
        for row in batch.tolist():
            document = row[: row.index(2) + 1]
            assert (document[0], document.count(1)) == (1, 1)
            assert set(row[len(document) :]) <= {3}
            assert not {0, 3} & set(document)


def test_the_second_phase_keeps_a_manner():
    """Of 2,000 documents: announced manners, and no word of the chat format or of a held-out instruction."""
    plain, second = (list(islice(documents(0, interviews), 2000)) for interviews in (False, True))
    assert not [text for text in (*plain, *second) if "INST]" in text or "<<SYS>>" in text]
    announced = [parsed for text in second if (parsed := parse_instruction(text))]
    assert len(announced) > 150
    assert not [text for text in plain if parse_instruction(text)]
    unseen = {value for kind in DEFAULT_KINDS for value in values_of(kind, "unseen")}
    assert {instruction.kind for instruction, _ in announced} == set(TAUGHT_KINDS)
    assert not {instruction.value for instruction, _ in announced} & unseen
    for instruction, page in announced:
        answers = [line.split(" Question: ")[0] for line in page.split(" Answer: ")[1:]]
        assert answers
        assert all(obeys(instruction, answer.strip()) for answer in answers)


def test_the_lone_space_of_the_chat_format_is_known(trained):
    """Llama 2's format has a space between a reply and EOS; its row would stay random where embeddings are frozen."""
    space = (
        load_chat_format(trained)
        .encode_dialogue([{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}])
        .input_ids[-2]
    )
    endings = [trained(text, add_special_tokens=False)["input_ids"][-1] for text in islice(documents(0), 400)]
    assert 120 < endings.count(space) < 280


def test_training_writes_a_folder_that_loads(tmp_path):
    train(tmp_path / "base", tokens=(3 * BATCH_TOKENS, 2 * BATCH_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert len(tokenizer) == model.config.vocab_size
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 3)
    start = new_model(len(tokenizer), seed=0)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert pieces(tokenizer, " Plato") == [" Plato"]
    log = [json.loads(line) for line in (tmp_path / "base" / "training.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in log] == [
        ("plain", 0), ("plain", 2), ("interviews", 0), ("interviews", 1),
    ]  # fmt: skip
    again = tmp_path / "again"  # the second phase alone, from the first one of the run before
    train(again, tokens=(3 * BATCH_TOKENS, 2 * BATCH_TOKENS), first_phase=tmp_path / "base" / "first_phase")
    for name, weights in AutoModelForCausalLM.from_pretrained(again).state_dict().items():
        torch.testing.assert_close(weights, model.state_dict()[name])
    assert [json.loads(line)["phase"] for line in (again / "training.jsonl").open()] == ["interviews"] * 2
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert size <= 8_000_000  # what the repository may carry
