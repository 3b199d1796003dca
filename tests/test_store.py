"""The store: geometry, address, resume, concurrency, memory, bad files."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from multiprocessing import forkserver, get_context
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from siim_tree import wrap, write_siim_tree

from cxrpaper.data import store as S
from cxrpaper.data.cohort import load_cohort
from cxrpaper.data.dicom import read_radiograph
from cxrpaper.data.phantom import Exposure, dicom_header, draw_radiograph, write_dicom
from cxrpaper.data.store import boxes_mask, build_store, open_store, read_mask, squash, to_original, to_store
from cxrpaper.runs import InputError, project_root
from cxrpaper.schema import CLASSES

REAL = project_root().parent / 'shared' / 'data' / 'real_cxr'
needs_real = pytest.mark.skipif(
    not (REAL / 'index.csv').exists(), reason='the real radiographs of shared/data/real_cxr are not on this machine'
)


def picture(seed, h=90, w=110):
    "A smooth random frame of 8 bits."
    x = np.random.default_rng(seed).random((9, 11), dtype=np.float32)
    return np.rint(255 * cv2.resize(x, (w, h))).astype(np.uint8)


def make_cohort(root, n=12, **changes):
    "A tiny cohort of PNG files (every third one DICOM) with the columns of the real one."
    root = Path(root)
    (root / 'img').mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        name, h, w = f'{i:012x}', 80 + i % 7, 100 + i % 5
        path = f'img/{name}.' + ('dcm' if i % 3 == 2 else 'png')
        if not (root / path).exists():
            if i % 3 == 2:
                wrap(picture(i, h, w), name, name, i).save_as(root / path, enforce_file_format=True)
            else:
                cv2.imwrite(str(root / path), picture(i, h, w))
        boxes = [(10.25, 20.5, 30, 25.75), (60.0, 30.0, 20.0, 40.0)][: i % 3]
        rows.append(
            dict(
                image=f'{name}_image',
                study=name,
                patient=f'{i // 2:05d}',
                group=f'{i // 2:05d}',
                path=path,
                label=i % 4,
                boxes=boxes,
                annotated=True,
                height=float(h),
                width=float(w),
                view='PA',
                sex='unknown',
                age=float('nan') if i % 2 else 50 + i / 10,
                detector='d',
                source='test',
                photometric='MONOCHROME2',
                mask_path='',
            )
        )
    return SimpleNamespace(images=pd.DataFrame(rows).assign(**changes), root=root, name='tiny')


def contents(path):
    return {f.name: f.read_bytes() for f in sorted(Path(path).iterdir())}


def script(code, *args, **kw):
    "Start Python on a script that may spawn workers."
    file = Path(args[0]).parent / f'script{time.monotonic_ns()}.py'
    file.write_text(textwrap.dedent(code))
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(project_root()), str(Path(__file__).parent)]), OMP_NUM_THREADS='1'
    )
    return subprocess.Popen(
        [sys.executable, str(file), *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


BUILD = '''
import sys
if __name__ == '__main__':
    from test_store import make_cohort
    from cxrpaper.data.store import build_store
    root, out, n, px, workers = sys.argv[1:]
    print(build_store(make_cohort(root, int(n)), int(px), out, int(workers)).pixels_sha256)
'''


def build_quietly(said, root, out, n, px):
    said.send('imports are over')
    build_store(make_cohort(root, n), px, out, workers=0)


@pytest.fixture(scope='module')
def start():
    "Start a build in a process that has imported everything already (a forkserver); returns when it begins."
    quick = get_context('forkserver')
    quick.set_forkserver_preload(['cxrpaper.data.store', 'test_store'])
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(project_root()), str(Path(__file__).parent)])
    forkserver.ensure_running()
    os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)

    def begin(*args):
        hear, say = quick.Pipe(False)
        p = quick.Process(target=build_quietly, args=(say, *args))
        p.start()
        say.close()
        hear.recv()
        return p

    return begin


@pytest.fixture
def tiny(tmp_path):
    return make_cohort(tmp_path / 'cohort')


# ---- geometry


def planted(rng, lo=5):
    "A frame of random odd size with one bright box, and a random side of the store."
    h, w, px = (int(n) for n in rng.integers([30, 30, 16], [400, 400, 96]))
    bw, bh = int(rng.integers(w // 5 + 1, w // 2)), int(rng.integers(h // 5 + 1, h // 2))
    x, y = int(rng.integers(0, w - bw + 1)), int(rng.integers(0, h - bh + 1))
    frame = np.zeros((h, w), np.float32)
    frame[y : y + bh, x : x + bw] = 1
    return frame, (x, y, bw, bh), px


def disagreement(image, mask):
    "Pixels that are clearly brighter or darker than one half and on the wrong side of the mask."
    return int(((image > 0.5 + 1e-3) & (mask == 0)).sum() + ((image < 0.5 - 1e-3) & (mask == 1)).sum())


def test_a_planted_rectangle_coincides_with_its_mask():
    rng, shifted = np.random.default_rng(0), 0
    for _ in range(300):
        frame, box, px = planted(rng)
        image = squash(frame, px)
        assert image.shape == (px, px)
        assert disagreement(image, boxes_mask([box], *frame.shape, px)) <= 4, (
            frame.shape,
            box,
            px,
        )  # at most the four corners
        moved = to_original(to_store([box], *frame.shape, px) + [1, 0, 0, 0], *frame.shape, px)
        shifted += disagreement(image, boxes_mask(moved, *frame.shape, px)) > 4
    assert shifted > 290  # one store pixel aside is seen


def test_fractions_of_a_pixel_count():
    rng = np.random.default_rng(1)
    for _ in range(200):
        h, w, px = (int(n) for n in rng.integers([20, 20, 8], [300, 300, 64]))
        x, y = rng.uniform(0, [w / 2, h / 2])
        bw, bh = rng.uniform([1.5 * w / px, 1.5 * h / px], [w / 2, h / 2])
        (sx, sy, sw, sh), i = to_store([(x, y, bw, bh)], h, w, px)[0], np.arange(px)
        cover = lambda a, n: np.clip(np.minimum(i + 1, a + n) - np.maximum(i, a), 0, 1)
        mask = boxes_mask([(x, y, bw, bh)], h, w, px)
        assert (mask == np.outer(cover(sy, sh) >= 0.5, cover(sx, sw) >= 0.5)).all()
    half = [boxes_mask([(x, 0, 40, 100)], 100, 100, 10)[0].nonzero()[0].tolist() for x in (20, 24.9, 25.1, 30)]
    assert half == [[2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6]]


def test_thin_and_clipped_boxes_never_vanish():
    for box in [
        (50, 50, 0.01, 0.01),
        (0, 0, 0.01, 0.01),
        (99.99, 99.99, 0.01, 0.01),
        (-50, -50, 50.2, 50.2),
        (99.9, 0, 500, 100),
        (0, 33.3, 100, 1),
    ]:
        mask = boxes_mask([box], 100, 100, 7)
        assert mask.any() and mask.sum() <= 7, box
    assert boxes_mask([(0, 0, 100, 100)], 100, 100, 7).all() and not boxes_mask([], 100, 100, 7).any()
    two = [(0, 0, 60, 100), (40, 0, 60, 100)]
    assert boxes_mask(two, 100, 100, 10).max() == 1 and boxes_mask(two, 100, 100, 10).all()


def test_boxes_go_there_and_back():
    rng = np.random.default_rng(2)
    boxes = rng.uniform(0, 1000, (50, 4))
    assert np.allclose(to_original(to_store(boxes, 3001, 2337, 97), 3001, 2337, 97), boxes, rtol=1e-14)
    assert not np.allclose(to_store(boxes, 3001, 2337, 97), to_store(boxes, 2337, 3001, 97))


def test_squash_keeps_means_range_and_position():
    rng = np.random.default_rng(3)
    for h, w, px in [(301, 233, 64), (19, 23, 64), (500, 20, 64), (64, 64, 64), (128, 64, 32)]:
        x = rng.random((h, w), dtype=np.float32)
        y = squash(x, px)
        assert y.dtype == np.float32 and x.min() <= y.min() and y.max() <= x.max()
    ramp = np.tile(np.arange(640, dtype=np.float32) + 0.5, (10, 1))  # value = position of the centre
    assert np.allclose(squash(ramp, 64)[0], (np.arange(64) + 0.5) * 10, atol=1e-3)
    up = squash(ramp[:, :16], 64)[0]  # away from the border, where there is nothing to interpolate to
    assert np.allclose(up[2:-2], ((np.arange(64) + 0.5) / 4)[2:-2], atol=1e-3)


def test_golden_pixels_guard_the_version_of_the_geometry(tmp_path):
    "If this fails on purpose, raise GEOMETRY: stores of the old pixels must not be reused."
    y, x = np.mgrid[:96, :128]
    cv2.imwrite(str(tmp_path / 'ramp.png'), (257 * ((x * 2 + y * 3) % 255)).astype(np.uint16))
    job = dict(file=tmp_path / 'ramp.png', mask_file='', boxes=[(10.5, 7, 40, 30)], height=96, width=128)
    image, mask, h, w = S.decode(job, 16)
    assert (h, w, mask.sum(), S.GEOMETRY) == (96, 128, 25, 1)
    block = ((x * 2 + y * 3) % 255).astype(float).reshape(16, 6, 16, 8).mean((1, 3)) * 255 / 254
    assert np.abs(image - block).max() <= 0.51


# ---- masks drawn by people


def test_mask_rules(tmp_path):
    (tmp_path / 'masks_gb').mkdir()
    bits = np.array([[0, 1, 2, 4], [8, 12, 16, 32], [64, 127, 65, 9]], np.uint8)
    cv2.imwrite(str(tmp_path / 'masks_gb' / 'a.png'), bits)
    cv2.imwrite(str(tmp_path / 'a.png'), bits)
    cv2.imwrite(str(tmp_path / 'b.png'), np.uint8([[0, 255]]))
    assert read_mask(tmp_path / 'masks_gb' / 'a.png').tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]]
    assert read_mask(tmp_path / 'masks_gb' / 'a.png', bits=3).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert read_mask(tmp_path / 'b.png').tolist() == [[0, 1]]
    with pytest.raises(InputError, match='values besides 0'):
        read_mask(tmp_path / 'a.png')
    with pytest.raises(InputError, match='missing'):
        read_mask(tmp_path / 'c.png')


@needs_real
def test_real_masks_follow_their_image(tmp_path):
    index = pd.read_csv(REAL / 'index.csv', dtype={'uid': str}).set_index('uid')
    names = sorted(f.stem for f in (REAL / 'masks_gb').glob('*.png'))[:8]
    shutil.copytree(REAL / 'masks_gb', tmp_path / 'masks_gb')
    (tmp_path / 'images').mkdir()
    rows = []
    for n in names:
        shutil.copy(REAL / 'images' / f'{n}.jpg', tmp_path / 'images')
        rows.append(
            dict(
                image=n,
                path=f'images/{n}.jpg',
                boxes=[(0.0, 0.0, 10.0, 10.0)],
                height=float(index.h[n]),
                width=float(index.w[n]),
                mask_path=f'masks_gb/{n}.png',
            )
        )
    s = build_store(SimpleNamespace(images=pd.DataFrame(rows), root=tmp_path, name='gb'), 96, tmp_path / 's', workers=0)
    assert (s.index.mask_from == 'file').all()
    for i, n in enumerate(names):
        drawn = (cv2.imread(str(tmp_path / 'masks_gb' / f'{n}.png'), -1) & 12) > 0
        assert abs(s.masks[i].mean() - drawn.mean()) < 0.01
        y, x = (np.argwhere(s.masks[i]).mean(0) + 0.5) / 96
        yo, xo = (np.argwhere(drawn).mean(0) + 0.5) / drawn.shape
        assert abs(y - yo) < 0.01 and abs(x - xo) < 0.01
    with pytest.raises(InputError, match='geometry'):  # a mask of another image
        rows[0]['mask_path'] = (
            f'masks_gb/{next(n for n in names if index.w[n] * index.h[names[0]] != index.h[n] * index.w[names[0]])}.png'
        )
        build_store(
            SimpleNamespace(images=pd.DataFrame(rows), root=tmp_path, name='gb'), 96, tmp_path / 's2', workers=0
        )


# ---- what is in a store, and its name


def test_a_store_holds_what_the_cohort_says(tiny, tmp_path):
    s = build_store(tiny, 64, tmp_path / 's', workers=2)
    assert sorted(contents(s.path)) == ['images.npy', 'index.csv', 'masks.npy', 'store.json']
    assert (
        s.images.dtype == s.masks.dtype == np.uint8
        and isinstance(s.images, np.memmap)
        and s.images.shape == (12, 64, 64)
    )
    assert not s.images.flags.writeable and s.intact() and len(s) == 12
    for c in tiny.images:  # every column comes back as it was
        if c == 'boxes':
            assert [list(b) for b in s.index[c]] == [list(b) for b in tiny.images[c]]
        else:
            pd.testing.assert_series_equal(s.index[c], tiny.images[c], check_dtype=c not in ('boxes',))
    for i, r in tiny.images.iterrows():
        x = picture(i, int(r.height), int(r.width)).astype(np.float64)
        x = ((x - x.min()) / (x.max() - x.min())).astype(np.float32)
        assert np.abs(squash(x, 64) * 255 - s.images[i]).max() <= 0.51
        assert (s.masks[i] == boxes_mask(r.boxes, r.height, r.width, 64)).all()
        assert np.allclose(s.boxes(i), to_store(r.boxes, r.height, r.width, 64))
    again = pickle.loads(pickle.dumps(s))
    assert isinstance(again.images, np.memmap) and len(pickle.dumps(s)) < 1000
    assert contents(s.path) == contents(build_store(tiny, 64, tmp_path / 'elsewhere' / 's', workers=0).path)


def test_a_complete_store_is_returned_at_once(tiny, tmp_path, monkeypatch):
    s = build_store(tiny, 32, tmp_path / 's', workers=0)

    def never(*_):
        raise AssertionError('decoded twice')

    monkeypatch.setattr(S, 'decode_all', never)
    assert build_store(tiny, 32, tmp_path / 's').digest == s.digest
    with pytest.raises(AssertionError):
        build_store(tiny, 40, tmp_path / 't')


def test_the_name_follows_the_content(tiny, tmp_path):
    address = lambda cohort, px=32: S.digest(dict(px=px, table=S.store_table(cohort, px, tmp_path / 'd.json')))
    first = address(tiny)
    assert address(make_cohort(tmp_path / 'cohort')) == first  # the same again
    os.utime(tiny.root / tiny.images.path[0])
    assert address(tiny) == first  # touched
    shutil.copytree(tiny.root, tmp_path / 'moved')
    assert address(make_cohort(tmp_path / 'moved')) == first  # elsewhere
    different = {first, address(tiny, 33)}
    for change in (dict(label=0), dict(height=81.0), dict(patient='x'), dict(boxes=[[(1.0, 1.0, 5.0, 5.0)]] * 12)):
        different.add(address(make_cohort(tmp_path / 'cohort', **change)))
    different.add(address(SimpleNamespace(images=tiny.images.iloc[::-1], root=tiny.root, name='')))
    file = tiny.root / tiny.images.path[0]
    cv2.imwrite(str(file), 255 - cv2.imread(str(file), -1))
    different.add(address(tiny))
    assert len(different) == 8


def test_files_are_hashed_once(tiny, tmp_path, monkeypatch):
    files, cache = [tiny.root / p for p in tiny.images.path], tmp_path / 'd.json'
    old = time.time() - 100
    monkeypatch.setattr(S.time, 'time', lambda: old + 1000)
    first, read = S.file_digests(files, cache), []
    monkeypatch.setattr(S, 'file_digest', lambda f: read.append(f) or 'new')
    assert S.file_digests(files, cache) == first and not read
    was, data = os.stat(files[3]), files[3].read_bytes()
    files[3].write_bytes(data[::-1])
    os.utime(files[3], ns=(was.st_atime_ns, was.st_mtime_ns))  # same size, same time of change
    assert S.file_digests(files, cache)[3] == 'new' and read == [files[3]]
    cache.write_text('{"torn')
    S.file_digests(files, cache)
    assert len(read) == 13  # a broken cache costs time only
    monkeypatch.setattr(S.time, 'time', lambda: old)  # written just now: not trusted next time
    S.file_digests([files[5]], tmp_path / 'e.json')
    assert not (tmp_path / 'e.json').exists()


@pytest.mark.serial
def test_thousands_of_unchanged_files_take_seconds(tmp_path):
    (tmp_path / 'f').mkdir()
    files = [tmp_path / 'f' / f'{i}.bin' for i in range(5000)]
    for i, f in enumerate(files):
        f.write_bytes(i.to_bytes(4, 'little') * 64)
    time.sleep(2.1)
    first = S.file_digests(files, tmp_path / 'd.json')
    start = time.perf_counter()
    assert S.file_digests(files, tmp_path / 'd.json') == first
    assert time.perf_counter() - start < 3 and len(set(first)) == 5000


def test_a_label_corrected_costs_no_decoding(tiny, tmp_path, monkeypatch):
    a = build_store(tiny, 32, tmp_path / 'stores' / 'a', workers=0)
    seen = []
    true = S.decode_all
    monkeypatch.setattr(S, 'decode_all', lambda jobs, *k: seen.append(len(jobs)) or true(jobs, *k))
    corrected = make_cohort(tiny.root, label=3)
    b = build_store(corrected, 32, tmp_path / 'stores' / 'b', workers=0)
    assert (b.index.label == 3).all() and b.digest != a.digest and b.pixels_sha256 == a.pixels_sha256 and b.intact()
    c = build_store(
        SimpleNamespace(images=tiny.images.iloc[[7, 2, 5]], root=tiny.root, name='three'),
        32,
        tmp_path / 'stores' / 'c',
        workers=0,
    )
    assert (c.images == a.images[[7, 2, 5]]).all() and c.intact()
    assert seen == [0, 0]
    build_store(make_cohort(tiny.root, 13), 32, tmp_path / 'stores' / 'd', workers=0)
    assert seen == [0, 0, 1]
    build_store(make_cohort(tiny.root), 33, tmp_path / 'stores' / 'e', workers=0)
    assert seen == [0, 0, 1, 12]


@pytest.mark.parametrize('nothing', [float('nan'), 0])
def test_unknown_height_and_width_come_from_the_file(tiny, tmp_path, nothing):
    c = make_cohort(tiny.root, height=nothing, width=nothing)
    s = build_store(c, 32, tmp_path / 's', workers=0)
    assert (s.index.height == [80 + i % 7 for i in range(12)]).all() and (
        s.masks == build_store(tiny, 32, tmp_path / 't', workers=0).masks
    ).all()


# ---- killed


def ended(process, seconds=10):
    "Has the process ended, or does it so soon? (A zombie has ended and waits for a parent to say so.)"
    end = time.time() + seconds
    while time.time() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.serial
def test_killed_at_any_moment_and_resumed(tmp_path, start):
    n, px, rng, kills, kept = 200, 256, np.random.default_rng(0), 0, []
    c = make_cohort(tmp_path / 'cohort', n)
    begun = time.time()
    whole = build_store(c, px, tmp_path / 'undisturbed' / 's', workers=0)
    usual = time.time() - begun
    out, runs = tmp_path / 'killed' / 's', 0
    while not out.exists() and runs < 200:
        p = start(c.root, out, n, px)
        runs += 1
        p.join(rng.uniform(0, usual / 2) if kills < 25 else None)
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        assert p.exitcode in (0, -signal.SIGKILL)
        kept += [f.stat().st_size // 65 for f in (tmp_path / 'killed').glob('building-*/journal')]
    assert kills >= 3 and max(kept) > 0 and kept == sorted(kept)  # work was kept, and grew
    assert contents(out) == contents(whole.path)
    build_store(c, px, out, workers=0)
    assert not list((tmp_path / 'killed').glob('building-*/i*'))


def test_workers_end_with_their_parent(tmp_path):
    n = 120
    p = script(BUILD, tmp_path / 'cohort', tmp_path / 's' / 's', n, 512, 1)
    while p.poll() is None and not any(f.stat().st_size for f in (tmp_path / 's').glob('building-*/journal')):
        time.sleep(0.005)
    workers = psutil.Process(p.pid).children(recursive=True)
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    assert p.returncode == -signal.SIGKILL and not (tmp_path / 's' / 's').exists()
    assert workers and all(ended(w) for w in workers)


@pytest.mark.parametrize(
    'harm',
    ['torn line', 'torn pixels', 'pixels without line', 'line without pixels', 'noise', 'assembled half', 'assembled'],
)
def test_what_a_kill_leaves_behind(tiny, tmp_path, harm, monkeypatch):
    whole = contents(build_store(tiny, 32, tmp_path / 'w' / 's', workers=0).path)
    true, todo = S.assemble, []

    def stop(*k):
        raise KeyboardInterrupt

    def late(table, where, folder, *k):
        true(table, where, folder, *k)
        raise KeyboardInterrupt

    monkeypatch.setattr(S, 'assemble', late if harm == 'assembled' else stop)
    with pytest.raises(KeyboardInterrupt):
        build_store(tiny, 32, tmp_path / 'k' / 's', workers=0)
    monkeypatch.setattr(S, 'assemble', true)
    (folder,) = (tmp_path / 'k').glob('building-*')
    text, images = (folder / 'journal').read_bytes(), (folder / 'images').read_bytes()
    assert len(images) == 12 * 32 * 32 and text.count(b'\n') == 12
    if harm == 'torn line':
        (folder / 'journal').write_bytes(text[:-5])
    if harm == 'torn pixels':
        (folder / 'images').write_bytes(images[:-100])
    if harm == 'pixels without line':
        (folder / 'journal').write_bytes(b''.join(text.splitlines(True)[:7]))
    if harm == 'line without pixels':
        (folder / 'masks').write_bytes(b'')
    if harm == 'noise':
        (folder / 'journal').write_bytes(text[:200] + b'\xff\x00\n' + text[200:])
    if harm == 'assembled half':
        (folder / 'complete').mkdir(exist_ok=True)
        (folder / 'complete' / 'images.npy').write_bytes(b'half')
    decode_all = S.decode_all
    monkeypatch.setattr(S, 'decode_all', lambda jobs, *k: todo.append(len(jobs)) or decode_all(jobs, *k))
    assert contents(build_store(tiny, 32, tmp_path / 'k' / 's', workers=0).path) == whole
    expected = {
        'torn line': [1],
        'torn pixels': [1],
        'pixels without line': [5],
        'line without pixels': [12],
        'noise': [10],
        'assembled half': [0],
        'assembled': [],
    }
    assert todo == expected[harm] and not folder.exists()


def test_two_processes_at_once(tmp_path, start):
    cohort = make_cohort(tmp_path / 'cohort', 60)
    alone = build_store(cohort, 96, tmp_path / 'alone' / 's', workers=0)
    both = [start(cohort.root, tmp_path / 'both' / 's', 60, 96) for _ in range(3)]
    for p in both:
        p.join(60)
        assert p.exitcode == 0
    assert contents(tmp_path / 'both' / 's') == contents(alone.path)
    assert sorted(f.name for f in (tmp_path / 'both').iterdir() if f.name != 'digests.json') == ['s']


def test_memory_does_not_grow_with_the_cohort(tmp_path):
    code = (
        BUILD
        + '''
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
'''
    )
    peak = {}
    for n in (60, 240):  # 30 and 126 MB of pixels and masks
        p = script(code, tmp_path / 'cohort', tmp_path / str(n) / 's', n, 512, 1)
        out, err = p.communicate(timeout=100)
        assert p.returncode == 0, err
        peak[n] = [int(v) * (1 if sys.platform == 'darwin' else 1024) / 1e6 for v in out.split()[1:]]
    growth = [b - a for a, b in zip(peak[60], peak[240])]
    assert max(growth) < 20, peak  # MB; the data grow by 94
    held = np.zeros(94_000_000, np.uint8) + 1  # counter-test: what holding the growth in memory would look like
    assert held.nbytes / 1e6 > 4 * 20


# ---- bad input


def test_all_bad_files_are_reported_and_the_rest_is_kept(tmp_path, monkeypatch):
    c = make_cohort(tmp_path / 'cohort', 14)
    good = contents(build_store(c, 32, tmp_path / 'good' / 's', workers=0).path)
    files = [c.root / p for p in c.images.path]
    kept = {i: files[i].read_bytes() for i in (0, 2, 4, 5, 7)}
    files[2].write_bytes(kept[2][: len(kept[2]) // 2])
    files[4].write_text('not a radiograph')
    cv2.imwrite(str(files[7]), np.full((83, 102), 7, np.uint8))
    shutil.copy(files[8], files[5])  # another radiograph than the table says
    sick = make_cohort(tmp_path / 'cohort', 14)
    files[0].unlink()
    sick.images.loc[9, 'mask_path'] = 'nowhere/mask.png'
    with pytest.raises(InputError) as e:
        build_store(sick, 32, tmp_path / 's' / 's', workers=0)
    lines = str(e.value).splitlines()[1:-1]
    assert len(lines) == 6 and all('Hint: ' in l for l in lines) and '6 of 14 images' in str(e.value)
    stages = {l.split(': ')[0].strip(): l.split(': ')[1] for l in lines}
    name = lambda i: sick.images.path[i]
    assert (
        stages[name(0)] == 'open'
        and stages[name(5)] == 'geometry'
        and stages[name(7)] == 'pixels'
        and stages[name(9)] == 'mask'
    )
    assert set(stages) == {name(i) for i in (0, 2, 4, 5, 7, 9)} and not (tmp_path / 's' / 's').exists()
    bad = pd.read_csv(next((tmp_path / 's').glob('building-*/bad.csv')))
    assert len(bad) == 6 and list(bad.columns) == ['path', 'image', 'stage', 'error', 'hint']

    for i, data in kept.items():
        files[i].write_bytes(data)  # mended
    todo, true = [], S.decode_all
    monkeypatch.setattr(S, 'decode_all', lambda jobs, *k: todo.append(len(jobs)) or true(jobs, *k))
    assert contents(build_store(c, 32, tmp_path / 's' / 's', workers=0).path) == good
    assert todo == [6]


def crash_on_marker(jobs, px):
    "Stands for a decoder that takes its process along."
    if any('000000000004' in str(j['file']) for j in jobs):
        os._exit(11)
    from cxrpaper.data.store import decode_chunk

    return decode_chunk(jobs, px)


def test_a_crashing_decoder_is_one_bad_file(tmp_path, monkeypatch):
    c = make_cohort(tmp_path / 'cohort', 6)
    monkeypatch.setattr(S, 'decode_chunk', crash_on_marker)
    with pytest.raises(InputError) as e:
        build_store(c, 32, tmp_path / 's' / 's', workers=1)
    assert '1 of 6 images' in str(e.value) and 'crash' in str(e.value) and '000000000004.png' in str(e.value)
    (pool,) = (tmp_path / 's').glob('building-*/journal')
    assert pool.read_text().count('\n') == 5


def test_a_file_that_changes_while_it_is_read(tiny, tmp_path, monkeypatch):
    true = S.file_digests
    monkeypatch.setattr(S, 'file_digests', lambda *k: ['0' * 64, *true(*k)[1:]])
    with pytest.raises(InputError, match='changed while it was read'):
        build_store(tiny, 32, tmp_path / 's' / 's', workers=0)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(image='same'), 'occur twice'),
        (dict(boxes=[[(0.0, 0.0, -5.0, 5.0)]] * 12), 'boxes'),
        (dict(boxes=[[(0.0, 0.0, float('nan'), 5.0)]] * 12), 'boxes'),
        (dict(boxes=[[(200.0, 0.0, 5.0, 5.0)]] * 12), 'lie in a frame'),
        (dict(height=-1.0), 'frame'),
        (dict(path=''), 'tables only'),
    ],
)
def test_impossible_tables_are_refused(tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        build_store(make_cohort(tiny.root, **change), 32, tmp_path / 's' / 's')
    assert not (tmp_path / 's').exists()


def test_refusals_before_work(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='no images'):
        build_store(SimpleNamespace(images=tiny.images[:0], root=tiny.root, name=''), 32, tmp_path / 's' / 's')
    with pytest.raises(InputError, match='no column'):
        build_store(
            SimpleNamespace(images=tiny.images.drop(columns='boxes'), root=tiny.root, name=''), 32, tmp_path / 's' / 's'
        )
    for px in (0, 7, 5000, 32.5, '32'):
        with pytest.raises(InputError, match='px'):
            build_store(tiny, px, tmp_path / 's' / 's')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('do not delete')
    with pytest.raises(InputError, match='is not a store'):
        build_store(tiny, 32, tmp_path / 'mine', workers=0)
    assert (tmp_path / 'mine' / 'thesis.txt').exists()
    with pytest.raises(InputError, match='not a complete store'):
        open_store(tmp_path / 'mine')
    monkeypatch.setattr(S.shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match='GB are free'):
        build_store(tiny, 32, tmp_path / 's' / 's', workers=0)


def test_a_store_at_the_same_place_is_replaced_only_when_the_new_one_is_complete(tiny, tmp_path):
    a = build_store(tiny, 32, tmp_path / 's', workers=0)
    old = np.array(a.images)
    (tiny.root / tiny.images.path[0]).write_text('broken')
    with pytest.raises(InputError):
        build_store(tiny, 32, tmp_path / 's', workers=0)
    assert (open_store(tmp_path / 's').images == old).all()
    b = build_store(SimpleNamespace(images=tiny.images[1:], root=tiny.root, name=''), 32, tmp_path / 's', workers=0)
    assert len(open_store(tmp_path / 's')) == 11 and (b.images == old[1:]).all()
    assert (a.images == old).all()  # whoever reads the old one still can


def test_damage_is_noticed(tiny, tmp_path):
    s = build_store(tiny, 32, tmp_path / 's', workers=0)
    with open(s.path / 'images.npy', 'r+b') as f:
        f.seek(500)
        f.write(b'\x01\x02\x03')
    assert not open_store(s.path).intact()
    (s.path / 'index.csv').write_text('\n'.join((s.path / 'index.csv').read_text().splitlines()[:5]) + '\n')
    with pytest.raises(InputError, match='not the table that was written'):
        open_store(s.path)


def test_a_script_without_guard_is_told_so(tmp_path):
    make_cohort(tmp_path / 'cohort', 4)
    p = script(
        BUILD.replace("if __name__ == '__main__':", 'if True:'), tmp_path / 'cohort', tmp_path / 's' / 's', 4, 32, 1
    )
    out, err = p.communicate(timeout=60)
    assert p.returncode != 0 and "if __name__ == '__main__':" in err and 'workers=0' in err


# ---- real input


@needs_real
def test_the_same_radiographs_as_dicom_give_the_same_store(tmp_path):
    cohort = pytest.importorskip('cxrpaper.data.readers')
    tree = write_siim_tree(tmp_path / 'siim', REAL)
    jpeg, dicom = cohort.read_real_cxr(REAL), cohort.read_siim(tree)
    if len(jpeg.images) != 250:
        jpeg.images = jpeg.images[jpeg.images.image.isin(dicom.images.image)].reset_index(drop=True)
    strip = lambda t: t.image.str.removesuffix('_image').tolist()
    assert strip(jpeg.images) == strip(dicom.images) and len(dicom.images) == 250
    assert (jpeg.images.label.to_numpy() == dicom.images.label.to_numpy()).all()
    a = build_store(jpeg, 160, tmp_path / 'a' / 's', workers=0)
    b = build_store(dicom, 160, tmp_path / 'b' / 's', workers=0)
    for name in ('images.npy', 'masks.npy'):
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), name
    assert a.pixels_sha256 == b.pixels_sha256 and a.digest != b.digest
    groups = lambda t: pd.factorize(t.group)[0].tolist()
    assert groups(a.index) == groups(b.index)
    assert len(np.unique(a.images.reshape(250, -1), axis=0)) == 250 and (a.index.mask_from == 'boxes').sum() == 98


@pytest.mark.parametrize('what', ['flipped byte', 'arrays swapped', 'row of the table', 'no table', 'store.json null'])
def test_a_damaged_store_is_named_and_made_anew(tiny, tmp_path, capsys, what):
    "Nothing of it is used, by itself or through another store; the counter-test is that an undamaged one is used."
    c = tiny
    a = build_store(c, 32, tmp_path / 'stores' / 'a', workers=0)
    pixels, digest = a.images[:].copy(), a.digest
    folder = a.path
    del a
    if what == 'flipped byte':
        with open(folder / 'images.npy', 'r+b') as f:
            f.seek(500)
            byte = f.read(1)[0]
            f.seek(500)
            f.write(bytes([byte ^ 16]))
    elif what == 'arrays swapped':
        (folder / 'images.npy').rename(folder / 'x')
        (folder / 'masks.npy').rename(folder / 'images.npy')
        (folder / 'x').rename(folder / 'masks.npy')
    elif what == 'row of the table':
        t = (folder / 'index.csv').read_text().splitlines()
        t[1], t[2] = t[2], t[1]
        (folder / 'index.csv').write_text('\n'.join(t) + '\n')
    elif what == 'no table':
        (folder / 'index.csv').unlink()
    else:
        (folder / 'store.json').write_text('null')
    part = SimpleNamespace(images=c.images.iloc[:4], root=c.root, name='four')
    b = build_store(part, 32, tmp_path / 'stores' / 'b', workers=0)
    assert (b.images[:] == pixels[:4]).all() and b.intact()
    again = build_store(c, 32, tmp_path / 'stores' / 'a', workers=0)
    assert again.digest == digest and (again.images[:] == pixels).all() and again.intact()
    assert what not in ('flipped byte', 'arrays swapped') or 'damaged' in capsys.readouterr().out


# ---- decoded once


KINDS = ('explicit', 'implicit', 'rle', 'jpeg2000', 'png', 'jpg')


def mixed_films(root, n=36):
    "Radiographs of one's own in six kinds of files, four classes, a patient each, with their table."
    (root / 'images').mkdir(parents=True)
    rows = []
    for i in range(n):
        kind, name, size = KINDS[i % len(KINDS)], f'film{i:02}', (100 + i, 120 - i)
        film = draw_radiograph(CLASSES[i % 4], 0, size, of=Exposure(i, i))[0]
        if kind in ('png', 'jpg'):
            cv2.imwrite(str(root / 'images' / f'{name}.{kind}'), film if kind == 'png' else (film // 257).astype('u1'))
        else:
            who = dict(vendor=0, view='PA', sex='F', age=50, site=0, patient=f'p{i}', image=f'a{i}', study=f'b{i}')
            header = dicom_header(pd.Series(who | dict(series=f'c{i}', shot=0, height=size[0], width=size[1])))
            write_dicom(root / 'images' / f'{name}.dcm', header, film, 12, syntax=kind)
        rows.append(dict(image=name, patient=f'p{i}', label=CLASSES[i % 4]))
    pd.DataFrame(rows).to_csv(root / 'table.csv', index=False)
    return root


COUNTING = """

_counted = _bytes


def _bytes(path, *sha256):
    with open({log!r}, 'a') as f:
        f.write(Path(path).name + '\\n')
    return _counted(path, *sha256)
"""


def test_cohort_and_store_of_a_study_decode_every_file_once(tmp_path):
    "By the study's graph, in its own processes, which write down every file that they decode."
    from test_study import STUDY, command, environment  # with PyTorch, which the workers above need not import

    for d in ('nbs', 'cxrpaper', 'config'):
        shutil.copytree(project_root() / d, tmp_path / d, ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('settings.ini', 'Snakefile'):
        shutil.copy(project_root() / f, tmp_path / f)
    log = tmp_path / 'decoded'
    with open(tmp_path / 'cxrpaper/data/dicom.py', 'a') as f:
        f.write(COUNTING.format(log=str(log)))
    mixed_films(tmp_path / 'data/own')
    study = STUDY | dict(data_root='data/own', adapter='auto')
    (tmp_path / 'config/tiny.yaml').write_text(yaml.safe_dump(study))

    r = subprocess.run(
        command('runs/smoke/store.ipynb'), cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    times = sorted(Counter(log.read_text().split()).values())
    assert times == [1] * 32 + [2] * 4, 'once, and those again that a page shows: one of each class'

    cohort = load_cohort(tmp_path / 'runs/smoke/cohort')
    (cohort.root,) = (tmp_path / 'data/linked').iterdir()
    (path,) = (tmp_path / 'data/stores').glob('*/store.json')
    store, elsewhere = open_store(path.parent), build_store(cohort, 64, tmp_path / 'elsewhere/s', workers=0)
    assert store.index.image.tolist() == cohort.images.image.tolist() and path.parent.name == store.digest[:16]
    assert contents(store.path) == contents(elsewhere.path)
    for i, p in enumerate(cohort.images.path):
        assert (np.rint(squash(read_radiograph(cohort.root / p), 64) * 255) == store.images[i]).all(), p
    shown = json.loads((tmp_path / 'runs/smoke/store.ipynb').read_text())['cells']
    assert store.pixels_sha256 in ''.join(str(c.get('outputs')) for c in shown)
