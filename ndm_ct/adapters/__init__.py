r"""Networks that were trained elsewhere, as models of this library.

=========================  ===========================================================  =============================
constructor                what the network returns                                     its time
=========================  ===========================================================  =============================
:func:`from_denoiser`      :math:`D(z; \sigma) \approx E[x \mid z]` (EDM, k-diffusion)  :math:`\sigma`, z = x + noise
:func:`from_eps`           :math:`\hat\epsilon`                                         index k of ``alphas_cumprod``
:func:`from_v`             :math:`\alpha\epsilon - \sigma x`                            index k of ``alphas_cumprod``
:func:`from_velocity`      :math:`x - \epsilon` (flow matching), or its negative        from noise to data, or back
:func:`from_score`         :math:`\nabla_z \log p_t(z)`                                 t of the given schedule
:func:`from_diffusers`     what the scheduler's configuration says                      what the scheduler says
=========================  ===========================================================  =============================

Each returns an :class:`~ndm_ct.NDM`; ``loglik``, ``encode``, ``decode``, ``sample``, ``elbo``, ``bits_per_dim`` and
``evaluate`` work on it as on any other, and likelihoods are in the units the network was trained in.

The other way, :func:`for_pyro` takes a :func:`ndm_ct.distribution` into models of Pyro.
"""

from ndm_ct.adapters.diffusers import from_diffusers
from ndm_ct.adapters.networks import from_denoiser, from_eps, from_score, from_v, from_velocity
from ndm_ct.adapters.pyro import for_pyro

__all__ = ["for_pyro", "from_denoiser", "from_diffusers", "from_eps", "from_score", "from_v", "from_velocity"]
