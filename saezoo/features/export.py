"""The files of an export: batches as SAEDashboard writes them, here, and what Neuronpedia imports, in neuronpedia.py.
docs/exports.md has both."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from saezoo import files
from saezoo.errors import SaezooError, UsageError, shown
from saezoo.features.records import About
from saezoo.features.saedashboard import Described, Describer, Material, to_json

BATCH = 128
"""Features in a file."""


class Place(NamedTuple):
    """Where features stand on Neuronpedia."""

    model: str
    layer: int
    source_set: str
    suffix: str | None = None

    @property
    def source(self) -> str:
        """`8-res-jb`, or `8-res-jb__suffix`."""
        return f"{self.layer}-{self.source_set}" + (f"__{self.suffix}" if self.suffix else "")


def place_of(about: About) -> Place:
    """Where the SAE is on Neuronpedia; if it is not there, the model's name, the hook's layer and the collection's
    name. UsageError if the hook has no layer."""
    if about.neuronpedia and (found := re.fullmatch(r"([^/]+)/(\d+)-([^/]+)", about.neuronpedia)):
        source_set, _, suffix = found[3].partition("__")
        return Place(_name(found[1]), int(found[2]), _name(source_set), _name(suffix) or None)
    layer = re.match(r"blocks\.(\d+)\.", about.hook)
    if layer is None:
        raise UsageError(f"hook {shown(about.hook)} has no layer, which an export needs: blocks.LAYER.name")
    return Place(_name(about.model), int(layer[1]), _name(about.collection))


def _name(text: str) -> str:
    """`text` as a part of a path and of an address: a collection may be a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")


class Output(Protocol):
    """Files that are written batch by batch."""

    def batch(self, number: int, features: list[Described], tokens_of: Callable[[int], str]) -> None:
        """Write the files of a batch; `tokens_of` gives a row's token strings as a JSON array."""

    def finish(self) -> None:
        """Write what comes last."""


def export(
    material: Material, outputs: Sequence[Output], on_progress: Callable[[int], None] = lambda features: None
) -> None:
    """Describe the features that have a page, `BATCH` at a time, and hand them to all `outputs`. `on_progress` gets the
    number of features done."""
    describer = Describer(material)
    tokens_of = functools.lru_cache(maxsize=1 << 16)(describer.tokens_json)  # 1 kB each
    features = material.about.features
    for number, start in enumerate(range(0, len(features), BATCH)):
        described = list(describer.describe(features[start : start + BATCH]))
        for output in outputs:
            output.batch(number, described, tokens_of)
        on_progress(start + len(described))
    for output in outputs:
        output.finish()


class BatchFiles:
    """`batch-N.json` and `skipped_indexes.json`, as SAEDashboard's NeuronpediaRunner leaves them."""

    def __init__(self, folder: Path, about: About, place: Place) -> None:
        """SaezooError if `folder` cannot be written, or has anything but these files in it."""
        self._folder, self._about, self._place = folder, about, place
        self._old = check_own(folder, r"batch-\d+\.json|skipped_indexes\.json")

    def batch(self, number: int, features: list[Described], tokens_of: Callable[[int], str]) -> None:
        """Write one file; before the first, those of an earlier export go."""
        while self._old:
            self._old.pop().unlink()
        place = self._place
        head = {"model_id": place.model, "layer": place.layer, "sae_set": place.source_set}
        body = ", ".join(_feature_json(feature, tokens_of) for feature in features)
        text = to_json(head | {"sae_id_suffix": place.suffix})[:-1] + f', "features": [{body}]}}\n'
        write(self._folder / f"batch-{number}.json", text.encode())

    def finish(self) -> None:
        """Write which features were left out."""
        place, about = self._place, self._about
        skipped = sorted(set(range(about.d_sae)) - set(about.features))
        found = {"model_id": place.model, "layer": str(place.layer), "sae_set": place.source_set}
        # No feature is left out for being rare, so there is no threshold.
        text = to_json(found | {"log_sparsity": None, "skipped_indexes": skipped})
        write(self._folder / "skipped_indexes.json", text.encode())


def _feature_json(feature: Described, tokens_of: Callable[[int], str]) -> str:
    activations = ", ".join(
        f'{{"bin_min": {a.bin_min!r}, "bin_max": {a.bin_max!r}, "bin_contains": {a.bin_contains!r}, '
        f'"tokens": {tokens_of(a.row)}, "values": {a.values}, "qualifying_token_index": {a.token_index}}}'
        for a in feature.activations
    )
    return to_json(feature.fields)[:-1] + f', "activations": [{activations}]}}'


def write(path: Path, content: bytes) -> None:
    """Complete or not at all."""
    with files.replacing(path) as temporary:
        temporary.write_bytes(content)


def check_own(folder: Path, own: str, folders: Sequence[str] = ()) -> list[Path]:
    """Make the folder. Gives the files of an earlier export in it, whose names match `own`; it may hold `folders` too.
    SaezooError if it has anything else in it, or cannot be written."""
    files.check_folder(folder)
    found = sorted(path for path in folder.iterdir() if not (path.name in folders and path.is_dir()))
    for path in found:
        if not path.is_file() or not re.fullmatch(own, path.name):
            raise SaezooError(f"{folder} has other things in it, such as {path.name}; give a new or an empty folder")
    return found
