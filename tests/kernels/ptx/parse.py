"""PTX text to entries: instructions with operands as text, registers with their widths, labels."""

import re
from dataclasses import dataclass, field

from .isa import WIDTH, Unsupported

Operand = str | tuple[str, ...]  # a vector operand is a tuple


@dataclass
class Instruction:
    opcode: str  # up to the first dot
    modifiers: list[str]
    operands: list[Operand]
    predicate: str | None  # the register of @p
    negated: bool  # @!p
    line: int
    text: str

    @property
    def type(self) -> str:
        """The last type among the modifiers, or nothing."""
        return next((m for m in reversed(self.modifiers) if m in WIDTH), "")


@dataclass
class Variable:
    name: str
    size: int  # bytes; of an array without a size: 0
    alignment: int


@dataclass
class Entry:
    name: str
    params: list[Variable] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # bits, 1: a predicate
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the place of an instruction
    shared: dict[str, Variable] = field(default_factory=dict)


_VARIABLE = re.compile(
    r"\.(?:param|shared|local|global|const)\s*(?:\.align\s+(\d+)\s*)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
)
_STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;]*);)")
_NAME = re.compile(r"[%$\w.]+")


def variable(text: str) -> Variable:
    found = _VARIABLE.search(text)
    if found is None:
        raise Unsupported(f"a declaration: {text.strip()}")
    align, kind, name, count = found.groups()
    size = WIDTH[kind] // 8
    return Variable(name, size * (int(count or 0) if count is not None else 1), int(align or size))


def operands(text: str) -> list[Operand]:
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(text[last:i].strip())
            last = i + 1
    parts.append(text[last:].strip())
    return [
        tuple(x.strip() for x in p[1:-1].split(",")) if p.startswith("{") else p for p in parts if p
    ]


class _Scopes:
    """Names of registers that are declared in inner braces, as CUDA's inline PTX does."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, str]] = [{}]
        self.used = 0

    def declare(self, name: str) -> str:
        if len(self.scopes) == 1:
            return name
        self.used += 1
        self.scopes[-1][name] = f"{name}_{self.used}"
        return self.scopes[-1][name]

    def _rename(self, name: "re.Match[str]") -> str:
        inner = (s for s in reversed(self.scopes) if name.group() in s)
        return next(inner, {}).get(name.group(), name.group())

    def rename(self, text: str) -> str:
        return _NAME.sub(self._rename, text)


class Module:
    """The entries of a PTX file, parsed when they are asked for."""

    def __init__(self, text: str):
        def blank(match: "re.Match[str]") -> str:  # the lines keep their numbers
            return "\n" * match.group().count("\n")

        text = re.sub(r"/\*.*?\*/", blank, text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
        self.text = text
        self.starts = {m.group(1): m.end() for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text)}
        if function := re.search(r"\.func\b", text):
            line = text.count("\n", 0, function.start()) + 1
            raise Unsupported(f"line {line}: a function that is not inlined")
        self._entries: dict[str, Entry] = {}
        self.shared: dict[str, Variable] = {}
        for declared in re.findall(r"\.shared[^;]*;", text[: min(self.starts.values(), default=0)]):
            v = variable(declared)
            self.shared[v.name] = v

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            self._entries[name] = self._parse(name)
        return self._entries[name]

    def extract(self, name: str) -> str:
        """PTX with this entry only."""
        entries = [m.start() for m in re.finditer(r"(?:\.visible\s+)?\.entry\b", self.text)]
        begin = max(at for at in entries if at < self.starts[name])
        end = min((at for at in entries if at > begin), default=len(self.text))
        return self.text[: entries[0]] + self.text[begin:end]

    def _parse(self, name: str) -> Entry:
        text, entry = self.text, Entry(name, shared=dict(self.shared))
        at = self.starts[name]
        end = text.index(")", at)
        entry.params = [variable(p) for p in text[at:end].split(",") if p.strip()]
        at = text.index("{", end) + 1
        line = text.count("\n", 0, at) + 1
        scopes = _Scopes()
        while scopes.scopes:
            m = _STATEMENT.match(text, at)
            if m is None or m.lastindex is None:
                raise Unsupported(f"{name} line {line}: {text[at : at + 80].strip()}")
            line += text.count("\n", at, m.start(m.lastindex))
            brace, label, body = m.groups()
            if brace == "{":
                scopes.scopes.append({})
            elif brace == "}":
                scopes.scopes.pop()
            elif label:
                entry.labels[label] = len(entry.instructions)
            elif body:
                _statement(entry, scopes, body, line)
            line += text.count("\n", m.start(m.lastindex), m.end())
            at = m.end()
        return entry


def _statement(entry: Entry, scopes: _Scopes, body: str, line: int) -> None:
    if body.startswith(".reg"):
        kind, names = _match(r"\.reg\s+\.(\w+)\s+(.*)", body).groups()
        for n in (x.strip() for x in names.split(",")):
            ranged = re.match(r"(.*)<(\d+)>", n)
            for x in [ranged[1] + str(i) for i in range(int(ranged[2]))] if ranged else [n]:
                entry.registers[scopes.declare(x)] = WIDTH[kind]
    elif body.startswith(".shared"):
        v = variable(body)
        entry.shared[v.name] = v
    elif body.startswith(".local"):
        raise Unsupported(f"{entry.name} line {line}: local memory: {body}")
    elif not body.startswith("."):  # .pragma and the like say nothing about results
        guard, full, rest = _match(r"(?:@(!?\S+)\s+)?(\S+)\s*(.*)", body).groups()
        opcode, *modifiers = full.split(".")
        renamed: list[Operand] = [
            tuple(scopes.rename(x) for x in o) if isinstance(o, tuple) else scopes.rename(o)
            for o in operands(rest)
        ]
        entry.instructions.append(
            Instruction(
                opcode,
                modifiers,
                renamed,
                scopes.rename(guard.lstrip("!")) if guard else None,
                bool(guard) and guard[0] == "!",
                line,
                " ".join(body.split()),
            )
        )


def _match(pattern: str, text: str) -> "re.Match[str]":
    found = re.match(pattern, text, re.DOTALL)
    if found is None:
        raise Unsupported(f"a statement: {text}")
    return found
