"""What a bucket costs: padded elements, attention's quadratic term, measured times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Protocol, TypeAlias

import numpy as np

from cudagraph_jax.errors import ConfigError
from cudagraph_jax.planning.observed import Floats, Ints

_ROUNDING = 1e-20  # of a mean squared relative error

Cost: TypeAlias = Callable[[int, int], float]
"""What a replay of (batch, seq_len) costs, in any unit: a number of 0 or more."""


# Costs are added up for every request there was.
_TOO_MUCH = 1e100


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
                raise ConfigError(f"{field.name}={term!r} is no term: give a number of 0 or more")

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


def chosen_cost(cost: Cost | None) -> Cost:
    """What a caller gave as the cost; the elements if None.

    Raises:
        ConfigError: It cannot be called.
    """
    if cost is None:
        return ELEMENTS
    if not callable(cost):
        raise ConfigError(
            f"cost={cost!r} is no function: give one of (batch, seq_len), such as "
            "attention_cost(768), or None for the elements"
        )
    return cost


def cost_table(cost: Cost, batches: Ints, seq_lens: Ints) -> Floats:
    """The cost of each batch with each seq_len, float64 (len(batches), len(seq_lens)).

    Raises:
        ConfigError: A cost is no number of 0 or more.
    """
    if isinstance(cost, PolynomialCost):
        return cost.each(batches[:, None], seq_lens[None, :])
    pairs = product(batches.tolist(), seq_lens.tolist())
    flat = _asked(cost, pairs, len(batches) * len(seq_lens))
    return flat.reshape(len(batches), len(seq_lens))


def cost_of_each(cost: Cost, batches: Ints, seq_lens: Ints) -> Floats:
    """The cost of each (batch, seq_len) pair, float64 (N,).

    Raises:
        ConfigError: A cost is no number of 0 or more.
    """
    if isinstance(cost, PolynomialCost):
        return cost.each(batches, seq_lens)
    return _asked(cost, zip(batches.tolist(), seq_lens.tolist(), strict=True), len(batches))


def _asked(cost: Cost, pairs: Iterable[tuple[int, int]], count: int) -> Floats:
    return np.fromiter((_number(cost(*pair), pair) for pair in pairs), np.float64, count)


def _number(value: object, pair: tuple[int, int]) -> float:
    """What a cost function gave for `pair`, as a number of 0 or more."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < _TOO_MUCH:
        raise ConfigError(
            f"cost(batch={pair[0]}, seq_len={pair[1]})={value!r} is no number from 0 to 1e100: "
            "give a cost that is one for every size"
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
            raise ConfigError(f"{name}={width!r} is no width: give an integer of 1 or more")
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
            f"entries={entries!r} is no collection of captured buckets: give registry.entries()"
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
