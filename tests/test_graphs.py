"CUDA graphs: where there are none a training is the one without; the logic of capture and replay, tried on a CPU with a stand-in; no step waits for the device."

from contextlib import contextmanager, nullcontext

import pytest
import torch
from fastai.callback.core import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from cxrpaper.training import inpainting, loop
from cxrpaper.training.loop import Checkpointing, EpochRecorder, Graphing
from cxrpaper.training.moco import Shuffling
from cxrpaper.training.throughput import Timing, all_params, learner

SMALL = dict(profile='smoke', arch='resnet10t', pretrain='none', px=32, batch_size=8)
KINDS = dict(
    single=('finetune', dict(drop=0.5)),
    multitask=('finetune', dict(multitask=True, decoder_width=16)),
    uncertainty=('finetune', dict(multitask=True, decoder_width=16, weighting='uncertainty')),
    frozen=('finetune', dict(freeze=True, multitask=True, decoder_width=16)),
    moco=('moco', dict(queue=16, bn_groups=2)),
    inpainting=('inpainting', dict(decoder_width=16)),
)
STEPS = 3  # an epoch


def make(name, file=None, graphs=False, cbs=(), **more):
    "The learner of a kind of training on made-up radiographs; without a file it writes no checkpoints, which take most of the time."
    kind, settings = KINDS[name]
    p = all_params(kind, SMALL | settings | dict(graphs=graphs) | more)
    learn = learner(kind, p, 'cpu', file or 'none', STEPS * p.batch_size, Timing())
    if not file:
        learn.remove_cb(Checkpointing)
    learn.watching = next(cb for cb in learn.cbs if isinstance(cb, EpochRecorder))
    learn.watching.progress = False
    return learn.add_cbs(cbs)


def same(a, b):
    "Weights, buffers, what the optimiser holds, and history: bit for bit?"
    x, y = a.model.state_dict(), b.model.state_dict()
    moments = zip(a.opt.state_dict()['state'].values(), b.opt.state_dict()['state'].values(), strict=True)
    return (
        all(torch.equal(x[k], y[k]) for k in x | y)
        and all(torch.equal(m[k], n[k]) for m, n in moments for k in m)
        and a.watching.history == b.watching.history
    )


class StandIn:
    "`torch.cuda.make_graphed_callables` on a CPU: it warms up, and then always reads and writes the same memory."

    def __init__(self, fails=False):
        self.fails, self.captures, self.replays = fails, 0, 0

    def __call__(self, module, args, num_warmup_iters=3):
        assert not (torch.is_autocast_enabled('cpu') and torch.is_autocast_cache_enabled())
        self.captures += 1
        forward, learnt = module.forward, [p for p in module.parameters() if p.requires_grad]
        tensors = [*module.parameters(), *module.buffers()]
        memory = [t.data_ptr() for t in tensors]

        def run():
            with torch.enable_grad():
                out = forward(*args)
            return out if isinstance(out, tuple) else (out,)

        for _ in range(num_warmup_iters):
            outputs = run()
            given = [torch.ones_like(o) for o in outputs]
            gradients = torch.autograd.grad(outputs, learnt, given)  # raises for one that has no part in them
        if self.fails:
            raise RuntimeError('operation not permitted when stream is capturing\nand how to look for it')
        outputs, single = [o.detach() for o in outputs], len(outputs) == 1
        outer = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                assert module.training and [t.data_ptr() for t in tensors] == memory
                outer.replays += 1
                for a, x in zip(args, inputs):
                    assert a.shape == x.shape
                    a.copy_(x)
                outer.live = run()
                for o, new in zip(outputs, outer.live):
                    o.copy_(new.detach())
                return tuple(o.detach() for o in outputs)

            @staticmethod
            def backward(ctx, *grads):
                for g, new in zip(given, grads):
                    g.copy_(new)
                for g, new in zip(gradients, torch.autograd.grad(outer.live, learnt, given)):
                    g.copy_(new)
                of = {id(p): g.detach() for p, g in zip(learnt, gradients)}
                return (*[None] * len(args), *[of.get(id(p)) for p in module.parameters()])

        def replayed(*inputs):
            out = Replay.apply(*inputs, *module.parameters())
            return out[0] if single else out

        module.forward = replayed
        return module


@pytest.fixture
def stand_in(monkeypatch):
    "A function that puts a stand-in in the place of PyTorch's."

    def put(**how):
        made = StandIn(**how)
        monkeypatch.setattr(torch.cuda, 'make_graphed_callables', made)
        monkeypatch.setattr(Graphing, 'devices', ('cuda', 'cpu'))
        return made

    return put


@pytest.mark.parametrize('name', ['single', 'moco', 'inpainting'])
def test_without_a_gpu_it_is_the_training_without_and_says_why_once(name, capsys):
    a, b = make(name), make(name, graphs=True)
    a.fit(2)
    assert 'CUDA graphs' not in capsys.readouterr().out
    b.fit(2)
    assert same(a, b) and capsys.readouterr().out == 'without CUDA graphs: the training is not on a GPU\n'
    b.fit(1)
    assert 'CUDA graphs' not in capsys.readouterr().out
    assert not [cb for cb in a.cbs if isinstance(cb, Graphing)]


class Outputs(Callback):
    "Where the predictions of training lie."

    order = 70

    def __init__(self):
        self.where = set()

    def after_batch(self):
        if self.training:
            self.where.add(self.pred[0].data_ptr() if isinstance(self.pred, tuple) else self.pred.data_ptr())
        else:
            assert 'forward' not in vars(self.model)  # validation meets no graph


class Stop(Callback):
    "An accident in the second batch of the second epoch."

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1):
            raise KeyboardInterrupt


@pytest.mark.parametrize('name', KINDS)
def test_captured_once_it_is_the_training_without_also_when_it_is_resumed(name, stand_in, tmp_path, capsys):
    whole = make(name)
    whole.fit(3)
    fake, outputs = stand_in(), Outputs()
    learn = make(name, graphs=True, cbs=[outputs])
    learn.fit(3)
    assert same(learn, whole) and 'CUDA graphs' not in capsys.readouterr().out
    assert (fake.captures, fake.replays) == (1, 3 * STEPS) and len(outputs.where) == 1
    assert 'forward' not in vars(learn.model)
    with pytest.raises(KeyboardInterrupt):
        make(name, tmp_path / 'part', graphs=True, cbs=[Stop()]).fit(3)
    part = make(name, tmp_path / 'part', graphs=True)
    part.fit(3)
    assert same(part, whole) and fake.captures == 3


def test_a_second_training_of_the_same_model_captures_nothing_anew(stand_in):
    "Unless the model lies elsewhere by then: the graph would read what is no longer there."
    fake, learn = stand_in(), make('single', graphs=True)
    for captures in (1, 1, 2):
        learn.fit(1)
        assert fake.captures == captures
        if captures == 1 and fake.replays > STEPS:
            for p in learn.model.parameters():
                p.data = p.data.clone()


@pytest.mark.parametrize('name', ['single', 'moco'])
def test_a_capture_that_fails_leaves_nothing_behind(name, stand_in, capsys):
    whole = make(name)
    whole.fit(2)
    streams = torch.get_rng_state()
    fake, learn = stand_in(fails=True), make(name, graphs=True)
    learn.fit(2)
    assert same(learn, whole) and torch.equal(torch.get_rng_state(), streams) and fake.captures == 1
    why = 'without CUDA graphs: RuntimeError: operation not permitted when stream is capturing\n'
    assert capsys.readouterr().out == why


def test_a_parameter_that_has_no_part_in_the_output_is_refused(stand_in, capsys):
    "Zeros in the place of no gradient would let weight decay act on it."
    made = []
    for graphs in (False, True):
        stand_in()
        learn = make('single', graphs=graphs, weight_decay=0.1)
        learn.model.idle = torch.nn.Parameter(torch.ones(3))
        learn.fit(1)
        made.append(learn)
    assert same(*made) and made[1].model.idle.tolist() == [1, 1, 1]
    assert 'not have been used in the graph' in capsys.readouterr().out


@contextmanager
def only_tensors(model, device):
    kept = [t.detach().clone() for t in loop.held_by(model)]
    yield
    with torch.no_grad():
        for t, was in zip(loop.held_by(model), kept):
            t.copy_(was)


@pytest.mark.parametrize(
    'name,planted',
    [
        ('single', only_tensors),  # dropout goes on elsewhere in its stream
        ('single', lambda *_: torch.random.fork_rng([])),  # batch norm has seen the first batch three times more
        ('moco', lambda *_: torch.random.fork_rng([])),  # so has the queue
        ('single', lambda *_: nullcontext()),
    ],
)
def test_what_is_not_put_back_is_seen(name, planted, stand_in, monkeypatch):
    "The counter-test of equality."
    whole = make(name)
    whole.fit(1)
    stand_in()
    monkeypatch.setattr(loop, 'as_before', planted)
    learn = make(name, graphs=True)
    learn.fit(1)
    assert not same(learn, whole)


def test_stages_and_several_processes_go_without(stand_in, monkeypatch, capsys):
    fake, staged = stand_in(), dict(schedule='segmentation_first')
    a, b = (make('multitask', graphs=g, **staged) for g in (False, True))
    a.fit(2)
    b.fit(2)
    why = 'without CUDA graphs: in each stage a part of the network learns nothing\n'
    assert same(a, b) and capsys.readouterr().out == why and not fake.captures
    learn = make('single', graphs=True)
    assert learn.graphing.hindrance() is None
    monkeypatch.setattr(loop, 'rank_and_world', lambda: (0, 2))
    assert learn.graphing.hindrance() == 'several processes share the training'


class Waits(TorchDispatchMode):
    "What would stop the program until a GPU has caught up: a number that is read, a shape that depends on values."

    READS = {f'aten.{k}' for k in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2')}

    def __init__(self):
        super().__init__()
        self.on, self.seen = True, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        by_mask = name in ('aten.index', 'aten.index_put', 'aten.index_put_', 'aten._index_put_impl_') and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if self.on and (name in self.READS or by_mask):
            self.seen.append(name)
        return func(*args, **kwargs or {})


class Step(Callback):
    "Watches from the first batch to the last, without the optimiser, whose counts of steps lie on the CPU."

    order = -100

    def __init__(self, waits):
        self.waits = waits

    def before_batch(self):
        self.waits.on = self.training

    def before_step(self):
        self.waits.on = False

    def after_step(self):
        self.waits.on = True

    def after_train(self):
        self.waits.on = False


def waits_of(learn):
    with Waits() as waits:
        waits.on = False
        learn.add_cb(Step(waits)).fit(2)
    return set(waits.seen)


def test_what_waits_is_seen():
    x = torch.arange(4.0)
    for f, name in (
        (lambda: x.sum().item(), 'aten._local_scalar_dense'),
        (lambda: bool(x.any()), 'aten._local_scalar_dense'),
        (lambda: x[x > 1], 'aten.index'),
        (lambda: x.nonzero(), 'aten.nonzero'),
        (lambda: x[torch.tensor([1, 2])] + x.max(), None),
    ):
        with Waits() as waits:
            f()
        assert (name in waits.seen) if name else not waits.seen, (name, waits.seen)


@pytest.mark.parametrize('name', [k for k in KINDS if k != 'inpainting'])
def test_no_step_waits_for_the_device(name):
    assert waits_of(make(name)) == set()


def test_moco_that_asks_for_the_number_of_its_step_waits():
    learn = make('moco')
    assert waits_of(learn.remove_cb(Shuffling) or learn)


def test_only_the_holes_of_inpainting_wait(monkeypatch):
    "How many images are drawn again is known once they are drawn."
    assert waits_of(make('inpainting'))

    def square(n, px, how, generator, device='cpu'):
        holes = torch.zeros(n, 1, px, px, dtype=torch.bool, device=device)
        holes[..., : px // 2, : px // 2] = True
        return holes

    monkeypatch.setattr(inpainting, 'draw_holes', square)
    assert waits_of(make('inpainting')) == set()
