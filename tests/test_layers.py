"""The one-way imports: configs <- reward, gatt <- rlhf; and what no module may do. Read from the syntax trees."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("configs", "reward", "gatt", "rlhf", "benchmarks", "notebooks", "tests")
MAY_IMPORT = {
    "configs": {"configs"},
    "reward": {"configs", "reward"},
    "gatt": {"configs", "gatt"},
    "rlhf": {"configs", "reward", "gatt", "rlhf"},
}
PACKAGES = tuple(MAY_IMPORT)
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(source: str, path: Path) -> set[str]:
    """Full names of every module that a file imports, anywhere in it (inside functions too)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parts[:-1])
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def faults(source: str, path: Path) -> list[str]:
    """What a file does against the rules."""
    package = path.relative_to(ROOT).parts[0]
    names = imported(source, path)
    roots = {name.split(".")[0] for name in names}
    found = [f"imports {name}" for name in sorted(roots & set(OURS) - MAY_IMPORT[package])]
    if package == "configs" and "torch" in roots:
        found.append("configs imports torch")
    found += [f"imports {name}" for name in sorted(roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"})]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"line {node.value.lineno}: trust_remote_code")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"line {node.lineno}: trust_remote_code")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            found.append(f"line {node.lineno}: torch.load unpickles; use safetensors")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_rules(path):
    assert faults(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("configs", "import reward.loss"),
        ("configs", "def f():\n    from torch import nn"),
        ("reward", "from gatt import transform"),
        ("reward", "from rlhf.run import RunFolder"),
        ("gatt", "from ..reward import loss"),
        ("gatt", "import importlib\nimportlib.import_module('rlhf.sft')"),
        ("rlhf", "from tests import tiny_models"),
        ("rlhf", "import pickle"),
        ("rlhf", "load(path, trust_remote_code=True)"),
        ("rlhf", "load(path, **{'trust_remote_code': True})"),
        ("rlhf", "torch.load(path)"),
        ("rlhf", "torch.load(path, weights_only=True)"),
    ],
)
def test_the_check_finds_each_fault(package, source):
    path = ROOT / package / ("inner/x.py" if "from .." in source else "x.py")
    if "from .." in source:
        source = source.replace("..", "...")
    assert faults(source, path) != []


def test_package_files_are_empty():
    for package in (*PACKAGES, "rlhf/simulation"):
        assert (ROOT / package / "__init__.py").read_bytes() == b"", package


def test_no_script_hides_a_module():
    # Launched by path, Python puts rlhf/ first on sys.path: rlhf/logging.py would then replace the standard module.
    for path in (ROOT / "rlhf").glob("*.py"):
        name = path.stem
        assert name not in sys.stdlib_module_names, f"{path.name} hides a standard module"
        if name == "__init__":
            continue
        spec = importlib.util.find_spec(name)
        outside = spec is None or (spec.origin or "").startswith(str(ROOT / "rlhf"))
        assert outside, f"{path.name} hides the installed module {spec.origin if spec else ''}"
