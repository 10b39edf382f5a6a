"""One training in several processes: which rows are whose, and what all of them must know or decide together.

A batch is cut into contiguous slices, one a rank, so that the slices one after another are the batch of one process:
ties and sums then stand in the same order. In one process everything here hands back what it was given; the trainer and
the strategies need no second way of doing things.
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
"""Updates between two questions whether some rank was told to stop; each question waits for the slowest rank."""

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's rows of a batch. Each rank has equally many: the last are filled up with rows that count nowhere."""

    rows: int
    """Of the whole batch."""
    rank: int = 0
    world: int = 1

    @property
    def each(self) -> int:
        """Rows of a rank, filling included."""
        return -(-self.rows // self.world)

    @property
    def start(self) -> int:
        return min(self.rank * self.each, self.rows)

    @property
    def real(self) -> int:
        """Rows that are not filling; 0 on a rank to which a small batch does not reach."""
        return min(self.each, self.rows - self.start)

    @property
    def positions(self) -> Tensor:
        """``(each,)`` places in the batch; the filling repeats its first rows."""
        return (self.rank * self.each + torch.arange(self.each)) % self.rows

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of ``x``, which has those of the whole batch along ``dim``."""
        return x if self.world == 1 else x.index_select(dim, self.positions.to(x.device))

    def spread(self, x: Tensor) -> Tensor:
        """The whole batch with this rank's rows ``x (each, Q)`` at their places, and zeros at those of others."""
        return x if self.world == 1 else F.pad(x[: self.real], (0, 0, self.start, self.rows - self.start - self.real))

    def ignore_filling(self, target: Tensor) -> Tensor:
        """``target (each, ...)`` with :data:`IGNORED` at the filling; probabilities ``(each, C)`` stay as they are."""
        if self.real == self.each or target.is_floating_point():
            return target
        return torch.cat([target[: self.real], torch.full_like(target[self.real :], IGNORED)])

    def counts(self, target: Tensor) -> Tensor:
        """``(each,)`` bool, on the device of ``target``: which rows are not filling."""
        if target.dim() > 1:
            return torch.arange(self.each, device=target.device) < self.real
        return target != IGNORED


class Ranks:
    """The processes of a training, as one of them sees them. ``Ranks()`` is a training in one process.

    Args:
        device: this rank's.
        group: of all ranks, for what the device computes.
        control: of all ranks, for objects and flags on the CPU.
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
        """The ranks that torchrun started, or those of a default process group that is there already.

        Raises:
            UserError: a wrong device, or the others cannot be joined.
        """
        joined = dist.is_available() and dist.is_initialized()
        if not joined and os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(pick_device(device))
        if joined and dist.get_world_size() == 1:
            return cls(pick_device(device))
        picked = _own_device(device)
        if not joined:
            _init(picked)
        # NCCL carries nothing but tensors of its GPU, and in the order of that GPU's stream.
        control = dist.group.WORLD if picked.type == "cpu" else dist.new_group(backend="gloo")
        return cls(picked, dist.group.WORLD, control)

    # --- a batch ------------------------------------------------------------------------------------------------

    def share(self, rows: int) -> Share:
        return Share(rows, self.rank, self.world)

    def gather(self, share: Share, columns: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """In one all-gather: figures of the whole batch ``(K, rows)`` from ``columns (K, each)``, and the mean of the
        ranks' 0-dim ``value``. The same bits on every rank."""
        if self.world == 1:
            return columns, value
        parts = self._all(torch.cat([columns.flatten(), value.reshape(1).to(columns.dtype)]))
        whole = parts[:, :-1].view(self.world, *columns.shape).transpose(0, 1).flatten(1)
        return whole[:, : share.rows], parts[:, -1].mean()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks of a 0-dim tensor; the same bits on every rank."""
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

    # --- what all know or decide --------------------------------------------------------------------------------

    def first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, the only one that runs it; its UserError is raised on every rank."""
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
        """Whether some rank's ``flag`` is set, to be asked between updates: every few times, the ranks do ask."""
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
    """Whether this process should print ``sentence``: the first one that torchrun started and that has it to say.

    What is wrong with the arguments is wrong on every rank, what is wrong with one machine's files on one of them; and
    both can be found before the ranks have joined. So it is the launcher's store that knows what has been said.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        key = f"batchkern/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{zlib.crc32(sentence.encode())}"
        return store.add(key, 1) == 1
    except (KeyError, RuntimeError, TypeError, ValueError):  # better twice than never
        return True
