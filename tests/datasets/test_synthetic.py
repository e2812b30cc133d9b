import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import f1_score

from torchgeo_s1s2.datasets import MultiSenGE
from torchgeo_s1s2.datasets.catalog import CACHE, Catalog
from torchgeo_s1s2.datasets.sensors import UNIT
from torchgeo_s1s2.datasets.synthetic import ENL, TILES, phenology, speckle, write_synthetic

PATCHES = {'31UFQ': 2, '32ULU': 1, '31UFP': 1, '31UEQ': 1}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp('data'), 16, PATCHES, progress=False)


def contents(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob('*') if path.is_file() and path.name != CACHE)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_files_are_named_and_encoded_as_in_multisenge(root: Path) -> None:
    assert sorted(p.name for p in (root / 'labels').iterdir()) == [
        '31UEQ_0_0.json',
        '31UFP_0_0.json',
        '31UFQ_0_0.json',
        '31UFQ_17_0.json',  # 16 pixels and a gap of one
        '32ULU_0_0.json',
    ]
    content = json.loads((root / 'labels/31UFQ_17_0.json').read_text())
    assert set(content) == {'corresponding_s2', 'corresponding_s1', 'projection', 'labels'}
    assert content['projection'].startswith('PROJCS["WGS 84 / UTM zone 31N"')
    with rasterio.open(root / 'ground_reference/31UFQ_GR_17_0.tif') as src:
        assert (src.count, src.dtypes[0], src.shape, src.nodata) == (1, 'uint8', (16, 16), None)
        assert content['labels'] == ';'.join(map(str, np.unique(src.read())))
    for sensor, count, dtype in (('s2', 10, 'int16'), ('s1', 2, 'float32')):
        names = content[f'corresponding_{sensor}'].split(';')
        on_disk = {p.name for p in (root / sensor).glob('31UFQ_2020????_S?_17_0.tif')}
        assert set(names) == on_disk
        assert len(names) == len(on_disk)
        assert names != sorted(names)  # in no order
        for name in names:
            with rasterio.open(root / sensor / name) as src:
                assert (src.count, set(src.dtypes), src.shape) == (count, {dtype}, (16, 16))
                assert src.compression.name == 'lzw'
                assert src.tags()[UNIT] == {'s2': 'dn', 's1': 'linear'}[sensor]
                assert src.read().min() > 0  # neither nodata (-10000, 0) nor a negative power
                assert src.transform[:6] == (10, 0, 600170, 0, -10, 5500020)


def test_both_zones_and_all_splits_have_patches(root: Path) -> None:
    with warnings.catch_warnings(action='error'):
        catalog = Catalog(root, progress=False)
    epsg = dict(zip(catalog.patches['tile'], catalog.patches['epsg'], strict=True))
    # UTM zones 31 and 32 end in the EPSG code's last two digits.
    assert epsg == {tile: 32600 + int(tile[:2]) for tile in TILES}
    sizes = [len(MultiSenGE(root, split, catalog=catalog)) for split in ('train', 'val', 'test')]
    assert sizes == [3, 1, 1]


def test_patches_depend_on_the_seed_and_their_names_only(root: Path, tmp_path: Path) -> None:
    again = write_synthetic(tmp_path / 'again', 16, dict(reversed(PATCHES.items())), progress=False)
    other = write_synthetic(tmp_path / 'other', 16, PATCHES, seed=1, progress=False)
    expected, got, changed = contents(root), contents(again), contents(other)
    expected.pop('synthetic.json'), got.pop('synthetic.json')
    assert got == expected
    label = 'ground_reference/32ULU_GR_0_0.tif'
    assert changed[label] != expected[label]


def test_an_interrupted_writing_goes_on(root: Path, tmp_path: Path) -> None:
    part = write_synthetic(tmp_path / 'part', 16, PATCHES, progress=False)
    for path in (part / 'labels').glob('31U*'):
        path.unlink()
    for path in (part / 's2').glob('31U*'):
        path.write_bytes(b'half an image')
    kept = part / 's2' / next(p.name for p in (part / 's2').glob('32ULU*'))
    before = kept.stat().st_mtime_ns
    below = part / 'labels' / 'alsace'
    below.mkdir()
    (listing,) = (part / 'labels').glob('32ULU*')
    listing.rename(below / listing.name)
    write_synthetic(part, 16, PATCHES, progress=False)
    assert not listing.exists()
    (below / listing.name).rename(listing)
    assert contents(part) == contents(root)
    assert kept.stat().st_mtime_ns == before


def test_other_settings_and_foreign_data_are_refused(tmp_path: Path, two_zones: Path) -> None:
    root = write_synthetic(tmp_path / 'set', 16, {'31UEQ': 1}, progress=False)
    marker = root / 'synthetic.json'
    settings = json.loads(marker.read_text())
    assert settings.pop('delay') == 0
    marker.write_text(json.dumps(settings))  # as it was before there was a delay
    write_synthetic(root, 16, {'31UEQ': 1}, progress=False)
    for other in ({'delay': 10}, {'seed': 1}):
        with pytest.raises(ValueError, match='other settings'):
            write_synthetic(root, 16, {'31UEQ': 1}, **other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='not synthetic'):
        write_synthetic(two_zones)
    with pytest.raises(ValueError, match=r"\['31UDS'\]"):
        write_synthetic(root, patches={'31UDS': 1})
    with pytest.raises(ValueError, match='size is 1; it must be 2 or more'):
        write_synthetic(tmp_path / 'small', 1)
    with pytest.raises(ValueError, match='31UEQ is 0; it must be 1 or more'):
        write_synthetic(tmp_path / 'none', patches={'31UEQ': 0})


def test_a_patch_without_november_has_no_series(tmp_path: Path) -> None:
    write_synthetic(tmp_path, 16, {'31UFQ': 1}, incomplete=1, progress=False)
    with pytest.raises(ValueError, match='no S2 date for November'):
        MultiSenGE(tmp_path)


def test_a_late_season_changes_what_grows_and_nothing_else(tmp_path: Path) -> None:
    wood = {'32ULU': 1}
    usual, late = (
        write_synthetic(tmp_path / f'{days}', 32, wood, seed=2, delay=days, progress=False)
        for days in (0, 30)
    )
    label = 'ground_reference/32ULU_GR_0_0.tif'
    assert contents(late)[label] == contents(usual)[label]
    assert [*contents(late)] == [*contents(usual)]
    # Leaves fall about day 300, 26 October: in November of a late year they are still there.
    assert november_ndvi(late, label=11) > november_ndvi(usual, label=11) + 0.1


def november_ndvi(root: Path, label: int) -> float:
    """Mean NDVI in November of the pixels of a label."""
    with rasterio.open(next((root / 'ground_reference').iterdir())) as src:
        chosen = src.read(1) == label
    with rasterio.open(next((root / 's2').glob('*_202011??_S2_*'))) as src:
        red, nir = src.read([3, 7])[:, chosen].astype(float)
    return float(((nir - red) / (nir + red)).mean())


def test_plants_grow_and_go() -> None:
    # Half has grown on the first day and half has gone on the last; 1 / (1 + e) at 8 days before.
    day = np.array([92.0, 100.0, 150.0, 200.0, 208.0])
    expected = [0.26894142, 0.5, 0.99614, 0.5, 0.26894142]
    np.testing.assert_allclose(phenology(day, 100, 200), expected, atol=1e-4)


def test_speckle_has_mean_one_and_the_variance_of_its_looks() -> None:
    values = speckle(np.random.default_rng(0), (200_000,))
    assert values.mean() == pytest.approx(1, abs=0.005)
    assert values.var() == pytest.approx(1 / ENL, rel=0.02)
    assert values.min() > 0


@pytest.fixture(scope='module')
def pixels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[NDArray, NDArray]]:
    """Series (N, T, C) and classes (N,) of pixels of the training and test tiles."""
    root = tmp_path_factory.mktemp('pixels')
    write_synthetic(root, 24, dict.fromkeys(('31UFQ', '32ULU', '31UEQ'), 8), progress=False)
    return {split: draw_pixels(MultiSenGE(root, split, classes=10)) for split in ('train', 'test')}


def draw_pixels(dataset: MultiSenGE, number: int = 400) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(0)
    series, classes = [], []
    for i in range(len(dataset)):
        sample = dataset[i]
        chosen = rng.choice(sample['mask'].numel(), number, replace=False)
        series.append(sample['image'].flatten(2)[..., chosen].permute(2, 0, 1).numpy())
        classes.append(sample['mask'].flatten()[chosen].numpy())
    return np.concatenate(series), np.concatenate(classes)


def weighted_f1(
    model: object, pixels: dict[str, tuple[NDArray, NDArray]], slots: slice, bands: slice
) -> float:
    (x, y), (x_test, y_test) = (
        (series[:, slots, bands].reshape(len(series), -1), classes)
        for series, classes in (pixels['train'], pixels['test'])
    )
    predicted = model.fit(x, y).predict(x_test)  # type: ignore[attr-defined]
    return float(f1_score(y_test, predicted, average='weighted'))


ALL, S2, S1 = slice(None), slice(0, 10), slice(10, 12)


@pytest.mark.parametrize(
    'model',
    [LinearDiscriminantAnalysis(), ExtraTreesClassifier(50, min_samples_leaf=2, random_state=0)],
    ids=['linear', 'trees'],
)
def test_time_and_radar_help_a_pixel_classifier(
    model: object, pixels: dict[str, tuple[NDArray, NDArray]]
) -> None:
    both = weighted_f1(model, pixels, ALL, ALL)
    s2 = weighted_f1(model, pixels, ALL, S2)
    s1 = weighted_f1(model, pixels, ALL, S1)
    single = max(weighted_f1(model, pixels, slice(t, t + 1), ALL) for t in range(4))
    assert both > s2 + 0.02
    assert both > single + 0.05
    assert min(s2, single) > s1 + 0.1
    assert both < 0.92  # what is left is for the neighbourhood


def test_classes_are_mixed_and_differ_between_patches(
    pixels: dict[str, tuple[NDArray, NDArray]],
) -> None:
    classes = pixels['train'][1].reshape(-1, 400)
    share = np.bincount(classes.ravel(), minlength=10) / classes.size
    assert share.min() > 0.005
    assert share.max() < 0.35  # none is frequent enough to be guessed
    arable = (classes == 5).mean(1)
    assert arable.std() > 0.1


def test_with_context_the_ground_is_the_same_and_pixels_say_less(tmp_path: Path) -> None:
    means = {}
    for context in (False, True):
        folder = tmp_path / str(context)
        write_synthetic(folder, 64, {'31UFQ': 4}, incomplete=0, context=context, progress=False)
        dataset = MultiSenGE(folder, 'all', splits={})
        samples = [dataset[i] for i in range(len(dataset))]
        masks = np.concatenate([s['mask'].numpy().ravel() for s in samples])
        vh = np.concatenate([s['image'][0, 11].numpy().ravel() for s in samples])
        means[context] = masks, [vh[masks == label - 1].mean() for label in (1, 3)]
    np.testing.assert_array_equal(means[False][0], means[True][0])
    # Backscatter without plants is -12 and -15 dB, and plants weaken that of the first more.
    plain, alike = (abs(vh[0] - vh[1]) for _, vh in means.values())
    assert alike < plain / 2
