"""An OpenAI-compatible completions server over a tiny transformers model, in a thread: vLLM or SGLang as seen from a client.

It samples by the model it has loaded (SGLang: as in its deterministic mode), gives token ids and log-probabilities, loads other
weights from the disk by the calls of either engine. It shares no weights with the trainer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from carerl_kernels.grpo import sample, special_tokens


class CompletionsServer:
    """A context manager.

    Args:
        model, tokenizer: What it serves at first.
        engine: Whose reload calls it knows.
        alter: `alter(path, answer)` changes an answer of status 200, or returns (status, answer).

    Attributes:
        requests: (path, body) of all calls. loaded: Folders it loaded.
    """

    def __init__(self, model: Any, tokenizer: Any, engine: str = "vllm", alter: Callable | None = None) -> None:
        self.model, self.tokens, self.engine = model.eval(), special_tokens(tokenizer, model), engine
        self.alter: Callable = alter or (lambda path, answer: answer)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.loaded: list[Path] = []
        self._lock = threading.Lock()

    def __enter__(self) -> CompletionsServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                server.requests.append((self.path, body))
                with server._lock:
                    status, answer = server.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def count(self, path: str) -> int:
        return sum(p == path for p, _ in self.requests)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            status, answer = self.complete(body)
        elif self.engine == "vllm" and path == "/collective_rpc" and body["method"] == "reload_weights":
            status, answer = self.load(body["kwargs"]["weights_path"], {"results": [None]})
        elif self.engine == "vllm" and path == "/reset_prefix_cache":
            status, answer = 200, {}
        elif self.engine == "sglang" and path == "/update_weights_from_disk":
            status, answer = self.load(body["model_path"], {"success": True, "message": "Succeeded"})
        else:
            status, answer = 404, {"detail": "Not Found"}
        if status == 200:
            changed = self.alter(path, answer)
            status, answer = changed if isinstance(changed, tuple) else (200, changed)
        return status, answer

    def load(self, path: str, answer: Any) -> tuple[int, Any]:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        self.loaded.append(Path(path))
        return 200, answer

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != "tiny":
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        same = self.engine == "sglang"  # in deterministic mode: every completion of a request has its seed
        rollout = sample(
            self.model,
            [body["prompt"]] * (body["n"] if same else 1),
            self.tokens,
            num_samples=1 if same else body["n"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            seeds=[body["seed"]] * (body["n"] if same else 1),
        )
        choices = []
        for i, ids in enumerate(rollout.completions()):
            choice: dict[str, Any] = {"index": i, "text": "", "finish_reason": "length"}
            if ids[-1] in self.tokens.eos:
                choice["finish_reason"] = "stop"
            if body.get("return_token_ids"):
                choice["token_ids"] = ids
            if body.get("logprobs"):
                choice["logprobs"] = {"token_logprobs": rollout.logps[i, : len(ids)].tolist()}
            choices.append(choice)
        return 200, {"object": "text_completion", "model": "tiny", "choices": choices[::-1]}  # in no particular order
