"""Packed sequences as HTML, as the trainer gets them: which documents share a row, what is learned, what is empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.batch import IGNORE, Row
from data.chat.markup import CONTROL, block, token
from data.chat.page import Files
from data.chat.read import ANY_SHAPE, PlainText, read_conversations
from data.chat.show import SOFT_TOKENS
from data.chat.visible import visible
from data.containers.records import RECORDS
from data.corpus.open import Data, Settings, Source, open_data
from data.corpus.packing import Piece
from data.corpus.reading import Reading
from data.corpus.sources import read_texts, source_files
from data.media.files import with_media_tokens
from data.tokenizer import load_tokenizer
from model import Gemma4Config

_SEED = 0
"""A run's default."""
_MODELS = {"small": "gemma4_e4b", "large": "gemma4_12b"}
_MOST_BYTES = 4
"""In a character, and so most tokens that share one."""


def open_source(source: Source, sequence_length: int, tokenizer: Path | None, size: str, thinking: bool) -> Data:
    """The packed rows of a source as a run with its defaults has them, from the cache or made now."""
    config = Gemma4Config.from_name(_MODELS[size])
    if tokenizer is not None:
        config = with_media_tokens(config, load_tokenizer(tokenizer))
    return open_data([source], Settings(config, sequence_length, _SEED, tokenizer, thinking=thinking))


def files_of(source: Source) -> Files:
    """The conversations of each file of a source, or its texts, all files together."""
    if source.format == "text":
        return {Path(source.path): partial(_texts, source.path)}
    shape = source.shape or ANY_SHAPE
    return {path: partial(read_conversations, [path], shape) for path in source_files(source.path, RECORDS).files}


def rows_html(data: Data, count: int) -> str:
    """A section with the first rows of a run: a strip of each with its documents, and their tokens."""
    dataset = data.datasets[0]
    shown, total = min(count, dataset.sequences_per_epoch), dataset.sequences_per_epoch
    order = f"the first {shown:,} of the {total:,} of an epoch, as run.seed={_SEED} orders them"
    articles = (_article(i, dataset[i], dataset.pieces(i), data.tokenizer) for i in range(shown))
    return (
        f"<section><h2>Packed rows of {dataset.sequence_length:,}</h2>\n<p class=numbers><span>{order}</span> "
        f"<span>{visible(str(dataset))}</span></p>\n{chr(10).join(articles)}</section>"
    )


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Text of each token; where several share a character, the last has it."""
    texts, pending = list[str](), list[int]()
    for i in ids:
        pending.append(i)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) == _MOST_BYTES
        texts.append(text if whole else "")
        pending = [] if whole else pending
    return texts


def _texts(source: str) -> Iterator[PlainText]:
    files, blocks = source_files(source).files, list[str]()
    reading = Reading(files)
    for path in files:
        for text, ends in read_texts([path], reading):
            blocks.append(text)
            if ends:
                yield PlainText(str(path), "".join(blocks))
                blocks = []
    reading.finish()


def _article(index: int, row: Row, pieces: Sequence[Piece], tokenizer: Tokenizer) -> str:
    """A row as its tensors say; the packing tells which documents these are."""
    ids, length = row.tokens_S.tolist(), len(row.tokens_S)
    starts = np.flatnonzero(np.diff(row.document_ids_S.numpy(), prepend=-1)).tolist()
    spans = [*pairwise([*starts, length])][: len(pieces)]  # without padding, which is a document too
    supervised = row.labels_S.numpy() != IGNORE
    # A label is the token after its position.
    learned = np.concatenate(([False], supervised[:-1]))
    filled, labels = spans[-1][1], int(supervised.sum())
    numbers = [f"{len(pieces):,} documents", f"{filled:,} tokens", f"{labels:,} labels ({labels / length:.1%})"]
    numbers.append(f"{length - filled:,} empty ({1 - filled / length:.1%})")
    heading = f"<b>row {index}</b> {' '.join(f'<span>{number}</span>' for number in numbers)}"
    texts, flags = token_texts(ids[:filled], tokenizer), learned.tolist()
    documents = "\n".join(
        block(
            "piece",
            f"document {piece.document:,}<br>{piece.start:,} to {piece.stop:,}",
            _pieces(ids[start:stop], texts[start:stop], flags[start:stop]),
        )
        for piece, (start, stop) in zip(pieces, spans, strict=True)
    )
    return f"<article><h3>{heading}</h3>\n{_strip(spans, learned)}\n{documents}</article>"


def _pieces(ids: Sequence[int], texts: Sequence[str], learned: Sequence[bool]) -> Iterator[tuple[bool, str]]:
    """Whether it is learned, and its HTML, of each token, or of each run of one soft token."""
    i, pending = 0, list[int]()
    for text, run in groupby(texts):
        stop = i + len(list(run))
        if text in SOFT_TOKENS:
            yield learned[i], f"<span class=control>{visible(text)}&times;{stop - i:,}</span>"
            i = stop
        for k in range(i, stop):
            pending.append(ids[k])
            if text:
                yield learned[k], token(text, pending, text in CONTROL)
                pending = []
        i = stop


def _strip(spans: Sequence[tuple[int, int]], learned: NDArray[np.bool_]) -> str:
    """A row as a bar: its documents in two shades, below them what is learned; the rest is empty."""
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False))
    bars = [(("even", "odd")[i % 2], start, stop, 0) for i, (start, stop) in enumerate(spans)]
    bars += [("learned", start, stop, 5) for start, stop in edges.reshape(-1, 2).tolist()]
    rects = "".join(
        f'<rect class={kind} x="{start}" y="{top}" width="{stop - start}" height="{10 - top}"/>'
        for kind, start, stop, top in bars
    )
    return f'<svg class=strip viewBox="0 0 {len(learned)} 10" preserveAspectRatio="none">{rects}</svg>'
