"""What the pickles of executables name, from JAX 0.10.0 to 0.12.0, and what each may be given.

The modules of JAX that stand here are private. They are compared with what a pickle names, and
never imported.
"""

from __future__ import annotations

CALLED = {
    "jax.P": "",
    "jax._src.core.ManualAxisType": "",
    "jax._src.core.ShapedArray": "dtype KeyTy ManualAxisType MemorySpace AutoLayoutSingleton "
    "_unpickle_named_sharding",
    "jax._src.interpreters.pxla.AllArgsInfo": "ShapedArray DebugInfo",
    "jax._src.layout.AutoLayoutSingleton": "",
    "jax._src.linear_util.DebugInfo": "",
    "jax._src.mesh.AbstractMesh": "AxisType AbstractDevice",
    "jax._src.mesh.Mesh": "devices AxisType",
    "jax._src.named_sharding._unpickle_named_sharding": "Mesh AbstractMesh P unpickle_pspec",
    "jax._src.partition_spec.unpickle_pspec": "",
    "jax._src.prng.PRNGImpl": "random",
    "jax._src.random.prng.PRNGImpl": "random",
    "jax._src.sharding_impls._unpickle_gspmd_sharding": "DeviceList OpSharding",
    "jax._src.sharding_impls._unpickle_single_device_sharding": "device",
}
"""What is called, and what may be in its arguments beside names and numbers."""

MEMBERS = frozenset({"jax._src.core.MemorySpace", "jax._src.mesh.AxisType"})
"""Enumerations: called with the number of a member."""

FILLED = {
    "jax._src.interpreters.pxla.UnloadedMeshExecutable": "exec client DeviceList ShapedArray "
    "Layout AutoLayoutSingleton AllArgsInfo _unpickle_named_sharding _unpickle_gspmd_sharding "
    "_unpickle_single_device_sharding",
    "jax._src.layout.Layout": "",
    "jax._src.mesh.AbstractDevice": "",
    "jax._src.prng.KeyTy": "PRNGImpl",
    "jax._src.random.prng.KeyTy": "PRNGImpl",
    "jax._src.stages.ArgInfo": "ShapedArray",
    "jaxlib._hlo.OpSharding": "bytes",
    "jaxlib._jax.DeviceList": "device",
    "jaxlib._jax.OpSharding": "bytes",
}
"""What is made empty and then filled once, and what may be in that beside names and numbers."""

OF_NUMPY = frozenset({"numpy.dtype", "numpy._core.multiarray._reconstruct"})
"""Makers of types and arrays, which could be told to read memory: they have rules of their own."""

_THREEFRY = "threefry_seed threefry_split threefry_random_bits threefry_fold_in"
_RBG = "_rbg_seed _rbg_split _rbg_random_bits _rbg_fold_in _unsafe_rbg_split _unsafe_rbg_fold_in"
_ML_DTYPES = """
bfloat16 int1 int2 int4 uint1 uint2 uint4 float4_e2m1fn float6_e2m3fn float6_e3m2fn float8_e3m4
float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
float8_e8m0fnu
"""
PASSED = {
    "numpy.ndarray": "ndarray",
    **{f"jax._src.prng.{name}": "random" for name in f"{_THREEFRY} {_RBG}".split()},
    **{f"jax._src.random.threefry2x32.{name}": "random" for name in _THREEFRY.split()},
    **{f"jax._src.random.rbg.{name}": "random" for name in _RBG.split()},
    **{f"ml_dtypes.{name}": "scalar" for name in _ML_DTYPES.split()},
}
"""Functions and classes that are passed on by a pickle, and never called."""

NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}) | frozenset(
    {"f2", "f4", "f8", "c8", "c16"}
)
"""The types of numbers that are NumPy's own, by their codes."""
