import numpy as np
import pytest
from PIL import Image
from trees import save, solid

from dataloaders.masks import id_table, ranges, read_id_mask
from engine.config import UserError

TABLE = id_table({0: 0, 5: 1, 6: 255})


def test_ids_go_through_the_table(tmp_path):
    path = save(tmp_path / "mask.png", np.array([[0, 5, 6, 255]], dtype=np.uint8))
    ids, unknown = read_id_mask(path, TABLE)
    assert ids.dtype == np.uint8 and ids.tolist() == [[0, 1, 255, 255]] and unknown == 0


def test_a_mask_with_a_palette_gives_its_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 5]], dtype=np.uint8), mode="P")
    picture.putpalette([200, 0, 0] * 256)
    picture.save(tmp_path / "mask.png")
    assert read_id_mask(tmp_path / "mask.png", TABLE)[0].tolist() == [[0, 1]]


def test_what_is_no_mask_is_refused_by_name(tmp_path):
    colours = save(tmp_path / "colours.png", solid((2, 2), (0, 0, 0)))
    with pytest.raises(UserError, match=r"colours\.png: a label must hold class ids in one channel.* RGB"):
        read_id_mask(colours, TABLE)
    wide = save(tmp_path / "wide.png", np.array([[0, 300]], dtype=np.uint16))
    with pytest.raises(UserError, match=r"wide\.png: label value 300 \(1 pixels\); allowed: 0, 5..6, 255"):
        read_id_mask(wide, TABLE)
    whole = save(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 2, (60, 60), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.png: cannot be decoded"):
        read_id_mask(whole, TABLE)
    with pytest.raises(UserError, match=r"none\.png: cannot be read"):
        read_id_mask(tmp_path / "none.png", TABLE)


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0..2, 5, 7..8"
