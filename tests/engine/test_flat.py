"""Nested mappings by dotted keys, and what differs between two of them."""

from engine.flat import differences, flatten


def test_mappings_are_flattened_and_empty_ones_are_values():
    tree = {"a": {"b": 1, "c": {}}, "d": [{"name": "x", "e": 2}], 3: None}
    assert flatten(tree) == {"a.b": 1, "a.c": {}, "d": [{"name": "x", "e": 2}], "3": None}
    assert flatten({}) == {"": {}}


def test_lists_of_mappings_are_flattened_by_name_or_place_where_asked():
    tree = {"d": [{"name": "x", "e": 2}, {"e": 3}], "plain": [1, {"e": 2}], "none": []}
    flat = {"d.x.name": "x", "d.x.e": 2, "d.1.e": 3, "plain": [1, {"e": 2}], "none": []}
    assert flatten(tree, into_lists=True) == flat


def test_what_differs_stands_in_the_order_of_the_first():
    found = differences({"a": 1, "b": 2, "c": 3}, {"b": 5, "a": 1, "d": 4})
    assert found == [("b", 2, 5), ("c", 3, None), ("d", None, 4)]
    assert differences({"a": None}, {}) == []
