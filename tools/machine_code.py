"""Estimates of a GPU kernel's speed from its machine code: how its main loop reads memory, and what it waits for
before.

Reads the output of ``cuobjdump -sass``. A kernel that is limited by memory bandwidth needs, on each multiprocessor, as
many bytes in flight as memory delivers during the latency of one load (Little's law).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, itemgetter

FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+) )?\s*([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
REGISTER = re.compile(r"\b(U?R)(\d+)((?:\.\w+)*)")
PREDICATE = re.compile(r"\bU?P\d\b")
LOAD = re.compile(r"LDG?\.E\b")
ANSWERED = re.compile(r"ATOMG?\b")
WORK = re.compile(r"MUFU|FMNMX|ST|ATOM|RED")
NO_RESULT = re.compile(
    r"ST|RED|BAR|BRA|BRX|EXIT|MEMBAR|ERRBAR|BSSY|BSYNC|BREAK|CALL|RET|WARPSYNC|NOP|CCTL|DEPBAR|BPT|YIELD"
)
ONLY_PREDICATES = re.compile(r"\w*SETP\d?\b|U?PLOP3\b|FCHK\b")

# The limits of a multiprocessor of sm_90.
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32
ASKED = 4.2e12 * 800e-9 / 132
"""Bytes in flight on a multiprocessor: an H200's copy bandwidth times 800 ns, the latency of a load among many."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # a predicate, perhaps after "!", or nothing
    opcode: str
    operands: str

    @cached_property
    def load(self) -> int:
        """Bytes that a thread loads from global memory, or 0. Values that other blocks have written are loaded with
        STRONG."""
        if not LOAD.match(self.opcode):
            return 0
        width = re.search(r"\.[US]?(8|16|64|128)\b", self.opcode)
        return int(width[1]) // 8 if width else 4

    @property
    def input(self) -> int:
        """Bytes of the kernel's inputs."""
        return 0 if ".STRONG" in self.opcode else self.load

    @cached_property
    def target(self) -> int | None:
        """The target of a jump; of BSSY the place where its threads reconverge."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if re.match(r"BRA|BSSY", self.opcode) else None
        return int(found[1], 16) if found else None

    @cached_property
    def falls_through(self) -> bool:
        jumps = re.match(r"EXIT|BRA|BRX|RET|BSYNC", self.opcode)
        return not jumps or self.guard not in ("", "PT") or bool(PREDICATE.search(self.operands.split(",")[0]))

    @cached_property
    def _parts(self) -> tuple[set[str], str]:
        """The registers and predicates that are written, and the operands that are read."""
        if NO_RESULT.match(self.opcode):
            return set(), self.operands
        operands, written = self.operands.split(","), set()
        while operands and (PREDICATE.fullmatch(operands[0].strip()) or operands[0].strip() in ("PT", "UPT")):
            written.add(operands.pop(0).strip())
        if operands and not ONLY_PREDICATES.match(self.opcode) and (first := REGISTER.match(operands.pop(0).strip())):
            wide = re.search(r"\.WIDE\b|\.64\b|^D(?:ADD|MUL|FMA)\b", self.opcode)
            size = -(-self.load // 4) or (2 if wide else 1)
            written |= {f"{first[1]}{int(first[2]) + i}" for i in range(size)}
        return written - {"PT", "UPT"}, ",".join(operands)

    @property
    def written(self) -> set[str]:
        return self._parts[0]

    @cached_property
    def read(self) -> set[str]:
        operands = self._parts[1]
        names = set(PREDICATE.findall(operands)) | set(PREDICATE.findall(self.guard))
        for kind, number, suffix in REGISTER.findall(operands):
            size = 4 if ".128" in self.opcode and NO_RESULT.match(self.opcode) else 2 if ".64" in suffix else 1
            names |= {f"{kind}{int(number) + i}" for i in range(size)}
        return names


@dataclass(frozen=True)
class Loop:
    """A loop that reads inputs from global memory. Its numbers are those of one thread in one iteration, on the
    shortest of the paths that load the most bytes and do the most work: the loads before the value of one is used,
    their bytes, the bytes of the widest load, all bytes loaded, the instructions of that work, the exponentials among
    them, and all instructions."""

    address: int
    loads: int
    in_flight: int
    widest: int
    bytes: int
    work: int
    exponentials: int
    instructions: int

    @property
    def width(self) -> float:
        return self.in_flight / self.loads

    def elements(self, size: int) -> float:
        """The elements of an iteration: one per exponential. Without exponentials, as many as the loaded bytes hold."""
        return self.exponentials or self.bytes / size


@dataclass(frozen=True)
class _Way:
    """A path from the beginning of a loop. ``pending`` holds the registers that were loaded and not used, until one is
    used."""

    pending: frozenset[str] = frozenset()
    waiting: bool = True
    loads: int = 0
    in_flight: int = 0
    widest: int = 0
    bytes: int = 0
    work: int = 0
    exponentials: int = 0
    instructions: int = 0

    def rank(self) -> tuple[int, int, int]:
        return self.bytes, self.work, -self.instructions

    def through(self, block: list[Instruction]) -> _Way:
        pending, waiting, loads, in_flight = set(self.pending), self.waiting, self.loads, self.in_flight
        for x in block:
            waiting = waiting and not pending & x.read
            if x.input and waiting:
                pending |= x.written
                loads, in_flight = loads + 1, in_flight + x.input
        return _Way(
            frozenset(pending),
            waiting,
            loads,
            in_flight,
            max([self.widest, *(x.input for x in block)]),
            self.bytes + sum(x.input for x in block),
            self.work + sum(bool(WORK.match(x.opcode)) for x in block),
            self.exponentials + sum(x.opcode.startswith("MUFU.EX2") for x in block),
            self.instructions + len(block),
        )


@dataclass(frozen=True)
class Code:
    """A kernel's instructions as basic blocks, which are entered at their first and left at their last instruction."""

    blocks: list[list[Instruction]]
    after: list[list[int]]

    @classmethod
    def of(cls, instructions: list[Instruction]) -> Code:
        starts = {x.target for x in instructions} | {instructions[0].address}
        blocks: list[list[Instruction]] = []
        for i, instruction in enumerate(instructions):
            if instruction.address in starts or re.match(r"BRA|BRX|EXIT|RET|BSYNC", instructions[i - 1].opcode):
                blocks.append([])
            blocks[-1].append(instruction)
        at = {block[0].address: i for i, block in enumerate(blocks)}
        # Threads that wait at a BSYNC continue at the target of the BSSY of the same barrier: of the last one in the
        # code.
        meets: dict[str, int | None] = {}
        after: list[list[int]] = []
        for i, block in enumerate(blocks):
            meets |= {x.operands.split(",")[0]: x.target for x in block if x.opcode.startswith("BSSY")}
            last = block[-1]
            jump = meets.get(last.operands) if last.opcode == "BSYNC" else last.target
            jump = None if last.opcode == "BSSY" else jump
            next_ = [i + 1] if last.falls_through and i + 1 < len(blocks) else []
            after.append(next_ if jump is None else [*next_, at[jump]])
        # The table of an indirect jump is not printed: its targets are the later blocks that no other instruction leads
        # to.
        known = {0, *(following for of_block in after for following in of_block)}
        for i in range(len(blocks)):
            if i not in known:
                after[max((j for j in range(i) if blocks[j][-1].opcode == "BRX"), default=i)].append(i)
        return cls(blocks, after)

    @cached_property
    def order(self) -> list[int]:
        """The reachable blocks, each after its predecessors, except for jumps back."""
        seen, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((b for b in rest if b not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.after[following])))
        return order[::-1]

    @cached_property
    def before(self) -> dict[int, list[int]]:
        result: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.after[block]:
                result[following].append(block)
        return result

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For each block, the blocks that every path to it passes."""
        found = {block: set(self.order) for block in self.order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = set.intersection(*(found[b] for b in self.before[block])) | {block}
                changed, found[block] = changed or new != found[block], new
        return found

    @cached_property
    def innermost(self) -> list[list[int]]:
        """The blocks of each innermost loop, each after its predecessors."""
        bodies: dict[int, set[int]] = {}
        for block in self.order:
            for head in set(self.after[block]) & self.dominators[block]:
                body, todo = bodies.setdefault(head, {head}), [block]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += self.before[member]
        inner = [body for head, body in bodies.items() if not any(h in body for h in bodies if h != head)]
        return [[block for block in self.order if block in body] for body in inner]

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost loops that read inputs."""
        return [loop for body in self.innermost if (loop := self._loop(body)).bytes]

    def _loop(self, body: list[int]) -> Loop:
        ways = self._ways(body)
        way = max((ways[block] for block in body if body[0] in self.after[block]), key=_Way.rank)
        numbers = way.loads, way.in_flight, way.widest, way.bytes, way.work, way.exponentials, way.instructions
        return Loop(self.blocks[body[0]][0].address, *numbers)

    def _ways(self, body: list[int]) -> dict[int, _Way]:
        ways: dict[int, _Way] = {}
        for block in body:
            before = [ways[b] for b in self.before[block] if b in ways]
            ways[block] = max(before, key=_Way.rank, default=_Way()).through(self.blocks[block])
        return ways

    @cached_property
    def main(self) -> Loop | None:
        """Of the loops with the widest loads, the one with the most exponentials, then the most work, then the fewest
        bytes loaded. None if this loop has no exponentials and the kernel has more bytes in flight outside its
        loops."""
        key = attrgetter("widest", "exponentials", "work")
        loop = max(self.loops, key=lambda loop: (*key(loop), -loop.bytes), default=None)
        return loop if loop and (loop.exponentials or loop.in_flight >= self.outside[1]) else None

    @cached_property
    def outside(self) -> tuple[int, int]:
        """The most bytes in flight outside the loops, and their loads: (loads, bytes). When a value is used, it has
        arrived, and so have the values that were loaded before it."""
        looped = {block for body in self.innermost for block in body}
        most: tuple[int, int] = (0, 0)
        flying: dict[int, list[Instruction]] = {}
        for block in self.order:
            before = [flying[b] for b in self.before[block] if b in flying]
            loads = list(max(before, key=lambda loads: sum(x.input for x in loads), default=[]))
            for x in self.blocks[block]:
                used = [i for i, load in enumerate(loads) if load.written & x.read]
                loads = loads[max(used) + 1 :] if used else loads
                if x.input and block not in looped:
                    loads.append(x)
                    most = max(most, (len(loads), sum(load.input for load in loads)), key=itemgetter(1))
            flying[block] = loads
        return most

    @cached_property
    def barriers(self) -> int:
        return sum(x.opcode.startswith("BAR.SYNC") for block in self.blocks for x in block)

    @cached_property
    def dependent(self) -> int:
        """The length of the longest chain of dependent loads before the main loop's loads, or, without a main loop, in
        the whole kernel. A load waits for its address and, because a warp issues in order, for everything that an
        earlier instruction has waited for."""
        longest = 0
        states: dict[int, dict[str, int]] = {0: {}}  # loads that a register waits for; "": that issued code waits for
        for block in self.order:
            state = dict(states.get(block, {}))
            if self.main and self.blocks[block][0].address == self.main.address:
                read = {name for x in self.blocks[block] if x.load for name in x.read}
                return max(state.get(name, 0) for name in {"", *read})
            for x in self.blocks[block]:
                state[""] = waits = max([state.get("", 0), *(state.get(name, 0) for name in x.read)])
                waits += bool(x.load or ANSWERED.match(x.opcode))
                longest = max(longest, waits)
                state |= dict.fromkeys(x.written, waits)
            for following in self.after[block]:
                known = states.setdefault(following, {})
                known |= {name: max(known.get(name, 0), waits) for name, waits in state.items()}
        return longest


def kernels(sass: str) -> dict[str, Code]:
    """The code of each kernel, by mangled names."""
    parts = FUNCTION.split(sass)
    return {
        name: Code.of([Instruction(int(address, 16), *rest) for address, *rest in INSTRUCTION.findall(text)])
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@dataclass(frozen=True)
class Speed:
    """The cells of a kernel in a table: a thread's loads in flight in the main loop, or outside loops, and the bytes of
    one; dependent loads before; barriers; instructions per element of the loop; warps per multiprocessor; and KB in
    flight."""

    loads: int
    width: float
    dependent: int
    barriers: int
    instructions: float
    warps: int
    in_flight: float

    @classmethod
    def of(cls, code: Code, warps: int, element_bytes: int) -> Speed:
        loop = code.main
        loads, in_flight = (loop.loads, loop.in_flight) if loop else code.outside
        return cls(
            loads,
            round(in_flight / max(loads, 1), 1),
            code.dependent,
            code.barriers,
            round(loop.instructions / loop.elements(element_bytes), 1) if loop else 0,
            warps,
            round(in_flight * 32 * warps / 1000, 1),
        )

    @classmethod
    def worst(cls, speeds: list[Speed]) -> Speed:
        """The worst of each number; the loads are those with the fewest bytes in flight."""
        fewest = min(speeds, key=lambda speed: speed.in_flight)
        return cls(
            fewest.loads,
            fewest.width,
            max(speed.dependent for speed in speeds),
            max(speed.barriers for speed in speeds),
            max(speed.instructions for speed in speeds),
            min(speed.warps for speed in speeds),
            fewest.in_flight,
        )

    def cells(self) -> str:
        instructions = f"{self.instructions:g}" if self.instructions else "-"
        counts = f"{self.dependent} | {self.barriers} | {self.warps}"
        return f"{self.loads} x {self.width:g} | {instructions} | {counts} | {self.in_flight:g} |"

    def worse(self, before: str) -> str:
        """The numbers that have become worse than those in the cells of a table, or nothing."""
        shown = dict(zip(NAMES, (cell.strip() for cell in before.split("|")), strict=False))
        now = dict(zip(NAMES, (cell.strip() for cell in self.cells().split("|")), strict=False))

        def is_worse(name: str, sign: int) -> bool:
            try:
                return sign * (float(now[name]) - float(shown[name])) > 0
            except (KeyError, ValueError):  # "-", or a table that was edited
                return shown.get(name) != now[name]

        return "; ".join(
            f"{name} {now[name]}, was {shown.get(name)}" for name, sign in SIGNS.items() if is_worse(name, sign)
        )


NAMES = ("loads", "instructions an element", "dependent loads before", "barriers", "warps", "KB in flight")
SIGNS = {"instructions an element": 1, "dependent loads before": 1, "barriers": 1, "warps": -1, "KB in flight": -1}
"""The direction in which each number becomes worse."""
COLUMNS = f"| kernel | {' | '.join(NAMES)} |"
HEADER = [
    "Of the main loop, the one with the widest loads and most exponentials: how many loads of how many bytes a",
    "thread has in flight before it uses the first, and instructions for each element, of which each has one",
    "exponential. Of a kernel without such a loop: the most that is in flight anywhere outside loops. Dependent:",
    "loads each of which waits for the one before, on the longest way to the main loop or, without one, through the",
    "kernel. Barriers: in the code, not on a way through it. On a multiprocessor: warps that registers and shared",
    f"memory hold, and so KB in flight; where memory is the bound an H200 asks for {ASKED / 1000:.0f} (4.2 TB/s, 800",
    "ns a load, 132 multiprocessors).",
    "",
    COLUMNS,
    f"|---|{'---:|' * len(NAMES)}",
]


def rows(text: str) -> dict[str, str]:
    """The cells of such a table, by kernel."""
    _, _, table = text.partition(COLUMNS)
    return dict(re.findall(r"^\| `?([^`|]+?)`? \|(.*)$", table, re.MULTILINE))


def resident_warps(registers: int, shared: int, threads: int) -> int:
    """The resident warps of a multiprocessor of sm_90. ``shared``: the bytes of a block, including those that CUDA
    takes."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps  # allocated to a thread in multiples of eight
    by_shared = SHARED // shared if shared else BLOCKS
    return min(by_registers, by_shared, THREADS // threads, BLOCKS) * warps
