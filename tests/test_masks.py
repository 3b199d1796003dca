"Mask metrics against loops over pixels, scikit-learn and simulations whose truth is known. Each claim has a counter-test."

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from cxrpaper.data.readers import read_real_cxr
from cxrpaper.data.store import boxes_mask, build_store
from cxrpaper.evaluation import rows as evaluation_rows
from cxrpaper.evaluation.masks import (
    LIMIT,
    MASK_METRICS,
    STEPS,
    MaskScores,
    annotator_agreement,
    at_threshold,
    best_threshold,
    dice_curve,
    evaluate_masks,
    join,
    load_mask_scores,
    mask_cases,
    mask_difference,
    pixel_ap,
    pixel_pr,
    prior_logits,
    save_mask_scores,
    score_masks,
    steps,
)
from cxrpaper.evaluation.metrics import Resampling, resampled_units, standard_error
from cxrpaper.runs import InputError, file_digest
from cxrpaper.schema import CLASSES

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'real_cxr'
PX = 24


def random_case(seed, n=40, patients=14, px=PX, split=None):
    "Logits, masks, boxes and table of `n` images; negatives are empty, some images are not annotated, some have no class."
    g = np.random.default_rng(seed)
    label = np.append([0, 1, 2, 3], g.integers(-1, 4, n - 4))
    count = np.where(label == 0, 0, g.integers(0 if n > 30 else 1, 4, n))
    boxes = [np.column_stack([g.uniform(0, px * 0.7, (k, 2)), g.uniform(1, px * 0.3, (k, 2))]) for k in count]
    masks = np.array([boxes_mask(b, px, px, px) for b in boxes])
    logits = (g.normal(size=(n, px, px)) * 2 + 2 * masks - 1).astype(np.float32)
    p = np.array([f'p{i:02}' for i in g.integers(0, patients, n)], object)
    table = pd.DataFrame(
        dict(
            image=[f'i{i:03}' for i in g.permutation(n)],
            study=p + '_' + g.integers(0, 2, n).astype(str).astype(object),
            patient=p,
            group=p,
            fold=0,
            split='test' if split is None else split,
            label=label,
            annotated=g.random(n) < 0.9,
        )
    )
    table.loc[:3, 'annotated'] = True
    return logits, masks, boxes, table


def same(a, b):
    return a.images.equals(b.images) and all(
        (getattr(a, k) == getattr(b, k)).all() and getattr(a, k).shape == getattr(b, k).shape
        for k in ('inside', 'outside', 'boxes', 'box_of')
    )


def fold_of(seed, shift=0.0, noise=1.0, fold=0, patients=30, n=90, truth=0):
    "A run: the truth of `truth` with `shift` logits of signal and `noise`; the last third of the patients is val."
    logits, masks, boxes, t = random_case(1000 * truth + fold, n, patients)
    g = np.random.default_rng(seed)
    logits = g.normal(size=masks.shape) * noise + shift * (masks - 0.5)
    t = t.assign(
        fold=fold,
        split=np.where(t.patient < f'p{2 * patients // 3:02}', 'test', 'val'),
        image=t.image + f'_{fold}',
        annotated=True,
    )
    for c in ('study', 'patient', 'group'):
        t[c] = t[c] + f'_{fold}'
    return score_masks(logits, masks, boxes, t)


def prior_of(fold=0, truth=0):
    "The run of the prior on the same images; its training masks are other draws."
    _, masks, boxes, _ = random_case(1000 * truth + fold, 90, 30)
    like = fold_of(0, fold=fold, truth=truth)
    train = random_case(77 + fold, 300)[1]
    return score_masks(
        np.broadcast_to(prior_logits(train), masks.shape), masks, boxes, like.images.assign(annotated=True)
    )


# ---------------------------------------------------------------- steps and counts
def test_steps_are_sixteenths():
    x = np.random.default_rng(0).normal(size=5000) * 5
    want = [min(255, max(0, int(np.floor(v * 16)) + 128)) for v in x.tolist()]
    assert (steps(x) == want).all() and steps(x).dtype == np.uint8 and steps(x.reshape(50, 100)).shape == (50, 100)
    for kind in (np.float32, np.float16):  # halves and all exact sixteenths fall where they do in float64
        edges = (np.arange(STEPS) / 16 - LIMIT).astype(kind)
        assert (steps(edges) == np.arange(STEPS)).all()
        assert (steps(np.nextafter(edges[1:], kind(-99))) == np.arange(STEPS - 1)).all()
    assert steps([1e30, -1e30]).tolist() == [255, 0]


@pytest.mark.parametrize('seed', range(4))
def test_counts_and_images_are_a_loop_over_pixels(seed):
    logits, masks, boxes, t = random_case(seed)
    s = score_masks(logits, masks, boxes, t)
    keep = [i for i in range(len(t)) if t.annotated[i]]
    assert s.images.image.tolist() == t.image[keep].tolist() and s.inside.dtype == np.uint32
    step = int(np.random.default_rng(seed).integers(90, 170))
    r = at_threshold(s, step)
    threshold = step / 16 - LIMIT
    for row, i in enumerate(keep):
        inside, outside = np.zeros(STEPS, int), np.zeros(STEPS, int)
        tp = fp = fn = 0
        for y in range(PX):
            for x in range(PX):
                v = float(logits[i, y, x])
                k = min(255, max(0, int(np.floor(v * 16)) + 128))
                (inside if masks[i, y, x] else outside)[k] += 1
                p, m = v >= threshold, bool(masks[i, y, x])
                tp += p and m
                fp += p and not m
                fn += m and not p
        assert (s.inside[row] == inside).all() and (s.outside[row] == outside).all()
        assert r.area[row] == pytest.approx((tp + fp) / PX**2) and r.true_area[row] == masks[i].mean()
        if masks[i].any():
            assert r.dice[row] == pytest.approx(2 * tp / (2 * tp + fp + fn)) and r.iou[row] == pytest.approx(
                tp / (tp + fp + fn)
            )
        else:
            assert np.isnan(r.dice[row]) and np.isnan(r.iou[row])
        hits = [np.mean(logits[i][boxes_mask([b], PX, PX, PX) == 1] >= threshold) for b in boxes[i]]
        assert r.n_boxes[row] == len(hits) and r.found[row] == sum(h >= 0.5 for h in hits)


def test_dice_and_iou_are_sklearns():
    logits, masks, boxes, t = random_case(9)
    t = t.assign(annotated=True)
    r = at_threshold(score_masks(logits, masks, boxes, t), 128)
    for i in np.flatnonzero(masks.any((1, 2))):
        assert r.dice[i] == pytest.approx(sk.f1_score(masks[i].ravel(), logits[i].ravel() >= 0))
        assert r.iou[i] == pytest.approx(sk.jaccard_score(masks[i].ravel(), logits[i].ravel() >= 0))


def test_empty_full_and_drawn_masks():
    t = pd.DataFrame(
        dict(
            image=list('abcd'),
            study=list('abcd'),
            patient=list('abcd'),
            group=list('abcd'),
            fold=0,
            split='test',
            label=[0, 1, 1, -1],
            annotated=True,
        )
    )
    masks = np.zeros((4, PX, PX), np.uint8)
    masks[1] = 1
    masks[2, :12, :10] = 1
    masks[3, 5, 5] = 1
    logits = np.full(masks.shape, -3.0)
    logits[0, 0, 0] = logits[1] = 3
    logits[2, 6:18, :10] = 3
    s = score_masks(logits, masks, [[], [(0, 0, PX, PX)], [], []], t)
    r = at_threshold(s, 128)
    assert np.isnan(r.dice[0]) and r.area[0] == 1 / PX**2, 'an empty mask has an area, no Dice'
    assert r.dice[1] == r.iou[1] == r.found[1] == 1
    assert r.dice[2] == 0.5 and r.iou[2] == pytest.approx(1 / 3) and r.n_boxes[2] == 0, 'a drawn mask needs no boxes'
    assert r.dice[3] == 0 and r.n_boxes.tolist() == [0, 1, 0, 0]
    all_ = at_threshold(s, 0)
    assert (all_.area == 1).all() and all_.dice[1] == 1
    assert best_threshold(score_masks(np.where(masks == 1, 9, -9), masks, [[]] * 4, t)) == 128, (
        'of equal steps the one nearest to one half'
    )


def test_half_a_box_is_found():
    t = pd.DataFrame(
        dict(image=['a'], study='a', patient='a', group='a', fold=0, split='test', label=1, annotated=True)
    )
    box = [np.array([[2, 2, 4, 4], [12, 12, 4, 4.0]])]
    logits = np.full((1, PX, PX), -1.0)
    logits[0, 2:4, 2:6] = 1
    logits[0, 12:14, 12:16] = 1
    logits[0, 13, 15] = -1
    r = at_threshold(score_masks(logits, boxes_mask(box[0], PX, PX, PX)[None], box, t), 128)
    assert r.n_boxes[0] == 2 and r.found[0] == 1, '8 of 16 pixels are enough, 7 are not'


@pytest.mark.parametrize(
    'change,match',
    [
        (dict(masks=lambda m: m[:, :12, :12]), r'masks: shape \(40, 12, 12\).*Hint: predict at the size'),
        (dict(masks=lambda m: m[1:]), 'masks: shape'),
        (dict(masks=lambda m: m * 255), 'masks: values besides 0 and 1.*Hint'),
        (dict(masks=lambda m: m * 0.5), 'masks: values besides'),
        (dict(logits=lambda l: l[:, None]), 'logits: shape.*drop the channel axis'),
        (dict(boxes=lambda b: b[:-1]), 'boxes: 39 rows for 40'),
        (dict(images=lambda t: t.iloc[:39]), 'images: 39 rows for 40'),
        (dict(images=lambda t: t.drop(columns='group')), 'no column group'),
        (dict(images=lambda t: t.assign(patient=[None] + t.patient.tolist()[1:])), 'column patient: empty'),
        (dict(images=lambda t: t.drop(columns='annotated')), 'no column annotated'),
        (dict(images=lambda t: t.assign(annotated='False')), 'column annotated: neither'),
        (dict(images=lambda t: t.assign(label=4)), 'label: not a class'),
        (dict(boxes=lambda b: [np.array([[1, 1, 0, 3.0]])] + b[1:]), 'image i.*boxes: not all'),
        (dict(boxes=lambda b: [np.array([[1, np.nan, 2, 3.0]])] + b[1:]), 'image i.*boxes: not all'),
    ],
)
def test_inputs_that_do_not_belong_together(change, match):
    data = dict(zip(('logits', 'masks', 'boxes', 'images'), random_case(0)))
    for k, f in change.items():
        data[k] = f(data[k])
    with pytest.raises(InputError, match=match) as e:
        score_masks(**data)
    assert e.value.field and e.value.hint


def test_nan_logits_are_refused_where_they_count():
    logits, masks, boxes, t = random_case(0)
    for v in (np.nan, np.inf, -np.inf):
        x = logits.copy()
        x[2, 0, 0] = v
        with pytest.raises(InputError, match=f'image {t.image[2]}: logits: .*not finite.*Hint'):
            score_masks(x, masks, boxes, t)
        with pytest.raises(InputError, match='logits: 1 values'):
            steps(x)
    t.loc[2, 'annotated'] = False
    assert len(score_masks(x, masks, boxes, t)) == t.annotated.sum()


# ---------------------------------------------------------------- joining, taking, saving
def test_batches_join_to_one_call():
    logits, masks, boxes, t = random_case(3)
    t.loc[10:16, 'annotated'] = False  # one batch without any
    whole = score_masks(logits, masks, boxes, t)
    for size in (1, 5, 16):
        parts = [
            score_masks(logits[i : i + size], masks[i : i + size], boxes[i : i + size], t[i : i + size])
            for i in range(0, len(t), size)
        ]
        assert same(join(parts), whole)
    assert not same(join(parts[::-1]), whole)
    with pytest.raises(InputError, match='nothing to join.*Hint'):
        join([])


def test_take_keeps_boxes_with_their_image():
    s = score_masks(*random_case(4))
    g = np.random.default_rng(0)
    rows = g.integers(0, len(s), 50)
    got = s.take(rows)
    want = [s.boxes[s.box_of == r] for r in rows]
    assert (
        (got.boxes == np.concatenate(want)).all()
        and (got.box_of == np.repeat(np.arange(50), [len(w) for w in want])).all()
        and (got.inside == s.inside[rows]).all()
    )
    mask = g.random(len(s)) < 0.5
    assert (
        same(s.take(mask), s.take(np.flatnonzero(mask)))
        and len(s.take(~mask)) + len(s.take(mask)) == len(s)
        and len(s.of('val')) == 0
    )


def test_saved_twice_the_same_bytes_and_damage_is_seen(tmp_path):
    s = score_masks(*random_case(5))
    for i in range(2):
        save_mask_scores(s, tmp_path / str(i))
    a, b = (tmp_path / str(i) / 'segmentation.npz' for i in range(2))
    assert a.read_bytes() == b.read_bytes() and list((tmp_path / '0').iterdir()) == [a], 'nothing temporary is left'
    back = load_mask_scores(tmp_path / '0')
    assert same(back, s) and [str(d) for d in back.images.dtypes] == [str(d) for d in s.images.dtypes]
    save_mask_scores(back, tmp_path / '2')
    assert file_digest(tmp_path / '2' / 'segmentation.npz') == file_digest(a)
    empty = s.take(np.zeros(len(s), bool))
    save_mask_scores(empty, tmp_path / '3')
    assert same(load_mask_scores(tmp_path / '3'), empty)
    data = a.read_bytes()
    for n in (0, 10, len(data) // 2, len(data) - 1):
        a.write_bytes(data[:n])
        with pytest.raises(InputError, match='segmentation.npz: damaged.*Hint: run the notebook'):
            load_mask_scores(tmp_path / '0')
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 255
    a.write_bytes(flipped)
    with pytest.raises(InputError, match='damaged'):
        load_mask_scores(tmp_path / '0')
    np.savez(a, inside=s.inside)
    with pytest.raises(InputError, match='damaged'):
        load_mask_scores(tmp_path / '0')
    a.unlink()
    with pytest.raises(InputError, match='no such file.*Hint'):
        load_mask_scores(tmp_path / '0')


# ---------------------------------------------------------------- threshold and average precision
def test_threshold_is_the_best_of_all():
    s = score_masks(*random_case(6))
    every = [np.nanmean(at_threshold(s, k).dice) for k in range(STEPS)]
    assert np.allclose(dice_curve(s), every, atol=1e-14) and every[best_threshold(s)] == pytest.approx(max(every))
    with pytest.raises(InputError, match='none of .* true mask.*Hint'):
        best_threshold(s.take(~s.inside.any(1)))
    for bad in (-1, 256):
        with pytest.raises(InputError, match='not a step'):
            at_threshold(s, bad)


@pytest.mark.parametrize('seed', range(5))
def test_pixel_ap_is_sklearns_on_steps(seed):
    logits, masks, boxes, t = random_case(seed)
    t = t.assign(annotated=True)
    s = score_masks(logits, masks, boxes, t)
    got = pixel_ap(s.inside.sum(0), s.outside.sum(0))
    assert got == pytest.approx(sk.average_precision_score(masks.ravel(), steps(logits).ravel()), abs=1e-12)
    assert abs(got - sk.average_precision_score(masks.ravel(), logits.ravel())) < 5e-3
    w = np.random.default_rng(seed).exponential(size=len(t))  # weights of images, as a resample has them
    assert pixel_ap(w @ s.inside, w @ s.outside) == pytest.approx(
        sk.average_precision_score(masks.ravel(), steps(logits).ravel(), sample_weight=np.repeat(w, PX * PX)), abs=1e-12
    )
    rec, prec = pixel_pr(s.inside.sum(0), s.outside.sum(0))
    assert rec[-1] == 1 and prec[-1] == pytest.approx(masks.mean()) and (np.diff(rec) >= 0).all()


def test_pixel_ap_of_nothing_is_undefined():
    assert np.isnan(pixel_ap(np.zeros(STEPS), np.ones(STEPS))) and pixel_ap(
        np.ones(STEPS), np.zeros(STEPS)
    ) == pytest.approx(1)
    two = pixel_ap(np.array([np.zeros(STEPS), np.ones(STEPS)]), np.ones((2, STEPS)))
    assert np.isnan(two[0]) and two[1] == pytest.approx(0.5)


def test_prior_is_the_mean():
    g = np.random.default_rng(0)
    m = (g.random((50, 8, 8)) < 0.3).astype(np.uint8)
    m[:, 0, 0] = 0
    m[:, 1, 1] = 1
    z = prior_logits(m)
    assert z[0, 0] == -LIMIT and z[1, 1] == LIMIT
    inner = (z > -LIMIT) & (z < LIMIT)
    assert np.allclose(1 / (1 + np.exp(-z[inner])), m.mean(0)[inner])
    assert (
        np.argsort(prior_logits(np.concatenate([m, np.zeros_like(m)]))[inner]) == np.argsort(z[inner])
    ).mean() > 0.9, 'empty masks keep the ranks'
    for bad in (m[:0], m[0]):
        with pytest.raises(InputError, match='masks: shape.*Hint'):
            prior_logits(bad)


# ---------------------------------------------------------------- intervals
def by_loop(runs, by, drawn=None):
    "The metrics of one seed by pandas and scikit-learn; `drawn`: how often each unit counts."
    tests = join([r.of('test') for r in runs])
    rows = pd.concat([at_threshold(r.of('test'), best_threshold(r.of('val'))) for r in runs], ignore_index=True)
    if drawn is not None:  # a patient drawn twice is two patients, with two sets of studies
        take = [(i, f'{rows.study[i]}#{j}') for i in range(len(rows)) for j in range(int(drawn[rows.group[i]]))]
        i, study = [a for a, _ in take], [b for _, b in take]
        tests, rows = tests.take(np.array(i, int)), rows.iloc[i].assign(study=study).reset_index(drop=True)

    def mean(r, num, den=None):
        if not len(r):
            return np.nan
        if by == 'image':
            return r[num].mean() if den is None else r[num].sum() / r[den].sum()
        per = r.groupby('study')[[num] + ([den] if den else [])].mean()
        return per[num].mean() if den is None else per[num].sum() / per[den].sum()

    def ap(m):
        weight = np.ones(m.sum()) if by == 'image' else 1 / rows[m].groupby('study').study.transform('size').to_numpy()
        a, b = weight @ tests.inside[m], weight @ tests.outside[m]
        return (
            np.nan
            if not a.sum()
            else sk.average_precision_score(
                np.repeat([1, 0], STEPS), np.tile(np.arange(STEPS), 2), sample_weight=np.concatenate([a, b])
            )
        )

    out = {}
    for c, m in [('', np.ones(len(rows), bool))] + [
        (f'_{c}', (rows.label == k).to_numpy()) for k, c in enumerate(CLASSES)
    ]:
        for k in ('dice', 'iou'):
            out[k + c] = mean(rows[m & (rows.true_area > 0)], k)
        out['box_recall' + c] = mean(rows[m & (rows.n_boxes > 0)], 'found', 'n_boxes')
        out['pixel_ap' + c] = ap(m)
    out['area_negative'] = mean(rows[(rows.label == 0) & (rows.true_area == 0)], 'area')
    return np.array([out[k] for k in MASK_METRICS])


@pytest.mark.parametrize('by', ('image', 'study'))
def test_interval_is_the_one_of_a_loop(by):
    seeds = [[fold_of(10 * s + f, 2.0, 1.5, f, n=60, patients=20) for f in range(2)] for s in range(2)]
    n_boot, got = 12, evaluate_masks(seeds, Resampling(12, 4), by=by)
    assert got.metric.tolist() == MASK_METRICS and (got.n_seeds == 2).all()
    assert np.allclose(got.value, np.mean([by_loop(runs, by) for runs in seeds], 0), atol=1e-12, equal_nan=True)
    groups = np.unique(np.concatenate([r.of('test').images.group for r in seeds[0]]).astype(str))
    draws = np.hstack(list(resampled_units(len(groups), n_boot, 4))).T
    samples = np.array([[by_loop(runs, by, dict(zip(groups, q))) for q in draws] for runs in seeds])  # (S,B,K)
    points = np.array([by_loop(runs, by) for runs in seeds])
    for i, r in got.iterrows():
        want = standard_error([(points[:, i], samples[:, :, i], 1)], r.n_units)
        assert np.allclose((r.se, r.df), want, rtol=1e-9, equal_nan=True), r.metric
    tests = pd.concat([r.of('test').images for r in seeds[0]])
    inside = join([r.of('test') for r in seeds[0]]).inside
    assert got.set_index('metric').n['dice'] == (
        inside.any(1).sum() if by == 'image' else tests.study[inside.any(1)].nunique()
    )
    assert got.set_index('metric').n_units['pixel_ap'] == len(groups)


def test_runs_of_one_pre_training_are_no_independent_runs():
    "Five runs of two pre-trainings, which differ more than their runs do: the interval knows two, with one degree of freedom; a start that no runs share changes nothing."

    def of(starts):
        seeds = [[fold_of(40 + s, 1.0 + 1.5 * (s > 2), 1.0)] for s in range(5)]
        for (r,), start in zip(seeds, starts):
            r.images.attrs['start'] = start
        return seeds

    how = Resampling(100, 1)
    shared, own, none = (of(s) for s in (['a'] * 3 + ['b'] * 2, list('abcde'), [None] * 5))
    e, each, plain = (evaluate_masks(s, how).set_index('metric').loc['dice'] for s in (shared, own, none))
    assert each.equals(plain) and e.value == plain.value
    assert e.se > 1.3 * plain.se and e.df < 1.5 < plain.df and e.hi - e.lo > 2 * (plain.hi - plain.lo)
    other = [[fold_of(60 + s, 2.0, 1.5)] for s in range(5)]
    d, each = (mask_difference(s, other, how).set_index('metric').loc['dice'] for s in (shared, own))
    back = mask_difference(other, shared, how).set_index('metric').loc['dice']
    assert d.difference == each.difference and d.se > 1.3 * each.se and back.se == pytest.approx(d.se)


def test_mask_scores_of_a_row_say_what_their_runs_begin_from(monkeypatch):
    runs = {f'run{s}{f}': dict(seed=s, weights=w) for s, w in enumerate(('moco/a', 'moco/b', None)) for f in range(2)}
    monkeypatch.setattr(evaluation_rows, 'row_runs', lambda study, row: runs)
    monkeypatch.setattr(evaluation_rows, 'load_mask_scores', lambda folder: fold_of(0, 2.0))
    found = evaluation_rows.mask_runs(dict(seeds=[0, 1, 2]), {})
    assert [[r.images.attrs['start'] for r in s] for s in found] == [['moco/a'] * 2, ['moco/b'] * 2, [None] * 2]


def test_what_has_no_images_has_no_value():
    got = evaluate_masks([[fold_of(0, 2.0)]], Resampling(50)).set_index('metric')
    for k in ('dice_negative', 'iou_negative', 'box_recall_negative', 'pixel_ap_negative'):
        assert got.loc[k, ['value', 'lo', 'hi']].isna().all()
    run = fold_of(0, 2.0)
    lone = run.images.patient[(run.images.label == 3) & (run.images.split == 'test')].iloc[0]
    run = run.take(~((run.images.label == 3) & (run.images.patient != lone)).to_numpy())
    rare = evaluate_masks([[run]], Resampling(300)).set_index('metric')
    assert rare.n_units['dice_atypical'] <= 1 and np.isnan(rare.lo['dice_atypical']), (
        'one patient of a class: absent from a third of the resamples'
    )
    assert not np.isnan(rare.lo['dice'])


def test_threshold_comes_from_val_and_not_from_test():
    good = fold_of(0, 4.0)
    val = (good.images.split == 'val').to_numpy()
    shifted = replace(
        good,
        inside=np.where(val[:, None], np.roll(good.inside, 40, 1), good.inside),
        outside=np.where(val[:, None], np.roll(good.outside, 40, 1), good.outside),
    )
    a, b = (evaluate_masks([[r]], Resampling(20)).set_index('metric').value for r in (good, shifted))
    assert b['dice'] < a['dice'] - 0.1 and b['pixel_ap'] == a['pixel_ap'], (
        'val logits that are 2.5 higher put the threshold too high'
    )


# ---------------------------------------------------------------- what is refused
def test_runs_that_cannot_be_judged():
    run = fold_of(0, 2.0)
    val, test = run.of('val'), run.of('test')
    none = run.take(np.zeros(len(run), bool))
    leak = replace(run, images=run.images.assign(group='one'))
    for seeds, match in (
        ([[none]], 'seed 0, run 0: annotated: no annotated image'),
        ([[run], [test]], 'seed 1, run 0: split: no val rows'),
        ([[val]], 'no test rows'),
        ([[run, run]], 'seed 0: image: .* tested in two runs'),
        ([[leak]], 'group: one is in val and test'),
        ([[join([run, fold_of(1, fold=1)])]], 'fold: folds 0, 1'),
        ([[join([run, test])]], 'is there twice'),
        ([[run], [fold_of(0, truth=1)]], 'seed 1: images: other images'),
        ([], 'seeds: no list of runs'),
        (run, 'seeds: no list of runs'),
        ([['run']], 'seeds: a str'),
        ([[join([val.take(~val.inside.any(1)), test])]], 'seed 0, run 0: val: none of'),
        (
            [[join([val, test.take((test.images.group == test.images.group[0]).to_numpy())])]],
            'group: 1 group in the test images',
        ),
    ):
        with pytest.raises(InputError, match=match) as e:
            evaluate_masks(seeds, Resampling(10))
        assert e.value.field and e.value.hint
    whole = replace(run, images=run.images.assign(study='one'))
    with pytest.raises(InputError, match='study one belongs to several groups'):
        evaluate_masks([[whole]], Resampling(10), by='study')
    assert len(evaluate_masks([[leak.take(np.arange(len(leak)))]], Resampling(10, unit='patient'), leaky=True)) == len(
        MASK_METRICS
    )
    for bad in (dict(unit='hospital'), dict(by='patient'), dict(level=2)):
        with pytest.raises(InputError, match='Hint'):
            by = bad.pop('by', 'image')
            evaluate_masks([[run]], Resampling(10, **bad), by=by)
    with pytest.raises(InputError, match='seed 0: seeds: no runs'):
        evaluate_masks([[]], Resampling(10))
    for pair in (([], [[run]]), ([[run]], run)):
        with pytest.raises(InputError, match='no list of runs.*Hint'):
            mask_difference(*pair, 10)
    with pytest.raises(InputError, match='other images'):
        mask_difference([[run]], [[fold_of(0, truth=2)]], Resampling(10))


# ---------------------------------------------------------------- differences
def test_a_model_does_not_differ_from_itself():
    runs = [fold_of(f, 2.0, 1.5, f) for f in range(2)]
    d = mask_difference([runs], [runs], Resampling(100))
    assert (d.p.dropna() == 1).all() and (d.difference.dropna() == 0).all() and d.p.notna().sum() > 10
    assert d.p[d.metric == 'dice_negative'].isna().all()


def test_paired_difference_is_its_definition():
    a, b = [[fold_of(s, 3.0, 1.5)] for s in range(2)], [[fold_of(9, 2.0, 1.5)]]
    d, back = mask_difference(a, b, Resampling(200, 2)), mask_difference(b, a, Resampling(200, 2))
    ea, eb = evaluate_masks(a, Resampling(20)), evaluate_masks(b, Resampling(20))
    assert (
        np.allclose(d.a, ea.value, equal_nan=True)
        and np.allclose(d.b, eb.value, equal_nan=True)
        and np.allclose(d.difference, d.a - d.b, equal_nan=True)
    )
    ca, cb = [mask_cases(r) for r in a], mask_cases(b[0])
    s = np.hstack([np.mean([c.samples(q) for c in ca], 0) - cb.samples(q) for q in resampled_units(cb.n_units, 200, 2)])
    i = MASK_METRICS.index('iou_typical')
    assert d.se[i] == pytest.approx(s[i].std(ddof=1)) and d.n_runs[i] == 1  # b has one run: about these models
    half = stats.t.ppf(0.975, d.df[i]) * d.se[i]
    assert (d.lo[i], d.hi[i]) == pytest.approx((d.difference[i] - half, d.difference[i] + half))
    assert d.p[i] == pytest.approx(2 * stats.t.sf(abs(d.difference[i]) / d.se[i], d.n_units[i] - 1))
    assert np.allclose(back.lo, -d.hi, equal_nan=True) and np.allclose(back.p, d.p, equal_nan=True)
    assert d.set_index('metric').lo['dice'] > 0 and d.set_index('metric').p['dice'] < 0.05


def test_prior_loses_against_sight_and_wins_against_chance():
    prior = [prior_of(f) for f in range(2)]
    good, chance = ([fold_of(50 + f, shift, 1.0, f) for f in range(2)] for shift in (3.0, 0.0))
    d = mask_difference([good], [prior], Resampling(300)).set_index('metric')
    assert (d.lo[['dice', 'iou', 'pixel_ap']] > 0).all() and (d.p[['dice', 'pixel_ap']] < 0.05).all()
    d = mask_difference([chance], [prior], Resampling(300)).set_index('metric')
    assert (d.hi[['dice', 'pixel_ap']] < 0).all(), 'a mask of noise does not beat the place'


def test_false_alarms_of_the_paired_test():
    ps = [
        mask_difference(
            [[fold_of(2 * s, 2.0, 2.0, truth=s)]], [[fold_of(2 * s + 1, 2.0, 2.0, truth=s)]], Resampling(100)
        )
        .set_index('metric')
        .p['dice']
        for s in range(20)
    ]
    assert np.mean(np.array(ps) < 0.05) < 0.2


# ---------------------------------------------------------------- size of the study, and real masks
def test_the_whole_study_in_seconds():
    g = np.random.default_rng(0)
    n = 4500
    p = np.array([f'p{i}' for i in g.integers(0, 2400, n)], object)
    t = pd.DataFrame(
        dict(
            image=[f'i{i}' for i in range(n)],
            study=p,
            patient=p,
            group=p,
            fold=0,
            split=np.where(p < 'p22', 'val', 'test'),
            label=g.integers(0, 4, n),
        )
    )
    s = MaskScores(
        t,
        g.integers(0, 9, (n, STEPS), np.uint32),
        g.integers(0, 99, (n, STEPS), np.uint32),
        np.zeros((0, STEPS), np.uint32),
        np.zeros(0, int),
    )
    start = time.perf_counter()
    evaluate_masks([[s]], Resampling(1000))
    took = time.perf_counter() - start
    print(f'1,000 resamples of {len(MASK_METRICS)} metrics, {len(s.of("test"))} images: {took:.1f} s')
    assert took < 15


@pytest.mark.skipif(not REAL.exists(), reason='../shared/data/real_cxr is absent')
def test_real_drawn_masks(tmp_path):
    c = read_real_cxr(REAL, surrogate=False)
    c.images = c.images[c.images.mask_path != ''].reset_index(drop=True)
    store = build_store(c, 64, out=tmp_path / 'stores' / 'drawn', workers=0)
    masks, t = np.array(store.masks), store.index.assign(fold=0, split='test')
    assert t.annotated.all() and masks.any((1, 2)).sum() > 20
    s = score_masks(16.0 * masks - 8, masks, [store.boxes(i) for i in range(len(t))], t)
    assert (at_threshold(s, 128).dice.dropna() == 1).all()
    prior = score_masks(np.broadcast_to(prior_logits(masks), masks.shape), masks, [[]] * len(t), t)
    assert 0.1 < dice_curve(prior).max() < 0.8


# ---- two annotators -----------------------------------------------------------------------------------------------------------


def boxed(n=40, patients=12, side=1024, seed=0):
    "Images of one box each, on which every planted shift is known."
    g = np.random.default_rng(seed)
    p = [f'p{i % patients:02}' for i in range(n)]
    boxes = [[(*g.uniform(100, 300, 2), *g.uniform(150, 400, 2))] for _ in range(n)]
    about = dict(image=[f'i{i:02}' for i in range(n)], study=p, patient=p, group=p, label=1)
    return pd.DataFrame(about | dict(height=side, width=side, boxes=boxes))


def test_the_same_boxes_agree_and_boxes_elsewhere_do_not():
    t = boxed()
    for second, want in ((t.boxes.tolist(), 1), ([[(800, 800, 100, 100)]] * len(t), 0)):
        a = annotator_agreement(t, second, 128)
        assert a.metric.tolist() == ['dice', 'iou', 'box_recall']
        assert (a[['value', 'lo', 'hi']] == want).all(axis=None) and set(a.n) == {40} and set(a.n_units) == {12}


@pytest.mark.parametrize('share', [0.1, 0.25, 0.6])
@pytest.mark.parametrize('px', [64, 256])
def test_a_known_shift_gives_the_known_dice(share, px):
    "Within what one pixel of the grid can change in a box."
    t = boxed()
    second = [[(x + share * w, y, w, h)] for ((x, y, w, h),) in t.boxes]
    a = annotator_agreement(t, second, px).set_index('metric')
    assert a.value['dice'] == pytest.approx(1 - share, abs=1.5 * 1024 / px / 275 / 3)
    assert a.value['iou'] == pytest.approx((1 - share) / (1 + share), abs=1.5 * 1024 / px / 275 / 3)
    assert a.value['box_recall'] == (share < 0.5)
    back = annotator_agreement(t.assign(boxes=second), t.boxes.tolist(), px).set_index('metric')
    assert back.value[['dice', 'iou']].tolist() == pytest.approx(a.value[['dice', 'iou']].tolist())


def test_agreement_is_the_mean_over_images_and_its_interval_is_over_patients():
    t, g = boxed(60, 15), np.random.default_rng(1)
    hand = dict(zip(sorted(set(t.patient)), g.uniform(0, 0.5, 15)))  # each patient's boxes are moved by one share
    second = [[(x + hand[p] * w, y, w, h)] for p, ((x, y, w, h),) in zip(t.patient, t.boxes)]
    t.at[0, 'boxes'], second[1] = [], []  # what one of them left empty does not count
    a = annotator_agreement(t, second, 256)
    dice = a.set_index('metric').loc['dice']
    both = t.iloc[2:]
    assert dice.n == 58 and a.attrs['images'] == both.image.tolist()
    assert dice.value == pytest.approx(np.mean([1 - hand[p] for p in both.patient]), abs=0.01)
    se = np.std(list(hand.values()), ddof=1) / np.sqrt(15)  # the patients are of nearly equal size
    assert dice.se == pytest.approx(se, rel=0.15) and dice.lo < dice.value < dice.hi
    by_image = annotator_agreement(t, second, 256, Resampling(unit='image')).set_index('metric').loc['dice']
    assert by_image.se < 0.7 * dice.se, 'images of one patient are no independent evidence'


def test_too_few_patients_and_boxes_that_do_not_belong_are_refused():
    t = boxed(40, 10)
    second = t.boxes.tolist()
    assert annotator_agreement(t, second, 64).n_units.tolist() == [10] * 3
    for bad, field, words in (
        ([[] if p == 'p03' else b for p, b in zip(t.patient, second)], 'second', '36 images, of 9 group'),
        ([[]] * 40, 'second', '0 images, of 0 group'),
        (second[1:], 'second', '39 rows for 40 images'),
        ([*second[:-1], [(2000, 0, 9, 9)]], 'second', 'image i39'),
        ([*second[:-1], [(0, 0, 9, np.nan)]], 'second', 'image i39'),
    ):
        with pytest.raises(InputError) as e:
            annotator_agreement(t, bad, 64)
        assert e.value.field == field and words in str(e.value) and e.value.hint
    t.at[5, 'boxes'] = [(0, 0, -1, 5)]
    with pytest.raises(InputError, match='image i05: boxes'):
        annotator_agreement(t, second, 64)
