"The cohort on the real tables and radiographs, and on small trees with one fault each."

import gzip
import json
import shutil
import warnings
import zipfile
from functools import partial

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxrpaper.data import cohort as C
from cxrpaper.data.cohort import box_statistics, clip_boxes, load_cohort, save_cohort, table_cohort, union_area
from cxrpaper.data.folds import (
    DUPLICATE_DISTANCE,
    HASH_SIZE,
    assign_folds,
    audit_leaks,
    duplicate_distance,
    hash_cohort,
    hash_distances,
    near_duplicates,
    perceptual_hashes,
)
from cxrpaper.data.phantom import PhantomConfig, write_phantom
from cxrpaper.data.readers import (
    BOX_LIST,
    HEADINGS,
    nih_boxes,
    organisers_rule,
    parse_boxes,
    parse_label,
    read_cohort,
    read_siim,
    second_boxes,
    siim_labels,
)
from cxrpaper.runs import InputError, project_root
from cxrpaper.schema import COLUMNS

REAL = project_root().parent / 'shared' / 'data'
read_own = partial(read_cohort, pseudonyms=False)  # what a reader says of radiographs of one's own
TABLES, CXR = REAL / 'siim_tables', REAL / 'real_cxr'
needs_tables = pytest.mark.skipif(
    not TABLES.is_dir(), reason='the tables of SIIM are not on this machine (../shared/data/siim_tables)'
)
needs_cxr = pytest.mark.skipif(
    not CXR.is_dir(), reason='the real radiographs are not on this machine (../shared/data/real_cxr)'
)

# ---- the published tables -------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings(
    'ignore:Invalid value for VR UI'
)  # SIIM's own study ids are no valid UIDs either


@pytest.fixture(scope='module')
def before():
    return read_cohort(TABLES, rule=False)


@pytest.fixture(scope='module')
def after():
    return read_cohort(TABLES)


def per_class(series):
    return series.value_counts().reindex(range(4), fill_value=0).tolist()


@needs_tables
def test_what_01_data_says_of_siim():
    "01_data.ipynb: boxes on both halves by class, and patients that a split by image or study shows to the training."
    images = read_cohort(TABLES, 'siim_tables').images
    t = box_statistics(images)
    rest = t.loc[['indeterminate', 'atypical']]
    both = [t.both_halves['typical'], np.average(rest.both_halves, weights=rest.images)]
    leaked = [audit_leaks(images, assign_folds(images, 5, 0, by)).set_index('level').share for by in ('image', 'study')]
    said = ''.join(
        ''.join(c['source']) for c in json.loads((project_root() / 'nbs' / '01_data.ipynb').read_text())['cells']
    )
    assert f'{t.boxes.sum():,} boxes' in said
    assert (
        f'{both[0]:.0%} of the boxed typical'.replace('%', ' %') in said and f'{both[1]:.0%}'.replace('%', ' %') in said
    )
    by_image, by_study = (f'{s["patient"]:.0%}'.replace('%', ' %') for s in leaked)
    assert f'{by_image} by image and still {by_study} by study' in said


@needs_tables
def test_siim_counts(before, after):
    b, a = before.images, after.images
    assert (b.study.nunique(), len(b), len(a)) == (6054, 6334, 6117)
    assert per_class(b.drop_duplicates('study').label) == [1676, 2855, 1049, 474]
    assert per_class(b.label) == [1736, 3007, 1108, 483]
    assert per_class(a.label) == [1736, 2855, 1049, 477]
    assert (after.notes['images_read'], after.notes['images_dropped_by_rule']) == (6334, 217)
    assert a.study.nunique() == 6054, 'the rule drops images, never a study'
    assert (b.height.min(), b.height.max(), b.width.min(), b.width.max()) == (846, 4891, 1140, 4891)


@needs_tables
def test_siim_boxes(before, after):
    s = box_statistics(before.images)
    assert s.images.tolist() == [0, 2854, 1049, 391] and s.images.sum() == 4294
    assert s.boxes.tolist() == [0, 5881, 1435, 537] and s.boxes.sum() == 7853
    assert s.both_halves[1:].mul(100).round().tolist() == [99, 32, 32]
    assert s.median_area[1:].mul(100).round(1).tolist() == [17.6, 6.2, 5.8]
    pd.testing.assert_frame_equal(s, box_statistics(after.images))  # the rule drops no image with boxes
    assert (after.images.label > 0).sum() == 4381 and after.images.annotated.sum() == 1736 + 4294
    assert after.notes['images_with_clipped_boxes'] == 1
    assert all(
        x >= 0 and y >= 0 and x + w <= W + 1e-6 and y + h <= H + 1e-6
        for r, W, H in zip(after.images.boxes, after.images.width, after.images.height)
        for x, y, w, h in r
    )


@needs_tables
def test_siim_patients(before):
    g = before.images.groupby('patient')
    assert before.images.patient.nunique() == 3261
    assert (g.study.nunique() > 1).sum() == 1200 and g.study.nunique().max() == 25
    assert (g.label.nunique() > 1).sum() == 770


@needs_tables
def test_siim_splits(after):
    "What study.md says of leakage: nothing by patient, more than half by study, about 63 % of images in an image split."
    im = after.images
    shares = im.label.value_counts(normalize=True).sort_index().values
    folds = assign_folds(im, 5, 0)
    assert np.abs(pd.crosstab(folds, im.label, normalize='index').values - shares).max() < 0.01
    assert pd.crosstab(im.patient, folds).gt(0).sum(axis=1).max() == 1
    assert audit_leaks(im, folds).leaked.tolist() == [0, 0, 0]
    study, image = (audit_leaks(im, assign_folds(im, 5, 0, by)).set_index('level') for by in ('study', 'image'))
    assert study.leaked['study'] == 0 and 0.54 < study.share['patient'] < 0.58 and 0.59 < study.images['patient'] < 0.63
    assert image.leaked['study'] > 0 and 0.55 < image.share['patient'] < 0.59 and 0.60 < image.images['patient'] < 0.65
    assert not np.array_equal(folds, assign_folds(im, 5, 1)) and np.array_equal(folds, assign_folds(im, 5, 0))


@needs_tables
def test_siim_round_trip(after, tmp_path):
    folds = np.arange(len(after.images)) % 5
    save_cohort(after, tmp_path / 'c', fold=folds)
    again = load_cohort(tmp_path / 'c')
    assert again.digest == after.digest and (again.images.fold == folds).all() and again.root == after.root
    assert again.images.boxes.tolist() == after.images.boxes.tolist()
    assert read_cohort(tmp_path / 'c').digest == after.digest  # adapter 'saved'
    t = table_cohort(after, folds).set_index(['by', 'level', 'count'])
    assert t.loc['all', '', 'patients']['all'].item() == 3261 and t.loc['all', '', 'boxes'][['typical']].item() == 5881
    assert t.loc['fold'].xs('boxes', level='count')['all'].sum() == 7853


def test_digest_sees_every_column(tmp_path):
    c = read_cohort(tiny(tmp_path / 't'))
    for k in COLUMNS:
        changed = c.images.copy()
        v = changed[k].iloc[0]
        changed[k] = [
            (
                [(1.0, 1.0, 2.0, 2.0)]
                if k == 'boxes'
                else not v
                if k == 'annotated'
                else v + '_'
                if isinstance(v, str)
                else 7
            )
        ] + changed[k].tolist()[1:]
        assert C.Cohort(changed, c.root, c.name).digest != c.digest, k
    assert C.Cohort(c.images.assign(fold=1), c.root / 'elsewhere', 'x').digest == c.digest


# ---- real radiographs -----------------------------------------------------------------------------------------------------


@needs_cxr
def test_real_cxr():
    c, everything = read_cohort(CXR), read_cohort(CXR, 'real_cxr_all')
    im = c.images
    assert (
        per_class(im.label) == [55, 51, 47, 97]
        and len(everything.images) == 987
        and (everything.images.label >= 0).sum() == 250
    )
    s = box_statistics(im)
    assert s.both_halves[['typical', 'indeterminate']].tolist() == [1, 0] and s.boxes.tolist() == [0, 103, 49, 0]
    assert (im.height == 1024).all() and im.annotated.all() and im.source.eq('nih').all()
    assert im[im.label == 1]['view'].value_counts().to_dict() == dict(AP=44, PA=7)
    assert (everything.images.mask_path != '').sum() == 32 and (everything.images.lung_mask_path != '').sum() == 78
    assert all((c.root / p).is_file() for p in everything.images.path) and all(
        (c.root / p).is_file() for p in everything.images.mask_path if p
    )
    for data in (im, everything.images):
        assert audit_leaks(data, assign_folds(data, 5)).leaked.tolist() == [0, 0, 0]
        assert audit_leaks(data, assign_folds(data, 5, by='image')).leaked[0] > 0
    assert (everything.images.groupby('group').patient.nunique() > 1).any(), 'groups are coarser than patients'


@pytest.fixture(scope='module')
def radiographs():
    if not CXR.is_dir():
        pytest.skip('the real radiographs are not on this machine (../shared/data/real_cxr)')
    c = read_cohort(CXR, surrogate=False)
    pixels = [cv2.imread(str(c.root / p), cv2.IMREAD_GRAYSCALE) for p in c.images.path]
    return c, pixels, perceptual_hashes(pixels)


def gamma(a, g):
    return (255 * (a / 255) ** g).astype(np.uint8)


def jpeg(a, q):
    return cv2.imdecode(cv2.imencode('.jpg', a, [cv2.IMWRITE_JPEG_QUALITY, q])[1], cv2.IMREAD_GRAYSCALE)


def crop(a, f):
    h, w = a.shape
    return a[int(h * f) : h - int(h * f), int(w * f) : w - int(w * f)]


def rotate(a, t):
    h, w = a.shape
    return cv2.warpAffine(a, cv2.getRotationMatrix2D((w / 2, h / 2), t, 1), (w, h))


def stretch(a):
    lo, hi = np.percentile(a, (5, 95))
    return (np.clip((a - lo) / (hi - lo), 0, 1) * 255).astype(np.uint8)


COPIES = dict(  # how it was changed: (change, share found at least, at most)
    same=(lambda a: a, 1, 1),
    jpeg30=(lambda a: jpeg(a, 30), 1, 1),
    small=(lambda a: cv2.resize(a, (128, 128), interpolation=cv2.INTER_AREA), 1, 1),
    brighter=(lambda a: gamma(a, 0.7), 1, 1),
    darker=(lambda a: gamma(a, 1.5), 1, 1),
    window=(stretch, 0.99, 1),
    clahe=(lambda a: cv2.createCLAHE(2, (8, 8)).apply(a), 0.99, 1),
    negative=(lambda a: 255 - a, 1, 1),
    crop1=(lambda a: crop(a, 0.01), 0.99, 1),
    combined=(lambda a: jpeg(gamma(crop(a, 0.01), 0.8), 50), 0.99, 1),
    equalised=(cv2.equalizeHist, 0.97, 1),
    text=(lambda a: cv2.putText(a.copy(), 'R AP 12:30', (20, 60), 0, 1.2, 255, 3), 0.96, 1),
    bars=(lambda a: cv2.copyMakeBorder(a, 0, 0, 12, 12, cv2.BORDER_CONSTANT, value=0), 0.95, 1),
    rotated=(lambda a: rotate(a, 2), 0.85, 0.97),
    crop2=(lambda a: crop(a, 0.02), 0.55, 0.8),
    crop5=(lambda a: crop(a, 0.05), 0, 0.02),
    mirrored=(lambda a: a[:, ::-1], 0, 0.02),
)


def test_copy_detection_rates(radiographs):
    "The table of the notebook, limits of the method included."
    _, pixels, hashes = radiographs
    some = np.random.default_rng(0).choice(len(pixels), 100, replace=False)
    for name, (change, least, most) in COPIES.items():
        d = np.array([hash_distances(hashes[[i]], perceptual_hashes([change(pixels[i])]))[0, 0] for i in some])
        assert least <= (d <= DUPLICATE_DISTANCE).mean() <= most, (name, (d <= DUPLICATE_DISTANCE).mean())


def test_false_alarms(radiographs):
    "No alarm in 485,000 pairs of strangers; the usual 64 bits at a threshold of 10 would raise hundreds."
    import imagehash

    c, pixels, hashes = radiographs
    g = pd.factorize(c.images.group)[0]
    i, j = np.triu_indices(len(g), 1)
    strangers = g[i] != g[j]
    d = hash_distances(hashes, hashes)[i, j]
    assert strangers.sum() > 485_000 and d[strangers].min() > DUPLICATE_DISTANCE + 20
    assert near_duplicates(hashes).empty
    assert duplicate_distance(hashes, c.images.group) == DUPLICATE_DISTANCE
    small = np.array([imagehash.phash(Image.fromarray(a)).hash.ravel() for a in pixels]).astype(np.float32) * 2 - 1
    assert ((64 - small @ small.T) / 2)[i, j][strangers].__le__(10).mean() > 0.0015


def test_audit_fires_on_a_planted_copy(radiographs):
    c, pixels, hashes = radiographs
    im, folds = c.images, assign_folds(c.images, 5)
    silent = audit_leaks(im, folds, hashes).set_index('level')
    assert silent.leaked.to_dict() == dict(patient=0, group=0, study=0, copy=0)
    k = 17
    planted = pd.concat(
        [im, im.iloc[[k]].assign(image='copy', patient='someone else', group='someone else', study='another')],
        ignore_index=True,
    )
    loud = audit_leaks(
        planted,
        np.append(folds, (folds[k] + 1) % 5),
        np.vstack([hashes, perceptual_hashes([jpeg(gamma(crop(pixels[k], 0.01), 1.3), 60)])]),
    ).set_index('level')
    assert (
        loud.leaked['copy'] == 2
        and loud.leaked['patient'] == 0
        and set(loud.example['copy'].split(' ~ ')) == {im.image[k], 'copy'}
    )
    same_fold = audit_leaks(planted, np.append(folds, folds[k]), np.vstack([hashes, hashes[[k]]])).set_index('level')
    assert same_fold.leaked['copy'] == 0, 'a copy within one fold leaks nothing'


def packed(bits):  # (n, 784) bool -> (n, 13) uint64
    return np.packbits(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64))), axis=1).view(np.uint64)


@pytest.mark.parametrize('most', [0, 1, 60, DUPLICATE_DISTANCE, 300, 351, 352, 353, 380])
def test_near_duplicates_equals_brute_force(most):
    "Copies and negatives one bit below, at and one above the limit, wherever the bits lie and however the images fall into blocks."
    r = np.random.default_rng(most)
    bits = r.integers(0, 2, (300, HASH_SIZE**2)).astype(bool)
    planted = {}
    for k, (distance, where, negative) in enumerate(
        (d, w, n) for d in (most - 1, most, most + 1) if d >= 0 for w in ('first', 'last', 'any') for n in (False, True)
    ):
        places = np.arange(HASH_SIZE**2)
        places = dict(first=places, last=places[::-1], any=r.permutation(places))[where][:distance]
        bits[200 + k] = bits[k] ^ negative
        bits[200 + k, places] ^= True
        planted[k, 200 + k] = distance
    d = (bits[:, None] != bits[None]).sum(-1)
    d = np.minimum(d, bits.shape[1] - d)
    want = [(i, j, int(d[i, j])) for i in range(300) for j in range(i + 1, 300) if d[i, j] <= most]
    assert {w[:2] for w in want} >= {ij for ij, distance in planted.items() if distance <= most}
    for block in (7, 100, 299, 2048):
        found = near_duplicates(packed(bits), most, block)
        assert list(map(tuple, found.values.tolist())) == want
    assert (
        found.dtypes.eq(int).all()
        and near_duplicates(packed(bits[:1])).empty
        and near_duplicates(packed(bits[:0])).empty
    )


def test_phantom_with_a_planted_leak(tmp_path):
    "Copies under a new patient's name pass the check by patient and are found by their pixels."
    root = write_phantom(PhantomConfig(n_patients=16, px=64, seed=3, patient_leak=0.3), tmp_path / 'p', workers=1)
    c = read_cohort(root)
    truth = pd.read_csv(root / 'truth.csv', dtype=str, keep_default_na=False).set_index('image').reindex(c.images.image)
    copies = {
        frozenset((i, of))
        for i, of, kind in zip(truth.index, truth.leak_of, truth.leak)
        if kind == 'copy' and of in truth.index
    }
    hashes = hash_cohort(c, workers=0)
    pairs = {frozenset(c.images.image.iloc[[a, b]]) for a, b in near_duplicates(hashes)[['a', 'b']].values}
    assert copies and copies <= pairs
    where = dict(zip(c.images.image, range(len(c.images))))
    folds = np.zeros(len(c.images), int)
    for i, _of in copies:
        folds[where[i]] = 1
    folds = (
        pd.Series(folds).groupby(c.images.patient).transform('max').values
    )  # patient-disjoint, with a copy on the other side
    alarms = audit_leaks(c.images, folds, hashes).set_index('level')
    assert alarms.leaked['patient'] == 0 and (alarms.leaked['copy'] > 0 or folds.min() == folds.max())


# ---- small trees ----------------------------------------------------------------------------------------------------------


def write_dicom(path, patient='p0', study='s0', size=(60, 80), **more):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(path.stem)])
    ds.PatientID, ds.StudyInstanceUID, ds.Modality, ds.PatientSex, ds.PatientAge, ds.ViewPosition = (
        patient,
        study,
        'DX',
        'F',
        '061Y',
        'AP',
    )
    ds.Rows, ds.Columns = size
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 15, 0, 1, 'MONOCHROME2'
    ds.PixelData = np.random.default_rng(len(str(path.stem))).integers(0, 4000, size).astype('<u2').tobytes()
    for k, v in more.items():
        setattr(ds, k, v) if v is not None else delattr(ds, k)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


BOX = "\"[{'x': 10.0, 'y': 5.0, 'width': 20.0, 'height': 30.0}]\",opacity 1 10 5 30 35"


def tiny(root, headers={}, change={}):
    "Four studies, five images: s0 negative, s1 typical with a sibling that has no box, s2, s3. `change`: file -> (before, after)."
    images = dict(
        i0=('s0', 'p0', ''), i1=('s1', 'p1', BOX), i2=('s1', 'p1', ''), i3=('s2', 'p2', BOX), i4=('s3', 'p2', '')
    )
    root.mkdir(parents=True)
    files = {
        'train_study_level.csv': 'id,'
        + ','.join(HEADINGS)
        + '\ns0_study,1,0,0,0\ns1_study,0,1,0,0\ns2_study,0,0,1,0\ns3_study,0,0,0,1\n',
        'train_image_level.csv': 'id,boxes,label,StudyInstanceUID\n'
        + ''.join(f'{i}_image,{b or ",none 1 0 0 1 1"},{s}\n' for i, (s, _, b) in images.items()),
        'patients.csv': 'patientid,imageid\n' + ''.join(f'{p},{i}\n' for i, (_, p, _) in images.items()),
    }
    for name, text in files.items():
        before, after = change.get(name, ('', ''))
        assert before in text
        (root / name).write_text(text.replace(before, after, 1) if before else text)
    for i, (s, p, _) in images.items():
        write_dicom(root / 'train' / s / f'series_{i}' / f'{i}.dcm', **(dict(patient=p, study=s) | headers.get(i, {})))
    return root


def refused(f, *args, **kw):
    with pytest.raises(InputError) as e:
        f(*args, **kw)
    return e.value


def test_tiny_tree(tmp_path):
    c = read_cohort(tiny(tmp_path / 't'))
    assert c.images.image.tolist() == ['i0', 'i1', 'i3', 'i4'] and c.images.label.tolist() == [0, 1, 2, 3]
    assert c.images.annotated.tolist() == [True, True, True, False] and c.images.boxes[1] == [(10.0, 5.0, 20.0, 30.0)]
    r = c.images.iloc[1]
    assert (r.patient, r.group, r.study, r.height, r.width, r['view'], r.sex, r.age, r.detector, r.photometric) == (
        'p1',
        'p1',
        's1',
        60,
        80,
        'AP',
        'F',
        61.0,
        'DX',
        'MONOCHROME2',
    )
    assert (c.root / r.path).is_file() and list(c.images)[: len(COLUMNS)] == list(COLUMNS)
    assert len(read_siim(c.root, rule=False).images) == 5


STUDIES, IMAGES = 'train_study_level.csv', 'train_image_level.csv'
FAULTS = {  # what is wrong: (file, before, after, words of the message)
    'unknown column': (STUDIES, HEADINGS[1], 'Typical', ('line 1', 'column')),
    'column missing': (
        IMAGES,
        'id,boxes,label',
        'id,box,label',
        ('line 1', 'unknown column', 'column box', 'id, boxes, label'),
    ),
    'study twice': (STUDIES, 's1_study', 's0_study', ('line 3', 'column id', 'twice')),
    'two classes': (STUDIES, 's1_study,0,1', 's1_study,1,1', ('line 3', 'not one-hot')),
    'no class': (STUDIES, 's1_study,0,1', 's1_study,0,0', ('line 3', 'not one-hot')),
    'class not 0/1': (STUDIES, 's1_study,0,1', 's1_study,0,yes', ('line 3', HEADINGS[1], 'yes')),
    'not a study id': (STUDIES, 's1_study', 's1', ('line 3', 'column id', '_study')),
    'short row': (STUDIES, 's1_study,0,1,0,0', 's1_study,0,1,0', ('line 3', '4 fields')),
    'image twice': (IMAGES, 'i1_image', 'i0_image', ('line 3', 'twice')),
    'unparsable boxes': (IMAGES, "{'x': 10.0", "{'x': ten", ('line 3', 'column boxes', 'cannot be read')),
    'code in boxes': (
        IMAGES,
        "[{'x': 10.0, 'y': 5.0, 'width': 20.0, 'height': 30.0}]",
        "__import__('os').getcwd()",
        ('line 3', 'column boxes'),
    ),
    'infinite box': (IMAGES, "'x': 10.0", "'x': 1e999", ('line 3', 'not finite')),
    'zero width': (IMAGES, "'width': 20.0", "'width': 0.0", ('line 3', 'positive')),
    'negative height': (IMAGES, "'height': 30.0", "'height': -3", ('line 3', 'positive')),
    'unparsable label': (IMAGES, 'opacity 1 10 5 30 35', 'opacity 1 10 5 30', ('line 3', 'column label')),
    'label against boxes': (IMAGES, 'opacity 1 10 5 30 35', 'opacity 1 10 5 31 35', ('line 3', 'different boxes')),
    'boxes without label': (IMAGES, 'opacity 1 10 5 30 35', 'none 1 0 0 1 1', ('line 3', 'different boxes')),
    'box outside': (
        IMAGES,
        BOX,
        BOX.replace('10.0', '70.0').replace('1 10 5 30', '1 70 5 90'),
        ('line 3', 'column boxes', 'outside the image of 80 x 60'),
    ),
    'study unknown': (
        IMAGES,
        'none 1 0 0 1 1,s0',
        'none 1 0 0 1 1,s9',
        ('line 2', 'column study', 's9', 'train_study_level'),
    ),
    'no study': (IMAGES, 'none 1 0 0 1 1,s0', 'none 1 0 0 1 1,', ('line 2', 'StudyInstanceUID', 'no study')),
    'wrong study': (IMAGES, 'none 1 0 0 1 1,s0', 'none 1 0 0 1 1,s1', ('line 2', 'another study')),
    'file missing': (IMAGES, 'i0_image', 'i8_image', ('line 2', 'i8', 'no file')),
    'unclosed quote': (IMAGES, '}]"', '}]', ('line 5', 'not a csv file')),
}


@pytest.mark.parametrize('name', FAULTS)
def test_faulty_tables_are_refused(tmp_path, name):
    file, before, after, words = FAULTS[name]
    e = refused(read_cohort, tiny(tmp_path / 't', change={file: (before, after)}))
    assert file in str(e) and e.hint and all(w in str(e) for w in words), str(e)


def test_many_faults_are_counted(tmp_path):
    root = tiny(tmp_path / 't')
    for f in sorted((root / 'train').rglob('*.dcm'))[:4]:
        f.unlink()
    e = refused(read_cohort, root)
    assert 'lines 2, 3, 4 and 1 more' in str(e)


HEADERS = {  # header changes: image -> elements, words of the message
    'no patient': (dict(i0=dict(patient='')), ('PatientID', 'line 2', 'patients table')),
    'patient element absent': (dict(i0=dict(PatientID=None)), ('PatientID', 'line 2')),
    'one study, two patients': (dict(i2=dict(patient='p9')), ('several patients', 'lines 3, 4')),
    'another study in the header': (dict(i0=dict(study='s1')), ('line 2', 'another study')),
    'image smaller than its box': (dict(i3=dict(size=(20, 20))), ('line 5', 'outside the image of 20 x 20')),
}


@pytest.mark.parametrize('name', HEADERS)
def test_headers_that_contradict_the_tables(tmp_path, name):
    headers, words = HEADERS[name]
    e = refused(read_cohort, tiny(tmp_path / 't', headers=headers))
    assert e.hint and all(w in str(e) for w in words), str(e)


def test_patients_table(tmp_path):
    "It stands in for an empty PatientID, and must not contradict a header that has one."
    root = tiny(tmp_path / 't', headers=dict(i0=dict(patient='')))
    assert read_siim(root, patients=root / 'patients.csv').images.patient.tolist() == ['p0', 'p1', 'p2', 'p2']
    (root / 'patients.csv').write_text((root / 'patients.csv').read_text().replace('p1,i1', 'p7,i1'))
    assert 'another patient' in str(refused(read_siim, root, patients=root / 'patients.csv'))
    (root / 'patients.csv').write_text('patientid,imageid\np0,i0\n')
    assert 'lacks this image' in str(refused(read_siim, root, patients=root / 'patients.csv'))


def test_broken_dicom_is_named(tmp_path):
    root = tiny(tmp_path / 't')
    f = next((root / 'train').rglob('i3.dcm'))
    f.write_bytes(f.read_bytes()[:500])
    e = refused(read_cohort, root)
    assert '1 of 5 files' in str(e) and 'i3.dcm' in str(e) and 'verify_tree' in e.hint


def test_duplicate_file_and_missing_tree(tmp_path):
    root = tiny(tmp_path / 't')
    shutil.copytree(root / 'train' / 's0', root / 'train' / 's0b')
    assert 'lies twice' in str(refused(read_cohort, root))
    shutil.rmtree(root / 'train')
    assert 'no folder train/' in str(refused(read_siim, root))
    assert 'no such folder' in str(refused(read_cohort, tmp_path / 'nowhere'))
    assert 'no known corpus' in str(refused(read_cohort, tmp_path))
    (root / STUDIES).write_bytes(b'\xff\xfe\x00bad')
    assert STUDIES in str(refused(read_cohort, root))


@pytest.mark.parametrize('text', ['', 'id\n', 'a,b\n1,2\n'])
def test_empty_tables(tmp_path, text):
    root = tiny(tmp_path / 't')
    (root / STUDIES).write_text(text)
    assert STUDIES in str(refused(read_cohort, root))


def test_rule_and_boxes():
    t = pd.DataFrame(dict(study=list('aabbc'), boxes=[[(0, 0, 1, 1)], [], [], [], []]))
    assert organisers_rule(t).index.tolist() == [0, 2, 3, 4]
    assert (
        parse_label('opacity 1 1 2 4 6 opacity 1 0 0 5 5')
        == [(1, 2, 3, 4), (0, 0, 5, 5)]
        == parse_boxes("[{'x':1,'y':2,'width':3,'height':4},{'x':0,'y':0,'width':5,'height':5}]")
    )
    assert clip_boxes([(-0.5, 0, 10, 10)], 100, 100) == [(0, 0, 9.5, 10)]
    with pytest.raises(ValueError):
        clip_boxes([(-1.5, 0, 10, 10)], 100, 100)
    r = np.random.default_rng(0)
    for _ in range(50):
        boxes = [tuple(map(float, (*r.integers(0, 30, 2), *r.integers(1, 20, 2)))) for _ in range(r.integers(1, 5))]
        grid = np.zeros((50, 60), bool)
        for x, y, w, h in boxes:
            grid[int(y) : int(y + h), int(x) : int(x + w)] = True
        assert abs(union_area(boxes, 50, 60) - grid.mean()) < 1e-12


def test_folds():
    r = np.random.default_rng(0)
    patient = r.integers(0, 60, 400).astype(str)
    im = pd.DataFrame(
        dict(
            image=[f'{i:03}' for i in range(400)],
            study=[f'{p}-{i % 3}' for i, p in enumerate(patient)],
            patient=patient,
            group=patient,
            label=r.choice(5, 400, p=[0.2, 0.3, 0.2, 0.2, 0.1]) - 1,
        )
    )
    f = assign_folds(im, 4)
    assert pd.crosstab(im.group, f).gt(0).sum(axis=1).max() == 1 and set(f) == set(range(4))
    assert pd.crosstab(im.study, assign_folds(im, 4, by='study')).gt(0).sum(axis=1).max() == 1
    assert 'folds' in str(refused(assign_folds, im, 61)) and 'not known' in str(
        refused(assign_folds, im, 4, by='hospital')
    )
    with pytest.warns(UserWarning, match='atypical occurs in 1 groups'):
        assign_folds(im.assign(label=np.where(im.index == 0, 3, 0)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assign_folds(im, 4)


# ---- other corpora --------------------------------------------------------------------------------------------------------


def picture(path, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)).save(path)


def chestxray14(root):
    root.mkdir()
    (root / 'Data_Entry_2017.csv').write_text(
        'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n'
        '00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,\n00000001_001.png,Nodule|Mass,1,1,58,M,AP,2894,2729,0.143,0.143,\n00000002_000.png,No Finding,0,2,081Y,F,PA,2500,2048,0.171,0.171,\n'
    )
    (root / 'BBox_List_2017.csv').write_text(
        'Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Cardiomegaly,100,200,300,400\n00000001_001.png,Nodule,225.08474576,547.01921763,86.77966102,79.18644068\n'
    )
    for n, folder in (
        ('00000001_000', 'images_001/images'),
        ('00000001_001', 'images_002/images'),
        ('00000002_000', 'images_002/images'),
    ):
        picture(root / folder / f'{n}.png')
    return root


def test_chestxray14(tmp_path):
    c = read_cohort(chestxray14(tmp_path / 'nih'))
    assert c.name == 'ChestX-ray14' and c.images.patient.tolist() == ['1', '1', '2'] and (c.images.label == -1).all()
    assert (
        c.images.boxes.map(len).tolist() == [0, 1, 0]
        and c.images.age.tolist() == [58.0, 58.0, 81.0]
        and c.images['view'].tolist() == ['PA', 'AP', 'PA']
    )
    assert (
        c.images.path[1] == 'images_002/images/00000001_001.png'
        and c.images.study.nunique() == 3
        and c.images.height.tolist() == [1024] * 3
    )
    (c.root / c.images.path[0]).unlink()
    e = refused(read_cohort, c.root)
    assert '1 of 3 image files are missing' in str(e) and '00000001_000.png' in str(e) and 'line 2' in str(e)


def test_chexpert(tmp_path):
    root = tmp_path / 'CheXpert-v1.0-small'
    head = 'Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Lung Opacity\n'
    row = lambda part, p, s, v, side='Frontal', view='AP': (
        f'CheXpert-v1.0-small/{part}/patient{p}/study{s}/{v}.jpg,Female,68,{side},{view},,1.0\n'
    )
    root.mkdir()
    (root / 'train.csv').write_text(
        head
        + row('train', '00001', 1, 'view1_frontal')
        + row('train', '00001', 2, 'view1_frontal')
        + row('train', '00002', 1, 'view2_lateral', 'Lateral', '')
    )
    (root / 'valid.csv').write_text(head + row('valid', '64541', 1, 'view1_frontal', view=''))
    for p in ('train/patient00001/study1', 'train/patient00001/study2', 'valid/patient64541/study1'):
        picture(root / p / 'view1_frontal.jpg')
    for start in (tmp_path, root):
        c = read_cohort(start)
        assert c.images.patient.tolist() == ['patient00001'] * 2 + ['patient64541'] and c.images['view'].tolist() == [
            'AP',
            'AP',
            'unknown',
        ]
        assert (
            (c.root / c.images.path[2]).is_file()
            and c.images[['height', 'width']].values.tolist() == [[50, 40]] * 3
            and c.images.finding[0] == 'Lung Opacity'
            and c.images.sex[0] == 'F'
        )
    (root / 'train/patient00001/study2/view1_frontal.jpg').unlink()
    assert 'line 3' in str(refused(read_cohort, root))


def mimic(root, *rows):
    root.mkdir(exist_ok=True)
    table = root / 'mimic-cxr-2.1.0-metadata.csv.gz'
    with gzip.open(table, 'wt') as f:
        f.write('\n'.join(['dicom_id,subject_id,study_id,ViewPosition,Rows,Columns', *rows]))
    return table


def test_mimic_as_dicom(tmp_path):
    "The DICOM release: equal names in different folders are different radiographs, and the patient is the table's."
    table = mimic(tmp_path, 'a-1,10000001,501,PA,40,30', 'b-1,11000002,502,AP,40,30', 'c-1,11000002,502,LATERAL,40,30')
    for p in ('p10/p10000001/s501/a-1', 'p11/p11000002/s502/b-1', 'p11/p11000002/s502/c-1'):
        write_dicom(tmp_path / f'files/{p}.dcm')
    c = read_cohort(tmp_path)
    assert c.images.patient.tolist() == ['10000001', '11000002'] and c.images['view'].tolist() == ['PA', 'AP']
    assert all((c.root / p).is_file() for p in c.images.path) and c.notes['of_frontal'] == 2
    whole = table.read_bytes()
    table.write_bytes(whole[:-12])
    assert table.name in str(refused(read_cohort, tmp_path, 'mimic'))  # cut short
    table.write_bytes(b'no gzip at all')
    assert 'not a csv file' in str(refused(read_cohort, tmp_path, 'mimic'))


def test_mimic_refuses(tmp_path):
    mimic(tmp_path, 'a-1,10000001,501,PA,40,30', 'a-1,10000001,502,PA,40,30')
    assert 'occurs twice' in str(refused(read_cohort, tmp_path))
    mimic(tmp_path, 'a-1,10000001,501,PA,40,30')
    assert 'none of its frontal radiographs is here' in str(refused(read_cohort, tmp_path))
    picture(tmp_path / 'files/p10/p10000001/s999/a-1.jpg')  # under another study than the table says
    assert '1 of 1 image files are missing' in str(refused(read_cohort, tmp_path))
    mimic(tmp_path, 'a-1,10000001,999,PA,forty,30')
    assert 'Rows' in str(refused(read_cohort, tmp_path))


def test_plain_table(tmp_path):
    (tmp_path / 'mine').mkdir()
    table = tmp_path / 'mine' / 'mine.csv'
    picture(tmp_path / 'mine/images/a.png')
    picture(tmp_path / 'mine/images/b.jpg')
    write_dicom(tmp_path / 'mine/images/sub/c.dcm', patient='zz')
    text = "image,patient,label,boxes,view\na,1,typical,\"[{'x': 1, 'y': 2, 'width': 10, 'height': 10}]\",AP\nb,1,0,,\nc,2,,,\n"
    table.write_text(text)
    for start in (tmp_path / 'mine', table):
        c = read_own(start)
        assert (
            c.images.label.tolist() == [1, 0, -1]
            and c.images.boxes[0] == [(1.0, 2.0, 10.0, 10.0)]
            and c.images['view'].tolist() == ['AP', 'unknown', 'AP']
        )
        assert (
            c.images.height.tolist() == [50, 50, 60]
            and c.images.path[2] == 'sub/c.dcm'
            and c.images.patient.tolist() == ['1', '1', '2']
            and c.images.annotated.tolist() == [True, True, False]
        )
        assert c.images.age.isna().tolist() == [True, True, False]
    for before, after, words in (
        (',typical', ',tipical', ('line 2', 'label')),
        ('a,1', 'a,', ('line 2', 'patient')),
        ('patient', 'person', ('column person',)),
        ('b,1', 'a,1', ('line 3', 'twice')),
        ('c,2', 'd,2', ('line 4', 'missing')),
        ("'x': 1,", "'x': 45,", ('line 2', 'outside')),
        ("'x': 1,", "'x: 1,", ('line 2', 'boxes')),
    ):
        table.write_text(text.replace(before, after, 1))
        e = refused(read_cohort, table)
        assert all(w in str(e) for w in words) and 'mine.csv' in str(e), str(e)
    table.write_text('image,label\na,0\n')
    assert 'without patient no split is safe' in str(refused(read_cohort, table))


# ---- a folder without a table -----------------------------------------------------------------------------------------------


def loose(root):
    "Two DICOM files of a patient (one by a UID for a name), one without PatientID, and pictures of which two share a stem."
    for name, who in (('a/1.2.840.10', 'p0'), ('a/x.dcm', 'p0'), ('b/y', '')):
        write_dicom(root / name, patient=who, study='s' + name[0])
    for name in ('c/z.png', 'c/z.jpg', 'c/w.jpeg'):
        picture(root / name)
    for name in ('notes.txt', 'labels.CSV', 'a/info.json', '.cache/q.png', '.q.png', 'DICOMDIR', 'README'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text('no image')
    return root


def test_folder(tmp_path):
    c = read_own(loose(tmp_path / 'mine'), 'folder')
    assert c.images.image.tolist() == ['a/1.2.840.10', 'a/x', 'b/y', 'c/w', 'c/z.jpg', 'c/z.png'] and c.name == 'mine'
    assert (
        c.images.patient.tolist() == ['p0', 'p0', 'study:sb', 'file:c/w', 'file:c/z.jpg', 'file:c/z.png']
        and c.images.group.tolist() == c.images.patient.tolist()
    )
    assert c.images.study.tolist()[:3] == ['sa', 'sa', 'sb'] and c.images.height.tolist() == [60, 60, 60, 50, 50, 50]
    assert (
        (c.images.label == -1).all()
        and not c.images.annotated.any()
        and not c.images.boxes.map(len).any()
        and all((c.root / p).is_file() for p in c.images.path)
    )
    assert c.notes == dict(images_read=6, images_of_unknown_patients=4)
    ruled = read_own(c.root, 'folder', patient='^(.)/').images.patient.tolist()
    assert ruled == ['p0', 'p0', 'b', 'c', 'c', 'c'], 'the header comes before the rule'
    assert load_cohort(save_cohort(c, tmp_path / 'saved')).digest == c.digest


def test_folder_is_never_guessed(tmp_path):
    (loose(tmp_path / 'mine') / 'labels.CSV').unlink()
    assert "adapter='folder'" in refused(read_cohort, tmp_path / 'mine').hint


@pytest.mark.parametrize(
    'name, text',
    [
        ('c/bad.png', b'\x89PNG'),
        ('c/bad.jpg', b''),
        ('bad.dcm', b'DICM'),
        ('bad', b'x' * 200),
        ('bad.tif', b'II*\0'),
        ('scans.zip', b'PK'),
    ],
)
def test_folder_with_a_file_that_cannot_be_read(tmp_path, name, text):
    (loose(tmp_path / 'mine') / name).write_bytes(text)
    e = refused(read_cohort, tmp_path / 'mine', 'folder')
    assert '1 of 7 files cannot be read' in str(e) and name in str(e) and e.hint


def test_folder_faults(tmp_path):
    root = loose(tmp_path / 'mine')
    for i in range(12):
        (root / f'bad{i:02}.png').write_bytes(b'')
    assert '12 of 18' in str(e := refused(read_cohort, root, 'folder')) and 'bad09.png, ...' in str(e)
    for f in root.glob('bad*'):
        f.unlink()
    (root / 'gone.png').symlink_to(root / 'nowhere.png')
    assert 'gone.png' in str(refused(read_cohort, root, 'folder'))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'a.txt').write_text('x')
    assert 'no radiographs' in str(refused(read_cohort, tmp_path / 'empty', 'folder'))
    (root / 'gone.png').unlink()
    for rule in ('^(p\\d)/', '(', '^c'):
        assert refused(read_cohort, root, 'folder', patient=rule).field == 'patient'


def test_values_of_a_table_are_read_however_they_are_written(tmp_path):
    "Spaces, case, words for yes and for the sexes; what is not understood is refused, with its line."
    for k in 'abc':
        picture(tmp_path / f'images/{k}.png')
    table = tmp_path / 'mine.csv'
    text = 'image,patient,sex,view,age,annotated\na,P1,Female,ap,61,yes\nb, P1 ,f,PA,,1.0\nc,P2,m,,30,No\n'
    table.write_text(text)
    c = read_own(table).images
    assert c.patient.tolist() == ['P1', 'P1', 'P2'] and c.sex.tolist() == ['F', 'F', 'M']
    assert c['view'].tolist() == ['AP', 'PA', 'unknown'] and c.annotated.tolist() == [True, True, False]
    for before, after, words in (
        (' P1 ', 'p1', ("'P1' and 'p1'", 'column patient', 'same way everywhere')),
        (',Female', ',woman', ('line 2', 'column sex', 'female')),
        (',61', ',411', ('line 2', 'column age')),
        (',61', ',-3', ('line 2', 'column age')),
        (',yes', ',perhaps', ('line 2', 'column annotated', 'yes')),
    ):
        table.write_text(text.replace(before, after, 1))
        message = str(refused(read_cohort, table))
        assert all(w in message for w in words), message


# ---- what people bring


def test_headers_say_that_two_patients_of_a_table_are_one(tmp_path):
    "A column `patient` that holds studies: the DICOM files know better. One file twice is refused as well."
    root = write_phantom(PhantomConfig(n_patients=12, px=64, seed=8), tmp_path / 'phantom', workers=1)
    whole = read_siim(root).images
    several = whole[whole.patient.duplicated(keep=False)].patient.iloc[0]
    table = whole[['image', 'patient', 'path']].assign(label=whole.label)
    table.to_csv(root / 'own.csv', index=False)
    read = lambda: read_own(root / 'own.csv', 'csv', folder=root)
    assert read().images.patient.tolist() == whole.patient.tolist()
    table.assign(patient=table.image).to_csv(root / 'own.csv', index=False)
    with pytest.raises(InputError, match='headers say that these are of one patient'):
        read()
    table.assign(patient=table.image, group=table.patient).to_csv(root / 'own.csv', index=False)
    assert (read().images.group == several).sum() > 1
    pd.concat([table, table[:1].assign(image='again', patient='stranger')]).to_csv(root / 'own.csv', index=False)
    with pytest.raises(InputError, match='the file occurs twice'):
        read()


def lone_table(root, rows, **pictures):  # name -> shape
    "A table and its pictures, written."
    for name, shape in pictures.items():
        file = root / name.replace('__', '/').replace('_dot_', '.')
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    (root / 'table.csv').write_text(rows, encoding='utf-8')
    return root / 'table.csv'


def test_a_mask_is_never_taken_for_the_radiograph(tmp_path):
    "images/X.png and masks/X.png share a name: refused with both paths, told apart by the column path."
    files = dict(images__x_dot_png=(8, 8), masks__x_dot_png=(8, 8))
    table = lone_table(tmp_path, 'image,patient\nx,1\n', **files)
    with pytest.raises(InputError, match='images/x.png and masks/x.png'):
        read_own(table, folder=tmp_path)
    assert read_own(table).images.path.tolist() == ['x.png']  # images/ is where radiographs lie
    named = lone_table(tmp_path, 'image,patient,path\nx,1,images/x.png\n')
    assert read_own(named, folder=tmp_path).images.path.tolist() == ['images/x.png']


def test_paths_of_windows_and_endings_of_others(tmp_path):
    table = lone_table(tmp_path, 'image,patient,path\nx,1,a\\b\\x.png\n', images__a__b__x_dot_png=(8, 8))
    assert read_own(table).images.path.tolist() == ['a/b/x.png']
    shutil.rmtree(tmp_path / 'images')
    table = lone_table(tmp_path, 'image,patient\nx,1\n', images__X_dot_png=(8, 8))
    with pytest.raises(InputError, match='missing'):
        read_own(table)


def test_a_turned_picture_has_the_size_that_is_seen(tmp_path):
    table = lone_table(tmp_path, 'image,patient\nx,1\n', images__x_dot_jpg=(8, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / 'images/x.jpg').save(tmp_path / 'images/x.jpg', exif=exif)
    r = read_own(table).images.iloc[0]
    assert (r.height, r.width) == (12, 8)


@pytest.mark.parametrize(
    'rows, said',
    [
        ("image,patient,boxes\nx,1,\"[{'x': .2, 'y': .2, 'width': .5, 'height': .4}]\"\n", 'shares of the image'),
        (f"image,patient,boxes\nx,1,\"[{{'x': {'9' * 400}, 'y': 1, 'width': 2, 'height': 2}}]\"\n", 'cannot be read'),
        ('image,patient,patient\nx,1,1\n', 'a column occurs twice'),
        ('image,patient,height\nx,1,inf\n', 'not a possible value'),
        ('image,patient,path\nx,1,"images/x.png\ry"\n', 'missing'),
    ],
)
def test_odd_tables_are_refused_by_name(tmp_path, rows, said):
    table = lone_table(tmp_path, rows, images__x_dot_png=(8, 8))
    with pytest.raises(InputError, match=said) as e:
        read_own(table)
    assert 'table.csv' in str(e.value)


def test_a_table_in_latin_1_is_named_with_its_remedy(tmp_path):
    table = lone_table(tmp_path, '', images__x_dot_png=(8, 8))
    table.write_bytes('image,patient\nx,Müller\n'.encode('latin-1'))
    with pytest.raises(InputError, match='save it as UTF-8'):
        read_own(table)


def test_what_headers_hold_is_plain_text_in_the_cohort(tmp_path):
    "Markup, Markdown, formulas and line breaks of a table reach no page; the counter-test is a plain name."
    rows = 'image,patient,source,detector\nx,"=cmd|1",<script>alert(1)</script>,"A|B\nC"\ny,2,north,plain\n'
    table = lone_table(tmp_path, rows, images__x_dot_png=(8, 8), images__y_dot_png=(8, 9))
    t = read_own(table).images.set_index('image')
    text = ' '.join(t.loc['x', ['patient', 'source', 'detector']])
    assert not set('<>|`\n\r') & set(text) and not text.startswith('=')
    assert t.loc['y', ['patient', 'source', 'detector']].tolist() == ['2', 'north', 'plain']


def test_chexpert_in_batches(tmp_path):
    home = tmp_path / 'CheXpert-v1.0'
    folder = tmp_path / 'CheXpert-v1.0 batch 2 (train 1)' / 'patient00001' / 'study1'
    folder.mkdir(parents=True)
    home.mkdir()
    cv2.imwrite(str(folder / 'view1_frontal.jpg'), np.zeros((8, 9), np.uint8))
    head = 'Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding\n'
    (home / 'train.csv').write_text(
        head + 'CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg,Male,50,Frontal,AP,1.0\n'
    )
    c = read_cohort(home, 'chexpert')
    assert (c.root / c.images.path[0]).is_file() and c.images.width[0] == 9


def test_ids_with_dots_and_dashes_are_ids_of_siim(tmp_path):
    (tmp_path / 'train_study_level.csv').write_text(
        'id,Negative for Pneumonia,Typical Appearance,Indeterminate Appearance,Atypical Appearance\n1.2.840-a_study,1,0,0,0\n'
    )
    (tmp_path / 'train_image_level.csv').write_text(
        'id,boxes,label,StudyInstanceUID\n3f2a-77.b_image,,none 1 0 0 1 1,1.2.840-a\n'
    )
    table, labels = siim_labels(tmp_path)
    assert table.image.tolist() == ['3f2a-77.b'] and labels.tolist() == [0]


# ---- NIH's radiographs as read by the RSNA


def rsna_root(
    root, reads, entry, images
):  # (rsna id, nih file, class, boxes, mse); rows of NIH's table; files that are there
    "The tables as they are published, and empty files in the place of radiographs."
    mapping = [dict(subset_img_id=r, img_id=n, mse=m) for r, n, _, _, m in reads]
    (root / 'pneumonia-challenge-dataset-mappings_2018.json').write_text(json.dumps(mapping))
    lines = [(r, *b, 1) for r, _, _, boxes, _ in reads for b in boxes]
    lines += [(r, '', '', '', '', 0) for r, _, _, boxes, _ in reads if not boxes]
    head = ['patientId', 'x', 'y', 'width', 'height', 'Target']
    pd.DataFrame(lines, columns=head).to_csv(root / 'stage_2_train_labels.csv', index=False)
    classes = pd.DataFrame([(r, c) for r, _, c, _, _ in reads], columns=['patientId', 'class'])
    classes.to_csv(root / 'stage_2_detailed_class_info.csv', index=False)
    entry.to_csv(root / 'Data_Entry_2017_v2020.csv', index=False)
    (root / 'images_001' / 'images').mkdir(parents=True)
    for name in images:
        (root / 'images_001' / 'images' / name).touch()
    return root


def write_rsna_export(root, reads):  # as for `rsna_root`
    "The same reads as the RSNA's own export has them; a reader's own mark and one of a whole study lie between them."
    words = {c: f'L_{k}' for k, c in enumerate(('Normal', 'Lung Opacity', 'No Lung Opacity / Not Normal'))}
    box = lambda b: dict(zip(('x', 'y', 'width', 'height'), b))
    marks = [
        dict(SOPInstanceUID=f'1.2.{r}', labelId=words[c], data=b and box(b))
        for r, _, c, bs, _ in reads
        for b in bs or [None]
    ]
    marks += [dict(SOPInstanceUID=marks[0]['SOPInstanceUID'], labelId='T_1', data=None), dict(labelId='L_0', data=None)]
    labels = [dict(id=i, name=c + ' ' * (c == 'Normal')) for c, i in words.items()]
    groups = [dict(name='Team 1', labels=[dict(id='T_1', name='Exclude')]), dict(name='Calculated', labels=labels)]
    name = 'pneumonia-challenge-annotations-adjudicated-kaggle_2018.json'
    (root / name).write_text(json.dumps(dict(labelGroups=groups, datasets=[dict(annotations=marks)])))
    mapping = [dict(subset_img_id=r, SOPInstanceUID=f'1.2.{r}', img_id=n, mse=m) for r, n, _, _, m in reads]
    (root / 'pneumonia-challenge-dataset-mappings_2018.json').write_text(json.dumps(mapping))


def nih_rows(names):
    return pd.DataFrame(
        {
            'Image Index': names,
            'Finding Labels': 'x',
            'Follow-up #': [n[9:12].lstrip('0') or '0' for n in names],
            'Patient ID': [n[:8].lstrip('0') for n in names],
            'Patient Age': 50,
            'Patient Gender': 'F',
            'View Position': 'PA',
        }
    )


def test_rsna_reads_become_surrogate_labels(tmp_path):
    left, right = (100, 200, 300, 400), (600, 200, 300, 400)
    names = [f'0000000{k}_000.png' for k in range(1, 9)]
    opacity, other = 'Lung Opacity', 'No Lung Opacity / Not Normal'
    reads = [
        ('a', names[0], 'Normal', [], 1.0),
        ('b', names[1], opacity, [left, right], 1.0),
        ('c', names[2], opacity, [right], 1.0),
        ('d', names[3], other, [], 1.0),
        ('e', names[4], 'Normal', [], 12.0),  # not the same radiograph
        ('f', names[5], 'Normal', [], 1.0),
        ('g', names[5], other, [], 1.0),  # read twice, and differently
        ('h', names[6], 'Normal', [], 1.0),  # its file is not here
    ]
    root = rsna_root(tmp_path, reads, nih_rows(names), [n for n in names if n != names[6]])
    c = read_cohort(root)
    assert c.name == 'rsna' and c.images.label.tolist() == [0, 1, 2, 3] and c.images.annotated.all()
    assert c.images.boxes.map(len).tolist() == [0, 2, 1, 0] and c.images.patient.tolist() == ['1', '2', '3', '4']
    assert c.notes['surrogate'] and c.notes['read_twice_and_disputed'] == 2
    every = read_cohort(root, 'rsna_all')
    assert every.images.label.tolist() == [0, 1, 2, 3, -1, -1, -1] and every.images.annotated.sum() == 4
    write_rsna_export(root, reads)
    (root / 'stage_2_train_labels.csv').rename(root / 'kaggle.csv')
    assert read_cohort(root).images.label.tolist() == [0, 1, 2, 3]
    export = root / 'pneumonia-challenge-annotations-adjudicated-kaggle_2018.json'
    for before, after, words in (
        ('Calculated', 'Team 9', 'no adjudicated reads'),
        ('Not Normal', 'Odd', 'is not a class'),
    ):
        text = export.read_text()
        export.write_text(text.replace(before, after))
        assert words in str(refused(read_cohort, root))
        export.write_text(text)
    export.write_text('[]')
    assert 'not an export of annotations' in str(refused(read_cohort, root))
    export.unlink()
    (root / 'kaggle.csv').rename(root / 'stage_2_train_labels.csv')
    (root / 'pneumonia-challenge-dataset-mappings_2018.json').write_text(
        json.dumps([dict(subset_img_id='a', img_id=names[0])])
    )
    (root / 'stage_2_detailed_class_info.csv').write_text('patientId,class\na,Healthy\n')
    assert 'line 2, column class' in str(refused(read_cohort, root))
    (root / 'pneumonia-challenge-dataset-mappings_2018.json').write_text('{"a": 1}')
    assert 'not a list of matches' in str(refused(read_cohort, root))


def test_the_published_tables_of_the_rsna(tmp_path):
    "All reads, from the tables as published; the first archive has the numbers that are known of it."
    folder = project_root().parent / 'shared' / 'data' / 'rsna_nih'
    if not folder.is_dir():
        pytest.skip('the tables of the RSNA are not on this machine')
    want = pd.read_csv(folder / 'rsna_nih.csv.gz')
    entry = pd.read_csv(folder / 'Data_Entry_2017_v2020.csv.gz', dtype=str)
    reads = list(zip(want.rsna_id, want.nih_image, want.rsna_class, map(json.loads, want.boxes), want.mse))
    root = rsna_root(tmp_path, reads, entry, want.nih_image)
    shutil.copyfile(folder / 'kaggle_stage_2_train_labels.csv.zip', tmp_path / 'labels.zip')
    with zipfile.ZipFile(tmp_path / 'labels.zip') as z:
        (root / 'stage_2_train_labels.csv').write_bytes(z.read('stage_2_train_labels.csv'))
    c = read_cohort(root, 'rsna').images
    same = want[want.mse < 10]
    assert same.nih_image.nunique() == len(c) == 26_585
    assert (c.boxes.map(len) > 0).sum() == 5_997 and c.patient.nunique() == 11_410
    write_rsna_export(root, reads)
    from_export = read_cohort(root, 'rsna').images
    assert from_export.label.equals(c.label) and from_export.image.equals(c.image), 'the two releases say the same'
    assert from_export.boxes.tolist() == c.boxes.tolist()
    first = c[c.image.isin(entry['Image Index'][:4_999].str.removesuffix('.png'))]
    assert len(first) == 1_172 and first.patient.nunique() == 514 and first.boxes.map(len).sum() == 402
    assert first.label.value_counts().sort_index().tolist() == [353, 136, 119, 564]


# ---- NIH's own boxes beside those of the RSNA

BOX_HEAD = 'Image Index,Finding Label,Bbox [x,y,w,h],,,\n'  # nine fields, as published; the rows have six


def two_annotators(root):
    "Three radiographs that the RSNA read, two of them boxed, and one that it did not read."
    names = [f'0000000{k}_000.png' for k in range(1, 5)]
    box = [(100, 200, 300, 400)]
    reads = [(k, n, 'Lung Opacity', box, 1.0) for k, n in zip('ab', names)] + [('c', names[2], 'Normal', [], 1.0)]
    return rsna_root(root, reads, nih_rows(names), names), names


def test_boxes_of_nih_are_a_second_annotator_and_change_nothing_else(tmp_path):
    root, names = two_annotators(tmp_path)
    before = {k: read_cohort(root, k) for k in ('rsna', 'rsna_all')}
    save_cohort(before['rsna'], tmp_path / 'before')
    assert 'no such file' in str(refused(second_boxes, before['rsna']))
    rows = [
        f'{n},{f},{x},200,300.5,400'
        for n, f, x in zip(names, ('Pneumonia', 'Mass', 'Infiltrate', 'Pneumonia'), (10, 20, 30, 40))
    ]
    (root / BOX_LIST).write_text(BOX_HEAD + '\n'.join([*rows, f'{names[0]},Infiltrate,1000,0,30,10.0,,,']))
    after = {k: read_cohort(root, k) for k in ('rsna', 'rsna_all')}
    for k in before:
        assert after[k].digest == before[k].digest and after[k].images.equals(before[k].images)
        counts = dict(second_boxes=3, second_images=2, both_boxed=1)
        assert after[k].notes == before[k].notes | counts and not set(counts) & set(before[k].notes)
    assert second_boxes(after['rsna']) == [[(10, 200, 300.5, 400), (1000, 0, 24, 10)], [], [(30, 200, 300.5, 400)]]
    assert second_boxes(after['rsna_all'])[3] == [(40, 200, 300.5, 400)]
    assert second_boxes(after['rsna'], ('Mass', 'Nodule'))[1] == [(20, 200, 300.5, 400)]
    save_cohort(after['rsna'], tmp_path / 'after')
    assert (tmp_path / 'after' / 'cohort.csv').read_bytes() == (tmp_path / 'before' / 'cohort.csv').read_bytes()
    assert second_boxes(load_cohort(tmp_path / 'after')) == second_boxes(after['rsna'])
    assert second_boxes(after['rsna'], ('Nodule',)) == [[], [], []]
    (root / BOX_LIST).write_text(BOX_HEAD + 'a,b\n')
    assert 'line 2: 2 fields where six are needed' in str(refused(read_cohort, root))
    (root / BOX_LIST).unlink()
    save_cohort(read_cohort(root), tmp_path / 'again')
    assert (tmp_path / 'again' / 'cohort.json').read_bytes() == (tmp_path / 'before' / 'cohort.json').read_bytes()


@pytest.mark.parametrize(
    'row,words',
    [
        ('00000002_000.png,Mass,1000,0,100,10', ('line 3, column boxes', 'lies outside the image of 1024 x 1024')),
        ('00000002_000.png,Infiltration,0,0,9,9', ('line 3, column finding', 'not a finding', 'Infiltrate')),
        ('00000002_000.png,Mass,0,zero,9,9', ('line 3, column y', 'not a number')),
        ('00000002_000.png,Mass,0,inf,9,9', ('line 3, column y', 'not a number')),
        ('00000002_000.png,Mass,0,0,9,', ('line 3, column h', 'not a number')),
        ('00000002_000.png,Mass,0,0,0,9', ('line 3, column w', 'not a positive side')),
        ('00000002_000.png,Mass,0,0,9', ('line 3', '5 fields where six are needed')),
        ('00000002_000.png,Mass,0,0,9,9,7', ('line 3', '7 fields where six are needed')),
        ('patient_2,Mass,0,0,9,9', ('line 3, column image', 'not an image of NIH')),
        (BOX_HEAD.strip(), ('line 3, column image', 'not an image of NIH')),
    ],
    ids=['outside', 'finding', 'word', 'infinite', 'empty', 'no side', 'short', 'long', 'image', 'header again'],
)
def test_a_bad_line_of_nihs_boxes_is_named(tmp_path, row, words):
    (f := tmp_path / BOX_LIST).write_text(f'{BOX_HEAD}00000001_000.png,Mass,0,0,9,9\n{row}\n')
    e = refused(nih_boxes, f)
    assert BOX_LIST in str(e) and all(w in str(e) for w in words) and e.hint


@pytest.mark.parametrize(
    'head', ['', 'Image Index,Image Index,Bbox [x,y,w,h],,,\n', 'Image Index,Finding Label,x,x,w,h\n']
)
def test_another_header_is_no_list_of_nihs_boxes(tmp_path, head):
    (f := tmp_path / BOX_LIST).write_text(head + '00000001_000.png,Mass,0,0,9,9\n' * 2)
    assert 'line 1' in str(refused(nih_boxes, f)) and 'another header' in str(refused(nih_boxes, f))
    f.write_text(head)
    assert 'no rows' in str(refused(nih_boxes, f))
