"""Serves the tiny encoder from a listening socket that this process inherits.

serve_tiny.py FD [--delay SECONDS] [--api-key KEY] [--max-waiting N] [--timeout SECONDS] [--cold]
"""

import argparse
import logging
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from cudagraph_jax.server import Limits, embeddings_app, run
from cudagraph_jax.server.workers import end_with_parent, supervise
from tests.helpers.tiny_encoder import warm_encoder

parser = argparse.ArgumentParser()
parser.add_argument("fd", type=int)
parser.add_argument("--delay", type=float, default=0.0)
parser.add_argument("--api-key")
parser.add_argument("--max-waiting", type=int, default=2048)
parser.add_argument("--timeout", type=float, default=30.0)
parser.add_argument("--workers", type=int)
parser.add_argument("--worker", action="store_true")
options = parser.parse_args()

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
if options.workers:
    command = [sys.executable, __file__, "--worker"]
    listener = socket.socket(fileno=options.fd)
    sys.exit(supervise(command, workers=options.workers, listener=listener))
if options.worker:
    end_with_parent()
encoder = warm_encoder(before_call=lambda: time.sleep(options.delay))
app = embeddings_app(
    encoder,
    model="tiny",
    api_key=options.api_key,
    limits=Limits(max_waiting=options.max_waiting, timeout_s=options.timeout),
)
run(app, listener=socket.socket(fileno=options.fd), drain_s=options.timeout + 5)
print("drained", flush=True)
