"""What servers answer: anything. A reward is then the number that the judge wrote, or None; the key is nowhere."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import resource
import zlib

import pytest

pytest.importorskip("httpx")
from carerl_kernels import _http
from carerl_kernels._http import Answer, RetryingClient
from carerl_kernels._json import DEPTH, as_logprob, parse_json
from carerl_kernels.cli import app
from carerl_kernels.grpo import Domain, Example
from carerl_kernels.grpo.endpoint import EndpointSampler
from carerl_kernels.grpo.sampling import SamplerError
from carerl_kernels.rewards.pa_grm import BackendError, BackendRefusedError, Endpoint, Request, Scorer, run_sync
from carerl_kernels.text import SpecialTokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_helpers import WRITTEN, RawServer, asks_for, chat, http, judging, response_of, verdict
from typer.testing import CliRunner

KEY = "sk-verysecret/0123456789"


def scorer_of(server, attempts=2, timeout=20.0):
    return Scorer(Endpoint(server.url, "m", attempts=attempts, backoff=0.01, timeout=timeout))


def reward(behave, timeout=20.0):
    with RawServer(behave) as server:
        return run_sync(scorer_of(server, timeout=timeout).score("Why?", "It is so."))


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[" * 5000, "nested at most 100 deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested at most 100 deep"),
        ('{"a":' * 990 + "1" + "}" * 990, "nested at most 100 deep"),
        ('{"a": NaN}', "finite numbers, found NaN"),
        ("[Infinity]", "found Infinity"),
        ("[-1e999]", "finite numbers, found -1e999"),
        ("1" * 5000, "at most 300 digits, found one of 5000"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_json_that_breaks_its_reader_later_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_large_and_harmless_is_read():
    assert parse_json("[" * DEPTH + "]" * DEPTH) is not None
    assert parse_json("[" + ",".join(["{}"] * 5000) + "]") == [{}] * 5000
    assert parse_json('"' + "[{" * 5000 + '"') == "[{" * 5000  # brackets in a text nest nothing
    assert float(parse_json("9" * 300)) < float("inf")
    assert parse_json(b"\xef\xbb\xbf[1]") == [1] and parse_json('"\\ud83d\\ude00\\ud800"') == "\U0001f600?"
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="every key once, found 'a' twice"):
        parse_json('{"a": 1, "a": 2}', unique=True)


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists))
def test_json_of_ours_comes_back(value):
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text.replace("\\ud8", "\\ud8")) or "\\ud" in text


@pytest.mark.parametrize(
    "value", [1.0, 0.5, 1000, float("nan"), float("inf"), -float("inf"), None, "-1", True, [], 10**400]
)
def test_what_is_no_log_probability(value):
    assert as_logprob(value) is None


def test_what_is_one():
    assert [as_logprob(v) for v in (-1, -0.5, 0, -9999.0, 1e-7)] == [-1.0, -0.5, 0.0, -9999.0, 0.0]


# ------------------------------------------------------------------------------------------------------- whole answers


@pytest.mark.parametrize(
    "answer",
    [
        http(200, b"junk", "Content-Encoding: gzip\r\n"),
        http(200, gzip.compress(b"{}")[:-9], "Content-Encoding: gzip\r\n"),
        http(200, b"x", "Content-Encoding: br\r\n"),
        http(200, b"zz", "Content-Type: text/html; charset=hex\r\n"),
        http(200, json.dumps(chat("x")).encode("utf-16"), "Content-Type: application/json; charset=utf-16\r\n"),
        http(200, b"[" * 5000),
        http(200, b"{}"),
        http(200, {"choices": []}),
        http(200, {"choices": "none"}),
        http(200, {"choices": [{"message": "hi"}]}),
        http(200, {"choices": [{"message": {"content": ["parts"]}}]}),
        http(200, b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}"),
        (200, chat(verdict(), logprobs={"content": [{"token": "x", "logprob": float("nan")}]})),
        (200, chat(verdict(), logprobs={"content": [{"token": "x", "logprob": -1, "bytes": [300]}]})),
        (200, chat(verdict(), logprobs={"content": "none"})),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/9.9 nonsense\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        http(302, b"", "Location: http://127.0.0.1:9/\r\n"),
        http(204, b""),
        http(500, b"\xff" * 10_000),
    ],
    ids=lambda a: str(a)[:50],
)
def test_an_answer_that_is_none_is_no_reward(answer):
    got = reward(judging(lambda body: answer), timeout=0.5)  # some leave the connection open
    assert got.reward is None and got.reason and len(got.reason) < 700


@pytest.mark.parametrize(
    "usage",
    [
        "none",
        3,
        [],
        None,
        {"prompt_tokens": "12 tokens"},
        {"prompt_tokens": -5, "completion_tokens": 10**30},
        {"prompt_tokens": 1.5},
    ],
    ids=str,
)
def test_a_usage_that_is_none_costs_no_reply(usage, caplog):
    with (
        RawServer(judging(lambda body: (200, chat(verdict(), usage=usage)))) as server,
        caplog.at_level(logging.WARNING),
    ):
        s = scorer_of(server)
        assert run_sync(s.score("Why?", "So.")).reward == 0.75
        meter = s.judge.backend.meter
        assert meter.calls == 2 and 10 <= meter.prompt_tokens <= 20 and 5 <= meter.completion_tokens <= 10
    assert sum("how many tokens" in r.message for r in caplog.records) == 1


def test_a_packed_answer_is_unpacked_to_a_limit(monkeypatch):
    packed = http(200, gzip.compress(json.dumps(chat(verdict())).encode()), "Content-Encoding: gzip\r\n")
    assert reward(judging(lambda body: packed)).reward == 0.75
    bomb = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    data = b"".join(bomb.compress(b" " * 2**20) for _ in range(400)) + bomb.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = reward(judging(lambda body: http(200, data, "Content-Encoding: gzip\r\n")))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert got.reward is None and "more than 64 MiB" in got.reason and grown < 300
    monkeypatch.setattr(_http, "MAX_BODY", 2**20)
    got = reward(judging(lambda body: http(200, b" " * 2**21)))
    assert got.reward is None and "more than 1 MiB" in got.reason


def test_log_probabilities_that_are_none_leave_the_digits():
    def answer(value):
        text = verdict(3)
        pieces = [p for part in text.split("3") for p in (part, "3")][:-1]
        content = [{"token": p, "logprob": value if p == "3" else -0.1} for p in pieces]
        return reward(judging(lambda body: (200, chat(text, logprobs={"content": content}))))

    for value in (1000, 0.5, "x", [], True):
        got = answer(value)
        assert got.reward == 0.75 and [f.expected for f in got.verdict.findings] == [None, None]
    assert [f.expected for f in answer(-0.1).verdict.findings] == [pytest.approx(3.0)] * 2
    assert [f.expected for f in answer(None).verdict.findings] == [None, None]


# Any part of a valid answer replaced by anything: the reward is what the digits say, what valid probabilities say, or None.
CONTENT = [
    {"token": p, "logprob": -0.1, "bytes": list(p.encode()), "top_logprobs": [{"token": p, "logprob": -0.1}]}
    for p in [q for part in verdict(3).split("3") for q in (part, "3")][:-1]
]
GOOD = chat(verdict(3), logprobs={"content": CONTENT})
THING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        [10**400, 10**30, -5, 1000.0, "3", "length", "content_filter", "\ud800", '{"c1": 1}', "</think>", "{" * 200]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "token", "logprob"]), inner)
    ),
    max_leaves=4,
)


def places(value, here=()):
    """Paths to every part of a JSON value, of lists to the first two."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*here, key))


def replaced(value, place, thing):
    """A copy of a JSON value with another part at that path."""
    if not place:
        return thing
    value = copy.deepcopy(value)
    part = value
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = thing
    return value


class Offline(Endpoint):
    """Answers its verdicts itself, without a network."""

    def __init__(self):
        super().__init__("http://127.0.0.1:9/v1", "m", attempts=1)
        self.answer, self.protocol = b"", WRITTEN
        self._client.post = self.post

    async def post(self, path, body, timeout=None):
        data = json.dumps(chat(json.dumps(self.protocol))).encode() if asks_for(body) == "protocol" else self.answer
        return Answer(200, {}, data)


@pytest.fixture(scope="module")
def offline():
    return Offline()


def judged(offline, answer, protocol=WRITTEN):
    offline.answer, offline.protocol = answer, protocol
    domain = Domain("d", lambda rng, n: [], Scorer(offline))  # with an empty cache
    return domain.score_batch([Example("Why?")], ["So."])[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(places(GOOD))), THING)
def test_no_answer_makes_up_a_number_or_raises(offline, place, thing):
    got = judged(offline, json.dumps(replaced(GOOD, place, thing)).encode())
    assert got is None or got == pytest.approx(0.75)


VERDICT = json.loads(verdict(3, evidence="So."))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(places(VERDICT))), THING | st.integers(-2, 9) | st.booleans())
def test_no_verdict_makes_up_a_number_or_raises(offline, place, thing):
    """A verdict with another part counts only where that is valid at its place, and then as what it says."""
    got = judged(offline, json.dumps(chat(json.dumps(replaced(VERDICT, place, thing)))).encode())
    if place[-1:] == ("score",):
        valid = type(thing) is int and 0 <= thing <= 4
        assert got == (pytest.approx((3 + thing) / 8) if valid else None)
    elif place[-1:] == ("violated",):
        assert got == (None if type(thing) is not bool else 0.0 if thing else 0.75)
    elif place[-1:] in (("evidence",), ("reasoning",)):
        assert got == 0.75 if type(thing) is str and place[-1] == "reasoning" else got in (None, 0.75)
        assert type(thing) is str or got is None
    else:  # a whole entry, or all of them
        assert got is None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(places(WRITTEN))), THING)
def test_no_protocol_makes_up_a_number_or_raises(offline, place, thing):
    got = judged(offline, json.dumps(chat(verdict(3))).encode(), replaced(WRITTEN, place, thing))
    assert got is None or got == 0.75


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 400))
def test_no_bytes_make_up_a_number_or_raise(offline, data, start, cut):
    whole = json.dumps(chat(verdict(3))).encode()
    got = judged(offline, whole[:start] + data + whole[start + cut :])
    assert got is None or 0 <= got <= 1


# ----------------------------------------------------------------------------------------- cut off, refused, item by item


@pytest.mark.parametrize("content", [None, "", "{", verdict()[:40]])
def test_a_reply_that_was_cut_off_is_asked_for_with_room_whatever_came(content):
    def answer(body):
        return (200, chat(verdict()) if body["max_tokens"] > 4000 else chat(content, "length"))

    with RawServer(judging(answer)) as server:
        assert run_sync(scorer_of(server).score("Why?", "So.")).reward == 0.75
        assert [b["max_tokens"] for b in server.requests[1:]] == [2048, 4096]


@pytest.mark.parametrize(
    "answer",
    [
        chat(None, message={"refusal": "I cannot judge this."}),
        chat(None, "content_filter"),
        chat("par", "content_filter"),
        (400, {"error": {"code": "content_filter", "message": "The response was filtered due to our policy"}}),
    ],
    ids=str,
)
def test_a_refusal_is_not_asked_again(answer):
    with RawServer(judging(lambda body: answer if isinstance(answer, tuple) else (200, answer))) as server:
        got = run_sync(scorer_of(server, attempts=6).score("Why?", "So."))
        assert got.reward is None and len(server.requests) == 2


@pytest.mark.parametrize(
    "failure",
    [
        (403, {"error": "your input was flagged"}),
        (403, {"error": "forbidden"}),
        (400, {"error": {"message": "This model's maximum context length is 4096 tokens, 9000 requested"}}),
        (413, {"error": "payload too large"}),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "too long"}]}),
    ],
    ids=str,
)
def test_an_item_fails_alone(failure):
    behave = judging(lambda body: failure if "bad" in response_of(body) else (200, chat(verdict())))
    with RawServer(behave) as server:
        s = scorer_of(server)
        got = run_sync(s.score_all([("Why?", t) for t in ("bad 0", "one", "bad 1", "two", "bad 2", "three")]))
        assert [g.reward for g in got] == [None, 0.75, None, 0.75, None, 0.75]
        assert "response_format" in server.requests[-1]  # nothing was given up for it


def test_a_key_that_nothing_is_open_to_stops_after_a_few_answers():
    with RawServer(lambda body: (403, {"error": "forbidden"})) as server:
        with pytest.raises(BackendRefusedError, match="status 403"):
            run_sync(scorer_of(server).score_all([(str(i), "a") for i in range(300)]))
        assert len(server.requests) < 300


def test_what_is_ready_comes_before_a_refusal():
    async def both():
        seen, s = [], Scorer(Endpoint("http://127.0.0.1:9/v1", "m"))

        async def score(prompt, response, reference=None):
            if response == "refused":
                raise BackendRefusedError("no")
            return prompt

        s.score = score
        try:
            async for number, _ in s.stream([("a", "x"), ("b", "refused"), ("c", "y")]):
                seen.append(number)
        except BackendRefusedError:
            return seen

    assert sorted(run_sync(both())) == [0, 2]


# ------------------------------------------------------------------------------------------------ what a server minds


def only_with(*absent, message, status=400, param=None):
    """A server that refuses requests with any of these fields."""

    def behave(body):
        if any(name in body for name in absent):
            return (status, {"error": {"message": message, "param": param}})
        return (200, chat(json.dumps(WRITTEN) if asks_for(body) == "protocol" else verdict()))

    return behave


@pytest.mark.parametrize(
    ("absent", "message", "present"),
    [
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "max_completion_tokens",
        ),
        ("temperature", "Unsupported value: 'temperature' does not support 0.0 with this model.", "max_tokens"),
        ("seed", "Extra inputs are not permitted: seed", "temperature"),
        ("logprobs", "You are not allowed to request logprobs from this model", "response_format"),
        ("response_format", "json_schema is not supported", "logprobs"),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_what_a_server_minds_is_left_out_and_said_once(absent, message, present, status, caplog):
    with RawServer(only_with(absent, message=message, status=status)) as server, caplog.at_level(logging.WARNING):
        s = scorer_of(server)
        assert run_sync(s.score("Why?", "So.")).reward == 0.75
        asked = len(server.requests)
        run_sync(s.score("Why?", "Another."))
        assert len(server.requests) == asked + 1
        last = server.requests[-1]
        assert (
            absent not in last and present in last and last.get("max_completion_tokens", last.get("max_tokens")) == 2048
        )
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_reasoning_models_mind_several_things():
    def behave(body):
        for name, status in (("max_tokens", 400), ("temperature", 400), ("logprobs", 403)):
            if name in body:
                return (status, {"error": {"message": f"Unsupported: {name}", "param": name}})
        return (200, chat(json.dumps(WRITTEN) if asks_for(body) == "protocol" else verdict()))

    assert reward(behave).reward == 0.75


def test_a_response_cannot_have_features_given_up():
    """A server that quotes the request in its error, and in it a response that speaks of features."""
    text = "temperature logprobs response_format seed max_tokens"

    def answer(body):
        if "temperature logprobs" in response_of(body):
            return (422, {"detail": [{"loc": ["body", "messages", 1], "msg": "bad", "input": body}]})
        return (200, chat(verdict()))

    with RawServer(judging(answer)) as server:
        s = scorer_of(server)
        assert run_sync(s.score("Why?", text)).reward is None
        assert run_sync(s.score("Why?", "So.")).reward == 0.75
        assert {"temperature", "seed", "logprobs", "response_format", "max_tokens"} <= server.requests[-1].keys()


# ------------------------------------------------------------------------------------------------------------- the key


def echoes(kind):
    """A server that gives back the key it was sent."""

    def behave(head_of):
        def answer(body):
            sent = head_of().split("uthorization: Bearer ")[1].split("\r\n")[0]
            if kind == "error":
                return (400, {"error": {"message": f"bad request with key {sent} and so on"}})
            if kind == "refused":
                return (401, {"error": f"Incorrect API key provided: {sent}"})
            if kind == "garbage":
                return (200, {"hello": sent})
            if kind == "reset":
                return http(429, sent.encode())
            if kind == "refusal":
                return (200, chat(None, message={"refusal": f"no {sent}"}))
            text = verdict(3).replace('"r"', json.dumps(f"I was called with {sent}"))
            return (200, chat(json.dumps(WRITTEN) if asks_for(body) == "protocol" else text))

        return answer

    return behave


@pytest.mark.parametrize("kind", ["error", "refused", "garbage", "reset", "refusal", "reply"])
def test_the_key_reaches_no_message_no_log_and_no_file(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CARERL_JUDGE_API_KEY", f"{KEY}\n")  # as `cat key` leaves it
    (tmp_path / "x.jsonl").write_text('{"prompt": "Why?", "response": "So."}\n')
    with RawServer(lambda body: None) as server, caplog.at_level(logging.DEBUG):
        server.behave = echoes(kind)(lambda: server.heads[-1])
        monkeypatch.setattr(RetryingClient, "_wait", lambda *_: 0.0)
        arguments = [
            "--input",
            tmp_path / "x.jsonl",
            "--output",
            tmp_path / "y.jsonl",
            "--url",
            server.url,
            "--model",
            "m",
        ]
        got = CliRunner().invoke(app, ["score", *map(str, arguments)])
    assert f"Bearer {KEY}\r\n" in server.heads[0].replace("authorization", "Authorization")
    written = "".join(p.read_bytes().decode("latin-1") for p in tmp_path.iterdir())
    for text in (got.output, caplog.text, written, str(got.exception)):
        assert KEY not in text and KEY.replace("/", "\\/") not in text and "Traceback" not in text
    if kind == "reply":
        assert "I was called with ***" in written


@pytest.mark.parametrize(
    "key", ["sk-abc\x00def-secret", "sk-secret\u20ac", "two words-secret", "sk-secret\r\nX-Evil: 1"]
)
def test_a_key_that_no_header_can_carry_is_refused_unseen(key):
    for make in (
        lambda: Endpoint("http://127.0.0.1:9/v1", "m", api_key=key),
        lambda: EndpointSampler("http://127.0.0.1:9/v1", "m", SpecialTokens(0, (1,)), folder="x", api_key=key),
    ):
        with pytest.raises(ValueError, match="api_key: expected printable ASCII") as error:
            make()
        assert "secret" not in str(error.value)


def test_a_password_in_the_url_is_sent_and_not_said():
    with RawServer(lambda body: (400, {"error": "user:hunter22hunter is not known"})) as server:
        url = server.url.replace("://", "://user:hunter22hunter@")
        endpoint = Endpoint(url, "m", attempts=1)
        request = Request(({"role": "user", "content": "x"},), {"type": "object"}, "x", 10)
        with pytest.raises(BackendError) as error:
            run_sync(endpoint.complete(request))
        assert "hunter22" not in str(error.value) and "hunter22" not in endpoint.url
        assert "uthorization: Basic " in server.heads[0]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "ftp://x/v1", "http://", "http://x y/v1", "http://[::1/v1", "http://h:99999/v1", ""]
)
def test_a_url_that_is_none_is_named(url):
    with pytest.raises(ValueError, match="url: expected http://HOST:PORT/v1"):
        Endpoint(url, "m")


def test_redaction_covers_the_ways_in_which_a_key_is_quoted():
    client = RetryingClient(
        "http://h/v1", key='a"b/c+d', max_in_flight=1, timeout=1, attempts=1, backoff=1, max_backoff=1,
        log=logging.getLogger("x"),
    )  # fmt: skip
    for text in ('key a"b/c+d.', 'key a\\"b/c+d.', "key a%22b%2Fc%2Bd."):
        assert client.redact(text) == "key ***."
    assert client.short("x" * 190 + 'a"b/c+d' + "y" * 50).count("***") == 1


# ------------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": {"token_logprobs": [float("nan"), -1.0]}}, "no completions in"),
        ({"logprobs": {"token_logprobs": [50.0, -1.0]}}, "log-probability '50.0', expected numbers of at most 0"),
        ({"logprobs": {"token_logprobs": ["-1", -1.0]}}, "log-probability '-1'"),
        ({"logprobs": {"token_logprobs": [True, -1.0]}}, "log-probability 'True'"),
        ({"logprobs": {"token_logprobs": {"a": 1}}}, "returns no log-probabilities"),
        ({"logprobs": [1]}, "returns no log-probabilities"),
        ({"logprobs": "none"}, "returns no log-probabilities"),
        ({"token_ids": [10**9, 1]}, "token id '1000000000', expected numbers from 0 to"),
        ({"token_ids": [9, 1]}, "token id '9', expected numbers from 0 to 7, the policy's vocabulary"),
        ({"token_ids": [-7, 1]}, "token id '-7'"),
        ({"token_ids": ["a", 1]}, "token id 'a'"),
        ({"token_ids": [5.5, 1]}, "token id '5.5'"),
        ({"token_ids": [True, 1]}, "token id 'True'"),
        ({"token_ids": "51"}, "returns no token ids"),
        ({"index": "first"}, "no completions in"),
    ],
)
def test_a_completion_that_cannot_be_trained_on_is_refused(change, message, tmp_path):
    choice = {"index": 0, "token_ids": [5, 1], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "stop"}
    size = None if change.get("token_ids") == [10**9, 1] else 8
    with RawServer(lambda body: (200, {"choices": [choice | change]})) as server:
        sampler = EndpointSampler(
            server.url, "m", SpecialTokens(0, (1,), (), size), folder=tmp_path, attempts=1, backoff=0.01
        )
        with pytest.raises(SamplerError, match=message):
            sampler([[3, 4]], [1], num_samples=1, max_new_tokens=4, temperature=1.0)
        server.behave = lambda body: (200, {"choices": [choice]})
        rollout = sampler([[3, 4]], [1], num_samples=1, max_new_tokens=4, temperature=1.0)
        assert rollout.completions() == [[5, 1]] and rollout.logps.tolist() == [[-1.0, -1.0]]
