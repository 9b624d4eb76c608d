"""From a Python call to a program that can be lowered: binding, axes, variants, fingerprints."""
