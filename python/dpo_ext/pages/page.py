"""`page`: one self-contained HTML page, no link to the outside, no script, light and dark; and the
pieces that pages share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { --paper:#fbfaf8; --card:#fff; --ink:#1d2430; --soft:#5d6675; --rule:#e4e2dd;
  --policy:#2563c9; --reference:#d9730d; --truth:#198754; --bad:#c0392b }
@media(prefers-color-scheme:dark) { :root { --paper:#14171c; --card:#1c2027; --ink:#e8eaee;
  --soft:#9aa4b3; --rule:#2e343e; --policy:#7fb0ff; --reference:#ffad5c; --truth:#5fd09a;
  --bad:#ff8577 } }
:root { color-scheme:light dark }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55
  system-ui,-apple-system,sans-serif; overflow-wrap:break-word }
main { max-width:1120px; margin:0 auto; padding:40px 20px 80px }
h1 { font-size:2.3rem; line-height:1.15; margin:.1em 0; letter-spacing:-.02em }
h2 { font-size:1.25rem; margin:0 0 .6em }
.kicker { color:var(--policy); font-weight:600; margin:0 }
.sub,small { color:var(--soft) }
.lead { font-size:1.08rem }
section { background:var(--card); border:1px solid var(--rule); border-radius:14px; padding:22px
  24px; margin:18px 0 }
section>:last-child { margin-bottom:0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px }
.tile { border:1px solid var(--rule); border-radius:10px; padding:14px 16px; display:flex;
  flex-direction:column; gap:2px }
.tile b { font-size:1.6rem; line-height:1.2; font-variant-numeric:tabular-nums }
.tile i { font-style:normal; font-size:1.1rem; margin-left:.3em }
.ok { color:var(--truth) }
i.bad { color:var(--bad) }
.formula { font-size:1.15rem; text-align:center; margin:1em 0; padding:14px 10px;
  background:var(--paper); border:1px solid var(--rule); border-radius:10px }
.formula sub { font-size:.7em }
.formula span { white-space:nowrap }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));
  gap:22px 26px; align-items:start }
.charts>* { min-width:0 }
.charts div>p:first-child,.charts div>.wide:first-child>table { margin-top:0 }
figure { margin:0 }
.tiles+figure,figure+.wide,.wide+figure { margin-top:22px }
figcaption { display:flex; flex-wrap:wrap; gap:0 16px; font-size:.9rem; margin-bottom:6px }
.key { color:var(--soft); white-space:nowrap }
.key i { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:6px }
svg { width:100%; height:auto; display:block; overflow:visible; font:12px
  system-ui,-apple-system,sans-serif }
text { fill:var(--ink) }
.tick,.label { fill:var(--soft) }
.note { fill:var(--ink); paint-order:stroke; stroke:var(--card); stroke-width:5px;
  stroke-linejoin:round }
.count { font-size:10px; fill:var(--soft) }
.grid { stroke:var(--rule) }
.axis { stroke:var(--soft) }
.level { stroke:var(--soft); stroke-dasharray:5 4 }
.line { fill:none; stroke-width:2.2; stroke-linejoin:round }
.faint { opacity:.25; stroke-width:1 }
.line.policy,.mean.policy { stroke:var(--policy) }
.line.reference,.mean.reference { stroke:var(--reference) }
.line.truth,.mean.truth { stroke:var(--truth) }
.mean { stroke-width:2; stroke-dasharray:2 3 }
.dot.policy,.bar.policy { fill:var(--policy) }
.dot.reference,.bar.reference { fill:var(--reference) }
.dot.truth,.bar.truth { fill:var(--truth) }
i.policy { background:var(--policy) }
i.reference { background:var(--reference) }
i.truth { background:var(--truth) }
.bar { opacity:.6 }
.thin { opacity:.45 }
.tracks { display:grid; grid-template-columns:max-content minmax(60px,1fr) max-content; gap:0 14px;
  align-items:center; font-size:.9rem }
.track { position:relative; height:26px; display:block }
.track u { position:absolute; top:0; bottom:0; width:1px; background:var(--rule) }
.fill { position:absolute; left:0; top:6px; bottom:6px; min-width:2px; border-radius:0 3px 3px 0;
  opacity:.75 }
.mark { position:absolute; top:50%; width:11px; height:11px; margin:-5.5px 0 0 -5.5px;
  border-radius:50% }
.between { position:absolute; top:50%; height:2px; margin-top:-1px; background:var(--soft);
  opacity:.5 }
.value { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap;
  color:var(--soft) }
.ticks { position:relative; height:1.5em; display:block; font-size:.82em; color:var(--soft) }
.ticks span { position:absolute; transform:translateX(-50%); white-space:nowrap }
.wide { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.94rem; margin:.4em 0 }
td,th { padding:5px 12px 5px 0; border-bottom:1px solid var(--rule); text-align:left;
  vertical-align:top }
th { color:var(--soft); font-weight:500 }
th.n { text-align:right }
td.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
tr.dim td { color:var(--soft) }
.samples td { width:36% }
.samples td.q { width:28%; color:var(--soft) }
.score { display:inline-block; min-width:3.5em; text-align:center; border-radius:6px;
  margin-right:.6em; font-size:.85em; font-variant-numeric:tabular-nums; border:1px solid
  currentColor }
.good { color:var(--truth) }
.score.bad { color:var(--bad) }
.middling { color:var(--soft) }
pre { overflow-x:auto; background:var(--paper); border:1px solid var(--rule); border-radius:8px;
  padding:12px; font-size:.85rem }
code { font-size:.9em }
a { color:var(--policy) }
summary { cursor:pointer; color:var(--soft) }
@media(max-width:560px) {
  main { padding:24px 12px 60px } section { padding:16px 14px }
  h1 { font-size:1.7rem } .formula { font-size:.98rem }
  svg { font-size:17px } .count { display:none }
  .tracks { grid-template-columns:1fr max-content } .tracks .name { grid-column:1/-1 }
  .samples,.samples tbody,.samples tr,.samples td { display:block; width:auto }
  .samples tr:first-child { display:none } .samples td { border:0; padding:2px 0 }
  .samples td[data-who]::before { content:attr(data-who) ": "; color:var(--soft); font-size:.85em }
  .samples td.q { width:auto; font-weight:600 }
  .samples tr { border-bottom:1px solid var(--rule); padding:8px 0 }
}
@media print { section { break-inside:avoid } }
"""


def page(*, kicker: str, title: str, subtitle: str, sections: str) -> str:
    """The whole page around ``sections``, which is HTML, as ``subtitle`` is."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(kicker)}: {escape(title)}'
        f'</title><style>{STYLE}</style></head><body><main><header><p class="kicker">'
        f'{escape(kicker)}</p><h1>{escape(title)}</h1><p class="sub">{subtitle}</p></header>'
        f"{sections}</main></body></html>\n"
    )


def section(key: str, title: str, body: str) -> str:
    """A section with its name as an anchor; ``body`` is HTML."""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>'


def tiles(*each: str) -> str:
    """A row of :func:`tile`."""
    return f'<div class="tiles">{"".join(each)}</div>'


def tile(value: str, label: str, note: str = "", passed: bool | None = None) -> str:
    """One number that a reader should leave with, and whether it is what it must be."""
    value = value.replace("-", "−")
    mark = "" if passed is None else '<i class="ok">✓</i>' if passed else '<i class="bad">✗</i>'
    return (
        f'<div class="tile"><b>{escape(value)}{mark}</b><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, dim: Sequence[bool] = ()) -> str:
    """Text cells, the columns behind the first aligned as numbers if ``header`` marks them with a
    leading ``#``; ``dim`` says which rows stand back.
    """
    kinds = [" class=n" if name.startswith("#") else "" for name in header]
    head = "".join(
        f"<th{kind}>{escape(name.lstrip('#'))}</th>"
        for name, kind in zip(header, kinds, strict=True)
    )
    body = []
    for i, row in enumerate(rows):
        css = ' class="dim"' if i < len(dim) and dim[i] else ""
        cells = "".join(
            f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        body.append(f"<tr{css}>{cells}</tr>")
    first = f"<tr>{head}</tr>" if any(name.strip("#") for name in header) else ""
    return f'<div class="wide"><table>{first}{"".join(body)}</table></div>'


def facts(values: Mapping[str, str]) -> str:
    """Names and values, one a line."""
    return table(("", ""), list(values.items()))
