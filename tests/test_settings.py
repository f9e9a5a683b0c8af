"""Settings: the defaults, the order in which places are asked, and what an error says."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorferry.core.errors import ConfigError, UnknownOption
from tensorferry.core.settings import Origin, OriginKind, Settings, descriptions

ROOT = Path(__file__).resolve().parent.parent
NO_FILE = os.devnull

DEFAULTS = {
    "transport": "auto",
    "require": "",
    "first_grant": 8192,
    "block_size": 128,
    "pool_blocks": 64,
    "pool_device": "cpu",
    "destination_device": "cpu",
    "first_grant_mode": "optimistic",
    "window": "auto",
    "destination_budget": 4 * 1024**3,
    "slabs": 8,
    "staging_bytes": 64 * 1024**2,
    "integrity": "auto",
    "transfer_deadline": 300.0,
    "announce_deadline": 60.0,
    "heartbeat": 1.0,
    "peer_timeout": 10.0,
    "quarantine_quota": 2.0,
    "max_bumps": 16,
    "max_rooms": 4096,
    "on_exhausted": "wait",
}

EARLIER_NAMES = {
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "first_grant",
    "SGLANG_MULTIMODAL_BLOCK_SIZE": "block_size",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "pool_blocks",
}


def load(arguments=None, command_line=None, environ=None, file=NO_FILE, **more):
    return Settings.load(arguments, command_line, environ=environ or {}, file=file, **more)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tensorferry.toml"
    path.write_text(text)
    return path


def test_the_defaults_are_the_documented_ones():
    assert {name: value for name, value in Settings().as_dict().items() if name in DEFAULTS} == DEFAULTS
    assert load().settings == Settings()
    assert set(load().origins.values()) == {Origin(OriginKind.DEFAULT)}


def test_every_setting_has_a_meaning_and_a_source_for_its_default():
    for about in descriptions():
        assert about.meaning.endswith("."), about.name
        assert about.source.endswith("."), about.name


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().block_size = 1


def test_the_order_is_argument_command_line_environment_file_default(tmp_path):
    file = written(tmp_path, "block_size = 5\npool_blocks = 5\nfirst_grant = 5\nslabs = 5\n")
    loaded = load(
        {"block_size": 2},
        {"block_size": 3, "pool_blocks": 3},
        {"TENSORFERRY_BLOCK_SIZE": "4", "TENSORFERRY_POOL_BLOCKS": "4", "TENSORFERRY_FIRST_GRANT": "4"},
        file,
        defaults={"block_size": 6, "window": "rounds"},
    )
    settings, origins = loaded.settings, loaded.origins
    assert (settings.block_size, settings.pool_blocks, settings.first_grant, settings.slabs) == (2, 3, 4, 5)
    assert settings.window == "rounds"
    assert origins["block_size"] == Origin(OriginKind.ARGUMENT, "block_size")
    assert origins["pool_blocks"] == Origin(OriginKind.COMMAND_LINE, "--pool-blocks")
    assert origins["first_grant"] == Origin(OriginKind.ENVIRONMENT, "TENSORFERRY_FIRST_GRANT")
    assert origins["slabs"] == Origin(OriginKind.FILE, f"{file}: slabs")
    assert origins["window"] == Origin(OriginKind.DEFAULT, "of this command")
    assert origins["heartbeat"] == Origin(OriginKind.DEFAULT)


def test_none_means_not_given_here():
    loaded = load({"block_size": None}, {"block_size": None}, {"TENSORFERRY_BLOCK_SIZE": "4"})
    assert loaded.settings.block_size == 4


@pytest.mark.parametrize(("variable", "name"), EARLIER_NAMES.items())
def test_names_of_earlier_deployments_are_accepted(variable, name):
    loaded = load(environ={variable: "77"})
    assert getattr(loaded.settings, name) == 77
    assert loaded.origins[name] == Origin(OriginKind.ENVIRONMENT, variable)


@pytest.mark.parametrize(("variable", "name"), EARLIER_NAMES.items())
def test_the_own_name_wins_over_an_earlier_one_and_both_over_the_file(tmp_path, variable, name):
    file = written(tmp_path, f"{name} = 1\n")
    assert getattr(load(environ={variable: "2"}, file=file).settings, name) == 2
    both = {variable: "2", f"TENSORFERRY_{name.upper()}": "3"}
    assert getattr(load(environ=both, file=file).settings, name) == 3


def test_a_variable_that_is_set_to_nothing_counts_as_not_set():
    variables = {"TENSORFERRY_BLOCK_SIZE": "", "SGLANG_MULTIMODAL_BLOCK_SIZE": " "}
    assert load(environ=variables).settings.block_size == 128


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("destination_budget", "4GiB", 4 * 1024**3),
        ("destination_budget", "4 gib", 4 * 1024**3),
        ("destination_budget", "512MB", 512_000_000),
        ("destination_budget", "1.5KiB", 1536),
        ("destination_budget", "1e9", 1_000_000_000),
        ("destination_budget", 12345, 12345),
        ("destination_budget", "9007199254740993", 9007199254740993),
        ("staging_bytes", "64MiB", 64 * 1024**2),
        ("transfer_deadline", "5min", 300.0),
        ("transfer_deadline", "500ms", 0.5),
        ("transfer_deadline", "90 s", 90.0),
        ("transfer_deadline", 7, 7.0),
        ("window", "AUTO", "auto"),
        ("window", "rounds", "rounds"),
        ("window", "12", 12),
        ("window", 12, 12),
        ("first_grant", "8_192", 8192),
        ("quarantine_quota", "0.5", 0.5),
        ("max_bumps", 0, 0),
        ("integrity", "Sampled", "sampled"),
        ("transport", "my-transport.v2", "my-transport.v2"),
    ],
)
def test_values_may_be_written_as_numbers_or_text(name, given, value):
    read = getattr(Settings(**{name: given}), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("block_size", 0),
        ("block_size", -128),
        ("block_size", 1.5),
        ("block_size", True),
        ("block_size", "many"),
        ("block_size", 2**31),
        ("block_size", None),
        ("pool_blocks", 0),
        ("window", 0),
        ("window", "sometimes"),
        ("window", True),
        ("first_grant_mode", "pessimistic"),
        ("integrity", 3),
        ("destination_budget", 0),
        ("destination_budget", "4 GiBs"),
        ("destination_budget", "0.3B"),
        ("destination_budget", "1.5B"),
        ("destination_budget", "1.2.3GiB"),
        ("destination_budget", "1e999999999GiB"),
        ("destination_budget", "-1GiB"),
        ("destination_budget", [1]),
        ("transfer_deadline", 0),
        ("transfer_deadline", "soon"),
        ("transfer_deadline", float("inf")),
        ("transfer_deadline", float("nan")),
        ("transfer_deadline", "1e999s"),
        ("quarantine_quota", 0),
        ("max_bumps", -1),
        ("on_exhausted", "panic"),
        ("transport", ""),
        ("transport", "../shm"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(name, given):
    with pytest.raises(ConfigError, match=name) as caught:
        Settings(**{name: given})
    assert repr(given) in caught.value.cause


def test_a_bad_value_names_the_place_that_it_stands_in(tmp_path):
    file = written(tmp_path, 'pool_blocks = "lots"\n')
    places = [
        (lambda: load({"pool_blocks": "lots"}), "argument pool_blocks"),
        (lambda: load(None, {"pool_blocks": "lots"}), "command line --pool-blocks"),
        (lambda: load(environ={"TENSORFERRY_POOL_BLOCKS": "lots"}), "environment TENSORFERRY_POOL_BLOCKS"),
        (
            lambda: load(environ={"SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "lots"}),
            "environment SGLANG_EMBEDDING_CACHE_BUFFER_SIZE",
        ),
        (lambda: load(file=file), f"file {file}: pool_blocks"),
    ]
    for call, place in places:
        with pytest.raises(ConfigError) as caught:
            call()
        assert place in caught.value.cause
        assert "64" in caught.value.hint


def test_a_bad_value_that_another_place_overrides_does_no_harm():
    assert load({"block_size": 8}, environ={"TENSORFERRY_BLOCK_SIZE": "x"}).settings.block_size == 8


def test_unknown_names_are_refused_with_a_suggestion(tmp_path):
    places = [
        (lambda: load({"blocksize": 1}), "block_size"),
        (lambda: load({}, {"pool-block": 1}), "pool_blocks"),
        (lambda: load(environ={"TENSORFERRY_FIRST_GRAND": "1"}), "TENSORFERRY_FIRST_GRANT"),
        (lambda: load(environ={"TENSORFERRY_CONFG": "x"}), "TENSORFERRY_CONFIG"),
        (lambda: load(file=written(tmp_path, "hart_beat = 1\n")), "heartbeat"),
    ]
    for call, suggestion in places:
        with pytest.raises(UnknownOption, match="did you mean") as caught:
            call()
        assert suggestion in caught.value.cause


def test_an_unknown_name_like_no_other_gets_no_suggestion():
    with pytest.raises(UnknownOption) as caught:
        load({"zzzz": 1})
    assert "did you mean" not in caught.value.cause


def test_an_empty_unknown_variable_is_still_unknown():
    with pytest.raises(UnknownOption):
        load(environ={"TENSORFERRY_NOTHING": ""})


def test_other_programs_variables_are_left_alone():
    assert load(environ={"SGLANG_SOMETHING": "x", "PATH": "/bin", "tensorferry_x": "1"}).settings == Settings()


def test_peer_timeout_must_be_longer_than_the_heartbeat_and_the_error_says_where_each_is_from():
    with pytest.raises(ConfigError) as caught:
        load({"heartbeat": 5}, environ={"TENSORFERRY_PEER_TIMEOUT": "5"})
    assert "environment TENSORFERRY_PEER_TIMEOUT" in caught.value.cause
    assert "argument heartbeat" in caught.value.cause
    with pytest.raises(ConfigError, match="peer_timeout"):
        Settings(heartbeat=1, peer_timeout=0.5)


def test_the_file_is_found_in_the_working_directory(tmp_path, monkeypatch):
    written(tmp_path, 'window = "rounds"\ndestination_budget = "1GiB"\n')
    monkeypatch.chdir(tmp_path)
    loaded = Settings.load(environ={})
    assert (loaded.settings.window, loaded.settings.destination_budget) == ("rounds", 1024**3)


def test_the_environment_may_name_another_file_or_none(tmp_path, monkeypatch):
    written(tmp_path, "slabs = 3\n")
    other = tmp_path / "other.toml"
    other.write_text("slabs = 4\n")
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ={"TENSORFERRY_CONFIG": str(other)}).settings.slabs == 4
    assert Settings.load(environ={"TENSORFERRY_CONFIG": os.devnull}).settings.slabs == 8


def test_a_named_file_must_exist_and_be_toml(tmp_path):
    with pytest.raises(ConfigError, match=r"TENSORFERRY_CONFIG names .* does not exist"):
        Settings.load(environ={"TENSORFERRY_CONFIG": str(tmp_path / "absent.toml")})
    with pytest.raises(ConfigError, match="not TOML"):
        load(file=written(tmp_path, "slabs: 3\n"))
    with pytest.raises(ConfigError, match="no regular file"):
        load(file=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        f"slabs = {'[' * 5000}",  # deeper than Python recurses
        f"slabs = {'9' * 5000}",  # longer than Python reads a number
        "# \udcff",  # no UTF-8
    ],
)
def test_a_file_that_cannot_be_read_as_toml_is_an_error_of_the_file(tmp_path, content):
    path = tmp_path / "tensorferry.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="not TOML"):
        load(file=path)


def test_a_file_that_nobody_wrote_by_hand_is_not_read_to_its_end(tmp_path):
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        load(file=written(tmp_path, "#" * (1 << 20) + "\n"))


def test_a_home_of_nobody_is_an_error_of_the_variable():
    with pytest.raises(ConfigError, match=r"TENSORFERRY_CONFIG names ~nosuchuser/x\.toml"):
        Settings.load(environ={"TENSORFERRY_CONFIG": "~nosuchuser/x.toml"})


def test_what_has_no_end_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "fifo.toml"
    os.mkfifo(path)
    code = f"from tensorferry.core.settings import Settings; Settings.load(environ={{}}, file={str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "no regular file" in done.stderr


def test_a_table_is_not_a_setting(tmp_path):
    with pytest.raises(UnknownOption, match="tensorferry"):
        load(file=written(tmp_path, "[tensorferry]\nslabs = 3\n"))


def test_what_was_loaded_can_be_given_as_arguments_again():
    settings = Settings(window=12, destination_budget="1GiB", heartbeat="250ms")
    assert load(settings.as_dict()).settings == settings


def test_settings_need_no_torch():
    code = "import sys, tensorferry.core.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_about_settings_is_in_step():
    source = ROOT / "scripts" / "write_settings_doc.py"
    spec = importlib.util.spec_from_file_location("write_settings_doc", source)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), f"run {source}"


def test_there_are_no_more_slabs_than_transports_take_regions() -> None:
    with pytest.raises(ConfigError, match="between 1 and 512"):
        Settings(slabs=513)
