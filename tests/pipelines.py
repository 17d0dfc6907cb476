"""What the pipelines of diffusers give their networks as time, and the sign they take of the answer.

The statements of a pipeline's denoising loop that lead to the network's time are executed as they stand, for a timestep
of the scheduler; whether the answer is negated before the scheduler's step is read off the statements after the call.
"""

import ast
import types
import warnings

import torch


def clock(source, timestep, steps=1000):
    """The network's time at a timestep of the scheduler, and the sign of its answer, in the source of a pipeline."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    functions = [each for node in classes for each in node.body if getattr(each, "name", "") == "__call__"]
    function = next(each for each in functions if any(_call(node) is not None for node in _flat(each.body, loops=True)))
    loops = (node.body for node in ast.walk(function) if isinstance(node, ast.For) and _names_t(node.target))
    # A block of a modular pipeline is the body of a loop itself.
    statements = list(_flat(next(loops, function.body), loops=True))
    at = next(k for k, statement in enumerate(statements) if _call(statement) is not None)
    names = _environment(timestep, steps)
    for statement in statements[:at]:
        if isinstance(statement, ast.Assign | ast.AugAssign):
            _run(statement, names)
    time = eval(compile(ast.Expression(_time(_call(statements[at]))), "<pipeline>", "eval"), names)
    return float(torch.as_tensor(time).double().flatten()[0]), -1 if _negated(statements[at:]) else 1


def _names_t(target):
    return any(isinstance(node, ast.Name) and node.id in ("t", "t_sched") for node in ast.walk(target))


def _flat(body, loops=False):
    """Statements in order, those of blocks too, and of loops if asked for."""
    for statement in body:
        if isinstance(statement, ast.With) or (loops and isinstance(statement, ast.For)):
            yield from _flat(statement.body, loops)
        elif isinstance(statement, ast.If):
            yield from _flat(statement.body, loops)
            yield from _flat(statement.orelse, loops)
        else:
            yield statement


def _call(statement):
    """The call of the network in a statement, if there is one."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and _is_network(ast.unparse(node.func).rsplit(".", 1)[-1]):
            keywords = {keyword.arg for keyword in node.keywords}
            if keywords & {"timestep", "timesteps"} or len(node.args) > 1:
                return node
    return None


def _is_network(name):
    return name in ("transformer", "unet", "current_model", "model")


def _time(call):
    for keyword in call.keywords:
        if keyword.arg in ("timestep", "timesteps"):
            return keyword.value
    return call.args[1]


def _environment(timestep, steps):
    class Anything:
        """Attributes of attributes, enough for the loop's arithmetic."""

        def __getattr__(self, name):
            return Anything()

        def __call__(self, *args, **kwargs):
            return Anything()

    config = types.SimpleNamespace(num_train_timesteps=steps)
    owner = Anything()
    owner.scheduler = types.SimpleNamespace(config=config, scale_model_input=lambda x, t: x)
    owner.transformer = types.SimpleNamespace(
        dtype=torch.float32, config=types.SimpleNamespace(timestep_scale=1.0, in_channels=1)
    )
    owner.guidance_scale, owner.do_true_cfg = 1.0, False
    owner.do_classifier_free_guidance, owner.interrupt = False, False
    batch, prompt = torch.zeros(1, 1, 1, 1), types.SimpleNamespace(dtype=torch.float32, device="cpu")
    here = {
        "torch": torch, "self": owner, "t": torch.tensor(float(timestep)), "t_sched": timestep, "i": 0, "batch_size": 1,
        "device": torch.device("cpu"), "timesteps": torch.tensor([float(timestep)]), "num_train_timesteps": steps,
        "dtype": torch.float32, "transformer_dtype": torch.float32, "prompt_embeds": prompt,
    }  # fmt: skip
    ones = dict.fromkeys(("num_videos_per_prompt", "num_images_per_prompt", "total_batch_size"), 1)
    return here | ones | dict.fromkeys(("latents", "latent", "latent_model_input"), batch)


def _run(statement, names):
    """Execute one statement of the loop; what needs more than the loop's own names is left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(ast.Module([statement], []), "<pipeline>", "exec"), names)
    except Exception:  # names of prompts and masks
        return


def _negated(statements):
    for statement in statements:
        text = ast.unparse(statement)
        if isinstance(statement, ast.Assign) and text.partition(" = ")[2].startswith("-"):
            return True
        if "scheduler.step(" in text:
            return "step(-" in text
    return False
