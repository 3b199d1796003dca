"A study to pass on: whole, told file by file, valid by the validator of RO-Crate; what was changed afterwards is found."

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cxrpaper.paper.crate import check_crate
from cxrpaper.paper.tables import needed_runs
from cxrpaper.study import read_study

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
digest = lambda f: hashlib.sha256(f.read_bytes()).hexdigest()


def write_json(file, what):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(what))


@pytest.fixture
def project(tmp_path):
    "The project with the least study there is; its runs, table and figure are made up."
    root = tmp_path / 'project'
    for d in ('nbs', 'cxrpaper', 'config'):
        shutil.copytree(ROOT / d, root / d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for f in ('settings.ini', 'Snakefile', 'requirements.lock', 'CITATION.cff'):
        shutil.copy(ROOT / f, root)
    row = dict(arch='resnet10t', pretrain='none')
    study = yaml.safe_load((ROOT / 'config' / 'smoke.yaml').read_text()) | dict(figures='figures', folds=[0])
    study |= dict(table2=[row], table3=[row], table4=[row], table6=None, readiness=None)
    (root / 'config' / 'least.yaml').write_text(yaml.safe_dump(study))
    runs = needed_runs(read_study(root / 'config' / 'least.yaml'))
    made = dict(code='c' * 64, commit='d' * 40, device='cpu', dirty=False)
    for k, run in enumerate(runs):
        about = dict(params=dict(lr=0.1), inputs=dict(cohort='e' * 64), written='2024-01-01T00:00:00+00:00')
        write_json(root / run / 'provenance.json', made | dict(key=f'{k}' * 64) | about)
        write_json(root / run / 'params.json', about)
        for name in ('history.csv', 'predictions.csv', 'weights.safetensors'):
            (root / run / name).write_text(name)
    behind = {run: made | dict(key=f'{k}' * 64) for k, run in enumerate(runs)}
    (root / 'figures').mkdir()
    for name, suffix, title in (('table2', 'csv', 'Table 2. Backbones.'), ('figure5', 'png', 'Figure 5. Confusions')):
        (file := root / 'figures' / f'{name}.{suffix}').write_text(name)
        side = dict(name=name, caption=f'**{title}** Made up.', code='f' * 64, files={file.name: digest(file)})
        write_json(file.with_suffix('.json'), side | dict(runs=behind, study='config/least.yaml'))
    return root, runs


def cxr_crate(root, *words):
    env = os.environ | dict(PYTHONPATH=str(root))
    return subprocess.run([BIN / 'cxr_crate', *words], cwd=root, env=env, capture_output=True, text=True)


def test_what_is_written_is_whole_and_what_is_changed_is_found(project):
    root, runs = project
    r = cxr_crate(root, 'config/least.yaml')
    assert r.returncode == 0 and 'crate/smoke.zip' in r.stdout, r.stderr[-2000:]
    crate = root / 'crate' / 'smoke'
    graph = {e['@id']: e for e in json.loads((crate / 'ro-crate-metadata.json').read_text())['@graph']}
    assert {o['@id'] for o in graph['#table2']['object']} == {f'{run}/provenance.json' for run in runs}
    assert graph['#table2']['result'][0]['@id'] == 'figures/table2.csv'
    assert graph[graph['#table2']['instrument']['@id']]['identifier'] == 'f' * 64
    assert graph['#cohort-eeeeeeeeeeee']['value'] == 'e' * 64 and graph['#study']['instrument']['@id'] == 'Snakefile'
    names = {f.name for f in crate.rglob('*')}
    assert not names & {'predictions.csv', 'weights.safetensors'} and names >= {'history.csv', 'params.json'}
    checked = yaml.safe_load((crate / 'codecheck.yml').read_text())
    assert [m['file'] for m in checked['manifest']] == ['figures/table2.csv', 'figures/figure5.png']
    assert all((crate / m['file']).is_file() and m['comment'] for m in checked['manifest'])
    assert str(root) not in ''.join(f.read_text() for f in crate.rglob('*') if f.suffix in ('.json', '.md', '.yml'))
    assert check_crate(crate).empty
    changed = 'figures/table2.csv', f'{runs[0]}/history.csv', 'codecheck.yml'
    for file in changed:
        (crate / file).write_bytes((crate / file).read_bytes() + b' ')
    (crate / 'more.csv').write_text('')
    found = check_crate(crate).groupby('file').problem.agg(' '.join)
    assert all('changed' in found[file] for file in changed) and found['more.csv'] == 'not in the crate'
    assert set(found.index) == {*changed, 'more.csv', 'figures/table2.json'}
    r = cxr_crate(root, '--check', crate)
    assert r.returncode == 1 and 'codecheck.yml: changed' in r.stderr


@pytest.mark.parametrize('fault', ['an edited table', 'a run that is gone', 'a run that was made again'])
def test_what_is_not_whole_is_refused(project, fault):
    root, runs = project
    file = root / runs[0] / 'provenance.json'
    if fault == 'an edited table':
        (root / 'figures' / 'table2.csv').write_text('0.9')
    elif fault == 'a run that is gone':
        file.unlink()
    else:
        write_json(file, json.loads(file.read_text()) | dict(key='9' * 64))
    r = cxr_crate(root, 'config/least.yaml')
    said = {'an edited table': 'edited', 'a run that is gone': 'not here', 'a run that was made again': 'older than'}
    assert r.returncode == 1 and said[fault] in r.stderr and not (root / 'crate').exists(), r.stderr[-1500:]


# the validator asks w3id.org for the context of RO-Crate 1.1; this release of rocrate brings it, and the validator's cache holds it
VALIDATOR = ('roc-validator==0.13.0', 'rocrate==0.13.0')
KEEP_CONTEXT = """
import io, sys
from importlib.util import find_spec
from pathlib import Path
from requests.adapters import HTTPAdapter
from requests_cache import CachedSession
from urllib3 import HTTPResponse

context = (Path(find_spec('rocrate').origin).parent / 'data' / 'ro-crate.jsonld').read_bytes()

class Brought(HTTPAdapter):
    def send(self, request, **how):
        says = {'Content-Type': 'application/ld+json'}
        return self.build_response(request, HTTPResponse(io.BytesIO(context), says, 200, preload_content=False))

session = CachedSession(sys.argv[1], backend='sqlite', expire_after=-1)
session.mount('https://', Brought())
session.get('https://w3id.org/ro/crate/1.1/context').json()['@context']['Dataset']
"""


@pytest.fixture(scope='module')
def validate(tmp_path_factory):
    "RO-Crate's validator in an environment of its own, without a network from there on: called with a crate."
    home = tmp_path_factory.mktemp('validator')
    uv = [ROOT / '.uv' / 'bin' / 'uv']
    made = subprocess.run([*uv, 'venv', '-q', '--python', sys.executable, home / 'env'], capture_output=True, text=True)
    python = home / 'env' / 'bin' / 'python'
    if made.returncode == 0:
        install = [*uv, 'pip', 'install', '-q', '--python', python, *VALIDATOR]
        made = subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f'the validator cannot be installed here: {made.stderr.strip().splitlines()[-1:]}')
    subprocess.run([python, '-c', KEEP_CONTEXT, home / 'cache'], check=True, capture_output=True)
    ask = [python.with_name('rocrate-validator'), '-y', '--disable-color', 'validate', '-p', 'workflow-run-crate']
    ask += ['--no-paging', '--offline', '--cache-path', home / 'cache']
    return lambda crate: subprocess.run([*ask, crate], capture_output=True, text=True, cwd=home)


@pytest.mark.long
def test_the_validator_finds_nothing_and_finds_what_is_wrong(project, validate):
    root, _ = project
    assert cxr_crate(root, 'config/least.yaml').returncode == 0
    crate = root / 'crate' / 'smoke'
    r = validate(crate)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-2000:]
    metadata = crate / 'ro-crate-metadata.json'
    graph = json.loads(metadata.read_text())
    for e in graph['@graph']:
        if e['@id'] == '#study':
            del e['instrument']
    metadata.write_text(json.dumps(graph))
    r = validate(crate)
    assert r.returncode == 1 and 'is not a valid workflow-run-crate' in r.stdout, r.stdout[-3000:] + r.stderr[-2000:]
