"Jobs as copies of a warm process: what they do is what a job started from nothing does."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from cxrpaper.runs import KERNELS
from cxrpaper.warm import SOCKET

BIN = Path(sys.executable).parent
LIGHT = ('papermill.cli', 'papermill.execute', 'ipykernel.kernelapp', 'matplotlib.pyplot')
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='copies are made on Linux only')
ONE = {f'{k}_NUM_THREADS': '1' for k in ('OMP', 'MKL', 'OPENBLAS')}


def environment(**more):
    e = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
    return e | ONE | KERNELS | dict(PATH=f"{BIN}:{os.environ['PATH']}") | more


@pytest.fixture(scope='module')
def socket_of(tmp_path_factory):
    "A warm process with few libraries, as long as the tests of this file run."
    d = tmp_path_factory.mktemp('warm')
    code = f"from cxrpaper.warm import warm; warm(['sh', '-c', 'echo ${SOCKET} >{d}/socket; exec sleep 600'], {LIGHT})"
    p = subprocess.Popen([sys.executable, '-c', code], env=environment())
    while not (d / 'socket').exists() or not (d / 'socket').read_text():
        assert p.poll() is None
        time.sleep(0.05)
    yield (d / 'socket').read_text().strip()
    p.terminate()
    assert p.wait(10) == 128 + signal.SIGTERM  # as the command ended
    assert not Path((d / 'socket').read_text().strip()).exists()


def page(file, *cells):
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='', language='python')))
    nb.cells = [nbformat.v4.new_code_cell(s) for s in cells]
    nbformat.write(nb, file)
    return file


def run(file, out, **more):
    command = [BIN / 'cxr_papermill', '--no-progress-bar', '--log-level', 'WARNING', file, out]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True)


def shown(out):
    "The texts and the kinds of data that the cells show."
    outputs = [o for c in json.loads(out.read_text())['cells'] for o in c['outputs']]
    return ''.join(''.join(o.get('text', ())) for o in outputs), {k for o in outputs for k in o.get('data', ())}


HOW = "import sys; print('matplotlib' in sys.modules)"  # before any import: of a copy it is


def test_a_copy_does_what_a_fresh_job_does(socket_of, tmp_path):
    f = page(
        tmp_path / 'a.ipynb',
        HOW,
        "import os; print(os.getcwd(), os.environ['GIVEN'], sys.argv[0].endswith('.py') or sys.argv[0])",
        'import matplotlib.pyplot as plt; plt.plot([1, 2]);',
        'import numpy as np; print(np.random.rand())',
    )
    results = {}
    for name, at in (('warm', socket_of), ('again', socket_of), ('cold', '/no/such/socket')):
        r = run(f, tmp_path / f'{name}.ipynb', **{SOCKET: at, 'GIVEN': name})
        assert r.returncode == 0, r.stderr
        results[name], kinds = shown(tmp_path / f'{name}.ipynb')
        assert 'image/png' in kinds
        assert f'{os.getcwd()} {name}' in results[name]
    assert [results[k].startswith('True') for k in ('warm', 'again', 'cold')] == [True, True, False]
    assert results['warm'].split()[-1] != results['again'].split()[-1]  # copies draw other random numbers


def test_an_error_is_the_same_error(socket_of, tmp_path):
    f = page(tmp_path / 'a.ipynb', "raise ValueError('as planned')")
    warm, cold = (
        run(f, tmp_path / f'{k}.ipynb', **{SOCKET: at}) for k, at in (('w', socket_of), ('c', '/no/such/socket'))
    )
    assert (warm.returncode, cold.returncode) == (1, 1)
    assert 'ValueError: as planned' in warm.stderr and 'ValueError: as planned' in cold.stderr
    missing = run(tmp_path / 'none.ipynb', tmp_path / 'out.ipynb', **{SOCKET: socket_of})
    assert missing.returncode == 1 and 'none.ipynb' in missing.stderr


def test_other_threads_or_kernels_of_the_processor_start_cold(socket_of, tmp_path):
    f = page(tmp_path / 'a.ipynb', HOW, "import os; print(os.environ['OMP_NUM_THREADS'])")
    for more, want in (
        (dict(OMP_NUM_THREADS='2'), 'False'),
        (dict(ATEN_CPU_CAPABILITY='default'), 'False'),
        ({}, 'True'),
    ):
        assert run(f, tmp_path / 'o.ipynb', **{SOCKET: socket_of}, **more).returncode == 0
        assert shown(tmp_path / 'o.ipynb')[0].split() == [want, more.get('OMP_NUM_THREADS', '1')]


def test_edited_code_is_the_code_that_runs(socket_of, tmp_path):
    module, f = (
        tmp_path / 'edited_for_a_test.py',
        page(tmp_path / 'a.ipynb', HOW, 'import edited_for_a_test as e; print(e.x)'),
    )
    for x in (1, 2):
        module.write_text(f'x = {x}  # {"-" * x}\n')  # of another length, so that compiled code is not taken for it
        r = subprocess.run(
            [BIN / 'cxr_papermill', '--no-progress-bar', f, tmp_path / 'o.ipynb'],
            env=environment(**{SOCKET: socket_of}),
            cwd=tmp_path,
            capture_output=True,
        )
        assert r.returncode == 0 and shown(tmp_path / 'o.ipynb')[0].split() == ['True', str(x)]


def test_who_asked_is_killed_and_nothing_goes_on(socket_of, tmp_path):
    "Neither papermill nor the kernel; and the lock that it was given holds until then."
    told = tmp_path / 'pids'
    f = page(
        tmp_path / 'a.ipynb', f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid()))", 'time.sleep(300)'
    )
    lock = tmp_path / 'lock'
    command = f'exec 8>{lock}; flock 8; exec {BIN}/cxr_papermill --no-progress-bar {f} {tmp_path}/o.ipynb'
    p = subprocess.Popen(['bash', '-c', command], env=environment(**{SOCKET: socket_of}), stderr=subprocess.DEVNULL)
    while not told.exists() or not told.read_text():
        assert p.poll() is None
        time.sleep(0.05)
    kernel = psutil.Process(int(told.read_text()))
    assert os.getsid(kernel.pid) == kernel.pid  # Ctrl-C in the terminal does not reach it
    holders = lambda: [q for q in psutil.process_iter() if q.pid != p.pid and _holds(q, lock)]
    assert len(holders()) == 1
    p.kill()
    p.wait()
    deadline = time.time() + 20
    while (kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE) or holders():
        assert time.time() < deadline, 'it goes on'
        time.sleep(0.1)


def _holds(process, file):
    try:
        return any(os.path.samefile(f.path, file) for f in process.open_files() if os.path.exists(f.path))
    except psutil.Error:
        return False


def test_what_is_imported_starts_no_thread_and_is_enough():
    "After it a training imports little; and no code of this project is among it."
    code = (
        'import os, sys\nfrom cxrpaper.warm import LIBRARIES, warm_up\nwarm_up()\n'
        "print(len(os.listdir('/proc/self/task')), sum(m not in sys.modules for m in LIBRARIES))\n"
        "print([m for m in sys.modules if m.startswith('cxrpaper.')])\n"
        'n = len(sys.modules)\nimport cxrpaper.training.finetune, cxrpaper.questions.readiness\n'
        "print(len([m for m in list(sys.modules)[n:] if not m.startswith('cxrpaper')]))"
    )
    r = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    threads, own, further = r.stdout.splitlines()
    assert threads == '1 0' and own == "['cxrpaper.warm']" and int(further) < 60, r.stdout + r.stderr


def test_either_is_imported_first():
    "papermill asks this package for its engine while it is itself being imported."
    for first, second in (('cxrpaper.jobs', 'papermill.engines'), ('papermill.engines', 'cxrpaper.jobs')):
        code = f"import {first}, {second}; print('cxr-job' in papermill.engines.papermill_engines._engines)"
        r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert r.stdout == 'True\n', r.stderr
