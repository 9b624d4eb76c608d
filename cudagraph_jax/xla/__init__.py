"""What only XLA and JAX know: stages, bytes of executables, compiles, settings, profiles, GPUs."""
