"Where nothing of the project is installed: a development container, Binder, Colab. No network: what they read, and what it does here."

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BINDER = ROOT / '.binder'
SETTINGS = ConfigParser(interpolation=None)
SETTINGS.read(ROOT / 'settings.ini')
SETTINGS = SETTINGS['DEFAULT']
# of containers.dev's schema: the properties that a container from an image may have, and their types
ANY = str, list, dict
PROPERTIES = dict(
    **dict(name=str, image=str, features=dict, forwardPorts=list, portsAttributes=dict, otherPortsAttributes=dict),
    **dict(remoteUser=str, containerUser=str, containerEnv=dict, remoteEnv=dict, mounts=list, runArgs=list),
    **dict(onCreateCommand=ANY, updateContentCommand=ANY, postCreateCommand=ANY, postStartCommand=ANY),
    **dict(hostRequirements=dict, customizations=dict, workspaceFolder=str, workspaceMount=str),
)
PORT = dict(label=str, onAutoForward=str, elevateIfNeeded=bool, requireLocalPort=bool, protocol=str)
SIZE = r'\d+([tgmk]b)?'


def container_faults(said: dict) -> list:
    "What the schema of devcontainer.json refuses in a container that is made from an image."
    wrong = [f'{k} is no property' for k in said if k not in PROPERTIES]
    wrong += [f'{k} has another type' for k, v in said.items() if not isinstance(v, PROPERTIES.get(k, object))]
    wrong += [] if 'image' in said else ['image is required']
    ports = said.get('portsAttributes', {}).values()
    wrong += [f'{k} is none of a port' for p in ports for k, v in p.items() if not isinstance(v, PORT.get(k, ()))]
    wrong += [f'{p} is no port' for p in said.get('forwardPorts', []) if not (isinstance(p, int) and 0 <= p < 65536)]
    need = said.get('hostRequirements', {})
    wrong += [f'{k} is no size' for k in ('memory', 'storage') if k in need and not re.fullmatch(SIZE, need[k])]
    return wrong


def test_the_container_is_one_of_the_specification():
    said = json.loads((ROOT / '.devcontainer' / 'devcontainer.json').read_text())
    assert container_faults(said) == []
    python = re.fullmatch(r'mcr\.microsoft\.com/devcontainers/python:(3\.\d+)-\w+', said['image'])[1]
    assert python == SETTINGS['min_python'] and said['forwardPorts'] == [8888]
    (made,) = re.findall(r'^make (\S+)$', said['postCreateCommand'])
    assert re.search(rf'(?m)^{re.escape(made)}:', (ROOT / 'Makefile').read_text())
    editor = said['customizations']['vscode']['settings']['python.defaultInterpreterPath']
    assert editor == '${containerWorkspaceFolder}/' + f'{Path(made).parent}/bin/python'


@pytest.mark.parametrize(
    'planted,found',
    [
        (dict(image=None), 'image has another type'),
        (dict(postCreate='make'), 'postCreate is no property'),
        (dict(forwardPorts=['8888x']), '8888x is no port'),
        (dict(portsAttributes={'8888': dict(title='x')}), 'title is none of a port'),
        (dict(hostRequirements=dict(memory='8 GB')), 'memory is no size'),
    ],
)
def test_a_fault_of_the_container_is_found(planted, found):
    assert found in container_faults(dict(image='a') | planted)
    assert container_faults({}) == ['image is required']


@pytest.fixture
def binder(tmp_path):
    "A clone as Binder has it, whose `make` has only to link what is installed here; how a command is run by Binder's start."
    repo = tmp_path / 'repo'
    shutil.copytree(BINDER, repo / '.binder')
    (repo / 'Makefile').write_text('.venv/installed:\n\ttouch $@\n')
    venv.create(repo / '.venv')
    (site,) = (repo / '.venv').glob('lib/python*/site-packages')
    (site / 'here.pth').write_text(sysconfig.get_path('purelib'))
    subprocess.run([repo / '.binder' / 'postBuild'], cwd=repo, check=True, capture_output=True)
    env = {k: v for k, v in os.environ.items() if k != 'JUPYTER_PATH'} | dict(REPO_DIR=str(repo))

    def started(code):
        call = [repo / '.binder' / 'start', sys.executable, '-c', code]
        return json.loads(
            subprocess.run(call, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
        )

    return repo, started


KERNEL = """
import json
from jupyter_client.manager import run_kernel
from jupyter_core.paths import jupyter_path
with run_kernel(kernel_name='python3') as client:
    said = []
    hook = lambda m: said.append(m['content'].get('text', ''))
    client.execute_interactive('import sys, os; print(sys.prefix); print(os.environ["PATH"])', output_hook=hook, timeout=60)
print(json.dumps([''.join(said).split(chr(10)), jupyter_path('labextensions')]))
"""


def test_binder_runs_the_notebooks_in_the_projects_environment(binder):
    "The kernel that every notebook names is the environment's, its commands come first, and its widgets are found."
    repo, started = binder
    (prefix, path, *_), labextensions = started(KERNEL)
    assert Path(prefix) == repo / '.venv' and path.split(':')[0] == str(repo / '.venv' / 'bin')
    assert set(os.environ['PATH'].split(':')) <= set(path.split(':')), 'the rest of PATH stays'
    assert labextensions[0] == str(repo / '.venv' / 'share' / 'jupyter' / 'labextensions')
    assert (Path(sys.prefix) / 'share' / 'jupyter' / 'labextensions' / 'anywidget').is_dir()


def test_binder_takes_the_python_and_the_lock_of_the_project():
    assert (BINDER / 'runtime.txt').read_text().strip() == f'python-{SETTINGS["min_python"]}'
    assert {f.name for f in BINDER.iterdir()} == {'runtime.txt', 'postBuild', 'start'}, 'more would be installed twice'
    assert not (ROOT / 'binder').exists(), 'repo2docker refuses both'
    assert 'make .venv/installed' in (BINDER / 'postBuild').read_text()
    for f in ('postBuild', 'start'):
        assert (BINDER / f).read_text().startswith('#!/') and os.access(BINDER / f, os.X_OK)


def test_the_lines_for_colab_bring_a_page_its_project(tmp_path):
    "Without what pip does: the clone is where the library is imported from and what paths count from."
    cells = json.loads((ROOT / 'nbs' / 'appendix' / 'machine' / 'running.ipynb').read_text())['cells']
    page = '\n'.join(''.join(c['source']) for c in cells)
    (lines,) = [t.strip().splitlines() for t in re.findall(r'```\n(.*?)```', page, re.S) if '%pip' in t]
    clone, cd, pip = lines
    assert (
        clone.split()[-1] == SETTINGS['git_url']
        and f'mybinder.org/v2/gh/{SETTINGS["user"]}/{SETTINGS["repo"]}/' in page
    )
    (extra,) = re.findall(r'^%pip install -q -e "\.\[(\w+)\]"$', pip)
    assert f'{extra}_requirements' in SETTINGS
    tree = tmp_path / 'cxrpaper'
    shutil.copytree(ROOT / 'cxrpaper', tree / 'cxrpaper', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'settings.ini', tree)
    subprocess.run('git init -q . && git add -A', shell=True, cwd=tree, check=True)
    subprocess.run('git -c user.name=a -c user.email=a@b commit -qm a', shell=True, cwd=tree, check=True)
    ask = 'import cxrpaper, cxrpaper.runs; print(cxrpaper.__file__, cxrpaper.runs.resolve("config"), sep="\\n")'
    (there := tmp_path / 'content').mkdir()
    run = '\n'.join([clone.replace(SETTINGS['git_url'], str(tree)), cd, ask])
    (there / 'page.ipy').write_text(run)
    call = [sys.executable, '-m', 'IPython', '--no-banner', 'page.ipy']
    r = subprocess.run(call, cwd=there, capture_output=True, text=True, env=os.environ | dict(IPYTHONDIR=str(tmp_path)))
    assert r.stdout.split() == [
        str(there / 'cxrpaper' / 'cxrpaper' / '__init__.py'),
        str(there / 'cxrpaper' / 'config'),
    ], r
