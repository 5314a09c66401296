"""Weights for a learnt ensemble of the two reward models, from labelled pairs; for `reward_combination: ensemble`.

    accelerate launch rlhf/fit_ensemble.py --helpfulness_model_path runs/h/model --safety_model_path runs/s/model \\
        --fit_files a.jsonl --eval_files b.jsonl --output_dir runs/ensemble

1. The paper has no ensemble: its rule switches between the models. This one adds them, each with one weight, fitted by
   logistic regression on score differences (reward/ensemble.py).
2. Fit on pairs that neither model was trained on: on its training pairs a model looks better than it is.
3. A pair to fit whose prompt is also held out is left out of the fit.

Writes ensemble.json (weights and bias) and summary.json (accuracy on the held-out pairs of each model, of their mean
and minimum, and of the ensemble, with 95 % intervals). A killed run scores nothing again; several processes share the
pairs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from configs.ensemble_settings import FITTED, HELD_OUT, EnsembleSettings
from configs.errors import UserError
from configs.scoring_settings import BOTH
from reward.any_model import AnyRewardModel
from reward.combine import combine
from reward.ensemble import Ensemble, fit_ensemble
from reward.evaluation import outcomes_of
from reward.metrics import share
from reward.screening import find_leaks
from rlhf.cli import entry, parse
from rlhf.evaluate_reward import check_refused, encode, read_pairs, score
from rlhf.models import data_fingerprint
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.shards import weights_stamp

Json = dict[str, Any]
RULES = (*BOTH, "mean", "min", "ensemble")


def split_pairs(records: Sequence[Json]) -> tuple[list[int], list[int], int]:
    """(places of the pairs to fit, places of those held out, number left out of the fit for their prompt)."""
    held_out = [i for i, record in enumerate(records) if record["test_set"] == HELD_OUT]
    to_fit = [i for i, record in enumerate(records) if record["test_set"] == FITTED]
    leaks = find_leaks([[records[i] for i in to_fit]], [records[i] for i in held_out])
    kept = [i for at, i in enumerate(to_fit) if (0, at) not in leaks.same]
    return kept, held_out, len(to_fit) - len(kept)


def accuracies(ensemble: Ensemble, r_chosen: Mapping[str, Tensor], r_rejected: Mapping[str, Tensor]) -> Json:
    """Accuracy with its interval by rule, from the [P] raw scores of both models; a tie is half a success."""
    untagged_P = torch.zeros(len(next(iter(r_chosen.values()))), dtype=torch.bool)  # no rule here reads the tag
    found = {}
    for rule in RULES:
        chosen, rejected = (combine(rule, r, untagged_P, ensemble=ensemble)[0] for r in (r_chosen, r_rejected))
        found[rule] = share(outcomes_of(chosen.tolist(), rejected.tolist()))
    return found


def main(args: list[str] | None = None) -> Json:
    """Fits one ensemble; returns its summary."""
    (settings,) = parse(EnsembleSettings, args=args)
    evaluation = settings.evaluation()
    wanted = evaluation.models()
    inputs = {
        "weights": {model.name: weights_stamp(model.path) for model in wanted},
        "data": {file: data_fingerprint(file) for file in evaluation.eval_files},
    }
    resolved = {**asdict(settings), "inputs": inputs}
    if completed := RunFolder.completed(settings.output_dir, resolved):
        return completed
    state = PartialState(cpu=settings.use_cpu)
    models = {each.name: AnyRewardModel(each.path, each.input_format) for each in wanted}
    records = read_pairs(evaluation, models, reject=state.is_main_process)
    kept, encoded, refused = encode(records, models, settings.max_length)
    check_refused(evaluation, len(records), refused, write=state.is_main_process)
    to_fit, held_out, leaked = split_pairs(kept)
    if not to_fit or not held_out:
        field = "eval_files" if not held_out else "fit_files"
        raise UserError(f"{field}: no usable pair ({leaked} pairs to fit have a held-out prompt)")
    run = RunFolder(settings.output_dir, resolved, stage="fit_ensemble")

    scores = {name: torch.tensor(score(name, models[name], encoded[name], evaluation, state)) for name in models}

    def raw(places: list[int], side: int) -> dict[str, Tensor]:
        return {name: scores_P2[places, side].double() for name, scores_P2 in scores.items()}

    ensemble = fit_ensemble(raw(to_fit, 0), raw(to_fit, 1), settings.l2)
    held = accuracies(ensemble, raw(held_out, 0), raw(held_out, 1))
    summary: Json = {**asdict(ensemble), "pairs_fitted": len(to_fit), "pairs_left_out": leaked, "held_out": held}
    with run.finishing():
        if state.is_main_process:
            write_atomic(run.path / "ensemble.json", json.dumps(asdict(ensemble), indent=2) + "\n")
            run.log(0, numbers(summary))
            show(summary, run.path, Console(highlight=False))
        result = run.finish(summary)
    state.wait_for_everyone()
    return result


def show(summary: Json, folder: Path, console: Console) -> None:
    """Weights and accuracies, a line each."""
    for name, weight in summary["weights"].items():
        console.print(f"weight of {name}: {weight:.4f}")
    for rule, cell in summary["held_out"].items():
        low, high = cell["ci95"]
        console.print(f"{rule}: {100 * cell['accuracy']:.1f} % of {cell['count']} held-out pairs "
                      f"({100 * low:.1f} to {100 * high:.1f})", soft_wrap=True)  # fmt: skip
    console.print(f"Written to {folder}: ensemble.json, summary.json", soft_wrap=True)


if __name__ == "__main__":
    entry(main)
