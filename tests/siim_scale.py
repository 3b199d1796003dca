"""All of SIIM-FISABIO-RSNA COVID-19 but its pixels: the tree that its real tables describe, with phantoms as radiographs. `python tests/siim_scale.py TABLES OUT [IMAGES]` writes and times it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import psutil
from joblib import Parallel, delayed
from pydicom.config import disable_value_validation
from siim_tree import rescale

from cxrpaper.data.phantom import APPEARANCES, VENDORS, Exposure, dicom_header, draw_radiograph, write_dicom
from cxrpaper.data.readers import siim_labels
from cxrpaper.runs import project_root, rng
from cxrpaper.study import papermill_yaml

TABLES = ('train_study_level.csv', 'train_image_level.csv', 'patients.csv', 'image_sizes.csv')


def scale_plan(
    tables,  # folder with TABLES
    n_images=None,  # whole patients until there are so many images; None: all
    px=160,
):  # longest side of the largest radiograph; the others in proportion
    "One row per image of the real tables: ids, class, patient, series, and the size that its phantom has."
    table, labels = siim_labels(tables)
    who = pd.read_csv(Path(tables) / 'patients.csv', dtype=str).set_index('imageid').reindex(table.image)
    size = pd.read_csv(Path(tables) / 'image_sizes.csv').set_index('image_id').reindex(table.image)
    plan = table[['image', 'study']].assign(
        label=labels,
        patient=who.patientid.values,
        series=who.series_id.values,
        original_height=size.height.values,
        original_width=size.width.values,
    )
    shrink = px / plan[['original_height', 'original_width']].to_numpy().max()
    plan['height'], plan['width'] = [
        np.maximum(np.rint(plan[f'original_{k}'] * shrink), 24).astype(int) for k in ('height', 'width')
    ]
    plan['shot'] = plan.groupby('study').cumcount()
    patients = sorted(plan.patient.unique())
    if n_images is not None:
        order = [patients[i] for i in rng(0, 'siim_scale').permutation(len(patients))]
        counts = plan.patient.value_counts()[order].cumsum()
        patients = counts.index[: np.searchsorted(counts, n_images) + 1]
    return plan[plan.patient.isin(patients)].reset_index(drop=True)


def made_up(row):  # what no table of SIIM says: view, sex, age, equipment
    r = rng(0, 'siim_scale', row.patient)
    sex, age, site = 'FM'[r.integers(2)], int(r.integers(20, 90)), int(r.integers(4))
    r = rng(0, 'siim_scale', row.study)
    return dict(
        sex=sex,
        age=age,
        site=site,
        view=['AP', 'PA'][r.integers(2)],
        vendor=int(r.integers(len(VENDORS))),
        photometric=['MONOCHROME2', 'MONOCHROME1'][r.random() < 0.2],
    )


def write_images(out, rows):
    "Draw and write some rows; the headers hold SIIM's own ids where a UID should stand, as they do there."
    cv2.setNumThreads(1)
    with disable_value_validation():
        for row in rows.itertuples():
            about = made_up(row)
            body, pose = int(row.patient, 16), int(row.study, 16)
            image, _, _ = draw_radiograph(
                APPEARANCES[row.label],
                0,
                (row.height, row.width),
                of=Exposure(
                    patient=body,
                    study=pose,
                    image=row.shot,
                    sex=about['sex'],
                    age=about['age'],
                    view=about['view'],
                    vendor=about['vendor'],
                    site=about['site'],
                ),
            )
            ds = dicom_header(pd.Series(dict(row._asdict()) | about))
            ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.file_meta.MediaStorageSOPInstanceUID = (
                row.image,
                row.study,
                row.series,
                row.image,
            )
            file = Path(out) / 'train' / row.study / row.series / f'{row.image}.dcm'
            file.parent.mkdir(parents=True, exist_ok=True)
            write_dicom(file, ds, image, 12, about['photometric'])


def write_scale(out, tables, n_images=None, px=160, workers=2):
    "The tree and both tables: boxes scaled to the small frames, so that they cover the same part of the image; everything else as it is published."
    out = Path(out)
    plan = scale_plan(tables, n_images, px)
    parts = [plan.iloc[i : i + 64] for i in range(0, len(plan), 64)]
    Parallel(n_jobs=workers)(delayed(write_images)(str(out), p) for p in parts)
    images = pd.read_csv(Path(tables) / 'train_image_level.csv', dtype=str, keep_default_na=False)
    images = images.set_index(images.id.str.removesuffix('_image')).loc[plan.image]
    images['boxes'], images['label'] = zip(
        *[
            rescale(b, w / ow, h / oh) if b else ('', 'none 1 0 0 1 1')
            for b, h, w, oh, ow in zip(images.boxes, plan.height, plan.width, plan.original_height, plan.original_width)
        ]
    )
    images.to_csv(out / 'train_image_level.csv', index=False)
    studies = pd.read_csv(Path(tables) / 'train_study_level.csv', dtype=str)
    studies[studies.id.str.removesuffix('_study').isin(set(plan.study))].to_csv(
        out / 'train_study_level.csv', index=False
    )
    return plan


class measured:
    "Seconds, and the peak memory of a command and all its children, in bytes (sum of resident sizes, sampled ten times a second)."

    def __enter__(self):
        self.start, self.peak, self._stop = time.perf_counter(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        me = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for p in me.children(recursive=True):
                try:
                    total += p.memory_info().rss
                except psutil.Error:
                    pass
            self.peak = max(self.peak, total)

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.start
        self._stop.set()
        self._thread.join()


def run_notebook(name, executed, threads=1, **params):
    "One notebook as the Snakefile runs it; what it took. CalledProcessError with its output where it fails."
    executed = Path(executed)
    executed.parent.mkdir(parents=True, exist_ok=True)
    command = [
        Path(sys.executable).parent / 'papermill',
        '--no-progress-bar',
        '--log-level',
        'WARNING',
        f'nbs/{name}.ipynb',
        executed,
        '-y',
        papermill_yaml(dict(profile='smoke') | params),
    ]
    with measured() as m:
        subprocess.run(
            command,
            cwd=project_root(),
            env=os.environ
            | dict(
                OMP_NUM_THREADS=str(threads),
                MPLBACKEND='agg',
                PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            ),
            check=True,
            capture_output=True,
            text=True,
        )
    return m


def tree_size(root):
    return sum(f.stat().st_size for f in Path(root).rglob('*') if f.is_file())


if __name__ == '__main__':
    with measured() as m:
        plan = write_scale(sys.argv[2], sys.argv[1], int(sys.argv[3]) if sys.argv[3:] else None)
    print(
        f'{len(plan):,} images of {plan.patient.nunique():,} patients written in {m.seconds:.0f} s, {tree_size(sys.argv[2]) / 1e6:.1f} MB, peak {m.peak / 1e9:.2f} GB'
    )
