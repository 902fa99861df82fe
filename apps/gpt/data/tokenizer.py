"""The two tokenizers, the one of a prepared folder, and how one is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .format import HOW_TO_REPAIR, INDEX, file_digest, read_index

END_OF_TEXT = "<|end_of_text|>"


@dataclass(frozen=True)
class ByteTokenizer:
    """Token 0 ends a text, token b + 1 is byte b of its UTF-8."""

    eos: int = 0
    vocab: int = 257

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + 1 for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without its ends; bytes that are no UTF-8 become U+FFFD.  ValueError for an id that is no token."""
        return bytes(i - 1 for i in _expect_ids(ids, self.vocab) if i != self.eos).decode(
            errors="replace"
        )


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library.  Text is text: no special token is found in it or added to it.

    Raises ValueError if the file cannot be read or does not say which token ends a text (`eos` then names it)."""

    ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>")

    def __init__(self, file: Path, eos: "str | None" = None):
        from tokenizers import Tokenizer  # here: those who read tokens do not need it

        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(
                f"{file}: cannot be read: {getattr(e, 'strerror', None) or e}."
            ) from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as e:  # noqa: BLE001 - the library raises nothing narrower
            raise ValueError(
                f"{file}: is no tokenizer.json of the tokenizers library: {e}."
            ) from None
        self._tokenizer.encode_special_tokens = True  # "</s>" within a document does not end it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = {
            t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special
        }
        if eos is None:
            ends = [special[name] for name in self.ENDS if name in special]
            if not ends:
                raise ValueError(
                    f"{file}: none of its special tokens ({', '.join(special) or 'it has none'}) is one of {', '.join(self.ENDS)}; "
                    f"name with --eos the token that ends a text."
                )
            self.eos: int = ends[0]
        else:
            found = self._tokenizer.token_to_id(eos)
            if found is None:
                raise ValueError(
                    f"eos={eos!r} is no token of {file}; its special tokens: {', '.join(special) or 'none'}."
                )
            self.eos = found
        self.vocab: int = 1 + max(self._tokenizer.get_vocab().values())  # some files leave ids out

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )  # fast: without offsets
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens.  ValueError for an id that is no token."""
        return self._tokenizer.decode(_expect_ids(ids, self.vocab), skip_special_tokens=True)


def _expect_ids(ids: Sequence[int], vocab: int) -> list[int]:
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise ValueError(f"token {bad[0]} is none of the tokenizer's {vocab} tokens.")
    return ids


def load_tokenizer(folder: "str | Path") -> "ByteTokenizer | JsonTokenizer":
    """The tokenizer of a prepared folder: encode(str) -> list[int], decode(list[int]) -> str, eos, vocab.

    Raises ValueError if the folder was not prepared, or its tokenizer is not the one that made the tokens."""
    folder = Path(folder)
    index = read_index(folder)
    if index["tokenizer"] == "bytes":
        return ByteTokenizer()
    file = folder / index["tokenizer"]
    if not file.is_file():
        raise ValueError(f"{file} is missing; {HOW_TO_REPAIR}.")
    if file_digest(file) != index["tokenizer_sha256"]:
        raise ValueError(
            f"{file} is not the one that made these tokens (its sha256 differs from that in {INDEX}); {HOW_TO_REPAIR}."
        )
    return JsonTokenizer(file, index["settings"]["eos"])


def train_tokenizer(texts: Iterator[str], vocab: int, file: Path) -> None:
    """Byte-level BPE: any text can be written with it, and decoded is itself again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,  # a pair seen once is no reason for a token
        special_tokens=[END_OF_TEXT],  # id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))
