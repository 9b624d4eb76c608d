"""The counts of managers and batchers as Prometheus metrics: `register(manager)`, no more.

| metric, with `cudagraph_jax_` before it | type | labels | what |
|---|---|---|---|
| `calls_total` | counter | `outcome`, `reason` | calls, each counted once |
| `replays_total` | counter | `fit` | replays by how the request fits its bucket |
| `replay_seconds_total` | counter | | time of all replays, inputs to trimmed outputs |
| `real_elements_total` | counter | | elements of requests that replays served |
| `padded_elements_total` | counter | | elements that were padding beside them |
| `captures_total`, `loads_total` | counter | | buckets compiled; loaded from the store instead |
| `evictions_total` | counter | | buckets dropped for a limit |
| `compile_seconds` | histogram | | trace, lower and compile, from the registration on |
| `replay_duration_seconds` | histogram | | each replay, with `replay_times=True` |
| `graphs`, `memory_bytes` | gauge | | captured buckets, their code and largest temporary memory |
| `queued_captures`, `failed_buckets` | gauge | | in the background; not captured for an error |
| `batcher_items_total` | counter | `outcome` | items of a batcher by what became of them |
| `batcher_calls_total` | counter | `bucket` | its calls |
| `batcher_real_elements_total`, `batcher_computed_elements_total` | counter | | of its calls |
| `batcher_waiting` | gauge | | items that wait |
| `batcher_queue_seconds`, `batcher_service_seconds` | histogram | | to the call; to the answer |

All have the label `manager`, or `batcher`, the name it was registered under. `outcome` of calls is
replay, capture, split, eager or error; `reason` and `fit` are the keys of `manager.stats()`: so the
number of series is known in advance. The bucket is no label of calls. Without `capture_seq_lens`,
or with `on_overflow="exact"`, there are as many buckets as sizes that callers come with, and every
one would be a series for ever; `manager.stats()` has the figures by bucket. A batcher's calls have
it, which run in captured buckets alone.

`manager.reset()` makes no counter fall. What was counted between the last update and a reset is
lost: call `registration.update()` before the reset to keep it.

In one process the metrics are brought up to date by each scrape, so that calls pay nothing, but for
a replay's histogram where it is asked for, and two of a batcher's item, which are always kept. In
prometheus_client's multi-process mode (`PROMETHEUS_MULTIPROC_DIR` is set) a scrape reads the files
that each process writes, so a daemon thread writes them every `interval_s` seconds, and once more
at exit; gauges are summed over live processes. Expose them with `MultiProcessCollector`, as
prometheus_client describes: https://prometheus.github.io/client_python/multiprocess/
"""

try:
    import prometheus_client  # noqa: F401  # asked for here, used in the modules below
except ImportError as error:
    raise ImportError(
        "cudagraph_jax.prometheus needs the package prometheus_client, which is not installed: "
        "run pip install 'cudagraph-jax[prometheus]'"
    ) from error

from cudagraph_jax.prometheus.registration import Registration, register

__all__ = ["Registration", "register"]
