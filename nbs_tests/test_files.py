"""Files and folders that are whole or not there at all."""

import errno
import os
import threading

import pytest

from fulltune_nb import files, load_model
from fulltune_nb.errors import ModelError
from fulltune_nb.files import (
    append_line,
    begin_checksum,
    check_space,
    is_within,
    put_in_place,
    remove_folder,
    sha256_of,
    tidy,
    wait_for_removals,
    write_parts,
)
from fulltune_nb.tiny import BASE_MODEL


def folder(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_another_and_leaves_nothing_beside(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(files, "exchange_names", lambda *_: False)
    place = folder(tmp_path / "place", "old")
    put_in_place(folder(tmp_path / "new", "new"), place)
    assert (place / "file").read_text() == "new" and os.listdir(tmp_path) == ["place"]
    put_in_place(folder(tmp_path / "new", "first"), tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("call", [1, 2])
def test_a_process_killed_between_two_renames_loses_nothing(can_exchange, call, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    renamed, rename = [], os.rename

    def killing(source, target):
        if len(renamed) + 1 == call:
            raise Killed
        renamed.append(target)
        rename(source, target)

    if not can_exchange:
        monkeypatch.setattr(files, "exchange_names", lambda *_: False)
    place, new = folder(tmp_path / "place", "old"), folder(tmp_path / ".place-12345678", "new")
    monkeypatch.setattr(os, "rename", killing)
    try:
        put_in_place(new, place)
    except Killed:
        pass
    monkeypatch.setattr(os, "rename", rename)
    tidy(tmp_path, "place")
    assert os.listdir(tmp_path) == ["place"] and (place / "file").read_text() in ("old", "new")


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange_names", lambda *_: False)
    place = folder(tmp_path / "place", "old")
    with pytest.raises(OSError):
        put_in_place(tmp_path / "missing", place)
    assert os.listdir(tmp_path) == ["place"] and (place / "file").read_text() == "old"


def test_tidying_touches_nothing_of_others(tmp_path):
    for name in (".place-settings", ".ssh-12345678", "place-12345678", ".place-1234", ".other-12345678-old"):
        folder(tmp_path / name, "mine")
    before = sorted(set(os.listdir(tmp_path)) - {".place-settings"})
    (tmp_path / ".place-12345678.jsonl").write_text("half")
    done = tidy(tmp_path, "place")
    assert set(before) <= set(os.listdir(tmp_path)) and not (tmp_path / ".place-12345678.jsonl").exists()
    assert len(done) == 2  # a dot, our own name and eight letters: nobody else's
    assert tidy(tmp_path / "missing", "place") == []


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before it began
    remove_folder(folder(tmp_path / "place", "old"))
    assert not (tmp_path / "place").exists()
    monkeypatch.undo()
    assert len(tidy(tmp_path, "place")) == 1 and os.listdir(tmp_path) == []  # not brought back: some of its files may be gone


def test_a_file_that_somebody_else_removes_from_it_meanwhile_is_no_error(tmp_path, monkeypatch):
    place = folder(tmp_path / "place", "old")
    monkeypatch.setattr(files.Path, "iterdir", lambda self: iter([self / "gone"]))
    remove_folder(place)
    assert os.listdir(tmp_path) == []


def replace(place):
    put_in_place(folder(place.with_name(".place-12345678.unfinished"), "new"), place)


THEN = {
    "tidying": lambda place: tidy(place, "place"),
    "asking for space": lambda place: check_space(place, 1, "a file"),
    "waiting": lambda place: wait_for_removals(),
}


@pytest.mark.parametrize("remove", [remove_folder, replace])
@pytest.mark.parametrize("then", THEN.values(), ids=THEN)
def test_a_large_folder_is_removed_beside_what_comes_next(remove, then, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMOVED_AT_ONCE", 0)
    may_go_on, rmtree = threading.Event(), files.shutil.rmtree
    monkeypatch.setattr(files.shutil, "rmtree", lambda *arguments: may_go_on.wait() and rmtree(*arguments))
    remove(folder(tmp_path / "place", "old"))
    left = [name for name in os.listdir(tmp_path) if name != "place"]
    assert len(left) == 1 and left[0].startswith(".place-")
    threading.Timer(0.2, may_go_on.set).start()
    then(tmp_path)
    assert [name for name in os.listdir(tmp_path) if name != "place"] == []


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, write = tmp_path / "lines", os.write
    append_line(path, "one")
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    with pytest.raises(OSError, match="No space"):
        append_line(path, "two")
    monkeypatch.setattr(os, "write", write)
    assert path.read_text() == "one\n"
    with path.open("a") as file:
        file.write("cut sh")  # its writer was killed
    append_line(path, "three")
    assert path.read_text() == "one\ncut sh\nthree\n"


def test_the_checksum_is_that_of_what_was_written(tmp_path):
    before = threading.active_count()
    parts = [b"begin", memoryview(os.urandom(3 * 2**23 + 5)), b"", b"end"]
    (tmp_path / "file").write_bytes(b"longer" * 2**23)
    checksum = begin_checksum(parts)
    write_parts(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert checksum() == checksum() == sha256_of(tmp_path / "file")
    assert threading.active_count() == before


def test_a_folder_that_a_mac_has_shown_is_still_empty(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert files.is_empty(tmp_path)
    lm = load_model(BASE_MODEL)
    lm.save(tmp_path)
    with pytest.raises(ModelError, match="not an empty folder"):
        lm.save(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_for_folders_is_written_to_and_other_failures_are_told(number, tmp_path, monkeypatch):
    real, failing = os.fsync, []

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") or failing:
            raise OSError(*(failing or (number, "no")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    failing[:] = number, "no"
    with pytest.raises(OSError, match="no"):  # of a file it says that the text may be lost
        files.write_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "text"


def test_on_a_mac_the_disk_itself_is_flushed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    files.write_text(tmp_path / "a", "text")
    assert asked == [51, 51]  # the file, and the folder's list of names


def test_too_little_space_is_told_before_anything_is_written(tmp_path):
    check_space(tmp_path / "not" / "there", 1, "a file")
    with pytest.raises(OSError, match="a file needs .* bytes, .* has .* free"):
        check_space(tmp_path / "not" / "there", 2**62, "a file")


def test_being_within_a_folder_follows_links(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert is_within(tmp_path / "link" / "runs", tmp_path / "model") and is_within(tmp_path / "model", tmp_path / "model")
    assert not is_within(tmp_path / "model-2", tmp_path / "model") and not is_within(tmp_path, tmp_path / "model")
