"""Continue a text with a Llama: one process, keys and values cached.

    python -m apps.gpt.generate run --prompt "def main(" --tokens 100
    python -m apps.gpt.generate Llama-3.2-1B --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1

MODEL is a run of apps.gpt.train (its newest checkpoint without damage), a checkpoint, or a Hugging Face folder.  The text begins
with the token that begins a text, where the model has one.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common.arguments import Parser
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.data.tokenizer import ByteTokenizer, JsonTokenizer
from apps.gpt.huggingface import open_model, open_tokenizer
from apps.gpt.loss import head_logits
from apps.gpt.model import Attend, Attention, Llama


class KeyValueCache:
    """The attention of one layer over all tokens so far: keeps the keys and values that it is given.

    Memory: 2 x B x capacity x kv_heads x head_dim elements."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._kv: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, D], k and v [B, S, Hkv, D] of the next S tokens -> [B, S, H, D], causal."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self._kv is None:
            self._kv = tuple(x.new_empty((*x.shape[:2], self.capacity, x.shape[3])) for x in (k, v))  # type: ignore[assignment]
        before, self.length = self.length, self.length + q.shape[2]
        assert self._kv is not None and self.length <= self.capacity
        for kept, new in zip(self._kv, (k, v), strict=True):
            kept[:, :, before : self.length] = new
        keys, values = (x[:, :, : self.length] for x in self._kv)
        mask = None
        if before and q.shape[2] > 1:  # (is_causal would align the first query with the first key)
            mask = torch.ones(q.shape[2], self.length, dtype=torch.bool, device=q.device).tril(
                before
            )
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=before == 0, enable_gqa=True
        )
        return out.transpose(1, 2)


@contextlib.contextmanager
def replaced_attention(model: Llama, make: Callable[[], Attend]) -> Iterator[None]:
    """Each layer attends by a make() of its own inside."""
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    before = [a.attend for a in attentions]
    try:
        for a in attentions:
            a.attend = make()
        yield
    finally:
        for a, attend in zip(attentions, before, strict=True):
            a.attend = attend


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """[..., vocab] fp64: softmax(logits / temperature) of the fewest likeliest tokens that have top_p together, scaled to sum to 1.
    At temperature 0 the likeliest token alone (the first of equals)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    p, order = (
        (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if top_p < 1:
        p = p.where(
            p.cumsum(-1) - p < top_p, 0.0
        )  # a token is in if those before it do not have top_p yet
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


def expect_options(n: int, temperature: float, top_p: float) -> None:
    """ValueError naming the one that makes no sense."""
    if n < 1:
        raise ValueError(f"tokens={n} must be at least 1.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature={temperature} must be 0 (always the likeliest token) or greater."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1 (all tokens).")


@torch.no_grad()
def stream(
    model: Llama,
    tokens: Sequence[int],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: "torch.Generator | None" = None,
    eos: Collection[int] = (),
) -> Iterator[int]:
    """As ``generate``, one token after another."""
    expect_options(n, temperature, top_p)
    if not tokens:
        raise ValueError("tokens is empty; give at least one to continue.")
    device = model.norm.weight.device
    with replaced_attention(model, lambda: KeyValueCache(len(tokens) + n)):
        at, new = 0, list(tokens)
        for _ in range(n):
            positions = torch.arange(at, at + len(new), device=device)
            x = model.hidden(torch.tensor([new], device=device), positions)
            p = probabilities(head_logits(x[:, -1:], model.head)[0, 0], temperature, top_p).cpu()
            at += len(new)
            new = [
                int(
                    p.argmax() if temperature == 0 else torch.multinomial(p, 1, generator=generator)
                )
            ]
            yield new[0]
            if new[0] in eos:
                return


def generate(
    model: Llama,
    tokens: Sequence[int],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: "torch.Generator | None" = None,
    eos: Collection[int] = (),
) -> list[int]:
    """Up to n tokens that follow `tokens`, with the one of `eos` that ended them.

    Args:
        model: in this process alone; its attention is replaced meanwhile.
        temperature: 0 takes the likeliest token; below 1 sharper, above 1 flatter than the model.
        top_p: draws from the likeliest tokens that have this probability together; 1: from all.
        generator: on the CPU; None: torch's own.

    Raises ValueError for values that make no sense."""
    return list(
        stream(model, tokens, n, temperature=temperature, top_p=top_p, generator=generator, eos=eos)
    )


def decode_stream(tokenizer: "ByteTokenizer | JsonTokenizer", ids: Iterator[int]) -> Iterator[str]:
    """The text as it grows, in pieces that never end within a character."""
    seen: list[int] = []
    shown = text = ""
    for i in ids:
        seen.append(i)
        text = tokenizer.decode(
            [i for i in seen if i < tokenizer.vocab]
        )  # a model may know more ids than its tokenizer
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


# ---- the command line


def parser() -> Parser:
    p = Parser(
        "apps.gpt.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "model", metavar="MODEL", help="a run's folder, a checkpoint, or a Hugging Face folder"
    )
    p.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; may be empty")
    p.add_argument("--tokens", type=int, default=128, metavar="N", help="at most (default: 128)")
    p.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0: always the likeliest token (default: 1)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest of this share (default: 1)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    p.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which checkpoint of a run (default: the newest without damage)",
    )
    p.add_argument(
        "--tokenizer",
        metavar="FILE_OR_DIR",
        help="tokenizer.json, a prepared folder, or: bytes (default: the model's own)",
    )
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    p.add_argument(
        "--dtype",
        choices=[*TORCH_DTYPES, *SHORT_DTYPES],
        metavar="D",
        help=f"{', '.join(TORCH_DTYPES)} (default: bfloat16 on GPUs, else float32)",
    )
    return p


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed} must be at least 0.")
        expect_options(args.tokens, args.temperature, args.top_p)
        source = open_model(args.model, step=args.step)
        found = args.tokenizer or source.tokenizer
        if found is None:
            raise ValueError(
                f"{args.model} has no tokenizer of its own; name one with --tokenizer FILE (or bytes)."
            )
        tokenizer = open_tokenizer(found)
        if tokenizer.vocab > source.model.vocab:
            raise ValueError(
                f"--tokenizer {found} has {tokenizer.vocab} tokens, but the model knows {source.model.vocab}."
            )
        bos = [] if source.bos is None else [source.bos]
        prompt = [*bos, *tokenizer.encode(args.prompt)]
        if not prompt:
            raise ValueError(
                "--prompt is empty, and the model has no token that begins a text; give at least one character."
            )
        device = ringx.launch.detect(device=args.device).device
        dtype = TORCH_DTYPES[
            SHORT_DTYPES.get(
                args.dtype, args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
            )
        ]
        model = source.make(lambda q, k, v: q, dtype=dtype, device=device)
        began, count = time.perf_counter(), 0

        def counted() -> Iterator[int]:
            nonlocal count
            options = {
                "temperature": args.temperature,
                "top_p": args.top_p,
                "eos": {tokenizer.eos, *source.eos},
            }
            for i in stream(
                model,
                prompt,
                args.tokens,
                generator=torch.Generator().manual_seed(args.seed),
                **options,
            ):
                count += 1
                yield i

        print(args.prompt, end="", flush=True)
        for piece in decode_stream(tokenizer, counted()):
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - began
        print(f"\n[{count} tokens, {count / seconds:.1f} tokens/s]", file=sys.stderr)
        print()
    except ValueError as e:
        p.error(str(e))
    except KeyboardInterrupt:
        p.exit(130, "\n")
    return 0


if __name__ == "__main__":
    from apps.gpt.generate import main  # under its own name: one module, not two

    sys.exit(main())
