"""The summary of sample stores: what is there, by hand-made stores, and that looking changes nothing."""

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.records import write_jsonl
from rlhf.claims import claim
from rlhf.inspect_samples import main
from rlhf.shards import lock_path, shard_folder, shard_path
from rlhf.store_summary import Figures


def sampled(index: int, **extra) -> dict:
    return {"index": index, "response_ids": [[5, 6, 2], [7]], "finished": [True, False], "combined": [1.0, 2.0]} | extra


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine prompts, two a shard: done, done with a failed prompt, damaged, claimed, missing."""
    content = {"temperature": 1.2, "prompts": [[f"secret {i}"] for i in range(90)]}
    folder = shard_folder(tmp_path, content, 9, 2)
    write_jsonl(shard_path(folder, 0), [sampled(0), sampled(1, combined=[3.0, 6.0])])
    write_jsonl(shard_path(folder, 1), [{"index": 2, "prompt": [], "error": "[bold] HTTP 503"}, sampled(3)])
    write_jsonl(shard_path(folder, 2), [sampled(4), sampled(5)])
    shard_path(folder, 2).write_bytes(shard_path(folder, 2).read_bytes()[:-9])
    return folder


def contents(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_store_by_hand(folder, capsys):
    before = contents(folder)
    with claim(lock_path(folder, 3)):
        main(["--output_dir", str(folder.parents[1]), "--as_json", "true"])
    (store,) = json.loads(capsys.readouterr().out)["stores"]
    assert store["store"] == folder.name
    assert store["shards"] == {"done": 2, "claimed": 1, "missing": 1, "damaged": 1}
    assert store["damaged_shards"] == [str(shard_path(folder, 2))]
    assert (store["items"], store["items_done"], store["failed"]) == (9, 3, {"[bold] HTTP 503": 1})
    assert (store["samples"], store["finish_reasons"], store["tokens"]) == (6, {"stop": 3, "length": 3}, 12)
    assert store["mean_scores"] == {"combined": 2.5}  # (1 + 2 + 3 + 6 + 1 + 2) / 6
    assert set(store["settings"]) == {"temperature", "prompts"}
    assert store["settings"]["temperature"] == 1.2
    assert store["settings"]["prompts"]["items"] == 90
    after = contents(folder)
    lock_path(folder, 3).unlink()
    assert store["bytes"] == sum(len(data) for *_, data in after.values())
    assert contents(folder) == before, "looking must not change anything"


def test_the_table_says_the_same_and_shows_no_prompt(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["--output_dir", str(folder.parents[1])])
    shown = capsys.readouterr().out
    for part in ("2 done, 2 missing, 1 damaged", "3 of 9", "1 x [bold] HTTP 503", "6 (3 stop, 3 length)",
                 "12, 2.0 a sample", "mean combined", "2.5000", shard_path(folder, 2).name, "temperature"):  # fmt: skip
        assert part in shown
    assert "secret" not in shown


@pytest.mark.parametrize("text", ["[]", '{"items": "x", "items_per_shard": 2}', '{"items": 4, "items_per_shard": 0}'])
def test_settings_that_cannot_be_read_are_named(folder, text):
    (folder / "settings.json").write_text(text)
    with pytest.raises(UserError, match="settings.json cannot be read"):
        main(["--output_dir", str(folder.parents[1])])


def test_files_that_vanish_while_it_looks_do_no_harm(folder, monkeypatch):
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*listed(path), path / "renamed.tmp"])
    main(["--output_dir", str(folder.parents[1])])


def test_rows_of_other_stages():
    pairs, scores = Figures(), Figures()
    for row in ({"index": 0, "unfinished": 1}, {"index": 0, "unfinished": 0}, {"index": 1, "skipped": "identical"}):
        pairs.add(row)
    assert pairs.summary() == {"items_done": 2, "failed": {}, "samples": 4, "finish_reasons": {"stop": 3, "length": 1},
                               "tokens": None, "mean_scores": {}}  # fmt: skip
    for chosen in (1.0, 2.0, float("nan")):
        scores.add({"chosen": chosen, "rejected": -1.0})
    assert scores.summary()["items_done"] == 3
    assert scores.summary()["mean_scores"] == {"chosen": 1.5, "rejected": -1.0}


def test_mistakes_are_the_users_errors(tmp_path, folder):
    with pytest.raises(UserError, match="no samples in"):
        main(["--output_dir", str(tmp_path / "nowhere")])
    (folder / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        main(["--output_dir", str(tmp_path)])
