"""Colours, style and script of the page."""

from __future__ import annotations

import re

LIGHT = {
    **{"page": "#fcfcfb", "text": "#1c1d20", "soft": "#62656d", "line": "#e3e3df", "panel": "#ffffff"},
    **{"shade": "#f3f3f0", "accent": "#2f5fd0", "note": "#fbf4dd"},
    **{"key": "#2f5fd0", "rotated": "#86a5ec", "value": "#d0672f", "qkv": "#26856a", "o": "#8a4fc0"},
    **{"up": "#b3861b", "down": "#6b7280"},
}
"""Colours by name; the picture has them too."""

DARK = {
    **{"page": "#141518", "text": "#e8e8e4", "soft": "#a0a3ab", "line": "#303238", "panel": "#1b1d21"},
    **{"shade": "#23252a", "accent": "#86a9ff", "note": "#2b2718"},
    **{"key": "#86a9ff", "rotated": "#5470b8", "value": "#f29a68", "qkv": "#5fc4a4", "o": "#c496f0"},
    **{"up": "#e0b94e", "down": "#9aa0ab"},
}
"""The same for readers who prefer dark pages."""

SERIES = {"key": "key", "rotated key": "rotated", "value": "value", "qkv": "qkv", "o": "o", "gate_up": "up"}
SERIES |= {"down": "down", "predicted": "key", "measured": "value"}
"""Colour of every series of a chart, by name."""


def _variables(colors: dict[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {color};" for name, color in colors.items()) + " }"


def css_class(series: str) -> str:
    """The class of what shows a series; its name may come from a file."""
    return "c-" + re.sub("[^a-z0-9]", "-", series)


_COLORS = f"""
{_variables(LIGHT)}
@media (prefers-color-scheme: dark) {{ {_variables(DARK)} }}
{" ".join(f".{css_class(series)} {{ color: var(--{color}); }}" for series, color in SERIES.items())}
"""

STYLE = (
    _COLORS
    + """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 18px; line-height: 1.3; margin: 0; letter-spacing: -0.005em; }
p { margin: 0; }
header p, section > p, details > p { color: var(--soft); max-width: 80ch; text-wrap: pretty; }
header { margin-bottom: 28px; }
section, details { margin-top: 36px; }
section > h2 { margin-bottom: 2px; }
.notes { list-style: none; margin: 0 0 24px; padding: 12px 16px; background: var(--note); border-radius: 8px; }
.notes li { max-width: 92ch; }
.notes li + li { margin-top: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card h2 { font-size: 13px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.card .value { font-size: 27px; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.card p:last-child { font-size: 13px; line-height: 1.4; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 16px 16px 12px; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 8px; }
.unit { font-weight: 400; font-size: 13px; color: var(--soft); }
svg { display: block; width: 100%; height: auto; font: inherit; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.tick, .label { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: currentColor; }
.heat rect { fill: var(--accent); stroke: var(--line); stroke-width: 0.5; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  font-size: 13px; color: var(--soft); }
.swatch { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: currentColor;
  margin-right: 6px; vertical-align: middle; }
.scroll { overflow-x: auto; margin-top: 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--panel); }
#overview, #layers, #heads { font-size: 13px; }
#overview :is(td, th button), #layers :is(td, th button), #heads :is(td, th button) { padding-inline: 8px; }
.scroll:has(#layers), .scroll:has(#heads) { max-height: 70vh; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--shade); padding: 0; text-align: right; vertical-align: bottom; }
th button { font: inherit; font-size: 13px; font-weight: 500; color: var(--soft); background: none; border: 0;
  padding: 8px 12px; width: 100%; text-align: inherit; cursor: pointer; white-space: nowrap; }
th button::after { content: "\\2195"; opacity: 0.35; margin-left: 4px; font-size: 11px; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }
th[aria-sort="ascending"] button, th[aria-sort="descending"] button, th button:hover { color: var(--text); }
td { padding: 6px 12px; border-top: 1px solid var(--line); white-space: nowrap; }
td.n { text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; }
th:first-child { z-index: 1; }
td:first-child { background: var(--panel); }
tbody tr:hover, tbody tr:hover td:first-child { background: var(--shade); }
summary { cursor: pointer; padding: 4px 0; }
summary h2 { display: inline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
th button:focus-visible { outline-offset: -2px; }
footer { margin-top: 44px; padding-top: 16px; border-top: 1px solid var(--line); font-size: 13px; color: var(--soft); }
footer p + p { margin-top: 6px; }
code { font-size: 12px; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 25px; }
  .cards { grid-template-columns: 1fr 1fr; }
  figure { padding: 12px 10px 10px; }
  td, th button { padding-inline: 8px; }
  .tick, .label { font-size: 15.5px; }
}
@media print { details > :not(summary) { display: block; } .scroll { overflow: visible; max-height: none; } }
"""
)

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = row => row.cells[column].dataset.key;
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const numeric = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return direction * (numeric ? x - y : x.localeCompare(y));
    };
    body.append(...[...body.rows].sort(order));
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  }));
}
"""
