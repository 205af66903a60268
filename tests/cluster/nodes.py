"""Two "nodes" on one machine: namespaces with their own address, host name, processes, /dev/shm and /run.

Needs root, and leaves nothing behind: everything lives in the namespaces and in the folder that is given.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ADDRESSES = {"node-a": "10.213.77.1", "node-b": "10.213.77.2"}
INTERFACE = "eth0"
SSH_PORT = 2213
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
SERVICES = ("sleep", "sshd", "munged", "slurm")


@dataclass
class Node:
    """A namespace set, held open by its first process. ``environment`` is what a login there would set."""

    name: str
    keeper: subprocess.Popen
    pid: int  # of the namespace's first process, as the machine counts
    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return ADDRESSES[self.name]

    def enter(self, command: list[str], cwd: Path | str = "/") -> list[str]:
        """The command line that runs ``command`` on this node."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", "--", *inside]

    def start(self, command, cwd: Path | str, log: Path) -> subprocess.Popen:
        """Start ``command`` on this node; it ends with the node at the latest."""
        with open(log, "a") as output:
            process = subprocess.Popen(
                self.enter([str(part) for part in command], cwd), env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *command, cwd="/", check=True) -> str:
        done = subprocess.run(
            self.enter([str(part) for part in command], cwd), env=self.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def processes(self) -> dict[int, list[str]]:
        """Command lines of what runs on this node, by the machine's process id; without services and zombies."""
        namespace, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns/pid") != namespace:
                    continue
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[0] and not any(name in Path(words[0]).name for name in SERVICES):
                    found[int(folder.name)] = words
        return found

    def ranks(self) -> list[int]:
        """The training processes themselves, without their launchers."""
        return [pid for pid, words in self.processes().items() if any(word.endswith("train.py") for word in words[1:3])]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # the kernel takes the namespace's other processes with it
        self.keeper.wait(timeout=10)
        for process in self.started:
            process.wait(timeout=10)


def refusal() -> str | None:
    """Why this machine cannot have nodes, None if it can."""
    missing = [name for name in ("ip", "nsenter", "unshare", "setpriv", "mount") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid():
        return "not root"
    probe = subprocess.run([*UNSHARE, "ip", "link", "add", "type", "veth"], capture_output=True, text=True)
    return f"namespaces are refused: {probe.stderr.strip()}" if probe.returncode else None


@contextlib.contextmanager
def two_nodes(folder: Path, environment: dict[str, str]) -> Iterator[list[Node]]:
    """node-a and node-b, joined by a cable, that know each other by name."""
    with contextlib.ExitStack() as held:
        nodes = []
        for name in ADDRESSES:
            nodes.append(_boot(name, folder, environment))
            held.callback(nodes[-1].end)
        first, second = nodes
        cable = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(second.pid)]
        subprocess.run(["nsenter", "--target", str(first.pid), "--net", "--", *cable], check=True)
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            node.run("ip", "link", "set", INTERFACE, "up")
            node.run("ip", "link", "set", "lo", "up")
        yield nodes


def _boot(name: str, folder: Path, environment: dict[str, str]) -> Node:
    keeper = subprocess.Popen(
        # Dies with this program, however that ends.
        ["setpriv", "--pdeathsig", "KILL", *UNSHARE, "--kill-child", "sh", "-c", "echo up; exec sleep infinity"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    keeper.stdout.readline()
    keeper.stdout.close()
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
    node = Node(name, keeper, int(children[0]), environment)
    node.run("hostname", name)
    hosts = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in ADDRESSES.items())]
    hosts.write_text("\n".join(lines) + "\n")
    node.run("mount", "--bind", hosts, "/etc/hosts")
    for place in ("/run", "/dev/shm"):
        node.run("mount", "-t", "tmpfs", "tmpfs", place)
    return node


def start_sshd(nodes: list[Node], folder: Path) -> None:
    """Log-in by key between the nodes; keys and settings lie over /etc/ssh in the namespaces alone."""
    keys = folder / "ssh"
    keys.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    for node in nodes:
        node.run("mount", "-t", "tmpfs", "tmpfs", "/etc/ssh")
        node.run("mkdir", "-p", "/run/sshd")
        node.run("cp", *keys.iterdir(), "/etc/ssh")
        _write(node, "/etc/ssh/ssh_config", (
            "Host *\n IdentityFile /etc/ssh/user\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /etc/ssh/known\n LogLevel ERROR\n"
        ))  # fmt: skip
        _write(node, "/etc/ssh/sshd_config", (
            f"Port {SSH_PORT}\nListenAddress {node.address}\nHostKey /etc/ssh/host\nPasswordAuthentication no\n"
            "AuthorizedKeysFile /etc/ssh/user.pub\nPermitRootLogin prohibit-password\nUsePAM no\nStrictModes no\n"
        ))  # fmt: skip
        node.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"], "/", folder / f"sshd_{node.name}.log")
    first = nodes[0]
    for node in nodes:
        wait_until(lambda node=node: _logs_in(first, node), 20, f"no ssh log-in on {node.name}")


def _logs_in(source: Node, target: Node) -> bool:
    try:
        return source.run("ssh", "-p", SSH_PORT, "-o", "BatchMode=yes", target.name, "hostname").strip() == target.name
    except RuntimeError:
        return False


def _write(node: Node, path: str, text: str) -> None:
    node.run("sh", "-c", 'printf %s "$0" > "$1"', text, path)


def wait_until(condition, seconds: float, complaint) -> float:
    """Seconds until ``condition()`` held; else a TimeoutError that says ``complaint``, a text or what returns one."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            text = complaint() if callable(complaint) else complaint
            raise TimeoutError(f"{text} within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - start
