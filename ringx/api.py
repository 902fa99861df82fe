"""attention(q, k, v): the public entry, the checks of its arguments, and the operator that autograd
sees."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels
from .checks import require_name
from .comm import Transport, connect, phase
from .consistency import check_consistency
from .layout import Sharding, resolve_local_sharding
from .merge import absorb_dlse, acc_dtype
from .patterns.registry import ALGORITHMS, pattern
from .plan import Plan

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    algorithm: str = "ringx3",
    causal: bool = False,
    layout: "str | Sharding" = "zigzag",
    scale: float | None = None,
    kernel: str = "auto",
    overlap: bool = True,
    deterministic: bool = False,
    check: bool = True,
    return_lse: bool = False,
) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]":
    """Exact softmax attention of a sequence that is cut over the ranks of `group`.  Collective:
    every rank calls it.

    Args:
        q: [B, S_local, H, D], this rank's queries in layout order (see ``shard``); fp16, bf16, fp32
            or fp64.
        k, v: [B, S_local, Hkv, D], like q; H a multiple of Hkv (query head h uses key/value head h
            // (H / Hkv)).
        group: the context-parallel process group; None is the default group, or one lone rank where
            none is initialised.
        algorithm: a name of ``algorithms()``: how the ranks exchange their blocks.  All give the
            same result.
        causal: a token sees itself and the tokens before it in the *global* sequence; False: every
            token sees all.
        layout: which tokens this rank holds: "zigzag", "contiguous" or "striped" for equal shards,
            or a ``Sharding``.
        scale: factor on q . k; None is D ** -0.5.
        kernel: local attention kernel (``ringx info`` lists them); "auto" takes the fastest that
            can do the job.
        overlap: post the next collective before the current block is computed (needs one more block
            of memory).
        deterministic: have the kernel's backward give bitwise the same result every time (a kernel
            that cannot refuses).
        check: compare the call with the other ranks' first, so that bad input or ranks that
            disagree raise on every rank instead of hanging; one small message, no GPU
            synchronisation.  All ranks must pass the same value.
        return_lse: also return the log-sum-exp.

    Returns:
        out like q; with return_lse also lse [B, H, S_local], natural logarithm, fp32 (fp64 for
        fp64).  Both differentiable (once).  NaN in the inputs is passed through, not hidden.

    Raises:
        TypeError, ValueError: an argument is wrong, named with its value and the remedy.
        NotImplementedError: the kernel cannot do this.
        ValueError (``comm.Disagreement``): another rank refused this call, or made a different one.
        RuntimeError (``comm.PeerError``): a peer failed or timed out; the message names algorithm,
        direction and step.
    """
    transport = connect(group)
    plan: Plan | None = None
    error: Exception | None = None
    try:
        plan = plan_call(
            q,
            k,
            v,
            transport=transport,
            algorithm=algorithm,
            causal=causal,
            layout=layout,
            scale=scale,
            kernel=kernel,
            overlap=overlap,
            deterministic=deterministic,
        )
        _expect_bool("check", check)
        _expect_bool("return_lse", return_lse)
    except (TypeError, ValueError, NotImplementedError) as e:
        error = e
    if check:
        signature = call_signature(plan, q, k, v) if plan is not None else {}
        with phase(str(algorithm), "check"):
            check_consistency(transport.group, signature, error)
    if error is not None:
        raise error
    out, lse = _Attention.apply(q, k, v, plan)
    return (out, lse) if return_lse else out


def plan_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    transport: Transport,
    algorithm: str,
    causal: bool,
    layout: "str | Sharding",
    scale: float | None,
    kernel: str,
    overlap: bool,
    deterministic: bool,
) -> Plan:
    """The plan of one call, with the arguments of ``attention``.  Checks each; whatever is not
    supported is refused here."""
    _check_tensors(q, k, v)
    _expect_bool("causal", causal)
    _expect_bool("overlap", overlap)
    _expect_bool("deterministic", deterministic)
    require_name(algorithm, ALGORITHMS, "algorithm")
    group = transport.group
    request = kernels.KernelRequest(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[3],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        grad=_wants_grad(q, k, v),
        deterministic=deterministic,
    )
    return Plan(
        algorithm=algorithm,
        transport=transport,
        sharding=resolve_local_sharding(layout, group.world_size, group.rank, q.shape[1]),
        causal=causal,
        scale=_check_scale(scale, q.shape[3]),
        kernel=kernels.choose(kernel, request),
        overlap=overlap,
        deterministic=deterministic,
    )


def call_signature(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, object]:
    """What must be the same on every rank."""
    return {
        "algorithm": plan.algorithm,
        "batch size": q.shape[0],
        "heads": q.shape[2],
        "key/value heads": k.shape[2],
        "head size": q.shape[3],
        "sequence length": plan.sharding.seqlen,
        "layout": plan.sharding.layout,
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "causal": plan.causal,
        "scale": plan.scale,
        "overlap": plan.overlap,
        "gradient wanted": _wants_grad(q, k, v),
    }


# The forward is one operator of the dispatcher, so that selective activation checkpointing can keep
# its result instead of attending (and communicating) again: name torch.ops.ringx.attention.default
# in the policy.  `plan` is a key of _plans.
_library = torch.library.Library("ringx", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, int plan) -> (Tensor, Tensor)")
_plans: dict[int, Plan] = {}


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _plans[key]
    with phase(plan.algorithm, "forward"):
        out, lse = pattern(plan.algorithm).forward(q, k, v, plan)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _attention_shapes(q, k, v, key):
    return torch.empty_like(q), q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=acc_dtype(q.dtype)
    )


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("ringx::attention", _attention_shapes, lib=_library)


class SeesInside(TorchDispatchMode):
    """A dispatch mode that is shown (by ``see``) what happens inside ringx's attention, where
    others see one operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.ringx.attention.default:
            with self:
                return _attention(*args)
        return self.see(func, args, kwargs or {})

    def see(self, func, args, kwargs):
        """Called with every operator; returns its result."""
        raise NotImplementedError


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _plans[id(plan)] = plan
        try:
            out, lse = torch.ops.ringx.attention.default(q, k, v, id(plan))
        finally:
            del _plans[id(plan)]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            dout, out = absorb_dlse(dout, out, dlse)
        with phase(ctx.plan.algorithm, "backward"):
            dq, dk, dv = pattern(ctx.plan.algorithm).backward(dout, q, k, v, out, lse, ctx.plan)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


# ---- checks


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    for name, x in (("k", k), ("v", v)):
        _check_like_q(name, x, q)
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, v has {v.shape[2]}; they must have equally many."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, no multiple of the {k.shape[2]} heads of k and v."
        )


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}.")
    shape = tuple(x.shape)
    if x.dim() != 4:
        raise ValueError(
            f"{name} has {x.dim()} dimensions (shape {shape}); it must be [B, S_local, heads, D]."
        )
    if x.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"{name}.dtype={x.dtype} is not supported; use {supported}.")
    if 0 in shape:
        raise ValueError(
            f"{name} has an empty dimension (shape {shape}); every dimension must be at least 1."
        )


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """k and v agree with q in everything but the number of heads."""
    if x.dtype != q.dtype:
        raise TypeError(
            f"{name}.dtype={x.dtype} differs from q.dtype={q.dtype}; convert one of them."
        )
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}; move them to one device.")
    for dim, what in ((0, "batch size"), (1, "local sequence length"), (3, "head size")):
        if x.shape[dim] != q.shape[dim]:
            raise ValueError(
                f"{name} has {what} {x.shape[dim]}, q has {q.shape[dim]} "
                f"({name}: {tuple(x.shape)}, q: {tuple(q.shape)})."
            )


def _check_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number or None, not {type(scale).__name__}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite; None is D ** -0.5 = {head_dim**-0.5:.6g}.")
    return float(scale)


def _expect_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}.")


def _wants_grad(*xs: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)
