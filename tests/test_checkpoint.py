"""Checkpoints come back bit for bit, no damage goes unnoticed, and no kill at whatever moment loses one.

Run as a script (`python test_checkpoint.py FOLDER random|audited|bytes`) it saves in processes that are killed.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import saezoo
from saezoo import checkpoint
from saezoo.checkpoint import KEPT, Schedule, load, remove, save
from saezoo.errors import SaezooError, TrainingError

IDENTITY = {"lr": 0.01, "layers": "0,1", "seed": 7, "sizes": (16, 48)}
FACTS = {"calls": 12, "cursor": {"file": "text.txt", "offset": 1 << 40}, "rate": 1 / 3, "none": None}


def small(done: int) -> dict[str, Tensor]:
    """A state that depends on `done`."""
    generator = torch.Generator().manual_seed(done)
    numbers = torch.randn(5, 3, generator=generator)
    return {"0.W_enc": numbers, "generator": generator.get_state()[:9], "steps": torch.tensor(done)}


def name(done: int) -> str:
    return f"checkpoint-{done:015d}.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether both hold the same bits under the same names, also those of NaN and of -0."""

    def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()

    return {key: bits(value) for key, value in mine.items()} == {key: bits(value) for key, value in theirs.items()}


def refusal(folder: Path, identity: dict[str, Any] = IDENTITY) -> str:
    with pytest.raises(TrainingError) as caught:
        load(folder, identity)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of 100 and of 200 tokens."""
    for done in (100, 200):
        save(tmp_path, done, small(done), FACTS, IDENTITY)
    return tmp_path


# Round trip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype in up to four dimensions, some of them empty, some tensors views with odd strides."""
    dtype = draw(st.sampled_from(sorted(checkpoint._DTYPES, key=str)))
    shape: list[int] = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)
    odd: bool = draw(st.booleans())
    return tensor.transpose(0, -1) if shape and odd else tensor


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), tensors(), max_size=5))
def test_any_tensors_come_back_bit_for_bit(state: dict[str, Tensor]) -> None:
    state = {f"0.{key}": tensor for key, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        cost = save(Path(folder), 3, state, FACTS, IDENTITY)
        assert cost.bytes == (Path(folder) / name(3)).stat().st_size
        found = load(Path(folder), IDENTITY)
    assert same(found.tensors, state)
    assert found.done == 3 and found.facts == FACTS


@pytest.mark.parametrize("size", [checkpoint._PIECE, checkpoint._PIECE + 1, 2 * checkpoint._PIECE + 6])
def test_tensors_larger_than_a_piece(tmp_path: Path, size: int) -> None:
    long = (torch.arange(size) % 251).to(torch.uint8)
    state = {"long": long, "wide": long[: size // 2 * 2].reshape(2, -1).T}
    save(tmp_path, 1, state, {}, {})
    assert same(load(tmp_path, {}).tensors, state)


def test_shared_memory_and_parameters(tmp_path: Path) -> None:
    weights = torch.nn.Parameter(torch.randn(6, 4))
    state: dict[str, Tensor] = {"all": weights, "again": weights, "rows": weights[1:3], "row": weights[0].expand(3, 4)}
    save(tmp_path, 1, state, {}, {})
    found = load(tmp_path, {}).tensors
    assert same(found, {key: value.detach().contiguous() for key, value in state.items()})
    found["all"].zero_()
    assert bool(found["again"].any())


def test_other_programs_can_read_it(two: Path) -> None:
    found = load_file(two / name(200))
    content = (two / name(200)).read_bytes()
    assert int.from_bytes(bytes(found.pop("crc32").tolist()), "little") == zlib.crc32(content[:-4])
    assert same(found, small(200))


def test_what_is_loaded_outlives_its_file(two: Path) -> None:
    found = load(two, IDENTITY)
    (two / name(200)).write_bytes(b"")
    assert same(found.tensors, small(200))


@pytest.mark.parametrize("reserved", ["crc32", "__metadata__"])
def test_reserved_names(tmp_path: Path, reserved: str) -> None:
    with pytest.raises(ValueError, match=reserved):
        save(tmp_path, 1, {reserved: torch.zeros(1)}, {}, {})
    assert names(tmp_path) == []


# Which ones stay


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for done in (5, 10, 900, 1000):
        save(tmp_path, done, small(done), FACTS, IDENTITY)
    assert KEPT == 2
    assert names(tmp_path) == [name(900), name(1000)]


def test_those_of_a_run_given_up_go(two: Path) -> None:
    """A run that began anew, or went on from the one before a damaged one, has its own future."""
    save(two, 150, small(150), FACTS, IDENTITY)
    assert names(two) == [name(100), name(150)]
    assert load(two, IDENTITY).done == 150


def test_leftovers_of_killed_runs_go_and_other_files_stay(two: Path) -> None:
    for leftover in (f".{name(150)}.0123abcd", ".checkpoint.pt.0123abcd"):
        (two / leftover).write_bytes(b"half")
    for other in ("log.csv", "checkpoint-best.safetensors", "checkpoint.pt"):
        (two / other).write_bytes(b"mine")
    save(two, 300, small(300), FACTS, IDENTITY)
    others = ["checkpoint-best.safetensors", "checkpoint.pt", "log.csv"]
    assert names(two) == sorted([name(200), name(300), *others])
    remove(two)
    assert names(two) == others


def test_remove_without_any(tmp_path: Path) -> None:
    remove(tmp_path)
    remove(tmp_path / "absent")
    assert names(tmp_path) == []


# Damage


def alterations(content: bytes) -> Iterator[bytes]:
    """`content` with one byte changed: every byte in turn, by one bit or other, by all, and at random."""
    chance = random.Random(0)
    for position in range(len(content)):
        for mask in (1 << position % 8, 0xFF, chance.randrange(1, 256)):
            yield content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def test_any_changed_byte_is_noticed(two: Path) -> None:
    newest = two / name(200)
    for altered in alterations(newest.read_bytes()):
        newest.write_bytes(altered)
        assert load(two, IDENTITY).done == 100


def test_any_truncation_is_noticed(two: Path) -> None:
    newest = two / name(200)
    content = newest.read_bytes()
    for length in range(len(content)):
        newest.write_bytes(content[:length])
        assert load(two, IDENTITY).done == 100


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1 << 18), st.binary(min_size=1, max_size=4), st.booleans())
def test_changes_of_a_large_file_are_noticed(position: int, burst: bytes, insert: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), 1, {"W": torch.arange(1 << 15)}, FACTS, IDENTITY)
        path = Path(folder) / name(1)
        content = path.read_bytes()
        altered = content[:position] + burst + content[position + (0 if insert else len(burst)) :]
        path.write_bytes(altered)
        if altered == content:
            assert load(Path(folder), IDENTITY).done == 1
        else:
            assert "is damaged" in refusal(Path(folder))


def test_the_one_before_is_used_and_said(two: Path) -> None:
    content = (two / name(200)).read_bytes()
    (two / name(200)).write_bytes(content[:-1])
    notes: list[str] = []
    found = load(two, IDENTITY, notes.append)
    assert found.done == 100 and same(found.tensors, small(100))
    reason = f"its {len(content) - 1:,} bytes do not fit its checksum"
    assert notes == [f"{name(200)} is damaged ({reason}); using the one before it, {name(100)}"]


def test_none_is_whole(two: Path) -> None:
    (two / name(100)).write_bytes(b"")
    (two / name(200)).write_bytes(b"x" * 1000)
    notes: list[str] = []
    with pytest.raises(TrainingError) as caught:
        load(two, IDENTITY, notes.append)
    assert str(caught.value) == (
        f"nothing to resume in {two}: {name(200)} is damaged (its 1,000 bytes do not fit its checksum); "
        f"{name(100)} is damaged (its 0 bytes do not fit its checksum); leave --resume out to start again"
    )
    assert notes == []


def with_checksum(path: Path, metadata: dict[str, str] | None) -> None:
    """A safetensors file that others wrote, its last tensor a checksum as in a checkpoint."""
    save_file({"crc32": torch.zeros(4, dtype=torch.uint8)}, path, metadata=metadata)
    content = path.read_bytes()[:-4]
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))


@pytest.mark.parametrize("metadata", [None, {}, {"saezoo": "{"}, {"saezoo": "[]"}, {"saezoo": '{"format": 1}'}])
def test_files_that_are_no_checkpoint(two: Path, metadata: dict[str, str] | None) -> None:
    with_checksum(two / name(200), metadata)
    notes: list[str] = []
    assert load(two, IDENTITY, notes.append).done == 100
    assert notes == [f"{name(200)} is damaged (it is no checkpoint); using the one before it, {name(100)}"]


@pytest.mark.parametrize("content", [b"\0" * 4, b"\0" * 100])
def test_zeros(tmp_path: Path, content: bytes) -> None:
    """What file systems leave where data never came."""
    (tmp_path / name(1)).write_bytes(content)
    assert f"{name(1)} is damaged (" in refusal(tmp_path)


# What is refused


def test_a_later_format_is_not_passed_over(two: Path) -> None:
    with_checksum(two / name(200), {"saezoo": json.dumps({"format": 2})})
    assert refusal(two) == (
        f"{two / name(200)} has checkpoint format 2, and this saezoo reads 1; resume with a newer saezoo"
    )


def test_another_run(two: Path) -> None:
    mine = {"lr": 0.5, "layers": "0,1", "seed": 7, "text": None}
    assert refusal(two, mine) == (
        f"{two / name(200)} belongs to another run (lr: 0.01 in the checkpoint, 0.5 now; "
        "text: nothing in the checkpoint, None now; sizes: [16, 48] in the checkpoint, nothing now); "
        "use its settings, or another --out"
    )


def test_nothing_to_resume(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert refusal(folder) == f"nothing to resume: no checkpoint in {folder}; leave --resume out to start"


def test_a_checkpoint_of_an_older_version(two: Path) -> None:
    golden = Path(__file__).parent / "golden" / "malicious.pt"
    shutil.copy(golden, two / "checkpoint.pt")
    assert load(two, IDENTITY).done == 200
    remove(two)
    assert refusal(two) == (
        f"{two / 'checkpoint.pt'} was written by an older saezoo, which alone can resume it; "
        "leave --resume out to start again"
    )
    assert not Path("PWNED").exists()


# Disks that fail


def failure(folder: Path) -> str:
    with pytest.raises(SaezooError) as caught:
        save(folder, 300, small(300), FACTS, IDENTITY)
    return str(caught.value)


def test_a_size_limit(two: Path) -> None:
    """It cuts a write short like a disk that fills up."""
    program = (
        "import resource, sys, torch; from pathlib import Path; from saezoo import SaezooError\n"
        "from saezoo.checkpoint import save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))\n"
        "try: save(Path(sys.argv[1]), 300, {'W': torch.ones(9999)}, {}, {})\n"
        "except SaezooError as error: sys.exit(str(error))"
    )
    done = script([sys.executable, "-c", program, str(two)])
    wanted = f"cannot write {two / name(300)}: File too large; choose a place that can be written\n"
    assert (done.returncode, done.stderr) == (1, wanted)
    assert names(two) == [name(100), name(200)]
    assert same(load(two, IDENTITY).tensors, small(200))


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one of 64 KiB, where the system lets users mount one."""
    program = (
        "import os, sys, torch; from pathlib import Path; from saezoo import SaezooError\n"
        "from saezoo.checkpoint import load, save\n"
        "folder = Path(sys.argv[1])\n"
        "try: [save(folder, done, {'W': torch.full((2000 * done,), done)}, {}, {}) for done in range(1, 99)]\n"
        "except SaezooError as error: print(error)\n"
        "print(bool((load(folder, {}).tensors['W'] == 2).all()), *sorted(os.listdir(folder)))"
    )
    mount = 'mount -t tmpfs -o size=64k none "$2" && echo mounted && exec "$0" -c "$1" "$2"'
    unshare = shutil.which("unshare") or pytest.skip("there is no unshare here")
    done = script([unshare, "-rm", "sh", "-c", mount, sys.executable, program, str(tmp_path)])
    if not done.stdout.startswith("mounted"):
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    full = f"no space left on the disk while writing {tmp_path / name(3)}; free some, or choose another place"
    assert done.stdout.splitlines()[1:] == [full, f"True {name(1)} {name(2)}"], done.stderr


def test_a_folder_that_vanished_is_made_again(two: Path) -> None:
    shutil.rmtree(two)
    save(two, 300, small(300), FACTS, IDENTITY)
    assert load(two, IDENTITY).done == 300


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = failure(tmp_path / "file")
    assert message.startswith(f"cannot write {tmp_path / 'file' / name(300)}: ")
    assert message.endswith("; choose a place that can be written")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root and Windows write anywhere")
def test_a_folder_that_is_read_only(two: Path) -> None:
    two.chmod(0o500)
    try:
        assert failure(two) == f"cannot write {two / name(300)}: Permission denied; choose a place that can be written"
        with pytest.raises(SaezooError, match=f"cannot delete the checkpoints in {two}: Permission denied"):
            remove(two)
    finally:
        two.chmod(0o700)
    assert load(two, IDENTITY).done == 200


def test_a_folder_in_the_place_of_the_file(two: Path) -> None:
    (two / name(300)).mkdir()
    assert "Is a directory" in failure(two)
    assert load(two, IDENTITY).done == 200


# When to save


class Clock:
    """Seconds that pass when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_save_is_after_half_a_minute() -> None:
    clock = Clock()
    schedule = Schedule(clock=clock)
    assert not schedule.due() and schedule.share() == 0
    clock.now += 29.9
    assert not schedule.due()
    clock.now += 0.1
    assert schedule.due()


@pytest.mark.parametrize("seconds, wait", [(0.0, 30), (0.1, 30), (0.6, 30), (3.0, 150), (60.0, 3000)])
def test_the_dearer_the_rarer(seconds: float, wait: float) -> None:
    clock = Clock()
    schedule = Schedule(0.02, clock)
    clock.now += 40 + seconds
    schedule.saved(seconds)
    assert schedule.share() == pytest.approx(seconds / (40 + seconds))
    clock.now += wait - 0.01
    assert not schedule.due()
    clock.now += 0.02
    assert schedule.due()


@given(st.lists(st.floats(0, 1e4), max_size=20), st.sampled_from([0.001, 0.02, 0.5]), st.floats(0.01, 10))
def test_the_share_is_never_exceeded(costs: list[float], share: float, step: float) -> None:
    """Steps that take `step` seconds, and saves as dear as they may be: when one is due, the last is made good."""
    clock = Clock()
    schedule = Schedule(share, clock)
    for last, seconds in zip([0.0, *costs], costs, strict=False):
        clock.now += max(30.0, last / share) + step
        assert schedule.due()
        assert schedule.share() <= share
        clock.now += seconds
        schedule.saved(seconds)


# Kills


def script(command: list[str]) -> subprocess.CompletedProcess[str]:
    root = str(Path(saezoo.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("how, kills", [("random", 24), ("audited", 16), ("bytes", 15)])
def test_no_kill_loses_a_checkpoint(tmp_path: Path, how: str, kills: int) -> None:
    done = script([sys.executable, __file__, str(tmp_path), how])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{how}: killed {kills} times, "), done.stdout


def large(done: int) -> dict[str, Tensor]:
    """4 MB that depend on `done`: some milliseconds of writing."""
    return {"W": torch.arange(done, done + 500_000), "steps": torch.tensor(done)}


def killed(folder: Path, first: int, doom: Callable[[], None], wait: float | None) -> int:
    """Fork a process that saves from `first` on until it is killed; the last one that it said was saved, or 0.

    It calls `doom` after its first save; `wait` is after how many seconds from then it is killed from here.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        for done in range(first, first + 1000):
            save(folder, done, large(done), {"calls": 2 * done}, IDENTITY)
            os.write(writing, b"%d\n" % done)
            if done == first:
                doom()
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.readline()
        if wait is not None:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
        said += pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the process ended by itself, {status}"
    return int(said.split()[-1])


def die_at_event(number: int) -> None:
    """From now on: die when this process is about to open, rename, delete or list something for the n-th time."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.chmod", "os.scandir", "os.listdir", "os.mkdir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_byte(size: int) -> None:
    """From now on: die when a file grows beyond `size`."""
    import resource  # not on Windows, where this is not run either

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def main(folder: Path, how: str) -> None:
    """Save and be killed, over and over in one folder; print how often."""
    save(folder, 1, large(1), {"calls": 2}, IDENTITY)
    size = (folder / name(1)).stat().st_size
    chance = random.Random()
    rounds: list[tuple[Callable[[], None], float | None]]
    if how == "random":
        rounds = [(lambda: None, chance.uniform(0, 0.06)) for _ in range(24)]
    elif how == "audited":
        rounds = [(functools.partial(die_at_event, n), None) for n in range(16)]
    else:
        sizes = [0, 1, 8, 100, 400, size // 2, size - 5, size - 4, size - 1]
        rounds = [(functools.partial(die_at_byte, n), None) for n in (*sizes, *chance.choices(range(size), k=6))]
    done, leftovers = 1, 0
    for doom, wait in rounds:
        said = killed(folder, done + 1, doom, wait)
        leftovers += len(list(folder.glob(".*")))
        found = load(folder, IDENTITY, lambda message: sys.exit(message))
        assert found.done in (said, said + 1) and found.facts == {"calls": 2 * found.done}
        assert same_large(found.tensors, found.done)
        done = found.done
    print(f"{how}: killed {len(rounds)} times, {done} saved, {leftovers} left half-written")


def same_large(found: dict[str, Tensor], done: int) -> bool:
    wanted = large(done)
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
