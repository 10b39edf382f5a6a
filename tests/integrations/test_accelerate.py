"""A patched model in a loop of accelerate: three steps equal those of a plain loop, through a checkpoint too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_loop as plain
import pytest
import torch

import batchkern
from batchkern.schedules import linear

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import accelerate

from batchkern.integrations.accelerate import KeepSchedule


@pytest.fixture
def accelerator() -> Any:
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(accelerator: Any, model: Any) -> tuple[Any, Any]:
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=plain.RATE))


@pytest.mark.parametrize("last", [1.0, 0.2])
def test_three_steps_equal_a_plain_loop_through_a_checkpoint(last: float, accelerator: Any, tmp_path: Path) -> None:
    model, expected, batches = plain.model(), plain.model(), plain.batches(plain.rows(24), 2)
    first, *_ = plain.train(expected, batches, [1.0, (1 + last) / 2, last])
    patch = batchkern.patch_causal_lm(model, 1.0)
    wrapped, optimizer = prepared(accelerator, model)
    keep = KeepSchedule(accelerator, wrapped, linear(1.0, last), steps=3)
    keeps, losses = [], []

    def step(index: int) -> None:
        for batch in batches[index]:
            with accelerator.accumulate(wrapped):
                keeps.append(patch.keep)
                loss = wrapped(**batch).loss
                losses.append(float(loss.detach()))
                accelerator.backward(loss)
                optimizer.step()
                keep.step()
                optimizer.zero_grad()

    step(0)
    accelerator.save_state(str(tmp_path / "state"))
    step(1)
    accelerator.load_state(str(tmp_path / "state"))
    step(1)
    step(2)
    middle = (1 + last) / 2
    assert keeps == pytest.approx([1.0, 1.0, middle, middle, middle, middle, last, last])
    assert sum(losses[:2]) / 2 == pytest.approx(first, abs=1e-5)
    plain.assert_same_weights(model, expected)


def test_mixed_precision_keeps_the_patch() -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, batch = plain.model(), plain.batches(plain.rows(4))[0][0]
    expected = float(plain.hardest(plain.token_losses(model, batch), 0.3).detach())
    batchkern.patch_causal_lm(model, 0.3)
    wrapped, _ = prepared(accelerator, model)
    output = wrapped(**batch)
    accelerator.backward(output.loss)
    assert output.logits is None
    assert float(output.loss.detach()) == pytest.approx(expected, rel=5e-3)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert unwrapped is model
    assert float(model(**batch).loss.detach()) == pytest.approx(expected, abs=1e-5)
    accelerate.state.AcceleratorState._reset_state(True)


def test_what_is_refused(accelerator: Any) -> None:
    model = plain.model()
    with pytest.raises(ValueError, match="model must be patched by patch_causal_lm"):
        KeepSchedule(accelerator, model, linear(1.0, 0.2), steps=3)
    batchkern.patch_causal_lm(model, 0.5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        KeepSchedule(accelerator, model, linear(1.0, 0.2), steps=0)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 2"):
        KeepSchedule(accelerator, model, linear(2.0, 0.2), steps=3)
    with pytest.raises(RuntimeError, match="without labels, by test_what_is_refused of test_accelerate"):
        prepared(accelerator, model)[0](input_ids=torch.ones(1, 4, dtype=torch.long))
