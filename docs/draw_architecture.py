"""Draws docs/architecture.svg from the imports of the package: `python docs/draw_architecture.py`.

The rungs are those that import-linter checks, from pyproject.toml. Nothing is imported: modules are
read as text.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "cudagraph_jax"
PICTURE = ROOT / "docs" / "architecture.svg"
# Single modules at the root of the package share one box.
ROOT_MODULES = "root modules"

BOX_WIDTH, BOX_HEIGHT = 152, 40
# Wider than half a box: an arrow down to a box then passes beside all boxes above it.
STEP_X, STEP_Y = 80, 54
LEFT, TOP = 66, 14
# Greys and fills that can be read on white and on nearly black.
LINE, LABEL, INK = "#808890", "#78808a", "#10202c"
FILLS = ("#f6c9a8", "#f6dca8", "#c5e3b4", "#b4e0d6", "#b4d4ee", "#c3c8f0", "#dcc6ec", "#d4d8dc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One folder, or the root's modules.

    Attributes:
        name: The folder's name.
        rung: From 0, the highest.
        modules: How many modules it has.
        lines: How many lines they have together.
    """

    name: str
    rung: int
    modules: int
    lines: int


def read() -> tuple[list[Box], Counter[tuple[str, str]]]:
    """The boxes from the highest rung to the lowest, and how many imports go between them."""
    boxes, place_of = [], {}
    for rung, layer in enumerate(_layers()):
        for name in layer:
            place_of[name] = name if (ROOT / PACKAGE / name).is_dir() else ROOT_MODULES
        for place in dict.fromkeys(place_of[name] for name in layer):
            paths = list(_modules(place, layer))
            if paths:
                lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
                boxes.append(Box(name=place, rung=rung, modules=len(paths), lines=lines))
    rung_of = {box.name: box.rung for box in boxes}
    public = _public_names()
    imports: Counter[tuple[str, str]] = Counter()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        source = place_of.get(path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py"))
        for name in _imported(path, public):
            target = place_of.get(name)
            # Modules of the lowest rung may import one another: that is no step down.
            if source and target and rung_of[source] < rung_of[target]:
                imports[source, target] += 1
    return boxes, imports


def _layers() -> list[list[str]]:
    """The names on each rung, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    return [
        [name.strip(" ()").removeprefix(f"{PACKAGE}.") for name in re.split("[|:]", layer)]
        for layer in contract["layers"]
    ]


def _modules(place: str, layer: list[str]) -> Iterator[Path]:
    folder = ROOT / PACKAGE
    if place == ROOT_MODULES:
        yield from (path for name in layer if (path := folder / f"{name}.py").is_file())
    else:
        yield from (folder / place).rglob("*.py")


def _public_names() -> dict[str, str]:
    """In which folder or module each name of the package itself is defined."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.name: node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}.")
        for alias in node.names
    }


def _imported(path: Path, public: dict[str, str]) -> Iterator[str]:
    """The first part below the package of everything that a module imports from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from (public.get(alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith(f"{PACKAGE}.")
            )


def draw(boxes: list[Box], imports: Counter[tuple[str, str]]) -> str:
    """The picture: boxes on the diagonal; arrows go right from a box and down to what it uses."""
    at = {box.name: (LEFT + STEP_X * i, TOP + STEP_Y * i) for i, box in enumerate(boxes)}
    width = LEFT + STEP_X * (len(boxes) - 1) + BOX_WIDTH + 10
    height = TOP + STEP_Y * (len(boxes) - 1) + BOX_HEIGHT + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="system-ui, sans-serif" role="img">',
        f"<title>Imports between the folders of {PACKAGE}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
        f' markerHeight="8" orient="auto"><path d="M0 0.5 L8 4 L0 7.5z" fill="{LINE}"/>'
        "</marker></defs>",
        *_rungs(boxes, width),
        *_arrows(boxes, imports, at),
        *(_box(box, *at[box.name]) for box in boxes),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _rungs(boxes: list[Box], width: int) -> Iterator[str]:
    """A line above each rung but the highest, and the rung's number."""
    for i, box in enumerate(boxes):
        if i and boxes[i - 1].rung == box.rung:
            continue
        y = TOP + STEP_Y * i
        if i:
            edge = y - (STEP_Y - BOX_HEIGHT) // 2
            yield (
                f'<path d="M0 {edge} H{width}" stroke="{LINE}" stroke-opacity="0.45"'
                ' stroke-dasharray="2 5"/>'
            )
        yield f'<text x="6" y="{y + 25}" font-size="13" fill="{LABEL}">rung {box.rung + 1}</text>'


def _arrows(
    boxes: list[Box], imports: Counter[tuple[str, str]], at: dict[str, tuple[int, int]]
) -> Iterator[str]:
    for box in boxes:
        x, y = at[box.name]
        used = [at[target][0] for source, target in imports if source == box.name]
        if used:
            middle = y + BOX_HEIGHT // 2
            end = max(used) + BOX_WIDTH // 2
            yield f'<path d="M{x + BOX_WIDTH} {middle} H{end}" stroke="{LINE}" stroke-width="1.4"/>'
        users = [at[source][1] for source, target in imports if target == box.name]
        if users:
            column = x + BOX_WIDTH // 2
            yield (
                f'<path d="M{column} {min(users) + BOX_HEIGHT // 2} V{y - 1}" stroke="{LINE}"'
                ' stroke-width="1.4" marker-end="url(#tip)"/>'
            )
    for (source, target), count in sorted(imports.items()):
        column, row = at[target][0] + BOX_WIDTH // 2, at[source][1] + BOX_HEIGHT // 2
        yield (
            f'<circle cx="{column}" cy="{row}" r="4.5" fill="{LINE}">'
            f"<title>{source} imports {target} ({count})</title></circle>"
        )


def _box(box: Box, x: int, y: int) -> str:
    modules = "1 module" if box.modules == 1 else f"{box.modules} modules"
    middle = x + BOX_WIDTH // 2
    return (
        f'<g data-folder="{box.name}"><rect x="{x}" y="{y}" width="{BOX_WIDTH}"'
        f' height="{BOX_HEIGHT}" rx="5" fill="{FILLS[box.rung % len(FILLS)]}" stroke="{LINE}"/>'
        f'<text x="{middle}" y="{y + 17}" text-anchor="middle" font-size="14" font-weight="600"'
        f' fill="{INK}">{box.name}</text>'
        f'<text x="{middle}" y="{y + 32}" text-anchor="middle" font-size="11.5" fill="{INK}">'
        f"{modules}, {box.lines:,} lines</text></g>"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(*read()), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
