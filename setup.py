"Packaging from settings.ini, the one place for metadata and direct requirements."

from configparser import ConfigParser

from setuptools import find_packages, setup

settings = ConfigParser(interpolation=None)
settings.read('settings.ini', encoding='utf-8')
s = settings['DEFAULT']
setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    author=s['author'],
    author_email=s['author_email'],
    license='Apache-2.0',
    url=s['git_url'],
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=['cxrpaper*']),
    install_requires=s['requirements'].split(),
    extras_require=dict(dev=s['dev_requirements'].split()),
    entry_points={
        'nbdev': [f"{s['lib_name']}={s['lib_name']}._modidx:d"],
        'console_scripts': s['console_scripts'].split(),
        'papermill.engine': ['cxr-job=cxrpaper.jobs:Engine'],
        'jupyter_client.kernel_provisioners': ['cxr-warm=cxrpaper.warm:provisioner'],
    },
)
