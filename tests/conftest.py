import os
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
from hypothesis import settings

HERE, BIN = Path(__file__).resolve().parent, Path(sys.executable).parent
os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(HERE))


def pytest_addoption(parser):
    parser.addoption(
        '--scale',
        action='store_true',
        help='all of SIIM, 6,334 images with phantoms as pixels (tests/test_scale.py): about ten minutes',
    )
    parser.addoption(
        '--kills',
        type=int,
        default=0,
        help='kill a small study so often while it is made from nothing (tests/test_study.py): takes twice as long as the study',
    )

    parser.addoption(
        '--fuzz',
        type=int,
        default=60,
        help='damaged inputs for each reader in tests/test_fuzz.py; 20,000 take about an hour',
    )


@pytest.fixture
def kills(request):
    return request.config.getoption('kills')


def pytest_configure(config):
    settings.register_profile(
        'here', max_examples=config.getoption('--fuzz'), deadline=None, derandomize=config.getoption('--fuzz') == 60
    )
    settings.load_profile('here')
    config.addinivalue_line(
        'markers',
        'serial: depends on how long things take, so that nothing may run beside it; `make test` runs these last, one by one',
    )
    config.addinivalue_line(
        'markers', 'long: trains, runs whole studies or installs; `make test-quick` leaves these out'
    )


# files whose tests take more than half a minute together, most of it in notebooks and trainings; the longest first, so that two workers end together
LONG = 'study parameters moco finetune pretraining store baselines fuzz phantom difficulty robustness environment lab privacy slurm benchmark'.split()


SOON = 'graph warm models'.split()  # they train nothing, and start many processes or networks


def pytest_collection_modifyitems(items):
    place = {f'test_{k}': i for i, k in enumerate(LONG + SOON)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem.removeprefix('test_') in LONG:
            item.add_marker('long')


@contextmanager
def warmed(env):
    "This environment of `make paper` with a process that has imported PyTorch and the rest: `cxr_papermill` and kernels are copies of it."
    from cxrpaper.runs import KERNELS
    from cxrpaper.warm import SOCKET

    env = {k: v for k, v in env.items() if k != 'MPLBACKEND'} | KERNELS
    env |= {f'{k}_NUM_THREADS': '1' for k in ('OMP', 'MKL', 'OPENBLAS')} | dict(PATH=f"{BIN}:{os.environ['PATH']}")
    command = [*([BIN / 'cxr_warm'] if sys.platform == 'linux' else []), 'sh', '-c', f'echo "${SOCKET}"; exec cat']
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        yield env | {SOCKET: p.stdout.readline().strip()}
        p.stdin.close()  # cat ends, and with it the process


@pytest.fixture(scope='session')
def warm():
    with warmed(os.environ) as env:
        yield env


@pytest.fixture(scope='session')
def fork():
    "Starts a function in a copy of one process that has imported what trains: who kills a training does not wait for PyTorch each time."
    copies = get_context('forkserver')
    copies.set_forkserver_preload([f'cxrpaper.training.{k}' for k in ('finetune', 'moco', 'inpainting')])
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', os.pathsep.join([str(HERE.parent), str(HERE)]))
        forkserver.ensure_running()

    def start(f, *args):
        p = copies.Process(target=f, args=args)
        p.start()
        return p

    return start
