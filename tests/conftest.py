import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(Path(__file__).parent))


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


@pytest.fixture
def kills(request):
    return request.config.getoption('kills')


def pytest_configure(config):
    config.addinivalue_line(
        'markers',
        'serial: depends on how long things take, so that nothing may run beside it; `make test` runs these last, one by one',
    )
