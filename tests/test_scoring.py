"""From responses to one raw score: combinations, functions of the user's own, in PPO and in rejection sampling."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer, write_rows

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.ppo_settings import PPOSettings
from configs.rejection_settings import RejectionSettings
from configs.scoring_settings import ScoringSettings
from rlhf import ppo as ppo_script
from rlhf import rejection_sampling
from rlhf.samples import Prompt
from rlhf.score_files import read_scores
from rlhf.scoring import Scoring

PROMPT = [{"role": "user", "content": "the cat"}]
FUNCTIONS = """
import math
seen = []

def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]

def only_tagged(is_safety, prompts, **kwargs):
    return [3.0 if tagged else None for tagged in is_safety]

def records(**columns):
    seen.append(columns)
    return [0] * len(columns["prompts"])

def one_for_all(**kwargs): return [1.0]
def infinite(completions, **kwargs): return [math.inf for _ in completions]
def nothing(**kwargs): return None
def words(completions, **kwargs): return ["good" for _ in completions]
def fails(completions, **kwargs): return [1 / 0 for _ in completions]
def takes_less(completions): return [0.0 for _ in completions]
number = 7
class Judge:
    def score(self, completions, **kwargs): return [2.0 for _ in completions]
judge = Judge()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a package of the user's, from which the command is started."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "rewards.py").write_text(FUNCTIONS)
    (package / "broken.py").write_text("import no_such_library\n")
    (package / "raises.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def given(**settings):
    return ScoringSettings(**settings)


def both(**settings):
    return given(helpfulness_model_path="h", safety_model_path="s", **settings)


R = {"helpfulness": torch.tensor([1.0, 2.0, 3.0]), "safety": torch.tensor([5.0, -4.0, 0.5])}
THREE = [Prompt(PROMPT, [5, 6], is_safety=tagged) for tagged in (True, False, False)]


def score(settings, prompts=THREE):
    seen = []

    def score_ids(name, dialogues):
        seen.append((name, dialogues))
        return R[name]

    scored = Scoring(settings).scores(score_ids, prompts, [[7, 2], [8, 2], [9, 9]], ["a", "bb", "cccc"])
    return scored, seen


def test_the_piecewise_reward_is_the_default():
    scored, seen = score(both())
    assert scored.combined_B.tolist() == [5.0, -4.0, 3.0]  # tagged, unsafe (-4 < -1.73), safe
    assert scored.safety_decides_B.tolist() == [True, True, False]
    assert seen == [(name, [[5, 6, 7, 2], [5, 6, 8, 2], [5, 6, 9, 9]]) for name in ("helpfulness", "safety")]


def test_functions_beside_the_reward_models(here):
    functions = ["mine.rewards:length", "bonus=mine.rewards:only_tagged"]
    scored, _ = score(both(reward_functions=functions, reward_function_weights=[-0.5, 2.0]))
    # 5 - 0.5 * 1 + 2 * 3;  -4 - 0.5 * 2, no bonus;  3 - 0.5 * 4, no bonus
    assert scored.combined_B.tolist() == [10.5, -5.0, 1.0]
    assert scored.safety_decides_B.tolist() == [True, True, False]
    assert scored.raw["length"].tolist() == [1.0, 2.0, 4.0]
    assert scored.raw["bonus"].isnan().tolist() == [False, True, True]


def test_functions_instead_of_reward_models(here):
    scored, seen = score(given(reward_functions=["mine.rewards:length", "mine.rewards:judge.score"]))
    assert scored.combined_B.tolist() == [3.0, 4.0, 6.0]
    assert scored.safety_decides_B is None
    assert seen == []
    assert list(scored.raw) == ["length", "score"]


def test_what_a_function_is_called_with(here):
    score(given(reward_functions=["mine.rewards:records"]))
    (columns,) = sys.modules["mine.rewards"].seen
    assert columns == {
        "prompts": [PROMPT] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in ("a", "bb", "cccc")],
        "prompt_ids": [[5, 6]] * 3,
        "completion_ids": [[7, 2], [8, 2], [9, 9]],
        "is_safety": [True, False, False],
    }


def test_a_reward_function_of_trl_runs_as_it_is():
    scored = Scoring(given(reward_functions=["trl.rewards:think_format_reward"])).scores(
        lambda *_: pytest.fail("no reward model is named"), THREE[:2], [[7], [8]], ["<think>\na\n</think>\nb", "b"]
    )
    assert scored.combined_B.tolist() == [1.0, 0.0]


def test_one_model_needs_no_other_and_a_watched_model_is_scored_all_the_same():
    scored, seen = score(given(helpfulness_model_path="h", reward_combination="helpfulness"))
    assert scored.combined_B.tolist() == [1.0, 2.0, 3.0]
    assert [name for name, _ in seen] == ["helpfulness"]
    scored, seen = score(both(reward_combination="helpfulness"))
    assert scored.combined_B.tolist() == [1.0, 2.0, 3.0]
    assert list(scored.raw) == ["helpfulness", "safety"]


def test_an_ensemble_from_its_file(tmp_path):
    path = tmp_path / "ensemble.json"
    path.write_text('{"weights": {"helpfulness": 2, "safety": 0.5}, "bias": -1}')
    scored, _ = score(both(reward_combination="ensemble", ensemble_file=str(path)))
    assert scored.combined_B.tolist() == [3.5, 1.0, 5.25]  # 2 * 1 + 5 / 2 - 1, ...
    assert scored.safety_decides_B is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[1]", "must hold"),
        ('{"weights": {}}', "must hold"),
        ('{"weights": {"helpfulness": "1", "safety": 1}}', "must hold"),
        ('{"weights": {"helpfulness": NaN, "safety": 1}}', "must hold"),
        ('{"weights": {"helpfulness": 1, "deberta": 1}}', "must have weights for .* it differs in deberta, safety"),
    ],
)
def test_a_bad_ensemble_file_is_named(tmp_path, content, message):
    path = tmp_path / "ensemble.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"ensemble_file: .*{message}"):
        Scoring(both(reward_combination="ensemble", ensemble_file=str(path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_combination": "median"}, "reward_combination: 'median' is none of piecewise, "),
        ({"reward_combination": "ensemble"}, "ensemble and ensemble_file go together"),
        ({"ensemble_file": "x.json"}, "ensemble and ensemble_file go together"),
        ({"reward_combination": "min", "safety_threshold": 0.2}, "safety_threshold: 0.2 has no effect"),
        ({"safety_threshold": 1.0}, "safety_threshold is a probability"),
        ({"reward_functions": ["mine.rewards"]}, "neither package.module:function nor"),
        ({"reward_functions": ["../mine:f"]}, "neither package.module:function nor"),
        ({"reward_functions": ["a:f", "b:f"]}, "two are called 'f'; write another_name="),
        ({"reward_functions": ["a:safety"]}, "'safety' is a figure of ours"),
        ({"reward_functions": ["a:kl"]}, "'kl' is a figure of ours"),
        ({"reward_function_weights": [1.0]}, "1 for 0 reward_functions"),
        ({"reward_functions": ["a:f"], "reward_function_weights": [1.0, 2.0]}, "2 for 1 reward_functions"),
        ({"reward_functions": ["a:f"], "reward_function_weights": [math.nan]}, "must be numbers"),
    ],
)
def test_settings_that_cannot_work_or_would_be_ignored(settings, message):
    for make in (
        lambda: PPOSettings(helpfulness_model_path="h", safety_model_path="s", **settings),
        lambda: RejectionSettings(prompt_files=[], helpfulness_model_path="h", safety_model_path="s", **settings),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "helpfulness_model_path, safety_model_path: name the folder"),
        ({"helpfulness_model_path": "h"}, "^safety_model_path: name the folder"),
        ({"safety_model_path": "s", "reward_combination": "helpfulness"}, "^helpfulness_model_path: name the folder"),
        ({"reward_functions": ["mine:f"], "reward_combination": "mean"}, "helpfulness_model_path, safety_model_path"),
        ({"reward_functions": ["mine:f"], "safety_model_path": "s"}, "^helpfulness_model_path: name the folder"),
    ],
)
def test_what_the_combination_needs_must_be_named(settings, message):
    with pytest.raises(UserError, match=message):
        Scoring(PPOSettings(**settings))
    with pytest.raises(UserError, match=message):
        RejectionSettings(prompt_files=[], **settings)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("yours.rewards:f", "there is no module yours. Modules are found from the current folder, "),
        ("mine.reward:f", "there is no module mine.reward. "),
        ("mine.broken:f", "cannot be imported: ModuleNotFoundError: .* 'no_such_library' .*broken.py, line 1"),
        ("mine.raises:f", "cannot be imported: RuntimeError: no licence .*raises.py, line 2"),
        ("mine.rewards:lenght", "module mine.rewards has no lenght; check the name"),
        ("mine.rewards:number", "is a int, which cannot be called"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_loaded(here, place, message):
    with pytest.raises(UserError, match=f"^reward_functions: {place}.* ?{message}"):
        Scoring(given(reward_functions=[place]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_for_all", "gave 1 scores for 2 responses; return one each"),
        ("infinite", "gave inf for response 0; return finite numbers, or None"),
        ("nothing", "gave a NoneType; return a list of one number a response"),
        ("words", "gave a list; return a list of one number a response"),
        ("fails", r"failed: ZeroDivisionError: division by zero \(.*rewards.py, line 19\)"),
        ("takes_less", "failed: TypeError: .*unexpected keyword argument 'prompts'"),
    ],
)
def test_a_function_that_does_not_do_is_found_on_a_trial(here, name, message):
    chat_format = load_chat_format(tiny_tokenizer())
    scoring = Scoring(given(reward_functions=[f"mine.rewards:{name}"]))
    with pytest.raises(UserError, match=f"^reward_functions: mine.rewards:{name} {message}"):
        scoring.try_out(Prompt(PROMPT, chat_format.encode_prompt(PROMPT)), chat_format)


def test_the_trial_is_one_prompt_with_two_responses_as_sampled(here):
    chat_format = load_chat_format(tiny_tokenizer())
    prompt = Prompt(PROMPT, chat_format.encode_prompt(PROMPT), is_safety=True)
    Scoring(given(reward_functions=["mine.rewards:records"])).try_out(prompt, chat_format)
    (columns,) = sys.modules["mine.rewards"].seen
    assert columns["prompt_ids"] == [prompt.ids] * 2
    assert [chat_format.decode_response(ids) for ids in columns["completion_ids"]] == ["Yes.", "No."]
    assert columns["completion_ids"][0][-1] in chat_format.stop_ids


def test_another_text_of_the_function_is_another_run(here):
    settings = given(reward_functions=["mine.rewards:length"])
    before = Scoring(settings).fingerprints()
    (here / "mine" / "rewards.py").write_text(FUNCTIONS + "\n# changed\n")
    assert Scoring(settings).fingerprints() != before
    assert Scoring(both()).fingerprints() == {}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "policy": save_tiny_policy(root / "policy"),
        "helpfulness": save_tiny_reward_model(root / "helpfulness", 2),
        "safety": save_tiny_reward_model(root / "safety", 3),
        "prompts": write_rows(root / "prompts.jsonl", prompt_rows(8)),
    }


def words(**fields):
    """Fields as flags."""
    flags = []
    for name, value in fields.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def run_ppo(models, output, **extra):
    sizes = {"batch_size": 8, "mini_batch_size": 4, "max_new_tokens": 6, "total_iterations": 1, "logging_steps": 1}
    sizes |= {"model_name_or_path": models["policy"], "prompt_files": models["prompts"], "use_cpu": "true"}
    ppo_script.main(words(**sizes, output_dir=output, **extra))
    return [[json.loads(line) for line in Path(output, name).read_text().splitlines()]
            for name in ("metrics.jsonl", "samples.jsonl")]  # fmt: skip


def test_ppo_on_functions_alone(here, models):
    functions = ["mine.rewards:length", "mine.rewards:only_tagged"]
    metrics, samples = run_ppo(models, here / "run", value_model="policy", reward_functions=functions,
                               reward_function_weights=[1, 10])  # fmt: skip
    assert metrics[0]["reward/only_tagged"] == 3.0  # the mean over those that it applies to
    # every fourth prompt is tagged: mean length + 10 * 3 / 4
    assert metrics[0]["reward/combined"] == pytest.approx(metrics[0]["reward/length"] + 7.5)
    assert not {"reward/helpfulness", "reward/safety", "reward/safety_decides"} & metrics[0].keys()
    assert [s["reward_length"] for s in samples] == [len(s["response"]) for s in samples]
    assert {s["reward_only_tagged"] for s in samples if not s["is_safety"]} == {None}


def test_ppo_with_helpfulness_only(models, tmp_path):
    metrics, _ = run_ppo(models, tmp_path, helpfulness_model_path=models["helpfulness"],
                         reward_combination="helpfulness")  # fmt: skip
    assert metrics[0]["reward/combined"] == pytest.approx(metrics[0]["reward/helpfulness"])
    assert "reward/safety" not in metrics[0]


def test_ppo_says_what_is_wrong_before_any_training(here, models):
    with pytest.raises(UserError, match="one_for_all gave 1 scores for 2"):
        run_ppo(models, here / "a", value_model="policy", reward_functions=["mine.rewards:one_for_all"])
    with pytest.raises(UserError, match="value_model: helpfulness needs helpfulness_model_path"):
        run_ppo(models, here / "b", reward_functions=["mine.rewards:length"])
    with pytest.raises(UserError, match="no module yours"):
        run_ppo(models, here / "c", value_model="policy", reward_functions=["yours:f"])
    assert not (here / "c").exists()


def run_rejection(models, output, **extra):
    sizes = {"samples_per_prompt": 3, "max_new_tokens": 6, "keep_unfinished": "true", "use_cpu": "true"}
    sizes |= {"model_name_or_path": models["policy"], "prompt_files": models["prompts"]}
    return rejection_sampling.main(words(**sizes, output_dir=output, **extra))


def test_rejection_sampling_by_functions_alone(here, models):
    summary = run_rejection(models, here / "run",
                            reward_functions=["mine.rewards:length", "mine.rewards:only_tagged"])  # fmt: skip
    arrays = read_scores(here / "run")
    assert not {"helpfulness", "safety"} & arrays.keys()
    np.testing.assert_allclose(arrays["combined"], np.nansum([arrays["function_length"],
                                                              arrays["function_only_tagged"]], axis=0))  # fmt: skip
    assert np.isnan(arrays["function_only_tagged"]).mean() == 0.75
    assert summary["best"]["function_length"] >= summary["worst"]["function_length"]
    assert summary["best"]["function_only_tagged"] == 3.0
    best = [json.loads(line) for line in (here / "run" / "best.jsonl").read_text().splitlines()]
    for row in best:
        assert row["score"] == len(row["messages"][-1]["content"]) + 3.0 * row["is_safety"]


def test_rejection_sampling_with_a_function_beside_the_models(here, models):
    paths = {f"{name}_model_path": models[name] for name in ("helpfulness", "safety")}
    run_rejection(models, here / "plain", **paths)
    run_rejection(models, here / "beside", **paths, reward_functions=["mine.rewards:length"],
                  reward_function_weights=[0.5])  # fmt: skip
    plain, beside = read_scores(here / "plain"), read_scores(here / "beside")
    for name in ("helpfulness", "safety"):
        np.testing.assert_array_equal(plain[name], beside[name])
    np.testing.assert_allclose(beside["combined"], plain["combined"] + 0.5 * beside["function_length"], atol=1e-5)


def test_rejection_sampling_says_what_is_wrong_before_it_samples(here, models):
    with pytest.raises(UserError, match="fails failed: ZeroDivisionError"):
        run_rejection(models, here / "run", reward_functions=["mine.rewards:fails"])
    assert not list((here / "run").glob("shards/*/*"))


def test_settings_of_ppo_can_be_replaced_one_by_one():
    settings = PPOSettings(reward_functions=["a:f"])
    assert replace(settings, reward_function_weights=[2.0]).function_places == {"f": ("a", "f")}
