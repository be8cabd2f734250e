"""Who may import whom, what is public, and how long things may grow: read from the source, not run."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saezoo

PARTS = ("ablation", "evals", "features", "trainers")
PACKAGE = Path(saezoo.__file__).parent
ROOT = PACKAGE.parent
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.glob("*.py")
}
MODULES |= {f"{part}.{path.stem}": path for part in PARTS for path in (PACKAGE / part).glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LAYERS = [
    "errors",
    "strict_yaml files entries products transfers sae_config pickles spreadsheets",
    "registry lock download screening",
    "hub tokens",
    "weights lm geometric_median results shards sinks checkpoint ranks codes cache",
    "foreign live tables plots",
    "formats",
    "sae",
    "loading activations report",
    "records model_card",
    "trainers evals",
    "features",
    "hooked overlay conversion additions sharing",
    "workflows feature_view",
    "gathered",
    "reproduction verification comparison dashboard terminal",
    "ablation",
    "watching cli_common",
    "cli_evals cli_features cli_training cli_zoo cli_sharing",
    "cli",
    "__main__ __init__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
LINES, FUNCTION_LINES, TRAINING_LOOP_LINES = 420, 60, 100

Function = ast.FunctionDef | ast.AsyncFunctionDef


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of saezoo that `tree` imports anywhere, also inside functions: `trainers.codes`, or `evals.Subject`."""
    packages = ("saezoo", *(f"saezoo.{part}" for part in PARTS))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports confuse the links"
            inside = node.module in packages
            names = [f"{node.module}.{alias.name}" if inside else str(node.module) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("saezoo.") for name in names if name.startswith("saezoo."))


def functions(tree: ast.AST) -> Iterator[tuple[str, Function, bool]]:
    """(name, function, whether it is public) of every function and method that is not inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node.name, node, not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            for name, method, public in functions(node):
                yield f"{node.name}.{name}", method, public and not node.name.startswith("_")


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(RANK)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down(name: str) -> None:
    part = name.split(".")[0]
    for other in imported(TREES[name]):
        theirs = other.split(".")[0]
        own = part == theirs and part in PARTS
        assert own or RANK[theirs] < RANK[part], f"{name} may not import saezoo.{other}"


def test_there_are_no_circles() -> None:
    """Inside ablation/, evals/, features/ and trainers/ the order is free, but there is one."""
    needs = {name: set(imported(tree)) & set(MODULES) for name, tree in TREES.items()}
    assert set(graphlib.TopologicalSorter(needs).static_order()) == set(MODULES)


PAGE = ROOT / "docs" / "architecture.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")
def test_the_page_shows_this_order() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Who may import whom")[1]
    lines = section.split("```")[1].strip().splitlines()
    shown = [re.sub(r"\(.*\)|\|", "", line).split() for line in lines]
    assert [set(names) for names in reversed(shown)] == [set(names.split()) for names in LAYERS[:-1]]


@pytest.mark.skipif(not PAGE.is_file(), reason="not a checkout")
def test_the_page_names_every_module() -> None:
    page = PAGE.read_text(encoding="utf-8").split("## Data flow")[0]
    names = {name.split(".")[-1] for name in MODULES} - {"__init__", "__main__"}
    assert not [name for name in sorted(names) if f"{name}.py`" not in page]


LIGHT = (
    "cli cli_training cli_zoo cli_features cli_sharing model_card __init__ loading hub download lock cache transfers"
)
LIGHT += " registry files results report live sae_config"


@pytest.mark.parametrize("name", LIGHT.split())
def test_torch_is_not_imported_at_the_top(name: str) -> None:
    """`import saezoo` and looking things up take milliseconds."""
    heavy = {"torch", "transformers", "pandas", "numpy", "datasets", "safetensors", "transformer_lens", "rich"}
    top = [node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name if isinstance(node, ast.Import) else str(node.module) for node in top for alias in node.names}
    assert not {found.split(".")[0] for found in names} & heavy


def test_transformer_lens_is_known_to_one_module() -> None:
    knows = [name for name, path in MODULES.items() if "transformer_lens" in path.read_text(encoding="utf-8")]
    assert set(knows) <= {"hooked"}


def test_public_names_are_sorted_complete_and_there() -> None:
    assert saezoo.__all__ == sorted(saezoo.__all__, key=lambda name: (not name.isupper(), name))
    tree = TREES["__init__"]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names - {"annotations", "TYPE_CHECKING", "Any"} == set(saezoo.__all__)
    for name in saezoo.__all__:
        assert getattr(saezoo, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'saezoo' has no attribute 'absent'"):
        saezoo.absent  # noqa: B018


def test_public_names_are_found_by_completion() -> None:
    program = (
        "import saezoo, sys; missing = set(saezoo.__all__) - set(dir(saezoo)); sys.exit(str(missing) if missing else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not (ROOT / "trainers").is_dir(), reason="not a checkout")
@pytest.mark.parametrize("name", ["trainers", "evals", "registry.yaml"])
def test_the_package_links_to_the_top_level(name: str) -> None:
    assert (PACKAGE / name).samefile(ROOT / name)
    assert (PACKAGE / name).is_symlink()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_is_public_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(TREES[name]), f"{name} has no docstring"
    classes = [node for node in TREES[name].body if isinstance(node, ast.ClassDef)]
    lacking = [node.name for node in classes if not node.name.startswith("_") and not ast.get_docstring(node)]
    lacking += [
        found
        for found, function, public in functions(TREES[name])
        if public and not ast.get_docstring(function) and found != "SAE.extra_repr" and not is_property(function)
    ]
    assert lacking == []


def is_property(function: Function) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "property" for node in function.decorator_list)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_grows_too_long(name: str) -> None:
    lines = MODULES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LINES, f"{name} has {lines} lines"
    for found, function, _ in functions(TREES[name]):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        limit = TRAINING_LOOP_LINES if (name, found) == ("trainers.train", "train") else FUNCTION_LINES
        assert length <= limit, f"{name}.{found} has {length} lines"


def test_typed_marker() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.util.find_spec("saezoo.evals") is not None
