"""Settings of all tests."""

from hypothesis import settings

# The first example of a property may trace or compile, which no deadline foresees.
settings.register_profile("cudagraph_jax", deadline=None)
settings.load_profile("cudagraph_jax")
