r"""Lossless compression of integers by bits-back coding over the discrete chain, with a stack of range codes (ANS).

A sender pops latents from the stack with q, as if its bits were random, and pushes data and latents with p:

.. math::
    \text{pop } z_1 \sim q(z_1 \mid x),\ z_s \sim q(z_s \mid z_t, x) \qquad
    \text{push } x \text{ with } p(x \mid z_0),\ z_s \text{ with } p(z_s \mid z_t),\ z_1 \text{ with } p(z_1) .

The receiver goes backwards and gets the popped bits back. The stack grows on average by

.. math::
    E_q\Bigl[\log_2 \frac{q(z_1 \mid x) \prod q(z_s \mid z_t, x)}{p(x \mid z_0)\, p(z_1) \prod p(z_s \mid z_t)}\Bigr]

bits per event. That is minus the bound of :func:`ndm_ct.objectives.elbo_discrete` with as many steps. Latents lie on a
grid of an eighth of the step's standard deviation; both q and p are those normals, summed over the cells of the grid.

**The first bits.** The first event pops some 5 (T + 1) d bits that nobody has pushed yet, so the stack begins with
random ones, which stay in the file. Over many events they do not count; for a few of them take fewer steps.

The receiver's network must return the same numbers to the last bit: the same weights, machine and versions. The file
holds digests of weights and data, so a difference is an error and never wrong data.

References:
    Townsend, Bird and Barber, Practical Lossless Compression with Latent Variables using Bits Back Coding,
    https://arxiv.org/abs/1901.04866
    Kingma et al., Variational Diffusion Models, appendix N, https://arxiv.org/abs/2107.00630
    Bamler, constriction, https://arxiv.org/abs/2201.01741
"""

import hashlib
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core.checks import as_time, expand, validate_count
from ndm_ct.model import NDM
from ndm_ct.objectives.terms import times
from ndm_ct.prior import IsotropicNormal
from ndm_ct.quantisation import Quantisation, resolve_quantisation
from ndm_ct.storage.tensors import hash_state, hash_values

__all__ = ["CodecError", "compress", "decompress"]

_MAGIC = b"NDMCT\x00\x01\n"
_CELLS = 8.0
"""Cells of the grid of latents per standard deviation."""

_NEAR, _FAR = 56, 16.0
"""How far latents reach from the mean of q, in cells, and from that of the data, in standard deviations."""

_FIRST_BITS = 6.5
"""Bits per latent at the bottom of the stack: 5.05 are popped on average."""

_DIGEST = 32
_DTYPES = ("uint8", "int8", "int16", "int32", "int64")


class CodecError(RuntimeError):
    """A file that this model cannot decompress: damaged, of another kind, or made with another model."""


def compress(model: NDM, x: Tensor, /, *, quantisation: int | Quantisation, steps: int = 50, rows: int = 1) -> bytes:
    """Compress integers without loss.

    Args:
        model: the model, without conditioning, with the default prior and one volatility for all coordinates.
        x: integers, ``(B, *E)``.
        quantisation: their levels, as in :func:`ndm_ct.bits_per_dim`.
        steps: T, steps of the chain. More of them shorten the code of an event and lengthen the first bits.
        rows: events coded at a time. More of them are faster, and lengthen the first bits as many times.

    Returns:
        The file's content, for :func:`decompress`.

    Raises:
        ImportError: constriction is missing.
        TypeError: x are not integers.
        ValueError: x outside the levels or of another shape; a model that the codec cannot use.

    Example:
        >>> import torch, ndm_ct
        >>> model = ndm_ct.NDM(lambda z, t: 0.5 * z, (4,))
        >>> x = torch.randint(0, 16, (3, 4))
        >>> torch.equal(decompress(model, compress(model, x, quantisation=16, steps=4)), x)
        True
    """
    bins = resolve_quantisation(quantisation)
    bins.validate(x)
    bins.validate_placed(model.adapted)
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or tuple(x.shape[1:]) != model.event_shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected (B, {', '.join(map(str, model.event_shape))}) "
            f"of {', '.join(_DTYPES)}."
        )
    steps, rows = validate_count("steps", steps), validate_count("rows", rows)
    levels = x.long()
    with torch.no_grad(), model.evaluating():
        chain = _Chain(model, bins, steps)
        ranges = chain.ranges(levels)
        first = _noise(0, 2 * (chain.popped(min(rows, len(x))) // 2 + 16)).view(np.uint32)
        stack = _constriction().stream.stack.AnsCoder(first, seal=True)
        for number, part in enumerate(levels.split(rows) if len(x) else ()):
            _whiten(stack, chain.popped(len(part)), number)
            chain.push(stack, part, ranges)
    header = {
        "shape": list(x.shape), "dtype": dtype, "levels": bins.levels, "edges": list(bins.edges), "steps": steps,
        "rows": rows, "ranges": ranges, "model": _fingerprint(model), "data": hash_values([levels]),
    }  # fmt: skip
    words = json.dumps(header).encode()
    content = _MAGIC + len(words).to_bytes(4, "little") + words + stack.get_compressed().astype("<u4").tobytes()
    return content + hashlib.sha256(content).digest()


def decompress(model: NDM, content: bytes, /) -> Tensor:
    """The integers that :func:`compress` was given.

    Args:
        model: the model of the compression.
        content: what :func:`compress` returned.

    Returns:
        Integers ``(B, *E)``, in their dtype.

    Raises:
        TypeError: content is not bytes.
        CodecError: the file is damaged or of another kind, or the model is another one.
    """
    if not isinstance(content, bytes | bytearray | memoryview):
        raise TypeError(f"content must be bytes, got {type(content).__name__}; read the file by Path.read_bytes().")
    header, code = _parsed(bytes(content))
    if header["model"] != _fingerprint(model):
        raise CodecError("the file was compressed with another model: load the one whose weights it was made with.")
    bins = Quantisation(header["levels"], edges=tuple(header["edges"]))
    shape, rows, ranges = header["shape"], header["rows"], header["ranges"]
    sizes = [min(rows, shape[0] - start) for start in range(0, shape[0], rows)]
    differs = CodecError(
        "the network does not return the numbers it returned when the file was made; use the same machine, device, "
        "number of threads and versions of torch."
    )
    parts = [torch.empty(0, *shape[1:], dtype=torch.long, device=model.device)]
    with torch.no_grad(), model.evaluating():
        chain = _Chain(model, bins, header["steps"])
        stack = _constriction().stream.stack.AnsCoder(code)
        for number, size in reversed(list(enumerate(sizes))):
            try:
                parts.insert(1, chain.pop(stack, size, ranges))
            except (KeyError, ValueError) as error:  # a number beyond the grid
                raise differs from error
            _whiten(stack, chain.popped(size), number)
    levels = torch.cat(parts)
    if hash_values([levels]) != header["data"]:
        raise differs
    return levels.to(getattr(torch, header["dtype"]))


class _Chain:
    """The discrete chain on grids of latents.

    Args:
        model: the model.
        bins: the levels.
        steps: T.
    """

    def __init__(self, model: NDM, bins: Quantisation, steps: int) -> None:
        if model.transform.latent or model.noise_scale is not None or not isinstance(model.prior, IsotropicNormal):
            raise ValueError("the codec needs a transform without latents, noise of one size, and the default prior.")
        self.model, self.bins = model, bins
        self.device, self.dtype = model.device or torch.device("cpu"), model.dtype or torch.float32
        grid = times(model, torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device=model.schedule.device))[0]
        self.times = grid.to(self.device)
        c = model.schedule(self.times)
        self.alpha, self.sigma = c.alpha, c.sigma
        stds = model.process.transition(self.times[:-1], self.times[1:])[1]
        if stds.ndim > 1 or not bool((stds > 0.0).all()):
            raise ValueError("the codec needs one volatility above zero for all coordinates.")
        self.stds = torch.cat([stds, self.sigma[-1:]]).tolist()
        self.cells = [std / _CELLS for std in self.stds]

    def popped(self, rows: int) -> int:
        """The largest count of 16-bit numbers that the latents of these events take from the stack.

        Args:
            rows: number of events.
        """
        return math.ceil(rows * math.prod(self.model.event_shape) * len(self.times) * _FIRST_BITS / 16.0)

    def ranges(self, levels: Tensor) -> list[int]:
        """The largest number of a cell at every time."""
        largest = []
        for k, t in enumerate(self.times):
            parts = levels.split(1024) if len(levels) else ()
            reach = [float(self._means(self.bins.centres(part, self.dtype), t).abs().max()) for part in parts]
            furthest = max(float(self.model.prior.scale), *reach, 0.0)
            largest.append(math.ceil((furthest + _FAR * float(self.sigma[k])) / self.cells[k]))
        return largest

    def _means(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.process.mean(x, t.expand(len(x))).double()

    def push(self, stack: Any, levels: Tensor, ranges: list[int]) -> None:
        """Code events ``(b, *E)``."""
        x = self.bins.centres(levels, self.dtype).to(self.device)
        latents: dict[int, Tensor] = {}
        last = len(self.times) - 1
        for k in range(last, -1, -1):
            cell = self._cell(self._posterior(x, latents.get(k + 1), k), k)
            middle = np.rint(cell)
            found = stack.decode(self._near(), cell - middle, self._std(x)) + middle
            latents[k] = self._tensor(found, k, x)
        symbols = levels.flatten().to(torch.int32).cpu().numpy()
        stack.encode_reverse(symbols, self._categories(), self._odds(latents[0]))
        for k in range(last + 1):
            mean, std = self._model(latents.get(k + 1), k, x)
            stack.encode_reverse(self._numbers(latents[k], k), self._latent(k, ranges), self._cell(mean, k), std)

    def pop(self, stack: Any, size: int, ranges: list[int]) -> Tensor:
        """Undo :meth:`push`: events ``(size, *E)``, int64."""
        like = torch.empty(size, *self.model.event_shape, dtype=self.dtype, device=self.device)
        latents: dict[int, Tensor] = {}
        last = len(self.times) - 1
        for k in range(last, -1, -1):
            mean, std = self._model(latents.get(k + 1), k, like)
            latents[k] = self._tensor(stack.decode(self._latent(k, ranges), self._cell(mean, k), std), k, like)
        symbols = stack.decode(self._categories(), self._odds(latents[0]))
        levels = torch.from_numpy(symbols.astype(np.int64)).reshape(like.shape).to(self.device)
        x = self.bins.centres(levels, self.dtype)
        for k in range(last + 1):
            cell = self._cell(self._posterior(x, latents.get(k + 1), k), k)
            middle = np.rint(cell)
            found = self._numbers(latents[k], k) - middle.astype(np.int32)
            stack.encode_reverse(found, self._near(), cell - middle, self._std(x))
        return levels

    def _posterior(self, x: Tensor, z: Tensor | None, k: int) -> Tensor:
        """The mean of q at time k, given the latents after it."""
        if z is None:
            return self._means(x, self.times[k])
        path = self.model.process.along(x)
        s, t = (self.times[j].expand(len(x)) for j in (k, k + 1))
        return self.model.process.posterior(z, path.F(s), path.F(t), s, t)[0].double()

    def _model(self, z: Tensor | None, k: int, like: Tensor) -> tuple[Tensor, np.ndarray]:
        """Mean and standard deviations, in cells, of p at time k given the latents after it."""
        if z is None:
            scale = float(self.model.prior.scale) / self.cells[k]
            return torch.zeros_like(like, dtype=torch.float64), np.full(like.numel(), scale)
        s, t = (self.times[j].expand(len(z)) for j in (k, k + 1))
        F_t, F_s = self.model.frozen(z, t, s)
        return self.model.process.posterior(z, F_s, F_t, s, t)[0].double(), self._std(like)

    def _odds(self, z: Tensor) -> np.ndarray:
        """p(x | z_0) of every level, ``(b d, L)``."""
        t = self.times[:1]
        gamma = float(self.model.schedule(t).gamma)
        centres = self.bins.centres(torch.arange(self.bins.levels, device=z.device), torch.float64)
        place = z.double().flatten()[:, None] / expand(self.alpha[:1], z.double().flatten()[:, None])
        return torch.softmax(-0.5 * math.exp(-gamma) * (place - centres).square(), 1).cpu().numpy()

    def _categories(self) -> Any:
        return _constriction().stream.model.Categorical(perfect=False)

    def _latent(self, k: int, ranges: list[int]) -> Any:
        return _constriction().stream.model.QuantizedGaussian(-ranges[k], ranges[k])

    def _near(self) -> Any:
        """Normal laws about zero, for q: far cells, each with a least probability, would draw latents that p denies."""
        return _constriction().stream.model.QuantizedGaussian(-_NEAR, _NEAR)

    def _std(self, like: Tensor) -> np.ndarray:
        return np.full(like.numel(), _CELLS)

    def _cell(self, mean: Tensor, k: int) -> np.ndarray:
        return (mean / self.cells[k]).flatten().cpu().numpy()

    def _tensor(self, numbers: np.ndarray, k: int, like: Tensor) -> Tensor:
        return (torch.from_numpy(numbers.astype(np.float64)) * self.cells[k]).reshape(like.shape).to(like)

    def _numbers(self, z: Tensor, k: int) -> np.ndarray:
        return (z.double() / self.cells[k]).round().flatten().to(torch.int32).cpu().numpy()


def _noise(number: int, count: int) -> np.ndarray:
    """The same ``count`` numbers of 16 bits everywhere and for ever."""
    raw = np.random.PCG64(number).random_raw((count + 3) // 4)
    return np.asarray(raw).astype("<u8").view(np.uint16)[:count]


def _whiten(stack: Any, count: int, number: int) -> None:
    """Exchange the top of the stack by its sum (XOR) with known noise; doing it twice changes nothing.

    What a model finds improbable leaves bits that are not random, and latents popped from them would be improbable too.
    """
    family = _constriction().stream.model.Uniform(2**16)
    top = stack.decode(family, count)
    stack.encode_reverse(top ^ _noise(number + 1, count).astype(np.int32), family)


def _parsed(content: bytes) -> tuple[dict[str, Any], np.ndarray]:
    body, place = content[:-_DIGEST], len(_MAGIC) + 4
    if not content.startswith(_MAGIC):
        raise CodecError("this is no file of ndm_ct.codec.compress: its first bytes are others.")
    if len(content) < place + _DIGEST or hashlib.sha256(body).digest() != content[-_DIGEST:]:
        raise CodecError("the file is damaged: its content does not fit its digest.")
    size = int.from_bytes(content[len(_MAGIC) : place], "little")
    return json.loads(body[place : place + size]), np.frombuffer(body[place + size :], "<u4").astype(np.uint32)


def _fingerprint(model: NDM) -> str:
    """A digest of what the model computes with: weights, schedule, prediction."""
    with torch.no_grad():
        c = model.schedule(as_time([0.1, 0.5, 0.9], model.schedule.device))
    numbers = torch.stack([c.alpha, c.sigma]).cpu().numpy().round(12).tolist()
    return hash_state(model.state_dict(), f"{model.event_shape} {model.prediction} {model.t_min!r} {numbers}")


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError('the codec needs constriction: pip install "ndm-ct[codec]".') from error
    return constriction
