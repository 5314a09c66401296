"""Pooling the rounds' samples: what stays and why, by hand; the script on files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_reward_model, write_rows
from transformers import AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.rounds_settings import PoolSettings
from rlhf import pool_preferences, pool_samples
from rlhf.pool_samples import pool
from rlhf.tokenizer import load_tokenizer


def row(prompt: str, text: str, score: float | None = 0.0) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return {"messages": messages, "train_on": "last", "is_safety": False, "prompt_source": prompt} | (
        {} if score is None else {"score": score}
    )


FIRST = [row("a", "x", 3.0), row("b", "y", 1.0), row("c", "z", 5.0)]
SECOND = [row("a", "u", 2.0), row("b", "y", 1.0), row("b", "w", 4.0), row("d", "v", 0.0)]


def texts(kept: list[list[dict]]) -> list[list[str]]:
    return [["".join(message["content"] for message in r["messages"]) for r in rows] for rows in kept]


def pooled(per_prompt=1, shares=(1.0,), newest_first=False, seed=0):
    return pool([FIRST, SECOND], per_prompt, shares, newest_first, seed)


def test_the_best_of_all_rounds_by_hand():
    # b/y came twice: the newer copy stays, and then loses to b/w. a: 3 beats 2. c and d are of one round only.
    kept, counts = pooled()
    assert texts(kept) == [["ax", "cz"], ["bw", "dv"]]
    assert counts[0] == {"read": 3, "duplicates": 1, "not_drawn": 0, "outranked": 0, "kept": 2}
    assert counts[1] == {"read": 4, "duplicates": 0, "not_drawn": 0, "outranked": 2, "kept": 2}


def test_the_newest_round_wins_or_all_stay():
    assert texts(pooled(newest_first=True)[0]) == [["cz"], ["au", "bw", "dv"]]
    assert texts(pooled(per_prompt=0)[0]) == [["ax", "cz"], ["au", "by", "bw", "dv"]]
    assert texts(pooled(per_prompt=2)[0]) == texts(pooled(per_prompt=0)[0])


def test_of_equal_scores_the_newer_stays():
    kept, _ = pool([[row("a", "old", 1.0)], [row("a", "new", 1.0)]], 1, [1.0], False, 0)
    assert texts(kept) == [[], ["anew"]]


def test_what_is_not_drawn_pushes_nothing_out():
    kept, counts = pooled(shares=(1.0, 0.0))
    assert texts(kept) == [[], ["au", "bw", "dv"]]  # a/u is kept although the first round had a better one
    assert counts[0]["not_drawn"] == 2
    old = [row(str(i), "x") for i in range(100)]
    assert len(pool([old, []], 1, [1.0, 0.25], False, 0)[0][0]) == 25
    drawn = [texts(pool([old, []], 1, [1.0, 0.25], False, seed)[0])[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    kept, _ = pool([old, [row("a", "x")], [row("b", "x")]], 1, [1.0, 0.5], False, 0)
    assert [len(rows) for rows in kept] == [50, 0, 1]  # round(0.5 * 1) is 0: the last share counts for all older rounds


rows_of_rounds = st.lists(
    st.lists(st.builds(row, st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 3).map(float)), max_size=6),
    min_size=1,
    max_size=4,
)


@given(rows_of_rounds, st.integers(0, 2), st.booleans())
def test_nothing_is_kept_twice_or_lost_uncounted(rounds, per_prompt, newest_first):
    kept, counts = pool(rounds, per_prompt, [1.0], newest_first, 0)
    flat = [text for rows in texts(kept) for text in rows]
    assert len(flat) == len(set(flat))
    assert {text[0] for text in flat} == {r["messages"][0]["content"] for rows in rounds for r in rows}
    for rows, mine, count in zip(rounds, kept, counts, strict=True):
        assert (
            count["read"] == len(rows) == count["duplicates"] + count["not_drawn"] + count["outranked"] + count["kept"]
        )
        assert count["kept"] == len(mine)
    best = {}
    for r in (r for rows in rounds for r in rows):
        name = r["messages"][0]["content"]
        best[name] = max(best.get(name, 0.0), r["score"])
    if per_prompt == 1 and not newest_first and not any(count["duplicates"] for count in counts):
        assert {r["messages"][0]["content"]: r["score"] for rows in kept for r in rows} == best


def run(folder: Path, files: list[str], **extra: str) -> dict:
    words = [word for name, value in extra.items() for word in (f"--{name}", value)]
    return pool_samples.main(["--output_dir", str(folder), "--sample_files", *files, *words])


@pytest.fixture
def files(tmp_path) -> list[str]:
    found = []
    for number, rows in enumerate((FIRST, SECOND), 1):
        folder = tmp_path / f"v{number}"
        folder.mkdir()
        found.append(write_rows(folder / "best.jsonl", rows))
    return found


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pooled.jsonl").read_text().splitlines()]


def test_the_script_reports_what_went_in(files, tmp_path):
    summary = run(tmp_path / "out", files)
    assert [(r["round"], r["score"]) for r in written(tmp_path / "out")] == [(1, 3.0), (1, 5.0), (2, 4.0), (2, 0.0)]
    assert (summary["rows"], summary["prompts"]) == (4, 4)
    assert [entry["kept"] for entry in summary["rounds"]] == [2, 2]
    assert summary["rounds"][0]["mean_score"] == 4.0
    assert summary["by_prompt_source"] == {"a": 1, "b": 1, "c": 1, "d": 1}
    last = run(tmp_path / "last", files, pool="last")
    assert [entry["kept"] for entry in last["rounds"]] == [0, 3]
    assert {r["round"] for r in written(tmp_path / "last")} == {2}


def test_files_that_changed_under_their_names_are_pooled_again(files, tmp_path):
    assert run(tmp_path / "out", files)["rows"] == 4
    write_rows(Path(files[1]), SECOND[:1])
    assert run(tmp_path / "out", files)["rows"] == 3  # of a, b and c
    folder = tmp_path / "pairs"
    folder.mkdir()
    for file in pool_preferences.FILES:
        write_rows(folder / f"{file}.jsonl", [{"n": 1}])
    args = ["--preference_dirs", str(folder), "--output_dir", str(tmp_path / "joined")]
    assert pool_preferences.main(args)["safety"] == 1
    write_rows(folder / "safety.jsonl", [{"n": 1}, {"n": 2}])
    assert pool_preferences.main(args)["safety"] == 2


def test_scores_made_anew_are_those_of_the_newest_models(files, tmp_path):
    paths = {f"{name}_model_path": save_tiny_reward_model(tmp_path / name, seed) for seed, name in
             enumerate(("helpfulness", "safety"))}  # fmt: skip
    run(
        tmp_path / "out",
        files,
        rank_by="rescored",
        per_prompt="0",
        use_cpu="true",
        safety_threshold="0.000001",
        **paths,
    )
    model = AutoModelForSequenceClassification.from_pretrained(paths["helpfulness_model_path"]).eval()
    chat = load_chat_format(load_tokenizer(paths["helpfulness_model_path"]))
    for r in written(tmp_path / "out"):
        ids = torch.tensor([chat.encode_dialogue(r["messages"]).input_ids])
        with torch.no_grad():
            assert float(model(ids).logits) == pytest.approx(r["score"], abs=1e-4)


def test_scores_of_different_models_are_not_compared(files, tmp_path):
    for number, file in enumerate(files):
        settings = {"helpfulness_model_path": f"h{number}", "safety_model_path": "s"}
        (Path(file).parent / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="different reward models; use rescored or newest"):
        run(tmp_path / "out", files)
    assert run(tmp_path / "newest", files, rank_by="newest")["rows"] == 4
    assert run(tmp_path / "last", files, pool="last")["rows"] == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rank_by": "rescored"}, "rescored needs helpfulness_model_path"),
        ({"safety_model_path": "x"}, "no effect with rank_by: score"),
        ({"per_prompt": "-1"}, "per_prompt"),
        ({"round_shares": "1.5"}, "round_shares"),
        ({"round_shares": "0"}, "newest round's"),
        ({"dtype": "bfloat16"}, "dtype: no effect with rank_by: score"),
        ({"safety_threshold": "0.3", "rank_by": "newest"}, "safety_threshold: no effect with rank_by: newest"),
        ({"score_token_budget": "64"}, "score_token_budget: no effect"),
        (
            {
                "score_token_budget": "-1",
                "rank_by": "rescored",
                "helpfulness_model_path": "h",
                "safety_model_path": "s",
            },
            "score_token_budget must not be negative",
        ),
    ],
)
def test_bad_settings_are_refused(files, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", files, **extra)


def test_shares_of_rounds_that_do_not_count_are_refused():
    with pytest.raises(UserError, match=r"round_shares: with pool: last .* \[0.5\] would have no effect"):
        PoolSettings(sample_files=["a", "b"], pool="last", round_shares=[1.0, 0.5])
    PoolSettings(sample_files=["a", "b"], pool="last", round_shares=[0.5])
    PoolSettings(sample_files=["a"], round_shares=[1.0, 0.5])  # a first round


def test_a_round_that_kept_nothing_is_told_why(files, tmp_path):
    empty = write_rows(tmp_path / "best.jsonl", [])
    with pytest.raises(UserError, match="best.jsonl is empty: .* min_score"):
        run(tmp_path / "out", [files[0], empty])


def test_bad_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "out", [files[0], str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="is there twice"):
        run(tmp_path / "out", [files[0], files[0]])
    unscored = write_rows(tmp_path / "unscored.jsonl", [row("a", "x", None)])
    with pytest.raises(UserError, match="unscored.jsonl: rows have no `score`"):
        run(tmp_path / "out", [unscored])
    assert run(tmp_path / "out", [unscored], rank_by="newest")["rows"] == 1


def test_preferences_of_several_collections_become_one_folder(tmp_path):
    for name, rows in (("one", [{"n": 1}]), ("two", [{"n": 2}, {"n": 3}])):
        (tmp_path / name).mkdir()
        for file in pool_preferences.FILES:
            write_rows(tmp_path / name / f"{file}.jsonl", rows if file != "safety_test" else [])
    args = ["--preference_dirs", str(tmp_path / "one"), str(tmp_path / "two"), "--output_dir", str(tmp_path / "out")]
    summary = pool_preferences.main(args)
    assert (summary["helpfulness"], summary["safety_test"]) == (3, 0)
    lines = (tmp_path / "out" / "safety.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [1, 2, 3]
    (tmp_path / "two" / "safety.jsonl").unlink()
    with pytest.raises(UserError, match="safety.jsonl is missing"):
        pool_preferences.main([*args[:-1], str(tmp_path / "again")])
