"""A job whose executables outlive it; run by test_job_store.py."""

from __future__ import annotations

import sys

from tests.helpers.member import WEIGHTS, ids, is_right, leave, made, say

for name, fingerprint in (("lowered", None), ("named", "embed-v1")):
    embed = made(store=sys.argv[4], fingerprint=fingerprint, name=name)
    report = embed.warmup(WEIGHTS, ids(1, 3), progress=False)
    say(name, [report.captured, report.loaded])
    say(f"{name} is right", is_right(embed(WEIGHTS, ids(3, 5)), ids(3, 5)))
leave()
