"""What ``report.html`` brings along: its style sheet, for light and dark, and the script that sorts tables."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #555; --line: #ddd; --strong: #666;
  --bad: #8a2b00; --warn: #D55E00; --warn-page: #fdf4ee; --fine: #009E73; --fine-page: #eef8f4; --link: #005a8e; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e6e6e6; --soft: #a9adb1; --line: #33383d;
  --strong: #8a8f94; --bad: #ffa27a; --warn-page: #2c2019; --fine-page: #162822; --link: #7cc4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 48rem; } .fineprint { color: var(--soft); font-size: .85rem; }
a { color: var(--link); } nav { font-size: .9rem; } nav summary { font-weight: normal; margin: 0; }
wbr { display: none; } ul { padding-left: 1.5rem; }
.scroll { overflow-x: auto; margin: .3rem 0; } .all { display: none; font-size: .85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--strong); white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.word { text-align: left; white-space: normal; min-width: 7rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.unusable td { color: var(--bad); } tr.dense td { color: var(--soft); }
.box { border-left: 4px solid var(--warn); padding: .2rem .4rem; background: var(--warn-page); max-width: 52rem; }
.box.fine { border-color: var(--fine); background: var(--fine-page); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: .5rem 0; min-width: 0; } figure svg { display: block; max-width: 100%; height: auto; fill: var(--ink);
  stroke-linejoin: round; font-family: inherit; overflow: visible; } .mark:hover { opacity: .7; }
figcaption { font-size: .85rem; color: var(--soft); } summary { cursor: pointer; font-weight: 600; margin: .7rem 0; }
@media (max-width: 46rem) { body { padding: .6rem; } .all { display: block; } th, td { padding: .3rem .3rem; }
  table { font-size: .8rem; } wbr { display: inline; }
  td:first-child { white-space: normal; min-width: 5rem; } .word { min-width: 4.5rem; }
  .columns:not(:has(:checked)) .minor { display: none; } }
"""

# Rows are ordered by what a cell begins with: a number, or the words where a column has any. Cells without a value
# stay at the end and the dense model at the top, whichever way.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = cell => {
    const text = cell.textContent.trim();
    if (!text || text.startsWith("–")) return null;
    if (text === "not finite") return Infinity;
    const found = text.replaceAll(",", "").match(/^[+-]?\\d+(\\.\\d+)?(e[+-]?\\d+)?/i);
    return found ? Number(found[0]) : text;
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map(row => ({ row, first: row.classList.contains("dense"),
      key: value(row.cells[column]), text: row.cells[column].textContent }));
    const words = rows.some(one => typeof one.key === "string");
    rows.sort((a, b) => {
      if (a.first !== b.first) return a.first ? -1 : 1;
      if ((a.key === null) !== (b.key === null)) return a.key === null ? 1 : -1;
      if (a.key === null) return 0;
      const order = words ? a.text.localeCompare(b.text) : a.key === b.key ? 0 : a.key < b.key ? -1 : 1;
      return up ? order : -order;
    });
    body.append(...rows.map(one => one.row));
  }));
}
"""
