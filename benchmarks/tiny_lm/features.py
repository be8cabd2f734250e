"""Strongest contexts of features of `tiny-res`, for naming them by eye.

    python benchmarks/tiny_lm/features.py LAYER [FEATURE ...]

Without features: those whose ten strongest tokens come from ten different documents, by how much they exceed their
own mean. Text: the bundled held-out split, which neither the model nor the SAEs were trained on.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from saezoo import load, tokens
from saezoo.hub import fetch_model
from saezoo.lm import LanguageModel, load_language_model
from saezoo.registry import read_registry

_SHOWN = 10
_CONTEXT = 128


def encode_heldout(lm: LanguageModel, layer: int, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, F], token ids [N] and document indices [N] of the held-out text, BOS positions set to zero."""
    sae = load("tiny-res", layer)
    source = tokens.builtin("heldout")
    packed = tokens.pack(tokens.encode(lm.tokenizer, source.documents()), bos=lm.bos, context=_CONTEXT)
    rows = tokens.collect(packed, tokens=n_tokens, context=_CONTEXT, source=source.name)
    ids_RT = torch.from_numpy(rows.tokens_RT)
    f_NF = torch.cat(
        [sae.encode(lm.residuals(block, [layer])[layer]).flatten(0, 1) for block in torch.split(ids_RT, 32)]
    )
    f_NF[ids_RT.flatten() == lm.bos] = 0
    return f_NF, ids_RT.flatten(), torch.from_numpy(rows.documents_RT).flatten()


def show(lm: LanguageModel, f_N: Tensor, ids_N: Tensor, documents_N: Tensor) -> str:
    """The strongest contexts, at most one per document, the token itself in brackets."""
    lines: list[str] = []
    seen: set[int] = set()
    for i in f_N.argsort(descending=True).tolist():
        document = int(documents_N[i])
        if document in seen or f_N[i] == 0:
            continue
        seen.add(document)
        start = i - i % _CONTEXT
        before = lm.tokenizer.decode(ids_N[max(start, i - 12) : i].tolist())
        after = lm.tokenizer.decode(ids_N[i + 1 : min(start + _CONTEXT, i + 5)].tolist())
        token = lm.tokenizer.decode([int(ids_N[i])])
        lines.append(f"  {f_N[i]:6.1f}  {before}[[{token}]]{after}".replace("\n", "\\n"))
        if len(lines) == _SHOWN:
            break
    return "\n".join(lines)


def main() -> None:
    layer, wanted = int(sys.argv[1]), [int(a) for a in sys.argv[2:]]
    lm = load_language_model(fetch_model(read_registry().models["tiny-lm"]))
    with torch.inference_mode():
        f_NF, ids_N, documents_N = encode_heldout(lm, layer, 120_000)
        density_F = (f_NF > 0).float().mean(0)
        if not wanted:
            usable = (density_F > 1e-4) & (density_F < 2e-2)
            peak_F = f_NF.amax(0) / f_NF.mean(0).clamp(min=1e-9) * usable
            wanted = peak_F.argsort(descending=True)[:120].tolist()
        for feature in wanted:
            print(f"\nlayer {layer} feature {feature}, density {float(density_F[feature]):.5f}")
            print(show(lm, f_NF[:, feature], ids_N, documents_N))


if __name__ == "__main__":
    main()
