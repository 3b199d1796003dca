"Damaged inputs of every kind: each is read, or refused with an error that names what is wrong; nothing else, and nothing is executed."

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dicom import chest, make

from cxrpaper.data.cohort import load_cohort, save_cohort
from cxrpaper.data.dicom import DicomError, read_radiograph, uid
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store, open_store
from cxrpaper.runs import InputError, choice, flag, integer, number, optional, parameters, project_root, text
from cxrpaper.study import read_study
from cxrpaper.training.loop import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=5
)  # where (a share of the length), how many bytes go, what comes


def edited(content: bytes, edits) -> bytes:
    "The content with some bytes exchanged."
    for where, gone, new in edits:
        at = int(where * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "One good file of each kind."
    root = tmp_path_factory.mktemp('good')
    gray = chest(48)
    out = {}
    for s in (uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEG2000Lossless):
        name = f'{str(s).rsplit(".", 2)[-1]}-{len(out)}.dcm'
        out[name] = make(root / name, gray, s, WindowCenter=500, WindowWidth=800, PixelPaddingValue=0)
    for ending in ('png', 'jpg'):
        out[ending] = root / f'a.{ending}'
        cv2.imwrite(str(out[ending]), (gray // 256).astype(np.uint8) if ending == 'jpg' else gray)
    return {k: f.read_bytes() for k, f in out.items()}


@fuzz
@given(data=st.data())
def test_radiographs(files, tmp_path, data):
    content = files[data.draw(st.sampled_from(sorted(files)))]
    file = tmp_path / 'x'
    file.write_bytes(edited(content, data.draw(EDITS)))
    try:
        gray = read_radiograph(file)
    except DicomError as e:
        assert e.path == file and e.hint
    else:
        assert (
            gray.ndim == 2
            and gray.dtype == np.float32
            and np.isfinite(gray).all()
            and 0 <= gray.min() < gray.max() <= 1
        )


TABLE = (
    'image,patient,label,boxes,view,sex,age,annotated,height,width\n'
    "a,p1,typical,\"[{'x': 1, 'y': 2, 'width': 10, 'height': 10}]\",AP,F,50,1,48,64\n"
    'b,p2,0,,PA,Male,,no,48,64\nc,p3,,,,,,,,\n'
).encode()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    (root / 'images').mkdir()
    for name in 'abc':
        cv2.imwrite(
            str(root / f'images/{name}.png'), np.random.default_rng(0).integers(0, 255, (48, 64)).astype(np.uint8)
        )
    return root


@fuzz
@given(edits=EDITS)
def test_tables(pictures, edits):
    file = pictures / 'table.csv'
    file.write_bytes(edited(TABLE, edits))
    try:
        t = read_cohort(file, pseudonyms=False).images
    except InputError as e:
        assert e.problem and e.hint
    else:
        assert t.label.isin(range(-1, 4)).all() and t.image.is_unique and (t.patient != '').all()


@fuzz
@given(data=st.data())
def test_studies(tmp_path, data):
    names = [p for p in sorted((project_root() / 'config').glob('*.yaml')) if p.stem not in ('plan',)]
    file = tmp_path / 'study.yaml'
    file.write_bytes(edited(data.draw(st.sampled_from(names)).read_bytes(), data.draw(EDITS)))
    try:
        study = read_study(file)
    except InputError as e:
        assert e.problem and e.hint
    else:
        assert not set('$`;|&<>\'" ') & set(study['name']) and '..' not in study['name']


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


@fuzz
@given(given_=st.dictionaries(st.sampled_from(['epochs', 'lr', 'flip', 'arch', 'out', 'epoch']), VALUES))
def test_parameters(given_):
    rules = dict(epochs=integer(1, 9), lr=number(0, 1), flip=flag(), arch=choice('a', 'b'), out=optional(text()))
    start = dict(epochs=1, lr=0.1, flip=True, arch='a', out=None)
    try:
        p = parameters(start | given_ | dict(__annotations__={}), **rules)
    except InputError as e:
        assert e.hint
    else:
        assert 1 <= p.epochs <= 9 and 0 <= p.lr <= 1 and p.flip in (True, False) and p.arch in ('a', 'b')


@pytest.fixture(scope='module')
def built(pictures, tmp_path_factory):
    "A store, a saved cohort and a checkpoint."
    root = tmp_path_factory.mktemp('built')
    (pictures / 'table.csv').write_bytes(TABLE)
    cohort = read_cohort(pictures / 'table.csv', pseudonyms=False)
    build_store(cohort, 32, root / 'store', workers=0)
    save_cohort(cohort, root / 'cohort')
    save_checkpoint(root / 'checkpoint.pt', dict(epoch=3, model=dict(w=torch.arange(9.0))))
    return root


@fuzz
@given(data=st.data())
def test_what_was_written_is_read_whole_or_refused(built, data):
    kinds = {
        'store/store.json': lambda: open_store(built / 'store'),
        'store/index.csv': lambda: open_store(built / 'store'),
        'cohort/cohort.json': lambda: load_cohort(built / 'cohort'),
        'cohort/cohort.csv': lambda: load_cohort(built / 'cohort'),
        'checkpoint.pt': lambda: load_checkpoint(built / 'checkpoint.pt'),
    }
    name = data.draw(st.sampled_from(sorted(kinds)))
    file, edits = built / name, data.draw(EDITS)
    good = file.read_bytes()
    try:
        file.write_bytes(edited(good, edits))
        kinds[name]()
    except InputError as e:
        assert e.problem and e.hint
    finally:
        file.write_bytes(good)
    assert kinds[name]() is not None


def test_the_edits_do_damage():
    "The counter-test: what is compared above is not always the same file."
    content = Path(__file__).read_bytes()
    assert edited(content, [(0.5, 3, b'x')]) != content and len(edited(content, [(0.0, 12, b'')])) == len(content) - 12
    assert json.loads(edited(b'{"a": 1}', [(0.75, 1, b'2')])) == dict(a=2)
