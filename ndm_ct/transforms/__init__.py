"""Forward transforms: learned ones, fixed ones, and the maps between data and latents; and the scale of the noise."""

from ndm_ct.transforms.base import Composed, Identity, Path, Transform
from ndm_ct.transforms.fixed import Blur, Subspaces, TimeScaling
from ndm_ct.transforms.latent import Encoder, Flow
from ndm_ct.transforms.learned import LearnedScaling, Neural, PolynomialBasis, Separable
from ndm_ct.transforms.noise import NeuralScale, NoiseScale

__all__ = [
    "Blur", "Composed", "Encoder", "Flow", "Identity", "LearnedScaling", "Neural", "NeuralScale", "NoiseScale", "Path",
    "PolynomialBasis", "Separable", "Subspaces", "TimeScaling", "Transform",
]  # fmt: skip
