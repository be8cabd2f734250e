"""Feeds the readers of foreign files with broken and hostile ones; any end but a result or a SaezooError is a crash.

    python benchmarks/fuzz.py                                # all targets, more than a million inputs
    python benchmarks/fuzz.py --target pickle --inputs 50000 --seed 7

Half of the inputs are mutations of good files, half come from a grammar (fuzz_targets.py). An input may take 2 s of the
processor, or 20 s in all, and the process 1 GiB more than it starts with; an audit hook stops whatever would run a
program, import through a pickle or connect somewhere. Each target runs in a process of its own. Crashes are reduced
and printed. Appends a row per target to results/fuzz.csv.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from common import RESULTS, append, in_fresh_process, versions

SECONDS = 2.0
MEMORY = 2**30
INPUTS = {
    "safetensors": 250_000,
    "pickle": 250_000,
    "npz": 150_000,
    "peer config": 60_000,
    "peer pickle": 60_000,
    "cfg": 200_000,
    "jsonl": 100_000,
    "txt": 100_000,
    "xz": 40_000,
    "registry": 60_000,
}
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo", "shutil.rmtree", "os.remove", "os.rename", "os.mkdir"),
)

_reading: list[bool] = []
"""Not empty while a reader is at work, which is when these are forbidden."""


class _Stop(BaseException):
    """Ends an input; no `except Exception` of a reader may swallow it."""


@dataclass
class Tally:
    """What became of the inputs of one target."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    """Seconds of the processor."""
    crashes: dict[str, bytes] = field(default_factory=dict)
    """What was raised and where -> the first input that did it, reduced."""


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> Tally:
    """Run one target on `inputs` files that lie, one after the other, in `folder`."""
    import fuzz_targets

    fuzz_targets.use_folder(folder)
    target = fuzz_targets.targets()[name]
    path = folder / f"input{target.suffix}"
    random, tally = Random(f"{name} {seed}"), Tally()
    before = signal.signal(signal.SIGPROF, _too_slow), signal.signal(signal.SIGALRM, _too_slow)
    try:
        for _ in range(inputs):
            grammar = random.random() < 0.5
            data = target.make(random) if grammar else fuzz_targets.mutated(random, target.seeds, target.words)
            begin = time.process_time()
            crash = _end_of(target, path, data, tally)
            tally.slowest_s = max(tally.slowest_s, time.process_time() - begin)
            tally.inputs += 1
            if crash is not None and crash not in tally.crashes:
                tally.crashes[crash] = _reduced(target, path, data, crash)
    finally:
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
    return tally


def _too_slow(*_: Any) -> None:
    raise _Stop("too slow")


def _end_of(target: Any, path: Path, data: bytes, tally: Tally) -> str | None:
    """None if the reader returned or refused, else what it raised and where."""
    from saezoo.errors import SaezooError

    path.write_bytes(data)
    _reading.append(True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        target.read(path)
        tally.accepted += 1
    except SaezooError as error:
        tally.refused += 1
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 2000 or not message.isprintable():
            return f"a message that is not one printable line: {message[:80]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        return f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reading.clear()
    return None


def _reduced(target: Any, path: Path, data: bytes, crash: str) -> bytes:
    """A smaller input with the same end: pieces are left out as long as it stays."""
    size, tries = len(data) // 2, 0
    while size and tries < 1000:
        for begin in range(0, len(data), size):
            tries += 1
            shorter = data[:begin] + data[begin + size :]
            if tries < 1000 and _end_of(target, path, shorter, Tally()) == crash:
                data = shorter
                break
        else:
            size //= 2
    return data


def _guard() -> None:
    """Limit the memory of this process, and stop what no reader of data does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _reading and event in _FORBIDDEN:
            raise _Stop(f"{event} {arguments}")

    sys.addaudithook(hook)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _one(name: str, inputs: int, seed: int) -> None:
    """Run one target in this process; prints its tally as JSON."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        fuzz(name, 200, seed + 1, Path(folder))  # imports, caches
        started = _peak_mib()
        _guard()
        begin = time.perf_counter()
        tally = fuzz(name, inputs, seed, Path(folder))
        seconds = time.perf_counter() - begin
        sys.stdout.flush()
        row = asdict(tally) | {"crashes": {key: data.hex() for key, data in tally.crashes.items()}}
        print(json.dumps({**row, "seconds": seconds, "grown": _peak_mib() - started, "peak": _peak_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=INPUTS)
    parser.add_argument("--inputs", type=int, help="of each target; by default more than a million in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        _one(args.target, args.inputs, args.seed)
        return
    print("| target | inputs | refused | accepted | crashes | slowest s | peak MiB | grown MiB | seconds |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    failed = False
    for name in [args.target] if args.target else INPUTS:
        settings = ("--target", name, "--inputs", str(args.inputs or INPUTS[name]), "--seed", str(args.seed))
        found = in_fresh_process(sys.executable, __file__, *settings, "--here")
        crashes = found.pop("crashes")
        row = {"target": name, "seed": args.seed, "inputs": found["inputs"], "refused": found["refused"]}
        row |= {"accepted": found["accepted"], "crashes": len(crashes), "slowest_s": round(found["slowest_s"], 4)}
        row |= {"peak_mib": round(found["peak"], 1), "grown_mib": round(found["grown"], 1)}
        row |= {"seconds": round(found["seconds"], 1)}
        append(RESULTS / "fuzz.csv", row | versions("saezoo", "torch", "safetensors", "numpy", "pyyaml"))
        cells = [name, *(f"{cell:,}" for key, cell in row.items() if key not in ("target", "seed"))]
        print(f"| {' | '.join(cells)} |", flush=True)
        for crash, data in crashes.items():
            failed = True
            print(f"  {crash}\n    {bytes.fromhex(data)[:2000]!r}", file=sys.stderr)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
