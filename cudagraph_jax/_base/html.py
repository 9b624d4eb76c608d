"""HTML: tables, and one block of CSS that touches nothing outside its class."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from cudagraph_jax._base.text import Row, is_number_column, one_line

_LONG = 32

CLASS = "cudagraph-jax"

# Text has the colour that the page around it gives, and every surface is translucent: so it is
# legible on a light and on a dark page, also in notebooks, which do not follow the system's theme.
# The class is named twice to weigh more than what notebooks say of all tables.
STYLE = Template("""
.$c{font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:100%;
 margin:.6em 0}
.$c table{border-collapse:collapse;margin:.4em 0;font-size:inherit;width:auto;table-layout:auto}
.$c caption{text-align:left;font-weight:600;padding:.3em 0;caption-side:top;color:inherit}
.$c th,.$c td{padding:.2em .7em;text-align:left;vertical-align:top;white-space:nowrap;
 border:0 solid rgb(128 128 128/.3);border-bottom-width:1px;line-height:1.45;max-width:none}
.$c thead th{border-bottom-width:2px;font-weight:600}
.$c .n{text-align:right;font-variant-numeric:tabular-nums}
.$c .w{white-space:pre-wrap;overflow-wrap:anywhere;min-width:18em;max-width:44em}
.$c tbody th{font-weight:400;opacity:.8}
.$c .scroll{overflow-x:auto;max-width:100%}
.$c p{margin:.4em 0;max-width:60em}
.$c h2{font-size:16px;margin:1.4em 0 .3em;border-bottom:1px solid rgb(128 128 128/.35)}
.$c h2+.scroll>table:not(.heat)>caption{position:absolute;clip-path:inset(50%);padding:0}
.$c .alert{border-left:4px solid rgb(220 60 40);background:rgb(220 60 40/.14);padding:.4em .8em;
 overflow-wrap:anywhere}
.$c .tiles{display:flex;flex-wrap:wrap;gap:.6em;margin:.6em 0;padding:0}
.$c .tiles div{border:1px solid rgb(128 128 128/.35);border-radius:6px;padding:.35em .8em}
.$c .tiles dt,.$c .tiles dd{float:none;clear:none;display:block;width:auto;margin:0;padding:0}
.$c .tiles dt{font-size:11px;opacity:.8;font-weight:400}
.$c .tiles dd{font-size:18px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.$c table.heat{border-collapse:separate;border-spacing:2px;font-size:12px}
.$c .heat td,.$c .heat th{border:0;padding:.2em .4em;text-align:right;
 font-variant-numeric:tabular-nums;font-weight:400}
.$c .heat td{min-width:2.6em;border-radius:3px}
.$c .heat tr{background:none}
.$c .heat caption{font-size:13px;white-space:nowrap;max-width:0}
.$c .heat thead th:first-child{white-space:normal;width:4em}
.$c .legend span{display:inline-block;padding:.1em .6em;margin:0 .15em;border-radius:3px}
.$c .l0{background:rgb(128 128 128/.14)}
.$c .hits .l1{background:rgb(59 130 246/.16)}.$c .hits .l2{background:rgb(59 130 246/.28)}
.$c .hits .l3{background:rgb(59 130 246/.42)}.$c .hits .l4{background:rgb(59 130 246/.58)}
.$c .waste .l1{background:rgb(234 88 12/.14)}.$c .waste .l2{background:rgb(234 88 12/.26)}
.$c .waste .l3{background:rgb(234 88 12/.40)}.$c .waste .l4{background:rgb(234 88 12/.56)}
.$c td,.$c span,.$c .alert{-webkit-print-color-adjust:exact;print-color-adjust:exact}
@media print{.$c .scroll{overflow:visible}.$c table.heat{font-size:8px;border-spacing:1px}
 .$c tr,.$c .tiles div{break-inside:avoid}.$c caption{break-after:avoid}}
""").substitute(c=f"{CLASS}.{CLASS}")


def styled(*fragments: str) -> str:
    """The fragments as they go into a notebook: in one element, with their CSS."""
    return f'<div class="{CLASS}"><style>{STYLE}</style>{"".join(fragments)}</div>'


def escaped(text: str) -> str:
    """The text as HTML shows it, without what would act on a terminal or turn it around."""
    return escape("\n".join(map(one_line, text.split("\n"))))


def html_table(title: str, header: Row, rows: Sequence[Row]) -> str:
    """The same as an HTML table with a caption and its CSS; every cell is escaped."""
    return styled(table_fragment(title, header, rows))


def html_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """An HTML table of a label and a value in each row, with its CSS; every cell is escaped."""
    return styled(pairs_fragment(title, pairs))


def table_fragment(title: str, header: Row, rows: Sequence[Row]) -> str:
    """`html_table` as a part of something larger, which holds the CSS."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    right = [is_number_column(cells) for cells in columns]
    head = "".join(
        f'<th scope="col"{_class(is_right)}>{escaped(cell)}</th>'
        for cell, is_right in zip(header, right, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(cell, is_right) for cell, is_right in zip(row, right, strict=True))
        + "</tr>"
        for row in rows
    )
    return scrolling(
        title,
        f"<table><caption>{escaped(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def pairs_fragment(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """`html_pairs` as a part of something larger, which holds the CSS."""
    body = "".join(
        f'<tr><th scope="row">{escaped(label)}</th>{_cell(value, False)}</tr>'
        for label, value in pairs
    )
    return scrolling(
        title, f"<table><caption>{escaped(title)}</caption><tbody>{body}</tbody></table>"
    )


def scrolling(title: str, table: str) -> str:
    """A table that scrolls by itself where it is wider than the page, also by the keyboard."""
    label = escaped(title)
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _cell(text: str, is_right: bool) -> str:
    return f"<td{_class(is_right, len(text) > _LONG)}>{escaped(text)}</td>"


def _class(is_right: bool, is_long: bool = False) -> str:
    if is_right:
        return ' class="n"'
    return ' class="w"' if is_long else ""
