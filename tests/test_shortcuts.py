"Shortcuts: the verdict rule against its definition, masks against loops, the detectors where a fault is planted and where none is."

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from cxrpaper.data.folds import assign_folds
from cxrpaper.evaluation.metrics import Resampling, bootstrap, simulate_predictions
from cxrpaper.questions import shortcuts as S
from cxrpaper.runs import InputError, project_root, rng
from cxrpaper.training.loop import Batches

torch.set_num_threads(1)


def disc(n=6, px=48):  # dark ellipses on gray, moved about
    g, out, true = rng(0, 'disc'), np.full((n, px, px), 170, np.uint8), np.zeros((n, px, px), bool)
    for i in range(n):
        true[i] = (
            S.lung_template(
                (px, px),
                np.array([0.5 + g.normal(0, 0.03), 0.47 + g.normal(0, 0.05)]) * px,
                np.array([0.38, 0.36]) * px,
            )
            > 0
        )
    out[true] = 60
    return (out + g.normal(0, 4, out.shape)).clip(0, 255).astype(np.uint8), true


def table(n, per=1, label=None):
    who = np.arange(n) // per
    t = pd.DataFrame(
        dict(
            image=[f'i{i:04}' for i in range(n)],
            patient=[f'p{w:04}' for w in who],
            view='PA',
            sex='F',
            age=50.0,
            detector='d',
            source='s',
            photometric='MONOCHROME2',
            height=8,
            width=8,
        )
    )
    return t.assign(study=t.image, group=t.patient, label=rng(0, 'y').integers(0, 4, n) if label is None else label)


def test_overlap_equals_a_loop():
    t = table(120, 3)
    t['study'] = [f's{i // 2}' if i // 3 == (i // 2 * 2) // 3 else f't{i}' for i in range(120)]
    t.loc[5, 'label'] = -1
    got = S.patient_overlap(t, 4, 1).set_index('split')
    t = t[t.label >= 0].reset_index(drop=True)
    for by in ('group', 'study', 'image'):
        fold, hit, people = assign_folds(t, 4, 1, by), [], []
        for f in range(4):
            train = set(t.group[~np.isin(fold, [f, (f + 1) % 4])])
            hit += list(t.group[fold == f].isin(train))
            people += [g in train for g in set(t.group[fold == f])]
        assert got.images[by] == pytest.approx(np.mean(hit)) and got.patients[by] == pytest.approx(np.mean(people))


def test_holm_intervals_and_p_agree():
    g = rng(1, 'holm')
    for _trial in range(40):
        t = {str(i): (m, g.normal(m, 0.04, 2000), 50) for i, m in enumerate(g.uniform(0.4, 0.7, 5))}
        r = S.judge('x', t)
        assert list(r) == S.COLUMNS and ((r.verdict == 'found') <= (r.lo > 0.5)).all()
        clear = abs(r.p - 0.05) > 0.02
        assert ((r.verdict == 'found') == ((r.p < 0.05) & (r.value > 0.5)))[clear].all()


def test_verdicts():
    assert S.verdict(0.7, 0.55, 0.8, 0.5, 0.6) == 'found' and S.verdict(0.5, 0.45, 0.55, 0.5, 0.6) == 'not found'
    assert (
        S.verdict(0.5, 0.4, 0.65, 0.5, 0.6)
        == S.verdict(np.nan, np.nan, np.nan, 0.5, 0.6)
        == 'inconclusive: too few patients'
    )


def test_false_alarms_of_the_rule():
    "Predictions without information: a family of four tests fires in about 5 % of the trials at most, upper and lower side together."
    fired = [
        (
            S.judge(
                'x',
                {
                    str(k): S.auc_samples(
                        simulate_predictions(80, 4 * s + k, separation=0.0, shares=(0.25,) * 4), Resampling(200, s)
                    )
                    for k in range(4)
                },
            ).verdict
            == 'found'
        ).any()
        for s in range(20)
    ]
    assert np.mean(fired) <= 0.2


def test_auc_samples_are_those_of_metrics():
    d = simulate_predictions(60, 3)
    v, s, n = S.auc_samples(d, Resampling(200, 5))
    b = bootstrap(d, Resampling(200, 5), metrics=['auc_macro']).iloc[0]
    assert (v, n) == (pytest.approx(b.value), 60) and s.std(ddof=1) == pytest.approx(b.se)


def test_inflation_is_paired_only_where_the_images_are_the_same():
    a = simulate_predictions(80, 1)
    same = S.split_inflation(dict(group=a, image=a), Resampling(200))
    assert same.value.iloc[-1] == same.lo.iloc[-1] == same.hi.iloc[-1] == 0
    other = S.split_inflation(dict(group=a, image=a.iloc[:-3]), Resampling(200))
    assert (
        other.hi.iloc[-1] - other.lo.iloc[-1] > 0.02
        and 'unpaired' in other.test.iloc[-1]
        and other.verdict.iloc[-1] != 'found'
    )


def test_lung_fields_follow_and_ignore_exposure():
    x, true = disc()
    m = S.lung_fields(x)
    assert S.dice(m, true).min() > 0.8
    assert (S.lung_fields((x * 0.5 + 20).astype(np.uint8)) == m).mean() > 0.97
    assert (
        S.lung_fields(np.zeros((1, 32, 32), np.uint8)).any()
        and S.lung_fields(np.full((1, 32, 32), 255, np.uint8)).any()
    )
    with pytest.raises(InputError):
        S.lung_fields(x[0])


def test_changes_against_loops():
    x = torch.rand(4, 1, 40, 40, generator=torch.Generator().manual_seed(1))
    lungs = np.zeros((9, 20, 20), bool)
    lungs[:, 6:12, 4:9] = lungs[:, 7:11, 12:16] = True
    rows = np.array([8, 0, 3, 3])
    c = S.occlusions(lungs)
    for k in range(4):
        big = lungs[rows[k]].repeat(2, 0).repeat(2, 1)
        grown = np.zeros_like(big)
        for i, j in np.argwhere(big):
            grown[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] = True
        boxed = np.zeros_like(big)
        r, q = np.nonzero(grown)
        boxed[r.min() : r.max() + 1, q.min() : q.max() + 1] = True
        i, j = np.mgrid[:40, :40]
        d = lambda v, s: np.minimum(v, 39 - v) < s
        kept = {
            'no lungs': ~grown,
            'no thorax': ~boxed,
            'border only': d(i, 4) | d(j, 4),
            'corners only': d(i, 8) & d(j, 8),
            'lungs only': big,
        }
        for name, m in kept.items():
            v = x[k, 0].numpy()
            want = np.where(m, v, v[m].mean())
            assert c[name](x, rows)[k, 0].numpy() == pytest.approx(want, abs=1e-5), name


def test_change_without_any_lung_is_finite():
    c = S.occlusions(np.zeros((2, 16, 16), bool))
    x = torch.rand(2, 1, 32, 32)
    assert (
        all(torch.isfinite(f(x, np.array([0, 1]))).all() for f in c.values())
        and (c['no lungs'](x, np.array([0, 1])) == x).all()
    )


class Corner(torch.nn.Module):
    "Reads the lower right corner, or the lungs."

    def __init__(self, corner):
        super().__init__()
        self.corner = corner

    def forward(self, x):
        v = x[:, 0, -6:, -6:].mean((1, 2)) if self.corner else x[:, 0, 16:30, 10:38].mean((1, 2))
        return 12 * torch.stack([-((v - k / 4 - 0.1) ** 2) * 4 for k in range(4)], 1)


@pytest.mark.parametrize('corner', [True, False])
def test_a_model_that_reads_a_corner_is_caught(corner):
    g = rng(2, 'corner')
    y = g.integers(0, 4, 160)
    lungs = np.zeros((160, 48, 48), bool)
    lungs[:, 12:34, 6:42] = True
    x = g.integers(90, 110, (160, 48, 48)).astype(np.uint8)
    part = (slice(None), slice(-6, None), slice(-6, None)) if corner else (slice(None), slice(16, 30), slice(10, 38))
    x[part] = (255 * (y / 4 + 0.1))[:, None, None] + g.normal(0, 10, x[part].shape)
    ask = lambda changes: [
        S.occluded_predictions(Corner(corner), Batches(x, rows, y, 40), table(160, label=y), changes, fold=f)
        for f, rows in enumerate(np.split(np.arange(160), 2))
    ]
    o = S.occlusion_table(ask(S.occlusions(lungs)), Resampling(300)).set_index('test')
    m = S.marker_table(ask(S.markers(lungs)), Resampling(300)).set_index('test')
    assert o.value['image'] > 0.9 and o.value['constant'] == 0.5
    said = set(o.verdict[list(S.WITHOUT_LUNGS)])
    assert said == {'found'} if corner else 'found' not in said  # silent: ruled out, or too few patients to say
    assert (
        m.verdict['marker bottom right'] == ('found' if corner else 'not found')
        and m.verdict['marker top left'] == 'not found'
    )
    assert (m.value['marker bottom right, minus a patch elsewhere'] > 0.1) == corner and m.value[
        'decisions changed, top left'
    ] == 0


def test_parts_must_fit():
    d = simulate_predictions(20, 1)
    for parts in ([], {'no lungs': d}, [dict(image=d), dict(image=d, more=d)]):
        with pytest.raises(InputError):
            S.pool_parts(parts)
    with pytest.raises(InputError):
        S.marker_table({'image': d, 'x': d.iloc[::-1]}, Resampling(50))


def test_attribute_needs_both():
    g, n = rng(3, 'attributes'), 240
    t = table(n, 2)
    v = g.integers(0, 2, n)
    t['view'], t['sex'] = np.where(v, 'AP', 'PA'), np.where(g.random(n) < 0.5, 'F', 'M')
    blind = g.normal(size=(n, 6))
    sees = blind.copy()
    sees[:, 0] += 4 * v
    tied, free = np.where(v == 1, g.choice([1, 1, 1, 2], n), g.integers(0, 4, n)), g.integers(0, 4, n)
    said = {
        (a, b): S.attribute_probes(x, t.assign(label=y), how=Resampling(300)).set_index('test').verdict['view']
        for a, x in (('sees', sees), ('blind', blind))
        for b, y in (('tied', tied), ('free', free))
    }
    assert said['sees', 'tied'] == 'found' and 'found' not in {v for k, v in said.items() if k != ('sees', 'tied')}


def test_levels():
    t = table(60)
    t['view'] = ['AP'] * 30 + ['PA'] * 20 + ['unknown'] * 7 + ['LL'] * 3
    t['age'] = [*range(59), np.nan]
    lv = S.attribute_levels(t, 'view')
    assert (lv[:50] == [0] * 30 + [1] * 20).all() and (lv[50:] == -1).all()
    a = S.attribute_levels(t, 'age')
    assert a[-1] == -1 and (a[:30] == 0).all() and (a[30:59] == 1).all()
    assert (S.attribute_levels(t, 'sex') == -1).all() and (S.attribute_levels(t, 'nothing') == -1).all()


def test_rows_go_into_one_table():
    empty = S.attribute_probes(np.zeros((12, 2)) + np.arange(12)[:, None], table(12), how=Resampling(20))
    assert not len(empty) and list(empty) == S.COLUMNS
    d = simulate_predictions(60, 1)
    r = S.shortcut_rows(
        S.split_inflation(dict(group=d, study=d), Resampling(50)),
        S.baseline_rows(dict(prior=d, size=d), Resampling(50)),
        empty,
    )
    assert list(r) == S.COLUMNS and set(r.part) == {'split', 'baseline'} and len(S.shortcut_rows(r, verdicts=True)) == 2


REAL = project_root().parent / 'shared' / 'data' / 'real_cxr'


@pytest.mark.skipif(not REAL.is_dir(), reason='the real radiographs are not on this machine (../shared/data/real_cxr)')
def test_lung_fields_on_human_masks():
    import cv2

    from cxrpaper.data.store import squash

    masks = sorted((REAL / 'masks_lung').glob('*.png'))
    true = np.stack([squash((cv2.imread(str(f), 0) > 0).astype(np.float32), 96) >= 0.5 for f in masks])
    x = np.stack(
        [
            np.rint(squash(cv2.imread(str(REAL / 'images' / f'{f.stem}.jpg'), 0) / np.float32(255), 96) * 255).astype(
                np.uint8
            )
            for f in masks
        ]
    )
    d = S.dice(S.lung_fields(x), true)
    assert d.mean() > 0.78 and np.quantile(d, 0.1) > 0.65


@pytest.mark.parametrize('px', [64, 160, 512])
def test_a_marker_in_the_background_fits_at_every_size(px):
    "It lies within the image, outside the lungs and away from the corners."
    lungs = np.zeros((2, 64, 64), bool)
    lungs[:, 20:44, 16:48] = True
    x = torch.full((2, 1, px, px), 0.5)
    marked = (S.markers(lungs)['background'](x, np.arange(2)) != x)[:, 0].numpy()
    c, fields = (
        px // 8,
        np.stack([cv2.resize(m.astype(np.uint8), (px, px), interpolation=cv2.INTER_NEAREST) for m in lungs]) > 0,
    )
    assert marked.any((1, 2)).all() and not (marked & fields).any()
    assert not any(
        marked[:, r, q].any() for r in (slice(0, c), slice(-c, None)) for q in (slice(0, c), slice(-c, None))
    )
