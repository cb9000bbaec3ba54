"""The scripted judge of the examples, for the tests, and a server that answers whatever a test wants."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading

from carerl_kernels.rewards.pa_grm import Endpoint, Scorer
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

from scripted_judge import ScriptedJudge

PROMPT = "Explain why the sky appears blue during the day and red at sunset."
GOOD = (
    "The sky appears blue during the day because air scatters short wavelengths more. At sunset the path is longer, "
    "therefore red light remains."
)
THIN = "The sky is blue."


def scorer(server: ScriptedJudge, *, endpoint: dict | None = None, **settings) -> Scorer:
    """A scorer that does not wait long between its tries."""
    return Scorer(Endpoint(server.url, "scripted", **({"backoff": 0.01, "timeout": 20} | (endpoint or {}))), **settings)


class RawServer:
    """HTTP on loopback; `behave(body)` gives the bytes of each response, or (status, JSON value).

    Attributes:
        url: Up to /v1. requests: Bodies received. heads: Their headers.
    """

    def __init__(self, behave) -> None:
        self.behave, self.requests, self.heads = behave, [], []

    def __enter__(self) -> RawServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *exc: object) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader, writer) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"content-length:\s*(\d+)", head, re.IGNORECASE)
                body = json.loads(await reader.readexactly(int(length[1])))
                self.heads.append(head)
                self.requests.append(body)
                answer = self.behave(body)
                writer.write(answer if isinstance(answer, bytes) else http(*answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


def http(status: int, body, headers: str = "") -> bytes:
    """A response; a body that is no bytes becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data


def chat(content, finish="stop", **more) -> dict:
    """A chat completion; `more` goes into the choice, `usage` and `message` where they belong."""
    message = {"role": "assistant", "content": content} | more.pop("message", {})
    usage = more.pop("usage", {"prompt_tokens": 10, "completion_tokens": 5})
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish} | more], "usage": usage}


WRITTEN = {
    "task": "answer the question",
    "criteria": [{"requirement": r, "weight": 2, "anchors": list("abcde")} for r in ("is right", "gives a reason")],
    "disqualifiers": ["is off topic"],
}


def verdict(score=3, evidence="", violated=False) -> str:
    """A valid reply of a judge under the protocol `WRITTEN`."""
    entry = {"evidence": evidence, "reasoning": "r"}
    return json.dumps({c: entry | {"score": score} for c in ("c1", "c2")} | {"d1": entry | {"violated": violated}})


def asks_for(body) -> str:
    """Whether a request wants a protocol, a verdict or a preference."""
    system = body["messages"][0]["content"]
    return "protocol" if "write evaluation" in system else "preference" if "Compare two" in system else "verdict"


def judging(answer):
    """A server's behaviour: it writes `WRITTEN`, and `answer(body)` to whoever wants a verdict."""
    return lambda body: (200, chat(json.dumps(WRITTEN))) if asks_for(body) == "protocol" else answer(body)


def response_of(body) -> str:
    """The response that a request puts to the judge, as the judge sees it."""
    quoted = body["messages"][1]["content"].rpartition("<<<RESPONSE ")[2].split("\n")[1:-1]
    return "\n".join(line.removeprefix("| ") for line in quoted)


__all__ = ["EXAMPLES", "GOOD", "PROMPT", "THIN", "WRITTEN", "Endpoint", "RawServer", "Scorer", "ScriptedJudge",
    "asks_for", "chat", "http", "judging", "response_of", "scorer", "verdict",
]  # fmt: skip
