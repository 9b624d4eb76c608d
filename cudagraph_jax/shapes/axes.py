"""Axis specifications: which dimensions of an array are the batch and the sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cudagraph_jax.errors import ConfigError, InputShapeError
from cudagraph_jax.shapes.ladder import Bucket

Shape = tuple[int, ...]


class LeafAxes(NamedTuple):
    """Where one array carries the two bucketed sizes; None: it does not.

    Attributes:
        batch: Index of the batch dimension.
        seq: Index of the sequence dimension.
    """

    batch: int | None = None
    seq: int | None = None

    @property
    def passes_through(self) -> bool:
        """Whether the array carries neither size, and so is never padded."""
        return self.batch is None and self.seq is None

    def resize(self, shape: Shape, size: Bucket) -> Shape:
        """`shape` with the bucketed dimensions set to those of `size`."""
        resized = list(shape)
        if self.batch is not None:
            resized[self.batch] = size.batch_size
        if self.seq is not None:
            resized[self.seq] = size.seq_len
        return tuple(resized)

    def open(self, shape: Shape) -> tuple[int | None, ...]:
        """`shape` with None in place of the bucketed dimensions: what all buckets share."""
        return tuple(
            None if axis in (self.batch, self.seq) else size for axis, size in enumerate(shape)
        )


PASS_THROUGH = LeafAxes()


def carried_sizes(axes: Iterable[LeafAxes], sizes: Bucket) -> Shape:
    """Those of `sizes` that any of the arrays carries: the shape of a mask of all elements.

    A function of rows alone has a mask of rows: (batch, 1) beside its (batch,) would broadcast.
    """
    known = list(axes)
    carried: list[int] = []
    if any(leaf.batch is not None for leaf in known):
        carried.append(sizes.batch_size)
    if any(leaf.seq is not None for leaf in known):
        carried.append(sizes.seq_len)
    return tuple(carried)


@dataclass(frozen=True, slots=True)
class AxisPattern:
    """A parsed specification such as `"batch seq ..."`.

    Attributes:
        text: The specification as it was written.
        before: Names of the dimensions before `...`, or of all of them.
        after: Names of the dimensions behind `...`; None where there is no `...`.
    """

    text: str
    before: tuple[str, ...]
    after: tuple[str, ...] | None

    def __repr__(self) -> str:
        return repr(self.text)

    @classmethod
    def parse(cls, text: str) -> AxisPattern:
        """The pattern of `text`.

        Args:
            text: Dimensions in order, separated by spaces: `batch`, `seq`, `_` (any one
                dimension) and `...` (the rest), as in einops.

        Raises:
            ConfigError: A name that is none of these, or one of batch, seq and `...` twice.
        """
        names = tuple(text.split())
        for name in names:
            if name not in ("batch", "seq", "_", "..."):
                raise ConfigError(
                    f"axes {text!r} has the name {name!r}: "
                    "use batch, seq, _ (any one dimension) and ... (the rest)"
                )
        for name in ("batch", "seq", "..."):
            if names.count(name) > 1:
                raise ConfigError(f"axes {text!r} has {name!r} twice: an array carries it once")
        if "..." not in names:
            return cls(text, names, None)
        rest = names.index("...")
        return cls(text, names[:rest], names[rest + 1 :])

    @property
    def names(self) -> tuple[str, ...]:
        """All names but `...`."""
        return self.before + (self.after or ())

    def resolve(self, ndim: int, *, name: str) -> LeafAxes:
        """The axes of an array of `ndim` dimensions.

        Raises:
            InputShapeError: The array `name` has not as many dimensions as the pattern says.
        """
        named = len(self.names)
        if ndim != named and (self.after is None or ndim < named):
            wanted = f"{named}" if self.after is None else f"{named} or more"
            raise InputShapeError(
                f"{name} has {ndim} dimension(s), but its axes {self.text!r} name {wanted}: "
                "reshape it or correct the axes"
            )
        behind = ndim - len(self.after or ())
        position = {known: index for index, known in enumerate(self.before)}
        position |= {known: behind + index for index, known in enumerate(self.after or ())}
        return LeafAxes(position.get("batch"), position.get("seq"))


class Leaf(NamedTuple):
    """One array of a call: what errors call it, its axes and its shape."""

    name: str
    axes: LeafAxes
    shape: Shape


def sizes_of(leaves: Iterable[Leaf]) -> Bucket:
    """The (batch, seq_len) that a call has; 1 for a size that no array carries.

    Raises:
        InputShapeError: Two arrays disagree; the message names both.
    """
    batch: tuple[str, int] | None = None
    seq: tuple[str, int] | None = None
    for leaf in leaves:
        if leaf.axes.batch is not None:
            batch = _agree("batch", batch, (leaf.name, leaf.shape[leaf.axes.batch]))
        if leaf.axes.seq is not None:
            seq = _agree("seq", seq, (leaf.name, leaf.shape[leaf.axes.seq]))
    return Bucket(1 if batch is None else batch[1], 1 if seq is None else seq[1])


def _agree(axis: str, known: tuple[str, int] | None, found: tuple[str, int]) -> tuple[str, int]:
    if known is None or known[1] == found[1]:
        return found if known is None else known
    raise InputShapeError(
        f"{known[0]} has {axis}={known[1]} but {found[0]} has {axis}={found[1]}: "
        f'all arrays of one call must have the same {axis} (an output of unpad="none" has its '
        'bucket\'s: trim it, or ask for unpad="host" or "device")'
    )


def axes_by_size(shape: Shape, sizes: Bucket) -> LeafAxes:
    """The specification's rule for inputs without declared axes.

    Axis 0 is the batch where its size is `batch_size`; axis 1 is the sequence where its size is
    `seq_len`.
    """
    batch = 0 if len(shape) > 0 and shape[0] == sizes.batch_size else None
    seq = 1 if len(shape) > 1 and shape[1] == sizes.seq_len else None
    return LeafAxes(batch, seq)
