"""PTX as Triton and nvcc write it, read: one kernel's registers, labels and instructions."""

import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}


class Address(NamedTuple):
    """[base + offset]; base: a register, a symbol, or nothing."""

    base: str
    offset: int


class Tensor(NamedTuple):
    """[map, {coordinates}]: a place in what a tensor map describes."""

    base: str
    coordinates: tuple[str, ...]


class Instruction(NamedTuple):
    opcode: tuple[str, ...]
    """Split at the dots: ("ld", "global", "v4", "b32")."""
    operands: tuple
    """Each a register's, symbol's or number's text, an Address, a Tensor, or a tuple of these: {a, b} and a|b."""
    predicate: str
    """Register, or "" for always."""
    negated: bool
    text: str


class Kernel(NamedTuple):
    name: str
    parameters: tuple[str, ...]
    threads: int
    registers: dict[str, int]
    """Bits of each, 1 for predicates."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Which instruction each stands before."""
    shared: str
    """What the memory of a program is called that its launch makes room for."""
    local: tuple[str, int]
    """The memory of a thread: its name and its bytes."""


def read(ptx: str, part: str = "") -> Kernel:
    """The kernel of a module that has one, or has one whose name the regular expression `part` is found in. Raises
    ValueError for what is not understood."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file|section)\b[^\n]*$", "", ptx, flags=re.S | re.M)
    head = re.search(rf"\.entry\s+([\w$]*{part}[\w$]*)\s*\(([^)]*)\)([^{{]*)\{{", ptx)
    if not head:
        raise ValueError("no kernel in this PTX")
    shared = re.search(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\]", ptx[: head.start()])
    local = ("", 0)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    if not threads:
        raise ValueError(f"{head[1]} does not say how many threads it has")
    registers: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    # inline assembly has blocks with names of their own
    scopes: list[dict[str, str]] = [{}]
    numbers = [0]
    blocks = 0
    jumps = []
    for statement in ptx[head.end() :].split(";"):
        text = statement.strip()
        while scopes and (match := re.match(r"([{}]|[\w$]+:(?!:))\s*", text)):
            text = text[match.end() :]
            if match[1] == "{":
                scopes.append({})
                blocks += 1
                numbers.append(blocks)
            elif match[1] == "}":
                scopes.pop()
                numbers.pop()
            else:
                labels[_own(match[1][:-1], numbers)] = len(instructions)
        if not scopes:  # what follows is for debuggers
            break
        if text.startswith(".reg"):
            _, kind, names = re.split(r"\s+", text, maxsplit=2)
            bits = WIDTHS[re.sub(r"^[bsuf](?=\d)", "", kind[1:])]
            for name in re.split(r"\s*,\s*", names.strip()):
                if counted := re.fullmatch(r"(%\w+)<(\d+)>", name):
                    registers |= {f"{counted[1]}{place}": bits for place in range(int(counted[2]))}
                else:
                    scopes[-1][name] = _own(name, numbers)
                    registers[scopes[-1][name]] = bits
        elif text.startswith(".local"):
            name, size = re.search(r"([\w$]+)\[(\d+)\]", text).groups()
            local = (name, int(size))
        elif text and not text.startswith("."):
            instructions.append(_instruction(text, scopes))
            jumps.append(tuple(numbers))
        elif text and not text.startswith((".pragma", ".param")):
            raise ValueError(f"not understood: {text}")
    for at, (instruction, inside) in enumerate(zip(instructions, jumps, strict=True)):
        if instruction.opcode[0] == "bra":  # a block's label may stand behind what jumps to it
            ways = (_own(instruction.operands[0], inside[:depth]) for depth in range(len(inside), 0, -1))
            instructions[at] = instruction._replace(operands=(next(way for way in ways if way in labels),))
    return Kernel(
        head[1],
        tuple(re.findall(r"([\w$]+)\s*(?:\[\d+\])?\s*(?:,|$)", head[2].strip())),
        int(threads[1]),
        registers,
        tuple(instructions),
        labels,
        shared[1] if shared else "",
        local,
    )


def _own(name: str, numbers) -> str:
    """What a name of the innermost of blocks `numbers` is called outside of it."""
    return f"{name}@{numbers[-1]}" if len(numbers) > 1 else name


def _instruction(text: str, scopes: list[dict[str, str]]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?(\S+)\s*(.*)", text, flags=re.S)
    assert match
    negated, predicate, opcode, rest = match.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^\s,{}\[\]]+", rest)
    return Instruction(
        tuple(opcode.split(".")),
        tuple(_operand(one, scopes) for one in operands),
        _name(predicate, scopes) if predicate else "",
        bool(negated),
        re.sub(r"\s+", " ", text),
    )


def _operand(text: str, scopes: list[dict[str, str]]):
    if text[0] == "{":
        return tuple(_name(one, scopes) for one in re.findall(r"[^\s,{}]+", text))
    if text[0] == "[" and "{" in text:
        base, *coordinates = re.findall(r"[^\s,\[\]{}]+", text)
        return Tensor(_name(base, scopes), tuple(_name(one, scopes) for one in coordinates))
    if text[0] == "[":
        base, _, offset = re.sub(r"\s", "", text[1:-1]).partition("+")
        if re.match(r"-?\d", base):
            return Address("", int(base, 0))
        return Address(_name(base, scopes), int(offset or "0", 0))
    if "|" in text:
        return tuple(_name(one, scopes) for one in text.split("|"))
    return _name(text, scopes)


def _name(text: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[text] for scope in reversed(scopes) if text in scope), text)
