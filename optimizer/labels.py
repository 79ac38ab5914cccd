"""Pure: where labels go beside the points of a plot so that nothing lies on anything else.

Greedy: each label takes the first free place around its point, near ones first. In pixels, y upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Directions to try, in degrees: beside, above and below, then between them.
_DIRECTIONS = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 70, 290, 110, 250)
_DISTANCES = (4, 10, 18, 28, 40, 56, 76)


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle from (x0, y0) to (x1, y1)."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share an area."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def within(self, other: Box) -> bool:
        """Whether this one lies inside of `other`."""
        return self.x0 >= other.x0 and self.y0 >= other.y0 and self.x1 <= other.x1 and self.y1 <= other.y1


@dataclass(frozen=True, slots=True)
class Point:
    """A disc at (x, y) whose label is `width` by `height`."""

    x: float
    y: float
    radius: float
    width: float
    height: float

    @property
    def box(self) -> Box:
        """The square around the disc."""
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


def place(points: Sequence[Point], frame: Box, obstacles: Sequence[Box] = ()) -> list[Box]:
    """A box for each point's label, in the order of the points.

    Labels avoid all discs, `obstacles`, each other and the edge of `frame`; where no place is free, the
    last one tried is taken, so that a label is never missing.
    """
    taken = [*(point.box for point in points), *obstacles]
    placed = []
    for point in points:
        candidates = list(_around(point))
        free = (b for b in candidates if b.within(frame) and not any(b.overlaps(t) for t in taken))
        box = next(free, candidates[-1])
        placed.append(box)
        taken.append(box)
    return placed


def _around(point: Point) -> Iterator[Box]:
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            angle = math.radians(degrees)
            reach = point.radius + distance
            # The box touches the circle of that reach with the side or corner that faces the point.
            x = point.x + math.cos(angle) * reach + _toward(math.cos(angle)) * point.width / 2
            y = point.y + math.sin(angle) * reach + _toward(math.sin(angle)) * point.height / 2
            yield Box(x - point.width / 2, y - point.height / 2, x + point.width / 2, y + point.height / 2)


def _toward(component: float) -> float:
    """-1, 0 or 1: to which side of the point the box lies along one axis."""
    return 0.0 if abs(component) < 1e-9 else math.copysign(1.0, component)
