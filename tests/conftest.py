"""What every test shares: repeatable random numbers, Hypothesis without a clock, threads that do not spin."""

from __future__ import annotations

import os
from typing import Any

# Read when torch loads OpenMP. On a shared machine threads that wait by spinning make small operations 30x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kernel_backend
import pytest
import torch
from hypothesis import HealthCheck, settings

# A shared machine makes deadlines flaky. In CI a failure must not depend on which examples were drawn.
settings.register_profile(
    "batchkern", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("batchkern")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


TOGETHER = ("test_resume.py", "test_running.py", "test_distributed.py")
"""Files whose tests one worker of xdist runs, since what they look at takes long to make. They come first."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Together(config, log) if config.getvalue("dist") == "load" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """An illegal access leaves a process whose every call of the GPU fails. A worker of xdist then ends, once it has
    told, and a fresh one takes the next test."""
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _lost.append(report.nodeid)


_lost: list[str] = []
"""Tests that took the GPU's context with them."""


def pytest_runtest_logfinish() -> None:
    if _lost:
        os._exit(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=["host", "interpreter", "cuda"],
        help="run tests/ops through the GPU kernels: see kernel_backend.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--kernels"):
        kernel_backend.start(config.getoption("--kernels"))
    if config.getoption("--kernels") == "host":  # a fiber for each thread takes its time
        settings.register_profile("host", settings.get_profile("batchkern"), max_examples=40)
        settings.load_profile("host")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cpu")])
        items[:] = [item for item in items if not item.get_closest_marker("cpu")]
    if config.getoption("--kernels") == "interpreter":
        wrong = pytest.mark.skip(reason="Triton's interpreter computes bfloat16 wrongly")
        for item in items:
            if hasattr(item, "callspec") and torch.bfloat16 in item.callspec.params.values():
                item.add_marker(wrong)
