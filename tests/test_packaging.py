"The wheel where nothing but the core's requirements is installed: what works without PyTorch, and what the rest answers."

import importlib.metadata as md
import json
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_audit import predicted
from test_environment import ROOT

PACKAGED = ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE')


def closure(requirements):
    "Names of the installed distributions that requirements bring, without extras of this package."
    todo, found = [Requirement(r) for r in requirements], set()
    while todo:
        r = todo.pop()
        if r.marker and not any(r.marker.evaluate({'extra': e}) for e in r.extras or {''}):
            continue
        name = canonicalize_name(r.name)
        if name not in found:
            found.add(name)
            todo += [Requirement(f) for f in md.distribution(name).requires or () if 'extra ==' not in f]
    return found


@pytest.fixture(scope='module')
def core(tmp_path_factory):
    "A folder that a wheel was unpacked into, beside links to the distributions of the core; how Python is called there."
    home = tmp_path_factory.mktemp('wheel')
    (tree := home / 'tree').mkdir()
    for name in PACKAGED:
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / 'cxrpaper', tree / 'cxrpaper', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, 'setup.py', '-q', 'bdist_wheel'], cwd=tree, check=True, capture_output=True)
    (wheel,) = (tree / 'dist').glob('*.whl')
    site = home / 'site'
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    (metadata,) = site.glob('*.dist-info/METADATA')
    about = message_from_string(metadata.read_text())
    for name in closure(r for r in about.get_all('Requires-Dist') if 'extra ==' not in r):
        for f in md.distribution(name).files:
            top = f.parts[0]
            if top not in ('..', '__pycache__') and not (site / top).exists():
                (site / top).symlink_to(Path(md.distribution(name).locate_file(top)).resolve())
    (home / 'work').mkdir()

    def python(code, *more):
        start = f'import sys; sys.path.append({str(site)!r}); sys.argv = ["x", *sys.argv[1:]]; '
        call = [sys.executable, '-I', '-S', '-c', start + code, *map(str, more)]
        return subprocess.run(call, cwd=home / 'work', capture_output=True, text=True)

    return home / 'work', python, about, wheel


def test_the_wheel_says_what_it_is(core):
    *_, about, wheel = core
    assert about['License'] == 'Apache-2.0' and about.get_all('License-File') == ['LICENSE']
    assert 'Development Status :: 3 - Alpha' in about.get_all('Classifier')
    assert set(about.get_all('Provides-Extra')) >= {'train', 'lab', 'slurm', 'onnx', 'crate', 'log', 'all', 'dev'}
    extras = {
        e: {r.split(';')[0] for r in about.get_all('Requires-Dist') if f'extra == "{e}"' in r}
        for e in about.get_all('Provides-Extra')
    }
    assert extras['all'] == set().union(*(v for k, v in extras.items() if k not in ('all', 'dev')))
    said = about.get_payload()
    assert said.startswith('# cxrpaper') and '](figures/' not in said and '](nbs/' not in said
    assert wheel.stat().st_size < 1e6


def test_the_audit_works_without_pytorch_outside_the_project(core):
    "Same answers as here, one self-contained page; neither PyTorch nor the notebooks are there."
    from sklearn import datasets

    from cxrpaper.paper.audit import audit

    work, python, *_ = core
    predicted(datasets.load_wine).to_csv(work / 'my.csv', index=False)
    r = python('import torch')
    assert 'No module named' in r.stderr, 'the environment holds more than the core'
    r = python('from cxrpaper.paper.commands import audit; audit()', 'my.csv', '--n_boot', 100, '--out', 'report')
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'data:image/png' in (work / 'report' / 'report.html').read_text()
    audit(work / 'my.csv', work / 'here', n_boot=100)
    for name in ('performance.csv', 'scorecard.csv', 'selective.csv'):
        assert (work / 'report' / name).read_bytes() == (work / 'here' / name).read_bytes()
    bad = python('from cxrpaper.paper.commands import audit; audit()', 'none.csv')
    assert bad.returncode == 1 and bad.stderr.startswith('cxr_audit: none.csv') and 'Traceback' not in bad.stderr


IMPORT_ALL = """
import importlib, json
answers = {}
for m in sys.argv[1:]:
    try:
        importlib.import_module(m)
        answers[m] = 'works'
    except ImportError as e:
        answers[m] = str(e)
print(json.dumps(answers))
"""


def test_what_needs_an_extra_says_which(core):
    "Every module works in the core or names the extra; commands do so in one line."
    _, python, *_ = core
    modules = [
        '.'.join(f.relative_to(ROOT).with_suffix('').parts)
        for f in sorted((ROOT / 'cxrpaper').rglob('*.py'))
        if f.name
        not in ('__init__.py', '_modidx.py', 'jobs.py', 'room.py', 'contents.py')  # papermill and notebooks load these
    ]
    answers = json.loads(python(f'exec({IMPORT_ALL!r})', *modules).stdout)
    assert not {k: v for k, v in answers.items() if v != 'works' and "pip install 'cxrpaper[" not in v}
    assert answers['cxrpaper.paper.audit'] == answers['cxrpaper.data.dicom'] == 'works'
    assert "'cxrpaper[train]'" in answers['cxrpaper.models.nets'] == answers['cxrpaper.paper.predict']
    r = python('from cxrpaper.paper.commands import predict; predict()', 'a.png', '--run', 'r')
    assert (
        r.returncode == 1 and r.stderr == "cxr_predict: torch is not installed. Hint: pip install 'cxrpaper[train]'\n"
    )


@pytest.mark.serial
def test_the_audit_starts_at_once(core):
    "`--help` and a file that is not there in less than two seconds of processor time (of a slow machine: little more than pandas and SciPy take), imports compiled before."
    _, python, *_ = core

    def took(code, *words):
        code = f'import atexit, sys, time; atexit.register(lambda: print("took", time.process_time(), *sys.modules)); {code}'
        seconds, *modules = min(
            (python(code, *words).stdout.split('took')[1].split() for _ in range(3)), key=lambda r: float(r[0])
        )
        return float(seconds), set(modules)

    least, _ = took('import pandas, scipy.stats')
    for words in (['--help'], ['none.csv']):
        seconds, modules = took('from cxrpaper.paper.commands import audit; audit()', *words)
        assert seconds < max(2, 2 * least), (words, seconds, least)
        assert not {'sklearn', 'matplotlib', 'torch'} & modules  # what it draws and fits with is loaded when it does
