"""Single fields of a configuration: brought into their one form, and shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from cudagraph_jax._base.checks import positive_size, require_choice
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.modes import CommandBufferScope
from cudagraph_jax.shapes.ladder import Ladder


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
            "raise the maximum or leave the larger sizes out"
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
        raise ConfigError(f"command_buffers={scope!r} is no CommandBufferScope: use one of its")
    if not per_layer_graphs or scope is CommandBufferScope.PIECEWISE:
        return scope
    if scope is CommandBufferScope.AUTO:
        return CommandBufferScope.PIECEWISE
    raise ConfigError(
        f"per_layer_graphs=True means command_buffers=PIECEWISE, but command_buffers={scope.name}: "
        "leave one of the two out"
    )


def xla_options(options: object) -> Mapping[str, str]:
    """The options, sorted and read-only, with their values as text.

    Raises:
        ConfigError: `options` is no mapping from text.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"compiler_options={options!r} is no mapping of option names to values")
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"compiler_options has the key {name!r}: option names are text")
    # 1 and "1" would give the same program two cache keys (FACTS.md).
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
    raise ConfigError(f"store={path!r} is no path: give the directory of persisted executables")


def shown(value: object) -> str:
    """A field's value as it stands in a repr."""
    if isinstance(value, Ladder):
        return repr(tuple(value))
    if isinstance(value, CommandBufferScope):
        return str(value)
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def plain(value: object) -> object:
    """A field's value as JSON can hold it."""
    if isinstance(value, Ladder):
        return list(value)
    if isinstance(value, CommandBufferScope):
        return value.value
    return dict(value) if isinstance(value, Mapping) else value
