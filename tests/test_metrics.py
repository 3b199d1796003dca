"Metrics against definitions, scikit-learn and simulations whose truth is known. Each claim has a counter-test."

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from cxrpaper.evaluation.metrics import (
    Resampling,
    auc,
    average_precision,
    bootstrap,
    bootstrap_difference,
    bootstrap_p,
    check_predictions,
    curve_band,
    delong,
    delong_test,
    evaluate,
    holm,
    metric_samples,
    percentile_interval,
    point_metrics,
    pool_folds,
    pr_points,
    probabilities,
    read_cases,
    resampled_units,
    roc_points,
    running_sum,
    sampled,
    simulate_predictions,
    softmax,
)
from cxrpaper.runs import InputError
from cxrpaper.schema import CLASSES, LOGITS


@pytest.fixture(scope='module')
def df():
    return simulate_predictions(200, seed=3)


def random_case(seed, n=None):
    "Labels, probabilities on a coarse grid (ties) and weights, some of them zero."
    g = np.random.default_rng(seed)
    n = n or int(g.integers(20, 200))
    y = np.append(np.arange(4), g.integers(0, 4, n - 4))
    levels = int(g.integers(2, 30))
    p = np.round(softmax(g.normal(size=(n, 4))) * levels) / levels
    assert len(np.unique(p[:, 0])) < n
    w = g.exponential(size=(n, 5))
    w[g.random((n, 5)) < 0.2] = 0
    w[:4] = 1
    return y, p, w


# ---------------------------------------------------------------- against scikit-learn
@pytest.mark.parametrize('seed', range(25))
def test_agrees_with_sklearn_on_ties_and_weights(seed):
    y, p, w = random_case(seed)
    got = metric_samples(y, p, w)
    for b in range(w.shape[1]):
        v = w[:, b]
        pred = p.argmax(1)
        want = {f'auc_{c}': sk.roc_auc_score(y == k, p[:, k], sample_weight=v) for k, c in enumerate(CLASSES)}
        want |= {f'ap_{c}': sk.average_precision_score(y == k, p[:, k], sample_weight=v) for k, c in enumerate(CLASSES)}
        f1 = sk.f1_score(y, pred, average=None, sample_weight=v, labels=range(4), zero_division=0)
        rec = sk.recall_score(y, pred, average=None, sample_weight=v, labels=range(4))
        want |= {f'f1_{c}': f for c, f in zip(CLASSES, f1)} | {f'recall_{c}': r for c, r in zip(CLASSES, rec)}
        want |= dict(
            balanced_accuracy=sk.balanced_accuracy_score(y, pred, sample_weight=v),
            accuracy=sk.accuracy_score(y, pred, sample_weight=v),
            f1_macro=f1.mean(),
            auc_macro=np.mean([want[f'auc_{c}'] for c in CLASSES]),
            ap_macro=np.mean([want[f'ap_{c}'] for c in CLASSES]),
        )
        pair = (y == 1) | (y == 2)
        both = p[pair][:, 1] + p[pair][:, 2]
        share = [a / s if s else 0.5 for a, s in zip(p[pair][:, 1], both)]
        want['auc_typical_indeterminate'] = sk.roc_auc_score(y[pair] == 1, share, sample_weight=v[pair])
        assert set(want) == set(got)
        for k in want:
            assert abs(got[k][b] - want[k]) < 1e-12, k


def test_macro_auc_is_sklearns_ovr():
    y, _, w = random_case(99, 150)
    p = softmax(np.random.default_rng(0).normal(size=(150, 4)))
    assert abs(point_metrics(y, p)['auc_macro'] - sk.roc_auc_score(y, p, multi_class='ovr')) < 1e-12
    assert point_metrics(y, p, w[:, 0])['accuracy'] == pytest.approx(
        np.average(y == p.argmax(1), weights=w[:, 0]), abs=1e-12
    )


def test_a_tie_is_one_half_and_order_does_not_matter():
    y = np.array([1, 0, 1, 0], bool)
    one = np.ones((4, 1))
    assert auc(y, np.full(4, 0.3), one)[0] == 0.5
    s = np.array([0.2, 0.2, 0.9, 0.1])
    i = np.array([3, 1, 0, 2])
    assert auc(y, s, one)[0] == auc(y[i], s[i], one)[0] == 3.5 / 4
    assert average_precision(y, s, one)[0] == average_precision(y[i], s[i], one)[0]
    assert auc(y, -s, one)[0] == pytest.approx(1 - auc(y, s, one)[0])


def test_running_sum():
    for n in (1, 2, 3, 15, 16, 17, 1000):
        w = np.random.default_rng(n).integers(0, 5, (n, 3)).astype(float)
        assert (running_sum(w) == w.cumsum(0)).all()


def test_softmax_is_stable():
    z = np.array([[1e4, 0, -1e4, 1e4], [-1e4] * 4])
    assert np.allclose(softmax(z), [[0.5, 0, 0, 0.5], [0.25] * 4]) and np.isfinite(softmax(z)).all()


# ---------------------------------------------------------------- the challenge's average precision
def voc_by_hand(positive, score):
    "PASCAL VOC 2010: at every threshold recall and precision, precision made monotone from the right, area of the steps."
    recall, precision = [0.0], [0.0]
    for t in np.unique(score)[::-1]:
        taken = score >= t
        recall.append(positive[taken].sum() / positive.sum())
        precision.append(positive[taken].mean())
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


@pytest.mark.parametrize('seed', range(10))
def test_interpolated_ap_is_voc2010_also_under_resampling(seed):
    y, p, _ = random_case(seed)
    counts = np.random.default_rng(seed).poisson(1, (len(y), 6)).astype(float)
    counts[:4] = 1
    for k in range(4):
        got = average_precision(y == k, p[:, k], counts, interpolated=True)
        for b in range(6):
            i = np.repeat(np.arange(len(y)), counts[:, b].astype(int))
            assert got[b] == pytest.approx(voc_by_hand(y[i] == k, p[i, k]), abs=1e-12)
            assert got[b] >= average_precision(y == k, p[:, k], counts[:, b : b + 1])[0] - 1e-12


def test_study_map_is_of_studies_and_resampled_with_the_patients(df):
    P = pd.DataFrame(probabilities(df)).groupby(df.study.to_numpy()).mean()
    st, P = df.drop_duplicates('study').set_index('study').loc[P.index], P.to_numpy()
    want = np.mean([voc_by_hand((st.label == k).to_numpy(), P[:, k]) for k in range(4)])
    got = bootstrap(df, Resampling(50), metrics=['study_map']).iloc[0]
    assert got.value == pytest.approx(want, abs=1e-12) and got.n == df.study.nunique() < len(df)
    c = read_cases(df)
    counts = next(resampled_units(c.n_units, 3))
    names = np.unique(df.group)
    i = np.repeat(np.arange(len(st)), counts[np.searchsorted(names, st.group), 1].astype(int))
    want = np.mean([voc_by_hand((st.label.to_numpy()[i] == k), P[i, k]) for k in range(4)])
    assert c.samples(counts, ['study_map'])['study_map'][1] == pytest.approx(want, abs=1e-12)


def test_a_study_of_two_labels_is_refused(df):
    some = df.study.value_counts().index[0]
    bad = df.assign(label=np.where(df.image == df.image[df.study == some].iloc[0], (df.label + 1) % 4, df.label))
    with pytest.raises(InputError, match=f'{some} has images of several classes'):
        read_cases(bad)


# ---------------------------------------------------------------- resampling
def test_resampling_is_weighting(df):
    c = read_cases(df)
    counts = next(resampled_units(c.n_units, 5, seed=2))
    got = c.samples(counts)
    rows = [np.flatnonzero(c.unit == u) for u in range(c.n_units)]
    for b in range(5):
        i = np.concatenate([np.tile(r, int(n)) for r, n in zip(rows, counts[:, b])])
        want = point_metrics(c.y[i], c.p[i])
        for k, v in want.items():
            assert got[k][b] == pytest.approx(v, abs=1e-12), k


def test_draws_are_with_replacement_and_uniform():
    q = np.hstack(list(resampled_units(40, 4000)))
    assert (q.sum(0) == 40).all() and q.max() > 3
    assert abs(q.mean() - 1) < 1e-12 and abs(q.var() - (1 - 1 / 40)) < 0.03 and abs(q.mean(1) - 1).max() < 0.1
    assert (q == np.hstack(list(resampled_units(40, 4000, chunk=111)))).all(), 'chunks change nothing'
    assert not (q[:, :100] == np.hstack(list(resampled_units(40, 100, seed=1)))).all()


def test_interval_equals_a_plain_loop(df):
    got = bootstrap(df, Resampling(200, 5), metrics=['auc_macro', 'accuracy']).set_index('metric')
    c = read_cases(df)
    rows = [np.flatnonzero(c.unit == u) for u in range(c.n_units)]
    aucs, acc = [], []
    for q in np.hstack(list(resampled_units(c.n_units, 200, seed=5))).T.astype(int):
        i = np.concatenate([np.tile(r, n) for r, n in zip(rows, q)])
        aucs.append(np.mean([sk.roc_auc_score(c.y[i] == k, c.p[i, k]) for k in range(4)]))
        acc.append((c.y[i] == c.p[i].argmax(1)).mean())
    carrying = dict(auc_macro=df.groupby('label').group.nunique().min(), accuracy=c.n_units)
    for k, v in dict(auc_macro=aucs, accuracy=acc).items():
        value = got.value[k]
        half = stats.t.ppf(0.975, carrying[k] - 1) * np.std(v, ddof=1) / (value * (1 - value))
        want = [1 / (1 + np.exp(-np.log(value / (1 - value)) - h)) for h in (-half, half)]
        assert np.allclose([got.lo[k], got.hi[k]], want, atol=1e-9) and got.se[k] == pytest.approx(np.std(v, ddof=1))


def test_rows_may_come_in_any_order_and_seeds_decide(df):
    shuffled = df.sample(frac=1, random_state=0)
    assert bootstrap(df, Resampling(100)).equals(bootstrap(shuffled, Resampling(100)))
    assert not bootstrap(df, Resampling(100)).lo.equals(bootstrap(df, Resampling(100, 1)).lo)


def test_units(df):
    w = {
        u: (lambda r: r.hi - r.lo)(
            bootstrap(
                simulate_predictions(200, seed=1, images=6.0), Resampling(400, unit=u), metrics=['auc_macro']
            ).iloc[0]
        )
        for u in ('patient', 'group', 'image')
    }
    assert w['patient'] == w['group'] and w['image'] < 0.7 * w['patient']
    assert (
        'study_map' not in bootstrap(df, Resampling(20, unit='image')).metric.tolist()
        and 'study_map' in bootstrap(df, Resampling(20)).metric.tolist()
    )
    with pytest.raises(InputError, match='not a unit'):
        bootstrap(df, Resampling(20, unit='hospital'))


def test_validation_rows_do_not_count(df):
    val = df[df.patient.isin(df.patient.unique()[:20])].assign(split='val')
    both = pd.concat([val, df[~df.patient.isin(val.patient)]])
    assert bootstrap(both, Resampling(50)).equals(bootstrap(both[both.split == 'test'], Resampling(50)))


# ---------------------------------------------------------------- a class that is absent
def test_absent_class_is_nan_never_zero_and_takes_the_macro_along(df):
    m = point_metrics(*(lambda d: (d.label, probabilities(d)))(df[df.label != 3]))
    for k in (
        'auc_atypical',
        'ap_atypical',
        'f1_atypical',
        'recall_atypical',
        'auc_macro',
        'ap_macro',
        'f1_macro',
        'balanced_accuracy',
    ):
        assert np.isnan(m[k]), k
    for k in ('auc_typical', 'ap_typical', 'f1_typical', 'recall_typical', 'accuracy'):
        assert m[k] > 0, k
    assert point_metrics([0, 1, 2, 3], np.eye(4)[[0, 1, 2, 2]])['f1_atypical'] == 0, 'there, and never found'


def cohort_with(df, n):  # n atypical patients
    who = df.patient[df.label == 3].unique()
    assert len(who) > n
    return df[(df.label != 3) | df.patient.isin(who[:n])]


def test_undefined_resamples_are_left_out_up_to_five_percent(df):
    few = bootstrap(cohort_with(df, 4), Resampling(1000), metrics=['auc_macro', 'auc_typical', 'accuracy']).set_index(
        'metric'
    )
    assert (
        950 <= few.n_boot['auc_macro'] < 1000
        and np.isfinite(few.lo['auc_macro'])
        and few.n_boot['accuracy'] == few.n_boot['auc_typical'] == 1000
    )
    lone = bootstrap(cohort_with(df, 1), Resampling(1000), metrics=['auc_macro', 'auc_typical']).set_index('metric')
    assert (
        np.isfinite(lone.value['auc_macro'])
        and np.isnan([lone.lo['auc_macro'], lone.hi['auc_macro']]).all()
        and 600 < lone.n_boot['auc_macro'] < 660
    )
    assert np.isfinite(lone.lo['auc_typical'])
    assert np.isnan(bootstrap(cohort_with(df, 0), Resampling(100), metrics=['auc_macro']).value[0])
    p = bootstrap_difference(cohort_with(df, 1), cohort_with(df, 1), Resampling(200), metrics=['auc_macro']).p[0]
    assert np.isnan(p)


def test_percentile_rule_at_its_edge():
    v = np.arange(1000.0)
    assert np.isfinite(percentile_interval(np.where(v < 50, np.nan, v))[0])
    assert np.isnan(percentile_interval(np.where(v < 51, np.nan, v))[0])
    assert percentile_interval(v, 0.9)[0] == pytest.approx(49.95)
    for bad in (0, 1, 95):
        with pytest.raises(InputError, match='level'):
            percentile_interval(v, bad)


# ---------------------------------------------------------------- input that cannot be believed
def broken(df):
    first = df.image.iloc[7]
    set_ = lambda c, v: df.assign(**{c: df[c].astype(object).where(df.image != first, v)})
    return {
        'no column label': df.drop(columns='label'),
        f'logit_2: nan in image {first}': set_('logit_2', np.nan),
        f'logit_0: inf in image {first}': set_('logit_0', np.inf),
        f'logit_1: -inf in image {first}': set_('logit_1', -np.inf),
        f'logit_3: abc in image {first}': set_('logit_3', 'abc'),
        f'label: -1 in image {first}': set_('label', -1),
        f'label: nan in image {first}': set_('label', np.nan),
        f'group: empty in image {first}': set_('group', None),
        f'image: {first} is there twice': pd.concat([df, df.iloc[[7]]]),
        f'patient: {df.patient.iloc[7]} is in val and test of fold 1': pd.concat(
            [df.assign(fold=1), df.iloc[[7]].assign(split='val', fold=1)]
        ),
        'no rows': df.iloc[:0],
    }


@pytest.mark.parametrize('i', range(11))
def test_bad_predictions_name_run_image_and_cure(df, i):
    message, bad = list(broken(df).items())[i]
    for f in (
        lambda: check_predictions(bad, run='runs/x/fold1'),
        lambda: evaluate([bad.set_axis(bad.columns, axis=1)], Resampling(20)),
    ):
        with pytest.raises(InputError) as e:
            f()
        assert message in str(e.value) and e.value.hint
    with pytest.raises(InputError, match='runs/x/fold1'):
        check_predictions(bad, run='runs/x/fold1')
    bad = bad.copy()
    bad.attrs['run'] = 'runs/y'
    with pytest.raises(InputError, match='runs/y'):
        bootstrap(bad, Resampling(20))


def test_good_predictions_pass_and_leaks_only_on_request(df):
    assert check_predictions(df) is df
    leak = pd.concat([df.assign(fold=1), df.iloc[[7]].assign(split='val', fold=1, image='other')])
    with pytest.raises(InputError, match='val and test'):
        bootstrap(leak, Resampling(20))
    assert len(evaluate([leak], Resampling(20), leaky=True))
    elsewhere = leak.assign(fold=np.where(leak.split == 'val', 2, 1))
    assert check_predictions(elsewhere) is elsewhere, 'a patient may validate another fold'


def test_too_few_units(df):
    one = df[df.patient == df.patient.iloc[0]]
    with pytest.raises(InputError, match='at least 2'):
        bootstrap(one, Resampling(20))
    with pytest.raises(InputError, match='at least 2'):
        bootstrap(df.assign(split='val'), Resampling(20))


def test_study_of_two_patients(df):
    with pytest.raises(InputError, match='belongs to several'):
        bootstrap(df.assign(study='s', label=1), Resampling(20))


def test_folds_are_pooled_and_checked(df):
    parts = [df[df.fold == f].reset_index(drop=True) for f in range(5)]
    assert bootstrap(pool_folds(parts), Resampling(50)).equals(bootstrap(df, Resampling(50)))
    with pytest.raises(InputError, match='twice'):
        pool_folds([parts[0], parts[0]])
    with_val = [
        pd.concat([p, q.assign(split='val', fold=p.fold.iloc[0])]) for p, q in zip(parts, parts[1:] + parts[:1])
    ]
    assert len(pool_folds(with_val)) == len(df)


# ---------------------------------------------------------------- seeds
def noisy(df, seed, scale=0.5):
    g = np.random.default_rng(seed)
    return df.assign(**{c: df[c] + scale * g.normal(size=len(df)) for c in LOGITS})


def test_seeds_are_averaged_inside_a_resample(df):
    frames = [noisy(df, s) for s in range(3)]
    got = evaluate(frames, Resampling(100), metrics=['auc_macro', 'study_map']).set_index('metric')
    one = [bootstrap(f, Resampling(100), metrics=['auc_macro']).iloc[0] for f in frames]
    assert got.value['auc_macro'] == pytest.approx(np.mean([o.value for o in one])) and got.n_seeds['auc_macro'] == 3
    assert got.sd_seeds['auc_macro'] == pytest.approx(np.std([o.value for o in one], ddof=1))
    cases = [read_cases(f) for f in frames]
    of = lambda c: [c.samples(q, ['auc_macro'])['auc_macro'] for q in resampled_units(cases[0].n_units, 100)]
    v = np.array([np.concatenate(of(c)) for c in cases])  # (seed, resample)
    values = np.array([o.value for o in one])
    of_patients = sum(np.var(row - v.mean(0), ddof=1) for row in v) / (3 - 1)
    run = max(np.var(values, ddof=1) - of_patients, 0)
    assert got.se['auc_macro'] == pytest.approx((np.var(v.mean(0), ddof=1) + run / 3) ** 0.5)
    assert np.isnan(evaluate([df], Resampling(20)).sd_seeds).all()
    for bad in (
        [df, df.iloc[3:]],
        [df, df.assign(label=(df.label + 1) % 4)],
        [df, df.assign(group='g' + df.study, patient=df.study)],
    ):
        with pytest.raises(InputError, match='frame 1.*other images, labels or patients'):
            evaluate(bad, Resampling(20))
    with pytest.raises(InputError, match='unknown metric auroc'):
        evaluate([df], Resampling(20), metrics=['auroc'])
    with pytest.raises(InputError, match='no predictions'):
        evaluate([], Resampling(20))


def trained(df, shift, spread, key, runs):
    "Training runs of one recipe: each gives the classes another signal, and every image noise of its own."
    g = np.random.default_rng(key)
    y = np.eye(4)[df.label]
    out = []
    for _ in range(runs):
        logits = df[LOGITS].to_numpy() + (shift + spread * g.normal()) * y + 0.6 * g.normal(size=(len(df), 4))
        out.append(df.assign(**dict(zip(LOGITS, logits.T))))
    return out


def test_recipes_that_are_the_same_are_rarely_told_apart():
    "Two recipes, three runs each: patients alone would tell the same recipe apart; a better recipe is found with five runs."
    how, fired = Resampling(100), dict(same=[], patients_only=[], better=[])
    for k in range(24):
        df = simulate_predictions(150, k, separation=0.9)
        a, b = (trained(df, 0, 0.1, (k, i), 3) for i in (1, 2))
        d = bootstrap_difference(a, b, how, metrics=['auc_macro']).iloc[0]
        fired['same'].append(d.p < 0.05)
        v = sampled([read_cases(f) for f in a + b], how, ['auc_macro'])[1]['auc_macro']
        fired['patients_only'].append(bootstrap_p(v[:3].mean(0) - v[3:].mean(0)) < 0.05)
        a, b = (trained(df, shift, 0.1, (k, i), 5) for i, shift in ((3, 0.35), (4, 0)))
        fired['better'].append(bootstrap_difference(a, b, how, metrics=['auc_macro']).p[0] < 0.05)
    rate = {k: np.mean(v) for k, v in fired.items()}
    assert rate['same'] <= 0.125 and rate['patients_only'] > 0.25 and rate['better'] > 0.75, rate


def test_one_run_says_nothing_of_the_method(df):
    one, several = (bootstrap_difference(noisy(df, 0), b, Resampling(50)) for b in (noisy(df, 1), [noisy(df, 1)] * 2))
    assert (one.n_runs == 1).all() and (several.n_runs == 1).all()


# ---------------------------------------------------------------- speed
@pytest.mark.serial
def test_fifty_times_faster_than_a_loop():
    big = simulate_predictions(600, seed=2).head(1200)
    c = read_cases(big)
    rows = [np.flatnonzero(c.unit == u) for u in range(c.n_units)]
    loop, ours = [], []
    for turn in range(4):
        q = next(resampled_units(c.n_units, 15, seed=turn)).T.astype(int)
        t = time.perf_counter()
        for counts in q:
            i = np.concatenate([np.tile(r, n) for r, n in zip(rows, counts)])
            sk.roc_auc_score(c.y[i], c.p[i], multi_class='ovr')
        loop.append((time.perf_counter() - t) / 15 * 2000)
        t = time.perf_counter()
        bootstrap(big, Resampling(2000, turn), metrics=['auc_macro'])
        ours.append(time.perf_counter() - t)
    print(f'2,000 resamples of macro AUC, {len(big)} images: loop {min(loop):.1f} s, vectorised {min(ours):.2f} s')
    assert min(loop) / min(ours) > 50


# ---------------------------------------------------------------- coverage
def test_coverage_of_patients_and_not_of_images():
    big = simulate_predictions(40_000, seed=7, images=4.0)
    truth = point_metrics(big.label, probabilities(big))
    n = 120
    inside = {
        u: np.mean(
            [
                (lambda r: r.lo <= truth['auc_macro'] <= r.hi)(
                    bootstrap(
                        simulate_predictions(150, seed=500 + i, images=4.0),
                        Resampling(200, i, unit=u),
                        metrics=['auc_macro'],
                    ).iloc[0]
                )
                for i in range(n)
            ]
        )
        for u in ('patient', 'image')
    }
    assert 0.89 <= inside['patient'] <= 0.99, inside
    assert inside['image'] < 0.82, inside


# ---------------------------------------------------------------- differences
def test_paired_difference(df):
    worse = noisy(df, 1, 1.0)
    d = bootstrap_difference(df, worse, Resampling(500)).set_index('metric')
    a, b = point_metrics(df.label, probabilities(df)), point_metrics(df.label, probabilities(worse))
    for k in a:
        assert d.difference[k] == pytest.approx(a[k] - b[k]) and d.a[k] == pytest.approx(a[k])
    assert d.p['auc_macro'] < 0.05 and d.lo['auc_macro'] > 0
    back = bootstrap_difference(worse, df, Resampling(500)).set_index('metric')
    assert back.lo['auc_macro'] == pytest.approx(-d.hi['auc_macro']) and back.p['auc_macro'] == d.p['auc_macro']
    same = bootstrap_difference(df, df, Resampling(100))
    assert (same.p == 1).all() and (same.difference == 0).all()
    several = bootstrap_difference([df, df], [worse], Resampling(100), metrics=['auc_macro'])
    assert several.difference[0] == pytest.approx(d.difference['auc_macro'])


def test_false_alarms_of_the_paired_test():
    ps = []
    for s in range(100):
        base = simulate_predictions(120, seed=900 + s)
        ps.append(
            [
                bootstrap_difference(
                    noisy(base, 2 * s), noisy(base, 2 * s + 1, k), Resampling(150), metrics=['auc_macro']
                ).p[0]
                for k in (0.5, 1.5)
            ]
        )
    null, real = (np.array(ps) < 0.05).mean(0)
    assert null < 0.11 and real > 0.5, (null, real)


# ---------------------------------------------------------------- DeLong
def delong_pairs(positive, scores):
    psi = np.array(
        [(s[positive][:, None] > s[~positive]) + 0.5 * (s[positive][:, None] == s[~positive]) for s in scores]
    )
    return psi.mean((1, 2)), np.cov(psi.mean(2)) / psi.shape[1] + np.cov(psi.mean(1)) / psi.shape[2]


@pytest.mark.parametrize('seed', range(10))
def test_delong_is_its_definition(seed):
    g = np.random.default_rng(seed)
    n = int(g.integers(20, 120))
    y = np.append([True, True, False, False], g.random(n) < 0.3)
    s = np.round(g.normal(size=(3, n + 4)) + y, int(g.integers(0, 3)))
    for got, want in zip(delong(y, s), delong_pairs(y, s)):
        assert np.allclose(got, want, atol=1e-13)
    for got, want in zip(delong(y, s), delong(y, s, clusters=[f'p{i}' for i in range(n + 4)])):
        assert np.allclose(got, want, atol=1e-13)
    assert np.allclose(delong(y, np.exp(s / 3))[1], delong(y, s)[1]), 'only ranks matter'
    assert delong(y, s)[0][0] == pytest.approx(sk.roc_auc_score(y, s[0]))


def test_delong_against_permutations():
    g = np.random.default_rng(1)
    n = 100
    y = np.arange(n) < 40
    for shift in (0.0, 0.5, 0.9):
        shared = g.normal(size=n)
        a, b = 0.8 * shared + g.normal(size=n) + 1.2 * y, 0.8 * shared + g.normal(size=n) + (1.2 - shift) * y
        one = np.ones((n, 1))
        diff = lambda s: auc(y, np.where(s, b, a), one)[0] - auc(y, np.where(s, a, b), one)[0]
        observed = abs(diff(np.zeros(n, bool)))
        p = np.mean([abs(diff(g.random(n) < 0.5)) >= observed - 1e-12 for _ in range(2000)])
        assert abs(p - delong_test(y, a, b)['p']) < 0.04


def test_delong_keeps_its_level_and_finds_what_is_there():
    g = np.random.default_rng(2)
    y = np.arange(120) < 50
    null, real = (
        np.mean(
            [delong_test(y, g.normal(size=120) + y, g.normal(size=120) + (1 - d) * y)['p'] < 0.05 for _ in range(600)]
        )
        for d in (0, 0.8)
    )
    assert 0.025 < null < 0.08 and real > 0.7


def test_delong_edges():
    y = np.arange(20) < 8
    s = np.random.default_rng(0).normal(size=20)
    r = delong_test(y, s, s)
    assert r['p'] == 1 and r['difference'] == 0 == r['z']
    with pytest.raises(InputError, match='only one class'):
        delong(np.ones(5, bool), s[None, :5])
    t = delong_test(y, s, -s)
    assert t['auc_a'] == pytest.approx(1 - t['auc_b']) and t['lo'] <= t['difference'] <= t['hi']


def test_clustered_delong_is_the_patient_bootstrap():
    d = simulate_predictions(200, seed=8, images=6.0)
    c = read_cases(d)
    boot = np.concatenate(
        [c.samples(q, ['auc_typical'])['auc_typical'] for q in resampled_units(c.n_units, 1500)]
    ).std()
    clustered, plain = (delong(c.y == 1, c.p[None, :, 1], w)[1][0, 0] ** 0.5 for w in (c.unit, None))
    assert abs(clustered / boot - 1) < 0.1 and plain < 0.7 * boot


# ---------------------------------------------------------------- multiplicity
def test_adjustments_are_their_definitions():
    g = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        p = np.round(g.random(n) ** 2, 2)
        order = np.argsort(p, kind='stable')
        want = np.empty(n)
        for i, j in enumerate(order):
            want[j] = min(1, max((n - k) * p[order[k]] for k in range(i + 1)))
        assert np.allclose(holm(p), want)


def test_adjustments_leave_nan_and_refuse_nonsense():
    assert np.allclose(holm([0.01, np.nan, 0.02]), [0.02, np.nan, 0.02], equal_nan=True)
    assert len(holm([])) == 0
    with pytest.raises(InputError, match='outside'):
        holm([0.5, 1.2])


# ---------------------------------------------------------------- curves
def test_curves(df):
    y, p, w = random_case(5, 150)
    for k in range(4):
        f, t = roc_points(y == k, p[:, k], w)
        assert np.allclose([np.trapezoid(t[:, b], f[:, b]) for b in range(5)], auc(y == k, p[:, k], w))
        r, pr = pr_points(y == k, p[:, k], w)
        area = [(np.diff(r[:, b], prepend=0) * np.nan_to_num(pr[:, b])).sum() for b in range(5)]
        assert np.allclose(area, average_precision(y == k, p[:, k], w))
    for kind in ('roc', 'pr'):
        band = curve_band(df, 1, kind, how=Resampling(200))
        assert (
            (band.lo <= band.hi).all()
            and ((band.lo <= band.y + 0.03) & (band.y <= band.hi + 0.03)).all()
            and (band.hi - band.lo).max() > 0.05
        )
    roc = curve_band(df, 1, 'roc', how=Resampling(50))
    assert roc.y.iloc[-1] == 1 and (np.diff(roc.y) >= 0).all()
