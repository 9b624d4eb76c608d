"""What XLA records of a bucket into command buffers, and what it leaves outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cudagraph_jax._base.html import html_table
from cudagraph_jax._base.text import one_line, text_table
from cudagraph_jax.report.thunks import ThunkSequence, reason
from cudagraph_jax.report.words import exact, listed, part
from cudagraph_jax.shapes.ladder import Bucket

_SLICE = "kDynamicSlice"

_HEADER = ("scope", "command buffers", "recorded", "outside", "coverage", "left outside")
_REASONS_HEADER = ("scope", "thunk", "number", "why it is outside")


@dataclass(frozen=True, slots=True)
class Outside:
    """Thunks of one kind that no command buffer records.

    Attributes:
        kind: As XLA calls it, such as `"kWhile"`.
        number: How many there are.
        reason: Why, as far as XLA's source tells.
    """

    kind: str
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScopeInspection:
    """One bucket, compiled with one set of options.

    Attributes:
        scope: The name of the `CommandBufferScope`, or `"own options"`.
        options: The compiler options.
        command_buffers: How many command buffers XLA made.
        recorded: How many thunks are in them.
        outside: The thunks that are not, by kind.
    """

    scope: str
    options: Mapping[str, str]
    command_buffers: int
    recorded: int
    outside: tuple[Outside, ...]

    @classmethod
    def of(
        cls,
        scope: str,
        options: Mapping[str, str],
        found: ThunkSequence,
        *,
        effective: Mapping[str, str] | None = None,
    ) -> ScopeInspection:
        """What `found` shows.

        Args:
            scope: What the options are called.
            options: The compiler options.
            found: The steps.
            effective: The options with what XLA_FLAGS adds; None: there is nothing.
        """
        left = [thunk for thunk in found.thunks if not thunk.is_recorded]
        known = options if effective is None else effective
        # A dump does not say which slices follow a loop's counter: any inside of one may.
        slices = any(_SLICE in thunk.kind and "kWhile" in thunk.inside for thunk in found.thunks)
        counts = Counter((thunk.kind, reason(thunk, known, slices=slices)) for thunk in left)
        return cls(
            scope,
            MappingProxyType(dict(options)),
            found.command_buffers,
            len(found.thunks) - len(left),
            tuple(Outside(kind, number, why) for (kind, why), number in counts.most_common()),
        )

    @property
    def left(self) -> int:
        """How many thunks are outside."""
        return sum(kind.number for kind in self.outside)

    @property
    def coverage(self) -> float | None:
        """The part of the thunks that is recorded; None where there are none."""
        total = self.recorded + self.left
        return self.recorded / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The same as values that JSON can hold."""
        return {
            "scope": self.scope,
            "options": dict(self.options),
            "command_buffers": self.command_buffers,
            "recorded": self.recorded,
            "coverage": self.coverage,
            "outside": [
                {"kind": kind.kind, "number": kind.number, "reason": kind.reason}
                for kind in self.outside
            ],
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """What XLA records of one bucket.

    Attributes:
        name: The function's name.
        bucket: The bucket.
        platform: The backend that it was compiled for, or the GPU that was asked for.
        scopes: What was found with each set of options; empty where there are no command buffers.
    """

    name: str
    bucket: Bucket
    platform: str
    scopes: tuple[ScopeInspection, ...]

    def __repr__(self) -> str:
        found = (
            ", ".join(f"{scope.scope} {_coverage(scope)}" for scope in self.scopes)
            or "no command buffers"
        )
        return one_line(f"Inspection({self.name} {self.bucket} on {self.platform}: {found})")

    def __str__(self) -> str:
        if not self.scopes:
            return one_line(self._none())
        title = one_line(f"{self.name} {self.bucket} on {self.platform}")
        parts = [title, text_table(_HEADER, self._rows())]
        reasons = self._reasons()
        return "\n\n".join([*parts, text_table(_REASONS_HEADER, reasons)] if reasons else parts)

    def _repr_html_(self) -> str:
        if not self.scopes:
            return html_table(self._none(), _HEADER, [])
        title = f"{self.name} {self.bucket} on {self.platform}"
        html = html_table(title, _HEADER, self._rows())
        reasons = self._reasons()
        return html + html_table("Left outside", _REASONS_HEADER, reasons) if reasons else html

    def to_dict(self) -> dict[str, Any]:
        """The same as values that JSON can hold."""
        return {
            "name": self.name,
            "bucket": list(self.bucket[:2]),
            "axes": self.bucket.named,
            "platform": self.platform,
            "scopes": [scope.to_dict() for scope in self.scopes],
        }

    def _none(self) -> str:
        return (
            f"{self.name} {self.bucket}: XLA has no command buffers on {self.platform}: a replay "
            'is a call of the compiled executable. Inspect it on a GPU, or for one: gpu="h100" in '
            "Python, --gpu h100 on the command line."
        )

    def _rows(self) -> Sequence[tuple[str, ...]]:
        return [
            (
                scope.scope,
                exact(scope.command_buffers),
                exact(scope.recorded),
                exact(scope.left),
                _coverage(scope),
                listed((kind.kind, kind.number) for kind in scope.outside),
            )
            for scope in self.scopes
        ]

    def _reasons(self) -> Sequence[tuple[str, ...]]:
        return [
            (scope.scope, kind.kind, exact(kind.number), kind.reason)
            for scope in self.scopes
            for kind in scope.outside
        ]


def _coverage(scope: ScopeInspection) -> str:
    return "–" if scope.coverage is None else part(scope.coverage)
