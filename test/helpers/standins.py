"""Stand-ins for attention packages and operators that cannot run here.

They test the code that calls these, no more.  Each has the signature of the version named beside
it, checks what the real one checks or silently relies on (shapes, dtypes, contiguity, head sizes,
the alignment of causal), and computes with ``ringx.kernels.reference``.  The numbers of the real
kernels are not tested.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from ringx.kernels import gpu, reference

seen: dict[str, object] = {}  # "deterministic": what the last backward was called with


# ---- what all stand-ins share


def _bottom_right_band(q: Tensor, k: Tensor, causal: bool) -> tuple[None, int | None]:
    if not causal:
        return None, None
    assert k.shape[1] >= q.shape[1]
    return None, k.shape[1] - q.shape[1]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *, square: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse of a kernel with bottom-right alignment, or (`square`) one for Sq == Sk only."""
    for x in (q, k, v):
        assert x.dim() == 4 and x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.shape[-1] % 8 == 0, "the head size must be a multiple of 8"
    assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0
    assert not (square and causal) or q.shape[1] == k.shape[1]
    return reference.forward(q, k, v, band=_bottom_right_band(q, k, causal), scale=scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    deterministic: bool,
    *,
    square: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    assert dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous(), "lse is read as a bare pointer"
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert not (square and causal) or q.shape[1] == k.shape[1]
    seen["deterministic"] = deterministic
    band = _bottom_right_band(q, k, causal)
    return reference.backward(dout, q, k, v, out, lse, band=band, scale=scale)


def _backward_in_place(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    scale: float,
    causal: bool,
    deterministic: bool,
    square: bool = False,
) -> None:
    """Writes the gradients to dq, dk and dv."""
    gradients = _backward(dout, q, k, v, out, lse, scale, causal, deterministic, square=square)
    for gradient, destination in zip(gradients, (dq, dk, dv), strict=True):
        destination.copy_(gradient)


def _require_off(
    dropout_p: float = 0.0,
    window: Sequence[int | None] = (-1, -1),
    softcap: float | None = 0.0,
    other: Sequence[object] = (),
) -> None:
    """Every feature that ringx does not use must be off."""
    assert dropout_p == 0.0
    assert tuple(window) in ((-1, -1), (None, None))
    assert not softcap
    assert all(x is None for x in other)


def _modules(name: str, **functions: Callable) -> dict[str, ModuleType]:
    """The module `name`, which holds the functions, and the packages that it lies in."""
    parts = name.split(".")
    modules = {}
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        modules[path] = ModuleType(path)
    vars(modules[name]).update(functions)
    return modules


# ---- flash-attn (flash_attn/flash_attn_interface.py)


def flash_attn_2_5() -> dict[str, ModuleType]:
    """flash-attn 2.5.9.post1: no softcap, windows as a pair, 8 results."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax
    ):
        _require_off(dropout_p, window_size, other=(alibi_slopes,))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        _require_off(dropout_p, window_size, other=(alibi_slopes, rng_state))
        _backward_in_place(
            dout, q, k, v, out, softmax_lse, dq, dk, dv,
            scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv, None

    return _modules(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
    )


def flash_attn_2_6() -> dict[str, ModuleType]:
    """flash-attn 2.6.3: softcap."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        _require_off(dropout_p, window_size, softcap, (alibi_slopes,))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        _require_off(dropout_p, window_size, softcap, (alibi_slopes, rng_state))
        _backward_in_place(
            dout, q, k, v, out, softmax_lse, dq, dk, dv,
            scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv, None

    return _modules(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
    )


# torch.library reads these annotations, and knows no `|`.
OptionalTensor = Optional[Tensor]  # noqa: UP045
OptionalInt = Optional[int]  # noqa: UP045
OptionalFloat = Optional[float]  # noqa: UP045
OptionalBool = Optional[bool]  # noqa: UP045


@torch.library.custom_op("standin_flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_2_8_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: OptionalTensor,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _require_off(dropout_p, (window_size_left, window_size_right), softcap, (alibi_slopes,))
    out, lse = _forward(q, k, v, softmax_scale, causal)
    return out, lse, q.new_empty(0), q.new_empty(2)


@torch.library.custom_op(
    "standin_flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv")
)
def _flash_attn_2_8_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: OptionalTensor, dk: OptionalTensor, dv: OptionalTensor, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: OptionalTensor, deterministic: bool,
    rng_state: OptionalTensor = None,
) -> Tensor:  # fmt: skip
    window = (window_size_left, window_size_right)
    _require_off(dropout_p, window, softcap, (alibi_slopes, rng_state))
    _backward_in_place(
        dout, q, k, v, out, softmax_lse, dq, dk, dv,
        scale=softmax_scale, causal=causal, deterministic=deterministic,
    )  # fmt: skip
    return softmax_lse.new_empty(0)


def flash_attn_2_8() -> dict[str, ModuleType]:
    """flash-attn 2.7.4.post1 and 2.8.3.

    Custom operators (their signature is hidden), windows as two numbers, 4 results.
    """
    return _modules(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=_flash_attn_2_8_forward,
        _flash_attn_backward=_flash_attn_2_8_backward,
    )


# ---- FlashAttention-3 (hopper/flash_attn_interface.py)


def flash_attn_3_b1() -> dict[str, ModuleType]:
    """FlashAttention-3 3.0.0.b1 (in flash-attn 2.8.3): arguments of all features must be given."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        unused = (
            k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
            seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
            rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata,
        )  # fmt: skip
        _require_off(0.0, window_size, softcap, unused)
        return (*_forward(q, k, v, softmax_scale, causal), None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1),
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        unused = (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
        _require_off(0.0, window_size, softcap, unused)
        _backward_in_place(
            dout, q, k, v, out, softmax_lse, dq, dk, dv,
            scale=softmax_scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv, None

    return _modules(
        "flash_attn_interface",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
    )


@torch.library.custom_op("standin_flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: OptionalTensor = None, v_new: OptionalTensor = None,
    qv: OptionalTensor = None, out_: OptionalTensor = None, cu_seqlens_q: OptionalTensor = None,
    cu_seqlens_k: OptionalTensor = None, cu_seqlens_k_new: OptionalTensor = None,
    seqused_q: OptionalTensor = None, seqused_k: OptionalTensor = None,
    max_seqlen_q: OptionalInt = None, max_seqlen_k: OptionalInt = None,
    page_table: OptionalTensor = None, kv_batch_idx: OptionalTensor = None,
    leftpad_k: OptionalTensor = None, rotary_cos: OptionalTensor = None,
    rotary_sin: OptionalTensor = None, seqlens_rotary: OptionalTensor = None,
    q_descale: OptionalTensor = None, k_descale: OptionalTensor = None,
    v_descale: OptionalTensor = None, softmax_scale: OptionalFloat = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: OptionalTensor = None, num_splits: int = 1, pack_gqa: OptionalBool = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _require_off(0.0, (window_size_left, window_size_right), softcap)
    return (*_forward(q, k, v, softmax_scale, causal), q.new_empty(0), q.new_empty(0))


@torch.library.custom_op(
    "standin_flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv")
)
def _flash_attn_3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: OptionalTensor = None, cu_seqlens_k: OptionalTensor = None,
    sequed_q: OptionalTensor = None, sequed_k: OptionalTensor = None,
    max_seqlen_q: OptionalInt = None, max_seqlen_k: OptionalInt = None,
    dq: OptionalTensor = None, dk: OptionalTensor = None, dv: OptionalTensor = None,
    softmax_scale: OptionalFloat = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    _require_off(0.0, (window_size_left, window_size_right), softcap)
    _backward_in_place(
        dout, q, k, v, out, softmax_lse, dq, dk, dv,
        scale=softmax_scale, causal=is_causal, deterministic=deterministic,
    )  # fmt: skip
    return softmax_lse.new_empty(0)


def flash_attn_3() -> dict[str, ModuleType]:
    """FlashAttention-3 as of flash-attention commit 01afd16.

    Custom operators; the backward takes `is_causal`.
    """
    return _modules(
        "flash_attn_interface",
        _flash_attn_forward=_flash_attn_3_forward,
        _flash_attn_backward=_flash_attn_3_backward,
    )


# ---- flash-attn-4 (flash_attn/cute/interface.py)


def flash_attn_4() -> dict[str, ModuleType]:
    """flash-attn-4 4.0.0b36."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None,
        v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        _require_off(0.0, window, softcap, (qv, learnable_sink, out, lse))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        if not return_lse:
            lse = None
        return out, lse, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
        block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        _require_off(0.0, window, softcap, (dlse, learnable_sink))
        return _backward(dout, q, k, v, out, lse, softmax_scale, causal, deterministic)

    return _modules(
        "flash_attn.cute.interface",
        _flash_attn_fwd=_flash_attn_fwd,
        _flash_attn_bwd=_flash_attn_bwd,
    )


# ---- amd-aiter (aiter/ops/mha.py)


def aiter_old() -> dict[str, ModuleType]:
    """aiter at commit 00472f7: plain functions."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        alibi_slopes, return_lse, return_softmax,
    ):  # fmt: skip
        _require_off(dropout_p, (window_size_left, window_size_right), other=(alibi_slopes,))
        assert return_lse and not return_softmax
        return (*_forward(q, k, v, softmax_scale, causal, square=True), None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        _require_off(dropout_p, window, other=(alibi_slopes, rng_state))
        _backward_in_place(
            dout, q, k, v, out, softmax_lse, dq, dk, dv,
            scale=softmax_scale, causal=causal, deterministic=deterministic, square=True,
        )  # fmt: skip

    return _modules(
        "aiter.ops.mha",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
    )


_AITER_BACKWARD_SCHEMA = """_flash_attn_backward(
    Tensor(a0!) dout, Tensor(a1!) q, Tensor(a2!) k, Tensor(a3!) v, Tensor(a4!) out,
    Tensor(a5!) softmax_lse, Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv,
    Tensor(a9!)? dbias, float dropout_p, float softmax_scale, bool causal, int window_size_left,
    int window_size_right, Tensor(a15!)? bias, Tensor(a16!)? alibi_slopes, bool deterministic,
    Tensor(a18!)? rng_state=None, bool? is_v3_atomic_fp32=True, int? how_v3_bf16_cvt=1) -> Tensor"""


def aiter() -> dict[str, ModuleType]:
    """amd-aiter 0.1.7.post2.

    The backward is wrapped as the operator aiter::_flash_attn_backward (see ``installed``).
    """

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, bias,
        alibi_slopes, return_lse, return_softmax, how_v3_bf16_cvt=1, cu_seqlens_q=None,
        cu_seqlens_kv=None,
    ):  # fmt: skip
        unused = (bias, alibi_slopes, cu_seqlens_q, cu_seqlens_kv)
        _require_off(dropout_p, (window_size_left, window_size_right), other=unused)
        assert return_lse and not return_softmax
        return (*_forward(q, k, v, softmax_scale, causal, square=True), None, None)

    def _flash_attn_backward(*args, **kwargs):
        return torch.ops.aiter._flash_attn_backward(*args, **kwargs)

    return _modules(
        "aiter.ops.mha",
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
    )


def _aiter_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dbias, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, bias, alibi_slopes, deterministic, rng_state=None,
    is_v3_atomic_fp32=True, how_v3_bf16_cvt=1,
):  # fmt: skip
    unused = (dbias, bias, alibi_slopes, rng_state)
    _require_off(dropout_p, (window_size_left, window_size_right), other=unused)
    _backward_in_place(
        dout, q, k, v, out, softmax_lse, dq, dk, dv,
        scale=softmax_scale, causal=causal, deterministic=deterministic, square=True,
    )  # fmt: skip
    return softmax_lse.clone()


# name: (the kernel that calls the package, what makes its modules)
PACKAGES: dict[str, tuple[str, Callable[[], dict[str, ModuleType]]]] = {
    "flash-attn 2.5": ("flash2", flash_attn_2_5),
    "flash-attn 2.6": ("flash2", flash_attn_2_6),
    "flash-attn 2.8": ("flash2", flash_attn_2_8),
    "flash-attn 3 b1": ("flash3", flash_attn_3_b1),
    "flash-attn 3": ("flash3", flash_attn_3),
    "flash-attn 4": ("flash4", flash_attn_4),
    "aiter old": ("aiter", aiter_old),
    "aiter": ("aiter", aiter),
}


@contextlib.contextmanager
def installed(*names: str) -> Iterator[None]:
    """The named PACKAGES in place of whatever is installed."""
    modules: dict[str, ModuleType] = {}
    for name in names:
        _, make_modules = PACKAGES[name]
        modules.update(make_modules())
    with contextlib.ExitStack() as stack:
        if "aiter" in names:
            stack.enter_context(_aiter_operator())
        stack.enter_context(_modules_in_place(modules))
        yield


@contextlib.contextmanager
def _modules_in_place(modules: dict[str, ModuleType]) -> Iterator[None]:
    replaced = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    gpu.import_or_reason.cache_clear()
    try:
        yield
    finally:
        for name, module in replaced.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        gpu.import_or_reason.cache_clear()


@contextlib.contextmanager
def _aiter_operator() -> Iterator[None]:
    library = torch.library.Library("aiter", "FRAGMENT")
    library.define(" ".join(_AITER_BACKWARD_SCHEMA.split()).replace("( ", "("))
    library.impl("_flash_attn_backward", _aiter_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
        torch.ops.aiter.__dict__.pop("_flash_attn_backward", None)


# ---- PyTorch's own CUDA operators, registered for CPU: the dispatcher checks every call against
# the real schema.  Their parameters are those of the schemas.


def _bshd(*tensors: Tensor) -> list[Tensor]:
    """[B, H, S, D] -> [B, S, H, D]."""
    for x in tensors:
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    return [x.transpose(1, 2) for x in tensors]


def _deterministic_algorithms_required() -> bool:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warn_only


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _require_off(dropout_p)
    out, lse = _forward(*_bshd(q, k, v), scale, is_causal, square=True)
    rng_state, unused, debug_mask = torch.zeros(2), torch.zeros(()), torch.zeros(0)
    out = out.transpose(1, 2)
    return out, lse, None, None, q.shape[2], k.shape[2], rng_state, unused, debug_mask


def _flash_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    _require_off(dropout_p, other=(cum_q, cum_k))
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    gradients = _backward(
        *_bshd(dout, q, k, v, out),
        lse,
        scale,
        is_causal,
        _deterministic_algorithms_required(),
        square=True,
    )
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


def _efficient(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    _require_off(dropout_p, other=(attn_bias,))
    assert compute_log_sumexp
    assert q.shape[1] == k.shape[1], "no grouped heads"
    band = (None, 0 if is_causal else None)  # top-left
    out, lse = reference.forward(*_bshd(q, k, v), band=band, scale=scale)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    return out.transpose(1, 2), lse, torch.zeros(()), torch.zeros(())


def _efficient_backward(
    dout, q, k, v, attn_bias, out, lse, philox_seed, philox_offset, dropout_p, grad_input_mask,
    is_causal=False, *, scale=None,
):  # fmt: skip
    _require_off(dropout_p, other=(attn_bias,))
    assert list(grad_input_mask) == [True, True, True, False]
    assert q.shape[1] == k.shape[1], "no grouped heads"
    dout, q, k, v, out = _bshd(dout, q, k, v, out)
    assert dout.is_contiguous(), "read with the strides of a contiguous tensor"
    assert out.is_contiguous(), "read with the strides of a contiguous tensor"
    rows = q.shape[1]
    assert lse.shape[-1] == -(-rows // 32) * 32 and lse.is_contiguous()
    assert bool((lse[..., rows:] == torch.inf).all())
    seen["deterministic"] = _deterministic_algorithms_required()
    band = (None, 0 if is_causal else None)
    gradients = reference.backward(dout, q, k, v, out, lse[..., :rows], band=band, scale=scale)
    return (*(gradient.transpose(1, 2) for gradient in gradients), None)


def _cudnn(lse_dims: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward of the cuDNN operators whose lse has 3 or 4 dimensions."""

    def forward(
        q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False,
        *, scale=None,
    ):  # fmt: skip
        _require_off(dropout_p, other=(bias,))
        assert compute_log_sumexp
        assert k.shape[2] > 1, "a single key is not supported"
        out, lse = _forward(*_bshd(q, k, v), scale, is_causal, square=True)
        if lse_dims == 4:
            lse = lse.unsqueeze(-1)
        seed, offset = torch.zeros(()), torch.zeros(())
        return out.transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], seed, offset, None

    def backward(
        dout, q, k, v, out, lse, philox_seed, philox_offset, bias, cum_q, cum_k, max_q, max_k,
        dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        _require_off(dropout_p, other=(bias, cum_q, cum_k))
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert k.shape[2] > 1, "a single key is not supported"
        assert lse.dim() == lse_dims
        same_layout = dout.stride() == out.stride() == q.stride()
        assert same_layout, "plans are remembered by q, k and v alone"
        lse = lse.reshape(lse.shape[:3])
        operands = _bshd(dout, q, k, v, out)
        gradients = _backward(*operands, lse, scale, is_causal, False, square=True)
        return tuple(gradient.transpose(1, 2) for gradient in gradients)

    return forward, backward


@contextlib.contextmanager
def aten_operators(cudnn_lse_dims: int = 4) -> Iterator[None]:
    """CPU implementations of the CUDA operators for as long as the block runs."""
    from ringx.kernels import sdpa_cudnn

    cudnn_forward, cudnn_backward = _cudnn(cudnn_lse_dims)
    implementations = {
        "_scaled_dot_product_flash_attention": _flash,
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention": _efficient,
        "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    }
    library = torch.library.Library("aten", "IMPL")
    for name, function in implementations.items():
        library.impl(name, function, "CPU")
    sdpa_cudnn._lse_dimensions.cache_clear()
    try:
        yield
    finally:
        library._destroy()
        sdpa_cudnn._lse_dimensions.cache_clear()
