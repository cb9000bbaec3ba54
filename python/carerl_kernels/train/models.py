"""The policy of a recipe: loaded, or built from nothing; as shapes alone for plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import require
from ..grpo.progress import quiet_transformers
from ..grpo.rundir import load_weights, save_weights
from ..task import Domain
from ..tasks.characters import character_tokenizer, tiny_model, warm_up
from .recipe import Lora, ModelSpec

PAD, EOS = "<pad>", "<eos>"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Any:
    """A fast transformers tokenizer with one token per byte, a padding and an end token, and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, chat_template=CHAT, clean_up_tokenization_spaces=False
    )


def load_model(
    spec: ModelSpec, domains: Sequence[Domain], tasks: Sequence[str] = (), start: Path | None = None
) -> tuple[nn.Module, Any]:
    """Model and tokenizer, warmed up where the recipe says so.

    Args:
        domains: The domains whose answers the warm-up learns.
        tasks: Character tasks that a model of characters reads and writes.
        start: File of the warmed-up weights; they are read from it where it is there, and written to it where it is not.

    Raises:
        OSError: transformers finds no such model.
        ImportError: A package is missing; says what to install.
        ValueError: Sizes that do not fit together, or no domain with answers to warm up on.
    """
    require("transformers", "the trainer")
    with quiet_transformers():
        model, tokenizer = _load(spec, tasks)
    if start is not None and start.exists():
        load_weights(start, model)
    else:
        if spec.warm_up is not None:
            _warm_up(model, tokenizer, domains, spec)
        if start is not None:
            save_weights(start, model)
    if spec.lora is not None:
        model = add_lora(model, spec.lora, spec.seed)
    model.eval()
    if spec.gradient_checkpointing:
        # The name that transformers 6 keeps, where it is there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in this mode only; sampling and what is not differentiated runs in the other
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model, tokenizer


def _load(spec: ModelSpec, tasks: Sequence[str]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, spec.dtype)
    if spec.scratch is not None:
        tokenizer = byte_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = AutoModelForCausalLM.from_config(scratch_config(spec, tokenizer), dtype=dtype)
    elif spec.path == "smollm2":
        from ..tasks.smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
    elif spec.path == "characters":
        tokenizer = character_tokenizer(tasks)
        model = tiny_model(tokenizer, spec.seed)
    else:
        options = {} if spec.attention is None else {"attn_implementation": spec.attention}
        model = AutoModelForCausalLM.from_pretrained(str(spec.path), dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(spec.path))
    return model.to(dtype), tokenizer


def shapes(spec: ModelSpec) -> nn.Module:
    """The model without weights (meta device): seconds for any size."""
    require("transformers", "the trainer")
    from transformers import AutoConfig, AutoModelForCausalLM

    if spec.scratch is not None:
        config = scratch_config(spec, byte_tokenizer())
    elif spec.path in ("smollm2", "characters"):
        config = _load(spec, ())[0].config
    else:
        config = AutoConfig.from_pretrained(str(spec.path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
        return model if spec.lora is None else add_lora(model, spec.lora, spec.seed)


def scratch_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """The transformers config of a model built from nothing."""
    from transformers import AutoConfig

    settings = dict(spec.scratch or {})
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    try:
        return AutoConfig.for_model(**{"tie_word_embeddings": True, **settings, **tokens})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"model.scratch: expected a transformers config, found {settings} ({error})") from error


def add_lora(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    """The model with trainable adapters in float32, drawn from the seed; everything else frozen."""
    require("peft", "LoRA", "carerl-kernels[trl]")
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _warm_up(model: nn.Module, tokenizer: Any, domains: Sequence[Domain], spec: ModelSpec) -> None:
    assert spec.warm_up is not None
    with_answers = [d for d in domains if all(e.answer is not None for e in d.draw(random.Random(0), 8))]
    if not with_answers:
        raise ValueError("model.warm_up: expected a domain whose examples have answers, found none")
    steps, lr, batch = spec.warm_up.steps, spec.warm_up.lr, spec.warm_up.batch
    warm_up(model, tokenizer, with_answers, seed=spec.seed, steps=steps, batch_per_domain=batch, lr=lr)
