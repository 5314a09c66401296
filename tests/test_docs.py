"""What the README and docs/ say is true: commands parse, files and links exist, and the scripts start as they show.

A command is checked with the programs' own parsers: accelerate's for the launcher's flags, the script's settings for
the rest, the YAML included. That every stage then really runs is shown by the demo's own YAML with tiny sizes.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_tiny_policy
from transformers import LlamaForCausalLM

from configs.records import write_jsonl
from rlhf import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(p for p in (ROOT / "rlhf").rglob("*.py") if "entry(main)" in p.read_text(encoding="utf-8"))
PLAIN = ("source", "cp", "pip", "git", "jupyter")  # words that may begin a command and are not ours to check


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every command in a bash block; a line that ends in a backslash goes on."""
    found = []
    for path in DOCS:
        for block in fenced(path.read_text(encoding="utf-8"), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append((path.name, words))
    return found


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, None where nothing is."""
    try:
        if words[:2] == ["accelerate", "launch"]:
            check_launch(words[2:])
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"no file {words[1]}"  # tests/test_examples.py runs it
        elif words[:2] == ["python", "-m"]:
            check_module(words[2], words[3:])
        elif words[0] == "make":
            check_make(words[1:])
        elif words[0] not in PLAIN:
            return f"unknown program {words[0]}"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


@cache
def parsed_types(script: str) -> tuple[type, ...]:
    """The dataclasses that a script's main parses, read off its call of `parse`."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("parse", "cli.parse"):
            return tuple(getattr(module, ast.unparse(name)) for name in node.args)
    raise AssertionError(f"{script} calls no parse")


def check_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    launched = launch_command_parser().parse_args(words)
    assert ROOT / launched.training_script in SCRIPTS, f"{launched.training_script} is no script of rlhf/"
    given = launched.training_script_args
    for i, word in enumerate(given[:-1]):  # as from the repository's root; a run's own config is made by the run
        if word == "--config" and given[i + 1].startswith("configs/"):
            given[i + 1] = str(ROOT / given[i + 1])
        elif word == "--config":
            return
    cli.parse(*parsed_types(launched.training_script), args=given)


def check_module(name: str, words: list[str]) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"no module {name}"
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source, f"{name} has no {word}"


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^{name}:"
        assert re.search(pattern, text, re.M), f"the Makefile has no {name}"


@pytest.mark.parametrize(("file", "words"), commands(), ids=lambda x: " ".join(x[:6]) if isinstance(x, list) else x)
def test_a_documented_command_parses(file, words):
    assert fault(words) is None


def commands_of_configs() -> list[tuple[str, list[str]]]:
    """(file, words) of every command in the comments of a config; a line that ends in a backslash goes on."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        text = re.sub(r"\\\n#", "", path.read_text(encoding="utf-8"))
        found += [(path.name, shlex.split(line)) for line in re.findall(r"^#\s+(accelerate launch .*)", text, re.M)]
    return found


@pytest.mark.parametrize(
    ("file", "words"), commands_of_configs(), ids=lambda x: " ".join(x[:6]) if isinstance(x, list) else x
)
def test_a_command_at_the_top_of_a_config_parses(file, words):
    assert fault(words) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make dem", "no dem"),
        ("make demo SEEDS=1", "no SEEDS"),
        ("accelerate launch rlhf/sfd.py", "no script"),
        ("accelerate launch rlhf/cli.py", "no script"),
        ("accelerate launch rlhf/sft.py --config configs/none.yaml", "No such file"),
        ("accelerate launch rlhf/sft.py --config configs/llama2_7b_ppo.yaml", "unknown field"),
        ("accelerate launch rlhf/sft.py --model_name_or_path m --output_dir o --lora_rank 8", "did you mean 'lora_r'"),
        ("accelerate launch rlhf/sft.py --model_name_or_path m --output_dir o --lora_r high", "lora_r"),
        ("accelerate launch --no_such_flag rlhf/sft.py --model_name_or_path m --output_dir o", "SystemExit"),
        ("python -m rlhf.simulation.base --steps 8", "has no --steps"),
        ("python -m rlhf.simulation.bass", "no module"),
        ("curl x", "unknown program"),
    ],
)
def test_the_check_finds_each_fault(command, message):
    assert message in str(fault(shlex.split(command)))


def test_every_stage_has_a_command_in_the_readme():
    documented = {Path(word).name for _, words in commands() for word in words if word.startswith("rlhf/")}
    assert {script.name for script in SCRIPTS} <= documented


def test_example_records_are_read():
    """Each JSON line of the docs is a record of the kind that the text before it names."""
    from configs import records
    from configs.row_files import write_jsonl
    from rlhf.labels import import_labels

    seen = set()
    for path in DOCS:
        for kind, block in re.findall(r"<!-- record: (\w+) -->\n+```json\n(.*?)```", path.read_text(), re.S):
            rows = [json.loads(line) for line in block.splitlines() if line.strip()]
            seen.add(kind)
            if kind == "labelled":
                made, mistakes, _ = import_labels(json.dumps(row) for row in rows)
                assert mistakes == []
                assert sum(map(len, made.values())) == len(rows)
                continue
            file = Path(os.environ.get("TMPDIR", "/tmp")) / f"docs-{os.getpid()}.jsonl"
            try:
                write_jsonl(file, rows)
                read = getattr(records, f"read_{kind}s")(file, max_reject_share=0.0)
            finally:
                file.unlink(missing_ok=True)
            assert len(read.rows) == len(rows)
    assert seen == {"dialogue", "preference", "prompt", "labelled"}


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve():
    broken = []
    for path in DOCS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", target):
                continue
            file, _, anchor = target.partition("#")
            goal = (path.parent / file) if file else path
            if file.startswith("docs/results/") and not (ROOT / "docs/results").exists():
                continue  # written from a run of the demo
            if not goal.exists() or (anchor and anchor not in anchors(goal)):
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_the_demo_has_its_place_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- demo-table -->") == text.count("<!-- /demo-table -->") == 1
    assert text.index("<!-- demo-table -->") < text.index("<!-- /demo-table -->")
    assert "(docs/results/demo.png)" in text


def listed_files() -> list[str]:
    """The paths of the README's file tree: a line that ends in / names a folder, an indented line a file in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = fenced(text.split("## File tree")[1], "text")
    folder, found = "", []
    for line in tree.splitlines():
        if not line.strip():
            continue
        word, _, words = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = word if word.endswith("/") else ""
        if word.endswith("/"):
            continue
        assert words.strip(), f"{word} has no line"
        found.append((folder if line.startswith(" ") else "") + word)
    return found


def test_the_file_tree_is_complete():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout: nothing says which files belong to the project")
    left_out = re.compile(r"__init__\.py$|^docs/results/|^rlhf/simulation/base_model/|^\.git")
    tracked = {name for name in git.stdout.splitlines() if not left_out.search(name)}
    listed = listed_files()
    assert sorted(listed) == sorted(set(listed)), "a file is listed twice"
    assert sorted(tracked - set(listed)) == [], "not in the file tree of the README"
    assert [name for name in listed if not (ROOT / name).exists()] == [], "in the file tree, but not there"


def test_scripts_repair_the_path_before_they_import_the_packages():
    # Launched by path, Python puts the script's own folder first: `import reward` would fail.
    assert len(SCRIPTS) >= 10
    for path in SCRIPTS:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        depth = len(path.relative_to(ROOT).parts) - 1
        kinds = []
        for node in body:
            if isinstance(node, ast.If) and "__package__" in ast.unparse(node.test):
                assert f".resolve().parents[{depth}]" in ast.unparse(node), f"{path.name} goes up the wrong way"
                kinds.append("repair")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if str(name).split(".")[0] in ("configs", "reward", "gatt", "rlhf"):
                    kinds.append("ours")
        assert kinds[0] == "repair", path.name
        assert kinds.count("repair") == 1, path.name


def launch(*words: str, folder: Path, timeout: float) -> subprocess.CompletedProcess:
    """`accelerate launch ...` as in the README, in a new process, from the repository's root and with a clean path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


# The demo's own YAML with sizes that take a second a stage. `�` is what random bytes decode to, so a policy that
# knows nothing obeys "You enjoy �." now and then, and Ghost Attention dialogues can be built from it.
TINY = {
    "simulation.make_data": {
        "demonstrations": 24, "preference_prompts": 160, "rl_prompts": 48, "validation_prompts": 4,
        "evaluation_prompts": 12, "gatt_prompts": 12, "family_prompts": 1,
    },
    "sft": {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 1024, "num_samples": 1, "bf16": False,
            "sample_max_new_tokens": 4, "learning_rate": 1.0e-5},
    "collect_preferences": {"max_new_tokens": 8, "test_fraction": 0.3},
    "train_reward": {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False},
    "rejection_sampling": {"samples_per_prompt": 2, "max_prompts": 8, "max_new_tokens": 8, "keep_unfinished": True},
    "ppo": {"total_iterations": 2, "batch_size": 4, "mini_batch_size": 2, "max_new_tokens": 8, "eval_steps": 1},
    "distil_safety": {"max_prompts": 4, "max_new_tokens": 8, "gate": False, "keep_unfinished": True},
    "build_gatt": {"num_dialogues": 6, "min_turns": 1, "max_turns": 2, "max_candidates": 4, "max_new_tokens": 24,
                   "chunk_size": 64, "replay_single_turn_share": 0.2},
    "evaluate_gatt": {"num_dialogues": 2, "num_turns": 2, "eval_max_new_tokens": 8},
    "evaluate_policy": {"max_new_tokens": 8},
}  # fmt: skip


def tiny_demo(folder: Path) -> tuple[Path, dict]:
    """The demo's YAML with tiny sizes and a tiny random base model: (its path, its content)."""
    base = save_tiny_policy(folder / "base", max_position_embeddings=8192)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4  # its end token is likely enough that most replies end
    model.save_pretrained(base)
    values = folder / "values.json"
    values.write_text(json.dumps({"hobby": ["�"]}))
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))
    for stage in config["stages"]:
        settings = dict(stage.get("settings") or {}) | TINY.get(stage["run"], {})
        stage.pop("threads", None)
        if "base_model" in settings.get("model_name_or_path", ""):
            settings["model_name_or_path"] = base
        if stage["run"] == "build_gatt":
            settings |= {"values_file": str(values), "kinds": ["hobby"]}
        stage["settings"] = settings
    config |= {"parallel_stages": 1, "output_dir": str(folder / "run")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path, config


def test_every_stage_of_the_demo_runs_under_accelerate_launch(tmp_path):
    path, config = tiny_demo(tmp_path)
    done = launch("rlhf/pipeline.py", "--config", str(path), folder=tmp_path, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    run = tmp_path / "run"
    for stage in config["stages"]:
        folder = run / stage["name"]
        assert json.loads((folder / "summary.json").read_text())["stage"], stage["name"]
        assert (folder / "settings.yaml").exists()
        assert (folder / "environment.json").exists()
        assert (folder / "metrics.jsonl").exists(), stage["name"]
    trained = [stage["name"] for stage in config["stages"] if stage["run"] in ("sft", "train_reward", "ppo")]
    for name in trained:
        assert (run / name / "model" / "model.safetensors").exists()
        assert (run / name / "model" / "README.md").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["base", "sft", "rejection_sampling", "ppo", "gatt"]
    assert "<html" in (run / "report.html").read_text()


SMALLEST = {
    "num_prompts": 8, "num_validation": 2, "num_evaluation": 4, "max_prompt_tokens": 200, "max_new_tokens": 24,
    "sft_max_length": 400, "reward_rows": 8, "reward_test_fraction": 0.3, "reward_max_length": 400,
    "best_of_prompts": 4, "best_of": 2, "ppo_iterations": 2, "ppo_batch": 4, "ppo_mini_batch": 2,
    "ppo_responses_per_prompt": 2, "ppo_eval_steps": 1, "gatt_dialogues": 16, "gatt_max_turns": 2,
    "gatt_test_dialogues": 2, "gatt_test_turns": 2, "bf16": "false",
}  # fmt: skip


def hh_rows(kind: str, count: int) -> list[dict[str, str]]:
    """HH-RLHF transcripts of made-up requests."""
    asked = [f"\n\nHuman: {kind} request {i}\n\nAssistant:" for i in range(count)]
    return [{"chosen": f"{text} Certainly, {i}.", "rejected": f"{text} No."} for i, text in enumerate(asked)]


@pytest.mark.slow
def test_every_stage_of_the_small_real_model_runs_in_one_command(tmp_path):
    base = save_tiny_policy(tmp_path / "base", max_position_embeddings=8192)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4  # its end token is likely enough that most replies end
    model.save_pretrained(base)
    taught = tmp_path / "values.json"
    taught.write_text(json.dumps({"hobby": ["�"]}))  # as for the demo
    values = {"model": base, "gatt_kinds": "[hobby]", "gatt_values_file": taught, **SMALLEST}
    for name, count in (("helpfulness", 40), ("safety", 40), ("helpfulness_test", 8), ("safety_test", 8)):
        write_jsonl(tmp_path / f"{name}.jsonl", hh_rows(name, count))
        values[f"{name}_data"] = str(tmp_path / f"{name}.jsonl")
    run = tmp_path / "run"
    words = [f"{name}={value}" for name, value in values.items()]
    done = launch("rlhf/pipeline.py", "--config", "configs/smollm2-135m_cpu.yaml", "--output_dir", str(run),
                  "--values", *words, folder=tmp_path, timeout=300)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    stages = yaml.safe_load((ROOT / "configs/smollm2-135m.yaml").read_text(encoding="utf-8"))["stages"]
    assert all((run / stage["name"] / "summary.json").exists() for stage in stages)
    adapters = ("reward_safety", "judge_safety", "rejection_sft", "ppo", "gatt_sft")
    assert all((run / name / "model/adapter/adapter_model.safetensors").exists() for name in adapters)
    assert {"helpfulness", "safety"} <= json.loads((run / "gate_ppo_since_sft/summary.json").read_text()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_launched_by_its_path_shows_its_fields(script, tmp_path):
    done = launch(str(script.relative_to(ROOT)), "--help", folder=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    # A script that only shows something writes no run folder.
    assert ("--train_file" if script.stem == "inspect_gatt" else "--output_dir") in done.stdout
