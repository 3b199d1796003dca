"Real radiographs, re-encoded into every transfer syntax and broken in every way we could think of, go through cxrpaper.dicom."

import hashlib
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import gdcm
import jpeg_ls
import numpy as np
import openjpeg.utils
import pydicom
import pytest
from pydicom import Dataset, dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing, get_decoder, pixel_array
from pydicom.sequence import Sequence

from cxrpaper.data import dicom
from cxrpaper.data.dicom import (
    DicomError,
    codecs,
    each_file,
    read_dicom,
    read_header,
    read_pixels,
    read_radiograph,
    to_gray,
    to_unit,
    verify_tree,
    window,
)
from cxrpaper.runs import InputError, project_root

pytestmark = pytest.mark.filterwarnings('ignore')  # pydicom's remarks on the test images' identifiers
SHARED = project_root().parent / 'shared' / 'data'
STAGES = {'open', 'header', 'codec', 'decode', 'pixels'}
SEQUENCE_END = b'\xfe\xff\xdd\xe0'


def package_data():
    "Folder of the test images in the installed pydicom-data."
    spec = importlib.util.find_spec('data_store')
    if spec is None:
        pytest.skip('pydicom-data is not installed (dev requirement)')
    return Path(spec.submodule_search_locations[0]) / 'data'


def shared_dicom():
    folder = SHARED / 'dicom'
    if not folder.is_dir():
        pytest.skip('the real DICOM files of ../shared/data/dicom are not on this machine')
    return folder


def refused(path, stages=STAGES, f=read_dicom):
    "The DicomError of a file that must be refused; any other exception, or an image, fails the test."
    with pytest.raises(DicomError) as caught:
        f(path)
    e = caught.value
    assert type(e) is DicomError and e.stage in stages, e
    assert e.error and e.hint and e.path == path and f'stage {e.stage}' in str(e)
    return e


def is_image(a, shape=None):
    assert (
        a.dtype == np.float32
        and a.ndim == 2
        and np.isfinite(a).all()
        and a.min() >= 0
        and a.max() <= 1
        and a.min() < a.max()
    )
    assert shape is None or a.shape == shape


def reference(path):
    "The same recipe out of pydicom's own functions on the whole image: an independent implementation."
    ds = dcmread(path, force=True)
    if 'TransferSyntaxUID' not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    values = apply_modality_lut(pixel_array(ds), ds)
    if ds.get('VOILUTSequence'):
        table = np.asarray(ds.VOILUTSequence[0].LUTData, float)
        gray = (apply_voi(values, ds) - table.min()) / np.ptp(table)
    elif ds.get('WindowWidth'):
        ends = np.array([-1e9, 1e9])
        lo, hi = apply_windowing(ends, ds)
        gray = (apply_windowing(values, ds) - lo) / (hi - lo)
    else:
        gray = (values - float(values.min())) / (float(values.max()) - float(values.min()))
    return (
        1 - gray
        if ds.PhotometricInterpretation == 'MONOCHROME1' or ds.get('PresentationLUTShape') == 'INVERSE'
        else gray
    )


# ---------------------------------------------------------------- writing files


def make(path, pixels, syntax=uid.ExplicitVRLittleEndian, bits=None, data=None, **elements):
    "Write (H,W) integers as DICOM under any syntax; `data` replaces the encoded stream, `elements` set or (None) remove header elements."
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.ComputedRadiographyImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3.4'
    ds.PatientID, ds.Modality, ds.ViewPosition = 'P1', 'CR', 'PA'
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == 'i')
    stream = encode(pixels, syntax, ds.BitsStored) if data is None else data
    ds.PixelData = encapsulate([stream]) if syntax.is_encapsulated else stream
    for k, v in elements.items():
        if v is None:
            del ds[k]
        else:
            setattr(ds, k, v)
    vr = 'OB' if syntax.is_encapsulated or ds.get('BitsAllocated') == 8 else 'OW'
    if 'PixelData' in ds:
        ds['PixelData'].VR = vr
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def encode(pixels, syntax, bits):
    "One frame in this transfer syntax."
    little = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder('<'))
    if syntax == uid.ExplicitVRBigEndian:
        return pixels.astype(pixels.dtype.newbyteorder('>')).tobytes()
    if syntax in dicom.NATIVE:
        return little.tobytes() + b'\0' * (little.nbytes % 2)
    if syntax == uid.RLELossless:
        planes = [rle(p) for p in pixels.view('u1').reshape(*pixels.shape, -1)[..., ::-1].transpose(2, 0, 1)]
        offsets = 64 + np.cumsum([0, *map(len, planes)])[:-1]
        return struct.pack('<16L', len(planes), *offsets, *[0] * (15 - len(planes))) + b''.join(planes)
    if syntax == uid.JPEGBaseline8Bit:
        return cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    if syntax in (uid.JPEGLosslessSV1, uid.JPEGLossless):
        return by_gdcm(pixels, bits, syntax)
    if syntax == uid.JPEGLSLossless:
        return bytes(jpeg_ls.encode_array(unsigned(pixels, bits)))
    return bytes(openjpeg.utils.encode_array(pixels, bits_stored=bits, photometric_interpretation=2, codec_format=0))


def unsigned(pixels, bits):  # JPEG-LS knows no sign: the codec takes the low bits
    return pixels.view(f'u{pixels.dtype.itemsize}') & (2**bits - 1)


def rle(plane):
    "PackBits, row by row, padded to an even length (PS3.5 G.3)."
    out = bytearray()
    for row in plane:
        edges = np.flatnonzero(np.diff(row)) + 1
        for run in np.split(row, edges):
            for at in range(0, len(run), 128):
                n = len(run[at : at + 128])
                out += bytes([257 - n, run[0]]) if n > 1 else bytes([0, run[0]])
    return bytes(out + b'\0' * (len(out) % 2))


def by_gdcm(pixels, bits, syntax):
    "JPEG lossless by gdcm's encoder, which works from file to file."
    with TemporaryDirectory() as folder:
        plain, packed = make(Path(folder) / 'plain.dcm', pixels, bits=bits), Path(folder) / 'packed.dcm'
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(packed))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        ds = dcmread(packed)
        assert ds.file_meta.TransferSyntaxUID == syntax
        return next(generate_frames(ds.PixelData, number_of_frames=1))


# ---------------------------------------------------------------- real files


def test_every_real_file_reads_and_agrees_with_pydicom():
    files = sorted(shared_dicom().glob('*.dcm'))
    assert len(files) == 9
    for path in files:
        a = read_dicom(path)
        is_image(a, (lambda d: (d.Rows, d.Columns))(dcmread(path, force=True, stop_before_pixels=True)))
        assert np.abs(a - reference(path)).max() < 1e-6, path.name


GRAY = '''693_J2KR 693_UNCI 693_UNCR JPEG-LL JPEG2000_UNC JPGLosslessP14SV1_1s_1f_8b MR-SIEMENS-DICOM-WithOverlays MR2_J2KI MR2_J2KR MR2_UNCI MR2_UNCR
          RG1_J2KI RG1_J2KR RG1_UNCI RG1_UNCR RG3_J2KI RG3_J2KR RG3_UNCI RG3_UNCR bad_sequence explicit_VR-UN mlut_18 vlut_04'''.split()


def test_every_gray_image_of_pydicom_data_reads_and_agrees_with_pydicom():
    folder, n = package_data(), 0
    for path in sorted(folder.glob('*.dcm')):
        if path.stem not in GRAY:
            refused(path, {'header'})
            continue  # color, palette, several frames, segmentations
        ds, a = read_header(path), read_dicom(path)
        n += 1
        is_image(a, (ds.Rows, ds.Columns))
        pad = dicom.padding(ds, read_pixels(path)[1]) if 'PixelPaddingValue' in ds else np.zeros(a.shape, bool)
        assert np.abs(a - reference(path))[~pad].max() < 1e-6 and not a[pad].any(), path.name
    assert n == len(GRAY) == 23


def test_lossless_and_uncompressed_copies_of_the_real_radiographs_are_the_same_numbers():
    folder = package_data()
    for name in ('RG1', 'RG3', '693', 'MR2'):
        (_, a), (_, b) = read_pixels(folder / f'{name}_UNCR.dcm'), read_pixels(folder / f'{name}_J2KR.dcm')
        assert np.array_equal(a, b), name


def test_dense_tissue_is_bright():
    "Both polarities: the middle of a chest radiograph is denser than the lungs beside it."
    paths = [
        shared_dicom() / n
        for n in ('RG1_J2KI.dcm', 'CR-MONO1-10-chest.dcm', 'c64d5667-a776-4f95-9e21-bfabafb07740.dcm')
    ]
    kinds = set()
    for path in paths:
        a, ds = read_dicom(path), read_header(path)
        h, w = a.shape
        rows = slice(int(0.3 * h), int(0.6 * h))
        middle, lungs = (
            a[rows, int(0.47 * w) : int(0.53 * w)].mean(),
            (a[rows, int(0.2 * w) : int(0.32 * w)].mean() + a[rows, int(0.68 * w) : int(0.8 * w)].mean()) / 2,
        )
        assert middle > lungs + 0.05, (path.name, middle, lungs)
        kinds.add(ds.PhotometricInterpretation)
    assert kinds == {'MONOCHROME1', 'MONOCHROME2'}


def test_the_same_image_under_both_polarities_is_mirrored():
    folder = shared_dicom()
    a, b = (
        read_dicom(folder / '1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm'),
        read_dicom(folder / 'Fake_MONOHR1.dcm'),
    )
    assert np.abs(a - (1 - b)).max() < 1e-6
    a, b = (
        read_dicom(folder / f'jpeg_lossless_with_{n}.dcm')
        for n in ('presentation_lut', 'inverse_presentation_lut_shape')
    )
    assert np.abs(a - (1 - b)).max() < 1e-6


# ---------------------------------------------------------------- missing transfer syntax


def test_missing_transfer_syntax_is_guessed_only_where_that_is_safe(tmp_path):
    real = shared_dicom() / 'CR-MONO1-10-chest.dcm'
    assert 'TransferSyntaxUID' not in dcmread(real, force=True).file_meta
    assert read_header(real).file_meta.TransferSyntaxUID == uid.ImplicitVRLittleEndian
    (short := tmp_path / 'short.dcm').write_bytes(real.read_bytes()[:-2])
    assert refused(short, {'header'}).field == 'PixelData'
    pixels = chest(64)
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian):
        whole = make(tmp_path / 'a.dcm', pixels, syntax, 15)
        (bare := tmp_path / 'bare.dcm').write_bytes(without_syntax(whole))
        assert read_header(bare).file_meta.TransferSyntaxUID == syntax
        assert np.array_equal(read_dicom(bare), read_dicom(whole))
    compressed = make(tmp_path / 'c.dcm', pixels, uid.JPEG2000Lossless, 15)
    (bare := tmp_path / 'bare.dcm').write_bytes(without_syntax(compressed))
    assert refused(bare, {'header'}).field == 'TransferSyntaxUID'


def without_syntax(path):
    "The file's bytes from its first element of group 8 on: as old systems wrote them."
    data = path.read_bytes()
    return data[132 + 12 + struct.unpack('<L', data[140:144])[0] :]


# ---------------------------------------------------------------- every transfer syntax


def chest(px, dtype='u2', bits=15):
    "A crop of the real radiograph, px x px, in `bits` bits."
    _, a = read_pixels(package_data() / 'RG1_UNCR.dcm')
    a = a[400:1400, 400:1400]
    a = cv2.resize(a, (px, px), interpolation=cv2.INTER_AREA)
    a = np.round((a - a.min()) / np.ptp(a) * (2**bits - 1)).astype('i4')
    return (a - 2 ** (bits - 1) if np.dtype(dtype).kind == 'i' else a).astype(dtype)


LOSSLESS = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)


@pytest.mark.parametrize(
    'dtype,bits', [('u1', 8), ('u2', 10), ('u2', 12), ('u2', 15), ('u2', 16), ('i2', 12), ('i2', 16)]
)
@pytest.mark.parametrize('syntax', LOSSLESS, ids=lambda s: s.keyword)
def test_lossless_reencodings_are_pixel_identical(tmp_path, syntax, dtype, bits):
    pixels = chest(
        199 if dtype == 'u1' and syntax not in (uid.JPEGLossless, uid.JPEGLosslessSV1) else 150, dtype, bits
    )  # an odd number of bytes is padded
    want = to_unit(pixels).astype(np.float32)
    for polarity in ('MONOCHROME2', 'MONOCHROME1'):
        path = make(tmp_path / 'a.dcm', pixels, syntax, bits, PhotometricInterpretation=polarity)
        ds, stored = read_pixels(path)
        assert ds.file_meta.TransferSyntaxUID == syntax
        assert np.array_equal(stored, pixels)
        a = read_dicom(path)
        is_image(a, pixels.shape)
        assert np.array_equal(a, want if polarity == 'MONOCHROME2' else (1 - to_unit(pixels)).astype(np.float32))


def test_lossy_reencodings_stay_within_a_stated_tolerance(tmp_path):
    pixels = chest(256, 'u1', 8)
    whole = to_unit(pixels)
    lossy = read_dicom(make(tmp_path / 'a.dcm', pixels, uid.JPEGBaseline8Bit))
    assert np.abs(lossy - whole).max() < 0.06 and np.abs(lossy - whole).mean() < 0.006  # JPEG of quality 95
    stream = bytes(
        openjpeg.utils.encode_array(
            chest(256), bits_stored=15, photometric_interpretation=2, codec_format=0, compression_ratios=[10]
        )
    )
    lossy = read_dicom(make(tmp_path / 'b.dcm', chest(256), uid.JPEG2000, 15, data=stream))
    assert 0 < np.abs(lossy - to_unit(chest(256))).max() < 0.03
    near = bytes(jpeg_ls.encode_array(pixels, lossy_error=2))
    _, stored = read_pixels(make(tmp_path / 'c.dcm', pixels, uid.JPEGLSNearLossless, data=near))
    assert 0 < np.abs(stored.astype(int) - pixels).max() <= 2


def test_several_fragments_are_one_frame(tmp_path):
    pixels = chest(128)
    stream = encode(pixels, uid.JPEG2000Lossless, 15)
    whole = make(tmp_path / 'a.dcm', pixels, uid.JPEG2000Lossless, 15)
    ds = dcmread(whole)
    ds.PixelData = encapsulate([stream], fragments_per_frame=5)
    ds.save_as(tmp_path / 'b.dcm')
    assert len(dicom._fragments(tmp_path / 'b.dcm', dicom._open(tmp_path / 'b.dcm')[1]['start'])) == 5
    assert np.array_equal(read_dicom(tmp_path / 'b.dcm'), read_dicom(whole))


def test_a_jpeg_and_the_same_jpeg_in_dicom_are_the_same_bit_for_bit(tmp_path):
    folder = SHARED / 'real_cxr' / 'images'
    if not folder.is_dir():
        pytest.skip('the real radiographs of ../shared/data/real_cxr are not on this machine')
    n = 0
    for path in sorted(folder.glob('*.jpg'))[::50]:
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert pixels.ndim == 2
        a = read_radiograph(path)
        n += 1
        is_image(a, pixels.shape)
        inside = make(tmp_path / 'a.dcm', pixels, uid.JPEGBaseline8Bit, data=path.read_bytes())
        plain = make(tmp_path / 'b.dcm', pixels)
        assert np.array_equal(read_radiograph(inside), a) and np.array_equal(read_radiograph(plain), a)
    assert n == 20


# ---------------------------------------------------------------- the recipe


def lut_item(table, first, bits, vr='US', first_vr='US'):
    item = Dataset()
    item.add_new('LUTDescriptor', first_vr, [len(table) % 2**16, first, bits])
    item.add_new(
        'LUTData', vr, list(map(int, table)) if vr == 'US' else table.astype('u1' if bits == 8 else '<u2').tobytes()
    )
    return item


@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('center,width', [(8000, 9000), (100.5, 1), (20000, 2.5)])
def test_window_functions_agree_with_pydicom(function, center, width):
    ds = Dataset()
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = 'MONOCHROME2', 16, 0
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, function
    values = np.arange(2**16)
    with np.errstate(over='ignore', divide='ignore', invalid='ignore'):
        theirs = apply_windowing(values, ds) / 65535
    assert np.abs(window(values, center, width, function) - theirs).max() < 1e-9


def test_the_first_of_several_windows_is_taken(tmp_path):
    pixels = chest(64)
    one = read_dicom(make(tmp_path / 'a.dcm', pixels, WindowCenter=9000, WindowWidth=8000))
    two = read_dicom(make(tmp_path / 'b.dcm', pixels, WindowCenter=[9000, 20000], WindowWidth=[8000, 100]))
    assert np.array_equal(one, two) and not np.array_equal(one, read_dicom(make(tmp_path / 'c.dcm', pixels)))
    other = read_dicom(make(tmp_path / 'd.dcm', pixels, WindowCenter=[20000, 9000], WindowWidth=[100, 8000]))
    assert not np.array_equal(one, other)


def test_monochrome1_is_inverted_after_the_window_and_once(tmp_path):
    pixels = chest(64)
    how = dict(WindowCenter=9000, WindowWidth=8000)
    positive = read_dicom(make(tmp_path / 'a.dcm', pixels, **how))
    negative = read_dicom(make(tmp_path / 'b.dcm', pixels, PhotometricInterpretation='MONOCHROME1', **how))
    assert np.abs(negative - (1 - positive)).max() < 1e-6
    before = window(32767.0 - pixels, 9000, 8000)  # the usual mistake: invert, then window
    assert np.abs(negative - before).max() > 0.3
    for photometric, shape, want in (
        ('MONOCHROME1', 'INVERSE', negative),
        ('MONOCHROME2', 'INVERSE', negative),
        ('MONOCHROME1', 'IDENTITY', negative),
        ('MONOCHROME2', 'IDENTITY', positive),
    ):
        assert np.array_equal(
            read_dicom(
                make(
                    tmp_path / 'c.dcm', pixels, PhotometricInterpretation=photometric, PresentationLUTShape=shape, **how
                )
            ),
            want,
        )


@pytest.mark.parametrize(
    'syntax', [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian], ids=lambda s: s.keyword
)
def test_lookup_tables_under_every_encoding(tmp_path, syntax):
    pixels = chest(64, 'u2', 12)
    table = np.round(4095 * (np.arange(4096) / 4095) ** 2).astype('u2')
    want = table[pixels]
    modality = read_dicom(
        make(tmp_path / 'm.dcm', pixels, syntax, 12, ModalityLUTSequence=Sequence([lut_item(table, 0, 16)]))
    )
    assert np.array_equal(modality, to_unit(want).astype(np.float32))
    voi = read_dicom(
        make(
            tmp_path / 'v.dcm',
            pixels,
            syntax,
            12,
            VOILUTSequence=Sequence([lut_item(table, 0, 12)]),
            WindowCenter=1,
            WindowWidth=2,
        )
    )
    assert np.abs(voi - want / 4095).max() < 1e-6  # the table is used, not the window
    small = np.arange(1000, 2000, dtype='u2')
    clamped = read_dicom(
        make(tmp_path / 's.dcm', pixels, syntax, 12, VOILUTSequence=Sequence([lut_item(small, 500, 12)]))
    )
    assert np.abs(clamped - np.clip(pixels.astype(int) - 500, 0, 999) / 999).max() < 1e-6
    signed = chest(64, 'i2', 12)
    a = read_dicom(
        make(
            tmp_path / 'n.dcm',
            signed,
            syntax,
            12,
            ModalityLUTSequence=Sequence([lut_item(table, -2048, 16, first_vr='SS')]),
        )
    )
    assert np.array_equal(a, to_unit(table[signed.astype(int) + 2048]).astype(np.float32))


def test_lookup_tables_as_bytes_and_after_a_rescale(tmp_path):
    pixels = chest(64, 'u1', 8)
    table = (255 - np.arange(256)).astype('u2')
    for vr, bits in (('OW', 8), ('OW', 16)):
        a = read_dicom(make(tmp_path / 'a.dcm', pixels, VOILUTSequence=Sequence([lut_item(table, 0, bits, vr)])))
        assert np.abs(a - (255 - pixels) / 255).max() < 1e-6
    how = dict(RescaleSlope='0.5', RescaleIntercept='-10', RescaleType='US')
    a = read_dicom(make(tmp_path / 'b.dcm', pixels, WindowCenter='50', WindowWidth='60', **how))
    assert np.abs(a - window(pixels * 0.5 - 10, 50, 60)).max() < 1e-6
    down = read_dicom(make(tmp_path / 'c.dcm', pixels, RescaleSlope='-1', RescaleIntercept='300'))
    assert np.array_equal(down, to_unit(300.0 - pixels).astype(np.float32))
    kept = read_dicom(
        make(tmp_path / 'd.dcm', pixels, WindowCenter='', WindowWidth='', RescaleSlope='', RescaleIntercept='')
    )
    assert np.array_equal(kept, to_unit(pixels).astype(np.float32))


def test_padding_sets_no_scale_and_is_black(tmp_path):
    pixels = chest(64, 'u2', 12) // 2 + 100
    framed = pixels.copy()
    framed[:5] = 4095
    framed[-3:] = 4000
    real = np.ones(framed.shape, bool)
    real[:5] = real[-3:] = False
    want = to_unit(pixels, ~real).astype(np.float32)
    how = dict(bits=12, PixelPaddingValue=4000, PixelPaddingRangeLimit=4095)
    a = read_dicom(make(tmp_path / 'a.dcm', framed, **how))
    assert np.array_equal(a[real], want[real]) and not a[~real].any()
    b = read_dicom(make(tmp_path / 'b.dcm', framed, PhotometricInterpretation='MONOCHROME1', **how))
    assert np.abs(b[real] - (1 - want[real])).max() < 1e-6 and not b[~real].any()
    bright = read_dicom(
        make(tmp_path / 'c.dcm', framed, bits=12)
    )  # the counter-test: without the element the frame sets the scale
    assert bright[real].max() < 0.6 and bright[~real].max() == 1
    signed = framed.astype('i2') - 2048
    signed[:5] = signed[-3:] = -2000
    ds = dcmread(make(tmp_path / 'd.dcm', signed, bits=12))
    ds.add_new('PixelPaddingValue', 'US', 2**16 - 2000)
    ds.save_as(tmp_path / 'd.dcm')  # a signed value in an unsigned element
    assert np.array_equal(read_dicom(tmp_path / 'd.dcm')[real], want[real])


def test_overlay_bits_are_cleared_and_unknown_high_bits_refused(tmp_path):
    pixels = chest(64, 'u2', 12)
    marked = pixels | (np.arange(64)[:, None] % 2 << 15).astype('u2')
    e = refused(make(tmp_path / 'a.dcm', marked, bits=12), {'pixels'})
    assert e.field == 'BitsStored'
    ds = dcmread(tmp_path / 'a.dcm')
    ds.add_new(0x60000100, 'US', 16)
    ds.add_new(0x60000102, 'US', 15)
    ds.save_as(tmp_path / 'b.dcm')
    assert np.array_equal(read_pixels(tmp_path / 'b.dcm')[1], pixels)
    masked = chest(64, 'i2', 12) & 0xFFF  # signed, the bits above Bits Stored left at zero
    assert np.array_equal(read_pixels(make(tmp_path / 'c.dcm', masked.astype('i2'), bits=12))[1], chest(64, 'i2', 12))


def test_the_way_over_gray_levels_equals_the_direct_way():
    for path in (package_data() / 'RG1_UNCR.dcm', package_data() / 'mlut_18.dcm', package_data() / '693_UNCR.dcm'):
        ds, pixels = read_pixels(path)
        assert np.array_equal(read_dicom(path), to_gray(ds, pixels))


# ---------------------------------------------------------------- faults


def base_files(folder):
    "One small real image in each kind of encoding."
    pixels = chest(96)
    made = {
        s.keyword: make(folder / f'{s.keyword}.dcm', pixels, s, 15, WindowCenter=9000, WindowWidth=20000)
        for s in (
            uid.ImplicitVRLittleEndian,
            uid.ExplicitVRLittleEndian,
            uid.ExplicitVRBigEndian,
            uid.DeflatedExplicitVRLittleEndian,
            uid.RLELossless,
            uid.JPEGLosslessSV1,
            uid.JPEGLSLossless,
            uid.JPEG2000Lossless,
        )
    }
    made['JPEGBaseline8Bit'] = make(folder / 'JPEGBaseline8Bit.dcm', chest(96, 'u1', 8), uid.JPEGBaseline8Bit)
    return made


def test_a_file_cut_anywhere_is_refused(tmp_path):
    n = 0
    for name, path in base_files(tmp_path).items():
        data = path.read_bytes()
        cuts = {
            0,
            1,
            64,
            127,
            128,
            131,
            132,
            133,
            *range(134, 700, 37),
            *np.linspace(700, len(data) - 1, 25).astype(int),
            len(data) - 1,
            len(data) - 2,
            len(data) - 9,
        }
        for at in sorted(c for c in cuts if c < len(data)):
            (cut := tmp_path / 'cut.dcm').write_bytes(data[:at])
            n += 1
            if name.startswith('Deflated') and at == len(data) - 1:
                assert np.array_equal(read_dicom(cut), read_dicom(path))
                continue  # an even-length pad
            e = refused(cut, {'open', 'header'})
            assert at > 0 or e.error == 'empty file'
    print(n, 'cuts')


def test_a_real_file_cut_anywhere_is_refused_or_still_whole(tmp_path):
    for path in sorted(shared_dicom().glob('*.dcm')):
        data, start = path.read_bytes(), dicom._open(path)[1]
        whole = read_dicom(path)
        end = len(data) if start['length'] == 0xFFFFFFFF else start['start'] + start['length']
        for at in (
            300,
            start['start'] - 1,
            start['start'],
            start['start'] + 1,
            (start['start'] + end) // 2,
            end - 9,
            end - 1,
        ):
            (cut := tmp_path / 'cut.dcm').write_bytes(data[:at])
            try:
                a = read_dicom(cut)
            except DicomError as e:
                assert e.stage in ('open', 'header') and e.hint
            else:  # only what follows the pixel data is missing
                assert start['length'] == 0xFFFFFFFF and at > data.rindex(SEQUENCE_END) + 7 and np.array_equal(a, whole)


def test_a_cut_stream_in_a_whole_file_is_refused(tmp_path):
    "The file was repaired around pixel data that is incomplete."
    pixels = chest(96)
    for syntax in (uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless):
        stream = encode(pixels, syntax, 15)
        for keep in (0.1, 0.5, 0.9, 0.98):
            refused(make(tmp_path / 'a.dcm', pixels, syntax, 15, data=stream[: int(keep * len(stream))]), {'decode'})
    eight = chest(96, 'u1', 8)
    stream = encode(eight, uid.JPEGBaseline8Bit, 8)
    refused(make(tmp_path / 'a.dcm', eight, uid.JPEGBaseline8Bit, data=stream[: len(stream) // 2]), {'decode'})
    refused(make(tmp_path / 'a.dcm', pixels, uid.RLELossless, 15, data=b'\0\0'), {'decode', 'header'})
    refused(make(tmp_path / 'a.dcm', pixels, uid.JPEG2000Lossless, 15, data=b'no codestream at all'), {'decode'})


def test_a_stream_that_lost_its_middle_is_refused(tmp_path):
    "Both ends are whole: only the decoder can notice, and libjpeg only mutters."
    pixels, eight = chest(96), chest(96, 'u1', 8)
    for syntax, image, bits in (
        (uid.JPEGBaseline8Bit, eight, 8),
        (uid.JPEGLosslessSV1, pixels, 15),
        (uid.JPEGLSLossless, pixels, 15),
        (uid.JPEG2000Lossless, pixels, 15),
        (uid.RLELossless, pixels, 15),
    ):
        stream = encode(image, syntax, bits)
        third = len(stream) // 3
        e = refused(
            make(tmp_path / 'a.dcm', image, syntax, bits, data=stream[:third] + stream[third + 500 :]), {'decode'}
        )
        if syntax in (uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1):
            assert 'Corrupt JPEG' in e.error
    stream = encode(eight, uid.JPEGBaseline8Bit, 8)
    (picture := tmp_path / 'a.jpg').write_bytes(stream[:1500] + stream[2000:])
    assert 'Corrupt JPEG' in refused(picture, {'decode'}, read_radiograph).error


def test_changed_bytes_give_an_error_or_an_image_never_another_exception(tmp_path):
    "Run in worker processes: if a decoder crashes on one of them, that is a row of the table, too."
    rng, n = np.random.default_rng(0), 0
    (folder := tmp_path / 'flipped').mkdir()
    for name, path in base_files(tmp_path).items():
        data = path.read_bytes()
        places = [*rng.integers(132, 900, 25), *rng.integers(900, len(data), 10)]
        for at in places:
            changed = bytearray(data)
            changed[at] ^= int(rng.integers(1, 256))
            n += 1
            (folder / f'{name}_{n}.dcm').write_bytes(changed)
    bad = verify_tree(folder)
    assert bad.attrs['n_files'] == n
    assert (
        set(bad.stage) <= STAGES
        and 20 < len(bad) < n
        and bad.hint.str.len().min() > 0
        and bad.error.str.len().min() > 0
    )
    unexpected = bad[bad.error.str.contains('AttributeError|NameError|UnboundLocal')]
    assert unexpected.empty, unexpected.error.tolist()
    for path in set(folder.iterdir()) - {folder / p for p in bad.path}:
        is_image(read_dicom(path))


PIXELS = dict(SamplesPerPixel=3, PhotometricInterpretation='RGB', PlanarConfiguration=0)
WRONG = {
    'rows too many': (dict(Rows=97), 'header', 'PixelData'),
    'rows too few': (dict(Rows=95), 'header', 'PixelData'),
    'no rows': (dict(Rows=None), 'header', None),
    'zero rows': (dict(Rows=0), 'header', 'Rows'),
    'zero columns': (dict(Columns=0), 'header', 'Columns'),
    'bits allocated 8': (dict(BitsAllocated=8), 'header', 'BitsStored'),
    'bits allocated 32': (dict(BitsAllocated=32), 'header', 'BitsAllocated'),
    'all bits 8': (dict(BitsAllocated=8, BitsStored=8, HighBit=7), 'header', 'PixelData'),
    'bits allocated 12': (dict(BitsAllocated=12, BitsStored=12, HighBit=11), 'header', 'BitsAllocated'),
    'bits stored 17': (dict(BitsStored=17), 'header', 'BitsStored'),
    'bits stored 1': (dict(BitsStored=1, HighBit=0), 'header', 'BitsStored'),
    'bits stored 12 of 15': (dict(BitsStored=12, HighBit=11), 'pixels', 'BitsStored'),
    'high bit': (dict(HighBit=15), 'header', 'HighBit'),
    'pixel representation': (dict(PixelRepresentation=2), 'header', 'PixelRepresentation'),
    'no pixel data': (dict(PixelData=None), 'header', 'PixelData'),
    'no bytes': (dict(PixelData=b''), 'header', 'PixelData'),
    'half the bytes': (dict(PixelData=b'\1\0' * 48 * 96), 'header', 'PixelData'),
    'twice the bytes': (dict(PixelData=b'\1\0' * 192 * 96), 'header', 'PixelData'),
    'color': (PIXELS, 'header', 'SamplesPerPixel'),
    'palette': (dict(PhotometricInterpretation='PALETTE COLOR'), 'header', 'PhotometricInterpretation'),
    'frames': (dict(NumberOfFrames=2), 'header', 'NumberOfFrames'),
    'window without width': (dict(WindowCenter=5), 'header', 'WindowWidth'),
    'width 0': (dict(WindowCenter=5, WindowWidth=0), 'header', 'WindowWidth'),
    'width below 0': (dict(WindowCenter=5, WindowWidth=-3, VOILUTFunction='SIGMOID'), 'header', 'WindowWidth'),
    'unknown function': (dict(WindowCenter=5, WindowWidth=9, VOILUTFunction='CUBIC'), 'header', 'VOILUTFunction'),
    'window beside the values': (dict(WindowCenter=60000, WindowWidth=10), 'pixels', 'WindowCenter'),
    'slope without intercept': (dict(RescaleSlope=2), 'header', 'RescaleSlope'),
    'slope 0': (dict(RescaleSlope=0, RescaleIntercept=1), 'header', 'RescaleSlope'),
    'all padding': (dict(PixelPaddingValue=0, PixelPaddingRangeLimit=2**16 - 1), 'pixels', None),
    'table too short': (dict(VOILUTSequence=Sequence([lut_item(np.arange(50), 0, 12)])), 'header', None),
    'table above its bits': (
        dict(ModalityLUTSequence=Sequence([lut_item(np.arange(5000), 0, 12)])),
        'header',
        'LUTDescriptor',
    ),
    'constant table': (dict(VOILUTSequence=Sequence([lut_item(np.full(99, 7), 0, 12)])), 'pixels', None),
}
WRONG['table too short'][0]['VOILUTSequence'][0].LUTDescriptor = [5000, 0, 12]


@pytest.mark.parametrize('name', WRONG)
def test_wrong_elements_are_refused(tmp_path, name):
    elements, stage, field = WRONG[name]
    e = refused(make(tmp_path / 'a.dcm', chest(96), bits=None if 'BitsStored' in elements else 15, **elements), {stage})
    assert field is None or e.field == field
    is_image(read_dicom(make(tmp_path / 'b.dcm', chest(96), bits=15)))  # without the fault it reads


@pytest.mark.parametrize(
    'elements,error', [(dict(Rows=95), '95'), (dict(Rows=64, Columns=144), '144'), (dict(Columns=97), '97')]
)
@pytest.mark.parametrize(
    'syntax', [uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless], ids=lambda s: s.keyword
)
def test_compressed_streams_must_agree_with_the_header(tmp_path, syntax, elements, error):
    path = make(tmp_path / 'a.dcm', chest(96), syntax, 15, **elements)
    if syntax == uid.RLELossless and elements == dict(Rows=64, Columns=144):
        pytest.skip('RLE holds no size: the same number of pixels cannot be told apart')
    e = refused(path, {'decode'})
    assert syntax == uid.RLELossless or error in e.error


def test_constant_and_color_streams_are_refused(tmp_path):
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless):
        assert (
            'constant' in refused(make(tmp_path / 'a.dcm', np.full((64, 64), 500, 'u2'), syntax, 12), {'pixels'}).error
        )
    color = cv2.imencode('.jpg', np.dstack([chest(96, 'u1', 8)] * 3))[1].tobytes()
    assert (
        '3' in refused(make(tmp_path / 'b.dcm', chest(96, 'u1', 8), uid.JPEGBaseline8Bit, data=color), {'decode'}).error
    )


def test_transfer_syntax_and_pixel_data_must_agree(tmp_path):
    pixels = chest(64)
    native, packed = (
        make(tmp_path / 'n.dcm', pixels, bits=15).read_bytes(),
        make(tmp_path / 'p.dcm', pixels, uid.JPEG2000Lossless, 15).read_bytes(),
    )

    def swap(data, old, new):
        assert len(old) <= len(new)
        i = data.index(old.encode())
        n = len(old) + len(old) % 2
        new = new.encode() + b'\0' * (len(new) % 2)
        return data[: i - 2] + struct.pack('<H', len(new)) + new + data[i + n :]

    (a := tmp_path / 'a.dcm').write_bytes(swap(native, '1.2.840.10008.1.2.1', '1.2.840.10008.1.2.4.90'))
    assert refused(a, {'header'}).field == 'TransferSyntaxUID'
    (b := tmp_path / 'b.dcm').write_bytes(swap(native, '1.2.840.10008.1.2.1', '1.2.840.10008.1.2.4.999'))
    assert 'not read' in refused(b, {'codec'}).error
    (c := tmp_path / 'c.dcm').write_bytes(packed.replace(b'1.2.840.10008.1.2.4.90', b'1.2.840.10008.1.2.1\0\0\0'))
    refused(c, {'header'})


def test_what_is_not_dicom_is_refused(tmp_path):
    for content in (
        b'',
        b'\0',
        b'a text file\n' * 50,
        b'PK\3\4' + bytes(500),
        bytes(10_000),
        b'\0' * 128 + b'DICM',
        b'\0' * 128 + b'DICM' + b'\xff' * 500,
        b'GIF89a' + bytes(300),
        np.random.default_rng(1).bytes(5000),
        b'\x08\0' + bytes(300),
        b'\x08\0\5\0CS\x0a\0ISO',
    ):
        (f := tmp_path / 'a.dcm').write_bytes(content)
        refused(f, {'open', 'header'})
        refused(f, {'open', 'header'}, read_radiograph)
    refused(tmp_path, {'open'})
    refused(tmp_path / 'absent.dcm', {'open'})
    refused(tmp_path / 'absent.dcm', {'open'}, read_radiograph)


def test_a_missing_decoder_is_named_with_its_install_hint(tmp_path, monkeypatch):
    path = make(tmp_path / 'a.dcm', chest(64), uid.JPEG2000Lossless, 15)
    assert (
        codecs()
        .set_index('uid')
        .available[[*LOSSLESS, uid.JPEGBaseline8Bit, uid.JPEG2000, uid.JPEGLSNearLossless]]
        .all()
    )
    monkeypatch.setitem(dicom.PLUGINS, uid.JPEG2000Lossless, ('pylibjpeg-absent',))
    monkeypatch.setitem(dicom.INSTALL, 'pylibjpeg-absent', 'pip install pylibjpeg')
    e = refused(path, {'codec'})
    assert 'pip install pylibjpeg' in e.hint and 'JPEG 2000' in e.error
    row = codecs().set_index('uid').loc[uid.JPEG2000Lossless]
    assert not row.available and row.install == 'pip install pylibjpeg'
    twelve = get_testdata_file('JPGExtended.dcm', download=False)
    assert 'dcmdjpeg' in refused(twelve, {'codec'}).hint


# ---------------------------------------------------------------- PNG and JPEG


def test_pictures_are_read_by_content_and_checked(tmp_path):
    gray = chest(96, 'u1', 8)
    for name, pixels in (
        ('a.png', gray),
        ('b.png', chest(96)),
        ('c.png', np.dstack([gray] * 3)),
        ('d.png', np.dstack([gray] * 3 + [gray * 0 + 255])),
    ):
        cv2.imwrite(str(tmp_path / name), pixels)
        want = chest(96) if name == 'b.png' else gray
        assert np.array_equal(read_radiograph(tmp_path / name), to_unit(want).astype(np.float32)), name
    (misnamed := tmp_path / 'x.dcm').write_bytes((tmp_path / 'a.png').read_bytes())
    assert np.array_equal(read_radiograph(misnamed), to_unit(gray).astype(np.float32))
    refused(misnamed, {'open'})
    cv2.imwrite(str(tmp_path / 'e.jpg'), gray)
    rng = np.random.default_rng(0)
    for name in ('a.png', 'e.jpg'):
        data = (tmp_path / name).read_bytes()
        for at in np.linspace(8, len(data) - 3, 30).astype(int):
            (cut := tmp_path / 'cut').write_bytes(data[:at])
            refused(cut, {'decode'}, read_radiograph)
        for at in rng.integers(8, len(data), 40):
            changed = bytearray(data)
            changed[at] ^= int(rng.integers(1, 256))
            (flip := tmp_path / 'flip').write_bytes(changed)
            if name == 'a.png':
                refused(flip, {'decode'}, read_radiograph)  # every chunk of a PNG has a checksum
            else:
                try:
                    is_image(read_radiograph(flip))
                except DicomError as e:
                    assert e.stage == 'decode' and e.hint
    cv2.imwrite(str(tmp_path / 'f.png'), gray * 0 + 9)
    assert 'constant' in refused(tmp_path / 'f.png', {'pixels'}, read_radiograph).error


# ---------------------------------------------------------------- trees, speed

CRASH = '''import os, signal
from cxrpaper.data.dicom import _complaint
def read(path):
    if path.name.startswith('kills'): os.kill(os.getpid(), signal.SIGSEGV)
    return _complaint(path)
'''


def tree(folder, n_good=6):
    (folder / 'a' / 'b').mkdir(parents=True)
    pixels = chest(64)
    for i in range(n_good):
        make(folder / 'a' / 'b' / f'good{i}.dcm', pixels, bits=15)
    (folder / 'a' / 'empty.dcm').write_bytes(b'')
    (folder / 'a' / 'notes.dcm').write_text('notes')
    make(folder / 'a' / 'flat.dcm', pixels * 0, bits=15)
    return folder


def test_verify_tree_lists_every_bad_file_and_only_those(tmp_path, capsys):
    root = tree(tmp_path / 't')
    for workers in (0, 2):
        bad = verify_tree(root, workers=workers)
        assert bad.attrs['n_files'] == 9 and list(bad.columns) == ['path', 'stage', 'error', 'hint']
        assert list(zip(bad.path, bad.stage)) == [
            ('a/empty.dcm', 'open'),
            ('a/flat.dcm', 'pixels'),
            ('a/notes.dcm', 'open'),
        ]
    assert capsys.readouterr().err == ''
    verify_tree(root, workers=0, progress=True)
    assert 'verify' in capsys.readouterr().err
    fine = verify_tree(root, '**/good*.dcm', workers=0)
    assert len(fine) == 0 and list(fine.columns) == list(bad.columns) and fine.attrs['n_files'] == 6
    with pytest.raises(InputError, match='no file matches'):
        verify_tree(root, '*.png')
    with pytest.raises(InputError, match='no file matches'):
        verify_tree(root / 'absent')


def test_a_process_that_dies_costs_one_file_only(tmp_path, monkeypatch):
    root = tree(tmp_path / 't', 10)
    for name in ('kills1.dcm', 'kills2.dcm'):
        (root / name).write_bytes((root / 'a' / 'b' / 'good0.dcm').read_bytes())
    (tmp_path / 'crashing_reader.py').write_text(CRASH)
    monkeypatch.syspath_prepend(tmp_path)
    from crashing_reader import read

    files = sorted(root.rglob('*.dcm'))
    found = dict(each_file(read, files, 2))
    assert set(found) == set(files)
    died = {f.name for f, r in found.items() if isinstance(r, DicomError)}
    assert died == {'kills1.dcm', 'kills2.dcm'} and all('died' in found[root / n].error for n in died)
    assert sum(r is None for r in found.values()) == 10 and sum(isinstance(r, tuple) for r in found.values()) == 3


def test_workers_without_main_guard_say_so(tmp_path):
    root = tree(tmp_path / 't', 1)
    (script := tmp_path / 's.py').write_text(
        f'from cxrpaper.data.dicom import verify_tree\nprint(len(verify_tree({str(root)!r})))\n'
    )
    r = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=project_root(),
        env={**os.environ, 'PYTHONPATH': str(project_root())},
    )
    assert r.returncode != 0 and "__name__ == '__main__'" in r.stderr


def test_errors_cross_process_boundaries():
    e = pickle.loads(pickle.dumps(DicomError('decode', 'broken', 'a.dcm', 'PixelData', 'copy it')))
    assert (e.stage, e.error, e.path, e.field, e.hint) == ('decode', 'broken', 'a.dcm', 'PixelData', 'copy it')
    assert isinstance(e, InputError) and 'broken (stage decode). Hint: copy it' in str(e)


@pytest.mark.serial
def test_reading_nine_million_pixels_takes_well_under_a_second(tmp_path):
    path = make(tmp_path / 'a.dcm', chest(3000, 'u2', 16), WindowCenter=30000, WindowWidth=50000)
    seconds = []
    for _ in range(4):
        start = time.process_time()
        a = read_dicom(path)
        seconds.append(time.process_time() - start)  # of the processor: others may use it, too
    is_image(a, (3000, 3000))
    start = time.process_time()
    read_header(path)
    header = time.process_time() - start
    print(f'{min(seconds):.3f} s, header {1000 * header:.1f} ms')
    assert min(seconds) < 0.8 and header < 0.2


def test_a_mistake_of_our_own_is_not_the_files_fault(tmp_path):
    from cxrpaper.data.dicom import stage

    with pytest.raises(NameError), stage('open', tmp_path, 'copy it again'):
        no_such_name  # noqa: B018, F821
    with pytest.raises(DicomError, match='copy it again'), stage('open', tmp_path, 'copy it again'):
        int('x')


# ---------------------------------------------------------------- what people bring


def test_streams_with_more_bits_than_stated_are_refused_under_every_lossless_syntax(tmp_path):
    "Nothing may wrap: 13 bits under Bits Stored 12."
    pixels = chest(64).astype(np.uint16) % 4096
    syntaxes = (uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless)
    for syntax in syntaxes:
        name = ''.join(c for c in syntax.name if c.isalnum())
        is_image(read_dicom(make(tmp_path / f'{name}.dcm', pixels, syntax, 12)))
        more = pixels.copy()
        more[0, 0] = 5000
        stream = encode(more, syntax, 13)
        e = refused(make(tmp_path / f'{name}_more.dcm', more, syntax, 12, data=stream))
        assert e.field == 'BitsStored', (name, e)


def test_a_signed_stream_under_an_unsigned_header_is_refused(tmp_path):
    pixels = (chest(64).astype(np.int32) % 4096 - 2048).astype(np.int16)
    right = make(tmp_path / 'right.dcm', pixels, uid.JPEG2000Lossless, 12)
    assert read_pixels(right)[1].min() < 0
    wrong = make(tmp_path / 'wrong.dcm', pixels, uid.JPEG2000Lossless, 12, PixelRepresentation=0)
    assert refused(wrong).field == 'PixelRepresentation'


def test_padding_after_the_pixel_data_is_legal_and_other_bytes_are_not(tmp_path):
    pixels = chest(64)
    plain = make(tmp_path / 'plain.dcm', pixels)
    padded = make(tmp_path / 'padded.dcm', pixels, data=encode(pixels, uid.ExplicitVRLittleEndian, 16) + bytes(510))
    assert (read_dicom(padded) == read_dicom(plain)).all()
    other = encode(pixels, uid.ExplicitVRLittleEndian, 16) + bytes(range(256)) * 2
    assert refused(make(tmp_path / 'other.dcm', pixels, data=other)).field == 'PixelData'


def rle_frame(planes, n=None, starts=None, more=b''):  # planes: decoded bytes of each segment, in the order of the file
    "A frame whose header may lie."
    packed = [rle(np.frombuffer(p, np.uint8).reshape(1, -1)) for p in planes]
    true = [64 + sum(map(len, packed[:k])) for k in range(len(packed))]
    header = [len(packed) if n is None else n, *(true if starts is None else starts)]
    return struct.pack('<16L', *header, *[0] * (16 - len(header))) + b''.join(packed) + more


def test_an_rle_segment_may_end_in_one_byte_to_make_it_even(tmp_path):
    for rows, extra, good in (
        (65, 0, True),
        (65, 1, True),
        (65, 2, False),
        (65, 40, False),
        (64, 0, True),
        (64, 1, False),
    ):
        pixels = np.ascontiguousarray(chest(65)[:rows, :63]).astype(np.uint8)
        frame = rle_frame([pixels.tobytes() + bytes(extra)])
        file = make(tmp_path / 'a.dcm', pixels, uid.RLELossless, data=frame)
        if good:
            assert (read_pixels(file)[1] == pixels).all()
        else:
            assert 'RLE segment 1 of 1: decoded to' in refused(file, {'decode'}).error


def test_every_fault_of_an_rle_frame_is_named(tmp_path):
    pixels = chest(64)
    high, low = (pixels >> 8).astype(np.uint8).tobytes(), (pixels & 255).astype(np.uint8).tobytes()
    whole = rle_frame([high, low])
    assert (read_pixels(make(tmp_path / 'a.dcm', pixels, uid.RLELossless, data=whole))[1] == pixels).all()
    two = struct.unpack('<3L', whole[:12])[2]
    for frame, said in (
        (rle_frame([high[:-1], low]), 'segment 1 of 2: decoded to'),
        (rle_frame([high, low[:-40]]), 'segment 2 of 2: decoded to'),
        (rle_frame([high + b'x', low]), 'segment 1 of 2: decoded to'),
        (rle_frame([high, low + b'x']), 'segment 2 of 2: decoded to'),
        (whole[:-2], 'segment 2 of 2: decoded to'),
        (whole + bytes([100, 1, 2]), 'segment 2 of 2: The end of the data'),
        (rle_frame([low]), '1 RLE segments where the header asks for 2'),
        (rle_frame([high, low, low]), '3 RLE segments where the header asks for 2'),
        (rle_frame([high, low], n=16), '16 RLE segments where the header asks for 2'),
        (rle_frame([high, low], starts=[63, two]), 'segment 1 of 2: bytes 63 to'),
        (rle_frame([high, low], starts=[two, 64]), f'segment 1 of 2: bytes {two:,} to 64'),
        (rle_frame([high, low], starts=[64, 64]), 'segment 1 of 2: bytes 64 to 64'),
        (rle_frame([high, low], starts=[64, len(whole)]), 'segment 2 of 2: bytes'),
        (rle_frame([high, low], starts=[64, 2**32 - 2]), 'segment 1 of 2: bytes 64 to 4,294,967,294'),
        (rle_frame([high, low], starts=[64, two + 2]), 'segment 1 of 2:'),
        (whole[:62], '62 bytes where the RLE header alone has 64'),
    ):
        error = refused(make(tmp_path / 'a.dcm', pixels, uid.RLELossless, data=frame), {'decode'}).error
        assert said in error and 'frame 1' in error, (said, error)


def test_rle_files_read_as_pydicom_reads_them(tmp_path):
    "Its own decoder is slow and counts; ours is compiled."
    n = 0
    for path in Path(get_testdata_file('MR_small_RLE.dcm', download=False)).parent.glob('*[rR][lL][eE]*.dcm'):
        try:
            ds, pixels = read_pixels(path)
        except DicomError as e:
            assert e.stage == 'header', e  # colour, several frames, 32 bits
            continue
        n += 1
        assert np.array_equal(
            pixels, get_decoder(uid.RLELossless).as_array(dcmread(path), decoding_plugin='pydicom')[0]
        )
    assert n >= 1
    for dtype, bits in (('u1', 8), ('u2', 12), ('u2', 16), ('i2', 12), ('i2', 16)):
        for rows in (63, 64):
            path = make(
                tmp_path / 'a.dcm', np.ascontiguousarray(chest(65, dtype, bits)[:rows, :63]), uid.RLELossless, bits
            )
            want = get_decoder(uid.RLELossless).as_array(dcmread(path), raw=True, decoding_plugin='pydicom')[0]
            assert np.array_equal(read_pixels(path)[1], want)


@pytest.mark.parametrize('syntax', [uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_gdcm_gives_the_same_pixels_into_a_buffer_as_it_gives_as_text(tmp_path, syntax, monkeypatch):
    monkeypatch.setitem(dicom.PLUGINS, syntax, ('gdcm',))
    for dtype, bits in (('u2', 10), ('u2', 12), ('u2', 16), ('i2', 12), ('i2', 16)):
        path = make(tmp_path / 'a.dcm', chest(65, dtype, bits), syntax, bits)
        want = get_decoder(syntax).as_array(dcmread(path), raw=True, decoding_plugin='gdcm')[0]
        assert np.array_equal(read_pixels(path)[1], dicom._significant(want, dcmread(path), path))


def test_a_file_that_is_another_one_by_now_is_refused(tmp_path):
    picture = tmp_path / 'a.png'
    cv2.imwrite(str(picture), chest(64))
    for path in (make(tmp_path / 'a.dcm', chest(64)), picture):
        true = hashlib.sha256(path.read_bytes()).hexdigest()
        assert np.array_equal(read_radiograph(path, true), read_radiograph(path))
        assert 'changed while it was read' in refused(path, {'open'}, lambda p: read_radiograph(p, '0' * 64)).error


def test_padding_value_that_no_pixel_can_hold_blackens_nothing(tmp_path):
    pixels = np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))
    pixels[:, -1] = 255
    file = make(tmp_path / 'a.dcm', pixels, PixelPaddingValue=4095)
    assert read_dicom(file)[:, -1].min() == 1


@pytest.mark.parametrize('shape', ['INVERSE', 'inverse', 'Inverse '])
def test_code_strings_are_read_however_they_are_written(tmp_path, shape):
    pixels = chest(64)
    plain = read_dicom(make(tmp_path / 'a.dcm', pixels, WindowCenter=500, WindowWidth=400, VOILUTFunction='SIGMOID'))
    other = make(
        tmp_path / 'b.dcm',
        pixels,
        WindowCenter=500,
        WindowWidth=400,
        VOILUTFunction='sigmoid',
        PresentationLUTShape=shape,
    )
    assert read_dicom(other) == pytest.approx(1 - plain, abs=1e-6)


def test_pipes_devices_and_bombs_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'pipe.dcm')
    start = time.time()
    for path in (tmp_path / 'pipe.dcm', Path('/dev/zero')):
        assert refused(path, {'open'}).error == 'not a regular file'
        assert refused(path, {'open'}, read_radiograph).error == 'not a regular file'
    bomb = make(tmp_path / 'bomb.dcm', chest(64))
    head = bytearray(bomb.read_bytes())
    import zlib

    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = bytes(2**24)
    stream = b''.join(pack.compress(block) for _ in range(70)) + pack.flush()
    ds = dcmread(bomb)
    meta = 144 + ds.file_meta.FileMetaInformationGroupLength
    old, new = str(ds.file_meta.TransferSyntaxUID).encode(), b'1.2.840.10008.1.2.1.99'
    at = head.index(old)
    length = len(new) - len(old.ljust(20, b'\0'))
    head[at : at + 20] = new
    head[at - 2 : at] = struct.pack('<H', 22)
    size = struct.unpack('<L', head[140:144])[0] + length
    head[140:144] = struct.pack('<L', size)
    bomb.write_bytes(bytes(head[: meta + length]) + stream)
    assert bomb.stat().st_size < 2 * 2**20
    e = refused(bomb, {'header'})
    assert 'inflates to more than' in e.error and time.time() - start < 30


def test_other_pictures_are_named_with_what_helps(tmp_path):
    for ending, kind in (('tif', 'TIFF'), ('bmp', 'BMP'), ('webp', 'WebP')):
        file = tmp_path / f'a.{ending}'
        cv2.imwrite(str(file), chest(64).astype(np.uint8))
        e = refused(file, {'open'}, read_radiograph)
        assert kind in e.error and 'PNG' in e.hint
