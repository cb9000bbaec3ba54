"""Methods that act on every step, on a quadratic instead of a model and in float64; in cells of both kinds, on tiny models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from carerl_kernels.study import sft
from carerl_kernels.study.cells import run_cells
from carerl_kernels.study.costs import beyond, memory
from carerl_kernels.study.grid import Grid
from carerl_kernels.study.methods import addition
from carerl_kernels.study.methods.dacsp_delta import SPANNED, Directions, pivoted_frame
from carerl_kernels.study.methods.distill import reverse_kl
from carerl_kernels.train import models
from carerl_kernels.train.recipe import RecipeError
from torch import nn

pytest.importorskip("yaml")
transformers = pytest.importorskip("transformers")


class Linear(nn.Module):
    """A layer whose loss on a domain is that of a linear regression; an embedding beside it."""

    def __init__(self, seed):
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(self.normal(5, 7))
        self.embedding = nn.Embedding(3, 4, dtype=torch.float64)
        self.inputs = {name: self.normal(6, 7) for name in "ab"}

    def normal(self, *size):
        return torch.randn(*size, generator=self.draw, dtype=torch.float64)


def trainee(seed=0):
    """What methods see, and the gradients of each example of a domain, which have a closed form."""
    layer = Linear(seed)
    targets = {name: layer.normal(6, 5) for name in "ab"}

    def nats(domain, n):
        x, y = layer.inputs[domain], targets[domain]
        return (lambda i=i: 0.5 * (layer.weight @ x[i] - y[i]).square().sum() for i in range(n))

    return SimpleNamespace(model=layer, trained=dict(layer.named_parameters()), seed=seed, nats=nats), targets


def made(name, **options):
    subject, targets = trainee()
    actor = addition({"name": name, **options}, "test").actor(subject)
    return subject.model, actor, torch.optim.SGD(subject.model.parameters(), lr=0.1), targets


def test_ewc_adds_the_gradient_of_its_penalty():
    layer, actor, optimizer, targets = made("ewc", strength=3.0, examples=6)
    expected = torch.zeros_like(layer.weight)
    kept_grad = torch.full_like(layer.weight, 7.0)
    anchors, fishers = [], []
    for name in "ab":
        x, y = layer.inputs[name], targets[name]
        errors = x @ layer.weight.T - y
        fishers.append(
            torch.stack([torch.outer(e, v).square() for e, v in zip(errors, x, strict=True)]).mean(0).detach()
        )
        anchors.append(layer.weight.detach().clone())
        layer.weight.grad = kept_grad.clone()
        actor.turn(name)
        assert torch.equal(layer.weight.grad, kept_grad)  # the coming step's own
        with torch.no_grad():
            layer.weight += layer.normal(5, 7)
    actor.before(optimizer)
    for fisher, anchor in zip(fishers, anchors, strict=True):
        expected += 3.0 * fisher * (layer.weight - anchor)
    torch.testing.assert_close(layer.weight.grad - kept_grad, expected.detach())


def test_cpo_is_the_proximal_step_of_an_l1_penalty():
    layer, actor, optimizer, _ = made("cpo", strength=2.0)
    start = layer.weight.detach().clone()
    actor.turn("a")
    moved = 0.4 * layer.normal(5, 7)
    with torch.no_grad():
        layer.weight += moved
    actor.after(optimizer)  # minimises |z - moved|^2 / 2 + .1 * 2 * |z|_1, weight by weight
    z = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    least = z[(0.5 * (z - moved[..., None]).square() + 0.2 * z.abs()).argmin(-1)]
    assert (layer.weight.detach() - start - least).abs().max() < 1e-4
    assert 0 < int((layer.weight == start).sum()) < start.numel()


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99, 1.0])
def test_directions_of_all_stages_are_orthonormalised_as_by_qr(overlap):
    """Against numpy's QR of the flattened pairs, which are not pivoted by equal lengths; a repeated pair is dropped."""
    rng = np.random.default_rng(1)
    first = [np.linalg.qr(rng.normal(size=(size, 3)))[0].T for size in (6, 9)]
    second = [np.linalg.qr(rng.normal(size=(size, 3)))[0].T for size in (6, 9)]
    second = [overlap * a + (1 - overlap) * b for a, b in zip(first, second, strict=True)]
    second = [s / np.linalg.norm(s, axis=1, keepdims=True) for s in second]
    left, right = (torch.from_numpy(np.vstack(pair)) for pair in zip(first, second, strict=True))
    flat = torch.einsum("km,kn->kmn", left, right).flatten(1).numpy()
    directions = Directions.of(left, right)
    frame = directions.frame.numpy() @ flat
    singular = np.linalg.svd(flat, compute_uv=False)
    assert len(frame) == (3 if overlap == 1 else 6)
    np.testing.assert_allclose(frame @ frame.T, np.eye(len(frame)), atol=1e-9)
    if singular[-1] > SPANNED:
        np.testing.assert_allclose(frame.T @ frame, np.linalg.pinv(flat) @ flat, atol=1e-9)
    assert np.all((frame @ flat.T).max(1) > 0)  # signs are those of the pairs that they come from
    update = torch.from_numpy(rng.normal(size=(6, 9)))
    c = frame @ update.numpy().ravel()
    expected = (np.where(c > 0, 0.2, -0.8) * c) @ frame
    np.testing.assert_allclose(directions.edit(update, 1.2, 0.2).numpy().ravel(), expected, atol=1e-9)
    assert float(directions.edit(update, 1.0, 1.0).abs().max()) == 0


def test_the_frame_is_r_inverse_of_a_pivoted_qr():
    linalg = pytest.importorskip("scipy.linalg")
    columns = np.random.default_rng(2).normal(size=(20, 6))
    columns[:, 4] = columns[:, 0] - 2 * columns[:, 3]
    _, r, order = linalg.qr(columns, mode="economic", pivoting=True)
    frame = pivoted_frame(columns.T @ columns)
    assert frame.shape == (5, 6)
    expected = np.linalg.inv(r[:5, :5] * np.sign(np.diag(r)[:5])[:, None])
    np.testing.assert_allclose(frame[:, order[:5]], expected.T, atol=1e-9)


@pytest.mark.parametrize("random", [False, True])
def test_updates_are_weighed_by_what_they_do_to_a_stages_change(random):
    """A repeated change grows by the aligned weight, a reverted one shrinks; embeddings are left alone."""
    layer, actor, optimizer, _ = made("dacsp_delta", energy=1.0, random=random)
    start = layer.weight.detach().clone()
    change = layer.normal(5, 1) @ layer.normal(1, 7)
    with torch.no_grad():
        layer.weight += change
        layer.embedding.weight += 1.0
    actor.turn("a")
    for sign, weight in ((1, 1.2), (-1, 0.2)):
        before, embedded = layer.weight.detach().clone(), layer.embedding.weight.detach().clone()
        actor.before(optimizer)
        with torch.no_grad():
            layer.weight += sign * change
            layer.embedding.weight += sign
        actor.after(optimizer)
        moved = layer.weight.detach() - before
        assert torch.allclose(layer.embedding.weight, embedded + sign)
        if not random:
            torch.testing.assert_close(moved, weight * sign * change)
    assert not torch.equal(layer.weight, start)
    assert actor.figures()["touched"] == pytest.approx((0.2**2 + 0.8**2) / 2) or random
    assert len(actor.directions) == 1 and len(actor.directions["weight"].left) == 1


def test_reverse_kl_of_written_tokens():
    draw = torch.Generator().manual_seed(0)
    student, expert = (torch.randn(3, 4, 5, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    terms = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=t) for t in (student, expert)))
    expected = torch.stack([terms[0].mean(), terms[1, :2].mean(), terms[2, 0]])
    torch.testing.assert_close(reverse_kl(student, expert, mask), expected)
    assert reverse_kl(student, student, mask).abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------- cells

GRID = """
settings:
  tiny:
    text: three domains
    model: {path: characters, warm_up: {steps: 60, lr: 3.0e-3, batch: 16}}
    domains: {code: &task {kind: characters, probes: 32}, chat: *task, math: *task}
    stages: [{domain: code, steps: 2}, {domain: chat, steps: 2}, {domain: math, steps: 2}]
    train: {lr: 3.0e-3, max_new_tokens: 5, record_last: false, prompts_per_step: 6, group_size: 4}
  one: {text: text, kind: sft, stages: [text, backwards], steps: 3, train: {lr: 0.003}}
  two: {text: two tasks, kind: sft, stages: [backwards, shortest], steps: 3, train: {lr: 0.003}}
methods:
  ewc0: {text: next to nothing, lr: [1], add: {name: ewc, strength: 1.0e-12}}
  cpo9: {text: nothing moves, lr: [1], add: {name: cpo, strength: 1000.0}}
  delta1: {text: nothing is changed, lr: [1], add: {name: dacsp_delta, aligned: 1.0, conflict: 1.0}}
  acting+guard: {text: both, lr: [1], add: {name: cpo, strength: 1.0}, guard: {shown: 8, basis: input}}
  saved: {text: resumed, lr: [1], add: {name: cpo, strength: 1.0}, train: {checkpoint_every: 1}}
  ewc-bare: {text: nothing stored, lr: [1], add: {name: ewc, strength: 1.0}, domains: {"*": {probes: 4}}}
  distill+kl: {text: two losses, lr: [1], add: distill, train: {kl_beta: 0.1}}
runs: []
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    from test_sft_merge import Bytes
    from trainer_helpers import small_model

    monkeypatch.setattr(models, "tiny_model", small_model)

    def small():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), Bytes()

    monkeypatch.setattr(sft, "load_smollm2", small)
    sft.pretrained.cache_clear()
    (tmp_path / "grid.yaml").write_text(GRID)
    yield Grid.load(tmp_path / "grid.yaml")
    sft.pretrained.cache_clear()


@pytest.mark.parametrize("setting", ["tiny", "two"])
def test_methods_act_from_the_second_stage_on(grid, tmp_path, setting):
    """Where a method does nothing the run is the plain one; where it lets nothing move, the first stage's end stays."""
    names = ["none", "ewc0", "delta1", "cpo9", "ewc100", "dacsp-delta"]
    plain, ewc0, delta1, still, ewc, delta = run_cells([grid.cell(f"{setting}/{n}@1/0") for n in names], tmp_path)
    for same in (ewc0, delta1):
        np.testing.assert_allclose(same.scores, plain.scores, atol=2e-3)
    for record in (still, ewc, delta):
        np.testing.assert_allclose(record.scores[1], plain.scores[1], atol=1e-6)
        assert record.scores[-1] != plain.scores[-1]
    np.testing.assert_allclose(still.scores[-1], still.scores[1], atol=1e-5)
    assert delta1.touched == 0 and 0 < delta.touched < 1 and plain.touched is None


def test_what_text_taught_is_consolidated(grid, tmp_path):
    plain, ewc = run_cells([grid.cell(f"one/{n}@1/0") for n in ("none", "ewc100")], tmp_path)
    assert ewc.scores[:2] == plain.scores[:2] and ewc.scores[2] != plain.scores[2]


def test_refreshed_and_distilled(grid, tmp_path):
    names = ("none", "refresh", "distill")
    plain, refreshed, distilled = run_cells([grid.cell(f"tiny/{n}@1/0") for n in names], tmp_path)
    assert refreshed.scores[:4] == plain.scores and len(refreshed.scores) == 5
    assert refreshed.stages[3] == ["code", "chat"]
    assert distilled.stages == [["code"], ["chat"], ["math"], ["code", "chat", "math"]]
    assert distilled.scores[0] == plain.scores[0] and len({tuple(s) for s in distilled.scores}) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/acting+guard@1/0", "expected no guard"),
        ("tiny/saved@1/0", "checkpoint_every: 0 to go with add: cpo"),
        ("tiny/ewc-bare@1/0", "expected 32 stored answers in every domain"),
        ("one/dacsp-delta@1/0", "found text, which the model comes with"),
        ("clean/ewc100@1/0", "two or more stages of one domain"),
        ("clean/distill@1/0", "stages of one domain each"),
        ("tiny/distill+kl@1/0", "which has its own loss"),
        ("clean/refresh@1/0", "two or more stages of one domain each and no guard"),
        ("bandit/refresh@1/0", "in settings of kind grpo, sft, found bandit"),
        ("bandit/cpo01@1/0", "in settings of kind grpo, sft, found bandit"),
        ("sft-lora/dacsp-delta@1/0", "found text|found lora"),
    ],
)
def test_what_does_not_go_together_is_refused(grid, name, message):
    with pytest.raises(RecipeError, match=message):
        grid.cell(name).check()


@pytest.mark.parametrize(
    ("name", "keeps", "more"),
    [
        ("lm/none@1/0", "none", ""),
        ("lm/replay@1/0", "all prompts", ""),
        ("lm/rehearsal@1/0", "32 a domain", "5120 sequences forward and backward (+16.7%)"),
        ("lm/kl@0.5/0", "none", "30720 sequences forward (+100.0%); stores 1 model"),
        ("lm/shown-every8@1/0", "none", "128 sequences forward (+0.4%); stores directions"),
        ("lm/probed@0.5/0", "32 a domain", "384 sequences forward and backward (+1.2%); stores directions"),
        ("lm/remove@0.5/0", "none", "stores directions"),
        ("lm/ewc100@1/0", "none", "64 sequences forward and backward (+0.2%); stores 4 models"),
        ("lm/refresh@1/0", "all prompts", "2048 sequences sampled and trained on (+6.7%)"),
        ("lm/distill@1/0", "none", "15360 sequences forward (+50.0%); stores 3 models"),
        ("sft/shown-every8@1/0", "none", "64 sequences forward (+13.3%); stores directions"),
        ("sft/ewc100@1/0", "none", "32 sequences forward and backward (+6.7%); stores 2 models"),
        ("bandit/none@1/0", "none", ""),
        ("merge/average@0.333/0", "none", ""),
    ],
)
def test_costs_beyond_the_plain_run(name, keeps, more):
    cell = Grid.load("small").cell(name)
    assert (memory(cell), beyond(cell)) == (keeps, more)
