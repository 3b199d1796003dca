"""What is fast and what it is compared with: `make bench` writes figures/benchmarks.md. `python tests/benchmark.py steps moco` measures those only, and keeps the rest.

`--tiny FOLDER` does everything at the smallest sizes and writes there: what tests/test_benchmark.py runs.

Everything is a ratio of two things that alternate in one run, each with the lowest and the highest; absolute figures belong to the machine. Nothing here is a test: a slow machine is no fault."""

import importlib
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from cxrpaper.data.folds import near_duplicates
from cxrpaper.data.phantom import Exposure, dicom_header, draw_radiograph, write_dicom
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
from cxrpaper.evaluation.metrics import Resampling, evaluate
from cxrpaper.evaluation.report import STYLE, write_figure, write_table
from cxrpaper.evaluation.rows import differences, evaluate_seeds
from cxrpaper.runs import KERNELS, project_root, provenance, resolve, rng
from cxrpaper.schema import LOGITS
from cxrpaper.training.throughput import Timing, all_params, learner, made_up

TINY = '--tiny' in sys.argv  # of spawned processes, too: they get the same arguments
OUT = sys.argv[sys.argv.index('--tiny') + 1] if TINY else 'figures/benchmarks'


def sized(full, tiny):
    "How much is measured."
    return tiny if TINY else full


DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BIN = Path(sys.executable).parent
PX = sized(dict(cuda=512, cpu=96)[DEVICE], 32)


def now():
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f):
    start = now()
    f()
    return now() - start


def interleaved(ours, other, n=5):
    "Seconds of both, one after the other, n times after a first time that does not count."
    if not TINY:
        ours()
        other()
    return np.array([(seconds(ours), seconds(other)) for _ in range(sized(n, 1))])


def row(what, other, t, unit, amount, goal=None, note=''):
    "A line of the table: t (n, 2) seconds of ours and of the other for `amount` of `unit`; the ratio is of rates."
    ratio = t[:, 1] / t[:, 0]
    ours, theirs = amount / np.median(t, 0)
    return dict(
        what=what,
        against=other,
        ours=ours,
        other=theirs,
        unit=f'{unit}/s',
        ratio=float(np.median(ratio)),
        lo=float(ratio.min()),
        hi=float(ratio.max()),
        n=len(t),
        goal=goal,
        note=note,
    )


def once(what, took, unit, amount, goal=None, note=''):
    "A line without a counterpart; `goal`: seconds."
    return dict(what=what, ours=amount / took, unit=f'{unit}/s', seconds=took, n=1, goal=goal, note=note)


# a job ------------------------------------------------------------------------------------------------------------


def jobs():
    "Start of a job, up to the imports of a training: a copy of the warm process against a process of its own."
    import nbformat

    env = os.environ | KERNELS | {f'{k}_NUM_THREADS': '1' for k in ('OMP', 'MKL', 'OPENBLAS')}
    env = {k: v for k, v in env.items() if k != 'MPLBACKEND'} | dict(PATH=f"{BIN}:{env['PATH']}")
    with tempfile.TemporaryDirectory() as d:
        page = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='', language='py')))
        page.cells = [nbformat.v4.new_code_cell(sized('import cxrpaper.training.finetune', 'import cxrpaper'))]
        nbformat.write(page, f'{d}/page.ipynb')
        ask = f"from cxrpaper.warm import LIBRARIES, warm; warm(['sh', '-c', 'echo $CXRPAPER_WARM >{d}/socket; "
        ask += f"exec sleep 3600'], LIBRARIES[:{sized(None, 5)}])"
        server = subprocess.Popen([sys.executable, '-c', ask], env=env)
        while not Path(f'{d}/socket').exists() or not (at := Path(f'{d}/socket').read_text().strip()):
            time.sleep(0.1)

        def run(socket):
            command = [BIN / 'cxr_papermill', '--no-progress-bar', f'{d}/page.ipynb', f'{d}/out.ipynb']
            subprocess.run(command, env=env | dict(CXRPAPER_WARM=socket), check=True, capture_output=True)

        t = interleaved(lambda: run(at), lambda: run('/none'))
        server.terminate()
        server.wait()
    yield row('job: papermill, kernel, imports', 'the same without a warm process', t, 'jobs', 1)


# training ----------------------------------------------------------------------------------------------------------


def bare_step(p):
    "A PyTorch loop on one batch that lies on the device: no data, no augmentation, no records."
    from cxrpaper.models.nets import autocast_for, fastest
    from cxrpaper.training.finetune import make_loss, make_model

    images = made_up(p.px, p.batch_size)
    model, loss = fastest(make_model(p)[0], DEVICE).train(), make_loss(p, images.labels).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x = torch.from_numpy(images.images[:, None]).to(DEVICE).float() / 255
    y = torch.from_numpy(images.labels).to(DEVICE)

    def step():
        with autocast_for(DEVICE):
            l = loss(model(x), y)
        l.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def epochs_of(kind, p, n, d):  # n: steps an epoch; d: folder of the checkpoint
    "A function that trains some epochs from the start, and the seconds of each."
    timing = Timing()
    learn = learner(kind, p, DEVICE, Path(d) / 'checkpoint', n * p.batch_size, timing)
    learn.lr = 1e-5
    for watching in learn.cbs:
        watching.progress = False

    def ours(epochs=1):
        (Path(d) / 'checkpoint').unlink(missing_ok=True)
        learn.fit(epochs)

    ours.learn = learn
    return ours, timing


def steps():
    "Fine-tuning from store to optimiser, records included, against a bare loop."
    full = dict(cuda=('densenet121', 'tf_efficientnet_lite0'), cpu=('tf_efficientnet_lite0', 'resnet18'))[DEVICE]
    for arch in sized(full, ('resnet10t',)):
        p = all_params('finetune', dict(profile='smoke', arch=arch, pretrain='none', px=PX, batch_size=sized(32, 4)))
        step, n = bare_step(p), 4
        with tempfile.TemporaryDirectory() as d:
            ours, timing = epochs_of('finetune', p, n, d)
            t = interleaved(ours, lambda: [step() for _ in range(n)], 7)
            t[:, 0] = [s for s, _ in timing.seconds[-len(t) :]]  # training only: the bare loop does not validate
        name = f'training {arch}, {PX} px, batch {p.batch_size}'
        yield row(name, 'bare PyTorch loop, resident batch', t, 'images', n * p.batch_size, 0.97)


MOCO = dict(arch=sized('tf_efficientnet_lite0', 'resnet10t'), batch_size=sized(16, 8), queue=128, px=PX)
N_STEPS = sized(20, 2)  # an epoch: lightly's workers begin anew at each, so few steps would flatter ours


def moco_ours(d, groups):
    "A function that makes an epoch of N_STEPS, and the seconds that each took; `groups` of batch norm: lightly has one."
    own = dict(profile='smoke', pretrain='none', bn_groups=groups)
    return epochs_of('moco', all_params('moco', MOCO | own), N_STEPS, d)


def moco_lightly():
    "The same by lightly, as its documentation writes it: views drawn by PIL in worker processes."
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    from PIL import Image

    from cxrpaper.models.nets import Encoder

    arch, batch, K = (MOCO[k] for k in ('arch', 'batch_size', 'queue'))
    p = all_params('moco', MOCO | dict(profile='smoke', pretrain='none'))

    class Films(torch.utils.data.Dataset):
        images, transform = made_up(PX, N_STEPS * batch).images, MoCoV2Transform(input_size=PX)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(self.images[i]).convert('RGB'))

    query, key = Encoder(arch).to(DEVICE).train(), Encoder(arch).to(DEVICE).train()
    width = query(torch.zeros(2, 1, PX, PX, device=DEVICE))[-1].shape[1]
    heads = [MoCoProjectionHead(width, width, p.dim).to(DEVICE) for _ in range(2)]
    deactivate_requires_grad(key), deactivate_requires_grad(heads[1])
    loss = NTXentLoss(temperature=p.temperature, memory_bank_size=(K, p.dim)).to(DEVICE)
    optimizer = torch.optim.SGD([*query.parameters(), *heads[0].parameters()], lr=1e-5, momentum=0.9)
    loader = torch.utils.data.DataLoader(
        Films(),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context='fork',
    )
    features = lambda e, h, x: h(e(x[:, :1].to(DEVICE))[-1].mean((2, 3)))

    def theirs():
        for a, b in loader:
            update_momentum(query, key, 0.999), update_momentum(*heads, 0.999)
            with torch.no_grad():
                k = features(key, heads[1], b)
            loss(features(query, heads[0], a), k).backward()
            optimizer.step()
            optimizer.zero_grad()

    return theirs


def on_disk(learn, images):
    "Its images as a store holds them, memory-mapped: those lie on the GPU as a whole."
    for batches in learn.dls.loaders:
        batches.images = images


def graphs():
    "Steps as CUDA graphs against the same without, alternating; the goals are rates. On a GPU only."
    if DEVICE != 'cuda':
        print('graphs: not measured, there is no GPU here', flush=True)
        return
    lite0, more = 'tf_efficientnet_lite0', dict(profile='smoke', pretrain='none', px=PX)
    kinds = (('finetune', 'densenet121', 32, 700), ('finetune', lite0, 32, 3000), ('moco', lite0, 16, 300))
    for kind, arch, batch, goal in kinds:
        given = more | dict(arch=arch, batch_size=batch) | (dict(queue=MOCO['queue']) if kind == 'moco' else {})
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            np.save(f'{a}/images.npy', made_up(PX, N_STEPS * batch).images)
            store = np.load(f'{a}/images.npy', mmap_mode='r')
            made = [epochs_of(kind, all_params(kind, given | dict(graphs=d == a)), N_STEPS, d) for d in (a, b)]
            for ours, _ in made:
                on_disk(ours.learn, store)
            t = interleaved(made[0][0], made[1][0], 7)
            for k, (_, timing) in enumerate(made):
                t[:, k] = [s for s, _ in timing.seconds[-len(t) :]]
        reason = made[0][0].learn.graphing.reason
        name = f'training as CUDA graphs: {kind} {arch}, {PX} px, batch {batch}'
        note = f'without graphs after all: {reason}' if reason else ''
        yield row(name, 'the same without graphs', t, 'images', N_STEPS * batch, note=note) | dict(rate_goal=goal)


def held(one):  # psutil.Process -> MiB
    "What a process and its workers hold, each shared page counted once (proportional set size)."
    sizes = []
    for p in [one, *one.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended meanwhile
            sizes.append(p.memory_full_info().pss)
    return sum(sizes) / 2**20


def highest(pid, running):  # running: () -> bool
    "Highest MiB of a process and its workers, read twenty times a second."
    one, most = psutil.Process(pid), 0
    while running():
        most = max(most, held(one))
        time.sleep(0.05)
    return most


def two_epochs(whose, told):
    "What `memory` watches in a process of its own; `told` hears when everything is imported, and of the end."
    torch.set_num_threads(1)
    importlib.import_module(dict(ours='cxrpaper.training.moco', lightly='lightly.transforms')[whose])
    told.send('imported')
    with tempfile.TemporaryDirectory() as d:
        step = moco_ours(d, 2)[0] if whose == 'ours' else moco_lightly()
        for _ in range(2):
            step()
    told.send('ended')


def memory(whose):
    "Highest MiB above what the imports take (this file imports the whole package for both)."
    own = get_context(sized('spawn', 'fork'))  # forked, it imports nothing anew, and its memory is not its own
    told, telling = own.Pipe(duplex=False)
    process = own.Process(target=two_epochs, args=(whose, telling))
    process.start()
    while not told.poll(0.05) and process.is_alive():
        pass
    before = held(psutil.Process(process.pid))
    if told.poll():
        told.recv()
    most = highest(process.pid, lambda: not told.poll() and process.is_alive())
    process.join()
    assert process.exitcode == 0, f'{whose} ended with {process.exitcode}'
    return most - before


def moco():
    "A step of MoCo against lightly's, and the memory of both."
    theirs, name = moco_lightly(), f"MoCo {MOCO['arch']}, {PX} px, batch {MOCO['batch_size']}"
    for groups, note in (
        (1, 'one group of batch norm, as lightly'),
        (2, 'two groups, which lightly has not: the default'),
    ):
        with tempfile.TemporaryDirectory() as d:
            ours, timing = moco_ours(d, groups)
            t = interleaved(ours, theirs)
            t[:, 0] = [s for s, _ in timing.seconds[-len(t) :]]
        yield row(name, 'lightly, two workers', t, 'images', N_STEPS * MOCO['batch_size'], 1.2, note)
    most = np.array([(memory('ours'), memory('lightly')) for _ in range(sized(3, 1))])
    ours, other = np.median(most, 0)
    ratio = most[:, 1] / most[:, 0]
    spread = dict(ratio=float(np.median(ratio)), lo=float(ratio.min()), hi=float(ratio.max()), n=len(most))
    note = 'ratio: theirs to ours; proportional set size above the imports'
    yield (
        dict(what=f'memory of {name}', against='lightly, two workers', ours=ours, other=other, unit='MiB')
        | spread
        | dict(goal=1, note=note)
    )


# from DICOM to the store -------------------------------------------------------------------------------------------


def as_jpeg_lossless(file):
    "Process 14, selection value 1, by GDCM: the phantom's own encoders do not write it."
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    assert reader.Read()
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def large_films(folder, syntax, n, size=sized((2544, 3028), (96, 90)), bits=12):
    "n DICOM files of a chest phantom, each with an identity of its own."
    import pydicom

    who = pd.Series(
        dict(vendor=0, view='PA', sex='F', age=50, site=0, patient='p', study='1', image='1', series='1', shot=0)
        | dict(height=size[0], width=size[1])
    )
    header = dicom_header(who)
    film, _, _ = draw_radiograph('typical', 0, size, of=Exposure(0, 0))
    write_dicom(folder / '0.dcm', header, film, bits, syntax='explicit' if syntax == 'jpeg lossless' else syntax)
    if syntax == 'jpeg lossless':
        as_jpeg_lossless(folder / '0.dcm')
    ds = pydicom.dcmread(folder / '0.dcm')
    for k in range(1, n):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'2.25.{k + 1}'
        ds.PatientID, ds.StudyInstanceUID = f'p{k}', f'2.25.1{k}'
        ds.save_as(folder / f'{k}.dcm')
    return [str(folder / f'{k}.dcm') for k in range(n)]


def only_decode(file):
    from pydicom.pixels import pixel_array

    return int(pixel_array(file).max())


def usual(file, out):
    "The recipe of most notebooks."
    import pydicom
    from PIL import Image
    from pydicom.pixels import apply_voi_lut

    ds = pydicom.dcmread(file)
    x = apply_voi_lut(ds.pixel_array, ds).astype(float)
    x = (x - x.min()) / (x.max() - x.min())
    Image.fromarray((x * 255).astype(np.uint8)).resize((512, 512), Image.LANCZOS).save(out)


STORE = """
import sys
from cxrpaper.data.readers import read_cohort
from cxrpaper.data.store import build_store
build_store(read_cohort(sys.argv[1] + '/films', adapter='folder'), 64, sys.argv[1] + '/stores/s', workers=2)
"""


def store_memory(folder):
    "Memory of a process that makes a store of the films of a folder, and of its workers."
    process = subprocess.Popen([sys.executable, '-c', STORE, folder])
    most = highest(process.pid, lambda: process.poll() is None)
    assert process.returncode == 0, f'{folder} ended with {process.returncode}'
    return most


def ingest_memory(sizes=sized((100, 1000, 10_000), (2, 3))):
    "Memory of a store, parent and two workers together, by the number of its images; each of them is decoded."
    with tempfile.TemporaryDirectory() as d:
        folders = [Path(d) / str(n) for n in sizes]
        for folder in folders:
            (folder / 'films').mkdir(parents=True)
        films = large_films(folders[-1] / 'films', 'explicit', sizes[-1], (128, 128))
        for n, folder in zip(sizes[:-1], folders):
            for film in films[:n]:
                os.link(film, folder / 'films' / Path(film).name)
        most = [store_memory(str(folder)) for folder in folders]
    yield dict(
        what=f'memory of a store of {sizes[-1]:,} images',
        against=f'the same, {sizes[0]:,} images',
        ours=most[-1],
        other=most[0],
        unit='MiB',
        ratio=most[0] / most[-1],
        n=1,
        goal=0.9,
        note=f'ratio: few to many images, 1 is flat; {most[1]:.0f} MiB at {sizes[1]:,}; proportional set size',
        points=' '.join(f'{n}:{m:.0f}' for n, m in zip(sizes, most)),
    )


def ingest():
    "Radiographs of 2544 x 3028 pixels, 12 bit: the store against the decoder alone and against the usual recipe, two processes each."
    from joblib import Parallel, delayed

    workers = sized(2, 0)
    for syntax, full in (('explicit', 96), ('rle', 64), ('jpeg lossless', 40), ('jpeg2000', 20)):
        n = sized(full, 2)
        with tempfile.TemporaryDirectory() as d, Parallel(n_jobs=workers or 1) as pool:
            d = Path(d)
            (d / 'films').mkdir()
            files = large_films(d / 'films', syntax, n)
            cohort, k = read_cohort(d / 'films', adapter='folder'), iter(range(1000))

            def ours():
                build_store(cohort, 512, d / f'store{next(k)}' / 's', workers=workers)

            decoder = lambda: pool(delayed(only_decode)(f) for f in files)
            recipe = lambda: pool(delayed(usual)(f, d / f'{Path(f).stem}.png') for f in files)
            t = interleaved(ours, decoder, 3)
            yield row(f'store of {syntax}', 'pydicom, decoding only', t, 'images', n, 0.9)
            yield row(f'store of {syntax}', 'VOI LUT, min-max, PIL, PNG', interleaved(ours, recipe, 3), 'images', n, 2)
    yield from ingest_memory()


# evaluation --------------------------------------------------------------------------------------------------------


def predictions(n, seed, skill=1.0):
    "Of a model that does not exist, on n images of n/2 patients."
    r, who = rng(0, 'bench', n), np.arange(n) // 2
    y = r.integers(0, 4, n // 2 + 1)[who]
    z = rng(seed, 'logits', n).normal(size=(n, 4)) + skill * np.eye(4)[y]
    ids = dict(image=[f'i{k}' for k in range(n)], study=[f's{k}' for k in who], patient=[f'p{k}' for k in who])
    df = pd.DataFrame(ids | dict(group=ids['patient'], fold=who % 5, split='test', label=y))
    return df.assign(**dict(zip(LOGITS, z.T)))


def evaluation():
    "Tables of a study of SIIM's size: six rows of five runs each, and their comparisons."
    n, methods, runs = sized((6000, 6, 5), (60, 2, 2))
    rows = {f'method {k}': [predictions(n, 10 * k + s, 1 + 0.02 * k) for s in range(runs)] for k in range(methods)}
    how = Resampling()

    def tables():
        for frames in rows.values():
            evaluate_seeds(frames, list(range(runs)), how)
        first, *others = rows
        differences(rows, [(k, first, 'multitask') for k in others], how)

    what = f'table of {n:,} images, {methods} methods x {runs} runs'
    yield once(what, seconds(tables), 'tables', 1, 180, f'{how.n_boot} resamples of patients')
    many = sized(100_000, 1000)
    hashes = rng(0, 'hashes').integers(0, 2**63, (many, 13)).astype(np.uint64)
    hashes[1::1000] = hashes[::1000]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: near_duplicates(hashes))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    yield once(f'search for copies among {many:,} images', took, 'images', many, None, f'{more:.0f} MiB more memory')
    for n, runs, goal in sized(((6000, 5, 180), (100_000, 1, 60)), ((80, 1, 180),)):
        with tempfile.TemporaryDirectory() as d:
            who = np.arange(n) // 2
            about = dict(view=np.where(who % 3, 'PA', 'AP'), sex=np.where(who % 2, 'F', 'M'), age=20 + who % 60)
            for name, skill in (('model', 1.1), ('other', 1)):
                frames = [predictions(n, s, skill).assign(seed=s, **about) for s in range(runs)]
                pd.concat(frames).to_csv(f'{d}/{name}.csv', index=False)
            command = [BIN / 'cxr_audit', f'{d}/model.csv', '--against', f'{d}/other.csv', '--out', f'{d}/audit']
            took = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
            asked = len(list(Path(f'{d}/audit').rglob('*.csv')))
        what = f'audit of two models, {n:,} images, {runs} run{"s" * (runs > 1)} each'
        yield once(what, took, 'images', n, goal, f'{asked} tables; the whole command')


# how cost grows ----------------------------------------------------------------------------------------------------


def exponent(n, t):
    "Of the power that the last three points follow."
    return float(np.polyfit(np.log(n[-3:]), np.log(t[-3:]), 1)[0])


def scaling():
    "One figure: cost against size, with the exponent of the last three points."

    def store_seconds(n):
        with tempfile.TemporaryDirectory() as d:
            (Path(d) / 'films').mkdir()
            large_films(Path(d) / 'films', 'explicit', n, (256, 256))
            cohort = read_cohort(Path(d) / 'films', adapter='folder')
            return seconds(lambda: build_store(cohort, 64, Path(d) / 'store' / 's', workers=0))

    n_steps = sized(4, 1)

    def step_seconds(kind, **given):
        p = all_params(kind, dict(profile='smoke', pretrain='none') | given)
        with tempfile.TemporaryDirectory() as d:
            ours, timing = epochs_of(kind, p, n_steps, d)
            ours(sized(3, 1))
        return min(s for s, _ in timing.seconds) / (n_steps * p.batch_size)

    hashes = rng(0, 'hashes').integers(0, 2**63, (30_000, 13)).astype(np.uint64)
    curves = {
        'images: store, per cohort': (sized([64, 128, 256, 512, 1024], [2, 4, 8]), store_seconds),
        'images: search for copies': (
            [1000, 3000, 10_000, 30_000],
            lambda n: seconds(lambda: near_duplicates(hashes[:n])),
        ),
        'images: intervals of all metrics': (
            [300, 1000, 3000, 10_000, 30_000],
            lambda n: seconds(lambda: evaluate(predictions(n, 0), Resampling(200))),
        ),
        'resamples of 3,000 images': (
            [100, 300, 1000, 3000],
            lambda n: seconds(lambda: evaluate(predictions(3000, 0), Resampling(n))),
        ),
        'pixels a side: training, per image': (
            [64, 96, 128, 192, 256],
            lambda px: step_seconds('finetune', arch=MOCO['arch'], px=px, batch_size=MOCO['batch_size']),
        ),
        'queue: MoCo, per image': (
            [64, 256, 1024, 4096, 16_384],
            lambda k: step_seconds('moco', arch='resnet10t', px=64, batch_size=MOCO['batch_size'], queue=k),
        ),
    }
    found = {}
    for name, (all_sizes, f) in curves.items():
        sizes = sized(all_sizes, all_sizes[:3])  # an exponent takes three
        if not TINY:
            f(sizes[0])
        t = [min(f(n) for _ in range(sized(2, 1))) for n in sizes]
        found[name] = (sizes, t)
        yield dict(
            what=f'growth with {name}',
            ratio=exponent(sizes, t),
            unit='exponent',
            n=len(sizes),
            note=f'{sizes[0]:,} to {sizes[-1]:,}: {t[0]:.2g} s to {t[-1]:.2g} s',
            points=' '.join(f'{n}:{s:.4g}' for n, s in zip(sizes, t)),
        )
    draw_scaling(found)


def draw_scaling(found):  # name -> (sizes, seconds)
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    with plt.rc_context(STYLE):
        fig, axs = plt.subplots(2, 3, figsize=(7, 3.9), layout='constrained')
        for ax, (name, (sizes, t)) in zip(axs.ravel(), found.items()):
            ax.loglog(sizes, t, 'o-', color='0.2', ms=3)
            k = exponent(sizes, t)
            ax.loglog(sizes, t[-1] * (np.array(sizes) / sizes[-1]) ** k, ':', color='tab:red')
            along, what = name.split(': ') if ': ' in name else (name, 'intervals of all metrics')
            ax.set(xlabel=along, ylabel='seconds', title=f'{what}: {k:.2f}')
            ax.set_ylim(10 ** np.floor(np.log10(min(t))), 10 ** np.ceil(np.log10(max(t))))
            ax.set_xticks(sizes[::2], [f'{n:,}' for n in sizes[::2]])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_formatter(NullFormatter())
    caption = f'**Cost against size.** {machine()}. Each point the faster of two; dotted and in the title: the power that the last three points follow.'
    write_figure('scaling', fig, caption, [], OUT, code='training.throughput')


# -------------------------------------------------------------------------------------------------------------------
ALL = dict(jobs=jobs, steps=steps, moco=moco, graphs=graphs, ingest=ingest, evaluation=evaluation, scaling=scaling)


def machine():
    "Hardware and versions, without the name of the machine."
    p = provenance('training.throughput')
    device = p['device'] if isinstance(p['device'], str) else str(p['device'])
    return f'{device}, {psutil.cpu_count()} processors, {psutil.virtual_memory().total / 2**30:.0f} GiB, {torch.get_num_threads()} thread a training, Python {platform.python_version()}, PyTorch {torch.__version__}, {time.strftime("%Y-%m-%d", time.gmtime())}'


def readable(df):
    "The table as it is read."
    number = lambda v: '' if pd.isna(v) else f'{v:,.3g}' if abs(v) < 1000 else f'{v:,.0f}'

    def met(r):
        if pd.notna(r.rate_goal):
            return 'yes' if r.ours >= r.rate_goal else 'no'
        if pd.isna(r.goal):
            return ''
        return 'yes' if (r.seconds <= r.goal if pd.notna(r.seconds) else r.ratio >= r.goal) else 'no'

    def goal(r):
        if pd.notna(r.rate_goal):
            return f'{r.rate_goal:,.0f} {r.unit}'
        return '' if pd.isna(r.goal) else f'{r.goal:g} s' if pd.notna(r.seconds) else f'{r.goal:g}'

    return pd.DataFrame(
        {
            'what': df.what,
            'against': df.against.fillna(''),
            'ours': [f'{number(r.ours)} {r.unit}' if pd.notna(r.ours) else '' for r in df.itertuples()],
            'other': df.other.map(number),
            'ratio (lowest to highest)': [
                f'{r.seconds:.0f} s'
                if pd.notna(r.seconds)
                else ''
                if pd.isna(r.ratio)
                else f'{r.ratio:.2f}' + (f' ({r.lo:.2f} to {r.hi:.2f})' if pd.notna(r.lo) else '')
                for r in df.itertuples()
            ],
            'n': df.n.astype(int),
            'goal': [goal(r) for r in df.itertuples()],
            'met': [met(r) for r in df.itertuples()],
            'note': df.note.fillna(''),
        }
    )


COLUMNS = 'group what against ours other unit ratio lo hi seconds n goal rate_goal note points machine'.split()


def measured(name):
    "The lines of one benchmark; where a library is not installed, a line that says so."
    try:
        yield from ALL[name]()
    except ModuleNotFoundError as e:
        if e.name.partition('.')[0] == 'cxrpaper':
            raise
        yield dict(what=f'{name}: not measured', n=0, note=f'{e.name} is not installed')


def main(names):
    torch.set_num_threads(1)
    names = [n for n in names if n not in ('--tiny', OUT)]
    file = resolve(OUT) / 'benchmarks.csv'
    old = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    for name in names or ALL:
        rows = []
        for r in measured(name):
            rows.append(dict(group=name, machine=machine()) | r)
            print(
                f"{name}: {r['what']}: {r.get('ratio', r.get('seconds', np.nan)):.3g} ({r.get('lo', np.nan):.3g} to {r.get('hi', np.nan):.3g})",
                flush=True,
            )
        if not rows:
            continue  # what was measured elsewhere is kept
        old = pd.concat([old[old.group != name], pd.DataFrame(rows)], ignore_index=True).reindex(columns=COLUMNS)
        caption = (
            '**Benchmarks.** Rates of what is ours and of what it is compared with, alternating in one run; ratio of rates, with the lowest and the highest of n. '
            + '; '.join(dict.fromkeys(old.machine))
            + '.'
        )
        write_table('benchmarks', old, [readable(old)], caption, [], OUT, code='training.throughput')


if __name__ == '__main__':
    # worker processes import the main module again; this one takes ten seconds, which no user pays: so it is not the main module
    code = 'import sys; sys.path.insert(0, "tests"); import benchmark; benchmark.main(sys.argv[1:])'
    os.chdir(project_root())
    os.execv(sys.executable, [sys.executable, '-c', code, *sys.argv[1:]])
