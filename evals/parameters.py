"""Metrics of the weights alone; no text needed. The neighbours of decoder rows are in `structure.py`."""

from __future__ import annotations

from saezoo.results import Measured, measured
from saezoo.sae import SAE


def parameter_metrics(sae: SAE) -> dict[str, Measured]:
    """Norms of the decoder's rows (mean, least, largest) and of the encoder's columns (mean), and the mean cosine of
    each feature's encoder column and decoder row. SAELens' feature-wise `encoder_decoder_cosine_sim` is the same."""
    enc_norm_F, dec_norm_F = sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1)
    dot_F = (sae.W_enc.T * sae.W_dec).sum(1)
    return {
        "decoder_norm": measured(float(dec_norm_F.double().mean())),
        "decoder_norm_min": measured(float(dec_norm_F.min())),
        "decoder_norm_max": measured(float(dec_norm_F.max())),
        "encoder_norm": measured(float(enc_norm_F.double().mean())),
        "encoder_decoder_cosine": measured(float((dot_F / (enc_norm_F * dec_norm_F)).double().mean())),
    }
