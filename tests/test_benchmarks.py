"""The benchmarks compare like with like: ours and the peer compute the same thing on the same pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import hh_pairs, reward_training

ROOT = Path(__file__).resolve().parents[1]


def last_line(tmp_path, *words):
    """The JSON line of a benchmark, run without real data."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RLHF_KIT": str(tmp_path / "none")}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_reward_training_has_the_loss_and_gradients_of_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(hh_pairs, "KIT", tmp_path / "none")
    pairs, data = hh_pairs.hh_pairs(reward_training.BATCH)
    assert data == "generated"
    reward_training.save_model(str(tmp_path / "model"))
    found = reward_training.check_equal(pairs, str(tmp_path / "model"), str(tmp_path / "scratch"))  # raises where not
    assert found["loss_difference"] <= 1e-5
    assert found["gradient_cosine"] >= 0.9999


def test_reward_scoring_gives_the_scores_of_plain_transformers(tmp_path):
    words = ("benchmarks/reward_scoring.py", "--rounds", "1", "--prompts", "2", "--k", "4")
    assert last_line(tmp_path, *words)["data"] == "generated"


def test_best_of_k_samples_what_generate_samples(tmp_path):
    """The benchmark stops where greedy responses differ, or the lengths of sampled ones."""
    words = "--rounds 1 --prompts 4 --k 2 --max_new_tokens 16 --train_steps 2 --peer_prompts 2"
    found = last_line(tmp_path, "benchmarks/best_of_k.py", *words.split())
    assert (found["data"], found["prompts"], found["k"]) == ("generated", 4, 2)
    assert found["fed"]["peer_prompt"] > 2 * found["fed"]["ours_prompt"] * 0.99
    assert found["memory_mib"]["ours"] > 0
