"""Hosts on one machine, for real: each a network namespace with its own name, address, sshd and link to a bridge.

    with Cluster("h1", "h2") as hosts:
        hosts.run("h1", ["ssh", "h2", "hostname"])
        hosts.cut("h2")

They share the disk and the process numbers of the machine, not its network. Names and addresses are drawn anew for each
cluster, so that tests side by side, and what a killed one left behind, do not meet. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.ranks import ROOT

NETNS = Path("/etc/netns")  # what `ip netns exec` lays over /etc
SSH_CONFIG = """Host *
  User root
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""
SSHD_CONFIG = """Port 22
ListenAddress {address}
HostKey {folder}/key_{host}
PidFile {folder}/sshd_{host}.pid
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 50
"""


def missing() -> str:
    """Why hosts cannot be made here; "" where they can."""
    if os.geteuid():
        return "network namespaces need root"
    absent = [p for p in ("ip", "ssh", "sshd", "ssh-keygen", "pdsh") if shutil.which(p) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt: iproute2, openssh-server, openssh-client, pdsh)"
    probe = f"gradus-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"network namespaces cannot be made: {made.stderr.strip()}" if made.returncode else ""


class Cluster:
    """The hosts of the names given, from entering to leaving; every process on them is ended at the end."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.tag = secrets.token_hex(3)
        self.bridge = f"gb{self.tag}"
        net = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
        self.addresses = {name: f"{net}.{i + 1}" for i, name in enumerate(names)}
        self.folder = Path(tempfile.mkdtemp(prefix="gradus-hosts-"))

    def __enter__(self) -> Cluster:
        try:
            self._make_keys()
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for name in self.names:
                self._make(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            for pid in self.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.netns(name)], capture_output=True)  # its end of the link too
            shutil.rmtree(NETNS / self.netns(name), ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def netns(self, name: str) -> str:
        return f"gradus-{self.tag}-{name}"

    def on(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on a host, as somebody who is logged in there."""
        script = f'hostname {name}; exec "$@"'
        return ["ip", "netns", "exec", self.netns(name), *("unshare", "--uts", "sh", "-c", script, "-"), *argv]

    def start(self, name: str, argv: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self.on(name, argv), text=True, **{"cwd": ROOT, **popen})

    def run(self, name: str, argv: Sequence[str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.on(name, argv), cwd=ROOT, text=True, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )

    def cut(self, name: str) -> None:
        """Take the host off the net, as if its cable were pulled: nobody is told."""
        ip("link", "set", self._veth(name), "down")

    def heal(self, name: str) -> None:
        ip("link", "set", self._veth(name), "up")

    def pids(self, name: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.netns(name)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of what runs on a host beside its sshd and the sessions of that."""
        lines = {}
        for pid in self.pids(name):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if line and not line.startswith("sshd:") and not line.startswith("/usr/sbin/sshd"):
                    lines[pid] = line
        return lines

    def wait_until_quiet(self, name: str, timeout_s: float) -> dict[int, str]:
        """What still runs on a host after `timeout_s` seconds: {} as soon as nothing does."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes(name)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _veth(self, name: str) -> str:
        return f"gv{self.tag}{self.names.index(name)}"

    def _make_keys(self) -> None:
        for key in ("id", *(f"key_{name}" for name in self.names)):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        known = [
            f"{name},{self.addresses[name]} {(self.folder / f'key_{name}.pub').read_text()}" for name in self.names
        ]
        (self.folder / "known_hosts").write_text("".join(known))

    def _make(self, name: str) -> None:
        netns, veth = self.netns(name), self._veth(name)
        etc = NETNS / netns
        (etc / "ssh").mkdir(parents=True)
        (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (etc / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in self.addresses.items())
        )
        ip("netns", "add", netns)
        ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", netns)
        ip("link", "set", veth, "master", self.bridge, "up")
        ip("-n", netns, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        ip("-n", netns, "link", "set", "eth0", "up")
        ip("-n", netns, "link", "set", "lo", "up")
        config = self.folder / f"sshd_{name}.conf"
        config.write_text(SSHD_CONFIG.format(folder=self.folder, host=name, address=self.addresses[name]))
        Path("/run/sshd").mkdir(exist_ok=True)
        log = str(self.folder / f"sshd_{name}.log")
        subprocess.run(self.on(name, ["/usr/sbin/sshd", "-f", str(config), "-E", log]), check=True, timeout=300)


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, timeout=300)
