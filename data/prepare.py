"""Tokenise a source once and keep the result.

    python -m data.prepare --source ~/texts --tokenizer tokenizer.json
    python -m data.prepare                      # Python's own library, with a tokenizer trained on it

A prepared corpus is a folder `tokenizer.json, tokens.bin, offsets.npy, meta.json`, named by a
digest of everything it was made from, written aside and moved into place whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from data.shards import TokenShard, write_shard
from data.sources import PYTHON_STDLIB, SourceError, read_documents, source_files
from data.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer
from model.errors import UserError

_FORMAT = 1
_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class Corpus:
    folder: Path
    shard: TokenShard
    tokenizer: Tokenizer


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gemwright"


def prepare(source: str, tokenizer: Path | None, vocab_size: int, cache: Path | None = None) -> Corpus:
    """The tokenised corpus of a source, from the cache or made now.

    Without a tokenizer, one of `vocab_size` pieces is trained on the source. Safe to call from
    several processes at once: the first to finish wins, the others take its result.
    """
    files = source_files(source)
    folder = (cache or default_cache()) / "corpora" / _digest(source, files, tokenizer, vocab_size)
    made_once(folder, lambda aside: _make(aside, files, tokenizer, vocab_size))
    return Corpus(folder, TokenShard(folder), load_tokenizer(folder))


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Unless `folder` is there, have `make` fill an empty folder aside and move it into place whole."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        make(aside)
        aside.chmod(0o755)  # others may share the cache; temporary folders are private
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path, files: list[Path], tokenizer_path: Path | None, vocab_size: int) -> None:
    if next(read_documents(files), None) is None:
        raise SourceError(f"the {len(files)} files of data.source hold no text; give files with at least one document.")
    if tokenizer_path is None:
        tokenizer = train_tokenizer(read_documents(files), vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_shard(folder, _tokenise(tokenizer, files), tokenizer.get_vocab_size())


def _tokenise(tokenizer: Tokenizer, files: list[Path]) -> Iterator[list[int]]:
    pending: list[str] = []

    def flush() -> Iterator[list[int]]:
        for encoding in tokenizer.encode_batch_fast(pending, add_special_tokens=False):
            yield [BOS, *encoding.ids, EOS]
        pending.clear()

    # A document cannot smuggle in control tokens: text spelling one is encoded piece by piece.
    tokenizer.encode_special_tokens = True
    for text in read_documents(files):
        pending.append(text)
        if len(pending) == _DOCUMENTS_PER_CALL:
            yield from flush()
    yield from flush()


def _digest(source: str, files: list[Path], tokenizer: Path | None, vocab_size: int) -> str:
    """The library is small and each node has its own copy, so it is known by content."""
    settings = f"{_FORMAT}/{vocab_size if tokenizer is None else 'given'}"
    return digest_of(settings, tokenizer, files, by_content=source == PYTHON_STDLIB)


def digest_of(settings: str, tokenizer: Path | None, files: list[Path], by_content: bool = False) -> str:
    """Name of a corpus made from all this; files are known by place, size and date unless `by_content`."""
    digest = hashlib.sha256(settings.encode())
    if tokenizer is not None:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in files:
        if by_content:
            digest.update(path.read_bytes())
            continue
        status = path.stat()
        digest.update(f"{path.resolve()}/{status.st_size}/{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=PYTHON_STDLIB, help="file, folder, glob or python_stdlib")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, or its folder; without it one is trained")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of a trained tokenizer")
    parser.add_argument("--cache", type=Path, help=f"where to keep the result (default {default_cache()})")
    arguments = parser.parse_args()
    try:
        corpus = prepare(arguments.source, arguments.tokenizer, arguments.vocab_size, arguments.cache)
    except (UserError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{corpus.folder}: {corpus.shard.num_documents} documents, {len(corpus.shard.tokens)} tokens")


if __name__ == "__main__":
    main()
