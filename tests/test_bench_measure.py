"""What the benchmarks measure is what they say: errors, rounds in turn, floors, and the ways of a GPU's clock."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import devices, inputs, machine, measure, planned, registry, results_file
from bench.devices import Cpu, Cuda, Rates
from bench.registry import Case, Floor, Operation, Problem, Sweep, Variant, doubled, shape


class SmallCpu(Cpu):
    copied = 1 << 12
    width = 32
    least_seconds = 0.0


def doubling(**variants: Variant) -> Problem:
    return Problem((torch.randn(50),), variants, oracle=lambda x: 2 * x.square().sum())


def step(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.square().sum()


def operation(build=None) -> Operation:
    """Twice the sum of squares; ours takes 10 ms, its peer 30."""

    def default(case: Case, device: torch.device) -> Problem:
        def slow(seconds: float):
            def run(x: torch.Tensor) -> torch.Tensor:
                time.sleep(seconds * case.sizes["rows"])
                return step(x)

            return run

        ours, theirs = Variant(slow(0.01)), Variant(slow(0.03))
        return doubling(ours=ours, eager=theirs, wrong=Variant(lambda x: 1.1 * step(x)))

    case = Case(shape(rows=1), target_s=1e-3)
    return Operation(
        "trimmed_mean", build or default, lambda case, mode: Floor(8.0 * case.sizes["rows"]), {}, {}, quick=case
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes by sleeping alone, whatever else the machine does, and a microsecond with each look at it."""
    now = 0.0

    def passes(seconds: float) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(time, "sleep", passes)
    monkeypatch.setattr(time, "perf_counter", lambda: passes(1e-6))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_relative_to_float64() -> None:
    problem = doubling()
    found = measure.errors(problem, Variant(lambda x: (1 + 1e-4) * step(x)))
    assert found["result"] == pytest.approx(1e-4, rel=1e-2)
    assert found["gradient"] == pytest.approx(1e-4, rel=1e-2)
    assert measure.errors(problem, Variant(step), "forward")["gradient"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 1.01 * step(x),
        lambda x: step(x) * float("nan"),
        lambda x: step(x) + 1 * (x - x.detach()).sum(),
        lambda x: step(torch.cat([x[:-1], x[-1:].detach()])),
    ],
    ids=["result", "nan", "gradient", "a part of the gradient"],
)
def test_what_is_unequal_is_refused(wrong) -> None:
    with pytest.raises(measure.Unequal):
        measure.errors(doubling(), Variant(wrong))


def test_an_unequal_or_failing_peer_is_named_and_not_timed_and_an_unequal_kernel_ends_the_run() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape\nand more")

    op = operation(
        lambda case, device: doubling(ours=Variant(step), off=Variant(lambda x: 1.1 * step(x)), no=Variant(fails))
    )
    rows = measure.rows_of(op, op.quick, SmallCpu())
    timed = {row["variant"] for row in rows if row["time"]}
    unequal = {row["variant"]: row["unequal"] for row in rows if not row["time"]}
    assert timed == {"ours"}
    assert unequal == {
        "off": "its result is off by 0.1 of itself",
        "no": "it fails: RuntimeError: no kernel for this shape",
    }
    broken = operation(lambda case, device: doubling(ours=Variant(lambda x: 1.1 * step(x))))
    with pytest.raises(measure.Unequal):
        measure.rows_of(broken, broken.quick, SmallCpu())


# --- time, on a CPU ---------------------------------------------------------------------------------------------------


def test_rows_tell_time_ratio_and_floor(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (5, 5))
    device = SmallCpu()
    rates = Rates(device)
    rates.sample(torch.float32)
    op = operation()
    report = measure.finish(measure.rows_of(op, op.quick, device), [], rates)
    rows = {(row["variant"], row["mode"]): row for row in report["operations"] if row["time"]}
    assert set(rows) == {(name, mode) for name in ("ours", "eager") for mode in ("forward", "backward", "full")}
    for mode in ("forward", "full"):
        assert rows["ours", mode]["time"]["median"] == pytest.approx(0.01, rel=1e-3)
        assert rows["eager", mode]["ratio"]["median"] == pytest.approx(3, rel=1e-3)
    assert rows["eager", "backward"]["time"]["median"] < 0.01  # the forward pass was not timed with it
    ours = rows["ours", "full"]
    assert ours["floor"] == {"bytes": 8.0, "flops": 0.0, "seconds": 8.0 / report["rates"]["copy"]["median"]}
    assert ours["fraction"] == ours["floor"]["seconds"] / ours["time"]["median"]
    assert ours["target_s"] == 1e-3
    assert rows["ours", "forward"]["target_s"] is None
    assert ours["error"]["gradient"] < 1e-6
    assert ours["peak_bytes"] >= 200  # the gradient


def test_a_variant_is_timed_in_its_own_modes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))
    variants = {"ours": Variant(step), "ours inplace": Variant(step, modes=("backward", "full"))}
    op = operation(lambda case, device: doubling(**variants))
    rows = measure.rows_of(op, op.quick, SmallCpu())
    assert [row["mode"] for row in rows if row["variant"] == "ours inplace"] == ["backward", "full"]


def test_rates_count_what_is_read_and_written_and_both_flops_of_a_product() -> None:
    class InASecond(SmallCpu):
        def seconds(self, run) -> float:
            return 1.0

    assert set(InASecond().copy_rates()) == {2.0 * 4 * (1 << 12)}
    assert set(InASecond().matmul_rates(torch.bfloat16)) == {2.0 * 32**3}


def test_variants_take_turns() -> None:
    called: list[str] = []
    runs = {name: (lambda calls, name=name: lambda: called.append(name)) for name in "abc"}
    timed = measure.interleaved(SmallCpu(), runs, dict.fromkeys("abc", 1), 0.0, (20, 20))
    rounds = ["".join(called[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len(set(rounds)) > 2  # in changing order
    assert all(len(seconds) == 20 for seconds in timed.seconds.values())


def test_each_call_has_inputs_of_its_own_that_are_no_leaves() -> None:
    seen: list[torch.Tensor] = []

    def spoil(x: torch.Tensor) -> torch.Tensor:
        assert not x.is_leaf
        seen.append(x.detach().clone())
        y = step(x)
        x.data.zero_()
        return y

    problem = doubling()
    measure.prepared(problem, spoil, "forward", 3)()
    assert all(torch.equal(x, problem.inputs[0]) for x in seen)
    assert len(seen) == 3


def test_growth_has_a_figure_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "POINT_ROUNDS", (3, 3))
    device = SmallCpu()
    rates = Rates(device)
    rates.sample(torch.float32)
    variants = {"ours": Variant(step), "off": Variant(lambda x: 1.1 * step(x)), "compile": Variant(step)}
    op = operation(lambda case, _: Problem((torch.randn(1 << 8 * case.sizes["rows"]),), variants, step))
    sweep = Sweep(op.quick, "rows", (1, 2))
    (entry,) = measure.finish([], measure.growth_of(op, sweep, device, sweep.sizes), rates)["growth"]
    assert entry["sizes"] == [1, 2]
    small, large = entry["peak_bytes"]
    assert small < 1 << 12 < 1 << 17 < large
    bandwidth = rates.report()["copy"]["median"]
    expected = [8.0 * size / bandwidth / seconds for size, seconds in zip(entry["sizes"], entry["seconds"])]
    assert entry["fractions"] == pytest.approx(expected)


# --- time, on a GPU: the order of what is queued, with torch.cuda played by a list ------------------------------------


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the code of a GPU queues, in order."""
    queued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queued.append("event")

        def synchronize(self) -> None:
            queued.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # ms

    class Graph:
        def replay(self) -> None:
            queued.append("replay")

    @contextlib.contextmanager
    def captured(graph: Graph, stream: object) -> Iterator[None]:
        queued.append("capture")
        yield
        queued.append("captured")

    fakes = {
        "Event": Event,
        "_sleep": lambda cycles: queued.append("sleep"),
        "synchronize": lambda: None,
        "Stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": captured,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return queued


class SmallCuda(Cuda):
    copied = 1 << 12
    width = 32


def test_a_gpu_run_is_timed_between_events_behind_a_flush_and_a_sleep(queue: list[str]) -> None:
    device = SmallCuda("cpu")
    device.flushed = SimpleNamespace(zero_=lambda: queue.append("flush"))
    assert device.seconds(lambda: queue.append("call")) == 2e-3
    assert queue == ["flush", "sleep", "event", "call", "event", "wait"]
    assert device.peak_bytes(lambda: None) == 250


def test_short_calls_are_replayed_in_a_graph_whose_inputs_are_restored(
    queue: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (4, 4))
    problem = doubling()
    given: list[torch.Tensor] = []

    class Spoiling(SmallCuda):
        def seconds(self, run) -> float:
            assert all(torch.equal(x, problem.inputs[0]) for x in given[-2:])
            seconds = super().seconds(run)
            for x in given:
                x.data.zero_()  # as a variant may that writes its gradient there
            return seconds

    def remembered(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return step(x)

    timed = measure.timed_graphs(Spoiling("cpu"), problem, {"ours": remembered}, "full", 2)
    assert queue.count("capture") == 1
    assert queue.count("replay") == 4
    assert timed.seconds["ours"] == [1e-3] * 4  # two calls in 2 ms
    assert given[-1] is not given[-2]


def test_what_cannot_be_captured_has_no_graph(queue: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))

    def waits(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    timed = measure.timed_graphs(SmallCuda("cpu"), doubling(), {"ours": step, "eager": waits}, "full", 1)
    assert set(timed.seconds) == {"ours"}


def test_a_graph_of_a_forward_pass_has_no_backward_pass(queue: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a backward pass"))
    assert measure.timed_graphs(SmallCuda("cpu"), doubling(), {"ours": step}, "forward", 1).seconds["ours"]


def test_each_variant_is_queued_behind_its_own_host_time(clock: None, queue: list[str]) -> None:
    slept: dict[str, list[float]] = {"quick": [], "slow": []}

    class Remembering(SmallCuda):
        def seconds(self, run) -> float:
            slept[run()].append(self.host_s)
            return super().seconds(lambda: time.sleep(0.02 if run() == "slow" else 0.0))

    runs = {name: (lambda calls, name=name: lambda: name) for name in slept}
    measure.interleaved(Remembering("cpu"), runs, dict.fromkeys(runs, 1), 0.0, (6, 6))
    assert max(slept["quick"]) < 0.02 <= min(slept["slow"][1:])


def test_rows_of_a_gpu_have_graphs_launches_and_host_time(queue: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (3, 3))
    monkeypatch.setattr(SmallCuda, "launch_bound_s", 1.0)
    monkeypatch.setattr(SmallCuda, "launches", lambda self, run: run() and 7)
    op = operation(lambda case, device: doubling(ours=Variant(step), eager=Variant(step)))
    rows = measure.rows_of(op, op.quick, SmallCuda("cpu"))
    whole = [row for row in rows if row["mode"] == "full"]
    assert len(whole) == 2
    for row in whole:
        assert row["graph"]["median"] > 0
        assert row["host"] > 0
        assert row["launches"] == 7
        assert row["peak_bytes"] == 250


# --- what is written --------------------------------------------------------------------------------------------------


def test_floors_are_the_least_bytes_and_flops() -> None:
    ops = registry.operations()
    logits = Case(shape(rows=8, classes=10), torch.bfloat16, 0.2)
    assert ops["trimmed_cross_entropy"].floor(logits, "full") == Floor(2.2 * 160)
    assert ops["trimmed_cross_entropy"].floor(logits, "forward") == Floor(160)
    linear = ops["linear_trimmed_cross_entropy"]
    for keep, products in ((0.2, 1.6), (0.5, 2.5), (0.9, 3.2), (1.0, 3.0)):
        case = Case(shape(rows=8, width=4, words=10), torch.float32, keep)
        assert linear.floor(case, "full") == pytest.approx(Floor(0.0, products * 640))
    kl = Case(shape(batch=8, copies=3, classes=10))
    assert ops["soft_label_kl"].floor(kl, "full") == Floor(7 * 320)
    dense = Case(shape(batch=8, width=4, gaussian=2, dropout=1), kind="normalized")
    assert ops["augment_latent"].floor(dense, "full") == Floor(9 * 128, 2 * 2 * 8 * 16)
    assert ops["rank_batches"].floor(Case(shape(batches=100), keep=0.2), "forward") == Floor(400 + 160)
    known = {"copy": {"median": 2.0}, "matmul": {"float32": {"median": 4.0}}}
    assert devices.floor_seconds({"bytes": 10.0, "flops": 8.0}, "float32", known) == 7.0


def test_sweeps_reach_the_sizes_that_people_ask_for() -> None:
    largest: dict[str, int] = {}
    for op in registry.operations().values():
        for sweep in op.sweeps["cpu"]:
            largest[sweep.along] = max(largest.get(sweep.along, 0), sweep.sizes[-1])
            assert all(b == 2 * a for a, b in zip(sweep.sizes, sweep.sizes[1:])) or op.name == "rank_batches"
    assert largest["rows"] >= 65_536
    assert largest["classes"] == largest["words"] == 131_072
    assert largest["batches"] == 10_000_000
    assert doubled(3, 13) == (3, 6, 12)


def test_the_plan_for_a_gpu_is_that_of_the_cases() -> None:
    for gpu in planned.BANDWIDTH:
        assert planned.file(gpu).read_text() == results_file.as_text(planned.planned(gpu))


def test_what_is_measured_first_on_a_gpu_are_cases_and_targets_are_in_their_reach() -> None:
    """A floor at the datasheet's bandwidth, which no copy reaches, already takes longer than a wrong target."""
    rows = [(f"{op.name} {case}", op, case) for op in registry.operations().values() for case in op.cases["cuda"]]
    assert set(registry.FIRST_ON_A_GPU) <= {label for label, _, _ in rows}
    for _, op, case in rows:
        if case.target_s is not None:
            rates = {"copy": {"median": planned.BANDWIDTH["NVIDIA H100 80GB HBM3"]}, "matmul": planned.MATMUL}
            floor = op.floor(case, case.modes[-1])._asdict()
            assert devices.floor_seconds(floor, str(case.dtype)[6:], rates) < 0.5 * case.target_s
        assert case.target_fraction is None or 0 < case.target_fraction < 1


def test_inputs_look_like_those_of_a_trained_network() -> None:
    for rows, classes in ((4096, 10), (2048, 1000), (256, 32_000)):
        torch.manual_seed(0)
        logits, target = inputs.trained_logits(rows, classes, torch.device("cpu"))
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        assert 0.5 < (logits.argmax(1) == target).float().mean() < 0.9
        assert losses.median() < 0.5 < losses.mean() < 3
        assert losses.topk(rows // 5).values.sum() > 0.6 * losses.sum()


def test_figures_are_written_with_four_digits() -> None:
    report = {"machine": {"a": 1}, "operations": [{"time": {"median": 1.23456789e-5}, "rounds": 101, "kept": True}]}
    text = results_file.as_text(report)
    assert '{"time": {"median": 1.235e-05}, "rounds": 101, "kept": true}' in text


def test_a_machine_has_a_folder_of_its_own() -> None:
    cpu = {"gpu": None, "cpu": "Intel(R) Xeon(R) CPU @ 2.80GHz", "cores": 2}
    assert machine.folder(cpu) == "intel-xeon-2.80ghz-2cores"
    assert machine.folder({**cpu, "gpu": "NVIDIA H200"}) == "nvidia-h200"


@pytest.mark.skipif(machine.huge_pages() is None, reason="not Linux")
@pytest.mark.parametrize("disabled", [False, True])
def test_huge_pages_are_those_of_the_process(disabled: bool) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    set_thp_disable = 41  # of prctl
    code = f"import ctypes; ctypes.CDLL(None).prctl({set_thp_disable}, {int(disabled)}, 0, 0, 0)\n"
    code += "from bench import machine; print(machine.huge_pages())"
    said = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "never" if disabled else f"[{said.stdout.strip()}]" in setting
