"""Rejection sampling end to end on throwaway models: what it keeps, what it reports, what a kill costs."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, write_rows
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.records import read_dialogues
from configs.rejection_settings import RejectionSettings
from rlhf import rejection_sampling, shards
from rlhf.draw import sample_seeds
from rlhf.rejection_sampling import select, summarise
from rlhf.samples import before_stop_string
from rlhf.score_files import read_scores
from rlhf.simulation.people import draw_prompts
from rlhf.tokenizer import load_tokenizer

K = 4


def save_ending_policy(folder: Path) -> str:
    """A random policy whose end token is likely enough that most responses end."""
    path = save_tiny_policy(folder)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "model_name_or_path": save_ending_policy(folder / "policy"),
        "helpfulness_model_path": save_tiny_reward_model(folder / "helpfulness", seed=1),
        "safety_model_path": save_tiny_reward_model(folder / "safety", seed=2),
        "prompt_files": write_rows(folder / "prompts.jsonl", prompt_rows(10)),
        "samples_per_prompt": str(K),
        "max_new_tokens": "12",
        "prompts_per_shard": "4",
    }


def run(arguments: dict[str, str], folder: Path, **extra: str) -> dict:
    named = arguments | {"output_dir": str(folder)} | extra
    return rejection_sampling.main([word for name, value in named.items() for word in (f"--{name}", value)])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8", newline="\n")]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(arguments, folder)


def stored(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("shards/*/*.jsonl.gz")) for row in shards.read_shard(path)]


def test_best_is_the_first_maximum_of_scores_recomputed_from_the_stored_ids(arguments, finished):
    folder, summary = finished
    chat = load_chat_format(load_tokenizer(arguments["model_name_or_path"]))
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(arguments[f"{name}_model_path"]).eval()
        for name in ("helpfulness", "safety")
    }
    rows = stored(folder)
    assert [row["index"] for row in rows] == list(range(10))
    expected, medians = [], []
    for row in rows:
        scores = []
        for i, ids in enumerate(row["response_ids"]):
            full = torch.tensor([chat.encode_prompt(row["prompt"]) + ids])
            with torch.no_grad():
                r = {name: float(model(full).logits) for name, model in models.items()}
            assert r["helpfulness"] == pytest.approx(row["helpfulness"][i], abs=1e-4)
            assert r["safety"] == pytest.approx(row["safety"][i], abs=1e-4)
            # The rule in probabilities, as the paper has it: R_s where tagged or R_s < 0.15, else R_h.
            safety_decides = row["is_safety"] or 1 / (1 + math.exp(-r["safety"])) < 0.15
            scores.append(r["safety"] if safety_decides else r["helpfulness"])
        np.testing.assert_allclose(row["combined"], scores, atol=1e-4)
        allowed = [i for i in range(K) if row["finished"][i] and row["usable"][i]]
        if allowed:
            best = max(allowed, key=lambda i: row["combined"][i])
            median = sorted(allowed, key=lambda i: row["combined"][i])[(len(allowed) - 1) // 2]
            expected.append([*row["prompt"], {"role": "assistant", "content": row["responses"][best]}])
            medians.append([*row["prompt"], {"role": "assistant", "content": row["responses"][median]}])
    assert [row["messages"] for row in rows_of(folder / "best.jsonl")] == expected
    assert [row["messages"] for row in rows_of(folder / "median.jsonl")] == medians
    assert {row["train_on"] for row in rows_of(folder / "best.jsonl")} == {"last"}  # nobody scored the earlier replies
    assert summary["kept"] == len(expected) >= 5


def test_outputs_are_dialogues_and_arrays_of_equal_size(finished):
    folder, summary = finished
    sizes = {len(read_dialogues(folder / f"{kind}.jsonl").rows) for kind in ("best", "median", "random", "worst")}
    assert sizes == {summary["kept"]}
    scores = np.load(folder / "scores.npz", allow_pickle=False)
    assert scores["combined"].shape == scores["finished"].shape == (10, K)
    assert scores["best"].shape == (10,)
    assert json.loads((folder / "summary.json").read_text())["kept"] == summary["kept"]
    assert summary["worst"]["combined"] <= summary["median"]["combined"] <= summary["best"]["combined"]
    assert summary["best_of_n"]["combined"][0] == pytest.approx(scores["combined"].mean(), abs=1e-4)


def fake_row(index: int, combined: list[float], **extra) -> dict:
    size = len(combined)
    row = {"index": index, "is_safety": False, "combined": combined, "helpfulness": combined, "safety": [0.0] * size}
    row |= {"responses": list("abcdefgh"[:size]), "finished": [True] * size, "usable": [True] * size}
    return row | extra


def chosen_by(**extra) -> RejectionSettings:
    return RejectionSettings(prompt_files=[], helpfulness_model_path="h", safety_model_path="s", **extra)


def test_selection_and_summary_by_hand():
    rows = [
        fake_row(0, [1.0, 5.0, 3.0, 5.0], responses=["x", "y", "x", "z"], gold_helpfulness=[0.1, 0.2, 0.3, 0.4]),
        fake_row(1, [9.0, 2.0, 4.0, 8.0], finished=[False, True, True, True], usable=[True, True, True, False],
                 gold_helpfulness=[0.9, 0.5, 0.7, 0.9]),
        fake_row(2, [0.0, 0.5, 0.9, 0.2], gold_helpfulness=[0.0] * 4),
        fake_row(3, [1.0] * 4, finished=[False] * 4, gold_helpfulness=[0.0] * 4),
    ]  # fmt: skip
    settings = chosen_by(min_score=1.0)
    picks, counts = select(rows, settings, seed=0)
    assert picks["best"] == [1, 2, None, None]  # the first of two maxima; the best that may be kept; too low; none
    assert picks["median"] == [2, 1, None, None]
    assert picks["worst"] == [0, 1, None, None]
    assert picks["random"][1] in (1, 2)
    assert counts == {"prompts": 4, "kept": 2, "no_eligible": 1, "below_min_score": 1, "no_choice": 0, "responses": 16,
                      "duplicates": 1, "unfinished": 5, "unusable": 1}  # fmt: skip
    summary = summarise(rows, picks, settings)
    assert summary["best"]["combined"] == 4.5  # (5 + 4) / 2
    assert summary["best"]["gold_helpfulness"] == pytest.approx(0.45)  # (0.2 + 0.7) / 2
    assert summary["median"]["combined"] == 2.5
    kept_all, counts = select(rows, chosen_by(keep_unfinished=True), seed=0)
    assert kept_all["best"] == [1, 0, 2, 0]
    assert counts["kept"] == 4


def test_a_text_drawn_often_weighs_as_often_in_the_median_and_the_random_pick():
    """Eight responses, "a" six times: best "b", worst "c", median and most random picks "a"; one text is no choice."""
    rows = [fake_row(i, [1.0, 1.0, 3.0, 1.0, 1.0, 0.0, 1.0, 1.0], responses=list("aabaacaa")) for i in range(200)]
    rows.append(fake_row(200, [1.0, 1.0, 5.0], responses=["x", "x", "y"], usable=[True, True, False]))
    picks, counts = select(rows, chosen_by(), seed=0)
    texts = {kind: [rows[p]["responses"][i] for p, i in enumerate(column)] for kind, column in picks.items()}
    assert {kind: set(texts[kind][:200]) for kind in ("best", "median", "worst")} == {
        "best": {"b"}, "median": {"a"}, "worst": {"c"}}  # fmt: skip
    share = texts["random"][:200].count("a") / 200
    assert abs(share - 6 / 8) < 0.1  # three standard errors; a third if each text counted once
    assert picks["best"][200] == 0
    assert (counts["duplicates"], counts["no_choice"]) == (200 * 5 + 1, 1)


def test_scores_npz_holds_what_the_shards_hold(finished):
    folder, _ = finished
    arrays, rows = read_scores(folder), stored(folder)
    for name in ("combined", "helpfulness", "safety", "finished", "usable"):
        np.testing.assert_array_equal(arrays[name], [row[name] for row in rows])
    np.testing.assert_array_equal(arrays["seed"], [row["seeds"] for row in rows])
    np.testing.assert_array_equal(arrays["tokens"], [[len(ids) for ids in row["response_ids"]] for row in rows])
    np.testing.assert_array_equal(arrays["is_safety"], [row["is_safety"] for row in rows])
    assert len(set(arrays["prompt_id"].tolist())) == 10
    assert arrays["temperature"].tolist() == [1.2]
    assert (arrays["seconds"] > 0).all()
    for kind in ("best", "median", "random", "worst"):
        kept = [rows[p]["responses"][i] for p, i in enumerate(arrays[kind]) if i >= 0]
        assert [row["messages"][-1]["content"] for row in rows_of(folder / f"{kind}.jsonl")] == kept
    for p, row in enumerate(rows):
        for i, j in enumerate(arrays["duplicate_of"][p]):
            assert (j >= 0) == (row["responses"][i] in row["responses"][:i])
            assert j < 0 or row["responses"][i] == row["responses"][j]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, arrays: path.unlink(), "no such file"),
        (lambda path, arrays: path.write_bytes(path.read_bytes()[:200]), "is damaged"),
        (lambda path, arrays: np.savez(path, combined=arrays["combined"]), "lacks finished"),
        (lambda path, arrays: np.savez(path, **arrays | {"seconds": np.zeros(3)}), r"seconds has the shape \(3,\)"),
        (lambda path, arrays: np.savez(path, **arrays | {"safety": np.full((10, K), np.nan)}), "safety holds a value"),
        (lambda path, arrays: np.savez(path, **arrays | {"tokens": np.full((10, K), None)}), "is damaged"),  # pickled
    ],
)
def test_a_bad_score_file_is_refused_by_name(finished, tmp_path, damage, message):
    path = tmp_path / "scores.npz"
    path.write_bytes((finished[0] / "scores.npz").read_bytes())
    damage(path, read_scores(tmp_path))
    with pytest.raises(UserError, match=f"scores.npz.*{message}"):
        read_scores(tmp_path)


def test_a_score_that_is_no_number_stops_the_run_and_names_the_prompt(arguments, tmp_path, monkeypatch):
    score_ids = rejection_sampling.score_ids

    def broken(model, full, *rest):
        scores = score_ids(model, full, *rest).clone()
        scores[-2] = torch.nan  # of the last prompt of each batch, 4 responses a prompt: response 2
        return scores

    monkeypatch.setattr(rejection_sampling, "score_ids", broken)
    with pytest.raises(UserError, match="prompt 3: the helpfulness score of response 2 is nan"):
        run(arguments, tmp_path)


def test_a_killed_run_continues_and_gives_the_same(arguments, finished, tmp_path, monkeypatch):
    calls = []
    rows = rejection_sampling.Worker.rows

    def killed_at_the_third(self, prompts, indices):
        calls.append(indices[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(self, prompts, indices)

    monkeypatch.setattr(rejection_sampling.Worker, "rows", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(arguments, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    run(arguments, tmp_path)
    assert calls == [0, 4, 8, 8], "finished shards must not be sampled again"
    folder = finished[0]
    for name in ("best.jsonl", "median.jsonl", "random.jsonl", "worst.jsonl"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    run(arguments, tmp_path)
    assert len(calls) == 4, "a complete run returns its summary"
    run(arguments, tmp_path, min_score="-100")
    assert len(calls) == 4, "another selection samples nothing"
    run(arguments, tmp_path, seed="1")
    assert len(calls) == 7, "other settings never take the old shards"


def test_samples_depend_on_neither_shards_nor_batches(arguments, finished, tmp_path):
    run(arguments, tmp_path, prompts_per_shard="3", token_budget="200")
    ours, theirs = ([row["response_ids"] for row in stored(folder)] for folder in (tmp_path, finished[0]))
    assert ours == theirs
    assert [seed for row in stored(tmp_path) for seed in row["seeds"]] == sample_seeds(0, 10 * K)
    assert len({str(ids) for row in ours for ids in row}) > 35, "each sample must have its own seed"


def start_command(arguments: dict[str, str], folder: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[1]
    words = [word for name, value in (arguments | {"output_dir": str(folder)}).items() for word in (f"--{name}", value)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "rlhf/rejection_sampling.py", *words, "--use_cpu", "true"],
        cwd=root,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_separate_commands_share_one_folder_and_one_may_be_killed(arguments, tmp_path):
    """Three commands on one output_dir; the first is killed after one prompt. The folder is as one run leaves it."""
    wanted = arguments | {"prompts_per_shard": "1"}
    alone = run(wanted, tmp_path / "alone")
    folder = tmp_path / "shared"
    commands = [start_command(wanted, folder) for _ in range(2)]
    while not stored(folder):
        assert commands[0].poll() is None
        time.sleep(0.01)
    commands[0].kill()
    commands[0].communicate()
    commands.append(start_command(wanted, folder))
    for command in commands[1:]:
        _, errors = command.communicate(timeout=300)
        assert command.returncode == 0, errors[-2000:]
    assert [row["index"] for row in stored(folder)] == list(range(10))
    for name in ("best.jsonl", "median.jsonl", "random.jsonl", "metrics.jsonl", "samples.jsonl"):
        assert (folder / name).read_text() == (tmp_path / "alone" / name).read_text(), name
    together = json.loads((folder / "summary.json").read_text())
    assert together | {"seconds": 0} == alone | {"seconds": 0}
    assert not list(folder.rglob("*.tmp*"))
    scores = [np.load(path / "scores.npz", allow_pickle=False) for path in (folder, tmp_path / "alone")]
    assert scores[0].files == scores[1].files
    assert all((scores[0][name] == scores[1][name]).all() for name in scores[0].files if name != "seconds")


def test_prompts_on_which_a_server_failed_are_tried_again(arguments, finished, tmp_path, monkeypatch):
    rows = rejection_sampling.Worker.rows
    asked = []

    def failing(self, prompts, indices):
        asked.append(list(indices))
        good = rows(self, prompts, indices)
        down = {1, 6} if len(asked) <= 3 else {6}
        return [{"index": r["index"], "prompt": [], "error": "HTTP 503"} if r["index"] in down else r for r in good]

    monkeypatch.setattr(rejection_sampling.Worker, "rows", failing)
    with pytest.raises(UserError, match="2 of 10 prompts failed"):
        run(arguments, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert run(arguments, tmp_path, max_failed_share="0.1")["failed"] == 1
    assert asked[3:] == [[1], [6]]
    monkeypatch.setattr(rejection_sampling.Worker, "rows", rows)
    assert run(arguments, tmp_path)["failed"] == 0
    assert (tmp_path / "best.jsonl").read_text() == (finished[0] / "best.jsonl").read_text()


def drawn_prompts(arguments, folder, monkeypatch, **extra: str) -> int:
    """Prompts that a start samples, where an earlier one was killed before its end."""
    drawn = []
    rows = rejection_sampling.Worker.rows
    with monkeypatch.context() as patch:
        patch.setattr(rejection_sampling.Worker, "rows", lambda w, p, i: (drawn.extend(i), rows(w, p, i))[1])
        (folder / "summary.json").unlink(missing_ok=True)
        run(arguments, folder, **extra)
    return len(drawn)


def test_what_shapes_no_sample_samples_nothing_again_and_all_else_does(arguments, tmp_path, monkeypatch):
    policy = tmp_path / "policy"
    shutil.copytree(arguments["model_name_or_path"], policy)
    arguments = arguments | {"model_name_or_path": str(policy)}
    run(arguments, tmp_path / "run")
    for name, value in {"token_budget": "4096", "min_score": "-9", "score_token_budget": "512", "lora_r": "4"}.items():
        assert drawn_prompts(arguments, tmp_path / "run", monkeypatch, **{name: value}) == 0, name
    for name, value in {"temperature": "1.1", "top_p": "0.9", "min_p": "0.1", "seed": "5", "stop_strings": "a"}.items():
        assert drawn_prompts(arguments, tmp_path / "run", monkeypatch, **{name: value}) == 10, name
    template = "{% for m in messages %}{% if m.role == 'user' %}<s>Q {{ m.content }} A:{% else %}"
    template += "{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(policy)
    assert drawn_prompts(arguments, tmp_path / "run", monkeypatch) == 10, "another chat template is another prompt"


def test_a_finished_run_notices_other_prompts_under_the_same_name(arguments, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, prompt_rows(6))
    assert run(arguments, tmp_path / "run", prompt_files=str(prompts))["prompts"] == 6
    write_rows(prompts, prompt_rows(4))
    assert run(arguments, tmp_path / "run", prompt_files=str(prompts))["prompts"] == 4


def test_what_is_trained_does_not_say_the_stop_string(arguments, tmp_path):
    run(arguments, tmp_path, stop_strings="e", max_new_tokens="30")
    rows = stored(tmp_path)
    assert not any("e" in text for row in rows for text in row["responses"])
    tokenizer = load_tokenizer(arguments["model_name_or_path"])
    ends = [
        finished and "e" in tokenizer.decode(ids[-1:])
        for row in rows
        for ids, finished in zip(row["response_ids"], row["finished"], strict=True)
    ]
    assert any(ends), "some responses end by the string, which stays in their ids"
    assert before_stop_string("one. two\nHuman: three", ["Human:", "two"]) == "one. "
    assert before_stop_string("one", []) == "one"


def test_a_policy_without_an_output_layer_is_refused(arguments, tmp_path):
    with pytest.raises(UserError, match="no causal language model: it lacks the weights lm_head.weight"):
        run(arguments, tmp_path, model_name_or_path=arguments["safety_model_path"])


def test_gold_scores_stand_beside_the_rewards(arguments, tmp_path):
    prompts = write_rows(tmp_path / "world.jsonl", draw_prompts(0, 8))
    summary = run(arguments, tmp_path / "run", prompt_files=prompts, gold="simulated", keep_unfinished="true")
    assert 0.0 <= summary["best"]["gold_helpfulness"] <= 1.0
    assert len(summary["best_of_n"]["gold_helpfulness"]) == K


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("samples_per_prompt", "0", "samples_per_prompt"),
        ("temperature", "0", "temperature"),
        ("safety_threshold", "1.5", "safety_threshold"),
        ("max_failed_share", "1", "max_failed_share"),
        ("min_score", "nan", "min_score must be a number"),
        ("use_peft", "true", "use_peft and freeze_embeddings are for training"),
        ("score_token_budget", "-1", "score_token_budget must not be negative"),
        ("stop_token_ids", "99999", "stop_token_ids: 99999 is not among"),
        ("attn_implementation", "flash_attention_2", "no causal language model can be loaded|needs sdpa or eager"),
        ("max_new_tokens", "600", "max_new_tokens 600 leaves no room"),
        ("max_new_tokens", "490", "prompt too long"),
    ],
)
def test_bad_settings_are_refused(arguments, tmp_path, name, value, message):
    with pytest.raises(UserError, match=message):
        run(arguments, tmp_path, **{name: value})


def test_a_reward_model_with_another_tokenizer_is_refused(arguments, tmp_path):
    path = save_tiny_reward_model(tmp_path / "reward", seed=1)
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens(["one", "two", "three"])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="safety_model_path: .* another tokenizer"):
        run(arguments, tmp_path / "run", safety_model_path=path)
