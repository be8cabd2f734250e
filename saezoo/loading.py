"""`load`: a name from the registry, or a local folder, to an SAE that is ready to use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from saezoo import hub
from saezoo.entries import Entry
from saezoo.errors import DownloadError, UsageError, WeightsError
from saezoo.registry import read_registry

if TYPE_CHECKING:
    import torch

    from saezoo.sae import SAE


def load(
    name: str | Path,
    layer: int | str | None = None,
    *,
    layout: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = "float32",
    offline: bool = False,
    registry: str | Path | None = None,
) -> SAE:
    """Load one SAE: `load("gpt2-small-res", 10)`, or `load("path/to/folder")` for local files.

    Args:
        name: a collection of the registry; or, without `layer`, a folder or file in any of the formats of
            docs/formats.md, told by what it holds: here, or on the hub as `owner/repository/folder`.
        layer: the entry's name within the collection, such as 10 or "11-post".
        layout: which published form of a registry entry to read; the first by default.
        device: where the weights go.
        dtype: of the weights, as a torch.dtype or its name. float32 weights on the CPU stay memory-mapped.
        offline: never touch the network.
        registry: an overlay file (see `read_registry`).

    Raises:
        UsageError: an unknown collection or layer.
        DownloadError: files missing and unreachable, or not the promised ones.
        WeightsError: files corrupt, of the wrong shapes, or of an unsupported kind.
    """
    from saezoo import formats
    from saezoo.sae import from_weights

    torch_dtype = named_dtype(dtype)
    if layer is None:
        path = locate(name, offline=offline)
        if path is None:
            raise UsageError(f"no folder `{name}`; for a registry entry give a layer as well: load({str(name)!r}, 10)")
        return from_weights(formats.read(path), str(path), device=device, dtype=torch_dtype)
    entries = read_registry(registry).find(str(name), layer)
    if len(entries) != 1:
        raise UsageError(f"`{layer}` names {len(entries)} SAEs of `{name}`; load takes one at a time")
    return load_entry(entries[0], layout=layout, device=device, dtype=torch_dtype, offline=offline)


def locate(name: str | Path, *, offline: bool = False) -> Path | None:
    """The folder or file called `name`: here, or fetched from the hub if it could be one of its names; else None.

    Raises DownloadError if the hub has no such SAE or cannot be reached.
    """
    if Path(name).exists():
        return Path(name)
    if not hub.is_hub_name(str(name)):
        return None
    try:
        return hub.fetch_sae(str(name), offline=offline)
    except DownloadError as error:
        raise DownloadError(f"there is no folder {name} here, and {error}") from None


def load_entry(
    entry: Entry, *, layout: str | None = None, device: str = "cpu", dtype: torch.dtype, offline: bool = False
) -> SAE:
    """Load the SAE of a registry entry; what the registry says about its input wins over its cfg.json."""
    from saezoo import formats
    from saezoo.sae import SAE, placed
    from saezoo.sae_config import config_from

    fetched = hub.fetch(entry, layout, offline=offline)
    name = hub.layout_of(entry, layout).format
    weights = formats.read_as(name, fetched.weights, fetched.config, fetched.sparsity)
    found = tuple(weights.tensors["W_enc"].shape)
    where = str(fetched.weights)
    if found != (entry.d_in, entry.d_sae):
        raise WeightsError(f"{where}: W_enc is {list(found)}, the registry says [{entry.d_in}, {entry.d_sae}]")
    described = config_from(weights.config, where, entry.d_in, entry.d_sae)
    if described.hook not in (None, entry.hook):
        raise WeightsError(f"{where} was trained at {described.hook}, the registry says {entry.hook}")
    config = dataclasses.replace(
        described,
        hook=entry.hook,
        model_name=entry.model_name,
        context_size=described.context_size if entry.context_size is None else entry.context_size,
        prepend_bos=entry.prepend_bos,
        centre=entry.centre,
    )
    return SAE(config, placed(weights.tensors, device, dtype), weights.log_sparsity)


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`"bfloat16"` or `"bf16"` -> torch.bfloat16; UsageError for a name that is no floating-point dtype."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
    found = known.get(short.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if found not in known.values():
        raise UsageError(f"dtype `{dtype}` is not supported; use {', '.join(known)}")
    assert found is not None
    return found
