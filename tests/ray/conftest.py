"""Settings of Ray. `make test-ray` runs these tests, and no other target collects them."""

import os
import secrets
import warnings

# Read when Ray is imported. The first keeps its ports, but for two, to the loopback: on Linux it
# takes the machine's address otherwise. A token of its own leaves none in the home folder.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's use of pydantic
    import ray.serve  # noqa: F401
