"""What a bucket costs: padded elements, attention's quadratic term, measured times."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Protocol, TypeAlias, TypeGuard

import numpy as np

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.observed import BATCH_SEQ, Floats, Ints, argument_names

_ROUNDING = 1e-20  # of a mean squared relative error

Cost: TypeAlias = Callable[..., float]
"""What a replay of a bucket costs, in any unit: a function of its size on each axis, (batch,
seq_len) unless others were named, that gives a number of 0 or more."""


# Costs are added up for every request there was.
_TOO_MUCH = 1e100

# More than all requests together waste, and little enough that their sum is still exact.
DEAR = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialCost:
    """`constant + rows·batch + elements·batch·seq + pairs·batch·seq²`; a `Cost`.

    Attributes:
        constant: For each replay, whatever its size.
        rows: For each row.
        elements: For each element: what dense layers cost.
        pairs: For each pair of positions in a row: what attention costs.

    Raises:
        ConfigError: A term is no number of 0 or more.
    """

    constant: float = 0.0
    rows: float = 0.0
    elements: float = 0.0
    pairs: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            term = getattr(self, field.name)
            is_number = isinstance(term, int | float | np.number) and not isinstance(term, bool)
            if not is_number or not 0 <= term < math.inf:
                raise ConfigError(
                    f"{field.name}={term!r:.80} is no term: give a number of 0 or more"
                )

    def __call__(self, batch: int, seq_len: int) -> float:
        """The cost of a replay of (batch, seq_len)."""
        return float(self.each(np.array([batch]), np.array([seq_len]))[0])

    def each(self, batches: Ints, seq_lens: Ints) -> Floats:
        """The cost of each batch with its seq_len, float64, by NumPy's rules of broadcasting."""
        lengths = seq_lens.astype(np.float64)
        rows: Floats = self.rows + lengths * (self.elements + lengths * self.pairs)
        return self.constant + batches * rows


ELEMENTS = PolynomialCost(elements=1.0)
"""The default: a bucket costs its `batch * seq_len` elements."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A cost that NumPy computes for many buckets at a time, and that no larger one has less of.

    Attributes:
        each: The costs of sizes on each axis, float64, by NumPy's rules of broadcasting.
    """

    each: Callable[..., Floats]

    def __call__(self, *sizes: int) -> float:
        """The cost of a replay of one bucket."""
        return float(self.each(*[np.array([size]) for size in sizes])[0])


def elements_of(*sizes: Ints) -> Floats:
    """The product of sizes on each axis, float64, by NumPy's rules of broadcasting."""
    total: Floats = sizes[0].astype(np.float64)
    for size in sizes[1:]:
        total = total * size
    return total


def chosen_cost(cost: Cost | None, axes: Sequence[str] = BATCH_SEQ) -> Cost:
    """What a caller gave as the cost, for buckets of some axes; the elements if None.

    Raises:
        ConfigError: It cannot be called with so many sizes, or is a polynomial of batch and seq_len
            for other axes.
    """
    if cost is None:
        return Formula(elements_of)
    names = ", ".join(argument_names(axes))
    if isinstance(cost, PolynomialCost) and tuple(axes) != BATCH_SEQ:
        raise ConfigError(
            f"cost={cost!r} is one of (batch, seq_len), but the axes are {', '.join(axes)}: give a "
            f"function of ({names}), or None for the elements"
        )
    if not callable(cost):
        such_as = "such as attention_cost(768), " if tuple(axes) == BATCH_SEQ else ""
        raise ConfigError(
            f"cost={cost!r:.80} is no function: give one of ({names}), {such_as}or None for the "
            "elements"
        )
    _check_arguments(cost, axes, names)
    return cost


def _check_arguments(cost: Callable[..., object], axes: Sequence[str], names: str) -> None:
    """Raises unless `cost` takes a size on each axis, as far as Python can see."""
    if isinstance(cost, np.ufunc) and cost.nin != len(axes):  # it has no signature
        raise ConfigError(
            f"cost={cost!r} takes {cost.nin} numbers, not a size on each of the axes "
            f"{', '.join(axes)}: give a function of ({names})"
        )
    try:
        signature = inspect.signature(cost)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*axes)
    except TypeError as error:
        raise ConfigError(
            f"cost={cost!r:.60} takes {signature}, not a size on each of the axes "
            f"{', '.join(axes)} ({error}): give a function of ({names})"
        ) from None


def avoiding(cost: Cost, *, more_elements_than: float) -> Cost:
    """`cost`, by which buckets of more elements are so dear that a plan has none for a request."""

    def factor(*sizes: Ints) -> Floats:
        return np.where(elements_of(*sizes) > more_elements_than, DEAR, 1.0)

    if is_formula(cost):
        return Formula(lambda *sizes: cost.each(*sizes) * factor(*sizes))
    return lambda *sizes: float(cost(*sizes) * factor(*map(np.array, sizes)))


def is_formula(cost: Cost) -> TypeGuard[PolynomialCost | Formula]:
    """Whether `cost` never falls, and is fast for many buckets at a time."""
    return isinstance(cost, PolynomialCost | Formula)


def cost_table(cost: Cost, *ladders: Ints, axes: Sequence[str] = BATCH_SEQ) -> Floats:
    """The cost of every bucket of a grid, float64 (sizes of the first axis, of the second …).

    Raises:
        ConfigError: A cost is no number of 0 or more.
    """
    if is_formula(cost):
        return cost.each(*np.ix_(*ladders))
    shape = [len(ladder) for ladder in ladders]
    buckets = product(*[ladder.tolist() for ladder in ladders])
    return _asked(cost, buckets, math.prod(shape), axes).reshape(shape)


def cost_of_each(cost: Cost, *columns: Ints, axes: Sequence[str] = BATCH_SEQ) -> Floats:
    """The cost of each bucket, given its size on each axis (N,): float64 (N,).

    Raises:
        ConfigError: A cost is no number of 0 or more.
    """
    if is_formula(cost):
        return cost.each(*columns)
    buckets = zip(*[column.tolist() for column in columns], strict=True)
    return _asked(cost, buckets, len(columns[0]), axes)


def _asked(
    cost: Cost, buckets: Iterable[tuple[int, ...]], count: int, axes: Sequence[str]
) -> Floats:
    return np.fromiter((_number(cost(*sizes), sizes, axes) for sizes in buckets), np.float64, count)


def _number(value: object, sizes: tuple[int, ...], axes: Sequence[str]) -> float:
    """What a cost function gave for a bucket, as a number of 0 or more."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < _TOO_MUCH:
        pairs = zip(argument_names(axes), sizes, strict=True)
        raise ConfigError(
            f"cost({', '.join(f'{name}={size}' for name, size in pairs)})={value!r:.60} is no "
            "number from 0 to 1e100: give a cost that is one for every size"
        )
    return number


def attention_cost(hidden_size: int, *, mlp_size: int | None = None) -> PolynomialCost:
    """Multiply-adds of one transformer layer: what its matrices and its attention cost.

    Per token 4·h² for the attention's projections and 2·h·m for the feed-forward block; per pair
    of positions 2·h for the scores and the weighted sum. Source: Kaplan et al., "Scaling Laws for
    Neural Language Models" (arXiv:2001.08361), table 1.

    Args:
        hidden_size: h, the width of the model.
        mlp_size: m, the width of the feed-forward block; 4·h if None.

    Raises:
        ConfigError: A width is no positive integer.
    """
    for name, width in (("hidden_size", hidden_size), ("mlp_size", mlp_size)):
        if width is None and name == "mlp_size":
            continue
        if not isinstance(width, int | np.integer) or isinstance(width, bool) or width < 1:
            raise ConfigError(f"{name}={width!r:.80} is no width: give an integer of 1 or more")
    hidden_size = int(hidden_size)
    mlp_size = 4 * hidden_size if mlp_size is None else int(mlp_size)
    per_element = 4 * hidden_size**2 + 2 * hidden_size * mlp_size
    return PolynomialCost(elements=float(per_element), pairs=2.0 * hidden_size)


class Timed(Protocol):
    """What `measured_cost` reads of a captured bucket; `CUDAGraphEntry` has it.

    What has no `cost_ms`, such as figures of an older version that were read from a file, may have
    `replay_count` and `avg_replay_time_ms` in its place.
    """

    @property
    def batch_size(self) -> int:
        """Rows of the bucket."""

    @property
    def seq_len(self) -> int:
        """Sequence length of the bucket."""

    @property
    def cost_ms(self) -> float | None:
        """Milliseconds of a run until its outputs are there; None where nobody waited for one."""


def measured_cost(entries: Iterable[Timed]) -> PolynomialCost:
    """Milliseconds of a run of any size, fitted to what runs of the captured buckets cost.

    The fit minimises the relative error and has no negative term, so that a larger bucket never
    costs less. Times are those until the outputs are there (`CUDAGraphEntry.cost_ms`), from the
    warm-up and from calls that wait for their outputs.

    Where the buckets do not tell two terms apart, as in a single row, it is the elements that cost.

    Args:
        entries: `registry.entries()`, say. Those that nobody waited for are left out.

    Raises:
        ConfigError: Fewer than two different buckets have a cost.
    """
    if not isinstance(entries, Iterable):
        raise ConfigError(
            f"entries={entries!r:.80} is no collection of captured buckets: give registry.entries()"
        )
    times_ms = [(entry, _time_ms(entry)) for entry in entries]
    timed = [(entry, time_ms) for entry, time_ms in times_ms if time_ms > 0]
    buckets = len({(entry.batch_size, entry.seq_len) for entry, _ in timed})
    if buckets < 2:
        raise ConfigError(
            f"entries hold times of {buckets} different buckets, too few to fit a cost to: warm "
            "up, or serve requests in two or more whose outputs go to the host"
        )
    times = np.array([time_ms for _, time_ms in timed], np.float64)
    batch = np.array([entry.batch_size for entry, _ in timed], np.float64)
    seq = np.array([entry.seq_len for entry, _ in timed], np.float64)
    # In the order in which terms are preferred that explain the times equally well.
    terms = np.stack([batch * seq, np.ones_like(batch), batch, batch * seq**2], axis=1)
    elements, constant, rows, pairs = _nonnegative_fit(terms / times[:, None])
    return PolynomialCost(constant=constant, rows=rows, elements=elements, pairs=pairs)


def fitted_cost(times_ms: Mapping[tuple[int, ...], float]) -> Formula:
    """Milliseconds of a run of any size, fitted to what some took: for each run, row and element.

    As `measured_cost`, over any axes of which the first is the batch.

    Raises:
        ConfigError: There are fewer than two.
    """
    if len(times_ms) < 2:
        raise ConfigError(
            f"cost has times of {len(times_ms)} different buckets, too few to fit a cost to: give "
            "two or more"
        )
    columns = np.array(list(times_ms), np.int64).T
    times = np.array(list(times_ms.values()), np.float64)
    terms = np.stack([elements_of(*columns), np.ones_like(times), columns[0]], axis=1)
    each, constant, rows = _nonnegative_fit(terms / times[:, None])
    return Formula(lambda *sizes: constant + rows * sizes[0] + each * elements_of(*sizes))


def _time_ms(entry: Timed) -> float:
    """What a run costs; 0 where nobody knows."""
    if hasattr(entry, "cost_ms"):
        return entry.cost_ms or 0.0
    return float(
        getattr(entry, "avg_replay_time_ms", 0.0) if getattr(entry, "replay_count", 0) else 0.0
    )


def _nonnegative_fit(terms: Floats) -> list[float]:
    """Least squares of 1 without negative weights: the best of all subsets of the few terms."""
    target = np.ones(len(terms))
    scale = terms.max(axis=0)
    best, best_error = np.zeros(terms.shape[1]), math.inf
    for size in range(1, terms.shape[1] + 1):
        for chosen in combinations(range(terms.shape[1]), size):
            columns = list(chosen)
            part = terms[:, columns] / scale[columns]
            weights = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(((part @ weights - target) ** 2).mean())
            # More terms have to be worth it, beyond rounding.
            if (weights >= 0).all() and error < best_error * (1 - 1e-9) - _ROUNDING:
                best, best_error = np.zeros(terms.shape[1]), error
                best[columns] = weights / scale[columns]
    return [float(weight) for weight in best]
