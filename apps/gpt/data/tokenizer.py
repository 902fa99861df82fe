"""Tokenizers: bytes, or a file of the `tokenizers` library; reading and training one."""

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
        """The text without its ends; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id that is no token."""
        known_ids = _expect_ids(ids, self.vocab)
        text_bytes = bytes(i - 1 for i in known_ids if i != self.eos)
        return text_bytes.decode(errors="replace")


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Text is only text: no special token is recognized in it or added to it.

    Args:
        file: the tokenizer.json.
        eos: the token that ends a text; None looks for one of END_TOKENS.

    Raises:
        ValueError: the file cannot be read, or it does not say which token ends a text."""

    END_TOKENS = (END_OF_TEXT, "<|endoftext|>", "</s>")

    def __init__(self, file: Path, eos: str | None = None):
        from tokenizers import Tokenizer  # imported here: reading tokens does not need it

        try:
            contents = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ValueError(f"{file}: cannot be read: {reason}.") from None
        try:
            self._tokenizer = Tokenizer.from_str(contents)
        except Exception as e:  # noqa: BLE001 - the library raises nothing narrower
            raise ValueError(
                f"{file}: is no tokenizer.json of the tokenizers library: {e}."
            ) from None
        self._tokenizer.encode_special_tokens = True  # "</s>" within a document does not end it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos: int = self._end_token(file, eos)
        # One more than the largest id: some files leave ids out.
        self.vocab: int = 1 + max(self._tokenizer.get_vocab().values())

    def _end_token(self, file: Path, eos: str | None) -> int:
        """The id of the token that ends a text."""
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added_tokens.items() if token.special}
        if eos is None:
            known_ends = [special[name] for name in self.END_TOKENS if name in special]
            if not known_ends:
                raise ValueError(
                    f"{file}: none of its special tokens ({', '.join(special) or 'it has none'}) "
                    f"is one of {', '.join(self.END_TOKENS)}; "
                    "name with --eos the token that ends a text."
                )
            return known_ends[0]
        end = self._tokenizer.token_to_id(eos)
        if end is None:
            raise ValueError(
                f"eos={eos!r} is no token of {file}; "
                f"its special tokens: {', '.join(special) or 'none'}."
            )
        return end

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        # "fast" leaves out the offsets of the tokens in the text
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens.  Raises ValueError for an id that is no token."""
        return self._tokenizer.decode(_expect_ids(ids, self.vocab), skip_special_tokens=True)


TextTokenizer = ByteTokenizer | JsonTokenizer


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        ValueError: the folder was not prepared, or its tokenizer is not the one that made the
            tokens."""
    folder = Path(folder)
    index = read_index(folder)
    if index["tokenizer"] == "bytes":
        return ByteTokenizer()
    file = folder / index["tokenizer"]
    if not file.is_file():
        raise ValueError(f"{file} is missing; {HOW_TO_REPAIR}.")
    if file_digest(file) != index["tokenizer_sha256"]:
        raise ValueError(
            f"{file} is not the one that made these tokens (its sha256 differs from that in "
            f"{INDEX}); {HOW_TO_REPAIR}."
        )
    return JsonTokenizer(file, index["settings"]["eos"])


def train_tokenizer(texts: Iterator[str], vocab: int, file: Path) -> None:
    """Trains byte-level BPE of at most `vocab` tokens and writes it to `file`.

    Any text can be encoded with it, and decoding gives the same text again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,  # a pair that occurs once is no reason for a token
        special_tokens=[END_OF_TEXT],  # its id is 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def _expect_ids(ids: Sequence[int], vocab: int) -> list[int]:
    """The ids as a list of int.  Raises ValueError for one that is no token."""
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < vocab:
            raise ValueError(f"token {token} is none of the tokenizer's {vocab} tokens.")
    return tokens
