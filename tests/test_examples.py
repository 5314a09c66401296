"""The examples of docs/rewards.md: the documented commands run as they stand, the code shown is the files'."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.score_files import read_scores

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
BASH = [block.replace("\\\n", " ") for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)]
COMMANDS = [shlex.split(line) for block in BASH for line in block.splitlines()]


def documented(script: str) -> list[str]:
    """The command on the embedded base model, or the plain one."""
    (words,) = [c for c in COMMANDS if script in c and ("rlhf/simulation/base_model" in c or c[0] == "python")]
    return words


def run(words: list[str], folder: Path) -> str:
    """Run a command in a folder that looks like the repository's root, so that what it writes stays there."""
    for name in ("configs", "docs", "gatt", "reward", "rlhf"):
        (folder / name).symlink_to(ROOT / name)
    program = {"accelerate": ["-m", "accelerate.commands.accelerate_cli"], "python": []}[words[0]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    if words[0] == "python":
        environment["PYTHONPATH"] = str(ROOT)  # `make setup` installs the packages
    done = subprocess.run([sys.executable, *program, *words[1:]], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_ppo_from_python_learns_its_reward(tmp_path):
    printed = run(documented("docs/examples/ppo_from_python.py"), tmp_path)
    scores = [float(score) for score in re.findall(r"score (-?[\d.]+),", printed)]
    assert len(scores) == 6
    assert scores[0] < -1 < -0.5 < scores[-1]  # most answers are cut off at first; then they are short
    assert re.search(r"iteration 1: .* KL -?0\.000 nats", printed)  # the reference is the policy at the start
    assert (tmp_path / "runs/ppo-from-python/model.safetensors").exists()


@pytest.mark.slow
def test_ppo_on_the_function_of_the_docs(tmp_path):
    run(documented("rlhf/ppo.py"), tmp_path)
    metrics = lines(tmp_path / "runs/short-answers-ppo/metrics.jsonl")
    assert len(metrics) == 3
    for row in metrics:
        assert row["reward/combined"] == pytest.approx(row["reward/brevity"])
    for sample in lines(tmp_path / "runs/short-answers-ppo/samples.jsonl"):
        assert sample["reward_brevity"] == pytest.approx(-len(sample["response"]) / 100)


@pytest.mark.slow
def test_rejection_sampling_by_the_functions_of_the_docs(tmp_path):
    run(documented("rlhf/rejection_sampling.py"), tmp_path)
    arrays = read_scores(tmp_path / "runs/short-answers-best")
    assert arrays["combined"].shape == (8, 4)
    expected = arrays["function_brevity"] + 0.5 * arrays["function_no_repetition"]
    assert arrays["combined"] == pytest.approx(expected, abs=1e-6)


def test_the_code_shown_is_the_files():
    shown = re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", TEXT, re.S)
    assert {name for name, _ in shown} == {"short_answers", "ppo_from_python"}
    for name, code in shown:
        file = (ROOT / f"docs/examples/{name}.py").read_text(encoding="utf-8")
        assert "".join(code.split()) in "".join(file.split())  # the docs show it without its indentation
