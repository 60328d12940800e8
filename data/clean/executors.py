"""Who runs a stage's tasks: processes of this machine, or jobs of SLURM."""

from __future__ import annotations

import copy
import io
import logging
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.utils.logging import add_task_logger, close_task_logger
from datatrove.utils.stats import PipelineStats
from loguru import logger

from data.clean.folder import Folder, Plan, unwritable, write_whole
from data.clean.settings import CleanError, Cleaning
from data.clean.stages import Stage, make_stages
from data.corpus.reading import go_on
from data.workers import in_order, processors
from model.errors import UserError

log = logging.getLogger("gemwright")

_SECONDS = 10
"""Between two lines on how far a stage is."""


class Local(LocalPipelineExecutor):
    """The library's executor, whose processes end with this one, and whose death is an error and no silence."""

    def run(self) -> None:
        """Run the tasks that are not done yet, as many at once as there are workers."""
        ranks = self.get_incomplete_ranks()
        done, told = self.tasks - len(ranks), time.monotonic()
        stage = Path(self.logging_dir.path).name
        if ranks and done:
            log.info("%s: %d of %d tasks were done before", stage, done, self.tasks)
        for _ in in_order(self._one, ranks, go_on, self.workers):
            done += 1
            if done == self.tasks or time.monotonic() - told > _SECONDS:
                told = time.monotonic()
                log.info("%s: %d of %d tasks", stage, done, self.tasks)

    def _one(self, rank: int) -> None:
        try:
            with redirect_stderr(io.StringIO()):  # the library tells its log, which is in a file, there too
                self._logged(rank)
        except UserError:
            raise
        except OSError as error:
            raise unwritable(Path(self.logging_dir.path), error) from None
        except Exception as error:
            logs = Path(self.logging_dir.path)
            raise CleanError(
                f"task {rank} of {logs.name} failed ({type(error).__name__}: {error}); "
                f"{logs / 'logs' / f'task_{rank:05d}.log'} says where. If files of {logs.parents[1]} were changed, "
                "remove it and start anew."
            ) from error

    def _logged(self, rank: int) -> None:
        log_file = add_task_logger(self.logging_dir, rank)
        steps, data = copy.deepcopy(self.pipeline), None  # what a step counts is one task's
        try:
            for step in steps:
                data = step(data, rank, self.world_size)
            deque(data or (), maxlen=0)
            with self.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
                PipelineStats(steps).save_to_disk(file)
            self.mark_rank_as_completed(rank)
        except Exception as error:
            logger.exception(error)
            raise
        finally:
            close_task_logger(log_file)


def run_locally(asked: Cleaning, plan: Plan, folder: Folder) -> None:
    """Run the stages one after the other in processes of this machine."""
    logger.remove()  # by which the library tells on the screen what it does
    workers = asked.workers or processors()
    for stage in make_stages(asked, plan, folder):
        Local(
            stage.steps, stage.tasks, workers, str(folder.logs(stage.name)), skip_completed=stage.name != "report"
        ).run()


def slurm_executors(asked: Cleaning, folder: Folder, stages: list[Stage]) -> list[Any]:
    """An executor for each stage, which waits for all tasks of the one before."""
    made: list[Any] = []
    for stage in stages:
        made.append(
            SlurmPipelineExecutor(
                stage.steps,
                stage.tasks,
                time=asked.time,
                partition=asked.partition,
                mem_per_cpu_gb=asked.memory_gb,
                workers=asked.workers or -1,
                job_name=f"clean_{stage.name}",
                qos=asked.qos,
                env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
                depends=made[-1] if made else None,
                logging_dir=str(folder.logs(stage.name)),
                skip_completed=stage.name != "report",
            )
        )
    return made


def submit(asked: Cleaning, plan: Plan, folder: Folder) -> None:
    """Hand all stages to SLURM; each waits for the one before.

    Raises `CleanError` while earlier jobs of the folder have not ended, or if SLURM refuses one.
    """
    if shutil.which("sbatch") is None:
        raise CleanError(
            "executor=slurm needs the command sbatch, which is not here; start it where jobs are submitted."
        )
    waiting = _waiting(folder)
    if waiting:
        raise CleanError(f"jobs {waiting} of {folder.out} are queued or run; wait for them, or end them by scancel.")
    logger.remove()
    made = slurm_executors(asked, folder, make_stages(asked, plan, folder))
    try:
        made[-1].run()
    except subprocess.CalledProcessError as error:
        raise CleanError(f"sbatch refused a job (exit status {error.returncode}); mend what it says above.") from None
    finally:
        write_whole(folder.jobs, ",".join(str(one.job_id) for one in made if one.job_id not in (None, -1)))


def _waiting(folder: Folder) -> str:
    """The last jobs that have not ended; empty if all have, or SLURM has forgotten them."""
    if not folder.jobs.is_file() or not folder.jobs.read_text():
        return ""
    asked = ["squeue", "--noheader", "--format=%A", f"--jobs={folder.jobs.read_text()}"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    return ", ".join(dict.fromkeys(said.stdout.split()))
