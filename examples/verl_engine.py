"""verl's own FSDP2 engine behind the guard, on a CPU: records a stage, then trains against it; no ray, no rollouts.

    python examples/verl_engine.py    # needs pip install verl (run with 0.9.1)

verl knows GPUs only, so a platform "cpu" is registered with it first; everything else is its engine as it is. Printed: how far
the guarded engine ends from one to whose optimizer a guard was attached by hand (0), and what the guard reports.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from carerl_kernels import CapabilityGuard, DomainBasis
from carerl_kernels.integrations.verl import guarded, install
from carerl_kernels.tasks.characters import GENERATORS, character_tokenizer, tiny_model

os.environ["VERL_PLATFORM"] = "cpu"
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
TOKENIZER = character_tokenizer()


def register_cpu() -> None:
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    members: dict[str, Any] = {name: lambda self, *args, **kwargs: None for name in PlatformBase.__abstractmethods__}
    for name, value in {"device_name": "cpu", "vendor_name": "cpu", "device_module": torch.cpu}.items():
        members[name] = property(lambda self, value=value: value)
    for name, value in {"is_available": True, "current_device": "cpu", "device_count": 1}.items():
        members[name] = lambda self, value=value: value
    PlatformRegistry.register("cpu")(type("PlatformCPU", (PlatformBase,), members))
    # verl patches this class of older TRLs
    trl.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (torch.nn.Module,), {})


def build(engine: type, folder: Path) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    built = engine(
        model_config=HFModelConfig(
            path=str(folder / "model"),
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", mixed_precision=precision, use_torch_compile=False),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=100, lr_warmup_steps=0, weight_decay=0.0),
        checkpoint_config=CheckpointConfig(),
    )
    built.initialize()
    return built


def train(engine: Any, examples: list[Any], steps: int = 4) -> dict[str, float]:
    """Supervised steps of 8 examples in two micro-batches; verl's engine takes any loss of its outputs."""
    from verl.utils import tensordict_utils
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict]:
        return -model_output["log_probs"].values().mean() / 2, {}

    for step in range(steps):
        rows = [torch.tensor(TOKENIZER(e.prompt + e.answer)["input_ids"]) for e in examples[8 * step : 8 * step + 8]]
        tensors = {
            "input_ids": nested(rows),
            "position_ids": nested([torch.arange(len(row)) for row in rows]),
            "loss_mask": nested([torch.ones(len(row)) for row in rows]),
            "temperature": torch.ones(len(rows)),
        }
        options = {
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 4,
            "use_remove_padding": False,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": TOKENIZER.pad_token_id,
        }
        with engine.train_mode():
            metrics = engine.train_batch(tensordict_utils.get_tensordict(tensors, options), loss)["metrics"]
    return metrics


def main() -> None:
    register_cpu()
    from verl.workers.engine import EngineRegistry

    folder = Path(tempfile.mkdtemp())
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    tiny_model(TOKENIZER, 0).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    plain = next(iter(EngineRegistry._engines["language_model"]["fsdp2"].values()))
    path = folder / "math.safetensors"

    recording = build(install(lambda model: CapabilityGuard(model, k=4), stage="math", path=path), folder)
    train(recording, GENERATORS["math"]())
    recording.save_checkpoint(str(folder / "checkpoint"))
    print(f"{type(recording).__name__}: {DomainBasis.load(path).info.steps} steps recorded")

    def load(model: torch.nn.Module) -> CapabilityGuard:
        return CapabilityGuard.load(path, model=model, rule="remove")

    behind = build(guarded(plain, load, domain=lambda batch: "code"), folder)
    metrics = train(behind, GENERATORS["code"]())
    by_hand = build(plain, folder)
    guard = load(by_hand.module)
    guard.attach(by_hand.optimizer)
    with guard.domain("code"):
        train(by_hand, GENERATORS["code"]())
    pairs = zip(behind.module.parameters(), by_hand.module.parameters(), strict=True)
    print(f"largest difference: {max(float((a - b).full_tensor().abs().max()) for a, b in pairs)}")
    print({name: value for name, value in metrics.items() if name.startswith(("guard/math", "grad_norm"))})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
