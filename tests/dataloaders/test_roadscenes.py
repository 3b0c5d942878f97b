"""Generated scenes: deterministic, in A2D2's layout and colours, alike in light, unlike in look."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dataloaders import roadscenes as module
from dataloaders.a2d2_classes import class_map
from dataloaders.frames import read_image
from dataloaders.roadscenes import SceneJob, label_colours, main, roadscenes
from dataloaders.scene_furniture import FRAMES_PER_SCENE
from dataloaders.scene_layouts import SUBSETS
from dataloaders.scene_painter import ID, SUPERSAMPLE, Canvas, Light, Line, Strip, noise_texture
from engine.components import component
from engine.config import UserError

SMALL = {"size": (48, 72), "train": 9, "gate": 8, "val": 2, "test": 8, "ambiguous": 3}
PLAIN = Light(
    exposure=100.0, warmth=0.0, tint=0.0, contrast=1.0, sun=1.0, haze=0.0, haze_colour=(200.0,) * 3,
    sky_top=(200.0,) * 3, clouds=0.0, rain=0, noise=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return roadscenes(root=str(tmp_path_factory.mktemp("scenes") / "data"), **SMALL)


@pytest.fixture(scope="module")
def pairs(index):
    """(frame, image, class ids, unknown pixels) of every frame."""
    return [(frame, *index.read(frame)) for frame in index.frames]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_parameters_give_the_same_bytes_and_another_seed_other_images(index, tmp_path):
    again = roadscenes(root=str(tmp_path / "again"), **SMALL)
    other = roadscenes(root=str(tmp_path / "other"), **SMALL, seed=1)
    assert contents(again.root) == contents(index.root)
    for before, after in zip(index.frames, other.frames, strict=True):
        assert before.image.read_bytes() != after.image.read_bytes()


def test_a_frame_depends_on_seed_scene_and_place_alone(index, tmp_path):
    """More frames, drawn by worker processes in any order, leave the bytes of those that were there."""
    more = roadscenes(root=str(tmp_path / "more"), **{**SMALL, "train": 40})
    longer = contents(more.root)
    frames = {name: data for name, data in contents(index.root).items() if name.endswith(".png")}
    assert len(frames) == 2 * (2 * (9 + 8 + 2 + 8) + 3)
    assert {name: longer[name] for name in frames} == frames


def test_layout_is_that_of_a2d2(index):
    assert index.name == "roadscenes" and index.subsets == ("highway", "urban", "ambiguous")
    for subset in ("highway", "urban"):
        assert {split: index.counts[subset, split] for split in ("train", "gate", "val", "test")} == {
            split: SMALL[split] for split in ("train", "gate", "val", "test")
        }
    assert {key: n for key, n in index.counts.items() if key[0] == "ambiguous"} == {("ambiguous", "test"): 3}
    assert index.trained_subsets == {"highway", "urban"}
    frame = index.frames[0]
    for kind, path in (("camera", frame.image), ("label", frame.label)):
        file = f"{frame.scene.replace('_', '')}_{kind}_frontcenter_000000015.png"
        assert path == index.root / frame.scene / kind / "cam_front_center" / file and path.exists()
    assert len(json.loads((index.root / "class_list.json").read_text())) == 55


def test_a_scene_belongs_to_one_subset_and_split_and_is_one_block(index):
    homes, frames = {}, {}
    for frame in index.frames:
        homes.setdefault(frame.scene, set()).add((frame.subset, frame.split, frame.block))
        frames[frame.scene] = frames.get(frame.scene, 0) + 1
    assert all(len(home) == 1 for home in homes.values())
    assert len({block for home in homes.values() for _, _, block in home}) == len(homes)
    assert max(frames.values()) == FRAMES_PER_SCENE and sum(frames.values()) == len(index.frames)


def test_every_colour_is_known_and_sizes_agree(pairs):
    for _, image, ids, unknown in pairs:
        assert unknown == 0 and ids.max() < 38
        assert image.shape == (48, 72, 3) and ids.shape == (48, 72)


def test_each_label_value_has_a_colour_of_its_class():
    mapped = dict(class_map(38).ids)
    for class_id in range(38):
        for variant in range(4):
            red, green, blue = map(int, label_colours()[class_id + 64 * variant])
            assert mapped[red << 16 | green << 8 | blue] == class_id
    assert label_colours()[0 + 64 * 1].tolist() == [0xC8, 0, 0]  # Car 2


@pytest.mark.parametrize("num_classes", [11, 55])
def test_other_class_maps_read_the_same_files(index, num_classes):
    other = roadscenes(root=str(index.root), num_classes=num_classes, **SMALL)
    _, ids, unknown = other.read(other.frames[0])
    assert other.num_classes == num_classes and unknown == 0 and len(np.unique(ids)) > 3


def test_subsets_share_classes():
    present = {subset: set() for subset in SUBSETS}
    for subset, classes in present.items():
        for number in range(12):
            _, label = next(SceneJob(3, (64, 96), subset, "test", number, 1).paint())
            packed = label.astype(int) @ (1 << 16, 1 << 8, 1)
            classes |= {dict(class_map(38).ids)[colour] for colour in np.unique(packed)}
    names = class_map(38).classes
    shared = {names[number] for number in set.intersection(*present.values())}
    assert shared == {
        "Car", "Truck", "Traffic sign", "Curbstone", "Solid line", "Dashed line", "Road blocks",
        "Non-drivable street", "Poles", "Grid structure", "Nature object", "Sidewalk",
        "RD normal street", "Sky", "Buildings",
    }  # fmt: skip
    assert {names[number] for number in present["urban"] - present["highway"]} >= {
        "Pedestrian",
        "Parking area",
    }


def test_light_follows_the_random_numbers_and_not_the_road():
    lights = [
        [layout(np.random.default_rng(seed)).light for seed in range(20)] for layout in SUBSETS.values()
    ]
    assert lights[0] == lights[1] == lights[2]
    assert len({light.exposure for light in lights[0]}) == 20


def test_exposure_control_reaches_the_grey_value_of_the_light():
    """However bright the road is: what is clipped and rounded costs a few per cent."""
    for subset, layout in SUBSETS.items():
        for number in range(8):
            job = SceneJob(2, (48, 72), subset, "test", number, 1)
            exposure = layout(np.random.default_rng(job.key)).light.exposure
            assert next(job.paint())[0].mean() == pytest.approx(exposure, rel=0.08)


def test_brightness_and_hue_do_not_tell_the_subset():
    jobs = [
        SceneJob(5, (32, 48), subset, "test", n, 1) for subset in ("highway", "urban") for n in range(100)
    ]
    colours = np.array([next(job.paint())[0].mean((0, 1)) for job in jobs])  # [200, 3]
    truth = [0] * 100 + [1] * 100
    assert 0.35 < roc_auc_score(truth, colours.mean(1)) < 0.65
    assert 0.35 < roc_auc_score(truth, colours[:, 0] - colours[:, 2]) < 0.65


def test_the_same_look_has_another_meaning_in_the_other_subset():
    """Colours before weather: highway road looks like a pavement in town, highway shoulder like the road."""

    def colours(layout, name):
        scenes = [SUBSETS[layout](np.random.default_rng(seed)) for seed in range(40)]
        strips = [strip for scene in scenes for strip in scene.strips if strip.paint == ID[name]]
        return np.median([strip.colour for strip in strips], axis=0)

    def distance(highway, urban):
        return np.abs(colours("highway", highway) - colours("urban", urban)).mean()

    assert distance("RD normal street", "Sidewalk") < 0.5 * distance("RD normal street", "RD normal street")
    assert distance("Non-drivable street", "RD normal street") < 20
    assert distance("Non-drivable street", "Non-drivable street") > 60


def test_image_and_label_show_the_same_shapes():
    """A pixel all of whose subpixels have a thing's colour has its label, one without any has not."""
    canvas = Canvas((96, 144), PLAIN, camera_x=0.2, camera_z=3.0, curvature=0.002, horizon=0.45)
    noise = np.zeros((256, 256), np.float32)
    canvas.sky(noise)
    canvas.ground([Strip(1.0, 33, (0, 0, 0), 0), Strip(np.inf, 28, (60, 60, 60), 0)],
                  [Line(-1.0, 0.4, 11, (250, 250, 250))], noise)  # fmt: skip
    canvas.face(-2.0, 20.0, 3.0, 0.5, 4.0, (20, 0, 0), 3)
    canvas.flank(4.0, 0.0, 30.0, 0.0, 2.0, (0, 20, 0), 35)
    canvas.disc(2.0, 3.0, 25.0, 1.5, (0, 0, 20), 26)
    canvas.polygon(((-6, 0), (-4, 0), (-5, 5)), 15.0, (20, 20, 0), 6)
    painted = {33: (0, 0, 0), 28: (60, 60, 60), 11: (250, 250, 250), 3: (20, 0, 0), 35: (0, 20, 0),
               26: (0, 0, 20), 6: (20, 20, 0), 34: (200, 200, 200)}  # fmt: skip
    _, labels = canvas.finish(np.random.default_rng(0), noise)
    blocks = canvas.image.reshape(96, SUPERSAMPLE, 144, SUPERSAMPLE, 3)
    for class_id, colour in painted.items():
        same = (blocks == np.uint8(colour)).all(-1)  # [96, S, 144, S]
        inside, outside = same.all((1, 3)), ~same.any((1, 3))
        assert inside.sum() > 30
        assert (labels[inside] == class_id).all() and (labels[outside] != class_id).all()


def test_a_point_on_the_road_is_where_the_ground_paints_it():
    """The line is painted pixel by pixel from the inverse of the projection that places things."""
    canvas = Canvas((96, 144), PLAIN, camera_x=-0.3, camera_z=7.0, curvature=0.004, horizon=0.4)
    canvas.sky(noise_texture())
    canvas.ground([Strip(np.inf, 33, (0, 0, 0), 0)], [Line(1.5, 0.5, 11, (255, 255, 255))], noise_texture())
    for distance in (5, 9, 14):
        column, row = canvas.pixel(1.5, 0.0, 7.0 + distance)
        painted = np.flatnonzero(canvas.labels[int(row)] == 11)
        assert abs(painted.mean() + 0.5 - column) < 1.5
        assert abs(len(painted) - 0.5 * canvas.scale(7.0 + distance)) < 3


def test_stamped_folder_is_used_as_it_is_and_other_parameters_replace_it(tmp_path):
    root = tmp_path / "deep" / "data"
    first = roadscenes(root=str(root), **SMALL)
    inode = first.frames[0].image.stat().st_ino
    assert roadscenes(root=str(root), **SMALL).frames[0].image.stat().st_ino == inode
    changed = roadscenes(root=str(root), **{**SMALL, "train": 1})
    assert changed.counts["highway", "train"] == 1 and changed.frames[0].image.stat().st_ino != inode
    assert len(list(root.glob("20000101_*"))) == 1
    assert sorted(path.name for path in root.parent.iterdir()) == ["data"]


@pytest.mark.parametrize("theirs", ["holiday.jpg", "20200101_120000", "roadscenes.json"])
def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path, theirs):
    (tmp_path / theirs).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"data\.root.*{theirs}"):
        roadscenes(root=str(tmp_path), **SMALL)
    assert contents(tmp_path) == {theirs: b'{"mine": 1}'}


def test_own_folder_with_a_strange_file_is_not_replaced(tmp_path):
    root = tmp_path / "data"
    roadscenes(root=str(root), **SMALL)
    (root / "notes.txt").write_text("mine")
    before = contents(root)
    with pytest.raises(UserError, match="notes.txt"):
        roadscenes(root=str(root), **SMALL, seed=1)
    assert contents(root) == before
    assert (
        len(roadscenes(root=str(root), **SMALL).frames)
        == len(roadscenes(root=str(root), **SMALL).frames)
        == 57
    )


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match=r"data\.root"):
        roadscenes(root=str(tmp_path / "data"), **SMALL)


def test_full_disk_leaves_the_old_data_set_and_nothing_else(tmp_path, monkeypatch):
    root = tmp_path / "data"
    roadscenes(root=str(root), **SMALL)
    before = contents(root)

    def full(job, folder):
        (folder / "half").write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.SceneJob, "write", full)
    with pytest.raises(UserError, match=r"data\.root.*No space left"):
        roadscenes(root=str(root), **SMALL, seed=1)
    assert contents(root) == before and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_yaml_keys_and_defaults_are_bound():
    bound = component("dataloaders:DATASETS", "roadscenes", root="x", train=8)
    assert bound.args["size"] == (128, 192) and bound.args["train"] == 8 and bound.args["seed"] == 0


def test_contact_sheet_shows_three_columns(tmp_path):
    assert main([str(tmp_path / "sheet.png"), "--rows", "1", "--size", "32", "48"]) == 0
    sheet = read_image(tmp_path / "sheet.png")
    assert sheet.shape == (2 * 32, 3 * 48, 3)
    assert (sheet[:32, :48] == next(SceneJob(0, (32, 48), "highway", "test", 0, 1).paint())[0]).all()
    with pytest.raises(UserError, match="cannot be written"):
        main([str(tmp_path / "missing" / "sheet.png"), "--rows", "1", "--size", "32", "48"])
