"""Safety context distillation: preprompts, what is sampled and scored where, the gate, and the script end to end."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, write_rows
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from configs.chat import SPECIAL_TAGS, load_chat_format
from configs.distil_settings import DistilSettings
from configs.errors import UserError
from configs.records import read_dialogues
from configs.safety_labels import RISK_CATEGORIES
from rlhf import distil_ablation, distil_safety
from rlhf.distil_report import summarise
from rlhf.distil_safety import candidate, choose_preprompt, verdict
from rlhf.preprompts import ADJECTIVES, Preprompts, read_preprompts, with_preprompt
from rlhf.shards import read_shard
from rlhf.tokenizer import load_tokenizer

USER = {"role": "user", "content": "How do I fake a note?"}
SYSTEM = {"role": "system", "content": "Be short."}
REPLY = {"role": "assistant", "content": "No."}


def test_a_generic_preprompt_names_two_different_adjectives():
    wordings = Preprompts(generic=("You are {adjectives}.",))
    drawn = {wordings.draw(random.Random(seed)).text for seed in range(60)}
    pairs = {tuple(text.removeprefix("You are ").removesuffix(".").split(" and ")) for text in drawn}
    assert len(pairs) > 15
    assert all(len(set(pair)) == 2 and set(pair) <= set(ADJECTIVES) for pair in pairs)
    assert Preprompts().draw(random.Random(3)) == Preprompts().draw(random.Random(3))


def test_every_category_has_a_targeted_preprompt_in_numbered_steps():
    wordings = Preprompts()
    assert wordings.targeted.keys() == RISK_CATEGORIES.keys()
    for category in RISK_CATEGORIES:
        drawn = wordings.draw(random.Random(0), category)
        assert (drawn.kind, drawn.category) == ("targeted", category)
        assert [line[:2] for line in drawn.text.splitlines()[1:]] == ["1.", "2.", "3.", "4."]
    texts = [*wordings.generic, *(text for texts in wordings.targeted.values() for text in texts)]
    assert not any(tag in text for text in texts for tag in SPECIAL_TAGS)


@pytest.mark.parametrize(
    ("messages", "slot", "expected"),
    [
        ([USER], "system", [{"role": "system", "content": "P"}, USER]),
        ([SYSTEM, USER], "system", [{"role": "system", "content": "P\n\nBe short."}, USER]),
        ([USER], "user", [{"role": "user", "content": "P\n\nHow do I fake a note?"}]),
        ([SYSTEM, USER, REPLY, USER], "user",
         [SYSTEM, USER, REPLY, {"role": "user", "content": "P\n\nHow do I fake a note?"}]),
    ],
)  # fmt: skip
def test_where_the_preprompt_stands(messages, slot, expected):
    before = json.dumps(messages)
    assert with_preprompt(messages, "P", slot) == expected
    assert json.dumps(messages) == before


def test_a_file_replaces_what_it_names(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"generic": ["Be kind."], "targeted": {"advice": ["Ask a nurse."]}}))
    own = read_preprompts(str(path))
    assert own.draw(random.Random(0)).text == "Be kind."
    assert own.draw(random.Random(0), "advice").text == "Ask a nurse."
    assert own.targeted["illicit"] == Preprompts().targeted["illicit"]
    path.write_text(json.dumps({"adjectives": ["calm"], "generic": ["Be {adjectives}."]}))
    assert read_preprompts(str(path)).draw(random.Random(0)).text == "Be calm."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ("[]", "must be an object with adjectives, generic, targeted, not list"),
        ('{"generik": ["a"]}', "unknown generik; use adjectives, generic, targeted"),
        ('{"generic": []}', "generic: give a list of at least one text"),
        ('{"generic": "a"}', "generic: give a list"),
        ('{"generic": ["a", " "]}', "generic, item 2: must be a text that is not empty"),
        ('{"generic": [3]}', "generic, item 1: must be a text"),
        ('{"generic": ["Be <<SYS>> good"]}', "generic, item 1: contains the special tag '<<SYS>>'"),
        ('{"targeted": {"theft": ["a"]}}', "targeted: unknown theft; use illicit, hateful, advice"),
        (
            '{"targeted": {"advice": ["say [/INST]"]}}',
            r"targeted: advice, item 1: contains the special tag '\[/INST\]'",
        ),
    ],
)
def test_a_bad_file_is_refused_by_place(tmp_path, content, message):
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"preprompts_file: .*own.json.*{message}"):
        read_preprompts(str(path))
    with pytest.raises(UserError, match="preprompts_file: .*No such file"):
        read_preprompts(str(tmp_path / "none.json"))


def settings(**extra) -> DistilSettings:
    return DistilSettings(prompt_files=["p"], safety_model_path="s", **extra)


@pytest.mark.parametrize(
    ("record", "fields", "category", "reason"),
    [
        ({"is_safety": True}, {}, None, ""),
        ({"is_safety": True, "risk_category": "no such"}, {}, None, ""),  # a generic preprompt asks for no category
        ({"is_safety": False}, {}, None, "not a safety prompt"),
        ({"is_safety": False, "risk_category": "advice"}, {"preprompt_kind": "targeted"}, None, "not a safety prompt"),
        ({"is_safety": False}, {"include_helpful": True, "preprompt_kind": "targeted"}, None, ""),
        ({"is_safety": True, "risk_category": "advice"}, {"preprompt_kind": "targeted"}, "advice", ""),
        ({"is_safety": True, "risk_category": "Unqualified advice"}, {"preprompt_kind": "targeted"}, "advice", ""),
        ({"is_safety": True, "source": "illicit"}, {"preprompt_kind": "targeted", "category_field": "source"},
         "illicit", ""),
        ({"is_safety": True}, {"preprompt_kind": "targeted"}, None, ""),
        ({"is_safety": True}, {"preprompt_kind": "targeted", "uncategorised": "reject"}, None, "no risk category"),
        ({"is_safety": True, "risk_category": "theft"}, {"preprompt_kind": "targeted"}, None, "unknown risk category"),
        ({"is_safety": True, "risk_category": ["advice"]}, {"preprompt_kind": "targeted"}, None,
         "unknown risk category"),
    ],
)  # fmt: skip
def test_which_prompts_are_distilled_and_under_what(record, fields, category, reason):
    preprompt, why, detail = choose_preprompt(record, settings(**fields), Preprompts(), random.Random(0))
    assert why == reason
    assert bool(detail) == bool(reason) == (preprompt is None)
    assert preprompt is None or preprompt.category == category


def answers(safety: list[float], **extra) -> dict:
    """A row whose answer 0 is the original."""
    row = {"is_safety": True, "safety": safety, "responses": list("abcdef"[: len(safety)]),
           "finished": [True] * len(safety), "usable": [True] * len(safety),
           "preprompt": {"text": "P", "category": None}}  # fmt: skip
    return row | extra


def test_the_gate_by_hand():
    rows = [
        answers([0.0, -1.0, 2.0, 2.0]),  # the first of the best two
        answers([3.0, 1.0, 2.0]),  # the best is below the original
        answers([1.0, 1.0]),  # equal is not above
        answers([1.0, 1.0000001], responses=["a", "a"]),  # the same text, scored with another rounding
        answers([0.0, 5.0, 1.0], finished=[True, False, True]),
        answers([0.0, 5.0], usable=[True, False]),
    ]
    best = [candidate(row, keep_unfinished=False) for row in rows]
    assert best == [2, 2, 1, 1, 2, None]
    low, none = "not above the original", "no usable answer"
    assert [verdict(row, i, gate=True) for row, i in zip(rows, best, strict=True)] == ["", low, low, low, "", none]
    assert [verdict(row, i, gate=False) for row, i in zip(rows, best, strict=True)] == ["", "", "", "", "", none]
    assert candidate(rows[4], keep_unfinished=True) == 1


def test_the_combined_gate_by_hand():
    """The piecewise rule: safety alone on safety prompts, elsewhere helpfulness unless R_s < 0.15 (-1.7346 raw)."""
    rows = [
        answers([0.0, 5.0, 4.0], helpfulness=[2.0, 1.0, 9.0], is_safety=True),  # helpfulness has no say
        answers([0.0, 5.0], helpfulness=[2.0, 1.0], is_safety=False),  # a safer answer, and less help
        answers([0.0, 5.0, 4.0], helpfulness=[2.0, 1.0, 3.0], is_safety=False),  # the best is the most helpful one
        answers([-4.0, 5.0], helpfulness=[9.0, 1.0], is_safety=False),  # the original is unsafe: it counts for -4
        answers([0.0, -1.74, -1.73], helpfulness=[-3.0, 9.0, -2.0], is_safety=False),  # the first is unsafe
    ]
    best = [candidate(row, keep_unfinished=False) for row in rows]
    assert best == [1, 1, 2, 1, 1]
    low = "not above the original"
    assert [verdict(row, i, gate=True) for row, i in zip(rows, best, strict=True)] == ["", low, "", "", ""]
    rows[4]["safety"][2] = -1.0
    rows[4]["helpfulness"][2] = -1.5
    assert candidate(rows[4], keep_unfinished=False) == 2


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=6))
def test_what_the_gate_keeps_is_the_best_and_above_the_original(safety):
    row = answers(safety)
    best = candidate(row, keep_unfinished=False)
    assert safety[best] == max(safety[1:])
    assert (verdict(row, best, gate=True) == "") == (max(safety[1:]) > safety[0])


def test_the_summary_by_hand():
    rows = [answers([0.0, 4.0], gold_safety=[0.5, 1.0]), answers([0.0, -4.0], gold_safety=[0.0, 0.7])]
    rows.append(answers([0.0, 4.0], is_safety=False, gold_helpfulness=[0.6, 0.2]))
    verdicts = ["", "not above the original", ""]
    found = summarise(rows, [1, 1, 1], verdicts, [{"reason": "not a safety prompt"}] * 2)
    assert (found["prompts"], found["kept"], found["kept_safety"], found["kept_helpful"]) == (3, 2, 1, 1)
    assert found["not_kept"] == {"not above the original": 1}
    assert found["left_out"] == {"not a safety prompt": 2}
    assert found["kept_by_preprompt"] == {"generic": 2}
    # sigmoid(4) = 0.98201; the second prompt keeps its original answer, sigmoid(0) = 0.5
    assert found["safety"]["original"]["mean"] == 0.5
    assert found["safety"]["after"]["mean"] == pytest.approx((0.98201 + 0.5 + 0.98201) / 3, abs=1e-5)
    assert found["safety"]["candidate"]["tail"]["share"] == pytest.approx(1 / 3, abs=1e-5)  # sigmoid(-4) = 0.018
    assert found["safety"]["after"]["tail"]["share"] == 0.0
    assert found["gold_safety"] == {"original": 0.25, "after": 0.5}  # (0.5 + 0) / 2, (1 + 0) / 2
    assert found["gold_helpfulness"] == {"original": 0.6, "after": 0.2}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    policy = save_tiny_policy(folder / "policy", max_position_embeddings=2048)
    model = LlamaForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4  # most responses end
    model.save_pretrained(policy)
    rows = prompt_rows(14)
    for i, row in enumerate(rows):
        row |= {"is_safety": i % 7 != 6, "risk_category": ("illicit", "hateful", "advice", None, "theft")[i % 5]}
    return {
        "model_name_or_path": policy,
        "safety_model_path": save_tiny_reward_model(folder / "safety", seed=2),
        "prompt_files": write_rows(folder / "prompts.jsonl", rows),
        "preprompt_kind": "targeted",
        "samples_per_prompt": "2",
        "max_new_tokens": "12",
        "keep_unfinished": "true",
        "prompts_per_shard": "4",
        "use_cpu": "true",
    }


def run(arguments: dict[str, str], folder: Path, **extra: str) -> dict:
    named = arguments | {"output_dir": str(folder)} | extra
    return distil_safety.main([word for name, value in named.items() for word in (f"--{name}", value)])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8", newline="\n")]


def stored(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("shards/*/*.jsonl.gz")) for row in read_shard(path)]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(arguments, folder)


def test_answers_are_scored_and_trained_without_the_preprompt(arguments, finished):
    """Scores recomputed by plain transformers on the bare prompt; rows are what the gate's rule keeps of them."""
    folder, summary = finished
    chat = load_chat_format(load_tokenizer(arguments["model_name_or_path"]))
    model = AutoModelForSequenceClassification.from_pretrained(arguments["safety_model_path"]).eval()
    expected = []
    for row in stored(folder):
        scores = []
        for ids in row["response_ids"]:
            with torch.no_grad():
                scores.append(float(model(torch.tensor([chat.encode_prompt(row["prompt"]) + ids])).logits))
        assert row["safety"] == pytest.approx(scores, abs=1e-4)
        may = [i for i in (1, 2) if row["usable"][i]]
        best = max(may, key=lambda i: row["safety"][i], default=None)
        if best is not None and scores[best] > scores[0]:
            expected.append([*row["prompt"], {"role": "assistant", "content": row["responses"][best]}])
    kept = rows_of(folder / "distilled.jsonl")
    assert [row["messages"] for row in kept] == expected
    assert 1 < len(expected) == summary["kept"]
    assert {row["train_on"] for row in kept} == {"last"}
    assert all(row["safety_score"] > row["original_safety_score"] for row in kept)
    assert all(row["messages"][0]["role"] == "user" for row in kept)  # no system message, so no preprompt
    assert len(read_dialogues(folder / "distilled.jsonl").rows) == len(kept)
    assert not (folder / "model").exists()


def test_the_preprompt_shapes_the_answers_but_not_the_original(arguments, finished, tmp_path):
    run(arguments, tmp_path, preprompt_kind="generic")
    ours, theirs = ({row["prompt"][0]["content"]: row for row in stored(f)} for f in (finished[0], tmp_path))
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 8
    assert all(ours[p]["preprompt"]["text"] != theirs[p]["preprompt"]["text"] for p in shared if
               ours[p]["preprompt"]["category"])  # fmt: skip
    assert any(ours[p]["responses"][1:] != theirs[p]["responses"][1:] for p in shared)


def test_nothing_is_lost(arguments, finished):
    folder, summary = finished
    left_out, not_kept = rows_of(folder / "left_out.jsonl"), rows_of(folder / "not_kept.jsonl")
    assert summary["prompts"] + len(left_out) == 14
    assert summary["kept"] + len(not_kept) == summary["prompts"]
    # prompts 6 and 13 are helpful; 4 and 9 have the category theft
    assert [(row["line"], row["reason"]) for row in left_out] == [
        (5, "unknown risk category"), (7, "not a safety prompt"), (10, "unknown risk category"),
        (14, "not a safety prompt"),
    ]  # fmt: skip
    assert "'risk_category' is 'theft', not one of illicit, hateful, advice" in left_out[0]["detail"]
    assert {row["reason"] for row in not_kept} <= {"not above the original", "no usable answer"}
    card = (folder / "README.md").read_text()
    assert "kept only where the safety reward model scores it above" in card
    assert f"- kept: {summary['kept']}" in card
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_a_killed_run_continues_and_another_gate_samples_nothing(arguments, finished, tmp_path, monkeypatch):
    calls = []
    rows = distil_safety.Worker.rows

    def killed_at_the_second(self, prompts, indices):
        calls.append(indices[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows(self, prompts, indices)

    monkeypatch.setattr(distil_safety.Worker, "rows", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(arguments, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    run(arguments, tmp_path)
    assert calls == [0, 4, 4, 8], "finished shards must not be sampled again"
    for name in ("distilled.jsonl", "not_kept.jsonl", "left_out.jsonl"):
        assert (tmp_path / name).read_text() == (finished[0] / name).read_text()
    run(arguments, tmp_path)
    assert len(calls) == 4, "a complete run returns its summary"
    ungated = run(arguments, tmp_path, gate="false")
    assert len(calls) == 4, "another gate is another selection"
    assert ungated["kept"] > finished[1]["kept"]
    assert "not above the original" not in ungated["not_kept"]
    assert "the gate was off" in (tmp_path / "README.md").read_text()
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"targeted": {"illicit": ["Be good."]}}))
    run(arguments, tmp_path, preprompts_file=str(own))
    assert len(calls) > 4, "other preprompts never take the old shards"


def test_helpful_prompts_are_distilled_only_where_that_is_measured(arguments, tmp_path):
    summary = run(arguments, tmp_path, gate="false", include_helpful="true")
    assert summary["left_out"] == {"unknown risk category": 2}
    assert summary["kept_helpful"] == 2
    assert [row["preprompt"] for row in rows_of(tmp_path / "distilled.jsonl") if not row["is_safety"]] == [
        "generic"
    ] * 2


def test_with_a_helpfulness_model_the_combined_score_decides(arguments, tmp_path):
    """Both scores recomputed by plain transformers; what is kept is above the original by the rule."""
    helpfulness = save_tiny_reward_model(tmp_path / "helpfulness", seed=7)
    more = {"include_helpful": "true", "helpfulness_model_path": helpfulness}
    run(arguments, tmp_path / "out", **more)
    chat = load_chat_format(load_tokenizer(arguments["model_name_or_path"]))
    model = AutoModelForSequenceClassification.from_pretrained(helpfulness).eval()
    threshold = math.log(0.15 / 0.85)
    expected = []
    for row in stored(tmp_path / "out"):
        with torch.no_grad():
            scores = [
                float(model(torch.tensor([chat.encode_prompt(row["prompt"]) + ids])).logits)
                for ids in row["response_ids"]
            ]
        assert row["helpfulness"] == pytest.approx(scores, abs=1e-4)
        by_safety = [row["is_safety"] or safety < threshold for safety in row["safety"]]
        rule = [s if safe else h for s, h, safe in zip(row["safety"], scores, by_safety, strict=True)]
        best = max((i for i in (1, 2) if row["usable"][i]), key=lambda i: rule[i], default=None)
        if best is not None and rule[best] > rule[0]:
            expected.append(row["responses"][best])
    kept = rows_of(tmp_path / "out" / "distilled.jsonl")
    assert [row["messages"][-1]["content"] for row in kept] == expected
    assert any(not row["is_safety"] for row in kept)
    assert all({"helpfulness_score", "original_helpfulness_score", "safety_score"} <= row.keys() for row in kept)
    assert "kept only where the combined reward scores it above" in (tmp_path / "out" / "README.md").read_text()
    shown = rows_of(tmp_path / "out" / "not_kept.jsonl")
    assert all({"response", "safety", "helpfulness"} == row["original"].keys() for row in shown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"helpfulness_model_path": "runs/h"}, "helpfulness_model_path: no effect without include_helpful"),
        ({"safety_model_path": ""}, "safety_model_path: name the folder"),
        ({"samples_per_prompt": "0"}, "samples_per_prompt must be at least 1"),
        ({"temperature": "0"}, "temperature: greedy sampling gives equal responses"),
        ({"max_reject_share": "1"}, "max_reject_share"),
        ({"use_peft": "true"}, "use_peft and freeze_embeddings are for training"),
        ({"preprompt_kind": "generic", "uncategorised": "reject"}, "uncategorised: no effect"),
        ({"category_field": "kind", "uncategorised": "reject"},
         "no prompt to distil .*: 12 no risk category, 2 not a safety prompt"),
        ({"preprompt_kind": "both"}, "preprompt_kind"),
        ({"max_new_tokens": "1990"}, "prompt too long"),
    ],
)  # fmt: skip
def test_mistakes_are_user_errors(arguments, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        run(arguments, tmp_path, **fields)


def test_the_ablation_table_by_hand(tmp_path):
    def write(folder: str, **summary) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "summary.json").write_text(json.dumps(summary))

    ends = {"unsafe_rate": [0.1, 0.3], "false_refusal_rate": [0.0, 0.1]}
    write("evaluate_gated", unsafe_rate=0.2, false_refusal_rate=0.05, ci95=ends)
    write("distil_gated", prompts=9, kept=4, kept_helpful=0)
    write("evaluate_start", unsafe_rate=0.5, false_refusal_rate=0.05, ci95=ends)
    write("evaluate_other", unsafe_rate=0.5, ci95=ends)  # of no distillation
    policies = distil_ablation.gather(tmp_path)
    assert [policy["policy"] for policy in policies] == ["start", "gated"]
    titles, rows = distil_ablation.table(policies)
    assert titles == ["policy", "kept", "helpful", "unsafe", "false refusals"]
    assert rows[0] == [["start"], ["-"], ["-"], ["0.500", "(0.100-0.300)"], ["0.050", "(0.000-0.100)"]]
    assert rows[1][:4] == [["gated"], ["4"], ["0"], ["0.200", "(0.100-0.300)"]]


def test_what_a_gate_avoids_is_paired_by_prompt(tmp_path):
    """Four harmless and two risky prompts: the gated policy refuses one less of four in three of four prompts."""

    def evaluation(name: str, refused: list[int], safety: list[list[float]]) -> None:
        rows = [
            {"prompt": [{"role": "user", "content": f"q{i}"}], "kind": "scary",
             "responses": ["I cannot help with that."] * count + ["It is blue."] * (4 - count)}
            for i, count in enumerate(refused)
        ]  # fmt: skip
        rows += [
            {"prompt": [{"role": "user", "content": f"r{i}"}], "kind": "risky", "responses": ["x"] * len(scores),
             "gold_safety": scores}
            for i, scores in enumerate(safety)
        ]  # fmt: skip
        write_rows_into(tmp_path / f"evaluate_{name}", rows)

    def write_rows_into(folder: Path, rows: list[dict]) -> None:
        folder.mkdir()
        write_rows(folder / "responses.jsonl", rows)

    evaluation("ungated_all", [2, 1, 1, 4], [[0.0, 1.0], [1.0, 1.0]])
    evaluation("gated_all", [1, 0, 0, 4], [[0.0, 0.0], [1.0, 1.0]])
    evaluation("gated", [0, 0, 0, 0], [[1.0], [1.0]])  # there is no ungated one of its own
    found = distil_ablation.less_ungated(tmp_path, ["start", "gated", "gated_all", "ungated_all"])
    assert [(entry["policy"], entry["ungated"]) for entry in found] == [("gated_all", "ungated_all")]
    assert found[0]["false_refusal_rate"]["difference"] == pytest.approx(-3 / 16, abs=1e-4)
    low, high = found[0]["false_refusal_rate"]["ci95"]
    # Of four draws n fall on the prompt that does not change, -(4 - n) / 16: none in 32 % of the resamples, three or
    # more in 5.1 %, all four in 0.4 %. So the percentiles are at n = 0 and n = 3.
    assert (low, high) == (-0.25, -0.0625)
    assert found[0]["unsafe_rate"]["difference"] == pytest.approx(0.25)  # 0.25 before, 0.5 after
    (cells,) = distil_ablation.difference_rows(found)
    assert cells[0] == "gated_all"
    assert cells[2] == "-0.188 (-0.250 to -0.062)"
