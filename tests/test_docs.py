"""The pages in docs/: the tutorial runs as printed, the references name everything that there is.

`python tests/test_docs.py --update` runs the tutorial and writes its outputs and figures anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import os
import re
import shutil
import sys
import tempfile
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saezoo import Entry, load, read_registry, registry, tokens
from saezoo.evals import Subject, evaluate
from saezoo.evals.metrics import METRICS
from saezoo.lm import LanguageModel
from saezoo.results import Result
from saezoo.sae import SAE
from saezoo.sae_config import SAEConfig

DOCS = Path(__file__).parents[1] / "docs"
TUTORIAL = DOCS / "tutorial.md"
NAMES = {'"gpt2-small-res", 8': '"tiny-res", 2', '"gpt2-small"': '"tiny-lm"', "h[8]": "h[2]", "states[8]": "states[2]"}
"""What the blocks for GPT-2 small say instead."""
_BLOCK = re.compile(r"^```(\S+)( no-run)?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")  # not the digit of a name such as L0 or blocks.2


class Block(NamedTuple):
    """A fenced block of a page, and the `text` block that follows it."""

    language: str
    runs: bool
    code: str
    output: str
    line: int
    """Of its first line in the page."""
    start: int
    end: int
    """Where code and output lie in the page's text."""


def blocks_of(page: str, language: str = "python") -> list[Block]:
    """The blocks of `page` in that language, in order."""
    found = []
    for match in _BLOCK.finditer(page):
        line = page.count("\n", 0, match.start()) + 2
        block = Block(match[1], not match[2], match[3], match[4] or "", line, match.start(), match.end())
        if block.language == language:
            found.append(block)
    return found


def run(blocks: list[Block], folder: Path) -> list[str]:
    """What each block prints, all executed in one namespace, in `folder`. Tracebacks name the line of the page."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    outputs = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * (block.line - 1) + block.code, str(TUTORIAL), "exec"), namespace)
            outputs.append("".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines()))
    finally:
        os.chdir(before)
        plt.close("all")
    return outputs


def same(printed: str, shown: str) -> bool:
    """Equal words, and numbers that differ by no more than machines and library versions make them."""
    if _NUMBER.sub("#", printed).split() != _NUMBER.sub("#", shown).split():
        return False
    return all(map(_close, _NUMBER.findall(printed), _NUMBER.findall(shown)))


def _close(a: str, b: str) -> bool:
    """Within 1 %, or within 2 in the last place."""
    last_place = 10.0 ** -len(b.partition(".")[2])
    x, y = (float(number.replace(",", "")) for number in (a, b))
    return math.isclose(x, y, rel_tol=0.01, abs_tol=2.1 * last_place)


def tutorial_blocks() -> list[Block]:
    return blocks_of(TUTORIAL.read_text(encoding="utf-8"))


def figures() -> list[str]:
    return re.findall(r"\]\(figures/(.*?)\)", TUTORIAL.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tutorial's outputs; its figures lie in the working folder."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("tutorial")
    outputs = run([block for block in tutorial_blocks() if block.runs], folder)
    assert {path.name for path in folder.iterdir()} == set(figures())
    return outputs


def test_the_tutorial_prints_what_it_shows(printed: list[str]) -> None:
    if read_registry().find("tiny-res", 2)[0].origin != "built-in":
        pytest.skip("it ran, but the page shows the bundled SAEs, not those of the overlay in SAEZOO_REGISTRY")
    shown = [block.output for block in tutorial_blocks() if block.runs]
    differing = [f"page:\n{b}run:\n{a}" for a, b in zip(printed, shown, strict=True) if not same(a, b)]
    assert not differing, "python tests/test_docs.py --update rewrites the page\n" + "\n".join(differing)


def test_blocks_for_gpt2_small_differ_only_in_names() -> None:
    blocks = tutorial_blocks()
    tiny = {block.code for block in blocks if block.runs}
    big = [block.code for block in blocks if not block.runs]
    assert big
    for code in big:
        for theirs, ours in NAMES.items():
            code = code.replace(theirs, ours)
        assert code in tiny


def test_every_tutorial_figure_is_there() -> None:
    for name in figures():
        assert (DOCS / "figures" / name).is_file(), f"python tests/test_docs.py --update makes {name}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "printed, shown, expected",
    [
        ("L0 61.20\n", "L0 61.21\n", True),
        ("L0  61.2 of 2,048\n", "L0 61.2 of 2,048\n", True),
        ("L0 61.2\n", "L0 64.2\n", False),
        ("p 0.0041\n", "p 0.0043\n", True),
        ("p 0.0041\n", "p 0.0049\n", False),
        ("L0 61.2\n", "L1 61.2\n", False),
        ("same: True\n", "same: False\n", False),
    ],
)
def test_outputs_are_compared_with_tolerance(printed: str, shown: str, expected: bool) -> None:
    assert same(printed, shown) is expected


def small_sae(d_in: int, d_sae: int, hook: str) -> SAE:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return SAE(SAEConfig(d_in, d_sae, hook, "tiny-lm", 8, True, True, True), tensors)


@pytest.fixture(scope="module")
def result() -> Result:
    """An evaluation of random weights: all columns, no sense."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
    lm = LanguageModel(GPT2LMHeadModel(config), SimpleNamespace(all_special_ids=[0]))
    documents = ([1 + (i + j) % 15 for j in range(9)] for i in range(40))
    rows = tokens.concatenate(list(tokens.pack(documents, bos=0, context=8)))
    return evaluate([Subject(small_sae(8, 12, "blocks.0.hook_resid_pre"), "c", "0")], lm, rows)[0]


def test_every_column_is_documented(result: Result) -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    columns = set(result.flat())
    bases = {re.sub("_(lo|hi|published)$", "", column) for column in columns}
    assert bases <= columns
    assert not [name for name in bases if f"`{name}`" not in page]
    assert all(f"`{suffix}`" in page for suffix in ("_lo", "_hi", "_published"))


def test_every_metric_is_documented() -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert not [metric.name for metric in METRICS if f"`{metric.name}`" not in page]


def test_metrics_page_names_no_column_that_is_not_there(result: Result) -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    headings = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(headings) <= set(result.flat())


def records(kind: Any) -> set[Any]:
    """The dataclasses that the type `kind` is made of."""
    found = {kind} if dataclasses.is_dataclass(kind) else set()
    parts = typing.get_type_hints(kind).values() if found else typing.get_args(kind)
    return found.union(*map(records, parts))


RECORDS = sorted(records(registry._File) | records(Entry), key=lambda cls: cls.__name__)


def test_the_registry_is_made_of_known_records() -> None:
    names = ["Dataset", "Entry", "FileFacts", "Layout", "Model", "Published", "Recipe", "_Collection", "_File", "_Sae"]
    assert [cls.__name__ for cls in RECORDS] == names


@pytest.mark.parametrize("cls", RECORDS)
def test_every_registry_key_is_documented(cls: Any) -> None:
    page = (DOCS / "registry.md").read_text(encoding="utf-8")
    assert not [field.name for field in dataclasses.fields(cls) if f"`{field.name}`" not in page]


RECIPES = ["feb2024", "post", "standard"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_value_is_documented(name: str) -> None:
    section = (DOCS / "registry.md").read_text(encoding="utf-8").split("\n## Recipes\n")[1]
    recipe = dataclasses.asdict(read_registry().recipes[name])
    del recipe["source"]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    shown = {key: cells.split(" | ")[RECIPES.index(name)].strip() for key, cells in rows if key in recipe}
    assert shown.keys() == recipe.keys()
    for key, value in recipe.items():
        assert type(value)(shown[key]) == value, key


def test_the_example_overlay_works(tmp_path: Path) -> None:
    [example] = blocks_of((DOCS / "registry.md").read_text(encoding="utf-8"), "yaml")[:1]
    path = tmp_path / "my-registry.yaml"
    path.write_text(example.code, encoding="utf-8")
    entries = read_registry(path).find("my-saes", "all")
    assert [entry.name for entry in entries] == ["1", "2"]
    assert [entry.name for entry in read_registry(path).find("my-saes", "1,2-wide")] == ["1", "2-wide"]
    for entry in read_registry(path).collections["my-saes"]:
        sae = small_sae(entry.d_in, entry.d_sae, entry.hook)
        sae.save(tmp_path / "saes" / entry.hook)
        assert load("my-saes", entry.name, registry=path).config.hook == entry.hook


def update() -> None:
    """Run the tutorial and write its outputs and figures into docs/."""
    page = TUTORIAL.read_text(encoding="utf-8")
    blocks = [block for block in blocks_of(page) if block.runs]
    with tempfile.TemporaryDirectory() as folder:
        outputs = run(blocks, Path(folder))
        (DOCS / "figures").mkdir(exist_ok=True)
        for name in figures():
            shutil.copy(Path(folder) / name, DOCS / "figures" / name)
    for block, output in reversed(list(zip(blocks, outputs, strict=True))):
        text = f"```python\n{block.code}```\n" + (f"\n```text\n{output}```\n" if output else "")
        page = page[: block.start] + text + page[block.end :]
    TUTORIAL.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", required=True, help="rewrite the tutorial's outputs")
    parser.parse_args()
    update()
    sys.exit()
