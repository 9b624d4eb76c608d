"""Decides, serves and counts one call: `bucket_jit`, `BucketedFunction`, `CUDAGraphManager`."""
