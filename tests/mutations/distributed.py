"""Faults of training in several processes."""

from __future__ import annotations

from mutations.mutation import within

SHARES = ("tests/test_distributed.py", "-k", "shares_make_up")
RANKS = ("tests/test_distributed.py", "-k", "three_ranks")

DISTRIBUTED = [
    *within(
        "distributed",
        "batchkern/strategies/base.py",
        RANKS,
        (
            "mixed filling is in the plain loss",
            "target.is_floating_point() and step.share.world == 1):",
            "target.is_floating_point()):",
        ),
    ),
    *within(
        "distributed",
        "batchkern/strategies/trimming.py",
        RANKS,
        ("mixed filling is ranked", "step.share.world == 1)", "step.share.world > 0)"),
    ),
    *within(
        "distributed",
        "batchkern/distributed.py",
        SHARES,
        (
            "rows that ranks do not divide are nobody's",
            "return -(-self.rows // self.world)",
            "return self.rows // self.world",
        ),
        (
            "the filling of a share counts as a class",
            "torch.full_like(target[self.real :], IGNORED)",
            "torch.zeros_like(target[self.real :])",
        ),
        (
            "a rank's rows are spread to the places of the first",
            "(0, 0, self.start, self.rows - self.start - self.real)",
            "(0, 0, 0, self.rows - self.real)",
        ),
    ),
    *within(
        "distributed",
        "batchkern/distributed.py",
        RANKS,
        ("the loss of ranks is their sum", "parts[:, -1].mean()", "parts[:, -1].sum()"),
        ("figures include the filling", "return whole[:, : share.rows], parts", "return whole, parts"),
        ("mixed filling counts", "torch.arange(self.each, device=target.device) < self.real", "target.sum(1) > 0"),
    ),
    *within(
        "trainer",
        "batchkern/initial_weights.py",
        ("tests/test_initial_weights.py",),
        (
            "a classifier of other classes is refused",
            "if any(found[part].shape != own[part].shape for part in names)",
            "if False",
        ),
        ("a file's missing names are ignored", "if missing or unknown:", "if unknown:"),
        ("a file's unknown names are ignored", "if missing or unknown:", "if missing:"),
        ("weights that are not finite are taken", "if not torch.isfinite(tensor).all():", "if False:"),
        ("weights may lie where they are written over", ".is_relative_to(Path(out).resolve())", " == Path(out)"),
        ("a run's directory is read as a file", "if not path.is_dir():", "if True:"),
        ("weights in another file are other weights", '"crc32": zlib.crc32(_read(path))', '"crc32": hash(path)'),
    ),
    *within(
        "trainer",
        "batchkern/rundir.py",
        ("tests/test_initial_weights.py",),
        ("weights are known by their path", '"inputs_crc32", "crc32")', '"inputs_crc32")'),
    ),
    *within(
        "trained",
        "batchkern/preprocessing.py",
        ("tests/test_preprocessing.py",),
        (
            "how images were cut out is not written",
            "crop = data.center_crop and data.shape[1] == data.shape[2]",
            "crop = False",
        ),
        (
            "a deviation of 0 is taken",
            "if not (_float32(self.std) > 0).all():",
            "if not (_float32(self.std) >= 0).all():",
        ),
        ("a format that comes later is read", 'if content["format"] != FORMAT or ', "if "),
        ("two classes may have one name", " or len(set(classes)) < len(classes):", ":"),
    ),
    *within(
        "trained",
        "batchkern/data/unlabelled.py",
        ("tests/test_preprocessing.py",),
        (
            "a photograph is not turned",
            'return require("PIL.ImageOps", "train").exif_transpose(cell["image"])',
            'return cell["image"]',
        ),
        ("what is ready is cut out again", "if center_crop and data.shape[1:] != shape[1:]:", "if center_crop:"),
        ("images of a list are squeezed", "resize=True, crop=center_crop", "resize=True, crop=False"),
    ),
    *within(
        "trained",
        "batchkern/data/images.py",
        ("tests/test_preprocessing.py",),
        ("a part does not know how it was cut out", "        part.center_crop = self.center_crop\n", ""),
    ),
    *within(
        "trained",
        "batchkern/trained.py",
        ("tests/test_trained.py",),
        ("mixed precision is forgotten", "dtype=amp, enabled=amp is not None", "dtype=amp, enabled=False"),
        ("the model is left in training", "    model = model.cpu().eval()\n", "    model = model.cpu().train()\n"),
        ("config.json is not held against it", "if (shape, classes) != (", "if () > ("),
        ("classes of the data are not looked at", "if data.classes not in (None, self.classes):", "if False:"),
        (
            "accuracy of a class is over what was predicted",
            "labels[correct].cpu().bincount(",
            "logits.argmax(1).cpu().bincount(",
        ),
    ),
    *within(
        "trained",
        "batchkern/trainer.py",
        ("tests/test_trained.py",),
        ("a name is written for a module", "model=named, classifier", 'model="cnn", classifier'),
        (
            "weights are written without what they need",
            "directory.save_preprocessing(encoded(self.preprocessing))",
            "directory.save_tensors(WEIGHTS, {}), directory.save_preprocessing(encoded(self.preprocessing))",
        ),
    ),
    *within(
        "trained",
        "batchkern/data/loading.py",
        ("tests/cli/test_evaluate.py",),
        ("the training data are tested on", "os.path.realpath(source) == os.path.realpath(trained.name)", "False"),
        (
            "what was trained on is held out",
            "table.select(held_out(table.labels)[1])",
            "table.select(held_out(table.labels)[0])",
        ),
        (
            "images of another size are squeezed",
            "trained.classes, shape[1:], center_crop, memory",
            "trained.classes, shape[1:], False, memory",
        ),
    ),
    *within(
        "trained",
        "batchkern/cli/_options.py",
        ("tests/cli/test_evaluate.py", "tests/cli/test_predict.py"),
        ("a file is replaced unasked", "    if not overwrite:\n", "    if False:\n"),
        ("a file of the user's is replaced", "    if not ours:\n", "    if False:\n"),
    ),
    *within(
        "trained",
        "batchkern/cli/_predict.py",
        ("tests/cli/test_predict.py",),
        ("each class has the probability of the first", "shown[best], *shown]", "shown[0], *shown]"),
        ("probabilities are of each class by itself", "logits.softmax(1).tolist()", "logits.sigmoid().tolist()"),
    ),
    *within(
        "trainer",
        "batchkern/plan.py",
        ("tests/test_plan.py",),
        ("the only batch is dropped where it is small", "if drop_last and len(batches) > 1 and", "if drop_last and"),
        (
            "a whole last batch is dropped",
            "len(batches[-1]) < size:\n        return batches[:-1]",
            "True:\n        return batches[:-1]",
        ),
    ),
    *within(
        "data",
        "batchkern/data/derived.py",
        ("tests/test_data.py",),
        ("the validation set is trained on too", "for chosen in (~held, held)", "for chosen in (held | ~held, held)"),
    ),
    *within(
        "comparisons",
        "batchkern/recipes/base.py",
        ("tests/test_recipes.py",),
        (
            "rows of two passive sets share a comparison",
            "(a.passive == b.passive or None in (a.passive, b.passive))",
            "True",
        ),
        ("a share of the training set is not taken", "rows = round(group[0].share * rows)", "rows = rows"),
    ),
    *within(
        "comparisons",
        "batchkern/recipes/reproduction.py",
        ("tests/test_recipes.py", "tests/test_reproduce.py"),
        (
            "gaps are not paired by seed",
            'setdefault(run["arm"], {})[run["seed"]] = gap',
            'setdefault(run["arm"], {})[len(by_arm.get(run["arm"], {}))] = gap',
        ),
        (
            "steps are looked at one epoch late",
            '["test_accuracy"][ends - 1]',
            '["test_accuracy"][min(ends, len(run["curve"]["test_accuracy"]) - 1)]',
        ),
        ("a user's file is replaced", "        earlier = None\n", "        return\n"),
        ("another reproduction is replaced", "(resume and earlier == name)", "resume"),
    ),
    *within(
        "distributed",
        "batchkern/strategies/stochastic_augmentation.py",
        RANKS,
        (
            "ranks with fewer rows weigh as much",
            "weight = share.real * share.world / share.rows",
            "weight = 1.0",
        ),
    ),
]
