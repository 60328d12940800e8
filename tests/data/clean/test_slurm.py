"""A cleaning as jobs of SLURM: what is submitted, and what the jobs do."""

from __future__ import annotations

import re
from pathlib import Path

import dill
import pytest

from data.clean.clean import clean
from data.clean.settings import CleanError, Cleaning
from tests.data.clean.texts import cleaned, contents, lines, prose

SBATCH = """#!/bin/sh
number=$(($(ls {jobs} | wc -l) + 1))
for script; do true; done
{{ echo "# $*"; cat "$script"; }} > {jobs}/$number
echo "Submitted batch job $number"
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which what is given to `sbatch` lies by the number of its job."""
    commands, jobs = tmp_path / "bin", tmp_path / "jobs"
    commands.mkdir()
    jobs.mkdir()
    for name, script in (
        ("sbatch", SBATCH.format(jobs=jobs)),
        ("scontrol", "#!/bin/sh\necho one\n"),
        ("squeue", f"#!/bin/sh\ncat {jobs.parent}/alive\n"),
    ):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    return jobs


def test_jobs_wait_for_each_other_and_write_what_local_processes_write(
    tmp_path: Path, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(3):
        lines(
            tmp_path / "texts" / f"{part}.jsonl", [*(prose(100 * part + draw) for draw in range(3)), prose(0), "short"]
        )
    keys = {"tasks": 3, "dedup": "minhash", "buckets": 2}
    asked = Cleaning(str(tmp_path / "texts"), str(tmp_path / "out"), tasks=3, dedup="minhash", buckets=2)
    slurm = {"executor": "slurm", "partition": "cpu", "workers": 2, "time": "1:00:00", "memory_gb": 3}
    vars(asked).update(slurm)
    assert clean(asked) is None
    scripts = [path.read_text() for path in sorted(jobs.iterdir(), key=lambda path: int(path.name))]
    stages, merges = scripts[::2], scripts[1::2]  # the library adds statistics up in a job of each stage
    assert all("merge_stats" in script for script in merges)
    found = [dict(re.findall(r"#SBATCH --([\w-]+)=(.+)", script)) for script in stages]
    assert [(args["job-name"], args["array"]) for args in found] == [
        *(("clean_filter", "0-2%2"), ("clean_pairs", "0-1%2"), ("clean_clusters", "0-0%2"), ("clean_write", "0-2%2")),
        ("clean_report", "0-0%2"),
    ]
    assert {(args["partition"], args["time"], args["mem-per-cpu"]) for args in found} == {("cpu", "1:00:00", "3G")}
    waits = [re.findall(r"--dependency=(\S+)", script.splitlines()[0]) for script in stages]
    assert waits == [[], ["afterok:1"], ["afterok:3"], ["afterok:5"], ["afterok:7"]]
    (tmp_path / "alive").write_text("3\n5\n5\n")
    with pytest.raises(CleanError, match=r"jobs 3, 5 of .* are queued or run; wait for them, or end them by scancel"):
        clean(asked)
    monkeypatch.setenv("SLURM_NODELIST", "one")
    for script, args in zip(stages, found, strict=True):
        pickled = re.findall(r"launch_pickled_pipeline (\S+)", script)[0]
        for task in range(int(args["array"][2]) + 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            dill.loads(Path(pickled).read_bytes()).run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    report = clean(asked)
    assert report == cleaned(tmp_path / "texts", tmp_path / "local", **keys)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert len([*jobs.iterdir()]) == len(scripts), "what is done is not submitted again"


def test_a_job_that_is_refused_is_told(tmp_path: Path, jobs: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    source = lines(tmp_path / "texts.jsonl", [prose(0)])
    with pytest.raises(CleanError, match=r"sbatch refused a job \(exit status 3\); mend what it says above"):
        clean(Cleaning(str(source), str(tmp_path / "out"), executor="slurm", partition="no"))


def test_without_slurm_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    source = lines(tmp_path / "texts.jsonl", [prose(0)])
    with pytest.raises(CleanError, match="executor=slurm needs the command sbatch, which is not here"):
        clean(Cleaning(str(source), str(tmp_path / "out"), executor="slurm", partition="cpu"))
