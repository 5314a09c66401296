"""What pooling does when later prompts stop asking some things: the paper's V3 regression (§3.2.3), simulated.

    python benchmarks/rejection_rounds.py --demo_dir runs/demo [--pools all last] [--absent list steps sum]

Runs the rounds of configs/rounds_demo.yaml, reward models as the demo left them, once with `pool: all` and once with
`pool: last`. Round 1 asks everything; from round 2 on the prompts of the `--absent` families are left out. Every round
is fine-tuned from the base model. Reported by round: true scores over the absent and over the remaining families, with
95 % intervals, the change against round 1, and what the pools differ by, prompt by prompt.

Then distillation: a student of the base model's first two layers on the pool of each round (of `all`), against the same
student on demonstrations: all of them, one epoch as in the demo, and as many as the last pool has, as many epochs.

A finished stage is not run again, so the two pools can be run at the same time. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts benchmarks/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: E402,I001  (first: it switches off telemetry before trl is imported)

import yaml  # noqa: E402
from rich.console import Console  # noqa: E402

from configs.pipeline_settings import PipelineSettings  # noqa: E402
from configs.errors import UserError  # noqa: E402
from configs.records import write_jsonl  # noqa: E402
from rlhf import rounds  # noqa: E402
from rlhf.estimates import mean_with_interval, paired_bootstrap  # noqa: E402
from rlhf.pipeline import ROOT, read_stages, run_stages  # noqa: E402
from rlhf.rounds_report import family_score, prompt_means, read_round  # noqa: E402

Row = dict[str, Any]
DEMO = ROOT / "configs" / "rounds_demo.yaml"
LEFT_OUT = ("retrain_from_round", "preference_dirs", "collect_preferences", "reward_helpfulness", "reward_safety")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file. UserError where it is missing."""
    if not path.exists():
        raise UserError(f"--demo_dir: {path} is not there; finish `make demo` first or name its folder")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_prompts(demo_dir: Path, output_dir: Path, absent: Sequence[str], prompts: int, count: int) -> None:
    """The prompts of each round, `prompts` each; from round 2 on without the absent families."""
    world = demo_dir / "world"
    first, second = (read_rows(world / f"rl_prompts-{half}.jsonl") for half in (1, 2))
    if unknown := set(absent) - {row["source"] for row in first}:
        raise UserError(f"--absent: no family {sorted(unknown)} in {world}")
    rest = [row for row in [*second, *first[prompts:]] if row["source"] not in absent]
    for number in range(1, count + 1):
        rows = first[:prompts] if number == 1 else rest[(number - 2) * prompts : (number - 1) * prompts]
        if len(rows) < prompts:
            raise UserError(f"--prompts {prompts} --rounds {count}: round {number} would have {len(rows)} prompts only")
        write_jsonl(output_dir / "prompts" / f"{number}.jsonl", rows)


def run_rounds(options: argparse.Namespace, pool: str) -> Path:
    """Runs what is missing of one variant; returns its folder."""
    text = DEMO.read_text(encoding="utf-8").replace("runs/demo", str(options.demo_dir))
    settings = {name: value for name, value in yaml.safe_load(text).items() if name not in LEFT_OUT}
    folder = options.output_dir / pool
    settings |= {"output_dir": str(folder), "rounds": options.rounds, "pool": pool, "seed": options.seed}
    settings |= {"parallel_stages": options.parallel_stages, "by_round": {}}
    prompts = {"prompt_files": [str(options.output_dir / "prompts" / "${round}.jsonl")], "max_prompts": 0}
    settings["rejection_sampling"] |= prompts
    settings["evaluate_policy"]["samples_per_prompt"] = options.samples
    if pool != "all":  # one variant has the student
        settings |= {"student_model_path": "", "student_layers": 0}
    config = options.output_dir / f"{pool}.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    rounds.main(["--config", str(config)])
    return folder


def run_students(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The student on demonstrations; {name: folder of its evaluation}, those of the rounds in `folder` included."""
    demonstrations = read_rows(options.demo_dir / "world" / "demonstrations.jsonl")
    pooled = json.loads((folder / f"v{options.rounds}" / "pool_samples" / "summary.json").read_text())["rows"]
    last = yaml.safe_load((folder / "v1" / "student_sft" / "stage.yaml").read_text())
    evaluation = yaml.safe_load((folder / "v1" / "student_evaluate_policy" / "stage.yaml").read_text())
    stages: list[Row] = []
    variants = {"all_demonstrations": (demonstrations, 1), "as_many_demonstrations": (demonstrations[:pooled], None)}
    for name, (rows, epochs) in variants.items():
        file = options.output_dir / "prompts" / f"{name}.jsonl"
        write_jsonl(file, rows)
        own = {"train_files": [str(file)]} | ({"num_train_epochs": epochs} if epochs else {})
        stages.append({"name": name, "run": "sft", "settings": last | own})
        model = {"model_name_or_path": "${output_dir}/" + name + "/model"}
        stages.append({"name": f"evaluate_{name}", "run": "evaluate_policy", "needs": [name],
                       "settings": evaluation | model})  # fmt: skip
    students = options.output_dir / "students"
    pipeline = PipelineSettings(stages, str(students), options.seed, options.parallel_stages)
    run_stages(read_stages(pipeline), options.parallel_stages, Console(highlight=False))
    found = {name: students / f"evaluate_{name}" for name in variants}
    for number in range(1, options.rounds + 1):
        found[f"samples_v{number}"] = folder / f"v{number}" / "student_evaluate_policy"
    return found


def scores(folder: Path, absent: Sequence[str]) -> dict[str, dict[int, float]]:
    """{"absent", "present" and each family: {prompt's place: true score}} of a finished evaluation."""
    found = read_round(folder)
    if found is None:
        raise UserError(f"{folder} is not complete; start the same command again")
    rows = found["rows"]
    by_family: dict[str, dict[int, float]] = {}
    for i, row in enumerate(rows):
        if field := family_score(row):
            by_family.setdefault(row["source"], {})[i] = prompt_means([row], field)[0]
    groups = {"absent": [f for f in by_family if f in absent], "present": [f for f in by_family if f not in absent]}
    joined = {name: {i: s for f in members for i, s in by_family[f].items()} for name, members in groups.items()}
    return joined | dict(sorted(by_family.items()))


def change(before: dict[int, float], after: dict[int, float]) -> list[float]:
    """[mean, low, high] of after - before over the same prompts."""
    mean, (low, high) = paired_bootstrap([before[i] for i in after], list(after.values()), draws=4000)
    return [round(x, 4) for x in (mean, low, high)]


def tell(name: str, groups: dict[str, dict[int, float]], first: dict[str, dict[int, float]] | None) -> Row:
    """Prints one policy's line; returns {group: {"mean", "half", "change"}}."""
    line: Row = {}
    for group, values in groups.items():
        mean, half = mean_with_interval(list(values.values()))
        line[group] = {"mean": round(mean, 4), "half": round(half, 4), "prompts": len(values)}
        if first is not None:
            line[group]["change"] = change(first[group], values)
    shown = "  ".join(f"{group} {cell['mean']:.3f} ± {cell['half']:.3f}" for group, cell in line.items())
    print(f"{name:>30}  {shown}")
    return line


def main() -> None:
    """Runs, prints the tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--demo_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rejection-rounds"))
    parser.add_argument("--pools", nargs="+", choices=("all", "last"), default=["all", "last"])
    parser.add_argument("--absent", nargs="+", default=["list", "steps", "sum"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1000, help="prompts a round")
    parser.add_argument("--samples", type=int, default=4, help="samples a prompt in the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel_stages", type=int, default=1)
    options = parser.parse_args()
    write_prompts(options.demo_dir, options.output_dir, options.absent, options.prompts, options.rounds)
    folders = {pool: run_rounds(options, pool) for pool in options.pools}
    found: dict[str, Any] = {"rounds": {}, "last_less_all": {}, "students": {}}
    by_policy = {(pool, number): scores(folder / f"v{number}" / "evaluate_policy", options.absent)
                 for pool, folder in folders.items() for number in range(options.rounds + 1)}  # fmt: skip
    for (pool, number), groups in by_policy.items():
        first = by_policy[pool, 1] if number > 1 else None
        found["rounds"][f"{pool} v{number}"] = tell(f"pool {pool}, V{number}", groups, first)
    if set(folders) == {"all", "last"}:
        for number in range(1, options.rounds + 1):
            pairs = {group: change(by_policy["all", number][group], values)
                     for group, values in by_policy["last", number].items()}  # fmt: skip
            found["last_less_all"][f"v{number}"] = pairs
            print(f"V{number}, last less all: absent {pairs['absent']}  present {pairs['present']}")
    if "all" in folders:
        evaluations = run_students(options, folders["all"])
        students = {name: scores(path, options.absent) for name, path in evaluations.items()}
        for name, groups in students.items():
            found["students"][name] = tell(f"student, {name}", groups, students["all_demonstrations"])
    print(json.dumps(found))


if __name__ == "__main__":
    cli.entry(main)
