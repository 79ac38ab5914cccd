"""Trains one of the two example nets on Fashion-MNIST and writes it as a float32 ONNX file.

Not a model zoo: two small nets, one fixed recipe, one seed. The epoch count is fixed beforehand and the last
state is exported; no accuracy, on whatever images, picks an epoch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

try:
    import dataset
    import onnx
    import torch
    from evaluate import top1
    from nets import RECIPES
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor, nn
except ImportError as e:
    sys.exit(f"train: {e.name} is missing. Install the extra: pip install 'edgeward[example]'")

BATCH = 128
PEAK_RATE = 0.1
WEIGHT_DECAY = 2e-4
SHIFT_PIXELS = 2
OPSET = 17


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of [N, 1, H, W] mirrored with probability 1/2 and shifted by up to SHIFT_PIXELS in x and y."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    padded = nn.functional.pad(images, [SHIFT_PIXELS] * 4)
    offsets = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, count, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.arange(width)
    picked = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return picked[:, None]


class Training:
    """One run: SGD with Nesterov momentum under a OneCycle rate, cross-entropy, whole batches only."""

    def __init__(self, net: nn.Module, examples: dataset.Examples, epochs: int, seed: int) -> None:
        # A quarter faster on a CPU than the default order; torch's stubs lack this overload.
        self.net: nn.Module = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images = torch.from_numpy(dataset.as_input(examples.pixels))
        self.labels = torch.from_numpy(examples.labels)
        self.batches = len(self.labels) // BATCH
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=PEAK_RATE, total_steps=epochs * self.batches, pct_start=0.2
        )

    def epoch(self, progress: Progress, epoch: int) -> float:
        """One pass over the images. Returns the mean loss over its batches."""
        self.net.train()
        order = torch.randperm(len(self.labels), generator=self.generator)
        batches = order[: self.batches * BATCH].view(self.batches, BATCH)
        task = progress.add_task(f"epoch {epoch}", total=self.batches)
        loss_sum = 0.0
        for rows in batches:
            loss_sum += self._step(rows)
            progress.advance(task)
        progress.remove_task(task)
        return loss_sum / self.batches

    def _step(self, rows: Tensor) -> float:
        images = augment(self.images[rows], self.generator).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(self.net(images), self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def export(net: nn.Module, path: Path) -> None:
    """Writes `net` as ONNX, from `image` to `logits`, with its weights inside and BatchNorm folded."""
    net.eval()
    example = torch.zeros(1, 1, 28, 28)
    with warnings.catch_warnings():
        # The older, TorchScript exporter is chosen on purpose: one node per layer, nothing left over, and it
        # needs no further package. Torch warns that it is no longer the default.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net,
            (example,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path), full_check=True)


def train(arguments: argparse.Namespace, console: Console) -> Path:
    """Trains, exports and measures the exported file. Returns its path."""
    recipe = RECIPES[arguments.net]
    epochs = recipe.epochs if arguments.epochs is None else arguments.epochs
    train_part = dataset.read_train_part(arguments.data)
    test_part = dataset.read_test_part(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path: Path = arguments.output / recipe.file_name

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    net = recipe.build()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    console.print(f"{arguments.net}: {parameters:,} parameters with BatchNorm, {epochs} epochs")
    training = Training(net, dataset.to_train_on(train_part), epochs, arguments.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for epoch in range(1, epochs + 1):
            console.print(f"epoch {epoch:>2}/{epochs}  loss {training.epoch(progress, epoch):.4f}")
    export(net, path)
    for name, examples in (("held-out", dataset.held_out(train_part)), ("test", test_part)):
        console.print(f"top-1 on the {len(examples):,} {name} images: {top1(path, examples):.4f}")
    console.print(f"written: {path}")
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--net", required=True, choices=sorted(RECIPES), help="which net to train")
    default_epochs = ", ".join(f"{name} {recipe.epochs}" for name, recipe in RECIPES.items())
    parser.add_argument(
        "--epochs",
        type=_positive,
        metavar="N",
        help=f"passes over the training images (default: {default_epochs})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=dataset.DEBIAN_FOLDER,
        metavar="DIR",
        help="folder with the four *-ubyte.gz files (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=here,
        metavar="DIR",
        help="where the .onnx file goes (default: beside this script)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=20261123,
        metavar="N",
        help="of weights, order and augmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="CPU threads; another count rounds otherwise and gives other weights (default: %(default)s)",
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    try:
        train(arguments, console)
    except (dataset.DatasetUnreadable, OSError) as e:
        sys.exit(f"train: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
