"""Axis specifications: which dimensions of an array follow the batch, or another size."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.shapes.ladder import Bucket

Shape = tuple[int, ...]

# What is added before a division stands in brackets with what it is added to: (seq+1)//2.
_LENGTH = re.compile(
    r"(?P<open>\()?(?:(?P<times>[0-9]+)\*)?(?P<axis>[a-zA-Z]\w*)(?(open)(?P<before>[+-][0-9]+)\))"
    r"(?://(?P<over>[0-9]+))?(?P<plus>[+-][0-9]+)?"
)
_FORMS = (
    "seq+1, seq-1, 2*seq, seq//2, (seq+1)//2 (half of it, rounded up), or several of these: "
    "(2*seq-3)//4+1"
)


class Length(NamedTuple):
    """How long a dimension is: a size, or what follows from one, `(2 * seq + 1) // 4 + 1` say.

    Attributes:
        axis: The name of the size.
        times: What it is multiplied with.
        over: What that is divided by, rounded down.
        plus: What is added.
        before: What is added before the division, from 0 to less than `over`.
        left: Whether padding stands in front of what is real, instead of behind it.
    """

    axis: str
    times: int = 1
    over: int = 1
    plus: int = 0
    before: int = 0
    left: bool = False

    @classmethod
    def parse(cls, text: str) -> Length | None:
        """The length of `text`, such as `seq+1`, `2*seq` or `(seq+1)//2`; None if it is none."""
        found = _LENGTH.fullmatch(text)
        if found is None or 0 in (int(found["over"] or 1), int(found["times"] or 1)):
            return None
        times, over = (int(found[part] or 1) for part in ("times", "over"))
        # (seq+3)//2 is (seq+1)//2+1, and 4*seq//2 is 2*seq: two ways to write a length are equal.
        common = math.gcd(times, over)
        times, over = times // common, over // common
        whole, before = divmod(int(found["before"] or 0) // common, over)
        return cls(found["axis"], times, over, int(found["plus"] or 0) + whole, before)

    def __str__(self) -> str:
        times = "" if self.times == 1 else f"{self.times}*"
        over = "" if self.over == 1 else f"//{self.over}"
        scaled = f"{times}{self.axis}"
        scaled = f"({scaled}+{self.before})" if self.before else scaled
        return f"{scaled}{over}" + (f"{self.plus:+}" if self.plus else "")

    def to_left(self) -> Length:
        """The same with padding on the left; rows of a batch are always added at its end."""
        return self._replace(left=self.axis != "batch")

    @property
    def is_size(self) -> bool:
        """Whether it is the size itself."""
        return (self.times, self.over, self.plus) == (1, 1, 0)  # and so nothing is added before

    @property
    def tells_size(self) -> bool:
        """Whether its axis has one size alone at which it is as long: not so once it is rounded."""
        return self.over == 1

    def size_of(self, extent: int) -> int | None:
        """The size of its axis at which it is `extent` long; None if it never is."""
        size, rest = divmod(extent - self.plus, self.times)
        return None if rest or size < 0 else size

    @property
    def least_size(self) -> int:
        """The smallest size of its axis from which on it is 1 or more."""
        return max(1, -(((self.plus - 1) * self.over + self.before) // self.times))

    def of(self, sizes: Bucket) -> int:
        """How long it is in a call of `sizes`."""
        return (sizes.size(self.axis) * self.times + self.before) // self.over + self.plus

    def real(self, sizes: Bucket) -> slice:
        """Where a call of `sizes` is in a dimension that is padded."""
        return side(max(0, self.of(sizes)), left=self.left)


def side(count: int, *, left: bool) -> slice:
    """`count` elements at the start of a dimension, or at its end if padding is on the left."""
    if not left:
        return slice(count)
    return slice(-count, None) if count else slice(0, 0)


class LeafAxes(NamedTuple):
    """Which dimensions of one array follow a size, and how; the others are the same for all calls.

    Attributes:
        dims: The index of each such dimension, and its length.
    """

    dims: tuple[tuple[int, Length], ...] = ()

    @classmethod
    def at(cls, batch: int | None = None, seq: int | None = None, **named: int) -> LeafAxes:
        """The axes that carry each size at one index; None: not at all."""
        places = {"batch": batch, "seq": seq, **named}
        dims = ((place, Length(axis)) for axis, place in places.items() if place is not None)
        return cls(tuple(sorted(dims)))

    @property
    def passes_through(self) -> bool:
        """Whether the array carries no size, and so is never padded."""
        return not self.dims

    @property
    def batch(self) -> int | None:
        """Index of the batch dimension; None: there is none."""
        return self.place("batch")

    @property
    def seq(self) -> int | None:
        """Index of the sequence dimension; None: there is none."""
        return self.place("seq")

    @property
    def along(self) -> int | None:
        """Index of the last dimension that follows another size than the batch; None: no one."""
        return next((at for at, length in reversed(self.dims) if length.axis != "batch"), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes that it follows, each once."""
        return tuple(dict.fromkeys(length.axis for _, length in self.dims))

    def place(self, axis: str) -> int | None:
        """Index of the first dimension that is the size of `axis`; None: there is none."""
        return next(
            (place for place, length in self.dims if length.is_size and length.axis == axis), None
        )

    @property
    def on_left(self) -> frozenset[str]:
        """The axes whose padding stands on the left."""
        return frozenset(length.axis for _, length in self.dims if length.left)

    def padded_left(self, axes: Collection[str]) -> LeafAxes:
        """The same with the padding of these axes on the left."""
        return LeafAxes(
            tuple((place, length._replace(left=length.axis in axes)) for place, length in self.dims)
        )

    def resize(self, shape: Shape, size: Bucket) -> Shape:
        """`shape` with the bucketed dimensions set to those of `size`."""
        resized = list(shape)
        for place, length in self.dims:
            resized[place] = length.of(size)
        return tuple(resized)

    def open(self, shape: Shape) -> tuple[int | None, ...]:
        """`shape` with None in place of the bucketed dimensions: what all buckets share."""
        opened: list[int | None] = list(shape)
        for place, _ in self.dims:
            opened[place] = None
        return tuple(opened)


PASS_THROUGH = LeafAxes()


def carried_axes(axes: Iterable[LeafAxes]) -> tuple[str, ...]:
    """The axes that any of the arrays follows: batch, seq, and the further ones by name."""
    names = {name for leaf in axes for name in leaf.names}
    return tuple(sorted(names, key=lambda name: (name != "batch", name != "seq", name)))


def carried_sizes(axes: Iterable[LeafAxes], sizes: Bucket) -> Shape:
    """Those of `sizes` that any of the arrays carries: the shape of a mask of all elements.

    A function of rows alone has a mask of rows: (batch, 1) beside its (batch,) would broadcast.
    """
    return tuple(map(sizes.size, carried_axes(axes)))


def least_size(axes: Iterable[LeafAxes], axis: str) -> int:
    """The smallest size of an axis at which no array that follows it is empty."""
    lengths = (length for leaf in axes for _, length in leaf.dims)
    return max((length.least_size for length in lengths if length.axis == axis), default=1)


@dataclass(frozen=True, slots=True)
class AxisPattern:
    """A parsed specification such as `"batch seq ..."`.

    Attributes:
        text: The specification as it was written.
        before: The dimensions before `...`, or all of them; None for any one dimension.
        after: The dimensions behind `...`; None where there is no `...`.
    """

    text: str
    before: tuple[Length | None, ...]
    after: tuple[Length | None, ...] | None

    def __repr__(self) -> str:
        return repr(self.text)

    @classmethod
    def parse(cls, text: str, *, option: str = "in_axes") -> AxisPattern:
        """The pattern of `text`.

        Args:
            text: Dimensions in order, separated by spaces: `batch`, `seq`, the name of another
                axis, what follows from one (`seq+1`, `2*seq`, `seq//2`, `(seq+1)//2`), `_` (any one
                dimension) and `...` (the rest), as in einops.
            option: Whose entry it is, for errors.

        Raises:
            ConfigError: Something that is none of these, or `...` twice.
        """
        names = text.split()
        lengths = [None if name in ("_", "...") else Length.parse(name) for name in names]
        for name, length in zip(names, lengths, strict=True):
            if length is None and name not in ("_", "..."):
                if "," in name:
                    raise ConfigError(
                        f"{option} has the entry {text!r} with a comma: separate the dimensions by "
                        f"spaces, {' '.join(text.replace(',', ' ').split())!r}"
                    )
                raise ConfigError(
                    f"{option} has the entry {text!r} with {name!r}: use batch, seq, the name of "
                    "another axis, such as height, or without spaces what follows from one, "
                    f"{_FORMS}; _ (any one dimension) and ... (the rest)"
                )
        if names.count("...") > 1:
            raise ConfigError(
                f"{option} has the entry {text!r} with '...' twice: an array has it once"
            )
        if "..." not in names:
            return cls(text, tuple(lengths), None)
        rest = names.index("...")
        return cls(text, tuple(lengths[:rest]), tuple(lengths[rest + 1 :]))

    @property
    def lengths(self) -> tuple[Length, ...]:
        """The dimensions that follow a size."""
        return tuple(length for length in (*self.before, *(self.after or ())) if length is not None)

    def padded_left(self) -> AxisPattern:
        """The same with padding on the left, but for that of the batch."""
        before, after = (
            None if part is None else tuple(length and length.to_left() for length in part)
            for part in (self.before, self.after)
        )
        return replace(self, before=before or (), after=after)

    @property
    def side(self) -> str:
        """On which side padding stands, but for that of the batch."""
        return "left" if any(length.left for length in self.lengths) else "right"

    @property
    def is_sizes(self) -> bool:
        """Whether each dimension is the size of an axis, and there is one at least."""
        return (
            self.after is None
            and bool(self.before)
            and all(length is not None and length.is_size for length in self.before)
        )

    @property
    def min_ndim(self) -> int:
        """How many dimensions an array has at the least."""
        return len(self.before) + len(self.after or ())

    def resolve(self, ndim: int, *, name: str) -> LeafAxes:
        """The axes of an array of `ndim` dimensions.

        Raises:
            InputShapeError: The array `name` has not as many dimensions as the pattern says.
        """
        after, named = self.after or (), self.min_ndim
        if ndim != named and (self.after is None or ndim < named):
            wanted = f"{named}" if self.after is None else f"{named} or more"
            raise InputShapeError(
                f"{name} has {ndim} dimension(s), but its axes {self.text!r} name {wanted}: "
                "reshape it or correct the axes"
            )
        placed = (*enumerate(self.before), *enumerate(after, start=ndim - len(after)))
        return LeafAxes(tuple((place, length) for place, length in placed if length is not None))


class Leaf(NamedTuple):
    """One array of a call: what errors call it, its axes and its shape."""

    name: str
    axes: LeafAxes
    shape: Shape


def sizes_of(leaves: Sequence[Leaf]) -> Bucket:
    """The sizes that a call has; 1 for a batch or a sequence that no array carries.

    Raises:
        InputShapeError: Two arrays disagree, or a length does not follow from its size; the message
            names both arrays.
    """
    known: dict[str, tuple[str, int]] = {}
    for name, axes, shape in leaves:
        for place, length in axes.dims:
            if length.is_size:
                _agree(
                    length.axis,
                    known.setdefault(length.axis, (name, shape[place])),
                    name,
                    shape[place],
                )
    _add_told(known, leaves)
    sizes = Bucket.of({axis: size for axis, (_, size) in known.items()})
    for name, axes, shape in leaves:
        for place, length in axes.dims:
            if length.axis not in known:
                raise InputShapeError(
                    f"{name} has {shape[place]} in dimension {place}, which is {length} for more "
                    f"than one size of {length.axis}: give an array that tells {length.axis}, too"
                )
            if not length.is_size and shape[place] != (expected := length.of(sizes)):
                whose, size = known[length.axis]
                remedy = "give it that length" if expected >= 0 else f"give more of {length.axis}"
                raise InputShapeError(
                    f"{name} has {shape[place]} in dimension {place}, but {whose} has "
                    f"{length.axis}={size}, from which {length}={expected} follows: {remedy}, or "
                    "correct in_axes"
                )
    return sizes


def _add_told(known: dict[str, tuple[str, int]], leaves: Sequence[Leaf]) -> None:
    """Adds the sizes that no array carries itself, and one tells by a length that follows.

    Raises:
        InputShapeError: An array has no such length at any size.
    """
    told = [
        (name, shape[place], place, length)
        for name, axes, shape in leaves
        for place, length in axes.dims
        if length.tells_size and length.axis not in known
    ]
    for name, extent, place, length in told:
        if (size := length.size_of(extent)) is None:
            raise InputShapeError(
                f"{name} has {extent} in dimension {place}, which is {length} for no size of "
                f"{length.axis}: give it such a length, or correct in_axes"
            )
        known.setdefault(length.axis, (name, size))


def _agree(axis: str, known: tuple[str, int], name: str, size: int) -> None:
    if known[1] == size:
        return
    raise InputShapeError(
        f"{known[0]} has {axis}={known[1]} but {name} has {axis}={size}: "
        f'all arrays of one call must have the same {axis} (an output of unpad="none" has its '
        'bucket\'s: ask for unpad="padded", which is taken at its real sizes, or trim it)'
    )


def axes_by_size(shape: Shape, sizes: Bucket) -> LeafAxes:
    """The specification's rule for inputs without declared axes.

    Axis 0 is the batch where its size is `batch_size`; axis 1 is the sequence where its size is
    `seq_len`.
    """
    batch = 0 if len(shape) > 0 and shape[0] == sizes.batch_size else None
    seq = 1 if len(shape) > 1 and shape[1] == sizes.seq_len else None
    return LeafAxes.at(batch, seq)
