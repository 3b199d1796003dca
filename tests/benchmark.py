"Throughput of decoding, batches and training: `make bench`. Ratios are measured interleaved, with their spread; absolute figures belong to the machine."

import time

import numpy as np
import torch

from cxrpaper.data.dicom import read_radiograph
from cxrpaper.data.phantom import phantom
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store, squash
from cxrpaper.models.losses import BalancedCE
from cxrpaper.models.nets import Classifier, Encoder, autocast_for, fastest
from cxrpaper.runs import torch_generator
from cxrpaper.training.augment import PRESETS, augment
from cxrpaper.training.loop import Batches

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def seconds(f):
    "Seconds of one call, the device's work included."
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - t


def interleaved(a, b, n=7):
    "Times of a and b, one after the other, n times after a warm-up: medians and (lowest, middle, highest) of b/a."
    a()
    b()
    t = np.array([(seconds(a), seconds(b)) for _ in range(n)])
    return np.median(t, 0), np.percentile(t[:, 1] / t[:, 0], (0, 50, 100))


def data(px=128):
    cohort = read_cohort(phantom('smoke'))
    return cohort, build_store(cohort, px, workers=0)


def test_the_store_is_faster_than_decoding_each_epoch():
    cohort, store = data()
    rows = np.arange(64)
    from_store = lambda: [x for x, _ in Batches(store.images, rows, cohort.images.label.values, 16)]
    from_files = lambda: [squash(read_radiograph(cohort.root / p), 128) for p in cohort.images.path[:64]]
    (a, b), (lo, mid, hi) = interleaved(from_store, from_files)
    print(
        f'\nstore {64 / a:,.0f} images/s, DICOM files {64 / b:,.0f} images/s: {mid:.0f} times as fast ({lo:.0f} to {hi:.0f})'
    )
    assert mid > 10


def test_training_step():
    "A step with augmentation on the device against the step alone: augmentation must not be what one waits for."
    cohort, store = data()
    torch.manual_seed(0)
    model, loss = fastest(Classifier(Encoder('tf_efficientnet_lite0')), DEVICE).train(), BalancedCE().to(DEVICE)
    opt = torch.optim.AdamW(model.parameters())
    x, y = next(iter(Batches(store.images, np.arange(32), cohort.images.label.values, 32, DEVICE)))

    def step(how):
        z = x.float().div_(255)
        if how:
            z = augment(z, generator=torch_generator(0, 'bench', device=DEVICE), how=PRESETS[how])[0]
        with autocast_for(DEVICE):
            l = loss(model(z), y)
        l.backward()
        opt.step()
        opt.zero_grad()

    (a, b), (lo, mid, hi) = interleaved(lambda: step(None), lambda: step('light'))
    print(
        f'\n{DEVICE}: {32 / a:,.0f} images/s alone, {32 / b:,.0f} with augmentation: {mid:.2f} times the time ({lo:.2f} to {hi:.2f})'
    )
    assert mid < 1.5
