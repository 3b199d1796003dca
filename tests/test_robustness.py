"Changes against other implementations, noise that does not know its batch, rules at their limits, external cohorts."

from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from cxrpaper.evaluation.metrics import Resampling, probabilities, simulate_predictions
from cxrpaper.questions.robustness import (
    CORRUPTIONS,
    Reader,
    average_models,
    corruption,
    drop_verdict,
    external_drop,
    planted_images,
    predict_changed,
    quantum_noise,
    row_noise,
    shrink,
    tolerance,
)
from cxrpaper.questions.subject import Tested
from cxrpaper.runs import InputError

X = torch.from_numpy(
    ndimage.gaussian_filter(np.random.default_rng(0).random((3, 1, 64, 64)), (0, 0, 2, 2)).astype('float32')
)
X = (X - X.min()) / (X.max() - X.min())


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_level_zero_is_the_identity_and_no_other_is(name):
    assert torch.equal(corruption(name, 0)(X, [0, 1, 2]), X)
    for level in CORRUPTIONS[name].levels[1:]:
        y = corruption(name, level)(X, [0, 1, 2])
        assert y.shape == X.shape and y.dtype == X.dtype and not torch.equal(y, X) and 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_an_image_is_changed_alike_in_every_batch(name):
    change = corruption(name, CORRUPTIONS[name].levels[1])
    assert torch.allclose(change(X, [5, 6, 7])[1], change(X[1:2], [6])[0], atol=1e-6)


def test_changes_against_other_implementations():
    a = X[0, 0].numpy()
    for level in (0.5, 2):
        assert np.allclose(
            corruption('blur', level)(X, range(3))[0, 0],
            ndimage.gaussian_filter(a, 0.64 * level, mode='nearest', radius=int(np.ceil(4 * 0.64 * level))),
            atol=1e-5,
        )
    inside = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 28
    assert np.allclose(
        corruption('rotation', 10)(X, range(3))[0, 0].numpy()[inside],
        ndimage.rotate(a, 10, reshape=False, order=1)[inside],
        atol=1e-4,
    )
    small = a.reshape(32, 2, 32, 2).mean((1, 3))
    assert np.allclose(
        shrink(X, range(3), 1, 0)[0, 0], cv2.resize(small, (64, 64), interpolation=cv2.INTER_LINEAR), atol=1e-5
    )
    assert np.allclose(corruption('darker', 1)(X, range(3)), X**2) and np.allclose(
        corruption('brighter', 1)(X, range(3)), X**0.5
    )
    assert np.allclose(corruption('contrast', 0.4)(X, range(3))[0, 0], a.mean() + 0.6 * (a - a.mean()), atol=1e-6)


def test_noise_is_of_seed_and_row():
    assert torch.equal(row_noise(X, [4, 5, 6], 1)[2], row_noise(X[:1], [6], 1)[0])
    assert not torch.equal(row_noise(X[:1], [6], 1), row_noise(X[:1], [6], 2)) and not torch.equal(
        row_noise(X[:1], [6], 1), row_noise(X[:1], [5], 1)
    )
    flat = lambda v: quantum_noise(torch.full((1, 1, 300, 300), v), [0], 0.05, 0).std().item()
    assert np.isclose(flat(0.8) / flat(0.4), 30**0.2, rtol=0.02)  # whiter: fewer quanta


def test_the_rule_at_its_limits():
    row = lambda level, d, lo, hi: dict(
        corruption='blur',
        level=level,
        unit='%',
        metric='auc_macro',
        difference=d,
        difference_lo=lo,
        difference_hi=hi,
        changed=0.1,
        n=9,
    )
    say = lambda *rows: tolerance(pd.DataFrame([row(0, 0.0, 0.0, 0.0), *rows]), 'blur')
    r = say(row(1, -0.01, -0.015, -0.001), row(2, -0.05, -0.08, -0.03), row(3, -0.01, -0.05, 0.01))
    assert (r['excluded'], r['broken']) == (1, 2)
    r = say(row(1, -0.05, -0.2, 0.01))  # neither shown nor excluded
    assert r['excluded'] == 0 and np.isnan(r['broken']) and 'excluded at no level' in r['verdict']
    r = say(row(1, -0.031, -0.04, -0.015))  # a true loss beyond the margin, not shown: nothing is tolerated
    assert r['excluded'] == 0 and np.isnan(r['broken'])
    assert 'excluded at every level' in say(row(1, -0.001, -0.01, 0.01))['verdict']


def test_texture_is_lost_with_resolution_and_brightness_is_not():
    px, y = planted_images(120, 1)
    ids = [f'{i:03}' for i in range(120)]
    images = pd.DataFrame({k: ids for k in ('image', 'study', 'patient', 'group')}).assign(
        label=y, view='', sex='', age=1.0, detector='', source='', photometric='', height=32, width=32
    )
    right = lambda fine, level: (
        probabilities(
            predict_changed(
                [Tested(Reader(fine), np.arange(120), 0, lambda z: z, 50)],
                SimpleNamespace(images=px),
                images,
                corruption('resolution', level),
            )
        ).argmax(1)
        == y
    ).mean()
    assert right(True, 0) > 0.5 and right(True, 2) < right(True, 0) - 0.1 and right(False, 2) > right(False, 0) - 0.1


def test_external_drop_and_averages():
    a, b = simulate_predictions(150, 0), simulate_predictions(150, 1, separation=0.3)
    d = external_drop(a, [b, b], how=Resampling(100)).set_index('name')
    assert np.isclose(d.value['drop'], d.value['internal'] - d.value['external']) and np.isclose(
        d.value['external'], d.value['ensemble']
    )
    assert 'drop found' in drop_verdict(d.reset_index()) and 'no drop is shown' in drop_verdict(
        external_drop(a, [simulate_predictions(150, 0)], how=Resampling(100))
    )
    with pytest.raises(InputError, match='other images'):
        average_models([a, a[1:]])
    assert np.allclose(probabilities(average_models([b, b])), probabilities(b.sort_values('image')))
