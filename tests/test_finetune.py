"Training: a run killed at any moment ends with the same bytes; its parts do what they say."

import os
import platform
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxrpaper.data.folds import assign_folds
from cxrpaper.data.phantom import PhantomConfig, write_phantom
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
from cxrpaper.evaluation.metrics import point_metrics, softmax
from cxrpaper.models.nets import Classifier, Encoder
from cxrpaper.runs import KERNELS, InputError, Run, as_parameters, load_run, rng
from cxrpaper.training.finetune import finetune, fit, label_subset, make_model, predict, split_rows
from cxrpaper.training.loop import Batches, embed, load_checkpoint
from cxrpaper.training.probes import choose_C

ROOT = Path(__file__).resolve().parent.parent
P = dict(
    arch='resnet10t',
    pretrain='none',
    weights=None,
    px=64,
    n_folds=3,
    fold=0,
    seed=0,
    epochs=6,
    batch_size=8,
    lr=1e-3,
    encoder_lr=1.0,
    weight_decay=0.01,
    drop=0.2,
    augmentation='light',
    class_weight_power=0.5,
    loss='ce',
    multitask=False,
    decoder='unet',
    decoder_width=32,
    seg_weight=1.0,
    dice_share=0.5,
    masks='true',
    weighting='fixed',
    schedule='joint',
    freeze=False,
    head='trained',
    label_fraction=1.0,
    draw=0,
    select='average',
    precision=None,
)


def small():
    "A phantom of 60 patients at 64 px, written and decoded once."
    cohort = read_cohort(write_phantom(PhantomConfig(n_patients=60, px=96, seed=3), workers=1))
    return cohort, build_store(cohort, 64, workers=0)


@pytest.fixture(scope='module')
def data():
    return small()


def train(run):
    "The run that is killed."
    torch.set_num_threads(1)
    cohort, store = small()
    finetune(Run(run, P), cohort, store, assign_folds(cohort.images, 3), as_parameters(P), device='cpu')


def under(caps, run):
    "A short run under caps, which PyTorch reads before it computes for the first time."
    os.environ.update(caps)
    torch.set_num_threads(1)
    (cohort, store), p = small(), P | dict(epochs=1)
    finetune(Run(run, p), cohort, store, assign_folds(cohort.images, 3), as_parameters(p), device='cpu')


def results(run):
    return {f: (Path(run) / f).read_bytes() for f in ('weights.safetensors', 'history.csv', 'predictions.csv')}


def kill(p, checkpoint, r, seconds):
    "Kill a training soon after its next checkpoint; did it live so long?"
    written = lambda: checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    seen, deadline = written(), time.time() + seconds
    while p.is_alive() and time.time() < deadline and written() in (None, seen):
        time.sleep(0.01)
    time.sleep(r.random() * 0.3)
    alive = p.is_alive()
    p.kill()
    p.join()
    return alive


def test_killed_at_random_moments_it_ends_with_the_same_bytes(fork, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    t0 = time.time()
    train(whole)
    seconds, r, kills, epochs = time.time() - t0, random.Random(0), 0, []
    checkpoint = killed.with_name('killed.partial') / 'checkpoint.pt'
    for _ in range(2):
        kills += kill(fork(train, killed), checkpoint, r, 30 + 3 * seconds)
        if checkpoint.exists():
            epochs.append(load_checkpoint(checkpoint)['epoch'])
    assert kills >= 1 and epochs == sorted(epochs) and epochs[0] < P['epochs'] - 1, (kills, epochs)
    p = fork(train, killed)
    p.join()
    assert p.exitcode == 0
    assert results(whole) == results(killed)
    assert len(pd.read_csv(killed / 'history.csv')) == P['epochs'] and not checkpoint.exists()


def briefly(data, run, **change):
    "A run of one epoch."
    (cohort, store), p = data, as_parameters(P | dict(epochs=1) | change)
    made_of = dict(store=store.pixels_sha256)
    return finetune(Run(run, vars(p), made_of), cohort, store, assign_folds(cohort.images, 3), p, device='cpu')


@pytest.fixture(scope='module')
def brief(data, tmp_path_factory):
    run = tmp_path_factory.mktemp('brief') / 'run'
    briefly(data, run)
    return run


def test_another_seed_gives_other_weights(data, brief, tmp_path):
    "The counter-test of reproducibility: the seed is what makes runs equal."
    briefly(data, tmp_path / 'same')
    briefly(data, tmp_path / 'r', seed=1)
    assert results(tmp_path / 'same') == results(brief)
    assert results(tmp_path / 'r')['weights.safetensors'] != results(brief)['weights.safetensors']


def test_it_learns_what_is_there_and_nothing_else(data, tmp_path):
    "A bright square that tells the class is learnt; with shuffled labels the validation AUC stays near one half."
    cohort, store = data
    y = cohort.images.label.values
    images = np.array(store.images)
    images[np.arange(len(y)), :, :] //= 2
    for i, k in enumerate(y):
        images[i, 16 * k : 16 * k + 12, 4:16] = 255
    rows = split_rows(y, assign_folds(cohort.images, 3), 0, 3)
    auc, believed = {}, {}
    for name, labels in (('planted', y), ('shuffled', rng(0, 'shuffle').permutation(y))):
        p = as_parameters(P | dict(epochs=10, lr=3e-3, augmentation='none'))
        _, history, _, _, seen = fit(
            SimpleNamespace(images=images, masks=store.masks),
            cohort.images.assign(label=labels),
            rows,
            p,
            tmp_path / f'{name}.pt',
        )
        auc[name], believed[name] = history.val_auc_macro.iloc[-1], seen.filter(like='epoch_').mean()
        assert list(seen.image) == list(cohort.images.image.iloc[rows['train']]) and list(seen.label) == list(
            labels[rows['train']]
        )
        drawn = len(rows['train']) // p.batch_size * p.batch_size
        assert (seen.filter(like='epoch_').notna().sum() == drawn).all()  # an incomplete last batch is left out
    assert auc['planted'] > 0.95 and abs(auc['shuffled'] - 0.5) < 0.2, auc
    assert (
        believed['planted'].iloc[-1] > 0.7 > 0.5 > believed['planted'].iloc[0]
    )  # training dynamics: the label is believed more and more
    assert (
        believed['planted'].mean() > believed['shuffled'].mean() + 0.02
    )  # a shuffled one has to be learnt by heart, which comes later


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    with pytest.raises(InputError, match='the loss is nan.*Hint: lower lr'):
        fit(store, cohort.images, rows, as_parameters(P | dict(lr=1e18, epochs=3)), tmp_path / 'c.pt')


def test_predictions_do_not_depend_on_the_batch_size(data):
    cohort, store = data
    torch.manual_seed(0)
    model = Classifier(Encoder('resnet10t'))
    rows = np.arange(20)
    a, b = (predict(model, Batches(store.images, rows, cohort.images.label.values, size)) for size in (1, 16))
    assert a.shape == (20, 4) and np.abs(a - b).max() < 1e-4
    seen = []

    def darken(x, part):
        seen.append(part)
        return x * (torch.as_tensor(part) != 7).view(-1, 1, 1, 1)

    c = predict(model, Batches(store.images, rows, cohort.images.label.values, 16), change=darken)
    assert np.concatenate(seen).tolist() == rows.tolist() and np.flatnonzero(np.abs(c - b).max(1) > 1e-3).tolist() == [
        7
    ]  # `change` reaches the image it names, and no other
    with pytest.raises(InputError, match='no order'):
        predict(model, Batches(store.images, rows, cohort.images.label.values, 4, seed=0))


def test_provenance_says_what_went_in(data, brief):
    (cohort, store), prov = data, load_run(brief)
    assert (
        prov['inputs']['store'] == store.pixels_sha256
        and prov['cohort']['digest'] == cohort.digest
        and prov['params']['epochs'] == 1
    )
    assert (
        prov['n_params'] > 1e6
        and prov['macs'] > 1e6
        and prov['versions']['torch']
        and prov['pretrained']['pretrain'] == 'none'
    )
    df = pd.read_csv(brief / 'predictions.csv')
    assert set(df.split) == {'val', 'test'} and not set(df.group[df.split == 'val']) & set(df.group[df.split == 'test'])


@pytest.mark.parametrize('multitask', [False, True])
def test_a_frozen_encoder_stays_as_it_came(data, tmp_path, multitask):
    "Weights and batch norm's statistics; the counter-test: without freezing both move."
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    for freeze in (True, False):
        p = as_parameters(P | dict(epochs=1, freeze=freeze, multitask=multitask))
        before = {k: v.clone() for k, v in make_model(p)[0].state_dict().items()}
        after = fit(store, cohort.images, rows, p, tmp_path / f'{freeze}.pt')[0].state_dict()
        moved = {k for k in before if (before[k] != after[k]).any()}
        assert 'head.weight' in moved
        encoder = {k for k in moved if k.startswith('encoder.')}
        assert not encoder if freeze else {'encoder.model.conv1.0.weight', 'encoder.model.bn1.running_mean'} <= encoder


def test_a_logistic_head_is_what_scikit_learn_finds(data, tmp_path):
    "The same probabilities as its pipeline on the features; where the labels are shuffled nothing is learnt."
    cohort, store = data
    images = cohort.images
    rows = split_rows(images.label, assign_folds(images, 3), 0, 3)
    p = as_parameters(P | dict(freeze=True, head='logistic', class_weight_power=0.0))
    model, history, *_ = fit(store, images, rows, p, tmp_path / 'c.pt')
    features = {
        k: embed(model.encoder, Batches(store.images, r, images.label.values, 16, 'cpu')) for k, r in rows.items()
    }
    y = images.label.values[rows['train']]
    C = choose_C(features['train'], y, images.group.values[rows['train']], seed=p.seed)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000, tol=1e-6)).fit(features['train'], y)
    z = predict(model, Batches(store.images, rows['test'], images.label.values, 16, 'cpu'))
    assert np.abs(softmax(z) - theirs.predict_proba(features['test'])).max() < 0.02
    assert len(history) == 1 and not (tmp_path / 'c.pt').exists()
    auc = []
    for seed in range(6):
        labels = images.label.values.copy()
        labels[rows['train']] = rng(seed, 'shuffled').permutation(y)
        model = fit(store, images.assign(label=labels), rows, p, tmp_path / 'c.pt')[0]
        z = predict(model, Batches(store.images, rows['test'], labels, 16, 'cpu'))
        auc.append(point_metrics(labels[rows['test']], softmax(z))['auc_macro'])
    assert abs(np.mean(auc) - 0.5) < 0.1, auc


@pytest.mark.parametrize('seed', range(20))
def test_label_shares_are_nested_by_patient_and_stratified(seed):
    g = rng(seed, 'label test')
    n = 400
    patients = np.array([f'p{k}' for k in g.integers(0, 150, n)])
    labels = g.choice(4, n, p=(0.3, 0.45, 0.17, 0.08))
    rows = np.sort(g.choice(n, 300, replace=False))
    last = set()
    for f in (0.01, 0.05, 0.1, 0.3, 0.6, 1.0):
        some = label_subset(labels, patients, rows, f, draw=seed)
        assert last <= set(some) <= set(rows) and set(labels[some]) == set(labels[rows])
        assert set(some) == {i for i in rows if patients[i] in set(patients[some])}, (
            'a patient without one of his images'
        )
        n_patients = len(set(patients[rows]))
        assert abs(len(set(patients[some])) - f * n_patients) <= 4
        last = set(some)
    a, b = (label_subset(labels, patients, rows, 0.1, draw) for draw in (seed, seed + 1))
    assert set(a) != set(b)


def test_few_labels_are_trained_on_as_long_as_all(data, tmp_path):
    "The same number of steps; what is left out is neither seen nor its labels used: with them changed, the weights stay the same."
    cohort, store = data
    folds = assign_folds(cohort.images, 3)
    p = as_parameters(P | dict(epochs=2, label_fraction=0.3, select='last'))
    finetune(Run(tmp_path / 'a', vars(p)), cohort, store, folds, p, device='cpu')
    rows = split_rows(cohort.images.label, folds, 0, 3)['train']
    used = label_subset(cohort.images.label, cohort.images.group, rows, 0.3)
    prov = load_run(tmp_path / 'a')
    assert prov['n']['train'] == len(used) < len(rows) and prov['best_epoch'] == 1
    others = np.setdiff1d(rows, used)
    images = np.array(store.images)
    images[others] = 255 - images[others]

    class Changed:
        masks, boxes, digest = store.masks, store.boxes, store.digest

    Changed.images = images
    finetune(Run(tmp_path / 'b', vars(p)), cohort, Changed, folds, p, device='cpu')
    assert results(tmp_path / 'a') == results(tmp_path / 'b')


def test_the_kept_weights_are_the_mean_of_the_second_half(data, tmp_path):
    "Weights: the mean over epochs 3 and 4 of four; batch norm: what the training images give under these weights. Counter-test: the last epoch's differ."
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    kept = []

    class Keep(Callback):
        order = 70

        def after_validate(self):
            kept.append({k: v.clone() for k, v in self.model.state_dict().items()})

    p = as_parameters(P | dict(epochs=4))
    model = fit(store, cohort.images, rows, p, None, cbs=[Keep()])[0]
    got, name = {k: v.clone() for k, v in model.state_dict().items()}, 'encoder.model.conv1.0.weight'
    for k, _ in model.named_parameters():
        assert torch.allclose(got[k], (kept[2][k] + kept[3][k]) / 2, atol=1e-6)
    assert not torch.allclose(got[name], kept[3][name], atol=1e-6)
    seen = []
    hook = model.encoder.model.bn1.register_forward_pre_hook(lambda m, x: seen.append(x[0].mean((0, 2, 3))))
    model.train()
    with torch.no_grad():
        for x, *_ in Batches(store.images, rows['train'], cohort.images.label.values, p.batch_size):
            if len(x) > 1:
                model(x.float() / 255)
    hook.remove()
    assert torch.allclose(torch.stack(seen).mean(0), got['encoder.model.bn1.running_mean'], atol=1e-4)


def test_the_last_epoch_asks_no_validation_label(data, tmp_path):
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    changed = cohort.images.copy()
    changed.loc[changed.index[rows['val']], 'label'] = changed.label.iloc[rows['val']].values[::-1]
    p = as_parameters(P | dict(epochs=2, select='last'))
    a, b = (
        fit(store, t, rows, p, tmp_path / f'{i}.pt')[0].state_dict() for i, t in enumerate((cohort.images, changed))
    )
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='these caps are those of x86-64')
def test_provenance_names_what_the_digits_depend_on(fork, tmp_path):
    "Under the caps of the smoke study two runs have the same bytes, and provenance says which caps; lower caps compute with other kernels."
    made = {}
    for name, caps in (('a', KERNELS), ('b', KERNELS), ('low', KERNELS | dict(ATEN_CPU_CAPABILITY='default'))):
        p = fork(under, caps, tmp_path / name)
        p.join()
        assert p.exitcode == 0
        made[name] = load_run(tmp_path / name)['compute']
        assert made[name]['caps'] == caps and made[name]['threads'] == 1 and made[name]['processor']
    assert results(tmp_path / 'a') == results(tmp_path / 'b')
    assert made['low']['kernels'] == 'DEFAULT' != made['a']['kernels']
    assert results(tmp_path / 'low') != results(tmp_path / 'a')
