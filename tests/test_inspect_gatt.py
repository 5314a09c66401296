"""Training rows in colours: the mask is the trained one, and no text of the data is obeyed as markup."""

import io

import pytest
from rich.console import Console
from tiny_models import save_tiny_policy, tiny_tokenizer, write_rows

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.inspect_gatt_settings import InspectGattSettings
from rlhf import inspect_gatt
from rlhf.sft_rows import IGNORED, encode_dialogue
from rlhf.token_texts import visible
from rlhf.trained_tokens import coloured_row, to_html, to_text

ROW = {
    "messages": [
        {"role": "user", "content": "Act as a dog. the cat"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "Act as a tree. red"},
        {"role": "assistant", "content": "a tree é"},
    ],
    "train_on": "last",
    "instruction": {"wording": "Act as a dog.", "slot": "user"},
    "change": {"turn": 2, "wording": "Act as a tree."},
    "source": "gatt",
}


@pytest.fixture(scope="module")
def chat():
    return load_chat_format(tiny_tokenizer())


def test_tokens_are_those_that_are_trained(chat):
    shown = coloured_row(ROW, chat, 400)
    example, _ = encode_dialogue(ROW, chat, 400)
    assert [on for _, on in shown.tokens] == [label != IGNORED for label in example["labels"]]
    assert "".join(text for text, on in shown.tokens if on).strip() == "a tree é </s>"
    everything = coloured_row(ROW | {"train_on": "all"}, chat, 400)
    assert "".join(text for text, on in everything.tokens if on).split() == [
        "a",
        "dog",
        "</s>",
        "a",
        "tree",
        "é",
        "</s>",
    ]
    trained = sum(on for _, on in shown.tokens)
    assert shown.title == (
        "gatt, 'Act as a dog.' in the user slot of turn 1, 'Act as a tree.' at turn 2, "
        f"{trained} of {len(shown.tokens)} tokens trained (last)"
    )
    long = coloured_row(ROW, chat, 20)
    assert (long.verdict, long.tokens) == ("too_long", [])
    assert "training leaves it out" in long.title


def test_no_text_is_markup(chat):
    text = "[bold]x[/bold] <b>y</b> \x1b[31mz \u202e"
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    shown = coloured_row(row, chat, 400)
    page = to_html(shown).text
    assert "<b>y" not in page
    assert page.count("<b>") == 1  # the title's
    assert page.count("title=") == len(shown.tokens)
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=1000, color_system="standard").print(to_text(shown))
    said = out.getvalue()
    plain = Console(file=(flat := io.StringIO()), width=1000)
    plain.print(to_text(shown))
    read = flat.getvalue().replace("·", "")  # tokens of split characters that have no text of their own
    assert read.count("[bold]x[/bold] <b>y</b> \\u001b[31mz \\u202e") == 2
    assert "\u202e" not in said
    assert "\x1b[31m" not in said  # colours of ours, none of the data's
    # Trained tokens stand on green (42), the others are dim (2).
    assert "\x1b[30;42m" in said
    assert "\x1b[2m" in said
    assert visible("a\tb\nc\x07") == "a\tb\nc\\u0007"


def test_the_script(tmp_path, capsys):
    policy = save_tiny_policy(tmp_path / "policy")
    rows = write_rows(tmp_path / "gatt.jsonl", [ROW, ROW | {"source": "gatt_plain", "instruction": None}, ROW])
    words = ["--train_file", rows, "--model_name_or_path", policy]
    assert inspect_gatt.main([*words, "--num_rows", "2"]) == 2
    said = " ".join(capsys.readouterr().out.replace("·", "").split())
    assert "2 of 3 rows" in said
    assert said.count("a tree é") == 2
    with pytest.raises(UserError, match="has no row of these; it has"):
        inspect_gatt.main([*words, "--sources", "other"])
    with pytest.raises(UserError, match="num_rows: 0"):
        InspectGattSettings(train_file="a", model_name_or_path="b", num_rows=0)
