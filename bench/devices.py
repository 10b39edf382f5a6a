"""How time, memory and rates are measured on a CPU and on a CUDA GPU. ``run`` is always a call without arguments whose
result is freed after the clock has stopped, because in training other code frees the result of a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.machine import QUICK

Run = Callable[[], Any]
SAMPLES = 3
"""The number of samples of each rate before each case: together they cover the whole session."""


class Cpu:
    least_seconds = 2e-3
    """Shorter calls are repeated until they take this long."""
    most_calls = 1000
    seconds_a_group = 0.05 if QUICK else 3.0
    """The time for the rounds of one mode."""
    copied = 1 << (20 if QUICK else 26)
    """The number of elements that are copied: much larger than a cache."""
    width = 256 if QUICK else 1024
    """The size of the square matrices that are multiplied."""
    launch_bound_s = 0.0
    """Calls that take less are also measured in a CUDA graph."""
    host_s = 0.0
    """The time that the host took to issue the latest run."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.source, self.target = (torch.zeros(self.copied, device=device).fill_(1) for _ in range(2))

    def seconds(self, run: Run) -> float:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        del result
        return seconds

    def calls_a_round(self, once: float) -> int:
        """The number of calls in a round if a call takes ``once`` seconds."""
        return max(1, min(self.most_calls, math.ceil(self.least_seconds / max(once, 1e-7))))

    def peak_bytes(self, run: Run) -> int:
        """The peak of the memory that a run allocates, in bytes, from every event of the CPU allocator."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            result = run()
        del result
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def launches(self, run: Run) -> int | None:
        """None: a CPU has no launches."""
        return None

    def release(self) -> None:
        """Frees the memory that the allocator caches from the previous case."""

    def copy_rates(self) -> list[float]:
        """Bytes read and written per second, several samples."""
        bytes_moved = 2 * self.source.nbytes
        return [bytes_moved / self.seconds(lambda: self.target.copy_(self.source)) for _ in range(SAMPLES)]

    def matmul_rates(self, dtype: torch.dtype) -> list[float]:
        """Flops per second of a square product, several samples."""
        a, b = (torch.randn(self.width, self.width, device=self.device).to(dtype) for _ in range(2))
        self.seconds(lambda: a @ b)
        return [2 * self.width**3 / self.seconds(lambda: a @ b) for _ in range(SAMPLES)]


class Cuda(Cpu):
    """Measures time by events on the device. The L2 cache is flushed before each run, and each call of a run has its
    own inputs. The device sleeps until the calls are queued, so that short kernels do not wait for the host."""

    most_calls = 100
    seconds_a_group = 0.05 if QUICK else 0.5
    queued_host_s = 4e-3
    """The longest that the host may take to queue the calls of a round."""
    launch_bound_s = 50e-6
    cycles_per_second = 2e9
    """An upper bound of the clock rate: a longer sleep does no harm."""
    copied = 1 << (24 if QUICK else 29)
    width = 1024 if QUICK else 8192

    def __init__(self, device: torch.device | str = "cuda") -> None:
        super().__init__(device)
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flushed = torch.empty(4 * l2, dtype=torch.int8, device=self.device)

    def seconds(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(int(self.cycles_per_second * min(2 * self.host_s + 20e-6, 0.05)))
        start.record()
        begun = time.perf_counter()
        result = run()
        self.host_s = time.perf_counter() - begun
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def calls_a_round(self, once: float) -> int:
        """Also few enough that the queue, of about 1,000 launches, never becomes full."""
        return max(1, min(super().calls_a_round(once), int(self.queued_host_s / self.host_s)))

    def graph_of(self, make: Callable[[], Run]) -> Run:
        """Captures the run that ``make`` prepares, and returns a function that replays it. Everything happens on one
        stream, and the previous stream is restored even if the capture fails."""
        torch.cuda.synchronize()  # the new stream would not wait for earlier work
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run = make()
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs = run()
        torch.cuda.synchronize()

        def replay() -> None:
            graph.replay()

        replay.outputs = outputs  # type: ignore[attr-defined]  # keeps alive the memory of the graph
        return replay

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    def launches(self, run: Run) -> int | None:
        """The number of kernels, copies and fills that the device ran."""
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            result = run()
            torch.cuda.synchronize()
        del result
        events = recorded.profiler.kineto_results.events()
        return sum(e.device_type() == DeviceType.CUDA and not e.is_user_annotation() for e in events)

    def release(self) -> None:
        torch.cuda.empty_cache()


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    if len(values) < 2:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": p20, "p80": p80}


class Rates:
    """Copy bandwidth and matmul rates of the device, sampled throughout the session."""

    def __init__(self, device: Cpu) -> None:
        self.device = device
        self.copies: list[float] = []
        self.products: dict[torch.dtype, list[float]] = {}

    def sample(self, dtype: torch.dtype) -> None:
        self.copies += self.device.copy_rates()
        self.products.setdefault(dtype, []).extend(self.device.matmul_rates(dtype))

    def report(self) -> dict[str, Any]:
        products = {str(dtype)[6:]: quantiles(rates) for dtype, rates in self.products.items()}
        return {"copy": quantiles(self.copies) if self.copies else None, "matmul": products}


def floor_seconds(floor: dict[str, float], dtype: str, rates: dict[str, Any]) -> float:
    """The time for the bytes at the copy bandwidth plus that for the flops at the matmul rate of the type."""
    products = floor["flops"] / rates["matmul"][dtype]["median"] if floor["flops"] else 0.0
    return floor["bytes"] / rates["copy"]["median"] + products


def cloned(inputs: tuple[Tensor, ...], differentiable: int) -> tuple[Tensor, ...]:
    """Copies of the inputs. Those with a gradient are not leaves, like logits in training: ``inplace_backward`` needs
    that, and their gradient is returned in fresh memory instead of being accumulated."""
    return tuple(
        x.detach().requires_grad_().clone() if place < differentiable else x.clone() for place, x in enumerate(inputs)
    )
