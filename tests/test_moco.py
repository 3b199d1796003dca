"MoCo: loss, queue and momentum against lightly and loops; several processes against one; killed runs."

import os
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_finetune import small
from test_inpainting import Stop
from test_pretraining import start
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cxrpaper.models.nets import Encoder
from cxrpaper.runs import InputError, load_run
from cxrpaper.training.augment import PRESETS
from cxrpaper.training.loop import (
    Batches,
    Checkpointing,
    EpochRecorder,
    make_learner,
    plain,
    rank_and_world,
    scheduled,
    start_device,
)
from cxrpaper.training.moco import InfoNCE, MoCo, Shuffling, TwoViews, check_groups, check_queue


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def data():
    return small()


def learner(data, file=None, groups=2, how='none', progress=False, batch=16, K=32, **more):
    "A small MoCo on the phantom: its learner and what watches it."
    cohort, store = data
    torch.manual_seed(0)
    watching = EpochRecorder(progress)
    model = MoCo(Encoder('resnet10t'), dim=16, K=K, m=0.9, groups=groups)
    train = Batches(store.images, np.arange(48), cohort.images.label.values, batch, seed=0)
    none = Batches(store.images, [], cohort.images.label.values, batch)
    saving = [Checkpointing(file, watching)] if file else []
    cbs = [watching, *saving, TwoViews(PRESETS[how]), scheduled(1e-3, 'steps'), *more.get('cbs', [])]
    return make_learner(model, (train, none), InfoNCE(), SimpleNamespace(seed=0, weight_decay=1e-4), cbs), watching


def test_loss_and_queue_are_those_of_lightly():
    from lightly.loss import NTXentLoss

    model = MoCo(Encoder('resnet10t'), dim=8, K=24, m=0.9, T=0.2).train()
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(24, 8))
    for _ in range(4):  # once round the queue and on
        views = torch.rand(16, 1, 32, 32)
        if not theirs.memory_bank.bank.numel():
            theirs(torch.rand(2, 8), torch.rand(2, 8))  # it makes its queue at the first call
        theirs.memory_bank.bank = (
            model.queue if theirs.memory_bank.bank.shape == model.queue.shape else model.queue.T
        ).clone()
        theirs.memory_bank.bank_ptr = model.pointer.reshape(1).clone()
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.add_(0.01 * torch.randn_like(p))
        probe = deepcopy(model)
        ours = float(InfoNCE()(model(views)))
        probe.update_key_encoder()
        q = probe.features(probe.encoder, probe.head, views[:8])
        k = probe.keys(views[8:])
        assert abs(float(theirs(q, k)) - ours) < 1e-5
        bank = (
            theirs.memory_bank.bank if theirs.memory_bank.bank.shape == model.queue.shape else theirs.memory_bank.bank.T
        )
        assert (bank - model.queue).abs().max() < 1e-6 and int(theirs.memory_bank.bank_ptr) % 24 == int(model.pointer)


def test_the_first_step_does_not_know_and_the_loss_says_so():
    "Unrelated features: the loss is about log(1 + K); one's own key at similarity 1: nearly 0 at a low temperature."
    z = torch.cat([torch.zeros(64, 1), torch.zeros(64, 500)], 1)
    assert abs(float(InfoNCE()(z)) - np.log(501)) < 1e-5
    z[:, 0] = 20.0
    loss = InfoNCE()
    assert float(loss(z)) < 1e-5 and float(loss.terms['accuracy']) == 1


@pytest.mark.parametrize('groups,batch', [(1, 8), (2, 8), (4, 8)])
def test_shuffled_keys_come_back_to_their_queries(groups, batch):
    "Without batch statistics (evaluation mode of every norm) shuffling must change nothing but rounding."
    model = MoCo(Encoder('resnet10t'), dim=8, K=16, groups=groups).train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    x = torch.rand(batch, 1, 32, 32)
    with torch.no_grad():
        a = model.keys(x)
        b = model.features(model.key_encoder, model.key_head, x)
    assert (a - b).abs().max() < 1e-5


def test_the_key_encoder_learns_by_momentum_only(data):
    learn, _ = learner(data)
    before = deepcopy(learn.model.state_dict())
    learn.fit(1)
    after = learn.model.state_dict()
    moved = lambda prefix: max(
        float((after[k] - before[k]).abs().max()) for k in after if k.startswith(prefix) and k.endswith('weight')
    )
    assert 0 < moved('key_encoder') < moved('encoder') and all(
        p.grad is None for p in learn.model.key_encoder.parameters()
    )
    assert int(after['pointer']) == 48 % 32 and int(after['step']) == 3


def test_what_does_not_fit_is_refused():
    for args, what in (((1000, 16, 1000), 'no multiple'), ((100, 16, 128), 'only 100 images')):
        with pytest.raises(InputError, match=what):
            check_queue(*args)
    with pytest.raises(InputError, match='groups'):
        check_groups(10, 4)
    with pytest.raises(InputError, match='queue'):
        MoCo(Encoder('resnet10t'), dim=8, K=12).train()(torch.rand(16, 1, 32, 32))


def test_stopped_anywhere_it_ends_with_the_same_weights_queue_and_history(data, tmp_path):
    whole, seen = learner(data, tmp_path / 'whole.pt', how='moco_cxr')
    whole.fit(4)
    for at in ((0, 2), (1, 0), (2, 1)):
        with pytest.raises(KeyboardInterrupt):
            learner(data, tmp_path / 'part.pt', how='moco_cxr', cbs=[Stop(*at)])[0].fit(4)
    part, again = learner(data, tmp_path / 'part.pt', how='moco_cxr')
    part.fit(4)
    assert again.history == seen.history and len(seen.history) == 4
    a, b = whole.model.state_dict(), part.model.state_dict()
    assert all((a[k] == b[k]).all() for k in a) and {'queue', 'pointer', 'key_encoder.model.conv1.0.weight'} <= set(a)


def test_an_order_of_keys_that_is_counted_is_that_of_the_model(data, tmp_path):
    "Whole, and stopped and resumed; the counter-test: without shuffling the weights are others."
    drawn = learner(data)[0]
    drawn.fit(3)
    counted = learner(data, cbs=[Shuffling()])[0]
    counted.fit(3)
    with pytest.raises(KeyboardInterrupt):
        learner(data, tmp_path / 'part.pt', cbs=[Shuffling(), Stop(1, 1)])[0].fit(3)
    part = learner(data, tmp_path / 'part.pt', cbs=[Shuffling()])[0]
    part.fit(3)
    off = learner(data)[0]
    off.model.shuffle = False
    off.fit(3)
    a, b, c, d = (learn.model.state_dict() for learn in (drawn, counted, part, off))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
    assert not torch.equal(a['queue'], d['queue'])


def train(folder):
    "What each of two processes trains: the learner of this file, and a run of the study's kind."
    torch.set_num_threads(1)
    start_device('cpu')
    learn, watching = learner(small(), groups=2, cbs=[Shuffling()])
    learn.fit(3)
    rank, world = rank_and_world()
    if rank == 0:
        assert world == 2
        torch.save(dict(history=watching.history, state=plain(learn.model).state_dict()), folder / 'two.pt')
    start('moco', folder / 'run', epochs=2)


def launched(folder):
    "What torchrun does with `--standalone --nproc-per-node 2`, by its own launcher; its processes are copies of this one, which has imported PyTorch."
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    os.dup2(os.open(folder / 'said', os.O_WRONLY | os.O_CREAT), 1)
    how = LaunchConfig(
        1, 1, 2, run_id='two', rdzv_backend='c10d', rdzv_endpoint='localhost:0', start_method='fork', max_restarts=0
    )
    elastic_launch(how, train)(folder)


@pytest.fixture(scope='module')
def two(fork, tmp_path_factory):
    "What two processes have trained, and what they said."
    folder = tmp_path_factory.mktemp('two')
    p = fork(launched, folder)
    p.join()
    assert p.exitcode == 0
    return folder, (folder / 'said').read_text()


def test_two_processes_train_as_one(two, data):
    "Same loss, queue and weights as one process with the same global batch; the counter-test: with another batch they differ."
    two = torch.load(two[0] / 'two.pt', weights_only=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as they had; two add up in another order, and Adam makes up to 0.007 of it in a weight
    one, seen = learner(data)
    one.fit(3)
    torch.set_num_threads(threads)
    losses = lambda h: np.array([e['train_loss'] for e in h])
    assert np.abs(losses(two['history']) - losses(seen.history)).max() < 1e-4
    a, b = one.model.state_dict(), two['state']
    assert (
        max(float((a[k] - b[k]).abs().max()) for k in a if k.endswith('weight')) < 1e-3
        and (a['queue'] - b['queue']).abs().max() < 1e-2
    )
    other, seen = learner(data, batch=8)
    other.fit(3)
    assert np.abs(losses(two['history']) - losses(seen.history)).max() > 1e-3


def test_two_processes_make_one_run(two):
    "The first one writes; both end; history and probes are those of one process up to rounding."
    folder, said = two
    prov = load_run(folder / 'run')
    history = pd.read_csv(folder / 'run' / 'history.csv')
    assert len(history) == 2 and history.train_loss.between(0, 10).all() and prov['corpus']['used'] > 0
    assert not (folder / 'run.partial').exists() and said.count('epoch 2/2') == 1
