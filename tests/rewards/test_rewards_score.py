"""`carerl score`: resumes anywhere, pays for nothing twice, loses no line, and says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("httpx")
from carerl_kernels.cli import app
from carerl_kernels.rewards.pa_grm import BackendRefusedError
from carerl_kernels.rewards.score import JudgeRows, VerifierRows, read_responses, row_key, score_file
from judge_helpers import EXAMPLES, GOOD, PROMPT, THIN, ScriptedJudge, scorer
from typer.testing import CliRunner

ROWS = [{"prompt": PROMPT, "response": f"{r} {i}", "id": i} for i, r in enumerate([GOOD, THIN] * 5)]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(server, tmp_path, **settings):
    return JudgeRows(scorer(server, cache=str(tmp_path / "cache.sqlite"), **settings))


class Stop(Exception):
    pass


def test_rows_keep_their_order_and_their_fields(tmp_path):
    with ScriptedJudge() as server:
        report = score_file(write(tmp_path / "x.jsonl", ROWS), tmp_path / "out" / "y.jsonl", rows_of(server, tmp_path))
    got = read(tmp_path / "out" / "y.jsonl")
    assert [(r["id"], r["prompt"], r["response"]) for r in got] == [(r["id"], r["prompt"], r["response"]) for r in ROWS]
    assert all(good["reward"] > thin["reward"] for good, thin in zip(got[::2], got[1::2], strict=True))
    assert got[0]["judgement"]["verdict"]["findings"][0]["evidence"] and got[0]["judgement"]["protocol"]["criteria"]
    assert (report.rows, report.asked, dict(report.excluded)) == (10, 10, {})
    assert report.mean == pytest.approx(sum(r["reward"] for r in got) / 10)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["y.jsonl"]


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
def test_stopped_anywhere_it_goes_on_and_asks_for_nothing_twice(tmp_path, with_cache):
    """With the same judge cache, and by the partial file alone."""
    source, target = write(tmp_path / "x.jsonl", ROWS), tmp_path / "y.jsonl"
    with ScriptedJudge() as server:
        whole = tmp_path / "whole.jsonl"
        score_file(source, whole, JudgeRows(scorer(server)))
        asked = len(server.requests)
    with ScriptedJudge() as server:
        settings = {"cache": str(tmp_path / "c.sqlite")} if with_cache else {}

        def stop(done, total, result):
            if done == 4:
                raise Stop

        with pytest.raises(Stop):
            score_file(source, target, JudgeRows(scorer(server, endpoint={"max_in_flight": 1}, **settings)), stop)
        assert not target.exists() and len(read(tmp_path / "y.jsonl.partial")) == 4
        with open(tmp_path / "y.jsonl.partial", "a") as file:
            file.write('{"key": "cut sho')  # as a kill would leave it
        report = score_file(source, target, JudgeRows(scorer(server, **settings)))
        assert report.asked == 6 and read(target) == read(whole)
        if with_cache:  # without it, the protocol and what was in flight are asked for again
            assert len({json.dumps(r["messages"]) for r in server.requests}) == asked
        before = len(server.requests)
        assert score_file(source, target, JudgeRows(scorer(server, **settings))).asked == 0
        assert len(server.requests) == before


def test_killed_without_warning(tmp_path):
    """A real process, SIGKILL, then the same command."""
    source = write(tmp_path / "x.jsonl", ROWS * 3)
    with ScriptedJudge(latency=0.1) as server:
        command = [
            sys.executable,
            "-m",
            "carerl_kernels",
            "score",
            "--input",
            str(source),
            "--output",
            str(tmp_path / "y.jsonl"),
        ]
        command += ["--url", server.url, "--model", "scripted", "--concurrency", "2"]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial = tmp_path / "y.jsonl.partial"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        before = len(server.requests)
        assert 4 <= before < 11
        again = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert again.returncode == 0, again.stderr
        assert "30 rows, " in again.stdout
        verdicts = [json.dumps(r["messages"]) for r in server.requests]
        repeated = len(verdicts) - len(set(verdicts))
        assert repeated <= 2  # what was in flight at the kill
    assert [r["id"] for r in read(tmp_path / "y.jsonl")] == [r["id"] for r in ROWS * 3]  # equal rows are asked for once


def test_rows_may_be_added_moved_and_removed(tmp_path):
    with ScriptedJudge() as server:
        target = tmp_path / "y.jsonl"
        score_file(write(tmp_path / "x.jsonl", ROWS[:4]), target, rows_of(server, tmp_path))
        before = read(target)
        report = score_file(write(tmp_path / "x.jsonl", [ROWS[7], ROWS[2], ROWS[0]]), target, rows_of(server, tmp_path))
        after = read(target)
        assert report.asked == 1 and [r["id"] for r in after] == [7, 2, 0] and after[1:] == [before[2], before[0]]
        assert score_file(tmp_path / "x.jsonl", target, rows_of(server, tmp_path, on_signs="zero")).asked == 3


def test_what_could_not_be_judged_is_null_with_the_reason_and_asked_for_again(tmp_path):
    source, target = write(tmp_path / "x.jsonl", ROWS[:3]), tmp_path / "y.jsonl"
    with ScriptedJudge(
        script=lambda n, body: "malformed" if ROWS[1]["response"] in body["messages"][1]["content"] else None
    ) as server:
        report = score_file(source, target, rows_of(server, tmp_path))
        got = read(target)
        assert [r["reward"] is None for r in got] == [False, True, False]
        assert got[1]["judgement"]["reason"] in report.excluded and "no valid verdict" in got[1]["judgement"]["reason"]
        server.script = None
        assert score_file(source, target, rows_of(server, tmp_path)).asked == 1
        assert None not in [r["reward"] for r in read(target)]


def test_a_refusing_judge_stops_it_and_keeps_what_is_done(tmp_path):
    with ScriptedJudge(script=lambda n, body: "401" if n > 5 else None) as server:
        rows = JudgeRows(scorer(server, endpoint={"max_in_flight": 1}))
        with pytest.raises(BackendRefusedError):
            score_file(write(tmp_path / "x.jsonl", ROWS), tmp_path / "y.jsonl", rows)
    assert len(read(tmp_path / "y.jsonl.partial")) == 5 and not (tmp_path / "y.jsonl").exists()


def test_a_verifier_scores_too(tmp_path):
    rows = [{"prompt": "?", "completion": "a", "answer": "a"}, {"prompt": "?", "response": "b", "answer": "a"}]
    from carerl_kernels.rewards.verifiers import exact_match

    report = score_file(write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl", VerifierRows("exact", exact_match))
    assert [r["reward"] for r in read(tmp_path / "y.jsonl")] == [1.0, 0.0] and report.mean == 0.5
    with pytest.raises(ValueError, match="an example with an answer"):
        score_file(
            write(tmp_path / "x.jsonl", [{"prompt": "?", "response": ""}]),
            tmp_path / "z.jsonl",
            VerifierRows("exact", exact_match),
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"x\.jsonl, line 2: expected a JSON object, found '{'"),
        ("[1]", r"line 2: expected a JSON object, found '\[1\]'"),
        ('{"prompt": ""}', 'expected "prompt"'),
        ('{"prompt": "a"}', 'expected "response"'),
        ('{"prompt": "a", "response": 3}', 'expected "response"'),
    ],
)
def test_a_bad_line_is_named_before_anything_is_asked(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": ""}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_responses(path)


def test_keys():
    judge, verifier = {"judge": "m"}, {"verifier": "code"}
    row = {"prompt": "p", "response": "r", "id": 3}
    assert row_key(row, judge) == row_key(row | {"id": 4}, judge) != row_key(row | {"response": "s"}, judge)
    assert row_key(row, verifier) != row_key(row | {"id": 4}, verifier)  # a verifier may read any field
    assert row_key(row, verifier) == row_key(row | {"reward": 1}, verifier)


def test_group_calibration_belongs_elsewhere():
    with ScriptedJudge() as server, pytest.raises(ValueError, match="group statistics belong to training"):
        JudgeRows(scorer(server, calibration="group"))


# -------------------------------------------------------------------------------------------------------------- command


def run(*arguments):
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


def test_the_command(tmp_path):
    target = tmp_path / "y.jsonl"
    with ScriptedJudge() as server:
        common = [
            "--input",
            EXAMPLES / "judged_responses.jsonl",
            "--output",
            target,
            "--url",
            server.url,
            "--model",
            "scripted",
        ]
        got = run(*common, "--rejudge", "0.5", "--price", "1", "2", "--no-trace")
        assert got.exit_code == 0, got.output
        assert "48 rows, 48 scored now, mean reward 0." in got.output and "judged twice: noise 0.000" in got.output
        assert "cost" in got.output and "calls" in got.output
        assert len(read(target)) == 48 and "verdict" not in read(target)[0]["judgement"]
        assert "quality" in read(target)[0] and "quality" not in json.dumps(server.requests)
        assert "48 rows, 0 scored now" in run(*common, "--rejudge", "0.5").output
        assert (tmp_path / "y.jsonl.judge.sqlite").exists()


@pytest.mark.parametrize(("option", "reward"), [([], 1.0), (["--no-strip-reasoning"], 0.0)])
def test_what_is_done_with_reasoning_reaches_the_verifier(tmp_path, option, reward):
    rows = [{"prompt": "2 + 2?", "response": "<think>two twos</think>4", "answer": "4"}]
    out = tmp_path / "y.jsonl"
    got = run("--input", write(tmp_path / "x.jsonl", rows), "--output", out, "--verifier", "exact", *option)
    assert got.exit_code == 0, got.output
    assert json.loads(out.read_text())["reward"] == reward


def test_the_command_with_a_verifier(tmp_path):
    rows = [{"prompt": "Say hi.", "response": "hi", "instructions": [{"check": "words", "at_most": 1}]}]
    got = run(
        "--input", write(tmp_path / "x.jsonl", rows), "--output", tmp_path / "y.jsonl", "--verifier", "instructions"
    )
    assert got.exit_code == 0 and "mean reward 1.000" in got.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --url, --local and --verifier, found none"),
        (["--url", "http://x/v1", "--verifier", "exact"], "found --url and --verifier"),
        (["--url", "http://x/v1"], "--url needs --model"),
        (["--verifier", "rhyme"], "expected --verifier exact, math, code, instructions, found 'rhyme'"),
        (["--url", "http://x/v1", "--model", "m", "--calibration", "group"], "group statistics belong to training"),
        (
            ["--url", "http://x/v1", "--model", "m", "--calibration", "best"],
            "calibration: expected one of scale, anchors, group",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    got = run("--input", write(tmp_path / "x.jsonl", ROWS[:1]), "--output", tmp_path / "y.jsonl", *arguments)
    assert got.exit_code == 1 and message in got.output and "Traceback" not in got.output


def test_a_missing_input_is_named(tmp_path):
    got = run("--input", tmp_path / "none.jsonl", "--output", tmp_path / "y.jsonl", "--verifier", "exact")
    assert got.exit_code == 1 and "none.jsonl" in got.output


def test_a_judge_that_refuses_is_one_line(tmp_path):
    with ScriptedJudge(script=lambda n, body: "401") as server:
        common = [
            "--input",
            write(tmp_path / "x.jsonl", ROWS[:2]),
            "--output",
            tmp_path / "y.jsonl",
            "--url",
            server.url,
        ]
        got = run(*common, "--model", "m")
    assert got.exit_code == 1 and "refuses model 'm': status 401" in got.output
