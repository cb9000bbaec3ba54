"""Protection from prompts inside other people's trainers: shown once before training, found again by a resumed run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from carerl_kernels import CapabilityGuard
from carerl_kernels.integrations.transformers import GuardCallback
from carerl_kernels.subspace import StoredBasis
from carerl_kernels.subspace.batches import shown_rows
from carerl_kernels.tasks.characters import DOMAINS, GENERATORS
from carerl_kernels.train.models import byte_tokenizer
from trainer_helpers import small_model
from trl_helpers import TOKENIZER, rows, trainer


def shown(name="math", number=16):
    return [{"prompt": e.prompt, "answer": e.answer} for e in GENERATORS[name]()[:number]]


def along(model, start, path) -> float:
    """How far the weights are from the start along the directions of a file."""
    basis, named = StoredBasis.load(path), dict(model.named_parameters())
    right = max(float(((named[n].detach() - start[n]) @ V).abs().max()) for n, V in basis.right.items())
    left = [float((U.mT @ (named[n].detach() - start[n])).abs().max()) for n, U in basis.left.items()]
    return max([right, *left])


def test_checkpoints_of_epochs_are_corrected(tmp_path):
    changes = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    made = {"guard": lambda m: CapabilityGuard(m, "remove", every=100, room=1.0), "protect": {"math": shown()}}
    model = small_model(TOKENIZER, 0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(tmp_path, rows(["chat"]), model, changes=changes, **made).train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        saved = type(model).from_pretrained(path)
        assert along(saved, start, tmp_path / "bases" / "math.safetensors") < 1e-5


def test_trl_protects_what_it_was_shown_and_resumes(tmp_path):
    model = small_model(TOKENIZER, 0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"guard": lambda m: CapabilityGuard(m, "remove", every=2, room=1.0), "protect": {"math": shown()}}
    changes = {"save_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, rows(["chat"]), model, changes=changes, **options)
    run.train()
    assert run.guard.history == ["math"]
    path = tmp_path / "bases" / "math.safetensors"
    assert along(model, start, path) < 1e-5
    assert max(float((p.detach() - start[n]).abs().max()) for n, p in model.named_parameters()) > 1e-3
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")  # between two corrections
    torch.testing.assert_close(dict(saved.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)

    again = trainer(tmp_path, rows(["chat"]), small_model(TOKENIZER, 0), changes={**changes, "max_steps": 6}, **options)
    again.train(resume_from_checkpoint=True)
    assert again.guard.report()["steps"] == 6
    assert along(again.model, start, path) < 1e-5
    path.unlink()
    gone = trainer(tmp_path, rows(["chat"]), small_model(TOKENIZER, 0), changes={**changes, "max_steps": 9}, **options)
    with pytest.raises(FileNotFoundError, match="expected what was seen of 'math' before training"):
        gone.train(resume_from_checkpoint=True)


def test_a_callback_that_confines_every_so_many_steps_leaves_the_optimizer_alone(tmp_path):
    model = small_model(TOKENIZER, 0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(tmp_path, rows(["chat"]), model)
    callback = GuardCallback(lambda m: CapabilityGuard(m, "remove", room=1.0), protect={"math": shown()}, every=2)
    run.add_callback(callback)
    run.train()
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert along(model, start, tmp_path / "bases" / "math.safetensors") < 1e-5
    for options in ({"every": 0}, {"every": 2, "stage": "chat"}, {"every": 2, "domain": "chat"}):
        with pytest.raises(ValueError, match="every: expected at least 1 step, and no stage or domain"):
            GuardCallback(CapabilityGuard, **options)


def test_rows_become_what_the_model_is_called_with():
    e = GENERATORS[DOMAINS[0]]()[0]
    ids = TOKENIZER(e.prompt)["input_ids"]
    answer = TOKENIZER(e.answer, add_special_tokens=False)["input_ids"]
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    found = list(
        shown_rows(
            [{"prompt": e.prompt}, {"prompt": e.prompt, "completion": e.answer}, {"text": e.prompt}, batch], TOKENIZER
        )
    )
    assert found[0]["input_ids"] == ids == found[2]["input_ids"]
    assert found[1]["input_ids"] == ids + answer
    assert found[3] is batch
    message = [{"role": "assistant", "content": e.answer}]
    (talk,) = shown_rows([{"prompt": e.prompt, "completion": message}], TOKENIZER)
    assert talk["input_ids"] == ids + answer
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        list(shown_rows([{"messages": message}], TOKENIZER))
    with pytest.raises(ValueError, match=r"expected rows with prompt .* found a row with 'question'"):
        list(shown_rows([{"question": e.prompt}], TOKENIZER))
    with pytest.raises(TypeError, match=r"protect: expected rows by name, .* found list"):
        GuardCallback(CapabilityGuard, protect=[{"prompt": e.prompt}])
    with pytest.raises(ValueError, match="expected a tokenizer to read them with"):
        list(shown_rows([{"prompt": "x"}], None))


def test_texts_stay_as_they_are_and_messages_go_through_the_template():
    """As TRL feeds them: a text is no user's message because its tokenizer knows chats."""
    tokenizer = byte_tokenizer()
    asked, said = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    opened = tokenizer.apply_chat_template([asked], add_generation_prompt=True, tokenize=False) + "2"
    rows = [
        {"prompt": "1+1", "completion": "2"},
        {"text": "1+12"},
        {"prompt": [asked], "completion": [said]},
        {"messages": [asked, said]},
    ]
    raw, text, answered, talk = (tokenizer.decode(row["input_ids"]) for row in shown_rows(rows, tokenizer))
    assert raw == text == "1+12" and answered == talk == opened != raw
