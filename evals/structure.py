"""What the decoder alone says: how near features lie to each other, and how far they are made of shared parts.

Shapes: F features, D d_in, M features of the meta-SAE, B rows of a batch, P pairs (row, meta-feature).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saezoo.results import Measured
from saezoo.sae import SAE

CLOSE = 0.9
_BLOCK_BYTES = 256 << 20  # of one block of cosines, float32

WIDTH_RATIO = 4
K = 4
STEPS = 1500
BATCH = 1024
LEARNING_RATE = 5e-4


def structure(sae: SAE, *, seed: int = 0, steps: int = STEPS) -> dict[str, Measured]:
    """Nearest neighbours and meta-structure of the decoder's directions; no text needed, so no intervals.

    Returns `neighbour_cosine`, the mean over features of what `neighbours` gives; `neighbour_close`, the fraction of
    them above 0.9; and `meta_explained`, see there (`seed`, `steps`). Features whose decoder row is zero have
    no direction and are left out. None where fewer than two directions are left, and `meta_explained` also where all
    are the same.
    """
    w_FD = sae.W_dec.detach().float()
    norm_F = w_FD.norm(dim=1)
    w_FD = w_FD[norm_F > 0] / norm_F[norm_F > 0, None]
    measured = dict.fromkeys(("neighbour_cosine", "neighbour_close", "meta_explained"), Measured(None))
    if len(w_FD) > 1:
        nearest_F = neighbours(w_FD).double()
        measured["neighbour_cosine"] = Measured(float(nearest_F.mean()))
        measured["neighbour_close"] = Measured(float((nearest_F > CLOSE).double().mean()))
        measured["meta_explained"] = Measured(meta_explained(w_FD, seed=seed, steps=steps))
    return measured


def neighbours(w_FD: Tensor) -> Tensor:
    """Cosine [F] of each unit row with the nearest other one: max over j != i of w_i . w_j, exact, block by block.

    Sharkey et al. 2022 ("Taking features out of superposition with sparse autoencoders") compare two dictionaries so;
    within one it shows features that are doubled. The cosine is signed: opposite directions are not near.
    """
    n = len(w_FD)
    step = max(1, _BLOCK_BYTES // (4 * n))
    nearest_F = torch.empty(n, dtype=w_FD.dtype, device=w_FD.device)
    for start in range(0, n, step):
        block_BD = w_FD[start : start + step]
        cosine_BF = block_BD @ w_FD.T
        cosine_BF.diagonal(start).fill_(-math.inf)
        nearest_F[start : start + step] = cosine_BF.amax(1)
    return nearest_F.clamp(-1, 1)


def meta_explained(w_FD: Tensor, *, seed: int = 0, steps: int = STEPS) -> float | None:
    """Fraction of the variance of the rows that a small dictionary explains with four parts a row, on average.

    A meta-SAE (Bussmann et al. 2024, "Showing SAE latents are not atomic using meta-SAEs"; SAEBench's meta-structure):
    BatchTopK (Bussmann, Leask & Nanda 2024), a quarter as many features as rows, k = 4, trained for 1,500 steps of
    1,024 rows by Adam (5e-4) on |w - w_hat|^2. Then 1 - sum |w - w_hat|^2 / sum |w - mean w|^2 over all rows, with the
    k F largest of all activations. Higher: features are more like combinations of few shared parts.

    Args:
        w_FD: unit rows.
        seed: of the initial weights and of the batches.
        steps: of training.

    Returns None if the rows have no variance. The result for one seed is reproducible on one machine; other seeds
    scatter.
    """
    variance = float((w_FD - w_FD.mean(0)).double().square().sum())
    if variance <= 1e-9 * len(w_FD):
        return None
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        meta = _MetaSAE(w_FD.clone(), generator)
        optimiser = torch.optim.Adam(meta.parameters(), lr=LEARNING_RATE, fused=True)
        for _ in range(steps):
            rows_B = torch.randint(len(w_FD), (BATCH,), generator=generator).to(w_FD.device)
            x_BD = meta.rows_FD[rows_B]
            row_P, feature_P = meta.chosen(x_BD)
            loss = (x_BD - meta.reconstruct(x_BD, row_P, feature_P)).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return 1 - meta.squared_error() / variance


class _MetaSAE(nn.Module):
    """f = ReLU((w - b_dec) W_enc + b_enc), all but the k B largest f |W_dec| of a batch of B set to 0.

    Only pairs that are kept have a gradient, so everything but the choice is computed for those alone.
    """

    def __init__(self, rows_FD: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.rows_FD = rows_FD
        n, d = rows_FD.shape
        width = max(math.ceil(n / WIDTH_RATIO), K)
        start_MD = F.normalize(torch.randn(width, d, generator=generator), dim=1).to(rows_FD.device)
        self.enc_MD = nn.Parameter(start_MD.clone())
        self.b_enc_M = nn.Parameter(torch.zeros(width, device=rows_FD.device))
        self.dec_MD = nn.Parameter(start_MD.clone())
        self.b_dec_D = nn.Parameter(rows_FD.mean(0))

    @torch.no_grad()
    def strengths(self, x_BD: Tensor) -> Tensor:
        """f |W_dec| [B, M]: what each meta-feature would add, in the rows' own units."""
        f_BM = F.relu(F.linear(x_BD - self.b_dec_D, self.enc_MD, self.b_enc_M))
        length_M: Tensor = self.dec_MD.norm(dim=1)
        return f_BM * length_M

    def chosen(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(row, meta-feature) of the k B strongest pairs of a batch; fewer if fewer are above 0."""
        strength_BM = self.strengths(x_BD)
        value_P, place_P = strength_BM.flatten().topk(K * len(x_BD))
        place_P = place_P[value_P > 0].sort().values
        return place_P // strength_BM.shape[1], place_P % strength_BM.shape[1]

    def reconstruct(self, x_BD: Tensor, row_P: Tensor, feature_P: Tensor) -> Tensor:
        """w_hat [B, D] from the given pairs, ordered by row."""
        inner_P = ((x_BD - self.b_dec_D)[row_P] * self.enc_MD[feature_P]).sum(1)
        f_P = F.relu(inner_P + self.b_enc_M[feature_P])
        firsts_B = torch.searchsorted(row_P, torch.arange(len(x_BD), device=row_P.device))
        sum_BD: Tensor = F.embedding_bag(feature_P, self.dec_MD, firsts_B, mode="sum", per_sample_weights=f_P)
        return self.b_dec_D + sum_BD

    @torch.no_grad()
    def squared_error(self) -> float:
        """Sum over all rows of |w - w_hat|^2 with the k F strongest pairs of all."""
        blocks = torch.split(self.rows_FD, BATCH)
        strongest = torch.zeros(0, device=self.rows_FD.device)
        for x_BD in blocks:
            strongest = torch.cat([strongest, self.strengths(x_BD).flatten()])
            strongest = strongest.topk(min(K * len(self.rows_FD), len(strongest))).values
        least = float(strongest[-1])
        error = 0.0
        for x_BD in blocks:
            strength_BM = self.strengths(x_BD)
            pairs = ((strength_BM >= least) & (strength_BM > 0)).nonzero(as_tuple=True)
            error += float((x_BD - self.reconstruct(x_BD, *pairs)).double().square().sum())
        return error
