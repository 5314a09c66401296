"""Gold reward against KL on the simulated world: PPO, rejection sampling and both, with the same number of samples.

    python benchmarks/ppo_outcome.py [--seeds 0 1 2] [--kl_coefs 0 0.05 0.15 0.5] [--samples 5632]
    python benchmarks/ppo_outcome.py --ways ppo --kl_coefs 0 --judge_mismatched 0.3   # what the judge learns from

For each seed: world, SFT, reward models and judges as in configs/demo.yaml; then from the SFT model, with `--samples`
responses each, (a) rejection sampling alone, (b) PPO alone for every beta, (c) rejection sampling with a share of them
(`--first_share`), then PPO with the rest for every beta; `--ways` names fewer. PPO runs to its end whatever the judge
says; the table shows gold where the judge would have stopped it and at the end: where the second is lower, the reward
model was over-optimised and the judge caught it. `--reward_mismatched`, `--judge_mismatched` and
`--judge_safety_mismatched` add answers to other questions (`mismatched_share`) to what the helpfulness model, its judge
and the judge of safety learn from.

Gold is the mean true score over evaluation prompts (helpfulness, safety on risky prompts); KL is to the SFT model, in
nats a response. (c) is compared with (a) and (b) at the beta that was best for each on the *other* seeds, as one who
has no true score here would carry it over, and at the best of this seed's own sweep. A finished stage is not run
again. `--plot PATH.png` draws true helpfulness, the judge's and the reward models' score against KL. The last line is
one JSON object.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts benchmarks/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: E402,I001  (first: it switches off telemetry before trl is imported)

import matplotlib as mpl  # noqa: E402
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from rich.console import Console  # noqa: E402

from rlhf.claims import alone  # noqa: E402
from rlhf.estimates import mean_with_interval, paired_bootstrap  # noqa: E402
from rlhf.pipeline import ROOT, PipelineSettings, read_stages, run_stages  # noqa: E402
from rlhf.plots import COLOURS, STYLE, to_png  # noqa: E402

Row = dict[str, Any]
SHARED = ("world", "sft", "collect", "collect_2", "reward_helpfulness", "reward_safety", "judge_helpfulness",
          "judge_safety")  # fmt: skip
WAYS = ("rejection", "ppo", "both")
K = 8  # samples a prompt of rejection sampling
BATCH = 128  # of PPO
PANELS = {"helpfulness": "true helpfulness", "judge": "the judge's score", "proxy": "the reward models' score"}


def stages_of(
    kl_coefs: list[float], samples: int, ways: list[str], mismatched: dict[str, float], first_share: float = 0.5
) -> list[Row]:
    """The pipeline of one seed; `mismatched` has the share of answers to other questions by stage, `first_share` what
    rejection sampling has of the samples where PPO follows it."""
    demo = {stage["name"]: stage for stage in yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["stages"]}

    def stage(name: str, like: str, needs: list[str], **settings: Any) -> Row:
        made = copy.deepcopy(demo[like])
        made["settings"] |= settings
        return made | {"name": name, "needs": needs, "threads": 1}

    def model(name: str) -> str:
        return f"${{output_dir}}/{name}/model"

    def ppo(name: str, start: str, kl_coef: float, iterations: int) -> list[Row]:
        settings: Row = {"model_name_or_path": model(start), "kl_coef": kl_coef, "total_iterations": iterations,
                         "batch_size": BATCH, "eval_steps": 4}  # fmt: skip
        return [
            stage(name, "ppo", [start, *SHARED[4:]], **settings),
            stage(f"evaluate_{name}", "evaluate_ppo", [name], model_name_or_path=model(name)),
        ]

    def best_of_k(name: str, prompts: int) -> list[Row]:
        rows = f"${{output_dir}}/{name}_samples/best.jsonl"
        return [
            stage(f"{name}_samples", "rejection_sampling", list(SHARED[4:6]), max_prompts=prompts,
                  samples_per_prompt=K),
            stage(name, "rejection_sft", [f"{name}_samples"], train_files=[rows]),
            stage(f"evaluate_{name}", "evaluate_ppo", [name], model_name_or_path=model(name)),
        ]  # fmt: skip

    shared = [demo[name] | {"threads": 1} for name in SHARED]
    for name, share in mismatched.items():
        demo[name]["settings"]["mismatched_share"] = share
    shared += [stage("evaluate_sft", "evaluate_sft", ["sft"])]
    iterations = round((1 - first_share) * samples / BATCH)  # of PPO after rejection sampling
    first = samples - iterations * BATCH
    found = {
        "rejection": best_of_k("rejection", samples // K),
        "ppo": [row for beta in kl_coefs for row in ppo(name_of("ppo", beta), "sft", beta, samples // BATCH)],
        "both": best_of_k("rejection_first", first // K),
    }
    for beta in kl_coefs:
        found["both"] += ppo(name_of("both", beta), "rejection_first", beta, iterations)
    return [*shared, *(row for way, rows in found.items() if way in ways for row in rows)]


def name_of(way: str, kl_coef: float) -> str:
    """The stage of PPO at this beta, alone (`ppo`) or after rejection sampling (`both`)."""
    return f"{way}_{kl_coef:g}".replace(".", "_")


def gold_by_prompt(folder: Path) -> dict[str, float]:
    """The mean true score of a finished evaluation's sampled responses, by prompt."""
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {}
    for place, row in enumerate(rows):
        values = row.get("gold_safety") if row["is_safety"] else row.get("gold_helpfulness")
        if values:
            found[str(place)] = sum(values) / len(values)
    return found


def curve(folder: Path) -> list[Row]:
    """PPO's held-out evaluations: step, KL to its start, gold, the judge's and the reward models' combined score."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"kl": "eval/kl", "helpfulness": "eval/gold_helpfulness", "safety": "eval/gold_safety",
             "judge": "eval/judge_combined", "proxy": "eval/combined"}  # fmt: skip
    return [{"step": line["step"], **{short: round(line[name], 4) for short, name in names.items()}}
            for line in lines if "eval/objective" in line]  # fmt: skip


def read_seed(folder: Path, kl_coefs: list[float], ways: list[str]) -> tuple[Row, dict[str, dict[str, float]]]:
    """(what the tables show of one seed, the true score by policy and prompt)."""
    swept = [name_of(way, beta) for way in ("ppo", "both") if way in ways for beta in kl_coefs]
    policies = ["sft", *(["rejection"] if "rejection" in ways else []), *swept]
    gold = {name: gold_by_prompt(folder / f"evaluate_{name}") for name in policies}
    found: Row = {"policies": {}, "curves": {}}
    for name in policies:
        summary = json.loads((folder / f"evaluate_{name}" / "summary.json").read_text(encoding="utf-8"))
        mean, half = mean_with_interval(list(gold[name].values()))
        found["policies"][name] = {"gold": round(mean, 4), "half": round(half, 4),
                                   "helpfulness": summary["gold_helpfulness"], "safety": summary["gold_safety"],
                                   "kl": round(summary.get("kl_nats", 0.0), 3)}  # fmt: skip
    for name in swept:
        points = curve(folder / name)
        best = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))["best"]["step"]
        found["curves"][name] = {"points": points, "judge_chose": best}
    return found, gold


def best_beta(way: str, kl_coefs: list[float], seeds: list[Row]) -> float:
    """The beta of this way with the highest true score, on average over these seeds."""
    return max(kl_coefs, key=lambda beta: sum(seed["policies"][name_of(way, beta)]["gold"] for seed in seeds))


def compare(seeds: dict[str, Row], gold: dict[str, dict[str, dict[str, float]]], kl_coefs: list[float]) -> list[Row]:
    """True score of both in sequence less that of either alone, by seed and over all seeds: (mean, low, high).

    `other seeds`: each way at the beta that was best on the other seeds; `this seed`: best on this one, which flatters
    PPO and both alike. Intervals are over prompts.
    """
    rows = []
    for chosen_on in ("other seeds", "this seed"):
        pairs: dict[str, list[tuple[float, float]]] = {"rejection": [], "ppo": []}
        for seed in seeds:
            judges = [row for key, row in seeds.items() if (key == seed) == (chosen_on == "this seed")]
            if not judges:  # one seed alone
                continue
            betas = {way: best_beta(way, kl_coefs, judges) for way in ("ppo", "both")}
            row: Row = {"seed": seed, "chosen_on": chosen_on, "betas": betas}
            both = gold[seed][name_of("both", betas["both"])]
            for way, name in (("rejection", "rejection"), ("ppo", name_of("ppo", betas["ppo"]))):
                here = [(gold[seed][name][key], both[key]) for key in both]
                pairs[way] += here
                row[way] = _difference(here)
            rows.append(row)
        if pairs["ppo"]:
            rows.append(
                {"seed": "all", "chosen_on": chosen_on, **{way: _difference(each) for way, each in pairs.items()}}
            )
    return rows


def _difference(pairs: list[tuple[float, float]]) -> list[float]:
    """Mean of second less first, with its 95 % interval over prompts."""
    mean, (low, high) = paired_bootstrap(*map(list, zip(*pairs, strict=True)), draws=4000)
    return [round(x, 4) for x in (mean, low, high)]


def tell(seed: int, found: Row) -> None:
    """The tables of one seed, as Markdown."""
    print(f"\n| seed {seed} | gold | helpfulness | safety | KL to SFT, nats |\n|---|---|---|---|---|")
    for name, row in found["policies"].items():
        print(f"| {name} | {row['gold']:.3f} ± {row['half']:.3f} | {row['helpfulness']:.3f} | {row['safety']:.3f} | "
              f"{row['kl']:.2f} |")  # fmt: skip
    print(f"\n| seed {seed} | judge chose step | there: helpfulness, safety, KL, judge, reward models | at the end |")
    print("|---|---|---|---|")
    for name, row in found["curves"].items():
        chosen = next(point for point in row["points"] if point["step"] == row["judge_chose"])
        cells = [", ".join(f"{point[key]:.3f}" for key in ("helpfulness", "safety", "kl", "judge", "proxy"))
                 for point in (chosen, row["points"][-1])]  # fmt: skip
        print(f"| {name} | {row['judge_chose']} | {cells[0]} | {cells[1]} |")


def tell_comparison(rows: list[Row]) -> None:
    """Both in sequence against either alone, as Markdown."""
    print("\n| betas chosen on | seed | PPO's, both's | both less rejection sampling | both less PPO |")
    print("|---|---|---|---|---|")
    for row in rows:
        betas = ", ".join(f"{beta:g}" for beta in row["betas"].values()) if "betas" in row else ""
        cells = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*row[way]) for way in ("rejection", "ppo")]
        print(f"| {row['chosen_on']} | {row['seed']} | {betas} | {cells[0]} | {cells[1]} |")


def draw(seeds: Row, kl_coefs: list[float], path: Path) -> None:
    """True helpfulness, the judge's and the reward models' score against KL to SFT: a line is a run of PPO alone on the
    held-out prompts by which it is watched, a mark a policy on the evaluation's, where all ways can be compared."""
    colours = mpl.colormaps["viridis"].resampled(len(kl_coefs)).colors
    marks = {name_of("ppo", beta): ("o", colour, "") for beta, colour in zip(kl_coefs, colours, strict=True)}
    marks |= {"rejection": ("s", COLOURS["ppo"], "rejection sampling")}
    marks |= {name_of("both", beta): ("D", colour, "" if place else "both, colours as above")
              for place, (beta, colour) in enumerate(zip(kl_coefs, colours, strict=True))}  # fmt: skip
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.2), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
            for i, found in enumerate(seeds.values()):
                for beta in (beta for beta in kl_coefs if name_of("ppo", beta) in found["curves"]):
                    points, text = found["curves"][name_of("ppo", beta)]["points"], f"PPO, beta {beta:g}"
                    axis.plot([max(point["kl"], 0.0) for point in points], [point[key] for point in points],
                              color=marks[name_of("ppo", beta)][1], lw=1.0, label="" if i else text)  # fmt: skip
                present = [(name, mark) for name, mark in marks.items() if name in found["policies"]]
                for name, (marker, colour, text) in present if key == "helpfulness" else ():
                    end = found["policies"][name]
                    axis.plot(end["kl"], end[key], marker, color=colour, ms=5, label="" if i else text)
            axis.set_xscale("symlog", linthresh=1.0)
            axis.set(title=title, xlabel="KL to SFT, nats a response")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    to_png(figure, path)


def main() -> None:
    """Runs what is missing, prints the tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ppo-outcome"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=[0.0, 0.05, 0.15, 0.5])
    parser.add_argument("--samples", type=int, default=5632, help="responses that each way may sample")
    parser.add_argument("--first_share", type=float, default=0.5, help="rejection sampling's part where PPO follows it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--reward_mismatched", type=float, default=0.0)
    parser.add_argument("--judge_mismatched", type=float, default=0.0)
    parser.add_argument("--judge_safety_mismatched", type=float, default=0.0)
    parser.add_argument("--parallel_stages", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="PNG to draw the curves to")
    options = parser.parse_args()
    if not BATCH <= (1 - options.first_share) * options.samples <= options.samples - K:
        parser.error(
            f"--first_share {options.first_share}: leave rejection sampling {K} and PPO {BATCH} of the samples"
        )
    mismatched = {"reward_helpfulness": options.reward_mismatched, "judge_helpfulness": options.judge_mismatched,
                  "judge_safety": options.judge_safety_mismatched}  # fmt: skip
    found: dict[str, Row] = {}
    gold: dict[str, dict[str, dict[str, float]]] = {}
    for seed in options.seeds:
        folder = options.output_dir / str(seed)
        stages = stages_of(options.kl_coefs, options.samples, options.ways, mismatched, options.first_share)
        settings = PipelineSettings(stages, str(folder), seed, options.parallel_stages)
        with alone(str(folder)):
            run_stages(read_stages(settings), options.parallel_stages, Console(highlight=False))
        found[str(seed)], gold[str(seed)] = read_seed(folder, options.kl_coefs, options.ways)
        tell(seed, found[str(seed)])
    compared = compare(found, gold, options.kl_coefs) if set(options.ways) == set(WAYS) else []
    if compared:
        tell_comparison(compared)
    if options.plot:
        draw(found, options.kl_coefs, options.plot)
    print(json.dumps({"samples": options.samples, "first_share": options.first_share, "mismatched_share": mismatched,
                      "compared": compared, "seeds": found}))  # fmt: skip


if __name__ == "__main__":
    cli.entry(main)
