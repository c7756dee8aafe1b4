"""Compiles every Triton kernel of the package to machine code, without a GPU; prints one line per kernel.

Run as a script by test_kernels_compile.py, in a process of its own: kernels that were imported under Triton's
interpreter cannot be compiled.
"""

from __future__ import annotations

import sys

import triton
from autotool_kernels import triton_linear, triton_logits, triton_policy, triton_sample
from triton.backends.compiler import GPUTarget

SCALARS = {
    "temperature": "fp32", "clip_low": "fp32", "clip_high": "fp32", "constant": "fp32", "target": "*i64",
    "target_short": "fp32", "target_long": "fp32", "beta_short": "fp32", "beta_long": "fp32",
    "ignore_index": "i32", "N": "i32", "V": "i32", "H": "i32", "B": "i32", "first_column": "i32",
}  # fmt: skip
POINTERS = {
    "hidden": "*bf16", "weight": "*bf16", "logits": "*bf16", "out": "*bf16", "seed": "*i64", "offset": "*i64",
    "token_out": "*i64", "cu_seqlens": "*i32", "mask": "*i1", "is_short": "*i8", "counts": "*fp64",
    "count_out": "*fp64", "partials": "*fp64",
}  # fmt: skip
FLAGS = {"HAS_ROW_T": True, "HAS_G": True, "HAS_H": True, "UPCAST": False, "TOKENS": True, "SEQUENCES": True}
LINEAR = {
    "BLOCK_N": triton_linear.BLOCK_N,
    "BLOCK_V": triton_linear.BLOCK_V,
    "BLOCK_H": triton_linear.BLOCK_H,
}
SIZES = {"SPLITS": 149, "SPLIT_TILES": triton_linear.SPLIT_TILES, "BLOCK_B": triton_policy.BLOCK_B, **LINEAR}
# (kernel, its own constants, warps): the settings the launchers use at a vocabulary of 152064.
KERNELS = (
    (triton_logits._forward, {"BLOCK": triton_logits.MAX_BLOCK}, 8),
    (triton_logits._backward, {"BLOCK": triton_logits.MAX_BLOCK}, 8),
    (triton_linear._forward, {}, 4),
    (triton_linear._merge, {"BLOCK": triton_linear.MERGE_ROWS}, 4),
    (triton_linear._dlogits, {}, 4),
    (triton_policy._gate, {"BLOCK": triton_policy.BLOCK, "HAS_GATE_TENSOR": True}, 4),
    (triton_policy._gradients, {"BLOCK": triton_policy.BLOCK}, 4),
    (triton_policy._finish, {"HAS_GATE_TENSOR": False}, 4),
    (triton_sample._sample, {"BLOCK": triton_sample.MAX_BLOCK}, 4),
)


def compile_kernel(kernel, constants: dict, warps: int, capability: int):
    signature, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.isupper() and len(name) > 1:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants.get(name, FLAGS.get(name, SIZES.get(name)))
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif "stride" in name:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, "*fp32")
    source = triton.compiler.ASTSource(kernel, signature, constexprs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


if __name__ == "__main__":
    for kernel, constants, warps in KERNELS:
        for capability in map(int, sys.argv[1:] or ("80", "90")):
            compiled = compile_kernel(kernel, constants, warps, capability)
            name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
            print(f"{name} sm_{capability} {len(compiled.asm['cubin'])} bytes")
