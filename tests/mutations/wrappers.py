"""Faults of the operations in Python."""

from __future__ import annotations

from mutations.mutation import KL, UNCOMPILED, within

LINEAR = ("tests/ops/test_linear_trimmed_cross_entropy_kernel.py", *UNCOMPILED)

WRAPPERS = [
    *within(
        "wrappers",
        "batchkern/ops/_public.py",
        ("tests/ops/test_public.py", "tests/ops/test_checks.py"),
        ("arguments by name are not looked at", "args + tuple(kwargs.values())", "args"),
        ("the compiler meets the overrides", "if is_dynamo_compiling():", "if False:"),
        ("freed memory is read", "if any(map(_is_freed, arguments)):", "if False:"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_autograd.py",
        ("tests/ops/test_autograd.py",),
        ("a batch of gradients is taken for one", "if not is_batched(*grads):", "if True:"),
        (
            "a batch of gradients is overwritten",
            "    if is_batched(grad):\n        raise",
            "    if False:\n        raise",
        ),
        ("a batch can be differentiated twice", "if is_batched(*grads):  # _R", "if False:  # _R"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_autograd.py", "-k", "traced"),
        ("torch.jit.trace meets a kernel", "torch._C._is_tracing() or", "False or"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_autograd.py", "-k", "forward_mode"),
        ("forward mode meets a kernel", "or forward_ad._current_level >= 0)", "or False)"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/rank_batches.py",
        ("tests/ops/test_rank_batches.py", *UNCOMPILED),
        ("the count is rounded, not cut", "math.floor(fraction * size)", "round(fraction * size)"),
        (
            "a batch never seen ranks below all others",
            "torch.full((size,), math.inf,",
            "torch.full((size,), -math.inf,",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_trimmed_mean.py", *UNCOMPILED),
        (
            "a rank's loss is not scaled for the average over ranks",
            "torch.where(kept, self.weight, 0).sum() / len(self.rows)",
            "torch.where(kept, self.weight, 0).sum()",
        ),
        (
            "ranks have equally many rows",
            "start = sum(self.rows[: self.rank])",
            "start = self.rank * self.rows[self.rank]",
        ),
        ("a sum over samples is that of one rank", "dist.all_reduce(total, group=group)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/test_reference.py",),
        ("k may be 0", "torch.round(n.double() * keep).clamp(min=1)", "torch.round(n.double() * keep)"),
        (
            "NaN ranks lowest",
            "torch.where(x == 0, 0.0, torch.where(x.isnan(), math.nan, x))",
            "torch.where(x == 0, 0.0, torch.where(x.isnan(), -math.inf, x))",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/trimmed_cross_entropy.py",
        ("tests/ops/test_trimmed_cross_entropy.py", *UNCOMPILED),
        (
            "logits that were overwritten count as unchanged",
            "        torch.autograd.graph.increment_version(logits)\n",
            "",
        ),
        ("a module forgets an option", "            ignore_index=self.ignore_index,\n", ""),
        (
            "a leaf may be overwritten",
            "        check_inplace_backward(logits)\n",
            "",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/augment_latent.py",
        ("tests/ops/test_augment_latent.py", *UNCOMPILED),
        (
            "the backward pass does not rescale dropout",
            "drop_prob=drop_prob, rescale_dropout=rescale_dropout\n        )\n        return result",
            "drop_prob=drop_prob, rescale_dropout=False\n        )\n        return result",
        ),
        (
            "without a seed every call has the same numbers",
            "torch.randint(-(2**63), 2**63 - 1, (), device=device)",
            "torch.full((), torch.initial_seed(), device=device)",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_checks.py",
        ("tests/ops/test_augment_latent.py", *UNCOMPILED),
        (
            "an open end is taken for a closed one",
            "if not low <= x <= high or (open_low and x == low) or (open_high and x == high):",
            "if not low <= x <= high or (open_high and x == high):",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/soft_label_kl.py",
        KL,
        ("a gradient is scaled again by a second backward pass", "ctx.used = True", "ctx.used = False"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        LINEAR,
        (
            "taking off dropped rows costs nothing",
            "taken_off = (1 - keep) * (1 + needs[1]) if",
            "taken_off = (1 - keep) * needs[1] if",
        ),
        ("dropped rows are added, not taken off", "~kept, -1 / normalizer, 0.0)", "~kept, 1 / normalizer, 0.0)"),
        ("sums of many chunks in bfloat16", "dtype=x.dtype if terms == 1 else torch.float32", "dtype=x.dtype"),
        ("room for one row too few", "math.floor(share * len(mask)) + 1)", "math.floor(share * len(mask)))"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_linear_trimmed_cross_entropy.py", *UNCOMPILED),
        ("NaN of an ignored row spreads", "narrow.masked_fill(ignored, 0)", "narrow"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_linear_cross_entropy.py", *UNCOMPILED),
        ("a cap has no derivative", "gradient.mul_(u.cosh_().reciprocal_().square_())", "u.cosh_()"),
        ("a scale has no derivative", "(x[self.index] * layer.scale)", "x[self.index]"),
        ("nor in the mean of all", "(logit_scale / normalizer)", "(1 / normalizer)"),
        ("words that are masked come back", "capped.masked_fill_(masked, -math.inf)", "capped"),
        ("rows need both gradients", "if x is not None]).any(0)", "if x is not None]).all(0)"),
        ("a promise is not looked at", "if promised is not None and count > promised:", "if False:"),
        ("an ignored row has the gradient of its cap", "logits.masked_fill_(ignored, 0)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_sharded.py",
        ("tests/ops/test_sharded.py",),
        ("a gradient is the sum over processes", "/ ctx.mesh.size()", "/ 1"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_sharded.py",),
        ("hidden has the gradient of one part", "dist.all_reduce(to_rows, group=shard.group)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_sharded.py",
        ("tests/ops/test_sharded.py",),
        ("the last of equal words predicts", "dist.ReduceOp.MIN", "dist.ReduceOp.MAX"),
        ("a part is counted from the first word", "sum(sizes[: dist.get_rank(group)])", "0"),
        (
            "smoothing over one part",
            "label_smoothing * (lse - total / shard.words)",
            "label_smoothing * (lse - total / 5)",
        ),
        ("a masked part has a sum", "part = torch.where(empty, 0, torch.exp", "part = torch.where(False, 0, torch.exp"),
    ),
    *within(
        "wrappers",
        "batchkern/basis.py",
        ("tests/test_basis.py",),
        ("rows of unit norm, not columns", "columns.norm(dim=0, keepdim=True)", "columns.norm(dim=1, keepdim=True)"),
        ("an orthogonal basis that is not Haar", "return q * torch.where(r.diagonal() < 0, -1.0, 1.0)", "return q"),
        ("a Hadamard basis of the padded width's norm", "[:, :width] / width**0.5", "[:, :width] / x.shape[1] ** 0.5"),
    ),
    *within(
        "wrappers",
        "batchkern/_backend.py",
        ("tests/test_backend.py",),
        ("machine code does not serve later minor versions", "minor <= capability[1]", "minor == capability[1]"),
    ),
    *within(
        "wrappers",
        "batchkern/_past_the_loss.py",
        ("tests/test_causal_lm.py", *UNCOMPILED),
        ("layers called around the model are let pass", "if not self.inside and learns(layers, output):", "if False:"),
        ("training in evaluation mode is let pass", "loss.register_hook(refuse)", "pass"),
        ("a copy of a layer refuses too", 'state["inside"] = True', "pass"),
        ("an unpickled layer refuses too", '{**state, "inside": True}', "state"),
        ("a copy of a model refuses nothing", "self._base, self.inside = id(base), False", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/causal_lm.py",
        ("tests/test_causal_lm.py", *UNCOMPILED),
        ("a token predicts itself", "F.pad(labels, (0, 1), value=ignore_index)[..., 1:]", "labels"),
        ("the untrimmed loss counts ignored tokens", "losses.detach().sum() / counted.sum()", "losses.detach().mean()"),
        ("training without labels is let pass", "if not call.labelled and learns(model, output):", "if False:"),
        (
            "a loss made elsewhere is let pass",
            "unused and (hidden is not None or learns(model, output))",
            "unused and hidden",
        ),
        ("the excess is the loss", "score=losses.detach() - reference", "score=losses.detach()"),
        (
            "evaluation is of the hardest tokens",
            "if self._model.training:\n            loss =",
            "if True:\n            loss =",
        ),
        ("skip_logits is not heeded", " or bool(skip_logits)", ""),
        ("shift_labels alone are no labels", 'given["labels"] = kwargs["labels"] = given["shift_labels"]', "pass"),
        (
            "a scale that divides multiplies",
            "scale /= base.config.logits_scaling",
            "scale *= base.config.logits_scaling",
        ),
        ("any change of the logits is taken for a scale", "return self._checked\n\n\n", "return True\n\n\n"),
    ),
]
