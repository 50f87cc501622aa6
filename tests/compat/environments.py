"""Virtual environments of servers and clients, one per file in requirements/, made once and kept in a cache folder."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
# MLflow alone is half a gigabyte, and package indexes may be slow.
INSTALL_SECONDS = 1800


class Missing(Exception):
    """Packages that cannot be had here; the message says why."""


def cache():
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "penstock" / "servers"


def say(message):
    print(message, file=sys.stderr, flush=True)


class Environment:
    """The packages of requirements/NAME.txt, installed."""

    def __init__(self, name):
        self.name = name
        self.requirements = REQUIREMENTS / f"{name}.txt"
        key = f"{sys.version}\n{self.requirements.read_text()}"
        self.folder = cache() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self.bin = self.folder / "bin"

    def install(self):
        """Makes the environment unless it is there. Raises `Missing` if a package cannot be had."""
        # Installed scripts name their folder, so it is made in place; a complete one has the mark.
        complete = self.folder / "complete"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.lock", "w") as lock:
            # Another run may be installing the same.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                self.install_anew()
                complete.touch()

    def install_anew(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        say(f"{self.name}: installing {', '.join(self.pins())} into {self.folder} (once)")
        self.run([sys.executable, "-m", "venv", str(self.folder)])
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        self.run([*pip, "--progress-bar", "off", "-r", str(self.requirements)])

    def run(self, command):
        """Runs a step of the installation, and says every ten seconds how far it is."""
        lines = []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        begin = time.monotonic()
        try:
            while True:
                try:
                    process.wait(10)
                    break
                except subprocess.TimeoutExpired:
                    seconds = time.monotonic() - begin
                    say(f"{self.name}: {seconds:.0f} s: {lines[-1].strip()[:110] if lines else 'starting'}")
                    if seconds > INSTALL_SECONDS:
                        raise Missing(f"pip was not done after {INSTALL_SECONDS} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        reader.join()
        if process.returncode != 0:
            errors = [line.strip() for line in lines if "error" in line.lower()] or [line.strip() for line in lines]
            raise Missing(f"its packages cannot be installed: {errors[-1] if errors else 'no output'}")

    def pins(self):
        """The lines of its requirements: NAME==VERSION."""
        lines = (line.split("#")[0].strip() for line in self.requirements.read_text().splitlines())
        return [line for line in lines if line]

    def path(self):
        """PATH as in a shell with this environment activated."""
        return f"{self.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

