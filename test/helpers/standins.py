"""Stand-ins for attention packages and operators that cannot run here: they test our calling code, no more.

Each has the signature of the version named beside it, checks what the real one checks or silently relies on (shapes, dtypes,
contiguity, head sizes, the alignment of causal), and computes with ``ringx.kernels.reference``.  They say nothing about the real
kernel's numbers.
"""

import contextlib
import sys
from types import ModuleType
from typing import Optional

import torch

from ringx.kernels import gpu, reference

seen: dict[str, object] = {}  # what the last backward was told


def _forward(q, k, v, scale, causal, square=False):
    for x in (q, k, v):
        assert x.dim() == 4 and x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.shape[-1] % 8 == 0, "the head size must be a multiple of 8"
    assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0
    assert not (square and causal) or q.shape[1] == k.shape[1]
    band = (None, k.shape[1] - q.shape[1]) if causal else (None, None)  # bottom-right
    assert band[1] is None or band[1] >= 0
    return reference.forward(q, k, v, band=band, scale=scale)


def _backward(dout, q, k, v, out, lse, scale, causal, deterministic, square=False):
    assert dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous(), (
        "lse is read as a bare pointer"
    )
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert not (square and causal) or q.shape[1] == k.shape[1]
    seen["deterministic"] = deterministic
    band = (None, k.shape[1] - q.shape[1]) if causal else (None, None)
    return reference.backward(dout, q, k, v, out, lse, band=band, scale=scale)


def _write(grads, dq, dk, dv):
    for grad, to in zip(grads, (dq, dk, dv), strict=True):
        to.copy_(grad)


def _off(dropout_p=0.0, window=(-1, -1), softcap=0.0, other=()):
    """Every feature that we do not use must be off."""
    assert dropout_p == 0.0 and tuple(window) in ((-1, -1), (None, None)) and not softcap
    assert all(x is None for x in other)


def _modules(name: str, **functions) -> dict[str, ModuleType]:
    """The module `name` and the packages that it lies in."""
    parts = name.split(".")
    modules = {
        ".".join(parts[: i + 1]): ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))
    }
    vars(modules[name]).update(functions)
    return modules


# ---- flash-attn (flash_attn/flash_attn_interface.py)


def flash_attn_2_5():
    """flash-attn 2.5.9.post1: no softcap, windows as a pair, 8 results."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax
    ):
        _off(dropout_p, window_size, other=(alibi_slopes,))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        _off(dropout_p, window_size, other=(alibi_slopes, rng_state))
        _write(
            _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic),
            dq,
            dk,
            dv,
        )
        return dq, dk, dv, None

    return _modules("flash_attn.flash_attn_interface", **locals())


def flash_attn_2_6():
    """flash-attn 2.6.3: softcap."""

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        _off(dropout_p, window_size, softcap, (alibi_slopes,))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        _off(dropout_p, window_size, softcap, (alibi_slopes, rng_state))
        _write(
            _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic),
            dq,
            dk,
            dv,
        )
        return dq, dk, dv, None

    return _modules("flash_attn.flash_attn_interface", **locals())


Opt = Optional[torch.Tensor]  # noqa: UP045 - torch.library reads the annotation


@torch.library.custom_op("standin_flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_2_8_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Opt, return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _off(dropout_p, (window_size_left, window_size_right), softcap, (alibi_slopes,))
    out, lse = _forward(q, k, v, softmax_scale, causal)
    return out, lse, q.new_empty(0), q.new_empty(2)


@torch.library.custom_op(
    "standin_flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv")
)
def _flash_attn_2_8_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, softmax_lse: torch.Tensor,
    dq: Opt, dk: Opt, dv: Opt, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Opt, deterministic: bool, rng_state: Opt = None,
) -> torch.Tensor:  # fmt: skip
    _off(dropout_p, (window_size_left, window_size_right), softcap, (alibi_slopes, rng_state))
    _write(
        _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic), dq, dk, dv
    )
    return softmax_lse.new_empty(0)


def flash_attn_2_8():
    """flash-attn 2.7.4.post1 and 2.8.3: custom operators (their signature is hidden), windows as two numbers, 4 results."""
    return _modules(
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=_flash_attn_2_8_forward,
        _flash_attn_backward=_flash_attn_2_8_backward,
    )


# ---- FlashAttention-3 (hopper/flash_attn_interface.py)


def flash_attn_3_b1():
    """FlashAttention-3 3.0.0.b1 (in flash-attn 2.8.3): arguments of all features must be given."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
        max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
        v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        _off(0.0, window_size, softcap, (k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
             seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin,
             seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata))  # fmt: skip
        return (*_forward(q, k, v, softmax_scale, causal), None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
        dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        _off(
            0.0,
            window_size,
            softcap,
            (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k),
        )
        _write(
            _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic),
            dq,
            dk,
            dv,
        )
        return dq, dk, dv, None

    return _modules("flash_attn_interface", **locals())


Int, Flag = Optional[int], Optional[bool]  # noqa: UP045


@torch.library.custom_op("standin_flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_3_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_new: Opt = None, v_new: Opt = None, qv: Opt = None, out_: Opt = None,
    cu_seqlens_q: Opt = None, cu_seqlens_k: Opt = None, cu_seqlens_k_new: Opt = None, seqused_q: Opt = None,
    seqused_k: Opt = None, max_seqlen_q: Int = None, max_seqlen_k: Int = None, page_table: Opt = None,
    kv_batch_idx: Opt = None, leftpad_k: Opt = None, rotary_cos: Opt = None, rotary_sin: Opt = None,
    seqlens_rotary: Opt = None, q_descale: Opt = None, k_descale: Opt = None, v_descale: Opt = None,
    softmax_scale: Optional[float] = None, causal: bool = False, window_size_left: int = -1,  # noqa: UP045
    window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Opt = None, num_splits: int = 1, pack_gqa: Flag = None, sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _off(0.0, (window_size_left, window_size_right), softcap)
    return (*_forward(q, k, v, softmax_scale, causal), q.new_empty(0), q.new_empty(0))


@torch.library.custom_op(
    "standin_flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv")
)
def _flash_attn_3_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, softmax_lse: torch.Tensor,
    cu_seqlens_q: Opt = None, cu_seqlens_k: Opt = None, sequed_q: Opt = None, sequed_k: Opt = None, max_seqlen_q: Int = None,
    max_seqlen_k: Int = None, dq: Opt = None, dk: Opt = None, dv: Opt = None,
    softmax_scale: Optional[float] = None, is_causal: bool = False, window_size_left: int = -1,  # noqa: UP045
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> torch.Tensor:  # fmt: skip
    _off(0.0, (window_size_left, window_size_right), softcap)
    _write(
        _backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, deterministic),
        dq,
        dk,
        dv,
    )
    return softmax_lse.new_empty(0)


def flash_attn_3():
    """FlashAttention-3 as of flash-attention commit 01afd16: custom operators, `is_causal` in the backward."""
    return _modules(
        "flash_attn_interface",
        _flash_attn_forward=_flash_attn_3_forward,
        _flash_attn_backward=_flash_attn_3_backward,
    )


# ---- flash-attn-4 (flash_attn/cute/interface.py)


def flash_attn_4():
    """flash-attn-4 4.0.0b36."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
        k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        _off(0.0, (window_size_left, window_size_right), softcap, (qv, learnable_sink, out, lse))
        out, lse = _forward(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
        m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False,
        cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
        aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        _off(0.0, (window_size_left, window_size_right), softcap, (dlse, learnable_sink))
        return _backward(dout, q, k, v, out, lse, softmax_scale, causal, deterministic)

    return _modules("flash_attn.cute.interface", **locals())


# ---- amd-aiter (aiter/ops/mha.py)


def aiter_old():
    """aiter at commit 00472f7: plain functions."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, alibi_slopes, return_lse,
        return_softmax,
    ):  # fmt: skip
        _off(dropout_p, (window_size_left, window_size_right), other=(alibi_slopes,))
        assert return_lse and not return_softmax
        return (*_forward(q, k, v, softmax_scale, causal, square=True), None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        _off(dropout_p, (window_size_left, window_size_right), other=(alibi_slopes, rng_state))
        _write(
            _backward(
                dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic, square=True
            ),
            dq,
            dk,
            dv,
        )

    return _modules("aiter.ops.mha", **locals())


_AITER_BACKWARD = """_flash_attn_backward(Tensor(a0!) dout, Tensor(a1!) q, Tensor(a2!) k, Tensor(a3!) v, Tensor(a4!) out,
    Tensor(a5!) softmax_lse, Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor(a9!)? dbias, float dropout_p,
    float softmax_scale, bool causal, int window_size_left, int window_size_right, Tensor(a15!)? bias,
    Tensor(a16!)? alibi_slopes, bool deterministic, Tensor(a18!)? rng_state=None, bool? is_v3_atomic_fp32=True,
    int? how_v3_bf16_cvt=1) -> Tensor"""


def aiter():
    """amd-aiter 0.1.7.post2: the backward is wrapped as the operator aiter::_flash_attn_backward (see ``installed``)."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, bias, alibi_slopes, return_lse,
        return_softmax, how_v3_bf16_cvt=1, cu_seqlens_q=None, cu_seqlens_kv=None,
    ):  # fmt: skip
        _off(
            dropout_p,
            (window_size_left, window_size_right),
            other=(bias, alibi_slopes, cu_seqlens_q, cu_seqlens_kv),
        )
        assert return_lse and not return_softmax
        return (*_forward(q, k, v, softmax_scale, causal, square=True), None, None)

    def _flash_attn_backward(*args, **kwargs):
        return torch.ops.aiter._flash_attn_backward(*args, **kwargs)

    return _modules("aiter.ops.mha", **locals())


def _aiter_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dbias, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    bias, alibi_slopes, deterministic, rng_state=None, is_v3_atomic_fp32=True, how_v3_bf16_cvt=1,
):  # fmt: skip
    _off(
        dropout_p,
        (window_size_left, window_size_right),
        other=(dbias, bias, alibi_slopes, rng_state),
    )
    _write(
        _backward(
            dout, q, k, v, out, softmax_lse, softmax_scale, causal, deterministic, square=True
        ),
        dq,
        dk,
        dv,
    )
    return softmax_lse.clone()


PACKAGES = {
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
def installed(*names: str):
    """The named PACKAGES in place of whatever is installed."""
    new = {key: module for name in names for key, module in PACKAGES[name][1]().items()}
    if "aiter" in names:
        library = torch.library.Library("aiter", "FRAGMENT")
        library.define(" ".join(_AITER_BACKWARD.split()))
        library.impl("_flash_attn_backward", _aiter_backward, "CPU")
    old = {key: sys.modules.get(key) for key in new}
    sys.modules.update(new)
    gpu.import_or_reason.cache_clear()
    try:
        yield
    finally:
        for key, module in old.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module
        if "aiter" in names:
            library._destroy()
            torch.ops.aiter.__dict__.pop("_flash_attn_backward", None)
        gpu.import_or_reason.cache_clear()


# ---- PyTorch's own CUDA operators, put in at the dispatcher: it checks every call against the real schema


def _bshd(*xs):
    for x in xs:
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    return [x.transpose(1, 2) for x in xs]


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _off(dropout_p)
    out, lse = _forward(*_bshd(q, k, v), scale, is_causal, square=True)
    return (
        out.transpose(1, 2),
        lse,
        None,
        None,
        q.shape[2],
        k.shape[2],
        torch.zeros(2),
        torch.zeros(()),
        torch.zeros(0),
    )


def _flash_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    philox_seed,
    philox_offset,
    *,
    scale=None,
):
    _off(dropout_p, other=(cum_q, cum_k))
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    told = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    grads = _backward(*_bshd(dout, q, k, v, out), lse, scale, is_causal, told, square=True)
    return tuple(g.transpose(1, 2) for g in grads)


def _efficient(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    assert attn_bias is None and compute_log_sumexp and q.shape[1] == k.shape[1], "no grouped heads"
    out, lse = reference.forward(
        *_bshd(q, k, v), band=(None, 0 if is_causal else None), scale=scale
    )  # top-left
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    return out.transpose(1, 2), lse, torch.zeros(()), torch.zeros(())


def _efficient_backward(
    dout,
    q,
    k,
    v,
    attn_bias,
    out,
    lse,
    philox_seed,
    philox_offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    assert (
        attn_bias is None
        and list(grad_input_mask) == [True, True, True, False]
        and q.shape[1] == k.shape[1]
    )
    dout, q, k, v, out = _bshd(dout, q, k, v, out)
    assert dout.is_contiguous() and out.is_contiguous(), (
        "read with the strides of contiguous tensors"
    )
    m = q.shape[1]
    assert (
        lse.shape[-1] == -(-m // 32) * 32
        and lse.is_contiguous()
        and bool((lse[..., m:] == torch.inf).all())
    )
    told = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    seen["deterministic"] = told
    band = (None, 0 if is_causal else None)
    grads = reference.backward(dout, q, k, v, out, lse[..., :m], band=band, scale=scale)
    return (*(g.transpose(1, 2) for g in grads), None)


def _cudnn(lse_dims: int):
    def forward(
        q,
        k,
        v,
        bias,
        compute_log_sumexp,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        *,
        scale=None,
    ):
        assert bias is None and compute_log_sumexp and k.shape[2] > 1
        out, lse = _forward(*_bshd(q, k, v), scale, is_causal, square=True)
        lse = lse.unsqueeze(-1) if lse_dims == 4 else lse
        return (
            out.transpose(1, 2),
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            torch.zeros(()),
            torch.zeros(()),
            None,
        )

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        philox_seed,
        philox_offset,
        bias,
        cum_q,
        cum_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        *,
        scale=None,
    ):
        _off(dropout_p, other=(bias, cum_q, cum_k))
        assert (
            (max_q, max_k) == (q.shape[2], k.shape[2]) and k.shape[2] > 1 and lse.dim() == lse_dims
        )
        assert dout.stride() == out.stride() == q.stride(), (
            "plans are remembered by q, k and v alone"
        )
        lse = lse.reshape(lse.shape[:3])
        grads = _backward(*_bshd(dout, q, k, v, out), lse, scale, is_causal, False, square=True)
        return tuple(g.transpose(1, 2) for g in grads)

    return forward, backward


@contextlib.contextmanager
def aten_operators(cudnn_lse_dims: int = 4):
    """CPU implementations of the CUDA operators for as long as the block runs."""
    from ringx.kernels import sdpa_cudnn

    library = torch.library.Library("aten", "IMPL")
    forward, backward = _cudnn(cudnn_lse_dims)
    for name, call in (
        ("_scaled_dot_product_flash_attention", _flash),
        ("_scaled_dot_product_flash_attention_backward", _flash_backward),
        ("_scaled_dot_product_efficient_attention", _efficient),
        ("_scaled_dot_product_efficient_attention_backward", _efficient_backward),
        ("_scaled_dot_product_cudnn_attention", forward),
        ("_scaled_dot_product_cudnn_attention_backward", backward),
    ):
        library.impl(name, call, "CPU")
    sdpa_cudnn._lse_dimensions.cache_clear()
    try:
        yield
    finally:
        library._destroy()
        sdpa_cudnn._lse_dimensions.cache_clear()
