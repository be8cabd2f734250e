"""Files appear complete or not at all, and every failure to write is one line."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from saezoo import files
from saezoo.errors import SaezooError
from saezoo.results import write_text

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full here")


def test_replacing_writes_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out.txt"
    write_text(path, "ü\n")
    assert path.read_bytes() == b"\xc3\xbc\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["out.txt"]


def test_replacing_keeps_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "out.txt", "x")
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) & 0o444 == 0o444


def test_a_private_umask_is_respected(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        write_text(tmp_path / "out.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) & 0o077 == 0


def test_a_folder_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out.txt"
    with pytest.raises(SaezooError) as caught:
        write_text(path, "x")
    assert str(caught.value).startswith(f"cannot write {path}: ")
    assert str(caught.value).endswith("; choose a place that can be written")
    assert caught.value.exit_code == 1


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "out.txt").mkdir()
    with pytest.raises(SaezooError, match=r"cannot write .*out\.txt: Is a directory"):
        write_text(tmp_path / "out.txt", "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]


@needs_full
def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(SaezooError) as caught, files.replacing(tmp_path / "out.txt"):
        FULL.write_text("x")
    assert str(caught.value) == (
        f"no space left on the disk while writing {tmp_path / 'out.txt'}; free some, or choose another place"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """What goes for a pipe goes for /dev/null and /dev/stdout, which root could really replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "x")
    except SaezooError as error:
        assert str(pipe) in str(error)
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up; safetensors raises its own error then."""
    program = (
        "import resource, sys; from saezoo import load, SaezooError; sae = load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try: sae.save(sys.argv[2])\n"
        "except SaezooError as error: sys.exit(str(error))"
    )
    golden = Path(__file__).parent / "golden" / "reformatted"
    arguments = [sys.executable, "-c", program, str(golden), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(files.__file__).parents[1])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "sae_weights.safetensors" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_cannot_write_says_why(number: int) -> None:
    error = files.cannot_write(Path("out.txt"), OSError(number, os.strerror(number)))
    assert str(error) == f"cannot write out.txt: {os.strerror(number)}; choose a place that can be written"


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 1])
def test_sha256(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(b"x" * size).hexdigest()
