"Subgroups against scikit-learn and loops, the correction, small and unknown groups, errors. Rates over many seeds stand in the notebook."

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrpaper.evaluation.metrics import Resampling, probabilities
from cxrpaper.questions.subgroups import (
    METRICS,
    TOO_FEW,
    Sample,
    chance_error,
    gap_verdict,
    simulate_subgroups,
    standardise,
    subgroup_gaps,
    subgroup_metrics,
    subgroup_rows,
)
from cxrpaper.runs import InputError

DF = simulate_subgroups(300, 3, gap=0.5)


def test_metrics_of_a_group_against_scikit_learn():
    t = subgroup_metrics(DF, ['view'], how=Resampling(20))
    rows = subgroup_rows(DF)
    for v in ('AP', 'PA'):
        d = rows[rows['view'] == v]
        p = probabilities(d)
        got = t[t.group == v].set_index('metric').value
        assert np.isclose(got['auc_any'], roc_auc_score(d.label > 0, 1 - p[:, 0])) and np.isclose(
            got['accuracy'], (p.argmax(1) == d.label).mean()
        )
        assert np.isclose(got['sensitivity'], d.predicted[d.label > 0].mean()) and np.isclose(
            got['specificity'], 1 - d.predicted[d.label == 0].mean()
        )


def test_gap_is_group_minus_all_others_and_is_adjusted_within_its_metric():
    g = subgroup_gaps(DF, ['detector', 'sex'], how=Resampling(300))
    rows = subgroup_rows(DF)
    r = g[(g.group == 'A') & (g.metric == 'accuracy')].iloc[0]
    right = probabilities(rows).argmax(1) == rows.label
    assert np.isclose(r.gap, right[rows.detector == 'A'].mean() - right[rows.detector != 'A'].mean())
    assert (g.p_adjusted.isna() == g.p.isna()).all() and (g.p_adjusted >= g.p - 0.06)[g.p.notna()].all()
    alone = subgroup_gaps(DF, ['detector', 'sex'], ['accuracy'], how=Resampling(300))
    assert np.allclose(alone.p_adjusted, g[g.metric == 'accuracy'].p_adjusted)
    assert np.allclose((g.lo + g.hi) / 2, g.gap, equal_nan=True)


def test_standardised_weights_give_the_wanted_shares_in_every_resample():
    w = np.random.default_rng(0).integers(1, 4, (len(DF), 5)).astype(float)
    y = DF.label.to_numpy()
    s = standardise(Sample(y, probabilities(DF), np.ones(len(y)), w, [0, 1, 2, 3]), [0.1, 0.2, 0.3, 0.4])
    for k, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert np.allclose(s.w[s.y == k].sum(0), share)


def test_unknown_is_shown_but_not_compared():
    d = DF.assign(sex=DF.sex.where(DF.patient > 'p000080', ''))
    assert 'unknown' in set(subgroup_metrics(d, ['sex'], ['accuracy'], how=Resampling(20)).group)
    assert set(subgroup_gaps(d, ['sex'], ['accuracy'], how=Resampling(20)).group) == {'F'}


def test_a_small_group_is_not_shown_whatever_it_scores():
    d = DF.assign(site=np.where(DF.patient < 'p000010', 'small', 'large'))
    g = subgroup_gaps(d, ['site'], how=Resampling(20))
    assert set(g.note) == {TOO_FEW} and g.p.isna().all() and TOO_FEW in gap_verdict(g)


def test_a_perfect_group_is_not_certain():
    "Ten patients, all right, against a good model: without the metadata baseline the standard error is 0."
    n = 400
    y = np.arange(n) % 2
    g = np.random.default_rng(0)
    z = np.where(g.random(n) < 0.9, 4.0, -4.0) * np.where(y == 1, 1, -1)
    ids = [f'{i:04}' for i in range(n)]
    small = np.arange(n) < 24
    z[small] = 4.0 * np.where(y[small] == 1, 1, -1)
    d = pd.DataFrame({k: ids for k in ('image', 'study', 'patient', 'group')}).assign(
        fold=0, split='test', label=y, logit_0=-z, logit_1=z, logit_2=-9.0, logit_3=-9.0, site=np.where(small, 's', 't')
    )
    r = subgroup_gaps(d, ['site'], ['accuracy'], how=Resampling(100)).iloc[0]
    assert r.value + r.others > 1.8 and r.p > 0.05
    assert chance_error('accuracy', 0.9, [24]) > 0.05


def test_errors():
    with pytest.raises(InputError, match='no column scanner'):
        subgroup_metrics(DF, ['scanner'])
    with pytest.raises(InputError, match='unknown metric dice'):
        subgroup_gaps(DF, metrics=['dice'])
    with pytest.raises(InputError, match='no attribute has two known groups'):
        subgroup_gaps(DF.assign(site='one'), ['site'])
    no_val = subgroup_metrics(DF[DF.split == 'test'], ['sex'], how=Resampling(20))
    assert not set(no_val.metric) & {'sensitivity', 'specificity'} and set(METRICS) & set(no_val.metric)
