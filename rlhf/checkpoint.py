"""Training state on disk: whole or not at all, and without pickle.

A checkpoint is a folder `checkpoint-<step>` with the trained weights of each model, the optimizer's tensors (both
safetensors) and `state.json` (random generators, counters). It is written beside its final name and renamed once
complete, so a kill at any moment leaves the previous one. Weights that are not trained are not stored: they are loaded
from the run's settings again.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import UserError
from rlhf import zero3
from rlhf.run import NOT_COMPARED, plain, saved_settings
from rlhf.sharding import assign, like, whole

# Settings that a continued run may change: how long it runs, what it writes, and what stops steps that are not finite.
ADJUSTABLE = (*NOT_COMPARED, "total_iterations", "save_steps", "num_samples", "learning_rate", "value_learning_rate",
              "max_grad_norm", "max_kl_nats", "judge_patience")  # fmt: skip
Trained = Mapping[str, Mapping[str, nn.Parameter]]  # by role, by name


def save_checkpoint(
    folder: str | Path,
    step: int,
    trained: Trained,
    optimizer: torch.optim.Optimizer | zero3.Optimizer,
    state: Mapping[str, Any],
    write: bool = True,
) -> None:
    """Write `folder/checkpoint-<step>` and drop older ones. `state` is JSON; the random generators are added to it.

    Every process calls it, as sharded tensors come together for it; one has `write`.
    """
    final = Path(folder) / f"checkpoint-{step}"
    weights = {name: whole_tensors(parameters, write) for name, parameters in trained.items()}
    tensors = {index: whole_tensors(moments, write) for index, moments in optimizer.state_dict()["state"].items()}
    if not write:
        return
    partial = Path(folder) / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, whole_weights in weights.items():
        save_file(whole_weights, partial / f"{name}.safetensors")
    flat = {f"{index}.{key}": value for index, moments in tensors.items() for key, value in moments.items()}
    save_file(flat, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(
        json.dumps({"step": step, **state, "random": random_states()}), encoding="utf-8"
    )
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for other in _checkpoints(folder):
        if other != final:
            shutil.rmtree(other)


def load_checkpoint(
    folder: str | Path, trained: Trained, optimizer: torch.optim.Optimizer | zero3.Optimizer
) -> dict[str, Any] | None:
    """Put the newest checkpoint under `folder` into weights, optimizer and random generators; its state, or None."""
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    for name, weights in trained.items():
        load_weights(weights, path / f"{name}.safetensors")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, own in moments.items():
        moments[index] = {name: like(x, parameters[index]) if x.ndim else x for name, x in own.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    set_random_states(state.pop("random"))
    return state


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All parts of each, where `keep`, in the CPU's memory: a GPU has no room for all; every process has to call it."""
    together = ((name, whole(tensor).detach()) for name, tensor in tensors.items())
    return {name: tensor.cpu().contiguous() for name, tensor in together if keep}


@torch.no_grad()
def load_weights(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Put stored weights into the parameters of these names. Raises ValueError where the names differ."""
    stored = load_file(path)
    if stored.keys() != parameters.keys():
        raise ValueError(f"{path} holds other weights than this run trains")
    for name, parameter in parameters.items():
        assign(parameter, stored[name])


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def latest_step(folder: str | Path) -> int:
    """The step of the newest complete checkpoint under `folder`; 0 where there is none."""
    found = _checkpoints(folder)
    return int(found[-1].name.split("-")[1]) if found else 0


def random_states() -> dict[str, Any]:
    """The states of the Python, NumPy and torch generators, as JSON."""
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in states["cuda"]])


def _checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def check_same_run(output_dir: str, settings: dict[str, Any]) -> None:
    """UserError where the checkpoint in `output_dir` is of a run that was set up in another way."""
    if latest_step(output_dir) > settings["total_iterations"]:
        raise UserError(
            f"{output_dir} holds a checkpoint of iteration {latest_step(output_dir)}, behind total_iterations "
            f"{settings['total_iterations']}. Name another output_dir, or pass --resume false to begin again there"
        )
    before = saved_settings(output_dir)
    now = plain(settings)
    changed = [name for name in now if name not in ADJUSTABLE and before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{output_dir} holds a checkpoint of a run with another {', '.join(changed)}. Name another output_dir, "
            "pass --resume false to begin again there, or set it back"
        )
