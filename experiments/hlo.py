"""Reads a compiled program: what each operation moves through memory, how often it runs, what devices exchange.

XLA's own cost analysis counts the body of a loop once however often it runs, and buffers in on-chip memory as traffic.
Here an operation moves its operands and its results, as far as they lie in HBM, times the trips of the loops around it;
of a buffer that it only slices or updates in place it moves the slice.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4}
ITEM_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SERIAL = ("gather", "scatter", "sort")  # one element after the other, on a TPU
_ARRAY = re.compile(rf"\b({'|'.join(ITEM_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "opt-barrier"}
_FREE |= {"partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update", "all-reduce-done"}
_FREE |= {"all-gather-done", "collective-permute-done", "send-done", "recv-done"}
_FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"', '"AssumeGatherIndicesInBound"')  # custom calls
_SLICES = {"dynamic-slice", "slice", "gather"}


class Instruction(NamedTuple):
    name: str
    type: str  # of the result, a tuple's in parentheses
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Operation(NamedTuple):
    """What runs: an instruction outside of fusions, and how often.

    Attributes:
        times: runs, over all trips of the loops around it.
        hbm_bytes: of one run.
        cycles: of one run, as the compiler estimates; None where it does not.
        label: the name of what it comes from in the source, without numbers.
    """

    instruction: Instruction
    times: int
    hbm_bytes: float
    cycles: int | None
    label: str


def array_bytes(type_: str, hbm_only: bool = True) -> float:
    """Bytes of all arrays of a type; those with `S(1)` in their layout lie on the chip."""
    total = 0.0
    for item, sides, layout in _ARRAY.findall(type_):
        if not (hbm_only and "S(1)" in layout):
            total += ITEM_BYTES[item] * math.prod(int(side) for side in sides.split(",") if side)
    return total


class Program:
    """The text of an optimized HLO module."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)

    def operations(self) -> list[Operation]:
        return list(self._run(self.entry, 1))

    def _run(self, computation: str, times: int) -> Iterator[Operation]:
        types = {each.name: each.type for each in self.computations[computation]}
        for each in self.computations[computation]:
            if each.opcode == "while":
                yield from self._run(each.called("body"), times * self._trips(each))
            elif each.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
                names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else self._two_branches(each)
                runs = [list(self._run(name, times)) for name in names]
                yield from max(runs, key=lambda run: sum(one.times * one.hbm_bytes for one in run))
            elif each.opcode == "call":
                yield from self._run(each.called("to_apply"), times)
            elif each.opcode not in _FREE and not any(name in each.attributes for name in _FREE_CALLS):
                cycles = re.search(r'estimated_cycles":"(\d+)"', each.attributes)
                source = re.search(r'op_name="([^"]*)"', each.attributes)
                label = re.sub(r"\d+", "#", source[1]) if source else f"({each.opcode})"
                yield Operation(each, times, self._moved(each, types), cycles and int(cycles[1]), label)

    def _two_branches(self, conditional: Instruction) -> list[str]:
        return [conditional.called("true_computation"), conditional.called("false_computation")]

    def _trips(self, loop: Instruction) -> int:
        """As the compiler knows them, or else the constant that the loop's counter is compared with."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        return int(known[1]) if known else max(self._constants(loop.called("condition")), default=1) or 1

    def _constants(self, computation: str) -> Iterator[int]:
        for each in self.computations.get(computation, ()):
            if each.opcode == "constant" and each.type.startswith("s32[]"):
                yield int(re.match(r"-?\d+", each.attributes)[0])
            if inner := each.called("calls"):
                yield from self._constants(inner)

    def _moved(self, each: Instruction, types: Mapping[str, str]) -> float:
        result = array_bytes(each.type)
        if each.opcode in ("copy-start", "slice-start"):  # between memories: once, what arrives
            given = array_bytes(types[each.operands[0]], False)
            return array_bytes(each.type, False) - given
        if each.opcode == "dynamic-update-slice":
            return 2 * array_bytes(types.get(each.operands[1], ""))
        if each.opcode in _SLICES:
            return 2 * result
        if each.opcode == "fusion":
            fused = each.called("calls")
            whole = [array_bytes(types.get(name, "")) for name in each.operands]
            read = (min(size, self._read(fused, i)) for i, size in enumerate(whole) if size)
            return min(result, self._written(fused)) + sum(read)
        return result + sum(array_bytes(types.get(name, "")) for name in each.operands)

    def _read(self, fused: str, number: int) -> float:
        """Bytes that a fusion reads of a parameter: of its slices, where it only slices or updates it in place."""
        body = self.computations[fused]
        names = {int(re.match(r"\d+", each.attributes)[0]): each.name for each in body if each.opcode == "parameter"}
        return self._used(body, names[number])

    def _used(self, body: Sequence[Instruction], name: str) -> float:
        total = 0.0
        for user in body:
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            if not places or (user.opcode == "dynamic-update-slice" and places == [0]):
                continue
            if user.opcode == "dynamic-slice" and places == [0]:
                total += array_bytes(user.type)
            elif user.opcode == "bitcast":
                total += self._used(body, user.name)
            elif user.opcode == "fusion":
                total += sum(self._read(user.called("calls"), place) for place in places)
            else:
                return math.inf
        return total

    def _written(self, fused: str) -> float:
        """Bytes that a fusion writes, of results that it updates in place those of the update."""
        body = {each.name: each for each in self.computations[fused]}
        root = self.computations[fused][-1]
        results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        updates = (body[one.operands[1]] if one.opcode == "dynamic-update-slice" else one for one in results)
        return sum(array_bytes(one.type) for one in updates)


def hbm_bytes(operations: Sequence[Operation]) -> float:
    return sum(each.times * each.hbm_bytes for each in operations)


def cycles(operations: Sequence[Operation]) -> int:
    """All that have an estimate."""
    return sum(each.times * each.cycles for each in operations if each.cycles is not None)


def with_schedule(operations: Sequence[Operation], cycles: Mapping[str, float]) -> list[Operation]:
    """With the cycles of a schedule, by name, for what has no estimate. Equal kernels are scheduled once."""
    stems = {_stem(name): each for name, each in cycles.items()}

    def complete(each: Operation) -> Operation:
        name = each.instruction.name
        found = cycles.get(name, stems.get(_stem(name)) if "pallas_call" in each.label else None)
        return each._replace(cycles=found) if each.cycles is None else each

    return [complete(each) for each in operations]


def _stem(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)


def serial(operations: Sequence[Operation], program: Program) -> list[Operation]:
    """Those that gather, scatter or sort, also in a fusion, and custom calls: what may have no estimate of cycles."""
    found = []
    for each in operations:
        inner = program.computations.get(each.instruction.called("calls") or "", ())
        kinds = {each.instruction.opcode, *(one.opcode for one in inner)}
        if kinds & set(SERIAL) or each.instruction.opcode == "custom-call":
            found.append(each)
    return found


def collectives(operations: Sequence[Operation]) -> dict[str, dict[str, float]]:
    """By kind: how many there are in the program, how often they run, and the bytes of their results in all runs."""
    found: dict[str, dict[str, float]] = {}
    for each in operations:
        opcode = each.instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            size = array_bytes(each.instruction.type, False) / (2 if opcode.endswith("-start") else 1)
            entry = found.setdefault(kind, {"instructions": 0, "runs": 0, "bytes": 0.0})
            entry["instructions"] += 1
            entry["runs"] += each.times
            entry["bytes"] += each.times * size
    return found


def largest(operations: Sequence[Operation], count: int = 10) -> list[tuple[str, float, int]]:
    """(opcode and label, bytes, runs) of those that move most, operations of one label together."""
    moved, runs = collections.Counter(), collections.Counter()
    for each in operations:
        key = f"{each.instruction.opcode} {each.label[-110:]}"
        moved[key] += each.times * each.hbm_bytes
        runs[key] += each.times
    return [(key, total, runs[key]) for key, total in moved.most_common(count)]


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, tail = rest[:end], rest[end:].strip()
    opcode, opening = tail[: tail.index("(")], tail.index("(")
    closing = _closing(tail, opening)
    given = tail[opening + 1 : closing]
    attributes = (given if opcode in ("parameter", "constant") else "") + tail[closing + 1 :]
    return Instruction(name, type_, opcode, tuple(re.findall(r"%([\w.\-]+)", given)), attributes)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "({") - (text[i] in ")}")
        if not depth:
            return i
    return len(text) - 1
