"Grad-CAM against float64 loops, scores against loops over pixels, the table against a naive bootstrap. Each claim has a counter-test."

import numpy as np
import pytest
import torch

from cxrpaper.evaluation.metrics import Resampling, resampled_units
from cxrpaper.models.multitask import MultiTask, multitask_encoder
from cxrpaper.models.nets import Classifier, Encoder
from cxrpaper.questions.saliency import (
    CAMS,
    at_resolution,
    draw_saliency,
    exchanges,
    grad_cam,
    map_correlation,
    map_scores,
    near,
    others_mean,
    randomise,
    saliency_differences,
    saliency_table,
    saliency_verdict,
    sanity_check,
    sanity_verdict,
    segmentation_maps,
    simulate_squares,
)
from cxrpaper.runs import InputError
from cxrpaper.training.loop import Batches


def network(kind, seed=0):
    torch.manual_seed(seed)
    if kind == 'classifier':
        return Classifier(Encoder('resnet10t')).train()  # a model that was not in evaluation mode
    return MultiTask(multitask_encoder('resnet10t', kind), kind, 32)


def stack(n=5, px=64, seed=0, labels=(1, 2, 3, 0, 2)):
    return np.random.default_rng(seed).integers(0, 256, (n, px, px), np.uint8), np.array(labels[:n])


def random_case(seed, n=12, px=16, patients=6):
    "Maps with many ties, some empty; random masks."
    g = np.random.default_rng(seed)
    maps = g.integers(0, 5, (n, px, px)).astype(np.float32)
    maps[0] = 0
    maps[1] = 3
    masks = np.zeros((n, px, px), bool)
    for m in masks:
        for _ in range(g.integers(1, 3)):
            y, x = g.integers(0, px - 3, 2)
            m[y : y + g.integers(1, 7), x : x + g.integers(1, 7)] = True
    return maps, masks, np.array([f'p{i}' for i in np.arange(n) % patients])


# ---------------------------------------------------------------- Grad-CAM
def hand_map(model, x, c):
    "Equations 1 and 2 of Selvaraju et al. in float64, the gradient by central differences of the logit, by loops."
    model = model.double().eval()
    with torch.no_grad():
        a = model.encoder(torch.tensor(x / 255.0)[None, None])[-1][0].numpy()
        logit = lambda a: model.head(a.mean((2, 3)))[:, c]  # (B,channels,h,w) -> (B,)
        out = np.zeros(a.shape[1:])
        for k in range(len(a)):
            step = torch.zeros(out.size, *a.shape, dtype=torch.float64)
            step[:, k] = 1e-3 * torch.eye(out.size, dtype=torch.float64).view(-1, *a.shape[1:])
            grad = (
                logit(torch.tensor(a) + step) - logit(torch.tensor(a) - step)
            ) / 2e-3  # one value for each point of channel k
            out += float(grad.mean()) * a[k]
    model.float()
    return np.maximum(out, 0)


@pytest.mark.parametrize('kind', ['classifier', 'unet'])
def test_grad_cam_is_its_definition(kind):
    images, labels = stack(2, 96)
    model = network(kind)
    got = grad_cam(model, Batches(images, np.arange(2), labels, 2))
    for i in range(2):
        want = hand_map(model, images[i], int(labels[i]))
        if want.max() == want.min():
            continue
        side = images.shape[1] // len(want)
        at = np.arange(len(want)) * side + side // 2  # pixels around the centres of the points
        centre = (
            got[i][np.ix_(at, at)]
            + got[i][np.ix_(at - 1, at)]
            + got[i][np.ix_(at, at - 1)]
            + got[i][np.ix_(at - 1, at - 1)]
        ) / 4
        assert np.corrcoef(centre.ravel(), want.ravel())[0, 1] > 0.98
        wrong = hand_map(model, images[i], (int(labels[i]) + 1) % 4)
        assert wrong.max() == wrong.min() or np.corrcoef(centre.ravel(), wrong.ravel())[0, 1] < 0.98


def test_grad_cam_leaves_the_model_alone():
    images, labels = stack()
    model = network('classifier')
    model.requires_grad_(False)  # a frozen model can be explained too
    before, mode = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    grad_cam(model, Batches(images, np.arange(5), labels, 5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and mode == [
        m.training for m in model.modules()
    ]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()) and torch.is_grad_enabled()


@pytest.mark.parametrize('method', CAMS)
def test_grad_cam_does_not_depend_on_the_batches(method):
    images, labels = stack()
    model = network('unet')
    whole, parts = (grad_cam(model, Batches(images, [4, 0, 2], labels, n), method=method) for n in (3, 2))
    assert np.allclose(whole, parts, atol=1e-4)
    assert np.allclose(
        whole[1], grad_cam(model, Batches(images, [0], labels, 1), method=method)[0], atol=1e-4
    ) and not np.allclose(whole[0], whole[1])


def test_classes():
    images, labels = stack()
    model = network('unet')
    rows = np.arange(5)
    of = lambda y, *a: grad_cam(model, Batches(images, rows, y, 5), *a)
    with torch.no_grad():
        said = model.eval()(torch.tensor(images[:, None] / 255.0).float())[0].argmax(1).numpy()
    assert (
        np.array_equal(of(labels, 'predicted'), of(said))
        and np.array_equal(of(np.full(5, -1)), of(said))
        and np.array_equal(of(labels, 2), of(np.full(5, 2)))
    )
    assert not np.array_equal(of(said), of((said + 1) % 4))
    for bad in ('true', 4, -1, 1.5):
        with pytest.raises(InputError, match='not a class'):
            of(labels, bad)
    with pytest.raises(InputError, match='shuffled'):
        grad_cam(model, Batches(images, rows, labels, 5, seed=0))


# ---------------------------------------------------------------- scores
def slow_scores(v, m, tolerance):
    "One map and one mask, by loops; ties as the mean over all ways to break them."
    px = len(v)
    cells = list(np.ndindex(px, px))
    r = tolerance * px
    close = lambda i: (
        any(m[j] and (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2 <= int(r) ** 2 for j in cells) if int(r) else m[i]
    )
    top = [i for i in cells if v[i] == v.max()]
    k, ranked = int(m.sum()), sorted(v.ravel())[::-1]
    cut = ranked[k - 1]
    sure, maybe = [i for i in cells if v[i] > cut], [i for i in cells if v[i] == cut]
    hit = sum(m[i] for i in sure) + np.mean([m[i] for i in maybe]) * (k - len(sure))
    return [np.mean([close(i) for i in top]), v[m].sum() / v.sum() if v.sum() else m.mean(), hit / (2 * k - hit)]


@pytest.mark.parametrize('seed', range(4))
def test_scores_equal_loops(seed):
    maps, masks, _ = random_case(seed)
    tolerance = (0, 1 / 16, 2 / 16, 3 / 16)[seed]
    got = map_scores(maps, masks, masks, tolerance)
    assert np.allclose(
        got[['pointing', 'energy', 'iou']], [slow_scores(v, m, tolerance) for v, m in zip(maps, masks)], atol=1e-6
    )
    assert np.allclose(got.lung, got.energy)


def test_an_empty_map_scores_chance():
    _, masks, _ = random_case(5)
    got, area = map_scores(np.zeros(masks.shape), masks, tolerance=0), masks.mean((1, 2))
    assert np.allclose(got.pointing, area) and np.allclose(got.energy, area) and np.allclose(got.iou, area / (2 - area))
    draws = np.random.default_rng(0).random((400, *masks.shape[1:]))  # random maps reach it on average
    many = map_scores(draws, np.repeat(masks[2:3], 400, 0), tolerance=0).mean()
    assert (
        abs(many.pointing - area[2]) < 0.05 and abs(many.energy - area[2]) < 0.01 and abs(many.iou - got.iou[2]) < 0.02
    )


def test_what_a_score_does_not_see():
    maps, masks, _ = random_case(6)
    a = map_scores(maps, masks)
    assert np.allclose(a, map_scores(maps * 7, masks))
    sharp = map_scores(maps**3, masks)
    assert np.allclose(a[['pointing', 'iou']], sharp[['pointing', 'iou']]) and not np.allclose(a.energy, sharp.energy)
    perfect = map_scores(masks, masks)
    assert (perfect == 1).all(axis=None) and (
        map_scores(masks, masks[:, ::-1, ::-1])[['energy', 'iou']].mean() < 0.5
    ).all()
    assert np.isnan(map_scores(maps, np.zeros_like(masks)).iou).all()


def test_near_is_a_disc():
    m = np.zeros((1, 20, 20), bool)
    m[0, 10, 10] = True
    y, x = np.mgrid[:20, :20]
    assert np.array_equal(near(m, 0.2)[0], (y - 10) ** 2 + (x - 10) ** 2 <= 16) and np.array_equal(near(m, 0.04), m)


def test_bad_input():
    maps, masks, who = random_case(0)
    for bad, say in (
        ((maps[:3], masks), 'of the same images'),
        ((-maps, masks), 'negative'),
        ((maps * np.nan, masks), 'no number'),
        ((maps, masks, masks[:, 1:]), 'lungs'),
    ):
        with pytest.raises(InputError, match=say):
            map_scores(*bad)
    with pytest.raises(InputError, match='no image has a box'):
        saliency_table({'m': maps}, masks & False, who)
    with pytest.raises(InputError, match='no masks'):
        segmentation_maps(network('classifier'), Batches(*[stack()[0], [0], stack()[1], 1]))
    with pytest.raises(InputError, match='side'):
        at_resolution(masks, 17)


# ---------------------------------------------------------------- baselines and the table
@pytest.mark.parametrize('seed', range(5))
def test_baselines_never_see_the_patient(seed):
    g = np.random.default_rng(seed)
    who = g.integers(0, 9, 40).astype(str)
    p = exchanges(who)
    assert (who[p] != who).all() and (np.sort(p, 1) == np.arange(40)).all()
    maps = g.random((40, 4, 4))
    prior = others_mean(maps, who)
    assert np.allclose(prior, [maps[who != w].mean(0) for w in who], atol=1e-6)
    changed = maps.copy()
    changed[who == who[0]] = 9
    assert np.array_equal(others_mean(changed, who)[0], prior[0]) and not np.array_equal(
        others_mean(changed, who)[np.flatnonzero(who != who[0])[0]], prior[np.flatnonzero(who != who[0])[0]]
    )


def test_table_equals_a_naive_bootstrap():
    maps, masks, who = random_case(3, 20, patients=8)
    masks[4] = False
    t = saliency_table({'m': maps}, masks, who, how=Resampling(50, 2)).set_index(['metric', 'than'])
    keep = masks.any((1, 2))
    own, than = saliency_differences(maps[keep], masks[keep], who[keep])
    names = np.unique(who[keep])
    drawn = np.hstack(list(resampled_units(len(names), 50, 2))).T.astype(int)
    cases = [(own.iou, 'prior', ('value', 'lo', 'hi'))] + [
        (d.iou, k, ('difference', 'difference_lo', 'difference_hi')) for k, d in than.items()
    ]
    for d, k, columns in cases:
        slow = [
            np.mean(np.concatenate([np.tile(d.to_numpy()[who[keep] == w], times) for w, times in zip(names, row)]))
            for row in drawn
        ]
        assert np.allclose(
            t.loc[('iou', k), list(columns)].astype(float), [d.mean(), *np.quantile(slow, [0.025, 0.975])]
        )
    assert (t.n == 19).all() and (t.n_units == 8).all()


def test_exchanged_terms_have_the_mean_of_the_plain_difference():
    maps, masks, who = random_case(8, 20, patients=10)
    own, than = saliency_differences(maps, masks, who)
    plain = own.mean() - np.mean([map_scores(maps[p], masks).mean() for p in exchanges(who)], 0)
    assert np.allclose(than['exchanged'].mean(), plain)
    same = np.broadcast_to(maps[3], maps.shape)  # one map for everybody: nothing is due to the image
    assert np.allclose(saliency_differences(same, masks, who)[1]['exchanged'].mean(), 0) and not np.allclose(plain, 0)


def test_verdicts():
    _, masks, _, who = simulate_squares(30, 3, px=32)
    maps = dict(
        own=masks.astype(float),
        prior=others_mean(masks, who),
        mirrored=masks[:, :, ::-1].astype(float),
        coarse=at_resolution(masks, 8),
        point=at_resolution(masks, 1),
    )
    t = saliency_table(maps, masks, who, how=Resampling(300))
    say = {k: saliency_verdict(t, k) for k in maps}
    assert say['own'].startswith('found') and say['coarse'].startswith('found')
    assert all(say[k].startswith('not found') for k in ('prior', 'mirrored', 'point'))
    assert saliency_verdict(t, 'mirrored', ceiling='coarse') == say['mirrored'] and saliency_verdict(
        t, 'mirrored', ceiling='point'
    ).startswith('inconclusive')
    assert saliency_verdict(t, 'own', ceiling='point') == say['own'] and saliency_verdict(
        t, 'own', min_patients=31
    ).startswith('inconclusive: too few')


# ---------------------------------------------------------------- sanity
def test_randomise():
    model = network('unet')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    last = 0
    for share in (0, 0.5, 1):
        new = randomise(model, share, 1).state_dict()
        moved = {k for k in before if not torch.equal(before[k], new[k])}
        assert all(
            torch.equal(before[k].flatten().float().sort()[0], new[k].flatten().float().sort()[0]) for k in before
        )
        assert any(k.startswith('decoder') for k in moved) and 'head.weight' in moved and len(moved) > last
        last = len(moved)
        assert any(k.startswith('encoder') for k in moved) == (share > 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(randomise(model, 1, 1).head.weight, randomise(model, 1, 2).head.weight)


def test_sanity_check_sees_what_depends_on_the_weights():
    images, labels = stack(8, labels=(1, 2, 3, 0) * 2)
    model = network('unet')
    b = Batches(images, np.arange(8), labels, 8)
    who = np.arange(8)
    ignores = sanity_check(
        model,
        b,
        who,
        lambda model, batches: batches.images[batches.rows].astype(float),
        shares=(0, 1),
        how=Resampling(50),
    )
    assert np.allclose(ignores.value, 1) and sanity_verdict(ignores).startswith('fails')
    noise = iter(np.random.default_rng(0).random((9, 8, 8, 8)))
    depends = sanity_check(model, b, who, lambda *_: next(noise), shares=(1,), how=Resampling(50))
    assert abs(depends.value[0]) < 0.1 and sanity_verdict(depends).startswith('passes')
    with pytest.raises(InputError, match='empty'):
        sanity_check(model, b, who, lambda *_: np.zeros((8, 4, 4)))
    with pytest.raises(InputError, match='patients'):
        sanity_check(model, b, who[:3], lambda *_: np.ones((8, 4, 4)))


def test_constant_maps_in_the_correlation():
    g = np.random.default_rng(0)
    a, flat = g.random((3, 4, 4)), np.zeros((3, 4, 4))
    assert (map_correlation(a, flat) == 0).all() and np.isnan(map_correlation(flat, a)).all()


def test_drawing():
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    fig, axs = plt.subplots(1, 3)
    g = np.random.default_rng(0)
    cam = np.zeros((16, 16))
    cam[3, 5] = 1
    draw_saliency(axs, g.integers(0, 255, (16, 16)), [(1, 2, 3, 4), (8, 8, 2, 2)], cam, g.random((16, 16)))
    assert (
        [len(a.patches) for a in axs] == [2, 2, 2]
        and axs[1].lines[0].get_xydata().tolist() == [[5.5, 3.5]]
        and len(axs[2].collections)
    )
    draw_saliency(plt.subplots(1, 3)[1], np.zeros((16, 16)), [], cam * 0, cam * 0)  # nothing to mark is no error
    plt.close('all')
