"The analysis plan: families hold their level on null data, find what is planted, and claim nothing from too few runs."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from cxrpaper.evaluation.metrics import Resampling, Verdict, estimated_difference, run_variance
from cxrpaper.evaluation.plan import claim, handed_on, read_plan, step_down
from cxrpaper.evaluation.rows import corrected
from cxrpaper.runs import InputError, project_root

HOW = Resampling(300)


def study(g, runs, spread, gain=0.0, rows=5, patients=0.02):
    "Rows against a first one: values of each training run, as they are and in resampled patients; one common, one own part."
    common = g.normal(size=HOW.n_boot)
    made = {}
    drawn = g.normal()
    for k in range(rows + 1):
        own = g.normal(size=HOW.n_boot)
        change = patients * (0.8 * common + 0.6 * own)
        real = 0.8 + patients * (0.8 * drawn + 0.6 * g.normal()) + (gain if k == 1 else 0.0)
        values = real + spread * g.normal(size=runs)
        made[k] = values, values[:, None] + change
    return made


def family(made, runs) -> pd.DataFrame:  # row k minus row 0
    pairs = [(k, 0) for k in made if k]
    d = pd.DataFrame(
        [
            dict(row=a, than=b, metric='m', n_runs=runs) | estimated_difference(made[a], made[b], 400, HOW)
            for a, b in pairs
        ]
    ).rename(columns=dict(difference='value'))
    changes = np.array([made[a][1].mean(0) - made[b][1].mean(0) for a, b in pairs])
    parts = {k: run_variance(*v) for k, v in made.items()}
    spread = {('m', k): (one / n, df + 1) for k, (one, _, n, df) in parts.items()}
    return d.assign(p_adjusted=corrected(d, changes, spread, ['one'] * len(d), HOW))


@pytest.mark.parametrize('runs,spread', [(5, 0.0), (5, 0.013), (5, 0.03), (3, 0.013)])
def test_a_family_of_equal_rows_rarely_claims_anything(runs, spread):
    g = np.random.default_rng((runs, int(1000 * spread)))
    made = [family(study(g, runs, spread), runs) for _ in range(200)]
    alone = np.mean([(d.p < 0.05).any() for d in made])
    together = np.mean([(d.p_adjusted < 0.05).any() for d in made])
    assert together <= 0.08, (together, alone)
    assert all((d.p_adjusted >= d.p - 1e-12).all() for d in made)


def test_uncorrected_families_do_claim():
    "The counter-test: without correction five equal rows claim something three times as often."
    g = np.random.default_rng(5)
    assert np.mean([(family(study(g, 5, 0.0), 5).p < 0.05).any() for _ in range(150)]) > 0.1


def test_what_is_planted_is_found_and_nothing_else():
    g = np.random.default_rng(6)
    made = [family(study(g, 5, 0.013, gain=0.15), 5) for _ in range(40)]
    assert np.mean([d.p_adjusted[0] < 0.05 for d in made]) > 0.9
    assert np.mean([(d.p_adjusted[1:] < 0.05).any() for d in made]) < 0.15


def test_step_down_is_between_nothing_and_bonferroni():
    g = np.random.default_rng(7)
    null = g.normal(size=(4, 5000))
    p = step_down(np.array([2.4, -2.2, 0.3, np.nan]), null)
    assert 0.016 < p[0] < 0.06 and p[0] <= p[1] < 4 * 0.028 and p[2] > 0.5 and np.isnan(p[3])
    same = step_down(
        np.array([2.4, 2.4, 2.4]), np.tile(null[:1], (3, 1))
    )  # one comparison told three times costs nothing
    assert same == pytest.approx(np.full(3, 0.016), abs=0.006)


def test_a_whole_null_study_keeps_its_level():
    "Three questions in order, levels handed on: at most alpha, and more if each were asked at alpha."
    g, plan, claimed, naive = np.random.default_rng(8), read_plan(), [], []
    for _ in range(250):
        level, fired, loose = 0.0, False, False
        for question in plan.questions:
            level = plan.level(question, level)
            d = family(study(g, 5, 0.013, rows=2), 5)
            fired |= any(claim(r, plan, level) in (Verdict.BETTER, Verdict.WORSE) for r in d.itertuples())
            loose |= (d.p < 0.05).any()
            level = handed_on(d.itertuples(), plan, level)
        claimed.append(fired)
        naive.append(loose)
    assert np.mean(claimed) <= 0.08 < np.mean(naive), (np.mean(claimed), np.mean(naive))


def test_a_wrong_plan_is_refused(tmp_path):
    good = yaml.safe_load((project_root() / 'config/plan.yaml').read_text())
    for change, said in (
        (dict(alpha=2), 'alpha'),
        (dict(more=1), 'more: unknown key'),
        (dict(questions=dict(multitask=0.9)), 'in this order'),
        (dict(questions=dict(multitask=0.5, pretraining=0.25, labels=0.2)), 'sum to 1'),
        (dict(questions=dict(multitask=0.5, pretraining=0.75, labels=-0.25)), 'questions'),
        (dict(questions=dict(multitask=0.5, pretrain=0.25, labels=0.25)), 'in this order'),  # misspelt
        (dict(questions=dict(labels=0.25, multitask=0.5, pretraining=0.25)), 'in this order'),  # would hand on nothing
        (dict(metric='auc_marco'), 'auc_macro'),
        (dict(runs=1), 'runs'),
    ):
        (tmp_path / 'plan.yaml').write_text(yaml.safe_dump(good | change, sort_keys=False))
        with pytest.raises(InputError, match=said):
            read_plan(tmp_path / 'plan.yaml')


def test_few_runs_and_few_patients_claim_nothing():
    plan = read_plan()
    sure = dict(value=0.2, se=0.01, df=50, lo=0.18, hi=0.22, p_adjusted=1e-6, n_runs=5)
    words = [
        claim(SimpleNamespace(**sure | change), plan, 0.05)
        for change in ({}, dict(n_runs=4), dict(n_pretrainings=2), dict(p_adjusted=np.nan), dict(value=-0.2))
    ]
    assert words == ['better', 'inconclusive', 'inconclusive', 'undefined', 'worse']


def test_five_runs_of_three_pretrainings_are_not_five():
    "A pre-training that is nothing but chance, and solved heads: claims of a gain at 1.25 % are several times as frequent where the runs are taken for independent."
    g, starts, how = np.random.default_rng(3), [0, 1, 2, 0, 1], Resampling(100)
    found = dict(known=[], unknown=[])
    for _ in range(600):
        values = (0.02 * g.normal(size=3))[starts]
        other = np.full(5, 0.002 * g.normal()), 0.002 * g.normal(size=how.n_boot) * np.ones((5, 1))
        for k, more in dict(known=(starts,), unknown=()).items():
            d = estimated_difference((values, np.repeat(values[:, None], how.n_boot, 1), *more), other, 60, how)
            found[k].append(d['p'] <= 0.0125)
    assert np.mean(found['known']) <= 0.05 < 0.08 < np.mean(found['unknown']), {k: np.mean(v) for k, v in found.items()}
