"""What dependencies do by themselves: none calls anybody, none writes outside the folders that are meant for it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from isthmus_tools.cli import app
from support.local_stack import ROOT
from support.patience import LONG_S

# A process that connects or sends anything, be it in C, is ended by the kernel: seccomp's filter, as prctl(2) takes it.
# A socket alone is allowed: urllib3 opens and closes one to see whether there is IPv6.
CONFINED = """
import ctypes, os, struct, sys
LOAD, EQUAL, RETURN, ALLOW, KILL = 0x20, 0x15, 0x06, 0x7FFF0000, 0x80000000
CALLS = {"x86_64": (42, 44, 46, 307), "aarch64": (203, 206, 211, 269)}[os.uname().machine]
program = [(LOAD, 0, 0, 0)]
program += [(EQUAL, len(CALLS) - i, 0, n) for i, n in enumerate(CALLS)]  # connect, sendto, sendmsg, sendmmsg
program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0, os.strerror(ctypes.get_errno())
"""
linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp is Linux's"
)


def run(code: str, home: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, with a home and a temporary folder that nobody wrote to."""
    home.mkdir(exist_ok=True)
    (home.parent / "tmp").mkdir(exist_ok=True)
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        "HOME": str(home),
        "TMPDIR": str(home.parent / "tmp"),
        "OPENBLAS_NUM_THREADS": "1",
        **env,
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def written(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers and a ReLU between them: x (1, 8) → (1, 4) → (1, 3)."""
    weights = [numpy_helper.from_array(np.ones(s, "float32"), n) for n, s in (("w", (8, 4)), ("v", (4, 3)))]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        weights,
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@linux
def test_a_confined_process_that_looks_a_name_up_is_ended(tmp_path: Path) -> None:
    """The trap of the tests below shuts."""
    code = CONFINED + "print('confined', flush=True)\nimport socket\nsocket.getaddrinfo('example.invalid', 443)"
    done = run(code, tmp_path / "home")
    assert done.stdout == "confined\n"
    assert done.returncode == -31, done.stderr  # SIGSYS


@linux
def test_a_session_of_the_library_has_no_telemetry_and_writes_nothing(tmp_path: Path, model: Path) -> None:
    code = f"""{CONFINED}
import isthmus.runtime.ort_runner
print(len(os.listdir("/proc/self/task")))
from isthmus.runtime.ort import ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(len(os.listdir("/proc/self/task")))
"""
    done = run(code, tmp_path / "home", model)
    # onnxruntime's telemetry starts its thread at import, and looks its host up seconds later: no thread, no look-up.
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), done.stderr
    assert written(tmp_path / "home") == written(tmp_path / "tmp") == []


def test_who_wants_onnxruntimes_telemetry_can_have_it(tmp_path: Path) -> None:
    code = "import os, isthmus.runtime.ort\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, tmp_path / "home", ORT_DISABLE_TELEMETRY="0").stdout == "0\n"
    assert run(code, tmp_path / "home2").stdout == "1\n"


def test_only_one_module_imports_onnxruntime() -> None:
    """An import elsewhere could come before the variable that the module sets."""
    files = (path for folder in ("shared", "bench", "functions", "template") for path in (ROOT / folder).rglob("*.py"))
    importing = re.compile(r"^ *(import|from) onnxruntime\b", re.MULTILINE)
    found = {str(path.relative_to(ROOT)) for path in files if importing.search(path.read_text())}
    # The second runs in the environments of peers, which have no Isthmus.
    assert found == {"shared/isthmus/runtime/ort.py", "bench/sessions.py"}


@pytest.fixture
def registry(tmp_path: Path, model: Path) -> Path:
    CliRunner().invoke(app, ["import", str(model), "--registry", str(tmp_path / "registry")], catch_exceptions=False)
    return tmp_path / "registry"


SERVE = (
    CONFINED
    + """
import time
from isthmus import settings
from isthmus.serving import KIND
client = KIND(settings.CLASS.from_env(os.environ)).test_client()
while client.get("/ready").status_code == 503:
    time.sleep(0.01)
print(client.get("/ready").status_code, client.post("/", data=b"{}").status_code)
"""
)


@linux
@pytest.mark.parametrize(
    ("kind", "settings", "own"),
    [
        ("create_segment_app", "SegmentSettings", {"preload": "small@head"}),
        # A router with other hops probes these.
        ("create_router_app", "RouterSettings", {"hops": "local", "model": "small"}),
    ],
)
def test_a_function_calls_nobody_and_writes_to_its_cache_alone(
    registry: Path, tmp_path: Path, kind: str, settings: str, own: dict[str, str]
) -> None:
    (tmp_path / "fresh").mkdir()
    env = {"registry": str(registry), "cache_dir": str(tmp_path / "cache"), "threads": "1"}
    code = SERVE.replace("KIND", kind).replace("CLASS", settings)
    done = run(code, tmp_path / "fresh" / "home", **env, **own)
    assert (done.returncode, done.stdout) == (0, "200 400\n"), done.stderr
    assert written(tmp_path / "fresh" / "home") == written(tmp_path / "fresh" / "tmp") == []


@linux
@pytest.mark.parametrize(
    "module", ["isthmus.registry.s3", "isthmus.registry.cloud", "isthmus.client", "isthmus.serving", "boto3"]
)
def test_importing_calls_nobody_and_writes_nothing(tmp_path: Path, module: str) -> None:
    done = run(f"{CONFINED}\nimport {module}", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "home") == written(tmp_path / "tmp") == []


@linux
def test_a_command_that_draws_writes_to_its_own_cache_alone(tmp_path: Path, model: Path) -> None:
    command = f"{CONFINED}\nfrom isthmus_tools.cli import main\nsys.argv[0] = 'isthmus'\nmain()"
    picture = tmp_path / "cuts.svg"
    done = run(command, tmp_path / "home", "cuts", model, "--picture", picture)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size
    assert "ontconfig" not in done.stderr
    assert written(tmp_path / "home") == []
    assert {name.split("/")[0] for name in written(tmp_path / "tmp")} == {"isthmus-cli"}


def test_a_command_turns_telemetry_off_before_any_model_is_read(tmp_path: Path) -> None:
    """The code of a torch model may import onnxruntime before Isthmus does."""
    code = "import os, sys, isthmus_tools.cli\nprint(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    assert run(code, tmp_path / "home").stdout == "1 False\n"
