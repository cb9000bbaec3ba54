"""Sampling from an inference engine that serves a copy of the policy: vLLM or SGLang behind their OpenAI-compatible server.

Prompts go out as token ids, token ids and their log-probabilities come back: nothing is tokenised twice. The engine gets new
weights through the disk: the trainer writes the model in transformers' format and calls the engine's own reload,

    vllm     POST /collective_rpc {"method": "reload_weights", "kwargs": {"weights_path": ...}}, POST /reset_prefix_cache
             (started with VLLM_SERVER_DEV_MODE=1)
    sglang   POST /update_weights_from_disk {"model_path": ..., "flush_cache": true}

so both machines must see the folder. Between two pushes completions come from weights some steps old; the metric "staleness"
counts them, and the loss compares with the engine's log-probabilities (`old_logprobs="sampler"`), which corrects for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .._errors import at_least, one_of
from .._http import RetryingClient, TryAgainError, raise_if_transient
from .._json import as_logprob
from .._loop import run_sync
from ..text import SpecialTokens, left_pad, right_pad
from .sampling import Rollout, SamplerError

LOGGER = logging.getLogger("carerl_kernels.sampler")
Engine = Literal["vllm", "sglang"]
LIMITS = {"max_in_flight": 64, "timeout": 600.0, "attempts": 5, "backoff": 0.5, "max_backoff": 30.0}
LARGEST_VOCABULARY = 2**24  # of any model there is, where the policy's own size is unknown
WRITTEN = re.compile(r"(?P<temporary>\.tmp-)?step-(?P<step>\d{8})")  # folders of weights
TRUNCATED = (
    "top_p: expected 1 where an engine samples at another temperature than 1, found top_p={top_p} at temperature={temperature}: "
    "the log-probabilities it then reports are those after truncation, which the loss cannot compare with; set one of them to 1"
)


def completion_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a prompt's single completions, from that of the prompt."""
    rng = random.Random(int(seed))
    return [rng.getrandbits(31) for _ in range(count)]


class EndpointSampler:
    """A `Sampler` that asks an engine.

    Args:
        url: Up to and including /v1.
        model: The model's name in the engine.
        tokens: Padding, end and banned ids of the policy.
        engine: The engine whose calls reload weights.
        folder: Weights for the engine are written to "served" in it, and older ones there removed: a folder of this run alone.
        sync_every: Steps between two pushes of weights; 1: completions always come from the present ones.
        api_key: The key, by default the environment's CARERL_SAMPLER_API_KEY, if any.
        reload_timeout: Seconds for the engine to read weights.
        max_gap: Largest mean |log-probability in training - from the engine| that is still believed, in nats per token, where
            the engine has the present weights.
        dtype: The dtype of the weights written for it; None: as they are trained.
        limits: Of `RetryingClient`: max_in_flight (prompts for vLLM, single completions for SGLang), timeout (seconds for one
            attempt at a request), attempts, backoff, max_backoff.

    Raises:
        ImportError: httpx is missing; says what to install.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokens: SpecialTokens,
        *,
        engine: Engine = "vllm",
        folder: Path | str,
        sync_every: int = 1,
        device: torch.device | None = None,
        api_key: str | None = None,
        reload_timeout: float = 600.0,
        max_gap: float = 0.3,
        dtype: torch.dtype | None = None,
        **limits: Any,
    ) -> None:
        key = os.environ.get("CARERL_SAMPLER_API_KEY") if api_key is None else api_key
        self._client = RetryingClient(url, key=key, log=LOGGER, **(LIMITS | limits))
        one_of("engine", engine, get_args(Engine))
        at_least("sync_every", sync_every, 1)
        self.url, self.model, self.tokens, self.engine = self._client.url, model, tokens, engine
        self.folder = Path(folder).resolve() / "served"
        self.sync_every, self.reload_timeout = sync_every, reload_timeout
        self.max_gap, self.dtype = max_gap, dtype
        self.device = device or torch.device("cpu")
        self.served: int | None = None  # the step whose weights the engine has

    # ---- completions

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> Rollout:
        """See `Sampler`. The entropy of a token is estimated by its -log p, which has that mean.

        Raises:
            SamplerError: No usable answer.
            ValueError: top_p below 1 away from temperature 1.
        """
        if top_p < 1 and temperature != 1:
            raise ValueError(TRUNCATED.format(top_p=top_p, temperature=temperature))
        # SGLang's deterministic mode gives all n completions of a request the same seed, and so makes them equal
        single = self.engine == "sglang"
        seeds = [s for seed in seeds for s in (completion_seeds(seed, num_samples) if single else [int(seed)])]
        asked = [list(prompt) for prompt in prompts for _ in range(num_samples if single else 1)]
        n = 1 if single else num_samples
        body: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": 1,
            "return_token_ids": True,
            "stop_token_ids": list(self.tokens.eos),
            "skip_special_tokens": False,
        }
        if self.tokens.banned:
            body["logit_bias"] = {str(token): -100 for token in self.tokens.banned}

        async def ask_all() -> list[list[tuple[list[int], list[float]]]]:
            return await asyncio.gather(
                *(
                    self._ask({**body, "prompt": prompt, "seed": seed}, n, max_new_tokens)
                    for prompt, seed in zip(asked, seeds, strict=True)
                )
            )

        rows = [row for group in run_sync(ask_all()) for row in group]
        repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
        prompt_ids, prompt_mask = left_pad(repeated, self.tokens.pad, self.device)
        ids, mask = right_pad([ids for ids, _ in rows], self.tokens.pad, self.device)
        logps = torch.zeros(ids.shape, device=self.device)
        for i, (_, values) in enumerate(rows):
            logps[i, : len(values)] = torch.tensor(values, device=self.device)
        return Rollout(prompt_ids, prompt_mask, ids, mask, logps, -logps)

    async def _ask(self, body: dict[str, Any], count: int, limit: int) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities of one prompt's completions."""

        async def attempt() -> list[tuple[list[int], list[float]]]:
            answer = await self._client.post("/completions", body)
            raise_if_transient(answer)
            if answer.status != 200:
                raise SamplerError(
                    f"{self.url} refuses completions of model {self.model!r}: status {answer.status}, "
                    f"{self._client.short(answer.text)}; check url, model (GET {self.url}/models lists them) and "
                    "CARERL_SAMPLER_API_KEY"
                )
            try:
                choices = sorted(answer.json()["choices"], key=lambda c: int(c["index"]))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise TryAgainError(f"no completions in {self._client.short(answer.text)}") from error
            if len(choices) != count:
                raise SamplerError(f"{self.url}: expected n={count} completions of a prompt, found {len(choices)}")
            return [self._completion(choice, limit) for choice in choices]

        try:
            return await self._client.call(attempt)
        except TryAgainError as error:
            raise SamplerError(
                f"cannot sample from {self.url}: {error}, {self._client.attempts} times; start the engine, then resume the run"
            ) from error

    def _completion(self, choice: Mapping[str, Any], limit: int) -> tuple[list[int], list[float]]:
        """Checked ids and log-probabilities of one completion, cut to `limit`."""
        ids, values = choice.get("token_ids"), choice.get("logprobs")
        values = values.get("token_logprobs") if isinstance(values, Mapping) else None
        if not ids or not isinstance(ids, list):
            raise SamplerError(
                f"{self.url} returns no token ids: expected choices[].token_ids, which present releases of vLLM and SGLang give "
                "for return_token_ids, found none; text cannot be trained on, it tokenises in several ways"
            )
        if not isinstance(values, list) or len(values) != len(ids) or any(v is None for v in values):
            raise SamplerError(
                f"{self.url} returns no log-probabilities: expected choices[].logprobs.token_logprobs for {len(ids)} tokens, "
                f"found {len(values) if isinstance(values, list) else 0}; start the engine with log-probabilities allowed"
            )
        size = self.tokens.vocabulary or LARGEST_VOCABULARY
        strange = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size]
        if strange:
            raise SamplerError(
                f"{self.url} returns the token id {self._client.short(str(strange[0]))}, expected numbers from 0 to {size - 1}, "
                "the policy's vocabulary: it serves another model"
            )
        logps = [as_logprob(v) for v in values]
        if None in logps:
            raise SamplerError(
                f"{self.url} returns the log-probability {self._client.short(str(values[logps.index(None)]))}, expected numbers "
                "of at most 0: no sampling draws such a token; see the engine's log"
            )
        if choice.get("finish_reason") == "stop" and ids[-1] not in self.tokens.eos:
            raise SamplerError(
                f"{self.url} ends a completion with token {ids[-1]}, expected one of the policy's end tokens "
                f"{self.tokens.eos}: it serves another model, or leaves the end out"
            )
        return ids[:limit], [v for v in logps[:limit] if v is not None]

    # ---- weights

    def due(self, step: int) -> bool:
        """Whether the engine should get the weights of this step before it samples."""
        return self.served is None or step - self.served >= self.sync_every

    def path(self, step: int) -> Path:
        """Where the weights of a step are."""
        return self.folder / f"step-{step:08d}"

    def push(self, step: int, write: Callable[[Path], Any] | None) -> None:
        """Has the engine load the weights of a step; older ones on the disk go, except those it had before.

        Args:
            write: Writes a model folder; None: it is there.

        Raises:
            SamplerError: The engine does not load them.
            OSError: They cannot be written.
        """
        path = self.path(step)
        if write is not None:
            temporary = path.with_name(f".tmp-{path.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
        run_sync(self._reload(path))
        LOGGER.info("%s serves the weights of step %d", self.url, step)

    def forget(self, keep: set[int]) -> None:
        """Remove the weights of steps that are not to be kept."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            ours = WRITTEN.fullmatch(path.name)
            if ours is not None and (ours["temporary"] or int(ours["step"]) not in keep):
                shutil.rmtree(path, ignore_errors=True)

    async def _reload(self, path: Path) -> None:
        if self.engine == "sglang":
            await self._control("/update_weights_from_disk", {"model_path": str(path), "flush_cache": True})
            return
        await self._control("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        await self._control("/reset_prefix_cache", {})  # keys and values of the old weights

    async def _control(self, call: str, body: dict[str, Any]) -> None:
        client = self._client.at_root(timeout=self.reload_timeout)

        async def attempt() -> None:
            answer = await client.post(call, body)
            refused = answer.status == 200 and '"success":false' in answer.text.replace(" ", "")
            if answer.status != 200 or refused:
                if not refused:
                    raise_if_transient(answer)
                hint = "start it with VLLM_SERVER_DEV_MODE=1" if self.engine == "vllm" else "see its log"
                raise SamplerError(
                    f"{client.url}{call} does not load {body}: status {answer.status}, {client.short(answer.text)}; is this "
                    f"{self.engine}, and does it see that folder? {hint}"
                )

        try:
            await client.call(attempt)
        except TryAgainError as error:
            raise SamplerError(
                f"cannot give new weights to {client.url}: {error}, {client.attempts} times; start the engine, then resume"
            ) from error
        finally:
            await client.aclose()
