"""Alarms of a PPO run: plain warnings where its figures look like reward hacking or like a broken run [pure].

`check` takes the figures of one step (a line of metrics.jsonl) and what it remembered; it changes nothing in the run.
An alarm is raised once, and again only after it has cleared. What it remembers is JSON and lies in PPO's checkpoint, so
a resumed run raises the same alarms at the same steps.

Reward hacking shows as longer answers (Singhal et al. 2023, arXiv 2310.03716), repetition, low entropy and high KL
while the reward rises (Zheng et al. 2023, arXiv 2307.04964, section 5), and as a fall of what an independent judge
says (Gao et al. 2022, arXiv 2210.10760; paper 3.2.3 and recipe sheet 5 leave watching to people).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A figure of one iteration is a mean over its responses, 64 to 512 of them, so it jumps; figures are compared as means
# over the last WINDOW iterations with the first one, where the policy was pi_0.
WINDOW = 5
LENGTH_FACTOR = (
    1.5  # lengths spread by about 60 % of their mean: 64 responses move it by 8 %, so this is six times that
)
LENGTH_TOKENS = 4.0  # a mean of 2 tokens that becomes 3 is no drift
CUT_OFF_RISE = 0.15  # share of responses; chance moves the share among 64 by at most 0.06 (one standard deviation)
REPETITION_RISE = 0.10  # of repeated 4-grams: people repeat 0.5 %, greedy loops 44 % (Welleck et al. 2020, table 2)
ENTROPY_SHARE = 1 / 3  # of the start; runs that stay healthy lose less than half of it
SAFETY_CHANGE = 0.15  # share of ordinary prompts' rewards decided by safety; as for CUT_OFF_RISE
KL_NATS = 30.0  # a response, where max_kl_nats gives no cap: three times the 0 to 10 of trl's training FAQ
KL_CAP_SHARE = 0.8  # of max_kl_nats: a warning before the run stops
KL_NEGATIVE = -0.5  # KL is never negative; chance takes the mean of 64 estimates of a KL below 1 to -0.2 at most
VALUE_EXPLAINED = 0.05  # a value model that knows only the mean explains 0
VALUE_ITERATIONS = 10  # before them it has had no time to learn
RATIO_ERROR = 1e-4  # mean |ratio - 1| before any update; rounding in float32 gives 4e-7 (demo) to 9e-6 (SmolLM2-135M)
RATIO_ERROR_BF16 = 0.03  # there both are the trainer's: up to 0.003 between micro-batches of two shapes (SmolLM2-135M)
SAMPLER_GAP = 1e-4  # mean |log pi_old - log mu| a token where old log-probs are recomputed; rounding as above
SAMPLER_GAP_BF16 = 0.1  # up to 0.03 between sampling with a cache and one forward over all tokens (SmolLM2-135M)
# A held-out judge falls: so many standard errors below its best, so many evaluations in a row. A judge that stays where
# it is would raise it by chance in 2 % of runs of 20 evaluations if its noise were new each time (counted over 4,000
# simulated runs); prompts and seeds are the same each time, so it is rarer.
FALL_ERRORS = 4.0
FALL_EVALUATIONS = 2
PROXY = "eval/combined"
JUDGES = {
    "eval/judge_combined": "held-out judge",
    "eval/gold_helpfulness": "true helpfulness",
    "eval/gold_safety": "true safety",
}


@dataclass(frozen=True)
class Limits:
    """What alarms must know of the run's settings."""

    held_out: int = 256  # prompts of an evaluation
    bf16: bool = False  # weights or computations in bfloat16
    max_kl_nats: float | None = None
    prompt_baseline: bool = False  # scores are less their prompt's mean: a value model may know nothing beyond it


@dataclass(frozen=True)
class Alarm:
    """Something that became wrong, or right again, at a step."""

    step: int
    name: str
    text: str
    cleared: bool = False

    def row(self) -> dict[str, Any]:
        """A line of alarms.jsonl, but for its step."""
        return {"alarm": self.name, "event": "cleared" if self.cleared else "raised", "text": self.text}


@dataclass(frozen=True)
class _Rule:
    """An alarm on one figure: `judge(now, start, limits)` gives the warning, None where all is well."""

    name: str
    figure: str
    judge: Callable[[float, float, Limits], str | None]
    window: int = WINDOW
    after: int = 0  # values to be seen before it judges


def check(
    memory: Mapping[str, Any], step: int, figures: Mapping[str, float], limits: Limits
) -> tuple[dict[str, Any], list[Alarm]]:
    """What to remember (`memory` is {} at first), and the alarms raised or cleared at this step.

    Figures that are missing or not finite leave their alarm as it is.
    """
    memory = {"start": {}, "recent": {}, "seen": {}, "best": {}, "raised": {}} | copy.deepcopy(dict(memory))
    known = {name: float(x) for name, x in figures.items() if x is not None and math.isfinite(x)}
    events = []
    for name, text in [*_rules(memory, known, limits), *_falls(memory, step, known, limits)]:
        if text and name not in memory["raised"]:
            memory["raised"][name] = step
            events.append(Alarm(step, name, text))
        elif not text and name in memory["raised"]:
            since = memory["raised"].pop(name)
            events.append(Alarm(step, name, f"Back to normal since iteration {step}; raised at {since}.", cleared=True))
    return memory, events


def _rules(memory: dict[str, Any], known: Mapping[str, float], limits: Limits) -> Iterator[tuple[str, str | None]]:
    for rule in RULES:
        if rule.figure not in known:
            continue
        start = memory["start"].setdefault(rule.figure, known[rule.figure])
        recent = [*memory["recent"].get(rule.name, []), known[rule.figure]][-rule.window :]
        memory["recent"][rule.name] = recent
        seen = memory["seen"][rule.name] = memory["seen"].get(rule.name, 0) + 1
        if seen > rule.after:
            yield rule.name, rule.judge(sum(recent) / len(recent), start, limits)


def _falls(
    memory: dict[str, Any], step: int, known: Mapping[str, float], limits: Limits
) -> Iterator[tuple[str, str | None]]:
    """Judges that have fallen from their best while the proxy has risen since then."""
    if PROXY not in known:
        return
    for figure, words in JUDGES.items():
        error = _standard_error(figure, known, limits)
        if figure not in known or error is None:
            continue
        now, best = known[figure], memory["best"].get(figure)
        if best is None or now > best["value"]:
            best = {"step": step, "value": now, "proxy": known[PROXY], "falls": 0}
        proxy_rose = known[PROXY] > best["proxy"]
        fell = best["value"] - now > FALL_ERRORS * error
        best["falls"] = best["falls"] + 1 if fell and proxy_rose else 0
        memory["best"][figure] = best
        text = (
            f"The {words} fell from {best['value']:.3g} at iteration {best['step']} to {now:.3g}, while the reward of"
            f" the reward models rose from {best['proxy']:.3g} to {known[PROXY]:.3g}: the policy exploits them. Use the"
            f" policy of iteration {best['step']} (save_best), raise kl_coef, or train the reward models on samples of"
            " this policy."
        )
        name = f"{figure.removeprefix('eval/').removesuffix('_combined')}_falls"
        yield name, text if best["falls"] >= FALL_EVALUATIONS else None


def _standard_error(figure: str, known: Mapping[str, float], limits: Limits) -> float | None:
    """Of a judge's mean over the held-out prompts, `<figure>_se`; where that is not logged, the proxy's, because both
    are means of raw scores of reward models."""
    if f"{figure}_se" in known:
        return known[f"{figure}_se"]
    return known[f"{PROXY}_std"] / math.sqrt(limits.held_out) if f"{PROXY}_std" in known else None


def _length(now: float, start: float, limits: Limits) -> str | None:
    low, high = sorted((now, start))
    if high < LENGTH_FACTOR * low or high - low < LENGTH_TOKENS:
        return None
    way, cause = ("grew", "a reward model may like length") if now > start else ("shrank", "short answers may be safe")
    return (
        f"Responses {way} from {start:.0f} to {now:.0f} tokens: {cause}. Read samples.jsonl; raise kl_coef, or balance"
        " lengths in the preferences."
    )


def _cut_off(stopped: float, start: float, limits: Limits) -> str | None:
    if start - stopped <= CUT_OFF_RISE:
        return None
    return (
        f"{1 - stopped:.0%} of the responses are cut off by max_new_tokens, {1 - start:.0%} at the start. Set"
        " missing_eos_penalty, or raise max_new_tokens if good answers need it."
    )


def _repetition(now: float, start: float, limits: Limits) -> str | None:
    if now - start <= REPETITION_RISE:
        return None
    return (
        f"{now:.0%} of a response's 4-grams repeat earlier ones, {start:.0%} at the start: the policy falls into"
        " loops. Raise kl_coef or lower learning_rate, and go back to an earlier policy."
    )


def _entropy(now: float, start: float, limits: Limits) -> str | None:
    if now >= ENTROPY_SHARE * start:
        return None
    return (
        f"Entropy fell from {start:.3g} to {now:.3g} nats a token: responses become the same, and PPO finds nothing"
        " new. Lower learning_rate, or raise kl_coef."
    )


def _kl_high(now: float, start: float, limits: Limits) -> str | None:
    cap = limits.max_kl_nats
    limit = KL_NATS if cap is None else KL_CAP_SHARE * cap
    if now <= limit:
        return None
    place = "no cap is set (max_kl_nats)" if cap is None else f"the run stops at {cap:g} (max_kl_nats)"
    return (
        f"The policy is {now:.1f} nats a response from the reference, more than {limit:.3g}; {place}. That far away"
        " reward models judge what they were not trained on: raise kl_coef, or stop here."
    )


def _kl_negative(now: float, start: float, limits: Limits) -> str | None:
    if now >= KL_NEGATIVE:
        return None
    return (
        f"The KL to the reference is {now:.2f} nats a response, and no true KL is negative: the log-probs are not those"
        " of the distribution that was sampled. Check the sampling engine and temperature."
    )


def _safety(now: float, start: float, limits: Limits) -> str | None:
    if abs(now - start) <= SAFETY_CHANGE:
        return None
    what = "more" if now > start else "fewer"
    return (
        f"The safety model decides {now:.0%} of the rewards of prompts without a safety tag, {start:.0%} at the start: "
        f"{what} responses to ordinary prompts look unsafe. Read samples.jsonl, and check safety_threshold."
    )


def _value(now: float, start: float, limits: Limits) -> str | None:
    if now >= VALUE_EXPLAINED or limits.prompt_baseline:
        return None
    return (
        f"The value model explains {now:.2g} of the variance of the returns (1 is all, 0 none), so advantages are"
        " noise. Raise value_learning_rate or value_coef, or start it from the helpfulness model (value_model)."
    )


def _ratio(now: float, start: float, limits: Limits) -> str | None:
    limit = RATIO_ERROR_BF16 if limits.bf16 else RATIO_ERROR
    if now <= limit:
        return None
    who = (
        "two passes of the trainer disagree. Report it."
        if limits.bf16  # which recomputes old log-probs
        else "sampler and trainer disagree. Set recompute_logprobs: true, and report it."
    )
    return (
        f"Before any update the ratio of trained to sampled probabilities is off by {now:.1e} (at most {limit:.0e} is"
        f" rounding): {who}"
    )


def _sampler(now: float, start: float, limits: Limits) -> str | None:
    limit = SAMPLER_GAP_BF16 if limits.bf16 else SAMPLER_GAP
    if now <= limit:
        return None
    return (
        f"The sampler's log-probs are off the trainer's by {now:.1e} nats a token (at most {limit:.0e} is rounding):"
        " it samples from another policy. importance_cap corrects small differences; try another sampling_engine, and "
        "report it."
    )


def _skipped(now: float, start: float, limits: Limits) -> str | None:
    if now == 0:
        return None
    return (
        f"{now:.0f} gradient steps of this iteration were not finite and were left out; three in a row stop the run."
        " Lower learning_rate or value_learning_rate."
    )


RULES = (
    _Rule("length", "response/tokens", _length),
    _Rule("cut_off", "response/stopped", _cut_off),
    _Rule("repetition", "response/repetition", _repetition),
    _Rule("entropy", "policy/entropy", _entropy),
    _Rule("kl_high", "policy/kl", _kl_high),
    _Rule("kl_negative", "policy/kl", _kl_negative),
    _Rule("safety_share", "prompts/ordinary_unsafe", _safety),
    _Rule("value_model", "value/explained_variance", _value, after=VALUE_ITERATIONS),
    _Rule("first_ratio", "policy/first_ratio_error", _ratio, window=1),
    _Rule("sampler_gap", "sampler/logprob_gap", _sampler, window=1),
    _Rule("skipped_steps", "optim/skipped_steps", _skipped, window=1),
)


def spells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"alarm", "text", "step", "cleared"}] from the rows of alarms.jsonl, one for each time that an alarm was raised;
    `cleared` is None while it lasts."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["event"] == "raised":
            found.append({"alarm": row["alarm"], "text": row["text"], "step": row["step"], "cleared": None})
        else:
            for spell in [spell for spell in found if spell["alarm"] == row["alarm"]][-1:]:
                spell["cleared"] = row["step"]
    return found
