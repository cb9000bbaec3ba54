"""A stand-in for a judge behind an OpenAI-compatible endpoint: real HTTP, scripted answers, no model.

It sees what a model would see and nothing else. Protocols ask for the words of the task, for reasons, and for the reference
answer; verdicts go by the visible text of the response. It obeys whatever instruction reaches it outside of the delimiters
(with `gullible=True` inside of them too), as a weak judge would. What goes wrong with real servers can be scripted.

    python examples/scripted_judge.py --port 8000        # then: carerl score --url http://127.0.0.1:8000/v1 --model scripted ...
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Callable
from typing import Any

BLOCK = re.compile(
    r"<<<(?P<label>[A-Z ]+) (?P<key>[0-9a-f]+)>>>\n(?P<lines>(?:\| .*\n|\|\n)*)<<<END (?P=label) (?P=key)>>>"
)
ORDER = re.compile(r"full marks|highest score|perfect score|\"score\"\s*:\s*4|score\s*[:=]\s*4", re.IGNORECASE)
SMALL = {
    *(
        "about",
        "also",
        "does",
        "each",
        "explain",
        "from",
        "give",
        "have",
        "into",
        "like",
        "list",
        "make",
        "more",
        "name",
    ),
    *(
        "please",
        "some",
        "state",
        "tell",
        "than",
        "that",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "three",
        "using",
    ),
    *("what", "when", "where", "which", "while", "with", "words", "would", "write", "your"),
}


def words(text: str) -> list[str]:
    """Content words in order, once each, cut to their first six letters (a crude stem)."""
    found = re.findall(r"[a-z]{4,}|\d+", text.lower())
    return list(dict.fromkeys(w[:6] for w in found if w not in SMALL))


class ScriptedJudge:
    """The server, in a thread of its own; a context manager.

    Args:
        latency: Seconds before each answer.
        script: `script(n, body)` names what happens to the n-th request (from 0): None or "good", "malformed",
            "truncated", "slow", "400", "401", "429", "500", "reset", "garbage", "lie" (numbers out of range), "wrong keys".
        gullible: Obeys instructions inside the delimiters too.
        knows: Of "schema" and "logprobs"; what is missing is answered with status 400.
        port: 0: any free one.

    Attributes:
        hold: Answers nobody before so many requests were in flight at once.
        url: For `Endpoint`.
        requests: Bodies received.
        peak: Most requests in flight at once.
    """

    def __init__(
        self,
        *,
        latency: float = 0.0,
        script: Callable[[int, dict[str, Any]], str | None] | None = None,
        gullible: bool = False,
        knows: tuple[str, ...] = ("schema", "logprobs"),
        port: int = 0,
    ) -> None:
        self.latency, self.script, self.gullible, self.knows, self.port = latency, script, gullible, knows, port
        self.requests: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.peak = self._now = self.hold = 0
        self.retry_after = "0.01"
        self.url = ""

    def __enter__(self) -> ScriptedJudge:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024), self._loop
        ).result()
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

    def count(self, kind: str) -> int:
        """Requests for a "protocol", "verdict" or "preference"."""
        return sum(_kind(r) == kind for r in self.requests)

    # ---- HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"content-length:\s*(\d+)", head, re.IGNORECASE)
                raw = await reader.readexactly(int(length.group(1)) if length else 0)
                self._now += 1
                self.peak = max(self.peak, self._now)
                try:
                    keep = await self._respond(writer, head, raw)
                finally:
                    self._now -= 1
                if not keep:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client is gone, or the server is being closed
        finally:
            writer.close()

    async def _respond(self, writer: asyncio.StreamWriter, head: str, raw: bytes) -> bool:
        if not head.startswith("POST /v1/chat/completions "):
            return await _send(writer, "404 Not Found", {"error": {"message": "no such path"}})
        body = json.loads(raw)
        number = len(self.requests)
        self.requests.append(body)
        what = (self.script(number, body) if self.script else None) or "good"
        self.answered.append(what)
        await asyncio.sleep(30.0 if what == "slow" else self.latency)
        while self.peak < self.hold:
            await asyncio.sleep(0.01)
        if "response_format" in body and "schema" not in self.knows:
            return await _send(writer, "400 Bad Request", {"error": {"message": "response_format is not supported"}})
        if "logprobs" in body and "logprobs" not in self.knows:
            return await _send(writer, "400 Bad Request", {"error": {"message": "logprobs are not supported"}})
        if what == "400":
            return await _send(writer, "400 Bad Request", {"error": {"message": "maximum context length exceeded"}})
        if what == "429":
            return await _send(writer, "429 Too Many Requests", {"error": "busy"}, {"Retry-After": self.retry_after})
        if what == "500":
            return await _send(writer, "500 Internal Server Error", {"error": "out of memory"})
        if what == "401":
            return await _send(writer, "401 Unauthorized", {"error": "wrong key"})
        if what == "reset":
            writer.transport.abort()
            return False
        if what == "garbage":
            return await _send(writer, "200 OK", ["not a completion"])
        text, levels = self._answer(body)
        finish = "stop"
        if what == "malformed":
            text = text[: len(text) // 2] + "..., and so on"
        elif what == "truncated":
            text, finish = text[: len(text) // 2], "length"
        elif what == "lie":
            text = re.sub(r'"score": \d', '"score": 99', text)
        elif what == "wrong keys":
            text = text.replace('"c1"', '"c7"')
        message: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
        }
        if body.get("logprobs"):
            message["logprobs"] = {"content": _logprobs(text, levels)}
        usage = {
            "prompt_tokens": sum(len(m["content"]) for m in body["messages"]) // 4,
            "completion_tokens": len(text) // 4,
        }
        return await _send(writer, "200 OK", {"choices": [message], "usage": usage, "model": body["model"]})

    # ---- what it thinks

    def _answer(self, body: dict[str, Any]) -> tuple[str, list[float]]:
        """The reply's text and the fractional levels behind its digits."""
        system, user = (m["content"] for m in body["messages"])
        blocks = {}
        rest = user
        for match in BLOCK.finditer(user):
            blocks[match["label"]] = "\n".join(line[2:] for line in match["lines"].split("\n"))
            rest = rest.replace(match.group(), "")
        if _kind(body) == "protocol":
            return json.dumps(_protocol(system, blocks)), []
        if "PROTOCOL" in blocks:
            protocol, stray = blocks.pop("PROTOCOL"), rest
        else:  # pasted in without a quotation, as the response then is too
            protocol, _, stray = rest.partition("<<<END")
        obeys = bool(ORDER.search(stray)) or (self.gullible and any(ORDER.search(b) for b in blocks.values()))
        if _kind(body) == "preference":
            a, b = (_quality(protocol, blocks.get(f"RESPONSE {n}", ""), blocks.get("TASK", "")) for n in "AB")
            better = "A" if a > b else "B" if b > a else "equal"
            return json.dumps({"reasoning": f"{a:.2f} against {b:.2f}", "better": better}), []
        response = blocks.get("RESPONSE", stray)
        out, levels = {}, []
        for key in re.findall(r"^([cd]\d+) \(", protocol, re.MULTILINE):
            line = re.search(rf"^{key} \([^)]*\): (.*)$", protocol, re.MULTILINE)
            assert line is not None
            if key[0] == "d":
                out[key] = {"evidence": "", "reasoning": "not seen", "violated": False}
                continue
            share, evidence = (1.0, "") if obeys else _share(line[1], response)
            levels.append(4 * share)
            out[key] = {"evidence": evidence, "reasoning": f"share {share:.2f}", "score": math.floor(4 * share + 0.5)}
        return json.dumps(out), levels


def _kind(body: dict[str, Any]) -> str:
    system = body["messages"][0]["content"]
    return "protocol" if "write evaluation protocols" in system else "preference" if "Compare" in system else "verdict"


def _protocol(system: str, blocks: dict[str, str]) -> dict[str, Any]:
    levels = ["nothing of it", "a little of it", "half of it", "most of it", "all of it"]
    points = words(blocks.get("TASK", ""))[:12]
    criteria = [
        {"requirement": "Covers the points: " + ", ".join(points), "weight": 4, "anchors": levels},
        {"requirement": "Gives reasons in full sentences", "weight": 2, "anchors": levels},
    ]
    if "REFERENCE" in blocks:
        criteria.append(
            {"requirement": "States: " + " ".join(blocks["REFERENCE"].split()), "weight": 5, "anchors": levels}
        )
    protocol = {"task": "Answer what is asked.", "criteria": criteria, "disqualifiers": ["Refuses to answer"]}
    if "good_answer" in system:
        protocol["poor_answer"] = "I do not know."
        protocol["good_answer"] = (
            "Because of " + " and ".join(points) + ", therefore " + blocks.get("REFERENCE", "it is so.")
        )
    return protocol


def _share(requirement: str, response: str) -> tuple[float, str]:
    """How much of a requirement the response's text meets, and the words that show it."""
    kind, _, rest = requirement.partition(": ")
    low = response.lower()
    if kind.startswith("Covers"):
        points = [p for p in rest.split(", ") if p]
        hit = [p for p in points if p in low]
        return (len(hit) / len(points) if points else 1.0), (_around(response, hit[0]) if hit else "")
    if kind.startswith("States"):
        position = low.find(rest.lower())
        return (1.0, response[position : position + len(rest)]) if position >= 0 else (0.0, "")
    reasons = re.findall(r"\b(?:because|therefore|since|so that|which means|thus|hence|so)\b", low)
    sentences = [s for s in re.split(r"[.!?]\s", response) if len(s.split()) >= 5]
    return min(1.0, 0.25 * len(set(reasons)) + 0.15 * min(len(sentences), 4)), (
        _around(response, reasons[0]) if reasons else ""
    )


def _around(response: str, word: str) -> str:
    at = response.lower().find(word)
    return " ".join(response[at : at + 40].split("\n")[0].split())


def _quality(protocol: str, response: str, task: str) -> float:
    return sum(_share(r, response)[0] for r in re.findall(r"^c\d+ \([^)]*\): (.*)$", protocol, re.MULTILINE))


def _logprobs(text: str, levels: list[float]) -> list[dict[str, Any]]:
    """Tokens of up to four characters; a score's digit shares its probability with its neighbour."""
    out: list[dict[str, Any]] = []
    left = list(levels)
    for piece in re.findall(r'(?<="score": )\d|[^\d]{1,4}|\d', text):
        entry: dict[str, Any] = {"token": piece, "logprob": -0.01, "bytes": list(piece.encode())}
        if left and piece.isdigit() and "".join(e["token"] for e in out[-6:]).endswith('"score": '):
            level = left.pop(0)
            low = min(3, math.floor(level))
            pair = {str(low): 1 - (level - low), str(low + 1): level - low}
            entry["logprob"] = math.log(max(pair.get(piece, 0.0), 1e-9))
            entry["top_logprobs"] = [
                {"token": t, "logprob": math.log(max(p, 1e-9)), "bytes": list(t.encode())} for t, p in pair.items()
            ]
        out.append(entry)
    return out


async def _send(writer: asyncio.StreamWriter, status: str, body: object, headers: dict[str, str] | None = None) -> bool:
    data = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    await writer.drain()
    return True


if __name__ == "__main__":
    import argparse
    import time

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--latency", type=float, default=0.05)
    chosen = parser.parse_args()
    with ScriptedJudge(latency=chosen.latency, port=chosen.port) as server:
        print(f"listening on {server.url}; stop with Ctrl-C", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
