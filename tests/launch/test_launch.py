"""Tests of: dualtrain.launch.world, ranks, hostfile, stop.

Ranks: reading the environment of launchers, and starting, watching and ending real processes.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dualtrain.common.errors import UserError
from dualtrain.launch.hostfile import read_hostfile, run_hostfile
from dualtrain.launch.ranks import (
    log_path,
    run_ranks,
)
from dualtrain.launch.stop import SAME_SIGNAL_S
from dualtrain.launch.world import (
    World,
    current_world,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}


def script(tmp_path: Path, body: str) -> list[str]:
    file = tmp_path / "rank.py"
    header = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    file.write_text(header + textwrap.dedent(body))
    return [sys.executable, str(file)]


def test_no_launcher_is_no_world():
    assert current_world({"PATH": "/bin", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_torchrun():
    assert current_world(dict(TORCHRUN)) == World(3, 1, 4, 2)


def test_deepspeed_launcher_says_local_size():
    env = dict(TORCHRUN)
    env["LOCAL_SIZE"] = env.pop("LOCAL_WORLD_SIZE")
    assert current_world(env) == World(3, 1, 4, 2)
    assert env["LOCAL_WORLD_SIZE"] == "2"


def test_half_a_launcher_is_refused_by_name():
    env = dict(TORCHRUN)
    del env["MASTER_PORT"], env["LOCAL_RANK"]
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_PORT not set"):
        current_world(env)


@pytest.mark.parametrize(
    ("nodes", "host"), [("gpu[07-09,12],login", "gpu07"), ("n1,n2", "n1"), ("solo", "solo")]
)
def test_srun(nodes, host):
    env = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_ID": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "9",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": nodes,
    }
    assert current_world(env) == World(rank=5, local_rank=0, world_size=6, local_world_size=1)
    assert env["MASTER_ADDR"] == host
    again = {key: value for key, value in env.items() if key.startswith("SLURM")}
    current_world(again | {"SLURM_PROCID": "0"})
    assert 20_000 <= int(env["MASTER_PORT"]) < 40_000


def test_ranks_get_their_places_and_share_one_port(tmp_path):
    code = run_ranks(
        script(
            tmp_path,
            """
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
            text = " ".join(os.environ[n] for n in names)
            open(f"seen-{rank}", "w").write(text + " " + os.environ["MASTER_PORT"])
            print("hello from", rank)
            """,
        ),
        ranks=2,
        log_dir=tmp_path / "logs",
    )
    seen = [Path(f"seen-{rank}").read_text().split() for rank in range(2)]
    assert code == 0
    assert [line[:5] for line in seen] == [[str(r), str(r), "2", "2", "127.0.0.1"] for r in (0, 1)]
    assert seen[0][5] == seen[1][5]
    assert log_path(tmp_path / "logs", 1).read_text() == "hello from 1\n"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_failing_rank_ends_the_others_and_is_shown_once(tmp_path, capfd):
    body = """
        if rank == 1:
            print("the reason")
            sys.exit(7)
        open("pid", "w").write(str(os.getpid()))
        time.sleep(10**6)
        """
    assert run_ranks(script(tmp_path, body), ranks=2, log_dir=tmp_path / "logs") == 7
    error = capfd.readouterr().err
    assert error.count("the reason") == 1
    assert "rank 1 failed (exit 7)" in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_same_mistake_on_every_rank_is_shown_by_rank_0_only(tmp_path, capfd):
    body = """
        time.sleep(0.3 * (1 - rank))
        print("typo", file=sys.stderr)
        sys.exit(2)
        """
    assert run_ranks(script(tmp_path, body), ranks=2, log_dir=tmp_path / "logs") == 2
    assert capfd.readouterr().err.count("typo") == 1


def test_killed_rank_gives_128_plus_signal(tmp_path, capfd):
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(10**6)"
    assert run_ranks(script(tmp_path, body), ranks=2, log_dir=tmp_path / "logs") == 137
    assert "rank 1 was killed by signal 9" in capfd.readouterr().err


PARENT = """
import sys
from pathlib import Path
from dualtrain.launch.ranks import run_ranks
sys.exit(run_ranks(sys.argv[1:], ranks=2, log_dir=Path("logs")))
"""


def start_parent(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PARENT, *command])


def wait_for(parent: subprocess.Popen, *names: str) -> None:
    while not all(Path(name).exists() and Path(name).read_text() for name in names):
        assert parent.poll() is None
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


GRACEFUL = """
    def stop(number, frame):
        open(f"signals-{rank}", "a").write("x")
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    open(f"pid-{rank}", "w").write(str(os.getpid()))
    while not os.path.exists("finish") or not os.path.exists(f"signals-{rank}"):
        time.sleep(0.02)
    sys.exit(75)
    """


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_reaches_each_rank_once_and_its_code_comes_back(tmp_path, number):
    parent = start_parent(script(tmp_path, GRACEFUL))
    wait_for(parent, "pid-0", "pid-1")
    parent.send_signal(number)
    wait_for(parent, "signals-0", "signals-1")
    Path("finish").touch()
    assert parent.wait() == 75
    assert [Path(f"signals-{rank}").read_text() for rank in range(2)] == ["x", "x"]


def test_second_signal_stops_at_once(tmp_path):
    parent = start_parent(script(tmp_path, GRACEFUL))
    wait_for(parent, "pid-0", "pid-1")
    parent.send_signal(signal.SIGINT)
    wait_for(parent, "signals-0", "signals-1")
    parent.send_signal(signal.SIGTERM)  # the same stop, by another way
    time.sleep(SAME_SIGNAL_S + 0.2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == 128 + signal.SIGTERM
    assert not any(is_alive(int(Path(f"pid-{rank}").read_text())) for rank in range(2))


def test_killed_parent_leaves_no_process(tmp_path):
    parent = start_parent(script(tmp_path, GRACEFUL))
    wait_for(parent, "pid-0", "pid-1")
    parent.kill()
    parent.wait()
    pids = [int(Path(f"pid-{rank}").read_text()) for rank in range(2)]
    while any(is_alive(pid) for pid in pids):
        time.sleep(0.05)


OUTCOME = Path("exit-code")


def test_missing_hostfile(tmp_path):
    with pytest.raises(UserError, match="--hostfile: .* is not a file"):
        run_hostfile(["run", "x"], hostfile=tmp_path / "none", ranks=None, outcome=OUTCOME)


def test_hostfile_is_read_as_deepspeed_does():
    hostfile = Path("hosts")
    hostfile.write_text("# two machines\n\ngpu01 slots=8\nme@10.0.0.2  slots=4  # the old one\n")
    machines = read_hostfile(hostfile, ranks=4)
    assert [(m.name, m.slots, m.line) for m in machines] == [("gpu01", 8, 3), ("me@10.0.0.2", 4, 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a slots=2\nb\n", "hosts:2: cannot read 'b' — expected HOST slots=N"),
        ("a slots=two\n", "hosts:1: cannot read 'a slots=two'"),
        ("a slots=0\n", "hosts:1: cannot read 'a slots=0'"),
        ("a;b slots=2\n", "hosts:1: cannot read 'a;b slots=2'"),
        ("a slots=2\na slots=2\n", "hosts:2: a is in line 1 already"),
        ("a slots=2\n", "hosts:1: a has 2 slots, but --ranks is 3"),
        ("# nothing\n", "--hostfile: hosts names no machine"),
    ],
)
def test_hostfile_mistakes_are_named_by_line(text, expected):
    Path("hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(Path("hosts"), ranks=3 if "ranks" in expected else None)
    assert str(caught.value).startswith(expected)


def test_all_mistakes_of_a_hostfile_are_named_at_once():
    Path("hosts").write_text("a\nb slots=1\nb slots=1\n")
    with pytest.raises(UserError) as caught:
        read_hostfile(Path("hosts"))
    assert [line[:7] for line in str(caught.value).splitlines()] == ["hosts:1", "hosts:3"]


def test_missing_pdsh_is_said_before_anything_starts(monkeypatch):
    Path("hosts").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="ssh is not installed"):
        run_hostfile(["run", "x"], hostfile=Path("hosts"), ranks=None, outcome=OUTCOME)


def test_launcher_that_lies_about_success_is_found_out(monkeypatch, capfd):
    """DeepSpeed's runner returns 0 when a signal ends its child, as here."""
    Path("hosts").write_text("localhost slots=1\n")
    Path("sitecustomize.py").write_text(
        "import os, sys\nif 'RANK' in os.environ: os.kill(os.getppid(), 9)\n"
    )
    monkeypatch.delenv("RANK", raising=False)  # or the runner itself would end this process
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}")
    hosts = Path("hosts")
    code = run_hostfile(["schema"], hostfile=hosts, ranks=None, outcome=OUTCOME)
    assert code == 1
    assert "the launcher reports success, but rank 0 did not" in capfd.readouterr().err


CLI = """
import sys
import dualtrain.cli as cli
@cli.app.command("talk")
def talk():
    for number in range(100):
        print("x" * 1000)
    open("end", "w").write("here")
sys.argv = ["dualtrain", "talk"]
cli.main()
"""


def shell(line: str) -> subprocess.CompletedProcess:
    Path("talk.py").write_text(CLI)
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True)


def test_closed_output_changes_nothing():
    finished = shell(f"{sys.executable} talk.py >&-")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert Path("end").read_text() == "here"


def test_reader_that_leaves_causes_no_traceback():
    finished = shell(f"set -o pipefail; {sys.executable} talk.py | head -c 1")
    assert finished.stdout == "x" and finished.stderr == ""
