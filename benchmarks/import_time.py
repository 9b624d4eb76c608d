"""What `from cudagraph_jax import bucket_jit` costs beside `import jax`, in fresh processes.

    python benchmarks/import_time.py [--rounds 15]

Both contenders run in turn in each round, so that a slow moment of the machine is shared. The exit
status is 1 where the median of the differences is above the promise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

MOST_MS = 30.0
KEEPS_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
OURS = "from cudagraph_jax import bucket_jit"
TIMED = """
import time
start = time.perf_counter()
import jax
{ours}
print(time.perf_counter() - start)
"""


def import_ms(ours: str = "") -> float:
    """Milliseconds of `import jax` and of another statement, in a process of its own."""
    command = [sys.executable, "-c", TIMED.format(ours=ours)]
    # Bytecode is kept, as an installed package has it.
    environ = {name: value for name, value in os.environ.items() if name != KEEPS_NO_BYTECODE}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return float(done.stdout) * 1e3


def main() -> int:
    """Prints the medians and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    import_ms(OURS)  # files into the page cache, modules compiled to bytecode
    pairs = [(import_ms(), import_ms(OURS)) for _ in range(rounds)]
    alone, both = (statistics.median(column) for column in zip(*pairs, strict=True))
    more = [with_ours - without for without, with_ours in pairs]
    low, middle, high = statistics.quantiles(more, n=4)
    print(f"Python {sys.version.split()[0]}, {rounds} rounds, medians")
    print(f"import jax                 {alone:7.1f} ms")
    print(f"... and bucket_jit         {both:7.1f} ms")
    print(
        f"more, round by round       {middle:7.1f} ms ({low:.1f} to {high:.1f}), at most {MOST_MS}"
    )
    return int(middle > MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
