"""What the PPO notebook reads and shows: half-written folders, points by hand, the same prompts over time, figures."""

import json

import pytest
import yaml

from configs.errors import UserError
from rlhf import inspect_ppo as inspect
from rlhf import ppo_views as views
from rlhf.notebook_parts import Picture

ATTACK = "<script>alert(1)</script>"


def sample(step, prompt, split="held_out", **fields):
    return {"step": step, "split": split, "prompt": [{"role": "user", "content": prompt}], "kl_nats": 0.5,
            "response": f"{prompt} at {step}", "reward_combined": 1.0, "reward_helpfulness": 1.0,
            "reward_mine": -2.0} | fields  # fmt: skip


def write_run(folder, summary=None, alarms=(), steps=6):
    """Evaluations at 0, 2, 4 and 6 with objectives 0, 1, 3, 2."""
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"total_iterations": 10, "kl_coef": 0.01}))
    rows = [{"step": 0, "eval/combined": 0.0, "eval/kl": 0.0, "eval/objective": 0.0, "eval/judge_combined": 0.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward/combined": 0.5 * step, "reward/mine": 1.0, "reward/mine_std": 0.1,
               "reward/safety_decides": 0.1, "policy/kl": 0.1 * step, "policy/entropy": 1.0, "policy/clip_fraction": 0,
               "value/explained_variance": -9.0 if step == 1 else 0.5, "response/tokens": 20.0, "time/sample": 2.0,
               "time/update": 5.0, "time/recompute": 0.001, "time/iteration": 8.0, "memory/peak_mib": 500.0 + step,
               "time/tokens_per_second": 1000.0}  # fmt: skip
        if step % 2 == 0:
            objective = {2: 1.0, 4: 3.0, 6: 2.0}[step]
            row |= {"eval/combined": 0.4 * step, "eval/kl": 0.1 * step, "eval/objective": objective,
                    "eval/judge_combined": 0.3 * step, "time/evaluation": 1.0}  # fmt: skip
        rows.append(row)
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "rew')
    samples = [sample(step, prompt) for step in (0, 2, 4, 6) for prompt in ("one", f"two {ATTACK}")]
    samples += [sample(step, "other", "training") for step in (5, 6)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if alarms:
        (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alarms))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


RAISED = [
    {"step": 2, "alarm": "kl_high", "event": "raised", "text": f"far {ATTACK}"},
    {"step": 3, "alarm": "length", "event": "raised", "text": "long"},
    {"step": 4, "alarm": "kl_high", "event": "cleared", "text": "back"},
]


@pytest.fixture
def run(tmp_path):
    return inspect.load_runs([write_run(tmp_path / "a" / "ppo", alarms=RAISED)])[0]


def test_a_run_that_is_still_written(run):
    assert [row["step"] for row in run.rows] == list(range(7))  # the line cut short is left out
    assert run.series("eval/kl") == ([0, 2, 4, 6], pytest.approx([0.0, 0.2, 0.4, 0.6]))
    assert run.best_step == 4
    # 4 iterations of 8 s are left: half a minute
    assert inspect.status(run) == (
        "ppo: 6 of 10 iterations, not finished, about 1 minutes to go; best held-out policy so far: iteration 4"
    )


def test_a_finished_run_has_the_best_of_its_summary(tmp_path):
    summary = {"best": {"step": 2}, "stopped_by": "max_kl_nats"}
    (run,) = inspect.load_runs([write_run(tmp_path / "ppo", summary)])
    assert run.best_step == 2
    assert inspect.status(run).startswith("ppo: finished after 6 of 10 iterations (max_kl_nats); best held-out policy")


def test_names_tell_runs_apart_and_mistakes_are_named(tmp_path):
    one, two = write_run(tmp_path / "a" / "ppo"), write_run(tmp_path / "b" / "ppo")
    assert [run.name for run in inspect.load_runs([str(one), f" {two} "])] == ["a/ppo", "b/ppo"]
    with pytest.raises(UserError, match="named twice"):
        inspect.load_runs([one, one])
    with pytest.raises(UserError, match="no run is named"):
        inspect.load_runs([""])
    with pytest.raises(UserError, match="no PPO run at"):
        inspect.load_runs([tmp_path / "none"])
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "settings.yaml").write_text("learning_rate: 1.0\n")
    with pytest.raises(UserError, match="another stage"):
        inspect.load_runs([tmp_path / "sft"])


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "ppo"
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump({"total_iterations": 10, "kl_coef": 0.01}))
    runs = inspect.load_runs([folder])
    assert inspect.status(runs[0]) == "ppo: 0 of 10 iterations, not finished"
    for figure in (views.curves("x", runs, views.reward_panels(runs)), views.frontiers(runs), views.time_split(runs)):
        assert figure is None
    for page in (views.alarm_table(runs), views.samples_over_time(runs), views.latest_samples(runs)):
        assert "<table>" not in page.text
    assert "No iteration" in views.time_table(runs).text


def test_points_by_hand(run, tmp_path):
    assert inspect.frontier(run) == [(0, 0.0, 0.0), (2, 0.2, 0.8), (4, 0.4, 1.6), (6, pytest.approx(0.6), pytest.approx(2.4))]  # fmt: skip  # noqa: E501
    assert [point.reward for point in inspect.frontier(run, "eval/judge_combined")] == pytest.approx([0, 0.6, 1.2, 1.8])
    assert inspect.frontier(run, "eval/gold_safety") == []
    (folder := tmp_path / "bare").mkdir()
    (folder / "settings.yaml").write_text("kl_coef: 0.1\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/combined": 2.0, "policy/kl": 0.5}\n')
    assert inspect.frontier(inspect.load_runs([folder])[0]) == [(1, 0.5, 2.0)]  # no evaluations: training iterations


def test_phases_by_hand(run):
    steps, seconds = inspect.phases(run)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert list(seconds) == ["sample", "update", "other", "evaluation"]  # a thousandth of a second is not shown
    assert seconds["other"] == pytest.approx([0.999] * 6)  # 8 - 2 - 5 - 0.001
    assert seconds["evaluation"] == [0.0, 1.0] * 3
    page = views.time_table([run]).text
    assert "sample 2.00 s (24%)" in page  # 12 of 6 * 8 + 3 = 51 seconds
    assert "506 MiB" in page
    assert "1,000" in page


def test_the_same_prompts_over_time(tmp_path):
    one, two = inspect.load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    prompts = inspect.held_out_prompts([one, two])
    assert [prompt[0]["content"] for prompt in prompts] == ["one", f"two {ATTACK}"]
    assert {step: row["response"] for step, row in inspect.answers(one, prompts[0]).items()} == {
        step: f"one at {step}" for step in (0, 2, 4, 6)
    }
    page = views.samples_over_time([one, two], prompts=2, steps=3).text
    assert page.count("<table>") == 2
    assert page.count("one at 6") == 2  # one cell a run
    assert "one at 2" not in page.replace("one at 24", "")  # of 0, 2, 4, 6 three are shown: 0, 4, 6
    assert "reward 1.00, KL 0.50" in page
    assert ATTACK not in page
    latest = views.latest_samples([one]).text
    assert "other at 6" in latest
    assert "other at 5" not in latest
    assert "mine&nbsp;-2.00" in latest
    other = inspect.PPORun("x", {}, [], [sample(0, "else")], [], None)
    assert inspect.held_out_prompts([one, other]) == []


def test_spread_keeps_the_ends():
    assert inspect.spread([4, 0, 2, 2], 4) == [0, 2, 4]
    assert inspect.spread(range(0, 101, 10), 3) == [0, 50, 100]


def test_figures_show_what_was_logged(run, tmp_path):
    figure = views.curves("Rewards", [run], views.reward_panels([run]))
    assert [axis.get_title("left") for axis in figure.axes] == ["Combined reward (raw)", "Reward model: mine (raw)"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3])
    assert list(figure.axes[0].lines[1].get_xdata()) == [0, 2, 4, 6]
    judges = views.curves("Judges", [run], views.judge_panels())
    assert [axis.get_title("left") for axis in judges.axes] == ["Held-out judge"]
    policy = views.curves("Policy", [run], views.POLICY).axes
    marks = [[line.get_xdata()[0] for line in axis.lines if line.get_color() == views.RED] for axis in policy]
    assert marks == [[2], [], [], []]  # kl_high was raised at 2
    assert policy[3].get_ylim()[0] == views.LOWEST_EXPLAINED
    frontier = views.frontiers([run]).axes
    assert [axis.get_title("left") for axis in frontier] == ["combined reward (held-out)", "held-out judge"]
    stars = [line for line in frontier[0].lines if line.get_marker() == "*"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(0.4, 1.6)]
    second = inspect.load_runs([write_run(tmp_path / "second")])[0]
    both = views.curves("Rewards", [run, second], views.reward_panels([run, second]))
    assert [line.get_label() for line in both.axes[0].lines] == [
        "ppo, training", "ppo, held-out", "second, training", "second, held-out"
    ]  # fmt: skip
    assert len(views.time_split([run, second]).axes) == 2
    assert Picture(both).png is not None


def test_alarms_that_last_come_first(run):
    page = views.alarm_table([run]).text
    assert page.index("lasts") < page.index("until 4")
    assert ATTACK not in page
    assert "far &lt;script&gt;" in page
