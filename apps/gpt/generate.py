"""Continue a text with a Llama: one process, keys and values cached.

    python -m apps.gpt.generate run --prompt "def main(" --tokens 100
    python -m apps.gpt.generate Llama-3.2-1B --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1

MODEL is a run of apps.gpt.train (its newest checkpoint without damage), a checkpoint, or a Hugging
Face folder.  The text begins with the token that begins a text, where the model has one.
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
from apps.common.arguments import Parser, run_command
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.data.tokenizer import TextTokenizer
from apps.gpt.huggingface import StoredModel, open_model, open_tokenizer
from apps.gpt.loss import head_logits
from apps.gpt.model import Attention, AttentionFunction, Llama

# ---- attention with cached keys and values


class KeyValueCache:
    """The attention of one layer over all tokens so far: keeps the keys and values it is given.

    Memory: 2 x B x capacity x kv_heads x head_dim elements.

    Args:
        capacity: the most tokens that it will be given."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None  # [B, Hkv, capacity, D]
        self._values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, S, H, D], k and v [B, S, Hkv, D] of the next S tokens -> [B, S, H, D], causal."""
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if self._keys is None or self._values is None:
            batch, kv_heads, _, head_dim = k.shape
            self._keys = k.new_empty((batch, kv_heads, self.capacity, head_dim))
            self._values = v.new_empty((batch, kv_heads, self.capacity, head_dim))
        count = q.shape[2]
        before = self.length
        self.length += count
        assert self.length <= self.capacity
        self._keys[:, :, before : self.length] = k
        self._values[:, :, before : self.length] = v
        mask = None
        if before and count > 1:  # is_causal would align the first query with the first key
            mask = torch.ones(count, self.length, dtype=torch.bool, device=q.device).tril(before)
        out = F.scaled_dot_product_attention(
            q,
            self._keys[:, :, : self.length],
            self._values[:, :, : self.length],
            attn_mask=mask,
            is_causal=before == 0,
            enable_gqa=True,
        )
        return out.transpose(1, 2)


@contextlib.contextmanager
def replaced_attention(
    model: Llama, make_attend: Callable[[], AttentionFunction]
) -> Iterator[None]:
    """Within it, each layer of the model attends by a ``make_attend()`` of its own."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    originals = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = make_attend()
        yield
    finally:
        for layer, attend in zip(layers, originals, strict=True):
            layer.attend = attend


def inference_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; None: bfloat16 on GPUs, else float32."""
    if not name:
        name = "bfloat16" if device.type == "cuda" else "float32"
    return TORCH_DTYPES[SHORT_DTYPES.get(name, name)]


# ---- tokens


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The probabilities with which the next token is drawn.

    They are softmax(logits / temperature) of the fewest likeliest tokens that have top_p together,
    scaled to sum to 1.  At temperature 0 it is the likeliest token alone (the first of equals).

    Args:
        logits: [..., vocab].
        temperature: 0 or greater.
        top_p: above 0, at most 1.

    Returns:
        [..., vocab] fp64."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    softmax = (logits.double() / temperature).softmax(-1)
    likeliest_first, tokens = softmax.sort(dim=-1, descending=True, stable=True)
    if top_p < 1:
        # A token is in if those before it do not have top_p yet.
        before = likeliest_first.cumsum(-1) - likeliest_first
        likeliest_first = likeliest_first.where(before < top_p, 0.0)
    scaled = likeliest_first / likeliest_first.sum(-1, keepdim=True)
    return torch.zeros_like(scaled).scatter(-1, tokens, scaled)


def expect_options(n: int, temperature: float, top_p: float) -> None:
    """ValueError naming the option that makes no sense."""
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
    generator: torch.Generator | None = None,
    eos: Collection[int] = (),
) -> Iterator[int]:
    """As ``generate``, one token after another."""
    expect_options(n, temperature, top_p)
    if not tokens:
        raise ValueError("tokens is empty; give at least one to continue.")
    device = model.norm.weight.device
    with replaced_attention(model, lambda: KeyValueCache(len(tokens) + n)):
        position = 0
        new_tokens = list(tokens)
        for _ in range(n):
            end = position + len(new_tokens)
            positions = torch.arange(position, end, device=device)
            hidden = model.hidden(torch.tensor([new_tokens], device=device), positions)
            logits = head_logits(hidden[:, -1:], model.head)[0, 0]
            token_probabilities = probabilities(logits, temperature, top_p).cpu()
            if temperature == 0:
                token = int(token_probabilities.argmax())
            else:
                token = int(torch.multinomial(token_probabilities, 1, generator=generator))
            yield token
            if token in eos:
                return
            position = end
            new_tokens = [token]


def generate(
    model: Llama,
    tokens: Sequence[int],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos: Collection[int] = (),
) -> list[int]:
    """Up to n tokens that follow `tokens`, with the one of `eos` that ended them.

    Args:
        model: in this process alone; its attention is replaced meanwhile.
        tokens: at least one.
        n: the most new tokens.
        temperature: 0 takes the likeliest token; below 1 is sharper, above 1 flatter than the
            model.
        top_p: draws from the likeliest tokens that have this probability together; 1: from all.
        generator: on the CPU; None: torch's own.
        eos: the tokens that end a text.

    Raises:
        ValueError: for values that make no sense."""
    new_tokens = stream(
        model,
        tokens,
        n,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
        eos=eos,
    )
    return list(new_tokens)


def decode_stream(tokenizer: TextTokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text as it grows, in pieces that never end within a character."""
    known_ids: list[int] = []
    shown = ""
    text = ""
    for token in ids:
        if token < tokenizer.vocab:  # a model may have more ids than its tokenizer
            known_ids.append(token)
        text = tokenizer.decode(known_ids)
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


def work(args: argparse.Namespace) -> int:
    """Generates what the command line asks for; prints the text as it grows."""
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0.")
    expect_options(args.tokens, args.temperature, args.top_p)
    stored = open_model(args.model, step=args.step)
    tokenizer = _choose_tokenizer(args, stored)
    prompt = tokenizer.encode(args.prompt)
    if stored.bos is not None:
        prompt = [stored.bos, *prompt]
    if not prompt:
        raise ValueError(
            "--prompt is empty, and the model has no token that begins a text; "
            "give at least one character."
        )
    device = ringx.launch.detect(device=args.device).device
    # This attention is never called: ``stream`` replaces it.
    model = stored.make(lambda q, k, v: q, dtype=inference_dtype(args.dtype, device), device=device)
    began = time.perf_counter()
    count = 0

    def counted_tokens() -> Iterator[int]:
        nonlocal count
        new_tokens = stream(
            model,
            prompt,
            args.tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            generator=torch.Generator().manual_seed(args.seed),
            eos={tokenizer.eos, *stored.eos},
        )
        for token in new_tokens:
            count += 1
            yield token

    print(args.prompt, end="", flush=True)
    for text in decode_stream(tokenizer, counted_tokens()):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n[{count} tokens, {count / seconds:.1f} tokens/s]", file=sys.stderr)
    print()
    return 0


def _choose_tokenizer(args: argparse.Namespace, stored: StoredModel) -> TextTokenizer:
    """The tokenizer that the command line names, else the model's own."""
    path = args.tokenizer or stored.tokenizer
    if path is None:
        raise ValueError(
            f"{args.model} has no tokenizer of its own; name one with --tokenizer FILE (or bytes)."
        )
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab > stored.model.vocab:
        raise ValueError(
            f"--tokenizer {path} has {tokenizer.vocab} tokens, "
            f"but the model knows {stored.model.vocab}."
        )
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(parser(), argv, work, interrupted="")


if __name__ == "__main__":
    from apps.gpt.generate import main  # under its own name: one module, not two

    sys.exit(main())
