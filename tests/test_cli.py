"""Command lines: precedence, and errors that name the field."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from rlhf.cli import entry, parse


@dataclass
class Toy:
    learning_rate: float = field(default=1e-5, metadata={"help": "peak, 0.1 %"})
    steps: int = 3
    files: list[str] = field(default_factory=list)
    limit: int | None = None
    mode: Literal["a", "b"] = "a"
    packing: bool = True


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_yaml_and_yaml_over_defaults(config):
    path = config("learning_rate: 1e-4\nsteps: 7\nfiles: [a, b]\n")  # 1e-4 is a string in YAML 1.1
    (toy,) = parse(Toy, args=["--config", path, "--steps", "9", "--packing", "false"])
    assert toy == Toy(learning_rate=1e-4, steps=9, files=["a", "b"], packing=False)
    assert isinstance(toy.learning_rate, float)
    assert parse(Toy, args=[f"--config={path}"])[0].steps == 7
    assert parse(Toy, args=["--learning_rate=3", "--limit", "4", "--files", "x", "y"])[0] == Toy(
        learning_rate=3.0, limit=4, files=["x", "y"]
    )
    assert parse(Toy, args=["--no_packing"])[0].packing is False


def test_several_dataclasses_share_one_line(config):
    args = ["--config", config("model_name_or_path: m\nlimit: null\n"), "--output_dir", "out", "--seed", "5"]
    toy, model, run = parse(Toy, ModelSettings, RunSettings, args=args)
    assert toy == Toy()
    assert (model, run) == (ModelSettings("m"), RunSettings("out", seed=5))


@pytest.mark.parametrize(
    ("yaml", "flags", "error"),
    [
        ("learnin_rate: 1", [], "run.yaml: unknown field 'learnin_rate'; did you mean 'learning_rate'"),
        ("", ["--learnin-rate", "1"], "unknown field '--learnin_rate'; did you mean 'learning_rate'"),
        ("", ["--step", "1"], "unknown field '--step'; did you mean 'steps'"),  # no silent abbreviations
        ("zzz: 1", [], "known fields: files, learning_rate, limit"),
        ("steps: many", [], "run.yaml: steps must be int, not 'many'"),
        ("steps: 1.5", [], "steps must be int, not 1.5"),
        ("steps: true", [], "steps must be int, not True"),
        ("packing: 1", [], "packing must be bool, not 1"),
        ("learning_rate: fast", [], "learning_rate must be float, not 'fast'"),
        ("files: a.jsonl", [], "files must be list, not 'a.jsonl'"),
        ("files: [1]", [], "files, item 1 must be str, not 1"),
        ("limit: x", [], "limit must be int or NoneType, not 'x'"),
        ("mode: c", [], r"mode must be \('a', 'b'\), not 'c'"),
        ("", ["--steps", "many"], "--steps: invalid int value: 'many'"),
        ("", ["--mode", "c"], "--mode: invalid choice: 'c'"),
        ("", ["--steps"], "--steps: expected one argument"),
        ("", ["stray"], "stray"),
        ("- a", [], "must be a mapping of fields to values, not a list"),
        ("a: [", [], "is not valid YAML"),
    ],
)
def test_mistakes_name_file_and_field(config, yaml, flags, error):
    with pytest.raises(UserError, match=error):
        parse(Toy, args=["--config", config(yaml), *flags])


def test_mistakes_that_need_no_file():
    with pytest.raises(UserError, match="none.yaml: No such file"):
        parse(Toy, args=["--config", "none.yaml"])
    with pytest.raises(UserError, match="--config needs the path"):
        parse(Toy, args=["--config"])
    with pytest.raises(UserError, match="required: --output_dir"):
        parse(RunSettings, args=[])
    with pytest.raises(UserError, match="lora_r and lora_alpha must be at least 1"):
        parse(ModelSettings, args=["--model_name_or_path", "m", "--lora_r", "0"])


def test_entry_prints_a_user_error_without_traceback_and_exits_2(capsys):
    def main():
        raise UserError("config.yaml: steps must be int")

    with pytest.raises(SystemExit) as caught:
        entry(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: config.yaml: steps must be int\n"

    def broken():
        raise ValueError("a defect keeps its traceback")

    with pytest.raises(ValueError, match="a defect"):
        entry(broken)


def test_help_shows_the_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Toy, args=["--help"])
    assert caught.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out
