"""PTX as Triton writes it, read: one kernel's registers, labels and instructions."""

import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}


class Address(NamedTuple):
    """[base + offset]; base: a register, a symbol, or nothing."""

    base: str
    offset: int


class Instruction(NamedTuple):
    opcode: tuple[str, ...]
    """Split at the dots: ("ld", "global", "v4", "b32")."""
    operands: tuple
    """Each a register's, symbol's or number's text, an Address, or a tuple of these: {a, b} and a|b."""
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


def read(ptx: str) -> Kernel:
    """The kernel of a module that has one. Raises ValueError for what is not understood."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file|section)\b[^\n]*$", "", ptx, flags=re.S | re.M)
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx)
    if not head:
        raise ValueError("no kernel in this PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    if not threads:
        raise ValueError(f"{head[1]} does not say how many threads it has")
    registers: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    # inline assembly has blocks with names of their own
    scopes: list[dict[str, str]] = [{}]
    blocks = 0
    for statement in ptx[head.end() :].split(";"):
        text = statement.strip()
        while scopes and (match := re.match(r"([{}]|[\w$]+:(?!:))\s*", text)):
            text = text[match.end() :]
            if match[1] == "{":
                scopes.append({})
                blocks += 1
            elif match[1] == "}":
                scopes.pop()
            else:
                name = match[1][:-1]
                scopes[-1][name] = f"{name}@{blocks}" if len(scopes) > 1 else name
                labels[scopes[-1][name]] = len(instructions)
        if not scopes:  # what follows is for debuggers
            break
        if text.startswith(".reg"):
            _, kind, names = re.split(r"\s+", text, maxsplit=2)
            bits = WIDTHS[re.sub(r"^[bsuf](?=\d)", "", kind[1:])]
            for name in re.split(r"\s*,\s*", names.strip()):
                if counted := re.fullmatch(r"(%\w+)<(\d+)>", name):
                    registers |= {f"{counted[1]}{place}": bits for place in range(int(counted[2]))}
                else:
                    scopes[-1][name] = f"{name}@{blocks}" if len(scopes) > 1 else name
                    registers[scopes[-1][name]] = bits
        elif text and not text.startswith("."):
            instructions.append(_instruction(text, scopes))
        elif text and not text.startswith((".pragma", ".local", ".param")):
            raise ValueError(f"not understood: {text}")
    return Kernel(
        head[1],
        tuple(re.findall(r"([\w$]+)\s*(?:,|$)", head[2].strip())),
        int(threads[1]),
        registers,
        tuple(instructions),
        labels,
    )


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
