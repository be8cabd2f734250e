"""Which features fire together: brute force on small data, planted clusters and groups, and the bounds."""

from __future__ import annotations

import csv
import io
import itertools
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import poisson
from torch import Tensor

from saezoo.features import cooccurrence as module
from saezoo.features.cooccurrence import Cooccurrence, cooccurrence
from saezoo.features.events import Events, Writer
from saezoo.features.groups import Pair, cliques
from saezoo.workflows import Options, prepare

Fires = NDArray[np.bool_]
Make = Callable[[Fires], Events]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The events of a matrix [places, features]."""
    return lambda fires_PF: events_of(tmp_path_factory.mktemp("events"), fires_PF)


def events_of(folder: Path, fires_PF: Fires) -> Events:
    writer = Writer(folder, fires_PF.shape[1], part=max(1, fires_PF.sum() // 3))
    for start in range(0, len(fires_PF), 50):
        token, feature = torch.from_numpy(fires_PF[start : start + 50]).nonzero(as_tuple=True)
        writer.add(feature, token + start, torch.ones(len(token)))
    writer.flush()
    return Events([folder], fires_PF.shape[1])


def random_fires(seed: int, places: int = 400, features: int = 12) -> Fires:
    rng = np.random.default_rng(seed)
    themes = rng.random((places, 4)) < 0.2
    likes = rng.random((4, features)) < 0.4
    return (themes @ likes) & (rng.random((places, features)) < 0.7) | (rng.random((places, features)) < 0.02)


def found(make: Make, fires_PF: Fires, W_dec_FD: Tensor | None = None, **options: float) -> Cooccurrence:
    W_dec_FD = torch.eye(fires_PF.shape[1]) if W_dec_FD is None else W_dec_FD
    return cooccurrence(make(fires_PF), np.ones(len(fires_PF), dtype=bool), W_dec_FD, **options)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(1, 12))
def test_partners_by_brute_force(tmp_path_factory: pytest.TempPathFactory, seed: int, most: int) -> None:
    fires_PF = random_fires(seed)
    events = events_of(tmp_path_factory.mktemp("events"), fires_PF)
    got = cooccurrence(events, np.ones(len(fires_PF), dtype=bool), torch.eye(12), per_feature=most)
    n = fires_PF.sum(0)
    for i in range(12):
        expected = []
        for j in set(range(12)) - {i}:
            both = int((fires_PF[:, i] & fires_PF[:, j]).sum())
            if both and min(n[i], n[j]) >= 10:
                expected.append((-both / int((fires_PF[:, i] | fires_PF[:, j]).sum()), j, both))
        expected = sorted(expected)[:most]
        assert [(-c.jaccard, c.feature, c.both) for c in got.partners[i]] == expected
        for c in got.partners[i]:
            assert c.pmi == pytest.approx(math.log2(c.both * 400 / (n[i] * n[c.feature])))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_groups_by_brute_force(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Every two of a group satisfy the definition, and no pair that does is left with both ends free."""
    fires_PF = random_fires(seed, places=2000, features=10)
    W_FD = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
    events = events_of(tmp_path_factory.mktemp("events"), fires_PF)
    got = cooccurrence(events, np.ones(2000, dtype=bool), W_FD, together=0.2, near=0.1)
    n, both = fires_PF.sum(0), fires_PF.T.astype(int) @ fires_PF.astype(int)
    cosine = torch.nn.functional.cosine_similarity(W_FD[:, None], W_FD[None], dim=-1)
    level = 0.05 / math.comb(int((n >= 10).sum()), 2)
    related: dict[str, set[tuple[int, int]]] = {"clusters": set(), "exclusive": set()}
    for i, j in itertools.combinations(np.flatnonzero(n >= 10).tolist(), 2):
        expected = n[i] * n[j] / 2000
        if both[i, j] / (n[i] + n[j] - both[i, j]) >= 0.2:
            related["clusters"].add((i, j))
        if cosine[i, j] >= 0.1 and both[i, j] <= 0.1 * expected and poisson.cdf(both[i, j], expected) <= level:
            related["exclusive"].add((i, j))
    for kind, pairs in related.items():
        groups = getattr(got, kind)
        taken = [feature for group in groups for feature in group.features]
        assert len(taken) == len(set(taken))
        assert {tuple(sorted(p)) for g in groups for p in itertools.combinations(g.features, 2)} <= pairs
        assert not [pair for pair in pairs if not set(pair) & set(taken)]


def planted(seed: int = 0) -> Fires:
    """6,000 places: 0 to 2 fire together; of 3 to 6 exactly one on every place of a context; 7 to 9 at random."""
    rng = np.random.default_rng(seed)
    fires_PF = rng.random((6000, 11)) < 0.1
    fires_PF[:, :3] = (rng.random(6000) < 0.1)[:, None] & (rng.random((6000, 3)) < 0.9)
    which = np.where(rng.random(6000) < 0.6, rng.integers(3, 7, 6000), -1)
    fires_PF[:, 3:7] = which[:, None] == np.arange(3, 7)
    fires_PF[:, 10] = False
    return fires_PF


def test_a_planted_cluster_and_a_planted_group_are_found(make: Make) -> None:
    fires_PF = planted()
    W_FD = torch.eye(11)
    W_FD[3:7, 0] = 1  # cosine 0.5
    got = found(make, fires_PF, W_FD)
    (cluster,), (group,) = got.clusters, got.exclusive
    assert sorted(cluster.features) == [0, 1, 2]
    assert cluster.tokens == fires_PF[:, :3].any(1).sum()
    assert cluster.mean == pytest.approx(0.81 / 0.99, abs=0.03)
    assert sorted(group.features) == [3, 4, 5, 6]
    assert (group.tokens, group.both) == (fires_PF[:, 3:7].sum(), 0)
    assert group.mean == pytest.approx(0.5)
    n = fires_PF[:, 3:7].sum(0)
    assert group.expected == pytest.approx(sum(int(a) * int(b) for a, b in itertools.combinations(n, 2)) / 6000)


def test_features_far_from_each_other_are_in_no_exclusive_group(make: Make) -> None:
    """` the` and `,` never fire together either: without a near direction that says nothing."""
    assert found(make, planted()).exclusive == ()


def test_too_few_firings_to_tell_that_they_exclude_each_other(make: Make) -> None:
    fires_PF = np.zeros((1000, 2), dtype=bool)
    fires_PF[:40, 0] = fires_PF[40:80, 1] = True  # 1.6 expected
    assert found(make, fires_PF, torch.ones(2, 2)).exclusive == ()
    fires_PF[40:80, 1] = False
    fires_PF[:64, 0], fires_PF[64:128, 1] = True, True  # 4.1 expected: none has a probability of 0.017
    assert [sorted(group.features) for group in found(make, fires_PF, torch.ones(2, 2)).exclusive] == [[0, 1]]


@pytest.mark.parametrize(("both", "groups"), [(100, 1), (101, 0)])
def test_firing_together_less_than_by_chance_is_not_enough(make: Make, both: int, groups: int) -> None:
    """Of 1,000 expected, a tenth: that 500 is no chance either says little of what the features mean."""
    fires_PF = np.zeros((4000, 2), dtype=bool)
    fires_PF[:2000, 0] = fires_PF[2000 - both : 4000 - both, 1] = True
    assert len(found(make, fires_PF, torch.ones(2, 2)).exclusive) == groups


def test_a_feature_that_never_or_rarely_fires_has_no_partner(make: Make) -> None:
    fires_PF = np.zeros((100, 4), dtype=bool)
    fires_PF[:20, :2] = True
    fires_PF[:9, 2] = True
    got = found(make, fires_PF, torch.zeros(4, 2))
    assert [[c.feature for c in partners] for partners in got.partners] == [[1], [0], [], []]
    assert got.fires == (20, 20, 9, 0)


def test_without_any_firing(make: Make) -> None:
    got = found(make, np.zeros((5, 3), dtype=bool))
    assert (got.tokens, got.fires, list(got.partners)) == (5, (0, 0, 0), [(), (), ()])
    assert (got.clusters, got.exclusive) == ((), ())
    assert got.groups_csv() == "kind,group,size,feature,fires,mean,tokens,both,expected\n"


def test_equal_partners_come_by_their_index(make: Make) -> None:
    fires_PF = np.zeros((50, 30), dtype=bool)
    fires_PF[:20] = True
    got = found(make, fires_PF, per_feature=3)
    assert [c.feature for c in got.partners[1]] == [0, 2, 3]
    assert [c.feature for c in got.partners[20]] == [0, 1, 2]
    assert [len(group.features) for group in got.clusters] == [30]


def test_blocks_change_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fires_PF = planted()
    whole = found(make, fires_PF, together=0.1, near=-1)
    monkeypatch.setattr(module, "_BLOCK_CELLS", 22)
    assert found(make, fires_PF, together=0.1, near=-1) == whole


@pytest.mark.parametrize("bound", ["_MOST_PRODUCTS", "_MOST_FIRINGS"])
def test_a_long_text_is_counted_up_to_the_bound(make: Make, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """What is counted is the beginning of the text, exactly; unscored places are no tokens."""
    fires_PF, scored_P = planted(), np.arange(6000) % 10 > 0
    fires_PF[~scored_P] = False
    cost = np.cumsum(fires_PF.sum(1).astype(int) ** (2 if bound == "_MOST_PRODUCTS" else 1))
    monkeypatch.setattr(module, bound, int(cost[2999]))
    end = int(np.flatnonzero(cost <= cost[2999])[-1]) + 1
    got = cooccurrence(make(fires_PF), scored_P, torch.eye(11))
    monkeypatch.undo()
    assert got.tokens == scored_P[:end].sum()
    assert got == cooccurrence(make(fires_PF[:end]), scored_P[:end], torch.eye(11))


def test_of_very_many_pairs_the_strongest_are_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fires_PF = random_fires(3)
    every = found(make, fires_PF, together=1e-9)
    monkeypatch.setattr(module, "_MOST_PAIRS", 1)
    few = found(make, fires_PF, together=1e-9)
    assert few.clusters[0].features[:2] == every.clusters[0].features[:2]
    assert max(len(group.features) for group in few.clusters) < max(len(group.features) for group in every.clusters)


def test_tables(make: Make) -> None:
    W_FD = torch.eye(11)
    W_FD[3:7, 0] = 1
    got = found(make, planted(), W_FD)
    pairs = list(csv.DictReader(io.StringIO(got.pairs_csv())))
    assert len(pairs) == sum(map(len, got.partners))
    first, partner = pairs[0], got.partners[0][0]
    assert [int(first[name]) for name in ("feature_a", "feature_b", "both")] == [0, partner.feature, partner.both]
    assert float(first["expected"]) == got.fires[0] * got.fires[partner.feature] / 6000
    assert (float(first["jaccard"]), float(first["pmi"])) == (partner.jaccard, partner.pmi)
    groups = list(csv.DictReader(io.StringIO(got.groups_csv())))
    assert [(row["kind"], row["group"], row["size"]) for row in groups] == [("cluster", "0", "3")] * 3 + [
        ("exclusive", "0", "4")
    ] * 4
    assert [int(row["fires"]) for row in groups] == [got.fires[int(row["feature"])] for row in groups]
    assert float(groups[3]["mean"]) == got.exclusive[0].mean


def test_on_progress_reaches_the_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_BLOCK_CELLS", 44)
    cooccurrence(make(planted()), np.ones(6000, dtype=bool), torch.eye(11), on_progress=lambda *at: seen.append(at))
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_cliques_do_not_chain() -> None:
    chain = [Pair(0, 1, 0.9), Pair(1, 2, 0.8), Pair(2, 3, 0.9), Pair(3, 4, 0.7)]
    assert cliques(chain) == [((0, 1), 0.9), ((2, 3), 0.9)]


def test_cliques_grow_by_the_largest_sum_of_weights() -> None:
    square = [Pair(a, b, 0.5) for a, b in itertools.combinations(range(4), 2)]
    assert cliques([*square, Pair(0, 9, 0.6), Pair(1, 9, 0.7)]) == [((1, 9, 0), 0.6), ((2, 3), 0.5)]
    assert cliques(square) == [((0, 1, 2, 3), 0.5)]
    rivals = [Pair(0, 1, 1.0), Pair(0, 2, 0.5), Pair(1, 2, 0.5), Pair(0, 3, 0.75), Pair(1, 3, 0.5)]
    assert cliques(rivals) == [((0, 1, 3), 0.75)]
    assert cliques([]) == []


def test_memory_never_holds_every_pair(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 3,000 features fires with each other one: a table of them would be 36 MB in int32 alone."""
    fires_PF = np.zeros((1000, 3000), dtype=bool)
    fires_PF[:12] = True
    events, scored_P = make(fires_PF), np.ones(1000, dtype=bool)
    monkeypatch.setattr(module, "_BLOCK_CELLS", 1 << 16)
    monkeypatch.setattr(module, "_MOST_PAIRS", 8)
    tracemalloc.start()
    got = cooccurrence(events, scored_P, torch.zeros(3000, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(got.clusters[0].features) == 9
    assert peak < 36e6


def test_the_two_features_of_commas_at_the_embedding_of_tiny_res(tmp_path: Path) -> None:
    """docs/cooccurrence.md has them on the whole text; their directions are near each other, yet they go together."""
    options = Options()
    task = prepare("tiny-res", 0, tokens=8192, protocol="standard", model=None, layout=None, options=options)
    tokens_RT, sae = torch.from_numpy(task.rows.tokens_RT), task.subjects[0].sae
    with torch.inference_mode():
        f_PF = sae.encode(task.lm.residuals(tokens_RT, [0])[0]).flatten(0, 1)
    scored_P = task.rows.tokens_RT.ravel() != task.lm.bos
    events = events_of(tmp_path, (f_PF > 0).numpy() & scored_P[:, None])
    got = cooccurrence(events, scored_P, sae.W_dec)
    assert got.tokens == scored_P.sum() < 8192
    assert (167, 729) in [tuple(sorted(group.features)) for group in got.clusters]
    assert got.partners[167][0].feature == 729
