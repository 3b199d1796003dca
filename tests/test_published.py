"Encoders that others published, as vision transformers: the same embedding as the code that they come from, and what is refused."

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import eva, register_model

from cxrpaper.data.folds import assign_folds
from cxrpaper.models.multitask import check_multitask
from cxrpaper.models.nets import Classifier, Encoder, check_arch
from cxrpaper.models.weights import EVA_X, load_pretrained, load_weights, save_weights
from cxrpaper.paper.predict import sheet_figure
from cxrpaper.questions.saliency import ClassLogits
from cxrpaper.runs import InputError
from cxrpaper.training.finetune import fit_head, pretrained_file, split_rows
from cxrpaper.training.throughput import all_params, made_up

pytestmark = pytest.mark.filterwarnings('ignore:.*look up which')


@register_model
def small_dinov2(**how):
    return timm.create_model('vit_small_patch14_dinov2', **dict(embed_dim=48, depth=3, num_heads=3, img_size=70) | how)


def dinov2_shapes(dim=48, depth=3, grid=5):
    "Names and shapes of the arrays of transformers' Dinov2Model, as its files have them."
    square, layer = (dim, dim), {'layer_scale1.lambda1': (dim,), 'layer_scale2.lambda1': (dim,)}
    for name, shape in {
        **{f'attention.attention.{p}': square for p in ('query', 'key', 'value')},
        'attention.output.dense': square,
        'mlp.fc1': (4 * dim, dim),
        'mlp.fc2': (dim, 4 * dim),
        'norm1': (dim,),
        'norm2': (dim,),
    }.items():
        layer |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return {
        'embeddings.cls_token': (1, 1, dim),
        'embeddings.mask_token': (1, dim),
        'embeddings.position_embeddings': (1, grid**2 + 1, dim),
        'embeddings.patch_embeddings.projection.weight': (dim, 3, 14, 14),
        'embeddings.patch_embeddings.projection.bias': (dim,),
        'layernorm.weight': (dim,),
        'layernorm.bias': (dim,),
    } | {f'encoder.layer.{i}.{k}': s for i in range(depth) for k, s in layer.items()}


def waves(shapes):
    "Arrays that every machine makes alike, of a size that lets a signal through."
    out = {}
    for i, (k, s) in enumerate(sorted(shapes.items())):
        w = torch.sin(torch.arange(math.prod(s), dtype=torch.float64) * (0.37 + 0.011 * i) + i).reshape(s)
        around = k.endswith(('norm1.weight', 'norm2.weight', 'layernorm.weight', 'lambda1'))
        out[k] = (w * (2 / math.sqrt(s[1]) if len(s) == 2 else 0.1) + around).float()
    return out


def written(folder, state, stated=dict(image_mean=[0.5] * 3, image_std=[0.25] * 3)):
    save_file(state, folder / 'model.safetensors')
    if stated is not None:
        (folder / 'preprocessor_config.json').write_text(json.dumps(stated))
    return folder / 'model.safetensors'


@pytest.fixture(scope='module')
def published():
    return waves(dinov2_shapes())


# Dinov2Model of transformers 5.24.0 with `published` (hidden_size 48, 3 layers, 3 heads, image_size 70) on three equal channels of `ripple`, normalised by 0.5 and 0.25
CLASS_TOKEN, NORM, PATCHES = (
    [-1.56144, -0.71639, -1.90224, -0.42429, 2.86662, 1.13578],
    7.086898326873779,
    [-1.37125, -0.67168, -0.79477],
)


def ripple(px):
    return torch.sin(torch.arange(px * px, dtype=torch.float64) * 0.01).reshape(1, 1, px, px).float() / 2 + 0.5


def embedding(file, px=70, arch='small_dinov2'):
    encoder = Encoder(arch).eval()
    source = load_pretrained(encoder, 'file', weights=file)
    with torch.no_grad():
        return source, encoder.pooled(ripple(px))[0].numpy(), encoder(ripple(px))[0].mean((2, 3))[0].numpy()


def test_the_embedding_of_transformers_dinov2(published, tmp_path):
    source, token, patches = embedding(written(tmp_path, published))
    assert (source['layout'], source['unused'], source['statistics']) == ('transformers', ['mask_token'], [0.5, 0.25])
    np.testing.assert_allclose(token[:6], CLASS_TOKEN, atol=2e-4)
    np.testing.assert_allclose(patches[:3], PATCHES, atol=2e-4)
    assert abs(np.linalg.norm(token) / NORM - 1) < 1e-5


def test_names_of_transformers_5_and_other_statistics(published, tmp_path):
    "Arrays that lie elsewhere, or gray that is scaled otherwise, give another embedding: the golden numbers can tell."
    renamed = {}
    for k, v in published.items():
        for old, new in dict(query='q_proj', key='k_proj', value='v_proj').items():
            k = k.replace(f'attention.attention.{old}', f'attention.{new}')
        renamed[k.replace('attention.output.dense', 'attention.o_proj')] = v
    assert embedding(written(tmp_path, renamed))[1] == pytest.approx(
        embedding(written(tmp_path, published))[1], abs=1e-6
    )
    right = embedding(written(tmp_path, published))[1]
    swap = {
        k: published[k.replace('.query.', '.KEY.').replace('.key.', '.query.').replace('.KEY.', '.key.')]
        for k in published
    }
    assert np.abs(embedding(written(tmp_path, swap))[1] - right).max() > 1e-2
    other = embedding(written(tmp_path, published, dict(image_mean=[0.3] * 3, image_std=[0.2] * 3)))
    assert np.abs(other[1] - right).max() > 1e-2 and other[0]['statistics'] == [0.3, 0.2]


def eva_x(like=dict(embed_dim=192, num_heads=3)):
    "EVA-X as its authors build it, and a file as they write it: inside `module`, with the mask token and the head of its pre-training."
    torch.manual_seed(3)
    how = dict(img_size=224, patch_size=16, depth=12, mlp_ratio=4 * 2 / 3, swiglu_mlp=True, use_rot_pos_emb=True)
    net = eva.Eva(**how, **like, ref_feat_shape=(14, 14), num_classes=0).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, 0.02, 0.05)
    state = {k.replace('fc_norm', 'norm'): v for k, v in net.state_dict().items()}
    for k in [k for k in state if '.mlp.fc1.' in k or '.mlp.fc2.' in k]:
        state[k.replace('fc1', 'w12').replace('fc2', 'w3')] = state.pop(k)
    dim = like['embed_dim']
    extra = {
        'mask_token': torch.zeros(1, 1, dim),
        'lm_head.weight': torch.zeros(8, dim),
        'lm_head.bias': torch.zeros(8),
    }
    return net, dict(module=state | extra)


def test_the_embedding_of_eva_x(tmp_path):
    net, checkpoint = eva_x()
    torch.save(checkpoint, tmp_path / 'eva_x.pt')
    source, pooled, _ = embedding(tmp_path / 'eva_x.pt', 224, 'eva_x_tiny_patch16')
    assert (source['layout'], source['unused']) == ('eva_x', ['lm_head', 'mask_token'])
    with torch.no_grad():
        x = ((ripple(224) - EVA_X[0]) / EVA_X[1]).repeat(1, 3, 1, 1)
        theirs = net.fc_norm(net.forward_features(x)[:, 1:].mean(1))[0].numpy()
    np.testing.assert_allclose(pooled, theirs, atol=1e-4)
    assert theirs.std() > 0.01


def test_a_warning_says_what_it_may_have_seen(published, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        embedding(written(tmp_path, published))
    assert any('ChestX-ray14' in str(w.message) for w in said)


@pytest.mark.parametrize(
    'change, arch, said',
    [
        (lambda s: s.pop('encoder.layer.2.attention.attention.value.bias'), None, 'arrays are not those'),
        (lambda s: s.pop('encoder.layer.2.mlp.fc1.bias'), None, 'blocks.2.mlp.fc1.bias is missing'),
        (lambda s: s.update({'encoder.layer.3.norm1.bias': torch.zeros(48)}), None, 'blocks.3.norm1.bias'),
        (lambda s: s.update({'layernorm.bias': torch.full((48,), math.nan)}), None, 'norm.bias is not finite'),
        (lambda s: None, 'vit_small_patch14_dinov2', 'do not fit'),
        (lambda s: None, 'eva_x_small_patch16', 'ls1.gamma'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, arch, said, published, tmp_path):
    state = dict(published)
    change(state)
    file, encoder = written(tmp_path, state), Encoder(arch or 'small_dinov2')
    before = encoder.state_dict()['model.cls_token'].clone()
    with pytest.raises(InputError, match=said) as e:
        load_pretrained(encoder, 'file', weights=file)
    assert 'model.safetensors' in str(e.value) and torch.equal(encoder.state_dict()['model.cls_token'], before)


@pytest.mark.parametrize(
    'stated',
    [
        '{',
        '[]',
        '{"image_mean": [0.5]}',
        '{"image_mean": "x", "image_std": [1]}',
        '{"image_mean": [0.5], "image_std": [0]}',
    ],
)
def test_statistics_that_are_none_are_refused(stated, published, tmp_path):
    file = written(tmp_path, published)
    (tmp_path / 'preprocessor_config.json').write_text(stated)
    with pytest.raises(InputError, match='preprocessor_config.json|statistics'):
        load_pretrained(Encoder('small_dinov2'), 'file', weights=file)


def test_without_stated_statistics_those_of_the_architecture(published, tmp_path):
    encoder = Encoder('small_dinov2')
    usual = list(encoder.statistics)
    assert load_pretrained(encoder, 'file', weights=written(tmp_path, published, None))['statistics'] == usual


def test_no_file_is_named():
    with pytest.raises(InputError, match='parameter weights: none'):
        load_pretrained(Encoder('resnet10t'), 'file')
    with pytest.raises(InputError, match='no such file of weights'):
        load_pretrained(Encoder('resnet10t'), 'file', weights='data/weights/nowhere.pth')


def test_a_saved_transformer_is_the_same_again(tmp_path):
    torch.manual_seed(1)
    model = Classifier(Encoder('eva_x_tiny_patch16')).eval()
    model.encoder.statistics = EVA_X
    save_weights(model, tmp_path / 'weights.safetensors')
    again = Classifier(Encoder('eva_x_tiny_patch16')).eval()
    load_weights(again, tmp_path / 'weights.safetensors')
    with torch.no_grad():
        assert torch.equal(model(ripple(64)), again(ripple(64)))


def test_what_needs_maps_of_several_scales_is_refused():
    with pytest.raises(InputError, match='eva_x_tiny_patch16 with the decoder unet cannot be built'):
        check_multitask('eva_x_tiny_patch16', 'unet', 32, 96)
    with pytest.raises(InputError, match='does not read the mean of a map'):
        ClassLogits(Classifier(Encoder('eva_x_tiny_patch16')))
    with pytest.raises(InputError, match='divisible by patch size'):
        check_arch('vit_tiny_patch16_224', 120)


def test_a_head_is_solved_on_a_published_encoder(tmp_path):
    "Two kinds of noise are told apart by the frozen features; the file and its normalisation stand in what the run records."
    torch.save(eva_x()[1], tmp_path / 'eva_x.pt')
    settings = dict(
        arch='eva_x_tiny_patch16',
        pretrain='file',
        weights=str(tmp_path / 'eva_x.pt'),
        px=64,
        freeze=True,
        head='logistic',
    )
    p, images = all_params('finetune', settings | dict(profile='smoke', batch_size=16)), made_up(64, 80)
    labels = np.arange(80) % 4
    for i, k in enumerate(labels):
        images.images[i] = np.tile(np.uint8([[0, 255], [255, 0]] if k % 2 else [[90, 90], [200, 200]]), (32, 32)) // (
            1 + k // 2
        )
    table = pd.DataFrame(dict(image=[f'i{i}' for i in range(80)], patient=[f'p{i}' for i in range(80)], label=labels))
    table = table.assign(group=table.patient, study=table.patient)
    rows = split_rows(table.label, assign_folds(table, n_folds=p.n_folds, seed=0), 0, p.n_folds)
    assert pretrained_file(p, None, None) == tmp_path / 'eva_x.pt'
    model, history, source, *_ = fit_head(images, table, rows, p)
    assert source['layout'] == 'eva_x' and source['statistics'] == pytest.approx(EVA_X, abs=1e-8)
    assert history.val_auc_macro[0] > 0.9


@pytest.mark.parametrize('cam, panels', [(None, 4), (np.zeros((8, 8)), 5)])
def test_a_sheet_has_a_heat_map_only_where_there_is_one(cam, panels):
    r = SimpleNamespace(store=SimpleNamespace(images=np.zeros((5, 8, 8), np.uint8)), labels=np.zeros(5, int))
    case = dict(image=np.zeros((8, 8), np.uint8), p=np.full(4, 0.25), cam=cam, mask=None, near=[0, 1, 2])
    titles = [ax.get_title() for ax in sheet_figure(r, case).axes]
    assert len(titles) == panels and any('Grad-CAM' in t for t in titles) == (cam is not None)
