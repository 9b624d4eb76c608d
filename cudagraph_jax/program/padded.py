"""`Padded`: an array at its bucket's size, left on the device, and which part of it is real."""

from __future__ import annotations

import copy
import math
import operator
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Final, NoReturn, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jax.tree_util import GetAttrKey, PyTreeDef

from cudagraph_jax._base.log import logger
from cudagraph_jax._base.text import one_line
from cudagraph_jax.errors import CaptureError, InputShapeError
from cudagraph_jax.program.outputs import Outputs
from cudagraph_jax.shapes.axes import Shape, side
from cudagraph_jax.shapes.padding import Array, Index, PadValue, own_part
from cudagraph_jax.shapes.pytrees import PyTree
from cudagraph_jax.xla.serialize import output_leaves
from cudagraph_jax.xla.shardings import dividing, put
from cudagraph_jax.xla.stages import Executable, lower_function

_ADVICE: Final = (
    "use numpy.asarray(x) for its real part, x.array for all of it with the padding, or pass it to "
    "a bucketed function"
)


class Layout:
    """Which part of an array is real, and what is known of the rest; shared by many arrays.

    Equal ones may be re-filled by other executables: a `Padded` is asked for its own.

    Args:
        shape: The real sizes.
        left: The dimensions whose padding stands in front of what is real.
        fill: What stands in the padding, as `pad_values` say it; None: nobody knows.
        refill: What writes another value there; None where nothing was compiled for that.
        filled: The array that is known to hold `fill`; it is not kept.

    Attributes:
        shape, left, fill, refill: As given.
    """

    __slots__ = ("_filled", "_key", "fill", "left", "refill", "shape")

    def __init__(
        self,
        shape: Shape,
        left: Collection[int] = (),
        fill: PadValue | None = None,
        refill: Refill | None = None,
        filled: PyTree = None,
    ) -> None:
        self.shape, self.left = shape, frozenset(left)
        self.fill, self.refill = fill, refill
        is_known = fill is not None and isinstance(filled, jax.Array | np.ndarray)
        self._filled = weakref.ref(filled) if is_known else None
        # By its text: 0 and -0.0 are equal, and not one padding.
        self._key = (shape, self.left, str(fill))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        left = f", left={tuple(sorted(self.left))}" if self.left else ""
        return one_line(f"Layout({_listed(self.shape)}{left}, fill={self.fill})")

    @property
    def index(self) -> Index:
        """Where the real part is."""
        return tuple(side(size, left=place in self.left) for place, size in enumerate(self.shape))

    def of(self, array: PyTree) -> Layout:
        """The same of what a function of pytrees has made: it is known to hold `fill` no longer.

        What was done to the array was done to its padding: after `x + 1` that is not 0.
        """
        if self.fill is None or (self._filled is not None and self._filled() is array):
            return self
        return Layout(self.shape, self.left, refill=self.refill)

    def check(self, whole: Shape, *, name: str = "a Padded") -> None:
        """Raises unless an array of that shape has such a part.

        Raises:
            InputShapeError: It has not.
        """
        if len(self.shape) != len(whole) or not all(
            0 <= size <= extent for size, extent in zip(self.shape, whole, strict=True)
        ):
            raise InputShapeError(
                f"{name} has the real sizes {self.shape}, which are no part of its array's shape "
                f"{whole}: give one for each dimension, and make a new Padded of an array whose "
                "shape was changed, as jax.vmap and jax.tree.map may do"
            )


class Padded:
    """An array at the size of its bucket, on the device, and the real sizes within it.

    What `unpad="padded"` hands out, without waiting or compiling. Another bucketed function takes
    it wherever it takes an array: the sizes of the call are the real ones. `numpy.asarray` waits
    for it and gives the real part. It is a pytree of its one array, for `jax.block_until_ready`,
    `jax.device_get` and the like; what a function of pytrees makes of it has the same real
    sizes, and padding that nobody knows. A copy is one like it; one that was pickled goes through
    the host where its padding has to be filled anew. Everything else that would mix the padding in,
    such as arithmetic, an index or a function of `jax.numpy`, is refused.

    Args:
        array: The array.
        shape: The real sizes, no larger than its own.
        left: The dimensions whose padding stands in front of what is real.
        fill: What stands in its padding, where that is known.

    Raises:
        InputShapeError: It is no array, or the shape or the dimensions are not those of a part of
            it; or the operation is refused.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> scores = Padded(jnp.arange(8.0).reshape(2, 4), (1, 3))
        >>> scores
        Padded(float32[1,3] in [2,4])
        >>> np.asarray(scores)
        array([[0., 1., 2.]], dtype=float32)
    """

    __slots__ = ("__weakref__", "_array", "_layout")
    __hash__ = None  # type: ignore[assignment]  # as that of an array

    _array: Any
    _layout: Layout

    def __init__(
        self,
        array: jax.Array,
        shape: Sequence[int],
        *,
        left: Collection[int] = (),
        fill: PadValue | None = None,
    ) -> None:
        if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise InputShapeError(
                f"a Padded holds an array, not what is of type {type(array).__name__}: give it "
                "numpy.array of that"
            )
        layout = Layout(tuple(map(operator.index, shape)), left, fill, filled=array)
        layout.check(array.shape)
        if not layout.left <= set(range(array.ndim)):
            raise InputShapeError(
                f"left={tuple(left)} are no dimensions of an array of shape {array.shape}: give "
                "those whose padding stands in front"
            )
        self._array, self._layout = array, layout

    @classmethod
    def laid_out(cls, array: PyTree, layout: Layout) -> Self:
        """An array of a layout that is known to be one of its."""
        padded = object.__new__(cls)
        padded._array, padded._layout = array, layout
        return padded

    @property
    def array(self) -> jax.Array:
        """The whole array, as the bucket's executable gave it: padding included, not waited for."""
        whole: jax.Array = self._array
        return whole

    @property
    def layout(self) -> Layout:
        """Which part of it is real."""
        return self._layout

    @property
    def shape(self) -> Shape:
        """The real sizes."""
        return self._layout.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self._layout.shape)

    @property
    def size(self) -> int:
        """The number of real elements."""
        return math.prod(self._layout.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its elements."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    @property
    def weak_type(self) -> bool:
        """Whether its dtype gives way to that of the arrays it meets, as that of a number may."""
        return bool(getattr(self._array, "weak_type", False))

    @property
    def is_whole(self) -> bool:
        """Whether all of the array is real."""
        return bool(self._layout.shape == self._array.shape)

    def __len__(self) -> int:
        return self._layout.shape[0]

    def __repr__(self) -> str:
        # What a function of pytrees has put there need not be an array.
        dtype, whole = getattr(self._array, "dtype", "?"), getattr(self._array, "shape", "?")
        left = f", left={tuple(sorted(self._layout.left))}" if self._layout.left else ""
        return f"Padded({dtype}{_listed(self.shape)} in {_listed(whole)}{left})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        self._layout.check(self._array.shape)
        part = own_part(np.asarray(self._array), self._layout.index)
        return np.array(part, dtype=dtype, copy=copy)

    def __copy__(self) -> Self:
        return self.laid_out(self._array, self._layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        array, own = copy.deepcopy(self._array, memo), self._layout
        fill = own.of(self._array).fill
        return self.laid_out(array, Layout(own.shape, own.left, fill, own.refill, filled=array))

    def __reduce__(self) -> tuple[object, ...]:
        # Without what fills it anew: an executable of this process.
        layout = self._layout
        return _padded, (self._array, layout.shape, layout.left, layout.fill)

    def copy_to_host_async(self) -> None:
        """Begins to copy it to the host, for a `numpy.asarray` that follows."""
        if isinstance(self._array, jax.Array):
            self._array.copy_to_host_async()

    def is_ready(self) -> bool:
        """Whether it is computed."""
        return bool(getattr(self._array, "is_ready", lambda: True)())

    def block_until_ready(self) -> Self:
        """Waits until it is computed; itself."""
        jax.block_until_ready(self._array)
        return self

    def is_deleted(self) -> bool:
        """Whether the array is gone, as after a call that it was donated to."""
        return isinstance(self._array, jax.Array) and self._array.is_deleted()

    @property
    def __jax_array__(self) -> NoReturn:
        # JAX calls it in some places, and in others goes by its being there to refuse the object.
        raise _refusal("a function of JAX")

    def __array_ufunc__(self, ufunc: np.ufunc, *args: object, **kwargs: object) -> NoReturn:
        raise _refusal(f"numpy.{ufunc.__name__}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Padded has no {name!r}: {_ADVICE}", name=name, obj=self)


def _listed(shape: Sequence[object]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _refusal(what: str) -> InputShapeError:
    return InputShapeError(f"{what} would take the padding of a Padded for real: {_ADVICE}")


def _padded(array: PyTree, shape: Shape, left: Collection[int], fill: PadValue | None) -> Padded:
    return Padded.laid_out(array, Layout(shape, left, fill, filled=array))


def _unflattened(layout: Layout, children: Iterable[PyTree]) -> Padded:
    (array,) = children
    return Padded.laid_out(array, layout.of(array))


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Padded, *others: object) -> NoReturn:
        raise _refusal(name)

    refuse.__name__ = name
    return refuse


_ARITHMETIC = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"),
    *("lshift", "rshift", "and", "xor", "or"),
)
for _name in (
    *_ARITHMETIC,
    *(f"r{name}" for name in _ARITHMETIC),
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "round"),
    *("bool", "int", "float", "complex", "index"),
    *("getitem", "setitem", "iter", "contains"),
):
    setattr(Padded, f"__{_name}__", _refused(f"__{_name}__"))

jax.tree_util.register_pytree_with_keys(
    Padded,
    lambda padded: (((GetAttrKey("array"), padded.array),), padded.layout),
    _unflattened,
    lambda padded: ((padded.array,), padded.layout),
)


def is_padded(node: object) -> TypeGuard[Padded]:
    """Whether it is a `Padded`: a leaf of a call's arguments, and a node to JAX."""
    return type(node) is Padded


def without_padding(value: PyTree) -> PyTree:
    """The array of a `Padded` that has no padding, which may stand wherever an array may."""
    return value.array if isinstance(value, Padded) and value.is_whole else value


def flatten_arguments(tree: PyTree) -> tuple[list[PyTree], PyTreeDef]:
    """The leaves of arguments, of which a `Padded` is one, and the structure with arrays there."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_padded)
    return [_abstract(leaf) if type(leaf) is Padded else leaf for leaf in leaves], structure


def _abstract(padded: Padded) -> PyTree:
    """Itself; the shape of the real part where its array is a shape."""
    if not isinstance(padded.array, jax.ShapeDtypeStruct):
        return padded
    return jax.ShapeDtypeStruct(padded.shape, padded.dtype, sharding=padded.array.sharding)


def real_part(value: PyTree) -> PyTree:
    """The real part of a `Padded`, where it is: through the host, which compiles no slice.

    All else as it is.
    """
    padded = without_padding(value)
    if not is_padded(padded):
        return padded
    if isinstance(padded.array, jax.core.Tracer):
        padded.layout.check(padded.array.shape)
        return padded.array[padded.layout.index]
    part = fetched(padded)
    if not isinstance(padded.array, jax.Array):
        return part
    home = dividing(padded.array.sharding, part.shape) if padded.array.committed else None
    return jax.device_put(part, home)


def fetched(padded: Padded) -> Array:
    """The real part in NumPy, by a transfer that is explicit."""
    padded.layout.check(padded.array.shape)
    whole: Array = jax.device_get(padded.array)
    return whole[padded.layout.index]


class Refill:
    """Writes a value over the padding of arrays of one shape, on the device; compiled before.

    Args:
        executable: Takes such an array, its real sizes, and the value.
        array: The shape and dtype of those arrays.
    """

    __slots__ = ("_array", "_call", "_shardings")

    def __init__(self, executable: Executable, array: jax.ShapeDtypeStruct) -> None:
        self._call, self._array = executable.call, array
        self._shardings, _ = executable.call.input_shardings

    def takes(self, array: PyTree) -> bool:
        """Whether it was compiled for an array like that, and where that is."""
        return (
            isinstance(array, jax.Array)
            and (array.shape, array.dtype) == (self._array.shape, self._array.dtype)
            and array.sharding.is_equivalent_to(self._shardings[0], array.ndim)
        )

    def operands(self, shape: Shape, value: PadValue) -> tuple[PyTree, ...]:
        """The real sizes and the value, on the device."""
        given = np.array(shape, np.int32), np.full((), value, self._array.dtype)
        return tuple(map(put, given, self._shardings[1:]))

    def __call__(self, array: PyTree, operands: tuple[PyTree, ...]) -> jax.Array:
        """`array` with that value in its padding."""
        filled: jax.Array = self._call(array, *operands)
        return filled


def compile_refill(
    array: jax.ShapeDtypeStruct, places: Collection[int], left: Collection[int]
) -> Refill | None:
    """What re-fills the padding of arrays like this; None where XLA has no such operation for it.

    Args:
        array: Their shape, dtype and sharding.
        places: The dimensions that are padded.
        left: Those of them whose padding stands in front.
    """

    def refill(whole: jax.Array, shape: jax.Array, value: jax.Array) -> jax.Array:
        is_real: Any = True
        for place in places:
            at = jax.lax.broadcasted_iota(np.int32, whole.shape, place)
            extent, size = whole.shape[place], shape[place]
            is_real &= at >= extent - size if place in left else at < size
        return jnp.where(is_real, whole, value)

    sizes = jax.ShapeDtypeStruct((len(array.shape),), np.int32)
    value = jax.ShapeDtypeStruct((), array.dtype)
    sizes_text = "x".join(map(str, array.shape))
    try:
        lowering = lower_function(refill, (array, sizes, value), {}, name=f"refill_{sizes_text}")
        return Refill(lowering.compile(), array)
    except CaptureError as error:  # of a dtype that XLA keeps and does not compute with
        logger.info("what is passed on of %s goes through the host: %s", sizes_text, error)
        return None


Refills = tuple[Refill | None, ...]


def refills_of(outputs: Outputs, executable: Executable, *, left: Collection[str]) -> Refills:
    """What re-fills each output that is handed out as a `Padded`; nothing where none is.

    Args:
        outputs: The outputs of a bucket.
        executable: What gives them.
        left: The axes whose padding stands on the left.
    """
    if all(leaf.unpad != "padded" for leaf in outputs.leaves):
        return ()
    if not isinstance(executable.call, Compiled):  # of a compiler that compiles nothing
        return (None,) * len(outputs.leaves)
    known: dict[Hashable, Refill | None] = {}  # the caches of many layers are alike
    found: list[Refill | None] = []
    for leaf, info in zip(outputs.leaves, output_leaves(executable.call), strict=True):
        axes = dict(leaf.follows) | {place: length.axis for place, length in leaf.axes.dims}
        if leaf.unpad != "padded" or not axes:
            found.append(None)
            continue
        in_front = frozenset(place for place, axis in axes.items() if axis in left)
        key = (info.shape, info.dtype, frozenset(axes), in_front, info.sharding)
        if key not in known:
            array = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=info.sharding)
            known[key] = compile_refill(array, axes, in_front)
        found.append(known[key])
    return tuple(found)


def padded_maker(index: Index, refill: Refill | None) -> Callable[[PyTree], Padded]:
    """What makes a `Padded` of arrays whose real part is at `index`."""
    layout: Layout | None = None

    def make(array: PyTree) -> Padded:
        nonlocal layout
        if layout is None:  # the first array has the shape of all
            pairs = list(zip(index, array.shape, strict=True))
            shape = tuple(len(range(*real.indices(size))) for real, size in pairs)
            left = [place for place, (real, _) in enumerate(pairs) if real.start]
            layout = Layout(shape, left, refill=refill)
        return Padded.laid_out(array, layout)

    return make
