"""The command line: what it prints where, and every refusal with its message and exit code."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import write_registry

from saezoo.cli import main
from saezoo.entries import Entry
from saezoo.registry import read_registry

ROOT = Path(sys.modules["saezoo"].__file__ or "").parents[1]
FULL = Path("/dev/full")
OPTIONS = {
    "saezoo": "--registry --version",
    "list": "--json",
    "info": "--json",
    "get": "--layout --with-model --mirror --offline",
    "convert": "--to",
    "cache": "",
    "cache ls": "--json",
    "cache verify": "",
    "cache prune": "--older-than --yes",
    "eval": "--tokens --protocol --suite --model --layout --dtype --batch-size --resume --csv --json --append"
    " --markdown --breakdown --densities --plots --text --dataset --device --seed --offline",
    "verify": "--tokens --layout --dtype --batch-size --resume --csv --text --dataset --device --seed --offline",
    "compare": "--tokens --threshold --model --dtype --csv --json --text --dataset --device --seed --offline",
    "reproduce": "--tokens --out --recipe --resume --plan --eval-tokens --product --model-dtype --share --tensorboard"
    " --wandb --text --dataset --device --seed --offline",
    "ablate": "--vary --seeds --out --tokens --recipe --resume --plan --hours --eval-tokens --product --model-dtype"
    " --text --dataset --device --seed --offline",
    "sweep": "--l1 --lr --seeds --out --tokens --recipe --resume --plan --hours --eval-tokens --product --model-dtype"
    " --text --dataset --device --seed --offline",
    "dashboard": "--out --features --batches --neuronpedia --release --evaluate --serve --tokens --model --layout"
    " --dtype --batch-size --resume --text --dataset --device --seed --offline",
    "features": "--csv --sort --top --tokens --model --layout --dtype --batch-size --resume --text --dataset --device"
    " --seed --offline",
    "feature": "--text --corpus --tokens --model --device --seed --offline --resume",
    "cooccur": "--csv --groups --tokens --model --layout --dtype --batch-size --resume --text --dataset --device --seed"
    " --offline",
    "push": "--repo --private --yes --dry-run --mirror",
    "add": "--name --model --licence",
}
ABOUT = "collection layer hook model protocol text context rows tokens documents seed device dtype"
VERSIONS = "torch_version transformers_version saezoo_version python_version"
METRICS = (
    "ce_clean ce_sae ce_zero ce_mean ce_unigram ce_delta ce_score ce_score_mean ce_score_unigram kl_sae kl_zero"
    " kl_score explained_variance explained_variance_uncentred mse cosine norm_in norm_out norm_ratio l0 l1"
    " alive_fraction dead dense_100 dense_10 unseen_density gm_distance_b_dec gm_distance_b_dec_relative"
    " gm_distance_mean gm_distance_mean_relative mean_distance_b_dec gm_spread gm_sample decoder_norm decoder_norm_min"
    " decoder_norm_max encoder_norm encoder_decoder_cosine"
)


def saezoo(*arguments: object) -> Result:
    """In this process; anything but a SaezooError is raised."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saezoo", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, text=True, timeout=60, **options)


def refused(result: Result, code: int) -> str:
    """The one-line message of a run that failed with `code` and printed no data."""
    assert (result.exit_code, result.stdout) == (code, "")
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("Error: ")
    assert not before or before[0].startswith("Usage: ")
    return last.removeprefix("Error: ")


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, which is never filled: all runs are offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SAEZOO_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the tiny model: d_in 16, d_sae 32, rows of 32 tokens."""
    import torch

    from saezoo.sae import SAE
    from saezoo.sae_config import SAEConfig

    random = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 32), "b_enc": (32,), "W_dec": (32, 16), "b_dec": (16,)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    config = SAEConfig(16, 32, "blocks.1.hook_resid_pre", "tiny", 32, True, True, True)
    return SAE(config, tensors).save(tmp_path_factory.mktemp("saes") / "mine")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("<|endoftext|>".join(f"Document {i} says {i * i}. " for i in range(120)))
    return path


@pytest.fixture
def command(sae_folder: Path, tiny_model_folder: Path, text: Path) -> list[object]:
    """A run of `eval` that succeeds."""
    return ["eval", sae_folder, "--model", tiny_model_folder, "--text", text, "--tokens", 512]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_meant(name: str) -> None:
    """A new option needs a line in the documentation, and here."""
    command: click.Command = main
    for word in name.split() if name != "saezoo" else ():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.opts[0] for option in options] == OPTIONS[name].split()
    assert all(option.help or option.name == "protocol" for option in options)
    assert command.help


def test_help_names_every_command() -> None:
    result = saezoo("--help")
    assert (result.exit_code, result.stderr) == (0, "")
    top = [name for name in OPTIONS if " " not in name]
    assert top[1:] == [
        "list",
        "info",
        "get",
        "convert",
        "cache",
        "eval",
        "verify",
        "compare",
        "reproduce",
        "ablate",
        "sweep",
        "dashboard",
        "features",
        "feature",
        "cooccur",
        "push",
        "add",
    ]
    assert set(re.findall(r"^  (\w+)  ", result.stdout, re.MULTILINE)) == set(top) - {"saezoo"}
    assert saezoo("-h").stdout == result.stdout


def test_version() -> None:
    """Also in a checkout that is not installed."""
    result = saezoo("--version")
    assert result.exit_code == 0
    assert "version" in result.stdout


def test_list() -> None:
    result = saezoo("list")
    assert (result.exit_code, result.stderr) == (0, "")
    row = ["gpt2-small-res", "0-11, 11-post", "gpt2-small", "768 x 24,576", "feb2024"]
    assert any([cell.strip() for cell in line.split("│")[1:-1]] == row for line in result.stdout.splitlines())
    assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_list_json_has_every_field_of_every_entry() -> None:
    records = json.loads(saezoo("list", "--json").stdout)
    entries = [entry for entries in read_registry().collections.values() for entry in entries]
    assert all(len(record.pop("sources")) >= 1 for record in records)
    assert [set(record) for record in records] == [{field.name for field in dataclasses.fields(Entry)}] * len(entries)
    assert records == json.loads(json.dumps([dataclasses.asdict(entry) for entry in entries], allow_nan=False))


def test_info() -> None:
    result = saezoo("info", "gpt2-small-res", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    for fact in ("blocks.7.hook_resid_pre", "57.29", "0.9308", "8e-05", "24576", "sha256 unknown", "built-in"):
        assert fact in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_info_and_list_of_what_is_not_known(small_registry: dict[str, Any], tmp_path: Path) -> None:
    small_registry["collections"]["small"] |= dict.fromkeys(["recipe", "context_size", "licence"])
    overlay = write_registry(tmp_path / "mine.yaml", small_registry)
    lines = saezoo("--registry", overlay, "info", "small", 0).stdout.splitlines()
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["recipe", "unknown"] in shown
    assert ["licence", "unknown"] in shown
    assert any("rows of unknown length" in line for line in lines)
    assert "None" not in saezoo("--registry", overlay, "list").stdout


def test_info_json() -> None:
    one = json.loads(saezoo("info", "gpt2-small-res", "11-post", "--json").stdout)
    assert (one["name"], one["hook"]) == ("11-post", "blocks.11.hook_resid_post")
    several = json.loads(saezoo("info", "gpt2-small-res", "0-1,7", "--json").stdout)
    assert [record["layer"] for record in several] == [0, 1, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "no command `lst`; did you mean `list`?"),
        (
            ["zzzz"],
            "no command `zzzz`; commands: list, info, get, convert, cache, eval, verify, compare, reproduce, ablate",
        ),
        (["--registry", "absent.yaml", "list"], "no registry file absent.yaml"),
        (["info", "gpt2-smal-res", "0"], "no collection `gpt2-smal-res`; did you mean `gpt2-small-res`?"),
        (["info", "gpt2-small-res"], "Missing argument 'LAYER'."),
        (["info", "gpt2-small-res", "12"], "`gpt2-small-res` has no layer `12`; known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,"),
        (["get", "gpt2-small-res", "3-0"], "layer range `3-0` runs backwards; write `0-3`"),
        (
            ["get", "gpt2-small-res", "0", "--layout", "x"],
            "gpt2-small-res 0 has no layout `x`; it has: reformatted, or",
        ),
        (["eval", "gpt2-small-res", "0-12"], "`gpt2-small-res` has no layer `12`; known: 0, 1, 2"),
        (["eval", "gpt2-small-res", "0", "--tokens", "0"], "Invalid value for '--tokens': 0 is not in the range x>=1."),
        (["eval", "gpt2-small-res", "0", "--protocol", "x"], "Invalid value for '--protocol': 'x' is not one of"),
        (["eval", "gpt2-small-res", "0", "--device", "tpu9"], "device `tpu9` cannot be used here; "),
        (["eval", "gpt2-small-res", "0", "--dtype", "int8"], "dtype `int8` is not supported; use float32, bfl"),
        (["eval", "gpt2-small-res", "0", "--tokns", "5"], "No such option '--tokns'. Did you mean '--tokens'?"),
        (
            ["eval", "tiny-res", "0", "--dataset", "openwebtext", "--offline"],
            "dataset:openwebtext is streamed from the hub; leave --offline out, or give --text",
        ),
        (["reproduce", "gpt2-small-res", "0", "--offline", "--out", "absent"], "dataset:openwebtext is streamed from"),
        (["reproduce", "gpt2-small-res", "0", "--recipe", "x"], "no recipe `x`; known: feb2024, post"),
        (["reproduce", "gpt2-small-res", "0", "--out", __file__], "Invalid value for '--out': Directory '"),
        (["reproduce", "gpt2-small-res", "0", "--product", "x"], "Invalid value for '--product': 'x' is not one of"),
        (["reproduce", "gpt2-small-res", "0", "--model-dtype", "float16"], "Invalid value for '--model-dtype': 'fl"),
        (["reproduce", "gpt2-small-res", "0", "--share", "x"], "Invalid value for '--share': 'x' is not one of 'entr"),
        (["reproduce", "gpt2-small-res", "0", "--plan", "--offline"], "dataset:openwebtext is streamed from the hub;"),
        (["reproduce", "tiny-res", "0", "--plan", "--tokens", "99"], "99 tokens are fewer than the shuffle buffer's 1"),
    ],
)
def test_requests_that_are_wrong(arguments: list[str], message: str) -> None:
    assert refused(saezoo(*arguments), 2).startswith(message)


def test_the_model_comes_along_if_asked() -> None:
    result = saezoo("get", "tiny-res", 3, "--with-model", "--offline")
    assert [Path(line).name for line in result.stdout.splitlines()] == ["sae_weights.safetensors"]
    assert result.stderr.startswith("tiny-lm  ")


@pytest.mark.parametrize("command", ["get", "eval"])
def test_what_is_not_cached_offline(command: str) -> None:
    message = refused(saezoo(command, "gpt2-small-res", 0, "--offline"), 1)
    assert message.startswith("jbloom/GPT2-Small-SAEs-Reformatted/blocks.0.hook_resid_pre/")
    assert message.endswith("is not in the cache; get it once while online")


def test_a_registry_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\ncolections: {}\n")
    expected = f"{path}:2: unknown key `colections`; did you mean `collections`?"
    assert refused(saezoo("--registry", path, "list"), 1) == expected
    monkeypatch.setenv("SAEZOO_REGISTRY", str(path))
    assert refused(saezoo("list"), 1) == expected


def test_an_overlay_shows_where_it_comes_from(small_registry: dict[str, Any], tmp_path: Path) -> None:
    path = write_registry(tmp_path / "mine.yaml", small_registry)
    result = saezoo("--registry", path, "list", "--json")
    origins = {record["collection"]: record["origin"] for record in json.loads(result.stdout)}
    assert (origins["small"], origins["gpt2-small-res"]) == (str(path), "built-in")
    assert "small " in saezoo("--registry", path, "list").stdout


@pytest.mark.parametrize("name", ["[red]", "a[/b]"])
def test_names_in_a_registry_are_not_markup(small_registry: dict[str, Any], tmp_path: Path, name: str) -> None:
    small_registry["collections"] = {name: small_registry["collections"]["small"] | {"title": f"title {name}"}}
    path = write_registry(tmp_path / "mine.yaml", small_registry)
    assert name in saezoo("--registry", path, "list").stdout
    assert f"title {name}" in saezoo("--registry", path, "info", name, 0).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["info", "gpt2-small-res", "0"]])
def test_looking_things_up_imports_little(arguments: list[str]) -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "from saezoo.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(names), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    allowed = {"saezoo", "click", "rich", "yaml", "_yaml", "cython_runtime", "typing_extensions"}
    assert {name for name in done.stderr.split() if not name.startswith("_cython")} <= allowed


def test_no_colour_codes_when_they_are_unwanted() -> None:
    assert "\x1b" not in process("info", "gpt2-small-res", 0).stdout
    forced = process("info", "gpt2-small-res", 0, env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7]", forced)


def test_module_exit_codes_and_streams() -> None:
    wrong = process("info", "gpt2-small-res", 12)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("Error: `gpt2-small-res` has no layer `12`; ")
    assert len(wrong.stderr.splitlines()) == 1
    assert json.loads(process("info", "gpt2-small-res", 0, "--json").stdout)["layer"] == 0


def test_a_reader_that_stops_early() -> None:
    """`saezoo list --json | head`."""
    command = [sys.executable, "-m", "saezoo", "list", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        assert running.stderr.read() == b""


@pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        done = process(*arguments, stdout=full)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_eval_prints_a_table(command: list[object], sae_folder: Path) -> None:
    result = saezoo(*command)
    assert result.exit_code == 0
    assert "standard protocol" in result.stdout
    assert "some.txt" in result.stdout
    assert result.stderr.strip() == ""
    assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_eval_csv_on_stdout(command: list[object], sae_folder: Path) -> None:
    """The columns are the documented ones, in this order; they only ever grow, at the end."""
    result = saezoo(*command, "--csv", "-")
    (row,) = csv.DictReader(io.StringIO(result.stdout))
    metrics = [f"{name}{suffix}" for name in METRICS.split() for suffix in ("", "_lo", "_hi", "_published")]
    assert list(row) == [*ABOUT.split(), *VERSIONS.split(), *metrics, "density_histogram"]
    assert (row["collection"], row["hook"], row["rows"]) == (str(sae_folder), "blocks.1.hook_resid_pre", "16")
    assert (row["text"], row["context"], row["seed"], row["dtype"]) == ("file:some.txt", "32", "0", "float32")
    assert float(row["ce_sae"]) - float(row["ce_clean"]) == pytest.approx(float(row["ce_delta"]), abs=1e-9)
    assert float(row["ce_delta_lo"]) <= float(row["ce_delta"]) <= float(row["ce_delta_hi"])
    assert row["l0_published"] == ""


def test_too_few_documents_are_said(command: list[object]) -> None:
    result = saezoo(*command[:-1], 64, "--csv", "-")
    assert re.search(r"^no intervals: 64 tokens of \d documents, and they need 10; more --tokens$", result.stderr, re.M)
    (row,) = csv.DictReader(io.StringIO(result.stdout))
    assert (row["ce_delta_lo"], row["ce_delta_hi"]) == ("", "")


def test_eval_json_on_stdout(command: list[object]) -> None:
    (record,) = json.loads(saezoo(*command, "--json").stdout)
    assert record["tokens"] + record["rows"] <= 512
    assert sum(record["density_histogram"]["counts"]) + record["density_histogram"]["never"] == 32
    assert record["l0_published"] is None


def test_eval_to_files(command: list[object], tmp_path: Path) -> None:
    result = saezoo(*command, "--csv", tmp_path / "new" / "a.csv", "--json", tmp_path / "a.json")
    assert "standard protocol" in result.stdout
    assert result.stderr.split() == ["wrote", str(tmp_path / "new" / "a.csv"), "wrote", str(tmp_path / "a.json")]
    (record,) = json.loads((tmp_path / "a.json").read_text())
    (row,) = csv.DictReader(io.StringIO((tmp_path / "new" / "a.csv").read_text()))
    assert float(row["kl_sae"]) == record["kl_sae"]


def test_eval_is_repeatable(command: list[object]) -> None:
    first = saezoo(*command, "--csv", "-").stdout
    assert saezoo(*command, "--csv", "-").stdout == first
    assert saezoo(*command, "--csv", "-", "--batch-size", 3).stdout != ""


def test_eval_by_the_published_protocol(command: list[object], text: Path) -> None:
    text.write_text("<|endoftext|>".join(["One, two, three. " * 70] * 20))
    result = saezoo(*command, "--protocol", "feb2024", "--tokens", 1024)
    assert result.exit_code == 0
    assert "feb2024 protocol · 1,024 tokens" in result.stdout


def test_eval_says_when_text_runs_out(command: list[object]) -> None:
    result = saezoo(*command, "--tokens", 1_000_000)
    assert re.search(r"^file:some.txt gave [\d,]+ of the 1,000,000 tokens asked for$", result.stderr, re.MULTILINE)


def test_output_that_cannot_be_written(command: list[object], text: Path) -> None:
    result = saezoo(*command, "--csv", text / "a.csv")
    assert result.exit_code == 1
    *_, last = result.stderr.splitlines()
    assert re.fullmatch(rf"Error: cannot write {text}/a\.csv: .*; choose a place that can be written", last)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty; give a file with text in it"),
        (b" \n\t\n", " is empty; give a file with text in it"),
        (b"\x89PNG\r\n\xff", " is not UTF-8 text (byte 0); give a text or .jsonl file"),
        (b"text\0text", " is not text: it holds null bytes; give a text or .jsonl file"),
        (b"short", " is shorter than one row of 32 tokens; give more text"),
    ],
    ids=["empty", "blank", "binary", "null bytes", "short"],
)
def test_texts_that_cannot_be_used(command: list[object], text: Path, content: bytes, message: str) -> None:
    text.write_bytes(content)
    found = refused(saezoo(*command), 1)
    assert "some.txt" in found
    assert found.endswith(message)


def test_text_that_is_not_there(command: list[object], tmp_path: Path) -> None:
    assert refused(saezoo(*command, "--text", "absent.txt"), 1) == "no file absent.txt"
    assert refused(saezoo(*command, "--text", tmp_path), 1).startswith(f"{tmp_path} cannot be read: ")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    message = refused(saezoo(*command, "--text", tmp_path / "a.jsonl"), 1)
    assert message == f'{tmp_path}/a.jsonl:2: not a JSON object with a "text" field'


def other(command: list[object], **changes: object) -> list[object]:
    """`command` with another folder, or without or with other values of options."""
    words = [command[0], changes.pop("folder", command[1])]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    options |= {f"--{key}": value for key, value in changes.items()}
    return words + [word for pair in options.items() if pair[1] is not None for word in pair]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model": None}, 2, "reads `tiny`, which the registry does not know; give --model"),
        ({"model": "/no/such/folder"}, 2, "model `/no/such/folder` is neither a folder here nor a hub id like"),
        ({"model": "owner/absent"}, 1, "owner/absent/config.json is not in the cache"),
        ({"dataset": "openwebtext"}, 2, "give --text or --dataset, not both"),
        ({"device": "cuda:99"}, 2, "device `cuda:99` cannot be used here; "),
        ({"device": "meta"}, 2, "device `meta` cannot be used"),
        ({"dtype": "float8_e4m3fn"}, 2, "dtype `float8_e4m3fn` is not supported; use float32, bfloat16"),
        ({"seed": 10**20}, 2, "seed"),
        ({"tokens": 31}, 2, "31"),
        ({"folder": "/no/such/folder"}, 2, "no folder /no/such/folder"),
    ],
)
def test_bad_options_of_eval(command: list[object], changes: dict[str, object], code: int, message: str) -> None:
    assert message in refused(saezoo(*other(command, **changes)), code)


def test_two_kinds_of_data_on_stdout(command: list[object]) -> None:
    """Nobody can read CSV followed by JSON."""
    refused(saezoo(*command, "--csv", "-", "--json", "-"), 2)


@pytest.mark.parametrize("extra", [["7"], ["--layout", "original"]])
def test_a_folder_has_no_layers_or_layouts(command: list[object], extra: list[str]) -> None:
    """What is ignored is refused instead."""
    refused(saezoo(*command[:2], *extra, *command[2:]), 2)


def test_folders_that_hold_no_sae_or_no_model(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(saezoo(*other(command, folder=tmp_path / "empty")), 1)
    assert "empty is not an SAE folder: it holds none of " in message
    message = refused(saezoo(*other(command, model=tmp_path / "empty")), 1)
    assert message.startswith(f"{tmp_path}/empty does not hold a loadable GPT-2 model and tokenizer: ")


def test_an_sae_of_another_model(command: list[object]) -> None:
    golden = Path(__file__).parent / "golden" / "reformatted"
    message = refused(saezoo(*other(command, folder=golden)), 2)
    assert "the SAE reads width 64, the model has 16" in message


def test_a_run_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.csv").write_text("")
    message = refused(saezoo("reproduce", "gpt2-small-res", 0, "--out", tmp_path / "run"), 2)
    assert message == f"{tmp_path}/run is not empty; choose another --out, or --resume the run in it"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["eval.csv"]
