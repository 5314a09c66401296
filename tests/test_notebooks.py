"""The notebooks: clean as committed, and executed from top to bottom on tiny models of the simulated world."""

import os
import random
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from configs.records import write_jsonl
from reward.model import create_reward_model, save_reward_model
from rlhf.collect_preferences import annotate_pairs
from rlhf.models import load_tokenizer
from rlhf.simulation.people import Mix, demonstrate, draw_dialogue
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


def execute(**environment: str) -> nbformat.NotebookNode:
    """reward_scores.ipynb, executed in its own folder as Jupyter does it, without a network or display."""
    notebook = nbformat.read(ROOT / "notebooks/reward_scores.ipynb", as_version=4)
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
