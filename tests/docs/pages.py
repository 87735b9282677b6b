"""The documentation as data: its fenced blocks, its links, the names it mentions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
_FENCE = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    ``file`` is the name it is stored under for the commands of its page; ``options`` are ``exit=78`` (how a command
    ends) and ``ranks=2`` (how many processes run the page's Python, or the world that a configuration is checked for).
    """

    language: str
    info: str
    text: str
    place: str

    @property
    def options(self) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", self.info)}

    @property
    def file(self) -> str | None:
        found = re.search(r"[\w-]+\.\w+", self.info)
        return found[0] if found else None


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    return [
        Block(found[1], found[2], found[3], f"{path.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 1}")
        for found in _FENCE.finditer(text)
    ]


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


def links(path: Path) -> list[str]:
    return [link for link in _LINK.findall(prose(path)) if "://" not in link]


def inline_code(path: Path) -> list[str]:
    return _INLINE.findall(prose(path))


def anchors(path: Path) -> set[str]:
    """Return what GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
