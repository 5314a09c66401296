"""rlhf/fit_ensemble.py from preference files to an ensemble that PPO's scoring takes."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_reward_model, tiny_tokenizer, words, write_rows
from transformers import AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.scoring_settings import ScoringSettings
from rlhf import fit_ensemble as script
from rlhf.samples import Prompt
from rlhf.scoring import Scoring


def dialogue(row, side):
    return load_chat_format(tiny_tokenizer()).encode_dialogue([*row["prompt"], *row[side]]).input_ids


def raw(path, rows, side):
    """Plain forwards, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
    with torch.no_grad():
        return [float(model(torch.tensor([dialogue(row, side)])).logits) for row in rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models and pairs whose labels follow 2 r_h - r_s with noise: the second model is wrong on purpose."""
    root = tmp_path_factory.mktemp("ensemble")
    paths = {name: save_tiny_reward_model(root / name, seed) for seed, name in enumerate(("helpfulness", "safety"), 5)}
    rng = random.Random(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i} {words(rng)}"}],
            **{side: [{"role": "assistant", "content": words(rng)}] for side in ("chosen", "rejected")},
        }
        for i in range(100)
    ]
    scores = {name: [raw(path, rows, side) for side in ("chosen", "rejected")] for name, path in paths.items()}
    for i, row in enumerate(rows):
        merit = [2 * scores["helpfulness"][side][i] - scores["safety"][side][i] for side in (0, 1)]
        if rng.random() > 1 / (1 + math.exp(3 * (merit[1] - merit[0]))):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            for sides in scores.values():
                sides[0][i], sides[1][i] = sides[1][i], sides[0][i]
    fitted, held_out = write_rows(root / "fit.jsonl", rows[:70]), write_rows(root / "held_out.jsonl", rows[60:])
    return {"paths": paths, "scores": scores, "fit": fitted, "held_out": held_out}


def fit(world, output, *extra, **changed):
    flags = {
        "helpfulness_model_path": world["paths"]["helpfulness"],
        "safety_model_path": world["paths"]["safety"],
        "fit_files": world["fit"],
        "eval_files": world["held_out"],
    } | changed
    return script.main([word for name, value in flags.items() for word in (f"--{name}", value)]
                       + ["--output_dir", str(output), "--use_cpu", "true", *extra])  # fmt: skip


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(world, folder, "--l2", "0.01")


def test_the_gradient_is_zero_on_the_pairs_that_may_be_fitted(world, fitted):
    _, summary = fitted
    assert summary["pairs_fitted"] == 60  # 60 to 69 are held out as well
    assert summary["pairs_left_out"] == 10
    x = torch.tensor(list(world["scores"].values()), dtype=torch.float64)[:, :, :60]  # [model, side, pair]
    differences = (x[:, 0] - x[:, 1]).T
    w = torch.tensor(list(summary["weights"].values()), dtype=torch.float64, requires_grad=True)
    scaled = w * differences.pow(2).mean(0).sqrt()
    loss = torch.nn.functional.softplus(-differences @ w).mean() + 0.005 * scaled @ scaled
    loss.backward()
    assert w.grad.abs().max() < 1e-4  # the script scores in float32
    assert summary["weights"]["helpfulness"] > 0 > summary["weights"]["safety"]
    centre = (x * w.detach()[:, None, None]).sum(0).mean()
    assert summary["bias"] == pytest.approx(-float(centre), abs=1e-3)


def test_accuracies_on_the_held_out_pairs(world, fitted):
    _, summary = fitted
    h, s = ([a - b for a, b in zip(*sides, strict=True)][60:] for sides in world["scores"].values())
    w = summary["weights"]
    expected = {
        "helpfulness": sum(d > 0 for d in h) / 40,
        "safety": sum(d > 0 for d in s) / 40,
        "mean": sum(a + b > 0 for a, b in zip(h, s, strict=True)) / 40,
        "ensemble": sum(w["helpfulness"] * a + w["safety"] * b > 0 for a, b in zip(h, s, strict=True)) / 40,
    }
    for name, accuracy in expected.items():
        cell = summary["held_out"][name]
        assert cell["accuracy"] == pytest.approx(accuracy), name
        assert cell["count"] == 40
        assert cell["ci95"][0] < accuracy < cell["ci95"][1]
    assert expected["ensemble"] > expected["mean"]


def test_the_file_is_what_scoring_reads(world, fitted):
    folder, summary = fitted
    assert json.loads((folder / "ensemble.json").read_text()) == {k: summary[k] for k in ("weights", "bias")}
    settings = ScoringSettings(
        helpfulness_model_path="h", safety_model_path="s", reward_combination="ensemble",
        ensemble_file=str(folder / "ensemble.json"),
    )  # fmt: skip
    scored = Scoring(settings).scores(lambda name, _: torch.tensor([3.0]), [Prompt([], [1])], [[2]], [""])
    assert float(scored.combined_B) == pytest.approx(3 * sum(summary["weights"].values()) + summary["bias"], rel=1e-5)
    assert fit(world, folder, "--l2", "0.01") == summary  # complete: not run again


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_files": "fit"}, "eval_files: .* is fitted on"),
        ({"l2": "-1"}, "l2: -1.0 is no penalty"),
        ({"safety_model_path": ""}, "safety_model_path: name the folder"),
        ({"eval_files": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"fit_files": "copy"}, r"fit_files: no usable pair \(40 pairs to fit have a held-out prompt\)"),
    ],
)
def test_user_mistakes(world, tmp_path, changed, message):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(world["held_out"]).read_text())
    values = {"fit": world["fit"], "copy": str(copy)}
    with pytest.raises(UserError, match=message):
        fit(world, tmp_path / "run", **{name: values.get(value, value) for name, value in changed.items()})
    assert not (tmp_path / "run" / "ensemble.json").exists()
