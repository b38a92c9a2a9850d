"""Attacks of another user on processes that train together: none is heard, nothing is executed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SLOW, at_work, differences, wait_for

from payload import Payload
from reseed.distributed.launcher import ADDRESS, join, join_slurm, leave, open_store
from reseed.distributed.process_group import ProcessGroup
from reseed.distributed.worker import read_group
from reseed.errors import ReseedError
from reseed.store.runs import Run, RunStore
from reseed.train.config import RuntimeConfig

NOBODY = 65534
REFUSED = r"^refused a message that rank 0 of this training did not send \(its HMAC or its length"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def test_only_messages_of_the_group_are_read(sign: Path) -> None:
    key = secrets.token_bytes(32)
    leader, worker, third = (ProcessGroup(index=i, count=3, key=key) for i in range(3))
    stranger = ProcessGroup(count=3, key=secrets.token_bytes(32))
    first, payload = leader._seal({"run": 1}), pickle.dumps(Payload(sign))
    flipped = first.clone()
    flipped[-1] ^= 1
    from_third = third._seal({"run": 1})
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    signed = torch.cat([stranger._seal(1)[:32], raw])
    for forged in (
        stranger._seal({"run": 1}),
        raw,
        signed,
        flipped,
        first[:-1],
        from_third,
        raw[:0],
    ):
        with pytest.raises(ReseedError, match=REFUSED):
            worker._open([forged])
    assert worker._open([first]) == [{"run": 1}]
    with pytest.raises(ReseedError, match=REFUSED):  # a message cannot be repeated
        worker._open([first])


@pytest.mark.parametrize(
    ("runs", "more", "reason"),
    [
        ([], {"order": 1}, "`message` must have `runs` and `runtime`"),
        ([], {"runtime": {"command": "true"}}, "there is no key `runtime.command`."),
        ([], {"runtime": 7}, "'int' object is not iterable"),
        ([7], {}, "'int' object is not iterable"),
        ([{"experiment": {"model": {"type": "os.system"}}}], {}, "no model is called `os.system`."),
        ([{"experiment": {"sae": {"_target_": "os.system"}}}], {}, "there is no key `runs[0].expe"),
        ([{"role": "", "code": "true"}], {}, "there is no key `runs[0].code`."),
    ],
)
def test_a_message_with_unknown_names_is_refused(
    runs: list[Any], more: dict[str, Any], reason: str
) -> None:
    message = {"runs": runs, "runtime": RuntimeConfig().to_dict()} | more
    with pytest.raises(ReseedError) as refused:
        read_group(message)
    said = str(refused.value)
    assert said.startswith(f"cannot read the message of rank 0: {reason}"), said
    assert "\n" not in said


def test_ranks_meet_only_in_a_folder_that_others_cannot_enter(tmp_path: Path) -> None:
    private, open_to_all = tmp_path / "private", tmp_path / "open"
    open_store(private, make=True).set("key", "1")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "store").stat().st_mode) == 0o600
    open_to_all.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(private)
    rule = "it must be a folder of this user with mode 0700"
    planted = tmp_path / "planted"
    for folder, make, why in (
        (open_to_all, False, rule),
        (tmp_path / "link", False, rule),
        (tmp_path / "absent", False, "No such file or directory"),
        (private, True, "File exists"),
        (planted, False, rule),
    ):
        if folder == planted:
            planted.mkdir(mode=0o700)
            if os.geteuid() != 0:
                continue
            os.chown(planted, NOBODY, NOBODY)
        with pytest.raises(ReseedError) as refused:
            open_store(folder, make)
        assert str(refused.value) == f"cannot use {folder}, in which the ranks meet: {why}"


@pytest.mark.slow
def test_a_worker_that_gets_a_forged_order_ends_with_one_line(sign: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    store = open_store(folder, make=True)
    worker = subprocess.Popen(
        [sys.executable, "-m", "reseed.distributed.worker"],
        env=os.environ | {ADDRESS: f"{os.getpid()}:1:2:cpu:{folder}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ranks = join(store, 0, 2, "cpu")
        payload = bytearray(pickle.dumps(Payload(sign)))
        ranks.broadcast_(torch.tensor([len(payload)]), 0)
        ranks.broadcast_(torch.frombuffer(payload, dtype=torch.uint8), 0)
        _, said = worker.communicate(timeout=60)
    finally:
        leave()
        worker.kill()
    assert worker.returncode == 1
    (line,) = (line for line in said.splitlines() if "socket" not in line)
    assert line.startswith("rank 1: refused a message that rank 0 of this training did not send")


def listening(pid: int) -> set[tuple[str, int]]:
    """Return address and port of every TCP socket on which a process listens."""
    handles = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in handles:
                address, port = columns[1].split(":")
                words = [address[i : i + 8] for i in range(0, len(address), 8)]
                packed = b"".join(bytes.fromhex(word)[::-1] for word in words)  # little-endian
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface of this machine that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                reply = fcntl.ioctl(one.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(reply[20:24])
    return found


def as_nobody(act: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return the result of a function that a process of another user, if possible, calls."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    "localhost".encode("idna")  # loaded now: the other user may be unable to read Python's folder

    def run() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        its.send(act(*given))

    process = context.Process(target=run)
    process.start()
    assert mine.poll(60)
    found = mine.recv()
    process.join()
    return found


def attack_ports(ports: list[int], payload: bytes) -> dict[str, Any]:
    """Send payloads to every port on every address; return the addresses that answered."""
    frames = [payload, struct.pack("<q", len(payload)) + payload, struct.pack("<q", 0) + payload]
    reached = set()
    for address in addresses().values():
        for port in ports:
            for frame in frames:
                try:
                    with socket.create_connection((address, port), 2) as connection:
                        connection.sendall(frame)
                        reached.add(address)
                except OSError:
                    pass
    return {"reached": reached}


def attack_folder(folder: Path) -> dict[str, Any]:
    """Try to read and to change the folder in which the ranks meet; return what succeeded."""
    attempts: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(folder),
        "read": lambda: (folder / "store").read_bytes(),
        "announce": lambda: open_store(folder).set("ready-1", ""),
        "plant": lambda: (folder / "planted").write_text(""),
        "append": lambda: (folder / "store").open("ab"),
        "rename": lambda: folder.rename(folder.with_name("moved")),
        "remove": lambda: folder.rmdir(),
    }
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, ReseedError):
            pass
    return {"done": done}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("spread", marks=pytest.mark.audit)])
def test_other_users_reach_no_process_of_a_training(
    strategy: str,
    whole: Callable[[str], dict[str, Run]],
    tiny_overrides: list[str],
    tmp_path: Path,
    sign: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The processes are halted during the attack and must then finish as if there was none."""
    others = [name for name in addresses() if name != "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", (others or ["lo"])[0])
    place = tmp_path / "temporary"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(place))
    outputs = tmp_path / "outputs"
    line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
    leader, (worker,) = at_work(line, outputs)
    for pid in (leader.pid, worker):
        os.kill(pid, signal.SIGSTOP)
    try:
        (folder,) = (path for path in place.iterdir() if path.name.startswith("reseed-"))
        found = {pid: listening(pid) for pid in (leader.pid, worker)}
        assert all(found.values()), "the processes must be connected"
        assert {address for each in found.values() for address, _ in each} <= {"127.0.0.1", "::1"}
        ports = [port for each in found.values() for _, port in each]
        reached = as_nobody(attack_ports, ports, pickle.dumps(Payload(sign)))["reached"]
        assert reached <= {"127.0.0.1"}
        if os.geteuid() == 0:
            assert as_nobody(attack_folder, folder) == {"done": []}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        for pid in (leader.pid, worker):
            os.kill(pid, signal.SIGCONT)
    said, _ = leader.communicate(timeout=100)
    assert leader.returncode == 0, said
    runs = {run.signature: run for run in RunStore(outputs).runs()}
    assert set(differences(runs, whole(strategy)).values()) == {0.0}
    assert not folder.exists()


def slurm_rank(index: int, told: Any) -> None:
    """Join a SLURM job of two tasks, and report the sum of the ranks and the addresses."""
    os.environ["SLURM_PROCID"] = os.environ["SLURM_LOCALID"] = str(index)
    ranks = join_slurm("cpu")
    total = int(ranks.sum_(torch.tensor(index + 1)))
    told.put((index, total, ranks.gather_json(index), ranks.key, listening(os.getpid())))
    ranks.sum_(torch.tensor(0))
    leave()


@pytest.mark.slow
@as_root
def test_a_stranger_cannot_announce_itself_to_the_tasks_of_a_slurm_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger plants the folder of the first start, and attacks that of the second."""
    sweep = tmp_path / "slurm"
    sweep.mkdir()
    given = {"SUBMITIT_FOLDER": str(sweep), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    given |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    planted = sweep / ".ranks-7-0-0"
    planted.mkdir(mode=0o777)
    os.chown(planted, NOBODY, NOBODY)
    for index, why in (("0", "File exists"), ("1", "it must be a folder of this user with")):
        monkeypatch.setenv("SLURM_PROCID", index)
        monkeypatch.setenv("SLURM_LOCALID", index)
        with pytest.raises(ReseedError, match=f"^cannot use {planted}, in which the ranks.*{why}"):
            join_slurm("cpu")

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = sweep / ".ranks-7-0-1"
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [context.Process(target=slurm_rank, args=(index, told)) for index in (0, 1)]
    ranks[0].start()
    wait_for(lambda: (folder / "store").exists())
    assert as_nobody(attack_folder, folder) == {"done": []}
    ranks[1].start()  # after the stranger has said that rank 1 is ready
    found = sorted((told.get(timeout=90) for _ in ranks), key=lambda each: each[0])
    for rank in ranks:
        rank.join()
    assert [each[:3] for each in found] == [(0, 3, [0, 1]), (1, 3, [0, 1])]
    assert found[0][3] == found[1][3]
    assert len(found[0][3]) == 32
    assert {address for each in found for address, _ in each[4]} <= {"127.0.0.1", "::1"}


def test_the_key_of_a_group_is_not_printed() -> None:
    ranks = replace(ProcessGroup(), key=b"secret")
    assert "secret" not in repr(ranks)
