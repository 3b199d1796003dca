import os, sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(Path(__file__).parent))

def pytest_addoption(parser):
    parser.addoption('--scale', action='store_true', help='all of SIIM, 6,334 images with phantoms as pixels (tests/test_scale.py): about ten minutes')

def pytest_configure(config):
    config.addinivalue_line('markers', 'serial: depends on how long things take, so that nothing may run beside it; `make test` runs these last, one by one')
