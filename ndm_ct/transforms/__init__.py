"""Forward transforms: learned ones, fixed ones, and the maps between data and latents; and the scale of the noise."""

from ndm_ct.transforms.base import Composed, Identity, Path, Transform
from ndm_ct.transforms.bases import DCT, Basis, Haar, Rotation
from ndm_ct.transforms.fixed import Blur, Subspaces, TimeScaling
from ndm_ct.transforms.latent import Encoder, Flow
from ndm_ct.transforms.learned import DataEncoder, Neural, PolynomialBasis, Separable
from ndm_ct.transforms.noise import NeuralScale, NoiseScale
from ndm_ct.transforms.scaling import LearnedScaling, PolynomialLogSNR
from ndm_ct.transforms.standard import Clusters, Whitening

__all__ = [
    "DCT", "Basis", "Blur", "Clusters", "Composed", "DataEncoder", "Encoder", "Flow", "Haar", "Identity",
    "LearnedScaling", "Neural", "NeuralScale", "NoiseScale", "Path", "PolynomialBasis", "PolynomialLogSNR", "Rotation",
    "Separable", "Subspaces", "TimeScaling", "Transform", "Whitening",
]  # fmt: skip
