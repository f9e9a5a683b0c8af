"""What `send` makes of a file, what its text form says, and how `receive` makes a file that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from carry_kit import listing, small_file
from command_kit import tensorferry
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from tensorferry import cli, reachable
from tensorferry.commands import carrying, new_file
from tensorferry.commands.carrying import Note
from tensorferry.commands.new_file import CannotWrite, NewFile, OutputExists
from tensorferry.commands.output import BadFlag
from tensorferry.commands.table import DTYPES, Column, Table, parse
from tensorferry.commands.token_file import BadFile, bytes_of, header, open_file
from tensorferry.core.errors import BadTensor, FerryError
from tensorferry.core.settings import Settings, descriptions

# ---- files that can be sent


def written(path: Path, header: dict, data: bytes) -> Path:
    """A safetensors file as somebody else's writer may make it: not padded, not aligned."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_file_is_mapped_and_not_read(tmp_path):
    file = open_file(str(small_file(tmp_path / "x.safetensors")))
    address = file.tensors["x"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(int(s, 16), int(e, 16), where[-1]) for (s, e), where in ((m[0].split("-"), m) for m in maps)]
    assert [Path(where).name for start, stop, where in spans if start <= address < stop] == ["x.safetensors"]


def test_the_layout_is_that_of_the_file(tmp_path):
    path = tmp_path / "x"
    save_file({"b": torch.zeros(7, 2, 3).half(), "a": torch.zeros(7, dtype=torch.int16)}, path, metadata={"k": "v"})
    file = open_file(str(path))
    assert (file.tokens, file.nbytes, file.metadata) == (7, 7 * (2 + 12), {"k": "v"})
    assert str(file.table) == "a:int16,b:float16:2x3"
    assert file.table.layout.names == ("a", "b")


def test_tensors_that_are_not_aligned_are_sent_as_they_are(tmp_path):
    entries = {
        "u": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "a": {"dtype": "I64", "shape": [3], "data_offsets": [3, 27]},
    }
    file = open_file(str(written(tmp_path / "x", entries, bytes(range(27)))))
    assert bytes(bytes_of(file.tensors["a"])) == bytes(range(3, 27))


def same(n: int, **more: torch.Tensor) -> bytes:
    return save({"x": torch.zeros(n, 2), "y": torch.zeros(n), **more})


BAD = {
    "a scalar": (same(3, z=torch.tensor(1.0)), "'z' is a scalar", "leave it out"),
    "another length": (same(3, z=torch.zeros(4)), "'z' has 4 rows (shape [4]), and x, y 3", "leave it out, or cut it"),
    "channel-major": (same(5, z=torch.zeros(3, 5)), "'z' has 3 rows", ".transpose(0, 1).contiguous()"),
    "complex": (same(3, z=torch.zeros(3, dtype=torch.complex64)), "'z' has dtype C64", "Convert it to one of int64"),
    "unsigned": (same(3, z=torch.zeros(3, dtype=torch.uint32)), "'z' has dtype U32", "Convert it"),
    "no tokens": (same(0), "has no rows", ""),
    "nothing for a token": (same(3, z=torch.zeros(3, 0)), "'z' has shape [3, 0]", "Leave it out"),
    "no tensors": (save({}), "holds no tensors", "nothing to send"),
    "too many": (save({f"t{k}": torch.zeros(1) for k in range(33)}), "holds 33 tensors", "Split the file"),
    "cut short": (same(3)[:-1], "not a whole safetensors file", "copy it again"),
    "empty": (b"", "not a whole safetensors file", "save_file"),
    "something else": (b"PK\x03\x04 and so on, a zip file", "not a whole safetensors file", "save_file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_sent_is_refused_by_name_with_a_remedy(name, tmp_path, capsys):
    content, cause, hint = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert cli.main(["send", str(path), "--room", "1", "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["error"]["code"] in ("bad_file", "bad_tensor")
    assert "bad.safetensors" in found["error"]["cause"]
    assert cause in found["error"]["cause"]
    assert hint in found["error"]["hint"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, cause in {"none": "No such file", ".": "is a directory", "pipe": "not a regular file"}.items():
        with pytest.raises(BadFile, match=cause):
            open_file(str(tmp_path / name))


def test_a_file_that_was_written_to_has_changed(tmp_path):
    path = small_file(tmp_path / "x")
    file = open_file(str(path))
    file.check_unchanged()
    os.utime(path, ns=(0, 0))
    with pytest.raises(BadFile, match="has changed"):
        file.check_unchanged()
    path.unlink()
    with pytest.raises(BadFile, match="has changed"):
        file.check_unchanged()


# ---- the text form


columns = st.builds(
    Column,
    st.text(),
    st.sampled_from(sorted(DTYPES.values())),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
)


@given(st.lists(columns, min_size=1, max_size=5, unique_by=lambda column: column.name))
def test_the_text_says_all_of_the_table_and_needs_no_quotes(given_columns):
    try:
        table = Table(given_columns)
        text = str(table)
    except UnicodeEncodeError:  # half of a surrogate pair is no name of a file
        return
    assert parse(text) == table
    assert parse(text).layout.fingerprint == table.layout.fingerprint
    assert not set(text) & set(" '\"$`\\*?[](){}<>|&;#!\n\t")


@pytest.mark.parametrize(
    "text",
    ["", "x", "x:", "x:float31", "x:float32:", "x:float32:0", "x:float32:2,5", "x:int8,x:int8", "x:a:b:c"],
)
def test_a_text_that_says_nothing_is_a_usage_error_that_teaches(text):
    with pytest.raises(BadFlag) as caught:
        parse(text)
    assert "--layout" in caught.value.cause
    assert caught.value.hint


def test_any_name_travels(tmp_path):
    names = ["room", "self", "class", "a.b", "_x", "ü", "", "x" * 100, "3d"]
    table = Table(Column(name, "int8", ()) for name in names)
    assert len(set(table.layout.names)) == len(names)
    assert Column("fill_ids", "int8", ()).component.name == "fill_ids"


def test_the_digest_is_over_names_dtypes_shapes_length_and_bytes():
    def digest(name="x", dtype="int16", shape=(2,), tokens=1, rows=b"abcd"):
        return Table([Column(name, dtype, shape)]).digest(tokens, {name: memoryview(rows)})

    others = [digest(name="y"), digest(dtype="float16"), digest(shape=(1,), tokens=2), digest(rows=b"abce")]
    assert len({digest(), *others}) == 5
    assert digest() == digest()


def test_the_note_travels_in_the_aux_record():
    note = Note(bytes(range(240, 256)), carrying.RECEIPTS | 5)
    words = note.words()
    assert all(-(1 << 63) <= word < 1 << 63 for word in words)
    assert Note.of([10, 0, *words, *[0] * (14 - len(words))]) == note
    assert Note.of([10, 0, *[0] * 14]) is None


def test_every_setting_that_is_not_the_default_stands_in_the_command():
    defaults = Settings(**carrying.DEFAULTS)
    assert carrying.changed_settings(defaults, {}) == []
    assert carrying.changed_settings(defaults, {"destination_budget": 1 << 40}) == [
        "--destination-budget",
        str(1 << 40),
    ]
    changed = Settings(block_size=64, window=12, peer_timeout=2.25, integrity="off", transfer_deadline=300)
    assert carrying.changed_settings(changed, {}) == [
        *("--block-size", "64", "--window", "12", "--integrity", "off"),
        *("--transfer-deadline", "300", "--peer-timeout", "2.25"),
    ]
    assert {about.flag for about in descriptions()} >= set(carrying.changed_settings(changed, {})[::2])


@pytest.mark.parametrize(
    ("bound", "found", "addresses", "only_here"),
    [
        ("tcp://127.0.0.1:5", ["10.0.0.1"], ["tcp://127.0.0.1:5"], True),
        ("tcp://10.0.0.1:5", ["10.0.0.9"], ["tcp://10.0.0.1:5"], False),
        ("tcp://0.0.0.0:5", ["10.0.0.1", "fd00::1", "10.0.0.2"], ["tcp://10.0.0.1:5", "tcp://10.0.0.2:5"], False),
        ("tcp://[::]:5", ["fd00::1", "10.0.0.1"], ["tcp://[fd00::1]:5", "tcp://10.0.0.1:5"], False),
        ("tcp://0.0.0.0:5", [], ["tcp://127.0.0.1:5"], True),
        ("tcp://[::1]:5", [], ["tcp://[::1]:5"], True),
        ("ipc:///tmp/x", [], ["ipc:///tmp/x"], True),
    ],
)
def test_the_address_to_paste_is_one_that_can_be_dialled(bound, found, addresses, only_here, monkeypatch):
    monkeypatch.setattr(reachable, "local_addresses", lambda: found)
    assert reachable.reachable(bound) == (addresses, only_here)


# ---- files that are made


@pytest.fixture(params=["without a name", "with a name of its own"])
def way(request, monkeypatch):
    """Both ways to write a file that is not there yet."""
    if request.param == "with a name of its own":
        real = os.open

        def no_unnamed_files(path, flags, *mode):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, *mode)

        monkeypatch.setattr(new_file.os, "open", no_unnamed_files)
    return request.param


def test_a_file_is_there_when_it_is_published_and_not_before(way, tmp_path):
    before = os.umask(0o027)
    try:
        with NewFile(str(tmp_path / "out")) as file:
            file.reserve(3)
            file.write(b"abc")
            assert "out" not in listing(tmp_path)
            assert (way == "without a name") == (listing(tmp_path) == [])
            file.publish()
    finally:
        os.umask(before)
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"abc"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_not_published_leaves_nothing(way, force, tmp_path):
    with NewFile(str(tmp_path / "out"), force=force) as file:
        file.write(b"abc")
    assert listing(tmp_path) == []


def test_what_is_there_is_kept_without_force_and_replaced_with_it(way, tmp_path):
    out = tmp_path / "out"
    with NewFile(str(out)) as file:
        file.write(b"mine")
        out.write_bytes(b"somebody else's, made meanwhile")
        with pytest.raises(OutputExists):
            file.publish()
    assert out.read_bytes() == b"somebody else's, made meanwhile"
    with pytest.raises(OutputExists), NewFile(str(out)):
        pass
    with NewFile(str(out), force=True) as file:
        file.write(b"mine")
        file.publish()
    assert out.read_bytes() == b"mine"
    assert listing(tmp_path) == ["out"]


def test_a_link_stands_for_its_file(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "data" / "real")
    with NewFile(str(tmp_path / "out")) as file:
        file.write(b"abc")
        file.publish()
    assert (tmp_path / "data" / "real").read_bytes() == b"abc"
    assert (tmp_path / "out").is_symlink()


def test_where_no_file_can_be_made_it_is_said_before_anything_is_received(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("none/out", "folder", "file/out"):
        with pytest.raises(CannotWrite) as caught, NewFile(str(tmp_path / name), force=True):
            pass
        assert caught.value.hint
    done = tensorferry("receive", "--room", "1", "--from", "127.0.0.1:1", "--layout", "x:int8", "-o", "/proc/none")
    assert done.returncode == 1
    assert "(cannot_write)" in done.stderr


def test_a_file_that_will_not_fit_is_refused_at_once(tmp_path):
    with NewFile(str(tmp_path / "out")) as file, pytest.raises(CannotWrite, match=r"has \d+ free"):
        file.reserve(1 << 60)


def test_what_is_written_is_what_safetensors_writes():
    tensors = {"b": torch.ones(3, 2), "a": torch.ones(3, 2), "c": torch.ones(3).bool(), "é": torch.ones(3).double()}
    table = Table(Column(name, str(t.dtype).removeprefix("torch."), tuple(t.shape[1:])) for name, t in tensors.items())
    first, order = header(table, 3, {"format": "pt"})
    content = first + b"".join(bytes(bytes_of(tensors[name])) for name in order)
    assert content == save(tensors, metadata={"format": "pt"})
    assert load(content).keys() == tensors.keys()


@pytest.mark.parametrize("error", [BadFile("x"), CannotWrite("x"), OutputExists("x"), BadTensor("x")])
def test_each_error_has_a_code_of_its_own(error):
    assert isinstance(error, FerryError)
    assert error.as_dict()["fault"] == "caller"
