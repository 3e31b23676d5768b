"""A matrix as CSV, as JSON lines, and as a page that needs no server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Final, TextIO

from pdp.canonical import JsonObject
from pdp.policy.analysis.evaluator import Answer
from pdp.policy.analysis.matrix import Cell
from pdp.policy.analysis.questions import MADE
from pdp.policy.analysis.spreadsheet import write_csv

COLUMNS: Final = (
    "tenant",
    "role",
    "tool",
    "case",
    "decision",
    "reason_code",
    "scopes",
    "charges",
    "ttl_seconds",
    "binds",
    "max_uses",
)


def answer_json(answer: Answer) -> JsonObject:
    """A decision as JSON; what a denial does not have is left out."""
    found: JsonObject = {"allow": answer.allow, "reason_code": answer.reason_code}
    if answer.allow:
        found["scopes"] = list(answer.scopes)
        found["charges"] = [
            {"budget": charge.budget, "unit": charge.unit, "amount": charge.amount}
            for charge in answer.charges
        ]
        found["ttl_seconds"] = answer.ttl_seconds
        found["binds"] = ["tool", "arguments"] if answer.binds_arguments else ["tool"]
        found["max_uses"] = answer.max_uses
    return found


def allowed_text(answer: Answer) -> str:
    """What is allowed, in a few words: what a call would charge, and what its permit is for
    beyond it; empty where there is nothing to tell.
    """
    return "; ".join(filter(None, (charges_text(answer), permit_text(answer))))


def permit_text(answer: Answer) -> str:
    """What a permit is for beyond the one call with its arguments; empty for nothing."""
    if answer.binds_arguments:
        return ""
    calls = "1 call" if answer.max_uses == 1 else f"{answer.max_uses} calls"
    return f"{calls} with any arguments"


def charges_text(answer: Answer) -> str:
    """What a call would charge, in a few words."""
    return ", ".join(f"{each.budget} {each.amount} {each.unit}" for each in answer.charges)


def binds_text(answer: Answer) -> str:
    """What a permit is for."""
    return "tool arguments" if answer.binds_arguments else "tool"


def call_text(tool: str, case: str) -> str:
    """A tool and its case, which is named where it was not made."""
    return tool if case == MADE else f"{tool} ({case})"


def write_matrix_csv(out: TextIO, cells: Iterable[Cell]) -> None:
    """One row a decision."""
    write_csv(
        out,
        COLUMNS,
        (
            (
                cell.tenant,
                cell.role,
                cell.tool,
                cell.case,
                "allow" if cell.answer.allow else "deny",
                cell.answer.reason_code,
                " ".join(cell.answer.scopes),
                charges_text(cell.answer),
                "" if cell.answer.ttl_seconds is None else str(cell.answer.ttl_seconds),
                binds_text(cell.answer) if cell.answer.allow else "",
                str(cell.answer.max_uses) if cell.answer.allow else "",
            )
            for cell in cells
        ),
    )


def write_matrix_json(out: TextIO, cells: Iterable[Cell]) -> None:
    """One object a line."""
    for cell in cells:
        row = {"tenant": cell.tenant, "role": cell.role, "tool": cell.tool, "case": cell.case}
        out.write(json.dumps({**row, **answer_json(cell.answer)}) + "\n")


def write_matrix_page(out: TextIO, cells: Iterable[Cell], *, revision: str) -> None:
    """One HTML page without anything from elsewhere. It reads and prints without its
    script, which filters; its policy (CSP) lets no other script run.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    out.write(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Who may do what: {escape(revision)}</title>
<style>{_STYLE}</style></head><body>
<h1>Who may do what</h1>
<p>Policy revision <code>{escape(revision)}</code>. A cell says what a call of the tool is
answered for an actor of the tenant with that one role: <span class="a">allow</span>, with what
it charges and whether its permit is for more than the call, or the reason code of the denial.</p>
<form id="filter">
<label>Tenant <input name="tenant" autocomplete="off"></label>
<label>Role <input name="role" autocomplete="off"></label>
<label>Tool <input name="tool" autocomplete="off"></label>
<label>Decision <select name="decision"><option value="">any</option>
<option value="a">allow</option><option value="d">deny</option></select></label>
<output></output>
</form>
"""
    )
    for tenant, of_tenant in groupby(cells, key=lambda cell: cell.tenant):
        out.writelines(_section(tenant, list(of_tenant)))
    out.write(f"<script>{_SCRIPT}</script>\n</body></html>\n")


def _section(tenant: str, cells: list[Cell]) -> Iterator[str]:
    roles = list(dict.fromkeys(cell.role for cell in cells))
    yield f'<section data-tenant="{escape(tenant)}"><h2>{escape(tenant)}</h2>\n<table><thead><tr>'
    yield '<th scope="col">tool</th>'
    yield "".join(
        f'<th scope="col" data-role="{escape(role)}">{escape(role or "(no role)")}</th>'
        for role in roles
    )
    yield "</tr></thead><tbody>\n"
    for (tool, case), of_call in groupby(cells, key=lambda cell: (cell.tool, cell.case)):
        answers = {cell.role: cell.answer for cell in of_call}
        yield f'<tr data-tool="{escape(tool)}"><th scope="row">{escape(call_text(tool, case))}</th>'
        yield "".join(_cell(answers[role]) if role in answers else "<td></td>" for role in roles)
        yield "</tr>\n"
    yield "</tbody></table></section>\n"


def _cell(answer: Answer) -> str:
    if not answer.allow:
        return f"<td>{escape(answer.reason_code)}</td>"
    told = allowed_text(answer)
    return f'<td class="a">allow{f" <small>{escape(told)}</small>" if told else ""}</td>'


_STYLE: Final = """
:root{color-scheme:light dark}
body{font:14px/1.4 system-ui,sans-serif;margin:1.5rem}
form{position:sticky;top:0;background:Canvas;padding:.5rem 0;display:flex;gap:1rem;flex-wrap:wrap}
section{content-visibility:auto;contain-intrinsic-size:auto 300px}
h2{font-size:1rem;margin:1rem 0 .25rem;overflow-wrap:anywhere}
table{border-collapse:collapse}
th,td{border:1px solid #8886;padding:.15rem .5rem;text-align:left;font-weight:normal}
thead th{font-weight:bold}
td{color:#b3261e}
.a{color:#146c2e;font-weight:bold}
small{color:GrayText;font-weight:normal}
@media (prefers-color-scheme:dark){td{color:#f2b8b5}.a{color:#8fd8a0}}
@media print{form{display:none}section{content-visibility:visible;break-inside:avoid}}
"""

_SCRIPT: Final = """
"use strict";
const form = document.getElementById("filter");
const sections = [...document.querySelectorAll("section")];
function apply() {
  const wanted = Object.fromEntries(
    [...new FormData(form)].map(([name, text]) => [name, text.trim().toLowerCase()]));
  const has = (text, part) => text.toLowerCase().includes(part);
  let shown = 0;
  for (const section of sections) {
    let any = false;
    if (has(section.dataset.tenant, wanted.tenant)) {
      const heads = [...section.querySelectorAll("thead th")];
      const columns = heads.map((head, at) => at === 0 || has(head.dataset.role, wanted.role));
      heads.forEach((head, at) => { head.hidden = !columns[at]; });
      for (const row of section.querySelectorAll("tbody tr")) {
        let found = false;
        [...row.cells].forEach((cell, at) => {
          cell.hidden = !columns[at];
          const decision = cell.className === "a" ? "a" : "d";
          if (at > 0 && columns[at] && (!wanted.decision || decision === wanted.decision)) {
            found = true;
          }
        });
        row.hidden = !(found && has(row.dataset.tool, wanted.tool));
        any = any || !row.hidden;
      }
    }
    section.hidden = !any;
    shown += any ? 1 : 0;
  }
  form.querySelector("output").textContent = shown + " of " + sections.length + " tenants";
}
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
apply();
"""
