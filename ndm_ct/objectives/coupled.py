r"""Couplings: which draw of the prior belongs to which x, in place of drawing the two independently.

.. math::
    z_t = \alpha_t F(x, t) + \sigma_t \epsilon, \qquad (x, \epsilon) \sim \pi, \quad
    \pi \text{ with the marginals } p(x) \text{ and } p_1 ,

where the schedule has :math:`\alpha(1) = 0, \sigma(1) = 1`, so that :math:`z_1 = \epsilon`. The mean velocity
:math:`E[\dot z \mid z]` generates p(x) from :math:`p_1` for every coupling. Optimal transport of each batch,

.. math::
    \min_\pi \sum_{ij} \pi_{ij} \|x_i - \epsilon_j\|^2
    \qquad\text{or}\qquad \min_\pi \sum_{ij} \pi_{ij} \|x_i - \epsilon_j\|^2 + \lambda \pi_{ij} \log \pi_{ij} ,

makes paths straighter: without ambiguity between pairs, the flow follows the straight lines of the pairs. With a data
set as the prior (:class:`ndm_ct.prior.DataPrior`) the flow is a bridge between two data sets.

Warning:
    Noise and data are dependent, so the score and the reverse SDE that the model computes from its prediction are not
    those of :math:`p_t`, and there is no bound. Its probability flow is right: ``loglik`` (for a prior with a density),
    ``encode``, ``decode`` and ``sample`` with methods of the flow.

References:
    Tong et al., Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport,
    https://arxiv.org/abs/2302.00482
    Pooladian et al., Multisample Flow Matching, https://arxiv.org/abs/2304.14772
    Flamary et al., POT: Python Optimal Transport, https://pythonot.github.io
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, choose, validate_positive
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.noise import GeneratorLike, Randomness, as_randomness, uniform, validate_single
from ndm_ct.model import NDM
from ndm_ct.objectives.regression import Regression

__all__ = ["COUPLINGS", "Coupled", "couple"]

COUPLINGS = ("exact", "entropic", "independent")
"""Names of couplings."""

_REGULARISATION = 0.05


def couple(
    x: Tensor, source: Tensor, /, coupling: str = "exact", *, regularisation: float | None = None,
    generator: GeneratorLike = None,
) -> Tensor:  # fmt: skip
    r"""The row of ``source`` that belongs to each row of ``x``.

    Args:
        x: shape ``(B, ...)``.
        source: as many rows of the same shape.
        coupling: "exact" is a permutation, the optimal one for the squared distance; "entropic" draws the partner of
            each row from the entropic plan, so that rows of ``source`` may be taken twice or not at all; "independent"
            leaves the order as it is.
        regularisation: :math:`\lambda` of "entropic", relative to the mean squared distance; None is 0.05.
        generator: source of the draws of "entropic": a seed or a generator.

    Returns:
        Numbers of rows, int64, ``(B,)``.

    Raises:
        ImportError: POT is missing.
        ValueError: unknown coupling; tensors of different shapes; a regularisation without effect.

    Example:
        >>> import torch
        >>> couple(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]]), "independent")
        tensor([0, 1])
    """
    _validate(coupling, regularisation)
    if x.shape != source.shape:
        raise ValueError(f"x {tuple(x.shape)} and source {tuple(source.shape)} must have one shape.")
    rows = len(x)
    if coupling == "independent" or rows < 2:
        return torch.arange(rows, device=x.device)
    ot = _pot()
    cost = torch.cdist(x.detach().flatten(1).double(), source.detach().flatten(1).double()).square()
    weights = torch.full((rows,), 1.0 / rows, dtype=torch.float64).numpy()
    matrix = cost.cpu().numpy()
    if coupling == "exact":
        plan = torch.from_numpy(ot.emd(weights, weights, matrix))
        return plan.argmax(1).to(x.device)
    strength = (_REGULARISATION if regularisation is None else regularisation) * float(cost.mean())
    plan = torch.from_numpy(ot.sinkhorn(weights, weights, matrix, strength, method="sinkhorn_log", warn=False))
    chosen = as_randomness(generator, rows, x.device, "couple")
    chosen = validate_single(chosen, "the rows of a coupling depend on each other")
    draws = uniform((rows, 1), chosen, torch.float64, x.device).cpu()
    shares = plan.cumsum(1)
    return torch.searchsorted(shares, draws * shares[:, -1:]).flatten().clamp(max=rows - 1).to(x.device)


@dataclass(frozen=True)
class Coupled(Regression):
    r"""A regression (:class:`Regression`) whose noise is drawn from the model's prior and coupled with the data.

    Args:
        target: as of :class:`Regression`.
        weight: as of :class:`Regression`.
        times: as of :class:`Regression`.
        coupling: one of ``COUPLINGS``, see :func:`couple`.
        regularisation: of "entropic"; None is 0.05.
        label: name of a conditioning. Rows are then coupled among those with an equal value of it; else the noise of
            one class would not have the prior's law.

    Raises:
        ValueError: an unknown coupling, or a regularisation without effect.

    Example:
        >>> import torch, ndm_ct
        >>> from ndm_ct.schedules import Rectified
        >>> model = ndm_ct.NDM(lambda z, t: -z, (2,), schedule=Rectified(), prediction="velocity", t_min=0.0)
        >>> Coupled("velocity", coupling="independent")(model, torch.zeros(5, 2), generator=0).shape
        torch.Size([5])
    """

    target: str = "velocity"
    coupling: str = "exact"
    regularisation: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _validate(self.coupling, self.regularisation)

    def _noise(self, model: NDM, y: Tensor, generator: Randomness, cond: Conditioning) -> Tensor:
        """Draws of the prior in the order of their partners ``y``, ``(B, *E)``."""
        end = model.schedule(as_time(1.0, model.schedule.device))
        if float(end.alpha) != 0.0 or float(end.sigma) != 1.0 or model.noise_scale is not None:
            raise ValueError(
                "a coupling needs z_1 to be the draw of the prior, alpha(1) = 0 and sigma(1) = 1, without noise_scale; "
                f"{type(model.schedule).__name__} has {float(end.alpha):g} and {float(end.sigma):g}. Take Rectified."
            )
        source = model.sample_prior(len(y), generator=generator, dtype=y.dtype, device=y.device)
        order = torch.arange(len(y), device=y.device)
        for rows in self._groups(len(y), cond, y.device):
            chosen = couple(
                y[rows], source[rows], self.coupling, regularisation=self.regularisation,
                generator=generator if self.coupling == "entropic" else None,
            )  # fmt: skip
            order[rows] = rows[chosen]
        return source[order]

    def _groups(self, rows: int, cond: Conditioning, device: torch.device) -> list[Tensor]:
        every = torch.arange(rows, device=device)
        if self.label is None:
            return [every]
        values = cond.get(self.label)
        if not isinstance(values, Tensor) or len(values) != rows:
            raise ValueError(f"label={self.label!r} names no conditioning with one entry for each of the {rows} rows.")
        _, kinds = values.reshape(rows, -1).unique(dim=0, return_inverse=True)
        return [every[kinds == kind] for kind in kinds.unique()]

    def describe(self) -> str:
        """Its settings, the same in every process, for a checkpoint to compare."""
        own = f"coupling={self.coupling!r}, regularisation={self.regularisation}, label={self.label!r}"
        return f"Coupled({super().describe()}, {own})"


def _validate(coupling: str, regularisation: float | None) -> None:
    choose("coupling", coupling, COUPLINGS)
    if regularisation is not None:
        validate_positive("regularisation", regularisation)
        if coupling != "entropic":
            raise ValueError(f"regularisation has no effect with coupling={coupling!r}; take 'entropic' or drop it.")


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError('couplings by optimal transport need POT: pip install "ndm-ct[transport]".') from error
    return ot
