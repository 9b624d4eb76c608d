"""sentence-transformers in a Ray Serve deployment with `@serve.batch`."""

import argparse
import base64
import signal
import tempfile
import threading

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


def deployment_of(options):
    """OpenAI's embeddings for single texts, embedded some at a time."""

    # Ray's default lets five requests into a replica at a time, of which no batch would come.
    @serve.deployment(num_replicas=options.replicas, max_ongoing_requests=1000)
    class Embedder:
        def __init__(self):
            import torch
            from sentence_transformers import SentenceTransformer

            torch.set_num_threads(options.threads)
            self._model = SentenceTransformer(options.model, device="cpu")

        @serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.wait_ms / 1e3)
        async def embed(self, texts):
            vectors = self._model.encode(texts, batch_size=options.rows, show_progress_bar=False)
            return list(vectors)

        async def __call__(self, request: Request) -> JSONResponse:
            if request.method == "GET":
                return JSONResponse({})
            asked = await request.json()
            packed = base64.b64encode((await self.embed(asked["input"])).tobytes()).decode()
            embedding = {"object": "embedding", "index": 0, "embedding": packed}
            return JSONResponse({"object": "list", "data": [embedding], "model": asked["model"]})

    return Embedder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32, help="requests that may share a call")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="for a batch to fill")
    parser.add_argument("--rows", type=int, default=8, help="texts that the model takes at once")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    options = parser.parse_args()
    # Ray's sockets have paths of at most 107 characters: not below the checkout.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        ray.init(
            num_cpus=options.replicas + 1,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=scratch,
        )
        over = threading.Event()
        # Behind `ray.init`, which has a handler of its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: over.set())
        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        serve.run(deployment_of(options).bind(), route_prefix="/")
        over.wait()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
