"""Replicas of the embeddings server on Ray Serve, on one machine or many, that share one store.

    pip install 'cudagraph-jax[ray]'
    serve run examples.ray_serve:app store=/srv/graphs replicas=2
    python examples/ray_serve.py --store /srv/graphs --replicas 2

Both answer OpenAI's client on http://127.0.0.1:8000/v1, as `cudagraph-jax serve` does. The first
replica on a kind of hardware compiles, and fills the store; all later ones load.
"""

# Ray reads the annotation of `app`, so that no `from __future__ import annotations` stands here.

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydantic
from ray import serve
from starlette.applications import Starlette

from cudagraph_jax.demo import Encoder
from cudagraph_jax.server import Limits, TextEncoder, embeddings_app

# Ray hands a request to a replica while fewer than this are under way there; what is more waits in
# Ray, where no batcher sees it. It is above the server's own limit, whose 429 says when to try
# again.
LIMITS = Limits(max_waiting=2048)
MAX_ONGOING_REQUESTS = 2 * LIMITS.max_waiting


class Options(pydantic.BaseModel):
    """What `serve run examples.ray_serve:app NAME=VALUE ...` takes.

    Attributes:
        store: A directory that all machines share, or one on each.
        replicas: At the least.
        max_replicas: At the most, where the queue is long; as many as `replicas` if None.
        gpus: Of a replica. Without, XLA uses all cores of the machine: one replica is best there.
    """

    store: str = "graphs"
    replicas: int = 1
    max_replicas: int | None = None
    gpus: float = 0


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    # Longer than a request may take: a replica that is no longer needed answers what it has.
    graceful_shutdown_timeout_s=LIMITS.timeout_s + 5,
    health_check_period_s=2,  # one that died is replaced when Ray asks next
)
@serve.ingress()  # the application is made in the replica, by the method that Ray asks for
class Embeddings:
    """One replica.

    Args:
        make_encoder: Makes what answers, in the replica's process.
        model: The name by which clients ask for it.
    """

    def __init__(self, make_encoder: Callable[[], TextEncoder], model: str) -> None:
        self.encoder = make_encoder()
        # Ray sends requests to a replica whose constructor has returned. By then it is warm.
        self.encoder.warmup(progress=lambda *_: None)
        self.encoder.function.seal()
        registry = self.encoder.function.registry
        logging.getLogger("ray.serve").info(
            "warm: %d buckets compiled, %d loaded", registry.capture_count, registry.load_count
        )
        self.server = embeddings_app(self.encoder, model=model, limits=LIMITS)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.server

    def check_health(self) -> None:
        """What `/ready` says. Ray replaces a replica that raises three times in a row."""
        if (obstacle := self.server.state.readiness.obstacle()) is not None:
            raise RuntimeError(obstacle)

    # No @serve.batch: it has filled its batch, and frozen it, while the last one still computes.
    # The batcher takes every text at once, and chooses when the device is free, by length and cost.
    async def embed(self, text: str) -> np.ndarray:
        """For other deployments, without HTTP: `await handle.embed.remote(text)`."""
        (row,) = self.encoder.tokenize([text])
        return self.encoder.vector(await self.encoder.batcher(*self.encoder.item(row)))


def scaled(options: Options) -> serve.Deployment:
    """The deployment, as large as it should be."""
    return Embeddings.options(  # type: ignore[attr-defined]  # which is a Deployment by now
        ray_actor_options={"num_cpus": 1, "num_gpus": options.gpus},
        autoscaling_config={
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas or options.replicas,
            # Among 64 that wait, texts find company of their own length; more only wait longer.
            "target_ongoing_requests": 64,
            "look_back_period_s": 15,
            "upscale_delay_s": 5,  # one that loads is there within seconds: 30 would be too careful
        },
    )


def app(options: Options) -> serve.Application:
    """What `serve run` looks for."""
    store = Path(options.store).resolve()  # a replica has another working directory
    return scaled(options).bind(partial(Encoder, store=store), "all-MiniLM-L6-v2")


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="graphs")
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    try:
        serve.run(app(Options(store=options.store, replicas=options.replicas)), blocking=True)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
