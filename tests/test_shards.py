"""The sample store: shared, killed, damaged, full; in the end every item is there exactly once."""

import errno
import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from configs import whole_files
from configs.errors import UserError
from rlhf import shards
from rlhf.claims import claim, is_claimed
from rlhf.shards import DamagedShard, lock_path, read_shard, read_shards, run_shards, shard_folder, shard_path

ROOT = Path(__file__).resolve().parents[1]


def row(index: int) -> dict:
    return {"index": index, "text": f"item {index * index} é\u2028"}


class Work:
    """Items to rows; remembers what it was asked for, and fails on some items as a server would."""

    def __init__(self, *failing: int) -> None:
        self.calls: list[list[int]] = []
        self.failing = set(failing)

    def __call__(self, items):
        self.calls.append(list(items))
        return [{"index": i, "prompt": [], "error": "HTTP 503"} if i in self.failing else row(i) for i in items]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gz"))}


def test_each_shard_is_computed_once_and_read_in_order(tmp_path):
    work = Work()
    assert list(run_shards(tmp_path, 10, 4, work)) == [4, 8, 10]
    assert list(run_shards(tmp_path, 10, 4, work)) == [4, 8, 10]
    assert work.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert read_shards(tmp_path, 10, 4) == [row(i) for i in range(10)]
    assert list(run_shards(tmp_path / "none", 0, 4, work)) == []
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(FileNotFoundError):
        read_shards(tmp_path, 10, 4)
    assert list(run_shards(tmp_path, 10, 4, work)) == [4, 6, 10]
    assert work.calls[3:] == [[4, 5, 6, 7]]


def test_a_process_waits_for_the_shards_of_others_and_counts_them(tmp_path, monkeypatch):
    """Shard 0 is another process's: it writes it while we wait. Shard 2 is too, but it dies: we take it over."""
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.001)
    other = Work()
    held = [claim(lock_path(tmp_path, shard)) for shard in (0, 2)]
    assert all(each.__enter__() for each in held)
    ours = Work()
    run = run_shards(tmp_path, 10, 4, ours)
    assert next(run) == 4, "shard 1, the first that is free"
    monkeypatch.setattr(time, "sleep", lambda _: shards.write_jsonl(shard_path(tmp_path, 0), other(range(4))))
    assert next(run) == 8, "the other's shard counts"
    monkeypatch.setattr(time, "sleep", lambda _: held[1].__exit__(None, None, None))
    assert list(run) == [10]
    assert ours.calls == [[4, 5, 6, 7], [8, 9]]
    held[0].__exit__(None, None, None)
    assert read_shards(tmp_path, 10, 4) == [row(i) for i in range(10)]


def test_a_shard_that_another_finished_between_look_and_claim_is_not_computed(tmp_path, monkeypatch):
    work, other = Work(), Work()

    def slow_claim(lock_file, **options):
        if not shard_path(tmp_path, 0).exists():
            shards.write_jsonl(shard_path(tmp_path, 0), other(range(4)))
        return claim(lock_file, **options)

    monkeypatch.setattr(shards, "claim", slow_claim)
    assert list(run_shards(tmp_path, 4, 4, work)) == [4]
    assert work.calls == []


def test_only_failed_items_are_tried_again_and_only_at_the_next_start(tmp_path):
    first = Work(2, 5, 7)
    assert list(run_shards(tmp_path, 10, 4, first)) == [4, 8, 10]
    assert first.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], "not again at the same start"
    before = files(tmp_path)
    second = Work(7)
    assert list(run_shards(tmp_path, 10, 4, second)) == [2, 6, 10], "the good shard, then the two repaired ones"
    assert second.calls == [[2], [5, 7]]
    rows = read_shards(tmp_path, 10, 4)
    assert [r["index"] for r in rows] == list(range(10))
    assert [r["index"] for r in rows if "error" in r] == [7]
    assert all(r == row(r["index"]) for r in rows if "error" not in r)
    assert files(tmp_path)["00002.jsonl.gz"] == before["00002.jsonl.gz"]
    list(run_shards(tmp_path, 10, 4, Work()))
    assert read_shards(tmp_path, 10, 4) == [row(i) for i in range(10)]


def test_a_retry_that_is_killed_keeps_the_other_rows(tmp_path):
    list(run_shards(tmp_path, 4, 4, Work(1)))
    before = files(tmp_path)

    def killed(items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_shards(tmp_path, 4, 4, killed))
    assert files(tmp_path) == before
    assert not is_claimed(lock_path(tmp_path, 0))


def test_items_with_several_rows_are_replaced_as_a_whole(tmp_path):
    def pairs(items, failing=()):
        good = [{"index": i, "id": f"{i}.{n}"} for i in items for n in (0, 1)]
        return [r if r["id"] not in failing else {"index": r["index"], "prompt": [], "error": "slow"} for r in good]

    list(run_shards(tmp_path, 3, 3, lambda items: pairs(items, failing=("1.1",))))
    list(run_shards(tmp_path, 3, 3, pairs))
    assert [r["id"] for r in read_shards(tmp_path, 3, 3)] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


def without_failed_rows() -> list[dict]:
    return [row(0), {"index": 1, "prompt": [], "error": "HTTP 503"}, {"index": 2, "prompt": [], "error": "HTTP 503"},
            {"index": 3, "prompt": [], "error": "no JSON"}, row(4)]  # fmt: skip


def test_failed_items_stop_a_run_or_are_left_out_by_the_users_choice():
    rows = without_failed_rows()
    assert shards.without_failed(rows, 0.6, 5) == [row(0), row(4)]
    with pytest.raises(UserError, match=r"3 of 5 prompts failed.*same command again.*\n  2 x HTTP 503\n  1 x no JSON"):
        shards.without_failed(rows, 0.59, 5)
    assert shards.without_failed(rows[:1], 0.0, 1) == rows[:1]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """Another level of compression, one letter changed, and the old checksum: only the checksum can tell."""
    changed = gzip.compress(gzip.decompress(data).replace(b"item 1", b"item 2"), mtime=0)
    return changed[:-8] + data[-8:]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: data[:-1], lambda data: b"{}\n"])
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, damage, caplog):
    list(run_shards(tmp_path, 8, 4, Work()))
    path = shard_path(tmp_path, 0)
    whole = files(tmp_path)
    path.write_bytes(damage(whole[path.name]))
    with pytest.raises(DamagedShard, match=r"00000\.jsonl\.gz is damaged"):
        read_shards(tmp_path, 8, 4)
    work = Work()
    assert list(run_shards(tmp_path, 8, 4, work)) == [4, 8]
    assert work.calls == [[0, 1, 2, 3]]
    assert "00000.jsonl.gz is damaged" in caplog.text
    assert files(tmp_path) == whole


def test_leftovers_of_killed_writes_are_ignored_and_cleaned(tmp_path):
    leftover = tmp_path / "00000.jsonl.gz.17-abcdef01.tmp"
    other = tmp_path / "00001.jsonl.gz.17-abcdef01.tmp"
    tmp_path.mkdir(exist_ok=True)
    shards.write_jsonl(shard_path(tmp_path, 1), [row(4)])
    for path in (leftover, other):
        path.write_bytes(b"half")
    list(run_shards(tmp_path, 5, 4, Work()))
    assert not leftover.exists()
    assert other.exists(), "only the holder of a shard's claim may remove its temporary file"
    assert read_shards(tmp_path, 5, 4) == [row(i) for i in range(5)]


def test_other_settings_have_another_folder_that_says_what_they_are(tmp_path):
    prompts = [["a question", i] for i in range(60)]
    one = shard_folder(tmp_path, {"seed": 0, "prompts": prompts}, 60, 8)
    assert one == shard_folder(tmp_path, {"prompts": prompts, "seed": 0}, 60, 8)
    assert one != shard_folder(tmp_path, {"seed": 1, "prompts": prompts}, 60, 8)
    assert one != shard_folder(tmp_path, {"seed": 0, "prompts": prompts[:-1]}, 59, 8)
    saved = json.loads((one / "settings.json").read_text())
    assert (saved["items"], saved["items_per_shard"], saved["seed"], saved["prompts"]["items"]) == (60, 8, 0, 60)
    assert "a question" not in (one / "settings.json").read_text()


WORKER = """
import json, os, random, sys, time
from pathlib import Path
from rlhf import shards
folder, log, count, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
shards.POLL_SECONDS = 0.01
def work(items):
    time.sleep(random.uniform(0.0, 0.03))
    line = json.dumps([os.getpid(), list(items)]) + "\\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    return [{"index": i, "text": f"item {i * i}" * 50} for i in items]
done = list(shards.run_shards(folder, count, size, work))
assert done[-1] == count, done
rows = shards.read_shards(folder, count, size)
assert [row["index"] for row in rows] == list(range(count))
"""


def start_worker(folder: Path, log: Path, count: int, size: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(folder), str(log), str(count), str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors


def test_separate_processes_share_all_shards_and_compute_none_twice(tmp_path):
    count, size, log = 100, 3, tmp_path / "log"
    finish([start_worker(tmp_path / "shards", log, count, size) for _ in range(3)])
    calls = [json.loads(line) for line in lines(log)]
    assert Counter(i for _, items in calls for i in items) == Counter(range(count))
    assert len({process for process, _ in calls}) > 1, "one process did everything: nothing was shared"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_processes_killed_at_any_moment_lose_nothing(tmp_path):
    count, size, log, kills = 120, 3, tmp_path / "log", 6
    finish([start_worker(tmp_path / "calm", tmp_path / "calm.log", count, size)])
    rng = random.Random(0)
    workers = [start_worker(tmp_path / "shards", log, count, size) for _ in range(2)]
    for kill in range(kills):
        while len(lines(log)) < 5 * (kill + 1):  # of 40 shards: no process is done before the last kill
            assert any(worker.poll() is None for worker in workers)
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.03))
        running = [worker for worker in workers if worker.poll() is None]
        victim = rng.choice(running)
        workers.remove(victim)
        victim.kill()
        victim.communicate()
        workers.append(start_worker(tmp_path / "shards", log, count, size))
    finish(workers)
    calls = [json.loads(line) for line in lines(log)]
    assert len(calls) <= count // size + kills, "a kill costs at most one shard"
    assert {i for _, items in calls for i in items} == set(range(count))
    assert files(tmp_path / "shards") == files(tmp_path / "calm")
    assert not list((tmp_path / "shards").glob("*.tmp"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more_is_the_users_error_and_loses_nothing(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    run = run_shards(tmp_path, 10, 4, Work())
    next(run)
    before = files(tmp_path)
    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(UserError) as error:
        next(run)
    for part in (f"{tmp_path} cannot be written", os.strerror(number), "same command again", "4 of 10 items are kept"):
        assert part in str(error.value)
    assert files(tmp_path) == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    assert list(run_shards(tmp_path, 10, 4, Work())) == [4, 8, 10]


def test_other_errors_of_the_disk_are_no_mistakes_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        list(run_shards(tmp_path, 10, 4, Work()))
    assert not list(tmp_path.glob("*.tmp"))


LIMITED = """
import random, resource, sys
from pathlib import Path
from configs.errors import UserError
from rlhf.shards import run_shards
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
def rows(items):
    text = random.Random(0).randbytes(4000).hex()
    return [{"index": i, "text": "" if i < 4 else text} for i in items]
try:
    list(run_shards(Path(sys.argv[1]), 8, 4, rows))
except UserError as error:
    print(error)
"""


def test_a_file_that_really_cannot_be_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True, timeout=300)  # fmt: skip
    assert f"{tmp_path} cannot be written: File too large" in done.stdout
    assert "4 of 8 items are kept" in done.stdout
    assert list(files(tmp_path)) == ["00000.jsonl.gz"]
    assert not list(tmp_path.glob("*.tmp"))
    assert len(read_shard(shard_path(tmp_path, 0))) == 4


def test_a_claim_ends_with_its_process_and_looking_changes_nothing(tmp_path):
    lock = tmp_path / "x.lock"
    assert not is_claimed(lock)
    assert not lock.exists()
    code = f"import time\nfrom pathlib import Path\nfrom rlhf.claims import claim\n" \
           f"with claim(Path({str(lock)!r})) as mine:\n    print(mine, flush=True)\n    time.sleep(60)\n"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    before = lock.stat()
    assert is_claimed(lock)
    with claim(lock) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    assert not is_claimed(lock)
    assert (lock.stat().st_mtime_ns, lock.stat().st_size) == (before.st_mtime_ns, before.st_size)
    with claim(lock) as mine:
        assert mine


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "not implemented")))
    with pytest.raises(UserError, match="file system without file locks"):
        list(run_shards(tmp_path, 4, 4, Work()))
