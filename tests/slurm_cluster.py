"""A real Slurm on this machine: munged, slurmctld and a slurmd per emulated node, as root, in one private folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = "/usr/sbin"

CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MinJobAge=300
KillWait=10
InactiveLimit=0
Waittime=0
SlurmctldTimeout=10
SlurmdTimeout=4
MessageTimeout=10
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 Gres=gpu:2\n"


def unavailable() -> str:
    """Say why no cluster can be started here; an empty string when one can."""
    if os.getuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in DAEMONS if not Path(SBIN, name).exists()] + ["sbatch"] * (not shutil.which("sbatch"))
    return f"no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)" if missing else ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Cluster:
    """Start it, ``conf`` is what SLURM_CONF must name; ``stop`` ends every process of it."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.nodes = [f"node-{i}" for i in range(1, nodes + 1)]  # hyphens, which some launchers trip over
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment["SLURM_CONF"] = str(self.conf)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration and start the daemons; RuntimeError when the nodes do not come up."""
        folder, ports = self.folder, _free_ports(2 + len(self.nodes))
        (folder / "log").mkdir(parents=True)
        (folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        lines = [NODE.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports[2:], strict=True)]
        self.conf.write_text(CONF.format(folder=folder, host=host, ports=ports) + "".join(lines))
        gpus = [f"NodeName={name} Name=gpu File=/dev/tty[0-1]\n" for name in self.nodes]
        (folder / "gres.conf").write_text("".join(gpus))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "log-file": "log/munged.log"}
        options = [f"--{option}={folder / name}" for option, name in (names | {"seed-file": "munge.seed"}).items()]
        self._run("munged", "munged", "--force", "--foreground", "--num-threads=2", *options)
        self._until(lambda: (folder / "munge.socket").exists())
        self._run("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in self.nodes:
            self.start_node(name)
        self.wait_idle()

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        self._run(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def wait_idle(self) -> None:
        """Wait until all nodes are idle and answer."""
        self._until(lambda: self.call("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(self.nodes), 90.0)

    def call(self, *words: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True).stdout

    def kill_node(self, name: str) -> None:
        """Kill a node as a power cut would: its slurmd and all that runs on it."""
        self.daemons.pop(name).kill()
        self._kill_family(name)

    def stop(self) -> None:
        """End all daemons, and what still runs on the nodes."""
        for name in self.nodes:
            self._kill_family(name)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name in self.nodes:
            self._kill_family(name)

    def _run(self, key: str, program: str, *words: str) -> None:
        with (self.folder / f"log/{key}.out").open("ab") as out:
            command = [f"{SBIN}/{program}", *words]
            self.daemons[key] = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env=self.environment | {"CLUSTER_NODE": key},
                preexec_fn=_die_with_parent,
            )

    def _kill_family(self, node: str) -> None:
        """Kill this cluster's processes of one node; they are known by their environment, which they inherit."""
        own = f"SLURM_CONF={self.conf}".encode()
        marks = {f"SLURMD_NODENAME={node}".encode(), f"CLUSTER_NODE={node}".encode()}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = set(path.read_bytes().split(b"\0"))
                if own in words and marks & words:
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended

    def _until(self, true: object, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the test's Slurm does not come up; see {self.folder}/log")
            time.sleep(0.1)
