"""The folder of compiled kernels. Each case runs in a Python of its own, since the first import of mlx decides."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest

from fulltune_nb.cpu import kernel_folder
from fulltune_nb.cpu.kernel_folder import check_private

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the folder of temporary files is the user's own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="without g++ MLX compiles nothing"),
]
REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
BARE = "import mlx.core as mx\n"
OURS = "import fulltune_nb\nimport mlx.core as mx\n"
COMPUTE = """
f = mx.compile(lambda a: mx.exp(a) * 2 + mx.sin(a))
print("RIGHT" if abs(f(mx.ones(3))[0].item() - 6.278035) < 1e-4 else "WRONG")
"""
WHERE = "from fulltune_nb.cpu import ensure_kernel_folder\nprint(ensure_kernel_folder().path)\n"
AS_NOBODY = """
import ctypes, os, platform, shutil, subprocess, sys, tempfile
sys.platform = "darwin"  # for the import, which must come first: the other user may not be allowed to read this Python
import fulltune_nb
from fulltune_nb.cpu import kernel_folder
sys.platform, kernel_folder._found = "linux", None
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
kernel_folder.ensure_kernel_folder()
import mlx.core as mx
"""


@pytest.fixture
def shared():
    """A folder that everybody may write to, outside of the user's own ones, with `tmp` inside of it of the same kind."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    (folder / "tmp").mkdir()
    for path in (folder, folder / "tmp"):
        path.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def python(code: str, home: Path, temporary: Path, **options) -> subprocess.CompletedProcess:
    """Runs code in a new Python with these folders."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "TMP", "TEMP")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, **options)


def kernels(folder: Path) -> list[Path]:
    return sorted(folder.rglob("mlx/*/cpu/*.so"))


def test_a_library_planted_in_the_folder_of_temporary_files_is_not_loaded(shared, tmp_path):
    temporary = shared / "tmp"
    assert "RIGHT" in python(BARE + COMPUTE, tmp_path, temporary).stdout
    (planted,) = kernels(temporary)
    planted.write_text("planted")
    assert "planted" not in python(BARE + COMPUTE, tmp_path, temporary).stdout and planted.exists()
    assert "Could not load" in python(BARE + COMPUTE, tmp_path, temporary).stderr  # what mlx alone does
    done = python(OURS + COMPUTE, tmp_path, temporary)
    assert done.stdout == "RIGHT\n" and not done.stderr and kernels(tmp_path)


TAKEN = """
import os
place = ensure_kernel_folder().path.parent
os.rename(place, str(place) + "-old")
"""


@pytest.mark.parametrize(
    ("then", "found"),
    [("", "RIGHT"), ("os.mkdir(place)\nos.chmod(place, 0o777)\n", "no folder that this user alone can write to"),
     ("os.symlink(str(place) + '-old', place)\n", "no folder that this user alone can write to")],
    ids=["removed", "made by somebody else", "a link"],
)  # fmt: skip
def test_a_folder_that_goes_meanwhile_is_made_again_and_that_of_others_is_not_used(tmp_path, then, found):
    done = python(OURS + WHERE + TAKEN + then + COMPUTE, tmp_path, tmp_path)
    assert found in done.stdout + done.stderr and bool(kernels(tmp_path)) == (found == "RIGHT")


def test_a_disk_that_is_full_when_a_kernel_is_new_is_told_and_the_run_can_be_saved_and_goes_on(tmp_path):
    code = """
import resource
from fulltune_nb import tiny
lm = fulltune_nb.load_model(tiny.BASE_MODEL)
data = fulltune_nb.load_data({"train": [{"text": "a b c"}] * 4, "valid": [{"text": "a b"}]}, lm.tokenizer)
trainer = fulltune_nb.Trainer(lm, data, fulltune_nb.TrainConfig(iters=1, batch_size=2, val_batches=0), run_dir="run")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
try:
    trainer.evaluate("valid")
except fulltune_nb.errors.DeviceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print(trainer.save().name, trainer.run(), trainer.state)
"""
    done = python(OURS + code, tmp_path, tmp_path, cwd=tmp_path)
    assert "MLX could not compile a kernel, or not load it: [Compile::eval_cpu]" in done.stdout and "Make room" in done.stdout
    assert done.stdout.endswith("step-000000 None done\n")


def test_two_users_compile_with_one_folder_of_temporary_files(shared):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if not all(path.stat().st_mode & 0o001 for file in (mx.__file__, __file__) for path in Path(file).resolve().parents):
        pytest.skip("g++ of another user cannot read MLX's headers or this checkout, which stand in a folder of this user alone")
    for user, begin in ((0, OURS), (NOBODY, AS_NOBODY)):
        home = make(shared / str(user), 0o700)
        os.chown(home, user, user)
        done = python(begin + COMPUTE, home, shared / "tmp")
        assert done.stdout == "RIGHT\n" and not done.stderr
        (kernel,) = kernels(home)
        assert kernel.stat().st_uid == user and not kernels(shared / "tmp")


def test_everything_else_sees_the_folder_of_temporary_files_as_it_was(tmp_path):
    temporary = make(tmp_path / "tmp", 0o700)
    code = """
import os, subprocess, tempfile
print(tempfile.gettempdir(), os.environ["TMPDIR"], subprocess.getoutput("echo $TMPDIR"))
"""
    assert set(python(OURS + COMPUTE + code, tmp_path, temporary).stdout.split()) == {"RIGHT", str(temporary)}
    assert not list(temporary.iterdir())


def test_a_later_process_finds_the_kernels_and_one_beside_it_has_a_folder_of_its_own(tmp_path):
    assert "RIGHT" in python(OURS + COMPUTE, tmp_path, tmp_path).stdout
    (kernel,) = kernels(tmp_path)
    made = kernel.stat().st_mtime_ns
    beside = f"import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', {OURS + WHERE!r}], text=True))"
    right, mine, other = python(OURS + COMPUTE + WHERE + beside, tmp_path, tmp_path).stdout.split()
    assert right == "RIGHT" and kernel.stat().st_mtime_ns == made
    assert kernel.is_relative_to(mine) and mine != other and Path(mine).parent == Path(other).parent


def test_a_process_that_was_killed_leaves_no_kernel_that_is_cut_short(tmp_path):
    place = make(tmp_path / "0" / "mlx" / "1.0" / "cpu", 0o700)
    whole = Path(mx.__file__).read_bytes()
    damaged = {"empty": b"", "short": whole[:-1], "unwritten": bytes(len(whole)), "no_such_kernel": whole}
    for name, content in {**damaged, "whole": whole}.items():
        (place / f"lib{name}.so").write_bytes(content)
    (place / "whole.cpp").touch()
    assert kernel_folder._own_folder(tmp_path) == tmp_path / "0"
    assert [path.name for path in place.iterdir()] == ["libwhole.so"]


@pytest.mark.parametrize("change", ["ROOM = 2**60", "_load = lambda folder: open('/nowhere')"], ids=["no room", "nothing loads"])
def test_where_nothing_can_be_compiled_mlx_goes_on_uncompiled_and_says_so_once(tmp_path, change):
    look_again = f"""
from fulltune_nb import cpu
from fulltune_nb.cpu import kernel_folder
cache = next(kernel_folder._places())
kernel_folder._found, kernel_folder._places = None, lambda: iter([cache])
kernel_folder.{change}
kernel_folder.ensure_kernel_folder()
kernel_folder.ensure_kernel_folder()
print(cpu.compiles(), cpu.may_use_kernels())
"""
    done = python(OURS + look_again + COMPUTE, tmp_path, tmp_path)
    assert done.stdout == "False False\nRIGHT\n" and not kernels(tmp_path), done.stderr
    assert done.stderr.count("CompileWarning: MLX computes uncompiled on this CPU") == 1 and "XDG_CACHE_HOME" in done.stderr


def test_after_mlx_a_folder_that_others_write_to_is_not_used_and_one_of_our_own_is(shared, tmp_path):
    temporary = shared / "tmp"
    done = python(BARE + OURS + COMPUTE, tmp_path, temporary)
    assert "RIGHT" in done.stdout and "CompileWarning" not in done.stderr and len(kernels(temporary)) == 1
    (temporary / "mlx").chmod(0o777)
    done = python(BARE + OURS + COMPUTE, tmp_path, temporary)
    assert "RIGHT" in done.stdout and "CompileWarning" in done.stderr and "`import fulltune_nb` first" in done.stderr
    done = python(BARE + OURS + COMPUTE, tmp_path, tmp_path / "none")
    assert "RIGHT" in done.stdout and "there is no such folder" in done.stderr


def test_a_full_folder_of_the_compilers_temporary_files_is_found_before_the_first_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert kernel_folder._problem_of_compiler() is None
    monkeypatch.setattr(kernel_folder, "ROOM", 2**60)
    assert str(tmp_path) in kernel_folder._problem_of_compiler() and "full" in kernel_folder._problem_of_compiler()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert "/tmp" in kernel_folder._problem_of_compiler()


def test_kernels_for_cuda_stand_in_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_folder, "installed_cuda_backend", lambda: "mlx-cuda-13 0.32.4")
    monkeypatch.setattr(kernel_folder, "_places", lambda: iter([make(tmp_path / "place", 0o700)]))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(kernel_folder.CUDA_VARIABLE, raising=False)
    found = kernel_folder._find()
    assert found == kernel_folder.KernelFolder(tmp_path / "place" / "0")
    assert Path(os.environ.pop(kernel_folder.CUDA_VARIABLE)).is_relative_to(found.path)


def make(path: Path, mode: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("modes", "why"),
    [((0o1777, 0o700), None), ((0o755, 0o755), None), ((0o777, 0o700), "others can change"), ((0o755, 0o777), "others can change"),
     ((0o755, 0o1777), "others can change"), ((0o775, 0o700), "others can change")],
    ids=["in a sticky folder", "readable", "in an open folder", "open", "sticky", "in a group's folder"],
)  # fmt: skip
def test_a_folder_is_private_if_nobody_else_can_write_there_or_replace_it(shared, modes, why):
    folder = make(make(shared / "a", modes[0]) / "b", modes[1])
    if why is None:
        assert check_private(folder) == folder
    else:
        with pytest.raises(OSError, match=why):
            check_private(folder)


def test_links_foreign_folders_and_names_that_a_shell_reads_are_no_private_folders(shared):
    own = make(shared / "own", 0o700)
    (shared / "link").symlink_to(own)
    with pytest.raises(OSError, match="link"):
        check_private(shared / "link")
    with pytest.raises(OSError, match="dollar"):
        check_private(make(shared / "$(id)", 0o700))
    with pytest.raises(OSError, match="belongs to user"):
        check_private(Path("/proc/1") if os.geteuid() else foreign(make(shared / "theirs", 0o700)))


def foreign(folder: Path) -> Path:
    os.chown(folder, NOBODY, NOBODY)
    return folder
