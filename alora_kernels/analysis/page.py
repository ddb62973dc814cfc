"""The report's page: its frame and its looks, around what `report` fills in.

In:   a title and the body, already escaped.
Out:  one HTML document without scripts and without anything from elsewhere.
Who:  `report`.

The policy in its head lets a browser load nothing but the figures inside the file: even markup that slipped through an
escape could fetch and run nothing.
"""

from __future__ import annotations

from string import Template

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #1a1d24; --soft: #5a6270; --line: #d9dde4; --accent: #3b5bdb; --mark: #fff6d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12141a; --card: #1b1e26; --ink: #e8eaf0; --soft: #a7afbe; --line: #323744; --accent: #8ea4ff;
    --mark: #332d16;
  }
}
*, *::before, *::after { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .35rem; }
p, ul, dl { margin: .35rem 0 .75rem; }
li, dd { overflow-wrap: anywhere; }
.soft, figcaption, caption { color: var(--soft); }
.notes { background: var(--mark); border-left: 3px solid var(--accent); border-radius: .25rem; padding: .6rem 1rem; }
.notes ul { margin: 0; padding-left: 1.1rem; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0; max-width: 46rem; }
.scroll, figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem .25rem; font-size: .9rem; }
th, td { padding: .35rem .75rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 4.5rem; }
tbody th { overflow-wrap: anywhere; min-width: 8rem; font-weight: 600; }
tr:last-child > * { border-bottom: 0; }
thead tr > th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600; }
.w { min-width: 15rem; overflow-wrap: anywhere; }
.n { text-align: right; }
td.n { white-space: nowrap; }
figure { margin: 0 0 1.25rem; padding: .9rem 1rem 1rem; }
.wide { overflow-x: auto; }
img { display: block; width: var(--w); max-width: 100%; height: auto; margin: .4rem auto 0; }
figcaption { font-size: .92rem; max-width: 60rem; margin-top: .5rem; overflow-wrap: anywhere; }
code, pre { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { padding: .6rem .8rem; overflow-x: auto; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 44rem) {
  main { padding: 1rem .75rem 3rem; }
  figure { padding: .75rem; }
  img { width: min(var(--w), 40rem); max-width: none; }
}
@media print { body { background: #fff; } figure, .scroll { break-inside: avoid; } }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def page(title: str, body: str) -> str:
    """The document.

    Args:
        title, body: HTML; whatever a stranger wrote in them is escaped.
    """
    return _PAGE.substitute(title=title, body=body)
