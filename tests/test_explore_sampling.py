"""Exploring on throwaway models: what it samples, reads, writes and refuses, and what a kill costs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_rejection_sampling import save_ending_policy
from tiny_models import prompt_rows, save_tiny_reward_model, write_rows

from configs.errors import UserError
from rlhf import explore_sampling, rejection_sampling
from rlhf.explore_sampling import shared_prompts
from rlhf.score_files import read_scores
from rlhf.simulation.people import draw_prompts

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "explore_demo.yaml")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, str]:
    """What the demo's config names, tiny."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "model_name_or_path": save_ending_policy(folder / "policy"),
        "helpfulness_model_path": save_tiny_reward_model(folder / "helpfulness", seed=1),
        "safety_model_path": save_tiny_reward_model(folder / "safety", seed=2),
        "prompt_files": write_rows(folder / "prompts.jsonl", draw_prompts(0, 9)),
        "samples_per_prompt": "5",
        "max_new_tokens": "12",
        "prompts_per_shard": "4",
        "keep_unfinished": "true",
    }


def words(arguments: dict[str, str]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", *value.split())]


def explore(arguments: dict[str, str], folder: Path, temperatures: str = "0.8 1.2", **extra: str) -> dict:
    named = arguments | {"temperatures": temperatures, "output_dir": str(folder)} | extra
    return explore_sampling.main(["--config", CONFIG, *words(named)])


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    return folder, explore(arguments, folder)


def test_the_documented_command_samples_analyses_and_reports(finished):
    folder, summary = finished
    written = ("T-0.8", "T-1.2", "summary.json", "exploration.json", "report.md", "settings.yaml", "metrics.jsonl")
    assert {path.name for path in folder.iterdir()} >= set(written)
    assert {path.name for path in (folder / "plots").iterdir()} == {"reward.png", "cost.png", "gold.png"}
    for t in ("0.8", "1.2"):
        arrays = read_scores(folder / f"T-{t}")
        assert arrays["combined"].shape == (9, 5)
        assert arrays["temperature"].tolist() == [float(t)]
        best = summary["temperatures"][t]["best"]["combined"]
        kept = np.where(arrays["usable"], arrays["combined"], -np.inf).max(axis=1)
        assert best["5"]["mean"] == pytest.approx(kept.mean())
        assert best["1"]["mean"] == pytest.approx(arrays["combined"].mean())
        median = summary["temperatures"][t]["median"]["combined"]
        assert median["5"]["mean"] == pytest.approx(np.median(arrays["combined"], axis=1).mean())
    curves = json.loads((folder / "exploration.json").read_text())["curves"]
    assert [len(run["best"]["gold"]["mean"]) for run in curves] == [5, 5]
    assert summary["recommendation"]["k"] in (1, 2, 4)
    report = (folder / "report.md").read_text()
    assert "Recommended: K =" in report
    assert "![gold](plots/gold.png)" in report
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes a second a time; the first test looks at the plots."""
    monkeypatch.setattr(explore_sampling, "to_png", lambda *_: None)


def test_a_killed_exploration_goes_on_and_gives_the_same(arguments, finished, tmp_path, monkeypatch, no_plots):
    calls = []
    rows = rejection_sampling.Worker.rows

    def killed_at_the_fifth(self, prompts, indices):
        calls.append((self.settings.temperature, indices[0]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return rows(self, prompts, indices)

    monkeypatch.setattr(rejection_sampling.Worker, "rows", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        explore(arguments, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    again = explore(arguments, tmp_path)
    assert calls == [(0.8, 0), (0.8, 4), (0.8, 8), (1.2, 0), (1.2, 4), (1.2, 4), (1.2, 8)]
    assert again["temperatures"]["1.2"]["best"] == finished[1]["temperatures"]["1.2"]["best"]
    more = explore(arguments, tmp_path, "0.8 1.0 1.2", affordable_samples="2")
    assert calls[7:] == [(1.0, 0), (1.0, 4), (1.0, 8)], "only the new temperature is sampled"
    assert list(more["temperatures"]) == ["0.8", "1", "1.2"]
    assert more["recommendation"]["k"] <= 2
    explore(arguments, tmp_path, "0.8 1.0 1.2", affordable_samples="2")
    assert len(calls) == 10, "a complete run returns its summary"


def read(folder: Path, *runs: Path, **extra: str) -> dict:
    return explore_sampling.main(words({"from_runs": " ".join(map(str, runs)), "output_dir": str(folder)} | extra))


def test_finished_runs_are_read_in_place_of_sampling(finished, tmp_path, monkeypatch, no_plots):
    monkeypatch.setattr(rejection_sampling, "Worker", None)
    folder, summary = finished
    found = read(tmp_path, folder / "T-1.2", folder / "T-0.8")
    for name in ("temperatures", "recommendation", "kl_nats_bound"):
        assert found[name] == summary[name]
    assert list(found["temperatures"]) == ["0.8", "1.2"], "by rising temperature, however they were named"
    assert found["from"] == [str(folder / "T-1.2"), str(folder / "T-0.8")]
    assert list(read(tmp_path / "one", folder / "T-1.2")["temperatures"]) == ["1.2"]


def altered(source: Path, folder: Path, settings: dict | None = None, **arrays) -> Path:
    """A copy of a run with other settings or arrays."""
    folder.mkdir()
    for name in ("summary.json", "settings.yaml", "scores.npz"):
        (folder / name).write_bytes((source / name).read_bytes())
    stored = yaml.safe_load((source / "settings.yaml").read_text()) | (settings or {})
    (folder / "settings.yaml").write_text(yaml.safe_dump(stored))
    np.savez(folder / "scores.npz", **read_scores(source) | arrays)
    return folder


def test_runs_that_cannot_be_compared_are_refused(finished, tmp_path, no_plots):
    cold, hot = finished[0] / "T-0.8", finished[0] / "T-1.2"
    others = {
        "same": (altered(cold, tmp_path / "same", seed=np.zeros((9, 5), int)), "have the same temperature, 0.8"),
        "prompts": (altered(hot, tmp_path / "prompts", prompt_id=np.array(["x"] * 9)), "have other prompts"),
        "policy": (altered(hot, tmp_path / "policy", {"model_name_or_path": "x"}), "differ in model_name_or_path;"),
        "top_p": (altered(hot, tmp_path / "top_p", {"top_p": 0.5}), "differ in top_p;"),
        "missing": (tmp_path / "nowhere", "holds no finished run"),
        "itself": (finished[0], "holds no finished run"),
    }
    for name, (folder, message) in others.items():
        with pytest.raises(UserError, match=f"from_runs: .*{message}"):
            read(tmp_path / f"out-{name}", cold, folder)
        assert not (tmp_path / f"out-{name}").exists(), "nothing is written before the runs are looked at"
    (hot / "scores.npz").rename(tmp_path / "kept.npz")
    with pytest.raises(UserError, match=r"scores.npz: no such file"):
        read(tmp_path / "out", cold, hot)
    (tmp_path / "kept.npz").rename(hot / "scores.npz")
    harmless = {"token_budget": 7, "dtype": "bfloat16", "server_concurrency": 3, "max_failed_share": 0.5, "lora_r": 4}
    other_device = altered(hot, tmp_path / "device", harmless)
    assert read(tmp_path / "out", cold, other_device)["prompts"] == 9


def without(source: Path, folder: Path, places: list[int], failed: int) -> Path:
    """A copy of a run that lacks the prompts at these places, and says that it failed on so many."""
    arrays = read_scores(source)
    rest = {name: np.delete(array, places, axis=0) for name, array in arrays.items() if name != "temperature"}
    made = altered(source, folder, **rest)
    summary = json.loads((folder / "summary.json").read_text()) | {"failed": failed}
    (folder / "summary.json").write_text(json.dumps(summary))
    return made


def test_runs_that_failed_on_different_prompts_share_the_others(finished, tmp_path, no_plots):
    cold, hot = finished[0] / "T-0.8", finished[0] / "T-1.2"
    first, second = without(cold, tmp_path / "first", [1], 1), without(hot, tmp_path / "second", [4, 8], 2)
    found = read(tmp_path / "out", first, second)
    assert (found["prompts"], found["prompts_left_out"]) == (6, 3)
    assert "3 prompts are left out" in (tmp_path / "out" / "report.md").read_text()
    kept = [0, 2, 3, 5, 6, 7]
    for name, run in (("0.8", cold), ("1.2", hot)):
        mean = read_scores(run)["combined"][kept].mean()
        assert found["temperatures"][name]["best"]["combined"]["1"]["mean"] == pytest.approx(mean)
    with pytest.raises(UserError, match="have other prompts"):
        read(tmp_path / "none", cold, without(hot, tmp_path / "fewer", [4, 8], 1))
    none = [without(run, tmp_path / f"half{i}", places, 5)
            for i, (run, places) in enumerate(((cold, [0, 1, 2, 3]), (hot, [4, 5, 6, 7, 8])))]  # fmt: skip
    with pytest.raises(UserError, match="none in common"):
        read(tmp_path / "none", *none)


def test_a_prompt_that_a_file_has_twice_stays_twice():
    def run(*ids: str) -> dict:
        return {"prompt_id": np.array(ids), "best": np.arange(len(ids)), "temperature": np.array([1.0])}

    (one, two), left_out = shared_prompts([("a", run("x", "y", "x"), 1), ("b", run("z", "x", "x", "y"), 0)])
    assert (one["best"].tolist(), two["best"].tolist(), left_out) == ([0, 1, 2], [1, 3, 2], 1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"temperatures": "0.8 0.80"}, "temperatures: 0.8 is there twice"),
        ({"temperatures": "0.8 0"}, "temperatures: 0.0 is out of range"),
        ({"samples_per_prompt": "1"}, "samples_per_prompt: best-of-n needs at least 2"),
        ({"affordable_samples": "6"}, "affordable_samples 6 must be .* at most samples_per_prompt 5"),
        ({"min_gain": "nan"}, "min_gain"),
        ({"min_score": "1"}, "unknown field '--min_score'"),
        ({"temperature": "1"}, "did you mean 'temperatures'"),
        ({"from_runs": "runs/x"}, "from_runs reads finished runs .* so .*temperatures.* would not be used"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(arguments, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        explore(arguments, tmp_path / "run", **extra)
    assert not (tmp_path / "run").exists()


def test_something_to_sample_from_is_needed(tmp_path):
    with pytest.raises(UserError, match="model_name_or_path, prompt_files.*: needed for sampling"):
        explore_sampling.main(["--output_dir", str(tmp_path / "run")])


def test_too_many_affordable_samples_for_runs_that_are_read(finished, tmp_path):
    with pytest.raises(UserError, match="affordable_samples is 6, but the runs have 5 samples a prompt"):
        read(tmp_path / "run", finished[0] / "T-0.8", affordable_samples="6")
    assert not (tmp_path / "run").exists()


def test_without_gold_scores(arguments, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", prompt_rows(4))
    summary = explore(arguments, tmp_path / "run", "1.0", gold="none", prompt_files=prompts)
    assert set(summary["temperatures"]["1"]["best"]) == {"combined", "R"}
    assert not (tmp_path / "run" / "plots" / "gold.png").exists()
