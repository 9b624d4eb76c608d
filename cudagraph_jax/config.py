"""Which sizes get a graph, what happens to the others, and within which limits."""

from __future__ import annotations

import dataclasses
import itertools
import os
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, Protocol, Self, cast, get_args

from cudagraph_jax._base.checks import (
    count,
    made_by_nearest,
    nearest,
    positive_size,
    request_size,
    require_bool,
    require_choice,
    waiting_time,
)
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.shapes.axes import Length
from cudagraph_jax.shapes.ladder import Bucket, Ladder

OnMiss = Literal["capture", "background", "eager", "error"]
OnOverflow = Literal["eager", "split", "exact", "error"]
CompareWhere = Literal["all", "mask"]

DEFAULT_CAPTURE_SIZES = Ladder.powers_of_two(256)
DEFAULT_MAX_SEQ_LEN = 8192
_TAKEN = ("batch_size", "seq_len")

_FLAGS = (
    "enabled",
    "use_memory_pool",
    "cudagraph_copy_inputs",
    "per_layer_graphs",
    "debug_mode",
)


class SupportsPlan(Protocol):
    """What `CUDAGraphConfig.from_plan` reads of a bucket plan."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """The batch ladder."""

    @property
    def seq_lens(self) -> Sequence[int]:
        """The sequence ladder."""


@made_by_nearest
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CUDAGraphConfig:
    """Which sizes are captured and what happens to the others; validated once, immutable.

    Two configurations are equal when all their fields are; they hash, pickle, and go through JSON
    and back (`to_dict`, `from_dict`). `dataclasses.replace` keeps the maxima that were derived from
    the sizes: set `max_capture_batch_size=None` beside new `capture_sizes` to derive it again.

    Args:
        enabled: False runs every call eagerly.
        capture_sizes: Batch sizes that get a graph.
        capture_seq_lens: Sequence lengths that get a graph. None: seq_len is not padded, each
            length is a bucket of its own.
        capture_axes: The sizes of further axes, by the names that `in_axes` gives them:
            `{"height": (224, 448), "width": (224, 448)}`.
        max_bucket_elements: A token budget: no bucket has sizes that multiply to more, so that 8192
            lets 16x512 and 64x128 in, not 64x512. A call whose bucket has more is outside the
            limits. None: no limit.
        max_capture_batch_size: Largest batch that gets a graph; `max(capture_sizes)` if None.
            Batches between the two become buckets of their own size.
        max_capture_seq_len: Largest sequence length that gets a graph; if None,
            `max(capture_seq_lens)`, or 8192 without those.
        on_miss: What happens inside the limits while the bucket is not captured: `"capture"`
            (block and compile), `"background"` (compile in a worker; meanwhile serve from a larger
            captured bucket, else eagerly), `"eager"`, `"error"`.
        on_overflow: What happens outside the limits: `"eager"`, `"split"` (a batch in pieces of
            the largest bucket that its other sizes allow, for functions whose rows are independent
            of each other; a row that is too large is an error), `"exact"` (compile that very
            size; an error once sealed), `"error"`.
        max_graphs: How many buckets are held; the least recently used goes first. None: no limit.
        use_memory_pool: Whether `memory_pool_size_mb` limits anything.
        memory_pool_size_mb: Budget in MiB over all that the executables keep (code, and the arrays
            that functions close over), plus the largest temporary memory among them: a run gives
            it back, so that it is no sum. The least recently used bucket goes first.
        cudagraph_copy_inputs: Copy inputs into the library's own padded buffers. False: inputs
            must already have a bucket's shape, and lie where it takes them or in NumPy, and are
            passed through untouched.
        warmup_iterations: Runs of a bucket after it is compiled, so that a GPU has recorded its
            command buffers before the first request (docs/xla.md: three).
        command_buffers: Which XLA operations may be recorded.
        per_layer_graphs: The specification's name for `command_buffers=PIECEWISE`.
        compiler_options: Further XLA options for every bucket; values are kept as text.
        debug_mode: At each capture compare with the eager function and prove that the padding does
            not leak, and at the first split that rows are independent of each other; wait for the
            device on every replay, so that times are device times.
        compare_where: What `debug_mode` and the testing kit compare: `"all"` (each element at the
            real sizes), or `"mask"` (only where the function's mask is true: see docs/testing.md).
        store: Directory of persisted executables.
        process_timeout_s: In a job of several processes, how long one waits for the others at a
            call; ten times that at a capture, which takes each its own time.

    Raises:
        ConfigError: A value that is not valid, alone or beside another one.

    Example:
        >>> CUDAGraphConfig(capture_sizes=(4, 8), capture_seq_lens=(64,)).bucket_for(5, 60)
        Bucket(batch_size=8, seq_len=64)
    """

    enabled: bool = True
    capture_sizes: Sequence[int] = DEFAULT_CAPTURE_SIZES
    capture_seq_lens: Sequence[int] | None = None
    # As with compiler_options below.
    capture_axes: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    max_bucket_elements: int | None = None
    max_capture_batch_size: int | None = None
    max_capture_seq_len: int | None = None
    on_miss: OnMiss = "capture"
    on_overflow: OnOverflow = "eager"
    max_graphs: int | None = None
    use_memory_pool: bool = True
    memory_pool_size_mb: int = 1024
    cudagraph_copy_inputs: bool = True
    warmup_iterations: int = 3
    command_buffers: CommandBufferScope = CommandBufferScope.AUTO
    per_layer_graphs: bool = False
    # Equal options are equal configurations, but a mapping has no hash of its own.
    compiler_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    debug_mode: bool = False
    compare_where: CompareWhere = "all"
    store: str | None = None
    process_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        _normalise(self)

    def __repr__(self) -> str:
        parts = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != _default(spec.name, self):
                parts.append(f"{spec.name}={shown(value)}")
        return f"CUDAGraphConfig({', '.join(parts)})"

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self).from_dict, (self.to_dict(),))

    @property
    def max_batch_size(self) -> int:
        """`max_capture_batch_size`, which is never None once validated."""
        return cast(int, self.max_capture_batch_size)

    @property
    def max_seq_len(self) -> int:
        """`max_capture_seq_len`, which is never None once validated."""
        return cast(int, self.max_capture_seq_len)

    @property
    def memory_budget_bytes(self) -> int | None:
        """The byte budget over all executables, or None without one."""
        return self.memory_pool_size_mb * 2**20 if self.use_memory_pool else None

    def xla_options(self) -> dict[str, str]:
        """The compiler options of every bucket: the scope's, overridden by `compiler_options`."""
        return dict(_xla_options(self))

    def should_use_cudagraph(self, /, batch_size: int, seq_len: int, **named: int) -> bool:
        """Whether a call of this size is inside the limits (and the config is enabled).

        Args:
            batch_size: Its rows.
            seq_len: Its sequence length.
            **named: Its sizes of `capture_axes`, those that its function carries.

        Raises:
            ConfigError: There is no axis of such a name.
            InputShapeError: A size is no integer.
        """
        return self.admits(self._sizes(batch_size, seq_len, named))

    def get_padded_batch_size(self, batch_size: int) -> int:
        """The next capture size up; `batch_size` itself above the largest."""
        return _size_up(self.capture_sizes, request_size("batch_size", batch_size))

    def get_padded_seq_len(self, seq_len: int) -> int:
        """The next captured length up; `seq_len` itself above the largest, or without lengths."""
        return _size_up(self.capture_seq_lens, request_size("seq_len", seq_len))

    def bucket_for(self, /, batch_size: int, seq_len: int, **named: int) -> Bucket:
        """The bucket that a call of this size is padded to.

        Args:
            batch_size: Its rows.
            seq_len: Its sequence length.
            **named: Its sizes of `capture_axes`, those that its function carries: the bucket has
                no others.

        Raises:
            ConfigError: There is no axis of such a name.
            InputShapeError: A size is no integer.
        """
        return self.padded(self._sizes(batch_size, seq_len, named))

    def _sizes(self, batch_size: int, seq_len: int, named: Mapping[str, int]) -> Bucket:
        for axis in named:
            if axis not in self.capture_axes:
                raise ConfigError(
                    f"{axis}={named[axis]!r}: the config has no such axis; "
                    + nearest(axis, ["batch_size", "seq_len", *self.capture_axes])
                )
        sizes = {"batch_size": batch_size, "seq_len": seq_len, **named}
        batch, seq, *others = (request_size(name, size) for name, size in sizes.items())
        return Bucket.of({"batch": batch, "seq": seq, **dict(zip(named, others, strict=True))})

    def padded(self, sizes: Bucket, carried: Collection[str] | None = None) -> Bucket:
        """The bucket that a call of these sizes is padded to.

        Args:
            sizes: The call's.
            carried: The axes that its arrays carry: sizes of others stay as they are. None: all.
        """
        each = sizes.sizes.items()
        padded = Bucket.of({axis: _size_up(self.ladder(axis), size) for axis, size in each})
        return padded if carried is None else padded.only(carried, others=sizes)

    def admits(self, sizes: Bucket, carried: Collection[str] | None = None) -> bool:
        """Whether a call is inside the limits: each of its sizes, and the elements of its bucket.

        Args:
            sizes: The call's.
            carried: The axes that its arrays carry; None: all.
        """
        return (
            self.enabled
            and all(1 <= size <= self.largest(axis) for axis, size in sizes.sizes.items())
            and self.allows(self.padded(sizes, carried))
        )

    def allows(self, bucket: Bucket) -> bool:
        """Whether a bucket has no more than `max_bucket_elements`."""
        return self.max_bucket_elements is None or bucket.elements <= self.max_bucket_elements

    def largest(self, axis: str) -> int:
        """The largest size of an axis that gets a graph."""
        if axis == "batch":
            return self.max_batch_size
        return self.max_seq_len if axis == "seq" else max(self.capture_axes[axis])

    def ladder(self, axis: str) -> Sequence[int] | None:
        """The sizes of an axis that get a graph; None where each is a bucket of its own.

        Raises:
            KeyError: There is no such axis.
        """
        if axis == "batch":
            return self.capture_sizes
        return self.capture_seq_lens if axis == "seq" else self.capture_axes[axis]

    def buckets(self, *, seq_len: int = 1) -> tuple[Bucket, ...]:
        """The grid, ascending: every capture size with every captured length, and further sizes.

        Those with more than `max_bucket_elements` are left out.

        Args:
            seq_len: The one length of the grid where `capture_seq_lens` is None.
        """
        named = {axis: min(sizes) for axis, sizes in self.capture_axes.items()}
        return self.grid(("batch", "seq", *named), Bucket.of({"seq": seq_len, **named}))

    def grid(self, axes: Collection[str], sizes: Bucket) -> tuple[Bucket, ...]:
        """The buckets, ascending, of functions that carry these axes.

        Args:
            axes: Their names.
            sizes: Those of a call, which stay as they are in all other axes.
        """
        ladders = [
            (size,) if axis not in axes else self.ladder(axis) or (size,)
            for axis, size in sizes.sizes.items()
        ]
        names = tuple(sizes.sizes)
        every = (
            Bucket.of(dict(zip(names, each, strict=True))) for each in itertools.product(*ladders)
        )
        return tuple(filter(self.allows, every))

    def along_axes(self, bucket: Bucket) -> list[Bucket]:
        """`bucket` with each size of one axis: a grid may have a million, its ladders hundreds."""
        return [
            bucket.with_sizes({axis: size})
            for axis in bucket.sizes
            for size in self.ladder(axis) or ()
        ]

    def to_dict(self) -> dict[str, object]:
        """All fields as values that JSON can hold; `from_dict` takes them back."""
        return {spec.name: plain(getattr(self, spec.name)) for spec in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, d: Mapping[str, object]) -> Self:
        """The configuration that `to_dict` wrote; missing keys have their defaults.

        Raises:
            ConfigError: A key that no field has (it names the nearest one), or an invalid value.
        """
        if not isinstance(d, Mapping):
            raise ConfigError(f"{d!r} is no mapping of configuration keys to values")
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in d:
            if key not in known:
                raise ConfigError(f"unknown configuration key {key!r}: {nearest(key, known)}")
        return cls(**d)  # type: ignore[arg-type]  # __post_init__ validates every value

    @classmethod
    def disabled(cls) -> Self:
        """A configuration under which every call runs eagerly."""
        return cls(enabled=False)

    @classmethod
    def from_plan(cls, plan: SupportsPlan, **fields: object) -> Self:
        """The configuration whose grid is the plan's ladders.

        Args:
            plan: What `plan_buckets` gave.
            **fields: Further fields, such as `on_miss="background"`.

        Raises:
            ConfigError: `plan` is no plan, or a field is unknown or not valid.
        """
        if not (hasattr(plan, "batch_sizes") and hasattr(plan, "seq_lens")):
            raise ConfigError(f"plan={plan!r:.80} is no plan: give what plan_buckets returned")
        ladders = getattr(plan, "sizes", {})
        grid = {
            "capture_sizes": plan.batch_sizes,
            "capture_seq_lens": plan.seq_lens,
            "capture_axes": {a: sizes for a, sizes in ladders.items() if a not in ("batch", "seq")},
        }
        return cls.from_dict({**grid, **fields})


def checked_config(config: CUDAGraphConfig | None) -> CUDAGraphConfig:
    """`config`, or the default one if None.

    Raises:
        ConfigError: It is something else.
    """
    if config is None:
        return CUDAGraphConfig()
    if not isinstance(config, CUDAGraphConfig):
        raise ConfigError(f"config={config!r:.80} is no CUDAGraphConfig: make one, or leave it out")
    return config


def _size_up(ladder: Sequence[int] | None, size: int) -> int:
    """The next size of a ladder up; `size` itself above the largest, or without a ladder."""
    if ladder is None:
        return size
    index = bisect_left(ladder, size)
    return ladder[index] if index < len(ladder) else size


def _normalise(config: CUDAGraphConfig) -> None:
    """Brings every field of a new `config` into its one form, or raises `ConfigError`."""
    for name in _FLAGS:
        require_bool(name, getattr(config, name))
    require_choice("on_miss", config.on_miss, get_args(OnMiss))
    require_choice("on_overflow", config.on_overflow, get_args(OnOverflow))
    require_choice("compare_where", config.compare_where, get_args(CompareWhere))
    scope = command_buffer_scope(config.command_buffers, per_layer_graphs=config.per_layer_graphs)
    limit = config.max_graphs
    normal = {
        **_grid(config),
        "max_graphs": None if limit is None else positive_size(limit, name="max_graphs"),
        "memory_pool_size_mb": positive_size(
            config.memory_pool_size_mb, name="memory_pool_size_mb"
        ),
        "warmup_iterations": count("warmup_iterations", config.warmup_iterations),
        "command_buffers": scope,
        "compiler_options": xla_options(config.compiler_options),
        "store": directory(config.store),
        "process_timeout_s": waiting_time("process_timeout_s", config.process_timeout_s),
    }
    for name, value in normal.items():
        object.__setattr__(config, name, value)


def _grid(config: CUDAGraphConfig) -> dict[str, object]:
    """The ladders and the limits."""
    batches = Ladder(config.capture_sizes, name="capture_sizes")
    lengths = config.capture_seq_lens
    if lengths is not None:
        lengths = Ladder(lengths, name="capture_seq_lens")
    axes = further_axes(config.capture_axes)
    smallest = {"batch": batches, "seq": lengths or (1,), **axes}
    return {
        "capture_sizes": batches,
        "capture_seq_lens": lengths,
        "capture_axes": axes,
        "max_bucket_elements": most_elements(
            config.max_bucket_elements, Bucket.of({axis: min(smallest[axis]) for axis in smallest})
        ),
        "max_capture_batch_size": largest_size(
            config.max_capture_batch_size,
            batches,
            default=batches.max,
            name="max_capture_batch_size",
            ladder_name="capture_sizes",
        ),
        "max_capture_seq_len": largest_size(
            config.max_capture_seq_len,
            lengths,
            default=DEFAULT_MAX_SEQ_LEN,
            name="max_capture_seq_len",
            ladder_name="capture_seq_lens",
        ),
    }


def _default(name: str, config: CUDAGraphConfig) -> object:
    """The value of a field that was left out of an otherwise equal configuration."""
    if name == "max_capture_batch_size":
        return max(config.capture_sizes)
    if name == "max_capture_seq_len":
        lengths = config.capture_seq_lens
        return DEFAULT_MAX_SEQ_LEN if lengths is None else max(lengths)
    if name == "command_buffers" and config.per_layer_graphs:
        return CommandBufferScope.PIECEWISE
    if name in ("compiler_options", "capture_axes"):
        return {}
    spec = next(spec for spec in dataclasses.fields(config) if spec.name == name)
    return spec.default


def further_axes(axes: object) -> Mapping[str, Ladder]:
    """The ladders of further axes, by name, read-only.

    Raises:
        ConfigError: It is no mapping from names to sizes, or a name is taken.
    """
    if not isinstance(axes, Mapping):
        raise ConfigError(
            f'capture_axes={axes!r:.80} is no mapping: name each axis, as {{"height": (224, 448)}}'
        )
    for name in axes:
        if name in ("batch", "seq"):
            field_name = "capture_sizes" if name == "batch" else "capture_seq_lens"
            raise ConfigError(f"capture_axes has {name!r}: give its sizes as {field_name}")
        is_name = isinstance(name, str) and Length.parse(name) == Length(name)
        if not is_name or name in _TAKEN:
            raise ConfigError(
                f"capture_axes has the name {name!r}: use a word that in_axes can hold, as height"
            )
    return MappingProxyType(
        {name: Ladder(axes[name], name=f"capture_axes[{name!r}]") for name in sorted(axes)}
    )


def most_elements(limit: object, smallest: Bucket) -> int | None:
    """How many elements a bucket may have; None: any number.

    Raises:
        ConfigError: The limit is no size, or the `smallest` bucket of all axes has more.
    """
    if limit is None:
        return None
    elements = positive_size(limit, name="max_bucket_elements")
    if smallest.elements > elements:
        raise ConfigError(
            f"max_bucket_elements={elements} leaves no bucket, as the smallest, {smallest}, has "
            f"{smallest.elements} elements: raise it, or give smaller sizes"
        )
    return elements


def largest_size(
    limit: object, ladder: Ladder | None, *, default: int, name: str, ladder_name: str
) -> int:
    """The stated maximum, or the ladder's own, or `default` without either.

    Raises:
        ConfigError: The maximum is no size, or below the largest rung.
    """
    if limit is None:
        return default if ladder is None else ladder.max
    size = positive_size(limit, name=name)
    if ladder is not None and size < ladder.max:
        raise ConfigError(
            f"{ladder_name} goes up to {ladder.max}, beyond {name}={size}: "
            "raise the maximum (None: as far as they go) or leave the larger sizes out"
        )
    return size


def command_buffer_scope(scope: object, *, per_layer_graphs: bool) -> CommandBufferScope:
    """The scope, given as such or by its value; PIECEWISE where `per_layer_graphs` says so.

    Raises:
        ConfigError: It is none, or another one than `per_layer_graphs` asks for.
    """
    if isinstance(scope, str):
        require_choice("command_buffers", scope, [known.value for known in CommandBufferScope])
        scope = CommandBufferScope(scope)
    if not isinstance(scope, CommandBufferScope):
        raise ConfigError(
            f"command_buffers={scope!r:.80} is no CommandBufferScope: use one of its members"
        )
    if not per_layer_graphs or scope is CommandBufferScope.PIECEWISE:
        return scope
    if scope is CommandBufferScope.AUTO:
        return CommandBufferScope.PIECEWISE
    raise ConfigError(
        f"per_layer_graphs=True means command_buffers=PIECEWISE, but command_buffers={scope.name}: "
        "leave one of the two out"
    )


@lru_cache(maxsize=64)
def _xla_options(config: CUDAGraphConfig) -> Mapping[str, str]:
    return {**config.command_buffers.compiler_options(), **config.compiler_options}


def xla_options(options: object) -> Mapping[str, str]:
    """The options, sorted and read-only, with their values as text.

    Raises:
        ConfigError: `options` is no mapping from text.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"compiler_options={options!r:.80} is no mapping of option names to values"
        )
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"compiler_options has the key {name!r}: option names are text")
    # 1 and "1" would give the same program two cache keys (docs/xla.md).
    return MappingProxyType({name: str(options[name]) for name in sorted(options)})


def directory(path: object) -> str | None:
    """A path as text; None stays None.

    Raises:
        ConfigError: `path` is no path.
    """
    if path is None:
        return None
    if isinstance(path, str | os.PathLike):
        named = os.fspath(path)
        if isinstance(named, str) and named and "\0" not in named:
            return named
    raise ConfigError(f"store={path!r:.80} is no path: give the directory of persisted executables")


def shown(value: object) -> str:
    """A field's value as it stands in a repr."""
    if isinstance(value, Ladder):
        return repr(tuple(value))
    if isinstance(value, CommandBufferScope):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    return repr(value)


def plain(value: object) -> object:
    """A field's value as JSON can hold it."""
    if isinstance(value, Ladder):
        return list(value)
    if isinstance(value, CommandBufferScope):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value
