"""How a product of few rows is cut into tiles and loads; see `skinny_linear` for the letters."""

from typing import Any, NamedTuple

import jax.numpy as jnp

MAX_ROWS = 16  # of the tensor cores' left operand
OCTET = 8  # columns of the tensor cores' right operand; also elements of 16 bytes
NUM_PROGRAMS = 132  # multiprocessors of an H100 or H200 (SXM)
WARPS = 16  # of a program; they share the inputs of a row of the weights among them
THREADS = 32 * WARPS
SPAN = 32  # inputs that four neighbouring threads load at a time
MAX_LOADS = 8  # of 16 bytes that a thread has on their way, for one tile ahead
SHARED_BYTES = 220 * 1024  # of 227 KiB


class Plan(NamedTuple):
    """How the work is cut. The order of sums follows from it, so T counts for no more than on which side of 8 it is."""

    num_spans: int  # spans of one row of the weights that a warp loads at a time
    tile_outputs: int
    batch_steps: int  # of a warp along the inputs, loaded together


class Spec(NamedTuple):
    """What is fixed when the kernel is compiled."""

    plan: Plan
    num_rows: int  # T
    input_size: int
    output_size: int
    num_weights: int  # 2: silu of the first product times the second
    dtype: Any
    output_dtype: Any
    epsilon: float | None  # None: inputs are taken as they are
    has_bias: bool
    has_residual: bool
    interpret: bool

    @property
    def group_outputs(self) -> int:
        """Rows of the weights that one load of a warp touches."""
        return OCTET // self.plan.num_spans

    @property
    def num_groups(self) -> int:
        return self.plan.tile_outputs // self.group_outputs

    @property
    def step_size(self) -> int:
        """Inputs from a warp's step to its next: those of all warps."""
        return WARPS * SPAN * self.plan.num_spans

    @property
    def num_steps(self) -> int:
        return -(-self.input_size // self.step_size)

    @property
    def num_batches(self) -> int:
        return -(-self.num_steps // self.plan.batch_steps)

    @property
    def num_tiles(self) -> int:
        return self.output_size // self.plan.tile_outputs

    @property
    def num_programs(self) -> int:
        return min(2 if self.interpret else NUM_PROGRAMS, self.num_tiles)

    @property
    def operand_stride(self) -> int:
        """Elements of a row of inputs in shared memory: whole steps, and rows apart by half of all banks."""
        return self.num_steps * self.step_size + SPAN

    @property
    def num_slots(self) -> int:
        """Parts that make up a sum of products."""
        return WARPS * self.plan.num_spans

    @property
    def slot_size(self) -> int:
        return self.num_rows * self.num_weights * self.plan.tile_outputs

    @property
    def shared_bytes(self) -> int:
        floats = 2 * self.num_slots * self.slot_size + WARPS * self.num_rows
        return self.num_rows * self.operand_stride * 2 + floats * 4


def unsupported(num_rows: int, input_size: int, output_size: int, dtype: Any, num_weights: int = 1) -> str | None:
    """Why these sizes cannot run, or None if they can; of a gated product, `output_size` is F."""
    if not 1 <= num_rows <= MAX_ROWS:
        return f"{num_rows} rows are not from 1 to {MAX_ROWS}"
    if input_size % OCTET or input_size == 0:
        return f"input size {input_size} is not a multiple of {OCTET}"
    if output_size % OCTET or output_size == 0:
        return f"output size {output_size} is not a multiple of {OCTET}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is neither bfloat16 nor float16"
    plan = choose_plan(num_rows, input_size, output_size, num_weights)
    size = Spec(
        plan, num_rows, input_size, output_size, num_weights, dtype, dtype, None, False, False, False
    ).shared_bytes
    if size > SHARED_BYTES:
        return f"{num_rows} rows of {input_size} inputs take {size} bytes of shared memory, of {SHARED_BYTES}"
    return None


def choose_plan(num_rows: int, input_size: int, output_size: int, num_weights: int) -> Plan:
    """Tiles that spread the outputs most evenly, the largest of those whose inputs a warp loads at once."""
    num_spans = 2 if num_rows <= OCTET else 1
    group = OCTET // num_spans
    steps = -(-input_size // (WARPS * SPAN * num_spans))

    def cost(tile: int) -> tuple[int, int]:
        heaviest_load = -(-output_size // tile // NUM_PROGRAMS) * tile
        loads = tile // group * num_weights * steps
        return heaviest_load, -tile if loads <= MAX_LOADS else tile

    tiles = [group * count for count in (1, 2, 3, 4) if output_size % (group * count) == 0]
    tile = min(tiles, key=cost)
    most_steps = max(1, MAX_LOADS // (tile // group * num_weights))
    num_batches = -(-steps // most_steps)
    return Plan(num_spans, tile, -(-steps // num_batches))
