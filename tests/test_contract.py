"The nbdev contract: clean notebooks, export equal to the library, one tagged parameters cell that survives cleaning, README equal to the index."

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readme import readme_text

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
RUNNABLE = sorted(set(re.findall(r"nbs/(\w+\.ipynb)", (ROOT / 'Snakefile').read_text())))
ids = lambda o: Path(o).name


def cells(nb, kind='code'):
    return [c for c in nb['cells'] if c['cell_type'] == kind]


def source(c):
    return ''.join(c['source'])


def tagged(nb):
    return [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks and settings in a folder of their own, cleaned and exported there."
    d = tmp_path_factory.mktemp('contract')
    shutil.copytree(ROOT / 'nbs', d / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (d / 'cxrpaper').mkdir()
    for f in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / f, d / f)
    shutil.copy(ROOT / 'cxrpaper' / '__init__.py', d / 'cxrpaper' / '__init__.py')
    for tool in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([BIN / tool], cwd=d, check=True, capture_output=True)
    return d


def test_notebooks_are_clean(copy):
    dirty = [f.name for f in NOTEBOOKS if (copy / 'nbs' / f.name).read_bytes() != f.read_bytes()]
    assert not dirty, f'run nbdev_clean: {dirty}'


def test_export_equals_the_library(copy):
    made, have = ({f.name: f.read_text() for f in (d / 'cxrpaper').glob('*.py')} for d in (copy, ROOT))
    assert set(made) == set(have)
    assert not [k for k in made if made[k] != have[k]], 'run nbdev_export'


def test_a_changed_cell_is_noticed(copy, tmp_path):
    d = tmp_path / 'changed'
    shutil.copytree(copy, d)
    f = d / 'nbs' / '00_runs.ipynb'
    nb = json.loads(f.read_text())
    cell = next(c for c in cells(nb) if source(c).startswith('#| export\nclass InputError'))
    cell['source'] = source(cell) + '\n# changed'
    f.write_text(json.dumps(nb))
    subprocess.run([BIN / 'nbdev_export'], cwd=d, check=True, capture_output=True)
    assert (d / 'cxrpaper' / 'runs.py').read_text() != (ROOT / 'cxrpaper' / 'runs.py').read_text()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_notebook(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec'] == {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    text = path.read_text()
    assert not re.search(r'(?<![\w.])/(work|root|home|tmp|Users)/', text), 'a path of one machine stands in it'
    assert path.stat().st_size < 1_500_000
    first = source(cells(nb, 'markdown')[0])
    assert re.match(r'# .+\n\n?> .+', first), 'a notebook starts with a title and a one-line subtitle'
    for c in cells(nb):
        assert not [o for o in c['outputs'] if o.get('output_type') == 'error'], (
            f'an error is saved below {source(c)[:60]}'
        )


@pytest.mark.parametrize('name', RUNNABLE)
def test_runnable_notebook_has_one_parameters_cell(name, copy):
    "Exactly one, still tagged after nbdev_clean; all scalars, profile first; the next cell with code checks just these names."
    nb = json.loads((copy / 'nbs' / name).read_text())
    (cell,) = tagged(nb)
    body = ast.parse(source(cell)).body
    assert all(isinstance(s, ast.Assign) and isinstance(s.value, (ast.Constant, ast.UnaryOp)) for s in body)
    names = [s.targets[0].id for s in body]
    assert names[0] == 'profile' and ast.literal_eval(body[0].value) == 'smoke'
    calls = [
        n
        for c in cells(nb)
        for n in ast.walk(ast.parse(re.sub(r'(?m)^[%!].*$', '', source(c))))
        if isinstance(n, ast.Call)
        and getattr(n.func, 'id', '') == 'parameters'
        and n.args
        and isinstance(n.args[0], ast.Call)
        and getattr(n.args[0].func, 'id', '') == 'globals'
    ]
    assert len(calls) == 1, 'one call of parameters(globals(), ...)'
    assert {k.arg for k in calls[0].keywords} - {'defaults'} == set(names)


def test_other_notebooks_have_no_parameters_cell():
    for f in NOTEBOOKS:
        if f.name not in RUNNABLE:
            assert not tagged(json.loads(f.read_text())), f.name


def test_without_the_setting_the_tag_is_lost(tmp_path):
    "The counter-test: drop allowed_cell_metadata_keys, and nbdev_clean removes the tag that papermill needs."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'cxrpaper').mkdir()
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / 'settings.ini')
    assert settings['DEFAULT'].pop('allowed_cell_metadata_keys') == 'tags'
    with open(tmp_path / 'settings.ini', 'w') as f:
        settings.write(f)
    shutil.copy(ROOT / 'nbs' / RUNNABLE[0], tmp_path / 'nbs')
    subprocess.run([BIN / 'nbdev_clean'], cwd=tmp_path, check=True, capture_output=True)
    assert not tagged(json.loads((tmp_path / 'nbs' / RUNNABLE[0]).read_text()))


def test_readme_is_what_the_index_gives():
    assert (ROOT / 'README.md').read_text() == readme_text(), 'run `make readme`'


def test_modules_import_earlier_ones_only():
    order = {
        json.loads(f.read_text())['cells'] and m: i
        for i, f in enumerate(NOTEBOOKS)
        for m in re.findall(r'#\| default_exp (\w+)', '\n'.join(source(c) for c in cells(json.loads(f.read_text()))))
    }
    rank = {
        m: i
        for i, m in enumerate(
            [
                'runs',
                'study',
                'dicom',
                'phantom',
                'cohort',
                'download',
                'store',
                'models',
                'multitask',
                'augment',
                'training',
                'metrics',
                'segmentation',
                'comparisons',
                'calibration',
                'decisions',
                'baselines',
                'corpora',
                'probes',
                'pretraining',
                'moco',
                'inpainting',
                'finetune',
                'costs',
                'predictions',
                'shortcuts',
                'saliency',
                'subgroups',
                'robustness',
                'difficulty',
                'readiness',
                'reported',
                'tables',
                'scorecard',
                'reports',
                'figures',
                'diagram',
                'evaluation',
                'representations',
                'results',
                'lineage',
            ]
        )
    }
    assert set(rank) == set(order), 'a module is missing from the order of the data flow'
    for m in rank:
        for o in re.findall(r'(?m)^\s*from (?:cxrpaper)?\.(\w+) import', (ROOT / 'cxrpaper' / f'{m}.py').read_text()):
            assert rank[o] < rank[m] or o == m or m == 'runs', f'{m} imports {o}'
