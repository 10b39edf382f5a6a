"""patch_causal_lm on tiny randomly initialised models of transformers."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import batchkern
from batchkern.ops import _chunked_linear

transformers = pytest.importorskip("transformers")

WORDS = 300
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}


def make(kind: str) -> Any:
    torch.manual_seed(1)
    config = {
        "llama": lambda: transformers.LlamaConfig(**LLAMA),
        "tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "wide": lambda: transformers.LlamaConfig(**{**LLAMA, "vocab_size": 5000}),
        "bias": lambda: transformers.PhiConfig(**{**SIZES, "intermediate_size": 64}, resid_pdrop=0.0),
        "experts": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=2, output_router_logits=True),
        "cohere": lambda: transformers.CohereConfig(**LLAMA, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**LLAMA, logits_scaling=3.0),
        "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5),
        "gemma3": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8, final_logit_softcapping=0.5),
        "uncapped": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=None),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (3, 17))
    labels = ids.clone()
    labels[0, :6] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: nn.Module, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_same_step(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], **tolerance: float
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert len(theirs[1]) > 5
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)


CAPPED = ["cohere", "granite", "gemma2", "gemma3"]


@pytest.mark.parametrize("kind", ["llama", "tied", "bias", "experts", *CAPPED, "uncapped"])
@pytest.mark.parametrize("chunk_rows", [None, 10])
def test_keep_1_is_the_unpatched_model(kind: str, chunk_rows: int | None) -> None:
    model, arguments = make(kind), batch()
    if kind in ("llama", "tied"):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (kind == "tied")
    expected = step(model, **arguments)
    patch = batchkern.patch_causal_lm(model, 1.0, chunk_rows=chunk_rows)
    assert_same_step(step(model, **arguments), expected, rtol=1e-5, atol=1e-7)
    if kind != "experts":  # whose loss has a term of the router's besides
        torch.testing.assert_close(patch.untrimmed_loss, expected[0])


def test_bfloat16_and_autocast() -> None:
    arguments = batch()
    model = make("llama").bfloat16()
    expected = step(model, **arguments)
    batchkern.patch_causal_lm(model, 1.0, chunk_rows=10)
    assert_same_step(step(model, **arguments), expected, rtol=2**-5, atol=2**-8)
    model = make("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, **arguments)
        batchkern.patch_causal_lm(model, 1.0, chunk_rows=10)
        assert_same_step(step(model, **arguments), expected, rtol=2**-5, atol=2**-8)


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_the_loss_is_that_of_the_hardest_tokens(keep: float) -> None:
    model, arguments = make("llama"), batch()
    logits = model(arguments["input_ids"]).logits[:, :-1].reshape(-1, WORDS)
    target = arguments["labels"][:, 1:].reshape(-1)
    model.zero_grad()
    expected = batchkern.trimmed_cross_entropy(logits, target, keep)
    expected.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters()}
    patch = batchkern.patch_causal_lm(model, keep)
    assert_same_step(step(model, **arguments), (expected.detach(), grads), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(patch.untrimmed_loss, nn.functional.cross_entropy(logits, target).detach())
    assert not patch.untrimmed_loss.requires_grad


def test_a_schedule() -> None:
    model, arguments = make("llama"), batch()
    patch = batchkern.patch_causal_lm(model, 1.0)
    losses = []
    for keep in (1.0, 0.5, 0.1):
        patch.keep = keep
        losses.append(float(model(**arguments).loss.detach()))
    assert losses == sorted(losses)
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("items", [100, torch.tensor(100)])
def test_gradient_accumulation_counts_items_as_the_trainer_does(items: int | Tensor) -> None:
    model, arguments = make("llama"), batch()
    expected = step(model, **arguments, num_items_in_batch=items)
    patch = batchkern.patch_causal_lm(model, 1.0)
    assert_same_step(step(model, **arguments, num_items_in_batch=items), expected, rtol=1e-5, atol=1e-7)
    patch.keep = 0.3
    count = int((arguments["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(model(**arguments, num_items_in_batch=items).loss, model(**arguments).loss * count / 100)


def test_shift_labels_are_taken_as_they_are() -> None:
    model, arguments = make("llama"), batch()
    shifted = torch.randint(WORDS, arguments["labels"].shape)
    expected = step(model, **arguments, shift_labels=shifted)
    batchkern.patch_causal_lm(model, 1.0)
    assert_same_step(step(model, **arguments, shift_labels=shifted), expected, rtol=1e-5, atol=1e-7)


def test_shift_labels_alone_are_labels() -> None:
    """As in sequence parallelism, where a token's label lies on another process."""
    model, arguments = make("llama"), batch()
    shifted = nn.functional.pad(arguments.pop("labels"), (0, 1), value=-100)[:, 1:]
    logits = model(**arguments).logits.flatten(0, 1)
    expected = batchkern.trimmed_cross_entropy(logits, shifted.flatten(), 0.3)
    batchkern.patch_causal_lm(model, 0.3)
    output = model(**arguments, shift_labels=shifted)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None


def test_logits_to_keep() -> None:
    model, arguments = make("llama"), batch()
    ids, labels = arguments["input_ids"], arguments["labels"]
    last = {"labels": labels, "shift_labels": labels[:, -5:].contiguous(), "logits_to_keep": 5}
    expected = step(model, input_ids=ids, **last)
    batchkern.patch_causal_lm(model, 1.0)
    found = step(model, input_ids=ids, **last)
    assert_same_step(found, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(
        ValueError, match=r"one for each of the 15 tokens that have logits, got 51: with logits_to_keep"
    ):
        model(**arguments, logits_to_keep=5)


def test_training_past_the_loss_is_refused() -> None:
    model, arguments = make("llama"), batch()
    without_labels = {"input_ids": arguments["input_ids"]}
    patch = batchkern.patch_causal_lm(model, 0.3)
    here = "by test_training_past_the_loss_is_refused of test_causal_lm"
    with pytest.raises(RuntimeError, match=f"LlamaForCausalLM was called in training without labels, {here}, so"):
        model(**without_labels)
    with pytest.raises(RuntimeError, match=f"the layers of LlamaForCausalLM were called in training {here}, around"):
        model.model(**without_labels)
    own = transformers.modeling_outputs.CausalLMOutput
    model.forward = lambda input_ids, labels: own(loss=model.model(input_ids).last_hidden_state.sum())
    with pytest.raises(RuntimeError, match="without the patch, as its forward pass, <lambda> of test_causal_lm, has"):
        model(**arguments)
    with torch.no_grad():  # of which nothing is learnt
        assert model(**arguments).loss != 0
        model.model(**without_labels)
    del model.forward
    model.eval()
    assert model(**without_labels).logits.requires_grad
    model.train().requires_grad_(False)
    model(**without_labels)
    learnt = torch.randn(3, 17, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="was called in training without labels"):
        model(inputs_embeds=learnt)
    model.lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"the layers of LlamaForCausalLM were called in training {here}, around"):
        model.lm_head(model.model(**without_labels).last_hidden_state)
    with pytest.raises(RuntimeError, match=f"the layers of LlamaForCausalLM were called in training {here}, around"):
        model.forward(**arguments)  # past the hooks
    model.loss_function = patch._loss
    with pytest.raises(RuntimeError, match="another output layer or loss_function than when it was patched"):
        model(**arguments)
    model.loss_function = patch._loss_function
    model.requires_grad_(True)
    assert model(**arguments).logits is None
    patch.remove()
    model(**without_labels).logits.sum().backward()
    model.model(**without_labels)


@pytest.mark.parametrize("options", [{}, {"skip_logits": True}])
def test_training_in_evaluation_mode_is_refused(options: Any) -> None:
    """In which from_pretrained returns a model."""
    model, arguments = make("llama").eval(), batch()
    patch = batchkern.patch_causal_lm(model, 0.3)
    loss = model(**arguments, **options).loss
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is trained in evaluation mode, .* call train"):
        loss.backward()
    patch.remove()
    model(**arguments).loss.backward()


def test_a_patch_is_found_in_what_holds_the_model() -> None:
    model, reference = make("llama"), make("llama")
    patch = batchkern.patch_causal_lm(model, 0.3, batchkern.ExcessLoss(reference))
    of = batchkern.CausalLMPatch.of
    assert of(nn.ModuleList([reference, model])) is patch
    assert of(reference) is not patch
    assert of(nn.Linear(3, 3)) is None
    batchkern.patch_causal_lm(other := make("llama"), 0.3)
    with pytest.raises(ValueError, match="model must have one patched model in it, it has 2"):
        of(nn.ModuleList([reference, model, other]))


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_the_losses_of_tokens(kind: str) -> None:
    model, arguments = make(kind), batch()
    target = nn.functional.pad(arguments["labels"], (0, 1), value=-100)[:, 1:]
    logits = model(input_ids=arguments["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 17)
    patch = batchkern.patch_causal_lm(model, 0.3)
    for _ in range(2):
        found = patch.token_losses(**arguments)
        torch.testing.assert_close(found, expected.detach())
        assert not found.requires_grad
        shifted = patch.token_losses(arguments["input_ids"], shift_labels=target, return_dict=False)
        torch.testing.assert_close(shifted, found)
        with pytest.raises(ValueError, match="labels must be given for the losses of tokens, got None"):
            patch.token_losses(arguments["input_ids"])
        model.eval()


def test_a_copy_of_a_layer_is_no_copy_of_the_model() -> None:
    model, arguments = make("llama"), batch()
    expected = model(**arguments).logits
    batchkern.patch_causal_lm(model, 0.3)
    hidden = torch.randn(2, 32)
    head, body = copy.deepcopy(model.lm_head), copy.deepcopy(model.model)
    assert len(pickle.dumps(head)) < 2 * head.weight.nbytes
    (call,) = (hook.__self__ for hook in body._forward_hooks.values())
    assert call._forward is None  # which has the output layer
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(model.lm_head))):
        torch.testing.assert_close(again(hidden), hidden @ head.weight.T)
    for again in (copy.deepcopy(body), pickle.loads(pickle.dumps(model.model))):
        assert again(arguments["input_ids"]).last_hidden_state.requires_grad
    assert batchkern.CausalLMPatch.of(head) is None
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    with torch.no_grad():
        torch.testing.assert_close(head(body(arguments["input_ids"]).last_hidden_state), expected)


def test_evaluation_without_logits() -> None:
    """Of all tokens; at most a tenth more than the largest tensor of training."""
    model, ids = make("wide"), torch.randint(WORDS, (8, 64))
    arguments = {"input_ids": ids, "labels": ids}
    model.eval()
    expected = model(**arguments).loss
    with_items = model(**arguments, num_items_in_batch=100).loss
    model.train()
    batchkern.patch_causal_lm(model, 0.3, chunk_rows=8)
    trained = largest(lambda: model(**arguments).loss.backward())
    model.eval()
    with torch.no_grad():
        output = model(**arguments, skip_logits=True)
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(model(**arguments, skip_logits=True, num_items_in_batch=100).loss, with_items)
        assert output.logits is None
        assert largest(lambda: model(**arguments, skip_logits=True)) <= 1.1 * trained
        assert largest(lambda: model(**arguments)) > 4 * trained


def largest(action: Any) -> int:
    """Bytes of the largest tensor that it makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        action()
    return max(e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")


def test_an_objective_of_ones_own() -> None:
    model, arguments = make("llama"), batch()
    logits = model(input_ids=arguments["input_ids"]).logits
    target = nn.functional.pad(arguments["labels"], (0, 1), value=-100)[:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 17)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    ordered = entropy.flatten().sort().values
    middle = float(ordered[24:26].mean())  # between two: which side a token is on is not left to rounding
    chosen = (target != -100) & (entropy > middle)
    expected = (losses * chosen).sum() / chosen.sum()
    model.zero_grad()
    expected.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters()}
    seen = []

    def objective(rows: batchkern.Rows, labels: Tensor) -> Tensor:
        seen.append(labels)
        weights = (labels != -100) & (rows.entropy > middle)
        return (rows.loss * weights).sum() / weights.sum()

    patch = batchkern.patch_causal_lm(model, 1.0, objective)
    assert_same_step(step(model, **arguments), (expected.detach(), grads), rtol=1e-5, atol=1e-7)
    assert torch.equal(seen[0], target)
    torch.testing.assert_close(patch.untrimmed_loss, (losses.sum() / (target != -100).sum()).detach())
    count = int((target != -100).sum())
    torch.testing.assert_close(model(**arguments, num_items_in_batch=100).loss, expected.detach() * count / 100)
    patch.remove()
    batchkern.patch_causal_lm(model, 1.0, lambda rows, labels: rows.loss)
    with pytest.raises(TypeError, match="objective must return the loss, a 0-dim tensor, got tensor"):
        model(**arguments)
    batchkern.CausalLMPatch.of(model).remove()

    @torch.no_grad()
    def calls_the_model(rows: batchkern.Rows, labels: Tensor) -> Tensor:
        return model(**arguments).loss if len(seen) > 2 else rows.loss.sum()

    batchkern.patch_causal_lm(model, 1.0, calls_the_model)
    assert model(**arguments).logits is None


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_excess_over_a_reference_model(kind: str) -> None:
    model, reference, arguments = make(kind), make("bias"), batch()
    target = arguments["labels"][:, 1:].flatten()
    counted = target != -100

    def losses(of: Any) -> Tensor:
        logits = of(input_ids=arguments["input_ids"]).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, target, reduction="none")[counted]

    excess = losses(model) - losses(reference.eval())
    expected = losses(model)[excess.topk(round(0.3 * len(excess))).indices].mean()
    model.zero_grad()
    expected.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters()}
    objective = batchkern.ExcessLoss(reference.train())
    patch = batchkern.patch_causal_lm(model, 0.3, objective)
    for repeated in (model, copy.deepcopy(model)):
        assert_same_step(step(repeated, **arguments), (expected.detach(), grads), rtol=1e-5, atol=1e-7)
    assert batchkern.CausalLMPatch.of(repeated)._objective is objective  # no copy of the reference model
    assert all(x.grad is None for x in reference.parameters())
    assert not reference.training
    torch.testing.assert_close(patch.untrimmed_loss, losses(model.eval()).mean().detach())
    model.train()
    patch.keep = 1.0
    unpatched = losses(make(kind)).mean()
    torch.testing.assert_close(model(**arguments).loss, unpatched)
    torch.testing.assert_close(objective.reference_losses(arguments).flatten().sum(), losses(reference).sum())


def test_what_an_excess_loss_refuses() -> None:
    model, arguments = make("llama"), batch()
    reference = make("llama")
    reference.resize_token_embeddings(WORDS + 8)
    with pytest.raises(ValueError, match="reference_model must have the 300 words of the model, it has 308"):
        batchkern.patch_causal_lm(model, 0.3, batchkern.ExcessLoss(reference))
    assert batchkern.CausalLMPatch.of(model) is None
    for wrong in (nn.Linear(3, 3), "a model"):
        with pytest.raises(TypeError, match="must be a causal language model of transformers"):
            batchkern.ExcessLoss(wrong)
    sharing = make("llama")
    sharing.lm_head = model.lm_head
    objective = batchkern.ExcessLoss(sharing)
    with pytest.raises(ValueError, match="reference_model must have an output layer of its own"):
        batchkern.patch_causal_lm(model, 0.3, objective)
    batchkern.CausalLMPatch.of(sharing).remove()
    reference = make("bias")
    patch = batchkern.patch_causal_lm(model, 0.3, batchkern.ExcessLoss(reference), chunk_rows=7)
    its = batchkern.CausalLMPatch.of(reference)
    assert its._chunk_rows == 7
    patch.keep = math.nan
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got nan"):
        model(**arguments)
    patch.keep = 0.3
    reference.train()
    assert model(**arguments).loss > 0
    assert not reference.training
    embedded = model.get_input_embeddings()(arguments["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds must be None with an ExcessLoss"):
        model(inputs_embeds=embedded, labels=arguments["labels"])
    its.remove()
    with pytest.raises(RuntimeError, match="the patch of reference_model was removed"):
        model(**arguments)


def test_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    write = _chunked_linear._Layer.write_logits

    def watched(layer: Any, out: Tensor, *rest: Any) -> Tensor:
        shapes.append(out.shape)
        return write(layer, out, *rest)

    monkeypatch.setattr(_chunked_linear._Layer, "write_logits", watched)
    model = make("llama")
    batchkern.patch_causal_lm(model, 0.2, chunk_rows=10)
    output = model(**batch())
    assert output.logits is None
    assert "logits" not in output
    output.loss.backward()
    assert {rows for rows, _ in shapes} <= {9, 10, 1}  # chunks, the last of them, the kept


def test_every_other_call_is_the_models_own() -> None:
    model, arguments = make("llama"), batch()
    without_labels = {"input_ids": arguments["input_ids"]}
    trained = model(**without_labels).logits
    model.eval()
    evaluated = model(**arguments)
    generated = model.generate(arguments["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
    batchkern.patch_causal_lm(model, 0.1)
    torch.testing.assert_close(model(**arguments).logits, evaluated.logits)
    torch.testing.assert_close(model(**arguments).loss, evaluated.loss)  # of all tokens
    assert torch.equal(model.generate(arguments["input_ids"][:1, :4], max_new_tokens=5, do_sample=False), generated)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(**without_labels).logits, trained)
        assert torch.equal(model.generate(arguments["input_ids"][:1, :4], max_new_tokens=5, do_sample=False), generated)


def test_a_tuple_has_no_logits_either() -> None:
    model, arguments = make("llama"), batch()
    whole = model(**arguments, return_dict=False)
    batchkern.patch_causal_lm(model, 1.0)
    parts = model(**arguments, return_dict=False)
    assert len(parts) == len(whole) - 1
    torch.testing.assert_close(parts[0], whole[0])


def test_labels_given_by_place() -> None:
    model, arguments = make("llama"), batch()
    assert list(inspect.signature(model.forward).parameters)[5] == "labels"
    batchkern.patch_causal_lm(model, 0.5)
    by_place = model(arguments["input_ids"], None, None, None, None, arguments["labels"])
    assert by_place.logits is None
    assert torch.equal(by_place.loss, model(**arguments).loss)


def test_remove() -> None:
    model, arguments = make("llama"), batch()
    signature = inspect.signature(model.forward)
    expected = model(**arguments)
    patch = batchkern.patch_causal_lm(model, 0.1)
    assert inspect.signature(model.forward) == signature  # Trainer drops columns that are not among the arguments
    assert model(**arguments).logits is None
    for _ in range(2):
        patch.remove()
        assert "forward" not in model.__dict__
        torch.testing.assert_close(model(**arguments).logits, expected.logits)
        torch.testing.assert_close(model(**arguments).loss, expected.loss)
    again = batchkern.patch_causal_lm(model, 0.1)
    assert model(**arguments).logits is None
    patch.remove()  # which has nothing to give back any more
    assert model(**arguments).logits is None
    again.remove()


def test_an_error_in_the_model_leaves_it_in_order() -> None:
    model, arguments = make("llama"), batch()
    model.eval()
    logits = model(**arguments).logits
    model.train()
    batchkern.patch_causal_lm(model, 0.5)
    wrong = {**arguments, "labels": arguments["labels"] + WORDS}
    with pytest.raises(ValueError, match=r"target\[5\] is .* must be in \[0, 300\)"):
        model(**wrong)
    with torch.no_grad():
        assert model.lm_head(torch.zeros(1, 32)).shape == (1, WORDS)
    model.eval()
    torch.testing.assert_close(model(**arguments).logits, logits)


def test_a_copy_has_a_patch_of_its_own() -> None:
    model, arguments = make("llama"), batch()
    patch = batchkern.patch_causal_lm(model, 0.3)
    expected = step(model, **arguments)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickled, copy.deepcopy(pickled)):
        with pytest.raises(RuntimeError, match="were called in training by test_a_copy_has_a_patch_of_its_own"):
            other.model(arguments["input_ids"])
        its = batchkern.CausalLMPatch.of(other)
        assert isinstance(its, batchkern.CausalLMPatch)
        assert its is not patch
        model.zero_grad()
        assert_same_step(step(other, **arguments), expected)
        assert all(x.grad is None for x in model.parameters())
        its.keep = 1.0
        assert other(**arguments).loss < expected[0]
        its.remove()
        assert other(**arguments).logits.shape == (3, 17, WORDS)
        assert batchkern.CausalLMPatch.of(other) is None
        assert_same_step(step(model, **arguments), expected)
    assert batchkern.CausalLMPatch.of(model) is patch


def test_a_replica_is_refused() -> None:
    model = make("llama")
    batchkern.patch_causal_lm(model, 0.3)
    with pytest.raises(RuntimeError, match="or its replica in DataParallel, cannot be called"):
        model._replicate_for_data_parallel()(**batch())


def test_a_micro_batch_without_labels() -> None:
    model, arguments = make("llama"), batch()
    arguments["labels"].fill_(-100)
    expected = step(model, **arguments, num_items_in_batch=7)
    assert expected[0] == 0
    batchkern.patch_causal_lm(model, 1.0)
    assert_same_step(step(model, **arguments, num_items_in_batch=7), expected)


@pytest.mark.parametrize("over", [False, True], ids=["hardest", "excess"])
def test_compiled(over: bool) -> None:
    model, arguments = make("llama"), batch()
    batchkern.patch_causal_lm(model, 0.4, batchkern.ExcessLoss(make("bias")) if over else None, chunk_rows=10)
    expected = step(model, **arguments)
    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**arguments).loss
    loss.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters()}
    assert_same_step((loss.detach(), grads), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CAPPED)
def test_a_cap_or_scale_in_bfloat16_and_compiled(kind: str) -> None:
    model, arguments = make(kind), batch()
    expected = step(model.bfloat16(), **arguments)
    batchkern.patch_causal_lm(model, 1.0, chunk_rows=10)
    loss, grads = step(model, **arguments)
    torch.testing.assert_close(loss.float(), expected[0].float(), rtol=1e-2, atol=1e-2)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=0.1, atol=0.05 * float(expected[1][name].abs().max()))
    if kind != "gemma2":
        return
    expected = step(model, **arguments)
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**arguments).loss.backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, expected[1][name], rtol=0.05, atol=0.05 * float(x.grad.abs().max()))


def test_a_capped_model_selects_the_tokens_of_its_own_losses() -> None:
    model, arguments = make("gemma2"), batch()
    logits = model(input_ids=arguments["input_ids"]).logits[:, :-1].reshape(-1, WORDS)
    expected = batchkern.trimmed_cross_entropy(logits, arguments["labels"][:, 1:].flatten(), 0.3)
    batchkern.patch_causal_lm(model, 0.3)
    output = model(**arguments)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    assert len(model(**arguments, return_dict=False)) == 2  # the loss and the cache


def test_a_model_with_a_loss_of_its_logits_besides_is_refused() -> None:
    model = make("llama")
    model.config.z_loss_coefficient = 0.1  # as that of Bamba
    with pytest.raises(TypeError, match="LlamaForCausalLM has a z_loss_coefficient"):
        batchkern.patch_causal_lm(model, 0.5)


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.25], dtype=torch.float64)], ids=["another", "a cast"])
def test_models_that_change_their_logits_in_another_way_are_refused(scale: Any) -> None:
    model = make("cohere")
    patch = batchkern.patch_causal_lm(model, 0.5)
    model.logit_scale = scale
    with pytest.raises(RuntimeError, match="CohereForCausalLM cannot be patched.*changes its logits"):
        model(**batch())
    patch.remove()
    assert model(**batch()).logits.shape == (3, 17, WORDS)


def test_logits_changed_in_place_are_noticed() -> None:
    model = make("llama")
    batchkern.patch_causal_lm(model, 0.5)
    model.lm_head.register_forward_hook(lambda layer, arguments, logits: logits.mul_(0.5))
    with pytest.raises(RuntimeError, match="changes its logits"):
        model(**batch())


def test_a_cast_of_the_logits_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().train()
    # Up to transformers 4 it does not call its loss_function either.
    with pytest.raises((RuntimeError, TypeError), match="a cast|calls its loss_function"):
        patched(model)(**batch())


def test_another_output_layer_is_noticed() -> None:
    model = make("llama")
    patch = batchkern.patch_causal_lm(model, 0.5)
    model.resize_token_embeddings(WORDS + 8)
    with pytest.raises(RuntimeError, match="has another output layer or loss_function than when it was patched"):
        model(**batch())
    patch.remove()
    batchkern.patch_causal_lm(model, 0.5)
    assert model(**batch()).logits is None


def test_models_that_do_not_call_their_loss_function_are_refused() -> None:
    model = make("llama")
    original = type(model).forward
    model.forward = lambda input_ids, labels=None: original(model, input_ids)
    batchkern.patch_causal_lm(model, 0.5)
    with pytest.raises(RuntimeError, match="has not called its loss_function"):
        model(**batch())


def with_head(head: nn.Module) -> nn.Module:
    model = make("llama")
    model.lm_head = head
    return model


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


T5 = transformers.T5Config(vocab_size=WORDS, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
XLNET = transformers.XLNetConfig(vocab_size=WORDS, d_model=32, n_layer=1, n_head=4, d_inner=48)


def patched(model: nn.Module) -> nn.Module:
    batchkern.patch_causal_lm(model, 0.5)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (lambda: nn.Linear(3, 3), {}, TypeError, "causal language model of transformers .* got Linear"),
        (lambda: make("llama").model, {}, TypeError, "calls its loss_function, got LlamaModel"),
        (lambda: transformers.T5ForConditionalGeneration(T5), {}, TypeError, "got T5ForConditionalGeneration"),
        (lambda: transformers.XLNetLMHeadModel(XLNET), {}, TypeError, "calls its loss_function, got XLNetLMHeadModel"),
        (lambda: with_head(Scaled(32, WORDS)), {}, TypeError, "plain nn.Linear as its output layer, .* has .*Scaled"),
        (lambda: patched(make("llama")), {}, ValueError, "patched already"),
        (lambda: make("llama"), {"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0.0"),
        (lambda: make("llama"), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        (lambda: make("llama"), {"objective": 0.3}, TypeError, "objective must be a function of rows and labels"),
        (lambda: make("llama"), {"objective": nn.CrossEntropyLoss}, TypeError, "objective must be a function of rows"),
        (lambda: None, {}, TypeError, "model must be a causal language model of transformers, got NoneType"),
        (lambda: make("llama"), {"group": "all"}, TypeError, "group must be a torch.distributed process group"),
    ],
)
def test_wrong_arguments(model: Any, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        batchkern.patch_causal_lm(model(), **{"keep": 0.5, **arguments})
