"""Each adapter of bench/peers.py computes what it claims, and the check that stands before each timing sees one that
does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure, peers, registry
from bench.registry import Case, Problem, Variant

OPERATIONS = registry.operations()
ADAPTERS = [(op, name) for op, adapters in peers.PEERS.items() for name in adapters]


def problem_of(op: str, case: Case, device: str) -> Problem:
    torch.manual_seed(1)
    return OPERATIONS[op].build(case, torch.device(device))


def skip_where_missing(op: str, name: str, device: str) -> None:
    if reason := peers.missing(peers.PEERS[op][name], device):
        pytest.skip(f"{name}: {reason}")


def keeps(op: str) -> list[float | None]:
    return [1.0, 0.3] if OPERATIONS[op].quick.keep is not None and op != "rank_batches" else [OPERATIONS[op].quick.keep]


def kinds(op: str) -> list[str]:
    return sorted({case.kind for case in OPERATIONS[op].cases["cpu"]})


GRID = [
    (op, name, keep, kind)
    for op, name in ADAPTERS
    for keep in keeps(op)
    for kind in kinds(op)
    if not (kind == "probabilities" and name in peers.OF_ROWS)
]


@pytest.mark.parametrize(("op", "name", "keep", "kind"), GRID)
def test_an_adapter_computes_what_it_claims(op: str, name: str, keep: float | None, kind: str) -> None:
    skip_where_missing(op, name, "cpu")
    problem = problem_of(op, replace(OPERATIONS[op].quick, keep=keep, kind=kind), "cpu")
    assert (problem.variants[name].less == "") == (peers.PEERS[op][name].trims or keep == 1)
    found = measure.errors(problem, problem.variants[name])
    if problem.variants[name].wrong is None:
        assert found["result"] <= problem.limit
        assert (found["gradient"] is None) == (problem.differentiable == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("op", "name", "keep", "kind"), GRID)
def test_an_adapter_computes_what_it_claims_on_a_gpu(op: str, name: str, keep: float | None, kind: str) -> None:
    skip_where_missing(op, name, "cuda")
    case = replace(OPERATIONS[op].quick, keep=keep, kind=kind, dtype=OPERATIONS[op].cases["cuda"][0].dtype)
    if op == "linear_trimmed_cross_entropy":
        case = case.along("rows", 256).along("width", 256).along("words", 1024)  # what matmul kernels take
    problem = problem_of(op, case, "cuda")
    measure.errors(problem, problem.variants[name])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch behind the signatures of the libraries that run on a GPU alone, so that what the adapters add is
    tested without one."""

    class Loss(torch.nn.Module):
        def __init__(self, reduction: str = "mean", log_target: bool = False) -> None:
            super().__init__()
            self.options = {"reduction": reduction, **({"log_target": True} if log_target else {})}

    class CrossEntropy(Loss):
        def forward(self, _input: Tensor, target: Tensor) -> Tensor:
            loss = F.cross_entropy(_input, target, **self.options)
            gradient = (_input.detach().softmax(1) - F.one_hot(target, _input.shape[1])) / len(_input)
            _input.data.copy_(gradient)  # Liger's writes its gradient there in the forward pass
            return loss

    class LinearCrossEntropy(Loss):
        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(_input @ lin_weight.T, target, **self.options)

    class Divergence(Loss):
        def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
            return F.kl_div(y_pred, y_true, **self.options)

    def cut(e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(e @ c.T, targets, reduction=reduction)

    def quack(x: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(x, target, reduction=reduction)

    def quack_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, target)

    modules = {
        "liger_kernel.transformers": {
            "LigerCrossEntropyLoss": CrossEntropy,
            "LigerFusedLinearCrossEntropyLoss": LinearCrossEntropy,
            "LigerKLDIVLoss": Divergence,
        },
        "cut_cross_entropy": {"linear_cross_entropy": cut},
        "quack.cross_entropy": {"cross_entropy": quack},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack_linear},
    }
    for name, content in modules.items():
        for made in {name, name.partition(".")[0]}:
            monkeypatch.setitem(sys.modules, made, ModuleType(made))
        vars(sys.modules[name]).update(content)
    monkeypatch.setattr(peers, "missing", lambda peer, device: "" if peer.gpu or not peer.needs else "not here")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("op", "name", "keep", "kind"), [row for row in GRID if peers.PEERS[row[0]][row[1]].gpu], ids=str
)
def test_what_an_adapter_adds_is_right(op: str, name: str, keep: float | None, kind: str) -> None:
    problem = problem_of(op, replace(OPERATIONS[op].quick, keep=keep, kind=kind), "cpu")
    # This stand-in writes where autograd still needs to read.
    mode = "forward" if (op, name) == ("trimmed_cross_entropy", "liger") else "full"
    found = measure.errors(problem, problem.variants[name], mode)
    assert found["result"] < 1e-4


@pytest.mark.parametrize("op", OPERATIONS)
def test_ours_is_right_on_the_same_inputs(op: str) -> None:
    for kind in kinds(op):
        problem = problem_of(op, replace(OPERATIONS[op].quick, kind=kind), "cpu")
        for name, variant in problem.variants.items():
            if name.startswith("ours"):
                assert max(filter(None, measure.errors(problem, variant).values()), default=0) < 1e-5


def wrong_steps(op: str, problem: Problem) -> dict[str, Variant]:
    """Mistakes that an adapter could make."""
    eager = problem.variants["eager"]
    step = eager.step
    if op == "rank_batches":
        return {"another order": replace(eager, step=lambda x: step(x).roll(1))}
    mistakes = {
        "another scale": replace(eager, step=lambda *x: 1.01 * step(*x)),
        "no gradient of a third of the rows": replace(eager, step=lambda x, *rest: step(without(x), *rest)),
    }
    if op == "augment_latent":
        batch, _, gaussian, dropout = OPERATIONS[op].quick.sizes.values()

        def noisier(x: Tensor) -> Tensor:
            raw, noisy, masked = step(x).split([batch, gaussian * batch, dropout * batch])
            return torch.cat([raw, noisy + 0.3 * torch.randn_like(noisy), masked])

        def fuller(x: Tensor) -> Tensor:
            raw, noisy, masked = step(x).split([batch, gaussian * batch, dropout * batch])
            return torch.cat([raw, noisy, torch.where(torch.rand_like(masked) < 0.3, x.repeat(dropout, 1), masked)])

        return mistakes | {
            "more noise": replace(eager, step=noisier),
            "fewer dropped": replace(eager, step=fuller),
        }
    return mistakes


def without(x: Tensor) -> Tensor:
    """x, a third of whose rows get no gradient."""
    fixed = torch.arange(len(x)) % 3 == 0
    return torch.where(fixed.view(-1, *[1] * (x.dim() - 1)), x.detach(), x)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_wrong_peer_is_found_out(op: str) -> None:
    problem = problem_of(op, OPERATIONS[op].quick, "cpu")
    for mistake, variant in wrong_steps(op, problem).items():
        with pytest.raises(measure.Unequal):
            print(mistake, measure.errors(problem, variant))


def test_a_peer_that_counts_every_row_is_held_to_that() -> None:
    """As quack's is, which runs on a GPU alone."""
    op = "linear_trimmed_cross_entropy"
    problem = problem_of(op, OPERATIONS[op].quick, "cpu")
    untrimmed = problem_of(op, replace(OPERATIONS[op].quick, keep=1.0), "cpu").variants["eager"].step
    with pytest.raises(measure.Unequal):
        measure.errors(problem, Variant(untrimmed, less="counts every row"))


def test_what_a_missing_peer_lacks_is_named() -> None:
    assert peers.missing(peers.Peer(peers.eager_mean, "no_such_library"), "cpu") == "no_such_library is not installed"
    assert peers.missing(peers.Peer(peers.eager_mean, gpu=True), "cpu") == "runs on a GPU alone"
    assert peers.missing(peers.Peer(peers.eager_mean, "torch.nn.functional.no_such_function"), "cpu") == (
        f"torch {torch.__version__} does not have it"
    )
