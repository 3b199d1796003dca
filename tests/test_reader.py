"The reading room: what is sent, what is drawn, what stays at home, and one real JupyterLab."

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import yaml
from pydicom.pixels.processing import apply_windowing
from test_parameters import checks_of

from cxrpaper.data.cohort import Cohort, save_cohort
from cxrpaper.data.dicom import read_radiograph
from cxrpaper.data.folds import assign_folds
from cxrpaper.data.phantom import phantom
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
from cxrpaper.models.nets import Classifier, Encoder
from cxrpaper.paper.room import (
    ANNOTATED,
    BY_LOSS,
    DRAWN,
    ERRORS,
    EVIDENCE,
    ROOM_JS,
    Room,
    RoomModel,
    case_table,
    choices,
    choose,
    open_study,
    overlay,
    overlay_names,
    shown,
)
from cxrpaper.questions.subgroups import BY
from cxrpaper.runs import InputError, Run, as_parameters, keyed, resolve, rng
from cxrpaper.schema import CLASSES
from cxrpaper.study import notebook_defaults, read_study, row_runs
from cxrpaper.training.finetune import PROFILES, finetune, prediction_rows

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NODE = shutil.which('node')
CHROMIUM = shutil.which('chromium') or '/usr/bin/chromium'


def guesses(images, folds, title, seed):  # a model that guesses: what is shown does not depend on how good it is
    frames = []
    for k in range(max(folds) + 1):
        rows = {s: np.flatnonzero(folds == f) for s, f in (('val', (k + 1) % (max(folds) + 1)), ('test', k))}
        z = rng(seed, k).normal(size=(len(images), 4)) + 2 * np.eye(4)[images.label]
        frames.append(pd.concat([prediction_rows(images, r, z[r], s, k) for s, r in rows.items()], ignore_index=True))
    net = Classifier(Encoder('resnet10t'), 4).eval()
    return RoomModel(title, frames, lambda fold: net)


@pytest.fixture(scope='module')
def corpus():
    cohort = read_cohort(phantom('smoke'))
    return cohort, build_store(cohort, 64, workers=1), assign_folds(cohort.images, n_folds=3)


@pytest.fixture(scope='module')
def models(corpus):
    return [guesses(corpus[0].images, corpus[2], t, k) for k, t in enumerate(('one', 'two'))]


@pytest.fixture
def room(corpus, models, tmp_path):
    near = np.tile(np.arange(1, 4), (len(corpus[1]), 1)), np.full((len(corpus[1]), 3), 0.5)
    return Room(*corpus[:2], models, near, out=tmp_path)


def test_the_bytes_sent_are_the_readers_pixels(corpus, models, room):
    cohort, store, _ = corpus
    small = Room(cohort, store, models, original=False)
    for at in (0, 7, 100, 298):
        room.at = small.at = at
        room.show(), small.show()
        i = room.case['case'] - 1
        x = np.rint(read_radiograph(cohort.root / cohort.images.path[i]).astype(float) * 65535)
        assert room.bits == 16 and (np.frombuffer(room.pixels, '<u2').reshape(room.shape) == x).all()
        assert small.bits == 8 and (np.frombuffer(small.pixels, np.uint8).reshape(small.shape) == store.images[i]).all()
        boxes = np.array(room.boxes).reshape(-1, 4) * [*[cohort.images.width[i], cohort.images.height[i]] * 2]
        assert np.allclose(boxes, np.reshape(cohort.images.boxes[i], (-1, 4)))
    thumbs = np.frombuffer(room.thumbs, np.uint8).reshape(3, 64, 64)
    assert (thumbs == store.images[1:4]).all()


def test_nothing_is_sent_before_somebody_looks(room):
    assert (room.case, room.pixels, room.thumbs) == ({}, b'', b'')
    room.hear('here')
    assert room.case['case'] == 1 and len(room.pixels)


WINDOWS = [(128, 256), (100, 1), (90.5, 37), (200, 400), (0, 50), (32768, 65536), (20000, 12345.6), (65535, 2)]


@pytest.mark.parametrize('center,width', WINDOWS)
def test_a_window_is_that_of_the_standard(center, width):
    ds = pydicom.Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.BitsStored, ds.PixelRepresentation = center, width, 16, 0
    ds.PhotometricInterpretation = 'MONOCHROME2'
    values = np.arange(2**16, dtype=np.uint16)
    theirs = apply_windowing(values, ds) / 65535 * 255
    ours = shown(values, center, width)
    assert (np.abs(ours - theirs) <= 0.5 + 1e-6).all() and len(np.unique(ours)) > 1


def in_node(tmp_path, script, code=ROOM_JS):  # what it prints as JSON
    (tmp_path / 'room.mjs').write_text(code)
    (tmp_path / 'ask.mjs').write_text("import * as room from './room.mjs';\n" + script)
    return json.loads(subprocess.run([NODE, tmp_path / 'ask.mjs'], capture_output=True, text=True, check=True).stdout)


needs_node = pytest.mark.skipif(NODE is None, reason='node is not installed: apt-get install nodejs')


@needs_node
def test_javascript_windows_as_python_does(tmp_path):
    script = f"""
    const out = {json.dumps(WINDOWS)}.map(([c, w]) => {{
      const bits = 16, values = new Uint16Array(2 ** bits).map((_, i) => i);
      return Array.from(room.windowed(values, bits, c, w)).filter((_, i) => i % 4 === 0);
    }});
    console.log(JSON.stringify(out));"""
    ours = [shown(np.arange(2**16, dtype=np.uint16), c, w).tolist() for c, w in WINDOWS]
    assert in_node(tmp_path, script) == ours
    without_half = ROOM_JS.replace('center - 0.5, w = width - 1', 'center, w = width')
    assert without_half != ROOM_JS and in_node(tmp_path, script, without_half) != ours


@needs_node
def test_javascript_reads_bytes_zooms_and_places(tmp_path):
    got = in_node(
        tmp_path,
        """
        const bytes = new Uint8Array([9, 1, 0, 255, 2]);  // as a message may hold it: from an odd place on
        const values = Array.from(room.unsigned(new DataView(bytes.buffer, 1, 4), 16));
        const view = { zoom: 2, x: 0.1, y: -0.2 }, at = (v) => room.place(400, 300, 1.5, v);
        const spot = (v) => { const [x, y, w, h] = at(v); return [(0.3 * 400 + 200 - x) / w, (0.2 * 300 + 150 - y) / h]; };
        console.log(JSON.stringify({ values, one: at({ zoom: 1, x: 0, y: 0 }), before: spot(view),
          after: spot(room.zoomed(view, 1.7, 0.3, 0.2)), out: room.zoomed(view, 0.01, 0.3, 0.2) }));""",
    )
    assert got['values'] == [1, 767]
    assert np.allclose(got['one'], [0, 16.667, 400, 266.667], atol=1e-2)
    assert np.allclose(got['before'], got['after'])  # what lies under the pointer stays there
    assert got['out'] == dict(zoom=1, x=0, y=0)


def test_filters_are_pandas_queries(corpus, models, room):
    t = room.table
    queries = {
        'first wrong': 'not right_0',
        'both wrong': 'not right_0 and not right_1',
        'only the second right': 'not right_0 and right_1',
    }
    for error, query in queries.items():
        room.picked = dict(error=error)
        assert list(room.found) == list(t.query(query).index) and 0 < len(room.found) < len(t)
    room.picked = dict(label='typical', fold='1', subgroup='sex: F')
    assert list(room.found) == list(t.query("label == 'typical' and fold == 1 and sex == 'F'").index)
    room.picked = dict(doubt='label in doubt')
    assert list(room.found) == list(t.query('doubt').index) and 0 < len(room.found) < len(t)
    room.picked = dict(order=BY_LOSS)
    assert list(t.p_label_0[room.found]) == sorted(t.p_label_0)
    for k, values in choices(t).items():  # every value that is offered leads somewhere
        assert all(len(choose(t, **{k: v})) > 0 for v in values)
    p = t[[f'p_0_{c}' for c in CLASSES]].to_numpy()
    assert np.allclose(p.sum(1), 1) and (t.predicted_0 == np.array(CLASSES)[p.argmax(1)]).all()
    assert (t.right_0 == (t.predicted_0 == t.label)).all() and set(ERRORS) < set(choices(t)['error'])
    one = case_table(corpus[0].images, models[:1])
    assert choices(one)['error'] == ['all', 'first wrong', 'first right']


def test_an_empty_list_and_its_end(room):
    room.show()
    room.at = -1
    assert room.at == len(room.table) - 1 and room.case['case'] == room.table.case.iloc[-1]
    room.found = room.found[:0]
    room.show()
    assert room.case['title'] == 'no case' and room.pixels == b'' and room.save() is None
    room.go = 5
    assert room.case['case'] == 5 and room.picked == {}


def test_what_cannot_be_is_refused(corpus, models, room):
    for bad, what in (
        (dict(label='flu'), 'label'),
        (dict(colour='red'), 'colour'),
        (dict(subgroup='sex: X'), 'sex: F'),
    ):
        with pytest.raises(InputError, match=what):
            choose(room.table, **bad)
        before = list(room.found)
        room.picked = bad  # from a browser: said, and nothing else changes
        assert what in room.status and list(room.found) == before
    with pytest.raises(InputError, match='overlay'):
        overlay(corpus[1], models, 0, 0, 'saliency: three')
    room.show()
    room.over = 'saliency: three'
    assert 'three' in room.status and room.layer == b''
    other = guesses(corpus[0].images.assign(image=lambda t: t.image + 'x'), corpus[2], 'strange', 0)
    with pytest.raises(InputError, match='not in the cohort'):
        case_table(corpus[0].images, [other])
    error = checks_of('09_reader.ipynb')(dict(first='resnet10t-none'))
    assert isinstance(error, InputError) and error.field == 'parameter study'


def traces(room, path):  # all that leaves the kernel
    state = {k: v for k, v in room.get_state().items() if not isinstance(v, bytes | memoryview)}
    binary = b''.join(bytes(v) for v in room.get_state().values() if isinstance(v, bytes | memoryview))
    files = ''.join(f.read_text() + f.name for f in path.rglob('*.html'))
    return json.dumps(state, default=str) + files + room.gallery() + binary.decode('latin-1')


def test_no_identifier_reaches_the_widget(corpus, tmp_path):
    cohort, store, folds = corpus
    mark = {c: c + '-of-Jane-Roe-' for c in ('image', 'study', 'patient', 'group')}
    images = cohort.images.assign(**{c: m + cohort.images[c] for c, m in mark.items()})
    planted = Cohort(images, cohort.root, cohort.name)
    models = [guesses(images, folds, t, k) for k, t in enumerate(('one', 'two'))]
    near = np.zeros((len(store), 2), int), np.ones((len(store), 2))
    room = Room(planted, store, models, near, out=tmp_path)
    said = []
    for at in range(0, len(room.table), 150):
        room.at = at
        room.show()
        room.save()
        said.append(traces(room, tmp_path))
    room.over, room.picked = ANNOTATED, dict(label='flu')
    said.append(traces(room, tmp_path))
    assert len(list(tmp_path.glob('case-*.html'))) == 2
    assert not [v for v in said if 'Jane-Roe' in v]
    own = {i for c in mark for i in cohort.images[c]}
    assert not [i for i in own if any(i in v for v in said)]
    room.case = dict(room.case, facts=images.patient[0])
    assert 'Jane-Roe' in traces(room, tmp_path)  # the search finds what is there


def test_a_sheet_says_what_is_shown(corpus, tmp_path):
    cohort, store, folds = corpus
    models = [guesses(cohort.images, folds, '<script>alert(1)</script>', 0)]
    room = Room(cohort, store, models, out=tmp_path)
    room.go = 12
    page = room.save().read_text()
    r = room.table.set_index('case').loc[12]
    assert f'Case 12: {r.label}' in page and 'Research use only' in page and 'data:image/png;base64,' in page
    assert all(f'<td>{r[f"p_0_{c}"]:.2f}</td>' in page for c in CLASSES)
    assert '<script>' not in page + room.gallery() and 'http' not in page
    assert room.status.endswith('case-00012.html') and [f.name for f in tmp_path.iterdir()] == ['case-00012.html']


class Counting:
    "Images of a store that count how many are read."

    def __init__(self, images):
        self.images, self.read = images, 0

    def __getitem__(self, i):
        self.read += 1
        return self.images[i]


def large(corpus, n, tmp_path):  # a room of n cases, and its counter
    cohort, store, _ = corpus
    of = np.arange(n) % len(store)
    images = cohort.images.iloc[of].reset_index(drop=True)
    images = images.assign(**{c: [f'{c}{i:06}' for i in range(n)] for c in ('image', 'study', 'patient', 'group')})
    many = build_store(cohort, 64, workers=1)
    many.images, many.masks = Counting(store.images[of]), store.masks[of]
    many.index = store.index.iloc[of].reset_index(drop=True).assign(image=images.image)
    models = [guesses(images, np.arange(n) % 3, t, k) for k, t in enumerate(('one', 'two'))]
    return Room(Cohort(images, cohort.root, 'large'), many, models, original=False, out=tmp_path), many.images


def test_only_the_case_shown_is_read(corpus, tmp_path):
    room, images = large(corpus, 5000, tmp_path)
    assert images.read == 0
    for k, at in enumerate((0, 17, 4999), 1):
        room.at = at
        room.show() if at == 0 else None
        assert images.read == k and len(room.pixels) == 64 * 64
    room.picked = dict(error='both wrong', subgroup='view: AP')
    assert images.read == 4 and len(room.found) > 10


def quickest(f, n=7):
    out = []
    for k in range(n):
        t = time.perf_counter()
        f(k)
        out.append(time.perf_counter() - t)
    return min(out)


@pytest.mark.serial
def test_five_thousand_cases_take_no_longer_than_fifty(corpus, tmp_path):
    rooms = [large(corpus, n, tmp_path)[0] for n in (60, 5000)]
    few, many = (quickest(lambda k, r=r: setattr(r, 'at', k + 1)) for r in rooms)
    assert many < 4 * few, f'{1000 * few:.1f} ms a case of 60, {1000 * many:.1f} ms of 5,000'
    picked = [dict(error='both wrong', label=c) for c in CLASSES * 2]
    few, many = (quickest(lambda k, r=r: setattr(r, 'picked', picked[k])) for r in rooms)
    assert many < 10 * few, f'{1000 * few:.1f} ms a filter of 60 cases, {1000 * many:.1f} ms of 5,000'


@pytest.fixture(scope='module')
def study(tmp_path_factory, corpus):
    "A finished study of two rows on two folds: logistic regression, and one epoch of a multi-task model."
    cohort, store, _ = corpus
    name = f'room-{uuid.uuid4().hex[:8]}'
    s = yaml.safe_load((ROOT / 'config' / 'smoke.yaml').read_text())
    base = dict(arch='tf_efficientnet_lite0', pretrain='none')
    rows = [base | dict(freeze=True, head='logistic'), base | dict(multitask=True)]
    s |= dict(name=name, folds=[0, 1], n_folds=3, finetune={}, table2=rows[:1], table3=[], table4=[], table6=None)
    s |= dict(pretraining=None, readiness=dict(rows=rows, splits=[], external=None))
    (file := tmp_path_factory.mktemp('study') / 'study.yaml').write_text(yaml.safe_dump(s, sort_keys=False))
    checked = read_study(file)
    folds = assign_folds(cohort.images, n_folds=3)
    try:
        save_cohort(cohort, f'runs/{name}/cohort', fold=folds)
        for row in rows:
            for path, given in row_runs(checked, row).items():
                given = PROFILES['smoke'] | given | dict(epochs=1)
                p = as_parameters(notebook_defaults('finetune') | given)
                settings = keyed(p)
                inputs = dict(cohort=cohort.digest, store=store.pixels_sha256)
                finetune(Run(path, settings, inputs, code='training.finetune'), cohort, store, folds, p)
        yield file
    finally:
        shutil.rmtree(resolve(f'runs/{name}'), ignore_errors=True)


@pytest.mark.long
def test_a_finished_study_is_read(study, corpus, tmp_path):
    cohort, store, models = open_study(study)
    assert cohort.digest == corpus[0].digest and [len(m.frames) for m in models] == [2, 2]
    room = Room(cohort, store, models, out=tmp_path)
    assert set(room.table.fold) == {0, 1} and overlay_names(models)[-1] == DRAWN + models[1].title
    for name in overlay_names(models)[2:]:
        x = overlay(store, models, 0, 0, name)
        assert x.shape == (64, 64) and (np.ptp(x) > 0 or name.startswith(EVIDENCE))
    saved = pd.read_csv(resolve(models[0].frames[0].attrs['run']) / 'predictions.csv', dtype=dict(image=str))
    saved = saved[saved.split == 'test'].set_index('image')
    t = room.table[room.table.fold == 0]
    z = saved.loc[cohort.images.image[t.case - 1], [f'logit_{k}' for k in range(4)]].to_numpy()
    assert (t.predicted_0 == np.array(CLASSES)[z.argmax(1)]).all() and set(BY) <= set(t)
    swapped = open_study(study, 'tf_efficientnet_lite0-none-multitask')[2]
    assert swapped[0].title == 'tf_efficientnet_lite0, none, multitask'
    with pytest.raises(InputError, match='the rows are'):
        open_study(study, 'resnet10t-none')
    provenance = resolve(models[1].frames[1].attrs['run']) / 'provenance.json'
    provenance.rename(provenance.with_suffix('.gone'))
    try:
        with pytest.raises(InputError, match='not a finished run'):
            open_study(study)
    finally:
        provenance.with_suffix('.gone').rename(provenance)


FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
FLAGS += ' --disable-component-update --disable-sync'


@pytest.fixture
def lab(tmp_path):  # JupyterLab on a copy of the page: it may save what it likes
    (tmp_path / 'nbs').mkdir()
    shutil.copy(ROOT / 'nbs' / '09_reader.ipynb', tmp_path / 'nbs')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    options = ['--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}']
    options += ['--IdentityProvider.token=t', f'--ServerApp.root_dir={tmp_path}', '--LabApp.expose_app_in_browser=True']
    own = dict(
        JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / 'workspaces'), JUPYTERLAB_SETTINGS_DIR=str(tmp_path / 'settings')
    )
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p = subprocess.Popen([BIN / 'jupyter', 'lab', *options], env=os.environ | own, **quiet)
    try:
        for _ in range(240):
            with socket.socket() as s:
                if s.connect_ex(('127.0.0.1', port)) == 0:
                    break
            assert p.poll() is None
            time.sleep(0.5)
        yield f'http://127.0.0.1:{port}/lab/tree/nbs/09_reader.ipynb?token=t', tmp_path
    finally:
        p.terminate()
        try:
            p.wait(60)
        except subprocess.TimeoutExpired:
            p.kill()


DRAWN_GRAYS = """() => {
  const c = document.querySelector('.cxr-room canvas.main'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  return new Set(d.filter((_, i) => i % 4 === 0)).size;
}"""


@pytest.mark.long
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason='chromium is not installed: apt-get install chromium')
def test_in_a_real_jupyterlab(lab):
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    address, folder = lab
    with sync.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport=dict(width=1400, height=1300))
        errors, elsewhere = [], []
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('request', lambda r: elsewhere.append(r.url) if '127.0.0.1' not in r.url[:20] else None)
        page.goto(address, timeout=120_000)
        page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
        gallery = page.locator('.jp-Notebook details[open] img')
        sync.expect(gallery).to_have_count(8, timeout=60_000)  # before any kernel works
        run_all = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
        sync.expect(page.get_by_text('| Idle')).to_be_visible(timeout=120_000)  # else it asks which kernel
        page.evaluate(f'{run_all}; 0')
        sync.expect(page.locator('.cxr-room h3')).to_contain_text('Case 1: atypical', timeout=180_000)
        sync.expect(page.locator('.jp-Notebook details[open]')).to_have_count(0)
        assert page.evaluate(DRAWN_GRAYS) > 20

        canvas, says = page.locator('.cxr-room canvas.main'), page.locator('.cxr-room output')
        canvas.scroll_into_view_if_needed()
        b, before = canvas.bounding_box(), says.inner_text()
        page.mouse.move(b['x'] + 50, b['y'] + 50)
        page.mouse.down()
        page.mouse.move(b['x'] + 90, b['y'] + 20, steps=4)
        page.mouse.up()
        sync.expect(says).not_to_have_text(before)

        cells = page.locator('.jp-Notebook .jp-Cell').count()
        page.keyboard.press('ArrowRight')
        sync.expect(page.locator('.cxr-room h3')).to_contain_text('Case 2')
        for key in 'boi':  # of which `b` would insert a cell, if JupyterLab heard it
            page.keyboard.press(key)
        sync.expect(page.get_by_role('combobox', name='overlay', exact=True)).to_have_value(ANNOTATED)
        assert page.locator('.jp-Notebook .jp-Cell').count() == cells
        page.mouse.wheel(0, -400)
        sync.expect(says).to_contain_text('zoom 2.2')
        page.get_by_role('combobox', name='label', exact=True).select_option('typical')
        sync.expect(page.locator('.cxr-room h3')).to_contain_text('typical')
        page.locator('.cxr-room .near button').first.click()
        page.set_viewport_size(dict(width=760, height=1000))
        fits = "() => { const r = document.querySelector('.cxr-room'); return r.scrollWidth <= r.clientWidth + 1; }"
        assert page.wait_for_function(fits)
        browser.close()
    assert not errors and not [u for u in elsewhere if not u.startswith(('data:', 'blob:'))]
