"""Single texts through a batcher, against other ways to form batches and other engines.

NumPy's passages in random order, each contender in turn, chunk by chunk, in one process:

    python benchmarks/ragged.py
    python benchmarks/ragged.py --texts 3000 --json

sentence-transformers and ONNX Runtime take part where they are installed:

    pip install torch==2.13.0+cpu sentence-transformers onnx onnxscript onnxruntime

Every contender tokenizes. Ratios are what to look at: a machine that is slower for a while is
slower for all. `--tiny` instead measures what the batcher itself costs: an item of a function that
computes next to nothing, and the decision which rows share a call. `--requests` instead measures
what a server of the default grids would gain by packing the texts of each request into rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import cudagraph_jax as cg
from cudagraph_jax.batching.composition import Priced, Prices, compose
from cudagraph_jax.demo import Encoder
from cudagraph_jax.demo.bert.model import MAX_SEGMENTS, MINILM
from cudagraph_jax.demo.bert.model_folder import find_model
from cudagraph_jax.demo.bert.tokens import Row, stack
from cudagraph_jax.demo.corpus import numpy_passages
from cudagraph_jax.demo.encoder import PACKED_ROW_LEN
from cudagraph_jax.xla.compiles import CompileCounter

ROWS = (1, 4, 8, 16)
# Two runs: the first one of a bucket loads code, and would be taken for its cost.
RUNS = 2
PACKED = cg.CUDAGraphConfig(
    capture_sizes=(1, 2, 4, 8), capture_seq_lens=(32, 64, 96, 128, 192, 256), warmup_iterations=RUNS
)
WAITING = 64
WINDOW = 128
FIFO, BATCHER = "FIFO of 16", "batcher, 64 waiting"

Vectors = npt.NDArray[np.float32]


class Answers(NamedTuple):
    """The vectors of some texts, and how many elements were computed for them."""

    vectors: Vectors
    computed: float


Serve = Callable[[Sequence[str]], Answers]


def planned(lengths: int) -> cg.CUDAGraphConfig:
    """The grid with so many lengths, the best for the passages."""
    rows = Encoder().tokenize([passage.text for passage in numpy_passages()])
    plan = cg.plan_buckets([len(row) for row in rows], max_graphs=lengths)
    return cg.CUDAGraphConfig(
        capture_sizes=ROWS, capture_seq_lens=tuple(plan.seq_lens), warmup_iterations=RUNS
    )


class Policies:
    """Ways to form batches of the demo's encoder.

    Args:
        lengths: How many lengths its grid has.
    """

    def __init__(self, lengths: int) -> None:
        self._encoder = Encoder(planned(lengths))
        self._packer = Encoder(PACKED, packing=True)
        for encoder in (self._encoder, self._packer):
            encoder.warmup(progress=False, workers=2)
        self._batchers = {
            waiting: cg.Batcher(self._encoder.function, self._encoder.params, max_waiting=waiting)
            for waiting in (WAITING, WINDOW)
        }
        # Each of these rows holds two to three texts.
        self._rows = cg.Batcher(
            self._packer.function, self._packer.params, max_waiting=WAITING // 2
        )
        self.tokenize = self._encoder.tokenize

    def _in_groups(self, rows: Sequence[Row], order: Sequence[int], size: int) -> Answers:
        vectors, computed = np.zeros((len(rows), MINILM.embedding_size), np.float32), 0
        for start in range(0, len(order), size):
            chosen = list(order[start : start + size])
            ids, mask = stack([rows[place] for place in chosen])
            vectors[chosen] = self._encoder.serve(ids, mask)
            computed += self._encoder.config.bucket_for(*ids.shape).elements
        return Answers(vectors, computed)

    def fifo(self, texts: Sequence[str]) -> Answers:
        """Batches of 16 in the order in which texts come, padded to the longest."""
        rows = self.tokenize(texts)
        return self._in_groups(rows, range(len(rows)), 16)

    def sorted_windows(self, texts: Sequence[str]) -> Answers:
        """Eight batches are sorted by length, then cut."""
        rows = self.tokenize(texts)
        order: list[int] = []
        for start in range(0, len(rows), WINDOW):
            order += sorted(
                range(start, min(start + WINDOW, len(rows))), key=lambda place: len(rows[place])
            )
        return self._in_groups(rows, order, 16)

    def one_by_one(self, texts: Sequence[str]) -> Answers:
        """Each text is a call."""
        rows = self.tokenize(texts)
        return self._in_groups(rows, range(len(rows)), 1)

    def least_cost(self, texts: Sequence[str], waiting: int = WAITING) -> Answers:
        """The batcher, with so many texts waiting."""
        batcher = self._batchers[waiting]
        before = batcher.stats()["computed_elements"]
        vectors = batcher.map(map(self._encoder.item, self.tokenize(texts)))
        return Answers(np.stack(vectors), batcher.stats()["computed_elements"] - before)

    def packed(self, texts: Sequence[str]) -> Answers:
        """Of 64 texts at a time several stand in a row; those rows go through a batcher."""
        before = self._rows.stats()["computed_elements"]
        rows = [np.array(row, np.int32) for row in self.tokenize(texts)]
        packs = [
            cg.pack(
                rows[start : start + WAITING],
                config=PACKED,
                max_segments=MAX_SEGMENTS,
                row_len=PACKED_ROW_LEN,
            )
            for start in range(0, len(rows), WAITING)
        ]
        answers = iter(self._rows.map(item for packed in packs for item in packed.items()))
        vectors: list[Vectors] = []
        for packed in packs:
            vectors += packed.unpack([next(answers) for _ in packed.ids])
        return Answers(np.stack(vectors), self._rows.stats()["computed_elements"] - before)

    def close(self) -> None:
        """Ends the batchers' threads."""
        for batcher in self._batchers.values():
            batcher.close()
        self._rows.close()


def peers(tokenize: Callable[[Sequence[str]], Sequence[Row]]) -> Iterator[tuple[str, Serve]]:
    """Other engines of the same model that are installed; all texts are there at once."""
    folder = find_model().weights.parent
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        return
    theirs = SentenceTransformer(str(folder), device="cpu")

    def sentence_transformers(texts: Sequence[str]) -> Answers:
        vectors = theirs.encode(list(texts), batch_size=32, normalize_embeddings=True)
        return Answers(vectors, _sorted_elements([len(row) for row in tokenize(texts)], 32))

    yield "sentence-transformers, all at once", sentence_transformers
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "encoder.onnx"
        _export(theirs, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def onnx_runtime(texts: Sequence[str]) -> Answers:
        rows = tokenize(texts)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        vectors, computed = np.zeros((len(rows), MINILM.embedding_size), np.float32), 0
        for start in range(0, len(order), 16):
            chosen = order[start : start + 16]
            ids, mask = (array.astype(np.int64) for array in stack([rows[at] for at in chosen]))
            (hidden,) = session.run(["hidden"], {"ids": ids, "mask": mask})
            totals = (hidden * mask[..., None]).sum(1)
            vectors[chosen] = totals / np.linalg.norm(totals, axis=1, keepdims=True)
            computed += ids.size
        return Answers(vectors, computed)

    yield "ONNX Runtime, all sorted", onnx_runtime


def _export(theirs: object, path: Path) -> None:
    import torch

    class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bert = theirs[0].auto_model.eval()  # type: ignore[index]

        def forward(self, ids: object, mask: object) -> object:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    ids = torch.ones((2, 12), dtype=torch.int64)
    mask = ids.clone()
    mask[1, 7:] = 0  # of ones alone the export would make no mask at all
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    torch.onnx.export(
        Hidden().eval(),
        (ids, mask),
        str(path),
        input_names=["ids", "mask"],
        output_names=["hidden"],
        dynamic_shapes={"ids": {0: batch, 1: seq}, "mask": {0: batch, 1: seq}},
        dynamo=True,
        verbose=False,
    )


def _sorted_elements(lengths: Sequence[int], size: int) -> int:
    """What batches of sorted rows compute, each padded to its longest."""
    ordered = sorted(lengths)
    parts = (ordered[start : start + size] for start in range(0, len(ordered), size))
    return sum(len(part) * part[-1] for part in parts)


def real_flops(length: int) -> float:
    """Floating-point operations of the encoder for a text of `length` tokens by itself."""
    hidden = MINILM.embedding_size
    products = 2 * (4 * hidden * hidden + 2 * hidden * 4 * hidden)
    return MINILM.layers * length * (products + 4 * length * hidden)


class Machine:
    """Floating-point operations a second of a plain matrix product, as large as the model's."""

    def __init__(self) -> None:
        self._x = jnp.ones((2048, MINILM.embedding_size))
        self._kernel = jnp.ones((MINILM.embedding_size, 4 * MINILM.embedding_size))
        self._product = jax.jit(jnp.matmul)
        self.flops = 2.0 * self._x.shape[0] * self._kernel.size
        self.measure()

    def measure(self) -> float:
        """Seconds of one product, the median of some."""
        took = []
        for _ in range(20):
            start = time.perf_counter()
            self._product(self._x, self._kernel).block_until_ready()
            took.append(time.perf_counter() - start)
        return float(np.median(took))


def measure(texts: int, *, chunk: int, lengths: int) -> dict[str, dict[str, float]]:
    """Texts a second, the real part of computed elements and of the machine, by contender."""
    passages = [passage.text for passage in numpy_passages()]
    order = np.random.default_rng(0).permutation(len(passages))[:texts]
    stream = [passages[place] for place in order]
    policies, machine = Policies(lengths), Machine()
    contenders: dict[str, Serve] = {
        FIFO: policies.fifo,
        "sorted windows of 128": policies.sorted_windows,
        "one by one": policies.one_by_one,
        BATCHER: policies.least_cost,
        "batcher, 128 waiting": partial(policies.least_cost, waiting=WINDOW),
        "packed rows": policies.packed,
        **dict(peers(policies.tokenize)),
    }
    for serve in contenders.values():
        serve(stream[:32])
    took, computed, off = (dict.fromkeys(contenders, 0.0) for _ in range(3))
    compiles: dict[str, int] = dict.fromkeys(contenders, 0)
    products = []
    for start in range(0, len(stream), chunk):
        part = stream[start : start + chunk]
        expected = policies.one_by_one(part).vectors
        for name, serve in contenders.items():
            products.append(machine.measure())
            begin = time.perf_counter()
            with CompileCounter() as counter:
                answers = serve(part)
            compiles[name] += counter.compiles
            took[name] += time.perf_counter() - begin
            computed[name] += answers.computed
            off[name] = max(off[name], float(np.abs(answers.vectors - expected).max()))
    policies.close()
    lengths = [len(row) for row in policies.tokenize(stream)]
    peak = machine.flops / float(np.median(products))
    return {
        name: {
            "texts/s": len(stream) / took[name],
            "real/computed": sum(lengths) / computed[name],
            "of the matrix product": sum(map(real_flops, lengths)) / took[name] / peak,
            "off by": off[name],
            "compiles": compiles[name],
        }
        for name in contenders
    }


def measure_requests(texts: int) -> dict[str, dict[str, float]]:
    """How many times as fast texts are embedded in packed rows, by how many come at a time."""
    passages = [passage.text for passage in numpy_passages()]
    order = np.random.default_rng(0).permutation(len(passages))[:texts]
    stream = [passages[place] for place in order]
    encoders = {name: Encoder(packing=name == "packed") for name in ("composed", "packed")}
    for encoder in encoders.values():
        encoder.warmup(progress=False, workers=2)
    found = {}
    for at_once in (1, 2, 8, 64, 256):
        requests = [stream[start : start + at_once] for start in range(0, texts, at_once)]
        clock, cpu = dict.fromkeys(encoders, 0.0), dict.fromkeys(encoders, 0.0)
        for part in np.array_split(np.arange(len(requests)), min(16, len(requests))):
            for name, encoder in encoders.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                for place in part:
                    encoder.embed(requests[place])
                clock[name] += time.perf_counter() - start
                cpu[name] += time.process_time() - cpu_start
        found[f"{at_once} at a time"] = {
            "by the clock": clock["composed"] / clock["packed"],
            "by CPU time": cpu["composed"] / cpu["packed"],
        }
    return found


def measure_tiny(items: int = 20_000) -> dict[str, float]:
    """Microseconds for an item of a function that computes next to nothing, in a batcher or not."""
    function = cg.bucket_jit(
        lambda x: x * 2,
        in_axes="batch seq",
        config=cg.CUDAGraphConfig(capture_sizes=(1, 8, 16), capture_seq_lens=(32,)),
    )
    row = np.ones(20, np.float32)
    function.warmup(row[None], progress=False)
    start = time.perf_counter()
    for _ in range(items):
        function(row[None])
    direct = time.perf_counter() - start
    with CompileCounter() as counter, cg.Batcher(function) as batcher:
        batcher.map([row] * 1000)
        start = time.perf_counter()
        batcher.map([row] * items)
        many = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(1000):
            batcher.submit(row).result()
        single = (time.perf_counter() - start) / 1000
    if counter.compiles:
        raise SystemExit(f"{counter.compiles} programs were compiled by a batcher")
    return {
        "direct call": direct / items * 1e6,
        "one of many": many / items * 1e6,
        "one alone": single * 1e6,
    }


def measure_deciding(waiting: int, *, lengths: int, times: int = 200) -> float:
    """Microseconds to compose calls of so many waiting rows, on the grid of the other figures."""
    ladder = tuple(planned(lengths).capture_seq_lens or ())
    buckets = (cg.Bucket(rows, length) for rows in ROWS for length in ladder)
    prices = Prices(Priced(bucket, 0.2 + bucket.elements * 1e-3) for bucket in buckets)
    draw = np.random.default_rng(0)
    rows = [cg.Bucket(1, length) for length in draw.integers(5, ladder[-1], waiting).tolist()]
    took = []
    for _ in range(times):
        start = time.perf_counter()
        compose([found for row in rows if (found := prices.class_of(row))], prices)
        took.append(time.perf_counter() - start)
    return float(np.median(took)) * 1e6


def _lines(table: dict[str, dict[str, float]]) -> list[str]:
    base = table[FIFO]["texts/s"]
    ours = table[BATCHER]["texts/s"]
    head = f"{'':>36}  texts/s  x FIFO  batcher x  real/computed  of matmul   off by  compiles"
    rows = [
        f"{name:>36}  {row['texts/s']:7.1f}  {row['texts/s'] / base:6.2f}  "
        f"{ours / row['texts/s']:9.2f}  {row['real/computed']:13.3f}  "
        f"{row['of the matrix product']:9.1%}  {row['off by']:7.1e}  {row['compiles']:8}"
        for name, row in table.items()
    ]
    return [head, *rows]


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512, help="texts before the next contender")
    parser.add_argument("--lengths", type=int, default=24, help="lengths of the grid")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--requests", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: object
    if options.tiny:
        found = tiny = measure_tiny()
        tiny |= {
            f"deciding, {n} waiting": measure_deciding(n, lengths=options.lengths)
            for n in (128, 512)
        }
        lines = [f"{name:>24}: {us:8.1f} us" for name, us in tiny.items()]
    elif options.requests:
        found = requests = measure_requests(options.texts)
        lines = [
            f"{name:>16}: " + ", ".join(f"{ratio:.2f} {how}" for how, ratio in ratios.items())
            for name, ratios in requests.items()
        ]
    else:
        found = table = measure(options.texts, chunk=options.chunk, lengths=options.lengths)
        lines = _lines(table)
    print(json.dumps(found) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
