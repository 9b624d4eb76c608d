"""What `from cudagraph_jax import bucket_jit` costs behind `import jax`, and what commands cost.

    python benchmarks/import_time.py [--rounds 15]

The first is timed within fresh processes; of the others it is the processor time of the whole
process. All take turns. The exit status is 1 where the first is above the promise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

MOST_MS = 30.0
KEEPS_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
TIMED = """
import time
import jax
start = time.perf_counter()
from cudagraph_jax import bucket_jit
print(time.perf_counter() - start)
"""


def run(*arguments: str) -> tuple[str, float]:
    """What a process of Python prints, and its processor time in milliseconds."""
    # Bytecode is kept, as an installed package has it.
    environ = {name: value for name, value in os.environ.items() if name != KEEPS_NO_BYTECODE}
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, env=environ
    )
    after = os.times()
    took = after.children_user + after.children_system
    return done.stdout, (took - before.children_user - before.children_system) * 1e3


def main() -> int:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import numpy": ("-c", "import numpy"),
            "import jax": ("-c", "import jax"),
            "cudagraph-jax --version": ("-m", "cudagraph_jax", "--version"),
            "cudagraph-jax store ls": ("-m", "cudagraph_jax", "store", "ls", folder),
        }
        run("-c", TIMED)  # files into the page cache, modules compiled to bytecode
        imports: list[float] = []
        took: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            imports.append(float(run("-c", TIMED)[0]) * 1e3)
            for name, arguments in commands.items():
                took[name].append(run(*arguments)[1])
    low, middle, high = statistics.quantiles(imports, n=4)
    print(f"Python {sys.version.split()[0]}, {rounds} rounds, medians, ms")
    print(
        f"import of bucket_jit behind jax      {middle:6.0f} ({low:.0f} to {high:.0f}), "
        f"at most {MOST_MS:.0f}"
    )
    for name, times in took.items():
        print(f"processor time of {name:24}{statistics.median(times):6.0f}")
    return int(middle > MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
