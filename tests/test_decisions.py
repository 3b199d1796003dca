"Decisions against loops in float64, limits, monotonicity and errors. Coverage of the intervals stands in the notebook."

from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from cxrpaper.evaluation.metrics import Resampling, simulate_predictions, softmax
from cxrpaper.questions.decisions import (
    TARGETS,
    Threshold,
    aurc,
    class_shares,
    confidence_for,
    counts_at,
    decision_curve,
    decision_rows,
    errors_kept,
    estimate_priors,
    fold_pairs,
    mistakes,
    net_benefit,
    operating_points,
    operating_samples,
    outcome,
    predictive_value_curve,
    predictive_values,
    referral,
    resampled,
    risk_at,
    risk_coverage,
    selective_summary,
    threshold_at,
)
from cxrpaper.runs import InputError
from cxrpaper.schema import LOGITS


def frame(n=150, seed=0, folds=1, **kind):
    "A run of `folds` folds: fold f is tested, the next one validates."
    d = simulate_predictions(n, seed, **kind)
    return pd.concat(
        [
            d[d.fold == (f + s) % 5].assign(fold=f, split=split)
            for f in range(folds)
            for s, split in ((0, 'test'), (1, 'val'))
        ],
        ignore_index=True,
    )


def case(seed, n=60, levels=12):
    "Outcomes, tied scores and integer weights, many of them zero."
    g = np.random.default_rng(seed)
    w = g.poisson(1, (n, 7)).astype(float)
    w[:2] = 1
    return np.append([True, False], g.random(n - 2) < 0.4), g.integers(0, levels, n) / levels, w


def drawn(w, *arrays):
    return [np.repeat(a, w.astype(int)) for a in arrays]


# ---------------------------------------------------------------- operating points
def threshold_by_loop(positive, score, fixed, at):
    best = None
    for t in [np.inf, *sorted(set(score), reverse=True)]:
        sens, spec = np.mean([s >= t for s in score[positive]]), np.mean([s < t for s in score[~positive]])
        if fixed == 'sensitivity' and sens >= at - 1e-12:
            return t
        if fixed == 'specificity' and spec >= at - 1e-12:
            best = t
    return best


@pytest.mark.parametrize('seed', range(15))
@pytest.mark.parametrize('fixed', ['specificity', 'sensitivity'])
def test_thresholds_are_those_of_the_drawn_rows(seed, fixed):
    positive, score, w = case(seed, levels=int(np.random.default_rng(seed).integers(3, 60)))
    for at in (0.5, 0.8, 0.9, 0.99):
        t = threshold_at(positive, score, w, fixed, at)
        got = counts_at(positive, score, w, t)
        for b in range(w.shape[1]):
            p, s = drawn(w[:, b], positive, score)
            assert t[b] == threshold_by_loop(p, s, fixed, at)
            assert got[:, b].tolist() == [(s[p] >= t[b]).sum(), p.sum(), (s[~p] < t[b]).sum(), (~p).sum()]


def test_a_resample_without_the_class_is_undefined_not_zero():
    positive, score, w = case(0)
    w[positive, 3] = 0
    t = threshold_at(positive, score, w)
    assert (
        np.isnan(t[3])
        and not np.isnan(np.delete(t, 3)).any()
        and np.isnan(counts_at(positive, score, w, t)[:, 3]).all()
    )


def test_what_is_asked_more_costs_more():
    d = decision_rows(frame(300))
    for fixed, other in (('specificity', 0), ('sensitivity', 1)):
        v = [
            operating_samples(d, threshold=Threshold(fixed=fixed, at=at), target='typical', how=Resampling(1))[0]
            for at in np.linspace(0.05, 0.95, 19)
        ]
        assert (np.diff([x[other] for x in v]) <= 0).all() and (np.diff([x[1 - other] for x in v]) >= 0).all()


def test_folds_have_thresholds_of_their_own():
    df = frame(250, folds=5)
    df.loc[df.fold == 2, LOGITS] *= 4
    df.loc[df.fold == 3, 'logit_0'] += 2
    positive, p = outcome(df, 'any')
    hit = ill = let = well = 0
    for f in range(5):
        val, test = ((df.fold == f) & (df.split == s) for s in ('val', 'test'))
        t = threshold_by_loop(positive[val], p[val], 'specificity', 0.9)
        hit += (positive & test & (p >= t)).sum()
        ill += (positive & test).sum()
        let += (~positive & test & (p < t)).sum()
        well += (~positive & test).sum()
    value, _ = operating_samples(decision_rows([df[df.fold == f] for f in range(5)]), how=Resampling(1))
    assert value[:2].tolist() == [hit / ill, let / well]
    t = threshold_by_loop(positive[df.split == 'val'], p[df.split == 'val'], 'specificity', 0.9)
    assert value[0] != (positive & (df.split == 'test') & (p >= t)).sum() / ill


def test_the_threshold_does_not_see_the_test():
    "Test labels changed: the honest threshold stays, the in-sample one moves."
    df = frame(300)
    swapped = df.assign(label=np.where(df.split == 'test', df.label.to_numpy()[::-1], df.label))
    a, b = (
        operating_points(d, targets=['any'], how=Resampling(20)).groupby('form').threshold.first()
        for d in (df, swapped)
    )
    assert a['validation'] == b['validation'] and a['in-sample'] != b['in-sample']


def test_the_optimistic_form_is_optimistic_where_the_score_is_noise():
    "Few images and a score that knows nothing: at the best threshold in-sample the fixed rate is always kept, on test only on average."
    v = np.array(
        [
            [
                operating_samples(
                    decision_rows(frame(150, seed, separation=0.0)), threshold=Threshold(form=f), how=Resampling(1)
                )[0][:2]
                for f in ('validation', 'in-sample')
            ]
            for seed in range(60)
        ]
    )
    assert (v[:, 1, 1] >= 0.9).all() and (v[:, 0, 1] < 0.9).mean() > 0.3
    assert (v[:, 1].sum(1) - 1).mean() > (v[:, 0].sum(1) - 1).mean() + 0.02


def test_row_order_and_seed():
    df = frame(120, folds=2)
    a = operating_points(df, targets=['any'], how=Resampling(70, 4))
    b = operating_points(df.sample(frac=1, random_state=0), targets=['any'], how=Resampling(70, 4))
    pd.testing.assert_frame_equal(a, b)
    assert not a.lo.equals(operating_points(df, targets=['any'], how=Resampling(70, 5)).lo)


def test_every_target_is_counted():
    df = frame(300)
    test = df[df.split == 'test']
    got = (
        operating_points(df, how=Resampling(50))
        .query("form == 'validation' and metric == 'sensitivity'")
        .set_index('target')
    )
    assert list(got.index) == list(TARGETS) and got.n.tolist() == [
        (test.label > 0).sum(),
        *[(test.label == k).sum() for k in range(4)],
    ]
    assert (got.n_units == test.group.nunique()).all()


# ---------------------------------------------------------------- decision curves
@pytest.mark.parametrize('seed', range(8))
def test_net_benefit_by_loop(seed):
    positive, p, w = case(seed)
    grid = [0.01, 1 / 12, 0.25, 0.5, 0.501, 0.9]
    model, everyone = net_benefit(positive, p, w, grid)
    for b in range(w.shape[1]):
        y, s = drawn(w[:, b], positive, p)
        for i, t in enumerate(grid):
            tp = sum(1 for u, v in zip(y, s) if u and v >= t)
            fp = sum(1 for u, v in zip(y, s) if not u and v >= t)
            assert model[i, b] == pytest.approx(tp / len(y) - fp / len(y) * t / (1 - t), abs=1e-12)
            assert everyone[i, b] == pytest.approx(y.mean() - (1 - y.mean()) * t / (1 - t), abs=1e-12)


def test_limits_of_a_decision_curve():
    df = frame(200)
    share = (df[df.split == 'test'].label > 0).mean()
    low = decision_curve(df, grid=[1e-9], how=Resampling(20)).iloc[0]
    assert (
        low.model == pytest.approx(share, abs=1e-6)
        and low['all'] == pytest.approx(low.model, abs=1e-12)
        and low.gain == pytest.approx(0, abs=1e-12)
    )
    sure = decision_curve(df.assign(q=1.0 * (df.label > 0)), column='q', how=Resampling(20))
    assert np.allclose(sure.model, share), 'an oracle has the prevalence as its net benefit'
    never = decision_curve(df.assign(q=0.0), column='q', how=Resampling(20))
    assert (never.model == 0).all() and (never.lo == 0).all()
    assert (decision_curve(df, how=Resampling(100)).eval('gain_lo <= gain + .02 and gain <= gain_hi + .02')).all()


# ---------------------------------------------------------------- selective prediction
def area_by_loop(wrong):
    return np.mean([np.mean(wrong[:i]) for i in range(1, len(wrong) + 1)])


@pytest.mark.parametrize('seed', range(8))
def test_aurc_without_ties_by_loop(seed):
    g = np.random.default_rng(seed)
    wrong, conf = g.random(50) < 0.4, g.permutation(50) / 50
    risk, area, oracle, excess, share = aurc(wrong, conf, np.ones((50, 1)))[:, 0]
    assert (
        risk == wrong.mean()
        and area == pytest.approx(area_by_loop(wrong[np.argsort(-conf)]), abs=1e-12)
        and oracle == pytest.approx(area_by_loop(np.sort(wrong)), abs=1e-12)
    )
    assert (
        excess == pytest.approx(area - oracle, abs=1e-12)
        and excess > 0
        and share == pytest.approx(excess / (risk - oracle), abs=1e-12)
    )


def test_ties_count_as_the_mean_over_their_orders():
    wrong, conf = np.array([1, 0, 1, 0, 0, 1], bool), np.array([0.9, 0.9, 0.5, 0.5, 0.5, 0.1])
    orders = [area_by_loop(wrong[list((*a, *b, 5))]) for a in permutations((0, 1)) for b in permutations((2, 3, 4))]
    assert aurc(wrong, conf, np.ones((6, 1)))[1, 0] == pytest.approx(np.mean(orders), abs=1e-12)


@pytest.mark.parametrize('seed', range(6))
def test_a_weight_is_a_repetition(seed):
    wrong, conf, w = case(seed)
    got = aurc(wrong, conf, w)
    curve = risk_at(*errors_kept(wrong, conf, w), [0.1, 0.37, 0.5, 0.99, 1])
    for b in range(w.shape[1]):
        e, c = drawn(w[:, b], wrong, conf)
        assert np.allclose(got[:, b], aurc(e, c, np.ones((len(e), 1)))[:, 0], atol=1e-12)
        levels = sorted(set(c), reverse=True)
        x = [0, *[(c >= t).mean() for t in levels]]
        y = [0, *[(e & (c >= t)).mean() for t in levels]]
        assert np.allclose(curve[:, b], [np.interp(q, x, y) / q for q in (0.1, 0.37, 0.5, 0.99, 1)], atol=1e-9)


def test_limits_of_the_oracle():
    for r in (0.1, 0.3, 0.7):
        n = 100_000
        wrong = np.arange(n) >= n * (1 - r)
        v = aurc(wrong, -1.0 * np.arange(n), np.ones((n, 1)))[:, 0]
        assert v[2] == pytest.approx(r + (1 - r) * np.log(1 - r), abs=1e-4) and abs(v[3]) < 1e-9, (
            'the approximation of Geifman et al.'
        )
        assert aurc(wrong, np.arange(n, dtype=float), np.ones((n, 1)))[4, 0] > 1.5, (
            'the worst order is worse than chance'
        )
    none = aurc(np.zeros(9, bool), np.arange(9.0), np.ones((9, 1)))[:, 0]
    assert (none[:4] == 0).all() and np.isnan(none[4])


def test_full_coverage_is_the_error_rate():
    df = frame(200)
    wrong, conf = mistakes(df[df.split == 'test'])
    curve = risk_coverage(df, how=Resampling(50))
    assert (
        curve.risk.iloc[-1] == pytest.approx(wrong.mean(), abs=1e-12) == pytest.approx(curve.oracle.iloc[-1], abs=1e-12)
    )
    assert (curve.risk >= curve.oracle - 1e-12).all() and (curve.lo <= curve.hi).all()
    table = selective_summary(df, how=Resampling(50)).set_index('metric')
    assert table.value.risk == pytest.approx(wrong.mean(), abs=1e-12) and table.value.aurc >= table.value.aurc_oracle
    oracle = risk_coverage(df.assign(c=1.0 * ~mistakes(df)[0]), 'c', how=Resampling(50))
    assert np.allclose(oracle.risk, oracle.oracle, atol=1e-9)


@pytest.mark.parametrize('seed', range(8))
def test_confidence_by_loop(seed):
    wrong, conf, w = case(seed)
    for accuracy in (0.3, 0.6, 0.75, 0.95):
        got = confidence_for(wrong, conf, w, accuracy)
        for b in range(w.shape[1]):
            e, c = drawn(w[:, b], wrong, conf)
            want = min([t for t in set(c) if 1 - e[c >= t].mean() >= accuracy - 1e-9], default=np.inf)
            assert got[b] == want


def test_referral():
    df = frame(400)
    right = 1 - mistakes(df[df.split == 'test'])[0].mean()
    get = lambda a, **k: referral(df, a, how=Resampling(30), **k).set_index(['form', 'metric']).value
    assert get(right - 0.2).loc['in-sample', 'referred'] == 0 and get(right - 0.2).loc[
        'in-sample', 'accuracy'
    ] == pytest.approx(right)
    share = [get(a).loc['in-sample', 'referred'] for a in np.linspace(0.3, 0.99, 15)]
    assert (np.diff(share) >= 0).all()
    assert all(get(a).loc['in-sample', 'accuracy'] >= a - 1e-9 for a in (0.7, 0.8))
    liar = df.assign(c=1.0 * mistakes(df)[0])
    got = referral(liar, 0.9, 'c', how=Resampling(30))
    assert (
        (got[got.metric == 'referred'].value == 1).all()
        and got[got.metric == 'accuracy'].value.isna().all()
        and got[got.metric == 'accuracy'].lo.isna().all()
    ), 'nothing kept: no accuracy'


# ---------------------------------------------------------------- prevalence
def test_predictive_values_by_counting():
    g = np.random.default_rng(0)
    ill = g.random(500) < 0.3
    called = np.where(ill, g.random(500) < 0.8, g.random(500) < 0.1)
    a, b = predictive_values(called[ill].mean(), (~called[~ill]).mean(), ill.mean())
    assert a == pytest.approx(ill[called].mean(), abs=1e-12) and b == pytest.approx((~ill)[~called].mean(), abs=1e-12)
    ppv, npv = predictive_values(0.8, 0.9, np.linspace(0, 1, 11))
    assert (np.diff(ppv) > 0).all() and (np.diff(npv) < 0).all() and (ppv[0], npv[0], ppv[-1], npv[-1]) == (0, 1, 1, 0)
    assert np.isnan(predictive_values(0, 1, 0.5)[0]) and predictive_values(0, 1, 0.5)[1] == 0.5


def test_curve_of_predictive_values():
    df = frame(300)
    curve = predictive_value_curve(df, prevalence=[0.1, 0.5], how=Resampling(60))
    v, _ = operating_samples(decision_rows(df), how=Resampling(1))
    assert np.allclose(curve.ppv, predictive_values(v[0], v[1], [0.1, 0.5])[0])
    assert (curve.ppv_lo <= curve.ppv).all() and (curve.ppv <= curve.ppv_hi).all()
    wide = predictive_value_curve(df, threshold=Threshold(refit=True), prevalence=[0.1, 0.5], how=Resampling(60))
    assert (wide.eval('ppv_hi - ppv_lo') > curve.eval('ppv_hi - ppv_lo')).all()


def test_estimated_shares_are_the_likeliest():
    g = np.random.default_rng(2)
    df = simulate_predictions(800, 3, images=1.0, shares=(0.6, 0.1, 0.1, 0.2))
    old = np.array([0.28, 0.47, 0.17, 0.08])
    p = softmax(1.2 * df[LOGITS].to_numpy() + np.log(old))
    best = estimate_priors(p, old, tol=1e-10)[:, 0]
    value = lambda q: np.log((p / old) @ q).sum()
    assert abs(best.sum() - 1) < 1e-9 and all(value(best) >= value(q) - 1e-6 for q in g.dirichlet(30 * best + 0.1, 300))
    w = g.poisson(1, (len(p), 3)).astype(float)
    got = estimate_priors(p, old, w, tol=1e-10)
    for b in range(3):
        assert np.allclose(
            got[:, b], estimate_priors(np.repeat(p, w[:, b].astype(int), 0), old, tol=1e-10)[:, 0], atol=1e-6
        )
    assert np.allclose(estimate_priors(np.tile(old, (50, 1)), old)[:, 0], old), (
        'probabilities that know nothing leave the shares as they are'
    )


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    'call,words',
    [
        (lambda d: decision_rows([]), 'frames: no predictions. Hint'),
        (lambda d: decision_rows(d[d.split == 'val']), "split: no row is 'test'. Hint"),
        (lambda d: decision_rows(d.drop(columns='group')), 'no column group. Hint'),
        (lambda d: decision_rows(pd.concat([d, d])), 'image: '),
        (
            lambda d: operating_points(d[d.split == 'test']),
            "split: fold 0 has no row 'val'. Hint: give the whole frames",
        ),
        (lambda d: operating_points(d, threshold=Threshold(fixed='auc')), 'fixed: '),
        (lambda d: operating_points(d, threshold=Threshold(at=1.0)), 'at: 1.0 is not between 0 and 1. Hint'),
        (lambda d: operating_points(d, targets=['sick']), 'target: '),
        (lambda d: fold_pairs(d, 'train'), 'form: '),
        (lambda d: operating_points(d, how=Resampling(unit='ward')), 'unit: '),
        (lambda d: decision_curve(d, column='cal'), 'cal: no such column. Hint'),
        (lambda d: decision_curve(d.assign(cal=2.0), column='cal'), 'cal: 2.0 in image'),
        (lambda d: decision_curve(d.assign(cal=float('nan')), column='cal'), 'cal: nan in image'),
        (lambda d: decision_curve(d, grid=[0, 0.5]), 'grid: '),
        (lambda d: risk_coverage(d, coverage=[1.5]), 'coverage: '),
        (lambda d: referral(d, 80), 'accuracy: 80'),
        (lambda d: selective_summary(d.assign(c='high'), 'c'), 'c: high in image'),
        (lambda d: predictive_values(0.9, 90, 0.1), 'specificity: '),
        (lambda d: class_shares(d, [0.5, 0.5, 0, 0]), 'old: '),
        (lambda d: estimate_priors(np.full((2, 4), 0.25), [0.5] * 4), 'old: '),
        (
            lambda d: estimate_priors(softmax(9 * np.eye(4)[[0, 0, 1, 2, 3]]), [0.25] * 4, max_iter=1),
            'p: shares still move',
        ),
        (lambda d: resampled(d[d.group == d.group[0]], lambda w: w.sum(0)), 'group: '),
    ],
)
def test_errors_name_field_and_cure(call, words):
    with pytest.raises(InputError) as e:
        call(frame(60))
    assert words in str(e.value) and 'Hint' in str(e.value)
