"""The scaling study: nested subsets, what is reported of the cells, and the script from files to a page."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_policy, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError
from configs.records import RATINGS
from configs.row_files import read_rows
from configs.scaling_settings import ScalingSettings
from reward.mixing import nested_subsets
from rlhf import scaling_report, scaling_study, train_reward
from rlhf.models import save_first_layers


def row(prompt: str, number: int) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": f"the cat {number}"}],
        "rejected": [{"role": "assistant", "content": f"the dog {number}"}],
        "rating": RATINGS[number % 4],
        "p_chosen": 0.9,
    }


ROWS = [row(f"question {i // 2}", i) for i in range(16)]  # eight prompts of two rows each


def test_a_share_by_prompt_takes_whole_prompts():
    quarter, half, all_of_it = nested_subsets(ROWS, [0.25, 0.5, 1.0], by_prompt=True, seed=3)
    assert (len(quarter), len(half)) == (4, 8)  # 2 of 8 prompts and 4 of 8
    assert all_of_it == ROWS
    for part in (quarter, half):
        prompts = [r["prompt"][0]["content"] for r in part]
        assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_the_same_prompt_in_other_letters_is_one_prompt():
    rows = [row("Question 1?", 0), row("question 1", 1), row("question 2", 2), row("question 2!", 3)]
    (half,) = nested_subsets(rows, [0.5], by_prompt=True, seed=0)
    assert half in (rows[:2], rows[2:])


@given(
    prompts=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    by_prompt=st.booleans(),
    seed=st.integers(0, 5),
)
def test_subsets_are_nested_in_order_and_of_the_right_size(prompts, shares, by_prompt, seed):
    rows = [row(f"q{prompt}", i) for i, prompt in enumerate(prompts)]
    units = len(set(prompts)) if by_prompt else len(rows)
    place = {id(r): i for i, r in enumerate(rows)}
    before: set[int] = set()
    for share, part in zip(sorted(shares), nested_subsets(rows, sorted(shares), by_prompt, seed), strict=True):
        places = [place[id(r)] for r in part]
        assert places == sorted(set(places))
        assert before <= set(places)
        taken = len({prompts[i] for i in places}) if by_prompt else len(places)
        assert share * units - 1 < taken <= share * units + 1e-9
        before = set(places)


def test_seeds_draw_different_subsets():
    drawn = {str(nested_subsets(ROWS, [0.5], by_prompt=False, seed=seed)) for seed in range(8)}
    assert len(drawn) > 4


def test_the_fitted_line_is_that_of_least_squares():
    # x = log2(2, 4, 8) = 1, 2, 3; y = 0.5, 0.6, 0.9: slope (0.9 - 0.5) / 2 = 0.2, intercept 2/3 - 2 * 0.2;
    # residuals 1/30, -2/30, 1/30, so sum of squares 6/900; standard error sqrt(6/900 / 1 / 2)
    fit = scaling_report.log_fit([2, 4, 8], [0.5, 0.6, 0.9])
    assert fit == pytest.approx({"per_doubling": 0.2, "intercept": 2 / 3 - 0.4, "standard_error": (6 / 1800) ** 0.5})
    assert scaling_report.log_fit([2, 2, 8], [0.5, 0.6, 0.9]) is None  # any two points lie on a line


def cell(model="a", share=0.5, seed=0, pairs=8, accuracy=0.7, strong=0.8):
    return {
        "model": model, "parameters": 1_234_567, "share": share, "seed": seed, "train_pairs": pairs,
        "accuracy": accuracy, "test_pairs": 10, "by_rating": {RATINGS[0]: strong}, "by_rating_pairs": {RATINGS[0]: 5},
        "ceiling": 0.95, "ceiling_by_rating": {RATINGS[0]: 1.0},
    }  # fmt: skip


def test_a_point_is_the_mean_over_its_seeds():
    cells = [cell(seed=0, accuracy=0.7), cell(seed=1, accuracy=0.9, pairs=10), cell(share=1.0, pairs=16)]
    first, second = scaling_report.points(cells)
    assert (first["pairs"], first["seeds"], second["pairs"]) == (9, [0, 1], 16)
    # the mean is 8 of 10 test pairs: Wilson's interval is 0.4902 to 0.9433, for one seed or for many
    assert first["overall"]["mean"] == pytest.approx(0.8)
    assert first["overall"]["ci95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert first["overall"]["sd"] == pytest.approx(0.02**0.5)  # ((0.1)^2 + (0.1)^2) / (2 - 1)
    assert second["overall"]["sd"] is None


def test_table_and_page_hold_every_figure():
    cells = [cell(pairs=p, share=p / 32, accuracy=a) for p, a in ((8, 0.5), (16, 0.6), (32, 0.7))]
    found, fits = scaling_report.points(cells), scaling_report.fits(cells)
    titles, rows = scaling_report.table(found)
    assert titles == ["model", "share", "pairs", "all", "significantly"]
    assert rows[0][:3] == ["a (1.23 M)", "0.25", "8"]
    assert rows[0][3].startswith("50.0 (")
    assert rows[-1] == ["best possible", "", "", "95.0", "100.0"]
    page = scaling_report.markdown({"points": found, "fits": fits})
    assert "a doubling of the data brought +10.00 points (standard error 0.00) on all pairs" in page
    assert all(" | ".join(line) in page for line in rows)


def test_the_plot_has_a_line_a_model_and_the_ceiling():
    cells = [cell(m, p / 32, 0, p, a) for m, a in (("a", 0.6), ("b", 0.7)) for p in (8, 16, 32)]
    figure = scaling_report.figure(scaling_report.points(cells), scaling_report.fits(cells))
    left, right = figure.axes
    assert [axis.get_xscale() for axis in (left, right)] == ["log", "log"]
    names = left.get_legend_handles_labels()[1]
    assert names == ["best possible", "a (1.23 M)", "b (1.23 M)"]
    assert len(left.containers) == 2  # error bars
    assert right.get_title(loc="left") == "Significantly better"
    unrated = [c | {"by_rating": {}, "by_rating_pairs": {}, "ceiling": None, "ceiling_by_rating": None} for c in cells]
    (only,) = scaling_report.figure(scaling_report.points(unrated), scaling_report.fits(unrated)).axes
    assert only.get_legend_handles_labels()[1] == names[1:]


def test_the_first_layers_of_a_model_are_its_own(tmp_path):
    whole = save_tiny_policy(tmp_path / "whole", num_hidden_layers=3)
    folder = save_first_layers(whole, 2, tmp_path / "cut")
    cut, full = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, whole))
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 2
    weights = full.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in cut.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(whole))
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert save_first_layers(whole, 2, folder) == folder  # is there: not written again
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    other = save_tiny_policy(tmp_path / "other", num_hidden_layers=3)
    for path, layers in ((whole, 1), (other, 2)):
        with pytest.raises(UserError, match=f"cut holds something other than the first {layers} layers of {path}"):
            save_first_layers(path, layers, folder)
    with pytest.raises(UserError, match="4 layers are asked for, but the model has 3"):
        save_first_layers(whole, 4, tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_shares": [0.5, 1.5]}, "data_shares: must be above 0 and at most 1, got 1.5"),
        ({"data_shares": [0.0]}, "above 0"),
        ({"data_shares": [float("nan")]}, "above 0"),
        ({"data_shares": [0.5, 0.5]}, "data_shares: '0.5' is there twice"),
        ({"data_shares": []}, "data_shares: the list is empty"),
        ({"model_name_or_paths": ["a/x", "b/x"]}, "'x' is there twice; name the models with model_labels"),
        ({"model_name_or_paths": ["a", "a"]}, "model_name_or_paths: 'a' is there twice"),
        ({"model_labels": ["x", "y"]}, "2 labels for 1 model_name_or_paths"),
        ({"model_labels": ["../x"]}, "letters, digits"),
        ({"model_labels": [".."]}, "letters, digits"),
        ({"seeds": [1, 1]}, "seeds: '1' is there twice"),
        ({"seeds": [-1]}, "seeds: must not be negative"),
        ({"layers": [0]}, "layers: a model keeps at least 1 layer"),
        ({"layers": [2, 2]}, "layers: '2' is there twice"),
        ({"parallel_cells": 0}, "parallel_cells"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(".", r"\.")):
        ScalingSettings(**({"model_name_or_paths": ["m"]} | fields))


def test_models_are_named_after_their_paths():
    settings = ScalingSettings(model_name_or_paths=["runs/demo/sft/model", "Org/Llama-2-7b", "local folder"])
    assert settings.labels == ["sft", "Llama-2-7b", "local-folder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("models") / "sft" / "model")


@pytest.fixture
def call(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    test = write_rows(tmp_path / "test.jsonl", [row(f"other {i}", i) for i in range(8)])
    return [
        "--model_name_or_paths", model, "--train_files", train, "--eval_files", test, "--layers", "1", "2",
        "--data_shares", "1.0", "0.5", "0.25", "--output_dir", str(tmp_path / "study"), "--use_cpu", "true",
        "--max_length", "256", "--max_steps", "1", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
    ]  # fmt: skip


def test_a_killed_study_goes_on_where_it_was(call, tmp_path, monkeypatch, capsys):
    trained: list[str] = []
    whole = train_reward.main

    def until_the_fourth(args):
        trained.append(Path(args[1]).parent.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return whole(args)

    monkeypatch.setattr(train_reward, "main", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        scaling_study.main(call)
    assert trained == [f"sft-{n}-{share}-seed0" for share in (0.25, 0.5) for n in ("1layer", "2layers")]
    assert not (tmp_path / "study" / "summary.json").exists()
    summary = scaling_study.main(call)
    assert trained[4:] == ["sft-2layers-0.5-seed0", "sft-1layer-1-seed0", "sft-2layers-1-seed0"]

    study = tmp_path / "study"
    assert json.loads((study / "summary.json").read_text()) == summary
    cells = summary["cells"]
    assert [(c["model"], c["share"], c["train_pairs"]) for c in cells] == [
        (f"sft-{n}", share, pairs) for n in ("1layer", "2layers") for share, pairs in ((0.25, 4), (0.5, 8), (1.0, 16))
    ]
    assert cells[0]["parameters"] < cells[3]["parameters"]
    assert {c["test_pairs"] for c in cells} == {8}
    assert summary["points"][0]["ceiling"] == pytest.approx(0.9)
    assert set(summary["fits"]) == {"sft-1layer", "sft-2layers"}
    assert "| sft-1layer (" in (study / "report.md").read_text()
    assert (study / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (study / "scaling.svg").read_text()
    assert "sft-2layers" in capsys.readouterr().out

    files = {path.name.split("-seed0")[0]: path for path in (study / "data").iterdir()}
    quarter, half, everything = (
        [r["chosen"] for _, r in read_rows(files[f"train-{share}"])] for share in ("0.25", "0.5", "1")
    )
    assert all(r in half for r in quarter)
    assert all(r in everything for r in half)

    assert scaling_study.main(call) == summary  # complete: nothing is done again
    assert len(trained) == 7
    shutil.rmtree(study / "sft-1layer-1-seed0" / "model")  # the cells' models may be deleted
    write_rows(tmp_path / "train.jsonl", [*ROWS, row("question new", 0)])  # other data under the same name
    monkeypatch.setattr(train_reward, "main", lambda args: pytest.fail("a cell begins again, as it should"))
    with pytest.raises(pytest.fail.Exception):
        scaling_study.main(call)
    write_rows(tmp_path / "train.jsonl", ROWS)
    monkeypatch.setattr(train_reward, "main", until_the_fourth)
    more = scaling_study.main([*call[:7], "2", *call[9:], "--seeds", "0", "1"])
    assert trained[7:] == [f"sft-2layers-{share}-seed1" for share in ("0.25", "0.5", "1")]
    assert [len(p["seeds"]) for p in more["points"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_paths", "no/such/model"], "no/such/model' cannot be used as a model"),
        (["--layers", "3"], "layers: 3, but .* has 2 layers"),
        (["--data_shares", "0.1"], "data_shares: 0.1 of 16 training pairs, by prompt, is no pair"),
        (["--data_shares", "0.5", "0.51"], "data_shares: 0.51 gives the same 8 pairs"),
        (["--max_length", "8"], "pairs do not fit max_length 8"),
        (["--margin_table", "1", "2"], "margin"),
        (["--eval_files", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--parallel_cells", "2", "--use_cpu", "false"], "parallel_cells: more than 1 is for one process on the CPU"),
        (["--model_name_or_path", "m"], "unknown field '--model_name_or_path'; did you mean 'model_name_or_paths'"),
        (["--seed", "1"], "unknown field '--seed'; did you mean 'seeds'"),
    ],
)
def test_mistakes_are_found_before_any_training(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(train_reward, "main", lambda args: pytest.fail("a cell was trained"))
    with pytest.raises(UserError, match=message):
        scaling_study.main([*call, *flags])
    assert not (tmp_path / "study" / "settings.yaml").exists()


def test_a_pair_that_one_model_cannot_take_is_left_out_for_all(call, model, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})  # to the first model it is ordinary text
    tokenizer.save_pretrained(other)
    rows = [row("about <turn>", 0), *ROWS]
    train = write_rows(tmp_path / "tagged.jsonl", rows)
    seen: list[dict] = []
    monkeypatch.setattr(scaling_study, "train_cells", lambda cells, *_: seen.extend(cell.settings for cell in cells))
    flags = ["--model_name_or_paths", model, str(other), "--data_shares", "1.0", "--train_files", train]
    with pytest.raises(FileNotFoundError):  # no cell was trained, so none has a summary
        scaling_study.main([*call[:6], *call[9:], *flags, "--max_reject_share", "0.1"])
    (file,) = {settings["train_files"][0] for settings in seen}
    assert [settings["model_name_or_path"] for settings in seen] == [model, str(other)]
    assert len(list(read_rows(file))) == len(ROWS)
    with pytest.raises(UserError, match="1 of 17 pairs do not fit max_length 256 or hold special tokens of a model"):
        scaling_study.main([*call[:6], *call[9:], *flags])


def test_held_out_prompts_and_mixture(call, tmp_path, monkeypatch):
    """Without eval_files all seeds share one test set; mix_weights are met before the shares are taken."""
    second = write_rows(tmp_path / "second.jsonl", [row(f"more {i}", i) | {"source": "second"} for i in range(64)])
    seen: list[dict] = []
    monkeypatch.setattr(scaling_study, "train_cells", lambda cells, *_: seen.extend(cell.settings for cell in cells))
    flags = ["--train_files", call[3], second, "--mix_weights", "1", "3", "--eval_fraction", "0.3", "--seeds", "0", "1"]
    with pytest.raises(FileNotFoundError):
        scaling_study.main([*call[:4], *call[9:], *flags, "--data_shares", "1.0"])
    (test_file,) = {file for settings in seen for file in settings["eval_files"]}
    held_out = {str(r["prompt"]) for _, r in read_rows(test_file)}
    assert held_out
    for settings in seen:
        as_written = (settings[name] for name in ("mix_weights", "mix_rows", "deduplicate", "leaked_prompts"))
        assert tuple(as_written) == (None, None, False, "keep")
        rows = [r for _, r in read_rows(settings["train_files"][0])]
        sources = [r["source"] for r in rows]
        assert sources.count("second") == 3 * sources.count("train") > 0
        assert not held_out & {str(r["prompt"]) for r in rows}


@pytest.mark.slow
def test_cells_in_forked_processes(call, tmp_path):
    flags = ["--parallel_cells", "2", "--data_shares", "1.0"]
    summary = scaling_study.main([*call, *flags])
    assert [cell["model"] for cell in summary["cells"]] == ["sft-1layer", "sft-2layers"]
    assert (tmp_path / "study" / "sft-1layer-1-seed0" / "log.txt").exists()
