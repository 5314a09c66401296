"""Rounds of rejection sampling on throwaway models: what is sampled from what, resumption, people, reports."""

import json
from pathlib import Path

import pytest
import yaml
from test_docs import launch
from tiny_models import save_tiny_policy, save_tiny_reward_model, write_rows
from transformers import LlamaForCausalLM

from configs.errors import UserError
from configs.rounds_settings import RoundsSettings
from rlhf import rejection_sampling, rounds, rounds_report
from rlhf.claims import claim
from rlhf.round_stages import round_stages
from rlhf.simulation.people import draw_prompts

SMALL_SFT = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 1024, "num_samples": 0, "eval_fraction": 0,
             "packing": False, "use_cpu": True}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """A YAML of two rounds, as a mapping without output_dir."""
    folder = tmp_path_factory.mktemp("models")
    policy = save_tiny_policy(folder / "policy", max_position_embeddings=2048)
    model = LlamaForCausalLM.from_pretrained(policy)
    model.lm_head.weight.data[2] *= 4  # most responses end
    model.save_pretrained(policy)
    prompts = draw_prompts(0, 24)
    return {
        "rounds": 2,
        "base_model_path": policy,
        "policy_path": policy,
        "helpfulness_model_path": save_tiny_reward_model(folder / "helpfulness", seed=1),
        "safety_model_path": save_tiny_reward_model(folder / "safety", seed=2),
        "rejection_sampling": {"prompt_files": [write_rows(folder / "prompts.jsonl", prompts[:8])], "use_cpu": True,
                               "samples_per_prompt": 2, "max_new_tokens": 8, "keep_unfinished": True},
        "sft": SMALL_SFT,
        "evaluate_policy": {"prompt_files": [write_rows(folder / "held_out.jsonl", prompts[8:])], "gold": "simulated",
                            "max_new_tokens": 8, "use_cpu": True},
    }  # fmt: skip


def config(folder: Path, given: dict, **fields) -> list[str]:
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(given | {"output_dir": str(folder / "out")} | fields))
    return ["--config", str(path)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finished(folder: Path) -> dict[str, int]:
    paths = (folder / "out").glob("v*/*/summary.json")
    return {f"{path.parts[-3]}/{path.parts[-2]}": path.stat().st_mtime_ns for path in paths}


def settings_of(folder: Path, stage: str) -> dict:
    return yaml.safe_load((folder / "out" / stage / "settings.yaml").read_text())


@pytest.fixture(scope="module")
def two_rounds(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rounds.main(config(folder, tiny, student_model_path=tiny["base_model_path"], student_layers=1))
    return folder


def test_each_round_samples_the_newest_policy_pools_all_and_starts_from_the_base(tiny, two_rounds):
    out = two_rounds / "out"
    assert settings_of(two_rounds, "v1/rejection_sampling")["model_name_or_path"] == tiny["policy_path"]
    assert settings_of(two_rounds, "v2/rejection_sampling")["model_name_or_path"] == f"{out}/v1/sft/model"
    for number in (1, 2):
        sft = settings_of(two_rounds, f"v{number}/sft")
        assert sft["model_name_or_path"] == tiny["base_model_path"]
        assert sft["train_files"] == [f"{out}/v{number}/pool_samples/pooled.jsonl"]
    files = settings_of(two_rounds, "v2/pool_samples")["sample_files"]
    assert files == [f"{out}/v{number}/rejection_sampling/best.jsonl" for number in (1, 2)]
    pooled = rows_of(out / "v2/pool_samples/pooled.jsonl")
    assert {row["round"] for row in pooled} <= {1, 2}
    prompts = [str(row["messages"][:-1]) for row in pooled]
    assert len(set(prompts)) == len(prompts) == 8  # the better of the two rounds for each
    seeds = [settings_of(two_rounds, f"v{number}/rejection_sampling")["seed"] for number in (1, 2)]
    assert seeds[0] != seeds[1]


def test_the_student_learns_from_the_same_pool(two_rounds):
    out = two_rounds / "out"
    assert settings_of(two_rounds, "v2/student_sft")["train_files"] == settings_of(two_rounds, "v2/sft")["train_files"]
    assert LlamaForCausalLM.from_pretrained(out / "v2/student_sft/model").config.num_hidden_layers == 1
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["round"] for entry in summary["students"]] == [1, 2]


def test_the_report_has_every_round_with_intervals_and_changes(two_rounds):
    summary = json.loads((two_rounds / "out" / "summary.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert "change" not in summary["rounds"][0]["figures"]["kl_nats"]
    rows = rows_of(two_rounds / "out/v2/evaluate_policy/responses.jsonl")
    kl = summary["rounds"][2]["figures"]["kl_nats"]
    assert kl["mean"] == pytest.approx(sum(row["kl_nats"][0] for row in rows) / 16, abs=1e-3)
    before = summary["rounds"][1]["figures"]["kl_nats"]["mean"]
    assert kl["change"] == pytest.approx(kl["mean"] - before, abs=1e-3)
    text = (two_rounds / "out" / "report.md").read_text()
    assert "| V2 |" in text
    assert "V2 student" in text
    families = {row["source"] for row in rows}
    assert set(summary["rounds"][2]["families"]) == families
    assert (two_rounds / "out" / "rounds.png").stat().st_size > 1000


def test_a_killed_run_goes_on_and_a_third_round_runs_nothing_twice(tiny, tmp_path, monkeypatch):
    calls = []
    rows = rejection_sampling.Worker.rows

    def killed_in_round_two(self, prompts, first):
        calls.append(self.settings.helpfulness_model_path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows(self, prompts, first)

    monkeypatch.setattr(rejection_sampling.Worker, "rows", killed_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        rounds.main(config(tmp_path, tiny))
    first = finished(tmp_path)
    assert "v1/evaluate_policy" in first
    assert "v2/rejection_sampling" not in first
    rounds.main(config(tmp_path, tiny))
    second = finished(tmp_path)
    assert first.items() <= second.items()
    assert len(calls) == 3
    summary = rounds.main(config(tmp_path, tiny, rounds=3))
    third = finished(tmp_path)
    assert second.items() <= third.items()
    assert len(calls) == 4
    assert set(third) - set(second) == {
        f"v3/{n}" for n in ("rejection_sampling", "pool_samples", "sft", "evaluate_policy")
    }
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2, 3]


def test_only_the_pool_and_what_follows_change_with_last(tiny, tmp_path):
    stages = {pool: round_stages(RoundsSettings(**tiny, output_dir="out", pool=pool), "") for pool in ("all", "last")}
    differ = [a.name for a, b in zip(stages["all"], stages["last"], strict=True) if a.settings != b.settings]
    assert differ == ["v1/pool_samples", "v2/pool_samples"]


def test_two_commands_on_one_folder_are_kept_apart(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        claim(tmp_path / "out" / "rounds.lock"),
        pytest.raises(UserError, match=f"another command runs the stages of {tmp_path}/out"),
    ):
        rounds.main(config(tmp_path, tiny))
    assert finished(tmp_path) == {}


def test_a_student_cut_from_another_model_is_another_student(tiny, tmp_path):
    def student(path: str, layers: int = 1) -> str:
        given = RoundsSettings(**tiny, output_dir=str(tmp_path), student_model_path=path, student_layers=layers)
        return rounds.student_path(given)

    other = save_tiny_policy(tmp_path / "other", max_position_embeddings=2048)
    first = student(tiny["base_model_path"])
    assert student(tiny["base_model_path"]) == first
    second = student(other)
    save_tiny_policy(tmp_path / "other", max_position_embeddings=1024)  # made anew in its place
    third = student(other)
    assert len({first, second, third}) == 3
    assert LlamaForCausalLM.from_pretrained(third).config.max_position_embeddings == 1024
    with pytest.raises(UserError, match="student_model_path: 97 layers are asked for, but the model has"):
        student(other, 97)


def test_files_of_rounds_that_are_only_planned_may_be_missing_yet(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "run_stages", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    later = {4: {"rejection_sampling": {"prompt_files": [str(tmp_path / "later.jsonl")]}}}
    with pytest.raises(KeyboardInterrupt):
        rounds.main(config(tmp_path, tiny, by_round=later))
    with pytest.raises(UserError, match="stage v4/rejection_sampling: prompt_files: .*later.jsonl does not exist"):
        rounds.main(config(tmp_path, tiny, by_round=later, rounds=4))


COLLECT = {"prompt_files": ["prompts.jsonl"], "annotator": "simulated", "use_cpu": True}


def stages_of(tiny: dict, **fields) -> dict:
    return {stage.name: stage for stage in round_stages(RoundsSettings(**tiny | fields, output_dir="out"), "")}


def test_retrained_reward_models_learn_from_all_pairs_and_score_the_pool_anew(tiny):
    stages = stages_of(tiny, rounds=3, retrain_from_round=2, preference_dirs=["before"], collect_preferences=COLLECT,
                       reward_safety={"train_files": ["${pairs}/safety.jsonl", "${pairs}/helpfulness.jsonl"],
                                      "mix_weights": [90, 10]}, pool_samples={"dtype": "bfloat16"})  # fmt: skip
    assert "v1/reward_safety" not in stages
    assert stages["v3/pairs"].settings["preference_dirs"] == [
        "before", "out/v2/collect_preferences", "out/v3/collect_preferences",
    ]  # fmt: skip
    assert stages["v3/collect_preferences"].settings["model_name_or_path"] == "out/v2/sft/model"
    assert stages["v3/reward_safety"].settings["train_files"] == [
        "out/v3/pairs/safety.jsonl", "out/v3/pairs/helpfulness.jsonl",
    ]  # fmt: skip
    assert stages["v1/rejection_sampling"].settings["safety_model_path"] == tiny["safety_model_path"]
    assert stages["v3/rejection_sampling"].settings["safety_model_path"] == "out/v3/reward_safety/model"
    assert not {"rank_by", "dtype"} & stages["v1/pool_samples"].settings.keys()  # one pair of models so far
    assert stages["v2/pool_samples"].settings["dtype"] == "bfloat16"
    assert stages["v2/pool_samples"].settings["rank_by"] == "rescored"
    assert stages["v2/pool_samples"].settings["safety_model_path"] == "out/v2/reward_safety/model"
    for stage in stages.values():  # what a stage reads is made by a stage that it waits for
        read = {
            name
            for name in stages
            if f"out/{name}/" in yaml.safe_dump(stage.settings, width=10_000) and name != stage.name
        }
        waited: set[str] = set()
        todo = list(stage.needs)
        while todo:
            waited.add(need := todo.pop())
            todo += stages[need].needs
        assert read <= waited, stage.name


def test_people_are_waited_for(tiny, tmp_path, capsys):
    prompts = draw_prompts(5, 200)
    collect = {"prompt_files": [write_rows(tmp_path / "compare.jsonl", prompts)], "max_new_tokens": 8, "use_cpu": True,
               "test_fraction": 0.3}  # fmt: skip
    reward = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    args = config(tmp_path, tiny, rounds=1, retrain_from_round=1, collect_preferences=collect,
                  reward_helpfulness=reward, reward_safety=reward)  # fmt: skip
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"v1 waits for people: label .*unlabelled.jsonl, save it as .*labelled.jsonl"
        ):
            rounds.main(args)
    assert not (out / "v1/pairs").exists()
    rows = rows_of(out / "v1/collect_preferences/unlabelled.jsonl")
    for i, row in enumerate(rows):
        row |= {"choice": "ab"[i % 2], "rating": "better", "safety_a": True, "safety_b": True}
    write_rows(out / "v1/labelled.jsonl", rows)
    rounds.main(args)
    assert json.loads((out / "v1/pairs/summary.json").read_text())["helpfulness"] > 0
    assert settings_of(tmp_path, "v1/rejection_sampling")["safety_model_path"] == f"{out}/v1/reward_safety/model"
    assert json.loads((out / "summary.json").read_text())["rounds"][-1]["round"] == 1


@pytest.mark.slow
def test_the_command_of_the_readme_with_reward_models_trained_anew(tiny, tmp_path):
    collect = {"prompt_files": [write_rows(tmp_path / "compare.jsonl", draw_prompts(5, 200))], "max_new_tokens": 8,
               "annotator": "simulated", "test_fraction": 0.3, "use_cpu": True}  # fmt: skip
    reward = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    args = config(tmp_path, tiny, retrain_from_round=2, collect_preferences=collect, reward_helpfulness=reward,
                  reward_safety=reward)  # fmt: skip
    done = launch("rlhf/rounds.py", *args, "--parallel_stages", "2", folder=tmp_path, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    out = tmp_path / "out"
    assert settings_of(tmp_path, "v2/pool_samples")["safety_model_path"] == f"{out}/v2/reward_safety/model"
    summary = json.loads((out / "summary.json").read_text())
    assert "change" in summary["rounds"][1]["figures"]["reward_combined"]
    assert "change" not in summary["rounds"][2]["figures"]["reward_combined"]  # other reward models


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sft": {"learning_rat": 1.0}}, r"stage v1/sft: unknown field 'learning_rat'; did you mean 'learning_rate'"),
        ({"by_round": {2: {"sft": {"max_length": 2}}}}, "stage v2/sft: max_length: 2"),
        ({"evaluate_policy": {"prompt_files": ["none.jsonl"]}}, "stage v0/evaluate_policy: prompt_files: none.jsonl"),
        ({"base_model_path": "/nowhere/model"}, "stage v1/sft: model_name_or_path: /nowhere/model does not exist"),
        ({"sft": {"train_files": ["a.jsonl"]}}, r"sft: train_files does not name \$\{pool\}"),
        ({"sft": {"model_name_or_path": "x"}}, "sft: model_name_or_path cannot be set here"),
        ({"by_round": {0: {}}}, "by_round: 0 is no round"),
        ({"by_round": {1: {"sftt": {}}}}, "unknown blocks"),
        ({"by_round": {1: {"sft": {}}, "1": {}}}, "by_round: 1 and '1' are the same round"),
        ({"by_round": {4: {"sft": {"max_step": 2}}}}, "stage v4/sft: unknown field 'max_step'"),
        ({"by_round": {4: {"collect_preferences": {}}}}, "by_round: 4: collect_preferences: without effect"),
        ({"by_round": {1: {"student_sft": {}}}}, "by_round: 1: student_sft is set"),
        ({"pool_samples": {"dtype": "bfloat16"}}, "stage v1/pool_samples: dtype: no effect with rank_by: score"),
        ({"pool_samples": {"round_shares": [1.0, 0.5]}, "pool": "last"}, "stage v1/pool_samples: round_shares: with"),
        ({"helpfulness_model_path": ""}, "needed for round 1"),
        ({"collect_preferences": {"top_p": 1.0}}, "collect_preferences: without effect"),
        ({"student_layers": 1}, "student_model_path names no model"),
        ({"student_model_path": "/nowhere/model", "student_layers": 1}, "student_model_path: .*/nowhere/model"),
        ({"rounds": 0}, "rounds is 0"),
        ({"pool": "neither"}, "pool must be .*'all', 'last'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(tiny, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        rounds.main(config(tmp_path, tiny, **fields))
    assert finished(tmp_path) == {}


def evaluation(helpful: list[list[float]], reward: list[float], models: str = "m", source: str = "sum") -> dict:
    rows = [{"prompt": f"p{i}", "source": source, "gold_helpfulness": values, "reward_combined": [r]}
            for i, (values, r) in enumerate(zip(helpful, reward, strict=True))]  # fmt: skip
    return {"rows": rows, "models": [models]}


def test_a_comparison_by_hand():
    before = evaluation([[0.0, 1.0], [0.0, 0.0]], [1.0, 3.0])
    now = evaluation([[1.0, 1.0], [0.0, 1.0]], [2.0, 6.0])
    found = rounds_report.compare(now, before)
    gold = found["figures"]["gold_helpfulness"]
    assert (gold["mean"], gold["change"], gold["prompts"]) == (0.75, 0.5, 2)  # means 1.0, 0.5 after 0.5, 0.0
    assert gold["change_ci95"] == [0.5, 0.5]  # both prompts gained 0.5
    half = 1.96 * (0.125**0.5) / 2**0.5  # deviation of 1.0 and 0.5, n - 1 form: sqrt(0.125)
    assert gold["ci95"] == pytest.approx([0.75 - half, 0.75 + half], abs=1e-4)
    assert found["figures"]["reward_combined"]["change"] == 2.0
    assert found["families"]["sum"]["score"] == "gold_helpfulness"
    other = rounds_report.compare(now, evaluation([[0.0], [0.0]], [1.0, 3.0], models="another"))
    assert "change" not in other["figures"]["reward_combined"]  # scores of two models are no difference
    assert "change" in other["figures"]["gold_helpfulness"]
    before["rows"][0]["prompt"] = "another"
    assert "change" not in rounds_report.compare(now, before)["figures"]["gold_helpfulness"]
