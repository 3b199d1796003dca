"papermill takes any name and any type; the notebooks must not."

import json
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_contract import NBS
from test_contract import RUNNABLE as PAGES

from cxrpaper.data.phantom import PhantomConfig, write_phantom

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RUNNABLE = [f.relative_to(NBS).as_posix() for f in PAGES]


WRONG = [
    ({'pretrian': 'moco'}, 'unknown parameter pretrian'),
    ({'profile': 'smok'}, "parameter profile: 'smok'"),
    ({'profile': 3}, 'parameter profile: 3 (int)'),
]
OF_FINETUNE = [
    ({'lr': '1e-3'}, 'write it with a point, as 1.0e-3'),
    ({'lr': 7}, 'a number from'),
    ({'epochs': 2.5}, 'a whole number'),
    ({'fold': 9}, 'folds count from 0'),
    ({'pretrain': 'mocco'}, "one of 'none', 'imagenet', 'moco', 'inpainting'"),
    ({'masks': 'shuffled'}, 'set multitask to true'),
    ({'multitask': True, 'px': 100}, 'divisible by 32'),
]


def checks_of(name):
    "Execute a notebook up to the cell that checks the parameters, but for a library's demonstrations; then a function: what papermill's injected cell gives -> the error or None."
    nb = load_notebook_node(str(ROOT / 'nbs' / name))
    shell, library = InteractiveShell(), any('#| default_exp' in c.source for c in nb.cells)
    code = [c for c in nb.cells if c.cell_type == 'code']
    at = next(i for i, c in enumerate(code) if re.search(r'\bparameters\(\s*globals\(\)', c.source))
    before = [c for c in code[:at] if not library or c.source.startswith('#|') or c.metadata.get('tags')]

    def run(cells):
        done = (shell.run_cell(c.source, store_history=True, silent=False) for c in cells)
        return next((e for r in done if (e := r.error_in_exec or r.error_before_exec)), None)

    assert run(before) is None

    def check(given):
        del shell.user_ns['In'][1:]
        tagged = [c for c in parameterize_notebook(nb, given).cells if c.metadata.get('tags')]
        return run([*(c for c in tagged if 'parameters' in ' '.join(c.metadata.tags)), code[at]])

    return check


@pytest.mark.parametrize('name', RUNNABLE)
def test_parameters_are_checked(name, capsys):
    check = checks_of(name)
    for given, what in WRONG + OF_FINETUNE * (name == '04_finetune.ipynb'):
        error = str(check(given))
        assert what in error and 'Hint' in error
    assert check({}) is None


def papermill(env, *args, cwd=ROOT, nb='nbs/04_finetune.ipynb', out):
    command = [BIN / 'cxr_papermill', '--no-progress-bar', ROOT / nb, out, *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    'args,what',
    [(['-p', 'pretrian', 'moco'], 'unknown parameter pretrian'), (['-y', 'lr: 1e-3'], 'as 1.0e-3')],
    ids=['misspelt', 'yaml'],
)
def test_on_the_command_line(args, what, warm, tmp_path):
    "As a user types it: exit status not 0, the hint in the message, and no run left behind."
    before = set((ROOT / 'runs').rglob('params.json'))
    r = papermill(warm, *args, out=tmp_path / 'out.ipynb')
    assert r.returncode != 0 and what in r.stderr
    assert set((ROOT / 'runs').rglob('params.json')) == before


def finetuned(env, pretrain, arch, out, *more):
    given = dict(pretrain=pretrain, arch=arch, px='64', epochs='1')
    return papermill(env, *(w for k, v in given.items() for w in ('-p', k, v)), *more, out=out)


@pytest.mark.parametrize('pretrain', ['moco', 'inpainting'])
def test_a_missing_pretraining_is_an_error_where_that_is_asked_for(pretrain, warm, tmp_path):
    r = finetuned(warm, pretrain, 'resnet14t', tmp_path / 'out.ipynb', '-p', 'weights', 'none')
    assert r.returncode != 0 and f'there is no {pretrain} run with resnet14t' in r.stderr
    assert f'papermill nbs/03_{pretrain}.ipynb out.ipynb -p profile smoke -p arch resnet14t' in r.stderr
    r = finetuned(warm, pretrain, 'resnet14t', tmp_path / 'out.ipynb', '-p', 'weights', 'runs/nowhere')
    assert r.returncode != 0 and 'runs/nowhere' in r.stderr


INLINE = (
    'module://matplotlib_inline.backend_inline'  # as a kernel sets it: the kernel that it starts is then a copy, too
)


def test_a_missing_pretraining_runs_first_and_is_kept(warm, tmp_path):
    "In a project without any run, twice: the second call starts from what the first has made."
    root = tmp_path / 'project'
    for name in ('nbs', 'cxrpaper', 'config'):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    shutil.copy(ROOT / 'settings.ini', root)
    write_phantom(PhantomConfig(n_patients=120, px=96, seed=3), root / 'films')  # MoCo's queue takes 128 of them
    given = '-p pretrain moco -p data_root films -p px 64 -p epochs 1 -p run runs/one'
    call = lambda out: f'cxr_papermill --no-progress-bar nbs/04_finetune.ipynb {out} {given}'
    r = subprocess.run(
        [
            *([BIN / 'cxr_warm'] if sys.platform == 'linux' else []),
            'sh',
            '-ec',
            f'{call("1.ipynb")}; {call("2.ipynb")}',
        ],
        cwd=root,
        env=warm | dict(PYTHONPATH=str(root), PYTHONWARNINGS='ignore', MPLBACKEND=INLINE),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    said = [(root / f'{k}.ipynb').read_text() for k in (1, 2)]
    assert 'MoCo runs first' in said[0] and 'epoch 1/' in said[0] and 's left' in said[0]
    assert 'MoCo runs first' not in said[1]
    assert len(list((root / 'runs/smoke/moco').glob('*/provenance.json'))) == 1


def test_the_same_from_anywhere(warm, tmp_path):
    "One small run from the root, from nbs/ and from elsewhere, on a folder named from the root: the same predictions."
    films = write_phantom(PhantomConfig(n_patients=60, px=96, seed=3), workers=1).relative_to(ROOT)
    given = f'-p data_root {films} -p px 64 -p epochs 1 -p arch resnet10t -p n_folds 3 -p pretrain none'
    seen, name = [], uuid.uuid4().hex[:8]
    job = ['--engine', 'cxr-job']  # without the page's demonstrations: these are executed once, from elsewhere
    for i, (cwd, how) in enumerate(((ROOT, job), (ROOT / 'nbs', job), (tmp_path, []))):
        run = f'runs/test/anywhere-{name}-{i}'
        r = papermill(warm, *given.split(), '-p', 'run', run, *how, cwd=cwd, out=tmp_path / f'{i}.ipynb')
        assert r.returncode == 0, r.stderr[-3000:]
        seen.append((ROOT / run / 'predictions.csv').read_bytes())
        assert json.loads((ROOT / run / 'provenance.json').read_text())['params']['epochs'] == 1
    assert seen[0] == seen[1] == seen[2] and seen[0].count(b'\n') > 50
