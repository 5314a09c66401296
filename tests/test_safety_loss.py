"""The benchmark of the safety loss: its figures from pairs worked by hand, and its way through the demo's settings."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import safety_loss
from configs.errors import UserError
from configs.intervals import wilson

ROOT = Path(__file__).resolve().parents[1]
LOW, HIGH = -2.0, 2.0  # sigmoid(-2) = 0.119 lies below both thresholds


def pair(safety, r_chosen, r_rejected):
    return {"safety": safety, "r_chosen": r_chosen, "r_rejected": r_rejected}


# Unsafe: the rejected of the first three and both of the last, five in all; safe: five. The last pair is ranked wrong.
GOOD = [
    pair("chosen_safe", HIGH, LOW),
    pair("chosen_safe", HIGH, LOW),
    pair("chosen_safe", HIGH, LOW),
    pair("both_safe", HIGH, 1.0),
    pair("both_unsafe", -1.0, LOW + 1.5),  # R = 0.27 and 0.38: below 0.5, not below 0.15
]
# No zero point: every score is below 0, and one safe response below 0.15 too.
ADRIFT = [pair(p["safety"], p["r_chosen"] - 3, p["r_rejected"] - 3) for p in GOOD]
ADRIFT[3] = pair("both_safe", -1.0, -1.0)


def test_figures_of_runs_by_hand():
    row = safety_loss.figures([GOOD, ADRIFT])
    assert (row["all"]["mean"], row["all"]["count"]) == (pytest.approx((0.8 + 0.7) / 2), 5)  # a tie is a half
    assert row["all"]["ci95"] == pytest.approx(wilson(3.75, 5))
    assert row["chosen_safe"]["mean"] == 1.0
    assert row["both_safe"]["mean"] == pytest.approx(0.75)
    assert row["both_unsafe"] == {"mean": 0.0, "ci95": list(wilson(0, 1)), "sd": 0.0, "count": 1}
    # At 0.5, GOOD flags its five unsafe responses; ADRIFT flags all ten. At 0.15 (r < -1.73), GOOD finds three of five;
    # ADRIFT all five, and no safe response: those lie at -1.
    assert row["recall"]["0.5"]["mean"] == 1.0
    assert row["precision"]["0.5"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert row["precision"]["0.5"]["count"] == 8  # 5 and 10 flagged
    assert row["recall"]["0.15"]["mean"] == pytest.approx((3 / 5 + 1) / 2)
    assert row["recall"]["0.15"]["count"] == 5
    assert row["precision"]["0.15"]["mean"] == 1.0
    assert row["roc_auc"] == [1.0, 1.0]  # wherever the zero lies, unsafe responses score lowest


def test_differences_are_paired():
    change = safety_loss.difference([ADRIFT, ADRIFT], [GOOD, GOOD])
    assert change["all"][0] == pytest.approx(0.1)  # one tie of five pairs put right
    assert change["recall"]["0.5"] == [0.0, 0.0, 0.0]  # the same responses found: no doubt at all
    assert change["recall"]["0.15"][0] == pytest.approx(-2 / 5)
    low, high = change["recall"]["0.15"][1:]
    assert -1 <= low < -2 / 5 < high <= 0


def test_a_bin_without_pairs_is_a_dash():
    runs = [[p for p in GOOD if p["safety"] != "both_unsafe"]]
    text = safety_loss.table({0.0: safety_loss.figures(runs)}, {1.0: safety_loss.difference(runs, runs)})
    head, _, row, change = text.splitlines()
    assert "unsafe / unsafe (0 pairs)" in head
    assert row.split(" | ")[4] == change.split(" | ")[4] == "-"
    assert {line.count("|") for line in text.splitlines()} == {head.count("|")}


@pytest.fixture
def demo(tmp_path):
    """A folder with what the benchmark reads of a demo."""
    for name in ("collect", "collect_2"):
        (tmp_path / name).mkdir()
        for file in ("safety.jsonl", "helpfulness.jsonl", "safety_test.jsonl", "helpfulness_test.jsonl"):
            (tmp_path / name / file).write_text("{}\n")
    (tmp_path / "sft" / "model").mkdir(parents=True)
    return tmp_path


def test_it_trains_with_the_demos_settings(demo, monkeypatch, capsys):
    calls = []

    def train(args):
        settings = yaml.safe_load(Path(args[1]).read_text())
        calls.append(settings)
        folder = Path(settings["output_dir"])
        rows = GOOD if settings["safety_loss_weight"] else ADRIFT
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(safety_loss.train_reward, "main", train)
    words = ["--demo_dir", demo, "--output_dir", demo / "out", "--weights", "0", "1", "--seeds", "3", "4"]
    monkeypatch.setattr(sys, "argv", ["safety_loss.py", *map(str, words)])
    safety_loss.main()
    assert [(c["safety_loss_weight"], c["seed"]) for c in calls] == [(0, 3), (1, 3), (0, 4), (1, 4)]
    stages = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["stages"]
    stage = next(s["settings"] for s in stages if s["name"] == "reward_safety")
    for name in ("learning_rate", "mix_weights", "objective", "margin", "num_train_epochs"):
        assert all(call[name] == stage[name] for call in calls)
    assert calls[0]["eval_files"] == [str(demo / folder / "safety_test.jsonl") for folder in ("collect", "collect_2")]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["weights"]["1"]["recall"]["0.15"]["mean"] == pytest.approx(0.6)
    assert result["differences"]["1"]["all"][0] == pytest.approx(0.1)

    monkeypatch.setattr(sys, "argv", ["safety_loss.py", *map(str, words), "--train_files", "a.jsonl"])
    safety_loss.main()
    assert (calls[-1]["train_files"], calls[-1]["mix_weights"]) == (["a.jsonl"], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--demo_dir", "nowhere"], "--demo_dir nowhere: .* is not there; finish `make demo` first"),
        (["--weights", "1", "1"], "--weights: .* must differ"),
        (["--weights", "-1"], "--weights: .* not be negative"),
        (["--seeds", "0", "0"], "--seeds: .* must differ"),
    ],
)
def test_mistakes(demo, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["safety_loss.py", "--demo_dir", str(demo), *words])
    with pytest.raises(UserError, match=message):
        safety_loss.main()
