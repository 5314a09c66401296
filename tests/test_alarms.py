"""Alarms of PPO: each one by hand, silence on a healthy run, once until cleared, the same after a resumption."""

import json

import pytest

from rlhf.alarms import WINDOW, Alarm, Limits, check, spells

HEALTHY = {"response/tokens": 40.0, "response/stopped": 0.9, "response/repetition": 0.02, "policy/entropy": 1.2,
           "policy/kl": 2.0, "prompts/ordinary_unsafe": 0.3, "value/explained_variance": 0.6,
           "policy/first_ratio_error": 1e-6, "optim/skipped_steps": 0.0}  # fmt: skip


def events(rows, limits=None):
    """Alarms of rows of (step, figures), as (step, name, cleared)."""
    memory, found = {}, []
    for step, figures in rows:
        memory, alarms = check(memory, step, figures, limits or Limits())
        found += [(alarm.step, alarm.name, alarm.cleared) for alarm in alarms]
    return found


def series(figure, values, first=1):
    return [(first + i, HEALTHY | {figure: value}) for i, value in enumerate(values)]


def test_a_healthy_run_is_silent():
    rows = []
    for step in range(1, 41):  # everything moves as in a good run: half the entropy, 12 nats, a quarter longer
        part = step / 40
        figures = {"response/tokens": 40 * (1 + part / 4) + (-1) ** step, "policy/entropy": 1.2 - 0.6 * part,
                   "policy/kl": 12 * part, "response/stopped": 0.9 - 0.05 * part + 0.05 * (-1) ** step,
                   "value/explained_variance": -2.0 if step == 1 else 0.9 * part}  # fmt: skip
        rows.append((step, HEALTHY | figures))
        if step % 5 == 0:
            rows[-1][1].update({"eval/combined": 3 * part, "eval/combined_std": 2.0, "eval/judge_combined": 1.5 * part})
    assert events(rows) == []


# The mean over the last five iterations passes the limit at the step named; the first value is the start.
@pytest.mark.parametrize(
    ("name", "figure", "values", "step"),
    [
        ("length", "response/tokens", [40, 40, 65, 65, 65, 65], 6),  # 60 = 1.5 * 40: 55 at step 5, then 60
        ("length", "response/tokens", [40, 40, 20, 20, 20, 20, 20], 6),  # 26.7 = 40 / 1.5: 28 at step 5, then 24
        ("cut_off", "response/stopped", [0.9, 0.9, 0.62, 0.62, 0.62], 5),  # 0.732 < 0.9 - 0.15; step 4: 0.76
        ("repetition", "response/repetition", [0.02, 0.02, 0.2, 0.2, 0.2], 5),  # 0.128 > 0.12; step 4: 0.11
        ("entropy", "policy/entropy", [1.2, 0.3, 0.3, 0.3, 0.3, 0.3], 6),  # 0.3 < 1.2 / 3; step 5: 0.48
        ("kl_high", "policy/kl", [1, 30, 58, 60], 4),  # 149 / 4 = 37.25 > 30; step 3: 89 / 3 = 29.7
        ("kl_negative", "policy/kl", [0, -1, -1], 3),  # -2/3 < -0.5; step 2: exactly -0.5
        ("safety_share", "prompts/ordinary_unsafe", [0.3, 0.56, 0.56, 0.56], 3),  # 0.473 > 0.45; step 2: 0.43
        ("safety_share", "prompts/ordinary_unsafe", [0.3, 0.1, 0.08, 0.0], 4),  # 0.12 < 0.15; step 3: 0.16
        ("value_model", "value/explained_variance", [-2.0, *[0.0] * 12], 11),  # judged once 10 have passed
        ("first_ratio", "policy/first_ratio_error", [1e-6, 2e-4], 2),
        ("sampler_gap", "sampler/logprob_gap", [9e-5, 2e-4], 2),
        ("skipped_steps", "optim/skipped_steps", [0, 1], 2),
    ],
)
def test_each_alarm_by_hand(name, figure, values, step):
    found = events(series(figure, [float(value) for value in values]))
    assert found[0][1:] == (name, False)
    assert found[0][0] == step
    assert len(found) == 1


def test_short_responses_may_change_by_a_few_tokens():
    assert events(series("response/tokens", [2.0] + [5.0] * 9)) == []  # 2.5 times as long, but three tokens


def test_limits_follow_the_settings():
    assert events(series("policy/kl", [9.0]), Limits(max_kl_nats=10.0)) == [(1, "kl_high", False)]  # 9 > 0.8 * 10
    assert events(series("policy/kl", [7.0]), Limits(max_kl_nats=10.0)) == []
    assert events(series("value/explained_variance", [0.0] * 13), Limits(prompt_baseline=True)) == []
    off = series("policy/first_ratio_error", [0.02, 0.05])
    assert events(off, Limits(bf16=True)) == [(2, "first_ratio", False)]
    off = series("sampler/logprob_gap", [0.05, 0.2])
    assert events(off, Limits(bf16=True)) == [(2, "sampler_gap", False)]


def judged(judge, proxy, figure="eval/judge_combined", **more):
    rows = zip(judge, proxy, strict=True)
    return [(10 * i, {figure: j, "eval/combined": p, "eval/combined_std": 1.6} | more) for i, (j, p) in enumerate(rows)]


def test_a_judge_that_falls_while_the_proxy_rises():
    """256 prompts, deviation 1.6: standard error 0.1, so a fall is more than 0.4 below the best."""
    assert events(judged([1.0, 2.0, 1.5, 1.5], [0, 1, 2, 3])) == [(30, "judge_falls", False)]  # the second time
    assert events(judged([1.0, 2.0, 1.7, 1.7, 1.7], [0, 1, 2, 3, 4])) == []  # within four standard errors
    assert events(judged([1.0, 2.0, 1.5, 1.8, 1.5, 1.8], [0, 1, 2, 3, 4, 5])) == []  # never twice running
    assert events(judged([1.0, 2.0, 1.5, 1.4], [0, 1, 0.5, 0.4])) == []  # both fall: no exploit
    assert events(judged([1.0, 2.0, 1.5, 1.5, 2.1], [0, 1, 2, 3, 4])) == [(30, "judge_falls", False),
                                                                         (40, "judge_falls", True)]  # fmt: skip


def test_gold_has_errors_of_its_own_and_without_any_nothing_is_judged():
    gold = judged([0.8, 0.5, 0.5], [0, 1, 2], "eval/gold_safety")
    assert events(gold) == []  # 0.3 is within four of the proxy's standard errors
    assert events(judged([0.8, 0.5, 0.5], [0, 1, 2], "eval/gold_safety", **{"eval/gold_safety_se": 0.05})) == [
        (20, "gold_safety_falls", False)
    ]
    unknown = [(step, {k: v for k, v in figures.items() if not k.endswith("_std")}) for step, figures in gold]
    assert events(unknown) == []


def test_with_bfloat16_a_wrong_ratio_is_not_the_samplers_fault():
    """Old log-probs are the trainer's there: recomputing them, which is on, would be no cure."""
    texts = [check({}, 1, HEALTHY | {"policy/first_ratio_error": 0.5}, Limits(bf16=bf16))[1][0].text for bf16 in (0, 1)]
    assert ["Set recompute_logprobs: true" in text for text in texts] == [True, False]


def test_the_words_name_the_figures_and_what_to_do():
    _, [alarm] = check({}, 0, HEALTHY | {"policy/kl": 31.25}, Limits())
    assert alarm.text.startswith("The policy is 31.2 nats a response from the reference, more than 30; no cap is set")
    assert "raise kl_coef" in alarm.text
    memory: dict = {}
    for step, figures in judged([1.0, 2.0, 1.5, 1.5], [0, 1, 2, 3]):
        memory, alarms = check(memory, step, figures, Limits())
    assert "fell from 2 at iteration 10 to 1.5" in alarms[0].text
    assert "rose from 1 to 3" in alarms[0].text


def test_once_until_it_clears():
    values = [1.0, *[60.0] * 6, *[1.0] * 6, *[60.0] * 4]
    found = events(series("policy/kl", values))
    # up: (1 + 60) / 2 = 30.5 at step 2; down: two of five are 60, 24.6, at step 10; up: three of five, 36.4, at step 16
    assert found == [(2, "kl_high", False), (10, "kl_high", True), (16, "kl_high", False)]


@pytest.mark.parametrize("at", range(1, 16))
def test_a_resumed_run_gives_the_same_alarms(at):
    rows = series("policy/kl", [1.0, *[60.0] * 6, *[1.0] * 6, *[60.0] * 4])
    rows[4][1]["policy/kl"] = float("nan")  # leaves the alarm as it is
    rows[6][1].update({"eval/judge_combined": 1.0, "eval/combined": 0.0, "eval/combined_std": 0.1})
    memory, whole = {}, []
    for step, figures in rows:
        if step == at:
            memory = json.loads(json.dumps(memory))
        before = json.dumps(memory)
        after, alarms = check(memory, step, figures, Limits())
        assert json.dumps(memory) == before  # pure
        memory, whole = after, whole + [(alarm.step, alarm.name, alarm.cleared) for alarm in alarms]
    assert whole == events(rows)
    assert len(whole) == 3


def test_memory_does_not_grow():
    memory: dict = {}
    sizes = []
    for step in range(1, 200):
        memory, _ = check(memory, step, HEALTHY, Limits())
        sizes.append(max(len(values) for values in memory["recent"].values()))
    assert max(sizes) == WINDOW


def test_spells():
    rows = [{"step": alarm.step, **alarm.row()} for alarm in (
        Alarm(2, "kl_high", "far"), Alarm(3, "length", "long"), Alarm(5, "kl_high", "back", cleared=True),
        Alarm(9, "kl_high", "again"))]  # fmt: skip
    assert spells(rows) == [
        {"alarm": "kl_high", "text": "far", "step": 2, "cleared": 5},
        {"alarm": "length", "text": "long", "step": 3, "cleared": None},
        {"alarm": "kl_high", "text": "again", "step": 9, "cleared": None},
    ]
