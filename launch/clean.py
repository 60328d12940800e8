"""Filter texts and take out duplicates, in front of preparing them; a report says what went and why.

    python -m launch.clean source=crawl out=clean                       # filters of Gopher, equal documents once
    python -m launch.clean source='crawl/*.jsonl.gz' out=clean 'filters=[gopher_quality,c4,fineweb]' dedup=minhash

source is what a run reads as data.source, and a run then reads data.source=clean/documents. filters are
gopher_repetition, gopher_quality, c4 and fineweb, in any order, [] for none; dedup is exact, minhash or none.
Thresholds are min_words max_words stop_words (gopher_quality), min_sentences end_punctuation (c4), ngram buckets
hashes same_numbers (minhash). language=en language_model=lid.176.bin keeps documents in English. The result is the
same for any workers=N. The same command again goes on where it was killed. executor=slurm partition=NAME submits the
stages as jobs, with time, memory_gb and qos. on_bad=skip leaves out what cannot be read.
Needs pip install gemwright[clean].
"""

from __future__ import annotations

import logging
import sys
import time

from data.clean.clean import clean
from data.clean.settings import CleanError, Cleaning
from data.clean.tally import rows, unread
from launch.arguments import run
from launch.variants import table


def clean_texts(asked: Cleaning) -> None:
    """Clean a source, and print the report as a table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    started = time.monotonic()
    try:
        report = clean(asked)
    except KeyboardInterrupt:
        raise CleanError("stopped; the same command goes on where it was.") from None
    if report is None:
        print(f"submitted; the same command prints the report once {asked.out}/report.json is there")
        return
    seconds = time.monotonic() - started
    print(table([*rows(report)]))
    if unread(report):
        print(f"not kept: {unread(report)}")
    if not report["documents_out"]:
        raise CleanError(
            f"nothing is left of {asked.source}; the table says why: loosen a threshold, or drop a filter."
        )
    print(f"{seconds:,.1f} s | {asked.out}/report.json | data.source={asked.out}/documents")


def main() -> None:
    """Clean the source that the command line names."""
    run(Cleaning, clean_texts, __doc__)


if __name__ == "__main__":
    main()
