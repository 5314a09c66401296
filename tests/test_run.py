"""Run folders: what is written, by whom, and what survives a kill."""

import errno
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml

from configs.errors import UserError
from rlhf.claims import is_claimed
from rlhf.run import RunFolder, numbers, write_atomic


def steps(path):
    return [json.loads(line)["step"] for line in path.open(encoding="utf-8", newline="\n")]


def test_the_numbers_of_a_summary_are_named_by_their_path():
    summary = {
        "pairs": 3,
        "ratings": {"better": 2},
        "ci95": {"kl": [0.1, 0.2]},
        "seen": True,
        "gold": None,
        "name": "x",
    }
    assert numbers(summary) == {"pairs": 3, "ratings/better": 2}


def test_a_finished_run_tells_all_about_itself(tmp_path):
    settings = {"learning_rate": 1e-4, "files": ("a", "b"), "path": Path("x"), "report_to": "none"}
    run = RunFolder(tmp_path / "deep" / "out", settings, "sft")
    assert RunFolder.completed(run.path) is None
    run.log(1, {"loss": torch.tensor(0.5), "reward": math.nan, "n": 3})
    run.samples(1, [{"response": "é", "score": torch.tensor([1.0, 2.0])}])
    written = run.finish({"accuracy": 0.9, "by_rating": {"better": torch.tensor(1.0)}})
    assert yaml.safe_load((run.path / "settings.yaml").read_text()) == {
        "learning_rate": 1e-4, "files": ["a", "b"], "path": "x", "report_to": "none"}  # fmt: skip
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "reward": None, "n": 3}
    assert json.loads((run.path / "samples.jsonl").read_text()) == {"step": 1, "response": "é", "score": [1.0, 2.0]}
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary == written == RunFolder.completed(run.path)
    assert (summary["stage"], summary["accuracy"], summary["by_rating"]) == ("sft", 0.9, {"better": 1.0})
    assert summary["seconds"] >= 0
    assert not list(run.path.glob("*.tmp"))


def test_a_run_counts_as_complete_only_with_the_same_settings(tmp_path):
    settings = {"seed": 1, "files": ("a",), "output_dir": str(tmp_path), "report_to": "none"}
    RunFolder(tmp_path, settings, "sft").finish({})
    assert RunFolder.completed(tmp_path, settings)
    assert RunFolder.completed(tmp_path, settings | {"output_dir": "elsewhere", "report_to": "wandb"})
    assert RunFolder.completed(tmp_path, settings | {"seed": 2}) is None
    assert RunFolder.completed(tmp_path, settings | {"new": 2}) is None
    RunFolder(tmp_path, settings, "sft")  # started again: not complete until it finishes
    assert RunFolder.completed(tmp_path) is None


def test_resuming_drops_the_steps_that_will_run_again(tmp_path):
    run = RunFolder(tmp_path, {}, "ppo")
    for step in (1, 2, 3, 4):
        run.log(step, {"loss": step})
        run.samples(step, [{"n": step, "response": "line\u2028separator\x85"}])  # no line ends to JSON Lines
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    run = RunFolder(tmp_path, {}, "ppo", resume_step=2)
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "samples.jsonl") == [1, 2]
    run.log(3, {"loss": 3})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    RunFolder(tmp_path, {}, "ppo")
    assert steps(tmp_path / "metrics.jsonl") == []


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunFolder(tmp_path / "out", {"report_to": "none"}, "sft")
    run.log(1, {"loss": 1.0})
    run.samples(1, [{}])
    assert run.finish({"a": 1})["a"] == 1
    assert not (tmp_path / "out").exists()


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_commands_that_share_a_folder_write_their_results_one_after_the_other(tmp_path):
    one, two = (RunFolder(tmp_path, {"seed": 1, "logging_steps": n}, "sampling") for n in (1, 2))
    with one.finishing():
        assert is_claimed(tmp_path / "finish.lock")
        one.log(1, {"kept": 7})
        one.samples(0, [{"n": 1}])
        one.finish({"kept": 7})
    assert not is_claimed(tmp_path / "finish.lock")
    with two.finishing():
        assert RunFolder.completed(tmp_path) is None, "from here on the folder is the second one's"
        two.log(1, {"kept": 7})
        two.samples(0, [{"n": 1}])
        two.finish({"kept": 7})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    assert steps(tmp_path / "samples.jsonl") == [0]
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text())["logging_steps"] == 2
    assert RunFolder.completed(tmp_path)["kept"] == 7


def test_processes_that_write_one_file_at_the_same_time_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    replace = os.replace

    def after_another(temporary, target):
        monkeypatch.setattr("os.replace", replace)
        write_atomic(path, "another's, and longer")
        replace(temporary, target)

    monkeypatch.setattr("os.replace", after_another)
    write_atomic(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_the_users_error(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, {}, "sft")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: No space left on device.*same command again"):
        run.finish({})
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left on device"):
        run.log(1, {"loss": 1.0})


def test_trackers_get_the_same_numbers(tmp_path, monkeypatch):
    from accelerate import tracking

    calls = []

    class Tracker:
        def __init__(self, name, **where):
            calls.append(("init", name, where))

        def start(self):
            calls.append(("start",))

        def store_init_configuration(self, values):
            calls.append(("settings", values))

        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or find_spec(name))
    monkeypatch.setattr(tracking, "TensorBoardTracker", Tracker)
    run = RunFolder(tmp_path, {"report_to": "tensorboard", "files": ["a"], "seed": 1}, "sft")
    run.log(2, {"loss": 0.5, "bad": math.inf})
    run.finish({})
    assert calls == [
        ("init", "sft", {"logging_dir": str(tmp_path)}),
        ("start",),
        ("settings", {"report_to": "tensorboard", "seed": 1}),
        ("log", 2, {"loss": 0.5}),
        ("finish",),
    ]


def test_mistakes_are_the_users_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="report_to is 'mlflow'; choose none, tensorboard"):
        RunFolder(tmp_path, {"report_to": "mlflow"}, "sft")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunFolder(tmp_path, {"report_to": "wandb"}, "sft")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        RunFolder(tmp_path / "file", {}, "sft")
    with pytest.raises(UserError, match="cannot be created"):
        RunFolder(tmp_path / "file" / "below", {}, "sft")
