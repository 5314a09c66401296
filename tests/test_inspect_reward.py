"""What the reward notebook computes and shows: loading, picking pairs, following a response, figures and HTML."""

import json
import shutil

import pytest
import torch
import yaml
from test_any_reward_model import save_encoder
from tiny_models import save_tiny_reward_model, write_rows

from configs.chat import load_chat_format
from configs.errors import UserError
from reward.scorer import score_ids
from rlhf import inspect_reward as inspect
from rlhf import notebook_views as views
from rlhf.notebook_parts import Picture

TEXT = "A naïve 猫 costs $5, not $6.\n<b>cat</b>"


def row(index, chosen="the red cat", rejected="a blue dog", **fields):
    return {
        "prompt": [{"role": "user", "content": f"{index} cat"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **fields,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_reward_model(tmp_path_factory.mktemp("reward"), seed=1)


@pytest.fixture(scope="module")
def scorer(folder):
    return inspect.load_scorer(folder)


@pytest.fixture
def pairs():
    """Margins r_c - r_r: helpfulness 1, -2, 3, -1; safety -1, -1, 2, 4."""
    return inspect.PairScores(
        rows=[row(0, rating="better"), row(1, chosen="<i>", p_chosen=0.25), row(2), row(3)],
        chosen={"helpfulness": [1.0, 0.0, 3.0, 0.0], "safety": [0.0, 0.0, 2.0, 4.0]},
        rejected={"helpfulness": [0.0, 2.0, 0.0, 1.0], "safety": [1.0, 1.0, 0.0, 0.0]},
        left_out=0,
    )


def test_picks_worked_by_hand(pairs):
    assert pairs.differences("helpfulness") == [1, -2, 3, -1]
    assert pairs.ratings == ["better", None, None, None]
    assert pairs.responses("safety") == [0, 0, 2, 4, 1, 1, 0, 0]
    assert inspect.most_wrong(pairs, "helpfulness", 5) == [1, 3]
    assert inspect.most_wrong(pairs, "helpfulness", 1) == [1]
    assert inspect.clearest(pairs, "safety") == 3
    # Pairs 0 and 3. Root mean squares sqrt(15/4) = 1.94 and sqrt(22/4) = 2.35: pair 0 has min(1/1.94, 1/2.35) = 0.43,
    # pair 3 min(1/1.94, 4/2.35) = 0.52.
    assert inspect.disagreements(pairs, "helpfulness", "safety") == [3, 0]
    # With a margin of 3 in pair 0: 3/2.40 and 1/2.35, so 0.43, before pair 3's min(1/2.40, 4/2.35) = 0.42.
    pairs.chosen["helpfulness"][0] = 3.0
    assert inspect.disagreements(pairs, "helpfulness", "safety") == [0, 3]
    assert inspect.share_below(1.0, [0.0, 1.0, 2.0, 0.5]) == 2.5 / 4


def test_a_response_is_followed_to_its_score(scorer):
    prompt = [{"role": "user", "content": "the cat"}]
    path = inspect.follow(scorer, "the cat", TEXT)
    chat_format, model = load_chat_format(scorer.model.tokenizer), scorer.model.model
    ids = chat_format.encode_dialogue([*prompt, {"role": "assistant", "content": TEXT}]).input_ids
    begin = len(chat_format.encode_prompt(prompt))
    beginnings = [ids[:last] for last in range(begin, len(ids))]
    assert path.passing == pytest.approx(score_ids(model, beginnings).tolist(), abs=1e-4)
    ended = score_ids(model, [[*beginning, ids[-1]] for beginning in beginnings])
    assert path.ended == pytest.approx(ended.tolist(), abs=1e-4)
    assert path.ended[-1] == pytest.approx(score_ids(model, [ids]).item(), abs=1e-4)
    assert len(path.tokens) == len(path.ended) == len(path.passing) == len(ids) - begin
    assert path.tokens[0] == ""
    assert "".join(path.tokens) == f" {TEXT} "  # characters of several tokens are whole, blanks are kept
    assert "猫" in path.tokens
    assert sum(path.changes) == pytest.approx(path.ended[-1] - path.ended[0], abs=1e-5)
    assert inspect.follow(scorer, prompt, TEXT) == path


def test_a_model_of_another_kind_is_followed_by_words(tmp_path):
    scorer = inspect.load_scorer(save_encoder(tmp_path))
    assert scorer.max_length == 128
    path = inspect.follow(scorer, "the cat", "runs over  <b>")
    assert path.tokens == ["runs", " over", "  <b>"]
    assert path.passing == []
    pairs = inspect.score_all({"mine": scorer}, [row(0, chosen="runs over  <b>", rejected="runs")])
    path = inspect.follow(scorer, "0 cat", "runs over  <b>")
    assert path.ended[-1] == pytest.approx(pairs.chosen["mine"][0], abs=1e-5)
    assert path.ended[0] == pytest.approx(pairs.rejected["mine"][0], abs=1e-5)
    (axis,) = views.token_paths({"mine": {"chosen": path}}).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["runs", "over", "<b>"]
    assert len(axis.lines) == 1
    assert '<br>runs<span title="' in views.coloured_tokens(path, "mine")._repr_html_()


def test_a_dialogue_beyond_the_model_is_refused(scorer):
    with pytest.raises(UserError, match="the model reads 512; shorten it"):
        inspect.follow(scorer, "cat", "猫" * 300)


def test_pairs_are_scored_by_all_models(scorer, monkeypatch):
    monkeypatch.setattr(inspect, "STEP", 2)
    short = inspect.RewardScorer(scorer.model, max_length=40)
    rows = [row(0), row(1, chosen="猫" * 20), row(2), row(3, rejected="a </s> dog"), row(4), row(5, chosen="a tree")]
    found = inspect.score_all({"long": scorer, "short": short}, rows)
    assert found.left_out == 2  # too long for one of the models; a special token
    assert [r["prompt"] for r in found.rows] == [rows[i]["prompt"] for i in (0, 2, 4, 5)]
    chat_format = load_chat_format(scorer.model.tokenizer)
    for side, scores in (("chosen", found.chosen), ("rejected", found.rejected)):
        dialogues = [[*r["prompt"], *r[side]] for r in found.rows]
        alone = score_ids(scorer.model.model, [chat_format.encode_dialogue(each).input_ids for each in dialogues])
        assert scores["short"] == pytest.approx(alone.tolist(), abs=1e-4)
        assert scores["long"] == pytest.approx(alone.tolist(), abs=1e-4)
    with pytest.raises(UserError, match="none of the 6 pairs fits into the 5 tokens"):
        inspect.score_all({"tiny": inspect.RewardScorer(scorer.model, max_length=5)}, rows)


def test_runs_and_model_folders_load(folder, tmp_path):
    run = tmp_path / "runs" / "mine" / "reward"
    run.mkdir(parents=True)
    (run / "settings.yaml").write_text(yaml.safe_dump({"max_length": 64}))
    with pytest.raises(UserError, match="has no model/ yet"):
        inspect.load_scorer(run)
    shutil.copytree(folder, run / "model")
    scorer = inspect.load_scorer(run)
    assert scorer.max_length == 64
    assert inspect.load_scorer(folder).max_length == 512  # of the model's positions
    assert torch.equal(scorer.model.model.score.weight, inspect.load_scorer(run / "model").model.model.score.weight)
    for missing in (tmp_path / "none", "runs/none/reward_helpfulness"):
        with pytest.raises(UserError, match="Run `make demo`"):
            inspect.load_scorer(missing)


def test_pairs_are_read_by_pattern_and_drawn_by_seed(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}_test.jsonl", [row(f"{name}{i}") for i in range(10)])
    pattern = str(tmp_path / "*_test.jsonl")
    every = inspect.read_pairs(pattern, 100)
    assert [r["prompt"][0]["content"] for r in every] == [f"{name}{i} cat" for name in "ab" for i in range(10)]
    some = inspect.read_pairs(pattern, 6)
    assert len(some) == 6
    assert some == inspect.read_pairs(pattern, 6) != inspect.read_pairs(pattern, 6, seed=1)
    assert some == [r for r in every if r in some]  # in the order of the files
    assert len(inspect.read_pairs(str(tmp_path / "a_test.jsonl"), 100)) == 10
    with pytest.raises(UserError, match="no file matches"):
        inspect.read_pairs(str(tmp_path / "c*.jsonl"), 5)


def test_html_is_escaped_and_coloured_by_sign(pairs):
    path = inspect.TokenPath(["", "<b>", " up\n", ""], ended=[0.0, 2.0, 1.0, 1.0], passing=[0.0] * 4)
    text = views.coloured_tokens(path, "a & b")._repr_html_()
    assert "<b>a &amp; b</b>: from 0.00 to 1.00, largest step 2.00" in text
    assert f"rgba({views.RAISES}, 0.75)" in text  # the largest step, up
    assert f"rgba({views.LOWERS}, 0.38)" in text  # half of it, down
    assert "&lt;b&gt;</span>" in text
    assert " up↵<br></span>" in text
    table = views.pairs_table(pairs, [1, 0], "none")._repr_html_()
    assert "&lt;i&gt;" in table
    assert "<i>" not in table
    assert "0.00,\u00a02.00" in table
    assert table.index("1 cat") < table.index("0 cat")
    assert "p_chosen" in table
    assert "source" not in table  # no row has one
    assert "no &lt; pair" in views.pairs_table(pairs, [], "no < pair")._repr_html_()


def test_a_score_is_set_among_others(scorer):
    path = inspect.follow(scorer, "cat", "a dog")
    card = views.score_card({"mine": scorer}, {"mine": [path.ended[-1] - 1, path.ended[-1] + 1]}, "cat", "a dog")
    assert "<td" in card._repr_html_()
    assert ">50%</td>" in card._repr_html_()
    assert f">{path.ended[-1]:.2f}</td>" in card._repr_html_()


def test_figures_become_pictures_on_white(scorer, recwarn):
    paths = {"safety": {side: inspect.follow(scorer, "cat", text) for side, text in (("a", TEXT), ("b", "猫"))}}
    figure = views.token_paths(paths)
    long, short = figure.axes
    labels = [label.get_text() for label in long.get_xticklabels()]
    assert labels[0] == "(nothing)"
    assert len(labels) <= views.MOST_LABELS
    assert len(long.lines[0].get_xdata()) == len(paths["safety"]["a"].tokens)
    names = [label.get_text() for label in short.get_xticklabels()]
    assert names[-2:] == ["猫", "␣"]
    assert not any(label.get_parse_math() for label in long.get_xticklabels())  # "$5, not $6" is no formula
    png, size = Picture(figure)._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert 900 < size["width"] < 1100  # CSS pixels of 10 inches, cut to what is drawn
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert [str(warning.message) for warning in recwarn] == []  # no noise about characters that the font lacks
    empty = Picture(views.token_paths({}), "Nothing here.")
    assert empty._repr_png_() is None
    assert repr(empty) == "Nothing here."


def test_a_mistake_in_a_notebook_shows_one_line(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    result = shell.run_cell("from configs.errors import UserError\nraise UserError('no file x')")
    assert not result.success  # so the cells below do not run
    out, err = capsys.readouterr()
    assert (out + err).strip() == "error: no file x"
    assert json.dumps(out).count("Traceback") == 0
