"""Collecting comparisons: different texts, two data sets, honest labels, and the way through people and back."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from test_rejection_sampling import rows_of, save_ending_policy, stored
from tiny_models import write_rows

from configs.errors import UserError
from configs.records import read_preferences
from rlhf import collect_preferences, engines
from rlhf.collect_preferences import Drawn, annotate_pairs
from rlhf.labels import import_labels, safety_label
from rlhf.simulation.people import draw_prompts


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "model_name_or_path": save_ending_policy(folder / "policy"),
        "prompt_files": write_rows(folder / "prompts.jsonl", draw_prompts(3, 40)),
        "max_new_tokens": "12",
        "prompts_per_shard": "15",
        "test_fraction": "0.5",
    }


def run(arguments: dict[str, str], folder: Path, **extra: str) -> dict:
    named = arguments | {"output_dir": str(folder)} | extra
    return collect_preferences.main([word for name, value in named.items() for word in (f"--{name}", value)])


def test_simulated_annotator_gives_two_data_sets_split_by_prompt(arguments, tmp_path):
    summary = run(arguments, tmp_path, annotator="simulated", pairs_per_prompt="2")
    prompts = {str(row["prompt"]): row["is_safety"] for row in rows_of(Path(arguments["prompt_files"]))}
    sides: dict[str, set[str]] = {}
    for name in ("helpfulness", "helpfulness_test", "safety", "safety_test"):
        rows = read_preferences(tmp_path / f"{name}.jsonl", max_reject_share=0.0).rows
        assert len(rows) == summary[name] > 0
        for row in rows:
            assert prompts[str(row["prompt"])] == name.startswith("safety")
            assert row["chosen"] != row["rejected"]
            assert 0.0 <= row["p_chosen"] <= 1.0
            labels = {
                "chosen_safe",
                "both_safe",
                "both_unsafe",
            }  # random text is harmless, and a pair may be unlabelled
            assert row["safety"] in labels | ({None} if name.startswith("helpfulness") else set())
        sides[name] = {str(row["prompt"]) for row in rows}
        assert any(row["safety"] == "both_safe" for row in rows)
    assert not sides["helpfulness"] & sides["helpfulness_test"]
    assert not sides["safety"] & sides["safety_test"]
    assert summary["pairs"] + summary["skipped_identical"] + summary["skipped_unusable"] == 80
    assert summary["pairs"] == sum(summary[name] for name in sides) + summary["excluded"]
    assert 0.5 <= summary["helpfulness_ceiling"] <= 1.0


def test_pairs_differ_and_depend_on_neither_shards_nor_batches(arguments, tmp_path):
    # One prompt, so that only the seeds can make the comparisons differ.
    prompts = write_rows(tmp_path / "prompts.jsonl", draw_prompts(3, 1) * 5)
    run(arguments, tmp_path / "one", prompt_files=prompts, pairs_per_prompt="4")
    run(
        arguments,
        tmp_path / "two",
        prompt_files=prompts,
        pairs_per_prompt="4",
        prompts_per_shard="2",
        token_budget="99",
    )
    one, two = ({row["id"]: row for row in stored(tmp_path / name)} for name in ("one", "two"))
    assert one == two
    assert all(row["response_a"] != row["response_b"] for row in one.values() if "skipped" not in row)
    texts = [row["response_a"] for row in one.values() if "skipped" not in row]
    assert len(set(texts)) > 0.9 * len(texts), "each comparison must have its own seeds"
    assert {tuple(row["variants"]) for row in one.values() if "skipped" not in row} == {(0, 1), (1, 0)}


def test_equal_texts_are_drawn_again_then_left_out_and_counted(arguments, tmp_path, monkeypatch):
    """Prompt 0 never gives two texts, prompt 1 does at the second attempt, all others at once."""
    attempts: list[tuple[int, int]] = []

    def pairs(self, prompts, indices, attempt):
        attempts.extend((index, attempt) for index in indices)
        same = {0: 99, 1: 1}
        return [[Drawn("same" if attempt < same.get(i, 0) else f"text {side}", True, True) for side in (0, 1)]
                for i in indices]  # fmt: skip

    monkeypatch.setattr(collect_preferences.Worker, "_pairs", pairs)
    summary = run(arguments, tmp_path, max_resamples="2")
    assert [a for a in attempts if a[0] < 2] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert (summary["pairs"], summary["skipped_identical"], summary["resampled"]) == (39, 1, 1)


def test_a_comparison_that_an_engine_cannot_sample_is_kept_as_an_error(arguments, tmp_path, monkeypatch):
    """An engine that is not in-process: each variant is asked apart, and a failure is not drawn again."""
    asked = []
    bad = [row["prompt"] for i, row in enumerate(draw_prompts(3, 40)) if i in (3, 18)]

    class Other(engines.InProcess):
        name = "other"

        def sample(self, prompts, k, settings, seed=0, temperatures=None):
            asked.append((len(prompts), settings.temperature))
            batch = super().sample(prompts, k, settings, seed)
            return dataclasses.replace(batch, errors={p: "late" for p, x in enumerate(prompts) if x.messages in bad})

    real = collect_preferences.load_engine

    def load(*positional):
        engine = real(*positional)
        return Other(engine.policy, engine.tokenizer, engine.stop_ids, engine.token_budget)

    monkeypatch.setattr(collect_preferences, "load_engine", load)
    with pytest.raises(UserError, match="2 of 40 prompts failed, all others are kept"):
        run(arguments, tmp_path)
    assert {temperature for _, temperature in asked} == {0.8, 1.1}
    failed = [row for row in stored(tmp_path) if "error" in row]
    assert [(row["index"], row["id"], row["error"]) for row in failed] == [(3, "3", "late"), (18, "18", "late")]
    summary = run(arguments, tmp_path, max_failed_share="0.1")
    assert (summary["failed"], summary["pairs"]) == (2, 38 - summary["skipped_identical"] - summary["skipped_unusable"])


def test_each_draw_of_a_pair_has_its_own_seed(arguments, tmp_path, monkeypatch):
    seeds: list[int] = []
    sample = engines.sample

    def recorded(*positional, **named):
        seeds.extend(named["seed"])
        return sample(*positional, **named)

    monkeypatch.setattr(engines, "sample", recorded)
    monkeypatch.setattr(collect_preferences, "usable", lambda *_: False)
    with pytest.raises(UserError, match="no prompt gave two different responses .*'skipped_unusable': 40"):
        run(arguments, tmp_path, max_resamples="1")
    assert len(set(seeds)) == len(seeds) == 40 * 2 * 2  # prompts, sides, attempts


def test_one_model_at_two_temperatures_draws_what_two_models_would(arguments, tmp_path):
    """Its prompts are computed once for both sides; a copy of the model as the second one computes them twice."""
    copy = save_ending_policy(tmp_path / "second")
    run(arguments, tmp_path / "once")
    run(arguments, tmp_path / "twice", second_model_name_or_path=copy)
    once, twice = (rows_of(tmp_path / name / "unlabelled.jsonl") for name in ("once", "twice"))
    assert once == twice


def test_two_models_are_two_variants(arguments, tmp_path):
    second = save_ending_policy(tmp_path / "second")
    run(arguments, tmp_path / "run", second_model_name_or_path=second)
    origins = rows_of(tmp_path / "run" / "origins.jsonl")
    for row in origins:
        assert {(row[side]["model"], row[side]["temperature"]) for side in "ab"} == {
            (arguments["model_name_or_path"], 0.8),
            (second, 1.1),
        }


def test_a_sharp_annotator_chooses_the_better_gold_score_and_excluded_pairs_are_counted():
    """On a risky prompt the refusal is the safe response; with little noise it is always chosen."""
    risky = next(row for row in draw_prompts(0, 200) if row["is_safety"])
    good, bad = "I cannot help with that.", "xyzzy"
    pair = {"prompt": risky["prompt"], "is_safety": True, "source": "s", "response_a": bad, "response_b": good}
    rows = [{"id": str(i), "variants": [0, 1], **pair} for i in range(20)]
    records, figures = annotate_pairs(rows, noise=1e-6, seed=0)
    from rlhf.simulation.annotator import utility

    better = max((good, bad), key=lambda text: utility(risky["prompt"], text, "safety"))
    assert {row["chosen"][0]["content"] for row in records["safety"]} == {better}
    assert len(records["safety"]) + figures["excluded"] == 20
    assert records["helpfulness"] == []


def test_the_way_through_people_and_back(arguments, tmp_path):
    summary = run(arguments, tmp_path / "pairs", annotator="none")
    rows = rows_of(tmp_path / "pairs" / "unlabelled.jsonl")
    assert len(rows) == summary["pairs"]
    assert list(rows[0])[-4:] == ["choice", "rating", "safety_a", "safety_b"]
    assert "variants" not in rows[0], "people must not see which model wrote what"
    rng = random.Random(0)
    for row in rows[1:]:
        row["choice"], row["rating"] = rng.choice("ab"), "better"
        if row["is_safety"]:
            row["safety_a"], row["safety_b"] = row["choice"] == "a", row["choice"] == "b"
    labelled = write_rows(tmp_path / "labelled.jsonl", rows)
    imported = collect_preferences.main(["--import_labels", labelled, "--output_dir", str(tmp_path / "records")])
    assert imported["unlabelled"] == 1
    names = ("helpfulness", "helpfulness_test", "safety", "safety_test")
    records = [row for name in names for row in rows_of(tmp_path / "records" / f"{name}.jsonl")]
    assert len(records) == len(rows) - 1
    by_texts = {(r["response_a"], r["response_b"], str(r["prompt"])): r for r in rows}
    for record in records:
        chosen, rejected = record["chosen"][0]["content"], record["rejected"][0]["content"]
        first = (chosen, rejected, str(record["prompt"])) in by_texts
        texts = (chosen, rejected) if first else (rejected, chosen)
        assert by_texts[(*texts, str(record["prompt"]))]["choice"] == ("a" if first else "b")
    assert {r["safety"] for r in records} == {None, "chosen_safe"}


def label(**changes) -> str:
    row = {"id": "0", "prompt": [{"role": "user", "content": "q"}], "is_safety": False, "response_a": "x"}
    row |= {"response_b": "y", "choice": "a", "rating": "better", "safety_a": None, "safety_b": None}
    return json.dumps(row | changes)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"id": "0"}', "prompt: missing"),
        (label(choice="c"), "choice"),
        (label(choice=["a"]), "choice"),
        (label(rating="great"), "rating"),
        (label(rating=None), "rating"),
        (label(response_a=3), "response_a"),
        (label(response_b=" "), "response_b"),
        (label(response_a="[INST]"), "response_a"),
        (label(response_b="x"), "equal"),
        (label(prompt="q"), "prompt"),
        (label(prompt=[]), "prompt"),
        (label(safety_a="yes"), "safety_a"),
        (label(safety_b=1), "safety_b"),
        (label(is_safety=True, safety_a=True), "safety_b"),
        (label(id="7"), "id '7' was already on line 1"),
    ],
)
def test_each_mistake_in_a_labelled_file_names_its_line(line, reason):
    records, mistakes, counts = import_labels([label(id="7"), "", line, label(id="8")])
    assert len(records["helpfulness"]) == 2
    assert counts["rows"] == 3
    assert [m["line"] for m in mistakes] == [3]
    assert reason in mistakes[0]["reason"]


def test_safety_bins_of_the_paper():
    assert safety_label(chosen_safe=True, rejected_safe=False) == "chosen_safe"
    assert safety_label(chosen_safe=True, rejected_safe=True) == "both_safe"
    assert safety_label(chosen_safe=False, rejected_safe=False) == "both_unsafe"
    assert safety_label(chosen_safe=False, rejected_safe=True) is None
    lines = [label(id=str(i), is_safety=True, safety_a=a, safety_b=True) for i, a in enumerate([False, True])]
    records, mistakes, counts = import_labels(lines)
    assert (counts["excluded"], mistakes) == (1, [])
    assert [row["safety"] for row in records["safety"]] == ["both_safe"]


def test_a_file_with_many_mistakes_stops_the_run_and_lists_them(tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join([label(id=str(i)) for i in range(8)] + [label(id="8", rating="great"), "{"]))
    with pytest.raises(UserError, match=r"(?s)2 of 10 rows .* line 9: rating.*line 10: not JSON"):
        collect_preferences.main(["--import_labels", str(labels), "--output_dir", str(tmp_path / "run")])
    assert len(rows_of(tmp_path / "run" / "rejected_labels.jsonl")) == 2
    summary = collect_preferences.main(
        ["--import_labels", str(labels), "--output_dir", str(tmp_path / "run"), "--max_reject_share", "0.2"]
    )
    assert summary["rejected"] == 2
    assert summary["helpfulness"] + summary["helpfulness_test"] == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature_a", "0"), ("annotator_noise", "0"), ("test_fraction", "1.0"), ("pairs_per_prompt", "0")],
)
def test_bad_settings_are_refused(arguments, tmp_path, name, value):
    with pytest.raises(UserError, match=name):
        run(arguments, tmp_path, **{name: value})


def test_a_model_and_prompts_are_needed_unless_labels_are_imported(tmp_path):
    with pytest.raises(UserError, match="import_labels"):
        collect_preferences.main(["--output_dir", str(tmp_path)])
