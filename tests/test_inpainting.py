"Inpainting: the holes that were asked for, references in float64, nothing hidden leaks, nothing is learnt where there is nothing to learn."

import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from cxrpaper.data.phantom import draw_radiograph
from cxrpaper.models.nets import Encoder
from cxrpaper.runs import InputError, rng, torch_generator
from cxrpaper.training.augment import PRESETS
from cxrpaper.training.inpainting import *
from cxrpaper.training.loop import Batches, Checkpointing, EpochRecorder, make_learner, scheduled

gen = lambda seed=0: torch_generator(seed, 'test')


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# --- holes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('px', [32, 64])
def test_share_is_kept_and_every_pixel_reached(kind, px):
    h = draw_holes(3000, px, Holes(kind), gen())
    share = h.double().mean((1, 2, 3))
    assert h.shape == (3000, 1, px, px) and h.dtype == torch.bool
    assert 0.2 <= share.min() and share.max() <= 0.3 and abs(share.mean() - 0.25) < 0.004
    assert share.min() < 0.205 and share.max() > 0.295  # the range is used
    assert h.any(0).all() and not h.all(0).any()


@pytest.mark.parametrize(
    'how',
    [
        Holes('blocks', share=(0.05, 0.1)),
        Holes('blocks', share=(0.3, 0.4)),
        Holes('freeform', share=(0.05, 0.1), width=(0.02, 0.2)),
        Holes('freeform', share=(0.3, 0.4)),
        Holes('mixed', share=(0.24, 0.26)),
    ],
)
def test_other_shares(how):
    share = draw_holes(500, 64, how, gen()).double().mean((1, 2, 3))
    assert how.share[0] <= share.min() and share.max() <= how.share[1]


def test_blocks_are_up_to_five_rectangles_of_the_stated_sides():
    px = 96
    for m in draw_holes(300, px, Holes('blocks'), gen())[:, 0].numpy().astype(np.uint8):
        n, _, stats, _ = cv2.connectedComponentsWithStats(m, connectivity=4)
        assert 2 <= n <= 6  # background included; rectangles may touch
        for _x, _y, w, h, area in stats[1:]:
            assert min(w, h) >= px / 6 - 1
            if w <= px / 3 + 1 and h <= px / 3 + 1 and area == w * h:
                assert max(w, h) <= px / 3 + 1
    lone = Holes('blocks', blocks=1, share=(0.05, 0.1))
    for m in draw_holes(200, px, lone, gen())[:, 0].numpy():
        w, h = m.any(0).sum(), m.any(1).sum()
        assert m.sum() == w * h and px / 6 - 1 <= min(w, h) and max(w, h) <= px / 3 + 1


def test_holes_come_from_the_generator_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    a = draw_holes(100, 48, generator=gen(1))
    assert (
        torch.equal(states[0], torch.get_rng_state())
        and (states[1] == np.random.get_state()[1]).all()
        and states[2] == random.getstate()
    )
    torch.manual_seed(9)
    assert torch.equal(draw_holes(100, 48, generator=gen(1)), a)
    assert not torch.equal(draw_holes(100, 48, generator=gen(2)), a)
    assert len({m.numpy().tobytes() for m in a}) == 100  # no two alike


def test_mixed_is_half_and_half():
    corners = lambda h: (h[:, 0, 1:, 1:] ^ h[:, 0, 1:, :-1] ^ h[:, 0, :-1, 1:] ^ h[:, 0, :-1, :-1]).sum(
        (1, 2)
    )  # of the outline
    blocks, strokes, mixed = (corners(draw_holes(400, 64, Holes(k), gen())) for k in KINDS)
    assert blocks.max() < 45 <= strokes.min()
    assert 160 < (mixed < 45).sum() < 240


@pytest.mark.parametrize(
    'bad,field',
    [
        (dict(kind='x'), 'kind'),
        (dict(share=(0.3, 0.3)), 'share'),
        (dict(share='.2'), 'share'),
        (dict(side=(0.1, 1.0)), 'side'),
        (dict(blocks=True), 'blocks'),
        (dict(segments=0), 'segments'),
        (dict(width=(-0.1, 0.1)), 'width'),
    ],
)
def test_bad_holes(bad, field):
    with pytest.raises(InputError, match=f'Holes.{field}'):
        Holes(**bad)


def test_what_cannot_be_drawn():
    with pytest.raises(InputError, match='not reached'):
        draw_holes(4, 32, Holes('blocks', share=(0.8, 0.9)), gen())
    with pytest.raises(InputError, match='generator'):
        draw_holes(4, 32)
    assert draw_holes(0, 32, generator=gen()).shape == (0, 1, 32, 32)
    assert fixed_holes(5, 5, 32, Holes(), 0).shape == (0, 1, 32, 32)


@pytest.mark.parametrize('size', [1, 30, 64, 100, 150])
def test_fixed_holes_whatever_the_batch(size):
    whole = fixed_holes(0, 150, 32, Holes(), 0)
    assert torch.equal(
        torch.cat([fixed_holes(i, min(150, i + size), 32, Holes(), 0) for i in range(0, 150, size)]), whole
    )


# --- what the network sees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', FILLS)
def test_nothing_hidden_comes_through(how):
    x, y, h = (
        torch.rand(20, 1, 32, 32, generator=gen()),
        torch.rand(20, 1, 32, 32, generator=gen(1)),
        draw_holes(20, 32, generator=gen(2)),
    )
    a, b = (fill(v, h, how, gen(3)) for v in (x, torch.where(h, y, x)))
    assert torch.equal(a, b) and torch.equal(a[~h], x[~h]) and a.min() >= 0 and a.max() <= 1
    torch.testing.assert_close(fill(x, h)[4][h[4]], x[4][~h[4]].double().mean().float().expand(int(h[4].sum())))


def test_restoration_does_not_see_what_is_hidden():
    torch.manual_seed(0)
    net = Inpainter(Encoder('resnet10t'), 32)
    net.train()
    net.decoder[0].eval()
    images, other = rng(0).integers(0, 256, (2, 6, 64, 64), dtype=np.uint8)
    h = draw_holes(6, 64, generator=gen())
    changed = np.where(h[:, 0].numpy(), other, images)
    for how in FILLS:
        assert np.array_equal(
            np.where(h[:, 0], restore(net, images, h, how), 0), np.where(h[:, 0], restore(net, changed, h, how), 0)
        )
    assert net.training and net.encoder.training and not net.decoder[0].training  # modes as they were
    np.testing.assert_allclose(restore(net, images, h, size=64), restore(net, images, h, size=4), atol=1e-5)
    for name, r in classical(images, h).items():
        np.testing.assert_array_equal(
            np.where(h[:, 0], r, 0), np.where(h[:, 0], classical(changed, h)[name], 0), err_msg=name
        )


def test_the_leak_would_be_noticed():
    "Filled from the whole image's mean, what is hidden does come through."
    x, y, h = (
        torch.rand(4, 1, 32, 32, generator=gen()),
        torch.rand(4, 1, 32, 32, generator=gen(1)),
        draw_holes(4, 32, generator=gen(2)),
    )
    leaky = lambda v: torch.where(h, v.mean((1, 2, 3), keepdim=True), v)
    assert not torch.equal(leaky(x), leaky(torch.where(h, y, x)))


# --- model ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arch', ['resnet18', 'tf_efficientnet_lite0', 'mobilenetv3_small_100', 'densenet121', 'convnext_atto']
)
@pytest.mark.parametrize('px', [64, 96])
def test_any_encoder_at_any_size(arch, px):
    net = Inpainter(Encoder(arch), 32)
    y = net(torch.rand(2, 1, px, px, generator=gen()))
    assert y.shape == (2, 1, px, px) and 0 <= y.min() and y.max() <= 1
    y.sum().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


def test_bad_sizes():
    with pytest.raises(InputError, match='divisible by 32'):
        Inpainter(Encoder('resnet10t'), 16)(torch.rand(1, 1, 48, 48))
    with pytest.raises(InputError, match='width'):
        Inpainter(Encoder('resnet10t'), 0)


# --- loss -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('hole,rest,power', [(1.0, 0.1, 1), (1.0, 0.0, 2), (0.3, 2.0, 1), (0.0, 1.0, 2)])
def test_loss_is_the_naive_one(hole, rest, power):
    p, t = torch.rand(2, 5, 1, 32, 32, generator=gen(), dtype=torch.float64)
    h = draw_holes(5, 32, generator=gen(1))
    total = 0.0
    for i in range(5):
        parts = {True: [], False: []}
        for a, b, m in zip(p[i].flatten().tolist(), t[i].flatten().tolist(), h[i].flatten().tolist()):
            parts[m].append(abs(a - b) ** power)
        total += (hole * np.mean(parts[True]) + rest * np.mean(parts[False])) / 5
    f = InpaintingLoss(hole, rest, power)
    assert abs(f(p, t, h).item() - total) < 1e-6 and set(f.terms) == {'hole', 'rest'}
    assert abs(hole * f.terms['hole'].item() + rest * f.terms['rest'].item() - total) < 1e-6
    assert f(t, t, h) == 0


def test_loss_in_bfloat16_is_summed_in_float32():
    p, t = torch.rand(2, 5, 1, 32, 32, generator=gen())
    h = draw_holes(5, 32, generator=gen(1))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = InpaintingLoss()(p.bfloat16(), t, h)
    assert loss.dtype == torch.float32 and torch.equal(loss, InpaintingLoss()(p.bfloat16().float(), t, h))


def test_gradient_stays_where_the_weight_is():
    p = torch.rand(3, 1, 32, 32, generator=gen(), requires_grad=True)
    t, h = torch.rand(3, 1, 32, 32, generator=gen(1)), draw_holes(3, 32, generator=gen(2))
    InpaintingLoss(1.0, 0.0)(p, t, h).backward()
    assert (p.grad[h] != 0).all() and (p.grad[~h] == 0).all()


@pytest.mark.parametrize('bad', [dict(power=3), dict(hole_weight=-1.0), dict(hole_weight=0.0, rest_weight=0.0)])
def test_bad_losses(bad):
    with pytest.raises(InputError):
        InpaintingLoss(**bad)


# --- scores ---------------------------------------------------------------------------------------------------------------------------


def test_harmonic_is_the_dense_solution():
    for seed in range(5):
        x, h = rng(seed).random((9, 11)), rng(seed, 'h').random((9, 11)) < 0.6
        h[0, :4] = True
        h[5, 5] = False  # also at the edge
        got = harmonic(np.where(h, 77.0, x), h)
        want = np.where(h, 0.0, x)
        for _ in range(6000):  # sweeps in float64
            for y, c in zip(*np.nonzero(h)):
                want[y, c] = np.mean(
                    [
                        want[i, j]
                        for i, j in ((y - 1, c), (y + 1, c), (y, c - 1), (y, c + 1))
                        if 0 <= i < 9 and 0 <= j < 11
                    ]
                )
            if _ % 200 == 0 and np.abs(want - got).max() < 1e-9:
                break
        np.testing.assert_allclose(got, want, atol=1e-8)
    np.testing.assert_array_equal(harmonic(x, np.zeros_like(h)), x)
    with pytest.raises(InputError):
        harmonic(x, np.ones_like(h))


def test_seamless():
    images = rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    h = draw_holes(3, 32, generator=gen())
    true = (images / 255).astype(np.float32)
    np.testing.assert_allclose(seamless(true, images, h), true, atol=1e-6)
    calm = (images // 2 + 60).astype(np.uint8)
    np.testing.assert_allclose(seamless(calm / 255 + 0.02, calm, h), calm / 255, atol=1e-5)  # a wrong level goes away
    plane = np.add.outer(np.linspace(-0.01, 0.01, 32), np.linspace(0, 0.02, 32))
    inner = torch.zeros_like(h)
    inner[..., 8:20, 10:24] = True
    np.testing.assert_allclose(
        seamless(calm / 255 + plane, calm, inner), calm / 255, atol=1e-5
    )  # a wrong slope too, away from the edge


def test_scores_are_the_naive_ones():
    images = rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    h = draw_holes(4, 32, generator=gen())
    r = rng(1).random((4, 32, 32)).astype(np.float32)
    s = restoration_scores(images, h, dict(r=r, perfect=images / 255), list('abcd'))
    for i, row in s[s.method == 'r'].reset_index(drop=True).iterrows():
        e = [
            abs(float(a) - b / 255)
            for a, b, m in zip(r[i].ravel(), images[i].ravel().tolist(), h[i].ravel().tolist())
            if m
        ]
        assert abs(row.hole_l1 - sum(e) / len(e)) < 1e-6 and row.image == 'abcd'[i]
        assert abs(row.psnr + 10 * np.log10(np.mean((r[i].astype(float) - images[i] / 255) ** 2))) < 1e-3
    perfect = s[s.method == 'perfect']
    assert perfect.hole_l1.max() < 1e-7 and perfect.ssim.min() > 0.9999
    with pytest.raises(InputError, match='nothing is hidden'):
        restoration_scores(images, h & False, dict(r=r))
    with pytest.raises(InputError, match='one restoration'):
        restoration_scores(images, h, dict(r=r[:2]))


def test_differences_are_resampled_by_patient():
    import pandas as pd

    g = rng(0)
    effect = g.normal(size=40)
    table = lambda d: pd.concat(
        [pd.DataFrame(dict(image=np.arange(len(d)), method=m, hole_l1=v)) for m, v in (('a', d), ('b', 0 * d))],
        ignore_index=True,
    )
    once = restoration_differences(table(effect), np.arange(40), 'a').iloc[0]
    many = restoration_differences(table(np.repeat(effect, 10)), np.repeat(np.arange(40), 10), 'a').iloc[
        0
    ]  # ten equal images a patient are no new evidence
    naive = restoration_differences(table(np.repeat(effect, 10)), np.arange(400), 'a').iloc[0]
    assert (
        np.allclose([once.difference, once.lo, once.hi], [many.difference, many.lo, many.hi])
        and many.n == 400
        and many.n_units == 40
    )
    assert naive.hi - naive.lo < 0.5 * (many.hi - many.lo)
    assert (
        abs(once.difference - effect.mean()) < 1e-12
        and once.lo < effect.mean() < once.hi
        and once.better == (effect < 0).mean()
    )
    assert restoration_differences(table(effect - 2), np.arange(40), 'a').iloc[0].hi < 0
    shuffled = table(effect).sample(frac=1, random_state=0)  # units follow the order of the images in the frame
    order = shuffled.image.drop_duplicates().to_numpy()
    assert np.allclose(restoration_differences(shuffled, np.arange(40)[order], 'a').iloc[0].difference, once.difference)


# --- training -------------------------------------------------------------------------------------------------------------------------


def learner(images, n_val=40, file=None, size=8, lr=2e-3, seed=0, epochs=1, filling='mean', cbs=()):
    torch.manual_seed(seed)
    w = EpochRecorder(progress=False)
    y = np.zeros(len(images), int)
    net = Inpainter(Encoder('resnet10t'), 64)
    data = Batches(images, range(n_val, len(images)), y, size, seed=seed), Batches(images, range(n_val), y, 16)
    saving = [Checkpointing(file, w)] if file else []
    cbs = [w, *saving, Holing(Holes(), filling, PRESETS['moco_cxr'], seed=1), scheduled(lr, 'cosine'), *cbs]
    learn = make_learner(net, data, InpaintingLoss(), SimpleNamespace(seed=seed, weight_decay=0.0), cbs)
    try:
        learn.fit(epochs)
    except KeyboardInterrupt:
        pass
    return net, w.history


class Stop(Callback):
    "An accident in the middle of an epoch."

    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize('filling', FILLS)
def test_stopped_at_any_moment_and_resumed(tmp_path, filling):
    images = rng(0).integers(0, 256, (36, 32, 32), dtype=np.uint8)
    kw = dict(n_val=12, epochs=3, filling=filling)
    net, history = learner(images, file=tmp_path / 'whole', **kw)
    for at in ((0, 1), (1, 0), (2, 2)):
        learner(images, file=tmp_path / 'part', cbs=[Stop(*at)], **kw)
    again, other = learner(images, file=tmp_path / 'part', **kw)
    assert other == history
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_training_holes_change_and_validation_holes_do_not():
    seen = {True: [], False: []}

    class Look(Callback):
        def after_pred(self):
            seen[self.training].append(self.yb)

    images = rng(0).integers(0, 256, (36, 32, 32), dtype=np.uint8)
    learner(images, n_val=20, epochs=2, lr=0.0, cbs=[Look()])
    first, second = (torch.cat([h for _, h in seen[False][i : i + 2]]) for i in (0, 2))
    assert torch.equal(first, second) and torch.equal(first, fixed_holes(0, 20, 32, Holes(), 1))
    assert torch.equal(
        torch.cat([x for x, _ in seen[False][:2]])[:, 0], torch.from_numpy(images[:20]).float() / 255
    )  # not augmented
    train = torch.cat([h for _, h in seen[True]])
    assert len({m.numpy().tobytes() for m in train}) == len(train)


def test_noise_cannot_be_restored_and_phantoms_can():
    g = rng(0, 'films')
    films = np.stack(
        [
            cv2.resize(
                (
                    draw_radiograph('negative typical indeterminate atypical'.split()[i % 4], seed=i, size=(128, 128))[
                        0
                    ]
                    / 257
                ).astype(np.uint8),
                (64, 64),
                interpolation=cv2.INTER_AREA,
            )
            for i in range(120)
        ]
    )
    noise = g.integers(0, 256, films.shape, dtype=np.uint8)
    h = fixed_holes(0, 40, 64, Holes(), 1)
    out = {}
    for name, images in (('films', films), ('noise', noise)):
        net, _ = learner(images, epochs=8)
        s = restoration_scores(
            images[:40], h, dict(network=restore(net, images[:40], h), mean=classical(images[:40], h)['mean'])
        )
        out[name] = restoration_differences(s, np.arange(40), 'network').iloc[0]
    assert out['films'].hi < -0.05  # far better than the mean
    assert out['noise'].difference > -0.001  # not better than the mean where nothing can be known
