"""Short names for the instructions of single threads that kernels write in Mosaic's own language."""

import functools
from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Value = Any  # an ir.Value
Word = Any  # an ir.Value of 32 bits: an int, or two numbers of 16 bits


def int32() -> Any:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Value:
    return arith.constant(int32(), value)


def real(value: float) -> Value:
    return arith.constant(ir.F32Type.get(), float(value))


def plus(value: Value, other: Value | int) -> Value:
    return arith.addi(value, constant(other) if isinstance(other, int) else other)


def times(value: Value, factor: int) -> Value:
    return arith.muli(value, constant(factor))


def split(value: Value, divisor: int) -> tuple[Value, Value]:
    """Quotient and remainder."""
    return arith.divui(value, constant(divisor)), arith.remui(value, constant(divisor))


def is_less(value: Value, limit: Value | int) -> Value:
    return arith.cmpi(arith.CmpIPredicate.ult, value, constant(limit) if isinstance(limit, int) else limit)


def at_most(value: Value, limit: int) -> Value:
    return arith.minui(value, constant(limit))


def wide(value: Value) -> Value:
    return arith.extui(ir.IntegerType.get_signless(64), value)


def sum_of(values: Sequence[Value]) -> Value:
    """Of floats, in their order."""
    return functools.reduce(arith.addf, values)


def element(pointer: Value, index: Value, element_type: Any) -> Value:
    return mgpu_utils.getelementptr(pointer, [index], element_type)


def load_words(pointer: Value) -> list[Word]:
    """16 bytes, as four words."""
    return words_of(llvm.load(ir.VectorType.get((4,), int32()), pointer, alignment=16))


def words_of(values: Value) -> list[Any]:
    """The elements of a vector."""
    size = ir.VectorType(values.type).shape[0]
    return [vector.extract(values, dynamic_position=[], static_position=[number]) for number in range(size)]


def vector_of(values: Sequence[Value]) -> Value:
    return vector.from_elements(ir.VectorType.get((len(values),), values[0].type), list(values))


def to_floats(words: Sequence[Word], dtype: Any) -> list[Value]:
    """The numbers of 16 bits in the words, as float32."""
    pair = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
    single = ir.VectorType.get((2,), ir.F32Type.get())
    pairs = [arith.extf(single, vector.bitcast(pair, vector_of([word]))) for word in words]
    return [value for one in pairs for value in words_of(one)]


def to_words(values: Sequence[Value], dtype: Any) -> list[Word]:
    """float32 numbers, rounded to 16 bits, two in a word."""
    pair = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
    rounded = [arith.truncf(pair, vector_of(values[first : first + 2])) for first in range(0, len(values), 2)]
    return [words_of(vector.bitcast(ir.VectorType.get((1,), int32()), one))[0] for one in rounded]


def rounded(value: Value, dtype: Any) -> Value:
    """A float32 number as the dtype can hold it."""
    if mgpu_utils.dtype_to_ir_type(dtype) == ir.F32Type.get():
        return value
    return arith.extf(ir.F32Type.get(), arith.truncf(mgpu_utils.dtype_to_ir_type(dtype), value))


def unary(instruction: str, value: Value) -> Value:
    """A PTX instruction of one float32 number."""
    return llvm.inline_asm(ir.F32Type.get(), [value], f"{instruction} $0, $1;", "=f,f")


LOAD = (
    "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    "@p ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)


def start_loading(address: Value, is_there: Value) -> list[Word]:
    """16 bytes at an address of 64 bits, read once, or zeros; issued here, whatever stands between it and their use."""
    flag = arith.extui(int32(), is_there)
    return _results(LOAD, [address, flag], "=r,=r,=r,=r,l,r", int32(), has_side_effects=True)


def multiply(dtype: Any, left: Sequence[Word], right: Sequence[Word], sums: Sequence[Value]) -> list[Value]:
    """sums [16, 8] + left [16, 16] @ right [16, 8] by the tensor cores, each thread of a warp with its part."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[str(dtype)]
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return _results(code, [*left, *right, *sums], "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", ir.F32Type.get())


def _results(code: str, operands: list[Value], constraints: str, kind: Any, has_side_effects: bool = False) -> list:
    four = ir.Type.parse(f"!llvm.struct<({', '.join([str(kind)] * 4)})>")
    results: Any = llvm.inline_asm(four, operands, code, constraints, has_side_effects=has_side_effects)
    return [llvm.extractvalue(kind, results, [number]) for number in range(4)]
