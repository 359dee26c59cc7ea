"""Finds the collective operations in a compiled program, and the bytes that each device sends.

The program is the text of XLA's HLO after all optimizations. Collectives in a loop count as often
as the loop runs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^\s*([a-z][\w\-]*)\(")


class Collective(NamedTuple):
    """Collective operations of one kind and size.

    Attributes:
        kind: One of `KINDS`.
        payload: Bytes of the whole array: the summed one, the joined one, or the one that is
            exchanged or passed on.
        group_size: Number of devices that take part.
        count: How often a step runs it.
    """

    kind: str
    payload: int
    group_size: int
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring, the least that a device can send.

        A sum of S bytes over n devices sends 2 (n - 1) / n S: each part of it travels around once
        to be summed and once to be handed out. Joining, scattering and exchanging take one round.
        """
        if self.kind == "collective-permute":
            return float(self.count * self.payload)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.count * rounds * self.payload * (self.group_size - 1) / self.group_size


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


def find_collectives(program: str) -> list[Collective]:
    """Finds the collectives that one run of a program performs.

    Args:
        program: HLO text, such as that of `jax.jit(f).lower(x).compile().as_text()`.

    Returns:
        The collectives of more than one device, in the order of the program.

    Raises:
        ValueError: If the text has no entry computation, or a collective is in a form that is not
            known, or in a loop whose number of iterations is not known.
    """
    entry, computations = _parse(program)
    num_devices = math.prod(
        int(count) for count in re.findall(r"(?:num_partitions|replica_count)=(\d+)", program)
    )
    found = _walk(entry, computations, num_devices, 1)
    return [collective for collective in found if collective.group_size > 1]


def total(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Sums collectives by kind: how many operations, their payload, and what each device sends."""
    sums = {}
    for collective in collectives:
        row = sums.setdefault(collective.kind, {"operations": 0, "payload": 0, "sent": 0.0})
        row["operations"] += collective.count
        row["payload"] += collective.count * collective.payload
        row["sent"] += collective.sent
    return dict(sorted(sums.items()))


def _parse(program: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
    """Returns the name of the entry computation, and the instructions of all computations."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry = None
    current: dict[str, _Instruction] = {}
    # XLA numbers the elements of long tuples in comments, which also have an "=".
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            current[match[1]] = _parse_instruction(match[2])
    if entry is None:
        raise ValueError("the text has no ENTRY computation: pass the HLO of a compiled program")
    return entry, computations


def _parse_instruction(text: str) -> _Instruction:
    # A shape has no space, except between the elements of a tuple.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return _Instruction(shape, "", (), rest)
    end = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : end - 1]
    # Some versions print the shape of an operand in front of its name.
    names = re.findall(r"%([\w.\-]+)", arguments) or re.findall(r"[\w.\-]+", arguments)
    return _Instruction(shape, opcode[1], tuple(names), rest[end:])


def _closing(text: str, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"an HLO instruction has an open bracket: {text[:100]}")


def _walk(
    name: str, computations: dict[str, dict[str, _Instruction]], num_devices: int, count: int
) -> Iterator[Collective]:
    """Yields the collectives of a computation that runs `count` times and of those it calls."""
    instructions = computations[name]
    for instruction in instructions.values():
        # A pair of start and done is one collective; `async-start` wraps it in a computation.
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            payload = sum(_bytes(instructions[operand].shape) for operand in instruction.operands)
            size = _group_size(kind, instruction.attributes, num_devices)
            if kind == "all-gather":
                payload *= size
            yield Collective(kind, payload, size, count)
        for called in _called(instruction):
            inner = list(_walk(called, computations, num_devices, count))
            if inner and instruction.opcode == "while":
                iterations = _iterations(instruction.attributes)
                inner = [c._replace(count=c.count * iterations) for c in inner]
            yield from inner


def _called(instruction: _Instruction) -> Sequence[str]:
    """Returns the computations that an instruction runs. Reducers have no collectives."""
    names = r"%?([\w.\-]+)"
    if instruction.opcode == "while":
        return re.findall(rf"(?:body|condition)={names}", instruction.attributes)
    if instruction.opcode in ("fusion", "async-start"):
        return re.findall(rf"calls={names}", instruction.attributes)
    if instruction.opcode == "call":
        return re.findall(rf"to_apply={names}", instruction.attributes)
    if instruction.opcode == "conditional":
        # Every branch: which one runs is not known.
        branches = re.findall(r"branch_computations=\{(.*?)\}", instruction.attributes)
        either = re.findall(rf"(?:true|false)_computation={names}", instruction.attributes)
        return [*either, *(n for text in branches for n in re.findall(names, text))]
    return ()


def _iterations(attributes: str) -> int:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    if match is None:
        raise ValueError("a loop with collectives has no known number of iterations")
    return int(match[1])


def _bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple."""
    arrays = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return sum(
        _ITEM_BYTES[dtype] * math.prod(int(n) for n in re.findall(r"\d+", dimensions))
        for dtype, dimensions in arrays
    )


def _group_size(kind: str, attributes: str, num_devices: int) -> int:
    """Returns how many devices communicate with each other."""
    if kind == "collective-permute":
        (pairs,) = re.findall(r"source_target_pairs=\{(.*?\})\}", attributes) or ("",)
        moves = re.findall(r"\{(\d+),(\d+)\}", pairs)
        return len({device for pair in moves if pair[0] != pair[1] for device in pair})
    groups = re.search(r"replica_groups=(.*)", attributes)
    size = None if groups is None else _listed_group_size(groups[1], num_devices)
    if size is None:
        raise ValueError(f"{kind} has replica groups of an unknown form: {attributes[:100]}")
    return size


def _listed_group_size(groups: str, num_devices: int) -> int | None:
    """Returns the devices of a group in one of XLA's forms; `None` for an unknown one."""
    if groups.startswith("{}"):
        return num_devices
    if listed := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", groups):
        return max(len(group.split(",")) for group in listed[1].split("},{"))
    # [groups, devices of a group]<=[...]: consecutive numbers, whose axes may be transposed.
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    # mesh['data'=4,'model'=2] {'data'}: along axes, or parts of axes such as 'data':(1)2.
    if mesh := re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return None
