"""A dashboard as a folder of files that any browser opens, without a server or a network.

A page opened from a disk may not fetch files, but may load scripts; so data are scripts, each with one call that
hands over packed JSON. data/manifest.js comes first and says that the site is incomplete, until the very end.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import zlib
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from saezoo import files
from saezoo.errors import SaezooError
from saezoo.features.pages import Columns, about_page, feature_page
from saezoo.features.records import About, Feature

MARK = "// saezoo site, format 1"
"""First line of the manifest: the folder is ours, and may be written again."""
SHARD = 64
"""Features in a file."""
_LEVEL = 3
"""Of compression: a quarter of the time of the usual 6, and 11 % more bytes."""


class Site:
    """Writes the site of one collection."""

    def __init__(
        self, out: Path, abouts: Sequence[About], *, vocabulary: Sequence[bytes], special: AbstractSet[int]
    ) -> None:
        """Begin in `out`: new, empty, or a site, which is replaced. SaezooError if it is neither, or cannot be
        written."""
        self._data = out / "data"
        self._abouts = abouts
        self._written: set[str] = set()
        check(out)
        self._manifest(complete=False)  # before anything else, so that what is left after a power cut is a site
        self._clear()
        for resource in resources("saezoo.features").joinpath("static").iterdir():
            with files.replacing(out / resource.name) as temporary:
                temporary.write_bytes(resource.read_bytes())
        self._script("tokens", {"tokens": [_spelled(token) for token in vocabulary], "special": sorted(special)})

    def write(
        self,
        about: About,
        features: Iterable[Feature],
        *,
        clusters: Sequence[tuple[int, ...]] | None = None,
        exclusive: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """The pages of one SAE: `features` in the order of `about.features`.

        `clusters` fire together, of each group in `exclusive` one at a time; None: not computed.
        """
        folder = f"sae{self._abouts.index(about)}"
        list_of_features = Columns()
        stream = iter(features)
        for number in itertools.count():
            shard = list(itertools.islice(stream, SHARD))
            if not shard:
                break
            for feature in shard:
                list_of_features.add(feature)
            self._script(f"{folder}/{number}", [feature_page(feature) for feature in shard])
        columns = list_of_features.columns
        if tuple(columns["index"]) != about.features:
            raise ValueError(f"the features of layer {about.layer} are not those that its `About` promises")
        self._script(f"{folder}/list", columns | {"clusters": clusters, "exclusive": exclusive})
        self._written.add(about.layer)
        self._manifest(complete=False)

    def finish(self) -> None:
        """Say that the site is complete."""
        self._manifest(complete=True)

    def _manifest(self, complete: bool) -> None:
        saes = [
            about_page(about) | {"folder": f"sae{i}", "written": about.layer in self._written}
            for i, about in enumerate(self._abouts)
        ]
        self._script("manifest", {"complete": complete, "shard": SHARD, "saes": saes}, first=f"{MARK}\n")

    def _clear(self) -> None:
        """Remove the data of the site that was here."""
        try:
            for folder in self._data.glob("sae[0-9]*"):
                shutil.rmtree(folder)
        except OSError as error:
            raise files.cannot_write(self._data, error) from None

    def _script(self, name: str, value: Any, first: str = "") -> None:
        with files.replacing(self._data / f"{name}.js") as temporary:
            temporary.write_text(f"{first}{script(name, value)}", encoding="ascii")


def check(out: Path) -> None:
    """SaezooError if `out` holds anything that is no site of ours, or cannot be written."""
    if out.exists() and not out.is_dir():
        raise SaezooError(f"{out} is a file; a site is a folder: choose another place with --out")
    if not is_site(out) and any(_foreign(path) for path in out.rglob("*")):
        raise SaezooError(f"{out} holds other files and is no site of saezoo; choose a new or empty folder with --out")
    there = next(place for place in (out / "data", out, *out.absolute().parents) if place.is_dir())
    files.check_writable(there / ".site")  # `out` itself is made when there is something to write


def is_site(folder: Path) -> bool:
    """Whether a site, complete or not, was written there."""
    try:
        with (folder / "data" / "manifest.js").open(encoding="utf-8", errors="replace") as file:
            return file.readline(len(MARK) + 1).rstrip("\n") == MARK
    except OSError:
        return False


def _foreign(path: Path) -> bool:
    """Not left by a site that was killed while it wrote its first file."""
    return not (path.is_dir() or path.name.startswith(".manifest.js.")) or path.is_symlink()


def script(name: str, value: Any) -> str:
    """A call that hands `value` over: JSON, deflated, in base64, which is less than half of its size and cannot be
    taken for anything but a string."""
    packed = zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), _LEVEL)
    return f'saezoo.take("{name}","{base64.b64encode(packed).decode()}")\n'


def _spelled(token: bytes) -> str | list[int]:
    """Text, or the bytes of what is none: half of a letter."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)
