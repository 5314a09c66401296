"""The pipeline: order, what is run again, forks, what a mistake in the YAML says. Stages here only write prompts."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from configs.errors import UserError
from configs.pipeline_settings import PipelineSettings
from rlhf.claims import alone, claim, is_claimed
from rlhf.pipeline import check_stages, main, read_stages, run_stages

SMALL = {
    "demonstrations": 2, "preference_prompts": 2, "rl_prompts": 2, "validation_prompts": 1, "evaluation_prompts": 2,
    "gatt_prompts": 2, "family_prompts": 1,
}  # fmt: skip


def stage(name: str, needs: tuple[str, ...] = (), **settings) -> dict:
    return {"name": name, "run": "simulation.make_data", "needs": list(needs), "settings": SMALL | settings}


def config(folder: Path, stages: list[dict], **fields) -> list[str]:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, "output_dir": str(folder / "out"), **fields}))
    return ["--config", str(path)]


def finished(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*/summary.json")}


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_complete_stage_is_not_run_again_and_a_changed_one_is(tmp_path, parallel):
    stages = [stage("a"), stage("b", ("a",)), stage("c")]
    args = config(tmp_path, stages, parallel_stages=parallel)
    main(args)
    first = finished(tmp_path)
    assert set(first) == {"a", "b", "c"}
    main(args)
    assert finished(tmp_path) == first
    stages[0]["settings"]["rl_prompts"] = 3
    main(config(tmp_path, stages, parallel_stages=parallel))
    again = finished(tmp_path)
    assert again["c"] == first["c"]
    assert again["a"] > first["a"]
    assert again["b"] > first["b"]  # b was made from a


def test_a_stage_is_made_anew_from_nothing_but_goes_on_where_it_was_killed(tmp_path):
    stages = [stage("a"), stage("b", ("a",))]
    main(config(tmp_path, stages))
    checkpoint = tmp_path / "out" / "b" / "checkpoint-7"
    checkpoint.mkdir()
    (tmp_path / "out" / "b" / "summary.json").unlink()  # killed before its end
    main(config(tmp_path, stages))
    assert checkpoint.exists()
    stages[0]["settings"]["rl_prompts"] = 3  # b's checkpoint is of the old a
    main(config(tmp_path, stages))
    assert not checkpoint.exists()
    checkpoint.mkdir()
    stages[1]["settings"]["rl_prompts"] = 4  # b's checkpoint is of other settings
    main(config(tmp_path, stages))
    assert not checkpoint.exists()


def test_a_changed_stage_keeps_its_store_and_nothing_else(tmp_path):
    stages = [stage("a")]
    main(config(tmp_path, stages))
    folder = tmp_path / "out" / "a"
    for name in ("shards/0123", "checkpoint-7", "checkpoint-7/shards"):
        (folder / name).mkdir(parents=True)
        (folder / name / "00000.jsonl.gz").write_bytes(b"rows")
    (folder / "old.json").write_text("{}")
    stages[0]["settings"]["rl_prompts"] = 3
    main(config(tmp_path, stages))
    assert (folder / "shards/0123/00000.jsonl.gz").read_bytes() == b"rows"
    assert not (folder / "checkpoint-7").exists()
    assert not (folder / "old.json").exists()
    assert yaml.safe_load((folder / "stage.yaml").read_text())["rl_prompts"] == 3


def test_two_commands_on_one_folder_are_kept_apart(tmp_path):
    args, out = config(tmp_path, [stage("a")]), tmp_path / "out"
    out.mkdir()
    with (
        claim(out / "rounds.lock"),
        pytest.raises(UserError, match=rf"another command runs the stages of {out};"),
    ):
        main(args)
    assert finished(tmp_path) == {}
    main(args)
    assert set(finished(tmp_path)) == {"a"}
    with alone(out):
        assert is_claimed(out / "rounds.lock")
    assert not is_claimed(out / "rounds.lock")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name a folder"), alone(tmp_path / "file"):
        pass


def test_settings_are_filled_in(tmp_path):
    stages = [
        stage("a"),
        {"name": "b", "run": "sft", "needs": ["a"], "settings": {"train_files": ["${output_dir}/a/x-${seed}.jsonl"]}},
    ]
    made = read_stages(PipelineSettings(stages=stages, output_dir=str(tmp_path), seed=7))
    assert made[1].settings == {"train_files": [f"{tmp_path}/a/x-7.jsonl"], "output_dir": f"{tmp_path}/b", "seed": 7}


VARIABLES = {"model": "hub/name", "rows": None, "files": ["a", "b"], "rate": 0.5, "cpu": False}


def with_variables(**given) -> PipelineSettings:
    settings = {name: f"${{{name}}}" for name in VARIABLES} | {"path": "${model}/${seed}", "size": "1${seed}"}
    stages = [{"name": "b", "run": "sft", "settings": settings}]
    return PipelineSettings(**{"stages": stages, "variables": VARIABLES, "output_dir": "o", "seed": 7, **given})


def test_a_variable_keeps_its_type_and_values_replace_it():
    (stage,) = read_stages(with_variables())
    assert stage.settings == {**VARIABLES, "path": "hub/name/7", "size": 17, "output_dir": "o/b", "seed": 7}
    changed = ["model=/my/model", "rows=3", "rate=1e-4", "cpu=true", "files=[c]"]
    (stage,) = read_stages(with_variables(values=changed))
    own = {"model": "/my/model", "rows": 3, "rate": "1e-4", "cpu": True, "files": ["c"]}  # a float field takes 1e-4
    assert stage.settings == {**own, "path": "/my/model/7", "size": 17, "output_dir": "o/b", "seed": 7}


def test_stages_of_another_yaml_take_the_variables_of_both(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"stages": with_variables().stages, "variables": VARIABLES, "output_dir": "x"}))
    mine: dict = {"stages": [], "stages_from": str(other), "variables": {"rate": 2, "rows": 8}, "values": ["rows=9"]}
    (stage,) = read_stages(with_variables(**mine))
    assert {name: stage.settings[name] for name in VARIABLES} == {**VARIABLES, "rate": 2, "rows": 9}
    assert stage.folder == Path("o/b")
    with pytest.raises(UserError, match="stages, stages_from: give one of them"):
        read_stages(with_variables(**mine | {"stages": with_variables().stages}))
    with pytest.raises(UserError, match="variables: no stage has a variable 'rat'"):
        read_stages(with_variables(**mine | {"variables": {"rat": 2}}))
    with pytest.raises(UserError, match=r"stages_from .*none\.yaml: No such file"):
        read_stages(with_variables(**mine | {"stages_from": str(tmp_path / "none.yaml")}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": ["modle=x"]}, "values: no stage has a variable 'modle'; there are: cpu, files, model, rate, rows"),
        ({"values": ["model"]}, "values: 'model' is not name=value"),
        ({"values": ["model=[x"]}, "values: 'model=.x' is not valid YAML"),
        ({"variables": VARIABLES | {"seed": 3}}, "variables: seed is filled in by itself"),
    ],
)
def test_a_wrong_variable_is_named(given, message):
    with pytest.raises(UserError, match=message):
        read_stages(with_variables(**given))


def test_a_stage_may_have_threads_and_a_seed_of_its_own(tmp_path):
    stages = [stage("a", seed="1${seed}") | {"threads": 2}, stage("b")]
    made = read_stages(PipelineSettings(stages=stages, output_dir=str(tmp_path), seed=7, parallel_stages=2))
    assert [(s.threads, s.settings["seed"]) for s in made] == [(2, 17), (1, 7)]


def test_threads_of_the_stages_that_run_at_once_stay_within_parallel_stages(tmp_path):
    out = tmp_path / "out"
    stages = [stage("a"), stage("wide") | {"threads": 2}, stage("c")]
    main(config(tmp_path, stages, parallel_stages=2))
    ends = {name: (out / name / "summary.json").stat().st_mtime_ns for name in ("a", "wide")}
    begins = {name: (out / name / "stage.yaml").stat().st_mtime_ns for name in ("wide", "c")}
    assert begins["wide"] > ends["a"]  # it waits for both threads,
    assert begins["c"] > ends["wide"]  # and nobody overtakes it


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "no stages"),
        ([{"name": "a"}], "keys `name` and `run`"),
        ([stage("a") | {"setings": {}}], "unknown keys"),
        ([{"name": "a", "run": "train_policy"}], "no rlhf/train_policy.py"),
        ([stage("a"), stage("a")], "name 'a' of an earlier stage"),
        ([stage("a", ("b",)), stage("b")], "not among the stages before it"),
        ([stage("a") | {"threads": 2}], r"threads: 2; give 1 to parallel_stages \(1\)"),
        ([stage("a") | {"threads": "2"}], "threads: 2"),
    ],
)
def test_a_wrong_list_of_stages_is_named(stages, message):
    with pytest.raises(UserError, match=message):
        read_stages(PipelineSettings(stages=stages))


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_failing_stage_stops_what_needs_it_and_names_the_reason(tmp_path, parallel):
    bad = stage("bad")
    bad["settings"]["demonstratons"] = 3
    stages = read_stages(
        PipelineSettings(stages=[stage("good"), bad, stage("after", ("bad",))], output_dir=str(tmp_path))
    )
    with pytest.raises(UserError, match="did you mean 'demonstrations'"):
        run_stages(stages, parallel, Console(quiet=True))
    assert json.loads((tmp_path / "good" / "summary.json").read_text())["demonstrations"] == 2
    assert not (tmp_path / "after").exists()


def sft(name: str, **settings) -> dict:
    fields = {"model_name_or_path": "some/model", "train_files": ["${output_dir}/a/demonstrations.jsonl"]}
    return {"name": name, "run": "sft", "needs": ["a"], "settings": fields | settings}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1.0}, "^stage b: unknown field 'learning_rat'; did you mean 'learning_rate'"),
        ({"max_length": "long"}, "^stage b: max_length must be int"),
        ({"max_length": 2}, "^stage b: max_length: 2 tokens hold no dialogue"),
        ({"eval_files": ["${output_dir}/c/x.jsonl"]}, "^stage b: eval_files: .*/c/x.jsonl does not exist"),
        ({"model_name_or_path": "./none"}, "^stage b: model_name_or_path: ./none does not exist"),
    ],
)
def test_all_settings_are_checked_before_the_first_stage_runs(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        main(config(tmp_path, [stage("a"), sft("b", **settings), stage("c")]))
    assert not (tmp_path / "out" / "a").exists()


def test_what_an_earlier_stage_makes_or_the_hub_may_have_is_not_missed(tmp_path):
    rows = [stage("a"), sft("b", reject_file="none/bad/rejected.jsonl"), sft("c", eval_files=["late.jsonl"])]
    stages = read_stages(PipelineSettings(stages=rows, output_dir=str(tmp_path)))
    check_stages(stages, awaited=["late.jsonl"])
    with pytest.raises(UserError, match="late.jsonl"):
        check_stages(stages)


def test_a_complete_stage_is_not_checked_again(tmp_path):
    data = tmp_path / "values.json"
    data.write_text("{}")
    rows = [stage("a"), sft("b", eval_files=[str(data)])]
    stages = read_stages(PipelineSettings(stages=rows, output_dir=str(tmp_path)))
    data.unlink()
    stages[1].folder.mkdir()
    (stages[1].folder / "stage.yaml").write_text(yaml.safe_dump(stages[1].settings))
    with pytest.raises(UserError, match="values.json"):
        check_stages(stages)
    (stages[1].folder / "summary.json").write_text("{}")
    check_stages(stages)
