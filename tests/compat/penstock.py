"""A Penstock of its own for each test: its processes, ports and files, which it can list, and ends in any case."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

# Nothing here takes as long unless something is wrong; machines may be busy, and servers slow to load.
WAIT_SECONDS = 180
# How often something is looked up that nothing announces.
LOOK_SECONDS = 0.05
LISTEN = "0A"


class Failed(Exception):
    """What a test expected does not hold; the message says what was seen."""


def wait_for(what, look, seconds=WAIT_SECONDS):
    """The first true result of `look`. Raises `Failed`, with what it saw last, if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise Failed(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(LOOK_SECONDS)


class Penstock:
    """`penstock serve` in a folder of its own, which looks to model servers like a person's machine: HOME, TMPDIR and a
    working folder with the files of the model."""

    def __init__(self, binary, model, path):
        self.binary = str(binary)
        self.root = Path(tempfile.mkdtemp(prefix="penstock-servers-"))
        self.data, self.work = self.root / "data", self.root / "work"
        # Instances inherit few variables; this one tells the processes of this test from all others.
        self.mark = f"HOME={self.root / 'home'}".encode()
        self.serve = None
        for folder in (self.data, self.root / "home", self.root / "tmp"):
            folder.mkdir()
        shutil.copytree(model, self.work)
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        self.environment = ours | {
            "PATH": path,
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PENSTOCK_CONFIG": str(self.data / "client.json"),
        }

    def start(self):
        ready = self.root / "ready.json"
        addresses = [f"--{name}-addr=127.0.0.1:0" for name in ("control", "gateway", "admin")]
        command = [self.binary, "serve", f"--data={self.data}", f"--ready-file={ready}", *addresses]
        with open(self.root / "serve.log", "w") as log:
            self.serve = subprocess.Popen(
                command, cwd=self.work, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for("penstock serve is ready", lambda: self.is_alive() and ready.exists())
        self.gateway = json.loads(ready.read_text())["gateway"]
        self.before = self.files()

    def is_alive(self):
        if self.serve.poll() is not None:
            raise Failed(f"penstock serve ended with {self.serve.returncode}: {self.last_lines()}")
        return True

    def last_lines(self, count=5):
        lines = (self.root / "serve.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-count:])

    def run(self, *arguments, seconds=2 * WAIT_SECONDS):
        """The standard output of a command of `penstock`. Raises `Failed` if it does not succeed."""
        try:
            done = subprocess.run(
                [self.binary, *arguments], cwd=self.work, env=self.environment, capture_output=True, text=True,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"penstock {' '.join(arguments)} took more than {seconds} s") from None
        if done.returncode != 0:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
            raise Failed(f"penstock {' '.join(arguments)} ended with {done.returncode}: {said}")
        return done.stdout

    def get(self, *arguments):
        return json.loads(self.run(*arguments, "-o", "json"))

    def instances(self, deployment):
        """The live instances of a deployment."""
        items = self.get("get", "instances", deployment)["items"]
        return [item for item in items if item["state"] not in ("stopped", "failed")]

    def wait_for_instances(self, deployment, count):
        """Waits until it has exactly this many, all of them ready."""
        states = []

        def look():
            states[:] = [item["state"] for item in self.instances(deployment)]
            return states == ["ready"] * count

        wait_for(lambda: f"{count} instances are ready; there are: {', '.join(states) or 'none'}", look)

    def connection(self, seconds):
        address = urlsplit(self.gateway)
        return http.client.HTTPConnection(address.hostname, address.port, timeout=seconds)

    def processes(self):
        """The live processes of this test other than `penstock serve`, by id, each with its command."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or (self.serve and int(entry.name) == self.serve.pid):
                continue
            # It may end at any moment.
            with contextlib.suppress(OSError):
                marked = self.mark in (entry / "environ").read_bytes().split(b"\0")
                if marked and is_running(int(entry.name)):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = command.strip()
        return found

    def listening(self):
        """The addresses on which they listen."""
        sockets = {}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN:
                    host, port = words[1].split(":")
                    loopback = host.endswith("7F") or host == "0" * 24 + "01000000"
                    sockets[f"socket:[{words[9]}]"] = f"{'loopback' if loopback else 'all addresses'}:{int(port, 16)}"
        found = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        found.add(sockets.get(os.readlink(descriptor)))
        return sorted(found - {None})

    def files(self):
        """Everything in HOME, TMPDIR and the working folder, except folders and what Python keeps beside any program."""
        folders = [self.root / "home", self.root / "tmp", self.work]
        found = {path for folder in folders for path in folder.rglob("*") if not path.is_dir()}
        return {path for path in found if path.parent.name != "__pycache__"}

    def left_files(self):
        return sorted(str(path.relative_to(self.root)) for path in self.files() - self.before)

    def stop(self):
        """Ends it as a person does. Raises `Failed` if that leaves a process."""
        self.serve.send_signal(signal.SIGTERM)
        try:
            self.serve.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"penstock serve did not end within {WAIT_SECONDS} s of SIGTERM") from None
        if left := self.processes():
            raise Failed(f"penstock serve ended and left {left}")

    def destroy(self, keep=None):
        """Ends every process of the test and removes its files; those for people go to the folder `keep` first."""
        if self.serve and self.serve.poll() is None:
            self.serve.kill()
            self.serve.wait()
        # A process may start another one meanwhile.
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_SECONDS)
        if keep:
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(self.root, keep, ignore=sockets)
        shutil.rmtree(self.root)


def sockets(folder, names):
    return [name for name in names if Path(folder, name).is_socket()]


def is_running(pid):
    """Whether a process is there and has not ended, waited for or not; it has when the last of its threads has."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        return state not in "ZX" or len(list((process / "task").iterdir())) > 1
    except OSError:
        return False
