"""The script: files and models in, tables, plots, scores and samples out; resumed, refused, started twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_any_reward_model import save_encoder
from tiny_models import save_tiny_reward_model, write_rows

from configs.errors import UserError
from configs.evaluate_reward_settings import EvaluateRewardSettings
from configs.records import RATINGS
from reward.any_model import AnyRewardModel
from rlhf import reward_report
from rlhf.evaluate_reward import main

ROOT = Path(__file__).resolve().parents[1]
SAFETY = ("chosen_safe", "both_safe", "both_unsafe")


def message(role, content):
    return {"role": role, "content": content}


def preference(i, **fields):
    row = {
        "prompt": [message("user", f"question {i}")],
        "chosen": [message("assistant", f"{i} yes" + " indeed" * (i % 3))],
        "rejected": [message("assistant", f"{i} no")],
        "rating": RATINGS[i % 4],
        "safety": SAFETY[i % 3],
        "source": "even" if i % 2 == 0 else "odd",
        "p_chosen": 0.8,
    }
    return row | fields


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "h": save_tiny_reward_model(root / "helpful" / "model", seed=1),
        "s": save_tiny_reward_model(root / "safe" / "model", seed=2),
        "bert": save_encoder(root / "bert"),
    }


@pytest.fixture
def files(tmp_path):
    (tmp_path / "1").mkdir()
    first = write_rows(tmp_path / "test.jsonl", [preference(i) for i in range(10)])
    again = write_rows(tmp_path / "1" / "test.jsonl", [preference(i) for i in range(10, 16)])
    hh = [{k: f"\n\nHuman: a {i}\n\nAssistant: {v}" for k, v in (("chosen", "yes"), ("rejected", "no"))}
          for i in range(5)]  # fmt: skip
    return [first, again, write_rows(tmp_path / "hh.jsonl", hh)]


def arguments(models, files, tmp_path, *more):
    return [
        "--helpfulness_model_path", models["h"], "--safety_model_path", models["s"], "--other_model_paths",
        models["bert"], "--eval_files", *files, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true",
        *map(str, more),
    ]  # fmt: skip


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_written_and_fits_together(models, files, tmp_path, capsys):
    summary = main(arguments(models, files, tmp_path, "--pairs_per_shard", 4, "--num_samples", 2))
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert list(summary["models"]) == ["helpfulness", "safety", "bert"]
    assert [summary["models"][name]["input_format"] for name in summary["models"]] == ["chat", "chat", "text_pair"]
    assert summary["test_sets"]["test"]["files"] == files[:2]  # files of one name are one test set
    assert {name: about["pairs"] for name, about in summary["test_sets"].items()} == {"test": 16, "hh": 5}
    assert set(summary["agreement"]) == {"test", "hh"}

    rows = jsonl(run / "scores.jsonl")
    assert [(row["file"], row["index"]) for row in rows[9:11]] == [(files[0], 9), (files[1], 0)]
    assert not any("question" in line for line in (run / "scores.jsonl").read_text().splitlines())
    bert = AnyRewardModel(models["bert"])
    bert.load(None, "sdpa", torch.device("cpu"))
    pair = [bert.encode([message("user", "question 3"), message("assistant", text)]) for text in ("3 yes", "3 no")]
    expected = bert.scores(pair, 512)
    assert [rows[3][f"r_{side}"]["bert"] for side in ("chosen", "rejected")] == pytest.approx(expected, abs=1e-5)
    right = sum(row["r_chosen"]["safety"] > row["r_rejected"]["safety"] for row in rows[:16])
    assert summary["models"]["safety"]["test_sets"]["test"]["accuracy"] == right / 16

    samples = jsonl(run / "samples.jsonl")
    wrong = [s for s in samples if s["kind"] == "most_wrong" and s["model"] == "bert"]
    gaps = [s["r_rejected"]["bert"] - s["r_chosen"]["bert"] for s in wrong]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == max(row["r_rejected"]["bert"] - row["r_chosen"]["bert"] for row in rows)
    apart = [s["R_h"] - s["R_s"] for s in samples if s["kind"] == "disagreement"]
    first = [gap for gap in apart if gap > 0]
    assert apart == sorted(first, reverse=True) + sorted(gap for gap in apart if gap < 0)
    assert len(first) == 2

    plots = sorted(path.stem for path in (run / "plots").glob("*.png"))
    assert plots == ["accuracy", "accuracy_by_rating", "agreement", "calibration", "length", "margins", "scores",
                     "scores_by_safety", "unsafe"]  # fmt: skip
    assert (run / "plots" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.md").read_text()
    assert all(f"plots/{name}.png" in report for name in plots)
    printed = capsys.readouterr().out
    accuracy = summary["models"]["bert"]["average"]["accuracy"]
    for text in ("Accuracy (%) by rating", "Unsafe responses found", f"{100 * accuracy:.1f}"):
        assert text in printed
        assert text in report
    assert "question" not in printed + report  # no text of the data


@pytest.fixture
def no_plots(monkeypatch):
    """For tests that look at scores only: the plots take seconds."""
    monkeypatch.setattr(reward_report, "write_plots", lambda *args: {})


@pytest.mark.usefixtures("no_plots")
def test_a_complete_run_is_not_run_again_but_one_on_other_data_is(models, files, tmp_path):
    call = arguments(models, files, tmp_path)
    main(call)
    stamp = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    main(call)
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == stamp
    write_rows(Path(files[2]), [preference(i) for i in range(3)])  # the same name, other pairs
    assert main(call)["test_sets"]["hh"]["pairs"] == 3


@pytest.mark.usefixtures("no_plots")
def test_a_killed_run_continues(models, files, tmp_path, monkeypatch):
    call = arguments(models, files, tmp_path, "--pairs_per_shard", 8)
    scored = []
    plain = AnyRewardModel.scores

    def until_killed(self, dialogues, budget):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(len(dialogues))
        return plain(self, dialogues, budget)

    monkeypatch.setattr(AnyRewardModel, "scores", until_killed)
    with pytest.raises(KeyboardInterrupt):
        main(call)
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(AnyRewardModel, "scores", lambda *args: scored.append(len(args[1])) or plain(*args))
    resumed = main(call)
    assert scored == 3 * [16, 16, 10]  # 21 pairs in shards of 8, 8 and 5; each scored once for each of three models
    fresh = main([*call, "--output_dir", str(tmp_path / "fresh")])
    names = [name for name in fresh if name != "seconds"]
    assert {name: resumed[name] for name in names} == {name: fresh[name] for name in names}


@pytest.mark.usefixtures("no_plots")
def test_pairs_that_a_model_cannot_read_leave_all_models(models, files, tmp_path):
    rows = [preference(i) for i in range(30)]
    rows[4] = preference(4, chosen=[message("assistant", "x" * 200)])  # more than BERT's 128 positions
    long = [message("user", "y" * 90), message("assistant", "z"), message("user", "question 5")]
    rows[5] = preference(5, prompt=long)  # fits once its oldest turns are dropped
    file = write_rows(tmp_path / "long.jsonl", rows)
    call = arguments(models, [file], tmp_path)
    summary = main(call)
    about = summary["test_sets"]["long"]
    assert (about["pairs"], about["too_long"], about["shortened"]) == (29, 1, 1)
    (refused,) = jsonl(tmp_path / "run" / "too-long.jsonl")
    assert (refused["model"], refused["index"]) == ("bert", 4)
    assert "limit or max_length is 128" in refused["reason"]
    with pytest.raises(UserError, match="1 of 30 pairs cannot be read by every model"):
        main([*call, "--max_reject_share", "0.01"])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"eval_files": []}, "eval_files: name at least one"),
        ({"other_model_paths": []}, "name a reward model"),
        ({"input_format": ["chat", "text_pair", "chat"]}, "input_format: 3 for 2 models"),
        ({"other_model_names": ["x"]}, "other_model_names: 1 names for 2"),
        ({"other_model_paths": ["a/model", "b/a"]}, "two models are called a"),
        ({"test_set_names": ["x", "y"]}, "test_set_names: 2 names for 1"),
        ({"eval_files": ["t.jsonl", "t.jsonl"]}, "named twice"),
        ({"safety_threshold": 1.0}, "safety_threshold"),
        ({"max_length": 0}, "max_length"),
        ({"num_samples": -1}, "num_samples"),
        ({"max_reject_share": 1.0}, "max_reject_share"),
    ],
)
def test_bad_settings_are_refused(changes, part):
    good = {"output_dir": "o", "eval_files": ["t.jsonl"], "other_model_paths": ["a", "b"]}
    assert EvaluateRewardSettings(**good).models()[1].name == "b"
    with pytest.raises(UserError, match=part):
        EvaluateRewardSettings(**(good | changes))


def test_missing_files_and_models_are_named_before_any_work(models, files, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        main(arguments(models, [str(tmp_path / "none.jsonl")], tmp_path))
    with pytest.raises(UserError, match="no Hugging Face model at"):
        main(arguments(models | {"s": str(tmp_path / "nowhere")}, files, tmp_path))
    assert not (tmp_path / "run" / "settings.yaml").exists()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(models, files, tmp_path):
    one = main(arguments(models, files, tmp_path, "--pairs_per_shard", 4))
    call = arguments(models, files, tmp_path, "--pairs_per_shard", 4, "--output_dir", tmp_path / "two")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "rlhf/evaluate_reward.py", *call], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["models"] == one["models"]
    assert done.stdout.count("Accuracy (%) by test set") == 1
