"""Networks in the conventions of others, against the exact velocity, density and steps they stand for."""

import math
import types
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from oracles import ddpm_table, rotated_covariance

import ndm_ct
from ndm_ct import adapters, schedules
from ndm_ct.reference import Gaussian, GaussianMixture
from ndm_ct.samplers.base import walk
from ndm_ct.samplers.frozen import DDIM

D = 4
TABLE = ddpm_table()
COV = rotated_covariance(D, 0.2, 3.0)
MEAN = torch.tensor([0.5, -1.0, 0.3, 0.8], dtype=torch.float64)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def posterior_mean(z, alpha, sigma):
    """E[x | alpha x + sigma eps = z] of N(MEAN, COV), coefficients ``(B,)``."""
    alpha, sigma = alpha.double()[:, None, None], sigma.double()[:, None, None]
    total = alpha**2 * COV + sigma**2 * torch.eye(D, dtype=torch.float64)
    gap = (z - alpha[..., 0] * MEAN)[..., None]
    return MEAN + (alpha * COV @ torch.linalg.solve(total, gap))[..., 0]


def denoiser(z, sigma):
    return posterior_mean(z, torch.ones_like(sigma), sigma)


def on_table(z, k):
    alpha = TABLE[k.round().long()].sqrt()
    sigma = (1.0 - alpha**2).sqrt()
    return alpha[:, None], sigma[:, None], posterior_mean(z, alpha, sigma)


def eps(z, k):
    alpha, sigma, x = on_table(z, k)
    return (z - alpha * x) / sigma


def v(z, k):
    alpha, sigma, x = on_table(z, k)
    return alpha * (z - alpha * x) / sigma - sigma * x


def velocity(z, tau):
    """From noise at 0 to data at 1: E[x - eps | tau x + (1 - tau) eps]."""
    x = posterior_mean(z, tau, 1.0 - tau)
    return x - (z - tau[:, None] * x) / (1.0 - tau[:, None])


def backwards(z, tau):
    return -velocity(z, 1.0 - tau / 1000.0)


def score(z, t):
    c = schedules.VariancePreserving()(t.double())
    x = posterior_mean(z, c.alpha, c.sigma)
    return (c.alpha[:, None] * x - z) / c.sigma[:, None] ** 2


MODELS = {
    "denoiser": lambda: adapters.from_denoiser(denoiser, (D,), sigma_max=200.0),
    "eps": lambda: adapters.from_eps(eps, (D,), alphas_cumprod=TABLE),
    "eps, nearest": lambda: adapters.from_eps(eps, (D,), alphas_cumprod=TABLE, nearest=True),
    "v": lambda: adapters.from_v(v, (D,), alphas_cumprod=TABLE),
    "velocity": lambda: adapters.from_velocity(velocity, (D,)),
    "velocity, time first": lambda: adapters.from_velocity(lambda tau, z: velocity(z, tau), (D,), time_first=True),
    "velocity, backwards": lambda: adapters.from_velocity(backwards, (D,), data_at=0, time_scale=1000.0),
    "score": lambda: adapters.from_score(score, (D,), schedule=schedules.VariancePreserving()),
}


@pytest.mark.parametrize("name", MODELS)
def test_velocities_are_those_of_the_data(name):
    """On the table's own times where there is one."""
    model = MODELS[name]()
    exact = Gaussian(MEAN, COV, schedule=model.schedule, t_min=model.t_min)
    z = torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (3, 100, 500, 900):
        t = torch.tensor(k / 999.0, dtype=torch.float64)
        torch.testing.assert_close(model.velocity(z, t), exact.velocity(z, t), **CLOSE)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("eps", "eps, nearest", "v")])
def test_likelihoods_are_those_of_the_data(name):
    model = MODELS[name]()
    exact = Gaussian(MEAN, COV, schedule=model.schedule, t_min=model.t_min)
    x = exact.sample_data(5, generator=torch.Generator().manual_seed(1))
    # The priors are normal: the variance-preserving SDE ends with alpha = 0.007, the denoiser's with 200 to 1.
    torch.testing.assert_close(ndm_ct.loglik(model, x), exact.log_prob(x), rtol=0.0, atol=2e-2)
    torch.testing.assert_close(ndm_ct.decode(model, ndm_ct.encode(model, x)), x, rtol=0.0, atol=1e-3)


def test_networks_see_the_times_they_were_trained_with():
    asked = {}

    def record(name, result):
        def net(z, time):
            asked[name] = time
            return result * z

        return net

    z, t = torch.ones(2, D), torch.tensor([0.25, 0.5], dtype=torch.float64)
    for name, model in {
        "eps": adapters.from_eps(record("eps", 0.1), (D,), alphas_cumprod=TABLE),
        "nearest": adapters.from_eps(record("nearest", 0.1), (D,), alphas_cumprod=TABLE, nearest=True),
        "velocity": adapters.from_velocity(record("velocity", 0.1), (D,)),
        "backwards": adapters.from_velocity(record("backwards", 0.1), (D,), data_at=0, time_scale=1000.0),
        "denoiser": adapters.from_denoiser(record("denoiser", 0.1), (D,), sigma_min=0.01, sigma_max=100.0),
    }.items():
        model.velocity(z, t)
        assert asked[name].shape == (2,)
    assert asked["eps"].tolist() == pytest.approx([249.75, 499.5])
    assert asked["nearest"].tolist() == [250, 500]
    assert asked["nearest"].dtype == torch.int64
    assert asked["velocity"].tolist() == pytest.approx([0.75, 0.5])
    assert asked["backwards"].tolist() == pytest.approx([250.0, 500.0])
    assert asked["denoiser"].tolist() == pytest.approx([0.1, 1.0])


def test_denoisers_work_under_schedules_that_scale():
    """x_hat = D(z / alpha; sigma / alpha) under variance preservation too."""
    schedule = schedules.VariancePreserving()
    model = ndm_ct.NDM(ndm_ct.nn.FromDenoiser(denoiser), (D,), schedule=schedule)
    z = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    c = schedule(t)
    torch.testing.assert_close(model.predict_x(z, t), posterior_mean(z, c.alpha, c.sigma))
    with pytest.raises(ValueError, match=r"FromDenoiser finds x where alpha > 0, but Rectified has alpha\(1\) = 0"):
        ndm_ct.NDM(ndm_ct.nn.FromDenoiser(denoiser), (D,), schedule=schedules.Rectified())


def test_conditioning_passes_through_and_strangers_are_refused():
    def net(z, tau, label=None):
        return z * label[:, None]

    model = adapters.from_velocity(net, (D,))
    z = torch.ones(2, D, dtype=torch.float64)
    label = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(model.velocity(z, 0.5, label=label), -label[:, None] * z)
    with pytest.raises(TypeError, match="lable"):
        ndm_ct.loglik(model, z, lable=label)


def test_weights_move_with_the_model_and_are_saved(tmp_path):
    net = ndm_ct.nn.MLP(D, width=8)
    for parameter in net.parameters():
        parameter.data += 0.1
    model = adapters.from_eps(net, (D,), alphas_cumprod=TABLE)
    assert set(model.parameters()) == set(net.parameters())
    ndm_ct.save(model, tmp_path / "model.safetensors")
    again = ndm_ct.load(tmp_path / "model.safetensors")
    z = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.velocity(z, 0.3), model.velocity(z, 0.3))


@pytest.mark.parametrize("data_at", [2, 0.5, "data"])
def test_data_lie_at_an_end(data_at):
    with pytest.raises(ValueError, match="data_at must be 0 or 1"):
        adapters.from_velocity(velocity, (D,), data_at=data_at)


def of_torchcfm(noise, x, tau):
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    return matching.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, x, tau)[1:]


def of_flow_matching(noise, x, tau):
    sample = pytest.importorskip("flow_matching.path").CondOTProbPath().sample(x_0=noise, x_1=x, t=tau)
    return sample.x_t, sample.dx_t


@pytest.mark.parametrize("path", [of_torchcfm, of_flow_matching])
def test_paths_of_others_are_ours(path):
    """Same x, same noise: the same state, and a network that estimates their velocity flows the other way."""
    x, noise = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(2))
    tau = torch.linspace(0.1, 0.9, 5)
    z, u = path(noise, x, tau)
    asked = []

    def net(state, time):
        asked.append(time)
        return u

    model = adapters.from_velocity(net, (D,))
    t = 1.0 - tau.double()
    torch.testing.assert_close(model.process.sample(x, t, eps=noise), z)
    torch.testing.assert_close(model.velocity(z, t), -u, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(asked[0], tau)


def test_guidance_reaches_a_network_that_says_what_none_is():
    model = adapters.from_eps(ndm_ct.nn.MLP(D, width=8, classes=3), (D,), alphas_cumprod=TABLE)
    assert model.predictor.null == {"label": -1}
    label = torch.tensor([0, 2])
    x = ndm_ct.sample(model, 2, method="ddim", steps=2, guidance=2.0, label=label, generator=torch.Generator())
    assert x.shape == (2, D)


SDE = schedules.VariancePreserving()


def preconditioned(net):
    """EDM's D, with data of standard deviation one."""

    def denoiser(z, sigma):
        s = sigma[:, None]
        return z / (1.0 + s**2) + s / (1.0 + s**2).sqrt() * net(z / (1.0 + s**2).sqrt(), 0.25 * sigma.log())

    return denoiser


def on_thousandths(net):
    """A network called with the index of the table, as those of diffusers are."""
    return lambda z, k: net(z, k / 1000.0)


def scaled(net):
    """score_sde's: the network's output over -sigma."""
    return lambda z, t: -net(z, t) / SDE(t.double()).sigma.to(z.dtype)[:, None]


TRAINED = {
    "denoiser": lambda net: adapters.from_denoiser(preconditioned(net), (2,), sigma_min=0.01, sigma_max=40.0),
    "eps": lambda net: adapters.from_eps(on_thousandths(net), (2,), alphas_cumprod=TABLE),
    "v": lambda net: adapters.from_v(on_thousandths(net), (2,), alphas_cumprod=TABLE),
    "velocity": lambda net: adapters.from_velocity(net, (2,)),
    "score": lambda net: adapters.from_score(scaled(net), (2,), schedule=SDE, t_min=1e-3),
}


class TestTrained:
    """Small networks, each trained by the loss of its convention, on two normals whose density is known."""

    WEIGHTS, CENTRES, WIDTH = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.4

    def rows(self, n, generator):
        which = torch.multinomial(self.WEIGHTS, n, replacement=True, generator=generator)
        return self.CENTRES[which] + self.WIDTH * torch.randn(n, 2, generator=generator)

    def of_denoiser(self, net, x, noise, u):
        """EDM's weights and preconditioning, log-normal sigma."""
        sigma = torch.exp(-1.2 + 1.2 * math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0).clamp(-3.0, 3.0))
        weight = (sigma**2 + 1.0) / sigma**2
        return weight * (preconditioned(net)(x + sigma[:, None] * noise, sigma) - x).square().sum(1)

    def on_table(self, x, noise, u):
        k = (1000 * u).long()
        alpha = TABLE[k].sqrt().float()[:, None]
        sigma = (1.0 - alpha**2).sqrt()
        return k, alpha * x + sigma * noise, alpha * noise - sigma * x

    def of_eps(self, net, x, noise, u):
        k, z, _ = self.on_table(x, noise, u)
        return (on_thousandths(net)(z, k) - noise).square().sum(1)

    def of_v(self, net, x, noise, u):
        k, z, v = self.on_table(x, noise, u)
        return (on_thousandths(net)(z, k) - v).square().sum(1)

    def of_velocity(self, net, x, noise, u):
        """Of torchcfm and flow_matching: noise at 0, data at 1."""
        z = u[:, None] * x + (1.0 - u[:, None]) * noise
        return (net(z, u) - (x - noise)).square().sum(1)

    def of_score(self, net, x, noise, u):
        """Of score_sde: sigma times the score."""
        t = 1e-3 + (1.0 - 1e-3) * u
        c = SDE(t.double())
        alpha, sigma = (part.float()[:, None] for part in (c.alpha, c.sigma))
        return (sigma * scaled(net)(alpha * x + sigma * noise, t) + noise).square().sum(1)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TRAINED)
    def test_densities_bounds_and_samples_are_nearly_those_of_the_data(self, name):
        generator = torch.Generator().manual_seed(0)
        net, steps = ndm_ct.nn.MLP(2, width=64, depth=2), 2000
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            x = self.rows(256, generator)
            noise, u = torch.randn(256, 2, generator=generator), torch.rand(256, generator=generator)
            optimiser.zero_grad()
            getattr(self, f"of_{name}")(net, x, noise, u).mean().backward()
            optimiser.step()
            decay.step()
        model, x = TRAINED[name](net.eval().requires_grad_(False)), self.rows(500, generator)
        covs = (self.WIDTH**2 * torch.eye(2)).expand(2, 2, 2)
        exact = GaussianMixture(self.WEIGHTS, self.CENTRES, covs, schedule=model.schedule, t_min=model.t_min)
        found, info = ndm_ct.loglik(model, x, return_info=True)
        gap = float((exact.log_prob(x).float() - found).mean())
        assert -0.015 < gap < 0.04  # on the data's own rows a divergence
        torch.testing.assert_close(ndm_ct.decode(model, ndm_ct.encode(model, x[:50])), x[:50], rtol=0.0, atol=1e-2)
        below = (found - ndm_ct.elbo(model, x, samples=64, generator=generator)).double()
        error = float(below.std()) / len(x) ** 0.5
        assert -4.0 * error < float(below.mean()) < 0.1 + 4.0 * error
        drawn = ndm_ct.sample(model, 500, generator=generator)
        assert float((drawn[:, 0] > 0.0).float().mean()) == pytest.approx(0.7, abs=0.08)
        assert drawn.mean(0).tolist() == pytest.approx((self.WEIGHTS @ self.CENTRES).tolist(), abs=0.15)
        print(f"{name}: {gap:.4f} nats below the exact density, nfe {info.nfe}")


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
class TestDiffusers:
    """Small networks of diffusers with random weights."""

    @pytest.fixture
    def diffusers(self):
        return pytest.importorskip("diffusers")

    @pytest.fixture
    def unet(self, diffusers):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
    def test_an_exact_network_has_the_exact_density(self, diffusers, prediction):
        """Pixels of N(0, 0.6^2), at the times between the entries of the table too."""
        flow = prediction == "flow"
        scheduler = (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
            if flow
            else diffusers.DDPMScheduler(prediction_type=prediction)
        )
        schedule = schedules.Rectified() if flow else schedules.Tabulated(scheduler.alphas_cumprod)

        class Exact(torch.nn.Module):
            def forward(self, z, timestep):
                c = schedule(timestep.double() / (1000.0 if flow else 999.0))
                alpha, sigma = (part[:, None, None, None] for part in (c.alpha, c.sigma))
                x = alpha * 0.36 * z / (0.36 * alpha**2 + sigma**2)
                noise = sigma * z / (0.36 * alpha**2 + sigma**2)
                answers = {
                    "epsilon": noise, "sample": x, "v_prediction": alpha * noise - sigma * x, "flow": noise - x,
                }  # fmt: skip
                return types.SimpleNamespace(sample=answers[prediction].to(z.dtype))

        model = adapters.from_diffusers(Exact(), scheduler, (1, 2, 2))
        x = 0.6 * torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        start = model.schedule(torch.tensor(model.t_min, dtype=torch.float64))
        exact = torch.distributions.Normal(0.0, (0.36 * start.alpha**2 + start.sigma**2).sqrt())
        torch.testing.assert_close(ndm_ct.loglik(model, x), exact.log_prob(x).sum((1, 2, 3)), rtol=0.0, atol=2e-3)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_a_step_of_ddim_is_theirs(self, diffusers, unet, prediction):
        scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
        scheduler.set_timesteps(4)
        model = adapters.from_diffusers(unet, scheduler)
        assert model.event_shape == (1, 8, 8)
        z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        times = [int(k) for k in scheduler.timesteps]
        with torch.no_grad():
            theirs = scheduler.step(unet(z, times[1]).sample, times[1], z).prev_sample
            grid = torch.tensor([times[1], times[2]], dtype=torch.float64) / 999.0
            ours = walk(DDIM(model), z, grid)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_the_euler_scheduler_means_the_same_denoiser(self, diffusers, unet):
        """It steps in z / alpha; where it says x is, we do."""
        scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")
        scheduler.set_timesteps(10)
        model = adapters.from_diffusers(unet, scheduler)
        k = scheduler.timesteps[4]
        sigma = float(scheduler.sigmas[4])
        z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            scaled = z / math.sqrt(1.0 + sigma**2)
            theirs = scheduler.step(unet(scaled, k).sample, k, z).pred_original_sample
            ours = model.predict_x(scaled, k.double() / 999.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    def test_flow_matching_takes_their_euler_step(self, diffusers, unet):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(6)
        model = adapters.from_diffusers(unet, scheduler)
        k, sigma, after = scheduler.timesteps[2], float(scheduler.sigmas[2]), float(scheduler.sigmas[3])
        z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            theirs = scheduler.step(unet(z, k).sample, k, z).prev_sample
            velocity = model.velocity(z, sigma)
        torch.testing.assert_close(z + (after - sigma) * velocity, theirs, rtol=1e-4, atol=1e-4)

    def test_conditional_networks_take_their_keywords(self, diffusers):
        torch.manual_seed(0)
        net = diffusers.UNet2DConditionModel(
            sample_size=(8, 4), in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, cross_attention_dim=6, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip
        model = adapters.from_diffusers(net, diffusers.DDPMScheduler())
        assert model.event_shape == (2, 8, 4)
        z, context = torch.randn(2, 2, 8, 4), torch.randn(2, 3, 6)
        with torch.no_grad():
            noise = net(z, timestep=torch.full((2,), 499.5), encoder_hidden_states=context).sample
            found = model.predict_x(z, torch.tensor(0.5, dtype=torch.float64), encoder_hidden_states=context)
            c = model.schedule(torch.tensor(0.5, dtype=torch.float64))
        torch.testing.assert_close(found, ((z - c.sigma * noise) / c.alpha).float(), rtol=1e-4, atol=1e-4)

    def test_learned_variances_of_a_dit_are_left_out(self, diffusers):
        torch.manual_seed(0)
        net = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1,
            norm_num_groups=2, sample_size=8, patch_size=2, num_embeds_ada_norm=5,
        ).eval()  # fmt: skip
        model = adapters.from_diffusers(net, diffusers.DDIMScheduler())
        z, label = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2])
        x = model.predict_x(z, torch.tensor(0.4, dtype=torch.float64), class_labels=label)
        assert x.shape == z.shape
        with torch.no_grad():
            noise = net(z, timestep=torch.full((3,), 0.4 * 999.0), class_labels=label).sample[:, :2]
        c = model.schedule(torch.tensor(0.4, dtype=torch.float64))
        torch.testing.assert_close(x.detach(), ((z - c.sigma * noise) / c.alpha).float(), rtol=1e-4, atol=1e-4)

    def test_zero_terminal_snr_ends_at_their_least_alpha(self, diffusers, unet):
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        model = adapters.from_diffusers(unet, scheduler)
        assert float(scheduler.alphas_cumprod[-1]) < 1e-12
        least = min(2.0**-24, 0.5 * float(scheduler.alphas_cumprod[-2]))
        end = model.schedule(torch.tensor([998.0 / 999.0, 1.0], dtype=torch.float64)).alpha
        assert end.tolist() == pytest.approx([float(scheduler.alphas_cumprod[-2]) ** 0.5, least**0.5], rel=1e-4)

    def test_what_is_not_understood_is_refused(self, diffusers, unet):
        with pytest.raises(TypeError, match=r"EDMEulerScheduler has neither alphas_cumprod .* from_denoiser"):
            adapters.from_diffusers(unet, diffusers.EDMEulerScheduler())
        scheduler = diffusers.DDPMScheduler()
        scheduler.register_to_config(prediction_type="flow")
        with pytest.raises(ValueError, match="prediction_type of DDPMScheduler is 'flow'"):
            adapters.from_diffusers(unet, scheduler)
        with pytest.raises(ValueError, match=r"pass event_shape=\(C, H, W\)"):
            adapters.from_diffusers(torch.nn.Identity(), diffusers.DDPMScheduler())

    @pytest.mark.parametrize("name", ["inverted", "zero terminal SNR", "continuous"])
    def test_schedulers_with_other_clocks(self, diffusers, name):
        """An exact network of pixels of N(0, 0.25), by what the scheduler itself takes an output at a timestep for.

        The scheduler's samples show that the network is exact, and the density that it is read as the same one.
        """
        scheduler, network = CLOCKS[name](diffusers)
        scheduler.set_timesteps(300)
        model = adapters.from_diffusers(network, scheduler, (1, 2, 2))
        z = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        z = z if name == "inverted" else z * scheduler.sigmas[0]
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            z = scheduler.step(network(scaled, t.expand(len(z))).sample, t, z).prev_sample
        assert float(z.std()) == pytest.approx(0.5, abs=0.015)
        x = 0.5 * torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        start = model.schedule(torch.tensor(model.t_min, dtype=torch.float64))
        exact = torch.distributions.Normal(0.0, (0.25 * start.alpha**2 + start.sigma**2).sqrt())
        torch.testing.assert_close(ndm_ct.loglik(model, x), exact.log_prob(x).sum((1, 2, 3)), rtol=0.0, atol=5e-3)
        drawn = ndm_ct.sample(model, 1000, generator=torch.Generator().manual_seed(1))
        assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)

    def test_flow_networks_get_time_in_their_own_unit(self, diffusers):
        """AuraFlow's pipeline divides the scheduler's timestep by 1000; a network of an unknown unit is refused."""
        torch.manual_seed(0)
        net = diffusers.AuraFlowTransformer2DModel(
            sample_size=4, patch_size=2, in_channels=2, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
            out_channels=2, pos_embed_max_size=4,
        ).eval()  # fmt: skip
        z, context = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 8)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        model = adapters.from_diffusers(net, scheduler)
        with torch.no_grad():
            expected = net(z, timestep=torch.full((2,), 0.3), encoder_hidden_states=context).sample
            found = model.velocity(z, 0.3, encoder_hidden_states=context)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        unknown = type("NewTransformer2DModel", (torch.nn.Identity,), {"__module__": "diffusers.models"})()
        with pytest.raises(ValueError, match=r"unit of time of a NewTransformer2DModel is not known .*from_velocity"):
            adapters.from_diffusers(unknown, scheduler, (2, 4, 4))


class OfPixels(torch.nn.Module):
    """An exact network of pixels of N(0, 0.25).

    Args:
        noise: alpha and sigma at a timestep.
        answer: what is returned of x, noise, alpha and sigma.
    """

    def __init__(self, noise, answer):
        super().__init__()
        self.noise, self.answer = noise, answer

    def forward(self, z, timestep):
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in self.noise(timestep.double()))
        variance = 0.25 * alpha**2 + sigma**2
        answer = self.answer(0.25 * alpha * z / variance, sigma * z / variance, alpha, sigma)
        return types.SimpleNamespace(sample=answer.to(z.dtype))


def v_of(x, noise, alpha, sigma):
    return alpha * noise - sigma * x


def inverted(diffusers):
    """As for Mochi: time runs to 1000 at data."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return scheduler, OfPixels(lambda k: (k / 1000.0, 1.0 - k / 1000.0), lambda x, noise, *_: x - noise)


def zero_terminal(diffusers):
    """The last entry of its table is larger than the one before."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    table = scheduler.alphas_cumprod.double()
    assert float(table[-1]) > float(table[-2])
    noise = (1.0 / table - 1.0).sqrt()

    def coefficients(k):  # the noise between entries as the scheduler interpolates it
        below = k.floor().clamp(0, 998).long()
        ratio = torch.lerp(noise[below], noise[below + 1], k - below)
        return 1.0 / (1.0 + ratio**2).sqrt(), ratio / (1.0 + ratio**2).sqrt()

    return scheduler, OfPixels(coefficients, v_of)


def continuous(diffusers):
    """Stable Video Diffusion: a quarter of the logarithm of the noise, over a range of its own."""
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip

    def coefficients(k):
        ratio = torch.exp(4.0 * k)
        return 1.0 / (1.0 + ratio**2).sqrt(), ratio / (1.0 + ratio**2).sqrt()

    return scheduler, OfPixels(coefficients, v_of)


CLOCKS = {"inverted": inverted, "zero terminal SNR": zero_terminal, "continuous": continuous}


def test_alphas_of_single_steps_are_refused():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"ends at alpha\^2 = 0.98.*torch.cumprod"):
        adapters.from_eps(lambda z, k: z, (2,), alphas_cumprod=1.0 - betas)
    with pytest.raises(ValueError, match=r"entries .* do not .*float64"):
        adapters.from_eps(lambda z, k: z, (2,), alphas_cumprod=torch.cumprod(1.0 - betas, 0).half())


def test_a_table_of_zero_terminal_snr_is_taken():
    table = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)
    for last, made in ((0.0, 2.0**-24), (2.0**-24, 2.0**-24)):
        model = adapters.from_v(lambda z, k: z, (2,), alphas_cumprod=[*table.tolist(), last])
        assert model.schedule.alphas_cumprod[-1] == made
    last = adapters.from_v(lambda z, k: z, (2,), alphas_cumprod=[0.5, 1e-9, 2.0**-24]).schedule.alphas_cumprod[-1]
    assert last == 5e-10
    with pytest.raises(ValueError, match=r"entries \[1\]"):
        adapters.from_v(lambda z, k: z, (2,), alphas_cumprod=[0.4, 0.4])


def test_a_network_that_looks_up_its_index_is_told_of_nearest():
    class Looking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(100, 2)

        def forward(self, z, k):
            return z + self.table(k)

    options = {"alphas_cumprod": torch.linspace(0.99, 0.01, 100, dtype=torch.float64)}
    with pytest.raises(ndm_ct.PredictorError, match="nearest=True"):
        ndm_ct.sample(adapters.from_eps(Looking(), (2,), **options), 2, method="ddim", steps=2)
    ndm_ct.sample(adapters.from_eps(Looking(), (2,), nearest=True, **options), 2, method="ddim", steps=2)

    def broken(z, k):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        adapters.from_eps(broken, (2,), **options).velocity(torch.zeros(1, 2), 0.5)


@pytest.mark.parametrize("make", [adapters.from_eps, adapters.from_v])
@pytest.mark.parametrize("shape", [(D,), (2, 3, 3)])
def test_a_learned_variance_is_dropped(make, shape):
    """Twice the channels, of which the second half is no part of the flow."""

    def net(z, k):
        return torch.cat([0.5 * z, k.reshape(-1, *(1,) * len(shape)) + 0.0 * z], 1)

    z = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = make(lambda z, k: 0.5 * z, shape, alphas_cumprod=TABLE).velocity(z, 0.4)
    torch.testing.assert_close(make(net, shape, alphas_cumprod=TABLE).velocity(z, 0.4), expected)


def test_noise_says_nothing_at_zero_terminal_snr():
    table = [*torch.linspace(0.99, 0.01, 100, dtype=torch.float64).tolist(), 0.0]
    with pytest.raises(ValueError, match=r"zero terminal SNR.*from_v"):
        adapters.from_eps(lambda z, k: z, (2,), alphas_cumprod=table)


def test_signs_and_ends_of_velocities():
    """dz/dt in our direction is sign times the network, whatever its time."""
    for data_at, sign, expected in ((0, None, 0.3), (1, None, -0.7), (0, -1, -0.3), (1, 1, 0.7)):
        model = adapters.from_velocity(lambda z, t: t[:, None] + 0.0 * z, (D,), data_at=data_at, sign=sign)
        assert float(model.velocity(torch.zeros(1, D), 0.3)[0, 0]) == pytest.approx(expected)


class Output(NamedTuple):
    sample: torch.Tensor
    hidden: None = None


@dataclass
class Held:
    x: torch.Tensor


PACKED = (lambda v: {"v": v}, lambda v: (v,), lambda v: [v, {"loss": 0.0}], Output, Held)


@pytest.mark.parametrize("pack", PACKED)
def test_the_only_tensor_of_an_output_is_taken(pack):
    """By every adapter, by NDM itself and by guidance."""
    torch.manual_seed(0)
    z, t = torch.randn(3, 2), torch.tensor(0.4, dtype=torch.float64)
    made = (
        partial(adapters.from_velocity, event_shape=(2,)), partial(adapters.from_denoiser, event_shape=(2,)),
        partial(adapters.from_eps, event_shape=(2,), alphas_cumprod=[0.9, 0.5, 0.1]),
        partial(adapters.from_score, event_shape=(2,), schedule=schedules.VariancePreserving(0.1, 20.0)),
        lambda net: ndm_ct.NDM(net, (2,)),
        lambda net: ndm_ct.guided(ndm_ct.NDM(net, (2,)), 2.0, null={"y": torch.zeros(3)}),
    )  # fmt: skip
    for make in made:
        found, expected = (make(lambda z, t, y, put=put: put(torch.sin(z) + y[:, None])) for put in (pack, lambda v: v))
        y = torch.ones(3)
        torch.testing.assert_close(found.predict_x(z, t, y=y), expected.predict_x(z, t, y=y), rtol=0.0, atol=0.0)


def test_an_output_of_several_tensors_is_asked_about():
    for make in (adapters.from_velocity, ndm_ct.NDM):
        for pack in (lambda z: {"a": z, "b": z}, lambda z: (z, z), lambda z: None, lambda z: z.numpy()):
            with pytest.raises(ndm_ct.PredictorError, match=r"returned .* expected (a|one) tensor .* dataclass"):
                make(lambda z, t, pack=pack: pack(z), (2,)).predict_x(torch.zeros(3, 2), torch.tensor(0.4).double())


def test_a_graph_of_torch_export_is_a_network():
    """It has no train() and eval()."""
    net = ndm_ct.nn.MLP(2, width=8).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    given = (torch.randn(4, 2), torch.rand(4))
    graph = torch.export.export(net, given, dynamic_shapes=({0: rows}, {0: rows}), strict=False).module()
    found, expected = (
        ndm_ct.sample(ndm_ct.NDM(each, (2,), checks=False), 3, method="euler", steps=4, generator=0)
        for each in (graph, net)
    )
    torch.testing.assert_close(found, expected)
