"""TRL's GRPOTrainer behind the guard, end to end on a CPU: one domain is learned and recorded, the next must not erase it.

    python examples/trl_guarded.py    # about a minute; needs pip install 'carerl-kernels[trl]'

A small Qwen3 learns to sort letters ("code"), then to repeat them ("chat"), plainly and guarded. Printed: the exact probability
of the right answer on held-out prompts. One seed and one order; the comparison with baselines is `carerl demo`.
"""

import random
import tempfile
from pathlib import Path

import datasets
import trl
from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import special_tokens, success_probability
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.rewards import exact_match
from carerl_kernels.rewards.adapters import trl_reward
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model, warm_up

DOMAINS = {domain.name: domain for domain in demo_domains(seed=0)}
TOKENIZER = character_tokenizer()
TOKENIZER.padding_side = "left"


def train(state, name, folder, **options):
    """Trains a copy of the weights `state` on one domain."""
    model = tiny_model(TOKENIZER, seed=0)
    model.load_state_dict(state)
    examples = DOMAINS[name].draw(random.Random(0), 512)
    rows = [{"prompt": e.prompt, "answer": e.answer, "domain": name} for e in examples]
    sizes = {"per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 5, "max_steps": 60}
    args = trl.GRPOConfig(str(folder / "run"), **sizes, learning_rate=1e-3, bf16=False, use_cpu=True, report_to=[])
    reward, data = [trl_reward(exact_match)], datasets.Dataset.from_list(rows)
    trainer = CareGRPOTrainer(model, reward, args, data, processing_class=TOKENIZER, **options)
    trainer.train()
    return trainer


def show(label, model):
    tokens = special_tokens(TOKENIZER, model)
    for name in ("code", "chat"):
        value = success_probability(model, TOKENIZER, DOMAINS[name].eval_examples, tokens).mean()
        label += f"   {name} {float(value):.2f}"
    return label


folder = Path(tempfile.mkdtemp())
history = folder / "code.safetensors"
start = tiny_model(TOKENIZER, seed=0)
warm_up(start, TOKENIZER, list(DOMAINS.values()), seed=0)
lines = [show("before            ", start)]
code = train(start.state_dict(), "code", folder, guard=CapabilityGuard, stage="code", stage_path=history).model
lines.append(show("after code        ", code))
plain = train(code.state_dict(), "chat", folder)
lines.append(show("then chat, plainly", plain.model))
guarded = train(code.state_dict(), "chat", folder, guard=lambda model: CapabilityGuard.load(history, model=model))
lines.append(show("then chat, guarded", guarded.model))
print(*lines, sep="\n")
moved = guarded.guard.report()["domains"]["code"]["net_displacement"]
print(f"movement along code's directions: {moved:.2f} of what its own stage moved")
