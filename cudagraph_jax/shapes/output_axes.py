"""Which output dimensions follow which size of a call, found without compiling."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain, combinations, count, islice, pairwise, product
from typing import NamedTuple

from cudagraph_jax.errors import CUDAGraphError, InputShapeError
from cudagraph_jax.shapes.axes import LeafAxes, Length, Shape
from cudagraph_jax.shapes.ladder import Bucket


class OutputShape(NamedTuple):
    """One output of an abstract evaluation: what errors call it, its shape, and its dtype."""

    name: str
    shape: Shape
    dtype: Hashable = None


class OutputsAtSize(NamedTuple):
    """The outputs of a function at one size.

    Attributes:
        outputs: Each array.
        structure: The pytree that holds them, with what is static in it.
    """

    outputs: Sequence[OutputShape]
    structure: Hashable = None


Evaluate = Callable[[Bucket], OutputsAtSize]
"""Abstract evaluation of a function at one size, such as by `jax.eval_shape`."""


class OutputAxes(NamedTuple):
    """The axes of one output, or why it cannot be trimmed.

    Attributes:
        name: What errors call the output.
        axes: Where it carries the sizes themselves; meaningless where `problem` is not None.
        problem: What is wrong with a dimension that follows the sizes.
        follows: Further dimensions that follow one size, half of it or one more, say: how long they
            are the function itself has to say.
    """

    name: str
    axes: LeafAxes
    problem: str | None = None
    follows: tuple[tuple[int, str], ...] = ()

    def check(self) -> None:
        """Raises where the axes could not be found.

        Raises:
            InputShapeError: They could not.
        """
        if self.problem is not None:
            raise InputShapeError(self.problem)


class FoundAxes(NamedTuple):
    """The axes of all outputs of a function.

    Attributes:
        outputs: Those of each.
        structure_follows: Whether what is static in their pytree follows the sizes.
        is_tried: Whether they were seen at another size, with axes of different lengths.
        may_spread: Whether the function may spread a single element over something longer.
    """

    outputs: tuple[OutputAxes, ...]
    structure_follows: bool = False
    is_tried: bool = True
    may_spread: bool = False


class Probes(NamedTuple):
    """How a function is evaluated at further sizes.

    Attributes:
        evaluate: Gives the outputs for a size; may raise for sizes it cannot take.
        base: A size that the function takes; an error here is the caller's.
        grid: Of each axis that the inputs carry, other sizes of the grid, for functions that take
            few.
    """

    evaluate: Evaluate
    base: Bucket
    grid: Mapping[str, Sequence[int]]

    def first(self, sizes: Iterable[Bucket]) -> Sample | None:
        """The first of `sizes` that the function takes."""
        for size in sizes:
            try:
                return Sample(self.evaluate(size), size)
            except CUDAGraphError:
                continue
        return None

    def first_of(self, axis: str, sizes: Sequence[int]) -> Sample | None:
        """The same of sizes that differ from the base in one alone."""
        return self.first(self.base.with_sizes({axis: size}) for size in sizes)

    def refusal(self, axis: str) -> str:
        """What the function says to a larger size of one axis, in brackets; empty if nothing."""
        size = self.base.with_sizes({axis: max(self.grid[axis])})
        try:
            self.evaluate(size)
        except CUDAGraphError as error:
            return f" ({error}, at {size.described})"
        return ""


class Sample(NamedTuple):
    """What a function gives at one size."""

    found: OutputsAtSize
    size: Bucket

    def __str__(self) -> str:
        return str(tuple(self.size.sizes.values()))

    def names(self) -> list[str]:
        """The names of the outputs."""
        return [out.name for out in self.found.outputs]


_SMALLEST = (1, 2, 3)
# No powers of two, and the first no multiple of anything: what is rounded up or down to such equals
# a size of the grid, and not these. Others are for functions that take even sizes alone, multiples
# of 16, images of a least size; the last for those that take next to no sizes. Each goes on in its
# step, so that all axes differ.
_UNEVEN = ((3, 5), (6, 10), (12, 20), (48, 80), (96, 160), (2, 3), (4, 5))


def infer_output_axes(probes: Probes) -> FoundAxes:
    """The axes of every output, from evaluations at other sizes: two, or a few more.

    A dimension that changes with one size alone, and equals it, is that size. One that follows it
    in another way (seq - 1, seq // 2) is known by that; one that follows several (batch * seq), or
    grows faster than a size, gets a `problem`: its first elements are not the real ones.
    """
    here = Sample(probes.evaluate(probes.base), probes.base)
    samples = _few(probes, here) if len(probes.grid) > 1 else []
    return _from_few([here, *samples]) or _size_by_size(probes, here, samples)


def check_declared_axes(probes: Probes, declared: Sequence[OutputAxes]) -> FoundAxes:
    """The axes that were declared, after one further evaluation; as they are where that fails.

    An axis that does not follow its size gets a `problem`, and so does an output of another dtype.
    What was not named, and follows a size all the same, is found.
    """
    here = Sample(probes.evaluate(probes.base), probes.base)
    other = probes.first(_other_sizes(probes))
    if other is None or here.names() != other.names():
        return FoundAxes(tuple(declared), is_tried=False, may_spread=True)
    checked = [
        _checked(axes, here, other, index) if axes.problem is None else axes
        for index, axes in enumerate(declared)
    ]
    moves = [
        _moves(axes, here.found.outputs[index].shape, other.found.outputs[index].shape)
        for index, axes in enumerate(checked)
    ]
    follows = here.found.structure != other.found.structure
    if any(moves):
        found = _size_by_size(probes, here, [other])
        follows = found.structure_follows
        checked = [
            _with_followers(axes, own, dimensions)
            for axes, own, dimensions in zip(checked, found.outputs, moves, strict=True)
        ]
    # A function that takes two axes of one length alone is asked at the sizes of each call; so is
    # one that was tried at a size of 1, which most operations spread over any other.
    different = {other.size.size(axis) for axis in probes.grid} - {1}
    is_tried = len(different) == len(probes.grid)
    return FoundAxes(tuple(checked), follows, is_tried, _may_spread(probes, [other]))


def _may_spread(probes: Probes, samples: Sequence[Sample]) -> bool:
    """Whether a size of 1 may be spread over a constant, or over another axis.

    Not so over a constant where a size was another one, but 1; nor over an axis where one of both
    was longer and now the other is, or one moved alone: no sum, multiple or part of it does that.
    """
    base, sizes = probes.base, [sample.size for sample in samples]

    def moves(axis: str, size: Bucket) -> bool:
        return 1 != size.size(axis) != base.size(axis)

    def are_free(one: str, two: str, size: Bucket) -> bool:
        (first, second), (third, fourth) = ((at.size(one), at.size(two)) for at in (base, size))
        is_turned = (first > second, first < second) != (third > fourth, third < fourth)
        is_alone = (first == third) != (second == fourth)
        return 1 not in (third, fourth) and third != fourth and (is_turned or is_alone)

    return not (
        all(any(moves(axis, size) for size in sizes) for axis in probes.grid)
        and all(any(are_free(*two, size) for size in sizes) for two in combinations(probes.grid, 2))
    )


def refuse_steps(probes: Probes, found: FoundAxes, left: Collection[str]) -> FoundAxes:
    """`found`, with a `problem` for each output of strides or windows over an axis padded in front.

    Their steps start at the first of the padding, and so elsewhere in a row than without it, unless
    that is padded by a whole number of them. What grows by a whole number for each element of the
    axis, or not at all, ends where the row does.

    Args:
        probes: How to evaluate.
        found: The axes of the outputs.
        left: The axes whose padding stands on the left.
    """
    outputs = [
        axes if axes.problem else axes._replace(problem=_in_steps(probes, index, axes, left))
        for index, axes in enumerate(found.outputs)
    ]
    return found._replace(outputs=tuple(outputs))


def _in_steps(probes: Probes, index: int, axes: OutputAxes, left: Collection[str]) -> str | None:
    """What is wrong with an output that has a dimension in steps; None where it has none."""
    steps = [
        (place, length.axis)
        for place, length in axes.axes.dims
        if length.axis in left and length.times % length.over
    ]
    steps += [
        (place, axis)
        for place, axis in axes.follows
        if axis in left and _has_steps(probes, index, place, axis)
    ]
    if not steps:
        return None
    place, axis = steps[0]
    return (
        f"dimension {place} of {axes.name} follows {axis} in steps, as a stride or a window does, "
        f"and {axis} is padded on the left, so that they start elsewhere in a padded row: give "
        f'pad_side="right", name the input by its steps (in_axes="2*{axis}" for steps of two), or '
        'ask for unpad="none"'
    )


def _has_steps(probes: Probes, index: int, place: int, axis: str) -> bool:
    """Whether a dimension is not of a whole number of elements for each one of its axis."""
    base = probes.base.size(axis)
    # Of two neighbours one is no whole number of steps. Last the grid, if it takes few sizes.
    tried = (3 * base + 1, 3 * base + 2, 8 * base + 1, *probes.grid[axis])
    samples = filter(None, (probes.first_of(axis, [size]) for size in tried))
    points = [
        (_own(sample.size, axis), _extent(sample, index, place)) for sample in islice(samples, 3)
    ]
    slopes = {
        (later - earlier) / (size - other)
        for (other, earlier), (size, later) in pairwise(sorted({*points}))
    }
    return len(slopes) > 1 or any(slope % 1 for slope in slopes)


def _other_sizes(probes: Probes) -> Iterable[Bucket]:
    """Sizes that differ from the base in all sizes that the inputs carry."""
    base = probes.base
    orders = _orders(probes)
    uneven = (_in_order(base, order, row) for order in orders for row in _UNEVEN)
    # One element is spread over many by most operations, so that it comes last.
    ladders = (sorted(sizes, key=(1).__eq__) for sizes in probes.grid.values())
    grid = (dict(zip(probes.grid, sizes, strict=True)) for sizes in product(*ladders))
    for size in chain(uneven, map(base.with_sizes, grid)):
        if all(size.size(axis) != base.size(axis) for axis in probes.grid):
            yield size


def _orders(probes: Probes) -> list[list[str]]:
    """The axes, the longest of the base first; where two are as long, also the other way round."""
    sizes = {axis: probes.base.size(axis) for axis in probes.grid}
    order = sorted(sizes, key=lambda axis: -sizes[axis])
    return [order] if len(set(sizes.values())) == len(sizes) else [order, order[::-1]]


def _in_order(base: Bucket, order: Sequence[str], row: tuple[int, int]) -> Bucket:
    """Sizes that rise in this order: those of `row`, and on in its step."""
    first, second = row
    sizes = count(first, second - first)
    return base.with_sizes(dict(zip(order, sizes, strict=False)))


def _checked(axes: OutputAxes, here: Sample, other: Sample, index: int) -> OutputAxes:
    shape, moved = (sample.found.outputs[index].shape for sample in (here, other))
    if (problem := _another_kind(axes.name, here, other, index)) is not None:
        return axes._replace(problem=problem)
    expected = axes.axes.resize(moved, other.size)
    for axis, (has, needs) in enumerate(zip(moved, expected, strict=True)):
        if has != max(0, needs):  # a short row under a long kernel leaves nothing
            length = dict(axes.axes.dims)[axis]
            return axes._replace(
                problem=f"out_axes calls dimension {axis} of {axes.name} {str(length)!r}, which "
                f"has the shape {shape} at {here.size.described}, but {moved} at {other}: correct "
                "out_axes, or leave it out to have the axes found"
            )
    return axes


def _moves(axes: OutputAxes, shape: Shape, moved: Shape) -> list[int]:
    """The dimensions that follow the sizes, and are not named."""
    if axes.problem is not None:
        return []
    return [
        axis
        for axis, (before, after) in enumerate(zip(shape, moved, strict=True))
        if before != after and axis not in dict(axes.axes.dims)
    ]


def _with_followers(axes: OutputAxes, found: OutputAxes, dimensions: Sequence[int]) -> OutputAxes:
    """`axes` with those dimensions that were found to follow a size."""
    if not dimensions:
        return axes
    if found.problem is not None:
        return axes._replace(problem=found.problem)
    names = {axis: length.axis for axis, length in found.axes.dims} | dict(found.follows)
    follows = tuple((axis, names[axis]) for axis in dimensions if axis in names)
    return axes._replace(follows=follows)


def _few(probes: Probes, here: Sample) -> list[Sample]:
    """Evaluations that change all sizes; none where the function takes too few.

    At 1 by 1 nothing that follows a size passes for a constant. The others have the sizes in
    another order than the base, so that the least and the greatest of them are none of them.
    """
    base = probes.base
    small = (base.with_sizes({a: 1 if a == "batch" else n for a in probes.grid}) for n in _SMALLEST)
    smallest = probes.first(size for size in small if size != base)
    if smallest is None:
        return []
    seen, samples = smallest.size.sizes, [smallest]
    for order in _orders(probes):
        uneven = (_in_order(base, order, row) for row in _UNEVEN)
        sample = probes.first(
            size
            for size in uneven
            if all(size.size(axis) != seen[axis] for axis in order if axis != "batch")
        )
        if sample is None:
            return []
        samples.append(sample)
    return samples if all(sample.names() == here.names() for sample in samples) else []


def _from_few(samples: Sequence[Sample]) -> FoundAxes | None:
    """The axes where `_few` is enough: every dimension is a constant, or a size itself."""
    if len(samples) < 3:
        return None
    found = []
    for index, out in enumerate(samples[0].found.outputs):
        axes = _common_axes(samples, index)
        if axes is None:
            return None
        found.append(OutputAxes(out.name, axes))
    return FoundAxes(tuple(found), _structures_differ(samples))


def _structures_differ(samples: Sequence[Sample]) -> bool:
    return any(sample.found.structure != samples[0].found.structure for sample in samples)


def _common_axes(samples: Sequence[Sample], index: int) -> LeafAxes | None:
    """The axes that one output has in all samples; None where a dimension is something else."""
    outputs = [sample.found.outputs[index] for sample in samples]
    if len({(len(out.shape), out.dtype) for out in outputs}) > 1:
        return None
    axes = {
        tuple(sample.size.size(axis) for sample in samples): axis for axis in samples[0].size.sizes
    }
    dims: list[tuple[int, Length]] = []
    for place, extents in enumerate(zip(*(out.shape for out in outputs), strict=True)):
        if len(set(extents)) == 1:
            continue
        if extents not in axes:
            return None
        dims.append((place, Length(axes[extents])))
    return LeafAxes(tuple(dims))


def _size_by_size(probes: Probes, here: Sample, further: Sequence[Sample]) -> FoundAxes:
    """The axes by evaluations that differ in one size at a time, which say what is wrong.

    Args:
        probes: How to evaluate.
        here: The outputs at the base.
        further: Those at sizes that differ in all axes, which must agree with what is found.
    """
    others: dict[str, list[Sample]] = {axis: [] for axis in probes.grid}
    uneven = [first for first, _ in _UNEVEN]
    for name, sizes in probes.grid.items():
        # What is cut to a fixed length looks constant in the grid, and is not below it. One element
        # is spread over many by most operations, so that alone it proves nothing.
        for some in (uneven, _SMALLEST, sizes):
            seen = [_own(sample.size, name) for sample in (here, *others[name])]
            if len(seen) < 3:
                sample = probes.first_of(name, [size for size in some if size not in seen])
                others[name] += [] if sample is None else [sample]
        if not any(_own(sample.size, name) > 1 for sample in others[name]):
            problem = (
                "its axes cannot be found, because the function takes no second "
                f"{name} size{probes.refusal(name)}: declare out_axes"
            )
            return FoundAxes(
                tuple(
                    OutputAxes(out.name, LeafAxes(), f"{out.name}: {problem}")
                    for out in here.found.outputs
                )
            )
    samples = [here, *chain.from_iterable(others.values())]
    for other in samples:
        if other.names() != here.names():
            text = _other_tree(here, other)
            return FoundAxes(
                tuple(OutputAxes(out.name, LeafAxes(), text) for out in here.found.outputs)
            )
    samples += further
    found = [_classify(here, others, index) for index in range(len(here.found.outputs))]
    agreed = [_agreed(axes, samples, index, probes) for index, axes in enumerate(found)]
    may_spread = _may_spread(probes, samples)
    return FoundAxes(tuple(agreed), _structures_differ(samples), may_spread=may_spread)


def _agreed(axes: OutputAxes, samples: Sequence[Sample], index: int, probes: Probes) -> OutputAxes:
    """`axes`, as all samples have it: they may show what those of one size at a time did not.

    A dimension that follows one size, or none, has a problem where it differs though that one does
    not: so does the lesser of 2 and the product of both, which is 2 wherever one alone is small.
    """
    if axes.problem is not None:
        return axes
    follows = dict(axes.follows)
    sizes = {place: length.axis for place, length in axes.axes.dims} | follows
    for place in range(len(samples[0].found.outputs[index].shape)):
        seen: dict[int, Sample] = {}  # the sample where one size first was as it is
        for sample in samples:
            first = seen.setdefault(_own(sample.size, sizes.get(place)), sample)
            if _extent(sample, index, place) != _extent(first, index, place):
                text = _unclear(axes.name, first, sample, index, f"dimension {place}")
                return axes._replace(problem=text)
        points = sorted((own, _extent(sample, index, place)) for own, sample in seen.items())
        others = [n for n, extent in points if n != extent]
        if place in sizes and place not in follows and others:
            follows[place] = sizes[place]
            # Where other sizes differed, too, it may be these that it follows.
            alone = probes.first_of(sizes[place], others[:1])
            last = seen[others[0]]
            is_own = alone is None or _extent(alone, index, place) == _extent(last, index, place)
            if not (is_own and _starts_alike(points)):
                text = _unclear(axes.name, samples[0], last, index, f"dimension {place}")
                return axes._replace(problem=text)
    dims = tuple((place, length) for place, length in axes.axes.dims if place not in follows)
    return axes._replace(axes=LeafAxes(dims), follows=tuple(sorted(follows.items())))


def _extent(sample: Sample, index: int, place: int) -> int:
    """How long a dimension is; -1 where an output of that sample has none."""
    shape = sample.found.outputs[index].shape
    return shape[place] if place < len(shape) else -1


def _own(size: Bucket, axis: str | None) -> int:
    """The size that a dimension follows; 0 where it follows none."""
    return 0 if axis is None else size.size(axis)


def _classify(here: Sample, others: Mapping[str, Sequence[Sample]], index: int) -> OutputAxes:
    """The axes of one output."""
    name, shape, _ = here.found.outputs[index]
    dims: list[tuple[int, Length]] = []
    follows: list[tuple[int, str]] = []
    for other in chain.from_iterable(others.values()):
        if (problem := _another_kind(name, here, other, index)) is not None:
            return OutputAxes(name, LeafAxes(), problem)
    for axis, extent in enumerate(shape):
        moving = {
            size: [one for one in samples if one.found.outputs[index].shape[axis] != extent]
            for size, samples in others.items()
        }
        sizes = [size for size in others if moving[size]]
        if not sizes:
            continue
        size = sizes[0]
        points = _points((here, *others[size]), index, axis, size)
        if len(sizes) > 1 or not _starts_alike(points):
            text = _unclear(name, here, moving[size][0], index, f"dimension {axis}")
            if len(sizes) == 1 and len(points) > 2 and _starts_alike(points[1:]):
                (short, before), (longer, after) = points[:2]
                text += (
                    f"; it is {before} where {size} is {short}, and {after} where that is "
                    f'{longer}: if longer ones follow a rule, say it in out_axes, as "{size}-1"'
                )
            return OutputAxes(name, LeafAxes(), text)
        if all(n == extent for n, extent in points):
            dims.append((axis, Length(size)))
        else:
            follows.append((axis, size))
    return OutputAxes(name, LeafAxes(tuple(dims)), follows=tuple(follows))


def _points(samples: Sequence[Sample], index: int, axis: int, size: str) -> list[tuple[int, int]]:
    """One size of each sample, and how long the dimension is there; by size."""
    return sorted(
        {(_own(sample.size, size), sample.found.outputs[index].shape[axis]) for sample in samples}
    )


def _starts_alike(points: Sequence[tuple[int, int]]) -> bool:
    """Whether the first elements of a longer one may be those of a shorter one.

    So where the length never falls, and grows no faster than the size: the pairs of all positions,
    in one dimension, begin with those of the first position, padding included. Where nothing is
    left, as of a short row under a long kernel, it says nothing of that.
    """
    if any(later < earlier for (_, earlier), (_, later) in pairwise(points)):
        return False
    some = [point for point in points if point[1]] or points
    (first, low), (last, high) = some[0], some[-1]
    return all(
        (extent - low + 1) * (last - first) >= (high - low) * (size - first)
        for size, extent in some
    )


def _another_kind(name: str, here: Sample, other: Sample, index: int) -> str | None:
    """What is wrong where an output has another rank or dtype at another size."""
    first, second = (sample.found.outputs[index] for sample in (here, other))
    if len(first.shape) != len(second.shape):
        return _unclear(name, here, other, index, "its rank")
    if first.dtype != second.dtype:
        return (
            f"{name} is {first.dtype} at {here.size.described} and {second.dtype} at {other}: a "
            "bucket has one dtype for all the sizes that are padded to it; "
            "return the same for every size"
        )
    return None


def _unclear(name: str, here: Sample, moved: Sample, index: int, what: str) -> str:
    shape, other = (sample.found.outputs[index].shape for sample in (here, moved))
    return (
        f"{name} has the shape {shape} at {here.size.described} and {other} at {moved}: {what} "
        "follows the sizes, but is no length that follows one of them, so it cannot be trimmed; "
        'return each size as a dimension of its own, or ask for unpad="none"'
    )


def _other_tree(here: Sample, other: Sample) -> str:
    counts = (
        f"{len(here.found.outputs)} at {here.size.described} and {len(other.found.outputs)} at "
        f"{other}"
    )
    return (
        f"the outputs are other ones for other sizes ({counts}): return the "
        "same pytree for every size, with batch and seq as dimensions of its arrays"
    )
