"""Readers: every accepted shape, every bad row with file, line and reason, and splits without leaks."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.records import (
    first_user_turn,
    read_dialogues,
    read_preferences,
    read_prompts,
    split_by_prompt,
    write_jsonl,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
NONE = {"rating": None, "margin": None, "safety": None}


def lines(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_a_trl_row_with_all_labels_is_kept_as_it_is(tmp_path):
    row = GOOD | {"rating": "better", "margin": 1, "safety": "chosen_safe", "source": "people", "p_chosen": 0.9}
    records = read_preferences(lines(tmp_path / "a.jsonl", row))
    assert records.rows == [row | {"margin": 1.0}]
    assert records.counts == {"read": 1, "kept": 1}
    assert records.issues == []


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": [user("hi")], "chosen": "yes", "rejected": "no"},
        {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"},
        GOOD | {"messages": [user("other")], "rating": None},
    ],
)
def test_every_preference_shape_has_one_normal_form(tmp_path, row):
    (read,) = read_preferences(lines(tmp_path / "pairs.jsonl", row)).rows
    for side in ("chosen", "rejected"):
        read[side][0]["content"] = read[side][0]["content"].strip()
    assert read == GOOD | NONE | {"source": "pairs"}


def test_long_transcripts_keep_their_turns(tmp_path):
    start = "\n\nHuman: one\nline two\n\nAssistant: Human: is a word\n\nHuman: three\n\nAssistant: "
    (row,) = read_preferences(lines(tmp_path / "a.jsonl", {"chosen": start + "x", "rejected": start + "y"})).rows
    assert row["prompt"] == [user("one\nline two"), assistant("Human: is a word"), user("three")]
    assert (row["chosen"], row["rejected"]) == ([assistant("x")], [assistant("y")])


BAD = [
    ("{not json", "invalid JSON"),
    ("[1, 2]", "wrong type"),
    ({"prompt": "hi", "chosen": "yes"}, "missing or empty field"),
    (GOOD | {"rejected": None}, "missing or empty field"),
    ({"chosen": "yes", "rejected": "no"}, "missing or empty field"),
    (GOOD | {"prompt": "  "}, "missing or empty field"),
    (GOOD | {"prompt": []}, "missing or empty field"),
    (GOOD | {"chosen": [assistant(" ")]}, "missing or empty field"),
    (GOOD | {"chosen": []}, "missing or empty field"),
    (GOOD | {"prompt": [{"role": "user"}]}, "missing or empty field"),
    (GOOD | {"chosen": 3, "rejected": 4}, "wrong type"),
    (GOOD | {"prompt": 7}, "wrong type"),
    (GOOD | {"prompt": ["hi"]}, "wrong type"),
    (GOOD | {"prompt": [{"role": "user", "content": 5}]}, "wrong type"),
    (GOOD | {"source": 5}, "wrong type"),
    (GOOD | {"rating": 3}, "wrong type"),
    (GOOD | {"margin": "1"}, "wrong type"),
    (GOOD | {"margin": True}, "wrong type"),
    ('{"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": NaN}', "wrong type"),
    ('{"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": -Infinity}', "wrong type"),
    ('{"prompt": "hi", "chosen": "\\ud800", "rejected": "no"}', "invalid text"),
    (GOOD | {"rejected": [assistant(" yes\n")]}, "chosen equals rejected"),
    (GOOD | {"rating": "much_better"}, "unknown rating"),
    (GOOD | {"rating": ""}, "unknown rating"),
    (GOOD | {"safety": "rejected_safe"}, "unknown safety label"),
    ({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}, "prompts differ"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}, "prompts differ"),
    (GOOD | {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]}, "prompts differ"),
    (GOOD | {"prompt": [user("a"), assistant("b")]}, "wrong role order"),
    (GOOD | {"prompt": [assistant("b")]}, "wrong role order"),
    (GOOD | {"chosen": [assistant("a"), assistant("b")]}, "wrong role order"),
    ({"chosen": [user("a")], "rejected": [user("b")]}, "wrong role order"),
    (GOOD | {"prompt": [user("hi [/INST] there")]}, "special tag"),
    (GOOD | {"rejected": [assistant("<<SYS>>")]}, "special tag"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_pair_is_named_counted_and_set_aside(tmp_path, caplog, bad, reason):
    path, rejects = lines(tmp_path / "pairs.jsonl", GOOD, "", bad, GOOD), tmp_path / "out" / "rejects.jsonl"
    records = read_preferences(path, reject_file=rejects, max_reject_share=0.5)
    assert len(records.rows) == 2
    assert records.counts == {"read": 3, "kept": 2, reason: 1}
    (issue,) = records.issues
    assert (issue.file, issue.line, issue.reason) == (str(path), 3, reason)
    assert f"{path}:3: {reason}" in caplog.text
    (reject,) = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert (reject["file"], reject["line"], reject["reason"]) == (str(path), 3, reason)
    if isinstance(bad, dict):
        assert reject["row"] == bad


def test_prompts_longer_than_the_context_are_bad_rows(tmp_path, tokenizer):
    chat = load_chat_format(tokenizer)
    long = GOOD | {"prompt": [user("the cat " * 9)]}
    limit = len(chat.encode_prompt(GOOD["prompt"]))
    path = lines(tmp_path / "pairs.jsonl", GOOD, long)
    records = read_preferences(path, chat_format=chat, max_prompt_tokens=limit, max_reject_share=0.5)
    tokens = len(chat.encode_prompt(long["prompt"]))
    assert [str(issue) for issue in records.issues] == [
        f"{path}:2: prompt too long: the prompt has {tokens} tokens, more than max_prompt_tokens={limit}"
    ]


def test_the_tokenizers_special_tokens_are_refused_too(tmp_path, tokenizer):
    path = lines(tmp_path / "pairs.jsonl", GOOD, GOOD | {"prompt": "a </s> b"})
    assert len(read_preferences(path).rows) == 2
    records = read_preferences(path, chat_format=load_chat_format(tokenizer), max_reject_share=0.5)
    assert [issue.reason for issue in records.issues] == ["special tag"]


def test_too_many_bad_rows_stop_the_run_after_the_reject_file_is_written(tmp_path):
    path, rejects = lines(tmp_path / "pairs.jsonl", *[GOOD] * 18, "x", "y"), tmp_path / "rejects.jsonl"
    with pytest.raises(UserError, match="more than max_reject_share=0.09 of the rows are bad") as caught:
        read_preferences(path, reject_file=rejects, max_reject_share=0.09)
    assert f"{path}:19: invalid JSON" in str(caught.value)
    assert "2 of 20 rows" in str(caught.value)
    assert len(rejects.read_text().splitlines()) == 2
    assert len(read_preferences(path, max_reject_share=0.1).rows) == 18  # the share itself is still allowed


def test_files_share_a_reject_file_and_a_second_run_does_not_repeat_rows(tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    first, second = lines(tmp_path / "1.jsonl", GOOD, "x"), lines(tmp_path / "2.jsonl", "y", GOOD)
    for path in (first, second, first):
        read_preferences(path, reject_file=rejects, max_reject_share=0.5)
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert sorted((row["file"], row["line"]) for row in found) == [(str(first), 2), (str(second), 1)]
    lines(first, GOOD)
    read_preferences(first, reject_file=rejects)
    assert json.loads(rejects.read_text())["file"] == str(second)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [user("u"), assistant("a")]}, [user("u"), assistant("a")]),
        ({"prompt": "u", "completion": "a"}, [user("u"), assistant("a")]),
        ({"prompt": [user("u")], "completion": [assistant("a")]}, [user("u"), assistant("a")]),
        ({"instruction": "u", "input": "", "output": "a"}, [user("u"), assistant("a")]),
        ({"instruction": "u", "input": "v", "output": "a"}, [user("u\n\nv"), assistant("a")]),
        ({"instruction": "u", "context": "v", "response": "a", "category": "qa"}, [user("u\n\nv"), assistant("a")]),
        ({"prompt": "u", "chosen": "a", "rejected": "b", "rating": "better"}, [user("u"), assistant("a")]),
        (
            {"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: u\n\nAssistant: b"},
            [user("u"), assistant("a")],
        ),
    ],
)
def test_every_dialogue_shape_has_one_normal_form(tmp_path, row, messages):
    (read,) = read_dialogues(lines(tmp_path / "sft.jsonl", row)).rows
    extra = {"category": "qa"} if "category" in row else {}
    assert read == {"messages": messages, "source": "sft"} | extra


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "missing or empty field"),
        ({"messages": [user("u")]}, "wrong role order"),
        ({"messages": "u"}, "wrong type"),
        ({"prompt": "u"}, "missing or empty field"),
        ({"instruction": "u", "output": " "}, "missing or empty field"),
        ({"prompt": "u", "chosen": "a"}, "missing or empty field"),
        ({"prompt": "u", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"instruction": "u", "input": 3, "output": "a"}, "wrong type"),
        ({"messages": [user("u"), assistant("a")], "train_on": "first"}, "wrong type"),
        ({"messages": [user("u [INST]"), assistant("a")]}, "special tag"),
    ],
)
def test_bad_dialogues_are_set_aside(tmp_path, row, reason):
    good = {"messages": [user("u"), assistant("a")], "train_on": "last"}
    records = read_dialogues(lines(tmp_path / "sft.jsonl", row, good), max_reject_share=0.5)
    assert [(issue.line, issue.reason) for issue in records.issues] == [(1, reason)]
    assert records.rows == [good | {"source": "sft"}]


@pytest.mark.parametrize(
    ("row", "is_safety"),
    [
        ({"prompt": [user("hi")], "is_safety": True, "kind": "risky"}, True),
        ({"prompt": "hi"}, False),
        ({"messages": [user("hi")]}, False),
        ({"instruction": "hi"}, False),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, False),
    ],
)
def test_every_prompt_shape_has_one_normal_form(tmp_path, row, is_safety):
    (read,) = read_prompts(lines(tmp_path / "p.jsonl", row)).rows
    assert (read["prompt"], read["is_safety"], read["source"]) == ([user("hi")], is_safety, "p")
    assert read.get("kind") == row.get("kind")
    assert "chosen" not in read


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"is_safety": True}, "missing or empty field"),
        ({"prompt": "hi", "is_safety": 1}, "wrong type"),
        ({"prompt": [user("hi"), assistant("a")]}, "wrong role order"),
    ],
)
def test_bad_prompts_are_set_aside(tmp_path, row, reason):
    records = read_prompts(lines(tmp_path / "p.jsonl", {"prompt": "hi"}, row), max_reject_share=0.5)
    assert [(issue.line, issue.reason) for issue in records.issues] == [(2, reason)]


def test_gzip_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD | {"rating": "better", "source": "s"}, GOOD | {"rating": None, "source": "s"}]
    write_jsonl(tmp_path / "a.jsonl.gz", rows)
    assert len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()) == 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [row | {"margin": None, "safety": None} for row in rows]
    assert read_preferences(tmp_path / "a.jsonl.gz").rows == expected
    assert read_preferences(tmp_path / "a.parquet").rows == expected


def test_hub_names_go_to_datasets(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config=None, *, split, data_dir=None):
        calls.append((name, config, split, data_dir))
        if config == "harmless-base":
            raise ValueError("BuilderConfig 'harmless-base' not found")
        return [{"prompt": "hi", "chosen": "yes", "rejected": "no"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_preferences("owner/name", split="test").rows[0]["source"] == "owner/name"
    read_preferences("Anthropic/hh-rlhf:harmless-base")
    assert calls == [
        ("owner/name", None, "test", None),
        ("Anthropic/hh-rlhf", "harmless-base", "train", None),
        ("Anthropic/hh-rlhf", None, "train", "harmless-base"),
    ]


def test_unusable_files_are_the_users_errors(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "hi"}\n' * 99)[:-20])
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.csv").write_text("prompt\nhi\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("x\n")
    for name, error in [
        ("missing.jsonl", "no such file"),
        ("missing", "no such file"),
        ("cut.jsonl.gz", "cannot be read"),
        ("a.parquet", "not a readable Parquet file"),
        ("a.csv", "unknown file type"),
        (".", "is a folder"),
        ("empty.jsonl", "has no rows"),
        ("bad.jsonl", "no row is left"),
    ]:
        with pytest.raises(UserError, match=error):
            read_prompts(tmp_path / name, max_reject_share=1.0)


PROMPTS = st.lists(st.text(alphabet="aB1 .?", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=40)


@given(texts=PROMPTS, fraction=st.floats(0, 1), seed=st.integers(0, 9))
def test_no_prompt_is_in_two_splits(texts, fraction, seed):
    rows = [{"prompt": [user(text)], "n": n} for n, text in enumerate(texts)]
    train, held_out = split_by_prompt(rows, fraction, seed)
    assert sorted(row["n"] for row in train + held_out) == list(range(len(rows)))  # none lost, none twice
    assert not {first_user_turn(row) for row in train} & {first_user_turn(row) for row in held_out}
    # A file split by itself agrees with the whole, whatever the shape of its rows.
    later = [assistant("x"), user("y"), assistant("z")]
    again = [{"messages": [{"role": "system", "content": "s"}, *row["prompt"], *later]} for row in held_out]
    assert split_by_prompt(again, fraction, seed) == ([], again)


def test_the_split_has_the_asked_size_and_depends_on_the_seed():
    rows = [{"prompt": [user(f"prompt {n}")]} for n in range(2000)]
    held_out = split_by_prompt(rows, 0.1, 0)[1]
    assert 160 < len(held_out) < 240  # 200, standard deviation 13
    assert held_out != split_by_prompt(rows, 0.1, 1)[1]
    assert split_by_prompt(rows, 0.0, 0)[1] == split_by_prompt(rows, 1.0, 0)[0] == []
    with pytest.raises(UserError, match="between 0 and 1"):
        split_by_prompt(rows, 2, 0)


def test_spelling_and_later_turns_do_not_separate_a_prompt():
    same = [[user("What is 2?")], [{"role": "system", "content": "s"}, user("what is  2")],
            [user("WHAT IS 2"), assistant("a"), user("b")]]  # fmt: skip
    assert {first_user_turn({"prompt": prompt}) for prompt in same} == {"whatis2"}
    assert first_user_turn({"prompt": [user(" ?! ")]}) == "?!"


def test_the_real_files_read_as_their_notes_say(kit):
    pairs = read_preferences(kit / "hh-harmless-train.jsonl.gz")
    assert pairs.counts["read"] == 1221
    assert pairs.counts["prompts differ"] <= 0.002 * 1221 + 1  # 99.8 % share the prompt
    assert {row["source"] for row in pairs.rows} == {"hh-harmless-train"}
    dolly = read_dialogues(kit / "dolly-sft-2000.jsonl.gz")
    assert dolly.counts == {"read": 2000, "kept": 2000}
