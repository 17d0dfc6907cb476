r"""Published models of few steps, as flow maps (:mod:`ndm_ct.flow_maps`); see :mod:`ndm_ct.presets`."""

import copy
from typing import Any

from torch import nn

from ndm_ct import schedules
from ndm_ct._core.config import Unconfigurable, from_config, to_config
from ndm_ct.model import NDM
from ndm_ct.nn import Preconditioned
from ndm_ct.objectives.distillation import Distillation
from ndm_ct.presets.published import Preset, Shape

__all__ = ["consistency_trajectory", "mean_flow", "progressive_distillation"]


def progressive_distillation(teacher: NDM, net: nn.Module | None = None, *, steps: int) -> Preset:
    r"""One round of progressive distillation: a map of N steps learns what its teacher does in 2N.

    Rounds are repeated with the map of the last round as the teacher:

    .. code-block:: python

        for steps in (16, 8, 4, 2, 1):
            model, objective, method = ndm_ct.presets.progressive_distillation(teacher, steps=steps)
            ndm_ct.fit(model, data, steps=1000, objective=objective)
            teacher = model
        x = ndm_ct.sample(model, 64, method=method, steps=1)

    Args:
        teacher: a trained model, any NDM or the map of a round before. It stays as it is.
        net: what predicts x of the map, a network that takes ``until``, such as ``Preconditioned(MLP(2, until=True))``.
            None starts from the teacher's network, weights included, if that is one of this library whose F does not
            move with time.
        steps: N; ``sample(method="map", steps=N)`` takes these steps.

    Raises:
        ValueError: ``net`` is missing where the teacher's network cannot be taken; the transform both moves and maps to
            latents.

    References:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models,
        https://arxiv.org/abs/2202.00512
    """
    return Preset(_student(teacher, net), Distillation("progressive", teacher, steps), "map")


def consistency_trajectory(teacher: NDM, net: nn.Module | None = None, *, steps: int = 16) -> Preset:
    r"""A consistency trajectory model: a map from any time to any earlier one, in one round.

    Args:
        teacher: a trained model. It stays as it is.
        net: as of :func:`progressive_distillation`.
        steps: N, where 1/N of the interval is the step by which the teacher goes ahead of the map.

    Raises:
        ValueError: as of :func:`progressive_distillation`.

    References:
        Kim et al., Consistency Trajectory Models, https://arxiv.org/abs/2310.02279
    """
    return Preset(_student(teacher, net), Distillation("consistency", teacher, steps), "map")


def mean_flow(net: nn.Module, event_shape: Shape, *, data_std: float = 1.0, power: float = 0.0) -> Preset:
    r"""MeanFlow: a map that learns from data alone, :math:`\alpha = 1 - t, \sigma = t`.

    Args:
        net: a raw network that takes ``until``, scaled to predict x.
        event_shape: shape of one event.
        data_std: standard deviation of the data.
        power: p of :class:`~ndm_ct.objectives.Distillation`; the paper takes 1 for images.

    References:
        Geng et al., Mean Flows for One-step Generative Modeling, https://arxiv.org/abs/2505.13447
    """
    model = NDM(Preconditioned(net, data_std=data_std), event_shape, schedule=schedules.Rectified())
    return Preset(model, Distillation("mean_flow", equal=0.75, power=power), "map")


def _student(teacher: NDM, net: nn.Module | None) -> NDM:
    """A map of the teacher's process, of its latents if it has some."""
    ordinary = teacher.process.ordinary
    if teacher.transform.latent and not ordinary:
        raise ValueError(
            f"the teacher's transform, {type(teacher.transform).__name__}, maps data to latents and moves with time. A "
            "map keeps only a transform that does not move; take a teacher with a Flow, a Whitening or none."
        )
    if net is None and (not ordinary or teacher.prediction == "moments"):
        raise ValueError(
            "the teacher's network predicts F or x through a transform, and a map predicts D itself; pass net=, a "
            "network that takes until, such as Preconditioned(UNet(1, until=True))."
        )
    predictor = _with_until(teacher.predictor) if net is None else net
    # Copies without gradients: a map follows the teacher's schedule and latents, and must not move them.
    schedule = copy.deepcopy(teacher.schedule).requires_grad_(False)
    latents = copy.deepcopy(teacher.transform).requires_grad_(False) if ordinary else None
    return NDM(
        predictor, teacher.event_shape, transform=latents, schedule=schedule,
        prediction=teacher.prediction if net is None else "x", t_min=teacher.t_min, checks=teacher.checks,
        prior=teacher.prior if teacher.has_custom_prior else None,
    )  # fmt: skip


def _with_until(predictor: Any) -> nn.Module:
    """A copy of a predictor whose network also takes ``until``, which changes nothing yet.

    Raises:
        ValueError: it is not made of networks of this library.
    """
    try:
        config = to_config(predictor)
    except Unconfigurable as error:
        raise ValueError(
            f"the map cannot start from the teacher's network: {error} Pass net=, a network that takes until."
        ) from error
    student: nn.Module = from_config(_asked(config))
    parameter = next(predictor.parameters())
    lost = student.to(parameter).load_state_dict(predictor.state_dict(), strict=False)
    wrong = [*lost.unexpected_keys, *(name for name in lost.missing_keys if ".ends." not in f".{name}")]
    if wrong:
        raise ValueError(
            f"the map cannot start from the teacher's network, whose weights differ in {wrong}; pass net=."
        )
    return student.requires_grad_(True)


def _asked(config: Any) -> Any:
    """A description in which every network with a time also takes ``until``."""
    if isinstance(config, list):
        return [_asked(each) for each in config]
    if not isinstance(config, dict):
        return config
    inner = {name: _asked(value) for name, value in config.items()}
    return inner | {"until": True} if inner.get("time") is True else inner
