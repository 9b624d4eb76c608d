"""The embeddings server under load, against what one would take instead.

    python benchmarks/serve.py
    python benchmarks/serve.py --only ours,litserve --rounds 5 --json

Every contender is a process that serves all-MiniLM-L6-v2 on this machine, and gets the same
requests: NumPy's passages in random order, one text each, as OpenAI's embeddings in base64. First a
closed loop shows what it can do. Then requests come at random, at 60 % of that, and at a rate that
is the same for all, by default 60 % of what the slowest of those that batch can do; times are
counted from when a request was due (see http_load.py).

Peers are installed on first use, each into an environment of its own in `--envs` (1.5 GB each,
minutes). What cannot be had is left out, and it is said why. So is who gives other vectors than the
demo's encoder: the longest texts are among those compared. Servers run one at a time, round by
round, each from a fresh start; the first round is for caches alone.

"others" is the part of the machine's cores that was taken by what is none of this: figures count
where it is near 0.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from contenders import CONTENDERS, MODEL, OURS, ROOT, Cores, Server, UnavailableError, serving
from http_load import RAMP_S, Client, Load, Target, closed_loop, embedding_requests, open_loop

PART, NAIVE = 0.6, "starlette"
OFF_BY = 1e-3
"""Vectors of unit length that are further away, in one component, are another model's."""

Vectors = npt.NDArray[np.float32]
Loop = Callable[[Client, Iterator[bytes]], Awaitable[Load]]
"""What sends these requests."""


def sample(texts: Sequence[str], number: int = 32) -> list[str]:
    """Some of the texts, the longest among them."""
    drawn = np.random.default_rng(0).choice(len(texts), number - 8, replace=False)
    return [*sorted(texts, key=len)[-8:], *(texts[place] for place in drawn)]


def expected_vectors(texts: Sequence[str]) -> Vectors:
    """What the demo's encoder gives for each, by the one bucket that it needs here."""
    from cudagraph_jax import CUDAGraphConfig
    from cudagraph_jax.demo import Encoder
    from cudagraph_jax.demo.bert.tokens import MAX_TOKENS

    encoder = Encoder(CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(MAX_TOKENS,)))
    with encoder.batcher:
        return np.concatenate([encoder.embed([text]) for text in texts])


async def off_by(at: Target, texts: Sequence[str], expected: Vectors) -> float:
    """How far the server's vectors are away, in the component that is furthest.

    Raises:
        UnavailableError: They are another model's.
    """
    client, most = Client(at), 0.0
    for text, vector in zip(texts, expected, strict=True):
        document = {"model": MODEL, "input": text, "encoding_format": "base64"}
        answer = await client.ask(at.post(document))
        if answer.status != 200:
            raise UnavailableError(f"{answer.status}: {answer.body[:200]!r} for {text[:40]!r}")
        packed = json.loads(answer.body)["data"][0]["embedding"]
        got = np.frombuffer(base64.b64decode(packed), "<f4")
        if got.shape != vector.shape:
            raise UnavailableError(f"vectors of {got.shape}, expected {vector.shape}")
        most = max(most, float(np.abs(got - vector).max()))
    client.close()
    if most > OFF_BY:
        raise UnavailableError(f"its vectors are off by {most:.3f}: it computes something else")
    return most


class Run(NamedTuple):
    """One loop, and how many cores others took meanwhile."""

    load: Load
    others: float


@dataclass(slots=True)
class Figures:
    """What was measured of one server, a run for each round.

    Attributes:
        off_by: How far its vectors are away.
        closed: The closed loop.
        own: The open loop at a part of its own throughput.
        common: The open loop at the rate of all.
    """

    off_by: float
    closed: list[Run] = field(default_factory=list)
    own: list[Run] = field(default_factory=list)
    common: list[Run] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second in the closed loop, the median."""
        return median([run.load.throughput for run in self.closed])

    @property
    def p99_ms(self) -> float:
        """That of its own open loop, the median."""
        return median([run.load.percentile(99) for run in self.own])

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"off_by": self.off_by} | {
            loop: [run.load.figures() | {"others": run.others} for run in getattr(self, loop)]
            for loop in ("closed", "own", "common")
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures servers.

    Args:
        texts: What is sent.
        options: Those of the command line.
    """

    texts: Sequence[str]
    options: argparse.Namespace

    def first_round(self) -> Iterator[tuple[str, Figures | str]]:
        """Who can take part, with a closed loop; why not, of the others."""
        texts = sample(self.texts)
        expected = expected_vectors(texts)
        for name in self.options.only:
            try:
                with serving(name, self.options.envs) as server:
                    figures = Figures(asyncio.run(off_by(target(server), texts, expected)))
                    figures.closed.append(self._closed_loop(server, 0))
                yield name, figures
            except UnavailableError as error:
                yield name, str(error)

    def further_round(self, name: str, figures: Figures, number: int, common: float) -> None:
        """One more round of a server.

        Args:
            name: The server's.
            figures: Of it, which get more.
            number: Of the round: it says which texts come when.
            common: Requests a second that all get.
        """
        with serving(name, self.options.envs) as server:
            closed = self._closed_loop(server, number)
            own = self._open_loop(PART * closed.load.throughput, number)
            figures.closed.append(closed)
            figures.own.append(self._run(server, number, own))
            figures.common.append(self._run(server, number, self._open_loop(common, number)))

    def _closed_loop(self, server: Server, seed: int) -> Run:
        options = self.options
        loop = partial(closed_loop, clients=options.clients, seconds=options.seconds, ramp_s=RAMP_S)
        run = self._run(server, seed, loop)
        if not run.load.answered:
            raise UnavailableError(f"in {options.seconds:g} s it answered nothing")
        return run

    def _open_loop(self, rate: float, seed: int) -> Loop:
        return partial(open_loop, rate=rate, seconds=self.options.seconds, seed=seed)

    def _run(self, server: Server, seed: int, loop: Loop) -> Run:
        requests = embedding_requests(target(server), self.texts, model=MODEL, seed=seed)

        async def run() -> Load:
            client = Client(target(server))
            try:
                return await loop(client, requests)
            finally:
                client.close()

        cores = Cores(server.session)
        return Run(asyncio.run(run()), cores.others())


def target(server: Server) -> Target:
    """Where its embeddings are."""
    return Target("127.0.0.1", server.port, "/v1/embeddings")


LOOPS = {
    "closed": "closed loop",
    "own": "open loop, 60 % of its own",
    "common": "open loop, the same rate for all",
}
COLUMNS = (
    "  answered/s (least to most)   p50 ms  p99 ms (least to most)  others  client  late  not 200"
)


def lines(found: Mapping[str, Figures]) -> Iterator[str]:
    """A table for each loop, with the medians of the rounds; then ours over each peer."""
    for loop, title in LOOPS.items():
        yield f"{title:>33}{COLUMNS}"
        for name, figures in found.items():
            if runs := getattr(figures, loop):
                yield f"{name:>33}{row(runs)}"
    for name, figures in found.items():
        if OURS in found and name != OURS and figures.own and found[OURS].own:
            faster = found[OURS].throughput / figures.throughput
            later = found[OURS].p99_ms / figures.p99_ms
            yield f"ours over {name}: {faster:.2f} of its texts/s, {later:.2f} of its p99 at 60 %"


def row(runs: Sequence[Run]) -> str:
    """The figures of one loop of a server."""
    loads = [run.load for run in runs]
    rates = sorted(load.throughput for load in loads)
    p50, p99 = (sorted(load.percentile(percent) for load in loads) for percent in (50, 99))
    bad: Counter[str] = sum((Counter(load.statuses) for load in loads), Counter())
    del bad["200"]
    others = median([run.others for run in runs])
    cpu, late = (max(getattr(load, name) for load in loads) for name in ("client_cpu", "late_ms"))
    return (
        f"  {median(rates):10.1f} ({rates[0]:5.1f} to {rates[-1]:5.1f})  {median(p50):7.1f} "
        f"{median(p99):7.1f} ({p99[0]:6.0f} to {p99[-1]:6.0f})  "
        f"{others:6.2f}  {cpu:6.0%} {late:5.1f}  {dict(bad) or '-'}"
    )


def measure(options: argparse.Namespace, texts: Sequence[str]) -> dict[str, Figures]:
    """The figures of all that can be had; says who cannot, and why, when it turns out."""
    bench, found = Bench(texts, options), dict[str, Figures]()
    for name, figures in bench.first_round():
        if isinstance(figures, Figures):
            found[name] = figures
            print(f"{name}: ready, vectors off by {figures.off_by:.1e}", file=sys.stderr)
        else:
            print(f"{name}: left out, {figures}", file=sys.stderr)
    if not found:
        raise SystemExit("no server can be measured")
    batching = [figures for name, figures in found.items() if name != NAIVE] or found.values()
    common = options.rate or PART * min(figures.throughput for figures in batching)
    for figures in found.values():
        figures.closed.clear()
    for number in range(1, options.rounds + 1):
        for name, figures in found.items():
            try:
                bench.further_round(name, figures, number, common)
            except UnavailableError as error:
                print(f"{name}: not in round {number}, {error}", file=sys.stderr)
    return found


def names(text: str) -> list[str]:
    """Contenders by their names."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"{unknown} are not among {', '.join(CONTENDERS)}")
    return chosen


def main() -> None:
    """Prints what was measured."""
    from cudagraph_jax.demo.corpus import numpy_passages

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", type=names, default=list(CONTENDERS), metavar="NAME,NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each loop")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop")
    parser.add_argument("--rate", type=float, help="requests a second that all get")
    parser.add_argument("--envs", type=Path, default=ROOT / ".bench", help="the environments")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.envs = options.envs.resolve()
    options.envs.mkdir(parents=True, exist_ok=True)
    # So that an end by a signal ends the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = measure(options, [passage.text for passage in numpy_passages()])
    if options.json:
        print(json.dumps({name: figures.document() for name, figures in found.items()}))
    else:
        print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
