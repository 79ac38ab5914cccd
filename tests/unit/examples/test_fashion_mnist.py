"""The committed example: nets as good as their README says, splits that do not overlap, honest faults."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

EXAMPLE = Path(__file__).parents[3] / "examples" / "fashion_mnist"
DEBIAN_DATA = Path("/usr/share/datasets/fashion-mnist")
NETS = ("resnet8", "mobilenet")
SPLITS = {"calibration": 256, "selection": 1000, "test": 2000}

Arrays = dict[str, npt.NDArray[Any]]


def split(name: str, folder: Path = EXAMPLE) -> Arrays:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


def decide(model: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    return np.asarray(np.asarray(logits).argmax(axis=1), np.int64)


def top1(model: Path) -> float:
    test = split("test")
    return float(np.mean(decide(model, test["image"]) == test["label"]))


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str(EXAMPLE / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def numbered_images(first: int, count: int) -> npt.NDArray[np.uint8]:
    """Images that carry their own number in their first four pixels."""
    images = np.zeros((count, 28, 28), np.uint8)
    numbers = np.arange(first, first + count, dtype=">u4")
    images.reshape(count, -1)[:, :4] = numbers.view(np.uint8).reshape(count, 4)
    return images


def numbers_of(images: npt.NDArray[np.float32]) -> list[int]:
    heads = np.rint(images.reshape(len(images), -1)[:, :4] * 255).astype(np.uint8)
    return [int.from_bytes(head.tobytes(), "big") for head in heads]


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    """3,000 training and 2,500 test images, numbered from 0 and from 100,000; labels go round."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, first, count in (("train", 0, 3000), ("t10k", 100_000, 2500)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", numbered_images(first, count))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


@pytest.mark.parametrize(("net", "least"), [("resnet8", 0.920), ("mobilenet", 0.905)])
def test_the_committed_net_is_accurate(net: str, least: float) -> None:
    assert top1(EXAMPLE / f"{net}.onnx") >= least


@pytest.mark.parametrize(("net", "parameters"), [("resnet8", 77_418), ("mobilenet", 18_346)])
def test_the_committed_net_has_the_size_the_readme_gives(net: str, parameters: int) -> None:
    model = onnx.load(EXAMPLE / f"{net}.onnx", load_external_data=False)
    counted = sum(numpy_helper.to_array(weight).size for weight in model.graph.initializer)
    assert counted == parameters
    assert f"{parameters:,}" in (EXAMPLE / "README.md").read_text("utf-8")


@pytest.mark.parametrize("net", NETS)
def test_the_committed_net_keeps_the_tensor_contract(net: str) -> None:
    model = onnx.load(EXAMPLE / f"{net}.onnx")
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 1, 28, 28])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("logits", "tensor(float)", ["batch", 10])
    ]
    assert [entry.version for entry in model.opset_import] == [17]


@pytest.mark.parametrize("net", NETS)
def test_a_batch_decides_as_its_images_do_one_by_one(net: str) -> None:
    images = split("test")["image"][:32]
    alone = [int(decide(EXAMPLE / f"{net}.onnx", images[row : row + 1])[0]) for row in range(32)]
    assert decide(EXAMPLE / f"{net}.onnx", images).tolist() == alone


@pytest.mark.parametrize(("name", "count"), SPLITS.items())
def test_a_split_fits_the_nets_input(name: str, count: int) -> None:
    arrays = split(name)
    assert set(arrays) == {"image", "label"}
    assert arrays["image"].dtype == np.float32
    assert arrays["image"].shape == (count, 1, 28, 28)
    assert (float(arrays["image"].min()), float(arrays["image"].max())) == (0.0, 1.0)
    assert arrays["label"].dtype == np.int64
    assert arrays["label"].shape == (count,)
    assert set(arrays["label"].tolist()) == set(range(10))


@pytest.mark.parametrize(("name", "per_class"), [("selection", 100), ("test", 200)])
def test_the_judging_splits_are_balanced(name: str, per_class: int) -> None:
    assert np.bincount(split(name)["label"]).tolist() == [per_class] * 10


def test_no_image_is_in_two_splits_or_twice_in_one() -> None:
    images = [image.tobytes() for name in SPLITS for image in split(name)["image"]]
    assert len(set(images)) == len(images) == sum(SPLITS.values())


def test_the_committed_files_stay_small() -> None:
    committed = [*(f"{net}.onnx" for net in NETS), *(f"{name}.npz" for name in SPLITS)]
    assert sum((EXAMPLE / name).stat().st_size for name in committed) <= 4_000_000


def test_splits_repeat_to_the_byte(small_dataset: Path, tmp_path: Path) -> None:
    for run in ("first", "second"):
        done = script("splits.py", "--data", small_dataset, "--output", tmp_path / run)
        assert done.returncode == 0, done.stderr
    for name in SPLITS:
        first, second = (tmp_path / run / f"{name}.npz" for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_splits_take_held_out_training_images_and_test_images_only(
    small_dataset: Path, tmp_path: Path
) -> None:
    done = script("splits.py", "--data", small_dataset, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {name: split(name, tmp_path) for name in SPLITS}
    numbers = {name: numbers_of(arrays["image"]) for name, arrays in made.items()}
    # The last 2,000 of the 3,000 training images are held out.
    assert all(1000 <= number < 3000 for number in numbers["calibration"] + numbers["selection"])
    assert all(100_000 <= number < 102_500 for number in numbers["test"])
    for name, arrays in made.items():
        assert [number % 10 for number in numbers[name]] == arrays["label"].tolist()


def test_what_is_trained_on_leaves_the_held_out_images_alone(small_dataset: Path) -> None:
    """The other half of the rule: `train.py` learns from what `dataset.to_train_on` gives."""
    code = (
        "import sys; from pathlib import Path; import dataset;"
        "part = dataset.to_train_on(dataset.read_train_part(Path(sys.argv[1])));"
        "print(len(part), int.from_bytes(part.pixels[-1].tobytes()[:4], 'big'))"
    )
    command = [sys.executable, "-B", "-c", code, str(small_dataset)]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1000", "999"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
        (lambda path: path.write_bytes(b"not gzip"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(bytes(100))), "is not an idx file"),
        (lambda path: write_idx(path, np.zeros((3, 28, 28), np.uint8)), "labels"),
    ],
)
def test_a_damaged_dataset_is_named_without_a_traceback(
    small_dataset: Path, tmp_path: Path, damage: Any, complaint: str
) -> None:
    damage(small_dataset / "t10k-images-idx3-ubyte.gz")
    done = script("splits.py", "--data", small_dataset, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


if DEBIAN_DATA.is_dir():

    def test_the_committed_splits_come_from_the_debian_package(tmp_path: Path) -> None:
        """Content, not bytes: another zlib may compress otherwise."""
        done = script("splits.py", "--output", tmp_path)
        assert done.returncode == 0, done.stderr
        for name in SPLITS:
            made, committed = split(name, tmp_path), split(name)
            assert np.array_equal(made["image"], committed["image"])
            assert np.array_equal(made["label"], committed["label"])


@pytest.mark.parametrize("net", NETS)
def test_the_one_class_fault_decides_almost_always_the_same(net: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    done = script("make_broken.py", EXAMPLE / f"{net}.onnx", broken)
    assert done.returncode == 0, done.stderr
    shares = np.bincount(decide(broken, split("test")["image"]), minlength=10) / SPLITS["test"]
    assert shares.max() >= 0.99
    assert top1(broken) <= 0.12


def test_the_shuffled_fault_is_wrong_but_keeps_the_shares(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    done = script("make_broken.py", EXAMPLE / "resnet8.onnx", broken, "--fault", "shuffled")
    assert done.returncode == 0, done.stderr
    images = split("test")["image"]
    assert top1(broken) <= 0.10
    assert decide(broken, images).tolist() == ((decide(EXAMPLE / "resnet8.onnx", images) + 1) % 10).tolist()


@pytest.mark.parametrize("fault", ["one-class", "shuffled"])
def test_a_broken_copy_has_the_same_work_to_do(fault: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    done = script("make_broken.py", EXAMPLE / "mobilenet.onnx", broken, "--fault", fault)
    assert done.returncode == 0, done.stderr
    before, after = onnx.load(EXAMPLE / "mobilenet.onnx"), onnx.load(broken)
    assert list(after.graph.node) == list(before.graph.node)
    assert [(w.name, w.dims) for w in after.graph.initializer] == [
        (w.name, w.dims) for w in before.graph.initializer
    ]


def matmul_model(path: Path, weight_is_stored: bool) -> None:
    """A float MatMul classifier, [1, 4] → [1, 3]; its weight is stored or computed."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3) / 10, "w")
    nodes = [onnx.helper.make_node("MatMul", ["x", "w" if weight_is_stored else "w2"], ["y"])]
    if not weight_is_stored:
        nodes.insert(0, onnx.helper.make_node("Identity", ["w"], ["w2"]))
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])]
    graph = onnx.helper.make_graph(nodes, "classifier", inputs, outputs, [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)


def test_a_matmul_classifier_is_broken_along_its_class_axis(tmp_path: Path) -> None:
    matmul_model(tmp_path / "model.onnx", weight_is_stored=True)
    done = script("make_broken.py", tmp_path / "model.onnx", tmp_path / "broken.onnx")
    assert done.returncode == 0, done.stderr
    (weight,) = onnx.load(tmp_path / "broken.onnx").graph.initializer
    array = numpy_helper.to_array(weight)
    assert array.shape == (4, 3)
    assert array[:, 0].tolist() == array[:, 2].tolist()  # class 2 had the largest weight of every feature


def test_a_model_with_a_computed_classifier_is_refused(tmp_path: Path) -> None:
    matmul_model(tmp_path / "model.onnx", weight_is_stored=False)
    done = script("make_broken.py", tmp_path / "model.onnx", tmp_path / "broken.onnx")
    assert done.returncode == 1
    assert "'w2'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "broken.onnx").exists()


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    done = script("make_broken.py", EXAMPLE / "dataset.py", tmp_path / "broken.onnx")
    assert done.returncode == 1
    assert "dataset.py" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "broken.onnx").exists()


@pytest.mark.parametrize("name", ["splits.py", "make_broken.py", "evaluate.py"])
def test_help_names_its_arguments(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name}")
