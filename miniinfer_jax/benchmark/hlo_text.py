"""What a compiled program's text says of its instructions: the stage of the model, and the cost of a matrix product.

Read from `jax.stages.Compiled.as_text()`, whose instruction names are those that a trace carries as `hlo_op`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_TUPLE = r"\((?:[^()]|\([^()]*\))*\)"
_INSTRUCTION = re.compile(rf"\s+(?:ROOT )?%?([\w.\-]+) = ({_TUPLE}|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_MOSAIC_CALL = re.compile(r'custom_call_target="mosaic_gpu')
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')
_OWN_PRODUCT = re.compile(r"/skinny_(\d+)_to_(\d+)/")  # inputs and outputs: of pallas_kernels/skinny_linear.py
_CONTRACTED = re.compile(r'lhs_contracting_(?:dims=\{|dimensions":\[)([\d,"]*)')
# What these leave out of an operand is never read: the operand's size is not what moves.
_PARTIAL_READS = {"slice", "dynamic-slice", "gather", "dynamic-update-slice", "scatter"}
_NO_STAGE = re.compile(r"(?:jit|vmap)\(.*|layer_\d+|while|body|cond|closed_call|branch_\d+_fun|.*[>,].*")


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations of one run."""

    num_bytes: float
    operations: float


@dataclass(frozen=True)
class Instruction:
    """stage: the named scopes that it comes from, "" where none is told; cost: None where it cannot be told.

    call_bytes: the size of each operand of a hand-written kernel's call, where it is one. kernel: the name of what a
    GPU runs for it, where it follows from the text.
    """

    stage: str
    cost: Cost | None
    call_bytes: tuple[float | None, ...] = ()
    kernel: str = ""


@dataclass(frozen=True)
class _Line:
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


Computations = dict[str, dict[str, _Line]]


def read_programs(texts: Iterable[str]) -> dict[tuple[str, str], Instruction]:
    """The instructions of programs by (module, instruction); where two programs of a name disagree, neither counts."""
    found: dict[tuple[str, str], Instruction | None] = {}
    for text in texts:
        for key, instruction in _read_program(text).items():
            found[key] = instruction if found.get(key, instruction) == instruction else None
    return {key: instruction for key, instruction in found.items() if instruction is not None}


def stage_of(op_name: str) -> str:
    """The innermost two of the scopes that the model's source names in an op_name, without layer and primitive."""
    scopes = [scope for scope in op_name.split("/")[:-1] if not _NO_STAGE.fullmatch(scope)]
    return "/".join(scopes[-2:])


def _read_program(text: str) -> dict[tuple[str, str], Instruction]:
    module = _MODULE.match(text)
    assert module, f"not the text of an HLO module: {text[:80]!r}"
    computations = _read_computations(text)
    shapes = {name: line.shape for lines in computations.values() for name, line in lines.items()}
    instructions = {}
    for lines in computations.values():
        for name, line in lines.items():
            op_name = _OP_NAME.search(line.attributes)
            stage = stage_of(op_name[1]) if op_name else ""
            cost = _product_cost(line, shapes, computations)
            operands = line.operands if line.opcode == "custom-call" else ()
            call_bytes = tuple(_num_bytes(shapes.get(operand, "")) for operand in operands)
            kernel = _kernel_name(name, line, op_name[1] if op_name else "")
            instructions[module[1], name] = Instruction(stage, cost, call_bytes, kernel)
    return instructions


def _kernel_name(name: str, line: _Line, op_name: str) -> str:
    """XLA names the kernel of a fusion after it, Mosaic that of a call after the function that was traced."""
    if line.opcode == "fusion":
        return re.sub(r"[.\-]", "_", name)
    if _MOSAIC_CALL.search(line.attributes) and "/" in op_name:
        return f"{op_name.split('/')[-2]}_mosaic_gpu_kernel"
    return ""


def _read_computations(text: str) -> Computations:
    computations: Computations = {}
    current: dict[str, _Line] = {}
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            name, shape, opcode, operands, attributes = instruction.groups()
            names = tuple(operand.split("%")[-1].strip() for operand in operands.split(", ") if operand)
            current[name] = _Line(shape, opcode, names, attributes)
        elif computation := _COMPUTATION.match(line):
            current = computations.setdefault(computation[1], {})
    return computations


def _product_cost(line: _Line, shapes: dict[str, str], computations: Computations) -> Cost | None:
    """Of a matrix product alone or in a fusion: all operands and the result once, a multiply-add as two operations."""
    if line.opcode == "dot":
        return _cost(line, line, line.operands, shapes)
    if line.opcode == "custom-call" and _LIBRARY_PRODUCT.search(line.attributes):
        return _cost(line, line, line.operands, shapes)
    if line.opcode == "custom-call" and (sizes := _OWN_PRODUCT.search(line.attributes)):
        num_bytes, result = _total_bytes(line.operands, line.shape, shapes), _dimensions(line.shape)
        return Cost(num_bytes, 2 * result[0] * int(sizes[1]) * int(sizes[2])) if num_bytes and result else None
    if line.opcode == "fusion":
        inner = _lines_within(line, computations)
        products = [one for one in inner if one.opcode == "dot"]
        if len(products) == 1 and not any(one.opcode in _PARTIAL_READS for one in inner):
            return _cost(line, products[0], line.operands, shapes)
        if not products and _is_sum_of_products(line, inner):
            (total,) = (one for one in inner if one.opcode == "reduce")
            summands = _dimensions(shapes.get(total.operands[0], ""))
            num_bytes = _total_bytes(line.operands, line.shape, shapes)
            return Cost(num_bytes, 2 * math.prod(summands)) if num_bytes and summands else None
    return None


def _is_sum_of_products(line: _Line, inner: list[_Line]) -> bool:
    """Whether a fusion is a matrix product as XLA writes one of a single row: a multiplication and one sum."""
    opcodes = [one.opcode for one in inner]
    op_name = _OP_NAME.search(line.attributes)
    return (
        op_name is not None
        and op_name[1].endswith("/dot_general")
        and opcodes.count("reduce") == 1
        and "multiply" in opcodes
        and not _PARTIAL_READS.intersection(opcodes)
    )


def _lines_within(line: _Line, computations: Computations) -> list[_Line]:
    """The instructions of the computations that an instruction calls, and those that they call."""
    found = []
    for name in _CALLED.findall(line.attributes):
        for inner in computations.get(name, {}).values():
            found += [inner, *_lines_within(inner, computations)]
    return found


def _cost(line: _Line, product: _Line, operands: Iterable[str], shapes: dict[str, str]) -> Cost | None:
    contracted = _CONTRACTED.search(product.attributes)
    left, result = _dimensions(shapes.get(product.operands[0], "")), _dimensions(product.shape)
    num_bytes = _total_bytes(operands, line.shape, shapes)
    if contracted is None or left is None or result is None or num_bytes is None:
        return None
    depth = math.prod(left[int(index)] for index in contracted[1].replace('"', "").split(",") if index)
    return Cost(num_bytes, 2 * math.prod(result) * depth)


def _total_bytes(operands: Iterable[str], result: str, shapes: dict[str, str]) -> float | None:
    """Of the operands and of a result: of a library's tuple its first array, since the others are workspace."""
    sizes = [_num_bytes(shapes.get(operand, "")) for operand in operands] + [_num_bytes(result)]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _dimensions(shape: str) -> list[int] | None:
    """Of an array, or of the first array of a tuple; None for what is no array."""
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else None


def _num_bytes(shape: str) -> float | None:
    """Of an array, or of the first array of a tuple; None for a type whose name tells no width."""
    found, dimensions = _SHAPE.search(shape), _dimensions(shape)
    if found is None or dimensions is None:
        return None
    bits = re.search(r"\d+", found[1])  # f32, bf16, f8e4m3fn, s4
    if bits is None and found[1] != "pred":
        return None
    return math.prod(dimensions) * (int(bits[0]) if bits else 8) / 8
