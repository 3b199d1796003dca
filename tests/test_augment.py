"Augmentation against independent references: OpenCV, SciPy, exact mirror images, and the distributions that were asked for."

import math
import random
import time

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from cxrpaper.runs import InputError, torch_generator
from cxrpaper.training.augment import *
from cxrpaper.training.augment import blur, cutout, draw_affine, expose, warp

EVERY = Augment(
    flip=0.5,
    rotate=30,
    crop=0.4,
    shift=0.05,
    shear=8,
    brightness=0.1,
    contrast=0.2,
    gamma=0.2,
    noise=0.02,
    blur=0.01,
    cutout=0.2,
)
gen = lambda seed=0: torch_generator(seed, 'test')


def batch(n=16, px=64, channels=1):
    return torch.rand(n, channels, px, px, generator=gen(99))


# --- identity, reproducibility --------------------------------------------------------------------------------------------------------


def test_zero_strength_is_the_identity():
    x, m = batch(), batch() > 0.5
    y, k = augment(x, m, gen(), Augment())
    assert torch.equal(x, y) and torch.equal(m, k)
    y, k = warp(x, draw_affine(16, Augment(), gen()), m)  # also when it goes through the resampling
    assert (x - y).abs().max() < 1e-5 and torch.equal(m, k)


@pytest.mark.parametrize('how', [*PRESETS.values(), EVERY])
def test_all_randomness_comes_from_the_generator(how):
    x, m = batch(), batch() > 0.5
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    a = augment(x, m, gen(1), how)
    assert (
        torch.equal(states[0], torch.get_rng_state())
        and (states[1] == np.random.get_state()[1]).all()
        and states[2] == random.getstate()
    )
    torch.manual_seed(123)
    np.random.seed(5)
    b = augment(x, m, gen(1), how)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    g = gen(1)
    augment(x, m, g, how)
    if how != Augment():
        assert not torch.equal(augment(x, m, g, how)[0], a[0])  # the stream moves on


def test_input_is_not_changed():
    x, m = batch(), batch() > 0.5
    x0, m0 = x.clone(), m.clone()
    augment(x, m, gen(), EVERY)
    assert torch.equal(x, x0) and torch.equal(m, m0)


@pytest.mark.parametrize('how', [*PRESETS.values(), EVERY])
def test_range_shape_and_types(how):
    x = batch(channels=2)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        m = (batch(channels=3) > 0.5).to(dtype)
        y, k = augment(x, m, gen(), how)
        assert y.shape == x.shape and y.dtype == x.dtype and 0 <= y.min() and y.max() <= 1 and torch.isfinite(y).all()
        assert k.shape == m.shape and k.dtype == dtype and set(k.unique().tolist()) <= {0, 1}
    assert augment(x.double(), None, gen(), how)[0].dtype == torch.float64 and augment(x, None, gen(), how)[1] is None


# --- geometry -------------------------------------------------------------------------------------------------------------------------


def test_planted_rectangle_stays_with_its_mask():
    n, px = 400, 96
    r = np.random.default_rng(0)
    x = torch.zeros(n, 1, px, px)
    for i in range(n):
        y0, x0, h, w = r.integers(30, 45, 4)
        x[i, 0, y0 : y0 + h // 2, x0 : x0 + w // 2] = 1
    moved, mask = warp(x, draw_affine(n, EVERY, gen()), x.to(torch.uint8))
    ok = mask.sum((1, 2, 3)) > 50
    assert ok.float().mean() > 0.95
    a, b = moved[ok] > 0.5, mask[ok] > 0
    iou = (a & b).sum((1, 2, 3)) / (a | b).sum((1, 2, 3))
    assert iou.min() > 0.93
    other = (
        warp(x, draw_affine(n, EVERY, gen(1)), x.to(torch.uint8))[1][ok] > 0
    )  # the counter-test: a mask that moved otherwise
    assert ((a & other).sum((1, 2, 3)) / (a | other).sum((1, 2, 3))).median() < 0.7


def test_centres_coincide_to_half_a_pixel():
    x = torch.zeros(200, 1, 96, 96)
    x[:, :, 35:55, 40:65] = 1
    moved, mask = warp(x, draw_affine(200, Augment(flip=0.5, rotate=30, crop=0.3, shear=8), gen()), x)
    grid = torch.stack(torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing='ij'))
    centre = lambda w: (grid[None] * w).sum((2, 3)) / w.sum((2, 3))
    assert (centre(moved) - centre(mask)).norm(dim=1).max() < 0.5


def test_flip_is_the_exact_mirror_image():
    x, m = batch(64), batch(64) > 0.7
    y, k = augment(x, m, gen(), Augment(flip=1.0))
    assert (y - x.flip(-1)).abs().max() < 1e-5 and torch.equal(k, m.flip(-1))
    y, _ = augment(x, None, gen(), Augment(flip=0.5))
    same, mirrored = ((y - z).abs().amax((1, 2, 3)) < 1e-5 for z in (x, x.flip(-1)))
    assert (same ^ mirrored).all() and 0 < same.sum() < 64


def test_quarter_turn_is_exact():
    x = batch(2)
    theta = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]).expand(2, 2, 3)
    y, _ = warp(x, theta)
    assert (y - torch.rot90(x, 1, (2, 3))).abs().max() < 1e-5 or (y - torch.rot90(x, -1, (2, 3))).abs().max() < 1e-5


def test_warp_agrees_with_opencv():
    px = 80
    x = torch.tensor(
        ndimage.gaussian_filter(np.random.default_rng(0).random((8, px, px)), (0, 2, 2)), dtype=torch.float32
    )[:, None]
    theta = draw_affine(8, Augment(flip=0.5, rotate=25, crop=0.4, shear=8, shift=0.05), gen())
    ours, _ = warp(x, theta)
    for im, t, o in zip(x[:, 0].numpy(), theta.double().numpy(), ours[:, 0].numpy()):
        to_unit = np.array([[2 / px, 0, 1 / px - 1], [0, 2 / px, 1 / px - 1], [0, 0, 1]])  # pixel centre -> [-1,1]
        m = np.linalg.inv(to_unit) @ np.vstack([t, [0, 0, 1]]) @ to_unit
        ref = cv2.warpAffine(
            im, m[:2], (px, px), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        assert np.abs(ref - o).max() < 0.02  # OpenCV rounds positions to 1/32 pixel


def test_drawn_parameters_have_the_asked_distribution():
    n = 4000
    flat = lambda v, lo, hi: stats.kstest(v.numpy(), stats.uniform(lo, hi - lo).cdf).pvalue > 1e-3
    t = draw_affine(n, Augment(rotate=10), gen())
    assert flat(torch.rad2deg(torch.atan2(t[:, 1, 0], t[:, 0, 0])), -10, 10)
    t = draw_affine(n, Augment(crop=0.3), gen())
    assert (
        flat(t[:, 0, 0] ** 2, 0.7, 1) and (t[:, 0, 0] + t[:, :, 2].abs().amax(1) <= 1 + 1e-6).all()
    )  # the window stays inside
    t = draw_affine(n, Augment(shift=0.1), gen())
    assert (
        flat(t[:, 0, 2], -0.2, 0.2)
        and flat(t[:, 1, 2], -0.2, 0.2)
        and abs(np.corrcoef(t[:, :, 2].T.numpy())[0, 1]) < 0.06
    )
    t = draw_affine(n, Augment(shear=10), gen())
    assert flat(torch.rad2deg(torch.atan(t[:, 0, 1])), -10, 10)
    t = draw_affine(n, Augment(flip=0.3), gen())
    assert abs(float((t[:, 0, 0] < 0).float().mean()) - 0.3) < 0.03


def test_every_image_draws_its_own_values():
    x = batch(1).expand(32, -1, -1, -1)
    for field in EVERY.__dataclass_fields__:
        y, _ = augment(x, None, gen(), Augment(**{field: getattr(EVERY, field)}))
        distinct = len({t.numpy().tobytes() for t in y})
        assert distinct == 2 if field == 'flip' else distinct > 25, field


def test_edges_repeat_and_masks_are_empty_outside():
    x = torch.full((16, 1, 64, 64), 0.7)
    y, m = augment(x, torch.ones_like(x), gen(), Augment(rotate=45, shift=0.3))
    assert (y - 0.7).abs().max() < 1e-5 and (m == 0).any()  # no dark corners that would tell which images were turned


# --- gray values ----------------------------------------------------------------------------------------------------------------------


def test_blur_agrees_with_scipy():
    x = batch(4, 48)
    sigma = torch.tensor([0.0, 0.5, 1.0, 2.5])
    y = blur(x, sigma, 10)
    assert torch.equal(y[0], x[0])
    for im, s, o in zip(x[1:, 0].numpy(), sigma[1:].tolist(), y[1:, 0].numpy()):
        assert np.abs(ndimage.gaussian_filter(im.astype(np.float64), s, mode='nearest', radius=10) - o).max() < 1e-5


def test_noise_has_the_asked_strength():
    x = torch.full((400, 1, 64, 64), 0.5)
    sd = (augment(x, None, gen(), Augment(noise=0.05))[0] - x).std((1, 2, 3))
    assert sd.max() < 0.052 and stats.kstest(sd.numpy(), stats.uniform(0, 0.05).cdf).pvalue > 1e-3


def test_exposure_keeps_the_order_of_densities():
    ramp = torch.linspace(0, 1, 256).expand(500, 1, 1, 256)
    y = expose(ramp, Augment(brightness=0.1, contrast=0.3, gamma=0.4), gen())
    assert (y.diff(dim=-1) >= 0).all() and 0 <= y.min() and y.max() <= 1
    y = expose(ramp, Augment(brightness=0.1), gen())
    assert ((y - ramp)[..., 128].abs() <= 0.1 + 1e-6).all() and (y - ramp)[..., 128].abs().max() > 0.09
    g = expose(ramp, Augment(gamma=0.4), gen())[:, 0, 0, 128].log() / ramp[:, 0, 0, 128].log()
    assert math.exp(-0.4) - 1e-4 <= g.min() and g.max() <= math.exp(0.4) + 1e-4


def test_cutout_hides_no_more_than_said():
    x = batch(2000)
    hidden = (cutout(x, 0.25, gen()) != x).float()
    assert hidden.mean((1, 2, 3)).max() <= (17 / 64) ** 2
    where = hidden.mean((0, 1))
    assert (
        where[16:48, 16:48].min() > 0 and abs(where[16:48, 16:48].mean() - 0.25**2 / 3) < 0.004
    )  # E[side^2], the same everywhere away from the edge


# --- errors ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'bad',
    [dict(rotate=-1), dict(rotate=181), dict(flip=1.5), dict(crop=float('nan')), dict(noise='0.1'), dict(flip=True)],
)
def test_strengths_out_of_range(bad):
    with pytest.raises(InputError, match=f'Augment.{next(iter(bad))}'):
        Augment(**bad)


def test_batches_that_do_not_fit():
    x = batch()
    for a, says in [
        ((x[0], None, gen()), 'N,C,H,W'),
        (((x * 255).byte(), None, gen()), 'floats'),
        ((x, None, None), 'no generator'),
        ((x, x[:4], gen()), 'masks'),
        ((x[..., :32], None, gen()), 'not square'),
    ]:
        with pytest.raises(InputError, match=says):
            augment(*a, EVERY)


# --- speed ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.serial
def test_a_batch_at_once_is_faster_than_one_by_one(capsys):
    from torchvision.transforms import v2

    one = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(128, (0.8, 1), (1, 1), v2.InterpolationMode.BILINEAR, antialias=False),
        ]
    )
    x, g = batch(64, 128), gen()

    def timed(f):
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    ratios = sorted(
        timed(lambda: torch.stack([one(im) for im in x])) / timed(lambda: augment(x, None, g, PRESETS['moco_cxr']))
        for _ in range(9)
    )
    with capsys.disabled():
        print(f'\nbatched against one by one: {ratios[4]:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})')
    assert ratios[4] > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    x, m = batch().cuda(), (batch() > 0.5).cuda()
    g = lambda: torch_generator(0, device='cuda')
    a, b = (augment(x, m, g(), EVERY) for _ in range(2))
    assert a[0].is_cuda and torch.equal(a[1], b[1]) and torch.allclose(a[0], b[0], atol=1e-6)
    theta = draw_affine(16, EVERY, gen())
    assert torch.allclose(warp(x, theta.cuda())[0].cpu(), warp(x.cpu(), theta)[0], atol=1e-3)
    with pytest.raises(InputError, match='device=x.device'):
        augment(x, m, gen(), EVERY)
