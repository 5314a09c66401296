"""Exploring best-of-n: figures worked out by hand, intervals that cover, a recommendation that follows its rule."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import exploration_report
from rlhf.exploration import (
    Explored,
    analyse,
    doublings,
    estimate,
    explore,
    one,
    over_optimisation,
    recommend,
    resample,
)


def arrays(combined: list[list[float]], temperature: float = 1.0, **extra) -> dict[str, np.ndarray]:
    """What scores.npz would hold of these scores."""
    scores = np.array(combined)
    found = {
        "combined": scores,
        "finished": np.ones(scores.shape, bool),
        "usable": np.ones(scores.shape, bool),
        "tokens": np.full(scores.shape, 10),
        "duplicate_of": np.full(scores.shape, -1),
        "is_safety": np.zeros(len(scores), bool),
        "seconds": np.ones(len(scores)),
        "temperature": np.array([temperature]),
    }
    return found | {name: np.array(value) for name, value in extra.items()}


def test_curves_and_costs_of_one_run_by_hand():
    run = explore(
        arrays(
            [[0.0, 4.0, 2.0], [math.log(3), 0.0, -math.log(3)]],
            is_safety=[False, True],
            gold_helpfulness=[[0.9, 0.1, 0.5], [9.0, 9.0, 9.0]],
            gold_safety=[[9.0, 9.0, 9.0], [0.0, 1.0, 0.5]],
            usable=[[True, True, True], [False, True, True]],
            finished=[[True, True, True], [True, True, False]],
            duplicate_of=[[-1, -1, -1], [-1, 0, 0]],
            seconds=[3.0, 6.0],
        ),
        keep_unfinished=False,
    )
    # Prompt 0: mean 2; pairs (0 4) (0 2) (4 2) have maxima 4, 2, 4 and medians 2, 1, 3.
    np.testing.assert_allclose(run.best["combined"][0], [2, 10 / 3, 4])
    np.testing.assert_allclose(run.median["combined"][0], [2, 2, 2])
    # Prompt 1 may keep only its second response (r = 0, R = 1/2, gold safety 1): two of its pairs hold it, and in the
    # third the higher one, the first (r = log 3, R = 3/4, gold 0), stands in.
    np.testing.assert_allclose(run.best["combined"][1], [0, math.log(3) / 3, 0], atol=1e-12)
    np.testing.assert_allclose(run.best["R"][1], [1 / 2, (1 / 2 + 1 / 2 + 3 / 4) / 3, 1 / 2])
    np.testing.assert_allclose(run.best["gold"][1], [0.5, 2 / 3, 1])
    np.testing.assert_allclose(run.best["gold"][0], [0.5, (0.1 + 0.5 + 0.1) / 3, 0.1])  # its own gold is helpfulness
    np.testing.assert_allclose(run.median["R"][1], [1 / 2] * 3)
    assert run.spread == pytest.approx((2 + math.log(3)) / 2)  # sd of 0 2 4, and of -a 0 a
    assert run.samples == pytest.approx({
        "tokens_per_response": 10, "seconds_per_response": 1.5, "finished": 5 / 6, "usable": 5 / 6, "distinct": 4 / 6,
        "prompts_with_none_to_keep": 0.0})  # fmt: skip
    kept = explore(arrays([[1.0, 2.0]], finished=[[True, False]]), keep_unfinished=True)
    assert kept.best["combined"][0].tolist() == [1.5, 2.0]
    none = explore(arrays([[1.0, 2.0]], finished=[[False, False]]), keep_unfinished=False)
    assert none.samples["prompts_with_none_to_keep"] == 1.0


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        run = explore(arrays([[-2000.0, 2000.0]]), False)
    np.testing.assert_allclose(run.best["R"], [[0.5, 1.0]])


@given(st.lists(st.lists(st.integers(-4, 4).map(float), min_size=4, max_size=4), min_size=2, max_size=6))
def test_curves_rise_from_the_mean_to_the_maximum(scores):
    run = explore(arrays(scores), False)
    for name in ("combined", "R"):
        assert (np.diff(run.best[name], axis=1) > -1e-9).all()
        assert (run.best[name] - run.median[name] > -1e-9).all()
    np.testing.assert_allclose(run.best["combined"][:, 0], np.mean(scores, axis=1), atol=1e-9)
    np.testing.assert_allclose(run.best["combined"][:, -1], np.max(scores, axis=1))


def test_interval_of_a_mean_is_that_of_theory():
    """400 values of deviation 1 give -+ 1.96 / 20; where only half count, -+ 1.96 / sqrt(200)."""
    values = np.tile([-1.0, 1.0], 200)[:, None]
    weights = resample(400, seed=1)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    found = one(estimate(values, weights))
    assert found["mean"] == 0.0
    assert found["high"] == pytest.approx(1.96 / 20, rel=0.08)
    assert found["low"] == pytest.approx(-1.96 / 20, rel=0.08)
    half = one(estimate(values + 5, weights, np.arange(400) < 200))
    assert half["mean"] == 5.0
    assert half["high"] - 5 == pytest.approx(1.96 / math.sqrt(200), rel=0.08)


def test_the_intervals_cover_the_truth_as_often_as_they_say():
    """Scores are prompt + noise, both standard normal: the expected maximum of 2 is 1 / sqrt(pi), of 3 it is 1.5 times
    that; the median is 0. A 95 % interval misses in 5 % of 300 worlds, give or take 2.5 (two standard errors)."""
    generator = np.random.default_rng(0)
    truth = {"best": {2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi)}, "median": {1: 0.0, 4: 0.0}}
    weights = resample(60, seed=0)[:800]
    hits = {(kind, n): 0 for kind, by_n in truth.items() for n in by_n}
    for _ in range(300):
        run = explore(arrays(generator.normal(size=(60, 1)) + generator.normal(size=(60, 6))), False)
        for kind, curves in (("best", run.best), ("median", run.median)):
            found = estimate(curves["combined"], weights)
            for n, value in truth[kind].items():
                hits[kind, n] += found["low"][n - 1] <= value <= found["high"][n - 1]
    for hit in hits.values():
        assert 0.915 <= hit / 300 <= 0.98


def test_doublings():
    assert [doublings(n) for n in (1, 2, 7, 8, 100)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8, 16, 32, 64]]


def fixed(temperature: float, curve: list[float], spread: float = 1.0, prompts: int = 50) -> Explored:
    """A run whose curve is the same at every prompt: intervals of no width."""
    return Explored(temperature, {"combined": np.tile(curve, (prompts, 1))}, {}, spread, {})


def test_recommendation_by_hand():
    """Best at n = 1 2 4 8: 0 (cold), 1 (cold), 1.6 (hot), 1.7 (hot); doublings gain 1, 0.6 and 0.1."""
    cold = fixed(0.6, [0.0, 1.0, 1.1, 1.2, 1.2, 1.2, 1.2, 1.3])
    hot = fixed(1.2, [-1.0, 0.5, 1.0, 1.6, 1.6, 1.6, 1.6, 1.7], spread=3.0)
    weights = resample(50, seed=0)
    found = recommend([cold, hot], weights, affordable=8, min_gain=0.1)  # of a mean spread of 2: 0.2
    assert (found["k"], found["temperature"], found["highest"], found["enough"]) == (4, 1.2, 1.2, True)
    assert found["threshold"] == pytest.approx(0.2)
    assert [step["gain"]["mean"] for step in found["doublings"]] == pytest.approx([1.0, 0.6, 0.1])
    assert found["best_temperature_by_k"] == {"1": 0.6, "2": 0.6, "4": 1.2, "8": 1.2}
    assert found["behind_the_best"]["0.6"]["mean"] == pytest.approx(0.4)  # 1.6 - 1.2
    assert (found["as_good"], found["clear_winner"]) == ([], True)
    small = recommend([cold, hot], weights, affordable=3, min_gain=0.1)
    assert (small["k"], small["temperature"], small["enough"]) == (2, 0.6, False)
    assert recommend([cold, hot], weights, affordable=8, min_gain=0.01)["k"] == 8
    assert recommend([cold], weights, affordable=8, min_gain=0.6)["clear_winner"] is False  # nothing to compare with


def test_a_first_doubling_that_gains_little_does_not_end_the_search():
    rare = fixed(1.0, [0.0, 0.01, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert recommend([rare], resample(50, seed=0), affordable=8, min_gain=0.1)["k"] == 8


def test_no_clear_winner_where_the_paired_interval_reaches_zero():
    generator = np.random.default_rng(0)
    prompt = 10 * generator.normal(size=(200, 1))  # far apart: unpaired intervals would always overlap
    base = explore(arrays(prompt + generator.normal(size=(200, 4)), 0.8), False)
    close = explore(arrays(prompt + generator.normal(size=(200, 4)), 1.0), False)
    worse = explore(arrays(prompt + generator.normal(size=(200, 4)) - 1, 1.2), False)
    found = recommend([base, close, worse], resample(200, seed=0), affordable=4, min_gain=0.2)
    assert len(found["as_good"]) == 1
    assert {found["highest"], float(found["as_good"][0])} == {0.8, 1.0}
    assert found["temperature"] == 0.8
    assert not found["clear_winner"]
    assert found["behind_the_best"]["1.2"]["low"] > 0
    assert recommend([base, worse], resample(200, seed=0), affordable=4, min_gain=0.0)["clear_winner"]


def test_a_lower_temperature_is_recommended_only_where_it_is_as_good_and_not_far_behind():
    """At K = 1, 30 prompts: behind the hot run by 0.05 or 0.5, give or take 2 a prompt or for sure; threshold 0.1."""
    swing = np.tile([-1.0, 1.0], 15)[:, None]
    weights = resample(30, seed=0)
    for shift, scale, temperature, as_good in (
        (-0.05, 2.0, 0.6, ["0.6"]),  # as good: the lower one
        (-0.5, 2.0, 1.2, ["0.6"]),  # cannot be told apart, but too far behind to be called as good
        (-0.5, 0.0, 1.2, []),
        (-0.05, 0.0, 1.2, []),  # surely behind, if little
    ):
        cold = Explored(0.6, {"combined": shift + scale * swing}, {}, 1.0, {})
        found = recommend([cold, fixed(1.2, [0.0], prompts=30)], weights, affordable=1, min_gain=0.1)
        assert (found["temperature"], found["as_good"]) == (temperature, as_good)


def test_over_optimisation_by_hand():
    rises = np.tile([0.0, 0.5, 0.8, 0.9], (40, 1))
    weights = resample(40, seed=0)
    found = over_optimisation(rises, weights)
    assert (found["n"], found["loss_to_all"]["mean"], found["over_optimised"]) == (4, 0.0, False)
    falls = np.tile([0.0, 0.5, 0.8, 0.6], (40, 1))
    found = over_optimisation(falls, weights)
    assert (found["n"], found["over_optimised"]) == (3, True)
    assert found["loss_to_all"]["mean"] == pytest.approx(0.2)
    assert found["gold"]["mean"] == pytest.approx(0.8)


def test_chance_alone_is_rarely_called_over_optimisation():
    """Flat true scores: the highest of 30 noisy means lies above the last one nearly always, and means nothing."""
    generator = np.random.default_rng(0)
    weights = resample(40, seed=0)[:400]
    worlds = [over_optimisation(generator.normal(size=(40, 30)), weights) for _ in range(200)]
    assert np.mean([world["n"] < 30 for world in worlds]) > 0.9
    assert np.mean([world["over_optimised"] for world in worlds]) < 0.08  # 2.5 % expected


def two_temperatures() -> tuple[dict, list[dict]]:
    generator = np.random.default_rng(0)
    risky = np.arange(40) % 4 == 0
    runs = []
    for temperature, shift in ((0.8, 0.0), (1.2, -3.0)):
        gold = generator.random((40, 16))
        extra = {"gold_helpfulness": gold, "gold_safety": gold, "is_safety": risky}
        runs.append(explore(arrays(generator.normal(size=(40, 16)) + gold + shift, temperature, **extra), False))
    return analyse(runs, risky, affordable=16, min_gain=0.1, seed=0)


def test_the_figures_say_what_the_curves_say():
    figures, curves = two_temperatures()
    assert [run["temperature"] for run in curves] == [0.8, 1.2]
    run = figures["temperatures"]["0.8"]
    for n in (1, 2, 4, 8, 16):
        assert run["best"]["combined"][str(n)] == one(curves[0]["best"]["combined"], n)
        assert run["median"]["R"][str(n)] == one(curves[0]["median"]["R"], n)
    assert figures["kl_nats_bound"]["2"] == pytest.approx(math.log(2) - 0.5)
    # 30 of 40 prompts are not risky: the gold score is the mean of both, weighted so.
    means = {name: curves[0]["best"][name]["mean"] for name in ("gold", "gold_helpfulness", "gold_safety")}
    np.testing.assert_allclose(means["gold"], 0.75 * means["gold_helpfulness"] + 0.25 * means["gold_safety"])
    assert two_temperatures()[0] == figures, "the same seed gives the same intervals"


def test_report_and_plots():
    figures, curves = two_temperatures()
    words = " ".join(exploration_report.sentences(figures))
    advice = figures["recommendation"]
    assert f"K = {advice['k']} at temperature 0.8" in words
    assert "The next best temperature, 1.2, is behind by" in words
    peaks = {t: run["gold_peak"] for t, run in figures["temperatures"].items()}
    top = max(peaks, key=lambda t: peaks[t]["gold"]["mean"])
    assert f"at temperature {top} and n = {peaks[top]['n']}; as recommended: " in words
    made = exploration_report.tables(figures)
    assert [table.title for table in made] == [
        "Expected maximum reward", "What a response costs, and what it is", "True score (gold)"]  # fmt: skip
    best = figures["temperatures"]["1.2"]["best"]["combined"]["16"]
    cells = dict(zip(made[0].columns, made[0].rows[1][1], strict=True))
    assert cells["best of 16"] == (f"{best['mean']:.2f}", f"({best['low']:.2f} to {best['high']:.2f})")
    reward = exploration_report.reward_figure(curves, 0.8)
    left, middle, right = reward.axes[:3]
    np.testing.assert_allclose(left.lines[0].get_ydata(), curves[0]["best"]["combined"]["mean"])
    np.testing.assert_allclose(left.lines[1].get_ydata(), curves[0]["median"]["combined"]["mean"])
    np.testing.assert_allclose(middle.lines[1].get_ydata(), curves[1]["best"]["combined"]["mean"])
    assert right.get_xlabel() == "temperature"
    cost = exploration_report.cost_figure(curves, figures).axes[0]
    np.testing.assert_allclose(cost.lines[0].get_xdata(), 10 * np.arange(1, 17))
    gold = exploration_report.gold_figure(curves)
    assert gold is not None
    np.testing.assert_allclose(gold.axes[1].lines[0].get_ydata(), curves[0]["best"]["gold"]["mean"])
    assert exploration_report.gold_figure([{"best": {"combined": curves[0]["best"]["combined"]}}]) is None


def test_every_outcome_has_its_words():
    figures, _ = two_temperatures()
    advice = figures["recommendation"]
    tie = {**advice, "as_good": ["1.2"], "clear_winner": False}
    assert "No clear winner among the temperatures" in " ".join(
        exploration_report.sentences({**figures, "recommendation": tie})
    )
    open_end = {**advice, "k": 16, "enough": False}
    assert "a larger one may be worth its cost" in " ".join(
        exploration_report.sentences({**figures, "recommendation": open_end})
    )
    assert exploration_report.shown_sizes(64) == [1, 4, 16, 64]
    assert exploration_report.shown_sizes(100) == [1, 4, 16, 64, 100]
