"""Shared fixtures. Everything is made in process from a seed: no download, no cache folder."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

# The same examples on every machine, and no failures because a busy machine was slow.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture
def tokenizer():
    """Byte-level BPE: <unk> 0, <s> 1, </s> 2, <pad> 3; no chat template. Fresh, so a test may change it."""
    return tiny_tokenizer()


@pytest.fixture
def policy(tokenizer):
    """A Llama of a few thousand weights with grouped-query attention (4 heads, 2 key/value heads)."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(len(tokenizer))).eval()


@pytest.fixture(scope="session")
def kit() -> Path:
    """The folder of real test data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("RLHF_KIT", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set RLHF_KIT")
    return folder
