"What pre-training may see: properties of the search, faults, and the real radiographs."

import tracemalloc

import cv2
import numpy as np
import pandas as pd
import pytest

from cxrpaper.data.cohort import Cohort, make_cohort
from cxrpaper.data.dicom import read_radiograph
from cxrpaper.data.folds import (
    DUPLICATE_DISTANCE,
    HASH_SIZE,
    assign_folds,
    duplicate_distance,
    hash_cohort,
    hash_distances,
    perceptual_hashes,
)
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import squash
from cxrpaper.runs import InputError, project_root, write_json
from cxrpaper.training.corpora import (
    REASONS,
    check_unseen,
    corpus_record,
    exclude,
    excluded_counts,
    held_out_distance,
    held_out_rows,
    mirrored_hashes,
    nearest_held_out,
    pretraining_corpus,
    same_corpus,
    with_relatives,
)

CXR = project_root().parent / 'shared' / 'data' / 'real_cxr'
needs_cxr = pytest.mark.skipif(
    not CXR.is_dir(), reason='the real radiographs are not on this machine (../shared/data/real_cxr)'
)


def random_hashes(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, (n, 13), dtype=np.uint64)


def refused(f, *args, **kw):
    with pytest.raises(InputError) as e:
        f(*args, **kw)
    assert e.value.hint
    return e.value


def cohort(n, root, name, prefix='', patients=None):
    return make_cohort(
        pd.DataFrame(
            dict(
                image=[f'{prefix}{i:04}' for i in range(n)],
                patient=patients or [f'{i // 2:03}' for i in range(n)],
                label=[i % 4 for i in range(n)],
            )
        ),
        root,
        name,
    )


# ---- the search -------------------------------------------------------------------------------------------------------------


def test_nearest_equals_a_loop():
    a, b = random_hashes(40), random_hashes(25, 1)
    a[3], a[4] = b[7], mirrored_hashes(b[9:10])[0]
    bits = lambda h: np.unpackbits(h.view(np.uint8))[: HASH_SIZE**2].astype(int)
    flip = lambda v: np.where(np.arange(HASH_SIZE**2) % HASH_SIZE % 2, 1 - v, v)
    near = nearest_held_out(a & _words(), b & _words())
    for i in range(len(a)):
        x = bits(a[i])
        d = np.array(
            [[(d := np.sum(x != v)) and min(d, HASH_SIZE**2 - d) for v in (bits(h), flip(bits(h)))] for h in b]
        )
        assert near.distance[i] == d.min() and d[near.position[i], int(near.mirrored[i])] == d.min()
    assert (
        near.position[[3, 4]].tolist() == [7, 9]
        and near.distance[[3, 4]].tolist() == [0, 0]
        and near.mirrored[[3, 4]].tolist() == [False, True]
    )


def _words():
    return np.packbits(np.pad(np.ones(HASH_SIZE**2, bool), (0, 48))).view(np.uint64)  # the 784 bits that are used


def test_blocks_give_what_one_block_gives_and_memory_does_not_grow():
    held = random_hashes(3000) & _words()
    peaks = []
    for n in (600, 2400):
        a = random_hashes(n, 2) & _words()
        tracemalloc.start()
        near = nearest_held_out(a, held)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 200e6
    d = np.concatenate([hash_distances(a[-5:], held), hash_distances(a[-5:], mirrored_hashes(held))], 1)
    assert near.distance[-5:].tolist() == d.min(1).tolist()


def test_threshold_keeps_to_its_share():
    "Hashes of one mean and independent bits: strangers whose distances the fit must follow."
    r = np.random.default_rng(0)
    p = np.clip(r.normal(0.5, 0.33, HASH_SIZE**2), 0.02, 0.98)
    draw = lambda n: np.packbits(np.pad(r.random((n, HASH_SIZE**2)) < p, ((0, 0), (0, 48))), axis=1).view(np.uint64)
    held, corpus = draw(300), draw(4000)
    limit = held_out_distance(held, np.arange(300))
    assert (
        DUPLICATE_DISTANCE // 2 < limit <= DUPLICATE_DISTANCE
        and (nearest_held_out(corpus, held).distance <= limit).mean() < 0.005
    )
    copies = np.repeat(
        held[:60], 5, 0
    )  # of everyone, under other names: the fit fails, and may not switch the search off
    assert (
        duplicate_distance(copies, np.arange(300))
        < DUPLICATE_DISTANCE // 2
        == held_out_distance(copies, np.arange(300))
    )


# ---- who is excluded --------------------------------------------------------------------------------------------------------


def test_ids_of_another_corpus_mean_nothing(tmp_path):
    labelled, other = cohort(40, tmp_path / 'a', 'a'), cohort(40, tmp_path / 'b', 'b')
    h, g = random_hashes(40) & _words(), random_hashes(40, 1) & _words()
    assert exclude(other, labelled, range(10), (g, h), DUPLICATE_DISTANCE).used.all()
    same = exclude(Cohort(other.images, labelled.root, 'b'), labelled, range(10), (g, h), DUPLICATE_DISTANCE)
    assert same.reason.tolist() == ['image'] * 10 + [''] * 30 and same.attrs['same_corpus'] == 'same folder'
    (tmp_path / 'a').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'a')
    assert same_corpus(Cohort(other.images, tmp_path / 'link', 'b'), labelled) == 'same folder'
    few = g.copy()
    few[:5] = h[:5]  # five of the first forty ids are the same images: a copied corpus
    moved = exclude(other, labelled, range(9), (few, h), DUPLICATE_DISTANCE)
    assert moved.attrs['same_corpus'] == 'the same images under the same ids' and moved.reason.tolist()[:10] == [
        'image'
    ] * 9 + ['patient']
    few = g.copy()
    few[20:25] = h[:5]  # copies under other ids: only they and their patients
    t = exclude(other, labelled, range(9), (few, h), DUPLICATE_DISTANCE)
    assert t.attrs['same_corpus'] == '' and t.reason.tolist() == [''] * 20 + ['copy'] * 5 + ['related'] + [''] * 14
    assert t.copy_of[20:25].tolist() == labelled.images.image[:5].tolist() and (t.copy_of[25:] == '').all()


def test_reasons_and_relatives(tmp_path):
    labelled = cohort(20, tmp_path / 'a', 'a')
    labelled.images.loc[[2, 3, 19], 'group'] = 'g'
    t = exclude(labelled, labelled, [2], (random_hashes(20) & _words(), None), -1)
    assert t.reason[[2, 3, 19, 18]].tolist() == ['image', 'patient', 'group', 'related'] and t.used.sum() == 16
    assert set(t.reason) - {''} <= set(REASONS) and excluded_counts(t) == dict(image=1, patient=1, group=1, related=1)
    r = np.random.default_rng(0)
    for _ in range(20):
        im = pd.DataFrame(dict(patient=r.integers(0, 30, 60).astype(str), group=r.integers(0, 30, 60).astype(str)))
        out = r.random(60) < 0.03
        got = with_relatives(im, out)
        assert (
            (got >= out).all()
            and not set(im.patient[got]) & set(im.patient[~got])
            and not set(im.group[got]) & set(im.group[~got])
        )


def test_faults(tmp_path):
    labelled = cohort(40, tmp_path / 'a', 'a')
    folds = assign_folds(labelled.images, 4)
    h = random_hashes(40) & _words()
    table = exclude(labelled, labelled, held_out_rows(labelled, folds, 1), (h, h))
    assert 'hashes of' in str(refused(exclude, labelled, labelled, [0], h[:-1], h)) and 'hashes of' in str(
        refused(exclude, labelled, labelled, [0], h, h[:1])
    )
    assert refused(pretraining_corpus, cohort(40, tmp_path / 'b', 'b', 'x'), table).field == 'table'
    assert 'other held-out' in str(refused(corpus_record, labelled, table, labelled, folds, 2))
    assert 'cannot be read' in str(refused(exclude, labelled, labelled, [0], workers=0))  # no files


def test_a_record_survives_its_file_and_serves_one_fold(tmp_path):
    import json

    labelled = cohort(80, tmp_path / 'a', 'a')
    h = random_hashes(80) & _words()
    folds = assign_folds(labelled.images, 4)
    table = exclude(labelled, labelled, held_out_rows(labelled, folds, 1), (h, h))
    write_json(tmp_path / 'r.json', corpus_record(labelled, table, labelled, folds, 1))
    record = json.loads((tmp_path / 'r.json').read_text())
    assert check_unseen(record, labelled, folds, 1) is None
    for k in (0, 2, 3):
        e = refused(check_unseen, record, labelled, folds, k)
        assert (
            f'fold {k} of 4' in str(e)
            and 'excluded was fold 1 of 4' in str(e)
            and f'fold={k}' in e.hint
            and 'fold=None' in e.hint
        )
    assert 'fold_seed 3' in str(refused(check_unseen, record, labelled, assign_folds(labelled.images, 4, 3), 1, 3))
    assert 'another cohort' in str(refused(check_unseen, record, cohort(80, tmp_path / 'a', 'a', 'y'), folds, 1))
    for broken in (None, {}, dict(corpus='x')):
        assert 'no record' in str(refused(check_unseen, broken, labelled, folds, 1))
    other = cohort(30, tmp_path / 'b', 'b', 'z')
    whole = corpus_record(
        other,
        exclude(other, labelled, held_out_rows(labelled, None), (random_hashes(30, 3) & _words(), h)),
        labelled,
        None,
        None,
    )
    for k in range(4):
        check_unseen(whole, labelled, folds, k)
        check_unseen(whole, labelled, assign_folds(labelled.images, 5, 9, 'study'), k, 9, 'study')
    assert 'another cohort' in str(refused(check_unseen, whole, cohort(80, tmp_path / 'a', 'a', 'y'), folds, 0))


# ---- real radiographs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def real():
    labelled, everything = read_cohort(CXR), read_cohort(CXR, 'real_cxr_all')
    hashes = hash_cohort(everything, workers=0)
    return labelled, everything, hashes, hashes[everything.images.image.searchsorted(labelled.images.image)]


@needs_cxr
def test_all_real_radiographs_but_a_test_fold(real):
    labelled, everything, hashes, labelled_hashes = real
    folds = assign_folds(labelled.images, 5)
    rows = held_out_rows(labelled, folds, 0)
    table = exclude(everything, labelled, rows, (hashes, labelled_hashes))
    usable, test = pretraining_corpus(everything, table).images, labelled.images.iloc[rows]
    for level in ('image', 'study', 'patient', 'group'):
        assert not set(usable[level]) & set(test[level])
    assert (
        nearest_held_out(hashes[table.used], labelled_hashes[rows]).distance.min()
        > DUPLICATE_DISTANCE
        == table.attrs['max_distance']
    )
    assert (len(rows), len(usable), excluded_counts(table)) == (50, 917, dict(image=50, patient=20))
    assert (table.reason == 'image').sum() == len(rows) and len(usable) + sum(excluded_counts(table).values()) == 987
    naive = everything.images[
        ~everything.images.image.isin(test.image)
    ]  # the counter-test: leaving out the images alone leaves their patients
    assert naive.group.isin(test.group).sum() == sum(excluded_counts(table).values()) - len(rows)
    check_unseen(corpus_record(everything, table, labelled, folds, 0), labelled, folds, 0)


@needs_cxr
def test_the_pages_say_what_the_committed_pre_trainings_saw(real):
    "One pre-training for all test folds: nothing of a labelled patient. 628 radiographs, as README.md and the answers say."
    labelled, everything, hashes, labelled_hashes = real
    sheet = (project_root() / 'figures' / 'open' / 'datasheet.md').read_text(encoding='utf-8')
    assert labelled.digest[:12] in sheet, 'the committed study is of another collection'
    table = exclude(everything, labelled, held_out_rows(labelled, None, None), (hashes, labelled_hashes))
    seen = pretraining_corpus(everything, table).images
    assert not seen.patient.isin(labelled.images.patient).any() and len(everything.images) == 987
    for page in ('README.md', 'nbs/appendix/paper/answers.ipynb'):
        assert f' {len(seen)} ' in (project_root() / page).read_text(encoding='utf-8')
    assert set(seen.source) == set(everything.images.source) == {'nih', 'ieee'}


@needs_cxr
def test_real_copies_in_a_folder(real, tmp_path):
    labelled, everything, hashes, labelled_hashes = real
    rows = held_out_rows(labelled, assign_folds(labelled.images, 5), 0)
    strangers = np.flatnonzero(~everything.images.group.isin(labelled.images.group).values)[:100]
    for i in strangers:
        (tmp_path / f'{everything.images.image[i]}.jpg').write_bytes((CXR / everything.images.path[i]).read_bytes())
    for k, i in enumerate(rows):
        u = np.rint(255 * read_radiograph(CXR / labelled.images.path[i])).astype(np.uint8)
        u = cv2.resize(u[:, ::-1] if k % 2 else u, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(tmp_path / f'copy_{k:02}.jpg'), u, [cv2.IMWRITE_JPEG_QUALITY, 60])
    found = read_cohort(tmp_path, 'folder', pseudonyms=False)
    table = exclude(found, labelled, rows, hashes=(None, labelled_hashes), workers=0)
    copy = table.image.str.startswith('copy_').values
    assert table.used.tolist() == (~copy).tolist() and table.attrs['same_corpus'] == ''
    assert table.copy_of[copy].tolist() == labelled.images.image.iloc[rows].tolist() and table.reason[
        copy
    ].tolist() == ['mirrored copy' if k % 2 else 'copy' for k in range(len(rows))]
    assert exclude(found, labelled, rows, max_distance=-1).used.all(), 'without the search they go unseen'


@needs_cxr
def test_mirrored_real_radiographs_are_found_and_strangers_are_not(real):
    labelled, everything, hashes, _ = real
    some = np.arange(0, 987, 5)
    mirror = perceptual_hashes([read_radiograph(CXR / everything.images.path[i])[:, ::-1] for i in some])
    assert (
        np.diag(hash_distances(mirror, mirrored_hashes(hashes[some]))).max()
        < 100
        < DUPLICATE_DISTANCE
        < np.diag(hash_distances(mirror, hashes[some])).min()
    )
    groups = pd.factorize(everything.images.group)[0]
    for other in (hashes, mirrored_hashes(hashes)):
        d = hash_distances(hashes, other)[groups[:, None] != groups]
        assert d.min() > DUPLICATE_DISTANCE


@needs_cxr
def test_hashes_of_a_store_serve_as_well(real):
    _, everything, hashes, _ = real
    some = np.arange(0, 987, 10)
    small = perceptual_hashes(
        [np.rint(255 * squash(read_radiograph(CXR / everything.images.path[i]), 128)).astype(np.uint8) for i in some]
    )
    assert np.diag(hash_distances(small, hashes[some])).max() < 100


@needs_cxr
def test_the_radiographs_of_the_real_study_are_the_named_ones():
    "config/open_images.csv: the file names of NIH and the folds of config/open.yaml, as the corpus and the code give them now."
    named = pd.read_csv(project_root() / 'config/open_images.csv', dtype={'nih_image': str})
    index = pd.read_csv(CXR / 'index.csv', usecols=['uid', 'filename', 'source'], dtype=str).set_index('uid')
    images = read_cohort(CXR).images
    images = images[images.label >= 0].assign(fold=lambda t: assign_folds(t, n_folds=5)).set_index('image')
    assert set(index.source[images.index]) == {'nih'}
    here = images.fold.rename(index.filename).sort_index()
    assert here.to_dict() == named.set_index('nih_image').fold.to_dict() and named.nih_image.is_unique
