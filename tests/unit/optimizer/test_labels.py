"""Labels in a plot do not lie on anything."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from optimizer.labels import Box, Point, place

FRAME = Box(0, 0, 700, 400)
points = st.builds(
    Point,
    x=st.floats(50, 650),
    y=st.floats(30, 370),
    radius=st.floats(3, 20),
    width=st.just(120.0),
    height=st.just(14.0),
)


@given(st.lists(points, min_size=1, max_size=6))
def test_labels_keep_clear_of_each_other_and_of_all_discs(found: list[Point]) -> None:
    boxes = place(found, FRAME)
    assert len(boxes) == len(found)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(point.box) for box in boxes for point in found)
    assert all(box.within(FRAME) for box in boxes)


def test_the_nearest_free_side_is_taken() -> None:
    alone = Point(300, 200, 10, 100, 14)
    (right,) = place([alone], FRAME)
    assert right.x0 > 310
    (left,) = place([alone], FRAME, [Box(310, 190, 400, 210)])
    assert left.x1 < 290


def test_a_label_is_never_missing() -> None:
    crowded = [Point(20, 20, 30, 500, 300)] * 3
    assert len(place(crowded, Box(0, 0, 40, 40))) == 3
