"""What a profile shows of replays: command buffers executed, updated, recorded; what moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cudagraph_jax._base.html import escaped, html_table
from cudagraph_jax._base.text import one_line, text_table
from cudagraph_jax.modes import GraphState
from cudagraph_jax.report.words import exact, things
from cudagraph_jax.shapes.ladder import Bucket

KEEP_COMMAND_BUFFERS = "xla_enable_command_buffers_during_profiling"
"""The compiler option without which XLA runs no command buffers while it is profiled."""

_HEADER = ("bucket", "function", "replays", "executed", "updated", "recorded", "shown")
_MOVED_HEADER = ("bucket", "function", "argument", "moved")


@dataclass(frozen=True, slots=True)
class ArgumentMoves:
    """Where an argument's array lay, from one replay to the next.

    Attributes:
        argument: Its name, with the path inside a pytree, such as `cache['k'][0]`.
        moves: How often it lay elsewhere than in the replay before; None where that is not known:
            it came from the host, and was copied to the device each time, or it is sharded.
    """

    argument: str
    moves: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketReplays:
    """What a profile shows of one captured bucket.

    Attributes:
        name: The function's name.
        bucket: The bucket.
        graph_id: The number of its entry.
        replays: How often it was replayed.
        executed: Command buffers executed; one program may have several.
        updated: Command buffers updated, as when the address of an argument changed.
        recorded: Command buffers recorded, which is work of the first runs.
        arguments: Where its arguments lay.
    """

    name: str
    bucket: Bucket
    graph_id: int
    replays: int
    executed: int
    updated: int
    recorded: int
    arguments: tuple[ArgumentMoves, ...]

    @property
    def is_replaying(self) -> bool:
        """Whether there were as many command buffers as replays, and none recorded or updated."""
        return self.executed >= max(1, self.replays) and self.updated == self.recorded == 0

    @property
    def shown(self) -> str:
        """What that comes to, in words."""
        if self.is_replaying:
            return GraphState.REPLAYING.value
        if not self.executed:
            return "no command buffer ran"
        if self.updated:
            return "updated in traffic"
        return "recorded in traffic" if self.recorded else "not in each replay"

    def to_dict(self) -> dict[str, Any]:
        """The same as values that JSON can hold."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        moved = [asdict(argument) for argument in self.arguments]
        bucket = {"bucket": list(self.bucket[:2]), "axes": self.bucket.named}
        return {**values, **bucket, "arguments": moved}

    @property
    def moved(self) -> Sequence[ArgumentMoves]:
        """The arguments that did not lie still, or that nobody can tell of."""
        return [argument for argument in self.arguments if argument.moves != 0]


@dataclass(frozen=True, slots=True)
class ReplayProfile:
    """What a profile shows of the replays of one manager.

    Attributes:
        platform: The backend.
        buckets: The buckets that were replayed, the most replayed first.
        unattributed: Command buffers executed, updated or recorded outside of any replay that is
            known, as those of other programs.
    """

    platform: str
    buckets: tuple[BucketReplays, ...]
    unattributed: int = 0

    def __repr__(self) -> str:
        replaying = sum(bucket.is_replaying for bucket in self.buckets)
        return one_line(
            f"ReplayProfile({things(len(self.buckets), 'bucket')} on {self.platform}, "
            f"{replaying} replaying)"
        )

    def __str__(self) -> str:
        parts = [text_table(_HEADER, self._rows())] if self.buckets else []
        parts += self._notes()
        if moved := self._moved():
            parts.append(text_table(_MOVED_HEADER, moved))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        html = html_table(f"Replays on {self.platform}", _HEADER, self._rows())
        html += "".join(f"<p>{escaped(note)}</p>" for note in self._notes())
        moved = self._moved()
        return html + html_table("Arguments that moved", _MOVED_HEADER, moved) if moved else html

    def to_dict(self) -> dict[str, Any]:
        """The same as values that JSON can hold."""
        return {
            "platform": self.platform,
            "unattributed": self.unattributed,
            "buckets": [{**bucket.to_dict(), "shown": bucket.shown} for bucket in self.buckets],
        }

    def _rows(self) -> Sequence[tuple[str, ...]]:
        return [
            (
                str(bucket.bucket),
                bucket.name,
                exact(bucket.replays),
                exact(bucket.executed),
                exact(bucket.updated),
                exact(bucket.recorded),
                bucket.shown,
            )
            for bucket in self.buckets
        ]

    def _moved(self) -> Sequence[tuple[str, ...]]:
        return [
            (str(bucket.bucket), bucket.name, argument.argument, _moves(argument, bucket.replays))
            for bucket in self.buckets
            for argument in bucket.moved
        ]

    def _notes(self) -> Sequence[str]:
        notes = []
        if not self.buckets:
            notes.append("Nothing was replayed meanwhile.")
        elif self.platform == "cpu":
            notes.append("XLA has no command buffers on cpu: a replay calls the executable.")
        elif not any(bucket.executed for bucket in self.buckets):
            notes.append(
                "No command buffer ran: XLA recorded none (see `cudagraph-jax inspect`), or was "
                "not told to keep them while profiled: capture with compiler_options="
                f"{{{KEEP_COMMAND_BUFFERS!r}: 'True'}}."
            )
        if self.unattributed:
            notes.append(
                f"{things(self.unattributed, 'event')} of command buffers belong to no replay that "
                "is known."
            )
        return notes


def _moves(argument: ArgumentMoves, replays: int) -> str:
    if argument.moves is None:
        return "not known: it comes from the host, or is sharded"
    return f"{exact(argument.moves)} of {exact(max(0, replays - 1))} times"
