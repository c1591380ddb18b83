"""Sums of products as LLVM vector instructions: what `kernels` is made of, for each number format of the weights.

A dot product is a loop over vectors of WIDTH numbers with one accumulator for each pair of a row and an output, added up
at its end in a fixed order. Several rows or outputs at once only interleave such loops, so a result's bits do not depend
on how many there are. The vectors are LLVM's own: it cuts them to what the processor has (AVX-512, AVX2, NEON).

A format is named by the type of a number, its token: float32; uint16 for float16; int16 for bfloat16; int8 for integers.
Stored numbers are widened to float32 in registers (`vcvtph2ps`, `fcvtl`; bfloat16 is the upper half of a float32). With
int8 weights the row is rounded to as many bits and the sums are exact integers.
"""

from __future__ import annotations

# Numba infers the types of compiled functions and gives intrinsics their first argument
# mypy: disable-error-code="no-untyped-def, call-arg"
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

CHOSEN = numba.config.CPU_FEATURES  # type: ignore[attr-defined]  # $NUMBA_CPU_FEATURES: "+avx2,+fma,+f16c"
FEATURES = (
    {name for name, has in llvm.get_host_cpu_features().items() if has}
    if CHOSEN is None
    else {name[1:] for name in CHOSEN.split(",") if name.startswith("+")}
)
X86 = llvm.get_default_triple().startswith(("x86", "i"))
WIDTH = 16 if "avx512f" in FEATURES else 8
FMA = "fma" in FEATURES or not X86  # without it a call for each number
HALF = "f16c" in FEATURES or not X86  # float16 is widened by an instruction
# 8-bit products summed in fours by one instruction: (its name, bytes a vector) or None
VNNI = ("llvm.x86.avx512.vpdpbusd.512", 64) if "avx512vnni" in FEATURES else None

F32, F16, I8, I16, I32, I64 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = {F32: 4, F16: 2, I16: 2, I8: 1}
STORED = {types.float32: F32, types.uint16: F16, types.int16: I16, types.int8: I8}


def _load(builder: Any, base: Any, index: Any, stored: Any, count: int) -> Any:
    """`count` stored numbers from number `index` on, as a vector (count > 1) or a number; at any alignment."""
    pointer = builder.gep(builder.inttoptr(base, stored.as_pointer()), [index])
    if count == 1:
        return builder.load(pointer, align=1)
    return builder.load(builder.bitcast(pointer, ir.VectorType(stored, count).as_pointer()), align=1)


def _like(value: Any, element: Any) -> Any:
    """`element`, or a vector of it as long as `value`."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _widen(builder: Any, value: Any, stored: Any) -> Any:
    """Stored numbers as float32."""
    if stored is F16:
        return builder.fpext(value, _like(value, F32))
    if stored is I16:  # bfloat16: the upper half of a float32
        wide = builder.zext(value, _like(value, I32))
        sixteen = ir.Constant(wide.type, [16] * wide.type.count if isinstance(wide.type, ir.VectorType) else 16)
        return builder.bitcast(builder.shl(wide, sixteen), _like(value, F32))
    if stored is I8:
        return builder.sitofp(value, _like(value, F32))
    return value


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """a b + total, rounded once where the processor can."""
    if not FMA:
        return builder.fadd(builder.fmul(a, b), total)
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return builder.call(_declared(builder, f"llvm.fma.{suffix}", a.type), [a, b, total])


def _declared(builder: Any, name: str, kind: Any) -> Any:
    """LLVM's function `name` of three values of one type."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(kind, [kind] * 3), name)


def _total(builder: Any, vector: Any, add: Callable[[Any, Any], Any]) -> Any:
    """The sum of a vector's numbers: halves added to halves."""
    count = vector.type.count
    while count > 1:
        count //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                vector, undefined, ir.Constant(ir.VectorType(I32, count), list(range(at, at + count)))
            )
            for at in (0, count)
        )
        vector = add(low, high)
    return builder.extract_element(vector, I32(0))


def _eight_totals(builder: Any, eight: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """The sums of eight vectors of eight numbers as one vector, each in the order of `_total` but with fewer instructions."""

    def halves(a: Any, b: Any, low: list[int], step: int) -> Any:
        lanes = (ir.Constant(ir.VectorType(I32, 8), [lane + at for lane in low]) for at in (0, step))
        return add(*(builder.shuffle_vector(a, b, chosen) for chosen in lanes))

    fours = [halves(eight[at], eight[at + 4], [0, 1, 2, 3, 8, 9, 10, 11], 4) for at in range(4)]
    twos = [halves(fours[at], fours[at + 1], [0, 1, 8, 9, 4, 5, 12, 13], 2) for at in (0, 2)]
    return halves(*twos, [0, 2, 8, 10, 4, 6, 12, 14], 1)


def _loop(builder: Any, start: Any, stop: Any, step: int, held: list[Any], body: Callable[[Any, list[Any]], list[Any]]):
    """`for index in range(start, stop, step): held = body(index, held)`; returns what is held at the end."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    phis = [builder.phi(value.type) for value in held]
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    new = body(index, phis)
    following = builder.add(index, I64(step))
    end = builder.block
    builder.branch(head)
    for phi, first, later in zip([index, *phis], [start, *held], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    builder.position_at_end(after)
    return phis


def _integer_step(builder: Any, weights: Any, x: Any, total: Any) -> Any:
    """total [int32 vector] plus the products of int8 weights and of a row's int16 numbers (with VNNI: uint8, plus 128)."""
    if VNNI:
        vector = ir.VectorType(I32, VNNI[1] // 4)
        return builder.call(
            _declared(builder, VNNI[0], vector), [total, builder.bitcast(x, vector), builder.bitcast(weights, vector)]
        )
    # neighbouring 16-bit products added in 32 bits: pmaddwd, smlal
    wide = ir.VectorType(I32, weights.type.count)
    product = builder.mul(builder.sext(weights, wide), builder.sext(x, wide))
    undefined, half = ir.Constant(wide, ir.Undefined), wide.count // 2
    even, odd = (
        builder.shuffle_vector(
            product, undefined, ir.Constant(ir.VectorType(I32, half), list(range(at, wide.count, 2)))
        )
        for at in (0, 1)
    )
    return builder.add(total, builder.add(even, odd))


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory that will be read soon."""
    pointer, number = I8.as_pointer(), I32
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def _store_sums(
    builder: Any,
    totals: list[Any],
    outputs: int,
    add: Callable[[Any, Any], Any],
    rest: Callable[[list[Any]], list[Any]],
    complete: Any,
    y: Any,
    y_stride: Any,
) -> None:
    """Add up the vectors `totals`, `outputs` for each row, and store the sums; `rest` adds what fills no vector, if not `complete`."""
    summed = totals[0].type.element

    def place(number: int) -> Any:
        row, output = divmod(number, outputs)
        at = builder.add(builder.mul(y_stride, I64(row)), I64(output))
        return builder.gep(builder.inttoptr(y, summed.as_pointer()), [at])

    def singly() -> None:
        for number, total in enumerate(rest([_total(builder, total, add) for total in totals])):
            builder.store(total, place(number))

    def together() -> None:
        for first in range(0, len(totals), 8):
            eight = totals[first : first + 8]
            sums = _eight_totals(builder, eight + eight[:1] * (8 - len(eight)), add)
            for at in range(0, len(eight), outputs):
                lanes = ir.Constant(ir.VectorType(I32, outputs), list(range(at, at + outputs)))
                pointer = builder.bitcast(place(first + at), ir.VectorType(summed, outputs).as_pointer())
                builder.store(builder.shuffle_vector(sums, sums, lanes), pointer, align=4)

    if totals[0].type.count != 8 or outputs not in (4, 8):
        singly()
        return
    with builder.if_else(complete) as (yes, no):
        with yes:
            together()
        with no:
            singly()


def make_dots(rows: int, outputs: int, prefetch: bool = False) -> Any:
    """`dots(token, w, w_stride, x, x_stride, count, y, y_stride, later, step)`: y[r, o] = sum of w[o, k] x[r, k], k < count.

    For `rows` rows and `outputs` outputs. w, x and y are addresses, strides in numbers; x is float32 and y float32, with
    int8 weights x int16 (uint8, plus 128, where VNNI is set) and y int32. prefetch: the memory from `later` on, `step`
    bytes for each k, is asked for meanwhile; not of float32. Rows of weights that are read side by side are too many short
    streams for the processor to foresee.
    """
    pairs = [(row, output) for row in range(rows) for output in range(outputs)]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, w, w_stride, x, x_stride, count, y, y_stride, later, step = args
        stored = STORED[signature.args[0]]
        exact = stored is I8
        given, summed = ((I8 if VNNI else I16), I32) if exact else (F32, F32)
        width = (VNNI[1] if VNNI else 2 * WIDTH) if exact else WIDTH
        lanes = width // (4 if VNNI else 2) if exact else width
        add = builder.add if exact else builder.fadd

        def at(base: Any, stride: Any, number: int, size: int) -> Any:
            return builder.add(base, builder.mul(stride, I64(number * size)))

        sources = [at(w, w_stride, output, BYTES[stored]) for output in range(outputs)]
        inputs = [at(x, x_stride, row, BYTES[given]) for row in range(rows)]

        def vectors(index: Any, totals: list[Any]) -> list[Any]:
            for line in range(0, outputs * BYTES[stored] * width if prefetch and stored is not F32 else 0, 64):
                _prefetch(builder, builder.add(later, builder.add(builder.mul(index, step), I64(line))))
            numbers = [_load(builder, base, index, given, width) for base in inputs]
            new = list(totals)
            for output, base in enumerate(sources):
                weights = _load(builder, base, index, stored, width)
                weights = weights if exact else _widen(builder, weights, stored)
                for row in range(rows):
                    place = row * outputs + output
                    add_product = _integer_step if exact else _multiply_add
                    new[place] = add_product(builder, weights, numbers[row], totals[place])
            return new

        def singles(index: Any, totals: list[Any]) -> list[Any]:
            new = []
            for (row, output), total in zip(pairs, totals, strict=True):
                weight, number = (
                    _load(builder, sources[output], index, stored, 1),
                    _load(builder, inputs[row], index, given, 1),
                )
                if exact:
                    number = builder.zext(number, I32) if VNNI else builder.sext(number, I32)
                    new.append(builder.add(total, builder.mul(builder.sext(weight, I32), number)))
                else:
                    new.append(_multiply_add(builder, _widen(builder, weight, stored), number, total))
            return new

        whole = builder.and_(count, I64(-width))
        zero = ir.Constant(ir.VectorType(summed, lanes), None)
        totals = _loop(builder, I64(0), whole, width, [zero] * len(pairs), vectors)
        rest = partial(_loop, builder, whole, count, 1, body=singles)
        _store_sums(builder, totals, outputs, add, rest, builder.icmp_signed("==", whole, count), y, y_stride)
        return context.get_dummy_value()

    @intrinsic
    def dots(
        typing: Any,
        token: Any,
        w: Any,
        w_stride: Any,
        x: Any,
        x_stride: Any,
        count: Any,
        y: Any,
        y_stride: Any,
        later: Any,
        step: Any,
    ):
        return types.void(token, *([types.int64] * 9)), generate

    return dots


@intrinsic
def weighted_sum(typing: Any, token: Any, values: Any, weights: Any, rows: Any, size: Any, y: Any):
    """y[d] = sum over t < rows, in order, of weights[t] values[t, d], d < size: addresses, float32 but for `values`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, values, weights, rows, size, y = args
        stored = STORED[signature.args[0]]

        def columns(width: int) -> Callable[[Any, list[Any]], list[Any]]:
            def block(column: Any, nothing: list[Any]) -> list[Any]:
                def add(row: Any, totals: list[Any]) -> list[Any]:
                    share = _load(builder, weights, row, F32, 1)
                    if width > 1:
                        share = builder.insert_element(
                            ir.Constant(ir.VectorType(F32, width), ir.Undefined), share, I32(0)
                        )
                        zeros = ir.Constant(ir.VectorType(I32, width), None)
                        share = builder.shuffle_vector(share, share, zeros)
                    place = builder.add(builder.mul(row, size), column)
                    value = _widen(builder, _load(builder, values, place, stored, width), stored)
                    return [_multiply_add(builder, value, share, totals[0])]

                kind = ir.VectorType(F32, width) if width > 1 else F32
                (total,) = _loop(builder, I64(0), rows, 1, [ir.Constant(kind, None if width > 1 else 0.0)], add)
                pointer = builder.gep(builder.inttoptr(y, F32.as_pointer()), [column])
                builder.store(total, builder.bitcast(pointer, kind.as_pointer()), align=4)
                return nothing

            return block

        start = I64(0)
        for width in (4 * WIDTH, WIDTH, 1):  # four vectors at once: a sum waits for the one before it
            end = builder.sub(size, builder.srem(builder.sub(size, start), I64(width)))
            _loop(builder, start, end, width, [], columns(width))
            start = end
        return context.get_dummy_value()

    return types.void(token, *([types.int64] * 5)), generate


@intrinsic
def read(typing: Any, token: Any, base: Any, index: Any):
    """The stored number `index` from address `base` on, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = STORED[signature.args[0]]
        return _widen(builder, _load(builder, args[1], args[2], stored, 1), stored)

    return types.float32(token, types.int64, types.int64), generate


@intrinsic
def write(typing: Any, token: Any, base: Any, index: Any, value: Any):
    """Store a float32, rounded to the token's format, as number `index` from address `base` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, index, value = args
        stored = STORED[signature.args[0]]
        if stored is F16:
            value = builder.fptrunc(value, F16)
        pointer = builder.gep(builder.inttoptr(base, stored.as_pointer()), [index])
        builder.store(value, pointer, align=1)
        return context.get_dummy_value()

    return types.void(token, types.int64, types.int64, types.float32), generate


@intrinsic
def exponent(typing: Any, power: Any):
    """2 to an int32 power of -126 to 127, as float32: its bits written down."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], I32(127)), I32(23)), F32)

    return types.float32(types.int32), generate
