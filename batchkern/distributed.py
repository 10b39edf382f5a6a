"""One training in several processes: how rows are divided among ranks, and what ranks exchange or decide together.

A batch is cut into contiguous slices, one per rank, in the order of the batch of a single process, so that ties and
sums have the same order. In a single process, all functions here return their input, so the trainer and the strategies
have the same code for both cases.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from batchkern.data.labelled import IGNORED
from batchkern.errors import UserError
from batchkern.validation import pick_device

ASK_EVERY = 4
"""The ranks check every so many updates whether one of them was told to stop; a check waits for the slowest rank."""

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's rows of a batch. All ranks have the same number: the last ranks are padded with rows that do not
    count."""

    rows: int
    """Number of rows of the whole batch."""
    rank: int = 0
    world: int = 1

    @property
    def each(self) -> int:
        """Number of rows of each rank, including padding."""
        return -(-self.rows // self.world)

    @property
    def start(self) -> int:
        return min(self.rank * self.each, self.rows)

    @property
    def real(self) -> int:
        """Number of rows that are not padding; 0 if a small batch has no rows for this rank."""
        return min(self.each, self.rows - self.start)

    @property
    def positions(self) -> Tensor:
        """``(each,)`` positions in the batch; padding repeats the first rows of the batch."""
        return (self.rank * self.each + torch.arange(self.each)) % self.rows

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of ``x``, which has the rows of the whole batch along ``dim``."""
        return x if self.world == 1 else x.index_select(dim, self.positions.to(x.device))

    def spread(self, x: Tensor) -> Tensor:
        """The whole batch with this rank's rows ``x (each, Q)`` at their positions, and zeros in the rows of other
        ranks."""
        return x if self.world == 1 else F.pad(x[: self.real], (0, 0, self.start, self.rows - self.start - self.real))

    def ignore_filling(self, target: Tensor) -> Tensor:
        """``target (each, ...)`` with :data:`IGNORED` in padding rows; probabilities ``(each, C)`` are returned
        unchanged."""
        if self.real == self.each or target.is_floating_point():
            return target
        return torch.cat([target[: self.real], torch.full_like(target[self.real :], IGNORED)])

    def counts(self, target: Tensor) -> Tensor:
        """``(each,)`` bool, on the device of ``target``: which rows are not padding."""
        if target.dim() > 1:
            return torch.arange(self.each, device=target.device) < self.real
        return target != IGNORED


class Ranks:
    """The processes of a training, with the rank of this one. ``Ranks()`` is a training in a single process.

    Args:
        device: the device of this rank.
        group: the group of all ranks for tensors on the device.
        control: the group of all ranks for objects and flags on the CPU.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.group = group
        self.control = control
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self._questions = 0

    @classmethod
    def join(cls, device: torch.device | str | None) -> Ranks:
        """The ranks that torchrun started, or those of an existing default process group.

        Raises:
            UserError: the device is wrong, or the other processes cannot be joined.
        """
        joined = dist.is_available() and dist.is_initialized()
        if not joined and os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(pick_device(device))
        if joined and dist.get_world_size() == 1:
            return cls(pick_device(device))
        picked = _own_device(device)
        if not joined:
            _init(picked)
        # NCCL can send only tensors of its GPU, in the order of the stream of that GPU.
        control = dist.group.WORLD if picked.type == "cpu" else dist.new_group(backend="gloo")
        return cls(picked, dist.group.WORLD, control)

    # --- a batch ------------------------------------------------------------------------------------------------

    def share(self, rows: int) -> Share:
        return Share(rows, self.rank, self.world)

    def gather(self, share: Share, columns: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """With one all-gather, the figures of the whole batch ``(K, rows)`` from ``columns (K, each)``, and the mean
        over ranks of the 0-dim ``value``. The results are bitwise equal on all ranks."""
        if self.world == 1:
            return columns, value
        parts = self._all(torch.cat([columns.flatten(), value.reshape(1).to(columns.dtype)]))
        whole = parts[:, :-1].view(self.world, *columns.shape).transpose(0, 1).flatten(1)
        return whole[:, : share.rows], parts[:, -1].mean()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks of a 0-dim tensor; bitwise equal on all ranks."""
        return value if self.world == 1 else self._all(value).mean()

    def _all(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    # --- the model ----------------------------------------------------------------------------------------------

    def parallel(self, module: nn.Module, *, find_unused: Callable[[], bool]) -> nn.Module:
        """``module`` with rank 0's weights, and with gradients that are averaged over the ranks."""
        if self.world == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module, process_group=self.group, find_unused_parameters=find_unused())

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites ``tensors`` with rank 0's."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0, group=self.group)

    # --- objects and decisions of all ranks ----------------------------------------------------------------------

    def first(self, action: Callable[[], T]) -> T:
        """The result of ``action`` on rank 0, which alone runs it; if it raises a UserError, all ranks raise it."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, 0, group=self.control)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: T = outcome[0]
        return result

    def collect(self, thing: T) -> list[T]:
        """Each rank's ``thing``, in the order of ranks."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def agree(self, flag: bool) -> bool:
        """Whether the ``flag`` of any rank is set. Called after each update; only every few calls do the ranks
        communicate."""
        if self.world == 1:
            return flag
        self._questions += 1
        if self._questions % ASK_EVERY:
            return False
        answer = torch.tensor(int(flag))
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.control)
        return bool(answer)


def _own_device(device: torch.device | str | None) -> torch.device:
    local = _numbered("LOCAL_RANK", below="LOCAL_WORLD_SIZE")
    picked = pick_device(device)
    if picked.type == "cpu":
        return picked
    if picked.index is not None and picked.index != local and "LOCAL_RANK" in os.environ:
        raise UserError(f"device is {device}, but this process is number {local} of its machine; give cuda, or none")
    own = picked if picked.index is not None else pick_device(f"cuda:{local}")
    torch.cuda.set_device(own)
    return own


def _numbered(name: str, below: str) -> int:
    """This process's number, as torchrun sets it."""
    number, count = (os.environ.get(key) for key in (name, below))
    try:
        if 0 <= int(number or 0) < int(count or 2**31):
            return int(number or 0)
    except ValueError:
        pass
    raise UserError(f"{name} is {number!r}, and {below} {count!r}; torchrun sets them to whole numbers, counted from 0")


def _init(device: torch.device) -> None:
    _numbered("RANK", below="WORLD_SIZE")
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but the other processes cannot be joined; "
            f"start them all with torchrun ({str(error).splitlines()[0]})"
        ) from error


def says(sentence: str) -> bool:
    """Whether this process should print ``sentence``: only the first process with the same sentence should.

    Wrong arguments cause the same error on every rank, but a problem with the files of one machine only on some; and
    both may be found before the ranks have joined. So the store of the launcher records what was printed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        key = f"batchkern/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{zlib.crc32(sentence.encode())}"
        return store.add(key, 1) == 1
    except (KeyError, RuntimeError, TypeError, ValueError):  # if in doubt, it is printed
        return True
