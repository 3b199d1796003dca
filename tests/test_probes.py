"Probes against naive loops in float64, planted faults, and the projection of the real radiographs."

import pickle

import numpy as np
import pytest
import torch

from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
from cxrpaper.evaluation.metrics import point_metrics
from cxrpaper.models.nets import Encoder
from cxrpaper.models.weights import load_pretrained
from cxrpaper.runs import InputError, project_root
from cxrpaper.training.loop import Batches, embed
from cxrpaper.training.probes import (
    Collapse,
    alignment,
    choose_C,
    collapse_statistics,
    collapsed,
    fit_linear,
    grouped_folds,
    knn_scores,
    linear_scores,
    nearest,
    neighbours,
    project_2d,
    uniformity,
)

CXR = project_root().parent / 'shared' / 'data' / 'real_cxr'
needs_cxr = pytest.mark.skipif(
    not CXR.is_dir(), reason='the real radiographs are not on this machine (../shared/data/real_cxr)'
)


def patients(n=60, images=3, d=24, signal=0.0, own=0.0, seed=0):
    "Rows of `n` patients with one class each: noise, a direction of the class, a direction of the patient."
    g = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n), images)
    y = groups % 4
    return (
        g.normal(size=(len(y), d)) + signal * g.normal(size=(4, d))[y] + own * g.normal(size=(n, d))[groups],
        y,
        groups,
    )


def refused(f, *args, contains, **kw):
    with pytest.raises(InputError) as e:
        f(*args, **kw)
    assert contains in str(e.value) and e.value.hint


def unit(x):
    return [np.array(v, float) / np.sqrt(sum(float(u) ** 2 for u in v)) for v in x]


# ---- naive loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('k,T', [(1, 0.07), (7, 0.07), (20, 1.0)])
def test_knn_equals_a_loop(k, T):
    x, y, groups = patients(signal=0.5, own=0.5)
    z = unit(x)
    p = knn_scores(x, y, groups, k=k, T=T)
    for i in range(len(x)):
        others = sorted(((float(z[i] @ z[j]), j) for j in range(len(x)) if groups[j] != groups[i]), reverse=True)[:k]
        votes = np.zeros(4)
        for s, j in others:
            votes[y[j]] += np.exp(s / T)
        np.testing.assert_allclose(p[i], votes / votes.sum(), rtol=1e-9, atol=1e-12)


def test_knn_of_other_images_equals_a_loop():
    x, y, _ = patients(signal=1)
    q = patients(10, 2, seed=1)[0]
    z, w = unit(x), unit(q)
    for i, p in enumerate(knn_scores(x, y, queries=q, k=9)):
        order = sorted(range(len(z)), key=lambda j: -float(w[i] @ z[j]))[:9]
        v = np.bincount(y[order], [np.exp(float(w[i] @ z[j]) / 0.07) for j in order], minlength=4)
        np.testing.assert_allclose(p, v / v.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('alpha', [1, 2, 3.5])
def test_alignment_equals_a_loop(alpha):
    a, b = patients()[0], patients(seed=1)[0]
    want = np.mean([np.sqrt(((u - v) ** 2).sum()) ** alpha for u, v in zip(unit(a), unit(b))])
    assert alignment(a, b, alpha) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize('block', [1, 100, 1000, 1 << 24])
@pytest.mark.parametrize('t', [0.5, 2])
def test_uniformity_equals_a_loop_in_blocks(block, t):
    z = unit(x := patients(25)[0])
    pairs = [np.exp(-t * ((z[i] - z[j]) ** 2).sum()) for i in range(len(z)) for j in range(i)]
    assert uniformity(x, t, block) == pytest.approx(np.log(np.mean(pairs)), rel=1e-12)


@pytest.mark.parametrize('shape', [(20, 50), (50, 20)])
def test_collapse_statistics_equal_a_singular_value_decomposition(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.7 + 0.3
    z = np.array(unit(x))
    z = z - z.mean(0)
    s = np.linalg.svd(z, compute_uv=False)
    s = s[s > 1e-9]
    got = collapse_statistics(x)
    p = s / s.sum()
    assert got['spread'] == pytest.approx(np.mean([np.sqrt(np.mean(c**2)) for c in z.T]) * np.sqrt(shape[1]), rel=1e-10)
    assert got['effective_rank'] == pytest.approx(np.exp(-sum(p * np.log(p))), rel=1e-6)
    assert (
        got['leading'] == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), rel=1e-10) and (got['n'], got['d']) == shape
    )


@pytest.mark.parametrize('d', [20, 400])  # fewer and more dimensions than images
def test_fast_logistic_regression_equals_an_exact_one(d):
    from sklearn.linear_model import LogisticRegression

    x, y, groups = patients(d=d, signal=0.3)
    train, test = next(grouped_folds(y, groups, 5, 0))
    m, s = x[train].mean(0), x[train].std(0)
    Cs = (1e-4, 1e-2, 0.1)
    for C, got in zip(Cs, fit_linear(x, y, train, test, Cs)):
        want = (
            LogisticRegression(C=C, tol=1e-9, max_iter=9999)
            .fit((x[train] - m) / s, y[train])
            .predict_proba((x[test] - m) / s)
        )
        assert abs(got - want).max() < 0.03, (C, abs(got - want).max())
        assert abs(point_metrics(y[test], got)['auc_macro'] - point_metrics(y[test], want)['auc_macro']) < 0.01


# ---- what must not matter ---------------------------------------------------------------------------------------------------


def test_scale_and_rotation_do_not_matter():
    x, y, groups = patients(signal=1)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0]
    lengths = np.random.default_rng(2).uniform(0.01, 100, (len(x), 1))
    for other in (x * 1e4, x * 1e-4, x * lengths, x @ turn):
        np.testing.assert_allclose(knn_scores(other, y, groups), knn_scores(x, y, groups), rtol=1e-7, atol=1e-10)
        assert alignment(other, np.roll(other, 1, 0)) == pytest.approx(
            alignment(x, np.roll(x, 1, 0)), rel=1e-10
        ) and uniformity(other) == pytest.approx(uniformity(x), rel=1e-10)
        now, was = collapse_statistics(other), collapse_statistics(x)
        assert now['effective_rank'] == pytest.approx(was['effective_rank'], rel=1e-8) and now[
            'leading'
        ] == pytest.approx(was['leading'], rel=1e-8)
    np.testing.assert_allclose(
        linear_scores(x * np.linspace(0.1, 9, 24) + 5, y, groups), linear_scores(x, y, groups), atol=1e-3
    )  # each dimension is standardised


def test_blocks_names_and_types_do_not_matter():
    x, y, groups = patients(signal=1)
    names = np.array([f'p{g}' for g in groups], object)
    for block in (1, 500, 1 << 24):
        assert torch.equal(nearest(x, x, 5, groups, groups, block)[0], nearest(x, x, 5, names, names)[0])
    assert (linear_scores(x, y, names) == linear_scores(torch.from_numpy(x), torch.from_numpy(y), names)).all()
    assert (linear_scores(x, y, groups, seed=1) != linear_scores(x, y, groups, seed=0)).any()
    assert (project_2d(x[:60], seed=1) == project_2d(x[:60], seed=1)).all()


# ---- groups -----------------------------------------------------------------------------------------------------------------


def test_planted_duplicates_do_not_vote():
    x, y, groups = patients(own=0)
    x[1::3], x[2::3] = x[::3], x[::3]  # three copies of one image a patient
    rows, _ = neighbours(x, groups, np.arange(len(x)), 20)
    assert (groups[rows.numpy()] != groups[:, None]).all()
    auc = lambda p: point_metrics(y, p)['auc_macro']
    alone = np.arange(len(x))
    assert (
        auc(knn_scores(x, y, alone, k=5)) > 0.95 and auc(linear_scores(x, y, alone, C=10)) > 0.8
    )  # groups ignored: the copies answer
    assert auc(knn_scores(x, y, groups, k=5)) < 0.6 and auc(linear_scores(x, y, groups, C=10)) < 0.6
    z = x.copy()
    mine = groups == 7
    labels = y.copy()
    labels[mine] = (y[mine] + 1) % 4
    np.testing.assert_array_equal(
        knn_scores(z, labels, groups)[mine], knn_scores(x, y, groups)[mine]
    )  # a patient's own labels change nothing in the answer


def test_linear_probe_trains_without_the_tested_group():
    x, y, groups = patients(signal=0.5)
    for n in (3, 5):
        parts = list(grouped_folds(y, groups, n, 0))
        assert sorted(np.concatenate([t for _, t in parts])) == list(range(len(y)))
        assert not any(set(groups[a]) & set(groups[b]) for a, b in parts)
    train, test = next(grouped_folds(y, groups, 5, 0))
    changed = x.copy()
    changed[test] = 1e3
    assert choose_C(x[train], y[train], groups[train]) == choose_C(changed[train], y[train], groups[train])


# ---- faults -----------------------------------------------------------------------------------------------------------------


def test_faults():
    x, y, groups = patients()
    bad = x.copy()
    bad[3, 2] = np.inf
    for f in (
        lambda v: nearest(v, x, 1),
        uniformity,
        collapse_statistics,
        project_2d,
        lambda v: alignment(x, v),
        lambda v: knn_scores(v, y, groups),
        lambda v: linear_scores(v, y, groups),
    ):
        refused(f, bad, contains='first row 3')
        refused(f, x.astype(int), contains='int64')
    refused(knn_scores, x, y - 1, groups, contains='-1')
    refused(knn_scores, x, y[:-1], groups, contains='one label per row')
    refused(knn_scores, x, y, groups, T=0, contains='T: 0')
    refused(knn_scores, x, y, groups, k=178, contains='177 are there')
    refused(knn_scores, x, y, groups[:5], contains='one group per row')
    refused(linear_scores, x, y, groups, C=0, contains='C: 0')
    refused(linear_scores, x, y, groups, C=[], contains='C: []')
    refused(linear_scores, x, y, groups % 4, contains='4 groups')
    refused(neighbours, x, groups, [len(x)], contains='queries')
    refused(uniformity, x[:1], contains='one embedding')
    refused(alignment, x, x[:5], contains='same images')


def test_collapse_is_an_error_that_travels():
    stats = collapse_statistics(np.ones((40, 32)))
    error = Collapse(collapsed(stats), stats, 'epoch 2')
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, again.stats, again.where, str(again)) == (
        Collapse,
        error.reason,
        error.stats,
        'epoch 2',
        str(error),
    ) and 'epoch 2' in str(again)
    assert 'lie close together' in str(again) and isinstance(again, InputError)
    line = np.random.default_rng(0).normal(size=(40, 1)) @ np.ones((1, 32))
    assert 'three directions' in collapsed(collapse_statistics(line))
    assert not collapsed(collapse_statistics(np.random.default_rng(0).normal(size=(40, 32))))
    few = collapse_statistics(np.random.default_rng(0).normal(size=(16, 32)))
    refused(collapsed, few, contains='too few')


# ---- real radiographs -------------------------------------------------------------------------------------------------------


@needs_cxr
def test_imagenet_weights_know_the_projection_of_real_radiographs(tmp_path):
    cohort = read_cohort(CXR)
    store = build_store(cohort, 96, out=tmp_path / 'store', workers=0)
    view = np.array(cohort.images['view'], dtype=object)
    rows = np.flatnonzero(np.isin(view, ['AP', 'PA']))
    encoder = Encoder('tf_efficientnet_lite0')
    load_pretrained(encoder, 'imagenet')
    z = embed(encoder, Batches(store.images, rows, np.full(len(view), -1), 32))
    y, groups = (view[rows] == 'PA').astype(int), np.array(cohort.images.group)[rows]
    auc = lambda y: point_metrics(np.eye(2, dtype=int)[y].argmax(1), linear_scores(z, y, groups))[
        'auc_typical'
    ]  # class 1 against the rest
    _, first, who = np.unique(groups, return_index=True, return_inverse=True)  # whole patients change their label
    null = [auc(np.random.default_rng(s).permutation(y[first])[who]) for s in range(5)]
    assert (
        len(y) > 150 and min(np.bincount(y)) > 40 and auc(y) > 0.9 > 0.65 > max(null) and 0.35 < np.mean(null) < 0.6
    ), (auc(y), null, np.bincount(y))
    assert collapsed(collapse_statistics(z)) == ''
