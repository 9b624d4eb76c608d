"""Runs scripts, each in a fork of this process, which has imported JAX and used nothing of it.

An interpreter of its own would take 0.7 s for that import. A script begins as with `python -c`, and
its process ends as any other.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import types
import warnings
from typing import Any

import jax  # noqa: F401
import numpy as np  # noqa: F401

import cudagraph_jax


def next_script(connection: socket.socket) -> dict[str, Any]:
    """The next one that is asked for, in the process that is to run it."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 8)
        if not message:
            os._exit(0)
        asked = dict(json.loads(message))
        if (ended := asked.get("ended")) is not None:
            connection.send(str(os.waitstatus_to_exitcode(os.waitpid(ended, 0)[1])).encode())
            continue
        if (child := os.fork()) == 0:
            connection.close()
            for file, place in zip(files, [0, 1, 2, *asked["kept"]], strict=True):
                if file != place:
                    os.dup2(file, place)
                    os.close(file)
            return asked
        for file in files:
            os.close(file)
        connection.send(str(child).encode())


for name in cudagraph_jax.__all__:  # they are imported at first use
    getattr(cudagraph_jax, name)
gc.freeze()
# Of threads, which NumPy's linear algebra has: they are not used.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
asked = next_script(socket.socket(fileno=int(sys.argv[1])))
if asked["warnings"]:
    warnings.simplefilter(asked["warnings"])
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv, sys.path[0] = ["-c", *asked["arguments"]], ""
main = sys.modules["__main__"] = types.ModuleType("__main__")
if asked["file"]:
    main.__file__ = asked["file"]
exec(compile(asked["script"], asked["file"] or "<string>", "exec"), vars(main))
