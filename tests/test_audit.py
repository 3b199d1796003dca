"Predictions of models that this project did not make: scikit-learn's on public tables, and the shapes that other libraries write."

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets, metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxrpaper.evaluation.metrics import Resampling
from cxrpaper.paper.audit import ask, audit, class_columns, performance, read_predictions
from cxrpaper.runs import InputError


def predicted(load, prefix='p_', **model):
    "Cross-validated predictions of a logistic regression on one of scikit-learn's tables."
    data = load()
    clf = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, **model))
    p = cross_val_predict(clf, data.data, data.target, cv=5, method='predict_proba')
    names = [f'class {c}' for c in range(p.shape[1])]
    t = pd.DataFrame(dict(image=[f'i{k}' for k in range(len(p))], patient=[f'p{k}' for k in range(len(p))]))
    return t.assign(label=[names[k] for k in data.target], **{f'{prefix}{c}': p[:, k] for k, c in enumerate(names)})


@pytest.mark.parametrize('load', [datasets.load_breast_cancer, datasets.load_wine, datasets.load_digits])
def test_models_of_scikit_learn(load, tmp_path):
    "Two, three and ten classes: the numbers are scikit-learn's, whatever the columns are called."
    df = predicted(load)
    df.to_csv(tmp_path / 'a.csv', index=False)
    df.rename(columns=lambda c: c.removeprefix('p_')).to_csv(tmp_path / 'b.csv', index=False)
    a, b = (read_predictions(tmp_path / f) for f in ('a.csv', 'b.csv'))
    assert a.kind == 'probabilities' and a.classes == b.classes and np.array_equal(a.p, b.p)
    t = performance(a, Resampling(50, unit='patient')).set_index('metric').value
    y, p = a.y, a.p[0]
    each = [metrics.roc_auc_score(y == k, p[:, k]) for k in range(p.shape[1])]
    assert np.allclose(t['macro AUC'], np.mean(each), atol=1e-9)
    assert np.allclose(t['accuracy'], metrics.accuracy_score(y, p.argmax(1)), atol=1e-12)
    assert np.allclose(t['balanced accuracy'], metrics.balanced_accuracy_score(y, p.argmax(1)), atol=1e-12)
    card, _ = ask(a, Resampling(50, unit='patient'))
    answers = card.set_index('question').answer
    assert answers['better than guessing?'] == 'passed' and answers['more than metadata tell?'] == 'not asked'
    assert 'view or sex or age' in card.set_index('question').result['more than metadata tell?']


def test_shapes_that_others_write(tmp_path):
    "Logits (MONAI, nnU-Net), and separate sigmoids under the names of findings (torchxrayvision)."
    df = predicted(datasets.load_wine)
    columns = [c for c in df if c.startswith('p_')]
    p = df[columns].to_numpy()
    for name, scores, kind, prefix in (
        ('logits', np.log(p) + 3, 'logits', ''),
        ('named logits', (np.log(p) + 40) / 50, 'logits', 'logit_'),  # all between 0 and 1: the name decides
        ('sigmoids', p * 0.4, 'separate sigmoids, divided by their sum', 'p_'),
    ):
        named = df.assign(**dict(zip(columns, scores.T))).rename(columns=lambda c: c.replace('p_', prefix))
        named.to_csv(tmp_path / f'{name}.csv', index=False)
        got = read_predictions(tmp_path / f'{name}.csv')
        sharp = p ** (1 / 50 if prefix == 'logit_' else 1)
        assert got.kind == kind
        assert np.allclose(got.p[0], (sharp / sharp.sum(1, keepdims=True))[np.argsort(df.image)], atol=1e-9)
    findings = df.rename(columns=dict(zip(columns, ('Effusion', 'Lung Opacity', 'No Finding'))))
    findings['label'] = findings.label.str[-1]  # numbers of the columns
    findings.to_csv(tmp_path / 'findings.csv', index=False)
    assert read_predictions(tmp_path / 'findings.csv', negative='No Finding').negative == 2
    with pytest.raises(InputError, match='no class'):
        read_predictions(tmp_path / 'findings.csv', negative='Normal')


def test_leaks_are_found_and_only_where_they_are(tmp_path):
    df = predicted(datasets.load_wine).assign(split='test', fold='0')
    train = df.assign(split='train', image='t' + df.image, patient='t' + df.patient)
    for name, rows, answer in (
        ('clean', train, 'passed'),
        ('leaking', train.assign(patient=df.patient.where(df.index < 3, train.patient)), 'not passed'),
    ):
        pd.concat([df, rows]).to_csv(tmp_path / f'{name}.csv', index=False)
        b = read_predictions(tmp_path / f'{name}.csv')
        assert len(b.y) == len(df)  # test rows are judged
        card, tables = ask(b, Resampling(20, unit='patient'))
        assert card.set_index('question').answer['splits free of leaks?'] == answer
    assert sorted(tables['leaks'].patient) == sorted(df.patient[:3])


def test_a_report_in_an_empty_folder_holds_no_markup_of_the_data(tmp_path):
    "The command, outside the project: names from the table are text, nothing is loaded from elsewhere, PyTorch is not imported."
    df = predicted(datasets.load_wine).assign(view='<script>alert(1)</script>')
    df.loc[::2, 'view'] = 'a & "b"'
    df.to_csv(tmp_path / 'my.csv', index=False)
    code = (
        'import sys; from cxrpaper.paper.commands import audit; '
        'audit(["my.csv", "--out", "report", "--n_boot", "50"]); assert "torch" not in sys.modules'
    )
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert '<script' not in page and '&lt;script&gt;' in page and 'src="http' not in page and 'href' not in page
    assert json.loads((tmp_path / 'report' / 'provenance.json').read_text())['predictions']['file'] == 'my.csv'
    assert str(tmp_path) not in page
    bad = subprocess.run(
        [sys.executable, '-c', code.replace('my.csv', 'none.csv')], cwd=tmp_path, capture_output=True, text=True
    )
    assert bad.returncode == 1 and 'none.csv' in bad.stderr and 'Traceback' not in bad.stderr


def test_what_was_there_stays_when_the_new_report_fails(tmp_path):
    df = predicted(datasets.load_wine)
    df.to_csv(tmp_path / 'my.csv', index=False)
    audit(tmp_path / 'my.csv', tmp_path / 'out', n_boot=20)
    before = (tmp_path / 'out' / 'scorecard.csv').read_bytes()
    df.assign(label='unheard of').to_csv(tmp_path / 'my.csv', index=False)
    with pytest.raises(InputError, match='not a class'):
        audit(tmp_path / 'my.csv', tmp_path / 'out', n_boot=20)
    assert (tmp_path / 'out' / 'scorecard.csv').read_bytes() == before


def test_scores_by_name():
    t = pd.DataFrame(dict(image=['a'], patient=['b'], label=['x'], x=['1'], y=['2'], note=['text']))
    t.attrs['file'] = 't.csv'
    assert class_columns(t) == (dict(x='x', y='y'), '')
    with pytest.raises(InputError, match='1 columns of scores'):
        class_columns(t.drop(columns='y'))


def test_a_folder_that_is_no_report_is_left_alone(tmp_path):
    "A report replaces a report; a folder of data that was named by mistake keeps every file, the predictions among them."
    (data := tmp_path / 'data').mkdir()
    predicted(datasets.load_wine).to_csv(data / 'my.csv', index=False)
    (data / 'only copy.dcm').write_bytes(b'radiograph')
    before = {f.name: f.read_bytes() for f in data.iterdir()}
    with pytest.raises(InputError, match='my.csv and 1 more, which would be deleted'):
        audit(data / 'my.csv', data, n_boot=20)
    audit(data / 'my.csv', tmp_path / 'out', n_boot=20)
    audit(data / 'my.csv', tmp_path / 'out', n_boot=20)  # an older report goes
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    with pytest.raises(InputError, match='notes.txt'):
        audit(data / 'my.csv', tmp_path / 'out', n_boot=20)
    assert {f.name: f.read_bytes() for f in data.iterdir()} == before
    assert (tmp_path / 'out' / 'notes.txt').read_text() == 'mine'


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    df = predicted(datasets.load_wine).rename(columns={'p_class 1': "p_=cmd|'/c calc'!A0"})
    df['label'] = df.label.replace('class 1', "=cmd|'/c calc'!A0")
    df.assign(image='@' + df.image, patient='-' + df.patient).to_csv(tmp_path / 'my.csv', index=False)
    audit(tmp_path / 'my.csv', tmp_path / 'out', n_boot=20)
    for f in (tmp_path / 'out').glob('*.csv'):
        t = pd.read_csv(f, dtype=str, keep_default_na=False)
        words = [v for v in [*t.columns, *t.to_numpy().ravel()] if pd.isna(pd.to_numeric(v, errors='coerce'))]
        assert not [v for v in words if v.startswith(tuple('=+-@'))], f.name
    assert "'=cmd" in (tmp_path / 'out' / 'confusions.csv').read_text()


def test_runs_scatter_in_the_comparison_with_metadata(tmp_path):
    "Five runs that differ widely: the difference from the baseline, which training again does not change, moves with them."
    df = predicted(datasets.load_wine).assign(sex=['F', 'M'] * 89)
    names = [c for c in df if c.startswith('p_')]
    g, width = np.random.default_rng(0), {}
    for name, noises in dict(alike=[2.0] * 5, apart=[0.2, 1.0, 2.0, 4.0, 8.0]).items():
        runs = [np.log(df[names]) + k * g.normal(size=(len(df), 3)) for k in noises]
        rows = [df.assign(seed=s, **np.exp(z).div(np.exp(z).sum(axis=1), axis=0)) for s, z in enumerate(runs)]
        pd.concat(rows).to_csv(tmp_path / f'{name}.csv', index=False)
        b = read_predictions(tmp_path / f'{name}.csv')
        width[name] = ask(b, Resampling(200, unit='patient'))[1]['metadata'].se.iloc[0]
    assert width['apart'] > 1.5 * width['alike']
