"""Break the code on purpose and see whether the tests notice: ``python tests/mutants.py [--list] [--only NAME]``.

Every mutant is one exact textual replacement, made in a copy of the package in a temporary folder; a few named tests
of this folder then run against the copy. A mutant is killed when one of them fails with an assertion or an error that
correct code could have; it survives when all of them pass. A replacement that does not apply exactly once, a test that
is not found, and a mutant that is not even valid code are errors of this script, never kills. The unbroken copy must
pass every test that is asked.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants_adapters import ADAPTERS
from mutants_latent import LATENT
from mutants_reliability import RELIABILITY
from mutants_samplers import SAMPLERS
from mutants_training import TRAINING

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "ndm_ct"
TIME_LIMIT = 600.0

# Imports the package before pytest can put another one first, and makes sure that it is the copy.
CHILD = """
import pathlib, sys
copy = pathlib.Path(sys.argv[1]).resolve()
sys.path.insert(0, str(copy))
import ndm_ct
where = pathlib.Path(ndm_ct.__file__).resolve()
assert where.is_relative_to(copy), f"tests would run against {where}, not against the copy"
import pytest
sys.exit(int(pytest.main(sys.argv[2:])))
"""

# What a typing mistake in a mutant would raise; a kill by one of these says nothing about the tests.
NOT_A_KILL = ("NameError", "UnboundLocalError", "SyntaxError", "ImportError", "AttributeError", "TypeError")


class MutantError(Exception):
    """The script, not the package, is at fault."""


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong.

    Args:
        name: what is wrong.
        file: file of the package.
        old: text that occurs exactly once in it.
        new: what replaces it.
        tests: names separated by spaces, ``bits::test_empty_batch`` for that test of ``test_bits.py``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # --- divergence
    Mutant(
        "exact trace with the wrong sign", "divergence.py",
        "forms.sum(0)[:, None] if self.exact", "-forms.sum(0)[:, None] if self.exact",
        "likelihood::test_exact_trace_is_the_jacobians",
    ),
    Mutant(
        "Hutchinson trace with the wrong sign", "divergence.py",
        "if self.exact else forms.mT", "if self.exact else -forms.mT",
        "likelihood::test_reported_standard_error_is_calibrated",
    ),
    Mutant(
        "Hutchinson trace replaced by zero", "divergence.py",
        "if self.exact else forms.mT", "if self.exact else 0.0 * forms.mT",
        "likelihood::test_probes_are_unbiased_for_a_rotated_jacobian",
    ),
    Mutant(
        "probes are 0 and 1 instead of signs", "divergence.py",
        "(2 * signs - 1).to(z.dtype)", "signs.to(z.dtype)",
        "likelihood::test_probes_are_exact_for_a_diagonal_jacobian",
    ),
    Mutant(
        "one probe for all rows", "divergence.py",
        "shape = (z.shape[0], self.probes, *z.shape[1:])\n"
        "        signs = coins(shape, generator, z.device)",
        "shape = (1, self.probes, *z.shape[1:])\n"
        "        signs = coins(shape, generator, z.device)\n"
        "        signs = signs.expand(z.shape[0], *shape[1:])",
        "likelihood::test_reported_standard_error_is_calibrated "
        "likelihood::test_t_interval_of_four_probes_covers",
    ),
    Mutant(
        "probes drawn column by column", "divergence.py",
        "shape = (z.shape[0], self.probes, *z.shape[1:])\n"
        "        signs = coins(shape, generator, z.device)",
        "shape = (self.probes, z.shape[0], *z.shape[1:])\n"
        "        signs = coins(shape, generator, z.device).movedim(1, 0)",
        "likelihood::test_same_generator_same_bits_and_rows_keep_their_probes",
    ),
    Mutant(
        "standard error not divided by sqrt(K)", "divergence.py",
        "(squares / (count * (count - 1))).sqrt()", "(squares / (count - 1)).sqrt()",
        "likelihood::test_reported_standard_error_is_calibrated",
    ),
    # --- process, dynamics, model
    Mutant(
        "drift without dF", "process.py",
        "+ alpha * dF + dlog_sigma", "+ dlog_sigma",
        "process::test_velocity_is_the_time_derivative_at_fixed_noise",
    ),
    Mutant(
        "network part without dF", "dynamics.py",
        " * F + expand(c.alpha, z) * dF", " * F",
        "process::test_flow_parts_add_up "
        "likelihood::test_moments_head_with_a_nonlinear_transform_has_the_exact_marginal_density",
    ),
    Mutant(
        "g^2 instead of g^2/2 in the drift", "process.py",
        "return 0.5 * eta * append_axes(", "return eta * append_axes(",
        "process::test_reverse_drift_is_velocity_minus_half_g_squared_score",
    ),
    Mutant(
        "score given x over sigma", "process.py",
        "expand(c.sigma**2, z)", "expand(c.sigma, z)",
        "process::test_score_is_the_gradient_of_the_log_density",
    ),
    Mutant(
        "score of the model over sigma", "dynamics.py",
        "expand(c.sigma**2, z)", "expand(c.sigma, z)",
        "process::test_exact_models_score_is_the_gradient_of_its_density",
    ),
    Mutant(
        "diffusion g larger by sqrt(2)", "process.py",
        "c.sigma * c.dgamma.sqrt()", "c.sigma * (2.0 * c.dgamma).sqrt()",
        "process::test_transition_is_the_reverse_sde_with_x_frozen",
    ),
    Mutant(
        "diffusion g with eta instead of its root", "process.py",
        "c.dgamma.sqrt(), eta) * eta.sqrt()", "c.dgamma.sqrt(), eta) * eta",
        "process::test_reverse_drift_is_velocity_minus_half_g_squared_score",
    ),
    Mutant(
        "transition: kappa with sigma_s and sigma_t swapped", "process.py",
        "return at_s / at_t * torch.exp", "return at_t / at_s * torch.exp",
        "process::test_transition_is_ddpm_at_volatility_one_and_ddim_at_zero",
    ),
    Mutant(
        "transition: noise with sigma_t for sigma_s", "process.py",
        "at_s * torch.sqrt(-torch.expm1(-exponent))", "at_t * torch.sqrt(-torch.expm1(-exponent))",
        "process::test_transition_is_ddpm_at_volatility_one_and_ddim_at_zero",
    ),
    Mutant(
        "transition that ignores a constant volatility", "process.py",
        "return self.volatility * (end - start)", "return end - start",
        "process::test_transition_is_the_reverse_sde_with_x_frozen",
    ),
    Mutant(
        "linear divergence d sigma'/sigma dropped", "trajectory.py",
        "expand(linear, divergence) + divergence", "divergence",
        "likelihood::test_scalar_events "
        "likelihood::test_encode_and_decode_are_inverse_and_logdet_is_the_jacobians",
    ),
    Mutant(
        "linear divergence without d", "dynamics.py",
        "return event_size(event_shape) * self._coefficients", "return self._coefficients",
        "likelihood::test_encode_and_decode_are_inverse_and_logdet_is_the_jacobians",
    ),
    Mutant(
        "reverse SDE's drift left in pixels", "dynamics.py",
        "return process.transform.to_basis(drift(", "return (drift(",
        "process::test_volatility_over_the_event_lives_in_the_transforms_basis",
    ),
    Mutant(
        "frozen moments without slope", "model.py",
        "F_s = F + expand(s - t, z) * dF", "F_s = F",
        "sampling::test_ddim_of_a_moments_head_has_order_one_for_a_nonlinear_transform",
    ),
    Mutant(
        "head v as if alpha^2 + sigma^2 were 1", "model.py",
        "(alpha * z - sigma * output) / (alpha**2 + sigma**2)", "(alpha * z - sigma * output)",
        "process::test_heads_are_the_same_model",
    ),
    Mutant(
        "variance exploding with a unit prior", "model.py",
        "return schedule.sigma_max if isinstance(schedule, VarianceExploding) else 1.0", "return 1.0",
        "process::test_default_prior_is_matched_to_the_schedule",
    ),
    Mutant(
        "prior density without its scale's normaliser", "model.py",
        "d * math.log(2.0 * math.pi * self.scale**2)", "d * math.log(2.0 * math.pi)",
        "process::test_default_prior_is_matched_to_the_schedule",
    ),
    Mutant(
        "prior draws without its scale", "model.py",
        "return self.scale * noise", "return noise",
        "process::test_default_prior_is_matched_to_the_schedule",
    ),
    Mutant(
        "networks stay in train mode", "model.py",
        "        self.eval()\n        try:", "        try:",
        "likelihood::test_train_mode_is_switched_off_and_restored",
    ),
    # --- transforms
    Mutant(
        "Separable without its derivative", "transforms/learned.py",
        "_mix(rate, self.features)", "torch.zeros_like(self.x)",
        "transforms::test_derivative_is_that_of_forward_in_time",
    ),
    Mutant(
        "Neural without net in the derivative", "transforms/learned.py",
        "net + time * dnet", "time * dnet",
        "transforms::test_derivative_is_that_of_forward_in_time",
    ),
    Mutant(
        "Neural without t dnet in the derivative", "transforms/learned.py",
        "net + time * dnet", "net",
        "transforms::test_derivative_is_that_of_forward_in_time",
    ),
    Mutant(
        "Blur's derivative with the wrong sign", "transforms/fixed.py",
        "-eigenvalues * dtau", "eigenvalues * dtau",
        "transforms::test_derivative_is_that_of_forward_in_time",
    ),
    Mutant(
        "Composed without the inner derivative", "transforms/base.py",
        "(dy, torch.ones_like(t))", "(torch.zeros_like(dy), torch.ones_like(t))",
        "transforms::test_derivative_is_that_of_forward_in_time",
    ),
    Mutant(
        "diagonal coefficients applied in pixels", "transforms/base.py",
        "return self.from_basis(c * self.to_basis(y))", "return c * y",
        "transforms::test_blur_is_diagonal_in_scipys_dct "
        "process::test_volatility_over_the_event_lives_in_the_transforms_basis",
    ),
    # --- schedules
    Mutant(
        "derivative of VP's sigma twice too large", "schedules.py",
        "0.5 * beta * alpha**2 / sigma)", "beta * alpha**2 / sigma)",
        "schedules::test_derivatives_are_those_of_alpha_and_sigma",
    ),
    Mutant(
        "learned schedule's rate without the steepness", "schedules.py",
        "(weight * steepness * bump * (1.0 - bump))", "(weight * bump * (1.0 - bump))",
        "schedules::test_derivatives_are_those_of_alpha_and_sigma",
    ),
    Mutant(
        "tabulated schedule's rate per entry, not per time", "schedules.py",
        "+ 3.0 * u * c3)) * intervals)", "+ 3.0 * u * c3)))",
        "schedules::test_derivatives_are_those_of_alpha_and_sigma",
    ),
    Mutant(
        "rate of the angle without its normaliser", "schedules.py",
        "return self.wronskian / (self.alpha**2 + self.sigma**2)", "return self.wronskian",
        "schedules::test_derivatives_are_those_of_alpha_and_sigma",
    ),
    Mutant(
        "SNR rate over sigma^2", "schedules.py",
        "self.wronskian / self.sigma**3", "self.wronskian / self.sigma**2",
        "schedules::test_noise_grows_and_derived_quantities_agree",
    ),
    # --- discrete steps
    Mutant(
        "DDIM: kappa with sigma_s and sigma_t swapped", "discrete.py",
        "math.sqrt(s.sigma**2 - std**2) / t.sigma * (z - t.alpha * F_t)",
        "math.sqrt(t.sigma**2 - std**2) / s.sigma * (z - t.alpha * F_t)",
        "sampling::test_ddim_is_the_exponential_integrator",
    ),
    Mutant(
        "DDIM: noise with sigma_t for sigma_s", "discrete.py",
        "std = self.eta * ancestral_std(t, s)", "std = self.eta * ancestral_std(t, s) * t.sigma / s.sigma",
        "sampling::test_ddim_with_eta_one_is_ddpm",
    ),
    Mutant(
        "DDPM's noise left in pixels", "discrete.py",
        "self.plus(self.plus(s.alpha * F_s, kappa, residual), std, noise)",
        "self.plus(s.alpha * F_s, kappa, residual) + std * noise",
        "sampling::test_volatility_per_frequency_samples_in_its_basis",
    ),
    # --- objectives
    Mutant(
        "loss with a plus before dF", "objectives.py",
        "* delta - expand(c.inverse_dgamma, F) * ddelta", "* delta + expand(c.inverse_dgamma, F) * ddelta",
        "objectives::test_integrand_is_exact_at_every_time",
    ),
    Mutant(
        "L_diff twice too large", "objectives.py",
        "return (0.5 * c.snr_rate).to(F.dtype) * sum_event(residual**2 / eta)",
        "return c.snr_rate.to(F.dtype) * sum_event(residual**2 / eta)",
        "objectives::test_identity_at_volatility_one_is_the_vdm_loss",
    ),
    Mutant(
        "L_diff not divided by eta", "objectives.py",
        "sum_event(residual**2 / eta)", "sum_event(residual**2)",
        "objectives::test_integrand_is_exact_at_every_time",
    ),
    Mutant(
        "bound without the prior term", "objectives.py",
        "bound = -(prior + diffusion + reconstruction)", "bound = -(diffusion + reconstruction)",
        "objectives::test_bound_and_loss_are_the_sums_of_their_terms",
    ),
    Mutant(
        "bound without the reconstruction term", "objectives.py",
        "bound = -(prior + diffusion + reconstruction)", "bound = -(prior + diffusion)",
        "objectives::test_loss_is_minus_the_bound_in_expectation",
    ),
    Mutant(
        "loss without the prior term", "objectives.py",
        "nats = rarity * integrand + model.prior_divergence(path, y, generator)", "nats = rarity * integrand",
        "objectives::test_bound_and_loss_are_the_sums_of_their_terms",
    ),
    Mutant(
        "bound whose transform is not conditioned", "objectives.py",
        "path = model.transform.along(y, **cond)\n                prior",
        "path = model.transform.along(y)\n                prior",
        "objectives::test_conditioning_reaches_every_term",
    ),
    Mutant(
        "loss whose transform is not conditioned", "objectives.py",
        "path = model.transform.along(y, **cond)\n    F, dF", "path = model.transform.along(y)\n    F, dF",
        "objectives::test_conditioning_reaches_every_term",
    ),
    Mutant(
        "bound whose prediction is not conditioned", "objectives.py",
        "F_hat, dF_hat = model.moments(z, t, **cond)", "F_hat, dF_hat = model.moments(z, t)",
        "objectives::test_conditioning_reaches_every_term",
    ),
    Mutant(
        "discrete bound whose prediction is not conditioned", "objectives.py",
        "model.frozen(z, t, s, **cond)", "model.frozen(z, t, s)",
        "objectives::test_conditioning_reaches_every_term",
    ),
    Mutant(
        "sampled prior term without the entropy's 1/2 eps^2", "model.py",
        "sum_event(0.5 * eps**2 + std.log()", "sum_event(std.log()",
        "objectives::test_sampled_prior_term_is_the_divergence",
    ),
    Mutant(
        "standard error of the bound: variance of a draw, not of the mean", "objectives.py",
        "total.var(0) / len(stratum)", "total.var(0)",
        "objectives::test_three_terms_are_their_integrals",
    ),
    Mutant(
        "standard error of the bound: strata counted once", "objectives.py",
        ".detach().sum(0) / count**2", ".detach().sum(0) / count",
        "objectives::test_three_terms_are_their_integrals",
    ),
    Mutant(
        "regressions without dF", "objectives.py",
        "+ weights[1] * (expand(c.inverse_dgamma, F) * (dF - dF_hat)) ** 2", "",
        "objectives::test_moments_loss_adds_both_regressions",
    ),
    Mutant(
        "regressions without F", "objectives.py",
        "error = weights[0] * (F - F_hat) ** 2 + weights[1]", "error = weights[1]",
        "objectives::test_moments_loss_adds_both_regressions",
    ),
    Mutant(
        "weights of the regressions exchanged", "objectives.py",
        "error = weights[0] * (F - F_hat) ** 2 + weights[1]", "error = weights[1] * (F - F_hat) ** 2 + weights[0]",
        "objectives::test_moments_loss_adds_both_regressions",
    ),
    Mutant(
        "regressions reach the transform", "objectives.py",
        "held = (F.detach(), dF.detach()) if split else (F, dF)", "held = F, dF",
        "objectives::test_moments_regressions_do_not_reach_the_transform",
    ),
    Mutant(
        "moments: the bound's gradient through the state is lost", "objectives.py",
        "return along - along.detach()", "return 0.0 * along",
        "objectives::test_gradients_of_moments_are_those_of_the_bound_and_the_regressions_apart",
    ),
    Mutant(
        "moments: the bound's gradient through the state without alpha", "objectives.py",
        "sum_event(expand(alpha, F).detach() * gradient * F)", "sum_event(gradient * F)",
        "objectives::test_gradients_of_moments_are_those_of_the_bound_and_the_regressions_apart",
    ),
    Mutant(
        "moments: the regressions' gradient through the state added to the bound's", "objectives.py",
        "_through_state(rarity * bound, z,", "_through_state(integrand, z,",
        "objectives::test_gradients_of_moments_are_those_of_the_bound_and_the_regressions_apart",
    ),
    Mutant(
        "times weighted by the density", "objectives.py",
        "return t, span / schedule(t).dgamma", "return t, schedule(t).dgamma / span",
        "objectives::test_times_are_a_change_of_variables",
    ),
    Mutant(
        "times of low discrepancy without a shift", "objectives.py",
        "return (shift + torch.arange(", "return (0.0 * shift + torch.arange(",
        "objectives::test_low_discrepancy_has_one_point_in_every_cell "
        "objectives::test_low_discrepancy_times_cut_the_variance_and_keep_the_mean",
    ),
    Mutant(
        "Gaussian decoder with the wrong sign of gamma", "objectives.py",
        "math.log(2.0 * math.pi) + gamma)", "math.log(2.0 * math.pi) - gamma)",
        "objectives::test_gaussian_reconstruction_is_its_expectation",
    ),
    Mutant(
        "reconstruction of a transform that has moved as if it had not", "objectives.py",
        "F = x if model.t_min == 0.0 and ", "F = x if ",
        "objectives::test_reconstruction_evaluates_a_transform_where_it_has_moved",
    ),
    Mutant(
        "level decoder without noise", "objectives.py",
        "decoded = F + torch.exp(0.5 * gamma) * eps", "decoded = F",
        "objectives::test_level_decoder_is_a_softmax_over_levels",
    ),
    Mutant(
        "discrete bound: one step for all", "objectives.py",
        "return steps * _transition_kl(", "return _transition_kl(",
        "objectives::test_discrete_bound_is_estimated_without_bias",
    ),
    # --- likelihood, bits
    Mutant(
        "decode's log-determinant with the wrong sign", "likelihood.py",
        "else log_prior - draft.logdet", "else log_prior + draft.logdet",
        "likelihood::test_encode_and_decode_are_inverse_and_logdet_is_the_jacobians",
    ),
    Mutant(
        "decode's prior at the data", "likelihood.py",
        "(start, end) if problem.upwards else (end, start)", "(start, end)",
        "likelihood::test_encode_and_decode_are_inverse_and_logdet_is_the_jacobians",
    ),
    Mutant(
        "states in the network's precision", "trajectory.py",
        "        z = self.start.double()\n        checked", "        z = self.start\n        checked",
        "likelihood::test_states_are_float64_for_float32_data",
    ),
    Mutant(
        "encode's states in the network's precision", "trajectory.py",
        "(self.start.double(),)", "(self.start,)",
        "likelihood::test_states_are_float64_for_float32_data",
    ),
    Mutant(
        "uniform offset with the wrong sign", "quantisation.py",
        "return math.log(2.0 * self.half_width)", "return -math.log(2.0 * self.half_width)",
        "bits::test_uniform_dequantisation_of_a_nearly_flat_density",
    ),
    Mutant(
        "uniform noise in the upper half of the bin", "quantisation.py",
        "(2.0 * noise - 1.0) * self.half_width", "noise * self.half_width",
        "bits::test_dequantised_values_stay_in_their_bins",
    ),
    Mutant(
        "truncated normal without its entropy's last term", "quantisation.py",
        " - tau * density / mass", "",
        "bits::test_published_constants_of_the_truncated_normal",
    ),
    Mutant(
        "truncated normal without its entropy", "bits.py",
        "bins.truncated_normal_offset(alpha, sigma)", "0.0",
        "bits::test_truncated_normal_dequantisation_is_the_bound_on_its_bins",
    ),
    Mutant(
        "offset once, not per dimension", "bits.py",
        "constant - d * bins.uniform_offset", "constant - bins.uniform_offset",
        "bits::test_uniform_dequantisation_of_a_nearly_flat_density",
    ),
    Mutant(
        "bits per dimension with nats' standard error", "bits.py",
        "BitsInfo((error / scale)", "BitsInfo((error)",
        "bits::test_the_error_of_several_points_is_that_of_their_mean",
    ),
    # --- solvers
    Mutant(
        "field evaluated beyond the end", "solvers.py",
        't = t.to(torch.float64).clamp(self.low, self.high)\n        self.evaluations += 1',
        't = t.to(torch.float64)\n        self.evaluations += 1',
        "solvers::test_no_evaluation_outside_the_interval",
    ),
    Mutant(
        "adaptive steps across the end", "solvers.py",
        'options = {"step_t": end, "max_num_steps": max_steps}', 'options = {"max_num_steps": max_steps}',
        "solvers::test_the_last_step_ends_at_the_end",
    ),
    Mutant(
        "error averaged over the batch", "solvers.py",
        "return self.last_norms.amax()", "return self.last_norms.square().mean().sqrt()",
        "solvers::test_worst_row_sets_the_step_however_large_the_batch",
    ),
    Mutant(
        "error averaged over the state's parts", "_packing.py",
        "for part in y.detach().split(self.widths, 1)", "for part in (y.detach(),)",
        "solvers::test_parts_of_the_state_have_their_own_norm",
    ),
    Mutant(
        "SDE noise of variance h^2", "solvers.py",
        "increment = self._normal() * step**0.5", "increment = self._normal() * step",
        "solvers::test_moments_of_an_ornstein_uhlenbeck_process_on_an_uneven_grid",
    ),
    Mutant(
        "SDE noise a tenth too large", "solvers.py",
        "return self.diffusion(t) * v", "return 1.1 * self.diffusion(t) * v",
        "solvers::test_moments_of_an_ornstein_uhlenbeck_process_on_an_uneven_grid",
    ),
    Mutant(
        "integral of the path uncorrelated with its increment", "solvers.py",
        "step * (0.5 * increment + self._normal()", "step * (self._normal()",
        "solvers::test_noise_of_a_generator_has_the_moments_of_a_path",
    ),
    Mutant(
        "integral of the path with the wrong variance", "solvers.py",
        "(step / 12.0) ** 0.5", "(step / 3.0) ** 0.5",
        "solvers::test_noise_of_a_generator_has_the_moments_of_a_path",
    ),
    # --- training
    Mutant(
        "averaged weights with decay and gain swapped", "training.py",
        "current, 1.0 - min(decay, (1 + n) / (10 + n)))", "current, min(decay, (1 + n) / (10 + n)))",
        "training::test_average_and_learning_rate_follow_their_formulas",
    ),
    Mutant(
        "averaged weights without warm-up", "training.py",
        "1.0 - min(decay, (1 + n) / (10 + n)))", "1.0 - decay)",
        "training::test_average_and_learning_rate_follow_their_formulas",
    ),
    Mutant(
        "quadrature without dt/du", "quadrature.py",
        "return t, (end - start) * angle.sin() / schedule(t).dangle",
        "return t, torch.ones_like(t)",
        "quadrature::test_weights_are_the_rate_of_time_along_the_path",
    ),
    Mutant(
        "jitter without its antithetic half", "quadrature.py",
        "torch.stack([centre - offset, centre + offset], -1)",
        "torch.stack([centre - offset, centre - offset], -1)",
        "quadrature::test_nodes_are_antithetic_pairs_in_equal_strata",
    ),
    Mutant(
        "quadrature without the linear log-determinant", "likelihood.py",
        "linear_logdet(model, start.device) + totals.mean",
        "totals.mean",
        "quadrature::test_image_shaped_events",
    ),
    Mutant(
        "signs of the sweep dropped", "quadrature.py",
        "1 - 2 * (flips ^ self.signs[row, sweep]).long()",
        "1 - 2 * flips.long()",
        "quadrature::test_every_probe_alone_is_a_rademacher_vector",
    ),
    Mutant(
        "standard error not widened", "quadrature.py",
        "(n * (n - 3.0).clamp(min=1.0))",
        "(n * (n - 1.0).clamp(min=1.0))",
        "quadrature::test_running_totals_are_mean_variance_and_a_widened_standard_error",
    ),
    Mutant(
        "log-determinant upwards when going down", "likelihood.py",
        "logdet if problem.upwards else -logdet",
        "logdet",
        "quadrature::test_going_down_the_log_determinant_has_the_other_sign",
    ),
    Mutant(
        "truncation without the scaling by alpha", "likelihood.py",
        "smoothing - c.alpha.log() * (d + sum_event(x * s))",
        "smoothing",
        "budget::test_truncation_is_the_change_of_the_density_by_what_is_left_at_t_min",
    ),
    Mutant(
        "truncation without the squared score", "likelihood.py",
        "c.alpha * trace_of_F - d + c.sigma**2 * sum_event(s * s)",
        "c.alpha * trace_of_F - d",
        "budget::test_truncation_is_the_change_of_the_density_by_what_is_left_at_t_min",
    ),
    Mutant(
        "error of log p without the score", "trajectory.py",
        "gradient = (flow.score(t, state[0], F), share)",
        "gradient = (torch.zeros_like(state[0]), share)",
        "budget::test_ode_error_grows_with_the_tolerance_and_weighs_with_the_score",
    ),
    Mutant(
        "a predictor without a gradient is no surprise to the quadrature", "likelihood.py",
        "if len(rows) > 0 and not bool(values.nan_to_num().any()):", "if False:",
        "errors::test_a_predictor_autograd_cannot_see_through_is_refused",
    ),
    *(Mutant(*each) for each in (*ADAPTERS, *LATENT, *RELIABILITY, *SAMPLERS, *TRAINING)),
)  # fmt: skip


def mutated(mutant: Mutant, package: Path) -> str:
    """The mutant's file in ``package`` after the replacement."""
    source = (package / mutant.file).read_text()
    count = source.count(mutant.old)
    if count != 1:
        raise MutantError(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, expected once.")
    return source.replace(mutant.old, mutant.new)


def run(tests: Iterable[str], mutant: Mutant | None) -> str | None:
    """Run tests against a copy of the package; the first failing test, or None if all pass.

    Raises:
        MutantError: pytest found no such test, or could not run it.
    """
    what = "the unbroken package" if mutant is None else mutant.name
    ids = [f"{TESTS}/test_{test.replace('::', '.py::', 1)}" for test in tests]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (copy / PACKAGE.name / mutant.file).write_text(mutated(mutant, copy / PACKAGE.name))
        environment = os.environ | {
            "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000", "PYTEST_ADDOPTS": "",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",  # several run side by side
        }  # fmt: skip
        options = ["-x", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"]
        result = subprocess.run(
            [sys.executable, "-c", CHILD, str(copy), *options, *ids], cwd=TESTS.parent, env=environment,
            capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
    if result.returncode == 0:
        return None
    failed = re.search(r"^FAILED \S*?test_(\w+)\.py::(.*?)(?: - (.*))?$", result.stdout, re.MULTILINE)
    if result.returncode != 1 or failed is None:
        raise MutantError(f"{what}: pytest ended with {result.returncode}.\n{result.stdout}{result.stderr}")
    file, test, reason = failed.groups(default="")
    if mutant is not None and reason.startswith(NOT_A_KILL):
        raise MutantError(f"{what}: {test} failed for {reason!r}, which is a mistake in the mutant.")
    return f"{file}::{test}" if mutant is not None else f"{file}::{test} ({reason})"


def timed(mutant: Mutant) -> tuple[str | None, float]:
    """What kills the mutant, and after how many seconds."""
    start = time.monotonic()
    return run(mutant.tests.split(), mutant), time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants asked for and print the table; 1 if one survives."""
    parser = argparse.ArgumentParser(description="Break the package on purpose and see whether the tests notice.")
    parser.add_argument("--only", metavar="NAME", action="append", help="run this mutant (may be repeated)")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="mutants at a time (%(default)s)")
    options = parser.parse_args(arguments)
    names = [mutant.name for mutant in MUTANTS]
    if len(set(names)) != len(names):
        raise MutantError("two mutants have the same name.")
    unknown = set(options.only or []) - set(names)
    if unknown:
        parser.error(f"no mutant is called {', '.join(map(repr, sorted(unknown)))}; see --list")
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    for mutant in chosen:  # all must apply, before any time is spent
        mutated(mutant, PACKAGE)
    failed = run(sorted({test for mutant in chosen for test in mutant.tests.split()}), None)
    if failed is not None:
        raise MutantError(f"the unbroken package fails {failed}.")
    width = max(len(mutant.name) for mutant in chosen)
    print(f"{'mutant':{width}}  {'file':13}  {'seconds':>7}  killed by")
    survivors = 0
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for mutant, (killer, seconds) in zip(chosen, pool.map(timed, chosen), strict=True):
            survivors += killer is None
            print(f"{mutant.name:{width}}  {mutant.file:13}  {seconds:7.1f}  {killer or 'SURVIVED'}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
