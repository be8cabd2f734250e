"""Every hostile file of `hostile.py` is refused in one printable line, and nothing in it runs or is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from conftest import write_registry
from hostile import Hostile

import saezoo
from saezoo import load, screening, tokens
from saezoo.errors import DownloadError, RegistryError, SaezooError, UsageError, WeightsError
from saezoo.hub import fetch_named_model
from saezoo.lm import load_language_model
from saezoo.pickles import SAFE
from saezoo.registry import read_registry
from saezoo.weights import read_legacy

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = hostile.weights()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which a payload would leave PWNED, and on the import path a module that does so."""
    (tmp_path / "hostile_payload.py").write_text("open('PWNED', 'w').close()\nx = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def opened(path: Path) -> object:
    """What saezoo makes of a file of this name."""
    if path.name == "ae.pt":
        shutil.copy(GOLDEN / "formats" / "dictionary_learning_AutoEncoder" / "config.json", path.parent)
    if path.suffix in (".pt", ".npz"):
        return load(path)
    if ".jsonl" in path.suffixes or path.suffix == ".txt":
        return list(tokens.text_file(path).documents())
    for name in {"sae_weights.safetensors", "cfg.json"} - {path.name}:
        shutil.copy(GOLDEN / "reformatted" / name, path.parent / name)
    return load(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_and_does_nothing(name: str, place: Path) -> None:
    file: Hostile = FILES[name]
    (place / file.name).write_bytes(file.content)
    modules = set(sys.modules)
    with pytest.raises(SaezooError) as caught:
        opened(place / file.name)
    message = str(caught.value)
    assert file.message in message
    assert message.isprintable() and len(message) < 600
    assert not (place / "PWNED").exists()
    assert not {"hostile_payload", "webbrowser", "runpy"} & (set(sys.modules) - modules)


_ALL_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from test_hostile import FILES, GOLDEN, opened
from saezoo.errors import SaezooError
opened(GOLDEN / "legacy.pt")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, file in FILES.items():
    Path(file.name).write_bytes(file.content)
    try:
        opened(Path(file.name).resolve())
        sys.exit(f"{name} was read")
    except SaezooError as error:
        if file.message not in str(error):
            sys.exit(f"{name}: {error}")
    Path(file.name).unlink()  # or two SAEs would lie in one folder
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_all_of_them_in_100_mib(place: Path) -> None:
    """More than the process has once it has read a good file; an allocation that fails would change the message."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", _ALL_IN_LITTLE_MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_payloads_work(place: Path) -> None:
    """Else the tests above could not fail: Python itself, given two of these pickles, is taken over."""
    import pickle

    pickle.loads(hostile._CALLS["os.system"])
    assert (place / "PWNED").exists()
    (place / "PWNED").unlink()
    pickle.loads(hostile._CALLS["__import__"])
    assert (place / "PWNED").exists()
    del sys.modules["hostile_payload"]


def test_the_good_file_of_the_same_make_is_read(place: Path) -> None:
    (place / "sae.pt").write_bytes(hostile.archive(hostile.legacy()))
    assert load(place / "sae.pt").config.d_in == 3
    shutil.copy(GOLDEN / "legacy.pt", place / "sae.pt")
    screening.screen_torch(place / "sae.pt", {"sae_training.config.LanguageModelSAERunnerConfig"})


def test_the_configuration_s_class_must_be_named() -> None:
    with pytest.raises(WeightsError, match=r"would run code when loaded \(sae_training.config"):
        screening.screen_torch(GOLDEN / "legacy.pt")


def test_many_names_are_counted(place: Path) -> None:
    (place / "sae.pt").write_bytes(FILES["pickle: six names"].content)
    with pytest.raises(WeightsError, match=r"\(os.f0, os.f1, os.f2, os.f3, os.f4 and 1 more\); refused, nothing"):
        load(place / "sae.pt")


def test_what_may_be_imported_is_on_torch_s_own_list() -> None:
    """Ours is the shorter one: torch's also has `bytearray`, which allocates what it is told to."""
    theirs = set(torch._weights_only_unpickler._get_allowed_globals())
    assert theirs > SAFE
    assert "builtins.bytearray" in theirs


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_what_torch_writes_passes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tensors, views of one storage, parameters, state dictionaries and plain values."""
    whole = torch.zeros(4, 6, dtype=dtype)
    saved: dict[str, Any] = {"whole": whole, "part": whole[1:3, 2:].T, "empty": whole[:0], "step": 3, "x": [1.5, None]}
    saved["model"] = torch.nn.Linear(3, 4).state_dict()
    saved["parameter"] = torch.nn.Parameter(torch.zeros(2))
    torch.save(saved, tmp_path / "a.pt")
    screening.screen_torch(tmp_path / "a.pt")


def test_what_numpy_writes_passes(tmp_path: Path) -> None:
    import numpy as np

    arrays: dict[str, Any] = {
        "W": np.ones((3, 4), np.float32),
        "b": np.ones(3),
        "n": np.array(7),
        "k": np.zeros((0, 2)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        screening.screen_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("screen", [screening.screen_safetensors, screening.screen_torch, screening.screen_npz])
def test_no_file(tmp_path: Path, screen: Callable[[Path], None]) -> None:
    with pytest.raises(WeightsError, match=f"^no file {tmp_path / 'absent'}$"):
        screen(tmp_path / "absent")
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path))):
        screen(tmp_path)


def test_a_hostile_sparsity(place: Path) -> None:
    (place / "s.pt").write_bytes(FILES["pickle: exec"].content)
    with pytest.raises(WeightsError, match=r"s\.pt would run code when loaded \(builtins.exec\)"):
        read_legacy(GOLDEN / "legacy.pt", place / "s.pt")
    assert not (place / "PWNED").exists()


def _refused(path: Path, content: dict[str, Any]) -> str:
    with pytest.raises(RegistryError) as caught:
        read_registry(write_registry(path, content))
    assert str(caught.value).isprintable()
    assert re.match(rf"{re.escape(str(path))}:\d+: ", str(caught.value))
    return str(caught.value)


PATHS = ["../x", "a/../../x", "/etc/passwd", "\\\\server\\x", "..\\x", "C:x", "a//b", "./x", ""]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("key", ["weights", "config", "sparsity"])
def test_file_names_stay_inside(tmp_path: Path, small_registry: dict[str, Any], key: str, name: str) -> None:
    small_registry["collections"]["small"]["layouts"]["reformatted"][key] = name
    message = _refused(tmp_path / "r.yaml", small_registry)
    assert f"`{key}` must be a file name inside the folder or repository" in message


@pytest.mark.parametrize("where", ["collection", "sae"])
def test_a_hook_leads_nowhere_else(tmp_path: Path, small_registry: dict[str, Any], where: str) -> None:
    collection = small_registry["collections"]["small"]
    (collection if where == "collection" else collection["saes"][1])["hook"] = "../../etc"
    message = _refused(tmp_path / "r.yaml", small_registry)
    assert message.endswith("`hook` must be a file name inside the folder or repository, not `../../etc`")


def test_names_in_a_local_folder_stay_inside_too(tmp_path: Path, small_registry: dict[str, Any]) -> None:
    layout = small_registry["collections"]["small"]["layouts"]["reformatted"]
    del layout["repo"], layout["revision"]
    layout |= {"folder": "/anywhere", "weights": "../w"}
    assert "`weights` must be a file name inside" in _refused(tmp_path / "r.yaml", small_registry)


@pytest.mark.parametrize("repo", ["../x", "/x", "a/b/c", "a b", "a/..", "https://x", "a/b\n"])
def test_repositories_are_hub_ids(tmp_path: Path, small_registry: dict[str, Any], repo: str) -> None:
    small_registry["collections"]["small"]["layouts"]["reformatted"]["repo"] = repo
    assert "`repo` must be a hub id" in _refused(tmp_path / "r.yaml", small_registry)


@pytest.mark.parametrize("revision", ["../../x", "/x", "a b", "refs/../x"])
def test_revisions_are_names(tmp_path: Path, small_registry: dict[str, Any], revision: str) -> None:
    small_registry["collections"]["small"]["layouts"]["reformatted"]["revision"] = revision
    assert "`revision` must be a commit, branch or tag" in _refused(tmp_path / "r.yaml", small_registry)


def test_model_files_stay_inside(tmp_path: Path, small_registry: dict[str, Any]) -> None:
    model = {"architecture": "gpt2", "n_layers": 1, "d_model": 1, "n_positions": 1, "vocab": 1, "licence": "MIT"}
    facts = {"../../x": {"sha256": None, "bytes": None}}
    small_registry["models"] = {"mine": {**model, "source": ["test"], "repo": "a/b", "facts": facts}}
    assert "`facts` must be a file name inside" in _refused(tmp_path / "r.yaml", small_registry)


@pytest.mark.parametrize("name", ["..x/..", "a/..", "-", "a/b.git"])
def test_model_names_that_are_no_hub_ids(name: str) -> None:
    with pytest.raises((UsageError, DownloadError)) as caught:
        fetch_named_model(name, offline=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("letter", ["\x1b", "\x07", "\u202e", "\u200b", "\x85"])
def test_names_hold_no_invisible_letters(tmp_path: Path, small_registry: dict[str, Any], letter: str) -> None:
    small_registry["collections"]["small"]["title"] = f"a{letter}b"
    message = _refused(tmp_path / "r.yaml", small_registry)
    assert f"holds the invisible character U+{ord(letter):04X}; remove it" in message


@pytest.mark.parametrize("key", ["model", "recipe", "dataset"])
def test_names_that_are_not_there_are_told_on_one_line(
    tmp_path: Path, small_registry: dict[str, Any], key: str
) -> None:
    small_registry["collections"]["small"][key] = "a\tb\nc"
    assert "`a b c`" in _refused(tmp_path / "r.yaml", small_registry)


def test_a_registry_of_five_megabytes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# " + "x" * 5_000_000)
    with pytest.raises(RegistryError, match="has more than 4,000,000 bytes, and is no registry"):
        read_registry(tmp_path / "r.yaml")


def test_code_beside_a_model_is_not_run(place: Path, tiny_model_folder: Path) -> None:
    """`auto_map` names a class in a file of the folder; transformers would import it if it were trusted."""
    folder = Path(shutil.copytree(tiny_model_folder, place / "model"))
    shutil.copy(place / "hostile_payload.py", folder / "modeling_hostile.py")
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {cls: "modeling_hostile.x" for cls in classes}
        (folder / name).write_text(json.dumps(content))
    load_language_model(folder)
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "hostile"}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError):
        load_language_model(folder)
    assert not (place / "PWNED").exists()


def test_a_model_s_pickle_is_not_read(place: Path, tiny_model_folder: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, place / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(hostile.archive(hostile._CALLS["exec"]))
    with pytest.raises(WeightsError, match="does not hold a loadable GPT-2 model"):
        load_language_model(folder)
    assert not (place / "PWNED").exists()


def test_code_of_others_is_never_trusted() -> None:
    """The words stand in the sources only as a refusal, and nothing unpickles."""
    package = Path(saezoo.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    trusting = [re.findall(r"trust_remote_code\s*[=:]\s*(\w+)", source) for source in sources.values()]
    assert {word for words in trusting for word in words} == {"False"}
    forbidden = r"pickle\.loads?\(|allow_pickle=True|weights_only=False|yaml\.(?:unsafe_|full_)?load\("
    forbidden += r"|(?<![.\w])(?:eval|exec)\("
    assert not [path for path, source in sources.items() if re.search(forbidden, source)]


def test_the_command_line_prints_one_line(place: Path) -> None:
    (place / "sae.pt").write_bytes(FILES["pickle: os.system"].content)
    command = [sys.executable, "-m", "saezoo", "eval", "sae.pt", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "would run code when loaded (posix.system); refused, nothing was executed" in done.stderr
    assert not (place / "PWNED").exists()


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")
def test_the_page_counts_the_files() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    found = re.search(r"(\d+) hostile files", page)
    assert found is not None and int(found[1]) == len(FILES) + len(list(GOLDEN.glob("malicious*.pt")))
