"""Write radiographs that exist as 8-bit pictures as DICOM files in the SIIM layout (tree and both tables)."""

import ast
from pathlib import Path

import cv2
import pandas as pd
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian


def uid(*names):
    "A valid UID made of hexadecimal ids, the same for the same names."
    return '2.25.' + str(int(''.join(names), 16))


def wrap(
    pixels,  # (H,W) uint8
    image,
    study,  # 12 hex digits each
    patient,
    view='',
    sex='',
    age=None,
):
    "An 8-bit MONOCHROME2 DICOM of these pixels, without window or LUT."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        ExplicitVRLittleEndian,
        ComputedRadiographyImageStorage,
        uid(image),
    )
    ds = FileDataset(None, {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = (
        ComputedRadiographyImageStorage,
        uid(image),
        uid(study),
        uid(study, image),
    )
    ds.Modality, ds.BodyPartExamined, ds.PatientID, ds.ViewPosition, ds.PatientSex = (
        'CR',
        'CHEST',
        str(patient),
        view,
        sex,
    )
    if age is not None and age == age:
        ds.PatientAge = f'{int(age):03d}Y'
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    data = pixels.tobytes()
    ds.PixelData = data + b'\0' * (len(data) % 2)
    ds['PixelData'].VR = 'OB'
    return ds


def rescale(
    text,  # a cell of the column boxes
    sx,
    sy,
):  # factors from the frame of the boxes to the pixel matrix
    "Boxes of one image, rescaled, as the two texts of the image-level table."
    boxes = [] if not isinstance(text, str) else ast.literal_eval(text)
    boxes = [dict(x=b['x'] * sx, y=b['y'] * sy, width=b['width'] * sx, height=b['height'] * sy) for b in boxes]
    label = ' '.join(
        f"opacity 1 {b['x']:.12g} {b['y']:.12g} {b['x'] + b['width']:.12g} {b['y'] + b['height']:.12g}" for b in boxes
    )
    return (str(boxes), label) if boxes else ('', 'none 1 0 0 1 1')


def write_siim_tree(
    out,  # folder to make
    real_cxr,  # the folder with images/, index.csv, siim_format/
    patient='group',  # column of index.csv that becomes PatientID
    frame=1024,  # side of the square frame of the boxes in siim_format
    limit=None,
):  # only the first images of the table
    "The radiographs of siim_format as train/<study>/<series>/<image>.dcm with train_study_level.csv and train_image_level.csv."
    out, real_cxr = Path(out), Path(real_cxr)
    images = pd.read_csv(real_cxr / 'siim_format' / 'train_image_level.csv', dtype=str)[:limit]
    studies = pd.read_csv(real_cxr / 'siim_format' / 'train_study_level.csv', dtype={'id': str})
    index = pd.read_csv(real_cxr / 'index.csv', dtype={'uid': str, 'patient': str, 'group': str}).set_index('uid')
    rows = []
    for r in images.itertuples():
        image, study = r.id.removesuffix('_image'), r.StudyInstanceUID
        pixels = cv2.imread(str(real_cxr / 'images' / f'{image}.jpg'), cv2.IMREAD_UNCHANGED)
        assert pixels is not None and pixels.ndim == 2, image
        about = index.loc[image]
        file = out / 'train' / study / f'{image[::-1]}' / f'{image}.dcm'
        file.parent.mkdir(parents=True, exist_ok=True)
        text = {k: about[k] if isinstance(about[k], str) else '' for k in ('view', 'sex')}
        age = pd.to_numeric(about['age'], errors='coerce')
        wrap(pixels, image, study, about[patient], age=age, **text).save_as(file, enforce_file_format=True)
        boxes, label = rescale(r.boxes, pixels.shape[1] / frame, pixels.shape[0] / frame)
        rows.append(dict(id=r.id, boxes=boxes, label=label, StudyInstanceUID=study))
    pd.DataFrame(rows).to_csv(out / 'train_image_level.csv', index=False)
    studies[studies.id.str.removesuffix('_study').isin(images.StudyInstanceUID)].to_csv(
        out / 'train_study_level.csv', index=False
    )
    return out
