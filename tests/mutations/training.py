"""Faults of the trainer and its files."""

from __future__ import annotations

from mutations.mutation import within

RESUME = ("tests/test_resume.py", "-k", "every_single_update")

TRAINING = [
    *within(
        "training",
        "batchkern/_start.py",
        ("tests/test_cli.py", "-k", "torch_is_loaded or swallows"),
        ("a script is not known as the command", "    return script or (", "    return ("),
        ("Ctrl-C in an import is an exception", "        caller = caller.f_back\n", "        caller = None\n"),
        ("python -m is not known as the command", "return script or (", "return script and ("),
    ),
    *within(
        "training",
        "batchkern/data/sources.py",
        ("tests/test_cli.py", "-k", "without_a_network"),
        ("datasets asks for long where there is no network", "if silence else", "if not silence else"),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        RESUME,
        (
            "a resume forgets torch's generators",
            "        torch.Generator().set_state(self._rng[0])  # raises here if the state is invalid\n",
            "        self._rng = None\n",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        RESUME,
        ("a resume forgets the momentum", '        load_optimizer(self.optimizer, state["optimizer"])\n', ""),
        ("a resume forgets the sums of the epoch", '        self.sums.copy_(state["sums"])\n', ""),
    ),
    *within(
        "training",
        "batchkern/diagnostics.py",
        RESUME,
        (
            "a resume forgets what was kept before this epoch",
            '"times_before": self._times_before,',
            '"times_before": self.times_kept,',
        ),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        ("tests/test_trainer.py",),
        ("the sums of an epoch go on in the next", "        self.updater.sums.zero_()\n", ""),
        ("the bar shows an epoch that has no update yet", "bar.due() and not batch.ends_epoch", "bar.due()"),
        (
            "the test loss is a sum of means",
            'F.cross_entropy(logits.float(), target, reduction="sum")',
            "F.cross_entropy(logits.float(), target)",
        ),
        (
            "an evaluation leaves the model training",
            "ending.callback(self.model.train, training)",
            "ending.callback(self.model.train)",
        ),
        (
            "a checkpoint is saved one update late",
            "self.counts.updates % self.checkpoint_every == 0",
            "self.counts.updates % self.checkpoint_every == 1",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py",),
        (
            "a pass for the losses alone is not counted",
            "passes * trained + (full if scored else 0)",
            "passes * trained",
        ),
        ("batches of all sizes weigh the same in the objective", "value * len(losses)", "value"),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_mixup.py",),
        ("transforms apply from the last to the first", "*before, last = strategies", "last, *before = strategies"),
        (
            "partners are as the data set has them",
            "return self._transformed(step, others, before)",
            "return self._transformed(step, others, [])",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_mixup.py",),
        (
            "a mixed image is right as its own class",
            "target.argmax(1) if target.is_floating_point() else target",
            "target.argmin(1) if target.is_floating_point() else target",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_trimming.py",),
        (
            "batch norm counts a batch twice",
            "self.autocast(), models.frozen_statistics(self.model):",
            "self.autocast():",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_passive_injection.py",),
        ("an idle head has gradients of zero", "zero_grad(set_to_none=True)", "zero_grad(set_to_none=False)"),
    ),
    *within(
        "training",
        "batchkern/diagnostics.py",
        ("tests/test_diagnostics.py",),
        (
            "the epoch before is the epoch itself",
            "self._times_before, self._kept_before = self.times_kept.clone(), kept",
            "self._times_before, self._kept_before = self.times_kept, kept",
        ),
        ("quantiles are of the lower rank", "round(q * (len(values) - 1))", "int(q * (len(values) - 1))"),
    ),
    *within(
        "training",
        "batchkern/rundir.py",
        ("tests/test_rundir.py",),
        (
            "metrics are not cut back to the checkpoint",
            "return state, self.metrics(done)",
            "return state, self.metrics()",
        ),
        (
            "an earlier run's checkpoint stays",
            "for name in RUN_FILES[2:]:",
            "for name in RUN_FILES[4:]:",
        ),
        (
            "a checkpoint of another run is taken",
            'if state.pop("run", None) != self._run:',
            "if not state.pop('run', None):",
        ),
        ("what cannot be read again is saved", "        check_readable(state)\n", ""),
        ("a damaged checkpoint is believed", "if digest != _digest(checkpoint[:-32]):", "if not digest:"),
        ("the checkpoint before is not kept", "previous=self.path / PREVIOUS)", "previous=None)"),
        (
            "who was written over trains on",
            "if self._left is not None and self._left != self._files():",
            "if self._left is None:",
        ),
        (
            "a run in use is resumed",
            "        self._lock = lock(self.path)",
            "        self._lock = os.open(self.path, 0)",
        ),
        (
            "a setting that is new is not compared",
            "for key in sorted(was.keys() | now.keys())\n            if was.get(key)",
            "for key in sorted(was.keys())\n            if was.get(key)",
        ),
    ),
    *within(
        "training",
        "batchkern/files.py",
        ("tests/test_files.py",),
        ("a directory that was moved is written to", "    if not same:", "    if False:"),
        ("a part is opened whatever lies there", "os.O_CREAT | os.O_EXCL", "os.O_CREAT"),
        ("a pipe is waited for", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"),
        ("a link is followed to add a line", " | os.O_NOFOLLOW", ""),
        ("the lock keeps nobody out", "except BlockingIOError:", "except ZeroDivisionError:"),
    ),
    *within(
        "training",
        "batchkern/records.py",
        ("tests/test_records.py",),
        ("rows of metrics are not checked", "        check(row, Row)\n", ""),
        ("rows of another epoch are taken", 'if row["epoch"] != number:', "if False:"),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py", "-k", "batch_norm"),
        (
            "a single chosen row is passed through batch norm",
            "rows is not None and len(rows) < self.run.least_rows",
            "rows is not None and len(rows) < 0",
        ),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        ("tests/test_trainer.py", "-k", "picture or two_trainings"),
        (
            "a picture that fails ends the training",
            'with only_warned(f"{directory.path / CURVES} is not drawn"):',
            "with contextlib.nullcontext():",
        ),
        ("the directory is free while it trains", "        self.ranks.first(directory.lock)\n", ""),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py", "-k", "decoded_ahead"),
        (
            "another batch than the next one is decoded ahead",
            "self.feed.prepare(rows, later,",
            "self.feed.prepare(rows[:-1], later,",
        ),
    ),
    *within(
        "training",
        "batchkern/parts/subsets.py",
        ("tests/test_trainer.py", "-k", "decoded_ahead"),
        (
            "an epoch names its own first batch",
            "ahead = of_epoch(self.epoch + 1)[:1]",
            "ahead = of_epoch(self.epoch)[:1]",
        ),
    ),
    *within(
        "training",
        "batchkern/plan.py",
        ("tests/test_plan.py",),
        (
            "the smaller last batch is left out",
            "else max(1, -(-rows // size) - (0 < rows % size < least))",
            "else rows // size",
        ),
        ("a last batch that is too small stays", "len(batches[-1]) < least:", "len(batches[-1]) < 0:"),
        ("a batch names itself as the next", "[place + 1 : place + 1 + AHEAD]", "[place : place + AHEAD]"),
        (
            "a replay names a batch of a round that is not chosen yet",
            "else self.order[self.place :]",
            "else self.order[self.place - 1 :]",
        ),
        ("each epoch is in the same order", 'generator(self.seed, "epoch", epoch)', 'generator(self.seed, "epoch")'),
        ("a saved order goes on changing", "dict(vars(self), order=list(self.order))", "dict(vars(self))"),
    ),
    *within(
        "training",
        "batchkern/seeding.py",
        ("tests/test_plan.py",),
        (
            "places run into each other",
            "repr((checked_seed(seed), *plain)).encode()",
            '"".join(map(str, (seed, *place))).encode()',
        ),
    ),
    *within(
        "training",
        "batchkern/seeding.py",
        ("tests/test_seeding.py",),
        ("numpy's numbers are other seeds", "repr((checked_seed(seed), *plain))", "repr((seed, *plain))"),
    ),
    *within(
        "training",
        "batchkern/schedules.py",
        ("tests/test_schedules.py",),
        ("the last epoch does not reach the end", "t = epoch / (epochs - 1)", "t = epoch / epochs"),
        ("a milestone is passed one update late", "sum(progress >= m for", "sum(progress > m for"),
        ("every counts from 0", "lambda n: n % count == 0", "lambda n: n % count == 1 % count"),
    ),
]
