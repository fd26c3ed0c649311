"""What is read from the text of compiled programs: stages, and the costs of matrix products."""

import jax
import jax.numpy as jnp

from miniinfer_jax.benchmark.hlo_text import Cost, read_programs, stage_of

# As XLA writes programs for a GPU: a library product with its workspace, a fused product of its own kernel, a fusion
# that reads only a part of its operand, and a kernel of Pallas.
GPU_PROGRAM = """HloModule jit_decode_step, is_scheduled=true, entry_computation_layout={()->bf16[]}

%gemm_fusion (parameter_0: bf16[64,128], parameter_1: bf16[128,256]) -> bf16[64,256] {
  %parameter_0 = bf16[64,128]{1,0} parameter(0)
  %parameter_1 = bf16[128,256]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,256]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%partial (parameter_2: bf16[999,128], parameter_3: bf16[128,256]) -> bf16[64,256] {
  %parameter_2 = bf16[999,128]{1,0} parameter(0)
  %parameter_3 = bf16[128,256]{1,0} parameter(1)
  %slice.1 = bf16[64,128]{1,0} slice(%parameter_2), slice={[0:64], [0:128]}
  ROOT %dot.2 = bf16[64,256]{1,0} dot(%slice.1, %parameter_3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%one_row (parameter_4: bf16[128,256], parameter_5: bf16[1,256]) -> f32[128] {
  %parameter_4 = bf16[128,256]{1,0} parameter(0)
  %parameter_5 = bf16[1,256]{1,0} parameter(1)
  %convert.1 = f32[128,256]{1,0} convert(%parameter_4)
  %broadcast.1 = f32[128,256]{1,0} broadcast(%parameter_5), dimensions={0,1}
  %multiply.1 = f32[128,256]{1,0} multiply(%convert.1, %broadcast.1)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[128]{0} reduce(%multiply.1, %zero), dimensions={1}, to_apply=%add
}

ENTRY %main.9 (a: bf16[64,128], b: bf16[128,256], c: bf16[999,128]) -> bf16[64,256] {
  %a = bf16[64,128]{1,0} parameter(0)
  %b = bf16[128,256]{1,0} parameter(1)
  %c = bf16[999,128]{1,0} parameter(2)
  %custom-call.1 = (bf16[64,256]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(decode_step)/layer_3/jit(decoder_layer)/qkv/dot_general"}, \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fusion.1 = bf16[64,256]{1,0} fusion(%a, /*index=1*/%b), kind=kCustom, calls=%gemm_fusion, \
metadata={op_name="jit(decode_step)/sample/logits/dot_general"}
  %fusion.2 = bf16[64,256]{1,0} fusion(%c, %b), kind=kCustom, calls=%partial
  %row = bf16[1,256]{1,0} parameter(3)
  %input_reduce_fusion = f32[128]{0} fusion(%b, %row), kind=kInput, calls=%one_row, \
metadata={op_name="jit(decode_step)/layer_3/jit(decoder_layer)/output/dot_general"}
  %input_reduce_fusion.1 = f32[128]{0} fusion(%b, %row), kind=kInput, calls=%one_row, \
metadata={op_name="jit(decode_step)/final_norm/reduce_sum"}
  %custom-call.3 = bf16[64,128]{1,0} custom-call(%a, %b), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(decode_step)/layer_3/jit(decoder_layer)/feed_forward/jit(_launch)/skinny_128_to_256/mpmd_map"}
  ROOT %custom-call.2 = bf16[64,256]{1,0} custom-call(%a, %b), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(decode_step)/layer_3/jit(decoder_layer)/attention/jit(attend)/attend_split/mpmd_map"}
}
"""


def test_products_of_a_gpu_program():
    found = {name: one for (module, name), one in read_programs([GPU_PROGRAM]).items() if module == "jit_decode_step"}
    product = Cost(num_bytes=2 * (64 * 128 + 128 * 256 + 64 * 256), operations=2 * 64 * 128 * 256)
    assert found["custom-call.1"].cost == found["fusion.1"].cost == found["dot.1"].cost == product
    assert found["input_reduce_fusion"].cost == Cost(2 * (128 * 256 + 256) + 4 * 128, 2 * 128 * 256)
    assert found["input_reduce_fusion.1"].cost is None  # a sum that is no product of matrices
    assert found["fusion.2"].cost is None  # reads a part of an operand: what it moves is not its operands' sizes
    assert (found["custom-call.2"].cost, found["custom-call.2"].call_bytes) == (None, (2 * 64 * 128, 2 * 128 * 256))
    assert found["fusion.1"].call_bytes == ()
    # Gate and up as one: half as many results as outputs.
    gated = Cost(num_bytes=2 * (64 * 128 + 128 * 256 + 64 * 128), operations=2 * 64 * 128 * 256)
    assert found["custom-call.3"].cost == gated
    assert found["custom-call.3"].kernel == "skinny_128_to_256_mosaic_gpu_kernel"
    stages = [found[name].stage for name in ("custom-call.1", "fusion.1", "fusion.2", "custom-call.2")]
    assert stages == ["qkv", "sample/logits", "", "attention/attend_split"]
    kernels = [found[name].kernel for name in ("custom-call.1", "input_reduce_fusion.1", "custom-call.2")]
    assert kernels == ["", "input_reduce_fusion_1", "attend_split_mosaic_gpu_kernel"]


def test_products_of_a_program_compiled_here():
    def step(left, right):
        with jax.named_scope("qkv"):
            return jnp.einsum("bik,bkj->bij", left, right)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 96, 64), (2, 64, 32))]
    found = read_programs([jax.jit(step).lower(*shapes).compile().as_text() or ""])
    costs = {one.cost for one in found.values() if one.cost}
    assert costs == {Cost(num_bytes=4 * 2 * (96 * 64 + 64 * 32 + 96 * 32), operations=2 * 2 * 96 * 64 * 32)}


def test_programs_of_one_name_count_where_they_agree():
    wider = GPU_PROGRAM.replace("%fusion.1 = bf16[64,256]", "%fusion.1 = f32[64,256]")
    agreed = read_programs([GPU_PROGRAM, wider])
    assert ("jit_decode_step", "fusion.1") not in agreed
    assert ("jit_decode_step", "custom-call.1") in agreed


def test_widths_of_types():
    for type_name, num_bytes in (("pred", 1), ("f8e4m3fn", 1), ("s4", 0.5), ("f64", 8)):
        product = f"HloModule a\n\nENTRY %m () -> f32[] {{\n  %x = {type_name}[4]{{0}} parameter(0)\n"
        product += f"  %y = {type_name}[] dot(%x, %x), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}\n}}\n"
        assert read_programs([product])["a", "y"].cost == Cost(num_bytes * 9, 8)
    opaque = "HloModule a\n\nENTRY %m () -> f32[] {\n  %x = token[] parameter(0)\n  %y = token[] dot(%x, %x)\n}\n"
    assert read_programs([opaque])["a", "y"].cost is None


def test_stage_of_an_op_name():
    assert (
        stage_of("jit(decode_step)/layer_0/jit(decoder_layer)/attention/while/body/wkmc,wkch->wkmh/dot") == "attention"
    )
    assert stage_of("jit(ragged_step)/sample/cond/branch_0_fun/draw/vmap(jit(_gumbel))/while/add") == "sample/draw"
    assert stage_of("jit(decode_step)/layer_0/jit(decoder_layer)/add") == ""
