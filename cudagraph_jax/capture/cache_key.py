"""What identifies the executable of a program in a store, and what is written beside it."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, Sharding

from cudagraph_jax._base.text import error_text
from cudagraph_jax.errors import InputShapeError, StoreError
from cudagraph_jax.program.fingerprint import written, written_structure
from cudagraph_jax.program.outputs import OutputLeaf, Outputs, Unpad
from cudagraph_jax.program.program import Program
from cudagraph_jax.shapes.axes import LeafAxes, Length
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.store import Json, Stored
from cudagraph_jax.xla.environment import are_own, host_fields, jaxlib_version
from cudagraph_jax.xla.settings import default_device, mesh_of
from cudagraph_jax.xla.stages import Executable, Lowering

Fields = dict[str, Json]

WHAT_IT_COMPUTES = (
    "known_by",
    "stablehlo",
    "outputs",
    "fingerprint",
    "function",
    "code",
    "places",
    "structure",
    "axes",
    "statics",
    "unpad",
    "out_axes",
    "mask_argname",
    "mesh",
)
"""Fields that are not known, or not there, before a function is lowered."""

_LAYOUT = 1
"""Of what is stored; another number makes all that is stored a miss."""
_MOST_LISTED = 64
_CUSTOM_CALL = re.compile(r"(?:custom_call @|call_target_name = )\"?([^\s(\"]+)")
_BUILT_IN = frozenset(
    {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"}
)


def execution_devices(program: Program) -> tuple[jax.Device, ...]:
    """The devices that a program runs on, in the order of its partitions.

    Raises:
        StoreError: They are not known before it is compiled.
    """
    placed = {leaf.sharding for leaf in program.variant.leaves if leaf.sharding is not None}
    mesh = mesh_of(program.settings.values)
    unplaced = (default_device(),) if mesh is None else tuple(mesh.devices.flat)
    orders = {_order(sharding) for sharding in placed} or {unplaced}
    if len(orders) > 1:
        raise StoreError("its arguments lie on different devices")
    return orders.pop()


def loading_keeps_options(jaxlib: str | None = None) -> bool:
    """Whether what is loaded off the CPU has the compiler options that it was compiled with.

    XLA's CUDA runtime keeps them in 0.12.0.1: what was compiled with `CommandBufferScope.NONE`
    launches no graph after loading, and with FULL one. JAX 0.11.2 does not write them by name.

    Args:
        jaxlib: Its version; None: that of the one that runs.
    """
    major, minor = (jaxlib_version() if jaxlib is None else jaxlib).split(".")[:2]
    return (int(major), int(minor)) >= (0, 12)


def common_fields(program: Program, bucket: Bucket, *, options: Mapping[str, str]) -> Fields:
    """What identifies an executable, but for what it computes.

    Raises:
        StoreError: It is nothing that could be stored.
    """
    devices = execution_devices(program)
    if options and devices[0].platform != "cpu" and not loading_keeps_options():
        raise StoreError(
            "loading may lose its compiler options on this platform with a jaxlib before 0.12: "
            "JAX's persistent cache, which keeps them, can be on instead"
        )
    target, masks = program.target, program.mask_homes(bucket)
    # Of a program of several processes each has a part of its own, that of its devices.
    part = (
        {} if are_own(devices) else {"process": f"{jax.process_index()} of {jax.process_count()}"}
    )
    return {
        "layout": _LAYOUT,
        **part,
        "name": target.name,
        "bucket": str(bucket),
        "arguments": _listed([leaf.placed for leaf in program.variant.leaves]),
        "donated": list(target.donate_argnums),
        **{f"mask {name}": repr(home) for name, home in masks.items()},
        **{f"option {name}": value for name, value in sorted(options.items())},
        **host_fields(devices),
    }


def lowered_fields(
    common: Fields,
    program: Program,
    lowering: Lowering,
    bucket: Bucket,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Fields:
    """What identifies an executable, with what it computes: its StableHLO.

    Raises:
        StoreError: It runs on other devices than its arguments say.
    """
    devices = len(execution_devices(program))
    try:
        partitions, drops_arguments = lowering.partitions, lowering.drops_arguments
    except (LookupError, AttributeError, StopIteration) as error:
        raise StoreError(f"its StableHLO is not what was expected: {error_text(error)}") from error
    if partitions != devices:
        raise StoreError(f"it runs on {partitions} devices, but its arguments are for {devices}")
    text = lowering.text
    if drops_arguments:
        # The text does not say which ones: `a` of (a, b) reads like `b` of (a, b).
        text = program.lower(bucket, keep_unused=True, clock=clock).text
    outputs = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(lowering.output_info)]
    return {
        **common,
        "known_by": "stablehlo",
        "outputs": _listed(outputs),
        "stablehlo": hashlib.sha256(text.encode()).hexdigest(),
    }


def fingerprint_fields(program: Program) -> Fields | None:
    """What identifies a program's executables by its fingerprint, so that nothing is traced.

    None where there is no fingerprint, or where something that is part of the program, such as a
    static argument, has no name that another process would give it.

    The same for every bucket of it; the other fields are those of `common_fields`.

    Raises:
        StoreError: Another function has this fingerprint, too.
    """
    target, variant = program.target, program.variant
    fingerprint = target.fingerprint
    if fingerprint is None:
        return None
    if fingerprint.is_taken():
        raise StoreError(
            f"fingerprint={fingerprint.given!r} is that of another function, too, which cannot be "
            "told from this one without tracing: give each its own"
        )
    structure = written_structure(variant.structure)
    statics = [written(static) for static in variant.statics]
    prefixes = [_prefix_text(target.unpad), _prefix_text(target.out_axes)]
    if structure is None or None in statics or None in prefixes:
        return None
    return {
        "known_by": "fingerprint",
        "fingerprint": fingerprint.given,
        "function": fingerprint.function,
        "code": fingerprint.code,
        "places": list(fingerprint.places),
        "structure": structure if len(structure) < 1000 else _hashed(structure),
        "axes": _listed([_axes_text(axes) for axes in program.axes]),
        "statics": statics,
        "unpad": prefixes[0],
        "out_axes": prefixes[1],
        "mask_argname": _mask_text(program),
    }


def is_portable(lowering: Lowering) -> bool:
    """Whether the executable can be loaded in a process that has not lowered its function.

    Lowering registers what custom calls lead to: without it, LAPACK calls end the process
    (docs/xla.md, "Persisting executables").
    """
    return _BUILT_IN.issuperset(_CUSTOM_CALL.findall(lowering.text))


def _listed(texts: list[str]) -> Json:
    """Texts one by one, so that a difference shows; the hash of very many."""
    return texts if len(texts) <= _MOST_LISTED else [f"{len(texts)}", _hashed("\n".join(texts))]


def _axes_text(axes: LeafAxes) -> str:
    """As versions without named axes wrote it, where these are all there are."""
    return f"({axes.batch}, {axes.seq})" if _is_plain(axes) else str(_axes_to_json(axes))


_LEFT = " padded on the left"


def _is_plain(axes: LeafAxes) -> bool:
    return axes == LeafAxes.at(axes.batch, axes.seq)


def _axes_to_json(axes: LeafAxes) -> Json:
    if _is_plain(axes):
        return [axes.batch, axes.seq]
    return {str(place): f"{length}{_LEFT * length.left}" for place, length in axes.dims}


def _axes_from_json(written: Any) -> LeafAxes:
    if isinstance(written, list):
        batch, seq = map(_index, written)
        return LeafAxes.at(batch, seq)
    dims = []
    for place, text in written.items():
        length = Length.parse(text.removesuffix(_LEFT))
        if length is None:
            raise ValueError(f"{text!r} is no length")
        dims.append((int(place), length._replace(left=text.endswith(_LEFT))))
    return LeafAxes(tuple(dims))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _mask_text(program: Program) -> str | None:
    """The masks' names, and which axes they have where they are not the batch and the sequence."""
    texts = []
    for name, named in program.target.masks:
        axes = program.carried if named is None else named
        texts.append(name if axes == ("batch", "seq") else " ".join((name, *axes)))
    return ", ".join(texts) or None


def _prefix_text(prefix: PyTree) -> str | None:
    """A pytree prefix of texts, which may be of somebody's own kinds of nodes."""
    leaves, structure = jax.tree.flatten(prefix, is_leaf=lambda node: node is None)
    own = written_structure(structure)
    return None if own is None else f"{own} {written(leaves)}"


def _order(sharding: Sharding) -> tuple[jax.Device, ...]:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return tuple(sharding.mesh.devices.flat)
    try:
        devices = tuple(sharding.device_set)
    except ValueError as error:
        raise StoreError(f"{sharding!r} names no devices") from error
    if len(devices) > 1:
        raise StoreError(f"the order of the devices of {sharding!r} is not known")
    return devices


N = TypeVar("N", int, float)

_MOST = 1 << 62


def beside(outputs: Outputs, executable: Executable) -> dict[str, Json]:
    """What is stored beside an executable, so that loading need not find it out again."""
    own = outputs._replace(structure=jax.tree.structure(executable.output_info))
    return {
        # The text in front named a grid once; files have it still.
        "outputs": [["", outputs_to_json(own)]],
        "memory_bytes": executable.memory_bytes,
        "closed_over_bytes": executable.closed_over_bytes,
        "flops": executable.flops,
        "compile_ms": round(executable.compile_ms, 3),
    }


def check_outputs(outputs: Outputs, executable: Executable, bucket: Bucket) -> None:
    """Refuses axes that the executable's outputs do not have."""
    try:
        shapes = [tuple(info.shape) for info in jax.tree.leaves(executable.output_info)]
        fits = outputs.structure.num_leaves == len(shapes) and all(
            leaf.ndim == len(shape) and leaf.axes.resize(shape, bucket) == shape
            for leaf, shape in zip(outputs.leaves, shapes, strict=True)
        )
    except (ValueError, LookupError):
        fits = False
    if not fits:
        raise StoreError("its outputs are not what its header says")


def number_of(stored: Stored, name: str, kind: type[N]) -> N | None:
    """A figure that the file states; None where it is no such number."""
    value = stored.extra.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return kind(value) if 0 <= value < _MOST else None


def outputs_in(stored: Stored) -> Outputs | None:
    """The outputs; None where the file does not say.

    Raises:
        StoreError: It says something else.
    """
    described = stored.extra.get("outputs")
    if not isinstance(described, list):
        return None
    pairs = [pair for pair in described if isinstance(pair, list) and len(pair) == 2]
    try:
        return outputs_from_json(pairs[-1][1]) if pairs else None
    except (LookupError, TypeError, ValueError, InputShapeError) as error:
        raise StoreError(f"its outputs are not described: {error_text(error)}") from error


# What is not written, so that headers of older versions are read.
_USUAL = {"is_tried": True, "may_spread": False}


def outputs_to_json(outputs: Outputs) -> Json:
    """`outputs` for a header; None where a pytree of the caller's own kinds cannot be written."""
    try:
        if outputs.structure_follows:
            return None  # each size has its own
        tree = structure_to_json(outputs.structure, itertools.count())
    except TypeError:
        return None
    leaves: list[Json] = [
        [
            *(leaf.name, _axes_to_json(leaf.axes), leaf.unpad, leaf.ndim, leaf.comparable),
            *_following(leaf),
        ]
        for leaf in outputs.leaves
    ]
    facts: dict[str, Json] = {"is_tried": outputs.is_tried, "may_spread": outputs.may_spread}
    unusual = {name: fact for name, fact in facts.items() if fact != _USUAL[name]}
    return {"tree": tree, "leaves": leaves, **unusual}


def _following(leaf: OutputLeaf) -> list[Json]:
    """Nothing for most, so that older versions read it."""
    return [[[axis, size] for axis, size in leaf.follows]] if leaf.follows else []


def outputs_from_json(written: Any) -> Outputs | None:
    """What `outputs_to_json` wrote; None where it could not.

    Raises:
        LookupError, TypeError, ValueError, InputShapeError: It wrote something else.
    """
    if written is None:
        return None
    structure = jax.tree.structure(tree_from_json(written["tree"]))
    leaves = tuple(
        OutputLeaf(
            str(name),
            _axes_from_json(axes),
            _unpad(unpad),
            int(ndim),
            bool(comparable),
            tuple((int(axis), str(size)) for following in rest for axis, size in following),
        )
        for name, axes, unpad, ndim, comparable, *rest in written["leaves"]
    )
    facts = {name: bool(written.get(name, usual)) for name, usual in _USUAL.items()}
    return Outputs.of(structure, leaves, **facts)


def _index(place: Any) -> int | None:
    return None if place is None else int(place)


def structure_to_json(structure: jax.tree_util.PyTreeDef, places: Iterator[int]) -> Json:
    """A pytree of built-in containers: a list with its kind in front, or a number for a leaf."""
    node = structure.node_data()
    if node is None:
        return next(places)
    kind, keys = node
    inner = [structure_to_json(child, places) for child in structure.children()]
    if kind is dict and all(type(key) is str for key in keys):
        return ["dict", *([key, value] for key, value in zip(keys, inner, strict=True))]
    if kind in (list, tuple):
        return [kind.__name__, *inner]
    if kind is type(None):
        return None
    raise TypeError(f"{kind.__name__} is no built-in container")


def tree_from_json(tree: Any) -> PyTree:
    """A pytree of the structure that `structure_to_json` wrote, with the numbers as leaves."""
    if not isinstance(tree, list):
        return tree
    kind, *items = tree
    if kind == "dict":
        return {key: tree_from_json(value) for key, value in items}
    inner = map(tree_from_json, items)
    return list(inner) if kind == "list" else tuple(inner)


def _unpad(mode: object) -> Unpad:
    if mode not in ("host", "device", "none", "padded"):
        raise ValueError(f"unpad={mode!r:.80} is unknown")
    return mode
