"""A whole HTML page: self-contained, light and dark, printable."""

from __future__ import annotations

from string import Template

from cudagraph_jax._base.html import CLASS, STYLE, escaped

_PAGE_STYLE = """
:root{color-scheme:light dark}
body{margin:0;background:#fff;color:#1f2328}
main{max-width:1440px;margin:0 auto;padding:1.2em}
h1{font-size:22px;margin:.2em 0;overflow-wrap:anywhere}
header p{opacity:.8}
.heat tbody th{position:sticky;left:0;background:#fff;opacity:1!important}
@media(prefers-color-scheme:dark){body,.heat tbody th{background:#14171c;color:#e6e9ee}}
@media print{body,.heat tbody th{background:#fff;color:#000}main{max-width:none;padding:0}
 h2{break-after:avoid}}
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main class="$c">
<header><h1>$heading</h1><p>$subtitle</p></header>
$body
</main>
$after
</body>
</html>
""")


def page(heading: str, subtitle: str, body: str, *, after: str = "") -> str:
    """A complete HTML document; it asks for nothing from elsewhere and has no script of its own.

    Args:
        heading: What it is about; text.
        subtitle: When and with what it was made; text.
        body: The content; HTML.
        after: What follows it; HTML.
    """
    return _PAGE.substitute(
        title=escaped(f"{heading}, {subtitle}"),
        heading=escaped(heading),
        subtitle=escaped(subtitle),
        style=STYLE + _PAGE_STYLE,
        c=CLASS,
        body=body,
        after=after,
    )


def section(heading: str, *fragments: str) -> str:
    """Fragments under a heading; nothing where all of them are empty."""
    body = "".join(fragments)
    return f"<section><h2>{escaped(heading)}</h2>{body}</section>" if body else ""
