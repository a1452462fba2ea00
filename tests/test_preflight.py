"""Hosts that would wait for each other for ever are told apart before anything is compiled. Real processes."""

import socket
import subprocess
import time

import pytest
from runs import start, train_command

from configs.schema import ConfigError
from sharding import hosts, joining
from trainer.preflight import code, differing

SCRIPT = """
import sys
import jax
from launch.cli import main
from sharding import joining

{change}
sys.exit(main(sys.argv[1:]))
"""
PAIR = ("--mesh.simulated_devices", "4", "--mesh.data", "4", "--trainer.steps", "2")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_processes(commands: dict[int, list[str]], count: int, env: dict[int, dict] | None = None) -> dict[int, tuple]:
    """Exit code, output and errors of these processes of a job of `count`, by number."""
    told = {hosts.ADDRESS: free_address(), hosts.COUNT: str(count)}
    env = env or {}
    processes = {i: start(c, env=told | {hosts.INDEX: str(i)} | env.get(i, {})) for i, c in commands.items()}
    try:
        ended = {i: process.communicate(timeout=180) for i, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {i: (processes[i].returncode, *ended[i]) for i in processes}


def scripted(command: list[str], change: str) -> list[str]:
    return [command[0], "-c", SCRIPT.format(change=change), *command[command.index("train") :]]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("words", "env", "change", "sentence"),
    [
        (["--trainer.seed", "1"], {}, "", "host 1 has trainer.seed '1' where others have '0'"),
        (
            [],
            {"LIBTPU_INIT_ARGS": "--x=1"},
            "",
            "host 1 has the variable LIBTPU_INIT_ARGS '--x=1' where others have ''",
        ),
        (
            [],
            {},
            "jax.config.update('jax_default_matmul_precision', 'highest')",
            "the hosts would compile different steps, and wait for each other for ever: host 1 has the lowered step's hash",
        ),
    ],
    ids=["config", "environment", "program"],
)
def test_a_host_that_runs_something_else_is_named_by_all(words, env, change, sentence, tmp_path):
    command = train_command("griffin-tiny", tmp_path / "run", *PAIR)
    ended = run_processes({0: command, 1: scripted([*command, *words], change)}, 2, {1: env})
    for code_, out, err in ended.values():
        assert code_ == 2, err
        assert sentence in err
        assert "Traceback" not in err
        assert "compiled in" not in out


@pytest.mark.multiprocess
def test_a_host_that_never_joins_is_named(tmp_path):
    command = scripted(train_command("griffin-tiny", tmp_path / "run", *PAIR), "joining.TOLD, joining.LIMIT = 3.0, 9.0")
    ended = run_processes({0: command, 1: command}, 3)
    hint = "start the command on all workers (--worker=all)"
    code_, _, err = ended[0]
    assert f"podwright: 2 of 3 hosts joined after 3 s; missing: 2; {hint}\n" in err
    assert f"podwright: processes 2 of 3 never joined: {hint}\n" in err
    assert code_ == 76
    assert ended[1][0] == 76, ended[1][2]
    assert "process 0" in ended[1][2]


@pytest.mark.multiprocess
def test_a_coordinator_that_does_not_listen_is_told(tmp_path):
    command = scripted(train_command("griffin-tiny", tmp_path / "run", *PAIR), "joining.TOLD, joining.LIMIT = 2.0, 5.0")
    code_, _, err = run_processes({1: command}, 2)[1]
    assert code_ == 76
    assert (
        "where process 0 should, after 2 s: start the command on all workers (--worker=all), and let the network" in err
    )


def test_a_taken_port_is_told():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(ConfigError, match="cannot be used: Address already in use"),
    ):
        joining.gather(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)


JOINING = "import sys; from sharding.joining import gather; gather(sys.argv[1], 3, int(sys.argv[2]))"


def test_the_port_is_free_again_once_all_have_joined_and_scanners_do_no_harm(tmp_path):
    address = free_address()
    host, port = address.split(":")
    begun = [start([train_command("griffin-tiny", tmp_path)[0], "-c", JOINING, address, str(i)]) for i in (2, 0)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port))) as scanner:
                scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        begun[1].wait(1)
    joining.gather(address, 3, 1)
    for process in begun:
        assert process.wait(30) == 0, process.communicate()
    with socket.create_server((host, int(port))):
        pass


def test_most_hosts_are_right_and_of_two_the_first():
    same = {"a": "1", "the file x": "2"}
    assert differing({0: same, 1: same}) == ""
    assert differing({0: same | {"a": "3"}, 1: same, 2: same}) == "host 0 has a '3' where others have '1'"
    assert differing({0: same, 1: same | {"a": "3"}}) == "host 1 has a '3' where others have '1'"
    assert differing({0: same, 1: {"a": "1"}}) == "host 1 has the file x 'nothing' where others have '2'"
    many = {str(i): "1" for i in range(5)}
    assert differing({0: {}, 1: many, 2: many}).endswith("; and 2 more differences")


def test_the_code_of_all_packages_is_compared():
    files = code()
    assert {"trainer/loop.py", "sharding/hosts.py", "models/griffin.py", "launch/cli.py"} <= files.keys()
    assert not any(name.startswith("tests") for name in files)
