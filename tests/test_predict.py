"Radiographs of one's own, read by a trained model: nothing of a header in what is written, bad files by name, photographs called unlike."

import json

import numpy as np
import pandas as pd
import pydicom
import pytest

from cxrpaper.data.folds import assign_folds
from cxrpaper.data.phantom import phantom
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
from cxrpaper.paper.commands import onnx, predict
from cxrpaper.paper.exchange import TOLERANCE, differences, export_onnx, portable, run_onnx
from cxrpaper.paper.predict import load_reading, on_grid, read_images
from cxrpaper.runs import InputError, Run, as_parameters, file_digest, keyed
from cxrpaper.schema import CLASSES, LOGITS
from cxrpaper.study import notebook_defaults
from cxrpaper.training.finetune import PROFILES, finetune, load_model
from cxrpaper.training.finetune import predict as forward
from cxrpaper.training.loop import Batches

PLANTED = ('Doe^Planted', 'ID-PLANTED-77', 'Planted Hospital', 'ACC-PLANTED')


SMALL = dict(arch='resnet10t', px=64, epochs=1, precision='float32', pretrain='none')


def train(folder, **small):
    "A run of one epoch on the phantom, its cohort, its store, and the rows that it has not seen."
    p = as_parameters(notebook_defaults('finetune') | PROFILES['smoke'] | SMALL | small)
    cohort = read_cohort(phantom('smoke'))
    store = build_store(cohort, p.px, workers=0)
    folds = assign_folds(cohort.images, n_folds=p.n_folds, seed=p.fold_seed)
    settings = keyed(p)
    run = Run(folder, settings, dict(cohort=cohort.digest), code='training.finetune')
    finetune(run, cohort, store, folds, p)
    return run.path, cohort, store, np.flatnonzero(folds == 0)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp('run') / 'run', multitask=True, decoder_width=16)


def test_nothing_of_a_header_is_in_the_sheet(trained, tmp_path, capsys):
    run, cohort, _, unseen = trained
    ds = pydicom.dcmread(cohort.root / cohort.images.path[unseen[0]])
    ds.PatientName, ds.PatientID, ds.InstitutionName, ds.AccessionNumber = PLANTED
    (tmp_path / 'Doe_Planted').mkdir()
    ds.save_as(tmp_path / 'Doe_Planted' / 'ID-PLANTED-77.dcm')
    predict([str(tmp_path / 'Doe_Planted'), '--run', str(run), '--out', str(tmp_path / 'out')])
    written = {f.name: f.read_bytes() for f in (tmp_path / 'out').iterdir()}
    assert set(written) == {'report.html', 'report.json'}
    said = b''.join(written.values()) + capsys.readouterr().out.split('the report:')[0].encode()
    for word in (*PLANTED, 'Doe_Planted'):
        assert word.encode() in (tmp_path / 'Doe_Planted' / 'ID-PLANTED-77.dcm').read_bytes() or word == 'Doe_Planted'
        assert word.encode() not in said
    assert 'Research use only' in written['report.html'].decode() and b'http' not in written['report.html']
    (found,) = json.loads(written['report.json'])['radiographs']
    assert abs(sum(found['probabilities'].values()) - 1) < 1e-3 and not found['unlike_the_training_images']


def test_a_bad_file_is_named_and_the_last_report_stays(trained, tmp_path):
    run, cohort, _, unseen = trained
    whole = (cohort.root / cohort.images.path[unseen[0]]).read_bytes()
    (tmp_path / 'good.dcm').write_bytes(whole)
    predict([str(tmp_path / 'good.dcm'), '--run', str(run), '--out', str(tmp_path / 'out')])
    before = (tmp_path / 'out' / 'report.json').read_bytes()
    (tmp_path / 'cut.dcm').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match='cut.dcm'):
        predict([str(tmp_path / 'cut.dcm'), '--run', str(run), '--out', str(tmp_path / 'out')])
    with pytest.raises(SystemExit, match='no-run'):
        predict([str(tmp_path / 'good.dcm'), '--run', str(tmp_path / 'no-run'), '--out', str(tmp_path / 'out')])
    assert (tmp_path / 'out' / 'report.json').read_bytes() == before


def predicted(r, run, ids):  # what the run's own predictions say of test images, scaled: (n,4) probabilities
    df = pd.read_csv(run / 'predictions.csv', dtype=dict(image=str)).set_index('image')
    z = r.scaling(df.loc[ids])[LOGITS].to_numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_the_radiographs_are_not_replaced_by_the_report(trained, tmp_path):
    run, cohort, _, unseen = trained
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'a.dcm').write_bytes((cohort.root / cohort.images.path[unseen[0]]).read_bytes())
    with pytest.raises(SystemExit, match='holds a.dcm, which would be deleted'):
        predict([str(tmp_path / 'mine'), '--run', str(run), '--out', str(tmp_path / 'mine')])
    assert [f.name for f in (tmp_path / 'mine').iterdir()] == ['a.dcm']


def test_what_it_says_is_what_the_run_predicted(trained):
    "The same radiographs by this door and by the training's own predictions; noise and a photograph's gradient are unlike."
    run, cohort, store, unseen = trained
    r = load_reading(run)
    images = np.stack([store.images[i] for i in unseen[:6]])
    cases = read_images(r, images)
    assert np.allclose([c['p'] for c in cases], predicted(r, run, cohort.images.image[unseen[:6]]), atol=1e-4)
    assert all(c['mask'].shape == (64, 64) and c['cam'].shape == (64, 64) for c in cases)
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    slope = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8), (1, 64, 64))
    assert all(c['unlike'] for c in read_images(r, np.concatenate([noise, slope])))


def test_a_run_with_one_sigmoid_a_class_says_what_it_predicted(tmp_path):
    "`loss: bce`: by the command, of a file, the probabilities that its stored test predictions give; a softmax of its plain logits would be others."
    run, cohort, store, unseen = train(tmp_path / 'run', loss='bce')
    file = cohort.root / cohort.images.path[unseen[0]]
    predict([str(file), '--run', str(run), '--out', str(tmp_path / 'out')])
    (found,) = json.loads((tmp_path / 'out' / 'report.json').read_text())['radiographs']
    said, r = [found['probabilities'][c] for c in CLASSES], load_reading(run)
    assert np.allclose(said, predicted(r, run, cohort.images.image[unseen[:1]])[0], atol=1e-4)
    plain = forward(r.model, Batches(store.images, unseen[:1], np.full(len(store.images), -1), 1))
    z = r.scaling(pd.DataFrame(plain, columns=LOGITS))[LOGITS].to_numpy()[0]
    assert not np.allclose(said, np.exp(z) / np.exp(z).sum(), atol=1e-3)


def test_the_onnx_file_is_the_same_model(trained, tmp_path):
    "In ONNX Runtime: the run's own predictions, for any number of images; weights that changed since are another model."
    import onnx as onnx_library
    import torch

    run, cohort, store, unseen = trained
    assert max(export_onnx(run, tmp_path / 'model.onnx').values()) < TOLERANCE
    with pytest.raises(SystemExit, match='cxr_onnx: .*no-run'):
        onnx(['--run', str(tmp_path / 'no-run'), '--out', str(tmp_path / 'other.onnx')])
    assert [f.name for f in tmp_path.iterdir()] == ['model.onnx']
    images = np.stack([store.images[i] for i in unseen]).astype(np.float32)[:, None] / 255
    found = run_onnx(tmp_path / 'model.onnx', images)
    df = pd.read_csv(run / 'predictions.csv', dtype=dict(image=str)).set_index('image')
    assert np.allclose(found['logits'], df.loc[cohort.images.image[unseen], LOGITS], atol=TOLERANCE)
    assert np.allclose(found['probabilities'].sum(1), 1, atol=1e-5) and found['mask'].shape == (len(unseen), 64, 64)
    proto = onnx_library.load(tmp_path / 'model.onnx')
    said = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(said['classes']) == list(CLASSES) and 'Research use only' in said['notice']
    assert said['weights_sha256'] == file_digest(run / 'weights.safetensors')
    model, p = load_model(run)
    with torch.no_grad():
        model.head.bias[0] += 0.1
    assert differences(proto, portable(model, lambda z: z, [1.0] * 4, [0.0] * 4), images)['logits'] > TOLERANCE


def test_an_ankle_is_unlike_the_training_images(trained):
    "A radiograph of pydicom's that is none of a chest; phantoms that the model has not seen are what it knows."
    from pydicom.data import get_testdata_file

    run, _, store, unseen = trained
    r = load_reading(run)
    (ankle,) = read_images(r, on_grid(get_testdata_file('RG3_UNCR.dcm'), 64)[None])
    assert ankle['unlike'] and ankle['distance'] > 2 * r.far
    known = read_images(r, np.stack([store.images[i] for i in unseen]))
    assert np.mean([c['unlike'] for c in known]) <= 0.25


def test_another_corpus_is_refused(trained):
    run, *_ = trained
    with pytest.raises(InputError, match='another corpus'):
        load_reading(run, str(make_other()))


def make_other():
    from cxrpaper.data.phantom import PhantomConfig, write_phantom

    return write_phantom(PhantomConfig(n_patients=12, px=64, seed=5), workers=1)
