"""The operator table: every call that a program can make.  Spec: 60-program.md#operators

    op id -> Row(call, parameters, how many outputs)

An id that is not here can not be called; there is no look-up by name anywhere else.  Each row
names its operator as an explicit reference, so the table is fixed when the file is written.

Left out on purpose:
  - what reads files, storages or memory of others: from_file, set_, as_strided*, resize*,
    *_like without values (export writes zeros instead of empty);
  - what changes its inputs, draws from a generator that the program does not carry, or calls back;
  - outputs whose shape depends on values: nonzero, unique, masked_select, item, bincount, …;
  - kernels that trust index or statistics tensors of their callers without checking them:
    native_batch_norm, native_group_norm, max_pool*_backward, embedding_dense_backward, …; those
    that trust shapes alone are here with a check of their own (checked_kernels);
  - texts that are parsed (einsum): texts here select one of the listed modes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload

from nextgpu_node.graph import random_numbers
from nextgpu_node.graph.bounds import (
    CHECKS,
    WORKSPACE,
    Check,
    Workspace,
    converted,
    converted_or_copied,
)
from nextgpu_node.graph.checked_kernels import CHECKED_KERNELS
from nextgpu_protocol.program import DTYPE_BYTES, DType
from nextgpu_protocol.program_limits import MAX_LIST_ITEMS, MAX_RANK
from nextgpu_protocol.program_limits import TABLE_VERSION as TABLE_VERSION

_aten = torch.ops.aten


class Kind(Enum):
    """What a parameter accepts."""

    TENSOR = auto()
    TENSORS = auto()
    MAYBE_TENSORS = auto()
    INT = auto()
    INTS = auto()
    FLOAT = auto()
    FLOATS = auto()
    BOOL = auto()
    BOOLS = auto()
    NUMBER = auto()
    DTYPE = auto()
    MEMORY_FORMAT = auto()
    TEXT = auto()
    # Devices, layouts, pinned memory: the machine's business, never the program's.
    ABSENT = auto()


# Schema type -> kind; `Optional[...]` around it allows None.  A type that is not here fails the
# import of this module, so that no kind of argument enters the table unreviewed.
_KINDS: dict[str, Kind] = {
    "Tensor": Kind.TENSOR,
    "List[Tensor]": Kind.TENSORS,
    "List[Optional[Tensor]]": Kind.MAYBE_TENSORS,
    "int": Kind.INT,
    "List[int]": Kind.INTS,
    "float": Kind.FLOAT,
    "List[float]": Kind.FLOATS,
    "bool": Kind.BOOL,
    "List[bool]": Kind.BOOLS,
    "number": Kind.NUMBER,
    "ScalarType": Kind.DTYPE,
    "MemoryFormat": Kind.MEMORY_FORMAT,
    "str": Kind.TEXT,
    "Device": Kind.ABSENT,
    "Layout": Kind.ABSENT,
}
ABSENT_NAMES = frozenset({"device", "layout", "pin_memory", "non_blocking"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an operator.

    choices    the only literals that are allowed, if any
    max_items  of a list of numbers
    """

    name: str
    kind: Kind
    optional: bool
    required: bool
    keyword_only: bool
    choices: tuple[Any, ...] | None = None
    max_items: int = 2 * MAX_RANK


@dataclass(frozen=True, slots=True)
class Row:
    """One operator.

    call        what runs; its arguments were checked against `parameters`
    returns     letters of the outputs ("t", "tt", "i", …), or None for a list of tensors
    count       for lists: how many outputs a call gives, from its arguments, before the call
    shape_call  stands in for `call` in the run on shapes, where the real one would be slow there
    on_device   the call takes the machine's device
    symbolic    works on sizes, not on tensors
    checks      refuse arguments before the shape run
    workspace   the bytes that a call needs beside its arguments and results; None: it is composed
                of other operators, whose results are counted
    """

    op: str
    call: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    returns: str | None
    count: Callable[..., int] | None = None
    shape_call: Callable[..., Any] | None = None
    on_device: bool = False
    symbolic: bool = False
    checks: tuple[Check, ...] = ()
    workspace: Workspace | None = None
    since: int = 1


# One element out for each element in (after broadcasting).
_ELEMENTWISE: tuple[OpOverload, ...] = (
    _aten.__and__.Scalar,
    _aten.__and__.Tensor,
    _aten.__lshift__.Scalar,
    _aten.__lshift__.Tensor,
    _aten.__or__.Scalar,
    _aten.__or__.Tensor,
    _aten.__rshift__.Scalar,
    _aten.__rshift__.Tensor,
    _aten.__xor__.Scalar,
    _aten.__xor__.Tensor,
    _aten._log_softmax_backward_data.default,
    _aten._softmax_backward_data.default,
    _aten._to_copy.default,
    _aten.abs.default,
    _aten.absolute.default,
    _aten.acos.default,
    _aten.acosh.default,
    _aten.add.Scalar,
    _aten.add.Tensor,
    _aten.addcdiv.default,
    _aten.addcmul.default,
    _aten.angle.default,
    _aten.arccos.default,
    _aten.arccosh.default,
    _aten.arcsin.default,
    _aten.arcsinh.default,
    _aten.arctan.default,
    _aten.arctan2.default,
    _aten.arctanh.default,
    _aten.asin.default,
    _aten.asinh.default,
    _aten.atan.default,
    _aten.atan2.default,
    _aten.atanh.default,
    _aten.bitwise_and.Scalar,
    _aten.bitwise_and.Scalar_Tensor,
    _aten.bitwise_and.Tensor,
    _aten.bitwise_left_shift.Scalar_Tensor,
    _aten.bitwise_left_shift.Tensor,
    _aten.bitwise_left_shift.Tensor_Scalar,
    _aten.bitwise_not.default,
    _aten.bitwise_or.Scalar,
    _aten.bitwise_or.Scalar_Tensor,
    _aten.bitwise_or.Tensor,
    _aten.bitwise_right_shift.Scalar_Tensor,
    _aten.bitwise_right_shift.Tensor,
    _aten.bitwise_right_shift.Tensor_Scalar,
    _aten.bitwise_xor.Scalar,
    _aten.bitwise_xor.Scalar_Tensor,
    _aten.bitwise_xor.Tensor,
    _aten.ceil.default,
    _aten.celu.default,
    _aten.clamp.Tensor,
    _aten.clamp.default,
    _aten.clamp_max.Tensor,
    _aten.clamp_max.default,
    _aten.clamp_min.Tensor,
    _aten.clamp_min.default,
    _aten.clip.Tensor,
    _aten.clip.default,
    _aten.clone.default,
    _aten.complex.default,
    _aten.conj.default,
    _aten.conj_physical.default,
    _aten.contiguous.default,
    _aten.copy.default,
    _aten.copysign.Scalar,
    _aten.copysign.Tensor,
    _aten.cos.default,
    _aten.cosh.default,
    _aten.deg2rad.default,
    _aten.digamma.default,
    _aten.div.Scalar,
    _aten.div.Tensor,
    _aten.divide.Scalar,
    _aten.divide.Tensor,
    _aten.elu.default,
    _aten.elu_backward.default,
    _aten.eq.Scalar,
    _aten.eq.Tensor,
    _aten.erf.default,
    _aten.erfc.default,
    _aten.erfinv.default,
    _aten.exp.default,
    _aten.exp2.default,
    _aten.expm1.default,
    _aten.fill.Scalar,
    _aten.fill.Tensor,
    _aten.fix.default,
    _aten.float_power.Scalar,
    _aten.float_power.Tensor_Scalar,
    _aten.float_power.Tensor_Tensor,
    _aten.floor.default,
    _aten.floor_divide.Scalar,
    _aten.floor_divide.default,
    _aten.fmax.default,
    _aten.fmin.default,
    _aten.fmod.Scalar,
    _aten.fmod.Tensor,
    _aten.frac.default,
    _aten.frexp.Tensor,
    _aten.gcd.default,
    _aten.ge.Scalar,
    _aten.ge.Tensor,
    _aten.greater.Scalar,
    _aten.greater.Tensor,
    _aten.greater_equal.Scalar,
    _aten.greater_equal.Tensor,
    _aten.gt.Scalar,
    _aten.gt.Tensor,
    _aten.hardshrink.default,
    _aten.hardsigmoid.default,
    _aten.hardsigmoid_backward.default,
    _aten.hardswish.default,
    _aten.hardswish_backward.default,
    _aten.hardtanh.default,
    _aten.hardtanh_backward.default,
    _aten.heaviside.default,
    _aten.hypot.default,
    _aten.i0.default,
    _aten.igamma.default,
    _aten.igammac.default,
    _aten.imag.default,
    _aten.isclose.default,
    _aten.isfinite.default,
    _aten.isinf.default,
    _aten.isnan.default,
    _aten.isneginf.default,
    _aten.isposinf.default,
    _aten.isreal.default,
    _aten.lcm.default,
    _aten.ldexp.Tensor,
    _aten.le.Scalar,
    _aten.le.Tensor,
    _aten.leaky_relu.default,
    _aten.leaky_relu_backward.default,
    _aten.lerp.Scalar,
    _aten.lerp.Tensor,
    _aten.less.Scalar,
    _aten.less.Tensor,
    _aten.less_equal.Scalar,
    _aten.less_equal.Tensor,
    _aten.lgamma.default,
    _aten.log.default,
    _aten.log10.default,
    _aten.log1p.default,
    _aten.log2.default,
    _aten.log_sigmoid.default,
    _aten.logaddexp.default,
    _aten.logaddexp2.default,
    _aten.logical_and.default,
    _aten.logical_not.default,
    _aten.logical_or.default,
    _aten.logical_xor.default,
    _aten.logit.default,
    _aten.logit_backward.default,
    _aten.lt.Scalar,
    _aten.lt.Tensor,
    _aten.masked_fill.Scalar,
    _aten.masked_fill.Tensor,
    _aten.max.other,
    _aten.maximum.default,
    _aten.min.other,
    _aten.minimum.default,
    _aten.mish.default,
    _aten.mul.Scalar,
    _aten.mul.Tensor,
    _aten.multiply.Scalar,
    _aten.multiply.Tensor,
    _aten.mvlgamma.default,
    _aten.nan_to_num.default,
    _aten.ne.Scalar,
    _aten.ne.Tensor,
    _aten.neg.default,
    _aten.negative.default,
    _aten.nextafter.default,
    _aten.not_equal.Scalar,
    _aten.not_equal.Tensor,
    _aten.polar.default,
    _aten.polygamma.default,
    _aten.positive.default,
    _aten.pow.Scalar,
    _aten.pow.Tensor_Scalar,
    _aten.pow.Tensor_Tensor,
    _aten.prelu.default,
    _aten.rad2deg.default,
    _aten.real.default,
    _aten.reciprocal.default,
    _aten.relu.default,
    _aten.relu6.default,
    _aten.remainder.Scalar,
    _aten.remainder.Scalar_Tensor,
    _aten.remainder.Tensor,
    _aten.resolve_conj.default,
    _aten.resolve_neg.default,
    _aten.round.decimals,
    _aten.round.default,
    _aten.rsqrt.default,
    _aten.rsub.Scalar,
    _aten.rsub.Tensor,
    _aten.selu.default,
    _aten.sgn.default,
    _aten.sigmoid.default,
    _aten.sigmoid_backward.default,
    _aten.sign.default,
    _aten.signbit.default,
    _aten.silu.default,
    _aten.silu_backward.default,
    _aten.sin.default,
    _aten.sinc.default,
    _aten.sinh.default,
    _aten.softplus.default,
    _aten.softplus_backward.default,
    _aten.softshrink.default,
    _aten.special_bessel_j0.default,
    _aten.special_bessel_j1.default,
    _aten.special_bessel_y0.default,
    _aten.special_bessel_y1.default,
    _aten.special_airy_ai.default,
    _aten.special_entr.default,
    _aten.special_modified_bessel_i0.default,
    _aten.special_modified_bessel_i1.default,
    _aten.special_modified_bessel_k0.default,
    _aten.special_modified_bessel_k1.default,
    _aten.special_scaled_modified_bessel_k0.default,
    _aten.special_scaled_modified_bessel_k1.default,
    _aten.special_spherical_bessel_j0.default,
    _aten.special_erfcx.default,
    _aten.special_expit.default,
    _aten.special_i0e.default,
    _aten.special_i1.default,
    _aten.special_i1e.default,
    _aten.special_log_ndtr.default,
    _aten.special_ndtr.default,
    _aten.special_ndtri.default,
    _aten.special_xlog1py.default,
    _aten.special_zeta.default,
    _aten.sqrt.default,
    _aten.square.default,
    _aten.sub.Scalar,
    _aten.sub.Tensor,
    _aten.subtract.Scalar,
    _aten.subtract.Tensor,
    _aten.tan.default,
    _aten.tanh.default,
    _aten.tanh_backward.default,
    _aten.threshold.default,
    _aten.threshold_backward.default,
    _aten.to.dtype,
    _aten.to.other,
    _aten.true_divide.Scalar,
    _aten.true_divide.Tensor,
    _aten.trunc.default,
    _aten.type_as.default,
    _aten.view_as_complex.default,
    _aten.view_as_real.default,
    _aten.where.Scalar,
    _aten.where.ScalarOther,
    _aten.where.ScalarSelf,
    _aten.where.self,
    _aten.xlogy.Scalar_Other,
    _aten.xlogy.Scalar_Self,
    _aten.xlogy.Tensor,
)

_ELEMENTWISE_SET = frozenset(_ELEMENTWISE)

# Reductions, scans, orders and searches along dimensions.
_REDUCTIONS: tuple[OpOverload, ...] = (
    _aten._log_softmax.default,
    _aten._softmax.default,
    _aten.all.default,
    _aten.all.dim,
    _aten.all.dims,
    _aten.amax.default,
    _aten.amin.default,
    _aten.aminmax.default,
    _aten.any.default,
    _aten.any.dim,
    _aten.any.dims,
    _aten.argmax.default,
    _aten.argmin.default,
    _aten.argsort.default,
    _aten.argsort.stable,
    _aten.corrcoef.default,
    _aten.count_nonzero.default,
    _aten.count_nonzero.dim_IntList,
    _aten.cov.default,
    _aten.cummax.default,
    _aten.cummin.default,
    _aten.cumprod.default,
    _aten.cumsum.default,
    _aten.cumulative_trapezoid.dx,
    _aten.cumulative_trapezoid.x,
    _aten.diff.default,
    _aten.dist.default,
    _aten.histc.default,
    _aten.isin.Scalar_Tensor,
    _aten.isin.Tensor_Scalar,
    _aten.isin.Tensor_Tensor,
    _aten.kthvalue.default,
    _aten.linalg_vector_norm.default,
    _aten.log_softmax.int,
    _aten.logcumsumexp.default,
    _aten.logsumexp.default,
    _aten.max.default,
    _aten.max.dim,
    _aten.mean.default,
    _aten.mean.dim,
    _aten.median.default,
    _aten.median.dim,
    _aten.min.default,
    _aten.min.dim,
    _aten.mode.default,
    _aten.msort.default,
    _aten.nanmean.default,
    _aten.nanmedian.default,
    _aten.nanmedian.dim,
    _aten.nansum.default,
    _aten.norm.Scalar,
    _aten.norm.ScalarOpt_dim,
    _aten.norm.ScalarOpt_dim_dtype,
    _aten.norm.ScalarOpt_dtype,
    _aten.prod.default,
    _aten.prod.dim_int,
    _aten.renorm.default,
    _aten.softmax.int,
    _aten.sort.default,
    _aten.sort.stable,
    _aten.special_log_softmax.default,
    _aten.special_logsumexp.default,
    _aten.special_softmax.default,
    _aten.std.correction,
    _aten.std.default,
    _aten.std.dim,
    _aten.std_mean.correction,
    _aten.std_mean.default,
    _aten.std_mean.dim,
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.topk.default,
    _aten.trace.default,
    _aten.trapezoid.dx,
    _aten.trapezoid.x,
    _aten.var.correction,
    _aten.var.default,
    _aten.var.dim,
    _aten.var_mean.correction,
    _aten.var_mean.default,
    _aten.var_mean.dim,
)

# Views and copies with another shape.
_SHAPES: tuple[OpOverload, ...] = (
    _aten.adjoint.default,
    _aten.alias.default,
    _aten.alias_copy.default,
    _aten.atleast_1d.default,
    _aten.atleast_2d.default,
    _aten.atleast_3d.default,
    _aten.broadcast_to.default,
    _aten.channel_shuffle.default,
    _aten.col2im.default,
    _aten.constant_pad_nd.default,
    _aten.detach.default,
    _aten.detach_copy.default,
    _aten.diag.default,
    _aten.diag_embed.default,
    _aten.diagflat.default,
    _aten.diagonal.default,
    _aten.diagonal_copy.default,
    _aten.diagonal_scatter.default,
    _aten.expand.default,
    _aten.expand_as.default,
    _aten.expand_copy.default,
    _aten.flatten.using_ints,
    _aten.flip.default,
    _aten.fliplr.default,
    _aten.flipud.default,
    _aten.im2col.default,
    _aten.lift_fresh_copy.default,
    _aten.mH.default,
    _aten.mT.default,
    _aten.matrix_H.default,
    _aten.moveaxis.int,
    _aten.moveaxis.intlist,
    _aten.movedim.int,
    _aten.movedim.intlist,
    _aten.narrow.default,
    _aten.numpy_T.default,
    _aten.permute.default,
    _aten.permute_copy.default,
    _aten.pixel_shuffle.default,
    _aten.pixel_unshuffle.default,
    _aten.ravel.default,
    _aten.reflection_pad1d.default,
    _aten.reflection_pad2d.default,
    _aten.reflection_pad3d.default,
    _aten.repeat.default,
    _aten.repeat_interleave.self_int,
    _aten.replication_pad1d.default,
    _aten.replication_pad2d.default,
    _aten.replication_pad3d.default,
    _aten.reshape.default,
    _aten.reshape_as.default,
    _aten.roll.default,
    _aten.rot90.default,
    _aten.select.int,
    _aten.select_copy.int,
    _aten.select_scatter.default,
    _aten.slice.Tensor,
    _aten.slice_copy.Tensor,
    _aten.slice_scatter.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.squeeze_copy.default,
    _aten.squeeze_copy.dim,
    _aten.squeeze_copy.dims,
    _aten.sum_to_size.default,
    _aten.swapaxes.default,
    _aten.swapdims.default,
    _aten.t.default,
    _aten.t_copy.default,
    _aten.tile.default,
    _aten.transpose.int,
    _aten.transpose_copy.int,
    _aten.tril.default,
    _aten.triu.default,
    _aten.unflatten.int,
    _aten.unfold.default,
    _aten.unfold_copy.default,
    _aten.unsqueeze.default,
    _aten.unsqueeze_copy.default,
    _aten.view.default,
    _aten.view_as.default,
    _aten.view_copy.default,
)

# Many tensors into one.
_JOINS: tuple[OpOverload, ...] = (
    _aten.block_diag.default,
    _aten.cartesian_prod.default,
    _aten.cat.default,
    _aten.column_stack.default,
    _aten.concat.default,
    _aten.concatenate.default,
    _aten.dstack.default,
    _aten.hstack.default,
    _aten.row_stack.default,
    _aten.stack.default,
    _aten.vstack.default,
)

# Reads and writes at positions given by tensors; the kernels check each position.
_INDEXING: tuple[OpOverload, ...] = (
    _aten.bucketize.Scalar,
    _aten.bucketize.Tensor,
    _aten.embedding.default,
    # With boolean indices its shape depends on values: _index_shape refuses those.
    _aten.index.Tensor,
    _aten.gather.default,
    _aten.index_add.default,
    _aten.index_copy.default,
    _aten.index_fill.int_Scalar,
    _aten.index_fill.int_Tensor,
    _aten.index_put.default,
    _aten.index_select.default,
    _aten.masked_scatter.default,
    _aten.nonzero_static.default,
    _aten.put.default,
    _aten.scatter.src,
    _aten.scatter.value,
    _aten.scatter_add.default,
    _aten.take.default,
    _aten.take_along_dim.default,
)

# New tensors; made on the machine's own device.
_FACTORIES: tuple[OpOverload, ...] = (
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.bartlett_window.default,
    _aten.bartlett_window.periodic,
    _aten.blackman_window.default,
    _aten.blackman_window.periodic,
    _aten.eye.default,
    _aten.eye.m,
    _aten.fft_fftfreq.default,
    _aten.fft_rfftfreq.default,
    _aten.full.default,
    _aten.full_like.default,
    _aten.hamming_window.default,
    _aten.hamming_window.periodic,
    _aten.hann_window.default,
    _aten.hann_window.periodic,
    _aten.linspace.default,
    _aten.logspace.default,
    _aten.new_full.default,
    _aten.new_ones.default,
    _aten.new_zeros.default,
    _aten.ones.default,
    _aten.ones_like.default,
    _aten.scalar_tensor.default,
    _aten.tril_indices.default,
    _aten.triu_indices.default,
    _aten.zeros.default,
    _aten.zeros_like.default,
)

# Products and decompositions.
_LINEAR_ALGEBRA: tuple[OpOverload, ...] = (
    _aten._cdist_forward.default,
    _aten._int_mm.default,
    _aten._linalg_det.default,
    _aten._linalg_eigvals.default,
    _aten._linalg_slogdet.default,
    _aten._linalg_solve_ex.default,
    _aten._linalg_svd.default,
    _aten._pdist_forward.default,
    _aten.addbmm.default,
    _aten.addmm.default,
    _aten.addmv.default,
    _aten.addr.default,
    _aten.baddbmm.default,
    _aten.bilinear.default,
    _aten.bmm.default,
    _aten.cdist.default,
    _aten.chain_matmul.default,
    _aten.cholesky.default,
    _aten.cholesky_inverse.default,
    _aten.cholesky_solve.default,
    _aten.cosine_similarity.default,
    _aten.cross.default,
    _aten.det.default,
    _aten.dot.default,
    _aten.ger.default,
    _aten.inner.default,
    _aten.inverse.default,
    _aten.kron.default,
    _aten.linalg_cholesky.default,
    _aten.linalg_cholesky_ex.default,
    _aten.linalg_cross.default,
    _aten.linalg_det.default,
    _aten.linalg_diagonal.default,
    _aten.linalg_eig.default,
    _aten.linalg_eigvals.default,
    _aten.linalg_householder_product.default,
    _aten.linalg_inv.default,
    _aten.linalg_inv_ex.default,
    _aten.linalg_lu.default,
    _aten.linalg_lu_factor_ex.default,
    _aten.linalg_matmul.default,
    _aten.linalg_matrix_exp.default,
    _aten.linalg_matrix_power.default,
    _aten.linalg_multi_dot.default,
    _aten.linalg_pinv.atol_rtol_tensor,
    _aten.linalg_pinv.default,
    _aten.linalg_slogdet.default,
    _aten.linalg_solve.default,
    _aten.linalg_solve_triangular.default,
    _aten.linalg_vecdot.default,
    _aten.linear.default,
    _aten.logdet.default,
    _aten.matmul.default,
    _aten.matrix_exp.default,
    _aten.mm.default,
    _aten.mv.default,
    _aten.outer.default,
    _aten.pairwise_distance.default,
    _aten.tensordot.default,
    _aten.vdot.default,
)

# Layers that export keeps whole.
_NETWORKS: tuple[OpOverload, ...] = (
    _aten._adaptive_avg_pool2d.default,
    _aten._adaptive_avg_pool3d.default,
    _aten._upsample_bicubic2d_aa.default,
    _aten._upsample_bicubic2d_aa.vec,
    _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bilinear2d_aa.vec,
    _aten._upsample_nearest_exact1d.default,
    _aten._upsample_nearest_exact1d.vec,
    _aten._upsample_nearest_exact2d.default,
    _aten._upsample_nearest_exact2d.vec,
    _aten._upsample_nearest_exact3d.default,
    _aten._upsample_nearest_exact3d.vec,
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
    _aten.adaptive_max_pool1d.default,
    _aten.adaptive_max_pool2d.default,
    _aten.adaptive_max_pool3d.default,
    _aten.affine_grid_generator.default,
    _aten.avg_pool1d.default,
    _aten.avg_pool2d.default,
    _aten.avg_pool3d.default,
    _aten.binary_cross_entropy.default,
    _aten.binary_cross_entropy_with_logits.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv_tbc.default,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input,
    _aten.convolution.default,
    _aten.cosine_embedding_loss.default,
    _aten.cross_entropy_loss.default,
    _aten.fft_fftshift.default,
    _aten.fft_ifftshift.default,
    _aten.glu.default,
    _aten.grid_sampler.default,
    _aten.grid_sampler_2d.default,
    _aten.grid_sampler_3d.default,
    _aten.group_norm.default,
    _aten.gru_cell.default,
    _aten.hinge_embedding_loss.default,
    _aten.huber_loss.default,
    _aten.kl_div.default,
    _aten.l1_loss.default,
    _aten.layer_norm.default,
    _aten.lstm_cell.default,
    _aten.margin_ranking_loss.default,
    _aten.max_pool1d.default,
    _aten.max_pool1d_with_indices.default,
    _aten.max_pool2d.default,
    _aten.max_pool2d_with_indices.default,
    _aten.max_pool3d.default,
    _aten.max_pool3d_with_indices.default,
    _aten.mse_loss.default,
    _aten.native_layer_norm.default,
    _aten.nll_loss.default,
    _aten.nll_loss2d.default,
    _aten.nll_loss_forward.default,
    _aten.nll_loss_nd.default,
    _aten.poisson_nll_loss.default,
    _aten.rms_norm.default,
    _aten.rnn_relu_cell.default,
    _aten.rnn_tanh_cell.default,
    _aten.smooth_l1_loss.default,
    _aten.soft_margin_loss.default,
    _aten.triplet_margin_loss.default,
    _aten.upsample_bicubic2d.default,
    _aten.upsample_bicubic2d.vec,
    _aten.upsample_bilinear2d.default,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_linear1d.default,
    _aten.upsample_linear1d.vec,
    _aten.upsample_nearest1d.default,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest2d.default,
    _aten.upsample_nearest2d.vec,
    _aten.upsample_nearest3d.default,
    _aten.upsample_nearest3d.vec,
    _aten.upsample_trilinear3d.default,
    _aten.upsample_trilinear3d.vec,
)

# Operators with a text argument: for each, the modes it may name.
_REDUCE_MODES = ("sum", "prod", "mean", "amax", "amin")
_TEXTS: dict[OpOverload, dict[str, tuple[str, ...]]] = {
    _aten.gelu.default: {"approximate": ("none", "tanh")},
    _aten.gelu_backward.default: {"approximate": ("none", "tanh")},
    _aten.div.Scalar_mode: {"rounding_mode": ("floor", "trunc")},
    _aten.div.Tensor_mode: {"rounding_mode": ("floor", "trunc")},
    _aten.divide.Scalar_mode: {"rounding_mode": ("floor", "trunc")},
    _aten.divide.Tensor_mode: {"rounding_mode": ("floor", "trunc")},
    _aten.scatter_reduce.two: {"reduce": _REDUCE_MODES},
    _aten.index_reduce.default: {"reduce": ("prod", "mean", "amax", "amin")},
    _aten.scatter.reduce: {"reduce": ("add", "multiply")},
    _aten.scatter.value_reduce: {"reduce": ("add", "multiply")},
    _aten.pad.default: {"mode": ("constant", "reflect", "replicate", "circular")},
    _aten.conv1d.padding: {"padding": ("same", "valid")},
    _aten.conv2d.padding: {"padding": ("same", "valid")},
    _aten.conv3d.padding: {"padding": ("same", "valid")},
    _aten.searchsorted.Tensor: {"side": ("left", "right")},
    _aten.searchsorted.Scalar: {"side": ("left", "right")},
    _aten.fft_fft.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_ifft.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_rfft.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_irfft.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_fft2.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_ifft2.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_rfft2.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_irfft2.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_fftn.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_ifftn.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_rfftn.default: {"norm": ("forward", "backward", "ortho")},
    _aten.fft_irfftn.default: {"norm": ("forward", "backward", "ortho")},
    _aten.linalg_norm.default: {},
    _aten.linalg_matrix_norm.default: {},
    _aten.stft.center: {"pad_mode": ("constant", "reflect", "replicate")},
    _aten.linalg_qr.default: {"mode": ("reduced",)},
    _aten.linalg_eigh.default: {"UPLO": ("L", "U")},
    _aten.linalg_eigvalsh.default: {"UPLO": ("L", "U")},
    _aten._linalg_eigh.default: {"UPLO": ("L", "U")},
}

# Bits read as another dtype.  Not as bool: kernels rely on a bool being 0 or 1.
_DTYPE_CHOICES: dict[OpOverload, dict[str, tuple[Any, ...]]] = {
    _aten.view.dtype: {"dtype": tuple(DType(name) for name in DTYPE_BYTES if name != "bool")},
}

# Layers that, when training, draw random numbers or write to their statistics in place: the one
# value that their flag may have.
_INFERENCE_ONLY: dict[OpOverload, tuple[str, bool | float]] = {
    _aten.batch_norm.default: ("training", False),
    _aten.dropout.default: ("train", False),
    _aten.feature_dropout.default: ("train", False),
    _aten.alpha_dropout.default: ("train", False),
    _aten.lstm.input: ("train", False),
    _aten.gru.input: ("train", False),
    _aten.rnn_tanh.input: ("train", False),
    _aten.rnn_relu.input: ("train", False),
    _aten.scaled_dot_product_attention.default: ("dropout_p", 0.0),
}


# ---------------------------------------------------------------- how many outputs a list has


def _pieces_of_size(tensor: torch.Tensor, size: int, dim: int = 0) -> int:
    if size <= 0:
        return 1
    return max(1, -(-tensor.shape[dim] // size))


def _pieces(tensor: torch.Tensor, chunks: int, dim: int = 0) -> int:
    length = tensor.shape[dim]
    if chunks <= 0 or length == 0:
        return max(chunks, 1)
    return -(-length // -(-length // chunks))


def _slices(tensor: torch.Tensor, dim: int = 0) -> int:
    return tensor.shape[dim]


def _given_sizes(tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> int:
    return len(sizes)


def _given_cuts(tensor: torch.Tensor, cuts: Sequence[int], dim: int = 0) -> int:
    return len(cuts) + 1


def _given_sections(tensor: torch.Tensor, sections: int, dim: int = 0) -> int:
    return sections


def _as_many(tensors: Sequence[torch.Tensor], indexing: str = "ij") -> int:
    return len(tensors)


_LISTS: dict[OpOverload, tuple[Callable[..., int], dict[str, tuple[str, ...]]]] = {
    _aten.split.Tensor: (_pieces_of_size, {}),
    _aten.split_copy.Tensor: (_pieces_of_size, {}),
    _aten.unsafe_split.Tensor: (_pieces_of_size, {}),
    _aten.split.sizes: (_given_sizes, {}),
    _aten.split_with_sizes.default: (_given_sizes, {}),
    _aten.split_with_sizes_copy.default: (_given_sizes, {}),
    _aten.unsafe_split_with_sizes.default: (_given_sizes, {}),
    _aten.chunk.default: (_pieces, {}),
    _aten.unsafe_chunk.default: (_pieces, {}),
    _aten.tensor_split.sections: (_given_sections, {}),
    _aten.tensor_split.indices: (_given_cuts, {}),
    _aten.unbind.int: (_slices, {}),
    _aten.unbind_copy.int: (_slices, {}),
    _aten.broadcast_tensors.default: (_as_many, {}),
    _aten.meshgrid.default: (_as_many, {}),
    _aten.meshgrid.indexing: (_as_many, {"indexing": ("ij", "xy")}),
}


# ---------------------------------------------------------------- shapes without the slow route
#
# torch works most shapes out in C++ in microseconds, but goes through Python for a few operators
# (0.2-2 ms each).  These give the same answer for the usual case and leave the rest to torch.


def _same_shape(call: OpOverload) -> Callable[..., Any]:
    def shape_of(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if not tensor.is_floating_point():
            return call(tensor, *rest, **named)
        return torch.empty_like(tensor)

    return shape_of


def _same_shape_pair(call: OpOverload) -> Callable[..., Any]:
    def shape_of(left: Any, right: Any, *rest: Any, **named: Any) -> Any:
        if type(left) is not torch.Tensor or not left.is_floating_point():
            return call(left, right, *rest, **named)
        if type(right) in (int, float):
            return torch.empty_like(left)
        if type(right) is torch.Tensor and left.dtype is right.dtype:
            if left.shape == right.shape and left.stride() == right.stride():
                return torch.empty_like(left)
            shape = torch._C._infer_size(left.shape, right.shape)
            if left.is_contiguous() and right.is_contiguous():
                return torch.empty(shape, dtype=left.dtype, device="meta")
        return call(left, right, *rest, **named)

    return shape_of


def _normalised_shape(tensor: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _linear_shape(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Any:
    fits = (
        all(type(one) is torch.Tensor for one in (rows, weight))
        and rows.dtype is weight.dtype
        and rows.dim() > 1
        and weight.dim() == 2
        and rows.shape[-1] == weight.shape[1]
        and (bias is None or _is_bias(bias, weight))
    )
    if not fits:
        return _aten.linear.default(rows, weight, bias)
    return torch.empty((*rows.shape[:-1], weight.shape[0]), dtype=rows.dtype, device="meta")


def _is_bias(bias: Any, weight: torch.Tensor) -> bool:
    return (
        type(bias) is torch.Tensor
        and bias.dtype is weight.dtype
        and tuple(bias.shape) == (weight.shape[0],)
    )


def _attention_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    if query.dim() != 4 or value.dim() != 4 or query.shape[:2] != value.shape[:2]:
        return _aten.scaled_dot_product_attention.default(query, key, value, *rest, **named)
    # The fused kernels write (batch, sequence, head, size) and return it transposed.
    batch, heads, length, _ = query.shape
    shape = (batch, length, heads, value.shape[3])
    return torch.empty(shape, dtype=query.dtype, device="meta").transpose(1, 2)


# Its place after input and states.
_BIDIRECTIONAL = 5


def _recurrent_shape(image: torch.Tensor, states: Any, *rest: Any, **named: Any) -> Any:
    # Everything was checked to fit together (bounds): torch would take all steps to find out.
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    bidirectional = named["bidirectional"] if "bidirectional" in named else rest[_BIDIRECTIONAL]
    size = states[0].shape[2] * (2 if bidirectional else 1)
    shapes = [(*image.shape[:2], size), *(state.shape for state in states)]
    return [torch.empty(shape, dtype=image.dtype, device="meta") for shape in shapes]


def _view_shape(tensor: torch.Tensor, shape: Sequence[int]) -> Any:
    # A kernel may lay its result out differently than its shape run: count a copy if need be.
    return _aten.reshape.default(tensor, shape)


def _index_shape(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
    if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices):
        raise ValueError("a boolean index has no size before its values are known")
    return _aten.index.Tensor(tensor, indices)


def _covariance_shape(tensor: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    # The operator compares values on its way, which shapes have none of.
    if tensor.dim() > 2 or tensor.dtype is torch.bool:
        raise ValueError("variables and observations are at most two dimensions of numbers")
    dtype = tensor.dtype if tensor.is_floating_point() or tensor.is_complex() else torch.float32
    shape = (tensor.shape[0], tensor.shape[0]) if tensor.dim() == 2 else ()
    return torch.empty(shape, dtype=dtype, device="meta")


_SHAPE_CALLS: dict[OpOverload, Callable[..., Any]] = {
    _aten.add.Tensor: _same_shape_pair(_aten.add.Tensor),
    _aten.sub.Tensor: _same_shape_pair(_aten.sub.Tensor),
    _aten.mul.Tensor: _same_shape_pair(_aten.mul.Tensor),
    _aten.div.Tensor: _same_shape_pair(_aten.div.Tensor),
    _aten.gelu.default: _same_shape(_aten.gelu.default),
    _aten.relu.default: _same_shape(_aten.relu.default),
    _aten.silu.default: _same_shape(_aten.silu.default),
    _aten.tanh.default: _same_shape(_aten.tanh.default),
    _aten.sigmoid.default: _same_shape(_aten.sigmoid.default),
    _aten.rsqrt.default: _same_shape(_aten.rsqrt.default),
    _aten.neg.default: _same_shape(_aten.neg.default),
    _aten.linear.default: _linear_shape,
    _aten.layer_norm.default: _normalised_shape,
    _aten.batch_norm.default: _same_shape(_aten.batch_norm.default),
    _aten.scaled_dot_product_attention.default: _attention_shape,
    _aten.view.default: _view_shape,
    _aten.index.Tensor: _index_shape,
    _aten.lstm.input: _recurrent_shape,
    _aten.gru.input: _recurrent_shape,
    _aten.rnn_tanh.input: _recurrent_shape,
    _aten.rnn_relu.input: _recurrent_shape,
    _aten.cov.default: _covariance_shape,
    _aten.corrcoef.default: _covariance_shape,
}


# ---------------------------------------------------------------- sizes

_MAX_SHIFT = 62


def _power(base: float, exponent: float) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        if not 0 <= exponent <= _MAX_SHIFT:
            raise ValueError("exponent out of range")
        return base**exponent
    return float(base) ** float(exponent)


def _divide(left: float, right: float) -> float:
    return left / right


def _choose(condition: bool, yes: float, no: float) -> float:
    return yes if condition else no


def _check_sizes(condition: bool) -> bool:
    if not condition:
        raise ValueError("the program was not exported for inputs of these sizes")
    return True


def _identity_size(tensor: torch.Tensor, dim: int) -> int:
    return tensor.shape[dim]


def _count_elements(tensor: torch.Tensor) -> int:
    return tensor.numel()


_PAIR = ("left", "right")
_SIZES: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "sym.add": (operator.add, _PAIR, "if"),
    "sym.sub": (operator.sub, _PAIR, "if"),
    "sym.mul": (operator.mul, _PAIR, "if"),
    "sym.floordiv": (operator.floordiv, _PAIR, "if"),
    "sym.truediv": (_divide, _PAIR, "f"),
    "sym.mod": (operator.mod, _PAIR, "if"),
    "sym.pow": (_power, _PAIR, "if"),
    "sym.neg": (operator.neg, ("left",), "if"),
    "sym.abs": (abs, ("left",), "if"),
    "sym.min": (min, _PAIR, "if"),
    "sym.max": (max, _PAIR, "if"),
    "sym.eq": (operator.eq, _PAIR, "b"),
    "sym.ne": (operator.ne, _PAIR, "b"),
    "sym.lt": (operator.lt, _PAIR, "b"),
    "sym.le": (operator.le, _PAIR, "b"),
    "sym.gt": (operator.gt, _PAIR, "b"),
    "sym.ge": (operator.ge, _PAIR, "b"),
    "sym.and": (operator.and_, _PAIR, "b"),
    "sym.or": (operator.or_, _PAIR, "b"),
    "sym.not": (operator.not_, ("left",), "b"),
    "sym.int": (int, ("left",), "i"),
    "sym.float": (float, ("left",), "f"),
    "sym.floor": (math.floor, ("left",), "i"),
    "sym.ceil": (math.ceil, ("left",), "i"),
    "sym.round": (round, ("left",), "i"),
    "sym.sqrt": (math.sqrt, ("left",), "f"),
    "sym.check": (_check_sizes, ("condition",), "b"),
    "sym.ite": (_choose, ("condition", "yes", "no"), "ifb"),
}


# ---------------------------------------------------------------- random numbers

# Name -> (call, the same on shapes, its parameters after the state); see random_numbers.
_DRAWS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Kind]]] = {
    "random.uniform": (
        random_numbers.uniform,
        random_numbers.drawn_shape,
        {"site": Kind.INT, "size": Kind.INTS, "dtype": Kind.DTYPE},
    ),
    "random.normal": (
        random_numbers.normal,
        random_numbers.drawn_shape,
        {"site": Kind.INT, "size": Kind.INTS, "dtype": Kind.DTYPE},
    ),
    "random.bits": (
        random_numbers.bits,
        random_numbers.bits_shape,
        {"site": Kind.INT, "size": Kind.INTS},
    ),
    "random.bernoulli": (
        random_numbers.bernoulli,
        random_numbers.bernoulli_shape,
        {"site": Kind.INT, "size": Kind.INTS, "p": Kind.FLOAT},
    ),
}


def _random_rows() -> list[Row]:
    state = _needed("state", Kind.TENSOR)
    rows = [
        Row("random.read", random_numbers.read, (state,), "t", since=2),
        Row("random.advance", random_numbers.advance, (state,), "t", since=2),
    ]
    rows = [replace(row, shape_call=random_numbers.read_shape) for row in rows]
    for name, (call, shape_call, kinds) in _DRAWS.items():
        parameters = (state, *(_needed(each, kind) for each, kind in kinds.items()))
        rows.append(
            Row(
                name,
                call,
                parameters,
                "t",
                shape_call=shape_call,
                on_device=True,
                workspace=WORKSPACE[name],
                since=2,
            )
        )
    return rows


def _needed(name: str, kind: Kind) -> Parameter:
    return Parameter(name, kind, optional=False, required=True, keyword_only=False)


# ---------------------------------------------------------------- the table


# Numbers that name a mode, under these names in every row.  Kernels do not look at them closely.
_MODES: dict[str, tuple[int, ...]] = {
    "reduction": (0, 1, 2),
    "interpolation_mode": (0, 1, 2),
    "padding_mode": (0, 1, 2),
}


def _parameters(op: OpOverload, choices: Mapping[str, tuple[Any, ...]]) -> tuple[Parameter, ...]:
    return tuple(_parameter(argument, choices) for argument in op._schema.arguments)


def _parameter(argument: Any, choices: Mapping[str, tuple[Any, ...]]) -> Parameter:
    type_text = str(argument.real_type)
    optional = type_text.startswith("Optional[")
    kind = _KINDS[type_text[len("Optional[") : -1] if optional else type_text]
    if argument.name in ABSENT_NAMES:
        kind = Kind.ABSENT
    allowed = choices.get(argument.name, _MODES.get(argument.name))
    if kind is Kind.TEXT and allowed is None:
        kind = Kind.ABSENT
    return Parameter(
        name=argument.name,
        kind=kind,
        optional=optional,
        required=not argument.has_default_value() and kind is not Kind.ABSENT,
        keyword_only=argument.kwarg_only,
        choices=allowed,
    )


def _row(
    op: OpOverload,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
    count: Callable[..., int] | None = None,
) -> Row:
    parameters = _parameters(op, choices or {})
    if count:
        # Cuts and sizes, one for each piece.
        parameters = tuple(replace(one, max_items=MAX_LIST_ITEMS) for one in parameters)
    takes_device = any(parameter.name == "device" for parameter in parameters)
    takes_tensor = any(parameter.kind is Kind.TENSOR for parameter in parameters)
    return Row(
        op=str(op),
        call=op,
        parameters=parameters,
        returns=None if count else "t" * len(op._schema.returns),
        count=count,
        shape_call=_SHAPE_CALLS.get(op),
        on_device=takes_device and not takes_tensor,
        checks=CHECKS.get(str(op), ()),
        workspace=_workspace(op),
    )


def _workspace(op: OpOverload) -> Workspace | None:
    own = WORKSPACE.get(str(op))
    if own is not None or (is_composed(op) and op not in _SHAPE_CALLS):
        return own
    return converted if op in _ELEMENTWISE_SET else converted_or_copied


def is_composed(op: OpOverload) -> bool:
    """Whether the operator is other operators under one name."""
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _size_row(name: str) -> Row:
    call, names, returns = _SIZES[name]
    parameters = tuple(
        Parameter(each, Kind.NUMBER, optional=False, required=True, keyword_only=False)
        for each in names
    )
    return Row(name, call, parameters, returns, symbolic=True)


# ---------------------------------------------------------------- experts


def _grouped_mm(tokens: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [ends[e-1], ends[e]) of (rows, k) tokens times weights[e], (experts, k, n): (rows, n).

    Rows past the last end are zeros.  Ends are values of a stranger: each is clamped.
    """
    out = tokens.new_zeros(tokens.shape[0], weights.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        stop = min(int(end), tokens.shape[0])
        if start < stop:
            torch.mm(tokens[start:stop], weights[expert], out=out[start:stop])
            start = stop
    return out


def _grouped_shape(tokens: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    rows, size = tokens.shape
    experts, inner, outputs = weights.shape
    if inner != size or tuple(ends.shape) != (experts,) or tokens.dtype is not weights.dtype:
        raise ValueError("tokens, weights and ends do not fit together")
    if ends.dtype not in (torch.int32, torch.int64):
        raise ValueError("ends are not integers")
    return torch.empty((rows, outputs), dtype=tokens.dtype, device="meta")


_GROUPED_MM = Row(
    "nextgpu.grouped_mm",
    _grouped_mm,
    tuple(
        Parameter(name, Kind.TENSOR, optional=False, required=True, keyword_only=False)
        for name in ("tokens", "weights", "ends")
    ),
    "t",
    shape_call=_grouped_shape,
)


def _build() -> dict[str, Row]:
    tensor = Parameter("self", Kind.TENSOR, optional=False, required=True, keyword_only=False)
    dim = Parameter("dim", Kind.INT, optional=False, required=True, keyword_only=False)
    rows = [_size_row(name) for name in _SIZES]
    rows.append(Row("aten.sym_size.int", _identity_size, (tensor, dim), "i", symbolic=True))
    rows.append(Row("aten.sym_numel.default", _count_elements, (tensor,), "i", symbolic=True))
    rows += [_row(op) for group in _PLAIN for op in group]
    rows += [_row(op, texts) for op, texts in _TEXTS.items()]
    rows += [_row(op, dtypes) for op, dtypes in _DTYPE_CHOICES.items()]
    rows.append(_GROUPED_MM)
    rows += [_row(op, {flag: (value,)}) for op, (flag, value) in _INFERENCE_ONLY.items()]
    rows += [_row(op, texts, count) for op, (count, texts) in _LISTS.items()]
    rows += [
        replace(_row(op), call=call, shape_call=shape_call, since=2)
        for op, (call, shape_call) in CHECKED_KERNELS.items()
    ]
    rows += _random_rows()
    return {row.op: row for row in rows}


_PLAIN = (
    _ELEMENTWISE,
    _REDUCTIONS,
    _SHAPES,
    _JOINS,
    _INDEXING,
    _FACTORIES,
    _LINEAR_ALGEBRA,
    _NETWORKS,
)

TABLE: Mapping[str, Row] = MappingProxyType(_build())
