"""demo.html: a single page that loads nothing, in the reader's light or dark color scheme."""

from __future__ import annotations

from html import escape
from string import Template

from star_attention.demo import heatmap
from star_attention.demo.result import DENSE, DemoResult, Row
from star_attention.planning.sizes import format_size
from star_attention.tools.plotting import heat_color

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Star Attention: the demo</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --text: #1d2126; --soft: #5b636d; --line: #e2e0db;
  --mark: #1f5f9e; --tint: #eaf1f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --text: #e7e9ec; --soft: #a3abb5; --line: #333a43;
    --mark: #7db4ea; --tint: #1f2d3c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p { margin: .5rem 0; }
.lede { font-size: 1.12rem; max-width: 52rem; }
.soft, figcaption { color: var(--soft); font-size: .93rem; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.2rem; overflow-x: auto;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .9rem; }
tbody tr:last-child td { border-bottom: 0; }
tr.star td { background: var(--tint); font-weight: 600; }
td small { color: var(--soft); font-weight: 400; }
.maps {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.5rem;
}
svg { width: 100%; height: auto; display: block; fill: currentColor; font-family: inherit; }
svg text { font-size: 13px; }
svg .title { font-size: 15px; font-weight: 600; }
svg .cell, svg .column { text-anchor: middle; }
svg .row { text-anchor: end; }
svg .axis { fill: var(--soft); }
.key { display: flex; gap: 1.2rem; flex-wrap: wrap; margin: .8rem 0 0; }
.key i {
  display: inline-block; width: .95rem; height: .95rem; border-radius: 3px;
  margin-right: .4rem; vertical-align: -2px;
}
figure { margin: 0; }
pre { margin: 0; white-space: pre-wrap; color: var(--soft); }
pre { font: .88rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre b { color: var(--text); background: var(--tint); }
pre .answer { color: var(--mark); font-weight: 700; }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.4rem;
  margin: 0; font-size: .93rem;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>Facts in a long text, with and without Star&nbsp;Attention</h1>
<p class="lede">$summary</p>
<h2>$heading</h2>
<div class="card"><table>
<thead><tr><th>method</th><th>blocks</th><th>anchor</th><th>facts found</th>
<th>encode</th><th>first token</th><th>keys and values</th></tr></thead>
<tbody>
$rows
</tbody>
</table></div>
$notes
<h2>By depth and length</h2>
<figure class="card">
<div class="maps">
$maps
</div>
<div class="key soft"><span><i style="background:$correct"></i>all found</span>
<span><i style="background:$half"></i>half</span>
<span><i style="background:$missed"></i>none</span></div>
<figcaption>$caption</figcaption>
</figure>
<h2>An example</h2>
<div class="card"><pre>&hellip; $example</pre></div>
<p class="soft">The text is the language reference in Python's <code>pydoc_data.topics</code>, one
sentence per line, with invented facts between the lines. The answer is Star Attention's.</p>
<h2>Settings and versions</h2>
<div class="card"><dl>
$facts
</dl></div>
</main>
</body>
</html>
""")


def html(result: DemoResult, summary: tuple[str, str], notes: list[str], caption: str) -> str:
    """Return the page."""
    versions = {f"version of {name}": version for name, version in result.versions.items()}
    facts = result.settings | versions
    facts["total seconds"] = f"{result.total_s:.0f}"
    return _PAGE.substitute(
        summary=escape(" ".join(summary)),
        heading=f"The table: {format_size(result.length)} tokens",
        rows="\n".join(_row(row) for row in result.rows),
        notes="\n".join(f'<p class="soft">{escape(note)}</p>' for note in notes),
        maps="\n".join(heatmap.svg(result, mode, title) for mode, title in heatmap.PANELS),
        correct=heat_color(1),
        half=heat_color(0.5),
        missed=heat_color(0),
        caption=escape(caption),
        example=_example(result),
        facts="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()
        ),
    )


def _row(row: Row) -> str:
    dense = row.mode == DENSE
    blocks = "one" if dense else f"{row.num_blocks} × {row.block_size:,}"
    anchor = "–" if dense else f"{row.anchor_size:,}"
    return (
        f'<tr class="{row.mode.split()[0]}"><td>{escape(row.mode)}</td>'
        f"<td>{blocks}</td><td>{anchor}</td>"
        f"<td>{row.score} <small>{row.score.accuracy:.0%}</small></td>"
        + _cell(f"{row.encode_s:.2f} s", row.encode_ratio)
        + _cell(f"{row.first_token_s:.2f} s", row.first_token_ratio)
        + _cell(f"{row.kv_bytes / 1024**2:.0f} MiB", row.kv_ratio)
        + "</tr>"
    )


def _cell(value: str, ratio: float) -> str:
    return f"<td>{value} <small>× {ratio:.2f}</small></td>"


def _example(result: DemoResult) -> str:
    example = result.example
    return (
        f"{escape(example.before)}<b>{escape(example.line.rstrip())}</b>\n"
        f"{escape(example.after)}&hellip;\n\n"
        f'{escape(example.query)}<span class="answer">{escape(example.answer)}</span>'
    )
