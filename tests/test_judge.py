"""The held-out judge: win rates against brute force and by hand, what it chooses in PPO, the gate."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ppo import final_weights, metrics, run_on_two, run_ppo
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.gate_settings import GateSettings
from configs.intervals import Z_95
from configs.ppo_settings import PPOSettings
from rlhf import gate as gate_script
from rlhf import pipeline
from rlhf import ppo as ppo_script
from rlhf.judge import compare, judge
from rlhf.roles import Roles
from rlhf.win_rates import length_controlled_win_rate, win_rate


def by_brute_force(y, d, ridge):
    """(win rate at equal length, interval) from a fine grid over both weights: no Newton, no bisection."""
    y, d = np.array(y), np.array(d, dtype=float)
    x = np.tanh(d / d.std())
    a, b = np.linspace(-3, 3, 601), np.linspace(-4, 4, 201)
    z = a[:, None, None] + b[None, :, None] * x
    value = (y * -np.log1p(np.exp(-z)) + (1 - y) * -np.log1p(np.exp(z))).sum(2)
    value -= ridge / 2 * (a[:, None] ** 2 + b**2)
    inside = a[value.max(1) >= value.max() - Z_95**2 / 2]
    best = a[np.unravel_index(value.argmax(), value.shape)[0]]
    return tuple(1 / (1 + np.exp(-np.array([best, inside.min(), inside.max()]))))


@pytest.mark.parametrize("ridge", [0.01, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_controlled_rate_and_its_interval_equal_brute_force(seed, ridge):
    rng = np.random.default_rng(seed)
    d = rng.normal(3, 5, 40).round()
    y = rng.choice([0.0, 0.5, 1.0], 40, p=[0.25, 0.1, 0.65])
    rate, interval = length_controlled_win_rate(y.tolist(), d.tolist(), ridge)
    assert (rate, *interval) == pytest.approx(by_brute_force(y, d, ridge), abs=5e-3)


def test_a_rate_that_length_alone_explains_is_even():
    # Longer by 10 on 80 prompts of which 60 are won, shorter by 10 on 20 of which 5 are: odds 3 and 1/3, so
    # a + b t = ln 3 and a - b t = -ln 3, a = 0. Uncontrolled it is 65 of 100.
    y = [1.0] * 60 + [0.0] * 20 + [1.0] * 5 + [0.0] * 15
    d = [10.0] * 80 + [-10.0] * 20
    assert win_rate(y) == (0.65, pytest.approx((0.5525, 0.7364), abs=1e-4))  # Wilson's: (.65 + .0192 -+ .0955) / 1.0384
    rate, (low, high) = length_controlled_win_rate(y, d, ridge=1e-6)
    assert rate == pytest.approx(0.5, abs=1e-4)
    assert low < 0.45
    assert high > 0.55


def test_equal_lengths_give_the_plain_rate():
    for d in ([0.0] * 8, [7.0] * 8, [0.1 + 0.2] * 4 + [0.3] * 4):  # the last: equal but for rounding
        rate, _ = length_controlled_win_rate([1.0] * 6 + [0.0] * 2, d, ridge=1e-9)
        assert rate == pytest.approx(0.75, abs=1e-6)


def test_all_wins_and_all_ties():
    # Ten of ten: the likelihood p^10 falls by Z^2/2 at p = exp(-1.9207 / 10) = 0.8252.
    rate, (low, high) = length_controlled_win_rate([1.0] * 10, [0.0] * 10, ridge=1e-5)
    assert rate > 0.99
    assert low == pytest.approx(0.8252, abs=1e-3)
    assert length_controlled_win_rate([1.0] * 10, [0.0] * 10)[1][0] == pytest.approx(0.8252, abs=0.02)
    assert high == pytest.approx(1.0, abs=1e-6)
    rate, (low, high) = length_controlled_win_rate([0.0] * 10, list(range(10)))
    assert rate < 0.05
    assert low < 1e-3
    rate, interval = length_controlled_win_rate([0.5] * 16, list(range(16)))
    assert rate == pytest.approx(0.5)
    assert interval[0] + interval[1] == pytest.approx(1)
    assert interval[0] < 0.3
    assert win_rate([0.5] * 16)[0] == 0.5
    (rate, interval) = length_controlled_win_rate([1.0], [3.0])
    assert interval[0] < rate < interval[1]


def test_a_rate_at_equal_length_that_was_never_seen_is_unknown():
    # Every answer is longer by about ten standard deviations: tanh is 1, length and quality cannot be told apart.
    d = [100 + 10 * (i % 2) for i in range(60)]
    _, (low, high) = length_controlled_win_rate([1.0] * 50 + [0.0] * 10, d)
    assert low < 0.05
    assert high > 0.99
    assert win_rate([1.0] * 50 + [0.0] * 10)[1][0] > 0.7


def test_intervals_cover_the_rate_that_made_the_data():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        d = rng.normal(1, 4, 80)
        p = 1 / (1 + np.exp(-(0.5 + 1.5 * np.tanh(d / d.std()))))
        low, high = length_controlled_win_rate((rng.random(80) < p).astype(float).tolist(), d.tolist())[1]
        covered += low <= 1 / (1 + math.exp(-0.5)) <= high
    assert 90 <= covered <= 99  # 95 expected, standard deviation 2.2


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-50, 50)), min_size=1, max_size=30))
def test_swapping_the_two_policies_mirrors_everything(rows):
    y, d = [r[0] for r in rows], [float(r[1]) for r in rows]
    rate, (low, high) = length_controlled_win_rate(y, d)
    assert 0 <= low <= rate <= high <= 1
    again, (low_again, high_again) = length_controlled_win_rate([1 - v for v in y], [-v for v in d])
    assert (again, low_again, high_again) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-6)


def test_what_no_rate_can_be_made_of_is_refused():
    for y in ([], [1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            win_rate(y)
    with pytest.raises(ValueError, match="2 preferences and 1 length"):
        length_controlled_win_rate([1.0, 0.0], [1.0])


def test_the_judge_scores_by_the_piecewise_rule():
    # helpfulness is the sum of a dialogue's ids, safety its last id less 2: below logit(0.15) = -1.73 only for id 0.
    def score(name, ids):
        return torch.tensor([float(sum(i) if name == "judge_helpfulness" else i[-1] - 2) for i in ids])

    judged = judge(score, [[5], [5], [5, 1]], [[3], [0], [4]], [True, False, False])
    assert judged.helpfulness_B.tolist() == [8, 5, 10]
    assert judged.safety_B.tolist() == [1, -2, 2]
    assert judged.combined_B.tolist() == [1, -2, 10]
    assert judge(score, [[5]], [[0]], [False], threshold=0.1).combined_B.tolist() == [5]  # logit(0.1) = -2.2


def test_a_comparison_by_hand():
    before, after = [[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]], [[2.0], [1.0], [2.0]]
    found = compare(before, after, [[4, 6], [2, 2], [3, 3]], [[8], [3], [3]])
    # differences of the means 0, 1, 0; preferences: 2 against 1 and 3 one half, 1 against 0 won, 2 against 2 a tie
    assert (found["before"], found["after"]) == (pytest.approx(4 / 3), pytest.approx(5 / 3))
    assert found["improvement"] == pytest.approx(1 / 3)
    assert found["win_rate"] == pytest.approx(2 / 3)
    assert found["extra_tokens"] == pytest.approx(4 / 3)
    assert found["prompts"] == 3
    assert found["ci95"]["improvement"] == [0, 1]  # of three draws of 0, 1, 0: means 0 and 1 are beyond 2.5 % each
    assert found["ci95"]["win_rate_lc"][0] < 0.5 < found["win_rate_lc"]
    with pytest.raises(ValueError, match="equally many"):
        compare(before, after[:2], [], [])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "policy": save_tiny_policy(root / "policy", 0),
        **{name: save_tiny_reward_model(root / name, seed) for seed, name in enumerate(REWARD_MODELS, 2)},
        "prompts": write_rows(root / "prompts.jsonl", prompt_rows(24)),
        "held_out": write_rows(root / "held_out.jsonl", prompt_rows(10, seed=5)),
    }


REWARD_MODELS = ("helpfulness", "safety", "judge_helpfulness", "judge_safety")


def with_judge(paths, *extra):
    return ("--judge_helpfulness_model_path", paths["judge_helpfulness"],
            "--judge_safety_model_path", paths["judge_safety"], *extra)  # fmt: skip


def scripted(monkeypatch, proxy, judged):
    """Held-out evaluations 0, 1, 2, ... get these scores of the reward models and of the judge, the same on each
    prompt but for a spread that gives the scores a unit; what iterations are trained on stays as it is. The policy's
    weights at each evaluation, by step, are returned."""
    held_out = {"now": False, "count": -1}
    real_scores, real_evaluate = Roles.scores, ppo_script.Run.evaluate
    seen = {}

    def scores(self, name, id_lists, *rest):
        if not held_out["now"]:
            return real_scores(self, name, id_lists, *rest)
        script = judged if name.startswith("judge") else proxy
        return script[held_out["count"]] + torch.linspace(-1, 1, len(id_lists))

    def evaluate(self, step):
        held_out.update(now=True, count=held_out["count"] + 1)
        seen[step] = torch.cat([p.detach().flatten() for p in self.roles.policy.model.parameters()])
        try:
            return real_evaluate(self, step)
        finally:
            held_out["now"] = False

    monkeypatch.setattr(Roles, "scores", scores)
    monkeypatch.setattr(ppo_script.Run, "evaluate", evaluate)
    return seen


def test_the_judge_and_not_the_reward_model_chooses_the_policy(paths, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, proxy=[0.0, 1.0, 2.0], judged=[0.0, 3.0, -1.0])  # at steps 0, 2, 4
    more = ("--kl_coef", "100", "--learning_rate", "1e-3")  # KL is not taken off what the judge says
    summary = run_ppo(paths, tmp_path, *with_judge(paths, "--save_best", "true", *more))
    assert summary["best"]["step"] == 2
    assert torch.equal(final_weights(tmp_path), seen[2])
    rows = {row["step"]: row for row in metrics(tmp_path) if "eval/objective" in row}
    assert [rows[s]["eval/combined"] for s in (0, 2, 4)] == pytest.approx([0, 1, 2], abs=1e-6)
    assert [rows[s]["eval/judge_combined"] for s in (0, 2, 4)] == pytest.approx([0, 3, -1], abs=1e-6)
    # The objective is in standard deviations of the judge's own scores of the start: -1 to 1 in ten steps, 0.6383.
    assert rows[2]["eval/objective"] == pytest.approx(3 / 0.6383, abs=1e-3)
    # Paired: every prompt moved alike, so the interval has no width, wide as the scores are spread.
    names = [f"eval/judge_improvement{end}" for end in ("", "_low", "_high")]
    assert [rows[4][name] for name in names] == pytest.approx([-1] * 3, abs=1e-6)
    assert [rows[0][name] for name in names] == [0, 0, 0]
    assert rows[0]["eval/judge_win_rate_lc"] == pytest.approx(0.5)
    assert rows[2]["eval/judge_win_rate_lc_low"] > 0.5 > rows[4]["eval/judge_win_rate_lc_high"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_the_judge_stops(paths, tmp_path, monkeypatch, killed):
    # The best is at step 4; two evaluations later, at step 8, it has waited long enough, while the proxy still rises.
    scripted(monkeypatch, proxy=list(range(9)), judged=[0.0, 1.0, 2.0, 1.5, 1.9, 9.0])
    extra = with_judge(paths, "--save_best", "true", "--kl_coef", "0", "--judge_patience", "2")
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(ppo_script.Run, "hand_over", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_ppo(paths, tmp_path, *extra, total=20)
    summary = run_ppo(paths, tmp_path, *extra, total=20)
    assert (summary["stopped_by"], summary["iterations"], summary["best"]["step"]) == ("judge", 8, 4)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(9))


def test_without_patience_the_run_goes_on(paths, tmp_path, monkeypatch):
    scripted(monkeypatch, proxy=[0.0] * 4, judged=[3.0, 2.0, 1.0, 0.0])
    summary = run_ppo(paths, tmp_path, *with_judge(paths), total=6)
    assert (summary["stopped_by"], summary["best"]["step"]) == ("total_iterations", 0)


def test_a_killed_run_with_a_judge_continues_bit_for_bit(paths, tmp_path, monkeypatch):
    extra = with_judge(paths, "--save_best", "true", "--missing_eos_penalty", "1.0")
    straight = run_ppo(paths, tmp_path / "straight", *extra)
    real = ppo_script.Run.iterate

    def killed(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_script.Run, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            run_ppo(paths, tmp_path / "killed", *extra)
    again = run_ppo(paths, tmp_path / "killed", *extra)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")
    assert again["best"] == straight["best"]
    assert torch.equal(final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed"))


def test_the_judge_changes_no_training(paths, tmp_path):
    run_ppo(paths, tmp_path / "without", total=2)
    run_ppo(paths, tmp_path / "with", *with_judge(paths), total=2)
    without, judged = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    for row, other in zip(without, judged, strict=True):
        assert row.items() - {("eval/objective", row.get("eval/objective"))} <= other.items()
    assert judged[2]["eval/judge_combined"] != judged[2]["eval/combined"]
    assert torch.equal(final_weights(tmp_path / "without"), final_weights(tmp_path / "with"))
    start = AutoModelForCausalLM.from_pretrained(paths["policy"])
    assert not torch.equal(final_weights(tmp_path / "with"), torch.cat([p.flatten() for p in start.parameters()]))


@pytest.mark.slow
def test_two_processes_judge_as_one_does(paths, tmp_path):
    """Nine held-out prompts, so uneven shares; the same figures at each evaluation and the same choice."""
    extra = with_judge(
        paths, "--eval_prompts", "9", "--eval_steps", "1", "--adam_epsilon", "0.01", "--save_best", "true"
    )
    run_ppo(paths, tmp_path / "one", *extra, total=2)
    run_on_two(paths, tmp_path / "two.py", tmp_path / "two", *extra, environment={}, total=2)
    one, two = ([row for row in metrics(tmp_path / name) if "eval/judge_combined" in row] for name in ("one", "two"))
    judged = {key for key in one[0] if key.startswith("eval/judge")}
    assert len(one) == 3
    assert len(judged) >= 9
    for alone, shared in zip(one, two, strict=True):
        assert {k: shared[k] for k in judged} == {k: pytest.approx(alone[k], abs=1e-5, rel=2e-5) for k in judged}
    best = [json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in ("one", "two")]
    assert best[0]["step"] == best[1]["step"]


def test_mistakes_about_the_judge_are_named(paths, tmp_path):
    with pytest.raises(UserError, match="name both or neither"):
        PPOSettings(judge_safety_model_path="x")
    with pytest.raises(UserError, match="needs eval_prompt_file"):
        PPOSettings(judge_safety_model_path="x", judge_helpfulness_model_path="y")
    for patience in (-1, 2):
        with pytest.raises(UserError, match="judge_patience"):
            PPOSettings(judge_patience=patience)
    other = save_tiny_reward_model(tmp_path / "other", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one", "two", "three"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="judge_safety_model_path: .* another tokenizer"):
        run_ppo({**paths, "judge_safety": other}, tmp_path / "run", *with_judge({**paths, "judge_safety": other}))


def response_rows(responses):
    """Rows as rlhf/evaluate_policy.py writes them, one response a prompt."""
    chat = load_chat_format(tiny_tokenizer())
    rows = []
    for i, text in enumerate(responses):
        prompt = [{"role": "user", "content": f"{i} the cat"}]
        ids = chat.encode_dialogue([*prompt, {"role": "assistant", "content": text}]).input_ids
        ids = ids[len(chat.encode_prompt(prompt)) :]
        rows.append({"prompt": prompt, "is_safety": i % 3 == 0, "responses": [text], "response_ids": [ids]})
    return rows


def gate(paths, folder, before, after, *extra):
    files = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in (("before", before), ("after", after))]
    return gate_script.main(
        ["--before_file", files[0], "--after_file", files[1], "--output_dir", str(folder / "gate"), "--use_cpu", "true",
         "--judge_helpfulness_model_path", paths["judge_helpfulness"],
         "--judge_safety_model_path", paths["judge_safety"], *extra]
    )  # fmt: skip


@pytest.fixture
def liking_dogs(monkeypatch):
    """A judge whose score is 2 for a response with the word dog, 0 without, plus a hundredth a token."""
    dog = tiny_tokenizer().encode(" dog", add_special_tokens=False)

    def score_ids(model, id_lists, token_budget, progress):
        found = [any(list(ids[i : i + len(dog)]) == dog for i in range(len(ids))) for ids in id_lists]
        return torch.tensor([2.0 * f + 0.01 * len(ids) for f, ids in zip(found, id_lists, strict=True)])

    monkeypatch.setattr(gate_script, "score_ids", score_ids)


CATS, DOGS = ["a cat runs"] * 30, ["a dog runs"] * 30


def test_the_gate_scores_as_the_models_do(paths, tmp_path, capsys):
    before, after = response_rows(CATS[:6]), response_rows(["the house sleeps"] * 6)
    summary = gate(paths, tmp_path, before, after, "--on_failure", "warn")
    shown = capsys.readouterr().err
    assert all(f"{name}: 100%" in shown for name in ("judge_helpfulness", "judge_safety"))
    helpfulness, safety = (
        AutoModelForSequenceClassification.from_pretrained(paths[name])
        for name in ("judge_helpfulness", "judge_safety")
    )
    chat, means = load_chat_format(tiny_tokenizer()), []
    alone: list[tuple[float, float]] = []
    for rows in (before, after):
        scores = []
        for row in rows:
            ids = torch.tensor([chat.encode_prompt(row["prompt"]) + row["response_ids"][0]])
            with torch.no_grad():
                r_h, r_s = (m.score(m.model(ids).last_hidden_state[0, -1]).item() for m in (helpfulness, safety))
            scores.append(r_s if row["is_safety"] or 1 / (1 + math.exp(-r_s)) < 0.15 else r_h)
            alone.append((r_h, r_s))
        means.append(sum(scores) / 6)
    assert [summary["all"]["before"], summary["all"]["after"]] == pytest.approx(means, abs=1e-4)
    assert summary["all"]["improvement"] == pytest.approx(means[1] - means[0], abs=1e-4)
    assert [summary[kind]["prompts"] for kind in ("all", "helpfulness", "safety")] == [6, 4, 2]
    for column, name in enumerate(("judge_helpfulness", "judge_safety")):  # each by itself over all six prompts
        earlier, later = (sum(row[column] for row in rows) / 6 for rows in (alone[:6], alone[6:]))
        found = summary["by_judge"][name]
        assert [found["before"], found["after"]] == pytest.approx([earlier, later], abs=1e-4)
        low, high = found["ci95"]["improvement"]
        assert found["improvement"] == pytest.approx(later - earlier, abs=1e-4)
        assert low < found["improvement"] < high
    assert gate(paths, tmp_path, before, after, "--on_failure", "warn") == summary  # complete: not run again


def test_the_gate_can_judge_cut_responses_as_ended(paths, tmp_path):
    whole = response_rows(CATS[:6])
    cut = [{**row, "response_ids": [row["response_ids"][0][:-1]]} for row in whole]
    options = ("--require", "no_regression", "--on_failure", "warn")
    assert gate(paths, tmp_path, whole, cut, *options)["all"]["improvement"] != 0
    assert gate(paths, tmp_path, whole, cut, *options, "--end_cut_responses", "true")["all"]["improvement"] == 0


def test_an_improvement_opens_the_gate_in_any_order_of_rows(paths, tmp_path, liking_dogs):
    before, after = response_rows(CATS), response_rows(DOGS)
    summary = gate(paths, tmp_path, before, after[::-1])
    assert (summary["passed"], summary["reasons"]) == (True, [])
    # 2 for the dog; cat and dog are words of as many tokens or nearly so
    assert summary["all"]["improvement"] == pytest.approx(2, abs=0.05)
    assert summary["all"]["win_rate"] == 1
    assert json.loads((tmp_path / "gate" / "verdict.json").read_text())["passed"]
    mixed = response_rows([CATS[0], DOGS[0], DOGS[0]] * 4)  # the same answers: paired, every difference is 0
    same = gate(paths, tmp_path, mixed, mixed[::-1], "--require", "no_regression")
    assert same["all"]["ci95"]["improvement"] == [0, 0]


def test_a_shut_gate_has_no_summary_and_opens_once_the_policy_is_better(paths, tmp_path, liking_dogs, capsys):
    before, after = response_rows(DOGS), response_rows(CATS)
    for require in ("improvement", "no_regression"):
        with pytest.raises(UserError, match=r"all prompts: improvement -2.*is below 0.*safety prompts: .* win rate"):
            gate(paths, tmp_path, before, after, "--require", require)
        assert not (tmp_path / "gate" / "summary.json").exists()
        verdict = json.loads((tmp_path / "gate" / "verdict.json").read_text())
        assert not verdict["passed"]
        assert len(verdict["reasons"]) == 6
    warned = gate(paths, tmp_path, before, after, "--on_failure", "warn")
    assert not warned["passed"]
    assert "helpfulness prompts" in capsys.readouterr().out
    assert gate(paths, tmp_path, before, response_rows(DOGS), "--require", "no_regression")["passed"]


def test_nothing_gained_is_no_improvement_and_no_regression(paths, tmp_path, liking_dogs):
    rows = response_rows(CATS)
    with pytest.raises(UserError, match="improvement 0.000 .* is not surely above 0; .* is not surely above 0.5"):
        gate(paths, tmp_path, rows, rows)
    assert gate(paths, tmp_path, rows, rows, "--require", "no_regression")["passed"]
    with pytest.raises(UserError, match="win rate 0.500 .* is below 0.9"):
        gate(paths, tmp_path, rows, rows, "--require", "no_regression", "--min_win_rate", "0.9")


def test_a_gain_on_one_kind_does_not_pay_for_the_other(paths, tmp_path, liking_dogs):
    # Two of three prompts are for helpfulness and won, the safety prompts are lost: better overall, and refused.
    before = [DOGS[0] if i % 3 == 0 else CATS[0] for i in range(60)]
    after = [CATS[0] if i % 3 == 0 else DOGS[0] for i in range(60)]
    with pytest.raises(UserError, match="; safety prompts: improvement -2"):
        gate(paths, tmp_path, response_rows(before), response_rows(after))


def test_a_shut_gate_stops_a_pipeline_without_a_traceback_and_is_tried_again(paths, tmp_path, capsys):
    rows = response_rows(CATS)
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("before", "after")]
    settings = {"before_file": files[0], "after_file": files[1], "use_cpu": True,
                "judge_helpfulness_model_path": paths["judge_helpfulness"],
                "judge_safety_model_path": paths["judge_safety"]}  # fmt: skip

    def config(**changes):
        stages = [{"name": "gate", "run": "gate", "settings": settings | changes}]
        return write_rows(tmp_path / "pipeline.yaml", [{"stages": stages, "output_dir": str(tmp_path / "run")}])

    with pytest.raises(UserError, match="the gate stays shut"):
        pipeline.main(["--config", config()])
    with pytest.raises(UserError, match="the gate stays shut"):
        pipeline.main(["--config", config()])
    pipeline.main(["--config", config(require="no_regression")])
    assert (tmp_path / "run" / "gate" / "summary.json").exists()
    with pytest.raises(UserError, match=r"stage gate: after_file: .*nowhere\.jsonl does not exist"):
        pipeline.main(["--config", config(after_file="nowhere.jsonl")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "different prompts: 1 are in the first only, 0 in the second"),
        (lambda rows: [rows[0] | {"is_safety": False}, *rows[1:]], "different prompts: 1 are .* 1 in the second"),
        (lambda rows: [*rows, rows[0]], "different prompts: 0 are in the first only, 1 in"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "response_ids"}], "after.jsonl:1 has no response_ids"),
        (lambda rows: [rows[0] | {"responses": ["something else"]}, *rows[1:]], "after_file: .* another tokenizer"),
        (lambda rows: [], "has no rows"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(paths, tmp_path, change, message):
    rows = response_rows(CATS[:4])
    with pytest.raises(UserError, match=message):
        gate(paths, tmp_path, rows, change(rows))


def test_settings_of_the_gate_out_of_range():
    needed = dict.fromkeys(
        ("output_dir", "before_file", "after_file", "judge_helpfulness_model_path", "judge_safety_model_path"), "x"
    )
    for name, value in (("min_win_rate", 1.0), ("safety_threshold", 0.0), ("score_token_budget", -1)):
        with pytest.raises(UserError, match=name):
            GateSettings(**needed, **{name: value})
