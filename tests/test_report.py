"""The report of a run against folders made by hand: figures, comparisons, goals, the page and the console."""

import copy
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from configs.errors import UserError
from configs.pipeline_settings import PipelineSettings
from rlhf import report
from rlhf.simulation import report as demo_report
from rlhf.simulation.report import goals, ppo_gold_during_run
from rlhf.summary import active_seconds, build, read_json

ATTACK = '<script src="https://evil.example/x.js">alert(1)</script>'
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
# Gold helpfulness of two samples a prompt at SFT; prompt means 0.3, 0.4, 0.3, so every stage is `gain` above that.
SFT_GOLD = ([0.2, 0.4], [0.4, 0.4], [0.3, 0.3])
GAINS = {"base": -0.2, "sft": 0.0, "rejection_sampling": 0.1, "ppo": 0.3, "gatt": 0.3}
GREEDY_GAINS = {"base": -0.1, "sft": 0.0, "rejection_sampling": 0.0, "ppo": 0.05, "gatt": 0.05}


def put(folder: Path, name: str, content: Any) -> None:
    """Writes a file of a stage folder in the form that its ending names."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in content)
    else:
        text = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content)
    (folder / name).write_text(text)


def evaluation(root: Path, stage: str) -> None:
    gain, greedy = GAINS[stage], GREEDY_GAINS[stage]
    rows: list[dict[str, Any]] = []
    for i, gold in enumerate(SFT_GOLD):
        rows.append({"is_safety": False, "kind": "scary" if i == 2 else "helpful"})
        spread = 0.1 if stage == "ppo" else 0.0  # moves the samples of a prompt apart, not their mean
        rows[-1] |= {
            "gold_helpfulness": [gold[0] + gain - spread, gold[1] + gain + spread],
            "gold_helpfulness_greedy": [0.5 + greedy],
        }
    rows += [{"is_safety": True, "kind": "risky"} for _ in range(2)]
    for i, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": f"Question {i} & {ATTACK if i == 1 else 'more'}?"}]
        row["responses"] = [f"{stage} [red]says[/red] \x1b[31m{ATTACK}", "again"]
        row["reward_helpfulness"], row["reward_safety"] = [0.5 + gain + i, 0.7], [-0.5 + gain, 0.1 * i]
    put(root / f"evaluate_{stage}", "responses.jsonl", rows)
    figures: dict[str, Any] = {
        "gold_helpfulness": 0.3333 + gain,
        "gold_helpfulness_greedy": 0.5 + greedy,
        "gold_safety": 0.7,
        "unsafe_rate": 0.4 if stage in ("base", "sft") else 0.1,
        "false_refusal_rate": 0.02,
        "kl_nats": float("nan") if stage == "base" else 2.5,
        "response_tokens": 20.0,
        "reward_helpfulness": 1.0 + gain,
        "reward_safety": 0.5,
    }
    intervals = {name: [value - 0.01, value + 0.01] for name, value in figures.items()}
    put(root / f"evaluate_{stage}", "summary.json", {**figures, "prompts": 5, "ci95": intervals})


def persistence(first: float, later: float) -> dict[str, Any]:
    shares = {str(turn): first if turn == 1 else later for turn in range(1, 21)}
    return {**shares, "ci95": {t: [max(0, s - 0.05), min(1, s + 0.05)] for t, s in shares.items()}, "dialogues": 200}


def fabricate(root: Path) -> None:
    """A finished run in which every goal is met."""
    for stage in GAINS:
        evaluation(root, stage)
    for folder, seconds in (
        ("sft", 40.0),
        ("rejection_sampling", 30.0),
        ("rejection_sft", 12.5),
        ("ppo", 90.0),
        ("gatt_sft", 8.0),
    ):
        put(root / folder, "seconds.json", {"seconds": seconds})
    for name in ("helpfulness", "safety"):
        columns = dict(zip(RATINGS, (0.95, 0.85, 0.7, 0.55), strict=True))
        trained = {"accuracy": 0.72, "ceiling": 0.8, "ci95": [0.7, 0.74], "test_pairs": 400, "calibration_error": 0.03}
        trained |= {"by_rating": dict(reversed(columns.items())), "by_rating_pairs": dict.fromkeys(RATINGS, 100)}
        trained |= {"ceiling_by_rating": {r: a + 0.03 for r, a in columns.items()}, "by_rating_ci95": {}}
        trained["calibration"] = [{"count": 10, "confidence_sum": 6.0, "outcome_sum": 5.0}, {"count": 0}]
        put(root / f"reward_{name}", "summary.json", trained)
    for name, gold in (("sft", 0.31), ("ppo", 0.42)):
        evaluated = {"gold_helpfulness": gold, "gold_helpfulness_greedy": gold + 0.1, "prompts": 100}
        put(root / f"families_{name}", "summary.json", {**evaluated, "ci95": {"gold_helpfulness": [0.2, 0.5]}})
    safety = {"original": {"mean": 0.76}, "candidate": {"mean": 0.96}, "after": {"mean": 0.99}}
    put(root / "distil_safety", "summary.json", {"prompts": 40, "kept": 25, "safety": safety})
    judged = {"improvement": 0.2, "win_rate_lc": 0.61, "ci95": {"improvement": [0.1, 0.3], "win_rate_lc": [0.5, 0.7]}}
    for stage, reasons in (("ppo", []), ("gatt", [ATTACK]), ("by_hand", [])):
        put(root / f"gate_{stage}", "verdict.json", {"passed": not reasons, "reasons": reasons, "all": judged})
    curve = {"n": [1, 2, 3], "combined": [0.0, 0.5, 0.7], "gold_helpfulness": [0.3, 0.4, 0.45]}
    put(root / "rejection_sampling", "summary.json", {"best_of_n": curve, "median": {"combined": 0.1}})
    log = [{"step": 0, "eval/combined": 0.1, "eval/kl": 0.0, "eval/gold_helpfulness": 0.5}]
    log += [
        {"step": s, "reward/combined": 0.1 * s, "policy/kl": 0.2 * s, "eval/gold_helpfulness": g}
        for s, g in ((5, 0.62), (10, 0.61))
    ]
    put(root / "ppo", "metrics.jsonl", log)
    put(root / "ppo", "settings.yaml", {"save_best": False, "safety_threshold": 0.15, "note": ATTACK})
    put(root / "ppo", "environment.json", {"python": "3.11.9"})
    put(
        root / "gatt_baseline", "summary.json", {"trained": persistence(0.97, 0.1) | {"unseen": persistence(0.9, 0.05)}}
    )
    put(
        root / "gatt_trained",
        "summary.json",
        {"trained": persistence(0.99, 0.985) | {"unseen": persistence(0.9, 0.92)}},
    )
    messages = [{"role": "system", "content": "Always act as Ada."}]
    messages += [
        {"role": role, "content": f"turn {t} {ATTACK}"} for t in range(1, 21) for role in ("user", "assistant")
    ]
    put(root / "gatt_trained", "samples.jsonl", [{"policy": "trained", "messages": messages}])


class Finished:
    """One full report, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = io.StringIO()
        self.summary = demo_report.write(root, 300.0, Console(file=self.out, highlight=False))
        self.page = (root / "report.html").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("runs") / "demo"
    fabricate(root)
    return Finished(root)


def test_summary_holds_the_figures_of_the_stages(finished: Finished):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    summary = json.loads((finished.root / "summary.json").read_text(), parse_constant=refuse)
    assert summary == finished.summary
    assert summary["wall_seconds"] == 300.0
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "rejection_sampling", "ppo", "gatt"]
    assert [stage["seconds"] for stage in summary["stages"]] == [None, 40.0, 42.5, 90.0, 8.0]  # 30 + 12.5
    base, ppo = summary["stages"][0], summary["stages"][3]
    assert base["kl_nats"] is None
    assert base["ci95"]["kl_nats"] == [None, None]
    assert ppo["gold_helpfulness"] == pytest.approx(0.6333)
    assert ppo["unsafe_rate"] == 0.1
    assert ppo["kl_nats"] == 2.5
    assert ppo["ci95"]["gold_helpfulness"] == pytest.approx([0.6233, 0.6433])


def test_reward_models_have_the_strongest_rating_first(finished: Finished):
    model = finished.summary["reward_models"]["safety"]
    assert (model["accuracy"], model["ceiling"]) == (0.72, 0.8)
    assert [row["rating"] for row in model["by_rating"]] == list(RATINGS)
    assert model["by_rating"][2] == {
        "rating": "slightly_better",
        "accuracy": 0.7,
        "n": 100,
        "ceiling": pytest.approx(0.73),
        "ci95": None,
    }


def trained_on(root: Path, folder: str, shares: dict[str, tuple[float, float, float]]) -> None:
    cells = {name: {"accuracy": a, "ci95": [low, high], "count": 100} for name, (a, low, high) in shares.items()}
    mean = sum(a for a, _, _ in shares.values()) / len(shares)
    figures = {"accuracy": mean, "ci95": [mean - 0.07, mean + 0.07], "test_pairs": 100 * len(shares), "ceiling": 0.8}
    put(root / folder, "summary.json", {**figures, "by_source": cells})


def test_a_judge_that_may_only_be_guessing_is_told_on_console_and_page(tmp_path: Path):
    trained_on(tmp_path, "reward_safety", {"red<b>": (0.68, 0.58, 0.76), "help": (0.42, 0.33, 0.51)})
    trained_on(tmp_path, "judge_safety", {"red<b>": (0.5, 0.4, 0.6), "help": (0.52, 0.42, 0.62)})
    trained_on(tmp_path, "judge_helpfulness", {"help": (0.65, 0.56, 0.73)})
    out = io.StringIO()
    summary = report.write(tmp_path, 1.0, Console(file=out))
    page, told = (tmp_path / "report.html").read_text(), " ".join(out.getvalue().split())
    assert summary["reward_models"]["safety"]["warning"] == summary["judges"]["helpfulness"]["warning"] == ""
    assert summary["judges"]["safety"]["warning"].startswith("right in 0.510")
    doubt = (
        "Safety judge: right in 0.510 (0.440 to 0.580) of 200 held-out pairs: on no source surely better than chance"
    )
    for text in (told, page):
        assert text.count(doubt) == text.count("surely better than chance") == 1
    row = '<td>Safety model</td><td>red&lt;b&gt;</td><td class="number">68%<small>58%–76%</small></td>'
    assert row + '<td class="number">100</td><td class="number">–</td>' in page  # the best possible is of all pairs
    row = '<td>Safety model</td><td>all</td><td class="number">55%<small>48%–62%</small></td>'
    assert row + '<td class="number">200</td><td class="number">80%</td>' in page
    assert page.count("<td>Helpfulness judge</td>") == 1  # one source: it is all of them
    assert page.count("<td>Safety judge</td>") == 3


def test_the_gates_are_told_on_console_and_page_in_the_order_of_the_recipe(finished: Finished):
    names = [(gate["name"], gate["passed"]) for gate in finished.summary["gates"]]
    assert names == [("ppo", True), ("gatt", False), ("by_hand", True)]
    told = " ".join(finished.out.getvalue().split())
    figures = "improvement +0.20 (+0.10 to +0.30), win rate at equal length 0.61 (0.50 to 0.70)"
    assert f"Held-out judge, gatt: FAILED, {figures}" in told
    assert f"Held-out judge, ppo: passed, {figures}" in told
    figures = "<td>+0.20 (+0.10 to +0.30)</td><td>0.61 (0.50 to 0.70)</td>"
    assert f'<td>PPO</td><td><span class="met">passed</span></td>{figures}<td></td>' in finished.page
    assert f'<td>GAtt</td><td><span class="missed">failed</span></td>{figures}<td><div>&lt;script' in finished.page


def test_held_out_families_are_told_on_console_and_page(finished: Finished):
    assert finished.summary["held_out_families"]["ppo"] == {
        "gold_helpfulness": 0.42, "gold_helpfulness_greedy": 0.52, "prompts": 100,
        "ci95": {"gold_helpfulness": [0.2, 0.5], "gold_helpfulness_greedy": None},
    }  # fmt: skip
    for text in (finished.page, " ".join(finished.out.getvalue().split())):
        assert "SFT 0.31, greedy 0.41" in text
        assert "0.42, greedy 0.52" in text


def test_safety_distillation_is_told_on_console_and_page(finished: Finished):
    assert finished.summary["distillation"] == {"prompts": 40, "kept": 25, "original": 0.76, "after": 0.99}
    for text in (finished.page, " ".join(finished.out.getvalue().split())):
        assert "of 40 risky prompts: 25 answers given under a safety preprompt were kept" in text
        assert "mean R_s 0.76, with them 0.99" in text


def test_ghost_attention_is_by_turn(finished: Finished):
    baseline, trained = finished.summary["gatt"]["baseline"], finished.summary["gatt"]["trained"]
    assert (baseline["1"], baseline["2"], baseline["20"]) == (0.97, 0.1, 0.1)
    assert (trained["20"], trained["unseen"]["20"], trained["ci95"]["20"][0]) == (0.985, 0.92, pytest.approx(0.935))


def test_comparisons_are_paired_by_prompt(finished: Finished):
    # Every prompt gains the same, so each bootstrap mean is that gain and the interval has no width.
    found = {(c["before"], c["after"], c["decoding"]): c for c in finished.summary["comparisons"]}
    assert len(found) == 5
    for (before, after), gain in {
        ("sft", "rejection_sampling"): 0.1,
        ("rejection_sampling", "ppo"): 0.2,
        ("sft", "ppo"): 0.3,
        ("ppo", "gatt"): 0.0,
    }.items():
        row = found[before, after, "temperature 1"]
        assert row["difference"] == pytest.approx(gain)
        assert row["ci95"] == pytest.approx([gain, gain])
        assert row["prompts"] == 3  # the risky prompts have no gold helpfulness
    assert found["sft", "ppo", "greedy"]["difference"] == pytest.approx(0.05)


def test_stages_evaluated_on_other_prompts_are_not_compared(tmp_path: Path):
    evaluation(tmp_path, "sft")
    evaluation(tmp_path, "ppo")
    rows = [json.loads(line) for line in (tmp_path / "evaluate_ppo" / "responses.jsonl").read_text().splitlines()]
    put(tmp_path / "evaluate_ppo", "responses.jsonl", [rows[1], rows[0], *rows[2:]])
    assert build(tmp_path, 1.0)["comparisons"] == []


def test_every_goal_is_met_by_a_good_run(finished: Finished):
    value = {goal["goal"]: goal["value"] for goal in finished.summary["goals"]}
    assert [goal["goal"] for goal in finished.summary["goals"] if not goal["met"]] == []
    assert len(value) == 20
    assert value["Helpfulness model: part of possible accuracy"] == 0.9  # 0.72 / 0.8
    assert value["Safety model: accuracy, weak to strong rating"] == [0.55, 0.7, 0.85, 0.95]
    assert value["Unsafe answers, PPO as a part of SFT's"] == 0.25  # 0.1 / 0.4
    assert value["Helpfulness: PPO's best moment less its end"] == pytest.approx(0.01)  # 0.62 - 0.61
    assert value["GAtt: obeyed in the worst of 20 turns, after"] == 0.985


def stage(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in summary["stages"] if row["name"] == name)


Change = Callable[[dict[str, Any], dict[str, Any]], Any]
MISSES: dict[str, Change] = {
    "Seconds for the whole run": lambda s, _: s.update(wall_seconds=601),
    "Helpfulness model: part of possible accuracy": lambda s, _: s["reward_models"]["helpfulness"].update(
        accuracy=0.7199
    ),
    "Safety model: accuracy, weak to strong rating": lambda s, _: s["reward_models"]["safety"]["by_rating"][0].update(
        accuracy=0.84
    ),
    "Helpfulness: rejection sampling over SFT": lambda s, _: s["comparisons"][0].update(ci95=[-0.001, 0.2]),
    "Helpfulness: PPO over rejection sampling": lambda s, _: s["comparisons"][1].update(ci95=[0.0, 0.2]),
    "Helpfulness: PPO over SFT": lambda s, _: s["comparisons"][2].update(difference=0.099),
    "Helpfulness: PPO over SFT, greedy": lambda s, _: s["comparisons"][4].update(ci95=[-0.01, 0.05]),
    "Helpfulness: PPO's best moment less its end": lambda _, ppo: ppo.update(kept=0.5999),
    "Unsafe answers, PPO as a part of SFT's": lambda s, _: stage(s, "ppo").update(unsafe_rate=0.1001),
    "Harmless requests refused, PPO": lambda s, _: stage(s, "ppo").update(false_refusal_rate=0.051),
    "Drift from SFT (KL, nats an answer), PPO": lambda s, _: stage(s, "ppo").update(kl_nats=8.1),
    "GAtt: obeyed in turns 6 to 20, before": lambda s, _: s["gatt"]["baseline"].update(
        {str(t): 0.31 for t in range(6, 21)}
    ),
    # the mean of turns 1 to 20 stays over its own limit: (0.99 + 18 x 0.985 + 0.949) / 20 = 0.9835
    "GAtt: obeyed in the worst of 20 turns, after": lambda s, _: s["gatt"]["trained"].update({"9": 0.949}),
    "GAtt: turns 1 to 20, values never taught": lambda s, _: s["gatt"]["trained"]["unseen"].update({"6": 0.0}),
    "GAtt: dialogues measured": lambda s, _: s["gatt"]["trained"].update(dialogues=199),
    "Helpfulness: GAtt inside PPO's interval": lambda s, _: stage(s, "gatt").update(gold_helpfulness=0.62),
}


@pytest.mark.parametrize("goal", MISSES)
def test_a_miss_shows_in_its_goal_alone(finished: Finished, goal: str):
    summary, ppo_gold = copy.deepcopy(finished.summary), ppo_gold_during_run(finished.root)
    assert ppo_gold is not None
    MISSES[goal](summary, ppo_gold)
    assert [row["goal"] for row in goals(summary, ppo_gold) if not row["met"]] == [goal]


def test_goals_that_share_a_figure(finished: Finished):
    summary, ppo_gold = copy.deepcopy(finished.summary), ppo_gold_during_run(finished.root)
    stage(summary, "sft")["unsafe_rate"] = 0.61
    summary["gatt"]["trained"] |= {"7": 0.85, "8": 0.85}  # (0.99 + 17 x 0.985 + 2 x 0.85) / 20 = 0.972
    assert [row["goal"] for row in goals(summary, ppo_gold) if not row["met"]] == [
        "Unsafe answers to risky requests, SFT",
        "GAtt: obeyed in turns 1 to 20, after",
        "GAtt: obeyed in the worst of 20 turns, after",
    ]
    del summary["gatt"]["trained"]["20"]  # a turn that no dialogue reached: neither mean nor worst turn is known
    assert [row["goal"] for row in goals(summary, ppo_gold) if row.get("note") == "not measured"] == [
        "GAtt: obeyed in turns 1 to 20, after",
        "GAtt: obeyed in the worst of 20 turns, after",
    ]


def test_gold_of_the_policy_that_ppo_kept(tmp_path: Path):
    fabricate(tmp_path)
    assert ppo_gold_during_run(tmp_path) == {"steps": [0, 5, 10], "gold": [0.5, 0.62, 0.61], "kept": 0.61}
    put(tmp_path / "ppo", "settings.yaml", {"save_best": True})
    put(tmp_path / "ppo", "summary.json", {"best": {"step": 0}})
    assert ppo_gold_during_run(tmp_path)["kept"] == 0.5  # type: ignore[index]


def test_time_is_that_of_all_starts_of_the_pipeline(tmp_path: Path):
    # 70-80 lies inside 40-100, which 85-110 overlaps: 70 s; 250-300: 50 s; together 120 s
    for name, end, seconds in (("a", 100, 60.0), ("b", 80, 10.0), ("c", 110, 25.0), ("d", 300, 50.0)):
        put(tmp_path / name, "seconds.json", {"seconds": seconds})
        os.utime(tmp_path / name / "seconds.json", (end, end))
    assert active_seconds(tmp_path) == pytest.approx(120.0)
    assert build(tmp_path, 2.0)["wall_seconds"] == 120.0  # a second start that ran nothing
    assert build(tmp_path, 130.0)["wall_seconds"] == 130.0
    assert active_seconds(tmp_path / "absent") == 0.0


class Reader(HTMLParser):
    """Collects ids and scripts and checks that tags close in order."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs)
        for name, value in attrs:
            assert name not in ("src", "srcset", "action", "data"), (tag, name)
            assert name not in ("href", "xlink:href") or (value or "").startswith("#"), value
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(finished: Finished):
    reader = Reader()
    reader.feed(finished.page)
    assert reader.open == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "foreignobject"}
    assert len(reader.ids) == len(set(reader.ids))
    assert "@import" not in finished.page
    assert all(found.startswith("#") for found in re.findall(r"url\((.*?)\)", finished.page))
    outside = re.findall(r"https?://\S+", finished.page.replace("https://evil.example", ""))
    assert outside == []
    assert finished.page.count("<svg") == 6  # accuracy, calibration, scores, best of K, PPO, Ghost Attention
    assert "currentColor" in finished.page
    assert "#010203" not in finished.page


def test_alarms_of_ppo_are_listed(finished: Finished, tmp_path: Path):
    assert "Alarms" not in finished.page
    assert ", iteration" not in finished.out.getvalue()
    rows = [
        {"step": 3, "alarm": "kl_high", "event": "raised", "text": f"far {ATTACK}"},
        {"step": 7, "alarm": "kl_high", "event": "cleared", "text": "back"},
        {"step": 9, "alarm": "length", "event": "raised", "text": "Responses grew"},
    ]
    put(tmp_path / "ppo", "alarms.jsonl", rows)
    alarmed = Finished(tmp_path)
    assert "<li>PPO, iteration 3, kl_high (until 7): far &lt;script" in alarmed.page
    assert "<li>PPO, iteration 9, length: Responses grew</li>" in alarmed.page
    assert "<script" not in alarmed.page
    assert "PPO, iteration 9, length: Responses grew" in alarmed.out.getvalue()
    assert [(row["stage"], row["step"], row["cleared"]) for row in alarmed.summary["alarms"]] == [
        ("ppo", 3, 7), ("ppo", 9, None)
    ]  # fmt: skip


def test_alarms_of_a_second_ppo_name_their_stage(tmp_path: Path):
    for folder, step in (("ppo", 4), ("ppo_v2", 2)):
        put(tmp_path / folder, "alarms.jsonl", [{"step": step, "alarm": "length", "event": "raised", "text": "Grew"}])
    alarmed = Finished(tmp_path)
    for text in (alarmed.page, alarmed.out.getvalue()):
        assert "PPO, iteration 4, length: Grew" in text
        assert "ppo_v2, iteration 2, length: Grew" in text


def test_what_models_write_is_escaped(finished: Finished):
    assert "<script" not in finished.page.lower()
    assert finished.page.count("&lt;script src=&quot;https://evil.example/x.js&quot;&gt;") >= 5 * 3  # stages x samples
    ppo_settings = finished.page[finished.page.index("<summary>ppo</summary>") :]
    assert "safety_threshold: 0.15" in ppo_settings
    assert "&lt;script" in ppo_settings


def test_console_is_readable_at_100_columns(finished: Finished):
    text = finished.out.getvalue()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(len(line) for line in lines if not line.startswith("Written")) <= 100
    assert "Goals: 20 of 20 met" in text
    assert "\x1b" not in text
    assert "[red]says[/red]" in text  # shown as written, not taken for a colour
    row = next(i for i, line in enumerate(lines) if line.strip().startswith("PPO"))
    assert lines[row].split()[:5] == ["PPO", "0.63", "0.55", "10%", "2%"]
    assert lines[row + 1].split()[:3] == ["0.62–0.64", "0.54–0.56", "9%–11%"]
    # the same three prompts, every stage's answer under each
    for title in report.KINDS.values():
        part = text[text.index(title) :].split("\n\n\n")[0]
        assert all(f"{name} [red]" in part for name in GAINS), title
    assert "Always act as Ada." in text
    assert "turn 20" in text
    assert "turn 9 " not in text


def test_a_run_without_ppo_and_ghost_attention(tmp_path: Path):
    fabricate(tmp_path)
    for folder in tmp_path.glob("*"):
        if "gatt" in folder.name or "ppo" in folder.name or folder.name in ("rejection_sampling", "reward_safety"):
            shutil.rmtree(folder)
    out = io.StringIO()
    summary = demo_report.write(tmp_path, 1.0, Console(file=out))
    page = (tmp_path / "report.html").read_text()
    assert [row["name"] for row in summary["stages"]] == ["base", "sft", "rejection_sampling"]
    assert summary["gatt"] == {"baseline": None, "trained": None}
    assert summary["reward_models"]["safety"] is None
    assert [(c["before"], c["after"]) for c in summary["comparisons"]] == [("sft", "rejection_sampling")]
    for sentence in ("no PPO in this run", "no rejection sampling in this run", "Ghost Attention was not measured"):
        assert sentence in page
    missed = {goal["goal"]: goal.get("note") for goal in summary["goals"] if not goal["met"]}
    assert missed["GAtt: dialogues measured"] == missed["Helpfulness: PPO over SFT"] == "not measured"
    assert "MISSED" in out.getvalue()
    assert "not measured" in out.getvalue()


def test_an_empty_run_is_reported_as_such(tmp_path: Path):
    put(tmp_path / "evaluate_sft", "responses.jsonl", [])
    (tmp_path / "evaluate_base").mkdir()
    (tmp_path / "evaluate_base" / "summary.json").write_text('{"cut sho')
    out = io.StringIO()
    summary = report.write(tmp_path, 1.0, Console(file=out))
    assert summary["stages"] == []
    assert read_json(tmp_path / "evaluate_base") is None
    assert "No stage was evaluated" in out.getvalue()
    assert "No stage was evaluated in this run." in (tmp_path / "report.html").read_text()


def test_a_run_without_true_scores_has_no_goals_and_shows_what_was_measured(tmp_path: Path):
    fabricate(tmp_path)
    for path in tmp_path.glob("evaluate_*/*"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        known = [{k: v for k, v in row.items() if not k.startswith(("gold", "unsafe", "false_"))} for row in rows]
        put(path.parent, path.name, known if path.name.endswith("l") else known[0])
    log = [{"step": s, "reward/combined": 0.1 * s, "eval/judge_combined": 0.2} for s in (1, 2)]
    put(tmp_path / "ppo", "metrics.jsonl", log)
    out = io.StringIO()
    summary = report.write(tmp_path, 1.0, Console(file=out, highlight=False))
    page, text = (tmp_path / "report.html").read_text(), out.getvalue()
    assert summary["goals"] == json.loads((tmp_path / "summary.json").read_text())["goals"] == []
    assert summary["comparisons"] == []
    for shown in (page, text):
        assert "Goals" not in shown
        assert "goals met" not in shown
    head = next(line for line in text.splitlines() if line.strip().startswith("Stage"))
    assert "Unsafe" not in head
    assert "Refused" not in head
    row = next(line for line in text.splitlines() if line.strip().startswith("PPO "))
    assert row.split() == ["PPO", "1.30", "0.50", "2.50", "20", "90"]  # both rewards, drift, length, seconds
    assert "true scores" not in text
    assert "<th>Unsafe</th>" not in page
    answers = page[page.index("<h2>Sample dialogues") :]
    assert '<th class="number">Helpfulness reward</th>' in answers
    for shown in (answers, text):
        assert "True score" not in shown
    assert "Held-out judge (raw)" in page  # a panel of PPO's plot
    assert "Held-out judge, ppo: passed" in text


def test_a_report_that_there_is_not_is_refused_before_the_first_stage():
    with pytest.raises(
        UserError, match=r"report is 'plan'; there are: report, simulation\.report, distil_ablation, or ''"
    ):
        PipelineSettings(report="plan")
