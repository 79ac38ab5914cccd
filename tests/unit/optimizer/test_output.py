"""The output folder: what may be replaced, and that it is replaced whole."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from edge_contract.errors import InputRejected, Reason
from optimizer import output, report
from optimizer.output import check, staged


def fill(folder: Path, mark: str, *, bundle: bool = True) -> None:
    for name in ("candidates", *(["bundle"] if bundle else [])):
        (folder / name).mkdir()
        (folder / name / "file").write_text(mark)
    (folder / "report.json").write_text(json.dumps({"kind": output.KIND, "mark": mark}))
    (folder / "report.html").write_text(mark)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


ALL = {"bundle", "candidates", "report.json", "report.html"}


def test_the_kind_is_that_of_reports() -> None:
    assert get_args(get_type_hints(report.Report)["kind"]) == (output.KIND,)


def test_a_new_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check(folder)
    with staged(folder) as staging:
        fill(staging, "one")
    assert names(folder) == ALL
    assert (folder / "bundle" / "file").read_text() == "one"


def test_an_earlier_output_is_replaced_with_nothing_of_it_left(tmp_path: Path) -> None:
    with staged(tmp_path) as staging:
        fill(staging, "one")
    check(tmp_path)
    with staged(tmp_path) as staging:
        fill(staging, "two")
    assert names(tmp_path) == ALL
    assert {(tmp_path / n / "file").read_text() for n in ("bundle", "candidates")} == {"two"}
    with staged(tmp_path) as staging:
        fill(staging, "three", bundle=False)
    assert names(tmp_path) == ALL - {"bundle"}, "no bundle beside the report of a refusal"


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_everything_as_it_was(existed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if existed:
        with staged(folder) as staging:
            fill(staging, "one")
    with suppress(ZeroDivisionError), staged(folder) as staging:
        fill(staging, "two")
        _ = 1 / 0
    assert folder.exists() == existed
    if existed:
        assert names(folder) == ALL
        assert (folder / "bundle" / "file").read_text() == "one"


def test_the_bundle_comes_last_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename, the folder holds a whole bundle of one run or none."""
    with staged(tmp_path) as staging:
        fill(staging, "one")
    states: list[tuple[str | None, str]] = []

    def look() -> None:
        found = tmp_path / "bundle" / "file"
        mark = json.loads((tmp_path / "report.json").read_text())["mark"]
        states.append((found.read_text() if found.exists() else None, mark))

    for method in ("rename", "replace"):
        real = getattr(Path, method)

        def watched(self: Path, target: Path, real: object = real) -> object:
            result = real(self, target)  # type: ignore[operator]
            look()
            return result

        monkeypatch.setattr(Path, method, watched)
    with staged(tmp_path) as staging:
        fill(staging, "two")
    assert states[-1] == ("two", "two")
    assert set(states) == {(None, "one"), (None, "two"), ("two", "two")}


def test_what_a_killed_run_left_behind_goes(tmp_path: Path) -> None:
    (tmp_path / ".staging-old").mkdir()
    (tmp_path / ".staging-old" / "file").write_text("rest")
    check(tmp_path)
    with staged(tmp_path) as staging:
        fill(staging, "one")
    assert names(tmp_path) == ALL


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f.write_text("a file"), "is a file"),
        (
            lambda f: (f.mkdir(), (f / "photo.jpg").touch()),
            "holds 'photo.jpg', which edge-optimize did not write",
        ),
        (lambda f: (f.mkdir(), (f / "bundle").mkdir()), "has no report.json of edge-optimize"),
        (lambda f: (f.mkdir(), (f / "report.json").write_text("{}")), "has no report.json of edge-optimize"),
        (lambda f: (f.mkdir(), (f / "report.json").write_text("{")), "has no report.json of edge-optimize"),
        (lambda f: (f.mkdir(), (f / "report.json").write_text("[1]")), "has no report.json of edge-optimize"),
    ],
)
def test_what_others_wrote_is_never_touched(make: object, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(folder)  # type: ignore[operator]
    with pytest.raises(InputRejected) as caught:
        check(folder)
    assert caught.value.reason is Reason.BAD_INPUT
    assert f"{folder} {words}" in caught.value.what
