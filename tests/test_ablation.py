"""`saezoo ablate` and `sweep`, as a user runs them: what they leave, the same bits however they are run, refusals."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import write_registry
from smallrun import COLLECTION, registry, start, write_overlay, write_text

from saezoo.ablation.study import METRICS, disk_of, plan_study
from saezoo.cli import main
from saezoo.workflows import Options

VARY = ["--vary", "ghost=off,fixed", "--vary", "b_dec=zero,mean", "--seeds", "2"]
CELLS = [f"ghost-{g},b_dec-{b},seed-{s}" for s in (0, 1) for g in ("off", "fixed") for b in ("zero", "mean")]
ROOT = Path(sys.modules["saezoo"].__file__ or "").parents[1]


def words(folder: Path, *more: object, command: str = "ablate", layers: str = "all", out: str = "study") -> list[str]:
    """Of `saezoo`, for the grid of `more` on the two small SAEs, in `folder` with what it needs."""
    given = ["--registry", folder / "overlay.yaml", command, "small", layers, "--out", folder / out]
    return [str(word) for word in (*given, "--text", folder / "text.txt", "--eval-tokens", 512, *more)]


def run(folder: Path, *more: object, **how: str) -> Result:
    return CliRunner().invoke(main, words(folder, *more, **how))


def weights(study: Path) -> dict[str, bytes]:
    """Of every SAE of every complete cell."""
    return {str(path.relative_to(study)): path.read_bytes() for path in study.glob("cells/*/*/sae_weights.safetensors")}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Path:
    write_overlay(tmp_path, tiny_model_folder)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("finished")
    write_overlay(folder, tiny_model_folder)
    write_text(folder)
    result = run(folder, *VARY)
    assert result.exit_code == 0, result.output
    return folder / "study", result


def test_what_a_study_leaves(finished: tuple[Path, Result]) -> None:
    study, result = finished
    assert sorted(path.name for path in (study / "cells").iterdir()) == sorted(CELLS)
    pictures = [f"{name}.{kind}" for name in ("dead", "density", "frontier") for kind in ("png", "svg")]
    files = [".lock", "cells", "effects.csv", "report.md", "results.csv", "study.json", "variants.csv", *pictures]
    assert sorted(path.name for path in study.iterdir()) == sorted(files)
    assert result.stdout.endswith(f"{study}\n") and "b_dec=zero" in result.stdout
    assert "100" not in result.stderr and f"report: {study / 'report.md'}" in result.stderr


def test_the_tables_are_those_of_the_cells(finished: tuple[Path, Result]) -> None:
    """Each number of results.csv is in the eval.csv of its cell; means and differences follow from them."""
    study, _ = finished
    found = rows(study / "results.csv")
    assert len(found) == len(CELLS) * 2
    for row in found:
        cell = study / "cells" / f"ghost-{row['ghost']},b_dec-{row['b_dec']},seed-{row['seed']}"
        (own,) = [line for line in rows(cell / "eval.csv") if line["layer"] == row["layer"]]
        assert all(row[name] == own[name] for name in ("ce_delta", "l0", "mse", "gm_distance_b_dec"))
        assert float(row["dead_at_end"]) == float(
            [x for x in rows(cell / "log.csv") if x["layer"] == row["layer"]][-1]["dead"]
        )
    one = [r for r in found if (r["ghost"], r["b_dec"], r["layer"]) == ("off", "mean", "1")]
    (mean,) = [
        row
        for row in rows(study / "variants.csv")
        if (row["ghost"], row["b_dec"], row["layer"], row["metric"]) == ("off", "mean", "1", "l0")
    ]
    assert float(mean["mean"]) == pytest.approx(sum(float(r["l0"]) for r in one) / 2)
    by_level = [row for row in rows(study / "effects.csv") if (row["factor"], row["metric"]) == ("b_dec", "l0")]
    (effect,) = [row for row in by_level if (row["level"], row["layer"], row["within"]) == ("mean", "all", "")]
    l0 = {b: sum(float(r["l0"]) for r in found if r["b_dec"] == b) / 8 for b in ("zero", "mean")}
    assert float(effect["difference"]) == pytest.approx(l0["mean"] - l0["zero"]) and effect["seeds"] == "2"
    parts = {row["within"]: float(row["difference"]) for row in by_level if row["within"]}
    assert set(parts) == {"ghost=off", "ghost=fixed"}
    assert sum(parts.values()) / 2 == pytest.approx(l0["mean"] - l0["zero"])


def test_the_report_states_what_the_intervals_support(finished: tuple[Path, Result]) -> None:
    """Each difference of all layers together is in one of its lists, and in the right one."""
    study, _ = finished
    section = (study / "report.md").read_text().split("## What the choices do")[1].split("\n## ")[0]
    effects = {
        (r["factor"], r["level"], r["metric"]): r
        for r in rows(study / "effects.csv")
        if (r["layer"], r["within"]) == ("all", "")
    }
    assert section.strip().startswith(f"{len(effects)} differences were looked at")
    seen = 0
    for part in section.split("\n\n**")[1:]:
        factor, level = part.split("**")[0].replace("\\", "").split("=")
        for metric, name in METRICS.items():
            found = effects[factor, level, metric]
            lo, hi = (float(found[end] or 0) for end in ("lo", "hi"))
            verdict = "more" if lo > 0 else "less" if hi < 0 else None
            lines = [line for line in part.splitlines() if line.startswith(f"- {name}: ")]
            assert [line.split(": ")[1].split(",")[0] for line in lines] == ([verdict] if verdict else [])
            rest = [line for line in part.splitlines() if line.startswith(("- no difference", "- equal"))]
            named = [name in re.split(r": |, ", re.sub(r" \(.*?\)\)", "", line)) for line in rest]
            assert any(named) == (verdict is None)
            seen += 1
    assert seen == len(effects)


@pytest.mark.parametrize(
    ("cell", "changes", "d_sae"),
    [
        ("ghost-off,b_dec-mean,seed-1", {"ghost": "off", "b_dec_init": "mean"}, 48),
        ("ghost-fixed,b_dec-zero,seed-0", {"b_dec_init": "zero"}, 48),
    ],
)
def test_a_cell_is_what_reproduce_trains_alone(
    finished: tuple[Path, Result],
    cell: str,
    changes: dict[str, Any],
    d_sae: int,
    tmp_path: Path,
    tiny_model_folder: Path,
) -> None:
    check_alone(finished[0], cell, changes, d_sae, tmp_path, tiny_model_folder)


def check_alone(study: Path, cell: str, changes: dict[str, Any], d_sae: int, folder: Path, model_folder: Path) -> None:
    """The same bits, and the same evaluation."""
    content = registry(model_folder, **changes)
    content["collections"] = {"small": COLLECTION | {"d_sae": d_sae}}
    write_registry(folder / "overlay.yaml", content)
    write_text(folder)
    result = run(folder, "--seed", cell[-1], command="reproduce", out="alone")
    assert result.exit_code == 0, result.output
    own = study / "cells" / cell
    for alone in (folder / "alone").glob("*/sae_weights.safetensors"):
        assert alone.read_bytes() == (own / alone.parent.name / alone.name).read_bytes()
    ours, theirs = rows(own / "eval.csv"), rows(folder / "alone" / "eval.csv")
    names = ("layer", *(metric for metric in METRICS if metric != "dead_at_end"))
    assert [[row[name] for name in names] for row in ours] == [[row[name] for name in names] for row in theirs]
    log = [{k: v for k, v in row.items() if "second" not in k} for row in rows(own / "log.csv")]
    assert log == [{k: v for k, v in row.items() if "second" not in k} for row in rows(folder / "alone" / "log.csv")]


def test_a_dictionary_of_another_size(place: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    assert run(place, "--vary", "d_sae=48,80", "--seeds", "1").exit_code == 0
    (tmp_path / "other").mkdir()
    cell = "d_sae-80,seed-0"
    check_alone(place / "study", cell, {}, 80, tmp_path / "other", tiny_model_folder)
    used = ["--registry", str(place / "study" / "cells" / cell / "registry.yaml"), "list", "--json"]
    assert '"d_sae": 80' in CliRunner().invoke(main, used).stdout


def test_a_cell_can_be_used_by_its_registry_file(finished: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "cells" / CELLS[0], tmp_path / "cell")
    overlay = tmp_path / "cell" / "registry.yaml"
    listed = CliRunner().invoke(main, ["--registry", str(overlay), "list", "--json"])
    assert listed.exit_code == 0 and "small" in listed.stdout


def test_one_cell_again_gives_the_same_bits(finished: tuple[Path, Result], place: Path) -> None:
    """And the others are left alone."""
    shutil.copytree(finished[0], place / "study")
    before = weights(place / "study")
    kept = {path: path.stat().st_mtime_ns for path in (place / "study").glob("cells/*/run.json")}
    shutil.rmtree(place / "study" / "cells" / CELLS[3])
    result = run(place, *VARY, "--resume")
    assert result.exit_code == 0, result.output
    assert weights(place / "study") == before
    changed = [path.parent.name for path, then in kept.items() if path.stat().st_mtime_ns != then]
    assert changed == [CELLS[3]]
    assert (
        json.loads((place / "study" / "cells" / CELLS[3] / "run.json").read_text())["trained beside"] == "0 other cells"
    )


def test_a_study_that_is_complete_trains_nothing(finished: tuple[Path, Result], place: Path) -> None:
    shutil.copytree(finished[0], place / "study")
    result = run(place, *VARY, "--resume")
    assert result.exit_code == 0 and result.stdout.splitlines()[:-1] == finished[1].stdout.splitlines()[:-1]
    assert "filling the shuffle buffer" not in result.stderr
    for name in ("results.csv", "effects.csv", "report.md", "density.svg"):
        assert (place / "study" / name).read_bytes() == (finished[0] / name).read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_at_any_time(finished: tuple[Path, Result], place: Path, sent: signal.Signals) -> None:
    """Killed or stopped again and again, a study ends with the bits of one that was left alone."""
    draw, ends = random.Random(int(sent)), []
    for attempt in range(8):
        process = start(words(place, *VARY, *(["--resume"] if (place / "study" / "study.json").is_file() else [])))
        wait_for_training(place, process)
        time.sleep(draw.uniform(0.05, 0.5) * (1 + attempt))
        process.send_signal(sent)
        _, told = process.communicate()
        ends.append(process.returncode)
        assert "Traceback" not in told
        if process.returncode == 0:
            break
    assert any(ends), "the first attempt must be cut short, else this tests nothing"
    if ends[-1] != 0:
        assert run(place, *VARY, "--resume").exit_code == 0
    assert sorted(path.name for path in (place / "study" / "cells").iterdir()) == sorted(CELLS)
    assert weights(place / "study") == weights(finished[0])
    assert not (place / "study" / "streams").exists()


def wait_for(event: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not event() and time.monotonic() < until:
        time.sleep(0.01)


def wait_for_training(place: Path, process: subprocess.Popen[str]) -> None:
    """Until it writes a log: one that an earlier process left has been there before."""
    began = time.time()

    def logs() -> bool:
        return any(log.stat().st_mtime > began for log in (place / "study").glob("streams/*/log.csv"))

    wait_for(lambda: process.poll() is not None or logs())


def test_two_processes_in_one_folder(place: Path) -> None:
    """The second is refused, and takes nothing from the first."""
    process = start(words(place, *VARY, "--tokens", "40000"))
    wait_for_training(place, process)
    log = next((place / "study").glob("streams/*/log.csv"))
    wait_for(lambda: log.read_text().count("\n") > 20)
    before = log.read_text()
    result = run(place, *VARY, "--tokens", "40000", "--resume")
    assert process.poll() is None, "else this tests nothing"
    assert result.exit_code == 1
    assert f"another process is at work in {place / 'study'}; wait for it, or choose another --out" in result.stderr
    assert log.read_text().startswith(before)
    process.kill()
    process.communicate()


def test_ctrl_c_says_how_to_go_on(place: Path) -> None:
    process = start(words(place, *VARY, "--tokens", "40000"))
    wait_for(lambda: any(p.read_text().count("\n") > 20 for p in (place / "study").glob("streams/*/log.csv")))
    process.send_signal(signal.SIGINT)
    out, told = process.communicate()
    assert process.returncode == 1 and out == ""
    assert told.splitlines()[-1].startswith("Error: stopped at ")
    assert told.endswith(" of 40,000 tokens; the same command with --resume goes on\n")


def test_torchrun_divides_the_cells(finished: tuple[Path, Result], place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "saezoo"]
    done = subprocess.run([*torchrun, *words(place, *VARY)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert weights(place / "study") == weights(finished[0])
    assert done.stdout.endswith(f"{place / 'study'}\n") and done.stdout.count("differences") == 1
    for name in ("results.csv", "effects.csv", "report.md"):
        assert (place / "study" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_resampling_survives_a_kill(place: Path) -> None:
    grid = ["--vary", "resample=off,6", "--seeds", "1", "--tokens", "6000"]
    assert run(place, *grid, out="whole").exit_code == 0
    process = start(words(place, *grid))
    wait_for_training(place, process)
    time.sleep(0.4)
    process.kill()
    process.communicate()
    assert run(place, *grid, *(["--resume"] if (place / "study").exists() else [])).exit_code == 0
    assert weights(place / "study") == weights(place / "whole")


def test_the_buffer_is_a_stream_of_its_own(place: Path) -> None:
    """Cells that read in another order are not trained side by side, and differ."""
    result = run(place, "--vary", "buffer=bug,fixed", "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("filling the shuffle buffer") == 2
    found = weights(place / "study")
    bug, fixed = (
        found[f"cells/buffer-{how},seed-0/blocks.0.hook_resid_pre/sae_weights.safetensors"] for how in ("bug", "fixed")
    )
    assert bug != fixed


def test_a_cell_that_diverges_is_left_out(place: Path) -> None:
    """The others are what they are without it; it is in the report, and not tried again."""
    assert run(place, "--lr", "1e-3", command="sweep", out="without").exit_code == 0
    result = run(place, "--lr", "1e-3,1e5", command="sweep")
    assert result.exit_code == 0, result.output
    assert "layer lr=1e5:0: the loss " in result.stderr and "begin again without it" in result.stderr
    cells = place / "study" / "cells"
    assert sorted(path.name for path in (cells / "lr-1e5,seed-0").iterdir()) == ["log.csv", "run.json"]
    name = "lr-1e-3,seed-0/blocks.1.hook_resid_pre/sae_weights.safetensors"
    assert (cells / name).read_bytes() == (place / "without" / "cells" / name).read_bytes()
    assert {row["lr"] for row in rows(place / "study" / "results.csv")} == {"1e-3"}
    assert "Diverged, and left out: seed 0, layer lr=1e5:0: the loss " in (place / "study" / "report.md").read_text()
    again = run(place, "--lr", "1e-3,1e5", "--resume", command="sweep")
    assert again.exit_code == 0 and "begin again" not in again.stderr


def test_every_cell_diverges(place: Path) -> None:
    result = run(place, "--lr", "1e5", command="sweep")
    assert result.exit_code == 1
    assert "Error: every cell has diverged; layer lr=1e5:0: the loss " in result.stderr.splitlines()[-1]


def test_sweep(place: Path) -> None:
    result = run(place, "--l1", "1e-3,1e-2", command="sweep")
    assert result.exit_code == 0, result.output
    l0 = {row["l1"]: float(row["l0"]) for row in rows(place / "study" / "results.csv") if row["layer"] == "0"}
    assert l0["1e-2"] < l0["1e-3"]
    assert "With one seed there are no intervals" in (place / "study" / "report.md").read_text()
    assert "differences" not in result.stdout


def test_plan(place: Path) -> None:
    result = run(place, *VARY, "--plan")
    assert result.exit_code == 0, result.output
    assert "8 of 8 left to train: 16 SAEs" in result.stdout and "hours" in result.stdout
    assert not (place / "study").exists(), "a plan writes nothing"


def test_a_plan_is_of_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for option in (["--plan"], ["--hours", "1"]):
        result = run(place, *VARY, *option)
        assert result.exit_code == 2
        assert "--plan and --hours measure one process; run it without torchrun" in result.stderr


def test_torchrun_may_start_what_it_would_go_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    grid = ["--vary", "ghost=off", "--seeds", "1", "--resume"]
    for _ in range(2):
        result = run(place, *grid)
        assert result.exit_code == 0, result.output


def test_a_plan_of_what_is_left(finished: tuple[Path, Result], place: Path) -> None:
    shutil.copytree(finished[0], place / "study")
    shutil.rmtree(place / "study" / "cells" / CELLS[-1])
    assert "1 of 8 left to train: 2 SAEs" in run(place, *VARY, "--plan").stdout


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--vary", "gost=off"], 2, "no factor `gost`; did you mean `ghost`?"),
        (["--vary", "ghost=on"], 2, "ghost=on: the level must be one of off, bug, fixed"),
        (["--vary", "resample=1"], 2, "resample=1: `resample_every_steps` must be 0 or at least 2"),
        (["--vary", "ghost=off", "--tokens", "100"], 2, "100 tokens are fewer than the shuffle buffer's 256"),
        (["--vary", "ghost=off", "--resume"], 1, "nothing to resume: "),
        ([*VARY, "--hours", "1e-6"], 2, "more than the 1e-06 given; fewer factors, levels, seeds, layers or tokens"),
        ([*VARY, "--plan", "--hours", "1e-6"], 2, "more than the 1e-06 given"),
        (["--vary", "ghost=off", "--recipe", "none"], 2, "no recipe `none`"),
        ([], 2, "Missing option '--vary'"),
    ],
)
def test_what_is_refused(place: Path, more: list[str], code: int, message: str) -> None:
    result = run(place, *more)
    assert result.exit_code == code, result.output
    assert message in result.stderr and not (place / "study").exists()


def test_a_sweep_of_nothing(place: Path) -> None:
    result = run(place, command="sweep")
    assert result.exit_code == 2 and "nothing to sweep; give --l1 or --lr" in result.stderr


def test_a_folder_with_something_in_it(place: Path) -> None:
    (place / "study").mkdir()
    (place / "study" / "mine.txt").write_text("mine")
    result = run(place, *VARY)
    assert result.exit_code == 2
    assert f"{place / 'study'} is not empty; choose another --out, or --resume the study in it" in result.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([*VARY[:-1], "3"], "its seeds is 2, now 3"),
        ([*VARY, "--vary", "warmup=0"], "its factors is "),
        ([*VARY, "--tokens", "3000"], "its tokens is 2000, now 3000"),
        ([*VARY, "--eval-tokens", "1024"], "its eval_tokens is 512, now 1024"),
        ([*VARY, "--seed", "1"], "its first_seed is None, now 1"),
    ],
)
def test_another_study_is_not_gone_on_with(
    finished: tuple[Path, Result], place: Path, more: list[str], told: str
) -> None:
    shutil.copytree(finished[0], place / "study")
    result = run(place, *more, "--resume")
    assert result.exit_code == 1 and f"{place / 'study'} is another study: {told}" in result.stderr


def test_a_changed_recipe_in_a_half_finished_grid(
    finished: tuple[Path, Result], place: Path, tiny_model_folder: Path
) -> None:
    shutil.copytree(finished[0], place / "study")
    shutil.rmtree(place / "study" / "cells" / CELLS[-1])
    write_overlay(place, tiny_model_folder, lr=2e-2)
    result = run(place, *VARY, "--resume")
    assert result.exit_code == 1 and "is another study: its lr is 0.01, now 0.02; choose another --out" in result.stderr
    assert not (place / "study" / "cells" / CELLS[-1]).exists()


def test_a_study_file_that_is_damaged(finished: tuple[Path, Result], place: Path) -> None:
    (place / "study").mkdir()
    (place / "study" / "study.json").write_text("{")
    result = run(place, *VARY, "--resume")
    assert result.exit_code == 1 and "study.json is damaged" in result.stderr


def test_a_grid_larger_than_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 SAEs of 4 x 1,600 bytes of weights and 120 kB, twice the 12 x 1,600 of each of the eight of one stream, and
    twice half a shuffle buffer of 128 x 16 floats for each layer: 2.4 MB."""
    usage = shutil.disk_usage(place)
    monkeypatch.setattr("saezoo.ablation.study.shutil.disk_usage", lambda path: usage._replace(free=1_000_000))
    for more in ([], ["--plan"]):
        result = run(place, *VARY, *more)
        assert result.exit_code == 2
        assert f"8 cells need 2.4 MB on the disk, 1.0 MB are free at {place}; fewer" in result.stderr
    assert not (place / "study").exists()


def test_each_rank_needs_disk_for_its_checkpoints(place: Path) -> None:
    """Four ranks train two cells each, four SAEs: together eight more than one rank, with three more buffers."""
    options = Options(registry=place / "overlay.yaml", text=place / "text.txt")
    vary = ["ghost=off,fixed", "b_dec=zero,mean"]
    study = plan_study("small", "all", vary=vary, seeds=2, options=options)
    one, four = (disk_of(study, place / "study", ranks) for ranks in (1, 4))
    assert four - one == 2 * (8 * 12 * (2 * 16 * 48 + 48 + 16) + 3 * 4 * 2 * 4 * 16 * 16 * 2)


def test_the_disk_that_is_asked_for_suffices(finished: tuple[Path, Result]) -> None:
    """With 500 rows of log.csv for each SAE, a cell takes less than its weights and 120 kB for each."""
    study, _ = finished
    for cell in CELLS:
        sizes = {path: path.stat().st_size for path in (study / "cells" / cell).rglob("*") if path.is_file()}
        log = study / "cells" / cell / "log.csv"
        rest = sum(sizes.values()) - sizes[log] - 2 * 4 * (2 * 16 * 48 + 48 + 16)
        a_row = sizes[log] / log.read_text().count("\n")
        assert rest + 2 * 500 * a_row < 2 * 120_000
