import json

import pytest

from dataloaders.manifest import Manifest, read_classes
from engine.config import UserError

CLASSES = [
    {"id": 4, "name": "car", "color": [0, 0, 9]},
    {"id": 2, "name": "road", "color": [9, 9, 9], "ignore": False},
    {"id": 3, "name": "void", "color": [0, 0, 0], "ignore": True},
]


def test_classes_are_numbered_in_the_order_of_their_ids(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(CLASSES))
    assert read_classes(path) == (("road", "car"), ((9, 9, 9), (0, 0, 9)), {2: 0, 3: 255, 4: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 255}, '"id": 255.*is no class; expected'),
        ({"id": True}, "is no class"),
        ({"color": [0, 0, 256]}, "is no class"),
        ({"color": [0, 0]}, "is no class"),
        ({"name": None}, "is no class"),
        ({"ignore": "no"}, "is no class"),
        ({"id": 2}, "the id 2 is used twice"),
        ({"name": "road"}, "the name 'road' is used twice"),
    ],
)
def test_a_wrong_class_is_shown(tmp_path, change, message):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{**CLASSES[0], **change}, *CLASSES[1:]]))
    with pytest.raises(UserError, match=rf"classes\.json: .*{message}|classes\.json: {message}"):
        read_classes(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps(CLASSES[2:])])
def test_a_file_without_classes_is_refused(tmp_path, text):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        read_classes(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,subset\n", "holds no frames"),
        ("name,subset\na,b,c\n", ":2: this row"),
        ("name,subset\na,b\nc\n", ":3: this row"),
    ],
)
def test_a_ragged_or_empty_table_is_refused(tmp_path, text, message):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"m\.csv:? ?{message}"):
        Manifest(path)


def test_columns_are_stripped_and_lines_counted(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("\ufeffname,subset\n a , x\nb,\n", encoding="utf-8")
    rows = Manifest(path)
    assert rows.column("name") == ["a", "b"]
    assert rows.column("subset", empty=True) == ["x", ""]
    assert rows.line(1) == f"{path}:3"
    with pytest.raises(UserError, match=r"m\.csv:3: the column 'subset' is empty"):
        rows.column("subset")
