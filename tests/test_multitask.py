"Multi-task learning: losses against float64 references, masks and controls that are what they say, training that resumes and reduces to the single-task model."

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_finetune import P, small

from cxrpaper.data.folds import assign_folds
from cxrpaper.evaluation.masks import at_threshold, load_mask_scores
from cxrpaper.models.losses import BalancedBCE, BalancedCE, class_weights
from cxrpaper.models.multitask import (
    DECODERS,
    MASKS,
    MultiTask,
    MultiTaskLoss,
    SegmentationTargets,
    exchange,
    multitask_encoder,
    segmentation_losses,
)
from cxrpaper.models.nets import Classifier, Encoder
from cxrpaper.models.weights import load_pretrained, save_weights
from cxrpaper.runs import InputError, Run, as_parameters, load_run, rng, torch_generator
from cxrpaper.training.finetune import (
    StageSchedule,
    finetune,
    finetuner,
    fit,
    load_model,
    make_loss,
    make_model,
    mask_rows,
    predict,
    split_rows,
)
from cxrpaper.training.loop import Batches

MULTI = P | dict(multitask=True, epochs=2)


@pytest.fixture(scope='module')
def data():
    return small()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(data, folder, **change):
    "A finished run of a few epochs: its provenance, predictions and history."
    cohort, store = data
    p = as_parameters(MULTI | change)
    finetune(Run(folder, vars(p)), cohort, store, assign_folds(cohort.images, 3), p, device='cpu')
    return load_run(folder), pd.read_csv(folder / 'predictions.csv'), pd.read_csv(folder / 'history.csv')


# --- the model ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arch,decoder',
    [('resnet18', d) for d in DECODERS]
    + [('densenet121', 'unet'), ('convnext_atto', 'unet'), ('tf_efficientnet_lite0', 'unetplusplus')],
)
def test_every_decoder_draws_and_every_parameter_learns(arch, decoder):
    model = MultiTask(multitask_encoder(arch, decoder), decoder, width=32)
    logits, z = model(torch.rand(2, 1, 64, 96))
    assert logits.shape == (2, 4) and z.shape == (2, 1, 64, 96)
    (logits.square().sum() + z.square().mean()).backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


@pytest.mark.parametrize('arch,decoder', [('resnet18', 'unet'), ('resnet18', 'deeplabv3plus'), ('densenet121', 'fpn')])
def test_weights_go_both_ways(arch, decoder, tmp_path):
    "A single-task checkpoint fills the encoder of the multi-task model, and the other way round, exactly."
    single, multi = Classifier(Encoder(arch)), MultiTask(multitask_encoder(arch, decoder), decoder, width=32)
    for a, b in ((single, multi), (multi, single)):
        with torch.no_grad():
            a.encoder.model.state_dict()[next(iter(dict(a.encoder.model.named_parameters())))].normal_()
        save_weights(a, tmp_path / 'w.safetensors')
        assert load_pretrained(b.encoder, str(tmp_path / 'w.safetensors'))['encoder_sha256']
        assert all(torch.equal(v, b.encoder.model.state_dict()[k]) for k, v in a.encoder.model.state_dict().items())


def test_what_cannot_be_built_says_so():
    with pytest.raises(InputError, match='cannot be dilated'):
        multitask_encoder('densenet121', 'deeplabv3plus')
    with pytest.raises(InputError, match='sides divisible by 32'):
        MultiTask(multitask_encoder('resnet10t'), width=32)(torch.rand(1, 1, 96, 100))


def test_the_same_seed_starts_the_same_encoder_and_head():
    single, multi = (make_model(as_parameters(P | dict(multitask=m)))[0].state_dict() for m in (False, True))
    assert all(torch.equal(v, multi[k]) for k, v in single.items()) and len(multi) > len(single)


# --- the losses -----------------------------------------------------------------------------------------------------------------------


def reference(z, t):
    "Both terms in float64, pixel by pixel."
    total, both, p_sum, t_sum = 0.0, 0.0, 0.0, 0.0
    for zi, ti in zip(z.ravel().tolist(), t.ravel().tolist()):
        p = 1 / (1 + np.exp(-zi))
        total -= ti * np.log(p) + (1 - ti) * np.log(1 - p)
        both += p * ti
        p_sum += p
        t_sum += ti
    return total / z.numel(), 1 - 2 * both / (p_sum + t_sum) if t_sum else 0.0


@pytest.mark.parametrize('seed', range(4))
def test_losses_equal_a_float64_loop(seed):
    g = torch.Generator().manual_seed(seed)
    z, t = (
        torch.randn(6, 1, 8, 12, generator=g, dtype=torch.float64) * 3,
        (torch.rand(6, 1, 8, 12, generator=g) > 0.8).double(),
    )
    t[1] = 0
    annotated = torch.tensor([True, True, False, True, False, True])
    want = reference(z[annotated], t[annotated])
    for dtype, eps in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        got = segmentation_losses(z.to(dtype), t.to(torch.uint8), annotated)
        assert np.allclose([float(v) for v in got], want, atol=eps), dtype


def test_gradients_by_finite_differences():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 1, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    t, y, annotated = (
        (torch.rand(3, 1, 4, 5, generator=g) > 0.5),
        torch.tensor([0, 3, -1]),
        torch.tensor([True, False, True]),
    )
    for i in (0, 1):
        assert torch.autograd.gradcheck(lambda a: segmentation_losses(a, t, annotated)[i], z)
    ce = lambda a, b: F.cross_entropy(a, b, ignore_index=-1)
    for uncertainty in (False, True):
        loss = MultiTaskLoss(ce, seg_weight=0.7, uncertainty=uncertainty).double()
        assert torch.autograd.gradcheck(lambda a, b: loss((a, b), y, t, annotated), (logits, z))


def test_a_batch_without_any_annotated_image_teaches_the_head_only():
    model = MultiTask(multitask_encoder('resnet10t'), width=32)
    loss = MultiTaskLoss(BalancedCE(), uncertainty=True)
    loss(
        model(torch.rand(3, 1, 32, 32)),
        torch.tensor([0, 1, 2]),
        torch.ones(3, 1, 32, 32),
        torch.zeros(3, dtype=torch.bool),
    ).backward()
    moved = {k.split('.')[0] for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert 'head' in moved and 'encoder' in moved and not {'decoder', 'segmentation_head'} & moved
    assert (
        loss.log_variance.grad[0] != 0 and loss.log_variance.grad[1] == 0
    )  # a task that is absent does not become more certain


def test_nan_is_not_swallowed():
    z = torch.zeros(2, 1, 4, 4)
    z[0, 0, 0, 0] = float('nan')
    t = torch.ones(2, 1, 4, 4)
    assert all(torch.isnan(v) for v in segmentation_losses(z, t, torch.tensor([True, True])))
    assert all(
        torch.isfinite(v) for v in segmentation_losses(z, t, torch.tensor([False, True]))
    )  # not annotated: not looked at


@pytest.mark.parametrize('shape', [(2, 1, 8, 4), (2, 8, 8), (1, 1, 8, 8)])
def test_a_mask_of_the_wrong_size_is_refused(shape):
    with pytest.raises(InputError, match='masks: .*geometry of the images'):
        segmentation_losses(torch.zeros(2, 1, 8, 8), torch.zeros(shape), torch.ones(2, dtype=torch.bool))


def test_stages_train_one_task_each():
    model = MultiTask(multitask_encoder('resnet10t'), width=32)
    loss = MultiTaskLoss(BalancedCE())
    for stage, still in (('segmentation', {'head'}), ('classification', {'decoder', 'segmentation_head'})):
        model.zero_grad()
        loss.stage = stage
        loss(
            model(torch.rand(2, 1, 32, 32)), torch.tensor([0, 1]), torch.ones(2, 1, 32, 32), torch.tensor([True, True])
        ).backward()
        assert {
            k.split('.')[0] for k, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0
        } >= still
        assert model.encoder.model.conv1[0].weight.grad.abs().sum() > 0


def test_bce_is_one_binary_problem_per_class():
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, -1, 3])
    w = class_weights([0, 1, 2, 3, 3])
    t = F.one_hot(y.clamp(min=0), 4).double()
    want = (
        sum(
            float(w[k]) * sum(float(F.binary_cross_entropy(z[i, c].sigmoid(), t[i, c])) for c in range(4))
            for i, k in enumerate(y.tolist())
            if k >= 0
        )
        / 4
    )
    assert abs(float(BalancedBCE(w)(z, y)) - want) < 1e-5


# --- the masks and their controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(5))
def test_exchanged_masks_come_from_another_patient_of_the_class(seed):
    g = rng(seed, 'exchange test')
    n = 200
    rows = g.permutation(1000)[:n]
    labels = g.integers(1, 4, n)
    patients = np.array([f'p{k}' for k in g.integers(0, 60, n)])
    got = exchange(rows, labels, patients, seed)
    at = {r: i for i, r in enumerate(rows)}
    source = np.array([at[r] for r in got])
    assert sorted(got) == sorted(rows) and (labels[source] == labels).all() and (patients[source] != patients).all()
    assert (exchange(rows, labels, patients, seed) == got).all() and (
        exchange(rows, labels, patients, seed + 1) != got
    ).any()


def test_controls_keep_what_they_promise(data):
    cohort, store = data
    im = cohort.images
    rows = split_rows(im.label, assign_folds(im, 3), 0, 3)
    taught = {k: SegmentationTargets(store.masks, im.annotated, k, rows['train'], im.label, im.group) for k in MASKS}
    some = np.array([i for i in rows['train'] if im.annotated[i] and store.masks[i].any()])
    true = store.masks[some]
    assert len(some) > 20 and (taught['true'][some] == true).all()
    assert (taught['presence'][some] == 1).all() and (taught['mirrored'][some][:, :, ::-1] == true).all()
    assert not set(taught['shuffled'].source[some]) - set(some), 'a mask from outside the training rows'
    assert (
        taught['shuffled'].source[np.setdiff1d(np.arange(len(im)), some)] == np.setdiff1d(np.arange(len(im)), some)
    ).all()
    for k in MASKS:  # each says the same about whether there is something
        assert (taught[k][np.arange(len(im))].any((1, 2)) == store.masks[:].any((1, 2))).all()


def test_siblings_without_boxes_are_not_taught(data):
    cohort, _ = data
    im = cohort.images
    unread = (im.label > 0) & (im.boxes.map(len) == 0)
    assert unread.any() and not im.annotated[unread].any() and im.annotated[im.label == 0].all()


def test_masks_follow_the_augmented_image(data):
    "Where the image is its own mask, they must still agree after augmentation; counter-test: another draw disagrees."
    cohort, store = data
    im = cohort.images
    rows = np.flatnonzero(store.masks[:].any((1, 2)))[:16]
    batches = Batches(
        store.masks * 255,
        rows,
        im.label.values,
        16,
        seed=0,
        taught=SegmentationTargets(store.masks, np.ones(len(im), bool)),
    )
    p = as_parameters(MULTI | dict(augmentation='moco_cxr'))
    learn = finetuner(make_model(p)[0], (batches, batches), p, make_loss(p, [0, 1, 2, 3]))[0]
    cb = learn.augmenting
    learn.generator = torch_generator(0, 'augment', 0)
    learn.xb, learn.yb, learn.training = (b := next(iter(batches)))[:1], b[1:], True
    cb.training = True
    cb.before_batch()
    x, m = learn.xb[0] > 0.5, learn.yb[1] > 0
    iou = lambda a, b: (a & b).sum((1, 2, 3)) / (a | b).sum((1, 2, 3)).clamp(min=1)
    assert (m != b[2]).any() and iou(x, m).min() > 0.85 and iou(x, b[2] > 0).min() < 0.85


# --- training -------------------------------------------------------------------------------------------------------------------------


def test_with_weight_zero_it_is_the_single_task_model_bit_for_bit(data, tmp_path):
    "Counter-test: with a weight the predictions differ."
    (_, single, hs), (_, zero, hz), (_, one, _) = (
        trained(data, tmp_path / n, epochs=1, **c)
        for n, c in (('s', dict(multitask=False)), ('z', dict(seg_weight=0.0)), ('o', dict(seg_weight=1.0)))
    )
    pd.testing.assert_frame_equal(single, zero)
    assert (hs.val_auc_macro == hz.val_auc_macro).all() and not np.allclose(single.logit_0, one.logit_0)


@pytest.mark.parametrize(
    'change',
    [dict(weighting='uncertainty'), dict(schedule='segmentation_first'), dict(masks='shuffled')],
    ids=lambda c: next(iter(c.values())),
)
def test_stopped_after_any_epoch_it_ends_the_same(data, tmp_path, change):
    cohort, store = data
    p = as_parameters(MULTI | dict(epochs=3) | change)
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)

    class Stop(StageSchedule):
        order = 40

        def __init__(self, at):
            self.at = at

        def before_epoch(self):
            pass

        def after_validate(self):
            if self.epoch == self.at:
                raise KeyboardInterrupt

    whole, h, _, best, seen = fit(store, cohort.images, rows, p, tmp_path / 'whole.pt')
    for at in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            fit(store, cohort.images, rows, p, tmp_path / 'part.pt', cbs=[Stop(at)])
    again, h2, _, best2, seen2 = fit(store, cohort.images, rows, p, tmp_path / 'part.pt')
    pd.testing.assert_frame_equal(h, h2)
    pd.testing.assert_frame_equal(seen, seen2)
    assert best == best2
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    if change.get('schedule'):
        assert (
            best >= 1 and seen.epoch_0.isna().all() and seen.epoch_1.notna().any()
        )  # an epoch without classification is never the best, and says nothing of the labels


def test_a_run_holds_masks_that_can_be_recomputed(data, tmp_path):
    "Dice and IoU of the test images, from the saved model pixel by pixel, equal those from the saved scores."
    cohort, store = data
    prov, df, h = trained(data, tmp_path / 'r', epochs=4, lr=3e-3, seg_weight=3.0)
    assert {'train_class_loss', 'train_bce', 'train_dice', 'val_class_loss', 'val_bce', 'val_dice'} <= set(
        h
    ) and h.train_bce.iloc[-1] < h.train_bce.iloc[0]
    scores = load_mask_scores(tmp_path / 'r' / 'segmentation').of('test')
    model, p = load_model(tmp_path / 'r')
    t = at_threshold(scores, 128)
    im = cohort.images.reset_index().set_index('image')
    rows = im.loc[scores.images.image, 'index'].values
    assert set(scores.images.image) == set(df.image[(df.split == 'test')]) & set(
        cohort.images.image[cohort.images.annotated]
    )
    z = []
    logits = predict(
        model, Batches(store.images, rows, cohort.images.label.values, 8), on_masks=lambda i, m: z.append(m)
    )
    z = np.concatenate(z)
    on, true = z >= 0, store.masks[rows] > 0
    with np.errstate(invalid='ignore'):
        dice = 2 * (on & true).sum((1, 2)) / (on.sum((1, 2)) + true.sum((1, 2)))
    some = true.any((1, 2))
    assert some.any() and np.allclose(t.dice.values[some], dice[some]) and np.isnan(t.dice.values[~some]).all()
    saved = df[df.split == 'test'].set_index('image').loc[scores.images.image, [f'logit_{k}' for k in range(4)]].values
    assert np.allclose(saved, logits, atol=1e-4)
    prior = load_mask_scores(tmp_path / 'r' / 'prior')
    assert (
        set(prior.images.split) == {'val', 'test'}
        and (prior.of('test').images.image.values == scores.images.image.values).all()
    )


def test_a_corpus_without_masks_is_refused_before_training(data, tmp_path):
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    with pytest.raises(InputError, match='no training image has a mask.*Hint: use a corpus with boxes'):
        fit(
            store,
            cohort.images.assign(annotated=cohort.images.label == 0),
            rows,
            as_parameters(MULTI),
            tmp_path / 'c.pt',
        )
    assert not (tmp_path / 'c.pt').exists()


def test_a_diverging_decoder_stops_the_run(data, tmp_path):
    cohort, store = data
    rows = split_rows(cohort.images.label, assign_folds(cohort.images, 3), 0, 3)
    with pytest.raises(InputError, match='the loss is nan.*Hint: lower lr'):
        fit(store, cohort.images, rows, as_parameters(MULTI | dict(lr=1e18)), tmp_path / 'c.pt')


def test_drawn_masks_without_a_class_test_only_where_the_patient_is_new():
    im = pd.DataFrame(
        dict(
            label=[0, 1, -1, -1, -1, -1],
            group=list('abacde'),
            annotated=[True] * 5 + [False],
            mask_path=['', '', 'm', 'm', '', 'm'],
        )
    )
    assert mask_rows(im, dict(train=np.array([0]), val=np.array([1]), test=np.array([], int))).tolist() == [3]
