"Print the direct requirements of settings.ini, those of the core and of every extra, one a line: what `make lock` compiles and what test_environment.py checks."

from configparser import ConfigParser
from pathlib import Path


def direct_requirements(path=Path(__file__).parent.parent / 'settings.ini'):
    settings = ConfigParser(interpolation=None)
    settings.read(path, encoding='utf-8')
    return [r for k, v in settings['DEFAULT'].items() if k.endswith('requirements') for r in v.split()]


if __name__ == '__main__':
    print('\n'.join(direct_requirements()))
