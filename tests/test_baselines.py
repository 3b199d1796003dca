"Metadata baselines against planted truths, and against the known metadata baselines of the real SIIM tables and of the surrogate cohort (skipped where those are absent)."

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from cxrpaper.evaluation.baselines import BASELINES, baseline_features, baseline_predictions, candidates
from cxrpaper.evaluation.metrics import COLUMNS, Resampling, bootstrap, point_metrics, probabilities
from cxrpaper.runs import InputError, project_root
from cxrpaper.schema import CLASSES, LOGITS

DATA = project_root().parent / 'shared' / 'data'


def needs(*names):
    for n in names:
        if not (DATA / n).exists():
            pytest.skip(f'real data not here: {n}')


def folds_of(images, n=3, seed=0):
    "Patient-disjoint stratified folds."
    f = np.zeros(len(images), int)
    for k, (_, test) in enumerate(
        StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(images, images.label, images.group)
    ):
        f[test] = k
    return f


def images(n=600, seed=0):
    "A table without any shortcut, two images a patient."
    g = np.random.default_rng(seed)
    who = np.arange(n) // 2
    label = g.choice(4, n // 2, p=[0.28, 0.47, 0.17, 0.08])[who]
    return pd.DataFrame(
        dict(
            image=[f'i{k:05}' for k in range(n)],
            study=[f's{k:05}' for k in who],
            patient=[f'p{k:05}' for k in who],
            group=[f'p{k:05}' for k in who],
            label=label,
            height=g.choice([2000, 2336, 3480], n),
            width=g.choice([2500, 2836, 4240], n),
            view=g.choice(['AP', 'PA'], n),
            sex=g.choice(['F', 'M'], n),
            age=np.where(g.random(n) < 0.2, np.nan, g.uniform(20, 90, n)),
            detector='DX',
            source='one',
            photometric='MONOCHROME2',
        )
    )


def macro(df):
    return point_metrics(df.label, probabilities(df))


# ---------------------------------------------------------------- the known metadata baselines
@pytest.fixture(scope='module')
def siim():
    "The real tables, organisers' rule applied: 6,117 images."
    needs('siim_tables/train_study_level.csv', 'siim_tables/image_sizes.csv', 'siim_tables/patients.csv')
    d = DATA / 'siim_tables'
    st = pd.read_csv(d / 'train_study_level.csv')
    st = pd.Series(st.iloc[:, 1:5].to_numpy().argmax(1), st.id.str.removesuffix('_study'))
    im = (
        pd.read_csv(d / 'train_image_level.csv')
        .rename(columns=dict(StudyInstanceUID='study'))
        .assign(image=lambda t: t.id.str.removesuffix('_image'))
    )
    boxed = im.boxes.notna()
    im = im[(im.groupby('study').image.transform('size') == 1) | boxed | ~boxed.groupby(im.study).transform('any')]
    im = im.merge(pd.read_csv(d / 'image_sizes.csv').rename(columns=dict(image_id='image')), on='image')
    im = im.merge(
        pd.read_csv(d / 'patients.csv')[['imageid', 'patientid']].rename(
            columns=dict(imageid='image', patientid='patient')
        ),
        on='image',
    )
    im = im.assign(group=im.patient, label=im.study.map(st)).sort_values('image').reset_index(drop=True)
    assert len(im) == 6117 and im.patient.nunique() == 3261
    return im


def test_size_baseline_of_siim(siim):
    m = macro(baseline_predictions(siim, folds_of(siim, 5), 'size'))
    print({k: round(m[k], 3) for k in ('auc_macro', *(f'auc_{c}' for c in CLASSES))})
    assert abs(m['auc_macro'] - 0.612) < 0.01
    assert 0.67 < m['auc_negative'] < 0.72  # .685 by boosted trees alone


def test_prior_baseline_of_siim(siim):
    m = macro(baseline_predictions(siim, folds_of(siim, 5), 'prior'))
    assert 0.485 <= m['auc_macro'] <= 0.5


def test_size_baseline_of_siim_is_in_the_sizes(siim):
    "With the sizes dealt out anew among patients nothing is left."
    g = np.random.default_rng(0)
    other = siim.assign(**{c: siim[c].to_numpy()[p] for p in [g.permutation(len(siim))] for c in ('height', 'width')})
    assert macro(baseline_predictions(other, folds_of(other, 5), 'size'))['auc_macro'] < 0.52


def test_view_baseline_of_the_surrogate_cohort():
    needs('real_cxr/index.csv')
    d = (
        pd.read_csv(DATA / 'real_cxr' / 'index.csv', dtype=dict(uid=str, patient=str, group=str))
        .query("surrogate4.notna() and source == 'nih'")
        .reset_index(drop=True)
    )
    d = d.assign(
        image=d.uid,
        study=d.uid,
        label=d.surrogate4.map({c: k for k, c in enumerate(CLASSES)}),
        height=d.orig_h,
        width=d.orig_w,
        detector='unknown',
        photometric='unknown',
    )
    assert len(d) == 250
    auc = [macro(baseline_predictions(d, folds_of(d, 5, seed=s), 'view')) for s in range(4)]
    print('view', np.round([a['auc_macro'] for a in auc], 3))
    assert abs(np.mean([a['auc_macro'] for a in auc]) - 0.59) < 0.03
    assert np.mean([a['auc_typical'] for a in auc]) > 0.67, 'typical is 61 AP to 10 PA of those with opacities'
    size = macro(baseline_predictions(d, folds_of(d, 5), 'size'))['auc_macro']
    assert size < 0.52, 'all of these are 1,024 px wide and high'


# ---------------------------------------------------------------- planted truths
@pytest.mark.parametrize(
    'kind,plant',
    [('size', 'height'), ('view', 'view'), ('metadata', 'sex'), ('metadata', 'age'), ('metadata', 'detector')],
)
def test_a_planted_shortcut_is_found_by_the_baseline_that_sees_it(kind, plant):
    im = images()
    g = np.random.default_rng(1)
    on = g.random(len(im)) < 0.5
    value = dict(
        height=np.where(im.label == 0, 1000, 3000),
        view=np.where(im.label == 1, 'AP', 'PA'),
        sex=np.where(im.label == 1, 'F', 'M'),
        age=np.where(im.label == 2, np.nan, 50.0),
        detector=np.where(im.label == 0, 'CR', 'DX'),
    )[plant]
    planted = (
        im.assign(**{plant: np.where(on, pd.Series(value), im[plant])})
        if plant != 'age'
        else im.assign(age=np.where(on, value, im.age.fillna(40)))
    )
    blind = 'size' if kind == 'view' else 'view'
    got = {
        k: bootstrap(baseline_predictions(planted, folds_of(planted), k), Resampling(300), metrics=['auc_macro']).iloc[
            0
        ]
        for k in (kind, blind)
    }
    assert got[kind].lo > 0.54 and got[blind].value < 0.545, {k: v.value for k, v in got.items()}


def test_without_a_shortcut_nothing_is_found():
    for k in ('size', 'metadata'):
        auc = [
            macro(baseline_predictions(im, folds_of(im), k))['auc_macro'] for im in (images(seed=s) for s in range(5))
        ]
        assert np.mean(auc) < 0.53, (k, auc)


def test_out_of_fold_no_patient_is_remembered():
    "A height that identifies the patient is worthless out of fold, and would be worth everything in fold."
    im = images()
    im['height'] = im.groupby('group').ngroup() + 1000
    assert macro(baseline_predictions(im, folds_of(im), 'size'))['auc_macro'] < 0.56
    model = candidates('size')['boosting'].set_params(
        histgradientboostingclassifier__min_samples_leaf=1,
        histgradientboostingclassifier__learning_rate=0.5,
        histgradientboostingclassifier__max_iter=20,
        histgradientboostingclassifier__max_leaf_nodes=None,
    )
    x = baseline_features(im, 'size')
    p = model.fit(x, im.label).predict_proba(x)
    assert point_metrics(im.label, p)['auc_macro'] > 0.9
    with pytest.raises(InputError, match='is in 2 folds'):
        baseline_predictions(im, np.arange(len(im)) % 2, 'size')


def test_prior_is_the_share_of_the_other_folds():
    im = images()
    f = folds_of(im, 5)
    df = baseline_predictions(im, f, 'prior')
    for k in range(5):
        want = im.label[f != k].value_counts(normalize=True).sort_index()
        assert np.allclose(probabilities(df)[df.fold == k], want.to_numpy(), atol=1e-6)


# ---------------------------------------------------------------- format and bad input
def test_predictions_have_the_format_of_a_run():
    im = images(200).sample(frac=1, random_state=0).reset_index(drop=True)
    f = folds_of(im)
    for k in BASELINES:
        df = baseline_predictions(im, f, k)
        assert (
            set(COLUMNS) <= set(df)
            and (df.split == 'test').all()
            and (df.fold == f).all()
            and (df.image == im.image).all()
            and (df.label == im.label).all()
        )
        assert np.isfinite(df[LOGITS]).all().all() and np.allclose(probabilities(df), np.exp(df[LOGITS]))
    assert df.equals(baseline_predictions(im, f, k)), 'the same seed, the same predictions'


def test_unlabelled_images_are_left_out():
    im = images()
    some = im.assign(label=im.label.where(im.index % 10 > 0, -1))
    f = folds_of(im)
    df = baseline_predictions(some, f, 'metadata')
    assert len(df) == (some.label >= 0).sum() and (df.fold.to_numpy() == f[some.label >= 0]).all()


def test_values_and_classes_that_training_lacks():
    im = images()
    f = folds_of(im)
    im.loc[f == 0, 'view'] = 'lateral'
    im.loc[f == 1, 'detector'] = None
    im['age'] = im.age.astype(object)
    im.loc[3, 'age'] = 'unknown'
    assert np.isfinite(baseline_predictions(im, f, 'metadata')[LOGITS]).all().all()
    lone = im.assign(label=np.where(f == 2, im.label, im.label.replace(3, 0)))
    df = baseline_predictions(lone, f, 'size')
    assert (probabilities(df)[df.fold == 2, 3] < 1e-5).all() and (probabilities(df)[df.fold != 2, 3] > 1e-5).all()


def test_bad_input_is_named():
    im = images(40)
    f = np.arange(40) // 2 % 4
    for args, message in (
        ((im, f, 'sizes'), 'not a metadata baseline'),
        ((im.drop(columns='sex'), f, 'metadata'), 'no column sex'),
        ((im, f[1:], 'size'), '39 folds for 40 images'),
        ((im, f * 0, 'size'), 'fewer than 2 folds'),
    ):
        with pytest.raises(InputError, match=message) as e:
            baseline_predictions(*args)
        assert e.value.hint


# ---------------------------------------------------------------- the notebook
def test_papermill_writes_four_runs_and_keeps_them(warm, tmp_path):
    nb = project_root() / 'nbs' / 'appendix' / 'evaluation' / 'baselines.ipynb'

    def mill(*p):
        command = ['cxr_papermill', '--engine', 'cxr-job', str(nb), str(tmp_path / 'out.ipynb')]
        given = ['-p', 'out', str(tmp_path / 'baselines'), *p]
        return subprocess.run([*command, *given], cwd=tmp_path, env=warm, capture_output=True, text=True)

    bad = mill('-p', 'n_fold', '4')
    assert bad.returncode and 'unknown parameter n_fold' in bad.stderr and not (tmp_path / 'baselines').exists()
    done = mill('-p', 'n_folds', '4')
    assert done.returncode == 0, done.stderr[-2000:]
    for k in BASELINES:
        folder = tmp_path / 'baselines' / k
        assert {'params.json', 'provenance.json', 'predictions.csv'} <= {p.name for p in folder.iterdir()}
        prov = json.loads((folder / 'provenance.json').read_text())
        assert prov['baseline'] == k and prov['params']['n_folds'] == 4 and prov['cohort']['digest']
        assert sorted(pd.read_csv(folder / 'predictions.csv').fold.unique()) == [0, 1, 2, 3]
    assert not [p for p in (tmp_path / 'baselines').iterdir() if p.name not in BASELINES], (
        'nothing half written is left'
    )
