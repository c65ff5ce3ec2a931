"""The fast BLAS. Each case runs in a Python of its own, since what is loaded first decides."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys

import pytest

from fulltune_nb.cpu import blas, blas_stub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="on macOS MLX uses Accelerate and this module does nothing")

SPEED = "import fulltune_nb; from fulltune_nb.system_info import matmul_gflops; print(matmul_gflops(seconds={seconds}))"
# From a process in which nothing was loaded, look again with everything that could be found taken away.
FIND_NOTHING = """
import os, sys
import fulltune_nb
from fulltune_nb.cpu import blas
del os.environ["FULLTUNE_BLAS"]
blas.OPENBLAS_NAMES, blas.MKL_NAMES = (), ()
sys.modules["scipy_openblas32"] = None
"""


def python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a new Python without the caller's own BLAS settings."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FULLTUNE_BLAS", "LD_PRELOAD", "PYTHONWARNINGS")}
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=inherited | environment, timeout=120, check=True
    )


def fake_library(path, names=blas.FUNCTIONS) -> str:
    """A library that defines `names`; enough to be found and loaded, never to be called."""
    path.write_bytes(blas_stub.image(dict.fromkeys(names, 0), os.uname().machine))
    return str(path)


@pytest.mark.long
def test_matmul_is_at_least_twenty_times_as_fast_as_the_bundled_one():
    # Other programs may hold the cores, which hits a BLAS with a thread per core hardest: so the two are measured close
    # together, several times, and one thread counts as well (it alone is about 25 times as fast).
    best = 0.0
    for attempt in range(8):
        threads = {"OPENBLAS_NUM_THREADS": "1"} if attempt % 2 else {}
        bundled = float(python(SPEED.format(seconds=0.6), FULLTUNE_BLAS="off").stdout)
        best = max(best, float(python(SPEED.format(seconds=0.6), **threads).stdout) / bundled)
        if best >= 20:
            break
    assert best >= 20, f"only {best:.1f} times as fast as the bundled BLAS"


def test_products_are_right_in_every_type_that_goes_to_the_blas():
    python("""
import fulltune_nb
import mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-13), (np.complex64, 1e-5)):
    a, b = rng.normal(size=(2, 70, 50)), rng.normal(size=(2, 50, 90))
    if dtype == np.complex64:
        a, b = a + 1j * rng.normal(size=a.shape), b - 1j * rng.normal(size=b.shape)
    with mx.stream(mx.cpu):
        x, y = (mx.array(v.astype(dtype), dtype={"float32": mx.float32, "float64": mx.float64}.get(dtype.__name__)) for v in (a, b))
        for got, want in ((x @ y, a @ b), (mx.swapaxes(y, 1, 2) @ mx.swapaxes(x, 1, 2), (a @ b).swapaxes(1, 2))):
            error = np.linalg.norm(np.array(got) - want) / np.linalg.norm(want)
            assert error < tolerance, (dtype, error)
""")


def test_importing_the_package_shows_nothing_and_warns_of_nothing():
    result = python("import fulltune_nb; import mlx.core", "-W", "error")
    assert (result.stdout, result.stderr) == ("", "")


def test_mlx_imported_first_is_warned_of_with_the_remedy_at_the_users_line():
    result = python("import mlx.core\nimport fulltune_nb")
    assert "BlasWarning" in result.stderr and "`import fulltune_nb` before `mlx`" in result.stderr
    assert "<string>:2:" in result.stderr


def test_mlx_imported_first_is_fine_where_a_blas_was_preloaded(tmp_path):
    library = fake_library(tmp_path / "libmyblas.so")
    code = "import mlx.core, fulltune_nb; from fulltune_nb.cpu import ensure_fast_blas; i = ensure_fast_blas(); print(i.how, i.path)"
    result = python(code, "-W", "error", LD_PRELOAD=library)
    assert result.stdout.split() == ["preloaded", library]


def test_reloading_or_importing_anew_after_mlx_does_not_warn():
    python(
        "import sys, importlib, fulltune_nb, mlx.core; from fulltune_nb.cpu import blas; first = blas.ensure_fast_blas()\n"
        "assert importlib.reload(blas).ensure_fast_blas() == first\n"
        "del sys.modules['fulltune_nb'], sys.modules['fulltune_nb.cpu'], sys.modules['fulltune_nb.cpu.blas'], blas\n"
        "from fulltune_nb.cpu import blas; assert blas.ensure_fast_blas().path is not None",
        "-W", "error",
    )  # fmt: skip


def test_nothing_found_is_warned_of_with_what_to_install():
    code = FIND_NOTHING + "info = blas.find_fast_blas(); print(info.name, info.path)"
    result = python(code, FULLTUNE_BLAS="off")
    assert result.stdout == "bundled reference BLAS None\n"
    assert "pip install scipy-openblas32" in result.stderr and "conda install libopenblas" in result.stderr


def test_a_processor_without_stubs_is_warned_of_with_the_reason():
    pytest.importorskip("scipy_openblas32", reason="comes with the extra `cpu`")
    code = FIND_NOTHING + "del sys.modules['scipy_openblas32']; blas.blas_stub.MACHINES.clear(); blas.find_fast_blas()"
    result = python(code, FULLTUNE_BLAS="off")
    assert "no forwarding stubs for" in result.stderr and "apt-get install libopenblas0" in result.stderr


def test_the_environments_openblas_comes_before_pypis(tmp_path):
    (tmp_path / "lib").mkdir()
    library = fake_library(tmp_path / "lib" / "libopenblas.so.0")
    code = "import fulltune_nb; from fulltune_nb.cpu import ensure_fast_blas; i = ensure_fast_blas(); print(i.path, i.how)"
    result = python(code, "-W", "error", CONDA_PREFIX=str(tmp_path))
    assert result.stdout == f"{library} environment or system\n"


def test_an_openblas_that_lacks_the_functions_is_passed_over(tmp_path):
    (tmp_path / "lib").mkdir()
    useless = fake_library(tmp_path / "lib" / "libopenblas.so.0", names=("cblas_sgemm",))
    code = "import fulltune_nb; from fulltune_nb.cpu import ensure_fast_blas; print(ensure_fast_blas().path)"
    assert python(code, CONDA_PREFIX=str(tmp_path)).stdout.strip() != useless


def test_mkl_without_its_threading_library_is_passed_over(tmp_path):
    (tmp_path / "lib").mkdir()
    fake_library(tmp_path / "lib" / "libmkl_rt.so.2")
    code = FIND_NOTHING + "blas.MKL_NAMES = ('libmkl_rt.so.2',); blas.opens = lambda p: 'iomp5' not in p; print(blas.find_fast_blas())"
    result = python(code, FULLTUNE_BLAS="off", CONDA_PREFIX=str(tmp_path))
    assert "path=None" in result.stdout and "libiomp5.so is missing" in result.stderr


def test_the_variable_names_the_library(tmp_path):
    library = fake_library(tmp_path / "libmyblas.so")
    code = "import fulltune_nb; from fulltune_nb.cpu import ensure_fast_blas; print(ensure_fast_blas().path)"
    assert python(code, "-W", "error", FULLTUNE_BLAS=library).stdout.strip() == library


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_variable_that_names_no_library_is_warned_of(tmp_path, content):
    path = tmp_path / "libwrong.so"
    if content is not None:
        path.write_bytes(content)
    result = python("import fulltune_nb", FULLTUNE_BLAS=str(path))
    assert "BlasWarning: FULLTUNE_BLAS names a library that cannot be used" in result.stderr and str(path) in result.stderr


def test_nothing_is_done_with_the_cuda_backend(tmp_path):
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.4\n")
    code = "import fulltune_nb; from fulltune_nb.cpu import ensure_fast_blas; i = ensure_fast_blas(); print(i.path, i.how)"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert python(code, PYTHONPATH=path).stdout == "None nothing to do: mlx-cuda-13 0.32.4 is installed\n"


def test_nothing_is_done_on_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.find_fast_blas().how == "nothing to do on darwin"


def test_stubs_forward_to_their_targets():
    called = []
    target = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: called.append(x) or x + 1)
    address = ctypes.cast(target, ctypes.c_void_p).value
    library = blas_stub.load(blas_stub.image({"first_name": address, "second_name": address}, os.uname().machine))
    assert (library.first_name(3), library.second_name(4), called) == (4, 5, [3, 4])
    assert not hasattr(library, "third_name")


def test_where_memory_files_are_forbidden_a_private_file_is_used_and_removed(monkeypatch, tmp_path):
    def forbidden(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x * 2)
    library = blas_stub.load(blas_stub.image({"double_it": ctypes.cast(target, ctypes.c_void_p).value}, os.uname().machine))
    assert library.double_it(21) == 42
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_image_names_its_machine_holds_the_address_and_asks_for_no_executable_stack(machine, number):
    data = blas_stub.image({"cblas_sgemm": 0x1122334455667788}, machine)
    assert data[:4] == b"\x7fELF" and struct.unpack_from("<H", data, 18) == (number,)
    assert data.count(struct.pack("<Q", 0x1122334455667788)) == 1
    headers = [struct.unpack_from("<II", data, 64 + 56 * i) for i in range(4)]
    assert (0x6474E551, 6) in headers
    assert not any(flags & 1 and flags & 2 for _, flags in headers), "no segment is both writable and executable"
