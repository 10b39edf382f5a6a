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


def adapted(model: Any, targets: list[str] | str = "all-linear", kind: str | None = "CAUSAL_LM", **options: Any) -> Any:
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type=kind, r=4, target_modules=targets, init_lora_weights=False, **options)
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
    with pytest.raises(
        RuntimeError, match="another output layer or loss_function than when .* an adapter was added or disabled"
    ):
        adapted(model, **options)(**plain.batches(plain.rows(4))[0][0])


def test_an_adapter_of_the_output_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="plain nn.Linear as its output layer, LlamaForCausalLM has .*peft"):
        batchkern.patch_causal_lm(adapted(plain.model(), ["q_proj", "lm_head"]), 0.3)


def test_adapters_of_no_task() -> None:
    """Whose forward pass has no name for its arguments."""
    batch = plain.batches(plain.rows(4))[0][0]
    model, reference = adapted(plain.model(), kind=None), adapted(plain.model(7), kind=None)
    losses = plain.token_losses(model, batch)
    excess = losses - plain.token_losses(reference.eval(), batch)
    expected = losses[excess.topk(round(0.3 * len(losses))).indices].mean()
    batchkern.patch_causal_lm(model, 0.3, batchkern.ExcessLoss(reference))
    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_merged_adapter_wants_the_patch_anew() -> None:
    batch = plain.batches(plain.rows(4))[0][0]
    model = adapted(plain.model(), modules_to_save=["lm_head"])
    batchkern.patch_causal_lm(model, 0.3)
    merged = model.merge_and_unload().train()
    with pytest.raises(RuntimeError, match="after an adapter is merged, patch again"):
        merged(**batch)
    batchkern.CausalLMPatch.of(merged).remove()
    expected = plain.hardest(plain.token_losses(merged, batch), 0.3)
    batchkern.patch_causal_lm(merged, 0.3)
    torch.testing.assert_close(merged(**batch).loss, expected)


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
    batchkern.CausalLMPatch.of(model).remove()
    batchkern.patch_causal_lm(model, 0.3, batchkern.ExcessLoss(plain.model()))
    with pytest.raises(ValueError, match=r"each of the \(4, 15\) tokens of the model, got \(4, 12\): a learnt prompt"):
        model(**batch)
