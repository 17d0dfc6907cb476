"""Read by mypy, never run: what public functions return with and without ``return_info``."""

from typing import assert_type

from torch import Tensor

import ndm_ct
from ndm_ct import BitsInfo, LikelihoodInfo
from ndm_ct.divergence import Quadrature


def returns(model: ndm_ct.NDM, x: Tensor) -> None:
    assert_type(ndm_ct.loglik(model, x), Tensor)
    assert_type(ndm_ct.loglik(model, x, trace=Quadrature(), return_info=True), tuple[Tensor, LikelihoodInfo])
    assert_type(ndm_ct.encode(model, x), Tensor)
    assert_type(ndm_ct.encode(model, x, rtol=1e-3, return_info=True), tuple[Tensor, LikelihoodInfo])
    assert_type(ndm_ct.decode(model, x, return_info=False), Tensor)
    assert_type(ndm_ct.decode(model, x, label=x, return_info=True), tuple[Tensor, LikelihoodInfo])
    assert_type(ndm_ct.bits_per_dim(model, x, quantisation=8), Tensor)
    assert_type(ndm_ct.bits_per_dim(model, x, return_info=True), tuple[Tensor, BitsInfo])
    assert_type(ndm_ct.elbo(model, x), Tensor)
    assert_type(ndm_ct.elbo(model, x, quantisation=8, return_info=True), tuple[Tensor, ndm_ct.ElboInfo])
