"""An instruction of PTX becomes lines of Python over arrays, an element per thread.

A value that all threads share may be an array of one. In the lines, `m` is the machine that runs
(machine.Batch), `R` the registers that several basic blocks know, `M` the threads that take part
(None: all), `fp` is arithmetic.py.
"""

import re
from typing import Any

import numpy as np

from . import arithmetic
from .isa import DTYPE, SHARED_BASE, SHARED_WINDOW, SPECIAL, WIDTH, Unsupported
from .parse import Entry, Instruction, Operand

_NEARLY = {"rcp": "nearly_inverse", "ex2": "nearly_exp2"}  # .approx.ftz
_KNOWN = {*WIDTH, "rn", "lo", "hi", "wide"}
# Of loads and stores; none changes what is read or written here.
_HINTS = re.compile(r"(?:L1|L2)::\w+|nc|wb|cg|ca|cs|lu|cv|wt|weak|volatile")
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_SIMPLE = {
    **{"add": "{} + {}", "sub": "{} - {}", "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}"},
    **{"not": "~{}", "neg": "-{}", "abs": "np.abs({})", "sqrt": "np.sqrt({})"},
}
_HALVES = {"f16x2": "f16", "bf16x2": "bf16"}


class Translator:
    """Of one entry. `home`: register -> its place in R; others are variables of one basic block."""

    def __init__(self, entry: Entry, home: dict[str, int]):
        self.entry, self.home = entry, home
        self.names: dict[str, Any] = {"np": np, "where": np.where, "fp": arithmetic}
        self.symbols: dict[str, int] = {}  # the offsets of parameters, the addresses in .shared
        at = 0
        for v in entry.params:
            at = -(-at // v.alignment) * v.alignment
            self.symbols[v.name] = at
            at += v.size
        self.param_bytes, at = at, 0
        for v in sorted(entry.shared.values(), key=lambda v: v.size == 0):  # extern comes last
            at = -(-at // v.alignment) * v.alignment
            self.symbols[v.name] = SHARED_BASE + at
            at += v.size
        self.static_shared = at
        self.constants = 0

    def translate(self, i: Instruction, at: int) -> list[str]:
        """`at`: its place in the entry.

        Raises:
            Unsupported: not known, with its line.
        """
        try:
            special = getattr(self, "do_" + i.opcode, None)
            return special(i, at) if special else self.plain(i)
        except (Unsupported, KeyError, IndexError, ValueError) as e:
            raise Unsupported(f"{self.entry.name} line {i.line}: {i.text} ({e})") from e

    # ---------------------------------------------------------------- operands
    def name(self, register: str) -> str:
        if register in self.home:
            return f"R[{self.home[register]}]"
        return "v_" + re.sub(r"\W", "_", register)

    def constant(self, value: Any, dtype: Any) -> str:
        if isinstance(value, int) and dtype is not np.bool_:
            size = np.dtype(dtype).itemsize
            bits = np.array([value & ((1 << 8 * size) - 1)], np.uint64)
            value = bits.astype(f"u{size}").view(dtype)
        self.constants += 1
        name = f"k{self.constants}"
        self.names[name] = np.asarray(value, dtype).reshape(1)
        return name

    def get(self, x: Operand, kind: str) -> str:
        """The operand as an array of the type `kind`."""
        if isinstance(x, tuple):
            raise Unsupported("a vector")
        if x in self.entry.registers:
            bits, want = self.entry.registers[x], WIDTH[kind]
            if kind == "pred" or (bits == want and kind[0] in "bu" and kind != "bf16"):
                return self.name(x)
            if kind == "bf16":
                return f"fp.bf16_value({self.name(x)})"
            if bits < want:
                raise Unsupported(f"{x} is too narrow")
            narrow = self.name(x) if bits == want else f"{self.name(x)}.astype(np.uint{want})"
            return narrow if kind[0] in "bu" else f"{narrow}.view(np.{DTYPE[kind].__name__})"
        if SPECIAL.match(x):
            value = f"m.special({x[1:]!r})"
            return value if WIDTH[kind] == 32 else f"{value}.astype(np.uint{WIDTH[kind]})"
        if x in self.symbols:
            return self.constant(self.symbols[x], DTYPE[kind])
        if x[:2].lower() in ("0f", "0d"):
            number = np.array([int(x[2:], 16)], np.uint32 if x[1] in "fF" else np.uint64)
            return self.constant(number.view(DTYPE[kind]), DTYPE[kind])
        return self.constant(int(x.rstrip("U"), 0), DTYPE[kind])

    def address(self, operand: Operand) -> str:
        if isinstance(operand, tuple):
            raise Unsupported("a vector")
        base, _, offset = operand.strip("[]").partition("+")
        if base in self.symbols:
            return self.constant(self.symbols[base] + int(offset or 0), np.uint64)
        bits, at = self.entry.registers[base], self.name(base)
        if offset:
            at = f"({at} + {self.constant(int(offset), DTYPE[f'u{bits}'])})"
        return at if bits == 64 else f"{at}.astype(np.uint64)"

    def guard(self, i: Instruction) -> str:
        return ("~" if i.negated else "") + self.name(i.predicate) if i.predicate else ""

    def mask(self, i: Instruction) -> str:
        """The threads that take part in a guarded instruction with effects."""
        return f"m.both(M, {self.guard(i)})" if i.predicate else "M"

    def put(self, i: Instruction, register: Operand, value: str, kind: str) -> list[str]:
        """The lines that give the register a value of the type `kind`."""
        if register == "_":
            return []
        if isinstance(register, tuple):
            raise Unsupported("a vector")
        bits, have = self.entry.registers[register], WIDTH[kind]
        if bits == 1:
            pass
        elif have == bits:
            value = f"({value})" + ("" if kind[0] in "bu" else f".view(np.uint{bits})")
        elif kind[0] == "s":
            value = f"({value}).astype(np.int{bits}).view(np.uint{bits})"
        else:
            value = f"({value}).astype(np.uint{bits})"
        name, guard = self.name(register), self.guard(i)
        if register not in self.home:
            return [f"{name} = where({guard}, {value}, {name})" if guard else f"{name} = {value}"]
        if guard:
            on = f"{guard} if M is None else {guard} & M"
            return [f"{name} = where({on}, {value}, {name})"]
        return [f"t = {value}", f"{name} = t if M is None else where(M, t, {name})"]

    # ---------------------------------------------------------------- arithmetic
    def plain(self, i: Instruction) -> list[str]:
        if i.opcode in _NEARLY and i.modifiers[:2] == ["approx", "ftz"] and i.type == "f32":
            value = f"fp.{_NEARLY[i.opcode]}({self.get(i.operands[1], 'f32')})"
            return self.put(i, i.operands[0], value, "f32")
        if not set(i.modifiers) <= _KNOWN:
            raise Unsupported("a modifier")
        kind, is_float = i.type, i.type.startswith("f")
        if kind in (*_HALVES, *_HALVES.values()):
            raise Unsupported("arithmetic of half precision")
        if i.opcode in ("shl", "shr"):
            return self.shift(i)
        a = [self.get(x, kind) for x in i.operands[1:]]
        if i.opcode in _SIMPLE:
            value = _SIMPLE[i.opcode].format(*a)
        elif i.opcode in ("min", "max"):
            function = f"f{i.opcode}" if is_float else f"{i.opcode}imum"
            value = f"np.{function}({a[0]}, {a[1]})"
        elif i.opcode == "rcp":
            value = f"np.{DTYPE[kind].__name__}(1) / {a[0]}"
        elif i.opcode == "div":
            value = f"{a[0]} / {a[1]}" if is_float else f"fp.divide({a[0]}, {a[1]})"
        elif i.opcode == "rem" and not is_float:
            value = f"fp.remainder({a[0]}, {a[1]})"
        elif i.opcode == "fma":
            value = f"fp.fma{WIDTH[kind]}({', '.join(a)})"
        elif i.opcode == "popc":
            value, kind = f"fp.count_bits({a[0]})", "u32"
        elif i.opcode in ("mul", "mad"):
            if is_float and i.opcode == "mad":
                raise Unsupported("which rounding")
            if "wide" in i.modifiers:
                kind = f"{kind[0]}{2 * WIDTH[kind]}"
                value = " * ".join(f"{x}.astype(np.{DTYPE[kind].__name__})" for x in a[:2])
            elif "hi" in i.modifiers:
                value = f"fp.multiply_high({a[0]}, {a[1]})"
            elif is_float or "lo" in i.modifiers:
                value = f"{a[0]} * {a[1]}"
            else:
                raise Unsupported("which half")
            if i.opcode == "mad":
                value += f" + {self.get(i.operands[3], kind)}"
        else:
            raise Unsupported("an opcode")
        return self.put(i, i.operands[0], value, kind)

    def shift(self, i: Instruction) -> list[str]:
        kind = i.type
        bits, dtype, by = WIDTH[kind], DTYPE[kind].__name__, self.get(i.operands[2], "u32")
        x = self.get(i.operands[1], kind)
        if i.opcode == "shr" and kind[0] == "s":
            value = f"{x} >> np.minimum({by}, np.uint32({bits - 1})).astype(np.{dtype})"
        else:
            sign = "<<" if i.opcode == "shl" else ">>"
            shifted = f"{x} {sign} ({by} & np.uint32({bits - 1})).astype(np.{dtype})"
            value = f"where({by} < {bits}, {shifted}, np.{dtype}(0))"
        return self.put(i, i.operands[0], value, kind)

    def of_32_bits(
        self, i: Instruction, function: str, forms: list[list[str]], more: str = ""
    ) -> list[str]:
        if i.modifiers not in forms:
            raise Unsupported("a form")
        a = ", ".join(self.get(x, "u32") for x in i.operands[1:])
        return self.put(i, i.operands[0], f"fp.{function}({a}{more})", "b32")

    def do_shf(self, i: Instruction, at: int) -> list[str]:
        forms = [[way, edge, "b32"] for way in "lr" for edge in ("wrap", "clamp")]
        return self.of_32_bits(
            i, "funnel", forms, f", {'l' in i.modifiers}, {'wrap' in i.modifiers}"
        )

    def do_bfi(self, i: Instruction, at: int) -> list[str]:
        return self.of_32_bits(i, "insert", [["b32"]])

    def do_bfe(self, i: Instruction, at: int) -> list[str]:
        return self.of_32_bits(i, "extract", [["u32"]])

    def do_prmt(self, i: Instruction, at: int) -> list[str]:
        return self.of_32_bits(i, "permute", [["b32"]])

    def do_lop3(self, i: Instruction, at: int) -> list[str]:
        if i.modifiers != ["b32"]:
            raise Unsupported("a form")
        a = ", ".join(self.get(x, "u32") for x in i.operands[1:4])
        table = int(str(i.operands[4]), 0)
        return self.put(i, i.operands[0], f"fp.look_up({a}, {table})", "b32")

    def do_selp(self, i: Instruction, at: int) -> list[str]:
        a, b = (self.get(x, i.type) for x in i.operands[1:3])
        return self.put(
            i, i.operands[0], f"where({self.get(i.operands[3], 'pred')}, {a}, {b})", i.type
        )

    def do_setp(self, i: Instruction, at: int) -> list[str]:
        if len(i.operands) > 3 or "|" in str(i.operands[0]) or i.type in ("f16", "bf16"):
            raise Unsupported("a form")
        a, b = (self.get(x, i.type) for x in i.operands[1:3])
        how = i.modifiers[0]
        if i.type[0] == "f" and how not in _COMPARE and how != "ne":  # equ, neu, ...: or NaN
            value = f"({a} {_COMPARE[how[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
        elif i.type[0] == "f" and how == "ne":
            value = f"({a} != {b}) & ~np.isnan({a}) & ~np.isnan({b})"
        else:
            value = f"{a} {_COMPARE[how]} {b}"
        return self.put(i, i.operands[0], value, "pred")

    # ---------------------------------------------------------------- moves and conversions
    def do_mov(self, i: Instruction, at: int) -> list[str]:
        to, source = i.operands
        bits = WIDTH[i.type]
        whole = f"np.uint{bits}"
        if isinstance(source, tuple):
            part = bits // len(source)
            pieces = [
                f"({self.get(x, f'b{part}')}.astype({whole}) << {whole}({part * n}))"
                for n, x in enumerate(source)
            ]
            return self.put(i, to, " | ".join(pieces), i.type)
        if isinstance(to, tuple):
            part = bits // len(to)
            lines = [f"u = {self.get(source, f'b{bits}')}"]
            for n, x in enumerate(to):
                piece = f"(u >> {whole}({part * n})).astype(np.uint{part})"
                lines += self.put(i, x, piece, f"b{part}")
            return lines
        return self.put(i, to, self.get(source, i.type), i.type)

    def do_cvt(self, i: Instruction, at: int) -> list[str]:
        *modes, to, source = i.modifiers
        if modes not in ([], ["rn"]) or (source[0] == "f" and to[0] not in "fb"):
            raise Unsupported("a form")
        values = [self.get(x, source) for x in i.operands[1:]]
        if to in _HALVES:
            high, low = (f"fp.{_HALVES[to]}_bits({v})" for v in values)
            return self.put(i, i.operands[0], f"fp.pack({high}, {low})", "b32")
        if to == "bf16":
            return self.put(i, i.operands[0], f"fp.bf16_bits({values[0]})", "b16")
        return self.put(i, i.operands[0], f"{values[0]}.astype(np.{DTYPE[to].__name__})", to)

    def do_cvta(self, i: Instruction, at: int) -> list[str]:
        value = self.get(i.operands[1], "u64")
        if "shared" in i.modifiers:
            value += f" {'-' if 'to' in i.modifiers else '+'} np.uint64({SHARED_WINDOW})"
        elif "global" not in i.modifiers:
            raise Unsupported("a state space")
        return self.put(i, i.operands[0], value, "u64")

    def do_mapa(self, i: Instruction, at: int) -> list[str]:
        address, rank = self.get(i.operands[1], i.type), self.get(i.operands[2], "u32")
        return self.put(i, i.operands[0], f"m.map_shared({address}, {rank})", i.type)

    # ---------------------------------------------------------------- memory
    def space(self, i: Instruction) -> str:
        spaces = ("param", "global", "shared")
        for modifier in i.modifiers:
            known = modifier in spaces or modifier in WIDTH or modifier in ("v2", "v4")
            if not (known or _HINTS.fullmatch(modifier)):
                raise Unsupported(modifier)
        return next((m for m in i.modifiers if m in spaces), "generic")

    def do_ld(self, i: Instruction, at: int) -> list[str]:
        space, to = self.space(i), i.operands[0]
        to = to if isinstance(to, tuple) else (to,)
        size = WIDTH[i.type] // 8
        address = self.address(i.operands[1])
        if space == "param":
            lines = [f"l = m.load_param({address}, {size}, {len(to)}, {self.mask(i)}, {at})"]
        else:
            lines = [f"l = m.load({space!r}, {address}, {size}, {len(to)}, {self.mask(i)}, {at})"]
        signed = i.type[0] == "s"
        for n, x in enumerate(to):
            view = f".view(np.int{8 * size})" if signed else ""
            lines += self.put(i, x, f"l[{n}]{view}", i.type if signed else f"u{8 * size}")
        return lines

    def do_st(self, i: Instruction, at: int) -> list[str]:
        source, size = i.operands[1], WIDTH[i.type] // 8
        values = source if isinstance(source, tuple) else (source,)
        listed = ", ".join(self.get(x, f"b{8 * size}") for x in values)
        where = f"{self.space(i)!r}, {self.address(i.operands[0])}"
        return [f"m.store({where}, ({listed},), {size}, {self.mask(i)}, {at})"]

    def do_cp(self, i: Instruction, at: int) -> list[str]:
        if i.modifiers == ["async", "commit_group"]:
            return [f"m.commit({self.mask(i)})"]
        if i.modifiers == ["async", "wait_group"]:
            return [f"m.wait_copies({int(str(i.operands[0]))}, {self.mask(i)}, {at})"]
        if i.modifiers == ["async", "wait_all"]:
            return [f"m.commit({self.mask(i)})", f"m.wait_copies(0, {self.mask(i)}, {at})"]
        if i.modifiers[:1] != ["async"] or i.modifiers[1] not in ("ca", "cg"):
            raise Unsupported("a form")
        if i.operands[3:] not in ([], [i.operands[2]]):
            raise Unsupported("a copy of fewer bytes than it writes")
        to, source = (self.address(x) for x in i.operands[:2])
        return [f"m.copy({to}, {source}, {int(str(i.operands[2]))}, {self.mask(i)}, {at})"]

    # ---------------------------------------------------------------- threads together
    def do_shfl(self, i: Instruction, at: int) -> list[str]:
        if i.modifiers[0] != "sync" or i.predicate:
            raise Unsupported("a form")
        a = ", ".join(self.get(x, "u32") for x in i.operands[1:5])
        to, _, inside = str(i.operands[0]).partition("|")
        lines = [
            f"s = m.shuffle({i.modifiers[1]!r}, {a}, M, {at})",
            *self.put(i, to, "s[0]", "b32"),
        ]
        return lines + (self.put(i, inside, "s[1]", "pred") if inside else [])

    def do_bar(self, i: Instruction, at: int) -> list[str]:
        if i.predicate or i.operands != ["0"] or i.modifiers not in (["sync"], ["cta", "sync"]):
            raise Unsupported("a form")
        return ["m.passed_barrier(M)"]

    def do_barrier(self, i: Instruction, at: int) -> list[str]:
        if i.modifiers[:1] == ["sync"] or i.modifiers[:2] == ["cta", "sync"]:
            return self.do_bar(i, at)
        forms = [
            ["cluster", what, *more]
            for what, more in (
                ("arrive", []),
                ("arrive", ["release"]),
                ("arrive", ["relaxed"]),
                ("wait", []),
                ("wait", ["acquire"]),
            )
        ]
        if i.predicate or [m for m in i.modifiers if m != "aligned"] not in forms:
            raise Unsupported("a form")
        more = ", relaxed=True" if "relaxed" in i.modifiers else ""
        return [f"m.cluster_{i.modifiers[1]}(M{more})"]

    def do_bra(self, i: Instruction, at: int) -> list[str]:
        return [f"return {self.guard(i)}"] if i.predicate else []

    do_ret = do_exit = do_bra

    def do_griddepcontrol(self, i: Instruction, at: int) -> list[str]:
        return []  # kernels of a call run one after the other here
