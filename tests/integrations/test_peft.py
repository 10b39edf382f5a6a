"""Adapters of PEFT, added before and after the patch."""

from __future__ import annotations

from typing import Any

import plain_loop as plain
import pytest
import torch

import batchkern

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft


def adapted(model: Any, targets: list[str] | str = "all-linear", **options: Any) -> Any:
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize(
    ("after", "saved", "keep"),
    [(False, None, 0.3), (True, None, 0.3), (True, ["lm_head"], 0.3), (True, ["lm_head"], 1.0)],
    ids=["patched first", "adapted first", "with an output layer", "keep 1"],
)
def test_three_steps_equal_a_plain_loop(after: bool, saved: list[str] | None, keep: float) -> None:
    batches = plain.batches(plain.rows(12))
    expected = adapted(plain.model(), modules_to_save=saved)
    first = {name: x.detach().clone() for name, x in expected.named_parameters() if x.requires_grad}
    losses = plain.train(expected, batches, [keep] * 3)
    model = plain.model()
    if after:
        model = adapted(model, modules_to_save=saved)
        batchkern.patch_causal_lm(model, keep)
    else:
        batchkern.patch_causal_lm(model, keep)
        model = adapted(model, modules_to_save=saved)
    for (batch,), loss in zip(batches, losses, strict=True):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert output.logits is None
        assert float(output.loss.detach()) == pytest.approx(loss, abs=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= plain.RATE * parameter.grad
    trained = {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}
    theirs = {name: x.detach() for name, x in expected.named_parameters() if x.requires_grad}
    assert any("lm_head" in name for name in trained) == bool(saved)
    torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-6)
    assert all(float((theirs[name] - first[name]).abs().max()) > 0 for name in theirs)


@pytest.mark.parametrize("options", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_output_layer_adapted_after_the_patch_is_refused(options: Any) -> None:
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.3)
    with pytest.raises(RuntimeError, match="the output layer of LlamaForCausalLM was replaced .* after adapters are"):
        adapted(model, **options)(**plain.batches(plain.rows(4))[0][0])


def test_an_adapter_of_the_output_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="plain nn.Linear as its output layer, LlamaForCausalLM has .*peft"):
        batchkern.patch_causal_lm(adapted(plain.model(), ["q_proj", "lm_head"]), 0.3)


def test_a_prompt_that_is_learnt() -> None:
    """Its words come before the labels, which PEFT lengthens."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(plain.model(), config).train()
    batch = plain.batches(plain.rows(4))[0][0]
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    target = torch.cat([torch.full((4, 3), -100), batch["labels"]], dim=1)[:, 1:].flatten()
    expected = batchkern.trimmed_cross_entropy(logits, target, 0.3)
    batchkern.patch_causal_lm(model, 0.3)
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
