"""Settings of the GRPO trainer: one validated object, written verbatim into every run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossKind = Literal["grpo", "dr_grpo", "dapo", "gspo"]

# Settings that cannot change a number a run produces (the number of processes: only its rounding): a resumed run may differ
# in these and nothing else.
COSMETIC_FIELDS = frozenset({"progress", "plots", "checkpoint_every", "keep_checkpoints", "processes"})


class GRPOConfig(BaseModel):
    """Everything that decides what a run computes, besides model, domains, stages and guard.

    Sizes are counted in sequences and tokens: one step draws `prompts_per_step` prompts and samples `group_size`
    completions of each, so B = prompts_per_step * group_size sequences of at most `max_new_tokens` tokens.

    Raises:
        pydantic.ValidationError: A value is out of range, or a name is unknown; the message names field and value.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    # sampling
    prompts_per_step: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=2, description="completions per prompt, which advantages compare")
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0, description="of the policy, in sampling and in the loss alike")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus of sampling; log-probabilities stay untruncated")

    # loss
    loss: LossKind = "grpo"
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0, description="0.28 is the clip-higher of DAPO")
    advantages: Literal["group", "domain", "none"] | None = Field(
        default=None,
        description="what group_advantages divides by: the spread of the group, that of all groups of the domain, "
        "nothing; None: in mixed stages the domain's, for domains whose rewards are on other scales must not be pooled as "
        "they are (the one with the largest numbers takes the step); else as the loss prescribes (dr_grpo nothing, the "
        "others the group's)",
    )
    editor: Literal["guard", "sum", "pcgrad", "modular_surgery"] | None = Field(
        default=None,
        description="what a mixed batch's gradient is made of: guard: each domain's part without what lies along the other "
        "domains' directions; sum: the parts as they are; pcgrad, modular_surgery: of parts that conflict, what opposes "
        "another is removed, over all parameters or in every module; None: the trainer's editor, and guard in a recipe with "
        "a guard",
    )
    kl_beta: float = Field(default=0.0, ge=0, description="weight of the k3 estimate of KL(policy || reference)")
    kl_reference: Literal["start", "stage"] = Field(default="start", description="weights at run or stage start")
    old_logprobs: Literal["policy", "sampler"] = Field(
        default="policy",
        description="policy: recomputed by the training forward, immune to sampler rounding; sampler: as sampled",
    )

    # mixed batches
    balance: Literal["shares", "gradient", "controller"] | None = Field(
        default=None,
        description="shares: prompts whose rewards all agree are drawn anew, so that every domain keeps its share of what is "
        "learned from; gradient: weights under which every domain's gradient has the same norm; controller: the monitor's "
        "raises the share or weight of domains that fall",
    )
    balance_redraws: int = Field(default=2, ge=1, description="balance shares: redraws of a step's prompts, at most")
    balance_limit: float = Field(default=10.0, gt=1, description="balance gradient: weights are from 1 / this to this")

    # optimisation
    lr: float = Field(default=1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=5, ge=0, description="per stage")
    decay: Literal["linear", "constant"] = "linear"
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="of lr, reached at the end of a stage")
    fresh_optimizer: bool = Field(default=True, description="a new optimizer per stage instead of one for the run")
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping")
    inner_epochs: int = Field(default=1, ge=1, description="passes over one batch of rollouts")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps per pass")
    micro_batch_size: int = Field(default=0, ge=0, description="sequences per forward and backward; 0: the minibatch")
    micro_batch_tokens: int = Field(
        default=0, ge=0, description="positions (sequences x longest) per forward and backward; 0: no limit"
    )

    # data
    replay_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of prompts drawn from earlier domains")
    rehearsal_weight: float = Field(
        default=0.0, ge=0, description="weight of the cross-entropy of earlier domains' stored answers (probe_examples)"
    )
    rehearsal_batch: int = Field(default=32, ge=1, description="examples drawn for either in every optimizer step")
    self_rehearsal_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the cross-entropy of the run's own right answers, of all domains trained so far; a verifier says "
        "which are right (Domain.verify), a judge only where it is told to",
    )
    self_rehearsal_size: int = Field(default=256, ge=1, description="right answers kept per domain, a uniform sample")
    stage_interpolation: float = Field(
        default=1.0, gt=0, le=1, description="a stage ends at start + this * (end - start): 1 keeps what was trained"
    )
    record_last: bool = Field(default=True, description="the guard records the last stage too, for later runs")
    seed: int = Field(default=0, ge=0, lt=2**31)

    # evaluation, records
    eval_every: int = Field(default=0, ge=0, description="steps; 0: only before the run and at the end of each stage")
    eval_samples: int = Field(default=1, ge=1, description="completions per example where accuracy is sampled")
    eval_batch_size: int = Field(default=256, ge=1)
    checkpoint_every: int = Field(default=0, ge=0, description="steps; stage ends are always saved in a run directory")
    keep_checkpoints: int = Field(default=2, ge=1)
    progress: bool = True
    plots: bool = Field(default=True, description="draw PNGs into the run directory at the end")

    @model_validator(mode="after")
    def _consistent(self) -> GRPOConfig:
        rows = self.prompts_per_step * self.group_size
        if self.minibatches > rows:
            raise ValueError(
                f"minibatches={self.minibatches} exceeds the {rows} sequences of a step "
                f"(prompts_per_step={self.prompts_per_step} x group_size={self.group_size}); use at most {rows}"
            )
        replayed = round(self.replay_fraction * self.prompts_per_step)
        if self.replay_fraction > 0 and not 0 < replayed < self.prompts_per_step:
            found = "every prompt, leaving none for the stage's own domain" if replayed else "no prompt"
            raise ValueError(
                f"replay_fraction={self.replay_fraction} of prompts_per_step={self.prompts_per_step} rounds to {found}; draw "
                f"more prompts, or {'lower replay_fraction' if replayed else 'raise replay_fraction or set it to 0'}"
            )
        return self

    def advantage_mode(self, mixed: bool = False) -> str:
        """The mode of `torch.ops.carerl.group_advantages` in a stage of one domain, or in a mixed one."""
        return self.advantages or ("domain" if mixed else "none" if self.loss == "dr_grpo" else "group")

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of a `Sampler`."""
        return {"num_samples": self.group_size, **self.model_dump(include={"max_new_tokens", "temperature", "top_p"})}

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps taken on one batch of rollouts."""
        return self.inner_epochs * self.minibatches


@dataclass(frozen=True)
class Stage:
    """One stretch of training: `steps` steps on one domain, or on several mixed within every batch.

    Args:
        domain: A domain's name, or several names for mixed batches (prompts split as evenly as possible).
        steps: Number of rollout batches.
        lr: Learning rate of this stage; None takes the configuration's.
        shares: The shares of the prompts of a mixed stage, one per domain, positive; None: equal.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # where a recipe says it

    domain: str | tuple[str, ...]
    steps: int
    lr: float | None = None
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.domain, str):
            object.__setattr__(self, "domain", tuple(self.domain))
        if not self.domains or not all(isinstance(d, str) and d for d in self.domains):
            raise ValueError(f"Stage: expected a domain name or several, found {self.domain!r}")
        if len(self.name.encode(errors="replace")) > 200:
            raise ValueError(
                f"Stage: expected domains whose names have at most 200 bytes together (they name files), found "
                f"{len(self.name.encode(errors='replace'))}; shorten them"
            )
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"Stage: domain named twice in {self.domain!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Stage {self.name!r}: expected steps >= 1, found {self.steps!r}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"Stage {self.name!r}: expected lr > 0 or None, found {self.lr!r}")
        if self.shares is not None and (len(self.shares) != len(self.domains) or not all(s > 0 for s in self.shares)):
            raise ValueError(f"Stage {self.name!r}: expected a positive share per domain, found {self.shares!r}")

    @property
    def domains(self) -> tuple[str, ...]:
        return (self.domain,) if isinstance(self.domain, str) else self.domain

    @property
    def name(self) -> str:
        return "+".join(self.domains)

    @property
    def mixed(self) -> bool:
        return len(self.domains) > 1


def lr_factor(step: int, total: int, *, warmup: int, decay: str, final: float) -> float:
    """Learning-rate factor of step `step` (from 0) of a stage of `total` steps: linear warm-up, then decay.

    A pure function of the step, so that resuming needs no scheduler state. Warm-up never exceeds the stage.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    return final + (1.0 - final) * (total - step) / (total - warmup)


def stage_names(stages: Sequence[Stage]) -> list[str]:
    """Unique file-safe names of stages: a repeated domain gets its position appended."""
    names = [s.name for s in stages]
    return [n if names.index(n) == i else f"{n}-{i + 1}" for i, n in enumerate(names)]
