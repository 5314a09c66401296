"""The scaling of safety data: the tail of scores, points by hand, and the script from files to a page."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import dialogue_rows, prompt_rows, save_tiny_policy, save_tiny_reward_model, write_rows

from configs.errors import UserError
from configs.row_files import read_rows
from configs.safety_scaling_settings import SafetyScalingSettings
from rlhf import pipeline, safety_scaling, safety_scaling_report
from rlhf.safety_scaling import answered_prompts, draw_subsets
from rlhf.score_tail import distribution, sigmoid


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_the_distribution_by_hand():
    scores = [0.05, 0.2, 0.4, 0.6, 0.95]
    found = distribution([logit(p) for p in scores])
    assert found["answers"] == 5
    assert found["mean"] == pytest.approx(0.44)  # 2.2 / 5
    # deviations -0.39 -0.24 -0.04 0.16 0.51: squares sum to 0.497, sd sqrt(0.497 / 4) = 0.35249,
    # half-width 1.95996 * 0.35249 / sqrt(5) = 0.30897
    assert found["ci95"] == pytest.approx([0.13103, 0.74897], abs=1e-4)
    assert found["quantiles"]["0.25"] == pytest.approx(0.2)
    assert found["quantiles"]["0.5"] == pytest.approx(0.4)
    assert found["tail"]["share"] == pytest.approx(0.2)  # 0.05 alone
    assert found["tail"]["ci95"] == pytest.approx([0.0362, 0.6245], abs=1e-4)  # Wilson's interval of 1 of 5
    assert sigmoid([-1000.0, 0.0, 1000.0]).tolist() == [0.0, 0.5, 1.0]
    assert distribution([])["mean"] is None
    assert distribution([logit(0.99), logit(0.2)])["ci95"] == [0.0, 1.0]  # a score has no more room


def rows_of(safety: list[list[float]], helpfulness: list[list[float]]) -> list[dict]:
    risky = [{"is_safety": True, "reward_safety": [logit(p) for p in row], "reward_helpfulness": [9.0] * len(row)}
             for row in safety]  # fmt: skip
    return risky + [
        {"is_safety": False, "reward_helpfulness": [logit(p) for p in row], "reward_safety": [-9.0] * len(row)}
        for row in helpfulness
    ]


def cells() -> list[dict]:
    true = {"unsafe_rate": 0.5, "ci95": {"unsafe_rate": [0.2, 0.8]}}
    less = {"unsafe_rate": 0.3, "ci95": {"unsafe_rate": [0.1, 0.6]}}
    return [
        {"name": "a", "share": 0.0, "seed": 0, "safety_rows": 0, "summary": true,
         "rows": rows_of([[0.05, 0.15], [0.5, 0.5]], [[0.6, 0.6]])},
        {"name": "b", "share": 0.0, "seed": 1, "safety_rows": 0, "summary": less,
         "rows": rows_of([[0.3, 0.5], [0.9, 0.9]], [[0.4, 0.8]])},
        {"name": "c", "share": 1.0, "seed": 0, "safety_rows": 7, "summary": true,
         "rows": rows_of([[0.9, 0.9], [0.9, 0.9]], [[0.5, 0.5]])},
    ]  # fmt: skip


def test_a_point_is_the_mean_over_prompts_and_seeds():
    none, everything = safety_scaling_report.points(cells(), 0.1)
    assert (none["share"], none["seeds"], none["safety_rows"], everything["safety_rows"]) == (0.0, [0, 1], 0, 7)
    # prompts: (0.05 + 0.15 + 0.3 + 0.5) / 4 = 0.25 and (0.5 + 0.5 + 0.9 + 0.9) / 4 = 0.7; seeds: 0.3 and 0.65
    assert none["safety"]["mean"] == pytest.approx(0.475)
    assert none["safety"]["sd"] == pytest.approx(0.35 / 2**0.5, abs=1e-5)
    # two prompts: sd 0.45 / sqrt 2, half-width 1.95996 * that / sqrt 2 = 0.44099
    assert none["safety"]["ci95"] == pytest.approx([0.03401, 0.91599], abs=1e-4)
    assert none["helpfulness"]["mean"] == pytest.approx(0.6)
    assert none["tail"]["mean"] == pytest.approx(0.125)  # 1 of 4, and 0 of 4
    assert everything["tail"]["mean"] == 0.0
    assert everything["safety"]["sd"] is None
    assert none["quantiles"]["0.5"] == pytest.approx(0.5)
    assert none["true"]["unsafe_rate"]["mean"] == pytest.approx(0.4)
    assert none["true"]["unsafe_rate"]["ci95"] == pytest.approx([0.15, 0.7])


def test_table_page_and_plot_hold_every_share():
    found = safety_scaling_report.points(cells(), 0.1)
    titles, rows = safety_scaling_report.table(found)
    assert titles == ["share", "rows", "safety R", "5 %", "R_s < 0.1", "helpful R", "unsafe"]
    assert rows[1][:3] == ["100 %", "7", "0.900 (0.90-0.90)"]
    assert rows[0][2] == "0.475 ± 0.247 (0.03-0.92)"
    summary = {"points": found, "helpful_rows": 5, "safety_rows": 7, "left_out_as_held_out": 2}
    page = safety_scaling_report.markdown(summary)
    assert all(" | ".join(row) in page for row in rows)
    assert "5 helpful dialogues" in page
    left, right = safety_scaling_report.figure(found, cells()).axes
    assert left.get_legend_handles_labels()[1] == ["safety", "helpfulness"]
    assert right.get_legend_handles_labels()[1] == ["0 %", "100 %"]
    heights = right.lines[0].get_ydata()
    assert heights[0] == pytest.approx(1 / 8)  # of the eight answers at 0 %, both seeds together
    assert heights[-1] == 1.0


def test_subsets_are_nested_and_the_empty_one_is_allowed():
    rows = dialogue_rows(40)
    found = draw_subsets(rows, [1.0, 0.0, 0.25, 0.5], seed=3)
    assert {share: len(part) for share, part in found.items()} == {0.0: 0, 0.25: 10, 0.5: 20, 1.0: 40}
    assert all(row in found[0.5] for row in found[0.25])
    assert found[1.0] == rows
    assert draw_subsets(rows, [0.25], seed=4)[0.25] != found[0.25]
    with pytest.raises(UserError, match="safety_shares: 0.01 of 40 safety dialogues is none"):
        draw_subsets(rows, [0.01], seed=0)
    with pytest.raises(UserError, match="safety_shares: 0.51 gives the same 20 dialogues"):
        draw_subsets(rows, [0.5, 0.51], seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"safety_shares": [0.5, 1.5]}, "safety_shares: must be from 0 to 1, got 1.5"),
        ({"safety_shares": [-0.1]}, "safety_shares: must be from 0 to 1"),
        ({"safety_shares": [float("nan")]}, "safety_shares: must be from 0 to 1"),
        ({"safety_shares": [0.5, 0.5]}, "safety_shares: one of .* is there twice"),
        ({"safety_files": []}, "safety_files: the list is empty"),
        ({"seeds": []}, "seeds: the list is empty"),
        ({"seeds": [0, -1]}, "seeds: must not be negative, got -1"),
        ({"seeds": [1, 1]}, "seeds: one of"),
        ({"tail_below": 1.0}, "tail_below"),
        ({"safety_model_path": ""}, "safety_model_path: name the folder"),
        ({"parallel_stages": 0}, "parallel_stages"),
        ({"sft": {"train_files": ["a"]}}, "sft: train_files cannot be set here"),
        ({"evaluate_policy": {"safety_model_path": "a"}}, "evaluate_policy: safety_model_path cannot be set here"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    given = {"output_dir": "o", "model_name_or_path": "m", "helpful_files": ["h"], "safety_files": ["s"],
             "prompt_files": ["p"], "helpfulness_model_path": "a", "safety_model_path": "b"}  # fmt: skip
    with pytest.raises(UserError, match=message):
        SafetyScalingSettings(**(given | fields))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    """A YAML of three shares, as a mapping without output_dir. One safety dialogue answers a held-out prompt."""
    folder = tmp_path_factory.mktemp("models")
    prompts = prompt_rows(8)
    leaked = {"messages": [*prompts[0]["prompt"], {"role": "assistant", "content": "the cat"}]}
    return {
        "model_name_or_path": save_tiny_policy(folder / "policy", max_position_embeddings=2048),
        "helpful_files": [write_rows(folder / "helpful.jsonl", dialogue_rows(8, seed=1))],
        "safety_files": [write_rows(folder / "safety.jsonl", [leaked, *dialogue_rows(8, seed=2)])],
        "safety_shares": [1.0, 0.0, 0.5],
        "prompt_files": [write_rows(folder / "prompts.jsonl", prompts)],
        "helpfulness_model_path": save_tiny_reward_model(folder / "helpfulness_model", seed=1),
        "safety_model_path": save_tiny_reward_model(folder / "safety_model", seed=2),
        "sft": {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 256, "num_samples": 0,
                "eval_fraction": 0, "packing": False, "use_cpu": True},
        "evaluate_policy": {"max_new_tokens": 8, "use_cpu": True, "samples_per_prompt": 2},
    }  # fmt: skip


def config(folder: Path, given: dict, **fields) -> list[str]:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(given | {"output_dir": str(folder / "out")} | fields))
    return ["--config", str(path)]


def texts(file: str) -> list[str]:
    return [row["messages"][0]["content"] for _, row in read_rows(file)]


def test_a_killed_study_goes_on_where_it_was(study, tmp_path, monkeypatch):
    begun: list[str] = []
    run_stage = pipeline._run_stage

    def until_the_third(stage):
        begun.append(stage.name.replace("-seed0", ""))
        if len(begun) == 3:
            raise KeyboardInterrupt
        run_stage(stage)

    monkeypatch.setattr(pipeline, "_run_stage", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        safety_scaling.main(config(tmp_path, study))
    summary = safety_scaling.main(config(tmp_path, study))
    assert begun[2:4] == ["share-0.5/sft"] * 2
    assert begun[:2] + begun[3:] == [
        f"share-{n}/{run}" for n in ("0", "0.5", "1") for run in ("sft", "evaluate_policy")
    ]
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["left_out_as_held_out"] == 1
    assert [(p["share"], p["safety_rows"]) for p in summary["points"]] == [(0.0, 0), (0.5, 4), (1.0, 8)]
    given = {
        share: yaml.safe_load((out / f"share-{share}-seed0" / "sft" / "settings.yaml").read_text())
        for share in ("0", "0.5", "1")
    }
    helpful = {name: settings["train_files"][0] for name, settings in given.items()}
    assert len(set(helpful.values())) == 1  # fixed
    assert texts(helpful["0"]) == texts(study["helpful_files"][0])
    assert len(given["0"]["train_files"]) == 1
    half, everything = (texts(given[share]["train_files"][1]) for share in ("0.5", "1"))
    assert everything == texts(study["safety_files"][0])[1:]  # the first one is held out
    assert set(half) < set(everything)
    assert {settings["model_name_or_path"] for settings in given.values()} == {study["model_name_or_path"]}
    assert {settings["seed"] for settings in given.values()} == {0}

    # the point of a share is made of the raw scores in its responses
    responses = [json.loads(line) for line in (out / "share-1-seed0/evaluate_policy/responses.jsonl").open()]
    scores = [1 / (1 + np.exp(-r)) for row in responses if row["is_safety"] for r in row["reward_safety"]]
    assert summary["points"][2]["safety"]["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert (out / "safety_scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (out / "safety_scaling.svg").read_text()
    assert "| 100 % | 8 |" in (out / "report.md").read_text()

    assert safety_scaling.main(config(tmp_path, study))["points"] == summary["points"]
    assert len(begun) == 7, "a complete cell is not run again"
    more = safety_scaling.main(config(tmp_path, study, seeds=[0, 1], safety_shares=[0.0]))
    assert begun[7:] == ["share-0-seed1/sft", "share-0-seed1/evaluate_policy"]
    assert more["points"][0]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"safety_shares": [0.01]}, "safety_shares: 0.01 of 8 safety dialogues is none"),
        ({"safety_files": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
        ({"safety_model_path": "no/such/model"}, "no/such/model"),
        ({"sft": {"lerning_rate": 1.0}}, "unknown field 'lerning_rate'; did you mean 'learning_rate'"),
        ({"chat_format": "chatml"}, "chat_format"),
    ],
)
def test_mistakes_are_found_before_any_training(study, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(pipeline, "_run_stage", lambda stage: pytest.fail("a cell was trained"))
    with pytest.raises(UserError, match=message):
        safety_scaling.main(config(tmp_path, study, **fields))


def test_prompts_of_one_kind_are_refused(study, tmp_path):
    prompts = [row | {"is_safety": False} for row in prompt_rows(4)]
    file = write_rows(tmp_path / "p.jsonl", prompts)
    with pytest.raises(UserError, match="prompt_files: 0 of 4 prompts have is_safety"):
        safety_scaling.main(config(tmp_path, study, prompt_files=[file]))


def test_a_held_out_prompt_in_an_earlier_turn_is_a_leak_too():
    dialogue = [{"role": role, "content": text} for role, text in
                (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]  # fmt: skip
    assert answered_prompts(dialogue) == [dialogue[:1], dialogue[:3]]
