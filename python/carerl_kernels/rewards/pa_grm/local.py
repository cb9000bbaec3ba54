"""A judge that runs here: a transformers model, decoded in batches, every token allowed by the schema's grammar."""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._errors import require
from ...text import decoding, encode_prompts, left_pad, position_ids, special_tokens
from .backend import BackendError, Meter, Reply, Request, Token

_PATIENCE = 0.02  # seconds to wait for more requests before a batch starts


class LocalModel:
    """A causal language model as a judge's backend.

    Requests that arrive together are decoded together. The grammar of a schema (llguidance) masks every token that would
    break it, so a complete reply is valid by construction; the log-probabilities of a scale's digits come from the
    model's own logits through `torch.ops.carerl.token_logprobs`.

    Args:
        model: transformers causal LM.
        tokenizer: Its fast tokenizer; with a chat template, unless the texts are to be joined by newlines.
        name: The name for cache keys and traces; by default the model's `name_or_path`.
        batch_size: Most requests decoded at once.

    Raises:
        ImportError: llguidance is missing; says what to install.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None = None, batch_size: int = 8) -> None:
        require("llguidance", "a local judge", "carerl-kernels[judge]")
        import llguidance
        import llguidance.hf

        self._llguidance = llguidance
        self._tokens = special_tokens(tokenizer, model)
        self._grammar_tokens = llguidance.hf.from_tokenizer(tokenizer, eos_token=list(self._tokens.eos))
        self.lm, self.tokenizer = model.eval(), tokenizer
        self.batch_size = batch_size
        self.model = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.meter = Meter()
        # per event loop: a future belongs to the loop that waits for it
        self._waiting: weakref.WeakKeyDictionary[Any, list[tuple[Request, asyncio.Future[Reply]]]]
        self._waiting = weakref.WeakKeyDictionary()
        self._collectors: set[asyncio.Future[None]] = set()
        self._busy = threading.Lock()  # one batch at a time, whichever event loop asks

    async def complete(self, request: Request) -> Reply:
        """One reply. See `Backend.complete`."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, [])
        future: asyncio.Future[Reply] = loop.create_future()
        waiting.append((request, future))
        if len(waiting) == 1:
            collector = asyncio.ensure_future(self._collect(waiting))
            self._collectors.add(collector)  # the event loop itself does not keep tasks alive
            collector.add_done_callback(self._collectors.discard)
        return await future

    async def _collect(self, waiting: list[tuple[Request, asyncio.Future[Reply]]]) -> None:
        """Decodes everything that waits, in batches, until nothing waits."""
        await asyncio.sleep(_PATIENCE)
        while waiting:
            # of one length class at a time: a batch runs until its longest reply ends
            waiting.sort(key=lambda entry: (entry[0].name, entry[0].max_tokens))
            batch = waiting[: self.batch_size]
            del waiting[: self.batch_size]
            for (_, future), reply in zip(batch, await self._replies([r for r, _ in batch]), strict=True):
                if future.done():
                    continue
                if isinstance(reply, Reply):
                    future.set_result(reply)
                else:
                    future.set_exception(BackendError(f"{self.model}: {type(reply).__name__}: {reply}"))

    async def _replies(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Replies of a batch; where it fails, of each request by itself: one too long a prompt is not the others' failure."""
        try:
            return await asyncio.to_thread(self.generate, requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
        return [(await self._replies([request]))[0] for request in requests]

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies to several requests in one batch.

        Raises:
            ValueError: A schema that llguidance cannot compile, or a prompt without tokens.
        """
        with self._busy:
            return self._generate(requests)

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Reply]:
        device = next(self.lm.parameters()).device
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        texts = [r.messages if chat else "\n".join(m["content"] for m in r.messages) + "\n" for r in requests]
        prompts = encode_prompts(self.tokenizer, texts)
        limit = getattr(getattr(self.lm, "config", None), "max_position_embeddings", None)
        longest = max(len(prompt) for prompt in prompts)
        if limit is not None and longest >= limit:
            raise ValueError(f"expected a prompt of fewer than {limit} tokens, which the model reads, found {longest}")
        rows = [_Row(self, request) for request in requests]
        ids, mask = left_pad(prompts, self._tokens.pad, device)  # [B, P]
        positions = position_ids(mask)
        decode, cache = decoding(self.lm), None
        while True:
            logits, cache = decode(ids, mask, positions, cache)  # [B, V]
            chosen = [row.step(own) for row, own in zip(rows, logits.float(), strict=True)]
            if all(row.done for row in rows) or (limit is not None and mask.shape[1] >= limit):
                break  # what is not done then was cut off
            ids = torch.tensor([[self._tokens.pad if c is None else c] for c in chosen], device=device)
            mask = torch.cat([mask, torch.tensor([[int(c is not None)] for c in chosen], device=device)], 1)
            positions = positions[:, -1:] + 1
        for row, prompt in zip(rows, prompts, strict=True):
            self.meter.paid(len(prompt), len(row.tokens))
        return [row.reply() for row in rows]


class _Row:
    """One reply being written."""

    def __init__(self, owner: LocalModel, request: Request) -> None:
        matcher = owner._llguidance.LLMatcher
        # No optional white space: fewer tokens, and no endless blanks from weak models.
        schema = dict(request.schema) | {"x-guidance": {"whitespace_flexible": False}}
        self.matcher = matcher(owner._grammar_tokens, matcher.grammar_from_json_schema(json.dumps(schema)))
        if self.matcher.is_error():
            raise ValueError(f"schema {request.name!r} cannot be compiled: {self.matcher.get_error()}")
        self.owner, self.request = owner, request
        self.tokens: list[Token] = []
        self.done = self.complete = False
        self._generator = torch.Generator().manual_seed(request.seed)
        single = {c: owner.tokenizer.encode(c, add_special_tokens=False) for c in request.choices}
        self.choices = {c.encode(): ids[0] for c, ids in single.items() if len(ids) == 1}

    def step(self, logits: Tensor) -> int | None:
        """Takes the next token from logits [V]; None when the reply has ended."""
        if self.done:
            return None
        packed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)  # lowest bit first
        allowed = ((packed[:, None] >> torch.arange(8)) & 1).flatten().bool()[: logits.numel()]  # [V]
        allowed = torch.nn.functional.pad(allowed, (0, logits.numel() - allowed.numel())).to(logits.device)
        masked = logits.masked_fill(~allowed, -torch.inf)
        if self.request.temperature == 0:
            token = int(masked.argmax())
        else:
            weights = torch.softmax(masked / self.request.temperature, 0).cpu()
            token = int(torch.multinomial(weights, 1, generator=self._generator))
        if token in self.owner._tokens.eos:
            self.done = self.complete = True
            return None
        self.matcher.consume_token(token)
        self.tokens.append(Token(self.owner._grammar_tokens.decode_bytes([token]), self._alternatives(token, logits)))
        if self.matcher.is_stopped():
            self.done, self.complete = True, self.matcher.is_accepting() or not self.matcher.is_error()
        elif len(self.tokens) >= self.request.max_tokens:
            self.done = True
        return None if self.done else token

    def _alternatives(self, token: int, logits: Tensor) -> dict[bytes, float]:
        """Log-probabilities of all choices, where one of them was taken."""
        if token not in self.choices.values():
            return {}
        ids = torch.tensor(list(self.choices.values()), device=logits.device)  # [C]
        logp, _ = torch.ops.carerl.token_logprobs(logits.expand(len(ids), -1).contiguous(), ids)
        return dict(zip(self.choices, logp.tolist(), strict=True))

    def reply(self) -> Reply:
        data = b"".join(t.text for t in self.tokens)
        return Reply(data.decode(errors="replace"), self.complete, tuple(self.tokens))
