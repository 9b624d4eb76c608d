"""A job whose executables outlive it; run by test_job_store.py."""

from __future__ import annotations

import sys

import numpy as np

import cudagraph_jax as cg
from tests.helpers.member import WEIGHTS, ids, is_right, leave, made, say

for name, fingerprint in (("lowered", None), ("named", "embed-v1")):
    embed = made(store=sys.argv[4], fingerprint=fingerprint, name=name)
    report = embed.warmup(WEIGHTS, ids(1, 3), progress=False)
    say(name, [report.captured, report.loaded])
    say(f"{name} is right", is_right(embed(WEIGHTS, ids(3, 5)), ids(3, 5)))
# Of this process alone, whatever the job is.
config = cg.CUDAGraphConfig(capture_sizes=(1,), capture_seq_lens=(4,), store=sys.argv[4])
own = cg.bucket_jit(lambda x: x * 2, in_axes="batch seq", config=config, name="own")
report = own.warmup(np.ones((1, 3), np.float32), progress=False)
say("own", [report.captured, report.loaded])
leave()
