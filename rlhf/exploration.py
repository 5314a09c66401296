"""[pure] What best-of-n gives by n and temperature, from N samples a prompt: the paper's Figs 7, 8 (recipe sheet §4).

Letters: P prompts, N samples a prompt, D bootstrap draws. A run is the samples of one temperature: the arrays of
scores.npz (rlhf/score_files.py) and whether cut responses may be kept.

Every curve is, by prompt, the average over all subsets of n of the N samples (rlhf/selection.py), hence unbiased, and
then the mean over prompts. Its 95 % interval is the percentile bootstrap over prompts, which holds both what differs
between prompts and the chance of sampling. All runs share the prompts and each draw of them: differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.selection import best_of_n_kl, best_of_n_values, median_of_n_values

DRAWS = 2000
Json = dict[str, Any]


@dataclass(frozen=True)
class Explored:
    """One run, analysed: curves [P, N] and figures of its samples."""

    temperature: float
    best: dict[str, np.ndarray]  # value of the response that best-of-n picks, by score
    median: dict[str, np.ndarray]  # median of n responses, by reward
    spread: float  # standard deviation of the scores of one prompt, mean over prompts
    samples: Json  # shares and costs


def counted(name: str, is_safety_P: np.ndarray) -> np.ndarray:
    """bool[P]: the prompts over which a score is averaged. Gold helpfulness means nothing on risky ones, gold safety
    nothing on the others."""
    return {"gold_helpfulness": ~is_safety_P, "gold_safety": is_safety_P}.get(name, np.ones_like(is_safety_P))


def explore(arrays: Mapping[str, np.ndarray], keep_unfinished: bool) -> Explored:
    """The curves of one run. Scores: `combined` r, `R` = sigmoid(r) as in the paper's plots, and the gold scores where
    there are, with `gold`, the one that counts for the prompt. Picked is always by `combined`, among those usable."""
    combined_PN: np.ndarray = arrays["combined"].astype(np.float64)
    risky_P = arrays["is_safety"]
    eligible_PN = arrays["usable"] & (arrays["finished"] | keep_unfinished)
    rewards = {"combined": combined_PN, "R": 0.5 * (1 + np.tanh(combined_PN / 2))}  # sigmoid without overflow
    values = dict(rewards)
    if "gold_helpfulness" in arrays:
        gold = {name: arrays[name] for name in ("gold_helpfulness", "gold_safety")}
        values |= {"gold": np.where(risky_P[:, None], gold["gold_safety"], gold["gold_helpfulness"]), **gold}
    return Explored(
        temperature=float(arrays["temperature"][0]),
        best={name: best_of_n_values(combined_PN, value, eligible_PN) for name, value in values.items()},
        median={name: median_of_n_values(value) for name, value in rewards.items()},
        spread=float(combined_PN.std(axis=1, ddof=1).mean()),
        samples={
            "tokens_per_response": float(arrays["tokens"].mean()),
            "seconds_per_response": float(arrays["seconds"].mean() / combined_PN.shape[1]),
            "finished": float(arrays["finished"].mean()),
            "usable": float(arrays["usable"].mean()),
            "distinct": float((arrays["duplicate_of"] < 0).mean()),
            "prompts_with_none_to_keep": float((~eligible_PN.any(axis=1)).mean()),
        },
    )


def resample(prompts: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """float64[D, P]: how often each prompt is in each bootstrap draw of P prompts, divided by P."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts


def estimate(values_PN: np.ndarray, weights_DP: np.ndarray, on_P: np.ndarray | None = None) -> Json:
    """{"mean": [N], "low": [N], "high": [N]}: the mean over prompts (those of `on`) and its 95 % bootstrap interval."""
    if on_P is not None:
        values_PN, weights_DP = values_PN[on_P], weights_DP[:, on_P]
        total_D = weights_DP.sum(axis=1)
        weights_DP = weights_DP[total_D > 0] / total_D[total_D > 0, None]
    low, high = np.percentile(weights_DP @ values_PN, [2.5, 97.5], axis=0)
    return {"mean": values_PN.mean(axis=0), "low": low, "high": high}


def doublings(limit: int) -> list[int]:
    """1, 2, 4 ... up to `limit`."""
    return [2**i for i in range(limit.bit_length())]


def recommend(runs: Sequence[Explored], weights_DP: np.ndarray, affordable: int, min_gain: float) -> Json:
    """The K and the temperature to sample with, and how sure that is.

    1. For every K = 1, 2, 4 ... up to `affordable`: the temperature with the highest expected maximum reward.
    2. K is the smallest from which on no doubling (each K with its own best temperature) gains more than `min_gain`
       standard deviations of the scores of one prompt. From which on: where good responses are rare, the first
       doublings may gain less than later ones.
    3. At that K, others cannot be told from the best temperature where the paired interval of the difference reaches
       0; only without any such is there a clear winner. Recommended is the lowest of these whose mean is not further
       behind than the threshold of 2: it costs no measurable reward, its responses are nearer to what the policy says,
       and the reward models have seen more like them.
    """
    threshold = min_gain * float(np.mean([run.spread for run in runs]))
    sizes, steps = doublings(affordable), []
    winners = [max(range(len(runs)), key=lambda i: runs[i].best["combined"][:, k - 1].mean()) for k in sizes]
    chosen = 0
    for s in range(len(sizes) - 1):
        before = runs[winners[s]].best["combined"][:, sizes[s] - 1]
        after = runs[winners[s + 1]].best["combined"][:, sizes[s + 1] - 1]
        gain = one(estimate((after - before)[:, None], weights_DP))
        steps.append({"from": sizes[s], "to": sizes[s + 1], "gain": gain})
        if gain["mean"] > threshold:
            chosen = s + 1
    k, winner = sizes[chosen], winners[chosen]
    compared = {}
    for i, run in enumerate(runs):
        if i != winner:
            gap = runs[winner].best["combined"][:, k - 1] - run.best["combined"][:, k - 1]
            compared[f"{run.temperature:g}"] = one(estimate(gap[:, None], weights_DP))
    as_good = [name for name, gap in compared.items() if gap["low"] <= 0]
    near = [float(name) for name in as_good if compared[name]["mean"] <= threshold]
    return {
        "k": k,
        "temperature": min([runs[winner].temperature, *near]),
        "highest": runs[winner].temperature,
        "enough": chosen < len(sizes) - 1,  # False: the last doubling still gained more, a larger K may be worth it
        "threshold": threshold,
        "doublings": steps,
        "behind_the_best": compared,
        "as_good": as_good,
        "clear_winner": bool(compared) and not as_good,
        "best_temperature_by_k": {str(n): runs[i].temperature for n, i in zip(sizes, winners, strict=True)},
    }


def over_optimisation(gold_PN: np.ndarray, weights_DP: np.ndarray) -> Json:
    """Where the gold score of best-of-n peaks, and what it has lost from there to n = N.

    `n` is the highest point of the mean curve. `loss_to_all` is not read off there: the highest of many noisy means is
    too high by chance. Each half of the prompts (even and odd places) finds its own peak, and the other half says what
    lies between that peak and N. An interval above 0 is over-optimisation.
    """
    peak = int(gold_PN.mean(axis=0).argmax())
    even_P = np.arange(len(gold_PN)) % 2 == 0
    loss_P = np.zeros(len(gold_PN))
    for half_P in (even_P, ~even_P) if len(gold_PN) > 1 else ():
        found = int(gold_PN[~half_P].mean(axis=0).argmax())
        loss_P[half_P] = gold_PN[half_P, found] - gold_PN[half_P, -1]
    loss = one(estimate(loss_P[:, None], weights_DP))
    at = {name: float(values[peak]) for name, values in estimate(gold_PN, weights_DP).items()}
    return {"n": peak + 1, "gold": at, "loss_to_all": loss, "over_optimised": loss["low"] > 0}


def analyse(
    runs: Sequence[Explored], is_safety_P: np.ndarray, affordable: int, min_gain: float, seed: int
) -> tuple[Json, list[Json]]:
    """(figures for the summary, one dict of full curves a temperature), from runs over the same prompts.

    Curves: {"temperature", "best": {score: {"mean", "low", "high"}}, "median": the same}, each list for n = 1 .. N.
    """
    prompts, samples = runs[0].best["combined"].shape
    weights_DP = resample(prompts, seed)
    curves: list[Json] = []
    for run in runs:
        found: Json = {"temperature": run.temperature, "best": {}, "median": {}}
        for kind, by_score in (("best", run.best), ("median", run.median)):
            for name, values_PN in by_score.items():
                if (on_P := counted(name, is_safety_P)).any():
                    found[kind][name] = estimate(values_PN, weights_DP, on_P)
        curves.append(found)
    sizes = sorted({*doublings(samples), samples})
    figures: Json = {
        "prompts": prompts,
        "samples_per_prompt": samples,
        "kl_nats_bound": {str(n): best_of_n_kl(n) for n in sizes},
        "recommendation": recommend(runs, weights_DP, affordable, min_gain),
        "temperatures": {},
    }
    for run, found in zip(runs, curves, strict=True):
        at: Json = {
            kind: {name: {str(n): one(curve, n) for n in sizes} for name, curve in found[kind].items()}
            for kind in ("best", "median")
        }
        gold = {"gold_peak": over_optimisation(run.best["gold"], weights_DP)} if "gold" in run.best else {}
        figures["temperatures"][f"{run.temperature:g}"] = {**run.samples, "spread": run.spread, **at, **gold}
    return figures, curves


def one(curve: Mapping[str, np.ndarray], n: int = 1) -> dict[str, float]:
    """The estimate at one n of a curve, in plain numbers."""
    return {name: float(values[n - 1]) for name, values in curve.items()}
