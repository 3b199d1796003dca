"""The way of the real data: SIIM's own tables with phantoms as radiographs through cohort, folds, store and Table 1. A part of it here; all 6,334 images by `pytest -s --scale tests/test_scale.py` (about ten minutes on two cores, 200 MB)."""

import shutil

import numpy as np
import pandas as pd
import pytest
from siim_scale import TABLES, measured, run_notebook, tree_size, write_scale

from cxrpaper.data.cohort import load_cohort, on_both_halves, table_cohort, union_area
from cxrpaper.data.download import CORPORA, check_manifest, table_content, verify_corpus, write_manifest
from cxrpaper.data.folds import assign_folds, audit_leaks, hash_cohort
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store, open_store
from cxrpaper.runs import file_digest, project_root

SOURCE = project_root().parent / 'shared' / 'data' / 'siim_tables'
pytestmark = [
    pytest.mark.skipif(
        not all((SOURCE / t).exists() for t in TABLES),
        reason='the tables of SIIM are not on this machine (../shared/data/siim_tables)',
    ),
    pytest.mark.filterwarnings('ignore:Invalid value for VR UI'),
]
PX = 64


def published(plan):
    "What the tables without radiographs say of the same images."
    images = read_cohort(SOURCE, 'siim_tables').images
    return images[images.patient.isin(plan.patient)].reset_index(drop=True)


def own_tables(
    root, counts
):  # facts for `verify_corpus`: the boxes are scaled, so that the tables are not SIIM's own bytes
    return dict(
        counts=counts, tables={k: (file_digest(root / k), table_content(root / k)) for k in CORPORA['siim']['tables']}
    )


def same_cohort(got, want, px):
    "The same images, classes, patients; the same boxes as shares of the image; a size in proportion (the largest radiograph has 4,891 pixels)."
    for c in ('image', 'study', 'patient', 'label', 'annotated'):
        assert (got[c].values == want[c].values).all(), c
    for c in ('height', 'width'):
        assert (abs(got[c] - np.maximum(want[c] * px / 4891, 24)) <= 0.5).all()
    for g, w in zip(got.itertuples(), want.itertuples()):
        shares = [np.array(r.boxes, float).reshape(-1, 4) / ([r.width, r.height] * 2) for r in (g, w)]
        assert shares[0].shape == shares[1].shape and np.allclose(*shares, atol=1e-6), g.image
        assert on_both_halves(g.boxes, g.width) == on_both_halves(w.boxes, w.width)


@pytest.fixture(scope='module')
def part(tmp_path_factory):
    root = tmp_path_factory.mktemp('scale') / 'siim'
    return root, write_scale(root, SOURCE, n_images=150, px=120)


def test_a_part_of_siim(part, tmp_path):
    root, plan = part
    cohort = read_cohort(root)
    t = cohort.images
    want = published(plan)
    assert 150 <= len(plan) == cohort.notes['images_read'] and len(t) == len(want)
    same_cohort(t, want, 120)
    assert plan.groupby('patient').size().max() > 1 and t.patient.nunique() == plan.patient.nunique(), 'whole patients'
    folds = assign_folds(t)
    assert pd.crosstab(t.patient, folds).gt(0).sum(axis=1).max() == 1
    audit = audit_leaks(t, folds, hash_cohort(cohort)).set_index('level')
    assert not audit.leaked.any(), audit
    n = table_cohort(cohort, folds).set_index(['by', 'level', 'count']).sort_index().loc['all', '']
    assert (
        n.loc['images', ['negative', 'typical', 'indeterminate', 'atypical']].tolist()
        == want.label.value_counts().sort_index().tolist()
        and n.loc['boxes', 'all'] == want.boxes.map(len).sum()
    )
    store = build_store(cohort, PX, tmp_path / 'stores' / 'part', workers=0)
    assert len({i.tobytes() for i in store.images}) == len(store), 'no two radiographs are alike'
    covered = [abs(m.mean() - union_area(b, h, w)) for m, b, h, w in zip(store.masks, t.boxes, t.height, t.width)]
    assert max(covered) < 0.05 and all(m.any() == bool(b) for m, b in zip(store.masks, t.boxes))


def test_verification_of_a_part(part):
    root, plan = part
    t = read_cohort(root, rule=False).images
    facts = own_tables(root, dict(images=len(plan), patients=plan.patient.nunique(), boxes=int(t.boxes.map(len).sum())))
    assert verify_corpus(root, facts=facts).ok.all()
    real = verify_corpus(root).set_index('check')
    assert (
        real.found['images'] == f'{len(plan):,}'
        and not real.ok['images']
        and not real.ok['train_image_level.csv is as published']
    )
    assert verify_corpus(root, partial=True).ok.all()


def test_the_tree_is_the_same_whoever_writes_it(part, tmp_path):
    root, plan = part
    again = write_scale(tmp_path, SOURCE, n_images=20, px=120, workers=1)  # the first patients of the same order
    files = sorted((tmp_path / 'train').rglob('*.dcm'))
    assert (
        len(files) == len(again) >= 20
        and set(again.image) < set(plan.image)
        and all(f.read_bytes() == (root / f.relative_to(tmp_path)).read_bytes() for f in files)
    )


def test_all_of_siim(tmp_path_factory, request):
    if not request.config.getoption('--scale'):
        pytest.skip('takes about ten minutes: run it with `pytest -s --scale tests/test_scale.py`')
    d = tmp_path_factory.mktemp('all')
    root = d / 'siim'
    with measured() as m:
        plan = write_scale(root, SOURCE)
    print(f'\nwritten: {m.seconds:.0f} s, {m.peak / 1e9:.2f} GB of memory, {tree_size(root) / 1e6:.0f} MB')
    m = run_notebook(
        '01_cohort', d / 'cohort.ipynb', 1, data_root=str(root), adapter='siim', n_folds=5, out=str(d / 'cohort')
    )
    print(f'01_cohort: {m.seconds:.0f} s, {m.peak / 1e9:.2f} GB, {tree_size(d / "cohort") / 1e6:.1f} MB')
    m = run_notebook(
        '01_store', d / 'store.ipynb', 2, data_root=str(root), adapter='siim', px=PX, out=str(d / 'stores' / 'all')
    )
    print(f'01_store at {PX} px: {m.seconds:.0f} s, {m.peak / 1e9:.2f} GB, {tree_size(d / "stores") / 1e6:.1f} MB')
    with measured() as m:
        checks = verify_corpus(root, facts=own_tables(root, CORPORA['siim']['counts']))
    print(f'verify_corpus: {m.seconds:.0f} s')
    assert checks.ok.all(), checks[~checks.ok]
    with measured() as m:
        write_manifest(root)
    with measured() as again:
        assert check_manifest(root).empty
    print(f'write_manifest: {m.seconds:.1f} s, check_manifest: {again.seconds:.1f} s')

    cohort = load_cohort(d / 'cohort')
    t = cohort.images
    same_cohort(t, published(plan), 160)
    n = table_cohort(cohort, t.fold.values).set_index(['by', 'level', 'count'])
    assert n.loc[('all', '', 'images')].tolist() == [1736, 2855, 1049, 477, 6117]
    assert n.loc[('all', '', 'studies')].tolist() == [1676, 2855, 1049, 474, 6054]
    assert n.loc[('all', '', 'images with boxes')].tolist() == [0, 2854, 1049, 391, 4294] and n.loc[
        ('all', '', 'boxes')
    ].tolist() == [0, 5881, 1435, 537, 7853]
    assert n.loc[('all', '', 'patients'), 'all'] == 3261 == n.loc['fold'].xs('patients', level='count')['all'].sum(), (
        'no patient in two folds'
    )
    assert (
        not audit_leaks(t, t.fold.values).leaked.any()
        and audit_leaks(t, t.fold_image.values).set_index('level').share['patient'] > 0.5
    )
    store = open_store(d / 'stores' / 'all')
    assert len(store) == 6117 and store.index.image.tolist() == t.image.tolist() and store.intact()

    for name in CORPORA['siim']['tables']:
        shutil.copy(
            SOURCE / name, root / name
        )  # the published bytes again: now everything that is checked is as published
    real = verify_corpus(root)
    assert real.ok.all(), real[~real.ok]
    assert set(check_manifest(root, digests=False).path) == {'train_image_level.csv'}
    shutil.rmtree(root)
