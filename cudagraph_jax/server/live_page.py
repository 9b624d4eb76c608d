"""The server's page: what it does now, without a script or a style from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from cudagraph_jax.report.page import page, section
from cudagraph_jax.report.summary import alerts, tiles
from cudagraph_jax.report.words import exact, milliseconds, part
from cudagraph_jax.server.text_queue import TextEncoder

_SCRIPT = """
const renew = async () => {
  let failure = "";
  if (!document.hidden) try {
    const answer = await fetch(location.pathname, {cache: "no-store"});
    if (!answer.ok) throw answer.status;
    const text = await answer.text();
    const left = [...document.querySelectorAll(".scroll")].map(area => area.scrollLeft);
    document.querySelector("main").replaceWith(
      new DOMParser().parseFromString(text, "text/html").querySelector("main"));
    document.querySelectorAll(".scroll").forEach((area, i) => { area.scrollLeft = left[i] || 0; });
  } catch (error) { failure = `No answer from the server (${error}): the figures are old.`; }
  document.querySelector("#stale").textContent = failure;
  setTimeout(renew, 2000);
};
setTimeout(renew, 2000);
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def live_page(model: str, encoder: TextEncoder, obstacle: str | None) -> str:
    """A complete HTML document, which asks for itself every two seconds.

    Args:
        model: What is served.
        encoder: What answers.
        obstacle: Why the server is not ready.
    """
    report = encoder.function.report()
    body = "\n".join(
        [
            alerts([] if obstacle is None else [f"Not ready: {obstacle}."]),
            section("Texts", _queue(encoder.batcher.stats())),
            section("Calls", report.body()),
        ]
    )
    after = f'<p id="stale" role="status"></p><script>{_SCRIPT}</script>'
    return page(model, report.moment, body, after=after)


def _queue(stats: Mapping[str, Any]) -> str:
    """What the batcher did, as tiles."""
    items, queue, service = stats["items"], stats["queue_ms"], stats["service_ms"]
    lost = {name: count for name, count in items.items() if name != "answered" and count}
    pairs = [
        ("waiting", exact(stats["waiting"])),
        ("answered", exact(items["answered"])),
        *((name, exact(count)) for name, count in lost.items()),
        ("queue p50", milliseconds(queue["p50"])),
        ("queue p99", milliseconds(queue["p99"])),
        ("service p50", milliseconds(service["p50"])),
        ("service p99", milliseconds(service["p99"])),
        ("waste", part(stats["waste"]) if stats["computed_elements"] else "–"),
    ]
    return tiles(pairs)
