"""What is tested: a bucketed function whose every call is captured and padded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from cudagraph_jax.config import CompareWhere, CUDAGraphConfig
from cudagraph_jax.dispatch.bucket_jit import bucket_jit
from cudagraph_jax.dispatch.function import BucketedFunction
from cudagraph_jax.dispatch.manager import CUDAGraphManager
from cudagraph_jax.errors import ConfigError
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import masks_of
from cudagraph_jax.program.call import Call
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.program.outputs import OutputLeaf
from cudagraph_jax.program.padded import flatten_arguments, is_padded
from cudagraph_jax.shapes.padding import Array, Index
from cudagraph_jax.shapes.pytrees import PyTree, leaf_names
from cudagraph_jax.testing.examples import Example
from cudagraph_jax.testing.inputs import inputs as drawn_inputs
from cudagraph_jax.testing.inputs import small_grid

LONGEST = 16
"""Where lengths are not padded each is a bucket, so none above this one is drawn."""


class Answers(NamedTuple):
    """One call, answered by a bucket and by the plain function.

    Attributes:
        call: The call.
        entry: The bucket that served it.
        found: Its outputs, at the real sizes, those that can be compared.
        expected: The plain function's.
    """

    call: Call
    entry: CUDAGraphEntry
    found: list[Array]
    expected: list[Array]


class Subject:
    """A function under test.

    Args:
        fn: A plain function, or a `BucketedFunction`.
        in_axes: As for `bucket_jit`; None where `fn` is bucketed.
        config: The grid; that of `fn`, or a small one, if None.
        compare_where: Where outputs are compared; as the configuration says if None.
        kwargs: Keyword arguments of each call.
        options: Further options of `bucket_jit`.

    Raises:
        ConfigError: `fn` is bucketed and so is told again how, or is not and is not told.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        in_axes: PyTree,
        config: CUDAGraphConfig | None,
        compare_where: CompareWhere | None,
        kwargs: Mapping[str, PyTree],
        options: Mapping[str, Any],
    ) -> None:
        config = _config_of(fn, in_axes) if config is None else config
        self.config = _for_tests(
            config, config.compare_where if compare_where is None else compare_where
        )
        manager = CUDAGraphManager(self.config)
        if isinstance(fn, BucketedFunction):
            if in_axes is not None or options:
                given = ", ".join(["in_axes"] * (in_axes is not None) + sorted(options))
                raise ConfigError(f"{fn!r} is bucketed already: leave out {given}")
            self.bucketed: BucketedFunction[..., Any] = fn.with_manager(manager)
        elif in_axes is None:
            raise ConfigError('in_axes is missing: name the axes, such as in_axes=("batch seq",)')
        else:
            self.bucketed = bucket_jit(fn, in_axes=in_axes, manager=manager, **options)
        self.kwargs = dict(kwargs)
        self._has_mask = False

    def examples(
        self,
        example: tuple[PyTree, ...] | None,
        dtypes: PyTree,
        values: PyTree,
        *,
        inputs: SearchStrategy[tuple[PyTree, ...]] | None,
    ) -> SearchStrategy[Example]:
        """Positional arguments: `inputs`, else what `inputs()` makes of the rest for the grid."""
        config = self.config
        if inputs is None:
            inputs = drawn_inputs(
                self._in_axes if example is None else self.bucketed.in_axes,
                pad_side=self.bucketed.pad_side,
                example=example,
                dtypes=dtypes,
                values=values,
                config=config,
                max_seq_len=LONGEST if config.capture_seq_lens is None else None,
            )
        elif (example, dtypes, values) != (None, None, None):
            raise ConfigError("inputs= says what is drawn: leave out example, dtypes and values")
        return _shown(self, inputs)

    @property
    def _in_axes(self) -> PyTree:
        """Those of the function, where one string stands for all arguments one for each.

        These are the positional ones that a call needs, and that are neither masks nor given.
        """
        in_axes, function = self.bucketed.in_axes, self.bucketed
        if not isinstance(in_axes, str):
            return in_axes
        others = {mask.name for mask in function.target.masks} | function.binder.static_argnames
        needed = [
            each
            for each in inspect.signature(function).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
            and each.default is each.empty
            and each.name not in others.union(self.kwargs)
        ]
        return (in_axes,) * max(1, len(needed))

    def shown(self, args: tuple[PyTree, ...]) -> Example:
        """The arguments, of which the bucketed ones are shown."""
        call = self.described(args)
        names = leaf_names(call.declared.argument_names, call.args)
        shown = {
            name: leaf
            for name, leaf, axes in zip(names, call.leaves, call.axes, strict=False)
            if not axes.passes_through
        }
        return Example(args, shown)

    def described(self, args: tuple[PyTree, ...]) -> Call:
        """A call with these arguments."""
        return self.bucketed.describe(*args, **self.kwargs)

    def captured(self, call: Call) -> CUDAGraphEntry:
        """The bucket of a call, captured if it was not.

        Raises:
            CaptureError: It cannot be.
        """
        dispatcher = self.bucketed.manager.dispatcher
        bucket = dispatcher.bucket_for(call)
        program = dispatcher.capturer.program_of(call)
        # Also of outputs that nobody trims, which serving does not look for: they are compared.
        program.outputs(bucket, others=dispatcher.config.along_axes(bucket))
        masks = masks_of(program, call)
        self._has_mask |= bool(call.target.masks) or (masks is not None and masks.any_real)
        return dispatcher.capturer.capture(call, bucket, program=program).value

    def refuse_no_mask(self) -> None:
        """Raises where outputs were to be compared by a mask, and no call had one.

        Raises:
            ConfigError: So that nothing is proved.
        """
        if self.config.compare_where == "mask" and not self._has_mask:
            raise ConfigError(
                'compare_where="mask", but the function takes no mask: name mask_argname, give it '
                "bools (or 0 and 1) of the axes of a call, or leave compare_where out"
            )

    def answers(self, args: tuple[PyTree, ...]) -> Answers:
        """Both answers to a call with these arguments.

        Raises:
            CaptureError: Its bucket cannot be captured.
            AssertionError: The two are different pytrees.
        """
        call = self.described(args)
        entry = self.captured(call)
        expected = _plain(call, call.args, call.kwargs)
        before = entry.replay_count
        if call.target.donate_argnums:
            args = jax.tree.map(_copied, args)
        found = self.bucketed(*args, **self.kwargs)
        if entry.replay_count == before:
            raise AssertionError(f"it was not served by a bucket: {self.bucketed.explain(*args)}")
        outputs, have = flatten_arguments(found)
        want: object = jax.tree.structure(expected)
        if have != want:
            raise AssertionError(f"a bucket gives {have}, but the plain function {want}")
        real = entry.program.real_outputs(entry.outputs, call.sizes)
        arrays = [
            _real(output, leaf, index)
            for output, leaf, index in zip(outputs, entry.outputs.leaves, real.indices, strict=True)
        ]
        return Answers(call, entry, _comparable(entry, arrays), _comparable(entry, expected))


def _plain(call: Call, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]) -> PyTree:
    """The plain function's outputs, as JAX arrays."""
    return run_eagerly(
        replace(call, args=args, kwargs=dict(kwargs)), target=replace(call.target, unpad="none")
    )


def _comparable(entry: CUDAGraphEntry, outputs: PyTree) -> list[Array]:
    leaves = entry.outputs.leaves
    pairs = zip(jax.tree.leaves(outputs), leaves, strict=True)
    return [np.asarray(output) for output, leaf in pairs if leaf.comparable]


@st.composite
def _shown(
    draw: st.DrawFn, /, subject: Subject, inputs: SearchStrategy[tuple[PyTree, ...]]
) -> Example:
    # Hypothesis shows what a composite strategy gives as it shows itself.
    return subject.shown(draw(inputs))


def _copied(leaf: PyTree) -> PyTree:
    """A leaf that may be used up: the same parameters are given to each call."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return np.array(leaf) if isinstance(leaf, jax.Array) and not is_key else leaf


def _real(output: PyTree, leaf: OutputLeaf, index: Index) -> PyTree:
    """An output without its padding, which it has where it was handed out so."""
    if is_padded(output):
        return np.asarray(output)
    if leaf.unpad != "none" or not leaf.comparable:
        return output
    return np.asarray(output)[index]


def _config_of(fn: Callable[..., Any], in_axes: PyTree) -> CUDAGraphConfig:
    return fn.manager.config if isinstance(fn, BucketedFunction) else small_grid(in_axes)


def _for_tests(config: CUDAGraphConfig, compare_where: CompareWhere) -> CUDAGraphConfig:
    """The same grid, with policies under which nothing is served but by its own bucket."""
    return replace(
        config,
        enabled=True,
        on_miss="capture",
        on_overflow="error",
        max_graphs=None,
        use_memory_pool=False,
        cudagraph_copy_inputs=True,
        warmup_iterations=0,
        debug_mode=False,
        compare_where=compare_where,
        store=None,
    )
