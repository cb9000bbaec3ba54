"""One TRL run over three pooled domains on a CPU: how unequal shares wear domains down, and what holds them.

    python examples/trl_pooled.py    # about a minute; needs pip install 'carerl-kernels[trl]'

A small Qwen3 knows a little of sorting letters ("code"), repeating them ("chat") and comparing digits ("math"). Three quarters of
the prompts are chat's. Plainly; then with the guard on each domain's part of the gradient; then with the run's own right answers
rehearsed as well. Printed: the exact probability of the right answer on held-out prompts. One seed is no evidence.
"""

import random
import tempfile

import datasets
import trl
from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import special_tokens, success_probability
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.rewards import exact_match
from carerl_kernels.rewards.adapters import trl_reward
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model, warm_up

STEPS = 40
SHARES = {"code": 64, "chat": 384, "math": 64}
DOMAINS = {domain.name: domain for domain in demo_domains(seed=0)}
TOKENIZER = character_tokenizer()
TOKENIZER.padding_side = "left"

rows = [
    {"prompt": e.prompt, "answer": e.answer, "domain": name}
    for name, count in SHARES.items()
    for e in DOMAINS[name].draw(random.Random(0), count)
]
data = datasets.Dataset.from_list(rows).shuffle(seed=0)
seen = {name: [e.prompt + e.answer for e in DOMAINS[name].draw(random.Random(1), 64)] for name in SHARES}
start = tiny_model(TOKENIZER, seed=0)
warm_up(start, TOKENIZER, list(DOMAINS.values()), seed=0)


def train(**options):
    model = tiny_model(TOKENIZER, seed=0)
    model.load_state_dict(start.state_dict())
    sizes = {"per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 5, "max_steps": STEPS}
    common = {"learning_rate": 3e-3, "bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(folder, **sizes, **common)
        rewards = [trl_reward(exact_match)]
        trainer = CareGRPOTrainer(model, rewards, args, data, processing_class=TOKENIZER, **options)
        trainer.train()
    return trainer.model


def show(label, model):
    tokens = special_tokens(TOKENIZER, model)
    for name in SHARES:
        value = success_probability(model, TOKENIZER, DOMAINS[name].eval_examples, tokens).mean()
        label += f"   {name} {float(value):.2f}"
    return label


guarded = {"guard": CapabilityGuard, "protect": seen, "editor": "guard"}
lines = [
    show("before               ", start),
    show("pooled               ", train()),
    show("guard on each part   ", train(**guarded)),
    show("guard and own answers", train(**guarded, self_rehearsal_weight=0.5)),
]
print(*lines, sep="\n")
