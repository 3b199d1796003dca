"The whole graph, small: every table and figure from DICOM files; unchanged work is skipped; a killed study ends with the same bytes."

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from conftest import warmed

from cxrpaper.jobs import is_demo
from cxrpaper.questions.subject import ANSWERS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SINGLE = dict(arch='resnet10t', pretrain='none')
STUDY = dict(
    name='smoke',
    profile='smoke',
    phantom=None,
    data_root='data/tiny',
    adapter='siim',
    figures='figures',
    px=64,
    n_folds=3,
    folds=[0, 1],
    seeds=[0],
    threads=1,
    gpus=0,
    finetune=dict(epochs=2, batch_size=8),
    table2=[SINGLE],
    table3=[SINGLE, SINGLE | dict(multitask=True)],
    pretraining=dict(phantom=dict(n_patients=40, px=96, seed=4), data_root=None, adapter='siim'),
    moco=dict(epochs=1, pretrain='none', batch_size=8, queue=32),
    inpainting=dict(epochs=1, pretrain='none', batch_size=8),
    table4=[SINGLE, SINGLE | dict(pretrain='moco')],
    table6=dict(rows=[SINGLE | dict(pretrain='inpainting', freeze=True)], fractions=[0.5, 1.0], draws=[0]),
    readiness=dict(
        rows=[SINGLE, SINGLE | dict(multitask=True)],
        splits=['image'],
        external=dict(phantom=dict(n_patients=30, px=96, seed=5), data_root=None, adapter='siim'),
    ),
)


WIDER = STUDY | dict(  # what appendix/machine/adding adds is in it
    table4=[*STUDY['table4'], SINGLE | dict(pretrain='rotation')],
    rotation=dict(epochs=1, pretrain='none', batch_size=8),
    readiness=STUDY['readiness'] | dict(external=dict(phantom=None, data_root='data/sorted', adapter='by_class')),
)


def add_made_up(root):
    "What appendix/machine/adding adds, as it says: a data set, a pre-training and a question; the notebooks that change."
    texts = []
    for cell in nbformat.read(root / 'nbs/appendix/machine/adding.ipynb', 4).cells:
        texts += [cell.source] if cell.cell_type == 'code' else re.findall(r'```python\n(.*?)```', cell.source, re.S)
    new, changed = {}, set()
    for text in texts:
        if not (m := re.match(r'(?:#\|.*\n)?# (nbs/\S+\.ipynb),? (exports|in|parameters|last cell) ?(\S*)\n', text)):
            continue
        file, what, name = m.groups()
        body = text[m.end() :]
        if what == 'in':
            register(root / file, name, body)
            changed.add(file)
        elif what == 'exports':
            new[file] = [f'#| default_exp {name}', '#| export\n' + body]
        else:
            new[file].insert(1 if what == 'parameters' else len(new[file]), body)
    for file, cells in new.items():
        kernel = dict(kernelspec=dict(name='python3', language='python', display_name='Python 3'))
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=kernel)
        nb.cells.insert(0, nbformat.v4.new_markdown_cell(f'# {Path(file).stem}\n> made up'))
        for c in nb.cells:
            c.metadata.tags = ['parameters'] if c.source.startswith('profile: str') else []
        nbformat.write(nb, root / file)
    subprocess.run([BIN / 'nbdev_export'], cwd=root, env=environment(root), check=True)
    return set(new), changed


def register(notebook, name, line):
    "Put a line last into the dict or list `name` that a notebook exports, and its imports before it."
    nb = nbformat.read(notebook, 4)
    start = re.compile(rf'^{name} = (dict\(|\[).*\n', re.M)
    (cell,) = (c for c in nb.cells if start.search(c.source))
    imports = ''.join(s for s in line.splitlines(True) if s.startswith('from '))
    end = re.compile(r'^[)\]]', re.M).search(cell.source, start.search(cell.source).end()).start()
    cell.source = cell.source[:end] + line.removeprefix(imports) + cell.source[end:]
    cell.source = cell.source.replace('#| export\n', '#| export\n' + imports, 1)
    nbformat.write(nb, notebook)


def clone(to):
    "The project's sources in a folder of their own, with a tiny phantom as its data."
    to.mkdir()
    for d in ('nbs', 'cxrpaper', 'config'):
        shutil.copytree(ROOT / d, to / d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'setup.py', 'Snakefile', 'Makefile', 'README.md', 'requirements.lock', 'CITATION.cff'):
        shutil.copy2(ROOT / f, to / f)
    (to / 'config' / 'tiny.yaml').write_text(yaml.safe_dump(WIDER))
    add_made_up(to)
    subprocess.run([sys.executable, '-c', DATA], cwd=to, env=environment(to), check=True)
    return to


DATA = """
from pathlib import Path
from cxrpaper.data.phantom import PhantomConfig, write_phantom
from cxrpaper.data.readers import read_cohort
from cxrpaper.schema import CLASSES
write_phantom(PhantomConfig(n_patients=60, px=96, seed=3), 'data/tiny')
c = read_cohort(write_phantom(PhantomConfig(n_patients=30, px=96, seed=5), 'data/other'))
for r in c.images.itertuples():
    to = Path('data/sorted') / CLASSES[r.label] / f'{r.image}.dcm'
    to.parent.mkdir(parents=True, exist_ok=True)
    (c.root / r.path).rename(to)
"""


WITHIN = {}  # root -> the environment in which its jobs are copies of a process that has imported what they need


def environment(root):
    if root in WITHIN:
        return WITHIN[root]
    own = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}  # as `make paper` runs it
    return own | dict(PYTHONPATH=str(root), PATH=f'{BIN}:{os.environ["PATH"]}', PYTHONWARNINGS='ignore')


def command(*more):
    return [
        BIN / 'snakemake',
        '--cores',
        '2',
        '--config',
        'study=config/tiny.yaml',
        '--rerun-incomplete',
        '--show-failed-logs',
        *more,
    ]


WARM = [BIN / 'cxr_warm']  # as `make paper` does


def study(root, *more, within=()):
    r = subprocess.run([*within, *command(*more)], cwd=root, env=environment(root), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-6000:]
    return r.stdout + r.stderr


def results(root):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((root / 'figures').iterdir())}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = clone(tmp_path_factory.mktemp('whole') / 'clone')
    with warmed(environment(root)) as env:
        WITHIN[root] = env | dict(JUPYTER_DEFAULT_PROVISIONER_NAME='cxr-warm')  # kernels of cxr_verify, too
        study(root)
        yield root


def test_every_table_and_figure_is_there(whole):
    names = (
        {
            f'{t}.{e}'
            for t in ('table1', 'table2', 'table3', 'table4', 'table5', 'table6', 'table7', 'table8')
            for e in ('csv', 'md', 'tex', 'json')
        }
        | {f'figure{i}.{e}' for i in range(1, 19) for e in ('svg', 'png', 'json')}
        | {
            f'{r}.{e}'
            for r in ('model_card', 'datasheet', 'claim', 'tripod_ai', 'metrics', 'probast_ai')
            for e in ('md', 'json')
        }
    )
    assert set(results(whole)) == names
    t = pd.read_csv(whole / 'figures' / 'table2.csv')
    assert {'row', 'metric', 'value', 'lo', 'hi', 'n', 'n_units', 'n_seeds', 'runs'} <= set(t)
    assert {'auc_macro', 'ap_macro', 'f1_macro', 'balanced_accuracy', 'study_map', 'auc_atypical'} <= set(t.metric)
    for run in t.runs.str.split().explode().unique():
        assert json.loads((whole / run / 'provenance.json').read_text())['key']


def test_executed_pages_hold_their_pictures(whole):
    pages = {f.relative_to(whole / 'runs'): nbformat.read(f, 4) for f in (whole / 'runs').rglob('*.ipynb')}
    kinds = lambda nb: {k for c in nb.cells for o in c.get('outputs', ()) for k in o.get('data', {})}
    drawn = lambda nb: bool(kinds(nb) & {'image/png', 'image/jpeg', 'image/svg+xml'})
    draws = lambda nb: any(
        re.search(r'plt\.(?:subplots|figure)\(', c.source)
        for c in nb.cells
        if c.cell_type == 'code' and '#| export' not in c.source and not is_demo(c.source)
    )
    assert not [str(k) for k, nb in pages.items() if draws(nb) and not drawn(nb)]
    assert sum(map(drawn, pages.values())) > 10


def reads_as_a_report(nb):  # the first output says what was asked for, what came out with a picture; all code is folded
    code = [c for c in nb.cells if c.cell_type == 'code']
    first = next((o for c in code for o in c.outputs if 'text/html' in o.get('data', {})), None)
    head = ''.join(first.data['text/html']) if first else ''
    said = (
        all(w in head for w in ('Asked for', 'What came out', '</table>', 'data:image/png'))
        and 'Not there yet' not in head
        and all(len(alt.split()) > 10 for alt in re.findall(r'<img alt="([^"]*)"', head))  # captions
    )
    return said and all(c.metadata.get('jupyter', {}).get('source_hidden') for c in code)


def test_executed_pages_open_with_their_result(whole):
    trained = [f for k in ('04_finetune', 'pretraining') for f in (whole / 'runs').rglob(f'{k}.ipynb')]
    assert len(trained) > 5
    own = {str(f): nbformat.read(f, 4) for f in trained}
    made_up = [k for k in own if '/rotation/' in k]  # the pre-training that this study adds: its page has no head
    assert [k for k, nb in own.items() if k not in made_up and not reads_as_a_report(nb)] == []
    assert not reads_as_a_report(nbformat.read(ROOT / 'nbs' / '04_finetune.ipynb', 4))


def test_what_was_added_is_in_the_results(whole):
    "The made-up pre-training in Table 4, the made-up question in Table 7, the made-up data set as the other hospital."
    t4, t7 = (pd.read_csv(whole / 'figures' / f'table{k}.csv') for k in (4, 7))
    row = t4[t4.row.str.contains('rotation') & (t4.metric == 'auc_macro')]
    assert len(row) and row.value.between(0, 1).all()
    run = json.loads((whole / row.runs.iloc[0].split()[0] / 'provenance.json').read_text())
    assert run['pretrained']['pretrain'] == 'rotation' and run['params']['pretrain'] == 'rotation'
    made = json.loads((whole / run['params']['weights'] / '..' / 'provenance.json').resolve().read_text())
    assert made['corpus']['used'] > 0
    asked = t7[t7.question == 'surer where right?']
    assert len(asked) == 1 and asked.answer.iloc[0] in ANSWERS


def test_a_number_can_be_followed_back(whole):
    "Macro AUC of the table, recomputed with scikit-learn from the predictions that its provenance names."
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    t = pd.read_csv(whole / 'figures' / 'table2.csv')
    r = t[(t.metric == 'auc_macro') & t.row.str.startswith('resnet10t')].iloc[0]
    df = pd.concat([pd.read_csv(whole / run / 'predictions.csv') for run in r.runs.split()])
    df = df[df.split == 'test']
    p = softmax(df[[f'logit_{k}' for k in range(4)]].values, axis=1)
    assert len(df) == r.n and df.image.is_unique
    assert abs(sum(roc_auc_score(df.label == k, p[:, k]) for k in range(4)) / 4 - r.value) < 1e-9


def cxr(root, command, *more):
    return subprocess.run([BIN / command, *more], cwd=root, env=environment(root), capture_output=True, text=True)


def test_every_cell_leads_to_its_runs(whole):
    said = cxr(whole, 'cxr_where', 'figures/table4.csv', '--row', 'moco', '--col', 'auc_macro', '--json')
    assert said.returncode == 0, said.stderr
    (cell,) = json.loads(said.stdout)
    assert len(cell['runs']) == 2 and all(r['state'] == 'here' for r in cell['runs'])
    for r in cell['runs']:
        assert (
            {'commit', 'params', 'inputs', 'versions', 'device', 'spent'} <= set(r)
            and r['spent']['wall_s'] > 0
            and r['spent']['sessions'] >= 1
        )
        assert r['params']['pretrain'] == 'moco' and (whole / r['params']['weights']).exists()
    assert cxr(whole, 'cxr_where', 'figures/table4.csv', '--row', 'simclr').returncode == 1


def test_tables_are_verified(whole):
    "They come out the same; a number edited by hand is found, and so is a prediction."
    ask = ('cxr_verify', 'config/tiny.yaml', '--only', '06_tables')
    said = cxr(whole, *ask)
    assert said.returncode == 0, said.stdout + said.stderr
    table = whole / 'figures' / 'table2.csv'
    text = table.read_text()
    table.write_text(text.replace('0.5', '0.6', 1))
    edited = cxr(whole, 'cxr_verify', 'config/tiny.yaml', '--files')
    table.write_text(text)
    assert edited.returncode == 1 and 'figures/table2.csv: edited' in edited.stdout
    predictions = whole / 'runs' / 'smoke' / 'finetune' / 'resnet10t-none-fold0-seed0' / 'predictions.csv'
    before = predictions.read_text()
    df = pd.read_csv(predictions, dtype=str)
    df.loc[df.split == 'test', 'logit_0'] = '3.0'
    df.to_csv(predictions, index=False)
    changed = cxr(whole, *ask)
    predictions.write_text(before)
    assert (
        changed.returncode == 1 and 'figures/table2.csv: differs' in changed.stdout and 'table1' not in changed.stdout
    )


def test_a_finished_study_can_be_passed_on(whole):
    "The crate holds every table and figure, each with the step that made it, from the runs that its sidecar names."
    said = cxr(whole, 'cxr_crate', 'config/tiny.yaml', '--out', 'crate/tiny')
    assert said.returncode == 0, said.stderr
    crate = whole / 'crate' / 'tiny'
    graph = {e['@id']: e for e in json.loads((crate / 'ro-crate-metadata.json').read_text())['@graph']}
    ids = lambda v: {o['@id'] for o in (v if isinstance(v, list) else [v])}
    sides = [json.loads(f.read_text()) for f in (whole / 'figures').glob('*.json')]
    assert len(sides) == 32
    for side in sides:
        step = graph[f'#{side["name"]}']
        assert ids(step['result']) == {f'figures/{f}' for f in (*side['files'], f'{side["name"]}.json')}
        assert ids(step.get('object', [])) == {f'{run}/provenance.json' for run in side['runs']}
    moco = graph['#runs/smoke/finetune/resnet10t-moco-fold0-seed0']
    assert 'runs/smoke/moco/resnet10t/provenance.json' in ids(moco['object'])
    assert cxr(whole, 'cxr_crate', '--check', 'crate/tiny').returncode == 0


def test_nothing_is_done_twice(whole):
    before = {f: f.stat().st_mtime_ns for f in (whole / 'figures').iterdir()}
    t0 = time.time()
    assert 'Nothing to be done' in study(whole)
    assert time.time() - t0 < 30
    assert before == {f: f.stat().st_mtime_ns for f in (whole / 'figures').iterdir()}


def test_a_changed_parameter_reruns_what_depends_on_it(whole):
    f = whole / 'config' / 'tiny.yaml'
    text = f.read_text()
    try:
        f.write_text(yaml.safe_dump(WIDER | dict(finetune=dict(epochs=3, batch_size=8))))
        plan = study(whole, '--dry-run')
    finally:
        f.write_text(text)
    jobs = plan[plan.index('Job stats:') :].split('\n\n')[0]
    assert 'finetune' in jobs and 'tables' in jobs and 'store' not in jobs and 'phantom' not in jobs


def seen(root, what):
    "Is there a file, not empty, that matches?"
    try:
        return any(f.stat().st_size for f in root.glob(what))
    except FileNotFoundError:
        return False  # gone again


def kill_all(p):
    others = psutil.Process(p.pid).children(recursive=True)  # kernels have sessions of their own
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    for o in others:
        try:
            o.kill()
        except psutil.NoSuchProcess:
            pass


def kill(root, moment, within=(), seconds=300):
    "Start the study; kill all of its processes as soon as a file matches `moment`."
    p = subprocess.Popen(
        [*within, *command('--nolock')],  # as `make paper` does
        cwd=root,
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.time() + seconds
    while not seen(root, moment):
        assert p.poll() is None and time.time() < end, f'{moment} was not seen'
        time.sleep(0.02)
    kill_all(p)


def again(root, whole, without):
    "A copy in which the study is finished but for what `without` names."
    shutil.copytree(whole, root, ignore=shutil.ignore_patterns('crate', 'figures', '__pycache__'))
    for pattern in without:
        found = list(root.glob(pattern))
        assert found, pattern
        for f in found:
            shutil.rmtree(f) if f.is_dir() else f.unlink()
    return root


RESULTS = ('tables', 'figures', 'readiness', 'diagram', 'representations', 'reports', 'results')  # they write figures/


def test_a_killed_study_ends_with_the_same_bytes(whole, tmp_path):
    "Killed while radiographs are decoded, and between a model's training and its predictions."
    gone = [
        'data/stores/*',
        'runs/smoke/finetune/resnet10t-none-fold0-seed0',
        'runs/smoke/finetune/*multitask*-fold1-seed0',
        *(f'runs/smoke/{k}.ipynb' for k in RESULTS),
    ]
    root = again(tmp_path / 'clone', whole, gone)
    kill(root, 'data/stores/building-*/journal')
    assert not list(root.glob('data/stores/*/store.json')), 'killed too late'
    kill(root, 'runs/smoke/finetune/*.partial/checkpoint.pt', WARM)
    assert list(root.glob('runs/smoke/finetune/*.partial')), 'killed when no model was in training'
    study(root, within=WARM)
    assert results(root) == results(whole)


def test_killed_at_random_moments(whole, tmp_path, kills):
    "`make paper` from nothing, killed at random moments, each time with all that it has started."
    if not kills:
        pytest.skip('takes as long as the study: pytest --kills 10 tests/test_study.py')
    root, draw = (
        again(tmp_path / 'clone', whole, ['runs', '.snakemake', 'data/stores']),
        np.random.default_rng(int(time.time())),
    )
    for d in ('.venv', '.uv'):
        (root / d).symlink_to(ROOT / d)
    make = ['make', 'paper', 'PROFILE=tiny', 'CORES=2']
    jobs = lambda: len(list(root.glob('runs/smoke/**/*.ipynb')))  # those that reached their end
    for after in np.sort(draw.integers(0, len(list(whole.glob('runs/smoke/**/*.ipynb'))) - 1, kills)):
        with open(root / 'killed.log', 'a') as log:
            p = subprocess.Popen(make, cwd=root, env=environment(root), stdout=log, stderr=log, start_new_session=True)
        while jobs() < after:
            assert p.poll() is None, (root / 'killed.log').read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(seconds := draw.uniform(0, 30))
        assert p.poll() is None, 'finished before it was killed'
        kill_all(p)
        print(
            f'killed {seconds:.0f} s after {after} jobs or more: {jobs()} jobs and {len(list(root.glob("figures/*")))} files in figures/ are there',
            flush=True,
        )
    r = subprocess.run(make, cwd=root, env=environment(root), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-6000:]
    assert results(root) == results(whole)
