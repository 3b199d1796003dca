"Radiographs of one's own, with names planted wherever they can stand: none of them reaches what is computed, executed or shared."

import os
import subprocess

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxrpaper.data.cohort import save_cohort
from cxrpaper.data.pseudonyms import KEY, project_key, with_pseudonyms
from cxrpaper.data.readers import read_cohort
from cxrpaper.runs import InputError, project_root, resolve
from cxrpaper.schema import CLASSES

PLANTED = dict(
    PatientID='MRN0012345',
    PatientName='PLANTED^JANE',
    PatientBirthDate='19510203',
    InstitutionName='St Elsewhere Hospital',
    AccessionNumber='ACC998877',
    ReferringPhysicianName='HOUSE^GREGORY',
    StationName='ROOM7XYZ',
    StudyDescription='CHEST OF JANE',
    OtherPatientIDs='SSN123456789',
)
WORDS = (
    'MRN0012345',
    'PLANTED',
    '19510203',
    'Elsewhere',
    'ACC998877',
    'GREGORY',
    'ROOM7XYZ',
    'OF JANE',
    'SSN123456789',
)
IN_PATHS = ('SMITH_JOHN', 'WARD_NINE')  # of folders and files


def planted(root, n=48):
    "A table, and a DICOM tree in which every file says whose it is; the patient's number differs from file to file."
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        ds = Dataset()
        for k, v in PLANTED.items():
            setattr(ds, k, v)
        ds.PatientID = f'{PLANTED["PatientID"]}-{i // 2}'
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1'
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.PatientSex, ds.PatientAge, ds.Modality = generate_uid(), 'F', '070Y', 'DX'
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 80, 72, 16, 12, 11, 0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
        ds.PixelData = rng.integers(0, 4096, (80, 72), dtype=np.uint16).tobytes()
        file = root / 'images' / 'WARD_NINE' / f'SMITH_JOHN_{i:02}.dcm'
        file.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(file, enforce_file_format=True)
        rows.append(
            dict(image=f'SMITH_JOHN_{i:02}', patient=ds.PatientID, path=f'WARD_NINE/{file.name}', label=CLASSES[i % 4])
        )
    pd.DataFrame(rows).to_csv(root / 'table.csv', index=False)
    return root


def found(folder, words) -> set:
    "Those of the words that stand in any file below the folder, in its name or its bytes; symbolic links are not followed."
    files = [f for f in folder.rglob('*') if f.is_file() and not f.is_symlink()]
    assert len(files) > 2
    everything = [str(f.relative_to(folder)).encode() + f.read_bytes() for f in files]
    return {w for w in words if any(w.encode() in b for b in everything)}


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return planted(tmp_path_factory.mktemp('hospital'))


def test_nothing_planted_is_in_what_a_training_leaves(tree, warm, tmp_path):
    def papermill(page, *params):
        out = tmp_path / 'out' / f'{len(list(tmp_path.rglob("*.ipynb")))}.ipynb'
        out.parent.mkdir(exist_ok=True)
        command = [
            'cxr_papermill',
            '--no-progress-bar',
            f'nbs/{page}.ipynb',
            str(out),
            '-p',
            'data_root',
            'data/planted',
        ]
        done = subprocess.run([*command, *params], cwd=project_root(), env=warm, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    link = project_root() / 'data' / 'planted'
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tree)
    try:
        papermill('01_data', '-p', 'out', str(tmp_path / 'out' / 'cohort'))
        settings = dict(
            arch='resnet10t', pretrain='none', px=64, epochs=1, batch_size=8, run=tmp_path / 'out' / 'run', workers=1
        )
        papermill('04_finetune', *(str(w) for k, v in settings.items() for w in ('-p', k, v)))
    finally:
        link.unlink()
    assert not found(tmp_path / 'out', (*WORDS, *IN_PATHS, str(tree)))
    stores = [f for f in resolve('data/stores').glob('*/index.csv')]
    assert stores and not any(w in f.read_text() for f in stores for w in (*WORDS, *IN_PATHS))
    predictions = pd.read_csv(tmp_path / 'out' / 'run' / 'predictions.csv')
    assert predictions.patient.str.fullmatch('[0-9a-f]{16}').all() and (predictions.sex == 'F').all()


def test_without_pseudonyms_the_search_finds_them(tree, tmp_path):
    save_cohort(read_cohort(tree, pseudonyms=False), tmp_path / 'raw')
    (tmp_path / 'raw' / 'header.txt').write_text(PLANTED['PatientName'])
    assert found(tmp_path / 'raw', (*WORDS, *IN_PATHS)) >= {
        'MRN0012345',
        'Elsewhere',
        'SMITH_JOHN',
        'WARD_NINE',
        'PLANTED',
    }


def test_one_patient_has_one_pseudonym_in_every_corpus(tree):
    table, folder = read_cohort(tree), read_cohort(tree / 'images', 'folder')
    assert set(table.images.patient) == set(folder.images.patient) and table.images.patient.nunique() == 24
    assert table.images.source.nunique() == 1 and table.images.source[0] != PLANTED['InstitutionName']
    for c in (table, folder):
        assert (c.root / c.images.path[0]).is_file() and c.notes['pseudonyms']
    assert read_cohort(tree).digest == table.digest


def test_another_key_gives_other_pseudonyms(tree, tmp_path):
    raw = read_cohort(tree, pseudonyms=False)
    one, other = (with_pseudonyms(raw, project_key(tmp_path / k), tmp_path / 'linked') for k in ('a', 'b'))
    assert not set(one.images.patient) & set(other.images.patient) and one.digest != other.digest


def test_public_corpora_keep_their_ids(tmp_path):
    from cxrpaper.data.phantom import PhantomConfig, write_phantom

    root = write_phantom(PhantomConfig(n_patients=12, px=96, seed=5), tmp_path / 'phantom', workers=1)
    assert 'pseudonyms' not in read_cohort(root).notes


def test_a_key_is_for_its_owner_and_never_replaced(tmp_path):
    key = project_key(tmp_path / 'key')
    assert (tmp_path / 'key').stat().st_mode & 0o077 == 0 and project_key(tmp_path / 'key') == key and len(key) == 32
    (tmp_path / 'key').write_text('half a k')
    with pytest.raises(InputError, match='not a key'):
        project_key(tmp_path / 'key')
    assert (tmp_path / 'key').read_text() == 'half a k' and os.listdir(tmp_path) == ['key']
    ignored = subprocess.run(['git', 'check-ignore', KEY], cwd=project_root(), capture_output=True, text=True)
    assert ignored.stdout.strip() == KEY or not (project_root() / '.git').exists()
