r"""Published models as choices of schedule, transform, meaning of the network, objective and sampler.

All are :math:`q(z_t \mid x) = N(\alpha F(x, t), \sigma^2 I)`, or with a scale of the noise
:math:`N(\alpha F, \sigma^2 S^2)` (:func:`nfdm`); t = 0 are the data, t = 1 noise.

=========================  =========================  ===========  =====================================  ============
constructor                :math:`\alpha, \sigma`     network      objective (mean over t, x, eps)        sampler
=========================  =========================  ===========  =====================================  ============
:func:`ddpm`               table of 1000              eps          :math:`\|\epsilon-\hat\epsilon\|^2`    ``"ddpm"``
:func:`ddim`               the same                   eps          the same                               ``"ddim"``
:func:`vdm`                learned log-SNR            eps          the bound                              ``"ddpm"``
:func:`score_sde_vp`       VP, beta 0.1 to 20         score        :math:`\sigma^2\|s-\hat s\|^2`         ``"sde"``
:func:`score_sde_subvp`    sub-VP, the same beta      score        the same                               ``"sde"``
:func:`score_sde_ve`       :math:`1, \sigma_t`        score        the same                               ``"pc"``
:func:`ncsn`               the same, 10 levels        score        half of it, t on the levels            ``"langevin"``
:func:`edm`                the same, 0.002 to 80      raw          :math:`\lambda(\sigma)\|x-\hat x\|^2`  ``"edm"``
:func:`flow_matching`      1 - t, t                   velocity     :math:`\|u-\hat u\|^2`                 ``"ode"``
:func:`rectified_flow`     1 - t, t                   velocity     the same                               ``"euler"``
:func:`interpolant`        cosine, sine               velocity     the same                               ``"ode"``
:func:`blurring`           cosine; F blurs            raw          :math:`\|\epsilon-\hat\epsilon\|^2`    ``"ddpm"``
:func:`indm`               VP; F is a flow h(x)       score        the bound                              ``"ode"``
:func:`lsgm`               VP; F encodes              mixed        the bound                              ``"ode"``
:func:`diffenc`            VP; F is learned           v            the bound                              ``"ddpm"``
:func:`mulan`              VP; one per coordinate     raw          the bound                              ``"sde"``
:func:`nfdm`               1 - t, 0.01^{1 - t}        raw          the bound                              ``"sde"``
:func:`mean_flow`          1 - t, t                   raw, until   :math:`\|U-\mathrm{target}\|^2`          ``"map"``
=========================  =========================  ===========  =====================================  ============

:func:`progressive_distillation` and :func:`consistency_trajectory` make such a map of a trained model.

A raw network is one that :class:`~ndm_ct.nn.Preconditioned` scales. Each constructor returns a :class:`Preset`:

.. code-block:: python

    model, objective, method = ndm_ct.presets.flow_matching(ndm_ct.nn.MLP(2), (2,))
    ndm_ct.fit(model, data, steps=2000, objective=objective)
    x = ndm_ct.sample(model, 64, method=method)
    log_p = ndm_ct.loglik(model, x)

References:
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Song, Meng and Ermon, Denoising Diffusion Implicit Models, https://arxiv.org/abs/2010.02502
    Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
    Song et al., Score-Based Generative Modeling through SDEs, https://arxiv.org/abs/2011.13456
    Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution,
    https://arxiv.org/abs/1907.05600
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364
    Lipman et al., Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747
    Liu, Gong and Liu, Flow Straight and Fast (rectified flow), https://arxiv.org/abs/2209.03003
    Albergo and Vanden-Eijnden, Building Normalizing Flows with Stochastic Interpolants,
    https://arxiv.org/abs/2209.15571
    Hoogeboom and Salimans, Blurring Diffusion Models, https://arxiv.org/abs/2209.05557
    Kim et al., Maximum Likelihood Training of Implicit Nonlinear Diffusion Models (INDM),
    https://arxiv.org/abs/2205.13699
    Vahdat, Kreis and Kautz, Score-based Generative Modeling in Latent Space (LSGM), https://arxiv.org/abs/2106.05931
    Nielsen, Christensen, Dittadi and Winther, DiffEnc: Variational Diffusion with a Learned Encoder,
    https://arxiv.org/abs/2310.19789
    Sahoo et al., Diffusion Models With Learned Adaptive Noise (MuLAN), https://arxiv.org/abs/2312.13236
    Bartosh, Vetrov and Naesseth, Neural Flow Diffusion Models (NFDM), https://arxiv.org/abs/2404.12940
    Geng et al., Mean Flows for One-step Generative Modeling, https://arxiv.org/abs/2505.13447
"""

from collections.abc import Callable

from ndm_ct.presets.few_steps import consistency_trajectory, mean_flow, progressive_distillation
from ndm_ct.presets.learned import DiffEncHead, diffenc, mulan, nfdm
from ndm_ct.presets.published import (
    OnLevels,
    Preset,
    blurring,
    ddim,
    ddpm,
    edm,
    flow_matching,
    indm,
    interpolant,
    lsgm,
    ncsn,
    rectified_flow,
    score_sde_subvp,
    score_sde_ve,
    score_sde_vp,
    vdm,
)  # fmt: skip

__all__ = [
    "PRESETS", "DiffEncHead", "OnLevels", "Preset", "blurring", "consistency_trajectory", "ddim", "ddpm", "diffenc",
    "edm", "flow_matching", "indm", "interpolant", "lsgm", "mean_flow", "mulan", "ncsn", "nfdm",
    "progressive_distillation", "rectified_flow", "score_sde_subvp", "score_sde_ve", "score_sde_vp", "vdm",
]  # fmt: skip

PRESETS: dict[str, Callable[..., Preset]] = {
    each.__name__: each
    for each in (
        ddpm, ddim, vdm, score_sde_vp, score_sde_subvp, score_sde_ve, ncsn, edm, flow_matching, rectified_flow,
        interpolant, blurring, indm, lsgm, diffenc, mulan, nfdm, mean_flow,
    )
}  # fmt: skip
"""All constructors by name."""
