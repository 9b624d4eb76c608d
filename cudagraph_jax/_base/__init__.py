"""What knows neither JAX nor this domain: checks, caches, workers, files, text."""
