"""What the registry knows, as frozen dataclasses. Unknown is None. docs/registry.md describes every key.

`Entry` is one SAE with everything resolved; the other records are the blocks of `registry.yaml`, as written there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from saezoo.errors import UsageError, shown

Protocol = Literal["standard", "feb2024"]


def check_inside(key: str, name: str) -> None:
    """ValueError if the file name `name`, given under `key`, leads out of the folder or repository it belongs to."""
    parts = re.split(r"[/\\]", name)
    if ":" in name or "" in parts or "." in parts or ".." in parts:
        raise ValueError(f"`{key}` must be a file name inside the folder or repository, not `{shown(name)}`")


def _check_repository(repo: str | None, revision: str | None) -> None:
    """ValueError if they could name anything but a repository of the hub and one of its revisions."""
    if repo is not None and (not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", repo, re.ASCII) or ".." in repo):
        raise ValueError(f"`repo` must be a hub id like `openai-community/gpt2`, not `{shown(repo)}`")
    if revision is not None and (not re.fullmatch(r"\w[\w./-]{0,200}", revision, re.ASCII) or ".." in revision):
        raise ValueError(f"`revision` must be a commit, branch or tag, not `{shown(revision)}`")


@dataclass(frozen=True)
class FileFacts:
    """What is known about the bytes of one file; None where nobody has published it."""

    sha256: str | None
    bytes: int | None

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"`sha256` must be 64 hexadecimal digits, not `{self.sha256}`")


@dataclass(frozen=True)
class Layout:
    """One published form of an SAE. In `registry.yaml` the file names may hold `{hook}`, `{layer}` and `{d_sae}`."""

    format: Literal["saelens", "legacy", "dictionary_learning", "sparsify", "openai", "gemma_scope"]
    """`saelens`: a folder of cfg.json + safetensors. `legacy`: the pickle of February 2024. docs/formats.md."""
    weights: str
    config: str | None
    sparsity: str | None
    source: tuple[str, ...]
    repo: str | None = None
    """Hugging Face model repository, or None for files that lie in `folder`."""
    revision: str | None = None
    folder: str | None = None
    """Folder of the files, relative to the registry file (to the package for the built-in one)."""
    facts: dict[str, FileFacts] = field(default_factory=dict)
    """`weights`, `config`, `sparsity` -> size and hash; in `registry.yaml` they stand with each SAE, under `files`."""

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.folder is None):
            raise ValueError("give either `repo` (on the hub) or `folder` (local files)")
        described = self.format in ("saelens", "dictionary_learning", "sparsify")
        if described == (self.config is None):
            which = "names its description (cfg.json)" if described else "is null"
            raise ValueError(f"`config` {which} for the format {self.format}")
        for key in ("weights", "config", "sparsity"):
            if (name := getattr(self, key)) is not None:
                check_inside(key, name)
        _check_repository(self.repo, self.revision)


@dataclass(frozen=True)
class Model:
    """The frozen language model that an SAE reads."""

    architecture: Literal["gpt2"]
    n_layers: int
    d_model: int
    n_positions: int
    vocab: int
    licence: str
    source: tuple[str, ...]
    repo: str | None = None
    revision: str | None = None
    folder: str | None = None
    facts: dict[str, FileFacts] = field(default_factory=dict)
    """File name -> size and hash."""

    def __post_init__(self) -> None:
        for name in self.facts:
            check_inside("facts", name)
        _check_repository(self.repo, self.revision)


@dataclass(frozen=True)
class Dataset:
    """Text on the Hugging Face hub that the SAE was trained on."""

    repo: str
    revision: str | None
    data_files: str | None
    """Glob of parquet files in the repository; None lets `datasets` find them."""
    split: str
    text_column: str
    licence: str | None
    source: tuple[str, ...]
    heldout_files: str | None = None
    """Glob of files that `data_files` leaves out; `reproduce` evaluates on them."""


@dataclass(frozen=True)
class Recipe:
    """Every hyperparameter of one training; units in the field docs. No run-time options (device, paths) in here."""

    l1_coefficient: float
    """λ in MSE + λ·mean_b Σ_i w_i f_bi; `loss` says what MSE and w_i are."""
    lr: float
    lr_warmup_steps: int
    """Linear from 0 over this many steps; 0 is a constant rate."""
    batch_size: int
    """Activations in one step."""
    tokens: int
    """Activations to train on; the last step may overshoot."""
    store_rows: int
    """Rows of `context_size` tokens in one call of the token store."""
    buffer_batches: int
    """The activation buffer holds this many store calls; half of it is refilled at a time."""
    buffer: Literal["bug", "fixed"]
    """Which half of the mixed buffer is trained on: `bug` the half that also stays, `fixed` the other one."""
    ghost: Literal["off", "bug", "fixed"]
    """Ghost gradients: `bug` exp(ReLU(pre)) as the post ran it, `fixed` exp(pre)."""
    dead_after_steps: int
    """A feature that has not fired for more than this many steps gets ghost gradients."""
    sampling_window_steps: int
    """Log feature sparsity is computed over the last complete window of this many steps."""
    b_dec_init: Literal["geometric_median", "mean", "zero"]
    skip_documents: int
    """Documents lost at the start of the data; the original's start-up check consumed two."""
    source: tuple[str, ...]
    loss: Literal["feb2024", "standard"] = "feb2024"
    """`feb2024`: MSE is the mean over batch and dimensions of e²/‖x_b‖, w_i is 1, decoder rows are kept at norm 1.
    `standard`: MSE is the mean over the batch of Σ_d e², w_i is the norm of decoder row i, which is free."""
    l1_warmup_steps: int = 0
    """λ rises linearly from 0 over this many steps; 0 is a constant λ."""
    encoder_init: Literal["kaiming", "decoder"] = "kaiming"
    """How W_enc starts: uniform as PyTorch's Kaiming initialisation, or as the decoder's transpose."""
    resample_every_steps: int = 0
    """Four times, after so many steps each, features that did not fire in the latter half of these begin anew, as in
    Bricken et al. 2023; 0: never."""
    input_scale: float = 1.0
    """Activations are multiplied by this for training; the SAE that is saved reads them as they are."""

    def __post_init__(self) -> None:
        positive = ("l1_coefficient", "lr", "batch_size", "tokens", "store_rows", "dead_after_steps", "input_scale")
        for name in (*positive, "sampling_window_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, not {getattr(self, name)}")
        for name in ("lr_warmup_steps", "l1_warmup_steps", "skip_documents", "resample_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, not {getattr(self, name)}")
        if self.loss == "standard" and self.ghost != "off":
            raise ValueError(f"`ghost` must be off with the loss `standard`, not {self.ghost}")
        if self.buffer_batches < 2 or self.buffer_batches % 2:
            raise ValueError(f"`buffer_batches` must be even and at least 2, not {self.buffer_batches}")
        if self.resample_every_steps == 1:
            raise ValueError("`resample_every_steps` must be 0 or at least 2: half of them are the window")


@dataclass(frozen=True)
class Published:
    """Which protocol and sample the published numbers of a collection were measured with, and what they mean."""

    protocol: Protocol
    sample: str
    definitions: dict[str, str]
    """Our metric's name -> how the source defines it."""
    source: tuple[str, ...]
    tokens: int | None = None
    """Scored tokens that each value rests on."""
    text: str | None = None
    """Where all of those tokens came from, as `Result.text`, if that can be had: `builtin:heldout`."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"`tokens` must be above 0, not {self.tokens}")


@dataclass(frozen=True)
class Entry:
    """One SAE of the zoo, everything resolved."""

    collection: str
    name: str
    """What users type after the collection: `10`, or `11-post`."""
    in_all: bool
    """False for siblings that `all` leaves out."""
    title: str
    layer: int
    hook: str
    """TransformerLens' name of the activation, e.g. `blocks.10.hook_resid_pre`."""
    model_name: str
    model: Model
    d_in: int
    d_sae: int
    context_size: int | None
    """Tokens per row in training; positions beyond it were never seen."""
    prepend_bos: bool
    centre: bool
    """True: the SAE wants the residual minus its mean over d_model (TransformerLens' centred writing weights)."""
    dtype: str
    licence: str | None
    layouts: dict[str, Layout]
    """In order of preference; `load` takes the first."""
    neuronpedia: str | None
    definitions: Published
    published: dict[str, float | None]
    """Our metric's name -> the published value."""
    recipe_name: str | None
    recipe: Recipe | None
    dataset_name: str | None
    """None: the bundled training text if the recipe is known, else unknown."""
    dataset: Dataset | None
    source: tuple[str, ...]
    origin: str
    """The registry file this came from; `built-in` for the package's own."""

    @property
    def known_context(self) -> int:
        """`context_size`; UsageError if it is unknown, since no row can be packed for training then."""
        if self.context_size is None:
            name = f"{self.collection} {self.name}"
            raise UsageError(f"the context size of {name} is unknown; set `context_size` in {self.origin} to train")
        return self.context_size

    @property
    def known_recipe(self) -> Recipe:
        """`recipe`; UsageError if it is unknown."""
        if self.recipe is None:
            raise UsageError(f"the recipe of {self.collection} is unknown; choose one of the registry: --recipe NAME")
        return self.recipe
