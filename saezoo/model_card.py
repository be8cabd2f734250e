"""The model card of a shared collection: README.md for the hub, from records and measurements alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from saezoo.report import METRICS, digits
from saezoo.results import UNDEFINED

if TYPE_CHECKING:
    from saezoo.sae_config import SAEConfig

UNKNOWN = "not measured"
_LICENCES = {
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "cc0-1.0": "cc0-1.0",
    "cc-by-4.0": "cc-by-4.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
    "bsd-3-clause": "bsd-3-clause",
    "gpl-3.0": "gpl-3.0",
    "unlicense": "unlicense",
}
"""Names that the hub knows (huggingface.co/docs/hub/repositories-licenses); others go into `license_name`."""

_INTERVALS = (
    "Intervals are over documents: what another sample of text of the same kind and size would give for the same SAE."
)


@dataclass(frozen=True)
class CardSAE:
    """One SAE of the card."""

    name: str
    """As in the registry: `10`, `11-post`."""
    folder: str
    """In the repository."""
    config: SAEConfig
    row: Mapping[str, str] | None
    """Its row of eval.csv; None if nothing was measured."""


@dataclass(frozen=True)
class Card:
    """Everything that a card says. None is unknown."""

    title: str
    collection: str
    repo: str
    revision: str | None
    """Commit of the files; None before there is one."""
    model_name: str | None
    model_repo: str | None
    model_bundled: bool
    """Whether saezoo brings the model along."""
    licence: str | None
    datasets: tuple[str, ...]
    """Hub repositories of the training text."""
    saes: tuple[CardSAE, ...]
    recipe: Mapping[str, Any] | None
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    pictures: tuple[str, ...] = ()
    overlay: bool = True
    """Whether registry.yaml is in the repository."""


def render(card: Card) -> str:
    """README.md: YAML front matter and Markdown."""
    parts = [
        f"# {escaped(card.title)}",
        _what(card),
        "## Measured",
        *_measured(card.saes),
        *_loading(card),
        "## Recipe",
        _recipe(card),
        *(f"![{name.removesuffix('.png')}]({name})" for name in card.pictures),
        "## Not known",
        "\n".join(f"- {line}" for line in _not_known(card)),
    ]
    return f"---\n{_front_matter(card)}\n---\n\n" + "\n\n".join(parts) + "\n"


def escaped(text: object) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for more than text."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def _front_matter(card: Card) -> str:
    from huggingface_hub import ModelCardData

    known = None if card.licence is None else _LICENCES.get(card.licence.lower())
    other = card.licence if card.licence is not None and known is None else None
    data = ModelCardData(
        library_name="saelens",
        license="other" if other else known,
        license_name=None if other is None else re.sub(r"[^a-z0-9.]+", "-", other.lower()).strip("-") or None,
        base_model=card.model_repo,
        datasets=list(card.datasets) or None,
        tags=["sparse-autoencoder", "mechanistic-interpretability", "saezoo"],
    )
    return str(data.to_yaml()).strip()


def _what(card: Card) -> str:
    model = "an unknown model" if card.model_name is None else f"the model {escaped(card.model_name)}"
    if card.model_bundled:
        model += ", which saezoo brings along"
    if card.model_repo is not None:
        model = f"[{escaped(card.model_name)}](https://huggingface.co/{quote(card.model_repo)})"
    header = ("SAE", "folder", "reads", "d_in", "d_sae", "rows of training")
    rows = []
    for sae in card.saes:
        config = sae.config
        reads = f"{config.hook or 'unknown'}{', minus its mean over d_in' if config.centre else ''}"
        context = "unknown" if config.context_size is None else f"{config.context_size} tokens"
        rows.append((sae.name, sae.folder, reads, config.d_in, config.d_sae, context))
    return f"Sparse autoencoders of {model}.\n\n{_table(header, rows)}"


def _measured(saes: Sequence[CardSAE]) -> list[str]:
    """A table for each SAE, with the sample that its numbers come from."""
    parts = []
    for sae in saes:
        parts.append(f"### SAE {escaped(sae.name)}")
        if sae.row is None:
            parts.append(f"{UNKNOWN.capitalize()}.")
            continue
        about = {key: escaped(sae.row.get(key) or "unknown") for key in ("protocol", "text", "tokens", "documents")}
        sample = f"{about['tokens']} tokens of {about['text']}, from {about['documents']} documents"
        rows = [(label, *_value(sae.row, metric)) for metric, label in METRICS.items()]
        parts.append(f"Protocol {about['protocol']}: {sample}, seed {escaped(sae.row.get('seed') or 'unknown')}.")
        parts.append(_table(("metric", "value", "95 % interval"), rows))
    rows_found = [sae.row for sae in saes if sae.row is not None]
    if any(value for row in rows_found for key, value in row.items() if key.endswith("_lo")):
        parts.append(_INTERVALS)
    elif rows_found:
        parts.append("There are no intervals: the text holds too few documents for them.")
    return [*parts, "All metrics are in `eval.csv`."] if rows_found else parts


def _value(row: Mapping[str, str], metric: str) -> tuple[str, str]:
    """A metric's value and its interval, as far as they are in the row."""
    cells = [row.get(f"{metric}{end}", "") for end in ("", "_lo", "_hi")]
    if cells[0] == UNDEFINED:
        return "undefined on this text", ""
    if not cells[0]:
        return UNKNOWN, ""
    if not (cells[1] and cells[2]):
        return f"{float(cells[0]):.6g}", "unknown"
    value, lo, hi = map(float, cells)
    places = digits(value, lo, hi)
    return f"{value:.{places}f}", f"{lo:.{places}f} to {hi:.{places}f}"


def _loading(card: Card) -> list[str]:
    first = card.saes[0]
    reads = (
        "`x` are activations of the model at the hook. saezoo takes the mean over d_in off them and puts it back;"
        " SAELens wants them without it, as TransformerLens' default, `center_writing_weights=True`, gives them."
        if first.config.centre
        else "`x` are activations of the model at the hook, as they are."
    )
    if len(card.saes) > 1:
        reads = f"SAE {escaped(first.name)}; the others in the same way, by their names and folders. {reads}"
    parts = ["## How to load", reads, "saezoo:", _fenced("python", saezoo_snippet(card))]
    if card.overlay:
        words = ["--registry", "registry.yaml", "eval", card.collection, "all"]
        shell = f"hf download {card.repo} registry.yaml --local-dir .\nsaezoo {shlex.join(words)}"
        parts += ["or, to measure again:", _fenced("console", "\n".join(f"$ {line}" for line in shell.split("\n")))]
    parts += ["SAELens 6:", _fenced("python", saelens_snippet(card))]
    return [*parts, "PyTorch alone:", _fenced("python", torch_snippet(card))]


def saezoo_snippet(card: Card) -> str:
    """Python that loads the first SAE of the card with saezoo, as `sae`."""
    first, pinned = card.saes[0], _pinned(card)
    if not card.overlay:
        return f"from saezoo import SAE\n\nsae = SAE.from_pretrained({card.repo!r}, subfolder={first.folder!r}{pinned})"
    return (
        "from huggingface_hub import hf_hub_download\nfrom saezoo import load\n\n"
        f'registry = hf_hub_download({card.repo!r}, "registry.yaml")\n'
        f"sae = load({card.collection!r}, {first.name!r}, registry=registry)\n"
        "x_hat = sae(x)"
    )


def saelens_snippet(card: Card) -> str:
    """Python that loads the first SAE of the card with SAELens, as `sae`."""
    return (
        f"from sae_lens import SAE\n\nsae = SAE.from_pretrained({card.repo!r}, {card.saes[0].folder!r})\nx_hat = sae(x)"
    )


def torch_snippet(card: Card) -> str:
    """Python that reconstructs `x` with the first SAE of the card, by its formula, as `x_hat`."""
    first = card.saes[0]
    config, file = first.config, f"{first.folder}/sae_weights.safetensors"
    normalised = config.normalise == "layer_norm"
    steps = ["x - mean" if config.centre or normalised else "x"]
    steps += [f"({steps[-1]}) / (std + 1e-5)"] if normalised else []
    steps += [f"({steps[-1]}) - w['b_dec']"] if config.apply_b_dec_to_input else []
    lines = [
        "import torch",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        "",
        f"w = load_file(hf_hub_download({card.repo!r}, {file!r}{_pinned(card)}))",
        *(["mean = x.mean(-1, keepdim=True)"] if config.centre or normalised else []),
        *(["std = x.std(-1, keepdim=True)"] if normalised else []),
        f"q = ({steps[-1]}) @ w['W_enc']",
        *_features(config),
        "x_hat = features @ w['W_dec'] + w['b_dec']",
        *(["x_hat = x_hat * std"] if normalised else []),
        *(["x_hat = x_hat + mean"] if config.centre or normalised else []),
    ]
    return "\n".join(lines)


def _features(config: SAEConfig) -> list[str]:
    """From `q`, x W_enc, to `features`: the formulas of `SAE`'s docstring."""
    if config.activation == "gated":
        return ["features = torch.relu(q * w['r_mag'].exp() + w['b_mag']) * (q + w['b_gate'] > 0)"]
    if config.activation == "relu":
        return ["features = torch.relu(q + w['b_enc'])"]
    if config.activation == "topk":
        return [
            "p = q + w['b_enc']",
            f"top = p.topk({config.k})",
            "features = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())",
        ]
    return ["p = q + w['b_enc']", "features = torch.relu(p) * (p > w['threshold'])"]


def _pinned(card: Card) -> str:
    return "" if card.revision is None else f", revision={card.revision!r}"


def _recipe(card: Card) -> str:
    parts = []
    if card.recipe is None:
        parts.append("Unknown.")
    else:
        values = {key: value for key, value in card.recipe.items() if key != "source"}
        parts.append(_table(("hyperparameter", "value"), list(values.items())))
    told = ("text", "tokens", "seed", "product", "language model", "machine", "speed", "wall time")
    facts = [(key, card.run[key]) for key in told if key in card.run]
    versions = card.run.get("versions")
    if isinstance(versions, Mapping):
        facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    return "\n\n".join([*parts, *([_table(("run", ""), facts)] if facts else [])])


def _not_known(card: Card) -> list[str]:
    """What the card leaves open, and why."""
    lines = ["What another training seed would give: the intervals do not cover it."]
    if any(sae.row is None for sae in card.saes):
        lines = ["How good these SAEs are: nothing was measured."]
    if card.licence is None:
        lines.append("The licence of the weights.")
    if card.recipe is None:
        lines.append("How and on what they were trained.")
    if "versions" not in card.run:
        lines.append("The versions of the software that made them.")
    if str(card.run.get("text", "")).startswith("file:"):
        lines.append(f"The training text {escaped(card.run['text'])}: it is not part of this repository.")
    if card.model_repo is None and not card.model_bundled:
        where = f"the folder {escaped(card.model_name)} beside registry.yaml" if card.overlay else "a folder"
        lines.append(
            f"Where to get the model. If you have it: config.json, model.safetensors, tokenizer.json in {where}."
        )
    if any(sae.config.context_size is None for sae in card.saes):
        lines.append("How many tokens the rows of the training had.")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(escaped(cell) for cell in line) + " |" for line in lines)


def _fenced(language: str, code: str) -> str:
    """A block of code; the names in it are quoted, so that none begins a line with a fence."""
    return f"```{language}\n{code}\n```"
