"""triton_kernels/gated_adapter.py without a GPU: logic in the interpreter, code by compiling for three machines."""

import pytest
import torch

from tests.ops._interpreter import assert_passes_in_the_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip(
    "fastsft.triton_kernels.gated_adapter", reason="fastsft is not installed: pip install -e .", exc_type=ImportError
)

OTHERS = {"gates": "*fp32", "values": "*fp32", "dgates": "*fp32", "scale": "fp32"}
OTHERS |= {"document": "*i64", "columns": "*i64", "offsets": "*i64"}


def test_logic_in_the_interpreter():
    assert_passes_in_the_interpreter("interpret_gated_adapter.py")


def compile_for(capability, kernel, data, constants, aligned=True):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        number = name.isupper() or name.startswith("str")
        signature[name] = "i32" if number else OTHERS.get(name, f"*{data}")
        # As a launch finds them: only then are loads wide, and copied to shared memory in advance.
        if aligned and name != "scale":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    # What every machine since sm_80 gives to a block.
    assert compiled.metadata.shared <= 163 * 1024
    return compiled


def epilogue_constants(experts, rank, memory, beyond, gate):
    return {
        "stride_z": experts * rank + memory + beyond,
        "stride_gates": experts,
        "E": experts,
        "RANK": rank,
        "WIDTH": experts * rank + memory,
        "HAS_DOCUMENT": gate is None,
        "GATE": gate,
        **kernels.epilogue_blocks(experts, rank, memory),
    }


@pytest.mark.parametrize("data", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("experts", "rank", "memory", "beyond"), [(8, 16, 0, 8), (3, 2000, 16, 0)])
def test_epilogue_compiles_ahead_of_time(experts, rank, memory, beyond, capability, data):
    for gate in (None, "sigmoid", "topk"):  # of softmax there is nothing that topk does not have
        constants = epilogue_constants(experts, rank, memory, beyond, gate)
        compile_for(capability, kernels._gated_epilogue_fwd_kernel, data, constants | {"TOP_K": min(2, experts)})
        backward = constants | {"stride_dh": experts * rank + memory}
        compile_for(capability, kernels._gated_epilogue_bwd_kernel, data, backward)


@pytest.mark.parametrize(("data", "numbers"), [("fp32", 4), ("bf16", 8)])
def test_rows_with_a_router_beside_them_are_read_16_bytes_at_a_time(data, numbers):
    # 8 experts of rank 16 and their 8 logits: no multiple of 16 numbers, which is all that Triton asks of an argument.
    constants = epilogue_constants(8, 16, 0, 8, "sigmoid") | {"stride_dh": 128}
    code = compile_for(90, kernels._gated_epilogue_bwd_kernel, data, constants).asm["ptx"]
    numbers_of_a_thread = 2 * kernels.TILE // 128  # of dh and of z
    assert code.count("ld.global.v4.b32") == numbers_of_a_thread // numbers


@pytest.mark.parametrize("data", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_products_compile_ahead_of_time(capability, data):
    size = 2 if data == "bf16" else 4
    for rank in (16, kernels.MOST_RANK):
        sizes, _ = kernels.products_blocks(8192, 4096, rank, size)
        compile_for(capability, kernels._gated_products_bwd_kernel, data, sizes | {"UPCAST": False})
    for num_columns in (2 * 8 + 3, 128):
        times, add = kernels.chosen_blocks(num_columns, size)
        compile_for(capability, kernels._times_chosen_fwd_kernel, data, times | {"UPCAST": False})
        compile_for(capability, kernels._add_chosen_fwd_kernel, data, add | {"UPCAST": False})


def test_products_with_chosen_rows_are_launched_without_a_look_at_their_numbers(monkeypatch):
    launched = {}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launched[self.name] = grid
            return lambda *args, **sizes: None

    for name in ("_times_chosen_fwd_kernel", "_add_chosen_fwd_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(name))
    with torch.device("meta"):  # tensors without numbers, which cannot be asked for
        x, weight, z = torch.zeros(200, 70), torch.zeros(70, 40).T, torch.zeros(200, 19)
        columns, offsets = torch.zeros(5, 19, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    assert kernels.times_chosen(x, weight, columns, offsets).shape == (200, 19)
    assert kernels.add_chosen(x, z, weight, columns, offsets, 0.5) is x
    # 3 whole tiles of 64 tokens and one more for each of 5 sequences; 70 numbers of float32 are two blocks
    assert launched == {"_times_chosen_fwd_kernel": (8,), "_add_chosen_fwd_kernel": (16,)}


def test_a_side_of_one_compiles():
    # Triton takes an argument that is 1 for a constant, which has no methods of a tensor.
    epilogue = epilogue_constants(1, 1, 0, 0, "topk") | {"T": 1, "TOP_K": 1}
    compile_for(90, kernels._gated_epilogue_fwd_kernel, "fp32", epilogue, aligned=False)
    del epilogue["TOP_K"]
    compile_for(90, kernels._gated_epilogue_bwd_kernel, "fp32", epilogue | {"stride_dh": 1}, aligned=False)
    sizes, _ = kernels.products_blocks(1, 1, 1, 4)
    one = {"UPCAST": False, "T": 1, "O": 1}
    sides = {"R": 1, "S": 1, "stride_dy": 1, "stride_b": 1, "stride_h": 1}
    compile_for(90, kernels._gated_products_bwd_kernel, "fp32", sizes | one | sides, aligned=False)
    times, add = kernels.chosen_blocks(1, 4)
    ends = {"UPCAST": False, "D": 1, "N": 1, "stride_weight": 1}
    of_x, of_z = {"I": 1, "stride_x": 1}, {"O": 1, "stride_z": 1, "stride_into": 1}
    compile_for(90, kernels._times_chosen_fwd_kernel, "fp32", times | ends | of_x, aligned=False)
    compile_for(90, kernels._add_chosen_fwd_kernel, "fp32", add | ends | of_z, aligned=False)
