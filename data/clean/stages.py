"""The stages of a cleaning: pipelines of the library, each with its number of tasks.

    filter      Texts, filters, shards (kept), signatures     a task for each part of the source
    pairs       minhash: documents that are alike             a task for each bucket
    clusters    minhash: the first of each                    one task
    find        exact: documents with the same text           eight tasks
    write       kept, without duplicates, shards (documents)  a task for each part of the source
    report      the report                                    one task

No result depends on how many tasks run at once. Without de-duplication the first stage writes the documents itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupFilter
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig

from data.clean.folder import Folder, Plan
from data.clean.language import Language
from data.clean.settings import Cleaning
from data.clean.steps import Counted, FirstOfEach, Kept, Report, Shards, Signatures, Texts
from data.clean.tally import Tally
from data.clean.words import Words

_FINDERS = 8
_PRIORITIES = 65_535
_HASHES = HashConfig(hash_fc="sha1")  # of Python itself; the library's other one takes xxhash before 4


@dataclass(frozen=True)
class Stage:
    """One pipeline and the number of its tasks."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def make_stages(asked: Cleaning, plan: Plan, folder: Folder) -> list[Stage]:
    """The stages in order; each needs all tasks of the one before."""
    parts, last = len(plan.tasks), "write"
    tally = Tally(asked.examples)
    steps = [Texts(plan, asked.on_bad, tally), *_filters(asked, tally)]
    kept, work = folder.work / "kept", folder.work
    if asked.dedup == "none":
        last = "filter"
        stages = [Stage(last, [*steps, Shards(folder.documents, tally, folder.logs(last) / "tally")], parts)]
    else:
        steps.append(Shards(kept, tally, folder.logs("filter") / "tally", with_origin=True))
        signatures, between, without = (_exact if asked.dedup == "exact" else _minhash)(asked, work)
        left = Tally(asked.examples)
        without.exclusion_writer = Counted(asked.dedup, left, "duplicate")
        write = [Kept(kept), without, Shards(folder.documents, left, folder.logs(last) / "tally")]
        stages = [Stage("filter", [*steps, signatures], parts), *between, Stage(last, write, parts)]
    names = list(dict.fromkeys(("filter", last)))
    return [*stages, Stage("report", [Report(asked, folder, names, plan.passed_over)], 1)]


def _filters(asked: Cleaning, tally: Tally) -> list[PipelineStep]:
    words = Words()
    made: dict[str, Any] = {
        "gopher_quality": lambda **shared: GopherQualityFilter(
            min_doc_words=asked.min_words,
            max_doc_words=asked.max_words,
            min_stop_words=asked.stop_words,
            **shared,
        ),
        "gopher_repetition": GopherRepetitionFilter,
        "c4": lambda **shared: C4QualityFilter(
            min_num_sentences=asked.min_sentences, filter_no_terminal_punct=asked.end_punctuation, **shared
        ),
        "fineweb": FineWebQualityFilter,
    }
    found = [made[name](language=words, exclusion_writer=Counted(name, tally)) for name in asked.filters]
    if not asked.language:
        return found
    path = Path(str(asked.language_model)).expanduser().absolute()
    return [Language(asked.language, path, asked.language_score, Counted("language", tally)), *found]


def _exact(asked: Cleaning, work: Path) -> tuple[PipelineStep, list[Stage], Any]:
    config = ExactDedupConfig(content_getter=_text, document_priority=_earlier_first, hash_config=_HASHES)
    signatures, found = str(work / "signatures"), str(work / "duplicates")
    find = [ExactFindDedups(signatures, found, config, lines_to_buffer=1000)]
    return (
        ExactDedupSignature(signatures, config, _FINDERS),
        [Stage("find", find, _FINDERS)],
        ExactDedupFilter(found, config),
    )


def _minhash(asked: Cleaning, work: Path) -> tuple[PipelineStep, list[Stage], Any]:
    config = MinhashConfig(
        n_grams=asked.ngram,
        num_buckets=asked.buckets,
        hashes_per_bucket=asked.hashes,
        norm_config=TextNormConfig(norm_numbers=asked.same_numbers),
        hash_config=_HASHES,
    )
    signatures, pairs, removed = (work / name for name in ("signatures", "pairs", "removed"))
    buckets = [MinhashDedupBuckets(str(signatures), str(pairs), config=config, lines_to_buffer=1000)]
    return (
        Signatures(str(signatures), config, Words()),
        [Stage("pairs", buckets, asked.buckets), Stage("clusters", [FirstOfEach(pairs, removed)], 1)],
        MinhashDedupFilter(str(removed)),
    )


def _text(document: Document) -> str:
    text: str = document.text
    return text


def _earlier_first(document: Document) -> int:
    """The library orders equal texts by their number within a task alone; by this, earlier tasks come first."""
    task: int = document.metadata["task"]
    return _PRIORITIES - task
