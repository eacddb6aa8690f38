"""The frame of report.html: one self-contained page, no link, no script, light and dark."""

from __future__ import annotations

STYLE = """
:root { --paper:#fbfaf8; --card:#fff; --ink:#1d2430; --soft:#5d6675; --rule:#e4e2dd;
  --policy:#2563c9; --reference:#d9730d; --truth:#198754; --bad:#c0392b }
@media(prefers-color-scheme:dark) { :root { --paper:#14171c; --card:#1c2027; --ink:#e8eaee;
  --soft:#9aa4b3; --rule:#2e343e; --policy:#7fb0ff; --reference:#ffad5c; --truth:#5fd09a;
  --bad:#ff8577 } }
:root { color-scheme:light dark }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55
  system-ui,-apple-system,sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 20px 80px }
h1 { font-size:2.3rem; line-height:1.15; margin:.1em 0; letter-spacing:-.02em }
h2 { font-size:1.25rem; margin:0 0 .6em }
.kicker { color:var(--policy); font-weight:600; margin:0 }
.sub,small { color:var(--soft) }
section { background:var(--card); border:1px solid var(--rule); border-radius:14px; padding:22px
  24px; margin:18px 0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px }
.tile { border:1px solid var(--rule); border-radius:10px; padding:14px 16px; display:flex;
  flex-direction:column; gap:2px }
.tile b { font-size:1.6rem; line-height:1.2; font-variant-numeric:tabular-nums }
.tile i { font-style:normal; font-size:1.1rem; margin-left:.3em }
.ok { color:var(--truth) }
i.bad { color:var(--bad) }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));
  gap:18px 26px; align-items:start }
#seconds svg { max-width:640px }
svg { width:100%; height:auto; display:block; font:12px system-ui,-apple-system,
  sans-serif }
text { fill:var(--ink) }
.tick,.note { fill:var(--soft); font-size:11px }
.label { fill:var(--soft) }
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
.bar { opacity:.6 }
.thin { opacity:.45 }
.between { stroke:var(--soft); stroke-width:2; opacity:.5 }
table { border-collapse:collapse; width:100%; font-size:.94rem; margin:.4em 0 }
td,th { padding:5px 12px 5px 0; border-bottom:1px solid var(--rule); text-align:left;
  vertical-align:top }
th { color:var(--soft); font-weight:500 }
th.n { text-align:right }
td.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
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
summary { cursor:pointer; color:var(--soft) }
@media print { section { break-inside:avoid } }
"""


def page(subtitle: str, sections: str) -> str:
    """The whole page around ``sections``; both are HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>dpo_ext demo</title><style>{STYLE}</style></head><body><main>"
        '<header><p class="kicker">dpo_ext demo</p><h1>From preferences to a policy</h1>'
        f'<p class="sub">{subtitle}</p></header>{sections}</main></body></html>\n'
    )
