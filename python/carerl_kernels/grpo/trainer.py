"""The run: stages in order, guard attached, evaluation, records, exact resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .._files import write_json
from .._json import nested_tuples
from ..guard import CapabilityGuard
from ..guard.editors import EDITORS, Editor
from ..task import Domain, domain_table
from .config import COSMETIC_FIELDS, GRPOConfig, Stage, lr_factor, stage_names
from .evaluate import example_scores, held_out_losses, mean_score
from .frozen import EarlierWeights
from .learner import Learner
from .parallel import spread_optimizer, spread_state
from .plots import plot_accuracy, plot_training
from .progress import Monitor, Scores, StageProgress
from .rollout import prompt_counts
from .rundir import CheckpointError, RunDirectory, rng_state, set_rng_state
from .sampling import Sampler
from .serving import Serving, write_model
from .views import DomainViews


class GRPOTrainer:
    """Trains a causal LM with GRPO over several domains, in sequence or mixed, optionally behind a guard.

    Args:
        model: Any transformers causal LM, adapters on it or not: whole in a single process, spread by `parallel.shard` over
            several. Losses run in the mode (train or eval) it arrives in.
        config: Settings; defaults if None.
        guard: Edits what the optimizer does to protect earlier domains; None trains plainly.
        monitor: Sees every line of metrics and the scores behind every evaluation; what it says of them is the line's
            "monitor". At the end of a stage those of its domains that are evaluated are measured from where they are then.
        editor: What a batch's gradient is made of. "guard": in mixed stages, of each domain's part the guard takes out what lies
            along the directions of all others, which are seen from one batch a domain before the stage, where the guard does
            not have them yet, and again after it. Or an editor that combines one gradient per domain (PCGrad and others,
            `carerl_kernels.guard.editors`), in every stage. None: what the configuration says. A backward pass per domain.
        run_dir: Where records go; None keeps them in `history` only, without resume.
        make_optimizer: `make_optimizer(parameters) -> Optimizer`; default AdamW of the configuration. The trainer sets
            every group's "lr" before each step.
        sampler: Writes the completions; None: the model itself does.
        recipe: What else decides the run (model, data, guard), as plain JSON; recorded, and compared when resuming.
        on_step: Called with each line of metrics after it is on disk, in every process.

    Attributes:
        history: The lines of metrics.jsonl.
        guard_reports: `guard.report()` at the end of each stage run by this process, by stage name.
        seconds: Wall-clock seconds per phase of this process: sample, reward, loss, step, guard, probe, monitor, eval,
            push, save.

    Raises:
        ValueError: Domains without distinct names, nothing to train, no end-of-sequence token, editor="guard" without a guard, a
            balance by a controller that no monitor has, or several processes that each have the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        domains: Sequence[Domain],
        config: GRPOConfig | None = None,
        *,
        guard: CapabilityGuard | None = None,
        monitor: Monitor | None = None,
        editor: Editor | Literal["guard"] | None = None,
        run_dir: Path | str | None = None,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        sampler: Sampler | None = None,
        recipe: Mapping[str, Any] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = config or GRPOConfig()
        if editor is None and self.config.editor == "guard":
            editor = "guard"
        elif editor is None and self.config.editor in EDITORS:
            editor = EDITORS[self.config.editor](model, self.config.seed)
        if editor == "guard" and guard is None:
            raise ValueError(
                'editor="guard": expected a guard, found guard=None; pass guard=CapabilityGuard(model), or leave editor out'
            )
        self.guard, self.monitor = guard, monitor
        self.editor: Editor | None = None if editor == "guard" else editor
        self.by_domain = editor == "guard"
        self.domains = domain_table(domains)
        self.history: list[dict[str, Any]] = []
        self.guard_reports: dict[str, Mapping[str, Any]] = {}
        self._learner = Learner(model, tokenizer, self.domains, self.config, guard, monitor, self.editor, sampler)
        self.ranks = self._learner.ranks
        self.directory = None if run_dir is None else RunDirectory(run_dir, self.ranks)
        self._recipe = recipe
        self._clock = self._learner.clock
        self._views = DomainViews(self._learner, None if self.directory is None else self.directory.path / "bases")
        self._serving = Serving(self._learner)
        self.seconds = self._clock.seconds
        self._make_optimizer = make_optimizer or partial(
            torch.optim.AdamW, lr=self.config.lr, betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        self._on_step = on_step
        self._optimizer: torch.optim.Optimizer | None = None
        self._earlier = EarlierWeights(model, self.config, self.directory)
        self._step = 0
        self._mixture = self._learner.mixture

    def run(self, stages: Sequence[Stage], *, resume: bool = False) -> list[dict[str, Any]]:
        """Train the stages in order.

        Args:
            resume: Continue the run in `run_dir` from its latest checkpoint, or start it when there is none yet. The
                result is bitwise that of an uninterrupted run on the same machine, number of processes and threads (timings
                aside); with another number of processes it differs by rounding. Model, tokenizer, domains and guard must be
                built as for the first start; weights come from the disk.

        Returns:
            `history`.

        Raises:
            ValueError: A stage names an unknown domain, resume without run_dir, or own answers to rehearse that nobody verifies.
            CheckpointError: run_dir holds a run already (without resume), or one with other settings.
            RewardError: A verifier returned no finite number.
            FloatingPointError: The model diverged.
        """
        stages = list(stages)
        unknown = sorted({d for s in stages for d in s.domains} - self.domains.keys())
        if not stages or unknown:
            raise ValueError(f"expected stages over the domains {list(self.domains)}, found {unknown or 'no stage'}")
        if resume and self.directory is None:
            raise ValueError("resume=True needs the run_dir of the run to continue")
        self._learner.own_answers.check([self.domains[d] for d in dict.fromkeys(d for s in stages for d in s.domains)])
        names = stage_names(stages)
        state = self._open(stages, resume)
        first, offset = (0, 0) if state is None else (state["stage"], state["stage_step"])
        if self.guard is not None:
            ended = first if self.config.record_last else min(first, len(names) - 1)
            for stage, name in zip(stages[:ended], names, strict=False):
                # directions are files of the run, not part of the checkpoint
                if self._by_domain(stage):
                    self._views.load(self.guard, name, stage.domains)
                else:
                    self.guard.add(self._basis_path(name))  # type: ignore[arg-type]  # there is one: it goes on from files
        if state is not None and first == len(stages):
            self._restore(state)
        with StageProgress(self.config.progress and self.ranks.first) as progress:
            if state is None:
                line = self._watched({"step": 0, "stage": None}, evaluate=True)
                self._record({**line, "seconds": self._clock.drain()})
                self._checkpoint(0, 0)
            for i in range(first, len(stages)):
                self._run_stage(stages, i, offset, state, progress)
                state, offset = None, 0
        self._finish(stages, names)
        return self.history

    # ---- stages

    def _run_stage(
        self, stages: list[Stage], index: int, offset: int, state: dict[str, Any] | None, progress: StageProgress
    ) -> None:
        stage, name, config = stages[index], stage_names(stages)[index], self.config
        progress.begin(name, stage.steps, offset)
        if self._optimizer is None or config.fresh_optimizer:
            self._optimizer = self._make_optimizer(self._learner.parameters)
        optimizer = self._optimizer
        self._learner.reference = self._earlier.begin(index, offset, self._step, state)
        if state is not None and offset == 0:
            self._restore(state)
        earlier = [d for d in dict.fromkeys(d for s in stages[:index] for d in s.domains) if d not in stage.domains]
        recorded = config.record_last or index + 1 < len(stages)
        with self._guarded(stage, name, optimizer, recorded, resumed=state is not None and offset > 0):
            if state is not None and offset > 0:
                self._restore(state)  # inside the stage: the guard's recording in progress is part of it
            for done in range(offset, stage.steps):
                lr = (stage.lr or config.lr) * lr_factor(
                    done, stage.steps, warmup=config.warmup_steps, decay=config.decay, final=config.final_lr_fraction
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                replayed, shares = config.replay_fraction, self._mixture.shares(stage)
                counts = prompt_counts(stage.domains, earlier, config.prompts_per_step, replayed, done, shares)
                last = done + 1 == stage.steps
                due = last or (config.eval_every > 0 and (done + 1) % config.eval_every == 0)
                self._serving.refresh(self._step)
                metrics = self._learner.step(optimizer, counts, stage.name, earlier, mixed=stage.mixed, evaluated=due)
                self._serving.check(self._step, metrics)
                self._step += 1
                if last:
                    if self.guard is not None:
                        with self._clock.timed("guard"):
                            self.guard.settle()  # what is evaluated is what stays
                    self._earlier.interpolate()
                position = {"step": self._step, "stage": name, "stage_step": done + 1, "lr": lr}
                line = self._watched({**position, **metrics}, evaluate=due)
                line["seconds"] = self._clock.drain()
                self._record(line)
                self._mixture.warn_if_loud(name, self.history)
                if config.checkpoint_every and (done + 1) % config.checkpoint_every == 0 and not last:
                    self._checkpoint(index, done + 1)
                progress.step(line)
                if self._on_step is not None:
                    self._on_step(line)
        if self.guard is not None:
            self.guard_reports[name] = self.guard.report()
            if self.directory is not None and self.ranks.first:
                write_json(self.directory.path / "bases" / f"{name}.report.json", self.guard_reports[name], default=str)
        if self.monitor is not None:
            self.monitor.rebase([name for name in stage.domains if self.domains[name].eval_examples])
        self._checkpoint(index + 1, 0)

    @contextmanager
    def _guarded(
        self, stage: Stage, name: str, optimizer: torch.optim.Optimizer, recorded: bool, resumed: bool
    ) -> Iterator[None]:
        """Guard attached, and recording unless told otherwise, for the length of a stage."""
        guard, by_domain = self.guard, self._by_domain(stage)
        if guard is None:
            yield
            return
        if by_domain:
            with self._clock.timed("guard"):
                guard.mixed()  # says what it cannot do before anything is sampled
                self._serving.refresh(self._step, fresh=True)
                self._views.before(guard, name, stage.domains, resumed)
        elif stage.mixed:
            guard.meets_mixed(stage.domains)
        with ExitStack() as stack:
            with self._clock.timed("guard"):
                guard.attach(optimizer)
                stack.callback(guard.detach)
                if by_domain:
                    self._learner.by_domain = True
                    stack.callback(setattr, self._learner, "by_domain", False)
                else:
                    path = self._basis_path(name)
                    inside = guard.stage(stage.name, path=path) if recorded else guard.domain(stage.name)
                    self._learner.recorder = stack.enter_context(inside)
                    stack.callback(setattr, self._learner, "recorder", None)
            yield
            with self._clock.timed("guard"):
                stack.close()  # the stage's end makes its basis
        if by_domain and recorded:
            with self._clock.timed("guard"):
                self._serving.refresh(self._step, fresh=True)
                self._views.after(guard, name, stage.domains)

    def _by_domain(self, stage: Stage) -> bool:
        """Whether the guard acts on each domain's part of the stage's batches."""
        return self.by_domain and stage.mixed

    def _basis_path(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory.path / "bases" / f"{name}.safetensors"

    def _watched(self, line: dict[str, Any], *, evaluate: bool) -> dict[str, Any]:
        """The line with its evaluation, if one is due, and with what the monitor says."""
        if not evaluate and self.monitor is None:
            return line
        if evaluate:
            self._serving.refresh(self._step, fresh=True)
        kept = rng_state()  # verifiers may draw from the global generators: how often we look must change nothing
        scores: Scores | None = None  # of every example, None where no completion of it was judged
        if evaluate:
            found = self._evaluate()
            line["eval"] = {name: mean_score(values) for name, values in found.items()}
            scores = {name: [total / count if count else None for total, count in of] for name, of in found.items()}
        if self.monitor is not None:
            losses = partial(held_out_losses, self.model, self.tokenizer, self.domains.values(), self._learner.tokens)
            with self._clock.timed("monitor"):
                said = self.monitor.step(
                    line["step"],
                    line,
                    scores=scores,
                    losses=partial(losses, batch_size=self.config.eval_batch_size, ranks=self.ranks),
                    acting=line["stage"],
                )
            if said:
                line["monitor"] = said
        set_rng_state(kept)
        return line

    def _evaluate(self) -> dict[str, list[tuple[float, int]]]:
        config, tokens = self.config, self._learner.tokens
        settings: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "num_samples": config.eval_samples,
            "batch_size": config.eval_batch_size,
            "seed": config.seed,
            "sampler": self._learner.sampler,
            "ranks": self.ranks,
        }
        evaluated = [domain for domain in self.domains.values() if domain.eval_examples]
        with self._clock.timed("eval"):
            return {d.name: example_scores(self.model, self.tokenizer, d, tokens, **settings) for d in evaluated}

    # ---- records

    def _open(self, stages: list[Stage], resume: bool) -> dict[str, Any] | None:
        """Start the run directory, or load weights, metrics and state of the latest checkpoint."""
        if self.directory is None:
            return None
        settings = {
            "config": self.config.model_dump(mode="json"),
            "stages": [{"domain": s.domain, "steps": s.steps, "lr": s.lr, "shares": s.shares} for s in stages],
            "domains": list(self.domains),
            "guarded": self.guard is not None,
            "editor": "guard" if self.by_domain else None if self.editor is None else type(self.editor).__name__,
            "controller": self._mixture.settings,
            "parameters": sum(p.numel() for p in self._learner.parameters),
            "recipe": None if self._recipe is None else dict(self._recipe),
            "processes": self.ranks.size,
        }
        self.directory.sweep()
        there = self.directory.config_path.exists  # as soon as a run starts
        if not resume or not self.ranks.on_first(there):
            self.directory.start(settings)
            return None
        self.directory.check(settings, COSMETIC_FIELDS)
        state = self.directory.load_checkpoint(self.model)
        if state is None:
            metrics = self.directory.metrics_path
            lines = self.ranks.on_first(lambda: metrics.read_text().splitlines() if metrics.exists() else [])
            if len(lines) > 1:  # known to all before the first process removes the file
                raise CheckpointError(
                    f"{self.directory.path} has metrics of training but no checkpoint; delete it and start anew"
                )
            if self.ranks.first:
                metrics.unlink(missing_ok=True)  # stopped during the evaluation before training
            return None
        self.history = self.directory.truncate(state["step"])
        self._step = state["step"]
        return state

    def _carried(self) -> dict[str, Any]:
        """What a checkpoint takes along of the run's parts."""
        parts = {
            "monitor": self.monitor,
            "editor": self.editor,
            "mixture": self._mixture,
            "serving": self._serving,
            "own_answers": self._learner.own_answers,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _restore(self, state: dict[str, Any]) -> None:
        """Random states, optimizer and guard as they were."""
        if state["optimizer"] is not None:
            if self._optimizer is None:
                self._optimizer = self._make_optimizer(self._learner.parameters)
            self._optimizer.load_state_dict(spread_optimizer(state["optimizer"], self._optimizer))
        if self.guard is not None:
            self.guard.load_state_dict(spread_state(state["guard"], self.guard.state_dict()))
        for name, part in self._carried().items():
            if state.get(name) is not None:
                part.load_state_dict(state[name])
        for name, rewards in state.get("rewards", {}).items():
            reward: Any = self.domains[name].reward
            reward.load_state_dict(rewards)
        self._learner.rng.setstate(nested_tuples(state["prompts"]))
        kept = state["global"]  # one per process; another number of processes goes on with the first one's
        set_rng_state(kept[self.ranks.rank if len(kept) == self.ranks.size else 0])

    def _checkpoint(self, stage: int, stage_step: int) -> None:
        if self.directory is None:
            return
        carries = self._optimizer is not None and (stage_step > 0 or not self.config.fresh_optimizer)
        state = {
            "step": self._step,
            "stage": stage,
            "stage_step": stage_step,
            "optimizer": self._optimizer.state_dict() if carries and self._optimizer is not None else None,
            "guard": None if self.guard is None else self.guard.state_dict(),
            **{name: part.state_dict() for name, part in self._carried().items()},
            "rewards": {
                name: domain.reward.state_dict()
                for name, domain in self.domains.items()
                if hasattr(domain.reward, "state_dict")
            },
            "prompts": self._learner.rng.getstate(),
            **self._earlier.state(),
            "global": self.ranks.gather(rng_state()),
        }
        with self._clock.timed("save"):
            self.directory.save_checkpoint(self._step, self.model, state, self.config.keep_checkpoints)

    def _record(self, line: dict[str, Any]) -> None:
        self.history.append(line)
        if self.directory is not None:
            self.directory.append(line)

    def _finish(self, stages: list[Stage], names: list[str]) -> None:
        """The trained model in transformers' own format, and pictures."""
        if self.directory is None:
            return
        if hasattr(self.model, "save_pretrained"):
            folder = self.directory.path / "model"
            write_model(self.model, self.tokenizer, self.ranks, lambda write: write(folder))
        if not self.config.plots or not self.ranks.first:
            return
        ends = list(zip(accumulate(s.steps for s in stages), names, strict=True))
        try:
            plot_accuracy(self.directory.path / "accuracy.png", self.history, ends)
            plot_training(self.directory.path / "training.png", self.history, ends)
        except ImportError as e:
            warnings.warn(f"no pictures: {e}", stacklevel=2)
