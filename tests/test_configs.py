"""Every YAML in configs/: fields are known, its model loads with its LoRA, and Llama 2's have the paper's numbers.

Weights are never fetched: a tiny Llama stands in for every model and reward model that a config names.
"""

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tiny_models import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer

from configs.chat import load_chat_format
from configs.model_settings import ModelSettings
from configs.pipeline_settings import PipelineSettings
from configs.rounds_settings import RoundsSettings
from reward.model import add_lora, create_reward_model, load_reward_model
from rlhf import cli, scaling_study
from rlhf.judge import load_judges
from rlhf.load_roles import load_roles
from rlhf.models import load_policy, resolve_dtype
from rlhf.pipeline import Stage, read_stages
from rlhf.round_stages import round_stages

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PIPELINES = ("demo", "smollm2-135m", "smollm2-135m_cpu", "distil_demo", "safety_scaling_demo")
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in PIPELINES)
LLAMA2 = [path for path in RUNS if path.name.startswith("llama2_")]
LLAMA2_7B = [path for path in LLAMA2 if path.name.startswith("llama2_7b_")]
POLICIES = ("model_name_or_path", "second_model_name_or_path", "baseline_model_name_or_path", "sft_model_path")
REWARD_MODELS = (
    "judge_helpfulness_model_path",
    "judge_safety_model_path",
    "helpfulness_model_path",
    "safety_model_path",
    "helpfulness_reward_model",
    "safety_reward_model",
)

ADAPTER = (64, 128)  # rank and scale of the adapters that stand in for a config's
LAUNCH = r"accelerate launch (?:--config_file \S+ )?"
by_name = pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)


def stage_of(path: Path) -> str:
    """The script in the launch command at the top of a config; the command must name this very config."""
    commands = re.findall(rf"^#\s+{LAUNCH}rlhf/(\w+)\.py --config configs/(\w+\.yaml)", path.read_text(), re.M)
    assert path.name in [config for _, config in commands], f"{path.name} does not say how to launch it"
    return next(script for script, config in commands if config == path.name)


def dataclasses_of(run: str) -> tuple[type, ...]:
    """The dataclasses that a script's main parses, read off its call of `parse`: no second list to keep."""
    module = importlib.import_module(f"rlhf.{run}")
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("parse", "cli.parse"):
            return tuple(getattr(module, ast.unparse(name)) for name in node.args)
    raise AssertionError(f"rlhf/{run}.py calls no parse")


def parse(run: str, path: Path, *flags: str) -> dict[str, Any]:
    """One namespace of all fields; the parsed dataclasses are under their class names."""
    parsed = cli.parse(*dataclasses_of(run), args=["--config", str(path), *flags])
    fields = {name: value for part in parsed for name, value in vars(part).items()}
    return fields | {type(part).__name__: part for part in parsed}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    base = save_tiny_policy(root / "policy")
    adapted = load_policy(
        ModelSettings(model_name_or_path=base, use_peft=True, lora_r=ADAPTER[0], lora_alpha=ADAPTER[1])
    )
    adapted.save_pretrained(root / "adapter")
    scorer = add_lora(create_reward_model(base, tiny_tokenizer(), torch.float32), *ADAPTER, 0.0, None)
    scorer.save_pretrained(root / "reward_adapter")  # type: ignore[operator]
    paths = {name: str(root / name) for name in ("adapter", "reward_adapter")}
    return {"policy": base, "reward": save_tiny_reward_model(root / "reward", seed=1), **paths}


def with_tiny_models(path: Path, tiny: dict[str, str]) -> list[str]:
    """Flags that put a tiny folder in for every model that the config names."""
    given = yaml.safe_load(path.read_text())
    flags = [word for name in POLICIES if given.get(name) for word in (f"--{name}", tiny["policy"])]
    if given.get("adapter_path"):
        flags += ["--adapter_path", tiny["adapter"]]
    if given.get("load_in_4bit"):
        flags += ["--load_in_4bit", "false"]  # test_four_bits.py has these
    if given.get("gather_weights") is False:
        flags += ["--gather_weights", "true"]  # without FSDP or DeepSpeed; test_ppo.py launches so
    for name in REWARD_MODELS:
        if path_given := given.get(name):
            flags += [f"--{name}", tiny["reward_adapter" if path_given.endswith("/adapter") else "reward"]]
    return flags


@by_name
def test_the_models_of_every_config_load(path, tiny):
    run = stage_of(path)
    if run == "scaling_study":
        study = parse(run, path, "--model_name_or_paths", tiny["policy"], "--layers", "1", "2")["ScalingSettings"]
        assert [model.layers for model in scaling_study.study_models(study)] == [1, None]
        return
    if run == "rounds":
        return  # its stages are those of the other configs, and parsed below
    settings = parse(run, path, *with_tiny_models(path, tiny))
    tokenizer = tiny_tokenizer()
    if "chat_format" in settings:
        load_chat_format(tokenizer, settings["chat_format"])
    if run == "gate":
        paths = [settings[name] for name in REWARD_MODELS if name in settings]
        assert len(load_judges(*paths, tokenizer, torch.bfloat16, "cpu")) == 2
        return
    trained: list[Any] = []
    if run == "ppo":
        roles = load_roles(settings["PPOSettings"], settings["ModelSettings"], tokenizer, "cpu", 0)
        base = roles.policy.adapters.model
        trained.append(base)
        every = [roles.policy, roles.reference, roles.value, *roles.reward_models.values()]
        assert all(role.adapters.model is base for role in every)  # five roles on one base
        # `start`: a copy of the adapter that the policy starts from, or the base alone
        assert roles.reference.adapter == ("reference" if settings["adapter_path"] else None)
    elif run == "train_reward":
        model_settings = settings["ModelSettings"]
        dtype = resolve_dtype(model_settings, trainable=True)
        model: Any = create_reward_model(model_settings.model_name_or_path, tokenizer, dtype)
        if model_settings.use_peft:
            lora = model_settings
            sizes = ADAPTER if lora.adapter_path else (lora.lora_r, lora.lora_alpha)
            model = add_lora(model, *sizes, lora.lora_dropout, lora.lora_target_modules)
        trained.append(model)
    elif run == "sft":
        trained.append(load_policy(settings["ModelSettings"]))
    for model in trained:
        assert isinstance(model, PeftModel) == settings["use_peft"]
        if settings["use_peft"]:
            lora_config = model.peft_config["default"]
            given = ADAPTER if settings["adapter_path"] else (settings["lora_r"], settings["lora_alpha"])
            assert (lora_config.r, lora_config.lora_alpha) == given
            adapted = {
                name.split(".lora_A.")[0].split(".")[-1]
                for name, p in model.named_parameters()
                if p.requires_grad and "lora_A" in name
            }
            assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if not trained:
        names = [f.name for f in dataclasses.fields(ModelSettings) if f.name in settings]
        frozen = load_policy(ModelSettings(**{name: settings[name] for name in names}), trainable=False)
        expected = torch.bfloat16 if settings["dtype"] == "bfloat16" else torch.float32
        assert next(frozen.parameters()).dtype == expected
        for name in REWARD_MODELS:
            if settings.get(name):
                load_reward_model(settings[name], expected)


def test_llama2_has_a_config_for_every_stage():
    stages = sorted(stage_of(path) for path in LLAMA2_7B)
    assert stages == sorted(
        ["sft"] * 5  # supervised, on the best of K, on a larger model's, on Ghost Attention dialogues, on safer answers
        + ["rounds"]
        + ["train_reward"] * 4  # helpfulness and safety, and the same for the held-out judge
        + [
            "collect_preferences",
            "explore_sampling",
            "rejection_sampling",
            "ppo",
            "ppo",  # on a 24 GB GPU
            "distil_safety",
            "write_instruction_values",
            "write_user_turns",
            "build_gatt",
            "evaluate_gatt",
            "evaluate_policy",
            "evaluate_safety",
            "gate",
        ]
    )


@pytest.mark.parametrize("role", ["reward", "judge"])
def test_reward_models_and_judges_have_configs_of_three_sizes(role):
    sizes = sorted((path.stem.split("_")[1], parse("train_reward", path)["objective"])
                   for path in LLAMA2 if stage_of(path) == "train_reward" and f"_{role}_" in path.name)  # fmt: skip
    assert sizes == [(size, kind) for size in ("13b", "70b", "7b") for kind in ("helpfulness", "safety")]


@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
def test_the_judge_is_the_reward_model_of_the_other_prompts(kind, demo):
    def settings(size: str, name: str) -> dict[str, Any]:
        return yaml.safe_load((CONFIGS / f"llama2_{size}_{name}_{kind}.yaml").read_text())

    by_name = {stage.name: stage.settings for stage in demo}
    for ours, judge in (
        *((settings(size, "reward"), settings(size, "judge")) for size in ("7b", "13b", "70b")),
        (by_name[f"reward_{kind}"], by_name[f"judge_{kind}"]),
    ):
        assert (ours["prompt_half"], judge["prompt_half"]) == ("first", "second")
        assert ours.get("seed", 0) != judge["seed"]
        own = ("prompt_half", "seed", "output_dir")
        assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in judge.items() if k not in own}


def test_llama2_configs_hand_over_to_each_other():
    outputs = {yaml.safe_load(path.read_text())["output_dir"] for path in LLAMA2}
    assert len(outputs) == len(LLAMA2)
    # A header may give another folder: labels imported from people, the evaluation of another stage's policy.
    for path in LLAMA2:
        outputs |= set(re.findall(r"^#.*--output_dir (runs/llama2-\d+b/[\w-]+)", path.read_text(), re.M))
    assert {"runs/llama2-7b/preferences", "runs/llama2-7b/evaluate-sft"} <= outputs
    for path in LLAMA2:
        for used in re.findall(r"runs/llama2-\d+b/[\w-]+(?=/)", path.read_text()):
            assert used in outputs, f"{path.name} reads {used}, which no config writes"


ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1, "max_grad_norm": 1.0}
PAPER = {  # §2.2 (AdamW), §3.1, §3.2.2, §3.2.3, §3.3, §4.2.4
    "sft": {"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "num_train_epochs": 2, "max_length": 4096,
            "packing": True, "use_peft": True, **ADAMW},
    "train_reward": {"min_lr_rate": 0.1, "warmup_ratio": 0.03, "min_warmup_steps": 5,
                     "num_train_epochs": 1, "use_peft": True, **ADAMW},
    "ppo": {"learning_rate": 1e-6, "batch_size": 512, "mini_batch_size": 64, "ppo_epochs": 1,
            "clip_range": 0.2, "safety_threshold": 0.15, "temperature": 1.0, "reference_model": "start",
            "use_peft": True, **ADAMW},
    "rejection_sampling": {"safety_threshold": 0.15},
    "explore_sampling": {"temperatures": [0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "samples_per_prompt": 100,
                         "safety_threshold": 0.15},
    "collect_preferences": {"annotator": "none"},
    "distil_safety": {"gate": True, "include_helpful": False, "samples_per_prompt": 1},
    "write_instruction_values": {"kinds": ["figure", "hobby", "language"]},
    "write_user_turns": {"chat_format": "llama2"},
    "build_gatt": {"short_share": 0.5},
    "evaluate_gatt": {"num_turns": 20},
    "evaluate_policy": {"gold": "none"},
    "evaluate_safety": {"safety_threshold": 0.15, "temperature": 0.1, "top_p": 0.9},  # §3.2.3, Table 11
    "gate": {"safety_threshold": 0.15},
}  # fmt: skip
BATCH = {"sft": 64, "train_reward": 512}  # rows of 4,096 tokens; pairs


def has_the_numbers_of_the_paper(run: str, settings: dict[str, Any]) -> None:
    assert {name: settings[name] for name in PAPER[run]} == PAPER[run]
    if run in BATCH:
        assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == BATCH[run]


@pytest.mark.parametrize("path", [path for path in LLAMA2 if stage_of(path) != "rounds"], ids=lambda path: path.stem)
def test_llama2_configs_have_the_numbers_of_the_paper(path):
    run = stage_of(path)
    settings = parse(run, path)
    has_the_numbers_of_the_paper(run, settings)
    if run == "ppo":
        assert 200 <= settings["total_iterations"] <= 400
        assert settings["kl_coef"] == (0.005 if "_70b_" in path.name else 0.01)
    if run == "train_reward":
        assert settings["learning_rate"] == (5e-6 if "_70b_" in path.name else 1e-5)
        assert settings["load_in_4bit"] == ("_70b_" in path.name)
        assert settings["margin"] == "small"
        assert settings["RewardSettings"].safety_weight == (1.0 if settings["objective"] == "safety" else 0.0)
        assert settings["mix_weights"] == ([90, 10] if settings["objective"] == "safety" else [50, 50])


def rounds_of(name: str, **fields: Any) -> list[Stage]:
    settings = yaml.safe_load((CONFIGS / name).read_text()) | fields
    return round_stages(RoundsSettings(**settings), settings.get("student_model_path", ""))


def test_the_stages_of_the_llama2_rounds_have_the_numbers_of_the_paper(tmp_path):
    stages = rounds_of("llama2_7b_rounds.yaml", student_model_path="some/small-model")
    assert [stage.name for stage in stages if stage.run == "sft"][-2:] == ["v4/sft", "v4/student_sft"]
    for stage in stages:
        config = tmp_path / "stage.yaml"
        config.write_text(yaml.safe_dump(stage.settings))
        if stage.run in PAPER and "import_labels" not in stage.settings:
            has_the_numbers_of_the_paper(stage.run, parse(stage.run, config))
    assert [stage.settings["pool"] for stage in stages if stage.run == "pool_samples"] == ["all"] * 4


def pipeline(name: str) -> list[Stage]:
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return read_stages(PipelineSettings(**{**settings, "output_dir": "somewhere", "seed": 3}))


@pytest.fixture(scope="module")
def demo() -> list[Stage]:
    return pipeline("demo")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_stages_of_a_pipeline_parse(name, tmp_path):
    for stage in pipeline(name):
        config = tmp_path / f"{stage.name}.yaml"
        config.write_text(yaml.safe_dump(stage.settings))
        assert parse(stage.run, config)["output_dir"] == f"somewhere/{stage.name}"


def test_the_scaling_study_trains_as_the_demo_does(demo):
    """Its settings repeat the demo's, so that one change of them cannot go unnoticed."""
    study = yaml.safe_load((CONFIGS / "scaling_demo.yaml").read_text().replace("runs/demo", "somewhere"))
    stage = next(stage.settings for stage in demo if stage.name == "reward_helpfulness")
    assert study["model_name_or_paths"] == [stage["model_name_or_path"]]
    # All prompts, as in the results: the demo keeps half of them for its judge, and goes through the rest three times.
    own = ("model_name_or_path", "output_dir", "seed", "prompt_half", "num_train_epochs")
    assert {name: study[name] for name in stage if name not in own} == {k: v for k, v in stage.items() if k not in own}


@pytest.mark.parametrize("name", ["distil_demo", "safety_scaling_demo"])
def test_the_safety_studies_train_as_the_demo_does(name, demo):
    """Their settings repeat the demo's, but for the model, the data, how long, and the step of a second fine-tuning."""
    own = ("model_name_or_path", "train_files", "output_dir", "seed", "num_train_epochs", "learning_rate")
    same = {k: v for k, v in next(s.settings for s in demo if s.name == "sft").items() if k not in own}
    stages = pipeline(name)
    trained = [s.settings for s in stages if s.run == "sft"] + [
        s.settings["sft"] for s in stages if s.name == "scaling"
    ]
    assert len(trained) in (1, 6)
    for settings in trained:
        assert {k: settings[k] for k in same} == same


def test_the_distillations_of_the_demo_differ_in_gate_and_prompts_alone():
    stages = {stage.name: stage.settings for stage in pipeline("distil_demo") if stage.run == "distil_safety"}
    chosen = ("gate", "include_helpful", "helpfulness_model_path")
    assert {
        name: (s.get("gate", True), s.get("include_helpful", False), "helpfulness_model_path" in s)
        for name, s in stages.items()
    } == {
        "distil_gated": (True, False, False), "distil_ungated": (False, False, False),
        "distil_gated_all": (True, True, False), "distil_ungated_all": (False, True, False),
        "distil_combined_all": (True, True, True),
    }  # fmt: skip
    rest = [{k: v for k, v in s.items() if k not in (*chosen, "output_dir")} for s in stages.values()]
    assert rest == [rest[0]] * 5


def test_the_rounds_of_the_demo_train_as_the_demo_does(demo, tmp_path):
    stages = {stage.name: stage for stage in rounds_of("rounds_demo.yaml")}
    own = ("model_name_or_path", "output_dir", "seed", "train_files", "eval_files", "mix_weights", "num_train_epochs",
           "prompt_half")  # fmt: skip
    for mine, theirs in (("v2/sft", "rejection_sft"), ("v2/reward_safety", "reward_safety")):
        settings = next(stage.settings for stage in demo if stage.name == theirs)
        same = {name: value for name, value in settings.items() if name not in own}
        assert {name: stages[mine].settings[name] for name in same} == same
    for stage in stages.values():
        config = tmp_path / "stage.yaml"
        config.write_text(yaml.safe_dump(stage.settings))
        parse(stage.run, config)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stage_of_a_pipeline_reads_only_what_it_waits_for(name):
    made_from: dict[str, set[str]] = {}
    for stage in pipeline(name):  # read_stages has refused a need that does not stand before its stage
        made_from[stage.name] = set(stage.needs).union(*(made_from[need] for need in stage.needs))
        inputs = {name: value for name, value in stage.settings.items() if name != "output_dir"}
        read = set(re.findall(r"somewhere/(\w+)/", yaml.safe_dump(inputs, width=10_000)))
        assert read <= made_from[stage.name], f"{stage.name} reads what it does not need"
        assert "${" not in yaml.safe_dump(stage.settings), f"{stage.name} has a name that is not filled in"
