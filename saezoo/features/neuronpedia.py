"""What Neuronpedia imports: files of one JSON object a line, whose keys are the columns of a table (docs/exports.md).

Columns as in the exporter of SAEDashboard after 0.8.0 (neuronpedia/neuronpedia_export.py) and the schema of Neuronpedia
(apps/webapp/prisma/schema.prisma). Its importer takes the columns of a file from the first line, so all lines have the
same ones.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saezoo.errors import UsageError
from saezoo.features.export import Place, check_own, write
from saezoo.features.records import About
from saezoo.features.saedashboard import Activation, Described, to_json

_COMPRESSION = 5  # as SAEDashboard
_ONLY_IN_BATCHES = ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "vector")


@dataclass(frozen=True)
class Release:
    """Who publishes what; none of it can be known from the SAE."""

    creator_id: str
    """Of an account of Neuronpedia's database; rows of another are refused by it."""
    creator: str
    name: str
    """Of the release, `res-jb`: letters, digits and dashes."""
    title: str
    created: str
    """ISO 8601, of every row."""
    url: str | None = None
    description: str = ""
    """Of the set of sources."""
    hf_repo: str | None = None
    hf_folder: str | None = None
    """Where the SAE lies in `hf_repo`."""


class ImportFiles:
    """`MODEL/SOURCE/` with release, model, sourceset and source.jsonl, and features/ and activations/ with a
    `batch-N.jsonl.gz` for each batch. The same export gives the same bytes."""

    def __init__(self, folder: Path, about: About, place: Place, release: Release) -> None:
        """SaezooError if the source's folder cannot be written, or has anything but these files in it; UsageError for a
        release that lacks something."""
        for what in ("creator_id", "creator", "name", "title", "created"):
            if not getattr(release, what):
                raise UsageError(f"an import of Neuronpedia needs {what.replace('_', ' ')} of the release; it is empty")
        self._folder = folder / place.model / place.source
        self._about, self._place, self._release = about, place, release
        parts = ("features", "activations")
        self._old = check_own(self._folder, r"(release|model|sourceset|source)\.jsonl", parts)
        self._old += (old for part in parts for old in check_own(self._folder / part, r"batch-\d+\.jsonl\.gz"))

    def batch(self, number: int, features: list[Described], tokens_of: Callable[[int], str]) -> None:
        """Write the two files of a batch; before the first, those of an earlier export go."""
        while self._old:
            self._old.pop().unlink()
        self._write_gz("features", number, (to_json(self._neuron(feature)) for feature in features))
        activations = (
            self._activation(feature.fields["feature_index"], order, activation, tokens_of)
            for feature in features
            for order, activation in enumerate(feature.activations)
        )
        self._write_gz("activations", number, activations)

    def finish(self) -> None:
        """Write the four rows that the features belong to."""
        tables = {
            "release": self._release_row(),
            "model": self._model_row(),
            "sourceset": self._set_row(),
            "source": self._source_row(),
        }
        for name, row in tables.items():
            write(self._folder / f"{name}.jsonl", (to_json(row) + "\n").encode())

    def _write_gz(self, part: str, number: int, lines: Iterable[str]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode()
        packed = gzip.compress(content, compresslevel=_COMPRESSION, mtime=0)
        write(self._folder / part / f"batch-{number}.jsonl.gz", packed)

    def _neuron(self, feature: Described) -> dict[str, Any]:
        """A row of table Neuron."""
        place = self._place
        own = {name: value for name, value in feature.fields.items() if name not in _ONLY_IN_BATCHES}
        return {
            "modelId": place.model,
            "layer": place.source,
            "index": str(feature.fields["feature_index"]),
            "creatorId": self._release.creator_id,
            "createdAt": self._release.created,
            "maxActApprox": max((activation.max for activation in feature.activations), default=0.0),
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": 10,
            "hookName": self._about.hook,
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
            **own,
            "sourceSetName": None,
        }

    def _activation(self, feature: int, order: int, a: Activation, tokens_of: Callable[[int], str]) -> str:
        """A row of table Activation."""
        place, release = self._place, self._release
        key = f"{place.model}\n{place.source}\n{feature}\n{order}".encode()
        row = {
            "id": "c" + hashlib.blake2b(key, digest_size=12).hexdigest(),
            "index": str(feature),
            "layer": place.source,
            "modelId": place.model,
            "maxValue": a.max,
            "maxValueTokenIndex": a.max_index,
            "minValue": a.min,
            "creatorId": release.creator_id,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "createdAt": release.created,
            "lossValues": [],
            "logitContributions": None,
            "binMin": a.bin_min,
            "binMax": a.bin_max,
            "binContains": a.bin_contains,
            "qualifyingTokenIndex": a.token_index,
        }
        return f'{to_json(row)[:-1]}, "tokens": {tokens_of(a.row)}, "values": {a.values}}}'

    def _release_row(self) -> dict[str, Any]:
        """Of table SourceRelease."""
        release = self._release
        return {
            "name": release.name,
            "description": release.title,
            "creatorName": release.creator,
            "creatorId": release.creator_id,
            "visibility": "PUBLIC",
            "isNewUi": False,
            "featured": False,
            "descriptionShort": release.title,
            "urls": [release.url] if release.url else [],
            "creatorEmail": None,
            "creatorNameShort": release.creator,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "defaultUmapSourceIds": [],
            "createdAt": release.created,
        }

    def _model_row(self) -> dict[str, Any]:
        """Of table Model. If Neuronpedia has the model, it keeps its own row."""
        model, release = self._place.model, self._release
        return {
            "id": model,
            "instruct": model.endswith("-it"),
            "creatorId": release.creator_id,
            "displayNameShort": model,
            "displayName": model,
            "tlensId": None,
            "dimension": None,
            "visibility": "PUBLIC",
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "inferenceEnabled": False,
            "layers": 0,  # not nullable; SAEDashboard's too
            "neuronsPerLayer": 0,
            "createdAt": release.created,
            "owner": "",
            "updatedAt": release.created,
            "website": None,
        }

    def _set_row(self) -> dict[str, Any]:
        """Of table SourceSet."""
        release = self._release
        return {
            "modelId": self._place.model,
            "name": self._place.source_set,
            "creatorId": release.creator_id,
            "hasDashboards": True,
            "visibility": "PUBLIC",
            "description": release.description,
            "type": "",
            "creatorName": release.creator,
            "urls": [],
            "creatorEmail": None,
            "releaseName": release.name,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
            "createdAt": release.created,
        }

    def _source_row(self) -> dict[str, Any]:
        """Of table Source."""
        about, release = self._about, self._release
        return {
            "id": self._place.source,
            "modelId": self._place.model,
            "setName": self._place.source_set,
            "creatorId": release.creator_id,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "saelensConfig": None,
            "saelensRelease": None,
            "saelensSaeId": None,
            "hfRepoId": release.hf_repo,
            "hfFolderId": release.hf_folder,
            "visibility": "PUBLIC",
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            "num_prompts": about.rows,
            "num_tokens_in_prompt": about.context,
            "dataset": about.text,
            "notes": None,
            "createdAt": release.created,
        }
