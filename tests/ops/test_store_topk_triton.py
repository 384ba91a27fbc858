"""triton_kernels/store_topk.py without a GPU: logic in the interpreter, code by compiling for three machines."""

import pytest

from tests.ops._interpreter import assert_passes_in_the_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip(
    "fastsft.triton_kernels.store_topk", reason="fastsft is not installed: pip install -e .", exc_type=ImportError
)

STORED = {"bf16": "*bf16", "int8": "*i8", "1bit": "*u8"}
INTEGERS = {
    "query_sums": "*i32",
    "thresholds": "*i32",
    "counts": "*i32",
    "groups": "*i64",
    "keys": "*i64",
    "rows": "*i64",
}
SIZES = {"Q": "i32", "k": "i32", "C": "i32", "W": "i32", "stride": "i32", "size": "i64", "first": "i64", "last": "i64"}


def test_logic_in_the_interpreter():
    assert_passes_in_the_interpreter("interpret_store_topk.py")


def compile_for(capability, kernel, pointers, constants, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = INTEGERS | SIZES | pointers
    signature = {name: "constexpr" if name in constants else known.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    # What every machine since sm_80 gives to a block.
    assert compiled.metadata.shared <= 163 * 1024


@pytest.mark.parametrize("format", ["bf16", "int8", "1bit"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability, format):
    kinds = {"IS_BF16": format == "bf16", "IS_BITS": format == "1bit", "G": 3, "M": 1, "ALL": False}
    data = {"rows": STORED[format], "queries": "*bf16" if format == "bf16" else "*i8"}
    for queries in (1, kernels.FEW_QUERIES):
        tile = dict(kernels.tiles(format, queries))
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        constants = kinds | tile | {"EVEN": True, "PACKED": True, "UPCAST": False}
        compile_for(capability, kernels._store_topk_fwd_kernel, data, constants, **options)
    if format != "1bit":
        dots = {"dots": "*fp32" if format == "bf16" else "*i32"}
        scored = {"IS_BF16": format == "bf16", "G": 3, "M": 1, "ALL": False, "BLOCK_N": 8, "BLOCK_Q": 64, "TILES": 16}
        compile_for(capability, kernels._store_topk_scored_kernel, dots, scored, num_warps=1)
    lists = {"out": "*i64", "out_size": "i32", "signs": "i32", "first_row": "i64", "size": "i32"}
    compile_for(capability, kernels._rank_kernel, lists, {"BLOCK": 32, "SIZE": kernels.RANKED})
    compile_for(capability, kernels._answer_kernel, lists, {"BLOCK": 64})
