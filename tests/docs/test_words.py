"""The sentences of code and documentation keep to standard terms (CONTRIBUTING.md, "Style of sentences")."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

PLACES = ("veomni", "strategies", "accelerators", "examples", "docs", "configs", "README.md", "CHANGELOG.md")
KINDS = (".py", ".md", ".yaml")
DIALECT = re.compile(
    r"\b(nobody|whoever|anew|dearest|mend(s|ed|ing)?|told|(?<!\.)tells?|telling|hears?|heard|cargo|depart(s|ed)?|come_home|"
    r"drained|by (itself|themselves)|(is|are|was|were) learned|at its word|goes before it|go(es|ing)? on|went on|"
    r"refuses?|refused|refusal)\b"
    r"|\b_?refuse_\w+",
    re.IGNORECASE,
)


def test_no_word_of_the_list_is_left():
    found = []
    for place in PLACES:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*.*") if p.suffix in KINDS)
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if DIALECT.search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
