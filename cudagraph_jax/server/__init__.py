"""Embeddings over HTTP, as OpenAI's API has them: `embeddings_app(encoder, model=...)`.

`run(app)` serves it in this process until it is told to end; `cudagraph-jax serve` does both.
"""

try:
    import httptools  # noqa: F401  # asked for here, used in the modules below
    import orjson  # noqa: F401
    import prometheus_client  # noqa: F401
    import pydantic  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"cudagraph_jax.server needs the package {error.name}, which is not installed: "
        "run pip install 'cudagraph-jax[serve]'"
    ) from error

from cudagraph_jax.server.app import embeddings_app
from cudagraph_jax.server.process import run
from cudagraph_jax.server.text_queue import Limits, TextEncoder

__all__ = ["Limits", "TextEncoder", "embeddings_app", "run"]
