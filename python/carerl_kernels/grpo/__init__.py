"""Thin GRPO reference trainer: any transformers causal LM, several verifiable domains, exact resume.

Importing it loads torch and pydantic only; transformers, matplotlib and rich are imported where they are used.
"""

from ..logprobs import answer_logprobs, answer_loss, completion_logprobs, success_probability
from ..task import BatchReward, Domain, Example, RewardError
from ..text import SpecialTokens, encode_answers, encode_prompts, special_tokens
from .config import GRPOConfig, Stage, lr_factor
from .evaluate import evaluate, example_scores
from .losses import LossStats, kl_k3, policy_loss
from .rollout import Batch, informative_fraction, prompt_counts, reward_statistics, rollout
from .rundir import CheckpointError, RunDirectory
from .sampling import Rollout, nucleus, sample
from .trainer import GRPOTrainer

__all__ = [
    "Batch",
    "BatchReward",
    "CheckpointError",
    "Domain",
    "Example",
    "GRPOConfig",
    "GRPOTrainer",
    "LossStats",
    "RewardError",
    "Rollout",
    "RunDirectory",
    "SpecialTokens",
    "Stage",
    "answer_logprobs",
    "answer_loss",
    "completion_logprobs",
    "encode_answers",
    "encode_prompts",
    "evaluate",
    "example_scores",
    "informative_fraction",
    "kl_k3",
    "lr_factor",
    "nucleus",
    "policy_loss",
    "prompt_counts",
    "reward_statistics",
    "rollout",
    "sample",
    "special_tokens",
    "success_probability",
]
