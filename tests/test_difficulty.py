"Difficulty against plain loops, scikit-learn, cleanlab and planted truths. Each claim has a counter-test."

import re

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cleanlab.count import num_label_issues
from cleanlab.filter import find_label_issues
from sklearn import metrics as sk

from cxrpaper.data.phantom import READERS as FILLED
from cxrpaper.evaluation.metrics import Resampling, probabilities, resampled_units, simulate_predictions
from cxrpaper.questions.difficulty import (
    PAIRS,
    READERS,
    against_readers,
    calibrated,
    cartography,
    ceilings,
    confusion_shares,
    count_flags,
    doubtful,
    draw_cartography,
    draw_confusions,
    draw_gallery,
    draw_labels,
    draw_separability,
    hardest,
    label_noise,
    noise_bound,
    noise_cases,
    noise_matrix,
    readers_matrix,
    regions,
    separability,
    separations,
    simulate_labels,
    verdict,
)
from cxrpaper.runs import InputError
from cxrpaper.schema import CLASSES, LOGITS

pytestmark = pytest.mark.filterwarnings('ignore:.*does not hold the fit')


# ---------------------------------------------------------------- readers
def test_the_constants_are_those_of_the_source():
    text = READERS['source']
    for a, b, v in re.findall(r'(\w+)->(\w+) (\.\d+)', text):
        assert READERS['given'][a, b] == float(v)
    assert len(READERS['given']) == len(re.findall('->', text)) == 4
    assert float(re.search(r'([\d.]+) % \(kappa', text)[1]) / 100 == pytest.approx(READERS['agreement'])
    assert float(re.search(r'kappa ([\d.]+)', text)[1]) == READERS['kappa'] and float(
        re.search(r'unanimous ([\d.]+)', text)[1]
    ) / 100 == pytest.approx(READERS['unanimous'])
    m = readers_matrix()
    known = ~np.isnan(m)
    assert known.sum() == 4 and np.allclose(m[known], FILLED[known]), (
        'what the phantom fills in is never shown as known'
    )
    assert (ceilings().caveat == READERS['caveat']).all()


# ---------------------------------------------------------------- confusion
@pytest.mark.parametrize('seed', range(3))
def test_confusion_shares_is_scikit_learn_averaged_over_seeds(seed):
    a = simulate_predictions(80, seed, shares=[0.25] * 4)
    b = a.assign(**{c: a[c] + np.random.default_rng(seed).normal(size=len(a)) for c in LOGITS})
    want = np.mean(
        [sk.confusion_matrix(f.label, probabilities(f).argmax(1), labels=range(4), normalize='true') for f in (a, b)], 0
    )
    t = confusion_shares([a, b], Resampling(50))
    assert t.value.to_numpy().reshape(4, 4) == pytest.approx(want, abs=1e-12)
    assert ((t.lo <= t.value + 1e-9) & (t.value <= t.hi + 1e-9)).all()
    assert t.n_units.tolist() == [a[a.label == k].patient.nunique() for k in range(4) for _ in range(4)]


def test_the_difference_to_the_readers_is_a_plain_loop_over_patients():
    a = simulate_predictions(60, 4, shares=[0.25] * 4).sort_values('image')
    pred = probabilities(a).argmax(1)
    y = a.label.to_numpy()
    who = np.unique(a.group, return_inverse=True)[1]
    d = []
    for q in np.hstack(list(resampled_units(60, 80, 2))).T.astype(int):
        w = q[who]
        d.append(
            np.mean(
                [
                    (w * (y == i) * (pred == j)).sum() / (w * (y == i)).sum() - FILLED[i, j]
                    if (w * (y == i)).sum()
                    else np.nan
                    for i, j in ((1, 2), (2, 3), (3, 2))
                ]
            )
        )
    got = against_readers(a, Resampling(80, 2)).iloc[-1]
    assert (got.lo, got.hi) == pytest.approx(tuple(np.nanquantile(d, [0.025, 0.975])), abs=1e-12)
    assert got.p == pytest.approx(
        min(1, 2 * (min((np.array(d) <= 0).sum(), (np.array(d) >= 0).sum()) + 1) / (np.isfinite(d).sum() + 1))
    )


def test_a_share_of_none_has_an_interval():
    d = simulate_predictions(100, 0, images=1.0, shares=[0.25] * 4)
    d = d.assign(**dict(zip(LOGITS, 3 * np.eye(4)[d.label].T)))
    n = (d.label == 1).sum()
    t, r = confusion_shares(d, Resampling(30)).iloc[6], against_readers(d, Resampling(30)).iloc[1]
    assert t.value == t.lo == 0 and (1 - t.hi) ** n == pytest.approx(0.025) and r.hi - r.lo == pytest.approx(t.hi)
    assert (
        r.p == pytest.approx(2 * 0.7**n)
        and confusion_shares(d, Resampling(30)).iloc[0].hi == 1 > confusion_shares(d, Resampling(30)).iloc[0].lo
    )


def test_validation_rows_are_never_counted():
    a = simulate_predictions(60, 0).assign(fold=0)
    v = simulate_predictions(50, 1).assign(fold=0, split='val')
    v[['image', 'study', 'patient', 'group']] += 'v'
    both = pd.concat([a, v])
    for f in (confusion_shares, separability, against_readers):
        pd.testing.assert_frame_equal(f(both, Resampling(20)), f(a, Resampling(20)))
    pd.testing.assert_frame_equal(hardest(both), hardest(a))


def test_other_labels_in_a_second_seed_are_refused():
    a = simulate_predictions(40, 0)
    for f in (confusion_shares, separability, against_readers, hardest):
        with pytest.raises(InputError, match='other images, labels'):
            f([a, a.assign(label=(a.label + 1) % 4)])


def test_verdict_needs_patients_and_a_p():
    assert [verdict(1, 0.04, 10), verdict(1, 0.05, 10), verdict(-1, 0.04, 10)] == [
        'found',
        'not found',
        'found, the other way round',
    ]
    assert verdict(1, 1e-9, 9) == verdict(1, np.nan, 99) == 'inconclusive: too few patients'


# ---------------------------------------------------------------- two tasks
@pytest.mark.parametrize('seed', range(4))
def test_separations_repeat_the_images(seed):
    g = np.random.default_rng(seed)
    y = np.r_[np.arange(4), np.arange(4), g.integers(0, 4, 30)]
    p = g.dirichlet(np.ones(4), len(y)).round(1) + 0.01
    p /= p.sum(1, keepdims=True)
    w = 1 + g.integers(0, 3, (len(y), 3))
    got = separations(y, p, w.astype(float))
    for b in range(3):
        i = np.repeat(np.arange(len(y)), w[:, b])
        yy, pp = y[i], p[i]
        non = yy > 0
        q = pp[non, 1:] / pp[non, 1:].sum(1, keepdims=True)
        first, three = (
            sk.roc_auc_score(yy == 0, pp[:, 0]),
            np.mean([sk.roc_auc_score(yy[non] == k, q[:, k - 1]) for k in (1, 2, 3)]),
        )
        pairs = [
            sk.roc_auc_score(yy[of] == a, pp[of, a] / (pp[of, a] + pp[of, b_]))
            for a, b_ in PAIRS
            for of in [np.isin(yy, (a, b_))]
        ]
        assert got[b, :3] == pytest.approx([first, three, first - three], abs=0.02) and got[b, 3:] == pytest.approx(
            pairs, abs=0.02
        )


def test_separations_without_ties_are_exact_and_certain_negatives_do_no_harm():
    d = simulate_predictions(100, 0)
    y, p, one = d.label.to_numpy(), probabilities(d), np.ones((len(d), 1))
    non = y > 0
    got = separations(y, p, one)[0]
    assert got[0] == pytest.approx(sk.roc_auc_score(y == 0, p[:, 0]), abs=1e-12)
    assert got[1] == pytest.approx(
        np.mean([sk.roc_auc_score(y[non] == k, (p[:, k] / (1 - p[:, 0]))[non]) for k in (1, 2, 3)]), abs=1e-12
    )
    p[non] = [1.0, 0, 0, 0]
    assert np.isfinite(separations(y, p, one)).all() and separations(y, p, one)[0, 1] == 0.5


def test_the_difference_knows_which_task_is_easier():
    d = simulate_predictions(250, 0, shares=[0.4, 0.2, 0.2, 0.2])
    up = d.assign(logit_0=d.logit_0 + np.where(d.label == 0, 2, -2))
    down = d.assign(logit_0=np.random.default_rng(0).normal(size=len(d)))
    got = [separability(f, Resampling(100)).set_index('task').loc['difference'] for f in (up, down)]
    assert [r.verdict for r in got] == ['found', 'found, the other way round'] and got[0].lo > 0 > got[1].hi


# ---------------------------------------------------------------- label noise
@pytest.mark.parametrize('seed', range(5))
def test_count_flags_is_the_library(seed):
    g = np.random.default_rng(seed)
    p = g.dirichlet([0.4] * 4 if seed % 2 else [2] * 4, 120)
    labels = g.integers(0, 3 + seed % 2, (120, 5))
    labels[:2, 0] = 0, 1
    want = [num_label_issues(l, p) for l in labels.T]
    assert count_flags(labels, p).tolist() == want
    assert want == [find_label_issues(l, p, filter_by='confident_learning', n_jobs=1).sum() for l in labels.T]
    assert sum(want) > 0


def test_drawn_labels_have_the_probabilities_and_go_together_in_a_patient():
    p = np.repeat([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], 3, axis=0)
    unit = np.array([0, 0, 1, 2, 3, 4])
    l = draw_labels(p, unit, 20000, 1)
    assert np.eye(4)[l].mean(1) == pytest.approx(p, abs=0.015)
    assert (l[0] == l[1]).all() and (l[0] == l[2]).mean() < 0.4


@pytest.mark.parametrize('kind', [dict(), dict(flip=0.3, learnt='written'), dict(separation=4.0)])
def test_simulated_probabilities_are_true_to_what_was_learnt(kind):
    d = simulate_labels(4000, 0, **kind)
    p = probabilities(d)
    top = p.max(1)
    right = p.argmax(1) == d.label
    for lo, hi in ((0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        of = (top >= lo) & (top < hi)
        if of.sum() > 300:
            assert right[of].mean() == pytest.approx(top[of].mean(), abs=0.04)


def test_learnt_from_right_labels_is_not_calibrated_to_written_ones():
    d = simulate_labels(2000, 0, 0.3, separation=4.0)
    p = probabilities(d)
    assert p.max(1).mean() - (p.argmax(1) == d.label).mean() > 0.2


def test_scaling_uses_validation_rows_only_and_leaves_room():
    d = simulate_labels(500, 0, separation=6.0)
    out = calibrated(d)
    test = d[d.split == 'test']
    other = d.assign(label=np.where(d.split == 'test', (d.label + 1) % 4, d.label))
    assert (out.split == 'test').all() and len(out) == len(test)
    assert np.allclose(probabilities(calibrated(other)), probabilities(out)), 'no test label has a part in it'
    n = d[d.split == 'val'].groupby('fold').size().max()
    assert probabilities(out).max() < 1 - 0.4 / (n + 2) and (test.image.to_numpy() == out.image.to_numpy()).all()
    assert calibrated(test) is test


def test_label_noise_fires_above_its_null_only():
    runs = {
        k: [label_noise(simulate_labels(300, s, **kind), 30, trusted=True) for s in range(5)]
        for k, kind in dict(
            clean=dict(),
            flipped=dict(flip=0.3, separation=3.0, validation='right'),
            same_kind=dict(flip=0.3, separation=3.0),
        ).items()
    }
    fires = {k: np.mean([r.verdict == 'found' for r in v]) for k, v in runs.items()}
    assert fires['flipped'] == 1 and fires['clean'] <= 0.2 and fires['same_kind'] <= 0.2
    assert np.mean([r.flagged for r in runs['clean']]) > 0.08, 'flags alone would have accused clean labels'
    assert all(
        r.lo <= r.expected <= r.hi and r.excess == pytest.approx(r.flagged - r.expected)
        for v in runs.values()
        for r in v
    )


def test_without_trust_nothing_is_acquitted():
    d = simulate_labels(300, 1, separation=3.0)
    assert (
        label_noise(d, 30).verdict == 'inconclusive: scaled on labels of the same kind'
        and label_noise(d, 30, trusted=True).verdict == 'not found'
    )
    assert label_noise(simulate_labels(60, 1), 30, trusted=True).verdict == 'inconclusive: too few patients'


def test_the_bound_holds_where_its_assumption_does():
    truth, held = 0.2, []
    for s in range(8):
        d = simulate_labels(400, s, truth, separation=4.0, learnt='written')
        test = d[d.split == 'test']
        held += (noise_bound(d, 40).hi.to_numpy() >= [test.flipped[test.true == k].mean() for k in range(4)]).tolist()
    assert np.mean(held) > 0.85
    tight = noise_bound(simulate_labels(800, 0, separation=5.0), 30)
    assert tight.hi.max() < 0.25, 'a strong model and right labels: close to nothing'


def test_the_ranked_list_holds_the_planted_labels():
    d = simulate_labels(500, 2, 0.1, separation=4.0, validation='right')
    t = doubtful(d, 40)
    wrong = d[d.split == 'test'].set_index('image').flipped
    assert wrong[t.image].mean() > 0.85 > 0.3 > wrong.mean()
    assert (
        (t.label != t.suggested).all()
        and t.flagged.is_monotonic_decreasing
        and (t.p_suggested > t.p_label)[t.flagged].all()
    )
    margin = (t.p_label - t.p_suggested)[t.flagged]
    assert margin.is_monotonic_increasing
    m = noise_matrix(d)
    assert m.groupby('label').value.sum().to_numpy() == pytest.approx(np.ones(4)) and m.groupby(
        'label'
    ).expected.sum().to_numpy() == pytest.approx(np.ones(4))


def test_seeds_are_averaged():
    d = simulate_labels(200, 0)
    e = simulate_labels(200, 0, temperature=0.5)
    a, b, both = (noise_cases(f)[2] for f in (d, e, [d, e]))
    assert both == pytest.approx((a + b) / 2, abs=1e-12)


# ---------------------------------------------------------------- cartography
def test_cartography_is_a_plain_loop():
    g = np.random.default_rng(0)
    runs = []
    for _r in range(3):
        d = pd.DataFrame(g.random((20, 5)), columns=[f'epoch_{i}' for i in range(5)])
        d = d.mask(g.random(d.shape) < 0.3)
        runs.append(
            d.assign(image=[f'i{i}' for i in g.permutation(25)[:20]]).assign(
                label=lambda d: d.image.str[1:].astype(int) % 4
            )
        )
    t = cartography(runs).set_index('image')
    seen = {}
    for d in runs:
        for _, row in d.iterrows():
            v = np.array([row[f'epoch_{i}'] for i in range(5)], float)
            v = v[~np.isnan(v)]
            if len(v) > 1:
                seen.setdefault(row['image'], []).append((v.mean(), v.std(), (v > 0.5).mean(), (v >= 0.25).mean()))
    assert set(t.index) == set(seen)
    for k, v in seen.items():
        assert t.loc[k, ['confidence', 'variability', 'correct_lo', 'correct_hi']].tolist() == pytest.approx(
            np.mean(v, 0).tolist()
        ) and t.n_runs[k] == len(v)


def test_correctness_lies_between_its_bounds():
    g = np.random.default_rng(1)
    p = g.dirichlet([0.7] * 4, (200, 6))
    y = g.integers(0, 4, 200)
    d = pd.DataFrame(p[np.arange(200), :, y]).add_prefix('epoch_').assign(image=np.arange(200).astype(str), label=y)
    true = pd.Series((p.argmax(2) == y[:, None]).mean(1), d.image)
    t = cartography(d).set_index('image')
    assert (t.correct_lo <= true[t.index] + 1e-12).all() and (true[t.index] <= t.correct_hi + 1e-12).all()


def test_regions_are_thirds_and_ordered():
    g = np.random.default_rng(2)
    c, v = g.random(300), g.random(300)
    r = regions(c, v)
    assert [(r == k).sum() for k in ('hard', 'ambiguous', 'easy')] == [100] * 3
    assert c[r == 'hard'].max() < c[r != 'hard'].min() and v[r == 'ambiguous'].min() > v[r == 'easy'].max()


@pytest.mark.parametrize(
    'bad,match',
    [
        (lambda d: d[['image', 'label', 'epoch_0']], 'two epochs'),
        (lambda d: d.assign(epoch_1=1.5), 'probabilities'),
        (lambda d: [d, d.assign(label=1)], 'several labels'),
    ],
)
def test_cartography_refuses(bad, match):
    d = pd.DataFrame(dict(image=['a', 'b', 'c'], label=0, epoch_0=0.1, epoch_1=0.2))
    assert len(cartography(d)) == 3
    with pytest.raises(InputError, match=match):
        cartography(bad(d))


# ---------------------------------------------------------------- hardest, drawings
def test_hardest_is_a_sort():
    a = simulate_predictions(100, 3, images=3.0)
    b = a.assign(**{c: 2 * a[c] for c in LOGITS})
    t = hardest([a, b], 4)
    a = a.assign(loss=np.mean([-np.log(probabilities(f)[np.arange(len(a)), a.label]) for f in (a, b)], 0))
    for k, c in enumerate(CLASSES):
        want = a[a.label == k].sort_values('loss', ascending=False).drop_duplicates('patient').head(4)
        assert t[t.label == c].image.tolist() == want.image.tolist() and t[t.label == c].loss.tolist() == pytest.approx(
            want.loss.tolist()
        )


def test_drawings_show_what_is_known_and_no_more():
    d = simulate_predictions(80, 0)
    fig, axs = plt.subplots(1, 6)
    t = confusion_shares(d, Resampling(20))
    draw_confusions(axs[0], t)
    said = [o.get_text() for o in axs[0].texts]
    readers = sorted(s for s in said if s.startswith('readers'))
    assert readers == ['readers 0.24', 'readers 0.30', 'readers 0.33', 'readers 0.76']
    counts = [s for s in said if ' of ' in s]
    assert counts == [f'{round(r.value * r.n)} of {r.n}' for r in t.itertuples()] and len(said) == 36
    t = separability(d, Resampling(20))
    draw_separability(axs[2], t)
    assert len(axs[2].get_yticks()) == 8
    c = cartography(pd.DataFrame(dict(image=list('abcd'), label=range(4), epoch_0=0.1, epoch_1=[0.2, 0.3, 0.4, 0.5])))
    draw_cartography(axs[3], c, dict(zip(CLASSES, 'kbgr')))
    assert len(axs[3].collections) == 4
    top = hardest(d, 1).head(2)
    draw_gallery(axs[4:], top, np.zeros((2, 8, 8)), [[], [(1, 1, 3, 3)]])
    assert len(axs[5].patches) == 1 and not axs[4].patches and top.label[0] in axs[4].get_title()
    with pytest.raises(InputError, match='2 rows'):
        draw_gallery(axs[4:], top, [])
    plt.close(fig)
