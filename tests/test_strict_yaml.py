"""strict_yaml on small dataclasses: what it reads, and each refusal with its file, line, place and remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saezoo import strict_yaml
from saezoo.errors import RegistryError


@dataclass(frozen=True)
class Leaf:
    line: int
    rate: float
    steps: int = 1
    on: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be 1 or more, not {self.steps}")


@dataclass(frozen=True)
class Tree:
    version: int
    kind: Literal["oak", "fir"] = "oak"
    tags: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)


def read(folder: Path, text: str) -> Tree:
    path = folder / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    return strict_yaml.read(path, Tree, label="tree.yaml")


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RegistryError) as caught:
        read(folder, text)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_everything_of_its_type(tmp_path: Path) -> None:
    text = """
version: 1
kind: fir
tags: [a, 'null', "8e-5"]
notes: {1: yes, x: 0x1}
leaves:
  - {rate: 8e-5, steps: 5000}
  - rate: 1
    on: true
    name: ~
by_name: {b: {rate: .5, name: '~'}}
"""
    assert read(tmp_path, text) == Tree(
        version=1,
        kind="fir",
        tags=("a", "null", "8e-5"),
        notes={"1": "yes", "x": "0x1"},
        leaves=(Leaf(7, 8e-5, steps=5000), Leaf(8, 1.0, on=True)),
        by_name={"b": Leaf(11, 0.5, name="~")},
    )


@pytest.mark.parametrize("text", ["8e-5", "8.0e-5", "0.00008", "8E-05", "+8e-5"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads the first of them as a string."""
    assert read(tmp_path, f"version: 1\nleaves: [{{rate: {text}}}]").leaves[0].rate == 8e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nkinds: oak", "2: unknown key `kinds`; did you mean `kind`?"),
        ("version: 1\nzzz: 1", "2: unknown key `zzz`; known keys: version, kind, tags, notes, leaves, by_name"),
        ("version: 1\nleaves:\n- rate: 1\n  step: 2", "4: leaves[0]: unknown key `step`; did you mean `steps`?"),
        ("kind: oak", "1: missing key `version`; add it"),
        ("version: 1\nleaves:\n- {rate: 1}\n- {on: true}", "4: leaves[1]: missing key `rate`; add it"),
        ("version: 1\nversion: 1", "2: `version` is given twice (first on line 1); remove one"),
        ("version: 1\nnotes:\n  a: b\n  a: c", "4: notes: `a` is given twice (first on line 3); remove one"),
        ("version: one", "1: version: must be a whole number, not `one`"),
        ("version: 9223372036854775808", "1: version: must be a whole number, not `9223372036854775808`"),
        ("version: " + "9" * 5000, "1: version: must be a whole number, not `999"),
        ('version: 1\nkind: "a\\e[2J"', "2: kind: holds the invisible character U+001B; remove it"),
        ('version: 1\n"a\\u202Eb": 1', "2: holds the invisible character U+202E; remove it"),
        ("version: &a 1\nkind: *a", "2: YAML alias `*a` is not allowed; write the value out"),
        ("version: 1.5", "1: version: must be a whole number, not `1.5`"),
        ("version: null", "1: version: must be a whole number; null is not allowed here"),
        ("version:", "1: version: must be a whole number; null is not allowed here"),
        ("version: [1]", "1: version: must be a whole number, not a list or mapping"),
        ("version: 1\nkind: elm", "2: kind: must be one of oak, fir, not `elm`"),
        ("version: 1\ntags: a", "2: tags: must be a list"),
        ("version: 1\ntags: [[a]]", "2: tags[0]: must be text, not a list or mapping"),
        ("version: 1\nnotes: [a]", "2: notes: must be a mapping (`key: value` lines)"),
        ("version: 1\nby_name:\n  a:\n    rate: fast", "4: by_name.a.rate: must be a number, not `fast`"),
        ("version: 1\nleaves: [{rate: 1, on: yes}]", "2: leaves[0].on: must be true or false, not `yes`"),
        ("version: 1\nleaves: [{rate: 1, steps: 0}]", "2: leaves[0]: `steps` must be 1 or more, not 0"),
        ("version: 1\nleaves: [{rate: 1, line: 3}]", "2: leaves[0]: unknown key `line`"),
        ("version: 1\n? [a]\n: b", "2: keys must be plain words"),
        ("version: 1\n<<: {kind: oak}", "2: unknown key `<<`"),
        ("- 1", "1: must be a mapping (`key: value` lines)"),
        ("", "1: the file is empty; it needs at least `version: 1`"),
        ("# only a comment\n", "1: the file is empty; it needs at least `version: 1`"),
        ("version: 1\n\tkind: oak", "2: not valid YAML: found character '\\t' that cannot start any token"),
        ("version: 1\ntags: [a", "2: not valid YAML: "),
        ("version: 1\n---\nversion: 1", "2: not valid YAML: but found another document"),
        ("version: 1\nkind: \0", "2: not valid YAML: unacceptable character #x0000"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(f"tree.yaml:{message}")


def test_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    laughs = "\n".join(f"  l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))
    message = refusal(tmp_path, f"version: 1\nnotes:\n  l0: &l0 ha\n{laughs}\n")
    assert message == "tree.yaml:4: YAML alias `*l0` is not allowed; write the value out"


def test_messages_are_short(tmp_path: Path) -> None:
    """However long the text is that they are about."""
    assert len(refusal(tmp_path, f"version: 1\nkind: {'x' * 100_000}")) < 1100
    assert len(refusal(tmp_path, f"version: 1\n{'x' * 900}: 1")) < 1100


def test_a_file_of_five_megabytes(tmp_path: Path) -> None:
    message = refusal(tmp_path, "#" * 5_000_000)
    assert message == "tree.yaml: has more than 4,000,000 bytes, and is no registry"


@pytest.mark.parametrize("tag", ["!!python/name:os.getcwd", "!!python/object/apply:os.getcwd", "!mine", "!!binary"])
def test_tags_are_refused(tmp_path: Path, tag: str) -> None:
    """Nothing reads them: a value with one is not what its author meant."""
    assert refusal(tmp_path, f"version: 1\nkind: {tag} fir").startswith("tree.yaml:2: YAML tag `")


def test_python_objects_are_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(tmp_path, "version: !!python/object/apply:pathlib.Path.touch\n- !!python/object/apply:pathlib.Path [PWNED]")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("number", [".nan", "nan", ".inf", "inf", "-inf", "1e999"])
def test_numbers_are_finite(tmp_path: Path, number: str) -> None:
    """Unknown is null; NaN would also make `--json` invalid."""
    message = refusal(tmp_path, f"version: 1\nleaves: [{{rate: {number}}}]")
    assert message == f"tree.yaml:2: leaves[0].rate: must be a number, not `{number}`"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(RegistryError) as caught:
            strict_yaml.read(path, Tree)
        assert str(caught.value).startswith(f"{path}: cannot be read as text: ")
    (tmp_path / "binary.yaml").write_bytes(b"version: \xff\xfe")
    with pytest.raises(RegistryError, match=r"binary\.yaml: cannot be read as text: 'utf-8' codec can't decode"):
        strict_yaml.read(tmp_path / "binary.yaml", Tree)


@pytest.mark.parametrize(
    "text",
    [
        'version: "\\UFFFFFFFF"',
        "%YAML 1." + "9" * 5000 + "\n---\nversion: 1",
        "[" * 3000 + "]" * 3000,
        "{a: " * 3000 + "}" * 3000,
        'version: 1\nkind: "\\uD800"',
        'version: "a\\nb"',
        'version: "a\\rb\\u2028c"',
    ],
    ids=["escape", "directive", "deep list", "deep mapping", "surrogate", "newline", "other newlines"],
)
def test_hostile_text_is_one_printable_line(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text).encode("utf-8")


_WORDS = [
    "version",
    "kind",
    "leaves",
    "rate",
    "1",
    "8e-5",
    "null",
    "oak",
    ":",
    "-",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "  ",
]
_MARKS = [
    ": ",
    "- ",
    "&a",
    "*a",
    "!!",
    "!",
    "|",
    ">",
    "%",
    '"',
    "'",
    "?",
    "#",
    "\t",
    "---",
    "...",
    "\\u",
    "\\U",
    "~",
    "@",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(_WORDS + _MARKS)).map("".join)))
@example("version: 1")
@settings(deadline=None)
def test_no_text_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(strict_yaml.read(path, Tree), Tree)
    except RegistryError as error:
        assert len(str(error).splitlines()) == 1
