"""The notebooks: clean as committed, and executed from top to bottom on tiny models of the simulated world."""

import os
import random
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, write_rows

from configs.records import write_jsonl
from reward.model import create_reward_model, save_reward_model
from rlhf import ppo
from rlhf.collect_preferences import annotate_pairs
from rlhf.simulation.people import Mix, demonstrate, draw_dialogue
from rlhf.tokenizer import load_tokenizer
from rlhf.train_reward import main

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BASE_MODEL = ROOT / "rlhf/simulation/base_model"
ABSOLUTE = re.compile(r"(?<![\w.~/:}])/(?:home|root|tmp|Users|mnt|opt|usr|work|content|data)/|\b[A-Z]:\\")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert ABSOLUTE.search(cell.source) is None, cell.source
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_check_finds_absolute_paths():
    assert all(ABSOLUTE.search(text) for text in ('"/home/me/run"', "open('/tmp/x')", r"C:\runs"))
    assert not any(ABSOLUTE.search(text) for text in ("runs/tmp/x", "https://host/data/x", "f'{RUN}/data/x'"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder like the demo's: a run of two steps, a model folder without a run, and labelled pairs of both kinds."""
    folder = tmp_path_factory.mktemp("run")
    rng = random.Random(0)
    rows = []
    while len(rows) < 90:
        messages, request = draw_dialogue(rng, Mix(risky=0.4, instructed=0), 1)
        other = demonstrate(rng, request)
        if other != messages[-1]["content"]:
            rows.append({"id": len(rows), "prompt": messages[:-1], "is_safety": not hasattr(request, "family"),
                         "response_a": messages[-1]["content"], "response_b": other, "variants": [0, 1]})  # fmt: skip
    for name, records in annotate_pairs(rows, noise=0.1, seed=0)[0].items():
        write_jsonl(folder / "collect" / f"{name}_test.jsonl", records)
    pairs = str(folder / "collect" / "helpfulness_test.jsonl")
    main(["--model_name_or_path", str(BASE_MODEL), "--output_dir", str(folder / "reward_helpfulness"), "--max_steps",
          "2", "--train_files", pairs, "--eval_files", pairs, "--leaked_prompts", "keep",
          "--use_cpu", "true"])  # fmt: skip
    tokenizer = load_tokenizer(str(BASE_MODEL))
    save_reward_model(create_reward_model(BASE_MODEL, tokenizer, seed=1), tokenizer, folder / "reward_safety", "card")
    return folder


def execute(name: str = "reward_scores", **environment: str) -> nbformat.NotebookNode:
    """A notebook, executed in its own folder as Jupyter does it, without a network or display."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | own | environment)
    return notebook


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What cells showed of one MIME type, or wrote to "stdout" or "stderr"."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data[kind] for output in found if kind in output.get("data", {})]
    return shown or ["".join(output.text for output in found if output.get("name") == kind)]


def test_the_reward_notebook_shows_all_its_figures(run):
    notebook = execute(RUN=str(run), MAX_PAIRS="12")
    assert len(outputs(notebook, "image/png")) == 5  # scores, margins, reliability, agreement, one response
    pages = outputs(notebook, "text/html")
    assert sum("<table>" in page for page in pages) >= 3  # the pairs they disagree on, and two of your own texts
    assert sum("largest step" in page for page in pages) == 4 + 2  # two models on two responses; two score cards
    (said,) = outputs(notebook, "stdout")
    assert "helpfulness model: prefers the chosen response" in said
    assert "of 12 pairs" in said
    (noise,) = outputs(notebook, "stderr")
    assert re.sub(r"\rpairs: [^\r]*|\r *", "", noise) == ""  # the progress bar, which clears itself, and nothing else


@pytest.mark.slow
def test_the_reward_notebook_takes_one_model_and_says_what_is_missing(run):
    notebook = execute(RUN=str(run), MAX_PAIRS="8", SAFETY_MODEL="")
    assert len(outputs(notebook, "image/png")) == 4
    assert "This needs both models." in outputs(notebook, "stdout")[0]
    with pytest.raises(CellExecutionError) as caught:
        execute(RUN="runs/none")
    assert "Traceback" not in caught.value.traceback
    last = caught.value.traceback.strip().splitlines()[-1]
    assert last.startswith("error: there is no reward model at runs/none/reward_helpfulness. Run `make demo`")


@pytest.fixture(scope="module")
def ppo_runs(tmp_path_factory):
    """A PPO run of two iterations, and the same run as it is while it writes a line of its third."""
    root = tmp_path_factory.mktemp("ppo")
    prompts = [write_rows(root / f"{name}.jsonl", prompt_rows(8, seed)) for seed, name in enumerate(("train", "test"))]
    models = [save_tiny_reward_model(root / name, seed) for seed, name in enumerate(("helpfulness", "safety"))]
    ppo.main(["--model_name_or_path", save_tiny_policy(root / "policy"), "--helpfulness_model_path", models[0],
              "--safety_model_path", models[1], "--prompt_files", prompts[0], "--eval_prompt_file", prompts[1],
              "--output_dir", str(root / "finished"), "--use_cpu", "true", "--logging_steps", "1", "--batch_size", "8",
              "--mini_batch_size", "8", "--max_new_tokens", "6", "--total_iterations", "2",
              "--eval_steps", "1"])  # fmt: skip
    shutil.copytree(root / "finished", root / "running")
    (root / "running" / "summary.json").unlink()
    for name in ("metrics", "samples"):
        with (root / "running" / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "reward/com')
    alarm = {"step": 2, "alarm": "kl_high", "event": "raised", "text": "far <b>away</b>"}
    write_rows(root / "running" / "alarms.jsonl", [alarm])
    return root


def test_the_ppo_notebook_shows_a_finished_run_beside_one_that_goes_on(ppo_runs):
    notebook = execute("ppo_run", RUNS=f"{ppo_runs / 'finished'},{ppo_runs / 'running'}", PROMPTS="2")
    assert len(outputs(notebook, "image/png")) == 5  # rewards, frontier, policy, responses, time; nobody judges here
    (said,) = outputs(notebook, "stdout")
    assert "finished: finished after 2 of 2 iterations" in said
    assert "running: 2 of 2 iterations, not finished" in said
    alarms, over_time, latest, times = outputs(notebook, "text/html")
    assert "far &lt;b&gt;away&lt;/b&gt;" in alarms
    assert over_time.count("<table>") == 2
    assert "iteration 0</th>" in over_time
    assert "iteration 2</th>" in over_time
    assert latest.count("<tr>") == 1 + 2 * 4
    assert "MiB" in times
    assert "Neither judge nor true score was logged." in outputs(notebook, "text/plain")
    assert outputs(notebook, "stderr") == [""]


@pytest.mark.slow
def test_the_ppo_notebook_says_what_is_missing():
    with pytest.raises(CellExecutionError) as caught:
        execute("ppo_run", RUNS="runs/none")
    assert "Traceback" not in caught.value.traceback
    last = caught.value.traceback.strip().splitlines()[-1]
    assert last.startswith("error: there is no PPO run at runs/none. Run `make demo`")


@pytest.fixture(scope="module")
def gatt_run(tmp_path_factory):
    """Two policies, prompts for the user's turns, and a training row."""
    folder = tmp_path_factory.mktemp("gatt")
    for seed, name in enumerate(("ppo", "gatt_sft")):
        save_tiny_policy(folder / name / "model", seed)
    (folder / "world").mkdir()
    (folder / "build_gatt").mkdir()
    write_rows(folder / "world" / "gatt_evaluation_prompts.jsonl", prompt_rows(8))
    messages = [{"role": "user", "content": "Act as a cat. the dog"}, {"role": "assistant", "content": "<b>red</b>"}]
    given = {"wording": "Act as a cat.", "slot": "user"}
    rows = [{"messages": messages, "instruction": given, "source": "gatt"}, {"messages": messages}]
    write_rows(folder / "build_gatt" / "gatt.jsonl", rows)
    return folder


def test_the_attention_notebook_shows_both_models_on_the_same_dialogues(gatt_run):
    small = {"DIALOGUES": "2", "TURNS": "2", "MAX_LENGTH": "512"}
    notebook = execute("gatt_attention", RUN=str(gatt_run), **small)
    assert len(outputs(notebook, "image/png")) == 3  # the map, its left edge, the curves
    (said,) = outputs(notebook, "stdout")
    assert "2 dialogues of" in said
    for target in ("the instruction", "the first question"):
        for name in ("before", "after"):
            assert re.search(rf"to {target}, {name}: turn 1: 0\.\d\d\d, turn 2: 0\.\d\d\d", said)
    (page,) = outputs(notebook, "text/html")
    assert "in the user slot of turn 1" in page
    assert "<b>red" not in page
    assert outputs(notebook, "stderr") == [""]
