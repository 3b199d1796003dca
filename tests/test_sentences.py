"Generated sentences say what their numbers say: each of the five words where it is right, and no other."

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrpaper.evaluation.metrics import Verdict
from cxrpaper.evaluation.plan import Plan
from cxrpaper.paper.answers import Evidence, answers_markdown, one_answer, restoration_answers, short_answers
from cxrpaper.paper.tables import multitask_verdict, pretraining_verdict
from cxrpaper.questions.readiness import overall
from cxrpaper.questions.subgroups import gap_verdict

ROOT = Path(__file__).resolve().parent.parent
PLAN = Plan(
    metric='auc_macro', alpha=0.05, margin=0.02, runs=5, pretrainings=3, questions=dict(multitask=0.5, pretraining=0.5)
)
WORDS = [str(v) for v in Verdict]
CASES = dict(
    better=dict(value=0.05, se=0.01, p_adjusted=0.001, lo=0.03, hi=0.07),
    worse=dict(value=-0.05, se=0.01, p_adjusted=0.001, lo=-0.07, hi=-0.03),
    equivalent=dict(value=0.001, se=0.004, p_adjusted=0.8, lo=-0.007, hi=0.009),
    inconclusive=dict(value=0.01, se=0.02, p_adjusted=0.6, lo=-0.03, hi=0.05),
    undefined=dict(value=np.nan, se=np.nan, p_adjusted=np.nan, lo=np.nan, hi=np.nan),
)
ROW = dict(metric='auc_macro', df=400.0, n_runs=5, n_pretrainings=3, n_units=500)


def words_in(text):
    return [w for w in WORDS if re.search(rf'\b{w}\b', text)]


def masks(case, control=None):  # differences of Table 3
    than = ['single-task', 'multi-task, presence masks', 'multi-task, shuffled masks']
    return pd.DataFrame(
        [dict(ROW, row='multi-task', than=k, **CASES[case if i == 0 else control or case]) for i, k in enumerate(than)]
    )


@pytest.mark.parametrize('word', CASES)
def test_one_word_and_no_other(word):
    row = dict(ROW, row='MoCo, single-task', than='ImageNet, single-task', question='ImageNet', **CASES[word])
    assert words_in(one_answer(pd.Series(row), PLAN, 0.025)) == [word]
    assert words_in(pretraining_verdict(pd.DataFrame([row]), PLAN, 0.025)) == [word]
    assert words_in(multitask_verdict(masks(word), PLAN).split(';')[0]) == [word]
    hole = dict(method='network', other='mean', value=0.1, of_other=0.1, n=60, n_units=30)
    hole |= dict(difference=-row['value'], lo=-row['hi'], hi=-row['lo'])
    of_holes = words_in(restoration_answers(pd.DataFrame([hole])))  # of an error, less is better; it has no margin
    assert of_holes == ['inconclusive' if word == 'equivalent' else word]


@pytest.mark.parametrize('word', ('better', 'worse'))
def test_too_few_runs_make_no_claim(word):
    few = pd.Series(dict(ROW, row='multi-task', than='single-task', **CASES[word]) | dict(n_runs=4))
    assert words_in(one_answer(few, PLAN, 0.025)) == [] and 'no claim' in one_answer(few, PLAN, 0.025)
    assert words_in(multitask_verdict(masks(word).assign(n_runs=4), PLAN)) == []


def test_the_place_is_named_only_where_the_controls_lose():
    named = 'by the place of the opacities'
    assert named in multitask_verdict(masks('better'), PLAN)
    for control in ('worse', 'equivalent', 'inconclusive', 'undefined'):
        text = multitask_verdict(masks('better', control), PLAN)
        assert named not in text and 'is not shown' in text
    for word in ('worse', 'equivalent', 'inconclusive', 'undefined'):
        assert 'place' not in multitask_verdict(masks(word, 'better'), PLAN)


def test_an_interval_without_zero_is_no_claim_by_itself():
    row = dict(ROW, row='multi-task', than='single-task', value=0.027, se=0.011, p_adjusted=0.035, lo=0.005, hi=0.049)
    assert one_answer(pd.Series(row), PLAN, 0.025).startswith('inconclusive (p 0.035, a claim takes 0.025); ')
    assert one_answer(pd.Series(row), PLAN, 0.05).startswith('better; ')


@pytest.mark.parametrize('word', CASES)
def test_the_first_page_says_the_word_of_its_table(word, tmp_path):
    "From a table to the sentence in README.md, on real radiographs and on planted phantoms."
    row = dict(ROW, row='multi-task', than='single-task', question='more tasks', **CASES[word])
    pd.DataFrame([row | dict(metric='difference_auc_macro')]).to_csv(tmp_path / 'table3.csv', index=False)
    real, planted = (Evidence('a study', str(tmp_path), kind, 'of a kind') for kind in ('real', 'planted'))
    for text in (short_answers((real, planted), PLAN), answers_markdown((real,), PLAN)):
        assert words_in(text.replace('*', '')) == [word], text
    assert not re.search(r'prove|because|cause|due to|helps[ .,;]', short_answers((real, planted), PLAN))


def test_fit_for_use_only_if_all_is_passed():
    card = lambda *answers: overall(pd.DataFrame(dict(answer=answers)))
    assert card('passed', 'passed').startswith('fit to be deployed (2 passed)')
    assert card('passed', 'inconclusive', 'not done').startswith('not shown to be fit to be deployed')
    assert card('passed', 'inconclusive', 'not passed').startswith('not fit to be deployed')


def test_a_gap_is_named_only_where_it_is_found():
    row = dict(metric='auc_macro', attribute='sex', group='F', gap=0.1, lo=0.02, hi=0.18, n=50, detectable=0.08)
    said = lambda **p: gap_verdict(pd.DataFrame([row | p]))
    assert 'gap found' in said(p=0.001, p_adjusted=0.01)
    assert 'no gap is shown' in said(p=0.2, p_adjusted=0.4) and 'gap found' not in said(p=0.2, p_adjusted=0.4)
    assert 'too few' in said(p=np.nan, p_adjusted=np.nan)


BOOK = [ROOT / 'README.md', *sorted((ROOT / 'nbs').glob('*.ipynb'))]
SAYS_TOO_MUCH = re.compile(r'(?i)\b(proves?|proof|looks? at|no model can|guarantees that)\b')


def too_much(text):
    return [m[0] for m in SAYS_TOO_MUCH.finditer(text)]


@pytest.mark.parametrize('page', BOOK, ids=lambda p: p.stem)
def test_the_prose_claims_no_more_than_a_study_can_show(page):
    text = page.read_text(encoding='utf-8')
    if page.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert too_much(text) == []


def test_prose_that_claims_too_much_is_found():
    assert too_much('The heat map proves that the model looks at the lungs.') == ['proves', 'looks at']
    assert too_much('The heat map is highest near the lungs.') == []
