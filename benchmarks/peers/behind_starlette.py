"""sentence-transformers behind Starlette, a call for each request: what is written first."""

import argparse
import base64

import torch
import uvicorn
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def app_of(model):
    """OpenAI's embeddings for single texts, with vectors in base64."""

    async def embeddings(request: Request) -> JSONResponse:
        asked = await request.json()
        vector = model.encode(asked["input"], show_progress_bar=False)
        packed = base64.b64encode(vector.tobytes()).decode()
        embedding = {"object": "embedding", "index": 0, "embedding": packed}
        return JSONResponse({"object": "list", "data": [embedding], "model": asked["model"]})

    async def health(request: Request) -> Response:
        return Response()

    routes = [Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = SentenceTransformer(options.model, device="cpu")
    uvicorn.run(app_of(model), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
