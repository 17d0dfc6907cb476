"""Velocity, score and samplers on a grid as programs of torch.export and ONNX Runtime: the same numbers as eager."""

import contextlib
import io

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import schedules
from ndm_ct.samplers import FixedGrid

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of its exporters
ROWS = torch.export.Dim("rows", min=1, max=64)
Z, T = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.4, 0.6, 0.9])
OTHER = torch.randn(7, 2, generator=torch.Generator().manual_seed(2)), torch.linspace(0.1, 0.95, 7)


class Method(nn.Module):
    """A method of a model as a module."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, z, t):
        return getattr(self.model, self.name)(z, t)


def model():
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, width=16))
    made = ndm_ct.NDM(net, (2,), schedule=schedules.LinearLogSNR(-5.0, 4.0)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def in_onnx_runtime(module, inputs, dynamic, given, folder):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(module, inputs, str(folder / "m.onnx"), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = runtime.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (output,) = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    return torch.from_numpy(output)


@pytest.mark.parametrize("name", ["velocity", "score"])
def test_velocity_and_score_are_exported(name):
    module = Method(model(), name)
    program = torch.export.export(module, (Z, T), dynamic_shapes=({0: ROWS}, {0: ROWS}))
    torch.testing.assert_close(program.module()(*OTHER), module(*OTHER), rtol=1e-6, atol=1e-6)
    one_time = torch.export.export(module, (Z, torch.tensor(0.5, dtype=torch.float64)))
    torch.testing.assert_close(
        one_time.module()(Z, torch.tensor(0.7, dtype=torch.float64)), module(Z, 0.7), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"method": "ddim"}, {"method": "unipc"}, {"method": "heun", "denoise": True}])
def test_a_sampler_on_a_grid_is_exported(options):
    made = model()
    module = FixedGrid(made, steps=3, **options).eval()
    program = torch.export.export(module, (Z,), dynamic_shapes=({0: ROWS},))
    torch.testing.assert_close(program.module()(OTHER[0]), module(OTHER[0]), rtol=1e-6, atol=1e-6)
    walked = ndm_ct.samplers.base.walk(module.sampler, Z, torch.tensor(module.times, dtype=torch.float64),
                                       denoise=module.denoise)  # fmt: skip
    torch.testing.assert_close(module(Z), walked)


@pytest.mark.parametrize(
    "method", ["ddpm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpmpp_2m_sde", "langevin", "pc"))]
)
def test_a_stochastic_sampler_is_exported_for_any_number_of_rows(method):
    module = FixedGrid(model(), method, steps=3).eval()
    program = torch.export.export(module, (Z,), dynamic_shapes=({0: ROWS},)).module()
    found = []
    for sampler in (program, module):
        torch.manual_seed(0)
        found.append(sampler(OTHER[0]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert not torch.equal(program(OTHER[0]), found[0])  # new noise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["velocity", "score", "ddim"])
def test_onnx_runtime_gives_the_same_numbers(name, tmp_path):
    if name == "ddim":
        module, inputs, given = FixedGrid(model(), "ddim", steps=3).eval(), (Z,), OTHER[:1]
    else:
        module, inputs, given = Method(model(), name), (Z, T), OTHER
    with torch.no_grad():
        expected = module(*given)
    found = in_onnx_runtime(module, inputs, tuple({0: ROWS} for _ in inputs), given, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"method='ddimm' is unknown; did you mean 'ddim'\?"):
        FixedGrid(model(), "ddimm", steps=2)
