"""Functions of tensors: functional, linalg, fft, special, indexing, dtypes, control flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as f

from tests.zoo.case import Case, Model

X = torch.randn(4, 6)
Y = torch.randn(4, 6)
SQUARE = torch.randn(5, 5)
POSITIVE = SQUARE @ SQUARE.T + 5 * torch.eye(5)
BATCH = torch.randn(2, 5, 5)
INDEX = torch.tensor([[0, 1, 2], [3, 0, 1]])
IMAGE = torch.randn(2, 4, 8, 8)
SIGNAL = torch.randn(2, 64)
INTS = torch.randint(-100, 100, (4, 6), dtype=torch.int8)


def words(text: str) -> list[str]:
    return text.split()


def elementwise(name: str) -> Callable[..., Any]:
    return getattr(torch, name, None) or getattr(torch.special, name)


_UNARY = words(
    """
    abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv
    exp exp2 expm1 floor frac i0 isfinite isinf isnan isneginf isposinf isreal lgamma log
    log10 log1p log2 logit nan_to_num neg positive rad2deg reciprocal relu round rsqrt sgn
    sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc bessel_j0 bessel_j1
    bessel_y0 bessel_y1 entr erfcx i0e i1 i1e log_ndtr ndtr ndtri modified_bessel_i0
    modified_bessel_k0 scaled_modified_bessel_k0 spherical_bessel_j0 airy_ai logical_not
    """
)
_BINARY = words(
    """
    add atan2 copysign div eq float_power floor_divide fmax fmin fmod ge gt heaviside hypot
    le logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul ne
    nextafter pow remainder sub true_divide xlogy dist cdist inner xlog1py zeta gammainc
    gammaincc isclose
    """
)
_REDUCTIONS = words(
    """
    all any amax amin argmax argmin argsort count_nonzero cummax cummin cumprod cumsum max
    mean median min mode nanmean nanmedian nansum prod sort std std_mean sum var var_mean
    msort norm aminmax diff
    """
)

_FUNCTIONAL = {
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (BATCH, BATCH)),
    "einsum trace": (lambda a: torch.einsum("bii->b", a), (BATCH,)),
    "einsum outer": (lambda a, b: torch.einsum("i,j->ij", a[0], b[1]), (X, Y)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1], [1])), (X, Y)),
    "one_hot": (lambda i: f.one_hot(i, 5), (INDEX,)),
    "one_hot of numbers": (lambda i: f.one_hot(i, num_classes=7).float().sum(0), (INDEX,)),
    "topk": (lambda x: torch.topk(x, 3), (X,)),
    "kthvalue": (lambda x: torch.kthvalue(x, 2), (X,)),
    "quantile": (lambda x: torch.quantile(x, 0.3, dim=1), (X,)),
    "quantiles": (lambda x, q: torch.quantile(x, q, dim=1), (X, torch.tensor([0.1, 0.9]))),
    "nanquantile": (lambda x: torch.nanquantile(x, 0.5, dim=0, keepdim=True), (X,)),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 1), (X,)),
    "logsumexp": (lambda x: torch.logsumexp(x, (0, 1)), (X,)),
    "searchsorted": (lambda x, v: torch.searchsorted(x.sort(1).values, v), (X, Y)),
    "bucketize": (lambda x, b: torch.bucketize(x, b, right=True), (X, torch.arange(-2.0, 3.0))),
    "gather": (lambda x, i: x.gather(1, i), (X, INDEX)),
    "scatter": (lambda x, i: x.scatter(1, i, 3.0), (X, INDEX)),
    "scatter_add": (lambda x, i, y: x.scatter_add(1, i, y), (X, INDEX, Y)),
    "scatter_reduce": (lambda x, i, y: x.scatter_reduce(1, i, y, "amax"), (X, INDEX, Y)),
    "index_add": (lambda x, i, y: x.index_add(0, i, y), (X, torch.tensor([0, 0, 3, 1]), Y)),
    "index_copy": (lambda x, i, y: x.index_copy(0, i, y), (X, torch.tensor([2, 0, 3, 1]), Y)),
    "index_select": (lambda x, i: x.index_select(1, i), (X, INDEX[0])),
    "index by tensors": (lambda x, i: x[i, :, None], (X, INDEX)),
    "index by two tensors": (lambda x, i: x[i, i + 1], (X, INDEX)),
    "index_put": (lambda x, i, y: x.index_put((i[0],), y[:3], accumulate=True), (X, INDEX, Y)),
    "mask assignment": (lambda x: _masked(x), (X,)),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -math.inf), (X,)),
    "masked_scatter": (lambda x, y: x.masked_scatter(x > 0, y), (X, Y)),
    "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(1), 1), (X,)),
    "slice assignment": (lambda x: _assigned(x), (X,)),
    "strided slices": (lambda x: x[1:, ::2] + x[:-1, 1::2], (X,)),
    "select, narrow, unfold": (lambda x: x.unfold(1, 3, 2).select(1, 0).narrow(1, 0, 2), (X,)),
    "where": (lambda x, y: torch.where(x > y, x, 0.0), (X, Y)),
    "clamp": (lambda x: x.clamp(-0.5, 0.5).clamp(min=-0.1).clamp_max(0.3), (X,)),
    "cat, stack, tile": (lambda x, y: torch.cat([torch.stack([x, y]).tile(1, 2, 1)], 1), (X, Y)),
    "meshgrid": (lambda x: torch.meshgrid(x[0], x[:, 0], indexing="xy"), (X,)),
    "cartesian_prod": (lambda x: torch.cartesian_prod(x[0], x[1]), (X,)),
    "combinations": (lambda x: torch.combinations(x[0], 2), (X,)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (X,)),
    "repeat_interleave by tensor": (
        lambda x, n: x.repeat_interleave(n, 0, output_size=7),
        (X, torch.tensor([1, 2, 0, 4])),
    ),
    "roll, flip, rot90": (lambda x: x.roll(2, 1).flip(0).rot90(1), (X,)),
    "tril, triu, diag": (lambda x: x.tril() + x.triu(1) + x.diagonal().diag_embed(), (SQUARE,)),
    "block_diag": (lambda x, y: torch.block_diag(x, y), (X, Y)),
    "kron": (lambda x, y: torch.kron(x[:2], y[:2]), (X, Y)),
    "vander": (lambda x: torch.vander(x[0], 4), (X,)),
    "histc": (lambda x: torch.histc(x, 8, -2.0, 2.0), (X,)),
    "nonzero_static": (lambda x: torch.nonzero_static(x > 0, size=30), (X,)),
    "unravel_index": (lambda i: torch.unravel_index(i, (2, 2)), (INDEX,)),
    "cov and corrcoef": (lambda x: torch.cov(x) + torch.corrcoef(x), (X,)),
    "trapezoid": (lambda x: torch.trapezoid(x, dx=0.1), (X,)),
    "gradient": (lambda x: torch.gradient(x, dim=1), (X,)),
    "interp of weights": (lambda x, y: torch.lerp(x, y, 0.3), (X, Y)),
    "addcmul and addcdiv": (lambda x, y: torch.addcmul(x, x, y).addcdiv(x, y.abs() + 1), (X, Y)),
    "renorm": (lambda x: x.renorm(2, 0, 1.0), (X,)),
    "cdist": (lambda x, y: torch.cdist(x, y, p=1.0), (X, Y)),
    "pdist": (lambda x: f.pdist(x), (X,)),
    "normalize": (lambda x: f.normalize(x, dim=1), (X,)),
    "gumbel-free sampling by argmax": (lambda x: f.softmax(x, -1).argmax(-1), (X,)),
    "straight-through": (lambda x: (x.round() - x).detach() + x, (X,)),
    "tensors made inside": (
        lambda x: x + torch.arange(6) + torch.linspace(0, 1, 6) + torch.tensor([1.5]),
        (X,),
    ),
    "full, zeros, eye": (
        lambda x: x.new_full((6, 4), 2.0).T + torch.eye(4, 6) + torch.zeros_like(x),
        (X,),
    ),
    "unflatten, movedim": (lambda x: x.unflatten(1, (2, 3)).movedim(0, 2), (X,)),
    "view as another dtype": (lambda x: x.view(torch.int32), (X,)),
    "numbers as arguments": (lambda x, n, s=2.0, flag=True: x * n + s if flag else x, (X, 3)),
    "split and chunk": (lambda x: [*x.split([1, 3], 0), *x.chunk(4, 1), *x.tensor_split(3)], (X,)),
    "vmap": (lambda x: torch.vmap(lambda row: row.softmax(0) @ row)(x), (X,)),
    "gradients": (lambda x: torch.func.grad(lambda v: (v**3).sum())(x), (X,)),
    "jacobian": (lambda x: torch.func.jacrev(lambda v: v**2)(x[0]), (X,)),
    "unrolled loop": (lambda x: _iterated(x, 5), (X,)),
    "no_grad inside": (lambda x: _no_grad(x), (X,)),
    "autocast inside": (lambda x, y: _autocast(x, y), (X, Y)),
    "chain of in-place writes": (lambda x: _in_place(x), (X,)),
}
_VISION = {
    "grid_sample": (lambda x, g: f.grid_sample(x, g), (IMAGE, torch.rand(2, 5, 5, 2) * 2 - 1)),
    "grid_sample nearest": (
        lambda x, g: f.grid_sample(x, g, "nearest", "border", True),
        (IMAGE, torch.rand(2, 5, 5, 2) * 2 - 1),
    ),
    "affine_grid": (lambda t: f.affine_grid(t, (2, 4, 8, 8)), (torch.randn(2, 2, 3),)),
    "interpolate antialias": (
        lambda x: f.interpolate(x, (5, 5), mode="bilinear", antialias=True),
        (IMAGE,),
    ),
    "interpolate area": (lambda x: f.interpolate(x, 4, mode="area"), (IMAGE,)),
    "pad modes": (
        lambda x: f.pad(f.pad(x, (1, 2, 1, 2), "replicate"), (1, 1), "constant", 3.0),
        (IMAGE,),
    ),
    "unfold and fold": (lambda x: f.fold(f.unfold(x, 2, stride=2), (8, 8), 2, stride=2), (IMAGE,)),
    "conv with computed weights": (
        lambda x, w: f.conv2d(x, w, padding=1),
        (IMAGE, torch.randn(3, 4, 3, 3)),
    ),
    "attention": (lambda q: f.scaled_dot_product_attention(q, q, q, is_causal=True), (IMAGE,)),
    "attention with mask": (
        lambda q: f.scaled_dot_product_attention(
            q, q, q, torch.ones(8, 8).tril().bool(), scale=0.2
        ),
        (IMAGE,),
    ),
    "grouped attention": (
        lambda q: f.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True),
        (IMAGE,),
    ),
    "channels_last": (
        lambda x: (x.to(memory_format=torch.channels_last) * 2).contiguous(),
        (IMAGE,),
    ),
    "non-maximum suppression by scores": (lambda b: _suppress(b), (torch.rand(6, 4),)),
}
_FREQUENCIES = {
    "fft": (lambda x: torch.fft.ifft(torch.fft.fft(x)).real, (SIGNAL,)),
    "rfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=64), (SIGNAL,)),
    "fft2": (lambda x: torch.fft.ifft2(torch.fft.fft2(x, norm="ortho")).real, (IMAGE,)),
    "rfft2": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (IMAGE,)),
    "fftn": (lambda x: torch.fft.fftn(x).abs(), (IMAGE,)),
    "hfft": (lambda x: torch.fft.hfft(torch.fft.ihfft(x)), (SIGNAL,)),
    "fftshift": (lambda x: torch.fft.fftshift(torch.fft.fft(x)).angle(), (SIGNAL,)),
    "fftfreq": (lambda x: x * torch.fft.fftfreq(64), (SIGNAL,)),
    "stft": (
        lambda x: torch.stft(x, 16, window=torch.hann_window(16), return_complex=True).abs(),
        (SIGNAL,),
    ),
    "istft": (
        lambda x: torch.istft(
            torch.stft(x, 16, window=torch.hann_window(16), return_complex=True),
            16,
            window=torch.hann_window(16),
        ),
        (SIGNAL,),
    ),
    "complex numbers": (lambda x, y: torch.view_as_real(torch.complex(x, y) ** 2), (X, Y)),
    "complex rotation": (
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.view(4, 3, 2)) * torch.polar(torch.ones(3), torch.arange(3.0))
        ).flatten(1),
        (X,),
    ),
    "complex output": (lambda x, y: torch.complex(x, y).conj() @ torch.complex(y, x).mT, (X, Y)),
    "convolution by fft": (
        lambda x, k: torch.fft.irfft(torch.fft.rfft(x, 128) * torch.fft.rfft(k, 128), 128)[:, :64],
        (SIGNAL, SIGNAL),
    ),
}
_LINALG = {
    "inv": (torch.linalg.inv, (POSITIVE,)),
    "pinv": (lambda x: torch.linalg.pinv(x), (X,)),
    "det": (torch.linalg.det, (BATCH,)),
    "slogdet": (lambda x: torch.linalg.slogdet(x), (POSITIVE,)),
    "solve": (lambda a, b: torch.linalg.solve(a, b), (POSITIVE, SQUARE)),
    "lstsq": (
        lambda a, b: torch.linalg.lstsq(a, b).solution,
        (torch.randn(6, 3), torch.randn(6, 2)),
    ),
    "cholesky": (torch.linalg.cholesky, (POSITIVE,)),
    "cholesky_solve": (
        lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a)),
        (POSITIVE, SQUARE),
    ),
    "triangular": (
        lambda a, b: torch.linalg.solve_triangular(a.tril() + torch.eye(5), b, upper=False),
        (POSITIVE, SQUARE),
    ),
    "qr": (lambda x: torch.linalg.qr(x)[1].abs(), (SQUARE,)),
    "svd": (lambda x: torch.linalg.svd(x, full_matrices=False)[1], (X,)),
    "svdvals": (torch.linalg.svdvals, (X,)),
    "eigh": (lambda x: torch.linalg.eigh(x)[0], (POSITIVE,)),
    "eigvalsh": (torch.linalg.eigvalsh, (POSITIVE,)),
    "eig": (lambda x: torch.linalg.eig(x)[0].abs().sort().values, (SQUARE,)),
    "matrix_exp": (torch.linalg.matrix_exp, (BATCH,)),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 3), (BATCH,)),
    "matrix_rank": (torch.linalg.matrix_rank, (POSITIVE,)),
    "norms": (lambda x: torch.linalg.norm(x) + torch.linalg.matrix_norm(x, 1), (SQUARE,)),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 3, dim=1), (X,)),
    "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), (SQUARE,)),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, x, x]), (SQUARE,)),
    "cross": (lambda x, y: torch.linalg.cross(x[:, :3], y[:, :3]), (X, Y)),
    "lu": (lambda x: torch.linalg.lu(x)[2], (SQUARE,)),
    "lu_solve": (
        lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
        (POSITIVE, SQUARE),
    ),
    "householder": (lambda x: torch.linalg.householder_product(*torch.geqrf(x)).abs(), (SQUARE,)),
    "baddbmm": (lambda a, b: torch.baddbmm(a, b, b, beta=0.5), (BATCH, BATCH)),
    "addmm": (lambda a, b: torch.addmm(a, b, b, alpha=2), (SQUARE, POSITIVE)),
    "mv and ger": (lambda a: torch.outer(a.mv(a[0]), a[1]), (SQUARE,)),
}
_DTYPES = {
    "bfloat16": (lambda x: (x.bfloat16() @ x.bfloat16().T).softmax(-1), (X,)),
    "float16": (lambda x: (x.half() * 2).sigmoid().float(), (X,)),
    "float64": (lambda x: x.double().exp().sum(), (X,)),
    "int8 arithmetic": (
        lambda q, s: (q.to(torch.int32) - 3).float() * s @ q.float().T,
        (INTS, torch.tensor(0.1)),
    ),
    "quantise and dequantise": (lambda x: _quantised(x), (X,)),
    "fake quantisation": (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
        (X,),
    ),
    "int matmul": (lambda q: q.int() @ q.int().T, (INTS,)),
    "bits": (lambda q: ((q & 15) | (q << 4)) ^ (q >> 1), (INTS,)),
    "booleans": (lambda x: ((x > 0) & ~(x > 1) | (x < -1)).any(1), (X,)),
    "uint8 image": (lambda x: (x.clamp(0, 1) * 255).to(torch.uint8), (X,)),
    "packed int4": (lambda q: _unpacked(q), (INTS.to(torch.uint8),)),
    "mixed promotion": (lambda x, i: x[:2, :3] * i + i.double(), (X, INDEX)),
    "bfloat16 in": (lambda x: x.relu() + 1, (X.bfloat16(),)),
    "scalars out": (lambda x: {"sum": x.sum(), "n": x.shape[0], "share": 0.5}, (X,)),
    "None in and out": (lambda x, mask=None: (x, mask), (X, None)),
}


def _masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[y < 0] = 0
    y[y > 1] = 2
    return y


def _assigned(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(6, 8)
    y[1:5, :6] = x
    y[:, -1] = 7
    y[0, ::2] += 1
    return y


def _in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.add_(1).mul_(2).relu_()
    y[1].copy_(y[0])
    y.view(-1)[3:5].fill_(9)
    return y.t_().contiguous()


def _iterated(x: torch.Tensor, count: int) -> torch.Tensor:
    for step in range(count):
        x = x + 0.1 * torch.tanh(x) / (step + 1)
    return x


def _no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        center = x.mean()
    with torch.enable_grad():
        return x - center


def _autocast(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = x @ y.T
    with torch.autocast("cpu", enabled=False):
        return z.float().softmax(-1)


def _quantised(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    quantised = (x / scale).round().clamp(-128, 127).to(torch.int8)
    return quantised.float() * scale


def _unpacked(q: torch.Tensor) -> torch.Tensor:
    low, high = q & 15, q >> 4
    return torch.stack([low, high], -1).flatten(1).to(torch.int8) - 8


def _suppress(boxes: torch.Tensor) -> torch.Tensor:
    corner = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    low = torch.maximum(corner[:, None, :2], corner[None, :, :2])
    high = torch.minimum(corner[:, None, 2:], corner[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area = boxes[:, 2] * boxes[:, 3]
    overlap = inter / (area[:, None] + area[None] - inter)
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for at in range(len(boxes)):
        later = torch.arange(len(boxes)) > at
        keep = keep & ~(keep[at] & later & (overlap[at] > 0.5))
    return keep


def _of(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Model]:
    return lambda: Model(function, args)


def _unary(name: str) -> Callable[[], Model]:
    function = elementwise(name)
    return lambda: Model(lambda x: function(x), (torch.rand(4, 6),))


def _binary(name: str) -> Callable[[], Model]:
    function = elementwise(name)
    return lambda: Model(lambda x, y: function(x, y), (torch.rand(4, 6), torch.rand(4, 6) + 1))


_ALONG = {"cummax", "cummin", "cumprod", "cumsum", "argsort", "median", "mode", "nanmedian"}


def _reduction(name: str) -> Callable[[], Model]:
    function = elementwise(name)
    if name in _ALONG:
        return lambda: Model(lambda x: function(x, dim=1), (torch.rand(4, 6),))
    return lambda: Model(lambda x: function(x), (torch.rand(4, 6),))


CASES: list[Case] = [
    *(Case(name, "elementwise", _unary(name)) for name in _UNARY),
    *(Case(name, "elementwise", _binary(name)) for name in _BINARY),
    *(Case(name, "reduction", _reduction(name)) for name in _REDUCTIONS),
    *(
        Case(name, family, _of(*entry))
        for family, entries in (
            ("functional", _FUNCTIONAL),
            ("vision functions", _VISION),
            ("frequencies", _FREQUENCIES),
            ("linear algebra", _LINALG),
            ("dtypes", _DTYPES),
        )
        for name, entry in entries.items()
    ),
]
