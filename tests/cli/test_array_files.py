"""Files of arrays that commands are given: what is broken, or no tensor, is refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from isthmus.errors import ModelError, RequestMalformed
from isthmus_tools import array_files
from isthmus_tools.cli.inputs import read_model_inputs, read_tensors


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


def npz(tmp_path: Path) -> bytes:
    np.savez(tmp_path / "good.npz", ids=np.arange(64))
    return (tmp_path / "good.npz").read_bytes()


HUGE = header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999, 9), }")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"hello", "it is another kind of file"),
        (b"PK\x03\x04junk", "zip"),
        (HUGE, "allocate"),
        (header("{'descr': ((((((, 'fortran_order': False, 'shape': (9, 9), }"), ""),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (9, 9), }"), "allow_pickle"),
        ("half of one", "zip"),
        ("another byte", "CRC"),
    ],
)
def test_a_broken_file_is_refused_by_every_reader(content: bytes | str, why: str, tmp_path: Path) -> None:
    whole = npz(tmp_path)
    if content == "half of one":
        content = whole[: len(whole) // 2]
    elif content == "another byte":
        content = whole[:300] + bytes([whole[300] ^ 255]) + whole[301:]
    assert isinstance(content, bytes)
    file = tmp_path / "x.npz"
    file.write_bytes(content)
    said = re.escape(f"{file} cannot be read as a .npy or .npz file: ") + f".*{why}"
    with pytest.raises(ValueError, match=said):
        array_files.read(file)
    with pytest.raises(ModelError, match=said):
        read_model_inputs(None, [file])
    if content[:2] != b"PK":
        with pytest.raises(RequestMalformed, match=said):
            read_tensors([f"x={file}"])


def test_arrays_are_in_this_machines_byte_order_and_bfloat16_is_restored(tmp_path: Path) -> None:
    values = np.arange(8).reshape(2, 4)
    np.savez(tmp_path / "x.npz", big=values.astype(">i8"), half=values.astype(ml_dtypes.bfloat16))
    found = array_files.read(tmp_path / "x.npz")
    assert isinstance(found, Mapping)
    assert {n: (a.dtype.isnative, a.dtype.name) for n, a in found.items()} == {
        "big": (True, "int64"),
        "half": (True, "bfloat16"),
    }
    assert all(np.array_equal(a, values) for a in found.values())


def test_text_is_no_example(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(["a", "b"]))
    with pytest.raises(ModelError, match="holds <U1; a tensor is one of bool"):
        read_model_inputs(None, [Path(f"x={tmp_path / 'x.npy'}")])


def test_an_example_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros(3))
    npz(tmp_path)
    with pytest.raises(ModelError, match=r"x\.npy holds one array, without a name"):
        read_model_inputs(None, [Path("x.npy")])
    with pytest.raises(ModelError, match=r"good\.npz holds several arrays \(ids\)"):
        read_model_inputs(None, [Path("ids=good.npz")])


def test_what_is_given_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.zeros(3))
    entries = [f"x={tmp_path / name}.npy" for name in ("a", "b")]
    with pytest.raises(ModelError, match="--example gives x twice"):
        read_model_inputs(None, [Path(entry) for entry in entries])
    with pytest.raises(RequestMalformed, match="--tensor gives x twice"):
        read_tensors(entries)
    with pytest.raises(ModelError, match="--shape gives x twice"):
        read_model_inputs(["x=1x3", "x=1x4"], None)


def test_names_and_files_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "run=3").mkdir()
    file = tmp_path / "run=3" / "x.npy"
    np.save(file, np.zeros(3))
    assert list(read_tensors([f"a={file}", f"b=c={file}"])) == ["a", "b=c"]
    assert list(read_model_inputs(None, [Path(f"a={file}"), Path(f"b=c={file}")]).examples) == ["a", "b=c"]
