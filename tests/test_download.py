"Getting the data, with a program that plays Kaggle: refusals, broken connections, kills in the middle; and every corpus against planted faults."

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cxrpaper.data import download as D
from cxrpaper.data.download import (
    CORPORA,
    check_manifest,
    check_table,
    download_siim,
    members,
    table_content,
    unpack,
    verify_corpus,
    write_manifest,
)
from cxrpaper.data.phantom import PhantomConfig, write_phantom
from cxrpaper.data.readers import read_chestxray14, read_chexpert, read_cohort
from cxrpaper.runs import InputError, file_digest, project_root

TABLES = project_root().parent / 'shared' / 'data' / 'siim_tables'
needs_tables = pytest.mark.skipif(
    not TABLES.is_dir(), reason='the tables of SIIM are not on this machine (../shared/data/siim_tables)'
)
SMALL = dict(archive=10**6, unpacked=10**6)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A phantom, and the archive that a server would send."
    d = tmp_path_factory.mktemp('served')
    write_phantom(PhantomConfig(n_patients=8, px=64, masks=False), d / 'tree')
    (d / 'tree' / 'test' / 's' / 't').mkdir(parents=True)
    (d / 'tree' / 'test' / 's' / 't' / 'x.dcm').write_bytes(b'test image')
    with zipfile.ZipFile(d / 'server.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted((d / 'tree').rglob('*')):
            if f.is_file():
                z.write(f, f.relative_to(d / 'tree').as_posix())
    return d


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    "A program of this name, first on the path; its body is given by the test."

    def fake(body):
        tool = tmp_path / 'bin' / 'kaggle'
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            '#!/bin/sh\n[ "$1 $2 $4" = "competitions download -p" ] || { echo "usage: kaggle"; exit 2; }\nC=$3; D=$5; Z="$D/$C.zip"\n'
            + body
        )
        tool.chmod(0o755)
        monkeypatch.setenv('PATH', f'{tool.parent}:{os.environ["PATH"]}')

    return fake


def trees_equal(a, b):
    names = lambda d: {
        f.relative_to(d).as_posix(): f.read_bytes()
        for f in (d / 'train').rglob('*')
        if f.is_file() and not f.name.startswith('.')
    }
    return names(a) == names(b)


def told(f):
    with pytest.raises(InputError) as e:
        f()
    return e.value


# ---- facts ----------------------------------------------------------------------------------------------------------------


@needs_tables
def test_digests_and_counts_are_those_of_the_published_tables():
    for name, (sha, content) in CORPORA['siim']['tables'].items():
        assert (file_digest(TABLES / name), table_content(TABLES / name)) == (sha, content)
        assert check_table(TABLES / name, (sha, content))['found'] == 'the same bytes'
    counts, listed, _ = D.survey_siim(TABLES)
    patients = pd.read_csv(TABLES / 'patients.csv', dtype=str).patientid.nunique()
    assert counts | dict(patients=patients) == CORPORA['siim']['counts'] and len(set(listed)) == 6334
    images = read_cohort(TABLES, 'siim_tables', rule=False).images  # what the adapter itself makes of these tables
    assert (
        images.label.value_counts().sort_index().tolist() == [counts[f'{k} images'] for k in D.CLASSES]
        and images.boxes.map(len).sum() == counts['boxes']
    )


@needs_tables
def test_the_bound_of_the_pixels_is_computed_from_the_sizes():
    s = pd.read_csv(TABLES / 'image_sizes.csv')
    assert int((s.height * s.width).sum() * 2) == CORPORA['siim']['bytes']['unpacked'] and len(s) == 6334


@needs_tables
def test_a_saved_again_table_is_told_from_a_changed_one(tmp_path):
    for name, published in CORPORA['siim']['tables'].items():
        f = tmp_path / name
        sent = (TABLES / name).read_bytes()
        lines = sent.decode().splitlines()
        pd.read_csv(TABLES / name, dtype=str, keep_default_na=False).to_csv(
            f, index=False, quoting=1, lineterminator='\r\n'
        )  # as a spreadsheet program does
        assert f.read_bytes() != sent and check_table(f, published)['ok']
        for changed in (
            lines[:-1],
            [*lines, lines[-1]],
            [lines[0].replace('id', 'ID', 1), *lines[1:]],
            [*lines[:5], lines[5].replace('0', '7', 1), *lines[6:]],
        ):
            f.write_text('\n'.join(changed))
            r = check_table(f, published)
            assert not r['ok'] and 'changed' in r['found'] and r['hint']
            assert check_table(f, published, partial=True)['ok']


def test_released_numbers_of_chexpert_add_up_to_the_published_ones():
    "Irvin et al.: 224,316 radiographs of 65,240 patients, with a test set of 500 studies, one a patient, that was not released with them."
    c = CORPORA['chexpert']['counts']
    assert c['patients'] + 500 == 65_240
    assert (
        224_316 - c['training images'] - c['validation images'] == 668
    )  # the radiographs of these 500 studies, as other papers count them


# ---- the download ---------------------------------------------------------------------------------------------------------


def test_a_broken_connection_is_continued_by_the_same_call(served, kaggle, tmp_path):
    archive = served / 'server.zip'
    part = archive.stat().st_size // 3
    kaggle(f'''if [ ! -f "$Z" ]; then head -c {part} "{archive}" > "$Z"; printf "12%%\\r34%%\\rConnection broken"; exit 1; fi
tail -c +$(( $(wc -c < "$Z") + 1 )) "{archive}" >> "$Z"; echo "Resuming"''')
    e = told(lambda: download_siim(tmp_path / 'siim', room=SMALL))
    assert 'Connection broken' in e.problem and 'goes on where it stopped' in e.hint
    assert (tmp_path / 'siim' / 'siim-covid19-detection.zip').stat().st_size == part, 'the part is kept'
    root = download_siim(tmp_path / 'siim', room=SMALL)
    assert (
        trees_equal(served / 'tree', root)
        and not (root / 'test').exists()
        and (root / 'siim-covid19-detection.zip').read_bytes() == archive.read_bytes()
    )
    assert len(read_cohort(root, 'siim').images) > 0


@pytest.mark.parametrize(
    'said, hint',
    [
        (
            '403 Client Error: Forbidden for url: ... Permission competitions.participate was denied',
            'accept its rules at https://www.kaggle.com/c/siim-covid19-detection/rules',
        ),
        ('403 - Forbidden - You must accept this competition\'s rules', 'accept its rules'),
        ('401 - Unauthorized', 'kaggle auth login'),
        ('Authentication required to call the Kaggle API.', 'kaggle auth login'),
        ('OSError: Could not find kaggle.json. Make sure it is located in ~/.kaggle', 'access_token'),
        ('500 Server Error', 'run this again'),
        ('', 'run this again'),
    ],
)
def test_what_the_tool_says_becomes_a_cure(kaggle, tmp_path, said, hint):
    kaggle(f'cat >&2 <<"X"\n{said}\nX\nexit 1')
    e = told(lambda: download_siim(tmp_path / 'siim', room=SMALL))
    assert hint in e.hint and said.split('.')[0][:40] in e.problem


def test_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert 'pip install kaggle' in told(lambda: download_siim(tmp_path / 'siim', room=SMALL)).hint


def test_a_truncated_archive_that_the_tool_calls_complete(served, kaggle, tmp_path):
    kaggle(
        f'head -c $(( $(wc -c < "{served}/server.zip") - 50 )) "{served}/server.zip" > "$Z"; echo "$C.zip: Skipping, found more recently modified local copy"'
    )
    e = told(lambda: download_siim(tmp_path / 'siim', room=SMALL))
    assert (
        'not a whole zip file' in e.problem and 'move it away' in e.hint and not (tmp_path / 'siim' / 'train').exists()
    )
    assert (tmp_path / 'siim' / 'siim-covid19-detection.zip').exists()


def test_another_program_of_this_name_or_no_archive(kaggle, tmp_path):
    kaggle('exit 0')
    assert (
        'there is no siim-covid19-detection.zip' in told(lambda: download_siim(tmp_path / 'siim', room=SMALL)).problem
    )
    kaggle('echo "<html>" > "$Z"')
    assert 'not a whole zip file' in told(lambda: download_siim(tmp_path / 'siim', room=SMALL)).problem


def test_too_little_room_is_said_before_anything_is_fetched(kaggle, tmp_path, monkeypatch):
    kaggle(f'touch {tmp_path}/called; exit 1')
    free = type('usage', (), dict(free=200 * D.GB))
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: free)
    e = told(lambda: download_siim(tmp_path / 'siim'))
    assert (
        '244.1 GB are needed, 200.0 GB are free' in e.problem
        and not (tmp_path / 'called').exists()
        and not (tmp_path / 'siim').exists()
    )
    archive = tmp_path / 'siim' / 'siim-covid19-detection.zip'
    archive.parent.mkdir()
    with open(archive, 'wb') as f:
        f.truncate(60 * D.GB)  # sparse: 60 GB are there already
    assert (
        'the download broke off' in told(lambda: download_siim(tmp_path / 'siim')).problem
        and (tmp_path / 'called').exists()
    )


def test_two_disks_are_asked_for_their_own_part(kaggle, tmp_path, monkeypatch):
    kaggle('exit 1')
    real = os.stat
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: type('usage', (), dict(free=130 * D.GB)))

    class Other:
        def __init__(self, s):
            self._s = s

        def __getattr__(self, k):
            return 77 if k == 'st_dev' else getattr(self._s, k)

    (tmp_path / 'other').mkdir()
    monkeypatch.setattr(
        D.os, 'stat', lambda p, *a, **k: Other(real(p, *a, **k)) if 'other' in str(p) else real(p, *a, **k)
    )
    assert (
        'broke off' in told(lambda: download_siim(tmp_path / 'siim', archive=tmp_path / 'other')).problem
    )  # 128.5 and 115.5 fit
    assert (
        '244.1 GB' in told(lambda: download_siim(tmp_path / 'siim', archive=tmp_path / 'siim2')).problem
    )  # on one disk they do not


KILLED = '''
import sys, time
from pathlib import Path
from cxrpaper.data import download as D
copy = D.shutil.copyfileobj
def slow(source, target, n): target.write(source.read(20)); target.flush(); print('writing', flush=True); time.sleep(float(sys.argv[3])); copy(source, target, n)
D.shutil.copyfileobj = slow
D.unpack(Path(sys.argv[1]), Path(sys.argv[2]))
'''


def test_unpacking_survives_a_kill(served, tmp_path):
    "Killed in the middle of a file: no file has its final name without its whole content, and the next call finishes."
    p = subprocess.Popen(
        [sys.executable, '-c', KILLED, served / 'server.zip', tmp_path / 'siim', '0.05'],
        stdout=subprocess.PIPE,
        cwd=project_root(),
    )
    for _ in range(5):
        p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    p.wait()
    there = [f for f in (tmp_path / 'siim').rglob('*.dcm')]
    assert 0 < len(there) < 15 and all(
        f.read_bytes() == (served / 'tree' / f.relative_to(tmp_path / 'siim')).read_bytes() for f in there
    )
    n = unpack(served / 'server.zip', tmp_path / 'siim')
    assert n == len(members(served / 'server.zip')) - len(there) and trees_equal(served / 'tree', tmp_path / 'siim')
    assert (
        read_cohort(tmp_path / 'siim', 'siim').images.image.is_unique
        and unpack(served / 'server.zip', tmp_path / 'siim') == 0
    )


def test_damage_costs_the_member_only(served, tmp_path):
    info = [i for i in members(served / 'server.zip') if i.filename.endswith('.dcm')]
    data = bytearray((served / 'server.zip').read_bytes())
    for i in info[:2]:
        data[i.header_offset + 30 + len(i.filename) + i.compress_size // 2] ^= 1
    (tmp_path / 'damaged.zip').write_bytes(data)
    e = told(lambda: unpack(tmp_path / 'damaged.zip', tmp_path / 'siim'))
    assert e.problem.startswith(f'2 of {len(info) + 2} members are damaged') and info[0].filename in e.problem
    assert len(list((tmp_path / 'siim').rglob('*.dcm'))) == len(info) - 2 and not list(
        (tmp_path / 'siim').rglob('.*.tmp')
    )
    assert unpack(served / 'server.zip', tmp_path / 'siim') == 2 and trees_equal(served / 'tree', tmp_path / 'siim')


@pytest.mark.parametrize('name', ['train/../../x.dcm', 'train/..\\x.dcm'])
def test_names_that_leave_the_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as z:
        z.writestr(name, 'x')
    assert 'points out of the folder' in told(lambda: unpack(tmp_path / 'z.zip', tmp_path / 'siim')).problem
    with zipfile.ZipFile(tmp_path / 'y.zip', 'w') as z:
        z.writestr('other/x.dcm', 'x')
    assert 'not the archive' in told(lambda: members(tmp_path / 'y.zip')).hint


# ---- the two corpora that a user brings himself ----------------------------------------------------------------------------


def write_chestxray14(root):
    rows = []
    for p in range(4):
        for k in range(p + 1):
            name = f'{p:08d}_{k:03d}.png'
            folder = root / f'images_{p % 2 + 1:03d}' / 'images'
            folder.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 60).save(folder / name)
            rows.append(
                {
                    'Image Index': name,
                    'Finding Labels': 'No Finding',
                    'Follow-up #': k,
                    'Patient ID': p,
                    'Patient Age': 50,
                    'Patient Gender': 'F',
                    'View Position': 'PA',
                }
            )
    pd.DataFrame(rows).to_csv(root / 'Data_Entry_2017.csv', index=False)
    return dict(tables={}, counts={'images': 10, 'patients': 4})


def write_chexpert(root):
    for part, patients in (('train', 3), ('valid', 1)):
        rows = []
        for p in range(patients):
            for k, kind in enumerate(('Frontal', 'Lateral'), 1):
                path = f'{part}/patient{p + 10 * (part == "valid"):05d}/study1/view{k}_{kind.lower()}.jpg'
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40, 32), 60).save(root / path)
                rows.append(
                    {
                        'Path': f'CheXpert-v1.0-small/{path}',
                        'Sex': 'Male',
                        'Age': 40,
                        'Frontal/Lateral': kind,
                        'AP/PA': 'AP',
                        'No Finding': 1,
                    }
                )
        pd.DataFrame(rows).to_csv(root / f'{part}.csv', index=False)
    return dict(tables={}, counts={'training images': 6, 'validation images': 2, 'frontal images': 4, 'patients': 4})


CORPUS = dict(
    chestxray14=(write_chestxray14, read_chestxray14, '*.png'),
    chexpert=(write_chexpert, read_chexpert, '*_frontal.jpg'),
)


@pytest.mark.parametrize('corpus', CORPUS)
def test_own_copies(tmp_path, corpus):
    write, read, pattern = CORPUS[corpus]
    facts = write(tmp_path)
    verify = lambda **kw: verify_corpus(tmp_path, corpus, facts=facts, **kw).set_index('check')
    assert verify().ok.all() and len(read(tmp_path).images) == len(list(tmp_path.rglob(pattern))), (
        'what passes, the adapter reads'
    )
    files = sorted(tmp_path.rglob(pattern))
    kept = files[0].read_bytes()
    files[0].write_bytes(kept[:-30])
    t = verify()
    assert list(t.index[~t.ok]) == ['every file can be read'] and files[0].name in t.found['every file can be read']
    files[0].unlink()
    t = verify()
    assert (
        list(t.index[~t.ok]) == ['rows without a file']
        and files[0].name in t.found['rows without a file']
        and not verify(partial=True).ok['rows without a file']
    )
    files[0].write_bytes(kept)
    extra = files[0].with_name('9' + files[0].name)
    shutil.copy(files[1], extra)
    t = verify()
    assert list(t.index[~t.ok]) == ['files without a row']
    extra.unlink()
    assert verify().ok.all()
    real = verify_corpus(tmp_path, corpus).set_index('check')
    assert not real.ok[list(CORPORA[corpus]['counts'])].any() and verify_corpus(tmp_path, corpus, partial=True).ok.all()


def test_a_missing_table_and_a_missing_column(tmp_path):
    write_chexpert(tmp_path)
    (tmp_path / 'valid.csv').unlink()
    t = verify_corpus(
        tmp_path, 'chexpert', facts=dict(tables={}, counts={'training images': 6, 'validation images': 2})
    ).set_index('check')
    assert (
        t.found['validation images'] == '0'
        and not t.ok['validation images']
        and 'files without a row' in t.index[~t.ok]
    )
    shutil.rmtree(tmp_path / 'valid')
    assert verify_corpus(tmp_path, 'chexpert', partial=True).ok.all() and len(read_chexpert(tmp_path).images) == 3
    (tmp_path / 'train.csv').unlink()
    t = verify_corpus(tmp_path, 'chexpert')
    assert not t.ok.any() and 'train.csv: no such file' in t.found.iloc[0]
    write_chestxray14(tmp_path)
    f = tmp_path / 'Data_Entry_2017.csv'
    f.write_text(f.read_text().replace('Patient ID', 'Patient'))
    assert 'column Patient ID' in verify_corpus(tmp_path, 'chestxray14').found.iloc[0]


def test_a_part_larger_than_the_whole_is_no_part(tmp_path):
    facts = write_chestxray14(tmp_path)
    facts['counts']['images'] = 9
    t = verify_corpus(tmp_path, 'chestxray14', facts=facts, partial=True).set_index('check')
    assert list(t.index[~t.ok]) == ['images']


# ---- manifest -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for k in range(12):
        f = tmp_path / 'train' / f'{k % 3}' / f'{k}.dcm'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(bytes([k]) * (1000 + k))
    (tmp_path / 'name with, comma "and" quote.csv').write_text('x')
    (tmp_path / 'big.zip').write_bytes(b'z')
    (tmp_path / '.hidden').write_bytes(b'h')
    return tmp_path


def test_manifest_is_sha256_and_the_same_for_any_number_of_workers(folder):
    first = write_manifest(folder, workers=1).read_bytes()
    t = pd.read_csv(folder / 'manifest.csv')
    assert len(t) == 13 and all(
        hashlib.sha256((folder / p).read_bytes()).hexdigest() == s and (folder / p).stat().st_size == n
        for p, n, s in t.itertuples(index=False)
    )
    (folder / 'manifest.csv').unlink()
    assert (
        write_manifest(folder, workers=8).read_bytes() == first
        and check_manifest(folder).empty
        and not (folder / 'manifest.partial').exists()
    )


@pytest.mark.parametrize(
    'fault, problem, quick',
    [
        (lambda f: f.unlink(), 'missing', True),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), 'truncated', True),
        (lambda f: f.write_bytes(f.read_bytes() + b'x'), 'changed: 1', True),
        (lambda f: f.write_bytes(b'x' + f.read_bytes()[1:]), 'changed: the same size', False),
        (lambda f: f.with_name('new.dcm').write_bytes(b''), 'additional', True),
    ],
)
def test_manifest_names_each_fault(folder, fault, problem, quick):
    write_manifest(folder)
    fault(folder / 'train' / '1' / '4.dcm')
    t = check_manifest(folder)
    assert len(t) == 1 and t.problem[0].startswith(problem) and t.path[0] in ('train/1/4.dcm', 'train/1/new.dcm')
    assert check_manifest(folder, digests=False).empty != quick
    assert 'already' in told(lambda: write_manifest(folder)).problem


def test_manifest_goes_on_after_an_interruption(folder, monkeypatch):
    first = write_manifest(folder).read_bytes()
    (folder / 'manifest.csv').unlink()
    read, real = [], D.file_digest

    def digest(f):
        if len(read) == 6:
            raise KeyboardInterrupt
        read.append(f)
        return real(f)

    monkeypatch.setattr(D, 'file_digest', digest)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(folder, workers=1)
    assert not (folder / 'manifest.csv').exists() and len(D.journal_lines(folder / 'manifest.partial')) == 6
    with open(folder / 'manifest.partial', 'a') as f:
        f.write('1001\t12')  # a torn line
    again = []
    monkeypatch.setattr(D, 'file_digest', lambda f: again.append(f) or real(f))
    assert write_manifest(folder).read_bytes() == first and len(again) == 13 - 6 and not set(again) & set(read)


def test_manifest_itself_is_checked(folder):
    assert 'no such file' in told(lambda: check_manifest(folder)).problem
    write_manifest(folder)
    f = folder / 'manifest.csv'
    f.write_text(f.read_text().replace('sha256', 'md5', 1))
    assert 'column' in told(lambda: check_manifest(folder)).field
    assert 'no files' in told(lambda: write_manifest(folder / 'train' / 'none')).problem


# ---- the notebook as a command line ----------------------------------------------------------------------------------------


def papermill(out, **params):
    from cxrpaper.study import papermill_yaml

    return subprocess.run(
        [
            Path(sys.executable).parent / 'papermill',
            '--no-progress-bar',
            'nbs/appendix/data/download.ipynb',
            out,
            '-y',
            papermill_yaml(params),
        ],
        cwd=project_root(),
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg'),
    )


def test_a_file_that_changed_since_the_manifest_ends_the_notebook(tmp_path):
    root = tmp_path / 'nih'
    root.mkdir()
    write_chestxray14(root)
    write_manifest(root)
    f = sorted(root.rglob('*.png'))[3]
    b = bytearray(f.read_bytes())
    b[-40] ^= 1
    f.write_bytes(b)
    p = papermill(tmp_path / 'out.ipynb', corpus='chestxray14', root=str(root), partial=True)
    assert p.returncode and f'{f.relative_to(root).as_posix()} (changed: the same size, other bytes)' in p.stderr
