"""The clock of every class of diffusers' networks for flow matching, against what its pipeline does."""

import ast
import functools
import inspect
import re
import types
from pathlib import Path

import pytest
import torch
from pipelines import clock

import ndm_ct
from ndm_ct import adapters
from ndm_ct.adapters.clocks import CLOCKS

diffusers = pytest.importorskip("diffusers")
FOLDER = Path(diffusers.__file__).parent
SOURCES = {path: path.read_text() for path in sorted((FOLDER / "pipelines").rglob("pipeline_*.py"))}
BLOCKS = {path: path.read_text() for path in sorted((FOLDER / "modular_pipelines").rglob("denoise.py"))}
VARIANTS = re.compile(
    "inpaint|img2img|controlnet|i2v|image2|video2|fill|control|redux|kontext|prior|omni|forcing|dfr|edit"
)
SAMPLE = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)


def classes():
    """Networks of diffusers by name, without those that another class inherits."""
    found = {}
    for path in sorted([*(FOLDER / "models/transformers").glob("*.py"), *(FOLDER / "models/unets").glob("*.py")]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("ModelMixin" in ast.unparse(base) for base in node.bases):
                forward = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "forward"]
                if forward:
                    arguments = forward[0].args.args + forward[0].args.kwonlyargs
                    found[node.name] = [each.arg for each in arguments][1:]
    return found


ALL = classes()


def users():
    """Files of pipelines by the class of network that they take."""
    found = {}
    for path, source in SOURCES.items():
        for annotation in re.findall(r"\b(?:transformer|unet)\w*: ?([^=\n]*)", source):
            for name in set(re.findall(r"\w+", annotation)) & set(ALL):
                found.setdefault(name, {})[path] = None
    for path, source in BLOCKS.items():
        for name in set(re.findall(r'ComponentSpec\("transformer", (\w+)\)', source)) & set(ALL) - set(found):
            found[name] = {path: None}
    return found


USERS = users()
UNITS = {"AceStepTransformer1DModel": 1, "MiniMaxMusic3Transformer1DModel": 1}
"""``num_train_timesteps`` of schedulers that do not count to 1000."""


def scheduler_of(name, **options):
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=UNITS.get(name, 1000), **options)


@functools.cache
def pipeline_clock(name):
    """Time and sign at timestep 300 in the plainest pipeline of flow matching that takes a class."""
    plain = [path for path in USERS[name] if not VARIANTS.search(path.name)] or list(USERS[name])
    sources = SOURCES | BLOCKS
    flow = [path for path in plain if "FlowMatch" in sources[path]] or plain
    source = sources[min(flow, key=lambda path: len(path.name))]
    return clock(source, 300.0 if UNITS.get(name, 1000) == 1000 else 0.3)


def full(name):
    """The name of the class; None if the installed version has none."""
    return next((each for each in (name, f"{name}Model") if each in ALL), None)


KNOWN = [name for name in CLOCKS if full(name)]
FLOWS = [name for name in KNOWN if "UNet" not in name and name not in ("DiTTransformer2D", "Transformer2D")]


def stub(name):
    """A network of this name, with the arguments of the real one's forward, that answers with its time."""
    arguments = ALL[name]
    time = next(each for each in ("timestep", "timesteps", "t") if each in arguments)

    class Stub(torch.nn.Module):
        config = types.SimpleNamespace()

        def forward(self, state, **given):
            state = torch.stack(list(state)) if isinstance(state, list) else state
            return types.SimpleNamespace(sample=state + given[time].reshape(-1, *(1,) * (state.ndim - 1)))

    parameters = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in ["self", *arguments]]
    Stub.forward.__signature__ = inspect.Signature(parameters)
    Stub.__name__, Stub.__module__ = name, "diffusers.models"
    return Stub()


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_the_network_is_called_as_by_its_pipeline(name, inverted):
    """At the scheduler's timestep 300, which is t = 0.3, or 0.7 where the scheduler counts from noise to data."""
    time, sign = pipeline_clock(full(name))
    model = adapters.from_diffusers(stub(full(name)), scheduler_of(full(name), invert_sigmas=inverted), (4,))
    expected = (-sign if inverted else sign) * (SAMPLE + time)
    torch.testing.assert_close(model.velocity(SAMPLE, 0.7 if inverted else 0.3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if "Transformer" in name or "DiT" in name])
def test_no_class_is_read_by_a_guess(name):
    """A class is in the table or refused, and with its unit given it is taken."""
    known = name.removesuffix("Model") in CLOCKS
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if not known:
        if not {"timestep", "timesteps", "t"} & set(ALL[name]):
            return
        with pytest.raises(
            ValueError, match=rf"unit of time of a {name} is not known .* time_scale=, data_at= and sign="
        ):
            adapters.from_diffusers(stub(name), scheduler, (4,))
    model = adapters.from_diffusers(stub(name), scheduler, (4,), time_scale=10.0, data_at=1, sign=1)
    torch.testing.assert_close(model.velocity(SAMPLE, 0.3), SAMPLE + 7.0, rtol=1e-5, atol=1e-5)


NETS = {
    "SD3Transformer2DModel": (
        lambda d: d.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        (4, 8, 8),
        lambda: {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 16)},
    ),
    "FluxTransformer2DModel": (
        lambda d: d.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "pooled_projections": torch.randn(2, 8),
            "txt_ids": torch.zeros(3, 3),
            "img_ids": torch.randn(6, 3),
        },
    ),
    "ChromaTransformer2DModel": (
        lambda d: d.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "txt_ids": torch.zeros(3, 3),
            "img_ids": torch.randn(6, 3),
        },
    ),
    "Lumina2Transformer2DModel": (
        lambda d: d.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            norm_eps=1e-5,
            scaling_factor=1.0,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=32,
        ),
        (4, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 5, 32),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "SanaTransformer2DModel": (
        lambda d: d.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
        ),
        (4, 8, 8),
        lambda: {"encoder_hidden_states": torch.randn(2, 3, 8)},
    ),
    "WanTransformer3DModel": (
        lambda d: d.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=256,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        (4, 2, 8, 8),
        lambda: {"encoder_hidden_states": torch.randn(2, 3, 16)},
    ),
    "QwenImageTransformer2DModel": (
        lambda d: d.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        (16, 16),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_hidden_states_mask": torch.ones(2, 7).long(),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "ZImageTransformer2DModel": (
        lambda d: d.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            qk_norm=True,
            cap_feat_dim=16,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        (4, 8, 8),
        lambda: {"cap_feats": torch.randn(2, 8, 16)},
    ),
    "CogView4Transformer2DModel": (
        lambda d: d.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=4,
            out_channels=4,
            text_embed_dim=8,
            time_embed_dim=8,
            condition_dim=4,
        ),
        (4, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 8, 8),
            "original_size": torch.tensor([[8, 8]] * 2),
            "target_size": torch.tensor([[8, 8]] * 2),
            "crop_coords": torch.tensor([[0, 0]] * 2),
        },
    ),
    "MochiTransformer3DModel": (
        lambda d: d.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            out_channels=None,
            qk_norm="rms_norm",
            text_embed_dim=16,
            time_embed_dim=4,
            activation_fn="swiglu",
            max_sequence_length=16,
        ),
        (4, 2, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 16, 16),
            "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
        },
    ),
    "LTXVideoTransformer3DModel": (
        lambda d: d.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=16,
            qk_norm="rms_norm_across_heads",
        ),
        (8, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "encoder_attention_mask": torch.ones(2, 5),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
    ),
    "HiDreamImageTransformer2DModel": (
        lambda d: d.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=64,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
        (4, 16, 16),
        lambda: {
            "encoder_hidden_states_t5": torch.randn(2, 8, 32),
            "encoder_hidden_states_llama3": torch.randn(2, 2, 8, 16),
            "pooled_embeds": torch.randn(2, 64),
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        lambda d: d.NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            moe_enabled=False,
            capacity_factors=[8.0, 8.0],
        ),
        (16, 16),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_hidden_states_mask": torch.ones(2, 7).long(),
            "img_shapes": [(1, 4, 4)] * 2,
        },
    ),
    "OvisImageTransformer2DModel": (
        lambda d: d.OvisImageTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
            out_channels=4,
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "txt_ids": torch.zeros(3, 3),
            "img_ids": torch.randn(6, 3),
        },
    ),
    "LongCatImageTransformer2DModel": (
        lambda d: d.LongCatImageTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=[4, 4, 8],
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "txt_ids": torch.zeros(3, 3),
            "img_ids": torch.randn(6, 3),
        },
    ),
    "Flux2Transformer2DModel": (
        lambda d: d.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "txt_ids": torch.zeros(3, 4),
            "img_ids": torch.randn(6, 4),
            "guidance_scale": torch.ones(2),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        lambda d: d.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        (4, 1, 4, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "encoder_attention_mask": torch.ones(2, 5),
            "pooled_projections": torch.randn(2, 8),
            "guidance_scale": torch.ones(2) * 6,
        },
    ),
    "AceStepTransformer1DModel": (
        lambda d: d.AceStepTransformer1DModel(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            in_channels=8,
            audio_acoustic_hidden_dim=4,
            sliding_window=4,
        ),
        (6, 4),
        lambda: {"encoder_hidden_states": torch.randn(2, 3, 16), "context_latents": torch.randn(2, 6, 4)},
    ),
    "GlmImageTransformer2DModel": (
        lambda d: d.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=8,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=10,
        ),
        (4, 8, 8),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "prior_token_id": torch.arange(32).reshape(2, 16) % 10,
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "HeliosTransformer3DModel": (
        lambda d: d.HeliosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_dim=(4, 4, 4),
            has_multi_term_memory_patch=False,
        ),
        (4, 2, 8, 8),
        lambda: {"encoder_hidden_states": torch.randn(2, 3, 8)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        lambda d: d.MiniMaxMusic3Transformer1DModel(
            in_channels=4,
            condition_dim=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            ff_inner_dim=16,
            rotary_dim=4,
            fourier_embedding_dim=8,
        ),
        (4, 6),
        lambda: {"encoder_hidden_states": torch.randn(2, 6, 8)},
    ),
    "Flux3Transformer2DModel": (
        lambda d: d.Flux3Transformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        (6, 4),
        lambda: {
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "txt_ids": torch.zeros(3, 4),
            "img_ids": torch.randn(6, 4),
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETS)
def test_small_networks_have_the_velocity_of_their_pipeline(name):
    make, event, conditions = NETS[name]
    assert name.removesuffix("Model") in CLOCKS  # a name that is mistyped must not be skipped
    if name not in ALL:
        pytest.skip("a class of a later version")
    torch.manual_seed(0)
    net = make(diffusers).eval()
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.data += 0.05 * torch.randn_like(parameter)
    cond, z = conditions(), torch.randn(2, *event)
    inverted = name.startswith(("Mochi", "MiniMaxMusic3"))
    model = adapters.from_diffusers(net, scheduler_of(name, invert_sigmas=inverted), event)
    given = {
        key: ndm_ct.shared(value) if isinstance(value, torch.Tensor) and len(value) != 2 else value
        for key, value in cond.items()
    }
    time, sign = pipeline_clock(name)
    with torch.no_grad():
        found = model.velocity(z, 0.7 if inverted else 0.3, **given)
        if "guidance_scale" in cond:
            cond["guidance"] = cond.pop("guidance_scale")
        names, times = inspect.signature(net.forward).parameters, torch.full((2,), time)
        key = next(each for each in ("timestep", "timesteps", "t") if each in names)
        if name.startswith("ZImage"):
            cond = {each: list(value) for each, value in cond.items()}
            expected = torch.stack(net(list(z[:, :, None]), **{key: times}, **cond).sample).squeeze(2)
        else:
            keys = [key, *({"timestep_r"} & set(names))]
            expected = net(z, **dict.fromkeys(keys, times), **cond).sample
    torch.testing.assert_close(found, (-sign if inverted else sign) * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep"])
def test_flow_predictions_of_other_schedulers(name):
    """Their first step from noise: x is z - sigma times the network's output."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(5)
    net = stub("WanTransformer3DModel")
    model = adapters.from_diffusers(net, scheduler, (4,))
    k, sigma = scheduler.timesteps[0], float(scheduler.sigmas[0])
    scheduler._init_step_index(k)
    theirs = scheduler.convert_model_output(net(SAMPLE, timestep=k.reshape(1)).sample, sample=SAMPLE)
    if name == "DEISMultistep":  # it keeps noise
        theirs = SAMPLE - sigma * (SAMPLE + float(k))
    ours = model.predict_x(SAMPLE, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=2e-3)  # their timestep is rounded
    with pytest.raises(ValueError, match=r"prediction_type of .* is 'flow_prediction'"):
        adapters.from_diffusers(net, type(scheduler)(prediction_type="flow_prediction"), (4,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LCM", "TCD", "CMStochasticIterative", "FlowMatchLCM", "SCM"])
def test_schedulers_of_distilled_networks_are_refused(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    with pytest.raises(TypeError, match=f"{name}Scheduler belongs to a distilled network"):
        adapters.from_diffusers(stub("UNet2DModel"), scheduler, (4,))


def test_a_unit_has_no_meaning_for_a_table():
    with pytest.raises(ValueError, match="are for flow matching, but DDPMScheduler has a table"):
        adapters.from_diffusers(stub("UNet2DModel"), diffusers.DDPMScheduler(), (4,), time_scale=1.0)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="nearest=True rounds indices of a table"):
        adapters.from_diffusers(stub("UNet2DModel"), flow, (4,), nearest=True)
    with pytest.raises(ValueError, match="sign must be 1, -1 or None"):
        adapters.from_velocity(lambda z, t: z, (2,), sign=0)


def test_subclasses_count_as_their_parents():
    class Mine(type(stub("FluxTransformer2DModel"))):
        pass

    model = adapters.from_diffusers(Mine(), diffusers.FlowMatchEulerDiscreteScheduler(), (4,))
    torch.testing.assert_close(model.velocity(SAMPLE, 0.3), SAMPLE + 0.3)


def test_sanas_own_scale():
    net = stub("SanaTransformer2DModel")
    net.config.timestep_scale = 0.5
    model = adapters.from_diffusers(net, diffusers.FlowMatchEulerDiscreteScheduler(), (4,))
    torch.testing.assert_close(model.velocity(SAMPLE, 0.3), SAMPLE + 150.0)


def test_event_shapes_are_those_that_come_out():
    def shape(name, **config):
        net = stub(name)
        net.config = types.SimpleNamespace(**config)
        return adapters.from_diffusers(net, diffusers.DDPMScheduler()).event_shape

    assert shape("UNet1DModel", sample_size=64, in_channels=2, out_channels=2) == (2, 64)
    assert shape("UNet2DConditionModel", sample_size=8, in_channels=9, out_channels=4) == (4, 8, 8)
    assert shape("UNet2DConditionModel", sample_size=(8, 6), in_channels=4, out_channels=4) == (4, 8, 6)
    assert shape("DiTTransformer2DModel", sample_size=8, in_channels=4, out_channels=8) == (4, 8, 8)
    with pytest.raises(ValueError, match=r"for videos \(C, frames, H, W\)"):
        shape("UNet3DConditionModel", sample_size=8, in_channels=4, out_channels=4)


def test_an_inpainting_network_gets_its_other_channels():
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    model = adapters.from_diffusers(net, diffusers.DDPMScheduler())
    assert model.event_shape == (1, 8, 8)
    z, mask = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)
    t = torch.tensor(0.4, dtype=torch.float64)
    c = model.schedule(t)
    with torch.no_grad():
        noise = net(torch.cat([z, mask], 1), timestep=torch.full((2,), 0.4 * 999.0)).sample
        found = model.predict_x(z, t, extra_channels=mask)
    torch.testing.assert_close(found, ((z - c.sigma * noise) / c.alpha).float(), rtol=1e-4, atol=1e-4)
    assert ndm_ct.sample(model, 2, method="ddim", steps=2, extra_channels=mask).shape == (2, 1, 8, 8)
