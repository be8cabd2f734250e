"""Metrics of the weights alone; no text needed. The neighbours of decoder rows are in `structure.py`."""

from __future__ import annotations

import torch

from saezoo.codes import SPARSE_BLOCK, blocks, in_rows
from saezoo.results import Measured, measured
from saezoo.sae import SAE


def parameter_metrics(sae: SAE) -> dict[str, Measured]:
    """Norms of the decoder's rows (mean, least, largest) and of the encoder's columns (mean), and the mean cosine of
    each feature's encoder column and decoder row (SAELens' feature-wise `encoder_decoder_cosine_sim`).

    A feature whose encoder or decoder is zero has no cosine and is left out of that mean.
    """
    parts = []
    for features in blocks(sae.config.d_sae, SPARSE_BLOCK):
        enc_CD, dec_CD = in_rows(sae.W_enc.T[features]), sae.W_dec[features]
        parts.append(torch.stack([enc_CD.norm(dim=1), dec_CD.norm(dim=1), (enc_CD * dec_CD).sum(1)]))
    encoder_F, decoder_F, dot_F = torch.cat(parts, dim=1).double().cpu()
    cosine_F = (dot_F / (encoder_F * decoder_F))[(encoder_F > 0) & (decoder_F > 0)]
    return {
        "decoder_norm": measured(float(decoder_F.mean())),
        "decoder_norm_min": measured(float(decoder_F.min())),
        "decoder_norm_max": measured(float(decoder_F.max())),
        "encoder_norm": measured(float(encoder_F.mean())),
        "encoder_decoder_cosine": measured(float(cosine_F.mean())),
    }
