"""A patched model in TRL's SFTTrainer, which makes its loss by itself: refused without the mixin, and with it three
steps equal those of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_loop as plain
import pytest

import batchkern
from batchkern.schedules import linear

pytest.importorskip("trl")

import datasets
import tokenizers
import transformers
import trl

from batchkern.integrations.trl import KeepSchedule, PatchedModelMixin


class SFTTrainer(PatchedModelMixin, trl.SFTTrainer):
    pass


def trainer(model: Any, examples: list[Any], folder: Path, *, kind: type = SFTTrainer, **options: Any) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(plain.WORDS)}, unk_token="1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    callbacks, peft_config = options.pop("callbacks", None), options.pop("peft_config", None)
    arguments: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": plain.RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **options,
    }
    made = trl.SFTConfig(str(folder), **arguments)
    data = datasets.Dataset.from_list(examples)
    data_of = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer}
    return kind(model, made, callbacks=callbacks, peft_config=peft_config, **data_of)


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_three_steps_equal_a_plain_loop(keep: float, tmp_path: Path) -> None:
    model, expected, examples = plain.model(), plain.model(), plain.rows(12)
    losses = plain.train(expected, plain.batches(examples), [keep] * 3)
    batchkern.patch_causal_lm(model, keep)
    trained = trainer(model, examples, tmp_path)
    trained.train()
    assert plain.logged(trained) == pytest.approx(losses, abs=1e-5)
    plain.assert_same_weights(model, expected)


def test_keep_1_is_the_trainer_without_the_patch(tmp_path: Path) -> None:
    model, unpatched, examples = plain.model(), plain.model(), plain.rows(12)
    trained = trainer(unpatched, examples, tmp_path, kind=trl.SFTTrainer, gradient_accumulation_steps=3)
    trained.train()
    expected = trained.evaluate()["eval_loss"]
    batchkern.patch_causal_lm(model, 1.0)
    trained = trainer(model, examples, tmp_path, gradient_accumulation_steps=3)
    trained.train()
    plain.assert_same_weights(model, unpatched)
    assert trained.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_schedule_of_keep(tmp_path: Path) -> None:
    model, expected, examples = plain.model(), plain.model(), plain.rows(12)
    plain.train(expected, plain.batches(examples), [1.0, 0.6, 0.2])
    batchkern.patch_causal_lm(model, 1.0)
    trained = trainer(model, examples, tmp_path, callbacks=[KeepSchedule(linear(1.0, 0.2))])
    trained.train()
    plain.assert_same_weights(model, expected)
    assert plain.logged(trained, "keep") == pytest.approx([1.0, 0.6, 0.2])


def test_without_the_mixin_the_first_step_is_refused(tmp_path: Path) -> None:
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    trained = trainer(model, plain.rows(4), tmp_path, kind=trl.SFTTrainer)
    with pytest.raises(
        RuntimeError, match="without the patch, as its forward pass, _fused_forward of trl.trainer.utils, has"
    ):
        trained.train()
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    trained = trainer(model, plain.rows(4), tmp_path, kind=trl.SFTTrainer, label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match="without labels, by compute_loss of trl.trainer.sft_trainer"):
        trained.train()


def test_a_learnt_prompt_is_no_way_around(tmp_path: Path) -> None:
    """Nothing of the model itself has a gradient then."""
    peft = pytest.importorskip("peft")
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM were called in training by|was made without the patch"):
        trainer(model, plain.rows(4), tmp_path, kind=trl.SFTTrainer, peft_config=config).train()


def test_what_the_mixin_refuses(tmp_path: Path) -> None:
    model = plain.model()
    batchkern.patch_causal_lm(model, 0.5)
    with pytest.raises(ValueError, match='loss_type must be "nll" for a patched model, got "dft"'):
        trainer(model, plain.rows(4), tmp_path, loss_type="dft")
    with pytest.raises(RuntimeError, match="without labels, by compute_loss of transformers.trainer"):
        trainer(model, plain.rows(4), tmp_path, label_smoothing_factor=0.1).train()
