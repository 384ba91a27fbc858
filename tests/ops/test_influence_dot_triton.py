"""triton_kernels/influence_dot.py without a GPU: logic in the interpreter, code by compiling for three machines."""

import pytest

from tests.ops._interpreter import assert_passes_in_the_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip(
    "fastsft.triton_kernels.influence_dot", reason="fastsft is not installed: pip install -e .", exc_type=ImportError
)

FUSED = {"HAS_TARGETS": True, "HAS_PRECONDITION": True, "HAS_SUMS": True, "UPCAST": False}
TOKENS = {"BLOCK_T": 64}


def test_logic_in_the_interpreter():
    assert_passes_in_the_interpreter("interpret_influence_dot.py")


def compile_for(capability, kernel, signature_of_data, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    integers = {"offsets": "*i64", "order": "*i64", "group_offsets": "*i64", "target_size": "i64"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "dy"):
            signature[name] = f"*{signature_of_data}"
        elif name.isupper() or name.startswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = integers.get(name, "*fp32")
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("data", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4096), (4096, 16), (4096, 4096)])
def test_compiles_ahead_of_time(outputs, inputs, capability, data):
    block_o, block_i = kernels.blocks(outputs, inputs)
    block_t = kernels.block_t(outputs, inputs, 2 if data == "bf16" else 4)
    tiles = {"BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": block_t}
    token_tiles = {"BLOCK_O": min(block_o, 64), "BLOCK_I": min(block_i, 64)}
    for kernel, constants in (
        (kernels._influence_dot_fwd_kernel, FUSED | tiles),
        (kernels._influence_dot_tokens_fwd_kernel, TOKENS | token_tiles),
    ):
        compiled = compile_for(capability, kernel, data, constants)
        assert compiled.asm["cubin"]
        # What every machine since sm_80 gives to a block.
        assert compiled.metadata.shared <= 163 * 1024


def test_a_side_of_one_compiles():
    # Triton takes an argument that is 1 for a constant, which has no methods of a tensor.
    constants = FUSED | {"O": 1, "I": 1, "A": 1, "BLOCK_T": 64, "BLOCK_O": 16, "BLOCK_I": 128}
    assert compile_for(90, kernels._influence_dot_fwd_kernel, "fp32", constants).asm["cubin"]
    constants = TOKENS | {"O": 1, "I": 1, "A": 1, "BLOCK_O": 16, "BLOCK_I": 64}
    assert compile_for(90, kernels._influence_dot_tokens_fwd_kernel, "fp32", constants).asm["cubin"]
