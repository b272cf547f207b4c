"""A list of records in one array."""

from __future__ import annotations

import pickle

import pytest

from zenith_det.data import SerializedList


def test_is_a_sequence() -> None:
    items = [{"image_id": i, "annotations": [{"bbox": [0.5, i, 1, 2]}] * i} for i in range(20)]
    packed = SerializedList(iter(items))
    assert len(packed) == 20
    assert list(packed) == items
    assert packed[-1] == items[-1]
    assert packed[3:6] == items[3:6]
    assert items[7] in packed
    for index in (20, -21):
        with pytest.raises(IndexError, match=str(index)):
            packed[index]
    assert list(pickle.loads(pickle.dumps(packed))) == items
    assert packed.nbytes < 20 * 1000


def test_empty() -> None:
    assert list(SerializedList([])) == []


def test_items_are_copies() -> None:
    packed = SerializedList([{"a": [1]}])
    packed[0]["a"].append(2)
    assert packed[0] == {"a": [1]}
