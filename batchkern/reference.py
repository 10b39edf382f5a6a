"""Every operation in plain PyTorch: the specification, the tests' oracle, the fallback for a device without a kernel.

Nothing here loops over rows, synchronises with the host, or has a data-dependent shape, so all of it runs on any
device, under CUDA graphs and under ``torch.compile``. Arguments are assumed to be valid: ``batchkern.ops`` checks them.
Losses, log-sum-exps, ranks and sums are float32 for float32, bfloat16 and float16 inputs, and float64 for float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from batchkern.basis import Basis, apply_basis


def within_transform() -> bool:
    """Whether this runs within a transform of ``torch.func`` (also in a compiled function), forward-mode
    differentiation or ``torch.jit.trace``, which support only PyTorch's own functions."""
    # torch.jit.is_tracing, which the compiler supports, costs 0.3 us more.
    return torch._C._are_functorch_transforms_active() or (
        not is_dynamo_compiling() and (torch._C._is_tracing() or forward_ad._current_level >= 0)
    )


# --- selection -------------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """``x`` in the type in which losses are computed: float64 stays, narrower types become float32."""
    return x if x.dtype == torch.float64 else x.float()


def kept_count(n: Tensor, keep: float | Tensor) -> Tensor:
    """k = clamp(round_half_even(keep * n), 1, n) in float64; 0-dim. Equals ``max(round(keep * n), 1)`` for n >= 1."""
    return torch.minimum(torch.round(n.double() * keep).clamp(min=1), n.double())


def canonical(x: Tensor) -> Tensor:
    """``x`` with -0.0 replaced by 0.0, and every NaN by the same NaN, whatever its sign bit."""
    return torch.where(x == 0, 0.0, torch.where(x.isnan(), math.nan, x))


def in_order(scores: Tensor, valid: Tensor | None = None, *, lowest: bool = False) -> Tensor:
    """Indices ``(..., B)`` that sort ``scores (..., B)`` along the last dimension: highest first, NaN above all, equal
    values by lower index. With ``lowest``: lowest first, NaN last.

    Rows where ``valid (..., B)`` is False come last, after a valid -inf or NaN.
    """
    order = torch.sort(canonical(scores), descending=not lowest, stable=True).indices
    if valid is not None:
        order = order.gather(-1, torch.sort((~valid.gather(-1, order)).byte(), stable=True).indices)
    return order


def select(
    scores: Tensor,
    valid: Tensor,
    keep: float | Tensor,
    *,
    order: str = "highest",
    skip: float = 0.0,
    above: float | None = None,
    within: str = "all",
) -> tuple[Tensor, Tensor]:
    """``kept`` bool of the shape of ``scores``, and the number of kept rows as a 0-dim float64 tensor.

    Of the n valid rows in order, rows first = min(round(skip * n), n - k) to first + k are kept, and also those that
    score above ``above``, except the first ``first``. If ``within`` is ``"sample"``, this is done for each sample.
    """
    shape = (len(scores), math.prod(scores.shape[1:])) if within == "sample" else (1, scores.numel())
    score_rows, valid_rows = scores.reshape(shape), valid.reshape(shape)
    n = valid_rows.sum(-1, keepdim=True)
    k = kept_count(n, keep)
    first = torch.minimum(torch.round(n.double() * skip), n - k)
    places = in_order(score_rows, valid_rows, lowest=order == "lowest")
    rank = torch.zeros_like(places).scatter(-1, places, torch.arange(shape[1], device=scores.device).expand(shape))
    kept = (rank >= first) & (rank < first + k)
    if above is not None:
        kept |= (rank >= first) & valid_rows & ((score_rows > above) | score_rows.isnan())
    return kept.view(scores.shape), kept.sum().double()


def select_and_normalize(
    scores: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    keep: float | Tensor,
    group: dist.ProcessGroup | None,
    **band: Any,
) -> tuple[Tensor, Tensor]:
    """The kept rows of this rank and the divisor of their summed loss. ``band``: the other arguments of `select`.

    The divisor is the number of kept rows, or with ``weight`` their summed weight. With ``group``, the rows are ranked
    over the batches of all ranks (ties: lower rank, then lower index) and the divisor is that of the concatenated batch
    divided by the world size, so that averaging gradients over ranks, as DDP does, gives the gradient of the
    concatenated batch.
    """
    if group is None or band.get("within") == "sample":
        kept, count = select(scores, valid, keep, **band)
        divisor = count if weight is None else torch.where(kept, weight, 0).sum()
        return kept, divisor if group is None else share_of_sum(divisor, group)
    whole = gather(scores.reshape(-1), valid.reshape(-1), None if weight is None else weight.reshape(-1), group)
    kept, divisor = whole.share(select(whole.losses, whole.valid, keep, **band)[0])
    return kept.view(scores.shape), divisor


def select_rows(
    scores: Tensor,
    keep: float | Tensor,
    *,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **band: Any,
) -> Tensor:
    """The kept rows, as a mask of the shape of ``scores``. ``band``: the other arguments of `select`."""
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if band.get("within") == "sample":
        group = None  # samples are independent of other ranks
    return select_and_normalize(wide(scores), valid, None, keep, group, **band)[0]


def share_of_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``x ()`` over the ranks of a group, divided by their number."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@dataclass(frozen=True)
class Gathered:
    """The concatenated batch of a group."""

    losses: Tensor
    valid: Tensor
    weight: Tensor
    rows: list[int]
    """The number of rows of each rank."""
    rank: int

    def share(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows of ``kept``, and the normalizer of the concatenated batch divided by the world size."""
        start = sum(self.rows[: self.rank])
        normalizer = torch.where(kept, self.weight, 0).sum() / len(self.rows)
        return kept[start : start + self.rows[self.rank]], normalizer


def within_graph(x: Tensor) -> bool:
    """Whether a graph is being traced or captured, during which values cannot be read by the host."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def lengths(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """The first dimension of each rank's ``x``; the host synchronises for it."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.full_like(counts[0], len(x)), group=group)
    sizes: list[int] = torch.cat(counts).tolist()
    return sizes


def gather(losses: Tensor, valid: Tensor, weight: Tensor | None, group: dist.ProcessGroup) -> Gathered:
    """Losses, valid and weight ``(B,)`` of all ranks, whose B may differ; in a graph they are assumed to be equal."""
    world = dist.get_world_size(group)
    rows = [len(losses)] * world
    if not within_graph(losses):
        rows = lengths(losses, group)
    mine = losses.new_zeros(3, max(rows))
    ones = torch.ones_like(losses) if weight is None else weight
    mine[:, : len(losses)] = torch.stack([losses, valid.to(losses.dtype), ones.to(losses.dtype)])
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    whole = torch.cat([part[:, :count] for part, count in zip(parts, rows, strict=True)], dim=1)
    return Gathered(whole[0], whole[1].bool(), whole[2], rows, dist.get_rank(group))


# --- losses ----------------------------------------------------------------------------------------------------


def trimmed_mean(
    losses: Tensor,
    keep: float | Tensor,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **band: Any,
) -> Tensor:
    """The mean loss of the selected rows. ``band``: the other arguments of `select`."""
    losses = wide(losses)
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    ranked = losses if score is None else wide(score)
    weight = None if weight is None else weight.detach().to(losses.dtype)
    kept, normalizer = select_and_normalize(ranked.detach(), valid, weight, keep, group, **band)
    total = torch.where(kept, losses, 0)
    if weight is not None:
        total = total * torch.where(kept, weight, 0)
    return total.sum() / normalizer.to(losses.dtype)


class Rows(NamedTuple):
    """The results of a cross entropy for each row; all of the rows' shape, and 0 or False where the target is ignored.

    Examples:
        >>> import torch
        >>> from batchkern import cross_entropy
        >>> logits = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log()
        >>> rows = cross_entropy(logits, torch.tensor([0, 0]), stats=True)
        >>> rows.correct.tolist()
        [False, True]
        >>> [round(entropy, 4) for entropy in rows.entropy.tolist()]
        [0.5623, 0.5623]
    """

    loss: Tensor
    """float32 (float64 for float64 logits); differentiable."""
    lse: Tensor
    """The log of the sum of the exponentials of the logits; same type, differentiable. NaN if a logit is NaN or
    +inf."""
    entropy: Tensor
    """The entropy of the softmax, in nats; a constant."""
    correct: Tensor
    """bool: whether the highest logit (the first of equal ones) is that of the target, or of the most likely class of a
    target of probabilities. False where lse is NaN."""


_of_fields = Rows.__new__


def _of_fields_or_iterable(cls: type[Rows], *fields: Any, **named: Any) -> Rows:
    """If logits are a subclass of Tensor, PyTorch builds the result again from one iterable, which NamedTuple would
    take as the first field."""
    return _of_fields(cls, *(fields[0] if len(fields) == 1 and not named else fields), **named)


Rows.__new__ = _of_fields_or_iterable  # type: ignore[assignment, method-assign]


def class_dim(logits: Tensor) -> int:
    return min(logits.dim() - 1, 1)


def valid_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Which rows have a loss; all rows if the target holds probabilities."""
    if target.is_floating_point():
        return torch.ones_like(target.select(class_dim(target), 0), dtype=torch.bool)
    return target.long() != ignore_index  # uint8 would wrap a negative index around


class LossOptions(NamedTuple):
    """The options that the loss of a row depends on, besides its logits and its target. The gradient uses all of
    them."""

    weight: Tensor | None = None
    """The weights of the classes, ``(C,)``."""
    ignore_index: int = -100
    label_smoothing: float = 0.0


def row_losses(logits: Tensor, target: Tensor, options: LossOptions) -> Tensor:
    """The losses in the type of the logits, 0 at ignored rows."""
    losses = F.cross_entropy(
        logits,
        target.to(logits.dtype) if target.is_floating_point() else target.long(),
        None if options.weight is None else options.weight.to(logits.dtype),
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    return torch.where(valid_rows(target, options.ignore_index), losses, 0)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    stats: bool = True,
) -> Rows:
    """The cross entropy of each row by PyTorch's own functions; loss and lse are differentiable any number of times."""
    logits = wide(logits)
    valid = valid_rows(target, ignore_index)
    loss = row_losses(logits, target, LossOptions(weight, ignore_index, label_smoothing))
    lse = torch.logsumexp(logits, class_dim(logits))
    lse = torch.where(lse == math.inf, math.nan, lse)  # as for the loss
    constants = entropy_and_correct(logits, target, valid, lse) if stats else (loss, loss)
    return Rows(loss, torch.where(valid, lse, 0), *constants)


def entropy_and_correct(logits: Tensor, target: Tensor, valid: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    classes = class_dim(logits)
    log_p = F.log_softmax(logits, classes).detach()
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0, p * log_p).sum(classes)
    labels = target.argmax(classes) if target.is_floating_point() else target.long()
    correct = (logits.argmax(classes) == labels) & valid & ~lse.isnan()
    return torch.where(valid, entropy, 0), correct


class CrossEntropy(torch.autograd.Function):
    """Adds the gradient to loss and lse of ``rows``: differentiable once, with exact zeros for rows without an upstream
    gradient, whatever they hold. ``batchkern/ops/cross_entropy.py`` derives it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rows: Rows, options: LossOptions) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, target, options.weight)
        ctx.ignore_index, ctx.smoothing = options.ignore_index, options.label_smoothing
        return rows.loss.detach(), rows.lse.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        logits, target, weight = ctx.saved_tensors
        smoothing = ctx.smoothing
        z, classes = wide(logits), class_dim(logits)
        valid = valid_rows(target, ctx.ignore_index)
        live = (valid & ((grad != 0) | (grad_lse != 0))).unsqueeze(classes)
        grad, grad_lse = grad.unsqueeze(classes), grad_lse.unsqueeze(classes)
        if target.is_floating_point():
            wanted = target.to(z.dtype)
        else:
            index = torch.where(valid, target.long(), 0)
            wanted = F.one_hot(index, z.shape[classes]).movedim(-1, classes).to(z.dtype)
        wanted = (1 - smoothing) * wanted + smoothing / z.shape[classes]
        w = torch.ones_like(z) if weight is None else over_classes(weight.to(z.dtype), z)
        if target.is_floating_point() or smoothing > 0:
            wanted = w * wanted
        else:  # a class that does not occur may have an infinite weight
            wanted = torch.where(wanted == 0, 0, w * wanted)
        log_p = F.log_softmax(z, classes)
        of_logits = (grad * wanted.sum(classes, keepdim=True) + grad_lse) * log_p.exp() - grad * wanted
        of_target = None
        if ctx.needs_input_grad[1]:
            of_target = torch.where(live, -grad * w * log_p * (1 - smoothing), 0).to(target.dtype)
        return torch.where(live, of_logits, 0).to(logits.dtype), of_target, None, None


def rows_with_gradient(
    function: type[CrossEntropy], logits: Tensor, target: Tensor, options: LossOptions, *, stats: bool
) -> Rows:
    """``cross_entropy`` with the gradient of ``function``."""
    with torch.no_grad():
        rows = cross_entropy(logits, target, **options._asdict(), stats=stats)
    loss, lse = function.apply(logits, target, rows, options)
    return Rows(loss, lse, rows.entropy, rows.correct)


def over_classes(weight: Tensor, logits: Tensor) -> Tensor:
    """``weight (C,)`` in a shape that broadcasts over logits."""
    return weight.view(-1, *[1] * (logits.dim() - 1 - class_dim(logits)))


def trimmed_cross_entropy(
    logits: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The trimmed mean ``()`` and the detached losses of the rows, 0 at ignored rows."""
    logits = wide(logits)
    weight = None if class_weight is None else class_weight.to(logits.dtype)

    options = LossOptions(weight, ignore_index, label_smoothing)
    valid = valid_rows(target, ignore_index)
    row_weight = None
    if weight is not None and not target.is_floating_point():
        row_weight = weight[torch.where(valid, target.long(), 0)]
    losses = None
    if isinstance(keep, float) and keep == 1 and group is None:
        kept, normalizer = valid, valid.sum() if row_weight is None else torch.where(valid, row_weight, 0).sum()
    else:
        losses = row_losses(logits.detach(), target, options).detach()
        kept, normalizer = select_and_normalize(losses, valid, row_weight, keep, group)
    # Dropped rows are replaced before the differentiable pass: their gradient is an exact zero even where a logit is
    # NaN or infinite, which a zero upstream factor alone would turn into NaN.
    kept_logits = torch.where(kept.unsqueeze(class_dim(logits)), logits, 0.0)
    kept_losses = row_losses(kept_logits, target, options)
    loss = torch.where(kept, kept_losses, 0).sum() / normalizer.to(logits.dtype)
    return loss, kept_losses.detach() if losses is None else losses


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    """The logits ``(N, V)``. Ignored rows are set to 0, since they may hold NaN; words masked by a bias of -inf stay
    masked."""
    valid = valid_rows(target, ignore_index)[..., None]
    logits = F.linear(torch.where(valid, hidden, 0), weight, bias).reshape(-1, weight.shape[0])
    if softcap is not None:
        logits = torch.where(logits == -math.inf, -math.inf, softcap * torch.tanh(logits / softcap))
    return logits * logit_scale


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: bool = True,
) -> Rows:
    """The unfused definition: it does hold all logits."""
    cap: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    logits = linear_logits(hidden, weight, target, bias=bias, **cap)
    options = LossOptions(None, ignore_index, label_smoothing)
    if within_transform():
        rows = cross_entropy(logits, target.flatten(), **options._asdict(), stats=stats)
    else:
        rows = rows_with_gradient(CrossEntropy, logits, target.flatten(), options, stats=stats)
    return Rows(*(x.view(target.shape) for x in rows))


def linear_trimmed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    keep: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The unfused definition: it does hold all logits."""
    cap: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    logits = linear_logits(hidden, weight, target, bias=bias, **cap)
    loss, losses = trimmed_cross_entropy(
        logits, target.flatten(), keep, ignore_index=ignore_index, label_smoothing=label_smoothing, group=group
    )
    return loss, losses.view(target.shape)


def rank_batches(losses: Tensor, count: int) -> Tensor:
    return in_order(losses.detach())[:count]


# --- random numbers: Philox4x32-10 (Salmon et al., SC 2011) -----------------------------------------------------

MASK32 = 0xFFFFFFFF


def multiply_32x32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b. In 16-bit halves: the full product would overflow int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four 32-bit counter words and a 64-bit key; words are int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(10):
        high0, low0 = multiply_32x32(c0, 0xD2511F53)
        high1, low1 = multiply_32x32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


@torch.library.custom_op("batchkern_reference::random_words", mutates_args=())
def random_words(rows: Tensor, columns: int, seed: Tensor) -> Tensor:
    """``(len(rows), columns)`` integers in [0, 2^32): word ``column % 4`` of the counter (row, column // 4).

    The four counter words are (row mod 2^32, row / 2^32, column // 4, 0). A custom op, because the compiler would
    inline ten rounds of Philox into one expression of exponential size.
    """
    quad = torch.arange((columns + 3) // 4, device=rows.device)
    row, quad = torch.broadcast_tensors(rows[:, None], quad)
    words = philox((row & MASK32, row >> 32, quad, torch.zeros_like(quad)), seed)
    return torch.stack(words, dim=-1).flatten(1)[:, :columns].contiguous()


@random_words.register_fake
def _(rows: Tensor, columns: int, seed: Tensor) -> Tensor:
    return rows.new_empty(len(rows), columns)


def random_normals(rows: Tensor, columns: int, seed: Tensor) -> Tensor:
    """Standard normals ``(len(rows), columns)`` float64, by Box-Muller on the words (0, 1) and (2, 3) of a quad.

    A word's upper 23 bits give u = (w + 1/2) / 2^23, exact in float32 and never 0 or 1.
    """
    padded = (columns + 3) // 4 * 4
    u = ((random_words(rows, padded, seed) >> 9).double() + 0.5) / 2**23
    u = u.unflatten(1, (padded // 2, 2))
    radius, angle = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * math.pi * u[..., 1]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :columns]


# --- stochastic batch augmentation ------------------------------------------------------------------------------


def augment_latent(
    x: Tensor,
    seed: Tensor,
    *,
    gaussian: int,
    dropout: int,
    sigma: float,
    tau: float,
    drop_prob: float,
    basis: Basis | None = None,
    rescale_dropout: bool = False,
) -> Tensor:
    """Eqs. 5-8: x, x + clip(eps, -tau, tau) @ basis.T, mask * x, stacked copy-major.

    The Philox row of an element is its row in the output, so no two copies share a random number.
    """
    batch, width = x.shape
    value = wide(x)
    rows = torch.arange(batch, (1 + gaussian + dropout) * batch, device=x.device)
    gaussian_rows, dropout_rows = rows[: gaussian * batch], rows[gaussian * batch :]

    noise = (sigma * random_normals(gaussian_rows, width, seed)).clamp(-tau, tau).to(value.dtype)
    noise = apply_basis(noise, basis)
    threshold = round(drop_prob * 2**32)
    mask = (random_words(dropout_rows, width, seed) >= threshold).to(value.dtype)
    if rescale_dropout:
        mask = mask / (1 - drop_prob)
    copies = [value, value.repeat(gaussian, 1) + noise, value.repeat(dropout, 1) * mask]
    return torch.cat(copies).to(x.dtype)


class SoftLabelKL(torch.autograd.Function):
    """Row divergences ``(M * B,)`` of eq. 10, with the gradient computed in the same pass.

    With t = log P - log Q, KL(P || Q) = sum Q (t e^t - e^t + 1): every term is >= 0, and nothing cancels when a virtual
    row is close to its reference, while sum P t loses all digits.
    """

    @staticmethod
    def forward(ctx: Any, reference: Tensor, virtual: Tensor, temperature: float) -> Tensor:
        copies = len(virtual) // max(len(reference), 1)
        log_p = F.log_softmax(wide(reference) / temperature, dim=1).repeat(copies, 1)
        log_q = F.log_softmax(wide(virtual) / temperature, dim=1)
        p, q = log_p.exp(), log_q.exp()
        absent = (log_p == -math.inf) & (log_q == -math.inf)
        # Close to the reference, log P - log Q would be little more than the rounding error of two logarithms. But the
        # difference d of two close logits is exact, and lse_Q - lse_P = log sum P e^-d follows from it.
        d = (wide(reference).repeat(copies, 1) - wide(virtual)).masked_fill(absent, 0.0) / temperature
        close = (d.abs() < 0.5).all(dim=1, keepdim=True)
        t = torch.where(close, d + torch.log1p((p * torch.expm1(-d)).sum(dim=1, keepdim=True)), log_p - log_q)
        t = t.masked_fill(absent, 0.0)

        series = sum((n - 1) / math.factorial(n) * t**n for n in range(2, 13))
        direct = t * t.exp() - torch.expm1(t)
        near = q * torch.where(t.abs() < 0.25, series, direct)
        far = torch.where(p == 0, q, p * (t - 1) + q)  # e^t may overflow or underflow where P and Q do not
        terms = torch.where((t > -20) & (t <= 1), near, far)
        kl = torch.where(t == math.inf, math.inf, terms).sum(dim=1)

        grad_virtual = torch.where(close, -q * torch.expm1(t), q - p) / temperature
        grad_reference = torch.where(p == 0, 0.0, p * (t - kl[:, None])) / temperature
        ctx.save_for_backward(grad_reference, grad_virtual)
        ctx.facts = copies, len(reference), reference.dtype, virtual.dtype
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_reference, grad_virtual = ctx.saved_tensors
        copies, rows, reference_dtype, virtual_dtype = ctx.facts
        scale = grad.reshape(-1, 1)
        to_reference = to_virtual = None
        if ctx.needs_input_grad[0]:
            to_reference = (
                (scale * grad_reference).view(copies, rows, grad_reference.shape[1]).sum(0).to(reference_dtype)
            )
        if ctx.needs_input_grad[1]:
            to_virtual = (scale * grad_virtual).to(virtual_dtype)
        return to_reference, to_virtual, None


def soft_label_kl(reference_logits: Tensor, virtual_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Row divergences ``(M * B,)``; detach ``reference_logits`` to keep the soft label out of the gradient."""
    if within_transform():
        return _plain_soft_label_kl(reference_logits, virtual_logits, temperature)
    return SoftLabelKL.apply(reference_logits, virtual_logits, temperature)


def _plain_soft_label_kl(reference: Tensor, virtual: Tensor, temperature: float) -> Tensor:
    """The divergences for transforms, which differentiate the formula. In float64, since differences of close
    logarithms lose digits."""
    copies = len(virtual) // max(len(reference), 1)
    log_p = F.log_softmax(reference.double() / temperature, dim=1).repeat(copies, 1)
    log_q = F.log_softmax(virtual.double() / temperature, dim=1)
    p = log_p.exp()
    t = (log_p - log_q).masked_fill(p == 0, 0.0)
    return (p * t).sum(dim=1).to(wide(virtual).dtype)
