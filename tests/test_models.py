"The encoder, its weights and its loss, against references written here by hand."

import errno
import hashlib
import http.server
import threading
import time
from copy import deepcopy
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import cxrpaper.models.weights as M
from cxrpaper.models.losses import *
from cxrpaper.models.nets import *
from cxrpaper.models.weights import *
from cxrpaper.runs import InputError, file_digest, project_root, show_path

ARCHS = ['tf_efficientnet_lite0', 'resnet18', 'densenet121']
REAL = project_root().parent / 'shared' / 'data' / 'real_cxr'


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def raw():
    return read_weights(imagenet_file('tf_efficientnet_lite0', 'data/weights/no-such-folder'))[0]


@pytest.fixture(scope='module')
def lite0():
    encoder = Encoder().eval()
    load_pretrained(encoder, 'imagenet', folder='data/weights/no-such-folder')
    return encoder


# --- one encoder for classifier and U-Net ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('arch', ARCHS)
def test_unet_shares_the_encoder_one_to_one(arch):
    import segmentation_models_pytorch as smp

    encoder, unet = Encoder(arch).eval(), smp.Unet(f'tu-{arch}', in_channels=1, encoder_weights=None).eval()
    x = torch.rand(2, 1, 64, 64)
    ours = lambda: encoder(x)
    theirs = lambda: unet.encoder((x - encoder.mean) / encoder.std)[1:]
    with torch.no_grad():
        assert not torch.allclose(ours()[-1], theirs()[-1])
        result = unet.encoder.model.load_state_dict(encoder.model.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert len(ours()) == len(theirs()) == 5
        for a, b in zip(ours(), theirs()):
            assert torch.equal(a, b)
    back = unet.encoder.model.state_dict()
    encoder.model.load_state_dict(back, strict=True)
    assert list(unet.encoder.out_channels[1:]) == encoder.channels


@pytest.mark.parametrize('arch', ARCHS)
def test_classifier_shapes_gradients_and_keys(arch):
    model = Classifier(Encoder(arch))
    x = torch.rand(4, 1, 96, 96)
    classification_loss(model(x), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert {k.rsplit('.', 1)[0] for k in model.state_dict() if not k.startswith('encoder.model.')} == {'head'}
    model.eval()
    assert torch.allclose(model(x), model.head(model.embed(x))) and model.embed(x).shape == (
        4,
        model.encoder.channels[-1],
    )


def test_unknown_architecture_names_near_ones():
    with pytest.raises(InputError, match='densenet121'):
        Encoder('densenet_121')


# --- ImageNet weights: the mapping is proven ------------------------------------------------------------------------------------------

LITE0 = [
    (1, 3, 1, 1),
    (2, 3, 2, 6),
    (2, 5, 2, 6),
    (3, 3, 2, 6),
    (3, 5, 1, 6),
    (4, 5, 2, 6),
    (1, 3, 1, 6),
]  # EfficientNet-B0's table: repeats, kernel, stride, expansion


REPEATS = dict(lite0=(1, 2, 2, 3, 3, 4, 1), lite1=(1, 3, 3, 4, 4, 5, 1), lite2=(1, 3, 3, 4, 4, 5, 1))
LITES = sorted(REPEATS)


def packaged(lite):
    return read_weights(imagenet_file(f'tf_efficientnet_{lite}', 'data/weights/no-such-folder'))[0]


def by_hand(raw, x, eps=1e-3, act=F.relu6, same=True, lite='lite0'):
    "EfficientNet-Lite from the raw arrays: maps at 1/2 .. 1/32 and the logits. x (N,3,H,W), normalised."

    def bn(x, name):
        g, b, m, v = (
            raw[f'{name}.{k}'].to(x)[:, None, None] for k in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return (x - m) / torch.sqrt(v + eps) * g + b

    def conv(x, name, stride=1, groups=1):
        w = raw[f'{name}.weight'].to(x)
        k = w.shape[-1]
        if (
            same
        ):  # TensorFlow's SAME: the output has ceil(size/stride) points, an odd pixel of padding goes right and below
            ph, pw = (max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[2:])
            x = F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2])
        else:
            x = F.pad(x, [k // 2] * 4)
        return F.conv2d(x, w, stride=stride, groups=groups)

    x, block, maps = act(bn(conv(x, '_conv_stem', 2), '_bn0')), 0, []
    for repeats, (_, kernel, stride, expansion) in zip(REPEATS[lite], LITE0):
        for i in range(repeats):
            name, skip = f'_blocks.{block}', x
            if stride == 2 and i == 0:
                maps.append(x)
            if expansion != 1:
                x = act(bn(conv(x, f'{name}._expand_conv'), f'{name}._bn0'))
            x = act(bn(conv(x, f'{name}._depthwise_conv', stride if i == 0 else 1, x.shape[1]), f'{name}._bn1'))
            assert raw[f'{name}._depthwise_conv.weight'].shape[-1] == kernel
            x = bn(conv(x, f'{name}._project_conv'), f'{name}._bn2')
            if i > 0:
                x = x + skip
            block += 1
    maps.append(x)
    x = act(bn(conv(x, '_conv_head'), '_bn1')).mean((2, 3))
    return maps, x @ raw['_fc.weight'].to(x).T + raw['_fc.bias'].to(x)


@pytest.mark.parametrize('size', [(96, 96), (101, 75)])
def test_lite0_equals_a_forward_by_hand(raw, lite0, size):
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    rgb = (x.repeat(1, 3, 1, 1) - 0.5) / 0.5
    model = Encoder().double().eval()
    model.load_state_dict(lite0.state_dict())
    with torch.no_grad():
        maps, ours = by_hand(raw, rgb)[0], model(x)
        for a, b in zip(maps, ours):
            assert (
                a.shape == b.shape and (a - b).abs().max() < 1e-5 * a.abs().max()
            )  # the weights, and so the sum over RGB, are float32
        for wrong in (dict(eps=1e-5), dict(act=F.relu), dict(act=F.silu), dict(same=False)):  # the comparison can tell
            other = by_hand(raw, rgb, **wrong)[0][-1]
            assert (other - ours[-1]).abs().max() > 1e-3 * ours[-1].abs().max(), wrong


@pytest.mark.parametrize('lite', LITES)
def test_every_array_is_mapped_once(lite):
    raw, arch = packaged(lite), f'tf_efficientnet_{lite}'
    names = [lite_to_timm(k, arch) for k in raw]
    whole = timm.create_model(arch)
    assert len(set(names)) == len(names) == len(raw) and set(names) == set(whole.state_dict())


@pytest.mark.parametrize('lite', LITES)
def test_imagenet_head_knows_photographs(lite):
    import matplotlib
    import sklearn

    raw, arch = packaged(lite), f'tf_efficientnet_{lite}'
    files = [Path(sklearn.__file__).parent / 'datasets/images' / n for n in ('china.jpg', 'flower.jpg')] + [
        Path(matplotlib.get_data_path()) / 'sample_data/grace_hopper.jpg'
    ]
    photos = []
    for f in files:
        im = cv2.imread(str(f))[..., ::-1]
        s = min(im.shape[:2])
        y, x = ((n - s) // 2 for n in im.shape[:2])
        photos.append(cv2.resize(im[y : y + s, x : x + s], (224, 224), interpolation=cv2.INTER_AREA))
    x = (torch.tensor(np.stack(photos)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    whole = timm.create_model(arch).eval()
    assert fit_weights(whole, {lite_to_timm(k, arch): v for k, v in raw.items()}) == []
    with torch.no_grad():
        logits, hand = whole(x), by_hand(raw, x, lite=lite)[1]
    assert (logits - hand).abs().max() < 1e-3
    first = [698, 985, 652]  # palace, daisy, military uniform
    assert logits.argmax(1).tolist() == ([698, 599, 834] if lite == 'lite2' else first)  # palace, honeycomb, suit


def test_summed_first_convolution_is_exact_for_gray(raw, lite0):
    rgb = Encoder(in_chans=3).eval()
    load_pretrained(rgb, 'imagenet', folder='data/weights/no-such-folder')
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(lite0(x), rgb(x.repeat(1, 3, 1, 1))):
            assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_provenance_of_imagenet_weights(raw):
    a, b = (load_pretrained(Encoder(), 'imagenet', folder='data/weights/no-such-folder') for _ in range(2))
    assert a == b and a['sha256'] == PACKAGED['tf_efficientnet_lite0'] == file_digest(
        imagenet_file('tf_efficientnet_lite0', 'data/weights/no-such-folder')
    )
    assert {u.split('.')[0] for u in a['unused']} == {'conv_head', 'bn2', 'classifier'}
    assert load_pretrained(Encoder(), 'none')['encoder_sha256'] != a['encoder_sha256']


def test_weights_of_another_lite_are_refused():
    other = imagenet_file('tf_efficientnet_lite1', 'data/weights/no-such-folder')
    with pytest.raises(InputError, match='holds tf_efficientnet_lite1'):
        load_pretrained(Encoder(), 'imagenet', weights=other)
    assert load_pretrained(Encoder('tf_efficientnet_lite1'), 'imagenet', weights=other)['source'].startswith(
        'efficientnet-lite1'
    )


def test_altered_package_is_refused(raw, tmp_path):
    torch.save({**raw, '_bn0.bias': raw['_bn0.bias'] + 1e-4}, tmp_path / 'altered.pth')
    with pytest.raises(InputError, match='SHA-256'):
        load_pretrained(Encoder(), 'imagenet', weights=tmp_path / 'altered.pth')


# --- weights of other architectures: folder, network, neither -------------------------------------------------------------------------


@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_a_file_of_timms_in_the_folder_is_used(arch, tmp_path):
    full = timm.create_model(arch).eval()  # stands for the ImageNet weights: RGB, with classifier
    save_file(full.state_dict(), str(tmp_path / f'{arch}.safetensors'))
    encoder = Encoder(arch).eval()
    source = load_pretrained(encoder, 'imagenet', folder=tmp_path)
    assert source['sha256'] == file_digest(tmp_path / f'{arch}.safetensors')
    assert {u.split('.')[0] for u in source['unused']} <= {'fc', 'classifier'} and source['unused']
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(
            encoder(x)[-1], full.forward_features(((x - encoder.mean) / encoder.std).repeat(1, 3, 1, 1)), atol=1e-4
        )


def test_offline_says_what_to_put_where(monkeypatch, tmp_path):
    def offline(*a, **k):
        raise OSError('Name or service not known')

    monkeypatch.setattr(M.urllib.request, 'urlopen', offline)
    with pytest.raises(InputError) as e:
        load_pretrained(Encoder('densenet121'), 'imagenet', folder=tmp_path)
    assert 'https://huggingface.co/timm/densenet121' in str(e.value)
    assert show_path(tmp_path / 'densenet121.safetensors') in str(e.value)
    assert not list(tmp_path.iterdir())


class _Server(http.server.BaseHTTPRequestHandler):
    body, claimed = b'', 0

    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', str(self.claimed))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *a):
        pass


@pytest.mark.parametrize('cut', [0, 1000])
def test_download_is_whole_or_absent(cut, monkeypatch, tmp_path):
    full = timm.create_model('resnet18')
    save_file(full.state_dict(), str(tmp_path / 'at_home.safetensors'))
    body = (tmp_path / 'at_home.safetensors').read_bytes()
    handler = type('H', (_Server,), dict(body=body[: len(body) - cut], claimed=len(body)))
    server = http.server.HTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(M, 'weights_url', lambda arch: f'http://127.0.0.1:{server.server_port}/x')
    folder = tmp_path / 'weights'
    try:
        if cut:
            with pytest.raises(InputError, match='cannot be downloaded'):
                load_pretrained(Encoder('resnet18'), 'imagenet', folder=folder)
            assert not list(folder.iterdir())
        else:
            source = load_pretrained(Encoder('resnet18'), 'imagenet', folder=folder)
            assert source['sha256'] == hashlib.sha256(body).hexdigest() == file_digest(folder / 'resnet18.safetensors')
    finally:
        server.shutdown()
        server.server_close()


# --- our own checkpoints --------------------------------------------------------------------------------------------------------------


def test_encoder_out_of_every_kind_of_model(tmp_path):
    import segmentation_models_pytorch as smp

    encoder = Encoder('resnet18')
    [p.data.normal_() for p in encoder.parameters()]
    unet = smp.Unet('tu-resnet18', in_channels=1, encoder_weights=None)
    unet.encoder.model.load_state_dict(encoder.model.state_dict())
    for name, model in dict(encoder=encoder, classifier=fastest(Classifier(encoder)), unet=unet).items():
        sha = save_weights(model, tmp_path / f'{name}.safetensors')
        fresh = Encoder('resnet18')
        source = load_pretrained(fresh, str(tmp_path / f'{name}.safetensors'))
        assert source['sha256'] == sha and source['encoder_sha256'] == weights_digest(encoder.model), name
    assert source['unused'] == ['decoder', 'segmentation_head']


def test_whole_model_round_trip_is_exact(tmp_path):
    a, b = Classifier(Encoder('resnet18')).eval(), Classifier(Encoder('resnet18')).eval()
    save_weights(a, tmp_path / 'w.safetensors', seed=3)
    assert load_weights(b, tmp_path / 'w.safetensors') == dict(arch='resnet18', seed=3)
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def _break(state, how):
    k = 'encoder.model.layer1.0.conv1.weight'
    if how == 'missing':
        del state[k]
    if how == 'shape':
        state[k] = state[k][:32].contiguous()
    if how == 'not finite':
        state[k][0] = float('nan')
    if how == 'no place':
        state['encoder.model.layer9.weight'] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    'how,says',
    [
        ('missing', 'is missing'),
        ('shape', r'\(32, 64, 3, 3\), not \(64, 64, 3, 3\)'),
        ('not finite', 'not finite'),
        ('no place', 'no place'),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(how, says, tmp_path):
    f = tmp_path / 'w.safetensors'
    save_weights(Classifier(Encoder('resnet18')), f)
    save_file(_break(load_file(str(f)), how), str(f))
    encoder = Encoder('resnet18')
    before = weights_digest(encoder)
    with pytest.raises(InputError, match=says):
        load_pretrained(encoder, str(f))
    assert weights_digest(encoder) == before  # nothing half loaded
    with pytest.raises(InputError):
        load_weights(Classifier(encoder), f)


@pytest.mark.parametrize(
    'name,content',
    [
        ('cut.safetensors', None),
        ('empty.safetensors', b''),
        ('text.safetensors', b'<html>404</html>'),
        ('text.pth', b'<html>404</html>'),
        ('list.pth', 'list'),
    ],
)
def test_files_that_are_no_weights(name, content, tmp_path):
    f = tmp_path / name
    if content is None:
        save_weights(Classifier(Encoder('resnet18')), f)
        f.write_bytes(f.read_bytes()[:100_000])
    elif content == 'list':
        torch.save([1, 2], f)
    else:
        f.write_bytes(content)
    with pytest.raises(InputError, match='cannot be read as weights') as e:
        read_weights(f)
    assert name in str(e.value) and e.value.hint


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))

    torch.save(dict(a=Evil()), tmp_path / 'evil.pth')
    with pytest.raises(InputError):
        read_weights(tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()


def test_other_architecture_and_foreign_files(tmp_path):
    save_weights(Classifier(Encoder('resnet18')), tmp_path / 'w.safetensors')
    with pytest.raises(InputError, match="holds resnet18"):
        load_pretrained(Encoder(), str(tmp_path / 'w.safetensors'))
    save_file(timm.create_model('resnet18').state_dict(), str(tmp_path / 'timm.safetensors'))
    with pytest.raises(InputError, match='data/weights'):
        load_pretrained(Encoder('resnet18'), str(tmp_path / 'timm.safetensors'))


def test_missing_pretraining_runs_are_named(tmp_path):
    for pretrain in ('moco', 'inpainting'):
        with pytest.raises(InputError, match=f'03_{pretrain}.ipynb'):
            load_pretrained(Encoder(), pretrain, weights=tmp_path / 'nothing')
        with pytest.raises(InputError, match=f'no {pretrain} run'):
            run_weights(pretrain, 'resnet18', runs=tmp_path)
    with pytest.raises(InputError, match="pretrain='none'"):
        load_pretrained(Encoder(), 'none', weights='w.safetensors')


def test_latest_run_of_the_architecture_is_found(tmp_path):
    import os

    for _age, (name, arch) in enumerate([('new', 'resnet18'), ('old', 'resnet18'), ('newest', 'resnet34')][::1]):
        f = tmp_path / f'smoke/moco/{name}/weights.safetensors'
        save_weights(Encoder(arch), f)
        t = time.time() - dict(new=10, old=100, newest=0)[name]
        os.utime(f, (t, t))
    assert run_weights('moco', 'resnet18', runs=tmp_path).parent.name == 'new'
    source = load_pretrained(Encoder('resnet18'), 'moco', weights=tmp_path / 'smoke/moco/old')
    assert source['pretrain'] == 'moco' and len(source['sha256']) == 64


# --- what others published ------------------------------------------------------------------------------------------------------------


def torchvision_net(arch):
    "A copy of the one network of this architecture, free to be changed."
    return deepcopy(_torchvision_net(arch))


@cache
def _torchvision_net(arch):
    "Random weights, and statistics of the normalisation that are not the initial ones."
    import torchvision

    net = getattr(torchvision.models, arch)(weights=None).double()
    for k, v in net.state_dict().items():
        if 'running' in k:
            v.copy_(torch.rand_like(v) + 0.5 if 'var' in k else 0.1 * torch.randn_like(v))
    return net.eval()


def torchvision_map(net, x):
    return F.relu(net.features(x)) if hasattr(net, 'features') else torch.nn.Sequential(*list(net.children())[:-2])(x)


def written_by_moco(net, arch, mlp=True, adam=True):
    "What main_moco.py saves: two encoders with heads and a queue under module., the optimizer's state."
    name = 'fc' if hasattr(net, 'fc') else 'classifier'
    n = getattr(net, name).in_features
    last = torch.nn.Linear(n, 128).double()
    setattr(net, name, torch.nn.Sequential(torch.nn.Linear(n, n).double(), torch.nn.ReLU(), last) if mlp else last)
    state = {f'module.encoder_{e}.{k}': v.clone() + (e == 'k') for e in 'qk' for k, v in net.state_dict().items()}
    state |= {'module.queue': torch.randn(128, 32), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    optimizer = torch.optim.Adam(last.parameters(), lr=1e-4)
    last(torch.rand(2, n).double()).sum().backward()
    optimizer.step()
    return dict(epoch=20, arch=arch, state_dict=state, **(dict(optimizer=optimizer.state_dict()) if adam else {}))


def same_map(encoder, net, statistics, rtol=1e-6, size=64):
    x = torch.rand(2, 1, size, size, dtype=torch.float64)
    mean, std = statistics
    with torch.no_grad():
        a, b = (
            encoder(x.expand(-1, encoder.in_chans, -1, -1))[-1],
            torchvision_map(net, ((x - mean) / std).repeat(1, 3, 1, 1)),
        )
    return (
        a.shape == b.shape
        and bool(torch.isfinite(b).all())
        and float((a - b).abs().max()) < rtol * float(b.abs().max())
    )


@pytest.mark.parametrize(
    'arch,mlp,zipped',
    [
        ('resnet18', True, True),
        ('resnet18', False, False),
        ('resnet50', True, True),
        ('densenet121', True, False),
        ('densenet121', False, True),
    ],
)
def test_the_query_encoder_of_moco_computes_the_same(arch, mlp, zipped, tmp_path):
    net = torchvision_net(arch)
    f = tmp_path / 'checkpoint_0019.pth.tar'
    torch.save(
        written_by_moco(net, arch, mlp), f, _use_new_zipfile_serialization=zipped
    )  # PyTorch before 1.6 did not zip
    encoder = Encoder(arch).double().eval()
    source = load_pretrained(encoder, 'moco', weights=f)
    assert same_map(encoder, net, MOCO_CXR)
    assert source['layout'] == 'moco' and source['sha256'] == file_digest(f) and source['statistics'] == list(MOCO_CXR)
    head = 'fc' if arch.startswith('resnet') else 'classifier'
    assert set(source['unused']) == {
        'encoder_k',
        'queue',
        'queue_ptr',
        *(f'{head}.{i}{k}' for i in (('0.', '2.') if mlp else ('',)) for k in ('weight', 'bias')),
    }
    encoder.statistics = input_statistics(arch)
    assert not same_map(encoder, net, MOCO_CXR, rtol=1e-2)  # the comparison can tell
    load_pretrained(encoder, 'moco', weights=f, statistics=(0.4, 0.2))
    assert same_map(encoder, net, (0.4, 0.2)) and not same_map(encoder, net, MOCO_CXR)


def test_the_key_encoder_is_another_network(tmp_path):
    net = torchvision_net('resnet18')
    c = written_by_moco(net, 'resnet18')
    torch.save(c, tmp_path / 'q.pth.tar')
    swapped = {
        k.replace('encoder_q', '#').replace('encoder_k', 'encoder_q').replace('#', 'encoder_k'): v
        for k, v in c['state_dict'].items()
    }
    torch.save(c | dict(state_dict=swapped), tmp_path / 'k.pth.tar')
    encoder = Encoder('resnet18').double().eval()
    load_pretrained(encoder, 'moco', weights=tmp_path / 'k.pth.tar')
    assert not same_map(encoder, net, MOCO_CXR, rtol=1e-2)
    load_pretrained(encoder, 'moco', weights=tmp_path / 'q.pth.tar')
    assert same_map(encoder, net, MOCO_CXR)


def test_three_channels_keep_their_kernels(tmp_path):
    net = torchvision_net('resnet18')
    torch.save(written_by_moco(net, 'resnet18'), tmp_path / 'm.pth.tar')
    encoder = Encoder('resnet18', in_chans=3).double().eval()
    load_pretrained(encoder, 'moco', weights=tmp_path / 'm.pth.tar')
    assert same_map(encoder, net, MOCO_CXR) and torch.equal(encoder.model.conv1.weight, net.conv1.weight)


def old_names(k):
    return (
        k
        if 'denselayer' not in k
        else k.replace('.norm1.', '.norm.1.')
        .replace('.norm2.', '.norm.2.')
        .replace('.conv1.', '.conv.1.')
        .replace('.conv2.', '.conv.2.')
    )


@pytest.mark.parametrize('nest', [None, 'state_dict', 'model'])
@pytest.mark.parametrize(
    'prefix', ['', 'module.', 'backbone.', 'encoder.', 'model.', 'module.encoder.', 'model.backbone.']
)
def test_wrapped_state_dicts(prefix, nest, tmp_path):
    net = torchvision_net('resnet18')
    f = tmp_path / 'w.pth'
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({nest: state, 'epoch': 3} if nest else state, f)
    encoder = Encoder('resnet18').double().eval()
    for pretrain in ('imagenet', 'moco'):
        source = load_pretrained(encoder, pretrain, weights=f)
        assert (
            source['layout'] == 'plain'
            and source['unused'] == ['fc.bias', 'fc.weight']
            and same_map(encoder, net, input_statistics('resnet18'))
        )


@pytest.mark.parametrize('kind', ['now', 'old', 'safetensors', 'timm'])
def test_densenet_names_of_every_age(kind, tmp_path):
    net = torchvision_net('densenet121')
    f = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == 'timm':
        whole = timm.create_model('densenet121').double()
        whole.load_state_dict(net.state_dict())
        state = whole.state_dict()
    else:
        state = {
            (old_names(k) if kind == 'old' else k): v
            for k, v in net.state_dict().items()
            if not (kind == 'old' and 'num_batches' in k)
        }
    if kind == 'old':
        assert any('.norm.1.' in k for k in state) and any('.conv.2.' in k for k in state)
    save_file(state, str(f)) if kind == 'safetensors' else torch.save(state, f)
    encoder = Encoder('densenet121').double().eval()
    assert load_pretrained(encoder, 'moco', weights=f)['unused'] == [
        'classifier.bias',
        'classifier.weight',
    ] and same_map(encoder, net, input_statistics('densenet121'))


def test_torchxrayvision_takes_gray_from_minus_to_plus_1024(tmp_path):
    net = torchvision_net('densenet121')
    first = net.features.conv0.weight.sum(1, keepdim=True)
    net.features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False).double()
    net.features.conv0.weight.data = first
    f = tmp_path / 'xrv.pt'
    torch.save(net.state_dict() | {'op_threshs': torch.full((18,), 0.5)}, f)
    encoder = Encoder('densenet121').double().eval()
    with pytest.warns(UserWarning, match='NIH, the RSNA or SIIM'):
        source = load_pretrained(encoder, 'moco', weights=f)
    assert source['layout'] == 'torchxrayvision' and 'op_threshs' in source['unused']
    x = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        theirs = net.features((2 * x - 1) * 1024).relu()
        ours = encoder(x)[-1].relu()
        assert (theirs - ours).abs().max() < 1e-6 * theirs.abs().max()
        encoder.statistics = input_statistics('densenet121')
        assert (theirs - encoder(x)[-1].relu()).abs().max() > 1e-2 * theirs.abs().max()  # the comparison can tell


class Odd:
    pass


def _spoil(c, how):
    s = c['state_dict']
    k = 'module.encoder_q.layer2.0.conv1.weight'
    if how == 'missing':
        del s[k]
    if how == 'extra':
        s['module.encoder_q.layer9.weight'] = torch.zeros(1)
    if how == 'extra that looks like a head':
        s['module.encoder_q.fcx.weight'] = torch.zeros(1)
    if how == 'shape':
        s[k] = s[k][:5]
    if how == 'not finite':
        s[k][0] = float('nan')
    if how == 'stray':
        s['module.predictor.0.weight'] = torch.zeros(1)
    if how == 'stray head':
        s['module.fc.weight'] = torch.zeros(1)
    if how == 'no tensor':
        s['module.encoder_q.note'] = 'text'
    if how == 'named otherwise':
        c['arch'] = 'resnet34'
    if how == 'twice':
        s[k.removeprefix('module.')] = s[k]
    if how == 'key encoder alone':
        c['state_dict'] = {n: v for n, v in s.items() if 'encoder_q' not in n}
    if how == 'empty':
        c['state_dict'] = {}
    if how == 'optimizer alone':
        del c['state_dict']
    if how == 'numpy':
        c['best'] = np.float64(0.5)
    if how == 'object':
        c['args'] = Odd()
    if how == 'wrapped twice':
        return dict(state_dict={'backbone.conv1.weight': torch.zeros(1), 'conv1.weight': torch.zeros(1)})
    return c


@pytest.mark.parametrize(
    'how,says',
    [
        ('missing', r'layer2.0.conv1.weight is missing'),
        ('extra', 'neither to resnet18 nor to a head: layer9.weight'),
        ('extra that looks like a head', 'fcx.weight'),
        ('shape', r'\(5, 64, 3, 3\), not'),
        ('not finite', 'not finite'),
        ('stray', 'no part of MoCo.*predictor.0.weight'),
        ('stray head', 'no part of MoCo.*fc.weight'),
        ('no tensor', 'no arrays: .*note'),
        ('named otherwise', 'holds resnet34, this encoder is resnet18'),
        ('twice', 'with and without module'),
        ('key encoder alone', 'neither to resnet18.*encoder_k'),
        ('empty', 'no arrays'),
        ('optimizer alone', 'no arrays: epoch, arch, optimizer'),
        ('numpy', 'numpy.*scalar'),
        ('object', 'Odd'),
        ('wrapped twice', 'with and without backbone'),
    ],
)
def test_published_files_that_do_not_fit_are_refused(how, says, tmp_path):
    f = tmp_path / 'faulty.pth.tar'
    torch.save(_spoil(written_by_moco(torchvision_net('resnet18'), 'resnet18', adam=True), how), f)
    encoder = Encoder('resnet18')
    before = weights_digest(encoder), encoder.statistics
    with pytest.raises(InputError, match=says) as e:
        load_pretrained(encoder, 'moco', weights=f)
    assert (
        'faulty.pth.tar' in str(e.value) and e.value.hint and (weights_digest(encoder), encoder.statistics) == before
    )  # nothing half loaded


def test_another_architecture_without_a_name_is_refused(tmp_path):
    c = written_by_moco(torchvision_net('resnet18'), 'resnet18')
    del c['arch']
    torch.save(c, tmp_path / 'm.pth.tar')
    for arch in ('resnet34', 'resnet50', 'densenet121', 'tf_efficientnet_lite0'):
        with pytest.raises(InputError, match='m.pth.tar'):
            load_pretrained(Encoder(arch), 'moco', weights=tmp_path / 'm.pth.tar')
    with pytest.raises(InputError, match="pretrain='moco'"):
        load_pretrained(Encoder('resnet18'), 'imagenet', weights=tmp_path / 'm.pth.tar')


@pytest.mark.parametrize('bad', [(0.5,), (0.5, 0.0), (0.5, -1), (float('nan'), 1.0), 'x', 3, (0.5, float('inf'))])
def test_statistics_are_checked(bad, tmp_path):
    torch.save(torchvision_net('resnet18').state_dict(), tmp_path / 'w.pth')
    with pytest.raises(InputError, match='statistics'):
        load_pretrained(Encoder('resnet18'), 'moco', weights=tmp_path / 'w.pth', statistics=bad)
    with pytest.raises(InputError, match='statistics'):
        load_pretrained(Encoder('resnet18'), statistics=(0.5, 0.5))


def test_the_normalisation_travels_with_the_weights(tmp_path):
    net = torchvision_net('resnet18')
    torch.save(written_by_moco(net, 'resnet18'), tmp_path / 'm.pth.tar')
    model = Classifier(Encoder('resnet18')).eval()
    load_pretrained(model.encoder, 'moco', weights=tmp_path / 'm.pth.tar')
    save_weights(model, tmp_path / 'tuned.safetensors')
    x = torch.rand(2, 1, 64, 64)
    fresh, encoder = Classifier(Encoder('resnet18')).eval(), Encoder('resnet18').eval()
    assert load_weights(fresh, tmp_path / 'tuned.safetensors')['statistics'] == list(MOCO_CXR)
    assert load_pretrained(encoder, str(tmp_path / 'tuned.safetensors'))['statistics'] == list(MOCO_CXR)
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x)) and torch.equal(model.encoder(x)[-1], encoder(x)[-1])
        fresh.encoder.statistics = input_statistics('resnet18')
        assert not torch.allclose(model(x), fresh(x), rtol=1e-2)
    save_weights(
        Classifier(Encoder('resnet18')), tmp_path / 'usual.safetensors'
    )  # an encoder that is used again forgets
    assert 'statistics' not in read_weights(tmp_path / 'usual.safetensors')[1]
    assert load_pretrained(encoder, 'moco', weights=tmp_path / 'usual.safetensors')['statistics'] == [0.449, 0.226]
    with pytest.raises(InputError, match='brings its own'):
        load_pretrained(encoder, 'moco', weights=tmp_path / 'usual.safetensors', statistics=(0.5, 0.5))


# --- checksums, model card, runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('place', [0, 0.01, 0.5, -1])
def test_a_flipped_bit_is_found(place, tmp_path):
    f = tmp_path / 'moco/weights.safetensors'
    sha = release_weights(Encoder('resnet18'), f.parent, 'random')
    for load in (
        lambda: load_pretrained(Encoder('resnet18'), str(f)),
        lambda: load_pretrained(Encoder('resnet18'), 'moco', weights=f.parent),
        lambda: run_weights('moco', 'resnet18', weights=f),
        lambda: load_weights(Encoder('resnet18'), f),
    ):
        load()
    b = bytearray(f.read_bytes())
    b[place if isinstance(place, int) else int(len(b) * place)] ^= 4
    f.write_bytes(b)
    for load in (
        lambda: load_pretrained(Encoder('resnet18'), str(f)),
        lambda: load_pretrained(Encoder('resnet18'), 'moco', weights=f.parent),
        lambda: run_weights('moco', 'resnet18', weights=f),
        lambda: load_weights(Encoder('resnet18'), f),
    ):
        with pytest.raises(InputError, match='altered') as e:
            load()
        assert sha[:12] in str(e.value) and 'weights.safetensors' in str(e.value) and e.value.hint


def test_a_flipped_bit_in_a_found_run_is_found(tmp_path):
    f = tmp_path / 'smoke/moco/a/weights.safetensors'
    release_weights(Encoder('resnet18'), f.parent, 'random')
    assert run_weights('moco', 'resnet18', runs=tmp_path) == f
    b = bytearray(f.read_bytes())
    b[-1] ^= 4
    f.write_bytes(b)
    with pytest.raises(InputError, match='altered'):
        run_weights('moco', 'resnet18', runs=tmp_path)


def test_which_checksums_count(tmp_path):
    import shutil
    import subprocess

    sha = release_weights(Encoder('resnet18'), tmp_path, 'random')
    f = tmp_path / 'weights.safetensors'
    if shutil.which('sha256sum'):
        subprocess.run(['sha256sum', '-c', 'weights.sha256'], cwd=tmp_path, check=True, capture_output=True)
    other = tmp_path / 'other.pth'
    other.write_bytes(b'x')
    assert verify_sha256(f) and not verify_sha256(other)  # names another file: says nothing about this one
    (tmp_path / 'other.pth.sha256').write_text(f'{"0" * 64}  other.pth\n')
    with pytest.raises(InputError, match='altered'):
        verify_sha256(other)
    (tmp_path / 'weights.sha256').write_text(f'{sha} *weights.safetensors\n')
    assert verify_sha256(f)  # binary mode
    for text in ('', f'{sha}  others.safetensors\n', sha, f'{sha[:-1]}  weights.safetensors\n'):
        (tmp_path / 'weights.sha256').write_text(text)
        with pytest.raises(InputError, match='no line for weights.safetensors'):
            verify_sha256(f)


def test_the_card_says_what_was_stated_and_nothing_else(tmp_path):
    model = Classifier(Encoder('resnet18', in_chans=3))
    model.encoder.statistics = MOCO_CXR
    card = dict(
        what='MoCo on radiographs',
        method='MoCo v2',
        settings=dict(queue=24576, temperature=0.2),
        corpus='CheXpert',
        n_used=191027,
        n_out=0,
        px=320,
        licence='CC BY 4.0',
        limits='Adults only.',
    )
    sha = release_weights(model, tmp_path, card, seed=4)
    text = (tmp_path / 'model_card.md').read_text()
    for part in (
        'MoCo on radiographs',
        'MoCo v2',
        'queue: 24,576',
        'temperature: 0.2',
        'CheXpert',
        '191,027',
        'excluded**: 0',
        'CC BY 4.0',
        'Not for clinical use.',
        'Adults only.',
        sha,
        '(x - 0.502)/0.085585',
        '3 channels',
        ': 320',
        'resnet18',
    ):
        assert part in text, part
    assert text.count('not stated') == 1 and 'Why they were excluded**: not stated' in text
    n = sum(p.numel() for p in model.encoder.parameters())
    assert f'{n:,}' in text and f'{n + 512 * 4 + 4:,}' in text and str(tmp_path) not in text
    assert read_weights(tmp_path / 'weights.safetensors')[1] == dict(arch='resnet18', seed=4, statistics=list(MOCO_CXR))
    line = next(l for l in text.splitlines() if l.startswith('load_pretrained')).replace(
        'path/to', str(tmp_path)
    )  # the line does what it says
    assert eval(line)['sha256'] == sha
    assert (
        model_card(Encoder('resnet18'), {}, 'x').count('not stated')
        == len(M.CARD)
        == model_card(Encoder('resnet18'), 'text', 'x').count('not stated') + 1
    )


def test_a_card_that_is_refused_leaves_nothing(tmp_path):
    for model, card, says in (
        (Encoder('resnet18'), dict(corpse='x'), 'corpse'),
        (torch.nn.Linear(2, 2), {}, 'no Encoder'),
    ):
        with pytest.raises(InputError, match=says):
            release_weights(model, tmp_path / 'out', card)
    assert not (tmp_path / 'out').exists()
    a = release_weights(Encoder('resnet18'), tmp_path / 'out', 'one')
    b = release_weights(Encoder('resnet18'), tmp_path / 'out', 'two')  # written again: all three agree
    assert (
        a != b
        and verify_sha256(tmp_path / 'out/weights.safetensors')
        and b in (tmp_path / 'out/model_card.md').read_text()
    )
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == [
        'model_card.md',
        'weights.safetensors',
        'weights.sha256',
    ]


def _run(folder, name, arch='resnet18', age=0, prov=None):
    import json
    import os

    f = folder / f'smoke/moco/{name}/weights.safetensors'
    save_weights(Encoder(arch), f)
    os.utime(f, (time.time() - age,) * 2)
    if prov is not None:
        (f.parent / 'provenance.json').write_text(prov if isinstance(prov, str) else json.dumps(prov))
    return f


def test_finished_runs_come_first(tmp_path):
    _run(tmp_path, 'older', age=200, prov=dict(fold=0))
    _run(tmp_path, 'finished', age=100, prov=dict(fold=1))
    _run(tmp_path, 'unfinished', age=1)
    _run(tmp_path, 'foreign', 'resnet34', prov=dict(fold=1))
    take = lambda **k: run_weights('moco', 'resnet18', runs=tmp_path, **k).parent.name
    assert (
        take() == 'finished' and take(ok=lambda p: True) == 'finished' and take(ok=lambda p: p['fold'] == 0) == 'older'
    )
    (tmp_path / 'smoke/moco/finished/provenance.json').unlink()
    (tmp_path / 'smoke/moco/older/provenance.json').unlink()
    assert take() == 'unfinished'  # better than none
    with pytest.raises(InputError, match='unfinished is not finished'):
        take(ok=lambda p: True)


def test_runs_that_are_refused_are_listed_with_the_reason(tmp_path):
    _run(tmp_path, 'a', prov=dict(fold=0))
    _run(tmp_path, 'b', prov={})
    _run(tmp_path, 'c', 'resnet34', prov={})
    _run(tmp_path, 'd', prov='{cut')
    _run(tmp_path, 'e')
    _run(tmp_path, 'f', prov=dict(fold=7))
    (tmp_path / 'smoke/moco/g').mkdir()
    (tmp_path / 'smoke/moco/g/weights.safetensors').write_bytes(b'cut short')
    ok = lambda p: 'it saw the test fold' if p['fold'] == 0 else False
    with pytest.raises(InputError) as e:
        run_weights('moco', 'resnet18', runs=tmp_path, ok=ok)
    for part in (
        'a is refused: it saw the test fold',
        "b does not state 'fold'",
        'c holds resnet34',
        'd has a provenance.json that cannot be read',
        'e is not finished',
        'f is refused by the rule',
        'g cannot be read',
        '03_moco.ipynb',
    ):
        assert part in str(e.value), part
    for i in range(9):
        _run(tmp_path, f'x{i}', 'resnet34')
    with pytest.raises(InputError, match='and 8 more'):
        run_weights('moco', 'resnet18', runs=tmp_path, ok=ok)


def test_the_rule_holds_for_runs_that_are_named_too(tmp_path):
    f = _run(tmp_path, 'a', prov=dict(fold=0))
    seen = []
    for bad in (lambda p: False, lambda p: f"it saw fold {p['fold']}"):
        for call in (
            lambda: load_pretrained(Encoder('resnet18'), 'moco', weights=f.parent, ok=bad),
            lambda: load_pretrained(Encoder('resnet18'), 'moco', weights=f, ok=bad),
            lambda: load_pretrained(Encoder('resnet18'), str(f), ok=bad),
        ):
            with pytest.raises(InputError, match='refused'):
                call()
    assert load_pretrained(Encoder('resnet18'), 'moco', weights=f, ok=lambda p: p == dict(fold=0))['pretrain'] == 'moco'
    torch.save(
        torchvision_net('resnet18').state_dict(), tmp_path / 'published.pth'
    )  # has no provenance: the rule is asked all the same
    load_pretrained(
        Encoder('resnet18'), 'moco', weights=tmp_path / 'published.pth', ok=lambda p: seen.append(p) or True
    )
    assert seen == [{}]
    with pytest.raises(InputError, match="does not state 'fold'"):
        load_pretrained(Encoder('resnet18'), 'moco', weights=tmp_path / 'published.pth', ok=lambda p: p['fold'] == 0)


# --- loss -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', [dict(power=1.0), dict(power=0.5), dict(power=0.0), dict(beta=0.9), dict(beta=0.9999)])
def test_class_weights_against_float64(how):
    r = np.random.default_rng(0)
    for _ in range(20):
        y = r.choice(5, r.integers(20, 400), p=r.dirichlet(np.ones(5))) - 1  # -1 = unlabelled
        w = class_weights(y, **how).numpy()
        n = [int((y == k).sum()) for k in range(4)]
        ref = [
            0.0 if m == 0 else m ** -how['power'] if 'power' in how else 1 / sum(how['beta'] ** i for i in range(m))
            for m in n
        ]  # 1/(1 + b + b^2 + ...)
        ref = np.array(ref) * sum(n) / sum(a * b for a, b in zip(ref, n))
        np.testing.assert_allclose(w, ref, rtol=1e-5)


def reference_loss(z, y, w, s):
    "Written from the definition, one image at a time, in float64."
    total, n = 0.0, 0
    for zi, yi in zip(z, y):
        if yi < 0:
            continue
        logp = zi - np.log(np.exp(zi - zi.max()).sum()) - zi.max()
        total += w[yi] * -((1 - s) * logp[yi] + s * logp.mean())
        n += 1
    return total / max(n, 1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_loss_and_gradient_against_float64(smoothing):
    r = np.random.default_rng(1)
    z, y, w = 3 * r.standard_normal((40, 4)), r.integers(-1, 4, 40), r.random(4) + 0.1
    t = torch.tensor(z, requires_grad=True)
    loss = BalancedCE(torch.tensor(w), smoothing)(t, torch.tensor(y))
    loss.backward()
    assert abs(loss.item() - reference_loss(z, y, w, smoothing)) < 1e-5
    h = 1e-5
    for i, j in [(i, j) for i in range(0, 40, 7) for j in range(4)]:
        d = np.zeros_like(z)
        d[i, j] = h
        assert (
            abs(
                float(t.grad[i, j])
                - (reference_loss(z + d, y, w, smoothing) - reference_loss(z - d, y, w, smoothing)) / (2 * h)
            )
            < 1e-6
        )


def test_both_losses_are_the_labelled_mean():
    "Single-image losses by PyTorch, averaged by hand; unlabelled images and absent weights included."
    z, y, w = torch.randn(30, 4, dtype=torch.float64), torch.randint(-1, 4, (30,)), torch.rand(4) + 0.1
    for loss, single in (
        (BalancedCE, lambda a, b: F.cross_entropy(a[None], b[None])),
        (BalancedBCE, lambda a, b: F.binary_cross_entropy_with_logits(a, F.one_hot(b, 4).double(), reduction='sum')),
    ):
        each = [(float(single(a, b)), float(w[b])) for a, b in zip(z, y) if b >= 0]
        assert (
            abs(float(loss(w)(z, y)) - np.mean([l * v for l, v in each])) < 1e-6
            and abs(float(loss()(z, y)) - np.mean([l for l, _ in each])) < 1e-6
        )


def test_small_batches_keep_the_balance():
    "The mean over batches is the loss of the whole; PyTorch's weighted mean is not."
    y = torch.tensor([1] * 60 + [3] * 4)
    z = torch.randn(64, 4, dtype=torch.float64)
    w = class_weights(y.numpy())
    order = torch.randperm(64)
    batches = [(z[i], y[i]) for i in order.split(8)]
    whole = float(classification_loss(z, y, w))
    assert abs(np.mean([float(classification_loss(a, b, w)) for a, b in batches]) - whole) < 1e-6
    torchs = lambda a, b: float(F.cross_entropy(a, b, weight=w.double()))
    assert abs(np.mean([torchs(a, b) for a, b in batches]) - torchs(z, y)) > 1e-3


def test_no_labels_no_loss():
    z = torch.randn(5, 4, requires_grad=True)
    loss = classification_loss(z, torch.full((5,), -1), torch.ones(4))
    loss.backward()
    assert loss.item() == 0 and float(z.grad.abs().sum()) == 0


def test_balancing_helps_the_rare_class_learn():
    "Two overlapping classes, 1 : 20. Unweighted, the rare one is never predicted; balanced, it is."
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.zeros(400), torch.ones(20)]).long()
    x = torch.randn(420, 1, generator=g) + y[:, None]
    recall = {}
    for power in (0.0, 1.0):
        lin = torch.nn.Linear(1, 2)
        opt = torch.optim.LBFGS(lin.parameters(), max_iter=100)
        loss = BalancedCE(class_weights(y, power, n_classes=2))

        def closure():
            opt.zero_grad()
            l = loss(lin(x), y)
            l.backward()
            return l

        opt.step(closure)
        recall[power] = float((lin(x).argmax(1) == 1)[y == 1].float().mean())
    assert recall[0.0] < 0.2 and recall[1.0] > 0.5


# --- cost and speed -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arch,parameters,macs',
    [('tf_efficientnet_lite0', 4.65e6, 407e6), ('resnet18', 11.69e6, 1.82e9), ('densenet121', 7.98e6, 2.87e9)],
)
def test_cost_agrees_with_published_numbers(arch, parameters, macs):
    cost = describe(timm.create_model(arch), 224, in_chans=3)
    assert abs(cost['n_params'] / parameters - 1) < 0.01 and abs(cost['macs'] / macs - 1) < 0.06


def test_describe_leaves_the_model_as_it_was():
    model = Classifier(Encoder()).train()
    before = weights_digest(model)
    assert describe(model, 64)['arch'] == 'tf_efficientnet_lite0'
    assert model.training and weights_digest(model) == before


def test_a_cpu_computes_in_float32_whatever_it_could(lite0):
    "The counter-test: bf16 can be asked for on any processor, and changes the numbers."
    model = lite0.eval()
    x = torch.rand(2, 1, 64, 64)
    assert default_precision('cpu') == default_precision('meta') == 'float32'
    with torch.no_grad():
        plain = model(x)[-1]
        with autocast_for('cpu'):
            same = model(x)[-1]
        with autocast_for('cpu', 'bf16'):
            other = model(x)[-1]
    assert same.dtype == torch.float32 and torch.equal(plain, same)
    assert other.dtype == torch.bfloat16 and 0 < float((other.float() - plain).abs().max()) < 0.1 * float(
        plain.abs().max()
    )


def test_channels_last_changes_nothing(lite0):
    import copy

    model = fastest(copy.deepcopy(lite0))
    x = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        assert all((a - b).abs().max() < 1e-4 * a.abs().max() for a, b in zip(lite0(x), model(x)))
    assert weights_digest(model) == weights_digest(lite0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_bf16_agrees_with_cpu(lite0):
    import copy

    model = fastest(copy.deepcopy(lite0), 'cuda')
    x = torch.rand(4, 1, 224, 224)
    with torch.no_grad():
        with autocast_for('cuda'):
            out = model(x.cuda())[-1]
        ref = lite0(x)[-1]
    assert (out.dtype == torch.bfloat16) == (default_precision('cuda') == 'bf16')
    assert torch.corrcoef(torch.stack([out.float().cpu().flatten(), ref.flatten()]))[0, 1] > 0.999


# --- the known reference on real radiographs ------------------------------------------------------------------------------------------


def out_of_fold_auc(features, y, groups, C=0.003, seed=0):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    p = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)),
        features,
        y,
        groups=groups,
        cv=StratifiedGroupKFold(5, shuffle=True, random_state=seed),
        method='predict_proba',
    )
    return np.mean([roc_auc_score(y == k, p[:, k]) for k in range(4)])


@pytest.mark.skipif(not REAL.exists(), reason='real radiographs are not on this machine (../shared/data/real_cxr)')
def test_frozen_imagenet_features_read_real_radiographs(lite0, raw, capsys):
    "250 NIH radiographs read for RSNA, four surrogate classes, 320 px, folds disjoint by patient."
    d = pd.read_csv(REAL / 'index.csv')
    d = d[(d.n_boxes >= 0) & d.surrogate4.notna()].reset_index(drop=True)
    assert len(d) == 250
    files = {f.stem: f for f in (REAL / 'images').rglob('*') if f.is_file()}

    def square(uid):
        im = cv2.imread(str(files[uid]), cv2.IMREAD_GRAYSCALE).astype(np.float32)
        return cv2.resize((im - im.min()) / (im.max() - im.min()), (320, 320), interpolation=cv2.INTER_AREA)

    x = torch.tensor(np.stack([square(u) for u in d.uid]))[:, None]
    model = fastest(Classifier(lite0).eval())
    w, b = raw['_conv_head.weight'], '_bn1'
    head, last = [], []
    with torch.no_grad():
        for part in x.split(2):  # small batches stay in the cache
            z = model.encoder(part)[-1]
            last.append(z.mean((2, 3)))
            head.append(
                F.relu6(
                    F.batch_norm(
                        F.conv2d(z, w),
                        raw[f'{b}.running_mean'],
                        raw[f'{b}.running_var'],
                        raw[f'{b}.weight'],
                        raw[f'{b}.bias'],
                        eps=1e-3,
                    )
                ).mean((2, 3))
            )
    y = d.surrogate4.map({c: i for i, c in enumerate(('negative', 'typical', 'indeterminate', 'atypical'))}).to_numpy()
    auc = {
        name: np.mean([out_of_fold_auc(f, y, d.group, seed=s) for s in range(3)])
        for name, f in {
            'last map (320)': torch.cat(last).numpy(),
            'conv_head (1280)': torch.cat(head).numpy(),
            'view alone': pd.get_dummies(d.view).to_numpy(float),
        }.items()
    }
    with capsys.disabled():
        print('\n' + ', '.join(f'{k} macro AUC {v:.3f}' for k, v in auc.items()))
    assert auc['last map (320)'] > 0.68 and auc['last map (320)'] > auc['view alone'] + 0.06


def test_a_full_disk_is_said_and_the_old_weights_stay(tmp_path, monkeypatch):
    f = tmp_path / 'weights.safetensors'
    save_weights(Encoder('resnet10t'), f)
    before = f.read_bytes()

    def full(self, data):
        raise OSError(errno.ENOSPC, 'No space left on device', str(self))

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(InputError, match='the disk is full'):
        save_weights(Encoder('resnet18'), f)
    assert f.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [f.name]
