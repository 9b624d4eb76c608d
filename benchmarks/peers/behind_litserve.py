"""sentence-transformers behind LitServe, with OpenAI's embeddings as LitServe gives them.

Two workers of one thread each answered several times as many texts as one worker with two threads
while other work ran: threads of one product wait for each other.
"""

import argparse

import litserve
import torch
from litserve.specs.openai_embedding import OpenAIEmbeddingSpec
from sentence_transformers import SentenceTransformer


class Embedder(litserve.LitAPI):
    """Embeds what LitServe put together, shortest texts first, some at a time."""

    def __init__(self, options):
        super().__init__(
            max_batch_size=options.batch,
            batch_timeout=options.wait_ms / 1e3,
            spec=OpenAIEmbeddingSpec(),
        )
        self._options = options

    def setup(self, device):
        torch.set_num_threads(self._options.threads)
        self._model = SentenceTransformer(self._options.model, device="cpu")

    def predict(self, texts):
        return self._model.encode(texts, batch_size=self._options.rows, show_progress_bar=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32, help="requests that may share a call")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="for a batch to fill")
    parser.add_argument("--rows", type=int, default=8, help="texts that the model takes at once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--fast-queue", action="store_true")
    options = parser.parse_args()
    server = litserve.LitServer(
        Embedder(options),
        accelerator="cpu",
        workers_per_device=options.workers,
        fast_queue=options.fast_queue,
    )
    server.run(
        host="127.0.0.1",
        port=options.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
