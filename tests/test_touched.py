"""Which tests make check runs for a change."""

from __future__ import annotations

import pytest
import touched


@pytest.mark.parametrize(
    ("path", "tests"),
    [
        ("batchkern/ops/trimmed_mean.py", {"tests/ops/test_trimmed_mean.py", "tests/ops/test_trimmed_mean_kernel.py"}),
        ("batchkern/compare/statistics.py", {"tests/compare/test_statistics.py"}),  # it imports it
        ("batchkern/data/feed.py", {"tests/test_data.py"}),  # that of its folder
        (
            "batchkern/learner.py",
            {"tests/test_trainer.py", "tests/strategies/test_trimming.py"},
        ),  # they find its faults
        ("csrc/cpu/soft_label_kl.inl", {"tests/ops/test_soft_label_kl_kernel.py", "tests/test_kernels.py"}),
        ("tests/ranks.py", {"tests/test_distributed.py"}),
        ("tests/test_plan.py", {"tests/test_plan.py"}),
        ("docs/compare.md", {"tests/test_docs.py"}),
        ("LICENSE", set()),
    ],
)
def test_the_tests_of_a_file(path: str, tests: set[str]) -> None:
    (found,) = touched.touched([path]).values()
    assert tests <= set(found)
    assert len(found) <= 4


def test_what_everybody_imports_is_nobodys() -> None:
    assert touched.touched(["batchkern/__init__.py"]) == {"batchkern/__init__.py": []}


def test_other_names_are_those_of_tests_and_of_files() -> None:
    stems = {test.stem for test in touched.TESTS}
    for begin, names in touched.OTHERS.items():
        assert stems.issuperset(names)
        assert list(touched.ROOT.glob(f"{begin}*")), begin
