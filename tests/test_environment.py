"settings.ini, requirements.lock, environment.yml and what is installed agree."

import ast
import importlib.metadata as md
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from requirements import direct_requirements

ROOT = Path(__file__).resolve().parent.parent


def pins(text):
    "Pinned requirements of a lock: name -> [(version, marker or None, number of hashes)]."
    out = {}
    for block in re.split(r'\n(?=\S)', re.sub(r'(?m)^#.*\n', '', text)):
        lines = block.replace('\\\n', '\n').split('\n')
        if not lines[0].strip():
            continue
        r = Requirement(lines[0].strip())
        spec = list(r.specifier)
        assert len(spec) == 1 and spec[0].operator == '==', f'{lines[0]} is not an exact pin'
        out.setdefault(canonicalize_name(r.name), []).append((spec[0].version, r.marker, block.count('--hash=sha256:')))
    return out


def disagreements(direct, lock, installed):
    "What is wrong between direct requirements, a lock's text and installed versions; installed(name) -> version or None."
    locked, wrong = pins(lock), []
    for r in map(Requirement, direct):
        versions = [v for v, m, _ in locked.get(canonicalize_name(r.name), []) if m is None or m.evaluate()]
        if not versions:
            wrong.append(f'{r} of settings.ini is not in requirements.lock')
        elif not r.specifier.contains(versions[0], prereleases=True):
            wrong.append(f'requirements.lock pins {r.name} {versions[0]}, settings.ini asks {r.specifier}')
    for name, versions in locked.items():
        for v, m, hashes in versions:
            if not hashes:
                wrong.append(f'{name} {v} has no hash')
            if (m is None or m.evaluate()) and installed(name) != v:
                wrong.append(f'{name}: {v} is locked, {installed(name)} is installed')
    return wrong


def installed(name):
    try:
        return md.version(name)
    except md.PackageNotFoundError:
        return None


LOCK = (ROOT / 'requirements.lock').read_text()


def test_lock_settings_and_installed_agree():
    assert len(pins(LOCK)) > 100
    assert disagreements(direct_requirements(), LOCK, installed) == []


@pytest.mark.parametrize(
    'direct,lock,what',
    [
        (['torch>=99'], LOCK, 'settings.ini asks'),
        (['not-a-package'], LOCK, 'not in requirements.lock'),
        ([], 'torch==0.1 \\\n    --hash=sha256:00\n', 'is locked'),
        ([], f'torch=={installed("torch")}\n', 'has no hash'),
    ],
)
def test_a_disagreement_is_found(direct, lock, what):
    assert any(what in w for w in disagreements(direct, lock, installed))


def test_what_was_installed_is_only_what_is_locked():
    extra = (
        {canonicalize_name(d.metadata['Name']) for d in md.distributions()}
        - set(pins(LOCK))
        - {'cxrpaper', 'pip', 'setuptools', 'wheel'}
    )
    assert not extra, f'installed by hand, not from the lock: {sorted(extra)}'


def test_environment_yml_takes_everything_from_the_lock():
    env = yaml.safe_load((ROOT / 'environment.yml').read_text())
    pip = [d for d in env['dependencies'] if isinstance(d, dict)]
    assert pip == [{'pip': ['-r requirements.lock']}]
    conda = [Requirement(re.sub(r'(?<![=<>!])=(?!=)', '==', d)) for d in env['dependencies'] if isinstance(d, str)]
    assert {r.name for r in conda} == {'python', 'pip', 'make'}, 'a library from conda could differ from the lock'
    settings = (ROOT / 'settings.ini').read_text()
    minimum = re.search(r'min_python = (\S+)', settings)[1]
    (python,) = [next(iter(r.specifier)).version for r in conda if r.name == 'python']
    assert tuple(map(int, python.split('.'))) >= tuple(map(int, minimum.split('.'))) <= sys.version_info[:2]


def imported(path):
    tree = ast.parse(Path(path).read_text())
    return {n.name.split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.Import) for n in o.names} | {
        o.module.split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and o.level == 0
    }


def test_every_import_of_the_package_is_a_direct_requirement():
    names = {canonicalize_name(Requirement(r).name) for r in direct_requirements()}
    provided = md.packages_distributions()
    for f in sorted((ROOT / 'cxrpaper').rglob('*.py')):
        for module in imported(f) - set(sys.stdlib_module_names) - {'cxrpaper'}:
            assert {canonicalize_name(d) for d in provided[module]} & names, (
                f'{f.name} imports {module}, which settings.ini does not require'
            )


def recipe(*options):  # of make
    return subprocess.run(
        ['make', '--dry-run', '--no-print-directory', *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_corpus_is_fetched_where_nothing_was_made_before():
    first, fetch = recipe('data', 'PARTS=2', 'MIRROR=/some where/nih').splitlines()[-2:]
    assert first == 'mkdir -p data' and 'fetch.ipynb data/fetch.ipynb' in fetch  # papermill makes no folder
    assert '-p parts 2 ' in fetch and fetch.endswith('-p mirror "/some where/nih"')


@pytest.mark.skipif(shutil.which('flock') is None, reason='without flock two of them are not kept apart')
@pytest.mark.parametrize('usable, asked', [(True, ['sync', 'install']), (False, ['venv', 'sync', 'install'])])
def test_two_makes_at_once_make_one_environment(usable, asked, tmp_path):
    "A stand-in for uv notes what it is asked for; an environment that can be used is changed, not made anew under those who use it."
    for f in ('requirements.lock', 'setup.py', 'settings.ini', 'tests/needs_quarto.sh', '.uv/bin/uv'):
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f).touch()
    (tmp_path / '.uv/bin/uv').write_text(
        '#!/bin/sh\ncase $1 in venv) echo venv;; *) echo $2;; esac >>asked\nsleep .3\n'
    )
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/python').write_text(f'#!/bin/sh\nexit {int(not usable)}\n')
    for f in ('.uv/bin/uv', '.venv/bin/python'):
        (tmp_path / f).chmod(0o755)
    shutil.copy(ROOT / 'Makefile', tmp_path)
    make = ['make', f'PYTHON={sys.executable}', '.venv/installed']
    both = [subprocess.Popen(make, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [p.communicate() + (p.returncode,) for p in both]
    assert [r for *_, r in said] == [0, 0], said
    assert (tmp_path / 'asked').read_text().split() == asked, said
    again = subprocess.run(make, cwd=tmp_path, capture_output=True, check=True, text=True)
    assert 'environment' not in again.stdout and (tmp_path / 'asked').read_text().split() == asked


def test_clean_removes_nothing_that_was_fetched_or_given(tmp_path):
    made = ('runs/x', 'data/phantom/x', 'data/stores/x')
    kept = ('data/open/images/x.png', 'data/weights/x.safetensors', 'data/pseudonyms.key', 'figures/x.csv')
    for f in (*made, *kept):
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f).touch()
    shutil.copy(ROOT / 'Makefile', tmp_path)
    subprocess.run(['make', 'clean'], cwd=tmp_path, capture_output=True, check=True)
    assert [f for f in (*made, *kept) if (tmp_path / f).exists()] == [*kept]


@pytest.mark.parametrize(
    'options, said',
    [
        (['PROFILE=nope'], 'PROFILE=nope: no config/nope.yaml; there are location'),
        (['PROFILE=open', 'DATA=/no/such'], 'DATA=/no/such: no such folder'),
        (['PROFILE=smoke', 'DATA=/'], 'config/smoke.yaml has no data_root below data/'),
    ],
)
def test_make_paper_says_what_is_wrong_with_its_options(options, said):
    r = subprocess.run(['make', 'paper', *options], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode and said in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('command', ['nbdev_docs', 'nbdev_preview', 'nbdev_readme'])
def test_commands_that_would_install_over_the_lock_say_what_they_need(command, tmp_path):
    path = os.environ['PATH'].split(os.pathsep)
    without = os.pathsep.join(p for p in path if not (Path(p) / 'quarto').exists())
    said = subprocess.run(
        [Path(sys.executable).parent / command],
        cwd=tmp_path,
        env=os.environ | dict(PATH=without),
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1 and f'{command} needs Quarto' in said.stderr and not list(tmp_path.iterdir())


def test_a_wheel_can_be_made_of_the_source_distribution(tmp_path):
    "settings.ini, from which setup.py reads everything, travels with it."
    tree = tmp_path / 'tree'
    tree.mkdir()
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / 'cxrpaper', tree / 'cxrpaper', ignore=shutil.ignore_patterns('__pycache__'))
    call = lambda *words, at: subprocess.run(
        [sys.executable, *words], cwd=at, check=True, capture_output=True, text=True
    )
    call('setup.py', '-q', 'sdist', at=tree)
    (archive,) = (tree / 'dist').glob('*.tar.gz')
    with tarfile.open(archive) as t:
        t.extractall(tmp_path, filter='data')
    unpacked = tmp_path / archive.name.removesuffix('.tar.gz')
    call('setup.py', '-q', 'bdist_wheel', at=unpacked)
    (wheel,) = (unpacked / 'dist').glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    assert 'cxrpaper/data/dicom.py' in names and any(n.endswith('entry_points.txt') for n in names)
