"Curves beside a training change no byte of it, say what its history says, and are refused before any work where the package is missing."

import importlib.util

import pandas as pd
import pytest
from test_parameters import checks_of
from test_predict import train

from cxrpaper.training.curves import curves

pytestmark = pytest.mark.long


def test_a_run_with_curves_has_the_bytes_of_one_without(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = train(tmp_path / 'plain', epochs=2)[0]
    with curves('tensorboard', tmp_path / 'curves'):
        watched = train(tmp_path / 'watched', epochs=2)[0]
    for name in ('history.csv', 'predictions.csv', 'dynamics.csv', 'weights.safetensors'):
        assert (plain / name).read_bytes() == (watched / name).read_bytes(), name
    events = EventAccumulator(str(tmp_path / 'curves')).Reload()
    history = pd.read_csv(watched / 'history.csv')
    assert set(events.Tags()['scalars']) == set(history) - {'epoch'}
    for k in events.Tags()['scalars']:
        seen = events.Scalars(k)
        assert [e.step for e in seen] == [0, 1]
        assert [e.value for e in seen] == pytest.approx(history[k].tolist(), rel=1e-6)


def test_a_missing_package_is_said_before_any_work(monkeypatch, capsys):
    find = importlib.util.find_spec
    gone = lambda name, *more: None if name in ('tensorboard', 'mlflow') else find(name, *more)
    monkeypatch.setattr(importlib.util, 'find_spec', gone)
    check = checks_of('04_finetune.ipynb')
    for log, command in dict(tensorboard="pip install 'cxrpaper[log]'", mlflow='pip install mlflow').items():
        error = str(check(dict(log=log)))
        assert f'{log} is not installed' in error and f'Hint: {command}' in error
    assert "one of 'tensorboard', 'mlflow'" in str(check(dict(log='wandb')))
