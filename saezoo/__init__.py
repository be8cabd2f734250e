"""The zoo, the scales and the workshop for sparse autoencoders of language models.

>>> from saezoo import load
>>> sae = load("tiny-res", 2)
>>> features = sae.encode(activations)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saezoo.entries import Entry
from saezoo.errors import (
    DownloadError,
    RegistryError,
    SaezooError,
    TextError,
    TrainingError,
    UploadError,
    UsageError,
    VerificationError,
    WeightsError,
)
from saezoo.loading import load
from saezoo.registry import Registry, read_registry

if TYPE_CHECKING:
    from saezoo.ablation.run import ablate
    from saezoo.reproduction import reproduce
    from saezoo.sae import SAE
    from saezoo.sae_config import SAEConfig
    from saezoo.verification import verify
    from saezoo.workflows import Options, Session, evaluate, load_session

__all__ = [
    "SAE",
    "DownloadError",
    "Entry",
    "Options",
    "Registry",
    "RegistryError",
    "SAEConfig",
    "SaezooError",
    "Session",
    "TextError",
    "TrainingError",
    "UploadError",
    "UsageError",
    "VerificationError",
    "WeightsError",
    "ablate",
    "evaluate",
    "load",
    "load_session",
    "read_registry",
    "reproduce",
    "verify",
]

_NEED_TORCH = {
    "SAE": "saezoo.sae",
    "SAEConfig": "saezoo.sae_config",
    "Options": "saezoo.workflows",
    "Session": "saezoo.workflows",
    "ablate": "saezoo.ablation.run",
    "evaluate": "saezoo.workflows",
    "load_session": "saezoo.workflows",
    "reproduce": "saezoo.reproduction",
    "verify": "saezoo.verification",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use: `import saezoo` itself takes milliseconds."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'saezoo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_NEED_TORCH[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_TORCH})
