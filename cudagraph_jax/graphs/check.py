"""`debug_mode`: a new bucket must give the eager answer, whatever its padding holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cudagraph_jax._base.text import said_by
from cudagraph_jax.errors import CaptureError, CUDAGraphError, PaddingLeakError
from cudagraph_jax.graphs.compare import EXACT, USUAL, worst_difference
from cudagraph_jax.graphs.entry import CUDAGraphEntry
from cudagraph_jax.graphs.trial import Poison, Poisonable, example_call, poison, poisonable
from cudagraph_jax.program.call import Call, copied_key, is_key
from cudagraph_jax.program.eager import run_eagerly
from cudagraph_jax.shapes.ladder import Bucket
from cudagraph_jax.shapes.padding import Array, PadValue, real_index
from cudagraph_jax.shapes.pytrees import leaf_names

_ORDINARY = 2.0
_HUGE = 1e4


def check_entry(entry: CUDAGraphEntry, call: Call, *, pads_seq: bool) -> None:
    """Raises unless `entry` gives the eager answer for real rows, whatever the padding holds.

    The padding is filled with NaN and with ordinary values, or for integers with valid ones, and
    the real rows must not move. Where they do, finite values decide: a weight of exactly zero stops
    those, and never NaN. A mask keeps its padding: bools, numbers that look like one, and what
    proves to be one, because padding of other arrays matters where its own says that it is real.

    Args:
        entry: A new entry.
        call: A call of its variant, of any sizes; abstract arrays get values.
        pads_seq: Whether sequences are padded.

    Raises:
        PaddingLeakError: The real rows depend on the padding.
        CaptureError: They differ from the eager answer where there is no padding, or a run failed.
    """
    sizes = _sizes(entry, call, pads_seq=pads_seq)
    try:
        _check_example(entry, example_call(entry.program, call, sizes))
    except PaddingLeakError:
        # In a sequence of one, an integer of 1 is a length but no position, and 0 a position but no
        # length.
        if sizes.seq_len > 1 or not (pads_seq and entry.program.carries_seq):
            raise
        _check_example(entry, example_call(entry.program, call, sizes, zeros_of_rows=True))


def _check_example(entry: CUDAGraphEntry, example: Call) -> None:
    trial = Trial(entry, example)
    trial.refuse_difference(trial.usual, trial.run_eagerly(), "its usual padding")
    if example.sizes == entry.bucket:
        return
    arrays = poisonable(entry.program, example)
    _check_data(trial, arrays)
    _check_doubtful(trial, arrays)


def _sizes(entry: CUDAGraphEntry, call: Call, *, pads_seq: bool) -> Bucket:
    """The sizes of the example: one less than the bucket's at least, on axes that are padded."""
    batch, seq = entry.bucket
    if entry.copies_inputs and entry.program.carries_batch:
        batch = min(call.sizes.batch_size, max(1, batch - 1))
    if entry.copies_inputs and entry.program.carries_seq and pads_seq:
        seq = min(call.sizes.seq_len, max(1, seq - 1))
    return Bucket(batch, seq)


class Trial:
    """Runs of a new entry on one example, with any padding."""

    def __init__(self, entry: CUDAGraphEntry, example: Call) -> None:
        self.entry = entry
        self.example = example
        self.usual = self.run({})

    def run(self, padding: Poison) -> list[Array]:
        """The trimmed outputs; `padding` is the pad value of leaves not padded as usual."""
        program = self.entry.program
        values = [padding.get(index, usual) for index, usual in enumerate(program.pad_values)]
        filled = dataclasses.replace(self.entry, program=program.padded_with(values))
        with self._failing("was compiled, but does not run"):
            outputs = filled.padded_outputs(self._to_use_up())
            return [
                np.asarray(output)[real_index(leaf.axes, leaf.ndim, self.example.sizes)]
                for output, leaf in zip(outputs, self.entry.outputs.leaves, strict=True)
                if leaf.comparable
            ]

    def run_eagerly(self) -> list[Array]:
        """The plain function's outputs."""
        example, outputs = self.example, self.entry.outputs
        target = dataclasses.replace(self.entry.program.target, unpad="none")
        with self._failing("was compiled, but the plain function does not run"):
            result = run_eagerly(target, example.args, example.kwargs, example.sizes)
            jax.block_until_ready(result)
        leaves, structure = jax.tree.flatten(result)
        if structure != outputs.structure:
            raise CaptureError(
                f"{self._where} gives {outputs.structure}, but the plain function {structure}: "
                "return the same pytree for every size, traced or not",
                stage="check",
            )
        pairs = zip(leaves, outputs.leaves, strict=True)
        return [np.asarray(value) for value, leaf in pairs if leaf.comparable]

    def first_move(self, paddings: Sequence[Poison]) -> Poison | None:
        """The first of `paddings` to move the real rows further than rounding does.

        None where not one does, or the first one, ordinary values, moves nothing at all: then huge
        ones, which may overflow or outweigh a mask of -10,000, say nothing.
        """
        found = self.run(paddings[0])
        if not self.differ(found, self.usual, exactly=True):
            return None
        moves = (padding for padding in paddings if self.differ(self.run(padding), self.usual))
        return next(moves, None)

    def differ(self, some: list[Array], others: list[Array], *, exactly: bool = False) -> bool:
        """Whether any output differs, by more than rounding unless `exactly`."""
        return any(
            worst_difference(one, other, tolerance=EXACT if exactly else USUAL) is not None
            for one, other in zip(some, others, strict=True)
        )

    def refuse_difference(self, found: list[Array], expected: list[Array], how: str) -> None:
        """Raises where an output differs by more than rounding."""
        names = [leaf.name for leaf in self.entry.outputs.leaves if leaf.comparable]
        for name, have, want in zip(names, found, expected, strict=True):
            worst = worst_difference(have, want)
            if worst is None:
                continue
            message = (
                f"{self._where}: {name}{list(worst.at)} is {worst.found} with {how}, "
                f"but should be {worst.expected}"
            )
            if self.example.sizes == self.entry.bucket:
                raise CaptureError(
                    f"{message}: the compiled function differs from the eager one; is it pure?",
                    stage="check",
                )
            raise PaddingLeakError(
                f"{message}: the padding changes the real rows; let the function take a mask "
                "(mask_argname, or bools) and use it, or choose pad_values that it ignores; 0 "
                "counts as chosen where it is written"
            )

    def refuse_padding(self, padding: Poison) -> None:
        """Raises where `padding` moves the real rows further than rounding does."""
        shown = " and ".join(dict.fromkeys(f"{value:g}" for value in padding.values()))
        how = f"{shown} in the padding"
        if len(padding) == 1:
            arguments = (*self.example.args, *self.example.kwargs.values())
            argument_names = (*self.entry.program.argument_names, *self.example.kwargs)
            how += f" of {leaf_names(argument_names, arguments)[next(iter(padding))]}"
        self.refuse_difference(self.run(padding), self.usual, how)

    def _to_use_up(self) -> Call:
        """The example, with copies of what is donated; a run uses up what is on the device."""
        leaves, structure = jax.tree.flatten((self.example.args, self.example.kwargs))
        for index in self.entry.program.donated_leaves:
            leaf = leaves[index]
            leaves[index] = copied_key(leaf) if is_key(leaf) else np.array(leaf)
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return dataclasses.replace(self.example, args=args, kwargs=kwargs, leaves=tuple(leaves))

    @property
    def _where(self) -> str:
        name, sizes = self.entry.program.target.name, tuple(self.example.sizes)
        return f"{name} at {sizes} in the bucket {self.entry.bucket}"

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except CUDAGraphError:
            raise
        except Exception as error:
            # The device may have memory again later; what Python raises, it raises every time.
            is_device = isinstance(error, jax.errors.JaxRuntimeError)
            raise CaptureError(
                f"{self._where} {what}: {said_by(error)}", stage="warm-up" if is_device else "check"
            ) from error


def _check_data(trial: Trial, arrays: Poisonable) -> None:
    """Refuses a leak of arrays that are surely no masks."""
    data = arrays.data
    # What ignores NaN may not ignore numbers.
    looks = (poison(data, np.nan, largest=False), poison(data, _ORDINARY, largest=True))
    if not data or not any(
        trial.differ(trial.run(look), trial.usual, exactly=True) for look in looks
    ):
        return
    for sign, largest in ((1, True), (-1, False)):
        moving = trial.first_move(
            [poison(data, sign * size, largest=largest) for size in (_ORDINARY, _HUGE)]
        )
        if moving is not None:
            trial.refuse_padding(moving)


def _check_doubtful(trial: Trial, arrays: Poisonable) -> None:
    """Refuses a leak of an array that may be a mask, unless it proves to be one."""
    rests = [
        poison(arrays.data, _ORDINARY, largest=True),
        poison(arrays.data, -_ORDINARY, largest=False),
    ]
    moving: dict[int, PadValue] = {}
    for index, array in arrays.doubtful.items():
        is_float = jnp.issubdtype(array.dtype, np.inexact)
        values: Sequence[PadValue] = (_ORDINARY, _HUGE) if is_float else (1,)
        moved = trial.first_move([{**rests[0], index: value} for value in values])
        if moved is not None:
            moving[index] = moved[index]
            continue
        for rest in rests:
            rest[index] = values[0]
    for index, value in moving.items():
        alone = trial.run({index: value})
        is_mask = any(trial.differ(trial.run({**rest, index: value}), alone) for rest in rests)
        if not is_mask:
            trial.refuse_padding({index: value})
