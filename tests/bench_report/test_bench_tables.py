"""The tables, against tables written by hand."""

# ruff: noqa: E501 (a row of a table is one line)

from __future__ import annotations

import json

import pytest
import small_results as small
from small_results import SHAPE, row, sweep

pytest.importorskip("jinja2")

from batchkern.bench_report.markdown import quantity
from batchkern.bench_report.operations import detail, linear, operations, planned, summary
from batchkern.bench_report.results import load
from batchkern.bench_report.tables import BRACKETS, accuracy, confident, growth_table, language, training

OP = "trimmed_cross_entropy"
LINEAR = {"rows": 2048, "hidden": 512, "words": 32000}


@pytest.fixture
def results(tmp_path):
    return lambda **lists: load(small.write(tmp_path / "some.json", **lists))


def told(text: str) -> str:
    """A table as one writes it in a test: without the spaces at its left."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.8e-3, "s", "5.80 ms"),
        (1.24e-4, "s", "124 us"),
        (1.2e-6, "s", "1.20 us"),
        (3e-10, "s", "0.30 ns"),
        (9.996e-4, "s", "1.00 ms"),
        (0.099962, "s", "100 ms"),
        (9.999, "s", "10.0 s"),
        (81.84, "s", "81.8 s"),
        (1262, "s", "1,260 s"),
        (131e6, "B", "131 MB"),
        (999.9e6, "B", "1.00 GB"),
        (512, "B", "512 B"),
        (0, "B", "0 B"),
        (4.8e12, "B/s", "4.80 TB/s"),
        (989e12, "flop/s", "989 Tflop/s"),
        (None, "s", ""),
    ],
)
def test_quantities(value, unit, text):
    assert quantity(value, unit) == text


def test_operations_stand_beside_pytorch(results):
    rows = [
        row(OP, SHAPE, "ours", 0.1, mode="forward"),
        row(OP, SHAPE, "ours", 5.8e-3),
        row(OP, SHAPE, "ours inplace", 5.2e-3, 0.9, peak_bytes=0),
        row(OP, SHAPE, "eager", 18.1e-3, 3.15, peak_bytes=393e6),
        row(OP, SHAPE, "compile", 11.5e-3, 2.0),
        row(OP, SHAPE, "liger", 6e-3, 1.04, less="counts every row"),
        row(OP, SHAPE, "ours", 4.4e-3, dtype="bfloat16", keep=0.5),
        row("rank_batches", {"losses": 1000000}, "eager", 36.4e-3, 4.3, mode="forward", keep=None, kind="a fifth"),
        row("rank_batches", {"losses": 1000000}, "ours", 8.3e-3, mode="forward", keep=None, kind="a fifth"),
        row("linear_trimmed_cross_entropy", LINEAR, "ours", 1.0),
        row(OP, {"rows": 1}, "ours", None),
    ]
    assert operations(results(operations=rows)) == told(
        """
        | operation | shape | ours | eager | compiled | eager / ours | compiled / ours | of the floor | peak memory | eager's |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | `trimmed_cross_entropy` | rows 4,096, classes 1,000, float32, keep 0.2 | 5.80 ms | 18.1 ms | 11.5 ms | 3.1 | 2.0 | 17 % | 131 MB | 393 MB |
        | `trimmed_cross_entropy`, inplace | rows 4,096, classes 1,000, float32, keep 0.2 | 5.20 ms | 18.1 ms | 11.5 ms | 3.5 | 2.2 | 19 % | 0 B | 393 MB |
        | `trimmed_cross_entropy` | rows 4,096, classes 1,000, bfloat16, keep 0.5 | 4.40 ms |  |  |  |  | 23 % | 131 MB |  |
        | `rank_batches` | losses 1,000,000, float32, a fifth, forward | 8.30 ms | 36.4 ms |  | 4.3 |  | 12 % | 131 MB | 131 MB |
        """
    )


def test_the_largest_case_of_each_operation(results):
    def case(op, rows, keep, floor):
        pair = ("ours", 5e-3, 1.0), ("eager", 2e-2, 4.1)
        floors = {"bytes": 1, "flops": 0, "seconds": floor}
        return [row(op, {"rows": rows}, *variant, keep=keep, floor=floors) for variant in pair]

    rows = [
        *case(OP, 1, 0.2, 2e-3),
        *case(OP, 2, 0.2, 3e-3),
        *case(OP, 3, 1.0, 9e-3),
        *case("rank_batches", 4, None, 0.0),
    ]
    rows.append(row("no_peer", {"rows": 5}, "ours", 1.0))
    assert summary(results(operations=rows)) == told(
        """
        | operation | shape | ours | eager | eager / ours | of the floor |
        | --- | --- | --- | --- | --- | --- |
        | `trimmed_cross_entropy` | rows 2, float32, keep 0.2 | 5.00 ms | 20.0 ms | 4.1 | 20 % |
        | `rank_batches` | rows 4, float32 | 5.00 ms | 20.0 ms | 4.1 | 20 % |
        """
    )


def test_the_detail_of_an_operation():
    rows = [
        row(OP, SHAPE, "ours", 2e-3, error={"result": 1.23e-8, "gradient": None}, backend="kernel", launches=3),
        row(OP, SHAPE, "eager", 4e-3, 2.0, backend="torch", host=7e-6),
        row(OP, SHAPE, "liger", 4e-3, 2.0, less="counts every row", graph={"median": 3e-3}),
        row(OP, SHAPE, "quack", 5e-3, 2.5, less="counts every row"),
        row(OP, SHAPE, "F.cut", None, unequal="its loss is another", mode="forward"),
        row(OP, SHAPE, "cut", None, less="has no options", target_s=1e-3),
    ]
    assert detail(rows) == told(
        """
        | shape |  | mode | variant | backend | time | p20 - p80 | / ours | floor | of the floor | peak memory | launches | in a graph | host | error | target |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | full | ours | kernel | 2.00 ms | 1.80 ms - 2.40 ms |  | 1.00 ms | 50 % | 131 MB | 3 |  |  | 1.2e-08 |  |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | full | eager | torch | 4.00 ms | 3.60 ms - 4.80 ms | 2.0 (1.8 - 2.4) | 1.00 ms | 25 % | 131 MB |  |  | 7.00 us |  |  |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | full | liger (1) |  | 4.00 ms | 3.60 ms - 4.80 ms | 2.0 (1.8 - 2.4) | 1.00 ms | 25 % | 131 MB |  | 3.00 ms |  |  |  |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | full | quack (1) |  | 5.00 ms | 4.50 ms - 6.00 ms | 2.5 (2.2 - 3.0) | 1.00 ms | 20 % | 131 MB |  |  |  |  |  |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | forward | `F.cut` |  | not timed |  |  | 1.00 ms |  | 131 MB |  |  |  |  |  |
        | rows 4,096, classes 1,000 | float32, keep 0.2 | full | cut (2) |  | not yet measured |  |  | 1.00 ms |  | 131 MB |  |  |  |  | 1.00 ms |

        (1) computes less: counts every row; (2) computes less: has no options

        Not timed, since it does not compute the same:

        - `F.cut` at rows 4,096, classes 1,000, float32, keep 0.2, forward: its loss is another
        """
    )


def test_the_linear_one_by_keep(results):
    op = "linear_trimmed_cross_entropy"
    rows = [
        row(op, LINEAR, "ours", 1.26, keep=1.0, peak_bytes=136e6, fraction=0.9),
        row(op, LINEAR, "eager", 1.65, 1.31, keep=1.0, peak_bytes=786e6),
        row(op, LINEAR, "liger", 1.3, 1.03, keep=1.0, peak_bytes=78e6, less="counts every row"),
        row(op, LINEAR, "ours", 0.65, peak_bytes=85e6, fraction=0.8),
        row(op, LINEAR, "eager", 1.58, 2.43, peak_bytes=786e6),
        row(op, LINEAR, "cut", None, unequal="its loss is another"),
        row(OP, SHAPE, "ours", 1.0),
    ]
    assert linear(results(operations=rows)) == told(
        """
        rows 2,048, hidden 512, words 32,000, float32: time, times ours, peak memory

        | keep | ours | eager | liger (1) | ours, of the floor |
        | --- | --- | --- | --- | --- |
        | 1 | 1.26 s, 136 MB | 1.65 s, 1.3, 786 MB | 1.30 s, 1.0, 78.0 MB | 90 % |
        | 0.2 | 650 ms, 85.0 MB | 1.58 s, 2.4, 786 MB |  | 80 % |

        (1) computes less: counts every row

        Not timed, since it does not compute the same:

        - cut at rows 2,048, hidden 512, words 32,000, float32, keep 0.2: its loss is another
        """
    )


def test_what_a_gpu_is_to_reach(results):
    rows = [
        row(OP, {"rows": 65536, "classes": 1000}, "ours", None, target_fraction=0.8, floor={"seconds": 120e-6}),
        row("trimmed_mean", {"rows": 65536}, "ours", 11e-6, mode="forward", target_s=12e-6, floor=None, fraction=None),
        row("trimmed_mean", {"rows": 65536}, "ours inplace", 1e-6, 0.1, mode="forward"),
        row("trimmed_mean", {"rows": 65536}, "cut", 1e-6, 0.2, mode="forward", less="counts every row"),
        row("trimmed_mean", {"rows": 65536}, "eager", 22e-6, 2.0, mode="forward"),
        row("trimmed_mean", {"rows": 65536}, "compile", 17e-6, 1.5, mode="forward"),
        row("trimmed_mean", {"rows": 65536}, "liger", None, mode="forward", unequal="it fails"),
        row("trimmed_mean", {"rows": 9}, "ours", None, floor={"seconds": 0}),
        row("trimmed_mean", {"rows": 8}, "ours", 1e-5),
    ]
    assert planned(results(operations=rows)) == told(
        """
        | operation | shape | target | floor | measured | fastest peer / ours |
        | --- | --- | --- | --- | --- | --- |
        | `trimmed_cross_entropy` | rows 65,536, classes 1,000, float32, keep 0.2 | 80 % of the floor | 120 us | not yet measured |  |
        | `trimmed_mean` | rows 65,536, float32, keep 0.2, forward | 12.0 us |  | 11.0 us | compiled 1.5 |
        | `trimmed_mean` | rows 9, float32, keep 0.2 |  |  | not yet measured |  |
        """
    )


def test_growth(results):
    sizes = [1000 * 4**step for step in range(8)]
    lines = [
        sweep("ours", sizes, [1e-9 * size for size in sizes], [1e6] * 8),
        sweep("compile", sizes[:4], [1e-3, 2e-3, 4e-3, 8e-3], [4.0 * size for size in sizes[:4]]),
        sweep("ours", sizes[:2], [1, 2], [1, 2], fixed={}, kind="near", mode="forward"),
    ]
    expected = told(
        """
        | operation | along | at | time: ours | time: compiled | memory: ours | memory: compiled |
        | --- | --- | --- | --- | --- | --- | --- |
        | `trimmed_mean` | rows, 1,000 to 16,384,000 | classes 10, float32 | 1.00 | (0.50) | 0.00 | (1.00) |
        | `trimmed_mean` | rows, 1,000 to 4,000 | float32, near, forward |  |  |  |  |
        """
    )
    assert growth_table(results(growth=lines)) == f"{expected}\n\n{BRACKETS}"


def test_training(results):
    trainings = [
        {
            "strategy": "trimming(backward=compact)",
            "model": "resnet8",
            "data": "photo-patches",
            "images": 1640,
            "batch_size": 64,
            "seconds_per_epoch": 1.2,
            "samples_per_s": 1530.4,
            "bare_seconds_per_epoch": 1.1,
            "ratio": {"median": 1.034, "p20": 1.01, "p80": 1.05},
            "target": 1.05,
        },
        {"strategy": "baseline"},
    ]
    assert training(results(training=trainings)) == told(
        """
        | strategy | model | data | an epoch, bare | an epoch, trainer | samples/s | trainer / bare | p20 - p80 | target |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | `trimming(backward=compact)` | resnet8 | photo-patches, 1,640 images, batches of 64 | 1.10 s | 1.20 s | 1,530 | 1.03 | 1.01 - 1.05 | at most 1.05 |
        | `baseline` |  |  |  |  |  |  |  |  |
        """
    )


def test_accuracy(results):
    errors = {(1e-2, 1000, "ours"): 1.3e-8, (1e-1, 10, "F.kl_div"): 1.4e-7, (1e-1, 10, "ours"): 1.7e-8}
    errors |= {(1e-2, 10, "ours"): 4.2e-9}
    rows = [
        {"op": "soft_label_kl", "perturbation": p, "classes": c, "variant": v, "error": error}
        for (p, c, v), error in errors.items()
    ]
    assert accuracy(results(accuracy=rows)) == told(
        """
        `soft_label_kl`, relative error of the mean:

        | perturbation | `F.kl_div`, 10 classes | ours, 10 classes | ours, 1,000 classes |
        | --- | --- | --- | --- |
        | 1e-1 | 1.4e-07 | 1.7e-08 |  |
        | 1e-2 |  | 4.2e-09 | 1.3e-08 |
        """
    )


def test_confident_tokens(results):
    row = {"op": "linear_cross_entropy", "probability": 0.999, "exact": -1.001e-3, "ours": -9.995e-4, "eager": 0.0}
    assert confident(results(confident=[row])) == told(
        """
        `linear_cross_entropy`, gradient by the logit of a target in bfloat16:

        | probability of the target | exact | ours | eager |
        | --- | --- | --- | --- |
        | 0.99900 | -1.0010e-03 | -9.9950e-04 | 0.0000e+00 |
        """
    )


def test_selections_of_tokens(tmp_path):
    def loss(mean, half=0.0104):
        return {"mean": mean, "half_width": half, "values": []}

    def less(mean, p, half=0.2):
        return {"mean": mean, "half_width": half, "p": 0.5, "p_corrected": p, "seeds": 5}

    def budgets(*values, names=("updates", "cost", "seconds")):
        return dict(zip(names, values, strict=False))

    plain = {"noise": 0.5, "arm": "all", "flops": 4.3e9, "seconds": 0.0421, "difference": {}}
    plain |= {"updates": budgets(600, 600, 600), "loss": budgets(*[loss(5.0784)] * 3)}
    other = {"noise": 0.5, "arm": "excess 0.02", "flops": 5.1e9, "seconds": 0.05}
    other |= {"updates": budgets(600, 1250, 248), "loss": budgets(loss(4.995), loss(5.4), loss(5.45))}
    other |= {"difference": budgets(less(-0.0834, 0.0004), less(0.32, 0.0123), less(0.37, 1.0))}
    # Of two seeds: each point of one has its fellow in the other arm's, and 248 has none.
    plain["curve"] = {"updates": [60, 120, 180, 240, 600], "loss": [[9, 8.0, 7, 6.0, 5], [9, 8.5, 7, 6.5, 5]]}
    other["curve"] = {
        "updates": [60, 120, 180, 240, 248, 600],
        "loss": [[9, 7.9, 7, 6.2, 6, 4.9], [9, 8.3, 7, 6.6, 6, 5]],
    }
    single = {
        "noise": 0,
        "arm": "all",
        "curve": {"updates": [600], "loss": [[4.683]]},
        "flops": 4.3e9,
        "seconds": 0.0421,
        "difference": {},
    }
    single |= {"updates": budgets(600, 600, 600), "loss": budgets(*[loss(4.683, None)] * 3)}
    part = {"noise": 0.5, "share": 0.005, "tokens": 15_872, "updates": 300, "loss": loss(5.311)}
    part |= {"best": {"updates": 525, "loss": loss(5.062)}}
    names = ("updates", "cost", "seconds", "best")
    part["difference"] = budgets(
        less(-0.067, 0.02), less(0.34, 0.5, None), less(0.39, 0.5), less(-0.06, 0.1), names=names
    )
    settings = {"keep": 0.6, "seeds": 5, "reference_updates": 300, "updates": 600, "batch": 8, "length": 64}
    content = {"kind": "batchkern token selection", "settings": settings, "arms": [plain, other, single]}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content | {"references": [part]}))
    assert language(load(path)) == told(
        """
        **Training text with half of the tokens overwritten in 50 % of the sequences**, keep 0.6, 5 seeds. Loss on held-out text, in brackets the updates made; its difference to that of `all`, in brackets p:

        | arm | operations of an update | time of an update | equal updates | - `all` | equal cost | - `all` | equal seconds | - `all` |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | `all` | 4.30 Gflop | 42.1 ms | 5.078 ± 0.010 (600) |  | 5.078 ± 0.010 (600) |  | 5.078 ± 0.010 (600) |  |
        | `excess 0.02` | 5.10 Gflop | 50.0 ms | 4.995 ± 0.010 (600) | -0.083 ± 0.200 (<0.001) | 5.400 ± 0.010 (1,250) | +0.320 ± 0.200 (0.012) | 5.450 ± 0.010 (248) | +0.370 ± 0.200 (1.000) |

        Mean difference to `all` after fewer updates of the same trainings:

        | arm | 120 | 240 | 600 |
        | --- | --- | --- | --- |
        | `excess 0.02` | -0.150 | +0.150 | -0.050 |

        Loss of `excess` less that of `clean` of the same share (below 0: the selection is worth more than the clean part that it needs). The reference made 300 updates; the best point of `clean` is the one of lowest loss on the held-out text itself:

        | clean part (tokens, times read) | loss of the reference | best point of `clean` | equal updates | equal cost | equal seconds | equal updates, - best point |
        | --- | --- | --- | --- | --- | --- | --- |
        | 0.5 % (15,872, 19.4) | 5.311 ± 0.010 | 5.062 ± 0.010 (525) | -0.067 ± 0.200 (0.020) | +0.340 (0.500) | +0.390 ± 0.200 (0.500) | -0.060 ± 0.200 (0.100) |

        **Training text with nothing overwritten**, keep 0.6, 5 seeds. Loss on held-out text, in brackets the updates made; its difference to that of `all`, in brackets p:

        | arm | operations of an update | time of an update | equal updates | equal cost | equal seconds |
        | --- | --- | --- | --- | --- | --- |
        | `all` | 4.30 Gflop | 42.1 ms | 4.683 (600) | 4.683 (600) | 4.683 (600) |
        """
    )


def test_a_file_without_rows_gives_no_table(results):
    empty = results(operations=[], growth=None)
    assert not any(
        kind(empty) for kind in (operations, linear, planned, growth_table, training, accuracy, confident, language)
    )


def test_batches_are_ranked_by_a_fraction(results):
    ranked = row("rank_batches", {"batches": 400}, "ours", 1e-5, mode="forward")
    assert "| batches 400, float32, fraction 0.2, forward |" in operations(results(operations=[ranked]))
