"Packaging from settings.ini, the one place for metadata and direct requirements."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(interpolation=None)
settings.read('settings.ini', encoding='utf-8')
s = settings['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in s.items() if k.endswith('_requirements')}
development = extras.pop('dev')
# links of README.md hold on any page that shows it
readme = Path('README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!\[[^\]]*\]\()(?!https?:)', rf'\1{s["git_url"]}/raw/{s["branch"]}/', readme)
readme = re.sub(r'(?<!!)(\[[^\]]*\]\()(?!https?:|#)', rf'\1{s["git_url"]}/blob/{s["branch"]}/', readme)
STATUS = dict(enumerate('Planning Pre-Alpha Alpha Beta Production/Stable Mature Inactive'.split(), 1))
setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=s['author'],
    author_email=s['author_email'],
    keywords=s['keywords'].split(),
    license='Apache-2.0',
    license_files=['LICENSE'],
    url=s['git_url'],
    project_urls=dict(Documentation=s['doc_host'] + s['doc_baseurl']),
    classifiers=[
        f'Development Status :: {s["status"]} - {STATUS[int(s["status"])]}',
        f'Intended Audience :: {s["audience"]}',
        'Intended Audience :: Science/Research',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        f'Natural Language :: {s["language"]}',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: 3.{k}' for k in range(int(s['min_python'].split('.')[1]), 14)),
    ],
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=['cxrpaper*']),
    install_requires=s['requirements'].split(),
    extras_require=extras | dict(all=sum(extras.values(), []), dev=development),
    entry_points={
        'nbdev': [f"{s['lib_name']}={s['lib_name']}._modidx:d"],
        'console_scripts': s['console_scripts'].split(),
        'papermill.engine': ['cxr-job=cxrpaper.jobs:Engine'],
        'jupyter_client.kernel_provisioners': ['cxr-warm=cxrpaper.warm:provisioner'],
    },
)
