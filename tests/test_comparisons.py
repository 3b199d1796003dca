"Comparisons against loops over pairs, scikit-learn, SciPy and planted truths. Each claim has a counter-test."

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from cxrpaper.data.phantom import READERS
from cxrpaper.evaluation.comparisons import (
    agreement_ceiling,
    detectable,
    kappa,
    kappa_of,
    panel_ceiling,
    rejection_rate,
    simulate_models,
)
from cxrpaper.evaluation.metrics import (
    Resampling,
    bootstrap_difference,
    delong_test,
    point_metrics,
    probabilities,
    resampled_units,
)
from cxrpaper.runs import InputError
from cxrpaper.schema import LOGITS


def delong_loops(positive, scores, patients=None):
    "The structural components of 1988 in float64, pair by pair; sums per patient as Obuchowski 1997."
    pos, neg = np.flatnonzero(positive), np.flatnonzero(~positive)
    win = lambda s, i, j: float(s[i] > s[j]) + 0.5 * float(s[i] == s[j])
    x = [[sum(win(s, i, j) for j in neg) / len(neg) for i in pos] for s in scores]
    y = [[sum(win(s, i, j) for i in pos) / len(pos) for j in neg] for s in scores]
    theta = [sum(v) / len(v) for v in x]
    if patients is None:
        cov = lambda v, a, b: (
            sum((p - theta[a]) * (q - theta[b]) for p, q in zip(v[a], v[b])) / (len(v[a]) - 1) / len(v[a])
        )
        return theta, [[cov(x, a, b) + cov(y, a, b) for b in range(len(scores))] for a in range(len(scores))]
    names = sorted(set(patients))
    sums = lambda v, of, a: [sum(q - theta[a] for q, i in zip(v[a], of) if patients[i] == n) / len(of) for n in names]
    scale = lambda k: k / (k - 1)
    i, j, k = len({patients[i] for i in pos}), len({patients[i] for i in neg}), len(names)
    dot = lambda u, v: sum(p * q for p, q in zip(u, v))
    S = [(sums(x, pos, a), sums(y, neg, a)) for a in range(len(scores))]
    return theta, [
        [
            scale(i) * dot(s[0], t[0]) + scale(j) * dot(s[1], t[1]) + scale(k) * (dot(s[0], t[1]) + dot(s[1], t[0]))
            for t in S
        ]
        for s in S
    ]


# ---------------------------------------------------------------- AUC
@pytest.mark.parametrize('seed', range(6))
def test_delong_is_the_loop_over_pairs(seed):
    g = np.random.default_rng(seed)
    n = int(g.integers(15, 50))
    y = np.append([True, True, False, False], g.random(n) < 0.4)
    patient = g.integers(0, n // 2, n + 4)
    s = np.round(g.normal(size=(2, n + 4)) + y, int(g.integers(0, 3)))
    for who in (None, patient):
        (one, two), c = delong_loops(y, s, who)
        r = delong_test(y, *s, who)
        assert [r['auc_a'], r['auc_b']] == pytest.approx([one, two], abs=1e-12)
        assert r['se'] ** 2 == pytest.approx(max(c[0][0] + c[1][1] - 2 * c[0][1], 0), abs=1e-12)


def swap_p(y, a, b, who, g, n=1500):
    u = lambda s: (stats.rankdata(s)[y].sum() - y.sum() * (y.sum() + 1) / 2) / y.sum() / (~y).sum()
    seen = abs(u(a) - u(b))
    d = []
    for _ in range(n):
        s = (g.random(who.max() + 1) < 0.5)[who]
        d.append(abs(u(np.where(s, b, a)) - u(np.where(s, a, b))))
    return np.mean(np.array(d) >= seen - 1e-12)


@pytest.mark.parametrize('images', [1.0, 5.0])
def test_swapping_models_patient_by_patient_agrees(images):
    g = np.random.default_rng(4)
    far = []
    for seed in range(3):
        a, b = simulate_models(100, seed, images, gain=0.3)
        _, who = np.unique(a.patient, return_inverse=True)
        y = (a.label == 1).to_numpy()
        one, two = (probabilities(d)[:, 1] for d in (a, b))
        boot = bootstrap_difference(a, b, Resampling(800), metrics=['auc_typical']).p[0]
        swap = swap_p(y, one, two, who, g)
        assert abs(delong_test(y, one, two, who)['p'] - swap) < 0.07 and abs(boot - swap) < 0.09
        far.append(abs(delong_test(y, one, two)['p'] - swap))
    assert max(far) < 0.07 if images == 1 else max(far) > 0.07


# ---------------------------------------------------------------- planted truths
def test_simulated_models_share_images_and_differ_by_the_gain():
    a, b = simulate_models(50, 3, 3.0)
    again, _ = simulate_models(50, 3, 3.0)
    keep = [c for c in a if c not in LOGITS]
    assert a[keep].equals(b[keep]) and a.equals(again) and not np.allclose(a[LOGITS], b[LOGITS])
    assert not simulate_models(50, 4, 3.0)[0][LOGITS].head(5).equals(a[LOGITS].head(5))
    best = simulate_models(50, 3, 3.0, gain=2.0)
    assert best[1].equals(b) and np.allclose((best[0][LOGITS] - a[LOGITS]).to_numpy(), 2 * np.eye(4)[a.label])


def test_rejection_rate():
    r = rejection_rate([0.01, 0.2, 0.04, np.nan, 0.05])
    assert r['rate'] == 0.5 and r['n'] == 4
    k = 3
    ci = rejection_rate([0.0] * k + [1.0] * (20 - k))
    z = stats.norm.ppf(0.975)
    centre = (k + z * z / 2) / (20 + z * z)
    half = z / (20 + z * z) * np.sqrt(k * (20 - k) / 20 + z * z / 4)
    assert (ci['lo'], ci['hi']) == pytest.approx((centre - half, centre + half))
    with pytest.raises(InputError, match='no p value'):
        rejection_rate([])


# ---------------------------------------------------------------- kappa and ceilings
@pytest.mark.parametrize('weights', [None, 'quadratic'])
def test_kappa_is_sklearns_in_every_resample(weights):
    g = np.random.default_rng(4)
    who = g.integers(0, 25, 60)
    a = g.integers(0, 4, 60)
    b = np.where(g.random(60) < 0.5, a, g.integers(0, 4, 60))
    got = kappa(a, b, who, weights, how=Resampling(60, 2))
    names = np.unique(who)
    want = [
        sk.cohen_kappa_score(a[i], b[i], weights=weights, labels=range(4))
        for q in np.hstack(list(resampled_units(len(names), 60, 2))).T.astype(int)
        for i in [np.concatenate([np.tile(np.flatnonzero(who == k), n) for k, n in zip(names, q)])]
    ]
    assert got['kappa'] == pytest.approx(sk.cohen_kappa_score(a, b, weights=weights), abs=1e-12)
    assert (got['lo'], got['hi']) == pytest.approx(tuple(np.quantile(want, [0.025, 0.975])), abs=1e-12)
    assert got['n_units'] == len(names) and got['agreement'] == (a == b).mean()


def test_kappa_edges():
    g = np.random.default_rng(0)
    a, b = g.integers(0, 4, (2, 4000))
    assert abs(kappa(a, b, how=Resampling(10))['kappa']) < 0.05 and kappa(a, a, how=Resampling(10))['kappa'] == 1
    assert kappa(a, b, how=Resampling(10))['kappa'] == pytest.approx(kappa(b, a, how=Resampling(10))['kappa'])
    near, far = np.clip(a + 1, 0, 3), 3 - a
    assert (
        kappa(a, near, weights='quadratic', how=Resampling(10))['kappa']
        > kappa(a, far, weights='quadratic', how=Resampling(10))['kappa']
    )
    assert np.isnan(kappa_of(np.diag([5, 0, 0, 0])[None])).all()
    for bad in (
        lambda: kappa(a, b[1:]),
        lambda: kappa(a, b, weights='linear'),
        lambda: kappa(a, b + 1),
        lambda: kappa(a - 1, b),
    ):
        with pytest.raises(InputError):
            bad()


def test_an_imitator_reaches_what_the_matrix_says():
    g = np.random.default_rng(3)
    q = g.dirichlet([0.4, 0.3, 0.2, 0.3], 40000)
    one, other, imitator = (g.random((3, 40000, 1)) > q.cumsum(1)[None, :, :3]).sum(2)
    joint = np.bincount(one * 4 + other, minlength=16).reshape(4, 4)
    joint = (joint + joint.T) / 2
    r = agreement_ceiling(joint / joint.sum(1, keepdims=True), joint.sum(1))
    assert r['accuracy'][0] == pytest.approx(r['accuracy'][1]) == pytest.approx((imitator == other).mean(), abs=0.01)
    assert r['kappa'][0] == pytest.approx(sk.cohen_kappa_score(imitator, other), abs=0.01)
    assert r['recall_lo'] == pytest.approx([(imitator == k)[other == k].mean() for k in range(4)], abs=0.02)


@pytest.mark.parametrize('seed', range(5))
def test_what_is_not_known_only_widens_the_bounds(seed):
    g = np.random.default_rng(seed)
    shares = np.array([0.28, 0.137, 0.337, 0.245])
    full = agreement_ceiling(READERS, shares)
    part = np.where(g.random((4, 4)) < 0.5, np.nan, READERS)
    r = agreement_ceiling(part, shares)
    for lo, hi, v in zip(r['recall_lo'], r['recall_hi'], full['recall_lo']):
        assert lo - 0.0051 <= v <= hi + 0.0051
    assert (
        r['accuracy'][0] <= full['accuracy'][0] + 0.005
        and full['accuracy'][0] <= r['accuracy'][1] + 0.005
        and r['kappa'][0] <= r['kappa'][1]
    )
    off = READERS.copy()
    np.fill_diagonal(off, np.nan)
    assert agreement_ceiling(off)['recall_lo'] == pytest.approx(np.diag(READERS), abs=0.002), (
        'a full row leaves only its diagonal'
    )
    with pytest.raises(InputError, match='probabilities'):
        agreement_ceiling(READERS * 1.2)


@pytest.mark.parametrize('concentration', [0.05, 0.3, 1.0, 20.0])
def test_no_model_passes_the_panel_ceiling(concentration):
    g = np.random.default_rng(1)
    q = g.dirichlet([concentration] * 4, 30000)
    r = panel_ceiling((q**2).sum(1).mean(), (q**3).sum(1).mean())
    assert r['imitation'] <= q.max(1).mean() <= r['best'], 'the best answer for each image, against a fresh reader'
    assert r['best_on_panel'] >= r['best'] - 0.02 or concentration > 1
    votes = (g.random((30000, 3, 1)) > q.cumsum(1)[:, None, :3]).sum(2)
    assert np.eye(4)[votes].sum(1).max(1).mean() / 3 == pytest.approx(r['best_on_panel'], abs=0.01)


def test_panel_edges():
    assert panel_ceiling(1.0, 1.0)['best_on_panel'] == panel_ceiling(1.0, 1.0)['best'] == 1
    assert panel_ceiling(1 / 3, 0.0)['best_on_panel'] == pytest.approx(2 / 3)
    for bad in ((0.3, 0.4), (0.9, 0.1), (1.2, 1.0)):
        with pytest.raises(InputError, match='cannot both be'):
            panel_ceiling(*bad)


# ---------------------------------------------------------------- detectable difference
def test_the_detectable_difference_is_the_textbook_factor_and_the_bootstraps_error():
    for power, factor in ((0.5, 1.95996), (0.8, 2.80159), (0.9, 3.24152)):
        assert detectable(0.01, power=power) == pytest.approx(0.01 * factor, rel=1e-4)
    a, b = simulate_models(100, 2, 2.0)
    compared = lambda a, b, **how: bootstrap_difference(a, b, Resampling(**how), metrics=['auc_macro']).iloc[0]
    r = compared(a, b, n_boot=600)
    pairs = [simulate_models(100, 100 + s, 2.0) for s in range(200)]
    own = [
        point_metrics(x.label, probabilities(x))['auc_macro'] - point_metrics(y.label, probabilities(y))['auc_macro']
        for x, y in pairs
    ]
    errors = np.array([compared(*p, n_boot=150).se for p in pairs[:20]])
    assert abs(errors.mean() / np.std(own) - 1) < 0.2, 'right on average'
    assert errors.max() > 1.2 * errors.min(), 'but one test set gives a rough figure: the rarest class has few patients'
    image = compared(a, b, n_boot=300, unit='image')
    assert detectable(image.se, image.df) < 0.9 * detectable(r.se, r.df), 'images as independent promise too much'
    assert compared(a, a, n_boot=20).se == 0
    for bad in (dict(power=0.3), dict(alpha=0), dict(power=1)):
        with pytest.raises(InputError):
            detectable(0.1, **bad)
