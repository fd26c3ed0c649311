"""What each thread of a product of few rows does, in Mosaic's own language; see `skinny_linear` for the letters.

The tensor cores take 16 rows and 16 inputs by 8 columns at a time. Of 32 neighbouring inputs, thread n of a group of
four holds 8n to 8n + 7 and hands them over as its two pairs of one step and its two of the next: which inputs share a
step is the same on both sides, and sums don't care. Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

from typing import Any, NamedTuple

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from miniinfer_jax.pallas_kernels import thread_code as code
from miniinfer_jax.pallas_kernels.skinny_plan import OCTET, SPAN, THREADS, WARPS, Spec

Value = Any  # an ir.Value
MAX_HELD = 8  # chunks of 16 bytes of inputs that a thread holds while it normalizes them
LOG2_E = 1.4426950408889634


class _Thread(NamedTuple):
    """A thread and the memory it works on; pointers are to the first element."""

    spec: Spec
    number: Value
    warp: Value
    group: Value  # of four threads, 0 to 7: a row of the left operand, a column of the right
    place: Value  # within the group, 0 to 3
    pointers: Any  # of skinny_linear.Refs
    element: Any  # type of inputs and weights
    lane_address: Value  # of the first weights that it loads of tile 0
    first_input: Value  # of those


def emit(spec: Spec, memrefs: Any) -> None:
    """The whole program of one thread; memrefs as skinny_linear.Refs."""
    thread = _start(spec, memrefs)
    first_tile = arith.index_cast(code.int32(), gpu.block_id(gpu.Dimension.x))
    loads = _load_batch(thread, first_tile, code.is_less(first_tile, spec.num_tiles), 0)
    _place_inputs(thread)
    loop = scf.ForOp(
        first_tile,
        code.constant(spec.num_tiles),
        code.constant(spec.num_programs),
        [*(word for words in loads for word in words), code.constant(0)],
    )
    with ir.InsertionPoint(loop.body):
        *words, parity = loop.inner_iter_args
        loads = [words[first : first + 4] for first in range(0, len(words), 4)]
        loads = _visit_tile(thread, loop.induction_variable, parity, loads)
        scf.yield_([*(word for one in loads for word in one), arith.subi(code.constant(1), parity)])


def _start(spec: Spec, memrefs: Any) -> _Thread:
    number = arith.index_cast(code.int32(), gpu.thread_id(gpu.Dimension.x))
    warp, lane = code.split(number, 32)
    group, place = code.split(lane, 4)
    span, row = code.split(group, spec.group_outputs)
    first_input = code.plus(
        code.times(warp, SPAN * spec.plan.num_spans), code.plus(code.times(span, SPAN), code.times(place, OCTET))
    )
    pointers = type(memrefs)(*[None if memref is None else mgpu_utils.memref_ptr(memref) for memref in memrefs])
    offset = code.wide(code.plus(code.times(row, spec.input_size), first_input))
    base = llvm.ptrtoint(ir.IntegerType.get_signless(64), pointers.weights)
    address = arith.addi(base, arith.addi(offset, offset))  # two bytes each
    element = mgpu_utils.dtype_to_ir_type(spec.dtype)
    return _Thread(spec, number, warp, group, place, pointers, element, address, first_input)


def _wide_constant(value: int) -> Value:
    return arith.constant(ir.IntegerType.get_signless(64), value)


def _steps(spec: Spec, batch: int) -> range:
    first = batch * spec.plan.batch_steps
    return range(first, min(first + spec.plan.batch_steps, spec.num_steps))


def _load_batch(thread: _Thread, tile: Value, is_there: Value, batch: int) -> list[list[Value]]:
    """Of each step, weight and group of outputs the thread's 16 bytes; zeros behind the inputs' end."""
    spec = thread.spec
    row_bytes = spec.input_size * 2
    tile_bytes = arith.muli(code.wide(tile), _wide_constant(spec.plan.tile_outputs * row_bytes))
    address = arith.addi(thread.lane_address, tile_bytes)
    loads = []
    for step in _steps(spec, batch):
        first = step * spec.step_size
        is_inside = is_there
        if first + spec.step_size > spec.input_size:
            is_inside = arith.andi(is_there, code.is_less(code.plus(thread.first_input, first), spec.input_size))
        for weight in range(spec.num_weights):
            for group in range(spec.num_groups):
                offset = (weight * spec.output_size + group * spec.group_outputs) * row_bytes + first * 2
                loads.append(code.start_loading(arith.addi(address, _wide_constant(offset)), is_inside))
    return loads


def _visit_tile(thread: _Thread, tile: Value, parity: Value, loads: list[list[Value]]) -> list[list[Value]]:
    """Multiplies a tile and writes its results -> the first loads of the next tile, on their way."""
    spec = thread.spec
    extras = _load_extras(thread, tile)
    next_tile = code.plus(tile, spec.num_programs)
    zeros = [code.real(0)] * 4
    sums = [zeros] * (spec.num_weights * spec.num_groups)
    for batch in range(spec.num_batches):
        is_last = batch + 1 == spec.num_batches
        if is_last:
            next_loads = _load_batch(thread, next_tile, code.is_less(next_tile, spec.num_tiles), 0)
        else:
            next_loads = _load_batch(thread, tile, arith.constant(ir.IntegerType.get_signless(1), 1), batch + 1)
        sums = _multiply_batch(thread, batch, loads, sums)
        loads = next_loads
    _store_sums(thread, parity, sums)
    gpu.barrier()
    _write_results(thread, tile, parity, extras)
    return loads


def _multiply_batch(thread: _Thread, batch: int, loads: list, sums: list) -> list:
    """sums + the products of the batch's loads, which stand in the order of `_load_batch`."""
    spec, sums, remaining = thread.spec, list(sums), iter(loads)
    last = spec.num_rows - 1  # rows beyond it repeat it: no other row's sum depends on them
    rows = [code.at_most(thread.group, last)] * 2
    spans = [0, SPAN]
    if spec.plan.num_spans == 1:
        rows, spans = [rows[0], code.at_most(code.plus(thread.group, OCTET), last)], [0, 0]
    inputs = code.plus(code.times(thread.warp, SPAN * spec.plan.num_spans), code.times(thread.place, OCTET))
    for step in _steps(spec, batch):
        halves = []
        for row, span in zip(rows, spans, strict=True):
            index = code.plus(code.times(row, spec.operand_stride), code.plus(inputs, span + step * spec.step_size))
            halves.append(code.load_words(code.element(thread.pointers.operand, index, thread.element)))
        upper, lower = halves
        for number in range(len(sums)):
            right = next(remaining)
            for pair in (0, 2):
                left = [upper[pair], lower[pair], upper[pair + 1], lower[pair + 1]]
                sums[number] = code.multiply(spec.dtype, left, right[pair : pair + 2], sums[number])
    return sums


def _store_sums(thread: _Thread, parity: Value, sums: list) -> None:
    """Each warp's sums to its slots in shared memory: slot by slot, rows, weights, outputs."""
    spec = thread.spec
    width = spec.num_weights * spec.plan.tile_outputs

    def store(slot: Value, row: Value, column: Value, pair: list) -> None:
        index = code.plus(code.times(parity, spec.num_slots), slot)
        index = code.plus(code.times(code.plus(code.times(index, spec.num_rows), row), width), column)
        is_row = scf.IfOp(code.is_less(row, spec.num_rows))
        with ir.InsertionPoint(is_row.then_block):
            pointer = code.element(thread.pointers.sums, index, ir.F32Type.get())
            llvm.store(code.vector_of(pair), pointer, alignment=8)
            scf.yield_([])

    for number, (first, second, third, fourth) in enumerate(sums):
        column = number * spec.group_outputs
        if spec.plan.num_spans == 2:  # columns 0 to 3 at the first span by the upper rows, 4 to 7 at the second
            span, within = code.split(thread.place, 2)
            is_first = code.is_less(thread.place, 2)
            pair = [arith.select(is_first, first, third), arith.select(is_first, second, fourth)]
            slot = code.plus(code.times(thread.warp, 2), span)
            store(slot, thread.group, code.plus(code.times(within, 2), column), pair)
        else:
            place = code.plus(code.times(thread.place, 2), column)
            store(thread.warp, thread.group, place, [first, second])
            store(thread.warp, code.plus(thread.group, OCTET), place, [third, fourth])


def _result_place(thread: _Thread) -> tuple[Value, Value]:
    """(row, output of the tile) of the one result that a thread finishes; threads beyond the last repeat it."""
    tile_outputs = thread.spec.plan.tile_outputs
    return code.split(code.at_most(thread.number, thread.spec.num_rows * tile_outputs - 1), tile_outputs)


def _load_extras(thread: _Thread, tile: Value) -> list[Value]:
    """Bias and residual of the thread's result, loaded before they are needed."""
    spec = thread.spec
    row, output = _result_place(thread)
    output = code.plus(code.times(tile, spec.plan.tile_outputs), output)
    extras = []
    if spec.has_bias:
        extras.append(llvm.load(thread.element, code.element(thread.pointers.bias, output, thread.element)))
    if spec.has_residual:
        index = code.plus(code.times(row, spec.output_size), output)
        extras.append(llvm.load(thread.element, code.element(thread.pointers.residual, index, thread.element)))
    return extras


def _write_results(thread: _Thread, tile: Value, parity: Value, extras: list[Value]) -> None:
    """One result a thread: its sums of all slots, rounded, with what stands behind the product."""
    spec, single = thread.spec, ir.F32Type.get()
    is_mine = scf.IfOp(code.is_less(thread.number, spec.num_rows * spec.plan.tile_outputs))
    with ir.InsertionPoint(is_mine.then_block):
        row, output = _result_place(thread)
        sums = [_sum_slots(thread, parity, row, weight, output) for weight in range(spec.num_weights)]
        result = code.rounded(sums[0], spec.dtype if spec.num_weights == 2 else spec.output_dtype)
        if spec.num_weights == 2:
            up = code.rounded(sums[1], spec.dtype)
            power = code.unary("ex2.approx.f32", arith.mulf(result, code.real(-LOG2_E)))
            gate = arith.divf(result, arith.addf(power, code.real(1)))
            result = arith.mulf(code.rounded(gate, spec.dtype), up)
        for extra in extras:
            result = code.rounded(arith.addf(result, arith.extf(single, extra)), spec.output_dtype)
        out_type = mgpu_utils.dtype_to_ir_type(spec.output_dtype)
        index = code.plus(code.times(row, spec.output_size), code.times(tile, spec.plan.tile_outputs))
        pointer = code.element(thread.pointers.out, code.plus(index, output), out_type)
        llvm.store(result if out_type == single else arith.truncf(out_type, result), pointer)
        scf.yield_([])


def _sum_slots(thread: _Thread, parity: Value, row: Value, weight: int, output: Value) -> Value:
    spec = thread.spec
    width = spec.num_weights * spec.plan.tile_outputs
    first = code.times(parity, spec.num_slots * spec.slot_size)
    first = code.plus(first, code.plus(code.times(row, width), code.plus(output, weight * spec.plan.tile_outputs)))
    single = ir.F32Type.get()
    parts = [
        llvm.load(single, code.element(thread.pointers.sums, code.plus(first, slot * spec.slot_size), single))
        for slot in range(spec.num_slots)
    ]
    return code.sum_of([code.sum_of(parts[number::4]) for number in range(4)])  # four chains: additions take time


def _place_inputs(thread: _Thread) -> None:
    """Writes the inputs, normalized if they are to be, to shared memory, zeros behind their end; then all may read."""
    spec = thread.spec
    num_chunks = -(-spec.num_steps * spec.step_size // OCTET)
    numbers = [code.plus(thread.number, first) for first in range(0, num_chunks, THREADS)]
    norm_weights = [] if spec.epsilon is None else [_load_chunk(thread, "norm_weight", 0, one) for one in numbers]
    count = max(1, MAX_HELD // len(numbers))
    for first in range(0, spec.num_rows, count):
        rows = range(first, min(first + count, spec.num_rows))
        chunks = [[_load_chunk(thread, "inputs", row, number) for number in numbers] for row in rows]
        if spec.epsilon is not None:
            chunks = _normalize(thread, rows, chunks, norm_weights)
        for row, held in zip(rows, chunks, strict=True):
            for number, words in zip(numbers, held, strict=True):
                _store_chunk(thread, row, number, words, num_chunks)
    gpu.barrier()


def _load_chunk(thread: _Thread, name: str, row: int, number: Value) -> list[Value]:
    """Chunk `number` of a row [I]: 16 bytes, or zeros behind the end."""
    spec = thread.spec
    is_inside = code.is_less(number, spec.input_size // OCTET)
    index = arith.select(is_inside, code.times(number, OCTET), code.constant(0))
    pointer = code.element(getattr(thread.pointers, name), code.plus(index, row * spec.input_size), thread.element)
    return [arith.select(is_inside, word, code.constant(0)) for word in code.load_words(pointer)]


def _store_chunk(thread: _Thread, row: int, number: Value, words: list[Value], num_chunks: int) -> None:
    is_inside = scf.IfOp(code.is_less(number, num_chunks))
    with ir.InsertionPoint(is_inside.then_block):
        index = code.plus(code.times(number, OCTET), row * thread.spec.operand_stride)
        pointer = code.element(thread.pointers.operand, index, thread.element)
        llvm.store(code.vector_of(words), pointer, alignment=16)
        scf.yield_([])


def _normalize(thread: _Thread, rows: range, chunks: list, norm_weights: list) -> list:
    """RMS norm, https://arxiv.org/abs/1910.07467, of rows of chunks; rounded before and after it is weighted."""
    spec, single = thread.spec, ir.F32Type.get()
    for row, held in zip(rows, chunks, strict=True):
        values = [value for words in held for value in code.to_floats(words, spec.dtype)]
        total = code.sum_of([arith.mulf(value, value) for value in values])
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, mgpu_utils.shfl_bfly(total, distance))
        # All threads of a warp store the same.
        index = code.plus(thread.warp, row * WARPS)
        llvm.store(total, code.element(thread.pointers.squares, index, single))
    gpu.barrier()
    normalized = []
    for row, held in zip(rows, chunks, strict=True):
        parts = []
        for first in range(0, WARPS, 4):
            pointer = code.element(thread.pointers.squares, code.constant(row * WARPS + first), single)
            parts += code.words_of(llvm.load(ir.VectorType.get((4,), single), pointer, alignment=16))
        mean = arith.mulf(code.sum_of(parts), code.real(1 / spec.input_size))
        scale = code.unary("rsqrt.approx.f32", arith.addf(mean, code.real(spec.epsilon or 0)))
        normalized.append(
            [_scale(thread, words, scale, weight) for words, weight in zip(held, norm_weights, strict=True)]
        )
    return normalized


def _scale(thread: _Thread, words: list, scale: Value, weights: list) -> list:
    dtype = thread.spec.dtype
    scaled = [code.rounded(arith.mulf(value, scale), dtype) for value in code.to_floats(words, dtype)]
    weighted = [arith.mulf(one, weight) for one, weight in zip(scaled, code.to_floats(weights, dtype), strict=True)]
    return code.to_words(weighted, dtype)
