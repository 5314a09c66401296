"""Settings of the scaling study (Llama 2 paper §3.2.2, Fig. 6). The reward models' own are in reward_settings.py."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings


@dataclass(kw_only=True)
class ScalingSettings:
    """Which models and which shares of the data: every combination is one cell, a reward model trained and tested."""

    model_name_or_paths: list[str] = field(
        metadata={"help": "Hugging Face folders or Hub names of the models to start from, one line of the plot each"}
    )
    model_labels: list[str] | None = field(
        default=None, metadata={"help": "their names in folders and plots; none: from the paths"}
    )
    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "instead of whole models only their first n layers, for each n given: sizes where there is one "
            "checkpoint. Such models lost what the upper layers knew, so this is no family of trained sizes"
        },
    )
    data_shares: list[float] = field(
        default_factory=lambda: [0.125, 0.25, 0.5, 1.0],
        metadata={"help": "shares of the training data, above 0 and up to 1; smaller ones lie inside larger ones"},
    )
    subset_by: Literal["prompt", "row"] = field(
        default="prompt", metadata={"help": "shares of the prompts (first user turns, all their pairs) or of the pairs"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "each trains all cells, with its own subsets, order of pairs and new head; one test set"},
    )
    parallel_cells: int = field(
        default=1, metadata={"help": "cells trained at once (forked processes of one thread, CPU only)"}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work before any model is looked at."""
        for name in ("model_name_or_paths", "data_shares", "seeds", "model_labels", "layers"):
            values = getattr(self, name)
            if values is not None and not values:
                raise UserError(f"{name}: the list is empty; give at least one")
        if self.model_labels is not None:
            if len(self.model_labels) != len(self.model_name_or_paths):
                raise UserError(
                    f"model_labels: {len(self.model_labels)} labels for {len(self.model_name_or_paths)} "
                    "model_name_or_paths: one each"
                )
            for label in self.model_labels:
                if not re.fullmatch(r"[\w.-]+", label) or set(label) <= {"."}:
                    raise UserError(f"model_labels: {label!r} is to name folders; use letters, digits, . _ and - only")
        for share in self.data_shares:
            if not 0 < share <= 1:
                raise UserError(f"data_shares: must be above 0 and at most 1, got {share}")
        for n in self.layers or []:
            if n < 1:
                raise UserError(f"layers: a model keeps at least 1 layer, got {n}")
        for seed in self.seeds:
            if seed < 0:
                raise UserError(f"seeds: must not be negative, got {seed}")
        _distinct("model_name_or_paths", self.model_name_or_paths)
        _distinct("model_labels", self.labels, "; name the models with model_labels")
        _distinct("data_shares", [f"{share:g}" for share in self.data_shares])
        _distinct("seeds", [str(seed) for seed in self.seeds])
        _distinct("layers", [str(n) for n in self.layers or []])
        if self.parallel_cells < 1:
            raise UserError(f"parallel_cells: must be at least 1, got {self.parallel_cells}")

    @property
    def labels(self) -> list[str]:
        """A name for each model: as given, or the last part of its path (of `runs/sft/model`, the part before)."""
        if self.model_labels is not None:
            return self.model_labels
        found = []
        for path in self.model_name_or_paths:
            parts = PurePath(path).parts
            name = parts[-2] if parts[-1:] == ("model",) and len(parts) > 1 else PurePath(path).name
            found.append(re.sub(r"[^\w.-]", "-", name) or "model")
        return found


@dataclass
class CellModelSettings(ModelSettings):
    """How the model of every cell is loaded and trained; which one it is, each cell says itself."""

    model_name_or_path: str = field(init=False, default="")


@dataclass
class StudyRunSettings(RunSettings):
    """The study's folder, with one run folder a cell in it; the seed is each cell's own."""

    seed: int = field(init=False, default=0)


def _distinct(name: str, values: Sequence[str], fix: str = "") -> None:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise UserError(f"{name}: {twice[0]!r} is there twice{fix}")
