"""Pages are stored with what their code shows: python tests/website/stored.py [--all] nbs/appendix/*/*.ipynb executes those that are not.

A stored page keeps a digest of its code cells and of their outputs. A changed cell, or an output from elsewhere, makes the page stale; prose,
comments and layout do not. Code of other pages is left out: with what a page reaches by name in the package, one ordinary change made
30 to 60 of 81 pages stale, and a function is shown at work on the page that exports it. `--all` is for those.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor, as_completed
from configparser import ConfigParser
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb

from cxrpaper.paper.contents import without_widgets
from cxrpaper.runs import atomic, code_text, digest

ROOT = Path(__file__).resolve().parents[2]
NOTED = 'doc'  # the place in a notebook's metadata that nbdev_clean leaves alone
LARGEST = 1_000_000  # bytes of a page
LOCAL = re.compile(r'(?<![\w.~-])/(?:tmp|home|root|Users|private|var/folders)/\w[^\s"\'\\]*')


def code_cells(nb: dict) -> list:
    return [c for c in nb['cells'] if c['cell_type'] == 'code']


def directive(cell: dict, name: str) -> bool:
    "Whether the cell says `#| name` among its first lines."
    return bool(re.search(rf'\A(?:#\|.*\n)*#\| ?{name}\b', ''.join(cell['source'])))


def computes(cell: dict) -> str:
    "What computes in a cell: no comment, no docstring, one layout."
    text = ''.join(cell['source'])
    try:
        return code_text(text)
    except SyntaxError:  # IPython's own % and !
        return text


def page_digest(nb: dict) -> str:  # 64 hex digits
    "Digest of what a page's cells compute and of what is stored below them."
    return digest([[computes(c), c['outputs']] for c in code_cells(nb)])


def stale(page: Path) -> str | None:  # why
    "What keeps the stored outputs of a page from being those of its code."
    nb = json.loads(Path(page).read_text(encoding='utf-8'))
    noted = nb['metadata'].get(NOTED, {}).get('stored')
    if code_cells(nb) and noted is None:
        return 'was never stored'
    if code_cells(nb) and noted != page_digest(nb):
        return 'has stored outputs that are not of its code'


def texts(output: dict) -> list:  # what an output says
    data = [v for k, v in output.get('data', {}).items() if not k.startswith('image/')]
    said = [''.join(t) for t in [*data, output.get('text', '')] if isinstance(t, (str, list))]
    return [re.sub(r'base64,[\w+/=]+', '', s) for s in said]


def faults(nb: dict, also=()) -> list:  # also: further words that no output may say
    "What no page may store: errors, warnings, progress bars, paths of the machine that it was executed on, more than a megabyte."
    out = []
    for c in code_cells(nb):
        for o in c['outputs']:
            said = '\n'.join(texts(o))
            if o['output_type'] == 'error' or o.get('name') == 'stderr':
                out.append((c['id'], f'an error or a warning is shown: {(said or o.get("evalue", ""))[:200]}'))
            if bar := re.search(r'\d+%\|', said):
                out.append((c['id'], f'a progress bar is shown: {bar[0]}'))
            out += [(c['id'], f'a place on this machine is shown: {m}') for m in LOCAL.findall(said)[:1]]
            out += [(c['id'], f'{w} is shown') for w in also if re.search(rf'(?<![\w-]){re.escape(w)}(?![\w-])', said)]
    size = len(json.dumps(nb, indent=1, ensure_ascii=False).encode())
    return out + ([('', f'{size:,} bytes, at most {LARGEST:,}')] if size > LARGEST else [])


# ---- executed and stored


@contextmanager
def workplace(page: Path):
    "A copy of the page in a copy of the project, so that no run or study that lies here gets into what the page shows; phantoms are shared."
    if not page.is_relative_to(ROOT):
        yield page, {}
        return
    listed = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0')
    with tempfile.TemporaryDirectory() as d:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (Path(d) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(d) / name)
        for name in ('data/phantom', 'data/stores'):
            (ROOT / name).mkdir(parents=True, exist_ok=True)
            (Path(d) / name).parent.mkdir(exist_ok=True)
            (Path(d) / name).symlink_to(ROOT / name)
        (Path(d) / '.git').symlink_to(ROOT / '.git')
        yield Path(d) / page.relative_to(ROOT), dict(PYTHONPATH=d, GIT_OPTIONAL_LOCKS='0')


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def executed(page: Path, has_gpu: bool) -> tuple:  # notebook as a dict, notes
    "A page after its cells ran; what needs a GPU keeps what it showed where there is none; warnings become notes."
    before, notes = json.loads(page.read_text(encoding='utf-8')), []
    nb = nbformat.reads(json.dumps(before), as_version=4)
    for c in code_cells(nb):
        if directive(c, 'eval: *false'):
            c.outputs = []
            c.metadata['tags'] = [*c.metadata.get('tags', []), 'skip-execution']
    with workplace(page) as (at, env):
        how = dict(timeout=None, kernel_name='python3', coalesce_streams=True)
        client = NotebookClient(nb, resources=dict(metadata=dict(path=at.parent)), **how)
        client.execute(env=os.environ | env)
    nb = json.loads(nbformat.writes(nb))
    nb['metadata'] = dict(before['metadata'])
    held = dict(before['metadata'].get(NOTED, {}).get('gpu', {}))  # cell -> digest of the code that a GPU executed
    was = {c['id']: c for c in before['cells']}
    for c in code_cells(nb):
        c['metadata'] = was[c['id']]['metadata']
        warned = [''.join(o['text']) for o in c['outputs'] if o.get('name') == 'stderr']
        c['outputs'] = [o for o in c['outputs'] if o.get('name') != 'stderr']
        notes += [
            f'cell {c["id"]} warns, which is not stored: {" ".join(w.split())[-300:]}' for w in warned if w.strip()
        ]
        code = digest(computes(c))
        if directive(c, 'cuda') and has_gpu:
            held[c['id']] = code
        elif held.pop(c['id'], None) == code:
            c['outputs'], held[c['id']] = was[c['id']]['outputs'], code
            notes.append(f'cell {c["id"]} needs a GPU: it keeps what it showed')
    nb['metadata'][NOTED] = dict(gpu=held) if held else {}
    return nb, notes


def steady(nb: dict) -> dict:
    "Without what each execution draws anew: names of temporary folders, and the identifiers of pandas' styled tables."
    drawn = re.compile(rf'(?:{re.escape(tempfile.gettempdir())}|\.\.)/tmp\w{{8}}(?!\w)')
    for c in code_cells(nb):
        same = lambda s, k=c['id']: re.sub(r'(?<![a-zA-Z])T_[0-9a-f]{5}(?=["_ ])', f'T_{k[:5]}', drawn.sub('...', s))
        for o in c['outputs']:
            for held in (o, o.get('data', {})):
                for kind in ('text', 'text/plain', 'text/html', 'text/markdown'):
                    if kind in held:
                        held[kind] = [same(s) for s in held[kind]]
    return nb


def cleaned(nb: dict) -> dict:
    "As `nbdev_clean` leaves a page, without widgets."
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    nb = dict2nb(without_widgets(steady(nb)))
    clean_nb(nb, allowed_cell_metadata_keys=settings['DEFAULT']['allowed_cell_metadata_keys'].split())
    return nb


def store(page: Path, has_gpu: bool = False) -> list:  # notes
    "Execute a page and store it with its digest, whole or not at all; an error or a fault of what it shows is raised."
    was = page.read_bytes()
    nb, notes = executed(page, has_gpu)
    nb = cleaned(nb)
    if wrong := faults(nb, [str(ROOT), str(Path.home()), socket.gethostname()]):
        raise ValueError('; '.join(f'cell {where}: {what}' for where, what in wrong[:3]))
    if page.read_bytes() != was:
        raise ValueError('somebody has changed the page while it was executed')
    with atomic(page) as tmp:
        write_nb(nb, tmp)
        nb = json.loads(tmp.read_text(encoding='utf-8'))
        nb['metadata'][NOTED] = dict(nb['metadata'][NOTED], stored=page_digest(nb))
        tmp.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    return notes


def attempt(page: Path, has_gpu: bool) -> tuple:  # page, error or None, notes, seconds
    start = time.monotonic()
    try:
        return page, None, store(page, has_gpu), time.monotonic() - start
    except CellExecutionError as e:
        said = re.sub(r'\x1b\[[\d;]*m', '', str(e)).strip().splitlines()
        return page, '\n    '.join(['a cell fails', *said[-6:]]), [], time.monotonic() - start
    except Exception as e:
        return page, f'{type(e).__name__}: {e}', [], time.monotonic() - start


def main(args=None) -> int:  # pages that could not be stored
    p = ArgumentParser(description='execute pages whose stored outputs are not those of their code, and store them')
    p.add_argument('pages', nargs='+', type=Path)
    p.add_argument('--all', action='store_true', help='the others too')
    p.add_argument('--at-once', type=int, default=2)
    a = p.parse_args(args)
    pages = [p.resolve() for p in a.pages]
    todo = [p for p in pages if code_cells(json.loads(p.read_text(encoding='utf-8'))) and (a.all or stale(p))]
    print(f'{len(todo)} of {len(pages)} pages to execute', flush=True)
    failed, has_gpu = 0, any('#| cuda' in p.read_text(encoding='utf-8') for p in todo) and gpu()
    os.environ.update(
        {f'{k}_NUM_THREADS': '1' for k in ('OMP', 'MKL', 'OPENBLAS')}, PYTHONWARNINGS='ignore', TQDM_DISABLE='1'
    )
    os.environ.pop('MPLBACKEND', None)
    with ProcessPoolExecutor(a.at_once, mp_context=get_context('spawn')) as pool:
        jobs = [pool.submit(attempt, p, has_gpu) for p in todo]
        for i, job in enumerate(as_completed(jobs), 1):
            page, error, notes, seconds = job.result()
            size, failed = page.stat().st_size, failed + (error is not None)
            said = f'FAILED, what was stored is left as it was: {error}' if error else f'{size / 1000:,.0f} kB'
            name = os.path.relpath(page, ROOT)
            print(f'[{i}/{len(todo)}] {name}: {seconds:.0f} s, {said}', *notes, sep='\n    ', flush=True)
    return failed


if __name__ == '__main__':
    sys.exit(bool(main()))
