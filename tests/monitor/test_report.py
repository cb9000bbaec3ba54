"""The report: real runs, what is missing and what is damaged; the page's structure, and the page in a browser."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from carerl_kernels.cli import app
from carerl_kernels.guard import CapabilityGuard
from carerl_kernels.monitor import Controller, DriftMonitor, JsonLines, reward_statistics
from carerl_kernels.monitor.report import RunError, RunRecord, build_page, render, write_report
from carerl_kernels.monitor.report.chart import Line, line_chart, smooth, thin, ticks
from carerl_kernels.monitor.report.page import Page
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Structure(HTMLParser):
    """Checks nesting while parsing; collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Real, very small runs: sequential and mixed, guarded and not, monitored and not; and one of another loop."""
    pytest.importorskip("transformers")
    from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
    from carerl_kernels.tasks.characters import character_tokenizer
    from trainer_helpers import BASE, small_domains, small_model

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    tokenizer = character_tokenizer()
    for name, guarded, watched, stages in (
        ("full", True, True, [Stage("code", 2), Stage("chat", 2)]),
        ("mixed", False, True, [Stage(("code", "chat", "math"), 2)]),
        ("plain", False, False, [Stage("code", 2), Stage("math", 2)]),
    ):
        model, domains = small_model(tokenizer, 0), small_domains()
        guard = CapabilityGuard(model, k=4, track_energy=True) if guarded else None
        names, balanced = [d.name for d in domains], {}
        controller = None
        if name == "mixed":
            controller, balanced = Controller(names, by="weight", errors=0.0), {"balance": "controller"}
        options = {"model": model, "gradients_every": 2, "split_every": 1, "guard": guard, "controller": controller}
        baseline = "best" if controller is None else {"code": 1.0, "chat": 0.1, "math": 0.0}
        watch = DriftMonitor(names, baseline=baseline, **options) if watched else None
        config = GRPOConfig(**{**BASE, "prompts_per_step": 6, **balanced})
        run = GRPOTrainer(model, tokenizer, domains, config, guard=guard, monitor=watch, run_dir=root / "set" / name)
        run.run(stages)
    own = DriftMonitor(["math", "<b>&chat"], sinks=[JsonLines(root / "own" / "metrics.jsonl")])
    for step in range(6):
        scores = {"math": [1.0] * (90 - 12 * step) + [0.0] * (10 + 12 * step), "<b>&chat": [0.5, 0.7]}
        figures = reward_statistics(["math", "math", "<b>&chat", "<b>&chat"], [1.0, 0.0, 0.2, 0.4], [0, 0, 1, 1])
        own.step(step, {"loss": 1.0, **figures}, scores=scores)
    assert own.alerts
    return root


def page_of(path: Path) -> Structure:
    return Structure(render(build_page(RunRecord.read(path))))


@pytest.mark.parametrize("name", ["set/full", "set/mixed", "set/plain", "own"])
def test_page_is_self_contained_and_accessible(runs, name):
    text = render(build_page(RunRecord.read(runs / name)))
    page = Structure(text)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", text)  # nothing from the network
    assert not page.all("script")
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[1]["name"] == "viewport"
    assert len(page.all("h1")) == 1
    pictures = [s for s in page.all("svg") if s.get("aria-hidden") != "true"]
    assert pictures and all(s["role"] == "img" and len(s["aria-label"]) > 10 for s in pictures)
    assert page.all("th") and all(th.get("scope") in ("col", "row") for th in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert labelled and set(labelled) <= set(ids)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", page.text)
    for coordinates in re.findall(r'points="([^"]*)"', text):
        assert re.fullmatch(r"(-?[\d.]+,-?[\d.]+ ?)+", coordinates)


def test_everything_that_was_recorded_is_shown(runs):
    full = page_of(runs / "set" / "full").text
    for heading in (
        "What each stage did to each domain",
        "This batch's gradient against each domain's own",
        "Gradient cosines",
        "batch, chat",
        "Reward variance within prompts",
        "Conflicting share of updates",
        "Displacement along protected directions",
        "Capture",
        "Update energy by class",
        "forward and backward",
        "code → chat",
        "Conflict: what the steps did to the losses",
        "Curvature: what the steps did to the losses",
    ):
        assert heading in full, heading
    assert "not recorded" not in full
    mixed = page_of(runs / "set" / "mixed").text
    for heading in (
        "Share of the batch",
        "Share of reward variance",
        "Share of the step budget",
        "Share of Adam's step",
        "Domination",
        "Conflict between domains",
        "Curvature between domains",
        "Factor of the controller",
        "Weight in the loss",
        "Decisions of the controller",
    ):
        assert heading in mixed, heading
    assert "Guard activity" not in mixed
    # numbers of the page are those of the file
    lines = [json.loads(t) for t in (runs / "set" / "full" / "metrics.jsonl").read_text().splitlines()]
    for name, score in lines[-1]["eval"].items():
        assert f"{name} " in full and f"{100 * score:.1f} %" in full
    split = lines[2]["monitor"]["split"]
    assert f"{split['even']['math']:+.2f}".replace("-0.00", "+0.00") in full and split["acting"] == "code"
    change = 100 * (lines[2]["eval"]["math"] - lines[0]["eval"]["math"])
    assert f"{change:+.1f}" in full


def test_what_is_missing_is_named_and_not_guessed(runs, tmp_path):
    plain = page_of(runs / "set" / "plain").text
    assert "This run was not monitored" in plain and "No alert was possible" in plain
    assert "Gradient cosines between domains : not recorded" in plain and "A test of drift : not recorded" in plain
    assert "untested" in plain and "holds" not in plain
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": {"x": 0.5}}\n{"step": 1, "loss": null}\n')
    bare = page_of(tmp_path).text
    for what in ("config.json is missing", "Rewards per domain", "Guard activity", "Cost"):
        assert what in bare
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    assert "Scores per domain : not recorded" in page_of(tmp_path).text


def test_alerts_are_told_and_names_are_escaped(runs):
    record = RunRecord.read(runs / "own")
    page = build_page(record)
    assert page.summary.startswith("math fell. The chance of any false alarm in the whole run was held at 5%")
    assert [(c.name, c.status) for c in page.cards] == [("math", "fell"), ("<b>&chat", "holds")]
    text = render(page)
    assert "<b>&chat" not in text and "&lt;b&gt;&amp;chat" in text
    assert text.count('class="alert"') == len(page.record.alerts) == 1


def watched(path: Path, scores, rebase_after=(), n=400, **options) -> Page:
    """The page of a run whose one domain has these mean scores, and its monitor."""
    monitor = DriftMonitor(["x"], sinks=[JsonLines(path / "metrics.jsonl")], **options)
    low, high = options.get("score_range", (0.0, 1.0))
    for step, p in enumerate(scores):
        ones = round(n * (p - low) / (high - low))
        monitor.step(step, {"stage": "s"} if step else {}, scores={"x": [high] * ones + [low] * (n - ones)})
        if step in rebase_after:
            monitor.rebase()
    return build_page(RunRecord.read(path))


@pytest.mark.parametrize(
    ("scores", "rebase_after", "alerts", "status", "verdict"),
    [
        ((0.8, 0.4, 0.4, 0.4), (2,), 1, "fell", "40.0 points below its baseline at step 1"),  # the new baseline holds
        (
            (0.8, 0.4, 0.4, 0.1, 0.4),
            (2,),
            2,
            "fell",
            "40.0 points below its baseline at step 1",
        ),  # back to the lower one
        ((0.8, 0.4, 0.4, 0.78), (2,), 1, "recovered", "fell at step 1; 2.0 points below that baseline at the end"),
        ((0.8, 0.4, 0.85), (), 1, "recovered", "fell at step 1; 5.0 points above that baseline at the end"),
        ((0.8, 0.4, 0.8, 0.4), (2,), 2, "fell", "40.0 points below its baseline at step 3"),
    ],
)
def test_recovered_means_back_at_the_baseline_that_the_alert_was_about(
    tmp_path, scores, rebase_after, alerts, status, verdict
):
    page = watched(tmp_path, scores, rebase_after)
    assert len(page.record.alerts) == alerts
    assert page.cards[0].status == status and page.cards[0].verdict.startswith(verdict)
    assert ("came back" in page.summary) == (status == "recovered")


def test_a_significant_drop_smaller_than_asked_for_has_its_own_verdict(tmp_path):
    page = watched(tmp_path / "a", (0.80, 0.77), drop=0.05, n=4000)
    (card,) = page.cards
    assert card.status == "slipped" and not page.record.alerts
    assert (
        card.verdict.startswith("a significant drop, p") and "of 3.0 points, less than the 5.0 points" in card.verdict
    )
    assert page.summary.startswith("No alert; x slipped") and "slipped" in Structure(render(page)).text
    page = watched(tmp_path / "b", (0.80, 0.77, 0.81), drop=0.05, n=4000)
    assert page.cards[0].status == "holds" and "not below its baseline at the end" in page.cards[0].verdict


def test_points_are_for_score_ranges_of_size_one(tmp_path):
    page = watched(tmp_path / "a", (8.0, 5.0), score_range=(0.0, 10.0))
    text = Structure(render(page)).text
    assert page.cards[0].verdict.startswith("3 below its baseline at step 1")
    assert not re.search(r"\bpoints\b", text) and "-3" in text
    assert "3 ± 0.23" in text
    small = watched(tmp_path / "b", (0.8, 0.3), score_range=(0.0, 10.0))  # scores look like shares, the range is not 1
    assert small.record.span != 1 and not small.cards[0].percent
    assert "points" in Structure(render(watched(tmp_path / "c", (0.8, 0.5)))).text


@pytest.mark.parametrize(
    "line",
    [
        {"rewards": 0.5, "eval": 0.7, "batch_share": 1.0, "reward_variance": 0.1},
        {"rewards": 0.5, "reward_variance": {"x": 0.1}, "batch_share": 3},
        {"reward_variance": {"x": 0.0, "y": 0.0}, "batch_share": {"x": 0.5, "y": 0.5}},
        {"eval": {"x": 0.5, "y": 0.5}, "reward_variance": {"x": 0.0, "y": 0.0}, "batch_share": {"x": 0.5, "y": 0.5}},
        {"eval": {"x": 0.5}, "reward_variance": {"x": None}, "batch_share": {"x": None}},
        {"eval": [0.5], "rewards": "none", "monitor": 0.3, "seconds": 2.0},
        {"eval": {"x": 0.5}, "monitor": {"domains": 1.0, "gradients": 2.0, "guard": 1, "alerts": 3, "alpha": 0.05}},
    ],
    ids=lambda line: str(line)[:60],
)
def test_foreign_lines_are_read_as_far_as_they_go(tmp_path, line):
    lines = [json.dumps({"step": step, **line}) + "\n" for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    path, _ = write_report(tmp_path)
    assert "not recorded" in Structure(path.read_text()).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 0}\n{"step": 1, "ev\n{"step": 2}\n', r"metrics.jsonl, line 2: expected a JSON object.*damaged"),
        ("[1]\n\n", "line 1: expected a JSON object"),
        ('{"loss": 1}\n\n', 'integer "step"'),
        ('{"step": 0}\n{"step": 0}\n', "line 2: expected a step after 0, found 0; two runs.*directory of its own"),
        ("", "is empty"),
    ],
)
def test_damaged_metrics_are_named(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_line_being_written_and_damaged_files_beside_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": {"x": 1.0}}\n{"step": 1, "ev')
    assert "last line of metrics.jsonl is incomplete" in page_of(tmp_path).text
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json: expected a JSON object"):
        RunRecord.read(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "x.report.json").write_text("[]")
    with pytest.raises(RunError, match=r"x.report.json"):
        RunRecord.read(tmp_path)


def test_command(runs, tmp_path):
    target = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(runs / "own"), "--out", str(target)])
    assert done.exit_code == 0, done.output
    assert "math fell" in done.output and str(target) in done.output and target.stat().st_size < 200_000
    for path, message in ((runs / "set", "it holds 3 runs, choose one"), (tmp_path / "no", "does not exist")):
        done = CliRunner().invoke(app, ["report", str(path)])
        assert done.exit_code == 1 and message in " ".join(done.output.split())


# ------------------------------------------------------------------------------------------------------------------ charts


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
@example(0.0, 5e-324, 2)
@example(-1e-320, 1e-320, 5)
def test_ticks_cover_the_interval_evenly(low, span, count):
    found = ticks(low, low + span, count)
    assert 2 <= len(found) <= count + 3
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step and found[-1] >= low + span - 1e-6 * step
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in itertools.pairwise(found))


def test_thinning_and_smoothing_keep_means_and_constants():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:50], 100) == points[:50]
    assert smooth([(float(i), 2.0) for i in range(9)], 5) == [(float(i), 2.0) for i in range(9)]


def test_chart_of_one_point_and_of_a_constant():
    for points in ([(5.0, 0.0)], [(0.0, 1.0), (1.0, 1.0)], [(0.0, -3e-9), (1.0, 2e-9)]):
        drawn = str(line_chart("x", [Line("x", points)], y_label="y").svg)
        Structure(drawn)  # parses
        assert "nan" not in drawn and "inf" not in drawn


# ----------------------------------------------------------------------------------------------------------------- browser

BROWSER = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
BROWSER += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg, .hidden")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
  document.body.dataset.wide = wide.join(" ");
  document.body.dataset.shown = document.querySelectorAll("figure svg, article svg").length;
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
@pytest.mark.parametrize("width", [390, 1200])
def test_page_in_a_browser(runs, tmp_path, width):
    """No console message, and nothing sticks out, on a phone and on a screen."""
    text = render(build_page(RunRecord.read(runs / "set" / "full")))
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE))
    flags = [*BROWSER.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert 'data-wide=""' in done.stdout, re.findall(r'data-wide="[^"]*"', done.stdout)
    assert int(re.findall(r'data-shown="(\d+)"', done.stdout)[0]) >= 6


def test_the_template_is_installed_with_the_package():
    spec = importlib.util.find_spec("carerl_kernels.monitor.report")
    assert Path(spec.origin).with_name("page.html").is_file()
