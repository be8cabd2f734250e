"""Names that came from a file are text wherever they are shown: in Markdown, in the report and in pictures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from test_plots import measured
from test_report import log, result

from saezoo.plots import save_plots
from saezoo.report import write_report
from saezoo.tables import to_markdown

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--><script>x</script><!--",
    "]]><script>x</script>",
    "&lt;b&gt;",
    "![x](http://127.0.0.1/x.png)",
    "[x](javascript:alert(1))",
    "`a` | **b**",
    "a\n\n# Heading\n\n<b>",
    "$\\frac{1}{0}$",
    "\\",
]
_MARKUP = re.compile(r"(?<!\\)(?:\\\\)*[<\[`*|&]")


def _foreign(name: str, text: str) -> list[str]:
    """The pieces of `text` in which the letters of `name` stand, in their order, escaped or not."""
    letters = r"\\?".join(re.escape(letter) for letter in " ".join(name.split()))
    return [match[0] for match in re.finditer(r"\\?" + letters, text)]


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_names_as_they_are(name: str) -> None:
    text = to_markdown([replace(result(), collection=name, layer=name, text=name)])
    found = _foreign(name, text)
    assert len(found) >= 3
    assert not [piece for piece in found if _MARKUP.search(piece)]


@pytest.mark.parametrize("name", NAMES)
def test_the_report_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(log(1))
    one = replace(result(), layer=name, text=name, published={**result().published, name: 1.0})
    text = write_report(tmp_path, name, {name: name}, [one]).read_text(encoding="utf-8")
    found = _foreign(name, text)
    assert len(found) >= 6  # title, two cells of the run, text, heading, published metric
    assert not [piece for piece in found if _MARKUP.search(piece)]
    assert text.count("![") - sum(piece.count("![") for piece in found) == 3


def test_pictures_hold_names_as_text(tmp_path: Path) -> None:
    """No element, attribute, link or entity of a name becomes part of an SVG."""
    plain = save_plots([measured(0) for _ in NAMES], tmp_path / "plain")
    results = [replace(measured(0), layer=name, collection=name, text=name) for name in NAMES]
    for path, twin in zip(save_plots(results, tmp_path / "hostile"), plain, strict=True):
        if path.suffix == ".svg":
            root, other = ET.parse(path).getroot(), ET.parse(twin).getroot()
            assert {element.tag for element in root.iter()} == {element.tag for element in other.iter()}
            names = {key for element in root.iter() for key in element.keys()}  # noqa: SIM118 (not a dict)
            assert not [key for key in names if key.startswith("on")]
            assert "<!ENTITY" not in path.read_text(encoding="utf-8")
